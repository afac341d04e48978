"""
recipes/s3_pairs.py: the pair sets of S3's tables, from small files and hand-made numbers.

Covers  tiers (Table 1) by hand and against exact fractions; ranks, gaps and -inv sets (Table 3); Algorithm 1
        with either rule (Table 4), on tiers too; labelers that disagree (B.1); the statistics (Table 5) and
        rules of responses with reasoning; what
        is dropped and why; swap files, rewards by wins and labelers that are refused; flags; the script as a
        user starts it; blindness to the order of rows.
Run     python -m pytest tests/test_s3_pairs.py
"""

import json
import random
import statistics
from fractions import Fraction

import pytest
from conftest import read_rows, run_script, thinking, write_rows
from test_pair_sets import both, drawn, ids, off, on, response, row, runner, texts

import build_pairs
from recipes import s3_pairs

TABLE_1 = "best/worst", "best/low", "best/medium", "best/high", "low/worst", "medium/worst", "high/worst"


@pytest.fixture
def build(tmp_path, capsys):
    return runner(tmp_path, capsys, s3_pairs)


@pytest.fixture
def plain(tmp_path, capsys):
    return runner(tmp_path, capsys, build_pairs)


# ----- tiers (section 5.1, Table 1)
def test_tiers_round_half_up_and_have_one_prompt_set(build):
    equal_texts = [response(text, 5.0 - k) for k, text in enumerate(["a", "b", "c", " b", "d"])]
    rows = [
        row("six", *off(6.0, 5.0, 4.0, 3.0, 2.0, 1.0)),
        row("eight", *off(8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)),
        row("four", *off(4.0, 3.0, 2.0, 1.0), *on(5.0, 0.0)),  # on-policy responses are in no tier
        row("equal", *off(5.0, 4.0, 4.0, 2.0, 1.0)),  # high = medium: left out of best/worst too
        row("texts", *equal_texts),
        row("no tier", *off(6.0, 5.0, 5.0, 4.0, 2.0, 1.0)),  # equals of which one alone is a tier
    ]
    expected = {  # of six responses the ranks 0, 1, 3, 4, 5, of eight 0, 2, 4, 5, 7
        "six:off": [(0, 5), (0, 4), (0, 3), (0, 1), (4, 5), (3, 5), (1, 5)],
        "eight:off": [(0, 7), (0, 5), (0, 4), (0, 2), (5, 7), (4, 7), (2, 7)],
        "no tier:off": [(0, 5), (0, 4), (0, 3), (0, 1), (4, 5), (3, 5), (1, 5)],
    }
    for k, tiers in enumerate(TABLE_1):
        pairs, printed = build(rows, "--tiers", tiers)
        sides = {name: (f"r{ranks[k][0]}", f"r{ranks[k][1]}") for name, ranks in expected.items()}
        assert texts(pairs) == sides
        assert printed["dropped"] == {"off: equal tiers": 2, "off: fewer than 5 usable responses": 1}
        assert (printed["rows"], printed["pairs"], printed["off"]) == (6, 3, 3)


@pytest.mark.parametrize("tiers", TABLE_1)
def test_tiers_against_a_second_computation(build, tiers):
    draw = random.Random(0)
    rows = [row(f"k{k}", *off(*[draw.gauss(0, 3) for _ in range(k)]), *on(99.0)) for k in range(5, 24)]
    pairs, _ = build(rows, "--tiers", tiers)
    names = ["best", "high", "medium", "low", "worst"]
    for k, pair in enumerate(pairs, 5):
        # the number of responses that are better, rounded to the nearest rank, a half upwards
        ranks = [int(Fraction(names.index(tier) * (k - 1), 4) + Fraction(1, 2)) for tier in tiers.split("/")]
        rewards = [one["reward"] for one in rows[k - 5]["responses"][:-1]]
        sides = pair["chosen_reward"], pair["rejected_reward"]
        assert [sum(other > reward for other in rewards) for reward in sides] == ranks
    assert len(pairs) == 19


def test_responses_that_cannot_be_used_are_in_no_tier(build):
    bad = response("r", 9.0, finish="length"), response(" ", 8.0), response("s", None)
    rows = [row("p", *bad, *off(5.0, 4.0, 3.0, 2.0, 1.0)), row("q", *bad, *off(4.0, 3.0, 2.0, 1.0))]
    rows += [row("cut", *bad[:1], *off(1.0)), row("one", *off(1.0)), row("none", *on(1.0, 0.0))]
    pairs, printed = build(rows, "--tiers", "best/worst")
    assert texts(pairs) == {"p:off": ("r0", "r4")}
    reasons = "fewer than 5 usable responses", "truncated", "fewer than two responses", "no response"
    assert printed["dropped"] == {f"off: {reason}": 1 for reason in reasons}
    pairs, _ = build(rows, "--tiers", "best/worst", "--truncated", "keep")
    assert texts(pairs) == {"p:off": ("r", "r4"), "q:off": ("r", "r3")}


# ----- ranks and gaps (Table 3)
def ranked():
    return [row("a", *off(4.0, 3.0, 1.0, 0.0)), row("b", *off(-1.0, 5.0, 4.5, 2.0), *on(9.0))]


RANKED = {
    "LG-HQ": ((1, 3), {"a:off": ("r0", "r2"), "b:off": ("r1", "r3")}),
    "LG-LQ": ((2, 4), {"a:off": ("r1", "r3"), "b:off": ("r2", "r0")}),
    "SG-HQ": ((1, 2), {"a:off": ("r0", "r1"), "b:off": ("r1", "r2")}),
    "SG-LQ": ((3, 4), {"a:off": ("r2", "r3"), "b:off": ("r3", "r0")}),
}


def test_ranks_and_their_inverses(build, tmp_path):
    for name, (ranks, expected) in RANKED.items():
        pairs, _ = build(ranked(), "--ranks", *ranks, out=f"{name}.jsonl")
        assert texts(pairs) == expected
    # LG-HQ-inv has the chosen ones of LG-HQ and the rejected ones of SG-HQ, whose chosen ones are the same
    inverse, printed = build(ranked(), "--ranks", 1, 3, "--swap-rejected", tmp_path / "SG-HQ.jsonl")
    assert texts(inverse) == RANKED["SG-HQ"][1] and printed["dropped"] == {}
    assert inverse == read_rows(tmp_path / "SG-HQ.jsonl")
    inverse, _ = build(ranked(), "--ranks", 1, 2, "--swap-rejected", tmp_path / "SG-LQ.jsonl")
    assert texts(inverse) == {"a:off": ("r0", "r3"), "b:off": ("r1", "r0")}


def test_equal_rewards_and_texts_of_ranks(build):
    same = response("a", 2.0), response(" a\n", 1.0), response("b", 0.0)
    rows = [row("tie", *off(2.0, 2.0, 0.0)), row("good", *off(2.0, 1.0, 0.0)), row("few", *off(1.0, 0.0))]
    rows.append(row("same", *same))
    pairs, printed = build(rows, "--ranks", 1, 2)
    assert ids(pairs) == {"good", "few"} and printed["dropped"] == {"off: identical": 1, "off: tie": 1}
    pairs, printed = build(rows, "--ranks", 2, 3)
    # the first of equals comes first
    assert texts(pairs)["tie:off"] == ("r1", "r2") and ids(pairs) == {"tie", "good", "same"}
    assert printed["dropped"] == {"off: fewer than 3 usable responses": 1}


@pytest.mark.parametrize(
    "gap, kept",
    [((1.5,), "cde"), ((1, 2), "bcd"), ((2, 2), "d"), ((0, 1.25), "ab")],
)
def test_a_gap_keeps_its_bounds(build, gap, kept):
    rows = [row(name, *off(9.0, 9.0 - width)) for name, width in zip("abcde", (0.5, 1.0, 1.5, 2.0, 8.0))]
    pairs, printed = build(rows, "--ranks", 1, 2, "--gap", *gap)
    assert ids(pairs) == set(kept) and printed["dropped"] == {"off: outside of the gap": 5 - len(kept)}


def test_a_gap_with_tiers_looks_at_the_tiers_that_were_chosen(build):
    rows = [row("a", *off(5.0, 4.0, 3.0, 2.0, 1.0)), row("b", *off(9.0, 4.0, 3.0, 2.0, 1.0))]
    pairs, printed = build(rows, "--tiers", "best/high", "--gap", 2, 6)
    assert ids(pairs) == {"b"} and printed["dropped"] == {"off: outside of the gap": 1}
    pairs, _ = build(rows, "--tiers", "high/worst", "--gap", 2, 6)
    assert ids(pairs) == {"a", "b"}


def test_a_total_takes_the_first_of_the_draw(build, plain):
    rows = both(20)
    rows[3]["responses"] = rows[3]["responses"][:2]
    order = drawn([line["id"] for line in rows if line["id"] != "p3"])
    pairs, _ = build(rows, "--ranks", 1, 2, "--total", 6)
    assert [pair["id"] for pair in pairs] == sorted(order[:6], key=lambda prompt_id: int(prompt_id[1:]))
    assert plain(rows, "--on-ratio", 0, "--total", 6)[0] == pairs  # build_pairs.py draws the same prompts
    err = build(rows, "--ranks", 1, 2, "--total", 20, out="b.jsonl", expect=2)
    assert "scored.jsonl: expected 20 pairs, found 19" in err
    err = build(rows, "--ranks", 2, 3, out="b.jsonl", expect=2)
    dropped = {"off: fewer than 3 usable responses": 19, "off: no response": 1}
    assert f"no pair is left; dropped: {dropped}" in err


def test_a_pair_is_a_pair_of_build_pairs(build, plain):
    common = {"tokenizer": "t", "logp": -3.5, "token_ids": [1, 2]}
    responses = response("good", 2.0, **common), response("bad", 1.0, **common, scores={"rm": 1.0})
    rows = [row("p", *responses, category="math", answer="7", cosine=[[1, 0.5], [0.5, 1]], labeler="rm:A")]
    pairs, printed = build(rows, "--ranks", 1, 2)
    expected, _ = plain(rows, "--on-ratio", 0)
    assert (
        pairs == expected and printed["off"] == 1 and (pairs[0]["cosine"], pairs[0]["answer"]) == (0.5, "7")
    )


# ----- Algorithm 1 (Table 4)
def algorithm_rows():
    """s_w = 1, s_l = 0; s' = (.2, 1.5), (.2, .9), (1, .5), and the text of y_w with another reward."""
    old = response("y_w", 1.0), response("y_l", 0.0)
    rows = [
        row("better", *old, *on(0.2, 1.5)),
        row("worse", *old, *on(0.2, 0.9)),
        row("equal", *old, *on(1.0, 0.5)),
    ]
    return [*rows, row("same", *old, response(" y_w", 1.2, "on"), *on(0.5))]


def test_algorithm_1(build):
    pairs, printed = build(algorithm_rows(), "--ranks", 1, 2, "--replace", 1)
    # line 13: a higher reward; line 15: all others, ties too
    assert texts(pairs) == {
        "better:cross": ("s1", "y_w"),
        "worse:cross": ("y_w", "s1"),
        "equal:cross": ("y_w", "s0"),
    }
    better = pairs[0]
    assert (better["chosen_reward"], better["rejected_reward"]) == (1.5, 1.0)
    assert (better["chosen_model"], better["rejected_model"]) == ("model-on", "model-off")
    assert (printed["replaced"], printed["chosen_replaced"], printed["cross"]) == (4, 2, 3)
    assert printed["dropped"] == {"changed: identical": 1}


@pytest.mark.parametrize("inverted", ["drop", "keep"])
def test_the_rejected_alone_are_replaced(build, inverted):
    flags = "--ranks", 1, 2, "--replace", 1, "--replace-rule", "rejected", "--inverted", inverted
    pairs, printed = build(algorithm_rows(), *flags)
    expected = {"worse:cross": ("y_w", "s1"), "equal:cross": ("y_w", "s0")}
    dropped = {"changed: identical": 1}
    if inverted == "keep":
        expected["better:cross"] = "y_w", "s1"
        assert (pairs[0]["chosen_reward"], pairs[0]["rejected_reward"]) == (1.0, 1.5)
    else:
        dropped["changed: inverted"] = 1
    assert texts(pairs) == expected and printed["dropped"] == dropped
    assert (printed["replaced"], printed["chosen_replaced"]) == (4, 0)


def test_the_best_of_the_samples_that_can_be_used(build):
    cut, empty = response("cut", 9.0, "on", finish="length"), response("", 8.0, "on")
    rows = [row("p", *off(1.0, 0.0), cut, empty, response("null", None, "on"), *on(2.0, 5.0, 5.0, 3.0))]
    pairs, _ = build(rows, "--ranks", 1, 2, "--replace", 1)
    assert texts(pairs) == {"p:cross": ("s1", "r0")}  # the first of equals
    pairs, _ = build(rows, "--ranks", 1, 2, "--replace", 1, "--truncated", "keep")
    assert texts(pairs) == {"p:cross": ("cut", "r0")}


def test_a_cosine_is_that_of_the_new_sides(build):
    cosine = [[round(0.1 * i + 0.01 * j, 2) for j in range(4)] for i in range(4)]
    rows = [row("p", *off(1.0, 0.0), *on(0.2, 1.5), cosine=cosine)]
    assert build(rows, "--ranks", 1, 2)[0][0]["cosine"] == 0.01  # responses 0 and 1
    assert build(rows, "--ranks", 1, 2, "--replace", 1)[0][0]["cosine"] == 0.3  # responses 3 and 0
    flags = "--ranks", 1, 2, "--replace", 1, "--replace-rule", "rejected", "--inverted", "keep"
    assert build(rows, *flags)[0][0]["cosine"] == 0.03


def test_replacement_is_exact_and_nested_and_passes_over_prompts_without_samples(build):
    rows = both(100)
    order = drawn(ids(rows), "replace")
    for share, count in ((0.1, 10), (0.2, 20), (0.29, 29), (0.295, 29)):  # 0.29 * 100 is 28.999999999999996
        pairs, printed = build(rows, "--ranks", 1, 2, "--replace", share)
        assert ids(pairs, "cross") == set(order[:count]) and len(pairs) == 100
        assert printed["replaced"] == printed["chosen_replaced"] == count and printed["off"] == 100 - count
        sides = {"cross": ("s0", "r0"), "off": ("r0", "r1")}
        assert texts(pairs) == {pair["pair_id"]: sides[pair["source"]] for pair in pairs}
    without = set(order[:3])
    for line in rows:
        if line["id"] in without:
            line["responses"][1]["finish"] = "length"
            del line["responses"][0]
    pairs, printed = build(rows, "--ranks", 1, 2, "--replace", 0.2)
    assert ids(pairs, "cross") == set(order[3:23]) and len(pairs) == 100


def test_a_share_is_of_the_pairs_that_a_total_leaves(build):
    rows = both(30)
    kept = drawn(ids(rows))[:10]
    pairs, _ = build(rows, "--ranks", 1, 2, "--replace", 0.5, "--total", 10)
    assert ids(pairs) == set(kept) and ids(pairs, "cross") == set(drawn(kept, "replace")[:5])


def test_table_4_on_the_tiers_of_table_1(build, tmp_path):
    """The on-policy responses are no part of the tiers; they come from a file of their own."""
    rows = [row(name, *off(5.0, 4.0, 3.0, 2.0, 1.0)) for name in "abcd"]
    samples = [row(name, *on(9.0, 2.5)) for name in "abcdef"]
    order = drawn("abcd", "replace")
    for tiers, sides in (("best/low", ("r0", "r3")), ("medium/worst", ("r2", "r4"))):
        for share, count in ((0.49, 1), (0.5, 2)):
            pairs, printed = build(rows, "--tiers", tiers, "--replace", share, files=[samples])
            expected = {f"{name}:off": sides for name in order[count:]}
            expected |= {f"{name}:cross": ("s0", sides[0]) for name in order[:count]}
            assert texts(pairs) == expected and printed["dropped"] == {"off: no response": 2}
    # medium/worst with the samples' better one at 2.5: the rejected one, as it is not above medium's 3
    samples = [row(name, *on(2.5, 0.5)) for name in "abcd"]
    pairs, _ = build(rows, "--tiers", "medium/worst", "--replace", 1, files=[samples])
    assert texts(pairs) == {f"{name}:cross": ("r2", "s0") for name in "abcd"}


def test_rewards_by_wins_must_be_of_one_run(build):
    """A reward that is a mean over the other responses of a file does not meet one of another file."""

    def wins(count):
        return [[None if i == j else 0.5 for j in range(count)] for i in range(count)]

    rows = [row("p", *off(0.9, 0.1), wins=wins(2))]
    samples = [row("p", *on(0.8, 0.2), wins=wins(2))]
    flags = "--ranks", 1, 2, "--replace", 1
    err = build(rows, *flags, files=[samples], expect=2)
    assert "p: its wins are of several runs of a scorer; score all in one run" in err
    known, unknown = wins(4), wins(4)
    pairs, _ = build([row("p", *off(0.9, 0.1), *on(0.8, 0.2), wins=known)], *flags)
    assert texts(pairs) == {"p:cross": ("r0", "s0")}
    known[0][2] = known[2][0] = None  # one verdict is missing: both still met r1 and s1
    assert build([row("p", *off(0.9, 0.1), *on(0.8, 0.2), wins=known)], *flags)[0] == pairs
    for i in range(2):
        for j in range(2, 4):
            unknown[i][j] = unknown[j][i] = None
    err = build([row("p", *off(0.9, 0.1), *on(0.8, 0.2), wins=unknown)], *flags, expect=2)
    assert "p: its wins are of several runs of a scorer" in err


# ----- swapped sides
def test_a_swap_takes_the_whole_side(build, plain, tmp_path):
    good = response("good", 1.0, token_ids=[1], tokenizer="t", logp=-1.0)
    rows = [row("p", good, response("bad", 0.0, token_ids=[2, 2], tokenizer="t", logp=-2.0))]
    common = {"token_ids": [8, 9], "tokenizer": "u", "logp": -4.0, "finish": "length"}
    samples = [row("p", *on(0.9), response("y", 0.5, "on", **common))]
    plain(samples, "--on-ratio", 1, "--truncated", "keep", out="other.jsonl")
    (pair,), printed = build(rows, "--ranks", 1, 2, "--swap-rejected", tmp_path / "other.jsonl")
    assert texts([pair]) == {"p:cross": ("good", "y")} and printed["cross"] == 1
    keys = "reward", "model", "finish", "token_ids", "tokenizer", "logp"
    assert [pair[f"rejected_{key}"] for key in keys] == [0.5, "model-on", "length", [8, 9], "u", -4.0]
    assert [pair[f"chosen_{key}"] for key in keys] == [1.0, "model-off", "stop", [1], "t", -1.0]
    assert pair["cosine"] is None


@pytest.mark.parametrize("inverted", [None, "drop", "keep"])
def test_a_swap_that_inverts_or_joins_equals_and_ids_of_one_side(build, plain, tmp_path, inverted):
    rows = [
        row(name, response("good", 1.0), response("bad", 0.0))
        for name in ("fine", "more", "same", "tie", "here")
    ]
    others = {
        "fine": ("y", 0.5),
        "more": ("y", 2.5),
        "same": (" good", 0.2),
        "tie": ("y", 1.0),
        "there": ("y", 1.0),
        "there too": ("y", 1.0),
    }
    other = [row(name, response("x", 3.0), response(*rejected)) for name, rejected in others.items()]
    plain(other, "--on-ratio", 0, out="other.jsonl")
    flags = ["--inverted", inverted] if inverted else []
    pairs, printed = build(rows, "--ranks", 1, 2, "--swap-rejected", tmp_path / "other.jsonl", *flags)
    dropped = {"changed: identical": 1, "swap: not in the file": 1, "swap: only in the file": 2}
    expected = {"fine:off": ("good", "y")}
    if inverted == "keep":
        expected["more:off"] = expected["tie:off"] = "good", "y"
        assert (pairs[1]["chosen_reward"], pairs[1]["rejected_reward"]) == (1.0, 2.5)
    else:
        dropped["changed: inverted"] = 2
    assert texts(pairs) == expected and printed["dropped"] == dropped


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"id": "b", "prompt": ranked()[1]["prompt"]}, "duplicate id b in this file"),
        ({"prompt": [{"role": "user", "content": "q"}]}, "the id a has another prompt in --scored"),
        ({"prompt": "another"}, "prompt"),
        ({"rejected_reward": None}, "rejected_reward"),
        ({"rejected_reward": float("nan")}, ""),
        ({"rejected": "text"}, "rejected"),
        ({"source": "cross"}, "source"),
        ({"labeler": "judge"}, "a reward of the labeler judge, in --scored None"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_a_swap_file_that_is_none(build, tmp_path, change, sentence):
    pairs, _ = build(ranked(), "--ranks", 1, 2, out="other.jsonl")
    path = write_rows(tmp_path / "other.jsonl", [{**pairs[0], **change}, pairs[1]])
    flags = "--ranks", 1, 3, "--swap-rejected", path
    line = 2 if "id" in change else 1
    assert sentence in build(ranked(), *flags, expect=2).split(f"other.jsonl:{line}: ")[1]
    del pairs[0]["rejected_reward"]
    write_rows(path, pairs)
    assert "rejected_reward" in build(ranked(), *flags, expect=2).split("other.jsonl:1: ")[1]


@pytest.mark.parametrize("change", [{"rejected": []}, {"rejected_logp": "x"}], ids=str)
def test_a_swap_file_of_another_shape(build, tmp_path, change):
    pairs, _ = build(ranked(), "--ranks", 1, 2, out="other.jsonl")
    path = write_rows(tmp_path / "other.jsonl", [{**pairs[0], **change}])
    err = build(ranked(), "--ranks", 1, 3, "--swap-rejected", path, expect=2)
    assert "other.jsonl:1: " in err


def test_files_that_are_missing_or_would_be_replaced(build, tmp_path):
    flags = "--ranks", 1, 2, "--swap-rejected"
    assert "absent.jsonl: expected JSON lines, found no file" in build(
        ranked(), *flags, "absent.jsonl", expect=2
    )
    build(ranked(), "--ranks", 1, 3, out="other.jsonl")
    err = build(ranked(), *flags, tmp_path / "other.jsonl", out="other.jsonl", expect=2)
    assert "other.jsonl: " in err and "this would overwrite an input file or its record" in err


# ----- other rewards, labelers (B.1)
def scored_twice():
    """The reward model and a judge agree on p0 and p3 and disagree on p1; p2 the judge has not seen, p4 is
    equal to it."""
    judged = (0.9, 0.1), (0.2, 0.8), (None, 0.5), (0.7, 0.6), (0.5, 0.5)
    rows = [row(f"p{k}", *off(1.0, 0.0), labeler="rm:A") for k in range(5)]
    for line, scores in zip(rows, judged):
        for one, score in zip(line["responses"], scores):
            one["scores"] = {"rm": one["reward"], **({} if score is None else {"judge": score})}
    return rows


def test_prompts_on_which_two_labelers_disagree(build):
    pairs, printed = build(scored_twice(), "--ranks", 1, 2, "--disagree", "judge")
    assert texts(pairs) == {"p1:off": ("r0", "r1")} and pairs[0]["labeler"] == "rm:A"
    assert printed["dropped"] == {"off: judge agrees": 3, "off: no judge": 1}
    # the same prompt under the other labeler
    pairs, printed = build(scored_twice(), "--ranks", 1, 2, "--reward", "judge", "--disagree", "rm")
    assert texts(pairs) == {"p1:off": ("r1", "r0")} and pairs[0]["labeler"] == "judge"
    assert (pairs[0]["chosen_reward"], pairs[0]["rejected_reward"]) == (0.8, 0.2)
    assert printed["dropped"] == {"off: rm agrees": 2, "off: without reward": 1, "off: tie": 1}
    err = build(scored_twice(), "--ranks", 1, 2, "--reward", "jugde", out="b.jsonl", expect=2)
    assert "--reward jugde: no response has this score; there are judge, rm\n" in err
    err = build(scored_twice(), "--ranks", 1, 2, "--disagree", "jugde", out="b.jsonl", expect=2)
    assert "no pair is left; dropped: {'off: no jugde': 5}" in err


def test_rewards_of_two_files(build):
    rows = [row("p", *off(1.0, 0.0), labeler="rm:A")]
    for samples, flags in (
        ([row("p", *on(5.0), labeler="rm:B")], []),
        ([row("p", *on(5.0))], ["--replace", 1]),
    ):
        err = build(rows, "--ranks", 1, 2, *flags, files=[samples], expect=2)
        assert "scored.jsonl" in err and "scored1.jsonl: rewards of different labelers: " in err
    rows = [row("p", response("a", 1.0), {"text": "b", "source": "off"})]
    err = build(rows, "--ranks", 1, 2, expect=2)
    assert 'scored.jsonl: p: a response has no "reward"; score.py writes it' in err


# ----- statistics (Table 5)
def test_the_record_has_the_statistics_of_the_new_pairs(build, tmp_path):
    draw = random.Random(1)
    rows = [row(f"p{k}", *off(draw.gauss(0, 1), draw.gauss(0, 1)), *on(draw.gauss(0, 1))) for k in range(40)]
    flags = "--ranks", 1, 2, "--replace", 0.5, "--replace-rule", "rejected", "--inverted", "keep"
    pairs, printed = build(rows, *flags)
    record = json.loads((tmp_path / "pairs.meta.json").read_text())
    assert len(pairs) == 40 and printed == {"out": str(tmp_path / "pairs.jsonl"), **record["counts"]}
    assert record["args"]["replace_rule"] == "rejected"
    gaps = [pair["chosen_reward"] - pair["rejected_reward"] for pair in pairs]
    assert min(gaps) < 0 and any(pair["source"] == "off" for pair in pairs)
    quartiles = statistics.quantiles(gaps, method="inclusive")
    expected = [40, statistics.fmean(gaps), statistics.pstdev(gaps), min(gaps), *quartiles, max(gaps)]
    assert list(record["stats"]["gap"].values()) == pytest.approx(expected)
    # the chosen ones are those of the set without replacement, as the note of Table 5 has it
    before, _ = build(rows, "--ranks", 1, 2)
    assert [pair["chosen"] for pair in before] == [pair["chosen"] for pair in pairs]
    assert (
        json.loads((tmp_path / "pairs.meta.json").read_text())["stats"]["chosen reward"]
        == (record["stats"]["chosen reward"])
    )


# ----- responses with reasoning
def test_rules_look_at_answers(build):
    """Tiers with equal answers, an answer that is missing, and a rejected answer that is the chosen one."""
    rewards = 5.0, 4.0, 3.0, 2.0, 1.0
    good, equal, empty = ([thinking(one, k) for k, one in enumerate(off(*rewards))] for _ in range(3))
    equal[1] = thinking(response("r4", 4.0), 0)  # as the last one says, after other thoughts
    empty[0] = thinking(response("", 5.0), 1)
    rows = [row("good", *good), row("equal", *equal), row("empty", *empty)]
    pairs, printed = build(rows, "--tiers", "best/low")
    assert [(pair["id"], pair["chosen_reward"], pair["rejected_reward"]) for pair in pairs] == [
        ("good", 5, 2)
    ]
    assert pairs[0]["chosen"][0]["content"] == good[0]["text"] != "r0"
    assert printed["dropped"] == {"off: equal tiers": 1, "off: fewer than 5 usable responses": 1}
    assert printed["with_reasoning"] == {"on": 0, "off": 2}
    assert build(rows[1:2], "--ranks", 2, 5, expect=2).endswith("dropped: {'off: identical': 1}\n")


@pytest.mark.parametrize("form", range(3))
def test_a_new_side_with_reasoning(build, plain, tmp_path, capsys, form):
    """Responses are counted by their own source; answers are compared and measured."""
    samples = thinking(response("sss", 9.0, "on"), form), thinking(response("r0", 8.0, "on"), form)
    rows = [row(f"p{k}", *off(2.0, 1.0), samples[k == 0]) for k in range(2)]
    pairs, printed = build(rows, "--ranks", 1, 2, "--replace", 1)
    assert printed["dropped"] == {"changed: identical": 1}  # y' says what the chosen response says
    assert texts(pairs) == {"p1:cross": (samples[0]["text"], "r0")}
    assert printed["with_reasoning"] == {"on": 1, "off": 0} and len(pairs[0]) == 20
    stats = json.loads((tmp_path / "pairs.meta.json").read_text())["stats"]
    assert [stats[f"{side} characters"]["mean"] for side in ("chosen", "rejected")] == [3, 2]

    samples = thinking(response("y", 3.0, "on"), form), thinking(response("zzzz", 0.5, "on"), form)
    plain([row("p1", *samples)], "--on-ratio", 1, out="other.jsonl")
    pairs, printed = build(rows[1:], "--ranks", 1, 2, "--swap-rejected", tmp_path / "other.jsonl")
    assert texts(pairs) == {"p1:cross": ("r0", samples[1]["text"])}
    stats = json.loads((tmp_path / "pairs.meta.json").read_text())["stats"]
    if form < 2:  # a pair has no "final": what shows reasoning is </think>
        assert printed["with_reasoning"] == {"on": 1, "off": 0}
        assert stats["rejected characters"]["mean"] == 4
    else:
        assert stats["rejected characters"]["mean"] == len(samples[1]["text"])


def test_a_pair_of_two_forms_is_said(tmp_path):
    write_rows(tmp_path / "scored.jsonl", [row("p", *off(2.0, 1.0), thinking(response("s", 9.0, "on"), 0))])
    flags = "--scored", "scored.jsonl", "--ranks", 1, 2, "--replace", 1, "--out", "pairs.jsonl"
    _, err = run_script("recipes/s3_pairs.py", *flags, cwd=tmp_path)
    expected = "warning: 100% of on-policy, 0% of off-policy responses have reasoning; "
    assert err == f"s3_pairs.py: {expected}use both sources with it, or both without\n"


# ----- flags, as a user sees it
@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "one of the arguments --tiers --ranks is required"),
        (["--tiers", "best/low", "--ranks", "1", "2"], "--ranks: not allowed with argument --tiers"),
        (["--tiers", "low/best"], "--tiers: the chosen tier must be above the rejected one"),
        (["--tiers", "low/low"], "--tiers: the chosen tier must be above the rejected one"),
        (["--tiers", "best"], "--tiers must be two of best, high, medium, low, worst"),
        (["--tiers", "best/lowest"], "--tiers must be two of"),
        (["--tiers", "best/low/worst"], "--tiers must be two of"),
        (["--ranks", "2", "2"], "--ranks must be A B with 1 <= A < B, found [2, 2]"),
        (["--ranks", "2", "1"], "--ranks must be A B"),
        (["--ranks", "0", "2"], "--ranks must be A B"),
        (["--ranks", "1"], "argument --ranks: expected 2 arguments"),
        (
            ["--ranks", "1", "2", "--gap", "2", "1"],
            "--gap must be LOW, or LOW HIGH with LOW <= HIGH, found [2.0, 1.0]",
        ),
        (["--ranks", "1", "2", "--gap", "nan", "1"], "--gap must be LOW, or LOW HIGH"),
        (["--ranks", "1", "2", "--gap", "1", "inf"], "--gap must be LOW, or LOW HIGH"),  # not JSON
        (["--ranks", "1", "2", "--replace", "0"], "--replace must lie in (0, 1], found 0.0"),
        (["--ranks", "1", "2", "--replace", "1.5"], "--replace must lie in (0, 1]"),
        (["--ranks", "1", "2", "--replace", "nan"], "--replace must lie in (0, 1]"),
        (["--ranks", "1", "2", "--replace-rule", "rejected"], "--replace-rule belongs to --replace"),
        (["--ranks", "1", "2", "--inverted", "drop"], "--inverted belongs to --replace and --swap-rejected"),
        (
            ["--ranks", "1", "2", "--inverted", "flip", "--replace", "1"],
            "argument --inverted: invalid choice",
        ),
        (["--ranks", "1", "2", "--total", "0"], "--total must be at least 1, found 0"),
        (["--ranks", "1", "2", "--replace", "1", "--swap-rejected", "x"], "change the same side: give one"),
        (["--ranks", "1", "2", "--on-ratio", "0"], "unrecognized arguments: --on-ratio 0"),
        (["--ranks", "1", "2", "--swap", "x"], "unrecognized arguments: --swap x"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_flag_that_would_be_ignored_or_is_wrong(build, flags, sentence):
    assert sentence in build(both(4), *flags, expect=2)


def test_replacement_needs_samples(build):
    err = build([row("p", *off(1.0, 0.0))], "--ranks", 1, 2, "--replace", 1, expect=2)
    assert "--replace 1.0 needs 1 prompts with a usable on-policy one, found 0" in err
    rows = [*both(1), *[row(name, *off(1.0, 0.0)) for name in "abcdefghi"]]
    build(rows, "--ranks", 1, 2, "--replace", 0.1)
    err = build(rows, "--ranks", 1, 2, "--replace", 0.2, out="b.jsonl", expect=2)
    assert "--replace 0.2 needs 2 prompts with a usable on-policy one, found 1" in err


def test_as_a_user_starts_it(tmp_path):
    write_rows(tmp_path / "scored.jsonl", ranked())
    flags = "--scored", "scored.jsonl", "--ranks", 1, 3, "--out", "sets/lg_hq.jsonl"
    printed, err = run_script("recipes/s3_pairs.py", *flags, cwd=tmp_path)
    assert (
        printed
        == {
            "out": "sets/lg_hq.jsonl",
            "rows": 2,
            "pairs": 2,
            "dropped": {},
            "off": 2,
            "with_reasoning": {"on": 0, "off": 0},
        }
        and err == ""
    )
    assert texts(read_rows(tmp_path / "sets" / "lg_hq.jsonl")) == RANKED["LG-HQ"][1]
    _, err = run_script("recipes/s3_pairs.py", *flags, "--gap", 9, 9, cwd=tmp_path, expect=2)
    assert err == "s3_pairs.py: scored.jsonl: no pair is left; dropped: {'off: outside of the gap': 2}\n"


@pytest.mark.parametrize("flags", [["--total", 7], ["--replace", 0.3], ["--replace", 0.5, "--total", 8]])
def test_every_draw_is_blind_to_the_order_of_rows_and_bound_to_the_seed(build, flags):
    rows = [row(f"p{k}", *off(1.0, 0.0, 0.5), *on(1.5, 0.5)) for k in range(20)]
    flags = ["--ranks", 1, 3, *flags]
    pairs, _ = build(rows, *flags)
    backwards, _ = build(rows[::-1], *flags)
    other, _ = build(rows, *flags, "--seed", 1)
    assert backwards == pairs[::-1] and len(other) == len(pairs)
    assert texts(other).keys() != texts(pairs).keys()
