"""
Local files of the papers' benchmarks -> a folder for `evaluate.py benchmarks --data DIR`, without internet.

Reads   --files SRC  a folder with one .jsonl or .jsonl.gz file for each task of the suite, whose name begins
            arc_challenge_test   question, choices {text, label}, answerKey       stem, choices, label
            commonsenseqa_dev    question, choices {text, label}, answerKey       as its authors publish it
            hellaswag            activity_label, ctx_a, ctx_b, endings, label     ctx, choices, label
            mmlu_test, mmlu_dev  subject, question, choices, answer               answer: a digit as text
            openbookqa_test      question_stem, choices {text, label}, answerKey  stem, choices, label
            piqa_valid           goal, sol1, sol2, label                          stem, choices, label
            winogrande_xl_valid  sentence, option1, option2, answer               stem, choices, label
            ifeval_input         key, prompt, instruction_id_list, kwargs
            truthfulqa_mc        question, mc2_targets {choices, labels}          mc2_targets {text: label}
            gsm8k_test           question, answer
        with columns as on the hub or, at the right, in short ("choices" are texts; "label" counts from 0).
Writes  --out DIR    the rows as on the hub, .jsonl, and SUITE.yaml (JSON is YAML): lm-eval's own tasks, which
        now read these rows and have the suite's number of examples. mmlu.yaml is the group of its subjects.

    python data/offline_benchmarks.py --suite simplemix --files benchmarks --out out/simplemix
    python evaluate.py benchmarks --suite simplemix --data out/simplemix --model out/on50 --out on50.json
Prints the number of rows of each task as one JSON object.
"""

import argparse
import gzip
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402

TASKS = {  # of lm-eval: (how the name of the file begins, columns on the hub)
    "arc_challenge": ("arc_challenge_test", "question, choices, answerKey"),
    "commonsense_qa": ("commonsenseqa_dev", "question, choices, answerKey"),
    "hellaswag": ("hellaswag", "activity_label, ctx_a, ctx_b, endings, label"),
    "mmlu": ("mmlu_test", "subject, question, choices, answer"),
    "mmlu_dev": ("mmlu_dev", "subject, question, choices, answer"),  # examples before mmlu's questions
    "openbookqa": ("openbookqa_test", "question_stem, choices, answerKey"),
    "piqa": ("piqa_valid", "goal, sol1, sol2, label"),
    "winogrande": ("winogrande_xl_valid", "sentence, option1, option2, answer"),
    "ifeval": ("ifeval_input", "key, prompt, instruction_id_list, kwargs"),
    "truthfulqa_mc2": ("truthfulqa_mc", "question, mc2_targets"),
    "gsm8k_cot": ("gsm8k_test", "question, answer"),
}
LOCAL = {"dataset_path": "json", "dataset_name": None, "test_split": "test"}  # how a task reads local rows
LOCAL |= {"training_split": None, "validation_split": None}


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--suite", required=True, choices=list(evaluate.SUITES))
    parser.add_argument("--files", required=True, metavar="SRC", help="folder with the benchmarks' files")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for evaluate.py's --data")
    return parser.parse_args(argv)


def hub_row(task, row):
    """A row with the columns that the task's data set has on the hub."""
    columns = TASKS[task][1].split(", ")
    if "label" in row and "choices" in row and not 0 <= row["label"] < len(row["choices"]):
        raise ValueError(f"label {row['label']} of {len(row['choices'])} choices")
    if task in ("arc_challenge", "openbookqa") and "stem" in row:
        letters = list("ABCDEFGH"[: len(row["choices"])])
        choices = {"text": row["choices"], "label": letters}
        row = {columns[0]: row["stem"], "choices": choices, "answerKey": letters[row["label"]]}
    elif task == "commonsense_qa" and "choices" not in row:
        question = row["question"]
        texts = [choice["text"] for choice in question["choices"]]
        choices = {"text": texts, "label": [choice["label"] for choice in question["choices"]]}
        row = {"question": question["stem"], "choices": choices, "answerKey": row["answerKey"]}
    elif task == "hellaswag" and "ctx_a" not in row:
        context = {"activity_label": "", "ctx_a": row["ctx"], "ctx_b": ""}
        row = context | {"endings": row["choices"], "label": str(row["label"])}
    elif task in ("mmlu", "mmlu_dev"):
        row = row | {"answer": int(row["answer"])}
    elif task == "piqa" and "stem" in row:
        first, second = row["choices"]
        row = {"goal": row["stem"], "sol1": first, "sol2": second, "label": row["label"]}
    elif task == "winogrande" and "stem" in row:
        first, second = row["choices"]
        row = {"sentence": row["stem"], "option1": first, "option2": second, "answer": str(row["label"] + 1)}
    elif task == "truthfulqa_mc2" and "choices" not in row["mc2_targets"]:
        labels = row["mc2_targets"]
        targets = {"choices": list(labels), "labels": list(labels.values())}
        row = {"question": row["question"], "mc2_targets": targets}
    return {name: row[name] for name in columns}


def read_rows(folder, task):
    """(path, rows as on the hub) of the one file of a task."""
    name, columns = TASKS[task]
    paths = sorted([*Path(folder).glob(f"{name}*.jsonl"), *Path(folder).glob(f"{name}*.jsonl.gz")])
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        evaluate.fail(f"{folder}: expected one file {name}*.jsonl or {name}*.jsonl.gz, found {names}")
    path, rows = str(paths[0]), []
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            for line in file:
                rows.append(hub_row(task, json.loads(line)))
    except Exception as error:  # no JSON, a column that is missing or of another type, a torn .gz
        evaluate.fail(f"{path}:{len(rows) + 1}: expected a row of {task} with {columns}, found {error!r:.80}")
    if not rows:
        evaluate.fail(f"{path}: expected JSON lines, found an empty file")
    return path, rows


def mmlu_files(folder, questions, examples):
    """{path: rows} of questions and examples of each subject, and of the group in place of lm-eval's mmlu."""
    files, tasks = {}, []
    for subject in dict.fromkeys(row["subject"] for row in questions):
        paths = {split: f"{folder}/mmlu_{subject}_{split}.jsonl" for split in ("test", "dev")}
        files[paths["test"]] = [row for row in questions if row["subject"] == subject]
        files[paths["dev"]] = [row for row in examples if row["subject"] == subject]
        if not files[paths["dev"]]:
            evaluate.fail(f"mmlu_dev: expected examples of every subject of mmlu_test, none is of {subject}")
        tasks.append({"task": f"mmlu_{subject}", "dataset_kwargs": {"data_files": paths}, **LOCAL})
    group = {"group": "mmlu", "task": tasks}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]  # as lm-eval's
    return files | {f"{folder}/mmlu.yaml": [group]}


def main(args):
    started = time.time()
    folder = os.path.realpath(args.out)
    if os.path.realpath(args.files) == folder:
        evaluate.fail(f"--out {args.out}: expected another folder than --files")
    inputs, outputs, tasks, counts = [], {}, [], {}
    for task, shots in evaluate.SUITES[args.suite].items():
        path, rows = read_rows(args.files, task)
        inputs.append(path)
        counts[task] = len(rows)
        if task == "mmlu":
            path, examples = read_rows(args.files, "mmlu_dev")
            inputs.append(path)
            outputs |= mmlu_files(folder, rows, examples)
            tasks.append({"group": task, "num_fewshot": shots})
            continue
        path = f"{folder}/{task}.jsonl"
        outputs[path] = rows
        tasks.append({"task": task, "num_fewshot": shots, "dataset_kwargs": {"data_files": {"test": path}}})
        tasks[-1] |= LOCAL
        if task == "hellaswag" and not all(row["activity_label"] for row in rows):
            tasks[-1]["doc_to_text"] = "{{query.removeprefix(': ')}}"
            print("hellaswag: the rows have no activity label, with which lm-eval's own prompts begin")
    try:
        os.makedirs(folder, exist_ok=True)
        for path, rows in outputs.items():
            Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    except OSError as error:
        evaluate.fail(f"--out {args.out}: {error}")
    args.out = f"{folder}/{args.suite}.yaml"
    suite = json.dumps({"group": args.suite, "task": tasks})
    evaluate.write_output(args, inputs, [suite], started, counts=counts)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(parse_args())
