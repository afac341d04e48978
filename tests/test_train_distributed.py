"""
train_dpo.py as processes: two against one, kill -9 and the same command, runs that share a cache.

Covers  two processes make the steps, the reference and the model of one: tied and untied, with small rows,
        with activation checkpointing, sft, a last step with fewer pairs than processes; in bfloat16 nearly. A
        run killed in the reference pass, before its first checkpoint and behind its third is resumed to the
        same bits, a checkpoint of two processes by one and of one by two. What an unfinished run accepts. Two
        runs that share a cache at once, a second process on one --out, what a kill leaves behind.
Run     python -m pytest tests/test_train_distributed.py     (one process: test_train.py)
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, make_policy, read_rows, run_script
from processes import Script, kill_when, start_one, start_two, two_processes
from safetensors.torch import load_file
from train_oracle import LR, files_of, make_pairs, without_noise

# of the runs that are killed: two epochs of 10 steps, two windows of the reference
RUN = SimpleNamespace(pairs=80, steps=20, every=4)
SCRIPT = "train_dpo.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(*flags):
    """A run of one process: the code of a script that tests import would have pytest in it."""
    return run_script(SCRIPT, *flags)


def same_run(ours, theirs):
    """The same steps up to rounding, which Adam lets grow slowly."""
    bounds = {name: 1e-4 for name in ("loss", "margin", "chosen_reward", "rejected_reward")}
    bounds |= {"chosen_logp": 2e-3, "rejected_logp": 2e-3}
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        where = f"step {b['step']}: "
        assert a.keys() == b.keys(), where
        for name in ("step", "pairs", "tokens", "lr"):
            assert a[name] == b[name], where + name
        for name, bound in bounds.items():
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), abs=bound), where + name
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), where


def same_weights(ours, theirs, start):
    """The same trained models, up to the few weights whose gradient is all rounding: Adam moves them too."""
    start, ours, theirs = (load_file(Path(folder, "model.safetensors")) for folder in (start, ours, theirs))
    assert start.keys() == ours.keys() == theirs.keys()
    for name in start:
        assert start[name].shape == ours[name].shape and not torch.equal(start[name], ours[name]), name
        off = (ours[name] - theirs[name]).abs()
        assert (off > 0.05 * LR).float().mean() < 2e-3, name


def cached(folder):
    """The reference's log-probabilities in a folder, {key: logp}, without a line that is being written."""
    values = {}
    for path in folder.glob("reference_cache/*.jsonl"):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                row = json.loads(line)
                assert row["key"] not in values, "a sequence was computed twice"
                values[row["key"]] = row["logp"]
    return values


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The sums of this process are in the order of those that it starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----- two processes
def by_torchrun(*flags):
    """A run by torchrun; returns what both processes printed."""
    command = [*TORCHRUN, str(REPO / SCRIPT), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CASES = {  # model, flags of both, flags of the two processes
    "untied, accumulated": ("untied", (), ("--micro-tokens", 120)),
    "tied, recomputed": ("tied", (), ("--activation-checkpointing",)),
    "sft": ("untied", ("--loss", "sft"), ("--micro-tokens", 90)),
}


@pytest.fixture(scope="module", params=CASES)
def both(request, policy, tmp_path_factory):
    """The same flags with one process and with two. Steps of 7, 7, 1 pairs: one ends on a dummy."""
    kind, shared, cut = CASES[request.param]
    folder = tmp_path_factory.mktemp("both")
    model = policy if kind == "tied" else make_policy(folder / "model", seed=3, tie=False)
    pairs = make_pairs(folder / "pairs.jsonl", n=15)
    flags = ("--model", model, "--pairs", pairs, "--batch-size", 7, "--epochs", 2, "--lr", LR, *shared)
    flags += ("--eval-pairs", pairs)
    train(*flags, "--out", folder / "a" / "out")
    flags += ("--out", folder / "b" / "out", *cut)
    # torchrun takes longer to start, so one case has it
    printed = by_torchrun(*flags) if kind == "tied" else two_processes(SCRIPT, *flags)
    return SimpleNamespace(model=model, one=folder / "a" / "out", two=folder / "b" / "out", printed=printed)


@pytest.mark.slow
def test_two_processes_make_the_same_steps_as_one(both):
    one, two = read_rows(both.one / "metrics.jsonl"), read_rows(both.two / "metrics.jsonl")
    same_run(two, one)
    assert [row["pairs"] for row in two] == [7, 7, 1] * 2
    # the reference, the first gradient and the first updates have no time to drift
    for a, b in zip(two[:3], one[:3]):
        assert abs(a["loss"] - b["loss"]) < 2e-5
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["chosen_logp"] == pytest.approx(b["chosen_logp"], rel=1e-6)
    assert two[-1]["eval"]["loss"] == pytest.approx(one[-1]["eval"]["loss"], abs=1e-4)
    assert two[-1]["eval"]["pairs"] == 15
    assert cached(both.two.parent) == pytest.approx(cached(both.one.parent), abs=1e-4)


@pytest.mark.slow
def test_two_processes_export_the_same_model_as_one(both):
    # V = 259 is odd, so the embedding's shards are padded; nothing of the padding may reach the file
    assert json.loads(both.printed.strip().splitlines()[-1])["steps"] == 6
    assert both.printed.count('"steps"') == 1  # printed by one process only
    same_weights(both.two, both.one, both.model)
    assert files_of(both.two).keys() == files_of(both.one).keys()


def test_two_processes_in_bfloat16_are_near_one(policy, tmp_path):
    pairs = make_pairs(tmp_path / "pairs.jsonl", n=15)
    flags = ("--model", policy, "--pairs", pairs, "--batch-size", 7, "--epochs", 2, "--lr", LR)
    flags += ("--dtype", "bfloat16")
    train(*flags, "--out", tmp_path / "a" / "out")
    two_processes(SCRIPT, *flags, "--out", tmp_path / "b" / "out", "--micro-tokens", 120)
    one, two = (read_rows(tmp_path / name / "out" / "metrics.jsonl") for name in "ab")
    assert len(one) == len(two) == 6
    # the sums of the first gradient round differently, then some weights round to their neighbours
    later = {"loss": 0.1, "chosen_logp": 0.01, "rejected_logp": 0.01, "grad_norm": 0.1}
    for a, b in zip(two, one):
        for name, bound in later.items():
            bound = bound if a["step"] else 1e-3
            assert a[name] == pytest.approx(b[name], rel=bound), (a["step"], name)


# ----- kill and resume
@pytest.fixture(scope="module")
def straight(policy, tmp_path_factory):
    """The run that nobody disturbs: what a resumed run must repeat to the bit."""
    folder = tmp_path_factory.mktemp("straight")
    pairs = make_pairs(folder / "pairs.jsonl", n=RUN.pairs, seed=1)
    flags = ["--model", policy, "--pairs", pairs, "--batch-size", 8, "--epochs", 2, "--lr", LR]
    # a forward per pair, so that there is time to kill it
    flags += ["--save-every", RUN.every, "--micro-tokens", 1]
    summary, _ = train(*flags, "--out", folder / "out")
    assert summary["steps"] == RUN.steps and summary["resumed_steps"] == 0
    rows = read_rows(folder / "out" / "metrics.jsonl")
    return SimpleNamespace(flags=flags, pairs=pairs, out=folder / "out", summary=summary, rows=rows)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(out):
    return sorted(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))


def same_as_straight(straight, out, resumed_steps, bitwise=True):
    summary, _ = train(*straight.flags, "--out", out)
    assert summary["resumed_steps"] == resumed_steps
    if not bitwise:
        return same_run(read_rows(out / "metrics.jsonl"), straight.rows)
    assert without_noise(read_rows(out / "metrics.jsonl")) == without_noise(straight.rows)
    assert (out / "model.safetensors").read_bytes() == (straight.out / "model.safetensors").read_bytes()
    assert cached(out.parent) == cached(straight.out.parent)
    assert files_of(out).keys() == files_of(straight.out).keys()


def killed(straight, folder, start, ready):
    """Start a run, kill it, put its folder aside; returns a function that sets it up again, for one test."""
    out = folder / "out"
    runs = start(SCRIPT, *straight.flags, "--out", out)
    kill_when(lambda: ready(lines(out / "metrics.jsonl")), runs)
    assert not (out / "model.safetensors").exists()
    kept = Path(shutil.move(out, out.with_name("kept")))

    def again():
        shutil.rmtree(out, ignore_errors=True)
        return Path(shutil.copytree(kept, out))

    return again


@pytest.fixture(scope="module")
def killed_late(straight, tmp_path_factory):
    """Killed behind its third checkpoint, with steps logged since then."""
    folder = tmp_path_factory.mktemp("late")
    return killed(straight, folder, start_one, lambda done: done >= 3 * RUN.every + 2)


@pytest.fixture(scope="module")
def killed_early(straight, tmp_path_factory):
    """Killed behind the reference and before the first checkpoint."""
    return killed(straight, tmp_path_factory.mktemp("early"), start_one, lambda done: done >= 2)


@pytest.fixture(scope="module")
def killed_two(straight, tmp_path_factory):
    """Two processes, killed behind their first checkpoint."""
    return killed(straight, tmp_path_factory.mktemp("two"), start_two, lambda done: done > RUN.every)


def test_the_last_checkpoint_alone_is_kept(killed_late):
    out = killed_late()
    assert checkpoints(out) == [3 * RUN.every]
    assert 3 * RUN.every + 2 <= lines(out / "metrics.jsonl") < 4 * RUN.every


def test_killed_behind_a_checkpoint_and_resumed_is_the_same_run(straight, killed_late):
    """And what was half-written in a kill is gone at the end."""
    out = killed_late()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    (out / "metrics.meta.json.tmp").write_text('{"argv": [')
    folder = out / "checkpoints"
    saving = shutil.copytree(folder / f"{3 * RUN.every:08d}", folder / "saving")
    (saving / ".metadata").unlink()
    older = shutil.copytree(saving, folder / f"{2 * RUN.every:08d}")
    next(older.glob("*.distcp")).unlink()
    same_as_straight(straight, out, 3 * RUN.every)


def test_killed_before_the_first_checkpoint_and_resumed_is_the_same_run(straight, killed_early):
    out = killed_early()
    assert 2 <= lines(out / "metrics.jsonl") < RUN.every and checkpoints(out) == []
    same_as_straight(straight, out, 0)


def test_killed_in_the_reference_pass_and_resumed_is_the_same_run(straight, tmp_path):
    out = tmp_path / "out"
    kill_when(lambda: cached(tmp_path), start_one(SCRIPT, *straight.flags, "--out", out))
    assert lines(out / "metrics.jsonl") == 0
    assert 0 < len(cached(tmp_path)) < len(cached(straight.out.parent))  # a window is there, and is read
    same_as_straight(straight, out, 0)


def test_a_checkpoint_of_two_processes_is_resumed_by_one(straight, killed_two, policy):
    out = killed_two()
    summary, _ = train(*straight.flags, "--out", out)
    assert summary["resumed_steps"] == RUN.every
    same_run(read_rows(out / "metrics.jsonl"), straight.rows)
    same_weights(out, straight.out, policy)


def test_a_checkpoint_of_one_process_is_resumed_by_two(straight, killed_late, policy):
    out = killed_late()
    printed = two_processes(SCRIPT, *straight.flags, "--out", out)
    assert json.loads(printed.strip().splitlines()[-1])["resumed_steps"] == 3 * RUN.every
    same_run(read_rows(out / "metrics.jsonl"), straight.rows)
    same_weights(out, straight.out, policy)


# ----- what an unfinished run accepts
def refused(flags):
    """What is said where the run ends with status 2."""
    return run_script(SCRIPT, *flags, expect=2)[1]


def test_an_unfinished_run_goes_on_only_as_it_was(straight, killed_late, tmp_path):
    out = killed_late()
    before = files_of(out)
    flags = [*straight.flags, "--out", out]
    assert "was written with lr = 0.001, not 0.005; use another --out" in refused([*flags, "--lr", 0.005])
    assert "was written with beta = 0.1, not 0.2" in refused([*flags, "--beta", 0.2])
    assert "was written with loss = 'dpo', not 'hinge'" in refused([*flags, "--loss", "hinge"])
    other = make_pairs(tmp_path / "other.jsonl", n=RUN.pairs, seed=2)
    said = refused([*flags, "--pairs", other])
    assert f"was written with pairs = {straight.pairs!r}, not {other!r}" in said
    assert files_of(out) == before


def test_overwrite_starts_an_unfinished_run_anew(straight, killed_late):
    out = killed_late()
    flags = [*straight.flags, "--epochs", 1, "--save-every", 100]
    summary, _ = train(*flags, "--out", out, "--overwrite")
    rows = read_rows(out / "metrics.jsonl")
    assert summary["resumed_steps"] == 0
    assert [row["step"] for row in rows] == list(range(RUN.steps // 2))
    assert files_of(out).keys() == files_of(straight.out).keys()


def test_a_finished_run_is_not_done_again(straight):
    before = files_of(straight.out)
    assert train(*straight.flags, "--out", straight.out)[0] == straight.summary
    assert files_of(straight.out) == before


# ----- runs at the same time
def finished(run):
    status, _, err = run.wait()
    assert status == 0, err[-2000:]


def test_two_runs_at_the_same_time_share_one_reference_cache(straight, tmp_path):
    losses = ("dpo", "hinge")
    runs = [Script(SCRIPT, *straight.flags, "--loss", loss, "--out", tmp_path / loss) for loss in losses]
    for run in runs:
        finished(run)
    dpo, hinge = (read_rows(tmp_path / loss / "metrics.jsonl") for loss in losses)
    same_run(dpo, straight.rows)
    assert hinge[0]["loss"] == pytest.approx(1, abs=1e-3)  # at the reference
    assert hinge[0]["chosen_logp"] == pytest.approx(dpo[0]["chosen_logp"], abs=1e-4)
    assert len(hinge) == RUN.steps
    (path,) = (tmp_path / "reference_cache").iterdir()
    found = {row["key"]: row["logp"] for row in read_rows(path)}  # both may have computed a sequence
    assert found == pytest.approx(cached(straight.out.parent), abs=1e-4)
    before = path.read_bytes()
    train(*straight.flags, "--epochs", 1, "--loss", "revkl", "--out", tmp_path / "revkl")
    assert path.read_bytes() == before  # a third run computes nothing


def test_a_second_process_on_the_same_out_is_refused(straight, tmp_path):
    out = tmp_path / "out"
    run = Script(SCRIPT, *straight.flags, "--out", out)
    while run.poll() is None and lines(out / "metrics.jsonl") < 2:
        time.sleep(0.01)
    for more in ([], ["--overwrite"]):
        assert "another process is writing this file" in refused([*straight.flags, "--out", out, *more])
    assert run.poll() is None, "it ended before the others could be refused"
    finished(run)
    assert without_noise(read_rows(out / "metrics.jsonl")) == without_noise(straight.rows)
    assert files_of(out).keys() == files_of(straight.out).keys()


def test_a_full_disk_ends_both_processes(straight, killed_two):
    """The one that cannot write its part of a checkpoint, and the one that waits for it; then they go on."""
    out = killed_two()
    flags = [*straight.flags, "--out", out]
    runs = start_two(SCRIPT, *flags)
    kept = checkpoints(out)
    while runs[0].poll() is None and checkpoints(out) == kept:
        time.sleep(0.01)
    resource.prlimit(runs[1].process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    for run in runs:
        status, _, said = run.wait()
        assert status == 2 and "saving cannot be written: " in said and "run the same command again" in said
    assert checkpoints(out) == [kept[0] + RUN.every] and not (out / "checkpoints" / "saving").exists()
    same_as_straight(straight, out, kept[0] + RUN.every, bitwise=False)


def test_a_first_process_that_ends_takes_the_other_along(straight, tmp_path):
    """metrics.jsonl cannot be written, by the first process only, while the other waits for its gradients."""
    out = tmp_path / "out"
    runs = start_two(SCRIPT, *straight.flags, "--out", out)
    while runs[0].poll() is None and lines(out / "metrics.jsonl") < 2:
        time.sleep(0.01)
    most = max((out / "metrics.jsonl").stat().st_size, runs[0].err.stat().st_size + 1500)
    resource.prlimit(runs[0].process.pid, resource.RLIMIT_FSIZE, (most, most))
    (status, _, said), (other, _, _) = [run.wait(60) for run in runs]
    assert status == 2 and "metrics.jsonl cannot be written: " in said and other != 0
