"""The registered operators: one schema and one fake kernel each, one namespace per fast backend.

    vgkern::<op>          cpu: C++ in csrc/*.cpp, registered when the native library loads
    vgkern_triton::<op>   kernels/<file>.py, imported at the first call
    vgkern_cuda::<op>     csrc/*.cu behind vgkern/ops/_cuda.py

An op's Function asks `operators(backend)` once, in forward, and keeps the answer for backward.

A graph of torch.compile burns in every number that an operator takes, and is made anew for the
next value. Each operator has a twin, `<namespace>_traced::<op>`, whose numbers are 0-d CPU tensors
(fp64, int64; a list is a vector): a traced call whose numbers change goes to the twin.
"""

import functools
import importlib
import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

NAMESPACES = {"cpu": "vgkern", "triton": "vgkern_triton", "cuda": "vgkern_cuda"}
_LIBS = {b: torch.library.Library(name, "DEF") for b, name in NAMESPACES.items()}
_TWINS = {b: torch.library.Library(f"{name}_traced", "DEF") for b, name in NAMESPACES.items()}
_TRACED: dict[str, SimpleNamespace] = {b: SimpleNamespace() for b in NAMESPACES}
_NUMBERS = {"float": torch.float64, "int": torch.int64, "List[float]": torch.float64}
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
        _twin("cpu", name, schema, fake)
        return
    _NAMES.append(name)
    for backend, lib in _LIBS.items():
        lib.define(schema)
        torch.library.register_fake(f"{NAMESPACES[backend]}::{name}", fake, lib=lib)
        _twin(backend, name, schema, fake)
    _LIBS["triton"].impl(name, _late(lambda: kernels_of(kernels), name), _EXPLICIT)
    _LIBS["cuda"].impl(name, _late(lambda: importlib.import_module(_CUDA), name), _EXPLICIT)


_CUDA = "vgkern.ops._cuda"
_EXPLICIT = "CompositeExplicitAutograd"


def _late(module: Callable[[], Any], name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return getattr(module(), name)(*args)

    return call


def _twin(backend: str, name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define the operator whose numbers are tensors, and what a traced call goes through."""
    space, parsed = NAMESPACES[backend], torch._C.parse_schema(f"{NAMESPACES[backend]}::{schema}")
    kinds = [_NUMBERS.get(str(a.type)) for a in parsed.arguments]
    defaults = [a.default_value if a.has_default_value() else None for a in parsed.arguments]
    text = re.sub(r"\b(float\[\]|float|int) ", "Tensor ", schema)
    text = re.sub(r"Tensor (\w+)=[-\d.e]+", r"Tensor? \1=None", text)
    _TWINS[backend].define(text)

    def plain(args: tuple, read: Callable[[Tensor], Any]) -> list[Any]:
        args = args + (None,) * (len(kinds) - len(args))
        both = zip(args, kinds, defaults, strict=True)
        return [x if k is None else d if x is None else read(x) for x, k, d in both]

    def call(*args: Any) -> Any:
        return getattr(getattr(torch.ops, space), name)(*plain(args, Tensor.tolist))

    def shapes(*args: Any) -> Any:  # no shape function looks at a number
        return fake(*plain(args, lambda x: [1.0] * x.numel() if x.ndim else 1))

    def traced(*args: Any) -> Any:
        if not any(_changes(x) for x, k in zip(args, kinds, strict=False) if k is not None):
            return getattr(getattr(torch.ops, space), name)(*args)
        given = [x if k is None else _as_tensor(x, k) for x, k in zip(args, kinds, strict=False)]
        return getattr(getattr(torch.ops, f"{space}_traced"), name)(*given)

    _TWINS[backend].impl(name, call, _EXPLICIT)
    torch.library.register_fake(f"{space}_traced::{name}", shapes, lib=_TWINS[backend])
    setattr(_TRACED[backend], name, traced)


def _changes(x: Any) -> bool:
    """Is this a number (or a list with one) whose value a graph must not burn in?"""
    if isinstance(x, (list, tuple)):
        return any(_changes(one) for one in x)
    return isinstance(x, Tensor) or not has_static_value(x)


def _as_tensor(x: Any, dtype: torch.dtype) -> Tensor:
    """What changes is added to zeros: of all ways to a tensor, the compiler keeps that one as a
    computation, and burns the number into the others."""
    if isinstance(x, (list, tuple)):
        return torch.stack([_as_tensor(one, dtype) for one in x])
    if isinstance(x, Tensor):
        return x.detach().to("cpu", dtype)
    return torch.zeros((), dtype=dtype, device="cpu") + x


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
    """The operators that run on `backend` ("cpu", "triton" or "cuda"), by name."""
    if torch.compiler.is_compiling():
        return _TRACED[backend]
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
