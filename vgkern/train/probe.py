"""`python -m vgkern probe`: what the costates of a checkpoint say, on one screen.

Measuring is in `readouts.py`; here are the flags, the run's folder and what is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vgkern import costate
from vgkern.errors import CheckpointError, ConfigError
from vgkern.tasks import Stream, make_task

from .checkpoint import find, load_policy
from .log import clock
from .policy import Tokenizer, encode
from .readouts import Sampling, Text, measure, summarize

QUIET = 3.0  # seconds before progress is worth a line
NEUTRAL = {"task_options": "{}", "few_shot": 0, "temperature": 1.0}  # without a run to ask


@dataclass(frozen=True)
class Options:
    """The flags; where they are silent, what the run of the model says."""

    model: str  # as asked for
    weights: str  # the folder or name that is loaded
    task: str
    task_options: str
    few_shot: int
    temperature: float
    prompts: int
    group: int
    best_of: int
    layer: int | None  # None: the middle
    hops: int
    seed: int
    threads: int
    out: str


def parse(arguments: list[str]) -> Options:
    p = argparse.ArgumentParser(
        prog="python -m vgkern probe", allow_abbrev=False,
        description="value-gradient readouts of a checkpoint on a task's held-out prompts",
    )  # fmt: skip
    add = p.add_argument
    add("--model", required=True, help="run folder, checkpoint folder or Hugging Face name")
    add("--task", help="default: the task of the run the model came from")
    add("--task-options", help="options of the task, as JSON")
    add("--few-shot", type=int, help="fixed examples before every question (reasoning_gym)")
    add("--temperature", type=float, help="of the samples (default: the run's, else 1)")
    add("--prompts", type=int, default=16, help="held-out prompts (default: 16)")
    add("--group", type=int, default=8, help="samples per prompt, 4 or more (default: 8)")
    add("--best-of", type=int, help="k of the headroom (default: 8, at most the group)")
    add("--layer", type=int, help="whose signal the summary shows (default: the middle one)")
    add("--hops", type=int, default=1, help="sampled tokens that credit passes (default: 1)")
    add("--seed", type=int, default=0, help="of the samples (default: 0)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--out", help="folder for probe.json and costates.png (default: runs/probe-TIME)")
    given = vars(p.parse_args(arguments))
    try:
        given["weights"], run = find(given["model"])
    except CheckpointError as error:
        raise ConfigError(f"--model: {error}") from None
    own = given["task"] in (None, run.get("task"))
    for name in ("task", *NEUTRAL):  # the run's options of another task are none of this one's
        if given[name] is None:
            given[name] = (run if own or name == "temperature" else {}).get(name, NEUTRAL.get(name))
    if given["task"] is None:
        raise ConfigError(
            f"--task: {given['model']} does not say its task (no config.json of a run there); "
            "give --task sort, reverse, addition or reasoning_gym:NAME"
        )
    least = {"prompts": 1, "group": costate.LEAST, "best_of": 1, "hops": 1, "seed": 0, "threads": 1}
    for name, low in {**least, "few_shot": 0, "layer": 0}.items():
        if given[name] is not None and given[name] < low:
            why = " (a pair needs two other rewards as baseline)" if name == "group" else ""
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: got {given[name]}; allowed: >= {low}{why}")
    if (given["best_of"] or 0) > given["group"]:
        raise ConfigError(
            f"--best-of: got {given['best_of']}; allowed: at most --group, {given['group']}"
        )
    if not 1e-3 <= given["temperature"] < math.inf:
        raise ConfigError(f"--temperature: got {given['temperature']}; allowed: >= 0.001, finite")
    given["best_of"] = given["best_of"] or min(8, given["group"])
    given["out"] = given["out"] or f"runs/probe-{time.strftime('%Y%m%d-%H%M%S')}"
    return Options(**given)


def main(arguments: list[str]) -> None:
    """Raises RunError (a flag, a task, a file that will not do) with the whole message."""
    options, start = parse(arguments), time.perf_counter()
    out = Path(options.out)
    if (out / "probe.json").exists():
        raise ConfigError(f"--out: {out} holds another probe; choose another folder")
    torch.set_num_threads(options.threads)
    with own_words():
        extra = json.loads(options.task_options)
        if not isinstance(extra, dict):
            raise ValueError(f"task_options: got {extra!r}; allowed: a JSON object")
        task = make_task(options.task, extra, "held out 0", options.few_shot)
        entries = Stream(task).take(options.prompts, distinct=True)
        policy, tokenizer = load_policy(options.weights)
        check = getattr(policy, "check", None)  # too long for the model: said now
        if check is not None:
            check([max((encode(tokenizer, e.question) for e in entries), key=len)], task.max_new)
        module: Any = policy
        depth = len(costate.probe(module).points)
    layer = depth // 2 if options.layer is None else options.layer
    if layer >= depth:
        raise ConfigError(f"--layer: got {layer}; allowed: 0 (input) to {depth - 1}")
    sampling = Sampling(options.group, options.temperature, options.seed, options.hops)
    with staged(out) as folder:
        with own_words():
            groups, text = measure(policy, tokenizer, task, entries, sampling, progress())
        found = {**asdict(options), "layer": layer, **summarize(groups, options.best_of)}
        found["seconds"] = time.perf_counter() - start
        (folder / "probe.json").write_text(json.dumps(plain(found), indent=2) + "\n")
        picture = draw(found, text, tokenizer, folder / "costates.png")
    print("\n".join([*screen(found), f"  {out}/: probe.json; costates.png {picture}"]), flush=True)


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """A task's or model's own words for what it cannot take."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"--{error}" if str(error).startswith("task") else str(error)) from error


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder whose files move to `out` together, at the end; of an earlier end nothing stays."""
    new, partial = not out.exists(), out / f".partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "choose another folder"
        raise ConfigError(f"--out: {out}: {error.strerror}; {remedy}") from None
    try:
        yield partial
        for path in sorted(partial.iterdir()):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds the probe
            if new:
                out.rmdir()


def progress() -> Callable[[int, int], None]:
    """A line with the time left, once it takes long; on a terminal it is replaced by the next."""
    start = time.perf_counter()

    def show(done: int, of: int) -> None:
        seconds, screen = time.perf_counter() - start, sys.stderr.isatty()
        if seconds < QUIET or (done == of and not screen):
            return
        left = clock(seconds / done * (of - done))
        line = f"prompt {done}/{of}, {left} left" if done < of else ""
        print(f"\r\x1b[2K{line}" if screen else line, end="" if screen else "\n", file=sys.stderr,
              flush=True)  # fmt: skip

    return show


def draw(found: dict[str, Any], text: Text, tokenizer: Tokenizer, path: Path) -> str:
    """The picture of one sample; what to do where it cannot be drawn."""
    names = [
        "<end>" if i in tokenizer.stops else tokenizer.decode([i]) or f"#{i}" for i in text.ids
    ]
    ratio = torch.tensor([[x["snr"].value, x["snr"].error] for x in found["layers"]])
    title = (
        "Where the gradient of this sample's log-probability arrives: |d Σ log π / d x|\n"
        f"{found['model']}, task {found['task']}, reward {text.reward:g}"
    )
    try:
        costate.draw_costates(text.norms, names, text.prompt, path, title=title, ratio=ratio)
    except ModuleNotFoundError as error:
        return f"is not drawn: {error}"
    return "is one sample's costates, layer by position"


def screen(found: dict[str, Any]) -> list[str]:
    """The summary."""
    at, last = found["layers"][found["layer"]], len(found["layers"]) - 1
    k, agree, hops = found["best_of"], found["replay_agreement"].value, found["hops"]
    heat, seconds = found["temperature"], found["seconds"]
    where = f"squared value gradient over the prompt, layer {at['layer']} of {last}"
    added = found["hop_norm"].value

    def row(name: str, x: costate.Estimate, text: str) -> str:
        error = f"± {x.error:.2g}" if math.isfinite(x.error) else ""
        return f"  {name:<17}{x.value:>10.4g}  {error:<10} {text}"

    lines = [
        f"vgkern probe: {found['weights']} on {found['task']}, {found['prompts']} prompts x "
        f"{found['group']} samples, temperature {heat:g} ({seconds:.1f} s)",
        "  ± is the standard error over prompts",
        row("reward", found["reward"], f"std within a prompt {found['reward_std'].value:.3g}"),
        row("headroom", found["headroom"], f"E[max of {k}] - E[reward]"),
        row("signal S2", at["s2"], where),
        row("signal / noise", at["snr"], "S2 over the mean squared costate of one sample"),
        row("entropy", found["entropy"], "nats per sampled token"),
        row("sampling gap", found["sampling_gap"], "E|e_y - ē|², embedding of the sampled token"),
        row("replay agreement", found["replay_agreement"], f"of {found['tokens']:,} tokens"),
        row("hop cosine", found["hop_cosine"],
            f"entropy's costates with 0 and {hops} hops, which add {added:.2g} of the norm"),
    ]  # fmt: skip
    if agree < 0.999:
        lines.append("  warning: trainer and replayed noise do not choose the sampled tokens again")
    table = [f"  {'layer':<8}{'costate norm':>14}{'S2':>12}{'± ':>10}{'S2/noise':>10}"]
    step = max(1, -(-last // 12))
    for x in found["layers"]:
        if x["layer"] % step == 0 or x["layer"] in (last, at["layer"]):
            name = "input" if x["layer"] == 0 else str(x["layer"])
            table.append(
                f"  {name:<8}{x['norm'].value:>14.4g}{x['s2'].value:>12.3g}{x['s2'].error:>10.2g}"
                f"{x['snr'].value:>10.3g}"
            )
    return [*lines, *table]


def plain(value: Any) -> Any:
    """JSON has no NaN; an estimate is its value and its error."""
    if isinstance(value, costate.Estimate):
        return {name: plain(x) for name, x in value._asdict().items()}
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
