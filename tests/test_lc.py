"""
evaluate.py: length-controlled win rates, and the flags that belong to them.

Covers  the penalised fit against its optimality conditions and closed forms; its cross-validation, bootstrap
        and groups against slow ones written here; the public leaderboard, where ../shared/data has it;
        annotations and reference files as AlpacaEval publishes them; --lc-c, --bins-of, --allow-missing;
        categories and length bins; what is refused.
Run     python -m pytest tests/test_lc.py
"""

import gzip
import json
import math

import numpy as np
import pytest
from conftest import REPO, write_rows

import evaluate

SHARED = REPO.parent / "shared" / "data" / "alpaca_lc"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
JUDGE = "weighted_alpaca_eval_gpt4_turbo"
JUDGE_LABEL = (
    "judge:gpt-4-1106-preview:alpaca_eval_clf.txt@0a1b2c3d:gpt4_1106_preview"  # as score.py names it
)
# leaderboard row (win rate, standard error, LC, length), index of its C, LC with our cross-validation
PUBLISHED = {
    "claude-2": (17.188240356708075, 1.17482825615589, 28.155196141629148, 1069, 5, 28.156),
    "vicuna-7b-v1.5": (4.797493939167703, 0.6655960676971918, 7.616892731870527, 1083, 6, 7.616),
    "FuseChat-Llama-3.2-3B-Instruct": (
        51.29667710101864,
        1.482579367297701,
        53.99883748344241,
        1976,
        6,
        54.000,
    ),
}


# ----- slow computations
def logistic(logits):
    return np.exp(-np.logaddexp(0, -logits))


def off_optimum(features, targets, weights, penalty, theta):
    """Largest violation of 0 in gradient + sign(theta), with [-1, 1] for the sign of 0."""
    gradient = penalty * (weights * (logistic(features @ theta) - targets)) @ features
    return np.where(theta == 0, np.maximum(np.abs(gradient) - 1, 0), np.abs(gradient + np.sign(theta))).max()


def slow_fits(features, targets, weights, penalty, steps=400):
    """theta (B, k) by proximal gradient steps: features (B, n, k), targets and weights (B, n)."""
    curvature = np.swapaxes(features * weights[..., None], 1, 2) @ features
    size = 4 / (penalty * np.linalg.eigvalsh(curvature)[:, -1:])
    theta = np.zeros((len(features), features.shape[2]))
    for _ in range(steps):
        errors = weights * (logistic((features @ theta[..., None])[..., 0]) - targets)
        moved = theta - size * penalty * (errors[:, None] @ features)[:, 0]
        moved = np.sign(moved) * np.maximum(np.abs(moved) - size, 0)
        change = np.abs(moved - theta).max()
        theta = moved
        if change < 1e-9:
            break
    return theta


def problem(p, deltas, gamma=None, gamed=None):
    """(features, targets, weights) of one fit, the gamed rows last; the columns are tanh, gamma and 1."""
    columns = [np.tanh(deltas / deltas.std(ddof=1)), np.ones(len(p))]
    if gamed is None:
        return np.stack(columns, 1), np.nan_to_num(p), 1.0 * ~np.isnan(p)
    targets = np.concatenate([p, gamed["p"]])
    weights = np.repeat([1, 0.1], [len(p), len(gamed["p"])]) * ~np.isnan(targets)
    features = np.concatenate([np.stack([columns[0], gamma, columns[1]], 1), gamed["x"]])
    return features, np.nan_to_num(targets), weights


def adjusted(p, logits, equal, inside):
    """(B,) rates of a group, arrays (B, n): b makes its mean chance its win rate, found by bisection."""
    inside = inside & ~np.isnan(p)
    size = inside.sum(1)
    wins = np.where(inside, p, 0).sum(1)
    low, high = np.full(len(p), -60.0), np.full(len(p), 60.0)
    for _ in range(50):
        b = (low + high) / 2
        below = np.where(inside, logistic(logits + b[:, None]), 0).sum(1) < wins
        low, high = np.where(below, b, low), np.where(below, high, b)
    sums = np.where(inside, logistic(equal + low[:, None]), 0).sum(1)
    return np.where(size > 0, 100 * sums / np.maximum(size, 1), math.nan)


def group_by_hand(p, features, theta, inside):
    """The length-controlled rate of one group, in percent."""
    logits, equal = features[: len(p)] @ theta, features[: len(p), 1:] @ theta[1:]
    return adjusted(p[None], logits[None], equal[None], inside[None])[0]


def rates_by_hand(p, deltas, groups, penalty, gamma=None, gamed=None, n_draws=1000):
    """{"win_rate", "length_controlled_winrate", and each group's by its name}: an array over draws."""
    n = len(p)
    counts = np.random.default_rng(0).multinomial(n, [1 / n] * n, 1000)[:n_draws]
    drawn = np.array([np.repeat(np.arange(n), row) for row in counts])
    problems = []
    for row in drawn:
        problems.append(problem(p[row], deltas[row], None if gamma is None else gamma[row], gamed))
    features, *rest = (np.stack(part) for part in zip(*problems))
    theta = slow_fits(features, *rest, penalty)[..., None]
    logits = (features[:, :n] @ theta)[..., 0]
    equal = (features[:, :n, 1:] @ theta[:, 1:])[..., 0]
    result = {"win_rate": 100 * np.nanmean(p[drawn], axis=1)}
    result["length_controlled_winrate"] = 100 * logistic(equal).mean(1)
    for name, inside in groups.items():
        result[name] = adjusted(p[drawn], logits, equal, inside[drawn])
    return result


def percentiles(draws, tolerance=1e-4):
    return pytest.approx(np.percentile(draws[~np.isnan(draws)], [2.5, 97.5]), abs=tolerance)


# ----- the fit
def random_problem(seed, n=300, k=3):
    rng = np.random.default_rng(seed)
    features = np.concatenate([rng.normal(size=(n, k - 1)), np.ones((n, 1))], 1)
    return features, rng.random(n), rng.random(n)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 0.3, 3, 1e2, 1e4])
def test_fit_meets_the_conditions_of_the_minimum(penalty):
    for seed in range(10):
        features, targets, weights = random_problem(seed)
        theta = evaluate.fit(features, targets, weights, penalty)
        assert off_optimum(features, targets, weights, penalty, theta) < 1e-8
        again = evaluate.fit(features, targets, weights, penalty, start=theta + 0.3)
        assert again == pytest.approx(theta, abs=1e-9)


def test_fit_of_an_intercept_is_the_mean_moved_by_the_penalty():
    """C W (sigmoid(theta) - mean) = -sign(theta), and exactly 0 once C W |1/2 - mean| <= 1."""
    ones, targets, weights = np.ones((4, 1)), np.array([0.9, 0.8, 0.4, 0.9]), np.array([1, 2, 1, 1.0])
    mean, total = (targets * weights).sum() / 5, 5
    assert mean == pytest.approx(0.76)
    for penalty in (1, 7.3, 1e4):
        theta = evaluate.fit(ones, targets, weights, penalty)
        assert logistic(theta[0]) == pytest.approx(mean - 1 / (penalty * total), abs=1e-14)
    assert evaluate.fit(ones, targets, weights, 1 / (5 * 0.26) - 1e-6)[0] == 0
    assert evaluate.fit(ones, targets, weights, 1 / (5 * 0.26) + 1e-6)[0] > 0


def test_fit_finds_the_theta_that_made_the_chances():
    features, _, weights = random_problem(3)
    theta = np.array([-1.9, 0.7, -3.1])
    targets = logistic(features @ theta)
    assert evaluate.fit(features, targets, weights, 1e4) == pytest.approx(theta, abs=1e-4)
    assert evaluate.fit(features, targets, weights, 1e9) == pytest.approx(theta, abs=1e-9)


def test_fit_does_not_depend_on_the_order_and_counts_by_weight():
    features, targets, weights = random_problem(4)
    theta = evaluate.fit(features, targets, weights, 2.0)
    order = np.random.default_rng(6).permutation(300)
    turned = evaluate.fit(features[order], targets[order], weights[order], 2.0)
    assert turned == pytest.approx(theta, abs=1e-12)
    counts = np.random.default_rng(5).integers(0, 3, 300)
    drawn = np.repeat(np.arange(300), counts)
    repeated = evaluate.fit(features[drawn], targets[drawn], weights[drawn], 2.0)
    assert evaluate.fit(features, targets, weights * counts, 2.0) == pytest.approx(repeated, abs=1e-10)
    slow = slow_fits(features[None], targets[None], weights[None] * counts, 2.0, steps=20_000)
    assert repeated == pytest.approx(slow[0], abs=1e-6)


def test_fit_of_separable_constant_and_equal_columns():
    """What a fit meets on few prompts or a judge that counts characters: it ends, at a minimum."""
    rng = np.random.default_rng(0)
    wide = np.stack([40 * rng.normal(size=1000), np.ones(1000)], 1)
    narrow = np.stack([np.tanh(wide[:, 0] / 40), rng.normal(size=1000), np.ones(1000)], 1)
    empty = narrow * [0, 1, 1]
    for features, targets in (
        (wide, wide[:, 0] > 0),
        (narrow, narrow[:, 0] > 0),
        (empty, rng.random(1000)),
        (narrow[:, [0, 0, 2]], rng.random(1000)),
        (narrow, np.ones(1000)),
        (narrow[:1], np.ones(1)),
    ):
        weights = np.ones(len(targets))
        for penalty in (1e-4, 1, 1e4):
            theta = evaluate.fit(features, targets * 1.0, weights, penalty)
            assert off_optimum(features, targets, weights, penalty, theta) < 1e-8 * max(1, penalty)
    assert evaluate.fit(empty, rng.random(1000), np.ones(1000), 1e4)[0] == 0


def table(p, deltas, gamma=None, groups=()):
    """Prompts as evaluate.py's functions take them, with these differences of lengths."""
    n = len(p)
    prompts = {"p": np.array(p, float), "len": np.zeros(n), "len_baseline": np.array(deltas, float)}
    prompts |= {"reward": np.zeros(n), "reward_baseline": np.zeros(n), "index": np.arange(n)}
    prompts["members"] = np.stack([np.ones(n, bool), *groups], axis=1)
    return prompts if gamma is None else prompts | {"gamma": np.array(gamma, float)}


@pytest.mark.parametrize(
    "p, deltas, counts",
    [
        ([0, 1, 0, 1, 0, 0], [-51, -4, 10, -23, -22, -7], [0, 0, 0, 4, 1, 1]),
        ([1, 1, 1, 1, 1, 1, 1, 0], [17, -53, 31, -32, -5, 20, -9, 34], [4, 0, 3, 0, 0, 0, 0, 1]),
    ],
)
def test_fit_of_a_draw_of_few_prompts_under_a_weak_penalty(p, deltas, counts):
    """What --lc-c 10000 meets on a handful of prompts that length separates."""
    drawn = np.repeat(np.arange(len(p)), counts)
    rows = evaluate.training_rows(table(np.array(p)[drawn], np.array(deltas)[drawn]), None)
    assert off_optimum(*rows, 1e4, evaluate.fit(*rows, 1e4)) < 1e-4


@pytest.mark.parametrize("spread", [300, 100, 50])
def test_fits_of_answers_that_are_all_longer_are_quick(monkeypatch, spread):
    """tanh is then near 1 for every prompt: the column of lengths is nearly the column of ones."""
    rng = np.random.default_rng(1)
    prompts = table(rng.random(400) < 0.6, -1000 + spread * rng.normal(size=400))
    rows = evaluate.training_rows(prompts, None)
    sigmoid, steps = evaluate.sigmoid, []
    monkeypatch.setattr(evaluate, "sigmoid", lambda x: steps.append(1) or sigmoid(x))  # once a step
    theta = evaluate.fit(*rows, evaluate.MINIMAL_C)
    assert off_optimum(*rows, evaluate.MINIMAL_C, theta) < 1e-6 and len(steps) < 20


# ----- the choice of C
NO_GAMED = {"x": np.zeros((0, 3)), "p": np.zeros(0)}


@pytest.mark.parametrize(
    "indices, choice",
    [
        (np.arange(53), 7),
        (np.where(np.arange(53) < 40, 0, np.arange(53)), 5),  # a large fold counts as one that is small
    ],
)
def test_cross_validation_by_hand(indices, choice):
    features, noise, _ = random_problem(29, n=53)
    prompts = table(logistic(-0.8 * np.tanh(features[:, 0]) - 0.4 + 6 * (noise - 0.5)), 100 * features[:, 0])
    prompts |= {"index": indices, "gamma": np.zeros(53)}
    prompts["p"][11] = math.nan
    x, targets, weights = evaluate.training_rows(prompts, None)
    assert weights[11] == 0 and weights.sum() == 52
    folds = indices % 5
    scores = []
    for penalty in 10.0 ** (-4 + 8 * np.arange(10) / 9):
        means = []
        for fold in range(5):
            train = folds != fold
            theta = evaluate.fit(x[train], targets[train], weights[train], penalty)
            losses = []
            for i in range(53):
                if folds[i] == fold and i != 11:
                    q = 1 / (1 + math.exp(-x[i] @ theta))
                    losses.append(targets[i] * math.log(q) + (1 - targets[i]) * math.log(1 - q))
            means.append(sum(losses) / len(losses))
        scores.append(sum(means) / 5)
    assert np.argmax(scores) == choice
    assert evaluate.choose_C(prompts, NO_GAMED) == pytest.approx(10 ** (-4 + 8 * choice / 9))
    alike = prompts | {"p": np.full(53, 0.5)}  # every C is as good: the smallest
    assert evaluate.choose_C(alike, NO_GAMED) == pytest.approx(1e-4)
    assert evaluate.choose_C(prompts, None) == evaluate.MINIMAL_C  # without --lc-data it is given


def test_cross_validation_of_chances_that_round_to_one():
    """Logits of hundreds, all on the right side: log 0 is no likelihood, and the largest C predicts best."""
    signs = (-1.0) ** (np.arange(40) // 5)
    prompts = table(signs > 0, 1e6 * signs)
    gamed = {"x": np.array([[0, 0, 0.0]]), "p": np.array([math.nan])}
    gamma = np.where(np.arange(40) % 5, 1, 100) * signs
    for rows, column in ((NO_GAMED, np.zeros(40)), (gamed, gamma)):
        with np.errstate(all="raise", under="ignore"):
            assert evaluate.choose_C(prompts | {"gamma": column}, rows) == pytest.approx(1e4)


# ----- the win rate
def test_without_an_effect_of_length_it_is_the_win_rate():
    """Equal lengths: sigmoid(theta) = mean p + 1/(C n) below one half."""
    p = np.random.default_rng(1).random(200) * 0.8
    theta, values = evaluate.rates(table(p, np.zeros(200)), None, 2.0)
    assert theta[0] == 0 and len(theta) == 2
    assert values[0, 0] == pytest.approx(100 * p.mean(), abs=1e-9)
    assert values[1, 0] == pytest.approx(100 * (p.mean() + 1 / 400), abs=1e-9)


def test_a_judge_of_length_alone_ends_at_fifty():
    """p = sigmoid(-2 tanh(d / sd)): the longer output wins, and nothing else counts."""
    deltas = np.random.default_rng(2).normal(-300, 400, 500)
    p = logistic(-2 * np.tanh(deltas / deltas.std(ddof=1)))
    theta, values = evaluate.rates(table(p, deltas), None, 1e4)
    assert 100 * p.mean() > 65 and values[1, 0] == pytest.approx(50, abs=0.01)
    assert theta == pytest.approx([-2, 0], abs=1e-3)
    _, one = evaluate.rates(table(p, deltas), None, 3.0)
    _, other = evaluate.rates(table(1 - p, -deltas), None, 3.0)
    assert one[1, 0] + other[1, 0] == pytest.approx(100, abs=1e-9)


def test_difficulty_and_gamed_rows_by_hand():
    """3 + 2 rows written out: standard deviation with n - 1; tanh, gamma, 1 (0 if gamed); weights 1, .1."""
    p, deltas, gamma = [0.2, math.nan, 0.9], [100.0, -50, 250], [0, 1.5, -2]
    gamed = {"x": np.array([[0.3, 0, 0], [-0.4, 1.5, 0]]), "p": np.array([0.6, math.nan])}
    x, targets, weights = evaluate.training_rows(table(p, deltas, gamma), gamed)
    spread = math.sqrt(((100 - 100) ** 2 + 150**2 + 150**2) / 2)
    by_hand = [
        [math.tanh(100 / spread), 0, 1],
        [math.tanh(-50 / spread), 1.5, 1],
        [math.tanh(250 / spread), -2, 1],
        [0.3, 0, 0],
        [-0.4, 1.5, 0],
    ]
    assert x == pytest.approx(np.array(by_hand))
    assert targets[[0, 2, 3]] == pytest.approx([0.2, 0.9, 0.6])
    assert weights == pytest.approx([1, 0, 1, 0.1, 0])
    p, deltas, gamma = p + [0.4, 0.3, 0.1], deltas + [7, 8, 9], gamma + [0.5, 1, 2]
    theta, values = evaluate.rates(table(p, deltas, gamma), gamed, 4.0)
    chances = [1 / (1 + math.exp(-theta[1] * g - theta[2])) for g in gamma]
    # the prompt without a verdict is predicted, too
    assert theta[2] != 0 and values[1, 0] == pytest.approx(100 * np.mean(chances), abs=1e-9)


def test_baseline_against_itself_is_fifty():
    gamed = {"x": np.array([[0.3, 1, 0], [-0.4, 1.5, 0]]), "p": np.array([0.9, 0.8])}
    prompts = table(np.full(20, 0.5), np.zeros(20), np.linspace(0, 3, 20))
    for penalty in (evaluate.choose_C(prompts, gamed), 100.0):
        theta, values = evaluate.rates(prompts, gamed, penalty)
        assert values[1, 0] == 50 and theta.tolist() == [0, 0, 0]
    assert (evaluate.bootstrap(prompts, gamed, 9.0, None)[:, 1, 0] == 50).all()
    other = prompts | {"p": np.full(20, 0.6)}  # of another model the gamed rows count
    assert evaluate.rates(other, gamed, 9.0)[0][1] != 0


# ----- bootstrap and groups
@pytest.fixture(scope="module")
def some_model():
    """(p, deltas, gamma, gamed, groups) of 60 prompts, and its bootstrap at C = 2."""
    rng = np.random.default_rng(0)
    n = 60
    deltas = rng.normal(100, 400, n)
    gamma = rng.normal(size=n)
    p = logistic(-1.2 * np.tanh(deltas / 400) + gamma - 0.5 + rng.normal(size=n))
    x = np.stack([rng.uniform(-1, 1, 40), rng.normal(size=40), np.zeros(40)], 1)
    gamed = {"x": x, "p": rng.random(40)}
    groups = rng.random((2, n)) < 0.4
    p[3], groups[0, 3] = math.nan, True
    prompts = table(p, deltas, gamma, groups)
    prompts["reward"] = rng.normal(size=n)
    prompts["reward"][5] = math.nan
    with np.errstate(invalid="ignore"):
        return p, deltas, gamma, gamed, groups, prompts, evaluate.bootstrap(prompts, gamed, 2.0, None)


def test_a_draw_is_the_fit_of_the_drawn_rows(some_model):
    """Rows written out as often as they were drawn: a new standard deviation, a new fit, the same C."""
    p, deltas, gamma, gamed, groups, prompts, draws = some_model
    assert draws.shape == (1000, 3, 3)
    named = dict(zip("ab", groups))
    by_hand = rates_by_hand(p, deltas, named, 2.0, gamma, gamed, n_draws=50)
    assert draws[:50, 0, 0] == pytest.approx(by_hand["win_rate"], abs=1e-9)
    assert draws[:50, 1, 0] == pytest.approx(by_hand["length_controlled_winrate"], abs=1e-4)
    assert draws[:50, 1, 1:] == pytest.approx(np.stack([by_hand["a"], by_hand["b"]], 1), abs=1e-3)
    counts = np.random.default_rng(0).multinomial(60, [1 / 60] * 60, 1000)
    for i in range(7):
        drawn = np.repeat(np.arange(60), counts[i])
        features, targets, weights = problem(p[drawn], deltas[drawn], gamma[drawn], gamed)
        theta = evaluate.fit(features, targets, weights, 2.0)
        assert draws[i, 1, 0] == pytest.approx(100 * logistic(features[:60, 1:] @ theta[1:]).mean(), abs=1e-7)
        for group, rate, cell in zip(groups, draws[i, 0, 1:], draws[i, 1, 1:]):
            inside = group[drawn] & ~np.isnan(p[drawn])
            assert rate == pytest.approx(100 * p[drawn][inside].mean(), abs=1e-9)
            assert cell == pytest.approx(group_by_hand(p[drawn], features, theta, group[drawn]), abs=1e-6)
        rewards = prompts["reward"][drawn]
        by_hand = [np.nanmean(rewards), *(np.nanmean(rewards[group[drawn]]) for group in groups)]
        assert draws[i, 2] == pytest.approx(by_hand, abs=1e-9)


def test_interval_of_a_known_distribution():
    """Equal lengths: each draw's LC is its mean plus 1/(C n), the interval that of a mean of 0s and 1s."""
    p = np.repeat([0.0, 1.0], [280, 120])
    draws = evaluate.bootstrap(table(p, np.zeros(400)), None, 10.0, None)[:, :, 0]
    counts = np.random.default_rng(0).multinomial(400, [1 / 400] * 400, 1000)
    error = 100 * math.sqrt(0.3 * 0.7 / 400)
    assert draws[:, 0] == pytest.approx(100 * counts @ p / 400, abs=1e-9)
    assert draws[:, 1] == pytest.approx(100 * (counts @ p / 400 + 1 / 4000), abs=1e-9)
    assert draws[:, 1].std() == pytest.approx(error, rel=0.07)
    bounds = np.percentile(draws[:, 1], [2.5, 97.5])
    assert bounds == pytest.approx([30 - 1.96 * error, 30 + 1.96 * error], abs=0.5)


def test_paired_draws_see_what_two_models_share(some_model):
    _, _, _, gamed, _, prompts, first = some_model
    better = prompts | {"p": np.clip(prompts["p"] + 0.05, 0, 1)}
    with np.errstate(invalid="ignore"):
        second = evaluate.bootstrap(better, gamed, 2.0, None)
    gained = second[:, 1, 0] - first[:, 1, 0]
    assert np.percentile(gained, 2.5) > 3 and gained.std() < first[:, 1, 0].std() / 5


def test_groups_against_a_slow_computation(some_model):
    """The three numbers of a group; an empty group has none, one of all prompts has their win rate."""
    p, deltas, gamma, gamed, groups, prompts, _ = some_model
    empty, everything = np.zeros(60, bool), np.ones(60, bool)
    members = np.stack([everything, *groups, empty, everything], axis=1)
    with np.errstate(invalid="ignore"):
        theta, values = evaluate.rates(prompts | {"members": members}, gamed, 2.0)
    features = problem(p, deltas, gamma, gamed)[0]
    for k, inside in enumerate([*groups, empty, everything], 1):
        by_hand = group_by_hand(p, features, theta, inside)
        assert values[1, k] == pytest.approx(by_hand, abs=1e-6, nan_ok=True)
    assert np.isnan(values[:, 3]).all() and values[0, 4] == pytest.approx(values[0, 0])
    assert values[2, 1] == pytest.approx(np.nanmean(prompts["reward"][groups[0]]), abs=1e-12)


def test_a_group_of_sure_wins_has_a_rate_of_one_and_of_sure_losses_of_zero():
    logits, equal = np.linspace(-3, 2, 6), np.linspace(-1, 4, 6)
    members = np.repeat([[True, False], [False, True]], 3, axis=0)
    rates = evaluate.adjusted_rates(np.array([1.0, 0.0]), logits, equal, members)
    assert rates == pytest.approx([1, 0], abs=1e-12) and rates.min() >= 0 and rates.max() <= 1
    # equal lengths everywhere: nothing to adjust
    same = evaluate.adjusted_rates(np.array([0.3, 0.8]), logits, logits, members)
    assert same == pytest.approx([0.3, 0.8], abs=1e-8)


# ----- the leaderboard
def quick_bootstrap(*args):
    """In place of 1,000 fits, where a test asks for no interval."""
    return evaluate.rates(*args)[1][None]


WHOLE_BOOTSTRAP, DRAWN = evaluate.bootstrap, {}


def remembered_bootstrap(prompts, gamed, penalty, theta):
    """evaluate.bootstrap, once for the same prompts."""
    key = (penalty, gamed is None, *(column.tobytes() for column in prompts.values()))
    if key not in DRAWN:
        DRAWN[key] = WHOLE_BOOTSTRAP(prompts, gamed, penalty, theta)
    return DRAWN[key]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run(*flags): the result of a command, which prints it and nothing else, without NaN."""

    def winrate(*flags, intervals=False, said=""):
        monkeypatch.setattr(evaluate, "bootstrap", remembered_bootstrap if intervals else quick_bootstrap)
        out = tmp_path / "result.json"
        evaluate.main(evaluate.parse_args([*map(str, flags), "--out", str(out)]))
        result = json.loads(out.read_text(), parse_constant=pytest.fail)
        printed = capsys.readouterr()
        assert json.loads(printed.out) == result and said in printed.err
        assert said or not printed.err
        return result

    return winrate


OTHER = "warning: other judge or baseline than AlpacaEval 2's; do not compare this rate with the public"


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """(folder as AlpacaEval publishes its data, {model: rows of ../shared/data, in the official order})."""
    folder, models = tmp_path_factory.mktemp("alpaca"), {}
    (folder / "df_gamed.csv").write_bytes((SHARED / "df_gamed_reconstructed.csv").read_bytes())
    for name in PUBLISHED:
        with gzip.open(SHARED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        annotations = []
        for row in rows:
            kept = {key: row[key] for key in ("instruction", "generator_1", "generator_2", "preference")}
            outputs = {"output_1": "b" * row["len_1"], "output_2": "m" * row["len_2"]}
            annotations.append({**kept, **outputs, "annotator": JUDGE, "category": row["dataset"]})
        (folder / f"{name}.json").write_text(json.dumps(annotations))
        models[name] = rows
    baseline = [{"instruction": row["instruction"], "output": "..."} for row in models["claude-2"]]
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(baseline))
    return folder, models


def columns_of(rows, folder):
    """(p, deltas, gamma, gamed) of the shared rows."""
    prompts = {row["instruction"]: {"instruction": row["instruction"]} for row in rows}
    by_index, gamed, _ = evaluate.with_difficulty(prompts, folder, "rows")
    gamma = np.array([by_index[index]["gamma"] for index in range(len(rows))])
    p = np.array([row["preference"] - 1 for row in rows])
    return p, np.array([row["len_1"] - row["len_2"] for row in rows]), gamma, gamed


@shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_leaderboard(alpaca, run, monkeypatch, name):
    win_rate, error, rate, length, c_index, with_our_c = PUBLISHED[name]
    folder, models = alpaca
    flags = "--annotations", folder / f"{name}.json", "--lc-data", folder
    pinned = run(*flags, "--lc-c", 10 ** (-4 + 8 * c_index / 9))
    own = run(*flags, intervals=name == "claude-2")
    for result in (pinned, own):
        assert (result["model"], result["baseline"], result["by"]) == (
            name,
            "gpt4_1106_preview",
            "annotations",
        )
        assert result["win_rate"] == pytest.approx(win_rate, abs=1e-9)
        assert result["standard_error"] == pytest.approx(error, abs=1e-9)
        assert (result["n_total"], result["avg_length"]) == (805, length)
        assert (result["formula"], result["labelers"]) == ("length_controlled_v1", [JUDGE])
    assert pinned["length_controlled_winrate"] == pytest.approx(rate, abs=0.002)  # liblinear's tolerance
    assert own["length_controlled_winrate"] == pytest.approx(with_our_c, abs=0.0005)
    assert own["C"] == pytest.approx(pinned["C"]) and own["theta"] == pytest.approx(pinned["theta"], abs=1e-9)
    theta = np.array(own["theta"])
    p, deltas, gamma, gamed = columns_of(models[name], folder)
    assert off_optimum(*problem(p, deltas, gamma, gamed), own["C"], theta) < 1e-8
    published = [row.get("glm_preference_published") for row in models[name]]
    if None not in published:
        assert logistic(theta[1] * gamma + theta[2]) == pytest.approx(published, abs=2e-4)
    if name == "claude-2":
        low, high = own["lc_ci"]
        assert low + 1 < rate < high - 1
        assert high - low == pytest.approx(2 * 1.96 * 1.77, abs=0.4)  # twice the published lc_standard_error


@shared
def test_leaderboard_in_groups(alpaca, run):
    """Vicuna's 80 prompts: win rate 62.5, mean chance at equal lengths 53.9, length-adjusted 67.3."""
    name = "FuseChat-Llama-3.2-3B-Instruct"
    folder, models = alpaca
    result = run(
        "--annotations",
        folder / f"{name}.json",
        "--lc-data",
        folder,
        "--lc-c",
        evaluate.CS[6],
        intervals=True,
    )
    cells, theta = result["categories"], np.array(result["theta"])
    assert list(cells) == ["helpful_base", "koala", "oasst", "selfinstruct", "vicuna"]
    p, deltas, gamma, gamed = columns_of(models[name], folder)
    features, of = problem(p, deltas, gamma, gamed)[0], np.array([row["dataset"] for row in models[name]])
    for group, cell in cells.items():
        inside = of == group
        assert (cell["n_total"], cell["win_rate"]) == (inside.sum(), pytest.approx(100 * p[inside].mean()))
        by_hand = group_by_hand(p, features, theta, inside)
        assert cell["length_controlled_winrate"] == pytest.approx(by_hand, abs=1e-6)
        assert 0 <= cell["lc_ci"][0] < by_hand < cell["lc_ci"][1] <= 100
    assert (cells["vicuna"]["n_total"], cells["vicuna"]["win_rate"]) == (80, pytest.approx(62.5, abs=0.05))
    assert cells["vicuna"]["length_controlled_winrate"] == pytest.approx(67.26, abs=0.05)
    low, high = cells["vicuna"]["lc_ci"]
    assert 55 < low < 62 and 71 < high < 78
    equal = 100 * logistic(theta[1] * gamma + theta[2])
    assert equal[of == "vicuna"].mean() == pytest.approx(53.9, abs=0.05)


@shared
def test_a_missing_row_keeps_the_others_difficulties(alpaca, run, tmp_path):
    """By instruction: on the leaderboard a row that is missing moves the difficulty of all later ones."""
    folder, models = alpaca
    rows = json.loads((folder / "claude-2.json").read_text())
    less = annotate(tmp_path / "less.json", rows[1:])
    result = run("--annotations", less, "--lc-data", folder, "--lc-c", evaluate.CS[5])
    p, deltas, gamma, gamed = columns_of(models["claude-2"], folder)
    rate = {}
    for name, kept in (("by instruction", gamma[1:]), ("by place in the file", gamma[:804])):
        _, values = evaluate.rates(table(p[1:], deltas[1:], kept), gamed, evaluate.CS[5])
        rate[name] = values[1, 0]
    assert result["length_controlled_winrate"] == pytest.approx(rate["by instruction"], abs=1e-9)
    assert abs(rate["by instruction"] - 28.155) < 0.1 < 1 < abs(rate["by place in the file"] - 28.155)
    assert result["win_rate"] == pytest.approx(100 * p[1:].mean()) and result["n_unanswered"] == 1


# ----- annotations
QUESTIONS = [f"question {i}?" for i in range(40)]


def official(folder, n=40):
    """AlpacaEval's two files for a list of n instructions, as on the hub; (gamma, gamed rows)."""
    rng = np.random.default_rng(7)
    gamma = [0, *rng.normal(size=n - 1).round(3)]
    deltas, wins = rng.normal(0, 1.5, 2 * n).round(3), rng.random(2 * n).round(3)
    folder.mkdir(exist_ok=True)
    baseline = [{"dataset": "koala", "instruction": question, "output": "..."} for question in QUESTIONS[:n]]
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(baseline, indent=2))
    lines = ["model,index,len_1,len_2,std_delta_len,instruction_difficulty,not_gamed_baseline,preference"]
    for i in range(2 * n):
        model, won = "verbose" if i < n else "concise", "" if i == 3 else wins[i]  # one has no verdict
        lines.append(f"{model},{i % n},10,20,{deltas[i]},{gamma[i % n]},False,{won}")
    (folder / "df_gamed.csv").write_text("\n".join(lines) + "\n")
    wins[3] = math.nan
    return np.array(gamma), {
        "x": np.stack([np.tanh(deltas), [*gamma, *gamma], np.zeros(2 * n)], 1),
        "p": wins,
    }


def entries(seed=0, n=40, name="new", base="base", judge=JUDGE):
    """Annotations in AlpacaEval's own shape."""
    rng = np.random.default_rng(seed)
    lengths = np.stack([np.random.default_rng(99).integers(5, 60, n), rng.integers(5, 60, n)], axis=1)
    chances = logistic(0.05 * (lengths[:, 1] - lengths[:, 0]) + rng.normal(0.2, 1, n))
    rows = []
    for i in range(n):
        outputs = {"output_1": "b" * lengths[i, 0], "output_2": "ü" * lengths[i, 1]}
        names = {"generator_1": base, "generator_2": name, "annotator": judge, "dataset": "koala"}
        category = ("coding", "math", "recommendation, advice")[i % 3]
        verdict = {"preference": 1 + chances[i].round(4), "category": category}
        rows.append({"instruction": QUESTIONS[i], **outputs, **names, **verdict})
    return rows


def annotate(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return path


def arrays(rows):
    """(p, the baseline's characters minus the model's) of annotations."""
    p = []
    for row in rows:
        value = row["preference"]
        p.append(math.nan if value is None else 0.5 if value == 0 else value - 1)
    return np.array(p), np.array([len(row["output_1"]) - len(row["output_2"]) for row in rows])


def categories_of(rows):
    names = np.array([row["category"] for row in rows])
    return {name: names == name for name in sorted(set(names))}


def same(first, second):
    """Whether two results are equal but for the rounding of their numbers."""
    if isinstance(first, dict):
        return sorted(first) == sorted(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == (pytest.approx(second, abs=1e-9) if isinstance(second, float) else second)


@pytest.fixture
def lc(tmp_path):
    """Reference data of 40 instructions, and the flags that use it."""
    gamma, gamed = official(tmp_path / "hub")
    return gamma, gamed, ("--lc-data", tmp_path / "hub", "--lc-c", 3)


def test_annotations_by_hand(tmp_path, lc, run):
    gamma, gamed, flags = lc
    rows = entries()
    for i, value in ((4, 0), (9, None), (10, None), (11, 1.5)):
        rows[i]["preference"] = value
    files = "--annotations", annotate(tmp_path / "a.json", rows)
    result = run(*files, *flags, "--allow-missing", said=OTHER)
    p, deltas = arrays(rows)
    known = p[~np.isnan(p)]
    assert len(known) == 38 and result["by"] == "annotations"
    assert (result["model"], result["baseline"], result["labelers"]) == ("new", "base", [JUDGE])
    assert (result["n_total"], result["n_without_verdict"], result["n_unanswered"]) == (38, 2, 0)
    counts = (known > 0.5).sum(), (known < 0.5).sum(), 2
    assert (result["n_wins"], result["n_wins_base"], result["n_draws"]) == counts
    assert result["win_rate"] == pytest.approx(100 * known.mean(), abs=1e-9)
    assert result["avg_length"] == int(np.mean([len(row["output_2"]) for row in rows]))
    assert result["avg_length_baseline"] == int(np.mean([len(row["output_1"]) for row in rows]))
    assert result["avg_length"] != result["avg_length_baseline"]
    assert (result["reward"], result["reward_ci"], result["reward_baseline"]) == (None, None, None)

    features, targets, weights = problem(p, deltas, gamma, gamed)
    theta = np.array(result["theta"])
    assert off_optimum(features, targets, weights, 3, theta) < 1e-8 and (theta != 0).all()
    equal = 100 * logistic(theta[1] * gamma + theta[2])  # of all 40: what has no verdict is predicted too
    assert (result["formula"], result["C"]) == ("length_controlled_v1, other judge", 3)
    assert result["length_controlled_winrate"] == pytest.approx(equal.mean(), abs=1e-9)
    assert list(result["categories"]) == ["coding", "math", "recommendation, advice"]
    for name, inside in categories_of(rows).items():
        cell = result["categories"][name]
        assert cell["n_total"] == (inside & ~np.isnan(p)).sum()
        assert cell["win_rate"] == pytest.approx(100 * np.nanmean(p[inside]))
        by_hand = group_by_hand(p, features, theta, inside)
        assert cell["length_controlled_winrate"] == pytest.approx(by_hand, abs=1e-6)
    assert sum(cell["n_total"] for cell in result["categories"].values()) == 38

    minimal = run(*files, "--lc-c", 3, "--allow-missing")  # without the reference data
    assert minimal["formula"] == "length_controlled_minimal"
    assert minimal["win_rate"] == pytest.approx(result["win_rate"])
    assert off_optimum(*problem(p, deltas), 3, np.array(minimal["theta"])) < 1e-8


@pytest.mark.parametrize(
    "judge, base, formula",
    [
        (JUDGE, "gpt4_1106_preview", "length_controlled_v1"),
        (None, "gpt4_1106_preview", "length_controlled_v1, other judge"),
        (JUDGE_LABEL, "gpt4_1106_preview", "length_controlled_v1"),
        (
            "judge:gpt-4-1106-preview:gpt4_1106_preview",
            "gpt4_1106_preview",
            "length_controlled_v1, other judge",
        ),
        ("judge:another", "gpt4_1106_preview", "length_controlled_v1, other judge"),
        (JUDGE, "text_davinci_003", "length_controlled_v1, other judge"),
    ],
)
def test_another_judge_or_baseline_is_said(tmp_path, lc, run, judge, base, formula):
    path = annotate(tmp_path / "a.json", entries(judge=judge, base=base))
    result = run("--annotations", path, *lc[2], said=OTHER if "other" in formula else "")
    assert result["formula"] == formula and result["labelers"] == ([judge] if judge else [])


def test_the_order_of_the_rows_does_not_matter(tmp_path, lc, run):
    """Folds, draws and difficulties follow the instructions."""
    rows = entries(33)
    turned = [rows[i] for i in np.random.default_rng(0).permutation(40)]
    first, second = (
        run("--annotations", annotate(tmp_path / "a.json", some), *lc[2][:2], intervals=True, said=OTHER)
        for some in (rows, turned)
    )
    assert same(second, first) and first["lc_ci"][0] < first["lc_ci"][1]


@pytest.mark.parametrize("seed", [6, 15, 17])  # other folds would choose another C
def test_the_cross_validation_of_the_command(tmp_path, run, seed):
    """Folds by place in the official list, gamed rows by theirs in the file: the likeliest C held out."""
    gamma, gamed = official(tmp_path / "hub", 20)
    places = np.delete(np.arange(20), [2, 11])  # two are missing, and move no other
    rows = [entries(seed, 20)[i] for i in places]
    flags = "--annotations", annotate(tmp_path / "a.json", rows[::-1]), "--lc-data", tmp_path / "hub"
    result = run(*flags, "--allow-missing", said=OTHER)
    features, targets, weights = problem(*arrays(rows), gamma[places], gamed)
    folds, scores = np.concatenate([places, np.arange(40)]) % 5, []
    held_out = folds == np.arange(5)[:, None]
    for penalty in np.logspace(-4, 4, 10):
        batch = [np.broadcast_to(part, (5, *part.shape)) for part in (features, targets)]
        thetas = slow_fits(*batch, weights * ~held_out, penalty, steps=4000)
        means = []
        for fold, theta in zip(held_out, thetas):
            test = fold & (weights > 0)
            chances = logistic(features[test] @ theta)
            likelihood = targets[test] * np.log(chances) + (1 - targets[test]) * np.log(1 - chances)
            means.append((weights[test] * likelihood).mean())
        scores.append(np.mean(means))
    assert result["C"] == pytest.approx(np.logspace(-4, 4, 10)[np.argmax(scores)])


def test_intervals_against_a_slow_bootstrap(tmp_path, lc, run):
    gamma, gamed, flags = lc
    rows = entries(0)
    rows[7]["preference"] = None
    groups = categories_of(rows)
    draws = rates_by_hand(*arrays(rows), groups, 3, gamma, gamed)
    path = annotate(tmp_path / "a.json", rows)
    result = run("--annotations", path, *flags, "--allow-missing", intervals=True, said=OTHER)
    assert result["ci"] == percentiles(draws["win_rate"], 1e-9)
    assert result["lc_ci"] == percentiles(draws["length_controlled_winrate"])
    p = arrays(rows)[0]
    for name, cell in result["categories"].items():
        assert cell["lc_ci"] == percentiles(draws[name], 1e-3)
        counts = np.random.default_rng(0).multinomial(40, [1 / 40] * 40, 1000)
        counts = counts * (groups[name] & ~np.isnan(p))
        means = 100 * counts @ np.nan_to_num(p) / counts.sum(1)
        assert cell["ci"] == percentiles(means, 1e-9)


def test_groups_stay_inside_zero_and_one_hundred(tmp_path, run):
    """Longer answers win, in one category shorter ones: win rate minus effect of length exceeds 100 there."""
    rows = []
    for i in range(30):
        odd, longer = i < 6, i % 5 != 0
        lengths = (60 + i, 10) if odd else (20, 60 + i) if longer else (60 + i, 20)
        outputs = {"output_1": "b" * lengths[0], "output_2": "m" * lengths[1]}
        names = {"generator_1": "base", "generator_2": "new", "category": "odd" if odd else "usual"}
        preference = 1.97 + 0.03 * (i % 2) if odd else 1.95 if longer else 1.05
        rows.append({"instruction": f"q{i:02}", **outputs, **names, "preference": preference})
    result = run("--annotations", annotate(tmp_path / "a.json", rows), "--lc-c", 3, intervals=True)
    p, deltas = arrays(rows)
    features, theta = problem(p, deltas)[0], np.array(result["theta"])
    odd = categories_of(rows)["odd"]
    effect = logistic(features @ theta) - logistic(features[:, 1:] @ theta[1:])
    assert 100 * (p[odd] - effect[odd]).mean() > 102  # what the first version printed
    cell = result["categories"]["odd"]
    assert cell["length_controlled_winrate"] == pytest.approx(
        group_by_hand(p, features, theta, odd), abs=1e-6
    )
    assert cell["win_rate"] < cell["length_controlled_winrate"] <= 100
    by_hand = rates_by_hand(p, deltas, {"odd": odd}, 3)["odd"]
    assert cell["lc_ci"] == percentiles(by_hand, 1e-3)
    for group in (*result["categories"].values(), *result["length_bins"].values()):
        low, high = group["lc_ci"]
        assert 0 <= low <= group["length_controlled_winrate"] <= high <= 100


# ----- length bins
def of_lengths(lengths, name="new"):
    """Annotations with outputs of these lengths, against 10 characters; every third wins."""
    rows = entries(3, len(lengths), name)
    for k, (row, length) in enumerate(zip(rows, lengths)):
        row.update(output_1="b" * 10, output_2="x" * length, preference=1.9 if k % 3 == 0 else 1.2)
    return rows


def test_length_bins_by_hand(tmp_path, run, refused):
    gamma, gamed = official(tmp_path / "hub", 20)
    # quartiles 10.5, 20 and 29.5
    lengths = np.array([13, 1, 5, 19, 3, 7, 9, 11, 15, 17, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39])
    rows = of_lengths(lengths)
    flags = "--annotations", annotate(tmp_path / "a.json", rows), "--lc-data", tmp_path / "hub", "--lc-c", 3
    result = run(*flags, intervals=True, said=OTHER)
    p, deltas = arrays(rows)
    features, theta = problem(p, deltas, gamma, gamed)[0], np.array(result["theta"])
    edges = [1, 10.5, 20, 29.5, 40]
    bins = [(edges[k] <= lengths) & (lengths < edges[k + 1]) for k in range(4)]
    assert list(result["length_bins"]) == ["1 to 10.5", "10.5 to 20", "20 to 29.5", "29.5 to 39"]
    for inside, cell in zip(bins, result["length_bins"].values()):
        assert cell["n_total"] == inside.sum() == 5
        assert cell["win_rate"] == pytest.approx(100 * p[inside].mean())
        by_hand = group_by_hand(p, features, theta, inside)
        assert cell["length_controlled_winrate"] == pytest.approx(by_hand, abs=1e-6)
        assert cell["lc_ci"][0] < by_hand < cell["lc_ci"][1]

    some = run(*flags, "--bins-of", "math", "recommendation, advice", said=OTHER)
    assert list(some["length_bins"]) == list(result["length_bins"])  # the edges of all prompts
    for inside, cell in zip(bins, some["length_bins"].values()):
        inside = inside & ~categories_of(rows)["coding"]
        assert cell["n_total"] == inside.sum() and cell["win_rate"] == pytest.approx(100 * p[inside].mean())
    assert sum(cell["n_total"] for cell in some["length_bins"].values()) == 13
    assert some["bins_of"] == ["math", "recommendation, advice"]
    assert some["length_controlled_winrate"] == result["length_controlled_winrate"]
    assert "no prompt has the category 'maths'" in refused(*flags, "--bins-of", "math", "maths")


@pytest.mark.parametrize(
    "lengths, bins",
    [
        ([5] * 8, {"5 to 5": 8}),
        ([5, 5, 5, 5, 5, 7, 9, 20], {"5 to 7.5": 6, "7.5 to 20": 2}),  # quartiles 5, 5 and 7.5
    ],
)
def test_bins_of_equal_lengths(tmp_path, run, lengths, bins):
    result = run("--annotations", annotate(tmp_path / "a.json", of_lengths(lengths)))
    assert {name: cell["n_total"] for name, cell in result["length_bins"].items()} == bins


def test_a_constant_difference_of_lengths_is_no_effect_of_length(tmp_path, run):
    """Every answer has 50 characters more: nothing says what length does, and the win rate is the rate."""
    rows = entries(3, 40)
    for k, row in enumerate(rows):
        row.update(output_1="b" * (10 + k), output_2="x" * (60 + k), preference=1.9 if k % 4 else 1.2)
    result = run("--annotations", annotate(tmp_path / "a.json", rows))
    assert result["win_rate"] == pytest.approx(72.5)
    assert result["length_controlled_winrate"] == pytest.approx(72.5, abs=0.2)


def test_bins_of_lengths_that_are_no_whole_numbers(tmp_path, run):
    """Four responses a prompt: mean lengths of 8, 8.25, 8.5, 8.75 and so on; every prompt has a bin."""
    rows = scored(12)
    for k, row in enumerate(rows):
        row["responses"] = [response for response in row["responses"] if response["model"] == "old"]
        for j in range(4):
            text = "x" * (8 + (j < k % 4))
            row["responses"].append({"text": text, "source": "on", "model": "new", "reward": float(j + k)})
    result = run(*scored_flags(tmp_path, rows))
    assert sum(cell["n_total"] for cell in result["length_bins"].values()) == result["n_total"] == 12


# ----- scored files
def scored(n=40, seed=0):
    """Rows of score.py: responses of new, old and third, a reward each."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        responses = []
        for name, shift in (("new", 0.3), ("old", 0), ("third", 0.1)):
            text, reward = name[0] * int(rng.integers(5, 60)), round(float(rng.normal(shift)), 3)
            responses.append({"text": text, "source": "on", "model": name, "reward": reward})
        row = {"id": f"p{i:02}", "prompt": QUESTIONS[i], "responses": responses}
        rows.append({**row, "category": ("coding", "math")[i % 2], "labeler": "skywork"})
    return rows


def scored_flags(tmp_path, rows, name="scored.jsonl"):
    return "--scored", write_rows(tmp_path / name, rows), "--model", "new", "--baseline", "old"


def as_annotations(rows, model="new"):
    """The same verdicts as annotations."""
    annotations = []
    for row in rows:
        answers = {response["model"]: response for response in row["responses"]}
        outputs = {"output_1": answers["old"]["text"], "output_2": answers[model]["text"]}
        names = {"generator_1": "old", "generator_2": model, "category": row["category"]}
        preference = 2 if answers[model]["reward"] > answers["old"]["reward"] else 1
        annotations.append({"instruction": row["prompt"], **outputs, **names, "preference": preference})
    return annotations


def test_a_reward_model_gives_the_minimal_formula(tmp_path, run):
    rows = scored()
    result = run(*scored_flags(tmp_path, rows), "--lc-c", 3)
    p, deltas = arrays(as_annotations(rows))
    features, targets, weights = problem(p, deltas)
    assert features.shape == (40, 2)  # no difficulty, no gamed rows
    assert (result["formula"], result["by"], result["C"]) == ("length_controlled_minimal", "reward", 3)
    assert result["labelers"] == ["skywork"]
    theta = evaluate.fit(features, targets, weights, 3.0)
    assert result["theta"] == pytest.approx(theta, abs=1e-9)
    assert off_optimum(features, targets, weights, 3, theta) < 1e-8
    assert result["length_controlled_winrate"] == pytest.approx(100 * logistic(theta[1]), abs=1e-9)
    for name, inside in categories_of(rows).items():
        by_hand = group_by_hand(p, features, theta, inside)
        assert result["categories"][name]["length_controlled_winrate"] == pytest.approx(by_hand, abs=1e-6)
    own = run(*scored_flags(tmp_path, rows))
    assert own["C"] == pytest.approx(10 ** (-4 + 8 * 6 / 9))  # no cross-validation
    assert own["theta"] == pytest.approx(evaluate.fit(features, targets, weights, own["C"]), abs=1e-9)
    turned = [{**rows[i], "labeler": None} for i in np.random.default_rng(1).permutation(40)]
    again = run(*scored_flags(tmp_path, turned), "--lc-c", 3)
    assert same(again, {**result, "labelers": []})


def test_scored_and_annotated_verdicts_are_one(tmp_path, lc, run):
    """With --lc-data a scored file is measured as AlpacaEval measures, by its prompts' instructions."""
    gamma, gamed, flags = lc
    rows = scored()
    first = run(*scored_flags(tmp_path, rows[::-1]), *flags[:2], said=OTHER)
    second = run(
        "--annotations", annotate(tmp_path / "new.json", as_annotations(rows)), *flags[:2], said=OTHER
    )

    def without_rewards(result):
        if not isinstance(result, dict):
            return result
        beside = {"by", "labelers", "reward", "reward_ci", "reward_baseline"}
        return {key: without_rewards(value) for key, value in result.items() if key not in beside}

    assert same(without_rewards(first), without_rewards(second)) and second["reward"] is None
    theta = np.array(first["theta"])
    fit = problem(*arrays(as_annotations(rows)), gamma, gamed)
    assert off_optimum(*fit, first["C"], theta) < 1e-8 * max(1, first["C"])


def test_several_responses_are_the_mean_over_their_pairs(tmp_path, run):
    """3 responses against 2: the preference is the mean of 6 verdicts, the lengths are each side's mean."""
    rng = np.random.default_rng(4)
    rows, p, deltas, lengths = [], [], [], []
    for i in range(30):
        sides = {}
        for name, count in (("old", 2), ("new", 3)):
            sides[name] = []
            for _ in range(count):
                text = "x" * int(rng.integers(5, 40)) + name
                reward = int(rng.integers(5))
                sides[name].append({"text": text, "source": "on", "model": name, "reward": reward})
        rows.append({"id": f"p{i}", "prompt": QUESTIONS[i], "responses": sides["old"] + sides["new"]})
        verdicts = []
        for one in sides["new"]:
            for other in sides["old"]:
                won, tied = one["reward"] > other["reward"], one["reward"] == other["reward"]
                verdicts.append(won + 0.5 * tied)
        p.append(np.mean(verdicts))
        lengths.append(np.mean([len(response["text"]) for response in sides["new"]]))
        deltas.append(np.mean([len(response["text"]) for response in sides["old"]]) - lengths[-1])
    result = run(*scored_flags(tmp_path, rows), "--lc-c", 5)
    assert result["win_rate"] == pytest.approx(100 * np.mean(p), abs=1e-9) and result["n_total"] == 30
    theta = evaluate.fit(*problem(np.array(p), np.array(deltas)), 5.0)
    assert result["theta"] == pytest.approx(theta, abs=1e-9) and theta[0] != 0
    assert result["avg_length"] == int(np.mean(lengths))


@pytest.mark.parametrize("n", [4, 5])
def test_too_few_verdicts_have_no_length_controlled_rate(tmp_path, run, n):
    result = run(*scored_flags(tmp_path, scored(n)))
    rates = result["length_controlled_winrate"], result["lc_ci"]
    assert [value is not None for value in rates] == [n == 5] * 2
    assert result["n_total"] == n and ("formula" in result) == (n == 5)


def test_draws_of_four_verdicts_are_not_fitted(tmp_path, run):
    """Drawn anew, 4 verdicts of 6 prompts may be 5 or more."""
    rows = scored(6)
    rows[4]["responses"][0]["reward"] = rows[5]["responses"][0]["reward"] = None
    result = run(*scored_flags(tmp_path, rows), "--allow-missing", "--lc-c", 0.5, intervals=True)
    assert (result["n_total"], result["length_controlled_winrate"], result["lc_ci"]) == (4, None, None)
    assert result["ci"][0] <= result["win_rate"] <= result["ci"][1]


# ----- missing verdicts, and what is refused
@pytest.fixture
def refused(tmp_path, capsys):
    """refused(*flags): the sentence with which a command ends that has written nothing."""

    def sentence(*flags):
        folder = tmp_path / "refused"
        folder.mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as status:
            command = [*map(str, flags), "--out", str(folder / "result.json")]
            evaluate.main(evaluate.parse_args(command))
        said = capsys.readouterr()
        assert status.value.code == 2 and said.out == "" and list(folder.iterdir()) == []
        assert "usage:" in said.err or said.err.count("\n") == 1
        return said.err

    return sentence


def changed(number=None, **more):
    """Four annotations, of which one is changed."""
    rows = entries(0, 4)
    if number is not None:
        rows[number].update(more)
    return rows


def without(number, key):
    rows = entries(0, 4)
    del rows[number][key]
    return rows


@pytest.mark.parametrize(
    "rows, sentence",
    [
        (changed(1, preference=2.5), "preference"),
        (changed(0, preference=0.5), "preference"),
        (changed(3, preference=-1), "preference"),
        (changed(0, preference=math.inf), "a.json: "),
        (changed(0, preference=math.nan), "a.json: "),
        (changed(0, preference=True), "preference"),
        (changed(0, preference="1.5"), "preference"),
        (changed(0, preference=[1]), "preference"),
        (without(2, "preference"), "preference"),
        (
            changed(1, instruction=QUESTIONS[0]),
            "expected one verdict per instruction, all for the same model",
        ),
        (changed(1, instruction=None), "instruction"),
        ([*changed(), "text"], "a.json: "),
        ([], "a.json: expected one verdict per instruction, all for the same model and baseline, found []"),
        ({"rows": changed()}, "a.json: "),
        (changed(2, output_2=None), "output_2"),
        (without(2, "output_1"), "output_1"),
        (without(0, "generator_2"), "generator_2"),
        (
            changed(1, generator_2="other"),
            "all for the same model and baseline, found [('new', 'base'), ('other', 'base')]",
        ),
        (changed(1, generator_1="older"), "found [('new', 'base'), ('new', 'older')]"),
        (
            changed(1, instruction="whence?"),
            "is not in --lc-data, or two ids have it",
        ),
        (
            [{**row, "preference": None} for row in changed()],
            "no prompt has a verdict on new against base: of 4 prompts, 0 have no answer of a model and 4 no",
        ),
        (
            changed(1, preference=None),
            "of 4 prompts, 0 have no answer of a model and 1 no verdict, more than 1 %; --allow-missing",
        ),
        (changed()[:3], "of 4 prompts, 1 have no answer of a model and 0 no verdict, more than 1 %"),
    ],
)
def test_annotations_refused(tmp_path, refused, rows, sentence):
    official(tmp_path / "hub", 4)
    path = annotate(tmp_path / "a.json", rows)
    assert sentence in refused("--annotations", path, "--lc-data", tmp_path / "hub")


@pytest.mark.parametrize(
    "content",
    [
        b"{torn",
        b"[1, 2",
        b'{"instruction": "q"}\nrubbish\n',
        '["\u00fc"]'.encode("latin-1"),
        b"[" * 1_500,
        None,
    ],
    ids=["torn", "open", "text behind", "latin-1", "brackets", "no file"],
)
def test_files_that_are_no_annotations(tmp_path, refused, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert f"{tmp_path / 'a.json'}: " in refused("--annotations", tmp_path / "a.json")


CSV = "index,std_delta_len,instruction_difficulty,preference\n"
WHOLE = "".join(f"{i},1,0.5,0.5\n" for i in range(4))
BASELINE = "alpaca_eval_gpt4_baseline.json"


def four(*instructions):
    return json.dumps([{"instruction": instruction} for instruction in instructions])


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("df_gamed.csv", None, "df_gamed.csv"),
        (BASELINE, None, BASELINE),
        ("df_gamed.csv", CSV + "0,x,1,1\n", "'x'"),
        ("df_gamed.csv", "index,std_delta_len,preference\n0,1,1\n", "instruction_difficulty"),
        ("df_gamed.csv", CSV, ""),
        ("df_gamed.csv", CSV + "0,1,1,1\n1,1,1,1\n", ""),
        ("df_gamed.csv", CSV + WHOLE + "4,1,1,1\n", "an instruction twice, or without gamed rows"),
        ("df_gamed.csv", CSV + WHOLE + "-1,1,1,1\n", ""),
        ("df_gamed.csv", CSV + WHOLE + "3,nan,1,1\n", ""),
        ("df_gamed.csv", CSV + WHOLE + "3,1,1,1.5\n", ""),
        ("df_gamed.csv", CSV + WHOLE + '"' + "x" * 200_000 + '",1,1,1\n', ""),
        (BASELINE, "[]", ""),
        (BASELINE, "{}", ""),
        (BASELINE, '[{"text": "a"}]', "instruction"),
        (BASELINE, four(*QUESTIONS[:4], QUESTIONS[0]), ""),
    ],
)
def test_reference_data_refused(tmp_path, refused, name, content, sentence):
    official(tmp_path / "hub", 4)
    if content is None:
        (tmp_path / "hub" / name).unlink()
    else:
        (tmp_path / "hub" / name).write_text(content)
    err = refused(
        "--annotations", annotate(tmp_path / "a.json", entries(0, 4)), "--lc-data", tmp_path / "hub"
    )
    assert f"--lc-data {tmp_path / 'hub'}: expected AlpacaEval's two files, found " in err and sentence in err


def test_reference_data_that_is_no_folder(tmp_path, refused):
    path = annotate(tmp_path / "a.json", entries(0, 4))
    err = refused("--annotations", path, "--lc-data", "tatsu-lab/alpaca_eval")
    assert "--lc-data tatsu-lab/alpaca_eval: expected AlpacaEval's two files, found FileNotFoundError" in err


def test_the_record_has_the_reference_data(tmp_path, lc, run):
    """Another df_gamed.csv is another result: its hash belongs to the inputs."""
    run("--annotations", annotate(tmp_path / "a.json", entries()), *lc[2], said=OTHER)
    inputs = json.loads((tmp_path / "result.meta.json").read_text())["inputs"]
    assert {path.rsplit("/", 1)[1] for path in inputs} == {"a.json", "df_gamed.csv", BASELINE}


@pytest.mark.parametrize("missing", [2, 3])
def test_missing_verdicts_up_to_one_percent(tmp_path, run, refused, missing):
    """Of 200 prompts 2 may lack a verdict, 3 not; of those of one model alone likewise."""
    rows = []
    for i in range(200):
        responses = []
        for name in ("new", "old"):
            text, reward = f"{name}{i % 7 * name}", i % 5 - (name == "old")
            responses.append({"text": text, "source": "on", "model": name, "reward": reward})
        rows.append({"id": f"p{i}", "prompt": f"p{i}", "responses": responses})
    silent, absent = json.loads(json.dumps(rows)), json.loads(json.dumps(rows))
    for k in range(missing):
        silent[k]["responses"][0]["reward"] = None
        del absent[k]["responses"][0]
    for some, n_silent, n_absent in ((silent, missing, 0), (absent, 0, missing)):
        flags = scored_flags(tmp_path, some)
        if missing == 3:
            sentence = f"of 200 prompts, {n_absent} have no answer of a model and {n_silent} no verdict"
            assert f"{sentence}, more than 1 %; --allow-missing measures the rest" in refused(*flags)
            flags = *flags, "--allow-missing"
        result = run(*flags)
        counts = result["n_without_verdict"], result["n_unanswered"], result["n_total"]
        assert counts == (n_silent, n_absent, 200 - missing)


TOGETHER = "give --scored, --model and --baseline, or --annotations"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("", TOGETHER),
        ("--scored s.jsonl --model new", TOGETHER),
        ("--scored s.jsonl --baseline old", TOGETHER),
        ("--model new --baseline old", TOGETHER),
        ("--annotations a.json --scored s.jsonl --model new --baseline old", TOGETHER),
        ("--annotations a.json --scored s.jsonl", TOGETHER),
        ("--annotations a.json --model new", TOGETHER),
        ("--annotations a.json --baseline old", TOGETHER),
        ("--annotations a.json --lc-c 0", "--lc-c must be above 0, found 0.0"),
        ("--annotations a.json --lc-c -3", "--lc-c must be above 0, found -3.0"),
        ("--annotations a.json --lc-c nan", "--lc-c must be above 0, found nan"),
        ("--annotations a.json --lc-c inf", "--lc-c must be above 0, found inf"),
        ("--annotations a.json --allow", "unrecognized arguments: --allow"),
    ],
)
def test_flags_refused(refused, flags, sentence):
    assert sentence in refused(*flags.split())


def test_scored_files_refused(tmp_path, refused):
    official(tmp_path / "hub", 8)
    rows = scored(8)
    flags = scored_flags(tmp_path, rows)
    assert "no response is of the model 'fourth'; there are new, old, third" in refused(
        *flags[:3], "fourth", *flags[4:]
    )
    assert "no prompt has the category 'facts'" in refused(*flags, "--bins-of", "facts")
    strange = "is not in --lc-data, or two ids have it"
    for prompt in ("another question", QUESTIONS[3]):
        rows[2]["prompt"] = prompt
        assert strange in refused(*scored_flags(tmp_path, rows), "--lc-data", tmp_path / "hub")
    turns = ("user", QUESTIONS[0]), ("assistant", "Why?"), ("user", QUESTIONS[2])
    rows[2]["prompt"] = [{"role": role, "content": text} for role, text in turns]
    # a conversation is no instruction, though it ends with one
    assert strange in refused(*scored_flags(tmp_path, rows), "--lc-data", tmp_path / "hub")
