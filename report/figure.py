"""
Results -> one figure, PNG and PDF.

Reads   FIGURE       which one (below)
        RESULT ...   files of settings and runs, as report/runs.py lists them: NAME.winrate.json, ...
Writes  --out FILE   FILE.png and FILE.pdf

    python report/figure.py settings out/*.winrate.json --out out/settings.png
    python report/figure.py ratio out/*.winrate.json out/*.pairs.meta.json --out out/ratio.png

settings     NAME.winrate.json: rewards, win rates, length-controlled (LC) win rates (S1 Fig. 6)
categories   NAME.winrate.json: rates by category (S1 Figs. 2, 8)
lengths      NAME.winrate.json: rates by the length of the answer (S1 Fig. 3), a curve per run
ratio        NAME.winrate.json and NAME.pairs.meta.json: rates over the on-policy share of the pairs (S1 Fig.
             4); settings whose names differ in the last number (on0, on50) make a curve
filters      the same over the share that a filter kept, a curve per filter (S1 Fig. 5)
training     NAME.metrics.jsonl or NAME/metrics.jsonl: loss, margin and intra-diversity over steps (S2 Fig. 3)
shares       rows with a "category": shares of the prompts (S1 Fig. 7)
rewards      scored responses: histograms of rewards, a curve per file and source (S1 Figs. 10, 11)

Bars and points have 95 % intervals over prompts; in ratio and filters a setting with several runs has the
standard deviation over its seeds instead (S1 Fig. 4 does not say which). Rates are LC if all results have it.
Prints one JSON object: the files and the number of series.
"""

import argparse
import json
import os
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from runs import bin_points, interval_of, rate_key, read_results, step_points, sweep, winrates  # noqa: E402

from common import fail, read_jsonl  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))  # lines and markers

Labelled = TypedDict("Labelled", {"category": str | None})


class Scored(TypedDict):
    responses: list[TypedDict("Response", {"source": Literal["on", "off"], "reward": float | None})]
    labeler: NotRequired[str | None]


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("figure", choices=list(FIGURES), metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("results", nargs="+", metavar="RESULT", help="files of results, or of rows")
    parser.add_argument("--out", required=True, metavar="FILE", help="the figure, with or without .png")
    return parser.parse_args(argv)


# ----- three ways to draw: panels of series
def style_of(k):
    """Colour, line and marker of series k of a panel."""
    line, marker = STYLES[k // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": line, "marker": marker}


def subplots(n, width, height):
    """Figure and axes of n panels in a row; the height and the width of a panel are in inches."""
    from matplotlib.figure import Figure  # here: --help and wrong flags answer at once

    figure = Figure(figsize=(1 + n * width, height), layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]


def errors_of(middle, low, high):
    """Lengths of error bars (2, n). A bootstrap interval, or one of some runs, may miss the number."""
    return np.maximum([middle - low, high - middle], 0)


def bars(panels, rows):
    """Figure with panels (label, reference line, {series: [(middle, low, high) or None for each row]})."""
    all_points = [points for _, _, series in panels for points in series.values()]
    if not any(map(any, all_points)):
        fail("no result has an interval over prompts; give results of more prompts")
    rows = ["\n".join(textwrap.fill(line, 30) for line in row.split("\n")) for row in rows]
    n_series = max(len(series) for _, _, series in panels)
    n_lines = max(row.count("\n") + 1 for row in rows)
    ticks = range(len(rows))
    row_height = max(0.5, 0.15 * n_series, 0.17 * n_lines + 0.1)
    figure, axes = subplots(len(panels), 3, 1 + row_height * len(rows))
    for axis, (label, reference, series) in zip(axes, panels, strict=True):
        height = 0.8 / len(series)
        for k, (name, points) in enumerate(series.items()):
            shift = height * (k - (len(series) - 1) / 2)
            draw_bars(axis, points, shift, height, reference, style_of(k) | {"label": name})
        axis.margins(x=0.2)
        left, right = axis.get_xlim()
        if reference is not None and left <= reference <= right:
            axis.axvline(reference, color="grey", linestyle="--", linewidth=1, zorder=0)
        axis.set(xlabel=label, ylim=(len(rows) - 0.4, -0.6))
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(ticks, [""] * len(rows))
    axes[0].set_yticks(ticks, rows)
    return figure


def draw_bars(axis, points, shift, height, reference, style):
    """A series, shifted from the heights of its rows: points with intervals, and bars from 0."""
    heights = [row + shift for row, point in enumerate(points) if point]
    numbers = [point for point in points if point]
    middle, low, high = np.array(numbers).reshape(-1, 3).T
    errors = errors_of(middle, low, high)
    axis.errorbar(middle, heights, xerr=errors, capsize=3, markersize=4, **style | {"linestyle": ""})
    if reference is not None:
        axis.barh(heights, middle, 0.6 * height, color=style["color"], alpha=0.3)
    for x, y, value in zip(high, heights, middle, strict=True):
        number = f"{value:.2f}" if reference is None else f"{value:.1f}"
        axis.annotate(number, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7)


def curves(panels):
    """Figure with panels (x label, y label, {series: [(x, middle, low, high)]}, shaded or not)."""
    names = list(dict.fromkeys(name for _, _, series, _ in panels for name in series))
    figure, axes = subplots(len(panels), 3.6, 3.6)
    for axis, (x_label, y_label, series, shaded) in zip(axes, panels, strict=True):
        for k, (name, points) in enumerate(series.items()):
            x, middle, low, high = np.array(sorted(points), float).T
            style = style_of(names.index(name)) | {"label": name}  # the same in all panels
            if shaded:
                axis.plot(x, middle, **style | {"marker": ""})
                if len(series) <= 4:  # more bands are one grey
                    axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            else:
                errors = errors_of(middle, low, high)
                drawn = axis.errorbar(x, middle, yerr=errors, capsize=3, markersize=4, **style)
                move_right(drawn, (k - (len(series) - 1) / 2) / 20, figure)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
    return figure


def move_right(drawn, inches, figure):
    """Bars at the same x lie side by side."""
    from matplotlib.transforms import ScaledTranslation

    shift = ScaledTranslation(inches, 0, figure.dpi_scale_trans)
    for artist in drawn.get_children():
        artist.set_transform(artist.get_transform() + shift)


def histogram(label, series):
    """Figure of {series: values}, on common edges; a curve is the share of its values."""
    edges = np.histogram_bin_edges(np.concatenate(list(series.values())), 40)
    figure, [axis] = subplots(1, 5, 3.6)
    for k, (name, values) in enumerate(series.items()):
        shares = np.histogram(values, edges)[0] / len(values)
        style = style_of(k)
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        axis.stairs(shares, edges, label=name, linewidth=1.5, **line)
    axis.set(xlabel=label, ylabel="share of the responses")
    axis.grid(alpha=0.3)
    return figure


# ----- figures of results
def settings_figure(settings):
    runs = winrates(settings)
    measures = (
        ("reward", "reward_ci", "mean reward", None),
        ("win_rate", "ci", "win rate (%)", 50),
        ("length_controlled_winrate", "lc_ci", "LC win rate (%)", 50),
    )
    panels = []
    for key, interval, label, reference in measures:
        points = [interval_of(results, key, interval) for results in runs.values()]
        if any(points):
            panels.append((label, reference, {"": points}))
    if not panels:
        fail("expected results of evaluate.py with intervals over prompts, found none")
    rows = [f"{name}\nn = {results[0]['n_total']}" for name, results in runs.items()]
    return bars(panels, rows)


def categories_figure(settings):
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
    rows = [f"{category}\nn = {sizes[category]}" for category in largest_first]
    return bars([(f"{label} (%)", 50, series)], rows)


def lengths_figure(settings):
    key, interval, label = rate_key(settings)
    runs = [run for results in settings.values() for run in results["winrate"].items()]
    series = {name: bin_points(run, key, interval) for name, run in runs}
    series = {name: points for name, points in series.items() if points}
    if not series:
        fail("expected length bins with intervals over prompts, found none")
    return curves([("characters of the answer", f"{label} (%)", series, False)])


def ratio_figure(settings):
    def on_share(name, meta):
        on, off = meta["counts"].get("on", 0), meta["counts"].get("off", 0)
        curve = re.sub(r"[-_]?[\d.]+$", "", name)
        return (curve, on / (on + off)) if on + off else None

    label = f"{rate_key(settings)[2]} (%)"
    return curves([("on-policy share of the pairs", label, sweep(settings, on_share), False)])


def filters_figure(settings):
    series = sweep(settings, lambda name, meta: meta["args"].get("filter"))
    return curves([("share of the pairs kept", f"{rate_key(settings)[2]} (%)", series, False)])


def training_figure(settings):
    runs = {name: steps for results in settings.values() for name, steps in results["metrics"].items()}
    labels = {"loss": "loss", "margin": "margin", "diversity": "intra-diversity (eq. 12), nats"}
    panels = []
    for key, label in labels.items():
        series = {name: step_points(steps, key) for name, steps in runs.items()}
        series = {name: points for name, points in series.items() if points}
        if series:
            panels.append(("step", label, series, True))
    if not panels:
        fail("expected metrics.jsonl with loss, margin or diversity, found none")
    return curves(panels)


# ----- figures of rows
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
        for _, row in read_jsonl(path, Scored):
            for response in row["responses"]:
                if response["reward"] is not None:
                    labelers.add(str(row.get("labeler")))
                    series = f"{name}, {response['source']}-policy"
                    rewards.setdefault(series, []).append(response["reward"])
    if not rewards:
        fail(f"{', '.join(paths)}: no response has a reward; score.py gives them")
    if len(labelers) > 1:
        fail(f"{', '.join(paths)}: rewards of different labelers: {' and '.join(sorted(labelers))}")
    series = {f"{name} (mean {np.mean(values):.2f})": values for name, values in rewards.items()}
    return histogram("reward", series)


def add_legend(figure):
    """A legend below the panels, for which the figure grows; the number of its entries."""
    handles = {}
    for axis in figure.axes:
        artists, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, artists, strict=True))
    handles.pop("", None)
    if handles:
        labels = [textwrap.fill(label, 50) for label in handles]
        columns = min(2, len(figure.axes), len(labels))
        lines = sum(label.count("\n") + 1 for label in labels) / columns
        figure.set_figheight(figure.get_figheight() + 0.16 * lines + 0.1)
        options = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 8}
        figure.legend(handles.values(), labels, **options)
    return len(handles)


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


def main(args):
    from_rows = args.figure in ("shares", "rewards")
    figure = FIGURES[args.figure](args.results if from_rows else read_results(args.results))
    n_series = add_legend(figure)
    out = re.sub(r"\.(png|pdf)$", "", args.out)
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        for ending in (".png", ".pdf"):
            figure.savefig(f"{out}.tmp{ending}", dpi=150, bbox_inches="tight")
            os.replace(f"{out}.tmp{ending}", f"{out}{ending}")
    except OSError as error:
        fail(f"--out {args.out} cannot be written: {error}")
    print(json.dumps({"out": [f"{out}.png", f"{out}.pdf"], "series": n_series}))


if __name__ == "__main__":
    main(parse_args())
