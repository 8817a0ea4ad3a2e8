"""A call on tensors without data: every launch that a GPU would see, and what it moves.

The tensors have shapes and dtypes and say that they are on `cuda:0`, so that the code takes the
branches of a GPU; torch itself, whose autograd engine wants a driver, believes them to be on the
CPU. Three kinds of launch are seen: torch's operators by a dispatch mode, Triton's kernels in
`JITFunction.run`, those of csrc/*.cu in a stand-in for `torch.ops.vgkern_launch`.

Limits: what a row holds decides nothing here (every row has a gradient, unless `live` says how
many); an operator of torch counts as the launches that `aten` says; the allocator rounds no size.
"""

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from vgkern.gate import launches, record
from vgkern.gate.traffic import aten, cuda, triton
from vgkern.gate.traffic.moved import Moved
from vgkern.ops import _cuda

MEMORY = 80 * 10**9  # of the device that is pretended
ARCH = 90
DEVICE = torch.device("cuda", 0)


class Launch(NamedTuple):
    """One launch, or the few that one operator of torch is."""

    kind: str  # aten, product, triton, cuda
    name: str
    shapes: str
    moved: Moved
    times: int = 1
    waits: bool = False  # the host, for the device

    def __str__(self) -> str:
        return f"{self.kind:<8}{self.name:<28}{self.shapes}"


@dataclass
class Count:
    launched: list[Launch] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # operators for which the host waits
    peak: int = 0  # most bytes allocated at a time, beside the inputs

    @property
    def launches(self) -> int:
        return sum(x.times for x in self.launched)

    @property
    def bytes(self) -> int:
        return sum(x.moved.bytes for x in self.launched)

    @property
    def flops(self) -> int:
        return sum(x.moved.flops for x in self.launched)


def count(call: Callable[[], Any], backend: str, live: int | None = None) -> Count:
    """What `call`, which makes its tensors by `tensor`, does on `backend` ("triton" or "cuda").
    `live`: how many rows `nonzero` finds; None: all of them."""
    if backend not in ("triton", "cuda"):
        raise ValueError(f"backend: got {backend!r}; allowed: 'triton', 'cuda'")
    found = Count()
    with _pretended(found, live):
        call()
    return found


def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """An input without data, for within `count`; it is in no peak."""
    counter = _Counter.now()
    with counter.aside():
        x = torch.empty(shape, dtype=dtype, device=DEVICE)
    counter.own(x)
    return x.requires_grad_() if grad else x


@contextlib.contextmanager
def _pretended(found: Count, live: int | None) -> Iterator["_Counter"]:
    counter = _Counter(found, live)
    with contextlib.ExitStack() as stack:
        for patch in _patches(counter):
            stack.enter_context(patch)
        stack.enter_context(record._gpu(ARCH))
        stack.enter_context(_as_by_default())
        _forget()
        stack.callback(_forget)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _Counter._active.counter = counter
        stack.callback(setattr, _Counter._active, "counter", None)
        stack.enter_context(counter)
        stack.enter_context(_Python(counter))
        yield counter


def _patches(counter: "_Counter") -> list[Any]:
    properties = mock.Mock(total_memory=MEMORY, multi_processor_count=132, major=9, minor=0)
    device, there = FakeTensor.device, property(lambda x: counter.says(x, device))
    cuda_is = {
        "_exchange_device": lambda index: index,
        "_maybe_exchange_device": lambda index: index,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_sync_debug_mode": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (MEMORY - counter.allocated, MEMORY),
        "memory_allocated": lambda *_: counter.allocated,
        "memory_reserved": lambda *_: counter.allocated,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
    }
    return [
        *(mock.patch.object(torch.cuda, name, does) for name, does in cuda_is.items()),
        mock.patch.object(FakeTensor, "device", there),
        mock.patch.object(
            FakeTensor, "is_cuda", property(lambda x: x.device.type == "cuda"), create=True
        ),
        mock.patch.object(JITFunction, "run", lambda *a, **k: counter.triton_run(*a, **k)),
        mock.patch.object(torch.ops, "vgkern_launch", _CudaLaunchers(counter), create=True),
        mock.patch.object(_cuda, "missing", lambda device: None),
    ]


@contextlib.contextmanager
def _as_by_default() -> Iterator[None]:
    """torch as it is where nobody set anything."""
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(strict)


def _forget() -> None:
    """Drops what the drivers remember of a device."""
    for name in ("memory", "tile"):
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(f"vgkern.kernels.{name}")
            for f in vars(module).values():
                if hasattr(f, "cache_clear"):
                    f.cache_clear()


class _CudaLaunchers:
    """`torch.ops.vgkern_launch`, by the schemas of csrc/bindings_cuda.cpp."""

    def __init__(self, counter: "_Counter") -> None:
        self._counter, self._names = counter, cuda.arguments()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        names = self._names[name]

        def launch(*args: Any) -> None:
            if len(args) != len(names):
                raise TypeError(f"vgkern_launch.{name}: {len(args)} arguments of {len(names)}")
            given = dict(zip(names, args, strict=True))
            for moved in cuda.moved(name, given):
                self._counter.add("cuda", name, given.values(), moved)

        return launch


class _Python(TorchFunctionMode):
    """What only Python's side of a call says: that a tensor is made without a device, and so on the
    host (torch's own code means the device of the tensors that it works on), and that one is
    brought to the host."""

    MAKES = ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")

    def __init__(self, counter: "_Counter") -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        to = [*args[1:2], kwargs.get("device")] if name == "to" else []
        if name == "cpu" or any(isinstance(x, (str, torch.device)) and _is_cpu(x) for x in to):
            self.counter.found.waits.append("cpu")
        if name not in self.MAKES or not _is_cpu(kwargs.get("device") or "cpu"):
            return func(*args, **kwargs)
        before, self.counter.on_host = self.counter.on_host, True
        try:
            return func(*args, **kwargs)
        finally:
            self.counter.on_host = before


class _Counter(TorchDispatchMode):
    _active = threading.local()

    def __init__(self, found: Count, live: int | None) -> None:
        super().__init__()
        self.found, self.live = found, live
        self.below = False  # torch's own code runs: no tensor pretends
        self.silent = False
        self.on_host = False  # what is made now
        self.storages: dict[Any, tuple[StorageWeakRef, int]] = {}
        self.own_bytes = 0
        self.owned: set[Any] = set()
        self.inputs: list[Tensor] = []

    @classmethod
    def now(cls) -> "_Counter":
        counter: _Counter | None = getattr(cls._active, "counter", None)
        if counter is None:
            raise RuntimeError("tensor() is for calls within count()")
        return counter

    # --- what tensors say

    def says(self, x: Any, device: Any) -> torch.device:
        real: torch.device = device.fget(x)
        if self.below or real.type != "cpu" or getattr(x, "_vg_host", False):
            return real
        return DEVICE

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Nothing within is counted."""
        before, self.silent = self.silent, True
        try:
            yield
        finally:
            self.silent = before

    # --- launches

    def add(
        self, kind: str, name: str, values: Any, moved: Moved, times: int = 1, waits: bool = False
    ) -> None:
        if times and not self.silent:
            tensors = {id(x): x for x in tree_leaves(list(values)) if isinstance(x, Tensor)}
            shapes = [_short(x) for x in tensors.values()]
            self.found.launched.append(Launch(kind, name, " ".join(shapes), moved, times, waits))

    def triton_run(self, kernel: Any, *args: Any, grid: Any, **options: Any) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        programs = tuple(grid(given) if callable(grid) else grid)
        name = kernel.fn.__name__
        self.add("triton", name, args, triton.moved(name, given, programs))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace in ("vgkern_triton", "vgkern_cuda"):
            with self._above():
                return _launcher(func)(*args, **kwargs)
        if func.namespace == "aten" and _is_composite(func):
            with self._above():
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return self._operator(func, args, kwargs)

    @contextlib.contextmanager
    def _above(self) -> Iterator[None]:
        """Python code of an op again: it is seen, and tensors pretend."""
        before, self.below = self.below, False
        try:
            with self:
                yield
        finally:
            self.below = before

    def _operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = aten.name_of(func)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        wanted = kwargs.get("device")
        on_device = wanted is not None and torch.device(wanted).type == "cuda"
        inputs = [x for x in given if not _on_host(x)]
        host = not on_device and not inputs and (self.on_host or bool(given))
        if on_device:
            kwargs["device"] = torch.device("cpu")
        self.below = True
        try:
            if name == "_to_copy" and on_device and inputs and _same_type(inputs[0], kwargs):
                return args[0].detach()  # is there already
            out = self._result(func, name, args, kwargs)
        finally:
            self.below = False
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in outputs:
            if host:
                vars(x)["_vg_host"] = True
        if host:
            return out
        self._allocate(outputs)
        waits = name in aten.WAITS or (name == "_to_copy" and not inputs)
        if waits:
            self.found.waits.append(name)
        times = aten.launches(func, inputs, outputs)
        if times:
            kind = "product" if name in aten.PRODUCTS else "aten"
            moved = aten.moved(func, args, kwargs, inputs, outputs)
            self.add(kind, name, [*inputs, *outputs], moved, times, waits)
        return out

    def _result(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "nonzero":
            found = args[0].shape[0] if self.live is None else min(self.live, args[0].shape[0])
            return torch.empty(found, args[0].ndim, dtype=torch.int64)
        if name in ("mm", "addmm") and func._overloadname in ("dtype", "dtype_out"):  # GPU only
            if "out" in kwargs:
                return kwargs["out"]
            a, b, dtype = args[-3:]
            return torch.empty(a.shape[0], b.shape[1], dtype=dtype)
        return func(*args, **kwargs)

    # --- memory

    @property
    def allocated(self) -> int:
        return self.own_bytes + self._sum()

    def own(self, x: Tensor) -> None:
        """An input: not counted as what the call allocates."""
        storage = x.untyped_storage()
        self.owned.add(storage._cdata)
        self.own_bytes += storage.nbytes()
        self.inputs.append(x)

    def _allocate(self, outputs: list[Tensor]) -> None:
        if self.silent:
            return
        for x in outputs:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.owned and key not in self.storages:
                self.storages[key] = StorageWeakRef(storage), storage.nbytes()
        self.found.peak = max(self.found.peak, self._sum())

    def _sum(self) -> int:
        gone = [key for key, (storage, _) in self.storages.items() if storage.expired()]
        for key in gone:
            del self.storages[key]
        return sum(size for _, size in self.storages.values())


def _launcher(func: Any) -> Callable[..., Any]:
    name = aten.name_of(func)
    if func.namespace == "vgkern_cuda":
        launcher: Callable[..., Any] = getattr(_cuda, name)
        return launcher
    return launches.launcher(name)


def _is_composite(func: Any) -> bool:
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def _is_cpu(device: Any) -> bool:
    return torch.device(device).type == "cpu"


def _on_host(x: Tensor) -> bool:
    return not isinstance(x, FakeTensor) or getattr(x, "_vg_host", False)


def _same_type(x: Tensor, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("dtype") in (None, x.dtype)


def _short(x: Tensor) -> str:
    kind = str(x.dtype).removeprefix("torch.").replace("float", "f")
    return f"{kind}[{','.join(map(str, x.shape))}]"
