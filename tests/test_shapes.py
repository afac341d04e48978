"""
Rows of a wrong shape, generated from the TypedDicts that a script holds its input to (DESIGN.md, rule 3).

Covers  for scorers/verify, build_pairs, boundary, evaluate and train_dpo, every key at every depth of a row:
        missing, null, of each wrong JSON type, a number out of bounds. What an annotation does not admit, by
        a second implementation (admits), ends with status 2, one line with file and line, and no output; what
        it admits gives an output or one sentence, never a traceback. Lines that are no rows: torn, no text,
        nested without end, numbers too long. The same for the entries of evaluate's annotations. The output
        of train_dpo is here the pairs as it has read them; nothing is trained.
Run     python -m pytest tests/test_shapes.py
"""

import copy
import gzip
import importlib
import json
import math
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints
from typing import is_typeddict as is_shape

import pytest

ROWS = [  # name of the run, script, flags before --out
    ("build_pairs", "build_pairs", ["--scored", "{data}"]),
    ("given", "build_pairs", ["--select", "given", "--on-ratio", "0", "--scored", "{data}"]),
    ("reward", "build_pairs", ["--reward", "rm", "--stats", "--scored", "{data}"]),
    ("onpolicy", "build_pairs", ["--filter", "onpolicy:1", "--on-ratio", "1", "--scored", "{data}"]),
    ("similarity", "build_pairs", ["--filter", "similarity:1", "--on-ratio", "0", "--scored", "{data}"]),
    ("boundary", "boundary", ["--scored", "{data}"]),
    ("verify", "scorers.verify", ["--responses", "{data}"]),
    ("winrate", "evaluate", ["--model", "m-on", "--baseline", "m-off", "--scored", "{data}"]),
]
RUNS = {name: (script, flags) for name, script, flags in ROWS}
RUNS["annotations"] = ("evaluate", ["--annotations", "{data}"])
RUNS["pairs"] = ("train_dpo", ["--model", "{model}", "--pairs", "{data}"])

MISSING = object()
VALUES = [None, True, 1, 1.5, "x", [], {}, [["x"]]]  # one of every JSON type, and one of them deep in another
STRINGS = ["", "on", "off", "stop", "length"]
NUMBERS = [-1, -0.5, 0, 2, 2.5, 3, 2**32 - 1, 2**32, 2**64, 1e150, 10**400]


def good_row(number):
    """A row that has every key that any of the scripts knows."""
    responses = []
    for k, source in enumerate(["on", "on", "off", "off"]):
        responses.append(
            {
                "text": f"<think>so</think>text {k} of {number}" + "." * k,
                "final": f"text {k} of {number}" + "." * k,
                "source": source,
                "model": f"m-{source}",
                "finish": "stop",
                "token_ids": [7, 8],
                "tokenizer": "t",
                "reward": 1.5 - k,
                "reward_error": None,
                "scores": {"rm": 0.5 + k},
                "logp": -3.0 - k,
                "logp_tokens": 2 + k,
            }
        )
    return {
        "id": f"p{number}",
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "prompt_token_ids": [5, 6],
        "prompt_tokenizer": "t",
        "responses": responses,
        "category": "math",
        "answer": str(number),
        "labeler": "rm:A",
        "wins": [[None if i == j else 0.5 + (i < j) / 4 - (i > j) / 4 for j in range(4)] for i in range(4)],
        "cosine": [[1.0 if i == j else 0.25 for j in range(4)] for i in range(4)],
    }


def good_entry(number):
    """An entry of AlpacaEval's annotations."""
    return {
        "instruction": f"question {number}",
        "output_1": "the baseline's answer",
        "output_2": "the model's",
        "generator_1": "base",
        "generator_2": "new",
        "preference": 1.75,
        "annotator": "judge:A",
        "category": "math",
    }


def good_pair(number):
    """A row of a file of pairs."""
    return {
        "pair_id": f"p{number}:on",
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "prompt_token_ids": [5, 6],
        "prompt_tokenizer": "t",
        "chosen": [{"role": "assistant", "content": f"good {number}"}],
        "rejected": [{"role": "assistant", "content": f"bad {number}"}],
        "source": "on",
        "chosen_reward": 1.5,
        "rejected_reward": -1.5,
        "chosen_finish": "stop",
        "rejected_finish": "length",
        "chosen_token_ids": [7, 8],
        "rejected_token_ids": [7, 9],
        "chosen_tokenizer": "t",
        "rejected_tokenizer": "t",
        "category": "math",
    }


def good(name, number):
    return {"annotations": good_entry, "pairs": good_pair}.get(name, good_row)(number)


# ----- what an annotation admits, without msgspec
def admits(annotation, value):
    """Whether a JSON value has the type that an annotation names."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Required, NotRequired):
        return admits(parts[0], value)
    if origin is Annotated:
        return admits(parts[0], value) and all(within(bounds, value) for bounds in annotation.__metadata__)
    if origin in (Union, UnionType):
        return any(admits(part, value) for part in parts)
    if origin is Literal:
        return any(type(part) is type(value) and part == value for part in parts)
    if origin is list:
        return type(value) is list and all(admits(parts[0], item) for item in value)
    if origin is dict:
        return type(value) is dict and all(admits(parts[1], item) for item in value.values())
    if is_shape(annotation):
        if type(value) is not dict or not annotation.__required_keys__ <= value.keys():
            return False
        hints = get_type_hints(annotation, include_extras=True)
        return all(admits(hints[key], item) for key, item in value.items() if key in hints)
    if annotation is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for nan too
    assert annotation in (int, str, NoneType), f"a type that this test does not know: {annotation}"
    return type(value) is annotation


def within(bounds, value):
    """Whether a number lies where msgspec.Meta says."""
    low = bounds.ge is None or value >= bounds.ge, bounds.gt is None or value > bounds.gt
    high = bounds.le is None or value <= bounds.le, bounds.lt is None or value < bounds.lt
    return all(low + high)


def places(annotation, value, path=()):
    """(path, annotation, whether the key must be there; None for an item) of each part of a good value."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Required, NotRequired, Annotated):
        yield from places(parts[0], value, path)
    elif origin in (Union, UnionType):
        (part,) = [part for part in parts if admits(part, value)]
        yield from places(part, value, path)
    elif origin is list:
        k = next(k for k, item in enumerate(value) if item is not None)  # a matrix has null on its diagonal
        yield (*path, k), parts[0], None
        yield from places(parts[0], value[k], (*path, k))
    elif origin is dict:
        for key, item in value.items():
            yield (*path, key), parts[1], None
            yield from places(parts[1], item, (*path, key))
    elif is_shape(annotation):
        for key, hint in get_type_hints(annotation, include_extras=True).items():
            assert key in value, f"the good row has no {key!r} to spoil"
            yield (*path, key), hint, key in annotation.__required_keys__
            yield from places(hint, value[key], (*path, key))


def test_the_rule_of_admission_by_hand():
    build_pairs = importlib.import_module("build_pairs")
    token_ids = get_type_hints(build_pairs.Response, include_extras=True)["token_ids"]
    assert admits(token_ids, None) and admits(token_ids, []) and admits(token_ids, [0, 2**32 - 1])
    assert not any(admits(token_ids, value) for value in ([-1], [2**32], [1.0], [True], ["1"], 1, {}))
    assert admits(float | None, 10**300) and not admits(float | None, 10**400)
    assert not any(admits(float, value) for value in (math.nan, math.inf, True, "1", None))
    assert admits(build_pairs.Message, {"role": "user", "content": "", "more": 1})
    assert not admits(build_pairs.Message, {"role": "user"})
    assert all(admits(build_pairs.Row, good_row(number)) for number in range(3))


@pytest.mark.parametrize("name", ["build_pairs", "boundary", "evaluate", "score"])
def test_the_shapes_are_those_of_the_contract(name):
    """DESIGN.md, Rows, by hand: what the tests below take from the script is right."""
    script = importlib.import_module(name)
    assert script.Row.__required_keys__ == {"id", "prompt", "responses"}
    always = {"reward"} if name in ("boundary", "evaluate") else set()
    assert script.Response.__required_keys__ == {"text", "source", *always}
    row = get_type_hints(script.Row, include_extras=True)
    response = get_type_hints(script.Response, include_extras=True)
    for key in ("labeler", "wins", "cosine"):
        assert admits(row[key], None) and not admits(row[key], 1)
    for matrix in ([], [[]], [[None]], [[0, 1, 0.5, None]]):
        assert admits(row["wins"], matrix)
    for matrix in ([[1.01]], [[-0.01]], [["1"]], [None], {}):
        assert not admits(row["wins"], matrix)
    assert admits(row["cosine"], [[-1, None]]) and not admits(row["cosine"], [["1"]])
    assert admits(row["prompt"], "") and admits(row["prompt"], [{"role": "user", "content": ""}])
    for prompt in (None, {}, ["x"], [{"role": "user"}], [{"role": "user", "content": None}]):
        assert not admits(row["prompt"], prompt)
    for source in (None, "own", "On", True, ""):
        assert not admits(response["source"], source)
    for key in ("reward", "logp"):
        if key in response:
            assert (
                admits(response[key], None) and admits(response[key], -1) and not admits(response[key], "1")
            )
    for ids in (row["prompt_token_ids"], response["token_ids"]):
        assert admits(ids, None) and admits(ids, [0, 2**32 - 1]) and not admits(ids, [2**32])
    assert (
        admits(response["final"], None) and admits(response["final"], "") and not admits(response["final"], 5)
    )
    if name == "score":
        assert admits(row["answer"], 1.5) and not admits(row["answer"], ["1"])
        assert admits(response["reward_error"], "why") and not admits(response["reward_error"], 1)
    if name in ("build_pairs", "score"):
        assert not admits(response["finish"], "eos") and not admits(response["scores"], {"rm": "1"})
    if name == "boundary":
        assert admits(response["logp_tokens"], 1) and not admits(response["logp_tokens"], 0)
    if name == "evaluate":
        entry = get_type_hints(script.Annotation, include_extras=True)
        texts = {"instruction", "output_1", "output_2", "generator_1", "generator_2"}
        assert script.Annotation.__required_keys__ == {*texts, "preference"}
        assert not any(admits(entry[key], None) for key in texts) and admits(entry["preference"], None)
        assert not admits(entry["preference"], 2.01) and not admits(entry["preference"], -0.01)


def test_the_shapes_of_pairs_are_those_of_the_contract():
    """DESIGN.md, Rows, and what others ship: a prompt may be in the messages of both sides, or text."""
    script = importlib.import_module("train_dpo")
    assert script.Row.__required_keys__ == {"chosen", "rejected"}
    row = get_type_hints(script.Row, include_extras=True)
    for key in row.keys() - {"chosen", "rejected"}:
        assert admits(row[key], None), key
    assert all(admits(script.Row, good_pair(number)) for number in range(3))
    messages = [{"role": "assistant", "content": "a", "more": None}]
    for key in ("prompt", "chosen", "rejected"):
        assert admits(row[key], "text") and admits(row[key], messages) and admits(row[key], [])
        assert not any(admits(row[key], value) for value in (1, {}, ["text"], [{"role": "user"}]))
    for key in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"):
        assert admits(row[key], [0, 2**32 - 1]) and not any(admits(row[key], [x]) for x in (-1, 2**32, "1"))
    for key in ("chosen_reward", "rejected_reward"):
        assert admits(row[key], -1) and not admits(row[key], "1") and not admits(row[key], True)
    assert admits(row["pair_id"], 7) and not admits(row["pair_id"], 7.5)


def shape_of(name):
    script = importlib.import_module("score" if name == "verify" else RUNS[name][0])
    return script.Annotation if name == "annotations" else script.Row


CASES = []
for name in RUNS:
    for path, hint, required in places(shape_of(name), good(name, 1)):
        label = f"{name}-{'.'.join(map(str, path))}"
        CASES.append(pytest.param(name, path, hint, required, id=label))


# ----- running
@lru_cache
def read_chat_once(name):
    """The Chat of train_dpo.py, which takes longer than all the rest."""
    return importlib.import_module("train_dpo").read_chat(name)


class Read(Exception):
    """train_dpo.py has read its pairs."""


def read_pairs(module, args, monkeypatch):
    """main of train_dpo.py up to the model; its output is the pairs."""
    pairs = []
    load_pairs = module.load_pairs

    def remember(*inputs):
        pairs.extend(load_pairs(*inputs)[0])
        raise Read

    with monkeypatch.context() as patch:
        chat = read_chat_once(args.model)
        patch.setattr(module, "read_chat", lambda *args: chat)
        patch.setattr(module, "load_pairs", remember)
        patch.setattr(module, "start_processes", lambda *args: None)
        with pytest.raises(Read):
            module.main(args)
    out = Path(args.out)
    assert pairs and not out.parent.exists()
    out.parent.mkdir()
    lines = [json.dumps(pair, default=list) + "\n" for pair in pairs]
    out.write_text("".join(lines))
    out.with_suffix(".meta.json").write_text("{}")
    print("{}")


@pytest.fixture
def run(tmp_path, capsys, monkeypatch, policy):
    """A function that runs a script on a text as a user does: (status, standard error, path of the data)."""

    def start(name, data):
        script, flags = RUNS[name]
        path, out = tmp_path / "data.jsonl", tmp_path / "out"
        path.write_bytes(data)
        shown = f"{script.split('.')[-1]}.py"
        monkeypatch.setattr(sys, "argv", [shown])
        flags = [flag.format(data=path, model=policy) for flag in flags]
        module = importlib.import_module(script)
        args = module.parse_args([*flags, "--out", str(out / "out.json")])
        try:
            if name == "pairs":
                read_pairs(module, args, monkeypatch)
            elif name == "verify":
                module.score.main(args, module.Verify)
            else:
                module.main(args)
        except SystemExit as end:
            status, said = end.code, capsys.readouterr()
            assert status == 2 and said.out == "", said
            assert not out.exists(), f"{name} wrote something before it refused"
            assert said.err.count("\n") == 1 and said.err.startswith(f"{shown}: "), said.err
            return status, said.err, path
        outputs = [(out / "out.json").read_text(), (out / "out.meta.json").read_text()]
        assert sorted(file.name for file in out.iterdir()) == ["out.json", "out.meta.json"]
        shutil.rmtree(out)
        last = capsys.readouterr().out.splitlines()[-1]
        for text in (outputs[1], last, *(outputs[0].splitlines())):
            json.loads(text, parse_constant=lambda constant: pytest.fail(f"{name} wrote {constant}"))
        return 0, outputs[0], path

    return start


def joined(name, lines, end=b"\n"):
    """Lines as the whole file: a list of entries for annotations."""
    if name == "annotations":
        return b"[" + (b"," + end).join(lines) + b"]"
    return b"".join(line + end for line in lines)


def as_bytes(name, rows):
    return joined(name, [json.dumps(row).encode() for row in rows])


def good_rows(name):
    return [good(name, k) for k in range(3)]


def with_change(rows, path, value):
    """Rows of which the second has another value, or none, at a path of keys and indices."""
    rows = copy.deepcopy(rows)
    *parents, last = path
    parent = rows[1]
    for key in parents:
        parent = parent[key]
    if value is MISSING:
        del parent[last]
    else:
        parent[last] = value
    return rows


def spelled(path, inside_dict=()):
    """A path as msgspec writes it: $.responses[0].text, with [...] for a key of a dict."""
    text = "$"
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else "[...]" if key in inside_dict else f".{key}"
    return text


def key_of(path):
    """The key that the refusal of a wrong value names: text of responses[0].text; "rm" is a name of ours."""
    return [key for key in path if isinstance(key, str) and key != "rm"][-1]


@pytest.mark.parametrize("name", RUNS)
def test_good_rows_give_an_output(run, name):
    status, text, _ = run(name, as_bytes(name, good_rows(name)))
    assert status == 0, text
    if RUNS[name][0] == "build_pairs":
        pairs = [json.loads(line) for line in text.splitlines()]
        assert [pair["id"] for pair in pairs] == ["p0", "p1", "p2"] and pairs[0]["cosine"] == 0.25
    elif name == "verify":
        rows = [json.loads(line) for line in text.splitlines()]
        # "text 0 of 1...": the last number is that of the row
        assert [one["reward"] for row in rows for one in row["responses"]] == [1.0] * 12
        assert rows[0]["labeler"] == "verify" and rows[0]["cosine"] == good_row(0)["cosine"]
    elif name == "pairs":
        pairs = [json.loads(line) for line in text.splitlines()]
        assert [pair[:2] for pair in pairs] == [[f"p{k}:on", "on"] for k in range(3)]
        assert [pair[3] for pair in pairs] == [3.0] * 3  # the difference of the rewards
    else:
        result = json.loads(text)
        assert result.get("v_on", result.get("n_wins")) == {"boundary": 12}.get(name, 3)


def attempt(run, name, rows, case, failures):
    """(status, standard error, path) of a run; a traceback is noted as a failure and has status None."""
    try:
        return run(name, as_bytes(name, rows))
    except Exception as error:
        failures.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
        return None, "", None


@pytest.mark.parametrize("name, path, hint, required", CASES)
def test_every_key_of_every_type(run, name, path, hint, required):
    values = [*VALUES, *STRINGS, *NUMBERS] + ([] if required is None else [MISSING])
    right, wrong = [], []
    for value in values:
        admitted = not required if value is MISSING else admits(hint, value)
        (right if admitted else wrong).append(value)
    failures = []
    at = f"$[1]{spelled(path)[1:]}" if name == "annotations" else spelled(path, inside_dict=("rm",))
    for value in wrong:
        case = f"{at} {'missing' if value is MISSING else json.dumps(value)[:30]}"
        status, said, data = attempt(run, name, with_change(good_rows(name), path, value), case, failures)
        where = f"{data}: " if name == "annotations" else f"{data}:2: "
        if status == 0:
            failures.append(f"{case}: accepted")
        elif status == 2 and key_of(path) not in said.partition(where)[2]:
            failures.append(f"{case}: expected {where} ... {key_of(path)}, found {said}")
    # what is admitted gives an output in strict JSON or one sentence, which run() looks at: three values in
    # one file, or each in a file of its own where they are refused together
    for start in range(0, len(right), 3):
        rows = good_rows(name)[:1]
        for number, value in enumerate(right[start : start + 3], 3):
            rows += with_change([None, good(name, number)], path, value)[1:]
        if attempt(run, name, rows, at, failures)[0] != 0:
            for value in right[start : start + 3]:
                case = f"{at} {'missing' if value is MISSING else json.dumps(value)[:30]}"
                attempt(run, name, with_change(good_rows(name), path, value), case, failures)
    assert not failures, "\n" + "\n".join(failures)


# ----- lines that are no rows, or rows written in another way
def spoiled(name):
    """{what: bytes in place of the second line} that every script must refuse."""
    row = json.dumps(good_rows(name)[1]).encode()
    numbers = {"annotations": b'"preference": 1.75', "pairs": b'"chosen_reward": 1.5'}
    number = numbers.get(name, b'"reward": 1.5')
    key = number.split(b":")[0]
    lines = {
        "torn": row[:-20],
        "a lone number": b"7",
        "null": b"null",
        "a text": b'"x"',
        "a list": b"[" + row + b"]",
        "two objects": row + row,
        "two objects apart": row + b" " + row,
        "a comma behind": row + b",",
        "single quotes": row.replace(b'"', b"'"),
        "a byte order mark": b"\xef\xbb\xbf" + row,
        "half a surrogate, raw": row.replace(b"question", b"\xed\xa0\xbd"),
        "half a surrogate, escaped": row.replace(b"question", b"\\ud83d"),
        "a surrogate that is followed by none": row.replace(b"question", b"\\ud83d\\u0041"),
        "latin-1": row.replace(b"question", b"\xfc"),
        "a raw zero byte": row.replace(b"question", b"\x00"),
        "open brackets": b"[" * 1_500,
        "a number of 5,000 digits": row.replace(number, key + b": " + b"9" * 5000),
        "a key twice, the last one wrong": row[:-1] + b', "id": 7, "instruction": 7, "chosen": 7}',
    }
    for text in (
        b"9" * 400,
        b"-" + b"9" * 400,
        b"1e400",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"+1",
        b"01",
        b".5",
    ):
        lines[f"the number {text[:9].decode()}"] = row.replace(number, key + b": " + text)
    unknown = {
        "half a surrogate, raw": b'"\xed\xa0\xbd"',
        "half a surrogate, escaped": b'"\\ud83d"',
        "NaN": b"NaN",
        "1e400": b"1e400",
        "5,000 digits": b"9" * 5000,
    }
    for what, value in unknown.items() if name != "annotations" else ():  # which passes over them
        lines[f"{what} under an unknown key"] = row[:-1] + b', "unknown": ' + value + b"}"
    lines["half a surrogate as an unknown key"] = row[:-1] + b', "\\ud83d": 1}'
    assert row not in lines.values()
    return lines


@pytest.mark.parametrize("name", RUNS)
def test_a_line_that_is_no_row(run, name):
    lines, failures = [json.dumps(row).encode() for row in good_rows(name)], []
    for what, line in spoiled(name).items():
        try:
            status, said, data = run(name, joined(name, [lines[0], line, lines[2]]))
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if status != 2 or (f"{data}: " if name == "annotations" else f"{data}:2: ") not in said:
            failures.append(f"{what}: status {status}, {said[:200]}")
    assert not failures, "\n" + "\n".join(failures)


@pytest.mark.parametrize("name", RUNS)
def test_a_file_in_another_encoding(run, name):
    data = as_bytes(name, good_rows(name))
    for encoded in (data.decode().encode("utf-16"), b"\x1f\x8b" + data, gzip.compress(data)[:-20]):
        status, said, path = run(name, encoded)
        assert status == 2 and f" {path}" in said


@pytest.mark.parametrize("name", [name for name in RUNS if name != "annotations"])
def test_lines_in_other_clothes(run, name):
    """Gzip, a byte order mark and blank lines; a torn gzip file is refused (above)."""
    lines = [json.dumps(row).encode() for row in good_rows(name)]
    data = joined(name, lines)
    expected = run(name, data)[:2]
    blank = b"\n" + b"\n \t\r\n".join(lines)
    for encoded in (
        b"\xef\xbb\xbf" + data,
        gzip.compress(data),
        blank,
        gzip.compress(b"\xef\xbb\xbf" + blank),
    ):
        assert run(name, encoded)[:2] == expected
    status, said, path = run(name, blank + b"\n\ntorn")
    assert status == 2 and f"{path}:8: " in said


@pytest.mark.parametrize("name", RUNS)
def test_what_is_odd_and_right_is_read_as_the_plain_row(run, name):
    lines = [json.dumps(row).encode() for row in good_rows(name)]
    row, number = lines[1], b'"category": "math"'
    odd = {
        "spaces": b"  " + row.replace(b": ", b"  :\t") + b"\t ",
        "a key twice, the last one right": b'{"prompt": 7, "instruction": 7, "responses": {}, "chosen": 7, '
        + row[1:],
        "a key twice, both right": row.replace(number, b'"category": "poems", ' + number),
        "escaped letters": row.replace(b"question", b"\\u0071uestion"),
        "an escaped pair": row.replace(b"question", b"\\ud83d\\ude00"),
        "an escaped zero": row.replace(b"question", b"\\u0000"),
        "400 digits under an unknown key": row[:-1] + b', "unknown": ' + b"9" * 400 + b"}",
        "exponents": row.replace(b"1.75", b"175e-2").replace(b"1.5", b"15E-1"),
    }
    if name == "annotations":  # every value of a known key must be right
        del odd["a key twice, the last one right"]
    for what, line in odd.items():
        assert line != row, what
        plain = as_bytes(name, [json.loads(text) for text in (lines[0], line, lines[2])])
        expected, found = run(name, plain)[:2], run(name, joined(name, [lines[0], line, lines[2]]))[:2]
        assert expected[0] == 0 and found == expected, what
    plain = run(name, joined(name, lines))[:2]
    assert plain[0] == 0
    for data in (joined(name, lines, end=b"\r\n"), joined(name, lines).rstrip(b"\n")):
        assert run(name, data)[:2] == plain


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"a": ', b"}")], ids=["lists", "objects"])
def test_nested_rows_are_read_or_refused(run, name, brackets):
    """What can be read may be too deep to be written: a sentence too."""
    lines = [json.dumps(row).encode() for row in good_rows(name)]
    statuses = []
    for depth in (100, 500, 900, 970, 980, 985, 990, 995, 1_000, 1_500):
        deep = brackets[0] * depth + b"1" + brackets[1] * depth
        deep = lines[1][:-1] + b', "unknown": ' + deep + b"}"
        statuses.append(run(name, joined(name, [lines[0], deep, lines[2]]))[0])
    assert statuses == sorted(statuses) and statuses[:2] == [0, 0]


# ----- what the types admit and the scripts must not
@pytest.mark.parametrize("name", [name for name, _, _ in ROWS])
def test_keys_of_a_response_that_only_other_rows_have(run, name):
    """A response's own "wins" or "cosine" is an unknown key: it is passed on, and not read as the row's."""
    for value in (None, 5, {"a": 1}):
        for extra in ("wins", "cosine"):
            rows = good_rows(name)
            for row in rows:
                del row["wins"]
                if name != "similarity":
                    del row["cosine"]
            expected = run(name, as_bytes(name, rows))[:2]
            for response in rows[1]["responses"]:
                response[extra] = value
            status, text, _ = run(name, as_bytes(name, rows))
            if name == "verify":  # a scorer passes it on
                text = text.replace(f', "{extra}": {json.dumps(value)}', "")
            assert expected[0] == 0 and (status, text) == expected, (extra, value)


@pytest.mark.parametrize("preference", [0.3, 0.999, 1e-9])
def test_a_preference_between_a_tie_and_a_loss(run, preference):
    """1 is a loss, 2 a win, and 0 the old spelling of a tie; what lies between 0 and 1 means nothing."""
    rows = with_change(good_rows("annotations"), ("preference",), preference)
    status, said, path = run("annotations", as_bytes("annotations", rows))
    assert status == 2 and f"{path}: " in said and "preference" in said
    for value, wins in ((0, (2, 1)), (1, (2, 0)), (2, (3, 0))):
        rows = with_change(good_rows("annotations"), ("preference",), value)
        result = json.loads(run("annotations", as_bytes("annotations", rows))[1])
        assert (result["n_wins"], result["n_draws"]) == wins


def test_a_model_against_itself_in_annotations(run):
    entries = good_rows("annotations")
    for entry in entries:
        entry["generator_1"] = entry["generator_2"]
    status, said, path = run("annotations", as_bytes("annotations", entries))
    assert status == 0 or f"{path}: " in said
