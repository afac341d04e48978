"""
Does on-policy or off-policy data help this model more, now? S2's boundary between the stages of alignment.

Reads   --scored FILE ...  a Row (below) per prompt, as score.py writes it: on-policy responses of the model
                           in question and off-policy ones; several files are merged by id
Writes  --out FILE         JSON: {"v_on", "v_off", "ties", "score", "ci", "stage", "use": "on" | "off", ...};
                           beside it the record of the run, for x.json x.meta.json

S2 is "Is On-Policy Data always the Best Choice [...]?"; this is its section 5.3, Algorithm 1. Each on-policy
response meets each off-policy response of its prompt (in S2 two meet two) under a preference model: by "wins"
if the rows have them, else by reward. V_on counts the comparisons that the on-policy response wins, V_off
those it loses and, unless --tie says otherwise, ties; equal texts tie. The boundary score is V_on / (V_on +
V_off); the caption of S2's Table 3 turns it round, its numbers do not. If V_off > V_on, the model is in the
preference injection stage and learns more from off-policy data, else in the fine-tuning stage and learns more
from on-policy data.

    python boundary.py --scored out/scored.jsonl --out out/policy.boundary.json

Ours are "ci", a 95 % interval over prompts; "won_share", prompts by the share of comparisons that the
on-policy response won; "length_matched", the same counts over texts whose numbers of characters differ by at
most a fifth: a preference model that likes long answers moves the boundary.

If responses have "logp" (score.py --scorer logp with the model in question), two checks of S2 are computed:
    distinct     F.1: how often the model gives its own response the higher probability, in sum and per token
                 (S2 Table 8: 84 to 97 %). Algorithm 1 needs that; below 80 % of sums (ours) it is doubtful
    consistency  eqs. 10 and 11, before Algorithm 1 simplifies them: how often the preference model agrees
                 with the model in question ("on") and with the source of the off-policy data ("off")
Both are means over prompts. Prints what to train on next as a sentence, then the result as one JSON object.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Required, TypedDict

import msgspec
import numpy as np


class Response(TypedDict, total=False):
    text: Required[str]
    source: Required[Literal["on", "off"]]  # sampled from the model in question, or taken from elsewhere
    model: str | None
    token_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]] | None
    reward: float | None  # null where it could not be scored
    logp: float | None  # log-probability under the model in question, of this many tokens
    logp_tokens: Annotated[int, msgspec.Meta(gt=0, lt=2**32)] | None


class Row(TypedDict, total=False):
    id: Required[str]
    prompt: Required[str | list[TypedDict("Message", {"role": str, "content": str})]]  # text is one user turn
    responses: Required[list[Response]]
    labeler: str | None  # what made the rewards, such as "rm:MODEL"
    wins: list[list[Annotated[float, msgspec.Meta(ge=0, le=1)] | None]] | None  # P(response i beats j)
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


# ----- one prompt
def compare(one, other, by_wins):
    """(verdict, gap of log-probabilities, gap per token, similar length) of two responses; nan: not known.

    A verdict is 1 if `one` is preferred, 0 if `other` is, and 0.5 for a tie.
    """
    value, bar = (one.get("wins", {}).get(id(other)), 0.5) if by_wins else (one["reward"], other["reward"])
    if one["text"] == other["text"]:
        verdict = 0.5
    elif value is None or bar is None:
        verdict = math.nan
    else:
        verdict = 0.5 + 0.5 * (value > bar) - 0.5 * (value < bar)
    lengths = len(one["text"]), len(other["text"])
    similar = 5 * (max(lengths) - min(lengths)) <= max(lengths)
    return verdict, *logp_gaps(one, other), similar


def logp_gaps(one, other):
    """log pi(one) - log pi(other), of sums and per token; nan if a "logp" or "logp_tokens" is missing."""
    if None in (one.get("logp"), other.get("logp"), one.get("logp_tokens"), other.get("logp_tokens")):
        return math.nan, math.nan
    per_token = one["logp"] / one["logp_tokens"] - other["logp"] / other["logp_tokens"]
    return one["logp"] - other["logp"], per_token


# ----- all comparisons: arrays (C,) with an entry for each; `prompts` has the numbers of their prompts
def boundary(prompts, verdicts, tie):
    """Algorithm 1; None if no comparison counts."""
    numbers, place = np.unique(prompts, return_inverse=True)
    won, lost, ties = (np.bincount(place[verdicts == v], minlength=len(numbers)) for v in (1, 0, 0.5))
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
    return result | {"n_prompts": len(won), "n_comparisons": len(verdicts)}


def bootstrap_interval(numerators, denominators):
    """95 % interval of sum(numerators) / sum(denominators), each (P,), over 1,000 draws of the prompts."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(1000):
        drawn = rng.integers(0, len(numerators), len(numerators))
        if denominators[drawn].sum():
            ratios.append(numerators[drawn].sum() / denominators[drawn].sum())
    return np.percentile(ratios, [2.5, 97.5]).tolist()


def shares(prompts, holds):
    """(P,) the share of each prompt's comparisons for which `holds` (C,) is true."""
    place = np.unique(prompts, return_inverse=True)[1]
    return np.bincount(place, holds) / np.bincount(place)


def distinctness(prompts, gaps, gaps_per_token):
    """F.1: how often the on-policy response has the higher probability, by sums and by means per token."""
    if len(gaps) == 0:
        return None
    summed, per_token = shares(prompts, gaps > 0), shares(prompts, gaps_per_token > 0)
    return {"sum": summed.mean(), "mean": per_token.mean(), "n_prompts": len(summed)}


def consistency(prompts, verdicts, gaps):
    """Eqs. 10 and 11: how often P* (the preference model) and P_theta (on) or P_off (off) agree.

    An indicator is 1 where a probability is above 1/2; a tie, 1/2, gives 0 (Definition 5.5). Eq. 10: P* and
    P_theta prefer the on-policy y1, or neither does. Eq. 11: P_off, which cannot be computed, never prefers
    y1 (F.1), so P* agrees wherever it does not prefer y1. S2's simplified form leaves ties out of that.
    """
    if len(gaps) == 0:
        return None
    on = shares(prompts, (verdicts > 0.5) == (gaps > 0))
    off, simplified = shares(prompts, verdicts <= 0.5), shares(prompts, verdicts < 0.5)
    stage = "injection" if off.mean() > on.mean() + 1e-12 else "fine-tuning"  # 1e-12: not by rounding
    result = {"on": on.mean(), "off": off.mean(), "off_simplified": simplified.mean(), "stage": stage}
    return result | {"n_prompts": len(on), "n_comparisons": len(gaps)}


def advice(result):
    """What to train on next as a sentence, and what speaks against it."""
    low, high = result["ci"]
    text = f"Preference {result['stage']} stage: train on {result['use']}-policy data next (boundary score "
    text += f"{result['score']:.3f}, 95 % interval {low:.3f} to {high:.3f}, {result['n_prompts']} prompts"
    text += ", undecided at 95 %)." if low <= 0.5 <= high else ")."
    doubts = []
    matched, agreement, distinct = result["length_matched"], result["consistency"], result["distinct"]
    if matched and matched["stage"] != result["stage"]:
        n = matched["n_comparisons"]
        doubt = f"the {n} comparisons of texts of similar length say {matched['stage']} "
        doubts.append(doubt + "(score {:.3f}, {:.3f} to {:.3f})".format(matched["score"], *matched["ci"]))
    if agreement and agreement["stage"] != result["stage"]:
        doubt = f"the exact consistencies say {agreement['stage']} "
        doubts.append(doubt + f"(eq. 10 {agreement['on']:.3f}, eq. 11 {agreement['off']:.3f})")
    if distinct and distinct["sum"] < 0.8:
        doubt = f"the model gives its own response the higher probability in only {distinct['sum']:.0%} "
        doubts.append(doubt + "(F.1: 84 to 97 %)")
    return text + f" Take it with care: {'; '.join(doubts)}." if doubts else text


# ----- main
def main(args):
    started = time.time()
    files, rows = ", ".join(args.scored), read_responses(args.scored)
    by_wins = any(row.get("wins") is not None for row in rows.values())
    if by_wins and any(row.get("wins") is None for row in rows.values()):
        fail(f"{files}: some rows have wins and some have none: score all with one scorer")
    groups, comparisons = [], []  # groups: of each prompt, its responses by source
    for number, prompt_id in enumerate(sorted(rows)):  # in the order of the bootstrap, whatever the files'
        group = {"on": [], "off": []}
        for response in rows[prompt_id]["responses"]:
            group[response["source"]].append(response)
        groups.append(group)
        for one in group["on"]:
            comparisons += ((number, *compare(one, other, by_wins)) for other in group["off"])

    prompts, verdicts, gaps, gaps_per_token, similar = np.array(comparisons, float).reshape(-1, 5).T
    judged = ~np.isnan(verdicts)
    compared = np.unique(prompts[judged]).astype(int)
    measured = ~np.isnan(gaps) & np.isin(prompts, compared)
    both, close = judged & measured, judged & (similar == 1)
    counts = {
        "prompts_with_one_source": len(groups) - len(np.unique(prompts)),
        "prompts_without_verdict": len(np.unique(prompts)) - len(compared),
        "without_verdict": int((~judged).sum()),
        "without_logp": int((judged & ~measured).sum()),
    }
    result = boundary(prompts[judged], verdicts[judged], args.tie)
    if result is None:
        fail(f"{files}: no on-policy and off-policy response can be compared: {json.dumps(counts)}")
    result |= {"kind": "boundary", "tie": args.tie, "by": "wins" if by_wins else "reward", **counts}
    result |= {"models": {}, "avg_length": {}}
    for source in ("on", "off"):
        responses = [response for number in compared for response in groups[number][source]]
        result["models"][source] = sorted({response.get("model") for response in responses} - {None})
        result["avg_length"][source] = np.mean([len(response["text"]) for response in responses])
    won = shares(prompts[judged], verdicts[judged] == 1)
    result["won_share"] = Counter(f"{share:.3g}" for share in sorted(won))
    result["length_matched"] = boundary(prompts[close], verdicts[close], args.tie)
    result["distinct"] = distinctness(prompts[measured], gaps[measured], gaps_per_token[measured])
    result["consistency"] = consistency(prompts[both], verdicts[both], gaps[both])
    result["advice"] = advice(result)
    text = json.dumps(result, default=np.generic.item)
    write_output(args, args.scored, [text], started, counts={"rows": len(rows), **counts})
    print(result["advice"])
    print(text)


# ----- reading and writing: the same text in every script that has it (tests/test_copies.py)
def fail(message):
    """End the run because of a mistake of the user: one sentence, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


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
