"""Group-relative policy optimization, on the fused ops of `vgkern` and nothing else.

    sample G completions of P prompts         generate -> vgkern.linear_sample
    score them                                task.score
    compare within each group                 vgkern.group_advantages
    drop groups whose samples all agree       their gradient is exactly zero
    hidden states of what was sampled         policy.hidden: each prefix forwarded once
    loss and its gradient, never [N, V]       vgkern.linear_policy_loss (`update.py`)
    clip, step                                AdamW

A step that is not finite never reaches the weights. Sampler and trainer must agree on the log-prob
of every token (`sampler_gap`) and, given the noise it was drawn with, on the token (`replay`):
disagreement is how masking, cache and position bugs show.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern.errors import TrainingError
from vgkern.tasks import Entry, Reward, Stream, Task

from .config import Config
from .device import LIMITS, fits, where
from .generate import Rollout, decode, generate, score
from .log import Log
from .policy import Policy, Tokenizer, encode
from .state import dump_random, load_random
from .teacher import load_teacher
from .update import Batch, Update, extreme, make_objective, merge, read

LAST = ("clip_low", "clip_high", "dual_clip", "ratio_mean", "ratio_min", "ratio_max", "kl",
        "distill", "grad_norm")  # fmt: skip
SKIPS = 5  # consecutive non-finite steps before the run is given up
EVAL_KEY = 1 << 32  # added to the seed: evaluation draws its own noise


class Trainer:
    """Holds the policy, its optimizer and the data stream; `step` is one RL step."""

    log: Log  # set when the run's folder is known to be free

    def __init__(
        self,
        config: Config,
        policy: Policy,
        tokenizer: Tokenizer,
        stream: Stream,
        held_out: list[Entry],
    ) -> None:
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.stream, self.held_out = stream, held_out
        self.task: Task = stream.task
        self.limits = LIMITS[where(policy).dtype]
        self.objective = make_objective(config, where(policy).dtype)
        prompts = [encode(tokenizer, entry.question) for entry in held_out]
        teacher = load_teacher(config, policy, tokenizer, prompts, self.task.max_new)
        self.parts = Update(config, policy, teacher, self.objective)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), config.lr, betas=(0.9, 0.95),
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self.shuffle = random.Random(f"shuffled rewards/{config.seed}")
        self.skipped = self.skipped_in_a_row = 0
        self.gap: float | None = None  # the largest of the run; None: nothing compared yet
        self.replay: float | None = None  # the smallest of the run, likewise
        self.reward_parts: dict[str, float] = {}  # of the last step, by the task's own names
        self.stepped = False  # have the weights moved since the step began?

    def edge(self) -> dict[str, Any]:
        """What a step changes beside weights and optimizer, as it is between two steps."""
        names = ("skipped", "skipped_in_a_row", "gap", "replay")
        kept = {name: getattr(self, name) for name in names}
        return {**kept, "cursor": self.stream.cursor, "shuffle": dump_random(self.shuffle)}

    def back_to(self, edge: dict[str, Any]) -> None:
        for name in ("skipped", "skipped_in_a_row", "gap", "replay"):
            setattr(self, name, edge[name])
        self.stream.cursor = edge["cursor"]
        load_random(self.shuffle, edge["shuffle"])

    def step(self, index: int) -> dict[str, Any]:
        """Sample, score, update; returns the step's metrics."""
        self.stepped, config = False, self.config
        rate = self.learning_rate(index)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        t0 = time.perf_counter()
        with fits("prompts", config.prompts, "or group, or a task's max_new"):
            entries, prompts, rollout = self.sample(index)
        t1 = time.perf_counter()
        rewards = self.score(entries, rollout)
        taught = ~rewards.isnan()
        batch = self.batch(prompts, rollout, rewards)
        t2 = time.perf_counter()
        skipped, every = self.skipped, config.replay_every
        self.parts.replay = bool(every) and (index - 1) % every == 0
        with fits("micro_prompts", config.micro_prompts or config.prompts, "prompts at a time"):
            metrics = self.update(batch) if batch.prompts else {"loss": 0.0, "grad_norm": 0.0}
        if self.skipped == skipped:
            self.skipped_in_a_row = 0
        t3 = time.perf_counter()
        return {
            **metrics,  # of what was trained on: groups without a gradient are not among it
            "step": index,
            "reward": float(rewards[taught].mean()) if taught.any() else 0.0,
            **self.reward_parts,
            **({} if taught.all() else {"taught": float(taught.float().mean())}),
            "groups_used": len(batch.prompts),
            "tokens": int(rollout.lengths.sum()),
            "length": float(rollout.lengths.float().mean()),
            "cut_off": float((~rollout.finished).float().mean()),
            "lr": rate,
            "skipped": self.skipped,
            "ms_rollout": 1e3 * (t1 - t0),
            "ms_score": 1e3 * (t2 - t1),
            "ms_update": 1e3 * (t3 - t2),
        }

    def learning_rate(self, index: int) -> float:
        """Linear warm-up, then linear to `lr_final` of it at the last step."""
        config = self.config
        warm = min(1.0, index / max(1, config.lr_warmup))
        progress = max(0.0, (index - config.lr_warmup) / max(1, config.steps - config.lr_warmup))
        return config.lr * warm * (1 + (config.lr_final - 1) * progress)

    def sample(self, index: int) -> tuple[list[Entry], list[list[int]], Rollout]:
        config = self.config
        entries = self.stream.take(config.prompts)
        prompts = [encode(self.tokenizer, entry.question) for entry in entries]
        rows = config.prompts * config.group
        rollout = generate(
            self.policy, prompts, self.tokenizer.stops,
            group=config.group, max_new=self.task.max_new, temperature=config.temperature,
            seed=config.seed, sequence=torch.arange(index * rows, (index + 1) * rows),
        )  # fmt: skip
        return entries, prompts, rollout

    def score(self, entries: list[Entry], rollout: Rollout) -> Tensor:  # [R], NaN: teaches nothing
        config = self.config
        texts = decode(rollout, self.tokenizer)
        given = self.graded(texts, entries, rollout, config.cut_off)
        named = {name for reward in given for name in reward.parts}
        self.reward_parts = {
            f"reward_{name}": statistics.fmean(r.parts[name] for r in given if name in r.parts)
            for name in sorted(named)
        }
        if late := sum(reward.late for reward in given):
            self.reward_parts["late"] = late
        rewards = [reward.value for reward in given]
        if config.shuffle_rewards:
            self.shuffle.shuffle(rewards)
        return torch.tensor(rewards)

    def graded(
        self, texts: list[str], entries: list[Entry], rollout: Rollout, cut_off: str
    ) -> list[Reward]:
        config = self.config
        given = score(self.task, texts, entries, rollout, cut_off, config.cut_off_value,
                      config.score_seconds)  # fmt: skip
        for row, reward in enumerate(given):
            if reward.late:
                question = entries[row * len(entries) // len(given)].question
                self.log.line(
                    f"warning: task {self.task.name!r} took more than {config.score_seconds:g} s "
                    f"over {texts[row]!r}, question {question!r}: scored as an empty answer"
                )
        return given

    def batch(self, prompts: list[list[int]], rollout: Rollout, rewards: Tensor) -> Batch:
        """Advantages, and the groups that have any (all of them when a KL term does).

        A sample without a reward (NaN) is neither in its group's mean nor in the loss, and so is
        one that is left alone in its group.
        """
        count, group = len(prompts), self.config.group
        ids = torch.arange(count).repeat_interleave(group)
        teaches = ~rewards.isnan()
        teaches &= (teaches.view(count, group).sum(1) > 1).repeat_interleave(group)
        advantages = torch.zeros_like(rewards)
        if bool(teaches.all()):
            advantages = self.advantages(rewards, ids)
        elif bool(teaches.any()):
            rollout = rollout._replace(teaches=teaches)
            advantages[teaches] = self.advantages(rewards[teaches], ids[teaches])
        kept = (advantages.view(count, group) != 0).any(1)
        if self.parts.everywhere:
            kept = teaches.view(count, group).any(1)
        rows = kept.repeat_interleave(group).nonzero()[:, 0]
        return Batch(
            [prompt for prompt, keep in zip(prompts, kept.tolist(), strict=True) if keep],
            rollout.select(rows),
            advantages[rows],
            self.normalizer(rollout),
        )

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        estimator = self.objective.advantage
        found = vgkern.group_advantages(rewards, groups, estimator=estimator)
        return self.config.reward_coef * found

    def normalizer(self, rollout: Rollout) -> float:
        """The denominator of the objective's reduction over *all* sampled rows that teach."""
        lengths = rollout.lengths if rollout.teaches is None else rollout.lengths[rollout.teaches]
        rows = len(lengths)
        return {
            "token": float(lengths.sum()),
            "seq": float(rows),
            "seq_sum": float(rows),
            "fixed": float(rows * (self.objective.max_length or self.task.max_new)),
            "sum": 1.0,
        }[self.objective.reduction]

    def update(self, batch: Batch) -> dict[str, float]:
        """`updates_per_batch` optimizer steps on one batch. Metrics are the first pass's, but for
        what only shows once the policy has moved (`LAST`), which are the last pass's."""
        first: dict[str, float] = {}
        for repeat in range(self.config.updates_per_batch):
            metrics = self.gradient(batch, first_pass=repeat == 0)
            metrics.setdefault("grad_norm", math.nan)
            finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
            if first:
                first.update({name: metrics[name] for name in LAST if name in metrics})
            else:
                first = dict(metrics)
            if not self.allowed(finite):
                self.keep(batch, metrics)
                break
            self.check_replay(first.get("replay"))
            self.check_gap(first["sampler_gap"])
            self.stepped = True
            torch.nn.utils.clip_grads_with_norm_(
                self.policy.parameters(), self.config.grad_clip or math.inf, self.norm
            )
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return first

    def keep(self, batch: Batch, metrics: dict[str, float]) -> None:
        """The batch of a skipped step, to look at; of the first few only."""
        path = self.log.folder / f"skipped-{self.skipped}.json"
        if self.skipped > SKIPS:
            return
        rollout, texts = batch.rollout, decode(batch.rollout, self.tokenizer)
        rows = [
            {"prompt": self.tokenizer.decode(batch.prompts[row // self.config.group]),
             "completion": text, "advantage": float(batch.advantages[row]),
             "logp": [float(x) for x in rollout.logp[row, : rollout.lengths[row]]]}
            for row, text in enumerate(texts)
        ]  # fmt: skip
        shown = {name: metrics[name] for name in ("loss", "grad_norm") if name in metrics}
        try:
            path.write_text(json.dumps({"metrics": {k: str(v) for k, v in shown.items()},
                                        "normalizer": batch.normalizer, "rows": rows}))  # fmt: skip
        except OSError as error:
            self.log.line(f"warning: {path.name}: {error.strerror}")

    def gradient(self, batch: Batch, first_pass: bool) -> dict[str, float]:
        """Accumulate the gradient over micro-batches of whole groups; the sum is exact. The
        host waits for the device once, for all numbers together."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        try:
            for prompts, rollout, advantages in self.micro_batches(batch):
                share = len(prompts) / len(batch.prompts)
                part = (prompts, rollout, advantages, batch.normalizer)
                loss, metrics = self.parts.loss(*part, first_pass, share)
                loss.backward()
                parts.append({"loss": loss.detach(), **metrics})
                del loss  # and with it its graph, before the next is made
        except vgkern.NonFiniteError:
            return {"loss": math.nan, "sampler_gap": math.nan, "grad_norm": math.nan}
        grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(grads)
        *found, last = read(*parts, {"grad_norm": self.norm})
        return {**merge(found, self.parts.analytic), **last}

    def micro_batches(self, batch: Batch) -> Iterator[tuple[list[list[int]], Rollout, Tensor]]:
        size, group = self.config.micro_prompts or len(batch.prompts), self.config.group
        for start in range(0, len(batch.prompts), size):
            prompts = batch.prompts[start : start + size]
            rows = torch.arange(start * group, (start + len(prompts)) * group)
            yield prompts, batch.rollout.select(rows), batch.advantages[rows]

    def allowed(self, finite: bool) -> bool:
        """May this gradient reach the weights? Gives up after `SKIPS` in a row that may not."""
        if finite:
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.log.line(f"step skipped: loss or gradient is not finite ({self.skipped} so far)")
        if self.skipped_in_a_row >= SKIPS:
            raise TrainingError(
                f"{SKIPS} steps in a row had a loss or gradient that is not finite; the weights "
                f"are those of the last good step"
            )
        return False

    def check_gap(self, gap: float) -> None:
        if not gap <= self.limits.gap_error:  # NaN is no agreement
            raise TrainingError(
                f"sampler and trainer disagree on a token's log-prob by {gap:.2e} (allowed: "
                f"{self.limits.gap_error}); padding, positions or the head differ between the two"
            )
        warn = self.limits.gap_warn
        if gap > warn and (self.gap or 0.0) <= warn:
            self.log.line(f"warning: sampler and trainer disagree by {gap:.2e} (above {warn})")
        self.gap = extreme(max, [self.gap or 0.0, gap])

    def check_replay(self, replay: float | None) -> None:
        if replay is None:
            return
        warn = self.limits.replay_warn
        if replay < warn <= (1.0 if self.replay is None else self.replay):
            self.log.line(
                f"warning: {replay:.2%} of the sampled tokens are chosen again by their own noise "
                f"(below {warn:.1%}): the sampler has other weights, another temperature, "
                f"truncation or precision than the trainer"
            )
        self.replay = extreme(min, [1.0 if self.replay is None else self.replay, replay])

    def evaluate(self, entries: list[Entry], temperature: float) -> tuple[float, list[str]]:
        """Mean score of one completion per entry, and the completions. 0 is greedy.

        The noise is the same at every evaluation, so two checkpoints are compared on the same luck.
        """
        rollout = generate(
            self.policy, [encode(self.tokenizer, entry.question) for entry in entries],
            self.tokenizer.stops, group=1, max_new=self.task.max_new, temperature=temperature,
            seed=self.config.seed + EVAL_KEY, sequence=torch.arange(len(entries)),
        )  # fmt: skip
        texts = decode(rollout, self.tokenizer)
        how = "value" if self.config.cut_off == "value" else "score"  # of a mask nothing is left
        given = self.graded(texts, entries, rollout, how)
        rewards = [reward.value for reward in given if not math.isnan(reward.value)]
        return sum(rewards) / max(1, len(rewards)), texts
