"""`python -m vgkern eval CKPT`: greedy score, avg@n and pass@k on held-out prompts.

pass@k is the unbiased estimate of the chance that one of k samples is right, from n of them of
which c are: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374). Right is a score of at least `--right`.
Intervals are of 95 %, by bootstrap over the prompts (2,000 draws).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vgkern.errors import ConfigError
from vgkern.tasks import Entry, Task, make_task
from vgkern.train.generate import reward
from vgkern.train.log import clock
from vgkern.train.report import aligned
from vgkern.train.report import asked as shown
from vgkern.train.run import entries_of

from . import Model, Sampled, command, load
from .sample import options

DRAWS = 2000
SHOWN = 6  # prompts in the table
DEFAULTS = {"task": "", "task_options": "{}", "few_shot": 0, "eval_seed": 0}


@dataclass(frozen=True)
class Answers:
    """What a checkpoint made of one prompt."""

    entry: Entry
    greedy: Sampled
    greedy_score: float
    samples: list[Sampled]
    scores: list[float]


def main(arguments: list[str]) -> None:
    p = command("eval", __doc__)
    p.add_argument("--task", help="as of train (that of the run)")
    p.add_argument("--task-options", help="as of train (those of the run)")
    p.add_argument("--few-shot", type=int, help="as of train (that of the run)")
    p.add_argument("--eval-seed", type=int, help="which held-out prompts (those of the run)")
    p.add_argument("--prompts", type=int, default=256, help="how many (256)")
    p.add_argument("--samples", type=int, default=8, help="of each prompt (8)")
    p.add_argument("--k", type=int, nargs="+", default=[1, 4, 8], help="of pass@k (1 4 8)")
    p.add_argument("--right", type=float, default=1.0, help="a score that is right (1.0)")
    options(p)
    p.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    p.add_argument("--json", metavar="FILE", help="everything, by prompt")
    asked = p.parse_args(arguments)
    for name, low in {"prompts": 1, "samples": 1, "threads": 1}.items():
        if getattr(asked, name) < low:
            raise ConfigError(f"--{name}: got {getattr(asked, name)}; allowed: >= {low}")
    if bad := [k for k in asked.k if not 1 <= k <= asked.samples]:
        raise ConfigError(f"--k: got {bad[0]}; allowed: 1 to --samples, {asked.samples}")
    if asked.json and Path(asked.json).exists():
        raise ConfigError(f"--json: {asked.json} exists already; choose another file")
    torch.set_num_threads(asked.threads)
    start, model = time.perf_counter(), load(asked.model)
    task, given = task_for(model.run, asked, asked.model)
    entries = entries_of(task, asked.prompts)
    cuts = {"top_k": asked.top_k, "top_p": asked.top_p, "min_p": asked.min_p}
    sampling = {"temperature": asked.temperature, **cuts, "seed": asked.seed}
    found = measure(model, task, entries, asked.samples, sampling, _progress())
    told = summarize(found, sorted(set(asked.k)), asked.right)
    print("\n".join(screen(model, given, told, found)), flush=True)
    print(f"{len(found)} prompts, {clock(time.perf_counter() - start)}", flush=True)
    if asked.json:
        text = json.dumps({"model": model.weights, **given, **sampling, **told,
                           "prompts": [_plain(a) for a in found]}, indent=1)  # fmt: skip
        try:
            Path(asked.json).write_text(text + "\n")
        except OSError as error:
            raise ConfigError(f"--json: {asked.json}: {error.strerror}") from None


def task_for(
    run: dict[str, Any], asked: argparse.Namespace, who: str
) -> tuple[Task, dict[str, Any]]:
    """The task that the flags name, or where they are silent the run that `who` came from."""
    given = {
        name: getattr(asked, name) if getattr(asked, name) is not None else run.get(name, d)
        for name, d in DEFAULTS.items()
    }
    if not given["task"]:
        raise ConfigError(f"--task: {who} does not say its task; give it with --task")
    try:
        extra = json.loads(given["task_options"])
        if not isinstance(extra, dict):
            raise ValueError(f"task_options: got {extra!r}; allowed: a JSON object")
        split = f"held out {given['eval_seed']}"
        return make_task(given["task"], extra, split, given["few_shot"]), given
    except ValueError as error:
        raise ConfigError(str(error)) from error


def measure(
    model: Model, task: Task, entries: list[Entry], samples: int, sampling: dict[str, Any],
    show: Any = lambda done, of: None, part: int = 16,
) -> list[Answers]:  # fmt: skip
    """Greedy and sampled answers of every entry, scored as the trainer scores them."""
    found: list[Answers] = []
    for at in range(0, len(entries), part):
        some = entries[at : at + part]
        questions = [entry.question for entry in some]
        room = {"max_new": task.max_new, "first": at}
        greedy = model.sample(questions, temperature=0.0, **room)
        drawn = model.sample(questions, count=samples, **sampling, **room)
        for entry, (best,), group in zip(some, greedy, drawn, strict=True):
            scores = [score(task, sampled, entry) for sampled in group]
            found.append(Answers(entry, best, score(task, best, entry), group, scores))
        show(len(found), len(entries))
    return found


def score(task: Task, sampled: Sampled, entry: Entry) -> float:
    """As the trainer's `cut_off = score`; NaN where the task says nothing."""
    return reward(task, sampled.text, entry, sampled.finished).value


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones."""
    return 1.0 if n - c < k else 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summarize(found: list[Answers], ks: list[int], right: float) -> dict[str, Any]:
    """{name: [mean, low, high]} over the prompts; those without a score are left out."""
    told: dict[str, Any] = {"right": right}
    rows: dict[str, list[float]] = {"greedy": [a.greedy_score for a in found]}
    n = len(found[0].samples)
    rows[f"avg@{n}"] = [float(np.mean(a.scores)) for a in found]
    for k in ks:
        counts = [sum(s >= right for s in a.scores) for a in found]
        rows[f"pass@{k}"] = [pass_at_k(n, c, k) for c in counts]
    for name, values in rows.items():
        told[name] = interval(np.array([v for v in values if not math.isnan(v)]))
    told["cut_off"] = float(np.mean([not s.finished for a in found for s in a.samples]))
    return told


def interval(values: np.ndarray) -> list[float]:
    """Mean, and the bootstrap's 2.5 and 97.5 %."""
    if not len(values):
        return [math.nan] * 3
    draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return [float(values.mean()), float(low), float(high)]


def screen(
    model: Model, given: dict[str, Any], told: dict[str, Any], found: list[Answers]
) -> list[str]:
    lines = [f"{model.weights} on {given['task']}, held out {given['eval_seed']}"]
    for name, value in told.items():
        if isinstance(value, list):
            mean, low, high = value
            lines.append(f"  {name:<9} {mean:.3f}  [{low:.3f}, {high:.3f}]")
    lines += [f"  cut off   {told['cut_off']:.3f}", ""]
    rows = [("question", "answer", "greedy", "best sample", "worst sample")]
    for a in found[:SHOWN]:
        order = np.argsort(a.scores, kind="stable")
        rows.append((*shown(a.entry), a.greedy.text, a.samples[order[-1]].text,
                     a.samples[order[0]].text))  # fmt: skip
    return lines + ["  " + row for row in aligned(rows, 28)]


def _plain(a: Answers) -> dict[str, Any]:
    return {
        "question": a.entry.question, "answer": a.entry.answer,
        "greedy": {"text": a.greedy.text, "finished": a.greedy.finished, "score": a.greedy_score},
        "samples": [{"text": s.text, "finished": s.finished, "score": x}
                    for s, x in zip(a.samples, a.scores, strict=True)],
    }  # fmt: skip


def _progress() -> Any:
    start = time.perf_counter()

    def show(done: int, of: int) -> None:
        if sys.stderr.isatty():
            left = (time.perf_counter() - start) / done * (of - done)
            end = "\n" if done == of else ""
            sys.stderr.write(f"\r\x1b[2K{done}/{of} prompts, {clock(left)} left{end}")
            sys.stderr.flush()

    return show
