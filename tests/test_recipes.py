"""
demo.sh and the recipes from the first line to the last, with a stand-in for Python that notes the commands.

Covers  every command is understood by the script that it names; every file that it reads was made by an
        earlier one or is in the project; what a recipe needs and does not have is one sentence, before the
        first command; a failed step ends it; a kill of on_all_gpus.sh reaches what it started. Every name in
        capitals reaches a command when it is set from outside; another start with other settings is refused.
Run     python -m pytest tests/test_recipes.py
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, tracked, write_rows
from test_commands import SCRIPTS, module_of

RECIPES = [path.removeprefix("recipes/") for path in tracked("recipes/*.sh")]
RECIPES.remove("settings.sh")
BEFORE = {"s1_fig3.sh": "s1_table2.sh"}  # the recipe whose verdicts it reads
SAMPLES_NOTHING = ("s1_fig7.sh",)
SOURCED = [name for name in RECIPES if "settings.sh" in (REPO / "recipes" / name).read_text()]

# Notes "SCRIPT FLAGS" in commands.log, missing files in missing.log, and writes what the script would.
STAND_IN = r"""#!/usr/bin/env bash
case $1 in -c) echo 0.6; exit ;; -) cat >/dev/null; exit ;; esac
[ "$1" = --nproc-per-node ] && { echo "gpus $2" >>gpus.log; shift 2; }
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
        *.jsonl | *.json | */metrics.* | *.csv) [ -e "$word" ] || echo "$script $word" >>missing.log ;;
      esac ;;
  esac
  last=$word
done
case $script in
  train_dpo.py | my_train.py | recipes/train_online.py)
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
    for name in ("build_pairs.py", "train_dpo.py", "score.py"):
        (tmp_path / name).touch()
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


# ----- names in capitals
FLAGS = {  # words, and what shows that they came
    "OFF_POLICY": ("--format pairs --data my_pairs.jsonl", "--data my_pairs.jsonl"),
    "PREFERENCE": ("my_preference.py --model my/preference", "my_preference.py --model my/preference"),
    "SAMPLE": ("--max-tokens 77 --top-p 0.7", "--max-tokens 77 --top-p 0.7"),
    "PAIRS": ("--total 21 --seed 1", "--total 21 --seed 1"),
    "TRAIN": ("--lr 4e-6 --batch-size 2", "--lr 4e-6 --batch-size 2"),
    "ANSWER": ("my_answer.py --greedy", "my_answer.py --max-tokens 77 --top-p 0.7 --greedy"),
}
VALUES = {
    "PAIRS_SCRIPT": ("my_pairs.py", "my_pairs.py --scored"),
    "TRAIN_SCRIPT": ("my_train.py", "my_train.py --"),
    "SCORE_SCRIPT": ("my_score.py", "my_score.py --model"),
    "REWARD": ("my/reward", "--model my/reward"),
    "MODEL": ("my/model", " my/model "),
    "MODELS": ("my/model my/second", "--model my/second"),
    "N_PROMPTS": ("7", "--limit 7"),
    "N_PAIRS": ("20", r"--total (20|15)"),  # S2's demo takes three quarters
    "N_EVAL": ("6", r"--limit 6|evaluate.py .*--allow-missing"),
    "OUT": ("my_out", "--out my_out/"),
    "JUDGE": ("my_judge", "--model my_judge"),
    "PAIR_JUDGE": ("my_pair_judge", "--model my_pair_judge"),
    "LABELER": ("my_labeler", "--model my_labeler"),
    "ALPACA": ("my_alpaca", "my_alpaca"),
    "GPUS": ("3", "gpus 3"),
    "SEEDS": ("5 6", "--seed 6"),
    "SEED": ("8", "--seed 8"),
    "SHARE": ("0.3", "--on-ratio 0.3"),
    "SHARES": ("0.31", r"--on-ratio 0.31|:0.31"),
    "ROUNDS": ("4", "round_4"),
    "FILTERS": ("my_filter", "--filter my_filter:"),
    "BETAS": ("0.7", "--beta 0.7"),
    "RATES": ("3e-6", "--lr 3e-6"),
    "LOSS": ("my_loss", "--loss my_loss"),
    "STARTS": ("my/model my/start", "--model my/start"),
    "FIG4": ("my_fig4", "my_fig4/"),
    "STAGES": ("my_stages", "my_stages/"),
    "TIERS": ("my_tiers", "my_tiers/"),
    "RUN": ("my_run", "my_run_on.judged/"),
    "LLAMA": ("my/llama", "--model my/llama"),
    "PAPER": ("my_paper.csv", "--paper my_paper.csv"),
    "HYPO": ("--method hypo --max-new 9", "--method hypo --max-new 9"),
    "ONLINE": ("--method online-dpo --max-new 8", "--method online-dpo --max-new 8"),
    "SFT": ("--loss sft --lr 3e-7", "--loss sft --lr 3e-7"),
    "S3": ("--preset s3 --epochs 3", "--preset s3 --epochs 3"),
    "OTHERS": ("my/first my/other", "--model my/other"),
    "OTHER": ("--n 3", "--n 3 "),
    "SEEN": ("my_seen.jsonl", "a prompt that was seen"),
    "GAP": ("0.9", "--gap 0.9"),
    "K": ("5", "--n 5"),
    "RULES": ("my_rule", "--replace-rule my_rule"),
    "SETS": ("my_set sft online", "my_set_seed6"),
}
SETTINGS = (REPO / "recipes" / "settings.sh").read_text()
DATA = {  # at the demo's scale, at the papers'
    "delta.sh": ["--format rows --data my.jsonl"] * 2,
    "s1_table2.sh": ["helpsteer2", "demo"],
    "s3_b1.sh": ["--format rows --data my.jsonl"] * 2,
    "s3_gaps.sh": ["--format rows --data my.jsonl"] * 2,
    "s3_onpolicy.sh": ["oasst2"] * 2,
    "s3_tiers.sh": ["oasst2"] * 2,
}
COMES_FROM = {
    "helpsteer2": "--data nvidia/HelpSteer2",
    "oasst2": "--data OpenAssistant/oasst2",
    "demo": "model_demo/",
}


def names_of(recipe, kind="setting|default"):
    """The names in capitals that a recipe and settings.sh give a default."""
    text = (REPO / "recipes" / recipe).read_text()
    shared, s3 = SETTINGS, re.search(r"s3_settings\(\) {.*?\n}", SETTINGS, re.DOTALL)[0]
    text += shared if "s3_settings" in text else shared.replace(s3, "")
    return set(re.findall(rf"^ *(?:{kind}) ([A-Z][A-Z0-9_]*)", text, re.MULTILINE))


def is_used(name, recipe, scale):
    """Whether a recipe has a use for a name of its own or of settings.sh."""
    if recipe == "s1_fig7.sh":
        return name == "OUT" or scale == "paper" and name in ("ALPACA", "LABELER", "N_EVAL")
    if recipe == "s1_fig3.sh":
        paper = ("ALPACA", "N_EVAL")
        return name in ("RUN", "PAPER", "OUT", *(paper if scale == "paper" else ["MODEL"]))
    if scale == "demo" and name in ("JUDGE", "LABELER", "PAIR_JUDGE", "ALPACA", "GPUS"):
        return False
    if name == "PREFERENCE":
        return recipe.startswith("s2")
    if scale == "paper" and recipe.startswith("s2"):
        return name not in ("REWARD", "SCORE_SCRIPT")
    if name == "OFF_POLICY":
        others = ("s3_b1.sh",) if scale == "demo" else ("delta.sh", *(r for r in RECIPES if r[:2] == "s3"))
        return recipe not in others
    return True


def start(checkout, recipe, scale, variables):
    """Run a recipe; returns what shows which variables came."""
    for model in ("policy", "reward"):
        (checkout / "out" / "models" / model).mkdir(parents=True, exist_ok=True)
        (checkout / "out" / "models" / model / "config.json").touch()
    shutil.copytree(checkout / "alpaca_eval", checkout / "my_alpaca", dirs_exist_ok=True)
    for name in ("my_pairs.py", "my_train.py", "my_score.py", "my_paper.csv"):
        (checkout / name).touch()
    (checkout / "my_seen.jsonl").write_text("a prompt that was seen\n")
    for name in ("on", "off"):
        (checkout / f"my_run_{name}.judged").mkdir(exist_ok=True)
        (checkout / f"my_run_{name}.judged" / "0.jsonl").touch()
    needed = {"SCALE": scale, "JUDGE": "judge", "OPENAI_API_KEY": "key", "CUDA_VISIBLE_DEVICES": "0"}
    done = run(checkout, f"recipes/{recipe}", **needed | variables)
    assert done.returncode == 0, done.stderr
    notes = [checkout / "commands.log", checkout / "gpus.log", *checkout.glob("my_*/seen.jsonl")]
    return "\n".join(path.read_text() for path in notes if path.exists())


def test_no_name_in_capitals_is_set_otherwise():
    for path in [REPO / "recipes" / "settings.sh", *(REPO / "recipes" / name for name in SOURCED)]:
        text = re.sub(r"<<'END'.*?\nEND\n", "\n", path.read_text(), flags=re.DOTALL)
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        for line in lines:
            for name, value in re.findall(r"(?<![\w$\"'{])([A-Z][A-Z0-9_]*)\+?=(\S*.*)", line):
                nested = "bash recipes/" in line or "stop " in line
                assert nested or f"${name}" in value or f"${{{name}:-" in value, f"{path.name}: {line}"


@pytest.mark.parametrize("scale", ["demo", "paper"])
@pytest.mark.parametrize("recipe", SOURCED)
def test_every_name_can_be_set_from_outside(checkout, recipe, scale):
    names = names_of(recipe) - {"DATA"}
    assert names <= VALUES.keys() | FLAGS.keys()
    quick = {name: VALUES[name] for name in ("SEEDS", "SHARES", "BETAS", "RATES", "FILTERS", "SETS", "OUT")}
    quick |= {name: VALUES[name] for name in ("STAGES", "TIERS", "FIG4", "RUN", "JUDGE", "SEEN")}
    for values in (VALUES, FLAGS | quick):
        (checkout / "commands.log").unlink(missing_ok=True)
        for folder in ("my_out", "my_fig4", "my_stages", "my_tiers"):
            shutil.rmtree(checkout / folder, ignore_errors=True)
        values = {name: value for name, value in values.items() if name in names}
        text = start(checkout, recipe, scale, {name: value for name, (value, _) in values.items()})
        came = {name for name, (_, shows) in values.items() if re.search(shows, text)}
        assert came == {name for name in values if is_used(name, recipe, scale)}
    if recipe not in ("s1_fig3.sh", "s1_fig7.sh"):  # which make everything again
        lines = (checkout / "my_out" / "settings.txt").read_text().splitlines()
        kept = {line.partition("=")[0] for line in lines} - {"JUDGE", "LABELER"}
        assert kept == names_of(recipe, "setting") | {"SCALE", "recipe"}


@pytest.mark.parametrize("scale", ["demo", "paper"])
@pytest.mark.parametrize("recipe", DATA)
def test_data_from_outside(checkout, recipe, scale):
    data = DATA[recipe][scale == "paper"]
    text = start(checkout, recipe, scale, {"DATA": data, "MODEL": "my/model", "SEEDS": "0"})
    assert COMES_FROM.get(data, data) in text
    (checkout / "missing.log").touch()  # of the stand-in; it has no my.jsonl
    assert {line.split()[1] for line in (checkout / "missing.log").open()} <= {"my.jsonl"}
    assert "UltraFeedback" not in text and "data/train.jsonl" not in text


def test_the_names_of_supervised_training_at_the_start(checkout):
    trl = checkout / ".venv-trl" / "bin" / "trl"
    trl.parent.mkdir(parents=True)
    trl.write_text('#!/bin/sh\necho "$@" >trl.log\n')
    trl.chmod(0o755)
    text = (REPO / "recipes" / "s2_sft.sh").read_text()
    values = {
        "MODEL": "my/model",
        "OUT": "my_out",
        "GPUS": "2",
        "LAUNCH": "my_launch",
        "ULTRACHAT": "my/chat",
    }
    assert set(re.findall(r"^([A-Z]+)=\$\{\1:-", text, re.MULTILINE)) == values.keys()
    assert set(re.findall(r"^([A-Z]+)=", text, re.MULTILINE)) == values.keys()
    assert run(checkout, "recipes/s2_sft.sh", **values).returncode == 0
    command = (checkout / "trl.log").read_text() + (checkout / "my_out" / "data.yaml").read_text()
    for words in ("path my/model", "dir my_out", "processes 2", "config my_launch", "path: my/chat"):
        assert words in command


def test_a_blank_is_no_flags(checkout):
    text = start(checkout, "s1_fig4.sh", "demo", {"PAIRS": " ", "SAMPLE": "", "SHARES": "0.5"})
    assert "build_pairs.py" in text and "--total" not in text  # and what is empty counts as not set:
    assert "generate.py --max-tokens 48 --dtype float32 --backend hf --model" in text


def test_two_models_have_start_answers_of_their_own(checkout):
    text = start(checkout, "s1_table2.sh", "demo", {"MODELS": "my/first my/second"})
    for name in ("first", "second"):
        judged = rf"score.py .*/{name}_start.answers/0.jsonl .*/{name}_demo_on.answers/0.jsonl"
        assert re.search(judged, text)


@pytest.mark.parametrize(
    "name, value, found",
    [
        ("SEEDS", "0", "SEEDS=0 1, this run has SEEDS=0"),
        ("SEEDS", "0 1 2", "SEEDS=0 1, this run has SEEDS=0 1 2"),
        ("N_EVAL", "8", "N_EVAL=64, this run has N_EVAL=8"),
        (
            "N_PAIRS",
            "8",
            "N_PAIRS=32, PAIRS=--total 32, this run has N_PAIRS=8, PAIRS=--total 8",
        ),
        (
            "N_PROMPTS",
            "8",
            "N_PROMPTS=64, OFF_POLICY=--format rows --data data/train.jsonl --limit 64, this run has "
            "N_PROMPTS=8, OFF_POLICY=--format rows --data data/train.jsonl --limit 8",
        ),
        ("MODEL", "my/model", "MODEL=out/models/policy, this run has MODEL=my/model"),
        ("SAMPLE", " ", "SAMPLE=--max-tokens 48 --dtype float32 --backend hf, this run has SAMPLE= "),
    ],
)
def test_other_settings_are_not_mixed(checkout, name, value, found):
    first = {"OUT": "my_out", "SEEDS": "0 1", "SHARES": "0.5"}
    start(checkout, "s1_fig4.sh", "demo", first)
    before = (checkout / "commands.log").read_text()
    done = run(checkout, "recipes/s1_fig4.sh", SCALE="demo", **first | {name: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"s1_fig4.sh: my_out/settings.txt has {found}; use another OUT\n"
    assert (checkout / "commands.log").read_text() == before
    again = start(checkout, "s1_fig4.sh", "demo", first | {"SHARES": "1", "GPUS": "2"})
    assert again.count("--on-ratio 1") == 2  # other shares have names of their own: the table has all


def test_an_edited_copy_and_another_recipe_are_not_mixed(checkout):
    def said_of(recipe):
        done = run(checkout, f"recipes/{recipe}", SCALE="demo", **values)
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr

    values = {"OUT": "my_out", "SHARES": "0.5", "PAIRS_SCRIPT": "my_pairs.py"}
    copy, code = checkout / "my_pairs.py", []
    shutil.copyfile(REPO / "build_pairs.py", copy)
    start(checkout, "s1_fig4.sh", "demo", values)
    code.append(hashlib.sha256(copy.read_bytes()).hexdigest()[:12])
    copy.write_text(copy.read_text() + "# a comment\n")
    code.append(hashlib.sha256(copy.read_bytes()).hexdigest()[:12])
    before, now = (f"PAIRS_SCRIPT=my_pairs.py {part}" for part in code)
    sentence = f"s1_fig4.sh: my_out/settings.txt has {before}, this run has {now}; use another OUT\n"
    assert said_of("s1_fig4.sh") == sentence
    shutil.copyfile(REPO / "build_pairs.py", copy)
    assert "recipe=s1_fig4.sh" in said_of("s1_fig6.sh")


def test_two_recipes_at_once_in_one_folder(checkout):
    values = {"OUT": "my_out", "SHARES": "0.5"}
    start(checkout, "s1_fig4.sh", "demo", values)
    with open(checkout / "my_out" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(checkout, "recipes/s1_fig4.sh", SCALE="demo", **values)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "s1_fig4.sh: another recipe runs in my_out; wait for its end, or use another OUT\n"
    start(checkout, "s1_fig4.sh", "demo", values)


def test_settings_may_change_until_there_are_pairs(checkout):
    (checkout / "my_out").mkdir()
    (checkout / "my_out" / "settings.txt").write_text("PAIRS=--total 9\nSEEDS=0 1\n")
    start(checkout, "s1_fig4.sh", "demo", {"OUT": "my_out", "SHARES": "0.5"})
    lines = (checkout / "my_out" / "settings.txt").read_text().splitlines()
    assert "SEEDS=0" in lines and "PAIRS=--total 32" in lines
    assert len(lines) == len(names_of("s1_fig4.sh", "setting") | {"SCALE", "recipe"})


def test_a_script_that_does_not_exist(checkout):
    make_demo_models(checkout)
    for name in ("PAIRS_SCRIPT", "TRAIN_SCRIPT", "SCORE_SCRIPT"):
        done = run(checkout, "recipes/s1_fig4.sh", SCALE="demo", **{name: "my_copy.py"})
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"s1_fig4.sh: {name}=my_copy.py does not exist in {checkout}; give")
        assert done.stderr.count("\n") == 1
    done = run(checkout, "recipes/s1_fig4.sh", SCALE="demo", OUT="my out")
    assert done.returncode == 2
    assert done.stderr == "s1_fig4.sh: OUT=my out has a blank, where lists are split; use a path without\n"
    assert not (checkout / "commands.log").exists() and sorted(os.listdir(checkout / "out")) == ["models"]


def test_a_recipe_that_was_copied_elsewhere_runs_nothing(checkout):
    shutil.copy(checkout / "recipes" / "s1_fig4.sh", checkout / "my_figure.sh")
    done = run(checkout, "my_figure.sh", SCALE="demo")
    assert done.returncode == 1 and "settings.sh: No such file" in done.stderr
    assert done.stderr.count("\n") == 1 and not (checkout / "commands.log").exists()
    shutil.copy(checkout / "recipes" / "s1_fig4.sh", checkout / "recipes" / "my_figure.sh")
    make_demo_models(checkout)
    assert run(checkout, "recipes/my_figure.sh", SCALE="demo", SHARES="0.5").returncode == 0


def test_the_runs_of_another_model(checkout):
    done = run(checkout, "recipes/s1_fig3.sh", MODEL="my/model")
    assert done.stderr.startswith(
        "s1_fig3.sh: out/s1_table2/paper/model_ultrafeedback_on.judged/0.jsonl does"
    )


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
