"""`python -m vgkern doctor --kernels`: the table, which compilers made it, and the verdict."""

import json
from collections.abc import Sequence
from pathlib import Path

from vgkern.gate import coverage, cuda, table
from vgkern.gate.arch import ARCHS
from vgkern.gate.row import Row


def report(archs: Sequence[int], out: str | None = None) -> int:
    """Prints the table; 1 when a limit is broken or a kernel is missing, 2 when nothing ran."""
    rows: list[Row] = []
    missing: list[str] = []
    print("GPUs: " + ", ".join(f"sm_{a} ({ARCHS[a].gpus})" for a in archs))
    ran = False
    for part in (_triton, _cuda):
        name, why, made, wanted = part(archs)
        print(f"\n{name}: {why}" if why else f"\n{name}")
        if why:
            continue
        ran = True
        print(table.text(made) if made else "no kernels")
        rows += made
        missing += sorted(
            f"{k} ({f})" for k, f in wanted.items() if k not in {r.kernel for r in made}
        )
    if out:
        Path(out).write_text(json.dumps([r.to_json() for r in rows], indent=1) + "\n")
    broken = sum(bool(r.problems) for r in rows)
    for kernel in missing:
        print(f"BROKEN: {kernel} is in no launch of vgkern/gate/launches.py")
    print(f"\n{len(rows)} rows, {broken} with a broken limit, {len(missing)} kernels missing")
    return 2 if not ran else 1 if broken or missing else 0


Part = tuple[str, str | None, list[Row], dict[str, str]]


def _triton(archs: Sequence[int]) -> Part:
    if (folder := table.triton_folder()) is None:
        return "triton", "not compiled: no triton; pip install triton", [], {}
    name = f"triton {table.triton_version(folder)} ({folder})"
    return name, None, table.triton_rows(folder, archs), coverage.triton_kernels()


def _cuda(archs: Sequence[int]) -> Part:
    if (nvcc := cuda.find_nvcc()) is None:
        return "cuda", "not compiled: no nvcc", [], {}
    return (
        f"{cuda.version(nvcc)} ({nvcc})",
        None,
        table.cuda_rows(nvcc, archs),
        coverage.cuda_kernels(),
    )
