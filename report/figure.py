"""
Results -> one figure, PNG and PDF.

Reads   FIGURE       which one (below)
        RESULT ...   files of settings and runs, as report/runs.py lists and orders them: NAME.winrate.json,
                     ..., or files of rows
Writes  --out FILE   FILE.png and FILE.pdf

    python report/figure.py settings out/*.winrate.json --out out/settings.png
    python report/figure.py ratio out/*.winrate.json out/*.pairs.meta.json --out out/ratio.png
    python report/figure.py length out/scored.jsonl out/on50.pairs.jsonl --out out/length.png

settings     NAME.winrate.json: rewards, win rates, length-controlled (LC) win rates (S1 Fig. 6)
categories   NAME.winrate.json: rates by category (S1 Figs. 2, 8)
lengths      NAME.winrate.json: rates by the length of the answer (S1 Fig. 3); each quarter of a run's answers
             is a bin, and a setting's point is the mean of its runs' bins
ratio        NAME.winrate.json and NAME.pairs.meta.json: rates over the on-policy share of the pairs (S1 Fig.
             4); settings whose names differ in the last number (on0, on50) make a curve
filters      the same over the share that a filter kept, a curve per filter (S1 Fig. 5)
training     NAME.metrics.jsonl or NAME/metrics.jsonl: loss, margin and intra-diversity over steps (S2 Fig. 3)
shares       rows with a "category": shares of the prompts (S1 Fig. 7)
rewards      scored responses: histograms of rewards, a curve per file and source (S1 Figs. 10, 11)
length       scored responses, pairs, or files of both: mean reward over the length of the answer, in ten bins
             of equally many responses of a source; chosen minus rejected length, a curve per source, whose
             outermost bins have the 1 % beyond. Lengths are characters after reasoning

Bars and points have 95 % intervals over prompts; of several runs, the mean of the intervals' ends. Curves
have them as wide bars and, of a setting with several runs, the standard deviation over its seeds as a narrow
one (S1 Fig. 4 does not say which it draws): the wide bars tell of the prompts, the narrow ones of so few
trainings. Rates are LC if all results have it. Prints one JSON object: the files and the number of series,
which are settings, runs, files or sources.
"""

import argparse
import json
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from rows import FIGURES  # noqa: E402

from common import fail  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))  # lines and markers
PROMPTS, SEEDS = "95 % interval over prompts", "standard deviation over seeds"  # of curves


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("figure", choices=list(FIGURES), metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("results", nargs="+", metavar="RESULT", help="files of results, or of rows")
    parser.add_argument("--out", required=True, metavar="FILE", help="the figure, with or without .png")
    return parser.parse_args(argv)


# ----- panels with a point per row
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


def draw_rows(panels, rows):
    """Figure of "bars": {series: [(middle, low, high) or None for each row]}."""
    rows = ["\n".join(textwrap.fill(line, 30) for line in row.split("\n")) for row in rows]
    n_series = max(len(panel.series) for panel in panels)
    n_lines = max(row.count("\n") + 1 for row in rows)
    ticks = range(len(rows))
    row_height = max(0.5, 0.15 * n_series, 0.17 * n_lines + 0.1)
    figure, axes = subplots(len(panels), 3, 1 + row_height * len(rows))
    for axis, panel in zip(axes, panels, strict=True):
        height = 0.8 / len(panel.series)
        for k, (name, points) in enumerate(panel.series.items()):
            shift = height * (k - (len(panel.series) - 1) / 2)
            draw_bars(axis, points, shift, height, panel.reference, style_of(k) | {"label": name})
        axis.margins(x=0.2)
        left, right = axis.get_xlim()
        if panel.reference is not None and left <= panel.reference <= right:
            axis.axvline(panel.reference, color="grey", linestyle="--", linewidth=1, zorder=0)
        axis.set(xlabel=panel.x_label, ylim=(len(rows) - 0.4, -0.6))
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


# ----- panels with axes of their own
def draw_axes(panels):
    """Figure of panels side by side, in which a series looks the same."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    styles = {name: style_of(k) | {"label": name} for k, name in enumerate(names)}
    figure, axes = subplots(len(panels), 4 if len(panels) == 1 else 3.6, 3.6)
    for axis, panel in zip(axes, panels, strict=True):
        DRAW[panel.form](axis, panel, styles)
        axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axis.set_title(panel.title, loc="left", fontsize=8)
        axis.grid(alpha=0.3)
    return figure


def draw_curves(axis, panel, styles):
    """{series: [Point]}: lines with two kinds of bars, which the legend names."""
    any_sd = False
    step = min(0.05, 0.4 / len(panel.series))  # inches
    for k, (name, points) in enumerate(panel.series.items()):
        x, middle, low, high, sd = np.array(sorted(points), float).T
        inches = step * (k - (len(panel.series) - 1) / 2)
        style = styles[name] | {"markersize": 4}
        wide = {"ecolor": (style["color"], 0.3), "elinewidth": 5, "capsize": 0}
        drawn = axis.errorbar(x, middle, yerr=errors_of(middle, low, high), **style, **wide)
        move_right(drawn, inches, axis.figure)
        several = np.isfinite(sd)
        if several.any():
            any_sd = True
            narrow = {"ecolor": style["color"], "elinewidth": 1.5, "capsize": 4, "fmt": "none"}
            drawn = axis.errorbar(x[several], middle[several], yerr=sd[several], **narrow)
            move_right(drawn, inches, axis.figure)
    axis.margins(x=0.08)  # room for them
    axis.errorbar([], [], yerr=[], fmt="none", ecolor=("black", 0.3), elinewidth=5, label=PROMPTS)
    if any_sd:
        axis.errorbar([], [], yerr=[], fmt="none", ecolor="black", elinewidth=1.5, capsize=4, label=SEEDS)


def move_right(drawn, inches, figure):
    """Bars at the same x lie side by side."""
    from matplotlib.transforms import ScaledTranslation

    shift = ScaledTranslation(inches, 0, figure.dpi_scale_trans)
    for artist in drawn.get_children():
        artist.set_transform(artist.get_transform() + shift)


def draw_bands(axis, panel, styles):
    """{series: [Point]}: lines with bands."""
    for name, points in panel.series.items():
        x, middle, low, high, _ = np.array(sorted(points), float).T
        axis.plot(x, middle, **styles[name] | {"marker": ""})
        if len(panel.series) <= 4:  # more bands are one grey
            axis.fill_between(x, low, high, color=styles[name]["color"], alpha=0.12, linewidth=0)


def draw_histogram(axis, panel, styles):
    """{series: (edges, shares)}: steps."""
    for name, (edges, shares) in panel.series.items():
        line = {key: styles[name][key] for key in ("color", "linestyle", "label")}
        axis.stairs(shares, edges, linewidth=1.5, **line)
    if panel.reference is not None:
        axis.axvline(panel.reference, color="grey", linestyle="--", linewidth=1, zorder=0)


DRAW = {"curves": draw_curves, "bands": draw_bands, "histogram": draw_histogram}


def add_legend(figure):
    """A legend below the panels, for which the figure grows."""
    handles = {}
    for axis in figure.axes:
        for artist, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, artist)
    handles.pop("", None)
    for label in (PROMPTS, SEEDS):  # after the series
        if label in handles:
            handles[label] = handles.pop(label)
    if handles:
        labels = [textwrap.fill(label, 50) for label in handles]
        columns = min(2, len(figure.axes), len(labels))
        lines = sum(label.count("\n") + 1 for label in labels) / columns
        figure.set_figheight(figure.get_figheight() + 0.16 * lines + 0.1)
        options = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 8}
        figure.legend(handles.values(), labels, **options)


def main(args):
    panels, rows = FIGURES[args.figure](args.results)
    figure = draw_rows(panels, rows) if rows else draw_axes(panels)
    add_legend(figure)
    names = {name for panel in panels for name in panel.series}
    n_series = len(rows) if names == {""} else len(names)
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
