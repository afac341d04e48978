"""
What the data stages cost over the bare engines, in one run on this machine.

    python benchmarks/stages.py --policy out/demo/models/policy --reward out/demo/models/reward [--vllm]

1) --help of each script, seconds.
2) generate.py: the stage (sampling, decoding, writing) against the engine's own call with the same prompts, parameters and batches
   (transformers' generate, do_sample; with --vllm also vLLM's generate with the same seeds, an engine of its own).
3) score.py: batches by token budget against one response at a time, and the share of padding.
4) build_pairs.py: 60,000 prompts x 5 responses, seconds and peak memory of the process.
Prints one line each and a JSON object last.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ["HF_HUB_OFFLINE"] = "1"


def seconds_of(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def help_times() -> dict:
    return {name: round(seconds_of(lambda: subprocess.run([sys.executable, REPO / f"{name}.py", "--help"], capture_output=True)), 2)
            for name in ("generate", "score", "build_pairs", "train_dpo", "boundary", "evaluate")}


def generate_ratio(policy: str, folder: Path, backend: str, prompts: int = 32, tokens: int = 64) -> dict:
    import torch
    import generate
    argv = ["--model", policy, "--prompts", str(REPO / "data/demo_train.jsonl"), "--max-tokens", str(tokens), "--limit", str(prompts),
            "--backend", backend, "--dtype", "float32", "--overwrite", "--out"]
    tokenizer = generate.load_tokenizer(policy, None)
    rows = [json.loads(line) for line in open(REPO / "data/demo_train.jsonl")][:prompts]
    ids = [generate.prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in rows]
    args = generate.parse_args(argv + [str(folder / "bare.jsonl")])
    stop = [generate.end_of_turn(tokenizer)]
    if backend == "vllm":
        sample = generate.vllm_engine(args, stop, max(map(len, ids)) + tokens)
        jobs = [(row["id"], k, some) for row, some in zip(rows, ids) for k in range(args.n)]
        sample(jobs[:8], int)
        bare = seconds_of(lambda: sample(jobs, int))  # this is LLM.generate with the requests made beforehand, and nothing else
        del sample
    else:
        from transformers import AutoModelForCausalLM, GenerationConfig
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
        model.generation_config = GenerationConfig(max_new_tokens=tokens, do_sample=True, temperature=args.temperature, top_p=args.top_p,
                                                   top_k=0, eos_token_id=stop, pad_token_id=stop[0])
        batches = sorted((some for some in ids for _ in range(args.n)), key=len)
        batches = [batches[i:i + args.batch_size] for i in range(0, len(batches), args.batch_size)]

        def own_call() -> None:
            for batch in batches:
                longest = max(map(len, batch))
                model.generate(input_ids=torch.tensor([[stop[0]] * (longest - len(some)) + some for some in batch]),
                               attention_mask=torch.tensor([[0] * (longest - len(some)) + [1] * len(some) for some in batch]))
        with torch.inference_mode():
            bare = seconds_of(own_call)
        del model
    generate.main(generate.parse_args(argv + [str(folder / f"{backend}.jsonl")]))
    ours = json.loads((folder / f"{backend}.meta.json").read_text())["counts"]["sampling_seconds"]
    return {"stage_s": ours, "engine_s": round(bare, 2), "ratio": round(ours / bare, 3)}


def score_ratio(reward: str, rows: int = 48) -> dict:
    import score
    args = score.parse_args(["--model", reward, "--responses", "-", "--out", "-", "--dtype", "float32", "--backend", "hf"])
    args.max_length = 512
    tokenizer = score.load_tokenizer(reward, None)
    seen: Counter = Counter()
    encode, run = score.rm_scorer(args, tokenizer, seen)
    texts = [json.loads(line) for line in open(REPO / "data/demo_train.jsonl")][:rows]
    # answers of many lengths: the written ones, whole, halved and doubled
    jobs = [encode({"prompt": [{"role": "user", "content": row["prompt"]}]}, {"text": text})
            for row in texts for response in row["responses"]
            for text in (response["text"], response["text"][:len(response["text"]) // 2], response["text"] + " " + response["text"])]
    run(jobs[:8], int)
    seen.clear()
    batched = seconds_of(lambda: run(jobs, int))
    padding = 1 - seen["real"] / seen["padded"]
    single = seconds_of(lambda: [run([job], int) for job in jobs])
    return {"responses": len(jobs), "batched_s": round(batched, 2), "one_at_a_time_s": round(single, 2), "speedup": round(single / batched, 2),
            "padding": round(padding, 4)}


def build_pairs_cost(folder: Path, prompts: int = 61_135) -> dict:
    draw = random.Random(0)
    words = "the of and to in is that for it as with on by are this be from or an at not have".split()
    ids = [draw.randrange(100_000) for _ in range(300)]
    with open(folder / "big.jsonl", "w") as file:
        for i in range(prompts):
            responses = [{"text": " ".join(draw.choices(words, k=250)), "source": source, "model": "m", "finish": "stop", "tokens": 250,
                          "token_ids": ids, "tokenizer": "x", "reward": draw.gauss(0, 3), "reward_error": None, "scores": {}}
                         for source in ("on", "on", "on", "on", "off", "off", "off", "off")]
            file.write(json.dumps({"id": f"p{i}", "prompt": [{"role": "user", "content": f"question {i}"}], "responses": responses}) + "\n")
    code = ("import resource, sys, build_pairs; build_pairs.main(build_pairs.parse_args(sys.argv[1:])); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    command = [sys.executable, "-c", code, "--scored", str(folder / "big.jsonl"), "--out", str(folder / "pairs.jsonl")]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    said, peak = done.stdout.strip().splitlines()[-2:]
    return {"prompts": prompts, "input_mb": round((folder / "big.jsonl").stat().st_size / 1e6), "pairs": json.loads(said)["pairs"],
            "seconds": round(time.perf_counter() - started, 1), "peak_gb": round(int(peak) * 1024 / 1e9, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--vllm", action="store_true", help="measure the vllm backend too")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = {"help_s": help_times, "build_pairs": lambda: build_pairs_cost(folder), "score": lambda: score_ratio(args.reward),
                 "generate_hf": lambda: generate_ratio(args.policy, folder, "hf")}
        if args.vllm:
            steps["generate_vllm"] = lambda: generate_ratio(args.policy, folder, "vllm")
        for step, call in steps.items():
            results[step] = call()
            print(step, results[step], flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
