"""One training run from start to end: data, warm start, RL, report. `python -m vgkern train`."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import torch

from .checkpoint import load_policy, new_policy, save_checkpoint
from .config import Config
from .errors import ConfigError, RunError, TaskError, TrainingError
from .log import Log, clock
from .report import write_report
from .tasks import Entry, Stream, make_task
from .trainer import Trainer
from .warmstart import warm_start

VALIDATION = 256  # prompts that stop the warm start; never those of the evaluation


def train(config: Config) -> Path:
    """Run `config`; returns the output folder."""
    if config.threads > 4 * (os.cpu_count() or 1):  # some thousands of threads end the process
        allowed = f"up to {4 * (os.cpu_count() or 1)} on this machine"
        raise ConfigError(f"threads: got {config.threads}; allowed: {allowed}")
    torch.set_num_threads(config.threads)
    out = free_folder(config)
    try:
        trainer, validation, warm = build(config)
    except ValueError as error:  # a task's or model's own words for a setting it cannot take
        raise ConfigError(str(error)) from error
    print(f"vgkern train: {out}\n{config.show()}", flush=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        log = trainer.log = Log(out)
    except OSError as error:
        reason = f"{out}: {error.strerror}; choose another folder with --out"
        raise ConfigError(f"out: {reason}") from None
    try:
        if config.warming:
            warm_up(trainer, warm, validation)
            save_checkpoint(trainer.policy, trainer.tokenizer, out / "start")
        samples = [evaluate(trainer, 0)]
        reinforce(trainer, out, samples)
        save_checkpoint(trainer.policy, trainer.tokenizer, out / "final")
        print(write_report(out, config, trainer, samples), flush=True)
    except RunError:
        raise
    except ValueError as error:
        raise TrainingError(f"{error} (metrics so far are in {out})") from error
    finally:
        log.close()
    return out


def free_folder(config: Config) -> Path:
    name = f"{config.task.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(config.out) if config.out else Path("runs", name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} holds another run; choose another folder with --out")
    return out


def build(config: Config) -> tuple[Trainer, list[Entry], Stream]:
    """Everything that can fail, before anything is written: data, policy, trainer."""

    def entries(split: str, count: int, exclude: frozenset[str]) -> list[Entry]:
        task = make_task(config.task, config.options, split, config.few_shot)
        return Stream(task, exclude).take(count, distinct=True)

    held_out = entries(f"held out {config.eval_seed}", config.eval_prompts, frozenset())
    exclude = frozenset(entry.question for entry in held_out)
    try:
        validation = entries("validation", VALIDATION, exclude)
    except TaskError:  # a small data set; only a warm start needs more of it
        if config.warming:
            raise
        validation = []
    exclude |= {entry.question for entry in validation}
    task = make_task(config.task, config.options, f"train {config.seed}", config.few_shot)
    demonstrations = make_task(config.task, config.options, f"warm {config.seed}", config.few_shot)
    if config.warming and config.warm_wrong and not hasattr(task, "wrong"):
        raise ConfigError(
            f"warm_wrong: got {config.warm_wrong}; allowed: 0, task {task.name!r} has no teacher"
        )
    policy, tokenizer = load_policy(config.model) if config.model else new_policy(config)
    check = getattr(policy, "check", None)  # what cannot be encoded or is too long, said now
    prompts = [tokenizer.encode(entry.question) for entry in held_out + validation]
    if check is not None:
        check([max(prompts, key=len)], task.max_new)
    stream = Stream(task, exclude)
    trainer = Trainer(config, policy, tokenizer, stream, held_out)
    return trainer, validation, Stream(demonstrations, exclude)


def warm_up(trainer: Trainer, stream: Stream, validation: list[Entry]) -> None:
    config, log = trainer.config, trainer.log
    start = time.perf_counter()

    def report(step: int, loss: float, reached: float) -> None:
        seconds = time.perf_counter() - start
        left = seconds / step * (config.warm_steps - step)
        log.record("warm", step=step, loss=loss, pass_1=reached)
        log.line(
            f"warm start {step:4d}  loss {loss:.3f}  pass@1 {reached:.3f} of {config.warm_target}"
            f"  {clock(seconds)}, at most {clock(left)} left"
        )

    steps, reached = warm_start(
        trainer.policy, trainer.tokenizer, stream, lambda: trainer.evaluate(validation, 1.0)[0],
        target=config.warm_target, wrong=config.warm_wrong, steps=config.warm_steps,
        batch=config.warm_batch, lr=config.warm_lr, seed=config.seed, report=report,
    )  # fmt: skip
    trainer.parts.hold()  # a KL is to the policy that RL starts from
    seconds = time.perf_counter() - start
    log.record("warm_end", step=steps, pass_1=reached, seconds=seconds)


def evaluate(trainer: Trainer, step: int) -> list[str]:
    """Greedy and sampled score on the held-out prompts; returns the greedy completions."""
    start = time.perf_counter()
    greedy, texts = trainer.evaluate(trainer.held_out, 0.0)
    sampled, _ = trainer.evaluate(trainer.held_out, trainer.config.temperature)
    seconds = time.perf_counter() - start
    trainer.log.record("eval", step=step, greedy=greedy, sampled=sampled, seconds=seconds)
    return texts


def reinforce(trainer: Trainer, out: Path, samples: list[list[str]]) -> None:
    """The RL phase: steps, evaluations, checkpoints, one line each time something is known."""
    config, log = trainer.config, trainer.log
    show(trainer, 0, 0.0)
    start = time.perf_counter()
    for step in range(1, config.steps + 1):
        metrics = trainer.step(step)
        log.record("step", **metrics)
        seconds = time.perf_counter() - start
        left = clock(seconds / step * (config.steps - step))
        log.progress(f"step {step}/{config.steps}  reward {metrics['reward']:.3f}  {left} left")
        if step % config.eval_every == 0 or step == config.steps:
            samples[1:] = [evaluate(trainer, step)]
            show(trainer, step, seconds / step * (config.steps - step))
        if config.save_every and step % config.save_every == 0 and step < config.steps:
            save_checkpoint(trainer.policy, trainer.tokenizer, out / f"step-{step:06d}")


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
