"""
A model -> the papers' benchmarks, by lm-eval (pip install -c constraints.txt "lm-eval[ifeval]==0.4.13").

Reads   --model   a folder, or OWNER/NAME on the hub
Writes  --out     JSON: {"average", "tasks": {task: {"score", "stderr", "n", ...}}, ...} in percent, and
                  the record of the run

simplemix     S1 section 4.1, Tables 4, 5: 8 tasks and their mean, for IFEval the share of prompts whose
              instructions are all followed ("loose"). S1 does not name examples, template and normalisation;
              its numbers fit none of them.
what-matters  S3 Table 7, as Tulu 3: chat template, examples as turns of the conversation, no average.

    python recipes/benchmarks.py --model out/on50 --suite simplemix --out on50.benchmarks.json

For machines without internet, --write-data SRC makes a folder --out of local files, which --data takes. SRC
has one .jsonl or .jsonl.gz file for each task, named as in FILES below.

    python recipes/benchmarks.py --suite simplemix --write-data files --out out/simplemix
    python recipes/benchmarks.py --suite simplemix --data out/simplemix --model out/on50 --out on50.json

Prints the result, or the number of rows of each task. S1 is SimpleMix, S3 "What Matters in Data for DPO?".
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import check_output, fail, note, read_jsonl, replace_file, write_output  # noqa: E402

SIMPLEMIX = "arc_challenge commonsense_qa hellaswag mmlu openbookqa piqa winogrande ifeval".split()
SUITES = {  # {task of lm-eval 0.4.13: examples before a question}; truthfulqa_mc2 has six more in its prompt
    "simplemix": dict.fromkeys(SIMPLEMIX, 0),
    "what-matters": {"mmlu": 5, "truthfulqa_mc2": 0, "ifeval": 0, "gsm8k_cot": 8},
}
METRICS = {
    "ifeval": "prompt_level_loose_acc,none",
    "gsm8k_cot": "exact_match,flexible-extract",
}  # or accuracy
FILES = {  # {task: (how the name of its file in SRC begins, columns of its rows as on the hub)}
    "arc_challenge": ("arc_challenge_test", "question, choices, answerKey"),  # or stem, choices, label
    "commonsense_qa": ("commonsenseqa_dev", "question, choices, answerKey"),  # or as its authors publish it
    "hellaswag": ("hellaswag", "activity_label, ctx_a, ctx_b, endings, label"),  # or ctx, choices, label
    "mmlu": ("mmlu_test", "subject, question, choices, answer"),  # the answer may be a digit as text
    "mmlu_dev": ("mmlu_dev", "subject, question, choices, answer"),  # examples before mmlu's questions
    "openbookqa": ("openbookqa_test", "question_stem, choices, answerKey"),  # or stem, choices, label
    "piqa": ("piqa_valid", "goal, sol1, sol2, label"),  # or stem, choices, label
    "winogrande": ("winogrande_xl_valid", "sentence, option1, option2, answer"),  # or stem, choices, label
    "ifeval": ("ifeval_input", "key, prompt, instruction_id_list, kwargs"),
    "truthfulqa_mc2": ("truthfulqa_mc", "question, mc2_targets"),  # these may be {text: label}
    "gsm8k_cot": ("gsm8k_test", "question, answer"),
}  # in the short forms choices are texts, and the label counts from 0
LOCAL = {"dataset_path": "json", "dataset_name": None, "test_split": "test"}  # how a task reads local rows
LOCAL |= {"training_split": None, "validation_split": None}
INSTALL = (
    'pip install -c constraints.txt "lm-eval[ifeval]==0.4.13"; without internet NLTK_DATA=DIR with punkt_tab'
)
PROBE = "import lm_eval.tasks.ifeval.utils, nltk; nltk.data.find('tokenizers/punkt_tab')"


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--model", metavar="MODEL", help="a folder, or OWNER/NAME on the hub")
    flag("--suite", required=True, choices=list(SUITES))
    flag("--backend", choices=["hf", "vllm"], help="what lm-eval runs the model with (default hf)")
    flag("--batch-size", metavar="N", help="for --backend hf (default 8)")
    flag("--limit", type=int, metavar="N", help="only the first N questions of each task")
    flag("--data", metavar="DIR", help="a folder that --write-data made, for machines without internet")
    flag("--write-data", metavar="SRC", help="make such a folder --out of the benchmarks' files in SRC")
    flag("--out", required=True, metavar="FILE", help="the result, JSON")
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.write_data):
        parser.error("give --model or --write-data")
    if args.write_data and (args.backend or args.batch_size or args.limit is not None or args.data):
        parser.error("--write-data runs no model: it takes only --suite and --out")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit must be at least 1, found {args.limit}")
    if args.batch_size and args.backend == "vllm":
        parser.error("--batch-size belongs to --backend hf; vLLM makes its own batches")
    args.backend = args.backend or "hf"
    return args


# ----- a model -> scores
def check_model(name, needs_template):
    """End the run if there is no such model, or it has no chat template and the suite needs one."""
    model = Path(name)
    if not (model / "config.json").exists() and (model.exists() or name.count("/") != 1):
        fail(f"{name}: expected a Hugging Face model folder or a hub id, found no config.json")
    config = model / "tokenizer_config.json"  # where older models have their template
    in_config = config.exists() and '"chat_template"' in config.read_text()
    if needs_template and model.exists() and not (in_config or (model / "chat_template.jinja").exists()):
        fail(f"{name}: what-matters needs a chat template, and the tokenizer has none")


def command_of(args, data, results):
    """lm-eval's command line: tasks are read in the folder `data`, and the folder `results` is written."""
    local = os.path.isdir(args.model)
    model_args = {"pretrained": os.path.realpath(args.model) if local else args.model, "dtype": "auto"}
    batch_size = args.batch_size or ("8" if args.backend == "hf" else "auto")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", args.backend, "--tasks", args.suite]
    command += ["--model_args", json.dumps(model_args), "--batch_size", batch_size]
    if args.suite == "what-matters":
        command += ["--apply_chat_template", "--fewshot_as_multiturn", "true"]
    if args.limit:
        command += ["--limit", str(args.limit)]
    return [*command, "--include_path", data, "--output_path", results]


def run_lm_eval(args, folder):
    """Run lm-eval with files in a temporary folder. Return (its results, its command)."""
    # lm-eval imports another `evaluate` than this project's: it runs in another folder and does not see ours
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    if args.data:  # its rows may have changed since they were cached under the same names
        env["HF_DATASETS_CACHE"] = f"{folder}/cache"
    else:
        tasks = []  # lm-eval's own, with the suite's number of examples
        for task, shots in SUITES[args.suite].items():
            tasks.append({"group" if task == "mmlu" else "task": task, "num_fewshot": shots})
        suite = json.dumps({"group": args.suite, "task": tasks})  # JSON is YAML
        replace_file(f"{folder}/{args.suite}.yaml", [suite])
    probed = subprocess.run([sys.executable, "-c", PROBE], cwd=folder, env=env, capture_output=True)
    if probed.returncode:
        lines = probed.stderr.decode().splitlines()
        reasons = [line.strip() for line in lines if "Error" in line or "not found" in line]
        fail(f"lm-eval does not start ({', '.join(reasons[-1:])}): {INSTALL}")
    command = command_of(args, os.path.abspath(args.data or folder), f"{folder}/results")
    done = subprocess.run(command, cwd=folder, env=env, stdout=sys.stderr)
    files = list(Path(folder).glob("results/**/results_*.json"))
    if done.returncode or not files:
        fail(f"lm-eval failed with exit status {done.returncode}; see its output above")
    return json.loads(files[0].read_text()), command


def task_scores(suite, results):
    """{task: score and standard error in percent, n, ...} from lm-eval's results file."""
    scores = {}
    for task in SUITES[suite]:
        metric, numbers = METRICS.get(task, "acc,none"), results["results"][task]
        error = numbers[metric.replace(",", "_stderr,")]  # "N/A" of one question
        parts = [name for name in results["n-samples"] if name == task or name.startswith(f"{task}_")]
        scores[task] = {
            "score": 100 * numbers[metric],
            "stderr": None if error == "N/A" else 100 * error,
            "n": sum(results["n-samples"][name]["effective"] for name in parts),
            "metric": metric,
            "shots": results["n-shot"][parts[0]] + (6 if task == "truthfulqa_mc2" else 0),
            "version": results["versions"][parts[0]],
        }
    return scores


def run_benchmarks(args):
    check_output(args.out, [])  # before lm-eval has run for hours
    chat = args.suite == "what-matters"
    check_model(args.model, chat)
    if args.data and not Path(args.data, f"{args.suite}.yaml").exists():
        fail(f"--data {args.data}: expected {args.suite}.yaml, which --write-data makes")
    with tempfile.TemporaryDirectory() as folder:
        results, command = run_lm_eval(args, folder)
    scores = task_scores(args.suite, results)
    average = None if chat else sum(task["score"] for task in scores.values()) / len(scores)
    result = {"kind": "benchmarks", "suite": args.suite, "model": args.model, "average": average}
    result |= {"tasks": scores, "chat_template": chat, "backend": args.backend, "limit": args.limit}
    if chat:
        result["note"] = "UltraFeedback has prompts of TruthfulQA, so trained models may know its answers"
    text = json.dumps(result)
    facts = {name: results.get(name) for name in ("lm_eval_version", "transformers_version")}
    facts["model_sha"] = results["config"].get("model_sha")  # the commit of a model on the hub
    data = sorted(map(str, Path(args.data).iterdir())) if args.data else []
    data = [path for path in data if path.endswith((".yaml", ".jsonl"))]
    write_output(args, data, [text], command=command, counts={"tasks": len(scores)}, **facts)
    print(text)


# ----- local files -> a folder for --data
def hub_row(task, row):
    """A row with the columns that the task's data set has on the hub."""
    columns = FILES[task][1].split(", ")
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
    """Return (path, rows as on the hub) of the one file of a task."""
    name, columns = FILES[task]
    paths = sorted([*Path(folder).glob(f"{name}*.jsonl"), *Path(folder).glob(f"{name}*.jsonl.gz")])
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        fail(f"{folder}: expected one file {name}*.jsonl or {name}*.jsonl.gz, found {names}")
    rows = []
    for line, row in read_jsonl(str(paths[0]), dict):
        try:
            rows.append(hub_row(task, row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            fail(f"{line}: expected a row of {task} with {columns}, found {error!r:.80}")
    return str(paths[0]), rows


def mmlu_files(folder, questions, examples):
    """{path: rows} of questions and examples of each subject, and of the group in place of lm-eval's mmlu."""
    files, tasks = {}, []
    for subject in dict.fromkeys(row["subject"] for row in questions):
        paths = {split: f"{folder}/mmlu_{subject}_{split}.jsonl" for split in ("test", "dev")}
        files[paths["test"]] = [row for row in questions if row["subject"] == subject]
        files[paths["dev"]] = [row for row in examples if row["subject"] == subject]
        if not files[paths["dev"]]:
            fail(f"mmlu_dev: expected examples of every subject of mmlu_test, none is of {subject}")
        tasks.append({"task": f"mmlu_{subject}", "dataset_kwargs": {"data_files": paths}, **LOCAL})
    group = {"group": "mmlu", "task": tasks}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]  # as lm-eval's
    return files | {f"{folder}/mmlu.yaml": [group]}


def write_data(args):
    """Write rows as on the hub, and SUITE.yaml: lm-eval's own tasks, which read them."""
    folder = os.path.realpath(args.out)
    if os.path.realpath(args.write_data) == folder:
        fail(f"--out {args.out}: expected another folder than that of --write-data")
    inputs, outputs, tasks, counts = [], {}, [], {}
    for task, shots in SUITES[args.suite].items():
        path, rows = read_rows(args.write_data, task)
        inputs.append(path)
        counts[task] = len(rows)
        if task == "mmlu":
            path, examples = read_rows(args.write_data, "mmlu_dev")
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
            note("hellaswag: the rows have no activity label, with which lm-eval's own prompts begin")
    for path, rows in outputs.items():
        replace_file(path, map(json.dumps, rows))
    args.out = f"{folder}/{args.suite}.yaml"
    write_output(args, inputs, [json.dumps({"group": args.suite, "task": tasks})], counts=counts)
    print(json.dumps(counts))


def main(args):
    if args.write_data:
        write_data(args)
    else:
        run_benchmarks(args)


if __name__ == "__main__":
    main(parse_args())
