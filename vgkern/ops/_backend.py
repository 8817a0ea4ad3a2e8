"""Which backend runs: one plain function.

Asked for means had or raised; chosen automatically may fall back to `torch`, said once.
Order of asking: the `backend=` argument, `use_backend(...)`, the VGKERN_BACKEND variable.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from vgkern.ops import _native

BACKENDS = ("torch", "cpu")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger("vgkern")
_forced: ContextVar[str | None] = ContextVar("vgkern_backend", default=None)  # per thread
_said: set[str] = set()


class BackendError(RuntimeError):
    """A backend was asked for that cannot run; the message has the reason and the remedy."""


def choose(requested: str | None, device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend for tensors of these dtypes on `device`: "torch" or "cpu"."""
    name = requested or _forced.get() or os.environ.get("VGKERN_BACKEND") or None
    if name is None:
        return _automatic(device, dtypes)
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}; allowed: {', '.join(BACKENDS)} or None")
    if name == "cpu":
        if device.type != "cpu":
            raise BackendError(f"backend 'cpu': the tensors are on {device}; use backend='torch'")
        wrong = [d for d in dtypes if d not in NATIVE_DTYPES]
        if wrong:
            raise BackendError(
                f"backend 'cpu': no {wrong[0]} kernels; allowed: float32, bfloat16, float16, "
                "or backend='torch'"
            )
        try:
            _native.load()
        except _native.NativeError as e:
            raise BackendError(f"backend 'cpu': {e}") from e
    return name


def _automatic(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    if device.type != "cpu" or any(d not in NATIVE_DTYPES for d in dtypes):
        return "torch"
    try:
        _native.load()
    except _native.NativeError as e:
        if "native" not in _said:
            _said.add("native")
            log.warning("vgkern: the torch backend runs, without native kernels: %s", e)
        return "torch"
    return "cpu"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op runs on `name` ("torch" or "cpu") or raises."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}; allowed: {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
