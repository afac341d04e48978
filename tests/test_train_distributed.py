"""train_dpo.py as processes: two by torchrun against one, kill -9 at three places and --resume, one cache for two runs.

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

from conftest import REPO, make_policy, read_rows, run_script, write_rows
from test_train import LR, make_pairs, train, without_noise

# of the runs that are killed: two epochs of 10 steps, two windows of the reference
RUN = SimpleNamespace(pairs=100, steps=20, every=4)
# sums in one order, and no threads that wait for each other on a busy machine
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
ONE = [sys.executable, str(REPO / "train_dpo.py")]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ONE[1]]


def same_run(ours, theirs):
    """The same steps up to rounding, which Adam lets grow slowly."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        where = f"step {b['step']}: "
        assert a.keys() == b.keys(), where
        for name in ("step", "pairs", "tokens", "lr", "sample_tokens", "sample_truncated"):
            assert a.get(name) == b.get(name), where + name  # the same samples, token for token in number
        for name, bound in {"loss": 1e-4, "margin": 1e-4, "chosen_reward": 1e-4, "rejected_reward": 1e-4,
                            "kl_est": 1e-3, "advantage_rms": 1e-3, "chosen_logp": 2e-3, "rejected_logp": 2e-3}.items():
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), abs=bound), where + name
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), where


def same_weights(ours, theirs, start):
    """The same trained models up to the few weights whose gradient is all rounding, which Adam moves by whole steps."""
    start, ours, theirs = (load_file(Path(folder, "model.safetensors")) for folder in (start, ours, theirs))
    assert start.keys() == ours.keys() == theirs.keys()
    for name in start:
        assert start[name].shape == ours[name].shape and not torch.equal(start[name], ours[name]), name
        assert ((ours[name] - theirs[name]).abs() > 0.05 * LR).float().mean() < 2e-3, name


# ---------------------------------------------------------------------------------------------------------------------
# two processes

CASES = {  # model, flags of both, flags of the two processes: a step in one forward, or in about three per process
    "tied": ("tied", (), ()), "untied, accumulated": ("untied", (), ("--micro-tokens", 120)),
    "hypo": ("tied", ("--loss", "hypo", "--hypo-lambda", 0.01, "--online-max-new", 12), ("--micro-tokens", 220)),
    "sft": ("untied", ("--loss", "sft"), ("--micro-tokens", 90))}


def two_processes(*flags):
    """A run by torchrun; returns what it printed."""
    done = subprocess.run([*TWO, *map(str, flags)], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", params=CASES)
def both(request, policy, tmp_path_factory):
    """The same flags with one process and with two. Steps of 7, 7 and 1 pairs: rank 1 ends on a dummy."""
    kind, shared, cut = CASES[request.param]
    folder = tmp_path_factory.mktemp("both")
    model = policy if kind == "tied" else make_policy(folder / "model", seed=3, tie=False)
    flags = ("--model", model, "--pairs", make_pairs(folder / "pairs.jsonl", n=15), "--batch-size", 7, "--epochs", 2,
             "--lr", LR, *shared)
    train(*flags, "--out", folder / "a" / "out")
    printed = two_processes(*flags, "--out", folder / "b" / "out", *cut)
    return SimpleNamespace(model=model, one=folder / "a" / "out", two=folder / "b" / "out", printed=printed)


def cached(folder):
    """The reference's log-probabilities in a folder, {key: logp}; two files that have one key agree up to rounding."""
    values = {}
    for path in sorted(folder.glob("reference_cache/*/*.jsonl")):
        for row in read_rows(path):
            assert values.setdefault(row["key"], row["logp"]) == pytest.approx(row["logp"], abs=1e-4)
    return values


def test_two_processes_make_the_same_steps_as_one(both):
    one, two = read_rows(both.one / "metrics.jsonl"), read_rows(both.two / "metrics.jsonl")
    same_run(two, one)
    assert [row["pairs"] for row in two] == [7, 7, 1] * 2
    for a, b in zip(two[:3], one[:3]):  # the reference, the first gradient and the first updates have no time to drift
        assert abs(a["loss"] - b["loss"]) < 2e-5 and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["chosen_logp"] == pytest.approx(b["chosen_logp"], rel=1e-6)
    assert cached(both.two.parent) == pytest.approx(cached(both.one.parent), abs=1e-4)


def test_two_processes_export_the_same_model_as_one(both):
    # V = 259 is odd, so the embedding's shards are padded; nothing of the padding may reach the file
    assert json.loads(both.printed.strip().splitlines()[-1])["steps"] == 6
    assert both.printed.count('"steps"') == 1  # printed by one process only
    same_weights(both.two, both.one, both.model)
    assert sorted(path.name for path in both.two.iterdir()) == sorted(path.name for path in both.one.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# kill and resume

@pytest.fixture(scope="module")
def straight(policy, tmp_path_factory):
    """The run that nobody disturbs, by the script itself: what a resumed run must repeat to the bit."""
    folder = tmp_path_factory.mktemp("straight")
    flags = ["--model", policy, "--pairs", make_pairs(folder / "pairs.jsonl", n=RUN.pairs, seed=1), "--batch-size", 10,
             # a forward per pair, so that there is time to kill it
             "--epochs", 2, "--lr", LR, "--save-every", RUN.every, "--micro-tokens", 1]
    summary, _ = run_script("train_dpo.py", *flags, "--out", folder / "out")
    assert summary["steps"] == RUN.steps and summary["resumed_steps"] == 0
    assert not (folder / "out" / "checkpoints").exists()
    rows = read_rows(folder / "out" / "metrics.jsonl")
    return SimpleNamespace(flags=flags, out=folder / "out", summary=summary, rows=rows)


def start_and_kill(command, flags, out, ready):
    """Start the script, kill -9 it (with torchrun: its workers, whereupon it ends) as soon as ready() holds."""
    process = subprocess.Popen([*command, *map(str, flags), "--out", str(out)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, env=ENV)
    os.set_blocking(process.stderr.fileno(), False)
    said = b""
    while process.poll() is None and not ready():
        said += process.stderr.read() or b""
        time.sleep(0.001)
    assert process.poll() is None, f"it ended before it could be killed: {said[-2000:]!r}"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if command == TWO else [process.pid]
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    process.stderr.close()
    assert process.wait() != 0 and not (out / "model.safetensors").exists()


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(out):
    return sorted(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))


def same_as_straight(straight, out, resumed_steps):
    summary, _ = run_script("train_dpo.py", *straight.flags, "--out", out, "--resume")
    assert summary["resumed_steps"] == resumed_steps
    assert without_noise(read_rows(out / "metrics.jsonl")) == without_noise(straight.rows)
    assert (out / "model.safetensors").read_bytes() == (straight.out / "model.safetensors").read_bytes()
    assert cached(out.parent) == cached(straight.out.parent)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in straight.out.iterdir())


def killed(straight, folder, command, extra, ready):
    """Start a run, kill it, put its folder aside; returns a function that sets it up again, for one test each."""
    out = folder / "out"
    start_and_kill(command, [*straight.flags, *extra], out, lambda: ready(lines(out / "metrics.jsonl")))
    kept = Path(shutil.move(out, out.with_name("kept")))

    def again():
        shutil.rmtree(out, ignore_errors=True)
        return Path(shutil.copytree(kept, out))

    return again


@pytest.fixture(scope="module")
def killed_late(straight, tmp_path_factory):
    """Killed behind its third checkpoint, with steps logged since then; two checkpoints are kept."""
    folder = tmp_path_factory.mktemp("late")
    return killed(straight, folder, ONE, ("--keep-last", 2), lambda done: done >= 3 * RUN.every + 2)


@pytest.fixture(scope="module")
def killed_early(straight, tmp_path_factory):
    """Killed behind the reference and before the first checkpoint."""
    return killed(straight, tmp_path_factory.mktemp("early"), ONE, (), lambda done: done >= 2)


@pytest.fixture(scope="module")
def killed_two(straight, tmp_path_factory):
    """Two processes, killed behind their first checkpoint."""
    return killed(straight, tmp_path_factory.mktemp("two"), TWO, (), lambda done: done > RUN.every)


def test_keep_last_keeps_two_checkpoints(killed_late):
    out = killed_late()
    assert checkpoints(out) == [2 * RUN.every, 3 * RUN.every]
    assert 3 * RUN.every + 2 <= lines(out / "metrics.jsonl") < 4 * RUN.every


def test_killed_behind_a_checkpoint_and_resumed_is_the_same_run(straight, killed_late):
    out = killed_late()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # as if the machine had died in the middle of a line
    same_as_straight(straight, out, 3 * RUN.every)


def test_killed_before_the_first_checkpoint_and_resumed_is_the_same_run(straight, killed_early):
    out = killed_early()
    assert 2 <= lines(out / "metrics.jsonl") < RUN.every and checkpoints(out) == []
    same_as_straight(straight, out, 0)


def test_killed_in_the_reference_pass_and_resumed_is_the_same_run(straight, tmp_path):
    out = tmp_path / "out"
    start_and_kill(ONE, straight.flags, out, lambda: cached(tmp_path))
    assert lines(out / "metrics.jsonl") == 0
    assert 0 < len(cached(tmp_path)) < len(cached(straight.out.parent))  # a window is there, and is read
    same_as_straight(straight, out, 0)


def test_a_checkpoint_of_two_processes_is_resumed_by_one(straight, killed_two, policy):
    out = killed_two()
    summary, _ = train(*straight.flags, "--out", out, "--resume")
    assert summary["resumed_steps"] == RUN.every
    same_run(read_rows(out / "metrics.jsonl"), straight.rows)
    same_weights(out, straight.out, policy)


def test_a_checkpoint_of_one_process_is_resumed_by_two(straight, killed_late, policy):
    out = killed_late()
    printed = two_processes(*straight.flags, "--out", out, "--resume")
    assert json.loads(printed.strip().splitlines()[-1])["resumed_steps"] == 3 * RUN.every
    same_run(read_rows(out / "metrics.jsonl"), straight.rows)
    same_weights(out, straight.out, policy)


# ---------------------------------------------------------------------------------------------------------------------
# what an unfinished run accepts

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
    assert "beta was 0.1 and is 0.2" in refused([*flags, "--resume", "--beta", 0.2])
    assert "belongs to a run with other args" in refused([*flags, "--resume", "--loss", "ipo"])
    other = make_pairs(tmp_path / "other.jsonl", n=RUN.pairs, seed=2)
    assert f"pairs was {straight.flags[3]!r} and is {other!r}" in refused([*flags, "--resume", "--pairs", other])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_changed_pairs_under_the_same_name_are_refused(straight, killed_late):
    out, pairs = killed_late(), Path(straight.flags[3])
    text = pairs.read_text()
    try:
        pairs.write_text(text.replace("x", "y", 1))
        assert f"other inputs: {pairs} was" in refused([*straight.flags, "--out", out, "--resume"])
    finally:
        pairs.write_text(text)


def test_a_reference_that_was_tampered_with_stops_the_run(straight, killed_early):
    out = killed_early()
    for path in out.parent.glob("reference_cache/*/*.jsonl"):
        kept = path.read_text()
        write_rows(path, [{**row, "logp": row["logp"] + 1} for row in read_rows(path)])
        path.with_suffix(".kept").write_text(kept)
    try:
        said = refused([*straight.flags, "--out", out, "--resume"])
    finally:
        for path in out.parent.glob("reference_cache/*/*.kept"):
            os.replace(path, path.with_suffix(".jsonl"))
    assert "log-probability" in said and str(out.parent / "reference_cache") in said
    assert not (out / "model.safetensors").exists()


def test_overwrite_starts_an_unfinished_run_anew(straight, killed_late):
    out = killed_late()
    summary, _ = train(*straight.flags, "--out", out, "--overwrite", "--epochs", 1, "--save-every", 100)
    rows = read_rows(out / "metrics.jsonl")
    assert summary["resumed_steps"] == 0 and [row["step"] for row in rows] == list(range(RUN.steps // 2))
    assert not (out / "checkpoints").exists()


def test_a_finished_run_is_not_done_again(straight):
    before = {path: path.read_bytes() for path in straight.out.rglob("*") if path.is_file()}
    assert train(*straight.flags, "--out", straight.out)[0] == straight.summary
    assert {path: path.read_bytes() for path in straight.out.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------------------------------------------------------
# one cache for two runs

def test_two_runs_at_the_same_time_share_one_reference_cache(straight, tmp_path):
    flags = [*straight.flags, "--epochs", 1]
    alone = {loss: tmp_path / loss for loss in ("dpo", "ipo")}
    for loss, folder in alone.items():
        train(*flags, "--loss", loss, "--out", folder / "out")
    shared = tmp_path / "shared"
    runs = {loss: subprocess.Popen([*ONE, *map(str, flags), "--loss", loss, "--out", shared / loss],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENV) for loss in alone}
    for loss, run in runs.items():
        said = run.communicate()[1].decode()
        assert run.returncode == 0, said[-2000:]
        same_run(read_rows(shared / loss / "metrics.jsonl"), read_rows(alone[loss] / "out" / "metrics.jsonl"))
    assert cached(shared) == pytest.approx(cached(straight.out.parent), abs=1e-4)
    assert not list(shared.glob("reference_cache/*/*.tmp")) and len(list(shared.glob("reference_cache/*"))) == 1
    files = {path: path.stat().st_mtime_ns for path in shared.glob("reference_cache/*/*")}
    train(*flags, "--loss", "hinge", "--out", shared / "hinge")  # a third run with the same reference computes nothing
    assert {path: path.stat().st_mtime_ns for path in shared.glob("reference_cache/*/*")} == files


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
