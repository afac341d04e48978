"""
What table.py and figure.py share: results by setting and run, and means over runs.

NAME is a setting, and NAME_seed0, NAME_seed1, ... are its runs; without _seedK there is one. A result is

    winrate           NAME.winrate.json                      evaluate.py
    boundary          NAME.boundary.json                     boundary.py
    benchmarks_SUITE  NAME.benchmarks.json                   recipes/benchmarks.py
    pairs             NAME.pairs.meta.json                   build_pairs.py
    metrics           NAME.metrics.jsonl, NAME/metrics.jsonl train_dpo.py
    meta              any other *.meta.json                  what a stage counted, and its seconds
"""

import math
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Required, TypedDict

import msgspec
import numpy as np

from common import fail, read_jsonl

Interval = tuple[float, float] | None
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
SUITES = ("benchmarks_simplemix", "benchmarks_what-matters")
KINDS = ("winrate", *SUITES, "boundary", "pairs", "metrics", "meta")


class Group(TypedDict, total=False):
    n_total: Required[Count]
    win_rate: float | None
    ci: Interval
    length_controlled_winrate: float | None
    lc_ci: Interval
    standard_error: float | None
    reward: float | None
    reward_ci: Interval


class Winrate(Group, total=False):
    kind: Required[Literal["winrate"]]
    baseline: Required[str]
    avg_length: float
    avg_length_baseline: float
    reward_baseline: float | None
    labelers: list[str]
    by: str
    formula: str
    categories: dict[str, Group]
    length_bins: dict[str, Group]


class Benchmarks(TypedDict):
    kind: Literal["benchmarks"]
    suite: Literal["simplemix", "what-matters"]
    average: float | None
    tasks: dict[str, TypedDict("Task", {"score": float, "stderr": float | None, "n": Count})]


class Boundary(TypedDict, total=False):
    kind: Required[Literal["boundary"]]
    v_on: Required[float]
    v_off: Required[float]
    ties: Required[Count]
    score: Required[float]
    ci: Required[tuple[float, float]]
    n_prompts: Required[Count]
    stage: Required[str]
    use: Required[str]
    length_matched: TypedDict("Score", {"score": float, "ci": tuple[float, float]}) | None
    distinct: TypedDict("Distinct", {"sum": float}) | None


class Counts(TypedDict, total=False):
    pairs: Count
    on: Count
    off: Count
    cross: Count
    tokens_sampled: Count
    tokens_scored: Count
    tokens_trained: Count


NUMBERS = dict.fromkeys(("mean", "std", "min", "25%", "median", "75%", "max"), float)
Statistics = TypedDict("Statistics", {"n": Count, **NUMBERS}, total=False)


class Meta(TypedDict, total=False):
    args: Required[TypedDict("Arguments", {"filter": tuple[str, float] | None}, total=False)]
    counts: Required[Counts]
    stats: dict[str, Statistics]  # of pairs
    seconds: float


class Step(TypedDict, total=False):
    step: Required[Count]
    tokens: Required[Count]
    loss: float | None
    margin: float | None
    margin_std: float | None
    diversity: float | None
    diversity_std: float | None


def setting_and_run(path):
    """("on50", "on50_seed1") of out/on50_seed1.winrate.json and of out/on50_seed1/metrics.jsonl."""
    path = Path(path)
    if path.name in ("metrics.jsonl", "metrics.meta.json"):
        name = path.resolve().parent.name
    else:
        name = re.sub(r"(\.[a-z]+)?(\.meta)?\.jsonl?$", "", path.name)
    run = re.fullmatch(r"(.+)_seed(\d+)", name)
    return (run[1], f"{run[1]}_seed{int(run[2])}") if run else (name, name)


def read_result(path):
    """Return (kind, content) of a file."""
    if path.endswith("metrics.jsonl"):
        return "metrics", [step for _, step in read_jsonl(path, Step)]
    try:
        result = msgspec.json.decode(Path(path).read_bytes())
        if path.endswith(".meta.json"):
            meta = msgspec.convert(result, Meta)
            return ("pairs" if "stats" in meta else "meta"), meta
        kind = result.get("kind") if isinstance(result, dict) else None
        if kind == "benchmarks":
            return f"benchmarks_{result.get('suite')}", msgspec.convert(result, Benchmarks)
        if kind == "boundary":
            return kind, msgspec.convert(result, Boundary)
        return "winrate", msgspec.convert(result, Winrate)
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        fail(f"{path}: expected a result, a meta file or metrics.jsonl: {error}")


def read_results(paths):
    """Return {setting: {kind: {run: content}}} with all KINDS, settings in the order of the files."""
    settings = {}
    for path in dict.fromkeys(paths):
        kind, content = read_result(path)
        name, run = setting_and_run(path)
        results = settings.setdefault(name, {kind: {} for kind in KINDS})
        key = path if kind == "meta" else run  # each stage of a run has its own
        if key in results[kind]:
            fail(f"{path}: {run} already has a {kind} result; name the runs of a setting NAME_seed0, ...")
        results[kind][key] = content
    return settings


# ----- numbers over runs
class Average(NamedTuple):
    """A number over runs. The interval is over prompts, the standard deviation over runs."""

    mean: float | None
    ci: list[float] | None
    sd: float | None


def over_runs(runs, key, interval="ci"):
    """The average of a number over the runs that have it. An interval's ends are averaged too."""
    runs = [run for run in runs if run.get(key) is not None]
    values = [run[key] for run in runs]
    ends = [run[interval] for run in runs if run.get(interval)]
    mean = float(np.mean(values)) if values else None
    ci = np.mean(ends, axis=0).tolist() if ends else None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Average(mean, ci, sd)


def add_baselines(settings):
    """The settings after the baselines of their win rates, which have 50 against themselves by definition."""
    baselines = {}
    for results in settings.values():
        for run in results["winrate"].values():
            name = Path(run["baseline"]).name
            if name in settings and settings[name]["winrate"]:
                continue
            rates = {"win_rate": 50.0, "n_total": run["n_total"]}
            rates |= {"avg_length": run.get("avg_length_baseline"), "reward": run.get("reward_baseline")}
            if run.get("length_controlled_winrate") is not None:
                rates["length_controlled_winrate"] = 50.0
            results_of_other_kinds = settings.get(name, {kind: {} for kind in KINDS})
            baselines[name] = results_of_other_kinds | {"winrate": {name: rates}}
    return baselines | {name: results for name, results in settings.items() if name not in baselines}


def gain(settings, name, start):
    """Points of LC, or of win rate if one has no LC, that a setting gained over another; None if unknown."""
    if name not in settings or start not in settings:
        return None
    for key in ("length_controlled_winrate", "win_rate"):
        after = over_runs(settings[name]["winrate"].values(), key).mean
        before = over_runs(settings[start]["winrate"].values(), key).mean
        if after is not None and before is not None:
            return after - before
    return None


# ----- numbers to draw
def winrates(settings):
    """{setting: [its results of evaluate.py]}; settings without one are left out."""
    runs = {name: list(results["winrate"].values()) for name, results in settings.items()}
    runs = {name: results for name, results in runs.items() if results}
    if not runs:
        fail("expected results of evaluate.py (NAME.winrate.json), found none")
    return runs


def rate_key(settings):
    """("length_controlled_winrate", "lc_ci", name) if all results have it, else those of the win rate."""
    runs = [run for runs in winrates(settings).values() for run in runs]
    if all(run.get("length_controlled_winrate") is not None for run in runs):
        return "length_controlled_winrate", "lc_ci", "LC win rate"
    return "win_rate", "ci", "win rate"


def interval_of(runs, key, interval):
    """(mean, low, high) of a number over runs; None without an interval."""
    mean, ci, _ = over_runs(runs, key, interval)
    return (mean, *ci) if ci else None


def sweep(settings, position):
    """{curve: [(x, rate, low, high)]}, where position(setting, record of its pairs) is (curve, x) or None.

    Low and high are a standard deviation below and above where a setting has several runs.
    """
    key, interval, _ = rate_key(settings)
    series = {}
    for name, results in settings.items():
        metas = list(results["pairs"].values())
        curve_and_x = position(name, metas[0]) if metas else None
        mean, ci, sd = over_runs(results["winrate"].values(), key, interval)
        if curve_and_x is None or mean is None:
            continue
        curve, x = curve_and_x
        low, high = ci or (mean, mean)
        if sd is not None:
            low, high = mean - sd, mean + sd
        series.setdefault(curve, []).append((x, mean, low, high))
    if not series:
        fail("expected NAME.winrate.json with NAME.pairs.meta.json, found no setting with both")
    return series


def bin_points(run, key, interval):
    """[(middle, rate, low, high)] of a run's length bins."""
    points = []
    for name, group in run.get("length_bins", {}).items():
        low, high = map(float, name.split(" to "))
        if group.get(interval):
            points.append(((low + high) / 2, group[key], *group[interval]))
    return points


def step_points(steps, key):
    """[(step, mean, mean - std, mean + std)] over the pairs of a step; at most 60 points, means of steps."""
    steps = [step for step in steps if step.get(key) is not None]
    numbers = [(step["step"], step[key], step.get(f"{key}_std") or 0) for step in steps]
    width = max(1, math.ceil(len(numbers) / 60))
    points = []
    for first in range(0, len(numbers), width):
        step, middle, std = np.mean(numbers[first : first + width], axis=0)
        points.append((step, middle, middle - std, middle + std))
    return points
