"""
What the length-controlled win rate and the report cost, beside the libraries that alpaca_eval uses for the same fit, in one run.

    pip install scikit-learn pytest
    python benchmarks/evaluation.py --annotations results/claude-2/annotations.json --lc-data alpaca_eval

1) The rate with a given penalty, ours (all of length_controlled) against the fit alone of scikit-learn's LogisticRegression with alpaca_eval's settings (ALPACA_LC 3); both rates.
2) The same with the penalty chosen by 5 folds, against LogisticRegressionCV on the same folds; both rates.
3) The bootstrap of 1,000 draws with 20 groups of prompts (alpaca_eval has none).
4) `evaluate.py report` of 20 models with categories, length bins, trainings and benchmarks (made by tests/test_report.py), seconds.
Prints one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]
import evaluate  # noqa: E402


def best_seconds(call, repeats: int) -> tuple[float, object]:
    """(fastest of the repeats, the last result)."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - started)
    return min(times), result


def fits(annotations: str, lc_data: str) -> dict:
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

    warnings.simplefilter("ignore")  # scikit-learn's deprecations
    prompts, model, _ = evaluate.read_annotations(annotations)
    official, gamma, gamed, _ = evaluate.read_reference(Path(lc_data))
    keys = sorted(prompts, key=official.get)
    places = np.array([official[key] for key in keys])
    p = np.array([prompts[key]["p"] for key in keys])
    deltas = np.array([prompts[key]["len_baseline"] - prompts[key]["len"] for key in keys])
    n = len(p)

    features, targets, weights = evaluate.lc_problem(p, deltas, np.ones(n), gamma[places], gamed)
    folds = np.concatenate([places, np.arange(len(targets) - n)]) % 5
    twice, labels = (
        np.concatenate([features] * 2),
        np.repeat([1, 0], len(targets)),
    )  # a soft target is two weighted rows
    sample = np.concatenate([weights * targets, weights * (1 - targets)])
    settings = {
        "penalty": "l1",
        "solver": "liblinear",
        "tol": 1e-4,
        "max_iter": 100,
        "random_state": 123,
        "fit_intercept": False,
    }

    pairs = [
        (np.flatnonzero(np.tile(folds, 2) != k), np.flatnonzero(np.tile(folds, 2) == k)) for k in range(5)
    ]
    measured = {"model": model, "prompts": n}
    for name, penalty, theirs in (
        ("fit", evaluate.MINIMAL_PENALTY, LogisticRegression(C=evaluate.MINIMAL_PENALTY, **settings)),
        ("cross-validation", None, LogisticRegressionCV(Cs=10, cv=pairs, scoring="neg_log_loss", **settings)),
    ):
        own, ours = best_seconds(
            lambda: evaluate.length_controlled(p, deltas, places, gamma[places], gamed, penalty), 20
        )
        other, fitted = best_seconds(lambda: theirs.fit(twice, labels, sample), 5)
        equal, _ = evaluate.length_effect(features[:n], fitted.coef_[0])
        measured[name] = {
            "ours_ms": round(1000 * own, 2),
            "scikit_learn_ms": round(1000 * other, 2),
            "ratio": round(other / own, 1),
            "ours": round(ours["length_controlled_winrate"], 4),
            "scikit_learn": round(100 * equal.mean(), 4),
        }
    groups = np.random.default_rng(0).random((20, n)) < 0.1
    seconds, _ = best_seconds(
        lambda: evaluate.lc_bootstrap(
            p, deltas, evaluate.draw_prompts(n), evaluate.MINIMAL_PENALTY, groups, gamma[places], gamed
        ),
        2,
    )
    return measured | {"bootstrap_s": round(seconds, 2)}


def report_of_20() -> dict:
    from test_report import twenty

    with tempfile.TemporaryDirectory() as folder:
        files = list(map(str, twenty(Path(folder))))
        argv = [sys.executable, REPO / "evaluate.py", "report", *files, "--out", f"{folder}/report"]
        seconds, done = best_seconds(
            lambda: subprocess.run(argv, capture_output=True, text=True, check=True), 1
        )
    return {
        "report_s": round(seconds, 1),
        "figures": len(json.loads(done.stdout.splitlines()[-1])["figures"]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", required=True, help="a model's verdicts on AlpacaEval's prompts")
    parser.add_argument(
        "--lc-data", required=True, help="folder with df_gamed.csv and alpaca_eval_gpt4_baseline.json"
    )
    args = parser.parse_args()
    print(json.dumps(fits(args.annotations, args.lc_data) | report_of_20()))
