"""Kernels over one row of materialised logits: statistics, gradient, Gumbel-max. One program a row.

z = s(x + bias) / temperature with s the soft-cap; x = -inf stays -inf. Logits are fp32, bf16 or
fp16 with unit column stride; statistics are fp32. Each kernel reads a row once, and once more only
where it has to (a costate's softmax, a truncation's cut).
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import noise

INF = tl.constexpr(float("inf"))
MAX_BLOCK = 4096  # columns at a time


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
                logits, logits.stride(0), bias, targets.contiguous(), logp, entropy, lse, vocab,
                1 / temperature, softcap, ignore_index, SOFTCAP=softcap != 0, **launch(vocab)
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
    sequence,  # [R] int64, with u unless expected
    position,
    tau,
    expected,
    temperature,
    softcap,
    ignore_index,
    out,  # [R, V]; may be `logits`
):
    """The gradient of each row's logits, written to `out`:

        c (onehot - p) - e p (log p + entropy) + (1/tau) q (u - <q, u>),  q = softmax((z + g)/tau)

    times the soft-cap's slope / temperature. g is the replayed Gumbel noise; `expected` means q = p.
    A row that is ignored or whose target is blocked or out of range has no c and no e term; a row
    with none of the three is zero-filled unread.
    """
    rows, vocab = logits.shape
    if rows:
        with torch.cuda.device_of(logits):
            _row_grad_kernel[(rows,)](
                logits, logits.stride(0), bias, targets, logp, entropy, lse, c, e, u,
                0 if u is None else u.stride(0), seed, sequence, position,
                1.0 if expected else 1 / tau, out, out.stride(0), vocab, 1 / temperature, softcap,
                ignore_index, EXPECTED=expected, SOFTCAP=softcap != 0, **launch(vocab)
            )  # fmt: skip
    return out


def row_sample(
    logits,  # [R, V]
    bias,
    seed,
    sequence,  # [R] int64
    position,
    temperature,  # [R] fp32; 0: greedy
    softcap,
    top_k,  # 0: no limit
    top_p,  # 1: no limit
    min_p,  # 0: no limit
):
    """(token int64, logp, entropy fp32), each [R]: argmax z + g over what the truncation keeps."""
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logp, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    top_k = top_k if 0 < top_k < vocab else 0
    if rows:
        with torch.cuda.device_of(logits):
            _row_sample_kernel[(rows,)](
                logits, logits.stride(0), bias, seed, sequence, position, temperature, token, logp,
                entropy, vocab, softcap, top_k, top_p, min_p, TOP_K=top_k > 0, TOP_P=top_p < 1,
                MIN_P=min_p > 0, SOFTCAP=softcap != 0, **launch(vocab, per_thread=8)
            )  # fmt: skip
    return token, logp, entropy


def launch(columns, per_thread=16):
    """Block and warps for rows of this many columns. A thread has at least one column of its own:
    two warps that hold the same element would race in a gradient made in place."""
    block = min(max(triton.next_power_of_2(columns), 128), MAX_BLOCK)
    warps = max(block // (32 * per_thread), 1)
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


@triton.jit
def softcapped(x, softcap, SOFTCAP: tl.constexpr):
    """(s(x), s'(x)); a blocked x stays blocked, with slope 0."""
    if SOFTCAP:
        t = libdevice.tanh(x / softcap)
        return tl.where(x == -INF, -INF, softcap * t), 1 - t * t
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def load_z(row, bias, cols, V, scale, softcap, SOFTCAP: tl.constexpr):
    """z and the soft-cap's slope at `cols` of one row; z is -inf past the end."""
    inside = cols < V
    x = tl.load(row + cols, mask=inside, other=-INF).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    x, slope = softcapped(x, softcap, SOFTCAP)
    return x * scale, slope


@triton.jit
def raised(top, peak, total, dot):
    """Sums exp(z - top) and (z - top) exp(z - top) moved from maximum `top` to `peak` >= top."""
    shift = tl.where(top == peak, 0.0, tl.where(top == -INF, 0.0, top - peak))
    k = tl.where(top == -INF, 0.0, tl.exp(shift))
    return total * k, (dot + total * shift) * k


@triton.jit
def added(z, top, total, dot):
    """The running sums with `z` in them; all of z <= top."""
    d = z - tl.where(top == -INF, 0.0, top)
    p = tl.exp(d)
    return total + p, dot + p * tl.where(d < -1e30, 0.0, d)


@triton.jit
def finish(target, top, total, dot, here):
    """(logp, entropy, lse) of a row from its target and the sums over the *other* columns, so that
    a gap of 30 nats keeps the 1e-13 of the others. `here` false: no target among the columns."""
    target = tl.where(here, target, -INF)
    bad = (total != total) | (target != target) | (target == INF) | (top != top) | (top == INF)
    first = target >= top  # the target leads: log1p
    peak = tl.where(first, target, top)
    anchor = tl.where(peak == -INF, 0.0, peak)
    others = total * libdevice.exp(top - anchor)  # relative to the peak
    dot = tl.where(top == -INF, 0.0, (dot + total * (top - anchor)) * libdevice.exp(top - anchor))
    own = libdevice.exp(target - anchor)
    own_dot = tl.where(target == -INF, 0.0, own * (target - anchor))
    log_sum = tl.where(first, libdevice.log1p(others), libdevice.log(others + own))
    lse = tl.where(peak == -INF, -INF, peak + log_sum)
    logp = tl.where(target == -INF, -INF, target - anchor - log_sum)
    logp = tl.where(here, logp, -lse)
    entropy = tl.where(peak == -INF, 0.0, log_sum - (dot + own_dot) / (others + own))
    nan = float("nan")
    return tl.where(bad, nan, logp), tl.where(bad, nan, entropy), tl.where(bad, nan, lse)


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
        top = tl.full([], -INF, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        dot = tl.zeros([BLOCK], tl.float32)
        zy = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
            zy = tl.where(cols == y, z, zy)
            z = tl.where(cols == y, -INF, z)
            peak = tl.maximum(top, tl.max(z, 0))
            total, dot = raised(top, peak, total, dot)
            total, dot = added(z, peak, total, dot)
            top = peak
        target, total, dot = tl.sum(zy, 0), tl.sum(total, 0), tl.sum(dot, 0)
        logp, entropy, lse = finish(target, top, total, dot, y < V)
        tl.store(logp_out + i, logp)
        tl.store(entropy_out + i, entropy)
        tl.store(lse_out + i, lse)
    else:
        value = tl.where(ignored, 0.0, float("nan"))
        tl.store(logp_out + i, value)
        tl.store(entropy_out + i, value)
        tl.store(lse_out + i, value)


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
    active = tl.full([], u is not None, tl.int1)
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
        if u is not None:
            u_row = u + i * u_stride
            seq, pos = 0, 0
            if not EXPECTED:
                seq, pos = tl.load(sequence + i), tl.load(position + i)
            top = tl.full([], -INF, tl.float32)
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
                total = total * k + q
                mean = mean * k + q * ub
                top = peak
            anchor = tl.where(top == -INF, 0.0, top)
            # every warp takes part in these sums, so none still reads a row that is made in place
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
            if u is not None:
                z = perturbed(z, seed, seq, pos, start, inverse_tau, EXPECTED, BLOCK)
                ub = tl.load(u_row + cols, mask=cols < V, other=0.0).to(tl.float32)
                dz += weight * tl.exp(z - anchor) * (ub - inner)
            dz *= slope * scale
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


@triton.jit(do_not_specialize=["seed", "top_k"])
def _row_sample_kernel(
    logits,  # [R, V]
    stride,
    bias,
    seed,
    sequence,
    position,
    temperature,
    token_out,
    logp_out,
    entropy_out,
    V,
    softcap,
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
    seq, pos, t = tl.load(sequence + i), tl.load(position + i), tl.load(temperature + i)
    greedy = t == 0
    scale = 1 / tl.where(greedy, 1.0, t)
    top, sick = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32)
    cut = tl.full([], -INF, tl.float32)  # kept: z > cut, and the first `ties` of those equal to it
    ties = tl.full([], 0, tl.int32) + V
    if TOP_K or TOP_P or MIN_P:
        top, sick = row_peak(row, bias, V, scale, softcap, SOFTCAP, BLOCK)
        if (sick == 0) & (top > -INF) & (t != 0):
            cut, ties = row_cut(
                row, bias, V, scale, softcap, top, top_k, top_p, TOP_K, TOP_P, SOFTCAP, BLOCK
            )
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    best = tl.full(
        [BLOCK], -INF, tl.float32
    )  # a race per lane; ids only grow, so > keeps the first
    best_z = tl.full([BLOCK], -INF, tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32) + V
    seen = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
        if TOP_K or TOP_P:
            tie = ((z == cut) & (cols < V)).to(tl.int32)
            rank = seen + tl.cumsum(tie, 0)
            seen += tl.sum(tie, 0)
            z = tl.where((z < cut) | ((tie != 0) & (rank > ties)), -INF, z)
        if MIN_P:
            z = tl.where((tl.exp(z - top) < min_p) & (t != 0), -INF, z)
        peak = tl.maximum(top, tl.max(z, 0))
        total, dot = raised(top, peak, total, dot)
        total, dot = added(z, peak, total, dot)
        top = peak
        score = z
        if t != 0:
            score = z + noise.gumbel(seed, seq, pos, start, BLOCK)
        better = score > best
        best = tl.where(better, score, best)
        best_z = tl.where(better, z, best_z)
        best_id = tl.where(better, cols, best_id)
    winner = tl.max(best, 0)
    token = tl.min(tl.where(best == winner, best_id, V), 0)
    z = tl.sum(tl.where(best_id == token, best_z, 0.0), 0)
    total, dot = tl.sum(total, 0) + sick, tl.sum(dot, 0)
    bad = (total != total) | (token >= V) | (top == INF)
    logp = tl.where(greedy, 0.0, (z - top) - libdevice.log(total))
    entropy = tl.where(greedy, 0.0, libdevice.log(total) - dot / total)
    tl.store(token_out + i, tl.where(token >= V, 0, token).to(tl.int64))
    tl.store(logp_out + i, tl.where(bad, float("nan"), logp))
    tl.store(entropy_out + i, tl.where(bad, float("nan"), entropy))


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
def above(row, bias, V, scale, softcap, top, cut, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """How many z > cut, and their sum of exp(z - top); the sum is monotone in cut, bit for bit."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z, _ = load_z(row, bias, start + tl.arange(0, BLOCK), V, scale, softcap, SOFTCAP)
        over = z > cut
        count += over.to(tl.int32)
        mass += tl.where(over, tl.exp(z - top), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def row_cut(
    row,
    bias,
    V,
    scale,
    softcap,
    top,
    top_k,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(cut, ties): what top_k and then top_p keep is z > cut and the first `ties` ids with z == cut.

    No sort: both are a bisection over the bits of the cut. top_k is the least cut with fewer than k
    above it; top_p, within those, the least with a mass above it of less than top_p of the whole.
    """
    high = ordered(top)
    cut = tl.full([], -INF, tl.float32)
    low = ordered(cut)
    ties = tl.full([], 0, tl.int32) + V
    if TOP_K:
        least, most = low, high
        while least < most:
            middle = (least + most) >> 1
            n, _ = above(row, bias, V, scale, softcap, top, float_of(middle), SOFTCAP, BLOCK)
            fits = n < top_k
            most = tl.where(fits, middle, most)
            least = tl.where(fits, least, middle + 1)
        low = least
        cut = float_of(least)
        n, _ = above(row, bias, V, scale, softcap, top, cut, SOFTCAP, BLOCK)
        ties = top_k - n
    if TOP_P:
        _, mass = above(row, bias, V, scale, softcap, top, cut, SOFTCAP, BLOCK)
        bound = top_p * (mass + tl.where(cut == -INF, 0.0, ties * tl.exp(cut - top)))
        least, most = low, high
        while least < most:
            middle = (least + most) >> 1
            _, mass = above(row, bias, V, scale, softcap, top, float_of(middle), SOFTCAP, BLOCK)
            fits = mass < bound
            most = tl.where(fits, middle, most)
            least = tl.where(fits, least, middle + 1)
        at = float_of(least)
        _, mass = above(row, bias, V, scale, softcap, top, at, SOFTCAP, BLOCK)
        # the first tie is kept if the mass before it is below the bound, the next if ..
        fit = tl.ceil((bound - mass) / tl.maximum(tl.exp(at - top), 1e-37))
        fit = tl.where(fit < V, fit, V * 1.0).to(tl.int32)
        ties = tl.where(at > cut, fit, tl.minimum(fit, ties))
        cut = at
    return cut, ties
