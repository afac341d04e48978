"""
What the documents tell people to type is understood, and `--help` is quick.

Covers  every `python SCRIPT.py ...` and `torchrun ... SCRIPT.py ...` in README.md, demo.sh, recipes/ and the scripts'
        docstrings goes through that script's parse_args; `--help` of every script imports no engine.
Run     python -m pytest tests/test_commands.py
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPO

SCRIPTS = ["generate", "score", "build_pairs", "train_dpo", "boundary", "evaluate"]
DOCUMENTS = [path for path in (REPO / "README.md", REPO / "demo.sh", *sorted((REPO / "recipes").glob("*.sh")))
             if path.exists()]


def commands(text):
    """(script, [arguments]) of every command in a text, without comments, redirections and what follows a pipe."""
    text = re.sub(r"\d?>>?\s*[^\s`]+", " ", re.sub(r"\\\n\s*", " ", text))
    found = []
    for line in text.splitlines():
        # a variable stands for the interpreter in shell scripts; a backtick ends a command in a sentence
        match = re.search(rf"(?:python3?|torchrun|\$\w+)\b[^`]*?\b({'|'.join(SCRIPTS)})\.py\s+([^`]*)", line)
        if match:
            words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", match[2]), comments=True)
            ends = [i for i, word in enumerate(words) if word in ("|", "&&", "||", "&", "done") or word.endswith(";")]
            found.append((match[1], words[:ends[0]] if ends else words))
    return found


def sources():
    for script in SCRIPTS:
        docstring = ast.get_docstring(ast.parse((REPO / f"{script}.py").read_text()))
        yield from ((f"{script}.py", command) for command in commands(docstring))
    for path in DOCUMENTS:
        yield from ((path.name, command) for command in commands(path.read_text()))


SOURCES = list(sources())


@pytest.mark.parametrize("source, command", SOURCES,
                         ids=[f"{source}-{script}-{k}" for k, (source, (script, _)) in enumerate(SOURCES)])
def test_a_command_parses(source, command):
    script, words = command
    importlib.import_module(script).parse_args([word for word in words if word not in ("...", "[flags]")])


def test_every_script_shows_a_command_of_its_own():
    for script in SCRIPTS:
        assert any(source == f"{script}.py" and command[0] == script for source, command in SOURCES), script


def test_commands_are_found():
    text = "x\n    OMP_NUM_THREADS=1 python generate.py --a 'b c' \\\n        --d  # why\n"
    text += "`torchrun --nproc-per-node 8 train_dpo.py --e` | tee\npython score.py --f 2>/dev/null\n"
    assert commands(text) == [("generate", ["--a", "b c", "--d"]), ("train_dpo", ["--e"]), ("score", ["--f"])]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_engine(script):
    # torch itself loads in a second or two; transformers and vLLM take ten, and the three that only count need none of
    # them
    heavy = {"vllm", "transformers"}
    heavy |= set() if script in ("generate", "score", "train_dpo") else {"torch", "matplotlib"}
    code = (f"import sys, {script}\ntry:\n    {script}.parse_args(['--help'])\n"
            f"except SystemExit as error:\n    assert error.code == 0\n"
            f"print('loaded:', *({heavy!r} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    docstring = ast.get_docstring(ast.parse((REPO / f"{script}.py").read_text()))
    assert docstring.splitlines()[0] in done.stdout  # the manual
    assert done.stdout.splitlines()[-1] == "loaded:"
