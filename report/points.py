"""
What figure.py draws of results: files -> panels of series. rows.py does it for files of rows.

Each function below returns (panels, names of the rows): a panel of "bars" has a point per row, the others
have axes of their own. figure.py says what the figures show.
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from runs import natural, over_runs, read_results

from common import fail


class Panel(NamedTuple):
    form: Literal["bars", "curves", "bands", "histogram"]
    x_label: str
    y_label: str
    series: dict  # {name: what its form says}
    reference: float | None = None  # where a line is dashed
    title: str = ""


class Point(NamedTuple):
    """Of a curve, with its interval, and its standard deviation over runs if there are several."""

    x: float
    middle: float
    low: float
    high: float
    sd: float = math.nan


def short_names(paths):
    """{path: the name of its file}, or the path itself where two files have one name; in order."""
    counts = Counter(Path(path).name for path in paths)
    names = {path: Path(path).name if counts[Path(path).name] == 1 else path for path in paths}
    return dict(sorted(names.items(), key=lambda item: natural(item[1])))


# ----- results
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
        return "length_controlled_winrate", "lc_ci", "LC win rate (%)"
    return "win_rate", "ci", "win rate (%)"


def interval_of(runs, key, interval):
    """(mean, low, high) of a number over runs; None without an interval."""
    mean, ci, _ = over_runs(runs, key, interval)
    return (mean, *ci) if ci else None


def point_of(x, average):
    low, high = average.ci or (average.mean, average.mean)
    return Point(x, average.mean, low, high, math.nan if average.sd is None else average.sd)


def settings_panels(paths):
    runs = winrates(read_results(paths))
    measures = (
        ("reward", "reward_ci", "mean reward", None),
        ("win_rate", "ci", "win rate (%)", 50),
        ("length_controlled_winrate", "lc_ci", "LC win rate (%)", 50),
    )
    panels = []
    for key, interval, label, reference in measures:
        points = [interval_of(results, key, interval) for results in runs.values()]
        if any(points):
            panels.append(Panel("bars", label, "", {"": points}, reference))
    if not panels:
        fail("expected results of evaluate.py with intervals over prompts, found none")
    return panels, [f"{name}\nn = {results[0]['n_total']}" for name, results in runs.items()]


def categories_panels(paths):
    settings = read_results(paths)
    key, interval, label = rate_key(settings)
    groups, sizes = {}, {}
    for name, runs in winrates(settings).items():
        groups[name] = [run.get("categories", {}) for run in runs]
        for categories in groups[name]:
            sizes |= {category: group["n_total"] for category, group in categories.items()}
    if not sizes:
        fail("expected results with categories (scorers/category.py), found none")
    largest_first = sorted(sizes, key=lambda category: -sizes[category])
    series = {name: [] for name in groups}
    for name, runs in groups.items():
        for category in largest_first:
            rates = [categories.get(category, {}) for categories in runs]
            series[name].append(interval_of(rates, key, interval))
    if not any(map(any, series.values())):
        fail("no result has an interval over prompts; give results of more prompts")
    rows = [f"{category}\nn = {sizes[category]}" for category in largest_first]
    return [Panel("bars", label, "", series, 50)], rows


def lengths_panels(paths):
    settings = read_results(paths)
    key, interval, label = rate_key(settings)
    series = {}
    for name, runs in winrates(settings).items():
        points = bin_points(name, runs, key, interval)
        if points:
            series[name] = points
    if not series:
        fail("expected length bins with intervals over prompts, found none")
    return [Panel("curves", "characters of the answer", label, series)], []


def bin_points(name, runs, key, interval):
    """[Point] of a setting's length bins. Those of a run are quarters of its own answers, so the first bins
    of all runs make a point, the second ones, ..."""
    by_run = []
    for run in runs:
        bins = []
        for edges, group in run.get("length_bins", {}).items():
            low, high = map(float, edges.split(" to "))
            bins.append({"middle": (low + high) / 2} | group)
        if bins:
            by_run.append(sorted(bins, key=lambda group: group["middle"]))
    counts = sorted({len(bins) for bins in by_run})
    if len(counts) > 1:
        why = f"runs of {name} have {counts[0]} and {counts[-1]} length bins (many answers are of one length)"
        fail(f"{why}, which have no mean; give one of its runs")
    points = []
    for groups in zip(*by_run, strict=True):
        rate = over_runs(groups, key, interval)
        if rate.ci:
            points.append(point_of(np.mean([group["middle"] for group in groups]), rate))
    return points


def ratio_panels(paths):
    def on_share(name, meta):
        on, off = meta["counts"].get("on", 0), meta["counts"].get("off", 0)
        curve = re.sub(r"[-_]?[\d.]+$", "", name)
        return (curve, on / (on + off)) if on + off else None

    return sweep(paths, on_share, "on-policy share of the pairs")


def filters_panels(paths):
    return sweep(paths, lambda name, meta: meta["args"].get("filter"), "share of the pairs kept")


def sweep(paths, position, x_label):
    """A panel of curves, where position(setting, record of its pairs) is (curve, x) or None."""
    settings = read_results(paths)
    key, interval, label = rate_key(settings)
    series = {}
    for name, results in settings.items():
        metas = list(results["pairs"].values())
        curve_and_x = position(name, metas[0]) if metas else None
        rate = over_runs(results["winrate"].values(), key, interval)
        if curve_and_x is not None and rate.mean is not None:
            curve, x = curve_and_x
            series.setdefault(curve, []).append(point_of(x, rate))
    if not series:
        fail("expected NAME.winrate.json with NAME.pairs.meta.json, found no setting with both")
    return [Panel("curves", x_label, label, series)], []


def training_panels(paths):
    settings = read_results(paths)
    runs = {name: steps for results in settings.values() for name, steps in results["metrics"].items()}
    labels = {"loss": "loss", "margin": "margin", "diversity": "intra-diversity (eq. 12), nats"}
    panels = []
    for key, label in labels.items():
        series = {name: step_points(steps, key) for name, steps in runs.items()}
        series = {name: points for name, points in series.items() if points}
        if series:
            panels.append(Panel("bands", "step", label, series))
    if not panels:
        fail("expected metrics.jsonl with loss, margin or diversity, found none")
    return panels, []


def step_points(steps, key):
    """[Point] with one standard deviation over the pairs of a step; at most 60, which are means of steps."""
    steps = [step for step in steps if step.get(key) is not None]
    numbers = [(step["step"], step[key], step.get(f"{key}_std") or 0) for step in steps]
    width = max(1, math.ceil(len(numbers) / 60))
    points = []
    for first in range(0, len(numbers), width):
        step, middle, std = np.mean(numbers[first : first + width], axis=0)
        points.append(Point(step, middle, middle - std, middle + std))
    return points


RESULTS = {
    "settings": settings_panels,
    "categories": categories_panels,
    "lengths": lengths_panels,
    "ratio": ratio_panels,
    "filters": filters_panels,
    "training": training_panels,
}
