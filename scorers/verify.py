"""
Verified answers: 1 for every response with the right final answer, else 0 (GSM8K, MATH).

Reads   --responses FILE ...  as score.py; a row's "answer" is the reference
Writes  --out FILE            as score.py

The answer is the last \\boxed{} after any reasoning, or else what follows the last ####, or else the last
number. So is that of a reference with \\boxed{} or ####; any other reference is an answer as it stands.

    python scorers/verify.py --responses out/on.jsonl --out out/verified.jsonl

Resumes and prints as score.py does.
"""

import re
import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import score  # noqa: E402
from chat import answer  # noqa: E402


def parse_args(argv=None):
    parser = score.make_parser(__doc__)
    parser.add_argument("--name", help='key in "scores" (default verify)')
    args = parser.parse_args(argv)
    args.model = args.revision = None  # there is none
    return args


def final_answer(text):
    """The answer of a solution: the last \\boxed{...}, else what follows ####, else the last number."""
    _, boxed, rest = text.rpartition("\\boxed{")
    depth = 1
    for end, character in enumerate(rest if boxed else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:end]
    if "####" in text:
        return text.rpartition("####")[2]
    numbers = re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)
    return numbers[-1] if numbers else None


def plain(text):
    """A number as a fraction (1,000 = 1000.0, 1/2 = 0.5), other text without spaces, case and currency."""
    text = re.sub(r"[\s,$%]|\\[!,;]|\.$", "", text).lower()
    number = re.fullmatch(r"(-?\d+(?:\.\d*)?|-?\.\d+)(?:/(\d+(?:\.\d+)?))?", text)
    if not number or (number[2] and not float(number[2])):
        return text
    return Fraction(number[1]) / Fraction(number[2] or 1)


class Verify(score.Scorer):
    kind = "verify"

    def score(self, rows, update):
        for row in rows:
            expected = row.get("answer")
            if expected is not None:
                expected = str(expected)
                if "\\boxed{" in expected or "####" in expected:
                    expected = final_answer(expected)
            for response in row["responses"]:
                given = final_answer(answer(response))
                if expected is None:
                    self.set_reward(response, None, "the prompt has no answer")
                else:
                    right = given is not None and plain(given) == plain(expected)
                    self.set_reward(response, float(right))
            update(len(row["responses"]))


if __name__ == "__main__":
    try:
        score.main(parse_args(), Verify)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
