"""
Parts of train_dpo.py alone: memory over the vocabulary, where the time of a step goes, one rank of many.

    python benchmarks/train_parts.py memory
    python benchmarks/train_parts.py step --model out/models/policy \
        --responses alpaca_eval_805x8_responses.jsonl.gz
    python benchmarks/train_parts.py rank --gpus 8 --tokens 8192 --activation-checkpointing

memory   one step of a two-layer model, vocabularies of 1k to 128k, 2,048 and 4,096 response tokens, each in a
         process of its own, on the CPU in float32: peaks of resident memory beside the sum of what should
         grow. Nothing may grow with vocabulary x tokens.
step     a step of main (forward_backward, clipping, AdamW) on a few pairs under torch.profiler, in the type
         that train_dpo.py chooses, bfloat16 on CUDA. Each operation belongs to one part:
           head              TokenLogps forward and backward: the matrix products of the head and its softmax
           matrix products   all others
           attention         the fused kernels
           optimizer         AdamW
           sharding          FSDP2: copies and casts of weights and gradients
           rest              norms, activations, rotary embeddings, clipping, Python
         On a CPU times are those of operations and add up to the step; on CUDA they are those of kernels, and
         what the step took beyond them is time in which the GPU waited. Matrix products are set against a
         large one of the same type, measured in the same run.
rank     a process of --gpus, on one GPU, a model of Llama-3.1-8B's shape with random weights: collectives of
         torch's fake process group do nothing, so memory and kernels are those of a rank, and only the time
         lacks the communication. Prints seconds of a row (forward and backward), tokens/s, the peak, and MFU:
         6 x parameters x tokens against 989 TFLOP/s, a Hopper GPU's rate on paper.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import train_vs_trl

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
VOCABULARIES, TOKENS, WIDTH = (1024, 8192, 32768, 131072), (2048, 4096), 256
PARTS = ("matrix products", "attention", "head", "optimizer", "sharding", "rest")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ATTENTION = ("scaled_dot_product", "flash_attention", "varlen_attn", "efficient_attention")


# ----- memory
def one_step(vocabulary, tokens):
    """Prints the peak of a step in MB; the moments of the optimizer are made in a step before it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import train_dpo

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        args = train_dpo.parse_args(["--model", folder, "--pairs", "x", "--out", "x", "--dtype", "float32"])
        train_dpo.start_processes(args)
        policy = train_dpo.load_policy(folder, None, args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    ids = [i % vocabulary for i in range(1 + tokens // 2)]
    sequences = [train_dpo.Sequence(ids, 1), train_dpo.Sequence(ids[::-1], 1)]
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark of memory begins anew
        logps, _ = train_dpo.sequence_logps(policy, sequences)
        logps.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps(peak * 1024 / 1e6))


def memory():
    import train_dpo

    few, many = TOKENS
    peaks = {}
    for vocabulary in VOCABULARIES:
        for tokens in TOKENS:
            command = [sys.executable, __file__, "one-step", str(vocabulary), str(tokens)]
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
            peaks[vocabulary, tokens] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"| vocabulary | {few} tokens | {many} tokens | grown since {VOCABULARIES[0]} | weights, gradients, "
        "moments of embedding and head | their gathered copies | one chunk of logits | logits of all tokens "
        "would be |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for vocabulary in VOCABULARIES:
        more = vocabulary - VOCABULARIES[0]
        matrices = 2 * more * WIDTH * 4 / 1e6  # embedding and head in float32
        grown = peaks[vocabulary, few] - peaks[VOCABULARIES[0], few]
        logits = [more * tokens * 4 / 1e6 for tokens in (train_dpo.CHUNK["cpu"], few)]
        cells = [peaks[vocabulary, few], peaks[vocabulary, many], grown, 4 * matrices, 2 * matrices, *logits]
        print(f"| {vocabulary} | {' | '.join(f'{cell:.0f}' for cell in cells)} |")
    print(json.dumps({f"{vocabulary} x {tokens}": peak for (vocabulary, tokens), peak in peaks.items()}))


# ----- a step
def product_rate(device, dtype):
    """FLOP/s of a large matrix product: the best of five."""
    import torch

    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        started = now(device)
        a @ b
        seconds.append(now(device) - started)
    return 2 * size**3 / min(seconds[1:])


def now(device):
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def part_of(event):
    """The part of a step that an operation belongs to, by its name and by what called it."""
    names = [event.name]
    while event.cpu_parent:
        event = event.cpu_parent
        names.append(event.name)
    if any(name in ("TokenLogps", "TokenLogpsBackward") for name in names):
        return "head"
    if any(name.startswith("Optimizer.step") for name in names):
        return "optimizer"
    if any(word in name for word in ATTENTION for name in names):
        return "attention"
    if names[0] in PRODUCTS:
        return "matrix products"
    if any(name.startswith("FSDP::") for name in names):
        return "sharding"
    return "rest"


def ready(args):
    """Arguments of a run, its policy, and pairs with the log-probabilities of the reference."""
    import train_dpo

    with tempfile.TemporaryDirectory() as folder:
        path, *_ = train_vs_trl.write_pairs(args, Path(folder))
        run = train_dpo.parse_args([*train_vs_trl.our_flags(args, path), "--out", "x"])
        chat, config = train_dpo.read_chat(args.model)
        pairs, _ = train_dpo.load_pairs(str(path), chat, config, run)
    train_dpo.start_processes(run)
    policy = train_dpo.load_policy(args.model, None, run)
    sequences = [sequence for pair in pairs for sequence in pair.sequences]
    logps = iter(train_dpo.all_logps(policy, sequences, run.micro_tokens))
    return run, policy, [pair._replace(reference_logps=(next(logps), next(logps))) for pair in pairs]


def step(args):
    import torch
    from torch.profiler import ProfilerActivity, profile

    import train_dpo

    run, policy, pairs = ready(args)
    device = policy.model.device.type
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.lr, weight_decay=0.0, fused=True)

    def seconds_of_a_step():
        started = now(device)
        train_dpo.forward_backward(policy, pairs, run, 0)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), train_dpo.MAX_GRAD_NORM).full_tensor().item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return now(device) - started

    seconds_of_a_step()  # makes the moments
    plain = [seconds_of_a_step() for _ in range(3)]
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, with_flops=True) as profiler:
        profiled = seconds_of_a_step()
    seconds, flops = {part: Counter() for part in PARTS}, Counter()  # seconds of a part by operation
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:  # a kernel's time is its operation's
            part = part_of(event)
            own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            seconds[part][event.name] += own / 1e6
            flops[part] += event.flops or 0
    rate = product_rate(device, torch.bfloat16 if run.dtype == "bfloat16" else torch.float32)
    tokens, threads = sum(pair.tokens() for pair in pairs), torch.get_num_threads()
    plain = sorted(plain)[1]
    print(f"{len(pairs)} pairs, {tokens} tokens, {run.dtype} on {device}, {threads} threads")
    print(f"a step: {plain:.3f} s, {tokens / plain:.1f} tokens/s; with the profiler {profiled:.3f} s")
    print(f"a large matrix product: {rate / 1e9:.1f} GFLOP/s\n")
    found = {"tokens": tokens, "step_s": plain, "profiled_s": profiled, "product_gflops": rate / 1e9}
    print_parts(seconds, flops, profiled, rate)
    for part in PARTS:
        largest = dict(seconds[part].most_common(6))
        print(f"{part}: {', '.join(f'{name} {taken:.3f} s' for name, taken in largest.items())}")
        found[part] = {"seconds": seconds[part].total(), "gflop": flops[part] / 1e9, "operations": largest}
    print()
    print(json.dumps(found))


def print_parts(seconds, flops, whole, rate):
    print("| part | seconds | share of the step | GFLOP/s | of the large product's rate |")
    print("|---|---|---|---|---|")
    for part in PARTS:
        taken, speed = seconds[part].total(), ""
        if taken and part in ("matrix products", "head"):
            speed = f"{flops[part] / taken / 1e9:.1f} | {flops[part] / taken / rate:.2f}"
        print(f"| {part} | {taken:.3f} | {taken / whole:.3f} | {speed or '|'} |")
    outside = whole - sum(part.total() for part in seconds.values())
    print(f"| outside of operations | {outside:.3f} | {outside / whole:.3f} | | |\n")


# ----- one rank of many
def rank(args):
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import train_dpo

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
    )

    def random_weights(name, attn_implementation, **options):
        shape._attn_implementation = attn_implementation
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = LlamaForCausalLM(shape)
        torch.set_default_dtype(torch.float32)
        return model, {"missing_keys": []}

    AutoModelForCausalLM.from_pretrained = random_weights
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.gpus)
    checkpointing = ["--activation-checkpointing"] if args.activation_checkpointing else []
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        run = train_dpo.parse_args(["--model", folder, "--pairs", "x", "--out", "x", *checkpointing])
        run.dtype = "bfloat16" if device == "cuda" else "float32"
        policy = train_dpo.load_policy(folder, None, run)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    length = args.tokens // 8  # four pairs of equal lengths, a fifth of a sequence is the prompt
    sequences = []
    for i in range(8):
        ids = [3 + (7 * i + j) % 250 for j in range(length)]
        sequences.append(train_dpo.Sequence(ids, length // 5))
    seconds = []
    for _ in range(4):
        started = now(device)
        logps, _ = train_dpo.sequence_logps(policy, sequences)
        (logps.mean() / 64).backward()
        seconds.append(now(device) - started)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), train_dpo.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    fastest, tokens = min(seconds[1:]), 8 * length
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    found = {"gpus": args.gpus, "tokens": tokens, "activation_checkpointing": args.activation_checkpointing}
    found |= {"seconds": round(fastest, 3), "tokens_per_s": round(tokens / fastest)}
    found |= {"mfu": round(6 * parameters * tokens / fastest / 989e12, 3)}
    print(json.dumps(found | {"peak_gb": round(train_dpo.peak_gb(), 1)}))


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("memory")
    command = commands.add_parser("step")
    command.add_argument("--model", required=True)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", metavar="FILE")
    source.add_argument("--responses", metavar="FILE", help="as train_vs_trl.py reads them")
    command.add_argument("--models", nargs=2, default=["gpt4_1106_preview", "vicuna-7b-v1.5"])
    command.add_argument("--count", type=int, default=4, help="pairs (default %(default)s)")
    command.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    command = commands.add_parser("rank")
    command.add_argument("--gpus", type=int, default=8)
    command.add_argument("--tokens", type=int, default=4096, help="in a row (default %(default)s)")
    command.add_argument("--layers", type=int, default=32)
    command.add_argument("--activation-checkpointing", action="store_true")
    command = commands.add_parser("one-step")  # what memory starts
    command.add_argument("vocabulary", type=int)
    command.add_argument("tokens", type=int)
    args = parser.parse_args()
    if args.command == "memory":
        memory()
    elif args.command == "step":
        step(args)
    elif args.command == "rank":
        rank(args)
    else:
        one_step(args.vocabulary, args.tokens)


if __name__ == "__main__":
    main()
