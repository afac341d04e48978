"""
Runs of two settings -> the difference of their rates, over prompts and seeds.

Reads   RUN.judged/*.jsonl   of each run of --first and --second, as recipes/settings.sh leaves them: scored
                             responses (score.py) of the model RUN and of --baseline
Writes  --out FILE           JSON: {"groups": {group: {measure: Difference (below)}}, "runs", "judge"}

The measures are those of evaluate.py winrate: the win rate over the baseline, its length-controlled form, and
the mean reward, which is the share of right answers where the reward is that of score.py --scorer verify
(--ending verified reads RUN.verified/*.jsonl). A setting's runs differ in their seeds and are averaged.
Without --second the setting is compared with the baseline, which wins 50 against itself.

The 95 % interval is 1.96 standard errors either way. Its variance is the sum of two: over prompts, 1,000
bootstrap draws of the difference of the averages, all runs on the same draws; and over seeds, for each
setting the variance of its runs' rates divided by their number. What a seed does to a single prompt is in
both, so the interval is rather too wide. A single run knows nothing of other seeds: its interval is for the
model that it trained, and "seeds" is null.

    python report/compare.py --first out/s1/on_seed* --second out/s1/off_seed* --baseline out/models/policy \\
        --group verifiable=arithmetic,counting --out on_off.json

Prints a line per group and measure.
"""

import argparse
import glob
import json
import os
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
    own = {}
    for key, prompt in prompts.items():
        own[key] = prompt | {"p": 0.5, "len": prompt["len_baseline"], "reward": prompt["reward_baseline"]}
    return own


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


def compare(first, second):
    """(means of first (3, g), of second (3, g), standard errors over prompts and over seeds (3, g))."""
    n = len(first[0]["p"])
    settings = [mean_rates(runs, np.arange(n)) for runs in (first, second)]
    differences = []
    for drawn in np.random.default_rng(0).integers(n, size=(DRAWS, n)):
        differences.append(mean_rates(first, drawn).mean(0) - mean_rates(second, drawn).mean(0))
    over_prompts = np.nanstd(differences, axis=0, ddof=1)
    variance = np.zeros_like(over_prompts)
    for values in settings:
        if len(values) > 1:
            variance += values.var(axis=0, ddof=1) / len(values)
    return settings[0].mean(0), settings[1].mean(0), over_prompts, np.sqrt(variance)


def main(args):
    runs = args.first + args.second
    prompts_of, categories, judges = read_runs(runs, args.baseline, args.ending)
    keys = sorted(prompts_of[0])
    groups = {"all": set(categories.values())}
    for group in args.group:
        name, _, names = group.partition("=")
        groups[name] = set(names.split(","))
    members = np.array([[categories[key] in group for group in groups.values()] for key in keys])
    for name, size in zip(groups, members.sum(0), strict=True):
        if not size:
            fail(f"--group {name}: no prompt is of {', '.join(sorted(groups[name]))}")

    first = [as_arrays(prompts, members) for prompts in prompts_of[: len(args.first)]]
    second = [as_arrays(prompts, members) for prompts in prompts_of[len(args.first) :]]
    if not second:
        second = [as_arrays(baseline_of(prompts_of[0]), members)]
    with np.errstate(invalid="ignore"):  # nan: a draw left a group empty
        means, other_means, over_prompts, over_seeds = compare(first, second)

    several = len(args.first) > 1 and len(args.second) != 1
    results = {}
    for g, (name, size) in enumerate(zip(groups, members.sum(0), strict=True)):
        results[name] = {"n_total": int(size)}
        for m, measure in enumerate(MEASURES):
            difference = means[m, g] - other_means[m, g]
            error = float(np.hypot(over_prompts[m, g], over_seeds[m, g]))
            results[name][measure] = {
                "first": means[m, g],
                "second": other_means[m, g],
                "difference": difference,
                "ci": [difference - 1.96 * error, difference + 1.96 * error],
                "error_over_prompts": over_prompts[m, g],
                "error_over_seeds": over_seeds[m, g] if several else None,
            }
            low, high = results[name][measure]["ci"]
            print(f"{name} (n = {size}), {measure}: {difference:+.2f} ({low:.2f} to {high:.2f})")
    result = {"groups": results, "runs": {"first": args.first, "second": args.second or [args.baseline]}}
    result |= {"baseline": args.baseline, "judge": sorted(judges)}
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    Path(args.out).write_text(json.dumps(result, default=np.generic.item, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
