"""
Claims and results -> the table of results/README.md.

Reads   CLAIMS   JSON: [{"claim", "paper", "result", "group", "measure", "sign"}]: what a paper says, its
                 number as text, and where ours is: a JSON of report/compare.py beside CLAIMS, a group and a
                 measure in it, and the sign that the claim gives the difference, 1 or -1
Prints  a line of Markdown per claim: agrees or disagrees if the whole 95 % interval lies on one side of 0,
        else undecided; "of these models" if a setting was trained with one seed

    python results/claims.py results/claims.json
"""

import argparse
import json
from pathlib import Path

MEASURES = {"win_rate": "win rate", "length_controlled_winrate": "LC", "reward": "reward"}


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("claims", metavar="CLAIMS")
    return parser.parse_args(argv)


def verdict(low, high, sign):
    """Whether a difference with this interval has the claimed sign."""
    if low <= 0 <= high:
        return "undecided"
    return "agrees" if (low > 0) == (sign > 0) else "disagrees"


def line_of(claim, folder):
    """The cells of a claim's line."""
    group, measure = claim["group"], MEASURES[claim["measure"]]
    cell = json.loads((folder / claim["result"]).read_text(encoding="utf-8"))["groups"][group]
    difference, (low, high) = cell[claim["measure"]]["difference"], cell[claim["measure"]]["ci"]
    if claim["result"].endswith(".verified.json"):  # a reward of 1 is a right answer
        measure = "right answers"
        difference, low, high = 100 * difference, 100 * low, 100 * high
    decision = verdict(low, high, claim["sign"])
    if cell[claim["measure"]]["error_over_seeds"] is None:
        decision += ", of these models"
    return [
        claim["claim"],
        claim["paper"],
        f"{difference:+.1f} ({low:+.1f} to {high:+.1f})",
        f"{measure}, {group}, n = {cell['n_total']}",
        f"[{claim['result'].removesuffix('.json')}]({claim['result']})",
        decision,
    ]


def main(args):
    claims = json.loads(Path(args.claims).read_text(encoding="utf-8"))
    print("| claim | paper | ours, points (95 %) | measured by | JSON | |\n|---|---|---|---|---|---|")
    for claim in claims:
        print(f"| {' | '.join(line_of(claim, Path(args.claims).parent))} |")


if __name__ == "__main__":
    main(parse_args())
