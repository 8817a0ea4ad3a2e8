"""linear_divergence: student and teacher logits, a chunk of rows at a time, side by side.

Two [chunk, V] blocks; the student's becomes its own gradient in place. One program a row: two
passes over both rows for the divergence, two for the gradient. With d = log p - log q a column
gives p (exp(-d) - 1 + d) to KL(p || q): no term is negative, and an error of the log-sum-exps
drops out to second order.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import linear, live, memory
from . import rows as row_kernels
from .logits import INF, added, finish, launch, raised, softcapped

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)


@memory.says
def linear_divergence_fwd(
    hidden,  # [N, H]
    weight,  # [V, H]
    teacher_hidden,  # [N, Ht]
    teacher_weight,  # [V, Ht]
    row_mask,  # [N] bool
    temperature,
    kind,
    softcap,  # 0: none
    teacher_softcap,
):
    """divergence, entropy, lse, teacher_lse, inner, each fp32 [N]; 0 where masked."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    kept = live.kept(hidden, vocab, lambda: row_mask)
    mine = (live.taken(x, kept) for x in (hidden, teacher_hidden, row_mask))
    hidden, teacher_hidden, row_mask = mine
    count = hidden.shape[0]
    out = torch.empty(5, count, dtype=torch.float32, device=hidden.device)
    for part in linear.chunks(count, 2 * vocab, hidden.device):
        z = linear.mm32(hidden[part], weight.t())
        t = linear.mm32(teacher_hidden[part], teacher_weight.t())
        with torch.cuda.device_of(z):
            _divergence_kernel[(z.shape[0],)](
                z, t, row_mask[part], out[:, part], count, vocab, 1 / temperature, softcap,
                teacher_softcap, KIND=kind, SOFTCAP=softcap != 0, T_SOFTCAP=teacher_softcap != 0,
                **launch(vocab, per_thread=8)
            )  # fmt: skip
        del z, t  # before the next chunk's are made
    return tuple(x.clone() if kept is None else live.spread(x, kept, rows) for x in out)


@memory.says
def linear_divergence_bwd(
    hidden,
    weight,
    teacher_hidden,
    teacher_weight,
    row_mask,
    divergence,  # [N] fp32, as are the next six
    entropy,
    lse,
    teacher_lse,
    inner,
    ddivergence,
    dentropy,
    temperature,
    kind,
    softcap,
    teacher_softcap,
    needs,  # of hidden and weight
):
    vocab = weight.shape[0]
    dead = ~row_mask | (divergence == torch.inf)
    c, e = (g.masked_fill(dead, 0) for g in (ddivergence, dentropy))
    count, alive = hidden.shape[0], (c != 0) | (e != 0)
    kept = live.kept(hidden, vocab, lambda: alive) if any(needs) else None
    hidden, teacher_hidden, divergence, lse, teacher_lse, c, e, dead, alive = (
        live.taken(x, kept)
        for x in (hidden, teacher_hidden, divergence, lse, teacher_lse, c, e, dead, alive)
    )
    if needs[1]:
        hidden = linear.clean(hidden, alive)
    grads = linear.Grads(
        hidden, weight, None, [*needs, False], temperature, 0.0, -100, row_kernels
    )  # fmt: skip
    if any(needs):
        steep = torch.full_like(divergence, 1 / temperature)
        if kind == 1:  # |p (log p - log q - KL)| <= 1 + 2 KL
            steep = steep * (1 + 2 * divergence.masked_fill(dead, 0))
        for part in linear.chunks(hidden.shape[0], 2 * vocab, hidden.device):
            z = linear.mm32(hidden[part], weight.t())
            t = linear.mm32(teacher_hidden[part], teacher_weight.t())
            ci, ei, scale = grads.scaled(c[part], e[part], steep[part])
            out = linear.beside(z, hidden.dtype)
            with torch.cuda.device_of(z):
                _divergence_grad_kernel[(z.shape[0],)](
                    z, t, lse[part], teacher_lse[part], ci, ei, out, vocab, 1 / temperature,
                    softcap, teacher_softcap, KIND=kind, SOFTCAP=softcap != 0,
                    T_SOFTCAP=teacher_softcap != 0, **launch(vocab, per_thread=8)
                )  # fmt: skip
            grads.products(part, out, scale)
            del z, t, out  # before the next chunk's are made
    dhidden, dweight, _ = grads.finish(as_input=True)
    return (live.spread(dhidden, kept, count) if needs[0] else dhidden), dweight


@triton.jit
def load_pair(
    z, t, cols, V, scale, cap, t_cap, SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr
):  # fmt: skip
    """Both rows at `cols`, -inf past the end, and the slope of the student's soft-cap."""
    a, slope = softcapped(tl.load(z + cols, mask=cols < V, other=-INF), cap, SOFTCAP)
    b, _ = softcapped(tl.load(t + cols, mask=cols < V, other=-INF), t_cap, T_SOFTCAP)
    return a * scale, b * scale, slope


@triton.jit
def column(z, t, lse, teacher_lse):
    """(log p, p, q, d): d is 0 where both are blocked."""
    gone = (z == -INF) & (t == -INF)
    d = tl.where(gone, 0.0, (z - t) - (lse - teacher_lse))
    lp = z - lse
    return lp, tl.exp(lp), tl.exp(t - teacher_lse), d


@triton.jit
def excess(x):
    """(exp(x) - 1 - x) / x^2 for |x| <= 1."""
    p = 2.0876757e-9
    p = p * x + 2.5052108e-8
    p = p * x + 2.7557319e-7
    p = p * x + 2.7557319e-6
    p = p * x + 2.4801587e-5
    p = p * x + 1.9841270e-4
    p = p * x + 1.3888889e-3
    p = p * x + 8.3333333e-3
    p = p * x + 4.1666667e-2
    p = p * x + 1.6666667e-1
    return p * x + 0.5


@triton.jit
def log_cosh(x):
    """log cosh x, to 1e-7 of its value near 0 too."""
    w, a = x * x, tl.abs(x)
    s = -9.0989649e-5
    s = s * w + 2.5658057e-4
    s = s * w - 7.3860296e-4
    s = s * w + 2.1869489e-3
    s = s * w - 6.7460317e-3
    s = s * w + 2.2222222e-2
    s = s * w - 8.3333333e-2
    s = (s * w + 0.5) * w
    return tl.where(a < 0.5, s, a - 0.69314718 + libdevice.log1p(tl.exp(-2 * a)))


@triton.jit
def term(p, q, d):
    """A column of KL(p || q); +inf where only q is blocked."""
    near = p * d * d * excess(-d)
    far = (q - p) + tl.where(p > 0, p * d, 0.0)
    return tl.where(tl.abs(d) <= 1, near, tl.where(d == INF, INF, far))


@triton.jit
def bounded(d):
    """d where it still matters to the JSD; a NaN stays."""
    return tl.where(d > 30, 30.0, tl.where(d < -30, -30.0, d))


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["mask", "out"])
def _divergence_kernel(
    z_block,  # [R, V] student
    t_block,  # [R, V] teacher
    mask,  # [R]
    out,  # [5, R] of [5, N]
    N,
    V,
    scale,
    cap,
    t_cap,
    KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    z_row, t_row = z_block + i * V, t_block + i * V
    value, entropy, inner = 0.0, 0.0, 0.0
    lse, teacher_lse = 0.0, 0.0
    if tl.load(mask + i):
        top = tl.full([], -INF, tl.float32)
        t_top = tl.full([], -INF, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        dot = tl.zeros([BLOCK], tl.float32)
        t_total = tl.zeros([BLOCK], tl.float32)
        t_dot = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, t, _ = load_pair(z_row, t_row, cols, V, scale, cap, t_cap, SOFTCAP, T_SOFTCAP)
            peak, t_peak = tl.maximum(top, tl.max(z, 0)), tl.maximum(t_top, tl.max(t, 0))
            total, dot = raised(top, peak, total, dot)
            total, dot = added(z, peak, total, dot)
            t_total, t_dot = raised(t_top, t_peak, t_total, t_dot)
            t_total, t_dot = added(t, t_peak, t_total, t_dot)
            top, t_top = peak, t_peak
        none = top < -INF
        _logp, entropy, lse = finish(top, top, tl.sum(total, 0), tl.sum(dot, 0), none)
        _t_logp, _t_entropy, teacher_lse = finish(
            t_top, t_top, tl.sum(t_total, 0), tl.sum(t_dot, 0), none
        )
        values = tl.zeros([BLOCK], tl.float32)
        inners = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, t, _ = load_pair(z_row, t_row, cols, V, scale, cap, t_cap, SOFTCAP, T_SOFTCAP)
            _lp, p, q, d = column(z, t, lse, teacher_lse)
            if KIND == JSD:
                d = bounded(d)
                lc = log_cosh(0.5 * d)
                a = 0.5 * term(p, q, d) - p * lc
                b = 0.5 * term(q, p, -d) - q * lc
                inners += a
                values += 0.5 * (a + b)
            elif KIND == REVERSE_KL:
                values += term(p, q, d)
            else:
                values += term(q, p, -d)
        value = tl.sum(values, 0)
        inner = value
        if KIND == JSD:
            inner = tl.sum(inners, 0)
    at = out + i
    size = tl.full([], 1, tl.int64) * N
    tl.store(at, value)
    tl.store(at + size, entropy)
    tl.store(at + 2 * size, lse)
    tl.store(at + 3 * size, teacher_lse)
    tl.store(at + 4 * size, inner)


@triton.jit
def raw_grad(z, t, lse, teacher_lse, c, e, KIND: tl.constexpr):
    """(p, a column's gradient but for p times the mean over the row)."""
    lp, p, q, d = column(z, t, lse, teacher_lse)
    s = -e * tl.where(lp < -1e30, 0.0, lp)
    if KIND == FORWARD_KL:  # p - q, also where they are almost equal
        g = p * s + c * tl.where(tl.abs(d) <= 1, p * (d - d * d * excess(-d)), p - q)
    elif KIND == REVERSE_KL:
        g = p * (s + c * tl.where(p > 0, d, 0.0))
    else:
        h = 0.5 * bounded(d)
        g = p * (s + 0.5 * c * (h - log_cosh(h)))
    return p, g


@triton.jit(do_not_specialize_on_alignment=["lse", "teacher_lse", "c", "e"])
def _divergence_grad_kernel(
    z_block,  # [R, V] student
    t_block,  # [R, V] teacher
    lse,  # [R], as are the next three
    teacher_lse,
    c,
    e,
    out,  # [R, V]; may be z_block
    V,
    scale,
    cap,
    t_cap,
    KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    z_row, t_row, out_row = z_block + i * V, t_block + i * V, out + i * V
    ci, ei = tl.load(c + i), tl.load(e + i)
    if (ci != 0) | (ei != 0):
        lz, lt = tl.load(lse + i), tl.load(teacher_lse + i)
        total = tl.zeros([BLOCK], tl.float32)
        dot = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, t, _ = load_pair(z_row, t_row, cols, V, scale, cap, t_cap, SOFTCAP, T_SOFTCAP)
            p, g = raw_grad(z, t, lz, lt, ci, ei, KIND)
            total += p
            dot += g
        # every warp takes part in these sums, so none still reads a row that is made in place
        mean = tl.sum(dot, 0) / tl.sum(
            total, 0
        )  # the gradient sums to 0: an error of lse drops out
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z, t, slope = load_pair(z_row, t_row, cols, V, scale, cap, t_cap, SOFTCAP, T_SOFTCAP)
            p, g = raw_grad(z, t, lz, lt, ci, ei, KIND)
            g = (g - p * mean) * slope * scale
            tl.store(out_row + cols, g.to(out.dtype.element_ty), mask=cols < V)
    else:
        zero = tl.zeros([BLOCK], out.dtype.element_ty)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(out_row + cols, zero, mask=cols < V)
