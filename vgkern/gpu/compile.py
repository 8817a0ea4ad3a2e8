"""A worker of the phase build: its share of Triton's kernels, into the cache.

First the launches of `vgkern.gate.launches`, compiled from their signatures for this GPU, then
calls of the ops as the phases smoke and graphs make them. kernels.json: registers and spills as the
driver loads them, the milliseconds of the compiler.
"""

import json
import time
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from vgkern.gate import launches, record
from vgkern.gpu import calls, smoke
from vgkern.gpu.build import failed
from vgkern.gpu.device import Phase

DRY_LAUNCH = "group_advantages"  # one of the quickest to compile


def run(phase: Phase) -> None:
    start = time.monotonic()
    broken: list[str] = []
    every = launches.launches(DRY_LAUNCH if phase.dry else "")
    kernels = compiled(phase, every, broken)
    made = 0 if phase.dry else called(phase, broken)
    found = {"kernels": kernels, "broken": broken, "calls": made}
    found["seconds"] = round(time.monotonic() - start, 1)
    (phase.out / "kernels.json").write_text(json.dumps(found))


def mine(phase: Phase, work: list) -> list:
    return work[phase.share[0] :: phase.share[1]]


def compiled(phase: Phase, every: list, broken: list[str]) -> list[dict[str, Any]]:
    arch = 90
    if not phase.dry:
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    wanted, rows = record.record(mine(phase, every), arch)
    broken += [f"{row.kernel} {row.launch}: {row.problems}" for row in rows]
    target, kernels = GPUTarget("cuda", arch, 32), []
    for item in wanted:
        began = time.monotonic()
        try:
            with record._gpu(arch):
                made: Any = triton.compile(item.source, target=target, options=item.options)
            ms = 1e3 * (time.monotonic() - began)
            loaded = {} if phase.dry else resources(made)
        except Exception as error:
            broken.append(failed(f"{item.kernel} {item.label}", error))
            continue
        shared = made.metadata.shared
        kernels.append({"kernel": item.kernel, "launch": item.label, "ms": round(ms),
                        "shared": shared, **loaded})  # fmt: skip
    return kernels


def resources(made: Any) -> dict[str, int]:
    made._init_handles()
    return {"registers": int(made.n_regs), "spills": int(made.n_spills)}


def called(phase: Phase, broken: list[str]) -> int:
    """What smoke and graphs will launch, launched; the values do not matter."""
    work = mine(phase, [w for w in smoke.work(phase) if w[1] == "triton"])
    for case, backend, dtype in work:
        try:
            calls.runner(phase, case, backend, calls.on_device(phase, case, dtype))()
        except Exception as error:
            broken.append(failed(f"{case} {dtype}", error))
    phase.synchronize()
    return len(work)
