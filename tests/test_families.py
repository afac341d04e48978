"""
README's table of model families: what train_dpo.py, scorers/logp.py and score.py do with each.

Covers  a tiny random model of each family: two steps against a plain float64 loop, whether sequences share a
        row and what is said where not, the exported folder, scorers/logp.py's number of the exported model
        against the trained policy's, rewards of its ForSequenceClassification against transformers alone; two
        processes against one where rows have one sequence. The README's table is the one that is made here.
        Responses and scores beside longer ones, where padding runs through a model's states.
Run     python -m pytest tests/test_families.py     (prints the table: python tests/test_families.py)
"""

import contextlib
import gc
import io
import json
import sys

import pytest
import torch
from conftest import REPO, make_tokenizer, read_rows, write_rows
from processes import two_processes
from train_oracle import check_rows, close, make_pairs, parse, plain_run, train, without_noise
from transformers import AutoModelForCausalLM

import generate
import score
import train_dpo
from recipes import sample_mixture, train_online
from scorers import logp

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
HEAD = {"head_dim": 8}

PACKED = "many sequences a row"
WINDOW = "a sequence a row: a window of 16 tokens is shorter than the longest"
TOLD = "a sequence a row: its layers are not told where they begin"
SOFT_CAP = "a sequence a row: a soft cap in attention"
SINKS = "a sequence a row: sinks in attention"
LEAK = "a sequence a row: a convolution or a recurrence runs on into the next"
REFUSED = "refused: its logits are more than a product with its last states"

FAMILIES = {  # name: (class, changes of its config, what train_dpo.py does)
    "llama": ("Llama", {}, PACKED),
    "mistral": ("Mistral", {"sliding_window": 512}, PACKED),
    "mistral (longer than its window)": ("Mistral", {"sliding_window": 16}, WINDOW),
    "ministral3": ("Ministral3", HEAD, PACKED),
    "mixtral": ("Mixtral", {"num_local_experts": 2}, PACKED),
    "qwen2": ("Qwen2", {}, PACKED),
    "qwen3": ("Qwen3", HEAD, PACKED),
    "qwen3_moe": ("Qwen3Moe", HEAD | EXPERTS, PACKED),
    "qwen3_next": ("Qwen3Next", HEAD | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16}, TOLD),
    "qwen3_5": ("Qwen3_5Text", HEAD | LINEAR, TOLD),
    "gemma": ("Gemma", HEAD, PACKED),
    "gemma2": ("Gemma2", HEAD | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}, SOFT_CAP),
    "gemma3": ("Gemma3Text", HEAD | SLIDING, PACKED),
    "gemma3 (longer than its window)": ("Gemma3Text", HEAD | SLIDING | {"sliding_window": 16}, WINDOW),
    "phi": ("Phi", {}, PACKED),
    "phi3": ("Phi3", {}, PACKED),
    "gpt_neox": ("GPTNeoX", {}, PACKED),
    "gpt2": ("GPT2", {"n_layer": 2}, PACKED),
    "opt": ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 64}, PACKED),
    "olmo2": ("Olmo2", {}, PACKED),
    "olmo3": ("Olmo3", SLIDING, PACKED),
    "olmo_hybrid": ("OlmoHybrid", LINEAR | {"linear_num_value_heads": 2}, TOLD),
    "smollm3": ("SmolLM3", {}, PACKED),
    "glm4": ("Glm4", HEAD, PACKED),
    "starcoder2": ("Starcoder2", {}, PACKED),
    "cohere": ("Cohere", {"logit_scale": 0.5}, PACKED),
    "cohere2": ("Cohere2", HEAD | SLIDING | {"logit_scale": 0.5}, PACKED),
    "granite": ("Granite", {"logits_scaling": 4.0}, PACKED),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        MAMBA | LOCAL_EXPERTS | {"layer_types": ["mamba", "attention"], "logits_scaling": 4.0},
        LEAK,
    ),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
        PACKED,
    ),
    "exaone4": ("Exaone4", HEAD | SLIDING, PACKED),
    "apertus": ("Apertus", {}, PACKED),
    "seed_oss": ("SeedOss", HEAD, PACKED),
    "gpt_oss": ("GptOss", HEAD | SLIDING | LOCAL_EXPERTS, SINKS),
    "nemotron": ("Nemotron", {}, TOLD),
    "nemotron_h": (
        "NemotronH",
        HEAD
        | {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3}
        | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16},
        TOLD,
    ),
    "falcon_h1": ("FalconH1", HEAD | MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}, TOLD),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, LEAK),
    "bamba": ("Bamba", MAMBA | {"attn_layer_indices": [1]}, TOLD),
    "jamba": (
        "Jamba",
        {"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2, "num_experts_per_tok": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        TOLD,
    ),
    "mamba": ("Mamba", {"state_size": 4}, TOLD),
    "mamba2": (
        "Mamba2",
        {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
        TOLD,
    ),
    "recurrent_gemma": ("RecurrentGemma", {"block_types": ["recurrent", "attention"]} | HEAD, LEAK),
    "minimax": ("MiniMax", HEAD | LOCAL_EXPERTS | {"layer_types": LINEAR["layer_types"]}, LEAK),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}, TOLD),
    "falcon": ("Falcon", {"alibi": False}, TOLD),
    "stablelm": ("StableLm", {}, TOLD),
    "modernbert-decoder": ("ModernBertDecoder", {"local_attention": 512}, REFUSED),
    "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 0.5}, REFUSED),
}


def has_rewards(kind):
    import transformers

    return hasattr(transformers, f"{kind}ForSequenceClassification")


def table():
    """README's table: families that train alike share a line; a star: transformers has no reward model."""
    groups = {PACKED: []}
    for name, (kind, _, training) in FAMILIES.items():
        groups.setdefault(training, []).append(name if has_rewards(kind) else f"{name}*")
    lines = ["| `model_type` | in train_dpo.py |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {training.replace('16', 'N')} |" for training, names in groups.items()]
    return "\n".join(lines)


def random_model(folder, kind, changes, task="CausalLM"):
    """A tiny random model with biases that are not zero."""
    import transformers

    make_tokenizer(folder)
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes), num_labels=1)
    auto_class = getattr(transformers, f"AutoModelFor{task}")
    model = auto_class.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return str(folder)


def quietly(main, *args):
    """What a script's main prints last, and what it says on standard error."""
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        main(*args)
    return json.loads(printed.getvalue().splitlines()[-1]), said.getvalue()


def outcome(said):
    """What train_dpo.py said of the model's rows, as the table has it."""
    for line in said.splitlines():
        if "cannot be packed into one row (" in line:
            reason = line.partition("row (")[2].partition("); ")[0]
            return LEAK if reason.startswith("a log-probability is") else f"a sequence a row: {reason}"
    return PACKED


def as_responses(pairs, path):
    """A file of responses of the chosen sides of pairs."""
    rows = []
    for pair in read_rows(pairs):
        finish = pair["chosen_finish"]
        response = {"text": pair["chosen"][0]["content"], "source": "on", "finish": finish}
        rows.append({"id": pair["pair_id"], "prompt": pair["prompt"], "responses": [response]})
    return write_rows(path, rows)


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """main collects garbage twice; it need not look at all that was imported, which takes half of a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", n=4)


TRAINED = [name for name, (_, _, training) in FAMILIES.items() if training != REFUSED]


@pytest.mark.parametrize("name", TRAINED)
def test_a_family_trains_and_its_export_is_what_was_trained(name, pairs, tmp_path):
    kind, changes, training = FAMILIES[name]
    model, out = random_model(tmp_path / "model", kind, changes), tmp_path / "out"
    flags = ["--model", model, "--pairs", pairs, "--eval-pairs", pairs, "--out", out]
    flags += ["--batch-size", 2, "--lr", 1e-3]
    _, said = train(*flags)
    assert outcome(said) == training
    rows = read_rows(out / "metrics.jsonl")
    expected, _ = plain_run(parse(*flags), [1.0, 1.0])
    check_rows(parse(*flags), rows, expected)
    # the held-out pairs were measured last, with the policy that was exported
    exported, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert exported.config.architectures == [type(exported).__name__]
    responses = as_responses(pairs, tmp_path / "responses.jsonl")
    args = logp.parse_args(
        ["--model", str(out), "--responses", responses, "--out", str(tmp_path / "logp.jsonl")]
    )
    counts, _ = quietly(score.main, args, logp.LogProbability)
    assert counts["mean"]["on"] == pytest.approx(rows[-1]["eval"]["chosen_logp"], rel=1e-5, abs=1e-3)
    assert abs(counts["mean"]["on"] - rows[0]["chosen_logp"]) > 0.05  # it has changed


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TRAINED])
def test_a_family_is_refused_by_training_and_logp(name, pairs, tmp_path, capsys):
    model = random_model(tmp_path / "model", *FAMILIES[name][:2])
    responses = as_responses(pairs, tmp_path / "responses.jsonl")
    flags = ["--model", model, "--out", str(tmp_path / "logp.jsonl")]
    for call in (
        lambda: score.main(logp.parse_args([*flags, "--responses", responses]), logp.LogProbability),
        lambda: train_dpo.main(parse("--model", model, "--pairs", pairs, "--out", tmp_path / "out")),
    ):
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert f"{name} models are not supported: a text has log-probability -" in said
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


REWARDS = [name for name, (kind, _, _) in FAMILIES.items() if has_rewards(kind) and "(" not in name]


@pytest.mark.parametrize("name", REWARDS)
def test_a_family_as_a_reward_model(name, pairs, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind, changes, _ = FAMILIES[name]
    model = random_model(tmp_path / "model", kind, changes, "SequenceClassification")
    responses = as_responses(pairs, tmp_path / "responses.jsonl")
    args = score.parse_args(["--model", model, "--responses", responses, "--out", str(tmp_path / "rm.jsonl")])
    quietly(score.main, args)
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float64}
    plain = AutoModelForSequenceClassification.from_pretrained(model, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in read_rows(tmp_path / "rm.jsonl"):
        (response,) = row["responses"]
        turns = [*row["prompt"], {"role": "assistant", "content": response["text"]}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            logit = plain(input_ids=ids).logits[0, 0].item()  # 258, the padding, is not among the ids
        assert response["reward"] == pytest.approx(logit, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma2"])
def test_two_processes_and_rows_of_one_sequence(name, tmp_path):
    """One that never was packed, and one whose packed rows end in the middle of a forward pass."""
    model = random_model(tmp_path / "model", *FAMILIES[name][:2])
    flags = ["--model", model, "--pairs", make_pairs(tmp_path / "pairs.jsonl", n=5), "--batch-size", 3]
    flags += ["--lr", 1e-3]  # steps of 3 and 2 pairs: one ends on dummies
    train(*flags, "--out", tmp_path / "one" / "out")
    two_processes("train_dpo.py", *flags, "--out", tmp_path / "two" / "out")
    one, two = (read_rows(tmp_path / folder / "out" / "metrics.jsonl") for folder in ("one", "two"))
    close(without_noise(two), without_noise(one))


# ----- padding
STATES = [name for name, (_, _, training) in FAMILIES.items() if training in (TOLD, LEAK)]
WINDOWS = ["gemma2", "gemma3 (longer than its window)", "gpt_oss"]
PADDED = {"recurrent_gemma": 0.1, "minimax": 0.3}  # least difference of logits behind padding, in deviations


@torch.no_grad()
def behind_padding(model, ids):
    """How far padding moves the logits of two tokens after a prompt, one of them by way of the cache."""
    model, rows = AutoModelForCausalLM.from_pretrained(model).eval(), []
    for padding in (0, 5):
        mask = torch.tensor([[0] * padding + [1] * len(ids)])
        inputs = {"input_ids": torch.tensor([[258] * padding + ids]), "attention_mask": mask}
        settings = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
        rows.append(torch.cat(model.generate(**inputs, do_sample=False, **settings).logits))
    return ((rows[0] - rows[1]).abs().mean() / rows[0].std()).item()


@pytest.mark.parametrize("name", [*STATES, *WINDOWS])
def test_a_response_is_the_same_beside_longer_prompts(name, tmp_path):
    """Tokens in a batch are those of prompts by themselves; what reads padding gets none."""
    model = random_model(tmp_path / "model", *FAMILIES[name][:2])
    apart = behind_padding(model, list(range(60, 70)))
    assert apart > PADDED[name] if name in PADDED else apart < 1e-5
    texts = ["a", "b?", "many", "more", "and a longer question", "the longest of all these questions " * 2]
    rows = [{"id": str(i), "prompt": text} for i, text in enumerate(texts)]
    flags = ["--model", model, "--prompts", write_rows(tmp_path / "prompts.jsonl", rows)]
    flags += ["--backend", "hf", "--max-tokens", "12", "--n", "1", "--temperature", "1", "--top-p", "1"]
    found = []
    for size in ("64", "1"):
        out = ["--batch-size", size, "--out", str(tmp_path / f"{size}.jsonl")]
        _, said = quietly(generate.main, generate.parse_args([*flags, *out]))
        told = "padding before a prompt changes its logits; only prompts of one length share a batch" in said
        assert told == (name in PADDED)
        found.append([row["responses"][0]["token_ids"] for row in read_rows(tmp_path / f"{size}.jsonl")])
    assert found[0] == found[1] and len(set(map(tuple, found[0]))) > 3


NO_REFERENCES = {
    "recurrent_gemma": "padding before a prompt changes its logits; use --batch-size 1",
    "minimax": "padding before a prompt changes its logits; use --batch-size 1",
    "mamba": "mamba models keep no past_key_values, which a mixture needs",
}


@pytest.mark.parametrize("name", NO_REFERENCES)
def test_models_that_are_no_reference_of_a_mixture(name, tmp_path, capsys):
    model = random_model(tmp_path / "model", *FAMILIES[name][:2])
    flags = ["--model", model, "--reference", model, "--weights", "0.5", "0.5", "--backend", "hf"]
    flags += ["--prompts", write_rows(tmp_path / "prompts.jsonl", [{"id": "1", "prompt": "a"}])]
    args = sample_mixture.parse_args([*flags, "--out", str(tmp_path / "out.jsonl"), "--max-tokens", "2"])
    with pytest.raises(SystemExit) as stop:
        generate.main(args, sample_mixture.mixture_sampler)
    assert stop.value.code == 2 and f"{model}: {NO_REFERENCES[name]}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recurrent_gemma", "minimax", "qwen3_5"])
def test_samples_in_training_ignore_other_prompts(name, tmp_path):
    model = random_model(tmp_path / "model", *FAMILIES[name][:2])
    flags = ["--model", model, "--pairs", "p", "--out", "o"]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    policy = train_dpo.load_policy(model, None, parse(*flags))
    policy.pack(False)  # as check_model decides
    prompts = [list(range(60, 60 + length)) for length in (3, 11, 20, 11)]
    together = train_online.sample(policy, prompts, [1, 2, 3, 4], 9, 257)
    single = [train_online.sample(policy, [prompt], [i], 9, 257)[0] for i, prompt in enumerate(prompts, 1)]
    assert together == single and together[1] != together[3]
    del policy
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["recurrent_gemma", "minimax", "nemotron_h", "lfm2"])
def test_padding_on_the_right_changes_no_score(name, tmp_path):
    """score.py gives no mask: nothing reads what follows it."""
    texts = ["abc" * 20, "bcd" * 21, "cd" * 32]  # in one batch, of 60 to 64 bytes
    responses = [{"text": text, "source": "on"} for text in texts]
    rows = write_rows(tmp_path / "on.jsonl", [{"id": "1", "prompt": "Hi", "responses": responses}])
    kind, changes, _ = FAMILIES[name]
    scorers = [("logp", "CausalLM", logp, logp.LogProbability)]
    if has_rewards(kind):
        scorers.append(("reward", "SequenceClassification", score, score.RewardModel))
    for key, task, module, scorer in scorers:
        model, found = random_model(tmp_path / key, kind, changes, task), []
        for size, padded in (("100000", True), ("1", False)):
            out = str(tmp_path / f"{key}{size}.jsonl")
            flags = ["--model", model, "--responses", rows, "--out", out, "--batch-tokens", size]
            counts, _ = quietly(score.main, module.parse_args(flags), scorer)
            assert (counts["padding"] > 0) == padded
            found += [[response[key] for response in read_rows(out)[0]["responses"]]]
        assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-4)


def test_the_table_of_the_readme_is_this_one():
    assert table() in (REPO / "README.md").read_text()


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
