"""The device that a phase runs on; in a dry run the CPU, with stand-ins for what only a GPU has.

What a stand-in is for: the phase goes through the same code, so that the code is not what fails on
a GPU. It measures nothing; a dry run's values mean nothing.
"""

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgkern.gpu.record import Facts, read

MIB = 2**20
BACKENDS = ("triton", "cuda")
LACKS = {("linear_divergence", "cuda")}  # as tests/conftest.py
CYCLES = 2e9  # of the device's clock in a second, or a few less
# Where no `facts` were measured: an H100's product of bf16 and copy, by its data sheet less a fifth
CEILINGS = {"copy": 3.0e12, "bf16": 790e12, "fp32": 50e12}


class Phase(Facts):
    """One phase of a run: its facts, its time, its device."""

    share: tuple[int, ...] = (0, 1)

    def __init__(self, name: str, out: Path, limit: float, dry: bool) -> None:
        super().__init__(out / "gpu.jsonl", name)
        self.out, self.dry, self.end = out, dry, time.monotonic() + limit
        self.device = torch.device("cpu" if dry else "cuda")
        self.replays = 1 if dry else 20

    def left(self) -> float:
        """Seconds until this phase is killed."""
        return self.end - time.monotonic()

    def oracle(self) -> Any:
        """tests/oracle.py. Its conftest.py watches the interpreter where kernels run on it."""
        found = importlib.import_module("oracle")
        if self.dry:
            importlib.import_module("conftest").emulate_cuda()
            see_nothing()
        torch.set_num_threads(1 if self.dry else 8)
        return found

    def backends(self, op: str) -> tuple[str, ...]:
        return tuple(b for b in BACKENDS if (op, b) not in LACKS)

    def ceilings(self) -> dict[str, float]:
        """Bytes and flops a second: measured by the phase facts, or else of the data sheet."""
        found = dict(CEILINGS)
        for fact in read(self.out / "gpu.jsonl"):
            if fact["phase"] == "facts" and fact["value"] and fact["op"] == "ceiling":
                found[fact["dtype"] or "copy"] = 1e12 * fact["value"]
        return found

    # What a stand-in replaces -------------------------------------------------------------------

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def waiting_forbidden(self) -> Iterator[None]:
        """What makes the host wait for the device raises."""
        if self.dry:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def captured(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        """(replay, its outputs): `call` as a CUDA graph. Dry: replay runs it and fills the outputs
        of the first time."""
        if self.dry:
            out = call()
            return lambda: _filled(out, call()), out
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        return graph.replay, out

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[Callable[[Tensor], None]]:
        """Within it work goes to another stream; yields what records a tensor as used by the
        first one, which waits for the side stream at the end."""
        if self.dry:
            yield lambda t: None
            return
        first, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(first)
        with torch.cuda.stream(side):
            yield lambda t: t.record_stream(first)
        first.wait_stream(side)

    def seconds(self, calls: list[Callable[[], Any]], count: int, ahead: float = 0) -> float:
        """Of one call, the mean of `count` that rotate over `calls`. The device is kept busy for
        `ahead` seconds first, so that the host is that far ahead of it and its time is not seen."""
        if self.dry:
            start = time.perf_counter()
            for i in range(count):
                calls[i % len(calls)]()
            return (time.perf_counter() - start) / count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(int(ahead * CYCLES))
        begin.record()
        for i in range(count):
            calls[i % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / count

    def peak(self, call: Callable[[], Any]) -> float:
        """MiB that `call` holds at most beside what was there before."""
        if self.dry:
            return sum(t.nbytes for t in _tensors(call())) / MIB
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def forget(self) -> None:
        if not self.dry:
            torch.cuda.empty_cache()

    def kernels(self, call: Callable[[], Any]) -> list[tuple[str, float]]:
        """(name, microseconds) of everything that one call runs on the device, copies and fills
        included; dry: of its operators."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        call()
        self.synchronize()
        kinds = [ProfilerActivity.CPU, *([] if self.dry else [ProfilerActivity.CUDA])]
        with profile(activities=kinds) as seen:
            call()
            self.synchronize()
        if self.dry:
            return [(e.name, float(e.self_cpu_time_total)) for e in seen.events()]
        return [
            (e.name, float(e.time_range.elapsed_us()))
            for e in seen.events()
            if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
        ]


def see_nothing() -> None:
    """As on a GPU: no check of an argument reads a value."""
    from vgkern.ops import _check

    _check.can_look = lambda device: False


def free_of(dry: bool) -> dict[str, str]:
    """The environment without what would choose another backend or interpret kernels."""
    gone = {"VGKERN_BACKEND", *(() if dry else ("TRITON_INTERPRET", "VGKERN_CUDA_LIBRARY"))}
    return {k: v for k, v in os.environ.items() if k not in gone}


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple | list) else ()
    return [t for v in values for t in _tensors(v)]


def _filled(old: Any, new: Any) -> None:
    for a, b in zip(_tensors(old), _tensors(new), strict=True):
        a.detach().copy_(b.detach())
