"""One row of the table: what a kernel became on one architecture, and the limits that it breaks.

Limits, of every kernel:
- no spilled register. On triton before 3.9, whose ptxas is older, at most 24 bytes are let pass:
  its allocation misses by a few registers where 3.9 fits, and a user cannot choose another.
- no array in local memory, but for the 32 bytes in which sin and cos reduce a huge argument.
- at least one block fits on a multiprocessor: registers, shared memory and tensor memory.
- occupancy of at least 1/4, which hides the latency of memory; 1/8 with a tl.dot, whose tiles are
  in flight instead, and 1/16 where they are in tensor memory or a warp group's registers.
- with a tl.dot on 16-bit tensors: tensor-core instructions, and those of the architecture (wgmma,
  tcgen05) where the tile is large enough for them.
"""

import dataclasses
import re
from typing import Any

from vgkern.gate.arch import Occupancy, occupancy
from vgkern.gate.cubin import Resources

OLD_SPILLS, ARRAYS = 24, 32
OCCUPANCY, OCCUPANCY_DOT, OCCUPANCY_GROUP = 0.25, 0.125, 0.0625


@dataclasses.dataclass
class Row:
    kernel: str
    launch: str
    arch: int
    compiler: str = ""
    registers: int = 0
    spills: int = 0
    local: int = 0
    shared: int = 0
    warps: int = 0
    blocks: int = 0  # on one multiprocessor
    occupancy: float = 0.0
    limited_by: str = ""
    tensor: dict[str, int] = dataclasses.field(default_factory=dict)
    loads: dict[str, int] = dataclasses.field(default_factory=dict)
    dots: list[str] = dataclasses.field(default_factory=list)  # "128x128x64 bf16": M, N, K, type
    problems: list[str] = dataclasses.field(default_factory=list)

    @staticmethod
    def broken(kernel: str, launch: str, arch: int, why: str, compiler: str = "") -> "Row":
        return Row(kernel, launch, arch, compiler, problems=[why])

    @staticmethod
    def of(
        kernel: str,
        launch: str,
        arch: int,
        compiler: str,
        resources: Resources,
        spills: int,  # bytes per thread
        warps: int,
        shared: int = 0,  # dynamic, beyond what the cubin says
        columns: int = 0,  # of tensor memory
        dots: list[str] | None = None,
        halves: bool = False,  # it takes 16-bit tensors
        faults: list[str] | None = None,  # problems of the launch itself
    ) -> "Row":
        r, total = resources, resources.shared + shared
        fits = occupancy(arch, r.registers, total, warps, columns)
        row = Row(
            kernel, launch, arch, compiler, r.registers, spills, max(r.stack - spills, 0), total,
            warps, fits.blocks, fits.share, fits.limited_by, r.tensor, r.loads, dots or [],
        )  # fmt: skip
        row.problems = [*(faults or []), *_memory(row), *_occupancy(row, fits)]
        row.problems += _tensor_cores(row) if dots and halves else []
        return row

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Row":
        return Row(**fields)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _memory(row: Row) -> list[str]:
    old = re.match(r"triton (\d+)\.(\d+)", row.compiler)
    slack = OLD_SPILLS if old and (int(old[1]), int(old[2])) < (3, 9) else 0
    found = []
    if row.spills > slack:
        found.append(f"spills {row.spills} bytes a thread; allowed: {slack}")
    if row.local > ARRAYS:
        found.append(f"{row.local} bytes a thread of arrays in local memory; allowed: {ARRAYS}")
    return found


def _occupancy(row: Row, fits: Occupancy) -> list[str]:
    if fits.blocks == 0:
        return [
            f"no block fits on a multiprocessor: {row.warps} warps of {row.registers} registers, "
            f"{row.shared} bytes shared; too much of: {fits.limited_by}"
        ]
    least = OCCUPANCY_DOT if row.dots else OCCUPANCY
    if row.dots and any(t.startswith(("UTC", "HGMMA", "QGMMA")) for t in row.tensor):
        least = OCCUPANCY_GROUP
    if fits.share < least:
        return [f"occupancy {fits.share:.3f} by {fits.limited_by}; allowed: from {least}"]
    return []


def _tensor_cores(row: Row) -> list[str]:
    if not row.tensor:
        return [f"no tensor-core instruction from tl.dot {', '.join(row.dots)}"]
    large = any(int(d.split("x")[0]) >= 64 and d.endswith("16") for d in row.dots)
    wanted = {90: "GMMA", 100: "UTC"}.get(row.arch)
    if large and row.warps % 4 == 0 and wanted and not any(wanted in t for t in row.tensor):
        name = {90: "wgmma", 100: "tcgen05"}[row.arch]
        return [f"tl.dot {', '.join(row.dots)} is {', '.join(row.tensor)}, not {name}"]
    return []
