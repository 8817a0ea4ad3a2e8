"""A row of logits to its policy gradient in one kernel: statistics, the token's loss, gradient.

    logits -> logp, entropy -> c = dl/dlogp, e = dl/dentropy
    dz = c (onehot - p) - e p (log p + entropy)

One program a row, for objectives whose terms need no other row: the row is read once for its
statistics and, where it has a gradient, once more, from L2 as long as the rows in flight fit there.
The loss itself is policy_loss.py's, over all rows at once.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import objective
from .logits import INF, finished, flat, launch, load_z, no_columns, with_columns
from .objective import token_loss


def row_policy(
    logits,  # [R, V] fp32
    bias,  # [V] or None
    targets,  # [R] int64; `ignore_index`: not read, no gradient
    advantages,  # [R] fp32, as are the next four
    row_weight,
    old_logp,  # or None, as ref and sampler
    ref_logp,
    sampler_logp,
    logp,  # [R] fp32, written, as are entropy and scale
    entropy,
    scale,  # None: the gradient is not scaled
    temperature,
    softcap,
    ignore_index,
    packed,
    out,  # [R, V], as row_grad's; None: no gradient
):
    """logp and entropy of each row, and the gradient of its logits times its power of two `scale`,
    by which fp16 holds it. Any target outside [0, V) but ignore_index has NaN and no gradient.
    """
    rows, vocab = logits.shape
    knobs, codes = objective.unpack(packed)
    if rows:
        with torch.cuda.device_of(logits):
            _row_policy_kernel[(rows,)](
                logits, logits.stride(0), flat(bias), flat(targets), flat(advantages),
                flat(row_weight), flat(old_logp), flat(ref_logp), flat(sampler_logp), logp, entropy,
                scale, out, 0 if out is None else out.stride(0), vocab, 1 / temperature, softcap,
                ignore_index, knobs, **codes, SOFTCAP=softcap != 0, **launch(vocab, per_thread=8)
            )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def _row_policy_kernel(
    logits,  # [R, V]
    stride,
    bias,
    targets,
    advantages,
    row_weight,
    old,
    ref,
    sampler,
    logp_out,
    entropy_out,
    scale_out,
    out,
    out_stride,
    V,
    inverse_temperature,
    softcap,
    ignore_index,
    k,
    RATIO: tl.constexpr,
    SURROGATE: tl.constexpr,
    DUAL: tl.constexpr,
    DELTA: tl.constexpr,
    BETA: tl.constexpr,
    KL: tl.constexpr,
    KL_RATIO: tl.constexpr,
    KL_STRAIGHT: tl.constexpr,
    FIX: tl.constexpr,
    ALWAYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    y = tl.load(targets + i)
    known = (y >= 0) & (y < V) & (y != ignore_index)
    ci, ei = 0.0, 0.0
    lp = tl.where(y == ignore_index, 0.0, float("nan"))
    ent, log_z = lp, lp
    if known:
        stats = no_columns(BLOCK)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, _ = load_z(row, bias, cols, V, inverse_temperature, softcap, SOFTCAP)
            stats = with_columns(stats, z, cols, y)
        lp, ent, log_z = finished(stats, y < V)
        w, a = tl.load(row_weight + i), tl.load(advantages + i)
        before = lp
        if old is not None:
            before = tl.load(old + i)
        rf = None if ref is None else tl.load(ref + i)
        sm = None if sampler is None else tl.load(sampler + i)
        value, slope, _, _, _, _, _, _, _ = token_loss(
            lp, before, a, rf, sm, 0.0, 0.0, k,
            RATIO, SURROGATE, DUAL, DELTA, BETA, KL, KL_RATIO, KL_STRAIGHT, FIX
        )  # fmt: skip
        slope = tl.where(value != value, value, slope)  # whatever it is NaN from: to be seen
        live = (w != 0) & (lp != -INF) & (log_z != -INF)
        if not ALWAYS:
            live = live & (a != 0)
        ci = tl.where(live, w * slope, 0.0)
        ei = tl.where(live, -w * k.entropy_coef, 0.0)
    tl.store(logp_out + i, lp)
    tl.store(entropy_out + i, ent)
    if scale_out is not None:
        most = tl.maximum(tl.abs(ci), tl.abs(ei)) * inverse_temperature
        up = tl.exp2(tl.floor(tl.log2(256.0 / tl.maximum(most, 1e-30))))  # linear.FP16_SCALE
        tl.store(scale_out + i, up)
        ci, ei = ci * up, ei * up
    if out is not None:
        out_row = out + i * out_stride
        if (ci != 0) | (ei != 0):
            at_y = -ci * libdevice.expm1(lp) - ei * libdevice.exp(lp) * (lp + ent)
            shift = ei * ent
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                z, slopes = load_z(row, bias, cols, V, inverse_temperature, softcap, SOFTCAP)
                d = z - log_z
                d = tl.where(d < -1e30, -1e30, d)
                dz = tl.exp(d) * (-ci - ei * d - shift)
                dz = tl.where(cols == y, at_y, dz) * (slopes * inverse_temperature)
                # 16-bit rows are made over their own fp32 rows: see row_grad
                tl.debug_barrier()
                tl.store(out_row + cols, dz.to(out.dtype.element_ty), mask=cols < V)
        else:
            zero = tl.zeros([BLOCK], out.dtype.element_ty)
            for start in range(0, V, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(out_row + cols, zero, mask=cols < V)
