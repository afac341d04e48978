"""train_dpo.py in one process: losses, log-probabilities, packing, gradients, whole runs, cache, data, export.

Run: python -m pytest tests/test_train.py -q     (processes, kills and resumes: tests/test_train_distributed.py)
Everything is checked against full logits from an ordinary transformers model in float64, and losses in plain math.
"""

import contextlib
import gc
import hashlib
import io
import itertools
import json
import math
import random
import shutil
import statistics
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
from conftest import make_policy, make_tokenizer, read_rows, write_rows
from train_dpo import Pair, TokenLogps, epoch_order, group_attention, group_logps, learning_rate, load_pairs
from train_dpo import micro_batches

CLOCKS = {"tokens_per_s", "peak_gb"}  # what two equal runs may differ in
LR = 1e-3
GIVEN = ("--model", "m", "--pairs", "p", "--out", "o")


# ---------------------------------------------------------------------------------------------------------------------
# helpers

def make_pairs(path, n=9, seed=0):
    """Rows as build_pairs.py writes them, of very different lengths; a third of the sides was cut, a third is on."""
    draw = random.Random(seed)

    def text(low, high):
        return "".join(draw.choice("abcdefgh ,.é") for _ in range(draw.randint(low, high))) + "x"

    return write_rows(path, [{
        "id": f"q{i}", "pair_id": f"p{i}", "prompt": [{"role": "user", "content": text(1, 25)}],
        "chosen": [{"role": "assistant", "content": text(0, 40)}],
        "rejected": [{"role": "assistant", "content": text(0, 15)}],
        "source": "off" if i % 3 else "on", "chosen_reward": i / 4, "rejected_reward": 1.0,
        "chosen_finish": "length" if i % 3 == 0 else "stop", "rejected_finish": "length" if i % 3 == 1 else None}
        for i in range(n)])


def parse(*flags):
    return train_dpo.parse_args([str(flag) for flag in flags])


def train(*flags):
    """A run of main in this process; returns (the JSON it printed, what it said on standard error)."""
    said, printed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            train_dpo.main(parse(*flags))
    except SystemExit as stop:
        pytest.fail(f"exit status {stop.code}: {said.getvalue()[-2000:]}")
    finally:
        if dist.is_initialized():  # main stopped between start and end
            dist.destroy_process_group()
    return json.loads(printed.getvalue().splitlines()[-1]), said.getvalue()


def refusal(capsys, call, *args):
    """The sentence with which a call ends the run; nothing but exit status 2 will do."""
    try:
        with pytest.raises(SystemExit) as stop:
            call(*args)
    finally:
        if dist.is_initialized():  # main stopped between start and end
            dist.destroy_process_group()
    assert stop.value.code == 2
    return capsys.readouterr().err


def refused_run(capsys, *flags):
    return refusal(capsys, lambda: train_dpo.main(parse(*flags)))


def plain_logps(model, pair):
    """Of every response from full logits, each sequence alone, summed in float64 over the trained tokens."""
    sums = []
    for response in pair.responses:
        ids = pair.prompt + [max(token, ~token) for token in response]
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(sum(logps[len(pair.prompt) + i - 1, token] for i, token in enumerate(response) if token >= 0))
    return torch.stack(sums)


def trained(pair):
    return [sum(token >= 0 for token in response) for response in pair.responses]


def float64(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float64).eval()


def whole_weights(policy):
    """Copies of the weights of a sharded model under the names that its file uses."""
    return {name: parameter.detach().full_tensor().clone() for name, parameter in policy.model.named_parameters()}


def without_noise(rows):
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


@pytest.fixture
def process():
    """The process group of one process that main makes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("untied"), seed=3, tie=False)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("other"), seed=8)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def whole_run(policy, pairs_file, tmp_path_factory):
    """Two epochs of 4 + 4 + 1 pairs; most tests of a whole run look at this one."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ("--model", policy, "--pairs", pairs_file, "--batch-size", 4, "--epochs", 2, "--lr", LR)
    summary, said = train(*flags, "--out", out)
    return SimpleNamespace(out=out, flags=flags, summary=summary, said=said, rows=read_rows(out / "metrics.jsonl"))


# ---------------------------------------------------------------------------------------------------------------------
# the losses

def log_sigma(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def oracle(args, logps, ref_logps, counts, reward_margin, at=None):
    """The loss of one pair from its responses' sums, in plain float64 math; HyPO's advantages are those of `at`."""
    if args.loss == "sft":
        return -logps[0] / counts[0]
    if args.loss == "slic":
        chosen, rejected = (logps[i] / counts[i] if args.slic_norm == "mean" else logps[i] for i in (0, 1))
        return max(0.0, args.slic_delta - chosen + rejected) - args.slic_lambda * chosen
    over = counts if args.ipo_norm == "mean" else [1] * len(counts)
    h = (logps[0] - ref_logps[0]) / over[0] - (logps[1] - ref_logps[1]) / over[1]
    if args.loss == "hinge":
        return max(0.0, 1 - args.beta * h)
    if args.loss == "ipo":
        return (h - 1 / (2 * args.beta)) ** 2
    wrong = args.label_smoothing
    if args.loss == "revkl":
        wrong = 1 / (1 + math.exp(args.margin_scale * reward_margin))
    loss = -(1 - wrong) * log_sigma(args.beta * h) - wrong * log_sigma(-args.beta * h)
    if args.loss == "hypo":
        d = [a - b for a, b in zip(at or logps, ref_logps)][2:]
        rest = [(sum(d) - some) / (len(d) - 1) if len(d) > 1 else 0.0 for some in d]
        loss += args.hypo_lambda * statistics.mean((some - mean) * logp for some, mean, logp in zip(d, rest, logps[2:]))
    return loss


def slopes(args, logps, *rest, eps=1e-4):
    """d oracle / d logps by central differences."""
    def moved(i, by):
        return oracle(args, [x + by * (i == j) for j, x in enumerate(logps)], *rest, at=logps)
    return [(moved(i, eps) - moved(i, -eps)) / (2 * eps) for i in range(len(logps))]


def losses_of(flags, logps, ref_logps, counts=None, reward_margin=0.0):
    """pair_losses of one pair, and its gradient."""
    leaf = torch.tensor([logps], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([counts or [1] * len(logps)], dtype=torch.float64)
    ref_logps, margins = (torch.tensor(some, dtype=torch.float64) for some in ([ref_logps], [reward_margin]))
    loss, = train_dpo.pair_losses(parse(*GIVEN, *flags), leaf, ref_logps, counts, margins)
    return loss.item(), torch.autograd.grad(loss, leaf)[0][0].tolist()


EVERY_LOSS = [("dpo",), ("dpo", "--beta", 0.01), ("dpo", "--label-smoothing", 0.2), ("hinge",), ("ipo",),
              ("ipo", "--ipo-norm", "mean"), ("revkl",), ("revkl", "--margin-scale", 4), ("slic",),
              ("slic", "--slic-norm", "mean", "--slic-delta", 2), ("slic", "--slic-lambda", 0), ("sft",), ("hypo",),
              ("hypo", "--hypo-lambda", 0.5, "--online-k", 3, "--label-smoothing", 0.1), ("online-dpo",),
              ("online-dpo", "--label-smoothing", 0.3)]


@pytest.mark.parametrize("flags", EVERY_LOSS)
def test_every_loss_and_its_gradient_on_random_pairs(flags):
    args, draw = parse(*GIVEN, "--loss", *flags), random.Random(0)
    width = {"sft": 1, "hypo": 2 + (args.online_k or 0)}.get(args.loss, 2)
    rows = [([draw.gauss(-60, 20) for _ in range(width)], [draw.gauss(-60, 20) for _ in range(width)],
             [draw.randint(1, 30) for _ in range(width)], draw.gauss(0, 2)) for _ in range(40)]
    logps = torch.tensor([row[0] for row in rows], dtype=torch.float64, requires_grad=True)
    ref_logps, counts, margins = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (1, 2, 3))
    losses = train_dpo.pair_losses(args, logps, ref_logps, counts, margins)
    assert losses.shape == (40,)
    assert losses.tolist() == pytest.approx([oracle(args, *row) for row in rows], rel=1e-12)
    ours, = torch.autograd.grad(losses.sum(), logps)
    assert ours.flatten().tolist() == pytest.approx([x for row in rows for x in slopes(args, *row)], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("flags, expected", [
    (["dpo"], 0.554355), (["dpo", "--beta", 0.01], 0.678260), (["ipo"], 4.0), (["hinge"], 0.7), (["revkl"], 0.635038),
    (["online-dpo"], 0.554355), (["hypo"], 0.554355),
    (["dpo", "--label-smoothing", 0.1], 0.9 * 0.554355 + 0.1 * 0.854355),
    # (1 / 2 - -2 / 4 - 5) ** 2 of two and four tokens
    (["ipo", "--ipo-norm", "mean"], 16.0), (["slic"], 1.0), (["sft"], 5.0),
    # a mean of -5 and of -3.5: 2.5 from the hinge, 0.5 from the likelihood
    (["slic", "--slic-norm", "mean"], 3.0)])
def test_losses_of_a_pair_counted_by_hand(flags, expected):
    loss, _ = losses_of(["--loss", *flags], [-10.0, -14.0], [-11.0, -12.0], [2, 4], 1.0)
    assert loss == pytest.approx(expected, abs=1e-6)


def test_slic_has_a_hinge_and_no_reference():
    for ref_logps in ([0.0, 0.0], [-50.0, 3.0]):
        loss, gradient = losses_of(["--loss", "slic"], [-10.0, -10.5], ref_logps)
        assert loss == 1.5 and gradient == pytest.approx([-1.1, 1.0])
    assert losses_of(["--loss", "slic"], [-10.0, -14.0], [0.0, 0.0])[1] == pytest.approx([-0.1, 0.0])


@pytest.mark.parametrize("logps, ref_logps, value, coefficients, estimate", [
    ([-20.0, -30.0], [-22.0, -29.0], 15.0, [1.5, -1.5], 0.5), ([-20.0, -30.0], [-20.0, -30.0], 0.0, [0.0, 0.0], 0.0),
    # one sample has no baseline
    ([-20.0], [-22.0], -40.0, [2.0], 2.0), ([-30.0], [-29.0], 30.0, [-1.0], -1.0)])
def test_hypo_counted_by_hand(logps, ref_logps, value, coefficients, estimate):
    leaf = torch.tensor([logps], dtype=torch.float64, requires_grad=True)
    term = train_dpo.hypo_kl(leaf, torch.tensor([ref_logps], dtype=torch.float64))
    assert term.item() == value and torch.autograd.grad(term, leaf)[0][0].tolist() == coefficients
    flags = ("--loss", "hypo", "--hypo-lambda", 2.0)
    loss, gradient = losses_of(flags, [-10.0, -14.0, *logps], [-11.0, -12.0, *ref_logps])
    assert loss == pytest.approx(0.554355 + 2 * value, abs=1e-6) and gradient[2:] == [2 * x for x in coefficients]
    both = [torch.tensor([[-10.0, -14.0, *logps]]), torch.tensor([[-11.0, -12.0, *ref_logps]])]
    values = train_dpo.pair_values(torch.zeros(1), *both, torch.ones(1, 2 + len(logps)), 0.1)
    assert values["kl_est"].item() == estimate and values["margin"].item() == pytest.approx(0.3)
    assert values["advantage_rms"].item() == pytest.approx(max(map(abs, coefficients)) * len(logps))


def test_hypo_without_a_baseline_is_the_mean_over_samples():
    """METHODS 10: k=1 twice is -5 and (1, -.5) on average."""
    leaf = torch.tensor([[-20.0], [-30.0]], requires_grad=True)
    term = train_dpo.hypo_kl(leaf, torch.tensor([[-22.0], [-29.0]])).mean()
    assert term.item() == -5.0 and torch.autograd.grad(term, leaf)[0].flatten().tolist() == [1.0, -0.5]


def toy(seed):
    """(9,) float64 log-probabilities of all sequences of 2 from 3 tokens, from 12 free logits."""
    theta = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    steps = theta.log_softmax(-1)
    return theta, torch.stack([steps[0, a] + steps[1 + a, b] for a in range(3) for b in range(3)])


def test_hypo_is_on_average_the_gradient_of_the_divergence():
    (theta, logps), (_, ref_logps) = toy(0), toy(1)
    exact, = torch.autograd.grad((logps.exp() * (logps - ref_logps)).sum(), theta, retain_graph=True)
    for k in (1, 2):
        draws = torch.tensor(list(itertools.product(range(9), repeat=k)))
        terms = train_dpo.hypo_kl(logps[draws], ref_logps[draws].detach())
        mean = (logps[draws].sum(1).exp().detach() * terms).sum()
        assert torch.allclose(torch.autograd.grad(mean, theta, retain_graph=True)[0], exact, atol=1e-12)


def test_online_dpo_at_the_reference_is_on_average_half_beta_of_sft():
    theta, logps = toy(2)
    sides = torch.stack([logps[4].expand(9), logps], 1)  # one chosen, every sequence as the sample
    args = parse(*GIVEN, "--loss", "online-dpo")
    losses = train_dpo.pair_losses(args, sides, sides.detach(), torch.full((9, 2), 2.0), torch.zeros(9))
    ours, = torch.autograd.grad((logps.exp().detach() * losses).sum(), theta, retain_graph=True)
    assert torch.allclose(ours, 0.05 * torch.autograd.grad(-logps[4], theta)[0], atol=1e-12)


def test_learning_rate_by_hand():
    for schedule in ("linear", "cosine"):
        first = [learning_rate(step, 20, 4.0, schedule) for step in range(3)]
        assert first == pytest.approx([2.0, 4.0, 4.0])  # two steps of warm-up, then the highest once more
        assert learning_rate(11, 20, 4.0, schedule) == pytest.approx(2.0)  # half of the 18 steps behind the warm-up
        assert learning_rate(0, 1, 4.0, schedule) == 4.0  # a run of one step trains
    assert learning_rate(19, 20, 4.0, "linear") == pytest.approx(4 / 18)
    assert learning_rate(19, 20, 4.0, "cosine") == pytest.approx(2 * (1 - math.cos(math.pi / 18)))
    assert learning_rate(20, 20, 4.0, "linear") == learning_rate(20, 20, 4.0, "cosine") == 0.0
    # a tenth of 11 steps is rounded up
    assert [learning_rate(step, 11, 1.0, "linear") for step in range(2)] == [0.5, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# flags

def test_presets_are_the_papers():
    expected = {"s1": (0.1, 5e-7, 1, 256, "linear", 0.999), "s2": (0.01, 5e-7, 1, 128, "cosine", 0.999),
                "s3": (0.1, 5e-7, 2, 32, "cosine", 0.99)}
    for preset, values in expected.items():
        args = parse(*GIVEN, "--preset", preset)
        assert (args.beta, args.lr, args.epochs, args.batch_size, args.schedule, args.adam_beta2) == values
        assert args.max_length == 2048 and args.reference == "m"
        sft = parse(*GIVEN, "--preset", preset, "--loss", "sft")
        lr, adam_beta2 = {"s1": (5e-7, 0.999), "s2": (2e-5, 0.999), "s3": (1e-6, 0.95)}[preset]
        assert (sft.lr, sft.adam_beta2, sft.beta, sft.reference) == (lr, adam_beta2, None, None)
        assert (sft.epochs, sft.batch_size, sft.schedule) == values[2:5]
    assert parse(*GIVEN) == parse(*GIVEN, "--preset", "s1") == parse(*GIVEN, "--loss", "dpo")
    # a flag of one's own goes before the preset
    args = parse(*GIVEN, "--preset", "s3", "--beta", 0.5, "--epochs", 1)
    assert (args.beta, args.epochs, args.batch_size) == (0.5, 1, 32)
    assert parse(*GIVEN, "--preset", "s3", "--loss", "sft", "--adam-beta2", 0.9).adam_beta2 == 0.9


def test_losses_have_their_defaults_and_none_of_the_others():
    own = {"dpo": {"label_smoothing": 0.0}, "ipo": {"ipo_norm": "sum"}, "hinge": {}, "sft": {},
           "revkl": {"margin_scale": 1.0},
           "slic": {"slic_delta": 1.0, "slic_lambda": 0.1, "slic_norm": "sum"},
           "hypo": {"label_smoothing": 0.0, "hypo_lambda": 1e-4, "online_k": 2, "online_max_new": 256},
           "online-dpo": {"label_smoothing": 0.0, "online_max_new": 256}}
    assert own.keys() == set(train_dpo.LOSSES)
    for loss, expected in own.items():
        args = vars(parse(*GIVEN, "--loss", loss))
        assert {name: args[name] for name in train_dpo.OF_LOSS if args[name] is not None} == expected, loss


@pytest.mark.parametrize("loss, flag, value", [
    ("dpo", "--ipo-norm", "mean"), ("dpo", "--ipo-norm", "sum"), ("dpo", "--margin-scale", 1),
    ("dpo", "--hypo-lambda", 0.1), ("dpo", "--online-max-new", 8), ("hinge", "--label-smoothing", 0.1),
    ("ipo", "--label-smoothing", 0),
    ("ipo", "--slic-norm", "mean"), ("revkl", "--label-smoothing", 0.1), ("slic", "--margin-scale", 2),
    ("online-dpo", "--online-k", 2), ("online-dpo", "--hypo-lambda", 1), ("hypo", "--slic-delta", 1),
    ("hinge", "--slic-lambda", 1), ("sft", "--beta", 0.1), ("sft", "--reference", "r"),
    ("sft", "--label-smoothing", 0.1)])
def test_a_flag_that_does_nothing_with_a_loss_is_refused(loss, flag, value, capsys):
    said = refusal(capsys, parse, *GIVEN, "--loss", loss, flag, value)
    assert f"{flag} does nothing with --loss {loss}" in said


@pytest.mark.parametrize("flags", [
    ["--beta", "0"], ["--beta", "nan"], ["--lr", "-1"], ["--batch-size", "0"], ["--adam-beta2", "1"], ["--epochs", "0"],
    ["--resume", "--overwrite"], ["--micro-tokens", "0"], ["--max-length", "0"], ["--save-every", "0"],
    ["--keep-last", "0"], ["--seed", "-1"], ["--label-smoothing", "0.5"], ["--label-smoothing", "-0.1"],
    ["--margin-scale", "0", "--loss", "revkl"], ["--online-k", "0", "--loss", "hypo"],
    ["--online-max-new", "0", "--loss", "hypo"], ["--slic-lambda", "-1", "--loss", "slic"],
    ["--hypo-lambda", "-1", "--loss", "hypo"], ["--ipo-norm", "max", "--loss", "ipo"], ["--loss", "kto"],
    ["--attn", "flash_attention_2"], ["--bet", "0.1"]])
def test_senseless_flags_are_refused(flags, capsys):
    assert flags[0] in refusal(capsys, parse, *GIVEN, *flags)


# ---------------------------------------------------------------------------------------------------------------------
# TokenLogps

def head_case(count, vocab, width, with_bias, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(count, width), torch.randn(vocab, width)
    return hidden, weight, torch.randn(vocab) if with_bias else None, torch.randint(vocab, (count,)), torch.randn(count)


def fused(hidden, weight, bias, targets, grad):
    """Log-probabilities and gradients of TokenLogps."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logps = TokenLogps.apply(leaves[0], leaves[1], leaves[2] if bias is not None else None, targets)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, grad)]


def from_full_logits(hidden, weight, bias, targets, grad):
    """The same in float64 with all logits at once."""
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias is not None else 0)
    logps = logits.log_softmax(-1)[range(len(targets)), targets]
    return [logps.detach(), *torch.autograd.grad(logps, leaves, grad.double())]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 21])
def test_token_logps_and_gradients_are_those_of_full_logits(count, with_bias, monkeypatch):
    case = head_case(count, 97, 16, with_bias)
    expected = from_full_logits(*case)
    for chunk in (1, 3, 8, 512):  # one token, a ragged end, an exact end, all at once
        monkeypatch.setattr(train_dpo, "CHUNK", chunk)
        for ours, exact in zip(fused(*case), expected, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - exact).abs().max() < 2e-5, f"chunk {chunk}"


def test_token_logps_of_large_logits_stay_finite():
    hidden, weight, _, targets, grad = head_case(9, 50, 8, False)
    case = (hidden * 40, weight * 40, None, targets, grad)
    ours, exact = fused(*case), from_full_logits(*case)
    assert all(x.isfinite().all() for x in ours)
    assert torch.allclose(ours[0].double(), exact[0], rtol=1e-5, atol=1e-2)


def test_token_logps_of_bfloat16_operands_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(train_dpo, "CHUNK", 8)
    hidden, weight, bias, targets, grad = head_case(30, 97, 16, True)
    rounded = (hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), targets, grad)
    ours, exact = fused(*rounded), from_full_logits(*rounded)
    assert ours[0].dtype == torch.float32 and (ours[0] - exact[0]).abs().max() < 2e-5
    for name, one, two in zip(("hidden", "weight", "bias"), ours[1:], exact[1:], strict=True):
        assert one.dtype == torch.bfloat16, name
        assert (one.double() - two).abs().max() < 0.02 * two.abs().max(), name


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_token_logps_never_hold_more_than_a_chunk_of_logits(monkeypatch):
    count, vocab, width, chunk = 100, 4000, 4, 8
    monkeypatch.setattr(train_dpo, "CHUNK", chunk)
    case = head_case(count, vocab, width, True)
    with Largest() as seen:
        fused(*case)
    assert seen.elements == chunk * vocab  # the logits of a chunk are there, so backward was watched too
    with Largest() as seen:
        from_full_logits(*case)
    assert seen.elements == count * vocab


# ---------------------------------------------------------------------------------------------------------------------
# packing

RAGGED = [Pair("a", "on", [3, 4, 5, 6, 7], [[8, 9, 10, 258], [11, 12]], 0.5),
          Pair("b", "off", [70] * 23, [[8, 9, 10, 258] * 8, [258]], -1.0),
          Pair("c", "off", [1, 2], [list(range(20, 90)), [5, 5, 5, 258]], 2.0)]
FOUR = [Pair("d", "", [3, 4, 5], [[8, 258], [11, 12, 13], [9], [60] * 17], 0.0),
        # ~id is read and not trained: first, in the middle, token 0
        Pair("e", "", [70] * 11, [[~8, 9, 10, 258] * 4, [7, ~258, ~0, 0, 258], [~5, 6], [5, 6, ~7, 8]], 0.0)]


def load(folder):
    return train_dpo.load_policy(str(folder), parse(*GIVEN))


def check_against_plain(folder):
    policy = load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    for pairs in (RAGGED, FOUR):
        with torch.no_grad():
            expected = torch.stack([plain_logps(plain, pair) for pair in pairs])
            ours, counts = group_logps(policy, [(pair.prompt, pair.responses) for pair in pairs])
        assert (expected.max() - expected.min()) > 50  # far from uniform, and lengths differ
        assert counts.tolist() == [trained(pair) for pair in pairs] and ours.dtype == torch.float64
        for found in (ours, *(torch.tensor(train_dpo.all_logps(policy, pairs, budget)) for budget in (1, 60, 1000))):
            assert ((found - expected).abs() < 1e-4 * counts.sqrt()).all(), (found - expected).abs().max()


@pytest.mark.parametrize("tie", [True, False])
def test_packed_log_probabilities_are_those_of_each_sequence_alone(policy, untied, tie, process):
    check_against_plain(policy if tie else untied)  # two query heads share a key head in both


def random_model(kind, folder, **changes):
    """A tiny random model of any architecture, with biases that are not zero, in a folder without a tokenizer."""
    import transformers
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 257,
             "eos_token_id": 258, "pad_token_id": 258}
    torch.manual_seed(5)
    config = getattr(transformers, kind + "Config")(**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, changes", [
    ("Qwen2", {"num_key_value_heads": 2}), ("Phi", {}), ("GPTNeoX", {}), ("GPT2", {"n_layer": 2}),
    ("Mistral", {"num_key_value_heads": 2, "sliding_window": 512}),
    ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 2})])
def test_packing_holds_for_other_architectures(kind, changes, tmp_path, process):
    check_against_plain(random_model(kind, tmp_path, **changes))


@pytest.mark.parametrize("kind, changes, word", [
    ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 64}, "packed"), ("Mistral", {"sliding_window": 4}, "window"),
    ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": None}, "soft cap"),
    ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "final_logit_softcapping"), ("Cohere", {}, "logit_scale"),
    ("Granite", {"logits_scaling": 4.0}, "logits_scaling"), ("Mamba", {"state_size": 4}, ""),
    ("Bloom", {"n_layer": 2, "n_head": 4}, ""),
    ("CodeGen", {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 8}, ""), ("Falcon", {"alibi": False}, ""),
    ("StableLm", {"num_key_value_heads": 2}, ""),
    # a convolution that runs on from one sequence into the next
    ("Lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "packed")])
def test_what_cannot_be_packed_is_refused_with_a_sentence(kind, changes, word, pairs_file, tmp_path, capsys):
    make_tokenizer(tmp_path / "model")
    random_model(kind, tmp_path / "model", **changes)
    capsys.readouterr()
    # neither a traceback nor, worse, numbers from an attention that sees the future
    for loss in ("dpo", "sft") if kind in ("OPT", "Lfm2") else ("dpo",):  # sft without a reference too
        flags = ("--pairs", pairs_file, "--out", tmp_path / loss, "--loss", loss)
        said = refused_run(capsys, "--model", tmp_path / "model", *flags)
        assert word in said and not (tmp_path / loss / "model.safetensors").exists()


GROUPS = ((2, 3, 1, 4), (5, 2), (1, 1, 6))  # a prompt and its responses
PARTS = [(group, part) for group, lengths in enumerate(GROUPS) for part, length in enumerate(lengths)
         for _ in range(length)]


def attention_case():
    torch.manual_seed(0)
    return [torch.randn(1, heads, len(PARTS), 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2)]


def with_gradients(result, leaves):
    pull = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(1))
    return [result.detach(), *torch.autograd.grad(result, leaves, pull)]


def test_group_attention_is_attention_with_a_dense_mask():
    query, key, value = attention_case()
    ours, nothing = group_attention(None, query, key, value, None, 0.3, groups=GROUPS)
    seen = torch.tensor([[i >= j and g == of and part in (0, p) for j, (of, part) in enumerate(PARTS)]
                         for i, (g, p) in enumerate(PARTS)])
    heads = []
    for head in range(6):  # three query heads to a key head
        scores = (0.3 * query[0, head] @ key[0, head // 3].T).masked_fill(~seen, -math.inf)
        heads.append(scores.softmax(-1) @ value[0, head // 3])
    leaves = [query, key, value]
    assert nothing is None and ours.shape == (1, len(PARTS), 6, 8)
    for a, b in zip(with_gradients(ours, leaves), with_gradients(torch.stack(heads, 1)[None], leaves), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_rows_and_flash_layout_by_hand():
    rows = [([*seen], [*own]) for seen, own in train_dpo.response_rows(GROUPS)]
    assert rows == [([], [0, 1, 2, 3, 4]), ([0, 1], [5]), ([0, 1], [6, 7, 8, 9]), ([], [10, 11, 12, 13, 14, 15, 16]),
                    ([], [17, 18]), ([17], [19, 20, 21, 22, 23, 24])]
    key_rows, query_ends, key_ends, longest_query, longest_key = train_dpo.flash_layout(GROUPS, torch.device("cpu"))
    assert key_rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 0, 1, 6, 7, 8, 9, *range(10, 17), 17, 18, 17, *range(19, 25)]
    assert query_ends.tolist() == [0, 5, 6, 10, 17, 19, 25] and key_ends.tolist() == [0, 5, 8, 14, 21, 23, 30]
    assert query_ends.dtype == key_ends.dtype == torch.int32 and (longest_query, longest_key) == (7, 7)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False):
    """flash-attn from 2.1 on, plainly: the causal mask is aligned at the last query and the last key."""
    assert causal and dropout_p == 0.0 and q.dim() == 3
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
    parts = []
    for i in range(len(cu_seqlens_q) - 1):
        part, keys = (slice(ends[i], ends[i + 1]) for ends in (cu_seqlens_q, cu_seqlens_k))
        some, k_, v_ = q[part], *(x[keys].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        hidden = torch.ones(len(some), len(k_)).triu(len(k_) - len(some) + 1).bool()
        scores = (softmax_scale * torch.einsum("qhd,khd->hqk", some, k_)).masked_fill(hidden, -math.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_))
    return torch.cat(parts)


@pytest.fixture
def flash_attn(monkeypatch):
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def test_the_flash_path_is_the_sdpa_path(flash_attn):
    leaves = attention_case()
    one, two = (group_attention(None, *leaves, None, 0.3, groups=GROUPS, flash=flash)[0] for flash in (False, True))
    for a, b in zip(with_gradients(one, leaves), with_gradients(two, leaves), strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-12


def test_a_model_through_the_flash_path(flash_attn, policy, process):
    ours = load(policy)
    groups = [(pair.prompt, pair.responses) for pair in FOUR]
    with torch.no_grad():
        one = group_logps(ours, groups)[0]
        ours.flash = True
        assert (group_logps(ours, groups)[0] - one).abs().max() < 5e-4


# ---------------------------------------------------------------------------------------------------------------------
# samples

def test_samples_are_exactly_from_the_model_whatever_the_batch(tmp_path, process):
    ours = load(make_policy(tmp_path, spread=0.15))
    prompts, groups = [[5, 6, 7]] * 3000 + [[8] * 9] * 3, [(pair.prompt, pair.responses) for pair in RAGGED]
    with torch.no_grad():
        before = group_logps(ours, groups)[0]
    drawn = ours.sample(prompts, range(3003), 1, 258)
    with torch.no_grad():
        exact = float64(tmp_path)(torch.tensor([prompts[0]])).logits[0, -1].softmax(-1)
        assert torch.equal(group_logps(ours, groups)[0], before)  # sampling leaves the model as it was
    count = torch.bincount(torch.tensor([row[0] for row in drawn[:3000]]), minlength=259)
    likely = exact > 0.01
    assert likely.sum() > 10 and ((count / 3000 - exact)[likely].abs() < 4 * (exact[likely] / 3000).sqrt()).all()
    batch = ours.sample(prompts[2998:], range(2998, 3003), 12, 258)
    alone = [ours.sample([prompt], [seed], 12, 258)[0] for prompt, seed in zip(prompts[2998:], range(2998, 3003))]
    assert batch == alone and len({tuple(row) for row in batch}) == 5
    assert all(len(row) == 12 or row[-1] == 258 for row in batch) and not any(258 in row[:-1] for row in batch)


# ---------------------------------------------------------------------------------------------------------------------
# gradients

def pull_back(args, model, pairs):
    """Backward of the pairs' mean loss through a plain float64 model with full logits -> values per pair."""
    values, total = [], 0
    for pair in pairs:
        logps = plain_logps(model, pair)
        rest = logps.tolist(), pair.ref_logps, trained(pair), pair.reward_margin
        total = total + (logps @ torch.tensor(slopes(args, *rest), dtype=torch.float64)) / len(pairs)
        values.append(SimpleNamespace(pair=pair, logps=rest[0], ref_logps=rest[1], counts=rest[2],
                                      loss=oracle(args, *rest)))
    if total.requires_grad:
        total.backward()
    return values


@pytest.mark.parametrize("kind, flags", [
    ("tied", ["dpo"]), ("untied", ["dpo"]), ("bias of the head", ["dpo"]), ("tied", ["ipo", "--ipo-norm", "mean"]),
    ("tied", ["slic", "--slic-norm", "mean"]), ("tied", ["hinge"]), ("tied", ["revkl"]), ("untied", ["sft"]),
    ("tied", ["hypo", "--online-max-new", 6, "--hypo-lambda", 0.3]), ("tied", ["online-dpo", "--online-max-new", 6])])
def test_gradients_are_those_of_a_plain_float64_model(kind, flags, policy, untied, other, tmp_path, process):
    folder = {"tied": policy, "untied": untied}.get(kind) or str(random_model("Phi", tmp_path))
    args, ours, model = parse(*GIVEN, "--micro-tokens", 60, "--loss", *flags), load(folder), float64(folder)
    # a no_grad forward first, as in a run: it once left the root's weights gathered, and copies were trained
    pairs = [pair._replace(ref_logps=[logp + i - 3.0 * j for j, logp in enumerate(of)])
             for i, (pair, of) in enumerate(zip(RAGGED, train_dpo.all_logps(ours, RAGGED, 1)))]
    if args.loss in ("sft", "online-dpo"):
        pairs = [pair._replace(responses=pair.responses[:1], ref_logps=pair.ref_logps[:1]) for pair in pairs]
    live, seen, drawn = None, pairs, {"hypo": 2, "online-dpo": 1}.get(args.loss, 0)
    if drawn:
        live, reference = load(other).requires_grad_(False), float64(other)
        seeds = [[train_dpo.stable_hash(0, "sample", 7, pair.pair_id, i) for i in range(drawn)] for pair in pairs]
        samples = [ours.sample([pair.prompt] * drawn, of, 6, 258) for pair, of in zip(pairs, seeds)]
        with torch.no_grad():
            refs = [plain_logps(reference, pair._replace(responses=of)).tolist() for pair, of in zip(pairs, samples)]
        seen = [pair._replace(responses=pair.responses + of, ref_logps=pair.ref_logps + ref)
                for pair, of, ref in zip(pairs, samples, refs)]
    expected = pull_back(args, model, seen)
    rows = train_dpo.pass_over(ours, live, pairs, args, 258, 7)
    assert len(micro_batches(pairs, 60, 0)) > 1
    found = sorted(row["loss"] for row in rows)
    assert found == pytest.approx(sorted(value.loss for value in expected), rel=1e-4, abs=1e-4)
    if drawn:
        assert sorted(row["sample_tokens"] for row in rows) == sorted(sum(map(len, of)) / drawn for of in samples)
    names = {name.removeprefix("model."): parameter for name, parameter in ours.model.named_parameters()}
    exact = {name.removeprefix("model."): parameter.grad for name, parameter in model.named_parameters()}
    assert names.keys() == exact.keys()
    for name, gradient in exact.items():
        got = names[name].grad.full_tensor().double()
        assert gradient.abs().max() > 0, name
        assert (got - gradient).abs().max() < 1e-4 * gradient.abs().max() + 1e-7, name


def test_one_optimizer_step_changes_every_weight_of_the_sharded_model(policy, process):
    ours = load(policy)
    groups = [(pair.prompt, pair.responses) for pair in RAGGED]
    before = torch.tensor(train_dpo.all_logps(ours, RAGGED, 1000))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=LR, weight_decay=0.0, fused=True)
    old = whole_weights(ours)
    (-group_logps(ours, groups)[0][:, 0].sum()).backward()
    optimizer.step()
    new = whole_weights(ours)
    stored = load_file(Path(policy, "model.safetensors"))
    assert stored.keys() <= old.keys()
    for name in stored:
        assert torch.equal(old[name], stored[name]), name
        assert not torch.equal(old[name], new[name]), name
    # and the forward uses the changed ones
    assert (torch.tensor(train_dpo.all_logps(ours, RAGGED, 1000))[:, 0] > before[:, 0]).all()


# ---------------------------------------------------------------------------------------------------------------------
# whole runs

def mean_row(args, values):
    """What a row of metrics.jsonl says of pairs, from pull_back's values, in plain math."""
    def mean(f):
        return statistics.fmean(map(f, values))

    def ratio(v, i):
        return v.logps[i] - v.ref_logps[i]

    def per_token(v, i):
        return v.logps[i] / v.counts[i]

    row = {"loss": mean(lambda v: v.loss), "chosen_logp": mean(lambda v: v.logps[0]),
           "chosen_logp_per_token": mean(lambda v: per_token(v, 0)), "pairs": len(values)}
    if args.loss == "sft":
        return row
    margins = [args.beta * (ratio(v, 0) - ratio(v, 1)) for v in values]
    diversity = [v.logps[0] - v.logps[1] for v in values]
    return row | {
        "rejected_logp": mean(lambda v: v.logps[1]), "rejected_logp_per_token": mean(lambda v: per_token(v, 1)),
        "chosen_reward": args.beta * mean(lambda v: ratio(v, 0)),
        "rejected_reward": args.beta * mean(lambda v: ratio(v, 1)),
        "accuracy": statistics.fmean(margin > 0 for margin in margins), "margin": statistics.fmean(margins),
        "margin_std": statistics.pstdev(margins), "diversity": statistics.fmean(diversity),
        "diversity_std": statistics.pstdev(diversity), "diversity_abs": statistics.fmean(map(abs, diversity)),
        "diversity_per_token": mean(lambda v: per_token(v, 0) - per_token(v, 1)),
        "kl_proxy": mean(lambda v: (ratio(v, 0) + ratio(v, 1)) / (v.counts[0] + v.counts[1]))}


def step_row(args, values):
    sources = sorted({value.pair.source for value in values})
    return mean_row(args, values) | {
        "tokens": sum(len(v.pair.prompt) + len(of) for v in values for of in v.pair.responses), "padding": 0.0,
        "by_source": {name: mean_row(args, [v for v in values if v.pair.source == name]) for name in sources}
        if len(sources) > 1 else None}


def plain_run(args, factors):
    """The run's steps by a plain float64 model with full logits and torch's AdamW -> rows, model."""
    pairs, _ = load_pairs(args.pairs, AutoTokenizer.from_pretrained(args.model), args.loss, args.max_length)
    model, rows = float64(args.model), []
    if args.reference:
        with torch.no_grad():
            reference = float64(args.reference)
            pairs = [pair._replace(ref_logps=plain_logps(reference, pair).tolist()) for pair in pairs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.adam_beta2), weight_decay=0.0)
    for epoch in range(args.epochs):
        order = epoch_order(pairs, args.seed, epoch)
        for start in range(0, len(order), args.batch_size):
            optimizer.zero_grad()
            row = step_row(args, pull_back(args, model, order[start:start + args.batch_size]))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            lr = optimizer.param_groups[0]["lr"] = args.lr * factors[len(rows)]
            optimizer.step()
            rows.append(row | {"step": len(rows), "epoch": epoch, "lr": lr, "grad_norm": norm})
    assert len(rows) == len(factors)
    return rows, model


def check_row(ours, plain, first, scale=1.0):
    assert ours.keys() - CLOCKS - {"eval"} == plain.keys()
    for name, value in plain.items():
        if isinstance(value, dict):
            assert ours[name].keys() == value.keys()
            for source in value:
                check_row(ours[name][source], value[source], first, scale)
        elif value is None:
            assert ours[name] is None
        elif not (name == "accuracy" and first):  # h is rounding there
            rel = 5e-4 if name == "grad_norm" else 5e-5
            assert ours[name] == pytest.approx(value, rel=scale * rel, abs=scale * 2e-4), (ours.get("step"), name)


def check_rows(rows, expected, scale=1.0):
    assert len(rows) == len(expected)
    for ours, plain in zip(rows, expected):
        check_row(ours, plain, plain["step"] == 0, scale)


LINEAR = [1.0, 1.0, 0.8, 0.6, 0.4, 0.2]  # one step of warm-up, then five on a line from 1 down to 0
COSINE = [1.0, 1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915]  # and half a cosine


def test_a_whole_run_is_that_of_a_plain_loop(whole_run, policy, pairs_file):
    expected, model = plain_run(parse(*whole_run.flags, "--out", "o"), LINEAR)
    check_rows(whole_run.rows, expected)
    assert min(row["loss"] for row in expected) < 0.5  # something is learnt, so a wrong sign would show
    assert whole_run.rows[0]["by_source"].keys() == {"off", "on"} and whole_run.rows[-1]["by_source"] is None
    found = load_file(whole_run.out / "model.safetensors")
    start = load_file(Path(policy, "model.safetensors"))
    exact = {name: value.float() for name, value in model.state_dict().items()}
    for name, value in start.items():
        assert not torch.equal(value, found[name]), name
        off = (found[name] - exact[name]).abs()
        # Adam makes a whole step even of a gradient that is all rounding: a few may differ
        assert (off > 0.05 * LR).float().mean() < 2e-3, name
    exported = AutoModelForCausalLM.from_pretrained(whole_run.out, attn_implementation="sdpa").eval()
    with torch.no_grad():
        sides = [plain_logps(some, RAGGED[2]) for some in (exported, model, float64(policy))]
    assert (sides[0] - sides[1]).abs().max() < 0.02 < 0.2 < (sides[2] - sides[1]).abs().max()


@pytest.mark.parametrize("flags, factors", [
    (["--beta", 0.3, "--adam-beta2", 0.7, "--schedule", "cosine", "--label-smoothing", 0.1], COSINE),
    (["--loss", "ipo", "--ipo-norm", "mean", "--seed", 3], LINEAR), (["--loss", "sft"], LINEAR),
    (["--loss", "slic", "--slic-norm", "mean"], LINEAR)])
def test_other_settings_reach_the_run(flags, factors, whole_run, tmp_path):
    flags = [*whole_run.flags, "--out", tmp_path / "out", *flags]
    summary, _ = train(*flags)
    expected, _ = plain_run(parse(*flags), factors)
    check_rows(read_rows(tmp_path / "out/metrics.jsonl"), expected, 1 if "ipo" not in flags else 3)
    assert summary["last_accuracy"] == pytest.approx(expected[-1]["accuracy"]) if "sft" not in flags else (
        summary["last_accuracy"] is None and not (tmp_path / "reference_cache").exists())


def test_a_run_of_revkl_reads_the_rewards_and_another_reference(whole_run, other, tmp_path):
    flags = [*whole_run.flags, "--loss", "revkl", "--reference", other, "--out", tmp_path / "out", "--epochs", 1]
    train(*flags)
    rows = read_rows(tmp_path / "out/metrics.jsonl")
    expected, _ = plain_run(parse(*flags), [1.0, 1.0, 0.5])
    check_rows(rows, expected, 2)
    assert rows[0]["chosen_logp"] == pytest.approx(whole_run.rows[0]["chosen_logp"], abs=1e-3)  # the policy is --model
    assert abs(rows[0]["margin"]) > 0.05


@pytest.mark.parametrize("loss", ["hypo", "online-dpo"])
def test_a_run_that_samples(loss, whole_run, tmp_path):
    flags = [*whole_run.flags, "--loss", loss, "--online-max-new", 8, "--epochs", 1]
    train(*flags, "--out", tmp_path / "one")
    train(*flags, "--out", tmp_path / "two", "--micro-tokens", 1, "--activation-checkpointing")
    rows = read_rows(tmp_path / "one/metrics.jsonl")
    close(read_rows(tmp_path / "two/metrics.jsonl"), rows)  # the same samples, however a step is cut
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[1]["loss"] != rows[0]["loss"]
    assert all(0 < row["sample_tokens"] <= 8 and 0 <= row["sample_truncated"] <= 1 for row in rows)
    assert any(row["sample_truncated"] > 0 for row in rows)
    if loss == "hypo":
        assert abs(rows[0]["kl_est"]) < 1e-4 and rows[0]["advantage_rms"] < 1e-3 < rows[1]["advantage_rms"]
        assert rows[0]["grad_norm"] == pytest.approx(whole_run.rows[0]["grad_norm"], rel=1e-4)  # DPO's first step
        assert rows[0]["rejected_logp"] == pytest.approx(whole_run.rows[0]["rejected_logp"], abs=1e-3)
    assert load_file(tmp_path / "one/model.safetensors").keys() == load_file(whole_run.out / "model.safetensors").keys()


def test_the_first_step_is_exactly_the_reference(whole_run):
    first = whole_run.rows[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["margin"]) < 1e-4
    assert abs(first["chosen_reward"]) < 1e-4 and abs(first["rejected_reward"]) < 1e-4 and abs(first["kl_proxy"]) < 1e-4


def test_the_summary_and_the_meta_file_say_what_was_done(whole_run, pairs_file):
    summary, meta = whole_run.summary, json.loads((whole_run.out / "metrics.meta.json").read_text())
    assert meta["counts"] == summary
    assert (summary["pairs"], summary["steps"], summary["dropped"], summary["eval_loss"]) == (9, 6, {}, None)
    assert summary["first_loss"] == whole_run.rows[0]["loss"] and summary["last_loss"] == whole_run.rows[-1]["loss"]
    assert summary["tokens"] == sum(row["tokens"] for row in whole_run.rows)
    assert 0 < summary["tokens_per_s_with_reference"] < summary["tokens_per_s"]
    assert meta["args"]["lr"] == LR and pairs_file in meta["inputs"]
    assert not (whole_run.out / "checkpoints").exists() and not list(whole_run.out.glob("*.tmp"))


def test_the_order_of_the_file_changes_nothing(whole_run, pairs_file, tmp_path):
    turned = write_rows(tmp_path / "pairs.jsonl", read_rows(pairs_file)[::-1])
    flags = [turned if flag == pairs_file else flag for flag in whole_run.flags]
    train(*flags, "--out", tmp_path / "out")
    close(read_rows(tmp_path / "out/metrics.jsonl"), whole_run.rows)


def close(ours, theirs, loss=1e-4):
    """The same run up to rounding, which Adam lets grow slowly."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys() and (a["step"], a["pairs"], a["tokens"], a["lr"]) == (b["step"], b["pairs"],
                                                                                          b["tokens"], b["lr"])
        for name in ("loss", "margin", "chosen_reward", "rejected_reward"):
            assert a[name] == pytest.approx(b[name], abs=loss), (a["step"], name)
        for name in ("chosen_logp", "rejected_logp"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=10 * loss), (a["step"], name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]


@pytest.mark.parametrize("flags", [("--micro-tokens", 1), ("--micro-tokens", 150), ("--activation-checkpointing",)])
def test_how_a_step_is_cut_or_recomputed_changes_nothing(flags, whole_run, tmp_path):
    train(*whole_run.flags, "--out", tmp_path / "out", *flags)
    close(read_rows(tmp_path / "out/metrics.jsonl"), whole_run.rows)


def test_bfloat16_stays_near_float32(whole_run, tmp_path):
    train(*whole_run.flags, "--out", tmp_path / "out", "--dtype", "bfloat16")
    rows = read_rows(tmp_path / "out/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)
    assert [row["loss"] for row in rows] != [row["loss"] for row in whole_run.rows]  # it was another type
    for ours, theirs in zip(rows, whole_run.rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.1)
        assert ours["chosen_logp"] == pytest.approx(theirs["chosen_logp"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.2)


def test_a_step_that_is_not_finite_ends_the_run_and_names_its_pairs(whole_run, tmp_path, capsys):
    said = refused_run(capsys, *whole_run.flags, "--out", tmp_path / "out", "--lr", 1e30)
    second = load_pairs(whole_run.flags[3], AutoTokenizer.from_pretrained(whole_run.flags[1]), "dpo", 2048)[0]
    second = {pair.pair_id for pair in epoch_order(second, 0, 0)[4:8]}
    assert len(read_rows(tmp_path / "out/metrics.jsonl")) == 1 and not (tmp_path / "out/model.safetensors").exists()
    line, = (line for line in said.splitlines() if "step 1: " in line)
    assert "is not finite" in line and set(line.split("pairs: ")[1].split(", ")) == second


def test_a_reference_with_another_tokenizer_is_refused(whole_run, tmp_path, capsys):
    folder = make_policy(tmp_path / "other")
    vocabulary = Path(folder, "tokenizer.json").read_text().replace("<|endoftext|>", "<|another|>")
    Path(folder, "tokenizer.json").write_text(vocabulary)
    config = Path(folder, "tokenizer_config.json")
    config.write_text(config.read_text().replace("<|endoftext|>", "<|another|>"))
    said = refused_run(capsys, *whole_run.flags, "--reference", folder, "--out", tmp_path / "out")
    assert folder in said and "tokenizer" in said and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# metrics

def test_metrics_of_pairs_counted_by_hand():
    sums, refs = torch.tensor([[-10.0, -14.0], [-9.0, -3.0]]), torch.tensor([[-11.0, -12.0], [-8.0, -8.0]])
    counts = torch.tensor([[2.0, 4.0], [3.0, 1.0]])
    values = train_dpo.pair_values(torch.tensor([5.0, 7.0]), sums, refs, counts, 0.1)
    pairs = [{name: of[i].item() for name, of in values.items()} | {
        "weight": 1.0, "source": source, "computed": 10, "tokens": 12} for i, source in enumerate(("on", "off"))]
    row = train_dpo.row_of([*pairs, {**pairs[1], "weight": 0.0, "computed": 5}])  # that one only fills a rank's turn
    # h is 3 and -6
    expected = {"loss": 6.0, "chosen_logp": -9.5, "chosen_logp_per_token": -4.0, "accuracy": 0.5, "margin": -0.15,
                "margin_std": 0.45, "chosen_reward": 0.0, "rejected_reward": 0.15, "rejected_logp": -8.5,
                "rejected_logp_per_token": -3.25, "diversity": -1.0, "diversity_std": 5.0, "diversity_abs": 5.0,
                "diversity_per_token": -0.75, "kl_proxy": (-1 / 6 + 4 / 4) / 2, "pairs": 2, "tokens": 24,
                "padding": 0.2}
    by_source = row.pop("by_source")
    assert row == pytest.approx(expected)
    assert by_source["on"]["diversity"] == 4
    assert by_source["off"]["diversity"] == -6 == -by_source["off"]["diversity_abs"]
    assert by_source["on"]["pairs"] == by_source["off"]["pairs"] == 1 and by_source["off"]["margin_std"] == 0
    assert train_dpo.row_of(pairs[:1])["by_source"] is None


def test_eval_pairs_are_measured_and_change_nothing(whole_run, policy, tmp_path):
    held_out = make_pairs(tmp_path / "held_out.jsonl", n=5, seed=1)
    flags = [*whole_run.flags, "--out", tmp_path / "out", "--eval-pairs", held_out, "--save-every", 4]
    summary, _ = train(*flags)
    rows = read_rows(tmp_path / "out/metrics.jsonl")
    assert [step for step, row in enumerate(rows) if "eval" in row] == [3, 5]
    trained_rows = [{key: value for key, value in row.items() if key != "eval"} for row in rows]
    assert without_noise(trained_rows) == without_noise(whole_run.rows)
    pairs, _ = load_pairs(held_out, AutoTokenizer.from_pretrained(policy), "dpo", 2048)
    before, after = float64(policy), float64(tmp_path / "out")
    with torch.no_grad():
        pairs = [pair._replace(ref_logps=plain_logps(before, pair).tolist()) for pair in pairs]
        expected = step_row(parse(*flags), pull_back(parse(*flags), after, pairs))
    check_row(rows[5]["eval"], expected, False)
    assert summary["eval_loss"] == rows[5]["eval"]["loss"] != rows[3]["eval"]["loss"]


@pytest.mark.parametrize("loss", ["sft", "ipo", "online-dpo", "hypo"])
def test_eval_of_other_losses_is_on_both_sides_of_the_file(loss, whole_run, pairs_file, tmp_path):
    online = ("--online-max-new", 4) if loss in train_dpo.ONLINE else ()
    flags = ("--out", tmp_path / "out", "--eval-pairs", pairs_file, "--loss", loss, "--epochs", 1)
    train(*whole_run.flags, *flags, *online)
    row = read_rows(tmp_path / "out/metrics.jsonl")[-1]["eval"]
    sums = [[logp.item() for logp in plain_logps(float64(tmp_path / "out"), pair).detach()]
            for pair in load_pairs(pairs_file, AutoTokenizer.from_pretrained(tmp_path / "out"), "dpo", 2048)[0]]
    assert row["chosen_logp"] == pytest.approx(statistics.fmean(of[0] for of in sums), rel=1e-4)
    assert row["pairs"] == 9 and row.get("rejected_logp") == (None if loss == "sft" else pytest.approx(
        statistics.fmean(of[1] for of in sums), rel=1e-4))


def test_eval_pairs_of_revkl_need_rewards_too(whole_run, pairs_file, tmp_path, capsys):
    bare = write_rows(tmp_path / "bare.jsonl", [{**row, "chosen_reward": None} for row in read_rows(pairs_file)])
    said = refused_run(capsys, *whole_run.flags, "--loss", "revkl", "--eval-pairs", bare, "--out", tmp_path / "out")
    assert "bare.jsonl:1" in said and "reward" in said


# ---------------------------------------------------------------------------------------------------------------------
# the reference cache

def cached(folder):
    """Contents and time of every file of the cache beside a run's folder."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("reference_cache/*/*")}


def test_runs_with_one_reference_pay_once(whole_run, policy, other, pairs_file, tmp_path):
    train(*whole_run.flags, "--out", tmp_path / "one")
    files = cached(tmp_path)
    rows = [json.loads(line) for content, _ in files.values() for line in content.splitlines()]
    pairs, _ = load_pairs(pairs_file, AutoTokenizer.from_pretrained(policy), "dpo", 2048)
    with torch.no_grad():
        exact = [logp for pair in pairs for logp in plain_logps(float64(policy), pair).tolist()]
    assert sorted(row["logp"] for row in rows) == pytest.approx(sorted(exact), abs=1e-3) and len(rows) == 18
    few = write_rows(tmp_path / "few.jsonl", read_rows(pairs_file)[2:7])
    copy = shutil.copytree(policy, tmp_path / "copied")  # what counts is the weights
    for name, flags in {"beta": ["--beta", 0.5], "ipo": ["--loss", "ipo"], "few": ["--pairs", few],
                        "slic": ["--loss", "slic"], "eval": ["--eval-pairs", few], "copy": ["--reference", copy],
                        "same": []}.items():
        train(*whole_run.flags, "--out", tmp_path / name, "--epochs", 1, *flags)
        assert cached(tmp_path) == files, name
    first, again = (read_rows(tmp_path / f"{name}/metrics.jsonl") for name in ("one", "same"))
    assert [row["loss"] for row in again[:1]] == [row["loss"] for row in first[:1]]
    for flags in (["--reference", other], ["--dtype", "bfloat16"], ["--model", other]):
        train(*whole_run.flags, "--out", tmp_path / "new", "--overwrite", "--epochs", 1, *flags)
    both = cached(tmp_path)
    assert files.items() <= both.items() and len(both) == 3  # --model other found the values of --reference other
    assert len({Path(name).parent for name in both}) == 3


def test_a_cache_adds_what_it_lacks_and_changes_no_loss(whole_run, pairs_file, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", read_rows(pairs_file)[2:7])
    train(*whole_run.flags, "--pairs", few, "--out", tmp_path / "few")
    files = cached(tmp_path)
    train(*whole_run.flags, "--out", tmp_path / "all")
    both = cached(tmp_path)
    assert files.items() <= both.items()
    assert [sum(content.count(b"\n") for content, _ in some.values()) for some in (files, both)] == [10, 18]
    close(read_rows(tmp_path / "all/metrics.jsonl"), whole_run.rows)


def test_a_wrong_value_in_the_cache_ends_the_run(whole_run, policy, pairs_file, tmp_path, capsys):
    two = write_rows(tmp_path / "two.jsonl", read_rows(pairs_file)[1:3])
    flags = [*whole_run.flags, "--pairs", two, "--out"]
    train(*flags, tmp_path / "out")
    file, = tmp_path.glob("reference_cache/*/*")
    rows = read_rows(file)
    assert len(rows) == 4
    for i in range(4):  # all of two pairs are looked at
        write_rows(file, [{**row, "logp": row["logp"] + 0.05 * (i == j)} for j, row in enumerate(rows)])
        said = refused_run(capsys, *flags, tmp_path / f"wrong{i}")
        assert f"{rows[i]['logp'] + 0.05:.4f} in {file.parent}" in said.splitlines()[-1], said
        assert not (tmp_path / f"wrong{i}/model.safetensors").exists()
    write_rows(file, rows)
    train(*flags, tmp_path / "right")


# ---------------------------------------------------------------------------------------------------------------------
# orders and batches

def test_epoch_order_depends_on_seed_epoch_and_ids_alone():
    pairs = [Pair(f"p{i}", "", [1], [[2]], 0.0) for i in range(40)]

    def order(some, seed=0, epoch=0):
        return [pair.pair_id for pair in epoch_order(some, seed, epoch)]

    first = order(pairs)
    assert sorted(first) == sorted(pair.pair_id for pair in pairs) and first != [pair.pair_id for pair in pairs]
    assert order(pairs[::-1]) == first
    assert order(pairs[5:]) == [name for name in first if int(name[1:]) >= 5]
    assert len({tuple(order(pairs, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_micro_batches_give_every_pair_once_whatever_the_ranks(monkeypatch):
    draw = random.Random(0)
    for _ in range(200):
        pairs = [Pair(f"p{i}", "", [1] * draw.randint(1, 20), [[2] * draw.randint(1, 20)] * draw.randint(1, 3), 0.0)
                 for i in range(draw.randint(1, 12))]
        world, budget, spare = draw.choice([1, 2, 3, 8]), draw.choice([1, 50, 100, 5000]), draw.choice([0, 30])
        ranks = []
        for rank in range(world):
            monkeypatch.setattr(dist, "get_world_size", lambda: world)
            monkeypatch.setattr(dist, "get_rank", lambda: rank)
            ranks.append(micro_batches(pairs, budget, spare))
        assert len({len(batches) for batches in ranks}) == 1, "FSDP2 hangs where ranks do not go forward equally often"
        batches = [batch for rank in ranks for batch in rank]
        real = [pair.pair_id for batch in batches for pair, weight in batch if weight == 1.0]
        assert sorted(real) == sorted(pair.pair_id for pair in pairs)
        assert {weight for batch in batches for _, weight in batch} <= {0.0, 1.0}
        assert all(batch and (len(batch) == 1 or budget >= sum(
            len(pair.prompt) + sum(map(len, pair.responses)) + spare for pair, _ in batch)) for batch in batches)
        if world == 1:
            assert all(weight == 1.0 for batch in batches for _, weight in batch)
        if budget == 5000:
            assert len(batches) == world  # nothing is cut without need


# ---------------------------------------------------------------------------------------------------------------------
# data

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def loaded(tmp_path, tokenizer, rows, max_length=2048, loss="dpo"):
    return load_pairs(write_rows(tmp_path / "pairs.jsonl", rows), tokenizer, loss, max_length)


BUILT = {"pair_id": "p", "prompt": messages("Hi"), "chosen": [{"role": "assistant", "content": "yes"}],
         "rejected": [{"role": "assistant", "content": "no"}], "chosen_finish": "stop", "rejected_finish": None,
         "chosen_token_ids": None, "rejected_token_ids": None}


def test_ids_are_prompt_response_and_one_end_of_turn(tmp_path, tokenizer):
    rewards = {"chosen_reward": 1.5, "rejected_reward": -1.0}
    (pair,), dropped = loaded(tmp_path, tokenizer, [{**BUILT, **rewards, "rejected_finish": "length", "source": "on"}])
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.prompt) == prompt
    assert pair.prompt == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    eot = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # not the newline that the template puts behind it; the rejected one was cut
    assert pair.responses == [tokenizer("yes")["input_ids"] + [eot], tokenizer("no")["input_ids"]]
    assert pair.tokens() == 2 * len(pair.prompt) + 4 + 2 and not dropped
    assert (pair.pair_id, pair.source, pair.reward_margin) == ("p", "on", 2.5) and not pair.ref_logps


def test_all_forms_of_a_pair_give_the_same_ids(tmp_path, tokenizer):
    talk = messages("Hi", "Hello", "And?")
    forms = [{**BUILT, "prompt": talk},
             {"pair_id": "p", "prompt": talk, "chosen": "yes", "rejected": "no"},
             {"pair_id": "p", "prompt": "ignored, as UltraFeedback's", "chosen": [*talk, BUILT["chosen"][0]],
              "rejected": [*talk, BUILT["rejected"][0]]},
             {"pair_id": "p", "chosen": [*talk, BUILT["chosen"][0]], "rejected": [*talk, BUILT["rejected"][0]]}]
    found = [loaded(tmp_path, tokenizer, [row])[0] for row in forms]
    assert found[0] == found[1] == found[2] == found[3]
    assert tokenizer.decode(found[0][0].prompt).count("<|im_start|>") == 4
    plain = [loaded(tmp_path, tokenizer, [{**BUILT, "prompt": prompt}])[0] for prompt in ("Hi", messages("Hi"))]
    assert plain[0] == plain[1]


def test_losses_that_train_the_chosen_side_take_that_alone(tmp_path, tokenizer):
    (both,), _ = loaded(tmp_path, tokenizer, [BUILT])
    for loss in train_dpo.LOSSES:
        (pair,), _ = loaded(tmp_path, tokenizer, [{**BUILT, "chosen_reward": 0.0, "rejected_reward": 0.0}], loss=loss)
        assert pair.responses == (both.responses[:1] if loss in ("sft", "online-dpo") else both.responses)
    row = {**BUILT, "rejected": "x" * 50}
    for loss in ("dpo", "sft"):  # what is dropped does not depend on the loss, so runs have the same pairs
        assert loaded(tmp_path, tokenizer, [BUILT, {**row, "pair_id": "long"}], 60, loss)[1] == {"too long": 1}


def test_a_row_without_pair_id_is_named_by_its_contents(tmp_path, tokenizer):
    rows = [{"prompt": "Hi", "chosen": "yes", "rejected": some} for some in ("no", "never")]
    one, two = ({pair.pair_id: pair.responses for pair in loaded(tmp_path, tokenizer, some)[0]}
                for some in (rows, rows[::-1]))
    assert len(one) == 2 and one == two


def test_sampled_ids_are_kept_unless_another_tokenizer_made_them(tmp_path, tokenizer, capsys):
    odd = tokenizer("y")["input_ids"] + tokenizer("es")["input_ids"][::-1]  # no text is tokenised to these
    row = {**BUILT, "chosen_token_ids": odd, "chosen_tokenizer": train_dpo.fingerprint(tokenizer)}
    eot = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (pair,), _ = loaded(tmp_path, tokenizer, [row])
    assert pair.responses[0] == [*odd, eot] and capsys.readouterr().err == ""
    (pair,), _ = loaded(tmp_path, tokenizer, [{**row, "chosen_tokenizer": "another"}])
    assert pair.responses[0] == tokenizer("yes")["input_ids"] + [eot]
    assert "1 responses" in capsys.readouterr().err


def test_too_long_and_identical_pairs_are_dropped_and_counted(tmp_path, tokenizer):
    length = len(loaded(tmp_path, tokenizer, [BUILT])[0][0].prompt) + 4  # the chosen side is the longer one
    rows = [BUILT, {**BUILT, "pair_id": "long", "rejected": "x" * 50}, {**BUILT, "pair_id": "same", "rejected": "yes"},
            # the end of the turn is a difference
            {**BUILT, "pair_id": "cut", "rejected": "yes", "rejected_finish": "length"}]
    kept, dropped = loaded(tmp_path, tokenizer, rows, length)
    assert [pair.pair_id for pair in kept] == ["p", "cut"] and dropped == {"too long": 1, "identical": 1}
    assert loaded(tmp_path, tokenizer, rows[:1] + rows[3:], length)[1] == {}
    kept, dropped = loaded(tmp_path, tokenizer, rows[:2], length + 40)  # 50 > 4 + 40
    assert [pair.pair_id for pair in kept] == ["p"] and dropped == {"too long": 1}
    sourced = [{**row, "pair_id": i, "source": source} for i, (row, source) in enumerate(zip(
        [*rows, rows[1], rows[1]], ["on", "off", "cross", "on", "on", "off"]), 1)]
    kept, dropped = loaded(tmp_path, tokenizer, sourced, length)
    assert [(pair.pair_id, pair.source) for pair in kept] == [("1", "on"), ("4", "on")]
    assert dropped == {"too long (off)": 2, "too long (on)": 1, "identical (cross)": 1}


def test_dropped_pairs_stand_in_the_summary(whole_run, pairs_file, tmp_path):
    rows = read_rows(pairs_file)
    more = [{**rows[1], "pair_id": "long", "chosen": "x" * 300},
            {**rows[0], "pair_id": "same", "rejected": rows[0]["chosen"], "rejected_finish": "length"}]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows + more)
    summary, _ = train(*whole_run.flags, "--pairs", pairs, "--out", tmp_path / "out", "--max-length", 200)
    assert summary["dropped"] == {"too long (off)": 1, "identical (on)": 1} and summary["pairs"] == 9
    close(read_rows(tmp_path / "out/metrics.jsonl"), whole_run.rows)


@pytest.mark.parametrize("change, word", [
    ({"chosen": ""}, "empty"), ({"rejected": [{"role": "assistant", "content": " \n"}]}, "empty"),
    ({"pair_id": "p"}, "twice"), ({"source": "on"}, "source"), ({"chosen": [{"role": "assistant"}]}, "empty"),
    ({"chosen": messages("Hi", "yes"), "rejected": messages("Ho", "no")}, "different prompts"),
    ({"chosen": messages("Hi")}, "assistant"), ({"chosen": 5}, "chosen"), ({"prompt": None}, "prompt"),
    ({"prompt": messages("Hi", "yes")}, "user turn"), ({"prompt": []}, "prompt"), ({"chosen": None}, "chosen"),
    ({"rejected": []}, "rejected"), ({"chosen_reward": "high", "rejected_reward": "low"}, "reward")])
def test_bad_rows_are_refused_with_file_and_line(change, word, tmp_path, tokenizer, capsys):
    rows = [BUILT, {**BUILT, "pair_id": "second", **change}]
    said = refusal(capsys, loaded, tmp_path, tokenizer, rows)
    assert f"{tmp_path}/pairs.jsonl:2: " in said and word in said and len(said.splitlines()) == 1


def test_revkl_without_rewards_is_refused(tmp_path, tokenizer, capsys):
    full = {**BUILT, "chosen_reward": 2.0, "rejected_reward": 0.5}
    assert loaded(tmp_path, tokenizer, [full], loss="revkl")[0][0].reward_margin == 1.5
    for row in (BUILT, {**full, "rejected_reward": None}):
        said = refusal(capsys, loaded, tmp_path, tokenizer, [full, {**row, "pair_id": "second"}], 2048, "revkl")
        assert "pairs.jsonl:2: expected numbers as chosen_reward" in said
        assert loaded(tmp_path, tokenizer, [row])[0][0].reward_margin == 0.0


def test_files_without_pairs_are_refused(tmp_path, tokenizer, capsys):
    def said(name):
        return refusal(capsys, load_pairs, str(tmp_path / name), tokenizer, "dpo", 2048)
    assert "no such file" in said("none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty file" in said("empty.jsonl")
    (tmp_path / "torn.jsonl").write_text(json.dumps(BUILT) + '\n{"chosen": ')
    assert "torn.jsonl:2: expected a JSON object" in said("torn.jsonl")
    write_rows(tmp_path / "half.jsonl", [{"prompt": "Hi", "chosen": "yes"}])
    assert "half.jsonl:1: expected the key 'rejected'" in said("half.jsonl")
    assert "too long" in refusal(capsys, loaded, tmp_path, tokenizer, [BUILT], 5)


def test_a_tokenizer_without_a_chat_template_is_refused(policy, pairs_file, tmp_path, capsys):
    bare = shutil.copytree(policy, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    flags = ("--pairs", pairs_file, "--out", tmp_path / "out")
    assert "chat template" in refused_run(capsys, "--model", bare, *flags)
    assert not (tmp_path / "out").exists()
    assert "nowhere" in refused_run(capsys, "--model", tmp_path / "nowhere", *flags)


# ---------------------------------------------------------------------------------------------------------------------
# conversations

THREE = messages("Hi", " Hello\n", "And?", "Fine", "So é?", "Bye")


def conversation_by_hand(tokenizer, turns):
    """(prompt, response) ids of messages, one turn after the other; what is not trained is ~id in the response."""
    ids = []
    for turn in turns:
        content, mine = turn["content"].strip(), turn["role"] == "assistant"
        parts = (f"<|im_start|>{turn['role']}\n", False), (content + "<|im_end|>", mine), ("\n", False)
        for text, is_trained in parts:
            ids += [(token, is_trained) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    first = next(i for i, (_, is_trained) in enumerate(ids) if is_trained)
    last = max(i for i, (_, is_trained) in enumerate(ids) if is_trained)
    return [token for token, _ in ids[:first]], [token if yes else ~token for token, yes in ids[first:last + 1]]


@pytest.mark.parametrize("turns", [
    THREE, THREE[:4], THREE[:2], THREE[:5], [{"role": "system", "content": "Be brief."}, *THREE],
    [*THREE[:2], {"role": "assistant", "content": "Are you there?"}, *THREE[2:]]])
def test_exactly_the_assistants_tokens_of_a_conversation_are_trained(turns, tmp_path, tokenizer, capsys):
    row = {"id": "c", "messages": turns}
    (pair,), dropped = loaded(tmp_path, tokenizer, [row], loss="sft")
    prompt, response = conversation_by_hand(tokenizer, turns)
    assert pair.prompt == prompt and pair.responses == [response] and not dropped
    assert pair.tokens() == len(prompt + response)
    eot = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sum(token == eot for token in response) == sum(turn["role"] == "assistant" for turn in turns)
    for loss in ("dpo", "online-dpo", "slic"):
        said = refusal(capsys, loaded, tmp_path, tokenizer, [row], 2048, loss)
        assert "pairs.jsonl:1: expected the key 'chosen'" in said
    said = refusal(capsys, loaded, tmp_path, tokenizer, [row], len(prompt + response) - 1, "sft")
    assert "too long" in said


def test_one_answer_is_trained_alike_as_a_pair_and_as_a_conversation(tmp_path, tokenizer):
    talk = messages("Hi", "Hello", "And?")
    (one,), _ = loaded(tmp_path, tokenizer, [{**BUILT, "prompt": messages("Hi")}], loss="sft")
    (two,), _ = loaded(tmp_path, tokenizer, [{"id": "c", "messages": messages("Hi", "yes")}], loss="sft")
    assert (one.prompt, one.responses) == (two.prompt, two.responses)
    (pair,), _ = loaded(tmp_path, tokenizer, [{**BUILT, "prompt": talk}], loss="sft")
    (whole,), _ = loaded(tmp_path, tokenizer, [{"messages": messages("Hi", "Hello", "And?", "yes")}], loss="sft")
    assert pair.prompt + pair.responses[0] == whole.prompt + [max(token, ~token) for token in whole.responses[0]]


def test_an_end_of_turn_behind_a_space_is_trained_in_every_turn(tmp_path):
    """Llama-2's template renders a space between the answer and the token that ends it."""
    template = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
                "{{ message['content'] + ' <|im_end|>' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}")
    make_tokenizer(tmp_path / "spaced", template)
    spaced = AutoTokenizer.from_pretrained(tmp_path / "spaced")
    (pair,), _ = loaded(tmp_path, spaced, [{"id": "c", "messages": THREE[:4]}], loss="sft")
    assert spaced.decode([token for token in pair.responses[0] if token >= 0]) == "Hello<|im_end|>Fine<|im_end|>"


@pytest.mark.parametrize("turns", [
    [], None, "Hi", 5, {"role": "user"}, ["Hi", "Hello"], messages("Hi"), [{"role": "user"}, *THREE[1:]], THREE[1:],
    [THREE[0], {"role": "assistant"}], [THREE[0], {"role": "assistant", "content": None}],
    [{"content": "Hi"}, THREE[1]], [{"role": "user", "content": ["Hi"]}, THREE[1]], messages("Hi", " \n"),
    messages("Hi", "Hello", "And?", ""),
    [{"role": "system", "content": "Be brief."}, THREE[1]]])
def test_a_malformed_conversation_is_refused_with_one_sentence(turns, tmp_path, tokenizer, capsys):
    rows = [{"id": "good", "messages": THREE}, {"id": "bad", "messages": turns}]
    said = refusal(capsys, loaded, tmp_path, tokenizer, rows, 2048, "sft")
    assert f"{tmp_path}/pairs.jsonl:2: " in said and len(said.splitlines()) == 1


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, capsys):
    template = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + (messages | length) | string }}"
                "{{ message['content'] + '<|im_end|>' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}")
    make_tokenizer(tmp_path / "odd", template)
    odd = AutoTokenizer.from_pretrained(tmp_path / "odd")
    said = refusal(capsys, loaded, tmp_path, odd, [{"id": "c", "messages": THREE}], 2048, "sft")
    assert "pairs.jsonl:1: the chat template renders earlier turns otherwise" in said


def test_a_run_on_conversations_is_that_of_a_plain_loop(policy, tmp_path):
    texts = ("Hello", "There you go", "And?????", "Fine")
    rows = [{"id": i, "messages": messages(*(text[i:] + str(i) for text in texts))[:2 + 2 * (i % 2)]} for i in range(4)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    flags = ["--model", policy, "--pairs", pairs, "--out", tmp_path / "out", "--loss", "sft", "--batch-size", 2,
             "--lr", LR]
    _, said = train(*flags)
    found = read_rows(tmp_path / "out/metrics.jsonl")
    expected, _ = plain_run(parse(*flags), [1.0, 1.0])
    check_rows(found, expected)
    assert said.count("【") in (1, 2)


def test_show_marks_exactly_what_is_trained(whole_run, tmp_path, tokenizer, capsys):
    def shown(rows, loss):
        train_dpo.show(tokenizer, loaded(tmp_path, tokenizer, rows, loss=loss)[0][0])
        return capsys.readouterr().err
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    # the rejected side was cut
    assert shown([{**BUILT, "rejected_finish": "length"}], "dpo") == (
        f"train_dpo.py: p: {prompt}【yes<|im_end|>】\ntrain_dpo.py: p: {prompt}【no】\n")
    assert shown([{**BUILT, "messages": THREE[:4]}], "sft") == (
        f"train_dpo.py: p: {prompt}【Hello<|im_end|>】\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n【Fine<|im_end|>】\n")
    assert whole_run.said.count("【") == whole_run.said.count("】") == 2


# ---------------------------------------------------------------------------------------------------------------------
# the finished model

def test_the_export_is_a_model_folder_like_the_source(whole_run, policy):
    start, found = load_file(Path(policy, "model.safetensors")), load_file(whole_run.out / "model.safetensors")
    assert found.keys() == start.keys()  # so no second copy of the tied head
    assert all(found[name].dtype == start[name].dtype and found[name].shape == start[name].shape for name in start)
    generation = [json.loads(Path(folder, "generation_config.json").read_text()) for folder in (policy, whole_run.out)]
    assert generation[0] == generation[1] and generation[1]["temperature"] == 0.1
    config = [json.loads(Path(folder, "config.json").read_text()) for folder in (policy, whole_run.out)]
    assert config[0] == config[1]  # nothing of how it was trained, such as the attention's name
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (policy, whole_run.out)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    talk = messages("Hé, you?")
    assert tokenizers[0].apply_chat_template(talk) == tokenizers[1].apply_chat_template(talk)
    assert train_dpo.fingerprint(tokenizers[0]) == train_dpo.fingerprint(tokenizers[1])


def test_a_run_that_samples_exports_the_generation_config_of_the_source(policy, pairs_file, tmp_path):
    flags = ("--loss", "online-dpo", "--online-max-new", 3)
    train("--model", policy, "--pairs", pairs_file, "--out", tmp_path / "out", *flags)
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(Path(policy, name).read_text())


def test_an_untied_head_is_exported_and_trained(untied, pairs_file, tmp_path):
    out = tmp_path / "out"
    train("--model", untied, "--pairs", pairs_file, "--out", out, "--lr", LR, "--eval-pairs", pairs_file)
    start, found = load_file(Path(untied, "model.safetensors")), load_file(out / "model.safetensors")
    assert found.keys() == start.keys() and "lm_head.weight" in found
    assert not [name for name in start if torch.equal(start[name], found[name])]
    pairs, _ = load_pairs(pairs_file, AutoTokenizer.from_pretrained(out), "dpo", 2048)
    with torch.no_grad():  # the folder holds the model that was measured last
        exact = torch.stack([plain_logps(float64(out), pair) for pair in pairs]).mean(0)
    measured = read_rows(out / "metrics.jsonl")[-1]["eval"]
    assert [measured["chosen_logp"], measured["rejected_logp"]] == pytest.approx(exact.tolist(), abs=1e-3)


def test_a_bfloat16_model_is_trained_in_float32_and_stored_in_bfloat16(policy, pairs_file, tmp_path):
    half = shutil.copytree(policy, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).save_pretrained(half)
    # a step of 1e-5 is lost in a bfloat16 weight of 0.3, whose neighbours are 2e-3 away; in float32 the loss shows it
    train("--model", half, "--pairs", pairs_file, "--out", tmp_path / "out", "--lr", 1e-5, "--epochs", 2,
          "--batch-size", 9)
    found = load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    first, second = read_rows(tmp_path / "out/metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and second["loss"] < first["loss"] - 1e-4


def test_a_folder_of_several_weight_files_is_read_whole(policy, whole_run, tmp_path, process):
    parts = shutil.copytree(policy, tmp_path / "parts")
    (parts / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(policy).save_pretrained(parts, max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    one, many = (whole_weights(load(folder)) for folder in (policy, parts))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_a_finished_run_is_neither_begun_again_nor_changed(whole_run, tmp_path, capsys):
    out = tmp_path / "out"
    first, _ = train(*whole_run.flags, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for flags in ((), ("--resume",)):
        summary, said = train(*whole_run.flags, "--out", out, *flags)
        assert summary == first and "【" not in said
    again = [*whole_run.flags, "--out", out, "--resume"]
    assert "lr was 0.001 and is 0.002" in refused_run(capsys, *again, "--lr", 0.002)
    assert "seed" in refused_run(capsys, *again, "--seed", 1)
    assert "loss was 'dpo' and is 'slic'" in refused_run(capsys, *again, "--loss", "slic")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    summary, _ = train(*whole_run.flags, "--out", out, "--overwrite", "--lr", LR / 2)
    rows = read_rows(out / "metrics.jsonl")
    assert summary["steps"] == len(rows) == 6 and rows[0]["lr"] == LR / 2
    assert rows[1]["loss"] != whole_run.rows[1]["loss"]


def test_a_finished_run_that_was_moved_is_still_finished(whole_run, tmp_path):
    out = shutil.copytree(whole_run.out, tmp_path / "moved")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert train(*whole_run.flags, "--out", out)[0] == whole_run.summary | {"out": str(out)}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_unfinished_run_goes_on_only_when_asked(whole_run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    meta = json.loads((whole_run.out / "metrics.meta.json").read_text())
    (out / "metrics.meta.json").write_text(json.dumps({key: value for key, value in meta.items() if key != "counts"}))
    (out / "metrics.jsonl").write_text('{"loss": 1}\n{"lo')  # killed before its first checkpoint
    assert "--resume goes on with it" in refused_run(capsys, *whole_run.flags, "--out", out)
    train(*whole_run.flags, "--out", out, "--resume")
    assert without_noise(read_rows(out / "metrics.jsonl")) == without_noise(whole_run.rows)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))


def test_no_model_is_overwritten_by_mistake(whole_run, policy, tmp_path, capsys):
    model = shutil.copytree(policy, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    flags = [*whole_run.flags[2:], "--model", model]
    assert "would overwrite the model" in refused_run(capsys, *flags, "--out", model, "--overwrite")
    assert "would overwrite the model" in refused_run(capsys, *whole_run.flags, "--reference", model, "--out", f"{model}/")
    assert "--overwrite replaces it" in refused_run(capsys, *whole_run.flags, "--out", model)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "out"):
        assert f"{file}: expected a folder" in refused_run(capsys, *whole_run.flags, "--out", out)
    assert file.read_text() == "kept"


def test_a_run_goes_on_only_with_the_same_chat_template(whole_run, policy, tmp_path, capsys):
    model, out = shutil.copytree(policy, tmp_path / "model"), tmp_path / "out"
    flags = [*whole_run.flags[2:], "--model", model, "--out", out]
    assert whole_run.flags[0] == "--model"
    train(*flags)
    template = model / "chat_template.jinja"
    template.write_text("Hello! " + template.read_text())
    assert f"other inputs: {template} was" in refused_run(capsys, *flags, "--resume")
    # a template that no file here holds, as a hub model's, shows in the token ids alone
    meta = out / "metrics.meta.json"
    facts = json.loads(meta.read_text())
    facts["inputs"][str(template)] = hashlib.sha256(template.read_bytes()).hexdigest()
    meta.write_text(json.dumps(facts))
    assert "other inputs: token ids was" in refused_run(capsys, *flags, "--resume")


def test_two_pairs_of_a_prompt_in_ultrafeedbacks_form_are_two_pairs(tmp_path, tokenizer):
    rows = [{"prompt": "Hi", "chosen": messages("Hi", answer), "rejected": messages("Hi", "No"),
             "messages": messages("Hi", answer)} for answer in ("Yes", "Sure")]
    assert len({pair.pair_id for pair in loaded(tmp_path, tokenizer, rows)[0]}) == 2


def test_checkpoints_are_removed_behind_the_meta_file_that_says_finished(tmp_path):
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        (folder / "00000002").mkdir(parents=True)
        train_dpo.remove(folder)
        assert not any(tmp_path.iterdir())
    (tmp_path / "removed" / "half").mkdir(parents=True)  # a kill left it
    train_dpo.remove(folder)
    assert not any(tmp_path.iterdir())
