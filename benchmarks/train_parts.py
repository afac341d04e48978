"""
Two parts of train_dpo.py measured alone: what sharing a prompt gains, and that no memory grows with vocabulary x tokens.

    python benchmarks/train_parts.py shared --model out/demo/models/policy --pairs PAIRS.jsonl [PAIRS.jsonl ...]
    python benchmarks/train_parts.py memory

shared: forward and backward of the pairs, in turn as prompt, chosen, rejected and as prompt, chosen, prompt, rejected; the ratio of
their times is printed for each file beside that of their tokens. memory: one step of a two-layer model with vocabularies of 1k to
128k, with 2048 and with 4096 response tokens, each in its own process; peaks beside the sum of what they should hold. CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
VOCABULARIES, TOKENS, HIDDEN = (1024, 8192, 32768, 131072), (2048, 4096), 256


def shared(model: str, files: list[str], limit: int) -> None:
    import train_dpo
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    args = train_dpo.parse_args(["--model", model, "--pairs", files[0], "--out", "unused", "--dtype", "float32"])
    tokenizer, policy = train_dpo.load_tokenizer(model, None), train_dpo.load_policy(model, args)

    def seconds(groups: list) -> float:
        began = time.perf_counter()
        train_dpo.group_logps(policy, groups)[0].sum().backward()
        policy.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    for path in files:
        pairs, _ = train_dpo.load_pairs(path, tokenizer, "dpo", 1024)
        batches = [[pair for pair, _ in batch] for batch in train_dpo.micro_batches(pairs[:limit], 1024, 0)]
        together = [[(pair.prompt, pair.responses) for pair in batch] for batch in batches]
        apart = [[(pair.prompt, [response]) for pair in batch for response in pair.responses] for batch in batches]
        seconds(together[0])
        times = [(seconds(one), seconds(other)) for one, other in zip(together, apart)]  # in turn, so that noise meets both
        tokens = [sum(len(prompt) + sum(map(len, responses)) for batch in side for prompt, responses in batch) for side in (together, apart)]
        once, twice = (sum(some) for some in zip(*times))
        print(json.dumps({"pairs": path, "count": len(pairs[:limit]), "prompt_tokens": sum(len(pair.prompt) for pair in pairs[:limit])
                          / len(pairs[:limit]), "tokens_ratio": round(tokens[1] / tokens[0], 3), "speed_ratio": round(twice / once, 3)}))


def one_step(vocabulary: int, tokens: int) -> None:
    import train_dpo
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=512, num_hidden_layers=2,
                                     num_attention_heads=4, tie_word_embeddings=False)).save_pretrained(folder)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        args = train_dpo.parse_args(["--model", folder, "--pairs", "unused", "--out", "unused", "--dtype", "float32"])
        policy = train_dpo.load_policy(folder, args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    response = [i % vocabulary for i in range(tokens // 2)]
    peaks = []
    for _ in range(2):  # moments are made in the first
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark of memory begins anew
        train_dpo.group_logps(policy, [([1, 2, 3], [response, response[::-1]])])[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peaks.append(next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
    print(json.dumps(peaks[-1] * 1024 / 1e6))


def memory() -> None:
    peaks = {}
    for vocabulary in VOCABULARIES:
        for tokens in TOKENS:
            done = subprocess.run([sys.executable, __file__, "one-step", str(vocabulary), str(tokens)], capture_output=True, text=True,
                                  check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
            peaks[vocabulary, tokens] = json.loads(done.stdout.splitlines()[-1])
    import train_dpo
    small = VOCABULARIES[0]
    print(f"vocabulary   peak MB at {TOKENS[0]}, {TOKENS[1]} tokens   grown since {small} (at {TOKENS[0]})   weights, gradients, moments of "
          "embedding and head   gathered weights and gradients   one chunk of logits   logits of all tokens would be")
    for vocabulary in VOCABULARIES:
        matrix = 2 * (vocabulary - small) * HIDDEN * 4 / 1e6  # embedding and head, float32
        chunk = train_dpo.CHUNK * (vocabulary - small) * 4 / 1e6
        print(f"{vocabulary:10} {peaks[vocabulary, TOKENS[0]]:10.0f} {peaks[vocabulary, TOKENS[1]]:10.0f}"
              f"{peaks[vocabulary, TOKENS[0]] - peaks[small, TOKENS[0]]:12.0f}{4 * matrix:14.0f}{2 * matrix:14.0f}{chunk:12.0f}"
              f"{TOKENS[0] * (vocabulary - small) * 4 / 1e6:14.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("shared")
    command.add_argument("--model", required=True)
    command.add_argument("--pairs", nargs="+", required=True)
    command.add_argument("--limit", type=int, default=24, help="pairs of a file (default %(default)s)")
    commands.add_parser("memory")
    command = commands.add_parser("one-step")
    command.add_argument("vocabulary", type=int)
    command.add_argument("tokens", type=int)
    args = parser.parse_args()
    if args.command == "shared":
        shared(args.model, args.pairs, args.limit)
    elif args.command == "memory":
        memory()
    else:
        one_step(args.vocabulary, args.tokens)


if __name__ == "__main__":
    main()
