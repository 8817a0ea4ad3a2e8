"""The loss of a token and of its sequence: values and slopes, every knob of an Objective.

    1. sums    what a sequence sums over its tokens: ratio_part, mismatch_part
    2. levels  the log-ratio and the mismatch of the sequence; a row-local objective has none
    3. tokens  token_loss: value, slope in its own log-prob, slope in the sequence's log-ratio
    4. spread  dlogp of each token += ratio_share * (3.'s weighted slopes, summed over the sequence)

Codes are compile-time, one kernel per algorithm; numbers are not, so a schedule compiles nothing.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

INF = tl.constexpr(float("inf"))
CLAMP = tl.constexpr(20.0)  # of every exponent
LOW = tl.constexpr(-1e15)  # stands for a log-prob of -inf
LOG_TINY = tl.constexpr(-18.420680743952367)  # log 1e-8, VESPO's lower bound
K3_MAX = tl.constexpr(10.0)

# The orders of RATIOS, SURROGATES, KLS and CORRECTIONS in vgkern.objectives.
NO_RATIO, TOKEN, SEQUENCE, SEQUENCE_SUM, SEQUENCE_TOKEN, GEOMETRIC = map(tl.constexpr, range(6))
CLIP, LINEAR, CISPO, SAPO, VESPO = map(tl.constexpr, range(5))
K1, K2, K3, K3_CLAMPED, ABS = map(tl.constexpr, range(5))
NO_FIX, TOKEN_TRUNCATE, TOKEN_MASK, SEQUENCE_TRUNCATE, SEQUENCE_MASK = map(tl.constexpr, range(5))


class Knobs(NamedTuple):
    """The numbers of an objective, as kernels take them."""

    low: float  # 1 - clip_low
    high: float  # 1 + clip_high
    clip_low: float
    clip_high: float
    dual_clip: float
    delta: float
    beta: float
    sampler_min: float
    sampler_max: float
    entropy_coef: float
    tau_pos: float
    tau_neg: float
    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float


def unpack(packed):
    """(Knobs, codes) of Objective.pack()."""
    k = [float(x) for x in packed]
    knobs = Knobs(1 - k[2], 1 + k[3], k[2], k[3], k[4], k[5], k[6], k[11], k[12], k[13], *k[14:20])
    codes = {
        "RATIO": int(k[0]),
        "SURROGATE": int(k[1]),
        "DUAL": k[4] > 0,
        "DELTA": k[5] > 0,
        "BETA": k[6] != 0,
        "KL": int(k[7]),
        "KL_RATIO": k[8] != 0,
        "KL_STRAIGHT": k[9] != 0,
        "FIX": int(k[10]),
        "ALWAYS": k[6] != 0 or k[13] != 0,
    }
    return knobs, codes


def row_local(codes):
    """No token's slope needs another token."""
    return codes["RATIO"] <= 1 and codes["FIX"] < 3


@triton.jit
def at_most(x, top):
    """Hands a NaN in x on, as do at_least and clamped."""
    return tl.where(x > top, top, x)


@triton.jit
def at_least(x, bottom):
    return tl.where(x < bottom, bottom, x)


@triton.jit
def clamped(x):
    return at_most(at_least(x, -CLAMP), CLAMP)


@triton.jit
def inside(x):
    return (x >= -CLAMP) & (x <= CLAMP)


@triton.jit
def log_ratio(x, y):
    """x - y of log-probs; 0 where both are -inf (a blocked token)."""
    return at_least(x, LOW) - at_least(y, LOW)


@triton.jit
def ratio_part(own, a, k, RATIO: tl.constexpr):
    """What a token adds to the log-ratio of its sequence."""
    if RATIO == SEQUENCE_SUM:
        return clamped(own)
    elif RATIO == GEOMETRIC:
        return tl.where(a > 0, at_most(own, k.clip_high), at_least(own, -k.clip_low))
    else:
        return own


@triton.jit
def correction_weight(gap, k, FIX: tl.constexpr):
    """exp(old - sampler), truncated or masked, from the log of a token or the sum of a sequence."""
    w = libdevice.exp(clamped(gap))
    if FIX == TOKEN_TRUNCATE or FIX == SEQUENCE_TRUNCATE:  # noqa: SIM109
        return at_most(at_least(w, k.sampler_min), k.sampler_max)
    else:
        return tl.where((w < k.sampler_min) | (w > k.sampler_max), 0.0, w)  # NaN stays visible


@triton.jit
def mismatch_part(old, sampler, k, SURROGATE: tl.constexpr, FIX: tl.constexpr):
    """What a token adds to the mismatch of its sequence; for VESPO the log of its correction."""
    gap = log_ratio(old, sampler)
    if SURROGATE == VESPO:
        w = libdevice.log(correction_weight(gap, k, FIX))
        return at_most(at_least(w, LOG_TINY), CLAMP)
    else:
        return gap


@triton.jit
def surrogate_loss(
    lp, own, a, d, r, dr, mismatch, k,
    RATIO: tl.constexpr, SURROGATE: tl.constexpr, DUAL: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """(value, slope in d, slope in the token's own log-prob, clipped low, high, dual)."""
    zero = lp * 0 + a * 0
    zero = tl.where(zero != zero, 0.0, zero)
    value, along, score = zero, zero, zero
    low = zero > 0
    high, dual = low, low
    possible = lp != -INF
    lp = tl.where(possible, lp, 0.0)  # a blocked token has no score
    live = tl.where(possible, 1.0, 0.0)
    bounded = at_most(at_least(r, k.low), k.high)
    if SURROGATE == CLIP:
        capped = r
        if DELTA:
            capped = at_most(r, k.delta)
        one, two = capped * a, bounded * a
        first = one <= two
        value = -tl.where(two < one, two, one)
        moves = tl.where(first, capped == r, bounded == r)
        along = tl.where(moves, -a * dr, 0.0)
        low = (a < 0) & (r < k.low)
        high = (a > 0) & (r > k.high)
        if DELTA:
            dual = (r > k.delta) & (((a < 0) & (k.delta >= k.high)) | ((a > 0) & (r <= k.high)))
        if DUAL:
            over = (a < 0) & (r > k.dual_clip)
            value = tl.where(over, -k.dual_clip * a, value)
            along = tl.where(over, 0.0, along)
            dual = dual | over
    elif SURROGATE == LINEAR:
        if RATIO == NO_RATIO:
            value = -a * lp
            score = -a * live
        else:
            value = -a * r
            along = -a * dr
        if RATIO == GEOMETRIC:
            low = (a < 0) & (own < -k.clip_low)
            high = (a > 0) & (own > k.clip_high)
    elif SURROGATE == CISPO:
        score = -bounded * a * live
        value = -bounded * a * lp
        low = (a != 0) & (r < k.low)
        high = (a != 0) & (r > k.high)
    elif SURROGATE == SAPO:
        tau = tl.where(a > 0, k.tau_pos, k.tau_neg)
        gate = 1 / (1 + libdevice.exp(-tau * (r - 1)))
        value = -a * 4 / tau * gate
        along = -a * 4 * gate * (1 - gate) * dr
    else:
        w = at_most(at_least(d + mismatch, LOG_TINY), CLAMP)
        gain = tl.where(a >= 0, k.k_pos, k.k_neg)
        by = tl.where(a >= 0, k.lambda_pos, k.lambda_neg)
        phi = libdevice.exp(at_most(by + gain * w - by * libdevice.exp(w), CLAMP))
        value = -phi * a * lp
        score = -phi * a * live
    return value, along, score, low, high, dual


@triton.jit
def kl_loss(e, KL: tl.constexpr, STRAIGHT: tl.constexpr):
    """(KL estimate, its slope in logp) from e = ref - logp."""
    c = clamped(e)
    k3, slope3 = libdevice.expm1(c) - c, tl.where(inside(e), -libdevice.expm1(c), 0.0)
    if KL == K1:
        value, slope = -e, e * 0 + 1
    elif KL == K2:
        value, slope = 0.5 * e * e, -e
    elif KL == K3:
        value, slope = k3, slope3
    elif KL == K3_CLAMPED:
        value, slope = at_most(k3, K3_MAX), tl.where(k3 <= K3_MAX, slope3, 0.0)
    else:
        value, slope = tl.abs(e), tl.where(e > 0, -1.0, tl.where(e < 0, 1.0, 0.0))
    if STRAIGHT:
        slope = -e
    return value, slope


@triton.jit
def token_loss(
    lp, old, a, ref, sampler, sequence_d, mismatch, k,
    RATIO: tl.constexpr, SURROGATE: tl.constexpr, DUAL: tl.constexpr, DELTA: tl.constexpr,
    BETA: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, KL_STRAIGHT: tl.constexpr,
    FIX: tl.constexpr,
):  # fmt: skip
    """(value without the entropy term, slope in the token's own log-prob, slope in the log-ratio of
    its sequence, log-ratio, r, KL, clipped low, high, dual). `ref` and `sampler` may be None."""
    possible = lp != -INF
    own = log_ratio(lp, old)
    d = own
    if RATIO > TOKEN:
        d = sequence_d + own * 0
    r = libdevice.exp(clamped(d))
    through: tl.constexpr = RATIO > TOKEN and RATIO != SEQUENCE_TOKEN
    # blocked tokens are left out when the slope is spread
    moves = inside(d) if through else inside(d) & possible
    dr = tl.where(moves, r, 0.0)
    value, along, slope, low, high, dual = surrogate_loss(
        lp, own, a, d, r, dr, mismatch, k, RATIO, SURROGATE, DUAL, DELTA
    )
    if sampler is not None and FIX != NO_FIX and SURROGATE != VESPO:
        if FIX >= SEQUENCE_TRUNCATE:
            fix = correction_weight(mismatch, k, FIX)
        else:
            fix = correction_weight(log_ratio(old, sampler), k, FIX)
        value, along, slope = value * fix, along * fix, slope * fix
    kl = own * 0
    if ref is not None:
        kl, dkl = kl_loss(log_ratio(ref, lp), KL, KL_STRAIGHT)
        if BETA:
            by = kl * 0 + k.beta
            if KL_RATIO:
                if RATIO == SEQUENCE_SUM or RATIO == GEOMETRIC:  # noqa: SIM109
                    by = k.beta * libdevice.exp(clamped(own))
                    slope += tl.where(possible & inside(own), by * kl, 0.0)
                else:
                    by = k.beta * r
                    along += k.beta * kl * dr
            value += by * kl
            slope += tl.where(possible, by * dkl, 0.0)
    if through:
        return value, slope, along, d, r, kl, low, high, dual
    else:
        return value, slope + along, along * 0, d, r, kl, low, high, dual


@triton.jit
def ratio_share(lp, own, a, inverse_length, k, RATIO: tl.constexpr):
    """d(log-ratio of the sequence) / dlogp of this token."""
    if RATIO == SEQUENCE_SUM:
        share = tl.where(inside(own), 1.0, 0.0)
    elif RATIO == SEQUENCE:
        share = own * 0 + inverse_length
    else:
        free = tl.where(a > 0, own <= k.clip_high, own >= -k.clip_low)
        share = tl.where(free, inverse_length, 0.0)
    return tl.where(lp == -INF, 0.0, share)
