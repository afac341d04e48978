"""
No shared module: what two scripts need is copied, and the copies stay the same text.

Covers  top-level functions that appear under one name in two of the six scripts. The rewritten ones are
        compared with one another, and so are the others until they are rewritten.
Run     python -m pytest tests/test_copies.py
"""

import ast

import pytest
from conftest import REPO
from test_style import REWRITTEN_LATER, SIZES

# Every script has a main, arguments and science of its own; these names mean the same thing in all of them.
SHARED = {"fail", "read_jsonl", "read_responses", "normalise", "check_output", "write_output"}
SHARED_LATER = {"fail", "read_jsonl", "check_prompt", "write_meta", "run_facts", "check_out"}


def functions(script):
    """{name: text} of a script's top-level functions."""
    text = (REPO / f"{script}.py").read_text()
    return {
        node.name: ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name not in ("main", "parse_args")
    }


@pytest.mark.parametrize("scripts, shared", [(list(SIZES), SHARED), (REWRITTEN_LATER, SHARED_LATER)])
def test_copies_are_equal(scripts, shared):
    texts = {}
    for script in scripts:
        for name, text in functions(script).items():
            texts.setdefault(name, {})[script] = text
    for name in shared:  # if one is missing, a copy was renamed and is no longer held to the others
        assert list(texts[name]) == scripts, name
    for name, copies in texts.items():
        assert len(set(copies.values())) == 1, f"{name} differs between {', '.join(copies)}"


@pytest.mark.parametrize("script", SIZES)
def test_what_is_shared_comes_last_and_is_short(script):
    lines = (REPO / f"{script}.py").read_text().splitlines()
    heading = "# ----- reading and writing: the same text in every script that has it (tests/test_copies.py)"
    start = lines.index(heading)
    names = [line.split("(")[0].removeprefix("def ") for line in lines[start:] if line.startswith("def ")]
    assert set(names) - {"stable_hash"} == SHARED and len(lines) - start <= 110
