"""Phase 1: everything that is compiled, side by side on all cores, before anything is measured.

The C++ library, the CUDA library for the GPU that is present, and Triton's kernels into the cache
that the other phases use: the launches of `vgkern.gate.launches`, and by real calls those of the
phases smoke and graphs. What a worker cannot compile is a failed check with the compiler's words.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from vgkern.gpu.device import Phase, free_of
from vgkern.gpu.record import said


def run(phase: Phase) -> None:
    count = 1 if phase.dry else max(len(os.sched_getaffinity(0)) - 2, 1)
    with ThreadPoolExecutor(count + 2) as pool:
        jobs = [pool.submit(library, phase, "cuda", cuda), pool.submit(library, phase, "cpu", cpu)]
        workers = [pool.submit(worker, phase, i, count) for i in range(count)]
        for job in jobs:
            job.result()
        merge(phase, [w.result() for w in workers])


def library(phase: Phase, name: str, make: Callable[[Phase], None]) -> None:
    start = time.monotonic()

    def built() -> tuple:
        make(phase)
        return time.monotonic() - start, True

    phase.check("library", "seconds", built, backend=name)


def cpu(phase: Phase) -> None:
    from vgkern.ops import _native

    _native.load()


def cuda(phase: Phase) -> None:
    """Built, and loaded into this torch."""
    from vgkern.ops import _cuda

    if phase.dry:
        importlib.import_module("conftest").emulate_cuda()
    if why := _cuda.missing(phase.device):
        raise RuntimeError(why)


def worker(phase: Phase, i: int, count: int) -> tuple[Path, str]:
    """(the file with what it compiled, the end of what it said)."""
    work = phase.out / f"compile-{i}.tmp"
    work.mkdir(exist_ok=True)
    env = {k: v for k, v in free_of(phase.dry).items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vgkern.gpu", "compile", "--out", str(work)]
    command += ["--share", f"{i}/{count}", "--limit", str(phase.left()), *["--dry"] * phase.dry]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace")  # fmt: skip
    print(done.stdout, end="", flush=True)
    end = (done.stdout.strip().splitlines() or [""])[-1]
    return work, f"exit {done.returncode}: {end}" if done.returncode else ""


def merge(phase: Phase, done: list[tuple[Path, str]]) -> None:
    """One fact for all workers, and kernels.json."""
    kernels, broken, calls, slowest = [], [], 0, 0.0
    for work, why in done:
        if why:
            broken.append(why)
        found = work / "kernels.json"
        if found.exists():
            part = json.loads(found.read_text())
            kernels += part["kernels"]
            broken += part["broken"]
            calls += part["calls"]
            slowest = max(slowest, part["seconds"])
        for path in work.iterdir():
            path.unlink()
        work.rmdir()
    text = json.dumps({"torch": torch.__version__, "kernels": kernels, "broken": broken}, indent=0)
    (phase.out / "kernels.json").write_text(text)
    why = f"{len(broken)} failed, the first: {broken[0]}" if broken else ""
    ok = not broken and bool(kernels)
    phase.fact("triton", "compiled", len(kernels), ok=ok, why=why, backend="triton")
    phase.fact("triton", "called", calls, why="calls of ops that compile what they launch")
    phase.fact("triton", "slowest_worker_s", slowest)


def failed(label: str, error: BaseException) -> str:
    return f"{label}: {said(error)}"
