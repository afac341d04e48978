"""
Stage 5: scored responses -> win rates, plain and length-controlled.

Reads   --scored FILE ...   Rows (below) of score.py with answers of --model and --baseline, merged by id
   or   --annotations FILE  verdicts in AlpacaEval's public format, a list of Annotation (below)
Writes  --out FILE          JSON: {"win_rate", "length_controlled_winrate", "n_total", ...}; "categories" and
                            "length_bins" have the same for groups of prompts (SimpleMix, Figs. 2, 3, 8)

    python evaluate.py --scored eval.jsonl --model out/on50 --baseline out/sft --out on50.winrate.json
    python evaluate.py --annotations annotations.json --lc-data alpaca_eval --out alpaca.winrate.json

Prints the result. By the reward that labelled a model's pairs, its win rate tells how well it learned that
reward, not how good it is. Differences of models are made by report/compare.py.
"""

import argparse
from math import inf, isnan, nan, sqrt


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--scored", nargs="+", metavar="FILE", help="scored responses, merged by id")
    flag("--model", metavar="NAME", help='"model" of the responses to judge')
    flag("--baseline", metavar="NAME", help='"model" of the responses to compare with')
    flag("--annotations", metavar="FILE", help="AlpacaEval's verdicts, in place of the three flags above")
    flag("--lc-data", metavar="DIR", help="folder of AlpacaEval's difficulties, instructions and gamed rows")
    flag("--lc-c", type=float, metavar="C", help="inverse penalty of the LC fit (--lc-data: cross-validated)")
    flag("--bins-of", nargs="+", default=[], metavar="CATEGORY", help="length bins of these categories only")
    flag("--allow-missing", action="store_true", help="continue when over 1 %% of prompts have no verdict")
    flag("--out", required=True, metavar="FILE", help="the result, JSON")
    args = parser.parse_args(argv)
    given = [bool(option) for option in (args.scored, args.model, args.baseline)]
    if args.annotations and any(given) or not args.annotations and not all(given):
        parser.error("give --scored, --model and --baseline, or --annotations")
    if args.lc_c is not None and not 0 < args.lc_c < inf:
        parser.error(f"--lc-c must be above 0, found {args.lc_c}")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before numpy is imported: --help and wrong flags answer at once

import csv  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Literal, Required, TypedDict  # noqa: E402

import msgspec  # noqa: E402
import numpy as np  # noqa: E402

from chat import answer  # noqa: E402
from common import Message, TokenIds, Wins, fail, note, read_responses, write_output  # noqa: E402

CS = np.logspace(-4, 4, 10)  # alpaca_eval: scikit-learn's LogisticRegressionCV(Cs=10)
MINIMAL_C = CS[6]  # without gamma: on few prompts cross-validation shrinks every rate to 50
GAMED_WEIGHT = 0.1  # alpaca_eval: a fifth of a model's weight, shared by the two gamed models
MIN_VERDICTS = 5  # of fewer there is nothing to fit
LC_FILES = ("alpaca_eval_gpt4_baseline.json", "df_gamed.csv")  # of --lc-data
OFFICIAL_BASELINE = "gpt4_1106_preview"
NOT_PUBLIC = "do not compare this rate with the public leaderboard"
# AlpacaEval 2's judge and prompt as a labeler, in its own files and in those of scorers/judge.py
OFFICIAL_JUDGES = ("weighted_alpaca_eval_gpt4_turbo", "judge:gpt-4-1106-preview:alpaca_eval_clf.txt@")
Preference = Annotated[float, msgspec.Meta(ge=0, le=2)]  # 1: the baseline wins, 2: the model; 0: an old tie
MEASURES = {"win_rate": "ci", "length_controlled_winrate": "lc_ci", "reward": "reward_ci"}  # and intervals


class Response(TypedDict, total=False):
    text: Required[str]
    final: str | None  # what follows its reasoning; texts are compared and measured by this
    source: Required[Literal["on", "off"]]
    model: str | None
    token_ids: TokenIds | None
    reward: Required[float | None]  # null where it could not be scored


class Row(TypedDict, total=False):
    id: Required[str]
    prompt: Required[str | list[Message]]  # text is one user turn
    prompt_token_ids: TokenIds | None
    responses: Required[list[Response]]
    category: str | None
    labeler: str | None  # what made the rewards or wins, such as "judge:MODEL"
    wins: Wins | None
    cosine: list[list[float | None]] | None


class Annotation(TypedDict, total=False):
    instruction: Required[str]
    output_1: Required[str]  # the baseline's answer
    output_2: Required[str]  # the model's answer
    generator_1: Required[str]
    generator_2: Required[str]
    preference: Required[Preference | None]
    annotator: str | None
    category: str | None


def verdicts(rows, model, baseline, files):
    """Return ({id: prompt} of the rows that both models answered, what decides: "wins" or "reward")."""
    names = {str(response.get("model")) for row in rows.values() for response in row["responses"]}
    for name in (model, baseline):
        if name not in names:
            fail(f"{files}: no response is of the model {name!r}; there are {', '.join(sorted(names))}")
    by = {"reward" if row.get("wins") is None else "wins" for row in rows.values()}
    if len(by) > 1:
        fail(f"{files}: some rows have wins and some have none; score all of them with one scorer")
    prompts = {}
    for key, row in rows.items():
        responses = row["responses"]
        ours = [i for i, response in enumerate(responses) if response.get("model") == model]
        theirs = [j for j, response in enumerate(responses) if response.get("model") == baseline]
        if ours and theirs:
            prompts[key] = {
                "p": mean([preference(row, i, j) for i in ours for j in theirs]),  # nan without a verdict
                "len": mean([len(answer(responses[i])) for i in ours]),
                "len_baseline": mean([len(answer(responses[j])) for j in theirs]),
                "reward": mean([responses[i]["reward"] for i in ours]),
                "reward_baseline": mean([responses[j]["reward"] for j in theirs]),
                "category": str(row.get("category")),
                "labeler": row.get("labeler"),
                "instruction": row["prompt"][0]["content"] if len(row["prompt"]) == 1 else None,
            }
    return prompts, by.pop()


def preference(row, i, j):
    """Preference of response i over j: the judge's probability, or 0, 1/2, 1 by reward. None: no verdict."""
    one, other = row["responses"][i], row["responses"][j]
    if answer(one) == answer(other):
        return 0.5
    if row.get("wins") is not None:
        return row["wins"][i][j]
    reward, bar = one["reward"], other["reward"]
    if reward is None or bar is None:
        return None
    return 0.5 + 0.5 * ((reward > bar) - (reward < bar))


def mean(numbers):
    """The mean of the numbers that are not None; nan if there is none."""
    numbers = [number for number in numbers if number is not None]
    return sum(numbers) / len(numbers) if numbers else nan


def read_annotations(path):
    """Return ({instruction: prompt}, model, baseline) of AlpacaEval's verdicts."""
    try:
        entries = msgspec.json.decode(Path(path).read_bytes(), type=list[Annotation])
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        fail(f"{path}: {error}")
    prompts, names = {}, set()
    for entry in entries:
        ours, theirs = entry["output_2"], entry["output_1"]
        p = nan if entry["preference"] is None else entry["preference"]
        if 0 < p < 1:
            fail(f"{path}: expected preferences from 1 to 2, or 0 for a tie, found {p}")
        if p == 0 or ours == theirs:
            p = 1.5
        names.add((entry["generator_2"], entry["generator_1"]))
        prompts[entry["instruction"]] = {
            "p": p - 1,
            "len": len(ours),
            "len_baseline": len(theirs),
            "reward": nan,
            "reward_baseline": nan,
            "category": str(entry.get("category")),
            "labeler": entry.get("annotator"),
            "instruction": entry["instruction"],
        }
    if len(prompts) < len(entries) or len(names) != 1:
        expected = "expected one verdict per instruction, all for the same model and baseline"
        fail(f"{path}: {expected}, found {sorted(names)}")
    return prompts, *names.pop()


def with_difficulty(prompts, folder, files):
    """Return ({index in AlpacaEval's list: prompt}, gamed rows {"x": (m, 3), "p": (m,)}, the list's length).

    gamma is an instruction's difficulty. Gamed: the baseline, told to be brief or verbose, against itself.
    """
    columns = ("index", "instruction_difficulty", "std_delta_len", "preference")
    try:
        entries = msgspec.json.decode(Path(folder, LC_FILES[0]).read_bytes())
        indices = {entry["instruction"]: i for i, entry in enumerate(entries)}
        with open(Path(folder, LC_FILES[1]), newline="", encoding="utf-8") as file:
            table = [[float(row[name] or "nan") for name in columns] for row in csv.DictReader(file)]
        index, difficulty, delta, p = np.array(table).reshape(-1, 4).T
        gamma = dict(zip(index, difficulty, strict=True))
        if gamma.keys() != set(indices.values()):
            raise ValueError("an instruction twice, or without gamed rows")
        if not np.isfinite([difficulty, delta]).all() or ((p < 0) | (p > 1)).any():
            raise ValueError("numbers that are not finite, or preferences outside of [0, 1]")
    except (OSError, csv.Error, KeyError, TypeError, ValueError, RecursionError) as error:
        fail(f"--lc-data {folder}: expected AlpacaEval's two files, found {type(error).__name__}: {error}")
    by_index = {}
    for key, prompt in prompts.items():
        i = indices.get(prompt["instruction"])
        if i is None or i in by_index:
            fail(f"{files}: the prompt of {key!r:.100} is not in --lc-data, or two ids have it")
        by_index[i] = prompt | {"index": i, "gamma": gamma[i]}
    gamed = {"x": np.stack([np.tanh(delta), difficulty, 0 * delta], axis=1), "p": p}
    return by_index, gamed, len(indices)


def as_columns(prompts):
    """{name: (n,)} of prompts in the order of their keys."""
    ordered = [prompts[key] for key in sorted(prompts)]
    names = ordered[0].keys() - {"instruction", "labeler"}
    return {name: np.array([prompt[name] for prompt in ordered]) for name in names}


# ----- the length-controlled win rate: a logistic regression of the preference on the difference of lengths,
# gamma and a constant predicts it for equal lengths. Without gamma the scale is not that of public numbers.
def sigmoid(x):
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # never overflows


def log_losses(theta, x, p, weight):
    """(n,) losses of the logistic model: x (n, k) features, p (n,) targets in [0, 1], weight (n,)."""
    logits = x @ theta
    return weight * (np.logaddexp(0, logits) - p * logits)


def fit(x, p, weight, C, start=None):
    """argmin over theta (k,) of |theta|_1 + C sum(log_losses) by Newton; C is the inverse of the penalty."""

    def objective(theta):
        return np.abs(theta).sum() + C * log_losses(theta, x, p, weight).sum()

    theta = np.zeros(x.shape[1]) if start is None else start
    for _ in range(200):
        q = sigmoid(x @ theta)
        gradient = C * x.T @ (weight * (q - p))
        hessian = C * (x.T * (weight * q * (1 - q))) @ x
        hessian += (1e-12 * np.trace(hessian) + 1e-30) * np.eye(len(theta))  # columns may be the same
        step = lasso(hessian, hessian @ theta - gradient) - theta
        while objective(theta + step) > objective(theta) * (1 + 1e-12):
            step = step / 2
        theta = theta + step
        if np.abs(weight * (x @ step)).max() < 1e-8:
            break
    return theta


def lasso(hessian, linear):
    """argmin over theta (k,) of |theta|_1 + theta.H.theta / 2 - linear.theta, H positive definite, k <= 3.

    Let s be the signs of the minimum, -1, 0 or 1, so that |theta|_1 = s.theta. The gradient H.theta - b, with
    b = linear - s, is 0 where s is not, and theta is 0 elsewhere: k equations. Each of the 3^k patterns has a
    solution, which counts if its signs are s. As theta.H.theta = b.theta, its value is that of
    s.theta + b.theta / 2 - linear.theta = -b.theta / 2, and the lowest of these is the minimum.
    """
    signs = np.indices((3,) * len(linear)).reshape(len(linear), -1).T - 1  # (3^k, k)
    used = signs != 0
    A = np.where(used[:, :, None] & used[:, None], hessian, np.eye(len(linear)))
    b = np.where(used, linear - signs, 0)
    theta = np.linalg.solve(A, b[..., None])[..., 0]
    has_signs = (theta * signs >= 0).all(axis=1)
    values = -(b * theta).sum(axis=1)
    return theta[np.where(has_signs, values, np.inf).argmin()]


def training_rows(prompts, gamed):
    """Return (x (n, k), p (n,), weight (n,)) of the fit: the prompts, then the gamed rows if there are any.

    x has tanh(d / std(d)), d the baseline's length minus the model's; gamma, if there is one; and 1, but 0 in
    gamed rows, which tell nothing of this model. Prompts without a verdict weigh 0.
    """
    p = prompts["p"]
    difference = prompts["len_baseline"] - prompts["len"]
    spread = difference.std(ddof=1)
    lengths = np.tanh(difference / spread) if spread > 0 else 0.0 * difference
    ones = np.ones(len(p))
    columns = [lengths, ones] if gamed is None else [lengths, prompts["gamma"], ones]
    x = np.stack(columns, axis=1)
    weight = ones
    if gamed is not None and (difference.any() or (p != 0.5).any()):  # else the model is the baseline: 50
        x = np.concatenate([x, gamed["x"]])
        p = np.concatenate([p, gamed["p"]])
        weight = np.concatenate([weight, np.full(len(gamed["p"]), GAMED_WEIGHT)])
    return x, np.nan_to_num(p), weight * np.isfinite(p)


def choose_C(prompts, gamed):
    """C by five folds, the smallest of equals. A row's index in AlpacaEval's files modulo 5 is its fold."""
    if gamed is None or np.isfinite(prompts["p"]).sum() < MIN_VERDICTS:
        return MINIMAL_C
    x, p, weight = training_rows(prompts, gamed)
    index = prompts["index"]
    fold = np.concatenate([index, np.arange(len(p) - len(index))]) % 5
    losses = []
    for C in CS:
        held_out = []
        for k in np.unique(fold[weight > 0]):
            train = fold != k
            test = (fold == k) & (weight > 0)
            theta = fit(x[train], p[train], weight[train], C)
            held_out.append(log_losses(theta, x[test], p[test], weight[test]).mean())
        losses.append(np.mean(held_out))
    return CS[np.argmin(losses)]


def rates(prompts, gamed, C, start=None):
    """Return (theta, MEASURES (3, g)) of groups "members" (n, g) of prompts, of which the first is all."""
    p = prompts["p"]
    members = prompts["members"]
    judged = np.isfinite(p)
    wins = group_means(p, members)
    theta = None
    lc = np.full(len(wins), nan)
    if judged.sum() >= MIN_VERDICTS:
        x, targets, weight = training_rows(prompts, gamed)
        theta = fit(x, targets, weight, C, start)
        x = x[: len(p)]
        logits = x @ theta
        equal_length = x[:, 1:] @ theta[1:]
        lc[0] = sigmoid(equal_length).mean()  # as alpaca_eval does, of unjudged prompts too
        lc[1:] = adjusted_rates(wins[1:], logits, equal_length, members[:, 1:] & judged[:, None])
    reward = group_means(prompts["reward"], members)
    return theta, np.stack([100 * wins, 100 * lc, reward])


def group_means(values, members):
    """(g,) means of values (n,) without nan in groups (n, g); nan for an empty group."""
    members = members & np.isfinite(values)[:, None]
    return np.nan_to_num(values) @ members / members.sum(0)


def adjusted_rates(wins, logits, equal_length, members):
    """(g,) the length-controlled rates of groups with win rates (g,), in [0, 1]; the method is ours.

    The fit knows no groups. A number b (g,) is added to its logits (n,), so that a group's mean chance is its
    win rate; the group's mean chance at equal lengths, with the same b, is the result.
    """
    row, group = np.nonzero(members)
    size = members.sum(0)
    odds = np.exp(-logits[row])
    low = np.full(len(size), -40.0)
    high = -low
    for _ in range(32):  # halve the interval that contains b
        b = (low + high) / 2
        chances = 1 / (1 + odds * np.exp(-b)[group])  # sigmoid(logits + b), with fewer calls of exp
        below = np.bincount(group, chances, len(size)) / size < wins
        low = np.where(below, b, low)
        high = np.where(below, high, b)
    return np.bincount(group, sigmoid(equal_length[row] + b[group]), len(size)) / size


def bootstrap(prompts, gamed, C, theta):
    """(1000, 3, g) rates of prompts drawn with replacement, the same for equal n; fits start at theta."""
    n = len(prompts["p"])
    draws = []
    for counts in np.random.default_rng(0).multinomial(n, [1 / n] * n, 1000):
        drawn = np.repeat(np.arange(n), counts)
        sample = {name: column[drawn] for name, column in prompts.items()}
        draws.append(rates(sample, gamed, C, theta)[1])
    return np.array(draws)


# ----- the result
def group_prompts(lengths, categories, edges, bins_of):
    """{(kind, name): members (n,)}: all prompts, categories, and four bins of the answer's length."""
    groups = {("", "all"): np.ones(len(lengths), bool)}
    for name in sorted(set(categories) - {"None"}):
        groups["categories", name] = categories == name
    binned = np.isin(categories, bins_of or categories)
    bins = np.minimum(np.searchsorted(edges, lengths, side="right") - 1, 3)
    for k in range(4):
        if edges[k] < edges[k + 1] or k == 3:  # a bin between equal edges is left out
            groups["length_bins", f"{edges[k]:.6g} to {edges[k + 1]:.6g}"] = binned & (bins == k)
    return groups


def measure(prompts, groups, gamed, C):
    """The result of a model: MEASURES of all prompts and of each group, with their intervals."""
    prompts = prompts | {"members": np.stack(list(groups.values()), axis=1)}
    with np.errstate(invalid="ignore"):  # nan: a draw left a group empty
        theta, values = rates(prompts, gamed, C)
        draws = bootstrap(prompts, gamed, C, theta)
    result = {"categories": {}, "length_bins": {}}
    for g, ((kind, group), inside) in enumerate(groups.items()):
        p = prompts["p"][inside & np.isfinite(prompts["p"])]
        n = len(p)
        wins = (p > 0.5).sum()
        ties = (p == 0.5).sum()
        cell = {  # by alpaca_eval's names
            "n_total": n,
            "n_wins": wins,
            "n_wins_base": n - wins - ties,
            "n_draws": ties,
            "standard_error": 100 * p.std(ddof=1) / sqrt(n) if n > 1 else None,
        }
        for m, (name, interval) in enumerate(MEASURES.items()):
            exists = np.isfinite(values[m, g])
            finite = draws[np.isfinite(draws[:, m, g]), m, g]
            cell[name] = values[m, g] if exists else None
            cell[interval] = np.percentile(finite, [2.5, 97.5]).tolist() if exists and n > 1 else None
        if kind:
            result[kind][group] = cell
        else:
            result |= cell
    result["avg_length"] = int(prompts["len"].mean())
    result["avg_length_baseline"] = int(prompts["len_baseline"].mean())
    rewards = prompts["reward_baseline"][np.isfinite(prompts["reward_baseline"])]
    result["reward_baseline"] = rewards.mean() if len(rewards) else None
    if theta is not None:
        formula = "length_controlled_minimal" if gamed is None else "length_controlled_v1"
        result |= {"formula": formula, "C": C, "theta": theta.tolist()}
    return result


def main(args):
    started = time.time()
    inputs = args.scored or [args.annotations]
    files = ", ".join(inputs)
    gamed = None
    if args.annotations:
        prompts, model, baseline = read_annotations(args.annotations)
        n_prompts = len(prompts)
        by = "annotations"
    else:
        rows, model, baseline = read_responses(args.scored, Row), args.model, args.baseline
        prompts, by = verdicts(rows, model, baseline, files)
        n_prompts = len(rows)
    if args.lc_data:
        prompts, gamed, n_prompts = with_difficulty(prompts, args.lc_data, files)
        inputs = inputs + [f"{args.lc_data}/{name}" for name in LC_FILES]
    n_unanswered = n_prompts - len(prompts)
    n_without = sum(isnan(prompt["p"]) for prompt in prompts.values())
    missing = f"of {n_prompts} prompts, {n_unanswered} have no answer of a model and {n_without} no verdict"
    if n_without == len(prompts):
        fail(f"{files}: no prompt has a verdict on {model} against {baseline}: {missing}")
    if n_unanswered + n_without > 0.01 * n_prompts and not args.allow_missing:
        fail(f"{files}: {missing}, more than 1 %; --allow-missing measures the rest")
    columns = as_columns(prompts)
    categories = columns.pop("category")
    for name in args.bins_of:
        if name not in categories:
            fail(f"{files}: no prompt has the category {name!r}")
    edges = np.quantile(columns["len"], [0, 0.25, 0.5, 0.75, 1])
    groups = group_prompts(columns["len"], categories, edges, args.bins_of)
    result = measure(columns, groups, gamed, args.lc_c or choose_C(columns, gamed))
    labelers = {prompt["labeler"] for prompt in prompts.values()} - {None, ""}
    judges = {name.startswith(OFFICIAL_JUDGES) for name in labelers}
    if gamed and "formula" in result and not (baseline == OFFICIAL_BASELINE and judges == {True}):
        result["formula"] = "length_controlled_v1, other judge"
        note(f"warning: other judge or baseline than AlpacaEval 2's; {NOT_PUBLIC}")
    result |= {
        "kind": "winrate",
        "model": model,
        "baseline": baseline,
        "by": by,
        "n_without_verdict": n_without,
        "n_unanswered": n_unanswered,
        "bins_of": args.bins_of,
        "labelers": sorted(labelers),
    }
    text = json.dumps(result, default=np.generic.item)
    counts = {"prompts": n_prompts, "compared": result["n_total"]}
    counts |= {"n_without_verdict": n_without, "n_unanswered": n_unanswered}
    write_output(args, inputs, [text], counts=counts, seconds=round(time.time() - started, 2))
    print(text)


if __name__ == "__main__":
    main(ARGS)
