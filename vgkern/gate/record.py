"""Compile what the package's own launchers launch, for any GPU, on a machine without one.

A launcher runs on tensors that have a shape, a type and an address but no data, under a driver
that stands for the GPU. `kernel[grid](...)` then goes through Triton's own specialisation (pointers
and integers divisible by 16, integers equal to 1), and what it would compile is kept instead of
being launched. A launcher that reads a value from the GPU cannot do that here: it is an error.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from vgkern.gate.arch import ARCHS
from vgkern.gate.cubin import Resources, inspect, spills
from vgkern.gate.row import Row

GRID = (2**31 - 1, 65535, 65535)


class Launch(NamedTuple):
    """One call of a launcher in real use."""

    operator: str
    label: str  # what is special: shape, dtype, options
    call: Callable[[], Any]  # makes its tensors and calls the launcher


class Compile(NamedTuple):
    """One specialisation of one kernel, as a launch asks for it."""

    kernel: str
    labels: list[str]  # of every launch that asks for it
    source: ASTSource
    options: dict[str, Any]
    grid: tuple[int, ...]
    fusion_said: bool  # enable_fp_fusion is passed: its default differs between versions
    halves: bool  # it takes bf16 or fp16 tensors

    @property
    def label(self) -> str:
        more = len(self.labels) - 1
        return self.labels[0] + (f" (+{more})" if more else "")


class _Driver:
    """A GPU of one architecture. One device id each: kernels are cached by device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        a = ARCHS[self.arch]
        return {
            "max_shared_mem": a.shared_block,
            "multiprocessor_count": a.multiprocessors,
            "warpSize": 32,
        }


@contextlib.contextmanager
def _gpu(arch: int) -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: one process cannot interpret and compile")
    before = driver._active
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver._active = before


def _address(tensor: FakeTensor) -> int:
    """As on a GPU, where an allocation starts at a multiple of 512."""
    return int(tensor.storage_offset() * tensor.element_size())


def record(launches: Iterable[Launch], arch: int) -> tuple[list[Compile], list[Row]]:
    """What these launches compile for `arch`, each specialisation once; rows of those that fail."""
    found: dict[str, Compile] = {}
    failed = []
    now: dict[str, Any] = {}

    run = JITFunction.run

    def recorded_run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        now.update(grid=grid, args=args, options=options)
        return run(self, *args, grid=grid, warmup=True, **options)

    def recorded_compile(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any,
        warmup: bool
    ) -> None:  # fmt: skip
        source = ASTSource(self, signature, constants, attrs)
        grid = now["grid"]
        if callable(grid):
            grid = grid({**dict(zip(self.arg_names, now["args"], strict=False)), **now["options"]})
        made = Compile(
            self.fn.__name__,
            [],
            source,
            dict(options.__dict__),
            tuple(grid),
            "enable_fp_fusion" in now["options"],
            any(str(t) in ("*bf16", "*fp16") for t in signature.values()),
        )
        kept = found.setdefault(
            f"{made.kernel} {source.hash()} {sorted(made.options.items())}", made
        )
        if now["label"] not in kept.labels:
            kept.labels.append(now["label"])

    def all_configs(self: Any, *args: Any, **options: Any) -> None:
        for config in self.configs:
            self.fn.run(*args, **{**options, **config.all_kwargs()})

    with (
        _gpu(arch),
        mock.patch.object(FakeTensor, "data_ptr", _address, create=True),
        mock.patch.object(JITFunction, "run", recorded_run),
        mock.patch.object(JITFunction, "_do_compile", recorded_compile),
        mock.patch.object(Autotuner, "run", all_configs),
        mock.patch("vgkern.kernels.live.which", lambda live: None),  # all rows: what waits for data
    ):
        for launch in launches:
            now["label"] = f"{launch.operator} {launch.label}".strip()
            try:
                with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                    launch.call()
            except Exception as e:
                failed.append(
                    Row.broken(launch.operator, now["label"], arch, f"launcher: {_last(e)}")
                )
    return list(found.values()), failed


def compile_launches(launches: Iterable[Launch], arch: int, cache: Path | None = None) -> list[Row]:
    """One row for each specialisation that the launches ask for, and for each that fails."""
    wanted, rows = record(launches, arch)
    target = GPUTarget("cuda", arch, 32)
    compiled = []
    with _gpu(arch):
        for item in wanted:
            try:
                made: Any = triton.compile(item.source, target=target, options=item.options)
            except Exception as e:
                rows.append(Row.broken(item.kernel, item.label, arch, f"compiler: {_last(e)}"))
            else:
                compiled.append((item, made))
        found = inspect([made.asm["cubin"] for _, made in compiled], arch, cache)
        for (item, made), resources in zip(compiled, found, strict=True):
            rows.append(_row(item, made, arch, *resources.values()))
    return rows


def _row(item: Compile, made: Any, arch: int, resources: Resources) -> Row:
    faults = [] if item.fusion_said else ["the launch does not pass enable_fp_fusion"]
    sizes = zip(item.grid, GRID, "xyz", strict=False)
    faults += [f"grid {axis} = {n} > {most}" for n, most, axis in sizes if n > most]
    return Row.of(
        kernel=item.kernel,
        launch=item.label,
        arch=arch,
        compiler=f"triton {triton.__version__}",
        resources=resources,
        spills=_spills(made.asm["ptx"], item.options, arch) if resources.stack else 0,
        shared=made.metadata.shared,
        warps=made.metadata.num_warps,
        columns=getattr(made.metadata, "tmem_size", 0) or 0,
        dots=_dots(made.asm["ttir"]),
        halves=item.halves,
        faults=faults,
    )


def _spills(ptx: str, options: dict[str, Any], arch: int) -> int:
    """Bytes per thread, from the log of Triton's own call of ptxas."""
    backend: Any = make_backend(GPUTarget("cuda", arch, 32))
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as said:
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(ptx, {}, backend.parse_options(options), arch)
    return max(spills(said.getvalue()).values())


_DOT = re.compile(r"tt\.dot(?:_scaled)? .*?: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>")


def _dots(ttir: str) -> list[str]:
    """ "MxNxK type" of every tl.dot, each once."""
    return sorted({f"{m}x{n}x{k} {t}" for m, k, t, n in _DOT.findall(ttir)})


def _last(error: BaseException) -> str:
    """The line of a message that says it: compilers print theirs last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1][:300]}"
