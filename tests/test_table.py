"""
report/table.py and runs.py: results -> tables in Markdown and CSV.

Covers  names and order of settings and runs; numbers over seeds; the baseline's 50; gains and S2's delta from
        the published rates (S2 Tables 1, 4, 5); groups, benchmarks, boundaries, pair sets (S3 Table 5),
        compute, the paper's columns; report.md beside the CSV files; every key of every file missing or of
        another type; files that evaluate.py, boundary.py and build_pairs.py write.
Run     python -m pytest tests/test_table.py
"""

import copy
import csv
import json
import shutil
import statistics
import sys
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from conftest import REPO, write_rows
from test_shapes import MISSING, VALUES

import boundary
import build_pairs
import evaluate
from recipes import benchmarks as recipe

sys.path.insert(0, str(REPO / "report"))
import runs  # noqa: E402
import table  # noqa: E402


# ----- files and reports
def put(path, content):
    """A file with this JSON or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def winrate(lc, win=30.0, **more):
    """A result as evaluate.py writes it."""
    result = {"kind": "winrate", "model": "out/m", "baseline": "models/gpt4", "by": "wins"}
    result |= {"labelers": ["judge:gpt"], "win_rate": win, "ci": [win - 3, win + 4], "standard_error": 1.5}
    if lc is not None:
        result |= {"length_controlled_winrate": lc, "lc_ci": [lc - 1, lc + 2]}
        result["formula"] = "length_controlled_v1"
    result |= {"n_total": 805, "avg_length": 1900, "avg_length_baseline": 2000}
    return result | {"reward": None, "reward_ci": None, "reward_baseline": None} | more


def benchmarks(average, suite="simplemix", **scores):
    """A result as recipes/benchmarks.py writes it; scores: task=(score, standard error)."""
    tasks = {task: {"score": score, "stderr": error, "n": 1172} for task, (score, error) in scores.items()}
    return {"kind": "benchmarks", "suite": suite, "model": "out/m", "average": average, "tasks": tasks}


def boundary_of(score, **more):
    """A result as boundary.py writes it, of 8,000 comparisons."""
    v_on = round(8000 * score)
    stage, use = ("injection", "off") if score < 0.5 else ("fine-tuning", "on")
    result = {"kind": "boundary", "v_on": v_on, "v_off": 8000 - v_on, "ties": 3, "score": score}
    result |= {"ci": [score - 0.015, score + 0.012], "n_prompts": 2000, "stage": stage, "use": use}
    result["length_matched"] = {"score": score - 0.05, "ci": [score - 0.08, score - 0.02]}
    return result | {"distinct": {"sum": 0.9106, "mean": 0.5, "n_prompts": 2000}} | more


def category_of(score):
    """What boundary.py writes of a category of 200 comparisons, all of other prompts."""
    result = {"v_on": 200 * score, "v_off": 200 - 200 * score, "ties": 1, "score": score}
    return result | {"ci": [score - 0.1, score + 0.1], "n_prompts": 200, "stage": "injection", "use": "off"}


def pairs_meta(counts, stats=None, **more):
    """A record as build_pairs.py writes it."""
    return {"args": {"filter": None}, "counts": counts, "stats": stats or {}, "seconds": 2.0} | more


def parse_markdown(lines):
    """Header and rows of a table in Markdown, whose lines must be of one length."""
    assert len(set(map(len, lines))) == 1, lines
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert set("".join(rows.pop(1))) == {"-"}
    return rows


def report(folder, capsys, *words):
    """{table: [{column: cell}]} of report.md, which is what is printed and what the CSV files have."""
    out = folder / "report"
    for path in out.glob("*.csv"):
        path.unlink()
    table.main(table.parse_args([*map(str, words), "--out", str(out)]))
    printed, said = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    text = (out / "report.md").read_text()
    assert text == printed + "\n" and text.startswith("# Report\n")
    tables = {}
    for section in text.split("\n## ")[1:]:
        name, *lines = section.splitlines()
        header, *rows = parse_markdown([line for line in lines if line.startswith("|")])
        with open(out / f"{name}.csv", newline="") as file:
            assert list(csv.reader(file)) == [header, *rows]
        tables[name] = [dict(zip(header, row, strict=True)) for row in rows]
    assert {path.stem for path in out.glob("*.csv")} == set(tables)
    lengths = {name: len(lines) for name, lines in tables.items()}
    assert json.loads(said) == {"out": str(out), "tables": lengths}
    return tables


def refused(folder, capsys, *words):
    """The one sentence of a run that ends with status 2 before it writes anything."""
    with pytest.raises(SystemExit) as end:
        table.main(table.parse_args([*map(str, words), "--out", str(folder / "report")]))
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1, said
    assert not (folder / "report").exists()
    return said.err


def cells(line, *columns):
    return [line.get(column, "") for column in columns]


def by_setting(lines):
    return {line["setting"]: line for line in lines}


# ----- settings and their runs
@pytest.mark.parametrize(
    "path, name, run",
    [
        ("out/on50.winrate.json", "on50", "on50"),
        ("out/on50_seed01.winrate.json", "on50", "on50_seed1"),
        ("out/on50_seed12.winrate.json", "on50", "on50_seed12"),
        ("a_seed1/on50_seed0.benchmarks.json", "on50", "on50_seed0"),
        ("policy.boundary.json", "policy", "policy"),
        ("out/on50_seed3.pairs.meta.json", "on50", "on50_seed3"),
        ("out/on50.meta.json", "on50", "on50"),
        ("out/on50_seed1.metrics.jsonl", "on50", "on50_seed1"),
        ("out/on50_seed1/metrics.jsonl", "on50", "on50_seed1"),
        ("out/on50/metrics.meta.json", "on50", "on50"),
        ("dpo_0.5_seed2.winrate.json", "dpo_0.5", "dpo_0.5_seed2"),
        ("Llama-3.1-8B_seed0/metrics.jsonl", "Llama-3.1-8B", "Llama-3.1-8B_seed0"),
        ("Llama-3.1-8B.json", "Llama-3.1-8B", "Llama-3.1-8B"),
        ("on50_seed.winrate.json", "on50_seed", "on50_seed"),
        ("on50_seed1_greedy.winrate.json", "on50_seed1_greedy", "on50_seed1_greedy"),
        ("_seed1.winrate.json", "_seed1", "_seed1"),
    ],
)
def test_setting_and_run_of_a_file(path, name, run):
    assert runs.setting_and_run(path) == (name, run)


def test_metrics_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "on50_seed1").mkdir()
    monkeypatch.chdir(tmp_path / "on50_seed1")
    assert runs.setting_and_run("metrics.jsonl") == ("on50", "on50_seed1")


RUNS = [  # three seeds; the second has no interval
    winrate(20.0, 18.0, ci=[15.0, 22.5], lc_ci=[17.0, 24.5], reward=-2.0, standard_error=1.0, n_total=805),
    winrate(23.5, 22.0, ci=None, lc_ci=None, reward=-1.5, standard_error=1.5, n_total=801, avg_length=1930),
    winrate(29.0, 31.0, ci=[27.0, 34.0], lc_ci=[25.5, 33.0], reward=0.8, standard_error=2.9, n_total=803),
]


def test_a_setting_is_the_mean_of_its_runs(tmp_path, capsys):
    files = [put(tmp_path / f"on50_seed{k}.winrate.json", run) for k, run in enumerate(RUNS)]
    files.append(put(tmp_path / "on.winrate.json", winrate(40.0, 41.0)))
    lines = by_setting(report(tmp_path, capsys, *files)["settings"])
    assert list(lines) == ["gpt4", "on", "on50"]
    seeds, single = lines["on50"], lines["on"]
    for column, key in (("LC", "length_controlled_winrate"), ("win rate", "win_rate")):
        values = [run[key] for run in RUNS]
        assert seeds[column] == f"{statistics.mean(values):.2f}"
        assert seeds[f"{column} sd"] == f"{statistics.stdev(values):.2f}"  # n - 1 below
    # over the two runs that have an interval: (17 + 25.5) / 2 and (24.5 + 33) / 2; (15 + 27) / 2 and ...
    assert cells(seeds, "LC 95 %", "win rate 95 %") == ["21.2 to 28.8", "21.0 to 28.2"]
    for column, key, form in (
        ("standard error", "standard_error", ".2f"),
        ("reward", "reward", ".2f"),
        ("characters", "avg_length", ".0f"),
        ("prompts", "n_total", ".0f"),
    ):
        assert seeds[column] == format(statistics.mean([run[key] for run in RUNS]), form)
    assert cells(seeds, "runs", "judge", "formula of LC") == ["3", "judge:gpt", "length_controlled_v1"]
    assert cells(single, "runs", "LC", "LC 95 %", "LC sd") == ["1", "40.00", "39.0 to 42.0", ""]
    assert cells(single, "win rate", "win rate 95 %", "win rate sd") == ["41.00", "38.0 to 45.0", ""]


def test_runs_are_told_apart_by_their_numbers_alone(tmp_path, capsys):
    """Seeds in any order and place are the same setting; a name without a seed is one more run of it."""
    names = ["b/on50_seed7", "a/on50_seed0", "on50"]
    files = [put(tmp_path / f"{name}.winrate.json", run) for name, run in zip(names, RUNS)]
    _, line = report(tmp_path, capsys, *files, files[0])["settings"]  # a file given twice is one file
    assert cells(line, "setting", "runs", "LC") == ["on50", "3", "24.17"]


@pytest.mark.parametrize(
    "content, kind",
    [
        (winrate(20.0), "winrate"),
        (boundary_of(0.4), "boundary"),
        (pairs_meta({"pairs": 3}), "pairs"),
        (benchmarks(1.0, arc=(1.0, None)), "benchmarks_simplemix"),
    ],
)
def test_the_same_setting_twice_is_refused(tmp_path, capsys, content, kind):
    ending = "pairs.meta.json" if kind == "pairs" else "json"
    files = [put(tmp_path / folder / f"on50_seed1.{ending}", content) for folder in "ab"]
    said = refused(tmp_path, capsys, *files)
    advice = "name the runs of a setting NAME_seed0, ..."
    assert f"{files[1]}: on50_seed1 already has a {kind} result; {advice}" in said


def test_a_result_without_length_control(tmp_path, capsys):
    file = put(tmp_path / "a.winrate.json", winrate(None, 30.0, by="reward", labelers=[]))
    baseline, line = report(tmp_path, capsys, file)["settings"]
    assert not {"LC", "LC 95 %", "formula of LC", "reward", "gain", "win rate sd"} & set(line)
    assert cells(baseline, "setting", "win rate") == ["gpt4", "50.00"]
    assert cells(line, "win rate", "win rate 95 %", "judge") == ["30.00", "27.0 to 34.0", "reward"]


# ----- the order of settings
@pytest.mark.parametrize(
    "names",
    [
        ["on_0", "on_0.25", "on_0.5", "on_1", "on_10"],
        ["on", "on2", "on10", "on10a", "on10b"],
        ["beta_0.01_lr_5e-7", "beta_0.01_lr_1e-6", "beta_0.1_lr_5e-7", "beta_0.1_lr_1e-6"],
        ["a", "B", "c", "D_1", "d_2"],
        ["Llama-3-8B", "Llama-3.1-8B", "Llama-3.1-70B"],
        ["off", "off-off", "off-on", "on"],
        ["x", "x1", "x1.0"],  # equal numbers: by the text
    ],
)
def test_numbers_in_names_compare_as_numbers(names):
    for order in (names, names[::-1], sorted(names)):
        assert sorted(order, key=runs.natural) == names


def test_settings_and_runs_are_in_order(tmp_path, capsys):
    """Whatever the shell's order: baselines, the start, then names and seeds by their numbers."""
    names = [f"dpo_{share}_seed{seed}" for share in ("1", "0.25", "0", "0.5") for seed in (10, 2)]
    files = [
        put(tmp_path / f"{name}.winrate.json", winrate(20.0, length_bins=GROUPS["length_bins"]))
        for name in [*names, "sft"]
    ]
    for given in (files, files[::-1]):
        tables = report(tmp_path, capsys, *given, "--start", "sft")
        order = ["gpt4", "sft", "dpo_0", "dpo_0.25", "dpo_0.5", "dpo_1"]
        assert [line["setting"] for line in tables["settings"]] == order
        groups = list(dict.fromkeys(line["setting"] for line in tables["groups"]))
        assert groups[:5] == ["sft", "dpo_0_seed2", "dpo_0_seed10", "dpo_0.25_seed2", "dpo_0.25_seed10"]


def test_the_papers_order_goes_before_names(tmp_path, capsys):
    files = [
        put(tmp_path / f"{name}.winrate.json", winrate(20.0))
        for name in ("off", "mixp", "on", "extra10", "extra9", "simplemix")
    ]
    text = "setting,column,value\non,LC,1\noff,LC,2\non,win rate,3\nhypo,LC,4\nsimplemix,LC,5\nmixp,LC,6\n"
    tables = report(tmp_path, capsys, *files, "--paper", put(tmp_path / "paper.csv", text))
    order = ["gpt4", "on", "off", "simplemix", "mixp", "extra9", "extra10", "hypo"]  # hypo is not ours
    assert [line["setting"] for line in tables["settings"]] == order


# ----- the baseline, gains and delta
def test_the_baseline_has_50_against_itself(tmp_path, capsys):
    run = winrate(20.0, 30.0, reward_baseline=-8.25, reward=-3.0, n_total=801)
    files = [put(tmp_path / f"{name}.winrate.json", run) for name in ("a", "b")]
    other = put(tmp_path / "c.winrate.json", winrate(None, 10.0, baseline="text_davinci"))
    lines = report(tmp_path, capsys, *files, other)["settings"]
    assert [line["setting"] for line in lines] == ["gpt4", "text_davinci", "a", "b", "c"]
    columns = ("LC", "win rate", "LC 95 %", "standard error", "reward", "characters", "prompts", "judge")
    assert cells(lines[0], *columns) == ["50.00", "50.00", "", "", "-8.25", "2000", "801", ""]
    assert cells(lines[1], *columns) == ["", "50.00", "", "", "", "2000", "805", ""]
    # a baseline that is a setting keeps what was measured
    measured = put(tmp_path / "gpt4.winrate.json", winrate(48.0, 47.0, baseline="davinci"))
    lines = by_setting(report(tmp_path, capsys, *files, measured)["settings"])
    assert list(lines) == ["davinci", "gpt4", "a", "b"] and lines["gpt4"]["LC"] == "48.00"


@pytest.mark.parametrize(
    "ending, content", [("boundary.json", boundary_of(0.4)), ("meta.json", {"args": {}, "counts": {}})]
)
def test_the_baseline_has_50_although_it_has_other_files(tmp_path, capsys, ending, content):
    """demo.sh: the policy is the baseline, and policy.boundary.json is among the files."""
    files = [
        put(tmp_path / "on.winrate.json", winrate(44.0, 57.0)),
        put(tmp_path / f"gpt4.{ending}", content),
    ]
    lines = by_setting(report(tmp_path, capsys, *files, "--start", "gpt4")["settings"])
    assert (lines["gpt4"]["LC"], lines["on"].get("gain")) == ("50.00", "-6.00")


def test_gain_over_the_start(tmp_path, capsys):
    rates = {"sft": (10.0, 12.0), "a": (14.5, 11.0), "b": (None, 13.25), "c": (9.0, 30.0)}
    files = [put(tmp_path / f"{name}.winrate.json", winrate(*both)) for name, both in rates.items()]
    files += [put(tmp_path / f"d_seed{k}.winrate.json", winrate(lc)) for k, lc in enumerate((11.0, 14.0))]
    for start, gains in (
        ("sft", {"gpt4": "+40.00", "sft": "", "a": "+4.50", "b": "+1.25", "c": "-1.00", "d": "+2.50"}),
        ("gpt4", {"gpt4": "", "sft": "-40.00", "a": "-35.50", "b": "-36.75", "c": "-41.00", "d": "-37.50"}),
        ("d", {"gpt4": "+37.50", "sft": "-2.50", "a": "+2.00", "b": "-16.75", "c": "-3.50", "d": ""}),
    ):
        lines = report(tmp_path, capsys, *files, "--start", start)["settings"]
        assert {line["setting"]: line["gain"] for line in lines} == gains
    assert "gain" not in report(tmp_path, capsys, *files)["settings"][0]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            ["--start", "nobody"],
            "--start nobody: no setting or baseline has this name; use one of gpt4, a, b",
        ),
        (["--delta", "gpt4", "a", "nobody"], "--delta gpt4 a nobody: expected win rates of all three"),
        (["--delta", "b", "a", "a"], "--delta b a a: expected win rates of all three, found gpt4, a, b"),
    ],
)
def test_a_start_that_is_not_there(tmp_path, capsys, flags, sentence):
    files = [
        put(tmp_path / "a.winrate.json", winrate(9.0)),
        put(tmp_path / "b.boundary.json", boundary_of(0.4)),
    ]
    assert sentence in refused(tmp_path, capsys, *files, *flags)


# Length-controlled win rates of S2 of SFT, off, on, off-off, off-on, on-off, on-on, by table and model
CHILDREN = {"sft": ("off", "on"), "off": ("off-off", "off-on"), "on": ("on-off", "on-on")}
PUBLISHED = {
    (1, "llama"): (24.59, 27.73, 34.04, 27.83, 40.57, 36.36, 44.52),
    (1, "zephyr"): (8.12, 20.77, 13.70, 23.77, 33.28, 22.22, 19.16),
    (1, "phi"): (5.81, 5.97, 4.21, 6.44, 4.92, 5.73, 5.55),
    (4, "qwen"): (5.41, 7.24, 4.85, 9.27, 7.65, 7.08, 5.75),
    (4, "pythia"): (1.81, 1.28, 1.02, 2.51, 2.01, 2.79, 2.21),
    (5, "llama"): (24.59, 28.88, 31.06, 28.18, 12.66, 32.63, 39.46),
    (5, "zephyr"): (8.12, 17.73, 15.26, 21.59, 25.32, 19.84, 19.93),
    (5, "phi"): (5.81, 5.97, 5.32, 8.55, 7.77, 6.38, 6.01),
}
GAINS = {  # of off, on, off-off, off-on, on-off, on-on; where S2 prints something else, it is in the comment
    (1, "llama"): "+3.14 +9.45 +0.10 +12.84 +2.32 +10.48",  # Table 3: three of them with a minus
    (1, "zephyr"): "+12.65 +5.58 +3.00 +12.51 +8.52 +5.46",
    (1, "phi"): "+0.16 -1.60 +0.47 -1.05 +1.52 +1.34",
    (4, "qwen"): "+1.83 -0.56 +2.03 +0.41 +2.23 +0.90",  # off-off +3.86
    (4, "pythia"): "-0.53 -0.79 +1.23 +0.73 +1.77 +1.19",
    (5, "llama"): "+4.29 +6.47 -0.70 -16.22 +1.57 +8.40",  # off +4.38, off-on -11.93
    (5, "zephyr"): "+9.61 +7.14 +3.86 +7.59 +4.58 +4.67",
    (5, "phi"): "+0.16 -0.49 +2.58 +1.80 +1.06 +0.69",
}
DELTAS = {  # from SFT, off, on
    (1, "llama"): "0.33 0.01 0.22",
    (1, "zephyr"): "2.27 0.24 1.56",
    (1, "phi"): "+inf +inf 1.13",
    (4, "qwen"): "+inf 4.95 2.48",  # 9.41
    (4, "pythia"): "- 1.68 1.49",
    (5, "llama"): "0.66 - 0.19",  # .68
    (5, "zephyr"): "1.35 0.51 0.98",  # .38
    (5, "phi"): "+inf 1.43 1.54",
}
SCORES = {"llama": (0.62, 0.66, 0.69), "zephyr": (0.40, 0.66, 0.58), "phi": (0.23, 0.25, 0.23)}  # Table 3


@pytest.mark.parametrize("number, model", PUBLISHED, ids=str)
def test_s2_gains_and_delta(tmp_path, capsys, number, model):
    names = ["sft", *(child for both in CHILDREN.values() for child in both)]
    words = [
        put(tmp_path / f"{model}-{name}.winrate.json", winrate(lc))
        for name, lc in zip(names, PUBLISHED[number, model])
    ]
    if number == 1:
        for start, score in zip(CHILDREN, SCORES[model]):
            words.append(put(tmp_path / f"{model}-{start}.boundary.json", boundary_of(score)))
    for start, both in CHILDREN.items():
        words += ["--delta", f"{model}-{start}", *(f"{model}-{child}" for child in both)]
    tables = report(tmp_path, capsys, *words, "--start", f"{model}-sft")
    lines = tables["delta"]
    gains = [gain for line in lines for gain in cells(line, "gain off", "gain on")]
    assert " ".join(gains) == GAINS[number, model]
    assert " ".join(line["delta"] for line in lines) == DELTAS[number, model]
    for line, (start, both) in zip(lines, CHILDREN.items(), strict=True):
        columns = cells(line, "start", "off-trained", "on-trained")
        assert columns == [f"{model}-{name}" for name in (start, *both)]
    scores = [line.get("boundary score", "") for line in lines]
    assert scores == ([f"{score:.2f}" for score in SCORES[model]] if number == 1 else ["", "", ""])
    settings = by_setting(tables["settings"])
    assert [settings[f"{model}-{name}"]["gain"] for name in names[:3]] == ["", *gains[:2]]


@pytest.mark.parametrize(
    "off, on, expected",
    [
        (3, 2, "1.50"),
        (1, 0, "+inf"),
        (1, -2, "+inf"),
        (0, 0, "-"),
        (0, -1, "-"),
        (-1, 0, "-"),
        (-1, -2, "-"),
        (-1, 2, "-0.50"),
        (0, 2, "0.00"),
    ],
)
def test_delta_rule(off, on, expected):
    assert table.delta(off, on) == expected


def test_delta_of_seeds_and_of_the_baseline(tmp_path, capsys):
    """S2 Table 2 compares two off-policy sets with one on-policy set; gains are of means over seeds."""
    rates = {"off": (60.0,), "llama": (53.0, 57.0), "on": (51.0, 53.0)}
    words = [
        put(tmp_path / f"{name}_seed{k}.winrate.json", winrate(lc))
        for name, values in rates.items()
        for k, lc in enumerate(values)
    ]
    words += ["--delta", "gpt4", "off", "on", "--delta", "gpt4", "llama", "on"]
    lines = report(tmp_path, capsys, *words)["delta"]
    expected = [["off", "+10.00", "+2.00", "5.00"], ["llama", "+5.00", "+2.00", "2.50"]]
    assert [cells(line, "off-trained", "gain off", "gain on", "delta") for line in lines] == expected


# ----- groups
def group(lc, lc_ci, win, ci, n):
    cell = {"n_total": n, "win_rate": win, "ci": ci}
    return cell | {"length_controlled_winrate": lc, "lc_ci": lc_ci}


GROUPS = {
    "categories": {
        "math": group(30.0, [21.0, 37.0], 31.0, [22.5, 39.0], 30),
        "a|b": group(None, None, 20.0, None, 1),
    },
    "length_bins": {"10 to 110": group(18.0, [15.0, 24.0], 12.0, [8.0, 16.0], 200)},
}


def test_groups(tmp_path, capsys):
    plain = copy.deepcopy(GROUPS)
    plain["categories"]["a/b"] = plain["categories"].pop("a|b")
    files = [put(tmp_path / "on_seed1.winrate.json", winrate(22.0, **plain))]
    files.append(put(tmp_path / "off.winrate.json", winrate(21.0, length_bins=GROUPS["length_bins"])))
    lines = report(tmp_path, capsys, *files)["groups"]
    columns = ("setting", "of", "group", "n", "LC", "LC 95 %", "win rate", "95 %")
    assert list(lines[0]) == list(columns)
    short = ["10 to 110", "200", "18.00", "15.0 to 24.0", "12.00", "8.0 to 16.0"]
    assert [cells(line, *columns) for line in lines] == [
        ["off", "length bins", *short],
        ["on_seed1", "categories", "math", "30", "30.00", "21.0 to 37.0", "31.00", "22.5 to 39.0"],
        ["on_seed1", "categories", "a/b", "1", "", "", "20.00", ""],
        ["on_seed1", "length bins", *short],
    ]


def test_groups_of_a_baseline_that_is_a_run(tmp_path, capsys):
    """Runs of a are compared with a_seed1: a baseline without groups, and a run that has them."""
    run = winrate(22.0, length_bins=GROUPS["length_bins"], baseline="out/a_seed1")
    files = [put(tmp_path / f"a_seed{seed}.winrate.json", run) for seed in range(2)]
    tables = report(tmp_path, capsys, *files)
    assert [line["setting"] for line in tables["settings"]] == ["a_seed1", "a"]
    assert [line["setting"] for line in tables["groups"]] == ["a_seed0", "a_seed1"]


def test_a_bar_in_a_name_does_not_break_the_markdown(tmp_path, capsys):
    file = put(tmp_path / "on.winrate.json", winrate(22.0, **GROUPS))
    table.main(table.parse_args([str(file), "--out", str(tmp_path)]))
    lines = [line for line in (tmp_path / "report.md").read_text().splitlines() if "categories" in line]
    assert [line.count("|") for line in lines] == [9, 9] and "| a/b " in lines[1]
    with open(tmp_path / "groups.csv", newline="") as file:
        assert [line["group"] for line in csv.DictReader(file)] == ["math", "a|b", "10 to 110"]


# ----- the other tables
def test_benchmarks_by_task(tmp_path, capsys):
    runs = [
        benchmarks(65.0, arc=(50.0, 1.25), piqa=(80.0, 0.5)),
        benchmarks(64.0, arc=(51.0, 1.5), piqa=(77.0, None)),
    ]
    files = [put(tmp_path / f"m_seed{k}.benchmarks.json", run) for k, run in enumerate(runs)]
    files.append(put(tmp_path / "sft.benchmarks.json", benchmarks(63.5, arc=(48.0, 2.0), piqa=(79.0, 1.0))))
    files.append(put(tmp_path / "sft.mmlu.json", benchmarks(None, "what-matters", mmlu=(62.0, 1.0))))
    files.append(put(tmp_path / "sft.winrate.json", winrate(10.0)))
    tables = report(tmp_path, capsys, *files)
    m, sft = tables["benchmarks_simplemix"]
    # 2 ** -0.5 is the standard deviation of 50 and 51; that of 80 and 77 is 3 * 2 ** -0.5
    assert m == {
        "setting": "m",
        "runs": "2",
        "arc (n = 1172)": "50.50",
        "arc se": "1.38",
        "arc sd": "0.71",
        "piqa (n = 1172)": "78.50",
        "piqa se": "0.50",
        "piqa sd": "2.12",
        "average": "64.50",
    }
    assert list(sft.values()) == ["sft", "1", "48.00", "2.00", "", "79.00", "1.00", "", "63.50"]
    what_matters = {"setting": "sft", "runs": "1", "mmlu (n = 1172)": "62.00", "mmlu se": "1.00"}
    assert tables["benchmarks_what-matters"] == [what_matters]  # S3 has no average
    lines = by_setting(tables["settings"])  # S1 Table 2: win rate and average side by side
    columns = ("LC", "benchmarks simplemix", "benchmarks simplemix sd")
    assert cells(lines["m"], *columns) == ["", "64.50", "0.71"]
    assert cells(lines["sft"], *columns) == ["10.00", "63.50", ""]


def test_a_task_that_only_the_second_run_has(tmp_path, capsys):
    runs = [benchmarks(50.0, arc=(50.0, None)), benchmarks(60.0, piqa=(60.0, None))]
    files = [put(tmp_path / f"m_seed{k}.benchmarks.json", run) for k, run in enumerate(runs)]
    (line,) = report(tmp_path, capsys, *files)["benchmarks_simplemix"]
    assert line["piqa (n = 1172)"] == "60.00"


TABLE_5 = {  # S3 Table 5, UltraFeedback Best/Low
    "chosen reward": (-0.93, 4.91, -19.5, -4.19, -1.91, 1.34, 21.0),
    "gap": (3.97, 2.0, 0.25, 2.0, 3.0, 5.0, 30.0),
}
NUMBERS_OF_TABLE_5 = ("mean", "std", "min", "25%", "median", "75%", "max")


def pair_set(n=60000):
    stats = {
        name: {"n": n} | dict(zip(NUMBERS_OF_TABLE_5, row, strict=True)) for name, row in TABLE_5.items()
    }
    return pairs_meta({"rows": 61135, "pairs": 60000, "on": 6000, "off": 54000}, stats)


def test_pair_sets_become_s3_table_5(tmp_path, capsys):
    files = [put(tmp_path / "best_low.pairs.meta.json", pair_set())]
    cross = pairs_meta({"pairs": 7, "cross": 7}, {"gap": {"n": 7, "mean": 1.5}})
    files.append(put(tmp_path / "swap.pairs.meta.json", cross))
    tables = report(tmp_path, capsys, *files)
    chosen, gap, swapped = tables["pair_sets"]
    columns = ("setting", "pairs", "on", "off", "of", *NUMBERS_OF_TABLE_5)
    numbers = ["-0.93", "4.91", "-19.50", "-4.19", "-1.91", "1.34", "21.00"]
    assert cells(chosen, *columns) == ["best_low", "60000", "6000", "54000", "chosen reward", *numbers]
    numbers = ["3.97", "2.00", "0.25", "2.00", "3.00", "5.00", "30.00"]
    assert cells(gap, *columns, "cross") == ["best_low", "60000", "6000", "54000", "gap", *numbers, ""]
    columns = ("setting", "pairs", "on", "cross", "of", "mean", "max")
    assert cells(swapped, *columns) == ["swap", "7", "", "7", "gap", "1.50", ""]
    line, _ = tables["settings"]
    assert cells(line, "pairs", "mean chosen", "mean gap", "runs") == ["60000", "-0.93", "3.97", "1"]
    assert set(tables) == {"settings", "pair_sets"}


def test_n_of_a_pair_set_is_a_whole_number(tmp_path, capsys):
    lines = report(tmp_path, capsys, put(tmp_path / "a.pairs.meta.json", pair_set()))["pair_sets"]
    assert [line["n"] for line in lines] == ["60,000", "60,000"]


def test_pairs_over_seeds(tmp_path, capsys):
    files = []
    for seed, (n, chosen, gap) in enumerate(((60, 1.0, 2.0), (63, 2.5, 5.0))):
        stats = {"chosen reward": {"n": n, "mean": chosen}, "gap": {"n": n, "mean": gap}}
        files.append(put(tmp_path / f"a_seed{seed}.pairs.meta.json", pairs_meta({"pairs": n}, stats)))
    tables = report(tmp_path, capsys, *files)
    columns = ("runs", "pairs", "mean chosen", "mean gap")
    assert cells(tables["settings"][0], *columns) == ["2", "62", "1.75", "3.50"]  # 61.5 to the even
    assert [line["pairs"] for line in tables["pair_sets"]] == ["60", "60", "63", "63"]


def test_boundaries_become_s2_table_3(tmp_path, capsys):
    bare = boundary_of(0.23, length_matched=None, distinct=None, v_on=1840.5)
    files = [
        put(tmp_path / "llama.boundary.json", boundary_of(0.62)),
        put(tmp_path / "phi.boundary.json", bare),
    ]
    tables = report(tmp_path, capsys, *files)
    llama, phi = tables["boundary"]
    assert llama == {
        "setting": "llama",
        "prompts": "2000",
        "V_on": "4960",
        "V_off": "3040",
        "ties": "3",
        "score": "0.620",
        "score 95 %": "0.605 to 0.632",
        "length-matched": "0.570",
        "length-matched 95 %": "0.540 to 0.600",
        "distinct": "0.911",
        "stage": "fine-tuning",
        "use": "on",
    }
    numbers = ["1840.5", "6160", "3", "0.230", "0.215 to 0.242"]
    assert list(phi.values()) == ["phi", "2000", *numbers, "", "", "", "injection", "off"]
    assert tables["settings"] == [{"setting": "llama"}, {"setting": "phi"}]


def test_boundaries_by_category(tmp_path, capsys):
    """A line per category after that of all prompts; gains and the paper go by the score of all prompts."""
    files = [put(tmp_path / "phi_seed0.boundary.json", boundary_of(0.23))]
    groups = {"math": category_of(0.25), "poems": category_of(0.8)}
    files.append(put(tmp_path / "phi_seed1.boundary.json", boundary_of(0.25, by_category=groups)))
    paper = put(tmp_path / "paper.csv", "setting,column,value\nphi,score,0.22\n")
    files += [put(tmp_path / f"{name}.winrate.json", winrate(9.0, baseline="phi")) for name in "ab"]
    tables = report(tmp_path, capsys, *files, "--paper", paper, "--delta", "phi", "a", "b")
    columns = ("setting", "category", "prompts", "V_on", "V_off", "ties", "score", "score (paper)")
    columns += ("score 95 %", "length-matched", "stage", "use")
    assert list(tables["boundary"][0])[:3] == ["setting", "category", "prompts"]
    assert [cells(line, *columns) for line in tables["boundary"]] == [
        [
            "phi",
            "",
            "2000",
            "1840",
            "6160",
            "3",
            "0.230",
            "0.22",
            "0.215 to 0.242",
            "0.180",
            "injection",
            "off",
        ],
        ["phi", "", "2000", "2000", "6000", "3", "0.250", "", "0.235 to 0.262", "0.200", "injection", "off"],
        ["phi", "math", "200", "50", "150", "1", "0.250", "", "0.150 to 0.350", "", "injection", "off"],
        ["phi", "poems", "200", "160", "40", "1", "0.800", "", "0.700 to 0.900", "", "injection", "off"],
    ]
    assert tables["delta"][0]["boundary score"] == "0.24"


def test_compute(tmp_path, capsys):
    def meta(**counts):
        return {"args": {}, "counts": counts, "seconds": 100.25}

    steps = [{"step": k, "tokens": 1000 + k, "loss": 0.7} for k in range(3)]
    files = [
        put(tmp_path / "a.on.meta.json", meta(tokens_sampled=1234567, rows=5)),
        put(tmp_path / "a.more.meta.json", {"args": {}, "counts": {"tokens_sampled": 10}}),
        put(tmp_path / "a.scored.meta.json", meta(tokens_scored=2000)),
        put(tmp_path / "a.pairs.meta.json", pairs_meta({"pairs": 3})),
        write_rows(tmp_path / "a.metrics.jsonl", steps),
    ]
    columns = ("tokens sampled", "tokens scored", "tokens trained", "seconds")
    (line,) = report(tmp_path, capsys, *files)["settings"]
    # 1000 + 1001 + 1002 tokens by the steps; 100.25 + 100.25 seconds, the 2 of the pairs left out
    assert cells(line, *columns) == ["1,234,577", "2,000", "3,003", "200"]
    # the trainer's record is taken before its steps, and runs are added up
    (tmp_path / "a_seed1").mkdir()
    files += [
        put(tmp_path / "a" / "metrics.meta.json", meta(tokens_trained=5000)),
        put(tmp_path / "a_seed1" / "metrics.meta.json", meta(tokens_trained=6000)),
        write_rows(tmp_path / "a_seed1" / "metrics.jsonl", steps),
    ]
    (line,) = report(tmp_path, capsys, *files)["settings"]
    assert cells(line, *columns) == ["1,234,577", "2,000", "11,000", "401"]
    steps_alone = files[4], files[-1]
    (line,) = report(tmp_path, capsys, *steps_alone)["settings"]
    assert line == {"setting": "a", "tokens trained": "6,006"}


# ----- --paper and the files of the report
def test_numbers_of_the_paper_stand_beside_ours(tmp_path, capsys):
    file = put(tmp_path / "on50.winrate.json", winrate(30.0, 31.0))
    text = 'setting,column,value\non50,LC,29.41\non50,LC 95 %,"28, 31"\nmix-p,LC,27.79\nmix-p,epochs,1\n'
    lines = report(tmp_path, capsys, file, "--paper", put(tmp_path / "paper.csv", text))["settings"]
    first = ["setting", "runs", "LC", "LC (paper)", "LC 95 %", "LC 95 % (paper)", "win rate", "win rate 95 %"]
    assert list(lines[0])[:8] == first and list(lines[0])[-1] == "epochs (paper)"
    lines = by_setting(lines)
    assert list(lines) == ["gpt4", "on50", "mix-p"]
    columns = ("LC", "LC (paper)", "LC 95 % (paper)", "epochs (paper)")
    assert cells(lines["on50"], *columns) == ["30.00", "29.41", "28, 31", ""]
    assert cells(lines["mix-p"], *columns) == ["", "27.79", "", "1"]


def test_scores_of_tasks_in_the_paper_stand_beside_the_tasks(tmp_path, capsys):
    file = put(tmp_path / "on50.benchmarks.json", benchmarks(61.0, mmlu=(60.5, 0.4)))
    paper = put(
        tmp_path / "paper.csv", "setting,column,value\non50,mmlu,62.1\non50,LC,29.41\noff,mmlu,61.7\n"
    )
    tables = report(tmp_path, capsys, file, "--paper", paper)
    lines = by_setting(tables["benchmarks_simplemix"])
    assert [line["mmlu (n = 1172) (paper)"] for line in lines.values()] == ["62.1", "61.7"]
    assert lines["off"]["mmlu (n = 1172)"] == ""
    (line,) = tables["settings"]
    assert cells(line, "setting", "LC (paper)") == ["on50", "29.41"]


def test_a_delta_in_the_paper_stands_beside_ours(tmp_path, capsys):
    files = [put(tmp_path / f"{name}.winrate.json", winrate(rate)) for name, rate in (("a", 10), ("b", 12))]
    files += [
        put(tmp_path / "c.winrate.json", winrate(14.0)),
        put(tmp_path / "a.boundary.json", boundary_of(0.3)),
    ]
    text = "setting,column,value\na,boundary score,0.28\na,delta,0.6\na,distinct,0.9\nd,gain on,+3\n"
    paper = put(tmp_path / "paper.csv", text)
    tables = report(tmp_path, capsys, *files, "--delta", "a", "b", "c", "--paper", paper)
    first, second = tables["delta"]
    columns = ("start", "boundary score", "boundary score (paper)", "delta", "delta (paper)")
    assert cells(first, *columns) == ["a", "0.30", "0.28", "0.50", "0.6"]
    assert cells(second, "start", "gain on", "gain on (paper)") == ["d", "", "+3"]
    assert cells(tables["boundary"][0], "setting", "distinct (paper)") == ["a", "0.9"]


def test_a_grid_of_two_numbers(tmp_path, capsys):
    files = []
    for beta in ("0.1", "1"):
        for lr, rate in (("5e-7", 30.0), ("1e-6", 31.0)):
            result = winrate(rate + float(beta))
            files.append(put(tmp_path / f"beta_{beta}_lr_{lr}.winrate.json", result))
    grid = report(tmp_path, capsys, *files)["grid"]
    assert grid == [
        {"setting": "beta 0.1", "lr 5e-7": "30.10", "lr 1e-6": "31.10"},
        {"setting": "beta 1", "lr 5e-7": "31.00", "lr 1e-6": "32.00"},
    ]


def test_means_of_the_samples(tmp_path, capsys):
    stats = {"reward of all samples": {"mean": -10.754}, "chosen reward": {"mean": 1.5}, "gap": {"mean": 2.0}}
    file = put(tmp_path / "a.pairs.meta.json", pairs_meta({"pairs": 3}, stats))
    (line,) = report(tmp_path, capsys, file)["settings"]
    assert cells(line, "mean of samples", "mean chosen", "mean gap") == ["-10.75", "1.50", "2.00"]


@pytest.mark.parametrize(
    "content",
    [
        "setting,value\na,1\n",
        "column,setting\nLC,a\n",
        "\ufeffsetting,column,value\na,LC,1\n",
        b"setting,column,value\n\xff,LC,1\n",
        None,
    ],
)
def test_a_paper_that_is_no_such_table(tmp_path, capsys, content):
    file, paper = put(tmp_path / "a.winrate.json", winrate(30.0)), tmp_path / "paper.csv"
    if content is not None:
        paper.write_bytes(content.encode() if isinstance(content, str) else content)
    said = refused(tmp_path, capsys, file, "--paper", paper)
    assert f"--paper {paper}: expected the columns setting, column and value" in said


def test_a_line_of_the_paper_without_a_value(tmp_path, capsys):
    paper = put(tmp_path / "paper.csv", "setting,column,value\na,LC,1\nb,LC\n")
    assert str(paper) in refused(
        tmp_path, capsys, put(tmp_path / "a.winrate.json", winrate(30.0)), "--paper", paper
    )


def test_figures_in_the_folder_are_shown(tmp_path, capsys):
    file = put(tmp_path / "a.winrate.json", winrate(30.0))
    for name in ("settings.png", "ratio.png", "ratio.pdf", "deep/other.png"):
        put(tmp_path / "report" / name, "")
    report(tmp_path, capsys, file)
    end = "\n\n![ratio](ratio.png)\n\n![settings](settings.png)\n"
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.endswith(" |" + end) and text.count("![") == 2


@pytest.mark.parametrize("blocked", ["", "settings.csv", "grid.csv", "report.md"])
def test_an_out_that_cannot_be_written(tmp_path, capsys, blocked):
    """--out is a file, or a file of the report is a folder: one sentence that names it."""
    out, file = tmp_path / "report", put(tmp_path / "a.winrate.json", winrate(30.0))
    put(out / blocked / "x" if blocked else out, "")
    with pytest.raises(SystemExit) as end:
        table.main(table.parse_args([str(file), "--out", str(out)]))
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1, said
    assert str(out / blocked) in said.err
    assert not list(tmp_path.rglob("*.tmp"))


def test_tables_of_an_earlier_report_are_removed(tmp_path, capsys):
    for name in ("grid", "benchmarks_simplemix", "of_the_user"):
        put(tmp_path / f"{name}.csv", "setting\nold\n")
    file = put(tmp_path / "a.winrate.json", winrate(30.0))
    table.main(table.parse_args([str(file), "--out", str(tmp_path)]))
    assert {path.stem for path in tmp_path.glob("*.csv")} == {"settings", "of_the_user"}


def test_what_a_wildcard_takes_along(tmp_path, capsys):
    """out/*.json has every script's records; a record alone makes no setting."""
    meta = {"argv": ["x"], "args": {"model": "m"}, "git": None, "inputs": {"a": "0f"}, "counts": {}}
    files = [put(tmp_path / "a.winrate.json", winrate(20.0))]
    files += [put(tmp_path / f"a.{stage}.meta.json", meta) for stage in ("winrate", "on", "boundary")]
    tables = report(tmp_path, capsys, *files, put(tmp_path / "b.meta.json", meta))
    assert set(tables) == {"settings"}
    assert [cells(line, "setting", "runs") for line in tables["settings"]] == [["gpt4", "1"], ["a", "1"]]


# ----- files of a wrong shape, generated from the TypedDicts
def fits(annotation, value):
    """Whether a JSON value has the type that an annotation names."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return fits(parts[0], value) and 0 <= value < 2**53
    if origin in (Union, UnionType):
        return any(fits(part, value) for part in parts)
    if origin is Required:
        return fits(parts[0], value)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return type(value) is list and len(value) == len(parts) and all(map(fits, parts, value))
    if origin in (list, dict) and type(value) is origin:
        return all(fits(parts[-1], item) for item in (value if origin is list else value.values()))
    if is_typeddict(annotation) and type(value) is dict:
        hints = get_type_hints(annotation, include_extras=True)
        return annotation.__required_keys__ <= value.keys() and all(
            fits(hints[key], item) for key, item in value.items() if key in hints
        )
    if annotation is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return annotation in (int, str, NoneType) and type(value) is annotation


def places(annotation, value, path=()):
    """(path, annotation, whether the key must be there; None for an item) of each part of a good value."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        annotation = [part for part in parts if fits(part, value)][0]
        yield from places(annotation, value, path)
    elif origin is Required:
        yield from places(parts[0], value, path)
    elif origin in (list, tuple, dict):
        for key, item in value.items() if origin is dict else enumerate(value):
            part = parts[key] if origin is tuple else parts[-1]
            yield (*path, key), part, None
            yield from places(part, item, (*path, key))
    elif is_typeddict(annotation):
        for key, hint in get_type_hints(annotation, include_extras=True).items():
            assert key in value, f"the good file has no {key!r} to spoil"
            yield (*path, key), hint, key in annotation.__required_keys__
            yield from places(hint, value[key], (*path, key))


def full_rates(**more):
    cell = group(30.0, [21.0, 37.0], 31.0, [22.5, 39.0], 30)
    cell |= {"standard_error": 1.0, "reward": 2.0, "reward_ci": [1.0, 3.0]}
    return {**cell, "categories": {"math": cell}, "length_bins": {"1 to 5": cell}} | more


def full_meta():
    """A record with each key that is read."""
    counts = dict.fromkeys(get_type_hints(runs.Counts), 5)
    return pair_set() | {"counts": counts, "args": {"filter": ["quality", 0.5]}}


STEP = {"step": 1, "tokens": 5, "loss": 0.5, "margin": 0.1, "margin_std": 0.2}
STEP |= {"diversity": 1.5, "diversity_std": 0.5}
FILES = {  # the name's ending, the shape, a file that has every key
    "winrate": (
        ".winrate.json",
        runs.Winrate,
        full_rates(
            kind="winrate",
            baseline="gpt4",
            avg_length=1900.5,
            avg_length_baseline=2000.5,
            reward_baseline=1.0,
            labelers=["judge"],
            by="wins",
            formula="minimal",
        ),
    ),
    "benchmarks": (".benchmarks.json", runs.Benchmarks, benchmarks(65.0, arc=(50.0, 1.25))),
    "boundary": (".boundary.json", runs.Boundary, boundary_of(0.62, by_category={"math": category_of(0.3)})),
    "pairs": (".pairs.meta.json", runs.Meta, full_meta()),
    "meta": (".on.meta.json", runs.Meta, full_meta()),
    "metrics": (".metrics.jsonl", list[runs.Step], [STEP | {"step": 0}, STEP]),
}
CASES = []
for kind, (_, shape, good) in FILES.items():
    for path, hint, required in places(shape, good):
        label = f"{kind}-{'.'.join(map(str, path))}"
        CASES.append(pytest.param(kind, path, hint, required, id=label))


def written(folder, kind, content):
    """A file of a kind; metrics are lines."""
    path = folder / f"a{FILES[kind][0]}"
    if kind == "metrics" and type(content) is list:
        write_rows(path, content)
        return path
    return put(path, content)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_has_every_key(tmp_path, capsys, kind):
    _, shape, good = FILES[kind]
    assert fits(shape, good)
    assert report(tmp_path, capsys, written(tmp_path, kind, good))["settings"][-1]["setting"] == "a"


def changed(content, path, value):
    """A copy with another value, or none, at a path of keys and indices."""
    content = copy.deepcopy(content)
    *parents, last = path
    parent = content
    for key in parents:
        parent = parent[key]
    if value is MISSING:
        del parent[last]
    else:
        parent[last] = value
    return content


@pytest.mark.parametrize("kind, path, hint, required", CASES)
def test_every_key_of_every_type(tmp_path, capsys, kind, path, hint, required):
    """What the shape does not admit is refused with the file's name; what it admits gives a report."""
    failures = []
    for value in [MISSING, *VALUES, -1, 10**400, ""]:
        if value is MISSING and required is None:
            continue  # an item of a list or a dict is no key
        file = written(tmp_path, kind, changed(FILES[kind][2], path, value))
        admitted = not required if value is MISSING else fits(hint, value)
        try:
            if admitted:
                table.main(table.parse_args([str(file), "--out", str(tmp_path / "report")]))
                shutil.rmtree(tmp_path / "report")
                capsys.readouterr()
            else:
                said = refused(tmp_path, capsys, file)
                assert f"{file}:" in said
        except BaseException as error:
            shutil.rmtree(tmp_path / "report", ignore_errors=True)
            case = "missing" if value is MISSING else json.dumps(value)[:20]
            failures.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
    assert not failures, "\n" + "\n".join(failures)


SPOILED = {
    "nothing": b"",
    "torn": json.dumps(winrate(30.0)).encode()[:-5],
    "a list": b"[1, 2]",
    "null": b"null",
    "no keys": b"{}",
    "another kind": b'{"kind": "metrics"}',
    "a kind that is no text": b'{"kind": ["winrate"], "suite": []}',
    "two objects": b'{"args": {}} {"args": {}}',
    "NaN": json.dumps(winrate(30.0)).replace("30.0", "NaN").encode(),
    "half a surrogate": b'{"args": {}, "counts": {"\\ud83d": 1}}',
    "utf-16": json.dumps(winrate(30.0)).encode("utf-16"),
    "open brackets": b"[" * 1_500,
}


@pytest.mark.parametrize("name", ["a.winrate.json", "a.meta.json", "a.metrics.jsonl"])
def test_a_file_that_is_no_result(tmp_path, capsys, name):
    good, path = put(tmp_path / "good.winrate.json", winrate(30.0)), tmp_path / name
    for what, content in SPOILED.items():
        path.write_bytes(content)
        said = refused(tmp_path, capsys, good, path)
        where = (
            f"{path}:" if name == "a.metrics.jsonl" else f"{path}: expected a result, a meta file or metrics"
        )
        assert where in said, what
    path.unlink()
    assert f"{path}: expected " in refused(tmp_path, capsys, path)
    path.mkdir()
    assert f"{path}: expected " in refused(tmp_path, capsys, path)


# ----- files that the scripts write
def quality(model, k):
    """Rewards of a model's two answers to prompt k."""
    start = {"on50": 3, "sft": 2, "other": 1}[model]
    return [(start * k + 5 * j) % 7 - 2.0 + start / 8 for j in range(2)]


@cache
def real_files(folder):
    """(results of evaluate.py, boundary.py and build_pairs.py, scored rows): 16 prompts, three models."""
    folder, rows = folder / "real", []
    folder.mkdir()
    for k in range(16):
        responses = []
        for m, model in enumerate(("on50", "sft", "other")):
            for j, reward in enumerate(quality(model, k)):
                response = {"text": f"{model} {j} " + "x" * ((7 * k + 5 * j + 3 * k * m) % 23)}
                response |= {"source": "on" if model == "on50" else "off", "model": model, "reward": reward}
                responses.append(response)
        row = {"id": f"p{k}", "prompt": f"question {k}", "responses": responses, "labeler": "rm:r"}
        rows.append(row | {"category": "math" if k % 4 else "poems"})
    scored = write_rows(folder / "scored.jsonl", rows)
    files = [folder / name for name in ("on50.winrate.json", "on50.boundary.json", "on50.pairs.jsonl")]
    flags = ["--scored", scored, "--out"]
    models = ["--model", "on50", "--baseline", "sft"]
    evaluate.main(evaluate.parse_args([*flags, str(files[0]), *models]))
    boundary.main(boundary.parse_args([*flags, str(files[1])]))
    build_pairs.main(build_pairs.parse_args([*flags, str(files[2]), "--on-ratio", "0.5"]))
    files[2] = folder / "on50.pairs.meta.json"
    return files, Path(scored)


def wins(model, other, k):
    """The share of the four comparisons on prompt k that a model wins; rewards of two models never tie."""
    pairs = [(mine, theirs) for mine in quality(model, k) for theirs in quality(other, k)]
    return sum(mine > theirs for mine, theirs in pairs) / 4


def test_files_that_the_scripts_write(tmp_path, capsys, tmp_path_factory):
    files, scored = real_files(tmp_path_factory.getbasetemp())
    metas = sorted(scored.parent.glob("*.meta.json"))
    assert len(metas) == 3
    capsys.readouterr()
    tables = report(tmp_path, capsys, *files, *metas)
    baseline, line = tables["settings"]
    rate = 100 * statistics.mean([wins("on50", "sft", k) for k in range(16)])
    assert cells(line, "setting", "win rate", "prompts", "pairs") == ["on50", f"{rate:.2f}", "16", "16"]
    rewards = {
        model: [reward for k in range(16) for reward in quality(model, k)] for model in ("on50", "sft")
    }
    assert line["reward"] == f"{statistics.mean(rewards['on50']):.2f}"
    assert cells(baseline, "setting", "reward") == ["sft", f"{statistics.mean(rewards['sft']):.2f}"]
    groups = {(line["setting"], line["of"], line["group"]): line for line in tables["groups"]}
    math = [k for k in range(16) if k % 4]
    rate = 100 * statistics.mean([wins("on50", "sft", k) for k in math])
    assert cells(groups["on50", "categories", "math"], "n", "win rate") == ["12", f"{rate:.2f}"]
    assert sum(what == "length bins" for _, what, _ in groups) == 4
    won = sum(4 * wins("on50", other, k) for other in ("sft", "other") for k in range(16))
    assert cells(tables["boundary"][0], "V_on", "V_off") == [f"{won:g}", f"{128 - won:g}"]
    stats = {line["of"]: line for line in tables["pair_sets"]}
    assert cells(stats["gap"], "pairs", "on", "off") == ["16", "8", "8"]
    samples = [
        reward for k in range(16) for model in ("on50", "sft", "other") for reward in quality(model, k)
    ]
    columns = ("mean", "std", "min", "max")
    numbers = [statistics.mean(samples), statistics.pstdev(samples), min(samples), max(samples)]
    assert cells(stats["reward of all samples"], *columns) == [f"{number:.2f}" for number in numbers]


def test_benchmarks_that_the_recipe_writes(tmp_path, capsys):
    """lm-eval's results file of S3's suite, mmlu with two parts and one question of gsm8k."""
    tasks = recipe.SUITES["what-matters"]
    parts = {"mmlu_law": 30, "mmlu_art": 12, "truthfulqa_mc2": 817, "ifeval": 541, "gsm8k_cot": 1}
    numbers = {}
    for k, task in enumerate(tasks):
        metric = recipe.METRICS.get(task, "acc,none")
        error = "N/A" if task == "gsm8k_cot" else 0.01 + k / 1000
        numbers[task] = {metric: 0.5 + k / 100, metric.replace(",", "_stderr,"): error}
    results = {
        "results": numbers,
        "n-samples": {part: {"effective": n} for part, n in parts.items()},
        "n-shot": dict.fromkeys(parts, 0),
        "versions": dict.fromkeys(parts, 1),
    }
    result = benchmarks(None, "what-matters") | {"tasks": recipe.task_scores("what-matters", results)}
    (line,) = report(tmp_path, capsys, put(tmp_path / "m.benchmarks.json", result))["benchmarks_what-matters"]
    assert line == {
        "setting": "m",
        "runs": "1",
        "mmlu (n = 42)": "50.00",
        "mmlu se": "1.00",
        "truthfulqa_mc2 (n = 817)": "51.00",
        "truthfulqa_mc2 se": "1.10",
        "ifeval (n = 541)": "52.00",
        "ifeval se": "1.20",
        "gsm8k_cot (n = 1)": "53.00",
    }
