"""train_dpo.py's losses that sample: exact draws, gradients on a policy that can be enumerated, runs against logits.

Run: python -m pytest tests/test_train_online.py -q     (two processes: tests/test_train_distributed.py)
"""

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
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
from conftest import make_policy, read_rows, run_script
from test_train import LR, make_pairs, train, without_noise
from test_train_distributed import ONE, lines, same_run, start_and_kill
from train_dpo import dpo_loss, group_logps, hypo_kl, load_pairs, stable_hash

EOT = 257  # of conftest's tokenizer
LONGEST = 6


# ---------------------------------------------------------------------------------------------------------------------
# helpers

def make_ending(folder, seed):
    """A random model whose responses end after some tokens: a state's first entry is large, and eot looks at it."""
    make_policy(folder, seed=seed, tie=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 8.0
    weights["lm_head.weight"][:, 0], weights["lm_head.weight"][EOT, 0] = 0.0, 12.0
    for name in (name for name in weights if name.endswith(("o_proj.weight", "down_proj.weight"))):
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
    dist.destroy_process_group()


def load(folder, *flags):
    """As main loads it: a sharded model that can be trained."""
    flags = ["--model", str(folder), "--pairs", "p", "--out", "o", *flags]
    return train_dpo.load_policy(str(folder), train_dpo.parse_args(flags))


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def drawn_by_hand(model, prompt, seed, longest, eot=EOT):
    """One response, from the whole logits of the whole sequence, one token at a time."""
    noise, response = torch.Generator().manual_seed(seed % 2 ** 63), []
    while len(response) < longest and response[-1:] != [eot]:
        logits = model(torch.tensor([prompt + response])).logits[0, -1].float()
        response.append(int((logits - torch.empty(len(logits)).exponential_(generator=noise).log()).argmax()))
    return response


def logp(model, prompt, response):
    """log pi(response | prompt), one sequence alone, with its gradient."""
    logps = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return logps[range(len(prompt) - 1, len(prompt) + len(response) - 1), response].sum()


PROMPTS = [[256, 3, 4], [9], [256, *range(60, 90), 11], [7, 7, 7, 8], [100, 33], [*range(40, 52)], [256, 1], [1, 256]]
SEEDS = [stable_hash("seed", i) for i in range(len(PROMPTS))]


# ---------------------------------------------------------------------------------------------------------------------
# samples

def chi_square(seen, expected):
    """Of counts against expected ones, one cell for all that is expected less than five times; and the cells - 1."""
    cells = [(seen[key], count) for key, count in expected.items() if count >= 5]
    rare = sum(seen.values()) - sum(cell[0] for cell in cells), sum(expected.values()) - sum(cell[1] for cell in cells)
    return sum((count - mean) ** 2 / mean for count, mean in [*cells, rare]), len(cells)


def test_samples_have_exactly_the_probabilities_of_the_model(ending, one_process):
    policy, model, times = load(ending), plain(ending), 6000
    for prompt in ([256, 5, 6], [80]):
        drawn = policy.sample([prompt] * times, [stable_hash(prompt, i) for i in range(times)], 2, EOT)
        with torch.no_grad():
            first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
            second = model(torch.tensor([prompt + [a] for a in range(259)])).logits[:, -1].double().softmax(-1)
        expected = {(EOT,): times * first[EOT].item()} | {
            (a, b): times * (first[a] * second[a, b]).item() for a in range(259) if a != EOT for b in range(259)}
        assert sum(expected.values()) == pytest.approx(times) and 0.05 < first[EOT] < 0.6
        statistic, freedom = chi_square(Counter(map(tuple, drawn)), expected)
        assert freedom > 50 and abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)
        seen = Counter(response[0] for response in drawn)
        statistic, freedom = chi_square(seen, dict(enumerate((times * first).tolist())))
        assert freedom > 20 and abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_sample_is_the_same_in_any_batch(ending, one_process):
    policy, model = load(ending), plain(ending)
    together = policy.sample(PROMPTS, SEEDS, LONGEST, EOT)
    assert together == [drawn_by_hand(model, prompt, seed, LONGEST) for prompt, seed in zip(PROMPTS, SEEDS)]
    assert together[::-1] == policy.sample(PROMPTS[::-1], SEEDS[::-1], LONGEST, EOT)
    assert together == [policy.sample([prompt], [seed], LONGEST, EOT)[0] for prompt, seed in zip(PROMPTS, SEEDS)]
    # cut, not changed
    assert together == [response[:LONGEST] for response in policy.sample(PROMPTS, SEEDS, 3 * LONGEST, EOT)]
    assert all(0 < len(response) <= LONGEST and EOT not in response[:-1] for response in together)
    ended = [response[-1] == EOT for response in together]
    assert any(ended) and not all(ended)
    assert all(end or len(response) == LONGEST for end, response in zip(ended, together))
    assert policy.sample(PROMPTS, [seed + 1 for seed in SEEDS], LONGEST, EOT) != together
    # Pythia's end of turn is token 0
    zero = policy.sample(PROMPTS, SEEDS, LONGEST, 0)
    assert zero == [drawn_by_hand(model, prompt, seed, LONGEST, 0) for prompt, seed in zip(PROMPTS, SEEDS)] != together


def test_none_of_the_models_own_generation_settings_acts(ending, one_process, tmp_path):
    folder = shutil.copytree(ending, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.01, "repetition_penalty": 9.0, "top_k": 2, "top_p": 0.1,
                "min_length": 50, "min_new_tokens": 50, "max_length": 3, "eos_token_id": [5], "suppress_tokens": [EOT],
                "no_repeat_ngram_size": 1, "forced_eos_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    expected = load(ending).sample(PROMPTS, SEEDS, LONGEST, EOT)
    policy = load(folder)
    before = policy.model.generation_config.to_dict()
    assert policy.sample(PROMPTS, SEEDS, LONGEST, EOT) == expected
    assert policy.model.generation_config.to_dict() == before and before["top_k"] == 2


@pytest.mark.parametrize("flags", [(), ("--activation-checkpointing",)])
def test_sampling_leaves_the_model_as_it_was(ending, one_process, flags):
    groups = [(PROMPTS[0], [[5, 6, EOT], [7]]), (PROMPTS[2], [[8] * 9, [9, EOT]])]

    def gradients():
        group_logps(policy, groups)[0].sum().backward()
        found = [parameter.grad.full_tensor().clone() for parameter in policy.parameters()]
        policy.zero_grad()
        return found

    policy = load(ending, *flags)
    parameters = list(policy.parameters())  # what an optimizer holds
    before = gradients()
    drawn = policy.sample(PROMPTS, SEEDS, LONGEST, EOT)
    assert drawn == [drawn_by_hand(plain(ending), prompt, seed, LONGEST) for prompt, seed in zip(PROMPTS, SEEDS)]
    assert all(isinstance(parameter, DTensor) for parameter in policy.model.model.layers.parameters())
    assert policy.model.config._attn_implementation == "groups" and all(module.training for module in policy.modules())
    assert policy.model.is_gradient_checkpointing == bool(flags)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    # behind backward, as in a step, the optimizer's weights are the model's, and the next samples come from them
    assert all(isinstance(a, DTensor) and a is b for a, b in zip(policy.parameters(), parameters, strict=True))
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.1)
    assert policy.sample(PROMPTS, SEEDS, LONGEST, EOT) != drawn


# ---------------------------------------------------------------------------------------------------------------------
# gradients, on three tokens and two places: nine responses

class Toy:
    """A table of logits for the first token and one for the second token behind each first."""

    def __init__(self, seed, spread=1.0):
        torch.manual_seed(seed)
        self.tables = [(torch.randn(3, dtype=torch.float64) * spread).requires_grad_(),
                       (torch.randn(3, 3, dtype=torch.float64) * spread).requires_grad_()]

    def logps(self):
        """(9,) of all responses."""
        return (self.tables[0].log_softmax(-1)[:, None] + self.tables[1].log_softmax(-1)).flatten()

    def grad(self, value):
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, self.tables)])


def expected_gradient(policy, k, losses):
    """Of losses (B,) of the log-probabilities (B, k) of all B tuples of k samples, by the tuples' probabilities."""
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


def test_hypo_kl_of_two_samples_by_hand():
    logps = torch.tensor([[-20.0, -30.0]], dtype=torch.float64, requires_grad=True)
    value = hypo_kl(logps, torch.tensor([[-22.0, -29.0]], dtype=torch.float64))
    assert value.item() == 15.0 and torch.autograd.grad(value.sum(), logps)[0].tolist() == [[1.5, -1.5]]


def test_the_raw_ratio_that_s1_prints_has_another_gradient():
    policy, reference = Toy(0), Toy(1).logps().detach()
    raw = expected_gradient(policy, 1, lambda logps, of: (logps * (logps - reference[of]).exp().detach())[:, 0])
    chi_squared = ((policy.logps() - reference).exp() * policy.logps().exp()).sum() / 2
    exact = policy.grad(kl(policy, reference))
    assert (raw - policy.grad(chi_squared)).abs().max() < 1e-12
    for sign in (1, -1):
        assert (sign * raw - exact).norm() > 0.2 * exact.norm()


def test_the_loss_of_hypo_is_dpo_plus_lambda_times_kl():
    args = train_dpo.parse_args("--model m --pairs p --out o --loss hypo --beta 0.3 --hypo-lambda 0.7".split())
    policy, reference, side = Toy(0), Toy(1).logps().detach(), torch.tensor([4, 2])  # chosen, rejected

    def losses(logps, tuples):
        rows = torch.cat([side.expand(len(tuples), 2), tuples], 1)
        all_logps = torch.cat([policy.logps()[rows[:, :2]], logps], 1)
        counts, no_rewards = torch.full(rows.shape, 2.0), torch.zeros(len(rows))
        return train_dpo.pair_losses(args, all_logps, reference[rows], counts, no_rewards)

    h = (policy.logps() - reference)[side]
    exact = policy.grad(dpo_loss(h[0] - h[1], 0.3) + 0.7 * kl(policy, reference))
    assert (expected_gradient(policy, 2, losses) - exact).abs().max() < 1e-12


def online_gradient(policy, reference, chosen, beta):
    """Expected gradient of DPO with a fixed chosen response and a rejected one from the policy."""
    return expected_gradient(policy, 1, lambda logps, tuples: dpo_loss(
        policy.logps()[chosen] - reference[chosen] - logps[:, 0] + reference[tuples[:, 0]], beta))


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
    assert 1e-6 < off[-1] and [a / b for a, b in itertools.pairwise(off)] == pytest.approx([4.0] * 3, rel=0.03)
    assert [a / b for a, b in itertools.pairwise(rest)] == pytest.approx([16.0] * 3, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# whole runs

FLAGS = {"hypo": ("--loss", "hypo", "--hypo-lambda", 0.05, "--online-max-new", LONGEST),
         "hypo of 3": ("--loss", "hypo", "--hypo-lambda", 0.05, "--online-max-new", LONGEST, "--online-k", 3),
         "online-dpo": ("--loss", "online-dpo", "--online-max-new", LONGEST)}


@pytest.fixture(scope="module")
def run(ending, other, pairs_file, tmp_path_factory):
    """run(kind, epochs): a run with another reference whose steps are over all six pairs, an epoch each; made once."""
    runs = {}

    def get(kind, epochs):
        if (kind, epochs) not in runs:
            out = tmp_path_factory.mktemp("run") / "out"
            train("--model", ending, "--reference", other, "--pairs", pairs_file, "--batch-size", 6, "--epochs", epochs,
                  "--lr", LR, "--out", out, *FLAGS.get(kind, ()))
            runs[kind, epochs] = SimpleNamespace(out=out, rows=read_rows(out / "metrics.jsonl"))
        return runs[kind, epochs]

    return get


def by_hand(kind, policy, reference, pairs, step):
    """A step's numbers from full logits, and the norm of its gradient; the samples are drawn by hand too."""
    k = {"hypo": 2, "hypo of 3": 3, "online-dpo": 1}[kind]
    rows, losses = [], []
    for pair in pairs:
        seeds = [stable_hash(0, "sample", step, pair.pair_id, i) for i in range(k)]
        samples = [drawn_by_hand(policy, pair.prompt, seed, LONGEST) for seed in seeds]
        sides = [pair.responses[0], samples[0] if kind == "online-dpo" else pair.responses[1]]
        h = [logp(policy, pair.prompt, side) - logp(reference, pair.prompt, side).detach() for side in sides]
        losses.append(dpo_loss(h[0] - h[1], 0.1))
        row = {"margin": 0.1 * (h[0] - h[1]).item(), "chosen_reward": 0.1 * h[0].item(),
               "rejected_reward": 0.1 * h[1].item(), "rejected_logp": logp(policy, pair.prompt, sides[1]).item(),
               "sample_tokens": sum(map(len, samples)) / k,
               "sample_truncated": sum(EOT not in sample for sample in samples) / k}
        if kind != "online-dpo":
            d = [(logp(policy, pair.prompt, some) - logp(reference, pair.prompt, some)).item() for some in samples]
            advantages = [own - (sum(d) - own) / (k - 1) for own in d]
            logps = [logp(policy, pair.prompt, some) for some in samples]
            losses[-1] = losses[-1] + 0.05 / k * sum(a * of for a, of in zip(advantages, logps))
            row |= {"kl_est": sum(d) / k, "advantage_rms": math.sqrt(sum(a * a for a in advantages) / k)}
        rows.append(row)
    loss = sum(losses) / len(pairs)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    mean = {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}
    squares = sum(grad.double().square().sum().item() for grad in gradients)
    return mean | {"loss": loss.item(), "grad_norm": math.sqrt(squares)}


@pytest.mark.parametrize("kind", FLAGS)
def test_both_steps_of_a_run_are_those_by_hand(kind, run, ending, other, pairs_file):
    # the second step samples from the trained policy, and its reference is the one that was never trained
    pairs, _ = load_pairs(pairs_file, AutoTokenizer.from_pretrained(ending), "dpo", 2048)
    for step, folder in ((0, ending), (1, run(kind, 1).out)):
        expected, row = by_hand(kind, plain(folder), plain(other), pairs, step), run(kind, 2).rows[step]
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (step, name)
        assert 1 < row["sample_tokens"] < LONGEST and ("kl_est" in row) == (kind != "online-dpo") and row["pairs"] == 6
    assert run(kind, 1).rows[0]["loss"] == run(kind, 2).rows[0]["loss"]
    assert 0 < sum(row["sample_truncated"] for row in run(kind, 2).rows) < 2  # some samples ended, some were cut


def test_the_first_step_of_hypo_has_the_dpo_part_of_plain_dpo(run):
    plain_row, row = run("dpo", 1).rows[0], run("hypo", 1).rows[0]
    for name in ("margin", "accuracy", "chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward", "kl_proxy"):
        assert row[name] == pytest.approx(plain_row[name], rel=1e-6, abs=1e-5), name
    assert abs(plain_row["margin"]) > 0.01 and abs(row["loss"] - plain_row["loss"]) > 0.01  # the divergence


def test_at_the_reference_the_first_step_is_that_of_dpo(ending, pairs_file, tmp_path):
    flags = ("--model", ending, "--pairs", pairs_file, "--batch-size", 6, "--epochs", 1, "--lr", LR)
    train(*flags, "--out", tmp_path / "dpo")
    for kind in FLAGS:
        train(*flags, "--out", tmp_path / kind, *FLAGS[kind])
    rows = {kind: read_rows(tmp_path / kind / "metrics.jsonl")[0] for kind in ("dpo", *FLAGS)}
    assert all(row["loss"] == pytest.approx(math.log(2), abs=1e-5) for row in rows.values())
    for kind in ("hypo", "hypo of 3"):
        assert abs(rows[kind]["kl_est"]) < 1e-5 and rows[kind]["advantage_rms"] < 1e-4
        assert rows[kind]["grad_norm"] == pytest.approx(rows["dpo"]["grad_norm"], rel=1e-4)
    assert abs(rows["online-dpo"]["kl_proxy"]) < 1e-5
    assert rows["online-dpo"]["chosen_logp"] == pytest.approx(rows["dpo"]["chosen_logp"], rel=1e-6)


@pytest.mark.parametrize("kind", ["hypo", "online-dpo"])
def test_how_a_step_is_cut_changes_no_sample_and_no_loss(kind, run, ending, other, pairs_file, tmp_path):
    for cut in (1, 200):
        train("--model", ending, "--reference", other, "--pairs", pairs_file, "--batch-size", 6, "--epochs", 2,
              "--lr", LR, "--out", tmp_path / str(cut) / "out", *FLAGS[kind], "--micro-tokens", cut,
              "--activation-checkpointing")
        same_run(read_rows(tmp_path / str(cut) / "out" / "metrics.jsonl"), run(kind, 2).rows)


def test_a_large_hypo_lambda_keeps_the_policy_near_the_reference(ending, pairs_file, tmp_path):
    flags = ("--model", ending, "--pairs", pairs_file, "--batch-size", 6, "--epochs", 12, "--lr", LR, "--loss", "hypo",
             "--online-max-new", LONGEST, "--online-k", 8)
    for weight in (1e-6, 100):
        train(*flags, "--hypo-lambda", weight, "--out", tmp_path / str(weight))
    files = (tmp_path / str(weight) / "metrics.jsonl" for weight in (1e-6, 100))
    loose, tight = ([row["kl_est"] for row in read_rows(file)] for file in files)
    assert loose[0] == tight[0] == pytest.approx(0, abs=1e-5)
    assert sum(tight[-4:]) < 0.5 * sum(loose[-4:]) and sum(loose[-4:]) > 0.2, (loose, tight)


def test_the_reference_is_not_trained_by_a_step(ending, pairs_file, one_process):
    args = train_dpo.parse_args(["--model", ending, "--pairs", pairs_file, "--out", "o", *map(str, FLAGS["hypo"])])
    live, policy = load(ending).requires_grad_(False), load(ending)
    pairs, _ = load_pairs(pairs_file, AutoTokenizer.from_pretrained(ending), "hypo", 2048)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.1)  # away from the reference, so that every part of the loss has a gradient
    pairs = [pair._replace(ref_logps=[-90.0, -80.0]) for pair in pairs]
    train_dpo.pass_over(policy, live, pairs, args, EOT, 0)
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert all(parameter.grad is None for parameter in live.parameters())
    for name, value in load_file(Path(ending, "model.safetensors")).items():
        held = dict(live.model.named_parameters())[name]
        assert torch.equal(held.full_tensor() if isinstance(held, DTensor) else held, value), name


def test_a_killed_hypo_run_resumed_is_the_same_run(ending, pairs_file, tmp_path):
    flags = ["--model", ending, "--pairs", pairs_file, "--eval-pairs", pairs_file, "--batch-size", 3, "--epochs", 8,
             "--lr", LR, "--save-every", 4, "--micro-tokens", 1, *FLAGS["hypo"], "--online-k", 3]
    run_script("train_dpo.py", *flags, "--out", tmp_path / "a" / "out")
    out = tmp_path / "b" / "out"
    start_and_kill(ONE, flags, out, lambda: lines(out / "metrics.jsonl") >= 6)
    summary, _ = run_script("train_dpo.py", *flags, "--out", out, "--resume")
    assert summary["steps"] == 16 and summary["resumed_steps"] >= 4
    straight, resumed = (read_rows(tmp_path / name / "out" / "metrics.jsonl") for name in "ab")
    assert without_noise(resumed) == without_noise(straight)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "a" / "out" / "model.safetensors").read_bytes()
    assert [row["step"] for row in straight if "eval" in row] == [3, 7, 11, 15]
    held_out = straight[15]["eval"]  # the dpo part, without samples
    assert "kl_est" not in held_out and held_out["pairs"] == 6
    assert held_out["margin"] > 0 and held_out["loss"] < math.log(2)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
