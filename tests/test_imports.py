"""
generate.py --import-format: other people's files become our rows, merged by prompt, with their scores.

Covers  each format on a small file of its true shape (JSONL, parquet, a JSON list); several files; ratings that are no
        numbers; what is left out, counted; bad files in one sentence with file and row; the hub's parquet.
Run     python -m pytest tests/test_imports.py
"""

import hashlib
import json

import generate
import pytest
from conftest import REPO, read_rows, write_rows


def import_file(tmp_path, capsys, data, form="rows", *flags, out="off.jsonl"):
    files = map(str, data if isinstance(data, list) else [data])
    generate.main(generate.parse_args(["--import-format", form, "--import-data", *files, "--out", str(tmp_path / out), *flags]))
    return read_rows(tmp_path / out), json.loads(capsys.readouterr().out.splitlines()[-1])


def import_refused(tmp_path, capsys, data, form="rows", *flags):
    with pytest.raises(SystemExit) as exit_status:
        import_file(tmp_path, capsys, data, form, *flags)
    assert exit_status.value.code == 2 and not (tmp_path / "off.jsonl").exists()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def write_table(path, rows):
    """The rows as parquet, a JSON list or JSONL, by the file's name."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=4))
    else:
        write_rows(path, rows)
    return path


def texts_and_scores(row):
    return [(response["text"], response["scores"]) for response in row["responses"]]


def test_rows_in_both_forms(tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [
        {"prompt": "one", "response": "a", "model": "m1", "answer": "1"},
        {"id": 7, "prompt": "two", "responses": ["b", {"text": "c", "model": "m2"}]},
        {"prompt": [{"role": "user", "content": "one"}], "response": "d", "model": "m3"}])
    rows, printed = import_file(tmp_path, capsys, data)
    unknown = {"finish": None, "tokens": None, "token_ids": None, "tokenizer": None, "scores": None}
    one = hashlib.sha256(b'[{"content": "one", "role": "user"}]').hexdigest()[:16]
    assert rows == [
        {"prompt": [{"role": "user", "content": "one"}], "answer": "1", "id": one, "responses": [
            {"text": "a", "source": "off", "model": "m1", **unknown},
            {"text": "d", "source": "off", "model": "m3", **unknown}]},
        {"prompt": [{"role": "user", "content": "two"}], "id": "7", "responses": [
            {"text": "b", "source": "off", "model": None, **unknown},
            {"text": "c", "source": "off", "model": "m2", **unknown}]}]
    assert (printed["rows"], printed["responses"], printed["rows_merged_into_others"]) == (2, 4, 1)
    on, _ = import_file(tmp_path, capsys, data, "rows", "--source", "on", "--limit", "1", out="on.jsonl")
    assert len(on) == 1 and [response["source"] for response in on[0]["responses"]] == ["on", "on"]


def test_the_demo_data_imports(tmp_path, capsys):
    rows, printed = import_file(tmp_path, capsys, REPO / "data" / "demo_train.jsonl")
    lines = (REPO / "data" / "demo_train.jsonl").read_text().splitlines()
    assert len(rows) == len(lines) == printed["rows"] and all(len(row["responses"]) >= 2 for row in rows)


ULTRA = [{"prompt": "x", "prompt_id": f"id{k % 3}", "score_chosen": 8.0 + k, "score_rejected": 5.5,
          "chosen": [{"role": "user", "content": f"q{k % 3}"}, {"role": "assistant", "content": f"good {k}"}],
          "rejected": [{"role": "user", "content": f"q{k % 3}"}, {"role": "assistant", "content": f"bad {k}"}]}
         for k in range(4)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ultrafeedback_binarized(tmp_path, capsys, kind):
    data = write_table(tmp_path / f"train_prefs.{kind}", ULTRA)
    rows, printed = import_file(tmp_path, capsys, data, "ultrafeedback_binarized")
    assert [row["id"] for row in rows] == ["id0", "id1", "id2"] and printed["rows_merged_into_others"] == 1
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": f"q{k}"}] for k in range(3)]
    assert [response["text"] for response in rows[0]["responses"]] == ["good 0", "bad 0", "good 3", "bad 3"]
    assert [response["scores"] for response in rows[0]["responses"]] == [{"ultrafeedback": score}
                                                                         for score in (8.0, 5.5, 11.0, 5.5)]
    assert {response["source"] for row in rows for response in row["responses"]} == {"off"}


@pytest.mark.parametrize("change, sentence", [
    (lambda row: row.pop("rejected"), ":3: expected the key 'rejected'"),
    (lambda row: row["rejected"][0].update(content="another"), ":3: chosen and rejected answer different prompts"),
    (lambda row: row["chosen"].pop(), ":3: expected chosen to be messages that end with the assistant's"),
    (lambda row: row.update(chosen="text"), ":3: expected chosen to be messages that end with the assistant's"),
    (lambda row: row.update(chosen=["a", "b"]), ":3: expected chosen to be messages that end with the assistant's"),
    (lambda row: row["chosen"][1].update(content=None), ":3: expected a response in text"),
])
def test_bad_rows_of_ultrafeedback(tmp_path, capsys, change, sentence):
    rows = json.loads(json.dumps(ULTRA))
    change(rows[2])
    err = import_refused(tmp_path, capsys, write_rows(tmp_path / "bad.jsonl", rows), "ultrafeedback_binarized")
    assert f"bad.jsonl{sentence}" in err and err.count("\n") == 1


@pytest.mark.parametrize("row, sentence", [
    ({"prompt": "q"}, ':2: expected "response" or a list "responses", found prompt'),
    ({"response": "a"}, ":2: expected the key 'prompt'"),
    ({"prompt": "q", "response": None}, ":2: expected a response in text"),
    ({"prompt": "q", "responses": []}, ':2: expected "response" or a list'),
    ({"prompt": "q", "responses": [{"model": "m"}]}, ":2: expected a response in text"),
    ({"prompt": [{"role": "assistant", "content": "q"}], "response": "a"},
     ":2: expected a prompt that ends with a user turn"),
    ({"prompt": "q", "responses": [{"text": "a", "scores": 7}]}, ":2: expected a response's scores to be an object, found 7"),
    ({"id": "same", "prompt": "other", "response": "a"}, ":2: the id same stands for two prompts"),
])
def test_bad_rows_to_import(tmp_path, capsys, row, sentence):
    data = write_rows(tmp_path / "bad.jsonl", [{"id": "same", "prompt": "q", "response": "a"}, row])
    assert f"{sentence}" in import_refused(tmp_path, capsys, data)


def test_a_parquet_file_that_is_none(tmp_path, capsys):
    (tmp_path / "bad.parquet").write_text("no parquet")
    assert "bad.parquet: expected a parquet file" in import_refused(tmp_path, capsys, tmp_path / "bad.parquet",
                                                                    "ultrafeedback_binarized")
    data = write_table(tmp_path / "short.parquet", [{"chosen": "a"}])
    err = import_refused(tmp_path, capsys, data, "ultrafeedback_binarized")
    assert "short.parquet: expected the column 'rejected', found chosen" in err


def test_what_the_rows_carry_stays(tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "q", "source": "web", "dataset": "d", "responses": [
        {"text": "a", "model": "m", "finish": "length", "scores": {"x": 1, "y": "N/A", "z": "2.5", "w": float("nan")}}, "b"]}])
    rows, printed = import_file(tmp_path, capsys, data)
    assert (rows[0]["source"], rows[0]["dataset"]) == ("web", "d")  # a row's source is no response's source
    assert texts_and_scores(rows[0]) == [("a", {"x": 1.0, "y": None, "z": 2.5, "w": None}), ("b", None)]
    assert [response["finish"] for response in rows[0]["responses"]] == ["length", None] and printed["truncated"] == 1
    assert "NaN" not in (tmp_path / "off.jsonl").read_text()


def test_files_are_merged_by_prompt(tmp_path, capsys):
    one = write_rows(tmp_path / "one.jsonl", [{"id": "a", "prompt": "q", "response": "r", "model": "m1"}, {"prompt": "p", "response": "s"}])
    two = write_table(tmp_path / "two.parquet", [{"id": "b", "prompt": "q", "response": "r", "model": "m2"},
                                                 {"id": "c", "prompt": "other", "response": "t", "model": "m2"}])
    rows, printed = import_file(tmp_path, capsys, [one, two])
    assert [row["id"] for row in rows[::2]] == ["a", "c"] and [row["prompt"][0]["content"] for row in rows] == ["q", "p", "other"]
    assert [(response["text"], response["model"]) for response in rows[0]["responses"]] == [("r", "m1"), ("r", "m2")]  # both are kept
    assert (printed["rows"], printed["responses"], printed["rows_merged_into_others"]) == (3, 4, 1)
    assert (printed["prompts_with_equal_samples"], printed["equal_samples_share"]) == (1, 0.3333)
    assert printed["tokens_min_25_50_75_max"] is None
    clash = write_rows(tmp_path / "clash.jsonl", [{"id": "b", "prompt": "p", "response": "x"},
                                                  {"id": "a", "prompt": "new", "response": "x"}])
    (tmp_path / "off.jsonl").unlink()
    assert "clash.jsonl:2: the id a stands for two prompts" in import_refused(tmp_path, capsys, [one, clash])


def test_preambles_and_role_headers_are_counted(tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [
        {"prompt": "q", "responses": ["assistant\n\nHi", "Here's another response: Hi", "Hi", " "]}])
    _, printed = import_file(tmp_path, capsys, data)
    assert [printed[name] for name in ("preambles", "role_headers", "empty", "responses")] == [1, 1, 1, 4]


# ---- UltraFeedback

def completion(model, overall, fine, *ratings):
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {"model": model, "response": f"by {model}", "overall_score": overall, "fine-grained_score": fine, "critique": "...",
            "annotations": {name: {"Rating": value, "Rationale": "..."} for name, value in zip(names, ratings)}}


FOUR = [{"source": "truthful_qa", "instruction": "q0", "models": ["a", "b"], "correct_answers": ["x"], "completions": [
    completion("a", 7.5, 4.25, "4", "5", "3", "5"), completion("b", 10.0, 1.5, "N/A", "1", "2", "1")]},
    {"source": "flan", "instruction": "q1", "models": [], "correct_answers": ["x"], "completions": []},
    {"source": "sharegpt", "instruction": "q0", "models": ["c"], "correct_answers": ["x"], "completions": [
        completion("c", None, None, "N/A", "N/A", "", "5")]}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ultrafeedback(tmp_path, capsys, kind):
    rows, printed = import_file(tmp_path, capsys, write_table(tmp_path / f"uf.{kind}", FOUR), "ultrafeedback")
    (row,) = rows
    names = ("overall_score", "fine-grained_score", "helpfulness", "honesty", "instruction_following", "truthfulness")
    assert texts_and_scores(row) == [("by a", dict(zip(names, (7.5, 4.25, 4.0, 5.0, 3.0, 5.0)))),
                                     ("by b", dict(zip(names, (10.0, 1.5, None, 1.0, 2.0, 1.0)))),
                                     ("by c", dict(zip(names, (None, None, None, None, None, 5.0))))]
    assert row["prompt"] == [{"role": "user", "content": "q0"}] and row["dataset"] == "truthful_qa" and "source" not in row
    assert row["id"] == hashlib.sha256(b'[{"content": "q0", "role": "user"}]').hexdigest()[:16]
    assert [(response["model"], response["source"]) for response in row["responses"]] == [("a", "off"), ("b", "off"), ("c", "off")]
    assert (printed["without_responses"], printed["rows_merged_into_others"], printed["responses"]) == (1, 1, 3)


# ---- HelpSteer2

def steer(prompt, response, *values):
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, values))}


STEER = [steer("c#", "one", 3, 4, 4, 2, 2), steer("c#", "two", 4, 4, 4, 1, 3),
         steer("first\n\n<extra_id_1>Assistant\nsecond\nline\n<extra_id_1>User\nthird", "three", 0, 1, 2, None, 3)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_helpsteer2(tmp_path, capsys, kind):
    rows, printed = import_file(tmp_path, capsys, write_table(tmp_path / f"hs.{kind}", STEER), "helpsteer2")
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "c#"}], [
        {"role": "user", "content": "first\n"}, {"role": "assistant", "content": "second\nline"}, {"role": "user", "content": "third"}]]
    assert [response["text"] for row in rows for response in row["responses"]] == ["one", "two", "three"]
    scores = [response["scores"] for row in rows for response in row["responses"]]
    # .65 * 3 + .8 * 4 + .45 * 4 + .55 * 2 - .4 * 2 and .65 * 4 + .8 * 4 + .45 * 4 + .55 * 1 - .4 * 3
    assert [one["helpsteer2"] for one in scores[:2]] == pytest.approx([7.25, 6.95]) and scores[2]["helpsteer2"] is None
    assert {**scores[0], "helpsteer2": 0} == {"helpfulness": 3.0, "correctness": 4.0, "coherence": 4.0, "complexity": 2.0,
                                              "verbosity": 2.0, "helpsteer2": 0}
    assert scores[2]["complexity"] is None and scores[2]["helpfulness"] == 0.0 and printed["rows_merged_into_others"] == 1


# ---- OpenAssistant 2

def message(number, parent, text, role="assistant", lang="en", deleted=False, rank=None):
    return {"message_id": f"m{number}", "parent_id": parent if parent is None else f"m{parent}", "text": text, "role": role,
            "lang": lang, "deleted": deleted, "review_result": True, "rank": rank}


TREES = [message(0, None, "q0", "prompter"), message(1, 0, "a", rank=1), message(2, 0, "b", rank=0), message(3, 0, "c"),
         message(4, 1, "again", "prompter"), message(5, 4, "later"),                       # a second turn
         message(6, None, "zwei", "prompter", "de"), message(7, 6, "x", lang="de"), message(8, 6, "y", lang="de"),
         message(9, 10, "before its prompt", rank=2), message(10, None, "q10", "prompter"), message(11, 10, "d", rank=0),
         message(12, 10, "gone", deleted=True), message(13, 10, "e", rank=1),              # three that are left
         message(14, None, "drei", "prompter", "de"), *(message(k, 14, f"g{k}", lang="de") for k in (15, 16, 17)),
         message(18, None, "hidden", "prompter", deleted=True), message(19, 18, "h")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_oasst2_keeps_first_turns_with_three_answers(tmp_path, capsys, kind):
    data = write_table(tmp_path / f"oasst.{kind}", TREES)
    rows, printed = import_file(tmp_path, capsys, data, "oasst2")
    assert [(row["id"], row["prompt"][0]["content"], row["lang"]) for row in rows] == [
        ("m0", "q0", "en"), ("m10", "q10", "en"), ("m14", "drei", "de")]
    assert texts_and_scores(rows[0]) == [("a", {"oasst2_rank": 1.0}), ("b", {"oasst2_rank": 0.0}), ("c", {"oasst2_rank": None})]
    assert [response["text"] for response in rows[1]["responses"]] == ["before its prompt", "d", "e"]
    assert [printed[name] for name in ("prompts_with_under_3_answers", "deleted_messages", "other_messages", "rows", "responses")] == [
        1, 2, 3, 3, 9]  # others: again, later, h; with zwei's two answers all 20 messages are accounted for
    english, printed = import_file(tmp_path, capsys, data, "oasst2", "--lang", "en", out="en.jsonl")
    assert english == rows[:2] and printed["prompts_in_other_languages"] == 1
    (tmp_path / "off.jsonl").unlink()
    err = import_refused(tmp_path, capsys, write_table(tmp_path / "few.jsonl", TREES[:3]), "oasst2")
    assert "few.jsonl: no prompt with responses is left: {'prompts_with_under_3_answers': 1}" in err


def test_oasst2_in_two_files(tmp_path, capsys):
    files = [write_table(tmp_path / "1.jsonl", TREES[:2]), write_table(tmp_path / "2.jsonl", TREES[2:6])]
    rows, _ = import_file(tmp_path, capsys, files, "oasst2")
    assert [response["text"] for response in rows[0]["responses"]] == ["a", "b", "c"]


# ---- AlpacaEval

@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_outputs_of_alpaca_eval(tmp_path, capsys, kind):
    files = [write_table(tmp_path / f"{name}.{kind}", [
        {"instruction": f"q{k}", "output": f"{name} {k}", "generator": name, "dataset": f"d{k}"} for k in range(2)])
        for name in ("gpt4", "mine")]
    rows, printed = import_file(tmp_path, capsys, files, "alpaca_eval")
    assert [(row["prompt"][0]["content"], row["dataset"]) for row in rows] == [("q0", "d0"), ("q1", "d1")]
    assert [[(response["model"], response["text"], response["scores"]) for response in row["responses"]] for row in rows] == [
        [("gpt4", f"gpt4 {k}", None), ("mine", f"mine {k}", None)] for k in range(2)]
    assert printed["rows_merged_into_others"] == 2


# ---- bad files, the hub

GOOD = {"ultrafeedback": FOUR, "helpsteer2": STEER, "oasst2": TREES, "ultrafeedback_binarized": ULTRA,
        "alpaca_eval": [{"instruction": f"q{k}", "output": "a", "generator": "m", "dataset": "d"} for k in range(3)]}


@pytest.mark.parametrize("form, change, sentence", [
    ("ultrafeedback", lambda row: row.pop("instruction"), ":3: expected the key 'instruction'"),
    ("ultrafeedback", lambda row: row.update(completions="text"), ":3: expected completions to be a list of objects, found 'text'"),
    ("ultrafeedback", lambda row: row.update(completions=["text"]), ":3: expected completions to be a list of objects, found ['text']"),
    ("ultrafeedback", lambda row: row["completions"][0].update(annotations=["4"]), ":3: expected completions to be a list of objects"),
    ("ultrafeedback", lambda row: row["completions"][0].pop("response"), ":3: expected a response in text, found None"),
    ("ultrafeedback", lambda row: row.update(instruction=None), ":3: expected the prompt to be text or messages"),
    ("helpsteer2", lambda row: row.pop("verbosity"), ":3: expected the key 'verbosity'"),
    ("helpsteer2", lambda row: row.update(response=None), ":3: expected a response in text, found None"),
    ("helpsteer2", lambda row: row.update(prompt=None), ":3: expected the prompt to be text or messages"),
    ("helpsteer2", lambda row: row.update(prompt="a\n<extra_id_1>Assistant\nb"), ":3: expected a prompt that ends with a user turn"),
    ("oasst2", lambda row: row.pop("parent_id"), ":3: expected the key 'parent_id'"),
    ("oasst2", lambda row: row.update(text=None), ":3: expected a response in text, found None"),
    ("alpaca_eval", lambda row: row.pop("output"), ":3: expected the key 'output'"),
    ("alpaca_eval", lambda row: row.update(output=7), ":3: expected a response in text, found 7"),
    ("alpaca_eval", lambda row: row.update(instruction=[]), ":3: expected the prompt to be text or messages")])
def test_a_bad_row_is_named(tmp_path, capsys, form, change, sentence):
    rows = json.loads(json.dumps(GOOD[form]))
    change(rows[2])
    assert f"bad.jsonl{sentence}" in import_refused(tmp_path, capsys, write_rows(tmp_path / "bad.jsonl", rows), form)


@pytest.mark.parametrize("form", [*GOOD, "rows"])
def test_a_table_without_the_columns_or_without_rows(tmp_path, capsys, form):
    key = sorted(generate.FORMATS[form][1])[0]
    err = import_refused(tmp_path, capsys, write_table(tmp_path / "bad.parquet", [{"other": 1}]), form)
    assert f"bad.parquet: expected the column {key!r}, found other" in err
    err = import_refused(tmp_path, capsys, write_table(tmp_path / "bad.json", [{"other": 1}]), form)
    assert f"bad.json:1: expected an object with {', '.join(generate.FORMATS[form][1])}, found" in err
    assert "bad.json:1: expected an object" in import_refused(tmp_path, capsys, write_table(tmp_path / "bad.json", [7]), form)
    err = import_refused(tmp_path, capsys, write_table(tmp_path / "bad.json", []), form)
    assert "bad.json: no prompt with responses is left: there is no row" in err
    (tmp_path / "bad.json").write_text('[{"a": 1},')
    assert "bad.json: expected a whole JSON list" in import_refused(tmp_path, capsys, tmp_path / "bad.json", form)
    assert "none.jsonl: expected JSON lines, found no such file" in import_refused(tmp_path, capsys, tmp_path / "none.jsonl", form)


def test_a_hub_id_reads_the_hubs_parquet(tmp_path, capsys, monkeypatch):
    import huggingface_hub
    (tmp_path / "hub").mkdir()
    write_table(tmp_path / "hub" / "0000.parquet", STEER[:1])
    write_table(tmp_path / "hub" / "0001.parquet", STEER[1:])
    names = ["default/train/0001.parquet", "default/train/0000.parquet", "default/validation/0000.parquet", "other/train/0000.parquet",
             "default/train/notes.txt", ".gitattributes"]
    asked = []

    def list_repo_files(repo_id, *, repo_type, revision):
        asked.append((repo_id, repo_type, revision))
        return names

    def hf_hub_download(repo_id, filename, *, repo_type, revision):
        asked.append((repo_id, repo_type, revision))
        assert filename.startswith("default/train/")
        return str(tmp_path / "hub" / filename.rpartition("/")[2])

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    rows, _ = import_file(tmp_path, capsys, "nvidia/HelpSteer2", "helpsteer2")
    assert [response["text"] for row in rows for response in row["responses"]] == ["one", "two", "three"]
    assert set(asked) == {("nvidia/HelpSteer2", "dataset", "refs/convert/parquet")} and len(asked) == 3
    (tmp_path / "off.jsonl").unlink()
    err = import_refused(tmp_path, capsys, "nvidia/HelpSteer2", "helpsteer2", "--import-split", "test")
    assert "nvidia/HelpSteer2: the hub has no parquet files of the split 'test'" in err
    monkeypatch.undo()  # and without a hub
    err = import_refused(tmp_path, capsys, "nvidia/HelpSteer2", "helpsteer2")
    assert "nvidia/HelpSteer2: neither a file nor a data set of the hub" in err


def test_the_split_of_a_hub_id():
    def split(form, *flags, data=("org/name",)):
        return generate.parse_args(["--out", "o", "--import-format", form, "--import-data", *data, *flags]).import_split
    assert [split(form) for form in ("rows", "ultrafeedback", "ultrafeedback_binarized", "helpsteer2", "oasst2", "alpaca_eval")] == [
        "train", "train", "train_prefs", "train", "train", "eval"]
    assert split("ultrafeedback_binarized", "--import-split", "test_prefs") == "test_prefs"
    for data in (("data/demo_train.jsonl",), ("org/name.parquet",), ("org/one", "org/two"), ("/org/name",), ("name",), ("./org/name",)):
        assert split("rows", data=data) is None  # files, whether they exist or not
