"""`python -m vgkern sample CKPT`: what a checkpoint writes after a prompt, or line by line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from vgkern.errors import ConfigError, RunError
from vgkern.tasks import make_task

from . import Model, command, load


def parser() -> argparse.ArgumentParser:
    p = command("sample", __doc__)
    p.add_argument("--prompt", help="what to go on from; without it every line of the input is one")
    p.add_argument("--count", type=int, default=1, help="samples of each prompt (1)")
    p.add_argument("--max-new", type=int, help="tokens of an answer (its task's, else 64)")
    options(p)
    p.add_argument("--json", action="store_true", help="one JSON object a sample")
    return p


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token (1.0)")
    p.add_argument("--top-k", type=int, help="only the k most likely tokens")
    p.add_argument("--top-p", type=float, help="only the most likely tokens of that mass")
    p.add_argument("--min-p", type=float, help="only tokens above that share of the likeliest's")
    p.add_argument("--seed", type=int, default=0, help="another seed, other samples (0)")


def task_of(run: dict[str, Any]) -> Any:
    """The task that a run was trained on; None where there is none, or it is not here any more."""
    try:
        extra = json.loads(run["task_options"])
        return make_task(run["task"], extra, "held out 0", run["few_shot"]) if run else None
    except (KeyError, ValueError):
        return None


def main(arguments: list[str]) -> None:
    asked = parser().parse_args(arguments)
    model = load(asked.model)
    known = getattr(task_of(model.run), "max_new", 64)
    given = {"count": asked.count, "temperature": asked.temperature, "top_k": asked.top_k,
             "top_p": asked.top_p, "min_p": asked.min_p, "seed": asked.seed,
             "max_new": known if asked.max_new is None else asked.max_new}  # fmt: skip
    terminal = asked.prompt is None and sys.stdin.isatty()
    prompts = iter([asked.prompt]) if asked.prompt is not None else _lines(terminal)
    for number, prompt in enumerate(prompts):
        try:
            answer(model, prompt, number, asked.json, given)
        except RunError as error:
            if not terminal:
                raise
            print(error, file=sys.stderr)  # and the next line, please


def _lines(terminal: bool) -> Iterator[str]:
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if text := line.rstrip("\n"):
            yield text


def answer(model: Model, prompt: str, number: int, as_json: bool, given: dict[str, Any]) -> None:
    if not prompt:
        raise ConfigError("--prompt: got an empty one; allowed: at least one token")
    for sampled in model.sample([prompt], first=number, **given)[0]:
        if as_json:
            print(json.dumps({"prompt": prompt, "text": sampled.text,
                              "finished": sampled.finished}), flush=True)  # fmt: skip
        else:
            print(sampled.text + ("" if sampled.finished else " [cut off]"), flush=True)
