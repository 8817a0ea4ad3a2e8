"""linear_token_logprobs: a forward that fuses the GEMM with the row statistics, so that no logit
reaches memory, and a backward over chunks of recomputed logits.

Forward: grid (row blocks x spans of the vocabulary); each program keeps (max, sum, dot, target) of
its rows over its span, a second kernel puts the spans together. Spans depend on V alone, so a row
does not depend on the batch it is in.
"""

import torch
import triton
import triton.language as tl

from . import linear, live
from . import rows as row_kernels
from .logits import INF, added, finish, flat, raised, softcapped

SPAN = 1024  # columns per program, a multiple of every config's N
# (rows, columns, depth, warps, stages) of a tile. Shared memory is stages * (rows + columns) *
# depth * bytes: 96 KiB at most, for the 99 KiB of sm_86 and sm_120.
CONFIGS = {
    (2, "few"): (64, 128, 64, 8, 4),
    (2, "many"): (128, 128, 64, 8, 3),
    (2, "odd"): (64, 64, 32, 8, 2),  # H off 16: scalar loads; more of a tile a thread spills
    (4, "few"): (32, 64, 32, 4, 3),
    (4, "many"): (64, 64, 32, 4, 3),
    (4, "odd"): (64, 64, 32, 8, 2),
}


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
    kept = live.kept(hidden, weight.shape[0], targets != ignore_index)
    hidden, targets = live.taken(hidden, kept), live.taken(targets, kept)
    head = (hidden, weight, bias, targets, temperature, softcap, ignore_index)
    return tuple(live.spread(x, kept, count) for x in statistics(*head, rows))


def statistics(
    hidden, weight, bias, targets, temperature, softcap, ignore_index, rows=row_kernels
):  # fmt: skip
    """`linear_logprobs_fwd` of all rows."""
    if rows is row_kernels:
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
    kept = live.kept(hidden, weight.shape[0], alive) if any(needs) else None
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
        blocks = 1 if costate is None else 2
        for part in linear.chunks(hidden.shape[0], blocks * weight.shape[0], hidden.device):
            logits = linear.mm32(hidden[part], weight.t())
            stats = (x[part] for x in (targets, logp, entropy, lse, c, e))
            grads.add(part, logits, *stats, costates)
    dhidden, *others = grads.finish(as_input=True, fp32_dhidden=fp32_dhidden)
    return (live.spread(dhidden, kept, count) if needs[0] else dhidden), *others


def linear_truncated_logprobs_fwd(
    hidden,
    weight,
    bias,
    targets,
    temperature,  # [N] fp32; 0: greedy
    softcap,
    ignore_index,
    top_k,
    top_p,
    min_p,
    rows=row_kernels,
):
    parts = [
        rows.row_truncated(
            linear.mm32(hidden[part], weight.t()),
            bias,
            targets[part],
            temperature[part],
            softcap,
            ignore_index,
            top_k,
            top_p,
            min_p,
        )
        for part in linear.chunks(hidden.shape[0], weight.shape[0], hidden.device)
    ]
    if not parts:
        return tuple(hidden.new_empty(0, dtype=torch.float32) for _ in range(2))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def linear_truncated_logprobs_bwd(
    hidden,
    weight,
    bias,
    targets,
    dlogp,  # [N] fp32, as are dentropy and temperature
    dentropy,
    temperature,
    softcap,
    ignore_index,
    top_k,
    top_p,
    min_p,
    needs,
    rows=row_kernels,
):
    vocab = weight.shape[0]
    alive = (targets != ignore_index) & (targets >= 0) & (targets < vocab) & (temperature != 0)
    alive &= (dlogp != 0) | (dentropy != 0)
    if needs[1]:
        hidden = linear.clean(hidden, alive)
    grads = linear.Grads(hidden, weight, bias, needs, 1.0, softcap, ignore_index, rows)
    if any(needs):
        y = targets.where(alive, ignore_index)  # what has no gradient is not looked at
        c, e = (g.masked_fill(~alive, 0) for g in (dlogp, dentropy))
        steep = (1 / temperature).where(alive, 0)
        for part in linear.chunks(hidden.shape[0], vocab, hidden.device):
            logits = linear.mm32(hidden[part], weight.t())
            *scaled, scale = grads.scaled(c[part], e[part], steep[part])
            dz = rows.row_truncated_grad(
                logits, bias, y[part], *scaled, temperature[part], softcap, ignore_index, top_k,
                top_p, min_p, linear.beside(logits, hidden.dtype)
            )  # fmt: skip
            grads.products(part, dz, scale)
    return grads.finish(as_input=True)


def _fused_fwd(hidden, weight, bias, targets, temperature, softcap, ignore_index):
    count, vocab = hidden.shape[0], weight.shape[0]
    logp, entropy, lse = (
        torch.empty(count, dtype=torch.float32, device=hidden.device) for _ in range(3)
    )
    if not count:
        return logp, entropy, lse
    m, n, k, warps, stages = config(count, vocab, hidden.shape[1], hidden.element_size())
    blocks, spans = triton.cdiv(count, m), triton.cdiv(vocab, SPAN)
    state = torch.empty(4, spans, count, dtype=torch.float32, device=hidden.device)
    targets = targets.contiguous()
    precision = "ieee" if hidden.dtype == torch.float32 else None
    with torch.cuda.device_of(hidden):
        _linear_stats_kernel[(blocks * spans,)](
            hidden, hidden.stride(0), weight, weight.stride(0), flat(bias), targets, state, count,
            vocab, hidden.shape[1], blocks, 1 / temperature, softcap, ignore_index,
            SOFTCAP=softcap != 0, WHOLE=hidden.shape[1] % k == 0, PRECISION=precision, M=m, N=n,
            K=k, SPAN=SPAN, num_warps=warps, num_stages=stages, enable_fp_fusion=True
        )  # fmt: skip
        _combine_kernel[(triton.cdiv(count, 128),)](
            state, targets, logp, entropy, lse, count, vocab, spans, ignore_index, BLOCK=128,
            num_warps=4, enable_fp_fusion=True
        )  # fmt: skip
    return logp, entropy, lse


def config(count, vocab, width, element_size):
    """The tile for this problem: one of CONFIGS, no wider than the problem itself."""
    kind = "few" if count <= 64 else "many"
    if width % 16 and (element_size, kind) != (4, "few"):
        kind = "odd"
    m, n, k, warps, stages = CONFIGS[element_size, kind]
    n = min(n, max(triton.next_power_of_2(vocab), 16))
    k = min(k, max(triton.next_power_of_2(width), 16))
    return m, n, k, warps, stages


@triton.jit(do_not_specialize=["R", "blocks", "ignore_index"])
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
    scale,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,  # H is a multiple of K
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    span = pid // blocks  # row blocks run side by side on one span of the weight: L2 holds it
    rm = (pid % blocks).to(tl.int64) * M + tl.arange(0, M)
    inside = rm < R
    y = tl.load(targets + rm, mask=inside, other=ignore_index)
    top = tl.full([M], -INF, tl.float32)
    total = tl.zeros([M], tl.float32)
    dot = tl.zeros([M], tl.float32)
    target = tl.zeros([M], tl.float32)
    if tl.max((y != ignore_index).to(tl.int32), 0) != 0:
        h_rows = hidden + tl.minimum(rm, R - 1)[:, None] * hidden_stride
        for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), N):
            cols = first + tl.arange(0, N)
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
            if bias is not None:
                acc += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
            z, _ = softcapped(acc, softcap, SOFTCAP)
            z = tl.where(cols[None, :] < V, z * scale, -INF)
            chosen = cols[None, :] == y[:, None]
            target += tl.sum(tl.where(chosen & (cols[None, :] < V), z, 0.0), 1)
            z = tl.where(chosen, -INF, z)
            peak = tl.maximum(top, tl.max(z, 1))
            total, dot = raised(top, peak, total, dot)
            none = tl.zeros([M, N], tl.float32)
            p, pd = added(z, peak[:, None], none, none)
            total += tl.sum(p, 1)
            dot += tl.sum(pd, 1)
            top = peak
    spans = tl.num_programs(0) // blocks
    at = state + span.to(tl.int64) * R + rm
    size = spans.to(tl.int64) * R
    tl.store(at, top, mask=inside)
    tl.store(at + size, total, mask=inside)
    tl.store(at + 2 * size, dot, mask=inside)
    tl.store(at + 3 * size, target, mask=inside)


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
