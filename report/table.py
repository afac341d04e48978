"""
Results -> tables: one line per setting, and the tables of the papers, in Markdown and as CSV.

Reads   RESULT ...   NAME.winrate.json and NAME.benchmarks.json (evaluate.py), NAME.boundary.json
                     (boundary.py), NAME.pairs.meta.json (build_pairs.py), NAME.metrics.jsonl or
                     NAME/metrics.jsonl (train_dpo.py), other records for tokens and seconds
        --paper CSV  lines of setting,column,value: the paper's numbers, in columns beside ours
Writes  --out DIR    report.md, which also shows the figures (PNG) that lie in DIR, and a CSV file per table

NAME is the setting. NAME_seed0, NAME_seed1, ... are its runs: a number is their mean, "sd" their standard
deviation, and "95 %" the interval over prompts (the mean of its ends), which is another thing. Tokens and
seconds are sums over the records that are given, NAME/metrics.meta.json and NAME.STAGE.meta.json (not of
pairs); groups, boundary and pair_sets have a line per run.

    python report/table.py out/*.json out/*/metrics.* --start policy --out out/report

settings      a line each (S1 Tables 2, 3; S2 Table 1; S3 Tables 1 to 4): win rates, gain over --start, mean
              of the benchmarks, rewards and gap of the pairs, compute. The baseline has 50 against itself
grid          settings named beta_0.1_lr_5e-7: LC by both numbers (S1 Appendix A)
groups        win rates by category and length, and differences of two models (S1 Figs. 2, 3, 8)
benchmarks_*  a line per setting, by task (S1 Tables 4, 5)
delta         --delta START OFF ON: the gain of OFF over START divided by that of ON, beside START's boundary
              score (S2 Tables 1, 3, 4, 5); "+inf" if only OFF gains, "-" if neither does
boundary      S2 Tables 3 and 8
pair_sets     S3 Table 5
Prints the report, then one JSON object.
"""

import argparse
import csv
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, Required, TypedDict

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import fail, read_jsonl  # noqa: E402

Interval = tuple[float, float] | None
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Group(TypedDict, total=False):
    n_total: Required[Count]
    win_rate: float | None
    ci: Interval
    length_controlled_winrate: float | None
    lc_ci: Interval
    standard_error: float | None
    reward: float | None
    reward_ci: Interval


class Rates(Group, total=False):
    categories: dict[str, Group]
    length_bins: dict[str, Group]


class Difference(Rates, total=False):
    model: Required[str]  # the second one
    result: Required[Rates]  # its own rates


class Winrate(Rates, total=False):
    kind: Required[Literal["winrate"]]
    model: Required[str]
    baseline: Required[str]
    avg_length: float
    avg_length_baseline: float
    reward_baseline: float | None
    labelers: list[str]
    by: str
    formula: str
    minus: Difference


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


class Arguments(TypedDict, total=False):
    filter: tuple[str, float] | None  # of build_pairs.py


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
    args: Required[Arguments]
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


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("results", nargs="+", metavar="RESULT", help="results, meta files, metrics.jsonl")
    parser.add_argument("--start", metavar="NAME", help="setting or baseline that gains are measured from")
    parser.add_argument("--delta", nargs=3, action="append", default=[], metavar=("START", "OFF", "ON"))
    parser.add_argument("--paper", metavar="CSV", help="the paper's numbers: setting,column,value")
    parser.add_argument("--out", required=True, metavar="DIR")
    return parser.parse_args(argv)


# ----- results by setting
def name_and_seed(path):
    """("on50", 1) of out/on50_seed1.winrate.json and of out/on50_seed1/metrics.jsonl; or no seed, None."""
    path = Path(path)
    if path.name in ("metrics.jsonl", "metrics.meta.json"):
        name = path.resolve().parent.name
    else:
        name = re.sub(r"(\.[a-z]+)?(\.meta)?\.jsonl?$", "", path.name)
    run = re.fullmatch(r"(.+)_seed(\d+)", name)
    return (run[1], int(run[2])) if run else (name, None)


def read_result(path):
    """(kind, content) of a file."""
    try:
        if path.endswith("metrics.jsonl"):
            return "metrics", [step for _, step in read_jsonl(path, Step)]
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
    """{setting: {kind: {seed: content}}}, the settings in the order in which they come."""
    settings = {}
    for path in dict.fromkeys(paths):
        kind, content = read_result(path)
        name, seed = name_and_seed(path)
        runs = settings.setdefault(name, {}).setdefault(kind, {})
        key = path if kind == "meta" else seed
        if key in runs:
            fail(f"{path}: a second {kind} of {name}; runs of a setting are NAME_seed0, NAME_seed1, ...")
        runs[key] = content
    return settings


def over_runs(runs, key, interval="ci"):
    """{"mean", "ci", "sd"} of a number over runs; None if no run has it."""
    runs = [run for run in runs if run.get(key) is not None]
    if not runs:
        return None
    values = [run[key] for run in runs]
    ends = [run[interval] for run in runs if run.get(interval)]
    ci = np.mean(ends, axis=0).tolist() if ends else None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "ci": ci, "sd": sd}


def add_baselines(settings):
    """The settings after the baselines of their win rates, which have 50 against themselves by definition."""
    baselines = {}
    for results in settings.values():
        for run in results.get("winrate", {}).values():
            name = Path(run["baseline"]).name
            line = {"win_rate": 50.0, "n_total": run["n_total"], "by": "", "labelers": []}
            line |= {"avg_length": run.get("avg_length_baseline"), "reward": run.get("reward_baseline")}
            if run.get("length_controlled_winrate") is not None:
                line["length_controlled_winrate"] = 50.0
            if "winrate" not in settings.get(name, {}):
                baselines[name] = {**settings.get(name, {}), "winrate": {None: line}}
    return baselines | {name: results for name, results in settings.items() if name not in baselines}


def gain(settings, name, start):
    """Points of LC, or of win rate if one has no LC, that a setting gained over another; None if unknown."""
    runs, before = ([*settings.get(each, {}).get("winrate", {}).values()] for each in (name, start))
    for key in ("length_controlled_winrate", "win_rate"):
        after, base = over_runs(runs, key), over_runs(before, key)
        if after and base:
            return after["mean"] - base["mean"]
    return None


# ----- tables: lists of lines {column: text}
def text(value, form=".2f"):
    """A number or an interval as text; "" for None."""
    if isinstance(value, (list, tuple)):
        return f"{value[0]:{form}} to {value[1]:{form}}"
    return "" if value is None else format(value, form)


def spread(runs, key, interval, name):
    """Columns of a number over runs: its mean, interval over prompts and standard deviation over seeds."""
    value = over_runs(runs, key, interval) or {"mean": None, "ci": None, "sd": None}
    return {
        name: text(value["mean"]),
        f"{name} 95 %": text(value["ci"], ".1f"),
        f"{name} sd": text(value["sd"]),
    }


def compute(results):
    """Columns of what a setting cost, from the meta files that are given: tokens by stage, and seconds."""
    metas = list(results.get("meta", {}).values())
    line = {}
    for name in ("tokens_sampled", "tokens_scored", "tokens_trained"):
        counts = [meta["counts"].get(name, 0) for meta in metas]
        line[name.replace("_", " ")] = text(sum(counts) or None, ",")
    if not line["tokens trained"]:
        steps = [step for steps in results.get("metrics", {}).values() for step in steps]
        line["tokens trained"] = text(sum(step["tokens"] for step in steps) or None, ",")
    line["seconds"] = text(sum(meta.get("seconds", 0) for meta in metas) or None, ".0f")
    return line


MEANS = {"reward of all samples": "mean of samples", "chosen reward": "mean chosen", "gap": "mean gap"}


def settings_table(settings, start):
    lines = []
    for name, results in settings.items():
        if set(results) == {"meta"}:
            continue  # the record of a stage whose output many settings share
        runs = list(results.get("winrate", {}).values())
        pairs = list(results.get("pairs", {}).values())
        measured = [kind for kind in results if kind not in ("meta", "metrics", "boundary")]
        n_runs = max((len(results[kind]) for kind in measured), default=None)
        line = {"setting": name, "runs": text(n_runs, "d")}
        line |= spread(runs, "length_controlled_winrate", "lc_ci", "LC")
        line |= spread(runs, "win_rate", "ci", "win rate")
        line["standard error"] = mean_of(runs, "standard_error")
        if start and start != name:
            line["gain"] = text(gain(settings, name, start), "+.2f")
        for kind in sorted(kind for kind in results if kind.startswith("benchmarks_")):
            line |= spread(results[kind].values(), "average", "", kind.replace("_", " "))
        line["reward"] = mean_of(runs, "reward")
        line["characters"] = mean_of(runs, "avg_length", ".0f")
        line["prompts"] = mean_of(runs, "n_total", ".0f")
        line["pairs"] = mean_of([meta["counts"] for meta in pairs], "pairs", ".0f")
        for what, column in MEANS.items():
            line[column] = mean_of([meta["stats"].get(what, {}) for meta in pairs], "mean")
        line |= compute(results)
        if runs:
            line["judge"] = ", ".join(runs[0].get("labelers") or [runs[0].get("by", "")])
            line["formula of LC"] = runs[0].get("formula", "")
        lines.append(line)
    return lines


def mean_of(runs, key, form=".2f"):
    value = over_runs(runs, key)
    return text(value["mean"], form) if value else ""


def add_paper(tables, path):
    """The paper's numbers as columns "COLUMN (paper)"; settings that are not among ours get a line.

    They go to the first table that has the column ("mmlu" is in "mmlu (n = 100)"), or else to the settings.
    """
    columns = {}  # column without its n -> (table, column); the first table comes last and wins
    for name, lines in reversed(tables.items()):
        for line in lines:
            for column in line:
                columns[column.partition(" (n = ")[0]] = name, column
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, strict=True):
                setting, column, value = (row[name].strip() for name in ("setting", "column", "value"))
                name, column = columns.get(column, ("settings", column))
                line_of(tables[name], setting)[f"{column} (paper)"] = value
    except (OSError, KeyError, AttributeError, UnicodeError, csv.Error) as error:
        fail(f"--paper {path}: expected the columns setting, column and value in each line: {error!r}")


def line_of(lines, setting):
    """The line of a table whose first column is the setting; a new one if there is none."""
    key = next(iter(lines[0])) if lines else "setting"
    for line in lines:
        if line[key] == setting:
            return line
    lines.append({key: setting})
    return lines[-1]


def groups_table(settings):
    lines = []
    for name, results in settings.items():
        for seed, run in results.get("winrate", {}).items():
            run_name = name if seed is None else f"{name}_seed{seed}"
            minus = run.get("minus")
            lines += group_lines(run_name, run)
            if minus:
                other = Path(minus["model"]).name
                whole = {"all": {"all": {"n_total": run["n_total"], **minus}}}
                lines += group_lines(f"{run_name} minus {other}", {**minus, **whole})
    return lines


def group_lines(name, run):
    lines = []
    for kind in ("all", "categories", "length_bins"):
        for group, cell in run.get(kind, {}).items():
            line = {"setting": name, "of": kind.replace("_", " "), "group": group, "n": str(cell["n_total"])}
            line["LC"] = text(cell.get("length_controlled_winrate"))
            line["LC 95 %"] = text(cell.get("lc_ci"), ".1f")
            line["win rate"] = text(cell.get("win_rate"))
            line["95 %"] = text(cell.get("ci"), ".1f")
            lines.append(line)
    return lines


def benchmarks_table(settings, kind):
    lines = []
    for name, results in settings.items():
        runs = list(results.get(kind, {}).values())
        if not runs:
            continue
        line = {"setting": name, "runs": str(len(runs))}
        for task in dict.fromkeys(task for run in runs for task in run["tasks"]):
            cells = [run["tasks"][task] for run in runs if task in run["tasks"]]
            score = over_runs(cells, "score")
            line[f"{task} (n = {cells[0]['n']})"] = text(score["mean"])
            line[f"{task} se"] = mean_of(cells, "stderr")
            line[f"{task} sd"] = text(score["sd"])
        line["average"] = mean_of(runs, "average")
        lines.append(line)
    return lines


def grid_table(settings):
    """Of settings such as beta_0.1_lr_5e-7 the LC, or win rate: a line per beta, a column per lr."""
    lines = {}
    for name, results in settings.items():
        numbers = re.fullmatch(r"([a-z]+)_([\d.e-]+)_([a-z]+)_([\d.e-]+)", name)
        runs = list(results.get("winrate", {}).values())
        if numbers and runs:
            row, column = f"{numbers[1]} {numbers[2]}", f"{numbers[3]} {numbers[4]}"
            rate = mean_of(runs, "length_controlled_winrate") or mean_of(runs, "win_rate")
            lines.setdefault(row, {"setting": row})[column] = rate
    return list(lines.values())


def delta_table(settings, asked):
    """S2's ratio of two gains from one start model."""
    lines = []
    for start, off, on in asked:
        gains = [gain(settings, name, start) for name in (off, on)]
        if None in gains:
            fail(f"--delta {start} {off} {on}: expected win rates of all three, found {', '.join(settings)}")
        line = {"start": start}
        line["boundary score"] = mean_of(settings[start].get("boundary", {}).values(), "score")
        line |= {"off-trained": off, "gain off": text(gains[0], "+.2f")}
        line |= {"on-trained": on, "gain on": text(gains[1], "+.2f"), "delta": delta(*gains)}
        lines.append(line)
    return lines


def delta(off, on):
    """gain off / gain on as text; S2 prints +inf where only one source gains."""
    if on > 0:
        return f"{off / on:.2f}"
    return "+inf" if off > 0 else "-"


def boundary_table(settings):
    lines = []
    for name, results in settings.items():
        for run in results.get("boundary", {}).values():
            line = {"setting": name, "prompts": str(run["n_prompts"])}
            line |= {"V_on": f"{run['v_on']:g}", "V_off": f"{run['v_off']:g}", "ties": str(run["ties"])}
            for column, score in (("score", run), ("length-matched", run.get("length_matched"))):
                line[column] = text(score["score"], ".3f") if score else ""
                line[f"{column} 95 %"] = text(score["ci"], ".3f") if score else ""
            distinct = run.get("distinct")
            line["distinct"] = text(distinct["sum"], ".3f") if distinct else ""
            lines.append(line | {"stage": run["stage"], "use": run["use"]})
    return lines


def pair_sets_table(settings):
    lines = []
    for name, results in settings.items():
        for meta in results.get("pairs", {}).values():
            first = {"setting": name}
            for column in ("pairs", "on", "off", "cross"):
                first[column] = str(meta["counts"].get(column, ""))
            for what, numbers in meta["stats"].items():
                line = {**first, "of": what}
                for column, value in numbers.items():
                    line[column] = text(value, "," if column == "n" else ".2f")
                lines.append(line)
    return lines


# ----- writing
def write_table(lines, path):
    """The columns that say something as CSV, and as lines of Markdown, the paper's beside ours."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    columns = [column for column in columns if any(line.get(column) for line in lines)]
    ours = [column.removesuffix(" (paper)") for column in columns]
    columns.sort(key=lambda column: ours.index(column.removesuffix(" (paper)")))
    rows = [columns] + [[line.get(column, "") for column in columns] for line in lines]
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    os.replace(f"{path}.tmp", path)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    markdown = []
    for row in rows:
        cells = [cell.replace("|", "/").ljust(width) for cell, width in zip(row, widths, strict=True)]
        markdown.append(f"| {' | '.join(cells)} |")
    markdown.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return markdown


def main(args):
    settings = add_baselines(read_results(args.results))
    if args.start and args.start not in settings:
        names = ", ".join(settings)
        fail(f"--start {args.start}: no setting or baseline has this name; there are {names}")
    tables = {"settings": settings_table(settings, args.start)}
    tables["grid"] = grid_table(settings)
    tables["groups"] = groups_table(settings)
    for kind in sorted({kind for results in settings.values() for kind in results}):
        if kind.startswith("benchmarks_"):
            tables[kind] = benchmarks_table(settings, kind)
    tables["delta"] = delta_table(settings, args.delta)
    tables["boundary"] = boundary_table(settings)
    tables["pair_sets"] = pair_sets_table(settings)
    if args.paper:
        add_paper(tables, args.paper)

    out = Path(args.out)
    report = ["# Report"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, lines in tables.items():
            if lines:
                report += ["", f"## {name}", "", *write_table(lines, out / f"{name}.csv")]
            else:
                (out / f"{name}.csv").unlink(missing_ok=True)  # of an earlier report
        for figure in sorted(out.glob("*.png")):
            report += ["", f"![{figure.stem}]({figure.name})"]
        (out / "report.md.tmp").write_text("\n".join(report) + "\n", encoding="utf-8")
        os.replace(out / "report.md.tmp", out / "report.md")
    except OSError as error:
        fail(f"--out {args.out}: {error}")
    print("\n".join(report))
    counts = {name: len(lines) for name, lines in tables.items() if lines}
    print(json.dumps({"out": args.out, "tables": counts}))


if __name__ == "__main__":
    main(parse_args())
