"""
report/figure.py: results -> figures. What is drawn is read back from matplotlib's own objects.

Covers  for each figure the points, intervals, names of series and rows, axes and legend; bars over prompts
        and over seeds; rewards and pairs over length; LC only if all results have it; room for many and long
        names; PNG and PDF; wrong kinds of files; files that evaluate.py and build_pairs.py write.
Run     python -m pytest tests/test_figure.py
"""

import json
import random
import statistics
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO, thinking, write_rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread
from test_table import benchmarks, boundary_of, group, pairs_meta, put, real_files, winrate

sys.path.insert(0, str(REPO / "report"))
import figure  # noqa: E402
import points as results  # noqa: E402
import rows  # noqa: E402

# ----- drawing, and reading what was drawn
SAVED = []  # the figures that were written


@pytest.fixture(autouse=True)
def record_figures(monkeypatch):
    savefig = Figure.savefig

    def record_and_save(drawn, *words, **options):
        SAVED.append(drawn)
        savefig(drawn, *words, **options)

    monkeypatch.setattr(Figure, "savefig", record_and_save)
    SAVED.clear()


def draw(folder, capsys, name, *files, out="figure.png"):
    """The figure of a run, which wrote a PNG that is not blank, a PDF, and said so."""
    figure.main(figure.parse_args([name, *map(str, files), "--out", str(folder / "out" / out)]))
    said = json.loads(capsys.readouterr().out)
    drawn = SAVED[-1]
    png, pdf = folder / "out" / "figure.png", folder / "out" / "figure.pdf"
    pixels = imread(png)
    assert min(pixels.shape[:2]) > 150
    assert len(np.unique(pixels[::3, ::3].reshape(-1, pixels.shape[-1]), axis=0)) > 10
    assert pdf.read_bytes()[:5] == b"%PDF-" and set(png.parent.iterdir()) == {png, pdf}
    n_series = len(row_names(drawn)) if name == "settings" else len(legend(drawn))
    assert said == {"out": [str(png), str(pdf)], "series": n_series}
    for axis in drawn.axes:  # every point can be seen
        for container in axis.containers:
            if isinstance(container, ErrorbarContainer) and container[0] is not None:
                places = container[0].get_transform().transform(container[0].get_xydata())
                assert axis.bbox.padded(1).count_contains(places) == len(places) > 0
    return drawn


def refused(folder, capsys, name, *files):
    """The one sentence of a run that ends with status 2 and writes nothing."""
    with pytest.raises(SystemExit) as end:
        figure.main(figure.parse_args([name, *map(str, files), "--out", str(folder / "out" / "figure.png")]))
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1, said
    assert not (folder / "out").exists()
    return said.err


BARS = ["95 % interval over prompts", "standard deviation over seeds"]


def legend(drawn):
    """The names of series in the figure's legend, wrapped lines put together."""
    return [name for name in legend_texts(drawn) if name not in BARS]


def legend_texts(drawn):
    assert len(drawn.legends) <= 1
    return [text.get_text().replace("\n", " ") for box in drawn.legends for text in box.get_texts()]


def labels(drawn):
    return [(axis.get_xlabel(), axis.get_ylabel()) for axis in drawn.axes]


def approx(points):
    return [pytest.approx(numbers, abs=1e-9) for numbers in points]


def error_bars(axis):
    """{series: [(x, y, the two ends of the bar)]}."""
    series = {}
    for container in axis.containers:
        if isinstance(container, ErrorbarContainer) and container[0] is not None:
            line, _, (bars,) = container
            ends = [segment.tolist() for segment in bars.get_segments()]
            name = container.get_label()
            name = "" if name.startswith("_") else name  # matplotlib's for a series without a name
            series[name] = list(zip(*line.get_data(), ends, strict=True))
    return series


def points(axis):
    """{series: [(x, middle, low, high)]} of curves with error bars."""
    curves = {}
    for name, numbers in error_bars(axis).items():
        assert all(low[0] == x == high[0] for x, _, (low, high) in numbers)
        curves[name] = [(x, y, low[1], high[1]) for x, y, (low, high) in numbers]
    return curves


def spreads(axis):
    """{colour: [(x, middle of the bar, half its length)]} of the narrow bars over seeds."""
    bars = {}
    for container in axis.containers:
        if (
            isinstance(container, ErrorbarContainer)
            and container[0] is None
            and container.get_label() not in BARS
        ):
            (lines,) = container[2]
            assert lines.get_linewidth()[0] < 2
            numbers = bars[lines.get_color().tobytes()] = []
            for (x, low), (_, high) in lines.get_segments():
                numbers.append((x, (low + high) / 2, (high - low) / 2))
    return list(bars.values())


def row_names(drawn):
    """The names of the rows, wrapped lines put together; they stand at the first panel alone."""
    names = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    for axis in drawn.axes[1:]:
        assert [label.get_text() for label in axis.get_yticklabels()] == [""] * len(names)
    for axis in drawn.axes:
        bottom, top = axis.get_ylim()
        assert top < 0 and bottom > len(names) - 1 and list(axis.get_yticks()) == list(range(len(names)))
    return [name.replace("\n", " ") for name in names]


def rows_of(axis, names):
    """{series: {row: (middle, low, high)}} of a panel; no two series of a row are at one height."""
    series, heights = {}, []
    for name, numbers in error_bars(axis).items():
        assert all(low[1] == y == high[1] for _, y, (low, high) in numbers)
        series[name] = {names[round(y)]: (x, low[0], high[0]) for x, y, (low, high) in numbers}
        heights += [y for _, y, _ in numbers]
    assert len(set(heights)) == len(heights) and all(abs(y - round(y)) < 0.5 for y in heights)
    return series


def reference(axis):
    """Where a panel's dashed line is; None without one."""
    lines = [line for line in axis.lines if line.get_linestyle() == "--" and line.get_color() == "grey"]
    return lines[0].get_xdata()[0] if lines else None


def widths(axis):
    return sorted(patch.get_width() for patch in axis.patches)


def written(axis):
    """The numbers beside the points."""
    return [text.get_text() for text in axis.texts]


# ----- settings
def test_settings(tmp_path, capsys):
    rates = {"a": (20.0, 30.0, -4.0), "b": (None, 40.0, 5.25), "c": (60.0, 55.0, None)}
    files = []
    for name, (lc, win, reward) in rates.items():
        interval = None if reward is None else [reward - 1, reward + 2]
        result = winrate(lc, win, reward=reward, reward_ci=interval, n_total=800 + len(files))
        files.append(put(tmp_path / f"{name}.winrate.json", result))
    drawn = draw(tmp_path, capsys, "settings", *files)
    assert labels(drawn) == [("mean reward", ""), ("win rate (%)", ""), ("LC win rate (%)", "")]
    names = row_names(drawn)
    assert names == ["a n = 800", "b n = 801", "c n = 802"] and legend(drawn) == []
    reward, win, lc = (rows_of(axis, ["a", "b", "c"])[""] for axis in drawn.axes)
    assert reward == {"a": (-4.0, -5.0, -2.0), "b": (5.25, 4.25, 7.25)}
    assert win == {"a": (30.0, 27.0, 34.0), "b": (40.0, 37.0, 44.0), "c": (55.0, 52.0, 59.0)}
    assert lc == {"a": (20.0, 19.0, 22.0), "c": (60.0, 59.0, 62.0)}
    assert [reference(axis) for axis in drawn.axes] == [None, 50, 50]
    assert [widths(axis) for axis in drawn.axes] == [[], [30.0, 40.0, 55.0], [20.0, 60.0]]
    texts = [["-4.00", "5.25"], ["30.0", "40.0", "55.0"], ["20.0", "60.0"]]
    assert [written(axis) for axis in drawn.axes] == texts


def test_settings_over_seeds_have_the_interval_over_prompts(tmp_path, capsys):
    runs = [winrate(20.0, 18.0, ci=[15.0, 22.0]), winrate(26.0, 31.0, ci=[27.0, 33.0])]
    files = [put(tmp_path / f"on_seed{k}.winrate.json", run) for k, run in enumerate(runs)]
    drawn = draw(tmp_path, capsys, "settings", *files)
    win, lc = (rows_of(axis, row_names(drawn))[""] for axis in drawn.axes)
    assert win == {"on n = 805": (24.5, 21.0, 27.5)}  # the means of the ends
    assert lc == {"on n = 805": (23.0, 22.0, 25.0)}
    assert all(reference(axis) is None for axis in drawn.axes)  # 50 is outside


def test_an_interval_that_misses_the_number_ends_at_it(tmp_path, capsys):
    """A percentile interval below its estimate; and two runs of which one has no interval."""
    files = [put(tmp_path / "a.winrate.json", winrate(None, 30.0, ci=[20.0, 29.0]))]
    files.append(put(tmp_path / "b_seed0.winrate.json", winrate(None, 40.0, ci=[39.0, 41.0])))
    files.append(put(tmp_path / "b_seed1.winrate.json", winrate(None, 60.0, ci=None)))
    drawn = draw(tmp_path, capsys, "settings", *files)
    rates = rows_of(drawn.axes[0], row_names(drawn))[""]
    assert rates == {"a n = 805": (30.0, 20.0, 30.0), "b n = 805": (50.0, 39.0, 50.0)}


# ----- categories
CATEGORIES = {
    "math": group(30.0, [21.0, 37.0], 31.0, [22.0, 39.0], 30),
    "tips, opinions or advice": group(20.0, [16.0, 27.0], 25.0, [21.0, 28.0], 700),
    "tiny": group(None, None, 50.0, None, 1),
}


def test_categories(tmp_path, capsys):
    files = [put(tmp_path / "on.winrate.json", winrate(22.0, categories=CATEGORIES))]
    other = {"math": group(24.0, [20.0, 28.0], 23.0, [19.0, 27.0], 30)}
    files.append(put(tmp_path / "off.winrate.json", winrate(21.0, categories=other)))
    drawn = draw(tmp_path, capsys, "categories", *files)
    assert labels(drawn) == [("LC win rate (%)", "")]
    assert row_names(drawn) == ["tips, opinions or advice n = 700", "math n = 30", "tiny n = 1"]
    assert rows_of(drawn.axes[0], ["tips", "math", "tiny"]) == {
        "on": {"tips": (20.0, 16.0, 27.0), "math": (30.0, 21.0, 37.0)},
        "off": {"math": (24.0, 20.0, 28.0)},
    }
    assert legend(drawn) == ["off", "on"]
    assert reference(drawn.axes[0]) is None  # 50 is outside
    off, on = [container[0].get_color() for container in drawn.axes[0].containers[::2]]
    assert on != off


def test_categories_of_seeds_without_length_control(tmp_path, capsys):
    files = []
    for seed, low in enumerate((10.0, 16.0)):
        categories = {"math": group(None, None, low + 5, [low, low + 8], 30)}
        files.append(put(tmp_path / f"on_seed{seed}.winrate.json", winrate(None, categories=categories)))
    drawn = draw(tmp_path, capsys, "categories", *files)
    assert labels(drawn) == [("win rate (%)", "")]
    assert rows_of(drawn.axes[0], ["math"]) == {"on": {"math": (18.0, 13.0, 21.0)}}


# ----- lengths
BINS = {
    "300 to 500.5": group(30.0, [25.0, 34.0], 1.0, [0.0, 2.0], 100),
    "10 to 110": group(20.0, [15.0, 24.0], 3.0, [2.0, 5.0], 200),
    "110 to 300": group(None, None, None, None, 0),
}


def test_lengths(tmp_path, capsys):
    files = [put(tmp_path / "on_seed1.winrate.json", winrate(22.0, length_bins=BINS))]
    files.append(put(tmp_path / "off.winrate.json", winrate(21.0, length_bins=BINS)))
    drawn = draw(tmp_path, capsys, "lengths", *files)
    assert labels(drawn) == [("characters of the answer", "LC win rate (%)")]
    curve = [(60.0, 20.0, 15.0, 24.0), (400.25, 30.0, 25.0, 34.0)]  # from left to right, mid-bin
    assert points(drawn.axes[0]) == {"off": curve, "on": curve}
    assert legend_texts(drawn) == ["off", "on", BARS[0]] and spreads(drawn.axes[0]) == []
    files.append(put(tmp_path / "x.winrate.json", winrate(None, length_bins=BINS)))
    drawn = draw(tmp_path, capsys, "lengths", *files)
    assert points(drawn.axes[0])["off"] == [(60.0, 3.0, 2.0, 5.0), (400.25, 1.0, 0.0, 2.0)]


def bins_of(edges, rates):
    """Length bins between edges, each with an interval from 4 below its rate to 6 above, or without one."""
    bins = {}
    for low, high, rate in zip(edges, edges[1:], rates):
        interval = None if rate is None else [rate - 4, rate + 6]
        bins[f"{low:g} to {high:g}"] = group(rate, interval, 50.0, [40.0, 60.0], 25)
    return bins


def test_lengths_over_seeds(tmp_path, capsys):
    """A setting's curve is the mean of its runs' first, second, ... bins, whose edges differ."""
    edges = [[0, 10, 30, 70, 200], [0, 20, 40, 80, 100], [2, 12, 50, 90, 120]]
    rates = [[50, 40, 60, 10], [53, 45, 61, None], [59, 50, 62, None]]
    files = []
    for seed, (bounds, numbers) in enumerate(zip(edges, rates)):
        result = winrate(22.0, length_bins=bins_of(bounds, numbers))
        files.append(put(tmp_path / f"on_seed{seed}.winrate.json", result))
    files.append(put(tmp_path / "off.winrate.json", winrate(21.0, length_bins=bins_of(edges[0], rates[0]))))
    files.append(put(tmp_path / "off_seed1.winrate.json", winrate(21.0)))  # without bins
    drawn = draw(tmp_path, capsys, "lengths", *files)
    curves = points(drawn.axes[0])
    assert list(curves) == ["off", "on"] and legend_texts(drawn) == ["off", "on", *BARS]
    assert curves["off"] == approx([(5, 50, 46, 56), (20, 40, 36, 46), (50, 60, 56, 66), (135, 10, 6, 16)])
    middles = [statistics.mean([5, 10, 7]), statistics.mean([20, 30, 31]), statistics.mean([50, 60, 70]), 110]
    means = [54, 45, 61, 10]  # the last of one run alone
    assert curves["on"] == approx([(x, y, y - 4, y + 6) for x, y in zip(middles, means)])
    sds = [statistics.stdev([50, 53, 59]), 5.0, 1.0]
    (numbers,) = spreads(drawn.axes[0])
    assert numbers == approx(list(zip(middles, means, sds)))


def test_lengths_of_runs_whose_bins_do_not_match(tmp_path, capsys):
    """Of many answers of one length evaluate.py leaves a bin out: which one, its name does not say."""
    files = []
    for seed, edges in enumerate(([0, 10, 30, 70], [0, 10, 30, 70, 90])):
        result = winrate(22.0, length_bins=bins_of(edges, [50, 51, 52, 53]))
        files.append(put(tmp_path / f"on_seed{seed}.winrate.json", result))
    said = refused(tmp_path, capsys, "lengths", *files)
    assert "runs of on have 3 and 4 length bins" in said and "give one of its runs" in said
    assert len(points(draw(tmp_path, capsys, "lengths", files[0]).axes[0])["on"]) == 3


# ----- ratio and filters
def swept(folder, name, rates, n_on=0, kept=None, **more):
    """Results and pairs of a setting, a rate for each seed; of 200 pairs n_on are on-policy."""
    files = []
    for seed, rate in enumerate(rates):
        run = name if len(rates) == 1 else f"{name}_seed{seed}"
        meta = pairs_meta({"pairs": 200, "on": n_on, "off": 200 - n_on}, args={"filter": kept})
        files.append(put(folder / f"{run}.pairs.meta.json", meta))
        files.append(put(folder / f"{run}.winrate.json", winrate(rate, 1.5 * rate, **more)))
    return files


def test_ratio(tmp_path, capsys):
    files = [*swept(tmp_path, "dpo_100", [26.0], 200), *swept(tmp_path, "dpo_0", [20.0, 25.0, 24.0], 0)]
    files += [*swept(tmp_path, "dpo_0.25", [30.0], 50), *swept(tmp_path, "hypo_1", [31.0], 200)]
    files += [put(tmp_path / "sft.winrate.json", winrate(10.0)), swept(tmp_path, "dpo_50", [9.0], 100)[0]]
    drawn = draw(tmp_path, capsys, "ratio", *files)
    assert labels(drawn) == [("on-policy share of the pairs", "LC win rate (%)")]
    curves = points(drawn.axes[0])
    # the interval over prompts, of seeds the mean of its ends: (19 + 24 + 23) / 3 and (22 + 27 + 26) / 3
    first = pytest.approx((0.0, 23.0, 22.0, 25.0))
    assert curves.pop("dpo") == [first, (0.25, 30.0, 29.0, 32.0), (1.0, 26.0, 25.0, 28.0)]
    assert curves == {"hypo": [(1.0, 31.0, 30.0, 33.0)]}
    assert legend_texts(drawn) == ["dpo", "hypo", *BARS]
    assert spreads(drawn.axes[0]) == [[pytest.approx((0.0, 23.0, statistics.stdev([20.0, 25.0, 24.0])))]]


def test_the_interval_over_prompts_is_seen_beside_two_seeds_that_agree(tmp_path, capsys):
    """Two seeds a point apart do not hide that 27 to 63 are possible."""
    files = swept(tmp_path, "on1", [44.0, 45.6], 200, lc_ci=[27.0, 63.0])
    drawn = draw(tmp_path, capsys, "ratio", *files)
    assert points(drawn.axes[0]) == {"on": [pytest.approx((1.0, 44.8, 27.0, 63.0))]}
    assert spreads(drawn.axes[0]) == [[pytest.approx((1.0, 44.8, 0.8 * 2**0.5))]]
    wide, narrow = [box for box in drawn.axes[0].containers if box.get_label() not in BARS]
    assert wide[2][0].get_linewidth()[0] > 2 * narrow[2][0].get_linewidth()[0]
    assert wide[2][0].get_color()[0][3] < narrow[2][0].get_color()[0][3]  # lighter


def test_ratio_by_win_rate_and_without_an_interval(tmp_path, capsys):
    files = [*swept(tmp_path, "on0", [20.0], 0, ci=None), *swept(tmp_path, "on100", [26.0], 200)]
    files += [
        put(tmp_path / "sft.winrate.json", winrate(None, 10.0))
    ]  # one result without LC: all by win rate
    drawn = draw(tmp_path, capsys, "ratio", *files)
    assert labels(drawn) == [("on-policy share of the pairs", "win rate (%)")]
    assert points(drawn.axes[0]) == {"on": [(0.0, 30.0, 30.0, 30.0), (1.0, 39.0, 36.0, 43.0)]}


@pytest.mark.parametrize("source, share", [("off", 0.0), ("on", 1.0)])
def test_ratio_of_pairs_of_one_source(tmp_path, capsys, source, share):
    result = put(tmp_path / "a.winrate.json", winrate(20.0))
    meta = put(tmp_path / "a.pairs.meta.json", pairs_meta({"pairs": 9, source: 9}))
    drawn = draw(tmp_path, capsys, "ratio", result, meta)
    assert points(drawn.axes[0]) == {"a": [(share, 20.0, 19.0, 22.0)]}


def test_filters(tmp_path, capsys):
    files = []
    for name, share, rate in (("quality", 0.4, 25.0), ("quality", 0.1, 21.0), ("random", 0.1, 19.0)):
        files += swept(tmp_path, f"{name}{share}", [rate], kept=[name, share])
    files += [*swept(tmp_path, "all", [30.0]), *swept(tmp_path, "s", [20.0, 22.0], kept=["random", 0.7])]
    drawn = draw(tmp_path, capsys, "filters", *files)
    assert labels(drawn) == [("share of the pairs kept", "LC win rate (%)")]
    curves = points(drawn.axes[0])
    assert curves["quality"] == [(0.1, 21.0, 20.0, 23.0), (0.4, 25.0, 24.0, 27.0)]
    assert curves["random"] == [(0.1, 19.0, 18.0, 21.0), (0.7, 21.0, 20.0, 23.0)]
    assert spreads(drawn.axes[0]) == [[pytest.approx((0.7, 21.0, 2**0.5))]]
    assert legend(drawn) == ["quality", "random"] == list(curves)


# ----- training
def shaded(axis):
    """{series: [(x, middle, low, high)]} of lines with a band."""
    curves = {}
    for line, band in zip(axis.lines, axis.collections, strict=True):
        x, middle = line.get_data()
        corners = band.get_paths()[0].vertices
        ends = [sorted(corners[corners[:, 0] == place, 1]) for place in x]
        low, high = [end[0] for end in ends], [end[-1] for end in ends]
        curves[line.get_label()] = list(zip(x, middle, low, high, strict=True))
    return curves


def test_training(tmp_path, capsys):
    dpo = {"margin": 0.5, "margin_std": 0.25, "diversity": -3.0, "diversity_std": 2.0}
    files = []
    (tmp_path / "dpo_seed0").mkdir()
    for name, more in (("dpo_seed0/metrics", dpo), ("sft.metrics", {"margin": None})):
        steps = [{"step": k, "tokens": 8, "loss": 0.75 - k, **more} for k in range(2)]
        files.append(write_rows(tmp_path / f"{name}.jsonl", steps))
    drawn = draw(tmp_path, capsys, "training", *files)
    names = ["loss", "margin", "intra-diversity (eq. 12), nats"]
    assert labels(drawn) == [("step", name) for name in names] and legend(drawn) == ["dpo_seed0", "sft"]
    loss, margin, diversity = map(shaded, drawn.axes)
    curve = [(0, 0.75, 0.75, 0.75), (1, -0.25, -0.25, -0.25)]
    assert loss == {"dpo_seed0": curve, "sft": curve}
    assert margin == {"dpo_seed0": [(k, 0.5, 0.25, 0.75) for k in range(2)]}
    assert diversity == {"dpo_seed0": [(k, -3.0, -5.0, -1.0) for k in range(2)]}


def test_training_of_many_steps_is_drawn_by_means(tmp_path, capsys):
    """Of 130 steps a point is the mean of three, the last of one."""
    steps = [{"step": k, "tokens": 8, "margin": k**2 / 100, "margin_std": float(k % 3)} for k in range(130)]
    del steps[1]["margin_std"]  # none known counts as 0
    drawn = draw(tmp_path, capsys, "training", write_rows(tmp_path / "a.metrics.jsonl", steps))
    (curve,) = shaded(drawn.axes[0]).values()
    expected = []
    for first in range(0, 130, 3):
        x = range(first, min(first + 3, 130))
        middle = statistics.mean([k**2 / 100 for k in x])
        std = statistics.mean([k % 3 for k in x]) if first else 2 / 3
        expected.append((statistics.mean(x), middle, middle - std, middle + std))
    assert len(curve) == 44 and curve == approx(expected)
    assert len(results.step_points(steps[:60], "margin")) == 60
    assert len(results.step_points(steps[:61], "margin")) == 31


# ----- shares and rewards
def test_shares(tmp_path, capsys):
    files = []
    for name, categories in (("alpaca", ["math"] * 5 + ["poems"] * 2 + [None]), ("uf", ["poems"] * 4)):
        rows = [{"id": str(k), "category": category} for k, category in enumerate(categories)]
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    drawn = draw(tmp_path, capsys, "shares", *files)
    assert labels(drawn) == [("share of the prompts (%)", "")]
    names = ["poems", "math", "None"]  # 6, 5 and 1 of all rows
    assert row_names(drawn) == names and legend(drawn) == ["alpaca.jsonl (n = 8)", "uf.jsonl (n = 4)"]
    shares = {"poems": 25.0, "math": 62.5, "None": 12.5}, {"poems": 100.0, "math": 0.0, "None": 0.0}
    expected = {
        name: {row: (share,) * 3 for row, share in series.items()}
        for name, series in zip(legend(drawn), shares)
    }
    assert rows_of(drawn.axes[0], names) == expected
    assert widths(drawn.axes[0]) == [0.0, 0.0, 12.5, 25.0, 62.5, 100.0]


def scored(path, on, off=(), labeler="rm:r"):
    responses = [
        {"text": f"{source} {k}", "source": source, "model": "m", "reward": reward}
        for source, rewards in (("on", on), ("off", off))
        for k, reward in enumerate(rewards)
    ]
    path.parent.mkdir(exist_ok=True)
    return write_rows(path, [{"id": "p", "prompt": "p", "responses": responses, "labeler": labeler}])


def test_rewards(tmp_path, capsys):
    """S1 Figs. 10, 11: on common edges the share of a curve's rewards between two edges."""
    files = [
        scored(tmp_path / "t0.7.jsonl", [0.0, 4.0, 4.0, None]),
        scored(tmp_path / "t3.jsonl", [-8.0], [-16.0]),
    ]
    drawn = draw(tmp_path, capsys, "rewards", *files)
    assert labels(drawn) == [("reward", "share of the responses")]
    names = [
        "t0.7.jsonl, on-policy (mean 2.67)",
        "t3.jsonl, on-policy (mean -8.00)",
        "t3.jsonl, off-policy (mean -16.00)",
    ]
    assert legend(drawn) == names
    curves = {patch.get_label(): patch.get_data() for patch in drawn.axes[0].patches}
    for name, (shares, edges, _) in curves.items():
        assert edges == pytest.approx([-16 + k / 2 for k in range(41)]), name
        assert sum(shares) == pytest.approx(1)
    cold, hot, off = (curves[name].values for name in names)
    assert {k: cold[k] for k in np.flatnonzero(cold)} == pytest.approx({32: 1 / 3, 39: 2 / 3})
    assert (list(np.flatnonzero(hot)), list(np.flatnonzero(off))) == ([16], [0])


@pytest.mark.parametrize("name", ["rewards", "shares"])
def test_files_of_one_name_are_two_series(tmp_path, capsys, name):
    files = [scored(tmp_path / folder / "s.jsonl", [1.0, 2.0]) for folder in "ab"]
    if name == "shares":
        for path, category in zip(files, ("math", "poems")):
            write_rows(path, [{"category": category}])
    assert len(legend(draw(tmp_path, capsys, name, *files))) == 2


def test_rewards_of_different_labelers(tmp_path, capsys):
    files = [scored(tmp_path / f"{name}.jsonl", [1.0, 2.0], labeler=name) for name in "ab"]
    assert "different labelers" in refused(tmp_path, capsys, "rewards", *files)


# ----- length
def answers(path, *prompts, labeler="rm:r"):
    """A row per prompt, of (source, characters, reward)."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for k, responses in enumerate(prompts):
        responses = [{"text": "x" * n, "source": source, "reward": reward} for source, n, reward in responses]
        lines.append({"id": f"p{k}", "prompt": "p", "responses": responses, "labeler": labeler})
    return write_rows(path, lines)


def pairs_of(path, *pairs):
    """A pair per (source, characters chosen, characters rejected)."""
    lines = []
    for k, (source, *sizes) in enumerate(pairs):
        chosen, rejected = ([{"role": "assistant", "content": "x" * n}] for n in sizes)
        lines.append({"id": f"p{k}", "chosen": chosen, "rejected": rejected, "source": source})
    return write_rows(path, lines)


def test_reward_over_length(tmp_path, capsys):
    """Bins of ten responses of a source; of one response a prompt the interval is 1.96 s / sqrt(n)."""
    prompts = [[("on", 10 * k, k % 10 + 100.0 * (k // 10)), ("off", 7, 1.0 * k)] for k in range(30)]
    random.Random(0).shuffle(prompts)
    prompts.append([("on", 99999, None)])
    drawn = draw(tmp_path, capsys, "length", answers(tmp_path / "scored.jsonl", *prompts))
    assert labels(drawn) == [("characters of the answer", "mean reward")]
    curves = points(drawn.axes[0])
    half = 1.96 * statistics.stdev(range(10)) / 10**0.5
    middles = [(100.0 * k + 45, 100.0 * k + 4.5) for k in range(3)]
    assert curves["on-policy"] == approx([(x, y, y - half, y + half) for x, y in middles])
    half = 1.96 * statistics.stdev(range(30)) / 30**0.5
    assert curves["off-policy"] == approx([(7.0, 14.5, 14.5 - half, 14.5 + half)])  # all of one length
    assert legend_texts(drawn) == ["on-policy", "off-policy", BARS[0]]
    r = np.corrcoef(range(30), [k % 10 + 100.0 * (k // 10) for k in range(30)])[0, 1]
    title = f"on-policy: 30 responses, correlation {r:.2f}\noff-policy: 30 responses"
    assert drawn.axes[0].get_title(loc="left") == title


def test_answers_of_one_prompt_err_together(tmp_path, capsys):
    """Four equal answers to each prompt tell no more than one, over two files as well as in one."""
    rewards = [0.5, 2.0, -1.0, 4.0, 0.0]
    prompts = [[("off", 9, reward)] * 4 for reward in rewards]
    files = [answers(tmp_path / "a.jsonl", *[prompt[:2] for prompt in prompts])] * 1
    files.append(answers(tmp_path / "b.jsonl", *[prompt[2:] for prompt in prompts]))
    (point,) = points(draw(tmp_path, capsys, "length", *files).axes[0])["off-policy"]
    half = 1.96 * statistics.stdev(rewards) / 5**0.5
    assert point == pytest.approx((9.0, 1.1, 1.1 - half, 1.1 + half))
    # unequal numbers: the jackknife over prompts is another estimate of the same error
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 150, 600)
    values = rng.normal(size=150)[prompts] + rng.normal(size=600)
    mean, low, high = rows.mean_over_prompts(values, prompts)
    assert (mean, (low + high) / 2) == pytest.approx((values.mean(), values.mean()))
    means = np.array([values[prompts != k].mean() for k in np.unique(prompts)])
    error = np.sqrt((len(means) - 1) / len(means) * ((means - means.mean()) ** 2).sum())
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.02)
    assert (high - low) / 2 > 1.5 * 1.96 * values.std() / 600**0.5  # what 600 prompts would tell


def test_lengths_are_of_answers(tmp_path, capsys):
    row = {"id": "p", "prompt": "p", "responses": [], "labeler": "rm:r"}
    for k, one in enumerate([{"text": "abcdef"}] * 3):
        row["responses"].append(thinking(one | {"source": "on", "reward": 1.0}, k))
    assert len({len(one["text"]) for one in row["responses"]}) == 3
    thought = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nlong\n</think>\nabc"},
    ]
    pair = {"chosen": thought, "rejected": "a"}
    files = [write_rows(tmp_path / "a.jsonl", [row]), write_rows(tmp_path / "pairs.jsonl", [pair])]
    drawn = draw(tmp_path, capsys, "length", *files)
    assert points(drawn.axes[0]) == {"on-policy": [(6.0, 1.0, 1.0, 1.0)]}
    assert drawn.axes[1].get_title(loc="left") == "no source: 1 pairs, mean +2 (95 %: +2 to +2)"


def test_chosen_minus_rejected_length(tmp_path, capsys):
    """Shares of 100 differences -50, ..., 49 off-policy, of 4 of +20 on-policy, in bins of all of them."""
    pairs = [("off", 100 + gap, 100) for gap in range(-50, 50)] + [("on", 30, 10)] * 4
    drawn = draw(tmp_path, capsys, "length", pairs_of(tmp_path / "p.jsonl", *pairs))
    (axis,) = drawn.axes
    assert labels(drawn) == [("characters: chosen minus rejected", "share of the pairs")]
    assert legend_texts(drawn) == ["on-policy", "off-policy"] and reference(axis) == 0
    on, off = (patch.get_data() for patch in axis.patches)
    together = sorted([*range(-50, 50), 20, 20, 20, 20])
    low, high = np.percentile(together, 0.5), np.percentile(together, 99.5)
    assert (on.edges[0], on.edges[-1], len(on.values)) == pytest.approx((low, high, 10))
    for bins, gaps in ((on, [20] * 4), (off, range(-50, 50))):
        for k in range(10):
            first, last = bins.edges[k : k + 2]
            inside = [first <= min(max(gap, low), high) < last + (k == 9) for gap in gaps]
            assert bins.values[k] == pytest.approx(sum(inside) / len(gaps))
    half = 1.96 * statistics.stdev(range(100)) / 10
    lines = axis.get_title(loc="left").splitlines()
    interval = f"95 %: {-0.5 - half:+.0f} to {-0.5 + half:+.0f}"
    assert lines[0] == "on-policy: 4 pairs, mean +20 (95 %: +20 to +20)"
    assert lines[1] == f"off-policy: 100 pairs, mean -0 ({interval})"


def test_a_few_long_answers_leave_room_for_the_others(tmp_path, capsys):
    pairs = [("on", 500 + k % 7, 500) for k in range(1000)] + [("on", 90_000, 1), ("on", 1, 90_000)]
    (axis,) = draw(tmp_path, capsys, "length", pairs_of(tmp_path / "p.jsonl", *pairs)).axes
    (bins,) = (patch.get_data() for patch in axis.patches)
    assert (bins.edges[0], bins.edges[-1]) == (0, 6) and sum(bins.values) == pytest.approx(1)
    assert bins.values[-1] == pytest.approx((142 + 1) / 1002)


def test_length_of_responses_and_pairs_together(tmp_path, capsys):
    """Files of both kinds in any order: two panels, in which a source has one colour and one name."""
    scored = answers(tmp_path / "s.jsonl", *[[("on", 5 + k, 1.0), ("off", 9, 0.5)] for k in range(5)])
    pairs = pairs_of(tmp_path / "p.jsonl", ("cross", 5, 9), ("off", 9, 5), ("on", 1, 2))
    for files in ([scored, pairs], [pairs, scored]):
        drawn = draw(tmp_path, capsys, "length", *files)
        assert legend(drawn) == ["on-policy", "off-policy", "cross-source"]
        left, right = drawn.axes
        colours = {box.get_label(): box[0].get_color() for box in left.containers if box[0] is not None}
        for patch in right.patches[:2]:
            assert to_hex(patch.get_edgecolor()) == to_hex(colours[patch.get_label()])
        assert len({to_hex(patch.get_edgecolor()) for patch in right.patches}) == 3


def test_length_of_files_that_the_scripts_write(tmp_path, capsys, tmp_path_factory):
    files, scored = real_files(tmp_path_factory.getbasetemp())
    capsys.readouterr()
    pairs = scored.parent / "on50.pairs.jsonl"
    stats = json.loads(files[2].read_text())["stats"]
    drawn = draw(tmp_path, capsys, "length", scored, pairs)
    lines = drawn.axes[1].get_title(loc="left").splitlines()
    assert [line.partition(",")[0] for line in lines] == ["on-policy: 8 pairs", "off-policy: 8 pairs"]
    mean = stats["chosen characters"]["mean"] - stats["rejected characters"]["mean"]
    gaps = {"on": [], "off": []}
    for pair in map(json.loads, pairs.read_text().splitlines()):
        gaps[pair["source"]].append(len(pair["chosen"][0]["content"]) - len(pair["rejected"][0]["content"]))
    assert statistics.mean(gaps["on"] + gaps["off"]) == pytest.approx(mean)
    for line, numbers in zip(lines, gaps.values()):
        assert f"mean {statistics.mean(numbers):+.0f} (95 %" in line
    curves = points(drawn.axes[0])
    assert {name: len(curve) for name, curve in curves.items()} == {"on-policy": 3, "off-policy": 6}


@pytest.mark.parametrize("files", [["a", "b"], ["b", "a"]])
def test_length_of_rewards_of_different_labelers(tmp_path, capsys, files):
    paths = [answers(tmp_path / f"{name}.jsonl", [("on", 3, 1.0)], labeler=name) for name in files]
    assert "rewards of different labelers: a and b" in refused(tmp_path, capsys, "length", *paths)


# ----- series, names and files
def test_series_are_told_apart():
    styles = [tuple(figure.style_of(k).values()) for k in range(28)]
    assert len(set(styles)) == 28 and len({colour for colour, _, _ in styles[:7]}) == 7
    assert [{line for _, line, _ in styles[k : k + 7]} for k in (0, 7, 14, 21)] == [
        {"-"},
        {"--"},
        {"-."},
        {":"},
    ]


def test_a_series_looks_the_same_in_all_panels(tmp_path, capsys):
    files = []
    for k in range(9):
        more = {"margin": 1.0} if k % 2 else {}
        steps = [{"step": step, "tokens": 1, "loss": float(k), **more} for step in range(2)]
        files.append(write_rows(tmp_path / f"m{k}.metrics.jsonl", steps))
    loss, margin = draw(tmp_path, capsys, "training", *files).axes
    styles = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in loss.lines}
    assert len(set(styles.values())) == 9
    assert {line.get_label(): (line.get_color(), line.get_linestyle()) for line in margin.lines} == {
        f"m{k}": styles[f"m{k}"] for k in range(1, 9, 2)
    }


# ----- the layout
LONG = "Llama-3.1-8B-Instruct-off-on_rejected"


def crowded(drawn):
    """What is cut off, flat, or over something else."""
    FigureCanvasAgg(drawn).draw()
    frame, faults = drawn.bbox, []
    rows = [label for label in drawn.axes[0].get_yticklabels() if "\n" in label.get_text()]
    texts = rows + [text for box in drawn.legends for text in box.get_texts()]
    for axis in drawn.axes:
        texts += [axis.xaxis.label, axis.yaxis.label, *axis.texts]
        panel = axis.get_tightbbox()
        if axis.get_window_extent().height < drawn.dpi:
            faults.append(f"{axis.get_ylabel()}: lower than an inch")
        faults += [
            "the legend covers a panel" for box in drawn.legends if box.get_window_extent().overlaps(panel)
        ]
    for text in texts:
        box = text.get_window_extent()
        if text.get_text() and not (frame.x0 <= box.x0 and box.x1 <= frame.x1):
            faults.append(f"cut off at a side: {text.get_text()!r}")
        if text.get_text() and not (frame.y0 <= box.y0 and box.y1 <= frame.y1):
            faults.append(f"cut off above or below: {text.get_text()!r}")
    for upper, lower in zip(rows, rows[1:]):
        if upper.get_window_extent().y0 < lower.get_window_extent().y1:
            faults.append(f"{lower.get_text()!r} begins before {upper.get_text()!r} ends")
    return faults


@pytest.mark.parametrize(
    "name, count",
    [
        ("settings", 20),
        ("categories", 6),
        ("lengths", 1),
        ("lengths", 2),
        ("training", 20),
        ("rewards", 2),
        ("rewards", 6),
        ("shares", 6),
        ("ratio", 12),
    ],
)
def test_long_names_have_room(tmp_path, capsys, name, count):
    files = []
    for k in range(count):
        result = winrate(22.0, categories=CATEGORIES, length_bins=BINS, reward=1.0, reward_ci=[0, 2])
        steps = [{"step": step, "tokens": 1, "loss": 0.6, "margin": k, "diversity": k} for step in range(2)]
        if name == "training":
            files.append(write_rows(tmp_path / f"{LONG}_{k}.metrics.jsonl", steps))
        elif name == "shares":
            rows = [{"category": category} for category in CATEGORIES]
            files.append(write_rows(tmp_path / f"{LONG}_{k}.jsonl", rows))
        elif name == "ratio":
            files += swept(tmp_path, f"{LONG}_{k}_x0", [20.0, 30.0 + k])
            files += swept(tmp_path, f"{LONG}_{k}_x1", [25.0, 31.0 + k], 200)
        elif name == "rewards":
            files.append(scored(tmp_path / f"{LONG}_{k}.jsonl", [k, 2.0], [1.0 + k]))
        else:
            files.append(put(tmp_path / f"{LONG}_{k}.winrate.json", result))
    drawn = draw(tmp_path, capsys, name, *files)
    assert crowded(drawn) == []
    names = "".join(row_names(drawn) if name == "settings" else legend(drawn)).replace(" ", "")
    assert all(f"{LONG}_{k}" in names for k in range(count))


def test_the_longest_category_of_s1_has_room(tmp_path, capsys):
    longest = "factual information (general or professional), history or common practices"
    groups = {
        name: group(30.0, [21.0, 37.0], 31.0, [22.0, 39.0], 9)
        for name in (longest, "analysis or decision explanation")
    }
    drawn = draw(
        tmp_path, capsys, "categories", put(tmp_path / "a.winrate.json", winrate(22.0, categories=groups))
    )
    assert crowded(drawn) == []


def test_bars_of_more_than_seven_series_are_told_apart(tmp_path, capsys):
    files = [put(tmp_path / f"m{k}.winrate.json", winrate(9.0, categories=CATEGORIES)) for k in range(8)]
    (axis,) = draw(tmp_path, capsys, "categories", *files).axes
    lines = [container[0] for container in axis.containers if isinstance(container, ErrorbarContainer)]
    assert len({(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in lines}) == 8


@pytest.mark.parametrize("out", ["figure.png", "figure.pdf", "figure"])
def test_two_files_whatever_the_ending(tmp_path, capsys, out):
    draw(tmp_path, capsys, "settings", put(tmp_path / "a.winrate.json", winrate(20.0)), out=out)


@pytest.mark.parametrize("out", ["llama-3.1-8B.png", "llama-3.1-8B"])
def test_a_dot_in_the_name_of_a_figure(tmp_path, capsys, out):
    file = put(tmp_path / "a.winrate.json", winrate(20.0))
    figure.main(figure.parse_args(["settings", str(file), "--out", str(tmp_path / "out" / out)]))
    names = [str(tmp_path / "out" / f"llama-3.1-8B.{ending}") for ending in ("pdf", "png")]
    assert sorted(map(str, (tmp_path / "out").iterdir())) == names
    assert sorted(json.loads(capsys.readouterr().out)["out"]) == names


# ----- files of another kind
WRONG = {
    "a.winrate.json": winrate(20.0),
    "bare.winrate.json": winrate(None, ci=None),
    "flat.winrate.json": winrate(None, categories={"math": group(None, None, 20.0, None, 1)}),
    "a.pairs.meta.json": pairs_meta({"on": 1, "off": 1}),
    "b.pairs.meta.json": pairs_meta({"on": 1, "off": 1}),
    "a.benchmarks.json": benchmarks(65.0, arc=(50.0, 1.25)),
    "a.boundary.json": boundary_of(0.4),
    "a.metrics.jsonl": json.dumps({"step": 0, "tokens": 5}) + "\n",
    "empty.jsonl": "",
    "rows.jsonl": json.dumps({"id": "1", "prompt": "p", "responses": []}) + "\n",
    "unscored.jsonl": json.dumps({"id": "1", "prompt": "p", "responses": [{"text": "a", "source": "on"}]}),
    "null.jsonl": json.dumps(
        {"id": "1", "prompt": "p", "responses": [{"text": "a", "source": "on", "reward": None}]}
    ),
}
WRONG |= {
    "one_side.jsonl": json.dumps({"id": "1", "chosen": "a"}),
    "no_message.jsonl": json.dumps({"id": "1", "chosen": [], "rejected": "a"}),
}
NO_RATES = "expected results of evaluate.py (NAME.winrate.json), found none"
NO_SWEEP = "expected NAME.winrate.json with NAME.pairs.meta.json, found no setting with both"
NO_STEPS = "expected metrics.jsonl with loss, margin or diversity, found none"


@pytest.mark.parametrize(
    "name, files, sentence",
    [
        ("settings", ["a.pairs.meta.json", "a.boundary.json"], NO_RATES),
        ("settings", ["bare.winrate.json"], "with intervals over prompts, found none"),
        ("settings", ["rows.jsonl"], "{rows.jsonl}: expected a result, a meta file or metrics.jsonl: "),
        ("categories", ["a.benchmarks.json", "a.metrics.jsonl"], NO_RATES),
        (
            "categories",
            ["a.winrate.json"],
            "expected results with categories (scorers/category.py), found none",
        ),
        ("lengths", ["a.boundary.json"], NO_RATES),
        ("categories", ["flat.winrate.json"], "no result has an interval over prompts"),
        ("lengths", ["a.winrate.json"], "expected length bins with intervals over prompts, found none"),
        ("ratio", ["a.pairs.meta.json"], NO_RATES),
        ("ratio", ["a.winrate.json", "b.pairs.meta.json"], NO_SWEEP),
        ("filters", ["a.winrate.json", "a.pairs.meta.json"], NO_SWEEP),
        ("training", ["a.winrate.json"], NO_STEPS),
        ("training", ["a.metrics.jsonl"], NO_STEPS),
        ("training", ["rows.jsonl"], "{rows.jsonl}: expected a result, a meta file or metrics.jsonl: "),
        ("shares", ["a.winrate.json"], "{a.winrate.json}:1: "),
        ("shares", ["rows.jsonl"], "{rows.jsonl}:1: "),
        ("shares", ["empty.jsonl"], "{empty.jsonl}: expected JSON lines, found no file or an empty one"),
        ("rewards", ["a.winrate.json"], "{a.winrate.json}:1: "),
        ("rewards", ["unscored.jsonl"], "{unscored.jsonl}:1: "),
        ("rewards", ["null.jsonl", "rows.jsonl"], "{null.jsonl}, {rows.jsonl}: no response has a reward"),
        (
            "length",
            ["a.winrate.json"],
            '{a.winrate.json}:1: expected "responses", or "chosen" and "rejected"',
        ),
        ("length", ["one_side.jsonl"], "{one_side.jsonl}:1: expected "),
        ("length", ["no_message.jsonl"], "{no_message.jsonl}:1: "),
        ("length", ["unscored.jsonl"], "{unscored.jsonl}:1: "),
        (
            "length",
            ["null.jsonl", "rows.jsonl"],
            "{null.jsonl}, {rows.jsonl}: expected responses with rewards",
        ),
        ("length", ["empty.jsonl"], "{empty.jsonl}: expected JSON lines, found no file or an empty one"),
        ("rewards", ["nobody.jsonl"], "{nobody.jsonl}: expected JSON lines, found no file or an empty one"),
    ],
)
def test_files_of_another_kind(tmp_path, capsys, name, files, sentence):
    for file, content in WRONG.items():
        put(tmp_path / file, content)
        sentence = sentence.replace("{" + file + "}", str(tmp_path / file))
    sentence = sentence.replace("{nobody.jsonl}", str(tmp_path / "nobody.jsonl"))
    assert sentence in refused(tmp_path, capsys, name, *(tmp_path / file for file in files))


def test_help_and_wrong_flags_do_not_wait_for_matplotlib():
    for words, status in (["--help"], 0), (["pies", "a.json", "--out", "a.png"], 2):
        code = f"""
import sys
sys.path.insert(0, {str(REPO / "report")!r})
import figure
try:
    figure.parse_args({words!r})
except SystemExit as error:
    print(error.code, "matplotlib" in sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{status} False", done.stderr


def test_an_out_that_cannot_be_written(tmp_path, capsys):
    file = put(tmp_path / "a.winrate.json", winrate(20.0))
    put(tmp_path / "out", "a file, not a folder")
    with pytest.raises(SystemExit) as end:
        figure.main(figure.parse_args(["settings", str(file), "--out", str(tmp_path / "out" / "a.png")]))
    assert end.value.code == 2
    assert f"--out {tmp_path / 'out' / 'a.png'} cannot be written: " in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file, not a folder"


def test_a_figure_that_there_is_not(capsys):
    with pytest.raises(SystemExit) as end:
        figure.parse_args(["pies", "a.json", "--out", "a.png"])
    assert end.value.code == 2 and "invalid choice: 'pies'" in capsys.readouterr().err


BAD = [
    ("ratio", {"a.winrate.json": winrate(20.0), "a.pairs.meta.json": pairs_meta({"on": 0, "off": 0})}, None),
    ("ratio", {"a.winrate.json": winrate(20.0), "a.pairs.meta.json": pairs_meta({"pairs": 9})}, None),
    (
        "filters",
        {
            "a.winrate.json": winrate(20.0),
            "a.pairs.meta.json": pairs_meta({}, args={"filter": "quality:0.4"}),
        },
        "a.pairs.meta.json",
    ),
    (
        "training",
        {"a.metrics.jsonl": json.dumps({"step": 0, "tokens": 5, "loss": "x"}) + "\n"},
        "a.metrics.jsonl",
    ),
]


@pytest.mark.parametrize("name, files, where", BAD)
def test_numbers_that_cannot_be_drawn(tmp_path, capsys, name, files, where):
    paths = [put(tmp_path / file, content) for file, content in files.items()]
    sentence = str(tmp_path / where) if where else "found no setting with both"
    assert sentence in refused(tmp_path, capsys, name, *paths)


# ----- files that the scripts write
def test_files_that_the_scripts_write(tmp_path, capsys, tmp_path_factory):
    files, rows = real_files(tmp_path_factory.getbasetemp())
    capsys.readouterr()
    result = json.loads(files[0].read_text())
    drawn = draw(tmp_path, capsys, "settings", *files)
    assert rows_of(drawn.axes[1], ["on50"])[""]["on50"] == approx([(result["win_rate"], *result["ci"])])[0]
    drawn = draw(tmp_path, capsys, "categories", *files)
    assert row_names(drawn) == ["math n = 12", "poems n = 4"]
    (series,) = rows_of(drawn.axes[0], ["math", "poems"]).values()
    for name, rates in result["categories"].items():
        assert series[name] == pytest.approx((rates["length_controlled_winrate"], *rates["lc_ci"]))
    assert len(points(draw(tmp_path, capsys, "lengths", *files).axes[0])["on50"]) == 4
    ((numbers,),) = points(draw(tmp_path, capsys, "ratio", *files).axes[0]).values()
    assert numbers[:2] == pytest.approx((0.5, result["length_controlled_winrate"]))
    assert legend(draw(tmp_path, capsys, "shares", rows)) == ["scored.jsonl (n = 16)"]
    assert len(legend(draw(tmp_path, capsys, "rewards", rows))) == 2
