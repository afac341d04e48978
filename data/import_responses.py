"""
Stage 1 without sampling: other people's answers -> responses, the off-policy data of the papers.

Reads   --data FILE_OR_HUB_ID ...  JSONL, JSON lists, parquet, CSV, .gz, or hub ids, in the form --format
            rows                     ours: a Row (below)
            pairs                    prompt, chosen, rejected, as text or as messages (read_tables.py)
            csv                      the same columns as CSV, or question, answer_a, answer_b, better (a or b)
            ultrafeedback            openbmb/UltraFeedback: answers of four models, rated by GPT-4
            ultrafeedback_binarized  HuggingFaceH4/ultrafeedback_binarized: pairs, the chosen answer first
            helpsteer2               nvidia/HelpSteer2: two answers to a prompt, rated by people
            oasst2                   OpenAssistant/oasst2: first turns with at least 3 answers (S3 5.1)
            alpaca_eval              the outputs of a model as AlpacaEval keeps them
Writes  --out FILE  a row per prompt or pair: id, prompt, responses; and x.meta.json, the record of the run

A pair stays a row, its chosen answer first, as build_pairs.py --select given expects it; if an id or a prompt
without one comes again, -2 is added to the id. Other rows of one prompt are merged, also those of several
files, and their responses stay in order. A missing id becomes a hash of the prompt, and a score that is no
number, such as "N/A", null. rows, pairs and csv pass all other columns on.

Prints one JSON object last. Its "dropped" counts by reason the rows that are left out: duplicates of earlier
rows, pairs with an empty answer or two equal ones. S1 is SimpleMix, S3 "What Matters in Data for DPO?".

    python data/import_responses.py --format csv --data mine.csv --out out/off.jsonl
    python data/import_responses.py --format helpsteer2 --data nvidia/HelpSteer2 --out out/off.jsonl
"""

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict

import msgspec

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
from read_tables import Pair, from_pairs, is_hub_id, read_tables  # noqa: E402

from chat import answer  # noqa: E402
from common import Message, as_messages, fail, write_output  # noqa: E402

# HelpSteer2's attributes, and their weights in the reward that S1's code makes of them
WEIGHTS = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.4}
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")  # of UltraFeedback
SPLITS = {"ultrafeedback_binarized": "train_prefs", "alpaca_eval": "eval"}  # of hub ids; of the others train
PAIRS = ("pairs", "csv", "ultrafeedback_binarized")  # whose rows are never merged
Prompt = str | list[Message]  # text is one user turn, or hh-rlhf's turns


# ----- the shape of the rows of each format, which may have other keys too
class Answer(TypedDict, total=False):
    text: Required[str]
    model: str | None
    finish: Literal["stop", "length"] | None  # "length": cut off at the longest response allowed
    scores: dict[str, Any] | None


class Row(TypedDict, total=False):
    id: str | int | None
    prompt: Required[Prompt]
    response: str  # and its model, or else responses
    model: str | None
    responses: list[str | Answer]


Ratings = NotRequired[dict[str, dict[str, Any] | None] | None]  # {aspect: {"Rating": "4"}}
Entry = TypedDict("Entry", {"response": str, "model": NotRequired[str | None], "annotations": Ratings})
Turns = Annotated[list[Message], msgspec.Meta(min_length=2)]  # a prompt and its answer


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--format", required=True, choices=list(FORMATS), help="the form of --data")
    flag("--data", required=True, nargs="+", metavar="FILE_OR_HUB_ID", help="other people's answers")
    flag("--split", help="of a hub id (default: train; train_prefs of pairs, eval of AlpacaEval)")
    flag("--out", required=True, metavar="FILE", help="the responses, JSONL")
    flag("--source", choices=["on", "off"], default="off", help="on: of the model to train (default off)")
    flag("--limit", type=int, metavar="N", help="only the first N prompts")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1 or args.split and not any(map(is_hub_id, args.data)):
        parser.error("--limit must be at least 1, and --split is about a hub id in --data")
    return args


# ----- a row of each format -> {"prompt", "responses"}, and "id" where it has one; or why it is left out
def from_rows(row, line):
    if "response" in row:
        row["responses"] = [{"text": row.pop("response"), "model": row.pop("model", None)}]
    if not row.get("responses"):
        fail(f'{line}: expected "response" or a list "responses", found {", ".join(sorted(row))}')
    return row


def from_ultra(row, line):
    """An overall_score of 10 means 1 in places (argilla-io/notus, issue 7); the other scores are safer."""
    responses = []
    for entry in row["completions"]:
        annotations = entry.get("annotations") or {}
        scores = {name: entry.get(name) for name in ("overall_score", "fine-grained_score")}
        scores |= {name: (annotations.get(name) or {}).get("Rating") for name in ASPECTS}
        responses.append({"text": entry["response"], "model": entry.get("model"), "scores": scores})
    row = {"prompt": row["instruction"], "dataset": row["source"], "responses": responses}
    return row if responses else "without responses"


def from_binarized(row, line):
    (*prompt, chosen), (*same_prompt, rejected) = row["chosen"], row["rejected"]
    if prompt != same_prompt or not chosen["role"] == rejected["role"] == "assistant":
        fail(f"{line}: expected chosen and rejected to be one prompt and two answers of the assistant to it")
    responses = []
    for turn, score in (chosen, "score_chosen"), (rejected, "score_rejected"):
        responses.append({"text": turn["content"], "scores": {"ultrafeedback": row.get(score)}})
    return {"id": row.get("prompt_id"), "prompt": prompt, "responses": responses}


def from_helpsteer2(row, line):
    prompt = row["prompt"]
    if isinstance(prompt, str):  # each later turn follows a line that names its role
        parts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", f"<extra_id_1>User\n{prompt}")[1:]
        turns = zip(parts[::2], parts[1::2], strict=True)
        prompt = [{"role": role.lower(), "content": content} for role, content in turns]
    scores, total = {name: rating(row[name]) for name in WEIGHTS}, None
    if None not in scores.values():  # rounded, because equal sums must tie
        total = round(sum(scores[name] * weight for name, weight in WEIGHTS.items()), 6)
    scores["helpsteer2"] = total
    return {"prompt": prompt, "responses": [{"text": row["response"], "scores": scores}]}


def from_alpaca_eval(row, line):
    responses = [{"text": row["output"], "model": row["generator"]}]
    return {"prompt": row["instruction"], "dataset": row.get("dataset"), "responses": responses}


def oasst2_prompts(table, dropped):
    """Rows of our own form from messages, of which each may come before the one that it answers."""
    prompts, answers = [], {}
    for line, row in table:
        if row.get("deleted"):
            dropped["deleted message"] += 1
        elif row["role"] == "prompter" and row["parent_id"] is None:
            prompts.append((line, {"id": row["message_id"], "prompt": row["text"], "lang": row.get("lang")}))
        elif row["role"] == "assistant":
            entry = {"text": row["text"], "scores": {"oasst2_rank": row.get("rank")}}
            answers.setdefault(row["parent_id"], []).append(entry)
        else:
            dropped["message of a later turn"] += 1
    for line, row in prompts:
        row["responses"] = answers.pop(row["id"], [])
        if len(row["responses"]) >= 3:
            yield line, row
        else:
            dropped["prompt with under 3 answers"] += 1
            dropped["answer to such a prompt"] += len(row["responses"])
    dropped["message of a later turn"] += sum(map(len, answers.values()))  # answers to later turns


FORMATS = {  # (keys that a row must have, its translation)
    "rows": (Row, from_rows),
    "pairs": (Pair, from_pairs),
    "csv": (Pair, from_pairs),
    "ultrafeedback": ({"source": str | None, "instruction": Prompt, "completions": list[Entry]}, from_ultra),
    "ultrafeedback_binarized": ({"chosen": Turns, "rejected": Turns}, from_binarized),
    "helpsteer2": ({"prompt": Prompt, "response": str, **dict.fromkeys(WEIGHTS, Any)}, from_helpsteer2),
    "oasst2": ({"message_id": str, "parent_id": str | None, "text": str, "role": str}, from_rows),
    "alpaca_eval": ({"instruction": Prompt, "output": str, "generator": str}, from_alpaca_eval),
}


def rating(value):
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError, OverflowError):
        return None


def finish_row(row, line, source):
    """(hash of the prompt, the row with messages as its prompt, a text id and responses with all keys)."""
    turns = as_messages(row["prompt"], line)
    row["prompt"] = [{"role": turn["role"], "content": turn["content"], **turn} for turn in turns]
    text = json.dumps(row["prompt"], ensure_ascii=False, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    row["id"] = key[:16] if row.get("id") is None else str(row["id"])
    responses = []
    for entry in row["responses"]:
        entry = {"text": entry} if isinstance(entry, str) else entry
        response = {"text": entry["text"], "source": source, "model": entry.get("model")}
        response |= {"finish": entry.get("finish"), "tokens": None, "token_ids": None, "tokenizer": None}
        scores = {name: rating(value) for name, value in (entry.get("scores") or {}).items()}
        responses.append(response | {"scores": scores or None})
    for name in ("responses", "wins", "cosine", "labeler"):  # the last three are about earlier responses
        row.pop(name, None)
    return key, row | {"responses": responses}


def numbers_of(row):
    """What the record counts of a row's responses."""
    responses = row["responses"]
    cut = sum(response["finish"] == "length" for response in responses)
    empty = sum(not answer(response).strip() for response in responses)
    return Counter(responses=len(responses), truncated=cut, empty=empty)


# ----- main
def main(args):
    started = time.time()
    dropped, hub_files = Counter(), {}
    rows, merged = gather(args, dropped, hub_files)
    if not rows:
        fail(f"{', '.join(args.data)}: no prompt with responses is left; dropped: {json.dumps(+dropped)}")
    rows = list(rows.values())[: args.limit]
    counts = {"rows": len(rows), "responses": 0, "truncated": 0, "empty": 0}
    counts |= sum((numbers for _, numbers in rows), Counter())
    counts |= {"rows_merged_into_others": merged, "dropped": +dropped}
    files = [name for name in args.data if name not in hub_files]
    lines = (one_line(parts) for parts, _ in rows)
    seconds = round(time.time() - started, 2)
    write_output(args, files, lines, counts=counts, hub_files=hub_files, seconds=seconds)
    print(json.dumps({"out": args.out, **counts}))


def gather(args, dropped, hub_files):
    """({prompt, or id of a pair: (its rows, numbers_of them)}, how many rows were merged into others)."""
    keys, translate = FORMATS[args.format]
    shape = TypedDict(args.format, keys) if isinstance(keys, dict) else keys
    split = args.split or SPLITS.get(args.format, "train")
    table = read_tables(args.data, split, args.format, shape, dropped, hub_files)
    table = oasst2_prompts(table, dropped) if args.format == "oasst2" else table
    rows, prompts, repeats, merged = {}, {}, Counter(), 0
    for line, row in table:
        row = translate(row, line)
        if isinstance(row, str):
            dropped[row] += 1
            continue
        key, row = finish_row(row, line, args.source)
        if args.format in PAIRS:
            key = row["id"] = new_id(row["id"], prompts, repeats)
        if prompts.setdefault(row["id"], key) != key:
            fail(f"{line}: the id {row['id']} has another prompt in an earlier row")
        parts, numbers = rows.setdefault(key, ([], Counter()))
        merged += bool(parts)
        parts.append(msgspec.json.encode(row))  # a tenth of the memory of the row
        numbers.update(numbers_of(row))
    return rows, merged


def new_id(name, ids, repeats):
    """The id or, where an earlier row has it, the first of ID-2, ID-3, ... that none has."""
    new = name
    while new in ids:
        repeats[name] += 1
        new = f"{name}-{repeats[name] + 1}"
    return new


def one_line(parts):
    """The rows of a prompt as one, with the responses of all."""
    row, *others = map(msgspec.json.decode, parts)
    for other in others:
        row["responses"] += other["responses"]
    return json.dumps(row, ensure_ascii=False)


if __name__ == "__main__":
    main(parse_args())
