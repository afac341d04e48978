"""
Leaves out prompts that are also in another file: questions of benchmarks, or what a model was trained on (S3
5.1).

Reads   --prompts FILE   one row per line with a "prompt": prompts, responses, scored responses or pairs
        --seen FILE ...  rows whose user turns must not be trained on, under "prompt", "messages", "question"
                         or "instruction": text, or messages {"role", "content"}
Writes  --out FILE       the rows of --prompts, without those that have a user turn of these files

Two turns are equal if their letters and digits are, whatever their case, spaces and punctuation.

    python data/decontaminate.py --prompts out/off.jsonl --seen tulu3_sft.jsonl --out out/clean.jsonl

Prints one JSON object: rows read, removed and kept.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Required, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Message, fail, read_jsonl, write_output  # noqa: E402

TURNS = ("prompt", "messages", "question", "instruction")


class PromptRow(TypedDict, total=False):
    prompt: Required[str | list[Message]]


class OtherRow(TypedDict, total=False):
    prompt: str | list[Message] | None
    messages: str | list[Message] | None
    question: str | list[Message] | None
    instruction: str | list[Message] | None


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="rows with a prompt, JSONL")
    parser.add_argument(
        "--seen", required=True, nargs="+", metavar="FILE", help="rows that must not be trained on"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows that are left, JSONL")
    return parser.parse_args(argv)


def user_turns(row):
    """The user turns of a row, each as its letters and digits with one space between words, or as ""."""
    turns = set()
    for key in TURNS:
        value = row.get(key)
        if isinstance(value, str):
            value = [{"role": "user", "content": value}]
        for message in value if isinstance(value, list) else []:
            if message["role"] == "user":
                turns.add(" ".join(re.findall(r"[^\W_]+", message["content"].casefold())))
    return turns


def main(args):
    started = time.time()
    excluded = set()
    for path in args.seen:
        for line, row in read_jsonl(path, OtherRow):
            turns = user_turns(row)
            if not turns:
                fail(f"{line}: expected a user turn under one of {', '.join(TURNS)}")
            excluded |= turns - {""}
    lines, n_rows = [], 0
    for _, row in read_jsonl(args.prompts, PromptRow):
        n_rows += 1
        if excluded.isdisjoint(user_turns({"prompt": row["prompt"]})):
            lines.append(json.dumps(row, ensure_ascii=False))
    counts = {"rows": n_rows, "removed": n_rows - len(lines), "kept": len(lines)}
    inputs = [args.prompts, *args.seen]
    write_output(args, inputs, lines, counts=counts, seconds=round(time.time() - started, 2))
    print(json.dumps({"out": args.out, **counts}))


if __name__ == "__main__":
    main(parse_args())
