"""
The form of the scripts: how long they are, what they import, how much a line says at once.

Covers  files that git tracks, but for my_*.py, a user's copies: formatted sizes, which are never raised;
        functions and statements that are too long; AST nodes per line of code; imports; names; `fmt: off`.
        Layout and line length are `ruff format --check` and `ruff check` in tests/run.sh.
Run     python -m pytest tests/test_style.py
"""

import ast
import io
import subprocess
import tokenize

import conftest
import pytest
from conftest import REPO, tracked

SIZES = {  # DESIGN's
    "generate": 500,
    "score": 400,
    "build_pairs": 310,
    "train_dpo": 1000,
    "evaluate": 470,
    "boundary": 260,
}
SHARED = {"common": 290, "chat": 220, "loading": 160}
LARGE_SIDE = {"report/table.py": 330, "report/figure.py": 330}  # others 300
FOLDERS = ("data", "scorers", "recipes", "report", "results")
VAGUE = "some of own found known alone place places seen mark where each taken".split()
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


TRACKED = tracked("*.py", *(f"{folder}/*.py" for folder in FOLDERS))
TOP = [path for path in TRACKED if "/" not in path]
SIDE = [path for path in TRACKED if "/" in path]
SCRIPTS = [f"{name}.py" for name in SIZES] + SIDE


def test_copies_are_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "REPO", tmp_path)
    (tmp_path / "scorers").mkdir()
    for name in ("a.py", "my_a.py", "b.py", "scorers/c.py", "scorers/my_c.py", "scorers/c.txt"):
        (tmp_path / name).write_text("x=1")
    assert tracked("*.py", "scorers/*.py") == ["a.py", "b.py", "scorers/c.py"]  # as from an archive
    for command in (["init", "-q"], ["add", "a.py", "my_a.py", "scorers"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert tracked("*.py", "scorers/*.py") == ["a.py", "scorers/c.py"]
    assert tracked("*.py") == ["a.py"]


def parse(path):
    return ast.parse((REPO / path).read_text())


def imported(nodes, path):
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports from its own folder"
            names.add(node.module.split(".")[0])
    return names


def test_the_top_level_has_these_scripts():
    """A copy that you commit is no such script if it is named my_NAME.py."""
    assert TOP == sorted(f"{name}.py" for name in SIZES | SHARED)


@pytest.mark.parametrize("path", TRACKED)
def test_size(path):
    most = (SIZES | SHARED).get(path.removesuffix(".py"), LARGE_SIDE.get(path, 300))
    lines = len((REPO / path).read_text().splitlines())
    assert lines <= most


# ----- imports
def ours(path):
    """(stages that a script imports, other side scripts of its folder)"""
    names = imported(ast.walk(parse(path)), path)
    beside = {
        other.split("/")[1].removesuffix(".py") for other in SIDE if other.split("/")[0] == path.split("/")[0]
    }
    return names & SIZES.keys(), names & beside


@pytest.mark.parametrize("path", TOP)
def test_a_stage_imports_no_other_stage(path):
    assert not ours(path)[0]
    assert path != "common.py" or "chat" not in imported(ast.walk(parse(path)), path)


@pytest.mark.parametrize("path", SIDE)
def test_a_side_script_imports_what_it_varies(path):
    stages, neighbours = ours(path)
    assert len(stages | neighbours) <= 1, f"{path} imports {stages | neighbours}"
    if path.startswith(("data/", "report/")):
        assert stages <= ({"evaluate"} if path == "report/compare.py" else set())
    assert not imported(ast.walk(parse(path)), path) & {*FOLDERS, "tests", "benchmarks"}


@pytest.mark.parametrize("name", SHARED)
def test_no_torch_at_the_top(name):
    assert not imported(parse(f"{name}.py").body, name) & {"torch", "transformers", "numpy"}


# ----- how much is said at once
def functions(node, inside=False):
    """(function, whether it is defined inside of another one) of a tree."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function:
            yield child, inside
        yield from functions(child, inside or is_function)


@pytest.mark.parametrize("path", TRACKED)
def test_no_function_is_too_long(path):
    for node, inside in functions(parse(path)):
        length = node.end_lineno - node.lineno + 1
        assert length <= (25 if inside else 60), f"{path}:{node.lineno} {node.name} has {length} lines"


def docstrings(tree):
    """The lines of a tree's docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def density(text):
    """AST nodes per line of code, without comments, empty lines and docstrings."""
    tree, lines = ast.parse(text), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return sum(1 for _ in ast.walk(tree)) / len(lines - docstrings(tree))


def test_density_by_hand():
    # Module, Assign, Name, Store, Constant; FunctionDef, arguments, the docstring's Expr and Constant, Pass
    assert density('a = 1  # why\n\n\ndef f():\n    """Two\n    lines."""\n    pass\n') == 10 / 3


@pytest.mark.parametrize("path", TOP)
def test_a_line_says_one_thing(path):
    assert density((REPO / path).read_text()) <= 13


def size_of(node):
    """Nodes of a statement without the statements in it; entries of a plain dict or list are not added up."""
    sizes = [size_of(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
    display = isinstance(node, (ast.Dict, ast.List, ast.Tuple, ast.Set))
    return 1 + (max(sizes, default=0) if display else sum(sizes))


def test_the_size_of_a_statement_by_hand():
    assert size_of(ast.parse("a = 1").body[0]) == 4  # Assign, Name, Store, Constant
    # Assign, Name, Store, Dict, and the 4 of the larger entry: BinOp, Constant, Add, Constant
    assert size_of(ast.parse("a = {1: 2, 3: 4 + 5}").body[0]) == 8


@pytest.mark.parametrize("path", TRACKED)
def test_no_statement_says_too_much(path):
    tree = parse(path)
    flags = [node for node in tree.body if getattr(node, "name", "") in ("parse_args", "make_parser")]
    allowed = {inner for node in flags for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and node not in allowed:
            assert size_of(node) <= 60, f"{path}:{node.lineno} has {size_of(node)} nodes"


# ----- what it says
def defined(tree):
    """(line, name) of variables, parameters, functions, classes and attributes that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name


@pytest.mark.parametrize("path", TOP)
def test_names_say_what_they_are(path):
    vague = [f"{path}:{line} {name}" for line, name in defined(parse(path)) if name in VAGUE]
    assert not vague


@pytest.mark.parametrize("path", TRACKED)
def test_nothing_is_looked_up_by_identity(path):
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    by_identity = [f"{path}:{node.lineno}" for node in calls if getattr(node.func, "id", "") == "id"]
    assert not by_identity


@pytest.mark.parametrize("path", TRACKED)
def test_formatting_is_not_switched_off(path):
    assert "fmt: off" not in (REPO / path).read_text() and "fmt: skip" not in (REPO / path).read_text()
