"""Is there a value gradient to follow? Its squared norm without bias, and the reachable reward.

For G rollouts of one prompt with rewards r_i and score costates u_i = d(sum_t log pi_t)/dx, x being
any function of the prompt alone (the residual stream at prompt positions):

    b_ij = mean of r_k over k != i, j
    S2   = mean over i != j of (r_i - b_ij) (r_j - b_ij) <u_i, u_j>       E[S2] = |grad_x V|^2
    SNR  = S2 / mean_i |lambda_i|^2,   lambda_i = (r_i - mean of r_k over k != i) u_i

E[u_i] = 0, and b_ij knows neither i nor j, so each term is unbiased: a U-statistic, which needs the
G x G Gram matrix of the u_i and nothing else. |mean_i lambda_i|^2 is too large by about the
variance over G.

    headroom(k) = E[max of k rewards] - E[reward],  by order statistics, unbiased

Formulas ours. S2 is not compared between layers or checkpoints: its unit is that of x, and it spans
decades. What SNR and headroom are worth as predictors: docs/impact.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vgkern.ops import _check

LEAST = 4  # b_ij of fewer is one reward or none


class Signal(NamedTuple):
    """Per group, fp64 [...]: S2, and power = mean_i |lambda_i|^2. Average either over groups, then
    divide: `snr`. S2 of a group may be negative; it is unbiased, not a norm."""

    s2: Tensor
    power: Tensor


def value_gradient_signal(
    gram: Tensor,  # [..., G, G]: <u_i, u_j> within each group
    rewards: Tensor,  # [..., G]
) -> Signal:
    """Formula: module docstring. Computed in fp64.

    Raises ValueError / TypeError naming the argument for shapes that do not match or G < 4.
    """
    gram, rewards = _check.floating("gram", gram), _check.floating("rewards", rewards)
    count = rewards.shape[-1] if rewards.ndim else 0
    if count < LEAST:
        allowed = f"[..., G] with G >= {LEAST}: each pair needs two other rewards as its baseline"
        raise _check.fail("rewards", rewards, allowed)
    _check.rows_like("gram", gram, torch.Size((*rewards.shape, count)), "[..., G, G], as rewards")
    k, r = gram.double(), rewards.double()
    total = r.sum(-1, keepdim=True)
    baseline = (total[..., None] - r[..., :, None] - r[..., None, :]) / (count - 2)
    pairs = (r[..., :, None] - baseline) * (r[..., None, :] - baseline) * k
    own = torch.eye(count, dtype=torch.bool, device=k.device)
    s2 = pairs.masked_fill(own, 0).sum((-1, -2)) / (count * (count - 1))
    others = (total - r) / (count - 1)
    power = ((r - others).square() * k.diagonal(dim1=-2, dim2=-1)).mean(-1)
    return Signal(s2, power)


def headroom(rewards: Tensor, k: int) -> Tensor:
    """E[max of k] - E[reward] of rewards [..., G], per group fp64 [...]; unbiased for k <= G.

    The maximum of k out of G is the i-th smallest in C(i - 1, k - 1) of C(G, k) subsets.
    Raises ValueError / TypeError naming the argument for k outside 1..G.
    """
    rewards = _check.floating("rewards", rewards)
    count = rewards.shape[-1] if rewards.ndim else 0
    if not isinstance(k, int) or not 1 <= k <= count:
        raise _check.fail("k", k, f"1 <= k <= {count}, the rewards of a group")
    ways = [math.comb(i, k - 1) / math.comb(count, k) for i in range(count)]
    ordered = rewards.double().sort(-1).values
    best = ordered @ torch.tensor(ways, dtype=torch.float64, device=rewards.device)
    return best - ordered.mean(-1)


class CostateGram:
    """An `each` of `vgkern.costate.probe`: Gram matrices of groups, layer by layer.

    where: bool [B, T], the positions that count (the prompt's: they must not depend on the
        sample). Rows g * G .. g * G + G - 1 of B are group g.
    `layers[l]` is fp32 [B / G, G, G] when the backward pass has gone by; [T, H] is not kept.
    """

    def __init__(self, where: Tensor, group: int) -> None:
        where = _check.tensor("where", where, "bool [B, T]")
        if where.dtype != torch.bool or where.ndim != 2:
            raise _check.fail("where", where, "bool [B, T]")
        if group < LEAST or len(where) % group:
            allowed = f"G >= {LEAST} that divides B = {len(where)}"
            raise _check.fail("group", group, allowed)
        self.where, self.group = where, group
        self.layers: dict[int, Tensor] = {}

    def __call__(self, layer: int, costate: Tensor) -> None:
        """costate [B, T, H]."""
        _check.rows_like("where", self.where, costate.shape[:2])
        used = int(self.where.any(0).nonzero()[-1]) + 1 if bool(self.where.any()) else 0
        u = costate[:, :used].float().masked_fill(~self.where[:, :used, None], 0)
        u = u.reshape(-1, self.group, u[0].numel())
        self.layers[layer] = u @ u.mT


class Estimate(NamedTuple):
    """A value and its standard error over groups (NaN from one group)."""

    value: float
    error: float


def over_groups(statistic: Callable[..., Tensor], *groups: Tensor) -> Estimate:
    """statistic(mean of each argument) of per-group numbers [P], with its jackknife error.

    For a plain mean that error is the usual standard error.
    """
    means = [x.double().mean() for x in groups]
    value = float(statistic(*means))
    count = len(groups[0])
    if count < 2:
        return Estimate(value, math.nan)
    without = [(m * count - x.double()) / (count - 1) for m, x in zip(means, groups, strict=True)]
    left = statistic(*without)
    spread = (left - left.mean()).square().sum() * (count - 1) / count
    return Estimate(value, float(spread.sqrt()))
