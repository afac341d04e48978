"""
PairRM, the preference model of S2 (section 4): every pair of a prompt's responses, in both orders.

Reads   --responses FILE ...  as score.py
Writes  --out FILE            as score.py, with "wins"[i][j] = sigmoid((logit_ij - logit_ji) / 2) in each row,
                              and as "reward" of i the mean over the others of (logit_ij - logit_ji) / 2

The weights are those of llm-blender/PairRM-hf; the input is that of the library llm-blender, with its
spelling and its limits of 1,224 tokens for the conversation and 2,048 in all. What is longer is cut and
counted.

    python scorers/pairrm.py --model llm-blender/PairRM-hf --responses on.jsonl off.jsonl --out scored.jsonl

Resumes and prints as score.py does, and besides pairs, pairs of which something was cut, and pairs whose two
orders disagree. S2 is the paper "Is On-Policy Data always the Best Choice [...]?".
"""

import math
import re
import sys
from functools import lru_cache
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import score  # noqa: E402
from chat import answer  # noqa: E402
from common import fail  # noqa: E402
from loading import load_tokenizer  # noqa: E402

SOURCE_TOKENS, ALL_TOKENS = 1224, 2048  # PairRM's limits
MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
RESERVED = re.compile("|".join(map(re.escape, (*MARKERS, "[CLS]", "[SEP]"))))


def parse_args(argv=None):
    parser = score.make_parser(__doc__)
    score.add_model_flags(parser)
    score.add_batch_flag(parser)
    parser.add_argument("--name", help='key in "scores" (default pairrm)')
    args = parser.parse_args(argv)
    if args.dtype == "auto":
        args.dtype = "float32"  # PairRM's margins are small
    return args


def conversation(prompt, text):
    """PairRM's source and candidate (llm-blender's compare_conversations); None if turns do not alternate.

    A system's text opens the first user turn; earlier assistant turns are part of every candidate. Markers,
    which are looked up by id, [CLS] and [SEP] become spaces.
    """
    if prompt[0]["role"] == "system" and len(prompt) > 1:
        opening = f"{prompt[0]['content']}\n{prompt[1]['content']}"
        prompt = [{**prompt[1], "content": opening}, *prompt[2:]]
    if [turn["role"] for turn in prompt] != ["user", "assistant"] * (len(prompt) // 2) + ["user"]:
        return None
    source = (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
    )
    users = [
        f"USER: {RESERVED.sub(' ', turn['content'])}\nAssistant: <Response {i}>"
        for i, turn in enumerate(prompt[::2], 1)
    ]
    answers = [turn["content"] for turn in prompt[1::2]] + [text]
    lines = [f"<Response {i}>: {RESERVED.sub(' ', answer)}" for i, answer in enumerate(answers, 1)]
    return source + "\n".join(users), "\n".join(lines)


class PairRM(score.Scorer):
    kind = "pairrm"

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.tokenizer, config = load_tokenizer(args.model, args.revision)
        ids = self.tokenizer.convert_tokens_to_ids(list(MARKERS))
        if config.model_type != "deberta-v2" or None in ids or self.tokenizer.unk_token_id in ids:
            markers = f"a deberta-v2 whose tokenizer has {', '.join(MARKERS)}"
            fail(f"{args.model}: expected PairRM, {markers}, found a {config.model_type}")
        self.config, self.marker_ids = config, ids[:3]
        self.tokens = lru_cache(maxsize=1024)(lambda text: self.tokenizer(text)["input_ids"])

    def load(self):
        """The encoder and its head, as llm-blender names their weights."""
        from huggingface_hub import snapshot_download
        from transformers import AutoModel

        folder = Path(self.args.model)
        if not folder.is_dir():
            patterns = ["*.json", "*.safetensors"]
            folder = Path(
                snapshot_download(str(folder), revision=self.args.revision, allow_patterns=patterns)
            )
        weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                weights |= load_file(path)
            except SafetensorError as error:
                fail(f"{path}: {error}")
        encoder, head = {}, {}
        for name, tensor in weights.items():
            part, _, rest = name.partition(".")
            if part == "pretrained_model" and not name.endswith("position_ids"):
                encoder[rest] = tensor
            elif part == "head_layer":
                head[rest] = tensor
        if "embeddings.word_embeddings.weight" not in encoder or "4.weight" not in head:
            names = ", ".join(sorted(weights)[:3])
            fail(f"{folder}: expected the weights pretrained_model.* and head_layer.*, found {names}")
        size, tasks = self.config.hidden_size, head["4.bias"].numel()
        self.model = AutoModel.from_config(self.config)
        # with the markers, of which the config may not know
        self.model.resize_token_embeddings(len(encoder["embeddings.word_embeddings.weight"]))
        self.head = torch.nn.Sequential(
            torch.nn.Dropout(),
            torch.nn.Linear(2 * size, size),
            torch.nn.Tanh(),
            torch.nn.Dropout(),
            torch.nn.Linear(size, tasks),
        )
        try:
            self.model.load_state_dict(encoder)
            self.head.load_state_dict(head)
        except RuntimeError as error:  # names what is missing, or has another shape
            fail(f"{folder}: these weights are not PairRM's: {' '.join(str(error).split())[:300]}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for part in (self.model, self.head):
            part.to(device, getattr(torch, self.args.dtype)).eval()

    def ids(self, source, first, second):
        """(ids of the three texts, each as [CLS] ... [SEP], whether one was cut)."""
        parts = [self.tokens(MARKERS[0] + source)]
        parts += [self.tokens(MARKERS[1] + first), self.tokens(MARKERS[2] + second)]
        for_candidate = (ALL_TOKENS - min(len(parts[0]), SOURCE_TOKENS)) // 2
        limits = [SOURCE_TOKENS, for_candidate, for_candidate]
        kept = []
        for part, limit in zip(parts, limits, strict=True):
            kept += part if len(part) <= limit else part[: limit - 1] + part[-1:]  # [SEP] stays
        return kept, len(kept) < sum(map(len, parts))

    @torch.inference_mode()
    def logits(self, sequences, update):
        """f([h_source; h_candidate1]) - f([h_source; h_candidate2]), h the last states at the markers."""
        logits = [None] * len(sequences)
        for batch, ids, mask in score.token_batches(sequences, self.args, self.counts):
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, d)
            source, first, second = (hidden[ids == marker] for marker in self.marker_ids)  # (B, d) each
            margins = self.head(torch.cat([source, first], 1)).float()
            margins -= self.head(torch.cat([source, second], 1)).float()  # (B, tasks)
            for index, logit in zip(batch, margins.mean(1).tolist(), strict=True):
                logits[index] = logit
            update(len(batch))
        return logits

    def score(self, rows, update):
        margins = [[[None] * len(row["responses"]) for _ in row["responses"]] for row in rows]
        reasons = ["nothing to compare with"] * len(rows)
        pairs, sequences = [], []  # each pair has two sequences
        for k, row in enumerate(rows):
            texts = [conversation(row["prompt"], answer(response)) for response in row["responses"]]
            if None in texts:
                reasons[k] = "turns of user and assistant do not alternate"
                continue
            for i, j in combinations(range(len(texts)), 2):
                if texts[i] == texts[j]:
                    margins[k][i][j] = margins[k][j][i] = 0.0
                    continue
                source = texts[i][0]
                forward, cut = self.ids(source, texts[i][1], texts[j][1])
                backward, _ = self.ids(source, texts[j][1], texts[i][1])
                pairs.append((k, i, j))
                sequences += [forward, backward]
                self.counts.update(pairs=1, pairs_cut=int(cut))
        n_responses = sum(len(row["responses"]) for row in rows)
        share = n_responses / max(1, len(sequences))  # the bar counts responses
        logits = self.logits(sequences, lambda n: update(n * share))
        for (k, i, j), forward, backward in zip(pairs, logits[::2], logits[1::2], strict=True):
            margin = (forward - backward) / 2
            self.counts["orders_disagree"] += forward * backward > 0 or (forward == 0) != (backward == 0)
            if math.isfinite(margin):
                margins[k][i][j], margins[k][j][i] = margin, -margin
            else:
                reasons[k] = "not finite"
        for row, values, reason in zip(rows, margins, reasons, strict=True):
            wins = [[None if x is None else 1 / (1 + math.exp(-x)) for x in line] for line in values]
            self.set_wins(row, wins, values, [reason] * len(values))


if __name__ == "__main__":
    try:
        score.main(parse_args(), PairRM)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
