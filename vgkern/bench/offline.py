"""What is known of the GPU kernels on a machine without one: nothing here was timed.

Registers, occupancy and spills come from the compiled kernels (`vgkern.gate`); bytes and flops from
the model of each op at the full number of rows; the floor is what a GPU of that kind could not
beat by the peaks of its data sheet.
"""

from collections.abc import Callable
from typing import Any

from .shapes import MODELS, SAMPLES
from .work import PRODUCTS

ARCH = 90
HEADING = "GPU: not timed"
# GPU, memory bytes/s, dense bf16 flop/s. Source: NVIDIA's data sheets as PyTorch quotes them, with
# their addresses, in torch/_inductor/analysis/device_info.py (2.13; it has none of a B200); the
# H100's 1979 Tflop/s are with sparsity, which doubles them. A test compares.
PEAKS = {
    80: ("A100 80 GB SXM", 2.039e12, 312.5e12),
    90: ("H100 SXM", 3.35e12, 989.5e12),
}
SHOWN = ("smollm2-135m", "llama-3-8b", "qwen3-32b")
HOW = "python -m vgkern doctor --kernels"


def figures(compile_now: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """{"why": ..., "kernels": [...], "floors": [...]}; kernels only from the cache unless asked."""
    found: dict[str, Any] = {"why": "no CUDA device here", "floors": floors(), "kernels": []}
    try:
        from vgkern.gate import table

        folder = table.triton_folder()
        if folder is None:
            found["kernels_why"] = "triton is not installed: pip install triton"
        elif not compile_now and not table.cached(folder, ARCH):
            found["kernels_why"] = f"not compiled yet: {HOW} does it in minutes, and keeps it"
        else:
            tell(f"GPU kernels, compiled for sm_{ARCH}")
            found["kernels"] = kernels(table.triton_rows(folder, [ARCH]))
            found["compiler"] = f"triton {table.triton_version(folder)}, sm_{ARCH}"
    except Exception as error:  # a compiler that fails must not cost the CPU's table
        found["kernels_why"] = f"{type(error).__name__}: {error}"
    return found


def kernels(rows: list[Any]) -> list[dict[str, Any]]:
    """Per kernel, over its launches of real use: the most registers, the least occupancy."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        new = {"kernel": row.kernel, "launches": 0, "registers": 0, "spills": 0, "shared": 0,
               "occupancy": 1.0, "tensor": ""}  # fmt: skip
        k = found.setdefault(row.kernel, new)
        k["launches"] += 1
        for name in ("registers", "spills", "shared"):
            k[name] = max(k[name], getattr(row, name))
        k["occupancy"] = min(k["occupancy"], row.occupancy)
        k["tensor"] = k["tensor"] or max(row.tensor, key=row.tensor.get, default="")
    return [found[k] for k in sorted(found)]


def floors() -> list[dict[str, Any]]:
    """Bytes, flops and floor in bf16, forward and backward, at the full number of rows."""
    found = []
    for op, (_, products) in PRODUCTS.items():
        for shape in SHOWN:
            model = MODELS[shape]
            rows = SAMPLES if op == "linear_sample" else model.rows
            flops = 2 * products * rows * model.hidden * model.vocab
            nbytes = head_bytes(op, rows, model.hidden, model.vocab)
            floor = {
                str(arch): max(flops / rate, nbytes / memory)
                for arch, (_, memory, rate) in PEAKS.items()
            }
            found.append({"op": op, "shape": shape, "rows": rows, "dtype": "bf16",
                          "flops": flops, "bytes": nbytes, "floor_s": floor})  # fmt: skip
    return found


def head_bytes(op: str, rows: int, hidden: int, vocab: int, itemsize: int = 2) -> int:
    """Each head and the states read once, their gradients written once."""
    one = (rows + vocab) * hidden * itemsize
    heads = 2 if op in ("linear_divergence", "noisy_embedding") else 1
    written = {"linear_sample": 0, "noisy_embedding": 2}.get(op, 1)
    return one * heads + one * written


def text(found: dict[str, Any]) -> str:
    lines = [f"{HEADING}: {found['why']}. Floors are data-sheet peaks, not measurements.", ""]
    names = ", ".join(f"{gpu} (sm_{a})" for a, (gpu, _, _) in PEAKS.items())
    lines.append(f"floor of forward and backward in bf16, ms: {names}")
    for f in found["floors"]:
        ms = "  ".join(f"{1e3 * f['floor_s'][str(a)]:9.3f}" for a in PEAKS)
        what = f"{f['op']:<22} {f['shape']:<13} {f['rows']:>5} rows"
        lines.append(f"  {what}  {f['flops'] / 1e12:8.3f} TF {f['bytes'] / 1e9:7.3f} GB  {ms}")
    lines.append("")
    if not found["kernels"]:
        lines.append(f"registers and occupancy: {found.get('kernels_why', 'none')}")
        return "\n".join(lines)
    lines.append(f"kernels ({found['compiler']}): most registers, least occupancy over launches")
    for k in found["kernels"]:
        lines.append(
            f"  {k['kernel']:<44} {k['launches']:>3} launches {k['registers']:>4} regs "
            f"{k['spills']:>3} spilled {k['shared']:>7} B shared  occ {k['occupancy']:.2f}  "
            f"{k['tensor']}".rstrip()
        )
    return "\n".join(lines)
