"""What kernels over logits share: z of a row, its running softmax sums, and what they end as.

z = s(x + bias) / temperature with s the soft-cap; x = -inf stays -inf. Statistics are fp32, and the
target is kept out of the sums.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INF = tl.constexpr(float("inf"))
MAX_BLOCK = 4096  # columns at a time
LANES = tl.constexpr(4)  # neighbouring columns of one thread, which share a running maximum


def launch(columns, per_thread=16, most=MAX_BLOCK):
    """Block and warps for rows of this many columns. A thread has at least one column of its own:
    two warps that hold the same element would race in a gradient made in place."""
    block = min(max(triton.next_power_of_2(columns), 128), most)
    warps = max(block // (32 * per_thread), 1)
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


def launch_rows(x):
    """`launch` for rows of x [R, V] that are read once. Where columns are loaded one by one,
    sixteen addresses a thread take more registers than two programs on a processor have."""
    return launch(x.shape[1], per_thread=8 if x.shape[1] % 16 or x.stride(0) % 16 else 16)


def flat(x):
    """A vector of unit stride, or None."""
    return None if x is None else x.contiguous()


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
def no_columns(BLOCK: tl.constexpr):
    """(top, total, dot, target): the running statistics of a row of which nothing is read yet, one
    each for LANES neighbouring columns, so that no block of columns waits for a sum over threads.
    """
    zero = tl.zeros([BLOCK // LANES], tl.float32)
    return zero - INF, zero, zero, tl.zeros([BLOCK], tl.float32)


@triton.jit
def with_columns(stats, z, cols, y):
    """They with a block of columns in them; the target y is kept apart."""
    top, total, dot, target = stats
    target = tl.where(cols == y, z, target)
    z = tl.where(cols == y, -INF, z)
    z = tl.reshape(z, [z.shape[0] // LANES, LANES])
    peak = tl.maximum(top, tl.max(z, 1))
    total, dot = raised(top, peak, total, dot)
    none = tl.zeros(z.shape, tl.float32)
    p, pd = added(z, peak[:, None], none, none)
    return peak, total + tl.sum(p, 1), dot + tl.sum(pd, 1), target


@triton.jit
def finished(stats, here):
    """(logp, entropy, lse) that they end as."""
    top, total, dot, target = stats
    peak = tl.max(top, 0)
    total, dot = raised(top, peak, total, dot)
    return finish(tl.sum(target, 0), peak, tl.sum(total, 0), tl.sum(dot, 0), here)


@triton.jit
def store_stats(logp, entropy, lse, i, stats, here):
    """What they end as, to row i of three vectors."""
    lp, ent, log_z = finished(stats, here)
    tl.store(logp + i, lp)
    tl.store(entropy + i, ent)
    tl.store(lse + i, log_z)


@triton.jit
def store_same(logp, entropy, lse, i, value):
    tl.store(logp + i, value)
    tl.store(entropy + i, value)
    tl.store(lse + i, value)


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
