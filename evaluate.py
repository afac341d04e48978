"""
Stage 5: scored responses -> win rates; and a model -> the papers' benchmarks.

winrate     Reads   --scored FILE ...   a Row (below) per prompt, as score.py writes it, with answers of
                                        --model and --baseline; several files are merged by id
               or   --annotations FILE  verdicts in AlpacaEval's public format, a list of Annotation (below)
            Writes  --out FILE          JSON: {"win_rate", "length_controlled_winrate", "n_total", ...};
                                        beside it the record of the run, for x.json x.meta.json
    On each prompt the model wins (1), ties (1/2) or loses (0) by reward; if the rows have "wins", its
    preference is the judge's probability. Equal texts tie. "categories" and "length_bins" (quarters of the
    answers' lengths; with --minus of both models', with --bins-of in some categories) have the same numbers
    for groups of prompts (S1 Figs. 2, 3, 8); --minus takes a second model and adds the differences. "ci" and
    "lc_ci" are 95 % intervals over prompts, by 1,000 bootstrap draws. By the reward that labelled a model's
    pairs, its win rate tells how well it learned that reward, not how good it is.

    The length-controlled (LC) win rate is AlpacaEval 2's: a logistic regression of the preference on the
    difference of lengths, the prompt's difficulty gamma and a constant, with an L1 penalty; LC is what it
    predicts for equal lengths. gamma and "gamed" rows (the baseline told to be concise or verbose against
    itself, which show what length alone does) exist for AlpacaEval's 805 prompts: --lc-data is a folder with
    df_gamed.csv and alpaca_eval_gpt4_baseline.json of the data set tatsu-lab/alpaca_eval. Without it, the
    formula is "length_controlled_minimal", on another scale. Public numbers are of the judge
    gpt-4-1106-preview (reported shut down in 2026) with AlpacaEval's prompt against gpt4_1106_preview, and
    gamma was fitted to its verdicts: otherwise the formula says "other judge". "labelers" names the judge.

benchmarks  Reads   --model             a folder, or a name on the hub
            Writes  --out FILE          JSON: {"average", "tasks": {task: {"score", "stderr", "n", ...}}, ...}
    Runs lm-eval (pip install "lm-eval[ifeval]==0.4.13"). simplemix (S1 section 4.1, Tables 4, 5): 8 tasks
    and their plain mean, for IFEval the share of prompts whose instructions are all followed ("loose"). S1
    does not name examples, template and normalisation; its numbers fit none of them. what-matters (S3 Table
    7, as Tulu 3): chat template, examples as turns of the conversation, no average.

    python evaluate.py winrate --scored eval.jsonl --model out/on50 --baseline out/sft --out on50.winrate.json
    python evaluate.py winrate --annotations annotations.json --lc-data alpaca_eval --out alpaca.winrate.json
    python evaluate.py benchmarks --model out/on50 --suite simplemix --out on50.benchmarks.json

Prints the result as one JSON object. S1 is the paper SimpleMix, S3 "What Matters in Data for DPO?".
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Annotated, Literal, Required, TypedDict

import msgspec
import numpy as np

CS = np.logspace(-4, 4, 10)  # alpaca_eval: scikit-learn's LogisticRegressionCV(Cs=10)
MINIMAL_C = CS[6]  # without gamma: on few prompts cross-validation shrinks every rate to 50
GAMED_WEIGHT = 0.1  # alpaca_eval: a fifth, shared by the two gamed models
LC_FILES = ("alpaca_eval_gpt4_baseline.json", "df_gamed.csv")  # of --lc-data
# Labelers that are AlpacaEval 2's judge and prompt begin so, in its own files and in those of score.py.
OFFICIAL_JUDGES = ("weighted_alpaca_eval_gpt4_turbo", "judge:gpt-4-1106-preview:alpaca_eval_clf.txt@")
MEASURES = {"win_rate": "ci", "length_controlled_winrate": "lc_ci", "reward": "reward_ci"}  # and intervals


class Response(TypedDict, total=False):
    text: Required[str]
    source: Required[Literal["on", "off"]]
    model: str | None
    token_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]] | None
    reward: float | None  # null where it could not be scored


class Row(TypedDict, total=False):
    id: Required[str]
    prompt: Required[str | list[TypedDict("Message", {"role": str, "content": str})]]  # text is one user turn
    responses: Required[list[Response]]
    category: str | None
    labeler: str | None  # what made the rewards or wins, such as "judge:MODEL"
    wins: list[list[Annotated[float, msgspec.Meta(ge=0, le=1)] | None]] | None  # P(response i beats j)
    cosine: list[list[float | None]] | None


class Annotation(TypedDict, total=False):
    instruction: Required[str]
    output_1: Required[str]  # the baseline's answer
    output_2: Required[str]  # the model's answer
    generator_1: Required[str]
    generator_2: Required[str]
    preference: Required[
        Annotated[float, msgspec.Meta(ge=0, le=2)] | None
    ]  # 1 to 2, the model wins; 0 is an old tie
    annotator: str | None
    category: str | None


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    flag = commands.add_parser("winrate", allow_abbrev=False).add_argument
    flag("--scored", nargs="+", metavar="FILE", help="scored responses, merged by id")
    flag("--model", metavar="NAME", help='"model" of the responses to judge')
    flag("--baseline", metavar="NAME", help='"model" of the responses to compare with')
    flag(
        "--annotations", metavar="FILE", help="verdicts in AlpacaEval's public format, instead of these three"
    )
    flag("--minus", metavar="NAME", help="a second model, or its annotations file, to subtract")
    flag("--lc-data", metavar="DIR", help="AlpacaEval's difficulties, instructions and gamed rows")
    flag("--lc-c", type=float, metavar="C", help="of the LC fit (default with --lc-data: cross-validation)")
    flag("--bins-of", nargs="+", default=[], metavar="CATEGORY", help="length bins of these categories alone")
    flag("--allow-missing", action="store_true", help="over 1 %% of prompts may lack a verdict or an answer")
    flag("--out", required=True, metavar="FILE", help="the result, JSON")
    flag = commands.add_parser("benchmarks", allow_abbrev=False).add_argument
    flag("--model", required=True, metavar="MODEL", help="a folder, or a name on the hub")
    flag("--suite", required=True, choices=list(SUITES))
    flag("--backend", choices=["hf", "vllm"], default="hf", help="what lm-eval runs the model with")
    flag("--batch-size", metavar="N", help="of the backend hf (default 8)")
    flag("--limit", type=int, metavar="N", help="the first N questions of each task alone")
    flag("--data", metavar="DIR", help="folder of data/offline_benchmarks.py, for machines without internet")
    flag("--out", required=True, metavar="FILE", help="the result, JSON")
    args = parser.parse_args(argv)
    if args.command == "winrate":
        given = [bool(option) for option in (args.scored, args.model, args.baseline)]
        if args.annotations and any(given) or not args.annotations and not all(given):
            parser.error("give --scored, --model and --baseline, or --annotations")
        if args.minus and args.minus in (args.model, args.annotations):
            parser.error("--minus is the same as --model or --annotations")
        if args.lc_c is not None and not 0 < args.lc_c < math.inf:
            parser.error(f"--lc-c must be above 0, found {args.lc_c}")
    elif args.limit is not None and args.limit < 1:
        parser.error(f"--limit must be at least 1, found {args.limit}")
    elif args.batch_size and args.backend != "hf":
        parser.error("--batch-size belongs to --backend hf; vLLM makes its own batches")
    return args


# ----- verdicts: {key: prompt}; a prompt's preference p lies in [0, 1], nan without a verdict
def preference(one, other, by_wins):
    """Preference of response `one` over `other`, in [0, 1]; None if it is not known."""
    if one["text"] == other["text"]:
        return 0.5
    if by_wins:
        return one.get("wins", {}).get(id(other))
    if one["reward"] is None or other["reward"] is None:
        return None
    return 0.5 + 0.5 * (one["reward"] > other["reward"]) - 0.5 * (one["reward"] < other["reward"])


def mean(numbers):
    """The mean of the numbers that are not None; nan if there is none."""
    numbers = [number for number in numbers if number is not None]
    return sum(numbers) / len(numbers) if numbers else math.nan


def verdicts(rows, model, baseline, by_wins):
    """{id: prompt} of rows that both models answered; several answers of a model count with their mean."""
    prompts = {}
    for key, row in rows.items():
        mine = [response for response in row["responses"] if response.get("model") == model]
        theirs = [response for response in row["responses"] if response.get("model") == baseline]
        if mine and theirs:
            prompts[key] = {
                "p": mean([preference(one, other, by_wins) for one in mine for other in theirs]),
                "len": mean([len(response["text"]) for response in mine]),
                "len_baseline": mean([len(response["text"]) for response in theirs]),
                "reward": mean([response["reward"] for response in mine]),
                "reward_baseline": mean([response["reward"] for response in theirs]),
            }
    return prompts


def read_annotations(path):
    """({instruction: row}, model, baseline) of AlpacaEval's verdicts; rows as read_responses has them."""
    try:
        entries = msgspec.convert(msgspec.json.decode(Path(path).read_bytes()), list[Annotation])
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        fail(f"{path}: {error}")
    names = {(entry["generator_2"], entry["generator_1"]) for entry in entries}
    if len({entry["instruction"] for entry in entries}) < len(entries) or len(names) != 1:
        fail(f"{path}: expected one verdict an instruction, on one model and baseline, found {sorted(names)}")
    [(model, baseline)] = names
    rows = {}
    for entry in entries:
        p = entry["preference"]
        if p is not None:
            p = p - 1 if p else 0.5
            if p < 0:
                fail(f"{path}: expected preferences from 1 to 2, or 0 for a tie, found {1 + p}")
        theirs = {"text": entry["output_1"], "model": baseline, "reward": None, "wins": {}}
        mine = {"text": entry["output_2"], "model": model, "reward": None, "wins": {id(theirs): p}}
        row = {"responses": [theirs, mine], "wins": [], "category": entry.get("category")}
        row["prompt"] = [{"role": "user", "content": entry["instruction"]}]
        rows[entry["instruction"]] = row | {"labeler": entry.get("annotator")}
    return rows, model, baseline


def read_reference(folder):
    """({instruction: place}, gamma (805,), gamed rows {"x": (m, 3), "p": (m,)}) of --lc-data."""
    try:
        text = Path(folder, LC_FILES[0]).read_bytes()
        entries = msgspec.json.decode(text, type=list[TypedDict("Entry", {"instruction": str})])
        places = {entry["instruction"]: place for place, entry in enumerate(entries)}
        names = ("index", "instruction_difficulty", "std_delta_len", "preference")
        with open(Path(folder, LC_FILES[1]), newline="", encoding="utf-8") as file:
            table = [[float(row[name] or "nan") for name in names] for row in csv.DictReader(file)]
        index, difficulty, delta, p = np.array(table).reshape(-1, 4).T  # p is in [0, 1]
        if len(places) < len(entries) or set(index) != set(range(len(entries))):
            raise ValueError("an instruction twice, or without gamed rows")
        if not np.isfinite([difficulty, delta]).all() or ((p < 0) | (p > 1)).any():
            raise ValueError("numbers that are not finite, or preferences outside of [0, 1]")
    except (OSError, csv.Error, KeyError, TypeError, ValueError, RecursionError) as error:
        fail(f"--lc-data {folder}: expected AlpacaEval's two files, found {type(error).__name__}: {error}")
    gamma = np.zeros(len(places))
    gamma[index.astype(int)] = difficulty
    return places, gamma, {"x": np.stack([np.tanh(delta), difficulty, 0 * delta], axis=1), "p": p}


# ----- the length-controlled win rate: alpaca_eval's length_controlled_v1
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

    For each pattern of signs the minimum solves H.theta = linear - signs, without the rows and columns where
    theta is 0. The best of those that have their pattern's signs is the minimum.
    """
    signs = np.array(list(itertools.product((-1, 0, 1), repeat=len(linear))))
    used = np.abs(signs)
    systems = hessian * used[:, :, None] * used[:, None, :] + np.eye(len(linear)) * (1 - used)[:, None]
    right = used * linear - signs
    minima = np.linalg.solve(systems, right[..., None])[..., 0]
    values = -(right * minima).sum(axis=1)  # twice those of the objective
    return minima[np.where((minima * signs >= 0).all(axis=1), values, np.inf).argmin()]


def training_rows(prompts, gamed):
    """(x, p, weight) of the fit: prompts as arrays {name: (n,)}, then the gamed rows, if there are any.

    x has tanh(d / std(d)), where d is the length of the baseline's answer minus that of the model's; gamma,
    if it is known; and 1, but 0 in gamed rows, which tell nothing of this model. Unjudged prompts weigh 0.
    """
    difference = prompts["len_baseline"] - prompts["len"]
    spread = difference.std(ddof=1)
    columns = [np.tanh(difference / spread) if spread > 0 else 0 * difference, np.ones(len(difference))]
    if gamed is not None:
        columns.insert(1, prompts["gamma"])
    x, p, weight = np.stack(columns, axis=1), prompts["p"], np.ones(len(difference))
    is_baseline = not difference.any() and (p == 0.5).all()
    if gamed is not None and not is_baseline:  # the baseline has 50 by construction, as in alpaca_eval
        x, p = np.concatenate([x, gamed["x"]]), np.concatenate([p, gamed["p"]])
        weight = np.concatenate([weight, np.full(len(gamed["p"]), GAMED_WEIGHT)])
    return x, np.nan_to_num(p), weight * ~np.isnan(p)


def choose_C(prompts, gamed):
    """C by five folds, the smallest of equals. A row's place in AlpacaEval's files modulo 5 is its fold."""
    x, p, weight = training_rows(prompts, gamed)
    fold = np.concatenate([prompts["place"], np.arange(len(p) - len(prompts["place"]))]) % 5
    losses = []
    for C in CS:
        held_out = []
        for k in np.unique(fold[weight > 0]):
            train, test = fold != k, (fold == k) & (weight > 0)
            theta = fit(x[train], p[train], weight[train], C)
            held_out.append(log_losses(theta, x[test], p[test], weight[test]).mean())
        losses.append(np.mean(held_out))
    return CS[np.argmin(losses)]


def rates(prompts, gamed, C, start=None):
    """(theta, MEASURES (3, g)) of groups; prompts: arrays (n,), "members" (n, g). The first group has all."""
    members, p = prompts["members"], prompts["p"]
    wins, theta = group_means(p, members), None
    lc = np.full(len(wins), math.nan)
    if (~np.isnan(p)).sum() >= 5:  # of fewer verdicts there is nothing to fit
        x, *rest = training_rows(prompts, gamed)
        theta = fit(x, *rest, C, start)
        logits, equal_length = x[: len(p)] @ theta, x[: len(p), 1:] @ theta[1:]
        lc[0] = sigmoid(equal_length).mean()  # as alpaca_eval does, of unjudged prompts too
        lc[1:] = adjusted_rates(wins[1:], logits, equal_length, members[:, 1:] & ~np.isnan(p)[:, None])
    return theta, np.stack([100 * wins, 100 * lc, group_means(prompts["reward"], members)])


def group_means(values, members):
    """(g,) means of values (n,) without nan in groups (n, g); nan for an empty group."""
    members = members & ~np.isnan(values)[:, None]
    return np.nan_to_num(values) @ members / members.sum(0)


def adjusted_rates(wins, logits, equal_length, members):
    """(g,) the length-controlled rates of groups with win rates (g,), in [0, 1].

    The fit knows no groups. Its logits (n,), shifted by a number b (g,), give a group's prompts a mean chance
    that is the group's win rate; their mean chance at equal lengths, with the same shift, is the result.
    """
    row, group = np.nonzero(members)
    size, odds = members.sum(0), np.exp(-logits[row])
    low, high = np.full(len(size), -40.0), np.full(len(size), 40.0)
    for _ in range(32):  # halve the interval that holds b
        b = (low + high) / 2
        chances = 1 / (1 + odds * np.exp(-b)[group])  # sigmoid(logits + b), with fewer calls of exp
        below = np.bincount(group, chances, len(size)) / size < wins
        low, high = np.where(below, b, low), np.where(below, high, b)
    return np.bincount(group, sigmoid(equal_length[row] + b[group]), len(size)) / size


def bootstrap(prompts, gamed, C):
    """(1000, 3, g) rates of prompts drawn with replacement, C as it is; every model has the same draws."""
    n, draws = len(prompts["p"]), []
    theta, _ = rates(prompts, gamed, C)  # the fits of draws start here
    for counts in np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 1000):
        drawn = np.repeat(np.arange(n), counts)
        sample = {name: column[drawn] for name, column in prompts.items()}
        draws.append(rates(sample, gamed, C, theta)[1])
    return np.array(draws)


# ----- winrate
def group_prompts(lengths, categories, edges, bins_of):
    """Names and members (n, g) of groups: all prompts, categories, and four bins of the answer's length."""
    names, members = [("", "all")], [np.ones(len(lengths), bool)]
    for name in sorted(set(categories) - {"None"}):
        names.append(("categories", name))
        members.append(categories == name)
    binned = np.isin(categories, bins_of) if bins_of else members[0]
    for k in range(4):
        if edges[k] < edges[k + 1] or k == 3:  # a bin between equal edges is left out
            names.append(("length_bins", f"{edges[k]:.6g} to {edges[k + 1]:.6g}"))
            members.append(binned & (lengths >= edges[k]) & ((lengths < edges[k + 1]) | (k == 3)))
    return names, np.stack(members, axis=1)


def counts_of(p):
    """Counts and standard error of preferences in [0, 1], by alpaca_eval's names."""
    n, wins, draws = len(p), int((p > 0.5).sum()), int((p == 0.5).sum())
    result = {"n_total": n, "n_wins": wins, "n_wins_base": n - wins - draws, "n_draws": draws}
    return result | {"standard_error": 100 * p.std(ddof=1) / math.sqrt(n) if n > 1 else None}


def with_intervals(values, draws, names, counts):
    """MEASURES with their intervals, and below "categories" and "length_bins" those of each group.

    values (3, g) and draws (1000, 3, g) are of a model, or differences of two; counts: a dict for each group.
    """
    result = {"categories": {}, "length_bins": {}}
    for k, (kind, group) in enumerate(names):
        cell = dict(counts[k])
        sizes = [cell["n_total"], cell.get("n_total_minus", math.inf)]
        for m, (name, interval) in enumerate(MEASURES.items()):
            rates = draws[~np.isnan(draws[:, m, k]), m, k]
            cell[name] = None if np.isnan(values[m, k]) else values[m, k]
            enough = len(rates) and cell[name] is not None and min(sizes) > 1
            cell[interval] = np.percentile(rates, [2.5, 97.5]).tolist() if enough else None
        if kind:
            result[kind][group] = cell
        else:
            result |= cell
    return result


def measure(prompts, names, gamed, C):
    """(result of a model, its rates (3, g), their bootstrap draws (1000, 3, g), counts of the groups)."""
    judged = ~np.isnan(prompts["p"])
    if C is None:
        fits = gamed is not None and judged.sum() >= 5
        C = choose_C(prompts, gamed) if fits else MINIMAL_C
    counts = [counts_of(prompts["p"][judged & inside]) for inside in prompts["members"].T]
    with np.errstate(invalid="ignore"):  # nan: a draw left a group empty
        theta, values = rates(prompts, gamed, C)
        draws = bootstrap(prompts, gamed, C)
    result = with_intervals(values, draws, names, counts)
    result["avg_length"] = int(prompts["len"].mean())
    result["avg_length_baseline"] = int(prompts["len_baseline"].mean())
    rewards = prompts["reward_baseline"][~np.isnan(prompts["reward_baseline"])]
    result["reward_baseline"] = rewards.mean() if len(rewards) else None
    if theta is not None:
        formula = "length_controlled_minimal" if gamed is None else "length_controlled_v1"
        result |= {"formula": formula, "C": C, "theta": theta.tolist()}
    return result, values, draws, counts


def main_winrate(args):
    started = time.time()
    names = [name for name in (args.annotations or args.model, args.minus) if name]
    if args.annotations:
        files = names
        rows_of, models, baselines = zip(*map(read_annotations, files), strict=True)
        if len(set(models)) < len(files) or len(set(baselines)) > 1:
            fail(f"{' and '.join(files)}: expected two models and one baseline, found {models}, {baselines}")
        baseline = baselines[0]
    else:
        files, models, baseline = args.scored, names, args.baseline
        rows_of = [read_responses(files)] * len(models)
    rows, where = rows_of[-1] | rows_of[0], ", ".join(files)
    labelers = {row["labeler"] for rows in rows_of for row in rows.values() if row.get("labeler")}
    answered = sorted({str(response.get("model")) for row in rows.values() for response in row["responses"]})
    unknown = set() if args.annotations else {*models, baseline} - set(answered)
    if unknown:
        fail(f"{where}: no response is of the model {min(unknown)!r}; there are {', '.join(answered)}")
    with_wins = [row.get("wins") is not None for row in rows.values()]
    if any(with_wins) and not all(with_wins):
        fail(f"{where}: some rows have wins and some have none: score all with one scorer")
    sets = []
    for model, rows_of_model in zip(models, rows_of, strict=True):
        sets.append(verdicts(rows_of_model, model, baseline, any(with_wins)))
    keys = [key for key in sorted(rows) if all(key in prompts for prompts in sets)]

    n_prompts, places, gamma, gamed = len(rows), {}, None, None
    if args.lc_data:
        place_of, gamma, gamed = read_reference(args.lc_data)
        n_prompts = len(place_of)
        for key in keys:
            turns = rows[key]["prompt"]
            places[key] = place_of.get(turns[-1]["content"]) if len(turns) == 1 else None
        if None in places.values() or len(set(places.values())) < len(keys):
            fail(f"{where}: an instruction is not in --lc-data, or two ids have the same one")
        keys.sort(key=places.get)
    n_unanswered = n_prompts - len(keys)
    n_without = sum(any(math.isnan(prompts[key]["p"]) for prompts in sets) for key in keys)
    missing = f"of {n_prompts} prompts {n_unanswered} lack an answer of a model and {n_without} a verdict"
    if n_without == len(keys):
        fail(f"{where}: nothing to compare {' and '.join(models)} with {baseline} by: {missing}")
    if n_unanswered + n_without > 0.01 * n_prompts and not args.allow_missing:
        fail(f"{where}: {missing}, over 1 %; --allow-missing measures the rest")
    categories = np.array([str(rows[key].get("category")) for key in keys])
    unknown = set(args.bins_of) - set(categories)
    if unknown:
        fail(f"{where}: no prompt is of the category {min(unknown)!r}")

    tables = []
    for prompts in sets:
        table = {name: np.array([prompts[key][name] for key in keys]) for name in prompts[keys[0]]}
        if args.lc_data:
            table["place"] = np.array([places[key] for key in keys])
            table["gamma"] = gamma[table["place"]]
        tables.append(table)
    edges = np.quantile(np.concatenate([table["len"] for table in tables]), [0, 0.25, 0.5, 0.75, 1])
    measured = []
    for table in tables:
        groups, table["members"] = group_prompts(table["len"], categories, edges, args.bins_of)
        measured.append(measure(table, groups, gamed, args.lc_c))
    result, values, draws, counts = measured[0]
    if args.minus:
        other, other_values, other_draws, other_counts = measured[1]
        sizes = [{"n_total": count["n_total"]} for count in counts]
        for size, count in zip(sizes, other_counts, strict=True):
            size["n_total_minus"] = count["n_total"]
        difference = with_intervals(values - other_values, draws - other_draws, groups, sizes)
        result["minus"] = {"model": models[1], **difference, "result": other}
    by = "annotations" if args.annotations else "wins" if any(with_wins) else "reward"
    official = [baseline == "gpt4_1106_preview" and name.startswith(OFFICIAL_JUDGES) for name in labelers]
    if args.lc_data and "formula" in result and not (official and all(official)):
        result["formula"] = "length_controlled_v1, other judge"
        print("not the judge and baseline of --lc-data: not on the public scale", file=sys.stderr)
    result |= {"kind": "winrate", "model": models[0], "baseline": baseline, "by": by}
    dropped = {"n_without_verdict": n_without, "n_unanswered": n_unanswered}
    result |= {**dropped, "bins_of": args.bins_of, "labelers": sorted(labelers)}
    text = json.dumps(result, default=np.generic.item)
    inputs = files + [str(Path(args.lc_data, name)) for name in LC_FILES] if args.lc_data else files
    counts = {"prompts": n_prompts, "compared": result["n_total"], **dropped}
    write_output(args, inputs, [text], started, counts=counts)
    print(text)


# ----- benchmarks
SIMPLEMIX = "arc_challenge commonsense_qa hellaswag mmlu openbookqa piqa winogrande ifeval".split()
SUITES = {  # {task of lm-eval 0.4.13: examples before a question}; truthfulqa_mc2 has six more in its prompt
    "simplemix": dict.fromkeys(SIMPLEMIX, 0),
    "what-matters": {"mmlu": 5, "truthfulqa_mc2": 0, "ifeval": 0, "gsm8k_cot": 8},
}
METRICS = {"ifeval": "prompt_level_loose_acc,none", "gsm8k_cot": "exact_match,flexible-extract"}


def task_scores(suite, results):
    """{task: score and standard error in percent, n, ...} from lm-eval's results file."""
    scores = {}
    for task in SUITES[suite]:
        metric, numbers = METRICS.get(task, "acc,none"), results["results"][task]
        error = numbers[metric.replace(",", "_stderr,")]  # "N/A" of one question
        parts = [name for name in results["n-samples"] if name == task or name.startswith(f"{task}_")]
        n = sum(results["n-samples"][name]["effective"] for name in parts)
        shots = results["n-shot"][parts[0]] + (6 if task == "truthfulqa_mc2" else 0)
        error = None if error == "N/A" else 100 * error
        scores[task] = {"score": 100 * numbers[metric], "stderr": error, "n": n, "metric": metric}
        scores[task] |= {"shots": shots, "version": results["versions"][parts[0]]}
    return scores


def main_benchmarks(args):
    started = time.time()
    model, chat = Path(args.model), args.suite == "what-matters"
    check_output(args, [])  # before lm-eval has run for hours
    if not (model / "config.json").exists() and (model.exists() or args.model.count("/") != 1):
        fail(f"{model}: expected a Hugging Face model folder or a hub id, found no config.json")
    config = model / "tokenizer_config.json"  # where the template of older models is
    in_config = config.exists() and '"chat_template"' in config.read_text()
    if chat and model.exists() and not (in_config or (model / "chat_template.jinja").exists()):
        fail(f"{model}: what-matters asks in the model's chat template, and the tokenizer has none")
    if args.data and not Path(args.data, f"{args.suite}.yaml").exists():
        fail(f"--data {args.data}: expected {args.suite}.yaml, which data/offline_benchmarks.py writes")
    model_args = {"pretrained": str(model.resolve()) if model.exists() else args.model, "dtype": "auto"}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", args.backend, "--tasks", args.suite]
    command += ["--model_args", json.dumps(model_args)]
    command += ["--batch_size", args.batch_size or ("8" if args.backend == "hf" else "auto")]
    command += ["--apply_chat_template", "--fewshot_as_multiturn", "true"] if chat else []
    command += ["--limit", str(args.limit)] if args.limit else []
    with tempfile.TemporaryDirectory() as folder:
        tasks = []  # lm-eval's own, with the suite's number of examples
        for task, shots in SUITES[args.suite].items():
            tasks.append({"group" if task == "mmlu" else "task": task, "num_fewshot": shots})
        suite = json.dumps({"group": args.suite, "task": tasks})  # JSON is YAML
        Path(folder, f"{args.suite}.yaml").write_text(suite)
        command += ["--include_path", os.path.abspath(args.data or folder)]
        command += ["--output_path", f"{folder}/results"]
        # lm-eval imports another `evaluate` than this file, so it runs in another folder and does not see it
        env = {**os.environ, "PYTHONSAFEPATH": "1"}
        if args.data:  # its rows may have changed since they were cached under the same names
            env["HF_DATASETS_CACHE"] = f"{folder}/cache"
        probe = "import lm_eval.tasks.ifeval.utils, nltk; nltk.data.find('tokenizers/punkt_tab')"
        probed = subprocess.run([sys.executable, "-c", probe], cwd=folder, env=env, capture_output=True)
        if probed.returncode:
            lines = probed.stderr.decode().splitlines()
            reasons = [line.strip() for line in lines if "Error" in line or "not found" in line]
            advice = 'pip install "lm-eval[ifeval]==0.4.13"; without internet NLTK_DATA=DIR with punkt_tab'
            fail(f"lm-eval does not start ({', '.join(reasons[-1:])}): {advice}")
        done = subprocess.run(command, cwd=folder, env=env, stdout=sys.stderr)
        files = list(Path(folder).glob("results/**/results_*.json"))
        if done.returncode or not files:
            fail(f"lm-eval ended with status {done.returncode}; what it says is above")
        results = json.loads(files[0].read_text())
        scores = task_scores(args.suite, results)
    average = None if chat else sum(task["score"] for task in scores.values()) / len(scores)
    result = {"kind": "benchmarks", "suite": args.suite, "model": args.model, "average": average}
    result |= {"tasks": scores, "chat_template": chat, "backend": args.backend, "limit": args.limit}
    if chat:
        result["note"] = "UltraFeedback has prompts of TruthfulQA, so trained models may know its answers"
    text = json.dumps(result)
    facts = {name: results.get(name) for name in ("lm_eval_version", "transformers_version")}
    facts["model_sha"] = results["config"].get("model_sha")  # the commit of a model on the hub
    data = sorted(str(path) for path in Path(args.data).iterdir()) if args.data else []
    data = [path for path in data if path.endswith((".yaml", ".jsonl"))]
    write_output(args, data, [text], started, command=command, counts={"tasks": len(scores)}, **facts)
    print(text)


def main(args):
    if args.command == "winrate":
        main_winrate(args)
    else:
        main_benchmarks(args)


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
