"""
What a model folder may hold that would make its numbers another model's, or depend on the batch.

Covers  a config that ties a head of its own; quantised weights, in every script that loads a model; rotary
        factors of longrope, with transformers' own numbers beside ours; RoBERTa's positions; output_head and
        check_logps. Families of models: test_families.py.
Run     python -m pytest tests/test_models.py
"""

import contextlib
import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import make_policy, make_tokenizer, read_rows, write_rows
from models import make_bert, tiny
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax
from train_oracle import end_processes, parse
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3TextConfig,
    MambaConfig,
)

import generate
import loading
import score
import train_dpo
from scorers import logp

sys.path.append(str(Path(score.__file__).with_name("scorers")))
import embed  # noqa: E402

BOUNDARY = 64  # of the model with longrope, which reads 512 tokens
PHI3 = {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [8.0] * 16}}
PHI3 |= {"original_max_position_embeddings": BOUNDARY, "num_key_value_heads": 2}


def change_config(folder, **changes):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def refusal(capsys, function, *args, **kwargs):
    """The sentence with which a call ends the run."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        function(*args, **kwargs)
    end_processes()
    assert status.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def summary_of(main, *args):
    """What a script's main prints last."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(*args)
    return json.loads(printed.getvalue().splitlines()[-1])


# ----- tied weights
@pytest.fixture
def untied(tmp_path):
    return make_policy(tmp_path / "untied", seed=3, tie=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: before vllm loads the model itself
def test_a_head_of_its_own_that_the_config_ties_is_refused(device, untied, capsys):
    change_config(untied, tie_word_embeddings=True)
    kept = AutoModelForCausalLM.from_pretrained(untied)  # transformers keeps what vllm would replace
    weights = load_file(Path(untied, "model.safetensors"))
    assert torch.equal(kept.lm_head.weight, weights["lm_head.weight"])
    assert not torch.equal(kept.lm_head.weight, weights["model.embed_tokens.weight"])
    load = (loading.load_model, AutoModelForCausalLM, untied, None, "float32")
    said = refusal(capsys, *load, device_map=device)
    assert said.endswith("its config ties head and embedding (tie_word_embeddings), but their weights differ")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_that_equals_its_embedding_may_be_in_the_file(device, tmp_path):
    folder = make_policy(tmp_path / "tied")
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    model = loading.load_model(AutoModelForCausalLM, folder, None, "float32", device_map=device)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied = change_config(shutil.copytree(folder, tmp_path / "untied"), tie_word_embeddings=False)
    model = loading.load_model(AutoModelForCausalLM, untied, None, "float32", device_map=device)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


# ----- quantised weights
def test_quantised_weights_are_refused_by_every_script(tmp_path, capsys):
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    policy = change_config(make_policy(tmp_path / "policy"), **quantised)
    reward = change_config(tiny(tmp_path / "reward", "LlamaForSequenceClassification"), **quantised)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"id": "1", "prompt": "Hi"}])
    answers = [{"text": "a", "source": "on"}, {"text": "b", "source": "on"}]
    responses = write_rows(tmp_path / "on.jsonl", [{"id": "1", "prompt": "Hi", "responses": answers}])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b"}])
    out = ["--out", str(tmp_path / "out")]
    rows = ["--responses", responses, *out]
    sample = ["--model", policy, "--prompts", prompts, "--max-tokens", "4", *out]
    calls = [lambda: train_dpo.main(parse("--model", policy, "--pairs", pairs, *out))]
    for backend in ("hf", "vllm"):
        args = generate.parse_args([*sample, "--backend", backend])
        calls.append(lambda args=args: generate.main(args))
    calls.append(lambda: score.main(score.parse_args(["--model", reward, *rows])))
    args = logp.parse_args(["--model", policy, *rows])
    calls += [lambda: score.main(args, logp.LogProbability), lambda: score.main(args, embed.Embed)]
    for call in calls:
        assert "its weights are quantised; use the model that they were made from" in refusal(capsys, call)
    assert not (tmp_path / "out").exists()


# ----- longrope
@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longrope")
    return tiny(folder, "Phi3ForCausalLM", make_tokenizer(folder), 5, **PHI3)


@torch.no_grad()
def logp_in_row(model, sequence, row):
    """log pi of the last tokens of a sequence, in a batch with another one."""
    ids = torch.zeros(len(row), max(map(len, row)), dtype=torch.long)
    for line, other in zip(ids, row):
        line[: len(other)] = torch.tensor(other)
    logps = log_softmax(model(input_ids=ids).logits[row.index(sequence)].double(), -1)
    return sum(logps[i - 1, sequence[i]].item() for i in range(4, len(sequence)))


def test_the_context_of_longrope_ends_where_factors_depend_on_the_batch(longrope):
    model = AutoModelForCausalLM.from_pretrained(longrope).eval()
    short, full = list(range(20, 60)), list(range(10, 10 + BOUNDARY))
    alone = logp_in_row(model, short, [short])
    assert logp_in_row(model, short, [short, full]) == pytest.approx(alone, abs=1e-3)
    assert abs(logp_in_row(model, short, [short, [*full, 5]]) - alone) > 1  # what must never happen
    assert loading.context_length(AutoConfig.from_pretrained(longrope)) == BOUNDARY
    assert loading.context_length(AutoModelForCausalLM.from_pretrained(longrope).config) == BOUNDARY


def test_context_length_without_longrope(policy, longrope, tmp_path):
    assert loading.context_length(AutoConfig.from_pretrained(policy)) == 512
    config = AutoConfig.from_pretrained(longrope)
    config.rope_parameters = config.rope_parameters | {"original_max_position_embeddings": 600}
    assert loading.context_length(config) == 512
    assert loading.context_length(MambaConfig()) > 10**9


def test_context_length_of_longrope_in_one_type_of_layers():
    """Olmo-3's and Gemma-3's parameters are nested by layer type."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 96} | factors
    plain = {"rope_type": "default", "rope_theta": 1e4}
    for parameters, length in (
        ({"full_attention": longrope, "sliding_attention": plain}, 96),
        ({"full_attention": plain, "sliding_attention": plain}, 512),
    ):
        sizes = {"max_position_embeddings": 512, "num_hidden_layers": 2, "head_dim": 8}
        config = Gemma3TextConfig(**sizes, rope_parameters=parameters)
        assert (
            config.rope_parameters["full_attention"]["rope_type"] == parameters["full_attention"]["rope_type"]
        )
        assert loading.context_length(config) == length


def responses_file(path, texts):
    responses = [{"text": text, "source": "on"} for text in texts]
    return write_rows(path, [{"id": "q", "prompt": "ab", "responses": responses}])


def test_a_score_of_longrope_is_the_same_beside_a_longer_response(longrope, tmp_path):
    texts = ["abc", "abcdefgh" * 2, "x" * 200]
    rewards = tmp_path / "reward"
    tiny(rewards, "Phi3ForSequenceClassification", make_tokenizer(rewards), 5, **PHI3)
    together = responses_file(tmp_path / "together.jsonl", texts)
    single = responses_file(tmp_path / "single.jsonl", texts[1:2])
    for scorer, module, model, key in (
        (logp.LogProbability, logp, longrope, "logp"),
        (score.RewardModel, score, str(rewards), "reward"),
    ):
        found = []
        for name, path in (("together", together), ("single", single)):
            out = str(tmp_path / f"{name}.{key}.jsonl")
            flags = ["--model", model, "--responses", path, "--out", out, "--batch-tokens", "100000"]
            summary_of(score.main, module.parse_args(flags), scorer)
            found.append([response[key] for response in read_rows(out)[0]["responses"]])
        assert found[0][2] is None and found[0][0] is not None  # the long one is not scored
        assert found[0][1] == pytest.approx(found[1][0], abs=1e-4)


def test_sampling_and_training_of_longrope_stay_within_its_context(longrope, tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"id": "1", "prompt": "ab"}])
    flags = [
        "--model",
        longrope,
        "--prompts",
        prompts,
        "--backend",
        "hf",
        "--out",
        str(tmp_path / "on.jsonl"),
    ]
    said = refusal(capsys, generate.main, generate.parse_args([*flags, "--max-tokens", str(BOUNDARY)]))
    assert f"which is {BOUNDARY}" in said
    sides = [{"prompt": "ab", "chosen": "abc", "rejected": "d"}, {"prompt": "ab", "chosen": "x" * 99}]
    sides[1]["rejected"] = "y"
    pairs = write_rows(tmp_path / "pairs.jsonl", sides)
    flags = parse("--model", longrope, "--pairs", pairs, "--out", tmp_path / "out")
    counts = summary_of(train_dpo.main, flags)
    end_processes()
    assert counts["pairs"] == 1 and counts["dropped"] == {"too long": 1}


# ----- RoBERTa
def test_roberta_reads_fewer_tokens_than_it_has_positions(tmp_path):
    folder = make_bert(tmp_path, "RobertaForSequenceClassification", pad_token_id=1)
    change_config(folder, pad_token_id=1)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**30
    assert config.max_position_embeddings == 64
    args = score.parse_args(["--model", folder, "--responses", "r", "--out", "o"])
    assert score.longest_input(args, config, tokenizer) == 62
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert model(torch.full((1, 62), 7)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 63), 7))
    bert = AutoConfig.from_pretrained(make_bert(tmp_path / "bert"))
    assert score.longest_input(args, bert, tokenizer) == 64


# ----- the head
def test_check_logps_wants_the_sum_of_the_models_own_logits(policy, capsys):
    model = loading.load_model(AutoModelForCausalLM, policy, None, "float32")
    ids = torch.arange(20, 50)
    with torch.no_grad():
        logps = log_softmax(model(ids[None]).logits[0, 4:-1].double(), -1)[range(25), ids[5:]]
        exact = logps.sum().item()
        assert loading.check_logps(model, ids, 5, logps, "float32") == pytest.approx(exact, abs=1e-4)
        # 25 tokens may be off by 5 times the tolerance of one
        for off, dtype in ((9e-4, "float32"), (1.4, "bfloat16")):
            loading.check_logps(model, ids, 5, logps + off / 25, dtype)
        for off, dtype in ((1.2e-3, "float32"), (1.6, "bfloat16")):
            said = refusal(capsys, loading.check_logps, model, ids, 5, logps + off / 25, dtype)
            numbers = f"{exact:.4f} by its own logits, {exact + off:.4f} by its head"
            assert said.endswith(f"llama models are not supported: a text has log-probability {numbers}")


def test_token_logps_of_a_scale_and_a_cap():
    torch.manual_seed(0)
    states, weight, targets = torch.randn(7, 5), torch.randn(11, 5), torch.randint(11, (7,))
    bias, counts = torch.randn(11), Counter()
    for scale, cap in ((1.0, None), (0.3, None), (1.0, 2.0), (4.0, 3.0)):
        logits = (scale * states.double()) @ weight.double().T + bias.double()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        exact = log_softmax(logits, -1)[range(7), targets]
        found = logp.token_logps(states, targets, weight, bias, scale, cap)
        assert found.double().tolist() == pytest.approx(exact.tolist(), abs=1e-5)
        counts[round(exact.sum().item(), 3)] += 1
    assert len(counts) == 4  # each changes the numbers
