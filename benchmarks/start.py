"""
How long the scripts take to answer: --help of all six, and train_dpo.py until its first reference pass.

    git worktree add /tmp/old a27d8ec
    python benchmarks/start.py --old /tmp/old

Every command runs --rounds times, this version and the one in the folder --old in turn; the table has medians
of the seconds. For the start of train_dpo.py a random Llama of 538 MB (float32) is written, and 8 pairs: the
time until the first log-probabilities of the reference stand in its cache; then the run is ended.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = ("generate", "score", "build_pairs", "train_dpo", "boundary", "evaluate")
TEMPLATE = "{% for turn in messages %}<s>{{ turn['content'] }}</s>{% endfor %}"


def seconds_of_help(root, script):
    started = time.perf_counter()
    subprocess.run([sys.executable, root / f"{script}.py", "--help"], check=True, capture_output=True)
    return time.perf_counter() - started


def make_model(folder):
    """A random Llama of 134 million parameters with a tokenizer of bytes; and pairs for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = []
    for i in range(8):
        rows.append({"prompt": f"question {i}", "chosen": "yes " * 9, "rejected": "no " * 9, "pair_id": i})
    Path(folder, "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def seconds_until_the_reference(root, model):
    """Until the first log-probabilities of the reference are in its cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, root / "train_dpo.py", "--model", model, "--out", f"{folder}/out"]
        command += ["--pairs", f"{model}/pairs.jsonl", "--micro-tokens", "64"]
        started = time.perf_counter()
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not any(path.stat().st_size for path in Path(folder).glob("reference_cache/*")):
            if run.poll() is not None:
                sys.exit(f"{root}/train_dpo.py ended:\n{run.stderr.read()[-2000:]}")
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        run.kill()
        run.communicate()
        return seconds


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--old", metavar="FOLDER", help="another version of the repository")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--only-help", action="store_true", help="without the start of train_dpo.py")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    roots = {"this": REPO} | ({"old": Path(args.old)} if args.old else {})
    tasks = {f"{script}.py --help": (seconds_of_help, script) for script in SCRIPTS}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if not args.only_help:
            make_model(folder)
            tasks["train_dpo.py until its first reference pass"] = (seconds_until_the_reference, folder)
        for name, (measure, subject) in tasks.items():
            seconds = {version: [] for version in roots}
            for _ in range(args.rounds):
                for version, root in roots.items():
                    seconds[version].append(measure(root, subject))
            found[name] = {version: statistics.median(values) for version, values in seconds.items()}
    print(f"| | {' | '.join(roots)} | ratio |\n|---|{'---|' * len(roots)}---|")
    for name, medians in found.items():
        cells = " | ".join(f"{medians[version]:.2f} s" for version in roots)
        print(f"| {name} | {cells} | {medians['this'] / medians.get('old', medians['this']):.2f} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
