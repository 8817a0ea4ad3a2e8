"""linear_token_logprobs: a forward that fuses the GEMM with the row statistics, so that no logit
reaches memory, and a backward over chunks of recomputed logits, which a narrow head in 16 bits does
not store either (linear_grad).

Forward: grid (row blocks x spans of the vocabulary); each program keeps (max, sum, dot, target) of
its rows over its span, each for the columns of one lane, so that no tile waits for a sum over
threads; a second kernel puts the spans together. Spans depend on V alone, so a row does not depend
on the batch it is in.
"""

import torch
import triton
import triton.language as tl

from . import linear, live, memory, row_cut, tile
from . import rows as row_kernels
from .linear_grad import linear_grad, recompute_pays, room
from .logits import INF, finish, flat, raised

SPAN = 1024  # columns per program, a multiple of every tile's N


@memory.says
def linear_logprobs_fwd(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] or None
    targets,  # [N] int64
    temperature,
    softcap,
    ignore_index,
    rows=row_kernels,
):
    count = hidden.shape[0]
    kept = live.kept(hidden, weight.shape[0], lambda: targets != ignore_index)
    hidden, targets = live.taken(hidden, kept), live.taken(targets, kept)
    head = (hidden, weight, bias, targets, temperature, softcap, ignore_index)
    return tuple(live.spread(x, kept, count) for x in statistics(*head, rows))


def statistics(
    hidden, weight, bias, targets, temperature, softcap, ignore_index, rows=row_kernels
):  # fmt: skip
    """`linear_logprobs_fwd` of all rows."""
    if rows is row_kernels and not linear.tf32(hidden):
        return _fused_fwd(hidden, weight, bias, targets, temperature, softcap, ignore_index)
    parts = [
        rows.row_stats(
            linear.mm32(hidden[part], weight.t()),
            bias,
            targets[part],
            temperature,
            softcap,
            ignore_index,
        )
        for part in linear.chunks(hidden.shape[0], weight.shape[0], hidden.device)
    ]
    if not parts:
        return tuple(hidden.new_empty(0, dtype=torch.float32) for _ in range(3))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


@memory.says
def linear_logprobs_bwd(
    hidden,
    weight,
    bias,
    targets,
    logp,  # [N] fp32, as are entropy, lse, dlogp, dentropy
    entropy,
    lse,
    dlogp,
    dentropy,
    temperature,
    softcap,
    ignore_index,
    needs,
    fp32_dhidden=False,
    seed=0,
    tau=1.0,
    costate=None,  # [N, He]: adds the third term of the row gradient
    embedding=None,  # [V, He]
    sequence=None,  # [N] int64, as is position; None: relaxation "expected"
    position=None,
    costate_scale=None,  # [] fp32
    rows=row_kernels,
):
    alive = (targets != ignore_index) & (logp != -torch.inf)
    c, e = (g.masked_fill(~alive, 0) for g in (dlogp, dentropy))
    count, alive = hidden.shape[0], (c != 0) | (e != 0)
    if costate is not None:
        alive |= (costate != 0).any(-1)
        costate_scale = costate_scale.expand(count)
    kept = live.kept(hidden, weight.shape[0], lambda: alive) if any(needs) else None
    hidden, targets, logp, entropy, lse, c, e, alive = (
        live.taken(x, kept) for x in (hidden, targets, logp, entropy, lse, c, e, alive)
    )
    costate, sequence, position, costate_scale = (
        live.taken(x, kept) for x in (costate, sequence, position, costate_scale)
    )
    third = (seed, tau, costate, embedding, sequence, position, costate_scale)
    costates = None if costate is None else linear.Costates(*third)
    if needs[1]:
        hidden = linear.clean(hidden, alive)
    grads = linear.Grads(hidden, weight, bias, needs, temperature, softcap, ignore_index, rows)
    if any(needs):
        n, vocab, size = hidden.shape[0], weight.shape[0], hidden.element_size()
        given = (targets, logp, entropy, lse)
        if rows is row_kernels and costate is None and recompute_pays(hidden.shape[1], size, True):
            c, e, scale = grads.scaled(c, e, 1 / temperature)
            for part in linear.chunks(n, vocab, hidden.device, size):
                dz = linear_grad(
                    hidden[part], weight, bias, *(x[part] for x in (*given, c, e)), temperature,
                    softcap, ignore_index, room(hidden[part], vocab)
                )  # fmt: skip
                grads.products(part, dz, None if scale is None else scale[part])
                del dz  # before the next chunk's is made
        else:
            for part in linear.chunks(n, (1 if costate is None else 2) * vocab, hidden.device):
                logits = linear.mm32(hidden[part], weight.t())
                grads.add(part, logits, *(x[part] for x in (*given, c, e)), costates)
                del logits
    dhidden, *others = grads.finish(as_input=True, fp32_dhidden=fp32_dhidden)
    return (live.spread(dhidden, kept, count) if needs[0] else dhidden), *others


@memory.says
def linear_truncated_logprobs_fwd(
    hidden,
    weight,
    bias,
    targets,
    softcap,
    ignore_index,
    *cut,  # vgkern.ops._truncate.Cut
    rows=row_kernels,
):
    parts = [
        rows.row_truncated(
            linear.mm32(hidden[part], weight.t()),
            bias,
            targets[part],
            softcap,
            ignore_index,
            row_cut.part_of(cut, part),
        )
        for part in linear.chunks(hidden.shape[0], weight.shape[0], hidden.device)
    ]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return tuple(hidden.new_empty(0, dtype=torch.float32) for _ in range(2))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


@memory.says
def linear_truncated_logprobs_bwd(
    hidden,
    weight,
    bias,
    targets,
    dlogp,  # [N] fp32, as is dentropy
    dentropy,
    softcap,
    ignore_index,
    *cut_and_needs,  # vgkern.ops._truncate.Cut, needs
    rows=row_kernels,
):
    *cut, needs = cut_and_needs
    temperature = cut[0] if cut[4] is None else cut[4]
    vocab = weight.shape[0]
    alive = (targets != ignore_index) & (targets >= 0) & (targets < vocab)
    alive &= (dlogp != 0) | (dentropy != 0)
    alive &= temperature != 0  # a greedy row has none
    if needs[1]:
        hidden = linear.clean(hidden, alive)
    grads = linear.Grads(hidden, weight, bias, needs, 1.0, softcap, ignore_index, rows)
    if any(needs):
        y = targets.where(alive, ignore_index)  # what has no gradient is not looked at
        c, e = (g.masked_fill(~alive, 0) for g in (dlogp, dentropy))
        steep = alive / (temperature if cut[4] is not None else temperature or 1.0)
        steep = steep.masked_fill(~alive, 0)
        for part in linear.chunks(hidden.shape[0], vocab, hidden.device):
            logits = linear.mm32(hidden[part], weight.t())
            *scaled, scale = grads.scaled(c[part], e[part], steep[part])
            dz = rows.row_truncated_grad(
                logits, bias, y[part], *scaled, softcap, ignore_index,
                row_cut.part_of(cut, part), linear.beside(logits, hidden.dtype)
            )  # fmt: skip
            grads.products(part, dz, scale)
            del logits, dz
    return grads.finish(as_input=True)


def _fused_fwd(hidden, weight, bias, targets, temperature, softcap, ignore_index):
    count, vocab = hidden.shape[0], weight.shape[0]
    logp, entropy, lse = (
        torch.empty(count, dtype=torch.float32, device=hidden.device) for _ in range(3)
    )
    if not count:
        return logp, entropy, lse
    width, size = hidden.shape[1], hidden.element_size()
    targets = targets.contiguous()
    with torch.cuda.device_of(hidden):
        t = tile.config(count, vocab, width, size)
        blocks, spans = triton.cdiv(count, t.rows), triton.cdiv(vocab, SPAN)
        state = torch.empty(4, spans, count, dtype=torch.float32, device=hidden.device)
        _linear_stats_kernel[(blocks * spans,)](
            hidden, hidden.stride(0), weight, weight.stride(0), flat(bias), targets, state, count,
            vocab, width, blocks, tile.group(blocks, t.rows, width, size), 1 / temperature, softcap,
            ignore_index, SOFTCAP=softcap != 0, SPAN=SPAN, **t.options(width, hidden.dtype)
        )  # fmt: skip
        _combine_kernel[(triton.cdiv(count, 128),)](
            state, targets, logp, entropy, lse, count, vocab, spans, ignore_index, BLOCK=128,
            num_warps=4, enable_fp_fusion=True
        )  # fmt: skip
    return logp, entropy, lse


@triton.jit(do_not_specialize=["R", "blocks", "group", "ignore_index"])
def _linear_stats_kernel(
    hidden,  # [R, H]
    hidden_stride,
    weight,  # [V, H]
    weight_stride,
    bias,  # [V] or None
    targets,  # [R]
    state,  # [4, spans, R]: max, sum, dot over the columns but the target, and the target
    R,
    V,
    H,
    blocks,
    group,
    scale,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,  # H is a multiple of K
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    SPAN: tl.constexpr,
):
    block, span = tile.place(blocks, group)
    rm = block.to(tl.int64) * M + tl.arange(0, M)
    inside = rm < R
    y = tl.load(targets + rm, mask=inside, other=ignore_index)
    top = tl.full([M, 4], -INF, tl.float32)
    total = tl.zeros([M, 4], tl.float32)
    dot = tl.zeros([M, 4], tl.float32)
    target = tl.zeros([M, 4], tl.float32)
    if tl.max((y != ignore_index).to(tl.int32), 0) != 0:
        stats, scalars = (top, total, dot, target), (V, scale, softcap)
        for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), N):
            x = tile.product(
                hidden, hidden_stride, weight, weight_stride, rm, first, R, V, H, WHOLE, PRECISION,
                M, N, K
            )  # fmt: skip
            y = tl.load(targets + rm, mask=inside, other=ignore_index)
            chosen = tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)
            at = chosen - first
            special = tl.max(((at >= 0) & (at < N)).to(tl.int32), 0) != 0
            special |= first + N > V
            stats = _added(stats, x, bias, chosen, special, scalars, first, SOFTCAP, M, N, PART)
        top, total, dot, target = stats
    peak = tl.max(top, 1)
    total, dot = raised(top, peak[:, None], total, dot)
    spans = tl.num_programs(0) // blocks
    at = state + span.to(tl.int64) * R + rm
    size = spans.to(tl.int64) * R
    tl.store(at, peak, mask=inside)
    tl.store(at + size, tl.sum(total, 1), mask=inside)
    tl.store(at + 2 * size, tl.sum(dot, 1), mask=inside)
    tl.store(at + 3 * size, tl.sum(target, 1), mask=inside)


@triton.jit
def _added(
    stats, x, bias, chosen, special, scalars, first, SOFTCAP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The running statistics with the N columns of product x from `first` in them, PART of them at
    a time. `chosen` is the column of each row's target, or -1; `special`: one of these columns is,
    or is past the vocabulary."""
    if N > PART:
        left, right = tile.halves(x, M, N)
        given = (bias, chosen, special, scalars)
        stats = _added(stats, left, *given, first, SOFTCAP, M, N // 2, PART)
        return _added(stats, right, *given, first + N // 2, SOFTCAP, M, N // 2, PART)
    else:
        top, total, dot, target = stats
        V, scale, softcap = scalars
        cols = first + tl.arange(0, N)
        z, _ = tile.finished(x, bias, cols, V, scale, softcap, SOFTCAP)
        if special:
            here = cols[None, :] == chosen[:, None]
            target += _by_lane(tl.where(here, z, 0.0), M, N, False)
            z = tl.where(here | (cols >= V)[None, :], -INF, z)
        peak = tl.maximum(top, _by_lane(z, M, N, True))
        total, dot = raised(top, peak, total, dot)
        anchor = tl.where(peak == -INF, 0.0, peak)
        d = tl.reshape(z, [M, N // 8, 4, 2]) - anchor[:, None, :, None]
        p = tl.exp(d)
        total += tl.sum(tl.sum(p, 3), 1)
        dot += tl.sum(tl.sum(p * tl.maximum(d, -1e30), 3), 1)  # -inf: 0
        return peak, total, dot, target


@triton.jit
def _by_lane(x, M: tl.constexpr, N: tl.constexpr, MAX: tl.constexpr):
    """[M, 4]: over the columns that one lane of a warp holds after a product, 2 of every 8."""
    x = tl.reshape(x, [M, N // 8, 4, 2])
    return tl.max(tl.max(x, 3), 1) if MAX else tl.sum(tl.sum(x, 3), 1)


@triton.jit(do_not_specialize=["R", "ignore_index"])
def _combine_kernel(
    state,  # [4, spans, R]
    targets,
    logp_out,
    entropy_out,
    lse_out,
    R,
    V,
    spans,
    ignore_index,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < R
    y = tl.load(targets + i, mask=inside, other=0)
    size = tl.full([], 1, tl.int64) * spans * R
    top = tl.full([BLOCK], -INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    target = tl.zeros([BLOCK], tl.float32)
    for s in range(0, spans):
        at = state + tl.full([], 1, tl.int64) * s * R + i
        s_top = tl.load(at, mask=inside, other=0.0)
        s_total = tl.load(at + size, mask=inside, other=0.0)
        s_dot = tl.load(at + 2 * size, mask=inside, other=0.0)
        target += tl.load(at + 3 * size, mask=inside, other=0.0)
        peak = tl.maximum(top, s_top)
        total, dot = raised(top, peak, total, dot)
        s_total, s_dot = raised(s_top, peak, s_total, s_dot)
        total += s_total
        dot += s_dot
        top = peak
    logp, entropy, lse = finish(target, top, total, dot, y < V)
    ignored = y == ignore_index
    stray = (y < 0) | (y > V)
    nan = float("nan")
    logp = tl.where(ignored, 0.0, tl.where(stray, nan, logp))
    entropy = tl.where(ignored, 0.0, tl.where(stray, nan, entropy))
    lse = tl.where(ignored, 0.0, tl.where(stray, nan, lse))
    tl.store(logp_out + i, logp, mask=inside)
    tl.store(entropy_out + i, entropy, mask=inside)
    tl.store(lse_out + i, lse, mask=inside)
