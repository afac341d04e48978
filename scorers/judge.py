"""
AlpacaEval 2's judge: a chat model says which of two responses is better, with its log-probabilities.

Reads   --responses FILE ...  as score.py
Writes  --out FILE            as score.py, with "wins"[i][j] = p(m) / (p(m) + p(M)) in each row, where m names
                              response i and M response j, and as "reward" of i the mean of its wins

The server is any with OpenAI's chat completions: --base-url, else the environment's OPENAI_BASE_URL, else
OpenAI's own, with the key in OPENAI_API_KEY. One token is asked for, and m and M are looked for among its
five most likely ones. Which response is m is drawn per prompt as alpaca_eval draws it. Reasoning is left out;
equal answers tie, and no request is sent. --baseline NAME only asks for pairs with a response of that model;
over 1 % of prompts without such a pair, or of verdicts missing, is then an error. The prompt is our wording;
--judge-prompt reads another: alpaca_eval's evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt.

    python scorers/judge.py --model gpt-4-1106-preview --responses gpt4.jsonl on50.jsonl --out judged.jsonl \\
        --baseline gpt4_1106_preview --judge-prompt alpaca_eval_clf.txt --max-requests 5000

Resumes and prints as score.py does. Of what was paid for, a kill loses no more than a window of 32 rows.
"""

import hashlib
import math
import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import score  # noqa: E402
from chat import answer  # noqa: E402
from common import fail, read_jsonl  # noqa: E402

THREADS = 32  # requests under way at once
RETRIES = 5  # of a request, within 16 seconds, by the client
ROUNDS = 3  # of these for a server that says it is busy (429, 5xx)
OPENAI = "https://api.openai.com/v1"
RESUME = "run the same command again to resume after the last complete window"
PROMPT = """<|im_start|>system
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

Which answer would a careful human reader prefer: the one that is more helpful, correct and pleasant \
to read? Length alone is no merit.
Reply with the name of the better answer, m or M, and nothing else.
<|im_end|>"""


def make_parser(description):
    """The flags of scorers that ask a server."""
    parser = score.make_parser(description)
    flag = parser.add_argument
    flag("--model", required=True, help="the model's name at the server")
    flag("--base-url", metavar="URL", help="the server; its key from the environment's OPENAI_API_KEY")
    flag("--max-requests", type=score.positive, help="stop before a window that needs more in one run")
    return parser


def check_args(parser, args):
    args.base_url = args.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    if "@" in args.base_url:
        parser.error("--base-url must contain no password: a key comes from OPENAI_API_KEY")
    args.revision = None


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--name", help='key in "scores" (default judge)')
    parser.add_argument("--baseline", metavar="NAME", help='only pairs with a response of this "model"')
    parser.add_argument("--judge-prompt", metavar="FILE", help="with {instruction}, {output_1}, {output_2}")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


class Server:
    """Chat completions, many at once.

    A lost connection is tried again RETRIES times, a busy server ROUNDS times as often; other errors, and
    these at last, end the run.
    """

    def __init__(self, args):
        try:
            import openai
        except ImportError:
            fail("this scorer needs the package openai: pip install -c constraints.txt openai")
        key = os.environ.get("OPENAI_API_KEY")
        if args.base_url.startswith(OPENAI) and not key:
            fail(f"{args.base_url} needs a key in the environment variable OPENAI_API_KEY")
        self.args, self.key, self.openai, self.asked = args, key, openai, 0
        self.busy = (openai.RateLimitError, openai.InternalServerError)
        self.error = None  # the one that ends the run
        options = {"max_retries": RETRIES, "timeout": openai.Timeout(120, connect=5)}
        self.client = openai.OpenAI(base_url=args.base_url, api_key=key or "none", **options)

    def said(self, error):
        """What the server says, without the key."""
        return (error.message.replace(self.key, "...") if self.key else error.message)[:300]

    def complete(self, messages, options):
        create = self.client.chat.completions.create
        for _ in range(ROUNDS - 1):
            with suppress(*self.busy):
                return create(model=self.args.model, messages=messages, **options)
        return create(model=self.args.model, messages=messages, **options)

    def answer(self, messages, read, options):
        """What `read` makes of the first choice: (a value, None), or (None, why there is none)."""
        if self.error:
            raise self.error  # of another thread
        try:
            return read(self.complete(messages, options).choices[0])
        except self.openai.BadRequestError as error:  # too long, or refused for what it says
            return None, f"refused by the server: {self.said(error)}"
        except self.openai.APIError as error:
            self.error = error
            raise
        except (AttributeError, IndexError, TypeError, ValueError):
            return None, "an answer of another shape than a chat completion's"

    def check_budget(self, needed):
        """End the run before a window that needs more requests than --max-requests leaves."""
        limit = self.args.max_requests
        if limit and self.asked + needed > limit:
            sent = f"{self.asked} were sent, and the next window needs {needed}"
            sys.exit(f"--max-requests {limit}: {sent}; run the same command again to resume")

    def ask(self, questions, read, update, **options):
        """Yield what `answer` gives, in the order of the questions; update() after each."""
        self.asked += len(questions)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for answer in pool.map(lambda chat: self.answer(chat, read, options), questions):
                    update()
                    yield answer
        except self.openai.APIConnectionError as error:
            reason = f"no answer in {RETRIES + 1} tries ({error.__cause__ or error})"
            fail(f"{self.args.base_url}: {reason}; check the server, then {RESUME}")
        except self.openai.APIError as error:  # the key, the model's name, or a server that stays busy
            reason = f"{type(error).__name__}: {self.said(error)}"
            fail(f"{self.args.base_url}: {reason}; {RESUME}")


def messages(template, texts):
    """The chat of a prompt file, {names} filled in: <|im_start|>role ... <|im_end|> blocks or a user turn."""
    turns = re.findall(r"<\|im_start\|>(\w+)\s*(.*?)\s*<\|im_end\|>", template, re.DOTALL)
    names = re.compile("|".join(re.escape(f"{{{name}}}") for name in texts))
    chat = []
    for role, content in turns or [("user", template)]:
        # in one pass: braces in a text stay as they are
        chat.append({"role": role, "content": names.sub(lambda match: texts[match[0][1:-1]], content)})
    return chat


def preference(choice):
    """(p(m) / (p(m) + p(M)), None) from the five most likely first tokens, or (None, why not)."""
    content = choice.logprobs.content if choice.logprobs else None
    if not content:
        return None, "no log-probabilities in the server's answer"
    # vllm's list begins with the token that was sampled, whatever its rank
    best = sorted(content[0].top_logprobs, key=lambda top: -top.logprob)[:5]
    p = {"m": 0.0, "M": 0.0}
    for top in best:
        if top.token in p:
            p[top.token] += math.exp(top.logprob)
    if p["m"] + p["M"] == 0:
        return None, "neither m nor M among the five most likely first tokens"
    return p["m"] / (p["m"] + p["M"]), None


class Judge(score.Scorer):
    kind = "judge"
    window = 32

    def __init__(self, args, rows):
        super().__init__(args, rows)
        self.models = []
        self.template = PROMPT
        if args.judge_prompt:
            self.read_template(args.judge_prompt)
        if args.baseline:
            self.labeler += f":{args.baseline}"
            self.check_baseline(rows)
        self.server = Server(args)

    def read_template(self, path):
        try:
            self.template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            fail(f"--judge-prompt {path} cannot be read: {error}")
        for name in ("{instruction}", "{output_1}", "{output_2}"):
            if name not in self.template:
                fail(f"{path}: expected {{instruction}}, {{output_1}} and {{output_2}}, found no {name}")
        self.files = [path]
        digest = hashlib.sha256(self.template.encode()).hexdigest()[:8]
        self.labeler += f":{Path(path).name}@{digest}"

    def check_baseline(self, rows):
        name, files = self.args.baseline, ", ".join(self.args.responses)
        models = {str(one.get("model")) for row in rows.values() for one in row["responses"]}
        if name not in models:
            names = ", ".join(sorted(models))
            fail(f"{files}: no response is of the model {name!r}; there are {names}")
        without = 0
        for row in rows.values():
            sides = {response.get("model") == name for response in row["responses"]}
            without += len(sides) < 2
        if without > 0.01 * len(rows):
            reason = f"{without} of {len(rows)} prompts have no response of {name} or none to compare with it"
            fail(f"{files}: {reason}, over 1 %")

    def pairs(self, row):
        """(i, j), i < j, of the responses that are compared."""
        of_baseline = [response.get("model") == self.args.baseline for response in row["responses"]]
        for i, j in combinations(range(len(of_baseline)), 2):
            if not self.args.baseline or of_baseline[i] != of_baseline[j]:
                yield i, j

    def question(self, row, i, j):
        """(messages, whether response j is m)."""
        instruction = score.as_text(row["prompt"])
        # alpaca_eval's draw. Before it, output_1 is the baseline's
        swapped = random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]
        if self.args.baseline and row["responses"][j].get("model") == self.args.baseline:
            swapped = not swapped
        first, second = answer(row["responses"][i]), answer(row["responses"][j])
        if swapped:
            first, second = second, first
        texts = {"instruction": instruction, "output_1": first, "output_2": second}
        return messages(self.template, texts), swapped

    def score(self, rows, update):
        wins = [[[None] * len(row["responses"]) for _ in row["responses"]] for row in rows]
        reasons = [["nothing to compare with"] * len(row["responses"]) for row in rows]
        pairs, questions, swaps = [], [], []
        for k, row in enumerate(rows):
            for i, j in self.pairs(row):
                if answer(row["responses"][i]) == answer(row["responses"][j]):
                    wins[k][i][j] = wins[k][j][i] = 0.5
                    continue
                question, swapped = self.question(row, i, j)
                pairs.append((k, i, j))
                questions.append(question)
                swaps.append(swapped)
        self.server.check_budget(len(questions))
        n_responses = sum(len(row["responses"]) for row in rows)
        share = n_responses / max(1, len(questions))  # the bar counts responses
        options = {"max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": 6}
        answers = self.server.ask(questions, preference, lambda: update(share), **options)
        failures = []
        for (k, i, j), swapped, (p, reason) in zip(pairs, swaps, answers, strict=True):
            if p is None:
                reasons[k][i] = reasons[k][j] = reason
                failures.append(reason)
                continue
            wins[k][i][j], wins[k][j][i] = (1 - p, p) if swapped else (p, 1 - p)
        if len(failures) == len(questions) >= 8:
            fail(f"{self.args.model}: none of {len(failures)} answers could be read: {failures[0]}")
        for row, matrix, errors in zip(rows, wins, reasons, strict=True):
            self.set_wins(row, matrix, matrix, errors)
        self.counts["requests"] = self.server.asked

    def check(self, counts):
        super().check(counts)
        if not self.args.baseline:
            return
        judged = without = 0
        for _, row in read_jsonl(self.args.out, score.Row):
            for response in row["responses"]:
                if response.get("model") != self.args.baseline:
                    judged += 1
                    without += response["reward"] is None
        if without > 0.01 * judged:
            reason = f"{without} of {judged} responses have no verdict, over 1 %: {dict(counts['without'])}"
            fail(f"{self.args.out}: {reason}")


if __name__ == "__main__":
    try:
        score.main(parse_args(), Judge)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
