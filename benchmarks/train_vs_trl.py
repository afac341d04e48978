"""
train_dpo.py against TRL's DPOTrainer on the same pairs, in one run on this machine.

    python -m venv .venv-trl
    .venv-trl/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0
    python benchmarks/train_vs_trl.py --model out/models/policy --trl-python .venv-trl/bin/python \
        --responses alpaca_eval_805x8_responses.jsonl.gz

--pairs takes a file of pairs instead of --responses, rows {"prompt", "model", "response"}, of which the first
of --models is chosen and the second rejected. The systems run in turn, --rounds times, each run in a process
of its own and TRL in its own environment:

train_dpo.py                 and with --old SCRIPT another version of it
TRL as it comes              gradient checkpointing, its default, and the reference in every step
TRL without checkpointing    the reference in every step
the same, precomputed        its best; the pass that precomputes the reference is not counted

4 pairs a step, one epoch, at most 1,024 tokens a side, DPO with beta 0.1 and AdamW. All take the same pairs
in the same order at the same learning rates, so their losses can be compared. Speed is in tokens of prompt +
chosen and prompt + rejected, never padding, per second of the optimizer steps. TRL with a live reference has
it in its steps. Ours is counted twice: the steps alone, and the whole run, with loading and writing the model
and the reference pass, whose cache starts empty. Memory is the largest resident size of the process, on CUDA
what torch allocated.
(TRL 1.16 too multiplies only tokens of responses with the head; what differs is padding, and see above.)

Prints a Markdown table, medians with the smallest and largest of the rounds in brackets, and one JSON object
last; a line for each run on standard error.
"""

import argparse
import gzip
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OURS, OLD = "train_dpo.py", "train_dpo.py, --old"
BATCH, MAX_LENGTH, BETA, LR = 4, 1024, 0.1, 1e-6
AS_IT_COMES, PLAIN = "TRL as it comes", "TRL without checkpointing"
BEST = "TRL without checkpointing, reference precomputed"
TRL = {  # what differs from TRL's defaults
    AS_IT_COMES: {},
    PLAIN: {"gradient_checkpointing": False},
    BEST: {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
}
RATIOS = [  # of two systems, by a column of the table
    ("with_reference", OURS, AS_IT_COMES),
    ("with_reference", OURS, PLAIN),
    ("with_reference", OURS, OLD),
    ("steps_alone", OURS, BEST),
    ("steps_alone", OURS, OLD),
    ("peak_gb", OURS, AS_IT_COMES),
    ("peak_gb", OURS, PLAIN),
    ("peak_gb", OURS, OLD),
]


# ----- pairs
def read_responses(path, models):
    """A pair for each prompt to which both models answered."""
    answers = {}
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt") as file:
        for row in map(json.loads, file):
            answers.setdefault(row["prompt"], {})[row["model"]] = row["response"]
    chosen, rejected = models
    for prompt, texts in answers.items():
        if chosen in texts and rejected in texts:
            yield [{"role": "user", "content": prompt}], texts[chosen], texts[rejected]


def read_pairs(path):
    import train_dpo

    for line, row in train_dpo.read_jsonl(path, train_dpo.Row):
        pair = train_dpo.read_pair(row, line)
        yield pair["prompt"], *(response["text"] for response in pair["responses"])


def write_pairs(args, folder):
    """The first --count pairs that fit, in the order of our first epoch; file, tokens and learning rates.

    As messages, which both systems read, and without token ids, which TRL does not.
    """
    import train_dpo

    rows = {}
    source = read_responses(args.responses, args.models) if args.responses else read_pairs(args.pairs)
    for i, (prompt, *texts) in enumerate(source):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in texts)
        rows[str(i)] = {"pair_id": str(i), "prompt": prompt, "chosen": chosen, "rejected": rejected}
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    run = train_dpo.parse_args([*our_flags(args, path), "--out", "unused"])
    chat, config = train_dpo.read_chat(args.model)
    pairs, _ = train_dpo.load_pairs(str(path), chat, config, run)
    pairs = train_dpo.epoch_order(pairs[: args.count], run.seed, 0)
    path.write_text("".join(json.dumps(rows[pair.pair_id]) + "\n" for pair in pairs))
    steps = math.ceil(len(pairs) / BATCH)
    rates = [train_dpo.learning_rate(step, steps, LR, run.schedule) for step in range(steps)]
    return path, len(pairs), sum(pair.tokens() for pair in pairs), rates


# ----- one run of a system
def our_flags(args, pairs):
    flags = ["--model", args.model, "--pairs", str(pairs), "--dtype", args.dtype, "--epochs", "1"]
    flags += ["--batch-size", str(BATCH), "--max-length", str(MAX_LENGTH)]
    return flags + ["--beta", str(BETA), "--lr", str(LR)]


def last_json(command):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_ours(script, args, pairs):
    with tempfile.TemporaryDirectory() as folder:  # reference_cache is in it too, so it starts empty
        out = Path(folder, "model")
        said = last_json([sys.executable, str(script), *our_flags(args, pairs), "--out", str(out)])
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((out / "metrics.meta.json").read_text())
    return {
        "with_reference": said["tokens_trained"] / said["seconds"],
        "steps_alone": said["tokens_per_s"],
        "peak_gb": max(row["peak_gb"] for row in rows),
        "losses": [row["loss"] for row in rows],
        "versions": record["versions"],
    }


def run_trl(name, args, pairs, tokens, rates):
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": args.model, "pairs": str(pairs), "dtype": args.dtype, "rates": rates, "out": folder}
        job |= {"options": TRL[name]}
        said = last_json([args.trl_python, __file__, "one-run-of-trl", json.dumps(job)])
    column = "steps_alone" if name == BEST else "with_reference"
    return {column: tokens / said.pop("seconds"), **said}


def one_run_of_trl(job):
    """In TRL's environment, where there is nothing of ours."""
    import datasets
    import torch
    import transformers
    import trl

    on_cuda = torch.cuda.is_available()

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Watch(transformers.TrainerCallback):
        seconds, losses = 0.0, []

        def on_step_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if on_cuda:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self.started

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    with open(job["pairs"]) as file:
        rows = [json.loads(line) for line in file]
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rates = job["rates"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rates[0], weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rates[min(step, len(rates) - 1)] / rates[0]
    )
    config = trl.DPOConfig(
        output_dir=job["out"],
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_length=MAX_LENGTH,
        beta=BETA,
        bf16=job["dtype"] == "bfloat16",  # autocast
        use_cpu=not on_cuda,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **job["options"],
    )
    watch = Watch()
    trainer = InOrder(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[watch],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_cuda:
        peak = torch.cuda.max_memory_allocated()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    result = {"seconds": watch.seconds, "peak_gb": peak / 1e9, "losses": watch.losses}
    result |= {"checkpointing": config.gradient_checkpointing, "tokens": own_tokens(trainer.train_dataset)}
    print(json.dumps(result | {"versions": versions}))


def own_tokens(dataset):
    """Tokens as TRL counts them: templates may render something after the end of a turn, which it trains."""
    sides = ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")
    return sum(len(row[side]) for row in dataset for side in sides)


# ----- results
def spread(values, digits):
    """Median (smallest to largest)."""
    values = [f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    return "{} ({} to {})".format(*values)


def column(runs, name, digits):
    return spread([run[name] for run in runs], digits) if name in runs[0] else ""


def table(results):
    yield "| | tokens/s, reference counted | tokens/s of the steps alone | peak memory, GB |"
    yield "|---|---|---|---|"
    for name, runs in results.items():
        cells = [
            column(runs, "with_reference", 1),
            column(runs, "steps_alone", 1),
            column(runs, "peak_gb", 2),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def ratios(results):
    """Ours over another system, round by round."""
    for name, ours, other in RATIOS:
        if other in results:
            pairs = zip(results[ours], results[other], strict=True)
            yield f"{name}, {ours} / {other}", [one[name] / two[name] for one, two in pairs]


def largest_difference(results):
    """Of the loss of a step, ours against each of TRL's."""
    differences = {}
    for name in TRL:
        pairs = zip(results[OURS], results.get(name, []), strict=False)
        found = []
        for one, two in pairs:
            found += [abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)]
        differences[name] = max(found, default=None)
    return differences


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", metavar="FILE")
    source.add_argument("--responses", metavar="FILE")
    parser.add_argument("--models", nargs=2, default=["gpt4_1106_preview", "vicuna-7b-v1.5"])
    parser.add_argument("--count", type=int, default=12, help="pairs (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--old", metavar="SCRIPT", help="another version of train_dpo.py")
    parser.add_argument("--trl-python", metavar="PYTHON", help="without it only ours is measured")
    args = parser.parse_args()
    sys.path.insert(0, str(REPO))
    systems = [OURS]
    if args.old:
        systems.append(OLD)
    if args.trl_python:
        systems += TRL
    results = {name: [] for name in systems}
    with tempfile.TemporaryDirectory() as folder:
        path, count, tokens, rates = write_pairs(args, Path(folder))
        load = os.getloadavg()[0]
        for number in range(args.rounds):
            for name in systems:
                if name in TRL:
                    run = run_trl(name, args, path, tokens, rates)
                else:
                    run = run_ours(args.old if name == OLD else REPO / OURS, args, path)
                results[name].append(run)
                print(f"round {number + 1}, {name}: {json.dumps(run)}", file=sys.stderr)
    print("\n".join(table(results)))
    found = {"pairs": count, "tokens": tokens, "dtype": args.dtype, "load_at_start": load}
    found |= {"systems": results, "ratios": dict(ratios(results))}
    found["largest_loss_difference"] = largest_difference(results)
    print()
    for name, values in found["ratios"].items():
        print(f"{name}: {spread(values, 2)}")
    print(f"largest difference of a loss: {found['largest_loss_difference']}\n")
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["one-run-of-trl"]:
        one_run_of_trl(json.loads(sys.argv[2]))
    else:
        main()
