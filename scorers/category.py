"""
What kind of request a prompt is: one of WildChat's 16 categories, by a chat model (S1 section 5.1, Fig. 7).

Reads   --responses FILE ...  as score.py
Writes  --out FILE            the same rows, each with "category"; rewards stay as they are

The server is as in judge.py. S1's prompt is unpublished, and this is our own: the model answers with a
number, since labels contain commas. If it cannot be read, the model is asked once more; then it is "other".

    python scorers/category.py --model gpt-4o-mini --responses alpaca.jsonl --out categories.jsonl

Resumes as score.py does. Prints one JSON object last: rows, how many of each category, unreadable answers.
S1 is the paper SimpleMix.
"""

import sys
from collections import Counter

import judge

from common import fail, read_jsonl

score = judge.score  # the stage that both vary

PROMPT = """Here are the kinds of requests that people make of an assistant:
{categories}

Here is a request:
[request]
{prompt}
[end of the request]

Of which kind is it? Reply with one number from the list, and nothing else."""
CATEGORIES = (  # WildChat's; some contain commas
    "linguistics",
    "factual information (general or professional), history or common practices",
    "recommendation",
    "tips, opinions or advice",
    "analysis or decision explanation",
    "mathematical reasoning or calculation",
    "logical reasoning",
    "coding",
    "assisting or creative writing",
    "roleplay",
    "editing or rewriting",
    "information extraction or summarization",
    "classification",
    "multilinguality or translation",
    "awareness of ethics and other risks",
    "other",
)
UNREADABLE = "no number of the list"


def parse_args(argv=None):
    parser = judge.make_parser(__doc__)
    args = parser.parse_args(argv)
    judge.check_args(parser, args)
    args.name = None  # its key is "category"
    return args


def read(choice):
    """(the category, None) of an answer such as "8" or "8."; (None, UNREADABLE) of another."""
    text = (choice.message.content or "").strip().rstrip(".")
    if text.isdecimal() and 1 <= int(text) <= len(CATEGORIES):
        return CATEGORIES[int(text) - 1], None
    return None, UNREADABLE


class Category(score.Scorer):
    kind = "category"
    sets_reward = False
    window = 32

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.models = []
        self.server = judge.Server(args)

    def ask(self, rows):
        """(category, None) of each prompt, or (None, why there is none)."""
        listed = "\n".join(f"{i}. {name}" for i, name in enumerate(CATEGORIES, 1))
        questions = []
        for row in rows:
            texts = {"categories": listed, "prompt": score.as_text(row["prompt"])}
            questions.append(judge.messages(PROMPT, texts))
        return list(self.server.ask(questions, read, lambda: None, max_tokens=4, temperature=0))

    def score(self, rows, update):
        self.server.check_budget(len(rows))
        answers = self.ask(rows)
        again = [k for k, (_, reason) in enumerate(answers) if reason == UNREADABLE]
        for k, answer in zip(again, self.ask([rows[k] for k in again]), strict=True):
            answers[k] = answer
        labels = [name for name, _ in answers]
        if len(rows) >= 8 and not any(labels):
            fail(f"{self.args.model}: none of {len(rows)} answers could be read: {answers[0][1]}")
        for row, name in zip(rows, labels, strict=True):
            row["category"] = name or "other"
            self.counts["unreadable"] += name is None
            update(len(row["responses"]))
        self.counts["requests"] = self.server.asked

    def summary(self):
        categories = Counter(row["category"] for _, row in read_jsonl(self.args.out, score.Row))
        return {"rows": categories.total(), "categories": dict(categories.most_common()), **self.counts}

    def check(self, counts):
        """Every prompt has a category."""


if __name__ == "__main__":
    try:
        score.main(parse_args(), Category)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
