"""What the tests add to Triton's interpreter. `watch()` once, before any kernel is imported, in a
process with TRITON_INTERPRET=1.

Every launch, of the tests' own kernels too, runs on the interpreter as the package repairs it
(vgkern/ops/_interpreter.py), checks every address against the tensors it was given (out of the box
it reads past the end of one without a word), counts the bytes it asks for and, within `racing()`,
refuses an address that two programs touch when one of them writes it.

What it cannot see: races inside a program, layouts, registers, approximate instructions.
"""

import contextlib
from dataclasses import dataclass, field

import numpy as np
from triton.runtime import interpreter

from vgkern.ops import _interpreter

Builder = interpreter.InterpreterBuilder


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


def watch():
    """Patches the interpreter of this process. A name that Triton dropped is an AttributeError."""
    if _originals:
        return
    _originals["call"] = interpreter.GridExecutor.__call__
    _watch("create_masked_load", "load", 1)
    _watch("create_masked_store", "store", 2)
    interpreter.GridExecutor.__call__ = _run_launch
    _interpreter.dot = _counted(_interpreter.dot)


@contextlib.contextmanager
def racing():
    """Launches within raise RuntimeError where programs would race. Slow: one dict entry a byte."""
    _LAUNCH.races = True
    try:
        yield
    finally:
        _LAUNCH.races = False


# Memory -----------------------------------------------------------------------------------------


def _watch(name, kind, mask_at):
    original = getattr(Builder, name)

    def run(self, *args, **kwargs):
        _check(args[0], args[mask_at], kind)
        return original(self, *args, **kwargs)

    setattr(Builder, name, run)


def _counted(dot):
    def run(self, a, b, *args):
        TRAFFIC.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *args)

    return run


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
    with _interpreter.repaired():
        return _originals["call"](self, *args, **kwargs)
