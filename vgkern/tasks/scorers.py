"""Scores of what a model wrote. It is hostile input: nothing is run, every parser is linear in the
text and reads at most `LONGEST` characters of it (the last ones, where the answer is).

    exact          the text is the answer, but for white space around them
    number         the last number of the text equals that of the answer: 1,234.5  -3/4  50 %  1e3
                   after the last \\boxed{ or #### where there is one
    arithmetic     the last line is an expression of + - * / ( ) with that value
    contains       the answer occurs in the text
    regex:PATTERN  PATTERN is found; if it has a group, the last match's group is the answer
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

LONGEST = 4096  # characters of a text that are looked at
DIGITS = 64  # of one number, exponent aside
EXPONENT = 300
EXPRESSION = 256  # characters of an expression
BITS = 4096  # of a value on the way
NUMBER = re.compile(
    r"[-+]?(?:\d{1,64}(?:,\d{3}){0,20}(?:\.\d{0,64})?|\.\d{1,64})(?:[eE][-+]?\d{1,4}(?!\d))?"
)
PLACES = ("\\boxed{", "####")  # what an answer is put behind

Score = Callable[[str, str], float]  # text, answer


def scorer(spec: str | Mapping[str, float]) -> Callable[[str, str], float | dict[str, float]]:
    """A name from above, or several with their weights. Raises ValueError that names the choice."""
    if isinstance(spec, str):
        return _one(spec)
    if not spec or not all(_weight(w) for w in spec.values()):
        raise ValueError(f"scorer: got {dict(spec)!r}; allowed: names with finite weights")
    parts = {name: (_one(name), float(weight)) for name, weight in spec.items()}
    return lambda text, answer: {n: w * f(text, answer) for n, (f, w) in parts.items()}


def _weight(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _one(name: str) -> Score:
    if name in NAMED:
        return NAMED[name]
    kind, _, pattern = name.partition(":")
    if kind != "regex" or not pattern:
        allowed = ", ".join([*NAMED, "regex:PATTERN", "an object of several with weights"])
        raise ValueError(f"scorer: got {name!r}; allowed: {allowed}")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"scorer: got {name!r}; allowed: a regular expression ({error})") from None

    def matches(text: str, answer: str) -> float:
        found = None
        for found in compiled.finditer(text[-LONGEST:]):  # noqa: B007  (the last one)
            pass
        if found is None or not compiled.groups:
            return float(found is not None)
        return float((found.group(1) or "").strip() == answer.strip())

    return matches


def exact(text: str, answer: str) -> float:
    return float(text.strip() == answer.strip())


def contains(text: str, answer: str) -> float:
    return float(bool(answer.strip()) and answer.strip() in text[-LONGEST:])


def number(text: str, answer: str) -> float:
    found, wanted = last_number(text), last_number(answer)
    return float(found is not None and found == wanted)


def arithmetic(text: str, answer: str) -> float:
    lines = text[-LONGEST:].strip().splitlines()
    found, wanted = value(lines[-1]) if lines else None, last_number(answer)
    return float(found is not None and found == wanted)


NAMED: dict[str, Score] = {
    "exact": exact, "number": number, "arithmetic": arithmetic, "contains": contains,
}  # fmt: skip


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None without one, or with one beyond all bounds."""
    text = text[-LONGEST:]
    for place in PLACES:
        at = text.rfind(place)
        if at >= 0:
            text = text[at + len(place) :]
            if place == "\\boxed{":
                text = text.partition("}")[0]
            break
    found = None
    for found in NUMBER.finditer(text):  # noqa: B007  (the last one)
        pass
    if found is None:
        return None
    low, high = found.span()
    if (high < len(text) and text[high].isdigit()) or (low and text[low - 1].isdigit()):
        return None  # a piece of something longer than any number here
    result = _fraction(found.group())
    before = text[:low].rstrip()
    if result is not None and before.endswith("/"):  # 3/4: the match is its denominator
        top = re.search(r"[-+]?\d{1,64}$", before[:-1].rstrip()[-80:])
        if top is not None:
            result = Fraction(int(top.group())) / result if result else None
    if result is not None and text[high:].lstrip().startswith("%"):
        result /= 100
    return result


def _fraction(text: str) -> Fraction | None:
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if sum(c.isdigit() for c in mantissa) > DIGITS or abs(int(exponent or 0)) > EXPONENT:
        return None
    if not mantissa.isascii():  # digits of other scripts
        return None
    return Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0)


LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2}
TOKEN = re.compile(r"\s*(?:(\d{1,64}(?:\.\d{1,64})?)|([-+*/()]))")


def value(text: str) -> Fraction | None:
    """The value of an expression of numbers, + - * / and parentheses, exactly; what stands behind
    an = is left out. None for anything else, for a division by 0, and beyond all bounds."""
    text = text.partition("=")[0].strip()
    if not text or len(text) > EXPRESSION:
        return None
    values: list[Fraction] = []
    signs: list[str] = []  # operators and parentheses that are still open; ~ is a minus in front
    at, after_value = 0, False
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None:
            return None
        at = found.end()
        given, sign = found.groups()
        if given is not None:
            if after_value:
                return None
            values.append(Fraction(given))
            after_value = True
        elif sign == "(":
            if after_value:
                return None
            signs.append(sign)
        elif sign == ")":
            if not after_value or not _fold(values, signs, 0) or not signs:
                return None
            signs.pop()
        elif after_value:
            if not _fold(values, signs, LEVEL[sign]):
                return None
            signs.append(sign)
            after_value = False
        elif sign in "+-":
            signs.append("~" if sign == "-" else "+0")
        else:
            return None
    if not after_value or not _fold(values, signs, 0) or signs:
        return None
    return values[0]


def _fold(values: list[Fraction], signs: list[str], level: int) -> bool:
    """Apply what binds at least as tightly as `level`, down to the last open parenthesis."""
    while signs and signs[-1] != "(" and LEVEL.get(signs[-1], 3) >= level:
        sign = signs.pop()
        if sign in ("~", "+0"):
            values[-1] = -values[-1] if sign == "~" else values[-1]
            continue
        b, a = values.pop(), values.pop()
        if sign == "/" and not b:
            return False
        values.append({"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b)
        if max(values[-1].numerator.bit_length(), values[-1].denominator.bit_length()) > BITS:
            return False
    return True
