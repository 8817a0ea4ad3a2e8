"""What a case is, its tolerance, and the sizes that the byte and flop models share."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vgkern.case_inputs import Inputs

FLOOR = {
    torch.float64: 1e-11,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-8,  # one unit in the last place
    torch.float16: 2.0**-11,
}


@dataclass(frozen=True)
class Case:
    """`getattr(vgkern, op)(**make(dtype, seed))` is the call; flops and bytes are of forward and
    backward together (what an ideal kernel does and moves), from the inputs that `make` returned.
    """

    name: str
    op: str
    make: Callable[[torch.dtype, int], Inputs]
    flops: Callable[[Inputs], int]
    bytes: Callable[[Inputs], int]
    grads: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = field(
        default=(torch.float32, torch.bfloat16, torch.float16, torch.float64)
    )

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def size(*tensors: Tensor | None) -> int:
    """Bytes of these tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def nhv(x: Inputs) -> tuple[int, int, int]:
    """Rows, width and vocabulary of a linear_* op's inputs."""
    h = x["hidden"].shape[-1]
    return x["hidden"].numel() // h, h, x["weight"].shape[0]


def head_bytes(x: Inputs, reads: int) -> int:
    """`reads` passes over hidden and weight, their gradients written once."""
    return (reads + 1) * size(x["hidden"], x["weight"])


def costate_flops(x: Inputs) -> int:
    """u = E lambda, for the rows that have a costate."""
    if x.get("costate") is None:
        return 0
    value, table = x["costate"].value, x["costate"].embedding
    return 2 * int((value.nan_to_num(0) != 0).any(-1).sum()) * table.numel()
