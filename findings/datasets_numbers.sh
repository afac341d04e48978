#!/usr/bin/env bash
# Whether `datasets` keeps a number depends on the shape of the file and on the types of other columns.
#
# Versions   datasets 5.2.0, pandas 3.1.1, pyarrow 26.0.1, numpy 2.3.5 on Python 3.11
# Source     datasets/packaged_modules/json/json.py, _generate_tables: a file that is one list, and JSON lines in which a column has
#            several types, are written again by pandas' ujson_dumps, which rounds to ten digits after the point; other JSON lines
#            go to pyarrow as they are
# Expected   equal numbers: the files hold the same ones, written by json.dumps
# Seen       lines  [1e-12, 0.12345678901234568, -1234.5678901234567]
#            list   [0.0, 0.123456789, -1234.5678901235]
#            mixed  [0.0, 0.123456789, -1234.5678901235]   JSON lines whose column "answer" is a text here and a number there
#            In preference data a probability or a small margin becomes exactly 0 and its logarithm infinite, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1 numpy==2.3.5
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json

import datasets

datasets.disable_progress_bars()
numbers = [1e-12, 0.12345678901234568, -1234.5678901234567]
rows = [{"prompt": f"question {k}", "p_chosen": number} for k, number in enumerate(numbers)]
mixed = [{**row, "answer": answer} for row, answer in zip(rows, ["4", 5, "6"])]
with open("list.json", "w") as file:
    json.dump(rows, file)
for name, lines in (("lines", rows), ("mixed", mixed)):
    with open(f"{name}.json", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in lines)
read = {}
for name in ("lines", "list", "mixed"):
    read[name] = datasets.load_dataset("json", data_files=f"{name}.json", split="train")["p_chosen"][:]
    print(f"{name:6}{read[name]}")
assert read["lines"] == numbers, "plain JSON lines have changed"
assert read["list"] == read["mixed"] == [round(x, 10) for x in numbers], "numbers are kept now: the finding is out of date"
PYTHON
