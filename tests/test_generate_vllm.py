"""
The vllm backend of generate.py on a CPU, against transformers. Skipped where vllm is not installed.

Covers  greedy ids equal to those of transformers in float32; samples that do not depend on other requests,
        nor on where a run was stopped; weights that are not finite, from which vllm samples token 0.
Run     python -m pytest tests/test_generate_vllm.py     (four engines start, in one process)
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, make_policy, read_rows, write_rows
from test_generate import spoil_weights

import generate
from loading import load_tokenizer

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

PROMPTS = [{"id": f"p{k}", "prompt": "Tell me " + "more " * (3 * k % 7) + str(k)} for k in range(6)]
ON_CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: starts faster
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB for each of the engines; the default is all memory
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}",  # the default leaves a core idle
}
DRIVER = """
import json, os, sys, traceback
import generate

folder, jobs = json.loads(sys.argv[1])
for name, flags in jobs:
    out = f"{folder}/{name}.jsonl"
    try:
        generate.main(generate.parse_args([*flags, "--backend", "vllm", "--out", out]))
        if name == "hot":  # stopped in the third row, and started again
            data = open(out, "rb").read()
            os.rename(out, f"{folder}/whole.jsonl")
            lines = data.splitlines(keepends=True)
            open(out, "wb").write(lines[0] + lines[1] + lines[2][:50])
            generate.main(generate.parse_args([*flags, "--backend", "vllm", "--out", out]))
    except BaseException:
        traceback.print_exc()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with what both wrote, and the standard output and error of the process with vllm."""
    folder = tmp_path_factory.mktemp("vllm")
    policy = make_policy(folder / "policy", hidden=128, spread=0.12)  # vllm on a CPU wants heads of 64
    prompts = write_rows(folder / "prompts.jsonl", PROMPTS)
    sampling = ["--prompts", prompts, "--dtype", "float32"]
    hot = "--max-tokens 150 --n 2 --temperature 2 --top-p 1".split()
    greedy = ["--model", policy, *sampling, "--max-tokens", "24", "--greedy"]
    shutil.copytree(policy, folder / "spoiled")
    spoil_weights(folder / "spoiled", "nan")
    spoiled = ["--model", str(folder / "spoiled"), *sampling, "--n", "1", "--max-tokens", "4"]
    jobs = {"greedy": greedy, "hot": ["--model", policy, *sampling, *hot], "spoiled": spoiled}
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        command = [sys.executable, "-c", DRIVER, json.dumps([str(folder), list(jobs.items())])]
        environment = os.environ | {"OMP_NUM_THREADS": "2", **ON_CPU}
        subprocess.run(command, cwd=REPO, stdout=out, stderr=err, env=environment)
    generate.main(generate.parse_args([*greedy, "--backend", "hf", "--out", f"{folder}/hf.jsonl"]))
    return folder


def rows_of(runs, name):
    path = runs / f"{name}.jsonl"
    assert path.exists() and path.stat().st_size, (runs / "err").read_text()[-3000:]
    return read_rows(path)


def test_greedy_ids_are_those_of_transformers(runs):
    vllm, hf = rows_of(runs, "greedy"), rows_of(runs, "hf")
    assert vllm == hf  # texts, ids, finish, tokens, keys
    assert len({tuple(row["responses"][0]["token_ids"]) for row in hf}) > 3


def test_every_sample_has_a_seed_of_its_own(runs):
    whole = rows_of(runs, "whole")
    responses = [response for row in whole for response in row["responses"]]
    assert len({tuple(response["token_ids"]) for response in responses}) == 12  # each has a seed of its own
    tokenizer = load_tokenizer(str(runs / "policy"))[0]
    for response in responses:
        assert tokenizer.eos_token_id not in response["token_ids"]
        assert len(response["token_ids"]) == response["tokens"]
        assert response["finish"] == ("length" if response["tokens"] == 150 else "stop")
    assert {response["finish"] for response in responses} == {"length", "stop"}


def test_a_run_goes_on_after_any_row(runs):
    # the second run had only the last four prompts: samples ignore the other requests
    assert rows_of(runs, "hot") == rows_of(runs, "whole")
    printed = [json.loads(line) for line in (runs / "out").read_text().splitlines()]
    # nothing but the last lines of the runs is on standard output
    assert [line["resumed_rows"] for line in printed] == [0, 0, 2]


def test_weights_that_are_not_finite_are_refused(runs):
    err = (runs / "err").read_text()
    assert f"{runs}/spoiled: the first logits are not finite: the weights are damaged" in err
    assert "SystemExit: 2" in err and not list(runs.glob("spoiled.*"))
