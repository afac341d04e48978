"""
README's "Copy and change": what it says to change is changed in copies of the scripts, and the copies run.

Covers  a pair rule, a filter, a loss with its three places, a scorer without a model.
Run     python -m pytest tests/test_readme.py
"""

import math
import textwrap

import pytest
from conftest import REPO, make_policy, read_rows, run_script, write_rows
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
    path = folder / f"my_{script}"
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
    flags = [
        "--scored",
        scored,
        "--on-ratio",
        1,
        "--select",
        "best-second",
        "--out",
        tmp_path / "pairs.jsonl",
    ]
    assert run_script(script, *flags)[0]["pairs"] == 6
    for pair in read_rows(tmp_path / "pairs.jsonl"):
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (3.0, 2.0)


def test_a_filter(tmp_path, scored):
    script = changed_copy(
        tmp_path, "build_pairs.py", ("FILTERS = {\n", f"FILTERS = {{\n{snippet('a filter')}")
    )
    flags = ["--scored", scored, "--on-ratio", 1, "--filter", "short:0.5", "--out", tmp_path / "pairs.jsonl"]
    assert run_script(script, *flags)[0]["pairs"] == 3
    assert [pair["id"] for pair in read_rows(tmp_path / "pairs.jsonl")] == ["p0", "p1", "p2"]


def test_a_loss(tmp_path):
    call = "exponential_loss(chosen, rejected, args.beta)"
    branch = f'    elif args.loss == "exponential":\n        losses = {call}\n'
    changes = [
        ("def hinge_loss(", snippet("a loss") + "\n\ndef hinge_loss("),
        ('    elif args.loss == "hinge":\n', branch + '    elif args.loss == "hinge":\n'),
        ('LOSSES = ["dpo",', 'LOSSES = ["exponential", "dpo",'),
        ('"beta": ("dpo",', '"beta": ("exponential", "dpo",'),
    ]
    script = changed_copy(tmp_path, "train_dpo.py", *changes)
    pairs = make_pairs(tmp_path / "pairs.jsonl", n=8)
    flags = ["--model", make_policy(tmp_path / "policy"), "--pairs", pairs, "--loss", "exponential"]
    run_script(script, *flags, "--batch-size", 4, "--lr", 1e-3, "--out", tmp_path / "out")
    first, second = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(1, abs=1e-5)  # exp(0), at the reference
    assert math.exp(-second["margin"]) < second["loss"] < 1  # the mean of exp(-margin) over four pairs


def test_a_scorer(tmp_path, scored):
    changes = ("\nSCORERS = {", "\n" + snippet("a scorer") + '\n\nSCORERS = {"length": Length, ')
    script = changed_copy(tmp_path, "score.py", changes)
    out = tmp_path / "lengths.jsonl"
    said, _ = run_script(script, "--scorer", "length", "--responses", scored, "--out", out)
    assert said["responses"] == 24
    for row in read_rows(out):
        assert row["labeler"] == "length"
        assert [response["reward"] for response in row["responses"]] == [
            -len(response["text"]) for response in row["responses"]
        ]
