"""
evaluate.py: win rates with alpaca_eval's numbers (test_lc.py has the length-controlled ones).

Covers  wins, ties, losses and several responses per model by hand; alpaca_eval's standard error; intervals
        against draws written out here; categories; wins of a pairwise scorer; lengths and rewards; two files;
        responses with reasoning; what is refused.
Run     python -m pytest tests/test_evaluate.py
"""

import json
import math

import numpy as np
import pytest
from conftest import thinking, write_rows

import evaluate


def response(model, reward, text=None):
    return {"text": text or f"{model} says {reward}", "source": "on", "model": model, "reward": reward}


def prompt_row(number, *responses, **more):
    return {"id": f"p{number}", "prompt": f"question {number}", "responses": list(responses), **more}


def winrate(tmp_path, capsys, *sets, flags=(), model="new"):
    """The result for rows, in a file for each set of them."""
    files = [write_rows(tmp_path / f"scored{k}.jsonl", rows) for k, rows in enumerate(sets)]
    command = ["--scored", *files, "--model", model, "--baseline", "old", *flags]
    evaluate.main(evaluate.parse_args([*command, "--out", str(tmp_path / "result.json")]))
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert json.loads(capsys.readouterr().out) == result
    return result


def refused(tmp_path, capsys, *sets, **more):
    """The sentence with which a command ends that has written nothing."""
    for path in tmp_path.glob("result*"):
        path.unlink()
    with pytest.raises(SystemExit) as status:
        winrate(tmp_path, capsys, *sets, **more)
    said = capsys.readouterr()
    assert status.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert not list(tmp_path.glob("result*"))
    return said.err


ROWS = [
    prompt_row(0, response("new", 2.0, "abcde"), response("old", 1.0, "abc")),  # won
    prompt_row(1, response("old", 3.0, "abc"), response("new", -1.0, "ab")),  # lost
    prompt_row(2, response("new", 1.0, "a"), response("old", 1.0, "abcd")),  # tie
    prompt_row(  # 2 of 4 pairs won, one tied: .625
        3,
        response("new", 5.0, "abcd"),
        response("new", 2.0, "abc"),
        response("old", 3.0, "ab"),
        response("old", 2.0, "abcdefg"),
    ),
]
VALUES = [1.0, 0.0, 0.5, 0.625]
REWARDS = [2.0, -1.0, 1.0, 3.5]  # of the model, one a prompt


def draws_of(n):
    """(1000, n) how often each prompt is drawn."""
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, 1000)


def interval(numbers, draws=None):
    """Percentiles of the mean over 1,000 draws of prompts; a prompt of None has no number."""
    numbers = np.array([math.nan if number is None else number for number in numbers])
    means = []
    for counts in draws_of(len(numbers)) if draws is None else draws:
        drawn = np.repeat(numbers, counts)
        if not np.isnan(drawn).all():
            means.append(np.nanmean(drawn))
    return pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-9)


@pytest.fixture
def one_draw(monkeypatch):
    """In place of 1,000 draws, where a test asks for no interval."""
    monkeypatch.setattr(evaluate, "bootstrap", lambda *args: evaluate.rates(*args)[1][None])


def test_win_rate_by_hand(tmp_path, capsys):
    result = winrate(tmp_path, capsys, ROWS)
    mean = sum(VALUES) / 4
    assert result["win_rate"] == pytest.approx(100 * mean, abs=1e-9) and mean == 0.53125
    # alpaca_eval: the standard error of the mean with n - 1, in percent
    sem = 100 * math.sqrt(sum((value - mean) ** 2 for value in VALUES) / 3) / math.sqrt(4)
    assert result["standard_error"] == pytest.approx(sem, abs=1e-9)
    assert sem == pytest.approx(20.6502, abs=1e-4)
    assert (result["n_wins"], result["n_wins_base"], result["n_draws"], result["n_total"]) == (2, 1, 1, 4)
    assert result["ci"] == interval([100 * value for value in VALUES])
    assert (result["by"], result["labelers"], result["model"], result["baseline"]) == (
        "reward",
        [],
        "new",
        "old",
    )
    assert (result["kind"], result["categories"], result["bins_of"]) == ("winrate", {}, [])


def test_lengths_and_rewards_by_hand(tmp_path, capsys):
    result = winrate(tmp_path, capsys, ROWS)
    # one length per prompt: 5, 2, 1 and the mean 3.5, not 15 characters over 5 responses; 3, 3, 4 and 4.5
    assert result["avg_length"] == int((5 + 2 + 1 + 3.5) / 4) == 2
    assert result["avg_length_baseline"] == int((3 + 3 + 4 + 4.5) / 4) == 3
    assert result["reward"] == pytest.approx(5.5 / 4) and result["reward_ci"] == interval(REWARDS)
    assert result["reward_baseline"] == pytest.approx((1 + 3 + 1 + 2.5) / 4)


def test_reasoning_changes_no_rate_and_no_length(tmp_path, capsys):
    """Length control too: every number is that of the same rows without reasoning."""
    draw = np.random.default_rng(7)
    plain, rows = [], []
    for k in range(12):
        responses = [response(name, draw.normal(), "a" * draw.integers(1, 90)) for name in ("new", "old")]
        plain.append(prompt_row(k, *responses, category="math" if k % 2 else "art"))
        rows.append(plain[-1] | {"responses": [thinking(responses[0], k), responses[1]]})
    expected, result = (winrate(tmp_path, capsys, data) for data in (plain, rows))
    lengths = [len(row["responses"][0]["text"]) for row in plain]
    assert result == expected and result["avg_length"] == sum(lengths) // 12
    assert 0 < result["length_controlled_winrate"] < 100 and len(result["length_bins"]) == 4
    assert min(len(row["responses"][0]["text"]) for row in rows) > min(lengths)


def test_equal_answers_tie_and_a_missing_answer_has_no_characters(tmp_path, capsys):
    rows = [
        prompt_row(0, thinking(response("new", 2.0, "same"), 0), thinking(response("old", 1.0, "same"), 1)),
        prompt_row(1, response("new", -9.0, "<think>\nHm, I was cut"), response("old", 1.0, "four")),
        prompt_row(2, thinking(response("new", 1.0, "abcdef"), 2), response("old", 0.0, "ab")),
    ]
    result = winrate(tmp_path, capsys, rows)
    assert (result["n_draws"], result["n_wins"], result["n_wins_base"]) == (1, 1, 1)
    assert result["avg_length"] == (4 + 0 + 6) // 3 and result["avg_length_baseline"] == (4 + 4 + 2) // 3


def test_model_and_baseline_change_places(tmp_path, capsys):
    text = json.dumps(ROWS).replace('"new"', '"-"').replace('"old"', '"new"').replace('"-"', '"old"')
    forward, backward = (winrate(tmp_path, capsys, rows) for rows in (ROWS, json.loads(text)))
    assert forward["win_rate"] + backward["win_rate"] == pytest.approx(100)
    assert forward["ci"] == pytest.approx([100 - bound for bound in backward["ci"]][::-1])
    assert forward["standard_error"] == pytest.approx(backward["standard_error"])
    assert forward["reward"] == pytest.approx(backward["reward_baseline"])


def test_equal_texts_tie_and_a_missing_reward_is_no_verdict(tmp_path, capsys):
    rows = [
        prompt_row(0, response("new", 2.0, "same"), response("old", 1.0, "same")),
        prompt_row(1, response("new", None), response("old", 1.0)),
        prompt_row(2, response("new", None), response("new", 4.0), response("old", 1.0)),
        prompt_row(3, response("new", 1.0)),
    ]
    err = refused(tmp_path, capsys, rows)
    assert "of 4 prompts, 1 have no answer of a model and 1 no verdict, more than 1 %; --allow-missing" in err
    result = winrate(tmp_path, capsys, rows, flags=["--allow-missing"])
    # compared: 0 and 2; answered by both and not compared: 1; answered by one: 3
    assert (result["win_rate"], result["n_total"], result["n_draws"]) == (75.0, 2, 1)
    assert (result["n_without_verdict"], result["n_unanswered"]) == (1, 1)
    assert result["ci"] == interval([50, None, 100])
    assert result["reward"] == 3.0 and result["reward_ci"] == interval([2.0, None, 4.0])
    assert result["reward_baseline"] == 1.0
    counts = json.loads((tmp_path / "result.meta.json").read_text())["counts"]
    assert (counts["prompts"], counts["compared"]) == (4, 2)


def test_a_record_counts_what_was_left_out(tmp_path, capsys, one_draw):
    rows = [
        *ROWS,
        prompt_row(4, response("new", None), response("old", 1.0)),
        prompt_row(5, response("new", 1.0)),
    ]
    winrate(tmp_path, capsys, rows, flags=["--allow-missing"])
    counts = json.loads((tmp_path / "result.meta.json").read_text())["counts"]
    assert sorted(counts.values()) == [1, 1, 4, 6]


def test_one_prompt_has_no_interval(tmp_path, capsys, one_draw):
    result = winrate(tmp_path, capsys, ROWS[:1])
    names = ("win_rate", "standard_error", "ci", "reward", "reward_ci", "length_controlled_winrate", "lc_ci")
    assert [result[name] for name in names] == [100.0, None, None, 2.0, None, None, None]
    rows = [{**prompt_row(k, *ROWS[0]["responses"]), "category": "one" if k == 4 else "a"} for k in range(6)]
    alone = winrate(tmp_path, capsys, rows)["categories"]["one"]
    assert (alone["n_total"], alone["win_rate"], alone["reward"]) == (1, 100.0, 2.0)
    assert (alone["standard_error"], alone["ci"], alone["lc_ci"], alone["reward_ci"]) == (
        None,
        None,
        None,
        None,
    )


def test_a_group_without_any_verdict(tmp_path, capsys, one_draw):
    rows = [{**row, "category": "a"} for row in ROWS]
    rows.append(prompt_row(4, response("new", None), response("old", 7.0), category="silent"))
    silent = winrate(tmp_path, capsys, rows, flags=["--allow-missing"])["categories"]["silent"]
    assert silent == {
        **dict.fromkeys(("n_total", "n_wins", "n_wins_base", "n_draws"), 0),
        **dict.fromkeys(("standard_error", "win_rate", "ci", "reward", "reward_ci")),
        **dict.fromkeys(("length_controlled_winrate", "lc_ci")),
    }


def test_categories(tmp_path, capsys):
    rows = [{**row, "category": category} for row, category in zip(ROWS, ("b", "b", "a", "a"))]
    result = winrate(tmp_path, capsys, rows)
    assert list(result["categories"]) == ["a", "b"] and result["win_rate"] == pytest.approx(53.125)
    a, b = result["categories"].values()
    assert (a["win_rate"], a["n_total"], a["n_wins"], a["n_draws"]) == (pytest.approx(56.25), 2, 1, 1)
    assert (b["win_rate"], b["n_total"], b["n_wins"], b["n_wins_base"]) == (50, 2, 1, 1)
    assert b["standard_error"] == pytest.approx(50.0)  # of 1 and 0: sd .7071, over sqrt 2
    assert a["reward"] == pytest.approx((1 + 3.5) / 2) and b["reward"] == pytest.approx((2 - 1) / 2)
    assert a["ci"] == interval([None, None, 50, 62.5]) and b["ci"] == interval([100, 0, None, None])
    assert b["reward_ci"] == interval([2.0, -1.0, None, None])


def test_wins_of_a_pairwise_scorer(tmp_path, capsys):
    # the judge's probability counts, not only who is ahead; rewards beside it do not
    rows = [
        prompt_row(0, response("new", -9.0), response("old", 9.0), wins=[[None, 0.8], [0.2, None]]),
        prompt_row(1, response("old", 9.0), response("new", -9.0), wins=[[None, 0.7], [0.3, None]]),
        prompt_row(2, response("new", -9.0), response("old", 9.0), wins=[[None, None], [None, None]]),
    ]
    result = winrate(
        tmp_path, capsys, [{**row, "labeler": "judge:j"} for row in rows], flags=["--allow-missing"]
    )
    assert result["win_rate"] == pytest.approx(100 * (0.8 + 0.3) / 2) and result["by"] == "wins"
    assert (result["n_wins"], result["n_wins_base"], result["n_without_verdict"]) == (1, 1, 1)
    assert result["ci"] == interval([80, 30, None]) and result["labelers"] == ["judge:j"]
    assert "some rows have wins and some have none; score all of them with one scorer" in refused(
        tmp_path, capsys, rows + ROWS[3:]
    )


def test_two_files_are_merged(tmp_path, capsys, one_draw):
    """A prompt has the answers of both files, in either order, and the category that one of them knows."""
    mine = [prompt_row(k, response("new", 2.0 * k, "abcde"), category=None) for k in range(3)]
    theirs = [prompt_row(k, response("old", 3.0, "abc"), category="facts") for k in (2, 0, 1)]
    results = [winrate(tmp_path, capsys, *sets) for sets in ((mine, theirs), (theirs, mine))]
    assert results[0] == results[1] and results[0]["win_rate"] == pytest.approx(100 / 3)
    assert results[0]["categories"]["facts"]["n_total"] == 3


def test_wins_that_one_of_two_files_has(tmp_path, capsys, one_draw):
    """The judge of one file did not see the answers of the other: there is no verdict between them."""
    wins = [[None, 0.8], [0.2, None]]
    judged = [prompt_row(k, response("new", 1.0), response("old", 2.0), wins=wins) for k in range(3)]
    more = [prompt_row(k, response("old", 5.0, "another answer")) for k in range(3)]
    for sets in ((judged, more), (more, judged)):
        result = winrate(tmp_path, capsys, *sets)
        assert (result["win_rate"], result["n_total"], result["by"]) == (pytest.approx(80), 3, "wins")
    unseen = [prompt_row(k, response("third", 5.0)) for k in range(3)]
    for sets in ((judged, unseen), (unseen, judged)):
        assert "of 3 prompts, 0 have no answer of a model and 3 no verdict" in refused(
            tmp_path, capsys, *sets, model="third"
        )


def test_a_result_beside_its_input_with_the_same_stem(tmp_path, capsys):
    """x.meta.json would be that of x.jsonl and of x.json: score.py would not know its own file again."""
    scored = write_rows(tmp_path / "x.jsonl", ROWS)
    (tmp_path / "x.meta.json").write_text("as score.py wrote it")
    (tmp_path / "link.json").symlink_to(scored)
    command = ["--scored", scored, "--model", "new", "--baseline", "old", "--out"]
    for out in ("x.json", "x.jsonl", "link.json"):
        with pytest.raises(SystemExit) as status:
            evaluate.main(evaluate.parse_args([*command, str(tmp_path / out)]))
        assert status.value.code == 2
        err = capsys.readouterr().err
        assert f"--out {tmp_path / out}: this would overwrite an input file or its record" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "x.jsonl", "x.meta.json"]
    assert (tmp_path / "x.meta.json").read_text() == "as score.py wrote it"
    assert (tmp_path / "x.jsonl").read_text().count("\n") == len(ROWS)


def test_a_result_is_replaced(tmp_path, capsys, one_draw):
    first = winrate(tmp_path, capsys, ROWS)
    second = winrate(tmp_path, capsys, ROWS[:3])
    assert (first["n_total"], second["n_total"]) == (4, 3)
    record = json.loads((tmp_path / "result.meta.json").read_text())
    assert record["args"]["scored"] == list(record["inputs"]) == [str(tmp_path / "scored0.jsonl")]


def test_an_unknown_model_lists_the_names(tmp_path, capsys):
    err = refused(tmp_path, capsys, ROWS, model="newer")
    assert "no response is of the model 'newer'; there are new, old" in err


def test_no_prompt_with_both_models(tmp_path, capsys):
    rows = [prompt_row(0, response("new", 1.0)), prompt_row(1, response("old", 1.0))]
    err = refused(tmp_path, capsys, rows)
    assert (
        "no prompt has a verdict on new against old: of 2 prompts, 2 have no answer of a model and 0 no"
        in err
    )


@pytest.mark.parametrize(
    "reward, key",
    [
        (float("nan"), ""),
        ("2.0", "reward"),
        (True, "reward"),
    ],
)
def test_a_reward_that_is_no_number(tmp_path, capsys, reward, key):
    rows = [ROWS[0], prompt_row(9, response("new", reward, "x"), response("old", 1.0))]
    assert key in refused(tmp_path, capsys, rows).split("scored0.jsonl:2: ")[1]


def test_a_missing_reward_key_and_wins_out_of_range(tmp_path, capsys):
    rows = [ROWS[0], prompt_row(9, {"text": "x", "source": "on", "model": "new"}, response("old", 1.0))]
    assert "reward" in refused(tmp_path, capsys, rows).split("scored0.jsonl:2: ")[1]
    rows = [prompt_row(0, response("new", 1.0), response("old", 1.0), wins=[[None, 1.5], [0.2, None]])]
    err = refused(tmp_path, capsys, rows)
    assert "wins" in err.split("scored0.jsonl:1: ")[1]
