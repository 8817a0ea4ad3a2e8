"""Kernels over one row of materialised logits: statistics and gradient. One program a row.

Logits are fp32, bf16 or fp16 with unit column stride (vgkern.kernels.logits has their maths). Each
kernel reads a row once, and once more only where a costate needs the softmax of the perturbed row.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import noise
from .logits import (
    INF,
    flat,
    launch,
    launch_rows,
    load_z,
    no_columns,
    store_same,
    store_stats,
    with_columns,
)
from .row_policy import row_policy
from .row_sample import row_sample
from .row_truncated import row_truncated, row_truncated_grad

__all__ = [
    "row_grad",
    "row_policy",
    "row_sample",
    "row_stats",
    "row_truncated",
    "row_truncated_grad",
]


def row_stats(logits, bias, targets, temperature, softcap, ignore_index):
    """(logp, entropy, lse), each fp32 [R].

    A target of V is one on another shard of the vocabulary: logp = -lse, every column counts.
    ignore_index gives zeros and its row is not read; any other id outside [0, V) gives NaN.
    """
    rows, vocab = logits.shape
    logp, entropy, lse = (
        torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    if rows:
        with torch.cuda.device_of(logits):
            _row_stats_kernel[(rows,)](
                logits, logits.stride(0), flat(bias), targets.contiguous(), logp, entropy, lse,
                vocab, 1 / temperature, softcap, ignore_index, SOFTCAP=softcap != 0,
                **launch_rows(logits),
            )  # fmt: skip
    return logp, entropy, lse


def row_grad(
    logits,  # [R, V] fp32|bf16|fp16
    bias,  # [V] or None
    targets,  # [R] int64; None without c and e, as are the three statistics
    logp,
    entropy,
    lse,  # [R] fp32, from row_stats or merged over shards
    c,  # [R] fp32: dL/dlogp, or None
    e,  # [R] fp32: dL/dentropy, or None
    u,  # [R, V] E lambda, or None
    seed,
    sequence,  # [R] int64, with u; negative: the row has no costate. Only that if expected
    position,
    tau,
    expected,
    temperature,
    softcap,
    ignore_index,
    out,  # [R, V]; may be `logits`, or 16-bit rows that start where those of fp32 logits do
):
    """The gradient of each row's logits, written to `out`:

        c (onehot - p) - e p (log p + entropy) + (1/tau) q (u - <q, u>),  q = softmax((z + g)/tau)

    times the soft-cap's slope / temperature. g is the replayed Gumbel noise; `expected`: q = p.
    A row that is ignored or whose target is blocked or out of range has no c and no e term; a row
    with none of the three is zero-filled unread.
    """
    rows, vocab = logits.shape
    targets, logp, entropy, lse = (flat(x) for x in (targets, logp, entropy, lse))
    c, e, sequence, position = (flat(x) for x in (c, e, sequence, position))
    if rows:
        with torch.cuda.device_of(logits):
            _row_grad_kernel[(rows,)](
                logits, logits.stride(0), flat(bias), targets, logp, entropy, lse, c, e, u,
                0 if u is None else u.stride(0), seed, sequence, position,
                1.0 if expected else 1 / tau, out, out.stride(0), vocab, 1 / temperature, softcap,
                ignore_index, EXPECTED=expected, SOFTCAP=softcap != 0, **launch(vocab)
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["ignore_index"])
def _row_stats_kernel(
    logits,  # [R, V]
    stride,
    bias,
    targets,
    logp_out,
    entropy_out,
    lse_out,
    V,
    scale,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    y = tl.load(targets + i)
    ignored = y == ignore_index
    known = (y >= 0) & (y <= V)
    if known & (y != ignore_index):
        stats = no_columns(BLOCK)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
            stats = with_columns(stats, z, cols, y)
        store_stats(logp_out, entropy_out, lse_out, i, stats, y < V)
    else:
        value = tl.where(ignored, 0.0, float("nan"))
        store_same(logp_out, entropy_out, lse_out, i, value)


@triton.jit(do_not_specialize=["seed", "ignore_index"])
def _row_grad_kernel(
    logits,  # [R, V]
    stride,
    bias,
    targets,
    logp,
    entropy,
    lse,
    c,
    e,
    u,  # [R, V]
    u_stride,
    seed,
    sequence,
    position,
    inverse_tau,
    out,  # [R, V]
    out_stride,
    V,
    scale,
    softcap,
    ignore_index,
    EXPECTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row, out_row = logits + i * stride, out + i * out_stride
    ci, ei, y = 0.0, 0.0, tl.full([], -1, tl.int64)
    at_y, log_z, shift = 0.0, 0.0, 0.0
    carried = tl.full([], u is not None, tl.int1)
    seq, pos = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if u is not None:
        if sequence is not None:
            seq = tl.load(sequence + i)
            carried = seq >= 0
        if not EXPECTED:
            pos = tl.load(position + i)
    active = carried
    if c is not None or e is not None:
        if c is not None:
            ci = tl.load(c + i)
        if e is not None:
            ei = tl.load(e + i)
        y, lp = tl.load(targets + i), tl.load(logp + i)
        log_z, ent = tl.load(lse + i), tl.load(entropy + i)
        dead = (y == ignore_index) | (y < 0) | (y > V) | (lp == -INF) | (log_z == -INF)
        ci, ei = tl.where(dead, 0.0, ci), tl.where(dead, 0.0, ei)
        at_y = -ci * libdevice.expm1(lp) - ei * libdevice.exp(lp) * (lp + ent)
        shift = ei * ent
        active = active | (ci != 0) | (ei != 0)
    if active:
        anchor, weight = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
        inner, base = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
        if u is not None:
            u_row = u + i * u_stride
            if carried:
                top = tl.full([], -INF, tl.float32)
                # u is counted from u at the peak: u - <q, u> would cancel where q is one-hot
                total = tl.zeros([BLOCK], tl.float32)
                mean = tl.zeros([BLOCK], tl.float32)
                for start in range(0, V, BLOCK):
                    cols = start + tl.arange(0, BLOCK)
                    z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
                    z = perturbed(z, seed, seq, pos, start, inverse_tau, EXPECTED, BLOCK)
                    peak = tl.maximum(top, tl.max(z, 0))
                    anchor = tl.where(peak == -INF, 0.0, peak)
                    k = tl.exp(tl.where(top == -INF, -INF, top - anchor))
                    q = tl.exp(z - anchor)
                    ub = tl.load(u_row + cols, mask=cols < V, other=0.0).to(tl.float32)
                    if peak > top:
                        at_peak = tl.max(tl.where(z == peak, ub, -INF), 0)
                        mean += total * (base - at_peak)
                        base = at_peak
                    total = total * k + q
                    mean = mean * k + q * (ub - base)
                    top = peak
                anchor = tl.where(top == -INF, 0.0, top)
                # every warp takes part in these sums: none still reads a row that is made in place
                norm = tl.sum(total, 0)
                inner = tl.sum(mean, 0) / norm
                weight = tl.where(norm == 0, 0.0, inverse_tau / norm)
                inner = tl.where(norm == 0, 0.0, inner)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, slope = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
            dz = tl.zeros([BLOCK], tl.float32)
            if c is not None or e is not None:
                d = z - log_z
                d = tl.where(d < -1e30, -1e30, d)
                dz = tl.exp(d) * (-ci - ei * d - shift)
                dz = tl.where(cols == y, at_y, dz)
                dz = tl.where((ci == 0) & (ei == 0), 0.0, dz)
            if u is not None:  # noqa: SIM102 (known when compiled)
                if carried:
                    z = perturbed(z, seed, seq, pos, start, inverse_tau, EXPECTED, BLOCK)
                    ub = tl.load(u_row + cols, mask=cols < V, other=0.0).to(tl.float32)
                    dz += weight * tl.exp(z - anchor) * ((ub - base) - inner)
            dz *= slope * scale
            # 16-bit rows are made over their own fp32 rows: a store reaches only columns that are
            # read, once all threads have read this block
            tl.debug_barrier()
            tl.store(out_row + cols, dz.to(out.dtype.element_ty), mask=cols < V)
    else:
        zero = tl.zeros([BLOCK], out.dtype.element_ty)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(out_row + cols, zero, mask=cols < V)


@triton.jit
def perturbed(
    z, seed, sequence, position, first, inverse_tau, EXPECTED: tl.constexpr, BLOCK: tl.constexpr
):
    """(z + g) / tau, or z."""
    if EXPECTED:
        return z
    else:
        return (z + noise.gumbel(seed, sequence, position, first, BLOCK)) * inverse_tau
