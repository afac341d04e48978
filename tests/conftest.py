"""What the tests share: a policy (all tiny models: models.py), rows, and scripts run as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

# the numbers expected are those of a CPU in float32; on a GPU the scripts would compute in bfloat16
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import pytest  # noqa: E402
from models import CHATML, make_policy, make_tokenizer  # noqa: E402, F401
from processes import Script  # noqa: E402


def tracked(*patterns):
    """Files that git tracks, as paths in the repository; without git, files there. None is my_*: those are
    a user's copies, which break no test."""
    command = ["git", "ls-files", "--", *(f":(glob){pattern}" for pattern in patterns)]
    lines = subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout.splitlines()
    paths = {Path(line) for line in lines if (REPO / line).exists()}
    if not paths:
        paths = {path.relative_to(REPO) for pattern in patterns for path in REPO.glob(pattern)}
    return sorted(str(path) for path in paths if not path.name.startswith("my_"))


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("policy"))


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run_script(script, *flags, cwd=None, expect=0):
    """A script as a user runs it; returns (last line of standard output as JSON or None, standard error)."""
    status, out, err = Script(script, *flags, cwd=cwd).wait()
    assert status == expect, f"exit {status}\n{out[-2000:]}\n{err[-4000:]}"
    lines = out.strip().splitlines()
    return (json.loads(lines[-1]) if expect == 0 else None), err


def thinking(response, form):
    """The response with reasoning before its text, in one of three forms; a text of "" is its end."""
    text = response["text"]
    if form % 3 == 0:
        return response | {"text": f"<think>\n1 + {form} is odd\n</think>\n\n{text}"}
    if form % 3 == 1:  # the prompt had the beginning
        return response | {"text": f"or {form}\n</think>\n\n{text}"}
    # its marks were special tokens, which the text does not show
    return response | {"text": f"analysis {form} final {text}", "final": text}
