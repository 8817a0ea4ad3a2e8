"""What one launch moves between a GPU's memory and its processors."""

import math
from typing import NamedTuple

from torch import Tensor


class Moved(NamedTuple):
    """Bytes from and to memory. `again` is asked for beyond that and found in a cache: the model's
    word for it, while `read + again` and `written + rewritten` are what a kernel's loads and stores
    touch, which a test counts."""

    read: int = 0
    written: int = 0
    flops: int = 0  # multiply-adds of products, twice
    size: int = 2  # bytes of an element of a product's factors
    again: int = 0
    rewritten: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


def elements(x: Tensor) -> int:
    """That are somewhere in memory: an expanded dimension is there once."""
    return math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step or n == 0)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(elements(x) * x.element_size() for x in tensors if x is not None)
