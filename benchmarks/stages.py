"""
What the data stages cost beside the engines that they call, in one run on this machine.

    python benchmarks/stages.py --policy out/models/policy --reward out/models/reward [--vllm]

help         seconds of each script's --help
generate     the share of a run's sampling that is not spent in the engine (decoding, order, writing); against
             transformers' own `generate` with the same sampling; float32 against bfloat16
score        batches by --batch-tokens against one response at a time, and the share of padding
build_pairs  61,135 prompts x 8 responses with 300 token ids each: seconds and peak memory of the process
windows      a simulation: sampling all requests at once against windows of 1,024 rows, for n = 1, 2, 4

Prints a line for each and one JSON object last.
"""

import argparse
import heapq
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
PROMPTS = REPO / "data/train.jsonl"
sys.path.insert(0, str(REPO))
os.environ["HF_HUB_OFFLINE"] = "1"


def seconds_of(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def help_seconds():
    result = {}
    for script in ("generate", "score", "build_pairs", "train_dpo", "boundary", "evaluate"):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, str(REPO / f"{script}.py"), "--help"], capture_output=True, check=True
        )
        result[script] = round(time.perf_counter() - started, 2)
    return result


# ----- generate
class Stopwatch:
    """Seconds spent inside a sampler, apart from what happens between its results."""

    def __init__(self):
        self.seconds = 0.0

    def around(self, make_sampler):
        def make(*args):
            sample = make_sampler(*args)

            def timed(queue):
                results = iter(sample(queue))
                while True:
                    started = time.perf_counter()
                    result = next(results, None)
                    self.seconds += time.perf_counter() - started
                    if result is None:
                        return
                    yield result

            return timed

        return make


def generate_cost(policy, folder, backend, dtype="float32", n_rows=32, n_tokens=64):
    import generate

    out = folder / f"{backend}_{dtype}.jsonl"
    argv = ["--model", policy, "--prompts", str(PROMPTS), "--out", str(out), "--overwrite"]
    argv += ["--max-tokens", str(n_tokens), "--limit", str(n_rows), "--backend", backend, "--dtype", dtype]
    args, watch = generate.parse_args(argv), Stopwatch()
    name = f"{backend}_sampler"
    plain = getattr(generate, name)
    setattr(generate, name, watch.around(plain))
    generate.main(args)
    setattr(generate, name, plain)
    counts = json.loads(out.with_suffix(".meta.json").read_text())["counts"]
    stage = counts["sampling_seconds"]
    result = {"tokens": counts["tokens_sampled"], "stage_s": stage, "engine_s": round(watch.seconds, 2)}
    result["outside_share"] = round(1 - watch.seconds / stage, 4)
    if backend == "hf" and dtype == "float32":
        result["transformers_s"] = round(transformers_seconds(args), 2)
        result["ratio"] = round(stage / result["transformers_s"], 2)
    return result


def transformers_seconds(args):
    """The same prompts and batches by `model.generate` with its own temperature and top-p."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    import generate

    tokens = generate.read_tokens(args)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_tokens,
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=0,
        eos_token_id=tokens.stop_ids,
        pad_token_id=tokens.pad_id,
    )
    rows, dropped = generate.read_prompts(args.prompts)
    prompts, _ = generate.encode_prompts(rows, args, tokens, dropped)
    ids = [prompt for _, prompt in prompts for _ in range(args.n)]
    ids.sort(key=len)
    batches = [generate.pad_left(ids[i : i + 64], tokens.pad_id, "cpu") for i in range(0, len(ids), 64)]

    @torch.inference_mode()
    def sample():
        for batch, mask in batches:
            model.generate(input_ids=batch, attention_mask=mask)

    return seconds_of(sample)


# ----- score
def score_cost(reward, n_rows=48):
    import score

    responses = []
    with open(PROMPTS) as file:
        rows = [json.loads(line) for line in file][:n_rows]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["responses"] = [{"text": entry["text"], "source": "off"} for entry in row["responses"]]
        for share in (0.25, 0.5, 0.75, 1):  # of other lengths
            text = row["responses"][0]["text"]
            row["responses"].append({"text": text[: int(share * len(text))], "source": "off"})
        responses += row["responses"]
    argv = ["--model", reward, "--responses", "x", "--out", "x", "--dtype", "float32"]
    args = score.parse_args(argv)
    scorer = score.RewardModel(args, {row["id"]: row for row in rows})
    scorer.load()
    scorer.score(rows[:2], lambda n: None)
    scorer.counts = Counter()
    batched = seconds_of(lambda: scorer.score(rows, lambda n: None))
    padding = 1 - scorer.counts["tokens_scored"] / scorer.counts["tokens_padded"]
    rewards = [response["reward"] for response in responses]
    args.batch_tokens = 1
    alone = seconds_of(lambda: scorer.score(rows, lambda n: None))
    largest = max(abs(a - response["reward"]) for a, response in zip(rewards, responses, strict=True))
    result = {"responses": len(responses), "batched_s": round(batched, 2), "one_by_one_s": round(alone, 2)}
    result |= {"times_faster": round(alone / batched, 2), "padding": round(padding, 4)}
    return result | {"largest_difference": largest}


# ----- build_pairs
def build_pairs_cost(folder, prompts=61_135):
    draw = random.Random(0)
    words = "the of and to in is that for it as with on by are this be from or an at not have".split()
    ids = [draw.randrange(100_000) for _ in range(300)]
    common = {"model": "m", "finish": "stop", "tokens": 250, "token_ids": ids, "tokenizer": "x"}
    with open(folder / "big.jsonl", "w") as file:
        for i in range(prompts):
            responses = []
            for source in ("on", "off"):
                for _ in range(4):
                    text = " ".join(draw.choices(words, k=250))
                    scores = {"reward": draw.gauss(0, 3), "reward_error": None, "scores": {}}
                    responses.append({"text": text, "source": source, **common, **scores})
            row = {"id": f"p{i}", "prompt": [{"role": "user", "content": f"question {i}"}]}
            file.write(json.dumps(row | {"responses": responses}) + "\n")
    code = (
        "import resource, sys, build_pairs; build_pairs.main(build_pairs.parse_args(sys.argv[1:])); "
        "usage = resource.getrusage(resource.RUSAGE_SELF); print(usage.ru_maxrss, usage.ru_utime)"
    )
    flags = ["--scored", str(folder / "big.jsonl"), "--out", str(folder / "pairs.jsonl")]
    started = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True, env=env
    )
    elapsed = time.perf_counter() - started
    said, usage = done.stdout.strip().splitlines()[-2:]
    peak, cpu = map(float, usage.split())
    result = {"prompts": prompts, "input_mb": round((folder / "big.jsonl").stat().st_size / 1e6)}
    result |= {"pairs": json.loads(said)["pairs"], "seconds": round(elapsed, 1), "cpu_seconds": round(cpu, 1)}
    return result | {"peak_gb": round(peak * 1024 / 1e9, 3)}


# ----- a simulation of windows
def engine_seconds(lengths, slots=256, step_ms=8.0, sequence_ms=0.03):
    """Seconds of an engine that gives each running sequence a token a step; steps read the weights once."""
    running, waiting, now, seconds = [], list(reversed(lengths)), 0, 0.0
    while running or waiting:
        while waiting and len(running) < slots:
            heapq.heappush(running, now + waiting.pop())
        end = running[0]
        seconds += (end - now) * (step_ms + sequence_ms * len(running)) / 1000
        now = end
        while running and running[0] == now:
            heapq.heappop(running)
    return seconds


def windows_cost(n_rows=16_384, window=1024):
    """Lengths are log-normal with mean 400, at most 2,048 tokens; speeds like those of 8B on an H100."""
    draw = random.Random(0)
    result = {}
    for n in (1, 2, 4):
        rows = []
        for _ in range(n_rows):
            rows.append([min(2048, max(1, int(draw.lognormvariate(5.67, 0.8)))) for _ in range(n)])
        at_once = engine_seconds([length for row in rows for length in row])
        by_window = 0.0
        for start in range(0, n_rows, window):
            by_window += engine_seconds([length for row in rows[start : start + window] for length in row])
        share = round(1 - at_once / by_window, 3)
        result[f"n={n}"] = {"at_once_s": round(at_once), "windows_s": round(by_window), "saved": share}
    return result


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--vllm", action="store_true", help="measure the vllm backend too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = {
            "help": help_seconds,
            "windows": windows_cost,
            "build_pairs": lambda: build_pairs_cost(folder),
            "score": lambda: score_cost(args.reward),
            "generate_hf": lambda: generate_cost(args.policy, folder, "hf"),
            "generate_hf_bfloat16": lambda: generate_cost(args.policy, folder, "hf", "bfloat16"),
        }
        if args.vllm:
            steps["generate_vllm"] = lambda: generate_cost(args.policy, folder, "vllm")
        results = {}
        for step, measure in steps.items():
            results[step] = measure()
            print(step, json.dumps(results[step]), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
