"""Group-relative advantages: each reward against the other samples of its prompt.

    "grpo"     (r - mean) / (std + 1e-4), std unbiased           DeepSeekMath, eps as TRL
    "dr_grpo"  r - mean                                          arXiv 2503.20783
    "rloo"     r - mean of the others = (n r - n mean) / (n - 1)  arXiv 2402.14740
    "none"     r

Groups are ids, so they may be ragged and in any order. A zero-variance group has advantage
exactly 0, whatever its rewards round to.
"""

import torch
from torch import Tensor

from vgkern.objectives import ESTIMATORS
from vgkern.ops import _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, operators

STD_EPS = 1e-4


def group_advantages_ref(
    rewards: Tensor,  # [B]
    groups: Tensor,  # [B] int64
    estimator: str = "grpo",
) -> Tensor:
    r = rewards.double()
    if estimator == "none" or r.numel() == 0:
        return r.to(rewards.dtype)
    _, index = groups.unique(return_inverse=True)
    zeros = r.new_zeros(int(index.max()) + 1)
    n = zeros.index_add(0, index, torch.ones_like(r))
    mean = zeros.index_add(0, index, r) / n
    low = torch.full_like(zeros, torch.inf).scatter_reduce(0, index, r, "amin")
    high = torch.full_like(zeros, -torch.inf).scatter_reduce(0, index, r, "amax")
    centred = (r - mean[index]).where((low != high)[index], 0)
    if estimator == "rloo":
        centred = centred * (n / (n - 1))[index]
    elif estimator == "grpo":
        std = (zeros.index_add(0, index, centred**2) / (n - 1)).sqrt()
        centred = centred / (std + STD_EPS)[index]
    return centred.to(rewards.dtype)


def group_advantages(
    rewards: Tensor,  # [B] floating point
    groups: Tensor,  # [B] int64
    *,
    estimator: str = "grpo",
    backend: str | None = None,
) -> Tensor:
    """Advantages [B] in the dtype of `rewards`, no gradient. Statistics in fp64.

    Raises ValueError / TypeError naming the argument: unequal shapes, a wrong dtype or estimator,
    a NaN or infinite reward, and (but for "none") a group of one, which has no baseline.
    """
    rewards = _check.floating("rewards", rewards, 1)
    if estimator not in ESTIMATORS:
        raise _check.fail("estimator", estimator, ", ".join(ESTIMATORS))
    groups = _check.tensor("groups", groups)
    groups = _check.targets("groups", groups, rewards.shape)
    device = _check.same_device(rewards=rewards, groups=groups)
    rewards = rewards.detach()
    if _check.can_look(device) and rewards.numel():
        if not bool(rewards.isfinite().all()):
            at = int((~rewards.isfinite()).nonzero()[0])
            got = f"{rewards[at].item()} at {at}"
            raise _check.NonFiniteError(f"rewards: got {got}; allowed: finite numbers")
        if estimator != "none":
            ids, counts = groups.unique(return_counts=True)
            if int(counts.min()) < 2:
                one = int(ids[counts.argmin()])
                raise _check.fail("groups", f"a group of one (id {one})", "2 or more samples each")
    chosen = choose(backend, device)
    if chosen == "torch":
        return group_advantages_ref(rewards, groups, estimator)
    code = ESTIMATORS.index(estimator)
    out = operators(chosen).group_advantages_fwd(rewards.double(), groups.contiguous(), code)
    return out.to(rewards.dtype)


define(
    "group_advantages_fwd(Tensor rewards, Tensor groups, int estimator) -> Tensor",
    lambda rewards, groups, estimator: torch.empty_like(rewards),
    kernels="group_advantages",
)
