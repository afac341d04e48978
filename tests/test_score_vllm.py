"""
scorers/rm_vllm.py on a CPU, against score.py: with a stand-in for vLLM, and with vLLM if it is there.

Covers  what the engine is asked for: tensor parallel, the longest input, no activation. Its rewards held to
        those of transformers, to the tolerance; NaN. What it refuses. Rewards equal to those of score.py;
        vLLM's default activation ends the run; a reward model without a head.
Run     python -m pytest tests/test_score_vllm.py     (half a minute: two engines start)
"""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import test_score
import torch
from conftest import REPO, make_policy, read_rows, run_script, write_rows
from models import make_bert, tiny
from test_score import prompt_row, rewards, without_tensor

import score

sys.path.insert(0, str(REPO / "scorers"))
import rm_vllm  # noqa: E402

run = partial(test_score.run, script=rm_vllm)
refused = partial(test_score.refused, script=rm_vllm)

TEXTS = ["short", "a much longer answer that goes on and on", "", "é 日本", "x", "yes, and no"]
ROWS = [prompt_row(k, *(f"{text} {k}" for text in TEXTS)) for k in range(3)]
RM = ["--dtype", "float32"]
DRIVER = """
import json, sys, traceback
sys.path.insert(0, "scorers")
import rm_vllm, score, vllm
honest = vllm.PoolingParams

def with_a_sigmoid(**options):  # vLLM's own default for one label
    return honest(**{**options, "use_activation": True})

for flags, changed in json.loads(sys.argv[1]):
    vllm.PoolingParams = with_a_sigmoid if changed else honest
    try:
        score.main(rm_vllm.parse_args(flags), rm_vllm.RewardModel)
    except BaseException:
        traceback.print_exc()
"""


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A decoder with heads of 64, which vLLM's CPU attention wants."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.2}
    sizes["max_position_embeddings"] = 256
    return tiny(tmp_path_factory.mktemp("rm"), "LlamaForSequenceClassification", seed=1, **sizes)


# ----- a stand-in for vllm
@pytest.fixture
def stand_in(monkeypatch, reward_model):
    """A module `vllm` whose rewards are those of transformers, changed by .change."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = None
    vllm = ModuleType("vllm")
    vllm.__spec__, vllm.change, vllm.engines, vllm.requests = ModuleSpec("vllm", None), lambda x: x, [], []

    class LLM:
        def __init__(self, name, **options):
            vllm.engines.append({"model": name, **options})

        def encode(self, prompts, pooling_task, pooling_params, use_tqdm):
            assert pooling_task == "classify" and pooling_params == {"use_activation": False}
            vllm.requests.append(len(prompts))
            outputs = []
            for prompt in prompts:
                with torch.no_grad():
                    logit = model(torch.tensor([prompt["prompt_token_ids"]])).logits[0]
                outputs.append(SimpleNamespace(outputs=SimpleNamespace(data=vllm.change(logit))))
            return outputs

    vllm.LLM, vllm.PoolingParams = LLM, dict
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return vllm


def test_what_the_engine_is_asked_for(tmp_path, capsys, stand_in, reward_model, monkeypatch):
    monkeypatch.setattr(rm_vllm.RewardModel, "window", 2)
    flags = [*RM, "--model", reward_model, "--tensor-parallel", "4", "--max-length", "100"]
    rows, printed = run(tmp_path, capsys, ROWS, *flags)
    (engine,) = stand_in.engines
    assert engine["model"] == reward_model and engine["tensor_parallel_size"] == 4
    assert (engine["runner"], engine["convert"], engine["dtype"]) == ("pooling", "classify", "float32")
    assert engine["max_model_len"] == 100 and engine["enforce_eager"] is True
    assert stand_in.requests == [3, 12, 6]  # the first response of 3 rows, then windows of 2 rows and 1
    expected, hf = test_score.run(tmp_path, capsys, ROWS, *RM, "--model", reward_model, out="hf.jsonl")
    assert rewards(rows) == pytest.approx(rewards(expected), abs=1e-4)
    assert printed["tokens_scored"] == hf["tokens_scored"] and "padding" not in printed
    # score.py does not resume these rows
    err = test_score.refused(tmp_path, capsys, ROWS, *RM, "--model", reward_model, "--max-length", "100")
    assert "was written with backend = 'vllm', not None" in err


def test_first_responses_without_an_answer_are_not_compared(tmp_path, capsys, stand_in, reward_model):
    rows = [prompt_row(9, "<think>why", "x"), *ROWS]
    rows, printed = run(tmp_path, capsys, rows, *RM, "--model", reward_model)
    assert stand_in.requests == [3, 19] and printed["without"] == {"empty after its reasoning": 1}
    assert rewards(rows)[0] is None and None not in rewards(rows)[1:]


def test_the_longest_input_unless_it_is_said(tmp_path, capsys, stand_in, reward_model, monkeypatch):
    monkeypatch.setattr(rm_vllm, "LONGEST", 60)
    rows, printed = run(tmp_path, capsys, ROWS, *RM, "--model", reward_model)
    assert stand_in.engines[0]["max_model_len"] == 60 and printed["without"] == {"longer than 60 tokens": 3}
    flags = [*RM, "--model", reward_model, "--max-length", "90"]
    rows, printed = run(tmp_path, capsys, ROWS, *flags, out="90.jsonl")
    assert stand_in.engines[1]["max_model_len"] == 90 and printed["without"] == {}


@pytest.mark.parametrize("share, refuses", [(0.99, False), (1.01, True), (-0.99, False), (-1.01, True)])
def test_the_tolerance(tmp_path, capsys, stand_in, reward_model, share, refuses):
    stand_in.change = lambda x: x + share * (0.1 + 0.03 * x.abs())
    if refuses:
        err = refused(tmp_path, capsys, ROWS, *RM, "--model", reward_model)
        sentence = rf"{reward_model}: vLLM's reward \S+ differs from transformers' \S+; use score.py"
        assert re.search(sentence, err)
        assert not (tmp_path / "scored.jsonl").exists()
    else:
        rows, _ = run(tmp_path, capsys, ROWS, *RM, "--model", reward_model)
        assert None not in rewards(rows)


def test_rewards_of_vllm_that_are_not_numbers(tmp_path, capsys, stand_in, reward_model):
    stand_in.change = lambda x: x * math.nan
    assert "vLLM's reward nan differs" in refused(tmp_path, capsys, ROWS, *RM, "--model", reward_model)


def test_a_large_model_is_not_loaded_twice(tmp_path, capsys, stand_in, reward_model, monkeypatch):
    monkeypatch.setattr(rm_vllm, "CHECKED_BYTES", 1000)
    devices, load_model = [], rm_vllm.load_model

    def load(*rest, **options):
        model = load_model(*rest, **options)
        devices.extend({parameter.device.type for parameter in model.parameters()})
        return model

    monkeypatch.setattr(rm_vllm, "load_model", load)
    stand_in.change = lambda x: x + 1
    rows, _ = run(tmp_path, capsys, ROWS, *RM, "--model", reward_model)
    assert stand_in.requests == [18] and None not in rewards(rows)
    assert devices == ["meta"]  # only the names of its weights were looked at
    broken = without_tensor(reward_model, tmp_path / "broken", "score.weight")
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", broken, out="broken.jsonl")
    assert f"{broken}: missing weights: score.weight" in err and len(stand_in.engines) == 1


def test_weights_that_are_not_numbers(tmp_path, capsys, stand_in, reward_model, monkeypatch):
    broken = test_score.with_number(reward_model, tmp_path / "broken", math.nan)
    stand_in.change = lambda x: x * math.nan
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", broken)
    assert f"{broken}: no score in the first 3 rows is a finite number; check its weights" in err
    assert not (tmp_path / "scored.jsonl").exists() and not (tmp_path / "scored.meta.json").exists()


def test_what_it_cannot_score(tmp_path, capsys, stand_in, reward_model, monkeypatch):
    bert = make_bert(tmp_path / "bert")
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", bert)
    assert f"{bert}: no chat template, which this scorer needs; use score.py for pairs of texts" in err
    monkeypatch.setattr(rm_vllm.importlib.util, "find_spec", lambda name: None)
    err = refused(tmp_path, capsys, ROWS, *RM, "--model", reward_model)
    assert "needs the package vllm; install it, or use score.py" in err
    assert not stand_in.engines and not (tmp_path / "scored.jsonl").exists()


# ----- vllm
@pytest.fixture(scope="module")
def runs(tmp_path_factory, reward_model):
    """The folder with rm.jsonl and hf.jsonl, the sigmoid's run and vLLM's standard error."""
    if not find_spec("vllm"):
        pytest.skip("vllm is not installed")
    folder = tmp_path_factory.mktemp("vllm")
    data = write_rows(folder / "in.jsonl", ROWS)
    flags = [*RM, "--model", reward_model, "--responses", data]
    jobs = [
        [[*flags, "--out", f"{folder}/rm.jsonl"], False],
        [[*flags, "--out", f"{folder}/sigmoid.jsonl"], True],
    ]
    with open(folder / "err", "w") as err, open(folder / "out", "w") as out:
        subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(jobs)],
            cwd=REPO,
            stdout=out,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )
    score.main(score.parse_args([*flags, "--out", f"{folder}/hf.jsonl"]))
    return folder


@pytest.mark.slow
@pytest.mark.vllm
def test_rewards_are_those_of_hf(runs):
    assert (runs / "rm.jsonl").exists(), (runs / "err").read_text()[-3000:]
    vllm, hf = (rewards(read_rows(runs / f"{name}.jsonl")) for name in ("rm", "hf"))
    assert vllm == pytest.approx(hf, abs=1e-3) and len(vllm) == 18
    assert min(hf) < -0.5 and max(hf) > 0.1  # a sigmoid would lie between 0 and 1
    record = json.loads((runs / "rm.meta.json").read_text())
    assert record["args"]["backend"] == "vllm" and record["args"]["scorer"] == "rm"
    last = (runs / "out").read_text().splitlines()[-1]
    assert json.loads(last)["responses"] == 18  # vllm logs on standard error


@pytest.mark.slow
@pytest.mark.vllm
def test_an_activation_ends_the_run(runs):
    err = (runs / "err").read_text()
    numbers = re.search(r"vLLM's reward (\S+) differs from transformers' (\S+); use score.py", err)
    assert numbers, err[-3000:]
    raw = float(numbers[2])
    assert float(numbers[1]) == pytest.approx(1 / (1 + math.exp(-raw)), abs=1e-3)
    assert raw in rewards(read_rows(runs / "hf.jsonl")) and not (runs / "sigmoid.jsonl").exists()


def test_a_missing_head_is_fatal_here_too(tmp_path):
    # vLLM itself takes a model without a head and returns what its memory held
    folder = make_policy(tmp_path / "headless", hidden=128)
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    config |= {"id2label": {"0": "L"}, "label2id": {"L": 0}}
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path / "in.jsonl", ROWS)
    flags = [*RM, "--model", folder, "--responses", data, "--out", tmp_path / "out.jsonl"]
    _, err = run_script("scorers/rm_vllm.py", *flags, expect=2)
    expected = "expected a ...ForSequenceClassification with one label, found LlamaForCausalLM"
    assert f"rm_vllm.py: {folder}: {expected}" in err and not (tmp_path / "out.jsonl").exists()
