"""
Stage 4 of the pipeline: preference pairs -> a trained model, by DPO and its relatives.

Reads   --pairs FILE    a Row (below) per pair, as build_pairs.py writes it or as others ship it
Writes  --out FOLDER    a model folder in the type of --model; in it metrics.jsonl, a row per optimizer step,
                        and metrics.meta.json, the record: arguments, hashes, versions, counts
        reference_cache beside --out: the reference model's log-probabilities, shared by all runs there

    L = -log sigma(beta h),  h = log(pi(y_w|x) / pi_ref(y_w|x)) - log(pi(y_l|x) / pi_ref(y_l|x))    S1 eq. 1

    python train_dpo.py --model out/models/policy --pairs out/on50.pairs.jsonl --out out/dpo --batch-size 8
    torchrun --nproc-per-node 8 train_dpo.py --model meta-llama/Llama-3.1-8B-Instruct --pairs uf.jsonl \\
        --out uf/dpo --activation-checkpointing

A run that was stopped is resumed by the same command from its last checkpoint, to the same losses. Prints one
JSON object last: pairs, what was dropped, steps, losses, speed. S1 is the paper SimpleMix, S2 "Is On-Policy
Data always the Best Choice [...]?", S3 "What Matters in Data for DPO?".
"""

import argparse
import fcntl
import gc
import inspect
import itertools
import json
import math
import os
import resource
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Required, TypedDict

from chat import completion_ids, end_of_turn, fingerprint, load_tokenizer, prompt_ids
from common import (
    Message,
    TokenIds,
    append_rows,
    as_messages,
    begin_output,
    fail,
    keep_rows,
    load_model,
    make_record,
    note,
    open_output,
    read_jsonl,
    stable_hash,
    write_record,
)

PRESETS = {  # S1 section 4.1 and Appendix A, the rest from its code; S2 Table 6; S3 section 5.1 and B.3
    # a longest sequence of 4096 has room for a prompt and the longest response of generate.py
    "s1": dict(beta=0.1, epochs=1, batch_size=256, schedule="linear", max_length=4096, adam_beta2=0.999),
    "s2": dict(beta=0.01, epochs=1, batch_size=128, schedule="cosine", max_length=4096, adam_beta2=0.999),
    "s3": dict(beta=0.1, epochs=2, batch_size=32, schedule="cosine", max_length=2048, adam_beta2=0.99),
}
WARMUP = 0.1  # of the steps, in all three papers
MAX_GRAD_NORM = 1.0  # S1's code; the papers do not say
CHUNK = {"cpu": 1024, "cuda": 4096}  # tokens whose logits over the vocabulary are in memory at once
WINDOW = 128  # sequences that each process scores before the reference cache is written
PROBE = 512  # tokens of the sequence that check_model compares with the model's own logits
# tolerances of check_model for the log-probability of a token; of T tokens sqrt(T) times
ROUNDING = {"float32": 2e-4, "bfloat16": 0.3}  # between rows of different lengths
NEIGHBOUR = 0.01  # between rows of one length, measured 0 to 6e-4; with a convolution 0.05 to 0.08
MAY_CHANGE = {"save_every", "micro_tokens", "activation_checkpointing"}  # when a run is resumed
TRY_AGAIN = "make space and run the same command again to resume"
CacheRow = TypedDict("CacheRow", {"key": str, "logp": float})  # of the reference cache


class Row(TypedDict, total=False):
    pair_id: str | int | None  # unique; without it a hash of the texts
    prompt: str | list[Message] | None  # text is one user turn; None: chosen and rejected begin with it
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
    ids: list[int]  # prompt and response
    start: int  # of the response, whose tokens are trained


class Pair(NamedTuple):
    pair_id: str
    source: str  # "" if the file has none
    sequences: list[Sequence]  # chosen and rejected; only chosen for a loss without a rejected side
    reward_margin: float  # reward of chosen minus reward of rejected
    reference_logps: tuple[float, ...]  # of the sequences under the reference model; 0 without one

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
    """B pairs as a loss reads them, all (B,); what is of the rejected side is None if the loss has none.

    B is a packed row of at most --micro-tokens, not a step: a loss that mixes pairs, such as a mean over the
    batch, would depend on --micro-tokens and on the number of GPUs.
    """

    chosen: "torch.Tensor"  # log(pi(y_w|x) / pi_ref(y_w|x)), or log pi(y_w|x) for a loss without a reference
    rejected: "torch.Tensor | None"
    chosen_logps: "torch.Tensor"  # log pi(y_w|x), sums over the response's tokens
    rejected_logps: "torch.Tensor | None"
    chosen_tokens: "torch.Tensor"
    rejected_tokens: "torch.Tensor | None"
    reward_margins: "torch.Tensor"  # reward of chosen minus reward of rejected


LOSSES, LOSS_FLAGS = {}, {}  # functions by the value of --loss; of each flag the parameters by loss


def loss(reference=True, rejected=True, rewards=False, per_token=False):
    """Register a function of a Batch, which gives a loss per pair (B,), under its name as a --loss.

    reference: it compares log-ratios with the reference model, otherwise log-probabilities; rejected: it has
    the rejected response; rewards: every pair must have them; per_token: what it compares is divided by the
    response's tokens. Its keyword parameters are its flags: positive numbers unless annotated with another
    argparse type, with the parameter's default, or the preset's where that is None.
    """

    def register(function):
        function.reference, function.rejected = reference, rejected
        function.rewards, function.per_token = rewards, per_token
        LOSSES[function.__name__] = function
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                LOSS_FLAGS.setdefault(name, {})[function.__name__] = parameter
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
    return -batch.chosen / batch.chosen_tokens


def pair_losses(args, batch):
    """--loss of every pair (B,)."""
    flags = {name: getattr(args, name) for name, users in LOSS_FLAGS.items() if args.loss in users}
    return LOSSES[args.loss](batch, **flags)


# ----- flags
def make_parser(description):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    flag, preset = parser.add_argument, {"default": argparse.SUPPRESS}
    flag("--model", required=True, help="model folder, or OWNER/NAME on the hub, to start from")
    flag("--revision", help="branch, tag or commit of --model on the hub")
    flag("--reference", metavar="MODEL", help="model of the reference log-probabilities (default: --model)")
    flag("--pairs", required=True, metavar="FILE", help="pairs, JSONL")
    flag("--eval-pairs", metavar="FILE", help="held-out pairs, measured every --save-every steps and last")
    flag("--out", required=True, metavar="FOLDER", help="the trained model")
    flag("--loss", choices=list(LOSSES), default="dpo", help="default %(default)s")
    for name, users in LOSS_FLAGS.items():
        annotation = next(iter(users.values())).annotation
        kind = number(float) if annotation is inspect.Parameter.empty else annotation
        text = ", ".join(f"{loss} {parameter.default}" for loss, parameter in users.items())
        text = "default: " + text.replace("None", "the preset's")
        flag(f"--{name.replace('_', '-')}", type=kind, help=text, **preset)
    flag("--preset", choices=list(PRESETS), default="s1", help="sets --beta and the next five (default s1)")
    flag("--epochs", type=number(int), **preset)
    flag("--batch-size", type=number(int), **preset, help="pairs in an optimizer step, over all GPUs")
    flag("--schedule", choices=["linear", "cosine"], **preset, help="of the learning rate after the warm-up")
    flag("--max-length", type=number(int), **preset, help="longer pairs are dropped")
    flag("--adam-beta2", type=number(float, below=1), **preset, help="decay of Adam's second moment")
    flag("--lr", type=number(float), default=5e-7, help="highest learning rate (default 5e-7)")
    flag("--seed", type=number(int, allow_0=True), default=0, help="of the order of the pairs (default 0)")
    flag("--template-kwargs", type=json.loads, default={}, metavar="JSON", help="as given to generate.py")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on CUDA")
    flag("--micro-tokens", type=number(int), help="tokens in a row (default 4096 on CUDA, else 1024)")
    flag("--activation-checkpointing", action="store_true", help="less memory, a third slower")
    flag("--save-every", type=number(int), default=100, help="steps between checkpoints (default 100)")
    flag("--overwrite", action="store_true", help="start over if --out holds a run")
    return parser


def parse_args(argv=None, parser=None):
    parser = parser or make_parser(__doc__)
    given = vars(parser.parse_args(argv))  # the preset's flags and those of losses only if they were given
    preset, loss = PRESETS[given["preset"]], given["loss"]
    defaults = preset | {"beta": 1.0}  # without a beta, rewards are what the loss compares
    for name, users in LOSS_FLAGS.items():
        if loss in users:
            default = users[loss].default
            defaults[name] = preset[name] if default is None else default
        elif name in given:
            parser.error(f"--{name.replace('_', '-')} has no effect with --loss {loss}")
    if LOSSES[loss].reference:
        given["reference"] = given["reference"] or given["model"]
    elif given["reference"]:
        parser.error(f"--reference has no effect with --loss {loss}")
    if given["revision"] and os.path.isdir(given["model"]):
        parser.error("--revision is for a model on the hub, but --model is a folder")
    if not isinstance(given["template_kwargs"], dict):
        parser.error(f"--template-kwargs: expected a JSON object, found {given['template_kwargs']}")
    return argparse.Namespace(**(defaults | given))


if __name__ == "__main__":
    ARGS = parse_args()

# torch reads these on import. Rows of different lengths would fragment a GPU's memory; on a CPU huge pages
# make large tensors a tenth faster.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.attention.varlen import varlen_attn  # noqa: E402
from tqdm import tqdm  # noqa: E402

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans for 30 ms at every new length
VARLEN_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in torch 2.11


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
    Backward computes a chunk's logits again: d logits = grad * (one-hot(target) - softmax).
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
        fail("attention with a soft cap, sinks or a window shorter than a sequence is not supported")
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
    """Summed log-probabilities of the responses of S sequences, and their numbers of tokens; (S,) float64."""
    lengths = [len(sequence.ids) for sequence in sequences]
    counts = [len(sequence.ids) - sequence.start for sequence in sequences]
    ids = torch.tensor([token for sequence in sequences for token in sequence.ids])  # (T,)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ends = [0, *itertools.accumulate(lengths)]
    trained = torch.cat([torch.arange(end - n, end) for end, n in zip(ends[1:], counts, strict=True)])  # (C,)
    # the state before a token predicts it; the first token of a sequence is never trained
    row = [ids[None], positions[None], torch.tensor(ends, dtype=torch.int32), trained - 1, ids[trained]]
    device = policy.model.device
    ids, positions, ends, before, targets = (to_device(tensor, device) for tensor in row)
    logps = policy(ids, positions, lengths, ends, before, targets)
    sums = torch.stack([part.double().sum() for part in logps.split(counts)])
    return sums, to_device(torch.tensor(counts, dtype=torch.float64), device)


def to_device(tensor, device):
    """A copy that does not wait for a GPU to finish its work, so that the GPU need not wait for Python."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ----- a step
DUMMY = Sequence([0, 0], 1)  # for a process that has no pair left, while others have


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


def make_batch(pairs, logps, counts, args):
    """The Batch of B pairs, from log-probabilities and numbers of tokens of their sequences, one by one."""
    logps, counts = logps.view(len(pairs), -1), counts.view(len(pairs), -1)  # (B, 2), or (B, 1)
    numbers = [[*pair.reference_logps, pair.reward_margin] for pair in pairs]
    numbers = to_device(torch.tensor(numbers, dtype=torch.float64), logps.device)
    compared = logps - numbers[:, :-1]
    if LOSSES[args.loss].per_token:
        compared = compared / counts
    sides = []
    for values in (compared, logps, counts):
        sides += [*values.unbind(1), None][:2]
    return Batch(*sides, numbers[:, -1])


def forward_backward(policy, pairs, args, step, train=True):
    """Metrics of every pair, on all processes; with `train` also the gradient of the pairs' mean loss."""
    measured = []
    for indices in micro_batches([pair.tokens() for pair in pairs], args.micro_tokens, *rank_and_world()):
        members = [pairs[index] for index in indices]
        sequences = [sequence for pair in members for sequence in pair.sequences]
        logps, counts = sequence_logps(policy, sequences or [DUMMY])
        if not members:
            if train:
                (0 * logps.sum()).backward()  # the others wait for this process to reduce gradients
            continue
        batch = make_batch(members, logps, counts, args)
        losses = pair_losses(args, batch)
        if train:
            (losses.sum() / len(pairs)).backward()  # over the pairs of the step, not of this row
        measured.append((members, pair_metrics(batch, losses, args.beta)))
    rows = []
    for members, metrics in measured:  # which stay on the device until here, so that it need not wait
        columns = {name: values.tolist() for name, values in metrics.items()}
        for index, pair in enumerate(members):
            row = {"pair_id": pair.pair_id, "source": pair.source, "tokens": pair.tokens()}
            rows.append(row | {name: values[index] for name, values in columns.items()})
    rows = from_all_processes(rows)
    wrong = [row["pair_id"] for row in rows if not math.isfinite(row["loss"])]
    if wrong:
        fail(f"step {step}: the loss is not finite for {', '.join(wrong)}")
    return rows


def pair_metrics(batch, losses, beta):
    """What metrics.jsonl has the means of, each (B,). The reward of the chosen response often falls too."""
    metrics = {"loss": losses, "chosen_logp": batch.chosen_logps}
    metrics["chosen_logp_per_token"] = batch.chosen_logps / batch.chosen_tokens
    if batch.rejected is not None:
        metrics |= {
            "accuracy": (batch.chosen > batch.rejected).double(),
            "margin": beta * batch.chosen - beta * batch.rejected,
            "chosen_reward": beta * batch.chosen,
            "rejected_reward": beta * batch.rejected,
            "rejected_logp": batch.rejected_logps,
            "rejected_logp_per_token": batch.rejected_logps / batch.rejected_tokens,
            "diversity": batch.chosen_logps - batch.rejected_logps,  # S2 eq. 12
        }
    return {name: values.detach() for name, values in metrics.items()}


def means(rows):
    """Means over pairs; of margin and diversity also the standard deviation."""
    names = [name for name in rows[0] if name not in ("pair_id", "source", "tokens")]
    mean = {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
    for name in {"margin", "diversity"} & mean.keys():
        squares = [(row[name] - mean[name]) ** 2 for row in rows]
        mean[f"{name}_std"] = math.sqrt(math.fsum(squares) / len(rows))
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
    lengths = [len(sequence.ids) for sequence in sequences]
    for indices in micro_batches(lengths, budget, *rank_and_world()):
        logps, _ = sequence_logps(policy, [sequences[index] for index in indices] or [DUMMY])
        mine += zip(indices, logps.tolist(), strict=False)  # DUMMY belongs to no index
    release(policy)
    logps = dict(from_all_processes(mine))
    return [logps[index] for index in range(len(sequences))]


def with_reference(policy, pairs, cache, args):
    """The pairs with reference_logps: from the file `cache`, to which missing ones are appended."""
    first, logps = dist.get_rank() == 0, {}
    if first:
        with lock_cache(cache):
            rows = read_jsonl(cache, CacheRow) if os.path.getsize(cache) else ()
            logps = {row["key"]: row["logp"] for _, row in rows}
    logps = from_first_process(logps)
    sequences = {sequence_key(each): each for pair in pairs for each in pair.sequences}
    missing = sorted(sequences.keys() - logps.keys(), key=lambda key: (len(sequences[key].ids), key))
    size = WINDOW * dist.get_world_size()
    for start in tqdm(range(0, len(missing), size), desc="reference", unit="window", disable=not first):
        keys = missing[start : start + size]
        values = all_logps(policy, [sequences[key] for key in keys], 4 * args.micro_tokens)
        if not all(map(math.isfinite, values)):
            fail(f"{args.reference}: the log-probability of a response is not finite")
        logps |= zip(keys, values, strict=True)
        if first:
            with lock_cache(cache) as file:
                append_rows(file, [{"key": key, "logp": logps[key]} for key in keys])
    scored = []
    for pair in pairs:
        values = tuple(logps[sequence_key(sequence)] for sequence in pair.sequences)
        scored.append(pair._replace(reference_logps=values))
    return scored


def sequence_key(sequence):
    return f"{stable_hash(*sequence):016x}"


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
    """The model in float32, sharded by FSDP2 over all processes; forward and backward are in --dtype.

    A step of 5e-7 would be lost in bfloat16 weights. Bytes on a GPU, for N parameters, W GPUs, L layers,
    width d, vocabulary V and T tokens in a row (at least one pair): 16 N/W for weights, gradients and Adam's
    moments, 8 V d for gathered embedding and head, 54 d T L for activations (2 d T L and one layer's with
    --activation-checkpointing), 8 V min(T, 4096) for logits. A checkpoint has 12 N.
    """
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    AttentionInterface.register("packed", packed_attention)
    config = AutoConfig.from_pretrained(name, revision=revision)
    kind, text_config = config.model_type, config.get_text_config()
    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not getattr(architecture, "_supports_attention_backend", False):
        fail(f"{name}: {kind} models cannot be trained: their sequences cannot be packed into one row")
    for key, value in vars(text_config).items():
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            setattr(text_config, key, 0.0)  # policy and reference must be the same function
    options = {"device_map": None, "config": config, "attn_implementation": "packed"}
    model = load_model(AutoModelForCausalLM, name, revision, "auto", **options)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    compute = torch.bfloat16 if args.dtype == "bfloat16" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    policy = PolicyLogps(model).train()  # in eval mode there is no activation checkpointing
    policy.dtypes = {key: value.dtype for key, value in model.state_dict().items()}  # of --model, for export
    layers = [each for each in model.modules() if type(each).__name__ in (model._no_split_modules or ())]
    if not layers:
        fail(f"{name}: transformers does not name the layer class of {kind} models (_no_split_modules)")
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


@torch.no_grad()
def check_model(policy, pairs, args):
    """Refuse a model whose log-probabilities are not those of its own logits, or depend on their row.

    A response is measured by the model's own forward, as the only sequence of a row, after the longest one,
    over which attention must reach, and after that one reversed: what a short convolution sees of the
    sequence before can be less than ROUNDING allows between rows of different lengths.
    """
    sequences = sorted((each for pair in pairs for each in pair.sequences), key=lambda each: len(each.ids))
    longest, (ids, start) = sequences[-1], sequences[len(sequences) // 4]
    probe = Sequence(ids[-PROBE:], max(1, start - len(ids[:-PROBE])))
    rows = [probe], [longest, probe], [longest._replace(ids=longest.ids[::-1]), probe]
    single, packed, turned = (sequence_logps(policy, row)[0][-1].item() for row in rows)
    model = policy.model
    ids = torch.tensor([probe.ids], device=model.device)
    policy.unshard()  # embedding and head, which are the root's
    model.set_attn_implementation("sdpa")
    logits = model(input_ids=ids, use_cache=False).logits[0, probe.start - 1 : -1].float()
    model.set_attn_implementation("packed")
    plain = -F.cross_entropy(logits, ids[0, probe.start :], reduction="sum").item()
    release(policy)
    name, kind, scale = model.name_or_path, model.config.model_type, math.sqrt(len(logits))
    if not math.isfinite(single):
        fail(f"{name}: the log-probability of a response is not finite")
    if not abs(single - plain) <= ROUNDING[args.dtype] * scale:
        logps = f"a response has {plain:.4f} by its logits, {single:.4f} by its states and head"
        fail(f"{name}: {kind} models scale or cap their logits, which is not supported: {logps}")
    same = abs(single - packed) <= ROUNDING[args.dtype] * scale
    if not (same and abs(packed - turned) <= NEIGHBOUR * scale):
        logps = f"a response has {single:.4f} alone, {packed:.4f} and {turned:.4f} after others"
        fail(f"{name}: its sequences cannot be packed into one row: {logps}")


def export(policy, tokenizer, args):
    """Write --out as a model folder in the type of --model. All processes gather, the first one writes."""
    from transformers.utils import cached_file

    tied = policy.model.all_tied_weights_keys
    weights, folder = {}, Path(args.out, "checkpoints", "model")
    for name, value in policy.model.state_dict().items():
        if name in tied:
            continue
        if isinstance(value, DTensor):
            value = value.full_tensor()  # one at a time: never all in float32
        if dist.get_rank() == 0:  # a copy, since what was gathered may be a view of something padded
            weights[name] = value.detach().to("cpu", policy.dtypes[name], copy=True)
    if dist.get_rank() == 0:
        try:
            policy.model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            for name in ("generation_config.json", "config.json"):  # those of --model, unchanged
                options = {"revision": args.revision, "_raise_exceptions_for_missing_entries": False}
                path = cached_file(args.model, name, **options)
                if path:
                    shutil.copyfile(path, folder / name)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, Path(args.out, path.name))  # config.json last: it is complete now
        except Exception as error:  # of a full disk, such as OSError, SafetensorError, the tokenizer's own
            shutil.rmtree(folder)
            fail(f"--out {args.out} cannot be written: {error}; {TRY_AGAIN}")
    from_first_process(None)  # the others wait


# ----- pairs
def load_pairs(path, tokenizer, config, args):
    """All pairs as token ids, and how many were dropped by reason and source.

    A pair is dropped if either side is too long, also by a loss without a rejected side: runs with different
    losses train on the same pairs.
    """
    vocabulary, end_id, loss = fingerprint(tokenizer), end_of_turn(tokenizer), LOSSES[args.loss]
    text_config = config.get_text_config()
    longest = min(args.max_length, getattr(text_config, "max_position_embeddings", None) or sys.maxsize)
    pairs, pair_ids, dropped, retokenized = [], set(), Counter(), 0
    for line, row in read_jsonl(path, Row):
        prompt, responses = read_sides(row, line)
        texts = [response["text"] for response in responses]
        pair_id = row.get("pair_id")
        if pair_id is None:
            pair_id = f"{stable_hash(json.dumps(prompt), *texts):016x}"
        if str(pair_id) in pair_ids:
            fail(f"{line}: duplicate pair_id {pair_id} in this file")
        pair_ids.add(str(pair_id))
        rewards = row.get("chosen_reward"), row.get("rejected_reward")
        if loss.rewards and None in rewards:
            fail(f"{line}: --loss {args.loss} needs chosen_reward and rejected_reward, found {rewards}")
        for response in responses:
            retokenized += response["token_ids"] is not None and response["tokenizer"] != vocabulary
        completions = [completion_ids(tokenizer, vocabulary, end_id, response) for response in responses]
        if not all(completions):
            fail(f"{line}: a response has no tokens")
        ids = prompt_ids(tokenizer, prompt, **args.template_kwargs)
        if max(ids + completions[0] + completions[1]) >= text_config.vocab_size:
            fail(f"{line}: a token id is beyond the vocabulary of {args.model}")
        source = row.get("source") or ""
        if completions[0] == completions[1]:
            dropped[f"identical ({source})" if source else "identical"] += 1
        elif len(ids) + max(map(len, completions)) > longest:
            dropped[f"too long ({source})" if source else "too long"] += 1
        else:
            margin = 0.0 if None in rewards else rewards[0] - rewards[1]
            sequences = [Sequence(ids + completion, len(ids)) for completion in completions]
            sequences = sequences if loss.rejected else sequences[:1]
            pairs.append(Pair(str(pair_id), source, sequences, margin, (0.0,) * len(sequences)))
    if int(os.environ.get("RANK", 0)) == 0:
        if retokenized:
            note(f"{path}: {retokenized} responses came from a different tokenizer and were re-tokenized")
        if dropped:
            note(f"{path}: {len(pairs)} pairs; dropped: {dict(dropped)}")
    return pairs or fail(f"{path}: no pair is left: {dict(dropped)}"), dropped


def read_sides(row, line):
    """The prompt's messages, and of chosen and rejected {"text", "finish", "token_ids", "tokenizer"}."""
    prompts, responses = [], []
    for side in ("chosen", "rejected"):
        messages = row[side]
        if isinstance(messages, str):
            messages = [{"role": "assistant", "content": messages}]
        if not messages or messages[-1]["role"] != "assistant":
            fail(f"{line}: expected {side} to be text, or messages that end with the assistant's")
        if not messages[-1]["content"].strip():
            fail(f"{line}: the {side} response is empty")
        prompts.append(messages[:-1] or row.get("prompt"))
        details = {key: row.get(f"{side}_{key}") for key in ("finish", "token_ids", "tokenizer")}
        responses.append({"text": messages[-1]["content"], **details})
    if prompts[0] != prompts[1]:
        fail(f"{line}: chosen and rejected answer different prompts")
    prompt = as_messages(prompts[0], line)  # in one order of keys, for the hash of the texts
    return [{"role": turn["role"], "content": turn["content"], **turn} for turn in prompt], responses


def epoch_order(pairs, seed, epoch):
    """The order of an epoch: it depends on seed, epoch and ids, not on the order in the file."""
    return sorted(pairs, key=lambda pair: (stable_hash(seed, "train", epoch, pair.pair_id), pair.pair_id))


def show(tokenizer, pair):
    """Log the sequences of a pair as the model reads them, what is trained in 【】."""
    for ids, start in pair.sequences:
        note(f"{pair.pair_id}: {tokenizer.decode(ids[:start])}【{tokenizer.decode(ids[start:])}】")


# ----- the run
def start_processes():
    """Those of torchrun, or this one. Objects travel by gloo, on GPUs tensors by NCCL."""
    on_cuda, by_torchrun = torch.cuda.is_available(), "RANK" in os.environ
    single = {} if by_torchrun else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", **single)
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif by_torchrun:  # which sets one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))


def check_paths(args, models, tokenizer):
    """Refuse a reference with another tokenizer, and an --out that is a model in use or not made here."""
    for name, revision in models[1:]:
        if fingerprint(load_tokenizer(name, revision)[0]) != fingerprint(tokenizer):
            fail(f"--reference {name}: its tokenizer differs from that of --model {args.model}")
    if os.path.realpath(args.out) in [os.path.realpath(name) for name, _ in models]:
        fail(f"--out {args.out} is the model being read")
    files = [Path(args.out, name).exists() for name in ("config.json", "metrics.jsonl")]
    if files == [True, False] and not args.overwrite:
        problem = "contains a model that this script did not write"
        fail(f"--out {args.out} {problem}; pass --overwrite to replace it")


@contextmanager
def open_run(args, record, steps):
    """(metrics.jsonl, the step to start from, counts of a finished run) on all processes.

    Only the first process has the file, and locks it.
    """
    if dist.get_rank() > 0:
        yield None, *from_first_process(None)
        return
    folder = Path(args.out)
    output = argparse.Namespace(out=str(folder / "metrics.jsonl"), overwrite=args.overwrite)
    try:
        with open_output(output, record, MAY_CHANGE, range(steps), key="step") as (file, rows, counts):
            saved = [int(path.name) for path in folder.glob("checkpoints/[0-9]*")]
            done = max([step for step in saved if step <= rows], default=0)
            if rows and counts is None and not done:
                note("the run was stopped before its first checkpoint, and starts from step 0")
            from_first_process((done, counts))
            yield file, done, counts
    finally:
        with suppress(OSError):
            folder.rmdir()  # if it is empty: the run was refused


def begin(args, file, record, done):
    """Set up --out for a new run, or cut metrics.jsonl where the last checkpoint was made."""
    if done:
        keep_rows(file.name, done)
        return
    begin_output(file, record)  # first, so that a kill leaves no old run that looks complete
    for path in [Path(args.out, "config.json"), *Path(args.out).glob("*.safetensors*")]:
        path.unlink(missing_ok=True)
    shutil.rmtree(Path(args.out, "checkpoints"), ignore_errors=True)


def load_models(args, record, pairs, held_out):
    """The policy, and pairs and held-out pairs with the log-probabilities of the reference."""
    if args.reference:
        revision = args.revision if args.reference == args.model else None
        policy = load_policy(args.reference, revision, args)
        check_model(policy, pairs + held_out, args)
        state = json.dumps(record["models"][args.reference])
        key = stable_hash(args.reference, state, args.dtype, torch.cuda.is_available(), torch.__version__)
        cache = f"{Path(args.out).parent}/reference_cache/{key:016x}.jsonl"
        pairs, held_out = (with_reference(policy, each, cache, args) for each in (pairs, held_out))
        if args.reference == args.model:
            return policy, pairs, held_out
        policy = None
        gc.collect()  # sharded modules are in reference cycles
    policy = load_policy(args.model, args.revision, args)
    check_model(policy, pairs + held_out, args)
    return policy, pairs, held_out


def save_checkpoint(folder, step, policy, optimizer):
    """folder/STEP with the weights and moments of all processes, complete or not at all; others go."""
    model, optim = get_state_dict(policy, optimizer)
    writer = dcp.FileSystemWriter(folder / "saving", overwrite=True)
    try:
        dcp.save({"model": model, "optim": optim}, storage_writer=writer)
    except dcp.CheckpointException as error:  # on all processes, if one of them could not write
        shutil.rmtree(folder / "saving", ignore_errors=True)
        reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        fail(f"{folder / 'saving'} cannot be written: {reason}; {TRY_AGAIN}")
    if dist.get_rank() == 0:
        os.replace(folder / "saving", folder / f"{step:08d}")
        for path in folder.glob("[0-9]*"):
            if int(path.name) != step:
                shutil.rmtree(path)
    from_first_process(None)  # the others wait


def train(policy, pairs, held_out, args, steps, file, run_step):
    """The range of `steps` of a run; the first process has `file` and appends a row per step."""
    adam = {"betas": (0.9, args.adam_beta2), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(policy.parameters(), **adam)
    checkpoints = Path(args.out, "checkpoints")
    if steps.start:
        model, optim = get_state_dict(policy, optimizer)
        dcp.load({"model": model, "optim": optim}, checkpoint_id=checkpoints / f"{steps.start:08d}")
        set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    bar = {"initial": steps.start, "total": steps.stop, "desc": "train", "unit": "step"}
    for step in tqdm(steps, **bar, disable=file is None):
        started = time.time()
        epoch, index = divmod(step, steps.stop // args.epochs)
        if step == steps.start or index == 0:
            order = epoch_order(pairs, args.seed, epoch)
        batch = order[index * args.batch_size :][: args.batch_size]
        row = metrics_row(run_step(policy, batch, args, step))
        norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM).full_tensor().item()
        if not math.isfinite(norm):
            names = ", ".join(pair.pair_id for pair in batch)
            fail(f"step {step}: the gradient is not finite; its pairs: {names}")
        lr = learning_rate(step, steps.stop, args.lr, args.schedule)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row |= {"step": step, "epoch": epoch, "lr": lr, "grad_norm": norm, "peak_gb": peak_gb()}
        row["tokens_per_s"] = row["tokens"] / (time.time() - started)
        save, last = (step + 1) % args.save_every == 0, step + 1 == steps.stop
        if held_out and (save or last):
            with torch.no_grad():  # of the plain loss, also where a recipe adds samples
                row["eval"] = metrics_row(forward_backward(policy, held_out, args, step, train=False))
            release(policy)
        if file:
            append_rows(file, [row])
        if save and not last:
            save_checkpoint(checkpoints, step + 1, policy, optimizer)


def choose_defaults(args):
    """Defaults that depend on the device."""
    on_cuda = torch.cuda.is_available()
    if args.dtype == "auto":
        args.dtype = "bfloat16" if on_cuda else "float32"
    args.micro_tokens = args.micro_tokens or (4096 if on_cuda else 1024)


def main(args, run_step=forward_backward):
    """Train; recipes/train_online.py brings its own run_step."""
    started = time.time()
    choose_defaults(args)
    tokenizer, config = load_tokenizer(args.model, args.revision)
    models = [(args.model, args.revision)]
    if args.reference not in (None, args.model):
        models.append((args.reference, None))
    check_paths(args, models, tokenizer)
    pairs, dropped = load_pairs(args.pairs, tokenizer, config, args)
    held_out, held_out_dropped = [], {}
    if args.eval_pairs:
        held_out, held_out_dropped = load_pairs(args.eval_pairs, tokenizer, config, args)
    record = make_record(args, [path for path in (args.pairs, args.eval_pairs) if path], models)
    hashes = sorted(stable_hash(pair.pair_id, pair.sequences) for pair in pairs + held_out)
    # a date in a chat template changes them
    record["inputs"]["token ids of the pairs"] = f"{stable_hash(*hashes):016x}"
    steps = args.epochs * math.ceil(len(pairs) / args.batch_size)
    start_processes()
    with open_run(args, record, steps) as (file, done, counts):
        if counts is None:
            loading = time.time()
            policy, pairs, held_out = load_models(args, record, pairs, held_out)
            reference_seconds = time.time() - loading
            if file:
                begin(args, file, record, done)
                show(tokenizer, min(pairs, key=lambda pair: stable_hash(args.seed, "show", pair.pair_id)))
            train(policy, pairs, held_out, args, range(done, steps), file, run_step)
            export(policy, tokenizer, args)
            if file:
                counts = {"pairs": len(pairs), "dropped": dropped, "eval_pairs": len(held_out)}
                counts |= {"eval_dropped": held_out_dropped, "resumed_steps": done}
                counts |= summary(file.name, reference_seconds) | {"seconds": round(time.time() - started, 2)}
                write_record(file.name, record | {"counts": counts, "seconds": counts["seconds"]})
        elif file:
            note(f"--out {args.out} is complete; nothing was done")
        if file:
            shutil.rmtree(Path(args.out, "checkpoints"), ignore_errors=True)
            print(json.dumps({"out": args.out, **counts}))
    policy = run_step = None
    gc.collect()  # sharded tensors must be gone before the process group is
    dist.destroy_process_group()


def summary(path, reference_seconds):
    """Counts of a run from its metrics.jsonl."""
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    tokens = sum(row["tokens"] for row in rows)
    seconds = sum(row["tokens"] / row["tokens_per_s"] for row in rows)
    counts = {"steps": len(rows), "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}
    counts |= {"eval_loss": rows[-1].get("eval", {}).get("loss"), "tokens_trained": tokens}
    counts["tokens_per_s"] = round(tokens / seconds, 1)
    counts["tokens_per_s_with_reference"] = round(tokens / (seconds + reference_seconds), 1)
    return counts | {"peak_gb": round(max(peak_gb(), *(row["peak_gb"] for row in rows)), 3)}


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


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume from the last checkpoint")
