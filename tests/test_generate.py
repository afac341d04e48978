"""
generate.py: exact sampling that ignores its batch, and runs that can be killed. tests/test_imports.py has the importers.

Covers  sample_tokens against a float64 oracle and by frequencies; greedy against transformers' own; independence of
        batch, order, --limit and shards; resume after a torn line and after kill -9; other arguments refused; ids,
        finish and text; presets; --diverse, --mix-ref, --num-beams; soft-capped attention; what the last line reports.
Run     python -m pytest tests/test_generate.py
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import generate
import numpy as np
import pytest
import torch
from conftest import CHATML, REPO, make_policy, make_tokenizer, read_rows, write_rows
from generate import mix_logits, sample_tokens


def oracle(logits, uniform, temperature, top_p, top_k):
    """One token, in float64: temperature, top-k, top-p, inverse of the cumulative distribution; the best come first where
    something is cut off, else the vocabulary's order stays."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    order = np.argsort(-scaled, kind="stable") if top_k or top_p < 1 else np.arange(len(scaled))
    kept = order[:top_k] if top_k else order
    probabilities = np.exp(scaled[kept] - scaled[kept].max())
    probabilities /= probabilities.sum()
    # the smallest set that reaches top_p
    size = len(kept) if top_p >= 1 else int(np.argmax(np.cumsum(probabilities) >= top_p)) + 1
    nucleus = probabilities[:size] / probabilities[:size].sum()
    return int(kept[:size][np.searchsorted(np.cumsum(nucleus), uniform, side="right").clip(max=size - 1)])


def normal_logits(rows, vocabulary, spread, seed=0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("temperature, top_p, top_k",
                         [(1.0, 1.0, 0), (0.7, 0.9, 0), (0.7, 0.9, 50), (0.6, 1.0, 50), (2.0, 0.95, 0),
                                                       (3.0, 0.5, 7), (1.0, 1.0, 1), (0.3, 0.01, 0), (1.0, 0.9, 1000)])
def test_tokens_are_those_of_the_float64_oracle(temperature, top_p, top_k):
    logits = normal_logits(400, 300, 2.0)
    uniforms = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = sample_tokens(logits, uniforms, temperature, top_p, top_k)
    assert tokens.tolist() == [oracle(*pair, temperature, top_p, top_k)
                               for pair in zip(logits.numpy(), uniforms.numpy())]


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_flat_distributions_over_a_large_vocabulary(spread):
    # nearly uniform, the 1024 candidates hold a fifth of the mass and the whole vocabulary is sorted; peaked, they
    # suffice
    logits = normal_logits(100, 5000, spread, seed=2)
    uniforms = torch.rand(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = sample_tokens(logits, uniforms, 1.0, 0.9, 0).tolist()
    assert tokens == [oracle(*pair, 1.0, 0.9, 0) for pair in zip(logits.numpy(), uniforms.numpy())]
    ranks = (logits > logits.gather(1, torch.tensor(tokens)[:, None])).sum(-1)
    assert (ranks.max() > 1024) == (spread < 8)


def test_the_ends_of_the_unit_interval():
    logits = normal_logits(50, 40, 1.0)
    almost_one = torch.full((50,), 1 - 2**-53, dtype=torch.float64)
    for top_p, top_k in ((0.9, 0), (1.0, 5), (0.5, 5)):
        best = sample_tokens(logits, torch.zeros(50, dtype=torch.float64), 0.7, top_p, top_k)
        assert best.tolist() == logits.argmax(-1).tolist()
        last = sample_tokens(logits, almost_one, 0.7, top_p, top_k).tolist()
        assert last == [oracle(row, 1 - 2**-53, 0.7, top_p, top_k) for row in logits.numpy()]
    assert sample_tokens(logits, torch.zeros(50, dtype=torch.float64), 0.7, 1.0, 0).tolist() == [0] * 50
    assert sample_tokens(logits, almost_one, 0.7, 1.0, 0).tolist() == [39] * 50


@pytest.mark.parametrize("weights, mixed, temperature, expected", [
    ([1.5, -0.5], (3.0, 1.0, -1.5), 1.0, (0.872262, 0.118048, 0.009690)),
    ([1.5, -0.5], (3.0, 1.0, -1.5), 0.7, (0.944245, 0.054230, 0.001525)),
    ([1.5, -0.5], (3.0, 1.0, -1.5), 3.0, (0.575855, 0.295654, 0.128491)),  # S1 Table 3 goes up to 3
    ([0.5, 0.5], (1.0, 1.0, 1.5), 1.0, (0.274069, 0.274069, 0.451863)),
    ([0.5, 0.5], (1.0, 1.0, 1.5), 0.7, (0.247358, 0.247358, 0.505284))])
def test_mixed_logits_and_their_frequencies_over_a_grid_of_uniforms(weights, mixed, temperature, expected):
    # METHODS.md 10's vectors: over an even grid of u, shares are the probabilities to within one step of the grid
    logits = mix_logits(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 3.0]]), weights, 3)
    assert logits.tolist() == [list(mixed)]
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = sample_tokens(logits.expand(count, 3), grid, temperature, 1.0, 0)
    assert (tokens.bincount(minlength=3) / count).tolist() == pytest.approx(expected, abs=1.5 / count)


def test_rows_that_only_pad_the_embeddings_are_cut_and_masked_after_mixing():
    policy = torch.tensor([[2.0, 1.0, 9.0, 9.0]])  # two tokens, two rows of padding; the reference has one
    reference = torch.tensor([[0.0, 1.0, -torch.inf]])  # its weight -.5 would make +inf of it
    for weights, expected in (([1.5, -0.5], [3.0, 1.0, -torch.inf]), ([1.0, 0.0], [2.0, 1.0, -torch.inf])):
        assert mix_logits(policy, reference, weights, 2).tolist() == [expected]
    bfloat16 = mix_logits(torch.tensor([[2.0078125]], dtype=torch.bfloat16), torch.tensor([[1.0]], dtype=torch.bfloat16),
                          [1.5, -0.5], 1)
    assert bfloat16.dtype == torch.float32 and bfloat16.item() == 1.5 * 2.0 - 0.5  # bfloat16 holds no 2.0078125


@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 1.0, 0), (3.0, 1.0, 0), (0.7, 0.9, 0), (0.7, 0.9, 4)])
def test_frequencies_of_draws_pass_a_chi_square_test(temperature, top_p, top_k):
    logits = normal_logits(1, 12, 1.5, seed=4)
    count = 20_000
    # as the third step uses them
    uniforms = torch.tensor(np.stack([generate.draws(0, f"p{k}", 0, 3) for k in range(count)]))[:, 2]
    found = sample_tokens(logits.expand(count, 12), uniforms, temperature, top_p, top_k).bincount(minlength=12).double()
    # the distribution by its definition, not by sampling: keep the best tokens, renormalise
    kept = logits[0].double().div(temperature).sort(descending=True)
    probabilities = kept.values[:top_k or 12].softmax(-1)
    probabilities = probabilities[:int((probabilities.cumsum(-1) < top_p).sum()) + 1]
    expected = torch.zeros(12, dtype=torch.float64).scatter(0, kept.indices[:len(probabilities)],
                                                            probabilities / probabilities.sum())
    assert found[expected == 0].sum() == 0
    inside = expected > 0
    chi_square = ((found - count * expected)[inside] ** 2 / (count * expected[inside])).sum().item()
    assert chi_square < 31.3  # the 99.9 % quantile at 11 degrees of freedom, the most there are here


def test_a_row_ignores_the_others_of_its_batch():
    # one flat row forces the whole vocabulary to be sorted for all: the peaked rows must draw the same tokens
    logits = torch.cat([normal_logits(20, 3000, 6.0, seed=5), normal_logits(1, 3000, 0.01, seed=6)])
    uniforms = torch.rand(21, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    together = sample_tokens(logits, uniforms, 0.7, 0.9, 0).tolist()
    assert together == [sample_tokens(logits[k:k + 1], uniforms[k:k + 1], 0.7, 0.9, 0).item() for k in range(21)]
    assert sample_tokens(logits.flip(0), uniforms.flip(0), 0.7, 0.9, 0).tolist() == together[::-1]


def test_draws_depend_on_seed_prompt_and_sample():
    base = generate.draws(0, "p", 0, 100)
    assert base.dtype == np.float64 and 0 <= base.min() and base.max() < 1 and len(set(base)) == 100
    assert (generate.draws(0, "p", 0, 50) == base[:50]).all()  # a longer --max-tokens begins with the same draws
    for other in (generate.draws(1, "p", 0, 100), generate.draws(0, "q", 0, 100), generate.draws(0, "p", 1, 100)):
        assert not np.isclose(other, base).any()


# ---- whole runs

PROMPTS = [{"id": f"p{k}", "prompt": [{"role": "user", "content": "Tell me " + "more " * (k % 4) + str(k)}], "note": k}
           for k in range(11)]
HF = ["--backend", "hf", "--dtype", "float32", "--max-tokens", "12"]


def run(tmp_path, capsys, model, rows, *flags, out="out.jsonl", name="prompts.jsonl"):
    """(rows of the output, the last line as JSON)."""
    path = write_rows(tmp_path / name, rows)
    generate.main(generate.parse_args(["--model", model, "--prompts", path, "--out", str(tmp_path / out), *HF, *flags]))
    return read_rows(tmp_path / out), json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def tokenizer(policy):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(policy)


@pytest.fixture()
def small_windows(monkeypatch):
    monkeypatch.setattr(generate, "WINDOW", {"hf": 4, "vllm": 4})


def test_greedy_is_transformers_own(tmp_path, capsys, policy, tokenizer):
    from transformers import AutoModelForCausalLM
    rows, printed = run(tmp_path, capsys, policy, PROMPTS, "--greedy")
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    for row in rows:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt",
                                            return_dict=True)
        output = model.generate(**ids, do_sample=False, temperature=None, top_p=None, max_new_tokens=12)
        output = output[0, ids["input_ids"].shape[1]:].tolist()
        expected = output[:output.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in output else output
        (response,) = row["responses"]
        assert response["token_ids"] == expected
    assert printed["responses"] == printed["rows"] == 11


def test_responses_hold_what_was_sampled(tmp_path, capsys, policy, tokenizer):
    rows, printed = run(tmp_path, capsys, policy, PROMPTS, "--temperature", "1.5", "--top-p", "1", "--max-tokens", "60")
    responses = [response for row in rows for response in row["responses"]]
    for response in responses:
        ids = response["token_ids"]
        assert tokenizer.eos_token_id not in ids and len(ids) == response["tokens"] <= 60
        assert tokenizer.decode(ids, skip_special_tokens=True) == response["text"]
        assert response["finish"] == ("length" if len(ids) == 60 else "stop")
        assert (response["source"], response["model"]) == ("on", policy)
        assert response["tokenizer"] == generate.fingerprint(tokenizer)
    finishes = [response["finish"] for response in responses]
    assert finishes.count("stop") > 3 and finishes.count("length") > 3  # both ends are seen
    assert [row["note"] for row in rows] == list(range(11)) and all(len(row["responses"]) == 4 for row in rows)
    assert (printed["responses"], printed["truncated"]) == (44, finishes.count("length"))
    assert printed["tokens"] == sum(response["tokens"] for response in responses)
    assert printed["prompts_with_equal_samples"] == 0


def test_the_first_token_follows_our_temperature_and_not_the_models(tmp_path, capsys, policy, tokenizer):
    # generation_config.json asks for temperature .1; at 1 a total of 2000 first tokens has the model's own distribution
    from transformers import AutoModelForCausalLM
    assert json.loads(open(f"{policy}/generation_config.json").read())["temperature"] == 0.1
    prompt = PROMPTS[:1]
    rows, _ = run(tmp_path, capsys, policy, prompt, "--temperature", "1", "--top-p", "1", "--max-tokens", "1", "--n",
                  "2000",
                  "--batch-size", "500")
    ids = tokenizer.apply_chat_template(prompt[0]["prompt"], add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(policy)(**ids).logits[0, -1].double().softmax(-1)
    first = [(response["token_ids"] + [tokenizer.eos_token_id])[0] for response in rows[0]["responses"]]
    shares = torch.tensor(first).bincount(minlength=len(expected)) / 2000
    cold = (expected.log() / 0.1).softmax(-1)
    assert (shares - expected).abs().max() < 4 * 0.5 / 2000**0.5 and (cold - expected).abs().max() > 0.2
    # total variation: small against the distribution asked for, large against the one of generation_config.json
    assert (shares - expected).abs().sum() / 2 < 0.15 < 0.3 < (shares - cold).abs().sum() / 2


def test_samples_ignore_batch_size_order_limit_and_shards(tmp_path, capsys, policy, small_windows):
    whole, _ = run(tmp_path, capsys, policy, PROMPTS, "--n", "2", out="whole.jsonl")
    text = (tmp_path / "whole.jsonl").read_text()
    run(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--batch-size", "3", out="batches.jsonl")
    assert (tmp_path / "batches.jsonl").read_text() == text
    run(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--limit", "5", out="limit.jsonl")
    assert (tmp_path / "limit.jsonl").read_text().splitlines() == text.splitlines()[:5]
    run(tmp_path, capsys, policy, PROMPTS[::-1], "--n", "2", out="reversed.jsonl", name="reversed_prompts.jsonl")
    assert (tmp_path / "reversed.jsonl").read_text().splitlines() == text.splitlines()[::-1]
    shards = []
    for i in range(2):
        run(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--shard", f"{i}/2", out=f"shard{i}.jsonl")
        shards.append((tmp_path / f"shard{i}.jsonl").read_text().splitlines())
    assert len(shards[0]) == 7 and len(shards[1]) == 4 and sorted(shards[0] + shards[1]) == sorted(text.splitlines())
    more, _ = run(tmp_path, capsys, policy, PROMPTS, "--n", "3", out="more.jsonl")
    # a larger --n begins with the same samples
    assert [row["responses"][:2] for row in more] == [row["responses"] for row in whole]
    other, _ = run(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--seed", "1", out="seed.jsonl")
    assert all(a["responses"] != b["responses"] for a, b in zip(other, whole))


def test_a_larger_limit_goes_on(tmp_path, capsys, policy, small_windows):
    run(tmp_path, capsys, policy, PROMPTS, "--n", "2", out="whole.jsonl")
    run(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--limit", "6")
    _, printed = run(tmp_path, capsys, policy, PROMPTS, "--n", "2")
    assert printed["resumed_rows"] == 4
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_torn_file_is_completed_byte_for_byte(tmp_path, capsys, policy, small_windows):
    run(tmp_path, capsys, policy, PROMPTS, "--n", "2")
    whole = (tmp_path / "out.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length, kept in ((ends[5] + 100, 4), (ends[7], 8), (ends[0] - 1, 0), (len(whole) - 1, 8), (len(whole), 11)):
        (tmp_path / "out.jsonl").write_bytes(whole[:length])
        _, printed = run(tmp_path, capsys, policy, PROMPTS, "--n", "2")
        assert (tmp_path / "out.jsonl").read_bytes() == whole and printed["resumed_rows"] == kept


def test_kill_9_and_the_same_command_again(tmp_path, capsys, policy):
    # 320 rows are five windows of 64; the process dies once the first window, or a part of it, is on disk
    prompts = [{"id": f"k{k}", "prompt": f"prompt {k}"} for k in range(320)]
    flags = ["--n", "2", "--max-tokens", "24"]
    run(tmp_path, capsys, policy, prompts, *flags, out="whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(REPO / "generate.py"), "--model", policy, "--prompts",
               str(tmp_path / "prompts.jsonl"), "--out", str(out),
               *HF, *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 60
    while not (out.exists() and out.stat().st_size) and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = out.read_bytes()
    assert 0 < len(left) < len(whole) and whole.startswith(left)
    _, printed = run(tmp_path, capsys, policy, prompts, *flags)
    assert out.read_bytes() == whole and printed["resumed_rows"] == left.count(b"\n") // 64 * 64


def refused(tmp_path, capsys, model, rows, *flags, **more):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, model, rows, *flags, **more)
    err = capsys.readouterr().err
    assert exit_status.value.code == 2 and "Traceback" not in err
    return err


def test_another_run_is_refused_by_name(tmp_path, capsys, policy):
    run(tmp_path, capsys, policy, PROMPTS[:3], "--n", "2")
    before = (tmp_path / "out.jsonl").read_bytes()
    for flags, difference in ((["--n", "3"], "n was 2 and is 3"), (["--n", "2", "--seed", "1"], "seed was 0 and is 1"),
                              (["--n", "2", "--temperature", "0.8"], "temperature was 0.7 and is 0.8"),
                              (["--n", "2", "--source", "off"], "source was 'on' and is 'off'")):
        err = refused(tmp_path, capsys, policy, PROMPTS[:3], *flags)
        assert "belongs to a run with other args" in err and difference in err and "--overwrite starts anew" in err
    err = refused(tmp_path, capsys, policy, PROMPTS[1:4], "--n", "2")
    assert "belongs to a run with other inputs" in err and "prompts.jsonl" in err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    rows, _ = run(tmp_path, capsys, policy, PROMPTS[1:4], "--n", "1", "--overwrite")
    assert [row["id"] for row in rows] == ["p1", "p2", "p3"] and len(rows[0]["responses"]) == 1
    (tmp_path / "out.meta.json").unlink()
    assert "exists, and no out.meta.json says what made it" in refused(tmp_path, capsys, policy, PROMPTS[1:4], "--n",
                                                                       "1")


def test_prompts_too_long_are_named_and_skipped(tmp_path, capsys, policy):
    rows = [PROMPTS[0], {"id": "long", "prompt": "x" * 500}, PROMPTS[1]]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    generate.main(generate.parse_args(["--model", policy, "--prompts", path, "--out", str(tmp_path / "out.jsonl"), *HF,
                                       "--n", "1"]))
    printed = capsys.readouterr()
    assert "skipped 1 prompts of over 500 tokens, which leave no room for 12: long" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["skipped_too_long"] == 1
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == ["p0", "p1"]
    assert "no prompt leaves room" in refused(tmp_path, capsys, policy, rows[1:2], "--n", "1", out="none.jsonl")


def test_plain_strings_missing_ids_and_the_meta_file(tmp_path, capsys, policy):
    rows, _ = run(tmp_path, capsys, policy, [{"prompt": "Grüße", "category": "x"}], "--n", "1")
    prompt = [{"role": "user", "content": "Grüße"}]
    canonical = '[{"content": "Grüße", "role": "user"}]'
    assert rows[0]["id"] == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    assert rows[0]["prompt"] == prompt and rows[0]["category"] == "x"
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert meta["args"]["temperature"] == 0.7 and meta["args"]["max_tokens"] == 12 and meta["counts"]["rows"] == 1
    weights = f"{policy}/model.safetensors"
    assert meta["inputs"][weights] == hashlib.sha256(open(weights, "rb").read()).hexdigest()


def test_a_chat_template_from_a_file(tmp_path, capsys, policy, tokenizer):
    template = "{% for message in messages %}{{ 'Q: ' + message['content'] + '<|im_end|>' }}{% endfor %}A: "
    (tmp_path / "template.jinja").write_text(template)
    rows, _ = run(tmp_path, capsys, policy, PROMPTS[:1], "--greedy", "--chat-template",
                  str(tmp_path / "template.jinja"))
    from transformers import AutoModelForCausalLM
    ids = tokenizer(f"Q: {PROMPTS[0]['prompt'][0]['content']}<|im_end|>A: ", add_special_tokens=False,
                    return_tensors="pt").input_ids
    with torch.no_grad():
        best = AutoModelForCausalLM.from_pretrained(policy)(ids).logits[0, -1].argmax().item()
    assert rows[0]["responses"][0]["token_ids"][0] == best


def test_presets():
    def settings(*flags):
        args = generate.parse_args(["--model", "m", "--prompts", "p", "--out", "o", "--backend", "hf", *flags])
        return [getattr(args, name) for name in ("n", "temperature", "top_p", "top_k", "max_tokens")]
    assert settings() == settings("--preset", "s1") == [4, 0.7, 0.9, 0, 2048]  # S1 3.1 footnote 2, 5.1
    assert settings("--preset", "s2") == [2, 0.7, 0.9, 50, 2048]                # S2 Table 7
    assert settings("--preset", "s3") == [8, 0.6, 1.0, 0, 1024]                 # S3 Table 6
    assert settings("--preset", "s2", "--n", "5", "--top-k", "0") == [5, 0.7, 0.9, 0, 2048]
    assert settings("--greedy") == [1, 0.0, 1.0, 0, 2048]                       # S1 Appendix D
    assert settings("--num-beams", "3", "--preset", "s3") == [1, 1.0, 1.0, 0, 1024]  # S3 B.4
    assert settings("--diverse") == settings() and settings("--diverse", "--preset", "s2") == settings("--preset", "s2")
    mixed = ["--mix-ref", "r", "--mix-weights", "1.5", "-0.5"]
    assert settings(*mixed) == [1, 0.7, 1.0, 0, 2048] and settings(*mixed, "--n", "3", "--top-p", ".8") == [3, 0.7, 0.8, 0, 2048]
    for flags in (mixed, ["--num-beams", "3"]):  # vLLM has neither
        assert generate.parse_args(["--model", "m", "--prompts", "p", "--out", "o", *flags]).backend == "hf"


SAMPLING = ["--model", "m", "--prompts", "p", "--out", "o"]
IMPORTING = ["--import-format", "rows", "--import-data", "d", "--out", "o"]
MIX = ["--mix-ref", "r", "--mix-weights", "1", "0"]


@pytest.mark.parametrize("flags, sentence", [
    ([*SAMPLING, "--greedy", "--n", "2"], "--n does nothing under --greedy"),
    ([*SAMPLING, "--greedy", "--seed", "1"], "--seed does nothing under --greedy"),
    ([*SAMPLING, "--greedy", "--temperature", "1"], "--temperature does nothing under --greedy"),
    ([*SAMPLING, "--backend", "vllm", "--batch-size", "2"], "--batch-size does nothing on the backend vllm"),
    ([*SAMPLING, "--backend", "hf", "--tensor-parallel", "2"], "--tensor-parallel does nothing on the backend hf"),
    ([*SAMPLING, "--import-data", "d"], "--import-data needs --import-format"),
    ([*SAMPLING, "--lang", "en"], "--lang needs --import-format"),
    ([*SAMPLING, "--temperature", "0"], "expected --temperature above 0"), ([*SAMPLING, "--top-p", "0"], "--top-p in (0, 1]"),
    ([*SAMPLING, "--top-p", "1.1"], "--top-p in (0, 1]"), ([*SAMPLING, "--top-k", "-1"], "--top-k 0 (off) or more"),
    ([*SAMPLING, "--n", "0"], "--n must be at least 1, found 0"),
    # vLLM takes at most 2, and says so only once the model is loaded
    ([*SAMPLING, "--backend", "vllm", "--temperature", "3"], "vllm samples at temperatures up to 2"),
    ([*SAMPLING, "--diverse", "--n", "1"], "--n must be at least 2"),
    ([*SAMPLING, "--num-beams", "1"], "--num-beams must be at least 2"),
    ([*SAMPLING, "--num-beams", "0"], "--num-beams must be at least 2"),
    ([*SAMPLING, "--num-beams", "3", "--batch-size", "4"], "--batch-size does nothing under --num-beams"),
    ([*SAMPLING, "--num-beams", "3", "--backend", "vllm"], "--num-beams runs on the backend hf alone"),
    ([*SAMPLING, *MIX, "--backend", "vllm"], "--mix-ref runs on the backend hf alone"),
    ([*SAMPLING, "--mix-ref", "r"], "--mix-ref needs --mix-weights"), ([*SAMPLING, *MIX[2:]], "--mix-weights needs --mix-ref"),
    ([*SAMPLING, "--mix-ref", "r", "--mix-weights", "1", "nan"], "two finite --mix-weights"),
    ([*SAMPLING, "--diverse-context", "full"], "--diverse-context needs --diverse"),
    ([*SAMPLING, "--diverse", "--greedy"], "not allowed with argument"), ([*SAMPLING, "--diverse", *MIX], "not allowed with argument"),
    ([*SAMPLING, "--num-beams", "3", "--greedy"], "not allowed with argument"),
    ([*SAMPLING, *MIX, "--num-beams", "3"], "not allowed with argument"),
    ([*IMPORTING, "--model", "m"], "--model is about sampling"), ([*IMPORTING, "--seed", "1"], "--seed is about sampling"),
    ([*IMPORTING, "--greedy"], "--greedy is about sampling"), ([*IMPORTING, "--diverse"], "--diverse is about sampling"),
    ([*IMPORTING, *MIX], "is about sampling"), ([*IMPORTING, "--num-beams", "3"], "--num-beams is about sampling"),
    ([*IMPORTING, "--import-split", "s"], "--import-split names a split of a hub id, and --import-data is a file"),
    ([*IMPORTING, "--lang", "en"], "--lang is about oasst2 alone"), (["--out", "o"], "sampling needs --model and --prompts"),
    (["--model", "m", "--out", "o"], "sampling needs --model and --prompts"),
    (["--import-format", "rows", "--out", "o"], "importing needs --import-format and --import-data")])
def test_a_flag_that_would_do_nothing_is_refused(capsys, flags, sentence):
    with pytest.raises(SystemExit) as exit_status:
        generate.parse_args(flags)
    assert exit_status.value.code == 2 and sentence in capsys.readouterr().err


def test_two_beginnings_of_text_are_refused_and_a_prompt_ends_with_the_assistants_header(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "two", "{{ '<|im_start|><|im_start|>' + messages[0]['content'] }}")
    with pytest.raises(SystemExit):
        generate.prompt_ids(tokenizer, [{"role": "user", "content": "a"}])
    tokenizer.chat_template = CHATML
    ids = generate.prompt_ids(tokenizer, [{"role": "user", "content": "a"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


# ---- S1's diverse responses

Z = ("Please generate another response that is different from all the previous ones. It can differ in aspects such as but not "
     "limited to tone, formality, strategy, judgment, conciseness, structure. It can also involve asking for clarity if the input "
     "prompt is unclear.")  # S1 Appendix H


def test_diverse_responses_see_all_earlier_ones(tmp_path, capsys, policy):
    prompts = [{"id": "a", "prompt": "hi"}, {"id": "b", "prompt": [
        {"role": "system", "content": "Be kind"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]}]
    (tmp_path / "long").mkdir()
    long = longer_policy(tmp_path / "long", 2048)
    rows, printed = run(tmp_path, capsys, long, prompts, "--diverse", "--n", "3")
    assert (printed["responses"], printed["skipped_context_too_long"]) == (6, 0)
    plain, _ = run(tmp_path, capsys, long, prompts, "--n", "3", out="plain.jsonl")
    for row, alone, given in zip(rows, plain, prompts):
        texts = [response["text"] for response in row["responses"]]
        assert row["prompt"] == alone["prompt"]  # x alone
        assert row["responses"][0] == alone["responses"][0] and row["responses"][1] != alone["responses"][1]
        # the conversations, typed out as prompts of the same id: a plain run's sample k there is the diverse y_k
        turns = list(row["prompt"])
        for k in (1, 2):
            turns += [{"role": "assistant", "content": texts[k - 1]}, {"role": "user", "content": Z}]
            by_hand, _ = run(tmp_path, capsys, long, [{"id": given["id"], "prompt": turns}], "--n", "3",
                             out=f"{given['id']}{k}.jsonl", name=f"{given['id']}{k}.prompts")
            assert by_hand[0]["responses"][k] == row["responses"][k]


def longer_policy(folder, positions, seed=0):
    """The tests' policy with another context length."""
    model = make_policy(folder, seed)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def test_diverse_with_the_prompt_alone(tmp_path, capsys, policy):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows, _ = run(tmp_path, capsys, policy, [{"id": "p", "prompt": turns}], "--diverse", "--n", "3", "--max-tokens", "8",
                  "--diverse-context", "prompt-only")
    asked = [*turns[:2], {"role": "user", "content": f"c\n\n{Z}"}]
    by_hand, _ = run(tmp_path, capsys, policy, [{"id": "p", "prompt": asked}], "--n", "3", "--max-tokens", "8", out="by_hand.jsonl")
    assert rows[0]["responses"][1:] == by_hand[0]["responses"][1:] and rows[0]["responses"][0] != by_hand[0]["responses"][0]
    assert rows[0]["prompt"] == turns


def test_a_conversation_beyond_the_context_is_skipped_and_counted(tmp_path, capsys, policy):
    # 512 positions, a byte each, and 12 to write: z alone takes 276 of them, so the third conversation is too long for both
    # prompts and the second for the long one
    rows, printed = run(tmp_path, capsys, policy, [{"id": "a", "prompt": "hi"}, {"id": "b", "prompt": "x" * 300}], "--diverse")
    assert [len(row["responses"]) for row in rows] == [2, 1]
    assert (printed["responses"], printed["skipped_context_too_long"], printed["skipped_too_long"]) == (3, 5, 0)
    _, again = run(tmp_path, capsys, policy, [{"id": "a", "prompt": "hi"}, {"id": "b", "prompt": "x" * 300}], "--diverse")
    assert (again["resumed_rows"], again["skipped_context_too_long"]) == (2, 5)


@pytest.mark.parametrize("flags", [["--n", "2"], ["--n", "2", "--diverse", "--diverse-context", "prompt-only"]], ids=["plain", "diverse"])
def test_shards_make_up_the_whole_file_however_many_and_though_one_was_killed(tmp_path, capsys, policy, small_windows, flags):
    run(tmp_path, capsys, policy, PROMPTS, *flags, out="whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in whole] == [row["id"] for row in PROMPTS]
    for count in (1, 2, 3):
        lines = []
        for i in range(count):
            out, shard = tmp_path / f"{i}of{count}.jsonl", ["--shard", f"{i}/{count}"]
            run(tmp_path, capsys, policy, PROMPTS, *flags, *shard, out=out.name)
            if i == count - 1:  # killed in its first window, or with a torn line behind it
                out.write_bytes(out.read_bytes()[:len(out.read_bytes()) * 2 // 3])
                _, printed = run(tmp_path, capsys, policy, PROMPTS, *flags, *shard, out=out.name)
                assert printed["resumed_rows"] < printed["rows"]
            lines.append(out.read_text().splitlines())
        assert sorted(line for shard in lines for line in shard) == sorted(whole)
        assert [len(shard) for shard in lines] == {1: [11], 2: [7, 4], 3: [4, 4, 3]}[count]
    assert "--shard 3/4: expected at most one shard per window of 4 rows" in refused(tmp_path, capsys, policy, PROMPTS, *flags,
                                                                                     "--shard", "3/4", out="none.jsonl")


# ---- DPO-Mix-P's mixture

@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("reference"), seed=1)


def mixture(reference, a, b):
    return ["--mix-ref", reference, "--mix-weights", str(a), str(b)]


def test_a_mixture_token_by_token(tmp_path, capsys, policy, reference, tokenizer):
    # without caches, padding or batches: both models over the whole text, mixed in float64, then the oracle's draw
    from transformers import AutoModelForCausalLM
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in (policy, reference)]
    for a, b, flags in ((1.5, -0.5, ["--max-tokens", "30"]), (0.5, 0.5, ["--temperature", "1", "--top-p", ".9", "--top-k", "40"])):
        rows, printed = run(tmp_path, capsys, policy, PROMPTS[:6], *mixture(reference, a, b), *flags, out=f"{a}.jsonl")
        assert printed["responses"] == 6  # one each
        temperature, top_p, top_k = (0.7, 1.0, 0) if a == 1.5 else (1.0, 0.9, 40)
        for row in rows:
            ids, sampled = generate.prompt_ids(tokenizer, row["prompt"]), []
            for uniform in generate.draws(0, row["id"], 0, 30 if a == 1.5 else 12):
                with torch.no_grad():
                    logits = [model(torch.tensor([ids + sampled])).logits[0, -1].double().numpy() for model in models]
                sampled.append(oracle(a * logits[0] + b * logits[1], uniform, temperature, top_p, top_k))
                if sampled[-1] == tokenizer.eos_token_id:
                    break
            assert row["responses"][0]["token_ids"] == [token for token in sampled if token != tokenizer.eos_token_id]


def test_a_mixture_ignores_its_batch(tmp_path, capsys, policy, reference):
    assert len({len(row["prompt"][0]["content"]) for row in PROMPTS[:4]}) == 4  # unlike lengths, padded on the left
    texts = []
    for size in ("1", "4"):
        run(tmp_path, capsys, policy, PROMPTS, *mixture(reference, 1.5, -0.5), "--batch-size", size, "--n", "2", out=f"{size}.jsonl")
        texts.append((tmp_path / f"{size}.jsonl").read_text())
    assert texts[0] == texts[1]


def test_a_reference_with_absolute_positions_ignores_the_padding(tmp_path, capsys, policy):
    from transformers import GPT2Config, GPT2LMHeadModel  # rotary positions would hide a shift
    tokenizer = make_tokenizer(tmp_path / "gpt2")
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=64, n_layer=2, n_head=2, initializer_range=0.3,
                               tie_word_embeddings=False)).save_pretrained(tmp_path / "gpt2")
    for size in ("1", "4"):
        run(tmp_path, capsys, policy, PROMPTS, *mixture(str(tmp_path / "gpt2"), 0.5, 0.5), "--batch-size", size, out=f"{size}.jsonl")
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "4.jsonl").read_text()


def test_weights_of_one_model_alone_and_mixtures_of_one_model_are_plain_sampling(tmp_path, capsys, policy, reference):
    settings = ["--n", "2", "--temperature", "0.7", "--top-p", "0.9", "--top-k", "50"]
    plain, _ = run(tmp_path, capsys, policy, PROMPTS, *settings, out="plain.jsonl")
    for name, a, b in ((reference, 1, 0), (policy, 1.5, -0.5), (policy, 0.5, 0.5)):
        run(tmp_path, capsys, policy, PROMPTS, *settings, *mixture(name, a, b), "--overwrite")
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    mixed, _ = run(tmp_path, capsys, policy, PROMPTS, *settings, *mixture(reference, 0.5, 0.5), "--overwrite")
    assert all(a["responses"] != b["responses"] for a, b in zip(mixed, plain))
    other, _ = run(tmp_path, capsys, reference, PROMPTS, *settings, out="other.jsonl")  # all weight on the other model
    swapped, _ = run(tmp_path, capsys, policy, PROMPTS, *settings, *mixture(reference, 0, 1), "--overwrite")
    assert [[response["token_ids"] for response in row["responses"]] for row in swapped] == [
        [response["token_ids"] for response in row["responses"]] for row in other]


def test_padded_embeddings_change_no_token(tmp_path, capsys, policy, reference):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for name, source, rows, fill in (("policy", policy, 272, 40.0), ("reference", reference, 264, -40.0)):
        model = AutoModelForCausalLM.from_pretrained(source)
        vocabulary = model.config.vocab_size
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():  # rows of another scale would be drawn if anything let them
            model.lm_head.weight[vocabulary:] = model.lm_head.weight[:rows - vocabulary] * fill
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / name)
    rows, _ = run(tmp_path, capsys, policy, PROMPTS, *mixture(reference, 1.5, -0.5))
    padded, _ = run(tmp_path, capsys, str(tmp_path / "policy"), PROMPTS, *mixture(str(tmp_path / "reference"), 1.5, -0.5),
                    out="padded.jsonl")
    assert [row["responses"][0]["token_ids"] for row in padded] == [row["responses"][0]["token_ids"] for row in rows]


def test_a_reference_with_another_vocabulary_or_a_shorter_context(tmp_path, capsys, policy):
    other = make_policy(tmp_path / "other", seed=1)
    vocabulary = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] = {token: 255 - i for token, i in vocabulary["model"]["vocab"].items()}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(vocabulary))
    err = refused(tmp_path, capsys, policy, PROMPTS, *mixture(other, 0.5, 0.5))
    assert f"{other}: its tokenizer has another vocabulary than that of {policy}" in err and not (tmp_path / "out.jsonl").exists()
    short = longer_policy(tmp_path / "short", 64)
    _, printed = run(tmp_path, capsys, policy, [{"prompt": "hi"}, {"prompt": "x" * 40}], *mixture(short, 0.5, 0.5))
    assert (printed["rows"], printed["skipped_too_long"]) == (1, 1)


# ---- S3's sampled beams

def test_sampled_beams_are_transformers_own_and_ignore_the_other_prompts(tmp_path, capsys, policy, tokenizer):
    from transformers import AutoModelForCausalLM
    rows, printed = run(tmp_path, capsys, policy, PROMPTS, "--num-beams", "3")
    assert (printed["responses"], printed["rows"]) == (11, 11)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    for row in rows:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        torch.manual_seed(generate.stable_hash(0, "generate", row["id"], 0) % 2**63)
        output = model.generate(**ids, do_sample=True, num_beams=3, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=12)
        output = output[0, ids["input_ids"].shape[1]:].tolist()
        assert row["responses"][0]["token_ids"] == (output + [tokenizer.eos_token_id])[:(output + [tokenizer.eos_token_id]).index(
            tokenizer.eos_token_id)]
    run(tmp_path, capsys, policy, PROMPTS[:3:-1], "--num-beams", "3", out="others.jsonl", name="others.prompts")
    assert read_rows(tmp_path / "others.jsonl")[::-1] == rows[4:]
    plain, _ = run(tmp_path, capsys, policy, PROMPTS, "--n", "1", "--temperature", "1", "--top-p", "1", out="plain.jsonl")
    two, _ = run(tmp_path, capsys, policy, PROMPTS, "--num-beams", "3", "--n", "2", out="two.jsonl")
    assert [row["responses"][:1] for row in two] == [row["responses"] for row in rows]
    for a, b in ((rows, plain), (rows, [{"responses": row["responses"][1:]} for row in two])):
        assert sum(x["responses"][0]["token_ids"] != y["responses"][0]["token_ids"] for x, y in zip(a, b)) > 8


# ---- attention, reports

def test_a_soft_cap_on_attention_is_kept(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
    tokenizer = make_tokenizer(tmp_path / "gemma")
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=32, max_position_embeddings=512, attn_logit_softcapping=0.5,
                          query_pre_attn_scalar=1, initializer_range=0.3, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
                          bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    Gemma2ForCausalLM(config).float().save_pretrained(tmp_path / "gemma")
    model = str(tmp_path / "gemma")
    rows, _ = run(tmp_path, capsys, model, PROMPTS, "--greedy")
    doubled, _ = run(tmp_path, capsys, model, PROMPTS, "--top-p", "1", "--n", "1", *mixture(model, 0.5, 0.5), out="mixed.jsonl")
    plain, _ = run(tmp_path, capsys, model, PROMPTS, "--top-p", "1", "--n", "1", out="plain.jsonl")
    assert doubled == plain  # the reference has the cap as well
    firsts = {}
    for attention in ("eager", "sdpa"):
        loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).eval()
        with torch.no_grad():
            firsts[attention] = [loaded(torch.tensor([generate.prompt_ids(tokenizer, row["prompt"])])).logits[0, -1].argmax().item()
                                 for row in rows]
    found = [(row["responses"][0]["token_ids"] + [tokenizer.eos_token_id])[0] for row in rows]
    assert found == firsts["eager"] != firsts["sdpa"]


@pytest.mark.parametrize("text, preamble, header", [
    ("Here's another response:\nHi", 1, 0), ("Sure, here is a different take on it. Hi", 1, 0), ("Here’s an alternative: hi", 1, 0),
    ("**Sure!** Here is a completely different answer:", 1, 0), ("Another response:\n\nHi", 1, 0), ("Alternative version 2: Hi", 1, 0),
    ("Here is the recipe you asked for:", 0, 0), ("Sure, I can help with another one.", 0, 0), ("There is another way.", 0, 0),
    ("Another day, another dollar: a saying", 0, 0), ("assistant\n\nHi", 0, 1), ("\n<|assistant|>\nHi", 0, 1), ("Assistant:\nHi", 0, 1),
    ("The assistant\nsaid", 0, 0), ("assistant professors are", 0, 0)])
def test_what_counts_as_a_preamble_or_a_role_header(text, preamble, header):
    assert (bool(generate.PREAMBLE.match(text)), bool(generate.ROLE_HEADER.match(text))) == (bool(preamble), bool(header))


def test_equal_samples_quantiles_and_special_tokens_are_reported(tmp_path, capsys, policy):
    path = write_rows(tmp_path / "prompts.jsonl", [*PROMPTS, {"id": "s", "prompt": "say <|im_end|> twice: <|im_end|>"}])
    flags = ["--model", policy, "--prompts", path, *HF, "--n", "2"]
    generate.main(generate.parse_args([*flags, "--out", str(tmp_path / "cold.jsonl"), "--temperature", "1e-4"]))
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert (report["prompts_with_equal_samples"], report["equal_samples_share"], report["prompts_with_special_tokens"]) == (12, 1.0, 1)
    assert "100.0% of the prompts have 2 equal samples at temperature 0.0001" in printed.err
    assert "1 prompts hold one of the tokenizer's special tokens as text" in printed.err
    generate.main(generate.parse_args([*flags, "--out", str(tmp_path / "hot.jsonl"), "--temperature", "1.5", "--top-p", "1",
                                       "--max-tokens", "60"]))
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert report["equal_samples_share"] == 0 and "equal samples" not in printed.err
    responses = [response for row in read_rows(tmp_path / "hot.jsonl") for response in row["responses"]]
    lengths = sorted(response["tokens"] for response in responses)
    assert len(lengths) == 24 and report["tokens"] == sum(lengths)
    # between the ranks 5 and 6, 11 and 12, 17 and 18 of 24, counted from 0
    assert report["tokens_min_25_50_75_max"] == [lengths[0], 0.25 * lengths[5] + 0.75 * lengths[6], (lengths[11] + lengths[12]) / 2,
                                                 0.75 * lengths[17] + 0.25 * lengths[18], lengths[-1]]
    cut = sum(response["finish"] == "length" for response in responses)
    assert 0 < cut < 24 and (report["truncated"], report["truncated_share"]) == (cut, round(cut / 24, 4))
    meta = json.loads((tmp_path / "hot.meta.json").read_text())
    assert meta["counts"]["truncated_share"] == report["truncated_share"] and meta["counts"]["prompts_with_special_tokens"] == 1
