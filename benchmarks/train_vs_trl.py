"""
train_dpo.py against TRL's DPOTrainer on the same pairs, one after the other on this machine, each in its own process and environment.

    python -m venv .venv-trl && .venv-trl/bin/pip install trl==1.16.0        # the peer, for this measurement only
    python benchmarks/train_vs_trl.py --model out/demo/models/policy --pairs PAIRS.jsonl --trl-python .venv-trl/bin/python

PAIRS is any pairs file (default: the demo's); --responses FILE --models CHOSEN REJECTED makes one from rows {"prompt", "model",
"response"} of several models instead. 4 pairs a step, one epoch, at most 1024 tokens a side, no activation checkpointing, beta 0.1,
learning rate 1e-6, --dtype float32 or bfloat16 (TRL: autocast). TRL runs as it comes, with the reference in every step, and with
precomputed reference log-probabilities, on the same batches and learning rates, so that the losses can be compared. Tokens are
counted the same way for all: prompt + chosen plus prompt + rejected, never padding; the seconds are those of the optimizer steps,
and ours also with the reference pass, whose cache starts empty. Prints a table and a JSON object.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PEER = '''
import json, resource, sys, time
import datasets, torch, transformers, trl
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
model_name, pairs, out, dtype, precompute, rates = sys.argv[1:]
rates = json.loads(rates)
data = datasets.Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in map(json.loads, open(pairs))])
model, tokenizer = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32), AutoTokenizer.from_pretrained(model_name)
losses, times = [], []
class Watch(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        times.append(-time.perf_counter())
    def on_step_end(self, *args, **kwargs):
        times[-1] += time.perf_counter()
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            losses.append(float(logs["loss"]))
config = trl.DPOConfig(output_dir=out, per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-6, beta=0.1, max_length=1024,
                       bf16=dtype == "bfloat16", use_cpu=True, precompute_ref_log_probs=precompute == "yes", report_to=[], logging_steps=1,
                       save_strategy="no", gradient_checkpointing=False, disable_tqdm=True)
class InOrder(trl.DPOTrainer):  # the file's order and our learning rates, so that losses can be compared
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)
optimizer = torch.optim.AdamW(model.parameters(), lr=rates[0], weight_decay=0.0)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)] / rates[0])
InOrder(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()],
        optimizers=(optimizer, schedule)).train()
print(json.dumps({"seconds": sum(times), "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, "losses": losses,
                  "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}}))
'''


def make_pairs(responses: str, models: list[str], count: int, path: Path) -> None:
    """The first `count` prompts to which both models answered: the first model's answer is chosen."""
    rows: dict[str, dict[str, str]] = {}
    with (gzip.open if responses.endswith(".gz") else open)(responses, "rt") as file:
        for row in map(json.loads, file):
            rows.setdefault(row["prompt"], {})[row["model"]] = row["response"]
    both = [(prompt, of) for prompt, of in rows.items() if all(model in of for model in models)][:count]
    with open(path, "w") as file:
        for i, (prompt, of) in enumerate(both):
            sides = {side: [{"role": "assistant", "content": of[model]}] for side, model in zip(("chosen", "rejected"), models)}
            file.write(json.dumps({"pair_id": str(i), "prompt": [{"role": "user", "content": prompt}], **sides}) + "\n")


def in_our_order(pairs: str, path: Path) -> str:
    """The pairs in the order in which train_dpo.py's first epoch takes them."""
    sys.path.insert(0, str(REPO))
    from train_dpo import Pair, epoch_order
    rows = {row["pair_id"]: row for row in map(json.loads, open(pairs))}
    order = epoch_order([Pair(pair_id, "", [], [], 0.0) for pair_id in rows], 0, 0)
    path.write_text("".join(json.dumps(rows[pair.pair_id]) + "\n" for pair in order))
    return str(path)


def last_json(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", default="out/demo/pairs_on50.jsonl")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--responses")
    parser.add_argument("--models", nargs=2, default=["gpt4_1106_preview", "vicuna-7b-v1.5"])
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--trl-python", help="without it only ours is measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        pairs = str(Path(name, "pairs.jsonl")) if args.responses else args.pairs
        if args.responses:
            make_pairs(args.responses, args.models, args.count, Path(pairs))
        ours = last_json([sys.executable, str(REPO / "train_dpo.py"), "--model", args.model, "--pairs", pairs, "--out", f"{name}/ours",
                          "--batch-size", "4", "--max-length", "1024", "--lr", "1e-6", "--beta", "0.1", "--dtype", args.dtype])
        metrics = [json.loads(line) for line in open(f"{name}/ours/metrics.jsonl")]
        losses = [row["loss"] for row in metrics]
        ordered = in_our_order(pairs, Path(name, "ordered.jsonl"))
        result = {"pairs": ours["pairs"], "dropped": ours["dropped"], "tokens": ours["tokens"], "dtype": args.dtype,
                  "ours": {key: ours[key] for key in ("tokens_per_s", "tokens_per_s_with_reference", "peak_gb")} | {"losses": losses}}
        for precompute in ("no", "yes") if args.trl_python else ():
            peer = last_json([args.trl_python, "-c", PEER, args.model, ordered, f"{name}/trl{precompute}", args.dtype, precompute,
                              json.dumps([row["lr"] for row in metrics])])
            result["trl precomputed" if precompute == "yes" else "trl"] = peer | {"tokens_per_s": ours["tokens"] / peer["seconds"]}
    for system in (system for system in ("ours", "trl", "trl precomputed") if system in result):
        some = result[system]
        print(f"{system:16} {some.get('tokens_per_s_with_reference', some['tokens_per_s']):7.1f} tokens/s (ours: reference counted; steps "
              f"alone {result['ours']['tokens_per_s']:.1f})   peak {some['peak_gb']:6.2f} GB   losses "
              + " ".join(f"{loss:.4f}" for loss in some["losses"][:6]))
    if args.trl_python:
        result["largest loss difference"] = max(abs(a - b) for a, b in zip(losses, result["trl"]["losses"]))
        result["ratios"] = {"speed, reference counted": ours["tokens_per_s_with_reference"] / result["trl"]["tokens_per_s"],
                            "speed, steps alone": ours["tokens_per_s"] / result["trl precomputed"]["tokens_per_s"],
                            "memory": ours["peak_gb"] / result["trl"]["peak_gb"]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
