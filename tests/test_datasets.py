"""
Pairs in the datasets library, by the line that README gives.

Covers  over 20 MB of build_pairs.py's output, in which columns of nulls, whole numbers or objects become
        lists, fractions or larger objects late: every value of every row, and the types that TRL reads; a
        column of texts and numbers is refused, not changed.
Run     python -m pytest tests/test_datasets.py     (skipped where datasets is not installed)
"""

import json

import pytest
from conftest import REPO, run_script, write_rows

datasets = pytest.importorskip("datasets")
BLOCK = 10 << 20  # what datasets looks at to fix the types of columns, if it is not told to look further
MESSAGES = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]


def load(path):
    """What README's line makes of the file."""
    lines = [line for line in (REPO / "README.md").read_text().splitlines() if "load_dataset(" in line]
    lines = [line.strip() for line in lines if "PATH" in line]
    names = {"datasets": datasets, "PATH": str(path)}
    exec(lines[0], names)
    return names["d"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def scored(name, n, **keys):
    """Rows as score.py writes them: two responses of others, two sampled ones with token ids."""
    off, on = [], []
    for k in range(2):
        off.append({"text": f"off {k} " + "lorem ipsum \u00e9\n" * 250, "source": "off", "reward": k})
        on.append({"text": f"on {k}", "source": "on", "reward": k + 0.5, "finish": "stop"})
        on[k] |= {"token_ids": [1, 2, 3 + k], "tokenizer": "abc", "logp": -1.25}
    rows = []
    for i in range(n):
        row = {"id": f"{name}{i}", "prompt": f"question {i}", "labeler": "rm:x", "responses": off + on}
        rows.append(row | keys)
    return rows


def pairs_of(folder, name, rows, ratio):
    """The lines that build_pairs.py writes of the rows."""
    path, out = write_rows(folder / f"{name}.jsonl", rows), folder / f"{name}.pairs.jsonl"
    summary, _ = run_script("build_pairs.py", "--scored", path, "--on-ratio", ratio, "--out", out)
    assert summary["pairs"] == len(rows)
    return out.read_text()


def equal(ours, theirs):
    """Equal values; a key that is missing in an object is null in a table."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(equal(ours.get(key), theirs.get(key)) for key in ours.keys() | theirs.keys())
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs and isinstance(ours, str) == isinstance(theirs, str)


def test_every_row_is_in_the_table_as_it_is_in_the_file(tmp_path):
    keys = {"category": None, "prompt_token_ids": None, "level": 1, "details": {"votes": 3}, "turns": []}
    first = pairs_of(tmp_path, "first", scored("a", 3000, **keys), 0)
    keys = {"category": "math", "prompt_token_ids": [5, 6], "level": 1e-12, "turns": [{"k": [0.1]}]}
    keys |= {"details": {"votes": 0.12345678901234568, "by": {"judge": "4", "null": None}}, "year": "1999"}
    last = pairs_of(tmp_path, "last", scored("b", 40, **keys), 1)
    path = tmp_path / "pairs.jsonl"
    path.write_text(first + last)
    assert len(first.encode()) > 2 * BLOCK  # all of which has null where the last rows have lists
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["chosen_token_ids"] for i in (0, 2999, 3000)] == [None, None, [1, 2, 4]]
    d = load(path)
    assert len(d) == len(lines) == 3040
    for row, line in zip(d, lines):
        expected = json.loads(line)
        assert row.keys() >= expected.keys()
        assert equal(row, expected), expected["id"]
    # as TRL's DPOTrainer reads them
    types = {name: d.features[name] for name in ("prompt", "chosen", "rejected")}
    assert types == dict.fromkeys(types, datasets.Features({"x": MESSAGES})["x"])
    assert d.features["chosen_token_ids"] == datasets.List(datasets.Value("int64"))
    assert d.features["chosen_reward"] == d.features["level"] == datasets.Value("float64")


def test_texts_and_numbers_in_a_column_are_refused(tmp_path):
    """By default datasets would make the text "4" a number, and round numbers to ten digits."""
    path = write_rows(tmp_path / "pairs.jsonl", [{"answer": "4"}, {"answer": 5}])
    with pytest.raises(datasets.exceptions.DatasetGenerationError) as error:
        load(path)
    assert "changed from string to number" in str(error.value.__cause__)
