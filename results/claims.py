"""
Claims and results -> the table of results/README.md, and its figure.

Reads   CLAIMS   JSON: [{"claim", "paper", "result", "group", "measure", "sign"}]: what a paper says, its
                 number as text, and where ours is: a JSON of report/compare.py beside CLAIMS, a group and a
                 measure in it, and the sign that the claim gives the difference, 1 or -1. With "boundary",
                 a pattern of boundary.py's files beside CLAIMS, the sign is that of their mean score - 0.5
Writes  --figure FILE   PNG: the differences times the sign, with their 95 % intervals
Prints  a line of Markdown per claim, the difference times the sign: agrees if the whole 95 % interval is
        above 0, disagrees if it is below, else undecided; "of these models" if a setting was trained with one
        seed; "not run" without a result

    python results/claims.py results/claims.json --figure results/claims.png
"""

import argparse
import json
import textwrap
from pathlib import Path

MEASURES = {"win_rate": "win rate", "length_controlled_winrate": "LC", "reward": "reward"}
COLOURS = {"agrees": "#009E73", "disagrees": "#D55E00", "undecided": "#777777"}


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("claims", metavar="CLAIMS")
    parser.add_argument("--figure", metavar="FILE")
    return parser.parse_args(argv)


def verdict(low, high):
    """Whether a difference with this interval, times the sign of the claim, is as claimed."""
    if low > 0:
        return "agrees"
    return "disagrees" if high < 0 else "undecided"


def with_result(claim, folder):
    """The claim with the difference and its interval in points, what it was measured by, and the verdict."""
    path = folder / claim["result"]
    if not path.exists():
        return claim | {"verdict": "not run"}
    group = json.loads(path.read_text(encoding="utf-8"))["groups"][claim["group"]]
    cell, name, scale = group[claim["measure"]], MEASURES[claim["measure"]], 1
    if path.name.endswith(".verified.json"):  # a reward of 1 is a right answer
        name, scale = "right answers", 100
    sign = claim["sign"]
    if "boundary" in claim:
        paths = sorted(folder.glob(claim["boundary"]))
        scores = [json.loads(path.read_text(encoding="utf-8"))["score"] for path in paths]
        sign = 1 if sum(scores) / len(scores) > 0.5 else -1
        listed = " ".join(f"{score:.2f}" for score in scores)
        claim = claim | {"claim": f"{claim['claim']}; ours {listed}"}
    low, high = sorted(sign * scale * end for end in cell["ci"])
    return claim | {
        "difference": sign * scale * cell["difference"],
        "ci": (low, high),
        "by": f"{name}, {claim['group']}, n = {group['n_total']}",
        "seeds": cell["error_over_seeds"] is not None,
        "verdict": verdict(low, high),
    }


def line_of(claim):
    """The cells of a claim's line."""
    if claim["verdict"] == "not run":
        return [claim["claim"], claim["paper"], "", "", claim["result"], "not run"]
    low, high = claim["ci"]
    return [
        claim["claim"],
        claim["paper"],
        f"{claim['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
        claim["by"],
        f"[{claim['result'].removesuffix('.json')}]({claim['result']})",
        claim["verdict"] + ("" if claim["seeds"] else ", of these models"),
    ]


def draw(claims, path):
    """A line per claim that has a result; to the right of 0 is what the claim says."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    claims = [claim for claim in claims if claim["verdict"] != "not run"]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.42 * len(claims)), layout="constrained")
    for k, claim in enumerate(claims):
        colour = COLOURS[claim["verdict"]]
        axes.plot(claim["ci"], [k, k], color=colour, linewidth=2)
        axes.plot(claim["difference"], k, "o" if claim["seeds"] else "s", color=colour)
    for name, colour in COLOURS.items():
        axes.plot([], [], color=colour, linewidth=2, label=name)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(claims)), [textwrap.fill(claim["claim"], 56) for claim in claims], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points in the direction of the claim, 95 % interval; squares: one seed")
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)


def main(args):
    path = Path(args.claims)
    claims = [with_result(claim, path.parent) for claim in json.loads(path.read_text(encoding="utf-8"))]
    print("| claim | paper | ours, points (95 %) | measured by | JSON | |\n|---|---|---|---|---|---|")
    for claim in claims:
        print(f"| {' | '.join(line_of(claim))} |")
    if args.figure:
        draw(claims, args.figure)


if __name__ == "__main__":
    main(parse_args())
