"""
generate.py: exact sampling that does not depend on the batch, and runs that can be killed.

Covers  sample_tokens against a float64 oracle and by frequencies; greedy against transformers' own; equal
        rows whatever batch, order, --limit and shards; kill -9 at random moments, torn lines, a full disk,
        two processes on one file, what is refused when a run goes on; ids, finish and text; presets;
        switches of the template, the prompt's ids, days, rejected roles, reasoning; models that are refused;
        what vllm is given, by a stand-in; rows of a wrong shape, generated from Row; soft-capped attention;
        what the last line reports.
Run     python -m pytest tests/test_generate.py
"""

import datetime
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import CHATML, REPO, make_policy, read_rows, write_rows
from models import make_gemma
from safetensors.torch import load_file, save_file
from test_shapes import MISSING, NUMBERS, STRINGS, VALUES, admits, key_of, places, spelled, with_change

import generate
import loading
from chat import read_chat
from generate import sample_tokens
from loading import fingerprint, load_tokenizer


def oracle(logits, uniform, temperature, top_p, top_k):
    """One token, in float64: temperature, top-k, top-p, inverse of the cumulative distribution.

    The best tokens come first where something is cut off; else the vocabulary's order stays.
    """
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


@pytest.mark.parametrize(
    "temperature, top_p, top_k",
    [
        (1.0, 1.0, 0),
        (0.7, 0.9, 0),
        (0.7, 0.9, 50),
        (0.6, 1.0, 50),
        (2.0, 0.95, 0),
        (3.0, 0.5, 7),
        (1.0, 1.0, 1),
        (0.3, 0.01, 0),
        (1.0, 0.9, 1000),
    ],
)
def test_tokens_are_those_of_the_float64_oracle(temperature, top_p, top_k):
    logits = normal_logits(400, 300, 2.0)
    uniforms = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = sample_tokens(logits, uniforms, temperature, top_p, top_k)
    assert tokens.tolist() == [
        oracle(*pair, temperature, top_p, top_k) for pair in zip(logits.numpy(), uniforms.numpy())
    ]


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_flat_distributions_over_a_large_vocabulary(spread):
    # nearly uniform, the 1024 candidates hold a fifth of the mass, and the whole vocabulary is sorted;
    # peaked, they suffice
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


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1.0, 1.0, 0), (3.0, 1.0, 0), (0.7, 0.9, 0), (0.7, 0.9, 4)]
)
def test_frequencies_of_draws_pass_a_chi_square_test(temperature, top_p, top_k):
    logits = normal_logits(1, 12, 1.5, seed=4)
    count = 20_000
    # as the third step uses them
    uniforms = torch.tensor(np.stack([generate.draws(0, f"p{k}", 0, 3) for k in range(count)]))[:, 2]
    tokens = sample_tokens(logits.expand(count, 12), uniforms, temperature, top_p, top_k)
    drawn = tokens.bincount(minlength=12).double()
    # the distribution by its definition, not by sampling: keep the best tokens, renormalise
    kept = logits[0].double().div(temperature).sort(descending=True)
    probabilities = kept.values[: top_k or 12].softmax(-1)
    probabilities = probabilities[: int((probabilities.cumsum(-1) < top_p).sum()) + 1]
    expected = torch.zeros(12, dtype=torch.float64).scatter(
        0, kept.indices[: len(probabilities)], probabilities / probabilities.sum()
    )
    assert drawn[expected == 0].sum() == 0
    inside = expected > 0
    chi_square = ((drawn - count * expected)[inside] ** 2 / (count * expected[inside])).sum().item()
    assert chi_square < 31.3  # the 99.9 % quantile at 11 degrees of freedom, the most there are here


def test_a_row_ignores_the_others_of_its_batch():
    # one flat row forces the whole vocabulary to be sorted for all: the peaked rows must draw the same tokens
    logits = torch.cat([normal_logits(20, 3000, 6.0, seed=5), normal_logits(1, 3000, 0.01, seed=6)])
    uniforms = torch.rand(21, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    together = sample_tokens(logits, uniforms, 0.7, 0.9, 0).tolist()
    assert together == [
        sample_tokens(logits[k : k + 1], uniforms[k : k + 1], 0.7, 0.9, 0).item() for k in range(21)
    ]
    assert sample_tokens(logits.flip(0), uniforms.flip(0), 0.7, 0.9, 0).tolist() == together[::-1]


def test_draws_depend_on_seed_prompt_and_sample():
    base = generate.draws(0, "p", 0, 100)
    assert base.dtype == np.float64 and 0 <= base.min() and base.max() < 1 and len(set(base)) == 100
    shorter = generate.draws(0, "p", 0, 50)
    assert (shorter == base[:50]).all()  # a longer --max-tokens begins with the same draws
    for parts in ((1, "p", 0), (0, "q", 0), (0, "p", 1)):
        assert not np.isclose(generate.draws(*parts, 100), base).any()


# ----- whole runs
PROMPTS = [
    {"id": f"p{k}", "prompt": [{"role": "user", "content": f"Tell me {'more ' * (k % 4)}{k}"}], "note": k}
    for k in range(11)
]
HF = ["--backend", "hf", "--dtype", "float32", "--max-tokens", "12"]


def run(tmp_path, capsys, model, rows, *flags, out="out.jsonl", name="prompts.jsonl"):
    """(rows of the output, the last line as JSON)."""
    path = write_rows(tmp_path / name, rows)
    flags = ["--model", model, "--prompts", path, "--out", str(tmp_path / out), *HF, *flags]
    generate.main(generate.parse_args(flags))
    return read_rows(tmp_path / out), json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def tokenizer(policy):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(policy)


@pytest.fixture()
def small_blocks(monkeypatch):
    monkeypatch.setattr(generate, "BLOCK", 4)


def test_greedy_is_transformers_own(tmp_path, capsys, policy, tokenizer):
    from transformers import AutoModelForCausalLM

    rows, printed = run(tmp_path, capsys, policy, PROMPTS, "--greedy")
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    for row in rows:
        ids = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, do_sample=False, temperature=None, top_p=None, max_new_tokens=12)
        output = output[0, ids["input_ids"].shape[1] :].tolist()
        if tokenizer.eos_token_id in output:
            output = output[: output.index(tokenizer.eos_token_id)]
        (response,) = row["responses"]
        assert response["token_ids"] == output
    assert printed["responses"] == printed["rows"] == 11


def test_responses_hold_what_was_sampled(tmp_path, capsys, policy, tokenizer):
    flags = "--temperature 1.5 --top-p 1 --max-tokens 60".split()
    rows, printed = run(tmp_path, capsys, policy, PROMPTS, *flags)
    responses = [response for row in rows for response in row["responses"]]
    for response in responses:
        ids = response["token_ids"]
        assert tokenizer.eos_token_id not in ids and len(ids) == response["tokens"] <= 60
        assert tokenizer.decode(ids, skip_special_tokens=True) == response["text"]
        assert response["finish"] == ("length" if len(ids) == 60 else "stop")
        assert (response["source"], response["model"]) == ("on", policy)
        assert response["tokenizer"] == fingerprint(tokenizer)
    finishes = [response["finish"] for response in responses]
    assert finishes.count("stop") > 3 and finishes.count("length") > 3  # both ends are seen
    assert [row["note"] for row in rows] == list(range(11))
    assert {len(row["responses"]) for row in rows} == {4}
    assert (printed["responses"], printed["truncated"]) == (44, finishes.count("length"))
    assert printed["tokens_sampled"] == sum(response["tokens"] for response in responses)
    assert printed["prompts_with_equal_samples"] == 0


def test_the_first_token_follows_our_temperature_and_not_the_models(tmp_path, capsys, policy, tokenizer):
    # generation_config.json asks for temperature .1; at 1 the first tokens have the model's own distribution
    from transformers import AutoModelForCausalLM

    assert json.loads(open(f"{policy}/generation_config.json").read())["temperature"] == 0.1
    prompt = PROMPTS[:1]
    flags = "--temperature 1 --top-p 1 --max-tokens 1 --n 2000 --batch-size 500".split()
    rows, _ = run(tmp_path, capsys, policy, prompt, *flags)
    ids = tokenizer.apply_chat_template(
        prompt[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(policy)(**ids).logits[0, -1].double().softmax(-1)
    first = [(response["token_ids"] + [tokenizer.eos_token_id])[0] for response in rows[0]["responses"]]
    shares = torch.tensor(first).bincount(minlength=len(expected)) / 2000
    cold = (expected.log() / 0.1).softmax(-1)
    assert (shares - expected).abs().max() < 4 * 0.5 / 2000**0.5 and (cold - expected).abs().max() > 0.2
    # total variation: small against the distribution asked for, large against generation_config.json's
    assert (shares - expected).abs().sum() / 2 < 0.15 < 0.3 < (shares - cold).abs().sum() / 2


def test_samples_ignore_batch_size_order_limit_and_shards(tmp_path, capsys, policy, small_blocks):
    whole, _ = run(tmp_path, capsys, policy, PROMPTS, "--n", "2", out="whole.jsonl")
    text = (tmp_path / "whole.jsonl").read_text()
    run(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--batch-size", "3", out="batches.jsonl")
    assert (tmp_path / "batches.jsonl").read_text() == text
    run(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--limit", "5", out="limit.jsonl")
    assert (tmp_path / "limit.jsonl").read_text().splitlines() == text.splitlines()[:5]
    run(
        tmp_path,
        capsys,
        policy,
        PROMPTS[::-1],
        "--n",
        "2",
        out="reversed.jsonl",
        name="reversed_prompts.jsonl",
    )
    assert (tmp_path / "reversed.jsonl").read_text().splitlines() == text.splitlines()[::-1]
    more, _ = run(tmp_path, capsys, policy, PROMPTS, "--n", "3", out="more.jsonl")
    # a larger --n begins with the same samples
    assert [row["responses"][:2] for row in more] == [row["responses"] for row in whole]
    other, _ = run(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--seed", "1", out="seed.jsonl")
    assert all(a["responses"] != b["responses"] for a, b in zip(other, whole))


def test_shards_make_up_the_whole_file_though_one_was_killed(tmp_path, capsys, policy, small_blocks):
    flags = ["--n", "2"]
    run(tmp_path, capsys, policy, PROMPTS, *flags, out="whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in whole] == [row["id"] for row in PROMPTS]
    for count in (1, 2, 3):
        lines = []
        for i in range(count):
            out, shard = tmp_path / f"{i}of{count}.jsonl", ["--shard", f"{i}/{count}"]
            run(tmp_path, capsys, policy, PROMPTS, *flags, *shard, out=out.name)
            if i == count - 1:  # killed in its first window, or after it with a torn line
                out.write_bytes(out.read_bytes()[: len(out.read_bytes()) * 2 // 3])
                _, printed = run(tmp_path, capsys, policy, PROMPTS, *flags, *shard, out=out.name)
                assert printed["resumed_rows"] < printed["rows"]
            lines.append(out.read_text().splitlines())
        assert sorted(line for shard in lines for line in shard) == sorted(whole)
        assert [len(shard) for shard in lines] == {1: [11], 2: [7, 4], 3: [4, 4, 3]}[count]
    err = refused(tmp_path, capsys, policy, PROMPTS, *flags, "--shard", "3/4", out="none.jsonl")
    assert "--shard 3/4: 11 rows are too few for 4 blocks of 4" in err
    for shard in ("2/2", "-1/2", "x", "1"):
        err = refused(tmp_path, capsys, policy, PROMPTS, f"--shard={shard}", out="none.jsonl")
        assert f"--shard {shard}: expected I/N with 0 <= I < N" in err


def test_several_prompt_files_are_read_as_one(tmp_path, capsys, policy):
    whole, _ = run(tmp_path, capsys, policy, PROMPTS, "--n", "1", out="whole.jsonl")
    rest = write_rows(tmp_path / "rest.jsonl", PROMPTS[4:])
    first = write_rows(tmp_path / "first.jsonl", PROMPTS[:4])
    flags = ["--model", policy, *HF, "--n", "1", "--out", str(tmp_path / "two.jsonl")]
    generate.main(generate.parse_args([*flags, "--prompts", first, rest]))
    assert read_rows(tmp_path / "two.jsonl") == whole
    record = json.loads((tmp_path / "two.meta.json").read_text())
    assert list(record["inputs"]) == [first, rest]
    other = write_rows(tmp_path / "other.jsonl", [PROMPTS[10] | {"prompt": "another"}])
    with pytest.raises(SystemExit):
        generate.main(generate.parse_args([*flags[:-1], str(tmp_path / "x.jsonl"), "--prompts", rest, other]))
    assert f"{other}:1: duplicate id p10, that of {rest}:7; give each row" in capsys.readouterr().err


def test_repeated_prompts_are_dropped_or_named(tmp_path, capsys, policy):
    rows = [{"prompt": "hi"}, {"prompt": "hello", "answer": 1}, {"prompt": "hi"}, PROMPTS[0], PROMPTS[0]]
    sampled, printed = run(tmp_path, capsys, policy, rows, "--n", "1")
    assert [row["prompt"][0]["content"] for row in sampled][:2] == ["hi", "hello"]
    assert printed["rows"] == 3 and printed["dropped"] == {"repeated row": 2}
    err = refused(
        tmp_path, capsys, policy, [*rows, {"prompt": "hello", "answer": 2}], "--n", "1", out="x.jsonl"
    )
    assert (
        "prompts.jsonl:6: duplicate id " in err and "prompts.jsonl:2; give each row an id of its own" in err
    )


# ----- runs that were stopped
def test_a_larger_limit_goes_on(tmp_path, capsys, policy, small_blocks):
    run(tmp_path, capsys, policy, PROMPTS, "--n", "2", out="whole.jsonl")
    run(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--limit", "6")
    _, printed = run(tmp_path, capsys, policy, PROMPTS, "--n", "2")
    assert printed["resumed_rows"] == 4
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    err = refused(tmp_path, capsys, policy, PROMPTS, "--n", "2", "--limit", "6")
    assert "not the row that this run of 6 rows writes there" in err


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_a_torn_file_is_completed_byte_for_byte(tmp_path, capsys, policy, small_blocks, monkeypatch, backend):
    # transformers goes on after a whole block of 4 rows, vllm (here with its place taken) after any whole row
    monkeypatch.setattr(generate, "vllm_sampler", generate.hf_sampler)
    flags = ["--n", "2", "--backend", backend]
    run(tmp_path, capsys, policy, PROMPTS, *flags)
    whole = (tmp_path / "out.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    lengths = [ends[5] + 100, ends[7], ends[0] - 1, len(whole) - 1]
    kept = {"hf": [4, 8, 0, 8], "vllm": [6, 8, 0, 10]}[backend]
    for length, rows in zip(lengths, kept):
        (tmp_path / "out.jsonl").write_bytes(whole[:length])
        _, printed = run(tmp_path, capsys, policy, PROMPTS, *flags)
        assert (tmp_path / "out.jsonl").read_bytes() == whole and printed["resumed_rows"] == rows


def test_a_finished_run_does_nothing(tmp_path, capsys, policy, monkeypatch):
    _, printed = run(tmp_path, capsys, policy, PROMPTS[:3], "--n", "2")
    state = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    path = str(tmp_path / "prompts.jsonl")
    flags = ["--model", policy, "--prompts", path, "--out", str(tmp_path / "out.jsonl"), *HF, "--n", "2"]
    generate.main(generate.parse_args(flags))
    again = capsys.readouterr()
    assert again.err == f"generate.py: --out {tmp_path}/out.jsonl is complete; nothing was done\n"
    assert json.loads(again.out) == {name: value for name, value in printed.items() if name != "seconds"}
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == state
    # killed between its last row and the record of its counts
    record = json.loads((tmp_path / "out.meta.json").read_text())
    del record["counts"]
    (tmp_path / "out.meta.json").write_text(json.dumps(record))
    rows, printed = run(tmp_path, capsys, policy, PROMPTS[:3], "--n", "2")
    assert (len(rows), printed["resumed_rows"], printed["responses"]) == (3, 3, 6)
    assert json.loads((tmp_path / "out.meta.json").read_text())["counts"]["responses"] == 6


# A process that has imported everything and forks for each run, so that a run takes no seconds to start.
DRIVER = """
import importlib.metadata, json, os, random, resource, signal, sys, time
import common, generate
from transformers import AutoModelForCausalLM, GenerationConfig

importlib.metadata.distributions = lambda: []  # reading them takes half a second
generate.BLOCK = 4
flags, out = json.loads(sys.argv[1]), "out.jsonl"

def start(*more, before=None):
    child = os.fork()
    if child == 0:
        try:
            if before:
                before()
            generate.main(generate.parse_args([*flags, *more]))
        except SystemExit as end:
            os._exit(end.code)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def size():
    return os.path.getsize(out) if os.path.exists(out) else 0

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def die_before_the_record():
    common.write_record = die

def slowly():
    append = generate.append_rows
    def append_slowly(*arguments):
        append(*arguments)
        time.sleep(0.3)
    generate.append_rows = append_slowly

def kills():
    # 10 kills in 2 files, at any time or at any size of the file; some lines torn on top
    statuses, lefts = [], []
    status(start("--out", "whole.jsonl"))
    started = time.time()
    statuses.append(status(start("--out", "whole.jsonl", "--overwrite")))
    duration = time.time() - started
    expected = open("whole.jsonl", "rb").read()
    for _ in range(2):
        statuses.append(status(start("--out", out, before=die_before_the_record)))
        for number in range(5):
            target = random.randrange(size(), len(expected))
            child = start("--out", out)
            if number % 2:
                time.sleep(random.uniform(0, duration))
            while number % 2 == 0 and size() <= target and not os.waitid(os.P_PID, child, ended):
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            statuses.append(status(child))
            left = open(out, "rb").read() if os.path.exists(out) else b""
            assert expected.startswith(left)
            lefts.append(len(left))
            if len(left) == len(expected) or left and number % 2:  # torn, as by a kill while it writes
                os.truncate(out, random.randrange(len(left)))
        statuses.append(status(start("--out", out)))
        assert open(out, "rb").read() == expected
        os.unlink(out)
    return statuses, lefts

def two_at_once():
    first = start("--out", out, before=slowly)
    while not size():
        time.sleep(0.01)
    refused = [status(start("--out", out)), status(start("--out", out, "--overwrite"))]
    during = size()
    return refused, status(first), during, size(), os.path.getsize("whole.jsonl")

def full_disk():
    # no file may grow beyond these sizes: not even the record can be written; a row is cut; a later one is
    statuses, expected = [], open("whole.jsonl", "rb").read()
    ends = [i + 1 for i, byte in enumerate(expected) if byte == 10]
    for limit in (10, ends[20] + 10, ends[30] + 10):
        limits = (limit, resource.RLIM_INFINITY)
        before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        statuses.append(status(start("--out", "full.jsonl", before=before)))
        left = open("full.jsonl", "rb").read() if os.path.exists("full.jsonl") else b""
        assert len(left) == (limit if limit > 10 else 0) and expected.startswith(left)
    statuses.append(status(start("--out", "full.jsonl")))
    assert open("full.jsonl", "rb").read() == expected
    return statuses

ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
print(json.dumps([kills(), two_at_once(), full_disk()]))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory, policy):
    """What the driver printed, and its standard error."""
    folder = tmp_path_factory.mktemp("processes")
    prompts = [{"id": f"k{k}", "prompt": f"prompt {k}"} for k in range(40)]
    flags = ["--model", policy, "--prompts", write_rows(folder / "prompts.jsonl", prompts), *HF]
    flags += ["--n", "1", "--max-tokens", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", DRIVER, json.dumps(flags)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_kill_9_at_random_moments(processes):
    """Always the same bytes in the end, which the driver asserts, and never a refusal."""
    ((statuses, lefts), _, _), _ = processes
    # both: killed before the record, 5 kills (0 is a run that was quicker), and a run to the end
    assert statuses[0] == 0 and set(statuses) <= {0, -9} and statuses.count(-9) >= 6
    assert all(statuses[1 + 7 * k] == -9 and statuses[7 + 7 * k] == 0 for k in range(2))
    assert len(lefts) == 10 and len(set(lefts)) > 3  # at different moments


def test_a_second_process_on_one_output_is_refused(processes):
    (_, (refused, first, during, size, whole), _), err = processes
    assert refused == [2, 2] and first == 0 and 0 < during < size == whole
    assert err.count("--out out.jsonl: another process is writing this file") == 2


def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(processes):
    """It ends with the same bytes, which the driver asserts."""
    (_, _, statuses), err = processes
    assert statuses == [2, 2, 2, 0] and "Traceback" not in err
    assert err.count("full.meta.json cannot be written: ") == 1
    reasons = re.findall(r"full.jsonl cannot be written: (.*)", err)
    assert len(reasons) == 2
    assert all(reason.endswith("; run the same command again to resume") for reason in reasons)


def test_the_record_is_there_before_the_first_row(tmp_path, capsys, policy, monkeypatch):
    records, append = [], generate.append_rows

    def spy(file, rows):
        records.append((os.path.getsize(file.name), json.loads((tmp_path / "out.meta.json").read_text())))
        append(file, rows)

    monkeypatch.setattr(generate, "append_rows", spy)
    run(tmp_path, capsys, policy, PROMPTS[:2], "--n", "1")
    size, record = records[0]
    assert size == 0 and record["args"]["n"] == 1 and "counts" not in record
    assert json.loads((tmp_path / "out.meta.json").read_text())["counts"]["rows"] == 2
    # a kill between the two left an empty output, or a record without one: the same command goes on
    for left in (["out.jsonl"], ["out.meta.json"], ["out.jsonl", "out.meta.json"]):
        for name in {"out.jsonl", "out.meta.json"} - set(left):
            (tmp_path / name).unlink()
        if "out.jsonl" in left:
            (tmp_path / "out.jsonl").write_bytes(b"")
        rows, printed = run(tmp_path, capsys, policy, PROMPTS[:2], "--n", "1")
        assert len(rows) == 2 and printed["resumed_rows"] == 0


def refused(tmp_path, capsys, model, rows, *flags, **more):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path, capsys, model, rows, *flags, **more)
    err = capsys.readouterr().err
    assert exit_status.value.code == 2 and "Traceback" not in err
    return err


def test_another_run_is_refused_by_name(tmp_path, capsys, policy):
    run(tmp_path, capsys, policy, PROMPTS[:3], "--n", "2")
    before = (tmp_path / "out.jsonl").read_bytes()
    changes = {
        "n = 2, not 3;": ["--n", "3"],
        "seed = 0, not 1;": ["--n", "2", "--seed", "1"],
        "temperature = 0.7, not 0.8;": ["--n", "2", "--temperature", "0.8"],
        "source = 'on', not 'off';": ["--n", "2", "--source", "off"],
        "shard = '0/1', not '0/2';": ["--n", "2", "--shard", "0/2"],
    }
    for difference, flags in changes.items():
        err = refused(tmp_path, capsys, policy, PROMPTS[:3], *flags)
        assert (
            f"out.jsonl was written with {difference} use another --out, or --overwrite to start over" in err
        )
    err = refused(tmp_path, capsys, policy, PROMPTS[1:4], "--n", "2")
    assert f"out.jsonl was written with {tmp_path}/prompts.jsonl = " in err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    rows, _ = run(tmp_path, capsys, policy, PROMPTS[1:4], "--n", "1", "--overwrite")
    assert [row["id"] for row in rows] == ["p1", "p2", "p3"] and len(rows[0]["responses"]) == 1
    (tmp_path / "out.meta.json").unlink()
    err = refused(tmp_path, capsys, policy, PROMPTS[1:4], "--n", "1")
    assert "out.jsonl exists but its record " in err and "out.meta.json is missing or damaged" in err
    (tmp_path / "out.meta.json").write_text("[1, 2]\n")
    err = refused(tmp_path, capsys, policy, PROMPTS[1:4], "--n", "1")
    assert "out.jsonl exists but its record " in err and "out.meta.json is missing or damaged" in err


def test_rows_that_are_not_those_of_the_run_are_refused(tmp_path, capsys, policy):
    run(tmp_path, capsys, policy, PROMPTS[:3], "--n", "1")
    out = tmp_path / "out.jsonl"
    first, second, third = out.read_text().splitlines(keepends=True)
    remedy = (
        "not the row that this run of 3 rows writes there; use another --out, or --overwrite to start over"
    )
    foreign = {
        first + '{"id": "q", "a": 1}\n': f"{out}:2: {remedy}",
        first + third: f"{out}:2: {remedy}",
        first + "\n" + second: f"{out}:3: {remedy}",  # a blank line would be cut as if it were a row
        first + '{"prompt": "no id"}\n': f"{out}:2: ",
        first + "no JSON\n" + third: f"{out}:2: ",
        first + second + third + third: f"{out}:4: not the row that this run of 3 rows writes there",
    }
    for text, sentence in foreign.items():
        out.write_text(text)
        err = refused(tmp_path, capsys, policy, PROMPTS[:3], "--n", "1")
        assert sentence in err and err.count("\n") == 1
        assert out.read_text() == text


@pytest.mark.parametrize("length", [300, 248])  # of 248 only the record's name is too long: .meta.json.tmp
def test_names_that_are_too_long_for_a_file(tmp_path, capsys, policy, length):
    out = "x" * length + ".jsonl"
    err = refused(tmp_path, capsys, policy, PROMPTS[:2], "--n", "1", out=out)
    assert "File name too long" in err and "x" * length in err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_model_retrained_into_the_same_folder_is_refused(tmp_path, capsys, policy):
    model = tmp_path / "model"
    shutil.copytree(policy, model)
    run(tmp_path, capsys, str(model), PROMPTS[:3], "--n", "1")
    before = (tmp_path / "out.jsonl").read_bytes()
    status = os.stat(model / "model.safetensors")
    os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    err = refused(tmp_path, capsys, str(model), PROMPTS[:3], "--n", "1")
    assert err.count("\n") == 1 and f"out.jsonl was written with {model} = " in err
    os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert f"written with {model} = " in refused(tmp_path, capsys, str(model), PROMPTS[:3], "--n", "1")
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("link", ["out", "prompts", "record", "hidden"])
def test_an_output_that_is_an_input_is_refused(tmp_path, capsys, policy, link):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    write_rows(path, PROMPTS[:2])
    before = path.read_bytes()
    if link == "out":
        out.symlink_to(path)
    elif link == "prompts":
        path.rename(tmp_path / "data.jsonl")
        path.symlink_to(tmp_path / "data.jsonl")
        out = tmp_path / "data.jsonl"
    elif link == "record":
        out = tmp_path / "prompts.json"  # both would have the record prompts.meta.json
    else:
        (tmp_path / "folder").symlink_to(tmp_path)
        out = tmp_path / "folder" / "prompts.jsonl"
    flags = ["--model", policy, "--prompts", str(path), "--out", str(out), *HF, "--overwrite"]
    with pytest.raises(SystemExit):
        generate.main(generate.parse_args(flags))
    assert f"--out {out}: this would overwrite an input file or its record" in capsys.readouterr().err
    assert path.read_bytes() == before and not list(tmp_path.glob("*.meta.json"))


# ----- models that are refused
def spoil_weights(folder, kind):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:-1000])
        return
    if kind == "lacking":
        del tensors[name]
    elif kind == "nan":
        tensors[name][3, 5] = torch.nan
    elif kind == "infinite":
        tensors[name][3, 5] = -torch.inf
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "kind, sentence", [("lacking", "missing weights: model.layers.1.mlp.up_proj.weight"), ("torn", "")]
)
@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_incomplete_weights_are_refused_and_nothing_is_left(
    tmp_path, capsys, policy, vllm, backend, kind, sentence
):
    # vllm itself accepts a model that lacks this tensor, and computes with what is in memory
    model = tmp_path / "model"
    shutil.copytree(policy, model)
    spoil_weights(model, kind)
    err = refused(tmp_path, capsys, str(model), PROMPTS[:2], "--backend", backend)
    assert f": {model}: {sentence}" in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "prompts.jsonl"]


@pytest.mark.parametrize("flags", [["--n", "1"], ["--greedy"]], ids=["sampled", "greedy"])
@pytest.mark.parametrize("kind", ["nan", "infinite"])
def test_weights_that_are_not_finite_are_noticed_by_the_first_logits(
    tmp_path, capsys, policy, small_blocks, kind, flags
):
    model, out = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(policy, model)
    run(tmp_path, capsys, str(model), PROMPTS, *flags)
    lines = out.read_bytes().splitlines(keepends=True)
    status = os.stat(model / "model.safetensors")
    spoil_weights(model, kind)
    os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    # a run that goes on keeps its rows, one that starts over the file that it would replace
    for kept, more in ((lines[:4], []), (lines, ["--overwrite"])):
        out.write_bytes(b"".join(kept))
        record = (tmp_path / "out.meta.json").read_bytes()
        err = refused(tmp_path, capsys, str(model), PROMPTS, *flags, *more)
        assert f"{model}: the first logits are not finite: the weights are damaged" in err
        assert out.read_bytes() == b"".join(kept)
        assert (tmp_path / "out.meta.json").read_bytes() == record
    refused(tmp_path, capsys, str(model), PROMPTS, *flags, out="new.jsonl")
    assert not list(tmp_path.glob("new*"))


def test_folders_that_are_no_model_and_models_that_do_not_fit(tmp_path, capsys, policy):
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), str(tmp_path / "none"), "./none", f"{policy}/config.json"):
        assert f": {name}: " in refused(tmp_path, capsys, name, PROMPTS[:2])
    assert "--model is empty" in refused(tmp_path, capsys, "", PROMPTS[:2])
    plain = make_policy(tmp_path / "plain", template=None)
    err = refused(tmp_path, capsys, plain, PROMPTS[:2])
    assert f"{plain}: no chat template; save one in the model folder as chat_template.jinja" in err
    (tmp_path / "plain" / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    err = refused(tmp_path, capsys, plain, PROMPTS[:2])
    assert f": {plain}: " in err and err.count("\n") == 1
    small = tmp_path / "small"
    shutil.copytree(policy, small)
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 257}
    (small / "config.json").write_text(json.dumps(config))
    err = refused(tmp_path, capsys, str(small), PROMPTS[:2])
    assert f"{small}: the id 257 is beyond the model's 257 embeddings" in err
    config |= {"vocab_size": 259, "intermediate_size": 100}  # other sizes than those of the weights
    (small / "config.json").write_text(json.dumps(config))
    assert refused(tmp_path, capsys, str(small), PROMPTS[:2]).partition(": ")[2].startswith(f"{small}: ")
    unclosed = make_policy(tmp_path / "unclosed", template="{% if messages %}")
    err = refused(tmp_path, capsys, unclosed, PROMPTS[:2])
    assert f"{unclosed}: the chat template rejects it: Unexpected end of template" in err
    assert not list(tmp_path.glob("out*"))


# ----- prompts
def test_prompts_too_long_are_named_and_skipped(tmp_path, capsys, policy):
    rows = [PROMPTS[0], {"id": "long", "prompt": "x" * 500}, PROMPTS[1]]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    flags = ["--model", policy, "--prompts", path, "--out", str(tmp_path / "out.jsonl"), *HF, "--n", "1"]
    generate.main(generate.parse_args(flags))
    printed = capsys.readouterr()
    assert "skipped 1 prompts of more than 500 tokens: long" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["dropped"] == {"too long": 1}
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == ["p0", "p1"]
    err = refused(tmp_path, capsys, policy, rows[1:2], "--n", "1", out="none.jsonl")
    assert f"{path}: no prompt leaves room for 12 tokens in the context of {policy}, which is 512" in err


def test_text_prompts_missing_ids_and_the_record(tmp_path, capsys, policy):
    given = {"prompt": "Grüße", "category": "x", "responses": [{"text": "earlier"}], "labeler": "earlier"}
    rows, _ = run(tmp_path, capsys, policy, [given], "--n", "1")
    canonical = '[{"content": "Grüße", "role": "user"}]'
    assert rows[0]["id"] == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Grüße"}] and rows[0]["category"] == "x"
    assert "labeler" not in rows[0] and len(rows[0]["responses"]) == 1
    record = json.loads((tmp_path / "out.meta.json").read_text())
    assert record["args"]["temperature"] == 0.7 and record["args"]["max_tokens"] == 12
    assert record["counts"]["rows"] == 1
    prompts = tmp_path / "prompts.jsonl"
    assert record["inputs"] == {str(prompts): hashlib.sha256(prompts.read_bytes()).hexdigest()}
    status = os.stat(f"{policy}/model.safetensors")
    assert record["models"][policy]["model.safetensors"] == [status.st_size, status.st_mtime_ns]


class Spy:
    """A sampler that loads no model: it notes the requests, and each response is the byte "a"."""

    def __init__(self, args, tokens, longest):
        Spy.requests = []

    def __call__(self, requests):
        for request in requests:
            Spy.requests.append(request)
            yield request, [64]


def rendered(tmp_path, policy, rows, *flags):
    """The prompts as they are given to the model, as text."""
    path, out = write_rows(tmp_path / "prompts.jsonl", rows), str(tmp_path / "out.jsonl")
    flags = ["--model", policy, "--prompts", path, "--out", out, *HF, "--n", "1", "--overwrite", *flags]
    generate.main(generate.parse_args(flags), Spy)
    tokenizer = load_tokenizer(policy)[0]
    return [tokenizer.decode(request.ids) for request in Spy.requests]


def with_template(folder, policy, template):
    """The policy with another chat template, as whoever has a model without one adds it."""
    shutil.copytree(policy, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_the_chat_template_of_the_folder(tmp_path, policy):
    begin = "{% if add_generation_prompt %}A: {% endif %}"
    turn = "{{ {'assistant': 'A: '}.get(message['role'], 'Q: ') + message['content'] + '<|im_end|>' }}"
    template = "{% for message in messages %}" + turn + "{% endfor %}" + begin
    model = with_template(tmp_path / "model", policy, template)
    texts = rendered(tmp_path, model, [{"prompt": "one"}, {"prompt": "two"}])
    assert texts == ["Q: one<|im_end|>A: ", "Q: two<|im_end|>A: "]
    record = json.loads((tmp_path / "out.meta.json").read_text())
    assert "chat_template.jinja" in record["models"][model]  # it is compared when a run goes on


THINKING = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>' }}{% endif %}"
)


def test_switches_reach_the_template(tmp_path, capsys, policy):
    model = with_template(tmp_path / "model", policy, CHATML + THINKING)
    start = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(tmp_path, model, [{"prompt": "one"}]) == [start]
    off = ["--template-kwargs", '{"enable_thinking": false}']
    assert rendered(tmp_path, model, [{"prompt": "one"}], *off) == [start + "<think></think>"]
    err = refused(tmp_path, capsys, policy, PROMPTS, *off, out="x.jsonl")
    assert f"the chat template of {policy} has no variable 'enable_thinking'" in err


def test_a_template_without_a_system_role(tmp_path, policy):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model = with_template(tmp_path / "model", policy, refusing + CHATML)
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "one"}]
    texts = rendered(tmp_path, model, [{"prompt": messages}])
    assert texts == ["<|im_start|>user\nBe kind\n\none<|im_end|>\n<|im_start|>assistant\n"]


def test_two_beginnings_of_text_are_refused(tmp_path, capsys, policy):
    model = with_template(tmp_path / "model", policy, "{{ bos_token }}" + CHATML)
    err = refused(tmp_path, capsys, model, PROMPTS)
    assert f"{model}: a rendered chat begins with two tokens that begin a text" in err


def test_the_prompt_as_sampled_is_in_the_row(tmp_path, capsys, policy, tokenizer):
    earlier = {**PROMPTS[0], "prompt_token_ids": [1], "prompt_tokenizer": "another"}
    rows, _ = run(tmp_path, capsys, policy, [earlier, *PROMPTS[1:]], "--n", "1")
    options = {"add_generation_prompt": True, "return_dict": False}
    for row in rows:
        assert row["prompt_token_ids"] == tokenizer.apply_chat_template(row["prompt"], **options)
        assert row["prompt_tokenizer"] == read_chat(policy)[0].template


def test_a_template_that_asks_for_the_day_has_that_of_the_runs_beginning(
    tmp_path, capsys, policy, small_blocks, monkeypatch
):
    class Yesterday(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date.today() - datetime.timedelta(days=1)

    yesterday, today = (str(day.today()) for day in (Yesterday, datetime.date))
    model = with_template(tmp_path / "model", policy, "{{ strftime_now('%Y-%m-%d: ') }}" + CHATML)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "date", Yesterday)
        rows, _ = run(tmp_path, capsys, model, PROMPTS, "--n", "1")
    out = tmp_path / "out.jsonl"
    whole, tokenizer = out.read_bytes(), load_tokenizer(model)[0]
    days = [tokenizer.decode(row["prompt_token_ids"])[:10] for row in rows]
    assert days == [yesterday] * 11
    for length in (len(whole) * 2 // 3, len(whole)):  # it goes on after midnight, and is complete
        out.write_bytes(whole[:length])
        _, printed = run(tmp_path, capsys, model, PROMPTS, "--n", "1")
        assert out.read_bytes() == whole
        assert json.loads((tmp_path / "out.meta.json").read_text())["args"]["date"] == yesterday
    rows, _ = run(tmp_path, capsys, model, PROMPTS, "--n", "1", "--overwrite")
    assert [tokenizer.decode(row["prompt_token_ids"])[:10] for row in rows] == [today] * 11
    # a template that does not ask has none, so that no resumed run can differ in it
    run(tmp_path, capsys, policy, PROMPTS, "--n", "1", out="plain.jsonl")
    assert json.loads((tmp_path / "plain.meta.json").read_text())["args"]["date"] is None


ALTERNATING = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)


def test_rows_that_the_template_rejects_are_named_and_the_others_go_on(tmp_path, capsys, policy, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    model = with_template(tmp_path / "model", policy, ALTERNATING + CHATML)
    turn = {"role": "user", "content": "twice"}
    rows = [PROMPTS[0], {"id": "odd", "prompt": [turn, turn]}, {"id": 7, "prompt": [turn, turn]}, PROMPTS[1]]
    path, out = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
    flags = ["--model", model, "--prompts", path, "--out", str(out), *HF, "--n", "1"]
    generate.main(generate.parse_args(flags))
    printed = capsys.readouterr()
    reason = "the chat template rejects it: roles must alternate"
    expected = [
        f"generate.py: {path}:{k}: skipped the prompt {name}: {reason}" for k, name in ((2, "odd"), (3, 7))
    ]
    assert [line for line in printed.err.splitlines() if line.startswith("generate.py")] == expected
    counts = json.loads(printed.out.splitlines()[-1])
    assert counts["rows"] == 2 and counts["dropped"] == {"rejected by the chat template": 2}
    assert [row["id"] for row in read_rows(out)] == ["p0", "p1"]
    assert json.loads((tmp_path / "out.meta.json").read_text())["counts"]["dropped"] == counts["dropped"]
    # what stays is what it is without them, and a complete run stays complete
    plain, _ = run(tmp_path, capsys, model, PROMPTS[:2], "--n", "1", out="plain.jsonl", name="two.jsonl")
    assert plain == read_rows(out)
    generate.main(generate.parse_args(flags))
    assert f"--out {out} is complete; nothing was done" in capsys.readouterr().err
    err = refused(tmp_path, capsys, model, rows[1:3], "--n", "1", out="none.jsonl", name="odd.jsonl")
    assert err.splitlines()[-1] == (
        f"generate.py: {tmp_path}/odd.jsonl: the chat template of {model} rejects all prompts"
    )
    assert not list(tmp_path.glob("none*"))


OPEN = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}").replace(
    "+ message['content'] +", "+ message['content'].split('</think>')[-1] +"
)
BLOCK = CHATML.replace("+ message['content'] +", "+ message['content'].split('</think>')[-1] +")
# the answer of gpt-oss is in a channel; here of plain letters
CHANNEL = CHATML.replace(
    "+ '\n' + message", "+ ('#final#' if message['role'] == 'assistant' else '\n') + message"
)
CHANNEL = CHANNEL.replace("assistant\n' }}{% endif %}", "assistant' }}{% endif %}")


@pytest.mark.parametrize(
    "template, sampled, final",
    [
        (CHATML, "it is", None),
        (BLOCK, "it is", None),
        (BLOCK, "<think>so</think>\n\nit is", "it is"),
        (BLOCK, "\n<think>so", ""),
        (BLOCK, "so <think> it is", None),
        (OPEN, "so</think>\nit is\n", "it is"),
        (OPEN, "so", ""),
        (OPEN, "so</think>", ""),
        (CHANNEL, "#thoughts#so#final#it is", "it is"),
        (CHANNEL, "#final#it is", "it is"),
        (CHANNEL, "#thoughts#so", ""),
    ],
)
def test_the_answer_after_reasoning_is_kept_apart(tmp_path, capsys, policy, template, sampled, final):
    model = with_template(tmp_path / "model", policy, template)
    tokenizer = load_tokenizer(model)[0]
    ids = tokenizer(sampled, add_special_tokens=False)["input_ids"]

    class Given(Spy):
        def __call__(self, requests):
            yield from ((request, [*ids, tokenizer.eos_token_id]) for request in requests)

    path, out = write_rows(tmp_path / "prompts.jsonl", PROMPTS[:2]), tmp_path / "out.jsonl"
    flags = ["--model", model, "--prompts", path, "--out", str(out), *HF, "--n", "1"]
    generate.main(generate.parse_args(flags), Given)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    for row in read_rows(out):
        (response,) = row["responses"]
        assert response["text"] == sampled and response["token_ids"] == ids
        assert response.get("final") == final and ("final" in response) == (final is not None)
    assert (printed["with_reasoning"], printed["empty"]) == (2 * (final is not None), 2 * (final == ""))


def test_a_tokenizer_that_transformers_would_change(tmp_path, capsys, policy):
    """tokenizer.json has bytes, and tokenizer_class names SentencePiece's kind for the same file."""
    model = tmp_path / "model"
    shutil.copytree(policy, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    changed = config | {"tokenizer_class": "LlamaTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(changed))
    rows = [{"id": "p", "prompt": "in 2024,\n 123  apples fell"}]
    path, out = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
    flags = ["--prompts", path, *HF, "--n", "2"]
    generate.main(generate.parse_args(["--model", str(model), "--out", str(out), *flags]))
    assert capsys.readouterr().err.count("is not the tokenizer of tokenizer.json") == 1
    generate.main(generate.parse_args(["--model", policy, "--out", str(tmp_path / "plain.jsonl"), *flags]))
    assert "tokenizer.json" not in capsys.readouterr().err
    (row,), (plain,) = read_rows(out), read_rows(tmp_path / "plain.jsonl")
    for response in plain["responses"]:
        response["model"] = str(model)
    assert row == plain


GOOD = {"id": "p1", "prompt": [{"role": "user", "content": "question"}], "note": 1}
PLACES = list(places(generate.Row, GOOD))


@pytest.mark.parametrize("path, hint, required", PLACES, ids=[spelled(path) for path, _, _ in PLACES])
def test_every_key_of_every_type(tmp_path, capsys, policy, monkeypatch, path, hint, required):
    """What Row does not admit is one sentence with file and line, before a model loads; the rest is read."""
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    args = generate.parse_args(["--model", policy, "--prompts", "p", "--out", "o", *HF])
    tokens = generate.read_tokens(args)
    monkeypatch.setattr(generate, "read_tokens", lambda args: tokens)
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    for value in [*VALUES, *STRINGS, *NUMBERS] + ([] if required is None else [MISSING]):
        admitted = not required if value is MISSING else admits(hint, value)
        write_rows(data, with_change([{"id": "p0", "prompt": "first"}, GOOD], path, value))
        flags = ["--model", policy, "--prompts", str(data), "--out", str(out), *HF, "--overwrite"]
        try:
            generate.main(generate.parse_args(flags), Spy)
            status = 0
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr().err
        case = f"{spelled(path)} {'missing' if value is MISSING else json.dumps(value)[:30]}: {said}"
        if status == 0:
            assert admitted and len(read_rows(out)) == 2, case
            out.unlink()
        else:
            assert status == 2 and said.startswith(f"generate.py: {data}:2: ") and said.count("\n") == 1, case
            assert not out.exists(), case
        if not admitted:
            assert key_of(path) in said.split(f"{data}:2: ")[1], case


def test_prompts_that_do_not_end_with_a_user_turn(tmp_path, capsys, policy):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for prompt in (turns, [], [{"role": "system", "content": "a"}]):
        err = refused(tmp_path, capsys, policy, [PROMPTS[0], {"prompt": prompt}])
        assert f"{tmp_path}/prompts.jsonl:2: expected a prompt that ends with a user turn" in err


# ----- flags
def settings(*flags):
    args = generate.parse_args(["--model", "m", "--prompts", "p", "--out", "o", "--backend", "hf", *flags])
    return [getattr(args, name) for name in ("n", "temperature", "top_p", "top_k", "max_tokens")]


def test_presets():
    assert settings() == settings("--preset", "s1") == [4, 0.7, 0.9, 0, 2048]  # S1 3.1 footnote 2, 5.1
    assert settings("--preset", "s2") == [2, 0.7, 0.9, 50, 2048]  # S2 Table 7
    assert settings("--preset", "s3") == [8, 0.6, 1.0, 0, 1024]  # S3 Table 6
    assert settings("--preset", "s2", "--n", "5", "--top-k", "0") == [5, 0.7, 0.9, 0, 2048]
    assert settings("--n", "5", "--preset", "s3", "--top-p", "0.8") == [5, 0.6, 0.8, 0, 1024]
    assert settings("--greedy") == [1, 0.0, 1.0, 0, 2048]  # S1 Appendix D
    assert settings("--greedy", "--preset", "s3") == [1, 0.0, 1.0, 0, 1024]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--greedy", "--n", "2"], "--greedy cannot be combined with --n, --temperature"),
        (["--greedy", "--seed", "1"], "--greedy cannot be combined with --n, --temperature"),
        (["--greedy", "--temperature", "1"], "--greedy cannot be combined with --n, --temperature"),
        (["--greedy", "--top-p", "0.9"], "--greedy cannot be combined with --n, --temperature"),
        (["--diverse"], "unrecognized arguments: --diverse"),  # recipes/sample_diverse.py
        (
            ["--backend", "vllm", "--batch-size", "2"],
            "--backend vllm has no --batch-size and no --temperature below 0.01 or above 2",
        ),
        # vllm takes at most 2, and says so only once the model is loaded; 0.001 it raises to 0.01
        (
            ["--backend", "vllm", "--temperature", "0.001"],
            "--backend vllm has no --batch-size and no --temperature below 0.01 or above 2",
        ),
        (
            ["--backend", "vllm", "--temperature", "3"],
            "--backend vllm has no --batch-size and no --temperature below 0.01 or above 2",
        ),
        (["--backend", "hf", "--tensor-parallel", "2"], "--tensor-parallel needs --backend vllm"),
        (["--temperature", "0"], "--temperature must be above 0 and finite, found 0.0 (0 is --greedy)"),
        (["--temperature", "inf"], "--temperature must be above 0 and finite, found inf"),
        (["--temperature", "nan"], "--temperature must be above 0 and finite, found nan"),
        (["--top-p", "0"], "--top-p must lie in (0, 1]"),
        (["--top-p", "1.1"], "--top-p must lie in (0, 1]"),
        (["--top-p", "nan"], "--top-p must lie in (0, 1]"),
        (["--top-k", "-1"], "--top-k must be 0 (off) or more"),
        (["--n", "0"], "--n must be at least 1, found 0"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1, found 0"),
        (["--limit", "0"], "--limit must be at least 1, found 0"),
        (["--batch-size", "-1", "--backend", "hf"], "--batch-size must be at least 1, found -1"),
        (["--template-kwargs", "[1]"], "--template-kwargs: expected a JSON object, found [1]"),
        (["--template-kwargs", "{"], "--template-kwargs"),
        (["--preset", "s4"], "invalid choice: 's4'"),
    ],
)
def test_flags_that_are_wrong_or_would_do_nothing_are_refused(capsys, flags, sentence):
    with pytest.raises(SystemExit) as exit_status:
        generate.parse_args(["--model", "m", "--prompts", "p", "--out", "o", *flags])
    assert exit_status.value.code == 2 and sentence in capsys.readouterr().err


# ----- the order of rows, and what vllm is given
def test_rows_come_in_their_order_as_soon_as_they_are_complete(policy, tmp_path):
    args = generate.parse_args(["--model", policy, "--prompts", "p", "--out", "o", *HF, "--n", "2"])
    tokens = generate.read_tokens(args)
    prompts = [({"id": f"p{k}", "prompt": "x"}, [k]) for k in range(4)]
    order = [(1, 0), (1, 1), (0, 1), (3, 0), (0, 0), (2, 1), (3, 1), (2, 0)]  # row and sample, as they end
    n_ended, yields = 0, []

    def sample(requests):
        nonlocal n_ended
        by_number = {(request.index, request.sample): request for request in requests}
        assert [request.prompt_id for request in requests] == [f"p{k // 2}" for k in range(8)]
        for row, number in order:
            n_ended += 1
            yield by_number[row, number], [64 + row, 64 + number, tokens.stop_ids[0], 64]

    class Progress:
        update = staticmethod(lambda: None)

    for row in generate.sample_rows(prompts, sample, args, tokens, Progress):
        yields.append((n_ended, row["id"]))
        number = int(row["id"][1])
        ids = [response["token_ids"] for response in row["responses"]]
        assert ids == [[64 + number, 64], [64 + number, 65]]
        assert [response["finish"] for response in row["responses"]] == ["stop", "stop"]
    assert yields == [(5, "p0"), (5, "p1"), (8, "p2"), (8, "p3")]
    assert not any("responses" in row for row, _ in prompts)  # what is on disk takes no memory


class Engine:
    """In vllm's place: notes what it is given, and ends the last request first."""

    def __init__(self, model, **options):
        Engine.options, self.waiting, self.llm_engine = options | {"model": model}, [], self
        Engine.given, Engine.waiting_at_steps, Engine.environment = [], [], dict(os.environ)

    def generate(self, prompt, params, use_tqdm):
        """The one token that shows whether logits are finite."""
        logprobs = [{5: types.SimpleNamespace(logprob=-0.5)}]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(logprobs=logprobs)])]

    def add_request(self, name, prompt, params):
        self.waiting.append(name)
        Engine.given.append((name, prompt, params))

    def step(self):
        Engine.waiting_at_steps.append(len(self.waiting))
        output = types.SimpleNamespace(token_ids=(65, 66))
        return [types.SimpleNamespace(request_id=self.waiting.pop(), outputs=[output])]


@pytest.fixture
def vllm(monkeypatch):
    parts = {"LLM": Engine, "SamplingParams": dict}
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(**parts))
    kinds = types.SimpleNamespace(RequestOutputKind=types.SimpleNamespace(FINAL_ONLY="final"))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)


def test_vllm_is_given_all_requests_at_once_and_our_settings(tmp_path, capsys, policy, vllm, monkeypatch):
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stdout")  # what the user has set stays
    flags = "--backend vllm --tensor-parallel 2 --preset s2 --max-tokens 7 --dtype bfloat16".split()
    rows, _ = run(tmp_path, capsys, policy, PROMPTS, *flags)
    assert [row["id"] for row in rows] == [row["id"] for row in PROMPTS]
    options = Engine.options
    assert options["model"] == policy and options["dtype"] == "bfloat16"
    assert options["tensor_parallel_size"] == 2
    assert options["generation_config"] == "vllm" and options["skip_tokenizer_init"]
    names = ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_STREAM", "VLLM_NO_USAGE_STATS")
    assert [Engine.environment[name] for name in names] == ["spawn", "ext://sys.stdout", "1"]
    tokenizer = load_tokenizer(policy)[0]
    options = {"add_generation_prompt": True, "return_dict": False}
    all_ids = [tokenizer.apply_chat_template(row["prompt"], **options) for row in PROMPTS]
    options = Engine.options
    assert options["max_model_len"] == max(map(len, all_ids)) + 7
    # 11 prompts with 2 responses each are there before the first step
    assert Engine.waiting_at_steps == list(range(22, 0, -1))
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_tokens": 7, "ignore_eos": True}
    settings |= {"stop_token_ids": [tokenizer.eos_token_id], "detokenize": False, "output_kind": "final"}
    seeds = set()
    for (_, prompt, params), ids in zip(Engine.given, [ids for ids in all_ids for _ in range(2)]):
        assert prompt == {"prompt_token_ids": ids}
        seeds.add(params.pop("seed"))
        assert params == settings
    assert len(seeds) == 22 and generate.stable_hash(0, "generate", "p3", 1) % 2**32 in seeds
    run(tmp_path, capsys, policy, PROMPTS, "--backend", "vllm", "--greedy", out="greedy.jsonl")
    assert {(params["temperature"], params["seed"]) for _, _, params in Engine.given} == {(0.0, None)}


# ----- attention, reports
# attention scores are capped at 0.5, low enough to change what is sampled
CAPPED = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1, "tie_word_embeddings": False}


def test_a_soft_cap_on_attention_is_kept(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = make_gemma(tmp_path / "gemma", **CAPPED)
    tokenizer = load_tokenizer(model)[0]
    rows, _ = run(tmp_path, capsys, model, PROMPTS, "--greedy")
    firsts = {}
    for attention in ("eager", "sdpa"):
        loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).eval()
        firsts[attention] = []
        for row in rows:
            ids = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                firsts[attention].append(loaded(**ids).logits[0, -1].argmax().item())
    sampled = [(row["responses"][0]["token_ids"] + [tokenizer.eos_token_id])[0] for row in rows]
    assert sampled == firsts["eager"] != firsts["sdpa"]


def test_equal_samples_quantiles_and_special_tokens_are_reported(tmp_path, capsys, policy):
    special = {"id": "s", "prompt": "say <|im_end|> twice: <|im_end|>"}
    path = write_rows(tmp_path / "prompts.jsonl", [*PROMPTS, special])
    flags = ["--model", policy, "--prompts", path, *HF, "--n", "2"]
    cold = ["--out", str(tmp_path / "cold.jsonl"), "--temperature", "1e-4"]
    generate.main(generate.parse_args([*flags, *cold]))
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert (report["prompts_with_equal_samples"], report["equal_samples_share"]) == (12, 1.0)
    assert report["prompts_with_special_tokens"] == 1
    assert "for 100.0% of the prompts all responses are identical" in printed.err
    assert "1 prompts contain special tokens as plain text" in printed.err
    hot = ["--temperature", "1.5", "--top-p", "1", "--max-tokens", "60"]
    generate.main(generate.parse_args([*flags, "--out", str(tmp_path / "hot.jsonl"), *hot]))
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert report["equal_samples_share"] == 0 and "identical" not in printed.err
    responses = list(itertools.chain(*(row["responses"] for row in read_rows(tmp_path / "hot.jsonl"))))
    lengths = sorted(response["tokens"] for response in responses)
    assert len(lengths) == 24 and report["tokens_sampled"] == sum(lengths)
    # between the ranks 5 and 6, 11 and 12, 17 and 18 of 24, counted from 0
    low, high = 0.25 * lengths[5] + 0.75 * lengths[6], 0.75 * lengths[17] + 0.25 * lengths[18]
    middle = (lengths[11] + lengths[12]) / 2
    assert report["tokens_min_25_50_75_max"] == [lengths[0], low, middle, high, lengths[-1]]
    cut = sum(response["finish"] == "length" for response in responses)
    assert 0 < cut < 24 and (report["truncated"], report["truncated_share"]) == (cut, round(cut / 24, 4))
    counts = json.loads((tmp_path / "hot.meta.json").read_text())["counts"]
    assert counts["truncated_share"] == report["truncated_share"]
    assert counts["prompts_with_special_tokens"] == 1
