"""
train_dpo.py's runs in one process: steps, metrics, reference cache, pairs, flags, what is refused, export.

Covers  whole runs against a plain float64 loop, for the losses and presets. What must change nothing: the
        order of the file, --micro-tokens, activation checkpointing, eval pairs. The reference cache: paid
        once, extended, torn, wrong, of a model trained anew. Forms of pairs, dropped pairs, bad rows with
        file and line. Broken models, finished and unfinished runs, the exported folder.
Run     python -m pytest tests/test_train.py     (losses, packing, gradients: test_train_math.py; processes
        and kills: test_train_distributed.py)
"""

import contextlib
import fcntl
import gzip
import json
import math
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, REPO, make_policy, make_tokenizer, read_rows, write_rows
from safetensors.torch import load_file, save_file
from train_oracle import (
    GIVEN,
    LR,
    RAGGED,
    check_row,
    check_rows,
    close,
    files_of,
    float64,
    make_pairs,
    parse,
    plain_logps,
    plain_run,
    pull_back,
    read_pairs,
    refusal,
    refused_run,
    step_row,
    train,
    without_noise,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import common
import loading
import train_dpo
from chat import chat_of, measured
from loading import fingerprint
from train_dpo import epoch_order, load_pairs


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
    rows = read_rows(out / "metrics.jsonl")
    return SimpleNamespace(out=out, flags=flags, summary=summary, said=said, rows=rows)


# ----- flags
def test_presets_are_the_papers():
    expected = {
        "s1": (0.1, 5e-7, 1, 256, "linear", 0.999, 4096),
        "s2": (0.01, 5e-7, 1, 128, "cosine", 0.999, 4096),
        "s3": (0.1, 5e-7, 2, 32, "cosine", 0.99, 2048),
    }
    names = ("beta", "lr", "epochs", "batch_size", "schedule", "adam_beta2", "max_length")
    for preset, values in expected.items():
        args = vars(parse(*GIVEN, "--preset", preset))
        assert tuple(args[name] for name in names) == values
        assert args["reference"] == "m"
        sft = vars(parse(*GIVEN, "--preset", preset, "--loss", "sft"))
        assert tuple(sft[name] for name in names) == (1.0, *values[1:])  # sft has no beta
        assert sft["reference"] is None
    assert parse(*GIVEN) == parse(*GIVEN, "--preset", "s1") == parse(*GIVEN, "--loss", "dpo")


def test_a_flag_of_ones_own_goes_before_the_preset():
    args = parse(
        *GIVEN, "--preset", "s3", "--beta", 0.5, "--epochs", 1, "--max-length", 77, "--adam-beta2", 0.95
    )
    assert (args.beta, args.epochs, args.batch_size, args.max_length) == (0.5, 1, 32, 77)
    assert args.adam_beta2 == 0.95
    assert parse(*GIVEN, "--loss", "simpo", "--beta", 9).beta == 9


@pytest.mark.parametrize(
    "flags, beta, reference",
    [
        ([], 0.1, "m"),
        (["--preset", "s2"], 0.01, "m"),
        (["--preset", "s2", "--loss", "ipo"], 0.01, "m"),
        (["--preset", "s2", "--loss", "dpo_normalized"], 5.0, "m"),
        (["--loss", "revkl", "--reference", "r"], 0.1, "r"),
        (["--loss", "simpo"], 2.0, None),
        (["--loss", "slic"], 1.0, None),
        (["--loss", "sft"], 1.0, None),
    ],
)
def test_beta_and_reference_of_the_losses(flags, beta, reference):
    args = parse(*GIVEN, *flags)
    assert (args.beta, args.reference) == (beta, reference)


def test_a_loss_has_its_own_flags_and_no_others():
    common = vars(parse(*GIVEN, "--loss", "sft")).keys()
    flags = {
        "dpo": {},
        "revkl": {"margin_scale": 1.0},
        "slic": {"slic_delta": 1.0, "slic_lambda": 0.1},
        "simpo": {"simpo_gamma": 1.0},
        "dpo_smoothed": {"label_smoothing": 0.1},
        "dpo_nll": {"nll_weight": 1.0},
    }
    for loss, expected in flags.items():
        args = vars(parse(*GIVEN, "--loss", loss))
        assert {name: args[name] for name in args.keys() - common} == expected, loss
    args = parse(*GIVEN)
    assert (args.seed, args.save_every, args.template_kwargs, args.activation_checkpointing) == (
        0,
        100,
        {},
        False,
    )
    assert parse(*GIVEN, "--template-kwargs", '{"thinking": true}').template_kwargs == {"thinking": True}


def test_a_new_loss_is_one_function(monkeypatch, capsys):
    monkeypatch.setattr(train_dpo, "LOSSES", dict(train_dpo.LOSSES))
    monkeypatch.setattr(
        train_dpo, "LOSS_FLAGS", {name: [*users] for name, users in train_dpo.LOSS_FLAGS.items()}
    )

    @train_dpo.loss(reference=False)
    def ratio(batch, *, beta=3.0, ratio_power: int = 2):
        return beta * (batch.rejected - batch.chosen) ** ratio_power

    args = parse(*GIVEN, "--loss", "ratio")
    assert (args.beta, args.ratio_power, args.reference) == (3.0, 2, None)
    assert parse(*GIVEN, "--loss", "ratio", "--ratio-power", 4).ratio_power == 4
    batch = train_dpo.Batch(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 7.0]), None, None, None)
    assert train_dpo.pair_losses(args, batch).tolist() == [12.0, 75.0]
    assert "invalid int value: 'x'" in refusal(capsys, parse, *GIVEN, "--loss", "ratio", "--ratio-power", "x")
    assert "--ratio-power has no effect with --loss dpo" in refusal(capsys, parse, *GIVEN, "--ratio-power", 4)
    help_text = train_dpo.make_parser("").format_help()
    assert "ratio 2" in help_text and "hinge the preset's" in " ".join(help_text.split())


@pytest.mark.parametrize(
    "loss, flag, value",
    [
        ("dpo", "--margin-scale", 2),
        ("dpo", "--simpo-gamma", 0),
        ("dpo", "--slic-delta", 1),  # its default, but given
        ("hinge", "--label-smoothing", 0.1),
        ("dpo_smoothed", "--nll-weight", 0.1),
        ("slic", "--margin-scale", 2),
        ("slic", "--beta", 0.1),
        ("slic", "--reference", "r"),
        ("simpo", "--reference", "r"),
        ("simpo", "--slic-lambda", 1),
        ("sft", "--beta", 0.1),
        ("sft", "--reference", "r"),
    ],
)
def test_a_flag_of_another_loss_is_refused(loss, flag, value, capsys):
    said = refusal(capsys, parse, *GIVEN, "--loss", loss, flag, value)
    assert f"{flag} has no effect with --loss {loss}" in said


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--beta", "0"], "must be above 0 and below inf, found 0"),
        (["--beta", "nan"], "found nan"),
        (["--lr", "-1"], "found -1"),
        (["--lr", "inf"], "found inf"),
        (["--batch-size", "0"], "found 0"),
        (["--epochs", "1.5"], "invalid int value: '1.5'"),
        (["--micro-tokens", "0"], "found 0"),
        (["--max-length", "0"], "found 0"),
        (["--save-every", "0"], "found 0"),
        (["--adam-beta2", "1"], "must be above 0 and below 1, found 1"),
        (["--label-smoothing", "0.5", "--loss", "dpo_smoothed"], "must be at least 0 and below 0.5"),
        (["--margin-scale", "0", "--loss", "revkl"], "above 0"),
        (["--slic-lambda", "-1", "--loss", "slic"], "at least 0"),
        (["--simpo-gamma", "-1", "--loss", "simpo"], "at least 0"),
        (["--template-kwargs", "[1]"], "expected a JSON object, found [1]"),
        (["--template-kwargs", "{"], "invalid"),
        (["--resume"], "unrecognized arguments"),
        (["--loss", "hypo"], "invalid choice"),
        (["--length-normalize"], "unrecognized arguments"),
        (["--bet", "0.1"], "unrecognized arguments"),
    ],
)
def test_senseless_flags_are_refused(flags, word, capsys):
    said = refusal(capsys, parse, *GIVEN, *flags)
    assert flags[0] in said and word in said


def test_a_revision_of_a_folder_is_refused(tmp_path, capsys):
    said = refusal(capsys, parse, "--model", tmp_path, "--pairs", "p", "--out", "o", "--revision", "main")
    assert "--revision is for a model on the hub, but --model is a folder" in said


# ----- whole runs
LINEAR = [1.0, 1.0, 0.8, 0.6, 0.4, 0.2]  # one step of warm-up, then five on a line from 1 down to 0
COSINE = [1.0, 1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915]  # and half a cosine


def test_a_whole_run_is_that_of_a_plain_loop(whole_run, policy):
    args = parse(*whole_run.flags, "--out", "o")
    expected, model = plain_run(args, LINEAR)
    check_rows(args, whole_run.rows, expected)
    assert min(row["loss"] for row in expected) < 0.5  # something is learnt, so a wrong sign would show
    assert whole_run.rows[0]["by_source"].keys() == {"off", "on"}
    assert whole_run.rows[-1]["by_source"] is None
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
        ours, plain, before = (plain_logps(each, RAGGED[2]) for each in (exported, model, float64(policy)))
    assert (ours - plain).abs().max() < 0.02 < 0.2 < (before - plain).abs().max()


@pytest.mark.parametrize(
    "flags, factors, scale",
    [
        (["--preset", "s3", "--beta", 0.3], COSINE, 1),  # another Adam beta2 too
        (["--loss", "ipo", "--seed", 3, "--beta", 2], LINEAR, 3),
        (["--loss", "dpo_normalized"], LINEAR, 1),
        (["--loss", "dpo_nll", "--nll-weight", 0.5], LINEAR, 1),
        (["--loss", "dpo_smoothed"], LINEAR, 1),
        (["--loss", "hinge"], LINEAR, 1),
        (["--loss", "sft", "--preset", "s3"], COSINE, 1),
        (["--loss", "slic_mean"], LINEAR, 1),
        (["--loss", "simpo"], LINEAR, 1),
    ],
)
def test_other_settings_reach_the_run(flags, factors, scale, whole_run, tmp_path):
    flags = [*whole_run.flags, "--out", tmp_path / "out", *flags]
    summary, _ = train(*flags)
    args = parse(*flags)
    expected, _ = plain_run(args, factors)
    check_rows(args, read_rows(tmp_path / "out/metrics.jsonl"), expected, scale)
    assert (tmp_path / "reference_cache").exists() == (args.reference is not None)
    assert summary["last_loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4, abs=1e-3)


def test_a_run_of_revkl_reads_the_rewards_and_another_reference(whole_run, other, tmp_path):
    flags = [*whole_run.flags, "--loss", "revkl", "--reference", other, "--out", tmp_path / "out"]
    flags += ["--epochs", 1]
    train(*flags)
    rows = read_rows(tmp_path / "out/metrics.jsonl")
    args = parse(*flags)
    expected, _ = plain_run(args, [1.0, 1.0, 0.5])
    check_rows(args, rows, expected, 2)
    # the policy is --model
    assert rows[0]["chosen_logp"] == pytest.approx(whole_run.rows[0]["chosen_logp"], abs=1e-3)
    assert abs(rows[0]["margin"]) > 0.05


def test_the_first_step_is_exactly_the_reference(whole_run):
    first = whole_run.rows[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("margin", "chosen_reward", "rejected_reward"):
        assert abs(first[name]) < 1e-4, name


def test_the_summary_and_the_record_say_what_was_done(whole_run, policy, pairs_file):
    summary, rows = whole_run.summary, whole_run.rows
    meta = json.loads((whole_run.out / "metrics.meta.json").read_text())
    assert summary == {"out": str(whole_run.out), **meta["counts"]}
    assert (summary["pairs"], summary["steps"], summary["dropped"]) == (9, 6, {})
    assert (summary["eval_pairs"], summary["eval_loss"], summary["resumed_steps"]) == (0, None, 0)
    assert (summary["first_loss"], summary["last_loss"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert summary["tokens_trained"] == sum(row["tokens"] for row in rows)
    assert 0 < summary["tokens_per_s"] and summary["seconds"] > 0
    assert 0.05 < rows[-1]["peak_gb"] < 20
    assert meta["args"]["lr"] == LR and meta["args"]["loss"] == "dpo" and meta["args"]["adam_beta2"] == 0.999
    assert meta["inputs"].keys() == {pairs_file, "token ids of the pairs"}
    weights = Path(policy, "model.safetensors").stat()
    assert meta["models"][policy]["model.safetensors"] == [weights.st_size, weights.st_mtime_ns]
    assert "torch" in meta["versions"]
    assert not (whole_run.out / "checkpoints").exists() and not list(whole_run.out.glob("*.tmp"))


def test_the_order_of_the_file_changes_nothing(whole_run, pairs_file, tmp_path):
    turned = write_rows(tmp_path / "pairs.jsonl", read_rows(pairs_file)[::-1])
    train(*whole_run.flags, "--pairs", turned, "--out", tmp_path / "out")
    assert without_noise(read_rows(tmp_path / "out/metrics.jsonl")) == without_noise(whole_run.rows)


@pytest.mark.parametrize(
    "flags", [("--micro-tokens", 1), ("--micro-tokens", 150), ("--activation-checkpointing",)]
)
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


def second_batch(whole_run):
    pairs = read_pairs(parse(*whole_run.flags, "--out", "o"))
    return {pair.pair_id for pair in epoch_order(pairs, 0, 0)[4:8]}


def not_finite(said):
    """(what is said, the pairs that are named) of the sentence."""
    pattern = r"(step \d+: the \w+ is not finite)(?: for |; its pairs: )(.*)"
    sentence, names = re.search(pattern, said).groups()
    return sentence, set(names.split(", "))


def test_a_gradient_that_is_not_finite_ends_the_run_and_names_its_pairs(whole_run, tmp_path, capsys):
    out = tmp_path / "out"
    said = refused_run(capsys, *whole_run.flags, "--out", out, "--lr", 1e30)
    assert not_finite(said) == ("step 1: the gradient is not finite", second_batch(whole_run))
    assert len(read_rows(out / "metrics.jsonl")) == 1 and not (out / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_pairs(whole_run, tmp_path, capsys, monkeypatch):
    calls, pair_losses = [], train_dpo.pair_losses

    def not_a_number_in_the_second_step(args, batch):
        calls.append(batch)
        return pair_losses(args, batch) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(train_dpo, "pair_losses", not_a_number_in_the_second_step)
    out = tmp_path / "out"
    said = refused_run(capsys, *whole_run.flags, "--out", out)
    assert not_finite(said) == ("step 1: the loss is not finite", second_batch(whole_run))
    assert len(read_rows(out / "metrics.jsonl")) == 1 and not (out / "model.safetensors").exists()


# ----- eval pairs
def test_eval_pairs_are_measured_and_change_nothing(whole_run, policy, tmp_path):
    held_out = make_pairs(tmp_path / "held_out.jsonl", n=5, seed=1)
    flags = [*whole_run.flags, "--out", tmp_path / "out", "--eval-pairs", held_out, "--save-every", 4]
    summary, _ = train(*flags)
    rows = read_rows(tmp_path / "out/metrics.jsonl")
    assert [step for step, row in enumerate(rows) if "eval" in row] == [3, 5]
    trained_rows = [{key: value for key, value in row.items() if key != "eval"} for row in rows]
    assert without_noise(trained_rows) == without_noise(whole_run.rows)
    args, before, after = parse(*flags), float64(policy), float64(tmp_path / "out")
    with torch.no_grad():
        pairs = []
        for pair in read_pairs(args, held_out):
            pairs.append(pair._replace(reference_logps=plain_logps(before, pair).tolist()))
        expected = step_row(args, pull_back(args, after, pairs))
    check_row(rows[5]["eval"], expected)
    assert summary["eval_loss"] == rows[5]["eval"]["loss"] != rows[3]["eval"]["loss"]
    assert summary["eval_pairs"] == 5


@pytest.mark.parametrize("loss", ["sft", "ipo", "simpo"])
def test_eval_of_other_losses(loss, whole_run, pairs_file, tmp_path):
    flags = [*whole_run.flags, "--out", tmp_path / "out", "--eval-pairs", pairs_file, "--loss", loss]
    train(*flags, "--epochs", 1)
    row = read_rows(tmp_path / "out/metrics.jsonl")[-1]["eval"]
    model = float64(tmp_path / "out")
    with torch.no_grad():
        sums = [plain_logps(model, pair).tolist() for pair in read_pairs(parse(*flags))]
    assert row["pairs"] == 9
    assert row["chosen_logp"] == pytest.approx(statistics.fmean(of[0] for of in sums), rel=1e-4)
    if loss == "sft":
        assert "rejected_logp" not in row and "margin" not in row
    else:
        assert row["rejected_logp"] == pytest.approx(statistics.fmean(of[1] for of in sums), rel=1e-4)


def test_eval_pairs_of_revkl_need_rewards_too(whole_run, pairs_file, tmp_path, capsys):
    rows = [{**row, "chosen_reward": None} for row in read_rows(pairs_file)]
    bare = write_rows(tmp_path / "bare.jsonl", rows)
    flags = ("--loss", "revkl", "--eval-pairs", bare, "--out", tmp_path / "out")
    said = refused_run(capsys, *whole_run.flags, *flags)
    assert "bare.jsonl:1: --loss revkl needs chosen_reward and rejected_reward" in said


# ----- the reference cache
def caches(folder):
    """Contents of every file of the cache beside a run's folder."""
    return {path.name: path.read_bytes() for path in folder.glob("reference_cache/*")}


def test_runs_with_one_reference_pay_once(whole_run, policy, other, pairs_file, tmp_path):
    train(*whole_run.flags, "--out", tmp_path / "one")
    files = caches(tmp_path)
    (content,) = files.values()
    logps = [json.loads(line)["logp"] for line in content.splitlines()]
    model = float64(policy)
    with torch.no_grad():
        pairs = read_pairs(parse(*whole_run.flags, "--out", "o"))
        exact = [logp for pair in pairs for logp in plain_logps(model, pair).tolist()]
    assert sorted(logps) == pytest.approx(sorted(exact), abs=1e-3) and len(logps) == 18
    few = write_rows(tmp_path / "few.jsonl", read_rows(pairs_file)[2:7])
    cheap = {
        "beta": ["--beta", 0.5],
        "ipo": ["--loss", "ipo"],
        "few": ["--pairs", few],
        "eval": ["--eval-pairs", few],
        "slic": ["--loss", "slic"],
        "same": [],
    }
    for name, flags in cheap.items():
        train(*whole_run.flags, "--out", tmp_path / name, "--epochs", 1, *flags)
        assert caches(tmp_path) == files, name
    again = read_rows(tmp_path / "same/metrics.jsonl")
    assert again[0]["loss"] == whole_run.rows[0]["loss"]
    for flags in (["--reference", other], ["--dtype", "bfloat16"], ["--model", other]):
        train(*whole_run.flags, "--out", tmp_path / "new", "--overwrite", "--epochs", 1, *flags)
    more = caches(tmp_path)
    # --model other found the values of --reference other
    assert files.items() <= more.items() and len(more) == 3


def test_a_cache_adds_what_it_lacks_and_changes_no_loss(whole_run, pairs_file, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", read_rows(pairs_file)[2:7])
    train(*whole_run.flags, "--pairs", few, "--out", tmp_path / "few")
    (before,) = caches(tmp_path).values()
    train(*whole_run.flags, "--out", tmp_path / "all")
    (after,) = caches(tmp_path).values()
    assert after.startswith(before)
    assert (before.count(b"\n"), after.count(b"\n")) == (10, 18)
    close(read_rows(tmp_path / "all/metrics.jsonl"), whole_run.rows)


def test_a_torn_last_line_of_the_cache_is_computed_again(whole_run, tmp_path):
    train(*whole_run.flags, "--out", tmp_path / "one")
    (path,) = (tmp_path / "reference_cache").iterdir()
    rows, content = read_rows(path), path.read_bytes()
    path.write_bytes(content[:-9])
    train(*whole_run.flags, "--out", tmp_path / "two")
    again = read_rows(path)
    assert again[:-1] == rows[:-1] and again[-1]["key"] == rows[-1]["key"]
    assert again[-1]["logp"] == pytest.approx(rows[-1]["logp"], abs=1e-3)
    close(read_rows(tmp_path / "two/metrics.jsonl"), whole_run.rows)


def test_a_damaged_cache_is_named(whole_run, tmp_path, capsys):
    train(*whole_run.flags, "--out", tmp_path / "one")
    (path,) = (tmp_path / "reference_cache").iterdir()
    path.write_text(path.read_text() + '{"key": "a"}\n')
    said = refused_run(capsys, *whole_run.flags, "--out", tmp_path / "two")
    assert f"{path}:19: " in said and not (tmp_path / "two").exists()


@pytest.mark.parametrize("role", ["--model", "--reference"])
def test_a_model_trained_anew_into_the_same_folder_is_another_reference(role, policy, pairs_file, tmp_path):
    model = shutil.copytree(policy, tmp_path / "model")
    flags = {"--model": policy, "--pairs": pairs_file, "--batch-size": 4, role: model}
    flags = [each for item in flags.items() for each in item]
    train(*flags, "--out", tmp_path / "one")
    make_policy(model, seed=9)
    train(*flags, "--out", tmp_path / "two")
    assert len(caches(tmp_path)) == 2
    first = read_rows(tmp_path / "two/metrics.jsonl")[0]
    if role == "--model":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    pairs = epoch_order(read_pairs(parse(*flags, "--out", "o")), 0, 0)[:4]
    new = float64(model)
    with torch.no_grad():
        sums = [plain_logps(new, pair)[0].item() for pair in pairs]
    reference_logp = first["chosen_logp"] - first["chosen_reward"] / 0.1
    assert reference_logp == pytest.approx(statistics.fmean(sums), abs=2e-3)


# ----- pairs
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def loaded(tmp_path, tokenizer, rows, *flags, positions=2048):
    """(pairs, dropped) of rows."""
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=positions)
    args = parse(*GIVEN, *flags)
    chat = measured(chat_of(tokenizer, config, args.template_kwargs, None))
    return load_pairs(write_rows(tmp_path / "pairs.jsonl", rows), chat, config, args)


def response_of(sequence):
    return list(sequence.ids[sequence.start :])


BUILT = {
    "pair_id": "p",
    "prompt": messages("Hi"),
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
    "chosen_finish": "stop",
    "rejected_finish": None,
    "chosen_token_ids": None,
    "rejected_token_ids": None,
}
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{% if message['role'] != 'system' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% endif %}{% endfor %}"
)
HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_ids_are_prompt_response_and_one_end_of_turn(tmp_path, tokenizer):
    row = {
        **BUILT,
        "chosen_reward": 1.5,
        "rejected_reward": -1.0,
        "rejected_finish": "length",
        "source": "on",
    }
    (pair,), dropped = loaded(tmp_path, tokenizer, [row])
    prompt = tokenizer(HI, add_special_tokens=False)["input_ids"]
    eot = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # not the newline that the template puts behind it; the rejected one was cut
    responses = [tokenizer("yes")["input_ids"] + [eot], tokenizer("no")["input_ids"]]
    for (ids, start), response in zip(pair.sequences, responses):
        assert list(ids) == prompt + response and start == len(prompt)
    assert len(pair.sequences) == 2 and not dropped
    assert pair.tokens() == 2 * len(prompt) + 4 + 2
    assert (pair.pair_id, pair.source, pair.reward_margin) == ("p", "on", 2.5)
    assert pair.reference_logps == (0.0, 0.0)


def test_all_forms_of_a_pair_give_the_same_ids(tmp_path, tokenizer):
    talk = messages("Hi", "Hello", "And?")
    both = {"chosen": [*talk, BUILT["chosen"][0]], "rejected": [*talk, BUILT["rejected"][0]]}
    forms = [
        {**BUILT, "prompt": talk},
        {"pair_id": "p", "prompt": talk, "chosen": "yes", "rejected": "no"},
        {"pair_id": "p", "prompt": "ignored, as UltraFeedback's", **both},
        {"pair_id": "p", **both},
    ]
    first, *others = [loaded(tmp_path, tokenizer, [row])[0] for row in forms]
    assert others == [first] * 3
    assert tokenizer.decode(first[0].sequences[0].ids).count("<|im_start|>") == 4
    one, two = [
        loaded(tmp_path, tokenizer, [{**BUILT, "prompt": prompt}]) for prompt in ("Hi", messages("Hi"))
    ]
    assert one == two


def test_sft_takes_the_chosen_side_alone_and_drops_the_same_pairs(tmp_path, tokenizer):
    built = {**BUILT, "chosen_reward": 1.0, "rejected_reward": 1.0}
    long = {**built, "pair_id": "long", "rejected": "x" * 50}
    found = {}
    for loss in ("dpo", "hinge", "revkl", "slic", "simpo", "sft"):
        found[loss] = loaded(tmp_path, tokenizer, [built, long], "--loss", loss, "--max-length", 60)
        assert found[loss][1] == {"too long": 1}, loss
    (both,), _ = found["dpo"]
    (one,), _ = found["sft"]
    assert one.sequences == both.sequences[:1] and one.reference_logps == (0.0,)
    assert all(pairs == [both] for loss, (pairs, _) in found.items() if loss != "sft")


def test_a_row_without_pair_id_is_named_by_its_contents(tmp_path, tokenizer):
    rows = [{"prompt": "Hi", "chosen": "yes", "rejected": text} for text in ("no", "never")]
    one, two = (
        {pair.pair_id: pair.sequences for pair in loaded(tmp_path, tokenizer, some)[0]}
        for some in (rows, rows[::-1])
    )
    assert len(one) == 2 and one == two


def test_two_pairs_of_a_prompt_in_ultrafeedbacks_form_are_two_pairs(tmp_path, tokenizer):
    rows = []
    for answer in ("Yes", "Sure"):
        talk = messages("Hi", answer)
        rows.append({"prompt": "Hi", "chosen": talk, "rejected": messages("Hi", "No"), "messages": talk})
    assert len({pair.pair_id for pair in loaded(tmp_path, tokenizer, rows)[0]}) == 2


def test_sampled_ids_are_kept_unless_another_tokenizer_made_them(tmp_path, tokenizer, capsys):
    odd = tokenizer("y")["input_ids"] + tokenizer("es")["input_ids"][::-1]  # no text is tokenised to these
    row = {**BUILT, "chosen_token_ids": odd, "chosen_tokenizer": fingerprint(tokenizer)}
    eot = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (pair,), _ = loaded(tmp_path, tokenizer, [row])
    assert response_of(pair.sequences[0]) == [*odd, eot] and capsys.readouterr().err == ""
    (pair,), _ = loaded(tmp_path, tokenizer, [{**row, "chosen_tokenizer": "another"}])
    assert response_of(pair.sequences[0]) == tokenizer("yes")["input_ids"] + [eot]
    said = capsys.readouterr().err
    assert "pairs.jsonl: 1 responses of another tokenizer\n" in said


def test_switches_reach_the_chat_template(tmp_path):
    template = (
        "{{ 'LOUD' if loud else 'QUIET' }}"
        "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    make_tokenizer(tmp_path / "model", template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for flags, word in (([], "QUIET"), (["--template-kwargs", '{"loud": true}'], "LOUD")):
        (pair,), _ = loaded(tmp_path, tokenizer, [BUILT], *flags)
        text = tokenizer.decode(pair.sequences[0].ids)
        assert text == f"{word}<|im_start|>Hi<|im_end|><|im_start|>yes<|im_end|>"


def test_too_long_and_identical_pairs_are_dropped_and_counted(tmp_path, tokenizer):
    (pair,), _ = loaded(tmp_path, tokenizer, [BUILT])
    length = len(pair.sequences[0].ids)  # the chosen side is the longer one
    long = {**BUILT, "pair_id": "long", "rejected": "x" * 50}
    same = {**BUILT, "pair_id": "same", "rejected": "yes"}
    cut = {**same, "pair_id": "cut", "rejected_finish": "length"}  # the end of the turn is a difference
    kept, dropped = loaded(tmp_path, tokenizer, [BUILT, long, same, cut], "--max-length", length)
    assert [pair.pair_id for pair in kept] == ["p", "cut"]
    assert dropped == {"too long": 1, "identical": 1}
    assert loaded(tmp_path, tokenizer, [BUILT, cut], "--max-length", length)[1] == {}
    assert loaded(tmp_path, tokenizer, [BUILT, long], "--max-length", length + 46)[1] == {"too long": 1}
    assert loaded(tmp_path, tokenizer, [BUILT, long], "--max-length", length + 47)[1] == {}
    rows = []
    for row, source in zip([BUILT, long, same, cut, long, long], ["on", "off", "cross", "on", "on", "off"]):
        rows.append({**row, "pair_id": len(rows), "source": source})
    kept, dropped = loaded(tmp_path, tokenizer, rows, "--max-length", length)
    assert [(pair.pair_id, pair.source) for pair in kept] == [("0", "on"), ("3", "on")]
    assert dropped == {"too long (off)": 2, "too long (on)": 1, "identical (cross)": 1}


def test_repeated_and_empty_pairs_of_others_are_dropped_and_counted(tmp_path, tokenizer, capsys):
    other = {name: BUILT[name] for name in ("prompt", "chosen", "rejected")}
    empty = {**other, "rejected": [{"role": "assistant", "content": " \n"}]}
    turned = {**other, "chosen": BUILT["rejected"], "rejected": BUILT["chosen"]}
    rows = [other, empty, other, turned, {**other, "chosen": ""}, {**other, "source": "off"}]
    kept, dropped = loaded(tmp_path, tokenizer, rows)
    assert len({pair.pair_id for pair in kept}) == len(kept) == 2
    assert dropped == {"empty": 2, "duplicate": 1, "duplicate (off)": 1}
    assert capsys.readouterr().err.count("\n") == 1  # the counts, and no sentence for a row


def test_conversations_as_texts(tmp_path, tokenizer):
    """hh-rlhf has a conversation as one text; messages of the same turns give the same ids."""
    text = "\n\nHuman: Hi\n\nAssistant: yes\n\nthen\n\nHuman: And?\n\nAssistant:"
    turns = [*messages("Hi", "yes\n\nthen"), {"role": "user", "content": "And?"}]
    as_text = [
        {"chosen": f"{text} good", "rejected": f"{text} bad"},
        {"prompt": text, "chosen": "good", "rejected": "bad"},
        {"prompt": turns, "chosen": [*turns, {"role": "assistant", "content": "good"}], "rejected": "bad"},
        {"prompt": f"{text} \n", "chosen": f"{text} good", "rejected": "bad"},
    ]
    for row in as_text:
        (pair,), _ = loaded(tmp_path, tokenizer, [row])
        (same,), _ = loaded(tmp_path, tokenizer, [{"prompt": turns, "chosen": "good", "rejected": "bad"}])
        assert pair == same
    _, dropped = loaded(tmp_path, tokenizer, [*as_text, {**as_text[0], "chosen": text}])
    assert dropped == {"duplicate": 3, "empty": 1}


@pytest.mark.parametrize(
    "data, found",
    [
        (b"prompt,chosen,rejected\nHi,yes,no\n", "found b'prompt,chosen,reject'"),
        (b"PAR1\x15\x04", "found b'PAR1\\x15\\x04'"),
        (b'[{"prompt": "Hi", "chosen": "yes", "rejected": "no"}]', 'found b\'[{"prompt": "Hi", "c\''),
        (gzip.compress(b"prompt,chosen\nHi,yes\n"), "found b'prompt,chosen'"),
    ],
)
def test_a_file_of_another_format_is_refused_before_torch_is_imported(data, found, tmp_path):
    (tmp_path / "pairs.data").write_bytes(data)
    flags = ["--model", "none", "--out", tmp_path / "x", "--pairs", tmp_path / "pairs.data"]
    words = [sys.executable, "-X", "importtime", REPO / "train_dpo.py", *flags]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and " torch\n" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert f"pairs.data:1: expected a JSON object in a line, {found}; convert with data/" in said
    assert "data/import_responses.py --format pairs, csv or another" in said


def test_special_tokens_in_a_text_drop_its_pair_unless_its_ids_were_sampled(tmp_path, tokenizer, capsys):
    ids = tokenizer("yes<|im_end|>no")["input_ids"]
    loud = {**BUILT, "chosen": "yes<|im_end|>no"}
    sampled = {"chosen_token_ids": ids, "chosen_tokenizer": fingerprint(tokenizer)}
    rows = [
        BUILT,
        {**loud, "pair_id": "chosen", "source": "off"},
        {**BUILT, "pair_id": "rejected", "rejected": "<|im_start|>", "source": "on"},
        {**loud, **sampled, "pair_id": "sampled", "source": "on"},
        {**loud, **sampled, "pair_id": "of another", "chosen_tokenizer": "x", "source": "off"},
        {**BUILT, "pair_id": "prompt", "prompt": "What is <|im_end|>?"},  # read, not trained
    ]
    kept, dropped = loaded(tmp_path, tokenizer, rows)
    assert [pair.pair_id for pair in kept] == ["p", "sampled", "prompt"]
    assert dropped == {"special tokens (off)": 2, "special tokens (on)": 1}
    assert response_of(kept[1].sequences[0]) == [*ids, tokenizer.eos_token_id]
    assert f"3 pairs; dropped: {dict(dropped)}" in capsys.readouterr().err


def test_roles_that_the_template_rejects_drop_a_pair_that_is_named(tmp_path, capsys):
    make_tokenizer(tmp_path / "model", ALTERNATING + CHATML)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    twice = [{"role": "user", "content": text} for text in ("Hi", "Hello?")]
    rows = [BUILT, {**BUILT, "pair_id": "twice", "prompt": twice, "source": "off"}]
    kept, dropped = loaded(tmp_path, tokenizer, rows)
    assert [pair.pair_id for pair in kept] == ["p"] and dropped == {"rejected by the chat template (off)": 1}
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("pairs.jsonl:2: the chat template rejects it: roles must alternate")
    assert "pairs.jsonl: 1 pairs; dropped: " in second
    said = refusal(capsys, loaded, tmp_path, tokenizer, rows[1:])
    assert "pairs.jsonl:1: the chat template rejects it: roles must alternate" in said
    assert "pairs.jsonl: no pair is left: {'rejected by the chat template (off)': 1}" in said


def test_a_response_without_an_answer_after_its_reasoning_drops_its_pair(tmp_path, tokenizer):
    endings = {"ended": "<think>why", "empty": "<think>why</think> \n", "opened before": "why\n</think>\n"}
    rows = [{**BUILT, "pair_id": name, "rejected": text} for name, text in endings.items()]
    rows += [{**BUILT, "pair_id": "fine", "chosen": "<think>why</think>yes"}]
    (pair,), dropped = loaded(tmp_path, tokenizer, rows)
    assert dropped == {"empty after its reasoning": 3} and pair.pair_id == "fine"
    # training is of the whole
    assert tokenizer.decode(response_of(pair.sequences[0])) == "<think>why</think>yes<|im_end|>"


def test_ids_of_a_prompt_are_kept_unless_another_template_made_them(tmp_path, tokenizer, capsys):
    def prompts_of(*rows):
        pairs, _ = loaded(tmp_path, tokenizer, [row | {"pair_id": i} for i, row in enumerate(rows)])
        return [list(pair.sequences[0].ids[: pair.sequences[0].start]) for pair in pairs]

    config = LlamaConfig(vocab_size=len(tokenizer))
    odd, rendered = [5, 6, 7], tokenizer(HI, add_special_tokens=False)["input_ids"]
    mine = {"prompt_token_ids": odd, "prompt_tokenizer": chat_of(tokenizer, config, {}, None).template}
    assert prompts_of(BUILT, BUILT | mine) == [rendered, odd] and capsys.readouterr().err == ""
    other, beyond = {"prompt_tokenizer": "another"}, {"prompt_token_ids": [5, len(tokenizer)]}
    assert prompts_of(BUILT | mine | other, BUILT | mine | beyond) == [rendered] * 2
    assert capsys.readouterr().err.endswith("pairs.jsonl: 2 prompts rendered anew\n")


def test_no_pair_is_longer_than_the_positions_of_the_model(tmp_path, tokenizer):
    (pair,), _ = loaded(tmp_path, tokenizer, [BUILT])
    length = len(pair.sequences[0].ids)
    rows = [BUILT, {**BUILT, "pair_id": "long", "chosen": "yes!"}]
    for flags in ([], ["--max-length", length + 1]):
        kept, dropped = loaded(tmp_path, tokenizer, rows, *flags, positions=length)
        assert [pair.pair_id for pair in kept] == ["p"] and dropped == {"too long": 1}
    assert loaded(tmp_path, tokenizer, rows, positions=length + 1)[1] == {}


def test_dropped_pairs_stand_in_the_summary(whole_run, pairs_file, tmp_path):
    rows = read_rows(pairs_file)
    long = {**rows[1], "pair_id": "long", "chosen": "x" * 300}
    same = {**rows[0], "pair_id": "same", "rejected": rows[0]["chosen"], "rejected_finish": "length"}
    pairs = write_rows(tmp_path / "pairs.jsonl", [*rows, long, same])
    flags = ("--pairs", pairs, "--eval-pairs", pairs, "--out", tmp_path / "out", "--max-length", 200)
    summary, _ = train(*whole_run.flags, *flags)
    dropped = {"too long (off)": 1, "identical (on)": 1}
    assert summary["dropped"] == summary["eval_dropped"] == dropped
    assert summary["pairs"] == summary["eval_pairs"] == 9
    found = read_rows(tmp_path / "out/metrics.jsonl")
    found[-1].pop("eval")
    assert without_noise(found) == without_noise(whole_run.rows)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"pair_id": "p"}, "duplicate pair_id p in this file"),
        ({"chosen": messages("Hi", "yes"), "rejected": messages("Ho", "no")}, "answer different prompts"),
        ({"chosen": messages("Hi")}, "messages that end with the assistant's"),
        ({"rejected": []}, "expected rejected to be text, or messages"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"}, "messages that end with the assistant's"),
        (
            {"prompt": messages("Q"), "chosen": messages("Hi", "yes"), "rejected": messages("Hi", "no")},
            "expected chosen and rejected to answer the prompt, or to begin with its messages",
        ),
        ({"prompt": None}, "a prompt that ends with a user turn"),
        ({"prompt": []}, "a prompt that ends with a user turn"),
        ({"prompt": messages("Hi", "yes")}, "a prompt that ends with a user turn"),
        ({"chosen": 5}, "chosen"),
        ({"chosen": None}, "chosen"),
        ({"chosen": [{"role": "assistant"}]}, "content"),
        ({"chosen": [{"role": "assistant", "content": 5}]}, "content"),
        ({"chosen_reward": "high"}, "chosen_reward"),
        ({"chosen_token_ids": [1, -2]}, "chosen_token_ids"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(change, word, tmp_path, tokenizer, capsys):
    rows = [BUILT, {**BUILT, "pair_id": "second", **change}]
    (said,) = refusal(capsys, loaded, tmp_path, tokenizer, rows).splitlines()
    assert word in said.split(f"{tmp_path}/pairs.jsonl:2: ")[1]


@pytest.mark.parametrize("change", [{"chosen_reward": None}, {"rejected_reward": None}])
def test_revkl_without_rewards_is_refused(change, tmp_path, tokenizer, capsys):
    full = {**BUILT, "chosen_reward": 2.0, "rejected_reward": 0.5}
    bare = {**full, "pair_id": "second", **change}
    (pair,), _ = loaded(tmp_path, tokenizer, [full], "--loss", "revkl")
    assert pair.reward_margin == 1.5
    said = refusal(capsys, loaded, tmp_path, tokenizer, [full, bare], "--loss", "revkl")
    assert "pairs.jsonl:2: --loss revkl needs chosen_reward and rejected_reward" in said
    assert [pair.reward_margin for pair in loaded(tmp_path, tokenizer, [full, bare])[0]] == [1.5, 0.0]


@pytest.mark.parametrize(
    "content, word",
    [
        (None, "pairs.jsonl: expected JSON lines, found no file or an empty one"),
        ("", "pairs.jsonl: expected JSON lines, found no file or an empty one"),
        (json.dumps(BUILT) + '\n{"chosen": ', "pairs.jsonl:2: "),
        ('{"prompt": "Hi", "chosen": "yes"}\n', "pairs.jsonl:1: "),
        (json.dumps({**BUILT, "rejected": "yes"}), "pairs.jsonl: no pair is left: {'identical': 1}"),
    ],
)
def test_files_without_pairs_are_refused(content, word, whole_run, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    said = refused_run(capsys, *whole_run.flags, "--pairs", path, "--out", tmp_path / "out")
    assert word in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["--pairs", "--eval-pairs"])
def test_token_ids_beyond_the_vocabulary_are_refused_before_a_model_is_loaded(
    file, whole_run, policy, pairs_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_dpo, "load_policy", None)
    mark = fingerprint(AutoTokenizer.from_pretrained(policy))
    rows = read_rows(pairs_file)
    rows[4] |= {"rejected_token_ids": [5, 259], "rejected_tokenizer": mark}
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    said = refused_run(capsys, *whole_run.flags, file, pairs, "--out", tmp_path / "out")
    assert f"pairs.jsonl:5: a token id is beyond the vocabulary of {policy}" in said
    assert not (tmp_path / "out").exists()


def test_an_out_of_300_letters(whole_run, tmp_path, capsys):
    said = refused_run(capsys, *whole_run.flags, "--out", tmp_path / ("x" * 300))
    assert "File name too long" in said


def test_show_marks_exactly_what_is_trained(whole_run, tmp_path, tokenizer, capsys):
    (pair,), _ = loaded(tmp_path, tokenizer, [{**BUILT, "rejected_finish": "length"}])  # that side was cut
    capsys.readouterr()
    for sequence in pair.sequences:
        train_dpo.show(tokenizer, *sequence)
    expected = [f"{HI}【yes<|im_end|>】", f"{HI}【no】"]
    script = f"{Path(train_dpo.sys.argv[0]).name}: "
    assert capsys.readouterr().err == "".join(f"{script}{line}\n" for line in expected)
    assert whole_run.said.count("【") == whole_run.said.count("】") == 2


# ----- broken models
def broken(policy, folder, change):
    """A copy of a model; `change` gets its tensors."""
    model = shutil.copytree(policy, folder)
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


def without_a_norm(weights):
    del weights["model.layers.1.post_attention_layernorm.weight"]


def with_a_nan(weights):
    weights["model.norm.weight"][3] = math.nan


def test_weights_that_lack_a_tensor_are_refused(whole_run, policy, tmp_path, capsys):
    model = broken(policy, tmp_path / "model", without_a_norm)
    for flags in (("--model", model), ("--reference", model), ("--model", model, "--loss", "sft")):
        said = refused_run(capsys, *whole_run.flags, *flags, "--out", tmp_path / "out")
        assert f"{model}: missing weights: model.layers.1.post_attention_layernorm.weight" in said
        assert not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers_are_refused(whole_run, policy, tmp_path, capsys):
    model = broken(policy, tmp_path / "model", with_a_nan)
    for flags in (("--model", model), ("--reference", model), ("--model", model, "--loss", "sft")):
        said = refused_run(capsys, *whole_run.flags, *flags, "--out", tmp_path / "out")
        assert f"{model}: the log-probability of a response is not finite" in said
        assert not (tmp_path / "out").exists()


def tear(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_norm(model):
    path = model / "model.safetensors"
    weights = load_file(path)
    without_a_norm(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("damage", [tear, lose_a_norm])
def test_overwrite_with_a_broken_model_keeps_what_is_there(damage, whole_run, policy, tmp_path, capsys):
    model, out = shutil.copytree(policy, tmp_path / "model"), tmp_path / "out"
    flags = [*whole_run.flags, "--model", model, "--out", out]
    train(*flags)
    before = files_of(out)
    damage(model)
    said = refused_run(capsys, *flags, "--overwrite", "--lr", 0.1)
    assert str(model) in said and "Traceback" not in said
    assert files_of(out) == before


def test_overwrite_with_broken_pairs_keeps_what_is_there(whole_run, tmp_path, capsys):
    out = shutil.copytree(whole_run.out, tmp_path / "out")
    before = files_of(out)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(BUILT) + "\n{}\n")
    said = refused_run(capsys, *whole_run.flags, "--out", out, "--overwrite", "--pairs", pairs)
    assert "pairs.jsonl:2: " in said
    assert files_of(out) == before


def test_a_reference_with_another_tokenizer_is_refused(whole_run, tmp_path, capsys):
    folder = make_policy(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = Path(folder, name)
        path.write_text(path.read_text().replace("<|endoftext|>", "<|another|>"))
    said = refused_run(capsys, *whole_run.flags, "--reference", folder, "--out", tmp_path / "out")
    assert (
        f"--reference {folder}: its tokenizer differs from that of --model" in said
        and not (tmp_path / "out").exists()
    )


def test_a_reference_that_splits_texts_in_another_way_is_refused(whole_run, policy, tmp_path, capsys):
    """The same vocabulary, another pre-tokenizer: the ids of one text would differ."""
    folder = shutil.copytree(policy, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert tokenizer["pre_tokenizer"]["add_prefix_space"] is False
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    vocabularies = [AutoTokenizer.from_pretrained(name).get_vocab() for name in (policy, folder)]
    assert vocabularies[0] == vocabularies[1]
    said = refused_run(capsys, *whole_run.flags, "--reference", folder, "--out", tmp_path / "out")
    assert f"--reference {folder}: its tokenizer differs from that of --model {policy}" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_chat_model_is_refused(policy, pairs_file, tmp_path, capsys):
    bare = shutil.copytree(policy, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    flags = ("--pairs", pairs_file, "--out", tmp_path / "out")
    assert "no chat template; save one in the model folder" in refused_run(capsys, "--model", bare, *flags)
    said = refused_run(capsys, "--model", tmp_path / "nowhere", *flags)
    assert f"{tmp_path}/nowhere: " in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


# ----- the finished model
def test_the_export_is_a_model_folder_like_the_source(whole_run, policy):
    start = load_file(Path(policy, "model.safetensors"))
    found = load_file(whole_run.out / "model.safetensors")
    assert found.keys() == start.keys()  # so no second copy of the tied head
    for name in start:
        assert (found[name].dtype, found[name].shape) == (start[name].dtype, start[name].shape), name
    for name in ("config.json", "generation_config.json"):  # nothing of how it was trained
        assert (whole_run.out / name).read_bytes() == Path(policy, name).read_bytes()
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (policy, whole_run.out))
    assert before.chat_template == after.chat_template
    talk = messages("Hé, you?")
    assert before.apply_chat_template(talk) == after.apply_chat_template(talk)
    assert fingerprint(before) == fingerprint(after)


def test_the_export_has_the_tokenizer_files_of_the_source_and_no_others(whole_run, policy, tmp_path):
    model, out = shutil.copytree(policy, tmp_path / "model"), tmp_path / "out"
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{# tools #}" + CHATML)
    (model / "tokenizer.model").write_bytes(b"as SentencePiece has it")
    out.mkdir()
    stale = ("added_tokens.json", "special_tokens_map.json", "vocab.json")  # of a model that was there
    for name in stale:
        (out / name).write_text("{}")
    train(*whole_run.flags, "--model", model, "--out", out, "--overwrite")
    before, after = files_of(model), files_of(out)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < before.keys()
    ours = {"model.safetensors", "metrics.jsonl", "metrics.meta.json"}
    assert after.keys() - ours == before.keys() - ours and not after.keys() & set(stale)
    for name in before.keys() - ours:
        assert after[name] == before[name], name
    templates = AutoTokenizer.from_pretrained(out).chat_template
    assert templates == {"default": CHATML, "tool_use": "{# tools #}" + CHATML}
    # a folder that is there is the source of another run, named templates and all
    train(*whole_run.flags, "--model", out, "--out", tmp_path / "again")
    assert files_of(tmp_path / "again").keys() == after.keys()


def test_an_untied_head_is_exported_and_trained(untied, pairs_file, tmp_path):
    out = tmp_path / "out"
    flags = ["--model", untied, "--pairs", pairs_file, "--out", out, "--lr", LR, "--eval-pairs", pairs_file]
    train(*flags)
    start, found = load_file(Path(untied, "model.safetensors")), load_file(out / "model.safetensors")
    assert found.keys() == start.keys() and "lm_head.weight" in found
    assert not [name for name in start if torch.equal(start[name], found[name])]
    model = float64(out)
    with torch.no_grad():  # the folder holds the model that was measured last
        sums = [plain_logps(model, pair).tolist() for pair in read_pairs(parse(*flags))]
    measured = read_rows(out / "metrics.jsonl")[-1]["eval"]
    for side, name in enumerate(("chosen_logp", "rejected_logp")):
        assert measured[name] == pytest.approx(statistics.fmean(of[side] for of in sums), abs=1e-3)


def test_a_bfloat16_model_is_trained_in_float32_and_stored_in_bfloat16(policy, pairs_file, tmp_path):
    half, out = shutil.copytree(policy, tmp_path / "half"), tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).save_pretrained(half)
    # a step of 1e-5 is lost in a bfloat16 weight of 0.3, whose neighbours are 2e-3 away
    flags = ("--lr", 1e-5, "--epochs", 2, "--batch-size", 9)
    train("--model", half, "--pairs", pairs_file, "--out", out, *flags)
    found = load_file(out / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    first, second = read_rows(out / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert second["loss"] < first["loss"] - 1e-4  # in float32 the step shows


def test_a_folder_of_several_weight_files_is_read_whole(policy, whole_run, tmp_path):
    parts = shutil.copytree(policy, tmp_path / "parts")
    (parts / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(policy).save_pretrained(parts, max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    train(*whole_run.flags, "--model", parts, "--out", tmp_path / "out")
    assert without_noise(read_rows(tmp_path / "out/metrics.jsonl")) == without_noise(whole_run.rows)


# ----- a full disk: no file may grow beyond some size
@contextlib.contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_at_a_checkpoint(whole_run, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [*whole_run.flags, "--out", out, "--save-every", 2]
    with files_of_at_most(100_000):  # a checkpoint has 600,000 bytes, its model alone 200,000
        said = refused_run(capsys, *flags)
    assert f"{out}/checkpoints/saving cannot be written: " in said and "Traceback" not in said
    assert "; run the same command again to resume\n" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == []
    assert len(read_rows(out / "metrics.jsonl")) == 2 and not (out / "config.json").exists()
    summary, _ = train(*flags)
    assert summary["resumed_steps"] == 0
    assert without_noise(read_rows(out / "metrics.jsonl")) == without_noise(whole_run.rows)


def test_a_disk_that_is_full_at_the_end(whole_run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    flags = [*whole_run.flags, "--out", out, "--save-every", 4]
    export = train_dpo.export

    def export_to_a_full_disk(*args):
        with files_of_at_most(100_000):
            export(*args)

    monkeypatch.setattr(train_dpo, "export", export_to_a_full_disk)
    said = refused_run(capsys, *flags)
    assert f"--out {out} cannot be written: " in said and "run the same command again" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000004"]
    assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()
    monkeypatch.undo()
    summary, _ = train(*flags)
    assert summary["resumed_steps"] == 4
    assert without_noise(read_rows(out / "metrics.jsonl")) == without_noise(whole_run.rows)
    assert files_of(out)["model.safetensors"] == files_of(whole_run.out)["model.safetensors"]


# ----- runs that are there already
def test_a_finished_run_is_neither_begun_again_nor_changed(whole_run, tmp_path, capsys):
    out = tmp_path / "out"
    first, _ = train(*whole_run.flags, "--out", out)
    before = files_of(out)
    for flags in ((), ("--micro-tokens", 7), ("--save-every", 3)):
        summary, said = train(*whole_run.flags, "--out", out, *flags)
        assert summary == first and f"--out {out} is complete; nothing was done" in said
        assert "【" not in said
    changes = {
        ("--lr", 0.002): "with lr = 0.001, not 0.002; use another --out, or --overwrite to start over",
        ("--seed", 1): "with seed = 0, not 1",
        ("--loss", "slic"): "with beta = 0.1, not 1.0",
        ("--dtype", "bfloat16"): "with dtype = 'float32', not 'bfloat16'",
        ("--template-kwargs", '{"message": 1}'): "with template_kwargs = {}, not {'message': 1}",
    }
    for flags, sentence in changes.items():
        assert sentence in refused_run(capsys, *whole_run.flags, "--out", out, *flags)
    assert files_of(out) == before
    summary, _ = train(*whole_run.flags, "--out", out, "--overwrite", "--lr", LR / 2)
    rows = read_rows(out / "metrics.jsonl")
    assert summary["steps"] == len(rows) == 6 and rows[0]["lr"] == LR / 2
    assert rows[1]["loss"] != whole_run.rows[1]["loss"]


def test_a_finished_run_that_was_moved_is_still_finished(whole_run, tmp_path):
    out = shutil.copytree(whole_run.out, tmp_path / "moved")
    before = files_of(out)
    assert train(*whole_run.flags, "--out", out)[0] == whole_run.summary | {"out": str(out)}
    assert files_of(out) == before


def stopped(whole_run, out):
    """A copy of the run as if it had been killed before its first checkpoint, in the middle of a line."""
    out.mkdir()
    meta = json.loads((whole_run.out / "metrics.meta.json").read_text())
    del meta["counts"]
    (out / "metrics.meta.json").write_text(json.dumps(meta))
    (out / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"step')
    return out


def test_an_unfinished_run_without_a_checkpoint_starts_over(whole_run, tmp_path):
    out = stopped(whole_run, tmp_path / "out")
    summary, _ = train(*whole_run.flags, "--out", out)
    assert summary["resumed_steps"] == 0
    assert without_noise(read_rows(out / "metrics.jsonl")) == without_noise(whole_run.rows)


DATED = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML


def test_a_run_that_goes_on_after_midnight_has_the_losses_of_one_day(
    whole_run, policy, tmp_path, monkeypatch, capsys
):
    model = shutil.copytree(policy, tmp_path / "model")
    (model / "chat_template.jinja").write_text(DATED)
    flags = [*whole_run.flags, "--model", model, "--save-every", 2]

    def run(name, day, steps=6):
        class Day(loading.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        def append(file, rows):
            if rows[0].get("step") == steps:
                raise KeyboardInterrupt
            common.append_rows(file, rows)

        with monkeypatch.context() as patch:
            patch.setattr(loading, "date", Day)
            patch.setattr(train_dpo, "append_rows", append)
            with contextlib.suppress(KeyboardInterrupt):
                return train(*flags, "--out", tmp_path / name)

    run("one", "2026-11-29")
    assert run("two", "2026-11-29", steps=3) is None
    summary, said = run("two", "2026-11-30")
    assert summary["resumed_steps"] == 2
    one, two = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert without_noise(one) == without_noise(two)
    record = json.loads((tmp_path / "two" / "metrics.meta.json").read_text())
    assert record["args"]["date"] == "2026-11-29"
    # the day is in the text: another day, another run
    _, said = run("three", "2026-11-30")
    assert "<|im_start|>system\n30 Nov 2026<|im_end|>" in said
    assert read_rows(tmp_path / "three" / "metrics.jsonl")[0]["chosen_logp"] != one[0]["chosen_logp"]


def test_metrics_without_a_record_are_not_continued(whole_run, tmp_path, capsys):
    out = stopped(whole_run, tmp_path / "out")
    (out / "metrics.meta.json").unlink()
    before = files_of(out)
    said = refused_run(capsys, *whole_run.flags, "--out", out)
    assert "exists but its record" in said and "metrics.meta.json is missing or damaged" in said
    assert files_of(out) == before
    train(*whole_run.flags, "--out", out, "--overwrite")
    assert without_noise(read_rows(out / "metrics.jsonl")) == without_noise(whole_run.rows)


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": 3, "loss": 1.0}', "no JSON"])
def test_metrics_with_a_foreign_line_are_not_continued(line, whole_run, tmp_path, capsys):
    out = shutil.copytree(whole_run.out, tmp_path / "out")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    lines[1] = line
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    before = files_of(out)
    assert "metrics.jsonl:2: " in refused_run(capsys, *whole_run.flags, "--out", out)
    assert files_of(out) == before


def test_more_steps_than_the_run_has_are_refused(whole_run, tmp_path, capsys):
    out = shutil.copytree(whole_run.out, tmp_path / "out")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n')
    said = refused_run(capsys, *whole_run.flags, "--out", out)
    assert "not the row that this run of 6 rows writes there" in said


def test_a_run_that_another_process_writes_is_refused(whole_run, tmp_path, capsys):
    out = shutil.copytree(whole_run.out, tmp_path / "out")
    before = files_of(out)
    with open(out / "metrics.jsonl", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for flags in ((), ("--overwrite",)):
            said = refused_run(capsys, *whole_run.flags, "--out", out, *flags)
            assert "another process is writing this file" in said
    assert files_of(out) == before
    train(*whole_run.flags, "--out", out)


def test_no_model_is_overwritten_by_mistake(whole_run, policy, tmp_path, capsys):
    model = shutil.copytree(policy, tmp_path / "model")
    before = files_of(model)
    flags = [*whole_run.flags, "--out", model]
    said = refused_run(capsys, *flags, "--model", model, "--overwrite")
    assert "is the model being read" in said
    said = refused_run(capsys, *whole_run.flags, "--reference", model, "--out", f"{model}/", "--overwrite")
    assert "is the model being read" in said
    said = refused_run(capsys, *flags)
    assert "contains a model that this script did not write; --overwrite replaces it" in said
    assert files_of(model) == before
    train(*flags, "--overwrite")
    assert without_noise(read_rows(model / "metrics.jsonl")) == without_noise(whole_run.rows)


def test_a_file_in_the_place_of_the_folder_is_kept(whole_run, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("kept")
    for out in (path, path / "out"):
        said = refused_run(capsys, *whole_run.flags, "--out", out, "--overwrite")
        assert f"--out {out}" in said and "Traceback" not in said
    assert path.read_text() == "kept"


def test_a_run_goes_on_only_with_the_same_model_and_chat_template(whole_run, policy, tmp_path, capsys):
    model, out = shutil.copytree(policy, tmp_path / "model"), tmp_path / "out"
    flags = [*whole_run.flags, "--model", model, "--out", out]
    train(*flags)
    weights = model / "model.safetensors"
    time = weights.stat().st_mtime_ns
    os.utime(weights, ns=(time, time + 1_000_000_000))
    assert f"was written with {model} = " in refused_run(capsys, *flags)
    os.utime(weights, ns=(time, time))
    train(*flags)
    template = model / "chat_template.jinja"
    text = template.read_text()
    template.write_text("{# another text, the same chats #}" + text)
    assert f"was written with {model} = " in refused_run(capsys, *flags)
    # what a template renders counts too: it may have a date in it
    template.write_text("Hello! " + text)
    assert "was written with token ids of the pairs = " in refused_run(capsys, *flags)


def test_changed_pairs_under_the_same_name_are_refused(whole_run, pairs_file, tmp_path, capsys):
    pairs = shutil.copy(pairs_file, tmp_path / "pairs.jsonl")
    flags = [*whole_run.flags, "--pairs", pairs, "--out", tmp_path / "out"]
    train(*flags)
    rows = read_rows(pairs)
    write_rows(pairs, [*rows[:-1], rows[-1] | {"source": "on"}])
    assert f"was written with {pairs} = " in refused_run(capsys, *flags)


def test_a_run_stopped_in_its_clean_up_is_cleaned_up_by_the_next(whole_run, tmp_path, monkeypatch):
    out, rmtree = tmp_path / "out", shutil.rmtree

    def stop(folder, **options):
        if (out / "model.safetensors").exists():  # the run is over
            (folder / "00000004" / ".metadata").unlink()
            raise KeyboardInterrupt
        rmtree(folder, **options)

    monkeypatch.setattr(train_dpo.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        train(*whole_run.flags, "--out", out, "--save-every", 4)
    monkeypatch.undo()
    assert (out / "checkpoints" / "00000004").exists()
    summary, _ = train(*whole_run.flags, "--out", out, "--save-every", 4)
    assert summary["steps"] == 6 and summary["last_loss"] == whole_run.summary["last_loss"]
    assert files_of(out).keys() == files_of(whole_run.out).keys()
