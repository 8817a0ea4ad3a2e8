"""What the biases of two heads say of the ids that they can produce, looked up once a pair."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

BLOCKED = -1e8  # a bias at or below this makes an id impossible
_looked = WeakTensorKeyDictionary()  # bias -> (versions, the other, what `_look` found)


def produced(bias: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, bool]:
    """`_look`, once for a pair of buffers that nobody writes to: on a GPU the host waits for it."""
    if bias is None or bias.requires_grad or bias.is_inference():
        return _look(bias, other)
    if other is not None and (other.requires_grad or other.is_inference()):
        return _look(bias, other)
    versions = (bias._version, None if other is None else other._version)
    known = _looked.get(bias)
    if known is None or known[0] != versions or (known[1] and known[1]()) is not other:
        known = (versions, None if other is None else weakref.ref(other), _look(bias, other))
        _looked[bias] = known
    return known[2]


def _look(bias: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, bool]:
    """The ids that either head can produce (None: all), as one that neither can adds nothing; and
    whether the biases of those are constant zeros."""
    both = [b for b in (bias, other) if b is not None]
    learned = any(b.requires_grad for b in both)
    ids = None
    if bias is not None and other is not None:
        kept = (bias > BLOCKED) | (other > BLOCKED)
        if not bool(kept.all()):
            ids = kept.nonzero()[:, 0]
            both = [b.detach().index_select(0, ids) for b in both]
    return ids, not learned and not any(bool((b != 0).any()) for b in both)
