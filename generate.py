"""
Stage 1: prompts -> responses, sampled from a model.

Reads   --prompts FILE ...  a Row (below) per prompt; other keys are passed on
Writes  --out FILE          the same rows in their order, each with "responses": [{"text", "source", "model",
                            "finish": "stop" | "length", "tokens", "token_ids", "tokenizer"}, ...]. token_ids
                            are as sampled, without the end-of-turn token; tokenizer is a fingerprint. After
                            reasoning "final" is the answer. prompt_token_ids are the prompt as sampled,
                            prompt_tokenizer the fingerprint of tokenizer and chat template. For x.jsonl
                            also the record x.meta.json: arguments, hashes, versions, counts

    python generate.py --model out/models/policy --prompts data/train.jsonl --out out/on.jsonl

Sampling follows SimpleMix (S1, section 3.1 footnote 2 and section 5.1): four responses per prompt at
temperature 0.7 and top-p 0.9. --preset s2 and s3 are Table 7 of S2 and Table 6 of S3. --greedy is how a model
answers the prompts of an evaluation (S1, Appendix D).

If a run is stopped, the same command, without --overwrite, resumes it. With backend hf on a CPU in float32
the rows are then equal byte for byte; on a GPU numbers differ slightly with what else is in a batch. Prints
one JSON object last: rows, responses, their tokens, how many were truncated or empty, and the like.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections import Counter
from typing import NamedTuple, Required, TypedDict

from common import Message, append_rows, as_messages, begin_output, fail, make_record, note

# S1 and S2 do not give max_tokens (2,048 is that of S1's code), S3 gives no top_p
PRESETS = {
    "s1": {"n": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_tokens": 2048},
    "s2": {"n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_tokens": 2048},
    "s3": {"n": 8, "temperature": 0.6, "top_p": 1.0, "top_k": 0, "max_tokens": 1024},
}
GREEDY = {"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
BLOCK = 64  # rows that a shard takes at once, and that backend hf works on before the next
CANDIDATES = 1024  # these best tokens are tried first; all are sorted if they do not reach top-p
MAY_CHANGE = {"limit", "batch_size", "tensor_parallel"}  # in a resumed run
PADDED = {"float32": 1e-3, "bfloat16": 0.05}  # of the logits' deviation; measured 1e-6, leaks from 0.1
PADDING = "padding before a prompt changes its logits"
NOT_FINITE = "the first logits are not finite: the weights are damaged, or too large for --dtype"
# keys of an earlier run and of later stages, about responses that are being replaced
EARLIER = ("responses", "wins", "cosine", "labeler", "prompt_token_ids", "prompt_tokenizer")
REASONING = {"</think>": "<think>", "</seed:think>": "<seed:think>", "[/THINK]": "[THINK]"}  # end: beginning
REASONING |= {"<|END_THINKING|>": "<|START_THINKING|>", "<channel|>": "<|channel>"}


class Row(TypedDict, total=False):
    id: str | int | None  # unique; without it a hash of the prompt
    prompt: Required[str | list[Message]]  # text is one user turn


# ----- arguments
def make_parser(description):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--model", required=True, help="model folder, or OWNER/NAME on the hub")
    flag("--prompts", required=True, nargs="+", metavar="FILE", help="prompts, JSONL")
    flag("--out", required=True, metavar="FILE", help="responses, JSONL")
    flag("--preset", choices=list(PRESETS), default="s1", help="sets the next five (default %(default)s)")
    flag("--n", type=int, help="responses per prompt")
    flag("--temperature", type=float, help="above 0")
    flag("--top-p", type=float, help="size of the nucleus; 1 is off")
    flag("--top-k", type=int, help="draw from the K most likely tokens; 0 is off")
    flag("--max-tokens", type=int, help="longest response")
    flag("--seed", type=int, default=0, help="seed of every draw (default %(default)s)")
    flag("--greedy", action="store_true", help="one response, always the most probable token")
    flag("--backend", choices=["auto", "vllm", "hf"], default="auto", help="auto: vllm if installed")
    flag("--tensor-parallel", type=int, default=1, metavar="GPUS", help="for one model, backend vllm")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on CUDA")
    flag("--batch-size", type=int, help="sequences at once, backend hf (default 64)")
    flag("--source", choices=["on", "off"], default="on", help="on if --model is to be trained, else off")
    flag("--template-kwargs", type=json.loads, default={}, metavar="JSON", help="switches of the template")
    flag("--revision", help="branch, tag or commit of a hub model")
    flag("--shard", default="0/1", metavar="I/N", help="every N-th block of 64 rows, from the I-th, from 0")
    flag("--limit", type=int, help="only the first rows that fit, before --shard")
    flag("--overwrite", action="store_true", help="start over if --out exists")
    return parser


def parse_args(argv=None, parser=None):
    parser = parser or make_parser(__doc__)
    first_pass, _ = parser.parse_known_args(argv)  # --preset decides the defaults
    parser.set_defaults(**PRESETS[first_pass.preset] | (GREEDY if first_pass.greedy else {}))
    args = parser.parse_args(argv)
    if args.greedy and any(getattr(args, name) != value for name, value in GREEDY.items()):
        parser.error("--greedy cannot be combined with --n, --temperature, --top-p, --top-k or --seed")
    if not args.greedy and not 0 < args.temperature < math.inf:
        parser.error(f"--temperature must be above 0 and finite, found {args.temperature} (0 is --greedy)")
    if not 0 < args.top_p <= 1 or args.top_k < 0:
        parser.error("--top-p must lie in (0, 1], and --top-k must be 0 (off) or more")
    for name in ("n", "max_tokens", "tensor_parallel", "batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    if not isinstance(args.template_kwargs, dict):
        parser.error(f"--template-kwargs: expected a JSON object, found {args.template_kwargs}")
    if args.backend == "auto":
        args.backend = "vllm" if importlib.util.find_spec("vllm") else "hf"
    extreme = not (args.greedy or 0.01 <= args.temperature <= 2)  # vllm would raise 0.001 to 0.01
    if args.backend == "vllm" and (args.batch_size or extreme):
        only_hf = "no --batch-size and no --temperature below 0.01 or above 2"
        parser.error(f"--backend vllm has {only_hf}; use --backend hf")
    if args.backend == "hf" and args.tensor_parallel > 1:
        parser.error("--tensor-parallel needs --backend vllm")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported: --help and wrong flags answer at once

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: a tenth faster on a CPU
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from chat import Chat, answer, prompt_ids, read_chat  # noqa: E402
from common import open_output, read_jsonl, stable_hash, write_record  # noqa: E402
from loading import SAMPLE, context_length, load_model, run_date, shard_of, special_tokens  # noqa: E402

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans for 30 ms at every new length


class Request(NamedTuple):
    """One response that is to be sampled."""

    index: int  # of the prompt in its list
    prompt_id: str
    sample: int  # 0 ... n - 1 for the responses of a prompt
    ids: list[int]  # of the prompt


class Tokens(NamedTuple):
    """A model's chat, and what its configuration says about tokens."""

    chat: Chat
    special: re.Pattern  # finds special tokens in a text
    stop_ids: list[int]  # each ends a response
    pad_id: int
    context: int  # longest prompt and response together


# ----- drawing a token
def draws(seed, prompt_id, sample, count):
    """The random numbers of one response, in [0, 1), float64 (count,).

    Two models that are sampled with one seed share their random numbers, and their responses tend to begin
    alike: to draw different responses to the same prompts, change --seed.
    """
    return np.random.default_rng(stable_hash(seed, "generate", prompt_id, sample)).random(count)


def sample_tokens(logits, uniforms, temperature, top_p, top_k):
    """One token per sequence, by inversion of the cumulative distribution: a draw ignores its batch.

    logits (B, V), uniforms (B,) in [0, 1) -> token ids (B,). Temperature comes first, then top-k, then top-p
    on what top-k left: the fewest best tokens whose total probability reaches top_p, renormalised. This is
    the rule of backend hf; vllm has its own.
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
    """Cumulative probabilities of the `width` best tokens, with top-k up to 1, and these; (B, width) each."""
    values, tokens = logits.topk(width, dim=-1)
    total = (values if top_k else logits).double().logsumexp(-1, keepdim=True)
    return (values.double() - total).exp().cumsum(-1), tokens


# ----- samplers: sample(requests) yields (request, token ids) in the order in which they end
def hf_sampler(args, tokens, longest, more_processors=lambda mask: []):
    """sample(requests) of transformers; processors of logits from more_processors(mask) precede the draw."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = load_model(AutoModelForCausalLM, args.model, args.revision, args.dtype)
    # only these settings: temperature or penalties of the model's generation_config.json must not take part
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_tokens,
        do_sample=False,  # the draw is ours, see draw_by
        eos_token_id=tokens.stop_ids,
        pad_token_id=tokens.pad_id,
    )
    equal = reads_padding(model, tokens, args.dtype)
    if equal:
        note(f"{args.model}: {PADDING}; only prompts of one length share a batch")

    @torch.inference_mode()
    def sample(requests):
        for batch in batches(requests, args.batch_size or 64, equal):
            ids, mask = pad_left([request.ids for request in batch], tokens.pad_id, model.device)
            processors = [check_logits(args.model, ids.shape[1]), *more_processors(mask)]
            if not args.greedy:
                processors.append(draw_by(batch, ids, args))
            output = model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors)
            yield from zip(batch, output[:, ids.shape[1] :].tolist(), strict=True)

    return sample


@torch.inference_mode()
def reads_padding(model, tokens, dtype):
    """Whether a prompt's first logits depend on masked tokens before it, as those of recurrent layers may."""
    ids = tokens.chat.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    options, logits = {"output_logits": True, "return_dict_in_generate": True}, []
    options["max_new_tokens"] = 2  # the second reads what the prompt has left in the cache
    for prompts in [ids[:8]], [ids[:8], ids[:12]]:
        rows, mask = pad_left(prompts, tokens.pad_id, model.device)
        output = model.generate(rows, attention_mask=mask, **options)
        logits.append(torch.stack(output.logits)[:, 0].float())  # (2, V), of the first prompt
    bare, padded = logits
    return (bare - padded).abs().mean() > PADDED[dtype] * bare.std()


def batches(requests, size, equal):
    """Yield at most `size` requests of similar length, or of equal length."""
    requests = sorted(requests, key=lambda request: len(request.ids))
    while requests:
        longest = len(requests[0].ids) if equal else math.inf
        batch = [request for request in requests[:size] if len(request.ids) <= longest]
        yield batch
        requests = requests[len(batch) :]


def pad_left(sequences, pad_id, device):
    """Token ids and mask, (B, T) each; padding on the left, so that all prompts end in the last column."""
    longest = max(map(len, sequences))
    ids = [[pad_id] * (longest - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def check_logits(name, prompt_length):
    """A logits processor that ends the run if the first logits show weights that are not numbers."""

    def check(input_ids, logits):
        if input_ids.shape[1] == prompt_length and not (logits < torch.inf).all():  # -inf: a masked token
            fail(f"{name}: {NOT_FINITE}")
        return logits

    return check


def draw_by(batch, ids, args):
    """A logits processor that leaves only our own draw possible, so that greedy decoding takes it."""
    uniforms = [draws(args.seed, r.prompt_id, r.sample, args.max_tokens) for r in batch]
    uniforms = torch.tensor(np.stack(uniforms), device=ids.device)  # (B, max_tokens)

    def only_ours(input_ids, logits):
        uniform = uniforms[:, input_ids.shape[1] - ids.shape[1]]
        choice = sample_tokens(logits, uniform, args.temperature, args.top_p, args.top_k)
        return torch.full_like(logits, -torch.inf).scatter_(1, choice[:, None], 0.0)

    return only_ours


def vllm_sampler(args, tokens, longest):
    """sample(requests) of vllm, which gets all at once, each with its own seed, of up to `longest` tokens."""
    from transformers import AutoModelForCausalLM

    # vllm would leave a missing weight as it is in memory
    load_model(AutoModelForCausalLM, args.model, args.revision, args.dtype, device_map="meta")
    # vllm reads these on import: CUDA does not survive a fork, and standard output is ours
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB on a CPU; the default is 92 % of all
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # compiled bfloat16 gave wrong text, seeds crash with chunked prefill, cached prefixes change the rounding
    cpu = {"enforce_eager": True, "enable_chunked_prefill": False, "enable_prefix_caching": False}
    cpu["max_num_batched_tokens"] = max(8192, longest)
    options = {"revision": args.revision, "dtype": args.dtype, "tensor_parallel_size": args.tensor_parallel}
    # generation_config="vllm": the model's generation_config.json must not take part
    options |= {"generation_config": "vllm", "max_model_len": longest, "skip_tokenizer_init": True}
    llm = LLM(args.model, **options, **({} if torch.cuda.is_available() else cpu))
    # vllm 0.32 writes token 0 without end where logits are NaN; a first token shows them in time
    probe = SamplingParams(max_tokens=1, logprobs=0, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": tokens.stop_ids[:1]}, probe, use_tqdm=False)
    if not all(math.isfinite(entry.logprob) for entry in output.outputs[0].logprobs[0].values()):
        fail(f"{args.model}: {NOT_FINITE}")
    settings = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    # only our tokens end a response
    settings |= {"max_tokens": args.max_tokens, "stop_token_ids": tokens.stop_ids, "ignore_eos": True}
    settings |= {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}

    def sample(requests):
        running = {}
        for request in requests:
            seed = stable_hash(args.seed, "generate", request.prompt_id, request.sample) % 2**32
            params = SamplingParams(seed=None if args.greedy else seed, **settings)
            name = f"{request.prompt_id}|{request.sample}"
            running[name] = request
            llm.llm_engine.add_request(name, {"prompt_token_ids": request.ids}, params)
        while running:
            for output in llm.llm_engine.step():
                yield running.pop(output.request_id), list(output.outputs[0].token_ids)

    return sample


# ----- prompts
def read_prompts(paths):
    """({"file:line": row} with messages as prompts and without earlier responses, {reason: rows dropped})."""
    rows, lines, dropped = {}, {}, Counter()  # lines: {id: "file:line"}
    for path in paths:
        for line, row in read_jsonl(path, Row):
            row["prompt"] = as_messages(row["prompt"], line)
            key = row.get("id")
            if key is None:
                text = json.dumps(row["prompt"], ensure_ascii=False, sort_keys=True)
                key = hashlib.sha256(text.encode()).hexdigest()[:16]
            row = {name: value for name, value in row.items() if name not in EARLIER} | {"id": str(key)}
            first = lines.setdefault(str(key), line)
            if first != line and rows[first] != row:
                fail(f"{line}: duplicate id {key}, that of {first}; give each row an id of its own")
            dropped["repeated row"] += first != line
            rows[first] = row
    return rows, dropped


def read_tokens(args):
    """The model's Tokens; a model that cannot be sampled from ends the run here."""
    from transformers import GenerationConfig

    day = run_date(args.out, args.overwrite)
    chat, config = read_chat(args.model, args.revision, args.template_kwargs, day)
    args.date = chat.day  # in the record, for a run that goes on tomorrow
    tokenizer = chat.tokenizer
    try:
        eos = GenerationConfig.from_pretrained(args.model, revision=args.revision).eos_token_id
    except OSError:  # generation_config.json is optional
        eos = config.get_text_config().eos_token_id
    stop_ids = {chat.end_id, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    pad_id = chat.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Tokens(chat, special_tokens(tokenizer), sorted(stop_ids), pad_id, context_length(config))


def encode_prompts(rows, args, tokens, dropped):
    """([(row, ids of its prompt), ...] of this shard, counts), without prompts that cannot be answered."""
    chat, room = tokens.chat, tokens.context - args.max_tokens
    fitting, too_long = [], []
    prompts, problems = prompt_ids(chat, list(rows.values()), Counter())
    for index, (line, row) in enumerate(rows.items()):
        ids = prompts[index]
        if index in problems:
            dropped["rejected by the chat template"] += 1
            note(f"{line}: skipped the prompt {row['id']}: {problems[index]}")
        elif max(ids) >= chat.vocabulary:
            fail(f"{args.model}: the id {max(ids)} is beyond the model's {chat.vocabulary} embeddings")
        elif len(ids) > room:
            too_long.append(row["id"])
        else:
            fitting.append((row | {"prompt_token_ids": ids, "prompt_tokenizer": chat.template}, ids))
    if dropped["rejected by the chat template"] == len(rows):
        fail(f"{', '.join(args.prompts)}: the chat template of {args.model} rejects all prompts")
    if not fitting:
        response = f"{args.max_tokens} tokens in the context of {args.model}, which is {tokens.context}"
        fail(f"{', '.join(args.prompts)}: no prompt leaves room for {response}; use a smaller --max-tokens")
    if too_long:
        note(f"skipped {len(too_long)} prompts of more than {room} tokens: {', '.join(too_long[:20])}")
    prompts = shard_of(fitting[: args.limit], BLOCK, args.shard)
    texts = ["\n".join(message["content"] for message in row["prompt"]) for row, _ in prompts]
    n_special = sum(bool(tokens.special.search(text)) for text in texts)
    if n_special:
        note(f"{n_special} prompts contain special tokens as plain text, which the model reads as tokens")
    dropped["too long"] += len(too_long)
    return prompts, {"dropped": +dropped, "prompts_with_special_tokens": n_special}


# ----- rows
def sample_rows(prompts, sample, args, tokens, progress):
    """Yield rows in the order of the prompts, each as soon as it and all before it are complete."""
    responses = {index: [None] * args.n for index in range(len(prompts))}
    requests = [Request(i, row["id"], k, ids) for i, (row, ids) in enumerate(prompts) for k in range(args.n)]
    next_index = 0
    for request, sampled in sample(requests):
        responses[request.index][request.sample] = make_response(sampled, args, tokens)
        progress.update()
        while next_index < len(prompts) and None not in responses[next_index]:
            yield prompts[next_index][0] | {"responses": responses.pop(next_index)}
            next_index += 1


def make_response(sampled, args, tokens):
    """A response of the sampled tokens, up to the first that ends a response."""
    ends = [position for position, token in enumerate(sampled) if token in tokens.stop_ids]
    token_ids = sampled[: ends[0]] if ends else sampled
    text = tokens.chat.tokenizer.decode(token_ids, skip_special_tokens=True)
    finish = "stop" if ends else "length"
    response = {"text": text, "source": args.source, "model": args.model, "finish": finish}
    response |= {"tokens": len(token_ids), "token_ids": token_ids, "tokenizer": tokens.chat.fingerprint}
    final = final_text(token_ids, tokens)
    return response if final is None else response | {"final": final}


def final_text(token_ids, tokens):
    """What follows a response's reasoning, "" if that does not end; None if there is no reasoning."""
    chat, text = tokens.chat, tokens.chat.tokenizer.decode(token_ids)
    channel = chat.answer.removeprefix(chat.generation).strip()  # as of gpt-oss, which always has one
    template = chat.tokenizer.get_chat_template()
    end = next((end for end in REASONING if end in template), channel)
    begin = REASONING.get(end, "")
    if end and end in text:
        return tokens.special.sub("", text.rpartition(end)[2]).strip()
    begun = text.lstrip().startswith(begin) or chat.generation.rstrip().endswith(begin)
    return "" if end and begun else None


def count_responses(args):
    """Statistics of --out, for the last line and the record."""
    counts, lengths = Counter(), []
    for _, row in read_jsonl(args.out, Row):
        responses = row["responses"]
        texts = [answer(response) for response in responses]
        counts["rows"] += 1
        counts["responses"] += len(texts)
        counts["truncated"] += sum(response["finish"] == "length" for response in responses)
        counts["empty"] += sum(not text.strip() for text in texts)
        counts["with_reasoning"] += sum(response.get("final") is not None for response in responses)
        counts["prompts_with_equal_samples"] += len(texts) > 1 and len(set(texts)) == 1
        lengths += [response["tokens"] for response in responses]
    skipped = counts["rows"] * args.n - counts["responses"]
    if skipped:  # of conversations that grow too long in recipes/sample_diverse.py
        counts["skipped_context_too_long"] = skipped
    equal = counts["prompts_with_equal_samples"] / counts["rows"]
    if equal > 0.05:
        note(f"for {equal:.1%} of the prompts all responses are identical")
    quantiles = np.percentile(lengths, (0, 25, 50, 75, 100)).tolist()
    shares = {"truncated_share": round(counts["truncated"] / counts["responses"], 4)}
    shares["equal_samples_share"] = round(equal, 4)
    return {**counts, "tokens_sampled": sum(lengths), "tokens_min_25_50_75_max": quantiles, **shares}


def main(args, make_sampler=None, make_rows=sample_rows, other_models=()):
    """A recipe brings its own make_sampler or make_rows, and names the other models that it loads."""
    started = time.time()
    hf = args.backend == "hf"
    make_sampler = make_sampler or (hf_sampler if hf else vllm_sampler)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    rows, dropped = read_prompts(args.prompts)
    tokens = read_tokens(args)
    prompts, counts = encode_prompts(rows, args, tokens, dropped)
    record = make_record(args, args.prompts, [(args.model, args.revision), *other_models])
    # transformers: the blocks of a resumed run must be those of the whole run. vllm: all requests at once
    block, window = (BLOCK, BLOCK) if hf else (len(prompts), 1)
    ids = [row["id"] for row, _ in prompts]
    with open_output(args, record, MAY_CHANGE, ids, window) as (file, done, stored):
        if stored is not None:
            note(f"--out {args.out} is complete; nothing was done")
            print(json.dumps({"out": args.out, **stored}))
            return
        if done < len(prompts):
            longest = max(len(ids) for _, ids in prompts) + args.max_tokens
            sample = make_sampler(args, tokens, longest)
        sampling_started = time.time()
        n_rows, total = done, len(prompts) * args.n
        with tqdm(total=total, initial=done * args.n, unit="response", desc=args.backend) as progress:
            for start in range(done, len(prompts), block):
                for row in make_rows(prompts[start : start + block], sample, args, tokens, progress):
                    if n_rows == done:  # only now is it clear that the model can be sampled from
                        begin_output(file, record, done)
                    append_rows(file, [row])
                    n_rows += 1
        counts |= count_responses(args)
        counts |= {"resumed_rows": done, "sampling_seconds": round(time.time() - sampling_started, 2)}
        seconds = round(time.time() - started, 2)
        write_record(args.out, record | {"counts": counts, "seconds": seconds})
        print(json.dumps({"out": args.out, **counts, "seconds": seconds}))


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
