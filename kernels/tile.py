"""A tile of logits, hidden W^T, for the kernels that make it and store none of it.

`linear_token_logprobs` ends a tile in statistics of its rows, `linear_grad` in their gradient. Both
take the tile from here, the same products in the same order, so that p = exp(z - lse) sums to 1.

What bounds such a tile on an H100: the tensor cores take 4096 flops a clock and multiprocessor, and
in that clock an L2 of 5.5 TB/s brings about 23 bytes of the operands. 128 x 128 columns need 32 of
them and so reach 70 % at most, 128 x 256 need 24. What ends the wider one (an exp, a maximum, a
handful of multiply-adds a logit) takes about 2600 clocks, its products 16 H. Arithmetic, from no
measurement: 128 x 128 of half the registers, two programs of them on a multiprocessor, come out
equal at H = 576 and behind above.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from .logits import softcapped

SMALL = 99 << 10  # shared memory of a block on sm_86, sm_89 and sm_120
LARGE = (
    200 << 10
)  # sm_90 and sm_100 have more; four warps there are a group with products of its own
HIDDEN_IN_L2 = 16 << 20  # bytes of hidden that stay in the L2 while the weight streams by


class Tile(NamedTuple):
    """Shared memory is stages * (rows + columns) * depth * the bytes of an element."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    part: int  # columns that what ends a tile takes at a time: with more of them registers spill

    def options(self, width, dtype):
        """Of a kernel whose tile it is."""
        return {
            "M": self.rows,
            "N": self.columns,
            "K": self.depth,
            "PART": self.part,
            "WHOLE": width % self.depth == 0,
            "PRECISION": "ieee" if dtype == torch.float32 else None,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


# Rows are summed in the order of their parts, so few and many have parts of the same width.
CONFIGS = {
    (2, "few"): Tile(64, 128, 64, 8, 4, 16),
    (2, "few group"): Tile(64, 128, 64, 4, 4, 32),
    (2, "many"): Tile(128, 128, 32, 8, 5, 16),
    (2, "many group"): Tile(128, 256, 64, 8, 3, 32),
    (2, "odd"): Tile(64, 64, 32, 8, 2, 32),  # H off 16: scalar loads; a larger tile spills
    (4, "few"): Tile(32, 64, 32, 4, 3, 16),
    (4, "many"): Tile(64, 64, 32, 4, 3, 16),
    (4, "odd"): Tile(64, 64, 32, 8, 2, 16),
}


def config(count, vocab, width, element_size):
    """The tile for this problem on the current device: one of CONFIGS, no wider than the problem
    itself."""
    kind = "few" if count <= 64 else "many"
    if width % 16 and (element_size, kind) != (4, "few"):
        kind = "odd"
    elif element_size == 2 and shared_memory() >= LARGE:
        kind += " group"
    t = CONFIGS[element_size, kind]
    columns = min(t.columns, max(triton.next_power_of_2(vocab), 16))
    depth = min(t.depth, max(triton.next_power_of_2(width), 16))
    return t._replace(columns=columns, depth=depth)


def shared_memory():
    """Bytes of it that a block can have on the current device."""
    if knobs.runtime.interpret:
        return SMALL
    return _shared_memory(driver.active.get_current_device())


@functools.cache
def _shared_memory(device):
    return driver.active.utils.get_device_properties(device)["max_shared_mem"]


def group(blocks, rows, width, element_size):
    """How many of the row blocks go side by side: as many as stay in the L2."""
    return min(max(HIDDEN_IN_L2 // (rows * width * element_size), 1), blocks)


@triton.jit
def place(blocks, group):
    """(row block, part of the vocabulary) of this program. A group of row blocks does one part
    after the other, so its hidden rows are read from memory once and the weight once a group."""
    pid = tl.program_id(0).to(tl.int64).to(tl.int32)  # divisions in 64 bits take registers
    size = group * (tl.num_programs(0) // blocks)
    first = pid // size * group
    rows = tl.minimum(blocks - first, group)
    return first + pid % size % rows, pid % size // rows


@triton.jit
def product(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    rm,  # [M] rows of hidden
    first,  # row of the weight
    R,
    V,
    H,
    WHOLE: tl.constexpr,  # H is a multiple of K
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """[M, N] of hidden W^T in fp32."""
    cols = first + tl.arange(0, N)
    h_rows = hidden + tl.minimum(rm, R - 1)[:, None] * hidden_stride
    w_rows = weight + tl.minimum(cols, V - 1).to(tl.int64)[None, :] * weight_stride
    acc = tl.zeros([M, N], tl.float32)
    for at in range(0, H, K):
        k = at + tl.arange(0, K)
        if WHOLE:
            h = tl.load(h_rows + k[None, :])
            w = tl.load(w_rows + k[:, None])
        else:
            h = tl.load(h_rows + k[None, :], mask=k[None, :] < H, other=0.0)
            w = tl.load(w_rows + k[:, None], mask=k[:, None] < H, other=0.0)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def finished(x, bias, cols, V, scale, softcap, SOFTCAP: tl.constexpr):
    """z of the product at `cols`, and the slope of the soft-cap. Past the vocabulary, anything."""
    if bias is not None:
        x += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    x, slope = softcapped(x, softcap, SOFTCAP)
    return x * scale, slope


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns: what ends a tile takes fewer registers so."""
    return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))
