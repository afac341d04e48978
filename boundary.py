"""
Does on-policy or off-policy data help this model more, now? S2's boundary between the stages of alignment.

Reads   --scored FILE ...  a Row (below) per prompt, as score.py writes it: on-policy responses of the model
                           in question and off-policy ones; several files are merged by id
Writes  --out FILE         JSON: {"v_on", "v_off", "ties", "score", "ci", "stage", "use": "on" | "off", ...};
                           "by_category" has the same by the rows' "category" (scorers/category.py); and
                           x.meta.json for x.json: the record of the run

This is section 5.3, Algorithm 1, of S2, "Is On-Policy Data always the Best Choice [...]?". Every on-policy
response meets every off-policy response of its prompt (in S2 two meet two) under a preference model: by
"wins" if the rows have them, else by reward. V_on counts the comparisons that the on-policy response wins,
V_off those it loses and, unless --tie says otherwise, ties; equal texts tie. The boundary score is V_on /
(V_on + V_off); the caption of S2's Table 3 gives the complement; its numbers follow this definition. If
V_off > V_on, the model is in the preference injection stage and learns more from off-policy data, else in the
fine-tuning stage and learns more from on-policy data. Ours are "ci", a 95 % interval over prompts, and
"length_matched", the same over texts of similar length: a preference model may like long texts.

    python boundary.py --scored out/scored.jsonl --out out/policy.boundary.json

Prints a one-sentence recommendation, then the result as one line of JSON.
"""

import argparse
import json
import math
import time
from typing import Annotated, Literal, Required, TypedDict

import msgspec

from chat import answer
from common import Message, TokenIds, Wins, fail, read_responses, write_output


class Response(TypedDict, total=False):
    text: Required[str]
    final: str | None  # what follows its reasoning; texts are compared and measured by this
    source: Required[Literal["on", "off"]]  # sampled from the model in question, or taken from elsewhere
    reward: Required[float | None]  # null if it could not be scored
    model: str | None
    token_ids: TokenIds | None
    logp: float | None  # log-probability under the model in question, of this many tokens
    logp_tokens: Annotated[int, msgspec.Meta(gt=0, lt=2**32)] | None


class Row(TypedDict, total=False):
    id: Required[str]
    prompt: Required[str | list[Message]]  # text is one user turn
    prompt_token_ids: TokenIds | None
    responses: Required[list[Response]]
    labeler: str | None  # what made the rewards, such as "rm:MODEL"
    category: str | float | None
    wins: Wins | None
    cosine: list[list[float | None]] | None


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--scored", required=True, nargs="+", metavar="FILE", help="scored responses, merged by id")
    flag("--out", required=True, metavar="FILE", help="the result, JSON")
    flag(
        "--tie",
        choices=["off", "half", "skip"],
        default="off",
        help="ties count for V_off (Algorithm 1), half for each, or not at all",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before numpy is imported: --help and wrong flags answer at once

import numpy as np  # noqa: E402

COMPARISON = [  # of an on-policy with an off-policy response of one prompt
    ("prompt", int),  # index of the prompt
    ("verdict", float),  # 1 if the on-policy response is preferred, 0 if the other, 0.5 for a tie; or nan
    ("gap", float),  # log-probability of the on-policy response less that of the other; nan if unknown
    ("gap_per_token", float),
    ("similar", bool),  # the texts' numbers of characters differ by at most a fifth
]


# ----- one comparison
def prefers(row, i, j):
    """1 if the preference model prefers response i to j, 0 if it prefers j, 0.5 for a tie, nan if unknown."""
    one, other = row["responses"][i], row["responses"][j]
    if answer(one) == answer(other):
        return 0.5
    value, bar = one["reward"], other["reward"]
    if row.get("wins") is not None:
        value, bar = row["wins"][i][j], 0.5
    if value is None or bar is None:
        return math.nan
    return 0.5 if value == bar else float(value > bar)


def logp_gaps(one, other):
    """log pi(one) - log pi(other), of sums and per token; nan if a "logp" or "logp_tokens" is missing."""
    if None in (one.get("logp"), other.get("logp"), one.get("logp_tokens"), other.get("logp_tokens")):
        return math.nan, math.nan
    per_token = one["logp"] / one["logp_tokens"] - other["logp"] / other["logp_tokens"]
    return one["logp"] - other["logp"], per_token


def compare_all(rows):
    """COMPARISON of every on-policy with every off-policy response of its row, (C,)."""
    comparisons = []
    for index, row in enumerate(rows):
        for i, one in enumerate(row["responses"]):
            for j, other in enumerate(row["responses"]):
                if (one["source"], other["source"]) == ("on", "off"):
                    shorter, longer = sorted([len(answer(one)), len(answer(other))])
                    similar = 5 * (longer - shorter) <= longer
                    comparisons.append((index, prefers(row, i, j), *logp_gaps(one, other), similar))
    return np.array(comparisons, COMPARISON)


# ----- all comparisons (C,) of P prompts
def boundary(comparisons, tie):
    """Algorithm 1; None if no comparison counts."""
    prompts, index = np.unique(comparisons["prompt"], return_inverse=True)
    verdicts = comparisons["verdict"]
    won, lost, ties = (np.bincount(index[verdicts == v], minlength=len(prompts)) for v in (1, 0, 0.5))
    if tie == "off":
        lost = lost + ties  # Algorithm 1's "otherwise"
    elif tie == "half":
        won, lost = won + ties / 2, lost + ties / 2
    v_on, v_off = won.sum(), lost.sum()
    if v_on + v_off == 0:
        return None
    stage, use = ("injection", "off") if v_off > v_on else ("fine-tuning", "on")
    result = {"v_on": v_on, "v_off": v_off, "ties": ties.sum(), "score": v_on / (v_on + v_off)}
    result |= {"ci": bootstrap_interval(won, won + lost), "stage": stage, "use": use}
    return result | {"n_prompts": len(prompts), "n_comparisons": len(comparisons)}


def by_category(comparisons, categories, tie):
    """{category: Algorithm 1 on its prompts}, of those with a comparison; None if no prompt (P,) has one."""
    categories = [None if category is None else str(category) for category in categories]
    names = sorted(set(categories) - {None})
    of_comparison = np.array(categories, object)[comparisons["prompt"]]
    results = {name: boundary(comparisons[of_comparison == name], tie) for name in names}
    return {name: result for name, result in results.items() if result} if names else None


def bootstrap_interval(numerators, denominators):
    """95 % interval of sum(numerators) / sum(denominators), each (P,), over 1,000 draws of the prompts."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(1000):
        drawn = rng.integers(0, len(numerators), len(numerators))
        if denominators[drawn].sum():
            ratios.append(numerators[drawn].sum() / denominators[drawn].sum())
    return np.percentile(ratios, [2.5, 97.5]).tolist()


def shares(comparisons, condition):
    """(P,) the share of each prompt's comparisons for which the condition (C,) is true."""
    index = np.unique(comparisons["prompt"], return_inverse=True)[1]
    return np.bincount(index, condition) / np.bincount(index)


def distinctness(comparisons):
    """F.1: how often the on-policy response has the higher probability, by sums and by means per token.

    S2 Table 8 has 84 to 97 %. Algorithm 1 needs it: we doubt it if the share by sums is below 80 %.
    """
    if len(comparisons) == 0:
        return None
    summed = shares(comparisons, comparisons["gap"] > 0)
    per_token = shares(comparisons, comparisons["gap_per_token"] > 0)
    return {"sum": summed.mean(), "mean": per_token.mean(), "n_prompts": len(summed)}


def consistency(comparisons):
    """Eqs. 10 and 11: how often P* (the preference model) and P_theta (on) or P_off (off) agree.

    An indicator is 1 where a probability is above 1/2; a tie, 1/2, gives 0 (Definition 5.5). Eq. 10: P* and
    P_theta prefer the on-policy y1, or neither does. Eq. 11: P_off, which cannot be computed, never prefers
    y1 (F.1), so P* agrees wherever it does not prefer y1.
    """
    if len(comparisons) == 0:
        return None
    prefers_on = comparisons["verdict"] > 0.5
    on = shares(comparisons, prefers_on == (comparisons["gap"] > 0))
    off = shares(comparisons, ~prefers_on)
    stage = "injection" if off.mean() > on.mean() + 1e-12 else "fine-tuning"  # 1e-12: means round
    result = {"on": on.mean(), "off": off.mean(), "stage": stage}
    return result | {"n_prompts": len(on), "n_comparisons": len(comparisons)}


def advice(result):
    """What to train on next as a sentence, and what speaks against it."""
    low, high = result["ci"]
    text = f"Preference {result['stage']} stage: train on {result['use']}-policy data next (boundary score "
    text += f"{result['score']:.3f}, 95 % interval {low:.3f} to {high:.3f}, {result['n_prompts']} prompts"
    text += ", undecided at 95 %)." if low <= 0.5 <= high else ")."
    doubts = []
    matched, agreement, distinct = result["length_matched"], result["consistency"], result["distinct"]
    if matched and matched["stage"] != result["stage"]:
        n, (low, high) = matched["n_comparisons"], matched["ci"]
        doubt = f"the {n} comparisons of texts of similar length say {matched['stage']}"
        doubts.append(f"{doubt} (score {matched['score']:.3f}, {low:.3f} to {high:.3f})")
    if agreement and agreement["stage"] != result["stage"]:
        doubt = f"eqs. 10 and 11 say {agreement['stage']}"
        doubts.append(f"{doubt} ({agreement['on']:.3f} and {agreement['off']:.3f})")
    if distinct and distinct["sum"] < 0.8:
        doubt = f"the model gives its own response the higher probability in only {distinct['sum']:.0%}"
        doubts.append(f"{doubt} (F.1: 84 to 97 %)")
    return text + f" Take it with care: {'; '.join(doubts)}." if doubts else text


# ----- main
def main(args):
    started = time.time()
    files, rows = ", ".join(args.scored), read_responses(args.scored, Row)
    rows = [rows[prompt_id] for prompt_id in sorted(rows)]  # whatever the files' order: for the bootstrap
    with_wins = sum(row.get("wins") is not None for row in rows)
    if 0 < with_wins < len(rows):
        fail(f"{files}: {with_wins} of {len(rows)} rows have wins; score all rows with one scorer")

    comparisons = compare_all(rows)
    judged = comparisons[~np.isnan(comparisons["verdict"])]
    both = judged[~np.isnan(judged["gap"])]  # with a verdict and log-probabilities
    prompts = np.unique(judged["prompt"])
    n_compared = len(np.unique(comparisons["prompt"]))
    counts = {
        "prompts_with_one_source": len(rows) - n_compared,
        "prompts_without_verdict": n_compared - len(prompts),
        "without_verdict": len(comparisons) - len(judged),
        "without_logp": len(judged) - len(both),
    }
    result = boundary(judged, args.tie)
    if result is None:
        fail(f"{files}: no on-policy and off-policy response can be compared: {json.dumps(counts)}")
    result |= {"kind": "boundary", "tie": args.tie, "by": "wins" if with_wins else "reward", **counts}
    result |= {"models": {}, "avg_length": {}}
    for source in ("on", "off"):
        responses = [one for index in prompts for one in rows[index]["responses"] if one["source"] == source]
        result["models"][source] = sorted({response.get("model") for response in responses} - {None})
        result["avg_length"][source] = np.mean([len(answer(response)) for response in responses])
    result["length_matched"] = boundary(judged[judged["similar"]], args.tie)
    result["by_category"] = by_category(judged, [row.get("category") for row in rows], args.tie)
    measured = ~np.isnan(comparisons["gap"]) & np.isin(comparisons["prompt"], prompts)
    result["distinct"] = distinctness(comparisons[measured])
    result["consistency"] = consistency(both)
    result["advice"] = advice(result)
    text = json.dumps(result, default=np.generic.item)
    counts = {"rows": len(rows), **counts}
    write_output(args, args.scored, [text], counts=counts, seconds=round(time.time() - started, 2))
    print(result["advice"])
    print(text)


if __name__ == "__main__":
    main(ARGS)
