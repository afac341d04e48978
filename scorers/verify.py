r"""
Verified answers: 1 for every response with the right final answer, else 0 (GSM8K, MATH, multiple choice).

Reads   --responses FILE ...  as score.py; a row's "answer" is a solution with \boxed{} or ####, or an answer
Writes  --out FILE            as score.py, and resumes and prints as it does

The answer of a response, after any reasoning, is the first of these that it has:
  1. the last \boxed{...}; "\boxed{3} or \boxed{5}" are two
  2. where the reference is a letter: the last "answer is B", else the last (B), **B** or "B) Paris"
  3. where it is a number: the number after ####, $, * and blanks aside, if it is no heading ("#### 1. Add");
     else that of the last "answer is ..." unless it is taken back ("wait"); else the last number of the text
  4. the last "answer is ...", else the last formula, else the last line
It is right if it has the reference's value, exactly: 1,000 = 10^3, 1/2 = 0.5, 2x+3 = 3+2x; not 1/3 = 0.333.
Units, currency and "x =" may be missing; 50% is 50 or 0.5, 2 million is 2 or 2000000; a list has no order.

    python scorers/verify.py --responses out/on.jsonl --out out/verified.jsonl
"""

import ast
import cmath
import operator
import re
import sys
import zlib
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import score  # noqa: E402
from chat import answer  # noqa: E402


def parse_args(argv=None):
    parser = score.make_parser(__doc__)
    parser.add_argument("--name", help='key in "scores" (default verify)')
    parser.set_defaults(model=None, revision=None)  # there is none
    return parser.parse_args(argv)


# ----- one way of writing
SIGNS = str.maketrans("\u2212×·÷€£\u00a0’", "-**/$$ '") | str.maketrans({"√": r"\sqrt "})
SIGNS |= str.maketrans({"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "²": "^2", "³": "^3", "°": "", "\u202f": ""})
COMMANDS = dict(zip("alpha beta gamma theta lambda mu pi sigma phi omega".split(), "αβγθλμπσφω", strict=True))
COMMANDS |= dict(zip("cdot times div infty cup lt gt le leq ge geq".split(), "**/∞∪<>≤≤≥≥", strict=True))
COMMANDS |= dict.fromkeys("left right big Big bigl bigr displaystyle quad boxed fbox degree".split(), "")
LATEX = [
    (r"(?:\\\\\s*)?\\(begin|end)\{[pbB]matrix\}", lambda side: "[" if side[1] == "begin" else "]"),
    (r"&|\\\\(?=[^()\[\]])", ","),  # a column or a row
    (r"\\[!,;:]|\\(?=[$%#& ])", ""),
    (r"\\[()\[\]]", "$"),
    (r"\^\s*\{?\s*\\circ\s*\}?", ""),
    (r"\\(?:text[a-z]*|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:[dtc](?=frac))?([A-Za-z]+?)(?:slant)?(?![A-Za-z])", lambda m: COMMANDS.get(m[1], "\\" + m[1])),
    (r"\\(frac|sqrt)\s*(\w)", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\})\s*(\w)", r"\1{\2}"),
]
THOUSANDS = re.compile(r"(?<=\d)[, ](?=(?:\d\d,)?\d{3}(?![\d/]))")


def plain(text):
    """A text with one way of writing signs and LaTeX, without Markdown's bold (2**3 is a power)."""
    text = re.sub(r"\*\*(?!\d)|(?<!\d)\*\*|`|(?<=[ \t])[ \t]+|(?<=\n)\n+", "", text.translate(SIGNS))
    text = re.sub(r",\\!\s*|\{,\}", ",", text)
    for pattern, new in LATEX if "\\" in text else []:
        text = re.sub(pattern, new, text)
    return text


def normalise(text):
    """An answer that has commas between the items of a list, and neither $ nor a full stop."""
    text = plain(" ".join(text.split())).replace("$", " ").replace("<=", "≤").replace(">=", "≥")
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    text = re.sub(r"\s*(?:,?\s+(?:and|or)\s+|;)\s*", ", ", text)
    text = re.sub(r"^[^,=]*\\in(?![A-Za-z])|^\s*(?:\\approx|~)", "", text)
    text = re.sub(r"^\s*\\?\{(.*?)\\?\}\s*$", r"\1", text)  # a set is a list
    if text.count(r"\pm") == 1:
        text = text.replace(r"\pm", "+") + "," + text.replace(r"\pm", "-")
    return text.strip().rstrip(".,: ")


# ----- values
SCALES = {"%": Fraction(1, 100), "percent": Fraction(1, 100), "dozen": 12, "hundred": 100, "thousand": 1000}
SCALES |= {"million": 10**6, "billion": 10**9, "trillion": 10**12}
UNIT = re.compile(
    rf"(?:[\s/^{{]*(?<![\\A-Za-z])({'|'.join(SCALES)}|[ckm]m|[ckm]g|m[il]|ft|in|lb|nd|of|oz|rd|st|th)"
    r"|(?:[\s/]+|(?<=[\d)}])(?=[A-Za-z]{4}))(?!sin|cos|tan|log|exp)[A-Za-z]{3,}|(?:\s|(?<=[a-z])/)[mgLlsh]|\s(?:[a-z][A-Z]|[A-Z][a-z]|[KMGT]B))"
    r"\.?(?:\s*\^\s*\{?[23]\}?)?[\s/}]*$"
)
BEFORE = re.compile(r"(?i)^(?:\([a-z]\) +(?=[-\d\\])|(?!min|n[eo]|half|sin|cos|tan|log|ln)[a-z]{2,}[ :,]+)+")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATIONS |= {ast.UAdd: operator.pos, ast.USub: operator.neg}


def measure(text):
    """(a number without unit and words before it, factor): "about 2 million dollars" is ("2", 1000000)."""
    number, factor = text, 1
    while len(text) <= 300 and (unit := UNIT.search(number)):
        factor *= SCALES.get(unit[1], 1)
        number = number[: unit.start()]
    number = BEFORE.sub("", number)
    is_number = re.search(r"\d", number) and not re.search(r"(?<![\\A-Za-z])[A-Za-z]", number)
    return (number, factor) if is_number else (text, 1)


def power(base, exponent):
    if isinstance(base, Fraction) and len(str(base)) * abs(exponent) > 3000:
        raise OverflowError("too large to compare")
    return base**exponent


def compute(node):
    """The value of a formula's tree, in which a variable is a negative number that its name gives."""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if isinstance(node, ast.Name):
        return Fraction(-1 - zlib.crc32(node.id.encode()), 2**31)
    numbers = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    return (OPERATIONS | {ast.Pow: power})[type(node.op)](*map(compute, numbers))


def value(text):
    """The value of a formula, a fraction or else a complex number; None for what has words or other signs."""
    text = re.sub(r"(?<![\d.])(\d+)\s*(\\frac\{\d+\}\{\d+\}|(?<=\s)\d+\s*/\s*\d+)", r"(\1+\2)", text)
    for _ in range(text.count("{") if len(text) <= 300 else 0):  # from the inside
        text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\s*\[(\d)\]\s*\{([^{}]*)\}", r"((\2)**(1/\1))", text)
        text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"((\1)**(1/2))", text)
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"**(\1)", text)
    text = text.replace("^", "**").translate(str.maketrans("{}[]", "()()"))
    if re.search(r"[^\w\s.()+*/-]|[A-Za-z]{3}|^[A-Za-z]{2}$|[A-Za-z]{2}\s+\w|ln|lg|\d\s+\d|\d_|.{300}", text):
        return None
    text = re.sub(r"(?<=[^\W_])(?=[^\W\d_]|\()|(?<=\))(?=[^\W_]|\()", "*", re.sub(r"\s", "", text))
    try:
        number = compute(ast.parse(text, mode="eval").body)
        return number if abs(number) < 10**200 else None
    except (ArithmeticError, AttributeError, KeyError, RecursionError, SyntaxError, ValueError):
        return None


def split(text, separator):
    """The parts of a text between separators outside of brackets; any kind closes any other: [0, 1)."""
    depths = accumulate((character in "([{") - (character in ")]}") for character in text)
    cuts = [i for i, depth in enumerate(depths) if depth == 0 and text[i] == separator]
    return [text[start + 1 : end].strip() for start, end in pairwise([-1, *cuts, len(text)])]


def same_value(given, expected):
    """Whether two formulas have one value, with or without their factors; six decimals may be rounded."""
    if "_" not in given:
        expected = re.sub(r"^(\d+)_\{?\d+\}?$", r"\1", expected)  # the question names the base
    (given, factor), (expected, other) = measure(given), measure(expected)
    left, right = value(given), value(expected)
    if left is None or right is None:
        return False
    places = re.fullmatch(r"-?\d*\.(\d{6,})", given)
    rounded = Fraction(1, 2 * 10 ** len(places[1])) if places else 0
    pairs = [(left, right)] * (factor == other or 1 in (factor, other))
    if min(factor, other) == 1 or left * factor != round(abs(left * factor)):  # 12 is not 1200%
        pairs.append((left * factor, right * other))
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return any(abs(a - b) <= rounded for a, b in pairs)
    return any(cmath.isclose(a, b, rel_tol=1e-9, abs_tol=rounded or 1e-12) for a, b in pairs)


def same(given, expected):
    """Whether two normalised answers are equal."""
    left, right = (re.sub(r"\{(\w)\}|\s|^\s*\+", r"\1", text).lower() for text in (given, expected))
    if left == right:
        return True
    for separator in ",∪":
        items, others = split(given, separator), split(expected, separator)
        if len(items) != len(others) or len(items) > 20:
            return False
        if len(items) > 1:
            return all(sum(same(a, b) for b in others) == sum(same(a, b) for b in items) for a in items)
    if "=" in given + expected:
        sides, others = given.split("="), expected.split("=")
        if len(sides) == 1 and re.search(r"[-+*/^]|^\s*\d", others[0]):
            return False
        if 1 in (len(sides), len(others)) or same(sides[0], others[0]):
            return same(sides[-1], others[-1])
        left, right = (f"({ends[0]})-({ends[-1]})" for ends in (sides, others))
        return same_value(left, right) or same_value(left, f"-({right})")
    left, right = (re.fullmatch(r"([(\[])(.*,.*)([)\]])", text.strip()) for text in (given, expected))
    if left and right and left[1] + left[3] == right[1] + right[3]:
        items, others = split(left[2], ","), split(right[2], ",")
        return len(items) == len(others) and all(map(same, items, others))
    return same_value(given.strip(), expected.strip())


def equal(given, expected):
    """Whether two answers are equal; a comma between digits is one of thousands or one of a list."""
    given, expected = normalise(given), normalise(expected)
    return same(given, expected) or same(THOUSANDS.sub("", given), THOUSANDS.sub("", expected))


# ----- the answer of a text
NUMBER = (  # but not the 2 of m^2 and H2O, nor #1
    r"(?:\d+(?::\d+)+"  # 3:30
    r"|(?:(?<![\w)}\]])-\s?(?=[$\d.\\])|(?<=\$)-)?\$?"  # -5, -$5, $-5, but 10-5 ends with 5
    r"(?:(?:\d+\s*)?\\frac\{-?[\d.]+\}\{[\d.]+\}|\d+\s\d+/\d+|\d+(?:,\d+)*(?:\.\d+)?(?:/\d+)?|\.\d+)"
    rf"(?:\s*\^\s*\{{?-?\d+\}}?|\s*%|\s+(?:{'|'.join(SCALES)})\b)?)"
)
NUMBERS = re.compile(rf"[\^_]\s*\{{?\s*-?\d+|#\d+|(?<![\\A-Za-z])[A-Za-z]+\d\w*|({NUMBER})")
HEADED = re.compile(r"####[ \t$*]*(?!\d+[.):][ \t]+\S[\s\S]*\d)(" + NUMBER + ")")
STATED = re.compile(r"\banswer(?:\s+is\b|\s*[:=>]|[ \t]*\n)[\s:]*([^\n]+)", re.IGNORECASE)
TAKEN_BACK = re.compile(r"(?i)\b(?:wait|mistake|actually|sorry|correction|that(?:'s| is) wrong)\b")
BESIDE = re.compile(r"[\s$]*(?:[,;]|,?\s*(?:and|or)\b)[\s$]*(?:\w+\s*=)?[\s$]*")
CHOICE = r"\(L\)|\b(?:option|choice)(?: is)? L\b|\bL is (?:the )?correct|^\W*L(?=[).:]|\W*$)"
CHOICE = re.compile(CHOICE.replace("L", "([A-HJ])"), re.MULTILINE)


def boxed(text):
    r"""What is in the last \boxed{} that is not empty, and in those listed with it; "" if there is none."""
    opened, contents, end = [], [], 0
    for brace in re.finditer(r"(\\f?boxed\s*|\\fbox\s*)?(?<!\\)[{}]", text):
        if brace[0] != "}":
            opened.append(brace)
        elif opened and (start := opened.pop())[1] and text[start.end() : brace.start()].strip():
            content = text[start.end() : brace.start()]
            contents = contents if BESIDE.fullmatch(plain(text[end : start.start()])) else []
            contents += [] if any(equal(content, other) for other in contents) else [content]
            end = brace.end()
    return ", ".join(contents)


def numbers(text):
    return [number for number in NUMBERS.findall(text) if number]


def stated(text):
    """What the last "answer is", "answer:" or heading "Answer" says; "" if it is taken back."""
    clauses = [clause for clause in STATED.finditer(text) if re.search(r"\w", clause[1])]
    if not clauses or TAKEN_BACK.search(text, clauses[-1].start(1)):
        return ""
    return re.split(r"[.!?](?=\s|$)|</|\bbecause\b|\bsince\b", clauses[-1][1])[0].strip()


def stated_number(text):
    """The number in "answer is ...", or None if that has none or one among others."""
    clause = stated(text).split(" (")[0].rpartition("=")[2].strip(" $")
    if value(measure(clause)[0]) is not None:
        return clause
    first, *more = numbers(clause) or [None]
    begins = more and re.match(re.escape(first.lstrip("$")) + r"(?!\s*(?:[-+*/^]|or\b|to\b))", clause)
    return first if begins or not more else None


def choice(text):
    """The letter that a text chooses, or None."""
    text = plain(re.sub(r"\*\*\s*\(?([A-HJ])\)?[.:]?\s*\*\*", r"(\1)", text))
    letters = re.findall(r"^\W*(?:(?:option|choice)\s+)?(A(?=\W*$|[).:,])|[B-HJ](?![\w']))", stated(text))
    letters = letters or ["".join(groups) for groups in CHOICE.findall(text)]
    return (letters or re.findall(r"\b[B-HJ]\b(?!')", text) or [None])[-1]


def final_answer(text, kind):
    """The answer of a response where the reference is of this kind, or None."""
    content = boxed(text)
    if content or kind == "letter":
        return choice(content or text) if kind == "letter" else content
    text = plain(text)
    if kind == "number":
        last = next((found for line in reversed(text.split("\n")) if (found := numbers(line))), None)
        last = last or re.findall(r"-?\d+", text) or [None]  # "x1" and the like, if there is no number
        return (HEADED.findall(text) or [stated_number(text) or last[-1]])[-1]
    clause = stated(text)
    formulas = re.findall(r"\$([^$]+)\$", clause or text)
    return formulas[-1] if formulas else clause or re.split(r"\n|####", text.strip())[-1]


def reference(text):
    r"""(answer of a reference: in \boxed{}, after #### or all of it; "letter", "number" or "other")."""
    expected = boxed(text) or re.sub(r"(?s).*####\s*([^\n]+).*", r"\1", text).strip()
    if letter := re.fullmatch(r"\W*([A-HJ])\W*", plain(expected)):
        return letter[1], "letter"
    number, _ = measure(THOUSANDS.sub("", normalise(expected)))
    is_number = value(number) is not None and not re.search(r"[^\W\d_]", number.replace(r"\frac", ""))
    return expected, "number" if is_number else "other"


class Verify(score.Scorer):
    kind = "verify"

    def score(self, rows, update):
        for row in rows:
            expected, kind = reference(str(row.get("answer")))
            for response in row["responses"]:
                given = final_answer(answer(response), kind)
                missing = "the prompt has no answer" if row.get("answer") is None else None
                self.set_reward(response, None if missing else float(equal(given or "", expected)), missing)
            update(len(row["responses"]))


if __name__ == "__main__":
    try:
        score.main(parse_args(), Verify)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
