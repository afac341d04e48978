"""train_dpo.py in one process: loss, log-probabilities, packing, gradients, a whole run, data, export.

Run: python -m pytest tests/test_train.py -q     (processes, kills and resumes: tests/test_train_distributed.py)
Everything is checked against full logits from an ordinary transformers model in float64.
"""

import contextlib
import io
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
from conftest import make_policy, make_tokenizer, read_rows, write_rows
from train_dpo import Pair, TokenLogps, dpo_loss, epoch_order, learning_rate, load_pairs, micro_batches, pair_logps

CLOCKS = {"tokens_per_s", "peak_gb"}  # what two equal runs may differ in
LR = 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# helpers

def make_pairs(path, n=9, seed=0):
    """Rows as build_pairs.py writes them, of very different lengths; a third of the sides was cut."""
    draw = random.Random(seed)

    def text(low, high):
        return "".join(draw.choice("abcdefgh ,.é") for _ in range(draw.randint(low, high))) + "x"

    return write_rows(path, [{
        "id": f"q{i}", "pair_id": f"p{i}", "prompt": [{"role": "user", "content": text(1, 25)}],
        "chosen": [{"role": "assistant", "content": text(0, 40)}],
        "rejected": [{"role": "assistant", "content": text(0, 15)}],
        "chosen_finish": "length" if i % 3 == 0 else "stop", "rejected_finish": "length" if i % 3 == 1 else None}
        for i in range(n)])


def train(*flags):
    """A run of main in this process; returns (the JSON it printed, what it said on standard error)."""
    said, printed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            train_dpo.main(train_dpo.parse_args([str(flag) for flag in flags]))
    except SystemExit as stop:
        pytest.fail(f"exit status {stop.code}: {said.getvalue()[-2000:]}")
    finally:
        if dist.is_initialized():  # main stopped between start and end
            dist.destroy_process_group()
    return json.loads(printed.getvalue().splitlines()[-1]), said.getvalue()


def refusal(capsys, call, *args):
    """The sentence with which a call ends the run; nothing but exit status 2 will do."""
    try:
        with pytest.raises(SystemExit) as stop:
            call(*args)
    finally:
        if dist.is_initialized():  # main stopped between start and end
            dist.destroy_process_group()
    assert stop.value.code == 2
    return capsys.readouterr().err


def options(**changes):
    return SimpleNamespace(**{"model": "m", "reference": "m", "revision": None, "dtype": "float32",
                              "activation_checkpointing": False,
                              **changes})


def plain_logps(model, pair):
    """(chosen, rejected) from full logits, each sequence alone, summed in float64."""
    sums = []
    for completion in (pair.chosen, pair.rejected):
        logps = model(torch.tensor([pair.prompt + completion])).logits[0].double().log_softmax(-1)
        sums.append(logps[range(len(pair.prompt) - 1, len(pair.prompt) + len(completion) - 1), completion].sum())
    return torch.stack(sums)


def whole_weights(policy):
    """Copies of the weights of a sharded model under the names that its file uses."""
    return {name: parameter.detach().full_tensor().clone() for name, parameter in policy.model.named_parameters()}


def without_noise(rows):
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


@pytest.fixture
def mesh():
    """The process group of one process that main makes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    train_dpo.leave()


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("untied"), seed=3, tie=False)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def whole_run(policy, pairs_file, tmp_path_factory):
    """Two epochs of 4 + 4 + 1 pairs; most tests of a whole run look at this one."""
    out = tmp_path_factory.mktemp("run")
    flags = ("--model", policy, "--pairs", pairs_file, "--batch-size", 4, "--epochs", 2, "--lr", LR)
    summary, said = train(*flags, "--out", out)
    return SimpleNamespace(out=out, flags=flags, summary=summary, said=said, rows=read_rows(out / "metrics.jsonl"))


# ---------------------------------------------------------------------------------------------------------------------
# the loss

def test_dpo_loss_of_a_pair_counted_by_hand():
    sides = [torch.tensor([value]) for value in (-10.0, -14.0, -11.0, -12.0)]
    for beta, expected in ((0.1, 0.554355), (0.01, 0.678260)):
        loss, h = dpo_loss(*sides, beta)
        assert h.item() == 3 and loss.item() == pytest.approx(expected, abs=1e-6)


def test_dpo_loss_and_its_gradient_on_random_pairs():
    torch.manual_seed(0)
    sides = [(torch.randn(50, dtype=torch.float64) * 40 - 100).requires_grad_() for _ in range(4)]
    losses, h = dpo_loss(*sides, 0.1)
    ratio = [math.exp(0.1 * value) for value in h.tolist()]
    assert torch.allclose(h, (sides[0] - sides[2]) - (sides[1] - sides[3]), rtol=0, atol=1e-12)
    # -log(r / (1 + r))
    assert losses.tolist() == pytest.approx([math.log1p(1 / r) for r in ratio], rel=1e-10, abs=1e-14)
    chosen, rejected = torch.autograd.grad(losses.sum(), sides[:2])
    assert torch.allclose(chosen, -0.1 * torch.sigmoid(-0.1 * h), rtol=1e-10)
    assert torch.allclose(rejected, -chosen)


def test_learning_rate_by_hand():
    for schedule in ("linear", "cosine"):
        first = [learning_rate(step, 20, 4.0, schedule) for step in range(3)]
        assert first == pytest.approx([2.0, 4.0, 4.0])  # two steps of warm-up, then the highest once more
        assert learning_rate(11, 20, 4.0, schedule) == pytest.approx(2.0)  # half of the 18 steps behind the warm-up
        assert learning_rate(0, 1, 4.0, schedule) == 4.0  # a run of one step trains
    assert learning_rate(19, 20, 4.0, "linear") == pytest.approx(4 / 18)
    assert learning_rate(19, 20, 4.0, "cosine") == pytest.approx(2 * (1 - math.cos(math.pi / 18)))
    assert learning_rate(20, 20, 4.0, "linear") == learning_rate(20, 20, 4.0, "cosine") == 0.0
    # a tenth of 11 steps is rounded up
    assert [learning_rate(step, 11, 1.0, "linear") for step in range(2)] == [0.5, 1.0]


def test_presets_are_the_papers():
    expected = {"s1": (0.1, 5e-7, 1, 256, "linear", 0.999), "s2": (0.01, 5e-7, 1, 128, "cosine", 0.999),
                "s3": (0.1, 5e-7, 2, 32, "cosine", 0.99)}
    given = ["--model", "m", "--pairs", "p", "--out", "o"]
    for preset, values in expected.items():
        args = train_dpo.parse_args([*given, "--preset", preset])
        assert (args.beta, args.lr, args.epochs, args.batch_size, args.schedule, args.adam_beta2) == values
        assert args.max_length == 2048 and args.reference == "m"
    assert train_dpo.parse_args(given) == train_dpo.parse_args([*given, "--preset", "s1"])
    # a flag of one's own goes before the preset
    args = train_dpo.parse_args([*given, "--preset", "s3", "--beta", "0.5", "--epochs", "1"])
    assert (args.beta, args.epochs, args.batch_size) == (0.5, 1, 32)


@pytest.mark.parametrize("flags", [["--beta", "0"], ["--lr", "-1"], ["--batch-size", "0"], ["--adam-beta2", "1"],
                                   ["--resume", "--overwrite"], ["--micro-tokens", "0"]])
def test_senseless_flags_are_refused(flags, capsys):
    assert flags[0] in refusal(capsys, train_dpo.parse_args, ["--model", "m", "--pairs", "p", "--out", "o", *flags])


# ---------------------------------------------------------------------------------------------------------------------
# TokenLogps

def head_case(count, vocab, width, with_bias, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(count, width), torch.randn(vocab, width)
    return hidden, weight, torch.randn(vocab) if with_bias else None, torch.randint(vocab, (count,)), torch.randn(count)


def fused(hidden, weight, bias, targets, grad):
    """Log-probabilities and gradients of TokenLogps."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logps = TokenLogps.apply(leaves[0], leaves[1], leaves[2] if bias is not None else None, targets)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, grad)]


def from_full_logits(hidden, weight, bias, targets, grad):
    """The same in float64 with all logits at once."""
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias is not None else 0)
    logps = logits.log_softmax(-1)[range(len(targets)), targets]
    return [logps.detach(), *torch.autograd.grad(logps, leaves, grad.double())]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 21])
def test_token_logps_and_gradients_are_those_of_full_logits(count, with_bias, monkeypatch):
    case = head_case(count, 97, 16, with_bias)
    expected = from_full_logits(*case)
    for chunk in (1, 3, 8, 512):  # one token, a ragged end, an exact end, all at once
        monkeypatch.setattr(train_dpo, "CHUNK", chunk)
        for ours, exact in zip(fused(*case), expected, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - exact).abs().max() < 2e-5, f"chunk {chunk}"


def test_token_logps_of_large_logits_stay_finite():
    hidden, weight, _, targets, grad = head_case(9, 50, 8, False)
    case = (hidden * 40, weight * 40, None, targets, grad)
    ours, exact = fused(*case), from_full_logits(*case)
    assert all(x.isfinite().all() for x in ours)
    assert torch.allclose(ours[0].double(), exact[0], rtol=1e-5, atol=1e-2)


def test_token_logps_of_bfloat16_operands_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(train_dpo, "CHUNK", 8)
    hidden, weight, bias, targets, grad = head_case(30, 97, 16, True)
    rounded = (hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), targets, grad)
    ours, exact = fused(*rounded), from_full_logits(*rounded)
    assert ours[0].dtype == torch.float32 and (ours[0] - exact[0]).abs().max() < 2e-5
    for name, one, two in zip(("hidden", "weight", "bias"), ours[1:], exact[1:], strict=True):
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
    monkeypatch.setattr(train_dpo, "CHUNK", chunk)
    case = head_case(count, vocab, width, True)
    with Largest() as seen:
        fused(*case)
    assert seen.elements == chunk * vocab  # the logits of a chunk are there, so backward was watched too
    with Largest() as seen:
        from_full_logits(*case)
    assert seen.elements == count * vocab


# ---------------------------------------------------------------------------------------------------------------------
# packing

RAGGED = [Pair("a", [3, 4, 5, 6, 7], [8, 9, 10, 258], [11, 12]), Pair("b", [70] * 23, [8, 9, 10, 258] * 8, [258]),
          Pair("c", [1, 2], list(range(20, 90)), [5, 5, 5, 258])]


def check_against_plain(folder, mesh):
    policy = train_dpo.load_policy(str(folder), None, options(), mesh)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.stack([plain_logps(plain, pair) for pair in RAGGED])
        ours = pair_logps(policy, RAGGED, "cpu")
        again = pair_logps(policy, RAGGED[::-1], "cpu").flip(0)
    assert (expected.max() - expected.min()) > 50  # far from uniform, and lengths differ
    assert (ours - expected).abs().max() < 5e-4
    assert (ours - again).abs().max() < 5e-4


@pytest.mark.parametrize("tie", [True, False])
def test_packed_log_probabilities_are_those_of_each_sequence_alone(policy, untied, tie, mesh):
    check_against_plain(policy if tie else untied, mesh)  # two query heads share a key head in both


def random_model(kind, folder, **changes):
    """A tiny random model of any architecture, with biases that are not zero, in a folder without a tokenizer."""
    import transformers
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4,
             "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 257, "eos_token_id": 258,
             "pad_token_id": 258}
    torch.manual_seed(5)
    config = getattr(transformers, kind + "Config")(**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, changes", [
    ("Qwen2", {"num_key_value_heads": 2}), ("Phi", {}), ("GPTNeoX", {}), ("GPT2", {"n_layer": 2}),
    ("Mistral", {"num_key_value_heads": 2, "sliding_window": 512}),
    ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 2})])
def test_packing_holds_for_other_architectures(kind, changes, tmp_path, mesh):
    check_against_plain(random_model(kind, tmp_path, **changes), mesh)


@pytest.mark.parametrize("kind, changes, word", [
    ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 64}, "packed"), ("Mistral", {"sliding_window": 4}, "window"),
    ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "soft cap"), ("Cohere", {}, "logit_scale"),
    ("Granite", {"logits_scaling": 4.0}, "logits_scaling"), ("Mamba", {"state_size": 4}, ""),
    ("Bloom", {"n_layer": 2, "n_head": 4}, ""),
    ("CodeGen", {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 8}, ""), ("Falcon", {"alibi": False}, ""),
    ("StableLm", {"num_key_value_heads": 2}, "")])
def test_what_cannot_be_packed_is_refused_with_a_sentence(kind, changes, word, pairs_file, tmp_path, capsys):
    make_tokenizer(tmp_path / "model")
    random_model(kind, tmp_path / "model", **changes)
    flags = ["--model", str(tmp_path / "model"), "--pairs", pairs_file, "--out", str(tmp_path / "out")]
    capsys.readouterr()
    # neither a traceback nor, worse, numbers from an attention that sees the future
    said = refusal(capsys, lambda: train_dpo.main(train_dpo.parse_args(flags)))
    assert word in said.splitlines()[-1] and not (tmp_path / "out/model.safetensors").exists()


def test_segment_attention_is_attention_over_each_segment():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    segments = [5, 1, 6]
    ours, nothing = train_dpo.segment_attention(None, query, key, value, None, 0.3, segments=segments)
    place, blocks = torch.arange(12), torch.repeat_interleave(torch.arange(3), torch.tensor(segments))
    seen = (blocks[:, None] == blocks) & (place[:, None] >= place)
    for head in range(6):  # three query heads to a key head
        k, v = key[0, head // 3].double(), value[0, head // 3].double()
        scores = (0.3 * query[0, head].double() @ k.T).masked_fill(~seen, -math.inf)
        assert (ours[0, :, head] - scores.softmax(-1) @ v).abs().max() < 1e-6
    assert nothing is None and ours.shape == (1, 12, 6, 8)


# ---------------------------------------------------------------------------------------------------------------------
# gradients

def plain_gradients(folder, reference):
    """Gradients of the mean DPO loss by a plain float64 model with full logits, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float64)
    logps = torch.stack([plain_logps(model, pair) for pair in RAGGED])
    ratio = logps - reference
    (-F.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1]))).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["tied", "untied", "bias of the head"])
def test_gradients_are_those_of_a_plain_float64_model(kind, policy, untied, tmp_path, mesh):
    folder = {"tied": policy, "untied": untied}.get(kind) or str(random_model("Phi", tmp_path))
    ours = train_dpo.load_policy(folder, None, options(), mesh)
    # a no_grad forward first, as in a run: it once left the root's weights gathered, and copies were trained
    reference = train_dpo.all_logps(ours, RAGGED, 1, "cpu", "reference") + torch.tensor([[0.0, 3.0], [-5.0, 0.0],
                                                                                         [2.0, 1.0]])
    expected = plain_gradients(folder, reference)
    for batch in micro_batches([0, 1, 2], [pair.tokens() for pair in RAGGED], 60, 1, 0):
        members = [i for i, _ in batch]
        logps = pair_logps(ours, [RAGGED[i] for i in members], "cpu")
        losses, _ = dpo_loss(*logps.T, *reference[members].T, 0.1)
        (losses.sum() / len(RAGGED)).backward()
    names = {name.removeprefix("model."): parameter for name, parameter in ours.model.named_parameters()}
    assert names.keys() == {name.removeprefix("model.") for name in expected}
    for name, exact in expected.items():
        got = names[name.removeprefix("model.")].grad.full_tensor().double()
        assert exact.abs().max() > 0, name
        assert (got - exact).abs().max() < 1e-4 * exact.abs().max() + 1e-7, name


def test_one_optimizer_step_changes_every_weight_of_the_sharded_model(policy, mesh):
    ours = train_dpo.load_policy(policy, None, options(), mesh)
    train_dpo.all_logps(ours, RAGGED, 1000, "cpu", "reference")
    optimizer = torch.optim.AdamW(ours.parameters(), lr=LR, weight_decay=0.0, fused=True)
    with torch.no_grad():
        before = pair_logps(ours, RAGGED, "cpu")
    ours.reshard()
    old = whole_weights(ours)
    (-pair_logps(ours, RAGGED, "cpu")[:, 0].sum()).backward()
    optimizer.step()
    new = whole_weights(ours)
    stored = load_file(Path(policy, "model.safetensors"))
    assert stored.keys() <= old.keys()
    for name in stored:
        assert torch.equal(old[name], stored[name]), name
        assert not torch.equal(old[name], new[name]), name
    with torch.no_grad():
        assert (pair_logps(ours, RAGGED, "cpu")[:, 0] > before[:, 0]).all()  # and the forward uses the changed ones


# ---------------------------------------------------------------------------------------------------------------------
# a whole run

def plain_run(model_folder, pairs_file, beta, adam_beta2, factors):
    """The run's six steps by a plain float64 model with full logits and torch's AdamW -> rows, model."""
    pairs, _ = load_pairs(pairs_file, AutoTokenizer.from_pretrained(model_folder), 2048)
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="sdpa", dtype=torch.float64).eval()
    with torch.no_grad():
        reference = {pair.pair_id: plain_logps(model, pair) for pair in pairs}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, adam_beta2), weight_decay=0.0)
    rows = []
    for epoch in range(2):
        order = epoch_order([pair.pair_id for pair in pairs], 0, epoch)
        for batch in (order[:4], order[4:8], order[8:]):
            sides = torch.stack([plain_logps(model, pairs[i]) for i in batch])
            ratio = sides - torch.stack([reference[pairs[i].pair_id] for i in batch])
            h = ratio[:, 0] - ratio[:, 1]
            loss = torch.log1p(torch.exp(-beta * h)).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            lr = optimizer.param_groups[0]["lr"] = LR * factors[len(rows)]
            optimizer.step()
            chosen, rejected = sides.mean(0).tolist()
            rows.append({"step": len(rows), "epoch": epoch, "loss": loss.item(),
                         "accuracy": (h > 0).double().mean().item(),
                         "margin": beta * h.mean().item(), "chosen_reward": beta * ratio[:, 0].mean().item(),
                         "rejected_reward": beta * ratio[:, 1].mean().item(), "chosen_logp": chosen,
                         "rejected_logp": rejected,
                         "lr": lr, "grad_norm": norm, "pairs": len(batch), "tokens": sum(pairs[i].tokens()
                                                                                         for i in batch)})
    return rows, model


def check_rows(rows, expected):
    assert len(rows) == len(expected) == 6
    assert min(row["loss"] for row in expected) < 0.5  # something is learnt, so a wrong sign would show
    for ours, plain in zip(rows, expected):
        assert ours.keys() - CLOCKS == plain.keys()
        for name, value in plain.items():
            if name == "accuracy" and plain["step"] == 0:
                continue  # h is rounding there
            assert ours[name] == pytest.approx(value, rel=5e-4 if name == "grad_norm" else 5e-5,
                                               abs=2e-4), (ours["step"], name)


def test_other_settings_reach_the_run(policy, pairs_file, tmp_path):
    train("--model", policy, "--pairs", pairs_file, "--batch-size", 4, "--epochs", 2, "--lr", LR, "--out", tmp_path,
          "--beta", 0.3, "--adam-beta2", 0.7, "--schedule", "cosine")
    factors = [1.0, 1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915]  # one step of warm-up, then half a cosine
    check_rows(read_rows(tmp_path / "metrics.jsonl"), plain_run(policy, pairs_file, 0.3, 0.7, factors)[0])


def test_a_whole_run_is_that_of_a_plain_loop(whole_run, policy, pairs_file):
    factors = [1.0, 1.0, 0.8, 0.6, 0.4, 0.2]  # one step of warm-up, then five on a line from 1 down to 0
    expected, model = plain_run(policy, pairs_file, 0.1, 0.999, factors)
    check_rows(whole_run.rows, expected)
    trained = load_file(whole_run.out / "model.safetensors")
    start = load_file(Path(policy, "model.safetensors"))
    exact = {name: value.float() for name, value in model.state_dict().items()}
    for name, value in trained.items():
        assert not torch.equal(value, start[name]), name
        off = (value - exact[name]).abs()
        # Adam makes a whole step even of a gradient that is all rounding: a few may differ
        assert (off > 0.05 * LR).float().mean() < 2e-3, name
    ids = torch.tensor([RAGGED[2].prompt + RAGGED[2].chosen])
    exported = AutoModelForCausalLM.from_pretrained(whole_run.out, attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert (exported(ids).logits - model(ids).logits).abs().max() < 0.02
        assert (AutoModelForCausalLM.from_pretrained(policy)(ids).logits - model(ids).logits).abs().max() > 0.2


def test_the_first_step_is_exactly_the_reference(whole_run):
    first = whole_run.rows[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["margin"]) < 1e-4
    assert abs(first["chosen_reward"]) < 1e-4 and abs(first["rejected_reward"]) < 1e-4


def test_the_summary_and_the_meta_file_say_what_was_done(whole_run, pairs_file):
    summary, meta = whole_run.summary, json.loads((whole_run.out / "metrics.meta.json").read_text())
    assert meta["counts"] == summary
    assert (summary["pairs"], summary["steps"], summary["dropped"]) == (9, 6, {})
    assert summary["first_loss"] == whole_run.rows[0]["loss"] and summary["last_loss"] == whole_run.rows[-1]["loss"]
    assert summary["tokens"] == sum(row["tokens"] for row in whole_run.rows)
    assert meta["args"]["lr"] == LR and pairs_file in meta["inputs"]
    assert [row["pair_id"] for row in read_rows(whole_run.out / "reference.jsonl")] == [f"p{i}" for i in range(9)]
    assert not (whole_run.out / "checkpoints").exists() and not (whole_run.out / "export.tmp").exists()


def test_the_order_of_the_file_changes_nothing(whole_run, pairs_file, tmp_path):
    turned = write_rows(tmp_path / "pairs.jsonl", read_rows(pairs_file)[::-1])
    flags = [turned if flag == pairs_file else flag for flag in whole_run.flags]
    train(*flags, "--out", tmp_path / "out")
    close(read_rows(tmp_path / "out/metrics.jsonl"), whole_run.rows)


def close(ours, theirs, loss=1e-4):
    """The same run up to rounding, which Adam lets grow slowly."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys() and (a["step"], a["pairs"], a["tokens"], a["lr"]) == (b["step"], b["pairs"],
                                                                                          b["tokens"], b["lr"])
        for name in ("loss", "margin", "chosen_reward", "rejected_reward"):
            assert a[name] == pytest.approx(b[name], abs=loss), (a["step"], name)
        for name in ("chosen_logp", "rejected_logp"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=10 * loss), (a["step"], name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]


@pytest.mark.parametrize("flags", [("--micro-tokens", 1), ("--micro-tokens", 150), ("--activation-checkpointing",)])
def test_how_a_step_is_cut_or_recomputed_changes_nothing(flags, whole_run, tmp_path):
    train(*whole_run.flags, "--out", tmp_path, *flags)
    close(read_rows(tmp_path / "metrics.jsonl"), whole_run.rows)


def test_bfloat16_stays_near_float32(whole_run, tmp_path):
    train(*whole_run.flags, "--out", tmp_path, "--dtype", "bfloat16")
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)
    assert [row["loss"] for row in rows] != [row["loss"] for row in whole_run.rows]  # it was another type
    for ours, theirs in zip(rows, whole_run.rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.1)
        assert ours["chosen_logp"] == pytest.approx(theirs["chosen_logp"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.2)


def test_another_reference_is_used_and_not_refused(whole_run, policy, tmp_path):
    other = make_policy(tmp_path / "other", seed=8)
    flags = [*whole_run.flags, "--reference", other]
    train(*flags, "--out", tmp_path / "out")
    first = read_rows(tmp_path / "out/metrics.jsonl")[0]
    assert first["chosen_logp"] == pytest.approx(whole_run.rows[0]["chosen_logp"], abs=1e-3)  # the policy is --model
    pairs, _ = load_pairs(whole_run.flags[3], AutoTokenizer.from_pretrained(policy), 2048)
    batch = epoch_order([pair.pair_id for pair in pairs], 0, 0)[:4]
    policy_model, other_model = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
                                 for folder in (policy, other))
    with torch.no_grad():
        ratio = torch.stack([plain_logps(policy_model, pairs[i]) - plain_logps(other_model, pairs[i]) for i in batch])
    loss = -F.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])).mean().item()
    assert first["loss"] == pytest.approx(loss, abs=1e-3) and abs(loss - math.log(2)) > 0.05


def test_a_reference_with_another_tokenizer_is_refused(whole_run, tmp_path, capsys):
    other = make_policy(tmp_path / "other")
    vocabulary = Path(other, "tokenizer.json").read_text().replace("<|endoftext|>", "<|another|>")
    Path(other, "tokenizer.json").write_text(vocabulary)
    config = Path(other, "tokenizer_config.json")
    config.write_text(config.read_text().replace("<|endoftext|>", "<|another|>"))
    said = refusal(capsys, lambda: train_dpo.main(train_dpo.parse_args(
        [*map(str, whole_run.flags), "--reference", other, "--out", str(tmp_path / "out")])))
    assert other in said and "tokenizer" in said and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# orders and batches

def test_epoch_order_depends_on_seed_epoch_and_ids_alone():
    ids = [f"p{i}" for i in range(40)]
    order = [ids[i] for i in epoch_order(ids, 0, 0)]
    assert sorted(order) == sorted(ids) and order != ids
    turned = ids[::-1]
    assert [turned[i] for i in epoch_order(turned, 0, 0)] == order
    fewer = ids[5:]
    assert [fewer[i] for i in epoch_order(fewer, 0, 0)] == [name for name in order if name in fewer]
    others = [[ids[i] for i in epoch_order(ids, seed, epoch)] for seed, epoch in ((0, 1), (1, 0), (1, 1))]
    assert len({tuple(some) for some in (order, *others)}) == 4


def test_micro_batches_give_every_pair_once_whatever_the_ranks():
    draw = random.Random(0)
    for _ in range(200):
        total = draw.randint(1, 12)
        tokens = [draw.randint(1, 60) for _ in range(total + 3)]
        indices = draw.sample(range(total + 3), total)
        world, budget = draw.choice([1, 2, 3, 8]), draw.choice([1, 50, 100, 1000])
        ranks = [micro_batches(indices, tokens, budget, world, rank) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1, "FSDP2 hangs where ranks do not go forward equally often"
        batches = [batch for rank in ranks for batch in rank]
        assert sorted(i for batch in batches for i, weight in batch if weight == 1.0) == sorted(indices)
        assert {weight for batch in batches for _, weight in batch} <= {0.0, 1.0}
        assert all(batch and (len(batch) == 1 or sum(tokens[i] for i, _ in batch) <= budget) for batch in batches)
        if world == 1:
            assert all(weight == 1.0 for batch in batches for _, weight in batch)
        if budget == 1000:
            assert len(batches) == world  # nothing is cut without need


# ---------------------------------------------------------------------------------------------------------------------
# data

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def load(tmp_path, tokenizer, rows, max_length=2048):
    return load_pairs(write_rows(tmp_path / "pairs.jsonl", rows), tokenizer, max_length)


BUILT = {"pair_id": "p", "prompt": messages("Hi"), "chosen": [{"role": "assistant", "content": "yes"}],
         "rejected": [{"role": "assistant", "content": "no"}], "chosen_finish": "stop", "rejected_finish": None,
         "chosen_token_ids": None, "rejected_token_ids": None}


def test_ids_are_prompt_response_and_one_end_of_turn(tmp_path, tokenizer):
    (pair,), dropped = load(tmp_path, tokenizer, [{**BUILT, "rejected_finish": "length"}])
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.prompt) == prompt
    assert pair.prompt == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    eot = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert pair.chosen == tokenizer("yes")["input_ids"] + [eot]  # not the newline that the template puts behind it
    assert pair.rejected == tokenizer("no")["input_ids"]  # it was cut
    assert pair.tokens() == 2 * len(pair.prompt) + 4 + 2 and not dropped


def test_all_forms_of_a_pair_give_the_same_ids(tmp_path, tokenizer):
    talk = messages("Hi", "Hello", "And?")
    forms = [{**BUILT, "prompt": talk},
             {"pair_id": "p", "prompt": talk, "chosen": "yes", "rejected": "no"},
             {"pair_id": "p", "prompt": "ignored, as UltraFeedback's", "chosen": [*talk, BUILT["chosen"][0]],
              "rejected": [*talk, BUILT["rejected"][0]]},
             {"pair_id": "p", "chosen": [*talk, BUILT["chosen"][0]], "rejected": [*talk, BUILT["rejected"][0]]}]
    found = [load(tmp_path, tokenizer, [row])[0] for row in forms]
    assert found[0] == found[1] == found[2] == found[3]
    assert tokenizer.decode(found[0][0].prompt).count("<|im_start|>") == 4
    plain = [load(tmp_path, tokenizer, [{**BUILT, "prompt": prompt}])[0] for prompt in ("Hi", messages("Hi"))]
    assert plain[0] == plain[1]


def test_a_row_without_pair_id_is_named_by_its_contents(tmp_path, tokenizer):
    rows = [{"prompt": "Hi", "chosen": "yes", "rejected": some} for some in ("no", "never")]
    ids = {pair.pair_id: pair.rejected for pair in load(tmp_path, tokenizer, rows)[0]}
    assert len(ids) == 2 and ids == {pair.pair_id: pair.rejected for pair in load(tmp_path, tokenizer, rows[::-1])[0]}


def test_sampled_ids_are_kept_unless_another_tokenizer_made_them(tmp_path, tokenizer, capsys):
    odd = tokenizer("y")["input_ids"] + tokenizer("es")["input_ids"][::-1]  # no text is tokenised to these
    row = {**BUILT, "chosen_token_ids": odd, "chosen_tokenizer": train_dpo.fingerprint(tokenizer)}
    eot = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (pair,), _ = load(tmp_path, tokenizer, [row])
    assert pair.chosen == [*odd, eot] and capsys.readouterr().err == ""
    (pair,), _ = load(tmp_path, tokenizer, [{**row, "chosen_tokenizer": "another"}])
    assert pair.chosen == tokenizer("yes")["input_ids"] + [eot]
    assert "1 responses" in capsys.readouterr().err


def test_too_long_and_identical_pairs_are_dropped_and_counted(tmp_path, tokenizer):
    length = len(load(tmp_path, tokenizer, [BUILT])[0][0].prompt) + 4  # the chosen side is the longer one
    rows = [BUILT, {**BUILT, "pair_id": "long", "rejected": "x" * 50}, {**BUILT, "pair_id": "same", "rejected": "yes"},
            # the end of the turn is a difference
            {**BUILT, "pair_id": "cut", "rejected": "yes", "rejected_finish": "length"}]
    kept, dropped = load(tmp_path, tokenizer, rows, max_length=length)
    assert [pair.pair_id for pair in kept] == ["p", "cut"] and dropped == {"too long": 1, "identical": 1}
    assert load(tmp_path, tokenizer, rows[:1] + rows[3:], max_length=length)[1] == {}
    kept, dropped = load(tmp_path, tokenizer, rows[:2], max_length=length + 40)  # 50 > 4 + 40
    assert [pair.pair_id for pair in kept] == ["p"] and dropped == {"too long": 1}


@pytest.mark.parametrize("change, word", [
    ({"chosen": ""}, "empty"), ({"rejected": [{"role": "assistant", "content": " \n"}]}, "empty"),
    ({"pair_id": "p"}, "twice"),
    ({"chosen": messages("Hi", "yes"), "rejected": messages("Ho", "no")}, "different prompts"),
    ({"chosen": messages("Hi")}, "assistant"),
    ({"prompt": messages("Hi", "yes")}, "user turn"), ({"prompt": []}, "prompt"), ({"chosen": None}, "chosen"),
    ({"rejected": []}, "rejected")])
def test_bad_rows_are_refused_with_file_and_line(change, word, tmp_path, tokenizer, capsys):
    rows = [BUILT, {**BUILT, "pair_id": "second", **change}]
    said = refusal(capsys, load, tmp_path, tokenizer, rows)
    assert f"{tmp_path}/pairs.jsonl:2: " in said and word in said and len(said.splitlines()) == 1


def test_files_without_pairs_are_refused(tmp_path, tokenizer, capsys):
    assert "no such file" in refusal(capsys, load_pairs, str(tmp_path / "none.jsonl"), tokenizer, 2048)
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty file" in refusal(capsys, load_pairs, str(tmp_path / "empty.jsonl"), tokenizer, 2048)
    (tmp_path / "torn.jsonl").write_text(json.dumps(BUILT) + '\n{"chosen": ')
    assert "torn.jsonl:2: expected a JSON object" in refusal(capsys, load_pairs, str(tmp_path / "torn.jsonl"),
                                                             tokenizer, 2048)
    assert "too long" in refusal(capsys, load, tmp_path, tokenizer, [BUILT], 5)


def test_a_tokenizer_without_a_chat_template_is_refused(policy, pairs_file, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(policy, bare)
    (bare / "chat_template.jinja").unlink()
    args = train_dpo.parse_args(["--model", str(bare), "--pairs", pairs_file, "--out", str(tmp_path / "out")])
    assert "chat template" in refusal(capsys, train_dpo.main, args)
    assert not (tmp_path / "out").exists()
    args.model = str(tmp_path / "nowhere")
    assert "nowhere" in refusal(capsys, train_dpo.main, args)


# ---------------------------------------------------------------------------------------------------------------------
# the finished model

def test_the_export_is_a_model_folder_like_the_source(whole_run, policy):
    start, trained = load_file(Path(policy, "model.safetensors")), load_file(whole_run.out / "model.safetensors")
    assert trained.keys() == start.keys()  # so no second copy of the tied head
    assert all(trained[name].dtype == start[name].dtype and trained[name].shape == start[name].shape for name in start)
    generation = [json.loads(Path(folder, "generation_config.json").read_text()) for folder in (policy, whole_run.out)]
    assert generation[0] == generation[1] and generation[1]["temperature"] == 0.1
    config = [json.loads(Path(folder, "config.json").read_text()) for folder in (policy, whole_run.out)]
    assert config[0] == config[1]  # nothing of how it was trained, such as the attention's name
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (policy, whole_run.out)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    talk = messages("Hé, you?")
    assert tokenizers[0].apply_chat_template(talk) == tokenizers[1].apply_chat_template(talk)
    assert train_dpo.fingerprint(tokenizers[0]) == train_dpo.fingerprint(tokenizers[1])


def test_an_untied_head_is_exported_and_trained(untied, pairs_file, tmp_path):
    train("--model", untied, "--pairs", pairs_file, "--out", tmp_path, "--lr", LR)
    start, trained = load_file(Path(untied, "model.safetensors")), load_file(tmp_path / "model.safetensors")
    assert trained.keys() == start.keys() and "lm_head.weight" in trained
    assert not [name for name in start if torch.equal(start[name], trained[name])]


def test_a_bfloat16_model_is_trained_in_float32_and_stored_in_bfloat16(policy, pairs_file, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(policy, half)
    AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).save_pretrained(half)
    # a step of 1e-5 is lost in a bfloat16 weight of 0.3, whose neighbours are 2e-3 away; in float32 the loss shows it
    train("--model", half, "--pairs", pairs_file, "--out", tmp_path / "out", "--lr", 1e-5, "--epochs", 2,
          "--batch-size", 9)
    trained = load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype for value in trained.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    first, second = read_rows(tmp_path / "out/metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and second["loss"] < first["loss"] - 1e-4


def test_a_shared_folder_of_several_weight_files_is_read_whole(policy, pairs_file, tmp_path, mesh):
    parts = tmp_path / "parts"
    shutil.copytree(policy, parts)
    (parts / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(policy).save_pretrained(parts, max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    one, many = (whole_weights(train_dpo.load_policy(str(folder), None, options(), mesh)) for folder in (policy, parts))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_a_finished_run_is_neither_begun_again_nor_changed(whole_run, tmp_path, capsys):
    out = tmp_path / "out"
    first, _ = train(*whole_run.flags, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def again(*flags):
        train_dpo.main(train_dpo.parse_args([*map(str, whole_run.flags), "--out", str(out), *flags]))

    assert "--resume" in refusal(capsys, again)
    assert "lr was 0.001 and is 0.002" in refusal(capsys, again, "--resume", "--lr", "0.002")
    assert "seed" in refusal(capsys, again, "--resume", "--seed", "1")
    summary, _ = train(*whole_run.flags, "--out", out, "--resume")
    assert summary == first
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    summary, _ = train(*whole_run.flags, "--out", out, "--overwrite", "--lr", LR / 2)
    rows = read_rows(out / "metrics.jsonl")
    assert summary["steps"] == len(rows) == 6 and rows[0]["lr"] == LR / 2
    assert rows[1]["loss"] != whole_run.rows[1]["loss"]


def test_a_finished_run_that_was_moved_is_still_finished(whole_run, tmp_path, capsys):
    out = tmp_path / "moved"
    shutil.copytree(whole_run.out, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    args = train_dpo.parse_args([*map(str, whole_run.flags), "--out", str(out)])
    assert "--resume goes on" in refusal(capsys, train_dpo.main, args)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert train(*whole_run.flags, "--out", out, "--resume")[0]["steps"] == 6
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
