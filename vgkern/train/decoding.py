"""The rollout on a GPU: one captured step a token, the host looking every `LOOK` tokens.

A step is one replay: forward, sample, stop ids, and the writing of token, log-prob and length, all
in buffers that stay where they are from one rollout to the next. Rows that have ended go on unread
until half of a batch has; what is left then moves to a batch of half the size and its own graph.

Noise is that of a token's coordinates, as everywhere: captured or not, compacted or not, by trees
or by rows, a rollout has the same tokens, but where two candidates are equal to rounding.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vgkern

from . import capture
from .device import of, precision, where
from .static import rows_of

LOOK = 16  # tokens between two looks of the host
ROOM = 32  # prompts' room is a multiple of it, so that batches of other prompts find their graph
KEPT = 8  # batches with their graphs, of a policy; the oldest goes
WARM = 2  # steps that run before one is recorded
log = logging.getLogger("vgkern")
_batches: weakref.WeakKeyDictionary[Any, dict[Any, Batch]] = weakref.WeakKeyDictionary()
_said: set[str] = set()


class How(NamedTuple):
    """What a graph has in it as constants."""

    stops: tuple[int, ...]
    seed: int
    temperature: float
    cuts: tuple[tuple[str, Any], ...]


class Batch:
    """R rows, their buffers and the captured step."""

    def __init__(self, policy: Any, rows: Any, count: int, new: int, how: How) -> None:
        self.policy, self.rows, self.how, self.count = weakref.proxy(policy), rows, how, count
        device = of(policy)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens, self.logp = zeros(count, new), zeros(count, new, dtype=torch.float32)
        self.lengths, self.sequence, self.index = zeros(count), zeros(count), zeros(count)
        self.live = zeros(count, dtype=torch.bool)
        self.finished = zeros(count, dtype=torch.bool)
        self.token, self.at = zeros(count), zeros(1)
        self.stop = torch.tensor(how.stops).to(device)
        self.hidden: Tensor | None = None
        self.replay: Callable[[], None] | None = None
        self.warm = 0

    def kept(self) -> tuple[Tensor, ...]:
        """What belongs to a row."""
        return (self.tokens, self.logp, self.lengths, self.sequence, self.index, self.live,
                self.finished, self.token)  # fmt: skip

    def start(self, prompts: list[list[int]], sequence: Tensor) -> None:
        hidden = self.rows.fill(prompts)
        for buffer in (self.tokens, self.logp, self.lengths, self.finished, self.at):
            buffer.zero_()
        self.live.fill_(True)
        self.sequence.copy_(sequence.to(self.sequence.device, non_blocking=True))
        self.index.copy_(torch.arange(self.count, device=self.index.device))
        self.draw(hidden)

    def draw(self, hidden: Tensor) -> None:
        head, how = self.policy.head(), self.how
        found = vgkern.linear_sample(
            hidden, head.weight, vgkern.Noise(how.seed, self.sequence, self.at[0]),
            bias=head.bias, softcap=head.softcap, temperature=how.temperature, **dict(how.cuts),
        )  # fmt: skip
        column = self.at.expand(self.count)[:, None]
        self.token.copy_(found.token)
        self.tokens.scatter_(1, column, found.token.where(self.live, 0)[:, None])
        self.logp.scatter_(1, column, found.logp.float().where(self.live, 0.0)[:, None])
        self.lengths.add_(self.live)
        ended = torch.isin(found.token, self.stop) & self.live
        self.finished.logical_or_(ended)
        self.live.logical_and_(~ended)
        self.at.add_(1)

    def step(self) -> None:
        self.draw(self.rows.advance(self.token))

    def advance(self) -> None:
        """One token: by the graph, once there is one."""
        if self.replay is None and self.warm >= WARM:
            try:
                self.replay = capture.capture(self.step)
            except RuntimeError as error:
                self.replay = self.step
                name = getattr(self.policy, "name", "the decoder")
                if name not in _said:
                    _said.add(name)
                    why = str(error).strip().split("\n")[0]
                    log.warning("vgkern: %s decodes without a CUDA graph: %s", name, why)
        self.warm += 1
        (self.replay or self.step)()

    def take(self, other: Batch) -> None:
        """Become the rows of a larger batch that go on, and as many ended ones as fill this."""
        index = (~other.live).byte().argsort(stable=True)[: self.count]
        self.rows.take(other.rows, index)
        for mine, theirs in zip(self.kept(), other.kept(), strict=True):
            mine.copy_(theirs.index_select(0, index))
        self.at.copy_(other.at)

    def give(self, whole: list[Tensor]) -> None:
        for mine, all_rows in zip((self.tokens, self.logp, self.lengths, self.finished), whole,
                                  strict=True):  # fmt: skip
            all_rows.index_copy_(0, self.index, mine)


def sample(
    policy: Any, prompts: list[list[int]], group: int, new: int, sequence: Tensor, how: How
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Tokens [R, new], log-probs, lengths and whether a row ended by itself, on the host; None for
    a policy that has no static rows. Within `torch.inference_mode()`."""
    with precision(policy, cache=False):  # a cast that is cached would be freed under the graph
        check = getattr(policy, "check", None)
        if check is not None:
            check(prompts, new)
        room = -(-max(map(len, prompts)) // ROOM) * ROOM
        batch = _batch(policy, len(prompts), group, room, new, how)
        if batch is None:
            return None
        batch.start(prompts, sequence)
        whole = [torch.zeros_like(x) for x in (batch.tokens, batch.logp, batch.lengths,
                                               batch.finished)]  # fmt: skip
        done = 1
        while done < new:
            steps = min(LOOK, new - done)
            for _ in range(steps):
                batch.advance()
            done += steps
            going = int(batch.live.sum()) if done < new else 0
            if not going:
                break
            size = batch.count
            while size % 2 == 0 and going <= size // 2:
                size //= 2
            if size < batch.count:
                smaller = _batch(policy, size, 1, room, new, how)
                assert smaller is not None
                batch.give(whole)
                smaller.take(batch)
                batch = smaller
        batch.give(whole)
        tokens, logp, lengths, finished = whole
        packed = torch.cat([tokens, logp.view(torch.int32), lengths[:, None],
                            finished[:, None]], 1).cpu()  # fmt: skip
    bits = packed[:, new : 2 * new].to(torch.int32).contiguous().view(torch.float32)
    return packed[:, :new], bits, packed[:, -2], packed[:, -1].bool()


def _batch(policy: Any, prompts: int, group: int, room: int, new: int, how: How) -> Batch | None:
    """The batch of this shape, with its graph if it has been here before."""
    known = _batches.setdefault(policy, {})
    key = (prompts, group, room, new, how, where(policy))
    batch = known.pop(key, None)
    if batch is None:
        rows = rows_of(policy, prompts, group, room, new)
        if rows is None:
            return None
        batch = Batch(policy, rows, prompts * group, new, how)
        while len(known) >= KEPT:
            known.pop(next(iter(known)))
    known[key] = batch
    return batch
