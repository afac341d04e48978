"""
README's "Copy and change": what it says to change is changed in copies of the scripts, and the copies run.

Covers  a pair rule, a filter, a loss with a flag, a scorer without a model; what a copied stage takes along;
        the commands of "Your own data", in their order
Run     python -m pytest tests/test_readme.py
"""

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import REPO, make_policy, read_rows, run_script, write_rows
from models import make_bert
from train_oracle import make_pairs

TEXTS = {"a": 3.0, "bb": 1.0, "ccc": 2.0, "dddd": 0.0}


def snippet(first_words):
    """The lines below a comment of the README that begins so, up to the next empty line."""
    lines = (REPO / "README.md").read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"    # {first_words}")]
    end = lines.index("", start)
    return textwrap.dedent("\n".join(lines[start + 1 : end])) + "\n"


def changed_copy(folder, script, *changes):
    """A copy of a script in which (old, new) texts are replaced, each of which it holds once."""
    text = (REPO / script).read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    for name in ("common.py", "chat.py"):  # which it takes along
        shutil.copy(REPO / name, folder)
    path = folder / script.replace("/", "/my_") if "/" in script else folder / f"my_{script}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def scored(tmp_path):
    rows = []
    for i in range(6):
        responses = []
        for text, reward in TEXTS.items():
            text = text * (i + 1)
            responses.append({"text": text, "source": "on", "model": "m", "finish": "stop", "reward": reward})
        prompt = [{"role": "user", "content": f"Question {i}"}]
        rows.append({"id": f"p{i}", "prompt": prompt, "responses": responses, "labeler": "rm:m"})
    return write_rows(tmp_path / "scored.jsonl", rows)


def test_a_pair_rule(tmp_path, scored):
    rule = ("DATA_SET_PAIR = (", snippet("a pair rule") + "\n\nDATA_SET_PAIR = (")
    script = changed_copy(tmp_path, "build_pairs.py", rule)
    out = tmp_path / "pairs.jsonl"
    flags = ("--scored", scored, "--on-ratio", 1, "--select", "best-second", "--out", out)
    assert run_script(script, *flags)[0]["pairs"] == 6
    for pair in read_rows(out):
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (3.0, 2.0)


def test_a_filter(tmp_path, scored):
    filters = ("FILTERS = {\n", f"FILTERS = {{\n{snippet('a filter')}")
    script = changed_copy(tmp_path, "build_pairs.py", filters)
    out = tmp_path / "pairs.jsonl"
    flags = ("--scored", scored, "--on-ratio", 1, "--filter", "short:0.5", "--out", out)
    assert run_script(script, *flags)[0]["pairs"] == 3
    assert [pair["id"] for pair in read_rows(out)] == ["p0", "p1", "p2"]


def test_a_loss(tmp_path):
    script = changed_copy(
        tmp_path, "train_dpo.py", ("def pair_losses(", snippet("a loss") + "\n\ndef pair_losses(")
    )
    pairs = make_pairs(tmp_path / "pairs.jsonl", n=8)
    flags = ["--model", make_policy(tmp_path / "policy"), "--pairs", pairs, "--out", tmp_path / "out"]
    flags += ["--batch-size", 4, "--lr", 1e-3, "--loss", "exponential"]
    run_script(script, *flags, "--scale", 0.5)
    first, second = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(1, abs=1e-5)  # exp(0), at the reference
    # a loss without beta has rewards that are the log-ratios: the mean of exp(-h / 2) over four pairs
    assert math.exp(-second["margin"] / 2) < second["loss"] < 1
    said = run_script(script, *flags, "--beta", 0.5, expect=2)[1]
    assert "--beta has no effect with --loss exponential" in said


def test_a_scorer(tmp_path, scored):
    line = "score.main(parse_args(), Verify)"
    changes = [("class Verify(score.Scorer):", snippet("a scorer") + "\n\nclass Verify(score.Scorer):")]
    script = changed_copy(tmp_path, "scorers/verify.py", *changes, (line, line.replace("Verify", "Length")))
    shutil.copy(REPO / "score.py", tmp_path)
    out = tmp_path / "lengths.jsonl"
    assert run_script(script, "--responses", scored, "--out", out)[0]["responses"] == 24
    for row in read_rows(out):
        assert row["labeler"] == "length"
        texts = [response["text"] for response in row["responses"]]
        assert [response["reward"] for response in row["responses"]] == [-len(text) for text in texts]


def test_a_stage_needs_nothing_but_what_is_said(tmp_path, scored):
    """A copy in an empty folder, in a process whose path has no other file of ours."""
    script = changed_copy(tmp_path, "build_pairs.py")
    out = tmp_path / "pairs.jsonl"
    command = [sys.executable, script, "--scored", scored, "--on-ratio", "1", "--out", out]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_rows(out)) == 6


# ----- "Your own data"
def commands(section):
    """The words of a section's commands, one for each line that begins with python."""
    text = (REPO / "README.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")], lines


def test_your_own_data(tmp_path):
    words, lines = commands("Your own data")
    (example,) = [json.loads(line) for line in lines if line.startswith("{")]
    rows = [{**example, "prompt": f"Name river {k}.", "chosen": f"The Nile, {k}."} for k in range(6)]
    write_rows(tmp_path / "mine.jsonl", [*rows, rows[0]])  # and a row that is there twice
    with open(tmp_path / "mine.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer_a", "answer_b", "better"])
        writer.writerows([row["prompt"], row["rejected"], row["chosen"], "b"] for row in rows)
    (tmp_path / "out/models").mkdir(parents=True)
    make_policy(tmp_path / "out/models/policy")
    make_bert(tmp_path / "out/models/reward")
    printed = []
    for script, *flags in words:
        if script == "generate.py":
            flags += ["--max-tokens", "12", "--backend", "hf"]
        if "out/mixed.pairs.jsonl" in flags and script == "build_pairs.py":
            flags += ["--truncated", "keep"]  # the random model does not end its answers
        printed.append(run_script(script, *flags, cwd=tmp_path)[0])
    assert " ".join(Path(script).stem for script, *_ in words) == (
        "train_dpo import_responses build_pairs train_dpo "
        "import_responses generate score boundary build_pairs train_dpo"
    )
    at_once, imported, own = printed[0], printed[1], printed[3]
    assert at_once["pairs"] == own["pairs"] == 6 and at_once["dropped"] == {"duplicate": 1}
    assert imported["rows"] == 6 and imported["responses"] == 12
    assert at_once["first_loss"] == own["first_loss"] == pytest.approx(math.log(2))
    pairs = read_rows(tmp_path / "out/own.pairs.jsonl")
    sides = [(pair["prompt"][0]["content"], pair["chosen"][0]["content"]) for pair in pairs]
    assert sides == [(row["prompt"], row["chosen"]) for row in rows]
    assert printed[4]["dropped"] == {"duplicate row": 1} and printed[6]["responses"] == 36
    assert printed[8]["pairs"] == printed[9]["pairs"] and printed[8]["on"] == printed[8]["off"] > 0
    pairs = read_rows(tmp_path / "out/mixed.pairs.jsonl")
    assert {pair["topic"] for pair in pairs} == {"facts"} and {pair["source"] for pair in pairs} == {
        "on",
        "off",
    }
