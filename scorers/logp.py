"""
log pi(y|x) of every response: S1 section 5.3 ("on-policiness"), S2 Table 8.

Reads   --responses FILE ...  as score.py
Writes  --out FILE            the same rows. Every response gains "logp", the sum over its tokens and its
                              end-of-turn token, which a truncated response does not have, and "logp_tokens",
                              their number; null where it is empty, too long or not finite. Rewards stay

Sampled token ids, of prompts too, are read as they are if they are of the model's tokenizer and template;
others are made as train_dpo.py makes them. With --name N the keys are logp_N and logp_N_tokens.

    python scorers/logp.py --model out/models/policy --responses out/scored.jsonl --out out/logp.jsonl

Resumes and prints as score.py does; "mean" is that of the log-probabilities. S1 is the paper SimpleMix, S2
"Is On-Policy Data always the Best Choice [...]?".
"""

import json
import math
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import score  # noqa: E402
from chat import prompt_ids, read_chat, response_ids, sampled_ids  # noqa: E402
from common import fail, note  # noqa: E402
from loading import check_logps, load_model, output_head, run_date, special_tokens  # noqa: E402

CHUNK = 512  # tokens whose logits over the vocabulary are in memory at once


def parse_args(argv=None):
    parser = score.make_parser(__doc__)
    score.add_model_flags(parser)
    score.add_length_flag(parser)
    score.add_batch_flag(parser)
    parser.add_argument("--name", help='end of the keys, "logp_NAME" (default: none, "logp")')
    text = "as given to generate.py; only for prompts without token ids"
    parser.add_argument("--template-kwargs", type=json.loads, default={}, metavar="JSON", help=text)
    args = parser.parse_args(argv)
    if not isinstance(args.template_kwargs, dict):
        parser.error(f"--template-kwargs: expected a JSON object, found {args.template_kwargs}")
    return args


def check_token_ids(rows, chat):
    """Refuse sampled ids that claim to be of this tokenizer and are not in the model's vocabulary."""
    name, size = chat.tokenizer.name_or_path, chat.vocabulary
    for row_id, row in rows.items():
        for response in row["responses"]:
            largest = max(sampled_ids(chat, response) or [0])
            if largest >= size:
                fail(f"the row {row_id} has the token id {largest}, but the vocabulary of {name} has {size}")


def tokenized(chat, rows, counts):
    """(the responses of all rows, [(ids of the prompt, ids of the response), or None, for each])"""
    prompts, problems = prompt_ids(chat, rows, counts)
    for index, problem in problems.items():
        note(f"the row {rows[index]['id']}: {problem}")
    special = special_tokens(chat.tokenizer)
    responses = [response for row in rows for response in row["responses"]]
    for response in responses:
        is_text = sampled_ids(chat, response) is None
        counts["responses_with_special_tokens"] += bool(is_text and special.search(response["text"]))
    each = [prompt for prompt, row in zip(prompts, rows, strict=True) for _ in row["responses"]]
    return responses, response_ids(chat, each, responses, counts)


def why_skipped(pair, longest):
    """Why a response is not read, as a count of them; None if it is. pair is one of `tokenized`."""
    if not pair:
        return "responses_rejected_by_the_template"
    prompt, completion = pair
    if not completion:
        return "responses_empty"
    return "responses_too_long" if len(prompt) + len(completion) > longest else None


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
        day = run_date(args.out, args.overwrite)
        self.chat, config = read_chat(args.model, args.revision, args.template_kwargs, day)
        args.date = self.chat.day  # in the record, for a run that goes on tomorrow
        self.max_length = score.longest_input(args, config, self.chat.tokenizer)
        check_token_ids(rows, self.chat)
        if args.template_kwargs:  # refused before the model loads if a row has ids of others
            prompt_ids(self.chat, list(rows.values()), Counter())

    def load(self):
        from transformers import AutoModelForCausalLM

        self.model = load_model(AutoModelForCausalLM, self.args.model, self.args.revision, self.args.dtype)
        self.head, self.checked = output_head(self.model), False

    def values(self, row):
        return [response[self.key] for response in row["responses"]]

    @torch.inference_mode()
    def score(self, rows, update):
        responses, starts, sequences = [], [], []
        for response, pair in zip(*tokenized(self.chat, rows, self.counts), strict=True):
            response[self.key] = response[f"{self.key}_tokens"] = None
            reason = why_skipped(pair, self.max_length)
            if reason:
                self.counts[reason] += 1
                update(1)
                continue
            prompt, completion = pair
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
