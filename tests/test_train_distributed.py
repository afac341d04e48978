"""train_dpo.py as real processes: two by torchrun against one, and kill -9 at three places, then --resume.

Run: python -m pytest tests/test_train_distributed.py -q     (functions, data and export: tests/test_train.py)
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import REPO, make_policy, read_rows
from test_train import LR, close, make_pairs, train, without_noise

RUN = SimpleNamespace(pairs=30, steps=20, every=7)  # of the runs that are killed: two epochs of 10 steps
# sums in one order, and no threads that wait for each other on a busy machine
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------------------------------------------------------------
# two processes

def torchrun(*flags):
    """Two processes; returns the finished command."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(REPO / "train_dpo.py")]
    return subprocess.run([*command, *map(str, flags)], capture_output=True, text=True, env=ENV)


@pytest.fixture(scope="module", params=["tied", "untied"])
def both(request, policy, tmp_path_factory):
    """The same flags with one process and with two. Steps of 4, 4 and 1 pairs: rank 1 ends on a dummy."""
    folder = tmp_path_factory.mktemp(request.param)
    model = policy if request.param == "tied" else make_policy(folder / "model", seed=3, tie=False)
    flags = ("--model", model, "--pairs", make_pairs(folder / "pairs.jsonl"), "--batch-size", 4, "--epochs", 2,
             "--lr", LR)
    train(*flags, "--out", folder / "one")
    done = torchrun(*flags, "--out", folder / "two", "--micro-tokens", 120)
    return SimpleNamespace(model=model, one=folder / "one", two=folder / "two", done=done)


def test_two_processes_make_the_same_steps_as_one(both):
    assert (both.two / "metrics.jsonl").exists(), both.done.stderr[-3000:]
    one, two = read_rows(both.one / "metrics.jsonl"), read_rows(both.two / "metrics.jsonl")
    close(two, one)
    for a, b in zip(two[:3], one[:3]):  # the reference, the first gradient and the first updates have no time to drift
        assert abs(a["loss"] - b["loss"]) < 2e-5 and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["chosen_logp"] == pytest.approx(b["chosen_logp"], rel=1e-6)
    references = [read_rows(folder / "reference.jsonl") for folder in (both.one, both.two)]
    for a, b in zip(*references, strict=True):
        assert a["pair_id"] == b["pair_id"] and a["chosen_logp"] == pytest.approx(b["chosen_logp"], abs=1e-4)


def test_two_processes_export_the_same_model_as_one(both):
    # V = 259 is odd, so the embedding's shards are padded; nothing of the padding may reach the file
    assert both.done.returncode == 0, both.done.stderr[-3000:]
    summary = json.loads(both.done.stdout.strip().splitlines()[-1])
    assert summary["steps"] == 6 and both.done.stdout.count('"steps"') == 1  # printed by one process only
    start, one, two = (load_file(Path(folder, "model.safetensors")) for folder in (both.model, both.one, both.two))
    assert start.keys() == one.keys() == two.keys()
    for name in start:
        assert start[name].shape == two[name].shape and not torch.equal(start[name], two[name]), name
        off = (one[name] - two[name]).abs()
        # a gradient that is all rounding moves Adam by whole steps: a few may
        assert (off > 0.05 * LR).float().mean() < 2e-3, name


# ---------------------------------------------------------------------------------------------------------------------
# kill and resume

def script(*flags):
    """A run of the script to its end in a process of its own; returns the JSON it printed."""
    done = subprocess.run([sys.executable, str(REPO / "train_dpo.py"), *map(str, flags)], capture_output=True,
                          text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def straight(policy, tmp_path_factory):
    """The run that nobody disturbs, by the script itself: what a resumed run must repeat to the bit."""
    folder = tmp_path_factory.mktemp("straight")
    flags = ["--model", policy, "--pairs", make_pairs(folder / "pairs.jsonl", n=RUN.pairs, seed=1), "--batch-size", 3,
             "--epochs", 2,
             # a forward per pair, so that there is time to kill it
             "--lr", LR, "--save-every", RUN.every, "--micro-tokens", 1]
    summary = script(*flags, "--out", folder / "out")
    assert summary["steps"] == RUN.steps and summary["resumed_steps"] == 0
    return SimpleNamespace(flags=flags, out=folder / "out", summary=summary)


def start_and_kill(flags, out, ready):
    """Start the script, kill -9 it as soon as ready() holds."""
    command = [sys.executable, str(REPO / "train_dpo.py"), *map(str, flags), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENV)
    os.set_blocking(process.stderr.fileno(), False)
    said = b""
    while process.poll() is None and not ready(said):
        said += process.stderr.read() or b""
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"it ended before it could be killed: {said[-2000:]!r}"
    assert not (out / "model.safetensors").exists()


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same_as_straight(straight, out, resumed_steps):
    flags = [*straight.flags, "--out", out, "--resume"]
    summary = script(*flags)
    assert summary["resumed_steps"] == resumed_steps
    assert without_noise(read_rows(out / "metrics.jsonl")) == without_noise(read_rows(straight.out / "metrics.jsonl"))
    assert (out / "model.safetensors").read_bytes() == (straight.out / "model.safetensors").read_bytes()
    assert (out / "reference.jsonl").read_bytes() == (straight.out / "reference.jsonl").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in straight.out.iterdir())


def keep(out):
    """Put a killed run aside; the function it returns sets it up again in its place, for one test each."""
    kept = Path(shutil.move(out, out.with_name("kept")))

    def again():
        shutil.rmtree(out, ignore_errors=True)
        return Path(shutil.copytree(kept, out))

    return again


@pytest.fixture(scope="module")
def killed_late(straight, tmp_path_factory):
    """Killed behind its first checkpoint, with steps logged since then."""
    out = tmp_path_factory.mktemp("late") / "out"
    start_and_kill(straight.flags, out, lambda said: lines(out / "metrics.jsonl") >= RUN.every + 3)
    assert RUN.every + 3 <= lines(out / "metrics.jsonl") < RUN.steps
    return keep(out)


@pytest.fixture(scope="module")
def killed_early(straight, tmp_path_factory):
    """Killed behind the reference and before the first checkpoint."""
    out = tmp_path_factory.mktemp("early") / "out"
    flags = [999 if flag == RUN.every else flag for flag in straight.flags]
    start_and_kill(flags, out, lambda said: lines(out / "metrics.jsonl") >= 3)
    assert 3 <= lines(out / "metrics.jsonl") < RUN.steps and not (out / "checkpoints").exists()
    return keep(out)


def test_killed_behind_a_checkpoint_and_resumed_is_the_same_run(straight, killed_late):
    out = killed_late()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # as if the machine had died in the middle of a line
    steps = max(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))
    assert steps % RUN.every == 0 and steps > 0
    same_as_straight(straight, out, steps)


def test_killed_before_the_first_checkpoint_and_resumed_is_the_same_run(straight, killed_early):
    same_as_straight(straight, killed_early(), 0)


def test_killed_in_the_reference_pass_and_resumed_is_the_same_run(straight, tmp_path):
    out = tmp_path / "out"
    start_and_kill(straight.flags, out, lambda said: b"reference:" in said)
    assert lines(out / "metrics.jsonl") == 0
    same_as_straight(straight, out, 0)


def refused(flags):
    """What is said where the run ends with status 2, in this process: no model is trained."""
    with pytest.raises(pytest.fail.Exception) as stop:
        train(*flags)
    assert "exit status 2" in str(stop.value)
    return str(stop.value)


def test_an_unfinished_run_goes_on_only_when_asked_and_as_it_was(straight, killed_late, tmp_path):
    out = killed_late()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    flags = [*straight.flags, "--out", out]
    assert "--resume goes on" in refused(flags)
    assert "lr was 0.001 and is 0.005" in refused([*flags, "--resume", "--lr", 0.005])
    assert "beta" in refused([*flags, "--resume", "--beta", 0.2])
    other = make_pairs(tmp_path / "other.jsonl", n=RUN.pairs, seed=2)
    assert "pairs" in refused([*flags, "--resume", "--pairs", other])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_changed_pairs_under_the_same_name_are_refused(straight, killed_late):
    out, pairs = killed_late(), Path(straight.flags[3])
    text = pairs.read_text()
    try:
        pairs.write_text(text.replace("x", "y", 1))
        assert str(pairs) in refused([*straight.flags, "--out", out, "--resume"])
    finally:
        pairs.write_text(text)


@pytest.mark.parametrize("place", ["killed_early", "killed_late"])
def test_a_reference_that_was_tampered_with_stops_the_run(place, straight, request):
    out = request.getfixturevalue(place)()
    rows = read_rows(out / "reference.jsonl")
    (out / "reference.jsonl").write_text("".join(json.dumps({**row, "chosen_logp": row["chosen_logp"] + 1}) + "\n"
                                                 for row in rows))
    said = refused([*straight.flags, "--out", out, "--resume"])
    assert "reference" in said.splitlines()[-1]
    assert not (out / "model.safetensors").exists()


def test_overwrite_starts_an_unfinished_run_anew(straight, killed_late):
    out = killed_late()
    summary, _ = train(*straight.flags, "--out", out, "--overwrite", "--epochs", 1)
    rows = read_rows(out / "metrics.jsonl")
    assert summary["resumed_steps"] == 0 and [row["step"] for row in rows] == list(range(RUN.steps // 2))
    assert not (out / "checkpoints").exists()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
