"""
What the length-controlled win rate and the report cost, beside the library that alpaca_eval fits with.

    pip install scikit-learn
    python benchmarks/evaluation.py --annotations results/claude-2/annotations.json --lc-data alpaca_eval

fit               evaluate.py's fit with a given penalty, beside scikit-learn's LogisticRegression with
                  alpaca_eval's settings on the same rows; both rates
cross-validation  the penalty by five folds, beside LogisticRegressionCV on the same folds; both rates
bootstrap         1,000 draws of the prompts with 20 groups of them; alpaca_eval has none
report            report/table.py and report/figure.py settings on made-up results of 20 models with
                  categories, length bins and trainings

Prints one JSON object; times are in seconds, the fastest of a few calls.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import evaluate  # noqa: E402

SETTINGS = {"penalty": "l1", "solver": "liblinear", "tol": 1e-4, "max_iter": 100, "random_state": 123}


def fastest(call, repeats):
    """(seconds of the fastest call, the last result)."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - started)
    return min(times), result


def read_prompts(annotations, lc_data):
    """AlpacaEval's prompts as the arrays that evaluate.py fits, and the gamed rows."""
    prompts, _, _ = evaluate.read_annotations(annotations)
    prompts, gamed, _ = evaluate.with_difficulty(prompts, lc_data, annotations)
    columns = evaluate.as_columns(prompts)
    del columns["category"]
    groups = np.random.default_rng(0).random((len(prompts), 20)) < 0.1
    columns["members"] = np.column_stack([np.ones(len(prompts), bool), groups])
    return columns, gamed


def compare_fits(prompts, gamed):
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

    warnings.simplefilter("ignore")  # scikit-learn's deprecations
    x, p, weight = evaluate.training_rows(prompts, gamed)
    n = len(prompts["p"])
    features, labels = np.concatenate([x, x]), np.repeat([1, 0], len(p))  # a soft target is two rows
    weights = np.concatenate([weight * p, weight * (1 - p)])
    fold = np.tile(np.concatenate([prompts["index"], np.arange(len(p) - n)]) % 5, 2)
    folds = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(5)]

    def rate(theta):
        return round(100 * evaluate.sigmoid(x[:n, 1:] @ theta[1:]).mean(), 4)

    penalty = evaluate.MINIMAL_C
    seconds, theta = fastest(lambda: evaluate.fit(x, p, weight, penalty), 20)
    library = LogisticRegression(C=penalty, fit_intercept=False, **SETTINGS)
    library_seconds, _ = fastest(lambda: library.fit(features, labels, weights), 5)
    result = {"fit": [seconds, library_seconds, rate(theta), rate(library.coef_[0])]}

    seconds, penalty = fastest(lambda: evaluate.choose_C(prompts, gamed), 5)
    theta = evaluate.fit(x, p, weight, penalty)
    library = LogisticRegressionCV(Cs=10, cv=folds, scoring="neg_log_loss", fit_intercept=False, **SETTINGS)
    library_seconds, _ = fastest(lambda: library.fit(features, labels, weights), 5)
    result["cross-validation"] = [seconds, library_seconds, rate(theta), rate(library.coef_[0])]
    columns = ("seconds", "scikit-learn_seconds", "rate", "scikit-learn_rate")
    return {name: dict(zip(columns, numbers, strict=True)) for name, numbers in result.items()}


def write_results(folder, models=20, categories=16, steps=2000):
    """Results of made-up models under a folder; their files."""
    draw = np.random.default_rng(0)

    def group():
        rate, lc = draw.uniform(10, 90, 2)
        cell = {"n_total": 50, "win_rate": rate, "ci": [rate - 5, rate + 5], "standard_error": 2.0}
        cell |= {"length_controlled_winrate": lc, "lc_ci": [lc - 5, lc + 5]}
        return cell | {"reward": 1.0, "reward_ci": [0.5, 1.5]}

    for k in range(models):
        name = folder / f"model{k}"
        name.mkdir()
        result = group() | {"kind": "winrate", "model": str(name), "baseline": "gpt4_1106_preview"}
        result |= {"n_total": 805, "avg_length": 2000, "avg_length_baseline": 2000, "by": "wins"}
        result["categories"] = {f"category {c}": group() for c in range(categories)}
        result["length_bins"] = {f"{500 * c} to {500 * c + 500}": group() for c in range(4)}
        (folder / f"model{k}.winrate.json").write_text(json.dumps(result))
        step = {"loss": 0.6, "margin": 0.1, "accuracy": 0.6, "diversity": 1.0, "pairs": 32, "tokens": 30_000}
        lines = [json.dumps({"step": i, "epoch": 0, **step}) + "\n" for i in range(steps)]
        (name / "metrics.jsonl").write_text("".join(lines))
    return [*map(str, folder.glob("*.json")), *map(str, folder.glob("*/metrics.jsonl"))]


def report_seconds():
    with tempfile.TemporaryDirectory() as folder:
        files = write_results(Path(folder))
        winrates = [file for file in files if file.endswith(".winrate.json")]
        tables = [sys.executable, REPO / "report/table.py", *files, "--out", f"{folder}/report"]
        figure = [
            sys.executable,
            REPO / "report/figure.py",
            "settings",
            *winrates,
            "--out",
            f"{folder}/x.png",
        ]
        seconds = {
            name: fastest(partial(subprocess.run, command, capture_output=True, check=True), 1)[0]
            for name, command in (("table_seconds", tables), ("figure_seconds", figure))
        }
    return seconds


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--annotations", required=True, help="a model's verdicts on AlpacaEval's prompts")
    parser.add_argument("--lc-data", required=True, help="as evaluate.py takes it")
    args = parser.parse_args()
    prompts, gamed = read_prompts(args.annotations, args.lc_data)
    result = compare_fits(prompts, gamed)
    penalty = evaluate.MINIMAL_C
    theta, _ = evaluate.rates(prompts, gamed, penalty)
    seconds, _ = fastest(lambda: evaluate.bootstrap(prompts, gamed, penalty, theta), 1)
    result["bootstrap"] = {"seconds": seconds}
    print(json.dumps(result | {"report": report_seconds()}))


if __name__ == "__main__":
    main()
