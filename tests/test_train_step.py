"""
recipes/train_kto.py: losses with a mean over the optimizer step.

Covers  runs of kto and bco against a float64 loop over whole steps: losses, metrics, gradient norms, the
        mean, weights; the same with small rows and with two FSDP2 processes, where a loss with the mean in
        it differs; kill -9 and the same command; held-out pairs; what --loss accepts.
Run     python -m pytest tests/test_train_step.py
"""

import math

import pytest
import torch
from conftest import REPO, make_policy, read_rows, run_script
from processes import kill_when, start_one, two_processes
from safetensors.torch import load_file
from train_oracle import LR, float64, make_pairs, parse, plain_logps, read_pairs, without_noise

from train_dpo import epoch_order

SCRIPT = "recipes/train_kto.py"
FACTORS = [1.0, 1.0, 0.8, 0.6, 0.4, 0.2]  # of the learning rate in the six steps
BOUNDS = {"loss": 2e-4, "chosen_reward": 2e-4, "rejected_reward": 2e-4, "mean_log_ratio": 2e-3}
NAIVE = """
import sys

sys.path.insert(0, {folder!r})
import train_dpo
from train_dpo import loss, torch


@loss()
def naive(batch, *, beta=None):
    z = torch.cat([batch.chosen, batch.rejected]).mean().clamp(min=0).detach()
    gains = torch.sigmoid(beta * (batch.chosen - z)) + torch.sigmoid(beta * (z - batch.rejected))
    return 1 - gains / 2


if __name__ == "__main__":
    train_dpo.main(train_dpo.parse_args())
"""  # recipes/train_kto.py's kto with the mean of a row


# ----- the whole step in float64
def losses_of_step(name, beta, chosen, rejected):
    """Loss of every pair of a step, from log-ratios (B,); and the mean that they are compared with."""
    mean = (sum(chosen.tolist()) + sum(rejected.tolist())) / (2 * len(chosen))
    if name == "kto":
        z = mean if mean > 0 else 0.0
        return (torch.sigmoid(-beta * (chosen - z)) + torch.sigmoid(beta * (rejected - z))) / 2, mean
    softplus = torch.nn.functional.softplus
    return softplus(beta * (mean - chosen)) + softplus(beta * (rejected - mean)), mean


def plain_run(name, flags, factors):
    """The run's steps by a plain loop, one sequence at a time -> rows, model."""
    args = parse(*flags, "--out", "o")
    pairs, model, reference = read_pairs(args), float64(args.model), float64(args.reference)
    with torch.no_grad():
        pairs = [pair._replace(reference_logps=plain_logps(reference, pair).tolist()) for pair in pairs]
    betas = (0.9, args.adam_beta2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=0.0)
    rows = []
    for epoch in range(args.epochs):
        order = epoch_order(pairs, args.seed, epoch)
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            logps = torch.stack([plain_logps(model, pair) for pair in batch])  # (B, 2)
            ratios = logps - torch.tensor([pair.reference_logps for pair in batch])
            losses, mean = losses_of_step(name, args.beta, *ratios.unbind(1))
            optimizer.zero_grad()
            losses.mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            optimizer.param_groups[0]["lr"] = args.lr * factors[len(rows)]
            optimizer.step()
            row = {"loss": losses.mean().item(), "mean_log_ratio": mean, "grad_norm": norm}
            row["chosen_reward"], row["rejected_reward"] = (args.beta * ratios.mean(0)).tolist()
            rows.append(row)
    return rows, model


def check(rows, expected):
    """Metrics against the plain loop's: the first two steps have had no time to drift."""
    assert [row["step"] for row in rows] == list(range(len(expected)))
    for ours, plain in zip(rows, expected):
        early = ours["step"] < 2
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=5e-5 if early else 5e-4)
        for key, bound in BOUNDS.items():
            bound = bound / 10 if early else bound
            assert ours[key] == pytest.approx(plain[key], abs=bound), (ours["step"], key)


def check_weights(folder, model):
    found = load_file(folder / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in found:
            off = (found[name] - value.float()).abs()
            # Adam makes a whole step even of a gradient that is all rounding: a few may differ
            assert (off > 0.05 * LR).float().mean() < 2e-3, name


# ----- runs
@pytest.fixture(scope="module")
def flags(policy, tmp_path_factory):
    """Two epochs of 7 + 7 + 1 pairs, against a reference that is not the policy."""
    folder = tmp_path_factory.mktemp("step")
    reference = make_policy(folder / "reference", seed=8)
    pairs = make_pairs(folder / "pairs.jsonl", n=15)
    flags = ["--model", policy, "--reference", reference, "--pairs", pairs, "--lr", LR]
    return [*flags, "--batch-size", 7, "--epochs", 2]


@pytest.fixture(scope="module", params=["kto", "bco"])
def expected(request, flags):
    return request.param, *plain_run(request.param, flags, FACTORS)


@pytest.mark.parametrize("tokens", [100_000, 120, 1])  # a row, several rows, a pair a row
def test_the_rows_of_a_step_change_nothing(tokens, flags, expected, tmp_path):
    name, rows, model = expected
    out = tmp_path / "out"
    run_script(SCRIPT, *flags, "--loss", name, "--out", out, "--micro-tokens", tokens)
    check(read_rows(out / "metrics.jsonl"), rows)
    check_weights(out, model)


def test_two_processes_change_nothing(flags, expected, tmp_path):
    name, rows, model = expected
    out = tmp_path / "out"
    two_processes(SCRIPT, *flags, "--loss", name, "--out", out, "--micro-tokens", 120)
    check(read_rows(out / "metrics.jsonl"), rows)
    check_weights(out, model)


def test_a_mean_inside_a_loss_is_of_a_row(flags, tmp_path):
    """Why there are two passes: as a loss of train_dpo.py it depends on the rows and the processes."""
    script = tmp_path / "naive.py"
    script.write_text(NAIVE.format(folder=str(REPO)))
    flags = [*flags, "--loss", "naive"]
    (first, *_), _ = plain_run("kto", flags[:-2], FACTORS)
    found = {}
    for tokens in (100_000, 120):
        run_script(script, *flags, "--micro-tokens", tokens, "--out", tmp_path / f"{tokens}")
        found[tokens] = read_rows(tmp_path / f"{tokens}" / "metrics.jsonl")[0]
    two_processes(script, *flags, "--micro-tokens", 100_000, "--out", tmp_path / "two")
    found["two"] = read_rows(tmp_path / "two" / "metrics.jsonl")[0]
    assert found[100_000]["loss"] == pytest.approx(first["loss"], abs=2e-5)  # a row is the step
    assert found[100_000]["grad_norm"] == pytest.approx(first["grad_norm"], rel=5e-5)
    for cut in (120, "two"):
        assert abs(found[cut]["loss"] - first["loss"]) > 1e-3
        assert abs(found[cut]["grad_norm"] / first["grad_norm"] - 1) > 5e-3


def test_killed_and_resumed_is_the_same_run(flags, tmp_path):
    flags = [*flags, "--batch-size", 3, "--save-every", 3, "--micro-tokens", 1]  # 10 steps
    run_script(SCRIPT, *flags, "--out", tmp_path / "straight")
    out = tmp_path / "out"
    metrics = out / "metrics.jsonl"
    kill_when(
        lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 4,
        start_one(SCRIPT, *flags, "--out", out),
    )
    summary, _ = run_script(SCRIPT, *flags, "--out", out)
    assert summary["resumed_steps"] >= 3
    straight = read_rows(tmp_path / "straight" / "metrics.jsonl")
    assert without_noise(read_rows(metrics)) == without_noise(straight) and len(straight) == 10
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "straight"))
    assert ours == theirs


def test_held_out_pairs_are_measured_with_the_mean_of_the_step(flags, tmp_path):
    out, held_out = tmp_path / "out", make_pairs(tmp_path / "held_out.jsonl", n=1, seed=5)
    run_script(SCRIPT, *flags, "--loss", "bco", "--eval-pairs", held_out, "--save-every", 2, "--out", out)
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval" in row] == [1, 3, 5]
    for row in rows[1::2]:
        shift, held = 0.1 * row["mean_log_ratio"], row["eval"]  # --beta is 0.1
        gains = held["chosen_reward"] - shift, shift - held["rejected_reward"]
        assert held["loss"] == pytest.approx(sum(math.log1p(math.exp(-gain)) for gain in gains), abs=1e-9)
        assert abs(shift) > 0.1


def test_the_losses_of_train_dpo_are_refused(flags, tmp_path):
    said = run_script(SCRIPT, *flags, "--out", tmp_path / "out", "--loss", "dpo", expect=2)[1]
    assert "--loss dpo is for train_dpo.py; here are kto and bco" in said
    assert not (tmp_path / "out").exists()
