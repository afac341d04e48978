"""
Results -> one figure, PNG and PDF.

Reads   FIGURE       which one, see below
        RESULT ...   named as for report/table.py: NAME is the setting, NAME_seed0, ... are its runs
Writes  --out FILE   FILE.png and FILE.pdf

settings     NAME.winrate.json: rewards, win rates, length-controlled (LC) win rates (S1 Fig. 6)
categories   NAME.winrate.json: rates by category (S1 Figs. 2, 8); with evaluate.py --minus also the second
             model's, and the differences
lengths      the same by the length of the answer (S1 Fig. 3), a point mid-bin; every run has its own curve
ratio        NAME.winrate.json and NAME.pairs.meta.json: rates over the on-policy share of the pairs (S1 Fig.
             4); settings whose names differ in the last number (on0, on50) make a curve
filters      the same over the share that a filter kept, a curve per filter (S1 Fig. 5)
shares       rows with a "category": shares of the prompts (S1 Fig. 7)
rewards      scored responses: histograms of rewards, a curve per file and source (S1 Figs. 10, 11)
training     NAME.metrics.jsonl or NAME/metrics.jsonl: loss, margin and intra-diversity over steps (S2 Fig. 3)

Bars and points have 95 % intervals over prompts; in ratio and filters a setting with several runs has the
standard deviation over its seeds instead (S1 Fig. 4 does not say which). Rates are LC if all results have it.

    python report/figure.py settings out/*.winrate.json --out out/settings.png
    python report/figure.py ratio out/*.winrate.json out/*.pairs.meta.json --out out/ratio.png

Prints one JSON object: the files and the number of series.
"""

# ruff: noqa: E402, I001
import argparse
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Required, TypedDict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.transforms import ScaledTranslation

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import table
from evaluate import fail, read_jsonl, read_responses

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))  # lines and markers


class Labelled(TypedDict, total=False):
    category: Required[str | None]


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("figure", choices=list(FIGURES), metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("results", nargs="+", metavar="RESULT")
    parser.add_argument("--out", required=True, metavar="FILE")
    return parser.parse_args(argv)


# ----- three ways to draw: panels of series
def style_of(k):
    """Colour, line and marker of series k of a panel."""
    line, marker = STYLES[k // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": line, "marker": marker}


def subplots(n, width, height, **options):
    """Figure and axes of n panels in a row; a height and the widths are in inches."""
    options |= {"layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(1, n, figsize=(1 + n * width, height), **options)
    return figure, axes[0]


def bars(panels, rows):
    """Figure with panels (label, reference line, {series: [(middle, low, high) or None for each row]})."""
    if not any(point for _, _, series in panels for points in series.values() for point in points):
        fail("expected results with intervals over prompts, found none")
    rows = ["\n".join(textwrap.fill(line, 30) for line in row.split("\n")) for row in rows]
    n_series = max(len(series) for _, _, series in panels)
    n_lines = max(row.count("\n") + 1 for row in rows)
    figure, axes = subplots(len(panels), 3, 1 + len(rows) * max(0.5, 0.15 * n_series, 0.17 * n_lines + 0.1))
    for axis, (label, reference, series) in zip(axes, panels, strict=True):
        step = 0.8 / len(series)
        for k, (name, points) in enumerate(series.items()):
            places = [row + step * (k - (len(series) - 1) / 2) for row, point in enumerate(points) if point]
            middle, low, high = np.array([point for point in points if point]).reshape(-1, 3).T
            style = style_of(k) | {"linestyle": "", "label": name}
            errors = np.array([middle - low, high - middle])
            axis.errorbar(middle, places, xerr=errors, capsize=3, markersize=4, **style)
            if reference is not None:
                axis.barh(places, middle, 0.6 * step, color=style["color"], alpha=0.3)
            for x, y, value in zip(high, places, middle, strict=True):
                number = f"{value:.2f}" if reference is None else f"{value:.1f}"
                axis.annotate(number, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7)
        axis.margins(x=0.2)
        if reference is not None and axis.get_xlim()[0] <= reference <= axis.get_xlim()[1]:
            axis.axvline(reference, color="grey", linestyle="--", linewidth=1, zorder=0)
        axis.set(xlabel=label, ylim=(len(rows) - 0.4, -0.6))
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows))
    return figure


def curves(panels):
    """Figure with panels (x label, y label, {series: [(x, middle, low, high)]}, shaded or not)."""
    names = list(dict.fromkeys(name for _, _, series, _ in panels for name in series))
    figure, axes = subplots(len(panels), 3.6, 3.6)
    for axis, (x_label, y_label, series, shaded) in zip(axes, panels, strict=True):
        for k, (name, points) in enumerate(series.items()):
            x, middle, low, high = np.array(sorted(points), float).T
            style = style_of(names.index(name))  # the same in all panels
            if shaded:
                axis.plot(x, middle, label=name, **style | {"marker": ""})
                if len(series) <= 4:  # more bands are one grey
                    axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            else:
                errors = np.array([middle - low, high - middle])
                drawn = axis.errorbar(x, middle, yerr=errors, capsize=3, markersize=4, label=name, **style)
                inches = (k - (len(series) - 1) / 2) / 20
                shift = ScaledTranslation(inches, 0, figure.dpi_scale_trans)
                for artist in drawn.get_children():  # bars at the same x lie side by side
                    artist.set_transform(artist.get_transform() + shift)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
    return figure


def histogram(label, series):
    """Figure of {series: values}, on common edges; a curve is the share of its values."""
    edges = np.histogram_bin_edges(np.concatenate(list(series.values())), 40)
    figure, [axis] = subplots(1, 5, 3.6)
    for k, (name, values) in enumerate(series.items()):
        shares = np.histogram(values, edges)[0] / len(values)
        style = style_of(k)
        del style["marker"]
        axis.stairs(shares, edges, label=name, linewidth=1.5, **style)
    axis.set(xlabel=label, ylabel="share of the responses")
    axis.grid(alpha=0.3)
    return figure


# ----- the figures
def point(value):
    """(mean, low, high) of table.over_runs; None without an interval."""
    return (value["mean"], *value["ci"]) if value and value["ci"] else None


def rate_key(settings):
    """("length_controlled_winrate", "lc_ci", name) if all results have it, else those of the win rate."""
    runs = [run for results in settings.values() for run in results.get("winrate", {}).values()]
    if not runs:
        fail("expected results of evaluate.py winrate, found none")
    if all(run.get("length_controlled_winrate") is not None for run in runs):
        return "length_controlled_winrate", "lc_ci", "LC win rate"
    return "win_rate", "ci", "win rate"


def settings_figure(settings):
    rows, panels, runs = [], [], {}
    for name, results in settings.items():
        if "winrate" in results:
            runs[name] = list(results["winrate"].values())
            rows.append(f"{name}\nn = {runs[name][0]['n_total']}")
    measures = (
        ("reward", "reward_ci", "mean reward", None),
        ("win_rate", "ci", "win rate (%)", 50),
        ("length_controlled_winrate", "lc_ci", "LC win rate (%)", 50),
    )
    for key, interval, label, reference in measures:
        points = [point(table.over_runs(runs[name], key, interval)) for name in runs]
        if any(points):
            panels.append((label, reference, {"": points}))
    if not panels:
        fail("expected results of evaluate.py winrate with intervals, found none")
    return bars(panels, rows)


def categories_figure(settings):
    key, interval, label = rate_key(settings)
    rates, minus, sizes = {}, {}, {}
    for name, results in settings.items():
        for run in results.get("winrate", {}).values():
            rates.setdefault(name, []).append(run)
            if "minus" in run:
                other, _ = table.name_and_seed(run["minus"]["model"])
                minus.setdefault(f"{name} minus {other}", []).append(run["minus"])
                if other not in settings:
                    rates.setdefault(other, []).append(run["minus"]["result"])
            for category, group in run.get("categories", {}).items():
                sizes[category] = group["n_total"]
    if not sizes:
        fail("expected results with categories (scorers/category.py), found none")
    categories = sorted(sizes, key=lambda category: -sizes[category])
    panels = []
    for series, text, reference in (
        (rates, f"{label} (%)", 50),
        (minus, f"difference of {label}s (points)", 0),
    ):
        points = {}
        for name, runs in series.items():
            cells = [[run.get("categories", {}).get(category, {}) for run in runs] for category in categories]
            points[name] = [point(table.over_runs(cell, key, interval)) for cell in cells]
        if points:
            panels.append((text, reference, points))
    return bars(panels, [f"{category}\nn = {sizes[category]}" for category in categories])


def lengths_figure(settings):
    key, interval, label = rate_key(settings)
    rates, minus = {}, {}
    for name, results in settings.items():
        for seed, run in results.get("winrate", {}).items():
            run_name = name if seed is None else f"{name}_seed{seed}"
            rates[run_name] = bin_points(run, key, interval)
            if "minus" in run:
                other = Path(run["minus"]["model"]).name
                minus[f"{run_name} minus {other}"] = bin_points(run["minus"], key, interval)
                if other not in settings:
                    rates[other] = bin_points(run["minus"]["result"], key, interval)
    panels = []
    for series, text in ((rates, f"{label} (%)"), (minus, f"difference of {label}s (points)")):
        series = {name: points for name, points in series.items() if points}
        if series:
            panels.append(("characters of the answer", text, series, False))
    if not panels:
        fail("expected length bins with intervals over prompts, found none")
    return curves(panels)


def bin_points(run, key, interval):
    """[(middle, rate, low, high)] of a run's length bins."""
    points = []
    for name, group in run.get("length_bins", {}).items():
        low, high = map(float, name.split(" to "))
        if group.get(interval):
            points.append(((low + high) / 2, group[key], *group[interval]))
    return points


def sweep(settings, place):
    """{series: [(x, rate, low, high)]}; place(name, meta) gives (series, x) of a setting or None."""
    key, interval, _ = rate_key(settings)
    series = {}
    for name, results in settings.items():
        metas = list(results.get("pairs", {}).values())
        value = table.over_runs(list(results.get("winrate", {}).values()), key, interval)
        where = place(name, metas[0]) if metas else None
        if not value or not where:
            continue
        if value["sd"] is not None:
            low, high = value["mean"] - value["sd"], value["mean"] + value["sd"]
        else:
            low, high = value["ci"] or (value["mean"], value["mean"])
        series.setdefault(where[0], []).append((where[1], value["mean"], low, high))
    if not series:
        fail("expected winrate results and pairs' meta files of the same NAMEs, found no setting with both")
    return series


def ratio_figure(settings):
    def place(name, meta):
        on, off = meta["counts"].get("on", 0), meta["counts"].get("off", 0)
        series = re.sub(r"[-_]?[\d.]+$", "", name)
        return (series, on / (on + off)) if on + off else None

    panel = ("on-policy share of the pairs", f"{rate_key(settings)[2]} (%)", sweep(settings, place), False)
    return curves([panel])


def filters_figure(settings):
    def place(name, meta):
        return meta["args"].get("filter")

    panel = ("share of the pairs kept", f"{rate_key(settings)[2]} (%)", sweep(settings, place), False)
    return curves([panel])


def training_figure(settings):
    panels = []
    for key, label in (
        ("loss", "loss"),
        ("margin", "margin"),
        ("diversity", "intra-diversity (eq. 12), nats"),
    ):
        series = {}
        for name, results in settings.items():
            for seed, steps in results.get("metrics", {}).items():
                points = step_points(steps, key)
                if points:
                    series[name if seed is None else f"{name}_seed{seed}"] = points
        if series:
            panels.append(("step", label, series, True))
    if not panels:
        fail("expected metrics.jsonl with loss, margin or diversity, found none")
    return curves(panels)


def step_points(steps, key):
    """[(step, mean, mean - std, mean + std)] over the pairs of a step; at most 60 points, means of steps."""
    known = [step for step in steps if step.get(key) is not None]
    numbers = [(step["step"], step[key], step.get(f"{key}_std") or 0) for step in known]
    width = math.ceil(len(numbers) / 60)
    points = []
    for first in range(0, len(numbers), width or 1):
        step, middle, std = np.mean(numbers[first : first + width], axis=0)
        points.append((step, middle, middle - std, middle + std))
    return points


def short_names(paths):
    """{path: the name of its file}, or the path itself where two files have one name."""
    counts = Counter(Path(path).name for path in paths)
    return {path: Path(path).name if counts[Path(path).name] == 1 else path for path in paths}


def shares_figure(paths):
    series, rows = {}, Counter()
    for path, name in short_names(paths).items():
        counts = Counter(str(row["category"]) for _, row in read_jsonl(path, Labelled))
        series[f"{name} (n = {counts.total()})"] = counts
        rows += counts
    categories = [category for category, _ in rows.most_common()]
    points = {}
    for name, counts in series.items():
        shares = [100 * counts[category] / counts.total() for category in categories]
        points[name] = [(share, share, share) for share in shares]
    return bars([("share of the prompts (%)", 0, points)], categories)


def rewards_figure(paths):
    rewards, labelers = {}, set()
    for path, name in short_names(paths).items():
        for row in read_responses([path]).values():
            for response in row["responses"]:
                if response["reward"] is not None:
                    labelers.add(str(row.get("labeler")))
                    series = f"{name}, {response['source']}-policy"
                    rewards.setdefault(series, []).append(response["reward"])
    if not rewards:
        fail(f"{', '.join(paths)}: no response has a reward")
    if len(labelers) > 1:
        fail(f"{', '.join(paths)}: the rewards are of different labelers, {' and '.join(sorted(labelers))}")
    series = {f"{name} (mean {np.mean(values):.2f})": values for name, values in rewards.items()}
    return histogram("reward", series)


FIGURES = {
    "settings": settings_figure,
    "categories": categories_figure,
    "lengths": lengths_figure,
    "ratio": ratio_figure,
    "filters": filters_figure,
    "training": training_figure,
    "shares": shares_figure,
    "rewards": rewards_figure,
}


def add_legend(figure):
    """A legend below the panels, for which the figure grows; the number of its entries."""
    handles = {}
    for axis in figure.axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    handles.pop("", None)
    if handles:
        labels = [textwrap.fill(label, 50) for label in handles]
        columns = min(2, len(figure.axes), len(labels))
        lines = sum(label.count("\n") + 1 for label in labels) / columns
        figure.set_figheight(figure.get_figheight() + 0.16 * lines + 0.1)
        options = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 8}
        figure.legend(handles.values(), labels, **options)
    return len(handles)


def main(args):
    from_rows = args.figure in ("shares", "rewards")
    figure = FIGURES[args.figure](args.results if from_rows else table.read_results(args.results))
    n_series = add_legend(figure)
    out = re.sub(r"\.(png|pdf)$", "", args.out)
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        for ending in (".png", ".pdf"):
            figure.savefig(f"{out}.tmp{ending}", dpi=150, bbox_inches="tight")
            os.replace(f"{out}.tmp{ending}", f"{out}{ending}")
    except OSError as error:
        fail(f"--out {args.out}: {error}")
    print(json.dumps({"out": [f"{out}.png", f"{out}.pdf"], "series": n_series}))


if __name__ == "__main__":
    main(parse_args())
