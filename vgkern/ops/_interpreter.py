"""TRITON_INTERPRET=1: what Triton's interpreter gets wrong, put right while our kernels run in it.

Out of the box (3.6 to 3.9) it multiplies the bit patterns of bf16, truncates where hardware rounds
to nearest, computes tf32 in full precision, wraps float-to-int conversions, splats a scalar
comparison as a float, and has no libdevice; 3.6 takes an array of one element for an integer, which
numpy no longer allows. Each of these is asked of the Triton that is installed, once, and only what
it gets wrong is replaced, for as long as a launch of `vgkern.kernels` lasts: other kernels of the
process see the interpreter as it is.

What it cannot show: races inside a program, layouts, registers, approximate instructions, and (as
on a GPU) a read past the end of a tensor.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.extra import libdevice
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
_KERNELS = "vgkern.kernels."
_LOCK = threading.RLock()  # the interpreter patches its own modules at every launch
_MISSING = object()
_depth = 0


@functools.cache
def install() -> None:
    """Every later launch of a kernel of this package runs within `repaired()`."""
    call = interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.fn.__module__.startswith(_KERNELS):
            return call(self, *args, **kwargs)
        with repaired():
            return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = run


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Launches within compute as the hardware would. One thread at a time; may be nested."""
    global _depth
    with _LOCK, contextlib.ExitStack() as undo:
        _depth += 1
        undo.callback(_leave)
        if _depth == 1:
            for owner, name, new in replacements():
                undo.callback(_put, owner, name, vars(owner).get(name, _MISSING))
                setattr(owner, name, new)
        # overflow and NaN are silent on a GPU
        undo.enter_context(np.errstate(all="ignore"))
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        yield


def _leave() -> None:
    global _depth
    _depth -= 1


def _put(owner: Any, name: str, value: Any) -> None:
    """Back as it was: 3.6 has no `get_bf16`."""
    if value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


@functools.cache
def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, what it should be) of all that the installed Triton gets wrong."""
    found: list[tuple[Any, str, Any]] = []
    with np.errstate(all="ignore"):
        for right, repair in REPAIRS:
            if not _holds(right):
                found += repair()
    return found


def _holds(right: Callable[[], Any]) -> bool:
    try:
        return bool(np.all(right()))
    except Exception:  # whatever a Triton of another version says of the question
        return False


# Numbers: bf16 is stored as its uint16 bits ------------------------------------------------------


def _is_bf16(x: Any) -> bool:
    return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16


def widened(x: Any) -> np.ndarray:
    """The values of a handle, bf16 as fp32."""
    if not _is_bf16(x):
        return x.data
    return (np.ascontiguousarray(x.data).astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: Any) -> np.ndarray:
    """The bits of bf16, rounded to nearest even."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _to_tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _to_int(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Toward zero and saturating, NaN to 0, as the hardware converts."""
    info = np.iinfo(dtype)
    x = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    low, high = x <= info.min, x >= info.max
    inside = np.where(low | high, 0, x).astype(dtype)
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(dtype)


def _cast(self: Any, src: Any, dst_type: Any, *_: Any) -> Any:
    dst = dst_type.scalar
    if src.dtype.scalar == dst:
        return src
    x = widened(src)
    if dst == tl.bfloat16:
        return Handle(to_bf16(x), dst)
    dtype = interpreter._get_np_dtype(dst_type)
    if dst.is_int() and x.dtype.kind == "f" and dst.primitive_bitwidth >= 8:
        return Handle(_to_int(x, dtype), dst)
    return Handle(x.astype(dtype), dst)


def _casts_are_right() -> Any:
    b = interpreter.interpreter_builder
    x = Handle(np.array([1.0041, 3e9, -3e9], np.float32), tl.float32)
    nan = Handle(np.full(1, np.nan, np.float32), tl.float32)
    rounded = b.create_fp_trunc(x, tl.bfloat16).data == to_bf16(x.data)
    rounded &= b.create_fp_to_fp(x, tl.bfloat16, ir.ROUNDING_MODE.RTNE).data == to_bf16(x.data)
    whole = b.create_fp_to_si(x, tl.int32).data == [1, 2**31 - 1, -(2**31)]
    return rounded & whole & (b.create_fp_to_si(nan, tl.int32).data == 0)


def _casts() -> list:
    def get_bf16(self: Any, value: float) -> Any:
        return Handle(to_bf16([value]), tl.bfloat16)

    new = {"cast_impl": _cast, "create_fp_to_fp": _cast, "get_bf16": get_bf16}
    return [(Builder, name, function) for name, function in new.items()]


def _in_fp32(name: str) -> tuple:
    """The operation of this name on bf16: in fp32, then rounded, but for comparisons."""
    original = getattr(Builder, name)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(_is_bf16(x) for x in args):
            return original(self, *args, **kwargs)
        args = tuple(Handle(widened(x), tl.float32) if _is_bf16(x) else x for x in args)
        out = original(self, *args, **kwargs)
        return out if out.data.dtype == np.bool_ else Handle(to_bf16(out.data), tl.bfloat16)

    return (Builder, name, run)


def _arithmetic_is_right() -> Any:
    one = Handle(to_bf16([1.0]), tl.bfloat16)
    return widened(interpreter.interpreter_builder.create_fadd(one, one)) == 2


def _arithmetic() -> list:
    unary = "fneg cos exp exp2 floor ceil log log2 sqrt precise_sqrt sin erf rsqrt fabs"
    binary = "fadd fmul fdiv frem fsub precise_divf minimumf minnumf maximumf maxnumf"
    names = [f"create_{name}" for name in f"{unary} {binary} fma clampf".split()]
    names += [x for x in dir(Builder) if x.startswith("create_fcmp")]
    return [_in_fp32(name) for name in names if hasattr(Builder, name)]


def dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, _: Any) -> Any:
    x, y = widened(a), widened(b)
    if x.dtype.kind == "f" and x.dtype != np.float64:
        x, y = x.astype(np.float32), y.astype(np.float32)
    if a.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
        x, y = _to_tf32(x), _to_tf32(y)
    # in fp64: in fp32 some BLAS adds up a row's products in an order that depends on its place
    out = np.matmul(x.astype(np.float64), y.astype(np.float64)).astype(np.float32)
    out = out + widened(acc)
    if _is_bf16(acc):
        return Handle(to_bf16(out), tl.bfloat16)
    return Handle(out.astype(acc.data.dtype), acc.dtype.scalar)


def _dot_is_right() -> Any:
    zero = Handle(np.zeros((1, 1), np.float32), tl.float32)
    third = Handle(np.full((1, 1), 1 / 3, np.float32), tl.float32)
    half = Handle(to_bf16([[0.5]]), tl.bfloat16)
    b, tf32 = interpreter.interpreter_builder, ir.INPUT_PRECISION.TF32
    rounds = b.create_dot(third, third, zero, tf32, 0).data != third.data**2
    return rounds & (b.create_dot(half, half, zero, tf32, 0).data == 0.25)


def _splat(self: Any, block_type: Any, scalar: Any) -> Any:
    """By the type of the value: a comparison of floats says it is a float."""
    data = np.asarray(scalar.data)
    return Handle(np.full(block_type.shape, data.reshape(-1)[0], data.dtype), scalar.dtype.scalar)


def _splat_is_right() -> Any:
    b = interpreter.interpreter_builder
    x = Handle(np.ones(1, np.float32), tl.float32)
    truth = b.create_fcmpOEQ(x, x)
    return b.create_splat(tl.block_type(tl.int1, [2]), truth).data.dtype == np.bool_


def _index_is_right() -> bool:
    """A scalar as an integer: `range(n)` over an argument."""
    said: dict[str, Any] = {}

    class Scope:
        def set_attr(self, owner: Any, name: str, value: Any) -> None:
            said[name] = value

    interpreter._patch_lang_tensor(tl.tensor, Scope())
    one = Handle(np.ones(1, np.int32), tl.int32)
    return said["__index__"](tl.tensor(one, tl.int32)) == 1


def _index() -> list:
    scope = interpreter._LangPatchScope
    set_attr = scope.set_attr

    def patched(self: Any, owner: Any, name: str, value: Any) -> None:
        if name == "__index__":
            set_attr(self, owner, name, lambda x: int(x.handle.data.item()))
        else:
            set_attr(self, owner, name, value)

    return [(scope, "set_attr", patched)]


# The mathematical functions of the device: stubs that return None --------------------------------

LIBDEVICE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{name: getattr(np, name) for name in ("exp", "expm1", "log", "log1p", "tanh")},
    "cospi": lambda x: np.cos(np.pi * x.astype(np.float64)),
    "sinpi": lambda x: np.sin(np.pi * x.astype(np.float64)),
}


def _lifted(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    def run(x: Any) -> Any:
        data = np.asarray(function(x.handle.data)).astype(x.handle.data.dtype)
        return tl.tensor(Handle(data, x.handle.dtype.scalar), x.type)

    return run


def _libdevice_is_right() -> bool:
    one = tl.tensor(Handle(np.ones(1, np.float32), tl.float32), tl.float32)
    return all(getattr(libdevice, name)(one) is not None for name in LIBDEVICE)


def _libdevice() -> list:
    return [(libdevice, name, _lifted(function)) for name, function in LIBDEVICE.items()]


REPAIRS: tuple[tuple[Callable[[], Any], Callable[[], list]], ...] = (
    (_casts_are_right, _casts),
    (_arithmetic_is_right, _arithmetic),
    (_dot_is_right, lambda: [(Builder, "create_dot", dot)]),
    (_splat_is_right, lambda: [(Builder, "create_splat", _splat)]),
    (_index_is_right, _index),
    (_libdevice_is_right, _libdevice),
)
