"""Which backend runs: one plain function.

Asked for means had or raised; chosen automatically may fall back to `torch`, said once.
Order of asking: the `backend=` argument, `use_backend(...)`, the VGKERN_BACKEND variable.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from vgkern.ops import _gpu, _library, _native

BACKENDS = ("torch", "cpu", "triton", "cuda")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger("vgkern")
_forced: ContextVar[str | None] = ContextVar("vgkern_backend", default=None)  # per thread
_said: set[str] = set()


class BackendError(RuntimeError):
    """A backend was asked for that cannot run; the message has the reason and the remedy."""


def choose(requested: str | None, device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend for tensors of these dtypes on `device`: one of BACKENDS."""
    name = requested or _asked()
    if name is None:
        return _automatic(device, dtypes)
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}; allowed: {', '.join(BACKENDS)} or None")
    if name == "torch":
        return name
    wrong = [d for d in dtypes if d not in NATIVE_DTYPES]
    if wrong:
        raise BackendError(
            f"backend {name!r}: no {wrong[0]} kernels; allowed: float32, bfloat16, float16, "
            "or backend='torch'"
        )
    why = _missing(name, device) or _refused(name, device, dtypes)
    if why:
        raise BackendError(f"backend {name!r}: {why}")
    return name


def _asked() -> str | None:
    return _forced.get() or os.environ.get("VGKERN_BACKEND") or None


def _automatic(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """cpu on a CPU, triton on a GPU; torch where that cannot run, said once."""
    if device.type not in ("cpu", "cuda") or any(d not in NATIVE_DTYPES for d in dtypes):
        return "torch"
    name = "cpu" if device.type == "cpu" else "triton"
    why = _missing(name, device) or _refused(name, device, dtypes)
    if why and name not in _said:
        _said.add(name)
        log.warning("vgkern: the torch backend runs, without %s kernels: %s", name, why)
    return "torch" if why else name


def _missing(name: str, device: torch.device) -> str | None:
    """Why `name` cannot run on tensors of `device`, with the remedy; None where it can."""
    if name == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device}; use backend='torch'"
        try:
            _native.load()
        except _native.NativeError as e:
            return str(e)
        return None
    if name == "triton":
        return _triton_missing(device)
    return _cuda_missing(device)


def _refused(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why a backend that runs on `device` does not take these dtypes there; None where it does."""
    if name in ("triton", "cuda") and torch.bfloat16 in dtypes:
        return _gpu.no_bf16(device)
    return None


# A compiler asks once, while it traces, and keeps the answers: what
# torch.compiler.assume_constant_result sets, without its import of Dynamo (and Triton).
_asked._dynamo_marked_constant = True  # type: ignore[attr-defined]
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_refused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_missing(device: torch.device) -> str | None:
    if device.type == "cpu":
        if not _library.interpreted():
            return _gpu.driver_problem() or (
                "the tensors are on cpu; use backend='cpu', or set TRITON_INTERPRET=1 to debug"
            )
    elif device.type != "cuda":
        return f"the tensors are on {device}; use backend='torch'"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton, or use backend='torch'"
    return None


def _cuda_missing(device: torch.device) -> str | None:
    from vgkern.ops import _cuda  # its own reasons: no nvcc, no GPU, a failed build

    return _cuda.missing(device)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op runs on `name` (one of BACKENDS) or raises BackendError."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}; allowed: {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
