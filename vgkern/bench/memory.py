"""Peak extra memory of one call of forward and backward, gradients included.

    python -m vgkern.bench.memory '{"work": {...}, "variants": [...]}'       MiB of each, as JSON

On a CPU: a fresh process for each piece of work, in which every variant first runs on a few rows
(libraries, threads and compilers are loaded), then once at full size; the peak is the high-water
mark of resident memory after /proc/self/clear_refs has reset it. Freed memory goes back to the
system at once (MALLOC_MMAP_THRESHOLD_), so that it cannot hide a peak. What is compiled for its
shape runs once before, unmeasured. On a GPU: the allocator's own peak, in this process.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .rivals import Skip
from .work import Work

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
COMPILED = ("torch.compile", "cut-cross-entropy", "Liger")


def peaks(work: Work, variants: Sequence[str], threads: int) -> dict[str, float | str]:
    """MiB by variant, in a new process, or why it has none. Raises Skip where no variant ran."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]).strip(os.pathsep)
    asked = json.dumps({"work": vars(work), "variants": list(variants), "threads": threads})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vgkern.bench.memory", asked],
            capture_output=True, text=True, env=env, timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Skip(f"peak memory: no answer in {TIMEOUT} s") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise Skip(f"peak memory: {said}")
    found: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    return found


def cuda_peak(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def host_peak(call: Callable[[], object]) -> float:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} on this system")


def main(asked: str) -> dict[str, float | str]:
    from .group import Group, first_line

    given = json.loads(asked)
    torch.set_num_threads(given["threads"])
    work, device = Work(**given["work"]), torch.device("cpu")
    found: dict[str, float | str] = {}

    # Compiled for the shape at hand only: dynamic shapes would be another program.
    few = [n for n in given["variants"] if n not in COMPILED] if work.vocab else []

    def one(group: Group, name: str, warm: bool, measured: bool) -> None:
        if name in found:
            return
        try:
            call = group.call(name)
            if warm:
                call()
                group.forget()
            if measured:
                found[name] = host_peak(call)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {first_line(error)}"
        group.forget()

    small = Group(work.replace(rows=min(work.rows, 16)), device)
    for name in few:
        one(small, name, warm=True, measured=False)
    del small
    group = Group(work, device)
    for name in given["variants"]:
        one(group, name, warm=name in COMPILED, measured=True)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
