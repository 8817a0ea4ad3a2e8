"""One token per row of materialised logits: the Gumbel race, over what a truncation keeps.

The truncation is exact and sorts nothing: its cut is found by bisection over the bits of a float.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import noise
from .logits import INF, added, flat, launch, load_z, raised


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
                logits, logits.stride(0), flat(bias), seed, sequence, position, temperature, token,
                logp, entropy, vocab, softcap, top_k, top_p, min_p, TOP_K=top_k > 0,
                TOP_P=top_p < 1, MIN_P=min_p > 0, SOFTCAP=softcap != 0,
                **launch(vocab, per_thread=8)
            )  # fmt: skip
    return token, logp, entropy


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
    """(cut, ties): top_k and then top_p keep z > cut and the first `ties` ids with z == cut.

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
