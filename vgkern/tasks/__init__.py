"""Tasks behind one small protocol: `task[i]` is an entry, `score(text, entry)` a number.

Entries are a pure function of (seed, i): any order, any subset, always the same. Nothing a model
writes is ever evaluated as code.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from vgkern.errors import TaskError

from .limit import TookTooLong, limited

Question = str | list[dict[str, str]]  # text, or chat messages: {"role": ..., "content": ...}


@dataclass(frozen=True)
class Entry:
    question: Question  # the prompt, exactly as the model sees it, or chat messages
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)


def question_key(question: Any) -> str:
    """One text per question, for sets and splits; raises where it is none of the two kinds."""
    if isinstance(question, str):
        return question
    if not isinstance(question, list) or not question or not all(map(_is_message, question)):
        allowed = 'text, or a list of {"role": text, "content": text}'
        raise ValueError(f"question: got {repr(question)[:200]}; allowed: {allowed}")
    return json.dumps(question, sort_keys=True)


def _is_message(message: Any) -> bool:
    wanted = isinstance(message, dict) and set(message) == {"role", "content"}
    return wanted and all(isinstance(value, str) for value in message.values())


class Task(Protocol):
    name: str
    max_new: int  # tokens an answer may take, end of sequence included

    def __getitem__(self, index: int) -> Entry: ...

    def score(self, text: str, entry: Entry) -> Any:
        """1 for a right answer, 0 for a wrong one; any real number is fine, None (this sample
        teaches nothing), and a dict of named parts, which are added up."""
        ...


class Teachable(Task, Protocol):
    """A task that also has a teacher who is wrong in one consistent way (for the warm start)."""

    def wrong(self, entry: Entry) -> str: ...


class _Exact:
    """The built-in tasks: short strings, one right answer, compared exactly."""

    name = ""
    max_new = 0

    def __init__(self, seed: int | str = 0) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> Entry:
        # a string seed is hashed with SHA-512: no two (seed, index) share a stream
        return self.make(random.Random(f"{self.name}/{self.seed}/{index}"))

    def score(self, text: str, entry: Entry) -> float:
        return float(text == entry.answer)

    def make(self, rng: random.Random) -> Entry:
        raise NotImplementedError

    def wrong(self, entry: Entry) -> str:
        raise NotImplementedError


def _letters(rng: random.Random, alphabet: str, low: int, high: int) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


class Sort(_Exact):
    """`3152=` -> `1235`. The wrong way: descending."""

    name = "sort"

    def __init__(self, seed: int | str = 0, min_length: int = 6, max_length: int = 8) -> None:
        super().__init__(seed)
        self.low, self.high = _lengths(min_length, max_length)
        self.max_new = max_length + 1

    def make(self, rng: random.Random) -> Entry:
        digits = _letters(rng, "0123456789", self.low, self.high)
        return Entry(digits + "=", "".join(sorted(digits)))

    def wrong(self, entry: Entry) -> str:
        return entry.answer[::-1]


class Reverse(_Exact):
    """`abcd=` -> `dcba`. The wrong way: a plain copy."""

    name = "reverse"

    def __init__(self, seed: int | str = 0, min_length: int = 8, max_length: int = 12) -> None:
        super().__init__(seed)
        self.low, self.high = _lengths(min_length, max_length)
        self.max_new = max_length + 1

    def make(self, rng: random.Random) -> Entry:
        word = _letters(rng, "abcdefghijklmnopqrstuvwxyz", self.low, self.high)
        return Entry(word + "=", word[::-1])

    def wrong(self, entry: Entry) -> str:
        return entry.answer[::-1]


class Addition(_Exact):
    """`123+456=` -> `975`, the sum with its lowest digit first. The wrong way: no carries."""

    name = "addition"

    def __init__(self, seed: int | str = 0, digits: int = 3) -> None:
        super().__init__(seed)
        if digits < 1:
            raise ValueError(f"digits: got {digits}; allowed: 1 or more")
        self.digits = digits
        self.max_new = digits + 2

    def make(self, rng: random.Random) -> Entry:
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        a, b = rng.randint(low, high), rng.randint(low, high)
        return Entry(f"{a}+{b}=", str(a + b)[::-1])

    def wrong(self, entry: Entry) -> str:
        a, b = str(entry.question)[:-1].split("+")
        columns = zip(reversed(a), reversed(b), strict=True)
        return "".join(str((int(x) + int(y)) % 10) for x, y in columns)


def _lengths(low: int, high: int) -> tuple[int, int]:
    if not 1 <= low <= high:
        raise ValueError(f"min_length, max_length: got {low}, {high}; allowed: 1 <= min <= max")
    return low, high


BUILT_IN: dict[str, type[_Exact]] = {task.name: task for task in (Sort, Reverse, Addition)}


def make_task(name: str, options: dict[str, Any], seed: int | str, few_shot: int = 0) -> Task:
    """A built-in task, `reasoning_gym:NAME` for any data set of that package, a class of a Python
    file (`path/to/file.py:Name`) or questions and answers (`data.jsonl`)."""
    if name.startswith("reasoning_gym:"):
        from .gym import GymTask

        return GymTask(name.removeprefix("reasoning_gym:"), options, seed, few_shot)
    if name.endswith((".jsonl", ".json")):
        from .own import JsonlTask

        return JsonlTask(name, options, seed, few_shot)
    if ".py" in name:
        from .own import from_file

        _no_examples(name, few_shot)
        return from_file(name, options, seed)
    if name not in BUILT_IN:
        allowed = f"{', '.join(BUILT_IN)}, reasoning_gym:NAME, file.py:Name, data.jsonl"
        raise ValueError(f"task: got {name!r}; allowed: {allowed}")
    _no_examples(name, few_shot)
    try:
        return BUILT_IN[name](seed=seed, **options)
    except TypeError as error:
        raise ValueError(f"task_options: got {options}; {error}") from None


def _no_examples(name: str, few_shot: int) -> None:
    if few_shot:
        raise ValueError(f"few_shot: got {few_shot}; allowed: 0 for the task {name!r}")


MOST = 1e6  # a larger reward is a fault of the task, and its square would leave fp32


class Reward(NamedTuple):
    """What a task says of one sample."""

    value: float  # NaN: the sample teaches nothing
    parts: Mapping[str, float] = MappingProxyType({})  # of what it is the sum, by the task's names
    late: bool = False  # the task took too long over it


def checked_score(task: Task, text: str, entry: Entry, seconds: float = 0.0) -> Reward:
    """`task.score`, or one exception that says which sample it failed on, and how.

    A score is a real number of Python, numpy or torch, None where the sample is to teach nothing,
    or a dict of named parts that are added up. One that takes longer than `seconds` (0: no limit)
    is that of an empty answer, so that a text that makes a task hang gains nothing by it.
    """
    where = f"task {task.name!r}, question {entry.question!r}, completion {text!r}"
    try:
        with limited(seconds):
            found: Any = task.score(text, entry)
        parts = found if isinstance(found, dict) else {}
        given = [*parts.values()] if parts else [found]
        numbers = [None if x is None else _real(x) for x in given]
    except TookTooLong:
        empty = checked_score(task, "", entry, seconds) if text else Reward(math.nan)
        return Reward(empty.value, {}, True)
    except Exception as error:
        raise TaskError(f"{where}: score raised {type(error).__name__}: {error}") from error
    bad = any(x is not None and math.isnan(x) for x in numbers)
    if bad or found == {} or not all(isinstance(name, str) for name in parts):
        raise TaskError(
            f"{where}: score returned {found!r}; allowed: a float within +-{MOST:g}, None, or a "
            f"dict of named ones"
        )
    if None in numbers:
        return Reward(math.nan)
    values = [x for x in numbers if x is not None]
    return Reward(sum(values), dict(zip(parts, values, strict=True)) if parts else {})


def _real(x: Any) -> float:
    """A number of Python, numpy or torch; NaN for anything else, and beyond `MOST`."""
    if not isinstance(x, bool | int | float):
        if getattr(x, "ndim", None) != 0 or not hasattr(x, "item"):
            return math.nan
        x = x.item()
    return float(x) if isinstance(x, bool | int | float) and abs(x) <= MOST else math.nan


class Stream:
    """Entries in order, without those whose question is excluded. `cursor` is all its state."""

    def __init__(self, task: Task, exclude: frozenset[str] = frozenset(), cursor: int = 0) -> None:
        self.task, self.exclude, self.cursor = task, exclude, cursor

    def take(self, count: int, distinct: bool = False) -> list[Entry]:
        entries: list[Entry] = []
        seen: set[str] = set()
        for _ in range(1000 * count):
            if len(entries) == count:
                return entries
            try:
                entry = self.task[self.cursor]
                question = question_key(entry.question)
            except Exception as error:
                where = f"task {self.task.name!r}, entry {self.cursor}"
                raise TaskError(f"{where}: {type(error).__name__}: {error}") from error
            self.cursor += 1
            if question in self.exclude or (distinct and question in seen):
                continue
            seen.add(question)
            entries.append(entry)
        raise TaskError(
            f"task {self.task.name!r} has too few different questions: found {len(entries)} of "
            f"{count} in {1000 * count} draws with {len(self.exclude)} excluded"
        )
