"""
The vLLM backend of generate.py and score.py on a CPU, against the hf backend. Skipped where vLLM is not installed.

Covers  greedy ids equal to hf's in float32; samples that do not depend on the other requests; rewards equal to hf's,
        raw; a reward model without a head.
Run     python -m pytest tests/test_generate_vllm.py     (half a minute: four engines start, in one process)
"""

import json
import os
import subprocess
import sys

import generate
import pytest
import score
import torch
from conftest import REPO, make_policy, make_tokenizer, read_rows, run_script, write_rows

pytest.importorskip("vllm")

PROMPTS = [{"id": f"p{k}", "prompt": "Tell me " + "more " * (3 * k % 7) + str(k)} for k in range(6)]
TEXTS = ["short", "a much longer answer that goes on and on", "", "é 日本", "x", "yes, and no"]
DRIVER = """
import importlib, json, sys, traceback
for script, flags in json.loads(sys.argv[1]):
    try:
        module = importlib.import_module(script)
        module.main(module.parse_args(flags))
    except BaseException:
        traceback.print_exc()
"""


def make_reward_model(folder):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, num_labels=1,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, initializer_range=0.2)
    LlamaForSequenceClassification(config).float().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with what both wrote: NAME.vllm.jsonl and NAME.hf.jsonl, and the vLLM process's standard error."""
    folder = tmp_path_factory.mktemp("vllm")
    policy = make_policy(folder / "policy", hidden=128, spread=0.12)  # vLLM's CPU attention wants heads of 64
    reward_model = make_reward_model(folder / "rm")
    prompts = write_rows(folder / "prompts.jsonl", PROMPTS)
    data = write_rows(folder / "in.jsonl", [
        {**row, "responses": [{"text": f"{text} {row['id']}", "source": "on"} for text in TEXTS]}
        for row in PROMPTS[:3]])
    sampling = ["--model", policy, "--prompts", prompts, "--dtype", "float32"]
    hot = ["--max-tokens", "150", "--n", "2", "--temperature", "2", "--top-p", "1"]
    flags = {"greedy": ("generate", [*sampling, "--max-tokens", "24", "--greedy"]),
             "six": ("generate", [*sampling, *hot]),
             "three": ("generate", [*sampling, *hot, "--limit", "3"]),
             "rm": ("score", ["--scorer", "rm", "--model", reward_model, "--responses", data, "--dtype", "float32"])}
    jobs = [(script, [*some, "--backend", "vllm", "--out", f"{folder}/{name}.vllm.jsonl"])
            for name, (script, some) in flags.items()]
    with open(folder / "err", "w") as err:
        subprocess.run([sys.executable, "-c", DRIVER, json.dumps(jobs)], cwd=REPO, stdout=subprocess.DEVNULL,
                       stderr=err,
                       env={**os.environ, "OMP_NUM_THREADS": "2"})
    for name, script in (("greedy", generate), ("rm", score)):
        script.main(script.parse_args([*flags[name][1], "--backend", "hf", "--out", f"{folder}/{name}.hf.jsonl"]))
    return folder


def rows_of(runs, name):
    path = runs / f"{name}.jsonl"
    assert path.exists() and path.stat().st_size, (runs / "err").read_text()[-3000:]
    return read_rows(path)


def test_greedy_ids_are_those_of_hf(runs):
    vllm, hf = rows_of(runs, "greedy.vllm"), rows_of(runs, "greedy.hf")
    assert vllm == hf  # texts, ids, finish, tokens, keys
    assert len({tuple(row["responses"][0]["token_ids"]) for row in hf}) > 3


def test_samples_ignore_the_other_requests(runs):
    six, three = rows_of(runs, "six.vllm"), rows_of(runs, "three.vllm")
    assert three == six[:3]
    responses = [response for row in six for response in row["responses"]]
    assert len({tuple(response["token_ids"]) for response in responses}) == 12  # every sample has a seed of its own
    eot = generate.load_tokenizer(str(runs / "policy"), None).eos_token_id
    for response in responses:
        assert eot not in response["token_ids"] and len(response["token_ids"]) == response["tokens"]
        assert response["finish"] == ("length" if response["tokens"] == 150 else "stop")
    assert {response["finish"] for response in responses} == {"length", "stop"}


def test_rewards_are_those_of_hf(runs):
    vllm, hf = ([response["reward"] for row in rows_of(runs, f"rm.{backend}") for response in row["responses"]]
                for backend in ("vllm", "hf"))
    assert vllm == pytest.approx(hf, abs=1e-3) and len(vllm) == 18
    assert min(hf) < -0.5 and max(hf) > 0.1  # a sigmoid would lie between 0 and 1


def test_a_missing_head_is_fatal_here_too(tmp_path):
    # vLLM itself takes a model without a head and returns what stood in its memory
    folder = make_policy(tmp_path / "headless", hidden=128)
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    config |= {"id2label": {"0": "L"}, "label2id": {"L": 0}}
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path / "in.jsonl", [{**PROMPTS[0], "responses": [{"text": "a", "source": "on"}]}])
    _, err = run_script("score.py", "--scorer", "rm", "--model", folder, "--responses", data, "--out",
                        tmp_path / "out.jsonl",
                        "--dtype", "float32", "--backend", "vllm", expect=2)
    assert f"score.py: {folder}: expected a ...ForSequenceClassification with one label, found LlamaForCausalLM" in err
    assert not (tmp_path / "out.jsonl").exists()
