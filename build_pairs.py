"""
Stage 3: scored responses -> preference pairs, on-policy and off-policy mixed.

Reads   --scored FILE ...  Rows (below) as score.py writes them, merged by id; all rewards of one labeler
Writes  --out FILE         a pair per line, as TRL's DPOTrainer reads it; x.meta.json has statistics

Each prompt gives a pair of each source by a rule (RULES below), and `mix` takes one of them: SimpleMix (S1
sections 4.1, 5.2). Of files with both sources only prompts with a pair of each are used, the same at every
--on-ratio. --filter (FILTERS below) keeps the best share of the off-policy (at --on-ratio 1 on-policy) pairs.

    python build_pairs.py --scored out/scored.jsonl --out out/on50.pairs.jsonl --on-ratio 0.5

Prints one JSON object last, which counts what was made and dropped. The papers are S1 SimpleMix, S2 "Is
On-Policy Data always the Best Choice [...]?", S3 "What Matters in Data for DPO?".
"""

import argparse
import json
import math
import re
import time
from collections import Counter
from contextlib import suppress
from typing import Literal, Required, TypedDict

from chat import answer
from common import Message, TokenIds, Wins, fail, note, read_responses, stable_hash, write_output

QUANTILES = {"min": 0, "25%": 25, "median": 50, "75%": 75, "max": 100}  # of S3 Table 5
SIDE_KEYS = ("reward", "model", "finish", "token_ids", "tokenizer", "logp")  # chosen_reward, ...


class Response(TypedDict, total=False):
    text: Required[str]
    final: str | None  # what follows its reasoning; texts are compared and measured by this
    source: Required[Literal["on", "off"]]  # sampled from the model to be trained, or taken from elsewhere
    model: str | None
    finish: Literal["stop", "length"] | None  # "length": cut off at the longest response allowed
    token_ids: TokenIds | None
    tokenizer: str | None  # hash of the tokenizer that made them
    reward: float | None  # the last scorer's; null if it could not score the response
    scores: dict[str, float | None] | None  # every scorer's, by name
    logp: float | None  # sum of log-probabilities under the model to be trained


class Row(TypedDict, total=False):
    id: Required[str]
    prompt: Required[str | list[Message]]  # text is one user turn
    prompt_token_ids: TokenIds | None
    prompt_tokenizer: str | None  # hash of the tokenizer and the chat template that made them
    responses: Required[list[Response]]
    labeler: str | None  # what made the rewards, such as "rm:MODEL"
    wins: Wins | None
    cosine: list[list[float | None]] | None  # [i][j]: similarity of responses i and j


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--scored", required=True, nargs="+", metavar="FILE", help="scored responses, merged by id")
    flag("--out", required=True, metavar="FILE", help="the pairs, JSONL")
    flag("--select", choices=list(RULES), default="best-worst", help="pair rule (default %(default)s)")
    flag("--reward", metavar="NAME", help="use the score of this scorer as the reward")
    flag("--truncated", choices=["drop", "keep"], default="drop", help="responses that were cut off")
    flag("--on-ratio", type=float, default=0.5, metavar="R", help="on-policy share (default %(default)s)")
    flag("--total", type=int, metavar="N", help="number of pairs (default: all)")
    names = ", ".join(FILTERS)
    flag("--filter", type=filter_share, metavar="NAME:P", help=f"keep the best share P by one of {names}")
    flag("--seed", type=int, default=0, help="seed of every random choice (default %(default)s)")
    flag("--stats", action="store_true", help="print S3's Table 5 of the pairs")
    args = parser.parse_args(argv)
    if not 0 <= args.on_ratio <= 1 or args.total is not None and args.total < 1:
        parser.error("--on-ratio must lie in [0, 1], and --total must be at least 1")
    if args.select in DATA_SET_PAIR and args.on_ratio == 1:
        parser.error(f"--select {args.select} chooses among off-policy responses, but --on-ratio 1 uses none")
    return args


def filter_share(text):
    """("quality", 0.4) from "quality:0.4"."""
    match = re.fullmatch(r"(.+):(\d*\.?\d+)", text)
    if not match or match[1] not in FILTERS or float(match[2]) > 1:
        raise argparse.ArgumentTypeError(f"expected {'|'.join(FILTERS)}:P with P in [0, 1], found {text!r}")
    return match[1], float(match[2])


def use_scores(rows, name):
    """Make the scores of this scorer the rewards, and it the labeler of rows whose rewards change."""
    names = set()
    for row in rows.values():
        for response in row["responses"]:
            scores = response.get("scores") or {}
            names |= scores.keys()
            if scores.get(name) != response.get("reward"):
                row["labeler"] = name
            response["reward"] = scores.get(name)
    if name not in names:
        fail(f"--reward {name}: no response has this score; there are {', '.join(sorted(names)) or 'none'}")


# ----- selection: the responses of one prompt and source -> a pair
def best_worst(responses, usable):
    """The highest against the lowest reward, the first of equals (S1 section 3.1)."""
    best = max(usable, key=lambda i: responses[i]["reward"])
    others = [i for i in usable if i != best]
    return best, min(others, key=lambda i: responses[i]["reward"])


# (responses, usable indices, 2 or more) -> (chosen, rejected). `relabel` orders a set's own pair: S2's PC_off
RULES = {"best-worst": best_worst, "relabel": best_worst, "given": lambda responses, usable: usable}
DATA_SET_PAIR = ("relabel", "given")  # of the first two off-policy responses; on-policy ones take best-worst


def why_unusable(response, rule, truncated):
    """Why a response can be in no pair; None if it can."""
    if not answer(response).strip():
        return "empty"  # perhaps after its reasoning, and then it has no reward
    if rule != "given" and response.get("reward") is None:
        return "without reward"
    if truncated == "drop" and response.get("finish") == "length":
        return "truncated"  # chosen, it would teach the model not to stop
    return None


def select(row, source, args, dropped):
    """The pair of one prompt's responses of one source; None if there is none, and `dropped` counts why."""
    rule = "best-worst" if source == "on" and args.select in DATA_SET_PAIR else args.select
    responses = row["responses"]
    indices = [i for i, response in enumerate(responses) if response["source"] == source]
    if rule in DATA_SET_PAIR:
        dropped["off: another pair of its prompt"] += len(indices[3::2])
        indices = indices[:2]
    reasons = {i: why_unusable(responses[i], rule, args.truncated) for i in indices}
    usable = [i for i in indices if not reasons[i]]
    if len(usable) < 2:
        others = "fewer than two responses" if indices else "no response"
        reason = next(filter(None, reasons.values()), others)
    else:
        chosen, rejected = RULES[rule](responses, usable)
        if answer(responses[chosen]).strip() == answer(responses[rejected]).strip():
            reason = "identical"
        elif rule != "given" and responses[chosen]["reward"] == responses[rejected]["reward"]:
            reason = "tie"
        else:
            return make_pair(row, source, chosen, rejected)
    dropped[f"{source}: {reason}"] += 1
    return None


def make_pair(row, source, chosen, rejected):
    """The pair of the responses with these indices, which it keeps, with the other keys of the row."""
    pair = {key: row[key] for key in row if key not in ("wins", "cosine")}
    pair["responses"] = [row["responses"][chosen], row["responses"][rejected]]
    pair |= {"pair_id": f"{row['id']}:{source}", "source": source, "labeler": row.get("labeler")}
    pair["cosine"] = row["cosine"][chosen][rejected] if row.get("cosine") else None
    for side, response in zip(("chosen", "rejected"), pair["responses"], strict=True):
        pair[side] = [{"role": "assistant", "content": response["text"]}]
        pair |= {f"{side}_{key}": response.get(key) for key in SIDE_KEYS}
    return pair


# ----- filters (S1 section 5.3): the pairs with the highest values are kept; and mixing
FILTERS = {
    "quality": lambda pair, seed: pair["chosen_reward"] + pair["rejected_reward"],
    "contrast": lambda pair, seed: pair["chosen_reward"] - pair["rejected_reward"],
    "onpolicy": lambda pair, seed: pair["chosen_logp"] + pair["rejected_logp"],
    "similarity": lambda pair, seed: -pair["cosine"],  # the least similar are kept
    "random": lambda pair, seed: stable_hash(seed, "filter", pair["id"], ""),  # the control
}
SCORER_SCRIPTS = {"onpolicy": "scorers/logp.py", "similarity": "scorers/embed.py"}  # for the others score.py


def keep_best(pairs, name, share, seed):
    """(ids of the floor(share * N) best pairs, N); N counts the pairs that have what the filter compares."""
    values = {}
    for pair in pairs:
        with suppress(TypeError):  # null: not scored, or too long for its scorer
            values[pair["id"]] = FILTERS[name](pair, seed)
    ranked = sorted(values, key=lambda prompt_id: (-values[prompt_id], prompt_id))
    return set(ranked[: math.floor(share * len(ranked) + 1e-9)]), len(ranked)  # 0.29 * 100 < 29


def mix_filtered(candidates, kept, ratio):
    """({id: {source: pair}} as `mix` takes it, total number of pairs) after a filter.

    For 0 < R < 1 (S1 Fig. 6) the off-policy pairs kept all meet on-policy pairs, of other prompts (ours):
    kept = N - round(R N). As halves are rounded up, N is the first with N (1 - R) > kept - 1/2.
    """
    if ratio in (0, 1):
        return {prompt_id: candidates[prompt_id] for prompt_id in kept}, len(kept)
    left = {}
    for prompt_id, pairs in candidates.items():
        source = "off" if prompt_id in kept else "on"
        left[prompt_id] = {source: pairs[source]}
    return left, max(0, math.floor((len(kept) - 0.5 + 1e-9) / (1 - ratio)) + 1)


def mix(candidates, ratio, total, seed):
    """SimpleMix: {id: pair} of `total` prompts or, if there are not enough, fewer.

    `candidates` is {id: {source: pair}}. In an order by a hash of seed and id, the first round(R * total)
    prompts give their on-policy pair, the others their off-policy pair. So counts are exact, no prompt comes
    twice (S1's code repeats pairs, unlike its text), and a larger R keeps the on-policy prompts.
    """
    order = sorted(candidates, key=lambda prompt_id: (stable_hash(seed, "mix", prompt_id), prompt_id))
    n = min(total, len(order))
    n_on = math.floor(ratio * n + 0.5 + 1e-9)  # 0.145 * 100 is 14.499999999999998
    missing = {"on": n_on, "off": n - n_on}
    mixed = {}
    for prompt_id in order:
        for source in missing:
            if missing[source] and source in candidates[prompt_id] and prompt_id not in mixed:
                mixed[prompt_id] = candidates[prompt_id][source]
                missing[source] -= 1
    return mixed


def statistics(pairs, responses, rewards):
    """{what: a row of S3 Table 5}. S1 Table 3's "Avg. reward" may be that of both sides or of all samples."""
    import numpy as np  # here, because --help need not wait for it

    keys = ("chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
    chosen, rejected, *logps = (np.array([pair[key] for pair in pairs], float) for key in keys)
    columns = {"chosen reward": chosen, "rejected reward": rejected, "gap": chosen - rejected}
    columns["reward of both sides"] = np.concatenate([chosen, rejected])
    columns["reward of all samples"] = np.array(rewards, float)
    columns["intra-diversity"] = logps[0] - logps[1]  # S2 eq. 12
    lengths = np.array([len(answer(response)) for response in responses])
    columns["chosen characters"] = lengths[::2]
    columns["rejected characters"] = lengths[1::2]
    table = {}
    for name, values in columns.items():
        values = values[~np.isnan(values)]  # null became nan
        if values.size:
            table[name] = {"n": len(values), "mean": values.mean(), "std": values.std()}
            table[name] |= zip(QUANTILES, np.percentile(values, list(QUANTILES.values())), strict=True)
    return table


def with_reasoning(responses):
    """{source: how many of its responses have reasoning}; a warning where the sources differ in this form."""
    forms = {"on": [], "off": []}
    for response in responses:
        forms[response["source"]].append(answer(response) != response["text"])
    shares = {source: sum(form) / len(form) for source, form in forms.items() if form}
    if max(shares.values()) - min(shares.values()) > 0.1:  # one model's may differ now and then
        text = f"{shares['on']:.0%} of on-policy, {shares['off']:.0%} of off-policy responses have reasoning"
        note(f"warning: {text}; use both sources with it, or both without")
    return {source: sum(form) for source, form in forms.items()}


# ----- main
def main(args):
    started = time.time()
    files, ratio = ", ".join(args.scored), args.on_ratio
    rows = read_responses(args.scored, Row)
    if args.reward:
        use_scores(rows, args.reward)
    rewards, sources = [], set()
    for prompt_id, row in rows.items():
        for response in row["responses"]:
            if "reward" not in response and args.select != "given":
                fail(f'{files}: {prompt_id}: a response has no "reward"; score.py writes it')
            rewards.append(response.get("reward"))
            sources.add(response["source"])
    for source, share in ("on", ratio), ("off", 1 - ratio):
        if share > 0 and source not in sources:
            fail(f"{files}: --on-ratio {ratio} needs {source}-policy responses, but the files have none")

    candidates, dropped = {}, Counter()
    for prompt_id, row in rows.items():
        pairs = {source: select(row, source, args, dropped) for source in sorted(sources)}
        if all(pairs.values()):
            candidates[prompt_id] = pairs
        del row["responses"]  # frees those that are in no pair
    total = len(candidates)
    counts = {"rows": len(rows), "responses": len(rewards), "prompts_with_pairs": total, "dropped": +dropped}
    if args.filter:
        source = "on" if ratio == 1 else "off"
        pairs = [by_source[source] for by_source in candidates.values()]
        kept, n = keep_best(pairs, *args.filter, args.seed)
        if pairs and n == 0:
            scorer = SCORER_SCRIPTS.get(args.filter[0], "score.py")
            fail(f"{files}: no pair has the values for --filter {args.filter[0]}; run {scorer} first")
        counts["filter"] = {"kept": len(kept), "of": n, "without_value": len(pairs) - n}
        candidates, total = mix_filtered(candidates, kept, ratio)
    total = args.total or total
    mixed = mix(candidates, ratio, total, args.seed)
    if len(mixed) < total or not mixed:
        text = json.dumps(counts)
        advice = "; --truncated keep uses responses that were cut off" if "truncated" in text else ""
        fail(f"{files}: expected {total or 'some'} pairs, found {len(mixed)}: {text}{advice}")

    pairs = [mixed[prompt_id] for prompt_id in rows if prompt_id in mixed]  # in the order of the input
    counts |= {"pairs": len(pairs), "on": 0, "off": 0} | Counter(pair["source"] for pair in pairs)
    responses = [response for pair in pairs for response in pair.pop("responses")]  # two of each pair
    counts["with_reasoning"] = with_reasoning(responses)
    stats = statistics(pairs, responses, rewards)
    lines = (json.dumps(pair, ensure_ascii=False, default=list) for pair in pairs)  # arrays as lists
    seconds = round(time.time() - started, 2)
    write_output(args, args.scored, lines, counts=counts, stats=stats, seconds=seconds)
    if args.stats:
        for name, row in stats.items():
            print(f"{name:22}", *(f"{column} {number:.5g}" for column, number in row.items()))
    print(json.dumps({"out": args.out, **counts}))


if __name__ == "__main__":
    main(parse_args())
