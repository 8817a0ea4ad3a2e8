"""Packed rows: sequences laid end to end in [N] rows, told apart by their cumulative lengths.

segment s holds rows segments[s] .. segments[s + 1] - 1        (as cu_seqlens of flash attention)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vgkern.ops import _check

REMEDY = "segments=, the cumulative lengths [S + 1] of the sequences that the rows hold"


@dataclass(frozen=True)
class Segments:
    """Of N rows: where each of the S segments begins and ends, and which one each row is in."""

    ends: Tensor  # [S + 1] int64, contiguous
    index: Tensor  # [N] int64
    bad: Tensor | None  # where no value could be looked at: are the ends no segments of N rows?

    @property
    def count(self) -> int:
        return self.ends.numel() - 1

    @property
    def longest(self) -> Tensor:
        """Rows of the longest segment, 0-d."""
        return self.ends.diff().amax() if self.count else self.ends.new_zeros(())

    def sums(self, x: Tensor) -> Tensor:
        """[S]: of x [N] over each segment."""
        return x.new_zeros(self.count).index_add(0, self.index, x)

    def spread(self, x: Tensor) -> Tensor:
        """[N]: to each row what its segment has in x [S]."""
        return x[self.index]

    def position(self) -> Tensor:
        """[N]: how far each row is into its segment, from 0."""
        rows = torch.arange(self.index.numel(), device=self.index.device)
        return rows - self.ends[self.index]


def segments_of(segments: object, shape: torch.Size, device: torch.device) -> Segments | None:
    """Of rows of `shape`, [N] or [1, N]. Raises TypeError or ValueError naming `segments`."""
    if segments is None:
        return None
    allowed = "int32 or int64 cumulative lengths [S + 1], from 0 to the number of rows"
    given = _check.tensor("segments", segments, allowed)
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"segments: got {_check.describe(given)}; allowed: {allowed}")
    if given.ndim != 1 or not given.numel():
        raise _check.fail("segments", given, allowed)
    if len(shape) != 1 and (len(shape) != 2 or shape[0] != 1):
        raise _check.fail("segments", f"rows of shape {list(shape)}", "packed rows, [N] or [1, N]")
    _check.on_device(device, "the rows", segments=given)
    ends, n = given.detach().long().contiguous(), shape.numel()
    bad = None
    if _check.can_look(device):
        if int(ends[0]) or int(ends[-1]) != n:
            got = f"{int(ends[0])} first and {int(ends[-1])} last"
            raise _check.fail("segments", got, f"0 first and {n}, the number of rows, last")
        if bool((ends.diff() < 0).any()):
            at = int((ends.diff() < 0).nonzero()[0, 0])
            got = f"{int(ends[at + 1])} after {int(ends[at])} at {at + 1}"
            raise _check.fail("segments", got, "cumulative lengths, which do not fall")
    else:
        bad = (ends[0] != 0) | (ends[-1] != n) | (ends.diff() < 0).any()
        ends = ends.clamp(0, n)
    if ends.numel() == 1 and n:  # on any device: the shapes say so
        raise _check.fail("segments", "no segment", f"cumulative lengths up to {n} rows")
    rows = torch.arange(n, device=device)
    index = torch.searchsorted(ends[1:].contiguous(), rows, right=True)
    return Segments(ends, index.clamp(max=max(ends.numel() - 2, 0)), bad)


def advantages_of(a: Tensor, shape: torch.Size, s: Segments) -> Tensor:
    """[N], from one advantage for each segment [S] or each row. Where S = N they are segments'."""
    if a.shape == (s.count,):
        return s.spread(a)
    if a.shape in (shape, (shape.numel(),)):
        return a.reshape(-1)
    raise _check.fail(
        "advantages", a, f"[{s.count}] for the segments or {list(shape)} for the rows"
    )
