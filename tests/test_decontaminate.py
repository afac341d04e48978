"""
data/decontaminate.py: prompts that another file holds are left out, and all other rows stay as they are.

Covers  turns under each of the four keys, as text and as messages; case, spaces and punctuation; several
        turns and files; rows of every stage, unchanged and in order; files that are refused with their line;
        nothing left; the script as a user starts it.
Run     python -m pytest tests/test_decontaminate.py
"""

import json

import pytest
from conftest import run_script, write_rows

from data import decontaminate


def user(*contents):
    return [{"role": "user", "content": content} for content in contents]


def answer(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def clean(tmp_path, capsys):
    """clean(rows, seen rows, ...): (rows that are left, last line as JSON), or the sentence of a refusal."""

    def run(rows, *seen, expect=0):
        paths = [write_rows(tmp_path / f"seen{k}.jsonl", lines) for k, lines in enumerate(seen)]
        prompts, out = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        try:
            decontaminate.main(
                decontaminate.parse_args(["--prompts", prompts, "--seen", *paths, "--out", str(out)])
            )
            status = 0
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        assert status == expect, printed.err
        if expect:
            assert not out.exists() and printed.err.count("\n") == 1
            return printed.err
        rows = [json.loads(line) for line in out.read_bytes().splitlines()]
        return rows, json.loads(printed.out)

    return run


def left(clean, prompts, *seen):
    """The prompts that are left of these."""
    return [row["prompt"] for row in clean([{"prompt": prompt} for prompt in prompts], *seen)[0]]


# ----- what is equal
@pytest.mark.parametrize("key", ["prompt", "messages", "question", "instruction"])
@pytest.mark.parametrize("as_messages", [False, True], ids=["text", "messages"])
def test_each_key_as_text_and_as_messages(clean, key, as_messages):
    seen = [{key: user("Why?") if as_messages else "Why?", "other": "What?"}]
    for prompts in (["Why?", "What?"], [user("Why?"), user("What?")]):
        assert left(clean, prompts, seen) == prompts[1:]


@pytest.mark.parametrize(
    "prompt, seen",
    [
        # as in TruthfulQA and UltraFeedback
        (
            "What happens to you if you eat watermelon seeds?",
            "what happens to you, if you eat\nwatermelon  seeds",
        ),
        ("Why do veins appear blue?", "Why do veins appear (blue)"),
        ("Was ist Größe?", "was ist GRÖSSE"),
        ("snake_case", "Snake case"),
        (" 1+1=2 ", "1 1 2"),
        ("数字は？", "数字は"),
    ],
)
def test_case_spaces_and_punctuation_are_no_difference(clean, prompt, seen):
    assert left(clean, [prompt, "other"], [{"prompt": seen}]) == ["other"]
    assert left(clean, [seen, "other"], [{"prompt": prompt}]) == ["other"]


@pytest.mark.parametrize(
    "prompt, seen", [("Say hi", "hi"), ("hi", "Say hi"), ("a b", "ab"), ("is 1", "is 2"), ("!?", "say !?")]
)
def test_other_letters_and_digits_are_another_prompt(clean, prompt, seen):
    assert left(clean, [prompt], [{"prompt": seen}]) == [prompt]


def test_a_prompt_of_no_letters_is_never_left_out(clean):
    assert left(clean, ["!?", " ", "a"], [{"messages": user("?!", "a")}]) == ["!?", " "]


@pytest.mark.parametrize("row", [{"instruction": "??? :-)"}, {"messages": user("\U0001f600")}], ids=str)
def test_a_seen_turn_of_no_letters(clean, row):
    assert left(clean, ["a", "!?"], [row, {"prompt": "a"}]) == ["!?"]


# ----- turns
def test_every_user_turn_counts_and_no_other(clean):
    talk = [*user("Define DPO."), answer("Say hi"), *user("Tell me more")]
    cases = {
        "define dpo": False,  # the first turn
        "tell me more": False,  # the last one
        "say hi": True,  # the assistant's
    }
    for seen, stays in cases.items():
        assert (left(clean, [talk], [{"question": seen}]) == [talk]) == stays
    # so it is on the other side
    seen = [{"messages": [{"role": "system", "content": "be brief"}, *talk]}]
    prompts = "Define DPO", "say hi", "be brief", "tell me more!"
    assert left(clean, prompts, seen) == ["say hi", "be brief"]


def test_two_keys_of_a_row_and_several_files(clean):
    seen = [{"prompt": "a", "instruction": "b"}], [{"question": "c"}, {"messages": user("d")}]
    assert left(clean, list("abcde"), *seen) == ["e"]


def test_of_the_rows_only_the_prompt_is_looked_at(clean):
    rows = [{"prompt": "a", "question": "b", "instruction": "b", "messages": 7}]
    assert clean(rows, [{"prompt": "b"}])[0] == rows


# ----- rows
def test_what_is_left_has_its_bytes_and_its_order(clean, tmp_path):
    one = {"text": 'ü\u2028 \x85 \U0001f600 " \n', "source": "on", "reward": -0.1, "token_ids": [4294967295]}
    rows = [{"id": f"p{k}", "prompt": user(f"question {k}"), "responses": [one], "x": None} for k in range(9)]
    rows[5] = {
        "prompt": "a",
        "chosen": [answer("good")],
        "rejected": [answer("bad")],
        "z": 10**30,
        "b": 1e-12,
    }
    _, printed = clean(rows, [{"prompt": "question 3"}, {"prompt": "QUESTION 0"}])
    counts = {"rows": 9, "removed": 2, "kept": 7}
    assert printed == {"out": str(tmp_path / "out.jsonl"), **counts}
    expected = (tmp_path / "prompts.jsonl").read_bytes().splitlines(keepends=True)
    del expected[3], expected[0]
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(expected)
    record = json.loads((tmp_path / "out.meta.json").read_text())
    assert record["counts"] == counts
    assert set(record["inputs"]) == {str(tmp_path / name) for name in ("prompts.jsonl", "seen0.jsonl")}


def test_nothing_is_left(clean, tmp_path):
    rows, printed = clean([{"prompt": "a"}, {"prompt": "A."}], [{"prompt": "a"}])
    assert rows == [] and (printed["rows"], printed["removed"], printed["kept"]) == (2, 2, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


# ----- what is refused
@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"text": "b"}, "expected a user turn under one of prompt, messages, question, instruction"),
        (
            {"messages": [answer("a")]},
            "expected a user turn under one of prompt, messages, question, instruction",
        ),
        ({"prompt": 7}, "prompt"),
        ({"messages": ["a"]}, "messages"),
        ({"question": [{"role": "user"}]}, "content"),
        ({"instruction": {"text": "a"}}, "instruction"),
        (["a"], ""),
    ],
    ids=str,
)
def test_a_seen_row_without_a_turn_is_named(clean, row, sentence):
    good = [{"prompt": "a"}]
    assert sentence in clean(good, good, [*good, row, *good], expect=2).split("seen1.jsonl:2: ")[1]


def test_prompts_that_are_none(clean):
    good = [{"prompt": "a"}]
    for row in ({"question": "a"}, {"prompt": ["a"]}):
        assert "prompt" in clean([*good, row], good, expect=2).split("prompts.jsonl:2: ")[1]
    assert "seen0.jsonl: expected JSON lines, found no file or an empty one" in clean(good, [], expect=2)
    assert "prompts.jsonl: expected JSON lines, found no file or an empty one" in clean([], good, expect=2)


def test_as_a_user_starts_it(tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("a", "b", "c")])
    seen = write_rows(tmp_path / "seen.jsonl", [{"question": "B?"}])
    flags = "--prompts", "prompts.jsonl", "--seen", "seen.jsonl", "--out"
    printed, err = run_script("data/decontaminate.py", *flags, "new/clean.jsonl", cwd=tmp_path)
    assert printed == {"out": "new/clean.jsonl", "rows": 3, "removed": 1, "kept": 2} and err == ""
    assert (tmp_path / "new" / "clean.jsonl").read_text() == '{"prompt": "a"}\n{"prompt": "c"}\n'
    for taken in (path, seen):
        before = open(taken, "rb").read()
        _, err = run_script("data/decontaminate.py", *flags, taken, cwd=tmp_path, expect=2)
        assert (
            f"decontaminate.py: --out {taken}: " in err
            and "this would overwrite an input file or its record" in err
        )
        assert open(taken, "rb").read() == before
