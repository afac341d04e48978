"""
demo.sh and the recipes from the first line to the last, with a stand-in for Python that notes the commands.

Covers  every command is understood by the script that it names; every file that it reads was made by an
        earlier one or is in the project; what a recipe needs and does not have is one sentence, before the
        first command; a failed step ends it; a kill of on_all_gpus.sh reaches what it started.
Run     python -m pytest tests/test_recipes.py
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, write_rows
from test_commands import SCRIPTS, module_of

RECIPES = sorted(path.name for path in (REPO / "recipes").glob("*.sh") if path.name != "settings.sh")
BEFORE = {"s1_fig3.sh": "s1_table2.sh"}  # the recipe whose verdicts it reads
SAMPLES_NOTHING = ("s1_fig7.sh",)
SOURCED = [name for name in RECIPES if "settings.sh" in (REPO / "recipes" / name).read_text()]

# Notes "SCRIPT FLAGS" in commands.log, missing files in missing.log, and writes what the script would.
STAND_IN = r"""#!/usr/bin/env bash
case $1 in -c) echo 0.6; exit ;; -) cat >/dev/null; exit ;; esac
[ "$1" = --nproc-per-node ] && shift 2
printf '%s\n' "$(printf '%q ' "$@")" >>commands.log # at once: two GPUs write
script=$1
shift
last= out=
for word in "$@"; do
  [ "$last" = --out ] && out=$word
  case $last in
    --out) ;;
    --model | --baseline | --reference)
      case $word in
        out/*) [ -d "$word" ] || echo "$script $last $word" >>missing.log ;;
      esac ;;
    *)
      case $word in
        *.jsonl | *.json | */metrics.*) [ -e "$word" ] || echo "$script $word" >>missing.log ;;
      esac ;;
  esac
  last=$word
done
case $script in
  train_dpo.py | recipes/train_online.py)
    mkdir -p "$out"
    touch "$out"/{config.json,metrics.jsonl,metrics.meta.json} ;;
  data/get_models.py) mkdir -p "$out"/{policy,reward}; touch "$out"/{policy,reward}/config.json ;;
  report/table.py) mkdir -p "$out"; echo "setting,runs" >"$out/settings.csv" ;;
  *)
    mkdir -p "$(dirname "$out")"
    echo '{"advice": "", "score": 0.6}' >"$out"; touch "${out%.*}.meta.json" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the shell scripts and the data whose .venv has the stand-in; a machine with two GPUs."""
    for name in ("recipes", "data"):
        shutil.copytree(REPO / name, tmp_path / name)
    for name in ("demo.sh", "requirements.txt", "requirements-cpu.txt", "constraints.txt"):
        shutil.copy(REPO / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    nvidia = "#!/bin/sh\n[ $# = 0 ] || printf '0\\n1\\n'\n"
    for name, text in {"python": STAND_IN, "torchrun": STAND_IN, "nvidia-smi": nvidia}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "alpaca_eval").mkdir()
    for name in ("alpaca_eval_gpt4_baseline.json", "df_gamed.csv", "alpaca_eval_clf.txt"):
        (tmp_path / "alpaca_eval" / name).touch()
    return tmp_path


def run(checkout, script, **variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI")}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    environment |= {"PATH": f"{checkout}/.venv/bin:{environment['PATH']}", **variables}
    command = ["bash", script]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def run_recipe(checkout, name, **variables):
    if name in BEFORE:
        assert run_recipe(checkout, BEFORE[name], **variables).returncode == 0
    return run(checkout, f"recipes/{name}", **variables)


def noted(checkout, script):
    """The arguments, parsed, of every noted command of a script."""
    lines = map(shlex.split, (checkout / "commands.log").read_text().splitlines())
    return [module_of(script).parse_args(words) for name, *words in lines if name == script]


def check_commands(checkout):
    """Parse what was noted; returns the names of the scripts, in order."""
    missing = checkout / "missing.log"
    assert not missing.exists(), missing.read_text()
    scripts, parsed = [], set()
    for line in (checkout / "commands.log").read_text().splitlines():
        script, *words = shlex.split(line)
        assert script in SCRIPTS, line
        scripts.append(script)
        if line not in parsed:
            module_of(script).parse_args(words)
        parsed.add(line)
    return scripts


def make_demo_models(checkout):
    for name in ("policy", "reward"):
        (checkout / "out" / "models" / name).mkdir(parents=True)
        (checkout / "out" / "models" / name / "config.json").touch()


def test_the_demo(checkout):
    for requirements in ("requirements.txt", "requirements-cpu.txt"):
        text = (checkout / requirements).read_bytes() + (checkout / "constraints.txt").read_bytes()
        (checkout / ".venv" / f"installed-{hashlib.sha256(text).hexdigest()[:16]}").touch()
    done = run(checkout, "demo.sh")
    assert done.returncode == 0, done.stderr
    scripts = check_commands(checkout)
    assert scripts[:3] == ["data/get_models.py", "generate.py", "data/import_responses.py"]
    assert scripts.count("train_dpo.py") == 3 and scripts[-1] == "report/table.py"
    assert "report.md" in done.stdout and "recipes/s1_fig4.sh" in done.stdout


@pytest.mark.parametrize("name", SOURCED)
def test_a_recipe_for_the_demo(checkout, name):
    make_demo_models(checkout)
    done = run_recipe(checkout, name, SCALE="demo")
    assert done.returncode == 0, done.stderr
    scripts = check_commands(checkout)
    trainings = sum(script in ("train_dpo.py", "recipes/train_online.py") for script in scripts)
    assert 1 <= trainings <= 6 or name in SAMPLES_NOTHING
    assert scripts[-1].startswith("report/")


@pytest.mark.parametrize("name", SOURCED)
def test_a_recipe_at_the_papers_scale(checkout, name):
    done = run_recipe(checkout, name, SEEDS="0 1", JUDGE="judge", OPENAI_API_KEY="key")
    assert done.returncode == 0, done.stderr
    scripts = check_commands(checkout)
    assert scripts[-1].startswith("report/")
    lines = (checkout / "commands.log").read_text().splitlines()
    for shard in ("--shard 0/2", "--shard 1/2"):
        sampled = [
            line for line in lines if shard in line and ("generate.py" in line or "recipes/sample_" in line)
        ]
        assert sampled or name in SAMPLES_NOTHING


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_screen(name):
    assert len((REPO / "recipes" / name).read_text().splitlines()) <= 60


@pytest.mark.parametrize("scale, rate", [("demo", 2e-5), ("paper", 1e-6)])
def test_the_rates_of_supervised_training(checkout, scale, rate):
    # S3 B.3; its DPO has 5e-7 and the preset's 0.99
    make_demo_models(checkout)
    variables = {"SCALE": scale, "SETS": "best_worst sft", "SEEDS": "0", "JUDGE": "j", "OPENAI_API_KEY": "k"}
    assert run(checkout, "recipes/s3_tiers.sh", **variables).returncode == 0
    found = {args.loss: (args.lr, args.adam_beta2) for args in noted(checkout, "train_dpo.py")}
    assert found == {"dpo": (5e-7 if scale == "paper" else rate, 0.99), "sft": (rate, 0.95)}


def test_shares_by_category_take_every_prompt_once(checkout):
    """The Python of category_shares.sh on the pairs of two calls: off-policy for the two categories."""
    (checkout / "parts").mkdir()
    categories = {"a": "writing", "b": "facts", "c": None, "d": "roleplay"}
    for source in ("on", "off"):
        rows = [{"id": key, "category": category, "source": source} for key, category in categories.items()]
        write_rows(checkout / "parts" / f"{source}.pairs.jsonl", rows)
    script = (REPO / "recipes" / "category_shares.sh").read_text()
    code = script.split("<<'END'\n")[1].split("\nEND\n")[0]
    command = [sys.executable, "-c", code, "parts", "writing", "roleplay"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["id"], row["source"]) for row in rows] == [
        ("b", "on"),
        ("c", "on"),
        ("a", "off"),
        ("d", "off"),
    ]


@pytest.mark.parametrize(
    "variables, sentence",
    [
        ({"OPENAI_API_KEY": "k"}, "s1_fig4.sh: JUDGE is not set; give the model that judges"),
        ({"JUDGE": "j"}, "s1_fig4.sh: OPENAI_API_KEY is not set"),
        (
            {"JUDGE": "j", "OPENAI_API_KEY": "k", "ALPACA": "x"},
            "s1_fig4.sh: x/alpaca_eval_gpt4_baseline.json does not exist; set ALPACA",
        ),
        (
            {"SCALE": "demo"},
            "s1_fig4.sh: SCALE=demo needs the models that demo.sh makes; run bash demo.sh first",
        ),
        ({"SCALE": "small"}, "s1_fig4.sh: SCALE must be paper or demo, found small"),
    ],
)
def test_what_a_recipe_needs(checkout, variables, sentence):
    done = run(checkout, "recipes/s1_fig4.sh", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1
    assert not (checkout / "commands.log").exists() and not (checkout / "out").exists()


@pytest.mark.parametrize("scale", ["demo", "paper"])
def test_a_recipe_without_the_one_before_it(checkout, scale):
    done = run(checkout, "recipes/s1_fig3.sh", SCALE=scale)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"s1_fig3.sh: out/s1_table2/{scale}/")
    assert "_on.judged/0.jsonl does not exist; run bash recipes/s1_table2.sh" in done.stderr
    assert done.stderr.count("\n") == 1 and not (checkout / "commands.log").exists()


def test_a_model_that_cannot_be_had(checkout):
    (checkout / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    variables = {"JUDGE": "j", "OPENAI_API_KEY": "k", "MODEL": "no/model", "HF_HUB_OFFLINE": "1"}
    done = run(checkout, "recipes/s1_fig4.sh", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("s1_fig4.sh: no/model: ") and done.stderr.count("\n") == 1
    assert not (checkout / "out").exists()


def test_a_failed_step_ends_the_recipe(checkout):
    make_demo_models(checkout)
    program = checkout / ".venv" / "bin" / "python"
    program.write_text(program.read_text().replace("last=", '[ "$script" = score.py ] && exit 1\nlast=', 1))
    done = run(checkout, "recipes/s1_fig4.sh", SCALE="demo")
    assert done.returncode == 1
    lines = (checkout / "commands.log").read_text().splitlines()
    assert lines[-1].startswith("score.py")


def test_a_kill_reaches_every_process(checkout):
    script = 'echo $$ >"${@: -1}"; exec sleep 60'
    command = ["bash", "recipes/on_all_gpus.sh", "out/on", "bash", "-c", script, "x"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1"}
    with subprocess.Popen(command, cwd=checkout, env=environment) as process:
        paths = [Path(checkout, f"out/on/{i}.jsonl") for i in range(2)]
        while not all(path.exists() and path.read_text() for path in paths):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) != 0
    for path in paths:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_answers_of_more_gpus_are_not_mixed_with_those_of_fewer(checkout):
    command = ["bash", "recipes/on_all_gpus.sh", "out/on", "bash", "-c", 'echo $* >"${@: -1}"', "x"]
    for gpus, files in (("0,1,2", 3), ("0", 3), ("4,5", 3), ("3,4,5", 3)):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert len(list(Path(checkout, "out/on").glob("*.jsonl"))) == files
        if gpus.count(",") == 2:
            assert done.returncode == 0
            assert Path(checkout, "out/on/2.jsonl").read_text() == "--shard 2/3 --out out/on/2.jsonl\n"
        else:
            assert done.returncode == 2 and "out/on was made on more than" in done.stderr
