"""
recipes/train_online.py: HyPO and online DPO, which sample from the policy in every step.

Covers  samples: their probabilities, alike in any batch, none of the model's own settings, the model left as
        it was; HyPO's divergence by hand and on a policy whose nine responses can be enumerated; S3 Theorem
        4.5; a step's gradient against a plain float64 model; whole runs by hand; lambda; counts of tokens;
        --eval-pairs; two processes against one; kill -9 and the same command; room in the context; flags.
Run     python -m pytest tests/test_train_online.py
"""

import contextlib
import gc
import io
import itertools
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import make_policy, read_rows, run_script
from processes import kill_when, start_one, two_processes
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from train_oracle import GIVEN, LR, end_processes, float64, make_pairs, read_pairs, without_noise
from train_oracle import parse as parse_plain
from transformers import AutoConfig, AutoModelForCausalLM

import train_dpo
from common import stable_hash
from recipes import train_online
from recipes.train_online import hypo_kl, rloo_advantages, sample

EOT = 257  # of conftest's tokenizer
LONGEST = 6
SCRIPT = "recipes/train_online.py"


# ----- helpers
def dpo_loss(chosen, rejected, beta):
    """Of log-ratios."""
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


def make_ending(folder, seed):
    """A random model whose responses end after some tokens: the first entry of a state is large, and the
    end-of-turn token alone looks at it."""
    make_policy(folder, seed=seed, tie=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 8.0
    weights["lm_head.weight"][:, 0] = 0.0
    weights["lm_head.weight"][EOT, 0] = 12.0
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name][0] = 0.0  # the layers leave that entry alone
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    return make_ending(tmp_path_factory.mktemp("ending"), 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A reference that is not the model to train."""
    return make_ending(tmp_path_factory.mktemp("other"), 7)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", n=6)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


def parse(*flags):
    """Arguments as main has them on a CPU."""
    args = train_online.parse_args([str(flag) for flag in flags])
    args.dtype, args.micro_tokens = "float32", args.micro_tokens or 1024
    return args


def train(*flags):
    """A run in this process, of train_dpo.py if there is no --method; what it printed last."""
    printed, said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            if "--method" in flags:
                args = parse(*flags)
                train_dpo.main(args, train_online.Online(args))
            else:
                train_dpo.main(train_dpo.parse_args([str(flag) for flag in flags]))
    except SystemExit as stop:
        pytest.fail(f"exit status {stop.code}: {said.getvalue()[-2000:]}")
    finally:
        end_processes()
    return json.loads(printed.getvalue().splitlines()[-1])


def load(folder, *flags):
    """As main loads it: a sharded model that can be trained."""
    return train_dpo.load_policy(str(folder), None, parse_plain(*GIVEN, *flags))


def load_pairs(folder, path):
    return read_pairs(parse("--model", folder, "--pairs", path, "--out", "o", "--method", "hypo"))


def float32(folder):
    options = {"attn_implementation": "sdpa", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def prompt_of(pair):
    chosen = pair.sequences[0]
    return list(chosen.ids[: chosen.start])


def responses_of(pair):
    return [list(sequence.ids[sequence.start :]) for sequence in pair.sequences]


@torch.no_grad()
def drawn_by_hand(model, prompt, seed, longest=LONGEST, end_id=EOT):
    """One response, from the whole logits of the whole sequence, one token at a time."""
    noise = torch.Generator().manual_seed(seed % 2**63)
    response = []
    while len(response) < longest and response[-1:] != [end_id]:
        logits = model(torch.tensor([prompt + response])).logits[0, -1].float()
        exponential = torch.empty(len(logits)).exponential_(generator=noise)
        response.append(int((logits - exponential.log()).argmax()))
    return response


def all_drawn_by_hand(model, **options):
    return [drawn_by_hand(model, *each, **options) for each in zip(PROMPTS, SEEDS, strict=True)]


def logp(model, prompt, response):
    """log pi(response | prompt), one sequence alone, with its gradient."""
    logps = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logps[places, response].sum()


PROMPTS = [[256, 3, 4], [9], [256, *range(60, 90), 11], [7, 7, 7, 8], [100, 33], [*range(40, 52)]]
PROMPTS += [[256, 1], [1, 256]]
SEEDS = [stable_hash("seed", i) for i in range(len(PROMPTS))]


# ----- samples
def chi_square(seen, expected):
    """(statistic, degrees of freedom); all that is expected less than five times is one cell."""
    cells = [(seen[key], count) for key, count in expected.items() if count >= 5]
    rare_seen = sum(seen.values()) - sum(cell[0] for cell in cells)
    rare_expected = sum(expected.values()) - sum(cell[1] for cell in cells)
    statistic = sum((count - mean) ** 2 / mean for count, mean in [*cells, (rare_seen, rare_expected)])
    return statistic, len(cells)


def test_samples_have_exactly_the_probabilities_of_the_model(ending, one_process):
    policy, model, times = load(ending), float32(ending), 6000
    for prompt in ([256, 5, 6], [80]):
        seeds = [stable_hash(prompt, i) for i in range(times)]
        drawn = sample(policy, [prompt] * times, seeds, 2, EOT)
        with torch.no_grad():
            first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
            longer = torch.tensor([prompt + [a] for a in range(259)])
            second = model(longer).logits[:, -1].double().softmax(-1)
        assert 0.05 < first[EOT] < 0.6
        expected = {(EOT,): times * first[EOT].item()}
        for a, b in itertools.product(range(259), range(259)):
            if a != EOT:
                expected[a, b] = times * (first[a] * second[a, b]).item()
        assert sum(expected.values()) == pytest.approx(times)
        statistic, freedom = chi_square(Counter(map(tuple, drawn)), expected)
        assert freedom > 50 and abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)
        seen = Counter(response[0] for response in drawn)
        statistic, freedom = chi_square(seen, dict(enumerate((times * first).tolist())))
        assert freedom > 20 and abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_sample_is_the_same_in_any_batch(ending, one_process):
    policy, model = load(ending), float32(ending)
    together = sample(policy, PROMPTS, SEEDS, LONGEST, EOT)
    assert together == all_drawn_by_hand(model)
    assert together[::-1] == sample(policy, PROMPTS[::-1], SEEDS[::-1], LONGEST, EOT)
    alone = [sample(policy, [prompt], [seed], LONGEST, EOT)[0] for prompt, seed in zip(PROMPTS, SEEDS)]
    assert together == alone
    longer = sample(policy, PROMPTS, SEEDS, 3 * LONGEST, EOT)
    assert together == [response[:LONGEST] for response in longer]  # cut, not changed
    assert all(0 < len(response) <= LONGEST and EOT not in response[:-1] for response in together)
    ended = [response[-1] == EOT for response in together]
    assert any(ended) and not all(ended)
    assert all(end or len(response) == LONGEST for end, response in zip(ended, together))
    assert sample(policy, PROMPTS, [seed + 1 for seed in SEEDS], LONGEST, EOT) != together
    # Pythia's end of turn is token 0
    zero = sample(policy, PROMPTS, SEEDS, LONGEST, 0)
    assert zero == all_drawn_by_hand(model, end_id=0) and zero != together
    assert sample(policy, [], [], LONGEST, EOT) == []  # a process that has no pair left


def test_none_of_the_models_own_generation_settings_acts(ending, one_process, tmp_path):
    folder = shutil.copytree(ending, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.01, "repetition_penalty": 9.0, "top_k": 2, "top_p": 0.1}
    settings |= {"min_length": 50, "min_new_tokens": 50, "max_length": 3, "eos_token_id": [5]}
    settings |= {"suppress_tokens": [EOT], "no_repeat_ngram_size": 1, "forced_eos_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    expected = sample(load(ending), PROMPTS, SEEDS, LONGEST, EOT)
    policy = load(folder)
    before = policy.model.generation_config.to_dict()
    assert sample(policy, PROMPTS, SEEDS, LONGEST, EOT) == expected
    assert policy.model.generation_config.to_dict() == before and before["top_k"] == 2


@pytest.mark.parametrize("flags", [(), ("--activation-checkpointing",)], ids=["plain", "checkpointing"])
def test_sampling_leaves_the_model_as_it_was(ending, one_process, flags):
    sequences = []
    for prompt, response in ((PROMPTS[0], [5, 6, EOT]), (PROMPTS[0], [7]), (PROMPTS[2], [8] * 9)):
        sequences.append(train_dpo.Sequence(prompt + response, len(prompt)))

    def gradients():
        train_dpo.sequence_logps(policy, sequences)[0].sum().backward()
        found = [parameter.grad.full_tensor().clone() for parameter in policy.parameters()]
        policy.zero_grad()
        return found

    policy = load(ending, *flags)
    parameters = list(policy.parameters())  # what an optimizer holds
    before = gradients()
    drawn = sample(policy, PROMPTS, SEEDS, LONGEST, EOT)
    assert drawn == all_drawn_by_hand(float32(ending))
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    assert policy.model.config._attn_implementation == "packed"
    assert all(module.training for module in policy.modules())
    assert policy.model.is_gradient_checkpointing == bool(flags)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    # after backward, as in a step, the optimizer's weights are the model's, and the next samples are theirs
    assert all(a is b for a, b in zip(policy.parameters(), parameters, strict=True))
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.1)
    assert sample(policy, PROMPTS, SEEDS, LONGEST, EOT) != drawn


# ----- expected gradients, on three tokens and two places: nine responses
class Toy:
    """A table of logits for the first token and one for the second token after each first."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.first = torch.randn(3, dtype=torch.float64).requires_grad_()
        self.second = torch.randn(3, 3, dtype=torch.float64).requires_grad_()

    def logps(self):
        """(9,) of all responses."""
        return (self.first.log_softmax(-1)[:, None] + self.second.log_softmax(-1)).flatten()

    def grad(self, value):
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, (self.first, self.second))])


def expected_gradient(policy, k, losses):
    """Of losses (B,) of the log-probabilities (B, k) of all B tuples of k samples, by their probabilities."""
    tuples = torch.tensor(list(itertools.product(range(9), repeat=k)))
    logps = policy.logps()[tuples]
    chances = logps.detach().sum(1).exp()
    assert chances.sum().item() == pytest.approx(1.0, abs=1e-12)
    return policy.grad((chances * losses(logps, tuples)).sum())


def kl(policy, reference):
    return (policy.logps().exp() * (policy.logps() - reference)).sum()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_hypo_kl_has_the_gradient_of_the_kl_divergence(k):
    policy, reference = Toy(0), Toy(1).logps().detach()
    exact = policy.grad(kl(policy, reference))
    assert exact.norm() > 0.1
    ours = expected_gradient(policy, k, lambda logps, tuples: hypo_kl(logps, reference[tuples]))
    assert (ours - exact).abs().max() < 1e-12
    same = expected_gradient(policy, k, lambda logps, tuples: hypo_kl(logps, logps.detach()))
    assert same.abs().max() == 0  # at the reference no sample has an advantage


@pytest.mark.parametrize(
    "logps, reference_logps, value, gradient, advantages",
    [
        ([-20.0, -30.0], [-22.0, -29.0], 15.0, [1.5, -1.5], [3.0, -3.0]),  # ratios 2 and -1
        ([-20.0, -30.0], [-20.0, -30.0], 0.0, [0.0, 0.0], [0.0, 0.0]),
        # ratios 2, -1 and 5 against the means 2, 3.5 and 0.5 of the other two: (0 + 4.5 * 30 - 4.5 * 10) / 3
        ([-20.0, -30.0, -10.0], [-22.0, -29.0, -15.0], 30.0, [0.0, -1.5, 1.5], [0.0, -4.5, 4.5]),
        # one sample has no baseline
        ([-20.0], [-22.0], -40.0, [2.0], [2.0]),
        ([-30.0], [-29.0], 30.0, [-1.0], [-1.0]),
    ],
)
def test_the_divergence_counted_by_hand(logps, reference_logps, value, gradient, advantages):
    leaf = torch.tensor([logps], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([reference_logps], dtype=torch.float64)
    assert rloo_advantages(leaf.detach() - reference)[0].tolist() == pytest.approx(advantages)
    (term,) = hypo_kl(leaf, reference)
    assert term.item() == pytest.approx(value)
    assert torch.autograd.grad(term, leaf)[0][0].tolist() == pytest.approx(gradient)


def test_the_raw_ratio_that_s1_prints_has_another_gradient():
    policy, reference = Toy(0), Toy(1).logps().detach()

    def printed(logps, tuples):
        return (logps * (logps - reference[tuples]).exp().detach())[:, 0]

    raw = expected_gradient(policy, 1, printed)
    chi_squared = ((policy.logps() - reference).exp() * policy.logps().exp()).sum() / 2
    assert (raw - policy.grad(chi_squared)).abs().max() < 1e-12
    exact = policy.grad(kl(policy, reference))
    for sign in (1, -1):
        assert (sign * raw - exact).norm() > 0.2 * exact.norm()


def online_gradient(policy, reference, chosen, beta):
    """Expected gradient of DPO with a fixed chosen response and a rejected one from the policy."""

    def losses(logps, tuples):
        chosen_ratio = policy.logps()[chosen] - reference[chosen]
        return dpo_loss(chosen_ratio, logps[:, 0] - reference[tuples[:, 0]], beta)

    return expected_gradient(policy, 1, losses)


@pytest.mark.parametrize("chosen", [0, 5])
def test_online_dpo_at_the_reference_is_half_beta_of_sft(chosen):
    policy = Toy(0)
    sft = policy.grad(-policy.logps()[chosen])
    for beta in (0.1, 2.0):
        ours = online_gradient(policy, policy.logps().detach(), chosen, beta)
        assert (ours - beta / 2 * sft).abs().max() < 1e-12


def test_online_dpo_away_from_the_reference_follows_s3_theorem_4_5():
    policy, reference, chosen = Toy(0), Toy(1).logps().detach(), 5
    sft, drift = policy.grad(-policy.logps()[chosen]), policy.grad(kl(policy, reference))
    # what the theorem leaves out: (beta / 2)^2 E[h] grad log pi(chosen)
    mean_h = (policy.logps()[chosen] - reference[chosen] - kl(policy, reference)).item()
    off, rest = [], []
    for beta in (0.1, 0.05, 0.025, 0.0125):
        residual = online_gradient(policy, reference, chosen, beta) - beta / 2 * (sft + beta / 2 * drift)
        off.append(residual.norm().item())
        rest.append((residual + (beta / 2) ** 2 * mean_h * sft).norm().item())
    assert off[-1] > 1e-6
    assert [a / b for a, b in itertools.pairwise(off)] == pytest.approx([4.0] * 3, rel=0.03)
    assert [a / b for a, b in itertools.pairwise(rest)] == pytest.approx([16.0] * 3, rel=0.05)


# ----- a step
FLAGS = {
    "hypo": ("--method", "hypo", "--hypo-lambda", 0.05, "--max-new", LONGEST),
    "hypo of 3": ("--method", "hypo", "--hypo-lambda", 0.05, "--max-new", LONGEST, "--samples", 3),
    "online-dpo": ("--method", "online-dpo", "--max-new", LONGEST),
}
SAMPLES = {"hypo": 2, "hypo of 3": 3, "online-dpo": 1}


def by_hand(kind, policy, reference, pairs, step, sampler=None):
    """A step's {pair_id: row} and its loss, with its gradient, from full logits.

    The samples are drawn by hand too, by `sampler` where the policy is in float64.
    """
    k = SAMPLES[kind]
    rows, losses = {}, []
    for pair in pairs:
        prompt, (chosen, rejected) = prompt_of(pair), responses_of(pair)
        samples = []
        for i in range(k):
            seed = stable_hash(0, "sample", step, pair.pair_id, i)
            samples.append(drawn_by_hand(sampler or policy, prompt, seed))
        if kind == "online-dpo":
            rejected = samples[0]
        logps = [logp(policy, prompt, side) for side in (chosen, rejected)]
        with torch.no_grad():
            reference_logps = [logp(reference, prompt, side) for side in (chosen, rejected)]
        h = [logps[0] - reference_logps[0], logps[1] - reference_logps[1]]
        loss = dpo_loss(*h, 0.1)
        row = {
            "chosen_reward": 0.1 * h[0].item(),
            "rejected_reward": 0.1 * h[1].item(),
            "margin": 0.1 * (h[0] - h[1]).item(),
            "rejected_logp": logps[1].item(),
            "sample_tokens": sum(map(len, samples)) / k,
            "sample_truncated": sum(EOT not in one for one in samples) / k,
            "tokens": 2 * len(prompt) + len(chosen + rejected),
        }
        if kind != "online-dpo":
            logps = [logp(policy, prompt, one) for one in samples]
            with torch.no_grad():
                d = [(mine - logp(reference, prompt, one)).item() for mine, one in zip(logps, samples)]
            advantages = [own - (sum(d) - own) / (k - 1) for own in d]
            loss = loss + 0.05 / k * sum(a * mine for a, mine in zip(advantages, logps))
            row["kl_est"] = sum(d) / k
            row["advantage_rms"] = math.sqrt(sum(a * a for a in advantages) / k)
            row["tokens"] += sum(len(prompt + one) for one in samples)
        rows[pair.pair_id] = row | {"loss": loss.item()}
        losses.append(loss)
    return rows, sum(losses) / len(pairs)


@pytest.mark.parametrize("cut", [1, 90, 4096])
@pytest.mark.parametrize("kind", FLAGS)
def test_a_steps_gradient_is_that_of_a_plain_model(kind, cut, ending, other, pairs_file, one_process):
    flags = ["--model", ending, "--reference", other, "--pairs", pairs_file, "--out", "o"]
    args = parse(*flags, "--micro-tokens", cut, *FLAGS[kind])
    policy, model, reference = load(ending), float64(ending), float64(other)
    pairs = []
    for pair in load_pairs(ending, pairs_file):
        with torch.no_grad():
            logps = tuple(logp(reference, prompt_of(pair), side).item() for side in responses_of(pair))
        pairs.append(pair._replace(reference_logps=logps))
    expected, loss = by_hand(kind, model, reference, pairs, 7, sampler=float32(ending))
    loss.backward()
    rows = train_online.Online(args)(policy, pairs, args, 7)
    assert sorted(row["pair_id"] for row in rows) == sorted(expected) == [f"p{i}" for i in range(6)]
    for row in rows:
        for name, value in expected[row["pair_id"]].items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-3), (row["pair_id"], name)
    gradients = {name: parameter.grad.full_tensor() for name, parameter in policy.model.named_parameters()}
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max()
        assert largest > 0, name
        assert (gradients[name].double() - parameter.grad).abs().max() < 1e-4 * largest + 1e-7, name


def test_the_reference_is_not_trained_by_a_step(ending, other, pairs_file, one_process):
    args = parse("--model", ending, "--reference", other, *GIVEN[2:], *FLAGS["hypo"])
    policy, online = load(ending), train_online.Online(args)
    pairs = [pair._replace(reference_logps=(-90.0, -80.0)) for pair in load_pairs(ending, pairs_file)]
    for step in range(2):
        online(policy, pairs, args, step)
    assert all(parameter.grad is not None for parameter in policy.parameters())
    stored = load_file(Path(other, "model.safetensors"))
    held = dict(online.reference.model.named_parameters())
    assert held.keys() == stored.keys()
    for name, value in held.items():
        assert value.grad is None and torch.equal(value.full_tensor(), stored[name]), name


# ----- whole runs
@pytest.fixture(scope="module")
def run(ending, other, pairs_file, tmp_path_factory):
    """run(kind, epochs): a run with another reference, an epoch is one step over all six pairs; made once."""
    runs = {}

    def get(kind, epochs):
        if (kind, epochs) not in runs:
            out = tmp_path_factory.mktemp("run") / "out"
            flags = ["--model", ending, "--reference", other, "--pairs", pairs_file, "--out", out]
            flags += ["--batch-size", 6, "--epochs", epochs, "--lr", LR, *FLAGS.get(kind, ())]
            summary = train(*flags)
            rows = read_rows(out / "metrics.jsonl")
            runs[kind, epochs] = SimpleNamespace(out=out, flags=flags, summary=summary, rows=rows)
        return runs[kind, epochs]

    return get


@pytest.mark.parametrize("kind", FLAGS)
def test_both_steps_of_a_run_are_those_by_hand(kind, run, ending, other, pairs_file):
    # the second step samples from the trained policy, and its reference is the one that was never trained
    pairs, reference = load_pairs(ending, pairs_file), float32(other)
    for step, folder in ((0, ending), (1, run(kind, 1).out)):
        policy, row = float32(folder), run(kind, 2).rows[step]
        by_pair, loss = by_hand(kind, policy, reference, pairs, step)
        expected = {}
        for name in by_pair["p0"]:
            values = [each[name] for each in by_pair.values()]
            expected[name] = sum(values) if name == "tokens" else sum(values) / 6
        assert expected["loss"] == pytest.approx(loss.item(), rel=1e-9)
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        expected["grad_norm"] = math.sqrt(sum(part.double().square().sum().item() for part in gradients))
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (step, name)
        assert 1 < row["sample_tokens"] < LONGEST and row["pairs"] == 6
        assert ("kl_est" in row) == ("advantage_rms" in row) == (kind != "online-dpo")
        by_source = row["by_source"]  # two pairs are on-policy, four off-policy
        for name in ("loss", "sample_tokens", "sample_truncated", "kl_est")[
            : 3 if kind == "online-dpo" else 4
        ]:
            together = (2 * by_source["on"][name] + 4 * by_source["off"][name]) / 6
            assert together == pytest.approx(row[name]), name
    assert run(kind, 1).rows[0]["loss"] == run(kind, 2).rows[0]["loss"]
    # some samples ended, some were cut off
    assert 0 < sum(row["sample_truncated"] for row in run(kind, 2).rows) < 2


@pytest.mark.parametrize("kind", FLAGS)
def test_what_a_run_leaves(kind, run, ending):
    out, summary = run(kind, 2).out, run(kind, 2).summary
    assert summary["steps"] == 2 and summary["tokens_trained"] == sum(
        row["tokens"] for row in run(kind, 2).rows
    )
    for name in ("generation_config.json", "config.json"):  # not the settings of sampling
        assert (out / name).read_bytes() == Path(ending, name).read_bytes()
    start, found = load_file(Path(ending, "model.safetensors")), load_file(out / "model.safetensors")
    assert found.keys() == start.keys()
    assert not [name for name in start if torch.equal(start[name], found[name])]
    meta = json.loads((out / "metrics.meta.json").read_text())
    assert meta["args"]["method"] == kind.split()[0] and meta["args"]["samples"] == SAMPLES[kind]
    assert meta["args"]["max_new"] == LONGEST and {"out": str(out), **meta["counts"]} == summary
    # one reference, one file; samples are not in it
    (cache,) = out.parent.glob("reference_cache/*.jsonl")
    assert len(read_rows(cache)) == 12


def test_a_finished_run_is_neither_done_again_nor_changed(run, capsys):
    finished = run("hypo", 2)
    before = {path: path.read_bytes() for path in finished.out.iterdir()}
    assert train(*finished.flags) == finished.summary
    changes = {
        "samples = 2, not 3": ["--samples", 3],
        "max_new = 6, not 7": ["--max-new", 7],
        "hypo_lambda = 0.05, not 0.1": ["--hypo-lambda", 0.1],
    }
    for sentence, flags in changes.items():
        with pytest.raises(pytest.fail.Exception) as stop:
            train(*finished.flags, *flags)
        assert f"exit status 2: {Path(sys.argv[0]).name}: --out" in str(stop.value)
        assert f"was written with {sentence}" in str(stop.value)
    assert {path: path.read_bytes() for path in finished.out.iterdir()} == before


def test_the_first_step_of_hypo_has_the_dpo_part_of_plain_dpo(run):
    plain_row, row = run("dpo", 1).rows[0], run("hypo", 1).rows[0]
    names = [
        "margin",
        "accuracy",
        "chosen_logp",
        "rejected_logp",
        "chosen_reward",
        "rejected_reward",
    ]
    for name in names:
        assert row[name] == pytest.approx(plain_row[name], rel=1e-6, abs=1e-5), name
    assert abs(plain_row["margin"]) > 0.01
    assert abs(row["loss"] - plain_row["loss"]) > 0.01  # the divergence
    assert row["tokens"] > plain_row["tokens"] and row.keys() > plain_row.keys()


def test_at_the_reference_the_first_step_is_that_of_dpo(ending, pairs_file, tmp_path):
    flags = ["--model", ending, "--pairs", pairs_file, "--batch-size", 6, "--epochs", 1, "--lr", LR]
    rows = {}
    for kind in ("dpo", *FLAGS):
        train(*flags, "--out", tmp_path / kind, *FLAGS.get(kind, ()))
        (rows[kind],) = read_rows(tmp_path / kind / "metrics.jsonl")
        assert rows[kind]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for kind in ("hypo", "hypo of 3"):
        assert abs(rows[kind]["kl_est"]) < 1e-5 and rows[kind]["advantage_rms"] < 1e-4
        assert rows[kind]["grad_norm"] == pytest.approx(rows["dpo"]["grad_norm"], rel=1e-4)
    assert rows["online-dpo"]["chosen_logp"] == pytest.approx(rows["dpo"]["chosen_logp"], rel=1e-6)
    assert len(list(tmp_path.glob("reference_cache/*"))) == 1  # train_dpo.py and the recipe share it


def same_run(ours, theirs):
    """The same steps up to rounding, which Adam lets grow slowly."""
    assert len(ours) == len(theirs)
    bounds = {"loss": 1e-4, "margin": 1e-4, "chosen_reward": 1e-4, "rejected_reward": 1e-4}
    bounds |= {"kl_est": 1e-3, "advantage_rms": 1e-3, "chosen_logp": 2e-3, "rejected_logp": 2e-3}
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for name in ("step", "pairs", "tokens", "lr", "sample_tokens", "sample_truncated"):
            assert a[name] == b[name], (b["step"], name)  # the same samples, token for token in number
        for name in bounds.keys() & b.keys():
            assert a[name] == pytest.approx(b[name], abs=bounds[name]), (b["step"], name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), b["step"]


@pytest.mark.parametrize("kind", ["hypo", "online-dpo"])
def test_how_a_step_is_cut_changes_no_sample_and_no_loss(kind, run, tmp_path):
    for cut in (1, 200):
        flags = ["--out", tmp_path / str(cut) / "out", "--micro-tokens", cut, "--activation-checkpointing"]
        train(*run(kind, 2).flags, *flags)
        same_run(read_rows(tmp_path / str(cut) / "out" / "metrics.jsonl"), run(kind, 2).rows)


def test_a_large_lambda_keeps_the_policy_near_the_reference(ending, pairs_file, tmp_path):
    flags = ["--model", ending, "--pairs", pairs_file, "--batch-size", 6, "--epochs", 12, "--lr", LR]
    flags += ["--method", "hypo", "--max-new", LONGEST, "--samples", 8]
    estimates = []
    for weight in (1e-6, 100):
        train(*flags, "--hypo-lambda", weight, "--out", tmp_path / str(weight))
        rows = read_rows(tmp_path / str(weight) / "metrics.jsonl")
        estimates.append([row["kl_est"] for row in rows])
    loose, tight = estimates
    assert loose[0] == tight[0] == pytest.approx(0, abs=1e-5)
    assert sum(tight[-4:]) < 0.5 * sum(loose[-4:]) and sum(loose[-4:]) > 0.2, (loose, tight)


@pytest.mark.parametrize("kind", ["hypo", "online-dpo"])
def test_held_out_pairs_are_measured_by_plain_dpo(kind, run, ending, other, tmp_path):
    held_out = make_pairs(tmp_path / "held_out.jsonl", n=5, seed=1)
    out = tmp_path / "out"
    summary = train(*run(kind, 2).flags, "--out", out, "--eval-pairs", held_out)
    rows = read_rows(out / "metrics.jsonl")
    assert "eval" not in rows[0] and summary["eval_loss"] == rows[1]["eval"]["loss"]
    measured = rows[1].pop("eval")
    same_run(rows, run(kind, 2).rows)
    policy, reference, h = float64(out), float64(other), []
    with torch.no_grad():
        for pair in load_pairs(ending, held_out):
            for side in responses_of(pair):  # the rejected response of the file too
                h.append(logp(policy, prompt_of(pair), side) - logp(reference, prompt_of(pair), side))
    losses = dpo_loss(torch.stack(h[::2]), torch.stack(h[1::2]), 0.1)
    assert measured["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert measured["pairs"] == 5
    assert not {"sample_tokens", "sample_truncated", "kl_est", "advantage_rms"} & measured.keys()


# ----- two processes
def test_two_processes_make_the_run_of_one(ending, other, tmp_path):
    """Steps of 3, 3 and 1 pairs: the last leaves the second process without a pair and without a prompt.

    259 rows of the embedding are an odd number: shards are padded, and none of that may be exported.
    """
    pairs = make_pairs(tmp_path / "pairs.jsonl", n=7)
    flags = ["--model", ending, "--reference", other, "--pairs", pairs, "--batch-size", 3, "--lr", LR]
    flags += ["--epochs", 2, *FLAGS["hypo of 3"]]
    train(*flags, "--out", tmp_path / "one" / "out")
    more = ["--micro-tokens", 120, "--activation-checkpointing"]
    printed = two_processes(SCRIPT, *flags, "--out", tmp_path / "two" / "out", *more)
    assert printed.count('"steps"') == 1  # by one process only
    assert json.loads(printed.splitlines()[-1])["steps"] == 6
    one, two = (read_rows(tmp_path / name / "out" / "metrics.jsonl") for name in ("one", "two"))
    assert [row["pairs"] for row in two] == [3, 3, 1] * 2
    same_run(two, one)
    start = load_file(Path(ending, "model.safetensors"))
    one, two = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("one", "two"))
    assert start.keys() == one.keys() == two.keys()
    for name in start:
        assert one[name].shape == two[name].shape and not torch.equal(start[name], two[name]), name
        # a few weights may differ: Adam makes a whole step even of a gradient that is all rounding
        assert ((one[name] - two[name]).abs() > 0.05 * LR).float().mean() < 2e-3, name


# ----- kill and resume
def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_hypo_run_resumed_is_the_same_run(ending, pairs_file, tmp_path):
    flags = ["--model", ending, "--pairs", pairs_file, "--eval-pairs", pairs_file, "--batch-size", 3]
    flags += ["--epochs", 8, "--lr", LR, "--save-every", 4, "--micro-tokens", 1, *FLAGS["hypo of 3"]]
    (tmp_path / "b").mkdir()
    straight, out = tmp_path / "a" / "out", tmp_path / "b" / "out"
    run_script(SCRIPT, *flags, "--out", straight)
    kill_when(lambda: lines(out / "metrics.jsonl") >= 6, start_one(SCRIPT, *flags, "--out", out))
    assert not (out / "model.safetensors").exists() and list(out.glob("checkpoints/[0-9]*"))
    summary, _ = run_script(SCRIPT, *flags, "--out", out)
    assert summary["steps"] == 16 and summary["resumed_steps"] >= 4
    rows = [without_noise(read_rows(folder / "metrics.jsonl")) for folder in (straight, out)]
    assert rows[0] == rows[1]
    assert (out / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert [row["step"] for row in rows[0] if "eval" in row] == [3, 7, 11, 15]
    held_out = rows[0][15]["eval"]
    assert held_out["pairs"] == 6 and held_out["margin"] > 0 and held_out["loss"] < math.log(2)


# ----- flags
def test_samples_must_have_room_in_the_context(ending, pairs_file, tmp_path, capsys):
    pairs = load_pairs(ending, pairs_file)
    longest = max(pair.sequences[0].start for pair in pairs)
    assert longest > min(pair.sequences[0].start for pair in pairs)
    flags = ["--model", ending, "--pairs", pairs_file, "--out", tmp_path / "out", "--method", "hypo"]
    room = 512 - longest
    args = parse(*flags, "--max-new", room + 1)
    with pytest.raises(SystemExit) as stop:
        train_dpo.main(args, train_online.Online(args), train_online.check_room)
    end_processes()
    said = f"the longest prompt has {longest} tokens, and the context of {ending} is 512\n"
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.endswith(
        f"{pairs_file}: no room for samples of --max-new {room + 1}: {said}"
    )
    train_online.check_room(pairs, AutoConfig.from_pretrained(ending), parse(*flags, "--max-new", room))


def test_settings():
    args = parse(*GIVEN, "--method", "hypo")
    assert (args.samples, args.hypo_lambda, args.max_new) == (2, 1e-4, 256)
    assert (args.loss, args.beta, args.batch_size, args.reference) == ("dpo", 0.1, 256, "m")
    args = parse(*GIVEN, "--method", "online-dpo", "--preset", "s3", "--max-new", 1024)
    assert (args.samples, args.max_new, args.beta, args.batch_size, args.epochs) == (1, 1024, 0.1, 32, 2)
    assert parse(*GIVEN, "--method", "hypo", "--reference", "r").reference == "r"


HYPO = ["--method", "hypo"]
ONLINE = ["--method", "online-dpo"]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "the following arguments are required: --method"),
        (["--method", "ppo"], "argument --method: invalid choice: 'ppo'"),
        ([*HYPO, "--loss", "hypo"], "argument --loss: invalid choice: 'hypo'"),
        ([*HYPO, "--loss", "hinge"], "--loss is for train_dpo.py"),
        ([*ONLINE, "--loss", "sft"], "--loss is for train_dpo.py"),
        ([*ONLINE, "--samples", "3"], "--samples and --hypo-lambda have no effect with --method online-dpo"),
        ([*ONLINE, "--samples", "1"], "--samples and --hypo-lambda have no effect with --method online-dpo"),
        (
            [*ONLINE, "--hypo-lambda", "1"],
            "--samples and --hypo-lambda have no effect with --method online-dpo",
        ),
        ([*HYPO, "--samples", "0"], "--samples: must be above 0 and below inf, found 0"),
        ([*HYPO, "--samples", "1.5"], "argument --samples: invalid int value: '1.5'"),
        ([*HYPO, "--max-new", "0"], "--max-new: must be above 0 and below inf, found 0"),
        ([*HYPO, "--hypo-lambda", "-1"], "--hypo-lambda: must be above 0 and below inf, found -1"),
        ([*HYPO, "--hypo-lambda", "nan"], "--hypo-lambda: must be above 0 and below inf, found nan"),
        ([*HYPO, "--slic-delta", "2"], "--slic-delta has no effect with --loss dpo"),
        ([*HYPO, "--online-k", "2"], "unrecognized arguments: --online-k 2"),
    ],
)
def test_flags_that_do_not_go_together(capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        parse(*GIVEN, *flags)
    assert end.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--method", "hypo"], "unrecognized arguments: --method hypo"),
        (["--loss", "hypo"], "argument --loss: invalid choice: 'hypo'"),
        (["--loss", "online-dpo"], "argument --loss: invalid choice: 'online-dpo'"),
    ],
)
def test_train_dpo_itself_does_not_sample(capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        train_dpo.parse_args([*GIVEN, *flags])
    assert end.value.code == 2 and sentence in capsys.readouterr().err
