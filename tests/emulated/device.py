"""Tensors that say `cuda` and lie on the host, for tests of code that will run on a GPU.

Every operation runs on the host's data, so numbers equal the CPU's. What a GPU would refuse is
refused: tensors of two devices in one operation, `.numpy()`, a host's address. What a GPU would
wait for is counted in `Device.syncs` with the line that asked: `.item()`, `.tolist()`, `bool()`,
`.cpu()`, `nonzero`, a boolean index, `unique`; `Device.forbid()` makes it an error.

    with Device() as gpu:
        x = torch.zeros(3, device="cuda")     # x.device is cuda:0
        float(x.sum())                        # one of gpu.syncs

Cannot see: kernels (Triton's and CUDA's have tests of their own), streams, memory, time.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
WAITS = {  # operators whose result's value or shape the host needs
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero,
    aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.repeat_interleave, aten.allclose,
}  # fmt: skip
FACTORIES = {  # with `device=`, positional sizes or data
    torch.tensor, torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.eye,
    torch.linspace, torch.rand, torch.randn, torch.randint, torch.randperm, torch.as_tensor,
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like,
    torch.randn_like, torch.empty_strided, torch.scalar_tensor,
}  # fmt: skip


class Refused(RuntimeError):
    """What a GPU would have raised."""


class Emulated(torch.Tensor):
    """`x` is the host's tensor; the wrapper has its shape and none of its memory."""

    x: torch.Tensor

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Emulated:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, x.size(), strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype,
            device=x.device,
        )  # fmt: skip
        made.x = x
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made: Any = Emulated(self.x.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        elif self.requires_grad:
            made.requires_grad_()
        memo[id(self)] = made
        return made

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def data_ptr(self) -> int:
        raise Refused("an address on the device, asked for on the host")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def host(value: Any) -> Any:
    return value.x if isinstance(value, Emulated) else value


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator on the host's data; what it makes is on the device again."""
    device = Device.current
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    plain = [t for t in leaves if not isinstance(t, Emulated)]
    packet = func.overloadpacket
    copies = packet in (aten.copy_, aten._to_copy)
    indexes = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
    stray = [t for t in plain if t.ndim] if not (copies or indexes) else []
    if indexes and isinstance(leaves[0], torch.Tensor) and not isinstance(leaves[0], Emulated):
        stray = [leaves[0]]
    if stray:
        shape = list(stray[0].shape)
        raise Refused(f"{func}: a tensor {shape} on cpu beside one on cuda:0")
    if device is not None:
        masks = indexes and any(t.dtype == torch.bool for t in leaves[1:])
        down = packet is aten.copy_ and not isinstance(args[0], Emulated)
        if packet in WAITS or masks or down:
            device.wait(str(packet))
        if device.recording is not None:
            return device.recording.run(func, args, kwargs)
    return execute(func, args, kwargs)


def execute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    named = {k: v for k, v in kwargs.items() if k != "device"}  # the host's own
    out = func(*tree_map(host, args), **tree_map(host, named))
    if _writes(func):  # gives back what it was given
        given = {id(host(t)): t for t in tree_leaves((args, kwargs)) if isinstance(t, Emulated)}
        return tree_map(lambda t: given.get(id(t), _wrapped(t)), out)
    return tree_map(_wrapped, out)


def _wrapped(t: Any) -> Any:
    return Emulated(t) if isinstance(t, torch.Tensor) and not isinstance(t, Emulated) else t


def _writes(func: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


class _Inside(TorchDispatchMode):
    """What an operator of the device makes on the way (a mask, zeros) is on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) for t in tree_leaves((args, kwargs))):
            return out
        out = tree_map(_wrapped, out)
        device = Device.current
        if device is not None and device.recording is not None:
            device.recording.note(func, args, kwargs or {}, out)
        return out


class Device(TorchFunctionMode):
    """The device, while it is entered. See the module."""

    current: Device | None = None

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.forbidden = self.recording = None  # type: ignore[assignment]
        self.depth = 0

    def __enter__(self) -> Device:
        super().__enter__()
        if self.depth == 0:
            Device.current = self
            self.inference = torch.inference_mode
            torch.inference_mode = torch.no_grad  # a wrapper has no inference tensors
            self.by_device = clip_grad._group_tensors_by_device_and_dtype
            clip_grad._group_tensors_by_device_and_dtype = self._by_device  # asks in C++
            self.swapped = torch.__future__.get_swap_module_params_on_conversion()
            torch.__future__.set_swap_module_params_on_conversion(True)  # a module's `.to`
            self.engine = torch.autograd.graph._engine_run_backward
            torch.autograd.graph._engine_run_backward = self._backward  # type: ignore
            torch.autograd._engine_run_backward = self._backward  # type: ignore[attr-defined]
        self.depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            Device.current = None
            torch.inference_mode = self.inference
            clip_grad._group_tensors_by_device_and_dtype = self.by_device
            torch.__future__.set_swap_module_params_on_conversion(self.swapped)
            torch.autograd.graph._engine_run_backward = self.engine
            torch.autograd._engine_run_backward = self.engine  # type: ignore[attr-defined]
        super().__exit__(*error)

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        there = any(isinstance(t, Emulated) for t in tree_leaves(args[0]))
        with self, _Inside() if there else contextlib.nullcontext():
            return self.engine(*args, **kwargs)  # backwards in Python see the device too

    def _by_device(self, lists: Any, *args: Any) -> Any:
        found = self.by_device(lists, *args)
        return {(v[0][0][0].device, key[1]): v for key, v in found.items()}

    def wait(self, what: str) -> None:
        lines = [
            f"{frame.filename.rpartition('vgkern/')[2]}:{frame.lineno}"
            for frame in traceback.extract_stack()
            if "vgkern/" in frame.filename and "emulated" not in frame.filename
            and "/tests/" not in frame.filename
        ]  # fmt: skip
        said = f"{what} at {' < '.join(reversed(lines[-3:]))}"
        if self.forbidden or self.recording is not None:
            raise Refused(f"the host would wait for the device: {said}")
        self.syncs.append(said)

    @contextlib.contextmanager
    def forbid(self) -> Iterator[None]:
        """No waiting within."""
        self.forbidden = True
        try:
            yield
        finally:
            self.forbidden = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.OpOverload):  # of a dispatch, which has seen the call
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and name in ("to", "cpu", "cuda"):
            return self._moved(func, name, args, kwargs)
        if name == "tolist" and isinstance(first, Emulated):
            self.wait("tolist")
            return first.x.tolist()
        asked = kwargs.get("device")
        there = asked is not None and torch.device(asked).type == "cuda"
        like = name.endswith("_like") or name.startswith("new_")
        if func in FACTORIES or like:
            if there or (asked is None and like and isinstance(first, Emulated)):
                kwargs.pop("device", None)
                given = tree_map(host, args)
                needs = kwargs.pop("requires_grad", False)
                if self.recording is not None and func in (torch.tensor, torch.as_tensor):
                    raise Refused("a copy from the host while a graph is recorded")
                made = Emulated(func(*given, **kwargs))
                if self.recording is not None:
                    self.recording.note(func, given, kwargs, made)
                return made.requires_grad_(needs) if needs else made
            if asked is not None and like:
                return func(*tree_map(host, args), **kwargs)
            return func(*args, **kwargs)
        if any(isinstance(t, Emulated) for t in tree_leaves((args, kwargs))):
            with _Inside():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _moved(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        x, *rest = args
        target = {"cpu": torch.device("cpu"), "cuda": CUDA}.get(name)
        kept = []
        for value in rest if name == "to" else ():
            if isinstance(value, (torch.device, str)):
                target = torch.device(value)
            elif isinstance(value, torch.Tensor):
                target = value.device
                kept.append(value.dtype)
            else:
                kept.append(value)
        if "device" in kwargs and (asked := kwargs.pop("device")) is not None:
            target = torch.device(asked)
        goes = target is not None and (target.type == "cuda") != isinstance(x, Emulated)
        if goes and isinstance(x, Emulated):
            self.wait("copy to the host")
            moved = _Down.apply(x)
        elif goes and self.recording is not None:
            raise Refused("a copy from the host while a graph is recorded")
        elif goes:
            moved = _Up.apply(x)
        else:
            moved = x
        kwargs.pop("non_blocking", None)
        kept = [v for v in kept if not isinstance(v, bool)]
        return func(moved, *kept, **kwargs) if name == "to" and (kept or kwargs) else moved


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return Emulated(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].x


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.x.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return Emulated(grads[0])
