"""
Stage 3: scored responses -> preference pairs, on-policy and off-policy mixed.

Reads   --scored FILE ...  a Row (below) per prompt, as score.py writes it; several files are merged by id;
                           all rewards must be of one labeler (S1's code mixes GPT-4's with a reward model's)
Writes  --out FILE         a pair per line, as `datasets` and TRL's DPOTrainer read it, with the other keys of
                           the row; beside it x.meta.json, the record of the run, with statistics

Selection, per prompt and source, among responses that are scored, not empty and were not cut off:
    best-worst  the highest against the lowest reward, the first of equals (S1 section 3.1, S2 section 4)
    relabel     off-policy: the data set's own pair, its first two responses, ordered by reward (S2's PC_off)
    given       off-policy: the same two as they are, with or without rewards
With relabel and given, on-policy samples take best-worst. Equal texts make no pair, nor, but for given, do
equal rewards.

Mixing is SimpleMix (S1 sections 4.1, 5.2): each prompt gives one pair. Prompts are ordered by a hash of
--seed and id. Of the first --total the first round(R * total), halves up, give their on-policy pair and the
others their off-policy pair; R is --on-ratio. So counts are exact, no prompt comes twice (S1's code repeats
pairs, unlike its text), and the on-policy prompts of a smaller R are among those of a larger one. If the
files hold both sources, only prompts with a pair of each take part: but for --filter, every R uses the same.
    --on-ratio-of CATEGORY=R  another R for the prompts of a category, exact within it (ours: in S1 Fig. 2
                              on-policy data help in math and coding, off-policy data in open-ended tasks)
    --filter NAME:P           keeps the share P of off-policy pairs (of on-policy pairs if R = 1) with the
                              highest values of one of FILTERS (S1 section 5.3). With 0 < R < 1 (S1 Fig. 6)
                              on-policy pairs of the other prompts are added until their share is R

    python build_pairs.py --scored out/scored.jsonl --out out/on50.pairs.jsonl --on-ratio 0.5
    python build_pairs.py --scored out/scored.jsonl --out out/code.pairs.jsonl --on-ratio-of coding=1

Prints one JSON object last, which counts what was made and dropped. The papers are S1 SimpleMix, S2 "Is
On-Policy Data always the Best Choice [...]?", S3 "What Matters in Data for DPO?".
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from array import array
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, Required, TypedDict

import msgspec
import numpy as np

STATISTICS = ("mean", "std", "min", "25%", "median", "75%", "max")  # of S3 Table 5
SIDES = ("chosen", "rejected")
SIDE_KEYS = ("reward", "model", "finish", "token_ids", "tokenizer", "logp")  # chosen_reward, ...
Message = TypedDict("Message", {"role": str, "content": str})


class Response(TypedDict, total=False):
    text: Required[str]
    source: Required[Literal["on", "off"]]  # sampled from the model to be trained, or taken from elsewhere
    model: str | None
    finish: Literal["stop", "length"] | None  # "length": cut off at the longest response allowed
    token_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]] | None  # without the end-of-turn token
    tokenizer: str | None  # hash of the tokenizer that made them
    reward: float | None  # the last scorer's; null where it could not score
    scores: dict[str, float | None] | None  # every scorer's, by name
    logp: float | None  # sum of log-probabilities under the model to be trained


class Row(TypedDict, total=False):
    id: Required[str]
    prompt: Required[str | list[Message]]  # text is one user turn
    responses: Required[list[Response]]
    category: str | None
    labeler: str | None  # what made the rewards, such as "rm:MODEL"
    wins: list[list[Annotated[float, msgspec.Meta(ge=0, le=1)] | None]] | None  # P(response i beats j)
    cosine: list[list[float | None]] | None  # similarity of responses i and j


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--scored", required=True, nargs="+", metavar="FILE", help="scored responses, merged by id")
    flag("--out", required=True, metavar="FILE", help="the pairs, JSONL")
    flag("--select", choices=list(RULES), default="best-worst", help="the rule (default %(default)s)")
    flag("--reward", metavar="NAME", help="a scorer's name: take its score as the reward")
    flag(
        "--truncated",
        choices=["drop", "keep"],
        default="drop",
        help="what to do with responses that were cut off",
    )
    flag("--on-ratio", type=float, default=0.5, metavar="R", help="on-policy share (default %(default)s)")
    flag("--on-ratio-of", type=named_share, nargs="+", default=[], metavar="CATEGORY=R", help="see above")
    flag("--total", type=int, metavar="N", help="number of pairs (default: all)")
    flag("--filter", type=named_share, metavar="NAME:P", help="see above")
    flag("--seed", type=int, default=0, help="seed of every random choice (default %(default)s)")
    flag("--stats", action="store_true", help="print S3's Table 5 of the pairs")
    args = parser.parse_args(argv)
    if len(dict(args.on_ratio_of)) < len(args.on_ratio_of):
        parser.error("--on-ratio-of names a category twice")
    args.on_ratio_of = dict(args.on_ratio_of)
    if not 0 <= args.on_ratio <= 1 or args.total is not None and args.total < 1:
        parser.error("--on-ratio must lie in [0, 1], and --total must be at least 1")
    if args.select in DATA_SET_PAIR and min([args.on_ratio, *args.on_ratio_of.values()]) == 1:
        parser.error(f"--select {args.select} is about off-policy pairs, and --on-ratio 1 takes none")
    if args.filter and (args.filter[0] not in FILTERS or args.on_ratio_of):
        parser.error(f"--filter takes one of {', '.join(FILTERS)}, and does not go with --on-ratio-of")
    return args


def named_share(text):
    """("quality", 0.4) from "quality:0.4", and ("math", 1.0) from "math=1"."""
    match = re.fullmatch(r"(.+)[:=](\d*\.?\d+)", text)
    if not match or not 0 <= float(match[2]) <= 1:
        raise argparse.ArgumentTypeError(f"expected a name and a share in [0, 1], found {text!r}")
    return match[1], float(match[2])


# ----- selection: the responses of one prompt and source -> a pair
def best_worst(responses):
    best = max(responses, key=lambda response: response["reward"])
    others = [response for response in responses if response is not best]
    return best, min(others, key=lambda response: response["reward"])


RULES = {"best-worst": best_worst, "relabel": best_worst, "given": tuple}  # responses -> (chosen, rejected)
DATA_SET_PAIR = ("relabel", "given")  # rules for the first two off-policy responses


def why_unusable(response, rule, truncated):
    """Why a response can be in no pair; None where it can."""
    if response["reward"] is None and rule != "given":
        return "without reward"
    if response.get("finish") == "length" and truncated == "drop":
        return "truncated"  # chosen, it would teach the model not to stop
    return None if response["text"].strip() else "empty"


def select(row, source, args, dropped):
    """The pair of one prompt's responses of one source; None if there is none, and `dropped` counts why."""
    rule = "best-worst" if source == "on" and args.select in DATA_SET_PAIR else args.select
    responses = [response for response in row["responses"] if response["source"] == source]
    if rule in DATA_SET_PAIR:
        responses = responses[:2]
    reasons = [why_unusable(response, rule, args.truncated) for response in responses]
    usable = [response for response, reason in zip(responses, reasons, strict=True) if not reason]
    if len(usable) < 2:
        reason = next(filter(None, reasons), "fewer than two responses" if responses else "no response")
    else:
        chosen, rejected = RULES[rule](usable)
        if chosen["text"].strip() == rejected["text"].strip():
            reason = "identical"
        elif chosen["reward"] == rejected["reward"] and rule != "given":
            reason = "tie"
        else:
            return make_pair(row, source, chosen, rejected)
    dropped[f"{source}: {reason}"] += 1
    return None


def make_pair(row, source, chosen, rejected):
    pair = {key: value for key, value in row.items() if key not in ("responses", "wins", "cosine")}
    pair |= {"pair_id": f"{row['id']}:{source}", "source": source, "labeler": row.get("labeler")}
    pair["cosine"] = chosen.get("cosine", {}).get(id(rejected))
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        pair[side] = [{"role": "assistant", "content": response["text"]}]
        for key in SIDE_KEYS:
            pair[f"{side}_{key}"] = response.get(key)
    return pair


# ----- filters (S1 section 5.3): the pairs with the highest values are kept
FILTERS = {
    "quality": lambda pair, seed: pair["chosen_reward"] + pair["rejected_reward"],
    "contrast": lambda pair, seed: pair["chosen_reward"] - pair["rejected_reward"],
    "onpolicy": lambda pair, seed: pair["chosen_logp"] + pair["rejected_logp"],  # score.py --scorer logp
    "similarity": lambda pair, seed: -pair["cosine"],  # score.py --scorer embed; the least similar are kept
    "random": lambda pair, seed: stable_hash(seed, "filter", pair["id"], ""),  # the control
}


def keep_best(pairs, name, share, seed):
    """(ids of the floor(share * N) best pairs, N); N counts the pairs that have what the filter looks at."""
    values = {}
    for pair in pairs:
        with suppress(TypeError):  # null: not scored, or too long for its scorer
            values[pair["id"]] = FILTERS[name](pair, seed)
    ranked = sorted(values, key=lambda prompt_id: (-values[prompt_id], prompt_id))
    return set(ranked[: math.floor(share * len(ranked) + 1e-9)]), len(ranked)  # 0.29 * 100 < 29


# ----- mixing
def round_half_up(number):
    return math.floor(number + 0.5 + 1e-9)  # 0.145 * 100 is 14.499999999999998


def mix(candidates, ratio, ratio_of, total, seed):
    """{id: pair} of `total` prompts or, if there are not enough, fewer; candidates: {id: {source: pair}}."""
    order = sorted(candidates, key=lambda prompt_id: (stable_hash(seed, "mix", prompt_id), prompt_id))
    group_of = {}
    for prompt_id in order:
        first = next(iter(candidates[prompt_id].values()))
        category = first.get("category")
        group_of[prompt_id] = category if category in ratio_of else None
    wanted = Counter()  # pairs by group, which is a category of ratio_of or None, and source
    for group, n in Counter(group_of[prompt_id] for prompt_id in order[:total]).items():
        wanted[group, "on"] = round_half_up(ratio_of.get(group, ratio) * n)
        wanted[group, "off"] = n - wanted[group, "on"]
    mixed = {}
    for prompt_id in order:
        for source in ("on", "off"):
            place = group_of[prompt_id], source
            if prompt_id not in mixed and wanted[place] and source in candidates[prompt_id]:
                mixed[prompt_id] = candidates[prompt_id][source]
                wanted[place] -= 1
    return mixed


def statistics(pairs, samples):
    """{what: a row of S3 Table 5}. S1 Table 3's "Avg. reward" may be that of both sides or of all samples."""
    chosen, rejected = (np.array([pair[f"{side}_reward"] for pair in pairs], float) for side in SIDES)
    logps = [np.array([pair[f"{side}_logp"] for pair in pairs], float) for side in SIDES]
    columns = {"chosen reward": chosen, "rejected reward": rejected, "gap": chosen - rejected}
    columns["reward of both sides"] = np.concatenate([chosen, rejected])
    columns["reward of all samples"] = np.array([response["reward"] for response in samples], float)
    columns["intra-diversity"] = logps[0] - logps[1]  # S2 eq. 12
    for side in SIDES:
        columns[f"{side} characters"] = np.array([len(pair[side][0]["content"]) for pair in pairs], float)
    table = {}
    for name, values in columns.items():
        values = values[~np.isnan(values)]  # null became nan
        if len(values):
            numbers = [values.mean(), values.std(), *np.percentile(values, [0, 25, 50, 75, 100])]
            table[name] = {"n": len(values), **dict(zip(STATISTICS, map(float, numbers), strict=True))}
    return table


# ----- main
def main(args):
    started = time.time()
    files = ", ".join(args.scored)
    rows = read_responses(args.scored, needs_reward=args.select != "given" and not args.reward)
    samples = [response for row in rows.values() for response in row["responses"]]
    sources = sorted({response["source"] for response in samples})
    ratios = {args.on_ratio, *args.on_ratio_of.values()}
    needed = {"on"} if min(ratios) == 1 else {"off"}
    if 0 < max(ratios) and min(ratios) < 1:
        needed = {"off", "on"}
    if needed - set(sources):
        fail(f"{files}: --on-ratio needs responses of {sorted(needed)}, found {sources}")
    unknown = args.on_ratio_of.keys() - {row.get("category") for row in rows.values()}
    if unknown:
        fail(f"{files}: no prompt is of the category {min(unknown)!r}")
    candidates, dropped = {}, Counter()
    for prompt_id, row in rows.items():
        set_rewards(row, args.reward)
        by_source = {source: select(row, source, args, dropped) for source in sources}
        if by_source and all(by_source.values()):
            candidates[prompt_id] = by_source
    total = len(candidates)
    counts = {"rows": len(rows), "responses": len(samples), "prompts_with_pairs": total, "dropped": dropped}
    if args.filter:
        source = "on" if args.on_ratio == 1 else "off"
        filtered = [by_source[source] for by_source in candidates.values() if source in by_source]
        kept, n_valued = keep_best(filtered, *args.filter, args.seed)
        counts["filter"] = {"kept": len(kept), "of": n_valued, "without_value": len(filtered) - n_valued}
        total = len(kept)
        if args.on_ratio in (0, 1):
            candidates = {prompt_id: candidates[prompt_id] for prompt_id in kept}
        else:
            for prompt_id, by_source in candidates.items():
                del by_source["on" if prompt_id in kept else "off"]
            total = max(0, int((len(kept) - 0.5) / (1 - args.on_ratio)))  # or a bit more
            while total - round_half_up(args.on_ratio * total) < len(kept):
                total += 1
    total = args.total or total
    mixed = mix(candidates, args.on_ratio, args.on_ratio_of, total, args.seed)
    if len(mixed) < total or not mixed:
        fail(f"{files}: expected {total or 'some'} pairs, found {len(mixed)}: {json.dumps(counts)}")

    pairs = [mixed[prompt_id] for prompt_id in rows if prompt_id in mixed]  # in the order of the input
    counts |= {"pairs": len(pairs), "on": 0, "off": 0} | Counter(pair["source"] for pair in pairs)
    stats = statistics(pairs, samples)
    lines = (json.dumps(pair, ensure_ascii=False, default=list) for pair in pairs)  # arrays as lists
    write_output(args, args.scored, lines, started, counts=counts, stats=stats)
    if args.stats:
        for name, row in stats.items():
            print(f"{name:22}", *(f"{column} {number:.5g}" for column, number in row.items()))
    print(json.dumps({"out": args.out, **counts}))


def set_rewards(row, name):
    """Make the scores of this scorer the rewards, and it the labeler of rows whose rewards change."""
    for response in row["responses"]:
        reward = response.setdefault("reward", None)
        if name:
            response["reward"] = (response.get("scores") or {}).get(name)
            row["labeler"] = row.get("labeler") if response["reward"] == reward else name


# ----- reading and writing: the same text in every script that has it (tests/test_copies.py)
def fail(message):
    """End the run because of a mistake of the user: one sentence, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def stable_hash(*parts):
    """64 bits that depend on nothing but the parts: the seed of every random choice."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def read_jsonl(path, shape):
    """Yield ("file:line", row) for each line; a row that does not fit the TypedDict `shape` ends the run."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        fail(f"{path}: expected JSON lines, found no file or an empty one")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = msgspec.json.decode(line)
                msgspec.convert(row, shape)
            except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
                fail(f"{path}:{number}: {error}")
            yield f"{path}:{number}", row


def read_responses(paths, needs_reward=True):
    """{id: row} of scored files, rows of one id merged. All rewards must be of one labeler."""
    rows, labelers, places = {}, set(), set()
    for path in paths:
        file = os.path.realpath(path)
        for where, row in read_jsonl(path, Row):
            normalise(row, where, needs_reward)
            if (file, row["id"]) in places:
                fail(f"{where}: the id {row['id']} is twice in this file")
            places.add((file, row["id"]))
            if any(response.get("reward") is not None for response in row["responses"]):
                labelers.add(str(row.get("labeler")))
            first = rows.setdefault(row["id"], row)
            if first is row:
                continue
            if first["prompt"] != row["prompt"]:
                fail(f"{where}: the id {row['id']} has another prompt in an earlier file")
            given = {key: value for key, value in first.items() if value is not None}
            rows[row["id"]] = row | given | {"responses": first["responses"] + row["responses"]}
    if len(labelers) > 1:
        fail(f"{', '.join(paths)}: the rewards are of different labelers, {' and '.join(sorted(labelers))}")
    return rows


def normalise(row, where, needs_reward):
    """A text prompt becomes messages, and a matrix a dict of each response: response["wins"][id(other)]."""
    if isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if not row["prompt"] or row["prompt"][-1]["role"] != "user":
        fail(f"{where}: expected a prompt that ends with a user turn")
    responses, n = row["responses"], len(row["responses"])
    for name in ("wins", "cosine"):
        matrix = row.get(name)
        if matrix is not None and [len(line) for line in matrix] != [n] * n:
            fail(f'{where}: expected "{name}" to have a row and a column for every response')
        for response in responses:
            response.pop(name, None)
        for response, line in zip(responses, matrix or [], strict=False):
            response[name] = dict(zip(map(id, responses), line, strict=True))
    for response in responses:
        if needs_reward and "reward" not in response:
            fail(f'{where}: expected every response to have a "reward" (score.py writes it)')
        if response.get("token_ids") is not None:
            response["token_ids"] = array("I", response["token_ids"])  # a tenth of a list's memory


def check_output(args, inputs):
    """The paths of --out and of its record; they must not be inputs or records of inputs, nor folders."""
    outputs = [args.out, os.path.splitext(args.out)[0] + ".meta.json"]
    taken = [*inputs, *(os.path.splitext(path)[0] + ".meta.json" for path in inputs)]
    for path in outputs:
        if {os.path.realpath(path), os.path.realpath(f"{path}.tmp")} & set(map(os.path.realpath, taken)):
            fail(f"--out {args.out}: {path} would replace an input or the record of one")
        if Path(path).exists() and not Path(path).is_file():
            fail(f"--out {args.out}: {path} is there and is not a file")
    return outputs


def write_output(args, inputs, lines, started, **facts):
    """Write the lines to --out and how they were made to its record, x.meta.json for x.jsonl or x.json."""
    outputs = check_output(args, inputs)
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True)
    meta = {"argv": sys.argv, "args": vars(args), "git": git.stdout.decode().strip() or None, "inputs": {}}
    for path in inputs:
        with open(path, "rb") as file:
            meta["inputs"][path] = hashlib.file_digest(file, "sha256").hexdigest()
    meta["versions"] = {"numpy": np.__version__, "msgspec": msgspec.__version__}
    meta |= {**facts, "seconds": round(time.time() - started, 2)}
    try:
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        for path, text in zip(outputs, (lines, [json.dumps(meta, indent=1)]), strict=True):
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in text)
            os.replace(f"{path}.tmp", path)
    except (OSError, RecursionError) as error:
        fail(f"--out {args.out}: {error}")


if __name__ == "__main__":
    main(parse_args())
