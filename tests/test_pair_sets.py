"""
build_pairs.py: the data sets that tables and figures of S1 and S2 were trained on, by hand-made numbers.

Covers  every --select rule, given and relabel (S2's PC_off), samples of another model (PC_llama); sets of one
        size on the same prompts (S1 Table 2, Fig. 4), mixed by a boundary score; --filter and Fig. 6 against
        a plain second computation, with --reward, --total and without its column; the statistics of such
        sets; cut samples (S1 Table 3); labelers; a missing source; flags; blindness to the order of rows.
Run     python -m pytest tests/test_pair_sets.py
"""

import hashlib
import json
import math
import random
import statistics
from fractions import Fraction

import pytest
from conftest import read_rows, write_rows

import boundary
import build_pairs


def response(text, reward, source="off", **more):
    common = {"text": text, "source": source, "model": f"model-{source}", "finish": "stop"}
    return {**common, "reward": reward, **more}


def row(prompt_id, *responses, **more):
    prompt = [{"role": "user", "content": f"question {prompt_id}"}]
    return {"id": prompt_id, "prompt": prompt, "responses": list(responses), **more}


def off(*rewards):
    """Off-policy responses r0, r1, ... with these rewards."""
    return [response(f"r{k}", reward) for k, reward in enumerate(rewards)]


def on(*rewards):
    """On-policy responses s0, s1, ... with these rewards."""
    return [response(f"s{k}", reward, "on") for k, reward in enumerate(rewards)]


def both(count):
    """Rows with one on-policy pair, s0 over s1, and one off-policy pair, r0 over r1."""
    return [row(f"p{k}", *on(3.0, 1.0), *off(2.0, 0.0)) for k in range(count)]


def gaussian(count, seed=0):
    """Rows with two responses of either source and rewards without ties."""
    draw = random.Random(seed).gauss
    return [row(f"p{k}", *on(draw(0, 1), draw(0, 1)), *off(draw(0, 1), draw(0, 1))) for k in range(count)]


def runner(tmp_path, capsys, script):
    """build(rows, flags): (pairs, last line as JSON) of a run, or its sentence where it is to be refused."""

    def build(rows, *flags, files=(), out="pairs.jsonl", expect=0):
        paths = [write_rows(tmp_path / "scored.jsonl", rows)]
        paths += [write_rows(tmp_path / f"scored{k}.jsonl", more) for k, more in enumerate(files, 1)]
        flags = ["--scored", *paths, "--out", tmp_path / out, *flags]
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        try:
            script.main(script.parse_args(list(map(str, flags))))
            status = 0
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        assert status == expect, printed.err
        if expect:
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
            return printed.err
        return read_rows(tmp_path / out), json.loads(printed.out.splitlines()[-1])

    return build


@pytest.fixture
def build(tmp_path, capsys):
    return runner(tmp_path, capsys, build_pairs)


def texts(pairs):
    return {pair["pair_id"]: (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs}


def ids(pairs, source=None):
    return {pair["id"] for pair in pairs if not source or pair["source"] == source}


def drawn(prompt_ids, stage="mix", seed=0):
    """The order of a draw: by the first 8 bytes of sha256("seed|stage|id")."""
    digest = {name: hashlib.sha256(f"{seed}|{stage}|{name}".encode()).digest()[:8] for name in prompt_ids}
    return sorted(digest, key=digest.get)


# ----- the rules
@pytest.mark.parametrize(
    "rule, expected", [("best-worst", ("r1", "r3")), ("given", ("r0", "r1")), ("relabel", ("r1", "r0"))]
)
def test_each_rule_by_hand(build, rule, expected):
    rows = [row("p", *off(0.0, 2.0, -3.0, -6.0, 1.5))]
    pairs, _ = build(rows, "--on-ratio", 0, "--select", rule)
    assert texts(pairs) == {"p:off": expected}


def test_given_and_relabel(build):
    same = [response("x", 1.0), response("x ", 0.0)]
    rewards = {"right": (1.0, 0.0, 9.0), "flipped": (0.0, 1.0, -9.0), "tie": (1.0, 1.0), "fine": (3.0, 2.0)}
    rows = [row(name, *off(*three), *on(0.0, 1.0)) for name, three in rewards.items()]
    rows.append(row("same", *same, *on(0.0, 1.0)))
    # a third response does not stand in for one of the pair
    rows.append(row("gap", response("", 1.0), *off(0.0, 2.0), *on(0.0, 1.0)))
    rows.append(row("cut", response("x", 1.0, finish="length"), *off(0.0, 2.0), *on(0.0, 1.0)))
    dropped = {"off: identical": 1, "off: empty": 1, "off: truncated": 1}

    pairs, printed = build(rows, "--on-ratio", 0, "--select", "relabel")
    right, flipped = ("r0", "r1"), ("r1", "r0")
    assert texts(pairs) == {"right:off": right, "flipped:off": flipped, "fine:off": right}
    assert printed["dropped"] == {**dropped, "off: tie": 1}
    # given keeps the tie, whose order is the data set's
    pairs, printed = build(rows, "--on-ratio", 0, "--select", "given")
    assert ids(pairs) == {"right", "flipped", "tie", "fine"} and set(texts(pairs).values()) == {right}
    assert printed["dropped"] == dropped
    # on-policy samples have no given order
    pairs, _ = build(rows, "--on-ratio", 0.5, "--select", "given")
    assert sorted(texts(pairs).values()) == [right] * 2 + [("s1", "s0")] * 2


def test_given_needs_no_reward_and_a_filter_does(build):
    rows = [row("p", *off(None, None)), row("q", response("a", None), response("", None))]
    for line in rows:
        for one in line["responses"]:
            del one["reward"]
    pairs, printed = build(rows, "--on-ratio", 0, "--select", "given")
    assert texts(pairs) == {"p:off": ("r0", "r1")} and printed["dropped"] == {"off: empty": 1}
    assert pairs[0]["chosen_reward"] is None and pairs[0]["labeler"] is None
    err = build(rows, "--on-ratio", 0, "--select", "given", "--filter", "quality:1", expect=2)
    assert "scored.jsonl: no pair has the values for --filter quality; run score.py first\n" in err


def test_samples_of_another_model_are_off_policy_pairs(build):
    """S2's PC_llama: two samples of a stronger model, its best over its worst; PC_on: two of the model."""
    rows = [row("p", response("llama b", 0.5), response("llama a", 1.5), *on(1.0, 2.0))]
    for ratio, expected in ((0, {"p:off": ("llama a", "llama b")}), (1, {"p:on": ("s1", "s0")})):
        pairs, _ = build(rows, "--on-ratio", ratio)
        assert texts(pairs) == expected


# ----- sets of one size (S1 Table 2, Fig. 4)
def test_every_share_has_the_same_number_of_pairs_on_the_same_prompts(build):
    rows = [row("only off", *off(1.0, 0.0)), *both(12), row("only on", *on(1.0, 0.0))]
    first = drawn([f"p{k}" for k in range(12)])[:9]
    for ratio, n_on in ((0, 0), (0.1, 1), (0.5, 5), (0.9, 8), (1, 9)):
        pairs, printed = build(rows, "--on-ratio", ratio, "--total", 9)
        assert ids(pairs) == set(first) and ids(pairs, "on") == set(first[:n_on])
        assert printed["dropped"] == {"off: no response": 1, "on: no response": 1}
        assert (printed["on"], printed["off"]) == (n_on, 9 - n_on)


def test_the_boundary_score_as_the_share(build, tmp_path):
    """Where boundary.py finds on-policy responses ahead in 3 of 4 comparisons, 3 of 4 pairs are on-policy."""
    path, out = write_rows(tmp_path / "all.jsonl", both(20)), tmp_path / "boundary.json"
    boundary.main(boundary.parse_args(["--scored", path, "--out", str(out)]))
    result = json.loads(out.read_text())
    assert (result["v_on"], result["v_off"], result["score"]) == (60, 20, 0.75)
    pairs, printed = build(both(20), "--on-ratio", result["score"])
    assert (printed["on"], printed["off"]) == (15, 5) and len(ids(pairs)) == 20


# ----- filters (S1 section 5.3, Fig. 5)
FILTERED = {  # rewards and log-probabilities of chosen and rejected, cosine
    "p0": (9.0, 8.0, -30.0, -30.0, 0.8),
    "p1": (3.0, 1.0, -5.0, -6.0, 0.9),
    "p2": (6.0, -6.0, -40.0, -15.0, 0.7),
    "p3": (2.0, 1.0, -20.0, -20.0, -0.95),
}


def filtered():
    """Four pairs of which each filter prefers another one; a response in neither comes first."""
    rows = []
    for prompt_id, (better, worse, logp_better, logp_worse, cosine) in FILTERED.items():
        responses = response("fair", (better + worse) / 2), response("bad", worse, logp=logp_worse)
        matrix = [[1.0, 0.3, 0.4], [0.3, 1.0, cosine], [0.4, cosine, 1.0]]
        rows.append(row(prompt_id, *responses, response("good", better, logp=logp_better), cosine=matrix))
    return rows


@pytest.mark.parametrize(
    "name, order",
    [
        ("quality", ["p0", "p1", "p3", "p2"]),  # 17, 4, 3, 0
        ("onpolicy", ["p1", "p3", "p2", "p0"]),  # -11, -40, -55, -60
        ("contrast", ["p2", "p1", "p0", "p3"]),  # 12, 2, 1, 1: equals by id
        ("similarity", ["p3", "p2", "p0", "p1"]),
    ],
)
def test_each_filter_keeps_its_pairs_and_is_nested(build, name, order):
    for share, count in ((0.25, 1), (0.49, 1), (0.5, 2), (0.74, 2), (0.75, 3), (1, 4)):
        pairs, printed = build(filtered(), "--on-ratio", 0, "--filter", f"{name}:{share}")
        assert [pair["id"] for pair in pairs] == sorted(order[:count])  # in the order of the input
        assert printed["filter"] == {"kept": count, "of": 4, "without_value": 0}
        assert (printed["pairs"], printed["prompts_with_pairs"]) == (count, 4)
    assert [pair["cosine"] for pair in pairs] == [0.8, 0.9, 0.7, -0.95]


def test_the_cosine_of_a_second_file(build):
    """A row's matrix is about the responses of its own file."""
    samples = [row(f"p{k}", *on(1.0, 0.0), cosine=[[1, 0.5], [0.5, 1]]) for k in range(4)]
    flags = "--on-ratio", 0, "--filter", "similarity:0.25"
    for first, second in ((samples, filtered()), (filtered(), samples)):
        pairs, _ = build(first, *flags, files=[second])
        assert [(pair["id"], pair["source"], pair["cosine"]) for pair in pairs] == [("p3", "off", -0.95)]


def test_a_filter_of_pairs_without_its_column(build):
    for name, scorer in (("onpolicy", "logp"), ("similarity", "embed")):
        rows = filtered()
        del rows[2]["responses"][1]["logp"]
        rows[2]["cosine"] = None
        pairs, printed = build(rows, "--on-ratio", 0, "--filter", f"{name}:1")
        assert ids(pairs) == {"p0", "p1", "p3"}
        assert printed["filter"] == {"kept": 3, "of": 3, "without_value": 1}
        # shares are of the pairs that have a value: floor(.5 * 3)
        pairs, _ = build(rows, "--on-ratio", 0, "--filter", f"{name}:0.5")
        assert len(pairs) == 1
        for line in rows:
            line["cosine"] = [[None] * 3] * 3
            line["responses"][2]["logp"] = None
        err = build(rows, "--on-ratio", 0, "--filter", f"{name}:0.5", out=f"{name}.jsonl", expect=2)
        assert f"no pair has the values for --filter {name}; run scorers/{scorer}.py first\n" in err


def test_the_random_filter_is_exact_nested_and_bound_to_the_seed(build):
    before = set()
    for share, count in ((0.1, 10), (0.29, 29), (0.5, 50)):  # 0.29 * 100 is 28.999999999999996
        pairs, _ = build(both(100), "--on-ratio", 0, "--filter", f"random:{share}")
        assert len(pairs) == count and before < ids(pairs)
        before = ids(pairs)
    backwards, _ = build(both(100)[::-1], "--on-ratio", 0, "--filter", "random:0.5")
    assert ids(backwards) == before
    other, _ = build(both(100), "--on-ratio", 0, "--filter", "random:0.5", "--seed", 1)
    assert ids(other) != before
    # nor is it the draw of the mixing, of which the first would then always be kept
    assert before != set(drawn([f"p{k}" for k in range(100)])[:50])


def test_equal_values_are_kept_by_id_and_an_on_ratio_of_1_filters_on_policy_pairs(build):
    rows = both(9)
    for order in (1, -1):
        pairs, _ = build(rows[::order], "--on-ratio", 1, "--filter", "quality:0.34")
        assert ids(pairs) == ids(pairs, "on") == {"p0", "p1", "p2"}
    rows[5]["responses"][0]["reward"] = 9.0  # on-policy
    rows[7]["responses"][2]["reward"] = 9.0  # off-policy
    for ratio, expected in ((0, "p7"), (1, "p5")):
        pairs, _ = build(rows, "--on-ratio", ratio, "--filter", "quality:0.12")
        assert ids(pairs) == {expected}


def test_a_filter_looks_at_the_reward_that_is_taken(build):
    rows = []
    for k, judged in enumerate((None, 6, 7, 8)):  # by reward the contrast falls from p0 to p3
        better, worse = (
            response("a", 2.0 - k / 8, scores={"judge": judged}),
            response("b", 0.0, scores={"judge": 5}),
        )
        rows.append(row(f"p{k}", better, worse, labeler="rm:A"))
    flags = "--on-ratio", 0, "--filter", "contrast:0.5"
    pairs, _ = build(rows, *flags)
    assert ids(pairs) == {"p0", "p1"} and {pair["labeler"] for pair in pairs} == {"rm:A"}
    pairs, printed = build(rows, *flags, "--reward", "judge")
    assert ids(pairs) == {"p3"} and printed["dropped"] == {"off: without reward": 1}
    assert (pairs[0]["chosen_reward"], pairs[0]["rejected_reward"], pairs[0]["labeler"]) == (8, 5, "judge")


def test_a_filter_and_a_total(build):
    rows = gaussian(40)
    kept, _ = build(rows, "--on-ratio", 0, "--filter", "quality:0.5")
    few, _ = build(rows, "--on-ratio", 0, "--filter", "quality:0.5", "--total", 7)
    assert ids(few) == set(drawn(ids(kept))[:7])
    err = build(rows, "--on-ratio", 0, "--filter", "quality:0.5", "--total", 21, out="b.jsonl", expect=2)
    assert "expected 21 pairs, found 20: " in err and '"filter": {"kept": 20, "of": 40' in err


# ----- Fig. 6: filtered off-policy pairs and as many on-policy pairs of other prompts
def test_fig_6_by_hand(build):
    rows = both(10)
    for k, line in enumerate(rows):
        line["responses"][2]["reward"] += k  # the best off-policy pairs are those of p9, p8, p7, p6
    pairs, printed = build(rows, "--on-ratio", 0.5, "--filter", "quality:0.4")
    assert ids(pairs, "off") == {"p6", "p7", "p8", "p9"}
    assert len(ids(pairs, "on")) == 4 and not ids(pairs, "on") & ids(pairs, "off")
    # the fewest pairs of which the kept 4 are the off-policy ones: of 6 floor(1.8 + .5) = 2 are on-policy
    _, printed = build(rows, "--on-ratio", 0.3, "--filter", "quality:0.4")
    assert (printed["on"], printed["off"], printed["filter"]["kept"]) == (2, 4, 4)
    # 7 of 10 kept, 7 more on-policy ones, and 3 prompts are left
    err = build(rows, "--on-ratio", 0.5, "--filter", "quality:0.7", out="b.jsonl", expect=2)
    assert "scored.jsonl: expected 14 pairs, found 8: {" in err and '"filter": {"kept": 7, "of": 10, ' in err
    # 7 on-policy pairs cannot be had of 6 prompts, and no off-policy pair stands in for one
    flags = "--on-ratio", 0.7, "--filter", "quality:0.4", "--total", 10
    assert "expected 10 pairs, found 9: {" in build(rows, *flags, out="b.jsonl", expect=2)


@pytest.mark.parametrize("name", ["quality:0", "quality:0.1", "random:0.2"])
def test_fig_6_where_the_filter_keeps_nothing(build, name):
    err = build(both(4), "--on-ratio", 0.5, "--filter", name, expect=2)
    assert "found 0: {" in err and '"filter": {"kept": 0, ' in err


def fig_6(rows, ratio, share, total, seed):
    """({ids of on-policy pairs}, {ids of off-policy pairs}) by exact fractions."""
    quality = {line["id"]: sum(one["reward"] for one in line["responses"][2:]) for line in rows}
    best = sorted(quality, key=quality.get, reverse=True)[: math.floor(share * len(rows))]
    order = drawn(quality, seed=seed)
    kept = [prompt_id for prompt_id in order if prompt_id in best]
    others = [prompt_id for prompt_id in order if prompt_id not in best]
    n_on = {n: math.floor(ratio * n + Fraction(1, 2)) for n in range(len(rows) + 1)}
    if not total:  # the first that takes all that was kept
        total = next(n for n in n_on if n - n_on[n] == len(kept))
    return set(others[: n_on[total]]), set(kept[: total - n_on[total]])


@pytest.mark.parametrize("total, seed", [(None, 0), (11, 5)])
@pytest.mark.parametrize(
    "ratio, share",
    [
        ("0.5", "0.4"),
        ("0.3", "0.29"),
        ("0.145", "0.5"),
        ("0.7", "0.2"),
        ("0.25", "0.15"),
        ("0.01", "0.9"),
    ],
)
def test_fig_6_against_a_second_computation(build, ratio, share, total, seed):
    rows = gaussian(100)
    flags = ["--on-ratio", ratio, "--filter", f"quality:{share}", "--seed", seed]
    pairs, printed = build(rows, *flags, *(["--total", total] if total else []))
    expected = fig_6(rows, Fraction(ratio), Fraction(share), total, seed)
    assert (ids(pairs, "on"), ids(pairs, "off")) == expected
    assert (printed["on"], printed["off"]) == tuple(map(len, expected))


@pytest.mark.parametrize("ratio", ["0.001", "0.1", "0.3", "0.5", "0.7", "0.875", "0.9", "0.999"])
def test_the_total_of_fig_6_solves_its_equation(ratio):
    """The first N with N - round(R N) = kept, by exact fractions and a plain search."""
    candidates = {f"p{k}": {"on": f"on {k}", "off": f"off {k}"} for k in range(40)}
    share, total = Fraction(ratio), 0
    for n_kept in range(40):
        kept = set(list(candidates)[:n_kept])
        left, found = build_pairs.mix_filtered(candidates, kept, float(ratio))
        while total - math.floor(share * total + Fraction(1, 2)) < n_kept:
            total += 1
        assert found == total
        assert {name for name in left if "off" in left[name]} == kept and all(map(len, left.values()))
        assert sum(map(len, left.values())) == 40
    for whole in (0, 1):
        left, found = build_pairs.mix_filtered(candidates, kept, whole)
        assert found == 39 and left == {name: candidates[name] for name in kept}


# ----- statistics (S1 Table 3, Figs. 5 and 6), cut samples, labelers
def test_the_record_has_the_statistics_of_the_pairs_that_were_kept(build, tmp_path):
    rows = gaussian(30)
    pairs, _ = build(rows, "--on-ratio", 0.5, "--filter", "contrast:0.3")
    table = json.loads((tmp_path / "pairs.meta.json").read_text())["stats"]
    chosen, rejected = ([pair[f"{side}_reward"] for pair in pairs] for side in ("chosen", "rejected"))
    expected = {
        "chosen reward": chosen,
        "rejected reward": rejected,
        "reward of both sides": chosen + rejected,
    }
    expected["gap"] = [better - worse for better, worse in zip(chosen, rejected)]
    expected["reward of all samples"] = [one["reward"] for line in rows for one in line["responses"]]
    assert len(pairs) == 18 and len(expected["reward of all samples"]) == 120
    for name, values in expected.items():
        quartiles = statistics.quantiles(values, method="inclusive")
        assert list(table[name].values()) == pytest.approx(
            [
                len(values),
                statistics.fmean(values),
                statistics.pstdev(values),
                min(values),
                *quartiles,
                max(values),
            ]
        )


def test_a_given_pair_may_have_a_negative_gap(build, tmp_path):
    rows = [row("a", *off(1.0, 3.0, 2.0)), row("b", *off(-2.0, -5.0))]
    build(rows, "--on-ratio", 0, "--select", "given")
    table = json.loads((tmp_path / "pairs.meta.json").read_text())["stats"]
    # S1 Table 3's "Avg. reward": (1 + 3 + 2 - 2 - 5) / 5 of all samples, (1 + 3 - 2 - 5) / 4 of both sides
    names = "gap", "reward of all samples", "reward of both sides", "chosen reward", "rejected reward"
    assert [table[name]["mean"] for name in names] == pytest.approx([0.5, -0.2, -0.75, -0.5, -1.0])
    assert (table["gap"]["min"], table["gap"]["max"]) == (-2.0, 3.0)


def test_hot_samples_keep_their_cut_responses(build):
    """S1 Table 3: at temperature 2 and 3 most samples run into the limit; then these are what is left."""
    cut = {"finish": "length"}
    rows = [row(f"p{k}", response("a", 1.0, "on", **cut), response("b", 0.0, "on", **cut)) for k in range(3)]
    assert '"on: truncated": 3' in build(rows, "--on-ratio", 1, expect=2)
    pairs, printed = build(rows, "--on-ratio", 1, "--truncated", "keep")
    assert [pair["chosen_finish"] for pair in pairs] == ["length"] * 3 and printed["dropped"] == {}


@pytest.mark.parametrize("labelers", [("rm:A", "rm:B"), ("rm:A", None)])
def test_rows_of_one_file_with_different_labelers(build, labelers):
    rows = [{**line, "labeler": labeler} for line, labeler in zip(both(2), labelers)]
    names = " and ".join(sorted(map(str, labelers)))
    assert f"scored.jsonl: rewards of different labelers: {names}" in build(rows, expect=2)
    for one in rows[1]["responses"]:
        one["reward"] = None  # nothing that could be compared
    pairs, _ = build(rows)
    assert ids(pairs) == {"p0"} and pairs[0]["labeler"] == "rm:A"


# ----- flags
@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            ["--filter", "quality"],
            "expected quality|contrast|onpolicy|similarity|random:P with P in [0, 1], found 'quality'",
        ),
        (["--on-ratio-of", "a=1"], "unrecognized arguments: --on-ratio-of a=1"),
        (["--filter", "quality:1.1"], "found 'quality:1.1'"),
        (["--filter", "quality:-0.1"], "found 'quality:-0.1'"),
        (["--filter", "quality:nan"], "found 'quality:nan'"),
        (["--filter", ":0.5"], "found ':0.5'"),
        (["--filter", "length:0.5"], "random:P with P in [0, 1], found 'length:0.5'"),
        (["--filter", "quality=0.5"], "found 'quality=0.5'"),
        (["--filter", "quality:0", "--on-ratio", "0"], "expected some pairs, found 0: "),
        (
            ["--select", "relabel", "--on-ratio", "1"],
            "--select relabel chooses among off-policy responses, but --on-ratio 1 uses none",
        ),
        (["--total", "5"], "expected 5 pairs, found 4: "),
        # what the first version had, and names that are not whole
        (["--select", "threshold"], "argument --select: invalid choice: 'threshold'"),
        (["--select", "best-random"], "argument --select: invalid choice: 'best-random'"),
        (["--on-ratio", "auto"], "argument --on-ratio: invalid float value: 'auto'"),
        (["--mix", "cross"], "unrecognized arguments: --mix cross"),
        (["--replace", "0.1"], "unrecognized arguments: --replace 0.1"),
        (["--filt", "quality:1"], "unrecognized arguments: --filt quality:1"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_flag_that_would_be_ignored_or_is_wrong(build, flags, sentence):
    assert sentence in build(both(4), *flags, expect=2)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "--on-ratio 0.5 needs on-policy responses"),
        (["--filter", "quality:1"], "--on-ratio 0.5 needs on-policy responses"),
        (["--on-ratio", "1"], "--on-ratio 1.0 needs on-policy responses"),
        (["--on-ratio", "1", "--filter", "random:1"], "--on-ratio 1.0 needs on-policy responses"),
    ],
)
def test_a_source_that_is_missing(build, flags, sentence):
    rows = [row("p", *off(1.0, 0.0)), row("q", *off(1.0, 0.0))]
    assert f"scored.jsonl: {sentence}, but the files have none" in build(rows, *flags, expect=2)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--on-ratio", 0.3, "--total", 9],
        ["--on-ratio", 1, "--total", 7],
        ["--filter", "random:0.4"],
        ["--filter", "quality:0.4", "--total", 6],
        ["--on-ratio", 0, "--filter", "random:0.4"],
        ["--on-ratio", 0.3, "--select", "relabel"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_draw_is_blind_to_the_order_of_rows_and_bound_to_the_seed(build, flags):
    rows = gaussian(20)
    pairs, _ = build(rows, *flags)
    backwards, _ = build(rows[::-1], *flags)
    other, _ = build(rows, *flags, "--seed", 1)
    assert backwards == pairs[::-1] and len(other) == len(pairs)
    assert texts(other).keys() != texts(pairs).keys()
