"""
The plumbing that the scripts share: rows in, rows merged, outputs that resume.

Covers  common.read_jsonl (gzip, byte order mark, blank lines, torn archives), read_responses and merged
        (matrices of two files), shard_of, keep_rows, append_rows and replace_file on a full disk, open_output
        (lock, record, foreign rows, windows, finished runs). What goes through the command line of a script
        is in test_bad_input.py.
Run     python -m pytest tests/test_common.py
"""

import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from typing import Required, TypedDict

import pytest
from conftest import REPO, write_rows

import common
import loading


class Row(TypedDict, total=False):
    id: Required[str]
    prompt: Required[str | list[common.Message]]
    responses: Required[list[TypedDict("Response", {"text": str, "source": str})]]
    wins: common.Wins | None
    cosine: list[list[float | None]] | None


def refusal(capsys, function, *args, **kwargs):
    """The sentence with which a call ends the run."""
    with pytest.raises(SystemExit) as status:
        function(*args, **kwargs)
    assert status.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def read(path):
    return list(common.read_jsonl(path, TypedDict("Id", {"id": str})))


# ----- rows
def test_byte_order_mark_blank_lines_and_gzip(tmp_path):
    text = b'\xef\xbb\xbf{"id": "a"}\r\n\n  \t\n{"id": "\xc3\xa9"}'
    (tmp_path / "rows.jsonl").write_bytes(text)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        path = str(tmp_path / name)
        assert read(path) == [(f"{path}:1", {"id": "a"}), (f"{path}:4", {"id": "é"})]


def test_a_byte_order_mark_that_is_not_at_the_start(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(b'{"id": "a"}\n\xef\xbb\xbf{"id": "b"}\n')
    assert f"{tmp_path}/rows.jsonl:2: " in refusal(capsys, read, str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("cut", [4, 12, 30])
def test_a_torn_archive(tmp_path, capsys, cut):
    data = gzip.compress(b"".join(b'{"id": "%d"}\n' % k for k in range(1000)))
    (tmp_path / "rows.gz").write_bytes(data[: len(data) - cut])
    assert f"{tmp_path}/rows.gz" in refusal(capsys, read, str(tmp_path / "rows.gz"))


def test_an_archive_of_other_bytes(tmp_path, capsys):
    data = bytearray(gzip.compress(os.urandom(2000)))
    data[100:200] = bytes(100)
    (tmp_path / "rows.gz").write_bytes(data)
    assert f"{tmp_path}/rows.gz" in refusal(capsys, read, str(tmp_path / "rows.gz"))


def test_rows_of_two_files_become_block_matrices(tmp_path):
    def row(texts, **more):
        return {
            "id": "p",
            "prompt": "q",
            "responses": [{"text": text, "source": "on"} for text in texts],
            **more,
        }

    first = write_rows(tmp_path / "1.jsonl", [row("ab", wins=[[None, 0.9], [0.1, None]], category=None, a=1)])
    second = write_rows(tmp_path / "2.jsonl", [row("c", cosine=[[1]], category="math", a=2)])
    merged = common.read_responses([first, second], Row)["p"]
    assert [response["text"] for response in merged["responses"]] == ["a", "b", "c"]
    assert merged["wins"] == [[None, 0.9, None], [0.1, None, None], [None, None, None]]
    assert merged["cosine"] == [[None, None, None], [None, None, None], [None, None, 1]]
    assert merged["category"] == "math" and merged["a"] == 1  # the first file's, but for null
    turned = common.read_responses([second, first], Row)["p"]
    assert turned["wins"] == [[None, None, None], [None, None, 0.9], [None, 0.1, None]] and turned["a"] == 2


def test_three_files_one_of_them_without_a_matrix(tmp_path):
    paths = []
    for name, wins in (("1", [[None]]), ("2", None), ("3", [[None, 1], [0, None]])):
        responses = [{"text": name, "source": "off"}] * (2 if name == "3" else 1)
        row = {"id": "p", "prompt": "q", "responses": responses, "wins": wins}
        paths.append(write_rows(tmp_path / f"{name}.jsonl", [row]))
    wins = common.read_responses(paths, Row)["p"]["wins"]
    assert wins == [[None] * 4, [None] * 4, [None, None, None, 1], [None, None, 0, None]]


def sampled(folder, name, source, ids, template="t"):
    row = {"id": "p", "prompt": "q", "responses": [{"text": name, "source": source}]}
    return write_rows(
        folder / f"{name}.jsonl", [row | {"prompt_token_ids": ids, "prompt_tokenizer": template}]
    )


def test_the_ids_of_a_prompt_are_those_that_on_policy_responses_answer(tmp_path, capsys):
    on, off = sampled(tmp_path, "on", "on", [1, 2]), sampled(tmp_path, "off", "off", [3], "other")
    bare = sampled(tmp_path, "bare", "on", None, None)
    for paths in ([on, off], [off, on], [off, bare, on], [on, bare]):
        row = common.read_responses(paths, Row)["p"]
        assert (list(row["prompt_token_ids"]), row["prompt_tokenizer"]) == ([1, 2], "t")
    assert list(common.read_responses([off], Row)["p"]["prompt_token_ids"]) == [3]
    # sampled on two days, or with two switches
    again, same = sampled(tmp_path, "again", "on", [1, 3]), sampled(tmp_path, "same", "on", [1, 2])
    assert len(common.read_responses([on, same], Row)["p"]["responses"]) == 2
    for paths in ([on, again], [again, off, on]):
        err = refusal(capsys, common.read_responses, paths, Row)
        assert on in err and again in err and "the prompt p has other prompt_token_ids" in err


def test_shards_take_whole_blocks_and_share_all_rows():
    rows = list(range(10))
    assert loading.shard_of(rows, 3, "0/2") == [0, 1, 2, 6, 7, 8]
    assert loading.shard_of(rows, 3, "1/2") == [3, 4, 5, 9]


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "1/"])
def test_a_shard_that_is_none(capsys, shard):
    assert f"--shard {shard}: expected I/N" in refusal(capsys, loading.shard_of, [1], 1, shard)


# ----- outputs
def output(path, overwrite=False, n=1):
    return argparse.Namespace(out=str(path), overwrite=overwrite, n=n)


def run(args, ids, stop=None, window=1, may_change=()):
    """Append the rows of a run, the first `stop` of them; returns (rows that had stayed, counts)."""
    record = common.make_record(args, [])
    with common.open_output(args, record, may_change, ids, window) as (file, done, counts):
        if counts is not None:
            return done, counts
        if done < len(ids):
            common.begin_output(file, record, done)
        for row_id in ids[done:stop]:
            common.append_rows(file, [{"id": row_id}])
        if stop is None:
            common.write_record(args.out, record | {"counts": {"rows": len(ids)}})
    return done, None


def ids_of(path):
    return [json.loads(line)["id"] for line in open(path)]


def test_a_run_that_is_stopped_resumes_and_a_finished_one_has_counts(tmp_path):
    args = output(tmp_path / "out.jsonl")
    assert run(args, list("abcde"), stop=3) == (0, None)
    with open(args.out, "ab") as file:
        file.write(b'{"id": "d')  # torn by a kill
    assert run(args, list("abcde")) == (3, None)
    assert ids_of(args.out) == list("abcde")
    assert run(args, list("abcde")) == (5, {"rows": 5})
    assert run(args, list("abcdefg")) == (5, None)  # --limit was raised


def test_a_resumed_run_begins_at_a_whole_window(tmp_path):
    args = output(tmp_path / "out.jsonl")
    run(args, list("abcdefgh"), stop=5)
    assert run(args, list("abcdefgh"), window=3) == (3, None)
    assert ids_of(args.out) == list("abcdefgh")
    assert run(args, list("abcdefgh"), window=3)[0] == 8  # not a multiple, but all


def test_other_arguments_are_refused_and_overwrite_starts_over(tmp_path, capsys):
    args = output(tmp_path / "out.jsonl", n=4)
    run(args, list("ab"))
    before = (tmp_path / "out.jsonl").read_bytes()
    err = refusal(capsys, run, output(args.out, n=8), list("ab"))
    advice = "use another --out, or --overwrite to start over"
    assert f"--out {args.out} was written with n = 4, not 8; {advice}" in err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert run(output(args.out, n=8), list("ab"), may_change={"n"}) == (2, {"rows": 2})
    assert run(output(args.out, overwrite=True, n=8), list("cd")) == (0, None)
    assert ids_of(args.out) == list("cd")


@pytest.mark.parametrize(
    "record", [None, "[]", "{}", '{"args": [], "inputs": {}, "models": {}}', "torn {", "\0"]
)
def test_a_record_that_is_none(tmp_path, capsys, record):
    args = output(tmp_path / "out.jsonl")
    run(args, list("ab"), stop=1)
    meta = tmp_path / "out.meta.json"
    meta.unlink() if record is None else meta.write_text(record)
    err = refusal(capsys, run, args, list("ab"))
    assert f"--out {args.out} exists but its record {meta} is missing or damaged" in err
    assert ids_of(args.out) == ["a"]


@pytest.mark.parametrize("line", ['{"id": "x"}', '{"other": 1}', "[1]", "text", '{"id": null}', ""])
def test_rows_of_another_run_are_refused(tmp_path, capsys, line):
    args = output(tmp_path / "out.jsonl")
    run(args, list("abc"), stop=1)
    with open(args.out, "a") as file:
        file.write(line + '\n{"id": "c"}\n')
    before = (tmp_path / "out.jsonl").read_bytes()
    assert f"{args.out}:" in refusal(capsys, run, args, list("abc"))
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_more_rows_than_are_requested(tmp_path, capsys):
    args = output(tmp_path / "out.jsonl")
    run(args, list("abcde"))
    err = refusal(capsys, run, args, list("abc"))
    assert f"{args.out}:4: not the row that this run of 3 rows writes there" in err


def lock(path, ready, stop):
    args = output(path)
    record = common.make_record(args, [])
    with common.open_output(args, record, (), ["a"]) as (file, _, _):
        common.begin_output(file, record, 0)
        common.append_rows(file, [{"id": "a"}])
        ready.set()
        stop.wait(60)


def test_a_second_process_is_refused(tmp_path, capsys):
    forks = multiprocessing.get_context("fork")
    ready, stop = forks.Event(), forks.Event()
    process = forks.Process(target=lock, args=(tmp_path / "out.jsonl", ready, stop))
    process.start()
    assert ready.wait(60)
    err = refusal(capsys, run, output(tmp_path / "out.jsonl", overwrite=True), ["a"])
    stop.set()
    process.join()
    assert f"--out {tmp_path}/out.jsonl: another process is writing this file" in err
    assert ids_of(tmp_path / "out.jsonl") == ["a"]


def test_a_refused_run_leaves_nothing(tmp_path, capsys):
    args = output(tmp_path / "new" / "out.jsonl")

    def refused():
        with common.open_output(args, common.make_record(args, []), (), ["a"]):
            common.fail("the model is none")

    refusal(capsys, refused)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("name", ["a" * 300, "a" * 250], ids=["the file's name", "the record's name"])
def test_a_name_that_is_too_long(tmp_path, capsys, name):
    assert "name too long" in refusal(capsys, run, output(tmp_path / name), ["a"])
    assert list(tmp_path.iterdir()) == []
    err = refusal(capsys, common.write_output, output(tmp_path / f"{'b' * 300}"), [], ["{}"])
    assert "name too long" in err


FULL_DISK = """
import argparse, resource, sys, common
out, ids = sys.argv[1], sys.argv[2]
args = argparse.Namespace(out=out, overwrite=False, n=1)
record = common.make_record(args, [])
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # no file can grow further, as on a full disk
if not ids:
    common.replace_file(out, ["x" * 5000])
with common.open_output(args, record, (), list(ids)) as (file, done, _):
    for row_id in ids[done:]:
        common.append_rows(file, [{"id": row_id, "text": "x" * 1000}])
"""


def on_a_full_disk(path, ids):
    """Standard error of a process that writes rows of 1,030 bytes, or replaces the file if there are none."""
    words = [sys.executable, "-c", FULL_DISK, path, "".join(ids)]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on(tmp_path):
    path, ids = str(tmp_path / "out.jsonl"), list("abcdef")
    code = hashlib.sha256((REPO / "common.py").read_bytes()).hexdigest()
    record = common.make_record(output(path), []) | {"code": {"common.py": code}}
    common.write_record(path, record)
    with open(path, "wb", buffering=0) as file:
        common.append_rows(file, [{"id": "a", "text": "x" * 1000}])
    err = on_a_full_disk(path, ids)
    assert f"{path} cannot be written: " in err and "run the same command again to resume" in err
    with common.open_output(output(path), record, (), ids) as (file, done, _):
        assert done == 2  # the third did not fit
        for row_id in ids[done:]:
            common.append_rows(file, [{"id": row_id, "text": "x" * 1000}])
    assert ids_of(path) == ids


def test_a_full_disk_keeps_the_file_that_was_to_be_replaced(tmp_path):
    path = str(tmp_path / "out.json")
    common.replace_file(path, ["old"])
    assert f"{path} cannot be written: " in on_a_full_disk(path, [])
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("out.json", "old\n")]


def test_an_output_that_is_an_input_or_its_record(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    for name in ("in.jsonl", "in.meta.json", "link.jsonl", "in.json"):  # in.json's record is in.meta.json
        err = refusal(capsys, common.check_output, str(tmp_path / name), [str(tmp_path / "in.jsonl")])
        assert f"--out {tmp_path / name}: this would overwrite an input file or its record" in err
    assert "is not a file" in refusal(capsys, common.check_output, "/dev/null", [])


def test_no_torch_is_imported():
    code = "import sys, common, chat; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_counts_of_fewer_rows_are_not_those_of_a_finished_run(tmp_path):
    args = output(tmp_path / "out.jsonl")
    run(args, list("ab"))  # as with --limit 2
    assert run(args, list("abcd"), stop=4) == (2, None)  # killed after the last row, before the counts
    assert run(args, list("abcd")) == (4, None)
    assert run(args, list("abcd")) == (4, {"rows": 4})
