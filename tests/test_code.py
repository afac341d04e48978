"""
The code is part of a run: what an edited script finds of an unedited one.

Covers  the sha256 of the script and of our modules in every record; stages that resume (generate, score and
        scorers, train_dpo and a recipe that imports it), which refuse an --out of other code by name;
        quick stages, which replace it; --overwrite
Run     python -m pytest tests/test_code.py
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import REPO, read_rows, run_script, write_rows

PROMPTS = [{"id": f"p{k}", "prompt": f"Is it {k}?"} for k in range(3)]
RESPONSES = [
    {**row, "answer": "1", "responses": [{"text": text, "source": "off"} for text in ("1", "2")]}
    for row in PROMPTS
]
PAIRS = [{**row, "chosen": f"yes {row['id']}", "rejected": "no"} for row in PROMPTS]
SHARED = ["chat.py", "common.py", "loading.py"]


@pytest.fixture
def copy(tmp_path):
    """A copy of the project, which a test edits."""
    for path in [*REPO.glob("*.py"), REPO / "scorers/verify.py", REPO / "recipes/train_losses.py"]:
        target = tmp_path / "copy" / path.relative_to(REPO)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    write_rows(tmp_path / "responses.jsonl", RESPONSES)
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path / "copy"


def flags_of(script, folder, policy):
    """(flags, the file that a run appends to)"""
    out = folder / "out.jsonl"
    if script == "generate.py":
        flags = ["--prompts", folder / "prompts.jsonl", "--model", policy, "--n", 1, "--max-tokens", 4]
        return [*flags, "--backend", "hf", "--out", out], out
    if script == "scorers/verify.py":
        return ["--responses", folder / "responses.jsonl", "--out", out], out
    flags = ["--pairs", folder / "pairs.jsonl", "--model", policy, "--out", folder / "out", "--batch-size", 3]
    return flags, folder / "out/metrics.jsonl"


def edit(path):
    path.write_text(path.read_text() + "# a comment counts too\n")


@pytest.mark.parametrize(
    "script, modules",
    [
        ("generate.py", SHARED),
        ("scorers/verify.py", [*SHARED, "score.py"]),
        ("train_dpo.py", SHARED),
        ("recipes/train_losses.py", [*SHARED, "train_dpo.py"]),
    ],
)
def test_other_code_is_refused_where_a_run_resumes(copy, tmp_path, policy, script, modules):
    flags, out = flags_of(script, tmp_path, policy)
    run_script(copy / script, *flags)
    record = Path(out).with_suffix(".meta.json")
    code = {name: hashlib.sha256((copy / name).read_bytes()).hexdigest() for name in [script, *modules]}
    assert json.loads(record.read_text())["code"] == code

    before = out.read_bytes(), record.read_bytes()
    _, err = run_script(copy / script, *flags)
    assert "is complete; nothing was done" in err
    for name in (script, modules[-1]):
        original = (copy / name).read_text()
        edit(copy / name)
        _, err = run_script(copy / script, *flags, expect=2)
        assert f"--out {out} was written with other code ({name}); use another --out, or --overwrite" in err
        assert (out.read_bytes(), record.read_bytes()) == before
        (copy / name).write_text(original)
    edit(copy / script)
    run_script(copy / script, *flags, "--overwrite")
    code[script] = hashlib.sha256((copy / script).read_bytes()).hexdigest()
    assert json.loads(record.read_text())["code"] == code


def test_a_loss_that_was_edited_gives_no_old_numbers(copy, tmp_path, policy):
    flags, _ = flags_of("train_dpo.py", tmp_path, policy)
    counts, _ = run_script(copy / "train_dpo.py", *flags)
    text = (copy / "train_dpo.py").read_text()
    line = "return -F.logsigmoid(beta * (batch.chosen - batch.rejected))"
    assert text.count(line) == 1
    (copy / "train_dpo.py").write_text(text.replace(line, line.replace("return -", "return -100 * ")))
    run_script(copy / "train_dpo.py", *flags, expect=2)
    changed, _ = run_script(copy / "train_dpo.py", *flags, "--overwrite")
    assert changed["first_loss"] == pytest.approx(100 * counts["first_loss"])


def test_a_quick_stage_replaces_what_other_code_wrote(copy, tmp_path):
    rows = [
        row | {"responses": [response | {"reward": k} for k, response in enumerate(row["responses"])]}
        for row in RESPONSES
    ]
    scored = write_rows(tmp_path / "scored.jsonl", rows)
    flags = ["--scored", scored, "--on-ratio", 0, "--out", tmp_path / "pairs.jsonl"]
    run_script(copy / "build_pairs.py", *flags)
    before = json.loads((tmp_path / "pairs.meta.json").read_text())["code"]
    assert sorted(before) == ["build_pairs.py", "chat.py", "common.py"]
    assert read_rows(tmp_path / "pairs.jsonl")[0]["chosen"][0]["content"] == "2"
    text = (copy / "build_pairs.py").read_text()
    for old, new in ("max(usable", "min(usable"), ("return best, min(", "return best, max("):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (copy / "build_pairs.py").write_text(text)
    run_script(copy / "build_pairs.py", *flags)
    assert read_rows(tmp_path / "pairs.jsonl")[0]["chosen"][0]["content"] == "1"
    after = json.loads((tmp_path / "pairs.meta.json").read_text())["code"]
    assert after["build_pairs.py"] != before["build_pairs.py"] and after["chat.py"] == before["chat.py"]


def test_an_output_of_a_version_without_this_record(copy, tmp_path, policy):
    flags, out = flags_of("scorers/verify.py", tmp_path, policy)
    run_script(copy / "scorers/verify.py", *flags)
    path = out.with_suffix(".meta.json")
    record = json.loads(path.read_text())
    del record["code"]
    path.write_text(json.dumps(record))
    _, err = run_script(copy / "scorers/verify.py", *flags, expect=2)
    assert "was written with other code (chat.py)" in err


def test_a_module_of_a_package_beside_the_script(copy, tmp_path, policy):
    (copy / "mine").mkdir()
    (copy / "mine/rule.py").write_text("RULE = 1\n")
    script = copy / "my_train.py"
    script.write_text(
        (copy / "train_dpo.py").read_text().replace("import common\n", "import mine.rule\nimport common\n")
    )
    flags, out = flags_of("train_dpo.py", tmp_path, policy)
    run_script(script, *flags)
    assert "mine/rule.py" in json.loads(out.with_suffix(".meta.json").read_text())["code"]
    edit(copy / "mine/rule.py")
    assert (
        f"--out {out} was written with other code (mine/rule.py)" in run_script(script, *flags, expect=2)[1]
    )
