"""
Comparisons of one experiment -> their table.

Reads   FOLDER   NAME.json and NAME.verified.json of report/compare.py, as results/settings.sh writes them
Prints  a line of Markdown per NAME, the first setting minus the second in points with 95 % intervals: win
        rates by the reward, plain and length-controlled (LC), on all prompts and on groups of them, and the
        share of right answers. A star: one seed, so the interval is of these models alone. "Seeds paired" is
        LC with the interval of the differences of runs of the same seed, empty without such runs. The
        standard error is that of LC on all prompts, over prompts and, with several seeds, over seeds

    python results/differences.py results/shares
"""

import argparse
import json
import math
from pathlib import Path

COLUMNS = (
    ("all", "length_controlled_winrate", "LC"),
    ("all", "win_rate", "win rate"),
    ("open", "length_controlled_winrate", "LC, open"),
    ("open", "win_rate", "win rate, open"),
    ("taste", "length_controlled_winrate", "LC, taste"),
    ("verifiable", "length_controlled_winrate", "LC, verifiable"),
)


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER")
    return parser.parse_args(argv)


def cell_text(cell, scale=1):
    difference, low, high = scale * cell["difference"], scale * cell["ci"][0], scale * cell["ci"][1]
    star = "" if cell["error_over_seeds"] is not None else "*"
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f}){star}"


def line_of(groups, right):
    """The cells of a comparison's line, from its groups by the reward and its right answers."""
    cells = [cell_text(groups[group][measure]) for group, measure, _ in COLUMNS]
    cells.append(cell_text(right, 100))
    rate = groups["all"]["length_controlled_winrate"]
    paired = ""
    if "ci_paired" in rate:
        low, high = rate["ci_paired"]
        paired = f"{low:+.1f} to {high:+.1f}"
    error = math.hypot(rate["error_over_prompts"], rate["error_over_seeds"] or 0)
    return [*cells, paired, f"{error:.1f}"]


def main(args):
    titles = [title for *_, title in COLUMNS] + ["right answers", "LC, seeds paired", "LC, standard error"]
    print(f"| comparison | {' | '.join(titles)} |")
    print(f"|{'---|' * (len(titles) + 1)}")
    for verified in sorted(Path(args.folder).glob("*.verified.json")):
        name = verified.name.removesuffix(".verified.json")
        groups = json.loads((verified.parent / f"{name}.json").read_text(encoding="utf-8"))["groups"]
        right = json.loads(verified.read_text(encoding="utf-8"))["groups"]["all"]["reward"]
        print(f"| {name} | {' | '.join(line_of(groups, right))} |")


if __name__ == "__main__":
    main(parse_args())
