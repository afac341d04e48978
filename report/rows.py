"""
What figure.py draws of files of prompts, scored responses or pairs -> panels of series, as in points.py.
"""

import math
from collections import Counter, defaultdict
from typing import Annotated, Literal, Required, TypedDict

import msgspec
import numpy as np
from points import RESULTS, Panel, Point, short_names

from chat import answer
from common import Message, fail, read_jsonl

SOURCES = {"on": "on-policy", "off": "off-policy", "cross": "cross-source"}
Side = str | Annotated[list[Message], msgspec.Meta(min_length=1)]
Labelled = TypedDict("Labelled", {"category": str | None})


class Response(TypedDict, total=False):
    text: Required[str]
    final: str | None  # what follows its reasoning
    source: Required[Literal["on", "off"]]
    reward: Required[float | None]


class Scored(TypedDict, total=False):
    id: str
    responses: Required[list[Response]]
    labeler: str | None


class ScoredOrPair(TypedDict, total=False):
    id: str
    responses: list[Response]
    labeler: str | None
    chosen: Side
    rejected: Side
    source: str | None


# ----- shares and rewards
def shares_panels(paths):
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
    return [Panel("bars", "share of the prompts (%)", "", points, 0)], categories


def check_labelers(paths, labelers):
    if len(labelers) > 1:
        fail(f"{', '.join(paths)}: rewards of different labelers: {' and '.join(sorted(labelers))}")


def rewards_panels(paths):
    rewards, labelers = defaultdict(list), set()
    for path, name in short_names(paths).items():
        for _, row in read_jsonl(path, Scored):
            for response in row["responses"]:
                if response["reward"] is not None:
                    labelers.add(str(row.get("labeler")))
                    rewards[f"{name}, {response['source']}-policy"].append(response["reward"])
    if not rewards:
        fail(f"{', '.join(paths)}: no response has a reward; score.py gives them")
    check_labelers(paths, labelers)
    series = {f"{name} (mean {np.mean(values):.2f})": values for name, values in rewards.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(series.values())), 40)
    return [Panel("histogram", "reward", "share of the responses", shares_between(edges, series))], []


def shares_between(edges, series):
    """{name: (edges, shares of its values between two edges)}."""
    return {name: (edges, np.histogram(values, edges)[0] / len(values)) for name, values in series.items()}


# ----- length
def length_panels(paths):
    scored, gaps, labelers = defaultdict(list), defaultdict(list), set()
    for path in dict.fromkeys(paths):
        for line, row in read_jsonl(path, ScoredOrPair):
            prompt = row.get("id", line)
            if "chosen" in row and "rejected" in row:
                gap = len(text_of(row["chosen"])) - len(text_of(row["rejected"]))
                source = row.get("source")
                gaps[SOURCES.get(source, source or "no source")].append((prompt, gap))
            elif "responses" not in row:
                fail(f'{line}: expected "responses", or "chosen" and "rejected"; found {", ".join(row)}')
            for response in row.get("responses", []):
                if response["reward"] is not None:
                    labelers.add(str(row.get("labeler")))
                    numbers = (prompt, len(answer(response)), response["reward"])
                    scored[SOURCES[response["source"]]].append(numbers)
    if not scored and not gaps:
        fail(f"{', '.join(paths)}: expected responses with rewards (score.py) or pairs, found none")
    check_labelers(paths, labelers)
    panels = []
    if scored:
        panels.append(reward_panel(dict(sorted(scored.items(), reverse=True))))  # on-policy first
    if gaps:
        panels.append(gap_panel(dict(sorted(gaps.items(), reverse=True))))
    return panels, []


def text_of(side):
    """What the last message of a side of a pair, or a side that is a text, says after its reasoning."""
    return answer({"text": side if isinstance(side, str) else side[-1]["content"]})


def reward_panel(scored):
    """Mean rewards of {source: [(prompt, characters, reward)]}, in up to ten bins of equally many."""
    series, lines = {}, []
    for name, numbers in scored.items():
        prompts, lengths, rewards = map(np.array, zip(*numbers, strict=True))
        n_bins = min(10, max(1, len(numbers) // 10))
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, n_bins + 1)))
        bins = np.searchsorted(edges[1:-1], lengths, side="right")
        series[name] = []
        for k in np.unique(bins):
            interval = mean_over_prompts(rewards[bins == k], prompts[bins == k])
            series[name].append(Point(lengths[bins == k].mean(), *interval))
        line = f"{name}: {len(numbers):,} responses"
        if lengths.std() > 0 and rewards.std() > 0:
            line += f", correlation {np.corrcoef(lengths, rewards)[0, 1]:.2f}"
        lines.append(line)
    return Panel("curves", "characters of the answer", "mean reward", series, title="\n".join(lines))


def mean_over_prompts(values, prompts):
    """(mean, low, high): values (n,), 95 % interval of the mean over prompts, each with its values.

    The variance is that of a ratio of sums over prompts: values of one prompt may err together.
    """
    mean = values.mean()
    index = np.unique(prompts, return_inverse=True)[1]
    errors = np.bincount(index, values - mean)
    n_prompts = len(errors)
    if n_prompts == 1:
        return mean, mean, mean
    half = 1.96 * np.sqrt(n_prompts / (n_prompts - 1) * (errors**2).sum()) / len(values)
    return mean, mean - half, mean + half


def gap_panel(gaps):
    """Histograms of {source: [(prompt, chosen minus rejected characters)]}."""
    series, lines = {}, []
    for name, numbers in gaps.items():
        prompts, series[name] = map(np.array, zip(*numbers, strict=True))
        mean, low, high = mean_over_prompts(series[name], prompts)
        lines.append(f"{name}: {len(numbers):,} pairs, mean {mean:+.0f} (95 %: {low:+.0f} to {high:+.0f})")
    together = np.concatenate(list(series.values()))
    bounds = np.percentile(together, [0.5, 99.5])  # a few long answers would leave no room for the others
    n_bins = min(40, max(8, math.isqrt(len(together))))
    shares = shares_between(
        np.histogram_bin_edges(bounds, n_bins),
        {name: values.clip(*bounds) for name, values in series.items()},
    )
    labels = ("characters: chosen minus rejected", "share of the pairs")
    return Panel("histogram", *labels, shares, 0, "\n".join(lines))


FIGURES = RESULTS | {
    "shares": shares_panels,
    "rewards": rewards_panels,
    "length": length_panels,
}
