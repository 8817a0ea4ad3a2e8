"""Group-relative advantages: each reward against the other samples of its prompt.

    "grpo"       (r - mean) / (std + 1e-4), std unbiased          DeepSeekMath, eps as TRL
    "grpo_verl"  the same with 1e-6; a group of one keeps its r   verl
    "dr_grpo"    r - mean                                         arXiv 2503.20783
    "rloo"       r - mean of the others = n (r - mean) / (n - 1)  arXiv 2402.14740
    "reinforce_pp"           whiten(r) over the batch             arXiv 2501.03262
    "reinforce_pp_baseline"  whiten(r - mean) over the batch      the same, verl
    "none"       r

whiten(x) = (x - mean) / sqrt(var + 1e-8), var unbiased, over all B of the call: pass the whole
batch, not a micro-batch. Groups are ids, so they may be ragged and in any order. A zero-variance
group (or batch, where it is whitened) has advantage exactly 0, whatever its rewards round to.
"""

import math

import torch
from torch import Tensor

from vgkern.objectives import ESTIMATORS
from vgkern.ops import _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, operators

STD_EPS = {"grpo": 1e-4, "grpo_verl": 1e-6}
WHITEN_EPS = 1e-8


def group_advantages_ref(
    rewards: Tensor,  # [B]
    groups: Tensor,  # [B] int64
    estimator: str = "grpo",
) -> Tensor:
    r = rewards.double()
    if estimator == "none" or r.numel() == 0:
        return r.to(rewards.dtype)
    if estimator == "reinforce_pp":
        return _whiten(r).to(rewards.dtype)
    _, index = groups.unique(return_inverse=True)
    zeros = r.new_zeros(int(index.max()) + 1)
    n = zeros.index_add(0, index, torch.ones_like(r))
    mean = zeros.index_add(0, index, r) / n
    low = torch.full_like(zeros, torch.inf).scatter_reduce(0, index, r, "amin")
    high = torch.full_like(zeros, -torch.inf).scatter_reduce(0, index, r, "amax")
    centred = (r - mean[index]).where((low != high)[index], 0)
    if estimator == "reinforce_pp_baseline":
        centred = _whiten(centred)
    elif estimator == "rloo":
        centred = centred * (n / (n - 1))[index]
    elif estimator in STD_EPS:
        std = (zeros.index_add(0, index, centred**2) / (n - 1)).sqrt()
        centred = centred / (std + STD_EPS[estimator])[index]
        if estimator == "grpo_verl":
            centred = torch.where((n == 1)[index], r, centred)
    return centred.to(rewards.dtype)


def _whiten(x: Tensor) -> Tensor:
    """Over the batch; exactly 0 where all of x is equal, whatever its mean rounds to."""
    n = max(x.numel(), 2)  # one sample: all equal
    x = (x - x.mean()).where(x.amin() != x.amax(), 0)
    return x / (x.square().sum() / (n - 1) + WHITEN_EPS).sqrt()


def group_advantages(
    rewards: Tensor,  # [B] floating point
    groups: Tensor,  # [B] int64
    *,
    estimator: str = "grpo",
    backend: str | None = None,
) -> Tensor:
    """Advantages [B] in the dtype of `rewards`, no gradient. Statistics in fp64.

    Raises ValueError / TypeError naming the argument: unequal shapes, a wrong dtype or estimator,
    a NaN or infinite reward, and a group of one (with "reinforce_pp": a batch of one), which has no
    baseline, but for "none" and "grpo_verl".
    """
    rewards = _check.floating("rewards", rewards, 1)
    if estimator not in ESTIMATORS:
        raise _check.fail("estimator", estimator, ", ".join(ESTIMATORS))
    groups = _check.tensor("groups", groups)
    groups = _check.targets("groups", groups, rewards.shape)
    device = _check.same_device(rewards=rewards, groups=groups)
    rewards = rewards.detach()
    looks = _check.can_look(device) and bool(rewards.numel())
    if looks and estimator == "reinforce_pp" and rewards.numel() == 1:
        raise _check.fail("rewards", rewards, "2 or more samples to whiten")
    chosen = choose(backend, device)
    if looks and chosen != "cpu":
        _look(rewards, groups, estimator)
    if chosen == "torch":
        return group_advantages_ref(rewards, groups, estimator)
    code = ESTIMATORS.index(estimator)
    out = operators(chosen).group_advantages_fwd(rewards.double(), groups.contiguous(), code)
    if looks and chosen == "cpu" and math.isnan(out[0]):  # one NaN: all are
        _look(rewards, groups, estimator)
    return out.to(rewards.dtype)


def _look(rewards: Tensor, groups: Tensor, estimator: str) -> None:
    """Raises what is wrong with the values."""
    if not bool(rewards.isfinite().all()):
        at = int((~rewards.isfinite()).nonzero()[0])
        got = f"{rewards[at].item()} at {at}"
        raise _check.NonFiniteError(f"rewards: got {got}; allowed: finite numbers")
    if estimator not in ("none", "grpo_verl", "reinforce_pp"):
        ids, counts = groups.unique(return_counts=True)
        if int(counts.min()) < 2:
            one = int(ids[counts.argmin()])
            allowed = f"2 or more samples each, whose mean is the baseline of {estimator!r}; leave"
            allowed += " a sample out whose group has no other, or estimator='grpo_verl'"
            raise _check.fail("groups", f"a group of one (id {one})", allowed)


define(
    "group_advantages_fwd(Tensor rewards, Tensor groups, int estimator) -> Tensor",
    lambda rewards, groups, estimator: torch.empty_like(rewards),
    kernels="group_advantages",
)
