"""Argument checks: once, in Python, before dispatch; each failure names the argument, what it was
and what is allowed."""

import math
import os
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LOST = -(2**63)  # stands for a target out of range
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NonFiniteError(ValueError):
    """A NaN reached an op that must return a number. Raised on CPU, where looking costs nothing,
    and with VGKERN_CHECK=1 on every device."""


def describe(x: object) -> str:
    """What a value is, in the words of an error message."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} tensor {list(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def fail(name: str, got: object, allowed: str) -> ValueError:
    got = got if isinstance(got, str) else describe(got)
    return ValueError(f"{name}: got {got}; allowed: {allowed}")


def tensor(name: str, x: object, allowed: str = "a tensor") -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {describe(x)}; allowed: {allowed}")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name}: got a DTensor; allowed: a plain tensor. With rows of its own on every rank, "
            f"pass {name}.full_tensor(grad_placements=[Partial()] * {name}.device_mesh.ndim) (of "
            "torch.distributed.tensor): the gradient is the sum over the ranks, which .full_tensor("
            ") alone would cut to each rank's own rows. Under fully_shard, use it within a call of "
            "the module that holds it"
        )
    return x


def floating(name: str, x: object, ndim: int | None = None) -> Tensor:
    x = tensor(name, x, "a floating-point tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got {describe(x)}; allowed: float32, bfloat16, float16, float64")
    if ndim is not None and x.ndim != ndim:
        raise fail(name, x, f"{ndim} dimensions")
    return x


def can_look(device: torch.device) -> bool:
    """May a check read values? On a GPU that is a host sync, which VGKERN_CHECK=1 asks for; a
    traced graph and one that is captured have no values, ever: there, and on a GPU unasked, a NaN
    or an id out of range comes out as NaN instead of an exception."""
    if torch.compiler.is_compiling():
        return False
    return _costs_nothing(device) or (asked() and not _recording(device))


def asked() -> bool:
    """VGKERN_CHECK=1: look at values on every device, and at more of them."""
    return os.environ.get("VGKERN_CHECK", "0") not in ("", "0")


def _costs_nothing(device: torch.device) -> bool:
    return device.type == "cpu"


def _recording(device: torch.device) -> bool:
    """Meta tensors have no values; a CUDA graph that is captured allows no sync."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return device.type == "meta"


def same_device(**tensors: Tensor | None) -> torch.device:
    """All given tensors live on one device; returns it."""
    named = [(n, t) for n, t in tensors.items() if t is not None]
    first, ref = named[0]
    on_device(ref.device, first, **dict(named[1:]))
    return ref.device


def on_device(device: torch.device, owner: str, **tensors: object) -> None:
    """Every tensor among these lives on `device`, that of `owner`."""
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.device != device:
            raise fail(name, f"a tensor on {t.device}", f"{device}, the device of {owner}")


def number(x: Any) -> Any:
    """A 0-d tensor as the number that it holds, as it is while a graph is traced; else x."""
    if isinstance(x, Tensor) and x.ndim == 0 and not torch.compiler.is_compiling():
        return x.item()
    return x


def positive(name: str, x: Any) -> float:
    """x, a number or a 0-d tensor, as a float. Never converts what `torch.compile` traces."""
    x = number(x)
    if isinstance(x, Tensor) and x.ndim == 0:
        return x  # type: ignore[return-value]  # traced: nobody can look
    if isinstance(x, bool) or not isinstance(x, Real) or not 0 < x < math.inf:  # type: ignore[operator]
        raise fail(name, x, "a finite number > 0")
    return x if torch.compiler.is_compiling() else float(x)  # type: ignore[return-value]


def finite(name: str, x: Any) -> float:
    x = number(x)
    if isinstance(x, Tensor) and x.ndim == 0:
        return x  # type: ignore[return-value]
    if isinstance(x, bool) or not isinstance(x, Real) or not -math.inf < x < math.inf:  # type: ignore[operator]
        raise fail(name, x, "a finite number")
    return x if torch.compiler.is_compiling() else float(x)  # type: ignore[return-value]


def softcap(x: Any, name: str = "softcap") -> float:
    """0.0 stands for no soft-cap below the public functions."""
    return 0.0 if x is None else positive(name, x)


def rows_like(name: str, x: object, shape: torch.Size, allowed: str | None = None) -> Tensor:
    x = tensor(name, x)
    if x.shape != shape:
        raise fail(name, x, allowed or f"shape {list(shape)}")
    return x


def mask(name: str, x: object, shape: torch.Size, allowed: str | None = None) -> Tensor:
    """A mask as bool. On CPU anything but bool, 0 and 1 is refused; elsewhere it counts as 1."""
    x = rows_like(name, x, shape, allowed)
    if x.dtype == torch.bool:
        return x
    m = x != 0
    if can_look(x.device):
        refuse(name, x, m & (x != 1), "0 or 1, or bool")
    return m


def token_weight(name: str, x: object, live: Tensor) -> Tensor:
    """Factors of tokens: finite and >= 0 where live; 0 elsewhere."""
    w = rows_like(name, floating(name, x), live.shape).detach().where(live, 0)
    if can_look(w.device):
        refuse(name, w, ~((w >= 0) & w.isfinite()), "finite numbers >= 0")
    return w


def targets(name: str, x: object, shape: torch.Size) -> Tensor:
    x = rows_like(name, x, shape)
    if x.dtype != torch.int64:
        raise TypeError(f"{name}: got {describe(x)}; allowed: int64")
    return x


def target_range(name: str, x: Tensor, vocab: int, live: Tensor | None, hint: str = "") -> Tensor:
    """Refuses ids outside [0, V) where `live`. Where it cannot look (`can_look`) it turns them into
    LOST, which no kernel looks up: their log-probability is NaN."""
    if x.numel() == 0:
        return x
    bad = (x < 0) | (x >= vocab)
    if live is not None:
        bad = bad & live
    if not can_look(x.device):
        return x.masked_fill(bad, LOST)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        hint = hint if int(x[tuple(at)]) < 0 else ""
        raise fail(name, f"id {int(x[tuple(at)])} at {at}", f"0 <= id < {vocab} (vocabulary){hint}")
    return x


def kernel_targets(name: str, x: Tensor, vocab: int, ignore_index: int, backend: str) -> Tensor:
    """`target_range` for kernels of a GPU, where it cannot look: they make NaN of any id outside
    [0, V) but V itself, which stands for one on another shard."""
    if backend not in ("triton", "cuda") or can_look(x.device):
        return target_range(name, x, vocab, x != ignore_index)
    return x if ignore_index == vocab else x.masked_fill(x == vocab, LOST)


def live_rows(live: Tensor, **rows: Tensor | None) -> None:
    """VGKERN_CHECK=1: none of these [...] is NaN where `live` is not 0."""
    if can_look(live.device) and asked():
        for name, x in rows.items():
            if x is not None:
                refuse(name, x, x.isnan() & (live != 0), "no NaN where the mask is not 0")


def refuse(name: str, x: Tensor, bad: Tensor, allowed: str) -> None:
    """One exception that names the first element of x that is `bad`."""
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        got = x[tuple(at)].item()
        kind = NonFiniteError if math.isnan(got) else ValueError
        raise kind(f"{name}: got {got} at {at}; allowed: {allowed}")
