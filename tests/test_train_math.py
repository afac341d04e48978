"""
train_dpo.py below the level of a run: losses, log-probabilities, packing and gradients.

Covers  every loss and option against plain float64 math, its gradient against central differences, and values
        counted by hand. Learning rates. TokenLogps against full float64 logits, whatever the chunk; no more
        than a chunk of logits is ever held. packed_attention against a dense mask. Sequences in a row against
        each alone, for several architectures; those that cannot be packed, one in a row. Gradients of a
        sharded model against an ordinary float64 model for every loss. Orders and batches. Metrics by hand.
Run     python -m pytest tests/test_train_math.py     (whole runs: test_train.py; processes:
        test_train_distributed.py)
"""

import gc
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_policy, make_tokenizer, read_rows, write_rows
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from train_oracle import (
    GIVEN,
    LR,
    RAGGED,
    WITHOUT_REFERENCE,
    check_rows,
    counts_of,
    float64,
    make_pairs,
    oracle,
    pair_of,
    parse,
    plain_logps,
    plain_run,
    pull_back,
    refused_run,
    slopes,
    train,
)
from transformers import AutoModelForCausalLM

import train_dpo
from train_dpo import TokenLogps, epoch_order, learning_rate, micro_batches, packed_attention, sequence_logps


@pytest.fixture
def process():
    """The process group of one process that main makes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # sharded tensors must be gone before
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("untied"), seed=3, tie=False)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def load(folder):
    return train_dpo.load_policy(str(folder), None, parse(*GIVEN))


def whole_weights(policy):
    """Copies of the weights of a sharded model under the names that its file uses."""
    weights = {}
    for name, parameter in policy.model.named_parameters():
        weights[name] = parameter.detach().full_tensor().clone()
    return weights


# ----- losses
EVERY_LOSS = [
    ("dpo",),
    ("dpo", "--beta", 0.01),
    ("hinge",),
    ("revkl",),
    ("revkl", "--margin-scale", 4),
    ("slic",),
    ("slic", "--slic-delta", 2),
    ("slic", "--slic-lambda", 0),
    ("sft",),
    ("ipo",),
    ("ipo", "--beta", 2),
    ("simpo",),
    ("simpo", "--simpo-gamma", 0, "--beta", 3),
    ("dpo_smoothed", "--label-smoothing", 0.2),
    ("dpo_normalized",),
    ("dpo_normalized", "--beta", 2),
    ("dpo_nll", "--nll-weight", 0.7),
    ("slic_mean", "--slic-delta", 2),
]


def test_every_loss_is_among_them():
    modules = {name: function.__module__ for name, function in train_dpo.LOSSES.items()}
    both = {name for name in modules if modules[name] in ("train_dpo", "recipes.train_losses")}
    assert both == {flags[0] for flags in EVERY_LOSS}
    own = {name for name in modules if modules[name] == "train_dpo"}
    assert own == {"dpo", "hinge", "revkl", "slic", "sft"}


def losses_of_rows(args, logps, reference_logps, counts, margins):
    """pair_losses of pairs, given as tensors (B, 2), and margins (B,)."""
    pairs = []
    for numbers, margin in zip(reference_logps.tolist(), margins.tolist()):
        if args.loss in WITHOUT_REFERENCE:  # as load_pairs leaves them
            numbers = [0.0] * len(numbers)
        pairs.append(train_dpo.Pair("", "", [], margin, numbers))
    batch = train_dpo.make_batch(pairs, logps.flatten(), counts.flatten(), args)
    return train_dpo.pair_losses(args, batch), batch


def random_row(draw, width):
    """(log-probabilities, those of the reference, token counts, reward margin) of a pair."""
    logps = [draw.gauss(-60, 20) for _ in range(width)]
    reference_logps = [draw.gauss(-60, 20) for _ in range(width)]
    return logps, reference_logps, [draw.randint(1, 30) for _ in range(width)], draw.gauss(0, 2)


@pytest.mark.parametrize("flags", EVERY_LOSS)
def test_every_loss_and_its_gradient_on_random_pairs(flags):
    args, draw = parse(*GIVEN, "--loss", *flags), random.Random(0)
    rows = [random_row(draw, 1 if args.loss == "sft" else 2) for _ in range(40)]
    logps, reference_logps, counts, margins = (
        torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in range(4)
    )
    logps.requires_grad_()
    losses, _ = losses_of_rows(args, logps, reference_logps, counts, margins)
    assert losses.shape == (40,)
    assert losses.tolist() == pytest.approx([oracle(args, *row) for row in rows], rel=1e-12)
    (found,) = torch.autograd.grad(losses.sum(), logps)
    expected = [slope for row in rows for slope in slopes(args, *row)]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def losses_of(flags, logps, reference_logps, counts=(1, 1), reward_margin=0.0):
    """The loss of one pair, and its gradient."""
    args = parse(*GIVEN, "--loss", *flags)
    leaf = torch.tensor([logps], dtype=torch.float64, requires_grad=True)
    counts, reference_logps = torch.tensor([counts]).double(), torch.tensor([reference_logps]).double()
    if args.loss == "sft":
        leaf = torch.tensor([logps[:1]], dtype=torch.float64, requires_grad=True)
        counts, reference_logps = counts[:, :1], reference_logps[:, :1]
    (loss,), _ = losses_of_rows(args, leaf, reference_logps, counts, torch.tensor([reward_margin]))
    return loss.item(), torch.autograd.grad(loss, leaf)[0][0].tolist()


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["dpo"], 0.554355),  # -log sigma(0.1 * 3)
        (["dpo", "--beta", 0.01], 0.678260),
        (["ipo"], 4.0),  # (3 - 5)^2
        (["hinge"], 0.7),
        (["revkl"], 0.635038),  # sigma(1) * 0.554355 + sigma(-1) * 0.854355
        (["dpo_smoothed", "--label-smoothing", 0.1], 0.9 * 0.554355 + 0.1 * 0.854355),
        # the chosen response has -10 in two tokens
        (["dpo_nll", "--nll-weight", 0.5], 0.554355 + 0.5 * 5),
        # per token the ratios are 1 / 2 and -2 / 4, and beta is 5
        (["dpo_normalized"], 0.006715),
        (["dpo_normalized", "--beta", 0.1], 0.644397),
        (["slic"], 1.0),
        (["sft"], 5.0),
        # means of -5 and -3.5: 2.5 from the hinge, 0.5 from the likelihood
        (["slic_mean"], 3.0),
        # -log sigma(2 * (-5 - -3.5) - 1) = log(1 + e^4)
        (["simpo"], 4.018150),
        (["simpo", "--simpo-gamma", 0], 3.048587),
        (["simpo", "--beta", 0.1], 1.425081),  # log(1 + e^1.15)
    ],
)
def test_losses_of_a_pair_counted_by_hand(flags, expected):
    loss, _ = losses_of(flags, [-10.0, -14.0], [-11.0, -12.0], [2, 4], 1.0)
    assert loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("reference_logps", [[0.0, 0.0], [-50.0, 3.0]])
def test_slic_and_simpo_have_no_reference(reference_logps):
    loss, gradient = losses_of(["slic"], [-10.0, -10.5], reference_logps)
    assert loss == 1.5 and gradient == pytest.approx([-1.1, 1.0])
    # two and four tokens: z = 2 (-5 + 5.5) - 1 = 0, so the slope is sigma(0) * 2 per mean
    loss, gradient = losses_of(["simpo"], [-10.0, -22.0], reference_logps, [2, 4])
    assert loss == pytest.approx(math.log(2)) and gradient == pytest.approx([-0.5, 0.25])


def test_slic_beyond_its_margin_keeps_the_likelihood():
    assert losses_of(["slic"], [-10.0, -14.0], [0.0, 0.0])[1] == pytest.approx([-0.1, 0.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_by_hand(schedule):
    first = [learning_rate(step, 20, 4.0, schedule) for step in range(3)]
    assert first == pytest.approx([2.0, 4.0, 4.0])  # two steps of warm-up, then the highest once more
    assert learning_rate(11, 20, 4.0, schedule) == pytest.approx(2.0)  # half of the 18 steps that are left
    last = 4 / 18 if schedule == "linear" else 2 * (1 - math.cos(math.pi / 18))
    assert learning_rate(19, 20, 4.0, schedule) == pytest.approx(last)
    assert learning_rate(20, 20, 4.0, schedule) == 0.0
    assert learning_rate(0, 1, 4.0, schedule) == 4.0  # a run of one step trains
    # a tenth of 11 steps is rounded up
    assert [learning_rate(step, 11, 1.0, schedule) for step in range(2)] == [0.5, 1.0]


# ----- TokenLogps
def head_case(count, vocab, width, with_bias, cap=None):
    """states, weight, bias, targets, gradient of the log-probabilities, cap"""
    torch.manual_seed(0)
    states, weight = torch.randn(count, width), torch.randn(vocab, width)
    bias = torch.randn(vocab) if with_bias else None
    return states, weight, bias, torch.randint(vocab, (count,)), torch.randn(count), cap


def fused(states, weight, bias, targets, grad, cap):
    """Log-probabilities and gradients of TokenLogps."""
    leaves = [x.clone().requires_grad_() for x in (states, weight, bias) if x is not None]
    logps = TokenLogps.apply(leaves[0], leaves[1], None if bias is None else leaves[2], targets, cap)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, grad)]


def from_full_logits(states, weight, bias, targets, grad, cap):
    """The same in float64 with all logits at once."""
    leaves = [x.double().requires_grad_() for x in (states, weight, bias) if x is not None]
    logits = leaves[0] @ leaves[1].T
    if bias is not None:
        logits = logits + leaves[2]
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logps = logits.log_softmax(-1)[range(len(targets)), targets]
    return [logps.detach(), *torch.autograd.grad(logps, leaves, grad.double())]


@pytest.mark.parametrize("cap", [None, 5.0])  # logits are up to 15: some are at the cap
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 21])
def test_token_logps_and_gradients_are_those_of_full_logits(count, with_bias, cap, monkeypatch):
    case = head_case(count, 97, 16, with_bias, cap)
    expected = from_full_logits(*case)
    for chunk in (1, 3, 8, 512):  # one token, a ragged end, an exact end, all at once
        monkeypatch.setitem(train_dpo.CHUNK, "cpu", chunk)
        for ours, exact in zip(fused(*case), expected, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - exact).abs().max() < 2e-5, f"chunk {chunk}"


def test_token_logps_of_large_logits_stay_finite():
    states, weight, _, targets, grad, _ = head_case(9, 50, 8, False)
    case = (states * 40, weight * 40, None, targets, grad, None)
    ours, exact = fused(*case), from_full_logits(*case)
    assert all(x.isfinite().all() for x in ours)
    assert torch.allclose(ours[0].double(), exact[0], rtol=1e-5, atol=1e-2)


def test_token_logps_of_bfloat16_operands_are_summed_in_float32(monkeypatch):
    monkeypatch.setitem(train_dpo.CHUNK, "cpu", 8)
    states, weight, bias, targets, grad, cap = head_case(30, 97, 16, True, cap=8.0)
    rounded = (states.bfloat16(), weight.bfloat16(), bias.bfloat16(), targets, grad, cap)
    ours, exact = fused(*rounded), from_full_logits(*rounded)
    assert ours[0].dtype == torch.float32 and (ours[0] - exact[0]).abs().max() < 2e-5
    for name, one, two in zip(("states", "weight", "bias"), ours[1:], exact[1:], strict=True):
        assert one.dtype == torch.bfloat16, name
        assert (one.double() - two).abs().max() < 0.02 * two.abs().max(), name


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_token_logps_never_hold_more_than_a_chunk_of_logits(monkeypatch):
    count, vocab, width, chunk = 100, 4000, 4, 8
    monkeypatch.setitem(train_dpo.CHUNK, "cpu", chunk)
    case = head_case(count, vocab, width, True, cap=4.0)
    with Largest() as seen:
        fused(*case)
    assert seen.elements == chunk * vocab  # the logits of a chunk are there, so backward was watched too
    with Largest() as seen:
        from_full_logits(*case)
    assert seen.elements == count * vocab


# ----- packed_attention
LENGTHS = [5, 1, 9, 2]
ENDS = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)


def attention_case():
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 8) for heads in (6, 2, 2)]  # three query heads to a key head
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_gradients(result, leaves):
    draw = torch.Generator().manual_seed(1)
    pull = torch.randn(result.shape, dtype=result.dtype, generator=draw)
    return [result.detach(), *torch.autograd.grad(result, leaves, pull)]


@pytest.mark.parametrize("window", [None, 9])  # one that no sequence exceeds
def test_packed_attention_is_attention_with_a_dense_mask(window):
    query, key, value = leaves = attention_case()
    options = {"lengths": LENGTHS, "ends": ENDS, "sliding_window": window}
    ours, nothing = packed_attention(None, query, key, value, None, 0.3, **options)
    member = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (member[:, None] == member) & torch.ones(17, 17).tril().bool()
    heads = []
    for head in range(6):
        scores = (0.3 * query[0, head] @ key[0, head // 3].T).masked_fill(~seen, -math.inf)
        heads.append(scores.softmax(-1) @ value[0, head // 3])
    exact = torch.stack(heads, 1)[None]
    assert nothing is None and ours.shape == (1, 17, 6, 8)
    for a, b in zip(with_gradients(ours, leaves), with_gradients(exact, leaves), strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize(
    "options, word",
    [
        ({}, "its layers are not told where they begin"),
        ({"lengths": LENGTHS, "ends": ENDS, "softcap": 30.0}, "a soft cap in attention"),
        ({"lengths": LENGTHS, "ends": ENDS, "s_aux": torch.ones(6)}, "sinks in attention"),
        ({"lengths": LENGTHS, "ends": ENDS, "sliding_window": 8}, "a window of 8 tokens is shorter than"),
    ],
)
def test_packed_attention_says_what_it_does_not_do(options, word):
    with pytest.raises(NotImplementedError, match=word):
        packed_attention(None, *attention_case(), None, 0.3, **options)


# ----- sequences in a row against each alone
UNUSUAL = [
    pair_of("d", "", [3, 4, 5], [[8, 258], [11, 12, 13]]),
    pair_of("e", "", [70], [[9], [60] * 17]),  # a prompt of one token
    pair_of("f", "", [0] * 11, [[0, 0, 258], [8, 9, 258] * 4]),  # token 0
]
ROWS = [[sequence for pair in pairs for sequence in pair.sequences] for pairs in (RAGGED, UNUSUAL)]


def check_against_plain(folder, packed=True, attention="sdpa"):
    policy = load(folder)
    train_dpo.check_model(policy, RAGGED, parse(*GIVEN))
    assert policy.packed == packed
    options = {"attn_implementation": attention, "dtype": torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for pairs, row in zip((RAGGED, UNUSUAL), ROWS):
        with torch.no_grad():
            expected = torch.cat([plain_logps(plain, pair) for pair in pairs])
            ours, counts = sequence_logps(policy, row)
        assert expected.max() - expected.min() > 30  # far from uniform, and lengths differ
        assert ours.dtype == counts.dtype == torch.float64
        assert counts.tolist() == [count for pair in pairs for count in counts_of(pair)]
        found = [ours]
        for budget in (1, 60, 1000):
            found.append(torch.tensor(train_dpo.all_logps(policy, row, budget)))
        for logps in found:
            difference = (logps - expected).abs()
            assert (difference < 1e-4 * counts.sqrt()).all(), difference.max()


@pytest.mark.parametrize("tie", [True, False])
def test_packed_log_probabilities_are_those_of_each_sequence_alone(policy, untied, tie, process):
    check_against_plain(policy if tie else untied)  # two query heads share a key head in both


def test_only_the_response_counts(policy, process):
    ours, model = load(policy), float64(policy)
    ids = [3, 4, 5, 6, 7, 8]
    with torch.no_grad():
        sums, counts = sequence_logps(ours, [train_dpo.Sequence(ids, start) for start in (4, 5, 1)])
        every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    logps = [every[i - 1, ids[i]].item() for i in range(1, 6)]
    assert counts.tolist() == [2, 1, 5]
    assert sums.tolist() == pytest.approx([sum(logps[3:]), logps[4], sum(logps)], abs=1e-4)


def random_model(kind, folder, **changes):
    """A tiny random model of any architecture, with biases that are not zero, without a tokenizer."""
    import transformers

    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 258,
    }
    torch.manual_seed(5)
    config = getattr(transformers, kind + "Config")(**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("Qwen2", {"num_key_value_heads": 2}),
        ("Phi", {}),
        ("GPTNeoX", {}),
        ("GPT2", {"n_layer": 2}),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 512}),
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
        ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 2}),
        ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 64}),  # refused as long as its dropout was on
    ],
)
def test_packing_holds_for_other_architectures(kind, changes, tmp_path, process):
    check_against_plain(random_model(kind, tmp_path, **changes))


GEMMA2 = {"num_key_value_heads": 2, "head_dim": 8}
GPT_OSS = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
LFM2 = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}


@pytest.mark.parametrize(
    "kind, changes, word",
    [
        (
            "Mistral",
            {"num_key_value_heads": 2, "sliding_window": 4},
            "a window of 4 tokens is shorter than the longest",
        ),
        ("Gemma2", GEMMA2, "a soft cap in attention"),
        ("GptOss", GPT_OSS, "sinks in attention"),
        ("Mamba", {"state_size": 4}, "its layers are not told where they begin"),
        ("Bloom", {"n_layer": 2, "n_head": 4}, "its layers are not told where they begin"),
        ("Nemotron", {"num_key_value_heads": 2}, "its layers are not told where they begin"),
        # a convolution that runs on from one sequence into the next
        ("Lfm2", LFM2, "a log-probability is "),
    ],
)
def test_what_cannot_be_packed_is_a_row_of_its_own(kind, changes, word, tmp_path, process, capsys):
    attention = "sdpa" if kind in ("Mistral", "Lfm2") else "eager"
    check_against_plain(random_model(kind, tmp_path, **changes), False, attention)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "packed" in line]
    assert f"sequences cannot be packed into one row ({word}" in said


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("Gemma2", {**GEMMA2, "attn_logit_softcapping": None, "sliding_window": 512}),
        ("Cohere", {"logit_scale": 0.5}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
)
def test_a_cap_and_a_scale_of_the_logits(kind, changes, tmp_path, process):
    check_against_plain(random_model(kind, tmp_path, **changes))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("final_logit_softcapping", config.get("logit_scale", config.get("logits_scaling"))) != 1


def test_a_head_that_does_more_is_refused(pairs_file, tmp_path, capsys):
    """ModernBERT's decoder has layers between its last states and its head."""
    make_tokenizer(tmp_path / "model")
    random_model("ModernBertDecoder", tmp_path / "model", local_attention=512)
    flags = ("--model", tmp_path / "model", "--pairs", pairs_file, "--out", tmp_path / "out")
    said = refused_run(capsys, *flags)
    assert "modernbert-decoder models are not supported: a text has log-probability -" in said
    assert not (tmp_path / "out").exists()


def test_a_window_counts_if_one_sequence_is_longer(tmp_path):
    make_tokenizer(tmp_path / "model")
    random_model("Mistral", tmp_path / "model", num_key_value_heads=2, sliding_window=150)
    pairs = make_pairs(tmp_path / "pairs.jsonl", n=6)
    flags = ("--model", tmp_path / "model", "--pairs", pairs, "--batch-size", 1, "--loss", "slic")
    assert "packed" not in train(*flags, "--out", tmp_path / "short")[1]
    rows = read_rows(pairs)
    rows[4]["chosen"][0]["content"] = "x" * 200
    write_rows(pairs, rows)
    said = train(*flags, "--out", tmp_path / "long")[1]
    assert "a window of 150 tokens is shorter than the longest" in said


def test_a_cap_on_the_logits_in_a_nested_config(tmp_path, process):
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig

    text_config = Gemma4TextConfig(
        vocab_size=259,
        vocab_size_per_layer_input=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=32,
        hidden_size_per_layer_input=0,
        max_position_embeddings=512,
        sliding_window=512,
        initializer_range=0.3,
        final_logit_softcapping=3.0,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = Gemma4Config(text_config=text_config, vision_config=None, audio_config=None)
    torch.manual_seed(0)
    Gemma4ForConditionalGeneration(config).save_pretrained(tmp_path)
    check_against_plain(tmp_path)


def test_dropout_and_jitter_of_the_config_are_off(tmp_path, process):
    noise = {"residual_dropout": 0.5, "attention_dropout": 0.5}
    random_model("SeedOss", tmp_path / "dropout", num_key_value_heads=2, head_dim=8, **noise)
    check_against_plain(tmp_path / "dropout")
    noise = {"router_jitter_noise": 0.5, "num_local_experts": 2}
    random_model("Mixtral", tmp_path / "jitter", num_key_value_heads=2, **noise)
    check_against_plain(tmp_path / "jitter")


# ----- the exported weights of models that are not as usual
def exported(model, pairs, folder):
    """The weights of --model and those after training."""
    train("--model", model, "--pairs", pairs, "--out", folder / "out", "--lr", LR)
    return load_file(Path(model, "model.safetensors")), load_file(folder / "out/model.safetensors")


def test_a_head_of_its_own_is_refused_if_the_config_calls_it_tied(untied, pairs_file, tmp_path, capsys):
    """transformers would keep the head, vLLM would tie it: two models in one folder."""
    model = shutil.copytree(untied, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    flags = ("--model", model, "--pairs", pairs_file, "--out", tmp_path / "out")
    said = refused_run(capsys, *flags)
    assert "its config ties head and embedding (tie_word_embeddings), but their weights differ" in said
    assert not (tmp_path / "out").exists()


def test_experts_are_exported_as_they_are_in_the_files(pairs_file, tmp_path):
    make_tokenizer(tmp_path / "model")
    sizes = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    random_model("Qwen3Moe", tmp_path / "model", num_key_value_heads=2, **sizes)
    start, found = exported(tmp_path / "model", pairs_file, tmp_path)
    assert sum(".experts.3." in name for name in start) == 6  # two layers of gate, up and down
    assert {name: value.shape for name, value in start.items()} == {
        name: value.shape for name, value in found.items()
    }


def test_the_type_of_the_files_counts_not_that_of_the_config(policy, pairs_file, tmp_path):
    model = shutil.copytree(policy, tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype")
    (model / "config.json").write_text(json.dumps(config))
    start, found = exported(model, pairs_file, tmp_path)
    assert {value.dtype for value in start.values()} == {torch.bfloat16}
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def convolution(tmp_path_factory):
    """A model with a convolution of three tokens, which runs on from one sequence into the next."""
    folder = tmp_path_factory.mktemp("convolution")
    make_tokenizer(folder)
    return random_model("Lfm2", folder, **LFM2)


def test_the_rounding_of_bfloat16_hides_nothing_that_cannot_be_packed(convolution, pairs_file, tmp_path):
    """What a convolution of three tokens sees changes a response by less than ROUNDING allows in bfloat16."""
    flags = ("--pairs", pairs_file, "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert "cannot be packed" in train("--model", convolution, *flags)[1]


def test_small_rows_of_the_reference_hide_nothing_that_cannot_be_packed(convolution, pairs_file, tmp_path):
    """Rows of the reference have one sequence here; in a step the two of a pair would share a row."""
    flags = ("--pairs", pairs_file, "--out", tmp_path / "out", "--micro-tokens", 1)
    assert "cannot be packed" in train("--model", convolution, *flags)[1]


def test_a_policy_that_cannot_be_packed_beside_a_reference_that_can(
    policy, convolution, pairs_file, tmp_path
):
    flags = ("--model", convolution, "--pairs", pairs_file, "--out", tmp_path / "out", "--reference", policy)
    said = [line for line in train(*flags)[1].splitlines() if "cannot be packed" in line]
    assert len(said) == 1 and "lfm2" in said[0]
    args = parse(*flags)
    args.reference, args.model = str(policy), str(convolution)
    expected, _ = plain_run(args, [1.0])
    check_rows(args, read_rows(tmp_path / "out" / "metrics.jsonl"), expected)


def test_many_processes_hide_nothing_that_cannot_be_packed(convolution, pairs_file, tmp_path, monkeypatch):
    """Dealt to many processes, every sequence is alone in its row."""

    def one_each(lengths, budget, rank, world):
        return [[index] for index in range(len(lengths))]

    monkeypatch.setattr(train_dpo, "micro_batches", one_each)
    flags = ("--pairs", pairs_file, "--out", tmp_path / "out", "--loss", "sft")
    assert "cannot be packed" in train("--model", convolution, *flags)[1]


def test_rows_of_one_sequence_have_the_gradients_of_a_plain_float64_model(convolution, process):
    args, model = parse(*GIVEN), float64(convolution)
    ours = load(convolution)
    train_dpo.check_model(ours, RAGGED, args)
    assert not ours.packed
    expected = pull_back(args, model, RAGGED)
    rows = {row["pair_id"]: row for row in train_dpo.forward_backward(ours, RAGGED, args, 0)}
    for value in expected:
        assert rows[value.pair.pair_id]["loss"] == pytest.approx(value.loss, rel=1e-4, abs=1e-4)
    exact = {name: each.grad for name, each in model.named_parameters()}
    for name, parameter in ours.model.named_parameters():
        difference = (parameter.grad.full_tensor().double() - exact[name]).abs().max()
        assert difference < 1e-4 * exact[name].abs().max() + 1e-7, name


# ----- gradients
@pytest.mark.parametrize(
    "kind, flags",
    [
        ("tied", ["dpo"]),
        ("untied", ["dpo"]),
        ("bias of the head", ["dpo"]),
        ("tied", ["dpo_nll", "--nll-weight", 0.3]),
        ("tied", ["dpo_normalized"]),
        ("tied", ["ipo"]),
        ("tied", ["hinge"]),
        ("tied", ["revkl"]),
        ("untied", ["sft"]),
        ("tied", ["slic_mean"]),
        ("tied", ["simpo"]),
    ],
)
def test_gradients_are_those_of_a_plain_float64_model(kind, flags, policy, untied, tmp_path, process):
    folder = {"tied": policy, "untied": untied}.get(kind) or random_model("Phi", tmp_path)
    args = parse(*GIVEN, "--micro-tokens", 60, "--loss", *flags)
    ours, model = load(folder), float64(folder)
    pairs = RAGGED
    if args.loss == "sft":
        pairs = [pair._replace(sequences=pair.sequences[:1]) for pair in pairs]
    assert len(micro_batches([pair.tokens() for pair in pairs], 60, 0, 1)) > 1
    # a forward without backward first, as in a run: it once left weights gathered, and copies were trained
    sums = iter(train_dpo.all_logps(ours, [each for pair in pairs for each in pair.sequences], 1))
    shifted = []
    for i, pair in enumerate(pairs):
        reference_logps = tuple(next(sums) + i - 3.0 * side for side in range(len(pair.sequences)))
        if args.loss in WITHOUT_REFERENCE:
            reference_logps = (0.0,) * len(reference_logps)
        shifted.append(pair._replace(reference_logps=reference_logps))
    expected = pull_back(args, model, shifted)
    rows = train_dpo.forward_backward(ours, shifted, args, 7)
    assert sorted(row["pair_id"] for row in rows) == ["a", "b", "c"]
    losses = {row["pair_id"]: row["loss"] for row in rows}
    for value in expected:
        assert losses[value.pair.pair_id] == pytest.approx(value.loss, rel=1e-4, abs=1e-4)
    names = {name.removeprefix("model."): each for name, each in ours.model.named_parameters()}
    exact = {name.removeprefix("model."): each.grad for name, each in model.named_parameters()}
    assert names.keys() == exact.keys()
    for name, gradient in exact.items():
        got = names[name].grad.full_tensor().double()
        assert gradient.abs().max() > 0, name
        assert (got - gradient).abs().max() < 1e-4 * gradient.abs().max() + 1e-7, name


def test_measuring_leaves_no_gradient(policy, process):
    ours, args = load(policy), parse(*GIVEN)
    with torch.no_grad():
        rows = train_dpo.forward_backward(ours, RAGGED, args, 0, train=False)
    assert [row["tokens"] for row in sorted(rows, key=lambda row: row["pair_id"])] == [16, 79, 78]
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_one_optimizer_step_changes_every_weight_of_the_sharded_model(policy, process):
    ours = load(policy)
    before = torch.tensor(train_dpo.all_logps(ours, ROWS[0], 1000))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=LR, weight_decay=0.0, fused=True)
    old = whole_weights(ours)
    (-sequence_logps(ours, ROWS[0])[0].sum()).backward()
    optimizer.step()
    new = whole_weights(ours)
    stored = load_file(Path(policy, "model.safetensors"))
    assert stored.keys() <= old.keys()
    for name in stored:
        assert torch.equal(old[name], stored[name]), name
        assert not torch.equal(old[name], new[name]), name
    # and the forward uses the changed ones
    after = torch.tensor(train_dpo.all_logps(ours, ROWS[0], 1000))
    assert after.sum() > before.sum() + 1


def test_a_loss_that_is_not_a_number_names_its_pairs_alone(policy, process, capsys):
    ours, args = load(policy), parse(*GIVEN)
    pairs = [
        pair._replace(reference_logps=(-50.0, math.nan if pair.pair_id != "b" else -5.0)) for pair in RAGGED
    ]
    with pytest.raises(SystemExit) as stop:
        train_dpo.forward_backward(ours, pairs, args, 3)
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    sentence, names = said.split(" for ")
    assert sentence.endswith("step 3: the loss is not finite") and set(names.split(", ")) == {"a", "c"}


# ----- metrics
def metrics_of(args, logps, reference_logps, counts):
    tensors = [torch.tensor(values).double() for values in (logps, reference_logps, counts)]
    _, batch = losses_of_rows(args, *tensors, torch.zeros(len(logps)))
    return train_dpo.pair_metrics(batch, torch.tensor([5.0, 7.0])[: len(logps)], args.beta)


def test_metrics_of_pairs_counted_by_hand():
    logps = [[-10.0, -14.0], [-9.0, -3.0]]
    reference_logps = [[-11.0, -12.0], [-8.0, -8.0]]  # h is 3 and -6
    metrics = metrics_of(parse(*GIVEN), logps, reference_logps, [[2.0, 4.0], [3.0, 1.0]])
    rows = []
    for i, source in enumerate(("on", "off")):
        row = {name: of[i].item() for name, of in metrics.items()}
        rows.append(row | {"pair_id": str(i), "source": source, "tokens": 12})
    row = train_dpo.metrics_row(rows)
    by_source = row.pop("by_source")
    assert row == pytest.approx(
        {
            "loss": 6.0,
            "chosen_logp": -9.5,
            "chosen_logp_per_token": -4.0,
            "accuracy": 0.5,
            "margin": -0.15,
            "margin_std": 0.45,
            "chosen_reward": 0.0,
            "rejected_reward": 0.15,
            "rejected_logp": -8.5,
            "rejected_logp_per_token": -3.25,
            "diversity": -1.0,
            "diversity_std": 5.0,
            "pairs": 2,
            "tokens": 24,
        }
    )
    assert by_source["on"]["diversity"] == 4
    assert by_source["off"]["diversity"] == -6
    assert by_source["on"]["pairs"] == by_source["off"]["pairs"] == 1
    assert by_source["off"]["margin_std"] == 0
    assert train_dpo.metrics_row(rows[:1])["by_source"] is None


@pytest.mark.parametrize(
    "flags, rewards",
    [
        (["dpo", "--beta", 0.5], [0.5, -1.0]),
        (["dpo_normalized"], [2.5, -2.5]),  # 5 * (1 / 2) and 5 * (-2 / 4)
        (["slic"], [-10.0, -14.0]),
        (["slic_mean"], [-5.0, -3.5]),
        (["simpo"], [-10.0, -7.0]),  # twice the means
    ],
)
def test_rewards_are_beta_times_what_the_loss_compares(flags, rewards):
    args = parse(*GIVEN, "--loss", *flags)
    metrics = metrics_of(args, [[-10.0, -14.0]], [[-11.0, -12.0]], [[2.0, 4.0]])
    found = [metrics["chosen_reward"].item(), metrics["rejected_reward"].item()]
    assert found == pytest.approx(rewards)
    assert metrics["margin"].item() == pytest.approx(rewards[0] - rewards[1])
    assert metrics["accuracy"].item() == (rewards[0] > rewards[1])


# ----- orders and batches
def test_epoch_order_depends_on_seed_epoch_and_ids_alone():
    pairs = [pair_of(f"p{i}", "", [1], [[2]]) for i in range(40)]

    def order(some, seed=0, epoch=0):
        return [pair.pair_id for pair in epoch_order(some, seed, epoch)]

    first = order(pairs)
    assert sorted(first) == sorted(pair.pair_id for pair in pairs)
    assert first != [pair.pair_id for pair in pairs]
    assert order(pairs[::-1]) == first
    assert order(pairs[5:]) == [name for name in first if int(name[1:]) >= 5]
    assert len({tuple(order(pairs, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_micro_batches_give_everything_once_whatever_the_ranks():
    draw = random.Random(0)
    for _ in range(300):
        lengths = [draw.randint(2, 60) for _ in range(draw.randint(1, 12))]
        world, budget = draw.choice([1, 2, 3, 8]), draw.choice([1, 50, 100, 5000])
        ranks = [micro_batches(lengths, budget, rank, world) for rank in range(world)]
        # FSDP2 hangs where processes do not go forward equally often
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for rank in ranks for batch in rank]
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) < 2 or sum(lengths[index] for index in batch) <= budget
        for rank in ranks:  # empty ones come last, and no turn is empty everywhere
            assert rank == sorted(rank, key=lambda batch: not batch)
        assert any(rank[-1] for rank in ranks)
        if budget == 5000:
            assert len(ranks[0]) == 1  # nothing is cut without need
        if budget == 1:
            assert len(ranks[0]) == math.ceil(len(lengths) / world)


def test_micro_batches_by_hand():
    lengths = [10, 40, 30, 20, 50]  # longest first: 4, 1, 2, 3, 0
    assert micro_batches(lengths, 60, 0, 1) == [[4], [1], [2, 3, 0]]
    assert micro_batches(lengths, 80, 0, 2) == [[4, 2], [0]]
    assert micro_batches(lengths, 80, 1, 2) == [[1, 3], []]
    assert micro_batches([7], 80, 1, 2) == [[]]
    assert micro_batches(lengths, 0, 1, 2) == [[1], [3], []]  # one each, as often as the other process
