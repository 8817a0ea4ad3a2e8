"""policy_loss: loss, gradients and counts in one kernel, over blocks of tokens where the objective
is row-local, and with one program per sequence where it is not.

Every program leaves one row of sums and extremes; one more puts the rows together in fp64.
"""

import torch
import triton
import triton.language as tl

from . import objective
from .objective import (
    INF,
    NO_FIX,
    SEQUENCE_SUM,
    SEQUENCE_TOKEN,
    TOKEN,
    log_ratio,
    mismatch_part,
    ratio_part,
    ratio_share,
    token_loss,
)

# a program's row: the loss, then what vgkern.ops.policy_loss.COUNTS counts
SUMS, MIN, MAX, CLAMPED, GAP, SIZE = 9, 9, 10, 11, 12, 13
BLOCK = 1024


def policy_loss_fwd(
    logp,  # [B, T] fp32
    advantages,  # [B, T]
    row_weight,  # [B, T], 0 where masked
    old_logp,  # [B, T] or None, as are ref_logp, sampler_logp and entropy
    ref_logp,
    sampler_logp,
    entropy,
    packed,
    segments=None,  # [S + 1] int64: the sequences, instead of the rows of [B, T]
):
    rows = (logp, advantages, row_weight, old_logp, ref_logp, sampler_logp, entropy)
    dlogp, dentropy, partial = policy_terms(*rows, packed, segments)
    loss, counts = totals(partial)
    return loss, dlogp, dentropy, counts


def policy_terms(
    logp, advantages, row_weight, old_logp, ref_logp, sampler_logp, entropy, packed, segments=None
):
    """(dlogp, dentropy, a row of sums and extremes per program) of [B, T] tokens."""
    knobs, codes = objective.unpack(packed)
    given = (logp, advantages, row_weight, old_logp, ref_logp, sampler_logp, entropy)
    given = tuple(None if t is None else t.contiguous() for t in given)
    dlogp, dentropy = (torch.empty_like(given[0]) for _ in range(2))
    local = objective.row_local(codes)
    count = logp.numel()
    width, sequences = (count, 1) if local else (logp.shape[1], logp.shape[0])
    if segments is not None and not local:
        sequences = segments.numel() - 1
        width = -(-count // max(sequences, 1))  # on average: nobody looks at the lengths
    block = min(max(triton.next_power_of_2(width), 128), BLOCK)
    programs = max(-(-width // block) if local else sequences, 1)
    partial = torch.empty(programs, SIZE, dtype=torch.float32, device=logp.device)
    # Tokens a thread: their values and running sums are to fit in 128 registers.
    options = {"BLOCK": block, "num_warps": block // (32 * (4 if local else 2))}
    made = (dlogp, dentropy, partial)
    with torch.cuda.device_of(logp):
        if local:
            _token_kernel[(programs,)](
                *given, *made, count, knobs, **codes, **options, enable_fp_fusion=True
            )
        else:
            if segments is not None and not sequences:  # the one program reads two ends
                segments = torch.zeros(2, dtype=torch.int64, device=logp.device)
            _sequence_kernel[(programs,)](
                *given, *made, segments, min(width, count), count, knobs, **codes, **options,
                enable_fp_fusion=True
            )  # fmt: skip
    return dlogp, dentropy, partial


def totals(partial):
    """(loss, counts) of all programs' rows [P, SIZE]."""
    loss = torch.empty((), dtype=torch.float32, device=partial.device)
    counts = torch.empty(SIZE - 1, dtype=torch.float32, device=partial.device)
    with torch.cuda.device_of(partial):
        _totals_kernel[(1,)](
            partial, partial.shape[0], loss, counts, ROWS=64, num_warps=4, enable_fp_fusion=True
        )  # fmt: skip
    return loss, counts


@triton.jit(do_not_specialize=["P"])
def _totals_kernel(partial, P, loss, counts, ROWS: tl.constexpr):
    j = tl.arange(0, 16)
    total = tl.zeros([ROWS, 16], tl.float64)
    least = tl.full([ROWS, 16], INF, tl.float32)
    most = tl.full([ROWS, 16], -INF, tl.float32)
    for start in range(0, P, ROWS):
        r = start + tl.arange(0, ROWS)
        there = (r < P)[:, None] & (j < 13)[None, :]
        x = tl.load(partial + r[:, None] * 13 + j[None, :], mask=there, other=0.0)
        total += x.to(tl.float64)
        # a NaN stays, whatever follows it
        least = tl.where(there & ((x < least) | (x != x)), x, least)
        most = tl.where(there & ((x > most) | (x != x)), x, most)
    value = tl.sum(total, 0).to(tl.float32)
    value = tl.where(j == 9, lowest(least), value)
    value = tl.where((j == 10) | (j == 12), -lowest(-most), value)
    # shares and means of the active rows, and extremes that are 1 where there are none
    active = tl.sum(tl.where(j == 2, value, 0.0), 0)
    value = tl.where((j >= 3) & (j <= 8), value / tl.maximum(active, 1.0), value)
    value = tl.where(((j == 9) | (j == 10)) & (active <= 0), 1.0, value)
    value = tl.where((j == 12) & (value > -objective.LOW / 2), INF, value)  # to a log-prob of -inf
    tl.store(loss + j, value, mask=j == 0)
    tl.store(counts + j - 1, value, mask=(j > 0) & (j < 13))


@triton.jit
def lowest(x):
    """The least of each column; NaN where there is one."""
    sick = tl.max((x != x).to(tl.int32), 0) != 0
    return tl.where(sick, float("nan"), tl.min(tl.where(x != x, INF, x), 0))


@triton.jit
def _load(logp, advantages, row_weight, old, i, inside):
    """(w, logp, advantage, old) of the tokens at `i`; whatever a masked one holds is 0. The callers
    load ref and sampler, which may be None: triton 3.6 has no function that returns one."""
    w = tl.load(row_weight + i, mask=inside, other=0.0)
    m = w != 0
    lp, a = tl.load(logp + i, mask=m, other=0.0), tl.load(advantages + i, mask=m, other=0.0)
    before = lp
    if old is not None:
        before = tl.load(old + i, mask=m, other=0.0)
    return w, lp, a, before


@triton.jit
def _live(w, a, ALWAYS: tl.constexpr):
    """The tokens that have a term: without KL and entropy, those with an advantage."""
    live = w != 0
    if not ALWAYS:
        live = live & (a != 0)
    return live


@triton.jit
def _entropy(value, entropy, i, live, w, k, BLOCK: tl.constexpr):
    """(the value with the entropy term, entropy, its slope) of the tokens at `i`."""
    ent = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    if entropy is not None:
        ent = tl.load(entropy + i, mask=live, other=0.0)
        value -= k.entropy_coef * ent
        slope = -w * k.entropy_coef
    return value, ent, slope


@triton.jit
def _count(acc, live, m, value, w, t, lp, sampler, ent):
    """The running sums and extremes with these tokens in them."""
    d, r, kl, low, high, dual = t
    loss, tokens, active, n_low, n_high, n_dual, s_kl, s_ent, s_r, least, most, far, gap = acc
    loss += tl.where(live, w * value, 0.0)
    tokens += m.to(tl.float32)
    active += live.to(tl.float32)
    n_low += (live & low).to(tl.float32)
    n_high += (live & high).to(tl.float32)
    n_dual += (live & dual).to(tl.float32)
    s_kl += tl.where(live, kl, 0.0)
    s_ent += tl.where(live, ent, 0.0)
    s_r += tl.where(live, r, 0.0)
    # a NaN stays, whatever follows it
    least = tl.where(live & ((r < least) | (r != r)), r, least)
    most = tl.where(live & ((r > most) | (r != r)), r, most)
    far += (live & ~objective.inside(d)).to(tl.float32)
    if sampler is not None:
        own = tl.abs(log_ratio(lp, sampler))
        gap = tl.where(live & ((own > gap) | (own != own)), own, gap)
    return loss, tokens, active, n_low, n_high, n_dual, s_kl, s_ent, s_r, least, most, far, gap


@triton.jit
def _fresh(BLOCK: tl.constexpr):
    z = tl.zeros([BLOCK], tl.float32)
    return z, z, z, z, z, z, z, z, z, z + INF, z - INF, z, z


@triton.jit
def _store_counts(to, acc):
    for j in tl.static_range(9):
        tl.store(to + j, tl.sum(acc[j], 0))
    tl.store(to + 9, lowest(acc[9]))
    tl.store(to + 10, -lowest(-acc[10]))
    tl.store(to + 11, tl.sum(acc[11], 0))
    tl.store(to + 12, -lowest(-acc[12]))


@triton.jit
def _token_kernel(
    logp, advantages, row_weight, old, ref, sampler, entropy, dlogp, dentropy, partial, N, k,
    RATIO: tl.constexpr, SURROGATE: tl.constexpr, DUAL: tl.constexpr, DELTA: tl.constexpr,
    BETA: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, KL_STRAIGHT: tl.constexpr,
    FIX: tl.constexpr, ALWAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    w, lp, a, before = _load(logp, advantages, row_weight, old, i, i < N)
    rf = None if ref is None else tl.load(ref + i, mask=w != 0, other=0.0)
    sm = None if sampler is None else tl.load(sampler + i, mask=w != 0, other=0.0)
    live = _live(w, a, ALWAYS)
    value, slope, _, d, r, kl, low, high, dual = token_loss(
        lp, before, a, rf, sm, 0.0, 0.0, k,
        RATIO, SURROGATE, DUAL, DELTA, BETA, KL, KL_RATIO, KL_STRAIGHT, FIX
    )  # fmt: skip
    value, ent, de = _entropy(value, entropy, i, live, w, k, BLOCK)
    slope = tl.where(value != value, value, slope)  # whatever it is NaN from: to be seen
    acc = _count(_fresh(BLOCK), live, w != 0, value, w, (d, r, kl, low, high, dual), lp, sm, ent)
    tl.store(dlogp + i, tl.where(live, w * slope, 0.0), mask=i < N)
    tl.store(dentropy + i, tl.where(live, de, 0.0), mask=i < N)
    _store_counts(partial + pid * 13, acc)


@triton.jit
def _sequence_kernel(
    logp, advantages, row_weight, old, ref, sampler, entropy, dlogp, dentropy, partial,
    segments, T, N, k,
    RATIO: tl.constexpr, SURROGATE: tl.constexpr, DUAL: tl.constexpr, DELTA: tl.constexpr,
    BETA: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, KL_STRAIGHT: tl.constexpr,
    FIX: tl.constexpr, ALWAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    first = pid * T
    if segments is not None:  # nobody has looked at them: no row outside [0, N) is touched
        first = tl.minimum(tl.maximum(tl.load(segments + pid), 0), N)
        T = tl.minimum(tl.maximum(tl.load(segments + pid + 1), 0), N) - first
    through: tl.constexpr = RATIO > TOKEN and RATIO != SEQUENCE_TOKEN
    length = tl.zeros([BLOCK], tl.float32)
    ratio = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        i = first + t
        w, lp, a, before = _load(logp, advantages, row_weight, old, i, t < T)
        m = w != 0
        length += m.to(tl.float32)
        ratio += tl.where(m, ratio_part(log_ratio(lp, before), a, k, RATIO), 0.0)
        if sampler is not None and FIX != NO_FIX:
            sm = tl.load(sampler + i, mask=m, other=0.0)
            gap += tl.where(m, mismatch_part(before, sm, k, SURROGATE, FIX), 0.0)
    inverse_length = 1 / tl.maximum(tl.sum(length, 0), 1.0)
    sequence_d, mismatch = tl.sum(ratio, 0), tl.sum(gap, 0)
    if RATIO != SEQUENCE_SUM:
        sequence_d *= inverse_length
    pending = tl.zeros([BLOCK], tl.float32)  # slope in the log-ratio of the sequence
    if through:
        for start in range(0, T, BLOCK):
            t = start + tl.arange(0, BLOCK)
            i = first + t
            w, lp, a, before = _load(logp, advantages, row_weight, old, i, t < T)
            rf = None if ref is None else tl.load(ref + i, mask=w != 0, other=0.0)
            sm = None if sampler is None else tl.load(sampler + i, mask=w != 0, other=0.0)
            live = _live(w, a, ALWAYS)
            _, _, along, _, _, _, _, _, _ = token_loss(
                lp, before, a, rf, sm, sequence_d, mismatch, k,
                RATIO, SURROGATE, DUAL, DELTA, BETA, KL, KL_RATIO, KL_STRAIGHT, FIX
            )  # fmt: skip
            pending += tl.where(live, w * along, 0.0)
    spread = tl.sum(pending, 0)
    acc = _fresh(BLOCK)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        i = first + t
        w, lp, a, before = _load(logp, advantages, row_weight, old, i, t < T)
        rf = None if ref is None else tl.load(ref + i, mask=w != 0, other=0.0)
        sm = None if sampler is None else tl.load(sampler + i, mask=w != 0, other=0.0)
        m = w != 0
        live = _live(w, a, ALWAYS)
        value, slope, _, d, r, kl, low, high, dual = token_loss(
            lp, before, a, rf, sm, sequence_d, mismatch, k,
            RATIO, SURROGATE, DUAL, DELTA, BETA, KL, KL_RATIO, KL_STRAIGHT, FIX
        )  # fmt: skip
        value, ent, de = _entropy(value, entropy, i, live, w, k, BLOCK)
        slope = tl.where(value != value, value, slope)
        dl = tl.where(live, w * slope, 0.0)
        if through:
            share = ratio_share(lp, log_ratio(lp, before), a, inverse_length, k, RATIO)
            dl += tl.where(m, spread * share, 0.0)
        acc = _count(acc, live, m, value, w, (d, r, kl, low, high, dual), lp, sm, ent)
        tl.store(dlogp + i, dl, mask=t < T)
        tl.store(dentropy + i, tl.where(live, de, 0.0), mask=t < T)
    _store_counts(partial + pid * 13, acc)
