"""
Stage 2: responses -> scored responses: one row per prompt, with a reward for every response.

Reads   --responses FILE ...  a Row (below) per prompt, as generate.py, data/import_responses.py and this script
                              write it; several files are merged by id, responses in the order of the files
Writes  --out FILE            the same rows; every response gains "reward", null where "reward_error" says why,
                              and "scores": {NAME: ...}; the row gains "labeler", what made the rewards. Beside
                              it x.meta.json, the record

--scorer rm      the logit of a reward model, any AutoModelForSequenceClassification with one label, in float32.
                 If it has a chat template, it reads prompt and response as a chat (Skywork-Reward, the reward
                 of S1 section 3.1 and S3 section 5.1), else as a pair of texts (the demo's cross-encoder).
                 What is longer than --max-length gets no reward; nothing is cut
--scorer verify  1 if the last boxed answer, or else the last number, is the row's "answer", else 0 (GSM8K)
--scorer logp    log pi(y|x) of the --model: "logp", the sum over the response's tokens and its end-of-turn
                 token, which a response that was cut off does not have, and "logp_tokens", their number (S1
                 section 5.3 "on-policiness", S2 Table 8). With --name N they are logp_N and logp_N_tokens.
                 Rewards stay as they are
scorers/ has others with the same rows: pairrm.py and judge.py compare responses with each other, category.py
labels prompts, embed.py measures how similar responses are. The last scorer's rewards are the "reward", and
how often they order two responses as the rewards before is printed (S3 B.1).

    python score.py --model out/models/reward --responses out/on.jsonl out/off.jsonl --out out/scored.jsonl
    python score.py --scorer logp --model out/models/policy --responses out/scored.jsonl --out out/logp.jsonl

If it is stopped, the same command goes on. Prints one JSON object last: rows, responses, why responses have
no score, mean score by source, agreement with the rewards before, tokens. S1 is the paper SimpleMix, S2 "Is
On-Policy Data always the Best Choice [...]?", S3 "What Matters in Data for DPO?".
"""

import argparse
import fcntl
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from array import array
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Required, TypedDict

import msgspec

# Read when torch and vllm are imported. vllm starts its workers by spawn, since CUDA does not survive a fork;
# it logs on standard error. Large tensors get huge pages, which is a tenth faster on a CPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, for 30 ms, at every new length

# arguments that may change between a run that was stopped and the one that goes on
FREE = {"out", "overwrite", "limit", "shard", "batch_tokens", "tensor_parallel", "max_requests"}
CHUNK = 512  # tokens whose logits over the vocabulary are in memory at once
CHECKED_BYTES = 4e9  # weights up to here are also loaded by transformers, to check vllm's first rewards
Message = TypedDict("Message", {"role": str, "content": str})


class Response(TypedDict, total=False):
    text: Required[str]
    source: Required[Literal["on", "off"]]
    model: str | None
    finish: Literal["stop", "length"] | None  # "length": cut off at the longest response allowed
    token_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]] | None  # without the end-of-turn token
    tokenizer: str | None  # fingerprint of the tokenizer that made them
    reward: float | None
    reward_error: str | None
    scores: dict[str, float | None] | None  # every scorer's, by name


class Row(TypedDict, total=False):
    id: Required[str]
    prompt: Required[str | list[Message]]  # text is one user turn
    responses: Required[list[Response]]
    answer: str | int | float | None  # for --scorer verify
    labeler: str | None
    wins: list[list[Annotated[float, msgspec.Meta(ge=0, le=1)] | None]] | None  # P(response i beats j)
    cosine: list[list[float | None]] | None


def make_parser(description):
    """The flags of every scorer."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--responses", required=True, nargs="+", metavar="FILE", help="responses, JSONL, merged by id")
    flag("--out", required=True, metavar="FILE", help="scored responses, JSONL")
    flag("--shard", default="0/1", metavar="I/N", help="every N-th block of rows, from the I-th, from 0")
    flag("--limit", type=int, help="only the first rows")
    flag("--overwrite", action="store_true", help="start anew if --out is there")
    return parser


def add_model_flags(parser):
    """The flags of scorers that load a model with transformers."""
    flag = parser.add_argument
    flag("--model", help="Hugging Face folder or hub id")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on CUDA")
    flag("--batch-tokens", type=int, help="tokens in a batch, padding included (default 8192)")


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_model_flags(parser)
    flag = parser.add_argument
    flag("--scorer", choices=list(SCORERS), default="rm", help="default %(default)s")
    flag("--name", help='key in "scores" (default: the scorer); logp: part of its keys')
    flag("--max-length", type=int, help="longest input in tokens (default: what the model can read)")
    flag("--backend", choices=["auto", "vllm", "hf"], default="auto", help="rm; auto: vllm if it can")
    flag("--tensor-parallel", type=int, default=1, metavar="GPUS", help="for one model, rm by vllm")
    args = parser.parse_args(argv)
    check_args(parser, args)
    if args.scorer == "verify":
        model_flags = (args.model, args.revision, args.batch_tokens, args.max_length)
        if any(model_flags) or args.dtype != "auto" or args.backend != "auto" or args.tensor_parallel > 1:
            parser.error("--scorer verify has no model, and takes no flag of one")
    elif not args.model:
        parser.error(f"--scorer {args.scorer} needs --model")
    if args.scorer == "logp" and (args.backend == "vllm" or args.tensor_parallel > 1):
        parser.error("--scorer logp runs in transformers: --backend hf without --tensor-parallel")
    return args


def check_args(parser, args):
    for name in ("limit", "max_length", "batch_tokens", "tensor_parallel", "max_requests"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {value}")


class Scorer:
    """What main needs of a scorer. Each writes its results into the rows that it is given."""

    sets_reward = True
    window = 256  # rows that are scored together and then written

    def __init__(self, args, rows):
        """Check what can be known before a model loads; rows: {id: row}, all that will be scored."""
        self.args = args
        self.name = getattr(args, "name", None) or args.scorer
        self.labeler = ":".join(filter(None, (self.name, args.model)))
        self.counts = Counter()  # for the last line

    def load(self):
        """Load the model."""

    def score(self, rows, update):
        """Score a window of rows; update(n) moves the bar by n responses."""
        raise NotImplementedError

    def value(self, response):
        """The score of a response that was scored, for the last line."""
        return response["scores"][self.name]

    def set_reward(self, response, reward, error=None):
        if reward is not None and not math.isfinite(reward):
            reward, error = None, "not finite"
        response["scores"] = {**(response.get("scores") or {}), self.name: reward}
        response["reward"], response["reward_error"] = reward, error


# ----- verify
def final_answer(text):
    """The answer of a worked solution: the last \\boxed{...}, else what follows ####, else the last number."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + 6, len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 7 : end]
    if "####" in text:
        return text.rpartition("####")[2]
    numbers = re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)
    return numbers[-1] if numbers else None


def plain(text):
    """A number as a fraction (1,000 = 1000.0, 1/2 = 0.5), other text without spaces, case and currency."""
    text = re.sub(r"[\s,$%]|\\[!,;]|\.$", "", text).lower()
    number = re.fullmatch(r"(-?\d+(?:\.\d*)?|-?\.\d+)(?:/(\d+(?:\.\d+)?))?", text)
    if not number or (number[2] and not float(number[2])):
        return text
    return Fraction(number[1]) / Fraction(number[2] or 1)


class Verify(Scorer):
    """1.0 for the right final answer, 0.0 for another or none."""

    def score(self, rows, update):
        for row in rows:
            expected = row.get("answer")
            if expected is not None:
                expected = str(expected)
                if "\\boxed{" in expected or "####" in expected:
                    expected = final_answer(expected)
            for response in row["responses"]:
                answer = final_answer(response["text"])
                if expected is None:
                    self.set_reward(response, None, "the prompt has no answer")
                else:
                    right = answer is not None and plain(answer) == plain(expected)
                    self.set_reward(response, float(right))
            update(len(row["responses"]))


# ----- batches
def token_batches(sequences, args, counts, pad_id=0):
    """Yield (indices, ids (B, T), mask (B, T)) of sequences of token ids, padded on the right.

    Sequences are sorted by length; a batch has at most --batch-tokens, and padding up to 8 % of a sequence.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches, shortest = [], 0
    for index in sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i)):
        length = len(sequences[index])
        full = not batches or (len(batches[-1]) + 1) * length > (args.batch_tokens or 8192)
        if full or length > 1.08 * shortest:
            batches.append([])
            shortest = length
        batches[-1].append(index)
    for batch in batches:
        longest = len(sequences[batch[-1]])
        ids = torch.full((len(batch), longest), pad_id)
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        for place, index in enumerate(batch):
            ids[place, : len(sequences[index])] = torch.tensor(sequences[index])
            mask[place, : len(sequences[index])] = 1
        counts["tokens_scored"] += int(mask.sum())
        counts["tokens_padded"] += mask.numel()
        yield batch, ids.to(device), mask.to(device)


# ----- rm
def as_text(prompt):
    """A prompt for a reader without chat template: the question, or "role: text" lines of a conversation."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


class RewardModel(Scorer):
    """The raw logit of a model with one label, in float32."""

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.tokenizer, config = load_tokenizer(args.model, args.revision)
        kind = (config.architectures or ["no architecture"])[0]
        if config.num_labels != 1 or not kind.endswith("ForSequenceClassification"):
            found = f"{kind} with {config.num_labels} labels"
            fail(f"{args.model}: expected a ...ForSequenceClassification with one label, found {found}")
        self.chat = bool(self.tokenizer.chat_template)
        if not self.chat and not self.tokenizer.sep_token:
            fail(f"{args.model}: the tokenizer has no chat template and no separator for pairs of texts")
        if args.backend == "vllm" and (not self.chat or args.batch_tokens):
            fail("vllm reads chats, not pairs of texts, and takes no --batch-tokens: --backend hf")
        self.vllm = args.backend == "vllm"
        if args.backend == "auto":
            self.vllm = self.chat and not args.batch_tokens and bool(importlib.util.find_spec("vllm"))
        if args.tensor_parallel > 1 and not self.vllm:
            fail("--tensor-parallel is for vllm; in transformers a model spreads over all GPUs by itself")
        self.max_length = longest_input(args, config, self.tokenizer)
        texts = (response["text"] for row in rows.values() for response in row["responses"])
        self.counts["responses_with_special_tokens"] = count_special(texts, self.tokenizer)
        prompts = ("\n".join(turn["content"] for turn in row["prompt"]) for row in rows.values())
        self.counts["prompts_with_special_tokens"] = count_special(prompts, self.tokenizer)

    def encode(self, prompt, text):
        """(token ids, token types or None) of a prompt and a response."""
        if self.chat:
            turns = [*prompt, {"role": "assistant", "content": text}]
            return prompt_ids(self.tokenizer, turns, add_generation_prompt=False), None
        encoded = self.tokenizer(as_text(prompt), text)
        return encoded["input_ids"], encoded.get("token_type_ids")

    def load(self):
        folder = Path(self.args.model)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        self.checks = self.vllm and 0 < size <= CHECKED_BYTES
        if self.vllm and not self.checks:
            print("vllm's rewards are not compared with those of transformers: --limit 8 --backend hf does it")
        if not self.vllm or self.checks:
            from transformers import AutoModelForSequenceClassification as kind

            self.model = load_model(kind, self.args.model, self.args.revision, self.args.dtype)
        if self.vllm and not self.checks:
            self.engine = vllm_pooling(self.args, self.max_length)

    def score(self, rows, update):
        responses, sequences, types = [], [], []
        for row in rows:
            for response in row["responses"]:
                ids, kinds = self.encode(row["prompt"], response["text"])
                if len(ids) > self.max_length:
                    self.set_reward(response, None, f"longer than {self.max_length} tokens")
                    update(1)
                    continue
                responses.append(response)
                sequences.append(ids)
                types.append(kinds)
        rewards = self.vllm_rewards(sequences) if self.vllm else self.hf_rewards(sequences, types, update)
        for response, reward in zip(responses, rewards, strict=True):
            self.set_reward(response, reward)

    @torch.inference_mode()
    def hf_rewards(self, sequences, types, update):
        rewards = [None] * len(sequences)
        for batch, ids, mask in token_batches(sequences, self.args, self.counts, self.tokenizer.pad_token_id or 0):
            # Models on decoders have a linear `score` on the last token. transformers looks for that token by the
            # padding id, which is wrong if padding is also the end-of-turn token; here its place is known.
            if hasattr(self.model, "score"):
                hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, d)
                last = hidden[torch.arange(len(batch), device=hidden.device), mask.sum(1) - 1]  # (B, d)
                logits = last.float() @ self.model.score.weight[0].float().to(hidden.device)  # (B,)
            else:
                options = {}
                if types[batch[0]]:
                    kinds = [torch.tensor(types[i], device=ids.device) for i in batch]
                    options["token_type_ids"] = torch.nn.utils.rnn.pad_sequence(kinds, batch_first=True)
                logits = self.model(input_ids=ids, attention_mask=mask, **options).logits[:, 0].float()
            for index, reward in zip(batch, logits.tolist(), strict=True):
                rewards[index] = reward
            update(len(batch))
        return rewards

    def vllm_rewards(self, sequences):
        """The first 8 are held to those of transformers: another activation or pooled token would show."""
        expected = []
        if self.checks:
            expected = self.hf_rewards(sequences[:8], [None] * 8, lambda n: None)
            self.counts.clear()
            del self.model
            gc.collect()
            torch.cuda.empty_cache()
            self.engine, self.checks = vllm_pooling(self.args, self.max_length), False
        from vllm import PoolingParams

        params = PoolingParams(use_activation=False)  # vllm's default for one label is a sigmoid
        prompts = [{"prompt_token_ids": ids} for ids in sequences]
        outputs = self.engine.encode(prompts, pooling_task="classify", use_tqdm=True, pooling_params=params)
        rewards = [float(output.outputs.data[0]) for output in outputs]
        for ours, theirs in zip(expected, rewards, strict=False):
            if abs(ours - theirs) > 0.1 + 0.03 * abs(ours):  # bfloat16 is that coarse
                fail(f"{self.args.model}: vllm gives {theirs} where transformers gives {ours}: --backend hf")
        return rewards


def vllm_pooling(args, max_length):
    """vllm's engine with the reward head."""
    options = {}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: starts faster
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; its own choice is the whole machine
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}")  # it leaves a core idle
        options["enforce_eager"] = True
    from vllm import LLM

    return LLM(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        runner="pooling",
        convert="classify",
        max_model_len=min(max_length, 32768),
        tensor_parallel_size=args.tensor_parallel,
        **options,
    )


# ----- logp
def completion_ids(tokenizer, mark, end_id, response):
    """Ids of a response as a model is trained on it: as sampled if this tokenizer did it, ended unless cut."""
    ids = response.get("token_ids")
    if ids is None or response.get("tokenizer") != mark:
        ids = tokenizer(response["text"], add_special_tokens=False)["input_ids"]
    return list(ids) + [end_id] * (response.get("finish") != "length")


def output_head(model):
    """The head's weight (V, d) and bias; a model that changes its logits after the head is refused."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1.0):
            fail(f"{model.config.model_type} models change their logits by {name}, which is not done here")
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


def token_logps(states, targets, weight, bias):
    """log softmax(states @ weight.T + bias)[target], float32 (C,): states (C, d), targets (C,), weight (V, d).

    The logits are in float32, and of CHUNK tokens at a time. On CUDA bfloat16 is multiplied on tensor cores.
    """
    logps = []
    for chunk, ids in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
        if weight.is_cuda and weight.dtype != torch.float32:
            logits = torch.mm(chunk, weight.T, out_dtype=torch.float32)  # (CHUNK, V)
        else:
            logits = F.linear(chunk.float(), weight.float())
        logits = logits if bias is None else logits + bias.float()
        logps.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(logps)


class LogProbability(Scorer):
    """Sum over a response's tokens of log pi(y_t | x, y_<t) at temperature 1, and the number of these tokens."""

    sets_reward = False

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.key = f"logp_{args.name}" if args.name else "logp"
        self.tokenizer, config = load_tokenizer(args.model, args.revision)
        self.max_length = longest_input(args, config, self.tokenizer)
        self.mark, self.end_id = fingerprint(self.tokenizer), end_of_turn(self.tokenizer)
        vocabulary = config.get_text_config().vocab_size
        for row_id, row in rows.items():
            for response in row["responses"]:
                largest = max(completion_ids(self.tokenizer, self.mark, self.end_id, response), default=0)
                if largest >= vocabulary:
                    fail(f"the row {row_id} has the token id {largest}, and {args.model} has {vocabulary}")

    def load(self):
        from transformers import AutoModelForCausalLM

        self.model = load_model(AutoModelForCausalLM, self.args.model, self.args.revision, self.args.dtype)
        self.weight, self.bias = output_head(self.model)

    def value(self, response):
        return response[self.key]

    @torch.inference_mode()
    def score(self, rows, update):
        responses, prompts, sequences = [], [], []
        for row in rows:
            prompt = prompt_ids(self.tokenizer, row["prompt"])
            for response in row["responses"]:
                response[self.key] = response[f"{self.key}_tokens"] = None
                completion = completion_ids(self.tokenizer, self.mark, self.end_id, response)
                if not completion or len(prompt) + len(completion) > self.max_length:
                    update(1)
                    continue
                responses.append(response)
                prompts.append(prompt)
                sequences.append(prompt + completion)
        for batch, ids, _ in token_batches(sequences, self.args, self.counts):
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, d)
            states, targets = [], []
            for place, index in enumerate(batch):
                start, end = len(prompts[index]), len(sequences[index])
                states.append(hidden[place, start - 1 : end - 1])  # the state before a token predicts it
                targets.append(ids[place, start:end])
            weight = self.weight.to(hidden.device)
            logps = token_logps(torch.cat(states), torch.cat(targets).to(hidden.device), weight, self.bias)
            for index, values in zip(batch, logps.split([len(each) for each in targets]), strict=True):
                total = values.double().sum().item()
                if math.isfinite(total):
                    responses[index] |= {self.key: total, f"{self.key}_tokens": len(values)}
            update(len(batch))


SCORERS = {"rm": RewardModel, "verify": Verify, "logp": LogProbability}


# ----- main
def main(args, kind=None):
    """Score; scorers/*.py bring their own kind of Scorer."""
    started = time.time()
    kind = kind or SCORERS[args.scorer]
    rows, files = read_responses(args.responses, needs_reward=False), ", ".join(args.responses)
    labelers = {str(row.get("labeler")) for row in rows.values()}
    ...
