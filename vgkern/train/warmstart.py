"""Supervised warm start, stopped by what the model can do and not by a step count.

With `wrong` > 0 that share of the demonstrations comes from a teacher who is wrong in one
consistent way (sorts descending, copies instead of reversing, forgets carries). RL from there
*elicits* a skill that was in the minority of the demonstrations; it does not teach a new one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern.errors import TrainingError
from vgkern.tasks import Entry, Question, Stream

from .device import of, precision
from .policy import Policy, Tokenizer, encode
from .state import dump_random, load_random

CHECK_EVERY = 20  # steps; a check costs about a fifth of a step
LR_WARMUP = 30


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ragged ids to [R, w] and lengths [R]."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), lengths


def demonstrate(task: Any, entry: Entry, wrong: float, rng: random.Random) -> str:
    return task.wrong(entry) if rng.random() < wrong else entry.answer


def supervised_loss(
    policy: Policy, tokenizer: Tokenizer, pairs: list[tuple[Question, str]]
) -> Tensor:
    """Mean negative log-prob of the answers' tokens, end of sequence included."""
    prompts = [encode(tokenizer, question) for question, _ in pairs]
    answers = [[*tokenizer.encode(answer), tokenizer.stops[0]] for _, answer in pairs]
    tokens, lengths = pad(answers)
    targets = tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], -100)
    with precision(policy):
        hidden, head = policy.hidden(prompts, tokens, 1, lengths), policy.head()
        logp = vgkern.linear_token_logprobs(
            hidden, head.weight, targets.to(of(policy)), bias=head.bias, softcap=head.softcap
        ).logp
    return -logp.sum() / int(lengths.sum())


class WarmStart:
    """One step at a time, until `measure()` reaches `target`; all its state is `step`, `reached`,
    `rng`, the optimizer and the stream's cursor."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: Tokenizer,
        stream: Stream,
        measure: Callable[[], float],  # sampled pass@1 on validation prompts
        *,
        target: float,
        wrong: float,
        steps: int,
        batch: int,
        lr: float,
        seed: int,
    ) -> None:
        task = stream.task
        if wrong and not hasattr(task, "wrong"):
            raise ValueError(
                f"warm_wrong: got {wrong}; allowed: 0, task {task.name!r} has no teacher"
            )
        self.policy, self.tokenizer, self.stream, self.measure = policy, tokenizer, stream, measure
        self.target, self.wrong, self.steps, self.batch, self.lr = target, wrong, steps, batch, lr
        self.rng = random.Random(f"warm start/{seed}")
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self.step, self.reached = 0, 0.0

    def __iter__(self) -> Iterator[float]:
        """Trains; yields the loss after every step. Raises TrainingError when `steps` are not
        enough."""
        while self.step < self.steps and not (self.step and self.reached >= self.target):
            self.step += 1
            loss = self.advance()
            if self.step % CHECK_EVERY == 0:
                self.reached = self.measure()
            yield loss
        if self.reached < self.target:
            raise TrainingError(
                f"warm_target: sampled pass@1 reached {self.reached:.3f} of {self.target} in "
                f"{self.steps} steps; lower --warm-target, or raise --warm-steps"
            )

    def advance(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.step / LR_WARMUP)
        entries, task = self.stream.take(self.batch), self.stream.task
        pairs = [(e.question, demonstrate(task, e, self.wrong, self.rng)) for e in entries]
        loss = supervised_loss(self.policy, self.tokenizer, pairs)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"warm start: gradient norm {norm.item()} at step {self.step}")
        self.optimizer.step()
        return float(loss.detach())

    def edge(self) -> dict[str, Any]:
        return {"reached": self.reached, "cursor": self.stream.cursor,
                "random": dump_random(self.rng)}  # fmt: skip

    def back_to(self, step: int, edge: dict[str, Any]) -> None:
        self.step, self.reached, self.stream.cursor = step, edge["reached"], edge["cursor"]
        load_random(self.rng, edge["random"])
