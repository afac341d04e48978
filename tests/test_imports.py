"""
data/import_responses.py: other people's files become our rows, merged by prompt, with their scores.

Covers  each format on a small file of its true shape (JSONL, a JSON list, parquet); several files; ratings
        that are no numbers; what is left out, counted; numbers, dates and texts that must stay as they are;
        bad files in one sentence with file and row; every key of every format missing, null and of each
        wrong type; the hub; the record; the script as a user starts it.
Run     python -m pytest tests/test_imports.py
"""

import copy
import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPO, read_rows, run_script, write_rows

import chat
from data import import_responses


def run_import(tmp_path, capsys, data, form="rows", *flags, out="off.jsonl"):
    """(rows, last line of standard output), and standard output has no other line."""
    files = list(map(str, data if isinstance(data, list) else [data]))
    flags = ["--format", form, "--data", *files, "--out", str(tmp_path / out), *flags]
    import_responses.main(import_responses.parse_args(flags))
    [line] = capsys.readouterr().out.splitlines()
    rows = (tmp_path / out).read_bytes().split(b"\n")[:-1]
    return [json.loads(row) for row in rows], json.loads(line)


def refused(tmp_path, capsys, data, form="rows", *flags):
    """The one sentence of a run that must be refused and write nothing."""
    with pytest.raises(SystemExit) as exit_status:
        run_import(tmp_path, capsys, data, form, *flags)
    assert exit_status.value.code == 2 and not (tmp_path / "off.jsonl").exists()
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == ""
    return said.err


def write_table(path, rows):
    """The rows as parquet, a JSON list or JSONL, by the file's name."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=4))
    else:
        write_rows(path, rows)
    return path


def texts_and_scores(row):
    return [(response["text"], response["scores"]) for response in row["responses"]]


def prompt_hash(text):
    return hashlib.sha256(f'[{{"content": "{text}", "role": "user"}}]'.encode()).hexdigest()[:16]


# ----- our own form
def test_rows_in_both_forms(tmp_path, capsys):
    given = [
        {"prompt": "one", "response": "a", "model": "m1", "answer": "1", "extra": None},
        {"id": 7, "prompt": "two", "responses": ["b", {"text": "c", "model": "m2"}]},
        {"prompt": [{"content": "one", "role": "user"}], "response": "d", "model": "m3"},
    ]
    data = write_rows(tmp_path / "data.jsonl", given)
    rows, printed = run_import(tmp_path, capsys, data)
    unknown = {"finish": None, "tokens": None, "token_ids": None, "tokenizer": None, "scores": None}
    one = {"prompt": [{"role": "user", "content": "one"}], "answer": "1", "extra": None}
    one["id"] = prompt_hash("one")
    one["responses"] = [{"text": "a", "source": "off", "model": "m1", **unknown}]
    one["responses"].append({"text": "d", "source": "off", "model": "m3", **unknown})
    two = {"id": "7", "prompt": [{"role": "user", "content": "two"}]}
    two["responses"] = [{"text": "b", "source": "off", "model": None, **unknown}]
    two["responses"].append({"text": "c", "source": "off", "model": "m2", **unknown})
    written = (tmp_path / "off.jsonl").read_text()
    assert written == "".join(json.dumps(row) + "\n" for row in (one, two))  # the order of keys too
    assert (printed["rows"], printed["responses"], printed["rows_merged_into_others"]) == (2, 4, 1)
    on, printed = run_import(tmp_path, capsys, data, "rows", "--source", "on", "--limit", "1", out="on.jsonl")
    assert len(on) == 1 and [response["source"] for response in on[0]["responses"]] == ["on", "on"]
    assert (printed["rows"], printed["responses"]) == (1, 2)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_rows_in_other_files(tmp_path, capsys, kind):
    answers = [{"text": f"t{k}", "model": "m", "scores": {"x": k / 3, "y": None}} for k in range(2)]
    given = [{"id": f"p{k}", "prompt": f"q{k}", "n": k, "responses": answers} for k in range(3)]
    expected, _ = run_import(tmp_path, capsys, write_table(tmp_path / "data.jsonl", given))
    rows, _ = run_import(tmp_path, capsys, write_table(tmp_path / f"data.{kind}", given), out="other.jsonl")
    assert rows == expected and texts_and_scores(rows[2])[1] == ("t1", {"x": 1 / 3, "y": None})


def test_the_demo_data_imports(tmp_path, capsys):
    rows, printed = run_import(tmp_path, capsys, REPO / "data" / "train.jsonl")
    lines = (REPO / "data" / "train.jsonl").read_text().splitlines()
    assert len(rows) == len(lines) == printed["rows"] and all(len(row["responses"]) >= 2 for row in rows)


def test_what_the_rows_carry_stays(tmp_path, capsys):
    scores = {"x": 1, "y": "N/A", "z": "2.5", "w": "nan", "v": "1e999"}
    answer = {"text": "a", "model": "m", "finish": "length", "scores": scores, "tokens": 5}
    row = {"prompt": "q", "source": "web", "dataset": "d", "responses": [answer, "b"], "labeler": "rm:x"}
    row |= {"wins": [[None, 1], [0, None]], "cosine": [[1, 0], [0, 1]]}  # of other rewards
    rows, printed = run_import(tmp_path, capsys, write_rows(tmp_path / "data.jsonl", [row]))
    assert rows[0].keys() == {"id", "prompt", "source", "dataset", "responses"}
    assert (rows[0]["source"], rows[0]["dataset"]) == ("web", "d")  # a row's source is no response's source
    expected = {"x": 1.0, "y": None, "z": 2.5, "w": None, "v": None}
    assert texts_and_scores(rows[0]) == [("a", expected), ("b", None)]
    finishes = [(response["finish"], response["tokens"]) for response in rows[0]["responses"]]
    assert finishes == [("length", None), (None, None)] and printed["truncated"] == 1


VALUES = ["2020-01-01", '{"a": 1}', "7", "null", "\u00fc\u2028\x85\r\nx", "</b>\x00", "\U0001f600"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("value", VALUES)
def test_a_text_stays_as_it_is(tmp_path, capsys, kind, value):
    """Readers that guess types turn a column of dates into dates, and JSON in texts into objects."""
    given = [{"instruction": f"{value}{k}", "output": value, "generator": value} for k in range(3)]
    rows, _ = run_import(tmp_path, capsys, write_table(tmp_path / f"data.{kind}", given), "alpaca_eval")
    assert [row["prompt"][0]["content"] for row in rows] == [f"{value}{k}" for k in range(3)]
    responses = [response for row in rows for response in row["responses"]]
    assert [(one["text"], one["model"]) for one in responses] == [(value, value)] * 3


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_score_keeps_all_its_digits(tmp_path, capsys, kind):
    scores = [1.2345678901234567, 0.1 + 0.2, 1e-12, 1e300]
    given = [{**copy.deepcopy(ULTRA[0]), "prompt_id": None, "score_chosen": score} for score in scores]
    rows, _ = run_import(tmp_path, capsys, write_table(tmp_path / f"d.{kind}", given), FORM_OF_PAIRS)
    assert [row["responses"][0]["scores"]["ultrafeedback"] for row in rows] == scores


def test_dates_and_missing_numbers_of_a_parquet_file(tmp_path, capsys):
    import datetime

    given = [{"prompt": "q", "response": "a", "day": datetime.date(2024, 5, 17), "n": float("nan")}]
    rows, _ = run_import(tmp_path, capsys, write_table(tmp_path / "data.parquet", given))
    assert (rows[0]["day"], rows[0]["n"]) == ("2024-05-17", None)
    assert "NaN" not in (tmp_path / "off.jsonl").read_text()


def test_files_are_merged_by_prompt(tmp_path, capsys):
    first = {"id": "a", "prompt": "q", "response": "r", "model": "m1"}
    one = write_rows(tmp_path / "one.jsonl", [first, {"prompt": "p", "response": "s"}])
    second = [{"id": "b", "prompt": "q", "response": "r", "model": "m2"}]
    second.append({"id": "c", "prompt": "other", "response": "t", "model": "m2"})
    two = write_table(tmp_path / "two.parquet", second)
    rows, printed = run_import(tmp_path, capsys, [one, two])
    assert [row["id"] for row in rows] == ["a", prompt_hash("p"), "c"]
    assert [row["prompt"][0]["content"] for row in rows] == ["q", "p", "other"]
    models = [(response["text"], response["model"]) for response in rows[0]["responses"]]
    assert models == [("r", "m1"), ("r", "m2")]  # both are kept
    assert (printed["rows"], printed["responses"], printed["rows_merged_into_others"]) == (3, 4, 1)
    clash = [{"id": "b", "prompt": "p", "response": "x"}, {"id": "a", "prompt": "new", "response": "x"}]
    clash = write_rows(tmp_path / "clash.jsonl", clash)
    (tmp_path / "off.jsonl").unlink()
    err = refused(tmp_path, capsys, [one, clash])
    assert "clash.jsonl:2: the id a has another prompt in an earlier row" in err


def test_other_keys_of_a_turn_stay(tmp_path, capsys):
    turn = {"name": "n", "content": "q", "role": "user"}
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": [turn], "response": "a"}])
    [row], _ = run_import(tmp_path, capsys, data)
    assert list(row["prompt"][0].items()) == [("role", "user"), ("content", "q"), ("name", "n")]


def test_empty_and_cut_responses_are_counted(tmp_path, capsys):
    answers = ["", " ", "Hi", {"text": "x", "finish": "length"}, {"text": "y", "finish": "stop"}]
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "q", "responses": answers}])
    _, printed = run_import(tmp_path, capsys, data)
    assert [printed[name] for name in ("rows", "responses", "empty", "truncated")] == [1, 5, 2, 1]


def test_reasoning_stays_in_its_text(tmp_path, capsys):
    answers = ["<think>\na\n</think>\n\nb ", "<think>a</think>\n", "a\n</think>"]
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "q", "responses": answers}])
    [row], printed = run_import(tmp_path, capsys, data)
    assert [one["text"] for one in row["responses"]] == answers and printed["empty"] == 2
    assert [chat.answer(one) for one in row["responses"]] == ["b", "", ""]


# ----- UltraFeedback, binarized
FORM_OF_PAIRS = "ultrafeedback_binarized"


def ultra(k):
    row = {"prompt": "x", "prompt_id": f"id{k % 3}", "score_chosen": 8.0 + k, "score_rejected": 5.5}
    for side, text in (("chosen", "good"), ("rejected", "bad")):
        answer = {"role": "assistant", "content": f"{text} {k}"}
        row[side] = [{"role": "user", "content": f"q{k % 3}"}, answer]
    return row


ULTRA = [ultra(k) for k in range(4)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_ultrafeedback_binarized(tmp_path, capsys, kind):
    data = write_table(tmp_path / f"train_prefs.{kind}", ULTRA)
    rows, printed = run_import(tmp_path, capsys, data, FORM_OF_PAIRS)
    assert [row["id"] for row in rows] == ["id0", "id1", "id2", "id0-2"]  # a row stays a pair
    assert printed["rows_merged_into_others"] == 0 and printed["dropped"] == {}
    assert [row["prompt"][0]["content"] for row in rows] == ["q0", "q1", "q2", "q0"]
    for k, row in enumerate(rows):
        scores = [{"ultrafeedback": score} for score in (8.0 + k, 5.5)]
        assert texts_and_scores(row) == list(zip([f"good {k}", f"bad {k}"], scores))
    assert {response["source"] for row in rows for response in row["responses"]} == {"off"}


ONE_PROMPT = "expected chosen and rejected to be one prompt and two answers of the assistant to it"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda row: row.pop("rejected"), "rejected"),
        (lambda row: row["rejected"][0].update(content="another"), ONE_PROMPT),
        (lambda row: row["chosen"][1].update(role="user"), ONE_PROMPT),
        (lambda row: row["chosen"].pop(), "chosen"),
        (lambda row: row.update(rejected=[]), "rejected"),
        (lambda row: row.update(chosen="text"), "chosen"),
        (lambda row: row.update(chosen=["a", "b"]), "chosen"),
        (lambda row: row["chosen"][1].update(content=None), "content"),
    ],
)
def test_bad_rows_of_ultrafeedback_binarized(tmp_path, capsys, change, sentence):
    rows = copy.deepcopy(ULTRA)
    change(rows[2])
    err = refused(tmp_path, capsys, write_rows(tmp_path / "bad.jsonl", rows), FORM_OF_PAIRS)
    assert sentence in err.split("bad.jsonl:3: ")[1]


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"prompt": "q"}, 'expected "response" or a list "responses", found prompt'),
        ({"prompt": "q", "responses": []}, 'expected "response" or a list'),
        ({"response": "a"}, "prompt"),
        ({"prompt": "q", "response": None}, "response"),
        ({"prompt": "q", "responses": [{"model": "m"}]}, "text"),
        ({"prompt": [], "response": "a"}, "expected a prompt that ends with a user turn"),
        (
            {"prompt": [{"role": "assistant", "content": "q"}], "response": "a"},
            "expected a prompt that ends with a user turn",
        ),
        ({"prompt": "q", "responses": [{"text": "a", "scores": 7}]}, "scores"),
        ({"prompt": "q", "responses": [{"text": "a", "finish": "eos"}]}, "finish"),
        (
            {"id": "same", "prompt": "other", "response": "a"},
            "the id same has another prompt in an earlier",
        ),
        ({"id": 1.5, "prompt": "other", "response": "a"}, "$.id"),
    ],
)
def test_bad_rows_to_import(tmp_path, capsys, row, sentence):
    data = write_rows(tmp_path / "bad.jsonl", [{"id": "same", "prompt": "q", "response": "a"}, row])
    err = refused(tmp_path, capsys, data)
    assert sentence in err.split("bad.jsonl:2: ")[1]


# ----- UltraFeedback
NAMES = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def completion(model, overall, fine, *ratings):
    notes = {name: {"Rating": value, "Rationale": "..."} for name, value in zip(NAMES, ratings)}
    scores = {"overall_score": overall, "fine-grained_score": fine}
    return {"model": model, "response": f"by {model}", **scores, "critique": "...", "annotations": notes}


def instruction(source, text, *completions):
    row = {"source": source, "instruction": text, "models": [], "correct_answers": ["x"]}
    return {**row, "completions": list(completions)}


FOUR = [
    instruction(
        "truthful_qa",
        "q0",
        completion("a", 7.5, 4.25, "4", "5", "3", "5"),
        completion("b", 10.0, 1.5, "N/A", "1", "2", "1"),
    ),
    instruction("flan", "q1"),
    instruction("sharegpt", "q0", completion("c", None, None, "N/A", "N/A", "", "5")),
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_ultrafeedback(tmp_path, capsys, kind):
    data = write_table(tmp_path / f"uf.{kind}", FOUR)
    (row,), printed = run_import(tmp_path, capsys, data, "ultrafeedback")
    names = ("overall_score", "fine-grained_score", *NAMES)
    assert texts_and_scores(row) == [
        ("by a", dict(zip(names, (7.5, 4.25, 4.0, 5.0, 3.0, 5.0)))),
        ("by b", dict(zip(names, (10.0, 1.5, None, 1.0, 2.0, 1.0)))),
        ("by c", dict(zip(names, (None, None, None, None, None, 5.0)))),
    ]
    assert row["prompt"] == [{"role": "user", "content": "q0"}] and row["id"] == prompt_hash("q0")
    assert row["dataset"] == "truthful_qa" and "source" not in row
    sources = [(response["model"], response["source"]) for response in row["responses"]]
    assert sources == [("a", "off"), ("b", "off"), ("c", "off")]
    assert (printed["rows_merged_into_others"], printed["responses"]) == (1, 3)
    assert printed["dropped"] == {"without responses": 1}


# ----- HelpSteer2
def steer(prompt, response, *values):
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, values))}


TURNS = "first\n\n<extra_id_1>Assistant\nsecond\nline\n<extra_id_1>User\nthird"
STEER = [
    steer("c#", "one", 3, 4, 4, 2, 2),
    steer("c#", "two", 4, 4, 4, 1, 3),
    steer(TURNS, "three", 0, 1, 2, None, 3),
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_helpsteer2(tmp_path, capsys, kind):
    data = write_table(tmp_path / f"hs.{kind}", STEER)
    rows, printed = run_import(tmp_path, capsys, data, "helpsteer2")
    first, second, third = {"content": "first\n"}, {"content": "second\nline"}, {"content": "third"}
    conversation = [{"role": "user", **first}, {"role": "assistant", **second}, {"role": "user", **third}]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "c#"}], conversation]
    assert [response["text"] for row in rows for response in row["responses"]] == ["one", "two", "three"]
    scores = [response["scores"] for row in rows for response in row["responses"]]
    # .65 * 3 + .8 * 4 + .45 * 4 + .55 * 2 - .4 * 2 and .65 * 4 + .8 * 4 + .45 * 4 + .55 * 1 - .4 * 3
    assert [one["helpsteer2"] for one in scores] == [7.25, 6.95, None]
    ratings = {"helpfulness": 3.0, "correctness": 4.0, "coherence": 4.0, "complexity": 2.0, "verbosity": 2.0}
    assert scores[0] == {**ratings, "helpsteer2": 7.25} and printed["rows_merged_into_others"] == 1
    assert scores[2]["complexity"] is None and scores[2]["helpfulness"] == 0.0


def test_equal_rewards_of_helpsteer2_tie(tmp_path, capsys):
    """Both sums are 0.45, but for the rounding of floating point."""
    rows = [steer("q", "a", 0, 0, 0, 3, 3), steer("q", "b", 0, 0, 1, 0, 0)]
    [row], _ = run_import(tmp_path, capsys, write_rows(tmp_path / "hs.jsonl", rows), "helpsteer2")
    assert [scores["helpsteer2"] for _, scores in texts_and_scores(row)] == [0.45] * 2


# ----- OpenAssistant 2
def message(number, parent, text, role="assistant", lang="en", deleted=False, rank=None):
    row = {"message_id": f"m{number}", "parent_id": parent if parent is None else f"m{parent}"}
    row |= {"text": text, "role": role, "lang": lang, "deleted": deleted}
    return {**row, "review_result": True, "rank": rank}


TREES = [
    message(0, None, "q0", "prompter"),
    message(1, 0, "a", rank=1),
    message(2, 0, "b", rank=0),
    message(3, 0, "c"),
    message(4, 1, "again", "prompter"),  # a second turn
    message(5, 4, "later"),
    message(6, None, "zwei", "prompter", "de"),
    message(7, 6, "x", lang="de"),
    message(8, 6, "y", lang="de"),
    message(9, 10, "before its prompt", rank=2),
    message(10, None, "q10", "prompter"),
    message(11, 10, "d", rank=0),
    message(12, 10, "gone", deleted=True),  # and three that are left
    message(13, 10, "e", rank=1),
    message(14, None, "drei", "prompter", "de"),
    *(message(k, 14, f"g{k}", lang="de") for k in (15, 16, 17)),
    message(18, None, "hidden", "prompter", deleted=True),
    message(19, 18, "h"),
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_oasst2_keeps_first_turns_with_three_answers(tmp_path, capsys, kind):
    data = write_table(tmp_path / f"oasst.{kind}", TREES)
    rows, printed = run_import(tmp_path, capsys, data, "oasst2")
    prompts = [(row["id"], row["prompt"][0]["content"], row["lang"]) for row in rows]
    assert prompts == [("m0", "q0", "en"), ("m10", "q10", "en"), ("m14", "drei", "de")]
    ranks = [("a", 1.0), ("b", 0.0), ("c", None)]
    assert texts_and_scores(rows[0]) == [(text, {"oasst2_rank": rank}) for text, rank in ranks]
    assert [response["text"] for response in rows[1]["responses"]] == ["before its prompt", "d", "e"]
    # zwei and its two answers; hidden, gone; again, later, h; so all 20 messages are accounted for
    reasons = {"prompt with under 3 answers": 1, "answer to such a prompt": 2}
    reasons |= {"deleted message": 2, "message of a later turn": 3}
    assert printed["dropped"] == reasons and (printed["rows"], printed["responses"]) == (3, 9)
    (tmp_path / "off.jsonl").unlink()
    err = refused(tmp_path, capsys, write_table(tmp_path / f"few.{kind}", TREES[:3]), "oasst2")
    assert f"few.{kind}: no prompt with responses is left; dropped: " in err
    assert '"prompt with under 3 answers": 1' in err


def test_oasst2_in_two_files(tmp_path, capsys):
    files = [write_table(tmp_path / "1.jsonl", TREES[:2]), write_table(tmp_path / "2.parquet", TREES[2:6])]
    rows, _ = run_import(tmp_path, capsys, files, "oasst2")
    assert [response["text"] for response in rows[0]["responses"]] == ["a", "b", "c"]


# ----- AlpacaEval
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_outputs_of_alpaca_eval(tmp_path, capsys, kind):
    files = []
    for name in ("gpt4", "mine"):
        outputs = [{"instruction": f"q{k}", "output": f"{name} {k}", "generator": name} for k in range(2)]
        outputs = [{**row, "dataset": f"d{k}"} for k, row in enumerate(outputs)]
        files.append(write_table(tmp_path / f"{name}.{kind}", outputs))
    rows, printed = run_import(tmp_path, capsys, files, "alpaca_eval")
    assert [(row["prompt"][0]["content"], row["dataset"]) for row in rows] == [("q0", "d0"), ("q1", "d1")]
    for k, row in enumerate(rows):
        answers = [(response["model"], response["text"], response["scores"]) for response in row["responses"]]
        assert answers == [("gpt4", f"gpt4 {k}", None), ("mine", f"mine {k}", None)]
    assert printed["rows_merged_into_others"] == 2


# ----- bad files
OUTPUTS = [{"instruction": f"q{k}", "output": "a", "generator": "m", "dataset": "d"} for k in range(3)]
ANSWER = {"text": "a", "model": "m", "finish": "stop", "scores": {"x": 1.5}}
ROWS = [{"id": f"p{k}", "prompt": [{"role": "user", "content": f"q{k}"}]} for k in range(3)]
ROWS = [{**row, "category": "math", "responses": [dict(ANSWER), "b"]} for row in ROWS]
GOOD = {"rows": ROWS, "ultrafeedback": FOUR, "helpsteer2": STEER, "oasst2": TREES, "alpaca_eval": OUTPUTS}
GOOD[FORM_OF_PAIRS] = ULTRA
REQUIRED = {  # {format: {path: what it may be, as JSON's types}}, by hand
    "rows": {"prompt": "str list", "prompt.0.role": "str", "prompt.0.content": "str"},
    "ultrafeedback": {"source": "str null", "instruction": "str list", "completions": "list"},
    "helpsteer2": {"prompt": "str list", "response": "str"},
    "oasst2": {"message_id": "str", "parent_id": "str null", "text": "str", "role": "str"},
    "alpaca_eval": {"instruction": "str list", "output": "str", "generator": "str"},
    FORM_OF_PAIRS: {"chosen": "list", "rejected": "list", "chosen.1.content": "str", "chosen.0.role": "str"},
}
REQUIRED["rows"]["responses.0.text"] = "str"
REQUIRED["ultrafeedback"]["completions.0.response"] = "str"
OPTIONAL = {  # the same of keys that may be missing
    "rows": {
        "id": "str int null",
        "responses": "list",
        "responses.0": "str dict",
        "responses.0.model": "str null",
        "responses.0.finish": "null",
        "responses.0.scores": "dict null",
        "responses.0.scores.x": "any",
        "category": "any",
    },
    "ultrafeedback": {
        "completions.0": "dict",
        "completions.0.model": "str null",
        "completions.0.overall_score": "any",
        "completions.0.annotations": "dict null",
        "completions.0.annotations.honesty": "dict null",
        "completions.0.annotations.honesty.Rating": "any",
    },
    "helpsteer2": {},
    "oasst2": {"lang": "any", "deleted": "any", "rank": "any"},
    "alpaca_eval": {"dataset": "any"},
    FORM_OF_PAIRS: {"prompt_id": "any", "score_chosen": "any", "chosen.0": "dict"},
}
WRONG = {"null": None, "bool": True, "int": 3, "float": 1.5, "str": "x", "list": [["x"]], "dict": {"a": [1]}}


def spoiled(rows, path, value, number=2):
    """A copy of the rows in which a place of one row is another value, or is not there (KeyError)."""
    rows = copy.deepcopy(rows)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = rows[number]
    for key in parents:
        place = place[key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return rows


CASES = []
for table, missing_is_refused in ((REQUIRED, True), (OPTIONAL, False)):
    for form, paths in table.items():
        CASES += [(form, path, types.split(), missing_is_refused) for path, types in paths.items()]
CASES += [("helpsteer2", name, ["any"], True) for name in import_responses.WEIGHTS]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("form, path, types, needed", CASES, ids=lambda value: str(value)[:40])
def test_every_key_missing_null_and_of_each_type(tmp_path, capsys, kind, form, path, types, needed):
    """What the shape does not admit is refused with its row; the rest gives rows or one sentence."""
    values = dict(WRONG, **({"missing": KeyError} if not path[-1].isdigit() else {}))
    for name, value in values.items():
        rows = spoiled(GOOD[form], path, value)
        data = write_table(tmp_path / f"bad.{kind}", rows)
        admitted = not needed if value is KeyError else name in types or "any" in types
        out = tmp_path / "off.jsonl"
        out.unlink(missing_ok=True)
        if not admitted:
            err = refused(tmp_path, capsys, data, form)
            key = "[...]" if "honesty" in path else path.rpartition(".")[2]
            assert f"bad.{kind}:3: " in err and key in err, (name, err)
            continue
        try:
            run_import(tmp_path, capsys, data, form)
        except SystemExit as status:
            err = capsys.readouterr().err
            assert status.code == 2 and err.count("\n") == 1 and f"bad.{kind}" in err, (name, err)
        else:
            for row in out.read_text().splitlines():
                json.loads(row, parse_constant=lambda constant: pytest.fail(f"wrote {constant}"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("form", GOOD)
def test_a_table_without_the_columns_or_without_rows(tmp_path, capsys, form, kind):
    err = refused(tmp_path, capsys, write_table(tmp_path / f"bad.{kind}", [{"other": 1}]), form)
    assert f"bad.{kind}:1: " in err
    write_table(tmp_path / f"none.{kind}", [{"other": 1}][:0])
    err = refused(tmp_path, capsys, tmp_path / f"none.{kind}", form)
    sentence = "expected JSON lines, found no file or an empty one"
    if kind != "jsonl":
        sentence = "no prompt with responses is left; dropped: {"
    assert f"none.{kind}: {sentence}" in err


@pytest.mark.parametrize("form", GOOD)
def test_files_that_cannot_be_read(tmp_path, capsys, form):
    line = json.dumps(GOOD[form][0])
    for name, content, sentence in (
        ("list.json", b'[{"a": 1},', ": "),
        ("numbers.json", b"[7]", ":1: "),
        ("brackets.json", b"[" * 1_500, ": "),
        ("torn.jsonl", f"{line}\n{line[:-3]}\n".encode(), ":2: "),
        ("list.jsonl", f"[{line},".encode(), ": cannot be read: "),
        ("nan.jsonl", line[:-1].encode() + b', "unknown": NaN}', ":1: "),
        ("latin.jsonl", b'{"a": "\xfc"}', ":1: "),
        ("latin.json", b'[{"a": "\xfc"}]', ": "),
        ("surrogate.json", b'[{"a": "\\ud83d"}]', ": "),
        ("deep.jsonl", b'{"a": ' + b"[" * 1_500 + b"]" * 1_500 + b"}", ":1: "),
        ("text.parquet", b"no parquet", ": "),
        ("empty.parquet", b"", ": "),
        ("empty.json", b"", ": expected JSON lines, found no file or an empty one"),
    ):
        (tmp_path / name).write_bytes(content)
        assert f"{name}{sentence}" in refused(tmp_path, capsys, tmp_path / name, form)
    (tmp_path / "folder.parquet").mkdir()
    for name in ("none.jsonl", "none.json", "none.parquet", "folder.parquet", "."):
        assert f"{tmp_path / name}: " in refused(tmp_path, capsys, tmp_path / name, form)


def test_a_parquet_file_with_a_wrong_type(tmp_path, capsys):
    data = write_table(tmp_path / "bad.parquet", [{"instruction": "q", "output": 7, "generator": "m"}])
    err = refused(tmp_path, capsys, data, "alpaca_eval")
    assert "output" in err.split("bad.parquet:1: ")[1]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_the_output_is_no_input(tmp_path, capsys, kind):
    data = write_table(tmp_path / f"off2.{kind}", OUTPUTS)
    content = data.read_bytes()
    (tmp_path / f"link.{kind}").symlink_to(data)
    for out in (f"off2.{kind}", f"link.{kind}", "off2.txt"):  # off2.txt would have the record off2.meta.json
        with pytest.raises(SystemExit) as status:
            run_import(tmp_path, capsys, data, "alpaca_eval", out=out)
        assert (
            status.value.code == 2
            and "this would overwrite an input file or its record" in capsys.readouterr().err
        )
        assert data.read_bytes() == content and not (tmp_path / "off2.meta.json").exists()


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--limit", "-1"], ["--split", "train"]])
def test_flags_that_mean_nothing(tmp_path, capsys, flags):
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(SystemExit) as status:
        run_import(tmp_path, capsys, data, "rows", *flags)
    assert status.value.code == 2 and "at least 1, and --split is about a hub id" in capsys.readouterr().err


def test_the_record_and_a_second_run(tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", FOUR)
    _, printed = run_import(tmp_path, capsys, data, "ultrafeedback")
    meta = json.loads((tmp_path / "off.meta.json").read_text())
    assert {"out": str(tmp_path / "off.jsonl"), **meta["counts"]} == printed
    assert meta["inputs"] == {data: hashlib.sha256((tmp_path / "data.jsonl").read_bytes()).hexdigest()}
    assert meta["args"]["format"] == "ultrafeedback" and meta["hub_files"] == {}
    write_rows(tmp_path / "data.jsonl", FOUR[:1])  # what is there is replaced
    rows, printed = run_import(tmp_path, capsys, data, "ultrafeedback")
    assert len(rows[0]["responses"]) == printed["responses"] == 2
    assert json.loads((tmp_path / "off.meta.json").read_text())["counts"]["responses"] == 2
    write_rows(tmp_path / "data.jsonl", [{"other": 1}])  # and stays if the new run is refused
    with pytest.raises(SystemExit):
        run_import(tmp_path, capsys, data, "ultrafeedback")
    assert read_rows(tmp_path / "off.jsonl") == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "off.jsonl", "off.meta.json"]


# ----- the hub
@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(split=rows, ...) makes a folder that stands for org/name, and lists what is asked of it."""
    datasets = pytest.importorskip("datasets")
    folder, load_dataset, asked = tmp_path / "repo", datasets.load_dataset, []
    folder.mkdir()

    def load(name, **flags):
        asked.append((name, flags))
        return load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **flags)

    def write(**splits):
        parts = [f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits]
        head = "---\nconfigs:\n- config_name: default\n  data_files:\n"
        (folder / "README.md").write_text(head + "".join(parts) + "---\n")
        for split, rows in splits.items():
            write_rows(folder / f"{split}.jsonl", rows)
        return asked

    monkeypatch.setattr(datasets, "load_dataset", load)
    datasets.disable_progress_bars()
    yield write
    datasets.enable_progress_bars()


def test_a_data_set_of_the_hub(tmp_path, capsys, publish):
    given = [{"prompt": "q0", "response": "a", "n": 1}, {"prompt": "q1", "responses": ["b", "c"], "day": "x"}]
    asked = publish(train=given, test=[{"prompt": "q2", "response": "d"}])
    rows, printed = run_import(tmp_path, capsys, "org/name-v1.5", "rows")
    assert asked == [("org/name-v1.5", {"split": "train"})] and printed["responses"] == 3
    # `datasets` gives both rows the keys n, day, response and responses
    assert [row.keys() - {"id", "prompt", "responses"} for row in rows] == [{"n"}, {"day"}]
    meta = json.loads((tmp_path / "off.meta.json").read_text())
    assert meta["hub_files"]["org/name-v1.5"][0]["filename"].endswith(".arrow") and meta["inputs"] == {}
    local = write_rows(tmp_path / "local.jsonl", given)
    rows, printed = run_import(tmp_path, capsys, ["org/name", local], "rows", "--split", "test")
    assert [row["prompt"][0]["content"] for row in rows] == ["q2", "q0", "q1"]
    assert asked[-1] == ("org/name", {"split": "test"})


@pytest.mark.parametrize("form", GOOD)
def test_the_hub_gives_the_rows_of_the_file(tmp_path, capsys, publish, form):
    split = {FORM_OF_PAIRS: "train_prefs", "alpaca_eval": "eval"}.get(form, "train")
    asked = publish(first=GOOD[form][:3], **{split: GOOD[form]})
    expected = run_import(tmp_path, capsys, write_rows(tmp_path / "local.jsonl", GOOD[form]), form)
    rows, printed = run_import(tmp_path, capsys, "org/name", form)
    assert (rows, printed) == expected and asked == [("org/name", {"split": split})]


def test_a_hub_without_the_split_or_the_columns(tmp_path, capsys, publish):
    publish(train=[{"prompt": "q0", "response": "a"}])
    assert "eval" in refused(tmp_path, capsys, "org/name", "alpaca_eval").split("org/name: ")[1]
    err = refused(tmp_path, capsys, "org/name", "helpsteer2")
    assert "helpfulness" in err.split("org/name:1: ")[1]
    publish(train=[{"prompt": "q0", "response": "a"}], test=[{"prompt": "q0", "b": "a"}])
    err = refused(tmp_path, capsys, "org/name", "rows", "--split", "test")
    assert "org/name: " in err


def test_no_hub(tmp_path, capsys):
    pytest.importorskip("datasets")
    assert "no/such: " in refused(tmp_path, capsys, "no/such", "helpsteer2")


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here").write_text("")
    names = ["org/name", "allenai/llama-3.1-tulu", "org/here", "org/x.jsonl", "org/x.json", "org/x.parquet"]
    names += ["/org/name", "name", "./org/name", "org/one/two", "org/"]
    assert list(filter(import_responses.is_hub_id, names)) == ["org/name", "allenai/llama-3.1-tulu"]


# ----- as a user starts it
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_the_script(tmp_path, monkeypatch, kind):
    data = write_table(tmp_path / f"data.{kind}", STEER)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    command = ["data/import_responses.py", "--format", "helpsteer2", "--data", data]
    printed, err = run_script(*command, "--out", tmp_path / "new" / "off.jsonl")
    assert (printed["rows"], printed["responses"]) == (2, 3) and err == ""
    assert len(read_rows(tmp_path / "new" / "off.jsonl")) == 2
    assert not list((tmp_path / "home").iterdir())  # local files leave no cache behind
    _, err = run_script(*command, tmp_path / "none.jsonl", "--out", tmp_path / "x.jsonl", expect=2)
    assert (
        err
        == f"import_responses.py: {tmp_path}/none.jsonl: expected JSON lines, found no file or an empty one\n"
    )
