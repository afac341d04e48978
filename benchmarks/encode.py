"""
How long texts take to become token ids: load_pairs of train_dpo.py and encode_prompts of generate.py.

    git worktree add /tmp/old a27d8ec
    python benchmarks/encode.py --model out/models/policy --old /tmp/old --count 4000 \
        --texts alpaca_eval_805x8_responses.jsonl.gz

Pairs of UltraFeedback's shape: prompts of 160 words (the median; a tenth have over 500), responses of 220, as
texts and as build_pairs.py writes sampled ones, with token ids. The words stand in the order of the file
--texts; without it they are made up. Each measurement is a process of its own, --rounds times, this version
and the one in the folder --old in turn, which must give the same token ids. The table has medians in
milliseconds a pair or prompt, of wall time and of processor time, and by how many KB a pair or prompt the
highest resident memory grew. "tokenizer alone" is the processor time of tokenizers' encode_batch_fast on the
same texts: with this library no version takes less than that over the number of cores.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAIRS = 61135  # of UltraFeedback
LENGTHS = {
    "prompt": (160, 0.9),
    "chosen": (230, 0.6),
    "rejected": (210, 0.6),
}  # median, sigma of the logarithm
TASKS = {"texts": "load_pairs of texts", "ids": "load_pairs of token ids", "prompts": "encode_prompts"}


# ----- input
def words_of(path):
    """Words with the white space that follows them, of prompts and responses; made up without a file."""
    if path:
        with gzip.open(path, "rt") as file:
            rows = [json.loads(line) for line in file]
        text = "\n\n".join(f"{row['prompt']}\n\n{row['response']}" for row in rows)
        return re.findall(
            r"\S+\s*", re.sub(r"<[|\w]+>", "", text)
        )  # of special tokens: such pairs are dropped
    draw = random.Random("words")
    syllables = [
        first + vowel + last for first in "bdfklmnprst" for vowel in "aeiou" for last in ("", "n", "r")
    ]
    lexicon = ["".join(draw.choices(syllables, k=draw.choice((1, 1, 2, 2, 3)))) for _ in range(20000)]
    weights = [1 / rank for rank in range(1, len(lexicon) + 1)]  # Zipf's law
    ends = draw.choices((" ", ", ", ". ", "\n\n"), (85, 7, 6, 2), k=500000)
    return [word + end for word, end in zip(draw.choices(lexicon, weights, k=len(ends)), ends, strict=True)]


def write_inputs(folder, words, count):
    """texts.jsonl, pairs without token ids; prompts.jsonl, their prompts."""
    draw = random.Random("pairs")
    with open(folder / "texts.jsonl", "w") as pairs, open(folder / "prompts.jsonl", "w") as prompts:
        for i in range(count):
            row = {"id": f"uf-{i}", "pair_id": f"uf-{i}-off", "source": "off"}
            for name, (median, sigma) in LENGTHS.items():
                n = min(2000, math.ceil(draw.lognormvariate(math.log(median), sigma)))
                start = draw.randrange(len(words) - n)
                text = "".join(words[start : start + n]).strip()
                row[name] = [{"role": "user" if name == "prompt" else "assistant", "content": text}]
            row |= {"chosen_reward": draw.gauss(1, 1), "rejected_reward": draw.gauss(-1, 1)}
            row |= {"chosen_finish": "stop", "rejected_finish": "stop"}
            pairs.write(json.dumps(row) + "\n")
            prompts.write(json.dumps({"id": row["id"], "prompt": row["prompt"]}) + "\n")


def write_ids(path, texts, model):
    """The pairs of `texts` with token ids and the fingerprints of the version that is imported."""
    version = Version(model, path)
    backend = version.tokenizer.backend_tokenizer
    with open(texts) as source, open(path, "w") as file:
        for line in source:
            row = json.loads(line)
            for side in ("chosen", "rejected"):
                entry = backend.encode(row[side][0]["content"], add_special_tokens=False)
                row |= {f"{side}_token_ids": entry.ids, f"{side}_tokenizer": version.fingerprint}
            file.write(json.dumps(row | version.prompt(row)) + "\n")


# ----- one measurement, in a process of its own
class Version:
    """What load_pairs of the train_dpo.py that is imported wants, this version's or that of a27d8ec."""

    def __init__(self, model, path):
        import train_dpo

        self.script, self.path = train_dpo, str(path)
        self.args = train_dpo.parse_args(["--model", model, "--pairs", self.path, "--out", "-"])
        self.reads_chat = hasattr(train_dpo, "read_chat")
        if self.reads_chat:
            self.chat, self.config = train_dpo.read_chat(model, None, {}, None)
            self.tokenizer, self.fingerprint = self.chat.tokenizer, self.chat.fingerprint
        else:
            self.tokenizer, self.config = train_dpo.load_tokenizer(model, None)
            self.fingerprint = train_dpo.fingerprint(self.tokenizer)

    def prompt(self, row):
        """The prompt's ids as they travel with a row; a27d8ec rendered each prompt anew."""
        if not self.reads_chat:
            return {}
        ids = self.script.prompt_ids(self.chat, [row], Counter())[0][0]
        return {"prompt_token_ids": ids, "prompt_tokenizer": self.chat.template}

    def load(self):
        """The pairs, with all that main and with_reference compute of their token ids."""
        script = self.script
        subject = self.chat if self.reads_chat else self.tokenizer
        pairs, _ = script.load_pairs(self.path, subject, self.config, self.args)
        if self.reads_chat:
            script.stable_hash(*[(p.pair_id, p.source, p.reward_margin, *p.keys) for p in pairs])
        else:
            sorted(script.stable_hash(pair.pair_id, pair.sequences) for pair in pairs)
            [script.sequence_key(sequence) for pair in pairs for sequence in pair.sequences]
        return pairs

    def start(self, sequence):
        return sequence.start if self.reads_chat else sequence.trained.index(True)


def measure(task, path, model):
    """Seconds, memory and a hash of all ids; also of which pairs there are, their order and margins."""
    if task == "prompts":
        import generate

        args = generate.parse_args(["--model", model, "--prompts", path, "--out", "-", "--max-tokens", "64"])
        inputs = generate.read_prompts([path])
        rows, *dropped = inputs if isinstance(inputs, tuple) else [inputs]  # a27d8ec counts nothing there
        tokens = generate.read_tokens(args)
        run = lambda: generate.encode_prompts(rows, args, tokens, *dropped)[0]  # noqa: E731
    else:
        version = Version(model, path)
        run = version.load
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from now on
    before, wall, processor = peak_mb(), time.perf_counter(), time.process_time()
    result = run()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    numbers = {"wall": wall, "processor": processor, "grown_mb": peak_mb() - before}
    digest = hashlib.sha256()
    for entry in result:
        if task == "prompts":
            facts = entry[0]["id"], entry[1]
        else:
            sequences = [(version.start(sequence), list(sequence.ids)) for sequence in entry.sequences]
            facts = entry.pair_id, entry.source, entry.reward_margin, sequences
        digest.update(json.dumps(facts).encode())
    numbers["tokenizer"] = 0 if task == "ids" else tokenizer_seconds(path, model)
    print(json.dumps(numbers | {"entries": len(result), "ids": digest.hexdigest()[:16]}))


def tokenizer_seconds(path, model):
    """Processor time of the tokenizer for all texts of a file at once."""
    from tokenizers import Tokenizer

    tokenizer, texts = Tokenizer.from_file(f"{model}/tokenizer.json"), []
    with open(path) as file:
        for row in map(json.loads, file):
            texts += [message["content"] for name in LENGTHS for message in row.get(name, [])]
    started = time.process_time()
    tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return time.process_time() - started


def peak_mb():
    """The highest resident memory of this process, in Linux."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


# ----- all of them
def in_process(root, *argv):
    """The last line that `child` prints in a process that imports the version in `root`."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import encode; encode.child(*sys.argv[3:])"
    command = [sys.executable, "-c", code, str(root), str(Path(__file__).parent), *map(str, argv)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(), check=True)
    return json.loads(run.stdout.splitlines()[-1])


def child(task, path, model, texts=None):
    if texts:
        write_ids(path, texts, model)
        print("{}")
    else:
        measure(task, path, model)


def compare(roots, folder, args):
    """{task: {version: [numbers of a round, ...]}}; versions that give other ids end the run."""
    results = {task: {version: [] for version in roots} for task in TASKS}
    inputs = {task: dict.fromkeys(roots, folder / f"{task}.jsonl") for task in TASKS}
    for version, root in roots.items():
        inputs["ids"][version] = folder / f"ids_{version}.jsonl"
        in_process(root, "ids", inputs["ids"][version], args.model, folder / "texts.jsonl")
    for task, versions in results.items():
        for _ in range(args.rounds):
            for version, root in roots.items():
                versions[version].append(in_process(root, task, inputs[task][version], args.model))
        seen = {(numbers["entries"], numbers["ids"]) for rounds in versions.values() for numbers in rounds}
        if len(seen) > 1:
            sys.exit(f"{TASKS[task]}: the versions give different token ids: {versions}")
    return results


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", required=True, help="model folder, whose tokenizer and template are used")
    parser.add_argument("--old", metavar="FOLDER", help="another version of the repository")
    parser.add_argument("--texts", metavar="FILE", help="JSONL, gzipped, of rows with prompt and response")
    parser.add_argument("--count", type=int, default=PAIRS, help="number of pairs (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.model = os.path.abspath(args.model)
    roots = ({"old": Path(args.old).resolve()} if args.old else {}) | {"this": REPO}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), words_of(args.texts), args.count)
        results = compare(roots, Path(name), args)
    load.append(os.getloadavg()[0])
    share = "" if args.count == PAIRS else f", not UltraFeedback's {PAIRS:,}"
    print(f"{args.count:,} pairs{share}; {args.rounds} rounds; load {load[0]:.1f} to {load[1]:.1f}\n")
    print("| | version | ms, wall | ms, processor | tokenizer alone | memory, KB |")
    print(f"|{'---|' * 6}")
    for task, versions in results.items():
        medians = {}
        for version, rounds in versions.items():
            numbers = {key: statistics.median(n[key] for n in rounds) for key in rounds[0] if key != "ids"}
            ms = [1000 * numbers[key] / args.count for key in ("wall", "processor", "tokenizer")]
            medians[version] = ms[:2]
            cells = [f"{value:.3f}" for value in ms] + [f"{1000 * numbers['grown_mb'] / args.count:.1f}"]
            print(f"| {TASKS[task]} | {version} | {' | '.join(cells)} |")
        if args.old:
            ratios = [f"{old / new:.1f}" for old, new in zip(*medians.values(), strict=True)]
            print(f"| | times faster | {' | '.join(ratios)} | | |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
