"""
recipes/benchmarks.py: the papers' suites in lm-eval, which is no requirement: where it is not installed, what
needs it is skipped.

Covers  rows in short and as on the hub; the files that lm-eval reads; its command and its results, with a
        module in its place that says what it was asked; a suite of four hand-written rows a task with a tiny
        random model, whose log-likelihoods are computed here again; the average by hand; what is refused.
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

import pytest
import torch
from conftest import make_policy, read_rows, run_script, write_rows

from recipes import benchmarks

LETTERS = "ABCDE"
STEMS = [
    {"stem": "Ice is", "choices": ["hot", "cold", "dry", "loud"], "label": 1},
    {"stem": "Cats", "choices": ["bark", "fly", "purr", "sing"], "label": 2},
    {"stem": "The sky is", "choices": ["blue", "made of wood", "a fish", "sour"], "label": 0},
    {"stem": "Two and two make", "choices": ["one", "two", "three", "four"], "label": 3},
]
TWO_CHOICES = [{"choices": row["choices"][:2], "label": row["label"] % 2} for row in STEMS]
MC2 = {"It melts.": 1, "It turns to water.": 1, "It burns.": 0}
HUB_ROWS = {
    "arc_challenge": {
        "question": "Cats",
        "choices": {"text": ["bark", "fly", "purr", "sing"], "label": list("ABCD")},
        "answerKey": "C",
    },
    "openbookqa": {
        "question_stem": "Ice is",
        "choices": {"text": ["hot", "cold", "dry", "loud"], "label": list("ABCD")},
        "answerKey": "B",
    },
    "commonsense_qa": {
        "question": "q",
        "choices": {"label": ["A", "B"], "text": ["x", "y"]},
        "answerKey": "B",
    },
    "hellaswag": {
        "activity_label": "",
        "ctx_a": "a b",
        "ctx_b": "",
        "endings": ["x", "y"],
        "label": "1",
    },
    "piqa": {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
    "winogrande": {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"},
    "mmlu": {"subject": "s", "question": "q", "choices": ["x", "y", "z", "w"], "answer": 2},
    "mmlu_dev": {"subject": "s", "question": "q", "choices": ["x", "y", "z", "w"], "answer": 2},
    "ifeval": {"key": 3, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "truthfulqa_mc2": {"question": "q", "mc2_targets": {"choices": list(MC2), "labels": [1, 1, 0]}},
    "gsm8k_cot": {"question": "What is 1 + 1?", "answer": "#### 2"},
}
SHORT_ROWS = {
    "arc_challenge": STEMS[1],
    "openbookqa": STEMS[0],
    "commonsense_qa": {
        "answerKey": "B",
        "question": {"stem": "q", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]},
    },
    "hellaswag": {"ctx": "a b", "choices": ["x", "y"], "label": 1},
    "piqa": {"stem": "g", "choices": ["x", "y"], "label": 1},
    "winogrande": {"stem": "a _ b", "choices": ["x", "y"], "label": 0},
    "mmlu": {**HUB_ROWS["mmlu"], "answer": "2"},
    "mmlu_dev": {**HUB_ROWS["mmlu"], "answer": "2"},
    "truthfulqa_mc2": {"question": "q", "mc1_targets": {}, "mc2_targets": MC2},
}


def multiple_choice(row):
    """A row of STEMS as CommonsenseQA's authors publish theirs."""
    choices = [
        {"label": letter, "text": text}
        for letter, text in zip(LETTERS, [*row["choices"], "none"], strict=True)
    ]
    question = {"stem": row["stem"], "question_concept": "x", "choices": choices}
    return {"answerKey": LETTERS[row["label"]], "id": "x", "question": question}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four rows a task, two of IFEval, as in ../shared/data/benchmarks; MMLU has 3 and 1 of two subjects."""
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "arc_challenge_test_4.jsonl", STEMS)
    write_rows(folder / "openbookqa_test_4.jsonl", STEMS)
    write_rows(folder / "commonsenseqa_dev_4.jsonl", map(multiple_choice, STEMS))
    hellaswag = [
        {"ctx": f"[header] {row['stem']} [title] so", "choices": row["choices"], "label": row["label"]}
        for row in STEMS
    ]
    write_rows(folder / "hellaswag_4.jsonl", hellaswag)
    piqa = [{"stem": row["stem"], **two} for row, two in zip(STEMS, TWO_CHOICES)]
    write_rows(folder / "piqa_valid_4.jsonl", piqa)
    winogrande = [
        {"stem": f"{row['stem']} _ and that is all.", **two} for row, two in zip(STEMS, TWO_CHOICES)
    ]
    write_rows(folder / "winogrande_xl_valid_4.jsonl", winogrande)
    mmlu = [
        {
            "subject": "astronomy" if i == 1 else "anatomy",
            "question": row["stem"],
            "choices": row["choices"],
            "answer": str(row["label"]),
        }
        for i, row in enumerate(STEMS)
    ]
    write_rows(folder / "mmlu_test_4.jsonl", mmlu)
    examples = [
        {**row, "subject": name} for name in ("anatomy", "astronomy", "virology") for row in [*mmlu, mmlu[0]]
    ]
    write_rows(folder / "mmlu_dev_5.jsonl", examples)
    ifeval = [
        {
            "key": i,
            "prompt": f"{row['stem']}? Use no commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for i, row in enumerate(STEMS[:2])  # 1,280 tokens each
    ]
    write_rows(folder / "ifeval_input_2.jsonl", ifeval)
    with gzip.open(folder / "truthfulqa_mc_4.jsonl.gz", "wt") as file:
        for i in range(4):
            row = {"question": f"What does ice do {i}?", "mc1_targets": {}, "mc2_targets": MC2}
            file.write(json.dumps(row) + "\n")
    gsm8k = [
        {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>.\n#### {i + 1}"}
        for i in range(4)
    ]
    write_rows(folder / "gsm8k_test_4.jsonl", gsm8k)
    return folder


def convert(suite, files, out):
    flags = ["--suite", suite, "--write-data", str(files), "--out", str(out)]
    benchmarks.main(benchmarks.parse_args(flags))


# ----- --write-data
@pytest.mark.parametrize("task", SHORT_ROWS)
def test_rows_in_short_become_the_hubs(task):
    assert benchmarks.hub_row(task, SHORT_ROWS[task]) == HUB_ROWS[task]


@pytest.mark.parametrize("task", HUB_ROWS)
def test_rows_of_the_hub_stay_without_other_columns(task):
    assert benchmarks.hub_row(task, {**HUB_ROWS[task], "more": 1}) == HUB_ROWS[task]


def test_files_for_lm_eval(files, tmp_path, capsys):
    """lm-eval's own tasks by their names: nothing of them changes but the examples and where the rows are."""
    convert("simplemix", files, tmp_path)
    said = capsys.readouterr()
    counts = dict.fromkeys(benchmarks.SUITES["simplemix"], 4) | {"ifeval": 2}
    assert json.loads(said.out) == counts
    assert "hellaswag: the rows have no activity label, with which lm-eval's own prompts begin" in said.err
    group = json.loads((tmp_path / "simplemix.yaml").read_text())
    tasks = {task.get("task", "mmlu"): task for task in group["task"]}
    assert group["group"] == "simplemix"
    assert list(tasks) == list(benchmarks.SUITES["simplemix"])
    assert tasks["mmlu"] == {"group": "mmlu", "num_fewshot": 0}
    assert tasks["piqa"] == {
        "task": "piqa",
        "num_fewshot": 0,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "piqa.jsonl")}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    hellaswag = tasks["hellaswag"]
    assert hellaswag.pop("doc_to_text") == "{{query.removeprefix(': ')}}"
    assert all(list(task) == list(tasks["piqa"]) for name, task in tasks.items() if name != "mmlu")
    assert read_rows(tmp_path / "piqa.jsonl")[1] == {
        "goal": "Cats",
        "sol1": "bark",
        "sol2": "fly",
        "label": 0,
    }
    mmlu = json.loads((tmp_path / "mmlu.yaml").read_text())
    assert mmlu["group"] == "mmlu"
    assert mmlu["aggregate_metric_list"] == [{"metric": "acc", "weight_by_size": True}]
    # virology has examples and no question
    assert [task["task"] for task in mmlu["task"]] == ["mmlu_anatomy", "mmlu_astronomy"]
    data_files = mmlu["task"][0]["dataset_kwargs"]["data_files"]
    assert [len(read_rows(data_files[split])) for split in ("test", "dev")] == [3, 5]
    assert read_rows(data_files["test"])[0] == {
        "subject": "anatomy",
        "question": "Ice is",
        "choices": STEMS[0]["choices"],
        "answer": 1,
    }
    record = json.loads((tmp_path / "simplemix.meta.json").read_text())
    used = {path.name for path in files.iterdir()} - {"truthfulqa_mc_4.jsonl.gz", "gsm8k_test_4.jsonl"}
    assert {Path(path).name for path in record["inputs"]} == used
    assert record["counts"] == counts


def test_a_second_suite_and_a_second_run_in_one_folder(files, tmp_path, capsys):
    convert("simplemix", files, tmp_path)
    convert("what-matters", files, tmp_path)
    group = json.loads((tmp_path / "what-matters.yaml").read_text())
    assert [(task.get("task", "mmlu"), task["num_fewshot"]) for task in group["task"]] == [
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
        ("ifeval", 0),
        ("gsm8k_cot", 8),
    ]
    assert read_rows(tmp_path / "truthfulqa_mc2.jsonl")[3]["mc2_targets"]["labels"] == [1, 1, 0]
    assert (tmp_path / "simplemix.yaml").exists()
    fewer = shutil.copytree(files, tmp_path / "fewer")
    write_rows(fewer / "gsm8k_test_4.jsonl", [HUB_ROWS["gsm8k_cot"]])
    capsys.readouterr()
    convert("what-matters", fewer, tmp_path)
    assert json.loads(capsys.readouterr().out)["gsm8k_cot"] == 1
    assert read_rows(tmp_path / "gsm8k_cot.jsonl") == [HUB_ROWS["gsm8k_cot"]]


def test_hellaswag_with_labels_keeps_lm_evals_prompt(files, tmp_path, capsys):
    labelled = shutil.copytree(files, tmp_path / "files")
    rows = [{**HUB_ROWS["hellaswag"], "activity_label": "Sailing"}]
    write_rows(labelled / "hellaswag_4.jsonl", rows)
    convert("simplemix", labelled, tmp_path / "out")
    assert "activity label" not in capsys.readouterr().err
    assert "doc_to_text" not in (tmp_path / "out" / "simplemix.yaml").read_text()
    assert read_rows(tmp_path / "out" / "hellaswag.jsonl") == rows


GOOD_PIQA = json.dumps({"stem": "g", "choices": ["x", "y"], "label": 1}) + "\n"
PIQA_COLUMNS = "piqa_valid_4.jsonl:2: expected a row of piqa with goal, sol1, sol2, label, found "


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        (
            "piqa_valid_4.jsonl",
            None,
            "expected one file piqa_valid*.jsonl or piqa_valid*.jsonl.gz, found none",
        ),
        ("piqa_valid_5.jsonl", b"", "found piqa_valid_4.jsonl, piqa_valid_5.jsonl"),
        ("piqa_valid_4.jsonl", b"", "piqa_valid_4.jsonl: expected JSON lines, found no file or an empty one"),
        (
            "piqa_valid_4.jsonl",
            (GOOD_PIQA + '{"stem": "g", "choices": ["x", "y"], "label": -1}').encode(),
            PIQA_COLUMNS + "ValueError('label -1 of 2 choices')",
        ),
        (
            "piqa_valid_4.jsonl",
            (GOOD_PIQA + '{"stem": "g", "choices": ["x", "y", "z"], "label": 1}').encode(),
            PIQA_COLUMNS + "ValueError",
        ),
        ("piqa_valid_4.jsonl", (GOOD_PIQA + '{"goal": "g"}').encode(), PIQA_COLUMNS + "KeyError('sol1')"),
        ("piqa_valid_4.jsonl", (GOOD_PIQA + "[1]").encode(), "piqa_valid_4.jsonl:2: "),
        ("piqa_valid_4.jsonl", (GOOD_PIQA + "{torn").encode(), "piqa_valid_4.jsonl:2: "),
        ("piqa_valid_4.jsonl", GOOD_PIQA.encode() + b"\xff", "piqa_valid_4.jsonl:2: "),
        ("ifeval_input_2.jsonl", b"[" * 1_500, "ifeval_input_2.jsonl:1: "),
        (
            "mmlu_dev_5.jsonl",
            json.dumps({**HUB_ROWS["mmlu"], "subject": "anatomy"}).encode(),
            "expected examples of every subject of mmlu_test, none is of astronomy",
        ),
    ],
)
def test_files_refused(files, tmp_path, capsys, name, content, sentence):
    broken = shutil.copytree(files, tmp_path / "files")
    if content is None:
        (broken / name).unlink()
    else:
        (broken / name).write_bytes(content)
    with pytest.raises(SystemExit) as status:
        convert("simplemix", broken, tmp_path / "out")
    *notes, err = capsys.readouterr().err.splitlines()
    assert status.value.code == 2 and sentence in err
    assert all("hellaswag: the rows have no activity label" in line for line in notes)
    assert not (tmp_path / "out").exists()


def test_a_torn_gzip_file_and_the_same_folder_twice(files, tmp_path):
    broken = shutil.copytree(files, tmp_path / "files")
    whole = (broken / "truthfulqa_mc_4.jsonl.gz").read_bytes()
    (broken / "truthfulqa_mc_4.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    script = "recipes/benchmarks.py", "--suite", "what-matters", "--write-data", broken
    _, err = run_script(*script, "--out", tmp_path / "out", expect=2)
    assert "truthfulqa_mc_4.jsonl.gz cannot be read: " in err
    _, err = run_script(*script, "--out", tmp_path / "files" / ".." / "files", expect=2)
    assert "expected another folder than that of --write-data" in err


# ----- a model
def run(*flags, env=None, expect=2):
    """What it prints; if it is refused, its sentence."""
    done = subprocess.run(
        [sys.executable, benchmarks.__file__, *map(str, flags)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    assert done.returncode == expect, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout if expect == 0 else done.stderr.splitlines()[-1]


FAKE_LM_EVAL = """
import json, pathlib, sys
argv = [word for word in sys.argv[2:] if word != "--apply_chat_template"]
flags = dict(zip(argv[::2], argv[1::2]))
suite = pathlib.Path(flags["--include_path"], flags["--tasks"] + ".yaml").read_text()
leaves = []
for task in json.loads(suite)["task"]:
    leaves += ["mmlu_anatomy", "mmlu_astronomy"] if "group" in task else [task["task"]]
results = {"mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.125}}
for name in leaves:
    results[name] = {"acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": 0.875}
results["ifeval"] = {"prompt_level_loose_acc,none": 0.75, "prompt_level_loose_acc_stderr,none": 0.0625,
                     "prompt_level_strict_acc,none": 0.125}
results["gsm8k_cot"] = {"exact_match,flexible-extract": 0.375, "exact_match_stderr,flexible-extract": 0.25,
                        "exact_match,strict-match": 0.0}
found = {"results": results, "n-samples": {name: {"effective": 10 + i} for i, name in enumerate(leaves)},
         "n-shot": {name: 3 for name in leaves}, "versions": {name: 7 for name in leaves},
         "lm_eval_version": "0.4.13", "transformers_version": "5.19.0", "config": {"model_sha": "c0ffee"},
         "asked": {"argv": sys.argv, "flags": flags, "suite": json.loads(suite)}}
folder = pathlib.Path(flags["--output_path"], "model")
folder.mkdir(parents=True)
(folder / "results_now.json").write_text(json.dumps(found))
print("a table of lm-eval's own")
pathlib.Path(__file__).with_name("asked.json").write_text(json.dumps(found["asked"]))
"""


@pytest.fixture
def fake(tmp_path):
    """A module in place of lm-eval that writes down what it is asked, and nltk with its data."""
    folder = tmp_path / "fake"
    (folder / "lm_eval/tasks/ifeval").mkdir(parents=True)
    for name in ("lm_eval", "lm_eval/tasks", "lm_eval/tasks/ifeval"):
        (folder / name / "__init__.py").touch()
    (folder / "lm_eval/tasks/ifeval/utils.py").touch()
    (folder / "lm_eval/__main__.py").write_text(FAKE_LM_EVAL)
    (folder / "nltk.py").write_text("class data:\n    find = print\n")
    return {"PYTHONPATH": str(folder)}


def asked_of(fake):
    return json.loads(Path(fake["PYTHONPATH"], "lm_eval/asked.json").read_text())


def test_what_lm_eval_is_asked_and_what_it_answers(policy, tmp_path, fake):
    flags = "--model", policy, "--out", tmp_path / "r.json"
    printed = run(*flags, "--suite", "simplemix", env=fake, expect=0)
    result = json.loads((tmp_path / "r.json").read_text())
    assert json.loads(printed) == result  # lm-eval's own table is on standard error
    record = json.loads((tmp_path / "r.meta.json").read_text())
    versions = {"lm_eval_version": "0.4.13", "transformers_version": "5.19.0", "model_sha": "c0ffee"}
    assert {name: record[name] for name in versions} == versions
    tasks = [
        {"group" if task == "mmlu" else "task": task, "num_fewshot": 0}
        for task in benchmarks.SUITES["simplemix"]
    ]
    assert asked_of(fake)["suite"] == {"group": "simplemix", "task": tasks}
    asked = asked_of(fake)["flags"]
    assert json.loads(asked.pop("--model_args")) == {"pretrained": policy, "dtype": "auto"}
    assert not Path(asked.pop("--include_path")).exists() and not Path(asked.pop("--output_path")).exists()
    assert asked == {"--model": "hf", "--tasks": "simplemix", "--batch_size": "8"}
    plain = {"score": 50.0, "stderr": None, "metric": "acc,none", "shots": 3, "version": 7}
    assert result["tasks"] == {
        "arc_challenge": plain | {"n": 10},
        "commonsense_qa": plain | {"n": 11},
        "hellaswag": plain | {"n": 12},
        "mmlu": plain | {"score": 25.0, "stderr": 12.5, "n": 13 + 14},
        "openbookqa": plain | {"n": 15},
        "piqa": plain | {"n": 16},
        "winogrande": plain | {"n": 17},
        "ifeval": plain | {"score": 75.0, "stderr": 6.25, "n": 18, "metric": "prompt_level_loose_acc,none"},
    }
    assert result["average"] == (6 * 50 + 25 + 75) / 8
    assert (result["kind"], result["suite"], result["model"]) == ("benchmarks", "simplemix", policy)
    assert (result["chat_template"], result["backend"], result["limit"]) == (False, "hf", None)
    record = json.loads((tmp_path / "r.meta.json").read_text())
    assert record["command"][1:4] == ["-m", "lm_eval", "run"] and record["counts"] == {"tasks": 8}


def test_chat_template_limit_backend_and_a_name_on_the_hub(policy, tmp_path, fake):
    flags = "--out", tmp_path / "r.json", "--suite", "what-matters", "--limit", 2
    run(*flags, "--model", policy, "--batch-size", 3, env=fake, expect=0)
    result = json.loads((tmp_path / "r.json").read_text())
    asked = asked_of(fake)
    assert "--apply_chat_template" in asked["argv"] and asked["flags"]["--fewshot_as_multiturn"] == "true"
    assert (asked["flags"]["--batch_size"], asked["flags"]["--limit"]) == ("3", "2")
    assert [task["num_fewshot"] for task in asked["suite"]["task"]] == [5, 0, 0, 8]
    scores = {name: (task["score"], task["shots"]) for name, task in result["tasks"].items()}
    assert scores == {
        "mmlu": (25.0, 3),
        "truthfulqa_mc2": (50.0, 3 + 6),  # six questions are in its prompt
        "ifeval": (75.0, 3),
        "gsm8k_cot": (37.5, 3),
    }
    assert result["tasks"]["gsm8k_cot"]["metric"] == "exact_match,flexible-extract"
    assert (result["average"], result["chat_template"], result["limit"]) == (None, True, 2)
    assert "TruthfulQA" in result["note"]
    run(*flags, "--model", "someone/model", "--backend", "vllm", env=fake, expect=0)
    asked = asked_of(fake)["flags"]
    assert (asked["--model"], asked["--batch_size"]) == ("vllm", "auto")
    assert json.loads(asked["--model_args"])["pretrained"] == "someone/model"


def test_refused(policy, tmp_path, fake):
    flags = "--out", tmp_path / "r.json", "--suite", "simplemix"
    assert "no config.json" in run(*flags, "--model", tmp_path)
    assert "no config.json" in run(*flags, "--model", "nowhere")
    assert "--limit must be at least 1, found 0" in run(*flags, "--model", policy, "--limit", 0)
    Path(fake["PYTHONPATH"], "lm_eval/__main__.py").write_text("raise SystemExit(3)")
    sentence = run(*flags, "--model", policy, env=fake)
    assert sentence == "benchmarks.py: lm-eval failed with exit status 3; see its output above"
    plain = make_policy(tmp_path / "plain", template=None)
    sentence = run("--out", tmp_path / "r.json", "--suite", "what-matters", "--model", plain)
    assert "what-matters needs a chat template, and the tokenizer has none" in sentence
    assert not (tmp_path / "r.json").exists()


def test_lm_eval_that_does_not_start(policy, tmp_path, fake):
    flags = "--out", tmp_path / "r.json", "--suite", "simplemix", "--model", policy
    utils = Path(fake["PYTHONPATH"], "lm_eval/tasks/ifeval/utils.py")
    for error in ("ModuleNotFoundError: No module named 'lm_eval'", "LookupError: punkt_tab not found"):
        name, message = error.split(": ")
        utils.write_text(f"raise {name}({message!r})")
        sentence = run(*flags, env=fake)
        assert f"lm-eval does not start ({error})" in sentence
        assert 'pip install -c constraints.txt "lm-eval[ifeval]==0.4.13"' in sentence
        assert "without internet NLTK_DATA=DIR with punkt_tab" in sentence
    assert not (tmp_path / "r.json").exists()


def test_the_sentence_names_what_nltk_lacks(policy, tmp_path, fake):
    """The last line of nltk's own message is a row of asterisks."""
    pytest.importorskip("nltk")
    Path(fake["PYTHONPATH"], "nltk.py").unlink()
    flags = "--out", tmp_path / "r.json", "--suite", "simplemix", "--model", policy
    sentence = run(*flags, env={**fake, "NLTK_DATA": str(tmp_path), "HOME": str(tmp_path)})
    assert "punkt_tab" in sentence.split("does not start (")[1].split("): pip")[0]


def test_a_template_in_the_tokenizers_config_is_one(tmp_path, fake):
    """Folders of older versions of transformers have no chat_template.jinja."""
    folder = Path(make_policy(tmp_path / "older"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    run("--out", tmp_path / "r.json", "--suite", "what-matters", "--model", folder, env=fake, expect=0)


def test_a_batch_size_of_the_backend_vllm_is_refused(policy, tmp_path, fake):
    """A flag that is accepted and does nothing is worse than none."""
    flags = "--out", tmp_path / "r.json", "--suite", "simplemix", "--model", policy
    assert "--batch-size" in run(*flags, "--backend", "vllm", "--batch-size", 4, env=fake)


def test_flags_that_do_nothing_are_refused(policy, tmp_path):
    """--write-data runs no model, and a model needs no --write-data."""
    out = "--out", tmp_path / "r.json", "--suite", "simplemix"
    for flags in ((), ("--model", policy, "--write-data", tmp_path)):
        assert "give --model or --write-data" in run(*out, *flags)
    for flags in (("--limit", 3), ("--backend", "hf"), ("--batch-size", 4), ("--data", tmp_path)):
        assert "it takes only --suite and --out" in run(*out, "--write-data", tmp_path, *flags)
    assert not (tmp_path / "r.json").exists()


def test_a_folder_that_write_data_did_not_make(policy, tmp_path, fake):
    flags = "--out", tmp_path / "r.json", "--suite", "simplemix", "--model", policy
    sentence = run(*flags, "--data", tmp_path, env=fake)
    assert str(tmp_path) in sentence and "which --write-data makes" in sentence


# ----- lm-eval itself
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.fixture(scope="module")
def long_policy(tmp_path_factory):
    """The tiny model with room for IFEval's 1,280 tokens."""
    folder = Path(make_policy(tmp_path_factory.mktemp("long"), seed=3))
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
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


def accuracy(model, prompts):
    """Percent of prompts, ([(context, text) of each choice], label), whose likeliest choice is right."""
    right = 0
    for choices, label in prompts:
        scores = [log_likelihood(*model, *choice) for choice in choices]
        right += max(range(len(choices)), key=scores.__getitem__) == label
    return 100 * right / len(prompts)


def with_context(context, row):
    return [(context, f" {text}") for text in row["choices"]], row["label"]


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@needs_lm_eval
def test_simplemix(files, long_policy, punkt, tmp_path):
    run_script(
        "recipes/benchmarks.py",
        *("--suite", "simplemix", "--write-data", files, "--out", "data"),
        cwd=tmp_path,
    )
    flags = (
        "--model",
        long_policy,
        "--suite",
        "simplemix",
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "r.json",
    )
    printed = run(*flags, env=punkt, expect=0)
    result = json.loads((tmp_path / "r.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    tasks, model = result["tasks"], load(long_policy)
    arc = [with_context(f"Question: {row['stem']}\nAnswer:", row) for row in STEMS]
    assert tasks["arc_challenge"]["score"] == accuracy(model, arc)
    assert tasks["openbookqa"]["score"] == accuracy(model, [with_context(row["stem"], row) for row in STEMS])
    hellaswag = [with_context(f"{row['stem']}. so", row) for row in STEMS]  # without the ": " of a label
    assert tasks["hellaswag"]["score"] == accuracy(model, hellaswag)
    winogrande = []
    for row, two in zip(STEMS, TWO_CHOICES):
        choices = [(f"{row['stem']} {text}", " and that is all.") for text in two["choices"]]
        winogrande.append((choices, two["label"]))
    assert tasks["winogrande"]["score"] == accuracy(model, winogrande)
    mmlu = []
    for i, row in enumerate(STEMS):
        context = (
            "The following are multiple choice questions (with answers) about "
            f"{'astronomy' if i == 1 else 'anatomy'}.\n\n{row['stem']}\n"
        )
        for letter, text in zip("ABCD", row["choices"]):
            context += f"{letter}. {text}\n"
        mmlu.append(([(f"{context}Answer:", f" {letter}") for letter in "ABCD"], row["label"]))
    assert tasks["mmlu"]["score"] == accuracy(model, mmlu)
    counts = {name: (task["n"], task["shots"]) for name, task in tasks.items()}
    assert counts == dict.fromkeys(benchmarks.SUITES["simplemix"], (4, 0)) | {"ifeval": (2, 0)}
    assert tasks["ifeval"]["metric"] == "prompt_level_loose_acc,none"
    assert tasks["piqa"]["metric"] == "acc,none"
    mean = sum(task["score"] for task in tasks.values()) / 8
    assert result["average"] == pytest.approx(mean, abs=1e-12) and len(tasks) == 8
    assert not result["chat_template"]


@pytest.mark.slow
@needs_lm_eval
def test_what_matters(files, long_policy, punkt, tmp_path):
    convert("what-matters", files, tmp_path / "data")
    flags = "--model", long_policy, "--suite", "what-matters", "--data", tmp_path / "data", "--limit", 2
    run(*flags, "--out", tmp_path / "r.json", env=punkt, expect=0)
    result = json.loads((tmp_path / "r.json").read_text())
    counts = {name: (task["n"], task["shots"]) for name, task in result["tasks"].items()}
    assert counts == {  # 2 questions of anatomy, 1 of astronomy
        "mmlu": (3, 5),
        "truthfulqa_mc2": (2, 6),
        "ifeval": (2, 0),
        "gsm8k_cot": (2, 8),
    }
    assert result["average"] is None and result["chat_template"]
    assert result["tasks"]["gsm8k_cot"]["metric"] == "exact_match,flexible-extract"
    assert "TruthfulQA" in result["note"]
    # MMLU in the chat template, the subject's five examples as turns before the question
    model = load(long_policy)
    question = "{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:"
    prompts = []
    for subject, row in (("anatomy", STEMS[0]), ("anatomy", STEMS[2]), ("astronomy", STEMS[1])):
        about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        turns = [{"role": "system", "content": about}]
        for example in [*STEMS, STEMS[0]]:
            turns.append({"role": "user", "content": question.format(example["stem"], *example["choices"])})
            turns.append({"role": "assistant", "content": "ABCD"[example["label"]]})
        turns.append({"role": "user", "content": question.format(row["stem"], *row["choices"])})
        context = model[1].apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts.append(([(context, letter) for letter in "ABCD"], row["label"]))
    assert result["tasks"]["mmlu"]["score"] == pytest.approx(accuracy(model, prompts))
