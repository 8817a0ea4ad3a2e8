"""Supervised warm start, stopped by what the model can do and not by a step count.

With `wrong` > 0 that share of the demonstrations comes from a teacher who is wrong in one
consistent way (sorts descending, copies instead of reversing, forgets carries). RL from there
*elicits* a skill that was in the minority of the demonstrations; it does not teach a new one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vgkern

from .errors import TrainingError
from .policy import Policy, Tokenizer
from .tasks import Entry, Stream

CHECK_EVERY = 20  # steps; a check costs about a fifth of a step
LR_WARMUP = 30


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ragged ids to [R, w] and lengths [R]."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), lengths


def demonstrate(task: Any, entry: Entry, wrong: float, rng: random.Random) -> str:
    return task.wrong(entry) if rng.random() < wrong else entry.answer


def supervised_loss(policy: Policy, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> Tensor:
    """Mean negative log-prob of the answers' tokens, end of sequence included."""
    prompts = [tokenizer.encode(question) for question, _ in pairs]
    answers = [[*tokenizer.encode(answer), tokenizer.stops[0]] for _, answer in pairs]
    tokens, lengths = pad(answers)
    hidden = policy.hidden(prompts, tokens, 1, lengths)
    targets = tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], -100)
    head = policy.head()
    logp = vgkern.linear_token_logprobs(
        hidden, head.weight, targets, bias=head.bias, softcap=head.softcap
    ).logp
    return -logp.sum() / lengths.sum()


def warm_start(
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
    report: Callable[[int, float, float], None],  # step, loss, pass@1
) -> tuple[int, float]:
    """Train until `measure()` reaches `target`; return the steps taken and the last measure."""
    task = stream.task
    if wrong and not hasattr(task, "wrong"):
        raise ValueError(f"warm_wrong: got {wrong}; allowed: 0, task {task.name!r} has no teacher")
    rng = random.Random(f"warm start/{seed}")
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    reached = 0.0
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / LR_WARMUP)
        entries = stream.take(batch)
        pairs = [(entry.question, demonstrate(task, entry, wrong, rng)) for entry in entries]
        loss = supervised_loss(policy, tokenizer, pairs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"warm start: gradient norm {norm.item()} at step {step}")
        optimizer.step()
        if step % CHECK_EVERY == 0:
            reached = measure()
            report(step, float(loss.detach()), reached)
            if reached >= target:
                return step, reached
    raise TrainingError(
        f"warm_target: sampled pass@1 reached {reached:.3f} of {target} in {steps} steps; lower "
        f"--warm-target, or raise --warm-steps"
    )
