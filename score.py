"""
Stage 2 of the pipeline: responses -> scored responses, one row per prompt.

Reads   --responses FILE ...  a Row (below) per prompt, as generate.py, data/import_responses.py and scorers
                              write it; several files are merged by id, responses in the files' order
Writes  --out FILE            the same rows. Every response gains "reward", null where "reward_error" tells
                              why, and "scores": {NAME: reward}; the row gains "labeler", their scorer.
                              For x.jsonl also the record x.meta.json: arguments, hashes, versions, counts

The reward is the raw logit of any AutoModelForSequenceClassification with one label (S1 section 3.1, S3
section 5.1). If it has a chat template, it reads a chat (Skywork-Reward), else a pair of texts (the demo's
cross-encoder); never a response's reasoning. scorers/ has other labels; "reward" is the last scorer's.

    python score.py --model out/models/reward --responses out/on.jsonl out/off.jsonl --out out/scored.jsonl

If a run is stopped, the same command, without --overwrite, resumes it. Prints one JSON object last: rows,
responses, how many have no score and why, the mean score by source; tokens and padding are of this run. S1 is
the paper SimpleMix, S3 "What Matters in Data for DPO?".
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Literal, Required, TypedDict

from common import Message, TokenIds, Wins, fail, make_record, meta_path, note, read_responses

MAY_CHANGE = {"limit", "batch_tokens", "tensor_parallel", "max_requests"}  # in a resumed run


class Response(TypedDict, total=False):
    text: Required[str]
    final: str | None  # what follows its reasoning, which is what scorers read
    source: Required[Literal["on", "off"]]
    model: str | None
    finish: Literal["stop", "length"] | None  # "length": truncated at the longest response allowed
    token_ids: TokenIds | None
    tokenizer: str | None  # fingerprint of the tokenizer that made them
    reward: float | None
    reward_error: str | None
    scores: dict[str, float | None] | None  # every scorer's, by name


class Row(TypedDict, total=False):
    id: Required[str]
    prompt: Required[str | list[Message]]  # a text is one user turn
    prompt_token_ids: TokenIds | None
    prompt_tokenizer: str | None  # fingerprint of the tokenizer and the chat template that made them
    responses: Required[list[Response]]
    answer: str | int | float | None  # read by scorers/verify.py
    labeler: str | None
    wins: Wins | None
    cosine: list[list[float | None]] | None  # [i][j]: similarity of responses i and j


# ----- arguments
def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def make_parser(description):
    """The flags of every scorer."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--responses", required=True, nargs="+", metavar="FILE", help="responses, JSONL, merged by id")
    flag("--out", required=True, metavar="FILE", help="scored responses, JSONL")
    flag("--shard", default="0/1", metavar="I/N", help="part I of N, counted from 0, in blocks of rows")
    flag("--limit", type=positive, help="only the first rows")
    flag("--overwrite", action="store_true", help="start over if --out exists")
    return parser


def add_model_flags(parser):
    """The flags of scorers that load a model."""
    flag = parser.add_argument
    flag("--model", required=True, help="model folder, or OWNER/NAME on the hub")
    flag("--revision", help="branch, tag or commit of a model on the hub")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on CUDA")


def add_length_flag(parser):
    parser.add_argument("--max-length", type=positive, help="longest input in tokens (default: the model's)")


def add_batch_flag(parser):
    help_text = "tokens in a batch, padding included (default %(default)s)"
    parser.add_argument("--batch-tokens", type=positive, default=8192, help=help_text)


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add_length_flag(parser)
    add_batch_flag(parser)
    parser.add_argument("--name", help='key in "scores" and prefix of "labeler" (default rm)')
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported: --help and wrong flags answer at once

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: a tenth faster on a CPU

import torch  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from tqdm import tqdm  # noqa: E402

from chat import answer, chat_of, encode, render  # noqa: E402
from common import append_rows, begin_output, open_output, read_jsonl, write_record  # noqa: E402
from loading import context_length, load_model, load_tokenizer, run_date, shard_of, special_tokens  # noqa: E402

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans for 30 ms at every new length


class Scorer:
    """What `main` needs of a scorer: a subclass has `score`, and `load` if there is a model."""

    kind = None  # its name in "scores" unless --name gives another
    sets_reward = True
    window = 256  # rows that are scored together and then written

    def __init__(self, args, rows):
        """Check what can be checked before a model loads; rows: {id: row}, all that --out will have."""
        self.args = args
        self.name = args.name or self.kind
        self.labeler = f"{self.name}:{args.model}" if args.model else self.name
        self.models = [(args.model, args.revision)] if args.model else []  # for the record
        self.files = []  # other inputs, for the record
        self.counts = Counter()  # for the last line

    def load(self):
        """Load the model."""

    def score(self, rows, update):
        """Write the results into a window of rows, by set_reward for every response if sets_reward.

        update(n) moves the bar by n responses.
        """
        raise NotImplementedError

    def values(self, row):
        """The number that each response of a scored row got, or None."""
        return [response["scores"][self.name] for response in row["responses"]]

    def check_first(self, rows):
        """End a run whose model gave no number for anything in the first window."""
        read = self.counts["tokens_scored"]  # 0 if no model runs here
        if read and all(value is None for row in rows for value in self.values(row)):
            problem = f"no score in the first {len(rows)} rows is a finite number"
            fail(f"{self.args.model}: {problem}; check its weights, which may contain NaN")

    def summary(self):
        """Statistics of --out for the final JSON line."""
        counts, without, scores = Counter(), Counter(), defaultdict(list)
        for _, row in read_jsonl(self.args.out, Row):
            counts.update(rows=1, responses=len(row["responses"]))
            for response, value in zip(row["responses"], self.values(row), strict=True):
                if value is not None:
                    scores[response["source"]].append(value)
                else:
                    without[response["reward_error"] if self.sets_reward else "no value"] += 1
        means = {source: math.fsum(values) / len(values) for source, values in scores.items()}
        result = {**counts, "without": without, "mean": means, **self.counts}
        padded = result.pop("tokens_padded", 0)
        if padded:
            result["padding"] = round(1 - result["tokens_scored"] / padded, 4)
        return result

    def check(self, counts):
        """End a run whose results are of no use."""
        if not counts["mean"]:
            fail(f"{self.args.out}: no response has a score: {json.dumps(counts['without'])}")

    def set_reward(self, response, reward, error=None):
        if reward is not None and not math.isfinite(reward):
            reward, error = None, "not finite"
        response["scores"] = {**(response.get("scores") or {}), self.name: reward}
        response["reward"], response["reward_error"] = reward, error

    def set_wins(self, row, wins, values, reasons):
        """Set row["wins"], wins[i][j] = P(i beats j), and the rewards (scorers/pairrm.py, judge.py).

        The reward of i is the mean of the numbers in values[i]; if all are None, reasons[i] is its error.
        """
        row["wins"] = wins
        for i, response in enumerate(row["responses"]):
            numbers = [value for value in values[i] if value is not None]
            if numbers:
                self.set_reward(response, math.fsum(numbers) / len(numbers))
            else:
                self.set_reward(response, None, reasons[i])


# ----- batches of token ids
def longest_input(args, config, tokenizer):
    """--max-length, or what the model reads."""
    from transformers import AutoModel

    with torch.device("meta"):
        embeddings = getattr(AutoModel.from_config(config), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    limit = context_length(config) - (0 if padding is None else padding + 1)  # RoBERTa's positions follow it
    limit = min(limit, tokenizer.model_max_length)
    if args.max_length and args.max_length > limit:
        fail(f"--max-length {args.max_length}: {args.model} reads at most {limit} tokens")
    return args.max_length or limit


def token_batches(sequences, args, counts, pad_id=0):
    """Yield (indices, ids (B, T), mask (B, T)) of sequences of token ids, padded on the right.

    Sequences are sorted by length. A batch has at most --batch-tokens, or one sequence that is longer; its
    longest sequence is at most 8 % longer than its shortest.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches, shortest = [], 0
    for index in sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i)):
        length = len(sequences[index])
        full = not batches or (len(batches[-1]) + 1) * length > args.batch_tokens
        if full or length > 1.08 * shortest:
            batches.append([])
            shortest = length
        batches[-1].append(index)
    for batch in batches:
        rows = [torch.tensor(sequences[index]) for index in batch]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        counts["tokens_scored"] += int(mask.sum())
        counts["tokens_padded"] += mask.numel()
        yield batch, ids.to(device), mask.to(device)


# ----- the reward model
def as_text(prompt):
    """A prompt for a reader without chat template: the question, or "role: text" lines of a conversation."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


class RewardModel(Scorer):
    """The raw logit of a model with one label; an input longer than --max-length gets no reward."""

    kind = "rm"

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.tokenizer, config = load_tokenizer(args.model, args.revision)
        architecture = (config.architectures or ["no architecture"])[0]
        if config.num_labels != 1 or not architecture.endswith("ForSequenceClassification"):
            given = f"{architecture} with {config.num_labels} labels"
            fail(f"{args.model}: expected a ...ForSequenceClassification with one label, found {given}")
        self.chat = None
        if self.tokenizer.chat_template:
            self.chat = chat_of(self.tokenizer, config, {}, run_date(args.out, args.overwrite))
            args.date = self.chat.day  # in the record, for a run that goes on tomorrow
        elif not self.tokenizer.sep_token:
            fail(f"{args.model}: the tokenizer has no chat template and no separator for pairs of texts")
        self.max_length = longest_input(args, config, self.tokenizer)
        prompts = ("\n".join(turn["content"] for turn in row["prompt"]) for row in rows.values())
        texts = (answer(response) for row in rows.values() for response in row["responses"])
        special = special_tokens(self.tokenizer)
        self.counts["prompts_with_special_tokens"] = sum(bool(special.search(text)) for text in prompts)
        self.counts["responses_with_special_tokens"] = sum(bool(special.search(text)) for text in texts)

    def load(self):
        from transformers import AutoModelForSequenceClassification as auto_class

        self.model = load_model(auto_class, self.args.model, self.args.revision, self.args.dtype)

    def encode(self, row, response):
        """(token ids, token types or None) of a prompt and an answer; ValueError if there are none."""
        text = answer(response)
        if response["text"] and not text:
            raise ValueError("empty after its reasoning")
        if self.chat:
            turns = [*row["prompt"], {"role": "assistant", "content": text}]
            return encode(self.chat, [render(self.chat, turns)])[0], None
        encoded = self.tokenizer(as_text(row["prompt"]), text)
        return encoded["input_ids"], encoded.get("token_type_ids")

    def score(self, rows, update):
        usable = []
        for row in rows:
            for response in row["responses"]:
                try:
                    ids, types = self.encode(row, response)
                    if len(ids) > self.max_length:
                        raise ValueError(f"longer than {self.max_length} tokens")
                    usable.append((response, ids, types))
                except ValueError as error:
                    self.set_reward(response, None, str(error))
                    update(1)
        rewards = self.rewards([ids for _, ids, _ in usable], [types for *_, types in usable], update)
        for (response, *_), reward in zip(usable, rewards, strict=True):
            self.set_reward(response, reward)

    @torch.inference_mode()
    def rewards(self, sequences, types, update):
        """The reward of every sequence of token ids."""
        rewards = [None] * len(sequences)
        pad_id = self.tokenizer.pad_token_id or 0
        for batch, ids, mask in token_batches(sequences, self.args, self.counts, pad_id):
            if hasattr(self.model, "score"):
                logits = self.decoder_logits(ids, mask)
            else:
                logits = self.encoder_logits(ids, mask, [types[index] for index in batch])
            for index, reward in zip(batch, logits.tolist(), strict=True):
                rewards[index] = reward
            update(len(batch))
        return rewards

    def decoder_logits(self, ids, mask):
        """(B,): the linear `score` of the last token's state; no token sees the padding after it.

        transformers looks for this token by the padding id, which may also be the end-of-turn token.
        """
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, d)
        rows = torch.arange(len(ids), device=hidden.device)
        last = hidden[rows, mask.sum(1).to(hidden.device) - 1]  # (B, d)
        return last.float() @ self.model.score.weight[0].float().to(hidden.device)

    def encoder_logits(self, ids, mask, types):
        """(B,): the model's own logit; types are 0 in the first text and 1 in the second."""
        options = {}
        if types[0]:
            lines = [torch.tensor(line, device=ids.device) for line in types]
            options["token_type_ids"] = pad_sequence(lines, batch_first=True)
        return self.model(input_ids=ids, attention_mask=mask, **options).logits[:, 0].float()


# ----- main
def compare_dates(paths):
    """Say so where the chat templates behind these files saw different dates."""
    dates = {}
    for path in paths:
        with suppress(OSError, ValueError, KeyError, TypeError):  # no record, or one without a date
            dates[path] = json.loads(Path(meta_path(path)).read_text())["args"]["date"]
    if len(set(dates.values()) - {None}) > 1:
        note(f"the chat templates of these files saw different dates: {dates}")


def score_rows(scorer, rows, ids, done, file, record):
    """Score and append the rows that are missing, a window at a time."""
    total = sum(len(rows[row_id]["responses"]) for row_id in ids[done:])
    with tqdm(total=total, unit="response", desc=scorer.name) as progress:
        for start in range(done, len(ids), scorer.window):
            window = [rows[row_id] for row_id in ids[start : start + scorer.window]]
            if scorer.sets_reward:
                for row in window:
                    row["labeler"] = scorer.labeler
                    row.pop("wins", None)  # another scorer's
            scorer.score(window, progress.update)
            if start == 0:
                scorer.check_first(window)
            if start == done:
                begin_output(file, record, done)
            append_rows(file, window)


def main(args, scorer_class=RewardModel):
    """Score; scorers/*.py bring their own class."""
    started = time.time()
    args.scorer = scorer_class.kind  # for the record: no scorer resumes the rows of another
    if vars(args).get("dtype") == "auto":
        args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    rows = read_responses(args.responses, Row)
    compare_dates(args.responses)
    ids = shard_of(list(rows)[: args.limit], scorer_class.window, args.shard)
    rows = {row_id: rows[row_id] for row_id in ids}
    scorer = scorer_class(args, rows)
    record = make_record(args, args.responses + scorer.files, scorer.models)
    with open_output(args, record, MAY_CHANGE, ids, scorer.window) as (file, done, counts):
        if counts is not None:
            note(f"--out {args.out} is complete; nothing was done")
        else:
            if done < len(ids):
                scorer.load()
            score_rows(scorer, rows, ids, done, file, record)
            counts = scorer.summary() | {"resumed_rows": done}
            record |= {"counts": counts, "seconds": round(time.time() - started, 2)}
            write_record(args.out, record)
        scorer.check(counts)
        print(json.dumps({"out": args.out, **counts, "seconds": round(time.time() - started, 2)}))


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
