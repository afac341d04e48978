"""
log pi(y|x) of every response: S1 section 5.3 ("on-policiness"), S2 Table 8.

Reads   --responses FILE ...  as score.py
Writes  --out FILE            the same rows. Every response gains "logp", the sum over its tokens and its
                              end-of-turn token, which a truncated response does not have, and "logp_tokens",
                              their number; null where it is empty, too long or not finite. Rewards stay

Sampled token ids are read as they are if they are of the model's tokenizer; other responses are tokenized.
With --name N the keys are logp_N and logp_N_tokens.

    python scorers/logp.py --model out/models/policy --responses out/scored.jsonl --out out/logp.jsonl

Resumes and prints as score.py does; "mean" is that of the log-probabilities. S1 is the paper SimpleMix, S2
"Is On-Policy Data always the Best Choice [...]?".
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import score  # noqa: E402
from chat import completion_ids, end_of_turn, fingerprint, load_tokenizer, prompt_ids  # noqa: E402
from common import check_logps, fail, load_model, output_head  # noqa: E402

CHUNK = 512  # tokens whose logits over the vocabulary are in memory at once


def parse_args(argv=None):
    parser = score.make_parser(__doc__)
    score.add_model_flags(parser)
    score.add_length_flag(parser)
    score.add_batch_flag(parser)
    parser.add_argument("--name", help='end of the keys, "logp_NAME" (default: none, "logp")')
    return parser.parse_args(argv)


def check_token_ids(rows, vocabulary, config, model):
    """Refuse sampled ids that claim to be of this tokenizer and are not in the model's vocabulary."""
    size = config.get_text_config().vocab_size
    for row_id, row in rows.items():
        for response in row["responses"]:
            largest = max(response.get("token_ids") or [0])
            if response.get("tokenizer") == vocabulary and largest >= size:
                fail(f"the row {row_id} has the token id {largest}, but the vocabulary of {model} has {size}")


def token_logps(states, targets, weight, bias, scale=1.0, cap=None):
    """log softmax(logits)[target], float32 (C,). states (C, d), targets (C,), the rest by output_head

    The logits are in float32, and of CHUNK tokens at a time. On CUDA bfloat16 is multiplied on tensor cores.
    """
    logps, states = [], scale * states
    for chunk, ids in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
        if weight.is_cuda and weight.dtype != torch.float32:
            logits = torch.mm(chunk, weight.T, out_dtype=torch.float32)  # (CHUNK, V)
        else:
            logits = F.linear(chunk.float(), weight.float())
        logits = logits if bias is None else logits + bias.float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        logps.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(logps)


class LogProbability(score.Scorer):
    """Sum over a response's tokens of log pi(y_t | x, y_<t) at temperature 1, and their number."""

    kind = "logp"
    sets_reward = False

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.key = f"logp_{args.name}" if args.name else "logp"
        self.tokenizer, config = load_tokenizer(args.model, args.revision)
        self.max_length = score.longest_input(args, config, self.tokenizer)
        self.vocabulary, self.end_id = fingerprint(self.tokenizer), end_of_turn(self.tokenizer)
        check_token_ids(rows, self.vocabulary, config, args.model)

    def load(self):
        from transformers import AutoModelForCausalLM

        self.model = load_model(AutoModelForCausalLM, self.args.model, self.args.revision, self.args.dtype)
        self.head, self.checked = output_head(self.model), False

    def values(self, row):
        return [response[self.key] for response in row["responses"]]

    @torch.inference_mode()
    def score(self, rows, update):
        responses, starts, sequences = [], [], []
        for row in rows:
            prompt = prompt_ids(self.tokenizer, row["prompt"])
            for response in row["responses"]:
                response[self.key] = response[f"{self.key}_tokens"] = None
                completion = completion_ids(self.tokenizer, self.vocabulary, self.end_id, response)
                if not completion or len(prompt) + len(completion) > self.max_length:
                    self.counts["responses_too_long" if completion else "responses_empty"] += 1
                    update(1)
                    continue
                responses.append(response)
                starts.append(len(prompt))
                sequences.append(prompt + completion)
        for batch, ids, _ in score.token_batches(sequences, self.args, self.counts):
            spans = [(starts[index], len(sequences[index])) for index in batch]
            for index, logps in zip(batch, self.logps(ids, spans), strict=True):
                total = logps.double().sum().item()
                if math.isfinite(total):
                    responses[index] |= {self.key: total, f"{self.key}_tokens": len(logps)}
            update(len(batch))

    def logps(self, ids, spans):
        """log pi of the tokens start:end of each row of ids (B, T), one tensor (end - start,) a row."""
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, d)
        states, targets = [], []
        for row, (start, end) in enumerate(spans):
            states.append(hidden[row, start - 1 : end - 1])  # the state before a token predicts it
            targets.append(ids[row, start:end])
        states, sizes = torch.cat(states), [len(target) for target in targets]
        weight, *rest = self.head
        logps = token_logps(states, torch.cat(targets).to(states.device), weight.to(states.device), *rest)
        if not self.checked:
            start, end = spans[0]
            check_logps(self.model, ids[0, :end], start, logps[: sizes[0]], self.args.dtype)
            self.checked = True
        return logps.split(sizes)


if __name__ == "__main__":
    try:
        score.main(parse_args(), LogProbability)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
