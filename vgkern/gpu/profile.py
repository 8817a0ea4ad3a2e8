"""Phase 8: where the time of the two main shapes goes, kernel by kernel (profile.json)."""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from vgkern.gpu.device import Phase
from vgkern.gpu.record import said
from vgkern.gpu.shapes import loss_inputs, loss_shapes, name_of
from vgkern.gpu.timing_loss import gradients, ours

TOP = 12
NCU = "dram__throughput.avg.pct_of_peak_sustained_elapsed"


def run(phase: Phase) -> None:
    phase.oracle()
    found = []
    for name in ("large", "small H"):
        shape = loss_shapes(phase)[name]
        x = loss_inputs(phase, shape, torch.bfloat16)
        for backend in phase.backends("linear_policy_loss"):
            at: dict[str, Any] = {"backend": backend, "dtype": "bf16", "shape": name_of(shape)}
            try:
                call = gradients(ours(backend), x, ("hidden", "weight"))
                rows = by_kernel(phase.kernels(call))
            except Exception as error:
                phase.fact("linear_policy_loss", "device_ms", why=said(error), **at)
                continue
            total = sum(r["us"] for r in rows)
            found.append({**at, "us": round(total, 1), "kernels": rows})
            phase.fact("linear_policy_loss", "device_ms", total / 1e3, **at)
            for row in rows[:TOP]:
                why = f"{row['us'] / max(total, 1e-9):.1%} of the call, {row['count']} launches"
                phase.fact(f"kernel {row['name'][:60]}", "us", row["us"], why=why, **at)
        del x
        phase.forget()
    (phase.out / "profile.json").write_text(json.dumps(found, indent=1))
    counters(phase)


def by_kernel(seen: list[tuple[str, float]]) -> list[dict]:
    """Longest first."""
    rows: dict[str, dict] = defaultdict(lambda: {"us": 0.0, "count": 0})
    for name, us in seen:
        rows[name]["us"] += us
        rows[name]["count"] += 1
    made = [{"name": n, "us": round(r["us"], 2), "count": r["count"]} for n, r in rows.items()]
    return sorted(made, key=lambda r: -float(r["us"]))


COUNTED = """
import torch, vgkern
z = torch.randn(4096, 49152, device="cuda", requires_grad=True)
y = torch.randint(49152, (4096,), device="cuda")
for backend in ("triton", "cuda"):
    torch.autograd.grad(vgkern.token_logprobs(z, y, backend=backend).logp.sum(), z)
torch.cuda.synchronize()
"""


def counters(phase: Phase) -> None:
    """What share of the memory's bandwidth the row kernels reach, by the hardware's counters."""
    usual = Path("/usr/local/cuda/bin/ncu")
    ncu = shutil.which("ncu") or (str(usual) if usual.is_file() else None)
    if ncu is None or phase.dry or phase.left() < 20:
        why = "a dry run" if phase.dry else "no ncu" if ncu is None else "no time left"
        phase.fact("ncu", "dram_percent", why=why)
        return
    command = [ncu, "--csv", "--metrics", NCU, "-k", "regex:row_stats|row_grad|stats_kernel"]
    try:
        done = subprocess.run([*command, sys.executable, "-c", COUNTED], capture_output=True,
                              text=True, timeout=min(phase.left() - 5, 40))  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        phase.fact("ncu", "dram_percent", why=said(error))
        return
    rows = [line.split('","') for line in done.stdout.splitlines() if NCU in line]
    for row in rows:
        name, value = row[4], row[-1].strip('"')
        phase.fact("ncu", "dram_percent", float(value.replace(",", "")), shape=name[:60])
    if not rows:
        end = (done.stdout.strip().splitlines() or [done.stderr])[-1]
        phase.fact("ncu", "dram_percent", why=f"ncu counted nothing: {end}")
