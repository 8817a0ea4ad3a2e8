"""Argument checks that the ops of continuous actions and states share."""

from collections.abc import Callable

import torch
from torch import Tensor

from vgkern.ops import _check
from vgkern.ops.noise import Noise


def same_dtype(**tensors: Tensor) -> None:
    """All have the dtype of the first."""
    (first, ref), *others = tensors.items()
    for name, x in others:
        if x.dtype != ref.dtype:
            got = _check.describe(x)
            raise TypeError(f"{name}: got {got}; allowed: {ref.dtype}, the dtype of {first}")


def expanded(name: str, x: Tensor, shape: torch.Size, meaning: str) -> Tensor:
    """A view of x with this shape."""
    try:
        return x.expand(shape)
    except RuntimeError:
        allowed = f"a shape that broadcasts to {meaning} = {list(shape)}"
        raise _check.fail(name, x, allowed) from None


def values(name: str, x: Tensor, good: Callable[[Tensor], Tensor], allowed: str) -> None:
    """One exception that names the first element of x that is not `good`. CPU only: elsewhere
    nothing is launched."""
    if not _check.can_look(x.device):
        return
    fine = good(x)
    if not bool(fine.all()):
        at = (~fine).nonzero()[0].tolist()
        kind = ValueError if bool(x[tuple(at)].isfinite()) else _check.NonFiniteError
        raise kind(f"{name}: got {float(x[tuple(at)])} at {at}; allowed: {allowed}")


def seed_and_rows(noise: object, shape: torch.Size, device: torch.device) -> tuple:
    """(signed seed, sequence [N], position [N]) of rows of `shape`."""
    if not isinstance(noise, Noise):
        raise TypeError(f"noise: got {_check.describe(noise)}; allowed: vgkern.Noise")
    return noise.signed_seed, *noise.rows(shape, device)


def state_shape(jacobian: object) -> tuple[Tensor, torch.Size]:
    """The Jacobians, checked, and [B, T, n]."""
    a = _check.floating("jacobian", jacobian)
    square = a.ndim == 3 or (a.ndim == 4 and a.shape[2] == a.shape[3])
    if not square or a.shape[2] == 0:
        raise _check.fail("jacobian", a, "[B, T, n, n], or the diagonals [B, T, n], with n >= 1")
    return a, a.shape[:3]
