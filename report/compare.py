"""
Runs of two settings -> the difference of their rates, over prompts and seeds.

Reads   RUN.judged/*.jsonl   of each run of --first and --second, as recipes leave them at SCALE=demo: scored
                             responses (score.py) of the model RUN and of --baseline
Writes  --out FILE           JSON: {"groups": {group: {measure: Difference (below)}}, "runs", "judge"}

The measures are those of evaluate.py winrate: the win rate over the baseline, its length-controlled form, and
the mean reward, which is the share of right answers where the reward is that of score.py --scorer verify
(--ending verified reads RUN.verified/*.jsonl). The runs of --first are averaged, and those of --second; runs
whose names differ only in seed0, seed1, ... are of one setting, and the same number of each is expected.
Without --second the baseline is subtracted, which wins 50 against itself.

The variance of a difference is the sum of two: over prompts, that of 1,000 bootstrap draws, all runs on the
same draws; and over seeds, that of the settings' means, each estimated from its own runs. The 95 % interval
uses Student's t with the degrees of freedom of this sum (Welch and Satterthwaite). How differently seeds
answer the same prompt counts in both, which makes the interval too wide rather than too narrow. What seeds
have in common, such as samples or pairs that were made once, is in neither. One run of a setting says nothing
about other seeds: the interval is then for these models alone, "error_over_seeds" null.

Runs of the same seed may share prompts, the order of pairs or the model they start from. "ci_paired" is the
interval that takes the differences of such runs, --first and --second in the same order of seeds, where "ci"
takes all runs as independent.

    python report/compare.py --first out/s1/on_seed* --second out/s1/off_seed* --baseline out/models/policy \\
        --group verifiable=arithmetic,counting --out on_off.json

Prints a line per group and measure.
"""

import argparse
import glob
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import MEASURES, MINIMAL_C, fail, rates, read_responses, verdicts  # noqa: E402

DRAWS = 1000


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--first", nargs="+", required=True, metavar="RUN", help="folders of the models of a setting")
    flag("--second", nargs="+", default=[], metavar="RUN", help="those that are subtracted")
    flag("--baseline", required=True, metavar="NAME", help="the model that all are judged against")
    flag("--ending", default="judged", help="RUN.ENDING/*.jsonl are read (default judged)")
    flag("--group", action="append", default=[], metavar="NAME=CATEGORY,...", help="some categories alone")
    flag("--out", required=True, metavar="FILE")
    args = parser.parse_args(argv)
    for group in args.group:
        if "=" not in group:
            parser.error(f"--group: expected NAME=CATEGORY,CATEGORY, found {group}")
    return args


def read_runs(runs, baseline, ending):
    """([{id: prompt} of each run], {id: category}, judges); prompts as evaluate.py's verdicts has them."""
    prompts_of, categories, judges = [], {}, set()
    for run in runs:
        paths = sorted(glob.glob(f"{glob.escape(run)}.{ending}/*.jsonl"))
        if not paths:
            fail(f"{run}.{ending}: no rows; give the folders of models that a recipe has judged")
        rows = read_responses(paths)
        prompts = verdicts(rows, run, baseline, by_wins=False)
        if not prompts:
            fail(f"{run}.{ending}: no prompt has answers of {run} and {baseline}")
        if prompts_of and prompts.keys() != prompts_of[0].keys():
            fail(f"{run}.{ending}: expected the same prompts as {runs[0]} has")
        prompts_of.append(prompts)
        for key, row in rows.items():
            categories[key] = str(row.get("category"))
            judges.add(str(row.get("labeler")))
    if len(judges) > 1:
        fail(f"expected one judge, found {' and '.join(sorted(judges))}")
    return prompts_of, categories, judges


def baseline_of(prompts):
    """The prompts as the baseline itself answers them: it ties, by definition."""
    ties = {}
    for key, prompt in prompts.items():
        ties[key] = prompt | {"p": 0.5, "len": prompt["len_baseline"], "reward": prompt["reward_baseline"]}
    return ties


def as_arrays(prompts, members):
    """{name: (n,)} and "members" (n, g), prompts in the order of their ids."""
    keys = sorted(prompts)
    arrays = {name: np.array([prompts[key][name] for key in keys]) for name in prompts[keys[0]]}
    if np.isnan(arrays["p"]).any():
        fail(f"{int(np.isnan(arrays['p']).sum())} prompts have no verdict")
    return arrays | {"members": members}


def mean_rates(runs, drawn):
    """(runs, 3, g) rates of the drawn prompts (n,), places with repeats."""
    values = []
    for run in runs:
        sample = {name: column[drawn] for name, column in run.items()}
        values.append(rates(sample, None, MINIMAL_C)[1])
    return np.array(values)


def over_prompts(first, second):
    """(3, g) variances over bootstrap draws of the prompts of the difference of two averages of runs."""
    n, differences = len(first[0]["p"]), []
    for drawn in np.random.default_rng(0).integers(n, size=(DRAWS, n)):
        differences.append(mean_rates(first, drawn).mean(0) - mean_rates(second, drawn).mean(0))
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
        fail(f"expected as many runs of each setting, found {' and '.join(map(str, sorted(counts)))}")
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


def seed_of(run):
    """seed0 of a run's name, None without one."""
    seeds = re.findall(r"seed\d+", run)
    return seeds[-1] if seeds else None


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


def difference_of(first, second, names, other_names):
    """The difference of two averages of runs, {name: (3, g)}; other_names are empty for the baseline.

    "first", "second", "difference", its interval "low" to "high", "error_over_prompts"; "error_over_seeds" if
    each setting has several runs; "low_paired", "high_paired" if the runs of both have the same seeds.
    """
    all_prompts = np.arange(len(first[0]["p"]))
    with np.errstate(invalid="ignore"):  # nan: a draw left a group empty
        values, other_values = mean_rates(first, all_prompts), mean_rates(second, all_prompts)
        variance = over_prompts(first, second)
    freedom = np.maximum(first[0]["members"].sum(0) - 1, 1)  # of the variance over prompts

    parts = over_seeds(names, values)
    if other_names:
        other_parts = over_seeds(other_names, other_values)
        if parts and other_parts:
            parts = parts + other_parts
        else:
            parts = []
    difference = values.mean(0) - other_values.mean(0)
    half, seed_error = half_width(variance, freedom, parts)
    result = {"first": values.mean(0), "second": other_values.mean(0), "difference": difference}
    result |= {"low": difference - half, "high": difference + half, "error_over_prompts": np.sqrt(variance)}
    if not parts:
        return result
    result["error_over_seeds"] = seed_error

    seeds = [seed_of(name) for name in names]
    other_seeds = [seed_of(name) for name in other_names]
    if seeds == other_seeds:
        pairs = [f"{name} {other}" for name, other in zip(names, other_names, strict=True)]
        paired_parts = over_seeds(pairs, values - other_values)
        if paired_parts:
            half, _ = half_width(variance, freedom, paired_parts)
            result |= {"low_paired": difference - half, "high_paired": difference + half}
    return result


def main(args):
    prompts_of, categories, judges = read_runs(args.first + args.second, args.baseline, args.ending)
    keys = sorted(prompts_of[0])
    groups = {"all": set(categories.values())}
    for group in args.group:
        name, _, names = group.partition("=")
        groups[name] = set(names.split(","))
    members = np.array([[categories[key] in group for group in groups.values()] for key in keys])
    sizes = members.sum(0)
    for name, size in zip(groups, sizes, strict=True):
        if not size:
            fail(f"--group {name}: no prompt is of {', '.join(sorted(groups[name]))}")

    first = [as_arrays(prompts, members) for prompts in prompts_of[: len(args.first)]]
    second = [as_arrays(prompts, members) for prompts in prompts_of[len(args.first) :]]
    if not second:
        second = [as_arrays(baseline_of(prompts_of[0]), members)]
    difference = difference_of(first, second, args.first, args.second)

    results = {}
    for g, name in enumerate(groups):
        results[name] = {"n_total": int(sizes[g])}
        for m, measure in enumerate(MEASURES):
            value = {key: array[m, g] for key, array in difference.items()}
            low, high = value["low"], value["high"]
            results[name][measure] = {
                "first": value["first"],
                "second": value["second"],
                "difference": value["difference"],
                "ci": [low, high],
                "error_over_prompts": value["error_over_prompts"],
                "error_over_seeds": value.get("error_over_seeds"),
            }
            if "low_paired" in value:
                results[name][measure]["ci_paired"] = [value["low_paired"], value["high_paired"]]
            print(f"{name} (n = {sizes[g]}), {measure}: {value['difference']:+.2f} ({low:.2f} to {high:.2f})")
    result = {"groups": results, "runs": {"first": args.first, "second": args.second or [args.baseline]}}
    result |= {"baseline": args.baseline, "judge": sorted(judges)}
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    Path(args.out).write_text(json.dumps(result, default=np.generic.item, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
