"""
Answers of two settings -> the difference of their rates.

Reads   RUN.judged/*.jsonl   of each run of --first and --second, as recipes leave them: scored responses of
                             the model RUN and of --baseline
   or   FILE                 as --first and as --second: AlpacaEval's annotations of a model
Writes  --out FILE           JSON: {"groups": {group: {measure: {"difference", "ci", ...}}}, "runs", ...};
                             --categories and --length-bins add "categories" and "length_bins" of this form

The measures are those of evaluate.py: the win rate over the baseline, its length-controlled form, and the
reward, whose mean is the share of right answers if it is that of scorers/verify.py (--ending verified). The
runs of --first are averaged, and those of --second; runs whose names differ only in seed0, seed1, ... are of
one setting. Without --second the baseline is subtracted, which wins 50 against itself.

    python report/compare.py --first out/s1/on_seed* --second out/s1/off_seed* --baseline out/models/policy \\
        --group verifiable=arithmetic,counting --out on_off.json
    python report/compare.py --first a.json --second b.json --lc-data alpaca_eval --out a_b.json

Prints a line per group and measure, and last one JSON object.
"""

import argparse
import glob
import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
from common import fail, read_responses, replace_file  # noqa: E402

DRAWS = 1000


Run = NamedTuple("Run", [("name", str), ("prompts", dict), ("C", float)])  # prompts: columns of evaluate.py


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--first", nargs="+", required=True, metavar="RUN", help="models of a setting, or one FILE")
    flag("--second", nargs="+", default=[], metavar="RUN", help="those that are subtracted")
    flag("--baseline", metavar="NAME", help="the model that all are judged against; a FILE names it")
    flag("--ending", default="judged", help="RUN.ENDING/*.jsonl are read (default judged)")
    flag("--lc-data", metavar="DIR", help="folder of AlpacaEval's difficulties, as for evaluate.py")
    flag("--group", action="append", default=[], metavar="NAME=CATEGORY,...", help="these categories only")
    flag("--categories", action="store_true", help="a group for every category, too")
    flag("--length-bins", nargs="*", metavar="CATEGORY", help="quarters of all lengths (in these categories)")
    flag(
        "--allow-missing",
        action="store_true",
        help="leave out prompts that a run has no answer or verdict on",
    )
    flag("--out", required=True, metavar="FILE")
    args = parser.parse_args(argv)
    files = [run.endswith(".json") for run in args.first + args.second]
    if any(files) != (not args.baseline) or any(files) and max(len(args.first), len(args.second)) > 1:
        parser.error(
            "give runs and their --baseline, or one file of annotations for --first and --second each"
        )
    for group in args.group:
        if "=" not in group or group.startswith("all="):
            parser.error(f"--group: expected NAME=CATEGORY,CATEGORY, NAME not being all, found {group}")
    return args


def read_runs(args):
    """Return (runs of --first and --second without members, gamed rows, facts about them)."""
    tables, baselines, gamed, everything = [], {args.baseline} - {None}, None, set()
    for run in args.first + args.second:
        if run.endswith(".json"):
            prompts, model, baseline = evaluate.read_annotations(run)
            baselines.add(baseline)
        else:
            model = run
            paths = sorted(glob.glob(f"{glob.escape(run)}.{args.ending}/*.jsonl"))
            if not paths:
                fail(f"{run}.{args.ending}: no rows; give the folders of models that a recipe has judged")
            rows = read_responses(paths, evaluate.Row)
            prompts, _ = evaluate.verdicts(rows, run, args.baseline, f"{run}.{args.ending}")
        if args.lc_data:
            prompts, gamed, n_prompts = evaluate.with_difficulty(prompts, args.lc_data, run)
            everything |= set(range(n_prompts))
        everything |= prompts.keys()
        tables.append((model, prompts))
    judges = {str(prompt["labeler"]) for _, prompts in tables for prompt in prompts.values()}
    for name, found in (("judge", judges), ("baseline", baselines)):
        if len(found) > 1:
            fail(f"expected one {name}, found {' and '.join(sorted(found))}")
    facts = {"baseline": baselines.pop(), "judge": sorted(judges)}
    keys = set.intersection(*(set(prompts) for _, prompts in tables))
    n_without = sum(any(math.isnan(prompts[key]["p"]) for _, prompts in tables) for key in keys)
    n_unanswered = len(everything) - len(keys)
    if n_without == len(keys) or (n_without or n_unanswered) and not args.allow_missing:
        missing = f"{n_unanswered} are not in all runs and {n_without} have no verdict"
        fail(f"of {len(everything)} prompts, {missing}; --allow-missing compares the remaining prompts")
    if args.allow_missing:
        facts |= {"n_without_verdict": n_without, "n_unanswered": n_unanswered}
    runs = []
    for model, prompts in tables:
        columns = evaluate.as_columns({key: prompts[key] for key in keys})
        runs.append(Run(model, columns, evaluate.choose_C(columns, gamed)))
    return runs, gamed, facts


def baseline_run(prompts, gamed):
    """The baseline as a run without a name: it ties with itself, by definition."""
    ties = {"p": np.full(len(prompts["p"]), 0.5)}
    prompts = prompts | ties | {"len": prompts["len_baseline"], "reward": prompts["reward_baseline"]}
    return Run("", prompts, evaluate.choose_C(prompts, gamed))


def with_members(runs, args):
    """Return (runs with the "members" (n, g) of groups, [(kind, name)] of these); bins are of all."""
    categories = runs[0].prompts["category"]
    edges = np.quantile(np.concatenate([run.prompts["len"] for run in runs]), [0, 0.25, 0.5, 0.75, 1])
    kinds = {"": True, "categories": args.categories, "length_bins": args.length_bins is not None}
    result = []
    for run in runs:
        groups = evaluate.group_prompts(run.prompts["len"], categories, edges, args.length_bins)
        groups = {(kind, name): members for (kind, name), members in groups.items() if kinds[kind]}
        for group in args.group:
            name, _, names = group.partition("=")
            groups["", name] = np.isin(categories, names.split(","))
            if not groups["", name].any():
                fail(f"--group {name}: no prompt has one of the categories {names}")
        prompts = {name: column for name, column in run.prompts.items() if name != "category"}
        prompts["members"] = np.stack(list(groups.values()), axis=1)
        result.append(run._replace(prompts=prompts))
    return result, list(groups)


# ----- the difference of runs
# Its variance is that over prompts, from draws that all runs share, plus that over seeds of settings' means;
# how seeds differ on a prompt counts in both, so the interval is rather too wide. Of one run of a setting
# nothing is known about other seeds: the interval is then for these models only.
def rates_of(runs, gamed, drawn):
    """(runs, 3, g) rates of the drawn prompts (n,), indices with repeats."""
    values = []
    for run in runs:
        sample = {name: column[drawn] for name, column in run.prompts.items()}
        values.append(evaluate.rates(sample, gamed, run.C)[1])
    return np.array(values)


def over_prompts(first, second, gamed):
    """(3, g) variances over bootstrap draws of the prompts of the difference of two averages of runs."""
    n, differences = len(first[0].prompts["p"]), []
    for drawn in np.random.default_rng(0).integers(n, size=(DRAWS, n)):
        differences.append(rates_of(first, gamed, drawn).mean(0) - rates_of(second, gamed, drawn).mean(0))
    return np.nanvar(differences, axis=0, ddof=1)


def over_seeds(names, values):
    """[(variance (3, g) of the average of all runs that a setting's seeds cause, degrees of freedom)].

    names of the runs, values (runs, 3, g). Empty if each setting has a single run.
    """
    settings = {}
    for name, value in zip(names, values, strict=True):
        settings.setdefault(re.sub(r"seed\d+", "seed", name), []).append(value)
    counts = {len(runs) for runs in settings.values()}
    if len(counts) > 1:
        fail(f"expected equal numbers of runs, found {' and '.join(map(str, sorted(counts)))}")
    if counts == {1}:
        return []
    parts = []
    for runs in settings.values():
        variance = np.var(runs, axis=0, ddof=1) / len(runs) / len(settings) ** 2
        parts.append((variance, len(runs) - 1))
    return parts


def t_quantile(df):
    """The 0.975 quantile of Student's t with df >= 1 degrees of freedom."""
    # t = sqrt(df) tan(angle), and the density of the angle is cos(angle)^(df - 1)
    angles = np.linspace(0, np.pi / 2, 100_001)
    below = np.cumsum(np.cos(angles) ** (df - 1))
    return math.sqrt(df) * math.tan(np.interp(0.95 * below[-1], below, angles))


def half_width(variance, freedom, parts):
    """Half the 95 % interval of a difference and its error over seeds, both (3, g).

    variance (3, g) over prompts with `freedom` (g,) degrees of freedom, and over_seeds' parts, add up; the
    degrees of freedom of the sum are Welch's and Satterthwaite's.
    """
    seeds, squares = np.zeros_like(variance), np.zeros_like(variance)
    for part, df in parts:
        seeds = seeds + part
        squares = squares + part**2 / df
    total = variance + seeds
    squares = variance**2 / freedom + squares
    half = np.zeros_like(total)
    for m, g in np.argwhere(total > 0):
        df = total[m, g] ** 2 / squares[m, g]
        half[m, g] = t_quantile(df) * math.sqrt(total[m, g])
    return half, np.sqrt(seeds)


def difference_of(first, second, gamed, freedom):
    """The difference of two averages of runs, {name: (3, g)}; freedom (g,): of the variance over prompts.

    Runs of the same seed may share prompts, the order of pairs or the model they start from: if both settings
    have the same seeds, "low_paired" and "high_paired" are of their differences. Else runs are independent.
    """
    all_prompts = np.arange(len(first[0].prompts["p"]))
    values, other_values = rates_of(first, gamed, all_prompts), rates_of(second, gamed, all_prompts)
    variance = over_prompts(first, second, gamed)
    names = [run.name for run in first]
    other_names = [run.name for run in second]
    parts = over_seeds(names, values)
    if second[0].name:  # not the baseline
        other_parts = over_seeds(other_names, other_values)
        parts = parts + other_parts if parts and other_parts else []
    difference = values.mean(0) - other_values.mean(0)
    half, seed_error = half_width(variance, freedom, parts)
    result = {"first": values.mean(0), "second": other_values.mean(0), "difference": difference}
    result |= {"low": difference - half, "high": difference + half, "error_over_prompts": np.sqrt(variance)}
    if parts:
        result["error_over_seeds"] = seed_error
    seeds = [re.findall(r"seed\d+", name)[-1:] for name in names]
    if parts and seeds == [re.findall(r"seed\d+", name)[-1:] for name in other_names]:
        pairs = [f"{name} {other}" for name, other in zip(names, other_names, strict=True)]
        paired_parts = over_seeds(pairs, values - other_values)
        if paired_parts:
            half, _ = half_width(variance, freedom, paired_parts)
            result |= {"low_paired": difference - half, "high_paired": difference + half}
    return result


def difference_of_annotations(first, second, gamed):
    """The same of two models' annotations; the interval is that of evaluate.py's draws, their percentiles."""
    theta, values = evaluate.rates(first.prompts, gamed, first.C)
    other_theta, other_values = evaluate.rates(second.prompts, gamed, second.C)
    draws = evaluate.bootstrap(first.prompts, gamed, first.C, theta)
    draws = draws - evaluate.bootstrap(second.prompts, gamed, second.C, other_theta)
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    result = {"first": values, "second": other_values, "difference": values - other_values}
    return result | {"low": low, "high": high, "error_over_prompts": np.nanstd(draws, axis=0, ddof=1)}


def cell_of(difference, m, g, has_interval):
    """A measure of a group as JSON: numbers or null."""
    value = {name: None if np.isnan(array[m, g]) else array[m, g] for name, array in difference.items()}
    cell = {
        "first": value["first"],
        "second": value["second"],
        "difference": value["difference"],
        "ci": [value["low"], value["high"]] if has_interval and value["low"] is not None else None,
        "error_over_prompts": value["error_over_prompts"],
        "error_over_seeds": value.get("error_over_seeds"),
    }
    if has_interval and value.get("low_paired") is not None:
        cell["ci_paired"] = [value["low_paired"], value["high_paired"]]
    return cell


def main(args):
    runs, gamed, facts = read_runs(args)
    if not args.second:
        runs.append(baseline_run(runs[0].prompts, gamed))
    runs, groups = with_members(runs, args)
    first, second = runs[: len(args.first)], runs[len(args.first) :]
    judged = [run.prompts["members"].T & np.isfinite(run.prompts["p"]) for run in (first[0], second[0])]
    sizes, other_sizes = (members.sum(1) for members in judged)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # nan: a draw left a group empty
        if args.first[0].endswith(".json"):
            difference = difference_of_annotations(first[0], second[0], gamed)
        else:
            difference = difference_of(first, second, gamed, np.maximum(sizes - 1, 1))
    results = {"": {}, "categories": {}, "length_bins": {}}
    for g, (kind, name) in enumerate(groups):
        result = {"n_total": int(sizes[g])}
        if other_sizes[g] != sizes[g]:
            result["n_total_second"] = int(other_sizes[g])
        for m, measure in enumerate(evaluate.MEASURES):
            result[measure] = cell = cell_of(difference, m, g, min(sizes[g], other_sizes[g]) > 1)
            if cell["difference"] is not None:
                low, high = cell["ci"] or (math.nan, math.nan)
                numbers = f"{cell['difference']:+.2f} ({low:.2f} to {high:.2f})"
                print(f"{name} (n = {sizes[g]}), {measure}: {numbers}")
        results[kind][name] = result
    result = {"groups": results.pop("")} | {kind: groups for kind, groups in results.items() if groups}
    result["runs"] = {"first": [run.name for run in first]}
    result["runs"]["second"] = [run.name or facts["baseline"] for run in second]
    replace_file(args.out, [json.dumps(result | facts, default=np.generic.item, indent=1)])
    print(json.dumps({"out": args.out, "prompts": int(sizes[0]), "runs": len(runs), "groups": len(groups)}))


if __name__ == "__main__":
    main(parse_args())
