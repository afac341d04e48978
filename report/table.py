"""
Results -> tables: a line per setting, and the tables of the papers, in Markdown and as CSV.

Reads   RESULT ...   files of settings and runs, as report/runs.py lists them: NAME.winrate.json, ...
        --paper CSV  lines of setting,column,value: the paper's numbers, in columns next to ours
Writes  --out DIR    report.md, which also shows the figures (PNG) that lie in DIR, and a CSV file per table

    python report/table.py out/*.json out/*/metrics.* --start policy --out out/report

A number is the mean over a setting's runs and "sd" their standard deviation; "95 %" is an interval over
prompts. Tokens and seconds are sums over the records that are given, without those of pairs. A baseline has
50 against itself. First come baselines, START and the settings of --paper in its order, then the others by
name, in which numbers compare as numbers. The tables, of which empty ones are left out:

settings      a line per setting (S1 Tables 2, 3; S2 Table 1; S3 Tables 1 to 4)
grid          length-controlled (LC) win rates of settings named beta_0.1_lr_5e-7 (S1 Appendix A)
groups        a line per run: win rates by category and length (S1 Figs. 2, 3, 8)
benchmarks_*  a line per setting, by task (S1 Tables 4, 5)
delta         the gain of OFF over START divided by that of ON (S2 Tables 1, 3, 4, 5)
boundary      a line per run (S2 Tables 3, 8), and one per category of its prompts
pair_sets     statistics of pairs, per run (S3 Table 5)
Prints the report, then one JSON object.
"""

import argparse
import csv
import io
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runs import SUITES, add_baselines, baselines_of, gain, in_order, over_runs, read_results  # noqa: E402

from common import fail, replace_file  # noqa: E402


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("results", nargs="+", metavar="RESULT", help="results, meta files, metrics.jsonl")
    flag("--start", metavar="NAME", help="setting or baseline that gains are measured from")
    flag("--delta", nargs=3, action="append", default=[], metavar=("START", "OFF", "ON"), help="S2's delta")
    flag("--paper", metavar="CSV", help="the paper's numbers: setting,column,value")
    flag("--out", required=True, metavar="DIR", help="folder of the report and its tables")
    return parser.parse_args(argv)


# ----- tables: lists of lines {column: text}
def text(value, form=".2f"):
    """A number or an interval as text; "" for None."""
    if isinstance(value, (list, tuple)):
        return f"{value[0]:{form}} to {value[1]:{form}}"
    return "" if value is None else format(value, form)


def mean_of(runs, key, form=".2f"):
    return text(over_runs(runs, key).mean, form)


def spread(runs, key, interval, name):
    """Columns of a number over runs: its mean, interval over prompts and standard deviation over seeds."""
    mean, ci, sd = over_runs(runs, key, interval)
    return {name: text(mean), f"{name} 95 %": text(ci, ".1f"), f"{name} sd": text(sd)}


def settings_table(settings, start):
    lines = []
    for name, results in settings.items():
        n_runs = max(len(results[kind]) for kind in ("winrate", *SUITES, "pairs"))
        if n_runs == 0 and not results["boundary"] and not results["metrics"]:
            continue  # the record of a stage whose output many settings share
        runs = list(results["winrate"].values())
        line = {"setting": name, "runs": text(n_runs or None, "d")}
        line |= spread(runs, "length_controlled_winrate", "lc_ci", "LC")
        line |= spread(runs, "win_rate", "ci", "win rate")
        line["standard error"] = mean_of(runs, "standard_error")
        if start and start != name:
            line["gain"] = text(gain(settings, name, start), "+.2f")
        for suite in SUITES:
            if results[suite]:
                line |= spread(results[suite].values(), "average", "", suite.replace("_", " "))
        line["reward"] = mean_of(runs, "reward")
        line["characters"] = mean_of(runs, "avg_length", ".0f")
        line["prompts"] = mean_of(runs, "n_total", ".0f")
        line |= pair_means(results) | compute(results)
        if runs:
            line["judge"] = ", ".join(runs[0].get("labelers") or [runs[0].get("by", "")])
            line["formula of LC"] = runs[0].get("formula", "")
        lines.append(line)
    return lines


def pair_means(results):
    """Columns of a setting's pairs: how many, and the means of their rewards."""
    counts = [meta["counts"] for meta in results["pairs"].values()]
    stats = [meta["stats"] for meta in results["pairs"].values()]
    samples = [numbers.get("reward of all samples", {}) for numbers in stats]
    chosen = [numbers.get("chosen reward", {}) for numbers in stats]
    gaps = [numbers.get("gap", {}) for numbers in stats]
    line = {"pairs": mean_of(counts, "pairs", ".0f"), "mean of samples": mean_of(samples, "mean")}
    return line | {"mean chosen": mean_of(chosen, "mean"), "mean gap": mean_of(gaps, "mean")}


def compute(results):
    """Columns of what a setting cost, from the records that are given: tokens by stage, and seconds."""
    metas = list(results["meta"].values())
    line = {}
    for stage in ("sampled", "scored", "trained"):
        total = sum(meta["counts"].get(f"tokens_{stage}", 0) for meta in metas)
        line[f"tokens {stage}"] = text(total or None, ",")
    if not line["tokens trained"]:
        total = sum(step["tokens"] for steps in results["metrics"].values() for step in steps)
        line["tokens trained"] = text(total or None, ",")
    line["seconds"] = text(sum(meta.get("seconds", 0) for meta in metas) or None, ".0f")
    return line


def grid_table(settings):
    """Of settings such as beta_0.1_lr_5e-7 the LC, or win rate: a line per beta, a column per lr."""
    lines = {}
    for name, results in settings.items():
        numbers = re.fullmatch(r"([a-z]+)_([\d.e-]+)_([a-z]+)_([\d.e-]+)", name)
        runs = results["winrate"].values()
        if numbers and runs:
            row, column = f"{numbers[1]} {numbers[2]}", f"{numbers[3]} {numbers[4]}"
            rate = mean_of(runs, "length_controlled_winrate") or mean_of(runs, "win_rate")
            lines.setdefault(row, {"setting": row})[column] = rate
    return list(lines.values())


def groups_table(settings):
    runs = [run for results in settings.values() for run in results["winrate"].items()]
    lines = []
    for name, run in runs:
        for kind in ("categories", "length_bins"):
            for group, rates in run.get(kind, {}).items():
                line = {"setting": name, "of": kind.replace("_", " "), "group": group}
                line |= {"n": str(rates["n_total"]), "LC": text(rates.get("length_controlled_winrate"))}
                line |= {"LC 95 %": text(rates.get("lc_ci"), ".1f"), "win rate": text(rates.get("win_rate"))}
                lines.append(line | {"95 %": text(rates.get("ci"), ".1f")})
    return lines


def benchmarks_table(settings, suite):
    lines = []
    for name, results in settings.items():
        runs = list(results[suite].values())
        if not runs:
            continue
        line = {"setting": name, "runs": str(len(runs))}
        for task in dict.fromkeys(task for run in runs for task in run["tasks"]):
            scores = [run["tasks"][task] for run in runs if task in run["tasks"]]
            mean, _, sd = over_runs(scores, "score")
            line[f"{task} (n = {scores[0]['n']})"] = text(mean)
            line |= {f"{task} se": mean_of(scores, "stderr"), f"{task} sd": text(sd)}
        lines.append(line | {"average": mean_of(runs, "average")})
    return lines


def delta_table(settings, triples):
    """S2's ratio of two gains from one start model, next to the start model's boundary score."""
    lines = []
    for start, off, on in triples:
        gains = [gain(settings, name, start) for name in (off, on)]
        if None in gains:
            fail(f"--delta {start} {off} {on}: expected win rates of all three, found {', '.join(settings)}")
        line = {"start": start, "boundary score": mean_of(settings[start]["boundary"].values(), "score")}
        line |= {"off-trained": off, "gain off": text(gains[0], "+.2f")}
        line |= {"on-trained": on, "gain on": text(gains[1], "+.2f"), "delta": delta(*gains)}
        lines.append(line)
    return lines


def delta(off, on):
    """gain off / gain on as text; S2 prints +inf where only one source gains, - where neither does."""
    if on > 0:
        return f"{off / on:.2f}"
    return "+inf" if off > 0 else "-"


def boundary_table(settings):
    lines = []
    runs = [(name, run) for name, results in settings.items() for run in results["boundary"].values()]
    for name, run in runs:
        matched = run.get("length_matched") or {"score": None, "ci": None}
        distinct = run.get("distinct") or {"sum": None}
        line = {"setting": name} | score_of("", run)
        line |= {"length-matched": text(matched["score"], ".3f")}
        line |= {"length-matched 95 %": text(matched["ci"], ".3f"), "distinct": text(distinct["sum"], ".3f")}
        lines.append(line | {"stage": run["stage"], "use": run["use"]})
        for category, result in (run.get("by_category") or {}).items():
            line = {"setting": name} | score_of(category, result)
            lines.append(line | {"stage": result["stage"], "use": result["use"]})
    return lines


def score_of(category, result):
    """Columns of a boundary score, of all prompts (category "") or of a category's."""
    line = {"category": category, "prompts": str(result["n_prompts"])}
    line |= {"V_on": f"{result['v_on']:g}", "V_off": f"{result['v_off']:g}", "ties": str(result["ties"])}
    return line | {"score": text(result["score"], ".3f"), "score 95 %": text(result["ci"], ".3f")}


def pair_sets_table(settings):
    lines = []
    metas = [(name, meta) for name, results in settings.items() for meta in results["pairs"].values()]
    for name, meta in metas:
        counts = {column: str(meta["counts"].get(column, "")) for column in ("pairs", "on", "off", "cross")}
        for what, numbers in meta["stats"].items():
            line = {"setting": name, **counts, "of": what}
            for column, value in numbers.items():
                line[column] = text(value, "," if column == "n" else ".2f")
            lines.append(line)
    return lines


# ----- the paper's numbers, and writing
def read_paper(path):
    """[(setting, column, value)] of a file of the paper's numbers."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file, strict=True)
            return [tuple(line[name].strip() for name in ("setting", "column", "value")) for line in lines]
    except (OSError, KeyError, AttributeError, UnicodeError, csv.Error) as error:
        fail(f"--paper {path}: expected the columns setting, column and value in each line: {error!r}")


def add_paper(tables, numbers):
    """The paper's numbers as columns "COLUMN (paper)"; settings that are not among ours get a line.

    They go to the first table that has the column ("mmlu" is in "mmlu (n = 100)"), or else to the settings.
    """
    columns = {}  # column without its n -> (table, column); the first table comes last and wins
    for name, lines in reversed(tables.items()):
        for line in lines:
            for column in line:
                columns[column.partition(" (n = ")[0]] = name, column
    for setting, column, value in numbers:
        name, column = columns.get(column, ("settings", column))
        line_of(tables[name], setting)[f"{column} (paper)"] = value


def line_of(lines, setting):
    """The line of a table whose first column is the setting; a new one if there is none."""
    key = next(iter(lines[0])) if lines else "setting"
    for line in lines:
        if line[key] == setting:
            return line
    lines.append({key: setting})
    return lines[-1]


def rows_of(lines):
    """The header and the rows of a table: columns that are not empty, a column of the paper after ours."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    columns = [column for column in columns if any(line.get(column) for line in lines)]
    ours = [column.removesuffix(" (paper)") for column in columns]
    columns.sort(key=lambda column: ours.index(column.removesuffix(" (paper)")))
    return [columns] + [[line.get(column, "") for column in columns] for line in lines]


def as_csv(rows):
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().removesuffix("\n")


def as_markdown(rows):
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.replace("|", "/").ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


def write_report(tables, out):
    """A CSV file per table, and report.md, whose lines are returned."""
    report = ["# Report"]
    for name, lines in tables.items():
        path = Path(out, f"{name}.csv")
        if lines:
            rows = rows_of(lines)
            replace_file(path, [as_csv(rows)])
            report += ["", f"## {name}", "", *as_markdown(rows)]
            continue
        try:
            path.unlink(missing_ok=True)  # of an earlier report
        except OSError as error:
            fail(f"--out {out}: {error}")
    for figure in sorted(Path(out).glob("*.png")):
        report += ["", f"![{figure.stem}]({figure.name})"]
    replace_file(Path(out, "report.md"), report)
    return report


def main(args):
    results = read_results(args.results)
    paper = read_paper(args.paper) if args.paper else []
    first = [*baselines_of(results), args.start, *(setting for setting, _, _ in paper)]
    settings = in_order(add_baselines(results), first)
    if args.start and args.start not in settings:
        names = ", ".join(settings)
        fail(f"--start {args.start}: no setting or baseline has this name; use one of {names}")
    tables = {"settings": settings_table(settings, args.start)}
    tables["grid"] = grid_table(settings)
    tables["groups"] = groups_table(settings)
    for suite in SUITES:
        tables[suite] = benchmarks_table(settings, suite)
    tables["delta"] = delta_table(settings, args.delta)
    tables["boundary"] = boundary_table(settings)
    tables["pair_sets"] = pair_sets_table(settings)
    add_paper(tables, paper)
    print("\n".join(write_report(tables, args.out)))
    counts = {name: len(lines) for name, lines in tables.items() if lines}
    print(json.dumps({"out": args.out, "tables": counts}))


if __name__ == "__main__":
    main(parse_args())
