"""Batched sampling. Every token is drawn with noise that its own coordinates replay.

The noise of a token depends on (seed, sequence, position) and nothing else, so a completion is the
same whatever else is in the batch, and a run can be replayed from its metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vgkern
from vgkern.tasks import Entry, Reward, Task, checked_score

from .decoding import How, sample
from .device import of, precision
from .policy import Policy, Tokenizer


class Rollout(NamedTuple):
    """Completions of P prompts, G each; R = P*G rows, w = the longest completion."""

    tokens: Tensor  # [R, w] int64, 0 past a row's length
    logp: Tensor  # [R, w] fp32, 0 past a row's length
    lengths: Tensor  # [R] int64, end of sequence included
    finished: Tensor  # [R] bool: ended by itself, not cut off
    sequence: Tensor | None = None  # [R] int64: with the run's seed, where the noise is
    teaches: Tensor | None = None  # [R] bool: has a reward; None: all have

    @property
    def mask(self) -> Tensor:  # [R, w] bool: tokens of samples that teach
        place = torch.arange(self.tokens.shape[1], device=self.lengths.device)
        mask = place < self.lengths[:, None]
        return mask if self.teaches is None else mask & self.teaches[:, None]

    def to(self, device: torch.device) -> Rollout:
        def moved(field: Tensor | None) -> Tensor | None:
            return None if field is None else field.to(device, non_blocking=True)

        return Rollout(*map(moved, self))  # type: ignore[arg-type]

    def select(self, rows: Tensor) -> Rollout:
        tokens, logp, lengths, finished = (field[rows] for field in self[:4])
        sequence = None if self.sequence is None else self.sequence[rows]
        teaches = None if self.teaches is None else self.teaches[rows]
        return Rollout(tokens, logp, lengths, finished, sequence, teaches)


def generate(
    policy: Policy,
    prompts: list[list[int]],
    stops: tuple[int, ...],
    *,
    group: int,
    max_new: int,
    seed: int,
    sequence: Tensor,  # [R] int64, unique over the run
    temperature: float = 1.0,  # 0: greedy
    **cuts: Any,  # top_k, top_p, min_p of `vgkern.linear_sample`
) -> Rollout:
    """Sample until the end of sequence or `max_new` tokens. The last token is kept and trained.

    Tokens, and all that follows from them, are the host's, wherever the policy is.
    """
    if of(policy).type == "cuda":
        how = How(tuple(stops), seed, temperature, tuple(cuts.items()))
        with torch.inference_mode():
            found = sample(policy, prompts, group, max_new, sequence, how)
        if found is not None:
            tokens, logp, lengths, finished = found
            width = int(lengths.max())
            return Rollout(tokens[:, :width], logp[:, :width], lengths, finished, sequence)
    rows = len(prompts) * group
    tokens = torch.zeros(rows, max_new, dtype=torch.int64)
    logp = torch.zeros(rows, max_new)
    lengths = torch.full((rows,), max_new)
    finished = torch.zeros(rows, dtype=torch.bool)
    live = torch.arange(rows)
    stop, device = torch.tensor(stops), of(policy)
    with torch.inference_mode(), precision(policy):
        head = policy.head()
        state, hidden = policy.prefill(prompts, group, max_new)
        for position in range(max_new):
            noise = vgkern.Noise(seed, sequence[live].to(device), torch.tensor(position))
            drawn = vgkern.linear_sample(
                hidden, head.weight, noise,
                bias=head.bias, softcap=head.softcap, temperature=temperature, **cuts,
            )  # fmt: skip
            token = drawn.token.cpu()
            tokens[live, position] = token
            logp[live, position] = drawn.logp.float().cpu()
            ended = torch.isin(token, stop)
            lengths[live[ended]] = position + 1
            finished[live[ended]] = True
            if position + 1 == max_new or bool(ended.all()):
                break
            if bool(ended.any()):
                going = (~ended).nonzero()[:, 0]
                live, token = live[going], token[going]
                policy.keep(state, going)
            hidden = policy.decode(state, token)
    width = int(lengths.max())
    return Rollout(tokens[:, :width], logp[:, :width], lengths, finished, sequence)


def decode(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Text of every row, without the end of sequence; of one that has text, with that."""
    said = getattr(tokenizer, "said", {})
    ends = rollout.finished.tolist()
    texts = []
    for row, n, ended in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), ends, strict=True):
        texts.append(tokenizer.decode(row[: n - (ended and row[n - 1] not in said)]))
    return texts


def reward(task: Task, text: str, entry: Entry, finished: bool, seconds: float = 0.0) -> Reward:
    """The task's score of a text; of one that was cut off at most that of an empty answer, so that
    running on is never better than giving up, whatever the task gives a wrong one."""
    found = checked_score(task, text, entry, seconds)
    if finished:
        return found
    empty = checked_score(task, "", entry, seconds)
    if math.isnan(empty.value):  # the task says nothing of giving up
        empty = Reward(0.0)
    return empty if empty.value < found.value else found


def score(
    task: Task, texts: list[str], entries: list[Entry], rollout: Rollout, cut_off: str = "score",
    value: float = 0.0, seconds: float = 0.0,
) -> list[Reward]:  # fmt: skip
    """One reward per row. A completion that was cut off has, by `cut_off`: "score", its `reward`;
    "value", `value`; "mask", none at all. seconds: see `checked_score`."""
    group = len(texts) // len(entries)
    fixed = {"value": Reward(value), "mask": Reward(math.nan)}.get(cut_off)
    return [
        fixed
        if fixed is not None and not done
        else reward(task, text, entries[row // group], done, seconds)
        for row, (text, done) in enumerate(zip(texts, rollout.finished.tolist(), strict=True))
    ]


def portions(prompts: list[list[int]], group: int, max_new: int, tokens: int) -> Iterator[slice]:
    """Parts of the prompts whose rows come to at most `tokens` at their longest; one at least."""
    size = max(1, tokens // (group * (max(map(len, prompts)) + max_new)))
    for at in range(0, len(prompts), size):
        yield slice(at, min(at + size, len(prompts)))
