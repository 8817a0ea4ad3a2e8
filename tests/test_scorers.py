"""Scorers: right on what people write, and safe from whatever a model writes."""

import random
import time
from fractions import Fraction

import pytest

from vgkern.tasks.scorers import last_number, number, scorer, value

NUMBERS = {
    "42": 42,
    " -7 ": -7,
    "The answer is 1,234.5.": Fraction(2469, 2),
    "+3": 3,
    "50%": Fraction(1, 2),
    "50 %": Fraction(1, 2),
    "1e3": 1000,
    "2.5E-1": Fraction(1, 4),
    "3/4": Fraction(3, 4),
    "-3 / 4": Fraction(-3, 4),
    "so 12 apples and 5 pears": 5,
    r"\boxed{17} of 20": 17,
    "6 * 7\n#### 42\n": 42,
    r"first \boxed{1}, then \boxed{2}.": 2,
    ".5": Fraction(1, 2),
    "5.": 5,
    "$12": 12,
    "x=3m": 3,
    "12,34": 34,
    "1/0": None,
    "": None,
    "none": None,
    "1e9999": None,
    "9" * 65: None,
    "7" + "0" * 63: 7 * 10**63,
    "1e301": None,
    "\u0664\u0662": None,
    "1\u00b2": None,
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda t: repr(t)[:30])
def test_the_last_number_of_a_text(text):
    want = NUMBERS[text]
    assert last_number(text) == want
    assert number(text, "42") == float(want == 42)


VALUES = {
    "1+2*3": 7,
    "(1+2)*3": 9,
    "-2*-3": 6,
    "2--3": 5,
    "8/4/2": 1,
    "1/3+1/6": Fraction(1, 2),
    "2-3-4": -5,
    "-(2+3)": -5,
    "((((7))))": 7,
    "3.5*2": 7,
    "6*7 = 42": 42,
    "1 - -1": 2,
    "-2+3": 1,
    "2*-(1+1)": -4,
    "+5": 5,
    "": None,
    "1/0": None,
    "1/(2-2)": None,
    "2 3": None,
    "(1": None,
    "1)": None,
    "()": None,
    "2*": None,
    "*2": None,
    "2**3": None,
    "a": None,
    "1,2": None,
    "2(3)": None,
    "__import__('os')": None,
    "1" * 65: None,
    "9" * 64 + "*" + "9" * 64: (10**64 - 1) ** 2,
}


@pytest.mark.parametrize("text", VALUES, ids=lambda t: repr(t)[:30])
def test_the_value_of_an_expression(text):
    assert value(text) == VALUES[text]


def test_random_expressions_have_the_value_python_gives_them():
    rng = random.Random(0)

    def made(depth):
        if depth == 0 or rng.random() < 0.3:
            return f"{rng.randint(0, 9)}"
        if rng.random() < 0.2:
            return f"(-{made(depth - 1)})"
        return f"({made(depth - 1)}{rng.choice('+-*')}{made(depth - 1)})"

    for _ in range(300):
        text = made(4)
        if len(text) <= 256:
            assert value(text) == eval(text), text
    for _ in range(300):  # without parentheses: what binds first
        text = "".join(f"{rng.randint(0, 9)}{rng.choice('+-*')}" for _ in range(8)) + "1"
        assert value(text) == eval(text), text


def test_several_scorers_have_weights_and_names():
    grade = scorer({"number": 0.8, "contains": 0.2, r"regex:<answer>(\d+)</answer>": 1.0})
    assert grade("<answer>42</answer>", "42") == {
        "number": 0.8,
        "contains": 0.2,
        r"regex:<answer>(\d+)</answer>": 1.0,
    }
    assert sum(grade("42.0", "42").values()) == 1.0
    assert scorer("exact")(" 42\n", "42") == 1.0 and scorer("exact")("42 ok", "42") == 0.0
    assert scorer("arithmetic")("I think\n(1+2)*14", "42") == 1.0
    assert scorer("regex:^yes")("yes", "") == 1.0 and scorer("regex:^yes")("no", "") == 0.0
    assert scorer(r"regex:(\d+)")("1 2", "2") == 1.0


@pytest.mark.parametrize(
    "spec", ["eval", "regex:", "regex:(", {}, {"number": "1"}, {"nothing": 1.0}, {"exact": True}]
)
def test_unknown_scorers_are_refused_by_name(spec):
    with pytest.raises(ValueError, match=r"^scorer: got .*; allowed: "):
        scorer(spec)


def hostile():
    """200 texts that break parsers: long, deep, huge, nested, of other scripts, code."""
    rng = random.Random(0)
    parts = [
        "9" * 10**6,
        "(" * 10**5,
        ")" * 10**5,
        "-" * 10**5 + "1",
        "1+" * 10**5 + "1",
        "1e999999999",
        "10**10**10",
        "9" * 63 + "e300",
        "1/" * 10**5 + "1",
        "," * 10**6,
        "1," * 10**5,
        "1,000" * 10**5,
        r"\boxed{" * 10**5,
        "####" * 10**5,
        "%" * 10**5,
        "\x00" * 1000,
        "\ud800",
        "\u202e42",
        "\u0664" * 10**5,
        "a" * 10**6 + "!",
        "NaN",
        "inf",
        "-inf",
        "1e-999",
        "__import__('os').system('false')",
        "0x41",
        "1_000",
        "\n" * 10**6,
        " " * 10**6,
        "1 " * 10**5,
        "(1+" * 80 + "1" + ")" * 80,
        "9" * 64 + "*" + "9" * 64,
        ("9" * 60 + "*") * 4 + "9",
        "=" * 10**5,
        "." * 10**6,
        "1." * 10**5,
        "+-" * 10**5 + "1",
        "e" * 10**5,
        "1e" * 10**5,
        "/" * 10**6,
    ]
    yield from parts
    while len(parts) < 200:
        a, b = rng.sample(parts[:40], 2)
        parts.append((a + b)[: rng.choice((10, 1000, 10**6))])
        yield parts[-1]


def test_hostile_texts_cost_nothing_and_raise_nothing():
    texts = list(hostile())
    assert len(texts) == 200
    names = ["exact", "number", "arithmetic", "contains", r"regex:(-?\d+)\s*$",
             {"number": 0.5, "arithmetic": 0.5}]  # fmt: skip
    slowest = 0.0
    for grade in map(scorer, names):
        for text in texts:
            took = []
            for _ in range(2):  # the machine may be busy with something else
                start = time.perf_counter()
                found = grade(text, "42")
                took.append(time.perf_counter() - start)
            slowest = max(slowest, min(took))
            values = found.values() if isinstance(found, dict) else [found]
            assert all(0.0 <= x <= 1.0 for x in values)
    assert slowest < 0.01
