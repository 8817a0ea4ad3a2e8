"""A tile of logits, hidden W^T, for the kernels that make it and store none of it.

`linear_token_logprobs` ends a tile in statistics of its rows, `linear_grad` in their gradient. Both
take the tile from here, the same products in the same order, so that p = exp(z - lse) sums to 1.

What bounds such a tile on an H100: the tensor cores take 4096 flops a clock and multiprocessor, and
an L2 of 5.5 TB/s brings about 23 bytes of operands in that clock. 128 x 128 columns need 32 and so
reach 70 % at most, 128 x 256 need 24. What ends a tile (an exp, a maximum, a handful of multiply-
adds a logit) takes about 2600 clocks of 128 x 256, the products 16 H: where H is small that has to
run beside the products of another program, which only 128 x 128 leave the registers for.
"""

import functools

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from .logits import INF, softcapped

SMALL = 99 << 10  # shared memory of a block on sm_86, sm_89 and sm_120; it is 227 KiB on sm_90
WIDE_SHARED = 160 << 10  # what the wide tiles need
WIDE_HIDDEN = 1536  # from this width on they are faster: the products are nine tenths of the clocks
HIDDEN_IN_L2 = 16 << 20  # bytes of hidden that stay in the L2 while the weight streams by
# (rows, columns, depth, warps, stages) of a tile. Shared memory is stages * (rows + columns) *
# depth * bytes. The columns do not depend on the number of rows: they are the order of a row's sum.
CONFIGS = {
    (2, "few"): (64, 128, 64, 4, 4),
    (2, "many"): (128, 128, 64, 8, 3),
    (2, "few wide"): (64, 256, 64, 4, 4),
    (2, "many wide"): (128, 256, 64, 8, 3),
    (2, "odd"): (64, 64, 32, 8, 2),  # H off 16: scalar loads; more of a tile a thread spills
    (4, "few"): (32, 64, 32, 4, 3),
    (4, "many"): (64, 64, 32, 4, 3),
    (4, "odd"): (64, 64, 32, 8, 2),
}


def config(count, vocab, width, element_size):
    """The tile for this problem on the current device: one of CONFIGS, no wider than the problem
    itself."""
    kind = "few" if count <= 64 else "many"
    if width % 16 and (element_size, kind) != (4, "few"):
        kind = "odd"
    elif element_size == 2 and width >= WIDE_HIDDEN and shared_memory() >= WIDE_SHARED:
        kind += " wide"
    m, n, k, warps, stages = CONFIGS[element_size, kind]
    n = min(n, max(triton.next_power_of_2(vocab), 16))
    k = min(k, max(triton.next_power_of_2(width), 16))
    return m, n, k, warps, stages


def shared_memory():
    """Bytes of it that a block can have on the current device."""
    if knobs.runtime.interpret:
        return SMALL
    return _shared_memory(driver.active.get_current_device())


@functools.cache
def _shared_memory(device):
    return driver.active.utils.get_device_properties(device)["max_shared_mem"]


def group(rows, width, element_size):
    """Row blocks side by side on one part of the weight: as many as stay in the L2."""
    return max(HIDDEN_IN_L2 // (rows * width * element_size), 1)


def precision(dtype):
    """`input_precision` of the products."""
    return "ieee" if dtype == torch.float32 else None


@triton.jit
def place(blocks, group):
    """(row block, part of the vocabulary) of this program. A group of row blocks does one part
    after the other, so its hidden rows are read from memory once and the weight once a group."""
    pid = tl.program_id(0).to(tl.int64)
    size = group * (tl.num_programs(0) // blocks).to(tl.int64)
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
    """z of the product at `cols`, and the slope of the soft-cap; z is -inf past the vocabulary."""
    if bias is not None:
        x += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    x, slope = softcapped(x, softcap, SOFTCAP)
    edge = tl.where(cols < V, 0.0, -INF)  # with the product one multiply-add
    return x * scale + edge[None, :], slope


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns: what ends a tile takes fewer registers so."""
    return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))


@triton.jit
def within(y, first, V, N: tl.constexpr):
    """Which column of a tile each target is, or -1: 32 bits to compare, not 64."""
    at = y - first
    return tl.where((at >= 0) & (at < N) & (y < V), at, -1).to(tl.int32)
