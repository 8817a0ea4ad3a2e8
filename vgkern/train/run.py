"""One training run from start to end: data, warm start, RL, report. `python -m vgkern train`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from vgkern.errors import ConfigError, RunError, TaskError, TrainingError
from vgkern.tasks import Entry, Stream, Task, make_task, question_key
from vgkern.tasks.own import JsonlTask, from_python

from .checkpoint import find as find_weights
from .checkpoint import load_policy, new_policy, save_checkpoint
from .config import Config
from .device import place, put, where
from .interrupt import Interruption
from .log import Log, clock
from .model import Decoder
from .policy import encode
from .report import write_report
from .state import Keeper, find, read, restore
from .track import Tracker, importable
from .trainer import Trainer
from .warmstart import CHECK_EVERY, WarmStart

VALIDATION = 256  # prompts that stop the warm start; never those of the evaluation


def train(config: Config, resume: Path | None = None, *, task: Any = None) -> Path:
    """Run `config`; returns the output folder. resume: the folder of a run that was interrupted,
    which goes on from its newest whole state, bit for bit as if nothing had happened. task: an
    object in place of `config.task` (`task[i]` gives question and answer, `score(text, entry)` a
    number), or a function of a split's seed ("held out 0", "train 0") that makes one.

    SIGINT and SIGTERM save a state at the next step's edge and raise `Stopped`.
    """
    if config.threads > 4 * (os.cpu_count() or 1):  # some thousands of threads end the process
        allowed = f"up to {4 * (os.cpu_count() or 1)} on this machine"
        raise ConfigError(f"threads: got {config.threads}; allowed: {allowed}")
    torch.set_num_threads(config.threads)
    if config.track:
        importable(config.track)  # said before anything is made
    out = free_folder(config) if resume is None else resume
    state, notes = (None, []) if resume is None else find(resume)
    try:
        trainer, validation, demonstrations = build(config, task)
    except ValueError as error:  # a task's or model's own words for a setting it cannot take
        raise ConfigError(str(error)) from error
    print(f"vgkern train: {out}\n{config.show()}", flush=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if state is None:
            (out / "config.json").write_text(
                json.dumps(dataclasses.asdict(config), indent=2) + "\n"
            )
        log = trainer.log = Log(out, place=None if state is None else read(state)["log"])
    except OSError as error:
        reason = f"{out}: {error.strerror}; choose another folder with --out"
        raise ConfigError(f"out: {reason}") from None
    if config.model and resume is None and (Path(config.model).parent / "state").is_dir():
        log.line(f"a new run from these weights; --resume {Path(config.model).parent} would go on")
    if config.track:
        log.tracker = Tracker(config.track, out, config, log.line)
    for note in notes:
        log.line(f"not resumed from {note}")
    try:
        with Interruption() as interruption:
            run = Run(config, out, trainer, Keeper(out, config.state_every), interruption)
            run.go(state, validation, demonstrations)
    except RunError:
        raise
    except ValueError as error:
        raise TrainingError(f"{error} (metrics so far are in {out})") from error
    finally:
        log.close()
    return out


def free_folder(config: Config) -> Path:
    task = re.sub(r"[^\w.-]+", "-", config.task.rpartition("/")[2])
    name = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(config.out) if config.out else Path("runs", name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} holds another run; choose another folder with --out")
    return out


def entries_of(task: Task, count: int, exclude: frozenset[str] = frozenset()) -> list[Entry]:
    """Different questions of a split: `count`, or what data that ends have for it."""
    there = getattr(task, "count", None)
    if there is not None:  # of a task that does not split itself a part is to train on
        count = min(count, there if isinstance(task, JsonlTask) else max(1, there // 10))
    return Stream(task, exclude).take(count, distinct=True)


def build(config: Config, own: Any = None) -> tuple[Trainer, list[Entry], Stream]:
    """Everything that can fail, before anything is written: data, policy, trainer."""

    def make(split: str) -> Task:
        if own is not None:
            return from_python(own, split)
        return make_task(config.task, config.options, split, config.few_shot)

    def entries(split: str, count: int, exclude: frozenset[str]) -> list[Entry]:
        return entries_of(make(split), count, exclude)

    held_out = entries(f"held out {config.eval_seed}", config.eval_prompts, frozenset())
    exclude = frozenset(question_key(entry.question) for entry in held_out)
    try:
        validation = entries("validation", VALIDATION, exclude)
    except TaskError:  # a small data set; only a warm start needs more of it
        if config.warming:
            raise
        validation = []
    exclude |= {question_key(entry.question) for entry in validation}
    task, demonstrations = make(f"train {config.seed}"), make(f"warm {config.seed}")
    if config.warming and config.warm_wrong and not hasattr(task, "wrong"):
        raise ConfigError(
            f"warm_wrong: got {config.warm_wrong}; allowed: 0, task {task.name!r} has no teacher"
        )
    if config.model:
        policy, tokenizer = load_policy(find_weights(config.model)[0], config.line, config.chat)
    else:
        policy, tokenizer = new_policy(config)
    put(policy, place(config.device, config.dtype, own=isinstance(policy, Decoder)))
    check = getattr(policy, "check", None)  # what cannot be encoded or is too long, said now
    whole = task.entries if isinstance(task, JsonlTask) else []  # of a file every question
    known = held_out + validation + whole
    prompts = [encode(tokenizer, entry.question) for entry in known]
    if check is not None:
        check([max(prompts, key=len)], task.max_new)
    stream = Stream(task, exclude)
    trainer = Trainer(config, policy, tokenizer, stream, held_out)
    return trainer, validation, Stream(demonstrations, exclude)


def evaluate(trainer: Trainer, step: int) -> list[str]:
    """Greedy and sampled score on the held-out prompts; returns the greedy completions."""
    start = time.perf_counter()
    greedy, texts = trainer.evaluate(trainer.held_out, 0.0)
    sampled, _ = trainer.evaluate(trainer.held_out, trainer.config.temperature)
    seconds = time.perf_counter() - start
    trainer.log.record("eval", step=step, greedy=greedy, sampled=sampled, seconds=seconds)
    return texts


class Run:
    """What happens between a run's two ends, with a state to go on from at any edge of a step."""

    def __init__(
        self, config: Config, out: Path, trainer: Trainer, keeper: Keeper,
        interruption: Interruption,
    ) -> None:  # fmt: skip
        self.config, self.out, self.trainer = config, out, trainer
        self.keeper, self.interruption = keeper, interruption
        self.samples: list[list[str]] = []  # greedy completions: before RL, and the last

    def go(self, state: Path | None, validation: list[Entry], demonstrations: Stream) -> None:
        found = None if state is None else read(state)
        start, trainer, config = self.out / "start", self.trainer, self.config
        if config.warming and (found is None or found["phase"] == "warm"):
            self.warm_up(demonstrations, validation, state)
            if not start.exists():  # a killed run may have come as far
                save_checkpoint(trainer.policy, trainer.tokenizer, start)
            found = None
        step, measured = 0, False
        if state is not None and found is not None:
            if config.warming and config.beta:  # the KL is to where RL started
                reference = trainer.parts.reference = load_policy(str(start))[0]
                put(reference, where(trainer.policy))
            restore(trainer, state)
            step, measured = found["number"], found["measured"]
            self.samples = found["samples"]
            trainer.log.line(f"going on from step {step}")
        if not measured:
            self.measure(step, 0.0)
        self.reinforce(step)
        save_checkpoint(trainer.policy, trainer.tokenizer, self.out / "final")
        try:
            print(write_report(self.out, config, trainer, self.samples), flush=True)
        except OSError as error:
            raise TrainingError(f"the report was not written: {error}; final/ was") from error
        shutil.rmtree(self.keeper.folder, ignore_errors=True)  # nothing is left to go on with

    def edge(self, phase: str, number: int, **more: Any) -> None:
        """Between two steps: save a state if it is time; end the run if it was asked to."""
        if self.interruption.signal is None and not self.keeper.due(number):
            return
        saved = self.keeper.save(self.trainer, phase, number, **more)
        self.interruption.end(f"{phase} {number}", self.out if saved else None)

    def warm_up(self, demonstrations: Stream, validation: list[Entry], state: Path | None) -> None:
        trainer, config, log = self.trainer, self.config, self.trainer.log
        start = time.perf_counter()
        warm = WarmStart(
            trainer.policy, trainer.tokenizer, demonstrations,
            lambda: trainer.evaluate(validation, 1.0)[0], target=config.warm_target,
            wrong=config.warm_wrong, steps=config.warm_steps, batch=config.warm_batch,
            lr=config.warm_lr, seed=config.seed,
        )  # fmt: skip
        if state is not None:
            found = restore(trainer, state, warm.optimizer)
            warm.back_to(found["number"], found["warm"])
            log.line(f"going on from warm start {warm.step}")
        first = warm.step
        for loss in warm:
            seconds = time.perf_counter() - start
            if warm.step % CHECK_EVERY == 0:
                left = seconds / (warm.step - first) * (config.warm_steps - warm.step)
                log.record("warm", step=warm.step, loss=loss, pass_1=warm.reached)
                log.line(
                    f"warm start {warm.step:4d}  loss {loss:.3f}  pass@1 {warm.reached:.3f} of "
                    f"{config.warm_target}  {clock(seconds)}, at most {clock(left)} left"
                )
            self.edge("warm", warm.step, warm=warm.edge(), optimizer=warm.optimizer)
        trainer.parts.hold()  # a KL is to the policy that RL starts from
        seconds = time.perf_counter() - start
        log.record("warm_end", step=warm.step, pass_1=warm.reached, seconds=seconds)

    def reinforce(self, done: int) -> None:
        """Steps, evaluations, checkpoints, one line each time something is known."""
        trainer, config, log = self.trainer, self.config, self.trainer.log
        start = time.perf_counter()
        for step in range(done + 1, config.steps + 1):
            self.edge("step", step - 1, samples=self.samples, measured=True)
            metrics = self.step(step)
            log.record("step", **metrics)
            seconds = (time.perf_counter() - start) / (step - done) * (config.steps - step)
            left = clock(seconds)
            log.progress(f"step {step}/{config.steps}  reward {metrics['reward']:.3f}  {left} left")
            if config.save_every and step % config.save_every == 0 and step < config.steps:
                folder = self.out / f"step-{step:06d}"
                if not (done and folder.exists()):  # one that went on writes the same again
                    save_checkpoint(trainer.policy, trainer.tokenizer, folder)
            if step % config.eval_every == 0 or step == config.steps:
                self.measure(step, seconds)

    def measure(self, step: int, left: float) -> None:
        """Evaluate; a task that fails in it leaves a state that evaluates first."""
        try:
            texts = evaluate(self.trainer, step)
        except Exception:
            self.save(step, measured=False)
            raise
        self.samples[1 if step else 0 :] = [texts]
        show(self.trainer, step, left)

    def step(self, step: int) -> dict[str, Any]:
        """One that fails before it moved the weights leaves the state of its beginning."""
        edge = self.trainer.edge()
        try:
            return self.trainer.step(step)
        except Exception:
            if not self.trainer.stepped:
                self.trainer.back_to(edge)
                self.save(step - 1, measured=True)
            raise

    def save(self, step: int, measured: bool) -> None:
        more = {"samples": self.samples, "measured": measured}
        self.keeper.save(self.trainer, "step", step, **more)


def show(trainer: Trainer, step: int, left: float) -> None:
    log, steps = trainer.log, trainer.config.steps
    last, recent = log.of("eval")[-1], log.of("step")[-trainer.config.eval_every :]
    text = f"step {step:4d}/{steps}  greedy {last['greedy']:.3f}  sampled {last['sampled']:.3f}"
    if recent:
        mean = {
            name: sum(record[name] for record in recent) / len(recent)
            for name in ("reward", "ms_rollout", "ms_score", "ms_update")
        }
        text += (
            f"  reward {mean['reward']:.3f}  ms/step {mean['ms_rollout']:.0f} rollout"
            f" + {mean['ms_score']:.0f} score + {mean['ms_update']:.0f} update"
            f"  {clock(left)} left"
        )
    log.line(text)
