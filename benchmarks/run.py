"""Times the fused ops against bare GEMMs and plain PyTorch on this CPU, in one process.

    python benchmarks/run.py [--threads 2] [--repeat 7] [--json F]
        [--only loss|mask|sample|costate|memory]

All variants of a row run interleaved, the order reversed every repetition; medians. Absolute times
drift with the machine: compare within one row. `gemm3` is the three products that no exact op can
avoid (logits, dh, dW), preallocated, by chunks of 512 rows (256 for the large heads).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import vgkern
from vgkern.ops import _native

LOSS_SHAPES = [(2048, 256, 8192), (1024, 576, 49152)]
MEMORY_SHAPE = (4096, 576, 49152)
SAMPLE_SHAPE = (64, 576, 49152)
SHARES = (0.5, 0.25)


def paired(variants: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds of each variant."""
    return {k: statistics.median(v) for k, v in interleaved(variants, repeat).items()}


def interleaved(variants: dict[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """Seconds of each variant, A B C, C B A, A B C ..."""
    for f in variants.values():
        f()
    seconds: dict[str, list[float]] = {k: [] for k in variants}
    for i in range(repeat):
        for k in list(variants)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            variants[k]()
            seconds[k].append(time.perf_counter() - start)
    return seconds


def inputs(n: int, h: int, v: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Targets sampled from the model, old log-probs near it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, h).to(dtype), (torch.randn(v, h) / h**0.5).to(dtype)
    noise = vgkern.Noise(0, torch.arange(n), torch.zeros(n, dtype=torch.int64))
    token, logp, _ = vgkern.linear_sample(hidden, weight, noise)
    old = logp + 0.1 * torch.randn(n)
    return {"h": hidden, "w": weight, "y": token, "a": torch.randn(n), "old": old}


def bare_gemms(h: Tensor, w: Tensor, chunk: int) -> Callable[[], None]:
    logits = torch.empty(chunk, len(w), dtype=h.dtype)
    dh, dw = torch.empty_like(h), torch.zeros_like(w)

    def run() -> None:
        for i in range(0, len(h), chunk):
            rows = h[i : i + chunk]
            z = logits[: len(rows)]
            torch.mm(rows, w.t(), out=z)
            torch.mm(z, w, out=dh[i : i + chunk])
            torch.addmm(dw, z.t(), rows, out=dw)

    return run


def fused(
    x: dict[str, Tensor],
    mask: Tensor | None = None,
    frozen: bool = False,
    costate: vgkern.Costate | None = None,
    segments: Tensor | None = None,
    objective: str = "dapo",
) -> Callable:
    h, w = x["h"].clone().requires_grad_(), x["w"].clone().requires_grad_(not frozen)

    def run() -> None:
        h.grad = w.grad = None
        vgkern.linear_policy_loss(
            h, w, x["y"], x["a"], objective=objective, old_logp=x["old"], mask=mask,
            costate=costate, segments=segments
        ).loss.backward()  # fmt: skip

    return run


def eager(x: dict[str, Tensor]) -> Callable[[], None]:
    h, w = x["h"].clone().requires_grad_(), x["w"].clone().requires_grad_()

    def run() -> None:
        h.grad = w.grad = None
        logp = (h @ w.T).log_softmax(-1).gather(1, x["y"][:, None])[:, 0].float()
        r = (logp - x["old"]).exp()
        (-torch.min(r * x["a"], r.clamp(0.8, 1.28) * x["a"]).mean()).backward()

    return run


def loss_rows(repeat: int) -> list[dict]:
    rows = []
    for shape in LOSS_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = inputs(*shape, dtype)
            chunk = 512 if shape[2] < 20000 else 256
            variants = {
                "gemm3": bare_gemms(x["h"], x["w"], chunk),
                "fused": fused(x),
                "eager": eager(x),
                "frozen": fused(x, frozen=True),
            }
            if dtype == torch.bfloat16:
                variants["gemm3_f32"] = bare_gemms(x["h"].float(), x["w"].float(), chunk)
            t = paired(variants, repeat)
            rows.append({"case": "loss", "shape": shape, "dtype": str(dtype)[6:], **t})
            show(rows[-1], "gemm3", "fused")
    return rows


def mask_rows(repeat: int) -> list[dict]:
    rows = []
    for shape in LOSS_SHAPES:
        x = inputs(*shape, torch.float32)
        order = torch.rand(shape[0]).argsort().argsort()
        variants = {"fused": fused(x)}
        for share in SHARES:
            variants[f"active_{share:.0%}"] = fused(x, mask=order < share * shape[0])
        t = paired(variants, repeat)
        rows.append({"case": "mask", "shape": shape, "dtype": "float32", **t})
        show(rows[-1], "fused", "fused")
    return rows


def sample_rows(repeat: int) -> list[dict]:
    rows = []
    b, h, v = SAMPLE_SHAPE
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(b, h, v, dtype)
        noise = vgkern.Noise(1, torch.arange(b), torch.zeros(b, dtype=torch.int64))
        z = torch.empty(b, v, dtype=dtype)

        def plain(x: dict[str, Tensor] = x) -> Tensor:
            logits = F.linear(x["h"], x["w"]).float()
            token = torch.multinomial(logits.softmax(-1), 1)
            return logits.log_softmax(-1).gather(1, token)

        def ours(x: dict[str, Tensor] = x, noise: vgkern.Noise = noise) -> Tensor:
            return vgkern.linear_sample(x["h"], x["w"], noise).token

        def mm(x: dict[str, Tensor] = x, z: Tensor = z) -> Tensor:
            return torch.mm(x["h"], x["w"].t(), out=z)

        t = paired({"mm": mm, "fused": ours, "eager": plain}, 2 * repeat + 1)
        rows.append({"case": "sample", "shape": SAMPLE_SHAPE, "dtype": str(dtype)[6:], **t})
        show(rows[-1], "mm", "fused")
    return rows


def costates(n: int, v: int, h: int, table: Tensor | None = None) -> dict[str, vgkern.Costate]:
    """One at every row: the dearest there is."""
    noise = vgkern.Noise(0, torch.arange(n), torch.zeros(n, dtype=torch.int64))
    value, table = torch.randn(n, h), torch.randn(v, h) if table is None else table
    return {
        "expected": vgkern.Costate(value, table),
        "gumbel": vgkern.Costate(value, table, noise, "gumbel"),
    }


def costate_rows(repeat: int) -> list[dict]:
    """The fused loss without and with the third term; what the GEMM of u alone takes."""
    rows = []
    n, h, v = LOSS_SHAPES[1]
    x = inputs(n, h, v, torch.float32)
    apart = costates(n, v, h)
    own = costates(n, v, h, x["w"])
    z, value, table = torch.empty(256, v), apart["gumbel"].value, apart["gumbel"].embedding

    def gemm_u() -> None:
        for i in range(0, n, 256):
            torch.mm(value[i : i + 256], table.t(), out=z)

    variants = {"fused": fused(x), "gemm_u": gemm_u}
    variants |= {k: fused(x, costate=c) for k, c in apart.items()}
    variants |= {f"{k}_tied": fused(x, costate=c) for k, c in own.items()}
    t = paired(variants, repeat)
    rows.append({"case": "costate", "shape": (n, h, v), "dtype": "float32", **t})
    show(rows[-1], "fused", "fused")
    return [*rows, *memory_rows(("fused", "gumbel"))]


def memory_rows(variants: tuple[str, ...] = ("fused", "eager")) -> list[dict]:
    """Peak extra resident memory of one call, gradients included; a fresh process each."""
    rows = []
    for variant in variants:
        out = subprocess.run(
            [sys.executable, __file__, "--peak", variant],
            capture_output=True, text=True, check=True, env=small_arenas(),
        )  # fmt: skip
        rows.append({"case": "memory", "shape": MEMORY_SHAPE, variant: float(out.stdout)})
        print(f"memory {MEMORY_SHAPE} float32  {variant} {rows[-1][variant]:.0f} MiB", flush=True)
    return rows


def small_arenas() -> dict[str, str]:
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory must not hide a peak


def peak(variant: str) -> float:
    make = eager if variant == "eager" else fused
    make(inputs(8, 16, 64, torch.float32))()  # libraries and thread pools are loaded now
    n, h, v = MEMORY_SHAPE
    x = {"h": torch.randn(n, h), "w": torch.randn(v, h) / h**0.5, "y": torch.randint(v, (n,))}
    x |= {"a": torch.randn(n), "old": torch.full((n,), -10.0)}
    run = fused(x, costate=costates(n, v, h)["gumbel"]) if variant == "gumbel" else make(x)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} on this system")


def show(row: dict, base: str, ours: str) -> None:
    times = {k: v for k, v in row.items() if isinstance(v, float)}
    parts = [
        f"{k} {1e3 * v:.0f} ms ({v / times[base]:.2f} x {base})" if k != base
        else f"{k} {1e3 * v:.0f} ms" for k, v in times.items()
    ]  # fmt: skip
    extra = f"  eager/{ours} {times['eager'] / times[ours]:.2f}" if "eager" in times else ""
    print(f"{row['case']} {row['shape']} {row['dtype']}  " + ", ".join(parts) + extra, flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeat", type=int, default=7)
    p.add_argument("--only", choices=["loss", "mask", "sample", "costate", "memory"])
    p.add_argument("--json", type=Path)
    p.add_argument("--peak", choices=["fused", "eager", "gumbel"], help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.peak:
        print(peak(a.peak))
        return
    machine = {"cpu": cpu_name(), "threads": a.threads, "torch": torch.__version__}
    machine |= {"vgkern": vgkern.__version__, "isa": _native.status()["isa"]}
    print(f"{machine['cpu']}, {a.threads} threads, torch {machine['torch']}", flush=True)
    cases = {
        "loss": lambda: loss_rows(a.repeat),
        "mask": lambda: mask_rows(a.repeat),
        "sample": lambda: sample_rows(a.repeat),
        "costate": lambda: costate_rows(a.repeat),
        "memory": memory_rows,
    }
    rows = [r for k, f in cases.items() if a.only in (None, k) for r in f()]
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, default=str))
        print(f"written: {a.json}")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
