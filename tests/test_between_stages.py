"""
What one stage writes is what the next one needs: files of several sources and scorers meet.

Covers  S3 Table 1's pool from two data sets whose turns have their keys in another order; HelpSteer2 to pairs
        (S1 Table 2); DPO-Mix-P's pair from two files; old verdicts that must not travel with new samples;
        labelers; wins of one and of two files; texts that cannot be written; what is said of responses
        without a result; sampled token ids from generate.py into training.
Run     python -m pytest tests/test_between_stages.py
"""

import json

import pytest
from conftest import read_rows, write_rows

import boundary
import build_pairs
import evaluate
import generate
import score
import train_dpo
from chat import read_chat
from data import import_responses
from scorers import verify


def run(script, *flags, expect=None):
    """main of a script, which must end with the status `expect` where one is given."""
    args = script.parse_args([str(flag) for flag in flags])
    status = None
    try:
        score.main(args, verify.Verify) if script is verify else script.main(args)
    except SystemExit as end:
        status = end.code
    assert status == expect


def import_rows(kind, path, out):
    run(import_responses, "--format", kind, "--data", path, "--out", out)
    return read_rows(out)


def verify_answers(*files, out, flags=(), expect=None):
    run(verify, *flags, "--responses", *files, "--out", out, expect=expect)


def response(text, reward, source="off", model="m", **more):
    known = {"text": text, "source": source, "model": model, "finish": "stop"}
    return {**known, "reward": reward, "scores": {"rm": reward}, **more}


def row(name, *responses, **more):
    prompt = [{"role": "user", "content": f"question {name}"}]
    return {"id": name, "prompt": prompt, "responses": list(responses), **more}


def texts(pair):
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


def test_two_data_sets_with_keys_in_another_order_are_one_pool(tmp_path):
    question = [{"content": "why", "role": "user"}]  # as the hub's parquet may order them
    binarized = {"prompt_id": "x"}
    for side, text in (("chosen", "it is 5"), ("rejected", "it is 4")):
        binarized[side] = [*question, {"content": text, "role": "assistant"}]
    completions = [{"model": f"m{k}", "response": f"so {k}"} for k in range(4)]
    original = {"source": "evol", "instruction": "why", "completions": completions}
    imported = {}
    for name, line in (("ultrafeedback_binarized", binarized), ("ultrafeedback", original)):
        path = write_rows(tmp_path / f"{name}.in.jsonl", [line])
        (imported[name],) = import_rows(name, path, tmp_path / f"{name}.jsonl")
    both = imported["ultrafeedback_binarized"]
    both |= {"id": imported["ultrafeedback"]["id"], "answer": "5", "prompt": question}
    write_rows(tmp_path / "b.jsonl", [both])
    verify_answers(tmp_path / "b.jsonl", tmp_path / "ultrafeedback.jsonl", out=tmp_path / "s.jsonl")
    (scored,) = read_rows(tmp_path / "s.jsonl")
    assert [one["reward"] for one in scored["responses"]] == [1, 0, 0, 0, 0, 0]
    assert scored["dataset"] == "evol" and scored["prompt"] == [{"role": "user", "content": "why"}]


ASPECTS = "helpfulness", "correctness", "coherence", "complexity", "verbosity"


def test_helpsteer2_to_pairs_drops_ties_whatever_their_rounding(tmp_path, capsys):
    # .45 = .55 * 3 - .4 * 3, which in floating point is 0.44999999999999996; then 4.4 over 1.5
    assert 0.55 * 3 - 0.4 * 3 < 0.45
    rows = []
    for prompt, text, scores in (
        ("tie", "a", (0, 0, 1, 0, 0)),
        ("tie", "b", (0, 0, 0, 3, 3)),
        ("q", "good", (3, 3, 1, 0, 1)),
        ("q", "bad", (1, 1, 1, 0, 1)),
    ):
        rows.append({"prompt": prompt, "response": text, **dict(zip(ASPECTS, scores, strict=True))})
    path, out = tmp_path / "h.jsonl", tmp_path / "p.jsonl"
    import_rows("helpsteer2", write_rows(tmp_path / "h.in.jsonl", rows), path)
    run(build_pairs, "--scored", path, "--reward", "helpsteer2", "--on-ratio", 0, "--out", out)
    (pair,) = read_rows(out)
    assert texts(pair) == ("good", "bad") and pair["labeler"] == "helpsteer2"
    assert (pair["chosen_reward"], pair["rejected_reward"]) == (4.4, 1.5)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dropped"] == {"off: tie": 1}


def test_a_mix_p_pair_comes_from_its_two_files(tmp_path):
    def sampled(number, text):
        return row(f"p{number}", {"text": text, "source": "on", "model": "policy"}, answer=str(number))

    first = write_rows(tmp_path / "0.jsonl", [sampled(k, f"is {k}") for k in range(3)])
    second = write_rows(tmp_path / "1.jsonl", [sampled(0, "no"), sampled(1, "no"), sampled(2, "is 7")])
    verify_answers(first, second, out=tmp_path / "s.jsonl")
    run(build_pairs, "--scored", tmp_path / "s.jsonl", "--on-ratio", 1, "--out", tmp_path / "p.jsonl")
    pairs = {pair["id"]: texts(pair) for pair in read_rows(tmp_path / "p.jsonl")}
    assert pairs == {"p0": ("is 0", "no"), "p1": ("is 1", "no"), "p2": ("is 2", "is 7")}


def test_new_samples_come_without_old_verdicts(tmp_path, policy):
    verdicts = {"wins": [[None, 0.1], [0.9, None]], "cosine": [[1, 0.5], [0.5, 1]], "labeler": "pairrm:x"}
    old = row("p", response("a", 1.0), response("b", 2.0), answer="7", **verdicts)
    path, out = write_rows(tmp_path / "old.jsonl", [old]), tmp_path / "new.jsonl"
    flags = "--n", 3, "--max-tokens", 4, "--backend", "hf"
    run(generate, "--model", policy, "--prompts", path, "--out", out, *flags)
    (new,) = read_rows(out)
    assert not verdicts.keys() & new.keys() and new["answer"] == "7" and len(new["responses"]) == 3
    (new,) = import_rows("rows", path, tmp_path / "rows.jsonl")
    assert not verdicts.keys() & new.keys()


WINRATE = "--model", "m-on", "--baseline", "m-off"


def two_files(tmp_path, on=None, off=None, **both):
    """Paths of the on- and the off-policy responses of one prompt; on, off, both: more keys of the rows."""
    mine = [response("a", 5.0, "on", "m-on"), response("b", 4.0, "on", "m-on")]
    theirs = [response("c", 1.0, "off", "m-off"), response("d", 0.0, "off", "m-off")]
    first, second = row("p", *mine, **both, **(on or {})), row("p", *theirs, **both, **(off or {}))
    return write_rows(tmp_path / "on.jsonl", [first]), write_rows(tmp_path / "off.jsonl", [second])


@pytest.mark.parametrize("other", ["rm:B", None])
@pytest.mark.parametrize(
    "script, flags",
    [
        (verify, ["--name", "x", "--responses"]),
        (boundary, ["--scored"]),
        (evaluate, [*WINRATE, "--scored"]),
        (build_pairs, ["--scored"]),
        (build_pairs, ["--reward", "rm", "--scored"]),
        (build_pairs, ["--on-ratio", 1, "--scored"]),
        (build_pairs, ["--on-ratio", 0, "--select", "given", "--scored"]),
    ],
    ids=lambda part: " ".join(map(str, part[:-1])) if isinstance(part, list) else part.__name__,
)
def test_rewards_of_two_labelers_do_not_meet(tmp_path, capsys, script, flags, other):
    on, off = two_files(tmp_path, on={"labeler": "rm:A"}, off={"labeler": other})
    run(script, *flags, on, off, "--out", tmp_path / "out.json", expect=2)
    err = capsys.readouterr().err
    assert "labeler" in err and "rm:A" in err and str(other) in err and not (tmp_path / "out.json").exists()
    assert f"{on}, {off}: rewards of different labelers: " in err


def test_a_file_without_rewards_has_no_labeler_that_could_differ(tmp_path):
    on, off = two_files(tmp_path, on={"labeler": "rm:A"})
    (line,) = read_rows(off)
    for one in line["responses"]:
        one["reward"] = None
    write_rows(off, [line])
    run(build_pairs, "--scored", on, off, "--on-ratio", 0, "--select", "given", "--out", tmp_path / "p.jsonl")
    (pair,) = read_rows(tmp_path / "p.jsonl")
    assert texts(pair) == ("c", "d") and (pair["labeler"], pair["chosen_reward"]) == ("rm:A", None)


def test_a_score_that_another_scorer_made_for_both_files(tmp_path):
    paths = two_files(tmp_path, labeler="rm:A")
    for path in paths:
        (line,) = read_rows(path)
        for k, one in enumerate(line["responses"]):
            one["scores"]["judge"] = 0.25 * k
        write_rows(path, [line])
    for ratio, expected in ((0, ("d", "c")), (1, ("b", "a"))):
        out = tmp_path / f"{ratio}.jsonl"
        run(build_pairs, "--scored", *paths, "--reward", "judge", "--on-ratio", ratio, "--out", out)
        (pair,) = read_rows(out)
        assert texts(pair) == expected
        assert pair["labeler"] == "judge" and pair["chosen_reward"] == 0.25


WINS = [[None, 0.9], [0.1, None]]


def test_wins_of_two_files_are_compared_within_a_file_alone(tmp_path, capsys):
    on, off = two_files(tmp_path, labeler="pairrm:x", wins=WINS)
    # between the sources nobody was asked, and the means over one file's responses are no verdict
    run(boundary, "--scored", on, off, "--out", tmp_path / "out.json", expect=2)
    assert '"prompts_with_one_source": 0, "prompts_without_verdict": 1' in capsys.readouterr().err
    run(evaluate, *WINRATE, "--scored", on, off, "--out", tmp_path / "out.json", expect=2)
    assert "no prompt has a verdict on m-on against m-off" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    # within a source they are compared rightly
    run(build_pairs, "--scored", on, off, "--on-ratio", 1, "--out", tmp_path / "out.jsonl")
    assert texts(read_rows(tmp_path / "out.jsonl")[0]) == ("a", "b")


@pytest.mark.parametrize("unknown", [{}, {"wins": None, "cosine": None}, {"wins": 5, "cosine": "x"}])
@pytest.mark.parametrize("with_wins", ["on", "off"])
def test_wins_in_one_of_two_files(tmp_path, capsys, with_wins, unknown):
    """Responses to a prompt from a file with wins and from one without, whichever comes first: there is no
    verdict between them, and their rewards are not compared instead. A "wins" of a response is unknown."""
    on, off = two_files(tmp_path, **{with_wins: {"wins": WINS}})
    for path in (on, off):
        (line,) = read_rows(path)
        write_rows(path, [{**line, "responses": [{**one, **unknown} for one in line["responses"]]}])
    for files in ((on, off), (off, on)):
        for script, flags in ((boundary, []), (evaluate, WINRATE)):
            run(script, *flags, "--scored", *files, "--out", tmp_path / "out.json", expect=2)
            err = capsys.readouterr().err
            assert ", ".join(files) in err and err.count("\n") == 1
            assert "wins" in err or "verdict" in err
            assert not (tmp_path / "out.json").exists()
        run(build_pairs, "--scored", *files, "--on-ratio", 1, "--out", tmp_path / "p.jsonl")
        (pair,) = read_rows(tmp_path / "p.jsonl")
        assert texts(pair) == ("a", "b") and pair["cosine"] is None


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"wins": 5}, "wins"),
        ({"wins": [None, None]}, "wins"),
        ({"wins": [[None, 1]]}, 'expected "wins" to have a row and a column for every response'),
        ({"cosine": [[1], [1, 1]]}, 'expected "cosine" to have a row and a column for every response'),
        ({"prompt": "half \ud83d"}, ""),
        ({"responses": [response("a", 1.0), {**response("b", 2.0), "scores": [1]}]}, "scores"),
    ],
    ids=["number", "nulls", "one line", "cosine", "half a letter", "scores"],
)
def test_malformed_rows_are_one_sentence(tmp_path, capsys, change, sentence):
    line = json.dumps({**row("p", response("a", 1.0), response("b", 2.0)), **change})
    (tmp_path / "in.jsonl").write_text(line + "\n")
    flags = "--on-ratio", 0, "--out", tmp_path / "out.jsonl"
    run(build_pairs, "--scored", tmp_path / "in.jsonl", *flags, expect=2)
    err = capsys.readouterr().err
    assert sentence in err.split("in.jsonl:1: ")[1] and err.count("\n") == 1


def test_what_has_no_result_is_counted_with_its_reason(tmp_path, capsys):
    rows = [row("p", {"text": "4", "source": "on"}, answer="4"), row("q", {"text": "4", "source": "on"})]
    path = write_rows(tmp_path / "in.jsonl", rows)
    verify_answers(path, out=tmp_path / "1.jsonl")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["without"] == {"the prompt has no answer": 1}
    # a response that the first scorer could not score does not keep a second one away (S3 B.1)
    verify_answers(tmp_path / "1.jsonl", out=tmp_path / "2.jsonl", flags=["--name", "again"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["without"] == {"the prompt has no answer": 1} and said["mean"] == {"on": 1.0}
    verify_answers(path, out=tmp_path / "3.jsonl", flags=["--shard", "1/2"], expect=2)
    sentence = "--shard 1/2: 2 rows are too few for 2 blocks of 256"
    assert sentence in capsys.readouterr().err


def test_what_was_sampled_is_what_is_trained(tmp_path, policy):
    """Token ids go from generate.py through score.py and build_pairs.py into training as they are: of random
    bytes, which are no text, so that tokenising the text anew would give others."""
    prompts = [{"id": f"p{k}", "prompt": f"question {k}", "answer": "7"} for k in range(8)]
    path = write_rows(tmp_path / "prompts.jsonl", prompts)
    flags = "--n", 2, "--max-tokens", 12, "--temperature", 1, "--backend", "hf"
    run(generate, "--model", policy, "--prompts", path, "--out", tmp_path / "on.jsonl", *flags)
    rows = read_rows(tmp_path / "on.jsonl")
    for row in rows:  # a reward by hand
        for k, one in enumerate(row["responses"]):
            one["reward"] = k
    write_rows(tmp_path / "scored.jsonl", rows)
    flags = "--on-ratio", 1, "--truncated", "keep", "--out", tmp_path / "pairs.jsonl"
    run(build_pairs, "--scored", tmp_path / "scored.jsonl", *flags)
    args = train_dpo.parse_args(["--model", policy, "--pairs", str(tmp_path / "pairs.jsonl"), "--out", "o"])
    chat, config = read_chat(policy)
    tokenizer = chat.tokenizer
    pairs, dropped = train_dpo.load_pairs(args.pairs, chat, config, args)
    assert len(pairs) == 8 and not dropped
    others = 0
    for pair, row in zip(pairs, rows):
        assert (pair.pair_id, pair.source, pair.reward_margin) == (f"{row['id']}:on", "on", 1.0)
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for sequence, one in zip(pair.sequences, row["responses"][::-1]):  # chosen is the second
            ids = one["token_ids"] + [tokenizer.eos_token_id] * (one["finish"] == "stop")
            assert list(sequence.ids) == prompt + ids
            assert sequence.start == len(prompt)
            others += tokenizer(one["text"], add_special_tokens=False)["input_ids"] != one["token_ids"]
    assert others > 0
