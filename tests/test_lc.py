"""
evaluate.py: length-controlled win rates (docs/ALPACA_LC.md 2, 3, 5, 6) and the flags of `winrate` that belong to them.

Covers  the penalised fit against its optimality conditions and closed forms; its cross-validation and bootstrap against slow ones written
        here; the public leaderboard, where ../shared/data has it; annotations and reference files as AlpacaEval publishes them;
        --by-position, --lc-c, --minus, --bins-of, --allow-missing; categories and length bins; what is refused.
Run     python -m pytest tests/test_lc.py
"""

import gzip
import json
import math

import evaluate
import numpy as np
import pytest
from conftest import REPO, write_rows

SHARED = REPO.parent / "shared" / "data" / "alpaca_lc"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
# leaderboard row (win rate, standard error, LC, lc standard error, length), index of the C that it was fitted with
PUBLISHED = {"claude-2": (17.188240356708075, 1.17482825615589, 28.155196141629148, None, 1069, 5),
             "vicuna-7b-v1.5": (4.797493939167703, 0.6655960676971918, 7.616892731870527, None, 1083, 6),
             "FuseChat-Llama-3.2-3B-Instruct": (51.29667710101864, 1.482579367297701, 53.99883748344241, 0.6945055858828797, 1976, 6)}


def logistic(logits):
    return np.exp(-np.logaddexp(0, -logits))


def off_optimum(features, targets, weights, penalty, theta):
    """Largest violation of 0 in gradient + sign(theta), with [-1, 1] for the sign of 0."""
    gradient = penalty * (weights * (logistic(features @ theta) - targets)) @ features
    return np.where(theta == 0, np.maximum(np.abs(gradient) - 1, 0), np.abs(gradient + np.sign(theta))).max()


def random_problem(seed, n=300, k=3):
    rng = np.random.default_rng(seed)
    features = np.concatenate([rng.normal(size=(n, k - 1)), np.ones((n, 1))], 1)
    return features, rng.random(n), rng.random(n)


def load(name):
    """(p, deltas, gamma, gamed, rows) of a shared model, in the official order."""
    with gzip.open(SHARED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    _, gamma, gamed, _ = evaluate.read_reference(SHARED)
    return (np.array([row["preference"] - 1 for row in rows]), np.array([row["len_1"] - row["len_2"] for row in rows]), gamma, gamed, rows)


# ------------------------------------------------------------------------------------------------------------ the fit

@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 0.3, 3, 1e2, 1e4])
def test_fit_meets_the_conditions_of_the_minimum(penalty):
    for seed in range(10):
        problem = random_problem(seed)
        assert off_optimum(*problem, penalty, evaluate.fit_l1(*problem, penalty)) < 1e-8


def test_fit_of_an_intercept_is_the_mean_moved_by_the_penalty():
    """C W (sigmoid(theta) - mean) = -sign(theta), and exactly 0 once C W |1/2 - mean| <= 1."""
    targets, weights = np.array([0.9, 0.8, 0.4, 0.9]), np.array([1, 2, 1, 1.0])
    mean, total = (targets * weights).sum() / 5, 5
    assert mean == pytest.approx(0.76)
    for penalty in (1, 7.3, 1e4):
        theta = evaluate.fit_l1(np.ones((4, 1)), targets, weights, penalty)
        assert logistic(theta[0]) == pytest.approx(mean - 1 / (penalty * total), abs=1e-14)
    assert evaluate.fit_l1(np.ones((4, 1)), targets, weights, 1 / (5 * 0.26) - 1e-6)[0] == 0
    assert evaluate.fit_l1(np.ones((4, 1)), targets, weights, 1 / (5 * 0.26) + 1e-6)[0] > 0


def test_fit_finds_the_theta_that_made_the_chances():
    features, _, weights = random_problem(3)
    theta = np.array([-1.9, 0.7, -3.1])
    assert evaluate.fit_l1(features, logistic(features @ theta), weights, 1e4) == pytest.approx(theta, abs=1e-4)
    assert evaluate.fit_l1(features, logistic(features @ theta), weights, 1e9) == pytest.approx(theta, abs=1e-9)


def test_fit_of_many_problems_is_that_of_each():
    features, targets, weights = random_problem(4)
    many = np.random.default_rng(5).integers(0, 3, (2, 1, 300)) * weights
    together = evaluate.fit_l1(features, targets, many, np.array([1e-4, 0.2, 50]))
    assert together.shape == (2, 3, 3)
    for i in range(2):
        for j, penalty in enumerate([1e-4, 0.2, 50]):
            assert together[i, j] == pytest.approx(evaluate.fit_l1(features, targets, many[i, 0], penalty), abs=1e-10)
    turned = np.random.default_rng(6).permutation(300)
    again = evaluate.fit_l1(features[turned], targets[turned], weights[turned], 2.0)
    assert again == pytest.approx(evaluate.fit_l1(features, targets, weights, 2.0), abs=1e-12)


def test_fit_of_separable_constant_and_equal_columns():
    """What a fit meets on few prompts or a judge that counts characters: it ends, at a minimum."""
    rng = np.random.default_rng(0)
    wide = np.stack([40 * rng.normal(size=1000), np.ones(1000)], 1)
    narrow = np.stack([np.tanh(wide[:, 0] / 40), rng.normal(size=1000), np.ones(1000)], 1)
    empty = narrow * [0, 1, 1]
    equal = narrow[:, [0, 0, 2]]
    for features, targets in ((wide, wide[:, 0] > 0), (narrow, narrow[:, 0] > 0), (empty, rng.random(1000)), (equal, rng.random(1000)),
                              (narrow, np.ones(1000)), (narrow[:1], np.ones(1))):
        for penalty in (1e-4, 1, 1e4):
            theta = evaluate.fit_l1(features, targets * 1.0, np.ones(len(targets)), penalty)
            assert off_optimum(features, targets, np.ones(len(targets)), penalty, theta) < 1e-8 * max(1, penalty)
    assert evaluate.fit_l1(empty, rng.random(1000), np.ones(1000), 1e4)[0] == 0


@pytest.mark.parametrize("p, deltas, counts", [
    ([0, 1, 0, 1, 0, 0], [-51, -4, 10, -23, -22, -7], [0, 0, 0, 4, 1, 1]),
    ([1, 1, 1, 1, 1, 1, 1, 0], [17, -53, 31, -32, -5, 20, -9, 34], [4, 0, 3, 0, 0, 0, 0, 1])])
def test_fit_of_a_draw_of_few_prompts_under_a_weak_penalty(p, deltas, counts):
    """What --lc-c 10000 meets on a handful of prompts that length separates."""
    fit = evaluate.lc_problem(np.array(p, float), np.array(deltas, float), np.array(counts), None, None)
    assert off_optimum(*fit, 1e4, evaluate.fit_l1(*fit, 1e4)) < 1e-4


def test_cross_validation_by_hand():
    features, noise, weights = random_problem(8, n=53)
    targets = logistic(features @ [0.8, 0, -0.4] + 6 * (noise - 0.5))
    weights[11] = 0
    folds = np.arange(53) % 5
    scores = []
    for penalty in 10.0 ** (-4 + 8 * np.arange(10) / 9):
        means = []
        for fold in range(5):
            theta = evaluate.fit_l1(features[folds != fold], targets[folds != fold], weights[folds != fold], penalty)
            losses = [weights[i] * (targets[i] * math.log(q) + (1 - targets[i]) * math.log(1 - q)) for i in range(53)
                      if folds[i] == fold and i != 11 for q in [1 / (1 + math.exp(-features[i] @ theta))]]
            means.append(sum(losses) / len(losses))
        scores.append(sum(means) / 5)
    best = 10 ** (-4 + 8 * np.argmax(scores) / 9)
    assert 1e-3 < best < 1e3 and evaluate.best_penalty(features, targets, weights, folds) == pytest.approx(best)
    assert evaluate.best_penalty(features, np.full(53, 0.5), weights, folds) == pytest.approx(1e-4)  # all alike: the smallest


def test_cross_validation_of_chances_that_round_to_one():
    """A fold of logits in the hundreds, all on the right side: log 0 is no likelihood, and the largest C predicts best."""
    x = np.where(np.arange(40) % 5, 1, 100) * (-1.0) ** (np.arange(40) // 5)
    assert evaluate.best_penalty(np.stack([x, np.ones(40)], 1), x > 0, np.ones(40), np.arange(40) % 5) == pytest.approx(1e4)


# ------------------------------------------------------------------------------------------------------------ the win rate

def test_without_an_effect_of_length_it_is_the_win_rate():
    """Equal lengths, minimal form: sigmoid(theta) = mean p + 1/(C n) below one half, ALPACA_LC 6c's .045 points at C = 2.78, n = 805."""
    p = np.random.default_rng(1).random(200) * 0.8
    result = evaluate.length_controlled(p, np.zeros(200), np.arange(200), penalty=2.0)
    assert result["formula"] == "length_controlled_minimal" and result["theta"][0] == 0
    assert result["length_controlled_winrate"] == pytest.approx(100 * (p.mean() + 1 / 400), abs=1e-9)
    assert result["lc_standard_error"] is None and result["effect"] == pytest.approx(0, abs=1e-12)


def test_a_judge_of_length_alone_ends_at_fifty():
    """p = sigmoid(-2 tanh(d / sd)): the longer output wins, and nothing else counts."""
    deltas = np.random.default_rng(2).normal(-300, 400, 500)
    p = logistic(-2 * np.tanh(deltas / deltas.std(ddof=1)))
    result = evaluate.length_controlled(p, deltas, np.arange(500), penalty=1e4)
    assert 100 * p.mean() > 65 and result["length_controlled_winrate"] == pytest.approx(50, abs=0.01)
    assert result["theta"] == pytest.approx([-2, 0], abs=1e-3)
    one, other = (evaluate.length_controlled(*sides, np.arange(500), penalty=3.0)["length_controlled_winrate"]
                  for sides in ((p, deltas), (1 - p, -deltas)))
    assert one + other == pytest.approx(100, abs=1e-9)


def test_difficulty_and_gamed_rows_by_hand():
    """All 3 + 2 rows written out: standard deviation with n - 1, columns tanh, gamma, 1 (0 for gamed rows), weights 1 and .1."""
    p, deltas, gamma = np.array([0.2, math.nan, 0.9]), np.array([100.0, -50, 250]), np.array([0, 1.5, -2])
    gamed = np.array([[0.3, 0, 0], [-0.4, 1.5, 0]]), np.array([0.6, math.nan])
    features, targets, weights = evaluate.lc_problem(p, deltas, np.ones(3), gamma, gamed)
    spread = math.sqrt(((100 - 100) ** 2 + 150 ** 2 + 150 ** 2) / 2)
    assert features == pytest.approx(np.array([[math.tanh(100 / spread), 0, 1], [math.tanh(-50 / spread), 1.5, 1],
                                               [math.tanh(250 / spread), -2, 1], [0.3, 0, 0], [-0.4, 1.5, 0]]))
    assert targets[[0, 2, 3]] == pytest.approx([0.2, 0.9, 0.6]) and weights == pytest.approx([1, 0, 1, 0.1, 0])
    result = evaluate.length_controlled(p, deltas, np.arange(3), gamma, gamed, penalty=4.0)
    _, t2, t3 = result["theta"]  # the prompt without verdict is predicted, too
    assert result["length_controlled_winrate"] == pytest.approx(100 * np.mean([1 / (1 + math.exp(-t2 * g - t3)) for g in gamma]), abs=1e-9)


def test_baseline_against_itself_is_fifty():
    gamed = np.array([[0.3, 1, 0], [-0.4, 1.5, 0]]), np.array([0.9, 0.8])
    p, deltas, gamma = np.full(20, 0.5), np.zeros(20), np.linspace(0, 3, 20)
    for penalty in (None, 100.0):
        result = evaluate.length_controlled(p, deltas, np.arange(20), gamma, gamed, penalty)
        assert result["length_controlled_winrate"] == 50 and result["theta"] == [0, 0, 0]
    assert (evaluate.lc_bootstrap(p, deltas, evaluate.draw_prompts(20)[:9], 9.0, np.ones((1, 20), bool), gamma, gamed)[0] == 50).all()


# ------------------------------------------------------------------------------------------------------------ bootstrap and groups

def some_model(seed, n=120):
    rng = np.random.default_rng(seed)
    deltas = rng.normal(100, 400, n)
    gamma = rng.normal(size=n)
    p = logistic(-1.2 * np.tanh(deltas / 400) + gamma - 0.5 + rng.normal(size=n))
    gamed = np.stack([rng.uniform(-1, 1, 40), rng.normal(size=40), np.zeros(40)], 1), rng.random(40)
    return p, deltas, gamma, gamed, rng.random((2, n)) < 0.4


def test_a_draw_is_the_fit_of_the_drawn_rows():
    """lc_bootstrap's counts against rows written out as often as they were drawn: new standard deviation, new fit, same C."""
    p, deltas, gamma, gamed, groups = some_model(0)
    p[3], groups[0, 3] = math.nan, True
    draws = evaluate.draw_prompts(120)[:7]
    rates, adjusted = evaluate.lc_bootstrap(p, deltas, draws, 2.0, groups, gamma, gamed)
    for counts, rate, cells in zip(draws, rates, adjusted):
        some = np.repeat(np.arange(120), counts)
        again = evaluate.length_controlled(p[some], deltas[some], some, gamma[some], gamed, 2.0)
        assert rate == pytest.approx(again["length_controlled_winrate"], abs=1e-9)
        for group, cell in zip(groups, cells):
            kept = group[some] & np.isfinite(p[some])
            assert cell == pytest.approx(100 * (p[some][kept].mean() - again["effect"][kept].mean()), abs=1e-9)


def test_interval_of_a_known_distribution():
    """Equal lengths: each draw's LC is its mean plus 1/(C n), so the interval is that of the mean of 0s and 1s."""
    p = np.repeat([0.0, 1.0], [280, 120])
    rates, _ = evaluate.lc_bootstrap(p, np.zeros(400), evaluate.draw_prompts(400), 10.0, np.ones((1, 400), bool))
    error = 100 * math.sqrt(0.3 * 0.7 / 400)
    assert rates.std() == pytest.approx(error, rel=0.07) and rates.mean() == pytest.approx(30 + 100 / 4000, abs=0.3)
    assert rates == pytest.approx(100 * (evaluate.draw_prompts(400) @ p / 400 + 1 / 4000), abs=1e-9)
    assert np.percentile(rates, [2.5, 97.5]) == pytest.approx([30 - 1.96 * error, 30 + 1.96 * error], abs=0.5)


def test_paired_draws_see_what_two_models_share():
    p, deltas, gamma, gamed, groups = some_model(1)
    draws = evaluate.draw_prompts(120)
    better = np.clip(p + 0.05, 0, 1)
    first, cells = evaluate.lc_bootstrap(p, deltas, draws, 2.0, groups, gamma, gamed)
    second, _ = evaluate.lc_bootstrap(better, deltas, draws, 2.0, groups, gamma, gamed)
    assert (draws == evaluate.draw_prompts(120)).all() and (draws.sum(1) == 120).all() and draws.shape == (1000, 120)
    assert np.percentile(second - first, 2.5) > 3 and (second - first).std() < first.std() / 5
    assert evaluate.lc_bootstrap(p, deltas, draws, 2.0, groups, gamma, gamed)[1] == pytest.approx(cells, abs=0)


def test_groups_average_to_the_whole():
    """sum n_g LC_g / n = LC - 100/(C n) where theta_3 < 0 (ALPACA_LC 6c); an empty group is NaN, not 0."""
    p, deltas, gamma, _, groups = some_model(2)
    parts = np.stack([groups[0], ~groups[0], np.zeros(120, bool)])
    result = evaluate.length_controlled(p, deltas, np.arange(120), penalty=2.0)
    rates = evaluate.adjusted_rates(p, result["effect"], np.ones(120), parts)
    assert result["theta"][1] < 0 and math.isnan(rates[2])
    assert rates[:2] @ parts[:2].sum(1) / 120 == pytest.approx(result["length_controlled_winrate"] - 100 / (2.0 * 120), abs=1e-8)


# ------------------------------------------------------------------------------------------------------------ the leaderboard

def run(tmp_path, capsys, *flags, out="result.json"):
    """The result of a command, which it prints as its last line, without NaN: another reader of JSON knows none."""
    evaluate.main(evaluate.parse_args(["winrate", *map(str, flags), "--out", str(tmp_path / out), "--overwrite"]))
    result = json.loads((tmp_path / out).read_text(), parse_constant=pytest.fail)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    return result


@shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_leaderboard(tmp_path, capsys, name):
    win_rate, error, rate, lc_error, length, c_index = PUBLISHED[name]
    flags = "--annotations", SHARED / f"{name}.jsonl.gz", "--lc-data", SHARED
    pinned, own = run(tmp_path, capsys, *flags, "--lc-c", 10 ** (-4 + 8 * c_index / 9)), run(tmp_path, capsys, *flags)
    for result in (pinned, own):
        assert (result["model"], result["baseline"], result["by"]) == (name, "gpt4_1106_preview", "annotations")
        assert result["win_rate"] == pytest.approx(win_rate, abs=1e-6)
        assert result["standard_error"] == pytest.approx(error, abs=1e-6)
        assert (result["n_total"], result["avg_length"], result["formula"]) == (805, length, "length_controlled_v1")
        assert result["lc_ci"][0] + 1 < rate < result["lc_ci"][1] - 1
    assert pinned["length_controlled_winrate"] == pytest.approx(rate, abs=0.02)  # .002 here; liblinear's tolerance is the rest
    assert own["length_controlled_winrate"] == pytest.approx(rate, abs=0.2)
    if lc_error:
        assert own["lc_standard_error"] == pytest.approx(lc_error, abs=4e-5)
    p, deltas, gamma, gamed, rows = load(name)
    fit = evaluate.length_controlled(p, deltas, np.arange(805), gamma, gamed)
    assert own["C"] == pinned["C"] == fit["C"] and own["theta"] == pinned["theta"] == pytest.approx(fit["theta"], abs=1e-9)
    assert off_optimum(*evaluate.lc_problem(p, deltas, np.ones(805), gamma, gamed), own["C"], np.array(own["theta"])) < 1e-8
    if "glm_preference_published" in rows[0]:
        assert fit["equal"] == pytest.approx([row["glm_preference_published"] for row in rows], abs=2e-4)


@shared
def test_leaderboard_in_groups(tmp_path, capsys):
    """ALPACA_LC 6c on the 80 vicuna prompts: win rate 62.5, mean prediction 53.9, length-adjusted 66.7."""
    p, deltas, gamma, gamed, rows = load("FuseChat-Llama-3.2-3B-Instruct")
    labelled = write_rows(tmp_path / "labelled.jsonl", [{**row, "category": row["dataset"]} for row in rows])
    result = run(tmp_path, capsys, "--annotations", labelled, "--lc-data", SHARED)
    cells = result["categories"]
    assert list(cells) == ["helpful_base", "koala", "oasst", "selfinstruct", "vicuna"]
    assert (cells["vicuna"]["n_total"], cells["vicuna"]["win_rate"]) == (80, pytest.approx(62.5, abs=0.05))
    assert cells["vicuna"]["length_controlled_winrate"] == pytest.approx(66.7, abs=0.05)
    low, high = cells["vicuna"]["lc_ci"]
    assert 55 < low < 62 and 71 < high < 78
    whole = sum(cell["n_total"] * cell["length_controlled_winrate"] for cell in cells.values()) / 805
    assert whole == pytest.approx(result["length_controlled_winrate"] + 100 / (result["C"] * 805), abs=1e-7)
    mean = 100 * evaluate.length_controlled(p, deltas, np.arange(805), gamma, gamed)["equal"]
    assert mean[[row["dataset"] == "vicuna" for row in rows]].mean() == pytest.approx(53.9, abs=0.05)


@shared
def test_a_missing_row_keeps_the_others_difficulties_by_instruction_not_by_position(tmp_path, capsys):
    p, deltas, gamma, gamed, rows = load("claude-2")
    flags = "--annotations", write_rows(tmp_path / "less.jsonl", rows[1:]), "--lc-data", SHARED, "--lc-c", evaluate.PENALTIES[5]
    keyed, counted = run(tmp_path, capsys, *flags), run(tmp_path, capsys, *flags, "--by-position")
    for result, of in ((keyed, gamma[1:]), (counted, gamma[:804])):
        again = evaluate.length_controlled(p[1:], deltas[1:], np.arange(804), of, gamed, evaluate.PENALTIES[5])
        assert result["length_controlled_winrate"] == pytest.approx(again["length_controlled_winrate"], abs=1e-9)
    assert abs(keyed["length_controlled_winrate"] - 28.155) < 0.1 < 1 < abs(counted["length_controlled_winrate"] - 28.155)
    assert keyed["win_rate"] == counted["win_rate"] == pytest.approx(100 * p[1:].mean())


@shared
def test_the_bootstrap_is_a_sampling_error():
    p, deltas, gamma, gamed, _ = load("claude-2")
    rates, _ = evaluate.lc_bootstrap(p, deltas, evaluate.draw_prompts(805), evaluate.PENALTIES[5], np.ones((1, 805), bool), gamma, gamed)
    assert rates.std() == pytest.approx(1.77, abs=0.1)  # twice the lc_standard_error of .88, which is none


# ------------------------------------------------------------------------------------------------------------ the command, by hand

QUESTIONS = [f"question {i}?" for i in range(40)]


def official(folder, n=40):
    """AlpacaEval's two files for a list of n instructions, as on the hub; (gamma, (gamed features, gamed preferences))."""
    rng = np.random.default_rng(7)
    gamma, deltas, wins = [0, *rng.normal(size=n - 1).round(3)], rng.normal(0, 1.5, 2 * n).round(3), rng.random(2 * n).round(3)
    folder.mkdir(exist_ok=True)
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(
        [{"dataset": "koala", "instruction": question, "output": "...", "generator": "base"} for question in QUESTIONS[:n]], indent=2))
    lines = [f"{'verbose' if i < n else 'concise'},{i % n},10,20,{deltas[i]},{gamma[i % n]},False,{'' if i == 3 else wins[i]}"
             for i in range(2 * n)]  # one gamed row without verdict
    (folder / "df_gamed.csv").write_text("\n".join(
        ["model,index,len_1,len_2,std_delta_len,instruction_difficulty,not_gamed_baseline,preference", *lines]) + "\n")
    wins[3] = math.nan
    features = np.stack([np.tanh(deltas), [*gamma, *gamma], np.zeros(2 * n)], 1)
    return np.array(gamma), (features, wins)


def entries(seed=0, n=40, name="new", base="base"):
    """Annotations in AlpacaEval's own shape."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, (n, 2))
    chances = logistic(0.05 * (lengths[:, 1] - lengths[:, 0]) + rng.normal(0.2, 1, n))
    return [{"instruction": QUESTIONS[i], "output_1": "b" * lengths[i, 0], "generator_1": base, "dataset": "koala",
             "output_2": "ü" * lengths[i, 1], "generator_2": name, "annotator": "weighted_alpaca_eval_gpt4_turbo",
             "preference": 1 + chances[i].round(4), "category": ("coding", "math", "recommendation, advice")[i % 3]} for i in range(n)]


def annotate(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return path


def arrays(rows):
    """(p, baseline's characters minus the model's) of annotations."""
    p = np.array([math.nan if row["preference"] is None else 0.5 if row["preference"] == 0 else row["preference"] - 1 for row in rows])
    return p, np.array([len(row["output_1"]) - len(row["output_2"]) for row in rows])


def problem(p, deltas, gamma=None, gamed=None):
    """(features, targets, weights) of ALPACA_LC 3, the gamed rows last."""
    columns = [np.tanh(deltas / deltas.std(ddof=1)), np.ones(len(p))]
    if gamed is None:
        return np.stack(columns, 1), np.nan_to_num(p), 1.0 * ~np.isnan(p)
    targets = np.concatenate([p, gamed[1]])
    weights = np.repeat([1, 0.1], [len(p), len(gamed[1])]) * ~np.isnan(targets)
    return np.concatenate([np.stack([columns[0], gamma, columns[1]], 1), gamed[0]]), np.nan_to_num(targets), weights


def group_by_hand(p, features, theta, mask):
    """100 (mean p - mean of what the lengths add to the chance to win), over the prompts of a group that have a verdict."""
    mask = mask & ~np.isnan(p)
    with_length, without = logistic(features[:len(p)] @ theta), logistic(features[:len(p), 1:] @ theta[1:])
    return 100 * (p[mask].mean() - with_length[mask].mean() + without[mask].mean())


def slow_fit(features, targets, weights, penalty, steps=4000):
    """The fit by proximal gradient steps, for each row of weights: thousands of small steps in place of a few of Newton's."""
    size = 4 / (penalty * np.linalg.eigvalsh(np.einsum("bn,ni,nj->bij", weights, features, features))[:, -1:])
    theta = np.zeros((len(weights), features.shape[1]))
    for _ in range(steps):
        moved = theta - size * penalty * (weights * (1 / (1 + np.exp(-theta @ features.T)) - targets)) @ features
        moved = np.sign(moved) * np.maximum(np.abs(moved) - size, 0)
        if np.abs(moved - theta).max() < 1e-9:
            break
        theta = moved
    return theta


def labels(rows, key="category"):
    return np.array([row[key] for row in rows])


def same(first, second):
    """Whether two results are equal but for the rounding of their numbers."""
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == (pytest.approx(second, abs=1e-9) if isinstance(second, float) else second)


def test_annotations_by_hand(tmp_path, capsys):
    gamma, gamed = official(tmp_path / "hub")
    rows = entries()
    rows[4]["preference"], rows[9]["preference"], rows[10]["preference"], rows[11]["preference"] = 0, None, math.nan, 1.5
    path = annotate(tmp_path / "annotations.json", rows)
    result = run(tmp_path, capsys, "--annotations", path, "--lc-data", tmp_path / "hub", "--lc-c", 3, "--allow-missing")
    p, deltas = arrays(rows)
    found = p[~np.isnan(p)]
    assert len(found) == 38 and result["by"] == "annotations" and (result["model"], result["baseline"]) == ("new", "base")
    assert (result["n_total"], result["n_without_verdict"], result["n_other_prompts"], result["n_draws"]) == (38, 2, 0, 2)
    assert result["n_wins"] == (found > 0.5).sum() and result["n_wins_base"] == (found < 0.5).sum()
    assert result["win_rate"] == pytest.approx(100 * found.mean(), abs=1e-9)
    assert result["avg_length"] == int(np.mean([len(row["output_2"]) for row in rows]))
    assert result["avg_length_baseline"] == int(np.mean([len(row["output_1"]) for row in rows])) != result["avg_length"]

    features, targets, weights = problem(p, deltas, gamma, gamed)
    theta = np.array(result["theta"])
    assert off_optimum(features, targets, weights, 3, theta) < 1e-8 and (theta != 0).all()
    equal = 100 * logistic(theta[1] * gamma + theta[2])  # of all 40: what has no verdict is predicted too
    assert (result["formula"], result["C"]) == ("length_controlled_v1, reference data of gpt4_1106_preview", 3)  # another baseline
    assert result["length_controlled_winrate"] == pytest.approx(equal.mean(), abs=1e-9)
    assert result["lc_standard_error"] == pytest.approx(equal.std(ddof=1) / math.sqrt(40), abs=1e-9)

    assert list(result["categories"]) == ["coding", "math", "recommendation, advice"]  # a comma is no separator
    for name, cell in result["categories"].items():
        inside = labels(rows) == name
        assert cell["n_total"] == (inside & ~np.isnan(p)).sum() and cell["win_rate"] == pytest.approx(100 * np.nanmean(p[inside]))
        assert cell["length_controlled_winrate"] == pytest.approx(group_by_hand(p, features, theta, inside), abs=1e-9)
    assert sum(cell["n_total"] for cell in result["categories"].values()) == 38

    without = [{key: value for key, value in row.items() if not key.startswith("output")}
               | {"len_1": len(row["output_1"]), "len_2": len(row["output_2"])} for row in rows]
    write_rows(tmp_path / "lengths.jsonl", without)
    assert same(run(tmp_path, capsys, "--annotations", tmp_path / "lengths.jsonl", "--lc-data", tmp_path / "hub", "--lc-c", 3,
                    "--allow-missing"), result)


def test_the_order_of_the_rows_does_not_matter(tmp_path, capsys):
    """Folds, draws and difficulties follow the instructions; --by-position is the one that follows the file."""
    official(tmp_path / "hub")
    rows = entries(33)  # other folds would choose another C
    turned = [rows[i] for i in np.random.default_rng(0).permutation(40)]
    first, second, counted = (
        run(tmp_path, capsys, "--annotations", annotate(tmp_path / "a.json", some), "--lc-data", tmp_path / "hub", *flags)
        for some, flags in ((rows, ()), (turned, ()), (turned, ["--by-position"])))
    assert same(second, first) and counted["win_rate"] == pytest.approx(first["win_rate"]) and counted["C"] != first["C"]
    flags = "--annotations", annotate(tmp_path / "a.json", rows), "--lc-data", tmp_path / "hub", "--by-position"
    assert same(run(tmp_path, capsys, *flags), first)


@pytest.mark.parametrize("seed", [6, 15, 17])  # other folds would choose another C
def test_the_cross_validation_of_the_command(tmp_path, capsys, seed):
    """Five folds by place in the official list, gamed rows by theirs in the file: the likeliest C on prompts held out."""
    gamma, gamed = official(tmp_path / "hub", 20)
    places = np.delete(np.arange(20), [2, 11])  # two are missing, and move no other
    rows = [entries(seed, 20)[i] for i in places]
    result = run(tmp_path, capsys, "--annotations", annotate(tmp_path / "a.json", rows[::-1]), "--lc-data", tmp_path / "hub",
                 "--allow-missing")
    features, targets, weights = problem(*arrays(rows), gamma[places], gamed)
    folds, scores = np.concatenate([places, np.arange(40)]) % 5, []
    for penalty in np.logspace(-4, 4, 10):
        means = []
        for fold in range(5):
            theta = slow_fit(features, targets, weights[None] * (folds != fold), penalty)[0]
            test = (folds == fold) & (weights > 0)
            chances = logistic(features[test] @ theta)
            means.append((weights[test] * (targets[test] * np.log(chances) + (1 - targets[test]) * np.log(1 - chances))).mean())
        scores.append(np.mean(means))
    assert result["C"] == pytest.approx(np.logspace(-4, 4, 10)[np.argmax(scores)])


def rates_by_hand(rows, draws, penalty, gamma=None, gamed=None):
    """{"win_rate", "length_controlled_winrate", category: its length-controlled rate}, an array over draws each."""
    p, deltas = arrays(rows)
    found, n = ~np.isnan(p), len(p)
    result = {"win_rate": [], "length_controlled_winrate": [], **{name: [] for name in sorted({*labels(rows)})}}
    for counts in draws:
        drawn = np.repeat(np.arange(n), counts)
        features, targets, weights = problem(p[drawn], deltas[drawn], None if gamma is None else gamma[drawn], gamed)
        theta = slow_fit(features, targets, weights[None], penalty, 400)[0]
        result["win_rate"].append(100 * np.nanmean(p[drawn]))
        result["length_controlled_winrate"].append(100 * logistic(features[:n, 1:] @ theta[1:]).mean())
        for name in {*labels(rows)}:
            result[name].append(group_by_hand(p[drawn], features, theta, labels(rows)[drawn] == name))
    return {name: np.array(values) for name, values in result.items()}


def percentiles(draws):
    return pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=1e-4)


def test_intervals_and_the_difference_of_two_models_against_a_slow_bootstrap(tmp_path, capsys):
    gamma, gamed = official(tmp_path / "hub")
    first, second = entries(0), entries(5, name="other")
    first[7]["preference"] = second[8]["preference"] = None
    annotate(tmp_path / "first.json", first), annotate(tmp_path / "second.json", second[::-1])
    flags = "--lc-data", tmp_path / "hub", "--lc-c", 3, "--allow-missing"
    both = run(tmp_path, capsys, "--annotations", tmp_path / "first.json", "--minus", tmp_path / "second.json", *flags)
    swapped = run(tmp_path, capsys, "--annotations", tmp_path / "second.json", "--minus", tmp_path / "first.json", *flags)
    alone, other = (run(tmp_path, capsys, "--annotations", tmp_path / f"{name}.json", *flags) for name in ("first", "second"))

    draws = np.random.default_rng(0).multinomial(40, [1 / 40] * 40, 1000)
    mine, theirs = (rates_by_hand(rows, draws, 3, gamma, gamed) for rows in (first, second))
    assert alone["lc_ci"] == percentiles(mine["length_controlled_winrate"])
    assert other["lc_ci"] == percentiles(theirs["length_controlled_winrate"])
    assert alone["ci"] == pytest.approx(np.percentile(mine["win_rate"], [2.5, 97.5]), abs=2)  # other draws of the same kind
    for name, cell in alone["categories"].items():
        assert cell["lc_ci"] == percentiles(mine[name])

    minus = both["minus"]
    assert minus["model"] == "other" and {**both, "minus": 0, "length_bins": 0} == {**alone, "minus": 0, "length_bins": 0,
                                                                                    "n_without_verdict": 2}
    for name, ci in (("win_rate", "ci"), ("length_controlled_winrate", "lc_ci")):
        assert minus[name] == pytest.approx(alone[name] - other[name], abs=1e-9)
        assert minus[ci] == percentiles(mine[name] - theirs[name])
        assert swapped["minus"][name] == pytest.approx(-minus[name], abs=1e-9)
        assert swapped["minus"][ci] == pytest.approx([-minus[ci][1], -minus[ci][0]], abs=1e-9)
    assert list(minus["categories"]) == list(alone["categories"])
    for name, cell in minus["categories"].items():
        of = "length_controlled_winrate"
        assert cell[of] == pytest.approx(alone["categories"][name][of] - other["categories"][name][of], abs=1e-9)
        assert cell["lc_ci"] == percentiles(mine[name] - theirs[name])
        assert cell["n_total"] == alone["categories"][name]["n_total"]


def test_difference_of_prompts_that_both_models_have(tmp_path, capsys):
    """Both are measured on the prompts they share; others are counted, and more than 1 % of them is refused."""
    official(tmp_path / "hub")
    first, second = entries(0), entries(5, name="other")
    flags = "--lc-data", tmp_path / "hub", "--lc-c", 3
    files = "--annotations", annotate(tmp_path / "a.json", first), "--minus", annotate(tmp_path / "b.json", second[1:])
    assert "of 40 prompts 1 have no responses of all models and 0 no verdict, over 1 %" in refused(tmp_path, capsys, *files, *flags)
    both = run(tmp_path, capsys, *files, *flags, "--allow-missing")
    alone, other = (run(tmp_path, capsys, "--annotations", annotate(tmp_path / "c.json", rows[1:]), *flags, "--allow-missing")
                    for rows in (first, second))
    assert (both["n_total"], both["n_other_prompts"], both["avg_length"]) == (39, 1, alone["avg_length"])
    for name in ("win_rate", "length_controlled_winrate"):
        assert both[name] == pytest.approx(alone[name], abs=1e-9)
        assert both["minus"][name] == pytest.approx(alone[name] - other[name], abs=1e-9)


def test_prompts_of_one_model_alone_are_counted_once_each(tmp_path, capsys):
    official(tmp_path / "hub")
    files = "--annotations", annotate(tmp_path / "a.json", entries(0)[:-1]), "--minus", annotate(tmp_path / "b.json", entries(5)[1:])
    both = run(tmp_path, capsys, *files, "--lc-data", tmp_path / "hub", "--lc-c", 3, "--allow-missing")
    assert (both["n_total"], both["n_other_prompts"]) == (38, 2)


def test_scored_prompts_of_one_model_alone_are_counted_once_each(tmp_path, capsys):
    rows = scored(40)
    for row in rows[:3]:
        row["responses"] = [response for response in row["responses"] if response["model"] != "third"]
    both = run(tmp_path, capsys, *scored_flags(tmp_path, rows), "--minus", "third", "--allow-missing")
    assert (both["n_total"], both["n_other_prompts"]) == (37, 3)


def test_positions_of_two_files_are_refused(tmp_path, capsys):
    files = [annotate(tmp_path / "a.json", entries(0)), annotate(tmp_path / "b.json", entries(5, name="other")[::-1])]
    assert "--by-position belongs to --annotations of one model" in refused(
        tmp_path, capsys, "--annotations", files[0], "--minus", files[1], "--by-position")


def test_categories_in_one_of_two_files(tmp_path, capsys):
    official(tmp_path / "hub")
    unlabelled = [{key: value for key, value in row.items() if key != "category"} for row in entries(5, name="other")]
    flags = "--lc-data", tmp_path / "hub", "--lc-c", 3
    both = run(tmp_path, capsys, "--annotations", annotate(tmp_path / "a.json", entries(0)), "--minus",
               annotate(tmp_path / "b.json", unlabelled), *flags)
    other = run(tmp_path, capsys, "--annotations", tmp_path / "b.json", *flags)
    assert both["minus"]["win_rate"] == pytest.approx(both["win_rate"] - other["win_rate"], abs=1e-9)


# ------------------------------------------------------------------------------------------------------------ length bins

def of_lengths(lengths, name="new"):
    """Annotations with outputs of these lengths, against 10 characters; every third wins."""
    rows = entries(3, len(lengths), name)
    for k, (row, length) in enumerate(zip(rows, lengths)):
        row.update(output_1="b" * 10, output_2="x" * length, preference=1.9 if k % 3 == 0 else 1.2)
    return rows


def test_length_bins_by_hand(tmp_path, capsys):
    gamma, gamed = official(tmp_path / "hub", 20)
    lengths = [13, 1, 5, 19, 3, 7, 9, 11, 15, 17, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39]  # quartiles 10.5, 20 and 29.5
    rows = of_lengths(lengths)
    flags = "--annotations", annotate(tmp_path / "a.json", rows), "--lc-data", tmp_path / "hub", "--lc-c", 3
    result = run(tmp_path, capsys, *flags)
    p, deltas = arrays(rows)
    features = problem(p, deltas, gamma, gamed)[0]
    edges = [1, 10.5, 20, 29.5, 40]
    assert list(result["length_bins"]) == ["1 to 10.5", "10.5 to 20", "20 to 29.5", "29.5 to 39"]
    for k, cell in enumerate(result["length_bins"].values()):
        inside = (edges[k] <= np.array(lengths)) & (np.array(lengths) < edges[k + 1])
        assert cell["n_total"] == inside.sum() == 5 and cell["win_rate"] == pytest.approx(100 * p[inside].mean())
        by_hand = group_by_hand(p, features, np.array(result["theta"]), inside)
        assert cell["length_controlled_winrate"] == pytest.approx(by_hand, abs=1e-9)
        assert cell["lc_ci"][0] < by_hand < cell["lc_ci"][1]

    some = run(tmp_path, capsys, *flags, "--bins-of", "math", "recommendation, advice")
    assert list(some["length_bins"]) == list(result["length_bins"])  # the edges of all prompts
    for k, cell in enumerate(some["length_bins"].values()):
        inside = (edges[k] <= np.array(lengths)) & (np.array(lengths) < edges[k + 1]) & (labels(rows) != "coding")
        assert cell["n_total"] == inside.sum() and cell["win_rate"] == pytest.approx(100 * p[inside].mean())
    assert sum(cell["n_total"] for cell in some["length_bins"].values()) == 13
    assert some["categories"] == result["categories"] and some["length_controlled_winrate"] == result["length_controlled_winrate"]
    assert "no prompt is of the category 'maths'" in refused(tmp_path, capsys, *flags, "--bins-of", "math", "maths")


def test_length_bins_of_two_models_have_the_same_edges(tmp_path, capsys):
    official(tmp_path / "hub", 8)
    files = [annotate(tmp_path / f"{name}.json", of_lengths(lengths, name)) for name, lengths in
             (("new", range(1, 9)), ("other", (20, 21, 22, 23, 2, 3, 7, 40)))]
    flags = "--lc-data", tmp_path / "hub", "--lc-c", 3
    both, swapped = (run(tmp_path, capsys, "--annotations", one, "--minus", two, *flags) for one, two in (files, files[::-1]))
    # 1 2 2 3 3 4 5 6 7 7 8 20 21 22 23 40: quartiles 3, 6.5 and 20.25
    assert list(both["length_bins"]) == list(swapped["length_bins"]) == ["1 to 3", "3 to 6.5", "6.5 to 20.25", "20.25 to 40"]
    assert [cell["n_total"] for cell in both["length_bins"].values()] == [2, 4, 2, 0]
    assert [cell["n_total"] for cell in swapped["length_bins"].values()] == [1, 1, 2, 4]
    assert both["length_bins"]["20.25 to 40"] == {"win_rate": None, "ci": None, "n_total": 0}
    assert list(both["minus"]["length_bins"]) == ["1 to 3", "3 to 6.5", "6.5 to 20.25"]
    for name, cell in both["minus"]["length_bins"].items():
        of = "length_controlled_winrate"
        assert cell[of] == pytest.approx(both["length_bins"][name][of] - swapped["length_bins"][name][of], abs=1e-9)
        assert cell["n_total"] == both["length_bins"][name]["n_total"]


def test_equal_lengths_fill_one_bin(tmp_path, capsys):
    official(tmp_path / "hub", 8)
    result = run(tmp_path, capsys, "--annotations", annotate(tmp_path / "a.json", of_lengths([5] * 8)), "--lc-data", tmp_path / "hub")
    assert [(name, cell["n_total"]) for name, cell in result["length_bins"].items()] == [("5 to 5", 8)]


def test_bins_of_lengths_that_are_no_whole_numbers(tmp_path, capsys):
    """Four responses a prompt: mean lengths of 8, 8.25, 8.5, 8.75 and so on; every prompt has a bin."""
    rows = scored(12)
    for k, row in enumerate(rows):
        row["responses"] = [some for some in row["responses"] if some["model"] == "old"] + [
            {"text": "x" * (8 + (j < k % 4)), "source": "on", "model": "new", "reward": float(j + k)} for j in range(4)]
    result = run(tmp_path, capsys, *scored_flags(tmp_path, rows))
    assert sum(cell["n_total"] for cell in result["length_bins"].values()) == result["n_total"] == 12


# ------------------------------------------------------------------------------------------------------------ scored files

def scored(n=40, seed=0):
    """Rows of score.py: responses of new, old and third, a reward each."""
    rng = np.random.default_rng(seed)
    return [{"id": f"p{i:02}", "prompt": QUESTIONS[i], "category": ("coding", "math")[i % 2], "labeler": "skywork",
             "responses": [
        {"text": name[0] * int(rng.integers(5, 60)), "source": "on", "model": name, "reward": round(float(rng.normal(shift)), 3)}
        for name, shift in (("new", 0.3), ("old", 0), ("third", 0.1))]} for i in range(n)]


def scored_flags(tmp_path, rows, name="scored.jsonl"):
    return "--scored", write_rows(tmp_path / name, rows), "--model", "new", "--baseline", "old"


def as_annotations(rows, model="new"):
    """The same verdicts as annotations, for `arrays`."""
    sides = [({some["model"]: some for some in row["responses"]}, row) for row in rows]
    return [{"instruction": row["prompt"], "output_1": of["old"]["text"], "output_2": of[model]["text"], "category": row["category"],
             "preference": 2 if of[model]["reward"] > of["old"]["reward"] else 1} for of, row in sides]


def test_a_reward_model_gives_the_minimal_formula(tmp_path, capsys):
    rows = scored()
    result = run(tmp_path, capsys, *scored_flags(tmp_path, rows), "--lc-c", 3)
    p, deltas = arrays(as_annotations(rows))
    features, targets, weights = problem(p, deltas)
    assert features.shape == (40, 2)  # no difficulty, no gamed rows
    assert (result["formula"], result["by"], result["C"]) == ("length_controlled_minimal", "reward", 3)
    assert result["labelers"] == ["skywork"]
    theta = evaluate.fit_l1(features, targets, weights, 3.0)
    assert result["theta"] == pytest.approx(theta, abs=1e-9) and off_optimum(features, targets, weights, 3, theta) < 1e-8
    assert result["length_controlled_winrate"] == pytest.approx(100 * logistic(theta[1]), abs=1e-9)
    for name, cell in result["categories"].items():
        inside = labels(as_annotations(rows)) == name
        assert cell["length_controlled_winrate"] == pytest.approx(group_by_hand(p, features, theta, inside), abs=1e-9)
    own = run(tmp_path, capsys, *scored_flags(tmp_path, rows))
    assert own["C"] == pytest.approx(10 ** (-4 + 8 * 6 / 9)) and own["lc_standard_error"] is None  # no cross-validation, one chance for all
    assert own["theta"] == pytest.approx(evaluate.fit_l1(features, targets, weights, own["C"]), abs=1e-9)
    again = run(tmp_path, capsys, *scored_flags(tmp_path, [{**rows[i], "labeler": None} for i in np.random.default_rng(1).permutation(40)]),
                "--lc-c", 3)
    assert same(again, {**result, "labelers": []})


def test_scored_and_annotated_verdicts_are_one(tmp_path, capsys):
    """With --lc-data a scored file is measured as AlpacaEval measures, its prompts found by their instructions."""
    gamma, gamed = official(tmp_path / "hub")
    rows = scored()
    annotations = [{**row, "generator_1": "old", "generator_2": "new"} for row in as_annotations(rows)]
    other = [{**row, "generator_1": "old", "generator_2": "third"} for row in as_annotations(rows, "third")]
    first = run(tmp_path, capsys, *scored_flags(tmp_path, rows[::-1]), "--minus", "third", "--lc-data", tmp_path / "hub")
    second = run(tmp_path, capsys, "--annotations", annotate(tmp_path / "a.json", annotations), "--minus",
                 annotate(tmp_path / "b.json", other), "--lc-data", tmp_path / "hub")
    beside = {"by", "labelers", "reward", "reward_baseline"}
    assert same({key: value for key, value in first.items() if key not in beside},
                {key: value for key, value in second.items() if key not in beside})
    assert first["formula"].startswith("length_controlled_v1") and first["minus"]["model"] == "third"
    theta = np.array(first["theta"])
    assert off_optimum(*problem(*arrays(annotations), gamma, gamed), first["C"], theta) < 1e-8 * max(1, first["C"])


def test_difference_by_reward_is_paired(tmp_path, capsys):
    rows = scored()
    both = run(tmp_path, capsys, *scored_flags(tmp_path, rows), "--minus", "third", "--lc-c", 3)
    draws = np.random.default_rng(0).multinomial(40, [1 / 40] * 40, 1000)
    mine, theirs = (rates_by_hand(as_annotations(rows, name), draws, 3) for name in ("new", "third"))
    for name, ci in (("win_rate", "ci"), ("length_controlled_winrate", "lc_ci")):
        assert both["minus"][ci] == percentiles(mine[name] - theirs[name])
    for name, cell in both["minus"]["categories"].items():
        assert cell["lc_ci"] == percentiles(mine[name] - theirs[name])
    swapped = run(tmp_path, capsys, "--scored", tmp_path / "scored.jsonl", "--model", "third", "--baseline", "old", "--minus", "new",
                  "--lc-c", 3)
    assert swapped["minus"]["lc_ci"] == pytest.approx([-x for x in both["minus"]["lc_ci"]][::-1], abs=1e-9)
    assert swapped["minus"]["length_controlled_winrate"] == pytest.approx(-both["minus"]["length_controlled_winrate"], abs=1e-9)


def test_several_responses_are_the_mean_over_their_pairs(tmp_path, capsys):
    """3 responses against 2: the preference is the mean of 6 verdicts, the lengths are each side's mean."""
    rng = np.random.default_rng(4)
    rows, p, deltas = [], [], []
    for i in range(30):
        sides = [[{"text": "x" * int(rng.integers(5, 40)) + name, "source": "on", "model": name, "reward": int(rng.integers(5))}
                  for _ in range(count)] for name, count in (("new", 3), ("old", 2))]
        rows.append({"id": f"p{i}", "prompt": QUESTIONS[i], "responses": sides[1] + sides[0]})
        p.append(np.mean([0.5 * (a["reward"] > b["reward"]) + 0.5 * (a["reward"] >= b["reward"]) for a in sides[0] for b in sides[1]]))
        deltas.append(np.mean([len(b["text"]) for b in sides[1]]) - np.mean([len(a["text"]) for a in sides[0]]))
    result = run(tmp_path, capsys, *scored_flags(tmp_path, rows), "--lc-c", 5)
    assert result["win_rate"] == pytest.approx(100 * np.mean(p), abs=1e-9) and result["n_total"] == 30
    features, targets, weights = problem(np.array(p), np.array(deltas))
    assert result["theta"] == pytest.approx(evaluate.fit_l1(features, targets, weights, 5.0), abs=1e-9)
    assert result["theta"][0] != 0
    means = [np.mean([len(some["text"]) for some in row["responses"] if some["model"] == "new"]) for row in rows]
    assert result["avg_length"] == int(np.mean(means))


def test_too_few_verdicts_have_no_length_controlled_rate(tmp_path, capsys):
    for n in (4, 5):
        result = run(tmp_path, capsys, *scored_flags(tmp_path, scored(n)), "--minus", "third")
        known = n == 5
        assert [(value is not None) for value in (result["length_controlled_winrate"], result["lc_ci"], result["minus"]["lc_ci"],
                                                  result["minus"]["length_controlled_winrate"])] == [known] * 4
        assert result["n_total"] == n and ("formula" in result) == known


# ------------------------------------------------------------------------------------------------------------ missing, refused

def refused(tmp_path, capsys, *flags):
    """The sentence with which a command ends that has written nothing."""
    (tmp_path / "refused").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as status:
        evaluate.main(evaluate.parse_args(["winrate", *map(str, flags), "--out", str(tmp_path / "refused" / "result.json")]))
    said = capsys.readouterr()
    assert status.value.code == 2 and said.out == "" and list((tmp_path / "refused").iterdir()) == []
    assert "usage:" in said.err or said.err.count("\n") == 1
    return said.err


def refused_annotations(tmp_path, capsys, rows, *flags):
    official(tmp_path / "hub", 4)
    return refused(tmp_path, capsys, "--annotations", annotate(tmp_path / "a.json", rows), "--lc-data", tmp_path / "hub", *flags)


def changed(number=None, **more):
    """Four annotations, of which one is changed."""
    rows = entries(0, 4)
    if number is not None:
        rows[number].update(more)
    return rows


@pytest.mark.parametrize("rows, sentence", [
    (changed(1, preference=2.5), 'a.json: entry 2: expected a "preference" in [1, 2], 0 for a tie or null, found 2.5'),
    (changed(0, preference=0.5), "entry 1: expected a \"preference\" in [1, 2], 0 for a tie or null, found 0.5"),
    (changed(3, preference=-1), "entry 4: expected a \"preference\" in [1, 2], 0 for a tie or null, found -1"),
    (changed(0, preference=math.inf), "found inf"), (changed(0, preference=True), "found True"),
    (changed(0, preference="1.5"), "found '1.5'"), (changed(0, preference=[1]), "found [1]"),
    (changed(1, instruction=QUESTIONS[0]), 'entry 2: expected an object with an "instruction" that no other has'),
    (changed(1, instruction=None), 'entry 2: expected an object with an "instruction"'),
    ([*changed(), "text"], "entry 5: expected an object with an \"instruction\" that no other has, found 'text'"),
    ([], "a.json: expected entries, found none"),
    (changed(2, output_2=None), 'entry 3: expected the texts "output_1" and "output_2", or their characters "len_1" and "len_2", found'),
    (changed(2, output_1=None, len_1=7.5), 'entry 3: expected the texts "output_1" and "output_2"'),
    (changed(1, generator_2="other"), "entry 2: expected generator_2 and generator_1 to be ('new', 'base') as in the first entry"),
    (changed(1, generator_1="older"), "entry 2: expected generator_2 and generator_1 to be ('new', 'base') as in the first entry"),
    (changed(1, instruction="whence?"), "expected instructions of the 4 of --lc-data, found 1 others, such as 'whence?'"),
    ([{**row, "preference": None} for row in changed()], "no prompt has comparable responses of new and base"),
    (changed(1, preference=None), "of 4 prompts 0 have no responses of all models and 1 no verdict, over 1 %; --allow-missing measures the others"),
    (changed(1, preference=math.nan), "of 4 prompts 0 have no responses of all models and 1 no verdict, over 1 %; --allow-missing measures the others")])
def test_annotations_refused(tmp_path, capsys, rows, sentence):
    assert sentence in refused_annotations(tmp_path, capsys, rows)


@pytest.mark.parametrize("content", [b"{torn", b"[1, 2", b'{"instruction": "q"}\nrubbish\n', "\u00fc".encode("latin-1"), None])
def test_files_that_are_no_annotations(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    err = refused(tmp_path, capsys, "--annotations", tmp_path / "a.json", "--lc-data", tmp_path)
    assert f"{tmp_path / 'a.json'}: expected a JSON list or JSON lines, found" in err


def test_a_torn_gzip_file(tmp_path, capsys):
    whole = gzip.compress(b"\n".join(json.dumps(row).encode() for row in entries()))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    err = refused(tmp_path, capsys, "--annotations", tmp_path / "a.jsonl.gz", "--lc-data", tmp_path)
    assert "a.jsonl.gz: expected a JSON list or JSON lines, found" in err


def test_a_damaged_gzip_file(tmp_path, capsys):
    whole = gzip.compress(b"\n".join(json.dumps(row).encode() for row in entries()))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:10] + b"\xff" * 20 + whole[30:])
    err = refused(tmp_path, capsys, "--annotations", tmp_path / "a.jsonl.gz", "--lc-data", tmp_path)
    assert "a.jsonl.gz: expected a JSON list or JSON lines, found" in err


def test_annotations_without_names(tmp_path, capsys):
    rows = [{key: value for key, value in row.items() if key != "generator_2"} for row in entries(0, 4)]
    assert "generator_2" in refused_annotations(tmp_path, capsys, rows)


def test_lines_and_gzip_and_line_separators_inside_texts(tmp_path, capsys):
    """JSON lines end with \\n alone: U+2028 is a character of a text, and counts as one."""
    hub = tmp_path / "hub"
    hub.mkdir()
    names = [f"q{i}\u2028?" for i in range(6)]
    with gzip.open(hub / "order.jsonl.gz", "wt", encoding="utf-8") as file:  # any list with "index" says the order
        for i in (5, 0, 4, 1, 3, 2):
            file.write(json.dumps({"index": i, "instruction": names[i]}, ensure_ascii=False) + "\n")
    (hub / "df_gamed_of_mine.csv").write_text("index,std_delta_len,instruction_difficulty,preference\n"
                                              + "".join(f"{i},{i - 2.5},{i / 4},{0.1 * i}\n" for i in range(6)))
    rows = [{"instruction": name, "output_1": "a\u2028b", "output_2": "x" * (i + 1), "generator_1": "base", "generator_2": "new",
             "preference": 1 + (i in (1, 2, 5))} for i, name in enumerate(names)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    result = run(tmp_path, capsys, "--annotations", tmp_path / "a.jsonl.gz", "--lc-data", hub, "--lc-c", 9)
    assert (result["n_total"], result["win_rate"], result["avg_length_baseline"], result["avg_length"]) == (6, 50, 3, 3)
    gamed = np.stack([np.tanh(np.arange(6) - 2.5), np.arange(6) / 4, np.zeros(6)], 1), 0.1 * np.arange(6)
    fit = problem(np.array([0, 1, 1, 0, 0, 1.0]), np.array([2, 1, 0, -1, -2, -3]), np.arange(6) / 4, gamed)
    assert off_optimum(*fit, 9, np.array(result["theta"])) < 1e-8


@pytest.mark.parametrize("name, content, sentence", [
    ("df_gamed.csv", None, "hub: expected df_gamed.csv and alpaca_eval_gpt4_baseline.json (data set tatsu-lab/alpaca_eval), found "
                           "alpaca_eval_gpt4_baseline.json"),
    ("alpaca_eval_gpt4_baseline.json", None, "(data set tatsu-lab/alpaca_eval), found df_gamed.csv"),
    ("df_gamed.csv", "index,std_delta_len,instruction_difficulty,preference\n0,x,1,1\n", "df_gamed.csv: expected the numbers index"),
    ("df_gamed.csv", "index,std_delta_len,preference\n0,1,1\n", "df_gamed.csv: expected the numbers index"),
    ("df_gamed.csv", "index,std_delta_len,instruction_difficulty,preference\n", "df_gamed.csv: expected the numbers index"),
    ("df_gamed.csv", "index,std_delta_len,instruction_difficulty,preference\n0,1,1,1\n1,1,1,1\n",
     "expected alpaca_eval_gpt4_baseline.json and df_gamed.csv to be of the same instructions, found 4 and 2"),
    ("alpaca_eval_gpt4_baseline.json", "[]", "alpaca_eval_gpt4_baseline.json: expected entries, found none"),
    ("alpaca_eval_gpt4_baseline.json", '[{"instruction": "a"}, {"instruction": "a"}]',
     'alpaca_eval_gpt4_baseline.json: entry 2: expected an object with an "instruction" that no other has'),
    ("both", "", "to be of the same instructions")])
def test_reference_data_refused(tmp_path, capsys, name, content, sentence):
    official(tmp_path / "hub", 4)
    if name == "both":  # both count from 1 to 4
        (tmp_path / "hub" / "df_gamed.csv").write_text(
            "index,std_delta_len,instruction_difficulty,preference\n" + "".join(f"{i},1,1,1\n" for i in range(1, 5)))
        annotate(tmp_path / "hub" / "alpaca_eval_gpt4_baseline.json",
                 [{"index": i + 1, "instruction": question} for i, question in enumerate(QUESTIONS[:4])])
    elif content is None:
        (tmp_path / "hub" / name).unlink()
    else:
        (tmp_path / "hub" / name).write_text(content)
    err = refused(tmp_path, capsys, "--annotations", annotate(tmp_path / "a.json", entries(0, 4)), "--lc-data", tmp_path / "hub")
    assert sentence in err


def test_reference_data_that_cannot_be_had(tmp_path, capsys):
    path = annotate(tmp_path / "a.json", entries(0, 4))
    err = refused(tmp_path, capsys, "--annotations", path, "--lc-data", "/nowhere/at/all")
    assert "--lc-data /nowhere/at/all: expected a folder or a data set on the hub, found" in err


def test_two_baselines(tmp_path, capsys):
    official(tmp_path / "hub")
    files = "--annotations", annotate(tmp_path / "a.json", entries(0)), "--minus", annotate(tmp_path / "b.json", entries(1, base="older"))
    err = refused(tmp_path, capsys, *files, "--lc-data", tmp_path / "hub")
    assert "a.json" in err and "b.json: expected verdicts against one baseline, found base and older" in err


def test_missing_verdicts_up_to_one_percent(tmp_path, capsys):
    """Of 200 prompts 2 may lack a verdict, 3 not; of those of one model alone likewise."""
    rows = [{"id": f"p{i}", "prompt": f"p{i}", "responses": [
        {"text": f"{name}{i % 7 * name}", "source": "on", "model": name, "reward": i % 5 - (name == "old")} for name in ("new", "old")]}
            for i in range(200)]
    for missing in (2, 3):
        silent = json.loads(json.dumps(rows))
        for row in silent[:missing]:
            row["responses"][0]["reward"] = None
        absent = [*rows[missing:], *({**row, "responses": row["responses"][1:]} for row in rows[:missing])]
        for some, counted in ((silent, (missing, 0)), (absent, (0, missing))):
            flags = scored_flags(tmp_path, some)
            if missing == 3:
                assert (f"of 200 prompts {counted[1]} have no responses of all models and {counted[0]} no verdict, over 1 %; --allow-missing "
                        "measures the others") in refused(tmp_path, capsys, *flags)
            result = run(tmp_path, capsys, *flags, *["--allow-missing"] * (missing == 3))
            assert (result["n_without_verdict"], result["n_other_prompts"], result["n_total"]) == (*counted, 200 - missing)
            facts = json.loads((tmp_path / "result.meta.json").read_text())["counts"]
            assert facts == {"prompts": 200, "compared": 200 - missing, "without_verdict": counted[0], "others": counted[1]}


def test_instructions_that_no_row_annotates(tmp_path, capsys):
    official(tmp_path / "hub")
    flags = "--annotations", annotate(tmp_path / "a.json", entries(0)[:30]), "--lc-data", tmp_path / "hub"
    assert "over 1 %" in refused(tmp_path, capsys, *flags)


@pytest.mark.parametrize("flags, sentence", [
    ((), "expected --scored FILE --model NAME --baseline NAME, or --annotations FILE"),
    (("--scored", "s.jsonl", "--model", "new"), "expected --scored FILE --model NAME --baseline NAME, or --annotations FILE"),
    (("--scored", "s.jsonl", "--baseline", "old"), "expected --scored FILE --model NAME --baseline NAME, or --annotations FILE"),
    (("--model", "new", "--baseline", "old"), "expected --scored FILE --model NAME --baseline NAME, or --annotations FILE"),
    (("--annotations", "a.json", "--scored", "s.jsonl"), "expected --scored FILE --model NAME --baseline NAME, or --annotations FILE"),
    (("--annotations", "a.json", "--model", "new"), "expected --scored FILE --model NAME --baseline NAME, or --annotations FILE"),
    (("--annotations", "a.json", "--baseline", "old"), "expected --scored FILE --model NAME --baseline NAME, or --annotations FILE"),
    (("--scored", "s.jsonl", "--model", "new", "--baseline", "old", "--by-position"), "--by-position belongs to --annotations"),
    (("--annotations", "a.json", "--lc-c", "0"), "--lc-c must be above 0, found 0.0"),
    (("--annotations", "a.json", "--lc-c", "-3"), "--lc-c must be above 0, found -3.0"),
    (("--annotations", "a.json", "--lc-c", "nan"), "--lc-c must be above 0, found nan"),
    (("--annotations", "a.json", "--lc-c", "inf"), "--lc-c must be above 0, found inf"),
    (("--annotations", "a.json", "--by-pos"), "unrecognized arguments: --by-pos")])
def test_flags_refused(tmp_path, capsys, flags, sentence):
    assert sentence in refused(tmp_path, capsys, *flags)


def test_scored_files_refused(tmp_path, capsys):
    official(tmp_path / "hub", 8)
    rows = scored(8)
    flags = scored_flags(tmp_path, rows)
    assert "no response is of the model 'fourth'; there are new, old, third" in refused(tmp_path, capsys, *flags, "--minus", "fourth")
    assert "no prompt is of the category 'facts'" in refused(tmp_path, capsys, *flags, "--bins-of", "facts")
    rows[2]["prompt"] = [{"role": role, "content": text} for role, text in  # a conversation is no instruction
                         (("user", QUESTIONS[2]), ("assistant", "Why?"), ("user", "Tell me."))]
    rows[3]["prompt"] = "another question"
    err = refused(tmp_path, capsys, *scored_flags(tmp_path, rows), "--lc-data", tmp_path / "hub")
    assert "expected instructions of the 8 of --lc-data, found 2 others, such as 'p02'" in err


def test_an_out_of_other_flags_is_kept(tmp_path, capsys):
    flags = scored_flags(tmp_path, scored(8))
    run(tmp_path, capsys, *flags, "--lc-c", 3)
    before = (tmp_path / "result.json").read_text()
    for more in (("--lc-c", "2"), (), ("--lc-c", "3", "--minus", "third")):
        with pytest.raises(SystemExit):
            evaluate.main(evaluate.parse_args(["winrate", *map(str, flags), *more, "--out", str(tmp_path / "result.json")]))
        assert "belongs to a run with other args" in capsys.readouterr().err and (tmp_path / "result.json").read_text() == before
