"""
No shared module: what two scripts need is copied, and the copies stay the same text.

Covers  top-level functions that appear under one name in two of the six scripts; no script imports another one.
Run     python -m pytest tests/test_copies.py
"""

import ast

import pytest
from conftest import REPO

SCRIPTS = ["generate.py", "score.py", "build_pairs.py", "train_dpo.py", "boundary.py", "evaluate.py"]


def top_level(script, kinds):
    text = (REPO / script).read_text()
    return [(node, ast.get_source_segment(text, node)) for node in ast.parse(text).body if isinstance(node, kinds)]


def test_copies_are_equal():
    copies = {}
    for script in SCRIPTS:
        for node, text in top_level(script, (ast.FunctionDef, ast.ClassDef)):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if node.name not in ("main", "parse_args") and not node.name.startswith("main_"):
                copies.setdefault(node.name, {})[script] = (decorators, text)
    # the plumbing that every script has: if this set shrinks, a copy was renamed and is no longer held to the others
    assert {name for name, of in copies.items() if len(of) == 6} >= {"fail", "read_jsonl", "check_prompt", "write_meta",
                                                                     "run_facts", "check_out"}
    for name, of in copies.items():
        first = next(iter(of))
        for script in of:
            assert of[script] == of[first], f"{name} of {script} is not that of {first}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    names = set()
    for node in ast.walk(ast.parse((REPO / script).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{script} imports from its own folder"
            names.add(node.module.split(".")[0])
    here = {path.stem for path in REPO.glob("*.py")} | {path.name for path in REPO.iterdir() if path.is_dir()}
    assert "argparse" in names and not names & here
