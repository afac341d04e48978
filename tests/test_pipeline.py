"""All six scripts in sequence, as a user runs them, on tiny random models: the files of one stage feed the next, and the numbers
that can be known beforehand come out. Run: python -m pytest tests/test_pipeline.py
"""

import json

import pytest
import torch
from conftest import make_policy, make_tokenizer, read_rows, run_script, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_policy(folder / "policy")
    make_reward(folder / "reward")
    write_rows(folder / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"Question {i}?", "category": "ab"[i % 2]} for i in range(12)])
    write_rows(folder / "written.jsonl", [{"id": f"p{i}", "prompt": f"Question {i}?", "responses": [f"Good answer {i}.", f"Bad {i * i}"]}
                                          for i in range(12)])
    return folder


def make_reward(folder):
    """A random reward model of the decoder kind, with a chat template."""
    from transformers import LlamaConfig, LlamaForSequenceClassification
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=512, num_labels=1, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3)
    LlamaForSequenceClassification(config).save_pretrained(folder)


def test_the_whole_pipeline(folder):
    said, _ = run_script("generate.py", "--model", "policy", "--prompts", "prompts.jsonl", "--out", "on.jsonl", "--max-tokens", 12,
                         "--backend", "hf", cwd=folder)
    assert (said["rows"], said["responses"]) == (12, 48)
    run_script("generate.py", "--import-format", "rows", "--import-data", "written.jsonl", "--out", "off.jsonl", cwd=folder)
    said, _ = run_script("score.py", "--model", "reward", "--responses", "on.jsonl", "off.jsonl", "--out", "scored.jsonl", "--backend", "hf",
                         cwd=folder)
    assert (said["rows"], said["responses"], said["without"]) == (12, 72, {})
    run_script("score.py", "--scorer", "logp", "--model", "policy", "--responses", "scored.jsonl", "--out", "logp.jsonl", cwd=folder)
    said, _ = run_script("boundary.py", "--scored", "logp.jsonl", "--out", "boundary.json", cwd=folder)
    rows = read_rows(folder / "logp.jsonl")
    on_wins = sum(mine["reward"] > other["reward"] for row in rows for mine in row["responses"][:4] for other in row["responses"][4:])
    assert said["v_on"] == on_wins and said["v_on"] + said["v_off"] == 12 * 8 and said["distinct"]["n_prompts"] == 12

    said, _ = run_script("build_pairs.py", "--scored", "logp.jsonl", "--out", "pairs.jsonl", "--on-ratio", 0.5, "--total", 10,
                         "--truncated", "keep", cwd=folder)
    assert (said["pairs"], said["on"], said["off"]) == (10, 5, 5)
    for pair in read_rows(folder / "pairs.jsonl"):
        assert pair["chosen_reward"] > pair["rejected_reward"] and pair["category"] in "ab"
    said, _ = run_script("train_dpo.py", "--model", "policy", "--pairs", "pairs.jsonl", "--out", "dpo", "--batch-size", 4, "--epochs", 2,
                         "--lr", 1e-3, cwd=folder)
    assert said["steps"] == 6 and said["first_loss"] == pytest.approx(0.693147, abs=1e-5) and said["last_loss"] < said["first_loss"]

    for model, out in (("policy", "base"), ("dpo", "trained")):
        run_script("generate.py", "--greedy", "--model", model, "--prompts", "prompts.jsonl", "--out", f"{out}.jsonl", "--max-tokens", 12,
                   "--backend", "hf", cwd=folder)
    run_script("score.py", "--model", "reward", "--responses", "base.jsonl", "trained.jsonl", "--out", "eval.jsonl", "--backend", "hf",
               cwd=folder)
    said, _ = run_script("evaluate.py", "winrate", "--scored", "eval.jsonl", "--model", "dpo", "--baseline", "policy", "--out", "win.json",
                         cwd=folder)
    assert said["n_total"] == 12 and said["training"]["pairs"] == 10 and set(said["categories"]) == {"a", "b"}
    assert said["n_wins"] + said["n_wins_base"] + said["n_draws"] == 12
    run_script("evaluate.py", "report", "win.json", "--out", "report", cwd=folder)
    assert (folder / "report" / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{said['win_rate']:.2f}" in (folder / "report" / "report.md").read_text()
    meta = json.loads((folder / "dpo" / "metrics.meta.json").read_text())
    model = {f"policy/{name}" for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
                                           "tokenizer_config.json", "chat_template.jinja")}
    assert set(meta["inputs"]) == {"pairs.jsonl", "token ids"} | model
