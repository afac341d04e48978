"""
Stage 4 of the pipeline: preference pairs -> a trained model, by DPO and its relatives.

Reads   --pairs FILE    a Row (below) per pair, as build_pairs.py writes it or as others ship it
Writes  --out FOLDER    a model folder in the type of --model, with metrics.jsonl, a row per optimizer step,
                        and metrics.meta.json, the record; next to it reference_cache, for all runs there

    L = -log sigma(beta h),  h = log(pi(y_w|x) / pi_ref(y_w|x)) - log(pi(y_l|x) / pi_ref(y_l|x))    S1 eq. 1

    python train_dpo.py --model out/models/policy --pairs out/on50.pairs.jsonl --out out/dpo --batch-size 8
    torchrun --nproc-per-node 8 train_dpo.py --model Qwen/Qwen3-8B --pairs uf.pairs.jsonl --out uf/dpo

The same command, without --overwrite, resumes a stopped run from its last checkpoint. The last line is a JSON
object: pairs, what was dropped, steps, losses, speed. S1 is SimpleMix, S2 "Is On-Policy Data always the Best
Choice [...]?", S3 "What Matters in Data for DPO?".
"""

import argparse
import fcntl
import gc
import itertools
import json
import math
import os
import resource
import shutil
import sys
import time
from array import array
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Required, TypedDict

import common
import loading
from chat import answer, prompt_ids, read_chat, response_ids, sampled_ids
from common import Message, TokenIds, append_rows, as_messages, fail, keep_rows, note, read_jsonl, stable_hash

PRESETS = {  # S1 section 4.1 and Appendix A, the rest from its code; S2 Table 6; S3 section 5.1 and B.3
    "s1": dict(beta=0.1, epochs=1, batch_size=256, schedule="linear", max_length=4096, adam_beta2=0.999),
    "s2": dict(beta=0.01, epochs=1, batch_size=128, schedule="cosine", max_length=4096, adam_beta2=0.999),
    "s3": dict(beta=0.1, epochs=2, batch_size=32, schedule="cosine", max_length=2048, adam_beta2=0.99),
}
WARMUP = 0.1  # of the steps, in all three papers
MAX_GRAD_NORM = 1.0  # S1's code; the papers do not say
COPIED = """tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json
    vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json generation_config.json config.json
""".split()  # from --model: transformers 4 cannot read the tokenizer_config.json that transformers 5 writes
TEMPLATES = "additional_chat_templates"  # a folder of the others, if there are several
CHUNK = {"cpu": 1024, "cuda": 4096}  # tokens whose logits over the vocabulary are in memory at once
WINDOW = 128  # sequences that each process scores before the reference cache is written
PROBE = 512  # tokens of the sequence that check_model compares with the model's own logits
NEIGHBOUR = 0.01  # as loading.ROUNDING, between rows of one length; measured 0 to 6e-4, leaks from 0.05
MAY_CHANGE = {"save_every", "micro_tokens", "activation_checkpointing"}  # when a run is resumed
CacheRow = TypedDict("CacheRow", {"key": str, "logp": float})  # of the reference cache


class Row(TypedDict, total=False):
    pair_id: str | int | None  # unique; without it a hash of the texts
    prompt: str | list[Message] | None  # text is one user turn; None: chosen and rejected begin with it
    prompt_token_ids: TokenIds | None  # as the model saw it that sampled responses to it
    prompt_tokenizer: str | None  # fingerprint of the tokenizer and chat template that made them
    chosen: Required[str | list[Message]]
    rejected: Required[str | list[Message]]
    source: str | None  # "on", "off", "cross"
    chosen_reward: float | None
    rejected_reward: float | None
    chosen_finish: str | None  # "length": truncated, so without an end of turn
    rejected_finish: str | None
    chosen_token_ids: TokenIds | None
    rejected_token_ids: TokenIds | None
    chosen_tokenizer: str | None  # fingerprint of the tokenizer that made the ids
    rejected_tokenizer: str | None


class Sequence(NamedTuple):
    ids: array  # prompt and response; an array, which of a file's pairs takes a tenth of the memory
    start: int  # of the response, whose tokens are trained


class Pair(NamedTuple):
    pair_id: str
    source: str  # "" if the file has none
    sequences: list[Sequence]  # chosen and rejected; only chosen for a loss without a rejected side
    reward_margin: float  # reward of chosen minus reward of rejected
    reference_logps: tuple[float, ...]  # of the sequences under the reference model; 0 without one
    keys: tuple[str, ...] = ()  # of the sequences in the reference cache

    def tokens(self):
        return sum(len(sequence.ids) for sequence in self.sequences)


def number(kind, allow_0=False, below=math.inf):
    """The argparse type of a number above 0, or of at least 0, and below a bound."""

    def convert(text):
        value = kind(text)
        if not (0 < value < below or allow_0 and value == 0):
            bound = "at least" if allow_0 else "above"
            raise argparse.ArgumentTypeError(f"must be {bound} 0 and below {below}, found {text}")
        return value

    convert.__name__ = kind.__name__  # argparse says it: invalid int value
    return convert


# ----- losses: torch is imported below, after the flags, so that --help and wrong flags answer at once
class Batch(NamedTuple):
    # a packed row of B pairs, not a step: a mean over B would depend on --micro-tokens and the GPUs;
    # recipes/train_kto.py shows a loss with a mean over the step
    chosen: "torch.Tensor"  # (B,) log(pi(y_w|x) / pi_ref(y_w|x)), or log pi(y_w|x) without a reference
    rejected: "torch.Tensor | None"  # (B,) the same of y_l; None for a loss without a rejected side
    logps: "torch.Tensor"  # (B, 2) log pi of chosen and rejected; (B, 1) without a rejected side
    tokens: "torch.Tensor"  # the same shape: numbers of tokens of the responses
    reward_margins: "torch.Tensor"  # (B,) reward of chosen minus reward of rejected


LOSSES, LOSS_FLAGS = {}, {}  # {name: function}, {flag: [functions that have it]}


def loss(reference=True, rejected=True, rewards=False, per_token=False):
    """Register a function from a Batch to a loss per pair (B,); its name becomes a --loss.

    reference: it compares log-ratios, not log-probabilities; rejected: it reads the rejected response;
    rewards: pairs must have them; per_token: it compares means over tokens. Its keyword parameters are flags,
    positive numbers unless annotated with another argparse type; a default of None is the preset's.
    """

    def register(function):
        function.reference, function.rejected = reference, rejected
        function.rewards, function.per_token = rewards, per_token
        function.flags = function.__kwdefaults__ or {}  # {name: default}
        LOSSES[function.__name__] = function
        for name in function.flags:
            LOSS_FLAGS.setdefault(name, []).append(function)
        return function

    return register


@loss()
def dpo(batch, *, beta=None):
    """DPO (S1 eq. 1): -log sigma(beta h)."""
    return -F.logsigmoid(beta * (batch.chosen - batch.rejected))


@loss()
def hinge(batch, *, beta=None):
    """max(0, 1 - beta h), of RSO: one reading of what S2 calls SLiC-HF; slic is the other."""
    return F.relu(1 - beta * (batch.chosen - batch.rejected))


@loss(rewards=True)
def revkl(batch, *, beta=None, margin_scale=1.0):
    """DPO with soft labels sigma(scale * reward margin), the loss in the code of S1's DPO-Mix-P."""
    p = torch.sigmoid(margin_scale * batch.reward_margins)
    h = batch.chosen - batch.rejected
    return -p * F.logsigmoid(beta * h) - (1 - p) * F.logsigmoid(-beta * h)


@loss(reference=False)
def slic(batch, *, slic_delta=1.0, slic_lambda: number(float, allow_0=True) = 0.1):
    """SLiC-HF (S2 Table 5): max(0, delta - log pi(y_w) + log pi(y_l)) - lambda log pi(y_w)."""
    return F.relu(slic_delta - batch.chosen + batch.rejected) - slic_lambda * batch.chosen


@loss(reference=False, rejected=False)
def sft(batch):
    """Supervised fine-tuning (S3 Table 2): the mean over tokens, so that all responses weigh the same."""
    return -batch.chosen / batch.tokens[:, 0]


def pair_losses(args, batch):
    flags = {name: getattr(args, name) for name in LOSSES[args.loss].flags}
    return LOSSES[args.loss](batch, **flags)


# ----- flags
def make_parser(description):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    flag, count, unset = parser.add_argument, number(int), {"default": argparse.SUPPRESS}
    flag("--model", required=True, help="model folder, or OWNER/NAME on the hub, to start from")
    flag("--revision", help="branch, tag or commit of --model on the hub")
    flag("--reference", metavar="MODEL", help="model of the reference log-probabilities (default: --model)")
    flag("--pairs", required=True, metavar="FILE", help="pairs, JSONL")
    flag("--eval-pairs", metavar="FILE", help="held-out pairs, measured every --save-every steps and last")
    flag("--out", required=True, metavar="FOLDER", help="the trained model")
    flag("--loss", choices=list(LOSSES), default="dpo", help="default %(default)s")
    for name, users in LOSS_FLAGS.items():
        kind = users[0].__annotations__.get(name, number(float))
        text = ", ".join(f"{user.__name__} {user.flags[name]}" for user in users)
        text = "default: " + text.replace("None", "the preset's")
        flag(f"--{name.replace('_', '-')}", type=kind, help=text, **unset)
    flag("--preset", choices=list(PRESETS), default="s1", help="sets --beta and the next five (default s1)")
    flag("--epochs", type=count, **unset)
    flag("--batch-size", type=count, **unset, help="pairs in an optimizer step, over all GPUs")
    flag("--schedule", choices=["linear", "cosine"], **unset, help="how the learning rate falls")
    flag("--max-length", type=count, **unset, help="longer pairs are dropped")
    flag("--adam-beta2", type=number(float, below=1), **unset, help="decay of Adam's second moment")
    flag("--lr", type=number(float), default=5e-7, help="highest learning rate (default 5e-7)")
    flag("--seed", type=int, default=0, help="seed of the order of the pairs (default 0)")
    flag("--template-kwargs", type=json.loads, default={}, metavar="JSON", help="as given to generate.py")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on CUDA")
    flag("--micro-tokens", type=count, help="tokens in a forward pass (default 4096 on CUDA, else 1024)")
    flag("--activation-checkpointing", action="store_true", help="less memory, a third slower")
    flag("--save-every", type=count, default=100, help="steps between checkpoints (default 100)")
    flag("--overwrite", action="store_true", help="start over if --out contains a run")
    return parser


def parse_args(argv=None, parser=None):
    parser = parser or make_parser(__doc__)
    given = vars(parser.parse_args(argv))  # the preset's flags and those of losses only if they were given
    preset, loss = PRESETS[given["preset"]], LOSSES[given["loss"]]
    defaults = preset | {"beta": 1.0}  # of a loss without beta: its metrics' rewards are not scaled
    for name, default in loss.flags.items():
        defaults[name] = preset[name] if default is None else default
    for name in (LOSS_FLAGS.keys() - loss.flags.keys()) & given.keys():
        parser.error(f"--{name.replace('_', '-')} has no effect with --loss {given['loss']}")
    if given["reference"] and not loss.reference:
        parser.error(f"--reference has no effect with --loss {given['loss']}")
    if loss.reference:
        given["reference"] = given["reference"] or given["model"]
    if given["revision"] and os.path.isdir(given["model"]):
        parser.error("--revision is for a model on the hub, but --model is a folder")
    if not isinstance(given["template_kwargs"], dict):
        parser.error(f"--template-kwargs: expected a JSON object, found {given['template_kwargs']}")
    return argparse.Namespace(**(defaults | given))


if __name__ == "__main__":
    ARGS = parse_args()
    for path in filter(None, (ARGS.pairs, ARGS.eval_pairs)):
        next(read_jsonl(path, Row), None)  # a file of another format ends the run before torch is imported

# torch reads these: rows of different lengths fragment a GPU's memory; huge pages make a CPU a tenth faster
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.nn.attention.varlen import varlen_attn  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.utils import cached_file  # noqa: E402

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans for 30 ms at every new length
VARLEN_GROUPS_HEADS = "enable_gqa" in varlen_attn.__annotations__  # not in torch 2.11


def learning_rate(step, steps, highest, schedule):
    """Linear warm-up over a tenth of the steps, then down to 0 (S2 Table 6, S3 B.3 cosine; S1 linear)."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)  # from 1 at the end of the warm-up towards 0
    return highest * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


# ----- log-probabilities without the logits
def head_logits(states, weight, bias, cap):
    """Float32 logits (C, V) of states (C, d). On CUDA bfloat16 is multiplied on tensor cores."""
    if weight.is_cuda and weight.dtype != torch.float32:
        logits = torch.mm(states, weight.T, out_dtype=torch.float32)
    else:
        logits = states.float() @ weight.T.float()
    logits = logits if bias is None else logits.add_(bias)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class TokenLogps(torch.autograd.Function):
    """log softmax(states @ weight.T + bias)[target], float32, with the logits of CHUNK tokens in memory.

    states (C, d), weight (V, d), bias (V,) or None, targets (C,) -> (C,); with a cap the logits are
    cap tanh(logits / cap). Backward computes a chunk's logits again: d logits = grad * (one-hot(target) -
    softmax), times the slope of the cap.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, targets, cap=None):
        chunk = CHUNK[states.device.type]
        logps, lses = [], []
        for part, ids in zip(states.split(chunk), targets.split(chunk), strict=True):
            logits = head_logits(part, weight, bias, cap)  # (CHUNK, V)
            target_logits = logits.gather(1, ids[:, None])[:, 0]
            highest = logits.amax(-1, keepdim=True)
            lse = logits.sub_(highest).exp_().sum(-1).log_() + highest[:, 0]  # in place: no second (CHUNK, V)
            lses.append(lse)
            logps.append(target_logits - lse)
            del logits
        ctx.save_for_backward(states, weight, bias, targets, torch.cat(lses))
        ctx.cap = cap
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        states, weight, bias, targets, lse = ctx.saved_tensors
        chunk = CHUNK[states.device.type]
        options = {"out_dtype": torch.float32} if weight.is_cuda and weight.dtype != torch.float32 else {}
        grad_states = torch.empty_like(states)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # summed over the chunks in float32
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            d_logits = head_logits(states[rows], weight, bias, ctx.cap)  # (CHUNK, V)
            slope = None if ctx.cap is None else 1 - (d_logits / ctx.cap).square_()
            d_logits.sub_(lse[rows, None]).exp_()  # softmax
            d_logits.mul_(-grad[rows, None]).scatter_add_(1, targets[rows, None], grad[rows, None])
            if slope is not None:
                d_logits.mul_(slope)
            if bias is not None:
                grad_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            grad_states[rows] = d_logits @ weight
            grad_weight += torch.mm(d_logits.T, states[rows], **options)
            del d_logits
        return grad_states, grad_weight, grad_bias, None, None


# ----- the model on rows of sequences
def packed_attention(module, query, key, value, attention_mask, scaling, lengths=None, ends=None, **kwargs):
    """Causal attention within each sequence of a row, for transformers' AttentionInterface.

    query (1, H, T, D), key and value (1, H_kv, T, D); lengths of the S sequences, which sum to T, and their
    boundaries `ends`, int32 (S + 1,), 0 first -> (1, T, H, D). What it cannot do is a NotImplementedError.
    """
    if lengths is None:
        raise NotImplementedError("its layers are not told where they begin")
    for name, problem in (("softcap", "a soft cap"), ("s_aux", "sinks")):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{problem} in attention")
    if (kwargs.get("sliding_window") or math.inf) < max(lengths):
        raise NotImplementedError(
            f"a window of {kwargs['sliding_window']} tokens is shorter than the longest"
        )
    if query.is_cuda and query.dtype == torch.bfloat16:  # one kernel for all sequences
        options = {"scale": scaling, "window_size": (-1, 0)}  # causal
        options |= {"enable_gqa": True} if VARLEN_GROUPS_HEADS else {}
        if not VARLEN_GROUPS_HEADS:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
        return varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths), **options)[None], None
    # one split, since the backward of a slice writes a gradient as long as the row
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    options = {"is_causal": True, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    attended = [F.scaled_dot_product_attention(q, k, v, **options) for q, k, v in parts]
    return torch.cat(attended, 2).transpose(1, 2), None


class PolicyLogps(torch.nn.Module):
    """A causal language model whose forward gives log-probabilities of tokens, never logits.

    The head is used here, where FSDP2 holds its weight whole and in the compute type. Before backward it is
    gathered again into the same tensor, so TokenLogps may keep it.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.attention = model, model.config._attn_implementation
        self.pack(model._supports_attention_backend)

    def pack(self, packed):
        """Whether sequences share a row, with packed_attention; else the model's own attention runs."""
        self.packed = packed
        self.model.set_attn_implementation("packed" if packed else self.attention)

    def forward(self, ids, before, targets, **layout):
        """ids (1, T); before (C,): indices of the states before targets (C,) -> (C,) float32"""
        output = self.model.base_model(input_ids=ids, use_cache=False, **layout)
        weight, bias, scale, cap = loading.output_head(self.model)
        return TokenLogps.apply(scale * output.last_hidden_state[0, before], weight, bias, targets, cap)


def sequence_logps(policy, sequences):
    """Summed log-probabilities of the responses of S sequences, and their numbers of tokens; (S,) float64.

    The sequences are one row, or each a row of its own if the model cannot be packed.
    """
    if len(sequences) > 1 and not policy.packed:
        rows = [sequence_logps(policy, [sequence]) for sequence in sequences]
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]
    lengths = [len(sequence.ids) for sequence in sequences]
    counts = [len(sequence.ids) - sequence.start for sequence in sequences]
    ids = torch.tensor([token for sequence in sequences for token in sequence.ids])  # (T,)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ends = [0, *itertools.accumulate(lengths)]
    trained = torch.cat([torch.arange(end - n, end) for end, n in zip(ends[1:], counts, strict=True)])  # (C,)
    # the state before a token predicts it; the first token of a sequence is never trained
    inputs = [ids[None], positions[None], torch.tensor(ends, dtype=torch.int32), trained - 1, ids[trained]]
    device = policy.model.device
    ids, positions, ends, before, targets = (to_device(tensor, device) for tensor in inputs)
    layout = {"position_ids": positions, "lengths": lengths, "ends": ends} if policy.packed else {}
    logps = policy(ids, before, targets, **layout)
    sums = torch.stack([part.double().sum() for part in logps.split(counts)])
    return sums, to_device(torch.tensor(counts, dtype=torch.float64), device)


def to_device(tensor, device):
    """The tensor on the device; Python does not wait for a GPU to finish its work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ----- a step
DUMMY = Sequence([0, 0], 1)  # for a process that has nothing left, while others have; as many as they have


def sequences_of(pairs):
    return [sequence for pair in pairs for sequence in pair.sequences]


def micro_batches(lengths, budget, rank, world):
    """The batches of one of `world` processes: indices of `lengths`, at most `budget` tokens in a batch.

    Longest first, dealt to the processes in turn; what exceeds the budget is a batch of its own (0: all are).
    FSDP2 needs equally many forward passes on all processes, so one that has fewer gets empty batches.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    shares = []
    for first in range(world):
        batches, room = [], 0
        for index in order[first::world]:
            if lengths[index] > room:
                batches.append([])
                room = budget
            batches[-1].append(index)
            room -= lengths[index]
        shares.append(batches)
    most = max(len(batches) for batches in shares)
    return shares[rank] + [[]] * (most - len(shares[rank]))


def make_batch(pairs, logps, counts, args):
    """The Batch of B pairs, from log-probabilities and numbers of tokens of their sequences, one by one."""
    logps, counts = logps.view(len(pairs), -1), counts.view(len(pairs), -1)  # (B, 2), or (B, 1)
    numbers = [[*pair.reference_logps, pair.reward_margin] for pair in pairs]
    numbers = to_device(torch.tensor(numbers, dtype=torch.float64), logps.device)
    compared = logps - numbers[:, :-1]
    if LOSSES[args.loss].per_token:
        compared = compared / counts
    chosen, rejected = [*compared.unbind(1), None][:2]
    return Batch(chosen, rejected, logps, counts, numbers[:, -1])


def forward_backward(policy, pairs, args, step, train=True):
    """Metrics of every pair, on all processes; with `train` also the gradient of the pairs' mean loss."""
    measured, lengths = [], [pair.tokens() for pair in pairs]
    for indices in micro_batches(lengths, policy.packed * args.micro_tokens, *rank_and_world()):
        members = [pairs[index] for index in indices]
        logps, counts = sequence_logps(policy, sequences_of(members) or [DUMMY] * len(pairs[0].sequences))
        losses = 0 * logps  # of DUMMY: the others wait for this process to reduce gradients
        if members:
            batch = make_batch(members, logps, counts, args)
            losses = pair_losses(args, batch)
            measured.append((members, pair_metrics(batch, losses, args.beta)))
        if train:
            (losses.sum() / len(pairs)).backward()  # over the pairs of the step, not of this row
    rows = []
    for members, metrics in measured:  # metrics stay on the device until here, so that it need not wait
        for pair, *values in zip(members, *[column.tolist() for column in metrics.values()], strict=True):
            row = {"pair_id": pair.pair_id, "source": pair.source, "tokens": pair.tokens()}
            rows.append(row | dict(zip(metrics, values, strict=True)))
    rows = from_all_processes(rows)
    wrong = [row["pair_id"] for row in rows if not math.isfinite(row["loss"])]
    if wrong:
        fail(f"step {step}: the loss is not finite for {', '.join(wrong)}")
    return rows


def pair_metrics(batch, losses, beta):
    """Metrics of each pair, (B,); metrics.jsonl has their means. The chosen reward often falls in DPO."""
    logps, per_token = batch.logps, batch.logps / batch.tokens
    metrics = {"loss": losses, "chosen_logp": logps[:, 0], "chosen_logp_per_token": per_token[:, 0]}
    if batch.rejected is not None:
        chosen_reward, rejected_reward = beta * batch.chosen, beta * batch.rejected
        metrics |= {
            "accuracy": (chosen_reward > rejected_reward).double(),
            "margin": chosen_reward - rejected_reward,
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "rejected_logp": logps[:, 1],
            "rejected_logp_per_token": per_token[:, 1],
            "diversity": logps[:, 0] - logps[:, 1],  # S2 eq. 12
        }
    return {name: values.detach() for name, values in metrics.items()}


def means(rows):
    """Means over pairs, and the standard deviations of margin and diversity."""
    names = [name for name in rows[0] if name not in ("pair_id", "source", "tokens")]
    mean = {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
    for name in {"margin", "diversity"} & mean.keys():
        squares = [(row[name] - mean[name]) ** 2 for row in rows]
        mean[f"{name}_std"] = math.sqrt(math.fsum(squares) / len(rows))
    return mean | {"pairs": len(rows)}


def metrics_row(rows):
    """A row of metrics.jsonl: means over all pairs, and over those of each source if there are several."""
    sources = sorted({row["source"] for row in rows})
    by_source = {source: means([row for row in rows if row["source"] == source]) for source in sources}
    tokens = sum(row["tokens"] for row in rows)
    return means(rows) | {"tokens": tokens, "by_source": by_source if len(sources) > 1 else None}


# ----- reference
@torch.no_grad()
def all_logps(policy, sequences, budget):
    """Log-probabilities of sequences, a list on every process; the processes share the work."""
    mine, lengths = [], [len(ids) for ids, _ in sequences]
    for indices in micro_batches(lengths, policy.packed * budget, *rank_and_world()):
        logps, _ = sequence_logps(policy, [sequences[index] for index in indices] or [DUMMY])
        mine += zip(indices, logps.tolist(), strict=False)  # DUMMY belongs to no index
    release(policy)
    return [logp for _, logp in sorted(from_all_processes(mine))]


def with_reference(policy, pairs, cache, args):
    """The pairs with reference_logps: from the file `cache`, to which missing ones are appended."""
    first, logps = dist.get_rank() == 0, {}
    if first:
        with lock_cache(cache):
            rows = read_jsonl(cache, CacheRow) if os.path.getsize(cache) else ()
            logps = {row["key"]: row["logp"] for _, row in rows}
    logps = from_all_processes([logps])[0]
    keys = [key for pair in pairs for key in pair.keys]
    sequences = dict(zip(keys, sequences_of(pairs), strict=True))
    missing = sorted(sequences.keys() - logps.keys(), key=lambda key: (len(sequences[key].ids), key))
    size = WINDOW * dist.get_world_size()
    for start in tqdm(range(0, len(missing), size), "reference", unit="window", disable=not first):
        window = missing[start : start + size]
        values = all_logps(policy, [sequences[key] for key in window], 4 * args.micro_tokens)
        if not all(map(math.isfinite, values)):
            fail(f"{args.reference}: the log-probability of a response is not finite")
        logps |= zip(window, values, strict=True)
        if first:
            with lock_cache(cache) as file:
                append_rows(file, [{"key": key, "logp": logps[key]} for key in window])
    values = iter([logps[key] for key in keys])
    return [pair._replace(reference_logps=tuple(next(values) for _ in pair.sequences)) for pair in pairs]


@contextmanager
def lock_cache(path):
    """The reference cache, open to append. Runs that share it take turns; a torn last line is cut."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        keep_rows(path)
        yield file


# ----- loading, checking, sharding and writing the model
def load_policy(name, revision, args):
    """The model in float32 (bfloat16 weights would lose a step of 5e-7), sharded; it computes in --dtype."""
    AttentionInterface.register("packed", packed_attention)
    config = AutoConfig.from_pretrained(name, revision=revision)
    text_config = config.get_text_config()
    for key, value in vars(text_config).items():
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            setattr(text_config, key, 0.0)  # policy and reference must be the same function
    options = {"device_map": None, "config": config}
    model = loading.load_model(AutoModelForCausalLM, name, revision, "auto", **options)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    compute = torch.bfloat16 if args.dtype == "bfloat16" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    policy = PolicyLogps(model).train()  # in eval mode there is no activation checkpointing
    policy.dtypes = {key: value.dtype for key, value in model.state_dict().items()}  # of --model, for export
    layers = [part for part in model.modules() if type(part).__name__ in (model._no_split_modules or ())]
    if not layers:
        fail(f"{name}: transformers names no layer class of {config.model_type} models (_no_split_modules)")
    # embedding, last norm and head stay in the root's group: they may be tied
    for module in [*reversed(layers), policy]:
        fully_shard(module.to(device).float(), mesh=mesh, mp_policy=precision)
        if dist.get_world_size() > 1:  # gradients are summed: the loss is divided by the pairs of the step
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    release(policy)
    return policy


def release(policy):
    """Back to shards, on which the optimizer steps; with several processes also after later forwards."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(dist.get_world_size() > 1, recurse=False)
            module.reshard()


@torch.no_grad()
def check_model(policy, pairs, args):
    """Decide whether sequences share rows; refuse a model whose numbers are not those of its own logits.

    A short convolution may leak less than ROUNDING over a boundary: what is before it is also reversed.
    """
    sequences = sorted(sequences_of(pairs), key=lambda sequence: len(sequence.ids))
    # all tokens of the probe count, also the first ones, which see most of what leaks over a boundary
    longest, probe = sequences[-1], Sequence(sequences[len(sequences) // 4].ids[:PROBE], 1)
    rows = [probe], [longest, probe], [Sequence(longest.ids[::-1], longest.start), probe]
    model, ids = policy.model, torch.tensor(probe.ids, device=policy.model.device)
    packed, problem = policy.packed, "its layers are not told where they begin"
    policy.pack(False)
    unpacked, _ = sequence_logps(policy, [probe])
    policy.unshard()  # embedding and head, which are the root's
    exact = loading.check_logps(model, ids, 1, unpacked, args.dtype)
    release(policy)
    if not math.isfinite(exact + unpacked.item()):
        fail(f"{model.name_or_path}: the log-probability of a response is not finite")
    rounding = loading.ROUNDING[args.dtype] * math.sqrt(len(ids))
    neighbour = NEIGHBOUR * math.sqrt(len(ids))
    if packed:
        policy.pack(True)
        try:
            single, after, turned = (sequence_logps(policy, row)[0][-1].item() for row in rows)
            logps = f"{single:.4f} in one, {after:.4f} and {turned:.4f} after others, exactly {exact:.4f}"
            same = abs(single - exact) <= rounding and abs(single - after) <= rounding
            problem = None if same and abs(after - turned) <= neighbour else f"a log-probability is {logps}"
        except NotImplementedError as error:
            problem = str(error)
        release(policy)
    if problem:
        policy.pack(False)
        cannot = f"{model.config.model_type} sequences cannot be packed into one row ({problem})"
        note_once(f"{model.name_or_path}: {cannot}; each is a row of its own, which is slower")


def export(policy, args):
    """Write --out as a model folder in the type of --model. All processes gather, the first one writes."""
    weights = {}
    folder = Path(args.out, "checkpoints", "model")
    for name, value in policy.model.state_dict().items():
        if name in policy.model.all_tied_weights_keys:
            continue
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # one at a time
        if dist.get_rank() == 0:  # a copy, since what was gathered may be a view of something padded
            weights[name] = value.detach().to("cpu", policy.dtypes[name], copy=True)
    if dist.get_rank() == 0:
        try:
            policy.model.save_pretrained(folder, state_dict=weights)
            for path in folder.glob("*.safetensors*"):
                os.replace(path, Path(args.out, path.name))
            options = {"revision": args.revision, "_raise_exceptions_for_missing_entries": False}
            paths = [cached_file(args.model, name, **options) for name in COPIED]
            source = Path(paths[-1]).parent  # config.json is last, after which --out is a model
            for path in [*source.glob(f"{TEMPLATES}/*.jinja"), *filter(None, paths)]:
                target = Path(args.out, Path(path).relative_to(source))
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        except Exception as error:  # of a full disk: the libraries raise OSError, SafetensorError, Exception
            shutil.rmtree(folder, ignore_errors=True)
            fail(f"--out {args.out} cannot be written: {error}; run the same command again to resume")
    from_all_processes([])  # the others wait


# ----- pairs
def read_pair(row, line):
    """The row with its line, a pair_id, messages as its prompt, and its responses, chosen and rejected."""
    prompts, responses = [], []
    for side in ("chosen", "rejected"):
        prompt, messages = row.get("prompt"), row[side]
        if isinstance(messages, str):
            role, text = "assistant", messages
            if text.startswith("\n\nHuman:"):  # a whole conversation, as hh-rlhf writes it
                prompt, _, text = text.rpartition("\n\nAssistant:")
                role = "user" if "\n\nHuman:" in text else role
                text = text.removeprefix(" ")
            messages = [{"role": role, "content": text}]
        if not messages or messages[-1]["role"] != "assistant":
            fail(f"{line}: expected {side} to be text, or messages that end with the assistant's")
        details = {key: row.get(f"{side}_{key}") for key in ("finish", "token_ids", "tokenizer")}
        responses.append({"text": messages[-1]["content"], **details})
        prompts.append(messages[:-1] or prompt)
    prompts = [as_messages(prompt, line) for prompt in prompts]
    if prompts[0] != prompts[1]:
        remedy = "data/import_responses.py --format pairs leaves such rows out"
        fail(f"{line}: chosen and rejected answer different prompts; {remedy}")
    if isinstance(row.get("prompt"), list) and row["prompt"] != prompts[0]:
        fail(f"{line}: expected chosen and rejected to answer the prompt, or to begin with its messages")
    prompt = [{"role": turn["role"], "content": turn["content"], **turn} for turn in prompts[0]]
    pair_id = row.get("pair_id")
    named = pair_id is not None
    if not named:  # the role of a turn is first in this hash
        texts = [response["text"] for response in responses]
        pair_id = f"{stable_hash(json.dumps(prompt), *texts):016x}"
    row |= {"line": line, "pair_id": str(pair_id), "named": named}
    row |= {"prompt": prompt, "responses": responses}
    return row


def load_pairs(path, chat, config, args):
    """All pairs as token ids, and how many were dropped by reason and source: the same with every loss."""
    loss = LOSSES[args.loss]
    longest = min(args.max_length, loading.context_length(config))
    pairs, pair_ids, dropped, counts = [], set(), Counter(), Counter()
    rows = (read_pair(row, line) for line, row in read_jsonl(path, Row))
    while window := list(itertools.islice(rows, 8 * WINDOW)):
        for row, sequences, reason in encoded(window, chat, counts):
            line = row["line"]
            if row["pair_id"] in pair_ids:
                if row["named"]:
                    fail(f"{line}: duplicate pair_id {row['pair_id']} in this file")
                reason = "duplicate"
            pair_ids.add(row["pair_id"])
            rewards = row.get("chosen_reward"), row.get("rejected_reward")
            if loss.rewards and None in rewards and not reason:
                fail(f"{line}: --loss {args.loss} needs chosen_reward and rejected_reward, found {rewards}")
            if not reason and max(len(ids) for ids, _ in sequences) > longest:
                reason = "too long"
            source = row.get("source") or ""
            if reason:
                dropped[f"{reason} ({source})" if source else reason] += 1
                continue
            if not loss.rejected:
                del sequences[1]
            margin = 0.0 if None in rewards else rewards[0] - rewards[1]
            keys = tuple(f"{stable_hash(start, ids.tobytes().hex()):016x}" for ids, start in sequences)
            pairs.append(Pair(row["pair_id"], source, sequences, margin, (0.0,) * len(sequences), keys))
    for name, count in (+counts).items():
        note_once(f"{path}: {count} {name.replace('_', ' ')}")
    if dropped:
        note_once(f"{path}: {len(pairs)} pairs; dropped: {dict(dropped)}")
    return pairs or fail(f"{path}: no pair is left: {dict(dropped)}"), dropped


def encoded(rows, chat, counts):
    """Yield (row, [chosen, rejected], why not) of rows of read_pair, which are tokenized together."""
    prompts, problems = prompt_ids(chat, rows, counts)
    twice = [prompt for prompt in prompts for _ in ("chosen", "rejected")]
    responses = [response for row in rows for response in row["responses"]]
    parts = response_ids(chat, twice, responses, counts)
    special = loading.special_tokens(chat.tokenizer)
    for index, row in enumerate(rows):
        line = row["line"]
        pair = parts[2 * index : 2 * index + 2]
        reason = why_dropped(pair, row["responses"], chat, special)
        if reason == "rejected by the chat template":
            note_once(f"{line}: {problems.get(index, 'the chat template loses a response')}")
        if not reason:
            pair = [Sequence(array("I", prompt + completion), len(prompt)) for prompt, completion in pair]
            if max(max(sequence.ids) for sequence in pair) >= chat.vocabulary:
                fail(f"{line}: a token id is beyond the vocabulary of {chat.tokenizer.name_or_path}")
        yield row, pair, reason


def why_dropped(pair, responses, chat, special):
    """Why [(ids of the prompt, ids of the response), ...] make no pair; None if they do."""
    if not all(response["text"].strip() for response in responses):
        return "empty"
    if None in pair:
        return "rejected by the chat template"
    for response in responses:
        if special.search(response["text"]) and not sampled_ids(chat, response):
            return "special tokens"  # the model would learn to go on after an end of turn
        if not answer(response).strip():
            return "empty after its reasoning"
    (_, chosen), (_, rejected) = pair
    if not (chosen and rejected):
        return "without tokens"
    return "identical" if chosen == rejected else None


def epoch_order(pairs, seed, epoch):
    """The order of an epoch: it depends on seed, epoch and ids, not on the order in the file."""
    return sorted(pairs, key=lambda pair: (stable_hash(seed, "train", epoch, pair.pair_id), pair.pair_id))


# ----- the run
def start_processes(args):
    """Those of torchrun, or this one; the arguments that depend on the device."""
    on_cuda, by_torchrun = torch.cuda.is_available(), "RANK" in os.environ
    single = {} if by_torchrun else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", **single)
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif by_torchrun:  # which sets one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    if args.dtype == "auto":
        args.dtype = "bfloat16" if on_cuda else "float32"
    args.micro_tokens = args.micro_tokens or (4096 if on_cuda else 1024)


def check_paths(args, models, chat):
    """Refuse a reference with another tokenizer, and an --out that is a model in use or not made here."""
    for name in models.keys() - {args.model}:
        if loading.fingerprint(loading.load_tokenizer(name)[0]) != chat.fingerprint:
            fail(f"--reference {name}: its tokenizer differs from that of --model {args.model}")
    if os.path.realpath(args.out) in map(os.path.realpath, models):
        fail(f"--out {args.out} is the model being read")
    made_here = os.path.exists(f"{args.out}/metrics.jsonl")
    if os.path.exists(f"{args.out}/config.json") and not (made_here or args.overwrite):
        fail(f"--out {args.out} contains a model that this script did not write; --overwrite replaces it")


@contextmanager
def open_run(args, record, steps):
    """(metrics.jsonl, the step to start from, counts of a finished run); the first process has the file."""
    folder = Path(args.out)
    output = argparse.Namespace(out=str(folder / "metrics.jsonl"), overwrite=args.overwrite)
    if dist.get_rank() > 0:
        yield None, *from_all_processes([])[0]
        return
    try:
        with common.open_output(output, record, MAY_CHANGE, range(steps), key="step") as (file, rows, counts):
            saved = [int(path.name) for path in folder.glob("checkpoints/[0-9]*")]
            done = max([step for step in saved if step <= rows], default=0)
            from_all_processes([(done, counts)])
            yield file, done, counts
    finally:
        with suppress(OSError):
            folder.rmdir()  # if it is empty: the run was refused


def begin(args, file, record, done):
    """Prepare --out. A new run empties metrics.jsonl first: a kill leaves no old run that looks complete."""
    common.begin_output(file, record, done)
    if done:
        return
    folder = Path(args.out)
    for path in [*(folder / name for name in COPIED), *folder.glob("*.safetensors*")]:
        path.unlink(missing_ok=True)
    for name in ("checkpoints", TEMPLATES):
        shutil.rmtree(folder / name, ignore_errors=True)


def load_models(args, models, record, pairs, held_out):
    """The policy, and pairs and held-out pairs with the log-probabilities of the reference."""
    for name, revision in models.items():
        policy = None
        gc.collect()  # sharded modules are in reference cycles
        policy = load_policy(name, revision, args)
        check_model(policy, pairs + held_out, args)
        if name == args.reference:
            state = json.dumps(record["models"][name])
            key = stable_hash(name, state, args.dtype, torch.cuda.is_available(), record["versions"])
            cache = f"{Path(args.out).parent}/reference_cache/{key:016x}.jsonl"
            pairs, held_out = (with_reference(policy, part, cache, args) for part in (pairs, held_out))
    return policy, pairs, held_out


def save_checkpoint(folder, step, policy, optimizer):
    """folder/STEP with the weights and moments of all processes, complete or not at all; others go."""
    model, optim = get_state_dict(policy, optimizer)
    writer = dcp.FileSystemWriter(folder / "saving", overwrite=True)
    try:
        dcp.save({"model": model, "optim": optim}, storage_writer=writer)
    except dcp.CheckpointException as error:  # on all processes, if one of them could not write
        shutil.rmtree(folder / "saving", ignore_errors=True)
        failure = next(iter(error.failures.values()))[0]
        if isinstance(failure, KeyboardInterrupt):
            raise failure from error
        reason = str(failure).splitlines()[0]
        fail(f"{folder}/saving cannot be written: full disk? {reason}; run the same command again to resume")
    if dist.get_rank() == 0:
        os.replace(folder / "saving", folder / f"{step:08d}")
        for path in folder.glob("[0-9]*"):
            if int(path.name) != step:
                shutil.rmtree(path)
    from_all_processes([])  # the others wait


def train(policy, pairs, held_out, args, steps, file, run_step):
    """Train the range of `steps`, whose stop is the run's total; the first process appends a row per step."""
    betas = (0.9, args.adam_beta2)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=betas, weight_decay=0.0, fused=True)
    checkpoints = Path(args.out, "checkpoints")
    if steps.start:
        model, optim = get_state_dict(policy, optimizer)
        dcp.load({"model": model, "optim": optim}, checkpoint_id=checkpoints / f"{steps.start:08d}")
        set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    for step in tqdm(steps, "train", steps.stop, initial=steps.start, unit="step", disable=file is None):
        started = time.time()
        epoch, index = divmod(step, steps.stop // args.epochs)
        if step == steps.start or index == 0:
            order = epoch_order(pairs, args.seed, epoch)
        batch = order[index * args.batch_size :][: args.batch_size]
        row = metrics_row(run_step(policy, batch, args, step))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM).full_tensor().item()
        if not math.isfinite(norm):
            names = ", ".join(pair.pair_id for pair in batch)
            fail(f"step {step}: the gradient is not finite; its pairs: {names}")
        lr = learning_rate(step, steps.stop, args.lr, args.schedule)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row |= {"step": step, "epoch": epoch, "lr": lr, "grad_norm": norm, "peak_gb": peak_gb()}
        row["tokens_per_s"] = row["tokens"] / (time.time() - started)
        done = step + 1
        save, last = done % args.save_every == 0, done == steps.stop
        if held_out and (save or last):
            with torch.no_grad():  # the loss of the pairs only, whatever run_step adds
                row["eval"] = metrics_row(forward_backward(policy, held_out, args, step, train=False))
            release(policy)
        if file:
            append_rows(file, [row])
        if save and not last:
            save_checkpoint(checkpoints, done, policy, optimizer)


def main(args, run_step=forward_backward, check_pairs=lambda *_: None):
    """Train; recipes/train_online.py brings its own run_step, and a check of what is trained on."""
    started = time.time()
    start_processes(args)
    day = loading.run_date(f"{args.out}/metrics.jsonl", args.overwrite)
    chat, config = read_chat(args.model, args.revision, args.template_kwargs, day)
    args.date = chat.day  # in the record, for a run that goes on tomorrow
    models = {args.reference or args.model: None, args.model: args.revision}  # the reference is the first
    check_paths(args, models, chat)
    files = [path for path in (args.pairs, args.eval_pairs) if path]
    pairs, dropped = load_pairs(args.pairs, chat, config, args)
    check_pairs(pairs, config, args)
    held_out, held_out_dropped = [], {}
    if args.eval_pairs:
        held_out, held_out_dropped = load_pairs(args.eval_pairs, chat, config, args)
    record = common.make_record(args, files, models.items())
    keys = [(pair.pair_id, pair.source, pair.reward_margin, *pair.keys) for pair in pairs + held_out]
    record["inputs"]["token ids of the pairs"] = stable_hash(*keys)
    steps = args.epochs * math.ceil(len(pairs) / args.batch_size)
    with open_run(args, record, steps) as (file, done, counts):
        if counts is None:
            policy, pairs, held_out = load_models(args, models, record, pairs, held_out)
            if file:
                begin(args, file, record, done)
                for sequence in epoch_order(pairs, args.seed, 0)[0].sequences:
                    show(chat.tokenizer, *sequence)
            train(policy, pairs, held_out, args, range(done, steps), file, run_step)
            export(policy, args)
            if file:
                counts = {"pairs": len(pairs), "dropped": dropped}
                counts |= {"eval_pairs": len(held_out), "eval_dropped": held_out_dropped}
                counts |= {"resumed_steps": done} | summary(file.name)
                counts["seconds"] = round(time.time() - started, 2)
                common.write_record(file.name, record | {"counts": counts, "seconds": counts["seconds"]})
        elif file:
            note(f"--out {args.out} is complete; nothing was done")
        if file:
            shutil.rmtree(Path(args.out, "checkpoints"), ignore_errors=True)
            print(json.dumps({"out": args.out, **counts}))
    policy = run_step = None
    gc.collect()  # sharded tensors must be gone before the process group is
    dist.destroy_process_group()


def show(tokenizer, ids, start):
    """Log a sequence as a model reads it, with the response, which begins at `start`, between 【 and 】."""
    note(f"{tokenizer.decode(ids[:start])}【{tokenizer.decode(ids[start:])}】")


def summary(path):
    rows = [row for _, row in read_jsonl(path, dict)]
    tokens = sum(row["tokens"] for row in rows)
    seconds = sum(row["tokens"] / row["tokens_per_s"] for row in rows)
    counts = {"steps": len(rows), "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}
    counts["eval_loss"] = rows[-1].get("eval", {}).get("loss")
    return counts | {"tokens_trained": tokens, "tokens_per_s": round(tokens / seconds, 1)}


def peak_gb():
    """Highest memory use of this process so far, on its device."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def note_once(message):
    """A note of the first of torchrun's processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        note(message)


def rank_and_world():
    return dist.get_rank(), dist.get_world_size()


def from_all_processes(rows):
    """The rows of all processes, on every one."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rows)
    return list(itertools.chain.from_iterable(everyone))


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume from the last checkpoint")
