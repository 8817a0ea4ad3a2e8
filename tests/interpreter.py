"""Repairs Triton's interpreter, so that what passes on it is evidence. `repair()` once, before any
kernel is imported, in a process with TRITON_INTERPRET=1.

Out of the box (3.6 to 3.9) it multiplies the bit patterns of bf16, truncates where hardware rounds
to nearest, computes tf32 in full precision, wraps float-to-int conversions, splats a scalar
comparison as a float, has no libdevice, and reads past the end of a tensor without a word.
Repaired, each launch also checks every address against the tensors it was given, counts the bytes
it asks for and, within `racing()`, refuses an address that two programs touch when one of them
writes it.

What it cannot see: races inside a program, layouts, registers, approximate instructions.
"""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


@dataclass
class Traffic:
    """What the launches since `reset()` asked of memory and of the tensor cores."""

    loaded: int = 0  # bytes, each request counted, caches or not
    stored: int = 0
    flops: int = 0  # of dots

    def reset(self):
        self.loaded = self.stored = self.flops = 0


@dataclass
class _Launch:
    spans: list = field(default_factory=list)  # (first, last) address of each storage
    owners: dict = field(default_factory=dict)  # address -> (load or store, program)
    races: bool = False


TRAFFIC = Traffic()
_LAUNCH = _Launch()
_originals: dict = {}


def repair():
    """Patches the interpreter of this process. A name that Triton dropped is an AttributeError."""
    if _originals:
        return
    _originals["call"] = interpreter.GridExecutor.__call__
    _repair_index()
    _repair_casts()
    _repair_bf16_arithmetic()
    Builder.create_dot = _dot
    Builder.create_splat = _splat
    _watch("create_masked_load", "load", 1)
    _watch("create_masked_store", "store", 2)
    interpreter.GridExecutor.__call__ = _run_launch
    _fill_libdevice()


@contextlib.contextmanager
def racing():
    """Launches within raise RuntimeError where programs would race. Slow: one dict entry a byte."""
    _LAUNCH.races = True
    try:
        yield
    finally:
        _LAUNCH.races = False


# Numbers: bf16 is stored as its uint16 bits ------------------------------------------------------


def _is_bf16(x):
    return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16


def _widened(x):
    """The values of a handle, bf16 as fp32."""
    if not _is_bf16(x):
        return x.data
    return (np.ascontiguousarray(x.data).astype(np.uint32) << 16).view(np.float32)


def to_bf16(x):
    """The bits of bf16, rounded to nearest even."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _to_tf32(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _to_int(x, dtype):
    """Toward zero and saturating, NaN to 0, as the hardware converts."""
    info = np.iinfo(dtype)
    x = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    low, high = x <= info.min, x >= info.max
    inside = np.where(low | high, 0, x).astype(dtype)
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(dtype)


def _cast(self, src, dst_type, *_):
    dst = dst_type.scalar
    if src.dtype.scalar == dst:
        return src
    x = _widened(src)
    if dst == tl.bfloat16:
        return Handle(to_bf16(x), dst)
    dtype = interpreter._get_np_dtype(dst_type)
    if dst.is_int() and x.dtype.kind == "f" and dst.primitive_bitwidth >= 8:
        return Handle(_to_int(x, dtype), dst)
    return Handle(x.astype(dtype), dst)


def _repair_casts():
    Builder.cast_impl = _cast
    Builder.create_fp_to_fp = _cast
    Builder.get_bf16 = lambda self, value: Handle(to_bf16([value]), tl.bfloat16)


def _in_fp32(name):
    """The operation of this name on bf16: in fp32, then rounded, but for comparisons."""
    original = getattr(Builder, name)

    def run(self, *args, **kwargs):
        if not any(_is_bf16(x) for x in args):
            return original(self, *args, **kwargs)
        args = [Handle(_widened(x), tl.float32) if _is_bf16(x) else x for x in args]
        out = original(self, *args, **kwargs)
        return out if out.data.dtype == np.bool_ else Handle(to_bf16(out.data), tl.bfloat16)

    setattr(Builder, name, run)


def _repair_bf16_arithmetic():
    unary = "fneg cos exp exp2 floor ceil log log2 sqrt precise_sqrt sin erf rsqrt fabs"
    binary = "fadd fmul fdiv frem fsub precise_divf minimumf minnumf maximumf maxnumf"
    for name in f"{unary} {binary} fma clampf".split():
        if hasattr(Builder, f"create_{name}"):
            _in_fp32(f"create_{name}")
    for name in [x for x in dir(Builder) if x.startswith("create_fcmp")]:
        _in_fp32(name)


def _dot(self, a, b, acc, precision, _):
    x, y = _widened(a), _widened(b)
    if x.dtype.kind == "f" and x.dtype != np.float64:
        x, y = x.astype(np.float32), y.astype(np.float32)
    if a.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
        x, y = _to_tf32(x), _to_tf32(y)
    TRAFFIC.flops += 2 * x.size * y.shape[-1]
    # in fp64: in fp32 some BLAS adds up a row's products in an order that depends on its place
    out = np.matmul(x.astype(np.float64), y.astype(np.float64)).astype(np.float32)
    out = out + _widened(acc)
    if _is_bf16(acc):
        return Handle(to_bf16(out), tl.bfloat16)
    return Handle(out.astype(acc.data.dtype), acc.dtype.scalar)


def _splat(self, block_type, scalar):
    """By the type of the value: a comparison of floats says it is a float."""
    data = np.asarray(scalar.data)
    return Handle(np.full(block_type.shape, data.reshape(-1)[0], data.dtype), scalar.dtype.scalar)


def _index(x):
    return int(x.handle.data.item())


def _repair_index():
    """An array of one element is no integer from numpy 2.4 on; Triton 3.6 takes it for one."""
    scope = interpreter._LangPatchScope
    set_attr = scope.set_attr

    def patched(self, obj, name, value):
        if name == "__index__":
            value = _index
        set_attr(self, obj, name, value)

    scope.set_attr = patched


# Memory -----------------------------------------------------------------------------------------


def _watch(name, kind, mask_at):
    original = getattr(Builder, name)

    def run(self, *args, **kwargs):
        _check(args[0], args[mask_at], kind)
        return original(self, *args, **kwargs)

    setattr(Builder, name, run)


def _check(pointers, mask, kind):
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    at = pointers.data.reshape(-1).astype(np.uint64)
    if mask is not None:
        at = at[np.broadcast_to(mask.data, pointers.data.shape).reshape(-1).astype(bool)]
    program = interpreter.interpreter_builder.grid_idx
    ok = np.zeros(at.shape, bool)
    for first, last in _LAUNCH.spans:
        ok |= (at >= first) & (at + np.uint64(size) <= last)
    if not ok.all():
        lanes = f"{int((~ok).sum())} of {at.size} lanes"
        raise IndexError(f"{kind} out of bounds: {lanes}, program {program}")
    if kind == "load":
        TRAFFIC.loaded += at.size * size
    else:
        TRAFFIC.stored += at.size * size
    if _LAUNCH.races:
        for address in np.unique(at).tolist():
            _claim(address, kind, program)


def _claim(address, kind, program):
    before, owner = _LAUNCH.owners.get(address, (None, program))
    if owner != program and "store" in (kind, before):
        raise RuntimeError(f"race: {kind} by {program} on an address {before} by {owner}")
    if before != "store":
        _LAUNCH.owners[address] = (kind, program)


def _run_launch(self, *args, **kwargs):
    """A launch, with the address ranges of the tensors that it was given."""
    _LAUNCH.spans, _LAUNCH.owners = [], {}
    to_host = self._init_args_hst

    def spy(*given):
        out = to_host(*given)
        for x in (*out[0], *out[1].values()):
            if hasattr(x, "untyped_storage"):
                s = x.untyped_storage()
                _LAUNCH.spans.append((np.uint64(s.data_ptr()), np.uint64(s.data_ptr() + len(s))))
        return out

    self._init_args_hst = spy
    with np.errstate(all="ignore"):
        return _originals["call"](self, *args, **kwargs)


# The mathematical functions of the device -------------------------------------------------------


def _fill_libdevice():
    from triton.language.extra import libdevice

    def lifted(function):
        def run(x):
            data = np.asarray(function(x.handle.data)).astype(x.handle.data.dtype)
            return tl.tensor(Handle(data, x.handle.dtype.scalar), x.type)

        return run

    for name in ("exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "sqrt", "sin", "cos"):
        setattr(libdevice, name, lifted(getattr(np, name)))
    libdevice.cospi = lifted(lambda x: np.cos(np.pi * x.astype(np.float64)))
    libdevice.sinpi = lifted(lambda x: np.sin(np.pi * x.astype(np.float64)))
    libdevice.rsqrt = lifted(lambda x: torch.rsqrt(torch.from_numpy(np.array(x))).numpy())
    libdevice.erf = lifted(lambda x: torch.erf(torch.from_numpy(np.array(x))).numpy())
