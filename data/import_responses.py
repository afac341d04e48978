"""
Stage 1 without sampling: other people's answers -> responses, the off-policy data of the papers.

Reads   --data FILE_OR_HUB_ID ...  JSONL, a .json list, .parquet or data sets of the hub, in the form --format
            rows                     ours: a Row (below); its other keys are passed on
            ultrafeedback            openbmb/UltraFeedback: answers of four models, rated by GPT-4
            ultrafeedback_binarized  HuggingFaceH4/ultrafeedback_binarized: pairs, the chosen answer first
            helpsteer2               nvidia/HelpSteer2: two answers to a prompt, rated by people
            oasst2                   OpenAssistant/oasst2: first turns with at least 3 answers (S3 5.1)
            alpaca_eval              the outputs of a model as AlpacaEval keeps them
Writes  --out FILE  a row per prompt: id, prompt, responses; and x.meta.json, the record of the run

Rows of one prompt are merged, also those of several files, and their responses stay in order. A missing id
becomes a hash of the prompt, and a score that is no number, such as "N/A", null. Prints one JSON object last,
which counts what was written and left out. The papers are S1 SimpleMix, S3 "What Matters in Data for DPO?".

    python data/import_responses.py --format rows --data data/train.jsonl --out out/off.jsonl
    python data/import_responses.py --format helpsteer2 --data nvidia/HelpSteer2 --out out/off.jsonl
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict

import msgspec
from pyarrow.parquet import ParquetFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Message, as_messages, fail, read_jsonl, write_output  # noqa: E402

# HelpSteer2's attributes, and their weights in the reward that S1's code makes of them
WEIGHTS = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.4}
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")  # of UltraFeedback
SPLITS = {"ultrafeedback_binarized": "train_prefs", "alpaca_eval": "eval"}  # of hub ids; of the others train
Prompt = str | list[Message]  # text is one user turn


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


# ----- a row of each format -> {"prompt", "responses"}, and "id" where it has one
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
    return {"prompt": row["instruction"], "dataset": row["source"], "responses": responses}


def from_pair(row, line):
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


def oasst2_prompts(table, left_out):
    """Rows of our own form from messages, of which each may come before the one that it answers."""
    prompts, answers = [], {}
    for line, row in table:
        if row.get("deleted"):
            left_out["deleted_messages"] += 1
        elif row["role"] == "prompter" and row["parent_id"] is None:
            prompts.append((line, {"id": row["message_id"], "prompt": row["text"], "lang": row.get("lang")}))
        elif row["role"] == "assistant":
            entry = {"text": row["text"], "scores": {"oasst2_rank": row.get("rank")}}
            answers.setdefault(row["parent_id"], []).append(entry)
        else:
            left_out["other_messages"] += 1
    for line, row in prompts:
        row["responses"] = answers.pop(row["id"], [])
        if len(row["responses"]) >= 3:
            yield line, row
        else:
            left_out["prompts_with_under_3_answers"] += 1
    left_out["other_messages"] += sum(map(len, answers.values()))  # answers to later turns


FORMATS = {  # (keys that a row must have, its translation)
    "rows": (Row, from_rows),
    "ultrafeedback": ({"source": str | None, "instruction": Prompt, "completions": list[Entry]}, from_ultra),
    "ultrafeedback_binarized": ({"chosen": Turns, "rejected": Turns}, from_pair),
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
    """(text of the prompt, the row with messages as its prompt, a text id and responses with all keys)."""
    turns = as_messages(row["prompt"], line)
    row["prompt"] = [{"role": turn["role"], "content": turn["content"], **turn} for turn in turns]
    text = json.dumps(row["prompt"], ensure_ascii=False, sort_keys=True)
    row["id"] = hashlib.sha256(text.encode()).hexdigest()[:16] if row.get("id") is None else str(row["id"])
    responses = []
    for entry in row["responses"]:
        entry = {"text": entry} if isinstance(entry, str) else entry
        response = {"text": entry["text"], "source": source, "model": entry.get("model")}
        response |= {"finish": entry.get("finish"), "tokens": None, "token_ids": None, "tokenizer": None}
        scores = {name: rating(value) for name, value in (entry.get("scores") or {}).items()}
        responses.append(response | {"scores": scores or None})
    for key in ("responses", "wins", "cosine", "labeler"):  # the last three are about earlier responses
        row.pop(key, None)
    return text, row | {"responses": responses}


# ----- main
def main(args):
    started = time.time()
    keys, translate = FORMATS[args.format]
    shape = Row if keys is Row else TypedDict(args.format, keys)
    left_out, hub_files = Counter(rows_merged_into_others=0), {}
    table = read_table(args, shape, hub_files)
    table = oasst2_prompts(table, left_out) if args.format == "oasst2" else table
    rows, prompts = {}, {}  # {text of the prompt: row}, {id: text of the prompt}
    for line, row in table:
        row = translate(row, line)
        if not row["responses"]:
            left_out["without_responses"] += 1
            continue
        text, row = finish_row(row, line, args.source)
        if prompts.setdefault(row["id"], text) != text:
            fail(f"{line}: the id {row['id']} has another prompt in an earlier row")
        first = rows.setdefault(text, row)
        if first is not row:
            first["responses"] += row["responses"]
            left_out["rows_merged_into_others"] += 1
    if not rows:
        fail(f"{', '.join(args.data)}: no prompt with responses is left: {json.dumps(left_out)}")
    rows = list(rows.values())[: args.limit]
    responses = [response for row in rows for response in row["responses"]]
    counts = {"rows": len(rows), "responses": len(responses), **left_out}
    counts["truncated"] = sum(response["finish"] == "length" for response in responses)
    counts["empty"] = sum(not response["text"].rpartition("</think>")[2].strip() for response in responses)
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    files = [name for name in args.data if name not in hub_files]
    seconds = round(time.time() - started, 2)
    write_output(args, files, lines, counts=counts, hub_files=hub_files, seconds=seconds)
    print(json.dumps({"out": args.out, **counts}))


def is_hub_id(name):
    is_file = os.path.exists(name) or name.endswith((".json", ".jsonl", ".parquet", ".gz"))
    return not is_file and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def read_table(args, shape, hub_files):
    """Yield ("file:row", row) of all data; a row that does not fit the TypedDict `shape` ends the run."""
    for name in args.data:
        is_list = name.endswith(".json") and os.path.isfile(name) and Path(name).read_bytes()[:1] == b"["
        if not is_list and not name.endswith(".parquet") and not is_hub_id(name):
            yield from read_jsonl(name, shape)
            continue
        number = 0
        try:
            if is_list:
                rows = msgspec.json.decode(Path(name).read_bytes())
            elif name.endswith(".parquet"):
                rows = ParquetFile(name).read().to_pylist()
            else:
                os.environ.update(HF_HUB_VERBOSITY="critical", DATASETS_VERBOSITY="critical")
                import datasets  # slow, and needed only here

                rows = datasets.load_dataset(name, split=args.split or SPLITS.get(args.format, "train"))
                hub_files[name] = rows.cache_files  # their path contains the commit
            for number, row in enumerate(rows, 1):
                row = msgspec.json.decode(msgspec.json.encode(row))  # dates become text, nan null
                if name in hub_files and shape is Row:  # `datasets` gives all rows the keys of all others
                    row = {key: value for key, value in row.items() if value is not None}
                msgspec.convert(row, shape)
                yield f"{name}:{number}", row
        except Exception as error:  # of many libraries
            sentence = " ".join(str(error.__cause__ or error).split())[:300]
            fail(f"{name}:{number}: {sentence}" if number else f"{name}: {sentence}")


if __name__ == "__main__":
    main(parse_args())
