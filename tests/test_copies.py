"""
No shared module: what two scripts need is copied, and the copies stay the same text.

Covers  top-level functions that appear under one name in two of the six scripts.
Run     python -m pytest tests/test_copies.py
"""

import ast

import pytest
from conftest import REPO
from test_style import SIZES

# Every script has a main, arguments and science of its own; these names mean the same thing in all of them.
QUICK = {"fail", "read_jsonl", "read_responses", "normalise", "check_output", "write_output"}
SLOW = {
    "fail",
    "read_jsonl",
    "shard_of",
    "make_record",
    "model_state",
    "open_output",
    "rows_done",
    "append_rows",
}
SLOW |= {"write_record", "load_tokenizer", "check_weights", "load_model", "prompt_ids", "end_of_turn"}
SLOW |= {"count_special", "fingerprint"}
TRAIN = SLOW - {"shard_of", "load_model", "count_special"} | {"stable_hash", "completion_ids"}
SHARED = {"build_pairs": QUICK, "boundary": QUICK, "evaluate": QUICK}
SHARED |= {"generate": SLOW, "score": SLOW, "train_dpo": TRAIN}
HEADING = "# ----- reading and writing: the same text in every script that has it (tests/test_copies.py)"


def functions(script):
    """{name: text} of a script's top-level functions."""
    text = (REPO / f"{script}.py").read_text()
    return {
        node.name: ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name not in ("main", "parse_args", "make_parser")
    }


def test_copies_are_equal():
    texts = {}
    for script in SIZES:
        for name, text in functions(script).items():
            texts.setdefault(name, {})[script] = text
    for name, copies in texts.items():
        assert len(set(copies.values())) == 1, f"{name} differs between {', '.join(copies)}"


@pytest.mark.parametrize("script", SHARED)
def test_what_is_shared_comes_last(script):
    # if a name is missing, a copy was renamed and is no longer held to the others
    lines = (REPO / f"{script}.py").read_text().splitlines()
    start = lines.index(HEADING)
    names = {line.split("(")[0].removeprefix("def ") for line in lines[start:] if line.startswith("def ")}
    extra = {"stable_hash", "check_prompt", "read_responses", "normalise"}
    assert SHARED[script] <= names <= SHARED[script] | extra
    assert len(lines) - start <= (125 if SHARED[script] is QUICK else 335)
