"""
recipes/sample_*.py and on_all_gpus.sh: what they add to generate.py.

Covers  mixed logits by hand and token by token against both models in float64; weights of one model alone;
        padding, batches, padded embeddings, absolute positions, soft-capped attention; the two answers of a
        pair, which must not begin alike; beams against transformers' own; diverse responses against plain
        runs of the conversations typed out; flags; resuming; weights that are not finite; one process per
        GPU.
Run     python -m pytest tests/test_sampling_recipes.py
"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from conftest import CHATML, REPO, make_policy, make_tokenizer, read_rows, run_script, write_rows
from models import make_gemma, tiny
from test_generate import CAPPED, HF, PROMPTS, THINKING, oracle, spoil_weights, with_template

import generate
from common import stable_hash
from loading import load_tokenizer
from recipes import sample_beams, sample_diverse, sample_mixture
from recipes.sample_mixture import mix_logits


@pytest.fixture(autouse=True)
def as_imported(monkeypatch):
    """The recipes add to these; the other tests must not see it."""
    monkeypatch.setattr(generate, "PRESETS", dict(generate.PRESETS))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("reference"), seed=1)


@pytest.fixture(scope="module")
def tokenizer(policy):
    return load_tokenizer(policy)[0]


@pytest.fixture
def sample(tmp_path, capsys):
    """A function that runs generate.py or a recipe: (rows, the last line as JSON)."""

    def run(model, *flags, out="out.jsonl", prompts=PROMPTS, seed=None):
        path = write_rows(tmp_path / f"{out}.prompts.jsonl", prompts)
        flags = ["--model", model, "--prompts", path, "--out", str(tmp_path / out), *HF, *flags]
        if "--reference" in flags:
            args = sample_mixture.parse_args(flags)
            args.seed = args.seed if seed is None else seed  # without the weights, to have equal draws
            models = [(args.reference, None)]
            generate.main(args, sample_mixture.mixture_sampler, other_models=models)
        elif "--beams" in flags:
            generate.main(sample_beams.parse_args(flags), sample_beams.beam_sampler)
        elif DIVERSE in flags:
            args = sample_diverse.parse_args([flag for flag in flags if flag != DIVERSE])
            generate.main(args, sample_diverse.diverse_sampler, sample_diverse.diverse_rows)
        else:
            generate.main(generate.parse_args(flags))
        return read_rows(tmp_path / out), json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


DIVERSE = "recipes/sample_diverse.py"


def mixture(reference, a, b):
    return ["--reference", reference, "--weights", str(a), str(b)]


def all_ids(rows):
    return [[response["token_ids"] for response in row["responses"]] for row in rows]


# ----- DPO-Mix-P's mixture
@pytest.mark.parametrize(
    "weights, mixed, temperature, expected",
    [
        ([1.5, -0.5], (3.0, 1.0, -1.5), 1.0, (0.872262, 0.118048, 0.009690)),
        ([1.5, -0.5], (3.0, 1.0, -1.5), 0.7, (0.944245, 0.054230, 0.001525)),
        ([1.5, -0.5], (3.0, 1.0, -1.5), 3.0, (0.575855, 0.295654, 0.128491)),  # S1 Table 3 goes up to 3
        ([0.5, 0.5], (1.0, 1.0, 1.5), 1.0, (0.274069, 0.274069, 0.451863)),
        ([0.5, 0.5], (1.0, 1.0, 1.5), 0.7, (0.247358, 0.247358, 0.505284)),
    ],
)
def test_mixed_logits_and_their_frequencies_over_a_grid(weights, mixed, temperature, expected):
    # over an even grid of u, shares are the probabilities to within one step of the grid
    logits = mix_logits(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 3.0]]), weights, 3)
    assert logits.tolist() == [list(mixed)]
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = generate.sample_tokens(logits.expand(count, 3), grid, temperature, 1.0, 0)
    assert (tokens.bincount(minlength=3) / count).tolist() == pytest.approx(expected, abs=1.5 / count)


def test_rows_that_only_pad_the_embeddings_are_cut_and_masked_after_mixing():
    policy = torch.tensor([[2.0, 1.0, 9.0, 9.0]])  # two tokens, two rows of padding; the reference has one
    reference = torch.tensor([[0.0, 1.0, -torch.inf]])  # its weight -.5 would make +inf of it
    for weights, expected in (([1.5, -0.5], [3.0, 1.0, -torch.inf]), ([1.0, 0.0], [2.0, 1.0, -torch.inf])):
        assert mix_logits(policy, reference, weights, 2).tolist() == [expected]
    low = torch.tensor([[2.0078125]], dtype=torch.bfloat16)  # bfloat16 holds no 2.0078125
    mixed = mix_logits(low, torch.tensor([[1.0]], dtype=torch.bfloat16), [1.5, -0.5], 1)
    assert mixed.dtype == torch.float32 and mixed.item() == 1.5 * 2.0 - 0.5


@pytest.mark.parametrize(
    "weights, flags, settings",
    [
        ((1.5, -0.5), ["--max-tokens", "30"], (0.7, 1.0, 0)),
        ((0.5, 0.5), ["--temperature", "1", "--top-p", ".9", "--top-k", "40"], (1.0, 0.9, 40)),
    ],
)
def test_a_mixture_token_by_token(sample, policy, reference, tokenizer, weights, flags, settings):
    # without caches, padding or batches: both models over the whole text, mixed in float64, the oracle's draw
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in (policy, reference)]
    rows, printed = sample(policy, *mixture(reference, *weights), *flags, prompts=PROMPTS[:6])
    assert printed["responses"] == 6  # one each
    seed = stable_hash(0, "mixture", *weights)
    for row in rows:
        options = {"add_generation_prompt": True, "return_dict": False}
        ids, sampled = tokenizer.apply_chat_template(row["prompt"], **options), []
        for uniform in generate.draws(seed, row["id"], 0, 30 if weights[0] == 1.5 else 12):
            with torch.no_grad():
                inputs = torch.tensor([ids + sampled])
                logits = [model(inputs).logits[0, -1].double().numpy() for model in models]
            mixed = weights[0] * logits[0] + weights[1] * logits[1]
            sampled.append(oracle(mixed, uniform, *settings))
            if sampled[-1] == tokenizer.eos_token_id:
                sampled.pop()
                break
        assert row["responses"][0]["token_ids"] == sampled


def common_prefix(a, b):
    return next((k for k, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))


def test_the_two_answers_of_a_pair_do_not_begin_alike(tmp_path, sample, policy):
    """The policy is its reference after a little training; with equal draws the answers begin alike."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.002 * weight.std() * torch.randn(weight.shape)
    load_tokenizer(policy)[0].save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "trained")
    prompts = [{"id": f"p{k}", "prompt": f"question {k}"} for k in range(16)]
    means = []
    for seed in (0, None):  # before: the seed alone; now: the weights are part of the draw
        answers = []
        for a, b in ((1.5, -0.5), (0.5, 0.5)):
            flags = [*mixture(policy, a, b), "--max-tokens", "64"]
            rows, _ = sample(
                str(tmp_path / "trained"), *flags, out=f"{a}{seed}.jsonl", prompts=prompts, seed=seed
            )
            answers.append([ids[0] for ids in all_ids(rows)])
        means.append(np.mean([common_prefix(better, worse) for better, worse in zip(*answers)]))
    assert means[0] > 5 and means[1] < 1


def test_a_mixture_ignores_its_batch_and_goes_on(tmp_path, sample, policy, reference, monkeypatch):
    monkeypatch.setattr(generate, "BLOCK", 4)
    assert len({len(row["prompt"][0]["content"]) for row in PROMPTS[:4]}) == 4  # padded on the left
    flags = [*mixture(reference, 1.5, -0.5), "--n", "2"]
    for size in ("1", "4"):
        sample(policy, *flags, "--batch-size", size, out=f"{size}.jsonl")
    whole = (tmp_path / "1.jsonl").read_bytes()
    assert (tmp_path / "4.jsonl").read_bytes() == whole
    (tmp_path / "4.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    _, printed = sample(policy, *flags, out="4.jsonl")
    assert printed["resumed_rows"] == 4 and (tmp_path / "4.jsonl").read_bytes() == whole
    with pytest.raises(SystemExit):  # other weights, or another reference
        sample(policy, *mixture(reference, 0.5, 0.5), "--n", "2", out="4.jsonl")
    with pytest.raises(SystemExit):
        sample(policy, *mixture(policy, 1.5, -0.5), "--n", "2", out="4.jsonl")
    record = json.loads((tmp_path / "4.meta.json").read_text())
    assert set(record["models"]) == {policy, reference}


def test_a_reference_with_absolute_positions_ignores_the_padding(tmp_path, sample, policy):
    from transformers import GPT2Config, GPT2LMHeadModel  # rotary positions would hide a shift

    tokenizer = make_tokenizer(tmp_path / "gpt2")
    torch.manual_seed(1)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, initializer_range=0.3, tie_word_embeddings=False)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for size in ("1", "4"):
        flags = mixture(str(tmp_path / "gpt2"), 0.5, 0.5)
        sample(policy, *flags, "--batch-size", size, out=f"{size}.jsonl")
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "4.jsonl").read_text()


def test_weights_of_one_model_alone_are_plain_sampling(tmp_path, sample, policy, reference):
    settings = ["--n", "2", "--temperature", "0.7", "--top-p", "0.9", "--top-k", "50"]
    plain, _ = sample(policy, *settings, out="plain.jsonl")
    for name, a, b in ((reference, 1, 0), (policy, 1.5, -0.5), (policy, 0.5, 0.5)):
        sample(policy, *settings, *mixture(name, a, b), "--overwrite", seed=0)
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    mixed, _ = sample(policy, *settings, *mixture(reference, 0.5, 0.5), "--overwrite", seed=0)
    assert all(a != b for a, b in zip(all_ids(mixed), all_ids(plain)))
    other, _ = sample(reference, *settings, out="other.jsonl")
    swapped, _ = sample(policy, *settings, *mixture(reference, 0, 1), "--overwrite", seed=0)
    assert all_ids(swapped) == all_ids(other)


def test_padded_embeddings_change_no_token(tmp_path, sample, policy, reference, tokenizer):
    from transformers import AutoModelForCausalLM

    for name, source, size, scale in (("policy", policy, 272, 40.0), ("reference", reference, 264, -40.0)):
        model = AutoModelForCausalLM.from_pretrained(source)
        vocabulary = model.config.vocab_size
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():  # rows of another scale would be drawn if anything let them
            model.lm_head.weight[vocabulary:] = model.lm_head.weight[: size - vocabulary] * scale
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows, _ = sample(policy, *mixture(reference, 1.5, -0.5))
    flags = mixture(str(tmp_path / "reference"), 1.5, -0.5)
    padded, _ = sample(str(tmp_path / "policy"), *flags, out="padded.jsonl")
    assert all_ids(padded) == all_ids(rows)


def test_a_soft_cap_on_the_references_attention_is_kept(tmp_path, sample):
    model = make_gemma(tmp_path / "gemma", **CAPPED)
    settings = ["--top-p", "1", "--n", "1", "--temperature", "0.7"]
    plain, _ = sample(model, *settings, out="plain.jsonl")
    mixed, _ = sample(model, *settings, *mixture(model, 0.5, 0.5), seed=0)
    assert mixed == plain  # without the cap the reference would differ from the policy


def test_references_that_do_not_fit_are_refused(tmp_path, sample, capsys, policy):
    other = make_policy(tmp_path / "other", seed=1)
    vocabulary = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    numbers = vocabulary["model"]["vocab"]
    vocabulary["model"]["vocab"] = {token: 255 - i for token, i in numbers.items()}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(vocabulary))
    short = tiny(tmp_path / "short", max_position_embeddings=64)
    sentences = {
        other: f"{other}: its tokenizer differs from that of {policy}",
        short: f"{short}: its context of 64 is shorter than that of {policy}",
        str(tmp_path): f"{tmp_path}: not a model folder",
    }
    for name, sentence in sentences.items():
        with pytest.raises(SystemExit) as end:
            sample(policy, *mixture(name, 0.5, 0.5))
        assert end.value.code == 2 and sentence in capsys.readouterr().err
        assert not list(tmp_path.glob("out.meta.json")) and not (tmp_path / "out.jsonl").exists()


# ----- S3's beams
def test_beams_are_transformers_own(tmp_path, sample, policy, tokenizer, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(generate, "BLOCK", 8)
    rows, printed = sample(policy, "--beams", "3", "--batch-size", "5")
    assert (printed["responses"], printed["rows"]) == (11, 11)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    ids = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows
    ]
    by_length = [sorted(block, key=lambda k: len(ids[k])) for block in (range(8), range(8, 11))]
    options = {"do_sample": True, "num_beams": 3, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    for batch in (by_length[0][:5], by_length[0][5:], by_length[1]):
        longest = max(len(ids[k]) for k in batch)
        padded = [[tokenizer.pad_token_id] * (longest - len(ids[k])) + ids[k] for k in batch]
        mask = [[0] * (longest - len(ids[k])) + [1] * len(ids[k]) for k in batch]
        torch.manual_seed(stable_hash(0, "beams", *(rows[k]["id"] for k in batch)) % 2**63)
        output = model.generate(
            torch.tensor(padded), attention_mask=torch.tensor(mask), max_new_tokens=12, **options
        )
        for k, sampled in zip(batch, output[:, longest:].tolist()):
            sampled.append(tokenizer.eos_token_id)
            expected = sampled[: sampled.index(tokenizer.eos_token_id)]
            assert rows[k]["responses"][0]["token_ids"] == expected[:12]
    plain, _ = sample(policy, "--n", "1", "--temperature", "1", "--top-p", "1", out="plain.jsonl")
    assert sum(a != b for a, b in zip(all_ids(rows), all_ids(plain))) > 8
    # stopped in the second block: it goes on to the same rows, and not with other batches
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[:-100])
    with pytest.raises(SystemExit):
        sample(policy, "--beams", "3", "--batch-size", "4")
    _, printed = sample(policy, "--beams", "3", "--batch-size", "5")
    assert printed["resumed_rows"] == 8 and (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("spoiled", ["policy", "reference", "beams"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, sample, capsys, policy, spoiled):
    good, bad = policy, with_template(tmp_path / "bad", policy, CHATML)
    spoil_weights(tmp_path / "bad", "nan")
    model, flags = {
        "policy": (bad, mixture(good, 0.5, 0.5)),
        "reference": (good, mixture(bad, 1.5, -0.5)),
        "beams": (bad, ["--beams", "2"]),
    }[spoiled]
    with pytest.raises(SystemExit) as end:
        sample(model, *flags)
    assert end.value.code == 2 and f"{bad}: the first logits are not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.meta.json")) and not (tmp_path / "out.jsonl").exists()


# ----- S1's diverse responses
Z = (  # S1 Appendix H
    "Please generate another response that is different from all the previous ones. It can differ in "
    "aspects such as but not limited to tone, formality, strategy, judgment, conciseness, structure. It can "
    "also involve asking for clarity if the input prompt is unclear."
)


def test_diverse_responses_see_all_earlier_ones(tmp_path, sample):
    chat = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    prompts = [{"id": "a", "prompt": "hi"}, {"id": "b", "prompt": chat}]
    model = tiny(tmp_path / "model", max_position_embeddings=2048)
    rows, printed = sample(model, DIVERSE, "--n", "3", prompts=prompts)
    assert printed["responses"] == 6 and "skipped_context_too_long" not in printed
    plain, _ = sample(model, "--n", "3", prompts=prompts, out="plain.jsonl")
    for row, plain_row in zip(rows, plain):
        texts = [response["text"] for response in row["responses"]]
        assert row["prompt"] == plain_row["prompt"]  # only x
        assert row["responses"][0] == plain_row["responses"][0]
        assert row["responses"][1] != plain_row["responses"][1]
        # the conversations, typed out as prompts of the same id: a plain run's sample k there is y_k
        chat = list(row["prompt"])
        for k in (1, 2):
            chat += [{"role": "assistant", "content": texts[k - 1]}, {"role": "user", "content": Z}]
            typed_out = [{"id": row["id"], "prompt": chat}]
            by_hand, _ = sample(model, "--n", "3", prompts=typed_out, out=f"{row['id']}{k}.jsonl")
            assert by_hand[0]["responses"][k] == row["responses"][k]


def test_a_conversation_beyond_the_context_is_skipped_and_counted(tmp_path, sample, policy):
    # 512 positions, a byte for a token, and 12 to write: z takes 276 of them, so the third conversation is
    # too long for both prompts and the second for the long one
    prompts = [{"id": "a", "prompt": "hi"}, {"id": "b", "prompt": "x" * 300}]
    rows, printed = sample(policy, DIVERSE, prompts=prompts)
    assert [len(row["responses"]) for row in rows] == [2, 1]
    counts = [printed[name] for name in ("responses", "skipped_context_too_long", "dropped")]
    assert counts == [3, 5, {}]


def test_diverse_rows_ignore_windows_and_go_on(tmp_path, sample, policy, monkeypatch, capsys):
    monkeypatch.setattr(generate, "BLOCK", 4)
    flags = [DIVERSE, "--n", "2", "--batch-size", "3"]
    sample(policy, *flags)
    whole = (tmp_path / "out.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [row["id"] for row in PROMPTS]
    (tmp_path / "out.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    monkeypatch.setattr(sample_diverse, "WINDOW", 3)
    _, printed = sample(policy, *flags)
    assert printed["resumed_rows"] == 4 and (tmp_path / "out.jsonl").read_bytes() == whole
    with pytest.raises(SystemExit):  # rows of generate.py are others
        sample(policy, "--n", "2")
    assert "was written with diverse = True, not None" in capsys.readouterr().err


def test_switches_reach_the_conversations(tmp_path, sample, policy):
    model = with_template(tmp_path / "model", policy, CHATML + THINKING)
    off = ["--template-kwargs", '{"enable_thinking": false}']
    args = sample_diverse.parse_args(["--model", model, "--prompts", "p", "--out", "o", *HF, *off])
    tokens = generate.read_tokens(args)
    row = {"id": "p", "prompt": [{"role": "user", "content": "one"}], "responses": [{"text": "two"}]}
    (request,) = sample_diverse.next_requests([row], 1, args, tokens)
    end = f"{Z}<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert tokens.chat.tokenizer.decode(request.ids).endswith(end)
    # what was thought before an earlier answer is no part of it
    row["responses"] = [{"text": "<think>so</think>two"}]
    assert sample_diverse.next_requests([row], 1, args, tokens) == [request]


# ----- flags
BASE = ["--model", "m", "--prompts", "p", "--out", "o"]
MIX = [*BASE, "--reference", "r", "--weights", "1.5", "-0.5"]


def settings(recipe, flags):
    args = recipe.parse_args(flags)
    assert args.backend == "hf"  # also where vllm is installed
    return [getattr(args, name) for name in ("n", "temperature", "top_p", "top_k", "max_tokens")]


def test_settings_of_the_recipes():
    assert settings(sample_mixture, MIX) == [1, 0.7, 1.0, 0, 2048]
    assert settings(sample_mixture, [*MIX, "--n", "3", "--top-p", ".8"]) == [3, 0.7, 0.8, 0, 2048]
    assert settings(sample_mixture, [*MIX, "--preset", "s2"]) == [2, 0.7, 0.9, 50, 2048]
    assert settings(sample_mixture, [*MIX, "--batch-size", "4", "--temperature", "3"])[1] == 3.0
    assert settings(sample_beams, BASE) == [1, 1.0, 1.0, 0, 2048]
    assert sample_beams.parse_args(BASE).beams == 3
    seeds = [sample_mixture.parse_args([*MIX, "--seed", seed]).seed for seed in ("0", "1")]
    seeds.append(sample_mixture.parse_args([*MIX[:-2], "0.5", "0.5"]).seed)
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(
    "recipe, flags, sentence",
    [
        (sample_mixture, MIX[:-3], "the following arguments are required: --weights"),
        (sample_mixture, [*BASE, *MIX[-3:]], "the following arguments are required: --reference"),
        (sample_mixture, [*MIX[:-1], "nan"], "--weights must be finite, found [1.5, nan]"),
        (
            sample_mixture,
            [*MIX, "--greedy"],
            "--greedy and --backend vllm cannot be combined with a mixture",
        ),
        (sample_mixture, [*MIX, "--backend", "vllm"], "--greedy and --backend vllm cannot be combined with"),
        (sample_mixture, [*MIX, "--tensor-parallel", "2"], "--tensor-parallel needs --backend vllm"),
        (sample_beams, [*BASE, "--beams", "1"], "--beams must be at least 2 and --n is 1, found 1 and 1"),
        (sample_beams, [*BASE, "--n", "2"], "--beams must be at least 2 and --n is 1, found 3 and 2"),
        (sample_beams, [*BASE, "--greedy"], "--greedy and --backend vllm cannot be combined with beams"),
        (sample_beams, [*BASE, "--backend", "auto"], "--greedy and --backend vllm cannot be combined with"),
        (sample_diverse, [*BASE, "--n", "1"], "--n must be at least 2, found 1"),
        (sample_diverse, [*BASE, "--greedy"], "--n must be at least 2, found 1"),
    ],
)
def test_flags_that_do_not_go_with_a_recipe(capsys, monkeypatch, recipe, flags, sentence):
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: name)  # vllm, as on a GPU machine
    with pytest.raises(SystemExit) as end:
        recipe.parse_args(flags)
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_recipes_as_a_user_starts_them(tmp_path, policy, reference):
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPTS[:3])
    flags = ["--model", policy, "--prompts", prompts, "--dtype", "float32", "--max-tokens", "5"]
    out = tmp_path / "mixture.jsonl"
    more = [*mixture(reference, 0.5, 0.5), "--out", out]
    printed, _ = run_script("recipes/sample_mixture.py", *flags, *more, cwd=tmp_path)
    assert printed["responses"] == 3 and len(read_rows(out)) == 3
    printed, _ = run_script(
        "recipes/sample_beams.py", *flags, "--out", tmp_path / "beams.jsonl", cwd=tmp_path
    )
    assert printed["responses"] == 3
    more = ["--n", "2", "--backend", "hf", "--out", tmp_path / "diverse.jsonl"]
    printed, _ = run_script("recipes/sample_diverse.py", *flags, *more, cwd=tmp_path)
    assert printed["responses"] == 6


# ----- one process per GPU
def on_all_gpus(folder, *command, **environment):
    """(status, {number: what the command saw}) with an nvidia-smi that lists three GPUs."""
    (folder / "bin").mkdir(exist_ok=True)
    smi, stage = folder / "bin" / "nvidia-smi", folder / "bin" / "stage"
    smi.write_text('#!/bin/sh\necho "$@" > smi.txt\nprintf "0\\n1\\n2\\n"\n')
    stage.write_text(
        '#!/bin/sh\nwhile [ "$1" != --out ]; do seen="$seen $1"; shift; done\n'
        'echo "$CUDA_VISIBLE_DEVICES$seen" > "$2"\n'
        'if [ "$CUDA_VISIBLE_DEVICES" = "$FAILING" ]; then exit 3; fi\n'
        'sleep 0.2\necho end >> "$2"\n'
    )
    for path in (smi, stage):
        path.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    plain["PATH"] = f"{folder / 'bin'}:{plain['PATH']}"
    script = [str(REPO / "recipes/on_all_gpus.sh"), "out", "stage", *command]
    done = subprocess.run(
        ["bash", *script], cwd=folder, env=plain | environment, capture_output=True, text=True
    )
    return done.returncode, {path.name: path.read_text() for path in sorted(folder.glob("out/*"))}


def test_one_process_per_gpu(tmp_path):
    status, outputs = on_all_gpus(tmp_path, "--model", "a b", "--n", "2")
    assert status == 0
    assert outputs == {f"{i}.jsonl": f"{i} --model a b --n 2 --shard {i}/3\nend\n" for i in range(3)}
    assert (tmp_path / "smi.txt").read_text() == "--query-gpu=index --format=csv,noheader\n"


def test_gpus_that_are_named_are_those_that_are_used(tmp_path):
    status, outputs = on_all_gpus(tmp_path, CUDA_VISIBLE_DEVICES="5,GPU-7")
    assert status == 0
    assert outputs == {"0.jsonl": "5 --shard 0/2\nend\n", "1.jsonl": "GPU-7 --shard 1/2\nend\n"}
    assert not (tmp_path / "smi.txt").exists()


def test_one_gpu_has_all_rows(tmp_path):
    status, outputs = on_all_gpus(tmp_path, CUDA_VISIBLE_DEVICES="3")
    assert (status, outputs) == (0, {"0.jsonl": "3\nend\n"})


def test_one_that_fails_fails_all_after_the_others_have_ended(tmp_path):
    status, outputs = on_all_gpus(tmp_path, FAILING="0")
    assert status == 1 and outputs["0.jsonl"] == "0 --shard 0/3\n"
    assert outputs["1.jsonl"].endswith("end\n") and outputs["2.jsonl"].endswith("end\n")
