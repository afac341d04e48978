"""
S1's "Prompting" (Appendix H, Table 3): generate.py, but every response is asked to differ from those before.

Reads and writes as generate.py, whose flags it has. The first response y_1 to a prompt x is that of
generate.py; then y_i ~ pi(. | x, y_1, z, ..., y_i-1, z), where z (ASK_AGAIN) asks for another response. A row
whose conversation no longer fits into the model's context ends there; the counts say how many responses were
skipped.

    python recipes/sample_diverse.py --model out/models/policy --prompts prompts.jsonl --out diverse.jsonl
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate
from chat import answer, prompt_ids

ASK_AGAIN = (  # word for word
    "Please generate another response that is different from all the previous ones. It can differ in aspects "
    "such as but not limited to tone, formality, strategy, judgment, conciseness, structure. It can also "
    "involve asking for clarity if the input prompt is unclear."
)
WINDOW = 1024  # rows that are complete before the next are begun: what a kill can cost with vllm


def parse_args(argv=None):
    parser = generate.make_parser(__doc__)
    args = generate.parse_args(argv, parser)
    if args.n < 2:
        parser.error(f"--n must be at least 2, found {args.n}")
    args.diverse = True  # for the record: such rows do not go on from those of generate.py
    return args


def ask_again(prompt, texts):
    """The conversation that asks for one response more than there are texts."""
    messages = list(prompt)
    for text in texts:
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": ASK_AGAIN})
    return messages


def diverse_sampler(args, tokens, longest):
    """As of generate.py, for sequences of any length that the model can read."""
    make_sampler = generate.hf_sampler if args.backend == "hf" else generate.vllm_sampler
    return make_sampler(args, tokens, tokens.context)


def diverse_rows(prompts, sample, args, tokens, progress):
    """Yield rows in the order of the prompts: the first responses of a window, then all second ones, ..."""
    for start in range(0, len(prompts), WINDOW):
        rows = [row | {"responses": []} for row, _ in prompts[start : start + WINDOW]]
        for k in range(args.n):
            for request, sampled in sample(next_requests(rows, k, args, tokens)):
                response = generate.make_response(sampled, args, tokens)
                rows[request.index]["responses"].append(response)
                progress.update()
        yield from rows


def next_requests(rows, k, args, tokens):
    """Requests for response k of the rows that have k responses and room for another."""
    requests = []
    for index, row in enumerate(rows):
        texts = [answer(response) for response in row["responses"]]
        conversation = {"prompt": ask_again(row["prompt"], texts)}
        (ids,), _ = prompt_ids(tokens.chat, [conversation], Counter())
        if len(texts) == k and ids and len(ids) <= tokens.context - args.max_tokens:
            requests.append(generate.Request(index, row["id"], k, ids))
    return requests


if __name__ == "__main__":
    args = parse_args()
    try:
        generate.main(args, diverse_sampler, diverse_rows)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
