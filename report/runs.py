"""
What table.py and points.py share: results by setting and run, their order, and means over runs.

NAME is a setting, and NAME_seed0, NAME_seed1, ... are its runs; without _seedK there is one. A result is

    winrate           NAME.winrate.json                      evaluate.py
    boundary          NAME.boundary.json                     boundary.py
    benchmarks_SUITE  NAME.benchmarks.json                   recipes/benchmarks.py
    pairs             NAME.pairs.meta.json                   build_pairs.py
    metrics           NAME.metrics.jsonl, NAME/metrics.jsonl train_dpo.py
    meta              any other *.meta.json                  what a stage counted, and its seconds

Settings and runs stand in the order of their names, in which numbers compare as numbers: on_0.5 before on_1,
seed2 before seed10. Baselines of win rates come first.
"""

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


class Score(TypedDict):
    v_on: float
    v_off: float
    ties: Count
    score: float
    ci: tuple[float, float]
    n_prompts: Count
    stage: str
    use: str


class Boundary(Score, total=False):
    kind: Required[Literal["boundary"]]
    by_category: dict[str, Score] | None
    length_matched: TypedDict("Matched", {"score": float, "ci": tuple[float, float]}) | None
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
    """Return {setting: {kind: {run: content}}} with all KINDS, in order."""
    settings = {}
    for path in sorted(dict.fromkeys(paths), key=lambda path: natural(setting_and_run(path)[1])):
        kind, content = read_result(path)
        name, run = setting_and_run(path)
        results = settings.setdefault(name, {kind: {} for kind in KINDS})
        key = path if kind == "meta" else run  # each stage of a run has its own
        if key in results[kind]:
            fail(f"{path}: {run} already has a {kind} result; name the runs of a setting NAME_seed0, ...")
        results[kind][key] = content
    return in_order(settings, baselines_of(settings))


# ----- the order of settings
def natural(name):
    """A key to sort names by, in which numbers compare as numbers; 5e-7 is one."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?)", name.lower())
    return [float(part) if k % 2 else part for k, part in enumerate(parts)], name


def in_order(settings, first):
    """The settings: those named in `first`, in its order, then the others."""
    named = [name for name in dict.fromkeys(first) if name in settings]
    others = sorted(settings.keys() - set(named), key=natural)
    return {name: settings[name] for name in named + others}


def baselines_of(settings):
    """The names of what the win rates compare with."""
    runs = [run for results in settings.values() for run in results["winrate"].values()]
    return sorted({Path(run["baseline"]).name for run in runs}, key=natural)


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
    """The settings, and the baselines of their win rates, which have 50 against themselves by definition."""
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
    return settings | baselines


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
