r"""
scorers/verify.py: the right and wrong answers of verify_answers.py and of GSM8K, through the command line.

Covers  the table of our own answers; 100 rows of GSM8K, where ../shared/data has them, in 32 forms, right and
        wrong; lm-eval's flexible extraction and math-verify, where they are installed, as second
        implementations; references; formulas against Python's arithmetic; texts that would take long.
Run     python -m pytest tests/test_verify.py
"""

import gzip
import json
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import REPO, read_rows, run_script, write_rows
from verify_answers import ANSWERS

from scorers import verify

GSM8K = REPO.parent / "shared" / "data" / "benchmarks" / "gsm8k_test_100.jsonl.gz"
shared = pytest.mark.skipif(not GSM8K.exists(), reason="no shared data")
CASES = [
    (reference, text, float(right))
    for reference, rights, wrongs in ANSWERS
    for right, texts in ((1, rights), (0, wrongs))
    for text in texts
]


def verdicts(folder, cases):
    """The rewards that scorers/verify.py writes for (reference, text, ...)."""
    rows = [
        {
            "id": str(index),
            "prompt": "q",
            "answer": reference,
            "responses": [{"text": text, "source": "on"}],
        }
        for index, (reference, text, *_) in enumerate(cases)
    ]
    out = folder / "verified.jsonl"
    run_script("scorers/verify.py", "--responses", write_rows(folder / "r.jsonl", rows), "--out", out)
    return [row["responses"][0]["reward"] for row in read_rows(out)]


def is_right(reference, text):
    expected, kind = verify.reference(reference)
    given = verify.final_answer(text, kind)
    return given is not None and verify.equal(given, expected)


# ----- our own answers
def test_our_own_answers(tmp_path):
    assert sum(right for *_, right in CASES) >= 250 and len(CASES) >= 500
    assert len(set(CASES)) == len(CASES)
    found = verdicts(tmp_path, CASES)
    assert [case for case, verdict in zip(CASES, found) if verdict != case[2]] == []


# ----- GSM8K
FORMS = [
    "{steps}\n#### {n}",
    "{steps}\n#### ${n}",
    "{steps}\n#### **{n}**",
    "{steps}\n#### {n} dollars",
    "{steps}\n#### {n}\n\nLet me know if you have 12 more questions!",
    "{steps} #### {n}.",
    "#### Step 1: read\n{steps}\n\n#### Step 2: answer\nIt is {n}.",
    "#### 1. Read\n{steps}\n#### 2. Answer\nIt is {n}.",
    "### Step 1\n{steps}\n### Step 2\n**{n}**",
    "{steps}\nThe answer is {n}.",
    "{steps}\nThe answer is {n}",
    "{steps}\nThe answer is ${n}.",
    "{steps}\nThe answer is {n} dollars.",
    "{steps}\nThe answer is **{n}**. I checked it 3 times.",
    "{steps}\n**Answer:** {n}",
    "{steps}\n**Answer: {n} eggs**",
    "{steps}\n**Final Answer**\n\n{n}",
    "{steps}\nFinal Answer: The final answer is ${n}$. I hope it is correct.",
    "{steps}\n<answer>{n}</answer>",
    "{steps}\nThe final answer is $\\boxed{{{n}}}$.",
    "{steps}\n\\[\n\\boxed{{{n}}}\n\\]",
    "{steps}\n$$\\boxed{{\\${n}}}$$",
    "{steps}\n\\boxed{{{n}\\text{{ eggs}}}}",
    "{steps}\n\\boxed{{{n} \\text{{ eggs per day}}}} for 7 days",
    "{steps}\n\\boxed{{\\text{{{n}}}}}",
    "{steps}\n\\boxed{{x = {n}}}",
    "{steps}\n\\boxed{{{n}.00}}",
    "{steps}\n\\(\\boxed{{\\frac{{{n}}}{{1}}}}\\)",
    "{steps}\nSo there are {n} eggs.",
    "{steps}\nSo there are {n}.00 m^2.",
    "{steps}\n= {n} eggs/day",
    "{n}",
]


def without_answer(solution):
    """The steps of GSM8K's solution, without its calculator's marks and without ####."""
    return re.sub(r"<<.*?>>", "", solution.split("\n####")[0])


@shared
def test_gsm8k(tmp_path):
    """Every form with the right number is right, and with any other number is wrong."""
    rows = [json.loads(line) for line in gzip.open(GSM8K, "rt")]
    assert len(rows) == 100
    cases, choose = [], random.Random(0)
    for row in rows:
        answer = row["answer"].split("#### ")[1].replace(",", "")
        number, steps = int(answer), without_answer(row["answer"])
        wrong = number + choose.choice([-100, -10, -2, -1, 1, 2, 9, 10, 1000])
        cases.append((row["answer"], row["answer"], 1))
        cases.append((answer, row["answer"], 1))
        for form in FORMS:
            cases.append((row["answer"], form.format(n=number, steps=steps), 1))
            cases.append((row["answer"], form.format(n=f"{number:,}", steps=steps), 1))
            cases.append((answer, form.format(n=wrong, steps=steps), 0))
    assert len(cases) == 9800
    found = verdicts(tmp_path, cases)
    assert [case for case, verdict in zip(cases, found) if verdict != case[2]] == []


# ----- second implementations
def flexible_extraction():
    """lm-eval's way for GSM8K as a function of a reference and a text: whether they are equal."""
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    yaml = pytest.importorskip("yaml")
    task = Path(extraction.__file__).parents[1] / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(task.read_text())
    settings = next(each for each in task["filter_list"] if each["name"] == "flexible-extract")["filter"][0]
    settings = {key: value for key, value in settings.items() if key != "function"}
    ignored = "|".join(
        f"(?:{pattern.removeprefix('(?s)')})" for pattern in task["metric_list"][0]["regexes_to_ignore"]
    )

    def clean(text):
        return re.sub(ignored, "", text, flags=re.DOTALL)

    regex = extraction.RegexFilter(**settings)
    return lambda reference, text: clean(regex.apply([[text]], [{}])[0][0]) == clean(reference)


def math_verify():
    module = pytest.importorskip("math_verify")

    def accepts(reference, text):
        reference = reference if "boxed" in reference else f"${reference.split('#### ')[-1]}$"
        return module.verify(module.parse(reference), module.parse(text))

    return accepts


@pytest.mark.parametrize(
    "implementation, least, mistakes", [(flexible_extraction, 75, 10), (math_verify, 200, 8)]
)
def test_second_implementations(implementation, least, mistakes):
    """What they accept of the right answers is accepted; they are wrong where the table says so."""
    accepts = implementation()
    theirs = [accepts(reference, text) for reference, text, _ in CASES]
    ours = [is_right(reference, text) for reference, text, _ in CASES]
    lost = [case for case, a, b in zip(CASES, theirs, ours) if case[2] and a and not b]
    assert lost == []
    assert sum(a and right for (*_, right), a in zip(CASES, theirs)) >= least  # the comparison is of many
    taken = [case for case, a in zip(CASES, theirs) if a and not case[2]]
    assert len(taken) >= mistakes and not any(is_right(reference, text) for reference, text, _ in taken)


# ----- parts
@pytest.mark.parametrize(
    "reference, expected",
    [
        ("9 + 9 = 18\n#### 18", ("18", "number")),
        ("x = 18\n#### 18\nThe answer is: 18", ("18", "number")),
        ("so \\boxed{\\frac{1}{2}} QED 3", ("\\frac{1}{2}", "number")),
        ("1,000", ("1,000", "number")),
        ("$18", ("$18", "number")),
        ("50\\%", ("50\\%", "number")),
        ("3 \\text{ cm}", ("3 \\text{ cm}", "number")),
        ("2x", ("2x", "other")),
        ("\\sqrt{2}", ("\\sqrt{2}", "other")),
        ("Paris", ("Paris", "other")),
        ("B", ("B", "letter")),
        ("\\text{(C)}", ("C", "letter")),
        ("x", ("x", "other")),
    ],
)
def test_references(reference, expected):
    assert verify.reference(reference) == expected


def test_boxes():
    assert verify.boxed("\\boxed{1} then \\boxed{2^{3}}, \\boxed{} and \\boxed{4") == "2^{3}"
    assert verify.boxed("\\boxed{1}, \\boxed{2} and $\\boxed{3}$") == "1, 2, 3"
    assert verify.boxed("none") == ""


def test_formulas_have_the_values_that_python_gives():
    """Random formulas of numbers, written in LaTeX, against fractions computed while writing them."""
    choose = random.Random(0)

    def formula(depth):
        if depth == 0:
            number = choose.randint(1, 9)
            return str(number), Fraction(number)
        (left, a), (right, b) = formula(depth - 1), formula(depth - 1)
        kind = choose.randrange(6)
        if kind == 0 and b:
            return f"\\frac{{{left}}}{{{right}}}", a / b
        if kind == 1:
            return f"({left}) \\cdot ({right})", a * b
        if kind == 2:
            return f"({left})({right})", a * b
        if kind == 3:
            return f"\\left({left}\\right) - \\left({right}\\right)", a - b
        if kind == 4:
            return f"({left})^{{2}}", a**2
        return f"({left}) + ({right})", a + b

    for _ in range(300):
        text, number = formula(choose.randint(0, 2))
        assert verify.value(verify.plain(text)) == number, text
        assert verify.equal(text, f"{number.numerator}/{number.denominator}")
        assert not verify.equal(text, f"{number.numerator + 1}/{number.denominator}")


@pytest.mark.parametrize(
    "text", ["9^{9^{9^9}}", "1/0", "0^{-1}", "(" * 150, "1" * 5000, "12_8", "2 3", "'5'", "5#6", ""]
)
def test_what_has_no_value(text):
    assert verify.value(text) is None


LONG = {
    "braces": "{" * 20000,
    "boxes": "\\boxed{" * 5000,
    "nested": "\\boxed{" * 1000 + "1" + "}" * 1000,
    "headings": "#### 1. a\n" * 2000,
    "words": "dollars " * 8000,
    "words in a box": "\\boxed{1 " + "dollars " * 8000 + "}",
    "blanks in a box": "\\boxed{1" + " " * 20000 + "x}",
    "a list": "\\boxed{" + "1," * 5000 + "}",
    "brackets": "\\boxed{" + "(" * 5000 + ")" * 5000 + "}",
    "answers": "answer is " * 5000,
    "digits": "1" * 20000,
    "signs": "-" * 20000,
}


@pytest.mark.parametrize("name", LONG)
def test_degenerate_responses_take_no_time(name):
    started = time.time()
    for reference in ("18", "B", "\\sqrt{2}", "1, 2"):
        assert not is_right(reference, LONG[name])
    assert time.time() - started < 10
