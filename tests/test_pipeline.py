"""
All six scripts in sequence, as a user runs them, on tiny random models: the files of one stage feed the next,
and the numbers that can be known beforehand come out.

Run     python -m pytest tests/test_pipeline.py
"""

import csv
import json

import pytest
from conftest import make_policy, read_rows, run_script, write_rows
from models import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_policy(folder / "policy")
    tiny(folder / "reward", "LlamaForSequenceClassification", seed=1)
    prompts, written = [], []
    for i in range(12):
        prompts.append({"id": f"p{i}", "prompt": f"Question {i}?", "category": "ab"[i % 2]})
        responses = [f"Good answer {i}.", f"Bad {i * i}"]
        written.append({"id": f"p{i}", "prompt": f"Question {i}?", "responses": responses})
    write_rows(folder / "prompts.jsonl", prompts)
    write_rows(folder / "written.jsonl", written)
    return folder


@pytest.mark.slow
def test_the_whole_pipeline(folder):
    def run(command):
        return run_script(*command.split(), cwd=folder)[0]

    sampling = "--max-tokens 12 --backend hf"
    said = run(f"generate.py --model policy --prompts prompts.jsonl --out on.jsonl {sampling}")
    assert (said["rows"], said["responses"]) == (12, 48)
    run("data/import_responses.py --format rows --data written.jsonl --out off.jsonl")
    said = run("score.py --model reward --responses on.jsonl off.jsonl --out scored.jsonl")
    assert (said["rows"], said["responses"], said["without"]) == (12, 72, {})
    run("scorers/logp.py --model policy --responses scored.jsonl --out logp.jsonl")
    said = run("boundary.py --scored logp.jsonl --out policy.boundary.json")
    on_wins = 0
    for row in read_rows(folder / "logp.jsonl"):
        on, off = row["responses"][:4], row["responses"][4:]
        on_wins += sum(mine["reward"] > other["reward"] for mine in on for other in off)
    assert said["v_on"] == on_wins and said["v_on"] + said["v_off"] == 12 * 8
    assert said["distinct"]["n_prompts"] == 12

    flags = "--on-ratio 0.5 --total 10 --truncated keep"
    said = run(f"build_pairs.py --scored logp.jsonl --out on50.pairs.jsonl {flags}")
    assert (said["pairs"], said["on"], said["off"]) == (10, 5, 5)
    for pair in read_rows(folder / "on50.pairs.jsonl"):
        assert pair["chosen_reward"] > pair["rejected_reward"] and pair["category"] in "ab"
    said = run(
        "train_dpo.py --model policy --pairs on50.pairs.jsonl --out on50 --batch-size 4 --epochs 2 --lr 1e-3"
    )
    assert said["steps"] == 6 and said["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert said["last_loss"] < said["first_loss"]

    for model, out in (("policy", "base"), ("on50", "on50.answers")):
        run(f"generate.py --greedy --model {model} --prompts prompts.jsonl --out {out}.jsonl {sampling}")
    run("score.py --model reward --responses base.jsonl on50.answers.jsonl --out on50.eval.jsonl")
    said = run("evaluate.py --scored on50.eval.jsonl --model on50 --baseline policy --out on50.winrate.json")
    assert said["n_total"] == 12 and set(said["categories"]) == {"a", "b"}
    assert said["n_wins"] + said["n_wins_base"] + said["n_draws"] == 12
    figure = "report/figure.py settings on50.winrate.json --out report/settings.png"
    assert run(figure)["out"] == ["report/settings.png", "report/settings.pdf"]
    assert (folder / "report" / "settings.png").read_bytes()[:4] == b"\x89PNG"
    results = "on50.winrate.json on50.pairs.meta.json on50/metrics.jsonl policy.boundary.json "
    results += "on50.answers.meta.json on50.eval.meta.json"
    assert run(f"report/table.py {results} --start policy --out report")["tables"]["settings"] == 2
    report = (folder / "report" / "report.md").read_text()
    assert f"{said['win_rate']:.2f}" in report and "![settings](settings.png)" in report
    with open(folder / "report" / "settings.csv", newline="") as file:
        line = {row["setting"]: row for row in csv.DictReader(file)}["on50"]
    answers = [row["responses"][0] for row in read_rows(folder / "on50.answers.jsonl")]
    assert line["tokens sampled"] == f"{sum(answer['tokens'] for answer in answers):,}"
    steps = read_rows(folder / "on50" / "metrics.jsonl")
    assert line["tokens trained"] == f"{sum(step['tokens'] for step in steps):,}"
    assert int(line["tokens scored"].replace(",", "")) > int(line["tokens sampled"].replace(",", ""))
    meta = json.loads((folder / "on50" / "metrics.meta.json").read_text())
    assert set(meta["inputs"]) == {"on50.pairs.jsonl", "token ids of the pairs"}
    assert set(meta["models"]) == {"policy"} and "model.safetensors" in meta["models"]["policy"]
