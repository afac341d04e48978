"""
build_pairs.py: what is chosen, rejected and dropped, and why, and how on- and off-policy pairs are mixed.

Covers  best-worst on hand-made cases, mix (METHODS.md 10: exact counts, nested, blind to row order), and whole runs on
        hand-made rows: the pair's keys, drop counts by reason, --total, --truncated, --stats, files of one source only,
        bad rewards.
Run     python -m pytest tests/test_build_pairs.py
"""

import json

import build_pairs
import pytest
from build_pairs import Choice, Response, mix, select
from conftest import read_rows, write_rows


def some(*responses):
    """(reward, text, cut) triples as the table that selection reads."""
    return [Response("on", reward, text and hash(text), cut) for reward, text, cut in responses]


def best_worst(responses, truncated):
    """(chosen, rejected) of the default rule, or the reason why there is no pair."""
    args = build_pairs.parse_args(["--scored", "in.jsonl", "--out", "out.jsonl", "--truncated", truncated])
    pairs, reasons = select(responses, "on", args, "p0")
    assert len(pairs) + len(reasons) == 1
    return (pairs[0].chosen, pairs[0].rejected) if pairs else reasons[0]


def sources(ids, ratio, total, seed):
    """{id: source} of mix() for prompts with one pair of either source."""
    on, off = [Choice(prompt_id, 0, 1) for prompt_id in ids], [Choice(prompt_id, 2, 3) for prompt_id in ids]
    pairs = mix(on, off, ratio, total, "exclusive", seed)
    assert len(pairs) == len({pair.id for pair in pairs}) == total
    return {pair.id: "on" if pair.chosen == 0 else "off" for pair in pairs}


def response(text, reward, source="on", **more):
    return {"text": text, "source": source, "model": f"model-{source}", "finish": "stop", "reward": reward, **more}


def prompt_row(number, *responses, **more):
    return {"id": f"p{number}", "prompt": [{"role": "user", "content": f"question {number}"}],
            "responses": list(responses), **more}


def plain_rows(count):
    """Rows with one on-policy pair and one off-policy pair each."""
    return [prompt_row(k, response(f"on good {k}", 2.0), response(f"on bad {k}", 1.0),
                       response(f"off bad {k}", -1.0, "off"), response(f"off good {k}", 0.5, "off"))
            for k in range(count)]


def run(tmp_path, capsys, rows, *flags, out="pairs.jsonl", name="scored.jsonl"):
    """(pairs, the last line of standard output as JSON, standard output)."""
    path = write_rows(tmp_path / name, rows)
    build_pairs.main(build_pairs.parse_args(["--scored", path, "--out", str(tmp_path / out), *flags]))
    printed = capsys.readouterr().out
    return read_rows(tmp_path / out), json.loads(printed.splitlines()[-1]), printed


def refused(tmp_path, capsys, rows, *flags):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, rows, *flags)
    assert exit_status.value.code == 2 and not (tmp_path / "pairs.jsonl").exists()
    return capsys.readouterr().err


# ---- selection

def test_best_and_worst():
    four = some((0.5, "a", False), (2.0, "b", False), (-1.0, "c", False), (1.0, "d", False))
    assert best_worst(four, "drop") == (1, 2)


def test_equal_rewards_take_the_lowest_index():
    winners = some((0.0, "a", False), (2.0, "b", False), (2.0, "c", False), (0.0, "d", False))
    assert best_worst(winners, "drop") == (1, 0)  # two winners: 1 before 2; two losers: 0 before 3


def test_a_tie_is_dropped_and_never_pairs_a_response_with_itself():
    assert best_worst(some((1.0, "a", False), (1.0, "b", False), (1.0, "c", False)), "drop") == "tie"


def test_identical_texts():
    assert best_worst(some((1.0, "a", False), (1.0, "a", False)), "drop") == "identical"
    # a reward that differs on equal texts (another scorer's noise) still teaches nothing
    assert best_worst(some((1.0, "a", False), (2.0, "a", False)), "drop") == "identical"


def test_cut_responses():
    responses = some((3.0, "a", True), (2.0, "b", False), (1.0, "c", False), (0.0, "d", True))
    assert best_worst(responses, "drop") == (1, 2)
    assert best_worst(responses, "keep") == (0, 3)
    assert best_worst(some((3.0, "a", True), (2.0, "b", False)), "drop") == "truncated"


def test_unusable_responses():
    assert best_worst(some((3.0, "", False), (2.0, "b", False), (1.0, "c", False)), "drop") == (1, 2)
    assert best_worst(some((3.0, "", False), (2.0, "b", False)), "drop") == "empty"
    assert best_worst(some((None, "a", False), (2.0, "b", False), (1.0, "c", False)), "drop") == (1, 2)
    assert best_worst(some((None, "a", False), (2.0, "b", False)), "drop") == "without reward"
    assert best_worst(some((2.0, "b", False)), "drop") == "fewer than two responses"


def test_negative_and_zero_rewards_are_rewards():
    assert best_worst(some((0.0, "a", False), (-3.0, "b", False)), "drop") == (0, 1)


# ---- mixing

def test_mixing_counts_are_exact_and_nested():
    ids = [f"p{k}" for k in range(10)]
    before = set()
    for ratio, expected in ((0.0, 0), (0.3, 3), (0.5, 5), (1.0, 10)):
        source_of = sources(ids, ratio, 10, seed=0)
        on = {prompt_id for prompt_id, source in source_of.items() if source == "on"}
        assert set(source_of) == set(ids) and set(source_of.values()) <= {"on", "off"}
        assert len(on) == expected and before <= on
        before = on
    assert list(sources(ids[:5], 0.5, 5, seed=0).values()).count("on") == 3  # floor(2.5 + .5)
    # .29 * 100 is 28.999999999999996
    assert list(sources([f"p{k}" for k in range(100)], 0.29, 100, 0).values()).count("on") == 29
    # in floating point 14.499999999999998
    assert list(sources([f"p{k}" for k in range(100)], 0.145, 100, 0).values()).count("on") == 15


def test_mixing_ignores_the_order_of_ids_and_obeys_the_seed():
    ids = [f"p{k}" for k in range(50)]
    assert sources(ids, 0.5, 20, seed=3) == sources(ids[::-1], 0.5, 20, seed=3)
    draws = [sources(ids, 0.5, 50, seed) for seed in range(3)]
    assert draws[0] != draws[1] != draws[2] != draws[0]
    # a smaller total takes some of the prompts of a larger one
    assert set(sources(ids, 0.5, 20, seed=3)) <= set(sources(ids, 0.5, 30, seed=3))


# ---- whole runs

def test_a_pair_row(tmp_path, capsys):
    good = response("on good", 2.5, token_ids=[1, 2], tokenizer="abc", logp=-3.5, scores={"rm": 2.5})
    bad = response("on bad", -1.5, token_ids=[3], tokenizer="abc", logp=-4.5, finish=None)
    row = prompt_row(0, bad, good, category="coding", answer="7", extra={"kept": [1]}, wins=[[None, 0], [1, None]])
    (pair,), printed, _ = run(tmp_path, capsys, [row], "--on-ratio", "1")
    assert pair == {
        "id": "p0", "pair_id": "p0:on", "prompt": [{"role": "user", "content": "question 0"}], "category": "coding",
        "answer": "7",
        "extra": {"kept": [1]}, "source": "on", "chosen": [{"role": "assistant", "content": "on good"}],
        "rejected": [{"role": "assistant", "content": "on bad"}], "chosen_reward": 2.5, "rejected_reward": -1.5,
        "chosen_model": "model-on", "rejected_model": "model-on", "chosen_finish": "stop", "rejected_finish": None,
        "chosen_token_ids": [1, 2], "rejected_token_ids": [3], "chosen_tokenizer": "abc", "rejected_tokenizer": "abc",
        "chosen_logp": -3.5, "rejected_logp": -4.5, "labeler": None, "cosine": None}
    assert {key: printed[key] for key in ("rows", "responses", "pairs", "on", "off", "dropped")} == {
        "rows": 1, "responses": 2, "pairs": 1, "on": 1, "off": 0, "dropped": {}}


def test_pairs_hold_one_source_and_every_prompt_once(tmp_path, capsys):
    pairs, printed, _ = run(tmp_path, capsys, plain_rows(10), "--on-ratio", "0.3")
    assert [pair["id"] for pair in pairs] == [f"p{k}" for k in range(10)]  # in the order of the input
    for pair in pairs:
        assert pair["chosen"][0]["content"] == f"{pair['source']} good {pair['id'][1:]}"
        assert pair["rejected"][0]["content"] == f"{pair['source']} bad {pair['id'][1:]}"
        assert pair["chosen_model"] == pair["rejected_model"] == f"model-{pair['source']}"
    assert (printed["on"], printed["off"], printed["prompts_with_pairs"]) == (3, 7, 10)


def test_row_order_and_seed(tmp_path, capsys):
    rows = plain_rows(12)
    forward, _, _ = run(tmp_path, capsys, rows, out="a.jsonl", name="a_in.jsonl")
    backward, _, _ = run(tmp_path, capsys, rows[::-1], out="b.jsonl", name="b_in.jsonl")
    other, _, _ = run(tmp_path, capsys, rows, "--seed", "1", out="c.jsonl", name="a_in.jsonl")
    assert backward == forward[::-1]
    assert [pair["source"] for pair in other] != [pair["source"] for pair in forward]
    assert sum(pair["source"] == "on" for pair in other) == sum(pair["source"] == "on" for pair in forward) == 6


def test_pure_sets_are_built_on_the_same_prompts(tmp_path, capsys):
    rows = plain_rows(8)
    rows[2]["responses"][0]["reward"] = 1.0  # p2 has no on-policy pair (a tie), p5 no off-policy pair (identical)
    rows[5]["responses"][2]["text"] = rows[5]["responses"][3]["text"]
    off, printed, _ = run(tmp_path, capsys, rows, "--on-ratio", "0", "--total", "4", out="off.jsonl")
    on, _, _ = run(tmp_path, capsys, rows, "--on-ratio", "1", "--total", "4", out="on.jsonl")
    assert [pair["id"] for pair in off] == [pair["id"] for pair in on] and len(off) == 4
    assert not {"p2", "p5"} & {pair["id"] for pair in on}
    assert printed["prompts_with_pairs"] == 6 and printed["dropped"] == {"off: identical": 1, "on: tie": 1}


def test_what_is_dropped_is_counted_by_reason(tmp_path, capsys):
    off = [response("x", 1.0, "off"), response("y", 0.0, "off")]
    rows = [prompt_row(0, response("a", 1.0), response("b", 0.0), *off),
            prompt_row(1, response("a", 1.0, finish="length"), response("b", 0.0), *off),
            prompt_row(2, response(" \n", 1.0), response("b", 0.0), *off),
            prompt_row(3, response("a", None), response("b", 0.0), *off),
            prompt_row(4, response("a", 1.0), *off),
            prompt_row(5, response("a", 1.0), response(" a\n", 0.0), *off),
            prompt_row(6, response("a", 1.0), response("b", 1.0), *off)]
    pairs, printed, _ = run(tmp_path, capsys, rows, "--on-ratio", "1")
    assert [pair["id"] for pair in pairs] == ["p0"]
    assert printed["dropped"] == {"on: truncated": 1, "on: empty": 1, "on: without reward": 1,
                                  "on: fewer than two responses": 1,
                                  "on: identical": 1, "on: tie": 1}
    kept, _, _ = run(tmp_path, capsys, rows, "--on-ratio", "1", "--truncated", "keep", out="kept.jsonl")
    assert [(pair["id"], pair["chosen_finish"]) for pair in kept] == [("p0", "stop"), ("p1", "length")]


def test_total(tmp_path, capsys):
    pairs, printed, _ = run(tmp_path, capsys, plain_rows(10), "--total", "5", "--on-ratio", "0.5")
    assert len(pairs) == 5 and (printed["on"], printed["off"]) == (3, 2)
    # what cannot be had is refused, and the file of before stays as it was, --overwrite or not
    before = (tmp_path / "pairs.jsonl").read_bytes()
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, plain_rows(3), "--total", "4", "--overwrite")
    err = capsys.readouterr().err
    assert exit_status.value.code == 2 and (tmp_path / "pairs.jsonl").read_bytes() == before
    assert "4 pairs are asked for and 3 can be had, with an on-ratio of 0.5, 3 on-policy and 3 other pairs" in err


@pytest.mark.parametrize("ratio", ["-0.1", "1.01", "nan"])
def test_a_ratio_outside_0_to_1(tmp_path, capsys, ratio):
    assert "--on-ratio must lie in [0, 1]" in refused(tmp_path, capsys, plain_rows(3), "--on-ratio", ratio)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "1.0"])
def test_a_reward_that_is_no_number(tmp_path, capsys, reward):
    rows = plain_rows(3)
    rows[1]["responses"][2]["reward"] = reward
    err = refused(tmp_path, capsys, rows)
    assert "scored.jsonl:2: expected every response to have a finite \"reward\" or null" in err


def test_rows_without_rewards(tmp_path, capsys):
    rows = plain_rows(2)
    del rows[0]["responses"][1]["reward"]
    assert "scored.jsonl:1: expected every response to have a finite \"reward\" or null" in refused(
        tmp_path, capsys, rows)
    rows = [prompt_row(0, response("a", None), response("b", None))]
    assert "no response has a reward" in refused(tmp_path, capsys, rows, "--on-ratio", "1")


def test_files_of_one_source(tmp_path, capsys):
    only_on = [prompt_row(k, response(f"good {k}", 1.0), response(f"bad {k}", 0.0)) for k in range(3)]
    pairs, _, _ = run(tmp_path, capsys, only_on, "--on-ratio", "1")
    assert [pair["source"] for pair in pairs] == ["on"] * 3
    (tmp_path / "pairs.jsonl").unlink()
    assert "--on-ratio 0.5 needs off-policy responses, and there are none" in refused(tmp_path, capsys, only_on)


def test_two_files_are_merged_by_id(tmp_path, capsys):
    on = [prompt_row(k, response(f"on good {k}", 1.0), response(f"on bad {k}", 0.0)) for k in range(4)]
    off = [prompt_row(k, response(f"off bad {k}", 0.0, "off"), response(f"off good {k}", 1.0, "off"))
           for k in (3, 2, 1, 0)]
    paths = [write_rows(tmp_path / "on.jsonl", on), write_rows(tmp_path / "off.jsonl", off)]
    build_pairs.main(build_pairs.parse_args(["--scored", *paths, "--out", str(tmp_path / "pairs.jsonl")]))
    pairs = read_rows(tmp_path / "pairs.jsonl")
    assert [pair["id"] for pair in pairs] == ["p0", "p1", "p2", "p3"]
    assert all(pair["chosen"][0]["content"] == f"{pair['source']} good {pair['id'][1:]}" for pair in pairs)
    assert sorted(pair["source"] for pair in pairs) == ["off", "off", "on", "on"]


def test_stats_by_hand(tmp_path, capsys):
    rows = [prompt_row(0, response("aaaa", 1.0), response("b", 0.0)),
            prompt_row(1, response("aa", 2.0), response("bbbb", -2.0)),
            prompt_row(2, response("aaaaaa", 6.0), response("bb", 5.0))]
    _, _, printed = run(tmp_path, capsys, rows, "--on-ratio", "1", "--stats")
    lines = {line[:28].strip(): line[28:].split() for line in printed.splitlines()[:-1]}
    assert lines[""] == ["n", "mean", "std", "min", "25%", "median", "75%", "max"]
    # chosen rewards 1, 2, 6: mean 3, population variance (4 + 1 + 9) / 3
    assert lines["on chosen reward"] == ["3", "3.00", "2.16", "1.00", "1.50", "2.00", "4.00", "6.00"]
    assert lines["on rejected reward"] == ["3", "1.00", "2.94", "-2.00", "-1.00", "0.00", "2.50", "5.00"]
    assert lines["all margin"] == ["3", "2.00", "1.41", "1.00", "1.00", "1.00", "2.50", "4.00"]
    assert lines["on chosen characters"][1] == "4.00" and lines["on rejected characters"][1] == "2.33"
    assert lines["on chosen is longer"] == ["66.7%"]


def test_the_same_command_again_writes_the_same_file_and_another_is_refused(tmp_path, capsys):
    rows = plain_rows(6)
    run(tmp_path, capsys, rows)
    first = (tmp_path / "pairs.jsonl").read_bytes()
    run(tmp_path, capsys, rows, "--stats")
    assert (tmp_path / "pairs.jsonl").read_bytes() == first
    with pytest.raises(SystemExit):
        run(tmp_path, capsys, rows, "--seed", "1")
    assert "seed was 0 and is 1" in capsys.readouterr().err and (tmp_path / "pairs.jsonl").read_bytes() == first
    run(tmp_path, capsys, rows, "--seed", "1", "--overwrite")
    assert (tmp_path / "pairs.jsonl").read_bytes() != first
