"""Phase 0: what the machine is, and what it can do at most: copies, and products of the sizes that
a loss has. They are the floors of everything timed."""

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from vgkern.gpu.device import Phase
from vgkern.gpu.record import DTYPES, SHORT, said
from vgkern.gpu.shapes import loss_shapes, name_of

F32, BF16 = torch.float32, torch.bfloat16
PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest", "pytest-xdist", "hypothesis",
            "trl", "liger-kernel", "cut-cross-entropy")  # fmt: skip
REPEAT = 5


def run(phase: Phase) -> None:
    for name, value in machine(phase).items():
        phase.fact("machine", name, value)
    for package in PACKAGES:
        try:
            phase.fact("version", package, metadata.version(package))
        except metadata.PackageNotFoundError:
            phase.fact("version", package, why="not installed")
    ceilings(phase)
    side = 64 if phase.dry else 8192
    for dtype in (BF16, DTYPES["fp16"], F32):
        product(phase, "ceiling", (side, side, side), dtype, dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    product(phase, "GEMM tf32", (side, side, side), F32, F32)
    torch.set_float32_matmul_precision(before)
    real_shapes(phase)


def machine(phase: Phase) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)),
        "cuda": torch.version.cuda, "nvcc": nvcc(),
    }  # fmt: skip
    if phase.dry:
        return {"gpu": "none: a dry run", "memory_GiB": 0, "driver": "", **found}
    gpu = torch.cuda.get_device_properties(phase.device)
    asked = "--query-gpu=driver_version,clocks.max.sm,power.limit"
    return {
        "gpu": gpu.name, "memory_GiB": round(gpu.total_memory / 2**30, 1),
        "driver": said_by("nvidia-smi", asked, "--format=csv,noheader"), **found,
    }  # fmt: skip


def nvcc() -> str:
    from vgkern.ops import _cuda_build

    lines = said_by(_cuda_build.find_nvcc() or "nvcc", "--version").split("release ")
    return lines[-1].split(",")[0] if len(lines) > 1 else ""


def said_by(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return said(error)
    return done.stdout.strip()


def best(phase: Phase, call: Any) -> float:
    call()
    return min(phase.seconds([call], 2) for _ in range(1 if phase.dry else REPEAT))


def ceilings(phase: Phase) -> None:
    """Copy: bytes read and written a second."""
    a = torch.ones((2**10 if phase.dry else 2**30) // 4, device=phase.device)
    b = torch.empty_like(a)
    rate = 2 * a.nbytes / best(phase, lambda: b.copy_(a))
    phase.fact("ceiling", "TB/s", rate / 1e12)


def product(
    phase: Phase, op: str, sizes: tuple[int, int, int], dtype: torch.dtype, to: torch.dtype,
    add: bool = False, transposed: str = "",
) -> None:  # fmt: skip
    """TFLOP/s of an [M, K] by [K, N] product, `transposed`: the operands that are views."""
    m, n, k = sizes
    at: dict[str, Any] = {"dtype": SHORT[dtype], "shape": name_of(sizes)}
    metric = "TFLOP/s"
    try:
        a = torch.randn(*((k, m) if "a" in transposed else (m, k)), device=phase.device).to(dtype)
        b = torch.randn(*((n, k) if "b" in transposed else (k, n)), device=phase.device).to(dtype)
        a, b = (a.T if "a" in transposed else a), (b.T if "b" in transposed else b)
        out = torch.zeros(m, n, dtype=to, device=phase.device)
        seconds = best(phase, lambda: multiply(phase, out, a, b, add))
    except Exception as error:
        phase.fact(op, metric, why=said(error), **at)
        return
    phase.fact(op, metric, 2 * m * n * k / seconds / 1e12, **at)


def multiply(phase: Phase, out: Tensor, a: Tensor, b: Tensor, add: bool) -> Any:
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if phase.dry:
        return out.addmm_(a.float(), b.float(), beta=float(add))
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def real_shapes(phase: Phase) -> None:
    """The three products of a loss, whole and by chunks of rows; fp32 sums of 16-bit factors."""
    for n, h, v in (loss_shapes(phase)["large"], loss_shapes(phase)["small H"]):
        for rows in (n, n // 4, n // 16):
            rows = max(rows, 1)
            product(phase, "GEMM logits", (rows, v, h), BF16, F32, transposed="b")
            product(phase, "GEMM dh", (rows, h, v), BF16, F32)
            product(phase, "GEMM dW", (v, h, rows), BF16, F32, transposed="a")
            product(phase, "GEMM dW added", (v, h, rows), BF16, F32, add=True, transposed="a")
        phase.forget()
