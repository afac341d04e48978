"""
What the documents tell people to type is understood, and `--help` is quick.

Covers  every `python SCRIPT.py ...` and `torchrun ... SCRIPT.py ...` in the README files and docstrings goes
        through the parse_args of its script; `--help` of a stage imports nothing that is heavy. What demo.sh
        and the recipes run is in test_recipes.py.
Run     python -m pytest tests/test_commands.py
"""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import lru_cache

import pytest
from conftest import REPO, tracked
from test_style import SIDE, SIZES

SCRIPTS = [f"{name}.py" for name in SIZES]
SCRIPTS += [path for path in SIDE if "def parse_args(" in (REPO / path).read_text()]  # others are imported
DOCUMENTS = tracked("README.md", "*/README.md", "results/*/README.md", "recipes/on_all_gpus.sh")


def commands(text):
    """(script, [arguments]) of every command in a text, without redirections and what follows a pipe."""
    text = re.sub(r"\d?>>?\s*[^\s`]+", " ", re.sub(r"\\\n\s*", " ", text))
    found = []
    for line in text.splitlines():
        # a variable is the interpreter in shell scripts; a backtick ends a command in a sentence
        match = re.search(r"(?:python3?|torchrun|\$\w+)\b[^`]*?\s([\w/]+\.py)\s+([^`]*)", line)
        if not match or match[1] not in SCRIPTS:
            continue
        words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", match[2]), comments=True)
        command = []
        for word in words:
            if word in ("|", "&&", "||", "&", "done", ";;"):
                break
            command.append(word.removesuffix(";"))
            if word.endswith(";"):
                break
        if "on_all_gpus.sh" in line:
            command += ["--out", "x"]  # which it adds
        found.append((match[1], command))
    return found


@lru_cache(maxsize=None)
def module_of(path):
    """A script as a module; report/figure.py imports its neighbour."""
    for folder in (REPO, (REPO / path).parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), REPO / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources():
    for script in SCRIPTS:
        docstring = ast.get_docstring(ast.parse((REPO / script).read_text()))
        yield from ((script, command) for command in commands(docstring))
    for path in DOCUMENTS:
        yield from ((path, command) for command in commands((REPO / path).read_text()))


SOURCES = list(sources())
IDS = [f"{source}-{script}-{k}" for k, (source, (script, _)) in enumerate(SOURCES)]


@pytest.mark.parametrize("source, command", SOURCES, ids=IDS)
def test_a_command_parses(source, command):
    script, words = command
    module_of(script).parse_args([word for word in words if word not in ("...", "[flags]")])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_a_command_of_its_own(script):
    assert any(source == script and command[0] == script for source, command in SOURCES)


def test_commands_are_found():
    text = "x\n    OMP_NUM_THREADS=1 python generate.py --a 'b c' \\\n        --d  # why\n"
    text += "`torchrun --nproc-per-node 8 train_dpo.py --e` | tee\npython score.py --f 2>/dev/null\n"
    text += "for i in 1; do $python recipes/s3_pairs.py --g $i; done\n"
    assert commands(text) == [
        ("generate.py", ["--a", "b c", "--d"]),
        ("train_dpo.py", ["--e"]),
        ("score.py", ["--f"]),
        ("recipes/s3_pairs.py", ["--g", "1"]),
    ]


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    assert error.code == 0
print("loaded:", *{"torch", "numpy", "transformers", "vllm", "matplotlib"} & sys.modules.keys())
"""


@pytest.mark.parametrize("script", SIZES)
def test_help_is_quick(script):
    # torch takes seconds; flags stand above it and are read there
    command = [sys.executable, "-c", HELP, f"{script}.py"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    docstring = ast.get_docstring(ast.parse((REPO / f"{script}.py").read_text()))
    assert docstring.splitlines()[0] in done.stdout  # the manual
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_wrong_flags_are_refused_as_quickly():
    code = HELP.replace('"--help"', '"--no-such-flag"').replace("== 0", "== 2")
    done = subprocess.run(
        [sys.executable, "-c", code, "train_dpo.py"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--pairs" in done.stderr and done.stdout.splitlines()[-1] == "loaded:"
