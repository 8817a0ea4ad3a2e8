"""What one multiprocessor of each architecture holds, and how many blocks of a kernel fit on it.

The figures are those of the table of compute capabilities in the CUDA programming guide; the
arithmetic is that of cuda_occupancy.h, to which a test compares it.
"""

import math
from typing import NamedTuple

KIB = 1024
REGISTERS = 65536  # per multiprocessor and per block, on every architecture below
PARTITIONS = 4  # of a multiprocessor; a warp lives in one, with a quarter of the registers
RESERVED = KIB  # of shared memory, by the system, for every block
TENSOR_COLUMNS = 512  # of tensor memory, where there is any


class Arch(NamedTuple):
    gpus: str
    multiprocessors: int  # of the largest of them
    warps: int  # per multiprocessor
    blocks: int  # per multiprocessor
    shared: int  # bytes per multiprocessor
    shared_block: int  # bytes that one block can have


ARCHS = {
    80: Arch("A100", 108, 64, 32, 164 * KIB, 163 * KIB),
    86: Arch("RTX 30", 84, 48, 16, 100 * KIB, 99 * KIB),
    89: Arch("RTX 40, L4, L40S", 142, 48, 24, 100 * KIB, 99 * KIB),
    90: Arch("H100, H200", 132, 64, 32, 228 * KIB, 227 * KIB),
    100: Arch("B200", 148, 64, 32, 228 * KIB, 227 * KIB),
    120: Arch("RTX 50, RTX PRO 6000", 188, 48, 24, 100 * KIB, 99 * KIB),
}
DEFAULT = (80, 90, 100, 120)


class Occupancy(NamedTuple):
    blocks: int  # resident on one multiprocessor; 0: the kernel cannot start
    share: float  # of the warps that fit
    limited_by: str


def occupancy(arch: int, registers: int, shared: int, warps: int, columns: int = 0) -> Occupancy:
    """For blocks of `warps` warps with `registers` a thread, `shared` bytes and `columns` of
    tensor memory."""
    a = ARCHS[arch]
    per_warp = math.ceil(registers * 32 / 256) * 256  # allocated in steps of 8 registers a thread
    fit = REGISTERS // PARTITIONS // max(per_warp, 1) * PARTITIONS // warps
    if per_warp * math.ceil(warps / PARTITIONS) * PARTITIONS > REGISTERS:
        fit = 0
    taken = math.ceil((shared + RESERVED) / 128) * 128
    limits = {
        "warps": a.warps // warps if warps <= 32 else 0,
        "registers": fit,
        "shared": 0 if shared > a.shared_block else a.shared // taken,
        "blocks": a.blocks,
        "tensor memory": TENSOR_COLUMNS // columns if columns else a.blocks,
    }
    limited_by = min(limits, key=lambda name: limits[name])
    blocks = limits[limited_by]
    return Occupancy(blocks, blocks * warps / a.warps, limited_by)
