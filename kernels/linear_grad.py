"""The gradient of the logits of `hidden` rows, made without the logits: each tile of hidden W^T is
computed again and its epilogue is the gradient, in 16 bits. kernels/rows.py has the formula.

One call is 2 R V H flops. It reads hidden once and the weight once for every group of row blocks
that stay in the L2 (16 MiB of hidden: 4 times at R = 8192, H = 4096), and writes 2 R V bytes. With
fp32 logits in memory 14 bytes of each move: 4 written by their product, 4 read for the statistics,
4 read and 2 written for the gradient. So the choice is between 2 H flops and 12 bytes a logit:
up to H = 1580 at 790 TFLOP/s and 3.0 TB/s, up to about 560 at what a tile reaches.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import tile
from .logits import INF, flat

# Widths up to which an H100 was faster: measured at N = 8192, V = 49152 in the loss, where a tile
# reaches 400 TFLOP/s and not the 790 of a large product (times of the two forms, ms: H = 256 2.45
# and 2.75; 576 3.7 and 3.6, with half the memory; 896 5.5 and 4.9; 1536 8.5 and 7.0). By arithmetic
# where the logits are made again either way.
PAYS, PAYS_AGAIN = 600, 1580


def recompute_pays(hidden_width, element_size=2, again=False):
    """Whether the logits of 16-bit inputs are cheaper to compute again in a tile than to keep in
    fp32; `again`: they are computed a second time all the same, as in the backward of
    linear_token_logprobs. Never for fp32, whose products have other rates and whose gradient is not
    narrower than the logits."""
    return element_size == 2 and hidden_width <= (PAYS_AGAIN if again else PAYS)


def room(hidden, vocab):
    """[R, V] for the gradient: rows at multiples of 16 bytes, which the stores and the products
    that follow take whole words of, whatever the vocabulary."""
    return hidden.new_empty(hidden.shape[0], -(-vocab // 8) * 8)[:, :vocab]


def linear_grad(
    hidden,  # [R, H] of unit column stride, as is the weight
    weight,  # [V, H]
    bias,  # [V] or None
    targets,  # [R] int64
    logp,  # [R] fp32, as are entropy and lse: statistics of linear_token_logprobs
    entropy,
    lse,
    c,  # [R] fp32: dL/dlogp
    e,  # [R] fp32: dL/dentropy
    temperature,
    softcap,
    ignore_index,
    out,  # [R, V] of unit column stride, dtype of hidden
):
    """c (onehot - p) - e p (log p + entropy) of each row, times the soft-cap's slope / temperature,
    to `out`. Zero where the target is ignored, blocked or out of range, or c and e are 0; a block
    of such rows costs no product."""
    count, width = hidden.shape
    vocab, size = weight.shape[0], hidden.element_size()
    if not count:
        return out
    vectors = (flat(x) for x in (bias, targets, logp, entropy, lse, c, e))
    with torch.cuda.device_of(hidden):
        t = tile.config(count, vocab, width, size)
        blocks = triton.cdiv(count, t.rows)
        _linear_grad_kernel[(blocks * triton.cdiv(vocab, t.columns),)](
            hidden, hidden.stride(0), weight, weight.stride(0), *vectors, out, out.stride(0), count,
            vocab, width, blocks, tile.group(blocks, t.rows, width, size), 1 / temperature, softcap,
            ignore_index, SOFTCAP=softcap != 0, **t.options(width, hidden.dtype)
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["R", "blocks", "group", "ignore_index"])
def _linear_grad_kernel(
    hidden,  # [R, H]
    hidden_stride,
    weight,  # [V, H]
    weight_stride,
    bias,  # [V] or None
    targets,  # [R]
    logp,
    entropy,
    lse,
    c,
    e,
    out,  # [R, V]
    out_stride,
    R,
    V,
    H,
    blocks,
    group,
    scale,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
):
    block, part = tile.place(blocks, group)
    first = part * N
    rm = block.to(tl.int64) * M + tl.arange(0, M)
    inside = rm < R
    y = tl.load(targets + rm, mask=inside, other=ignore_index)
    lp, ent = tl.load(logp + rm, mask=inside), tl.load(entropy + rm, mask=inside)
    log_z = tl.load(lse + rm, mask=inside)
    ci, ei = tl.load(c + rm, mask=inside, other=0.0), tl.load(e + rm, mask=inside, other=0.0)
    dead = (y == ignore_index) | (y < 0) | (y > V) | (lp == -INF) | (log_z == -INF)
    live = ((ci != 0) | (ei != 0)) & (dead == 0)
    if tl.max(live.to(tl.int32), 0) != 0:
        x = tile.product(
            hidden, hidden_stride, weight, weight_stride, rm, first, R, V, H, WHOLE, PRECISION, M,
            N, K
        )  # fmt: skip
        chosen = tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)
        at_y = -ci * libdevice.expm1(lp) - ei * libdevice.exp(lp) * (lp + ent)
        rows = (chosen, log_z, ei, ci + ei * ent, at_y, live)
        to = (out + rm * out_stride, inside)
        scalars = (V, scale, softcap)
        _store(to, x, bias, rows, scalars, first, SOFTCAP, M, N, PART)
    else:
        cols = first + tl.arange(0, N)
        zero = tl.zeros([M, N], out.dtype.element_ty)
        stored = inside[:, None] & (cols < V)[None, :]
        tl.store(out + rm[:, None] * out_stride + cols[None, :], zero, mask=stored)


@triton.jit
def _store(
    to, x, bias, rows, scalars, first, SOFTCAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """The gradient of the product x at the N columns from `first`, PART of them at a time."""
    if N > PART:
        left, right = tile.halves(x, M, N)
        _store(to, left, bias, rows, scalars, first, SOFTCAP, M, N // 2, PART)
        _store(to, right, bias, rows, scalars, first + N // 2, SOFTCAP, M, N // 2, PART)
    else:
        out_rows, inside = to
        chosen, log_z, ei, shift, at_y, live = rows
        V, scale, softcap = scalars
        cols = first + tl.arange(0, N)
        z, slope = tile.finished(x, bias, cols, V, scale, softcap, SOFTCAP)
        d = z - log_z[:, None]
        d = tl.where(d < -1e30, -1e30, d)
        dz = tl.exp(d) * (-ei[:, None] * d - shift[:, None])
        dz = tl.where(cols[None, :] == chosen[:, None], at_y[:, None], dz)
        dz = tl.where(live[:, None], dz * (slope * scale), 0.0)
        stored = inside[:, None] & (cols < V)[None, :]
        tl.store(out_rows[:, None] + cols[None, :], dz.to(out_rows.dtype.element_ty), mask=stored)
