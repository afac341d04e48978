"""
What one stage writes is what the next one needs: files of several sources and scorers meet.

Covers  S3 Table 1's pool from two data sets whose turns have their keys in another order; HelpSteer2 to pairs (S1 Table 2);
        DPO-Mix-P's pair from two files; old verdicts that must not travel with new samples; labelers; rewards by wins from
        two files; texts that cannot be written; what is said of responses without a result.
Run     python -m pytest tests/test_between_stages.py
"""

import json

import boundary
import build_pairs
import generate
import pytest
import score
from conftest import read_rows, write_rows


def run(script, *flags, expect=None):
    """main of a script; the error that it ends with where one is expected."""
    if not expect:
        return script.main(script.parse_args([str(flag) for flag in flags]))
    with pytest.raises(SystemExit) as status:
        script.main(script.parse_args([str(flag) for flag in flags]))
    assert status.value.code == expect


def response(text, reward, source="off", model="m", **more):
    return {"text": text, "source": source, "model": model, "finish": "stop", "reward": reward, "scores": {"rm": reward}, **more}


def row(name, *responses, **more):
    return {"id": name, "prompt": [{"role": "user", "content": f"question {name}"}], "responses": list(responses), **more}


def test_two_data_sets_with_keys_in_another_order_are_one_pool(tmp_path):
    question = [{"content": "why", "role": "user"}]  # as the hub's parquet may order them
    binarized = {"prompt_id": "x", **{side: [*question, {"content": text, "role": "assistant"}] for side, text in
                                      (("chosen", "it is 5"), ("rejected", "it is 4"))}}
    original = {"source": "evol", "instruction": "why", "completions": [{"model": f"m{k}", "response": f"so {k}"} for k in range(4)]}
    files = {name: write_rows(tmp_path / f"{name}.in.jsonl", [line]) for name, line in (("ultrafeedback_binarized", binarized),
                                                                                        ("ultrafeedback", original))}
    for name, path in files.items():
        run(generate, "--import-format", name, "--import-data", path, "--out", tmp_path / f"{name}.jsonl")
    both = read_rows(tmp_path / "ultrafeedback_binarized.jsonl")[0]
    both["id"] = read_rows(tmp_path / "ultrafeedback.jsonl")[0]["id"]
    both["answer"] = "5"
    both["prompt"] = question
    write_rows(tmp_path / "b.jsonl", [both])
    run(score, "--scorer", "verify", "--responses", tmp_path / "b.jsonl", tmp_path / "ultrafeedback.jsonl", "--out", tmp_path / "s.jsonl")
    (scored,) = read_rows(tmp_path / "s.jsonl")
    assert [some["reward"] for some in scored["responses"]] == [1, 0, 0, 0, 0, 0] and scored["dataset"] == "evol"
    assert scored["prompt"] == [{"role": "user", "content": "why"}]


def test_helpsteer2_to_pairs_drops_ties_whatever_their_rounding(tmp_path, capsys):
    def of(prompt, text, helpfulness, correctness, coherence, complexity, verbosity):
        return {"prompt": prompt, "response": text, "helpfulness": helpfulness, "correctness": correctness, "coherence": coherence,
                "complexity": complexity, "verbosity": verbosity}
    # .45 = .55 * 3 - .4 * 3, which in floating point is 0.44999999999999996; then 4.4 over 1.5
    rows = [of("tie", "a", 0, 0, 1, 0, 0), of("tie", "b", 0, 0, 0, 3, 3), of("q", "good", 3, 3, 1, 0, 1), of("q", "bad", 1, 1, 1, 0, 1)]
    assert 0.55 * 3 - 0.4 * 3 < 0.45
    run(generate, "--import-format", "helpsteer2", "--import-data", write_rows(tmp_path / "h.in.jsonl", rows), "--out", tmp_path / "h.jsonl")
    run(build_pairs, "--scored", tmp_path / "h.jsonl", "--reward", "helpsteer2", "--on-ratio", 0, "--out", tmp_path / "p.jsonl")
    (pair,) = read_rows(tmp_path / "p.jsonl")
    assert (pair["chosen"][0]["content"], pair["chosen_reward"], pair["rejected_reward"]) == ("good", 4.4, 1.5)
    assert pair["labeler"] == "helpsteer2" and json.loads(capsys.readouterr().out.splitlines()[-1])["dropped"] == {"off: tie": 1}


def test_a_mix_p_pair_comes_from_its_two_files(tmp_path):
    first, second = ([row(f"p{k}", {"text": f"{of} {k}", "source": "on", "model": "policy"}, answer=str(k)) for k in range(3)]
                     for of in ("is", "no"))
    second[2]["responses"][0]["text"] = "is 7"
    files = [write_rows(tmp_path / f"{k}.jsonl", rows) for k, rows in enumerate((first, second))]
    for line in second[:2]:
        line["responses"][0]["text"] = "no"
    write_rows(files[1], second)
    run(score, "--scorer", "verify", "--responses", *files, "--out", tmp_path / "s.jsonl")
    run(build_pairs, "--scored", tmp_path / "s.jsonl", "--on-ratio", 1, "--out", tmp_path / "p.jsonl")
    assert {pair["id"]: (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in read_rows(tmp_path / "p.jsonl")} == {
        "p0": ("is 0", "no"), "p1": ("is 1", "no"), "p2": ("is 2", "is 7")}


def test_new_samples_come_without_old_verdicts(tmp_path, policy):
    old = row("p", response("a", 1.0), response("b", 2.0), wins=[[None, 0.1], [0.9, None]], cosine=[[1, 0.5], [0.5, 1]], labeler="pairrm:x",
              answer="7")
    run(generate, "--model", policy, "--prompts", write_rows(tmp_path / "old.jsonl", [old]), "--out", tmp_path / "new.jsonl", "--n", 3,
        "--max-tokens", 4, "--backend", "hf")
    (new,) = read_rows(tmp_path / "new.jsonl")
    assert not {"wins", "cosine", "labeler"} & new.keys() and new["answer"] == "7" and len(new["responses"]) == 3
    run(generate, "--import-format", "rows", "--import-data", tmp_path / "old.jsonl", "--out", tmp_path / "rows.jsonl")
    assert not {"wins", "cosine", "labeler"} & read_rows(tmp_path / "rows.jsonl")[0].keys()


def test_rewards_of_two_labelers_do_not_meet(tmp_path, capsys):
    on = write_rows(tmp_path / "on.jsonl", [row("p", response("a", 5.0, "on"), response("b", 4.0, "on"), labeler="rm:A")])
    off = write_rows(tmp_path / "off.jsonl", [row("p", response("c", 1.0), response("d", 0.0), labeler="rm:B")])
    for script, *flags in ((boundary,), (score, "--scorer", "verify", "--name", "x"), (build_pairs,), (build_pairs, "--reward", "rm"),
                           (build_pairs, "--reward", "rm", "--mix", "cross")):
        files = "--responses" if script is score else "--scored"
        run(script, files, on, off, *flags, "--out", tmp_path / "out.json", expect=2)
        err = capsys.readouterr().err
        assert "labeler" in err and "rm:A" in err and "rm:B" in err and not (tmp_path / "out.json").exists()
    # a score that another scorer made for both is one labeler's
    for path in (on, off):
        rows = read_rows(path)
        for k, some in enumerate(rows[0]["responses"]):
            some["scores"]["judge"] = 0.25 * k
        write_rows(path, rows)
    run(build_pairs, "--scored", on, off, "--reward", "judge", "--mix", "cross", "--out", tmp_path / "p.jsonl")
    assert read_rows(tmp_path / "p.jsonl")[0]["labeler"] == "judge"


@pytest.mark.parametrize("flags", [["--mix", "cross"], ["--replace", "1"]])
def test_rewards_by_wins_of_two_files_do_not_meet(tmp_path, capsys, flags):
    wins = [[None, 0.9], [0.1, None]]
    on = write_rows(tmp_path / "on.jsonl", [row("p", response("a", 2.2, "on"), response("b", -2.2, "on"), wins=wins, labeler="pairrm:x")])
    off = write_rows(tmp_path / "off.jsonl", [row("p", response("c", 4.6), response("d", -4.6), wins=wins, labeler="pairrm:x")])
    run(build_pairs, "--scored", on, off, *flags, "--out", tmp_path / "out.jsonl", expect=2)
    assert "off.jsonl:1: rewards by wins are means over one file's responses" in capsys.readouterr().err
    run(build_pairs, "--scored", on, off, "--on-ratio", 1, "--out", tmp_path / "out.jsonl")  # within a source they are compared rightly
    assert read_rows(tmp_path / "out.jsonl")[0]["chosen"][0]["content"] == "a"


@pytest.mark.parametrize("change, sentence", [
    ({"wins": 5}, '"wins" to be a 2 x 2 matrix'), ({"wins": [None, None]}, '"wins" to be a 2 x 2 matrix'),
    ({"prompt": "half \ud83d"}, "expected a JSON object"),
    ({"responses": [response("a", 1.0), {**response("b", 2.0), "scores": [1]}]}, 'expected "responses" to be a list')])
def test_malformed_rows_are_one_sentence(tmp_path, capsys, change, sentence):
    (tmp_path / "in.jsonl").write_text(json.dumps({**row("p", response("a", 1.0), response("b", 2.0)), **change}) + "\n")
    run(build_pairs, "--scored", tmp_path / "in.jsonl", "--on-ratio", 0, "--out", tmp_path / "out.jsonl", expect=2)
    err = capsys.readouterr().err
    assert "in.jsonl:1: " in err and sentence in err and err.count("\n") == 1


def test_what_has_no_result_is_counted_with_its_reason(tmp_path, capsys):
    rows = [row("p", {"text": "4", "source": "on"}, answer="4"), row("q", {"text": "4", "source": "on"})]
    run(score, "--scorer", "verify", "--responses", write_rows(tmp_path / "in.jsonl", rows), "--out", tmp_path / "1.jsonl")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reasons"] == {"the prompt carries no answer": 1}
    # a response that the first scorer could not score does not keep a second one away (S3 B.1)
    run(score, "--scorer", "verify", "--name", "again", "--responses", tmp_path / "1.jsonl", "--out", tmp_path / "2.jsonl")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["reasons"] == {"the prompt carries no answer": 1} and said["mean"] == {"on": 1.0}
    run(score, "--scorer", "verify", "--shard", "1/2", "--responses", tmp_path / "in.jsonl", "--out", tmp_path / "3.jsonl", expect=2)
    assert "--shard 1/2: expected at most one shard per window of 256 rows, found none for this one" in capsys.readouterr().err
