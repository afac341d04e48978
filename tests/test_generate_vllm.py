"""
The vLLM backend of generate.py and score.py on a CPU, against the hf backend. Skipped where vLLM is not installed.

Covers  greedy ids equal to hf's in float32; samples that do not depend on the other requests; rewards equal to hf's, raw.
Run     python -m pytest tests/test_generate_vllm.py     (an engine a test starts takes 5 to 15 seconds)
"""

import json

import generate
import pytest
import score
import torch
from conftest import make_policy, make_tokenizer, read_rows, run_script, write_rows

pytest.importorskip("vllm")

PROMPTS = [{"id": f"p{k}", "prompt": "Tell me " + "more " * (3 * k % 7) + str(k)} for k in range(6)]


@pytest.fixture(scope="module")
def wide_policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("wide"), hidden=128)  # vLLM's CPU attention wants heads of 64


def flags_of(folder, model, out, *more):
    prompts = write_rows(folder / "prompts.jsonl", PROMPTS)
    return ["--model", model, "--prompts", prompts, "--out", str(folder / out), "--dtype", "float32", "--max-tokens", "24", *more]


def sample(folder, model, out, *more):
    printed, _ = run_script("generate.py", *flags_of(folder, model, out, "--backend", "vllm", *more))
    return read_rows(folder / out), printed


def test_greedy_ids_are_those_of_hf(tmp_path, wide_policy):
    vllm, _ = sample(tmp_path, wide_policy, "vllm.jsonl", "--greedy")
    generate.main(generate.parse_args(flags_of(tmp_path, wide_policy, "hf.jsonl", "--greedy", "--backend", "hf")))
    hf = read_rows(tmp_path / "hf.jsonl")
    assert vllm == hf  # texts, ids, finish, tokens, keys
    assert len({tuple(row["responses"][0]["token_ids"]) for row in hf}) > 3


def test_samples_ignore_the_other_requests(tmp_path, wide_policy):
    six, printed = sample(tmp_path, wide_policy, "six.jsonl", "--n", "2", "--temperature", "1")
    three, _ = sample(tmp_path, wide_policy, "three.jsonl", "--n", "2", "--temperature", "1", "--limit", "3")
    assert three == six[:3]
    ids = [tuple(response["token_ids"]) for row in six for response in row["responses"]]
    assert len(set(ids)) == 12 and printed["prompts_with_equal_samples"] == 0  # every sample has a seed of its own
    for row in six:
        for response in row["responses"]:
            assert response["finish"] == ("length" if response["tokens"] == 24 else "stop") and 258 >= max(response["token_ids"])


def test_rewards_are_those_of_hf(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    folder = tmp_path / "rm"
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=256, num_labels=1, pad_token_id=tokenizer.pad_token_id,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2)
    LlamaForSequenceClassification(config).float().save_pretrained(folder)
    texts = ["short", "a much longer answer that goes on and on", "", "é 日本", "x", "yes, and no"]
    data = write_rows(tmp_path / "in.jsonl", [
        {**row, "responses": [{"text": f"{text} {k}", "source": "on"} for text in texts]} for k, row in enumerate(PROMPTS[:3])])
    rewards = {}
    for backend in ("hf", "vllm"):
        flags = ["--scorer", "rm", "--model", str(folder), "--responses", data, "--out", str(tmp_path / f"{backend}.jsonl"),
                 "--dtype", "float32", "--backend", backend]
        run_script("score.py", *flags) if backend == "vllm" else score.main(score.parse_args(flags))
        rewards[backend] = [response["reward"] for row in read_rows(tmp_path / f"{backend}.jsonl") for response in row["responses"]]
    assert rewards["vllm"] == pytest.approx(rewards["hf"], abs=1e-3)
    assert min(rewards["hf"]) < -0.5 and max(rewards["hf"]) > 1  # a sigmoid would lie between 0 and 1


def test_a_missing_head_is_fatal_here_too(tmp_path):
    # vLLM itself takes a model without a head and returns what stood in its memory
    folder = make_policy(tmp_path / "headless", hidden=128)
    config = json.loads((tmp_path / "headless" / "config.json").read_text()) | {"id2label": {"0": "L"}, "label2id": {"L": 0}}
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path / "in.jsonl", [{**PROMPTS[0], "responses": [{"text": "a", "source": "on"}]}])
    _, err = run_script("score.py", "--scorer", "rm", "--model", folder, "--responses", data, "--out", tmp_path / "out.jsonl",
                        "--dtype", "float32", "--backend", "vllm", expect=2)
    assert folder in err and "head" in err.splitlines()[-1] or "score.weight" in err
    assert not (tmp_path / "out.jsonl").exists()
