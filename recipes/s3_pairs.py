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
from pathlib import Path
from typing import Annotated, Literal, Required, TypedDict

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_pairs  # noqa: E402
from chat import answer  # noqa: E402
from common import Message, TokenIds, fail, read_jsonl, read_responses, stable_hash, write_output  # noqa: E402

TIERS = ("best", "high", "medium", "low", "worst")


class SwapPair(TypedDict, total=False):
    """What --swap-rejected reads of a pair: one of build_pairs.py or of this script, not of two sources."""

    id: Required[str]
    prompt: Required[list[Message]]
    source: Required[Literal["on", "off"]]
    rejected: Required[Annotated[list[Message], msgspec.Meta(min_length=1)]]
    rejected_reward: Required[float]
    rejected_model: str | None
    rejected_finish: Literal["stop", "length"] | None
    rejected_token_ids: TokenIds | None
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
    rule.add_argument("--ranks", type=int, nargs=2, metavar=("CHOSEN", "REJECTED"), help="counted from 1")
    flag("--gap", type=float, nargs="+", metavar=("LOW", "HIGH"), help="window of the difference of rewards")
    flag("--reward", metavar="NAME", help='take "scores"[NAME] as the reward')
    flag("--disagree", metavar="NAME", help='only pairs that "scores"[NAME] orders the other way')
    flag("--replace", type=float, metavar="RHO", help="share of pairs that take in an on-policy response")
    flag("--replace-rule", choices=["algorithm1", "rejected"], help="where it goes (default algorithm1)")
    flag("--swap-rejected", metavar="FILE", help="pairs that give the rejected responses")
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


def by_rule(responses, usable, tiers, ranks):
    """((chosen, rejected), None) as indices among usable ones, or (None, why there is no pair)."""
    order = sorted(usable, key=lambda i: -responses[i]["reward"])  # the first of equals first
    if ranks:
        if len(order) < ranks[1]:
            return None, f"fewer than {ranks[1]} usable responses"
        return (order[ranks[0] - 1], order[ranks[1] - 1]), None
    if len(order) < 5:
        return None, "fewer than 5 usable responses"
    # Half up: k = 6 gives the ranks 0, 1, 3, 4, 5; Python's round would give 0, 1, 2, 4, 5.
    five = [order[math.floor(i * (len(order) - 1) / 4 + 0.5)] for i in range(5)]
    texts = {answer(responses[i]).strip() for i in five}
    if len({responses[i]["reward"] for i in five}) < 5 or len(texts) < 5:
        return None, "equal tiers"
    return (five[TIERS.index(tiers[0])], five[TIERS.index(tiers[1])]), None


def why_dropped(chosen, rejected, args):
    """Why a pair of the rule is left out; None if it stays."""
    if answer(chosen).strip() == answer(rejected).strip():
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


def usable_indices(row, source, truncated):
    """(indices of the responses of a source that can be in a pair, why the others cannot)."""
    indices = [i for i, response in enumerate(row["responses"]) if response["source"] == source]
    reasons = [build_pairs.why_unusable(row["responses"][i], "best-worst", truncated) for i in indices]
    usable = [i for i, reason in zip(indices, reasons, strict=True) if not reason]
    return usable, list(filter(None, reasons))


def choose(row, args):
    """((chosen, rejected), None) as indices of a row's responses, or (None, why there is no pair)."""
    responses = row["responses"]
    usable, reasons = usable_indices(row, "off", args.truncated)
    if len(usable) < 2:
        reasons.append("fewer than two responses" if usable else "no response")
        return None, reasons[0]
    pair, reason = by_rule(responses, usable, args.tiers, args.ranks)
    reason = reason or why_dropped(*(responses[i] for i in pair), args)
    return (None, reason) if reason else (pair, None)


def replace(row, chosen, best, rule):
    """The new pair of the old chosen response and the best on-policy one (Algorithm 1, lines 13 to 17)."""
    if rule != "rejected" and row["responses"][best]["reward"] > row["responses"][chosen]["reward"]:
        return best, chosen
    return chosen, best


def have_met(wins, i, j):
    """Whether rewards that are mean wins can be compared: the two responses met, or both met a third one."""
    if wins is None or wins[i][j] is not None:
        return True
    return any(None not in pair for pair in zip(wins[i], wins[j], strict=True))


def replace_share(pairs, rows, args, counts):
    """{id: new pair} of the first floor(RHO N) prompts, in a random order, that have a usable response."""
    wanted = math.floor(args.replace * len(pairs) + 1e-9)
    order = sorted(pairs, key=lambda prompt_id: (stable_hash(args.seed, "replace", prompt_id), prompt_id))
    new = {}
    for prompt_id in order:
        row, chosen = rows[prompt_id], pairs[prompt_id][0]
        usable, _ = usable_indices(row, "on", args.truncated)
        if usable and len(new) < wanted:
            rewards = {i: row["responses"][i]["reward"] for i in usable}
            best = max(rewards, key=rewards.get)  # line 11
            if not have_met(row.get("wins"), chosen, best):
                files = ", ".join(args.scored)
                fail(f"{files}: {prompt_id}: its wins are of several runs of a scorer; score all in one run")
            new[prompt_id] = replace(row, chosen, best, args.replace_rule)
    if len(new) < wanted:
        fail(f"--replace {args.replace} needs {wanted} prompts with a usable on-policy one, found {len(new)}")
    counts["replaced"] = wanted
    counts["chosen_replaced"] = sum(new[prompt_id][1] == pairs[prompt_id][0] for prompt_id in new)
    return new


def read_swap(path, rows):
    """{id: pair} of a pairs file."""
    pairs = {}
    for line, pair in read_jsonl(path, SwapPair):
        row = rows.get(pair["id"])
        if pair["id"] in pairs:
            fail(f"{line}: duplicate id {pair['id']} in this file")
        if row and row["prompt"] != pair["prompt"]:
            fail(f"{line}: the id {pair['id']} has another prompt in --scored")
        if row and row.get("labeler") != pair.get("labeler"):
            fail(f"{line}: a reward of the labeler {pair.get('labeler')}, in --scored {row.get('labeler')}")
        pairs[pair["id"]] = pair
    return pairs


def swap_rejected(pair, other):
    """A pair with the rejected response of another pair of its prompt."""
    source = pair["source"] if pair["source"] == other["source"] else "cross"
    pair |= {"pair_id": f"{pair['id']}:{source}", "source": source, "cosine": None}
    text = other["rejected"][-1]["content"]
    pair["rejected"] = [{"role": "assistant", "content": text}]
    pair["responses"][1] = {"text": text, "source": other["source"]}
    for key in build_pairs.SIDE_KEYS:
        pair[f"rejected_{key}"] = other.get(f"rejected_{key}")
    return pair


def why_not_after(pair, args):
    """Why a pair with a new side is dropped; None if it stays. Algorithm 1 keeps ties (line 15)."""
    chosen, rejected = map(answer, pair["responses"])
    if chosen.strip() == rejected.strip():
        return "identical"
    gap = pair["chosen_reward"] - pair["rejected_reward"]
    if args.inverted != "keep" and (gap < 0 or gap == 0 and args.swap_rejected):
        return "inverted"
    return None


def first_of_the_draw(pairs, args):
    """The pairs of the first --total prompts, in the order of build_pairs.py."""
    candidates = {prompt_id: {"off": pair} for prompt_id, pair in pairs.items()}
    pairs = build_pairs.mix(candidates, 0, args.total, args.seed)
    if len(pairs) < args.total:
        fail(f"{', '.join(args.scored)}: expected {args.total} pairs, found {len(pairs)}")
    return pairs


def main(args):
    started = time.time()
    files = ", ".join(args.scored)
    rows = read_responses(args.scored, build_pairs.Row)
    if args.reward:
        build_pairs.use_scores(rows, args.reward)
    samples = [response for row in rows.values() for response in row["responses"]]
    pairs, dropped, counts = {}, Counter(), {"rows": len(rows)}
    for prompt_id, row in rows.items():
        if not all("reward" in response for response in row["responses"]):
            fail(f'{files}: {prompt_id}: a response has no "reward"; score.py writes it')
        pair, reason = choose(row, args)
        if pair:
            pairs[prompt_id] = pair
        else:
            dropped[f"off: {reason}"] += 1
    pairs = first_of_the_draw(pairs, args) if args.total else pairs

    replaced = replace_share(pairs, rows, args, counts) if args.replace else {}
    swap = read_swap(args.swap_rejected, rows) if args.swap_rejected else {}
    if args.swap_rejected:
        dropped["swap: only in the file"] = len(swap.keys() - pairs.keys())
        dropped["swap: not in the file"] = len(pairs.keys() - swap.keys())
        pairs = {prompt_id: pair for prompt_id, pair in pairs.items() if prompt_id in swap}
    made = []
    for prompt_id in [prompt_id for prompt_id in rows if prompt_id in pairs]:  # in the order of the input
        row = rows[prompt_id]
        chosen, rejected = replaced.get(prompt_id, pairs[prompt_id])
        sources = {row["responses"][i]["source"] for i in (chosen, rejected)}
        pair = build_pairs.make_pair(row, sources.pop() if len(sources) == 1 else "cross", chosen, rejected)
        if prompt_id in swap:
            pair = swap_rejected(pair, swap[prompt_id])
        reason = why_not_after(pair, args) if prompt_id in replaced or prompt_id in swap else None
        if reason:
            dropped[f"changed: {reason}"] += 1
        else:
            made.append(pair)
    if not made:
        fail(f"{files}: no pair is left; dropped: {dict(dropped)}")
    counts |= {"pairs": len(made), "dropped": +dropped}
    counts |= Counter(pair["source"] for pair in made)
    responses = [response for pair in made for response in pair.pop("responses")]
    counts["with_reasoning"] = build_pairs.with_reasoning(responses)
    stats = build_pairs.statistics(made, responses, [response["reward"] for response in samples])
    lines = (json.dumps(pair, ensure_ascii=False, default=list) for pair in made)
    inputs = [*args.scored, *([args.swap_rejected] if args.swap_rejected else [])]
    seconds = round(time.time() - started, 2)
    write_output(args, inputs, lines, counts=counts, stats=stats, seconds=seconds)
    print(json.dumps({"out": args.out, **counts}))


if __name__ == "__main__":
    main(parse_args())
