"""
boundary.py: V_on, V_off and the stage that follows (S2, Algorithm 1), its bootstrap interval, the score over
texts of similar length, the check of S2's F.1, the exact consistencies (eqs. 10, 11).

Covers  Algorithm 1's vector as rewards and as wins under every --tie, equal texts, m x n responses, the
        interval against a closed form and a normal approximation, the bounds of the length match,
        distinctness by hand, consistency by its definition in plain loops and its reduction to Algorithm 1,
        each sentence of advice, scores by category, what is counted and left out, what is refused. (The
        intra-diversity, eq. 12, is in test_build_pairs.py.)
Run     python -m pytest tests/test_boundary.py
"""

import json
import math
import random

import numpy as np
import pytest
from conftest import thinking, write_rows

import boundary


def response(text, source, reward=None, **more):
    return {"text": text, "source": source, "model": source, "finish": "stop", "reward": reward, **more}


def prompt_row(number, on, off, **more):
    """A row with one response per reward, on-policy ones first."""
    responses = [response(f"on {number} {k}", "on", reward) for k, reward in enumerate(on)]
    responses += [response(f"off {number} {k}", "off", reward) for k, reward in enumerate(off)]
    return {"id": f"p{number}", "prompt": f"question {number}", "responses": responses, **more}


def with_logps(row, *logps, tokens=None):
    """The row with log-probabilities in the order of its responses, of one token each; None leaves a null."""
    tokens = tokens or [1] * len(logps)
    for one, logp, count in zip(row["responses"], logps, tokens, strict=True):
        one.update(logp=logp, logp_tokens=None if logp is None else count)
    return row


def run(tmp_path, capsys, rows, *flags):
    """The result, which is the file's and the last line's."""
    path = write_rows(tmp_path / "scored.jsonl", rows)
    boundary.main(boundary.parse_args(["--scored", path, "--out", str(tmp_path / "boundary.json"), *flags]))
    sentence, last = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "boundary.json").read_text())
    assert json.loads(last) == result and result["advice"] == sentence
    return result


def refused(tmp_path, capsys, rows, *flags):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, rows, *flags)
    assert exit_status.value.code == 2 and not (tmp_path / "boundary.json").exists()
    return capsys.readouterr().err


# METHODS.md 10: logits of on-policy response i against off-policy response j: two won, one lost, one tied
LOGITS = [[1.0, -0.5], [0.0, 2.0]]


def as_wins():
    wins = [[None] * 4 for _ in range(4)]
    for i in range(2):
        for j in range(2):
            wins[i][2 + j] = 1 / (1 + np.exp(-LOGITS[i][j] / 2))
            wins[2 + j][i] = 1 - wins[i][2 + j]
    wins[0][1], wins[1][0] = 0.9, 0.1  # comparisons within a source count for nothing
    wins[2][3], wins[3][2] = 0.9, 0.1
    return prompt_row(0, [None, None], [None, None], wins=wins)


# rewards cannot give these logits, but the same counts: 5 beats 1 and 4; 1 ties with 1 and loses to 4
AS_REWARDS = prompt_row(0, [5.0, 1.0], [1.0, 4.0])


@pytest.mark.parametrize("row", [as_wins(), AS_REWARDS], ids=["wins", "rewards"])
@pytest.mark.parametrize("tie, v_on, v_off", [("off", 2, 2), ("half", 2.5, 1.5), ("skip", 2, 1)])
def test_methods_vector(tmp_path, capsys, row, tie, v_on, v_off):
    result = run(tmp_path, capsys, [row], "--tie", tie)
    assert (result["v_on"], result["v_off"], result["ties"], result["n_prompts"]) == (v_on, v_off, 1, 1)
    assert result["score"] == v_on / (v_on + v_off)
    # V_off > V_on is asked for, and 2 > 2 is not true
    assert (result["stage"], result["use"]) == ("fine-tuning", "on")
    assert result["by"] == ("wins" if "wins" in row else "reward")


def test_the_default_tie_rule_is_algorithm_1s(tmp_path, capsys):
    assert run(tmp_path, capsys, [AS_REWARDS])["tie"] == "off"


def test_more_won_by_off_policy_is_the_injection_stage(tmp_path, capsys):
    result = run(tmp_path, capsys, [prompt_row(0, [1.0, 3.0], [2.0, 4.0])])  # 3 beats 2, three are lost
    assert (result["v_on"], result["v_off"], result["score"]) == (1, 3, 0.25)
    assert (result["stage"], result["use"]) == ("injection", "off")
    assert result["advice"].startswith(
        "Preference injection stage: train on off-policy data next (boundary score 0.25"
    )


def test_every_on_policy_response_meets_every_off_policy_one(tmp_path, capsys):
    # 3 x 1, 2 x 3 and 1 x 2: won 2, 4 and 0 of 3, 6 and 2
    rows = [
        prompt_row(0, [1.0, 2.0, -1.0], [0.0]),
        prompt_row(1, [3.0, 2.0], [1.0, 0.0, 5.0]),
        prompt_row(2, [0.0], [1.0, 2.0]),
    ]
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
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [{**row, "responses": some}])
        for name, some in (("on", row["responses"][:2]), ("off", row["responses"][2:]))
    ]
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
    # prompt 0: sums -10, -30 against -20, -40: 3 of 4 higher; per token -5, -1 against -10, -4: -5 > -10 and
    # -1 beats both: 3 of 4
    first = with_logps(
        prompt_row(0, [1.0, 1.5], [0.0, 0.5]), -10.0, -30.0, -20.0, -40.0, tokens=(2, 30, 2, 10)
    )
    # prompt 1: sum -9 < -8, per token -1 > -4; prompts weigh the same, however many comparisons they hold
    second = with_logps(prompt_row(1, [1.0], [0.0]), -9.0, -8.0, tokens=(9, 2))
    result = run(tmp_path, capsys, [first, second, prompt_row(2, [1.0], [0.0])])
    assert result["distinct"] == {"sum": (3 / 4 + 0) / 2, "mean": (3 / 4 + 1) / 2, "n_prompts": 2}
    assert "the model gives its own response the higher probability in only 38%" in result["advice"]
    assert run(tmp_path, capsys, [prompt_row(2, [1.0], [0.0])])["distinct"] is None


def test_what_cannot_be_compared_is_counted(tmp_path, capsys):
    rows = [
        prompt_row(0, [1.0], [0.0]),
        prompt_row(1, [1.0, 2.0], []),
        prompt_row(2, [], [1.0]),
        prompt_row(3, [None], [1.0]),
        prompt_row(4, [1.0, None], [0.0, 2.0]),
    ]
    result = run(tmp_path, capsys, rows)
    assert (result["v_on"], result["v_off"], result["n_prompts"]) == (2, 1, 2)
    assert result["prompts_with_one_source"] == 2 and result["prompts_without_verdict"] == 1
    assert result["without_verdict"] == 3  # one of p3, two of p4


def test_lengths_stand_beside_the_score(tmp_path, capsys):
    rows = [prompt_row(0, [1.0], [0.0]), prompt_row(1, [1.0], [])]
    rows[0]["responses"][0]["text"], rows[0]["responses"][1]["text"] = "abcd", "ab"
    # p1 is not compared and not measured
    assert run(tmp_path, capsys, rows)["avg_length"] == {"on": 4.0, "off": 2.0}


def test_nothing_to_compare_is_a_sentence(tmp_path, capsys):
    err = refused(tmp_path, capsys, [prompt_row(0, [1.0], []), prompt_row(1, [], [1.0])])
    assert "no on-policy and off-policy response can be compared" in err
    assert '"prompts_with_one_source": 2, "prompts_without_verdict": 0, "without_verdict": 0' in err
    err = refused(tmp_path, capsys, [prompt_row(0, [1.0], [1.0])], "--tie", "skip")  # one comparison, a tie
    assert "can be compared" in err and '"prompts_without_verdict": 0, "without_verdict": 0' in err
    err = refused(tmp_path, capsys, [prompt_row(0, [None], [None])])
    assert "can be compared" in err and '"prompts_without_verdict": 1, "without_verdict": 1' in err


def test_wins_in_some_rows_only(tmp_path, capsys):
    err = refused(tmp_path, capsys, [as_wins(), prompt_row(1, [1.0], [0.0])])
    assert "scored.jsonl: 1 of 2 rows have wins; score all rows with one scorer" in err


def test_wins_are_looked_up_by_index(tmp_path, capsys):
    # off, on, off, on, of which 1 beats 0 and ties with 2, 3 loses to both; all texts of a source have a twin
    wins = [[None, 0.1, 0.5, 0.9], [0.9, None, 0.5, 0.5], [0.5, 0.5, None, 0.7], [0.1, 0.5, 0.3, None]]
    row = prompt_row(0, [None, None], [None, None], wins=wins)
    on, off = row["responses"][:2], row["responses"][2:]
    on[1]["text"], off[1]["text"] = on[0]["text"], off[0]["text"]
    row["responses"] = [off[0], on[0], off[1], on[1]]
    result = run(tmp_path, capsys, [row], "--tie", "half")
    assert (result["v_on"], result["v_off"], result["ties"], result["by"]) == (1.5, 2.5, 1, "wins")


def test_wins_of_two_files_leave_no_verdict_between_them(tmp_path, capsys):
    one = prompt_row(0, [None, None], [None], wins=[[None, 0.5, 0.9], [0.5, None, 0.2], [0.1, 0.8, None]])
    other = prompt_row(0, [], [None, None], wins=[[None, 0.9], [0.1, None]])
    paths = [write_rows(tmp_path / f"{k}.jsonl", [row]) for k, row in enumerate((one, other))]
    for files in (paths, paths[::-1]):
        boundary.main(boundary.parse_args(["--scored", *files, "--out", str(tmp_path / "b.json")]))
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (result["v_on"], result["v_off"], result["without_verdict"]) == (1, 1, 4)


def test_the_order_of_rows_changes_nothing(tmp_path, capsys):
    rng = random.Random(3)
    rows = [
        with_logps(
            prompt_row(k, [rng.gauss(0, 1), rng.gauss(0, 1)], [rng.gauss(0, 1)]),
            *(-rng.random() for _ in range(3)),
        )
        for k in range(30)
    ]
    result = run(tmp_path, capsys, rows)
    rng.shuffle(rows)
    assert run(tmp_path, capsys, rows) == result


def test_models_of_what_was_compared(tmp_path, capsys):
    rows = [
        prompt_row(0, [1.0, 2.0], [0.0, -1.0]),  # 4 of 4
        prompt_row(1, [1.0, 2.0], [0.0, 3.0]),  # 2 of 4
        prompt_row(2, [1.0], [1.0, 2.0, 0.0]),  # 1 of 3: a tie is not won
        prompt_row(3, [0.0], [1.0]),  # 0 of 1
        prompt_row(4, [2.0, 1.0, None], [1.5]),  # 1 of 2
        prompt_row(5, [9.0], []),  # not compared
    ]
    rows[0]["responses"][0]["model"], rows[5]["responses"][0]["model"] = "b", "c"
    rows[0]["responses"][3]["model"] = None
    result = run(tmp_path, capsys, rows)
    assert result["models"] == {"on": ["b", "on"], "off": ["off"]}
    assert (result["n_comparisons"], result["n_prompts"]) == (14, 5)


# ----- by category
def test_by_category_by_hand(tmp_path, capsys):
    # of 200 prompts 100 of "facts", 65 won; 60 of "math", all won; 38 of "poems", a tie each
    rows = [prompt_row(k, [1.0 if k < 65 else -1.0], [0.0], category="facts") for k in range(100)]
    rows += [prompt_row(k, [1.0, 2.0], [0.0], category="math") for k in range(100, 160)]
    rows += [prompt_row(k, [0.0], [0.0], category="poems") for k in range(160, 198)]
    rows += [prompt_row(198, [1.0], [], category="one source"), prompt_row(199, [1.0], [0.0], category=None)]
    random.Random(1).shuffle(rows)
    result = run(tmp_path, capsys, rows)
    groups = result["by_category"]
    assert list(groups) == ["facts", "math", "poems"]
    keys = ("v_on", "v_off", "ties", "score", "stage", "use", "n_prompts", "n_comparisons")
    assert {name: [group[key] for key in keys] for name, group in groups.items()} == {
        "facts": [65, 35, 0, 0.65, "fine-tuning", "on", 100, 100],
        "math": [120, 0, 0, 1.0, "fine-tuning", "on", 60, 120],
        "poems": [0, 38, 38, 0.0, "injection", "off", 38, 38],
    }
    # .65 +- 1.96 sqrt(.65 * .35 / 100), of its own 100 prompts and not of all
    half = 1.96 * np.sqrt(0.65 * 0.35 / 100)
    assert groups["facts"]["ci"] == pytest.approx([0.65 - half, 0.65 + half], abs=0.015)
    assert groups["math"]["ci"] == [1.0, 1.0] and groups["poems"]["ci"] == [0.0, 0.0]
    assert result["v_on"] == 65 + 120 + 1 and result["n_prompts"] == 199
    assert run(tmp_path, capsys, rows, "--tie", "half")["by_category"]["poems"]["v_on"] == 19
    skipped = run(tmp_path, capsys, rows, "--tie", "skip")["by_category"]
    assert list(skipped) == ["facts", "math"]  # nothing else counts


def test_a_category_is_as_if_it_were_alone(tmp_path, capsys):
    rng = random.Random(4)
    rows = []
    for k in range(60):
        rewards = [float(rng.randint(0, 2)) for _ in range(5)]
        rows.append(prompt_row(k, rewards[:2], rewards[2:], category="ab"[rng.random() < 0.3]))
    groups = run(tmp_path, capsys, rows)["by_category"]
    for name in "ab":
        alone = run(tmp_path, capsys, [row for row in rows if row["category"] == name])
        assert groups[name] == {key: alone[key] for key in groups[name]}
        assert alone["by_category"] == {name: groups[name]}


def test_categories_add_nothing_else(tmp_path, capsys):
    rows = [prompt_row(k, [1.0, 0.5 * k], [0.7]) for k in range(9)]
    result = run(tmp_path, capsys, rows)
    assert result["by_category"] is None
    assert run(tmp_path, capsys, [row | {"category": None} for row in rows]) == result
    named = run(tmp_path, capsys, [row | {"category": "math"} for row in rows])
    assert named | {"by_category": None} == result and list(named["by_category"]) == ["math"]


def test_a_category_that_is_no_text(tmp_path, capsys):
    rows = [prompt_row(0, [1.0], [0.0], category="3"), prompt_row(1, [1.0], [0.0], category=3)]
    groups = run(tmp_path, capsys, rows)["by_category"]
    assert {name: group["v_on"] for name, group in groups.items()} == {"3": 2}


# ----- length-matched score
def test_length_matching_by_hand(tmp_path, capsys):
    rows = [
        prompt_row(0, [1.0], [0.0, 2.0]),
        prompt_row(1, [0.0], [1.0, 0.0]),
        prompt_row(2, [1.0], [0.0, None]),
    ]
    # 10 with 8: 2 <= 2, won; 10 with 7: 3 > 2, lost. 5 with 4: 1 <= 1, lost; 5 with 6: 1 <= 1.2, tied.
    # 9 with 90: won; 9 with 9: no verdict
    for row, sizes in zip(rows, [(10, 8, 7), (5, 4, 6), (9, 90, 9)], strict=True):
        for one, letter, size in zip(row["responses"], "abc", sizes, strict=True):
            one["text"] = letter * size
    result = run(tmp_path, capsys, rows)
    assert (result["v_on"], result["v_off"], result["ties"]) == (2, 3, 1)
    matched = result["length_matched"]
    assert (matched["v_on"], matched["v_off"], matched["ties"], matched["n_comparisons"]) == (1, 2, 1, 3)
    assert matched["score"] == pytest.approx(1 / 3)
    assert matched["n_prompts"] == 2 and matched["ci"] == [0.0, 1.0]
    assert run(tmp_path, capsys, rows, "--tie", "half")["length_matched"]["score"] == 1.5 / 3
    assert run(tmp_path, capsys, rows, "--tie", "skip")["length_matched"]["score"] == 1 / 2


def test_reasoning_changes_nothing(tmp_path, capsys):
    """Lengths, the length match and ties are of answers: equal ones tie whatever was thought before."""
    plain = [prompt_row(k, [1.0, 0.5], [0.0, 2.0]) for k in range(6)]
    sizes = [(10, 9, 8, 7), (5, 40, 4, 6), (9, 9, 90, 9), (1, 2, 3, 4), (50, 50, 45, 39), (3, 3, 3, 3)]
    for row, lengths in zip(plain, sizes, strict=True):
        for one, letter, size in zip(row["responses"], "abca", lengths, strict=True):
            one["text"] = letter * size
    rows = [
        row | {"responses": [thinking(one, k) for k, one in enumerate(row["responses"])]} for row in plain
    ]
    result = run(tmp_path, capsys, rows)
    assert result == run(tmp_path, capsys, plain)
    assert result["ties"] == 2 and result["avg_length"] == {"on": 191 / 12, "off": 221 / 12}
    cut = prompt_row(0, [1.0], [0.0])
    cut["responses"][0]["text"] = "<think>\nso"
    assert run(tmp_path, capsys, [cut])["avg_length"] == {"on": 0.0, "off": 7.0}


def test_no_pair_of_similar_length(tmp_path, capsys):
    row = prompt_row(0, [1.0], [0.0])
    row["responses"][0]["text"] = "a much longer answer than the other"
    assert run(tmp_path, capsys, [row])["length_matched"] is None


def test_advice_where_the_longer_text_wins(tmp_path, capsys):
    # on-policy wins six times by a long text and loses three of four at equal length
    rows = [prompt_row(k, [1.0 if k < 7 else -1.0], [0.0]) for k in range(10)]
    for row in rows[:6]:
        row["responses"][0]["text"] *= 3
    result = run(tmp_path, capsys, rows)
    assert (result["score"], result["stage"], result["length_matched"]["score"]) == (0.7, "fine-tuning", 0.25)
    assert result["length_matched"]["stage"] == "injection"
    doubt = "the 4 comparisons of texts of similar length say injection (score 0.250"
    assert f"Take it with care: {doubt}" in result["advice"]
    for row in rows[:6]:
        row["responses"][0]["text"] = row["responses"][0]["text"][:6]  # all match: nothing to warn of
    result = run(tmp_path, capsys, rows)
    assert result["length_matched"]["score"] == 0.7 and "care" not in result["advice"]


# ----- consistency (eqs. 10 and 11)
def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def xnor_share(one, other, on, off):
    """Eq. 10 or 11 of one prompt: the mean over the m x n pairs of I[P_1(y1 > y2)] XNOR I[P_2(y1 > y2)]."""
    agree = 0
    for y1 in on:
        for y2 in off:
            p1, p2 = sigmoid(one[y1] - one[y2]), sigmoid(other[y1] - other[y2])  # eqs. 7 and 8
            first, second = (1 if p1 > 0.5 else 0), (1 if p2 > 0.5 else 0)  # I sends [0, 0.5] to 0
            agree += 1 - (first ^ second)
    return agree / (len(on) * len(off))


# log-probabilities of each prompt's responses, m on-policy ones first, under the ground truth, the policy and
# the off-policy source; the first two have ties, where P is 1/2, and the last finds every off-policy response
# likelier
TOY = [
    {
        "m": 2,
        "truth": [-1.0, -4.0, -1.0, -3.0],
        "policy": [-2.0, -5.0, -5.0, -6.0],
        "off": [-9.0, -8.0, -1.0, -2.0],
    },
    {
        "m": 2,
        "truth": [-2.0, -1.0, -3.0, -4.0],
        "policy": [-9.0, -3.0, -4.0, -4.0],
        "off": [-7.0, -8.0, -6.0, -5.0],
    },
    {
        "m": 1,
        "truth": [-2.0, -1.0, -2.5, -2.0],
        "policy": [-1.0, -1.0, -2.0, -3.0],
        "off": [-9.0, -1.0, -1.0, -1.0],
    },
]


@pytest.mark.parametrize("form", ["wins", "rewards"])
def test_consistency_by_its_definition(tmp_path, capsys, form):
    rows, exact = [], {"on": [], "off": []}
    for number, toy in enumerate(TOY):
        truth, on, off = toy["truth"], range(toy["m"]), range(toy["m"], 4)
        exact["on"].append(xnor_share(truth, toy["policy"], on, off))
        exact["off"].append(xnor_share(truth, toy["off"], on, off))
        if form == "rewards":
            row = prompt_row(number, [truth[i] for i in on], [truth[i] for i in off])
        else:
            row = prompt_row(number, [None for _ in on], [None for _ in off])
            wins = [[sigmoid(truth[i] - truth[j]) for j in range(4)] for i in range(4)]
            row["wins"] = [[None if i == j else wins[i][j] for j in range(4)] for i in range(4)]
        rows.append(with_logps(row, *toy["policy"]))
    exact = {name: sum(values) / 3 for name, values in exact.items()}
    result = run(tmp_path, capsys, rows)["consistency"]
    assert {name: result[name] for name in exact} == pytest.approx(exact, abs=1e-12)
    # by hand; ties of P* are one of prompt 0's four comparisons and one of prompt 2's three
    assert exact["on"] == pytest.approx((2 / 4 + 2 / 4 + 2 / 3) / 3)
    assert exact["off"] == pytest.approx((3 / 4 + 0 + 2 / 3) / 3)
    assert (result["n_prompts"], result["n_comparisons"]) == (3, 11) and result["stage"] == "fine-tuning"


def test_ties_agree_with_the_off_policy_source(tmp_path, capsys):
    # one won, two tied of three, the policy distinct: eq. 10 is 1/3, eq. 11 is 2/3 as written (0 XNOR 0)
    row = with_logps(prompt_row(0, [1.0], [0.0, 1.0, 1.0]), -1.0, -2.0, -2.0, -2.0)
    result = run(tmp_path, capsys, [row])
    assert result["consistency"] == {
        "on": pytest.approx(1 / 3),
        "off": pytest.approx(2 / 3),
        "stage": "injection",
        "n_prompts": 1,
        "n_comparisons": 3,
    }
    # Algorithm 1's "otherwise"
    assert (result["v_on"], result["v_off"], result["stage"]) == (1, 2, "injection")
    result = run(tmp_path, capsys, [row], "--tie", "skip")
    assert result["stage"] == "fine-tuning" and result["consistency"]["stage"] == "injection"
    assert "eqs. 10 and 11 say injection (0.333 and 0.667)" in result["advice"]


def test_consistency_is_of_the_whole_response(tmp_path, capsys):
    # eq. 8 compares log-probabilities, not those per token: -5 > -6 though -5 < -6 / 6
    result = run(tmp_path, capsys, [with_logps(prompt_row(0, [1.0], [0.0]), -5.0, -6.0, tokens=(1, 6))])
    assert result["consistency"]["on"] == 1
    assert result["distinct"] == {"sum": 1.0, "mean": 0.0, "n_prompts": 1}


def random_row(number, rng, shift):
    """Two on- and three off-policy responses of few different rewards; the on-policy ones are likelier."""
    on = [float(rng.randint(0, 3)) for _ in range(2)]
    off = [float(rng.randint(0, 3)) - shift for _ in range(3)]
    logps = [-1 - rng.random() for _ in on] + [-3 - rng.random() for _ in off]
    return with_logps(prompt_row(number, on, off), *logps)


def test_full_distinctness_reduces_to_algorithm_1(tmp_path, capsys):
    # section 5.3: where the policy finds all its own responses likelier, eqs. 10 and 11 are the shares of
    # V_on and V_off
    rng = random.Random(0)
    stages = set()
    for trial in range(20):
        result = run(tmp_path, capsys, [random_row(k, rng, trial % 2) for k in range(7)])
        assert result["distinct"]["sum"] == 1 and result["ties"] > 0
        exact = result["consistency"]
        assert exact["on"] == pytest.approx(result["v_on"] / 42)
        assert exact["off"] == pytest.approx(result["v_off"] / 42)
        assert exact["stage"] == result["stage"] and "exact" not in result["advice"]
        stages.add(result["stage"])
    assert stages == {"injection", "fine-tuning"}
    # equal in thirds, where the means round: V_off > V_on is not so, and neither is eq. 11 > eq. 10
    rows = [
        with_logps(prompt_row(k, [0.5], [1.0 * (j >= won) for j in range(3)]), -1.0, -2.0, -2.0, -2.0)
        for k, won in enumerate((1, 2, 1, 2, 3, 0))
    ]
    result = run(tmp_path, capsys, rows)
    assert result["v_on"] == result["v_off"] == 9
    assert result["stage"] == result["consistency"]["stage"] == "fine-tuning"


def test_advice_where_the_exact_consistency_disagrees(tmp_path, capsys):
    # the policy loses three of four and knows it: eq. 10 is 1, eq. 11 is 3/4
    rows = [
        with_logps(prompt_row(k, [1.0 if k == 0 else -1.0], [0.0]), -1.0 if k == 0 else -9.0, -5.0)
        for k in range(4)
    ]
    result = run(tmp_path, capsys, rows)
    assert (result["stage"], result["consistency"]["stage"]) == ("injection", "fine-tuning")
    assert (result["consistency"]["on"], result["consistency"]["off"]) == (1.0, 0.75)
    assert result["advice"].endswith(
        "Take it with care: eqs. 10 and 11 say fine-tuning (1.000 and 0.750); "
        "the model gives its own response the higher probability in only 25% (F.1: 84 to 97 %)."
    )


def test_log_probabilities_in_part_of_the_responses(tmp_path, capsys):
    # prompt 0: one on-policy response has none, so two of four comparisons count; prompt 1 has none; prompt 2
    # has no verdict beside one that has
    rows = [
        with_logps(prompt_row(0, [1.0, 2.0], [0.0, 3.0]), -1.0, None, -2.0, -2.0),
        prompt_row(1, [1.0], [0.0]),
        with_logps(prompt_row(2, [None, 1.0], [0.0]), -1.0, -3.0, -2.0),
    ]
    result = run(tmp_path, capsys, rows)
    assert (result["n_comparisons"], result["without_logp"], result["without_verdict"]) == (6, 3, 1)
    exact = result["consistency"]
    # 1 beats 0, as likely said; 1 loses to 3, against it; then 1 beats 0 though the less likely one
    assert (exact["on"], exact["off"], exact["n_prompts"], exact["n_comparisons"]) == (0.25, 0.25, 2, 3)
    assert result["distinct"] == {"sum": (1 + 0.5) / 2, "mean": (1 + 0.5) / 2, "n_prompts": 2}
    none = run(tmp_path, capsys, [prompt_row(1, [1.0, 0.0], [0.5])])
    assert none["consistency"] is none["distinct"] is None and none["without_logp"] == 2


# ----- bad input
@pytest.mark.parametrize(
    "logp, tokens, key",
    [
        (float("nan"), 3, ""),
        ("-1.0", 3, "logp"),
        (True, 3, "logp"),
        (-1.0, 0, "logp_tokens"),
        (-1.0, 2.5, "logp_tokens"),
    ],
    ids=str,
)
def test_log_probabilities_that_are_none(tmp_path, capsys, logp, tokens, key):
    rows = [prompt_row(0, [1.0], [0.0]), prompt_row(1, [1.0], [0.0])]
    rows[1]["responses"][1].update(logp=logp, logp_tokens=tokens)
    assert key in refused(tmp_path, capsys, rows).split("scored.jsonl:2: ")[1]


def test_a_response_without_a_reward(tmp_path, capsys):
    rows = [prompt_row(0, [1.0], [0.0]), prompt_row(1, [1.0], [0.0])]
    del rows[1]["responses"][0]["reward"]
    err = refused(tmp_path, capsys, rows)
    assert "reward" in err.split("scored.jsonl:2: ")[1] and err.count("\n") == 1


def test_a_log_probability_of_an_unknown_number_of_tokens_is_none(tmp_path, capsys):
    rows = [with_logps(prompt_row(k, [1.0], [0.0]), -1.0, -2.0) for k in range(3)]
    rows[1]["responses"][1]["logp_tokens"] = None
    del rows[2]["responses"][0]["logp_tokens"]
    result = run(tmp_path, capsys, rows)
    assert (result["n_comparisons"], result["without_logp"]) == (3, 2)
    assert result["distinct"] == {"sum": 1.0, "mean": 1.0, "n_prompts": 1}
    assert result["consistency"]["n_comparisons"] == 1


@pytest.mark.parametrize(
    "value, key",
    [
        (1.5, "wins"),
        (-0.1, "wins"),
        (float("nan"), ""),
        ("0.5", "wins"),
    ],
    ids=str,
)
def test_wins_that_are_no_probabilities(tmp_path, capsys, value, key):
    row = as_wins()
    row["wins"][0][2] = value
    assert key in refused(tmp_path, capsys, [row]).split("scored.jsonl:1: ")[1]


def test_a_row_without_responses_beside_wins(tmp_path, capsys):
    # a pairwise scorer leaves an empty matrix there: it has wins, and is a prompt that cannot be compared
    result = run(tmp_path, capsys, [as_wins(), prompt_row(1, [], [], wins=[])])
    assert (result["n_prompts"], result["prompts_with_one_source"], result["by"]) == (1, 1, "wins")
