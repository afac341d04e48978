"""
build_pairs.py: each data set that a table or figure of the papers was trained on, from a small file, by hand-made numbers.

Covers  every --select rule; --filter (S1 Figs. 5, 6); --mix, --on-ratio auto (S1 Table 2, Fig. 4; S2); relabel (S2's PC_off); tiers,
        ranks, gap windows, -inv sets, Algorithm 1 (S3 Tables 1, 3, 4), disagreeing labelers (S3 B.1); --stats (S1 Table 3; S3 Table 5); --exclude-prompts; labelers; refused combinations of flags; blindness to the order of rows.
Run     python -m pytest tests/test_pair_sets.py
"""

import json
import math

import build_pairs
import pytest
from conftest import read_rows, write_rows


def response(text, reward, source="off", **more):
    return {"text": text, "source": source, "model": f"model-{source}", "finish": "stop", "reward": reward, **more}


def row(prompt_id, *responses, **more):
    return {"id": prompt_id, "prompt": [{"role": "user", "content": f"question {prompt_id}"}], "responses": list(responses), **more}


def off(*rewards):
    """Off-policy responses r0, r1, ... with these rewards."""
    return [response(f"r{k}", reward) for k, reward in enumerate(rewards)]


def build(tmp_path, capsys, rows, *flags, out="pairs.jsonl", name="scored.jsonl", expect=0):
    """(pairs, the last line as JSON, standard output) of a run, or what it says on standard error where it is to be refused."""
    path = write_rows(tmp_path / name, rows)
    try:
        args = ["--scored", path, "--out", str(tmp_path / out), *map(str, flags)]
        build_pairs.main(build_pairs.parse_args(args))
    except SystemExit as status:
        assert status.code == 2 == expect and not (tmp_path / out).exists(), capsys.readouterr().err
        return capsys.readouterr().err
    printed = capsys.readouterr().out
    assert expect == 0
    return read_rows(tmp_path / out), json.loads(printed.splitlines()[-1]), printed


def refused(tmp_path, capsys, rows, *flags):
    return build(tmp_path, capsys, rows, *flags, expect=2)


def texts(pairs):
    return {pair["pair_id"]: (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs}


# ---- the rules

@pytest.mark.parametrize("flags, expected", [
    (["--select", "best-worst"], [("r1", "r3")]), (["--select", "best-second"], [("r1", "r4")]),
    (["--select", "given"], [("r0", "r1")]), (["--select", "relabel"], [("r1", "r0")]),
    (["--select", "tiers"], [("r1", "r3")]), (["--select", "tiers", "--tiers", "best/high"], [("r1", "r4")]),
    (["--select", "tiers", "--tiers", "medium/low"], [("r0", "r2")]),
    (["--select", "ranks", "--ranks", 1, 3], [("r1", "r0")]), (["--select", "ranks", "--ranks", 3, 4], [("r0", "r2")]),
    # r1 over r0 is 2.0 apart, the nearest to 1.9; r4 over r0 is 1.5 apart, the nearest where the chosen may not exceed 1.9
    (["--select", "gap", "--gap", 1, 2.8, "--chosen", 0, 2], [("r1", "r0")]),
    (["--select", "gap", "--gap", 1, 2.8, "--chosen", 0, 1.9], [("r4", "r0")]),
    # sigmoid(2) is 0.881, sigmoid(1.5) is 0.818
    (["--select", "threshold"], [("r0", "r2"), ("r0", "r3"), ("r1", "r0"), ("r1", "r2"), ("r1", "r3"), ("r2", "r3"), ("r4", "r2"),
                                 ("r4", "r3")]),
    (["--select", "threshold", "--eta", 0.8, "--tau", 5], [("r1", "r3")]),  # sigmoid(8 / 5) is 0.832, sigmoid(7.5 / 5) is 0.818
])
def test_each_rule_by_hand(tmp_path, capsys, flags, expected):
    rewards = [0.0, 2.0, -3.0, -6.0, 1.5]  # best r1, then r4, r0, r2, r3
    if "--tau" in flags:
        rewards[4] = 0.5  # sigmoid(6.5 / 5) is 0.786
    pairs, _, _ = build(tmp_path, capsys, [row("p", *off(*rewards))], "--on-ratio", 0, *flags)
    assert list(texts(pairs).values()) == expected
    suffixes = [f":{k}" for k in range(len(pairs))] if "threshold" in flags else [""]
    assert [pair["pair_id"] for pair in pairs] == [f"p:off{suffix}" for suffix in suffixes]


def test_best_random_is_uniform_by_the_seed_alone(tmp_path, capsys):
    rows = [row(f"p{k}", *off(0.0, 4.0, 1.0, 2.0)) for k in range(300)]
    flags = ("--on-ratio", 0, "--select", "best-random")
    pairs, _, _ = build(tmp_path, capsys, rows, *flags)
    rejected = [pair["rejected"][0]["content"] for pair in pairs]
    assert {pair["chosen"][0]["content"] for pair in pairs} == {"r1"}
    assert set(rejected) == {"r0", "r2", "r3"}
    assert all(abs(rejected.count(text) - 100) < 4 * math.sqrt(300 * 2 / 9) for text in set(rejected))
    backwards, _, _ = build(tmp_path, capsys, rows[::-1], *flags, out="b.jsonl", name="b_in.jsonl")
    assert texts(backwards) == texts(pairs)
    other, _, _ = build(tmp_path, capsys, rows, *flags, "--seed", 1, out="c.jsonl")
    assert texts(other) != texts(pairs)


def test_a_rule_drops_ties_and_equal_texts_by_itself(tmp_path, capsys):
    rows = [row("tie", *off(2.0, 2.0, 0.0)), row("good", *off(2.0, 1.0, 0.0)), row("few", *off(1.0, 0.0)),
            row("same", response("a", 2.0), response(" a\n", 1.0), response("b", 0.0))]
    _, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "ranks", "--ranks", 1, 2)
    assert printed["pairs"] == 2 and printed["dropped"] == {"off: identical": 1, "off: tie": 1}
    pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "ranks", "--ranks", 2, 3, out="b.jsonl")
    assert printed["dropped"] == {"off: fewer than 3 usable responses": 1} and len(pairs) == 3
    # one pair of several: r0 r1 have equal texts, the others stay
    rows = [row("p", response("a", 9.0), response("a", 4.0), response("b", 0.0))]
    pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "threshold", out="c.jsonl")
    assert [pair["rejected"][0]["content"] for pair in pairs] == ["b", "b"] and printed["dropped"] == {"off: identical": 1}


def test_a_gap_takes_the_lowest_indices_of_equally_near_pairs(tmp_path, capsys):
    rows = [row("p", *off(3.0, 1.0, 2.0, 0.0)), row("none", *off(9.0, 8.0))]
    pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "gap", "--gap", 0.5, 1.5, "--chosen", 0, 5)
    assert texts(pairs) == {"p:off": ("r0", "r2")}  # r0 r2, r2 r1 and r1 r3 are 1 apart
    assert printed["dropped"] == {"off: outside of the windows": 1}
    # a window around 0: the nearest to its middle that has a better and a worse response, not a response with itself
    rows = [row("p", *off(3.0, 1.5, -1.0))]
    pairs, _, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "gap", "--gap", -4, 4, "--chosen", -9, 9, out="b.jsonl")
    assert texts(pairs) == {"p:off": ("r0", "r1")}


def test_tiers_round_half_up_and_have_one_prompt_set(tmp_path, capsys):
    rows = [row("six", *off(6.0, 5.0, 4.0, 3.0, 2.0, 1.0)), row("eight", *off(8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)),
            row("four", *off(4.0, 3.0, 2.0, 1.0)),
            row("equal", *off(5.0, 4.0, 4.0, 2.0, 1.0)),  # high = medium: left out of best/worst too
            row("texts", response("a", 5.0), response("b", 4.0), response("c", 3.0), response("b", 2.0), response("d", 1.0))]
    found = {}
    for high, low in (("best", "worst"), ("best", "low"), ("best", "medium"), ("best", "high"), ("low", "worst"), ("medium", "worst"),
                      ("high", "worst")):  # S3 Table 1
        pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "tiers", "--tiers", f"{high}/{low}",
                                  out=f"{high}{low}.jsonl")
        found[high, low] = texts(pairs)
        assert printed["dropped"] == {"off: equal tiers": 2, "off: fewer than 5 usable responses": 1}
        assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert all(set(of) == {"six:off", "eight:off"} for of in found.values())
    assert [found[key]["six:off"] for key in found] == [  # k = 6: ranks 0, 1, 3, 4, 5
        ("r0", "r5"), ("r0", "r4"), ("r0", "r3"), ("r0", "r1"), ("r4", "r5"), ("r3", "r5"), ("r1", "r5")]
    assert found["best", "low"]["eight:off"] == ("r0", "r5") and found["medium", "worst"]["eight:off"] == ("r4", "r7")  # 0, 2, 4, 5, 7


# ---- S2: PC_off, PC_on, PC_llama; the data set's own pair

def test_given_and_relabel(tmp_path, capsys):
    on = [response("on a", 0.0, "on"), response("on b", 1.0, "on")]
    rows = [row("right", *off(1.0, 0.0, 9.0), *on), row("flipped", *off(0.0, 1.0, -9.0), *on), row("also", *off(-1.0, 1.0), *on),
            row("tie", *off(1.0, 1.0), *on), row("fine", *off(3.0, 2.0), *on), row("same", response("x", 1.0), response("x ", 0.0), *on)]
    pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "relabel", out="relabel.jsonl")
    assert texts(pairs) == {"right:off": ("r0", "r1"), "flipped:off": ("r1", "r0"), "also:off": ("r1", "r0"), "fine:off": ("r0", "r1")}
    assert printed["flipped"] == 0.5 and printed["dropped"] == {"off: identical": 1, "off: tie": 1}
    pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "given")
    assert set(texts(pairs).values()) == {("r0", "r1")} and len(pairs) == 5  # the tie too: its order is the data set's
    assert "flipped" not in printed and printed["dropped"] == {"off: identical": 1}
    mixed, _, _ = build(tmp_path, capsys, rows, "--on-ratio", 0.4, "--select", "given", out="mixed.jsonl")
    assert sorted(texts(mixed).values()) == [("on b", "on a")] * 2 + [("r0", "r1")] * 3


def test_given_needs_no_reward(tmp_path, capsys):
    rows = [row("p", response("a", None), response("b", None)), row("q", response("a", None), response("", None))]
    for line in rows:
        for one in line["responses"]:
            del one["reward"]
    pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "given", "--stats")
    assert texts(pairs) == {"p:off": ("a", "b")} and pairs[0]["chosen_reward"] is None and printed["dropped"] == {"off: empty": 1}
    err = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "given", "--filter", "quality:1", out="b.jsonl", expect=2)
    assert "--filter quality: no pair has a reward on both sides: run score.py --scorer rm" in err


def test_another_models_samples_are_off_policy_pairs(tmp_path, capsys):
    """S2's PC_llama: two samples of a stronger model, its best over its worst; PC_on: two of the model itself."""
    rows = [row("p", response("llama b", 0.5), response("llama a", 1.5), response("own a", 1.0, "on"), response("own b", 2.0, "on"))]
    llama, _, _ = build(tmp_path, capsys, rows, "--on-ratio", 0)
    own, _, _ = build(tmp_path, capsys, rows, "--on-ratio", 1, out="own.jsonl")
    assert texts(llama) == {"p:off": ("llama a", "llama b")} and texts(own) == {"p:on": ("own b", "own a")}


# ---- S1 Table 2, Fig. 4: sets of equal size

def both(count):
    return [row(f"p{k}", response(f"on good {k}", 3.0, "on"), response(f"on bad {k}", 1.0, "on"),
                response(f"off good {k}", 2.0), response(f"off bad {k}", 0.0)) for k in range(count)]


def test_every_method_has_the_same_number_of_pairs_on_the_same_prompts(tmp_path, capsys):
    rows = both(12) + [row("only off", *off(1.0, 0.0)), row("only on", response("a", 1.0, "on"), response("b", 0.0, "on"))]
    ids = {}
    for name, flags in (("off", ["--on-ratio", 0]), ("on", ["--on-ratio", 1]), ("mix", ["--on-ratio", 0.5]), ("cross", ["--mix", "cross"])):
        pairs, printed, _ = build(tmp_path, capsys, rows, *flags, "--total", 9, out=f"{name}.jsonl")
        ids[name] = [pair["id"] for pair in pairs]
        lacks = {"cross: one source": 2} if name == "cross" else {"off: no response": 1, "on: no response": 1}
        assert printed["pairs"] == 9 and printed["dropped"] == lacks
        expected = {"off": [0, 9, 0], "on": [9, 0, 0], "mix": [5, 4, 0], "cross": [0, 0, 9]}[name]
        assert [printed[kind] for kind in ("on", "off", "cross")] == expected
    assert ids["off"] == ids["on"] == ids["mix"] == ids["cross"]


def test_cross_pools_both_sources(tmp_path, capsys):
    rows = [row("cross", response("a", 3.0, "on"), response("b", 1.0, "on"), response("c", 0.0)),
            row("on", response("a", 3.0, "on"), response("b", 1.0, "on"), response("c", 2.0)),
            row("off", response("a", 3.0), response("b", 1.0), response("c", 2.0, "on"))]
    pairs, printed, _ = build(tmp_path, capsys, rows, "--mix", "cross")
    assert texts(pairs) == {"cross:cross": ("a", "c"), "on:on": ("a", "b"), "off:off": ("a", "b")}
    assert [pair["source"] for pair in pairs] == ["cross", "on", "off"]
    assert [pairs[0][f"{side}_model"] for side in ("chosen", "rejected")] == ["model-on", "model-off"]


def test_concat_draws_the_sources_by_themselves(tmp_path, capsys):
    rows = both(10) + [row("only off", *off(1.0, 0.0))]
    # 10 on-policy and 11 off-policy pairs: at 1/2 the most is 21 with floor(10.5 + .5) = 11 on-policy ones - too many - so 20
    pairs, printed, _ = build(tmp_path, capsys, rows, "--mix", "concat")
    assert (printed["pairs"], printed["on"], printed["off"]) == (20, 10, 10)
    assert len({pair["pair_id"] for pair in pairs}) == 20 and printed["prompts"] < 20
    flags = ("--mix", "concat", "--on-ratio", 0.3, "--total", 10)
    few, printed, _ = build(tmp_path, capsys, rows[::-1], *flags, out="b.jsonl", name="b_in.jsonl")
    assert (printed["on"], printed["off"]) == (3, 7)
    again, _, _ = build(tmp_path, capsys, rows, *flags, out="c.jsonl")
    assert texts(again) == texts(few)
    assert "30 pairs are asked for and " in build(tmp_path, capsys, rows, "--mix", "concat", "--total", 30, out="d.jsonl", expect=2)


def test_threshold_pairs_are_not_shared_out_but_concatenated(tmp_path, capsys):
    rows = [row(f"p{k}", *off(8.0, 4.0, 0.0), response("x", 5.0, "on"), response("y", 0.0, "on")) for k in range(4)]
    err = refused(tmp_path, capsys, rows, "--select", "threshold", "--on-ratio", 0.25)
    assert "several pairs a prompt, which --mix exclusive cannot share out at 0.25; --mix concat can" in err
    _, printed, _ = build(tmp_path, capsys, rows, "--select", "threshold", "--mix", "concat", "--on-ratio", 0.25)
    assert (printed["on"], printed["off"]) == (4, 12)  # three pairs a prompt off-policy, one on-policy
    pairs, printed, _ = build(tmp_path, capsys, rows, "--select", "threshold", "--on-ratio", 0, "--total", 7, out="b.jsonl")
    assert printed["pairs"] == 7 == len({pair["pair_id"] for pair in pairs}) and printed["prompts"] == 3


def test_the_boundary_score_is_the_ratio(tmp_path, capsys):
    (tmp_path / "boundary.json").write_text(json.dumps({"kind": "boundary", "score": 0.3, "v_on": 3, "v_off": 7}))
    flags = ("--on-ratio", "auto", "--boundary", tmp_path / "boundary.json")
    pairs, printed, _ = build(tmp_path, capsys, both(10), *flags)
    assert (printed["on"], printed["off"], printed["on_ratio"]) == (3, 7, 0.3)
    same, _, _ = build(tmp_path, capsys, both(10), "--on-ratio", 0.3, out="same.jsonl")
    assert same == pairs
    (tmp_path / "pairs.jsonl").unlink()
    for text in ('{"kind": "winrate", "score": 0.3}', '{"kind": "boundary"}', '[1]', 'no json', '{"kind": "boundary", "score": NaN}'):
        (tmp_path / "boundary.json").write_text(text)
        assert "boundary.json: expected a result of boundary.py with a score in [0, 1]" in refused(tmp_path, capsys, both(4), *flags)


# ---- S1 section 5.3: filters, Figs. 5 and 6

def filtered():
    """Four pairs of which each rule prefers another one: p0 quality, p1 on-policiness, p2 contrast, p3 low similarity."""
    table = {"p0": (9.0, 8.0, -30.0, -30.0, 0.8), "p1": (3.0, 2.0, -5.0, -6.0, 0.9), "p2": (6.0, -6.0, -40.0, -20.0, 0.7),
             "p3": (2.0, 1.0, -20.0, -20.0, -0.1)}
    rows = []
    for prompt_id, (r_c, r_r, logp_c, logp_r, cosine) in table.items():
        long = "x" * int(-logp_r)
        rows.append(row(prompt_id, response(f"bad {long}", r_r, logp=logp_r), response(f"good {long}", r_c, logp=logp_c),
                        cosine=[[1.0, cosine], [cosine, 1.0]]))
    return rows


@pytest.mark.parametrize("name, order", [("quality", ["p0", "p1", "p3", "p2"]), ("onpolicy", ["p1", "p3", "p0", "p2"]),
                                         ("contrast", ["p2", "p0", "p1", "p3"]), ("similarity", ["p3", "p2", "p0", "p1"])])
def test_each_filter_keeps_its_pairs_and_is_nested(tmp_path, capsys, name, order):
    for share, count in ((0.25, 1), (0.5, 2), (0.74, 2), (0.75, 3), (1, 4)):
        pairs, printed, _ = build(tmp_path, capsys, filtered(), "--on-ratio", 0, "--filter", f"{name}:{share}", out=f"{share}.jsonl")
        assert {pair["id"] for pair in pairs} == set(order[:count])
        assert (printed["filter"]["kept"], printed["filter"]["of"]) == (count, 4)
    assert {pair["id"]: pair["cosine"] for pair in pairs} == {"p0": 0.8, "p1": 0.9, "p2": 0.7, "p3": -0.1}


def test_the_cosine_of_a_second_file(tmp_path, capsys):
    """Indices of the merged responses, not of the file's own."""
    on = [row(f"p{k}", response("a", 1.0, "on"), response("b", 0.0, "on"), cosine=[[1, 0.5], [0.5, 1]]) for k in range(4)]
    path = write_rows(tmp_path / "off.jsonl", filtered())
    flags = ("--scored", write_rows(tmp_path / "on.jsonl", on), path, "--on-ratio", 0, "--filter", "similarity:0.25")
    pairs, _, _ = build(tmp_path, capsys, on, *flags)
    assert [(pair["id"], pair["cosine"]) for pair in pairs] == [("p3", -0.1)]


def test_a_filter_says_how_long_its_pairs_are(tmp_path, capsys):
    _, printed, _ = build(tmp_path, capsys, filtered(), "--on-ratio", 0, "--filter", "onpolicy:0.25")
    # "good " and "bad " and 30, 6, 20, 20 letters: a side has 4.5 + 19 on average, the kept pair's 4.5 + 6
    assert (printed["filter"]["mean_characters"], printed["filter"]["mean_characters_of_all"]) == (10.5, 23.5)


def test_the_random_filter_is_nested_and_blind_to_order(tmp_path, capsys):
    rows, before = both(100), set()
    for share, count in ((0.1, 10), (0.29, 29), (0.5, 50)):  # 0.29 * 100 is 28.999999999999996
        pairs, _, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--filter", f"random:{share}", out=f"{share}.jsonl")
        ids = {pair["id"] for pair in pairs}
        assert len(ids) == count and before < ids
        before = ids
    backwards, _, _ = build(tmp_path, capsys, rows[::-1], "--on-ratio", 0, "--filter", "random:0.5", out="b.jsonl", name="b_in.jsonl")
    assert {pair["id"] for pair in backwards} == before


def test_equal_keys_are_kept_by_id(tmp_path, capsys):
    for order, out in ((1, "a"), (-1, "b")):
        pairs, _, _ = build(tmp_path, capsys, both(9)[::order], "--on-ratio", 1, "--filter", "quality:0.34", out=out,
                            name=f"{out}_in.jsonl")
        assert {pair["id"] for pair in pairs} == {"p0", "p1", "p2"} and {pair["source"] for pair in pairs} == {"on"}


def test_fig_6_adds_as_many_on_policy_pairs_of_other_prompts(tmp_path, capsys):
    rows = both(10)
    for k, line in enumerate(rows):
        line["responses"][2]["reward"] += k  # the best off-policy pairs are those of p9, p8, p7, p6
    pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0.5, "--filter", "quality:0.4")
    sides = {source: {pair["id"] for pair in pairs if pair["source"] == source} for source in ("on", "off")}
    assert sides["off"] == {"p6", "p7", "p8", "p9"} and len(sides["on"]) == 4 and not sides["on"] & sides["off"]
    # 7 of 10 kept and 7 more on-policy ones: 3 prompts are left
    err = build(tmp_path, capsys, rows, "--on-ratio", 0.5, "--filter", "quality:0.7", out="b.jsonl", expect=2)
    assert "14 pairs are asked for and 10 can be had, with an on-ratio of 0.5, 10 on-policy and 7 other pairs after the filter" in err
    # with 6 other prompts 7 on-policy pairs are not to be had, although 3 of the 4 kept pairs would do for the rest
    err = build(tmp_path, capsys, rows, "--on-ratio", 0.7, "--filter", "quality:0.4", "--total", 10, out="b.jsonl", expect=2)
    assert "10 pairs are asked for and 9 can be had" in err
    # concat takes the three prompts first, then prompts of kept pairs
    pairs, printed, _ = build(tmp_path, capsys, rows, "--filter", "quality:0.7", "--mix", "concat", out="c.jsonl")
    assert (printed["on"], printed["off"]) == (7, 7) and {"p0", "p1", "p2"} < {pair["id"] for pair in pairs if pair["source"] == "on"}
    # the fewest pairs of which the kept 4 are the off-policy ones: of 6 floor(1.8 + .5) = 2 are on-policy
    _, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0.3, "--filter", "quality:0.4", out="d.jsonl")
    assert (printed["on"], printed["off"]) == (2, 4)


def test_a_filter_of_the_pool(tmp_path, capsys):
    rows = both(5)
    rows[3]["responses"][3]["reward"] = -9.0
    pairs, printed, _ = build(tmp_path, capsys, rows, "--mix", "cross", "--filter", "contrast:0.2")
    assert texts(pairs) == {"p3:cross": ("on good 3", "off bad 3")} and printed["cross"] == 1


@pytest.mark.parametrize("name, key, scorer", [("onpolicy", "logp", "logp"), ("similarity", "cosine", "embed")])
def test_a_filter_without_its_column(tmp_path, capsys, name, key, scorer):
    rows = filtered()
    rows[2]["responses"][0].pop("logp")
    rows[2]["cosine"] = None
    pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--filter", f"{name}:1", out="others.jsonl")
    assert "p2" not in texts(pairs) and len(pairs) == len(rows) - 1 and printed["dropped"] == {f"off: no {key}": 1}
    for line in rows:
        line["cosine"] = None
        line["responses"][0].pop("logp", None)
    err = refused(tmp_path, capsys, rows, "--on-ratio", 0, "--filter", f"{name}:0.5")
    assert f"--filter {name}: no pair has a {key} on both sides: run score.py --scorer {scorer}" in err


# ---- S3 Table 3: gap and quality, -inv sets

def ranked_rows():
    return [row("a", *off(4.0, 3.0, 1.0, 0.0)), row("b", *off(-1.0, 5.0, 4.5, 2.0))]


def test_rank_pairs_and_inverses(tmp_path, capsys):
    found = {}
    for name, ranks in (("LG-HQ", (1, 3)), ("LG-LQ", (2, 4)), ("SG-HQ", (1, 2)), ("SG-LQ", (3, 4))):
        pairs, _, _ = build(tmp_path, capsys, ranked_rows(), "--on-ratio", 0, "--select", "ranks", "--ranks", *ranks, out=f"{name}.jsonl")
        found[name] = texts(pairs)
    assert found == {"LG-HQ": {"a:off": ("r0", "r2"), "b:off": ("r1", "r3")}, "LG-LQ": {"a:off": ("r1", "r3"), "b:off": ("r2", "r0")},
                     "SG-HQ": {"a:off": ("r0", "r1"), "b:off": ("r1", "r2")}, "SG-LQ": {"a:off": ("r2", "r3"), "b:off": ("r3", "r0")}}
    inverse, printed, _ = build(tmp_path, capsys, ranked_rows(), "--on-ratio", 0, "--select", "ranks", "--ranks", 1, 3,
                                "--swap-rejected", tmp_path / "SG-HQ.jsonl", out="LG-HQ-inv.jsonl")
    assert texts(inverse) == found["SG-HQ"] and printed["dropped"] == {}  # the chosen are the same, the rejected SG-HQ's
    inverse, _, _ = build(tmp_path, capsys, ranked_rows(), "--on-ratio", 0, "--select", "ranks", "--ranks", 1, 2,
                          "--swap-rejected", tmp_path / "SG-LQ.jsonl", out="SG-HQ-inv.jsonl")
    assert texts(inverse) == {"a:off": ("r0", "r3"), "b:off": ("r1", "r0")}


def test_a_swap_takes_the_whole_side(tmp_path, capsys):
    rows = [row("p", response("good", 1.0, token_ids=[1], tokenizer="t", logp=-1.0), response("bad", 0.0, token_ids=[2, 2], tokenizer="t"))]
    other = [row("p", response("x", 0.9, "on", token_ids=[7], tokenizer="u"),
                 response("y", 0.5, "on", token_ids=[8, 9], tokenizer="u", logp=-4.0))]
    build(tmp_path, capsys, other, "--on-ratio", 1, out="other.jsonl", name="other_in.jsonl")
    (pair,), _, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--swap-rejected", tmp_path / "other.jsonl")
    assert pair["chosen"][0]["content"] == "good" and pair["rejected"][0]["content"] == "y" and pair["source"] == "cross"
    keys = ("reward", "model", "token_ids", "tokenizer", "logp")
    assert [pair[f"rejected_{key}"] for key in keys] == [0.5, "model-on", [8, 9], "u", -4.0]
    assert [pair[f"chosen_{key}"] for key in keys] == [1.0, "model-off", [1], "t", -1.0] and pair["cosine"] is None


def test_a_swap_that_inverts_or_joins_equals_and_ids_of_one_side(tmp_path, capsys):
    rows = [row(name, response("good", 1.0), response("bad", 0.0)) for name in ("fine", "inverted", "same", "tie", "here")]
    other = [row("fine", response("x", 3.0), response("y", 0.5)), row("inverted", response("x", 3.0), response("y", 2.5)),
             row("same", response("x", 3.0), response(" good", 0.2)), row("tie", response("x", 3.0), response("y", 1.0)),
             row("there", response("x", 3.0), response("y", 1.0))]
    build(tmp_path, capsys, other, "--on-ratio", 0, out="other.jsonl", name="other_in.jsonl")
    swap = ("--on-ratio", 0, "--swap-rejected", tmp_path / "other.jsonl")
    common = {"swap: identical": 1, "swap: tie": 1, "swap: not in the file": 1, "swap: only in the file": 1}
    pairs, printed, _ = build(tmp_path, capsys, rows, *swap)
    assert texts(pairs) == {"fine:off": ("good", "y")} and printed["dropped"] == {**common, "swap: inverted": 1}
    for inverted, expected in (("keep", ("good", "y")), ("flip", ("y", "good"))):
        pairs, printed, _ = build(tmp_path, capsys, rows, *swap, "--inverted", inverted, out=f"{inverted}.jsonl")
        assert texts(pairs) == {"fine:off": ("good", "y"), "inverted:off": expected} and printed["dropped"] == common
        assert (pairs[1]["chosen_reward"], pairs[1]["rejected_reward"]) == ((1.0, 2.5) if inverted == "keep" else (2.5, 1.0))


def test_a_swap_file_that_is_none(tmp_path, capsys):
    rows = ranked_rows()
    build(tmp_path, capsys, rows, "--on-ratio", 0, out="other.jsonl")
    good = read_rows(tmp_path / "other.jsonl")
    for change, sentence in (({"prompt": "another"}, "scored.jsonl:1: the id a stands for another prompt in"),
                             ({"id": "b"}, "other.jsonl:2: expected one pair of this script for the id b"),
                             ({"rejected_reward": None}, "other.jsonl:1: expected one pair of this script for the id a"),
                             ({"rejected": "text"}, "other.jsonl:1: expected one pair of this script for the id a"),
                             ({"rejected_reward": float("nan")}, "other.jsonl:1: expected every response to have a finite"),
                             ({"labeler": "judge"}, "the rewards are of the labelers None and judge")):
        write_rows(tmp_path / "other.jsonl", [{**good[0], **change}, good[1]])
        assert sentence in refused(tmp_path, capsys, rows, "--on-ratio", 0, "--swap-rejected", tmp_path / "other.jsonl")


# ---- S3 Table 4: Algorithm 1

def algorithm_rows():
    """METHODS 10: s_w = 1, s_l = 0; s' = (.2, 1.5), (.2, .9), (1, .5) and equal texts."""
    base = [response("y_w", 1.0), response("y_l", 0.0)]
    return [row("better", *base, response("y1", 0.2, "on"), response("y2", 1.5, "on")),
            row("worse", *base, response("y1", 0.2, "on"), response("y2", 0.9, "on")),
            row("equal", *base, response("y1", 1.0, "on"), response("y2", 0.5, "on")),
            row("same", *base, response(" y_w", 1.2, "on"), response("y2", 0.5, "on"))]


def test_algorithm_1(tmp_path, capsys):
    pairs, printed, _ = build(tmp_path, capsys, algorithm_rows(), "--replace", 1)
    assert texts(pairs) == {"better:cross": ("y2", "y_w"), "worse:cross": ("y_w", "y2")}
    assert {pair["source"] for pair in pairs} == {"cross"} and [pair["chosen_model"] for pair in pairs] == ["model-on", "model-off"]
    assert (printed["replaced"], printed["chosen_replaced"], printed["replace_rule"]) == (4, 2, "algorithm1")
    assert printed["dropped"] == {"replace: identical": 1, "replace: tie": 1}


def test_the_rejected_alone_are_replaced(tmp_path, capsys):
    flags = ("--replace", 1, "--replace-rule", "rejected")
    pairs, printed, _ = build(tmp_path, capsys, algorithm_rows(), *flags)
    assert texts(pairs) == {"worse:cross": ("y_w", "y2")} and printed["chosen_replaced"] == 0 and printed["replace_rule"] == "rejected"
    assert printed["dropped"] == {"replace: identical": 1, "replace: inverted": 1, "replace: tie": 1}
    pairs, _, _ = build(tmp_path, capsys, algorithm_rows(), *flags, "--inverted", "keep", out="keep.jsonl")
    assert texts(pairs)["better:cross"] == ("y_w", "y2")
    pairs, _, _ = build(tmp_path, capsys, algorithm_rows(), *flags, "--inverted", "flip", out="flip.jsonl")
    assert texts(pairs)["better:cross"] == ("y2", "y_w")


def test_replacement_is_exact_nested_and_passes_prompts_without_samples_over(tmp_path, capsys):
    rows, before = both(40), set()
    for share, count in ((0.1, 4), (0.2, 8), (0.29, 11)):
        pairs, printed, _ = build(tmp_path, capsys, rows, "--replace", share, out=f"{share}.jsonl")
        replaced = {pair["id"] for pair in pairs if pair["source"] == "cross"}
        assert len(pairs) == 40 and len(replaced) == count == printed["replaced"] and before < replaced and printed["passed_over"] == 0
        assert all(texts(pairs)[f"p{k}:cross"] == (f"on good {k}", f"off good {k}") for k in range(40) if f"p{k}" in replaced)
        before = replaced
    for line in rows:
        if line["id"] in before:
            line["responses"][0]["finish"] = "length"  # one usable response is left: it is taken
            line["responses"][1]["reward"] = 1.75
    gone = sorted(before)[:3]
    rows = [{**line, "responses": line["responses"][2:]} if line["id"] in gone else line for line in rows]
    pairs, printed, _ = build(tmp_path, capsys, rows[::-1], "--replace", 0.29, out="b.jsonl", name="b_in.jsonl")
    replaced = {pair["id"]: pair for pair in pairs if pair["source"] == "cross"}
    assert len(pairs) == 40 and len(replaced) == 11 and printed["passed_over"] == 3 and before - set(gone) < set(replaced)
    stays = sorted(before)[3]
    assert (replaced[stays]["chosen_reward"], replaced[stays]["rejected_reward"]) == (2.0, 1.75)
    rows = [{**line, "responses": line["responses"][2:]} if line["id"] != "p0" else line for line in both(10)]
    assert "--replace 0.2 needs 2 prompts with a usable on-policy response, and there are 1" in build(
        tmp_path, capsys, rows, "--replace", 0.2, out="c.jsonl", expect=2)


def test_replacement_after_a_filter_and_of_a_total(tmp_path, capsys):
    rows = both(10)
    for k, line in enumerate(rows):
        line["responses"][2]["reward"] -= k / 10  # p0 to p4 have the best off-policy pairs
    pairs, printed, _ = build(tmp_path, capsys, rows, "--filter", "quality:0.5", "--replace", 0.4, "--total", 5)
    assert {pair["id"] for pair in pairs} == {f"p{k}" for k in range(5)} and (printed["cross"], printed["off"]) == (2, 3)
    _, printed, _ = build(tmp_path, capsys, rows, "--replace", 0.5, "--total", 4, out="b.jsonl")
    assert (printed["cross"], printed["off"]) == (2, 2)


def test_table_4_on_the_tiers_of_table_1(tmp_path, capsys):
    """Best/Low with a share of 1/2 of two prompts replaced; the on-policy responses are no part of the tiers."""
    rows = [row(name, *off(5.0, 4.0, 3.0, 2.0, 1.0), response("mine", 9.0, "on")) for name in ("a", "b")]
    pairs, _, _ = build(tmp_path, capsys, rows, "--select", "tiers", "--tiers", "best/low", "--replace", 0.5)
    assert sorted(texts(pairs).values()) == [("mine", "r0"), ("r0", "r3")]


# ---- other rewards, labelers, S3 B.1

def scored_twice():
    """Two labelers: on p0, p3 they agree, on p1 they do not, on p2 the judge has no word."""
    rows = [row(f"p{k}", *off(1.0, 0.0)) for k in range(4)]
    for line, judge in zip(rows, ((0.9, 0.1), (0.2, 0.8), (None, 0.5), (0.7, 0.6))):
        line["labeler"] = "rm:model"
        for one, score in zip(line["responses"], judge):
            one["scores"] = {"rm": one["reward"], **({} if score is None else {"judge": score})}
    return rows


def test_another_reward(tmp_path, capsys):
    pairs, printed, _ = build(tmp_path, capsys, scored_twice(), "--on-ratio", 0, "--reward", "judge")
    assert texts(pairs) == {"p0:off": ("r0", "r1"), "p1:off": ("r1", "r0"), "p3:off": ("r0", "r1")}
    assert (pairs[1]["chosen_reward"], pairs[1]["rejected_reward"]) == (0.8, 0.2) and {pair["labeler"] for pair in pairs} == {"judge"}
    assert printed["dropped"] == {"off: without reward": 1}
    err = build(tmp_path, capsys, scored_twice(), "--on-ratio", 0, "--reward", "other", out="b.jsonl", expect=2)
    assert 'no response has a reward under "scores" as other' in err


def test_prompts_on_which_two_labelers_disagree(tmp_path, capsys):
    pairs, printed, _ = build(tmp_path, capsys, scored_twice(), "--on-ratio", 0, "--disagree", "judge")
    assert texts(pairs) == {"p1:off": ("r0", "r1")} and pairs[0]["labeler"] == "rm:model"
    assert printed["dropped"] == {"off: judge agrees": 2, "off: no judge": 1}
    judged, _, _ = build(tmp_path, capsys, scored_twice(), "--on-ratio", 0, "--reward", "judge", "--disagree", "rm", out="b.jsonl")
    assert texts(judged) == {"p1:off": ("r1", "r0")}  # the same prompt under the other labeler


@pytest.mark.parametrize("labels", [("rm:a", "rm:b"), ("rm:a", None)])
def test_mixed_labelers(tmp_path, capsys, labels):
    on = [row("p", response("a", 1.0, "on"), response("b", 0.0, "on"), labeler=labels[0])]
    offs = [row("p", *off(5.0, 4.0), **({"labeler": labels[1]} if labels[1] else {}))]
    path = write_rows(tmp_path / "off.jsonl", offs)
    flags = ("--scored", write_rows(tmp_path / "on.jsonl", on), path)
    err = refused(tmp_path, capsys, on, *flags)
    assert f"the rewards are of the labelers {' and '.join(sorted(map(str, labels)))}; --allow-mixed-labelers" in err
    pairs, _, _ = build(tmp_path, capsys, on, *flags, "--allow-mixed-labelers", "--on-ratio", 0)
    assert [pair["labeler"] for pair in pairs] == [labels[1]]  # that of its own file
    pairs, _, _ = build(tmp_path, capsys, on, *flags, "--on-ratio", 1, out="on.out.jsonl")  # one source: one labeler
    assert [pair["labeler"] for pair in pairs] == [labels[0]]


# ---- contamination

def test_excluded_prompts(tmp_path, capsys):
    questions = ["What happens to you if you eat watermelon seeds?", "Why do veins appear blue?", "Say hi", "Tell me more",
                 "Was ist Größe?", "!?"]
    rows = [{**row(f"p{k}", *off(1.0, 0.0)), "prompt": [{"role": "user", "content": text}]} for k, text in enumerate(questions)]
    rows[3]["prompt"] = [{"role": "user", "content": "Define DPO."}, {"role": "assistant", "content": "Say hi"}, *rows[3]["prompt"]]
    barred = write_rows(tmp_path / "barred.jsonl", [
        {"question": "what happens to you, if you eat\nwatermelon seeds", "type": "Adversarial"},  # as in TruthfulQA
        {"prompt": "Why do veins appear (blue)?"},
        {"messages": [{"role": "user", "content": "define dpo"}, {"role": "assistant", "content": "say hi"}]},
        {"instruction": "was ist GRÖSSE"}, {"instruction": "??? :-)"}, {"prompt": [{"role": "user", "content": "hi"}]}])
    pairs, printed, _ = build(tmp_path, capsys, rows, "--on-ratio", 0, "--exclude-prompts", barred)
    assert [pair["id"] for pair in pairs] == ["p2", "p5"] and printed["dropped"] == {"excluded": 4} and printed["rows"] == 6
    write_rows(tmp_path / "barred.jsonl", [{"question": "a"}, {"text": "b", "prompt": None}])
    (tmp_path / "pairs.jsonl").unlink()
    err = refused(tmp_path, capsys, rows, "--on-ratio", 0, "--exclude-prompts", barred)
    assert "barred.jsonl:2: expected a user turn under prompt, messages" in err


# ---- statistics: S1 Table 3, S3 Table 5, S1 Figs. 10 and 11

def test_stats_beyond_table_5(tmp_path, capsys):
    rows = [row("a", response("four", 1.0, token_ids=[1, 2, 3]), response("seven..", 3.0, token_ids=[1]), response("z", 2.0),
                response("cut", 9.0, finish="length")),
            row("b", response("x", -2.0), response("yy", -5.0))]
    _, _, printed = build(tmp_path, capsys, rows, "--on-ratio", 0, "--select", "given", "--stats")
    lines = {line.rsplit(None, 1)[0]: line.split()[-1] for line in printed.splitlines()[:-1]}
    table = {line[:28].strip(): line[28:].split() for line in printed.splitlines()[:-1]}
    assert table["all chosen tokens"][:2] == ["1", "3.00"] and table["off rejected characters"][:2] == ["2", "4.50"]
    assert lines["all margin <= 0"] == "50.0%" and lines["all chosen is longer"] == "0.0%" and lines["off model-off over model-off"] == "2"
    # S1 Table 3's "Avg. reward": of all usable responses (1 + 3 + 2 - 2 - 5) / 5, of pair members (1 + 3 - 2 - 5) / 4, of a side
    means = [lines[f"mean reward of {name}"] for name in ("all usable off-policy", "pair members", "chosen", "rejected")]
    assert means == ["-0.20", "-0.75", "-0.50", "-1.00"]


def test_hot_samples_keep_their_cut_responses(tmp_path, capsys):
    """S1 Table 3: at temperature 2 and 3 most samples run into the limit; --truncated keep leaves a set to train on."""
    rows = [row(f"p{k}", response("a", 1.0, "on", finish="length"), response("b", 0.0, "on", finish="length")) for k in range(3)]
    assert "dropped: {'on: truncated': 3}" in refused(tmp_path, capsys, rows, "--on-ratio", 1)
    pairs, _, _ = build(tmp_path, capsys, rows, "--on-ratio", 1, "--truncated", "keep")
    assert [pair["chosen_finish"] for pair in pairs] == ["length"] * 3


# ---- flags

@pytest.mark.parametrize("flags, sentence", [
    (["--eta", "0.9"], "--eta belongs to --select threshold"), (["--tau", "1"], "--tau belongs to --select threshold"),
    (["--tiers", "best/low"], "--tiers belongs to --select tiers"), (["--gap", "0", "1"], "--gap belongs to --select gap"),
    (["--chosen", "0", "1"], "--chosen belongs to --select gap"), (["--ranks", "1", "2"], "--ranks belongs to --select ranks"),
    (["--select", "gap", "--gap", "0", "1"], "--select gap needs --gap LO HI and --chosen LO HI"),
    (["--select", "gap", "--gap", "2", "1", "--chosen", "0", "1"], "with LO <= HI"),
    (["--select", "gap", "--gap", "nan", "1", "--chosen", "0", "1"], "with LO <= HI"),
    (["--select", "ranks"], "--select ranks needs --ranks A B"), (["--select", "ranks", "--ranks", "2", "2"], "--select ranks needs"),
    (["--select", "ranks", "--ranks", "0", "2"], "--select ranks needs"), (["--select", "tiers", "--tiers", "low/best"], "invalid choice"),
    (["--select", "threshold", "--eta", "0.4"], "--eta must lie in [0.5, 1)"), (["--select", "threshold", "--eta", "1"], "--eta must lie"),
    (["--select", "threshold", "--tau", "0"], "--tau must be above 0"),
    (["--select", "threshold", "--tau", "nan"], "--tau must be above 0"),
    (["--filter", "quality"], "--filter must be NAME:P"),
    (["--filter", "quality:0"], "P in (0, 1]"),
    (["--filter", "quality:0.0"], "P in (0, 1]"),
    (["--filter", "quality:1.1"], "P in (0, 1]"),
    (["--filter", "length:0.5"], "NAME of quality, onpolicy"),
    (["--filter", "quality:nan"], "P in (0, 1]"),
    (["--replace", "0"], "--replace must lie in (0, 1]"),
    (["--replace", "1.5"], "--replace must lie"),
    (["--replace", "nan"], "--replace must lie"),
    (["--replace", "0.1", "--on-ratio", "0.5"], "--on-ratio has no part in"),
    (["--replace", "0.1", "--mix", "exclusive"], "--mix has no part in"),
    (["--mix", "cross", "--on-ratio", "0.5"], "--on-ratio has no part in"),
    (["--mix", "cross", "--select", "given"], "--select given has no part in"),
    (["--replace", "0.1", "--select", "threshold"], "need one pair a prompt"),
    (["--swap-rejected", "x", "--select", "threshold"], "need one pair a prompt"),
    (["--replace", "0.1", "--swap-rejected", "x"], "take one"), (["--replace-rule", "rejected"], "--replace-rule belongs to --replace"),
    (["--inverted", "drop"], "--inverted belongs to"), (["--inverted", "flip", "--replace", "0.1"], "--inverted belongs to"),
    (["--on-ratio", "auto"], "need each other"), (["--boundary", "b.json"], "need each other"),
    (["--boundary", "b.json", "--on-ratio", "0.5"], "need each other"), (["--on-ratio", "some"], "--on-ratio"),
    (["--total", "0"], "--total must be at least 1"),
    (["--on-ratio", "1", "--select", "relabel"], "--select relabel is about off-policy pairs"),
    (["--on-ratio", "0", "--exclude-prompts", "absent.jsonl"], "absent.jsonl: expected JSON lines, found no such file"),
    (["--on-ratio", "0", "--swap-rejected", "absent.jsonl"], "absent.jsonl: expected JSON lines, found no such file"),
    (["--on-ratio", "auto", "--boundary", "absent.json"], "absent.json: expected a result of boundary.py")])
def test_a_flag_that_would_be_ignored_or_is_wrong(tmp_path, capsys, flags, sentence):
    assert sentence in refused(tmp_path, capsys, both(4), *flags)


@pytest.mark.parametrize("flags, source", [(["--replace", "0.5"], "on"), (["--mix", "cross"], "on"), (["--mix", "concat"], "on")])
def test_a_source_that_is_missing(tmp_path, capsys, flags, source):
    assert f"needs {source}-policy responses, and there are none" in refused(tmp_path, capsys, [row("p", *off(1.0, 0.0))], *flags)


@pytest.mark.parametrize("flags", [[], ["--mix", "concat", "--total", "15"], ["--mix", "cross", "--total", "9"], ["--replace", "0.3"],
                                   ["--filter", "random:0.4"], ["--select", "best-random", "--total", "7"]])
def test_every_draw_is_blind_to_the_order_of_rows_and_bound_to_the_seed(tmp_path, capsys, flags):
    rows = [row(f"p{k}", *off(1.0, 0.0, 0.5), *(response(f"on{j}", 1.5 - j, "on") for j in range(3))) for k in range(20)]
    runs = {}
    for name, lines, seed in (("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)):
        pairs, _, _ = build(tmp_path, capsys, lines, *flags, "--seed", seed, out=f"{name}.jsonl", name=f"{name}_in.jsonl")
        runs[name] = {pair["pair_id"]: pair for pair in pairs}
        assert len(runs[name]) == len(pairs) == len(runs["a"])
    assert runs["a"] == runs["b"] and runs["a"].keys() != runs["c"].keys() or "best-random" in flags and runs["a"] != runs["c"]
