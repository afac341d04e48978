"""
report/compare.py: the difference of two settings over prompts and seeds, and of two models' annotations.

Covers  means over runs, and the standard error by its closed form: over prompts that of the mean of paired
        differences, over seeds the variance of the runs' rates; groups; the baseline as second setting; one
        judge, the same prompts, a verdict for each; annotations against evaluate.py's results and a slow
        bootstrap, categories, length bins; results/: tables and figure.
Run     python -m pytest tests/test_compare.py
"""

import json
import math
import sys

import numpy as np
import pytest
from conftest import REPO, tracked, write_rows
from test_lc import annotate, arrays, categories_of, entries, of_lengths, official, percentiles, rates_by_hand

import evaluate

sys.path[:0] = [str(REPO / "report"), str(REPO / "results")]
import claims  # noqa: E402
import compare  # noqa: E402
import differences  # noqa: E402

N = 120


def judged(folder, name, rewards, labeler="rm:x", ids=None):
    """Rows of a run: its answer to prompt k has rewards[k], the baseline's 0; lengths are all different."""
    rows = []
    for k, reward in enumerate(rewards):
        mine = {
            "text": f"{name} {'a' * (k % 7)}",
            "source": "on",
            "model": str(folder / name),
            "reward": reward,
        }
        theirs = {"text": f"base {'b' * (k % 5)}", "source": "on", "model": "base", "reward": 0.0}
        row = {"id": f"p{k if ids is None else ids[k]:03}", "prompt": "x", "responses": [mine, theirs]}
        rows.append(row | {"category": "math" if k % 3 else "art", "labeler": labeler})
    (folder / f"{name}.judged").mkdir()
    write_rows(folder / f"{name}.judged" / "0.jsonl", rows)
    return str(folder / name)


def result_of(folder, *flags):
    args = compare.parse_args([*flags, "--baseline", "base", "--out", str(folder / "out" / "c.json")])
    compare.main(args)
    return json.loads((folder / "out" / "c.json").read_text())


@pytest.fixture
def few_draws(monkeypatch):
    """For tests that do not ask how near the bootstrap is."""
    monkeypatch.setattr(compare, "DRAWS", 100)


def signs(seed, share):
    """Rewards of N answers, the share of them above the baseline's."""
    return np.where(np.random.default_rng(seed).random(N) < share, 1.0, -1.0).tolist()


def test_one_run_each_is_the_paired_difference(tmp_path, capsys):
    ones, others = signs(1, 0.7), signs(2, 0.5)
    first, second = judged(tmp_path, "a", ones), judged(tmp_path, "b", others)
    result = result_of(tmp_path, "--first", first, "--second", second)
    rate = result["groups"]["all"]["win_rate"]
    difference = 50 * (np.array(ones) - np.array(others))
    assert rate["first"] == pytest.approx(50 + 50 * np.mean(ones))
    assert rate["difference"] == pytest.approx(difference.mean())
    error = difference.std() / math.sqrt(N)
    assert rate["error_over_prompts"] == pytest.approx(error, rel=0.08)  # of 1,000 draws
    assert rate["error_over_seeds"] is None
    half = 1.98 * rate["error_over_prompts"]  # Student's t with 119 degrees of freedom
    assert rate["ci"] == pytest.approx([rate["difference"] - half, rate["difference"] + half], rel=1e-3)
    assert result["groups"]["all"]["reward"]["difference"] == pytest.approx(difference.mean() / 50)
    assert result["judge"] == ["rm:x"] and result["groups"]["all"]["n_total"] == N
    assert f"all (n = {N}), win_rate: {difference.mean():+.2f}" in capsys.readouterr().out


def test_seeds_are_averaged_and_widen_the_interval(tmp_path):
    runs = [signs(seed, share) for seed, share in ((1, 0.9), (2, 0.7), (3, 0.8))]
    others = [signs(seed, share) for seed, share in ((4, 0.4), (5, 0.6))]
    first = [judged(tmp_path, f"a_seed{k}", run) for k, run in enumerate(runs)]
    second = [judged(tmp_path, f"b_seed{k}", run) for k, run in enumerate(others)]
    rate = result_of(tmp_path, "--first", *first, "--second", *second)["groups"]["all"]["win_rate"]
    rates, other_rates = 50 + 50 * np.mean(runs, axis=1), 50 + 50 * np.mean(others, axis=1)
    assert rate["difference"] == pytest.approx(rates.mean() - other_rates.mean())
    parts = [(rates.var(ddof=1) / 3, 2), (other_rates.var(ddof=1) / 2, 1)]
    assert rate["error_over_seeds"] == pytest.approx(math.sqrt(parts[0][0] + parts[1][0]))
    paired = 50 * (np.mean(runs, axis=0) - np.mean(others, axis=0))
    assert rate["error_over_prompts"] == pytest.approx(paired.std() / math.sqrt(N), rel=0.08)
    parts.append((rate["error_over_prompts"] ** 2, N - 1))
    total = sum(variance for variance, _ in parts)
    df = total**2 / sum(variance**2 / df for variance, df in parts)
    half = compare.t_quantile(df) * math.sqrt(total)
    assert rate["ci"] == pytest.approx([rate["difference"] - half, rate["difference"] + half], rel=1e-2)


def test_runs_of_the_same_seed_are_paired(tmp_path, few_draws):
    shared = (0.8, 0.5, 0.6)  # what a seed does to both settings
    runs = [signs(seed, share) for seed, share in zip((1, 2, 3), shared, strict=True)]
    others = [signs(seed, share - 0.1) for seed, share in zip((4, 5, 6), shared, strict=True)]
    first = [judged(tmp_path, f"a_seed{k}", run) for k, run in enumerate(runs)]
    second = [judged(tmp_path, f"b_seed{k}", run) for k, run in enumerate(others)]
    rate = result_of(tmp_path, "--first", *first, "--second", *second)["groups"]["all"]["win_rate"]
    differences = 50 * (np.mean(runs, axis=1) - np.mean(others, axis=1))
    over_prompts, over_seeds = rate["error_over_prompts"] ** 2, differences.var(ddof=1) / 3
    total = over_prompts + over_seeds
    df = total**2 / (over_prompts**2 / (N - 1) + over_seeds**2 / 2)
    half = compare.t_quantile(df) * math.sqrt(total)
    assert rate["ci_paired"] == pytest.approx([differences.mean() - half, differences.mean() + half])
    assert rate["ci"][1] - rate["difference"] > 1.2 * half  # what both share is in this one
    turned = result_of(tmp_path, "--first", *first, "--second", *second[::-1])["groups"]["all"]["win_rate"]
    assert "ci_paired" not in turned and turned["ci"] == pytest.approx(rate["ci"])


def test_two_settings_in_one_average_are_not_seeds_of_each_other(tmp_path, few_draws):
    large = [judged(tmp_path, f"large_seed{k}", signs(k, 0.9)) for k in (1, 2)]
    small = [judged(tmp_path, f"small_seed{k}", signs(k, 0.3)) for k in (3, 4)]
    rate = result_of(tmp_path, "--first", *large, *small)["groups"]["all"]["win_rate"]
    rates = [50 + 50 * np.mean(signs(k, 0.9 if k < 3 else 0.3)) for k in (1, 2, 3, 4)]
    within = np.var(rates[:2], ddof=1) / 2 / 4 + np.var(rates[2:], ddof=1) / 2 / 4
    assert rate["first"] == pytest.approx(np.mean(rates))
    assert rate["error_over_seeds"] == pytest.approx(math.sqrt(within))


def test_a_setting_with_one_run_says_nothing_of_seeds(tmp_path, few_draws):
    first = [judged(tmp_path, f"a_seed{k}", signs(k, 0.9)) for k in (1, 2)]
    second = judged(tmp_path, "b", signs(3, 0.5))
    rate = result_of(tmp_path, "--first", *first, "--second", second)["groups"]["all"]["win_rate"]
    assert rate["error_over_seeds"] is None
    half = 1.98 * rate["error_over_prompts"]
    assert rate["ci"][1] - rate["difference"] == pytest.approx(half, rel=1e-3)


def test_the_quantile_of_t():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 10: 2.228, 100: 1.984, 1000: 1.962}
    for df, value in table.items():
        assert compare.t_quantile(df) == pytest.approx(value, rel=1e-3)


def test_groups_and_the_baseline_itself(tmp_path):
    ones = [1.0 if k % 3 else -1.0 for k in range(N)]  # right in math, wrong in art
    first = judged(tmp_path, "a", ones)
    groups = result_of(tmp_path, "--first", first, "--group", "m=math", "--group", "both=math,art")["groups"]
    assert groups["m"]["n_total"] == N * 2 // 3
    assert groups["both"]["win_rate"] == groups["all"]["win_rate"]
    assert groups["m"]["win_rate"]["difference"] == pytest.approx(50)
    assert groups["m"]["win_rate"]["second"] == pytest.approx(50)
    assert groups["m"]["length_controlled_winrate"]["second"] == pytest.approx(50)
    assert groups["all"]["win_rate"]["difference"] == pytest.approx(100 * 2 / 3 - 50)
    assert (groups["m"]["reward"]["first"], groups["m"]["reward"]["second"]) == (1.0, 0.0)


def test_refusals(tmp_path, capsys):
    first, second = judged(tmp_path, "a", signs(1, 0.7)), judged(tmp_path, "b", signs(2, 0.5), "rm:y")
    fewer = judged(tmp_path, "c", signs(3, 0.5)[:-1])
    without = judged(tmp_path, "d", [None] + signs(4, 0.5)[1:])
    seeds = [judged(tmp_path, f"e_seed{k}", signs(k, 0.5)) for k in (5, 6)]
    for flags, sentence in (
        (["--first", first, "--second", second], "expected one judge, found rm:x and rm:y"),
        (["--first", first, fewer], f"of {N} prompts, 1 are not in all runs and 0 have no verdict; --allow"),
        (
            ["--first", without],
            f"of {N} prompts, 0 are not in all runs and 1 have no verdict; --allow-missing",
        ),
        (["--first", str(tmp_path / "none")], "none.judged: no rows"),
        (["--first", first, *seeds], "expected equal numbers of runs, found 1 and 2"),
        (
            ["--first", first, "--group", "x=cooking"],
            "--group x: no prompt has one of the categories cooking",
        ),
        (["--first", first, "--group", "x"], "expected NAME=CATEGORY,CATEGORY, NAME not being all, found x"),
        (["--first", first, "--group", "all=art"], "NAME not being all, found all=art"),
    ):
        with pytest.raises(SystemExit) as end:
            result_of(tmp_path, *flags)
        assert end.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wins_of_a_judge_count_as_in_evaluate(tmp_path, few_draws):
    """The judge's probability, not only who is ahead."""
    folders = {}
    for name, wins in (("a", 0.9), ("b", 0.6)):
        folders[name] = judged(tmp_path, name, signs(1, 0.5))
        path = tmp_path / f"{name}.judged" / "0.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_rows(path, [row | {"wins": [[None, wins], [1 - wins, None]]} for row in rows])
    groups = result_of(tmp_path, "--first", folders["a"], "--second", folders["b"])["groups"]
    assert groups["all"]["win_rate"]["difference"] == pytest.approx(100 * (0.9 - 0.6))


def test_missing_prompts_are_left_out_and_counted(tmp_path, few_draws):
    ones, others = signs(1, 0.7), signs(2, 0.5)
    first = judged(tmp_path, "a", [None, *ones[1:]])
    second = judged(tmp_path, "b", others[:-1])
    result = result_of(tmp_path, "--first", first, "--second", second, "--allow-missing")
    assert (result["n_without_verdict"], result["n_unanswered"]) == (1, 1)
    whole = result["groups"]["all"]
    assert (whole["n_total"], whole["n_total_second"]) == (N - 2, N - 1)
    assert whole["win_rate"]["first"] == pytest.approx(50 + 50 * np.mean(ones[1:-1]))
    assert whole["win_rate"]["second"] == pytest.approx(50 + 50 * np.mean(others[:-1]))


# ----- annotations
@pytest.fixture
def one_draw(monkeypatch):
    """In place of 1,000 draws, where a test asks for no interval."""
    monkeypatch.setattr(evaluate, "bootstrap", lambda *args: evaluate.rates(*args)[1][None])


FLAGS = "--categories", "--length-bins"


def differences_of(folder, first, second, *flags):
    """The result for two lists of annotations."""
    files = [annotate(folder / f"{name}.json", rows) for name, rows in (("first", first), ("second", second))]
    words = ["--first", files[0], "--second", files[1], *flags, "--out", folder / "c.json"]
    compare.main(compare.parse_args(list(map(str, words))))
    return json.loads((folder / "c.json").read_text(), parse_constant=pytest.fail)


def alone(folder, rows, *flags):
    """evaluate.py's result for one of them."""
    path = annotate(folder / "one.json", rows)
    words = ["--annotations", path, *flags, "--out", folder / "one.result.json"]
    evaluate.main(evaluate.parse_args(list(map(str, words))))
    return json.loads((folder / "one.result.json").read_text())


def test_annotations_are_measured_as_evaluate_measures_them(tmp_path, one_draw):
    """Their own C by cross-validation, gamma, and every group: rates equal evaluate.py's to the last bit."""
    official(tmp_path / "hub")
    lc = "--lc-data", tmp_path / "hub"
    rows = [entries(0), entries(5, name="other")]
    result = differences_of(tmp_path, rows[0], rows[1][::-1], *lc, *FLAGS)
    one, other = (alone(tmp_path, some, *lc) for some in rows)
    assert one["C"] != other["C"]
    assert (result["runs"], result["baseline"]) == ({"first": ["new"], "second": ["other"]}, "base")
    cells = [(result["groups"]["all"], one, other)]
    for name, cell in result["categories"].items():
        cells.append((cell, one["categories"][name], other["categories"][name]))
    assert list(result["categories"]) == ["coding", "math", "recommendation, advice"]
    for cell, mine, theirs in cells:
        for name in ("win_rate", "length_controlled_winrate"):
            assert (cell[name]["first"], cell[name]["second"]) == (mine[name], theirs[name])
            assert cell[name]["difference"] == mine[name] - theirs[name]
        assert cell["reward"]["difference"] is None and cell["reward"]["ci"] is None


@pytest.mark.slow
def test_intervals_of_annotations_against_a_slow_bootstrap(tmp_path, monkeypatch):
    gamma, gamed = official(tmp_path / "hub")
    monkeypatch.setattr(evaluate, "choose_C", lambda *args: 3.0)
    first, second = entries(0), entries(5, name="other")
    first[7]["preference"] = second[8]["preference"] = None
    flags = "--lc-data", tmp_path / "hub", "--allow-missing", "--categories"
    result = differences_of(tmp_path, first, second[::-1], *flags)
    assert (result["n_without_verdict"], result["n_unanswered"]) == (2, 0)
    groups = categories_of(first)
    mine, theirs = (rates_by_hand(*arrays(rows), groups, 3, gamma, gamed) for rows in (first, second))
    for name in ("win_rate", "length_controlled_winrate"):
        draws = mine[name] - theirs[name]
        assert result["groups"]["all"][name]["ci"] == percentiles(draws)
        assert result["groups"]["all"][name]["error_over_prompts"] == pytest.approx(
            draws.std(ddof=1), abs=1e-4
        )
    for name, cell in result["categories"].items():
        assert cell["length_controlled_winrate"]["ci"] == percentiles(mine[name] - theirs[name], 1e-3)
    swapped = differences_of(tmp_path, second, first, *flags)["groups"]["all"]["win_rate"]
    low, high = result["groups"]["all"]["win_rate"]["ci"]
    assert swapped["ci"] == pytest.approx([-high, -low], abs=1e-9)


def test_annotations_of_other_prompts_and_other_answers_of_the_baseline(tmp_path, one_draw, capsys):
    official(tmp_path / "hub")
    lc = "--lc-data", tmp_path / "hub"
    first = entries(0)
    second = [{**row, "output_1": "another answer of the baseline"} for row in entries(5, name="other")]
    with pytest.raises(SystemExit):
        differences_of(tmp_path, first[:-1], second[1:], *lc)
    assert (
        "of 40 prompts, 2 are not in all runs and 0 have no verdict; --allow-missing"
        in capsys.readouterr().err
    )
    both = differences_of(tmp_path, first[:-1], second[1:], *lc, "--allow-missing")
    one, other = (alone(tmp_path, rows[1:-1], *lc, "--allow-missing") for rows in (first, second))
    for name in ("win_rate", "length_controlled_winrate"):
        cell = both["groups"]["all"][name]
        assert (cell["first"], cell["second"]) == (pytest.approx(one[name]), pytest.approx(other[name]))
    assert (both["n_unanswered"], both["groups"]["all"]["n_total"]) == (2, 38)


def test_categories_of_the_first_file(tmp_path, one_draw):
    unlabelled = [{**row, "category": None} for row in entries(5, name="other")]
    cells = differences_of(tmp_path, entries(0), unlabelled, "--categories")["categories"]
    p = arrays(entries(0))[0] - arrays(unlabelled)[0]
    assert cells["math"]["win_rate"]["difference"] == pytest.approx(100 * p[1::3].mean(), abs=1e-9)


def test_a_group_of_one_prompt_has_no_interval(tmp_path, few_draws):
    first, second = entries(0, 12), entries(5, 12, "other")
    for k, row in enumerate(first):
        row["category"] = "few" if k < 2 else "many"
    second[1]["preference"] = None
    cells = differences_of(tmp_path, first, second, "--categories", "--allow-missing")["categories"]
    assert (cells["few"]["n_total"], cells["few"]["n_total_second"]) == (2, 1)
    for name in ("win_rate", "length_controlled_winrate"):
        assert cells["few"][name]["difference"] is not None and cells["few"][name]["ci"] is None
        assert cells["many"][name]["ci"] is not None


def test_length_bins_of_two_models_have_the_same_edges(tmp_path, one_draw):
    lengths = {"new": range(1, 9), "other": (20, 21, 22, 23, 2, 3, 7, 40)}
    rows = [of_lengths(lengths[name], name) for name in lengths]
    bins = differences_of(tmp_path, *rows, "--length-bins")["length_bins"]
    # 1 2 2 3 3 4 5 6 7 7 8 20 21 22 23 40: quartiles 3, 6.5 and 20.25
    assert list(bins) == ["1 to 3", "3 to 6.5", "6.5 to 20.25", "20.25 to 40"]
    assert [cell["n_total"] for cell in bins.values()] == [2, 4, 2, 0]
    assert [cell.get("n_total_second", cell["n_total"]) for cell in bins.values()] == [1, 1, 2, 4]
    empty = bins["20.25 to 40"]["win_rate"]
    assert (empty["first"], empty["difference"], empty["ci"]) == (None, None, None) and empty["second"] > 0
    some = differences_of(tmp_path, *rows, "--length-bins", "math")["length_bins"]
    assert list(some) == list(bins) and sum(cell["n_total"] for cell in some.values()) == 3


def test_annotations_refused(tmp_path, capsys):
    first, older = entries(0, 8), entries(0, 8, "other", base="older")
    other_judge = entries(5, 8, "other", judge="judge:another")
    for second, sentence in (
        (older, "expected one baseline, found base and older"),
        (other_judge, "expected one judge, found judge:another and weighted_alpaca_eval_gpt4_turbo"),
    ):
        with pytest.raises(SystemExit) as end:
            differences_of(tmp_path, first, second)
        assert end.value.code == 2 and sentence in capsys.readouterr().err
    file, run = str(tmp_path / "first.json"), str(tmp_path / "a")
    together = "give runs and their --baseline, or one file of annotations for --first and --second each"
    for flags in (
        ["--first", file, "--baseline", "base"],
        ["--first", file, file],
        ["--first", run],
    ):
        with pytest.raises(SystemExit) as end:
            compare.parse_args([*flags, "--out", "x"])
        assert end.value.code == 2 and together in capsys.readouterr().err


def test_verdicts_on_claims():
    assert claims.verdict(0.1, 5.0) == "agrees" and claims.verdict(-5.0, -0.1) == "disagrees"
    assert claims.verdict(-1.0, 5.0) == claims.verdict(-1.0, 0.0) == "undecided"


def test_table_of_claims(tmp_path, capsys):
    def cell(difference, low, high, seeds):
        return {"difference": difference, "ci": [low, high], "error_over_seeds": seeds}

    (tmp_path / "a").mkdir()
    groups = {"open": {"n_total": 9, "length_controlled_winrate": cell(-3.0, -4.04, -2.0, None)}}
    (tmp_path / "a" / "x.json").write_text(json.dumps({"groups": groups}))
    groups = {"all": {"n_total": 8, "reward": cell(0.02, -0.01, 0.05, 0.1)}}
    (tmp_path / "a" / "r.verified.json").write_text(json.dumps({"groups": groups}))
    for k, score in enumerate((0.3, 0.6)):  # the mean is below 0.5: off-policy is predicted
        (tmp_path / "a" / f"{k}.boundary.json").write_text(json.dumps({"score": score}))
    rows = [
        {"result": "a/x.json", "group": "open", "measure": "length_controlled_winrate", "sign": -1},
        {"result": "a/r.verified.json", "group": "all", "measure": "reward", "sign": 1},
        {"result": "b/x.json", "group": "all", "measure": "win_rate", "sign": 1},
        {"result": "a/x.json", "group": "open", "measure": "length_controlled_winrate", "sign": 1}
        | {"boundary": "a/*.boundary.json"},
    ]
    path = tmp_path / "claims.json"
    path.write_text(json.dumps([row | {"claim": "c", "paper": "p"} for row in rows]))
    claims.main(claims.parse_args([str(path), "--figure", str(tmp_path / "claims.png")]))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| c | p | +3.0 (+2.0 to +4.0) | LC, open, n = 9 | [a/x](a/x.json) | agrees, of these models |",
        "| c | p | +2.0 (-1.0 to +5.0) | right answers, all, n = 8 | [a/r.verified](a/r.verified.json) "
        "| undecided |",
        "| c | p |  |  | b/x.json | not run |",
        "| c; ours 0.30 0.60 | p | +3.0 (+2.0 to +4.0) | LC, open, n = 9 | [a/x](a/x.json) "
        "| agrees, of these models |",
    ]
    assert (tmp_path / "claims.png").read_bytes()[:4] == b"\x89PNG"


def test_a_line_of_differences(tmp_path, capsys):
    rate = {"difference": 5, "ci": [-1, 11], "error_over_prompts": 3.0, "error_over_seeds": 4.0}
    group = {"win_rate": rate, "length_controlled_winrate": rate | {"ci_paired": [1, 9]}}
    right = {"reward": {"difference": 0.02, "ci": [-0.01, 0.05], "error_over_seeds": None}}
    results = {name: group for name in ("all", "open", "taste", "verifiable")}
    (tmp_path / "a_against_b.json").write_text(json.dumps({"groups": results}))
    (tmp_path / "a_against_b.verified.json").write_text(json.dumps({"groups": {"all": right}}))
    differences.main(differences.parse_args([str(tmp_path)]))
    rates = 6 * "+5.0 (-1.0 to +11.0) | "
    line = f"| a_against_b | {rates}+2.0 (-1.0 to +5.0)* | +1.0 to +9.0 | 5.0 |"
    assert capsys.readouterr().out.splitlines()[2:] == [line]


def test_tables_of_results_are_those_of_their_json(capsys):
    claims.main(claims.parse_args([str(REPO / "results" / "claims.json")]))
    assert capsys.readouterr().out in (REPO / "results" / "README.md").read_text()
    for readme in [REPO / path for path in tracked("results/*/README.md")]:
        differences.main(differences.parse_args([str(readme.parent)]))
        assert capsys.readouterr().out in readme.read_text(), readme
