"""
The vLLM backend of generate.py and score.py on a CPU, against the hf backend. Skipped where vLLM is not installed.

Covers  greedy ids equal to hf's in float32; samples that do not depend on the other requests; rewards equal to hf's, raw.
Run     python -m pytest tests/test_generate_vllm.py     (an engine a test starts takes 5 to 15 seconds)
"""

import pytest
import torch
from conftest import make_policy, make_tokenizer, read_rows, run_script, write_rows

pytest.importorskip("vllm")

PROMPTS = [{"id": f"p{k}", "prompt": "Tell me " + "more " * (3 * k % 7) + str(k)} for k in range(6)]


@pytest.fixture(scope="module")
def wide_policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("wide"), hidden=128)  # vLLM's CPU attention wants heads of 64


def sample(folder, model, out, *flags):
    prompts = write_rows(folder / "prompts.jsonl", PROMPTS)
    printed, _ = run_script("generate.py", "--model", model, "--prompts", prompts, "--out", folder / out, "--dtype", "float32",
                            "--max-tokens", "24", *flags)
    return read_rows(folder / out), printed


def test_greedy_ids_are_those_of_hf(tmp_path, wide_policy):
    vllm, _ = sample(tmp_path, wide_policy, "vllm.jsonl", "--greedy", "--backend", "vllm")
    hf, _ = sample(tmp_path, wide_policy, "hf.jsonl", "--greedy", "--backend", "hf")
    assert vllm == hf  # texts, ids, finish, tokens, keys
    assert len({tuple(row["responses"][0]["token_ids"]) for row in hf}) > 3


def test_samples_ignore_the_other_requests(tmp_path, wide_policy):
    six, printed = sample(tmp_path, wide_policy, "six.jsonl", "--backend", "vllm", "--n", "2", "--temperature", "1")
    three, _ = sample(tmp_path, wide_policy, "three.jsonl", "--backend", "vllm", "--n", "2", "--temperature", "1", "--limit", "3")
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
    for backend in ("vllm", "hf"):
        out = tmp_path / f"{backend}.jsonl"
        run_script("score.py", "--scorer", "rm", "--model", folder, "--responses", data, "--out", out, "--dtype", "float32", "--backend", backend)
        rewards[backend] = [response["reward"] for row in read_rows(out) for response in row["responses"]]
    assert rewards["vllm"] == pytest.approx(rewards["hf"], abs=1e-3)
    assert min(rewards["hf"]) < -0.1 and max(rewards["hf"]) > 1.1  # a sigmoid would lie between 0 and 1
