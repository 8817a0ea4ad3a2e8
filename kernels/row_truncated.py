"""Rows of materialised logits under a temperature and a truncation: their statistics and their
gradient, over what the cut of `row_cut` keeps. At temperature 0 that is the argmax alone.

A row is scored in spans of a fixed number of columns, one program each, that a second kernel puts
together: few rows fill a GPU, and a row's bits depend on neither the batch nor who asks: the same
kernels score what `row_sample` drew.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .logits import INF, finish, flat, launch, load_z, no_columns, raised, with_columns
from .row_cut import cuts, flat_or_number, keep, of_row, row_cut, scale_of

SPAN = 4096  # columns of a program, a multiple of every block


def row_truncated(
    logits,  # [R, V]
    bias,
    targets,  # [R] int64
    softcap,
    ignore_index,
    cut,  # vgkern.ops._truncate.Cut
):
    """(logp, entropy), each fp32 [R], over what is kept; logp = -inf for a target that is not.

    ignore_index gives zeros and its row is not read; an id outside [0, V) gives NaN.
    """
    kept = cut_of_rows(logits, bias, targets, softcap, ignore_index, cut)
    return row_kept_stats(logits, bias, targets, softcap, ignore_index, cut, kept)[:2]


def row_truncated_grad(
    logits,  # [R, V]
    bias,
    targets,  # [R] int64
    c,  # [R] fp32: dL/dlogp
    e,  # [R] fp32: dL/dentropy
    softcap,
    ignore_index,
    cut,
    out,  # [R, V]; may be `logits`
):
    """The gradient of each row's logits, written to `out`: c (onehot - p) - e p (log p + entropy)
    at what is kept, 0 elsewhere. A row that is ignored, greedy, or whose target is not kept or is
    no id has none.
    """
    rows, vocab = logits.shape
    kept = cut_of_rows(logits, bias, targets, softcap, ignore_index, cut)
    stats = row_kept_stats(logits, bias, targets, softcap, ignore_index, cut, kept)
    if rows:
        with torch.cuda.device_of(logits):
            _row_kept_grad_kernel[(rows,)](
                logits, logits.stride(0), flat(bias), flat(targets), *stats, flat(c), flat(e),
                cut[0], flat_or_number(cut[4]), *kept, out, out.stride(0), vocab, softcap,
                ignore_index, SOFTCAP=softcap != 0, **launch(vocab, per_thread=8)
            )  # fmt: skip
    return out


def cut_of_rows(logits, bias, targets, softcap, ignore_index, cut):
    """`row_cut` where anything is cut, else (None, None): nothing is launched."""
    greedy = cut[0] == 0 or cut[4] is not None  # may be
    if not greedy and not any(cuts(cut, logits.shape[1])):
        return None, None
    return row_cut(logits, bias, targets, softcap, ignore_index, cut)


def row_kept_stats(logits, bias, targets, softcap, ignore_index, cut, kept, race=None):
    """(logp, entropy, lse), each fp32 [R], over what `kept` of `cut_of_rows` keeps.

    race: (best, id) of `row_sample`, each [spans, R]: `targets` is then written.
    """
    rows, vocab = logits.shape
    spans = -(-vocab // SPAN)
    new = {"dtype": torch.float32, "device": logits.device}
    logp, entropy, lse = (torch.empty(rows, **new) for _ in range(3))
    state = torch.empty(4, spans, rows, **new)
    padded = triton.next_power_of_2(spans)
    if rows:
        with torch.cuda.device_of(logits):
            _row_kept_stats_kernel[(rows, spans)](
                logits, logits.stride(0), flat(bias), flat(targets), cut[0], flat_or_number(cut[4]),
                *kept, *(race or (None, None)), state, rows, vocab, softcap, ignore_index, spans,
                SPAN=SPAN, SPANS=padded, SOFTCAP=softcap != 0,
                **launch(min(vocab, SPAN), per_thread=8, most=min(SPAN, 2048))
            )  # fmt: skip
            _row_merge_kernel[(rows,)](
                state, flat(targets), logp, entropy, lse, rows, ignore_index, spans, SPANS=padded,
                num_warps=1, enable_fp_fusion=True
            )  # fmt: skip
    return logp, entropy, lse


@triton.jit(do_not_specialize=["ignore_index", "R", "spans"])
def _row_kept_stats_kernel(
    logits,  # [R, V]
    stride,
    bias,
    targets,  # [R]; written where there was a race
    temperature,
    temperatures,  # [R]; None: the number above
    cut,
    last,
    best,  # [spans, R], as best_id; None: targets are given
    best_id,
    state,  # [4, spans, R]: the largest z, the sums of softmax and entropy, z of the target
    R,
    V,
    softcap,
    ignore_index,
    spans,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    row = logits + i * stride
    t = of_row(i, temperature, temperatures)
    if best is None:
        y = tl.load(targets + i)
    else:
        j = tl.arange(0, SPANS)
        there = best + j.to(tl.int64) * R + i
        score = tl.load(there, mask=j < spans, other=-INF)
        ids = tl.load(best_id + j.to(tl.int64) * R + i, mask=j < spans, other=V)
        won = tl.min(tl.where(score == tl.max(score, 0), ids, V), 0)
        none = (tl.max(score, 0) == -INF) | (tl.min(ids, 0) < 0)  # all are blocked, or one is NaN
        y = tl.where(none, -2, won).to(tl.int64)
        if s == 0:
            tl.store(targets + i, tl.where(none, 0, y))
    known = (y >= 0) & (y < V)
    if known & (y != ignore_index):
        scale = scale_of(t)
        if cut is not None:
            least, end = tl.load(cut + i), tl.load(last + i)
        stats = no_columns(BLOCK)
        first = (s * SPAN).to(tl.int32)  # a column
        for start in range(first, tl.minimum(first + SPAN, V), BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
            if cut is not None:
                z = keep(z, cols, least, end)
                z = tl.where(cols < V, z, -INF)
            else:
                z = tl.where((t == 0) & (cols != y), -INF, z)  # greedy, and y is what won
            stats = with_columns(stats, z, cols, y)
        top, total, dot, target = stats
        peak = tl.max(top, 0)
        total, dot = raised(top, peak, total, dot)
        store_part(state, s, spans, i, R, peak, tl.sum(total, 0), tl.sum(dot, 0),
                   part_of_target(target, y, first, SPAN))  # fmt: skip
    else:  # nothing that can be scored; an ignored row is not looked at any more
        nan = tl.full([], float("nan"), tl.float32)
        store_part(state, s, spans, i, R, nan, nan, nan, nan)


@triton.jit
def part_of_target(target, y, first, SPAN: tl.constexpr):
    """z of the target, from the span that has it; -inf from any other."""
    return tl.where((y >= first) & (y < first + SPAN), tl.sum(target, 0), -INF)


@triton.jit
def store_part(state, s, spans, i, R, peak, total, dot, target):
    size = tl.full([], 1, tl.int64) * spans * R
    at = state + tl.full([], 1, tl.int64) * s * R + i
    tl.store(at, peak)
    tl.store(at + size, total)
    tl.store(at + 2 * size, dot)
    tl.store(at + 3 * size, target)


@triton.jit(do_not_specialize=["ignore_index", "R", "spans"])
def _row_merge_kernel(
    state,
    targets,
    logp_out,
    entropy_out,
    lse_out,
    R,
    ignore_index,
    spans,
    SPANS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, SPANS)
    size = tl.full([], 1, tl.int64) * spans * R
    at, inside = state + j.to(tl.int64) * R + i, j < spans
    top = tl.load(at, mask=inside, other=-INF)
    total = tl.load(at + size, mask=inside, other=0.0)
    dot = tl.load(at + 2 * size, mask=inside, other=0.0)
    parts = tl.load(at + 3 * size, mask=inside, other=-INF)
    sick = tl.sum((parts != parts).to(tl.int32), 0) > 0
    target = tl.where(sick, float("nan"), tl.max(tl.where(parts == parts, parts, -INF), 0))
    peak = tl.max(tl.where(top == top, top, -INF), 0)
    total, dot = raised(top, peak, total, dot)
    here = tl.full([], 1, tl.int1)
    logp, entropy, lse = finish(target, peak, tl.sum(total, 0), tl.sum(dot, 0), here)
    ignored = tl.load(targets + i) == ignore_index
    tl.store(logp_out + i, tl.where(ignored, 0.0, logp))
    tl.store(entropy_out + i, tl.where(ignored, 0.0, entropy))
    tl.store(lse_out + i, tl.where(ignored, 0.0, lse))


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
    temperatures,  # [R]; None: the number above
    cut,
    last,
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
    y, lp = tl.load(targets + i), tl.load(logp + i)
    t = of_row(i, temperature, temperatures)
    ci, ei = tl.load(c + i), tl.load(e + i)
    known = (y >= 0) & (y < V) & (y != ignore_index)
    if known & (t != 0) & (lp != -INF) & ((ci != 0) | (ei != 0)):
        if cut is not None:
            least, end = tl.load(cut + i), tl.load(last + i)
        log_z, ent = tl.load(lse + i), tl.load(entropy + i)
        at_y = -ci * libdevice.expm1(lp) - ei * libdevice.exp(lp) * (lp + ent)
        scale = scale_of(t)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, slope = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
            if cut is not None:
                z = keep(z, cols, least, end)
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
