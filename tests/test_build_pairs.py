"""
build_pairs.py: what is chosen, rejected and dropped, and why, and how on- and off-policy pairs are mixed.

Covers  best-worst on hand-made cases; mixing: exact counts, nested, blind to the order of rows; shares of
        categories by two calls; whole runs on hand-made rows: the pair's keys, matrices by index, --reward,
        drop counts by reason, --total, --truncated, files of one source, the statistics (S3 Table 5, S1
        Table 3, S2 eq. 12), reasoning apart from answers and warned of where sources differ in it, prompts'
        token ids, the sentences of what cannot be had, a full disk.
Run     python -m pytest tests/test_build_pairs.py
"""

import gzip
import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import REPO, read_rows, thinking, write_rows

import build_pairs
from build_pairs import mix, select


def response(text, reward, source="on", **more):
    return {
        "text": text,
        "source": source,
        "model": f"model-{source}",
        "finish": "stop",
        "reward": reward,
        **more,
    }


def prompt_row(number, *responses, **more):
    prompt = [{"role": "user", "content": f"question {number}"}]
    return {"id": f"p{number}", "prompt": prompt, "responses": list(responses), **more}


def plain_row(number, **more):
    """A row with one on-policy pair and one off-policy pair."""
    on = response(f"on good {number}", 2.0), response(f"on bad {number}", 1.0)
    off = response(f"off bad {number}", -1.0, "off"), response(f"off good {number}", 0.5, "off")
    return prompt_row(number, *on, *off, **more)


def plain_rows(count):
    return [plain_row(k) for k in range(count)]


def parse(*flags):
    return build_pairs.parse_args(["--scored", "in.jsonl", "--out", "out.jsonl", *flags])


def best_worst(*responses, truncated="drop"):
    """Indices (chosen, rejected) of the default rule, or the reason why there is no pair; a response is
    (reward, text) or (reward, text, finish)."""
    dropped, row = Counter(), prompt_row(0)
    for k, (reward, text, *finish) in enumerate(responses):
        row["responses"].append(response(text, reward, model=k, finish=finish[0] if finish else "stop"))
    pair = select(row, "on", parse("--truncated", truncated), dropped)
    assert (pair is None) == (sum(dropped.values()) == 1)
    return (
        (pair["chosen_model"], pair["rejected_model"]) if pair else next(iter(dropped)).removeprefix("on: ")
    )


def sources(ids, ratio, total, seed):
    """{id: source} of mix() for prompts that have a pair of either source."""
    candidates = {prompt_id: {source: {"source": source} for source in ("on", "off")} for prompt_id in ids}
    mixed = mix(candidates, ratio, total, seed)
    assert len(mixed) == total
    return {prompt_id: pair["source"] for prompt_id, pair in mixed.items()}


def run(tmp_path, capsys, rows, *flags, out="pairs.jsonl", name="scored.jsonl"):
    """(pairs, the last line of standard output as JSON, the record)."""
    path = write_rows(tmp_path / name, rows)
    flags = ["--scored", path, "--out", tmp_path / out, *flags]
    build_pairs.main(build_pairs.parse_args(list(map(str, flags))))
    last = capsys.readouterr().out.splitlines()[-1]
    record = json.loads((tmp_path / out).with_suffix(".meta.json").read_text())
    return read_rows(tmp_path / out), json.loads(last), record


def refused(tmp_path, capsys, rows, *flags):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, rows, *flags)
    assert exit_status.value.code == 2 and not (tmp_path / "pairs.jsonl").exists()
    return capsys.readouterr().err


def on_ids(pairs):
    return {pair["id"] for pair in pairs if pair["source"] == "on"}


# ----- selection
def test_best_and_worst():
    assert best_worst((0.5, "a"), (2.0, "b"), (-1.0, "c"), (1.0, "d")) == (1, 2)


def test_equal_rewards_take_the_lowest_index():
    # two winners: 1 before 2; two losers: 0 before 3
    assert best_worst((0.0, "a"), (2.0, "b"), (2.0, "c"), (0.0, "d")) == (1, 0)


def test_a_tie_is_dropped_and_never_pairs_a_response_with_itself():
    assert best_worst((1.0, "a"), (1.0, "b"), (1.0, "c")) == "tie"


def test_identical_texts():
    assert best_worst((1.0, "a"), (1.0, "a")) == "identical"
    # a reward that differs on equal texts (another scorer's noise) still teaches nothing
    assert best_worst((1.0, "a"), (2.0, "a")) == "identical"


def test_cut_responses():
    responses = (3.0, "a", "length"), (2.0, "b"), (1.0, "c"), (0.0, "d", "length")
    assert best_worst(*responses) == (1, 2)
    assert best_worst(*responses, truncated="keep") == (0, 3)
    assert best_worst((3.0, "a", "length"), (2.0, "b")) == "truncated"
    assert best_worst((3.0, "a", None), (2.0, "b")) == (0, 1)  # how it ended is not known: not cut


def test_unusable_responses():
    assert best_worst((3.0, ""), (2.0, "b"), (1.0, "c")) == (1, 2)
    assert best_worst((3.0, ""), (2.0, "b")) == "empty"
    assert best_worst((None, "a"), (2.0, "b"), (1.0, "c")) == (1, 2)
    assert best_worst((None, "a"), (2.0, "b")) == "without reward"
    assert best_worst((2.0, "b")) == "fewer than two responses"
    assert best_worst() == "no response"


def test_negative_and_zero_rewards_are_rewards():
    assert best_worst((0.0, "a"), (-3.0, "b")) == (0, 1)


# ----- mixing
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


# ----- another share in a category: two calls, whose pairs follow one another in one file
def test_the_share_of_a_category_is_exact_within_it(tmp_path, capsys):
    rows = [plain_row(k, category=["math", "poems", "coding", None][k % 4]) for k in range(42)]
    math = [row for row in rows if row["category"] == "math"]
    others = [row for row in rows if row["category"] != "math"]
    before = set()
    for share in (0, 0.25, 0.5, 0.9, 1):
        pairs, _, _ = run(tmp_path, capsys, math, "--on-ratio", share)
        more, _, _ = run(tmp_path, capsys, others, "--on-ratio", 0.3)
        assert sorted(pair["id"] for pair in pairs + more) == sorted(row["id"] for row in rows)
        assert on_ids(pairs) == set(drawn(math)[: int(share * 11 + 0.5)]) >= before
        assert on_ids(more) == set(drawn(others)[:9])  # of 31, .3 * 31 = 9.3
        before = on_ids(pairs)


def drawn(rows, seed=0):
    """The ids in the order of the draw: by the first 8 bytes of sha256("seed|mix|id")."""
    return sorted(
        [row["id"] for row in rows],
        key=lambda prompt_id: hashlib.sha256(f"{seed}|mix|{prompt_id}".encode()).digest()[:8],
    )


def test_equal_draws_of_two_ratios_pick_pairs_by_category(tmp_path, capsys):
    """Shares of 0 and 1: the pairs of two runs over the same prompts, chosen by their category."""
    rows = [plain_row(k, category=["math", "poems"][k % 2]) for k in range(10)]
    on, _, _ = run(tmp_path, capsys, rows, "--on-ratio", 1, "--total", 7)
    off, _, _ = run(tmp_path, capsys, rows, "--on-ratio", 0, "--total", 7)
    pairs = [pair for pair in on if pair["category"] == "math"]
    pairs += [pair for pair in off if pair["category"] == "poems"]
    assert {pair["id"] for pair in pairs} == set(drawn(rows)[:7]) and len(pairs) == 7


# ----- whole runs
def test_a_pair_row(tmp_path, capsys):
    good = response("on good", 2.5, token_ids=[1, 2], tokenizer="abc", logp=-3.5, scores={"rm": 2.5})
    bad = response("on bad", -1.5, token_ids=[3], tokenizer="abc", logp=-4.5, finish=None)
    row = prompt_row(0, bad, good, category="coding", answer="7", extra={"kept": [1]})
    row["wins"] = [[None, 0], [1, None]]
    (pair,), printed, record = run(tmp_path, capsys, [row], "--on-ratio", "1")
    assert pair == {
        "id": "p0",
        "pair_id": "p0:on",
        "prompt": [{"role": "user", "content": "question 0"}],
        "category": "coding",
        "answer": "7",
        "extra": {"kept": [1]},
        "source": "on",
        "chosen": [{"role": "assistant", "content": "on good"}],
        "rejected": [{"role": "assistant", "content": "on bad"}],
        "chosen_reward": 2.5,
        "rejected_reward": -1.5,
        "chosen_model": "model-on",
        "rejected_model": "model-on",
        "chosen_finish": "stop",
        "rejected_finish": None,
        "chosen_token_ids": [1, 2],
        "rejected_token_ids": [3],
        "chosen_tokenizer": "abc",
        "rejected_tokenizer": "abc",
        "chosen_logp": -3.5,
        "rejected_logp": -4.5,
        "labeler": None,
        "cosine": None,
    }
    counts = {
        "rows": 1,
        "responses": 2,
        "prompts_with_pairs": 1,
        "dropped": {},
        "pairs": 1,
        "on": 1,
        "off": 0,
        "with_reasoning": {"on": 0, "off": 0},
    }
    assert printed == {"out": str(tmp_path / "pairs.jsonl"), **counts} and record["counts"] == counts


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
    assert len(on_ids(other)) == len(on_ids(forward)) == 6


def test_pure_sets_are_built_on_the_same_prompts(tmp_path, capsys):
    rows = plain_rows(8)
    # p2 has no on-policy pair (a tie), p5 no off-policy pair (identical)
    rows[2]["responses"][0]["reward"] = 1.0
    rows[5]["responses"][2]["text"] = rows[5]["responses"][3]["text"]
    off, printed, _ = run(tmp_path, capsys, rows, "--on-ratio", "0", "--total", "4", out="off.jsonl")
    on, _, _ = run(tmp_path, capsys, rows, "--on-ratio", "1", "--total", "4", out="on.jsonl")
    assert [pair["id"] for pair in off] == [pair["id"] for pair in on] and len(off) == 4
    assert not {"p2", "p5"} & {pair["id"] for pair in on}
    assert printed["prompts_with_pairs"] == 6 and printed["dropped"] == {"off: identical": 1, "on: tie": 1}


def test_what_is_dropped_is_counted_by_reason(tmp_path, capsys):
    off = [response("x", 1.0, "off"), response("y", 0.0, "off")]
    rows = [
        prompt_row(0, response("a", 1.0), response("b", 0.0), *off),
        prompt_row(1, response("a", 1.0, finish="length"), response("b", 0.0), *off),
        prompt_row(2, response(" \n", 1.0), response("b", 0.0), *off),
        prompt_row(3, response("a", None), response("b", 0.0), *off),
        prompt_row(4, response("a", 1.0), *off),
        prompt_row(5, response("a", 1.0), response(" a\n", 0.0), *off),
        prompt_row(6, response("a", 1.0), response("b", 1.0), *off),
        prompt_row(7, *off),
    ]
    pairs, printed, record = run(tmp_path, capsys, rows, "--on-ratio", "1")
    assert [pair["id"] for pair in pairs] == ["p0"]
    reasons = (
        "truncated",
        "empty",
        "without reward",
        "fewer than two responses",
        "identical",
        "tie",
        "no response",
    )
    assert printed["dropped"] == {f"on: {reason}": 1 for reason in reasons} == record["counts"]["dropped"]
    kept, _, _ = run(tmp_path, capsys, rows, "--on-ratio", "1", "--truncated", "keep", out="kept.jsonl")
    assert [(pair["id"], pair["chosen_finish"]) for pair in kept] == [("p0", "stop"), ("p1", "length")]


def test_where_all_were_cut_the_flag_is_named(tmp_path, capsys):
    cut = {"finish": "length"}
    rows = [prompt_row(k, response("a", 1.0, **cut), response("b", 0.0, **cut)) for k in range(2)]
    err = refused(tmp_path, capsys, rows, "--on-ratio", "1")
    assert "expected some pairs, found 0: " in err and '"dropped": {"on: truncated": 2}' in err
    assert err.endswith("}; --truncated keep uses responses that were cut off\n") and err.count("\n") == 1
    for one in rows[0]["responses"] + rows[1]["responses"]:
        one["text"] = "same"
        one["finish"] = "stop"
    assert "--truncated" not in refused(tmp_path, capsys, rows, "--on-ratio", "1")


def test_matrices_are_looked_up_by_index(tmp_path, capsys):
    # responses 0 and 3 are equal in all that they have; the lowest is 0, the first of them
    twin = response("twin", 0.0)
    cosine = [[round(0.1 * i + 0.01 * j, 2) for j in range(4)] for i in range(4)]
    row = prompt_row(0, dict(twin), response("best", 2.0), response("fair", 1.0), dict(twin), cosine=cosine)
    (pair,), _, _ = run(tmp_path, capsys, [row], "--on-ratio", "1")
    assert pair["rejected"][0]["content"] == "twin" and pair["cosine"] == 0.1
    row["responses"][0]["finish"] = "length"  # now it is the last one
    (pair,), _, _ = run(tmp_path, capsys, [row], "--on-ratio", "1")
    assert pair["rejected"][0]["content"] == "twin" and pair["cosine"] == 0.13
    assert not {"wins", "responses"} & pair.keys()


def test_matrices_of_two_files(tmp_path, capsys):
    """The second file's responses come after the first one's; between files nothing is compared."""
    cosine = [[1, 0.25], [0.5, 1]]
    on = [prompt_row(0, response("a", 1.0), response("b", 0.0), cosine=cosine)]
    off = [
        prompt_row(0, response("c", 0.0, "off"), response("d", 2.0, "off"), cosine=[[1, 0.75], [0.125, 1]])
    ]
    more = [prompt_row(0, response("e", 3.0))]
    paths = [write_rows(tmp_path / f"{k}.jsonl", rows) for k, rows in enumerate((on, off, more))]
    for files, ratio, sides, expected in (
        (paths[:2], "0", ("d", "c"), 0.125),
        (paths[:2], "1", ("a", "b"), 0.25),
        (paths[1::-1], "1", ("a", "b"), 0.25),
        (paths, "1", ("e", "b"), None),
    ):
        flags = ["--scored", *files, "--out", str(tmp_path / "pairs.jsonl"), "--on-ratio", ratio]
        build_pairs.main(build_pairs.parse_args(flags))
        (pair,) = read_rows(tmp_path / "pairs.jsonl")
        assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == sides
        assert pair["cosine"] == expected


def test_total(tmp_path, capsys):
    pairs, printed, _ = run(tmp_path, capsys, plain_rows(10), "--total", "5", "--on-ratio", "0.5")
    assert len(pairs) == 5 and (printed["on"], printed["off"]) == (3, 2)
    # what cannot be had is refused, and the file of before stays as it was
    before = {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*")}
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, plain_rows(3), "--total", "4")
    err = capsys.readouterr().err
    assert exit_status.value.code == 2 and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*")} == before and len(before) == 2
    assert "scored.jsonl: expected 4 pairs, found 3: " in err and '"prompts_with_pairs": 3' in err
    (tmp_path / "pairs.jsonl").unlink()
    assert "--total must be at least 1" in refused(tmp_path, capsys, plain_rows(3), "--total", "0")


@pytest.mark.parametrize("ratio", ["-0.1", "1.01", "nan"])
def test_a_ratio_outside_0_to_1(tmp_path, capsys, ratio):
    assert "--on-ratio must lie in [0, 1]" in refused(tmp_path, capsys, plain_rows(3), "--on-ratio", ratio)


def test_rows_without_rewards(tmp_path, capsys):
    rows = plain_rows(2)
    del rows[0]["responses"][1]["reward"]
    err = refused(tmp_path, capsys, rows)
    assert 'scored.jsonl: p0: a response has no "reward"; score.py writes it' in err
    # the data set's own pair needs none
    for row in rows:
        row["responses"] = [{**one, "source": "off"} for one in row["responses"]]
    pairs, _, _ = run(tmp_path, capsys, rows, "--select", "given", "--on-ratio", "0")
    assert [pair["chosen"][0]["content"] for pair in pairs] == ["on good 0", "on good 1"]
    (tmp_path / "pairs.jsonl").unlink()
    rows = [prompt_row(0, response("a", None), response("b", None))]
    err = refused(tmp_path, capsys, rows, "--on-ratio", "1")
    assert "expected some pairs, found 0: " in err and '"on: without reward": 1' in err


def test_pairs_after_the_first_of_a_prompt_are_counted(tmp_path, capsys):
    off = [{"text": text, "source": "off", "reward": k} for k, text in enumerate(("a", "b", "c", "d", "e"))]
    rows = [{"id": f"p{k}", "prompt": f"q{k}", "responses": off[: k + 2]} for k in range(4)]
    pairs, printed, _ = run(tmp_path, capsys, rows, "--select", "given", "--on-ratio", "0")
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        ("a", "b")
    ] * 4
    assert printed["dropped"] == {"off: another pair of its prompt": 0 + 0 + 1 + 1}
    _, printed, _ = run(tmp_path, capsys, rows[:1], "--select", "given", "--on-ratio", "0")
    assert printed["dropped"] == {}


def test_files_of_one_source(tmp_path, capsys):
    only_on = [prompt_row(k, response(f"good {k}", 1.0), response(f"bad {k}", 0.0)) for k in range(3)]
    pairs, _, _ = run(tmp_path, capsys, only_on, "--on-ratio", "1")
    assert [pair["source"] for pair in pairs] == ["on"] * 3
    (tmp_path / "pairs.jsonl").unlink()
    for ratios, sentence in (
        ([], "--on-ratio 0.5 needs off-policy responses"),
        (["--on-ratio", "0"], "--on-ratio 0.0 needs off-policy responses"),
    ):
        err = refused(tmp_path, capsys, only_on, *ratios)
        assert f"scored.jsonl: {sentence}, but the files have none" in err
    err = refused(tmp_path, capsys, [prompt_row(0)], "--on-ratio", "0.5")  # no response at all
    assert "--on-ratio 0.5 needs on-policy responses, but the files have none" in err


def test_rows_of_one_source_that_is_not_needed(tmp_path, capsys):
    rows = [prompt_row(0, response("x", 1.0, "off"), response("y", 0.0, "off"))]
    err = refused(tmp_path, capsys, rows, "--on-ratio", "1")
    assert "--on-ratio 1.0 needs on-policy responses, but the files have none" in err
    assert len(run(tmp_path, capsys, rows, "--on-ratio", "0")[0]) == 1


def test_two_files_are_merged_by_id(tmp_path, capsys):
    on = [prompt_row(k, response(f"on good {k}", 1.0), response(f"on bad {k}", 0.0)) for k in range(4)]
    off = [
        prompt_row(k, response(f"off bad {k}", 0.0, "off"), response(f"off good {k}", 1.0, "off"))
        for k in (3, 2, 1, 0)
    ]
    paths = [write_rows(tmp_path / "on.jsonl", on), write_rows(tmp_path / "off.jsonl", off)]
    out = str(tmp_path / "pairs.jsonl")
    build_pairs.main(build_pairs.parse_args(["--scored", *paths, "--out", out]))
    pairs = read_rows(out)
    assert [pair["id"] for pair in pairs] == ["p0", "p1", "p2", "p3"]
    assert all(pair["chosen"][0]["content"] == f"{pair['source']} good {pair['id'][1:]}" for pair in pairs)
    assert sorted(pair["source"] for pair in pairs) == ["off", "off", "on", "on"]
    record = json.loads((tmp_path / "pairs.meta.json").read_text())
    assert record["inputs"] == {path: hashlib.sha256(open(path, "rb").read()).hexdigest() for path in paths}


# ----- --reward
def judged(number, *scores, labeler="rm:A"):
    """A row with on-policy responses a, b, c ... that the judge orders in another way than the reward."""
    responses = [
        response(
            "abc"[k], float(-k), scores={"rm": float(-k)} | ({} if score == "none" else {"judge": score})
        )
        for k, score in enumerate(scores)
    ]
    return prompt_row(number, *responses, labeler=labeler)


def test_another_scorers_reward(tmp_path, capsys):
    rows = [judged(0, 0.25, 0.5, 0.75), judged(1, 0.5, None, 0.125), judged(2, "none", 0.5, 0.25)]
    pairs, printed, record = run(tmp_path, capsys, rows, "--on-ratio", "1", "--reward", "judge")
    sides = [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]
    assert sides == [("c", "a"), ("a", "c"), ("b", "c")]
    assert [(pair["chosen_reward"], pair["rejected_reward"]) for pair in pairs] == [
        (0.75, 0.25),
        (0.5, 0.125),
        (0.5, 0.25),
    ]
    assert {pair["labeler"] for pair in pairs} == {"judge"}
    # the statistics are of that reward too: seven samples have one
    assert record["stats"]["reward of all samples"]["n"] == 7
    assert record["stats"]["reward of all samples"]["mean"] == pytest.approx(2.875 / 7)
    assert printed["dropped"] == {}
    pairs, _, _ = run(tmp_path, capsys, rows, "--on-ratio", "1", out="rm.jsonl")
    assert {(pair["chosen"][0]["content"], pair["labeler"]) for pair in pairs} == {("a", "rm:A")}


def test_the_last_scorers_reward_by_name_keeps_its_labeler(tmp_path, capsys):
    rows = [judged(k, 0.25, 0.5) for k in range(2)]
    plain, _, _ = run(tmp_path, capsys, rows, "--on-ratio", "1")
    named, _, _ = run(tmp_path, capsys, rows, "--on-ratio", "1", "--reward", "rm", out="named.jsonl")
    assert named == plain and plain[0]["labeler"] == "rm:A"


def test_a_reward_by_name_needs_no_other(tmp_path, capsys):
    rows = [judged(k, 0.25, 0.5) for k in range(2)]
    for row in rows:
        del row["labeler"]
        for one in row["responses"]:
            del one["reward"]
    pairs, _, _ = run(tmp_path, capsys, rows, "--on-ratio", "1", "--reward", "judge")
    assert [(pair["chosen"][0]["content"], pair["labeler"]) for pair in pairs] == [("b", "judge")] * 2
    (tmp_path / "pairs.jsonl").unlink()
    err = refused(tmp_path, capsys, rows, "--on-ratio", "1", "--reward", "jugde")
    assert ": --reward jugde: no response has this score; there are judge, rm\n" in err
    for row in rows:
        for one in row["responses"]:
            one["scores"] = None
    err = refused(tmp_path, capsys, rows, "--on-ratio", "1", "--reward", "judge")
    assert "--reward judge: no response has this score; there are none" in err
    # nor does a rule that needs no reward hide the wrong name
    off = [prompt_row(0, response("x", None, "off"), response("y", None, "off"))]
    err = refused(tmp_path, capsys, off, "--on-ratio", "0", "--select", "given", "--reward", "judge")
    assert "--reward judge: no response has this score" in err


# ----- statistics
def table(text, n, mean, std, *rest):
    columns = "mean", "std", "min", "25%", "median", "75%", "max"
    return {
        text: {
            "n": n,
            **{name: pytest.approx(x) for name, x in zip(columns, (mean, std, *rest), strict=True)},
        }
    }


def test_statistics_by_hand(tmp_path, capsys):
    rows = [
        prompt_row(0, response("aaaa", 1.0, logp=-8.0), response("b", 0.0, logp=-30.0)),
        prompt_row(1, response("aa", 2.0, logp=-20.0), response("bbbb", -2.0, logp=-6.0)),
        prompt_row(2, response("aaaaaa", 6.0, logp=-1.0), response("x", 5.5), response("bb", 5.0, logp=None)),
        prompt_row(3, response("c", 7.0), response("d", None)),
    ]
    _, _, record = run(tmp_path, capsys, rows, "--on-ratio", "1")
    expected = (
        # chosen rewards 1, 2, 6: population variance (4 + 1 + 9) / 3
        table("chosen reward", 3, 3, (14 / 3) ** 0.5, 1, 1.5, 2, 4, 6)
        # 0, -2, 5: (1 + 9 + 16) / 3
        | table("rejected reward", 3, 1, (26 / 3) ** 0.5, -2, -1, 0, 2.5, 5)
        | table("gap", 3, 2, 2**0.5, 1, 1, 1, 2.5, 4)
        # S1 Table 3, of pair members: -2, 0, 1, 2, 5, 6
        | table("reward of both sides", 6, 2, (46 / 6) ** 0.5, -2, 0.25, 1.5, 4.25, 6)
        # and of all samples, those that no pair holds too: -2, 0, 1, 2, 5, 5.5, 6, 7
        | table("reward of all samples", 8, 24.5 / 8, (74.21875 / 8) ** 0.5, -2, 0.75, 3.5, 5.625, 7)
        # S2 eq. 12, log pi(chosen) - log pi(rejected), where both are known: 22 and -14
        | table("intra-diversity", 2, 4, 18, -14, -5, 4, 13, 22)
        | table("chosen characters", 3, 4, (8 / 3) ** 0.5, 2, 3, 4, 5, 6)
        | table("rejected characters", 3, 7 / 3, (14 / 9) ** 0.5, 1, 1.5, 2, 3, 4)
    )
    assert record["stats"] == expected and list(record["stats"]) == list(expected)


def test_statistics_of_what_no_pair_has_are_left_out(tmp_path, capsys):
    rows = [prompt_row(0, response("aa", None, "off"), response("b", None, "off"))]
    _, _, record = run(tmp_path, capsys, rows, "--on-ratio", "0", "--select", "given")
    assert set(record["stats"]) == {"chosen characters", "rejected characters"}


def test_the_intra_diversity_is_what_the_trainer_logs(tmp_path, capsys):
    import train_dpo

    rows = [
        prompt_row(0, response("a", 2.0, logp=-8.0), response("b", 1.0, logp=-30.0)),
        prompt_row(1, response("a", 7.0, logp=-20.0), response("b", 0.0, logp=-6.0)),
    ]
    pairs, _, record = run(tmp_path, capsys, rows, "--on-ratio", "1")
    measured = []
    for pair in pairs:
        labels = {"pair_id": pair["pair_id"], "source": pair["source"], "tokens": 9}
        measured.append(labels | {"diversity": pair["chosen_logp"] - pair["rejected_logp"]})
    logged = train_dpo.means(measured)
    row = record["stats"]["intra-diversity"]
    assert (row["mean"], row["std"]) == (logged["diversity"], logged["diversity_std"]) == (4.0, 18.0)


def test_stats_are_printed_before_the_last_line(tmp_path, capsys):
    path = write_rows(tmp_path / "scored.jsonl", [prompt_row(0, response("aaaa", 1.25), response("b", -0.5))])
    flags = ["--scored", path, "--out", str(tmp_path / "pairs.jsonl"), "--on-ratio", "1"]
    build_pairs.main(build_pairs.parse_args(flags))
    assert len(capsys.readouterr().out.splitlines()) == 1
    build_pairs.main(build_pairs.parse_args([*flags, "--stats"]))
    *lines, last = capsys.readouterr().out.splitlines()
    printed = {line[:22].strip(): line[22:].split() for line in lines}
    assert printed["gap"] == "n 1 mean 1.75 std 0 min 1.75 25% 1.75 median 1.75 75% 1.75 max 1.75".split()
    assert printed["chosen characters"][:4] == ["n", "1", "mean", "4"] and json.loads(last)["pairs"] == 1


# ----- reasoning, and the prompt's token ids
def test_pairs_are_of_answers_and_hold_the_whole_text(tmp_path, capsys):
    """Best, worst, identical and empty look at what follows the reasoning; the pair's content has both."""
    rows, plain = [], []
    for k, answers in enumerate([("aaaa", "bb", "c"), ("same", "same", "same"), ("dddddd", "eee", "f")]):
        responses = [response(text, 3.0 - i, "off") for i, text in enumerate(answers)]
        plain.append(prompt_row(k, *responses))
        rows.append(prompt_row(k, *(thinking(one, i + k) for i, one in enumerate(responses))))
    expected, printed_plain, before = run(tmp_path, capsys, plain, "--on-ratio", "0")
    pairs, printed, record = run(tmp_path, capsys, rows, "--on-ratio", "0")
    assert printed["dropped"] == {"off: identical": 1} and printed["with_reasoning"] == {"on": 0, "off": 4}
    assert printed | {"with_reasoning": None} == printed_plain | {"with_reasoning": None}
    assert record["stats"] == before["stats"]
    # (4 + 6) / 2 and (1 + 1) / 2 characters of answers
    assert [record["stats"][f"{side} characters"]["mean"] for side in ("chosen", "rejected")] == [5, 1]
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        ("<think>\n1 + 0 is odd\n</think>\n\naaaa", "analysis 2 final c"),
        ("analysis 2 final dddddd", "or 4\n</think>\n\nf"),
    ]
    for pair, same in zip(pairs, expected, strict=True):
        assert list(pair) == list(same) and pair | {"chosen": 0, "rejected": 0} == same | {
            "chosen": 0,
            "rejected": 0,
        }


@pytest.mark.parametrize("truncated", ["drop", "keep"])
@pytest.mark.parametrize("reward", [1.0, None])
def test_nothing_after_the_reasoning_is_empty(tmp_path, capsys, truncated, reward):
    """Whatever a scorer made of it, and where it was cut while it thought."""
    cut = response("<think>\nfirst, I", reward, finish="length")
    assert cut["text"].strip()
    rows = [prompt_row(k, thinking(response("", reward), k), response("a", 2.0)) for k in range(3)]
    rows += [prompt_row(3, cut, response("a", 2.0)), prompt_row(4, response("a", 2.0), response("b", 1.0))]
    flags = ["--on-ratio", "1", "--truncated", truncated]
    pairs, printed, _ = run(tmp_path, capsys, rows, *flags)
    assert on_ids(pairs) == {"p4"} and printed["dropped"] == {"on: empty": 4}


@pytest.mark.parametrize(
    "n_on, n_off, warns",
    [
        (0, 0, False),
        (20, 20, False),
        (20, 18, False),
        (20, 17, True),
        (2, 0, False),
        (3, 0, True),
        (0, 20, True),
    ],
)
def test_a_tenth_with_another_form_is_no_other_form(capsys, n_on, n_off, warns):
    responses = []
    for source, n in ("on", n_on), ("off", n_off):
        plain = [response(f"a{k}", 1.0, source) for k in range(20)]
        responses += [thinking(one, k) for k, one in enumerate(plain[:n])] + plain[n:]
    assert build_pairs.with_reasoning(responses) == {"on": n_on, "off": n_off}
    text = f"warning: {5 * n_on}% of on-policy, {5 * n_off}% of off-policy responses have reasoning; "
    assert (text in capsys.readouterr().err) == warns


def test_a_mixture_of_two_forms_is_said(tmp_path, capsys):
    rows = plain_rows(10)
    for k, row in enumerate(rows):
        row["responses"][:2] = [thinking(one, k) for one in row["responses"][:2]]
    path = write_rows(tmp_path / "scored.jsonl", rows)
    said = {}
    for ratio in ("0", "0.5", "1"):
        flags = ["--scored", path, "--on-ratio", ratio, "--out", str(tmp_path / "pairs.jsonl")]
        build_pairs.main(build_pairs.parse_args(flags))
        printed = capsys.readouterr()
        said[ratio] = printed.err.partition(": ")[2], json.loads(printed.out)["with_reasoning"]
    warning = "warning: 100% of on-policy, 0% of off-policy responses have reasoning; "
    warning += "use both sources with it, or both without\n"
    assert said == {
        "0": ("", {"on": 0, "off": 0}),
        "0.5": (warning, {"on": 10, "off": 0}),
        "1": ("", {"on": 20, "off": 0}),
    }


def with_ids(rows, ids, tokenizer):
    return [row | {"prompt_token_ids": ids, "prompt_tokenizer": tokenizer} for row in rows]


@pytest.mark.parametrize("ids", [[5, 2**32 - 1, 0], None])
@pytest.mark.parametrize("off_ids", [[7, 7], [5, 2**32 - 1, 0], None, "absent"])
def test_prompt_ids_travel_from_files_in_any_order(tmp_path, capsys, ids, off_ids):
    """The on-policy file's, as a list; the same pairs whatever the order of --scored."""
    on = [row | {"responses": row["responses"][:2]} for row in plain_rows(9)]
    off = [row | {"responses": row["responses"][2:]} for row in plain_rows(9)]
    on = with_ids(on, ids, ids and "policy")
    off = off if off_ids == "absent" else with_ids(off, off_ids, off_ids and "another model")
    paths = [write_rows(tmp_path / "on.jsonl", on), write_rows(tmp_path / "off.jsonl", off)]
    lines = {}
    for order in (1, -1):
        out = tmp_path / f"pairs{order}.jsonl"
        build_pairs.main(build_pairs.parse_args(["--scored", *paths[::order], "--out", str(out)]))
        lines[order] = sorted(json.dumps(pair, sort_keys=True) for pair in read_rows(out))
    assert lines[1] == lines[-1] and len(lines[1]) == 9
    for line in lines[1]:
        pair = json.loads(line)
        assert (pair.get("prompt_token_ids"), pair.get("prompt_tokenizer")) == (ids, ids and "policy")
        assert sum(key.startswith(("chosen", "rejected")) for key in pair) == 2 * (1 + 6)
        assert "responses" not in pair and pair["chosen_token_ids"] is None


@pytest.mark.parametrize("script", ["build_pairs", "boundary", "evaluate"])
@pytest.mark.parametrize("key, value", [("prompt_token_ids", [-1]), ("prompt_token_ids", "5"), ("final", 1)])
def test_ids_and_answers_of_another_type(tmp_path, capsys, script, key, value):
    rows = [*plain_rows(2), plain_row(2)]
    (rows[2]["responses"][1] if key == "final" else rows[2])[key] = value
    path = write_rows(tmp_path / "scored.jsonl", rows)
    flags = ["--scored", path, "--out", str(tmp_path / "out.json")]
    flags += ["--model", "model-on", "--baseline", "model-off"] if script == "evaluate" else []
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as status:
        module.main(module.parse_args(flags))
    err = capsys.readouterr().err
    assert status.value.code == 2 and err.count("\n") == 1 and f"{path}:3: Expected `" in err and key in err


# ----- files
def test_files_as_they_are(tmp_path, capsys):
    """Gzip, a byte order mark, blank lines and a last line without its end are read as the plain file."""
    rows = plain_rows(4)
    expected, _, _ = run(tmp_path, capsys, rows)
    data = (tmp_path / "scored.jsonl").read_bytes()
    for name, content in {
        "zipped.jsonl.gz": gzip.compress(data),
        "mark.jsonl": b"\xef\xbb\xbf" + data,
        "blank.jsonl": b"\n \n" + data.replace(b"\n", b"\r\n\n"),
        "end.jsonl": data.rstrip(b"\n"),
    }.items():
        (tmp_path / name).write_bytes(content)
        flags = ["--scored", str(tmp_path / name), "--out", str(tmp_path / "pairs.jsonl")]
        build_pairs.main(build_pairs.parse_args(flags))
        assert read_rows(tmp_path / "pairs.jsonl") == expected, name


def test_a_full_disk_leaves_the_output_as_it_was(tmp_path):
    write_rows(tmp_path / "scored.jsonl", plain_rows(200))
    (tmp_path / "pairs.jsonl").write_text("before")
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    code += (
        f"sys.argv[0] = {str(REPO / 'build_pairs.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "--scored", "scored.jsonl", "--out", "pairs.jsonl"]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("build_pairs.py: pairs.jsonl cannot be written: ")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "scored.jsonl"]
    assert (tmp_path / "pairs.jsonl").read_text() == "before"


@pytest.mark.parametrize("script", ["build_pairs", "boundary"])
def test_help_does_not_wait_for_numpy(script):
    command = [sys.executable, "-X", "importtime", f"{script}.py", "--help"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "--scored" in done.stdout
    assert "msgspec" in done.stderr and "numpy" not in done.stderr
