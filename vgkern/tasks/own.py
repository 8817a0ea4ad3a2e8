"""Tasks of your own: a class in a Python file, or questions and answers in a JSONL file."""

from __future__ import annotations

import hashlib
import heapq
import importlib.util
import inspect
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import Entry, Task
from .scorers import scorer

SPLITS = {"held": (0.0, 0.1), "validation": (0.1, 0.15), "train": (0.15, 1.0), "warm": (0.15, 1.0)}


class Own:
    """Somebody's task, with a name and an answer length, and entries that may be dicts or pairs."""

    def __init__(self, task: Any, name: str, max_new: int | None) -> None:
        for method in ("__getitem__", "score"):
            if not callable(getattr(task, method, None)):
                raise ValueError(
                    f"task: got {name!r}, a {type(task).__name__} without {method}; allowed: an "
                    "object with task[i] -> question and answer, and score(text, entry) -> number"
                )
        self.task, self.name = task, str(getattr(task, "name", None) or name)
        length = max_new if max_new is not None else getattr(task, "max_new", None)
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(
                f"max_new: got {length!r} from task {name!r}; allowed: an int >= 1, the tokens an "
                "answer may take, as the task's attribute or in task_options"
            )
        self.max_new = length
        self.count = len(task) if hasattr(task, "__len__") else None
        if self.count == 0:
            raise ValueError(f"task: got {name!r} with no entries; allowed: 1 or more")

    def __getitem__(self, index: int) -> Entry:
        return _entry(self.task[index if self.count is None else index % self.count])

    def score(self, text: str, entry: Entry) -> Any:
        return self.task.score(text, entry)

    def __getattr__(self, name: str) -> Any:  # `wrong`, where there is one
        if name == "task":
            raise AttributeError(name)
        return getattr(self.task, name)


def _entry(found: Any) -> Entry:
    if isinstance(found, Entry):
        return found
    if isinstance(found, dict) and {"question", "answer"} <= set(found):
        question = found["question"]  # a list is a chat; `question_key` looks at it
        question = question if isinstance(question, list) else _text(question)
        return Entry(question, _text(found["answer"]), found)
    if isinstance(found, tuple | list) and len(found) == 2:
        return Entry(_text(found[0]), _text(found[1]))
    raise ValueError(f"entry: got {found!r}; allowed: an Entry, a dict with question and answer, "
                     "or (question, answer)")  # fmt: skip


def _text(x: Any) -> str:
    if isinstance(x, bool) or not isinstance(x, str | int | float):
        raise ValueError(f"entry: got {x!r}; allowed: text or a number, for question and answer")
    return str(x)


def from_python(task: Any, seed: int | str) -> Task:
    """`vgkern.train.train(config, task=...)`: a task, or a function of the split's seed that makes
    one: `held out 0`, `validation`, `train 0` or `warm 0`."""
    made = task(seed) if callable(task) else task
    return made if isinstance(made, Own) else Own(made, type(made).__name__, None)


def from_file(spec: str, options: dict[str, Any], seed: int | str) -> Task:
    """`path/to/file.py:Name`: a class or function that is called with the options, and with `seed`
    if it takes one."""
    path, _, name = spec.rpartition(":")
    module = _module(Path(path))
    made = getattr(module, name, None)
    if not callable(made):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        found = "nothing of that name" if made is None else f"a {type(made).__name__}"
        raise ValueError(f"task: got {spec!r}, {found}; allowed: a class or function of the file: "
                         f"{', '.join(known) or 'it has none'}")  # fmt: skip
    options = dict(options)
    parameters = inspect.signature(made).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    max_new = None if "max_new" in parameters or takes_all else options.pop("max_new", None)
    if "seed" in parameters or takes_all:
        options["seed"] = seed
    try:
        inspect.signature(made).bind(**options)
    except TypeError as error:
        raise ValueError(f"task_options: got {options}; {spec}: {error}") from None
    try:
        return Own(made(**options), name, max_new)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(("task:", "max_new:")):
            raise
        raise ValueError(f"task {spec}: {type(error).__name__}: {error}") from error


_modules: dict[Path, Any] = {}


def _module(path: Path) -> Any:
    """The module of a file, run once a process."""
    if not path.is_file():
        raise ValueError(
            f"task: got {str(path)!r}; allowed: a Python file, as path/to/file.py:Name"
        )
    path = path.resolve()
    if path not in _modules:
        spec = importlib.util.spec_from_file_location(f"vgkern_task_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"task {path}: {type(error).__name__}: {error}") from error
        _modules[path] = module
    return _modules[path]


class JsonlTask:
    """Questions and answers, one JSON object a line.

    A question belongs to one split for ever, by its hash: 10 % held out, 5 % for the validation of
    a warm start, the rest to train on. Options: `scorer` ("exact", see `scorers`), `question` and
    `answer` (names of the fields), `max_new` (64), `prompt` ("Question: {question}\\nAnswer:").
    """

    def __init__(
        self, path: str, options: dict[str, Any], seed: int | str, few_shot: int = 0
    ) -> None:
        given = {"scorer": "exact", "question": "question", "answer": "answer", "max_new": 64,
                 "prompt": "Question: {question}\nAnswer:", **options}  # fmt: skip
        unknown = sorted(set(options) - {"scorer", "question", "answer", "max_new", "prompt"})
        if unknown:
            raise ValueError(f"task_options: got {unknown[0]!r}; allowed: {', '.join(given)}")
        if not isinstance(given["prompt"], str) or "{question}" not in given["prompt"]:
            raise ValueError(
                f"prompt: got {given['prompt']!r}; allowed: text with {{question}} in it"
            )
        length = given["max_new"]
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"max_new: got {length!r}; allowed: an int >= 1")
        self.name, self.max_new = Path(path).stem, length
        self.grade: Callable[[str, str], Any] = scorer(given["scorer"])
        rows = read_jsonl(Path(path), given["question"], given["answer"])
        places = {q: _place(q) for q, _ in rows}
        split = str(seed).split()[0]
        low, high = SPLITS.get(split, SPLITS["train"])
        to_train = [row for row in rows if places[row[0]] >= SPLITS["train"][0]]
        shots = heapq.nsmallest(few_shot, to_train, key=lambda row: places[row[0]])
        if len(shots) < few_shot:
            raise ValueError(f"few_shot: got {few_shot}; allowed: up to {len(shots)} in {path}")
        form = given["prompt"]
        prefix = "".join(f"{form.replace('{question}', q)} {a}\n\n" for q, a in shots)
        self.entries = [
            Entry(prefix + form.replace("{question}", q), a, {"question": q})
            for q, a in rows
            if low <= places[q] < high and (q, a) not in shots
        ]
        self.count, self.seed = len(self.entries), seed
        self.order: tuple[int, list[int]] = (-1, [])  # of the epoch that was asked for last
        if not self.entries:
            raise ValueError(f"task: got {path} with {len(rows)} questions, none of which falls "
                             f"to {split!r}; allowed: more questions (some hundreds)")  # fmt: skip

    def __getitem__(self, index: int) -> Entry:
        epoch, place = divmod(index, self.count)
        if self.order[0] != epoch:
            order = list(range(self.count))
            random.Random(f"{self.name}/{self.seed}/{epoch}").shuffle(order)
            self.order = epoch, order
        return self.entries[self.order[1][place]]

    def score(self, text: str, entry: Entry) -> Any:
        return self.grade(text, entry.answer)


def _place(question: str) -> float:
    """Where a question falls in [0, 1), on every machine."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:6], "big") / 2**48


def read_jsonl(path: Path, question: str, answer: str) -> list[tuple[str, str]]:
    """Pairs of a file. Raises ValueError with the line's number: no JSON, no object, a field that
    is missing, empty or neither text nor a number, a question that was there before."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task {path}: {error}") from None
    rows: list[tuple[str, str]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            raise ValueError(f"{where}: got nothing; allowed: one JSON object a line")
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{where}: got {line[:60]!r}; allowed: a JSON object ({error})"
            ) from None
        if not isinstance(found, dict):
            raise ValueError(f"{where}: got {type(found).__name__}; allowed: a JSON object")
        pair = []
        for name in (question, answer):
            if name not in found:
                raise ValueError(f"{where}: no field {name!r}; it has {', '.join(found) or 'none'}")
            value = found[name]
            if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
                raise ValueError(f"{where}: {name}: got {value!r}; allowed: text or a number")
            pair.append(str(value))
        if pair[0] in seen:
            raise ValueError(f"{where}: the question of line {seen[pair[0]]} again")
        seen[pair[0]] = number
        rows.append((pair[0], pair[1]))
    return rows
