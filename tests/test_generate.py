"""
generate.py: exact sampling that ignores its batch, runs that can be killed, and imports.

Covers  sample_tokens against a float64 oracle and by frequencies; greedy against transformers' own; independence of
        batch, order, --limit and shards; resume after a torn line and after kill -9; other arguments refused; ids,
        finish and text; presets; the importers `rows` and `ultrafeedback_binarized`.
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
from conftest import REPO, read_rows, write_rows
from generate import sample_tokens


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


@pytest.mark.parametrize("logits, temperature, expected", [
    ((3.0, 1.0, -1.5), 1.0, (0.872262, 0.118048, 0.009690)), ((3.0, 1.0, -1.5), 0.7, (0.944245, 0.054230, 0.001525)),
    ((1.0, 1.0, 1.5), 1.0, (0.274069, 0.274069, 0.451863)), ((1.0, 1.0, 1.5), 0.7, (0.247358, 0.247358, 0.505284))])
def test_frequencies_over_a_grid_of_uniforms(logits, temperature, expected):
    # METHODS.md 10's mixed logits: over an even grid of u, shares are the probabilities to within one step of the grid
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = sample_tokens(torch.tensor([logits]).expand(count, 3), grid, temperature, 1.0, 0)
    assert (tokens.bincount(minlength=3) / count).tolist() == pytest.approx(expected, abs=1.5 / count)


@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 1.0, 0), (0.7, 0.9, 0), (0.7, 0.9, 4)])
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
    # 192 rows are three windows of 64; the process dies once the first window is on disk
    prompts = [{"id": f"k{k}", "prompt": f"prompt {k}"} for k in range(192)]
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
    assert out.read_bytes() == whole and printed["resumed_rows"] in (64, 128)


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


def test_a_flag_that_would_do_nothing_is_refused(capsys):
    sampling, importing = ["--model", "m", "--prompts", "p", "--out", "o"], ["--import-format", "rows", "--import-data",
                                                                             "d", "--out", "o"]
    for flags in ([*sampling, "--greedy", "--n", "2"], [*sampling, "--greedy", "--seed", "1"],
                  [*sampling, "--greedy", "--temperature", "1"],
                  [*sampling, "--backend", "vllm", "--batch-size", "2"],
                  [*sampling, "--backend", "hf", "--tensor-parallel", "2"],
                  [*sampling, "--import-data", "d"], [*sampling, "--temperature", "0"], [*sampling, "--top-p", "0"],
                  [*sampling, "--top-p", "1.1"],
                  [*sampling, "--top-k", "-1"], [*sampling, "--n", "0"], [*importing, "--model", "m"],
                  [*importing, "--seed", "1"],
                  [*importing, "--greedy"], [*importing, "--import-split", "s"], ["--out", "o"],
                  ["--model", "m", "--out", "o"],
                  # vLLM takes at most 2, and says so only once the model is loaded
                  [*sampling, "--backend", "vllm", "--temperature", "3"]):
        with pytest.raises(SystemExit) as exit_status:
            generate.parse_args(flags)
        assert exit_status.value.code == 2, flags
    assert capsys.readouterr().err.count("error:") == 18


# ---- import

def import_file(tmp_path, capsys, data, form="rows", *flags, out="off.jsonl"):
    generate.main(generate.parse_args(["--import-format", form, "--import-data", str(data), "--out",
                                       str(tmp_path / out), *flags]))
    return read_rows(tmp_path / out), json.loads(capsys.readouterr().out.splitlines()[-1])


def import_refused(tmp_path, capsys, data, form="rows"):
    with pytest.raises(SystemExit) as exit_status:
        import_file(tmp_path, capsys, data, form)
    assert exit_status.value.code == 2 and not (tmp_path / "off.jsonl").exists()
    return capsys.readouterr().err


def test_rows_in_both_forms(tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [
        {"prompt": "one", "response": "a", "model": "m1", "answer": "1"},
        {"id": 7, "prompt": "two", "responses": ["b", {"text": "c", "model": "m2"}]},
        {"prompt": [{"role": "user", "content": "one"}], "response": "d", "model": "m3"}])
    rows, printed = import_file(tmp_path, capsys, data)
    unknown = {"finish": None, "tokens": None, "token_ids": None, "tokenizer": None, "scores": None}
    one = hashlib.sha256(b'[{"content": "one", "role": "user"}]').hexdigest()[:16]
    assert rows == [
        {"prompt": [{"role": "user", "content": "one"}], "answer": "1", "id": one, "responses": [
            {"text": "a", "source": "off", "model": "m1", **unknown},
            {"text": "d", "source": "off", "model": "m3", **unknown}]},
        {"prompt": [{"role": "user", "content": "two"}], "id": "7", "responses": [
            {"text": "b", "source": "off", "model": None, **unknown},
            {"text": "c", "source": "off", "model": "m2", **unknown}]}]
    assert (printed["rows"], printed["responses"], printed["rows_merged_into_others"]) == (2, 4, 1)
    on, _ = import_file(tmp_path, capsys, data, "rows", "--source", "on", "--limit", "1", out="on.jsonl")
    assert len(on) == 1 and [response["source"] for response in on[0]["responses"]] == ["on", "on"]


def test_the_demo_data_imports(tmp_path, capsys):
    rows, printed = import_file(tmp_path, capsys, REPO / "data" / "demo_train.jsonl")
    lines = (REPO / "data" / "demo_train.jsonl").read_text().splitlines()
    assert len(rows) == len(lines) == printed["rows"] and all(len(row["responses"]) >= 2 for row in rows)


ULTRA = [{"prompt": "x", "prompt_id": f"id{k % 3}", "score_chosen": 8.0 + k, "score_rejected": 5.5,
          "chosen": [{"role": "user", "content": f"q{k % 3}"}, {"role": "assistant", "content": f"good {k}"}],
          "rejected": [{"role": "user", "content": f"q{k % 3}"}, {"role": "assistant", "content": f"bad {k}"}]}
         for k in range(4)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ultrafeedback_binarized(tmp_path, capsys, kind):
    data = tmp_path / f"train_prefs.{kind}"
    if kind == "jsonl":
        write_rows(data, ULTRA)
    else:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ULTRA), data)
    rows, printed = import_file(tmp_path, capsys, data, "ultrafeedback_binarized")
    assert [row["id"] for row in rows] == ["id0", "id1", "id2"] and printed["rows_merged_into_others"] == 1
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": f"q{k}"}] for k in range(3)]
    assert [response["text"] for response in rows[0]["responses"]] == ["good 0", "bad 0", "good 3", "bad 3"]
    assert [response["scores"] for response in rows[0]["responses"]] == [{"ultrafeedback": score}
                                                                         for score in (8.0, 5.5, 11.0, 5.5)]
    assert {response["source"] for row in rows for response in row["responses"]} == {"off"}


@pytest.mark.parametrize("change, sentence", [
    (lambda row: row.pop("rejected"), ":3: expected the key 'rejected'"),
    (lambda row: row["rejected"][0].update(content="another"), ":3: chosen and rejected answer different prompts"),
    (lambda row: row["chosen"].pop(), ":3: expected chosen to be messages that end with the assistant's"),
    (lambda row: row.update(chosen="text"), ":3: expected chosen to be messages that end with the assistant's"),
    (lambda row: row.update(chosen=["a", "b"]), ":3: expected chosen to be messages that end with the assistant's"),
    (lambda row: row["chosen"][1].update(content=None), ":3: expected a response in text"),
])
def test_bad_rows_of_ultrafeedback(tmp_path, capsys, change, sentence):
    rows = json.loads(json.dumps(ULTRA))
    change(rows[2])
    err = import_refused(tmp_path, capsys, write_rows(tmp_path / "bad.jsonl", rows), "ultrafeedback_binarized")
    assert f"bad.jsonl{sentence}" in err and err.count("\n") == 1


@pytest.mark.parametrize("row, sentence", [
    ({"prompt": "q"}, ':2: expected "response" or a list "responses", found prompt'),
    ({"response": "a"}, ":2: expected the key 'prompt'"),
    ({"prompt": "q", "response": None}, ":2: expected a response in text"),
    ({"prompt": "q", "responses": []}, ':2: expected "response" or a list'),
    ({"prompt": "q", "responses": [{"model": "m"}]}, ":2: expected a response in text"),
    ({"prompt": [{"role": "assistant", "content": "q"}], "response": "a"},
     ":2: expected a prompt that ends with a user turn"),
    ({"id": "same", "prompt": "other", "response": "a"}, "the id same stands for two prompts"),
])
def test_bad_rows_to_import(tmp_path, capsys, row, sentence):
    data = write_rows(tmp_path / "bad.jsonl", [{"id": "same", "prompt": "q", "response": "a"}, row])
    assert f"{sentence}" in import_refused(tmp_path, capsys, data)


def test_a_parquet_file_that_is_none(tmp_path, capsys):
    (tmp_path / "bad.parquet").write_text("no parquet")
    assert "bad.parquet: expected a parquet file" in import_refused(tmp_path, capsys, tmp_path / "bad.parquet",
                                                                    "ultrafeedback_binarized")
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"chosen": "a"}]), tmp_path / "short.parquet")
    err = import_refused(tmp_path, capsys, tmp_path / "short.parquet", "ultrafeedback_binarized")
    assert "short.parquet: expected the column 'rejected', found chosen" in err
