"""
evaluate.py: win rates with alpaca_eval's numbers, and the report.

Covers  wins, ties, losses and several responses per model by hand; alpaca_eval's standard error; categories; wins of a
        pairwise scorer; lengths and rewards; report.md, report.csv and report.png, S2's Table 3 from boundaries; what is
        refused.
Run     python -m pytest tests/test_evaluate.py
"""

import csv
import json
import math

import evaluate
import pytest
from conftest import write_rows


def response(model, reward, text=None):
    return {"text": text or f"{model} says {reward}", "source": "on", "model": model, "finish": "stop",
            "reward": reward}


def prompt_row(number, *responses, **more):
    return {"id": f"p{number}", "prompt": f"question {number}", "responses": list(responses), **more}


def winrate(tmp_path, capsys, rows, *flags, model="new", out="result.json"):
    path = write_rows(tmp_path / "scored.jsonl", rows)
    evaluate.main(evaluate.parse_args(["winrate", "--scored", path, "--model", model, "--baseline", "old",
                                       "--out", str(tmp_path / out), "--overwrite", *flags]))
    result = json.loads((tmp_path / out).read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    return result


def refused(tmp_path, capsys, rows, *flags, **more):
    with pytest.raises(SystemExit) as exit_status:
        winrate(tmp_path, capsys, rows, *flags, **more)
    assert exit_status.value.code == 2 and not (tmp_path / "result.json").exists()
    return capsys.readouterr().err


ROWS = [prompt_row(0, response("new", 2.0, "abcde"), response("old", 1.0, "abc")),                          # won
        prompt_row(1, response("old", 3.0, "abc"), response("new", -1.0, "ab")),                            # lost
        prompt_row(2, response("new", 1.0, "a"), response("old", 1.0, "abcd")),                             # tie
        # 2 of 4 pairs won, one tied: .625
        prompt_row(3, response("new", 5.0, "abcd"), response("new", 2.0, "abc"), response("old", 3.0, "ab"),
                   response("old", 2.0, "abcdefg"))]


def test_win_rate_by_hand(tmp_path, capsys):
    result = winrate(tmp_path, capsys, ROWS)
    values = [1.0, 0.0, 0.5, 0.625]
    mean = sum(values) / 4
    assert result["win_rate"] == pytest.approx(100 * mean, abs=1e-9) and mean == 0.53125
    # alpaca_eval: the standard error of the mean with n - 1, in percent
    sem = 100 * math.sqrt(sum((value - mean) ** 2 for value in values) / 3) / math.sqrt(4)
    assert result["standard_error"] == pytest.approx(sem, abs=1e-9) and sem == pytest.approx(20.6502, abs=1e-4)
    assert (result["n_wins"], result["n_wins_base"], result["n_draws"], result["n_total"]) == (2, 1, 1, 4)
    assert result["discrete_win_rate"] == pytest.approx(100 * 2.5 / 4)
    low, high = result["ci"]
    assert 0 <= low < result["win_rate"] < high <= 100 and result["by"] == "reward"


def test_lengths_and_rewards_by_hand(tmp_path, capsys):
    result = winrate(tmp_path, capsys, ROWS)
    assert result["avg_length"] == int((5 + 2 + 1 + 4 + 3) / 5)
    assert result["avg_length_baseline"] == int((3 + 3 + 4 + 2 + 7) / 5)
    # one reward per prompt: 2, -1, 1 and 3.5; 1, 3, 1 and 2.5
    assert result["reward"]["mean"] == pytest.approx(5.5 / 4)
    assert result["reward_baseline"]["mean"] == pytest.approx(7.5 / 4)
    assert result["reward"]["n"] == 4 and result["reward"]["ci"][0] < 5.5 / 4 < result["reward"]["ci"][1]


def test_model_and_baseline_change_places(tmp_path, capsys):
    swapped = [{**row, "responses": [{**some, "model": {"new": "old", "old": "new"}[some["model"]]}
                                     for some in row["responses"]]}
               for row in ROWS]
    forward, backward = winrate(tmp_path, capsys, ROWS), winrate(tmp_path, capsys, swapped)
    assert forward["win_rate"] + backward["win_rate"] == pytest.approx(100)
    assert forward["standard_error"] == pytest.approx(backward["standard_error"])


def test_equal_texts_tie_and_a_missing_reward_is_no_verdict(tmp_path, capsys):
    rows = [prompt_row(0, response("new", 2.0, "same"), response("old", 1.0, "same")),
            prompt_row(1, response("new", None), response("old", 1.0)),
            prompt_row(2, response("new", None), response("new", 4.0), response("old", 1.0)),
            prompt_row(3, response("new", 1.0))]
    result = winrate(tmp_path, capsys, rows)
    assert (result["win_rate"], result["n_total"], result["n_draws"], result["n_without_verdict"]) == (75.0, 2, 1, 2)
    assert result["reward"] == {"mean": 3.0, "ci": result["reward"]["ci"], "n": 2}


def test_one_prompt_has_no_standard_error(tmp_path, capsys):
    result = winrate(tmp_path, capsys, ROWS[:1])
    assert (result["win_rate"], result["standard_error"], result["ci"]) == (100.0, None, [100.0, 100.0])


def test_categories(tmp_path, capsys):
    rows = [{**row, "category": category} for row, category in zip(ROWS, ("coding", "coding", "facts", "facts"))]
    result = winrate(tmp_path, capsys, rows)
    assert list(result["categories"]) == ["coding", "facts"] and result["win_rate"] == pytest.approx(53.125)
    assert result["categories"]["coding"]["win_rate"] == 50 and result["categories"]["coding"]["n_total"] == 2
    assert result["categories"]["facts"]["win_rate"] == pytest.approx(56.25)
    assert result["categories"]["coding"]["standard_error"] == pytest.approx(50.0)  # of 1 and 0: sd .7071, over sqrt 2
    assert winrate(tmp_path, capsys, ROWS)["categories"] == {}


def test_wins_of_a_pairwise_scorer(tmp_path, capsys):
    # the judge's probability counts, not only who is ahead; rewards beside it do not
    rows = [prompt_row(0, response("new", -9.0), response("old", 9.0), wins=[[None, 0.8], [0.2, None]]),
            prompt_row(1, response("old", 9.0), response("new", -9.0), wins=[[None, 0.7], [0.3, None]]),
            prompt_row(2, response("new", -9.0), response("old", 9.0), wins=[[None, None], [None, None]])]
    result = winrate(tmp_path, capsys, rows)
    assert result["win_rate"] == pytest.approx(100 * (0.8 + 0.3) / 2) and result["by"] == "wins"
    assert (result["n_wins"], result["n_wins_base"], result["n_without_verdict"]) == (1, 1, 1)
    (tmp_path / "mixed").mkdir()
    assert "3 rows have wins and 1 have none" in refused(tmp_path / "mixed", capsys, rows + ROWS[3:])


def test_an_unknown_model_lists_the_names(tmp_path, capsys):
    err = refused(tmp_path, capsys, ROWS, model="newer")
    assert "no response is of the model 'newer'; there are new, old" in err


def test_no_prompt_with_both_models(tmp_path, capsys):
    rows = [prompt_row(0, response("new", 1.0)), prompt_row(1, response("old", 1.0))]
    assert "no prompt has comparable responses of new and old" in refused(tmp_path, capsys, rows)


@pytest.mark.parametrize("reward", [float("nan"), "2.0", True])
def test_a_reward_that_is_no_number(tmp_path, capsys, reward):
    rows = [ROWS[0], prompt_row(9, response("new", reward, "x"), response("old", 1.0))]
    assert "scored.jsonl:2: expected every response to have a finite" in refused(tmp_path, capsys, rows)


def test_report(tmp_path, capsys):
    (tmp_path / "new").mkdir()  # a folder that train_dpo.py wrote says how many pairs and how long
    facts = {"counts": {"pairs": 123, "seconds": 45.6, "steps": 7}, "args": {"loss": "dpo", "beta": 0.1, "seed": 0}}
    (tmp_path / "new" / "metrics.meta.json").write_text(json.dumps(facts))
    trained = [{**row, "responses": [{**some, "model": str(tmp_path / "new") if some["model"] == "new" else "old"}
                                     for some in row["responses"]]} for row in ROWS]
    winrate(tmp_path, capsys, trained, model=str(tmp_path / "new"), out="a.json")
    other = [prompt_row(k, response("third", 1.0 + k), response("old", 0.5)) for k in range(3)]
    winrate(tmp_path, capsys, other, model="third", out="b.json")
    out = tmp_path / "report"
    evaluate.main(evaluate.parse_args(["report", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out",
                                       str(out)]))
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == {"out": str(out), "results": 2, "rows": 3}

    lines = (out / "report.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["setting", "pairs", "reward", "win rate", "95 % interval", "prompts", "characters",
                        "training seconds"]
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == {"|", "-"}
    assert cells[2] == ["old (baseline)", "", "1.88", "", "", "4", "3", ""]
    low, high = json.loads((tmp_path / "a.json").read_text())["ci"]
    assert cells[3] == ["new", "123", "1.38", "53.1", f"{low:.1f} to {high:.1f}", "4", "3", "46"]
    assert cells[4] == ["third", "", "2.00", "100.0", "100.0 to 100.0", "3", "14", ""]
    with open(out / "report.csv", newline="") as file:
        assert list(csv.reader(file)) == [cells[0], *cells[2:]]

    picture = (out / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
    assert width > 1000 and height > 300 and len(picture) > 10_000
    from matplotlib.image import imread
    pixels = imread(out / "report.png")
    # drawn, not blank
    assert len({tuple(pixel) for pixel in pixels[::3, ::3].reshape(-1, pixels.shape[-1]).round(2)}) > 10


# S2's Tables 3 and 8: score and distinctness of each initial policy, over 8,000 comparisons of 2,000 prompts
PUBLISHED = {"Llama-3-8B-Instruct": (0.62, 0.9106), "llama_off": (0.66, 0.9397), "llama_on": (0.69, 0.9111),
             "zephyr-sft": (0.40, 0.8880), "phi-2-sft": (0.23, 0.8696)}


def boundary_file(path, model, score, distinct, **more):
    v_on, v_off = round(8000 * score), round(8000 * (1 - score))
    stage, use = ("injection", "off") if v_off > v_on else ("fine-tuning", "on")
    path.write_text(json.dumps({
        "kind": "boundary", "v_on": v_on, "v_off": v_off, "ties": 3, "score": score, "ci": [score - 0.015, score + 0.012],
        "stage": stage, "use": use, "n_prompts": 2000, "models": {"on": [model], "off": ["gpt-4", "bard"]},
        "length_matched": {"score": score - 0.05, "ci": [score - 0.08, score - 0.02]},
        "distinct": distinct and {"sum": distinct, "mean": 0.5, "n_prompts": 2000}, **more}))
    return str(path)


def report(tmp_path, capsys, *files):
    """(what is printed as JSON, report.md's tables as cells)"""
    evaluate.main(evaluate.parse_args(["report", *files, "--out", str(tmp_path / "report")]))
    tables = (tmp_path / "report" / "report.md").read_text().removesuffix("\n").split("\n\n")
    *printed, last = capsys.readouterr().out.splitlines()
    assert "\n".join(printed) == "\n\n".join(tables)
    return json.loads(last), [[[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()] for lines in tables]


def test_boundaries_become_table_3(tmp_path, capsys):
    files = [boundary_file(tmp_path / f"{name}.json", f"models/{name}", *numbers) for name, numbers in PUBLISHED.items()]
    said, [cells] = report(tmp_path, capsys, *files)
    assert (said["results"], said["rows"]) == (5, 5)
    assert cells[0] == ["setting", "prompts", "V_on", "V_off", "ties", "score (95 % interval)", "length-matched", "distinct",
                        "stage", "use"]
    lines = {line[0]: line[1:] for line in cells[2:]}
    assert list(lines) == list(PUBLISHED)
    assert lines["Llama-3-8B-Instruct"] == ["2000", "4960", "3040", "3", "62.0 (60.5 to 63.2)", "57.0 (54.0 to 60.0)", "91.1",
                                            "fine-tuning", "on"]
    assert lines["phi-2-sft"] == ["2000", "1840", "6160", "3", "23.0 (21.5 to 24.2)", "18.0 (15.0 to 21.0)", "87.0",
                                  "injection", "off"]
    assert [line[-1] for line in lines.values()] == ["on", "on", "on", "off", "off"]
    with open(tmp_path / "report" / "boundary.csv", newline="") as file:
        assert list(csv.reader(file)) == [cells[0], *cells[2:]]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "boundary.csv"}


def test_win_rates_and_boundaries_in_one_report(tmp_path, capsys):
    winrate(tmp_path, capsys, ROWS, out="a.json")
    (tmp_path / "one").mkdir()
    files = [boundary_file(tmp_path / "first.json", "m/policy", 0.62, 0.9), str(tmp_path / "a.json"),
             boundary_file(tmp_path / "second.json", "m/policy", 0.5, 0.9),  # the same policy, another scorer
             boundary_file(tmp_path / "one" / "first.json", "m/two", 0.4, 0.9, models={"on": ["a", "b"], "off": []}),
             boundary_file(tmp_path / "bare.json", "m/third", 0.4, None, length_matched=None)]
    said, (rates, cells) = report(tmp_path, capsys, *files)
    assert (said["results"], said["rows"]) == (5, 2 + 4) and [line[0] for line in rates[2:]] == ["old (baseline)", "new"]
    # named after the file where the model does not tell lines apart, and by its path where files end alike
    assert [line[0] for line in cells[2:]] == [str(tmp_path / "first"), "second", str(tmp_path / "one" / "first"), "third"]
    assert cells[3][-2:] == ["fine-tuning", "on"] and cells[5][6:8] == ["", ""]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "report.csv", "report.png", "boundary.csv"}


def test_what_boundary_writes_is_reported(tmp_path, capsys):
    import boundary
    rows = [prompt_row(0, response("policy", 2.0), response("gpt", 1.0)), prompt_row(1, response("policy", 0.0), response("gpt", 0.5))]
    for row in rows:
        row["responses"][1]["source"] = "off"
    path = write_rows(tmp_path / "scored.jsonl", rows)
    boundary.main(boundary.parse_args(["--scored", path, "--out", str(tmp_path / "b.json")]))
    capsys.readouterr()
    _, [cells] = report(tmp_path, capsys, str(tmp_path / "b.json"))
    # "policy says 2.0" and "gpt says 1.0": 15 and 12 characters, 3 <= 3, so both comparisons are of similar length
    assert cells[2] == ["policy", "2", "1", "1", "0", "50.0 (0.0 to 100.0)", "50.0 (0.0 to 100.0)", "", "fine-tuning", "on"]


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", '{"kind": "boundary"}', '{"kind": "winrate"}',
                                  '{"kind": "benchmarks", "ci": 0}', '{"kind": []}',
                                  '{"kind": "boundary", "ci": [0.4, 0.6], "score": 0.5}', None],
                         ids=["torn", "list", "no numbers", "no win rate", "other kind", "no kind", "old boundary", "no file"])
def test_a_bad_result_file(tmp_path, capsys, text):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as exit_status:
        evaluate.main(evaluate.parse_args(["report", str(path), "--out", str(tmp_path / "report")]))
    err = capsys.readouterr().err
    assert exit_status.value.code == 2 and not (tmp_path / "report").exists()
    assert f"{path}: expected a result of `evaluate.py winrate` or of boundary.py, found" in err and err.count("\n") == 1
