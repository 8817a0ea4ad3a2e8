"""Rows of materialised logits under a temperature per row and a truncation: which ids it keeps,
their statistics, their gradient. One program a row.

The truncation is exact and sorts nothing: its cut is found by a search over the bits of a float.
What it keeps is z > cut, and the first `ties` of the ids with z == cut. At temperature 0 that is
the argmax alone. The same kernel scores what `row_sample` drew, so the two agree to the bit.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .logits import (
    INF,
    flat,
    launch,
    load_z,
    no_columns,
    store_same,
    store_stats,
    with_columns,
)

WAYS = tl.constexpr(8)  # cuts that one pass over a row tries


def row_truncated(
    logits,  # [R, V]
    bias,
    targets,  # [R] int64
    temperature,  # [R] fp32; 0: greedy
    softcap,
    ignore_index,
    top_k,  # 0: no limit
    top_p,  # 1: no limit
    min_p,  # 0: no limit
):
    """(logp, entropy), each fp32 [R], over what is kept; logp = -inf for a target that is not.

    ignore_index gives zeros and its row is not read; an id outside [0, V) gives NaN.
    """
    cut = row_cut(logits, bias, targets, temperature, softcap, ignore_index, top_k, top_p, min_p)
    return row_kept_stats(logits, bias, targets, temperature, softcap, ignore_index, cut)[:2]


def row_truncated_grad(
    logits,  # [R, V]
    bias,
    targets,  # [R] int64
    c,  # [R] fp32: dL/dlogp
    e,  # [R] fp32: dL/dentropy
    temperature,  # [R] fp32
    softcap,
    ignore_index,
    top_k,
    top_p,
    min_p,
    out,  # [R, V]; may be `logits`
):
    """The gradient of each row's logits, written to `out`: c (onehot - p) - e p (log p + entropy)
    at what is kept, 0 elsewhere. A row that is ignored, greedy, or whose target is not kept or is
    no id has none.
    """
    rows, vocab = logits.shape
    head = (logits, bias, targets, temperature, softcap, ignore_index)
    cut = row_cut(*head, top_k, top_p, min_p)
    stats = row_kept_stats(*head, cut)
    if rows:
        with torch.cuda.device_of(logits):
            _row_kept_grad_kernel[(rows,)](
                logits, logits.stride(0), flat(bias), flat(targets), *stats, flat(c), flat(e),
                flat(temperature), *cut, out, out.stride(0), vocab, softcap, ignore_index,
                SOFTCAP=softcap != 0, **launch(vocab, per_thread=8)
            )  # fmt: skip
    return out


def row_cut(logits, bias, targets, temperature, softcap, ignore_index, top_k, top_p, min_p):
    """(cut fp32, ties int32), each [R]. `targets` None: of every row."""
    rows, vocab = logits.shape
    cut = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ties = torch.empty(rows, dtype=torch.int32, device=logits.device)
    top_k = top_k if 0 < top_k < vocab else 0
    if rows:
        with torch.cuda.device_of(logits):
            _row_cut_kernel[(rows,)](
                logits, logits.stride(0), flat(bias), flat(targets), flat(temperature), cut, ties,
                vocab, softcap, ignore_index, top_k, top_p, min_p, TOP_K=top_k > 0,
                TOP_P=top_p < 1, MIN_P=min_p > 0, SOFTCAP=softcap != 0,
                **launch(vocab, per_thread=4, most=2048)  # each counts for WAYS cuts at once
            )  # fmt: skip
    return cut, ties


def row_kept_stats(logits, bias, targets, temperature, softcap, ignore_index, cut):
    """(logp, entropy, lse), each fp32 [R], over what `cut` of `row_cut` keeps."""
    rows, vocab = logits.shape
    logp, entropy, lse = (
        torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    if rows:
        with torch.cuda.device_of(logits):
            _row_kept_stats_kernel[(rows,)](
                logits, logits.stride(0), flat(bias), flat(targets), flat(temperature), *cut, logp,
                entropy, lse, vocab, softcap, ignore_index, SOFTCAP=softcap != 0,
                **launch(vocab, per_thread=8)
            )  # fmt: skip
    return logp, entropy, lse


@triton.jit(do_not_specialize=["ignore_index", "top_k"])
def _row_cut_kernel(
    logits,  # [R, V]
    stride,
    bias,
    targets,
    temperature,
    cut_out,
    ties_out,
    V,
    softcap,
    ignore_index,
    top_k,
    top_p,
    min_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    t = tl.load(temperature + i)
    look = (t == 0) | TOP_K | TOP_P | MIN_P
    if targets is not None:
        y = tl.load(targets + i)
        look = look & (y != ignore_index) & (y >= 0) & (y < V)
    scale = 1 / tl.where(t == 0, 1.0, t)
    cut = tl.full([], -INF, tl.float32)
    ties = tl.full([], 0, tl.int32) + V
    if look:
        top, sick = row_peak(row, bias, V, scale, softcap, SOFTCAP, BLOCK)
        if (sick == 0) & (top > -INF):
            if t == 0:
                cut, ties = top, ties * 0 + 1
            else:
                cut, ties = search(
                    row, bias, V, scale, softcap, top, top_k, top_p, min_p, TOP_K, TOP_P, MIN_P,
                    SOFTCAP, BLOCK
                )  # fmt: skip
    tl.store(cut_out + i, cut)
    tl.store(ties_out + i, ties)


@triton.jit(do_not_specialize=["ignore_index"])
def _row_kept_stats_kernel(
    logits,  # [R, V]
    stride,
    bias,
    targets,
    temperature,
    cut,
    ties,
    logp_out,
    entropy_out,
    lse_out,
    V,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    y = tl.load(targets + i)
    ignored = y == ignore_index
    if (y >= 0) & (y < V) & (y != ignore_index):
        t, least, tied = tl.load(temperature + i), tl.load(cut + i), tl.load(ties + i)
        scale = 1 / tl.where(t == 0, 1.0, t)
        stats = no_columns(BLOCK)
        seen = tl.full([], 0, tl.int32)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
            z, seen = keep(z, cols, V, least, tied, seen)
            stats = with_columns(stats, z, cols, y)
        store_stats(logp_out, entropy_out, lse_out, i, stats, y < V)
    else:
        value = tl.where(ignored, 0.0, float("nan"))
        store_same(logp_out, entropy_out, lse_out, i, value)


@triton.jit(do_not_specialize=["ignore_index"])
def _row_kept_grad_kernel(
    logits,  # [R, V]
    stride,
    bias,
    targets,
    logp,
    entropy,
    lse,
    c,
    e,
    temperature,
    cut,
    ties,
    out,  # [R, V]
    out_stride,
    V,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row, out_row = logits + i * stride, out + i * out_stride
    y, t, lp = tl.load(targets + i), tl.load(temperature + i), tl.load(logp + i)
    ci, ei = tl.load(c + i), tl.load(e + i)
    known = (y >= 0) & (y < V) & (y != ignore_index)
    if known & (t != 0) & (lp != -INF) & ((ci != 0) | (ei != 0)):
        least, tied = tl.load(cut + i), tl.load(ties + i)
        log_z, ent = tl.load(lse + i), tl.load(entropy + i)
        at_y = -ci * libdevice.expm1(lp) - ei * libdevice.exp(lp) * (lp + ent)
        scale = 1 / t
        seen = tl.full([], 0, tl.int32)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, slope = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
            z, seen = keep(z, cols, V, least, tied, seen)
            d = z - log_z
            d = tl.where(d < -1e30, -1e30, d)
            dz = tl.exp(d) * (-ci - ei * (d + ent))
            dz = tl.where(cols == y, at_y, dz) * (slope * scale)
            tl.store(out_row + cols, dz.to(out.dtype.element_ty), mask=cols < V)
    else:
        zero = tl.zeros([BLOCK], out.dtype.element_ty)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(out_row + cols, zero, mask=cols < V)


@triton.jit
def keep(z, cols, V, cut, ties, seen):
    """z, with -inf where the cut drops it, and how many ids with z == cut there are up to here."""
    out = tl.where(z < cut, -INF, z)
    if ties < V:
        tie = ((z == cut) & (cols < V)).to(tl.int32)
        rank = seen + tl.cumsum(tie, 0)
        seen += tl.sum(tie, 0)
        out = tl.where((tie != 0) & (rank > ties), -INF, out)
    return out, seen


@triton.jit
def row_peak(row, bias, V, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest z of a row, and 0, or NaN where one of its logits is NaN or +inf."""
    top = tl.full([BLOCK], -INF, tl.float32)
    sick = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z, _ = load_z(row, bias, start + tl.arange(0, BLOCK), V, scale, softcap, SOFTCAP)
        top = tl.maximum(top, z)
        sick += tl.where((z != z) | (z == INF), float("nan"), 0.0)
    return tl.max(top, 0), tl.sum(sick, 0)


@triton.jit
def ordered(z):
    """int64 keys in the order of the floats; +0 and -0 are one."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def float_of(key):
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def above(row, bias, V, scale, softcap, top, cuts, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """For each of WAYS cuts: how many z > cut, and their sum of exp(z - top). The sum is monotone
    in the cut, bit for bit."""
    count = tl.zeros([WAYS, BLOCK], tl.int32)
    mass = tl.zeros([WAYS, BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z, _ = load_z(row, bias, start + tl.arange(0, BLOCK), V, scale, softcap, SOFTCAP)
        over = z[None, :] > cuts[:, None]
        count += over.to(tl.int32)
        mass += tl.where(over, tl.exp(z - top)[None, :], 0.0)
    return tl.sum(count, 1), tl.sum(mass, 1)


@triton.jit
def split(least, most):
    """WAYS keys, ascending and evenly spread over (least, most]; the last is `most`."""
    return least + (most - least) * (tl.arange(0, WAYS) + 1) // WAYS


@triton.jit
def narrowed(least, most, fits):
    """The bounds of the first key that fits, from which of `split` do: these are its last ones."""
    missed = tl.sum((fits == 0).to(tl.int64), 0)
    span = most - least
    first = least + tl.where(missed > 0, span * missed // WAYS + 1, 0)
    return first, least + span * (missed + 1) // WAYS


@triton.jit
def search(
    row,
    bias,
    V,
    scale,
    softcap,
    top,
    top_k,
    top_p,
    min_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(cut, ties) of top_k, then top_p, then min_p.

    Each is a search over the bits of the cut. top_k is the least cut with fewer than k above it;
    top_p, within those, the least with a mass above it of less than top_p of the whole; min_p, the
    least z with exp(z - top) >= min_p, which takes no pass over the row.
    """
    high = ordered(top)
    cut = tl.full([], -INF, tl.float32)
    low = ordered(cut)
    ties = tl.full([], 0, tl.int32) + V
    same = tl.zeros([WAYS], tl.float32)
    if TOP_K:
        least, most = low, high
        while least < most:
            cuts = float_of(split(least, most))
            n, _ = above(row, bias, V, scale, softcap, top, cuts, SOFTCAP, BLOCK)
            least, most = narrowed(least, most, n < top_k)
        low = least
        cut = float_of(least)
        n, _ = above(row, bias, V, scale, softcap, top, same + cut, SOFTCAP, BLOCK)
        ties = top_k - tl.max(n, 0)
    if TOP_P:
        _, mass = above(row, bias, V, scale, softcap, top, same + cut, SOFTCAP, BLOCK)
        equal = tl.where(cut == -INF, 0.0, ties * tl.exp(cut - top))
        bound = top_p * (tl.max(mass, 0) + equal)
        least, most = low, high
        while least < most:
            cuts = float_of(split(least, most))
            _, mass = above(row, bias, V, scale, softcap, top, cuts, SOFTCAP, BLOCK)
            least, most = narrowed(least, most, mass < bound)
        at = float_of(least)
        _, mass = above(row, bias, V, scale, softcap, top, same + at, SOFTCAP, BLOCK)
        # the first tie is kept if the mass before it is below the bound, the next if ..
        fit = tl.ceil((bound - tl.max(mass, 0)) / tl.maximum(tl.exp(at - top), 1e-37))
        fit = tl.where(fit < V, fit, V * 1.0).to(tl.int32)
        ties = tl.where(at > cut, fit, tl.minimum(fit, ties))
        cut = at
    if MIN_P:
        least, most = ordered(cut), high
        while least < most:
            fits = tl.exp(float_of(split(least, most)) - top) >= min_p
            least, most = narrowed(least, most, fits)
        at = float_of(least)
        ties = tl.where(at > cut, V, ties)  # all that are equal to it
        cut = at
    return cut, ties
