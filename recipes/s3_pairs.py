"""
S3's pair sets ("What matters in data for DPO?"): build_pairs.py with other rules and changes of pairs.

Reads   --scored FILE ...  a Row per prompt, as build_pairs.py reads it; several files are merged by id
Writes  --out FILE         pairs as build_pairs.py writes them; "source" is "cross" if the sides differ in it

One rule chooses a pair among a prompt's usable off-policy responses, sorted by reward:
    --tiers A/B           section 5.1, Table 1: best, high, medium, low, worst are i = 0, ..., 4, and take the
                          rank floor(i(k-1)/4 + 1/2) of k responses, counted from 0. A prompt with fewer than
                          five responses or with equal tiers is left out whatever A and B are, so that all
                          sets have the same prompts
    --ranks A B           two ranks, counted from 1, the best. The rule of Table 3's sets is unpublished:
                          1 3 (LG-HQ) and 2 4 (LG-LQ) with --gap 1.5, 1 2 (SG-HQ), 3 4 (SG-LQ) come near
                          its means
    --gap LOW [HIGH]      besides, only pairs whose rewards are that far apart
Then, for the prompts with a pair:
    --disagree NAME       B.1: only pairs that "scores"[NAME] orders the other way
    --replace RHO         Algorithm 1: in floor(RHO N) of N pairs the best on-policy response y' meets the old
                          chosen response y_w. y' becomes the chosen one if its reward is higher (line 13),
                          else the rejected one (line 15, which keeps ties). --replace-rule rejected: the
                          rejected one (section 5.3 and the note of Table 5, which contradict Algorithm 1)
    --swap-rejected FILE  Table 3's "-inv" sets: the rejected responses of the pairs in FILE, joined by id
    --inverted keep       keeps pairs whose rejected response then has the higher reward, as S3 does

    python recipes/s3_pairs.py --scored out/off.jsonl --out out/best_low.pairs.jsonl --tiers best/low
    python recipes/s3_pairs.py --scored out/off.jsonl --out out/lg_hq.pairs.jsonl --ranks 1 3 --gap 1.5
    python recipes/s3_pairs.py --scored off.jsonl on.jsonl --out on10.jsonl --tiers best/low --replace 0.1

Prints one JSON object: counts of rows and pairs, and what was dropped.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Literal, Required, TypedDict

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_pairs  # noqa: E402
from build_pairs import fail, stable_hash  # noqa: E402

TIERS = ("best", "high", "medium", "low", "worst")


class SwapPair(TypedDict, total=False):
    """What --swap-rejected reads of a pair: one of build_pairs.py or of this script, not of two sources."""

    id: Required[str]
    prompt: Required[list[build_pairs.Message]]
    source: Required[Literal["on", "off"]]
    rejected: Required[Annotated[list[build_pairs.Message], msgspec.Meta(min_length=1)]]
    rejected_reward: Required[float]
    rejected_model: str | None
    rejected_finish: Literal["stop", "length"] | None
    rejected_token_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]] | None
    rejected_tokenizer: str | None
    rejected_logp: float | None
    labeler: str | None


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--scored", required=True, nargs="+", metavar="FILE", help="scored responses, merged by id")
    flag("--out", required=True, metavar="FILE", help="the pairs, JSONL")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--tiers", metavar="CHOSEN/REJECTED", help=f"two of {', '.join(TIERS)}")
    rule.add_argument("--ranks", type=int, nargs=2, metavar=("CHOSEN", "REJECTED"), help="from 1")
    flag("--gap", type=float, nargs="+", metavar=("LOW", "HIGH"), help="window of the difference of rewards")
    flag("--reward", metavar="NAME", help='take "scores"[NAME] as the reward')
    flag("--disagree", metavar="NAME", help='only pairs that "scores"[NAME] orders the other way')
    flag("--replace", type=float, metavar="RHO", help="share of pairs that take in an on-policy response")
    flag("--replace-rule", choices=["algorithm1", "rejected"], help="where it goes (default algorithm1)")
    flag("--swap-rejected", metavar="FILE", help="pairs whose rejected responses are taken")
    flag("--inverted", choices=["drop", "keep"], help="after --replace or --swap-rejected (default drop)")
    flag("--truncated", choices=["drop", "keep"], default="drop", help="responses that were cut off")
    flag("--total", type=int, metavar="N", help="number of pairs (default: as many as there are)")
    flag("--seed", type=int, default=0, help="of every random choice (default %(default)s)")
    args = parser.parse_args(argv)
    if args.tiers:
        args.tiers = args.tiers.split("/")
        if len(args.tiers) != 2 or not set(args.tiers) <= set(TIERS):
            parser.error(f"--tiers must be two of {', '.join(TIERS)}, such as best/low")
        if TIERS.index(args.tiers[0]) >= TIERS.index(args.tiers[1]):
            parser.error("--tiers: the chosen tier must be above the rejected one")
    elif not 1 <= args.ranks[0] < args.ranks[1]:
        parser.error(f"--ranks must be A B with 1 <= A < B, found {args.ranks}")
    if args.gap and (len(args.gap) > 2 or not -math.inf < args.gap[0] <= args.gap[-1] < math.inf):
        parser.error(f"--gap must be LOW, or LOW HIGH with LOW <= HIGH, found {args.gap}")
    if args.replace is not None and not 0 < args.replace <= 1:
        parser.error(f"--replace must lie in (0, 1], found {args.replace}")
    if args.replace_rule and not args.replace:
        parser.error("--replace-rule belongs to --replace")
    if args.inverted and not (args.replace or args.swap_rejected):
        parser.error("--inverted belongs to --replace and --swap-rejected")
    if args.total is not None and args.total < 1:
        parser.error(f"--total must be at least 1, found {args.total}")
    if args.replace and args.swap_rejected:
        parser.error("--replace and --swap-rejected change the same side: give one")
    return args


def by_rule(responses, tiers, ranks):
    """((chosen, rejected), None) among usable responses, or (None, why there is no pair)."""
    order = sorted(responses, key=lambda response: -response["reward"])  # the first of equals first
    if ranks:
        if len(order) < ranks[1]:
            return None, f"fewer than {ranks[1]} usable responses"
        return (order[ranks[0] - 1], order[ranks[1] - 1]), None
    if len(order) < 5:
        return None, "fewer than 5 usable responses"
    # Half up: k = 6 gives the ranks 0, 1, 3, 4, 5; Python's round would give 0, 1, 2, 4, 5.
    five = [order[math.floor(i * (len(order) - 1) / 4 + 0.5)] for i in range(5)]
    texts = {response["text"].strip() for response in five}
    if len({response["reward"] for response in five}) < 5 or len(texts) < 5:
        return None, "equal tiers"
    return (five[TIERS.index(tiers[0])], five[TIERS.index(tiers[1])]), None


def why_dropped(chosen, rejected, args):
    """Why a pair of the rule is left out; None where it stays."""
    if chosen["text"].strip() == rejected["text"].strip():
        return "identical"
    gap = chosen["reward"] - rejected["reward"]
    if gap == 0:
        return "tie"
    if args.gap and (gap < args.gap[0] or len(args.gap) == 2 and gap > args.gap[1]):
        return "outside of the gap"
    if args.disagree:
        scores = [(response.get("scores") or {}).get(args.disagree) for response in (chosen, rejected)]
        if None in scores:
            return f"no {args.disagree}"
        if scores[0] >= scores[1]:
            return f"{args.disagree} agrees"
    return None


def choose(row, args):
    """((chosen, rejected), None) of a row's off-policy responses, or (None, why there is no pair)."""
    responses = [response for response in row["responses"] if response["source"] == "off"]
    reasons = [build_pairs.why_unusable(response, "best-worst", args.truncated) for response in responses]
    usable = [response for response, reason in zip(responses, reasons, strict=True) if not reason]
    if len(usable) < 2:
        return None, next(filter(None, reasons), "fewer than two responses" if responses else "no response")
    pair, reason = by_rule(usable, args.tiers, args.ranks)
    reason = reason or why_dropped(*pair, args)
    return (None, reason) if reason else (pair, None)


def replace(chosen, best, rule):
    """The new pair of the old chosen response and the best on-policy one (Algorithm 1, lines 13 to 17)."""
    if rule != "rejected" and best["reward"] > chosen["reward"]:
        return best, chosen
    return chosen, best


def replace_share(pairs, rows, args, counts):
    """{id: new pair} of the first floor(RHO N) prompts, in a random order, that have a usable response."""
    wanted = math.floor(args.replace * len(pairs) + 1e-9)
    order = sorted(pairs, key=lambda prompt_id: (stable_hash(args.seed, "replace", prompt_id), prompt_id))
    new = {}
    for prompt_id in order:
        usable = []
        for response in rows[prompt_id]["responses"]:
            reason = build_pairs.why_unusable(response, "best-worst", args.truncated)
            if response["source"] == "on" and not reason:
                usable.append(response)
        if usable and len(new) < wanted:
            chosen, best = pairs[prompt_id][0], max(usable, key=itemgetter("reward"))  # line 11
            if "wins" in chosen and id(best) not in chosen["wins"]:
                files = ", ".join(args.scored)
                fail(f"{files}: {prompt_id}: its wins are of several runs of a scorer; score all in one run")
            new[prompt_id] = replace(chosen, best, args.replace_rule)
    if len(new) < wanted:
        fail(f"--replace {args.replace} needs {wanted} prompts with a usable on-policy one, found {len(new)}")
    counts["replaced"] = wanted
    counts["chosen_replaced"] = sum(new[prompt_id][1] is pairs[prompt_id][0] for prompt_id in new)
    return new


def read_swap(path, rows):
    """{id: rejected response} of a pairs file."""
    responses = {}
    for where, pair in build_pairs.read_jsonl(path, SwapPair):
        row = rows.get(pair["id"])
        if pair["id"] in responses:
            fail(f"{where}: the id {pair['id']} is twice in the file")
        if row and row["prompt"] != pair["prompt"]:
            fail(f"{where}: the id {pair['id']} has another prompt in --scored")
        if row and row.get("labeler") != pair.get("labeler"):
            fail(f"{where}: a reward of the labeler {pair.get('labeler')}, in --scored {row.get('labeler')}")
        response = {"text": pair["rejected"][-1]["content"], "source": pair["source"]}
        for key in build_pairs.SIDE_KEYS:
            response[key] = pair.get(f"rejected_{key}")
        responses[pair["id"]] = response
    return responses


def why_not_after(chosen, rejected, args):
    """Why a pair with a new side is dropped; None where it stays. Algorithm 1 keeps ties (line 15)."""
    if chosen["text"].strip() == rejected["text"].strip():
        return "identical"
    gap = chosen["reward"] - rejected["reward"]
    if args.inverted != "keep" and (gap < 0 or gap == 0 and args.swap_rejected):
        return "inverted"
    return None


def main(args):
    started = time.time()
    inputs = [*args.scored, *([args.swap_rejected] if args.swap_rejected else [])]
    rows = build_pairs.read_responses(args.scored, needs_reward=not args.reward)
    pairs, dropped, counts = {}, Counter(), {"rows": len(rows)}
    for prompt_id, row in rows.items():
        build_pairs.set_rewards(row, args.reward)
        pair, reason = choose(row, args)
        if pair:
            pairs[prompt_id] = pair
        else:
            dropped[f"off: {reason}"] += 1
    if args.total:
        first = {prompt_id: {"off": {"id": prompt_id, "source": "off"}} for prompt_id in pairs}
        kept = build_pairs.mix(first, 0, {}, args.total, args.seed)
        if len(kept) < args.total:
            fail(f"{', '.join(args.scored)}: {args.total} pairs are asked for, {len(kept)} can be had")
        pairs = {prompt_id: pairs[prompt_id] for prompt_id in kept}

    changed = {}
    if args.replace:
        changed = replace_share(pairs, rows, args, counts)
    if args.swap_rejected:
        swap = read_swap(args.swap_rejected, rows)
        dropped["swap: only in the file"] = len(swap.keys() - pairs.keys())
        dropped["swap: not in the file"] = len(pairs.keys() - swap.keys())
        pairs = {prompt_id: pair for prompt_id, pair in pairs.items() if prompt_id in swap}
        changed = {prompt_id: (chosen, swap[prompt_id]) for prompt_id, (chosen, _) in pairs.items()}
    lines = []
    for prompt_id in [prompt_id for prompt_id in rows if prompt_id in pairs]:  # in the order of the input
        chosen, rejected = changed.get(prompt_id, pairs[prompt_id])
        if prompt_id in changed:
            reason = why_not_after(chosen, rejected, args)
            if reason:
                dropped[f"changed: {reason}"] += 1
                continue
        source = chosen["source"] if chosen["source"] == rejected["source"] else "cross"
        lines.append(build_pairs.make_pair(rows[prompt_id], source, chosen, rejected))
    if not lines:
        fail(f"{', '.join(args.scored)}: no pair is left; dropped: {dict(dropped)}")
    counts |= {"pairs": len(lines), "dropped": +dropped}
    counts |= Counter(pair["source"] for pair in lines)
    samples = [response for row in rows.values() for response in row["responses"]]
    stats = build_pairs.statistics(lines, samples)
    text = (json.dumps(pair, ensure_ascii=False, default=list) for pair in lines)
    build_pairs.write_output(args, inputs, text, started, counts=counts, stats=stats)
    print(json.dumps({"out": args.out, **counts}))


if __name__ == "__main__":
    main(parse_args())
