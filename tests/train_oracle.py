"""
What the tests of train_dpo.py share: runs in this process, and the same training the slow way.

The slow way has nothing of train_dpo.py's: an ordinary transformers model in float64, one sequence at a time,
full logits, losses in plain math, gradients of the losses by central differences, torch's AdamW.
"""

import contextlib
import io
import json
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import write_rows
from transformers import AutoModelForCausalLM

import train_dpo
from chat import read_chat
from recipes import train_losses  # noqa: F401  registers its losses: they are tested as train_dpo.py's own
from train_dpo import Pair, Sequence, epoch_order

CLOCKS = {"tokens_per_s", "peak_gb"}  # what two equal runs may differ in
LR = 1e-3
GIVEN = ("--model", "m", "--pairs", "p", "--out", "o")


# ----- pairs
def make_pairs(path, n=9, seed=0):
    """Rows as build_pairs.py writes them, of very different lengths; a third is on-policy, some were cut."""
    draw = random.Random(seed)

    def text(low, high):
        return "".join(draw.choice("abcdefgh ,.é") for _ in range(draw.randint(low, high))) + "x"

    rows = []
    for i in range(n):
        row = {"id": f"q{i}", "pair_id": f"p{i}", "prompt": [{"role": "user", "content": text(1, 25)}]}
        row["chosen"] = [{"role": "assistant", "content": text(0, 40)}]
        row["rejected"] = [{"role": "assistant", "content": text(0, 15)}]
        row |= {"source": "off" if i % 3 else "on", "chosen_reward": i / 4, "rejected_reward": 1.0}
        row["chosen_finish"] = "length" if i % 3 == 0 else "stop"
        row["rejected_finish"] = "length" if i % 3 == 1 else None
        rows.append(row)
    return write_rows(path, rows)


def pair_of(pair_id, source, prompt, responses, reward_margin=0.0):
    """A Pair from token ids."""
    sequences = [Sequence(prompt + response, len(prompt)) for response in responses]
    return Pair(pair_id, source, sequences, reward_margin, (0.0,) * len(sequences))


RAGGED = [
    pair_of("a", "on", [3, 4, 5, 6, 7], [[8, 9, 10, 258], [11, 12]], 0.5),
    pair_of("b", "off", [70] * 23, [[8, 9, 10, 258] * 8, [258]], -1.0),
    pair_of("c", "off", [1, 2], [list(range(20, 90)), [5, 5, 5, 258]], 2.0),
]


# ----- runs of main
def parse(*flags):
    """Arguments as main has them on a CPU."""
    args = train_dpo.parse_args([str(flag) for flag in flags])
    args.dtype = "float32" if args.dtype == "auto" else args.dtype
    args.micro_tokens = args.micro_tokens or 1024
    return args


def end_processes():
    """What main leaves behind where it stopped between start and end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def train(*flags):
    """A run of main in this process; returns (the JSON it printed, what it said on standard error)."""
    said, printed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            train_dpo.main(parse(*flags))
    except SystemExit as stop:
        pytest.fail(f"exit status {stop.code}: {said.getvalue()[-2000:]}")
    finally:
        end_processes()
    return json.loads(printed.getvalue().splitlines()[-1]), said.getvalue()


def refusal(capsys, call, *args):
    """The sentence with which a call ends the run; nothing but exit status 2 will do."""
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stop:
            call(*args)
    finally:
        end_processes()
    assert stop.value.code == 2
    return capsys.readouterr().err


def refused_run(capsys, *flags):
    return refusal(capsys, lambda: train_dpo.main(parse(*flags)))


def read_pairs(args, path=None):
    """Pairs of --pairs as main reads them."""
    chat, config = read_chat(str(args.model), None, args.template_kwargs)
    pairs, _ = train_dpo.load_pairs(str(path or args.pairs), chat, config, args)
    return pairs


def without_noise(rows):
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----- losses in plain math
def log_sigma(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def soft_label(wrong, z):
    """-log sigma(z) where a share of the labels is wrong."""
    return -(1 - wrong) * log_sigma(z) - wrong * log_sigma(-z)


WITHOUT_REFERENCE = ("slic", "slic_mean", "sft", "simpo")
PER_TOKEN = ("dpo_normalized", "slic_mean", "simpo")


def compared(args, logps, reference_logps, counts):
    """What a loss compares of (chosen, rejected)."""
    values = list(logps)
    if args.loss not in WITHOUT_REFERENCE:
        values = [logp - reference for logp, reference in zip(logps, reference_logps)]
    if args.loss in PER_TOKEN:
        values = [value / count for value, count in zip(values, counts)]
    return values


def oracle(args, logps, reference_logps, counts, reward_margin):
    """The loss of one pair."""
    if args.loss == "sft":
        return -logps[0] / counts[0]
    chosen, rejected = compared(args, logps, reference_logps, counts)
    h = chosen - rejected
    if args.loss in ("slic", "slic_mean"):
        return max(0.0, args.slic_delta - h) - args.slic_lambda * chosen
    if args.loss == "simpo":
        return -log_sigma(args.beta * h - args.simpo_gamma)
    if args.loss == "hinge":
        return max(0.0, 1 - args.beta * h)
    if args.loss == "ipo":
        return (h - 1 / (2 * args.beta)) ** 2
    if args.loss == "revkl":
        return soft_label(1 / (1 + math.exp(args.margin_scale * reward_margin)), args.beta * h)
    if args.loss == "dpo_smoothed":
        return soft_label(args.label_smoothing, args.beta * h)
    if args.loss == "dpo_nll":
        return -log_sigma(args.beta * h) - args.nll_weight * logps[0] / counts[0]
    assert args.loss in ("dpo", "dpo_normalized")
    return -log_sigma(args.beta * h)


def slopes(args, logps, *rest, eps=1e-4):
    """d oracle / d logps by central differences."""
    found = []
    for i in range(len(logps)):
        up, down = list(logps), list(logps)
        up[i] += eps
        down[i] -= eps
        found.append((oracle(args, up, *rest) - oracle(args, down, *rest)) / (2 * eps))
    return found


# ----- a plain model
def float64(folder):
    # eager: soft caps, sinks and experts in float64 are in no kernel
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float64}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def plain_logps(model, pair):
    """Of every sequence of a pair alone, from full logits, summed in float64 over the trained tokens."""
    sums = []
    for ids, start in pair.sequences:
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(torch.stack([logps[i - 1, ids[i]] for i in range(start, len(ids))]).sum())
    return torch.stack(sums)


def counts_of(pair):
    return [len(sequence.ids) - sequence.start for sequence in pair.sequences]


def pull_back(args, model, pairs):
    """Backward of the pairs' mean loss -> per pair its log-probabilities, token counts and loss."""
    values, total = [], 0
    for pair in pairs:
        logps = plain_logps(model, pair)
        numbers = (logps.tolist(), pair.reference_logps, counts_of(pair), pair.reward_margin)
        slope = torch.tensor(slopes(args, *numbers), dtype=torch.float64)
        total = total + (logps @ slope) / len(pairs)
        value = SimpleNamespace(pair=pair, logps=numbers[0], counts=numbers[2], loss=oracle(args, *numbers))
        values.append(value)
    if total.requires_grad:
        total.backward()
    return values


def mean_row(args, values):
    """What a row of metrics.jsonl says of pairs, in plain math."""

    def mean(numbers):
        return statistics.fmean(numbers)

    row = {"loss": mean(v.loss for v in values), "pairs": len(values)}
    row["chosen_logp"] = mean(v.logps[0] for v in values)
    row["chosen_logp_per_token"] = mean(v.logps[0] / v.counts[0] for v in values)
    if args.loss == "sft":
        return row
    rewards = []
    for v in values:
        sides = compared(args, v.logps, v.pair.reference_logps, v.counts)
        rewards.append([args.beta * side for side in sides])
    margins = [chosen - rejected for chosen, rejected in rewards]
    diversity = [v.logps[0] - v.logps[1] for v in values]
    row |= {
        "rejected_logp": mean(v.logps[1] for v in values),
        "rejected_logp_per_token": mean(v.logps[1] / v.counts[1] for v in values),
        "chosen_reward": mean(chosen for chosen, _ in rewards),
        "rejected_reward": mean(rejected for _, rejected in rewards),
        "accuracy": mean(margin > 0 for margin in margins),
        "margin": mean(margins),
        "margin_std": statistics.pstdev(margins),
        "diversity": mean(diversity),
        "diversity_std": statistics.pstdev(diversity),
    }
    return row


def step_row(args, values):
    row = mean_row(args, values)
    row["tokens"] = sum(len(sequence.ids) for v in values for sequence in v.pair.sequences)
    row["by_source"] = None
    sources = {v.pair.source for v in values}
    if len(sources) > 1:
        row["by_source"] = {}
        for source in sources:
            row["by_source"][source] = mean_row(args, [v for v in values if v.pair.source == source])
    return row


def plain_run(args, factors):
    """The run's steps (with learning rates --lr * factors) by a plain float64 loop -> rows, model."""
    pairs, model, rows = read_pairs(args), float64(args.model), []
    if args.reference:
        reference = float64(args.reference)
        with torch.no_grad():
            pairs = [pair._replace(reference_logps=plain_logps(reference, pair).tolist()) for pair in pairs]
    betas = (0.9, args.adam_beta2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=betas, weight_decay=0.0)
    for epoch in range(args.epochs):
        order = epoch_order(pairs, args.seed, epoch)
        for start in range(0, len(order), args.batch_size):
            optimizer.zero_grad()
            row = step_row(args, pull_back(args, model, order[start : start + args.batch_size]))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            lr = optimizer.param_groups[0]["lr"] = args.lr * factors[len(rows)]
            optimizer.step()
            rows.append(row | {"step": len(rows), "epoch": epoch, "lr": lr, "grad_norm": norm})
    assert len(rows) == len(factors)
    return rows, model


# ----- comparing metrics
def check_row(ours, plain, accuracy=True, scale=1.0):
    """A row of metrics.jsonl against one of the plain loop; scale widens the bounds."""
    assert ours.keys() - CLOCKS - {"eval"} == plain.keys(), ours.keys() ^ plain.keys()
    for name, value in plain.items():
        where = f"step {ours.get('step')}: {name} is {ours[name]}, expected {value}"
        if isinstance(value, dict):
            assert ours[name].keys() == value.keys(), where
            for source in value:
                check_row(ours[name][source], value[source], accuracy, scale)
        elif value is None:
            assert ours[name] is None, where
        elif name != "accuracy" or accuracy:
            rel = 5e-4 if name == "grad_norm" else 5e-5
            assert ours[name] == pytest.approx(value, rel=scale * rel, abs=scale * 2e-4), where


def check_rows(args, rows, expected, scale=1.0):
    assert len(rows) == len(expected)
    for ours, plain in zip(rows, expected):
        at_reference = plain["step"] == 0 and args.reference == args.model  # there the margin is rounding
        check_row(ours, plain, not at_reference, scale)


def close(ours, theirs, loss=1e-4):
    """The same run up to rounding, which Adam lets grow slowly."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        where = f"step {b['step']}: "
        assert a.keys() == b.keys(), where
        for name in ("step", "pairs", "tokens", "lr"):
            assert a[name] == b[name], where + name
        for name in ("loss", "margin", "chosen_reward", "rejected_reward"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), abs=loss), where + name
        for name in ("chosen_logp", "rejected_logp"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-5, abs=10 * loss), where + name
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), where + "grad_norm"
