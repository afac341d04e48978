#!/usr/bin/env bash
# A text in JSON lines comes out of `datasets` as a number, as None or as a list, if its column has other types too.
#
# Versions   datasets 5.2.0, pandas 3.1.1, pyarrow 26.0.1, numpy 2.3.5 on Python 3.11
# Source     datasets/utils/json.py, json_encode_field: in a column of several types every value is stored as JSON, but a text
#            that is JSON already is stored as it is; json_decode_field reads it as what it would mean without its quotes
# Expected   the texts of the file, as from a column that has only texts: "4" is a text, "null" is four letters
# Seen       answer   ['4', 'null', 'true', '[1, 2]', 'four', 5]  ->  [4, None, True, [1, 2], 'four', 5]
#            content  ['2 + 2?', '4', [{'type': 'text', ...}], 'null']  ->  ['2 + 2?', 4, [{'type': 'text', ...}], None]
#            So in a chat whose content is a text here and a list of parts there, an assistant's answer "4" is an integer and its
#            answer "null" is gone. No warning.
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


def load(name, rows):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train")


texts = ["4", "null", "true", "[1, 2]", "four"]
assert load("texts", [{"answer": text} for text in texts])["answer"][:] == texts
answers = [*texts, 5]
read = load("answers", [{"answer": answer} for answer in answers])["answer"][:]
print(f"answer   {answers}  ->  {read}")
assert read == [4, None, True, [1, 2], "four", 5], "texts are kept now: the finding is out of date"

parts = [{"type": "text", "text": "Not a number?"}]
chats = [["2 + 2?", "4"], [parts, "null"]]
rows = []
for question, answer in chats:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows.append({"messages": turns})
read = [[turn["content"] for turn in turns] for turns in load("chats", rows)["messages"][:]]
print(f"content  {sum(chats, [])}  ->  {sum(read, [])}")
assert read == [["2 + 2?", 4], [parts, None]], "texts are kept now: the finding is out of date"
PYTHON
