"""
Files and pairs as people have them: what data/import_responses.py reads.

A file is JSONL, a JSON list, parquet or, with --format csv, CSV, by its first bytes and not by its name. It
may be gzipped, and begin with a byte order mark or blanks. A row is a dict of what JSON has, nan and bytes
besides. One that does not fit ends the run with its line, or its number where a file has no lines.
"""

import csv
import gzip
import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Required, TypedDict

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from chat import answer  # noqa: E402
from common import Message, as_messages, fail, read_jsonl  # noqa: E402

PAIR = ("prompt", "chosen", "rejected")  # the columns of a CSV file, or else these:
VOTE = ("question", "answer_a", "answer_b", "better")
ABOUT = ("model", "score", "rating", "reward")  # columns of pairs: chosen_model, score_chosen, chosen-rating
KINDS = "JSON lines, a JSON list, parquet, or CSV with --format csv"
BATCH = 256  # rows of a parquet file that are in memory at once


def read_tables(names, split, form, shape, dropped, hub_files):
    """Yield ("file:line", row) of files and hub ids, all of one shape; `dropped` counts exact duplicates."""
    seen = set()
    for name in names:
        table = read_hub(name, split, form, hub_files) if is_hub_id(name) else read_file(name, form)
        for line, row in table:
            try:
                msgspec.convert(row, shape)
            except msgspec.ValidationError as error:
                found = f", found {', '.join(row)}" if "missing" in str(error) else ""
                fail(f"{line}: {error}{found}; --help says what --format {form} reads")
            digest = hashlib.sha256(msgspec.json.encode(row, order="sorted")).digest()
            if digest in seen:
                dropped["duplicate row"] += 1
            else:
                seen.add(digest)
                yield line, row


def is_hub_id(name):
    is_file = os.path.exists(name) or name.endswith((".json", ".jsonl", ".parquet", ".csv", ".gz"))
    return not is_file and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def read_hub(name, split, form, hub_files):
    number = 0
    try:
        os.environ.update(HF_HUB_VERBOSITY="critical", DATASETS_VERBOSITY="critical")
        import datasets  # slow, and needed only here

        rows = datasets.load_dataset(name, split=split)
        hub_files[name] = rows.cache_files  # their path contains the commit
        for number, row in enumerate(rows, 1):
            if form == "rows":  # `datasets` gives all rows the keys of all others
                row = {key: value for key, value in row.items() if value is not None}
            yield f"{name}:{number}", plain(row)
    except Exception as error:  # of many libraries
        sentence = " ".join(str(error.__cause__ or error).split())[:300]
        fail(f"{name}:{number}: {sentence}" if number else f"{name}: {sentence}")


def read_file(path, form):
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        fail(f"{path}: expected {'CSV' if form == 'csv' else 'JSON lines'}, found no file or an empty one")
    number = 0
    try:
        with open(path, "rb") as raw, unzipped(raw) as file:
            if file.peek(3)[:3] == b"\xef\xbb\xbf":  # a byte order mark, as programs on Windows write it
                file.read(3)
            begin = file.peek(4096).lstrip()
            if begin.startswith(b"PAR1"):
                rows = enumerate(parquet_rows(file), 1)
            elif begin and form == "csv":
                rows = csv_rows(file, path)
            elif begin.startswith(b"["):
                items = msgspec.json.decode(file.read(), type=list[msgspec.Raw])
                rows = enumerate(map(msgspec.json.decode, items), 1)
            elif begin.startswith(b"{"):
                yield from read_jsonl(path, dict)
                return
            else:
                fail(f"{path}: expected {KINDS}, found {begin[:20] or 'nothing'}")
            for number, row in rows:
                yield f"{path}:{number}", row
    except Exception as error:  # of many libraries
        sentence = " ".join(str(error).split())[:300]
        reached = f" after row {number}" if number else ""
        fail(f"{path}: cannot be read{reached}: {sentence}; is the file complete?")


def unzipped(file):
    return gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file


def plain(row):
    """Dates and what else JSON does not have as text; but bytes, which are no text, stay."""
    return msgspec.to_builtins(row, builtin_types=(bytes,), enc_hook=str)


def parquet_rows(file):
    from pyarrow.parquet import ParquetFile  # slow, and needed only here

    with tempfile.TemporaryFile() as copy:
        if isinstance(file, gzip.GzipFile):  # whose end, which is read first, is far away
            shutil.copyfileobj(file, copy)
            file = copy
        for batch in ParquetFile(file, pre_buffer=False, buffer_size=2**20).iter_batches(BATCH):
            yield from map(plain, batch.to_pylist())


def csv_rows(file, path):
    """Yield (number of its first line, row), columns as text, with a vote as chosen and rejected."""
    csv.field_size_limit(2**31 - 1)
    line = 1
    try:
        texts = (text.decode() for text in file)
        while not (header := next(texts)).strip():
            line += 1
        names, delimiter = read_header(header, f"{path}:{line}")
        reader, start = csv.reader(texts, delimiter=delimiter, strict=True), line + 1
        line = start
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if len(cells) != len(names):
                    advice = f"put a text with {delimiter!r} or line breaks in quotes"
                    fail(f"{path}:{line}: expected {len(names)} cells, found {len(cells)}; {advice}")
                for name, cell in zip(names, cells, strict=True):
                    if re.match(r"""\[\{["'](role|content)["']:""", cell):
                        advice = "use --format pairs with JSONL or parquet"
                        fail(f"{path}:{line}: expected text in the column {name}, found messages; {advice}")
                row = dict(zip(names, cells, strict=True))
                row["id"] = row.get("id") or None
                yield line, row if row.keys() >= set(PAIR) else as_pair(row, f"{path}:{line}")
            line = start + reader.line_num
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1]
        fail(f"{path}:{line}: expected UTF-8, found the byte {byte}; save the file as UTF-8")
    except csv.Error as error:
        fail(f"{path}:{line}: this row is no CSV: {error}")


def read_header(header, line):
    """(names of the columns, the first of comma, semicolon and tab that gives those of a PAIR or VOTE)."""
    for delimiter in ",;\t":
        names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
        names = [name.strip() or f"column {number}" for number, name in enumerate(names, 1)]
        if set(names) >= set(PAIR) or set(names) >= set(VOTE):
            if len(set(names)) < len(names):
                fail(f"{line}: expected different names in the header, found {', '.join(names)}")
            return names, delimiter
    expected = f"{', '.join(PAIR)} or {', '.join(VOTE)}"
    fail(f"{line}: expected a header with the columns {expected}, found {header.strip()[:200]!r}")


def as_pair(row, line):
    """The row of a VOTE with the keys of a PAIR."""
    better = row.pop("better")
    answers = {"a": row.pop("answer_a"), "b": row.pop("answer_b")}
    if better.strip().lower() not in answers:
        fail(f"{line}: expected a or b in the column better, found {better!r}; correct or remove this row")
    chosen = answers.pop(better.strip().lower())
    return row | {"prompt": row.pop("question"), "chosen": chosen, "rejected": answers.popitem()[1]}


# ----- pairs
class Pair(TypedDict, total=False):
    id: str | int | None
    prompt: str | list[Message] | None  # None: chosen and rejected are conversations that begin with it
    chosen: Required[str | list[Message] | None]  # None, as parquet has it, is an empty answer
    rejected: Required[str | list[Message] | None]


def from_pairs(row, line):
    prompt, prompts, responses = row.pop("prompt", None), [], []
    for side in ("chosen", "rejected"):
        text = row.pop(side)
        turns = conversation("" if text is None else text, line)
        if not turns or turns[-1]["role"] != "assistant":
            fail(f"{line}: expected {side} to be text, or messages that end with the assistant's")
        if turns[:-1] and isinstance(prompt, list) and turns[:-1] != prompt:
            fail(f"{line}: expected {side} to be an answer to the prompt, or to begin with its messages")
        prompts.append(turns[:-1] or prompt)
        about = columns_about(row, side)
        model = about.pop("model", None)
        response = {"text": turns[-1]["content"], "model": None if model is None else str(model)}
        responses.append(response | {"scores": about})
    if None in prompts:
        fail(f'{line}: expected "prompt", or chosen and rejected as conversations that begin with it')
    row["prompt"], prompt = (as_messages(prompt, line) for prompt in prompts)
    if row["prompt"] != prompt:
        return "different prompts"
    first, second = (answer(response).strip() for response in responses)
    if not (first and second and any(turn["content"].strip() for turn in prompt)):
        return "empty"
    return "identical" if first == second else row | {"responses": responses}


def conversation(text, line):
    """Messages of an answer, or of a conversation as hh-rlhf writes it; other messages stay."""
    if not isinstance(text, str):
        return text
    if not text.startswith("\n\nHuman:"):
        return [{"role": "assistant", "content": text}]
    prompt, _, text = text.rpartition("\n\nAssistant:")
    role = "user" if "\n\nHuman:" in text else "assistant"
    return [*as_messages(prompt, line), {"role": role, "content": text.removeprefix(" ")}]


def columns_about(row, side):
    """{what: value} of the columns about chosen or rejected, which leave the row."""
    about = {}
    for what in ABOUT:
        for column in (f"{side}_{what}", f"{what}_{side}", f"{side}-{what}"):
            if column in row:
                about[what] = row.pop(column)
    return about
