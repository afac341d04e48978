"""
How long data/import_responses.py takes, and how much memory, for 61,135 rows of UltraFeedback's shape.

    git worktree add /tmp/old a27d8ec
    python benchmarks/import.py --old /tmp/old

A parquet file is written, whose rows have four answers with their ratings, reasons and critiques; lengths are
log-normal around UltraFeedback's; texts are random words, or with --texts those of a file. This version and
the one in the folder --old import it in turn, each run a process of its own, and must write the same bytes.
Prints a table of medians over --rounds: seconds, those of the processor, and the peak memory of the process.
"""

import argparse
import filecmp
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
from pyarrow.parquet import ParquetWriter

REPO = Path(__file__).resolve().parent.parent
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
MODELS = ("alpaca-7b", "gpt-4", "llama-2-13b-chat", "wizardlm-7b")
CHARACTERS = {"instruction": 800, "response": 1200, "critique": 700, "rationale": 200}  # means
BATCH = 1000  # rows that are written at once
# runs the command after it, and prints its seconds, those of the processor, and the kilobytes of its peak
MEASURED = """import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)"""


def make_words(path, draw):
    """Words that texts are cut from: those of the file's texts, or random ones."""
    if path is None:
        letters = "abcdefghijklmnopqrstuvwxyzé\n"
        vocabulary = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(5000)]
        return draw.choices(vocabulary, k=400_000)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return " ".join(json.loads(line)["response"] for line in file).split(" ")


def make_row(number, words, draw):
    def text(kind):
        length = (
            draw.lognormvariate(0, 0.7) * CHARACTERS[kind] / 1.28 / 6.4
        )  # in words; 1.28: exp(0.7**2 / 2)
        start = draw.randrange(len(words) - 2000)
        return " ".join(words[start : start + 1 + int(length)])

    completions = []
    for model in MODELS:
        notes = {name: {"Rating": draw.choice("12345"), "Rationale": text("rationale")} for name in ASPECTS}
        completion = {"model": model, "response": text("response"), "annotations": notes}
        completion |= {"custom_system_prompt": "Be helpful.", "critique": text("critique")}
        completions.append(
            completion | {"overall_score": draw.choice([7.0, 8.5]), "fine-grained_score": 4.25}
        )
    row = {"source": "flan", "instruction": f"{number} {text('instruction')}", "models": list(MODELS)}
    return row | {"completions": completions, "correct_answers": ["None"]}


def write_table(path, count, words, draw, group):
    """`count` rows as parquet, in row groups of `group` rows."""
    rows = [make_row(number, words, draw) for number in range(BATCH)]
    schema = pyarrow.Table.from_pylist(rows).schema
    tables = []
    with ParquetWriter(path, schema) as writer:
        for first in range(0, count, BATCH):
            numbers = range(first, min(first + BATCH, count))
            rows = [make_row(number, words, draw) for number in numbers]
            tables.append(pyarrow.Table.from_pylist(rows, schema=schema))
            if len(tables) * BATCH >= group or numbers.stop == count:
                writer.write_table(pyarrow.concat_tables(tables), row_group_size=group)
                tables = []


def measure(root, data, out):
    """(seconds, those of the processor, peak memory in GB) of an import by the version in `root`."""
    command = [sys.executable, root / "data" / "import_responses.py", "--format", "ultrafeedback"]
    command += ["--data", data, "--out", out]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], check=True, capture_output=True, text=True
    )
    seconds, processor, kilobytes = map(float, done.stdout.split())
    return seconds, processor, kilobytes * 1024 / 1e9


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--old", metavar="FOLDER", help="another version of the repository")
    parser.add_argument("--count", type=int, default=61_135, help="rows (default %(default)s)")
    parser.add_argument("--group", type=int, default=BATCH, help="rows of a row group (default %(default)s)")
    parser.add_argument("--texts", metavar="FILE", help="words of these responses, .jsonl.gz")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    args = parser.parse_args()
    draw = random.Random(0)
    roots = {"this": REPO} | ({"old": Path(args.old)} if args.old else {})
    with tempfile.TemporaryDirectory() as folder:
        data, started = Path(folder, "data.parquet"), time.perf_counter()
        write_table(data, args.count, make_words(args.texts, draw), draw, args.group)
        size, seconds = data.stat().st_size / 1e9, time.perf_counter() - started
        print(f"{args.count} rows, {size:.2f} GB of parquet, made in {seconds:.0f} s", file=sys.stderr)
        runs = {version: [] for version in roots}
        for _ in range(args.rounds):
            for version, root in roots.items():
                runs[version].append(measure(root, data, f"{folder}/{version}.jsonl"))
        written = os.path.getsize(f"{folder}/this.jsonl") / 1e9
        if args.old and not filecmp.cmp(f"{folder}/this.jsonl", f"{folder}/old.jsonl", shallow=False):
            sys.exit("the two versions write different rows")
    print("| version | seconds | of the processor | peak memory |\n|---|---|---|---|")
    medians = {}
    for version, numbers in runs.items():
        medians[version] = tuple(map(statistics.median, zip(*numbers, strict=True)))
        seconds, processor, peak = medians[version]
        print(f"| {version} | {seconds:.1f} | {processor:.1f} | {peak:.2f} GB |")
    print(json.dumps({"parquet_gb": size, "written_gb": written, "medians": medians, "runs": runs}))


if __name__ == "__main__":
    main()
