"""group_advantages: samples sorted by group on the device, one program per group, fp64."""

import torch
import triton
import triton.language as tl

# the order of vgkern.objectives.ESTIMATORS
GRPO, DR_GRPO, RLOO, NONE, GRPO_VERL, REINFORCE_PP, REINFORCE_PP_BASELINE = range(7)
STD_EPS = {GRPO: 1e-4, GRPO_VERL: 1e-6}
WHITEN_EPS = 1e-8


def group_advantages_fwd(
    rewards,  # [B] fp64
    groups,  # [B] int64
    estimator,
):
    if estimator == NONE or not rewards.numel():
        return rewards.clone()
    if estimator == REINFORCE_PP:
        return whiten(rewards)
    ids, order = torch.sort(groups, stable=True)
    end = torch.searchsorted(ids, ids, right=True)  # of the group that a sample is in
    out = torch.empty(rewards.shape, dtype=rewards.dtype, device=rewards.device)
    with torch.cuda.device_of(rewards):
        _group_advantages_kernel[(rewards.numel(),)](
            rewards[order], ids, order, end, out, EPS=STD_EPS.get(estimator, 0.0),
            RLOO=estimator == RLOO, STD=estimator in STD_EPS, ALONE=estimator == GRPO_VERL,
            BLOCK=128, num_warps=4, enable_fp_fusion=True
        )  # fmt: skip
    return whiten(out) if estimator == REINFORCE_PP_BASELINE else out


def whiten(x):
    """Over the batch; exactly 0 where all of x is equal, whatever its mean rounds to."""
    x = (x - x.mean()).where(x.amin() != x.amax(), 0)
    return x / (x.square().sum() / max(x.numel() - 1, 1) + WHITEN_EPS).sqrt()


@triton.jit
def _group_advantages_kernel(
    rewards,  # [B] fp64, sorted by group, as are ids, order and end
    ids,
    order,
    end,
    out,  # [B], in the order of the caller
    EPS: tl.constexpr,
    RLOO: tl.constexpr,
    STD: tl.constexpr,
    ALONE: tl.constexpr,  # a group of one keeps its reward
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64)
    before = tl.load(ids + first - 1, mask=first > 0, other=0)
    if (first == 0) | (before != tl.load(ids + first)):  # the first sample does its whole group
        last = tl.load(end + first)
        total = tl.zeros([BLOCK], tl.float64)
        low = tl.full([BLOCK], float("inf"), tl.float64)
        high = tl.full([BLOCK], float("-inf"), tl.float64)
        for at in range(first, last, BLOCK):
            i = at + tl.arange(0, BLOCK)
            r = tl.load(rewards + i, mask=i < last, other=0.0)
            total += r
            low = tl.minimum(low, tl.where(i < last, r, float("inf")))
            high = tl.maximum(high, tl.where(i < last, r, float("-inf")))
        n = (last - first).to(tl.float64)
        mean = tl.sum(total, 0) / n
        flat = (tl.min(low, 0) == tl.max(high, 0)) & (mean == mean)  # minima drop a NaN
        by = n * 0 + 1
        if RLOO:
            by = n / (n - 1)
        if STD:
            square = tl.zeros([BLOCK], tl.float64)
            for at in range(first, last, BLOCK):
                i = at + tl.arange(0, BLOCK)
                d = tl.load(rewards + i, mask=i < last, other=0.0) - mean
                square += tl.where(i < last, d * d, 0.0)
            by = 1 / (tl.sqrt(tl.sum(square, 0) / (n - 1)) + EPS)
        for at in range(first, last, BLOCK):
            i = at + tl.arange(0, BLOCK)
            r = tl.load(rewards + i, mask=i < last, other=0.0)
            a = tl.where(flat, 0.0, (r - mean) * by)
            if ALONE:
                a = tl.where(n == 1, r, a)
            to = tl.load(order + i, mask=i < last, other=0)
            tl.store(out + to, a, mask=i < last)
