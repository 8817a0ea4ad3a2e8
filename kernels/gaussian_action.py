"""gaussian_action: a block of rows per program; the noise is made in registers, twice.

A row's noise comes four elements to a counter: each program makes [ROWS, BLOCK / 4] quads.
"""

import torch
import triton
import triton.language as tl

from . import noise


@triton.jit
def _normal_rows(seed, sequence, position, first, BLOCK: tl.constexpr):
    """Noise.normal of elements first .. first + BLOCK - 1 of rows [R]; fp32 [R, BLOCK]."""
    quad = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)[None, :] | noise.NORMAL
    zero = (position.to(tl.uint32) * 0)[:, None] + quad * 0
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + (seed >> 32).to(tl.uint32)
    c1 = zero + position.to(tl.uint32)[:, None]
    c2 = zero + sequence.to(tl.uint32)[:, None]
    c3 = zero + (sequence >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox_impl(zero + quad, c1, c2, c3, k0, k1)
    e0, o0 = noise.pair(noise.uniform(w0), noise.uniform(w1))
    e2, o2 = noise.pair(noise.uniform(w2), noise.uniform(w3))
    return tl.reshape(tl.join(tl.join(e0, e2), tl.join(o0, o2)), [position.shape[0], BLOCK])


@triton.jit
def _gaussian_action_fwd_kernel(
    mean, log_std, sequence, position, action, logp, rows, n, seed, mr, mc, sr, sc,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    seq = tl.load(sequence + row, mask=live, other=0)
    pos = tl.load(position + row, mask=live, other=0)
    total = tl.zeros([ROWS], tl.float32)
    for c0 in range(0, n, BLOCK):
        c = c0 + tl.arange(0, BLOCK).to(tl.int64)
        inside = live[:, None] & (c < n)[None, :]
        eps = _normal_rows(tl.full((), seed, tl.int64), seq, pos, c0, BLOCK)
        ls = tl.load(log_std + row[:, None] * sr + c[None, :] * sc, mask=inside, other=0)
        mu = tl.load(mean + row[:, None] * mr + c[None, :] * mc, mask=inside, other=0)
        ls = ls.to(tl.float32)
        a = mu.to(tl.float32) + tl.exp(ls) * eps
        to = action + row[:, None] * n + c[None, :]
        tl.store(to, a.to(action.dtype.element_ty), mask=inside)
        density = 0.5 * eps * eps + ls + 0.9189385332046727
        total -= tl.sum(tl.where(inside, density, 0.0), 1)
    tl.store(logp + row, total, mask=live)


@triton.jit
def _gaussian_action_bwd_kernel(
    daction, dlogp, log_std, sequence, position, dmean, dlog_std, rows, n, seed, ar, ac, pr, sr, sc,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    seq = tl.load(sequence + row, mask=live, other=0)
    pos = tl.load(position + row, mask=live, other=0)
    score = tl.load(dlogp + row * pr, mask=live, other=0)[:, None]
    for c0 in range(0, n, BLOCK):
        c = c0 + tl.arange(0, BLOCK).to(tl.int64)
        inside = live[:, None] & (c < n)[None, :]
        eps = _normal_rows(tl.full((), seed, tl.int64), seq, pos, c0, BLOCK)
        ls = tl.load(log_std + row[:, None] * sr + c[None, :] * sc, mask=inside, other=0)
        up = tl.load(daction + row[:, None] * ar + c[None, :] * ac, mask=inside, other=0)
        sigma, up = tl.exp(ls.to(tl.float32)), up.to(tl.float32)
        to = row[:, None] * n + c[None, :]
        dm = up + score * eps / sigma
        tl.store(dmean + to, dm.to(dmean.dtype.element_ty), mask=inside)
        dl = up * sigma * eps + score * (eps * eps - 1)
        tl.store(dlog_std + to, dl.to(dlog_std.dtype.element_ty), mask=inside)


def _blocks(n):
    block = min(128, max(4, triton.next_power_of_2(n)))
    return {"ROWS": 512 // block, "BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}


def gaussian_action_fwd(
    mean,  # [N, n]
    log_std,  # [N, n]
    seed,
    sequence,  # [N] int64
    position,  # [N] int64
):
    rows, n = mean.shape
    action = torch.empty((rows, n), dtype=mean.dtype, device=mean.device)
    logp = torch.empty((rows,), dtype=torch.float32, device=mean.device)
    if rows:
        k = _blocks(n)
        _gaussian_action_fwd_kernel[(triton.cdiv(rows, k["ROWS"]),)](
            mean, log_std, sequence, position, action, logp, rows, n, seed, *mean.stride(),
            *log_std.stride(), **k,
        )  # fmt: skip
    return action, logp


def gaussian_action_bwd(daction, dlogp, log_std, seed, sequence, position):
    rows, n = log_std.shape
    dmean = torch.empty((rows, n), dtype=log_std.dtype, device=log_std.device)
    dlog_std = torch.empty_like(dmean)
    if rows:
        k = _blocks(n)
        _gaussian_action_bwd_kernel[(triton.cdiv(rows, k["ROWS"]),)](
            daction, dlogp, log_std, sequence, position, dmean, dlog_std, rows, n, seed,
            *daction.stride(), *dlogp.stride(), *log_std.stride(), **k,
        )  # fmt: skip
    return dmean, dlog_std
