"""
boundary.py: V_on, V_off and the stage that follows (S2, Algorithm 1), its bootstrap interval, the check of S2's F.1.

Covers  METHODS.md 10's vector as rewards and as wins under every --tie, equal texts, m x n responses, the interval
        against a closed form and a normal approximation, distinctness by hand, what is counted and left out, what is
        refused.
Run     python -m pytest tests/test_boundary.py
"""

import json

import boundary
import numpy as np
import pytest
from conftest import write_rows


def response(text, source, reward=None, **more):
    return {"text": text, "source": source, "model": source, "finish": "stop", "reward": reward, **more}


def prompt_row(number, on, off, **more):
    """A row with one response per reward, on-policy ones first."""
    responses = [response(f"on {number} {k}", "on", reward) for k, reward in enumerate(on)]
    responses += [response(f"off {number} {k}", "off", reward) for k, reward in enumerate(off)]
    return {"id": f"p{number}", "prompt": f"question {number}", "responses": responses, **more}


def run(tmp_path, capsys, rows, *flags):
    """The result, which is the file's and the last line's."""
    path = write_rows(tmp_path / "scored.jsonl", rows)
    boundary.main(boundary.parse_args(["--scored", path, "--out", str(tmp_path / "boundary.json"), "--overwrite",
                                       *flags]))
    sentence, last = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "boundary.json").read_text())
    assert json.loads(last) == result and result["advice"] == sentence
    return result


def refused(tmp_path, capsys, rows, *flags):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, rows, *flags)
    assert exit_status.value.code == 2 and not (tmp_path / "boundary.json").exists()
    return capsys.readouterr().err


# METHODS.md 10: logits [[1, -.5], [0, 2]] of on-policy response i against off-policy response j: two won, one lost, one
# tied
LOGITS = [[1.0, -0.5], [0.0, 2.0]]


def as_wins():
    wins = [[None] * 4 for _ in range(4)]
    for i in range(2):
        for j in range(2):
            wins[i][2 + j] = 1 / (1 + np.exp(-LOGITS[i][j] / 2))
            wins[2 + j][i] = 1 - wins[i][2 + j]
    wins[0][1], wins[1][0], wins[2][3], wins[3][2] = 0.9, 0.1, 0.9, 0.1  # comparisons within a source count for nothing
    return prompt_row(0, [None, None], [None, None], wins=wins)


# rewards cannot give these logits, but the same counts: 5 beats 1 and 4; 1 ties with 1 and loses to 4
AS_REWARDS = prompt_row(0, [5.0, 1.0], [1.0, 4.0])


@pytest.mark.parametrize("row", [as_wins(), AS_REWARDS], ids=["wins", "rewards"])
@pytest.mark.parametrize("tie, v_on, v_off", [("off", 2, 2), ("half", 2.5, 1.5), ("skip", 2, 1)])
def test_methods_vector(tmp_path, capsys, row, tie, v_on, v_off):
    result = run(tmp_path, capsys, [row], "--tie", tie)
    assert (result["v_on"], result["v_off"], result["ties"], result["n_prompts"]) == (v_on, v_off, 1, 1)
    assert result["score"] == v_on / (v_on + v_off)
    assert (result["stage"], result["use"]) == ("fine-tuning", "on")  # V_off > V_on is asked for, and 2 > 2 is not true
    assert result["by"] == ("wins" if "wins" in row else "reward")


def test_the_default_tie_rule_is_algorithm_1s(tmp_path, capsys):
    assert run(tmp_path, capsys, [AS_REWARDS])["tie"] == "off"


def test_more_won_by_off_policy_is_the_injection_stage(tmp_path, capsys):
    result = run(tmp_path, capsys, [prompt_row(0, [1.0, 3.0], [2.0, 4.0])])  # 3 beats 2, three are lost
    assert (result["v_on"], result["v_off"], result["score"]) == (1, 3, 0.25)
    assert (result["stage"], result["use"]) == ("injection", "off")
    assert result["advice"].startswith("Preference injection stage: train on off-policy data next (boundary score 0.25")


def test_every_on_policy_response_meets_every_off_policy_one(tmp_path, capsys):
    # 3 x 1, 2 x 3 and 1 x 2: won 2, 4 and 0 of 3, 6 and 2
    rows = [prompt_row(0, [1.0, 2.0, -1.0], [0.0]), prompt_row(1, [3.0, 2.0], [1.0, 0.0, 5.0]),
            prompt_row(2, [0.0], [1.0, 2.0])]
    result = run(tmp_path, capsys, rows)
    assert (result["v_on"], result["v_off"], result["n_prompts"]) == (6, 5, 3)
    assert result["score"] == pytest.approx(6 / 11, abs=1e-12)


def test_equal_texts_tie_whatever_their_rewards_say(tmp_path, capsys):
    row = prompt_row(0, [2.0], [1.0])
    row["responses"][1]["text"] = row["responses"][0]["text"]
    result = run(tmp_path, capsys, [row, prompt_row(1, [1.0], [0.0])])
    assert (result["v_on"], result["v_off"], result["ties"]) == (1, 1, 1)
    wins = prompt_row(0, [None], [None], wins=[[None, 0.9], [0.1, None]])
    wins["responses"][1]["text"] = wins["responses"][0]["text"]
    assert run(tmp_path, capsys, [wins])["ties"] == 1


def test_a_prompt_may_lie_in_two_files(tmp_path, capsys):
    row = prompt_row(0, [5.0, 1.0], [1.0, 4.0])
    files = [write_rows(tmp_path / f"{name}.jsonl", [{**row, "responses": some}])
             for name, some in (("on", row["responses"][:2]), ("off", row["responses"][2:]))]
    boundary.main(boundary.parse_args(["--scored", *files, "--out", str(tmp_path / "boundary.json")]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["v_on"], result["v_off"], result["ties"]) == (2, 2, 1)


def test_interval_where_all_prompts_agree(tmp_path, capsys):
    won = [prompt_row(k, [2.0, 1.0], [0.0, -1.0]) for k in range(10)]
    result = run(tmp_path, capsys, won)
    assert result["ci"] == [1.0, 1.0] and result["score"] == 1.0 and "undecided" not in result["advice"]
    lost = [prompt_row(k, [0.0], [1.0]) for k in range(10)]
    assert run(tmp_path, capsys, lost)["ci"] == [0.0, 0.0]


def test_interval_of_a_share_is_the_normal_approximation(tmp_path, capsys):
    # 130 of 200 prompts won: .65 +- 1.96 sqrt(.65 * .35 / 200)
    rows = [prompt_row(k, [1.0 if k < 130 else -1.0], [0.0]) for k in range(200)]
    result = run(tmp_path, capsys, rows)
    half = 1.96 * np.sqrt(0.65 * 0.35 / 200)
    assert result["ci"] == pytest.approx([0.65 - half, 0.65 + half], abs=0.012)
    assert "undecided" not in result["advice"]
    even = run(tmp_path, capsys, [prompt_row(k, [1.0 if k < 11 else -1.0], [0.0]) for k in range(20)])
    assert even["stage"] == "fine-tuning" and "undecided at 95 %" in even["advice"]


def test_bootstrap_draws_prompts_not_comparisons():
    # 40 prompts of 4 comparisons that agree: the interval is that of 40 prompts, twice as wide as that of 160
    # comparisons
    votes = np.array([4.0] * 20 + [0.0] * 20)
    low, high = boundary.bootstrap_interval(votes, np.full(40, 4.0))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.15)
    # a slow bootstrap with other random numbers, prompts of unequal size
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 6, 60)
    won = rng.binomial(sizes, 0.4)
    ratios = []
    for _ in range(4000):
        drawn = [int(rng.integers(60)) for _ in range(60)]
        ratios.append(sum(int(won[k]) for k in drawn) / sum(int(sizes[k]) for k in drawn))
    ratios.sort()
    assert boundary.bootstrap_interval(won, sizes) == pytest.approx([ratios[100], ratios[3900]], abs=0.02)


def test_distinctness_by_hand(tmp_path, capsys):
    # prompt 0: sums -10, -30 against -20, -40: 3 of 4 higher; per token -5, -1 against -10, -4: -5 > -10, -1 beats
    # both: 3 of 4
    first = prompt_row(0, [1.0, 1.5], [0.0, 0.5])
    for some, logp, tokens in zip(first["responses"], (-10.0, -30.0, -20.0, -40.0), (2, 30, 2, 10)):
        some.update(logp=logp, logp_tokens=tokens)
    # prompt 1: sum -9 < -8, per token -1 > -4; prompts weigh the same, however many comparisons they hold
    second = prompt_row(1, [1.0], [0.0])
    for some, logp, tokens in zip(second["responses"], (-9.0, -8.0), (9, 2)):
        some.update(logp=logp, logp_tokens=tokens)
    result = run(tmp_path, capsys, [first, second, prompt_row(2, [1.0], [0.0])])
    assert result["distinct"] == {"sum": (3 / 4 + 0) / 2, "mean": (3 / 4 + 1) / 2, "n_prompts": 2}
    assert "only 38% of on-policy responses are the more probable ones" in result["advice"]
    assert run(tmp_path, capsys, [prompt_row(2, [1.0], [0.0])])["distinct"] is None


def test_what_cannot_be_compared_is_counted(tmp_path, capsys):
    rows = [prompt_row(0, [1.0], [0.0]), prompt_row(1, [1.0, 2.0], []), prompt_row(2, [], [1.0]),
            prompt_row(3, [None], [1.0]),
            prompt_row(4, [1.0, None], [0.0, 2.0])]
    result = run(tmp_path, capsys, rows)
    assert (result["v_on"], result["v_off"], result["n_prompts"]) == (2, 1, 2)
    assert result["prompts_with_one_source"] == 2 and result["prompts_without_verdict"] == 1
    assert result["without_verdict"] == 3  # one of p3, two of p4


def test_lengths_stand_beside_the_score(tmp_path, capsys):
    rows = [prompt_row(0, [1.0], [0.0]), prompt_row(1, [1.0], [])]
    rows[0]["responses"][0]["text"], rows[0]["responses"][1]["text"] = "abcd", "ab"
    assert run(tmp_path, capsys, rows)["avg_length"] == {"on": 4.0, "off": 2.0}  # p1 is not compared and not measured


def test_nothing_to_compare_is_a_sentence(tmp_path, capsys):
    err = refused(tmp_path, capsys, [prompt_row(0, [1.0], []), prompt_row(1, [], [1.0])])
    assert "no prompt has an on-policy and an off-policy response that can be compared" in err
    assert "{'prompts_with_one_source': 2}" in err
    assert "no prompt has" in refused(tmp_path, capsys, [prompt_row(0, [1.0], [1.0])], "--tie", "skip")
    assert "no response has a reward" in refused(tmp_path, capsys, [prompt_row(0, [None], [None])])


def test_wins_in_some_rows_only(tmp_path, capsys):
    assert "1 rows have wins and 1 have none" in refused(tmp_path, capsys, [as_wins(), prompt_row(1, [1.0], [0.0])])
