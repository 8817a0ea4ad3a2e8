"""`python -m vgkern impact CKPT...`: which of these checkpoints will RL pay from?

Every checkpoint answers the same held-out prompts with the same noise, one of them in memory at a
time. The score is sqrt(signal-to-noise of the value gradient) x headroom(k); what else one could
choose by stands beside it. Intervals are of 90 %, by bootstrap over the prompts. A quarter of the
prompts comes first (32 at least), then half, then all; what is placed clearly does not go on.

A short RL run predicts better and costs more (docs/impact.md).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vgkern import costate
from vgkern.costate import impact
from vgkern.costate.impact_figure import draw_impact
from vgkern.errors import CheckpointError, ConfigError, TrainingError
from vgkern.tasks import Entry, Task
from vgkern.train.checkpoint import find, load_policy
from vgkern.train.impact import Sampling, Spent, measure
from vgkern.train.log import clock
from vgkern.train.policy import encode
from vgkern.train.probe import own_words, plain, staged
from vgkern.train.prompt_costates import depth
from vgkern.train.run import entries_of

from .evaluate import task_for
from .impact_screen import screen
from .vocabulary import vocabulary

LOOKS = (4, 2, 1)  # after one part in so many of the prompts
FEWEST = 32  # of a look before the last: the bootstrap of fewer prompts is too sure of itself


@dataclass
class Checkpoint:
    """One of those asked for, and what is known of it so far."""

    name: str  # as asked for
    weights: str
    layer: int = 0
    layers: int = 0
    found: impact.Measured | None = None
    spent: list[tuple[int, Spent]] = field(default_factory=list)  # prompts, of each look

    @property
    def done(self) -> int:
        return 0 if self.found is None else len(self.found)

    @property
    def seconds(self) -> float:
        return sum(spent.sampling + spent.costates for _, spent in self.spent)

    def share(self, prompts: int, steps: int = 200) -> float:
        """Of the price of an RL run with so many prompts a step, by arithmetic."""
        assert self.found is not None
        total = sum(n for n, _ in self.spent)
        prompt = sum(n * spent.prompt for n, spent in self.spent) / total
        answer = sum(n * spent.answer for n, spent in self.spent) / total
        used = float(impact.mixed(self.found.rewards).double().mean())
        above, group = 1 - self.layer / self.layers, self.found.rewards.shape[1]
        paid = impact.price(prompt, answer, total, group, above, used)
        return paid.share(steps) * total / prompts


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m vgkern impact", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = p.add_argument
    add("models", metavar="CKPT", nargs="+", help="a run, a checkpoint, a Hugging Face name")
    add("--task", help="as of train (that of the first checkpoint's run)")
    add("--task-options", help="as of train (those of that run)")
    add("--few-shot", type=int, help="as of train (that of that run)")
    add("--eval-seed", type=int, help="which held-out prompts (those of that run)")
    add("--prompts", type=int, default=64, help="at most (64)")
    add("--group", type=int, default=8, help="samples of each, 4 or more (8)")
    add("--k", type=int, help="of headroom and pass@k (8, at most the group)")
    add("--right", type=float, default=1.0, help="a reward that pass@1 calls right (1.0)")
    add("--layer", type=int, help="whose residual stream is looked at (the middle one)")
    add("--temperature", type=float, default=1.0, help="of the samples (1.0)")
    add("--seed", type=int, default=0, help="of the samples (0)")
    add("--all-prompts", action="store_true", help="no early stop where the ranking is clear")
    add("--threads", type=int, default=1, help="CPU threads (1)")
    add("--out", help="folder for impact.json and impact.png (runs/impact-TIME)")
    return p


def checked(asked: argparse.Namespace) -> list[Checkpoint]:
    """Whatever can be said before a model is loaded."""
    low = {"prompts": 1, "group": costate.LEAST, "layer": 0, "seed": 0, "threads": 1}
    for name, least in low.items():
        value = getattr(asked, name)
        if value is not None and value < least:
            why = " (a pair needs two other rewards as baseline)" if name == "group" else ""
            raise ConfigError(f"--{name}: got {value}; allowed: >= {least}{why}")
    asked.k = min(8, asked.group) if asked.k is None else asked.k
    if not 1 <= asked.k <= asked.group:
        raise ConfigError(f"--k: got {asked.k}; allowed: 1 to --group, {asked.group}")
    if not 1e-3 <= asked.temperature < math.inf:
        raise ConfigError(f"--temperature: got {asked.temperature}; allowed: >= 0.001, finite")
    twice = [name for name in asked.models if asked.models.count(name) > 1]
    if twice:
        raise ConfigError(f"CKPT: got {twice[0]} twice; allowed: each once")
    found, sizes = [], {}
    for name in asked.models:
        try:
            weights, _ = find(name)
            sizes[name] = vocabulary(weights)
        except CheckpointError as error:
            raise ConfigError(f"CKPT {name}: {error}") from None
        found.append(Checkpoint(name, weights))
    known = {name: size for name, size in sizes.items() if size is not None}
    for name, size in known.items():
        first = next(iter(known))
        if size != known[first]:
            raise _other_vocabulary(name, first, f"{size} tokens, not {known[first]}")
    return found


def _other_vocabulary(name: str, first: str, what: str) -> ConfigError:
    return ConfigError(
        f"CKPT {name}: its vocabulary is not that of {first} ({what}), and a costate per token is "
        f"not comparable; allowed: checkpoints of one tokenizer"
    )


def main(arguments: list[str]) -> None:
    """Raises RunError (a flag, a task, a file that will not do) with the whole message."""
    asked, start = parser().parse_args(arguments), time.perf_counter()
    checkpoints = checked(asked)
    out = Path(asked.out or f"runs/impact-{time.strftime('%Y%m%d-%H%M%S')}")
    if (out / "impact.json").exists():
        raise ConfigError(f"--out: {out} holds another impact.json; choose another folder")
    torch.set_num_threads(asked.threads)
    with own_words():
        task, given = task_for(find(asked.models[0])[1], asked, asked.models[0])
        entries = entries_of(task, asked.prompts)
    study = Study(asked, task, entries, checkpoints)
    with staged(out) as folder:
        with own_words():
            study.run()
        told = {**vars(asked), **given, "prompts": len(entries), **study.told(),
                "seconds": time.perf_counter() - start}  # fmt: skip
        print("\n".join(screen(told)), flush=True)
        if not any(c["used"] for c in told["checkpoints"]):
            raise TrainingError(str(study.error))
        (folder / "impact.json").write_text(json.dumps(plain(told), indent=1) + "\n")
        try:
            draw_impact(told, folder / "impact.png")
            picture = "impact.png"
        except ModuleNotFoundError as error:
            picture = f"impact.png is not drawn: {error}"
    print(f"{out}/: impact.json, by prompt; {picture}", flush=True)


class Study:
    """The checkpoints, measured look by look until their order is clear."""

    def __init__(
        self, asked: argparse.Namespace, task: Task, entries: list[Entry],
        checkpoints: list[Checkpoint],
    ) -> None:  # fmt: skip
        self.asked, self.task, self.entries = asked, task, entries
        self.checkpoints = checkpoints
        self.sampling = Sampling(asked.group, asked.temperature, asked.seed)
        self.ranking: impact.Ranking | None = None
        self.error: ValueError | None = None  # why there is none
        self.like: tuple[str, dict[str, Any]] | None = None  # the first, its vocabulary
        early = len(checkpoints) > 1 and not asked.all_prompts
        counts = {-(-len(entries) // part) for part in (LOOKS if early else (1,))}
        self.counts = [n for n in sorted(counts) if n >= FEWEST or n == len(entries)]

    def run(self) -> None:
        progress, going = Progress(len(self.checkpoints) * len(self.entries)), self.checkpoints
        for count in self.counts:
            for number, checkpoint in enumerate(going, 1):
                progress.at = f"{checkpoint.name} ({number} of {len(going)})"
                self.look(checkpoint, range(checkpoint.done, count), progress)
            found = {c.name: c.found for c in self.checkpoints if c.found is not None}
            try:
                odds = impact.ODDS / len(self.counts)  # each look is a chance to be wrong
                self.ranking, self.error = impact.rank(found, self.asked.k, odds), None
            except ValueError as error:
                self.ranking, self.error = None, error
                continue
            going = [c for c in self.checkpoints if c.name in self.ranking.open]
            if not going and not self.asked.all_prompts:
                break
        progress.end()

    def look(self, checkpoint: Checkpoint, some: range, progress: Progress) -> None:
        """Load it, measure these prompts, let go of it."""
        try:
            policy, tokenizer = load_policy(checkpoint.weights)
            checkpoint.layers = depth(policy)
        except (ValueError, CheckpointError) as error:
            raise ConfigError(f"CKPT {checkpoint.name}: {error}") from None
        layer = (checkpoint.layers + 1) // 2 if self.asked.layer is None else self.asked.layer
        if layer > checkpoint.layers:
            allowed = f"0 (input) to {checkpoint.layers}, the layers of {checkpoint.name}"
            raise ConfigError(f"--layer: got {layer}; allowed: {allowed}")
        checkpoint.layer = layer
        prompts = [encode(tokenizer, entry.question) for entry in self.entries]
        check = getattr(policy, "check", None)  # too long for the model: said now
        if check is not None:
            check([max(prompts, key=len)], self.task.max_new)
        here = {"rows of the head": len(policy.head().weight), "ends": tokenizer.stops,
                "ids of the prompts": prompts}  # fmt: skip
        first, there = self.like = self.like or (checkpoint.name, here)
        other = [what for what in here if here[what] != there[what]]
        if other:
            raise _other_vocabulary(checkpoint.name, first, f"other {other[0]}")
        found, spent = measure(
            policy, tokenizer, self.task, self.entries, some, layer, self.sampling, progress.show
        )
        del policy, check
        gc.collect()  # hooks and closures may hold a model in a cycle
        progress.past += len(some)
        checkpoint.spent.append((len(some), spent))
        before = checkpoint.found
        checkpoint.found = found if before is None else before.and_then(found)

    def told(self) -> dict[str, Any]:
        """All that was found, as JSON can hold it; best first."""
        rows, pairs = [], () if self.ranking is None else self.ranking.pairs
        for c in self.checkpoints:
            assert c.found is not None
            scored = impact.scores(c.found, self.asked.k, self.asked.right)
            rows.append({
                "name": c.name, "weights": c.weights, "layer": c.layer, "layers": c.layers,
                "place": None if self.ranking is None else list(self.ranking.places[c.name]),
                "stop": impact.stop_sign(c.found, scored),
                "scores": {name: x._asdict() for name, x in scored.items()},
                "prompts": c.done, "used": int(impact.mixed(c.found.rewards).sum()),
                "seconds": c.seconds, "share_of_200_steps": c.share(len(self.entries)),
                "by_prompt": self.by_prompt(c.found),
            })  # fmt: skip
        if self.ranking is not None:
            order = self.ranking.order
            rows.sort(key=lambda row: order.index(row["name"]))
        return {"checkpoints": rows, "pairs": [pair._asdict() for pair in pairs],
                "clear": self.ranking is not None and self.ranking.clear}  # fmt: skip

    def by_prompt(self, found: impact.Measured) -> list[dict[str, Any]]:
        room = costate.headroom(found.rewards, self.asked.k)
        columns = {"s2": found.s2, "power": found.power, "naive": found.naive, "headroom": room,
                   "square": found.square, "surprise": found.surprise,
                   "tokens": found.tokens}  # fmt: skip
        rewards = found.rewards.tolist()
        return [
            {"question": self.entries[i].question, "rewards": rewards[i],
             **{name: float(column[i]) for name, column in columns.items()}}
            for i in range(len(found))
        ]  # fmt: skip


class Progress:
    """A line with the time left, at most: the ranking may be clear before."""

    def __init__(self, of: int) -> None:
        self.of, self.past, self.at = of, 0, ""
        self.start = self.said = time.perf_counter()

    def show(self, done: int) -> None:
        now, screen, done = time.perf_counter(), sys.stderr.isatty(), self.past + done
        if now - self.said < (0.2 if screen else 20):
            return
        self.said = now
        left = clock((now - self.start) / done * (self.of - done))
        line = f"{self.at}: {done}/{self.of} prompts, at most {left} left"
        print(f"\r\x1b[2K{line}" if screen else line, end="" if screen else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
