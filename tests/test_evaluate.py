"""
evaluate.py: win rates with alpaca_eval's numbers (test_lc.py: length-controlled ones; test_report.py: the report).

Covers  wins, ties, losses and several responses per model by hand; alpaca_eval's standard error; categories; wins of a
        pairwise scorer; lengths and rewards; what is refused.
Run     python -m pytest tests/test_evaluate.py
"""

import json
import math

import evaluate
import pytest
from conftest import write_rows


def response(model, reward, text=None):
    return {"text": text or f"{model} says {reward}", "source": "on", "model": model, "finish": "stop",
            "reward": reward}


def prompt_row(number, *responses, **more):
    return {"id": f"p{number}", "prompt": f"question {number}", "responses": list(responses), **more}


def winrate(tmp_path, capsys, rows, *flags, model="new", out="result.json"):
    path = write_rows(tmp_path / "scored.jsonl", rows)
    evaluate.main(evaluate.parse_args(["winrate", "--scored", path, "--model", model, "--baseline", "old",
                                       "--out", str(tmp_path / out), "--overwrite", *flags]))
    result = json.loads((tmp_path / out).read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    return result


def refused(tmp_path, capsys, rows, *flags, **more):
    with pytest.raises(SystemExit) as exit_status:
        winrate(tmp_path, capsys, rows, *flags, **more)
    assert exit_status.value.code == 2 and not (tmp_path / "result.json").exists()
    return capsys.readouterr().err


ROWS = [prompt_row(0, response("new", 2.0, "abcde"), response("old", 1.0, "abc")),                          # won
        prompt_row(1, response("old", 3.0, "abc"), response("new", -1.0, "ab")),                            # lost
        prompt_row(2, response("new", 1.0, "a"), response("old", 1.0, "abcd")),                             # tie
        # 2 of 4 pairs won, one tied: .625
        prompt_row(3, response("new", 5.0, "abcd"), response("new", 2.0, "abc"), response("old", 3.0, "ab"),
                   response("old", 2.0, "abcdefg"))]


def test_win_rate_by_hand(tmp_path, capsys):
    result = winrate(tmp_path, capsys, ROWS)
    values = [1.0, 0.0, 0.5, 0.625]
    mean = sum(values) / 4
    assert result["win_rate"] == pytest.approx(100 * mean, abs=1e-9) and mean == 0.53125
    # alpaca_eval: the standard error of the mean with n - 1, in percent
    sem = 100 * math.sqrt(sum((value - mean) ** 2 for value in values) / 3) / math.sqrt(4)
    assert result["standard_error"] == pytest.approx(sem, abs=1e-9) and sem == pytest.approx(20.6502, abs=1e-4)
    assert (result["n_wins"], result["n_wins_base"], result["n_draws"], result["n_total"]) == (2, 1, 1, 4)
    assert result["discrete_win_rate"] == pytest.approx(100 * 2.5 / 4)
    low, high = result["ci"]
    assert 0 <= low < result["win_rate"] < high <= 100 and result["by"] == "reward"


def test_lengths_and_rewards_by_hand(tmp_path, capsys):
    result = winrate(tmp_path, capsys, ROWS)
    # one length per prompt: 5, 2, 1 and the mean 3.5, not 15 characters over 5 responses; 3, 3, 4 and 4.5
    assert result["avg_length"] == int((5 + 2 + 1 + 3.5) / 4) == 2
    assert result["avg_length_baseline"] == int((3 + 3 + 4 + 4.5) / 4) == 3
    # one reward per prompt: 2, -1, 1 and 3.5; 1, 3, 1 and 2.5
    assert result["reward"]["mean"] == pytest.approx(5.5 / 4)
    assert result["reward_baseline"]["mean"] == pytest.approx(7.5 / 4)
    assert result["reward"]["n"] == 4 and result["reward"]["ci"][0] < 5.5 / 4 < result["reward"]["ci"][1]


def test_model_and_baseline_change_places(tmp_path, capsys):
    swapped = [{**row, "responses": [{**some, "model": {"new": "old", "old": "new"}[some["model"]]}
                                     for some in row["responses"]]}
               for row in ROWS]
    forward, backward = winrate(tmp_path, capsys, ROWS), winrate(tmp_path, capsys, swapped)
    assert forward["win_rate"] + backward["win_rate"] == pytest.approx(100)
    assert forward["standard_error"] == pytest.approx(backward["standard_error"])


def test_equal_texts_tie_and_a_missing_reward_is_no_verdict(tmp_path, capsys):
    rows = [prompt_row(0, response("new", 2.0, "same"), response("old", 1.0, "same")),
            prompt_row(1, response("new", None), response("old", 1.0)),
            prompt_row(2, response("new", None), response("new", 4.0), response("old", 1.0)),
            prompt_row(3, response("new", 1.0))]
    (tmp_path / "strict").mkdir()
    assert "of 4 prompts 1 have no responses of all models and 1 no verdict, over 1 %" in refused(tmp_path / "strict", capsys, rows)
    result = winrate(tmp_path, capsys, rows, "--allow-missing")
    # compared: 0 and 2; answered by both and not compared: 1; answered by one: 3
    assert (result["win_rate"], result["n_total"], result["n_draws"]) == (75.0, 2, 1)
    assert (result["n_without_verdict"], result["n_other_prompts"]) == (1, 1)
    assert result["reward"] == {"mean": 3.0, "ci": result["reward"]["ci"], "n": 2}


def test_one_prompt_has_no_standard_error(tmp_path, capsys):
    result = winrate(tmp_path, capsys, ROWS[:1])
    assert (result["win_rate"], result["standard_error"], result["ci"], result["reward"]["ci"]) == (100.0, None, None, None)
    rows = [{**ROWS[k], "category": category} for k, category in enumerate("aabb")] + [
        {**prompt_row(k, response("new", 2.0, "abcde"), response("old", 1.0, "abc")), "category": "one" if k == 4 else "a"} for k in (4, 5)]
    (tmp_path / "six").mkdir()
    alone = winrate(tmp_path / "six", capsys, rows)["categories"]["one"]
    assert (alone["n_total"], alone["ci"], alone["lc_ci"]) == (1, None, None)


def test_a_result_beside_its_input_with_the_same_stem(tmp_path, capsys):
    """x.meta.json would be that of x.jsonl and of x.json: score.py would not know its own file again."""
    scored = write_rows(tmp_path / "x.jsonl", ROWS)
    (tmp_path / "x.meta.json").write_text('{"args": {"out": "out/x.jsonl"}, "inputs": {}}')  # as score.py wrote it in another folder
    for out in ("x.json", "x.jsonl"):
        with pytest.raises(SystemExit) as ended:
            evaluate.main(evaluate.parse_args(["winrate", "--scored", str(scored), "--model", "new", "--baseline", "old", "--overwrite",
                                               "--out", str(tmp_path / out)]))
        assert ended.value.code == 2
        assert f"{out}: it or its x.meta.json would replace that of the input {scored}; take another name" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "x.meta.json"] and (tmp_path / "x.jsonl").read_text().count("\n") == len(ROWS)


def test_a_category_that_one_file_knows(tmp_path, capsys):
    rows = [prompt_row(k, response("new", 2.0, "abcde")) | {"category": None} for k in range(2)]
    others = [prompt_row(k, response("old", 1.0, "abc")) | {"category": "facts"} for k in range(2)]
    files = [write_rows(tmp_path / f"{name}.jsonl", some) for name, some in (("a", rows), ("b", others))]
    evaluate.main(evaluate.parse_args(["winrate", "--scored", *map(str, files), "--model", "new", "--baseline", "old", "--out",
                                       str(tmp_path / "r.json")]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["categories"]["facts"]["n_total"] == 2


def test_categories(tmp_path, capsys):
    rows = [{**row, "category": category} for row, category in zip(ROWS, ("coding", "coding", "facts", "facts"))]
    result = winrate(tmp_path, capsys, rows)
    assert list(result["categories"]) == ["coding", "facts"] and result["win_rate"] == pytest.approx(53.125)
    assert result["categories"]["coding"]["win_rate"] == 50 and result["categories"]["coding"]["n_total"] == 2
    assert result["categories"]["facts"]["win_rate"] == pytest.approx(56.25)
    assert result["categories"]["coding"]["standard_error"] == pytest.approx(50.0)  # of 1 and 0: sd .7071, over sqrt 2
    assert winrate(tmp_path, capsys, ROWS)["categories"] == {}


def test_wins_of_a_pairwise_scorer(tmp_path, capsys):
    # the judge's probability counts, not only who is ahead; rewards beside it do not
    rows = [prompt_row(0, response("new", -9.0), response("old", 9.0), wins=[[None, 0.8], [0.2, None]]),
            prompt_row(1, response("old", 9.0), response("new", -9.0), wins=[[None, 0.7], [0.3, None]]),
            prompt_row(2, response("new", -9.0), response("old", 9.0), wins=[[None, None], [None, None]])]
    result = winrate(tmp_path, capsys, rows, "--allow-missing")
    assert result["win_rate"] == pytest.approx(100 * (0.8 + 0.3) / 2) and result["by"] == "wins"
    assert (result["n_wins"], result["n_wins_base"], result["n_without_verdict"]) == (1, 1, 1)
    (tmp_path / "mixed").mkdir()
    assert "3 rows have wins and 1 have none" in refused(tmp_path / "mixed", capsys, rows + ROWS[3:])


def test_an_unknown_model_lists_the_names(tmp_path, capsys):
    err = refused(tmp_path, capsys, ROWS, model="newer")
    assert "no response is of the model 'newer'; there are new, old" in err


def test_no_prompt_with_both_models(tmp_path, capsys):
    rows = [prompt_row(0, response("new", 1.0)), prompt_row(1, response("old", 1.0))]
    assert "no prompt has comparable responses of new and old" in refused(tmp_path, capsys, rows)


@pytest.mark.parametrize("reward", [float("nan"), "2.0", True])
def test_a_reward_that_is_no_number(tmp_path, capsys, reward):
    rows = [ROWS[0], prompt_row(9, response("new", reward, "x"), response("old", 1.0))]
    assert "scored.jsonl:2: expected every response to have a finite" in refused(tmp_path, capsys, rows)
