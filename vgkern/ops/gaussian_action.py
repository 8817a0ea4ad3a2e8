"""A continuous action of a Gaussian policy and its log-density, with both gradient estimators.

    sigma = exp(log_std)        action = mean + sigma eps        eps = Noise.normal, replayed
    logp = sum_j [-eps_j^2 / 2 - log_std_j - log(2 pi) / 2]      density of the action held fixed
    dmean = daction + dlogp eps / sigma                          pathwise + score
    dlog_std = daction sigma eps + dlogp (eps^2 - 1)

`action` carries the pathwise estimator, `logp` the score: give each the part of the objective that
it is to be differentiated through, and no part to both with weight 1. eps is keyed by (seed,
sequence, position, dimension), never stored. logp is of the action before it is rounded to the
dtype of `mean`. Formulas ours.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgkern.ops import _check, _continuous
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators
from vgkern.ops.noise import Noise


class GaussianAction(NamedTuple):
    """action [..., n] in the dtype of `mean`; logp [...] in nats, fp32 (fp64 for fp64 input)."""

    action: Tensor
    logp: Tensor


def gaussian_action_ref(
    mean: Tensor,  # [..., n]
    log_std: Tensor,  # [..., n]
    noise: Noise,  # rows [...]
) -> GaussianAction:
    up = torch.float64 if mean.dtype == torch.float64 else torch.float32
    mu, log_sigma = mean.to(up), log_std.to(up)
    sigma, eps = log_sigma.exp(), noise.normal(mean.shape[-1], up)
    fixed = sigma.detach() * eps + (mu.detach() - mu)  # action - mean, action held fixed
    logp = -(0.5 * (fixed / sigma) ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)).sum(-1)
    return GaussianAction((mu + sigma * eps).to(mean.dtype), logp)


class GaussianActionFunction(torch.autograd.Function):
    """`vgkern::gaussian_action_fwd` / `_bwd` under autograd. Once differentiable."""

    @staticmethod
    def forward(
        backend: str,
        mean: Tensor,  # [N, n]
        log_std: Tensor,  # [N, n]
        seed: int,
        sequence: Tensor,  # [N] int64
        position: Tensor,  # [N] int64
    ) -> tuple:
        return operators(backend).gaussian_action_fwd(mean, log_std, seed, sequence, position)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        backend, mean, log_std, ctx.seed, sequence, position = inputs
        ctx.save_for_backward(mean, log_std, sequence, position)  # mean for `once` to see
        ctx.ops = operators(backend)

    @staticmethod
    @once
    def backward(ctx: Any, daction: Tensor, dlogp: Tensor) -> tuple:
        _, log_std, sequence, position = ctx.saved_tensors
        dmean, dlog_std = ctx.ops.gaussian_action_bwd(
            daction, dlogp, log_std, ctx.seed, sequence, position
        )
        return None, dmean, dlog_std, None, None, None


def gaussian_action(
    mean: Tensor,  # [..., n] fp32|bf16|fp16|fp64
    log_std: Tensor,  # broadcasts to mean, its dtype
    noise: Noise,
    *,
    backend: str | None = None,
) -> GaussianAction:
    """The action that `noise` draws and its log-density; both differentiable. Formula: module
    docstring. `noise` has one address per row of `mean`.

    Raises ValueError / TypeError naming the argument for a wrong shape, dtype or device, and on CPU
    NonFiniteError for a NaN mean or a log_std that is not finite.
    """
    mean, log_std = _check.floating("mean", mean), _check.floating("log_std", log_std)
    if mean.ndim == 0 or mean.shape[-1] == 0:
        raise _check.fail("mean", mean, "[..., n] with n >= 1")
    _continuous.same_dtype(mean=mean, log_std=log_std)
    device = _check.same_device(mean=mean, log_std=log_std)
    _continuous.values("mean", mean, lambda x: ~x.isnan(), "no NaN")
    _continuous.values("log_std", log_std, torch.isfinite, "finite numbers")
    log_std = _continuous.expanded("log_std", log_std, mean.shape, "mean")
    flat, n = mean.shape[:-1], mean.shape[-1]
    seed, *rows = _continuous.seed_and_rows(noise, flat, device)
    chosen = choose(backend, device, mean.dtype)
    if chosen == "torch":
        at = Noise(noise.seed, *(x.view(flat) for x in rows))
        return gaussian_action_ref(mean, log_std, at)
    action, logp = GaussianActionFunction.apply(
        chosen, mean.reshape(-1, n), log_std.reshape(-1, n), seed, *rows
    )
    return GaussianAction(action.view(mean.shape), logp.view(flat))


def _fake_fwd(mean, *rest):  # type: ignore[no-untyped-def]
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape[:1], dtype=torch.float32)


def _fake_bwd(daction, dlogp, log_std, *rest):  # type: ignore[no-untyped-def]
    return log_std.new_empty(log_std.shape), log_std.new_empty(log_std.shape)


_NOISE = "int seed, Tensor sequence, Tensor position"
define(
    f"gaussian_action_fwd(Tensor mean, Tensor log_std, {_NOISE}) -> (Tensor, Tensor)",
    _fake_fwd,
    kernels="gaussian_action",
)
define(
    f"gaussian_action_bwd(Tensor daction, Tensor dlogp, Tensor log_std, {_NOISE}) "
    "-> (Tensor, Tensor)",
    _fake_bwd,
    kernels="gaussian_action",
)
