"""
evaluate.py benchmarks: the papers' suites in lm-eval, which is no requirement: where it is not installed the run itself is skipped.

Covers  rows in short and as on the hub; lm-eval's group files; a suite of four hand-written rows a task with a tiny random model,
        whose log-likelihoods are computed here again; the average by hand; what is refused.
Run     python -m pytest tests/test_benchmarks.py
"""

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from conftest import make_policy, write_rows

SCRIPT = evaluate.__file__
LETTERS = "ABCDE"
STEMS = [{"stem": "Ice is", "choices": ["hot", "cold", "dry", "loud"], "label": 1}, {"stem": "Cats", "choices": ["bark", "fly", "purr", "sing"],
         "label": 2}, {"stem": "The sky is", "choices": ["blue", "made of wood", "a fish", "sour"], "label": 0},
         {"stem": "Two and two make", "choices": ["one", "two", "three", "four"], "label": 3}]
MC2 = {"It melts.": 1, "It turns to water.": 1, "It burns.": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four rows a task, in the columns of ../shared/data/benchmarks; MMLU has two subjects of 3 and 1 questions; one file is zipped."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "arc_challenge_test_4.jsonl", STEMS)
    write_rows(folder / "openbookqa_test_4.jsonl", STEMS)
    write_rows(folder / "commonsenseqa_dev_4.jsonl", [
        {"answerKey": LETTERS[row["label"]], "id": "x", "question": {"stem": row["stem"], "question_concept": "x", "choices": [
            {"label": letter, "text": text} for letter, text in zip(LETTERS, [*row["choices"], "none"])]}} for row in STEMS])
    write_rows(folder / "hellaswag_4.jsonl", [{"ctx": f"[header] {row['stem']} [title] so", "choices": row["choices"], "label": row["label"]}
                                              for row in STEMS])
    write_rows(folder / "piqa_valid_4.jsonl", [{"stem": row["stem"], "choices": row["choices"][:2], "label": row["label"] % 2}
                                               for row in STEMS])
    write_rows(folder / "winogrande_xl_valid_4.jsonl", [
        {"stem": f"{row['stem']} _ and that is all.", "choices": row["choices"][:2], "label": row["label"] % 2} for row in STEMS])
    subject = [{"subject": "astronomy" if i == 1 else "anatomy", "question": row["stem"], "choices": row["choices"],
                "answer": str(row["label"])} for i, row in enumerate(STEMS)]
    write_rows(folder / "mmlu_test_4.jsonl", subject)
    write_rows(folder / "mmlu_dev_5.jsonl", [{**row, "subject": name} for name in ("anatomy", "astronomy", "virology")
                                             for row in [*subject, subject[0]]])
    write_rows(folder / "ifeval_input_4.jsonl", [
        {"key": i, "prompt": f"{row['stem']}? Use no commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for i, row in enumerate(STEMS)])
    with gzip.open(folder / "truthfulqa_mc_4.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"question": f"What does ice do {i}?", "mc1_targets": {}, "mc2_targets": MC2}) + "\n" for i in range(4))
    write_rows(folder / "gsm8k_test_4.jsonl", [{"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>.\n#### {i + 1}"}
                                               for i in range(4)])
    return folder


def run(*flags, env=None, expect=2):
    done = subprocess.run([sys.executable, SCRIPT, "benchmarks", *map(str, flags)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout if expect == 0 else done.stderr.splitlines()[-1]


@pytest.mark.parametrize("task, short, expected", [
    ("arc_challenge", STEMS[1], {"question": "Cats", "choices": {"text": ["bark", "fly", "purr", "sing"], "label": list("ABCD")}, "answerKey": "C"}),
    ("openbookqa", STEMS[0], {"question_stem": "Ice is", "choices": {"text": ["hot", "cold", "dry", "loud"], "label": list("ABCD")},
                              "answerKey": "B"}),
    ("commonsense_qa", {"answerKey": "B", "question": {"stem": "q", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]}},
     {"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"}),
    ("hellaswag", {"ctx": "a b", "choices": ["x", "y"], "label": 1},
     {"activity_label": "", "ctx_a": "a b", "ctx_b": "", "endings": ["x", "y"], "label": "1"}),
    ("piqa", {"stem": "g", "choices": ["x", "y"], "label": 1}, {"goal": "g", "sol1": "x", "sol2": "y", "label": 1}),
    ("winogrande", {"stem": "a _ b", "choices": ["x", "y"], "label": 0}, {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}),
    ("mmlu", {"subject": "s", "question": "q", "choices": ["x", "y", "z", "w"], "answer": "2"},
     {"subject": "s", "question": "q", "choices": ["x", "y", "z", "w"], "answer": 2}),
    ("truthfulqa_mc2", {"question": "q", "mc1_targets": {}, "mc2_targets": MC2},
     {"question": "q", "mc2_targets": {"choices": list(MC2), "labels": [1, 1, 0]}})])
def test_rows_in_short_become_the_hubs_and_these_stay(task, short, expected):
    assert evaluate.hub_row(task, short) == expected == evaluate.hub_row(task, {**expected, "more": 1})


def test_group_files(data, tmp_path):
    """lm-eval's own tasks by their names: nothing of them changes but the examples and where the rows are."""
    evaluate.write_tasks("what-matters", None, tmp_path)
    assert [*tmp_path.iterdir()] == [tmp_path / "suite.yaml"] and json.loads((tmp_path / "suite.yaml").read_text()) == {
        "group": "what-matters", "task": [{"group": "mmlu", "num_fewshot": 5}, {"task": "truthfulqa_mc2", "num_fewshot": 0},
                                          {"task": "ifeval", "num_fewshot": 0}, {"task": "gsm8k_cot", "num_fewshot": 8}]}
    used = evaluate.write_tasks("simplemix", str(data), tmp_path)
    assert {Path(path).name for path in used} == {path.name for path in data.iterdir()} - {"truthfulqa_mc_4.jsonl.gz", "gsm8k_test_4.jsonl"}
    suite = {task.get("task", "mmlu"): task for task in json.loads((tmp_path / "suite.yaml").read_text())["task"]}
    assert list(suite) == ["arc_challenge", "commonsense_qa", "hellaswag", "mmlu", "openbookqa", "piqa", "winogrande", "ifeval"]
    assert {task["num_fewshot"] for task in suite.values()} == {0} and suite["mmlu"] == {"group": "mmlu", "num_fewshot": 0}
    assert [suite[name]["test_split"] or suite[name]["validation_split"] for name in ("arc_challenge", "piqa", "ifeval")] == [
        "test", "validation", "train"]
    subjects = json.loads((tmp_path / "mmlu.yaml").read_text())["task"]
    assert [task["task"] for task in subjects] == ["mmlu_anatomy", "mmlu_astronomy"]  # virology has examples and no question
    files = subjects[0]["dataset_kwargs"]["data_files"]
    assert [len(Path(files[split]).read_text().splitlines()) for split in ("test", "dev")] == [3, 5]


def test_refused(data, policy, tmp_path):
    out = tmp_path / "result.json"
    flags = ["--model", policy, "--out", out, "--data", data]
    assert "no config.json" in run(*flags, "--suite", "simplemix", "--model", tmp_path)
    assert "--limit: expected a whole number of at least 1, found 0" in run(*flags, "--suite", "simplemix", "--limit", 0)
    assert "--batch-size does nothing on the backend vllm" in run(*flags, "--suite", "simplemix", "--backend", "vllm", "--batch-size", 4)
    assert "expected one file arc_challenge_test*.jsonl or arc_challenge_test*.jsonl.gz, found none" in run(
        *flags, "--suite", "simplemix", "--data", tmp_path)
    broken = shutil.copytree(data, tmp_path / "broken")
    write_rows(broken / "piqa_valid_4.jsonl", [{"stem": "g", "choices": ["x", "y"], "label": 1}, {"stem": "g", "choices": ["x", "y"], "label": -1}])
    assert "piqa_valid_4.jsonl:2: expected a row of piqa with goal, sol1, sol2, label, found ValueError('label -1 of 2 choices')" in run(
        *flags, "--suite", "simplemix", "--data", broken)
    write_rows(broken / "mmlu_dev_5.jsonl", [{"subject": "anatomy", **evaluate.hub_row("mmlu", {"subject": "anatomy", "question": "q",
                                              "choices": ["x"] * 4, "answer": 1})}])
    assert "expected examples of every subject of mmlu_test_4.jsonl, found none of astronomy" in run(
        *flags, "--suite", "what-matters", "--data", broken)
    assert "the tokenizer has none" in run(*flags, "--suite", "what-matters", "--model", make_policy(tmp_path / "plain", template=None))
    for error, sentence in (("ModuleNotFoundError(\"No module named 'lm_eval'\")", 'pip install "lm-eval[ifeval]==0.4.13"'),
                            ("LookupError('punkt_tab not found')", "nltk.downloader -d DIR punkt_tab")):
        (tmp_path / "first").mkdir(exist_ok=True)
        (tmp_path / "first" / "lm_eval.py").write_text(f"raise {error}")
        assert sentence in run(*flags, "--suite", "simplemix", env={"PYTHONPATH": str(tmp_path / "first")})
    assert not out.exists()


@pytest.fixture(scope="module")
def long_policy(tmp_path_factory):
    """The tiny model with room for IFEval's 1,280 tokens."""
    folder = Path(make_policy(tmp_path_factory.mktemp("long"), seed=3))
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), key: 4096}))
    return folder


@pytest.fixture(scope="module")
def punkt(tmp_path_factory):
    """nltk's sentence splitter without any parameters, where there is no internet."""
    folder = tmp_path_factory.mktemp("nltk")
    (folder / "tokenizers/punkt_tab/english").mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (folder / "tokenizers/punkt_tab/english" / name).touch()
    return {"NLTK_DATA": str(folder)}


def log_likelihood(model, tokenizer, context, text):
    ids = tokenizer(context + text, add_special_tokens=False).input_ids
    count = len(tokenizer(text, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return sum(logps[i - 1, ids[i]].item() for i in range(len(ids) - count, len(ids)))


needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@needs_lm_eval
def test_simplemix(data, long_policy, punkt, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    printed = run("--model", long_policy, "--suite", "simplemix", "--data", data, "--out", tmp_path / "r.json", env=punkt, expect=0)
    result = json.loads((tmp_path / "r.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    tasks = result["tasks"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(long_policy), AutoTokenizer.from_pretrained(long_policy)

    def accuracy(prompts):  # [(context and text of each choice, right choice)]
        return 100 * sum(max(range(len(choices)), key=lambda i: log_likelihood(model, tokenizer, *choices[i])) == label
                         for choices, label in prompts) / len(prompts)

    assert tasks["arc_challenge"]["score"] == accuracy(
        [([(f"Question: {row['stem']}\nAnswer:", f" {text}") for text in row["choices"]], row["label"]) for row in STEMS])
    assert tasks["openbookqa"]["score"] == accuracy([([(row["stem"], f" {text}") for text in row["choices"]], row["label"]) for row in STEMS])
    assert tasks["hellaswag"]["score"] == accuracy(  # without the ": " of an activity label
        [([(f"{row['stem']}. so", f" {text}") for text in row["choices"]], row["label"]) for row in STEMS])
    assert tasks["winogrande"]["score"] == accuracy(
        [([(f"{row['stem']} {text}", " and that is all.") for text in row["choices"][:2]], row["label"] % 2) for row in STEMS])
    mmlu = "The following are multiple choice questions (with answers) about {}.\n\n{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:"
    assert tasks["mmlu"]["score"] == accuracy(
        [([(mmlu.format("astronomy" if i == 1 else "anatomy", row["stem"], *row["choices"]), f" {letter}") for letter in "ABCD"],
          row["label"]) for i, row in enumerate(STEMS)])
    assert {name: (task["n"], task["shots"]) for name, task in tasks.items()} == dict.fromkeys(evaluate.SUITES["simplemix"], (4, 0))
    assert tasks["ifeval"]["metric"] == "prompt_level_loose_acc,none" and tasks["piqa"]["metric"] == "acc,none"
    assert result["average"] == pytest.approx(sum(task["score"] for task in tasks.values()) / 8, abs=1e-12) and len(tasks) == 8
    assert not result["chat_template"] and "no activity labels" in result["notes"][0]
    meta = json.loads((tmp_path / "r.meta.json").read_text())
    assert len(meta["inputs"]) >= 12 and meta["counts"] == {"questions": 32} and meta["versions"]["lm_eval"] == result["lm_eval"]


@needs_lm_eval
def test_what_matters(data, long_policy, punkt, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    run("--model", long_policy, "--suite", "what-matters", "--data", data, "--out", tmp_path / "r.json", "--limit", 2, env=punkt, expect=0)
    result = json.loads((tmp_path / "r.json").read_text())
    assert {name: (task["n"], task["shots"]) for name, task in result["tasks"].items()} == {
        "mmlu": (3, 5), "truthfulqa_mc2": (2, 6), "ifeval": (2, 0), "gsm8k_cot": (2, 8)}  # 2 of anatomy, 1 of astronomy
    assert result["average"] is None and result["chat_template"] and result["tasks"]["gsm8k_cot"]["metric"] == "exact_match,flexible-extract"
    assert "TruthfulQA" in result["notes"][0] and "first 2 questions" in result["notes"][1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(long_policy), AutoTokenizer.from_pretrained(long_policy)
    # MMLU in the chat template, the subject's five examples as turns before the question
    subject = [(row["stem"], row["choices"], row["label"]) for row in STEMS]
    question = "{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:"
    right = 0
    for name, i in (("anatomy", 0), ("anatomy", 2), ("astronomy", 1)):
        turns = [{"role": "system", "content": f"The following are multiple choice questions (with answers) about {name}.\n\n"}]
        for stem, choices, label in [*subject, subject[0]]:
            turns += [{"role": "user", "content": question.format(stem, *choices)}, {"role": "assistant", "content": "ABCD"[label]}]
        turns.append({"role": "user", "content": question.format(subject[i][0], *subject[i][1])})
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        right += max(range(4), key=lambda j: log_likelihood(model, tokenizer, context, "ABCD"[j])) == subject[i][2]
    assert result["tasks"]["mmlu"]["score"] == pytest.approx(100 * right / 3)
