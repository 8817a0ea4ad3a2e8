"""The registered operators: one schema and one fake kernel each, one namespace per fast backend.

    vgkern::<op>          cpu: C++ in csrc/*.cpp, registered when the native library loads
    vgkern_triton::<op>   kernels/<file>.py, imported at the first call
    vgkern_cuda::<op>     csrc/*.cu behind vgkern/ops/_cuda.py

An op's Function asks `operators(backend)` once, in forward, and keeps the answer for backward.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

NAMESPACES = {"cpu": "vgkern", "triton": "vgkern_triton", "cuda": "vgkern_cuda"}
_LIBS = {b: torch.library.Library(name, "DEF") for b, name in NAMESPACES.items()}
_NAMES: list[str] = []
SECOND_ORDER = (
    "the gradient of this op cannot be differentiated again on a fused backend; pass "
    "backend='torch' to this call, or wrap it in `with vgkern.use_backend('torch'):`"
)


def define(schema: str, fake: Callable[..., Any], kernels: str | None) -> None:
    """Declare `<namespace>::<schema>` for every backend, with its shape function.

    `kernels` is the file of the op: vgkern.kernels.<kernels> has a launcher named like the
    operator with the arguments of the schema. None: C++ alone has it.
    """
    name = schema.split("(")[0]
    if kernels is None:
        _LIBS["cpu"].define(schema)
        torch.library.register_fake(f"{NAMESPACES['cpu']}::{name}", fake, lib=_LIBS["cpu"])
        return
    _NAMES.append(name)
    for backend, lib in _LIBS.items():
        lib.define(schema)
        torch.library.register_fake(f"{NAMESPACES[backend]}::{name}", fake, lib=lib)
    _LIBS["triton"].impl(name, _late(lambda: kernels_of(kernels), name), _EXPLICIT)
    _LIBS["cuda"].impl(name, _late(lambda: importlib.import_module(_CUDA), name), _EXPLICIT)


_CUDA = "vgkern.ops._cuda"
_EXPLICIT = "CompositeExplicitAutograd"


def _late(module: Callable[[], Any], name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return getattr(module(), name)(*args)

    return call


def interpreted() -> bool:
    """Does Triton run kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)?"""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def kernels_of(name: str) -> Any:
    """The module vgkern.kernels.<name>, which needs Triton; its interpreter, if that is to run the
    kernels, repaired first."""
    if interpreted():
        importlib.import_module("vgkern.ops._interpreter").install()
    return importlib.import_module(f"vgkern.kernels.{name}")


def names() -> tuple[str, ...]:
    """Every declared operator, without namespace."""
    return tuple(_NAMES)


def operators(backend: str) -> Any:
    """The namespace of torch.ops that runs on `backend` ("cpu", "triton" or "cuda")."""
    return getattr(torch.ops, NAMESPACES[backend])


class _Refuse(torch.autograd.Function):
    """The first `count` tensors, tied to the others; its backward says why there is none."""

    @staticmethod
    def forward(count: int, *tensors: Any) -> tuple:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(SECOND_ORDER)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that may run any number of times, but not be differentiated: that raises."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor) -> tuple:
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return out
        sources = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
        live = [g for g in out if g is not None]
        tied = iter(_Refuse.apply(len(live), *live, *sources))
        return tuple(g if g is None else next(tied) for g in out)

    return run
