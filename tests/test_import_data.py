"""
People's data as they have them become our rows, and pairs again; nothing is lost in silence.

Covers  data/import_responses.py and data/read_tables.py from the command line: --format pairs with text,
        messages, whole conversations and hh-rlhf's texts; columns about answers, and other columns; csv in
        both forms, and as pandas writes it; JSONL, lists, parquet and CSV, gzipped, with a byte order mark
        and blanks; a pair for every row through build_pairs.py; dropped rows by reason; each bad file in one
        sentence that says its line, what was found and what to do, with nothing written.
Run     python -m pytest tests/test_import_data.py
"""

import gzip
import json
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from conftest import read_rows, run_script, write_rows

MARK = b"\xef\xbb\xbf"


def run_import(tmp_path, form, *files, flags=()):
    """(rows of --out, last line of standard output)"""
    command = ["data/import_responses.py", "--format", form, "--data", *files]
    printed, err = run_script(*command, "--out", tmp_path / "off.jsonl", *flags)
    assert err == ""
    record = json.loads((tmp_path / "off.meta.json").read_text())
    assert printed == {"out": str(tmp_path / "off.jsonl"), **record["counts"]}
    lines = (tmp_path / "off.jsonl").read_bytes().split(b"\n")[:-1]  # a text may have other line breaks
    return list(map(json.loads, lines)), printed


def refused(tmp_path, form, path):
    """What a refused run says after its name and the file's; it has written nothing."""
    before = sorted(tmp_path.rglob("*"))
    command = ["data/import_responses.py", "--format", form, "--data", path]
    _, err = run_script(*command, "--out", tmp_path / "new" / "off.jsonl", expect=2)
    start = f"import_responses.py: {path}"
    assert err.startswith(start) and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before
    return err.removeprefix(start).strip()


def make_file(path, rows):
    """The rows as the kind of file that the name says, gzipped where it ends in .gz."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        data = sink.getvalue().to_pybytes()
    elif kind == "json":
        data = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts(row):
    return [response["text"] for response in row["responses"]]


def turn(role, content):
    return {"role": role, "content": content}


def make_pairs(tmp_path, *flags):
    """The pairs that build_pairs.py makes of what was imported."""
    command = ["build_pairs.py", "--scored", tmp_path / "off.jsonl", "--select", "given", "--on-ratio", "0"]
    printed, _ = run_script(*command, "--out", tmp_path / "pairs.jsonl", *flags)
    return read_rows(tmp_path / "pairs.jsonl"), printed


# ----- pairs
HISTORY = [turn("user", "one"), turn("assistant", "two"), turn("user", "three")]
HH = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three"
FORMS = {  # of the same pair
    "text": {"prompt": HH + "\n\nAssistant:", "chosen": "good", "rejected": "bad"},
    "messages": {
        "prompt": HISTORY,
        "chosen": [turn("assistant", "good")],
        "rejected": [turn("assistant", "bad")],
    },
    "text to messages": {"prompt": HISTORY, "chosen": "good", "rejected": "bad"},
    "conversations": {
        "chosen": [*HISTORY, turn("assistant", "good")],
        "rejected": [*HISTORY, turn("assistant", "bad")],
    },
    "conversations and their prompt": {
        "prompt": HISTORY,
        "chosen": [*HISTORY, turn("assistant", "good")],
        "rejected": [*HISTORY, turn("assistant", "bad")],
    },
    "conversations and the text of a turn": {
        "prompt": "three",
        "chosen": [*HISTORY, turn("assistant", "good")],
        "rejected": [*HISTORY, turn("assistant", "bad")],
    },
    "hh-rlhf": {"chosen": f"{HH}\n\nAssistant: good", "rejected": f"{HH}\n\nAssistant: bad"},
}


OF_A_KIND = [(form, "jsonl") for form in FORMS]
OF_A_KIND += [("conversations", kind) for kind in ("json", "parquet", "jsonl.gz", "json.gz", "parquet.gz")]


@pytest.mark.parametrize("form, kind", OF_A_KIND)
def test_a_pair_in_every_form(tmp_path, form, kind):
    [row], printed = run_import(tmp_path, "pairs", make_file(tmp_path / f"data.{kind}", [FORMS[form]]))
    assert row["prompt"] == HISTORY and texts(row) == ["good", "bad"]
    assert [(one["source"], one["scores"], one["model"]) for one in row["responses"]] == [
        ("off", None, None)
    ] * 2
    assert row.keys() == {"id", "prompt", "responses"} and printed["dropped"] == {}
    [pair], _ = make_pairs(tmp_path)
    assert pair["prompt"] == HISTORY
    assert pair["chosen"] == [turn("assistant", "good")] and pair["rejected"] == [turn("assistant", "bad")]


def test_a_plain_prompt_is_one_turn_and_a_system_turn_stays(tmp_path):
    system = [turn("system", "be brief"), turn("user", "q")]
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    rows.append({"prompt": system, "chosen": "a", "rejected": "b"})
    rows, _ = run_import(tmp_path, "pairs", write_rows(tmp_path / "data.jsonl", rows))
    assert [row["prompt"] for row in rows] == [[turn("user", "q")], system]


@pytest.mark.parametrize(
    "columns, name",
    [
        (("score_chosen", "score_rejected"), "score"),  # HuggingFaceH4/ultrafeedback_binarized
        (("chosen_score", "rejected_score"), "score"),
        (
            ("chosen-rating", "rejected-rating"),
            "rating",
        ),  # argilla/ultrafeedback-binarized-preferences-cleaned
        (("chosen_rating", "rejected_rating"), "rating"),
        (("chosen_reward", "rejected_reward"), "reward"),
    ],
)
def test_scores_go_to_the_answers_and_on_as_rewards(tmp_path, columns, name):
    model = {"chosen_model": "m1", "rejected_model": 2}
    base = {"prompt": "q", "chosen": "a", "rejected": "b", **model, "category": "math", "n": [1, {"x": None}]}
    rows = [{**base, **dict(zip(columns, (4.5, 2)))}, {**base, **dict(zip(columns, (7, "N/A"))), "n": 2}]
    rows, _ = run_import(tmp_path, "pairs", write_rows(tmp_path / "data.jsonl", rows))
    scores = [[response["scores"] for response in row["responses"]] for row in rows]
    assert scores == [[{name: 4.5}, {name: 2.0}], [{name: 7.0}, {name: None}]]
    assert [response["model"] for response in rows[0]["responses"]] == ["m1", "2"]
    assert rows[0].keys() == {
        "id",
        "prompt",
        "category",
        "n",
        "responses",
    }  # what was moved is not there twice
    assert (rows[0]["category"], rows[0]["n"], rows[1]["n"]) == ("math", [1, {"x": None}], 2)
    pairs, _ = make_pairs(tmp_path, "--reward", name)
    assert [(pair["chosen_reward"], pair["rejected_reward"]) for pair in pairs] == [(4.5, 2.0), (7.0, None)]
    assert (pairs[0]["chosen_model"], pairs[0]["category"], pairs[0]["n"]) == ("m1", "math", [1, {"x": None}])


def test_every_row_stays_a_pair_where_prompts_and_ids_repeat(tmp_path):
    """Before, rows of one prompt were merged, and --select given took the first two answers of them."""
    rows = [{"id": "p", "prompt": "q", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(3)]
    rows.append({"id": "p-2", "prompt": "another", "chosen": "good 3", "rejected": "bad 3"})
    rows += [{"prompt": "q", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in (4, 5)]
    rows.append({"id": "p", "prompt": "a third", "chosen": "good 6", "rejected": "bad 6"})
    rows, printed = run_import(tmp_path, "pairs", write_rows(tmp_path / "data.jsonl", rows))
    assert (printed["rows"], printed["rows_merged_into_others"], printed["dropped"]) == (7, 0, {})
    ids = [row["id"] for row in rows]
    assert ids[:4] == ["p", "p-2", "p-3", "p-2-2"] and ids[5] == f"{ids[4]}-2" and ids[6] == "p-4"
    pairs, said = make_pairs(tmp_path)
    assert said["pairs"] == 7 and said["dropped"] == {}
    for k, pair in enumerate(pairs):
        assert pair["chosen"][0]["content"] == f"good {k}" and pair["rejected"][0]["content"] == f"bad {k}"


def test_two_files_of_pairs(tmp_path):
    """A row that both have is a duplicate; other rows of a prompt stay."""
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    one = make_file(tmp_path / "one.parquet", [row, {**row, "chosen": "c"}])
    two = write_rows(tmp_path / "two.jsonl", [{**row, "rejected": "d"}, row])
    rows, printed = run_import(tmp_path, "pairs", one, two)
    assert [texts(row) for row in rows] == [["a", "b"], ["c", "b"], ["a", "d"]]
    assert len({row["id"] for row in rows}) == 3 and printed["dropped"] == {"duplicate row": 1}


def test_a_thousand_rows_of_one_id(tmp_path):
    rows = [{"id": 0, "prompt": f"q{k}", "chosen": "a", "rejected": "b"} for k in range(1000)]
    rows, _ = run_import(tmp_path, "pairs", write_rows(tmp_path / "data.jsonl", rows))
    assert [row["id"] for row in rows] == ["0", *(f"0-{k}" for k in range(2, 1001))]


# ----- what is dropped
def test_rows_that_make_no_pair_are_counted(tmp_path):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [good, {**good, "chosen": " \n"}, {**good, "rejected": ""}, dict(reversed(good.items()))]
    rows += [{**good, "rejected": " a\n"}, {**good, "prompt": " "}, good]
    rows += [{**good, "chosen": "<think>x</think>\n"}, {**good, "chosen": "<think>x</think>b"}]
    other = f"\n\nHuman: two{HH[10:]}"
    rows.append({"chosen": f"{HH}\n\nAssistant: good", "rejected": f"{other}\n\nAssistant: bad"})
    data = write_rows(tmp_path / "data.jsonl", rows)
    imported, printed = run_import(tmp_path, "pairs", data)
    assert [texts(row) for row in imported] == [["a", "b"]]
    reasons = {"empty": 4, "duplicate row": 2, "identical": 2, "different prompts": 1}
    assert printed["dropped"] == reasons and printed["rows"] + sum(reasons.values()) == len(rows)
    err = refused(tmp_path, "pairs", write_rows(tmp_path / "none.jsonl", rows[1:3]))
    assert err == ': no prompt with responses is left; dropped: {"empty": 2}'


NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
OF_A_PROMPT = {  # a row of the formats whose rows of a prompt are merged, and where its answer stands
    "rows": {"prompt": "q", "response": "a"},
    "helpsteer2": {"prompt": "q", "response": "a", **dict.fromkeys(NAMES, 1)},
    "alpaca_eval": {"instruction": "q", "output": "a", "generator": "m"},
}


@pytest.mark.parametrize("form", OF_A_PROMPT)
def test_duplicates_among_rows_of_a_prompt(tmp_path, form):
    row = OF_A_PROMPT[form]
    key = "output" if form == "alpaca_eval" else "response"
    rows = [row, {**row, key: "b"}, row, {**row, "unknown": 1}, {**row, key: "b"}]
    [imported], printed = run_import(tmp_path, form, write_rows(tmp_path / "data.jsonl", rows))
    assert texts(imported) == ["a", "b", "a"]  # another key makes another row
    assert printed["dropped"] == {"duplicate row": 2}
    assert (printed["rows"], printed["rows_merged_into_others"], printed["responses"]) == (1, 2, 3)


def test_duplicates_of_ultrafeedback(tmp_path):
    row = {"source": "flan", "instruction": "q", "completions": [{"response": "a", "annotations": None}]}
    empty = {**row, "completions": []}
    rows = [row, empty, row, empty, {**row, "completions": [{"response": "b", "annotations": None}]}]
    [imported], printed = run_import(tmp_path, "ultrafeedback", write_rows(tmp_path / "data.jsonl", rows))
    assert texts(imported) == ["a", "b"] and printed["rows_merged_into_others"] == 1
    assert printed["dropped"] == {"without responses": 1, "duplicate row": 2}


# ----- CSV
def csv_file(tmp_path, text, name="data.csv"):
    path = tmp_path / name
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def test_a_csv_of_votes(tmp_path):
    """The file of USERS.md: which of two answers is better."""
    text = "question,answer_a,answer_b,better\nq0,one,two,a\nq1,one,two,b\nq2,one,two, B \nq0,three,four,A\n"
    rows, printed = run_import(tmp_path, "csv", csv_file(tmp_path, text))
    assert [texts(row) for row in rows] == [["one", "two"], ["two", "one"], ["two", "one"], ["three", "four"]]
    assert [row["prompt"][0]["content"] for row in rows] == ["q0", "q1", "q2", "q0"]
    assert rows[3]["id"] == f"{rows[0]['id']}-2" and rows[0].keys() == {"id", "prompt", "responses"}
    assert (printed["rows"], printed["responses"], printed["dropped"]) == (4, 8, {})
    pairs, _ = make_pairs(tmp_path)
    assert [pair["chosen"][0]["content"] for pair in pairs] == ["one", "two", "two", "three"]


def test_a_csv_of_pairs_with_other_columns(tmp_path):
    text = "id,prompt,chosen,rejected,year,chosen_score,\n"
    text += '7,"q, ""quoted""","line\none\n\nline two",b,2020-01-01,4.5,x\n,q1,a,b,,,\n\n,,,,,,\n'
    text += ",q1,a,,1,,\n,q1,a,a ,1,,\n,q1,a,b,,,\n"
    rows, printed = run_import(tmp_path, "csv", csv_file(tmp_path, text))
    assert rows[0]["id"] == "7" and rows[0]["prompt"] == [turn("user", 'q, "quoted"')]
    assert texts(rows[0]) == ["line\none\n\nline two", "b"]
    assert rows[0]["responses"][0]["scores"] == {"score": 4.5}
    assert (rows[0]["year"], rows[0]["column 7"], rows[1]["year"]) == ("2020-01-01", "x", "")
    assert len(rows) == 2 and len(rows[1]["id"]) == 16
    assert printed["dropped"] == {"empty": 1, "identical": 1, "duplicate row": 1}


TABLE = "question;answer_a;answer_b;better;n\nä, ö;x\ty;z;b;1\n"


@pytest.mark.parametrize(
    "data",
    [
        TABLE.encode(),
        MARK + TABLE.encode(),
        TABLE.replace("\n", "\r\n").encode(),
        ("\n \n" + TABLE.replace("\n", "\n\n")).encode(),
        TABLE.replace("\t", "|").replace(";", "\t").replace("|", " ").encode(),
        MARK + b'"question","answer_a","answer_b","better","n"\n"\xc3\xa4, \xc3\xb6","x\ty","z","b","1"',
    ],
    ids=["semicolons", "byte order mark", "CRLF", "blank lines", "tabs", "quoted, no last line break"],
)
@pytest.mark.parametrize("name", ["data.csv", "data.txt.gz"])
def test_how_programs_write_csv(tmp_path, data, name):
    [row], _ = run_import(tmp_path, "csv", csv_file(tmp_path, data, name))
    assert row["prompt"] == [turn("user", "ä, ö")] and row["n"] == "1"
    assert [text.replace("\t", " ") for text in texts(row)] == ["z", "x y"]


@pytest.mark.parametrize("quoting", [0, 1])  # where needed, everywhere
def test_csv_files_of_pandas(tmp_path, quoting):
    pandas = pytest.importorskip("pandas")
    draw = random.Random(quoting)
    parts = [
        "a",
        " ",
        "\n",
        "\r\n",
        '"',
        '""',
        ",",
        ";",
        "\t",
        "é",
        "\u2028",
        "😀",
        "'",
        "\\",
        "x\n\ny",
        "NA",
    ]

    def text(k):
        return f"{k}" + "".join(draw.choices(parts, k=draw.randrange(12))) + "."

    rows = []
    for k in range(200):
        rows.append({"prompt": text(k), "chosen": text(k), "rejected": text(k) + "!", "note": text(k)})
    table = pandas.DataFrame(rows)
    table.to_csv(tmp_path / "data.csv", index=False, quoting=quoting)
    imported, _ = run_import(tmp_path, "csv", tmp_path / "data.csv")
    assert len(imported) == 200
    for row, given in zip(imported, rows):
        assert row["prompt"][0]["content"] == given["prompt"] and row["note"] == given["note"]
        assert texts(row) == [given["chosen"], given["rejected"]]


def test_a_long_cell(tmp_path):
    text = "prompt,chosen,rejected\nq," + "a" * 300_000 + ",b\n"  # csv's limit is 131,072
    [row], _ = run_import(tmp_path, "csv", csv_file(tmp_path, text))
    assert len(texts(row)[0]) == 300_000


# ----- files
PAIR_ROWS = [{"prompt": f"q{k}", "chosen": f"ü {k}", "rejected": "b", "category": "c"} for k in range(600)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", ["data", "data.json", "data.parquet"])
def test_the_first_bytes_say_what_a_file_is(tmp_path, kind, name):
    make_file(tmp_path / f"x.{kind}", PAIR_ROWS).rename(tmp_path / name)
    rows, _ = run_import(tmp_path, "pairs", tmp_path / name)
    assert [texts(row)[0] for row in rows] == [f"ü {k}" for k in range(600)] and rows[0]["category"] == "c"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("begin", [b"", MARK, b"\n \r\n\t", MARK + b"\n "], ids=repr)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_marks_and_blanks_before_the_first_row(tmp_path, kind, begin, zipped):
    path = make_file(tmp_path / f"data.{kind}", PAIR_ROWS[:3])
    data = begin + path.read_bytes() + b"\n\n"
    path.write_bytes(gzip.compress(data) if zipped else data)
    rows, _ = run_import(tmp_path, "pairs", path)
    assert [row["prompt"][0]["content"] for row in rows] == ["q0", "q1", "q2"]


def test_parquet_of_several_types(tmp_path):
    """Dictionaries, large strings, dates, decimals, nanoseconds and bytes beside the texts."""
    import datetime
    import decimal

    pandas = pytest.importorskip("pandas")
    time = pandas.Timestamp("2024-05-17 01:02:03.123456789")
    columns = {
        "prompt": pyarrow.array(["q", "q"]).dictionary_encode(),
        "chosen": pyarrow.array(["a", "b"], pyarrow.large_string()),
        "rejected": pyarrow.array(["c", "d"]),
        "category": pyarrow.array(["math", None]).dictionary_encode(),
        "day": pyarrow.array([datetime.date(2024, 5, 17)] * 2),
        "price": pyarrow.array([decimal.Decimal("1.50")] * 2),
        "time": pyarrow.array([time.value] * 2, pyarrow.timestamp("ns")),
        "score_chosen": pyarrow.array([1.5, float("nan")]),
        "raw": pyarrow.array([b"\x00\xff"] * 2),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    rows, _ = run_import(tmp_path, "pairs", tmp_path / "data.parquet")
    assert [row["category"] for row in rows] == ["math", None]
    assert (rows[0]["day"], rows[0]["price"], rows[0]["raw"]) == ("2024-05-17", "1.50", "AP8=")
    assert rows[0]["time"] == "2024-05-17 01:02:03.123456789"
    assert [row["responses"][0]["scores"]["score"] for row in rows] == [1.5, None]


# ----- bad files: each in one sentence, and nothing is written
GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
KINDS = "expected JSON lines, a JSON list, parquet, or CSV with --format csv"
HELP = "; --help says what --format pairs reads"
COLUMNS = "prompt, chosen, rejected or question, answer_a, answer_b, better"
HEADER = f"expected a header with the columns {COLUMNS}, found"


@pytest.mark.parametrize(
    "form, data, sentence",
    [
        (
            "pairs",
            b"\x7fELF\x02\x01\x00\x00\xff\xfe",
            f": {KINDS}, found b'\\x7fELF\\x02\\x01\\x00\\x00\\xff\\xfe'",
        ),
        ("csv", b"\x7fELF\x02\xff", ":1: expected UTF-8, found the byte b'\\xff'; save the file as UTF-8"),
        ("pairs", b"prompt,chosen,rejected\nq,a,b\n", f": {KINDS}, found b'prompt,chosen,reject'"),
        ("pairs", b"", ": expected JSON lines, found no file or an empty one"),
        ("csv", b"", ": expected CSV, found no file or an empty one"),
        ("csv", b"\n \n", f": {KINDS}, found nothing"),
        ("pairs", gzip.compress(b""), f": {KINDS}, found nothing"),
        ("csv", b"text,label\nx,1\n", f":1: {HEADER} 'text,label'"),
        (
            "csv",
            b"\n\nquestion|answer_a|answer_b|better\n",
            f":3: {HEADER} 'question|answer_a|answer_b|better'",
        ),
        ("csv", b'{"prompt": "q"}\n', f""":1: {HEADER} '{{"prompt": "q"}}'"""),
        (
            "csv",
            b"prompt,chosen,rejected,prompt\n",
            ":1: expected different names in the header, found prompt, chosen, rejected, prompt",
        ),
    ],
)
def test_a_file_of_another_kind(tmp_path, form, data, sentence):
    assert refused(tmp_path, form, csv_file(tmp_path, data, "data.bin")) == sentence


VOTES = "question,answer_a,answer_b,better\n"


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            VOTES + "q,x,y,a\nq,x,y,tie\n",
            ":3: expected a or b in the column better, found 'tie'; correct or remove",
        ),
        (
            VOTES + 'q,"x\n\nz",y,a\nq,x,y,\n',
            ":5: expected a or b in the column better, found ''; correct or remove",
        ),
        (VOTES + "\n\nq,x,y,answer_a\n", ":4: expected a or b in the column better, found 'answer_a'"),
        (VOTES + "q,x,y,1\n", ":2: expected a or b in the column better, found '1'"),
        (
            VOTES + "q,x,y,a\nq,x,y\n",
            ":3: expected 4 cells, found 3; put a text with ',' or line breaks in quotes",
        ),
        (
            VOTES + "q,x, y,z,a\n",
            ":2: expected 4 cells, found 5; put a text with ',' or line breaks in quotes",
        ),
        (VOTES + 'q,x,y,a\nq,"x,y,a\nq,x,y,b\n', ":3: this row is no CSV: unexpected end of data"),
        (VOTES + 'q,x,y,a\nq,"x"z,y,a\n', ":3: this row is no CSV: "),
    ],
)
def test_bad_rows_of_csv(tmp_path, text, sentence):
    assert refused(tmp_path, "csv", csv_file(tmp_path, text)).startswith(sentence)


def test_a_csv_of_another_encoding(tmp_path):
    data = (VOTES + "q,x,y,a\ncafé,x,y,a\n").encode("latin-1")
    sentence = ":3: expected UTF-8, found the byte b'\\xe9'; save the file as UTF-8"
    assert refused(tmp_path, "csv", csv_file(tmp_path, data)) == sentence
    assert refused(tmp_path, "csv", csv_file(tmp_path, data, "data.csv.gz")) == sentence


ENDS = "expected chosen to be text, or messages that end with the assistant's"


@pytest.mark.parametrize("kind", ["json.gz", "parquet"])
@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"prompt": {"text": "q"}}, "Expected `str | array | null`, got `object` - at `$.prompt`" + HELP),
        ({"chosen": 7}, "Expected `str | array | null`, got `int` - at `$.chosen`" + HELP),
        ({"chosen": ["a"]}, "Expected `object`, got `str` - at `$.chosen[0]`" + HELP),
        ({"chosen": [["a"]]}, "Expected `object`, got `array` - at `$.chosen[0]`" + HELP),
        ({"id": 1.5}, "Expected `int | str | null`, got `float` - at `$.id`" + HELP),
        (
            {"chosen": [turn("assistant", None)]},
            "Expected `str`, got `null` - at `$.chosen[0].content`" + HELP,
        ),
        ({"prompt": None}, 'expected "prompt", or chosen and rejected as conversations that begin with it'),
        ({"chosen": [turn("assistant", "a"), turn("user", "b")]}, ENDS),
        ({"chosen": f"{HH}\n\nAssistant: a\n\nHuman: b"}, ENDS),
        (
            {"prompt": [turn("user", "q"), turn("assistant", "a")]},
            "expected a prompt that ends with a user turn",
        ),
        (
            {"prompt": HISTORY, "chosen": [turn("user", "three"), turn("assistant", "a")]},
            "expected chosen to be an answer to the prompt, or to begin with its messages",
        ),
    ],
)
def test_bad_rows_of_pairs(tmp_path, kind, change, sentence):
    rows = [{**GOOD, **change}] * 2 if "parquet" in kind else [GOOD, {**GOOD, **change}]
    number = 1 if "parquet" in kind else 2  # a column has one type
    said = refused(tmp_path, "pairs", make_file(tmp_path / f"data.{kind}", rows))
    assert said == f":{number}: {sentence}"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_other_columns_are_named(tmp_path, kind):
    path = make_file(tmp_path / f"data.{kind}", [{"question": "q", "chosen": "a", "response_0": "b"}])
    found = "Object missing required field `rejected`, found question, chosen, response_0"
    assert refused(tmp_path, "pairs", path) == f":1: {found}{HELP}"


def test_bytes_are_no_text(tmp_path):
    path = make_file(tmp_path / "data.parquet", [{"prompt": b"q", "chosen": "a", "rejected": "b"}])
    said = refused(tmp_path, "pairs", path)
    assert said == ":1: Expected `str | array | null`, got `bytes` - at `$.prompt`" + HELP


@pytest.mark.parametrize("kind", ["jsonl.gz", "json.gz", "parquet.gz", "parquet", "json", "csv.gz"])
def test_a_file_that_is_cut(tmp_path, kind):
    if kind == "csv.gz":
        draw = random.Random(0)
        lines = [f"q{k},{draw.random()},b" for k in range(5000)]
        path = csv_file(tmp_path, "prompt,chosen,rejected\n" + "\n".join(lines), "data.csv.gz")
    else:
        path = make_file(tmp_path / f"data.{kind}", PAIR_ROWS)
    path.write_bytes(path.read_bytes()[:-200])
    said = refused(tmp_path, "csv" if kind == "csv.gz" else "pairs", path)
    assert "cannot be read" in said
    if kind.endswith(".gz"):
        assert "Compressed file ended before the end-of-stream marker was reached" in said
    if kind != "jsonl.gz":  # the words of common.read_jsonl
        assert said.endswith("; is the file complete?")


def test_a_bad_row_in_a_later_batch(tmp_path):
    rows = [{**GOOD, "prompt": f"q{k}"} for k in range(700)]
    rows[650] = {"prompt": None, "chosen": "a", "rejected": "b"}
    said = refused(tmp_path, "pairs", make_file(tmp_path / "data.parquet", rows))
    assert said == ':651: expected "prompt", or chosen and rejected as conversations that begin with it'


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_answer_that_is_null_is_an_empty_one(tmp_path, kind):
    rows = [{**GOOD, "prompt": f"q{k}"} for k in range(4)]
    rows[1]["chosen"] = rows[2]["rejected"] = None
    _, printed = run_import(tmp_path, "pairs", make_file(tmp_path / f"data.{kind}", rows))
    assert printed["rows"] == 2 and printed["dropped"] == {"empty": 2}


def test_messages_in_a_cell(tmp_path):
    cell = """"[{""role"": ""user"", ""content"": ""q""}]\""""
    said = refused(tmp_path, "csv", csv_file(tmp_path, f"prompt,chosen,rejected\nq,a,b\n{cell},a,b\n"))
    advice = "use --format pairs with JSONL or parquet"
    assert said == f":3: expected text in the column prompt, found messages; {advice}"


def test_what_is_there_stays_when_a_run_is_refused(tmp_path):
    run_import(tmp_path, "csv", csv_file(tmp_path, "prompt,chosen,rejected\nq,a,b\n"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    command = ["data/import_responses.py", "--format", "pairs", "--data", tmp_path / "data.csv"]
    run_script(*command, "--out", tmp_path / "off.jsonl", expect=2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ----- on to training: what README says of own data
def test_mixed_with_responses_of_the_model(tmp_path):
    """A CSV with a repeated prompt, answers sampled for the same rows, and half of the pairs of each."""
    lines = [f"q{k % 5},good {k},bad {k}" for k in range(8)]
    run_import(tmp_path, "csv", csv_file(tmp_path, "prompt,chosen,rejected\n" + "\n".join(lines)))
    rewards = Counter()
    scored = []
    for row in read_rows(tmp_path / "off.jsonl"):
        for response, reward in zip(row["responses"], (1.0, 0.0)):
            response["reward"] = reward
        sampled = [
            {**row["responses"][0], "text": text, "source": "on", "reward": len(text)}
            for text in "x yy".split()
        ]
        scored.append({**row, "responses": row["responses"] + sampled, "labeler": "rm:m"})
        rewards[row["prompt"][0]["content"]] += 1
    write_rows(tmp_path / "off.jsonl", scored)
    assert rewards == {"q0": 2, "q1": 2, "q2": 2, "q3": 1, "q4": 1}
    command = ["build_pairs.py", "--scored", tmp_path / "off.jsonl", "--out", tmp_path / "pairs.jsonl"]
    printed, _ = run_script(*command, "--on-ratio", "0.5", "--select", "given")
    assert (printed["pairs"], printed["on"], printed["off"]) == (8, 4, 4)
    for pair in read_rows(tmp_path / "pairs.jsonl"):
        texts = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert texts == ("yy", "x") if pair["source"] == "on" else texts[0][-1] == texts[1][-1]
