"""
How similar the responses of a prompt are: cosines of their embeddings (S1 section 5.3, "similarity").

Reads   --responses FILE ...  as score.py
Writes  --out FILE            the same rows, each with "cosine": a matrix over its responses; rewards stay

S1 says "last layer sentence embedding", and names no model and no pooling. Of a causal language model this is
the last hidden state, mean over the response's tokens, which follow the prompt; of an encoder, the response
alone, pooled as its 1_Pooling/config.json says (mean if there is none). Reasoning is left out.

    python scorers/embed.py --model sentence-transformers/all-MiniLM-L6-v2 --responses on.jsonl --out c.jsonl

Resumes and prints as score.py does; "mean" is the mean cosine with the other responses. S1 is SimpleMix.
"""

import json
import sys
from pathlib import Path

import logp
import torch
import torch.nn.functional as F

from chat import answer, read_chat
from common import fail
from loading import load_model, load_tokenizer, run_date

score = logp.score  # the stage that both vary
POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
POOLING["pooling_mode_lasttoken"] = "last"


def parse_args(argv=None):
    parser = score.make_parser(__doc__)
    score.add_model_flags(parser)
    score.add_length_flag(parser)
    score.add_batch_flag(parser)
    args = parser.parse_args(argv)
    args.name = None  # its key is "cosine"
    return args


class Embed(score.Scorer):
    kind = "embed"
    sets_reward = False

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.tokenizer, config = load_tokenizer(args.model, args.revision)
        self.max_length = score.longest_input(args, config, self.tokenizer)
        self.causal = (config.architectures or [""])[0].endswith("ForCausalLM")
        self.pooling = "mean"
        if self.causal:
            self.chat, _ = read_chat(args.model, args.revision, day=run_date(args.out, args.overwrite))
            args.date = self.chat.day  # in the record, for a run that goes on tomorrow
            logp.check_token_ids(rows, self.chat)
        else:
            self.read_pooling()

    def read_pooling(self):
        from transformers.utils import cached_file

        options = {"revision": self.args.revision, "_raise_exceptions_for_missing_entries": False}
        path = cached_file(self.args.model, "1_Pooling/config.json", **options)
        if path:
            modes = json.loads(Path(path).read_text())
            modes = [name for name, on in modes.items() if on is True and name.startswith("pooling_mode")]
            if len(modes) != 1 or modes[0] not in POOLING:
                fail(f"{path}: expected mean, cls or last-token pooling, found {' and '.join(modes)!r}")
            self.pooling = POOLING[modes[0]]

    def load(self):
        from transformers import AutoModel

        name, revision, dtype = self.args.model, self.args.revision, self.args.dtype
        self.model = load_model(AutoModel, name, revision, dtype, unused="pooler")

    def encode(self, rows):
        """[(ids of the prompt, ids of the response), or None]; an encoder reads no prompt."""
        answers = []
        for row in rows:
            responses = [without_reasoning(response) for response in row["responses"]]
            answers.append({**row, "responses": responses})
        if self.causal:
            return logp.tokenized(self.chat, answers, self.counts)[1]
        texts = [response["text"] for row in answers for response in row["responses"]]
        return [([], self.tokenizer(text)["input_ids"] if text.strip() else []) for text in texts]

    @torch.inference_mode()
    def score(self, rows, update):
        targets, starts, sequences = [], [], []
        vectors = [[None] * len(row["responses"]) for row in rows]
        indices = [(k, i) for k, row in enumerate(rows) for i in range(len(row["responses"]))]
        for target, pair in zip(indices, self.encode(rows), strict=True):
            reason = logp.why_skipped(pair, self.max_length)
            if reason:
                self.counts[reason] += 1
                update(1)
                continue
            prompt, completion = pair
            targets.append(target)
            starts.append(len(prompt))
            sequences.append(prompt + completion)
        for batch, ids, mask in score.token_batches(sequences, self.args, self.counts):
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, T, d)
            for states, index in zip(hidden, batch, strict=True):
                states = states[starts[index] : len(sequences[index])]  # (t, d), of the response
                pooled = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[self.pooling]
                k, i = targets[index]
                if pooled.isfinite().all():
                    vectors[k][i] = F.normalize(pooled, dim=0).cpu()
            update(len(batch))
        for row, its_vectors in zip(rows, vectors, strict=True):
            row["cosine"] = [[cosine(a, b) for b in its_vectors] for a in its_vectors]

    def check_first(self, rows):
        if all(value is None for row in rows for line in row["cosine"] for value in line):
            super().check_first(rows)

    def values(self, row):
        """The mean cosine with the other responses; with itself if there is no other."""
        means = []
        for i, line in enumerate(row["cosine"]):
            others = [x for j, x in enumerate(line) if x is not None and (j != i or len(line) == 1)]
            means.append(sum(others) / len(others) if others else None)
        return means


def without_reasoning(response):
    """The response as it is embedded: its answer, without an end-of-turn token."""
    text = answer(response)
    whole = response if text == response["text"] else {"text": text}  # sampled ids are of the whole
    return {**whole, "finish": "length"}


def cosine(a, b):
    return None if a is None or b is None else round(float(a @ b), 6)


if __name__ == "__main__":
    try:
        score.main(parse_args(), Embed)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
