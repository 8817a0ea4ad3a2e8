"""The recurrence of costate_scan and linear_rollout, in either direction of time:

    x_{t'} = added_t + gamma keep_t M_t x_t [+ sigma_t eps_t]

t' = t + 1 and M = A forward in time, t' = t - 1 and M = A^T in reverse. One program holds the fp32
state of one sequence and reads each Jacobian once; matrices wider than a tile are walked tile by
tile with the state in a scratch of its own. Diagonal Jacobians couple nothing: one program per
block of elements.
"""

import torch
import triton
import triton.language as tl

from . import noise

TILE = 64  # widest matrix that is held whole


@triton.jit
def _keep(done, b, t, xb, xt, gamma, DONE: tl.constexpr):
    """(the episode goes on after t, the factor of M x)."""
    alive = t >= 0
    if DONE:
        alive = tl.load(done + b * xb + t * xt) == 0
    return alive, tl.where(alive, gamma, 0.0)


@triton.jit
def _row(base, b, t, sb, st, sn, at, n):
    """fp32 elements `at` of row (b, t); 0 beyond n."""
    return tl.load(base + b * sb + t * st + at * sn, mask=at < n, other=0).to(tl.float32)


@triton.jit
def _eps(seed, sequence, position, row, first, BLOCK: tl.constexpr):
    s, p = tl.load(sequence + row), tl.load(position + row)
    return noise.normal(tl.full((), seed, tl.int64), s, p, first, BLOCK)


@triton.jit
def _recurrence_whole_kernel(
    jacobian, added, first, done, other, sigma, sequence, position, out, last, djacobian, dsigma,
    scratch, steps, n, gamma, seed, jb, jt, jr, jc, ab, at, an, fb, fn, xb, xt, ob, ot, on, sb, st,
    sn, wb, wt, lb, gr, gc, REVERSE: tl.constexpr, DONE: tl.constexpr, NOISE: tl.constexpr,
    OUT: tl.constexpr, LAST: tl.constexpr, OUTER: tl.constexpr, DSIGMA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK).to(tl.int64)
    inside = (i < n)[:, None] & (i < n)[None, :]
    t = tl.full((), steps - 1 if REVERSE else 0, tl.int64)
    x = _row(first, b, 0, fb, 0, fn, i, n)
    for _ in range(steps):
        alive, keep = _keep(done, b, t, xb, xt, gamma, DONE)
        row = b * steps + t
        if OUT:
            tl.store(out + b * wb + t * wt + i, x.to(out.dtype.element_ty), mask=i < n)
        if DSIGMA:
            slope = x * _eps(seed, sequence, position, row, 0, BLOCK)
            tl.store(dsigma + row * n + i, slope.to(dsigma.dtype.element_ty), mask=i < n)
        cells = jacobian + b * jb + t * jt + i[:, None] * jr + i[None, :] * jc
        some = (i < tl.where(alive, n, 0))[:, None] & (i < n)[None, :]
        m = tl.load(cells, mask=some, other=0).to(tl.float32)
        y = _row(added, b, t, ab, at, an, i, n)
        if NOISE:
            y += _row(sigma, b, t, sb, st, sn, i, n) * _eps(seed, sequence, position, row, 0, BLOCK)
        if OUTER:
            left = keep * _row(other, b, t, ob, ot, on, i, n)
            d = tl.where(alive, left[:, None] * x[None, :], 0.0)
            to = djacobian + row * n * n + i[:, None] * gr + i[None, :] * gc
            tl.store(to, d.to(djacobian.dtype.element_ty), mask=inside)
        moved = tl.sum(m * x[None, :], 1)
        x = y + tl.where(alive, keep * moved, 0.0)
        t += -1 if REVERSE else 1
    if LAST:
        tl.store(last + b * lb + i, x.to(last.dtype.element_ty), mask=i < n)


@triton.jit
def _recurrence_tiled_kernel(
    jacobian, added, first, done, other, sigma, sequence, position, out, last, djacobian, dsigma,
    scratch, steps, n, gamma, seed, jb, jt, jr, jc, ab, at, an, fb, fn, xb, xt, ob, ot, on, sb, st,
    sn, wb, wt, lb, gr, gc, REVERSE: tl.constexpr, DONE: tl.constexpr, NOISE: tl.constexpr,
    OUT: tl.constexpr, LAST: tl.constexpr, OUTER: tl.constexpr, DSIGMA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK).to(tl.int64)
    old = scratch + b * 2 * n  # the state; the new one goes to the other half
    new = old + n
    for r0 in range(0, n, BLOCK):
        r = r0 + block
        tl.store(old + r, _row(first, b, 0, fb, 0, fn, r, n), mask=r < n)
    tl.debug_barrier()  # what one thread stored, all may load
    t = tl.full((), steps - 1 if REVERSE else 0, tl.int64)
    for _ in range(steps):
        alive, keep = _keep(done, b, t, xb, xt, gamma, DONE)
        row = b * steps + t
        for r0 in range(0, n, BLOCK):
            r = r0 + block
            mine = tl.load(old + r, mask=r < n, other=0)
            if OUT:
                tl.store(out + b * wb + t * wt + r, mine.to(out.dtype.element_ty), mask=r < n)
            if DSIGMA:
                slope = mine * _eps(seed, sequence, position, row, r0, BLOCK)
                tl.store(dsigma + row * n + r, slope.to(dsigma.dtype.element_ty), mask=r < n)
            y = _row(added, b, t, ab, at, an, r, n)
            if NOISE:
                y += _row(sigma, b, t, sb, st, sn, r, n) * _eps(
                    seed, sequence, position, row, r0, BLOCK
                )
            if OUTER:
                left = keep * _row(other, b, t, ob, ot, on, r, n)
            moved = tl.zeros([BLOCK], tl.float32)
            for c0 in range(0, n, BLOCK):
                c = c0 + block
                inside = (r < n)[:, None] & (c < n)[None, :]
                x = tl.load(old + c, mask=c < n, other=0)
                cells = jacobian + b * jb + t * jt + r[:, None] * jr + c[None, :] * jc
                some = (r < tl.where(alive, n, 0))[:, None] & (c < n)[None, :]
                m = tl.load(cells, mask=some, other=0).to(tl.float32)
                moved += tl.sum(m * x[None, :], 1)
                if OUTER:
                    d = tl.where(alive, left[:, None] * x[None, :], 0.0)
                    to = djacobian + row * n * n + r[:, None] * gr + c[None, :] * gc
                    tl.store(to, d.to(djacobian.dtype.element_ty), mask=inside)
            tl.store(new + r, y + tl.where(alive, keep * moved, 0.0), mask=r < n)
        tl.debug_barrier()
        swap = old
        old = new
        new = swap
        t += -1 if REVERSE else 1
    if LAST:
        for r0 in range(0, n, BLOCK):
            r = r0 + block
            x = tl.load(old + r, mask=r < n, other=0)
            tl.store(last + b * lb + r, x.to(last.dtype.element_ty), mask=r < n)


@triton.jit
def _recurrence_diagonal_kernel(
    jacobian, added, first, done, other, sigma, sequence, position, out, last, djacobian, dsigma,
    scratch, steps, n, gamma, seed, jb, jt, jr, jc, ab, at, an, fb, fn, xb, xt, ob, ot, on, sb, st,
    sn, wb, wt, lb, gr, gc, REVERSE: tl.constexpr, DONE: tl.constexpr, NOISE: tl.constexpr,
    OUT: tl.constexpr, LAST: tl.constexpr, OUTER: tl.constexpr, DSIGMA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i0 = tl.program_id(1).to(tl.int64) * BLOCK
    i = (i0 + tl.arange(0, BLOCK)).to(tl.int64)
    t = tl.full((), steps - 1 if REVERSE else 0, tl.int64)
    x = _row(first, b, 0, fb, 0, fn, i, n)
    for _ in range(steps):
        alive, keep = _keep(done, b, t, xb, xt, gamma, DONE)
        row = b * steps + t
        if OUT:
            tl.store(out + b * wb + t * wt + i, x.to(out.dtype.element_ty), mask=i < n)
        if DSIGMA:
            slope = x * _eps(seed, sequence, position, row, i0, BLOCK)
            tl.store(dsigma + row * n + i, slope.to(dsigma.dtype.element_ty), mask=i < n)
        m = _row(jacobian, b, t, jb, jt, jr, i, n)
        y = _row(added, b, t, ab, at, an, i, n)
        if NOISE:
            y += _row(sigma, b, t, sb, st, sn, i, n) * _eps(
                seed, sequence, position, row, i0, BLOCK
            )
        if OUTER:
            d = tl.where(alive, keep * x * _row(other, b, t, ob, ot, on, i, n), 0.0)
            tl.store(djacobian + row * n + i, d.to(djacobian.dtype.element_ty), mask=i < n)
        x = y + tl.where(alive, keep * (m * x), 0.0)
        t += -1 if REVERSE else 1
    if LAST:
        tl.store(last + b * lb + i, x.to(last.dtype.element_ty), mask=i < n)


def recurrence(
    jacobian,  # [B, T, n, n] or [B, T, n]
    added,  # [B, T, n]
    first,  # [B, n]
    *,
    reverse,
    gamma=1.0,
    done=None,  # [B, T] bool
    out=None,  # [B, T, n]: the state at the start of each step
    last=None,  # [B, n]: the state after the last step
    other=None,  # [B, T, n]: djacobian_t = gamma keep_t times the outer product of x_t and this
    djacobian=None,  # as jacobian, contiguous
    sigma=None,  # [B, T, n]
    dsigma=None,  # [B, T, n], contiguous: x_t eps_t
    noise=(0, None, None),  # seed, sequence [B * T], position [B * T]
):
    """Launches one kernel that writes whichever of the outputs are given."""
    b, steps, n = added.shape
    if b == 0:
        return
    seed, sequence, position = noise
    dense = jacobian.ndim == 4
    rows, cols = jacobian.stride()[2:] if dense else (jacobian.stride(2), 0)
    drows, dcols = n, 1
    if reverse and dense:  # A^T
        rows, cols, drows, dcols = cols, rows, dcols, drows
    scratch, warps = None, 1
    if not dense:
        kernel, block = _recurrence_diagonal_kernel, min(128, max(4, triton.next_power_of_2(n)))
    elif n <= TILE:
        kernel, block = _recurrence_whole_kernel, max(4, triton.next_power_of_2(n))
        warps = max(1, block * block // 512)
    else:
        kernel, block = _recurrence_tiled_kernel, TILE
        warps = TILE * TILE // 256  # 64-bit addresses of two matrices: 8 cells a thread
        scratch = torch.empty((b, 2, n), dtype=torch.float32, device=added.device)

    def strides(x, count):
        return x.stride() if x is not None else (0,) * count

    kernel[(b, 1 if dense else triton.cdiv(n, block))](
        jacobian, added, first, done, other, sigma, sequence, position, out, last, djacobian,
        dsigma, scratch, steps, n, gamma, seed, *jacobian.stride()[:2], rows, cols,
        *added.stride(), *first.stride(), *strides(done, 2), *strides(other, 3),
        *strides(sigma, 3), *strides(out, 3)[:2], *strides(last, 2)[:1], drows, dcols,
        REVERSE=reverse, DONE=done is not None, NOISE=sigma is not None, OUT=out is not None,
        LAST=last is not None, OUTER=djacobian is not None, DSIGMA=dsigma is not None,
        BLOCK=block, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
