"""Any data set of the `reasoning_gym` package as a task, with fixed examples in the prompt."""

from __future__ import annotations

import hashlib
from typing import Any

from . import Entry

SIZE = 1 << 30  # entries are made on demand; reasoning_gym only wants an upper bound


class GymTask:
    """`few_shot` examples precede every question; the same ones, so that prompts share a prefix.

    An answer is one line. `options`: `max_new`, and `partial_credit` (reasoning_gym gives a wrong
    sum that shares digits with the right one up to 0.99: off, only a full score counts, so that the
    mean is an accuracy); the rest goes to reasoning_gym.
    """

    def __init__(
        self, dataset: str, options: dict[str, Any], seed: int | str, few_shot: int
    ) -> None:
        try:
            import reasoning_gym
        except ImportError:
            raise ValueError(
                f"task: reasoning_gym:{dataset} needs the package: pip install reasoning-gym"
            ) from None
        options = dict(options)
        self.name = f"reasoning_gym:{dataset}"
        self.max_new = int(options.pop("max_new", 16))
        self.partial_credit = bool(options.pop("partial_credit", False))
        self.data = _open(reasoning_gym, dataset, options, _number(f"{seed}"))
        shots = _open(reasoning_gym, dataset, options, _number("few-shot examples"))
        examples = [shots[i] for i in range(few_shot)]
        self.prefix = "".join(_format(e["question"]) + f" {e['answer']}\n\n" for e in examples)

    def __getitem__(self, index: int) -> Entry:
        item = self.data[index]
        question = self.prefix + _format(item["question"])
        return Entry(question, str(item["answer"]), item)

    def score(self, text: str, entry: Entry) -> float:
        value = float(self.data.score_answer(text.strip(), entry.metadata))
        return value if self.partial_credit else float(value >= 1.0)


def _format(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _open(module: Any, dataset: str, options: dict[str, Any], seed: int) -> Any:
    try:
        return module.create_dataset(dataset, size=SIZE, seed=seed, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"task reasoning_gym:{dataset}, task_options {options}: {error}") from None


def _number(seed: str) -> int:
    """Seeds 0, 1, 2 must not give overlapping data: reasoning_gym seeds entry i with seed + i."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:3], "big") * 4096
