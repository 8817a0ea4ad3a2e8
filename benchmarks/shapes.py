"""The fused policy loss over model shapes: against bare GEMMs, eager and compiled PyTorch; memory.

    python benchmarks/shapes.py [--threads 2] [--repeat 5] [--json F]
        [--only fp32|bf16|rows|packed|memory]

All variants of a row run interleaved, the order reversed every repetition; medians; the noise is
half the spread between the quartiles of the fused times. `gemm3`: the three products that no exact
op avoids. Peak memory is that of one call in a fresh process, gradients included.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import run as common
import torch
from torch import Tensor

import vgkern
from vgkern.ops import _native

SHAPES = [(8192, 256, 512), (2048, 256, 8192), (4096, 576, 49152), (1024, 896, 151936)]
ROWS = [SHAPES[1], (1024, 576, 49152)]  # of the cases with fewer active rows


def chunk(v: int) -> int:
    return 512 if v < 20000 else 256


def repeats(shape: tuple[int, int, int], repeat: int) -> int:
    n, h, v = shape
    return repeat if n * h * v < 5e10 else max(3, repeat // 2)


def eager_loss(h: Tensor, w: Tensor, y: Tensor, a: Tensor, old: Tensor) -> Tensor:
    logp = (h @ w.T).log_softmax(-1).gather(1, y[:, None])[:, 0].float()
    r = (logp - old).exp()
    return -torch.min(r * a, r.clamp(0.8, 1.28) * a).mean()


def compiled(x: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    loss = torch.compile(eager_loss)
    h, w = x["h"].clone().requires_grad_(), x["w"].clone().requires_grad_()

    def run() -> None:
        h.grad = w.grad = None
        loss(h, w, x["y"], x["a"], x["old"]).backward()

    return run


def fp32_rows(repeat: int) -> list[dict]:
    rows = []
    for shape in SHAPES:
        torch.compiler.reset()
        x = common.inputs(*shape, torch.float32)
        variants = {
            "gemm3": common.bare_gemms(x["h"], x["w"], chunk(shape[2])), "fused": common.fused(x),
            "eager": common.eager(x), "compile": compiled(x),
            "frozen": common.fused(x, frozen=True),
        }  # fmt: skip
        rows.append(row("loss", shape, variants, repeats(shape, repeat), "float32"))
    return rows


def bf16_rows(repeat: int) -> list[dict]:
    rows = []
    for shape in SHAPES:
        x = common.inputs(*shape, torch.bfloat16)
        wide = common.bare_gemms(x["h"].float(), x["w"].float(), chunk(shape[2]))
        bare = common.bare_gemms(x["h"], x["w"], chunk(shape[2]))
        variants = {"gemm3": bare, "fused": common.fused(x), "gemm3_f32": wide}
        rows.append(row("loss", shape, variants, repeats(shape, repeat), "bfloat16"))
    return rows


def share_rows(repeat: int) -> list[dict]:
    """Rows masked, and rows whose ratio is clipped: those need their logits, and no gradient."""
    rows = []
    for shape in ROWS:
        x = common.inputs(*shape, torch.float32)
        order = torch.rand(shape[0]).argsort().argsort()
        variants = {"fused": common.fused(x)}
        for share in (0.5, 0.25):
            live = order < share * shape[0]
            variants[f"masked_{share:.0%}"] = common.fused(x, mask=live)
            # a ratio of e above the clip, and an advantage that would raise it: no gradient
            clipped = {**x, "a": x["a"].abs(), "old": x["old"].where(live, x["old"] - 1.0)}
            variants[f"clipped_{share:.0%}"] = common.fused(clipped)
        rows.append(row("rows", shape, variants, repeat, "float32", "fused"))
    return rows


SEQUENCE = 256  # tokens of a padded row


def packed_rows(repeat: int) -> list[dict]:
    """Half of the padded rows are padding: computed, masked, and left out of a packed row."""
    rows = []
    for shape in ROWS:
        x = common.inputs(*shape, torch.float32)
        t = min(SEQUENCE, shape[0] // 2)
        b = shape[0] // t
        lengths = torch.linspace(t // 4, t - t // 4, b).round().long()
        live = torch.arange(t) < lengths[:, None]
        padded = {k: x[k].view(b, t, *x[k].shape[1:]) for k in ("h", "y", "old")}
        packed = {k: t[live] for k, t in padded.items()}
        a = {"w": x["w"], "a": torch.linspace(-1, 1, b)}
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        for objective in ("dapo", "gspo"):
            variants = {
                "fused": common.fused({**padded, **a}, objective=objective),
                "masked": common.fused({**padded, **a}, mask=live, objective=objective),
                "packed": common.fused({**packed, **a}, segments=ends, objective=objective),
            }
            found = row(f"packed {objective}", shape, variants, repeat, "float32", "fused")
            print(f"    packed / masked {found['packed'] / found['masked']:.2f}", flush=True)
            rows.append(found)
    return rows


def memory_rows(_: int) -> list[dict]:
    rows = []
    for shape in SHAPES:
        command = [sys.executable, __file__, "--peak", *map(str, shape)]
        out = subprocess.run(
            command, capture_output=True, text=True, check=True, env=common.small_arenas()
        )
        rows.append({"case": "memory", "shape": shape, "fused_mib": float(out.stdout)})
        print(f"memory {shape} float32  fused {float(out.stdout):.0f} MiB", flush=True)
    return rows


def row(case, shape, variants, repeat, dtype, base="gemm3") -> dict:  # type: ignore[no-untyped-def]
    seconds = common.interleaved(variants, repeat)
    t = {k: statistics.median(v) for k, v in seconds.items()}
    found = {"case": case, "shape": shape, "dtype": dtype, **t}
    common.show(found, base, "fused")
    quarter = statistics.quantiles(seconds["fused"], n=4)
    found["noise"] = (quarter[2] - quarter[0]) / 2 / t["fused"]
    more = f", compile/fused {t['compile'] / t['fused']:.2f}" if "compile" in t else ""
    print(f"    noise of fused {found['noise']:.1%}{more}", flush=True)
    return found


def peak(shape: tuple[int, int, int]) -> float:
    common.fused(common.inputs(8, 16, 64, torch.float32))()  # libraries and threads are loaded now
    n, h, v = shape
    x = {"h": torch.randn(n, h), "w": torch.randn(v, h) / h**0.5, "y": torch.randint(v, (n,))}
    x |= {"a": torch.randn(n), "old": torch.full((n,), -10.0)}
    run = common.fused(x)
    Path("/proc/self/clear_refs").write_text("5")
    before = common.resident("VmRSS")
    run()
    return common.resident("VmHWM") - before


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeat", type=int, default=5, help="of the large shapes half, at least 3")
    p.add_argument("--only", choices=["fp32", "bf16", "rows", "packed", "memory"])
    p.add_argument("--json", type=Path)
    p.add_argument("--peak", type=int, nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.peak:
        print(peak(tuple(a.peak)))
        return
    machine = {"cpu": common.cpu_name(), "threads": a.threads, "torch": torch.__version__}
    machine |= {"vgkern": vgkern.__version__, "isa": _native.status()["isa"]}
    print(f"{machine['cpu']}, {a.threads} threads, torch {machine['torch']}", flush=True)
    parts = {"fp32": fp32_rows, "bf16": bf16_rows, "rows": share_rows, "packed": packed_rows}
    parts["memory"] = memory_rows
    rows = [r for k, f in parts.items() if a.only in (None, k) for r in f(a.repeat)]
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, default=str))
        print(f"written: {a.json}")


if __name__ == "__main__":
    main()
