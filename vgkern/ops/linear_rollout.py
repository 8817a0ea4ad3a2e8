"""A linear (or linearised) system run forward with replayed Gaussian noise.

    s_0 = initial        s_{t+1} = A_t s_t + drift_t + sigma_t eps_t        eps_t = Noise.normal

The backward pass is `costate_scan` of the same Jacobians with local gradients dstates:

    lambda_T = dstates_T          lambda_t = dstates_t + A_t^T lambda_{t+1}
    dinitial = lambda_0    ddrift_t = lambda_{t+1}    dsigma_t = lambda_{t+1} eps_t
    dA_t = lambda_{t+1} s_t^T     (diagonal Jacobians: elementwise)

eps is keyed by (seed, sequence, position, dimension): one address per (b, t), replayed in the
backward pass, never stored. The state is fp32 for every input dtype.
"""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from vgkern.ops import _check, _continuous
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators
from vgkern.ops.noise import Noise


def linear_rollout_ref(
    jacobian: Tensor,  # [B, T, n, n], or [B, T, n] diagonal
    drift: Tensor,  # [B, T, n]
    sigma: Tensor,  # [B, T, n]
    initial: Tensor,  # [B, n]
    noise: Noise,  # rows [B, T]
) -> Tensor:  # [B, T + 1, n]
    up = torch.float64 if initial.dtype == torch.float64 else torch.float32
    s = initial.to(up)
    pushes = drift.to(up) + sigma.to(up) * noise.normal(s.shape[1], up)
    states = [s]
    for t in range(jacobian.shape[1]):
        A = jacobian[:, t].to(up)
        s = ((A * s[:, None, :]).sum(2) if A.ndim == 3 else A * s) + pushes[:, t]
        states.append(s)
    return torch.stack(states, 1).to(initial.dtype)


class LinearRolloutFunction(torch.autograd.Function):
    """`vgkern::linear_rollout_fwd` / `_bwd` under autograd. Once differentiable."""

    @staticmethod
    def forward(
        backend: str,
        jacobian: Tensor,  # [B, T, n, n] or [B, T, n]
        drift: Tensor,  # [B, T, n]
        sigma: Tensor,  # [B, T, n]
        initial: Tensor,  # [B, n]
        seed: int,
        sequence: Tensor,  # [B * T] int64
        position: Tensor,  # [B * T] int64
    ) -> Tensor:
        noise = (seed, sequence, position)
        return operators(backend).linear_rollout_fwd(jacobian, drift, sigma, initial, *noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        backend, jacobian, _, sigma, _, ctx.seed, *rows = inputs
        ctx.save_for_backward(jacobian, sigma, output, *rows)
        ctx.ops = operators(backend)

    @staticmethod
    @once
    def backward(ctx: Any, dstates: Tensor) -> tuple:
        jacobian, sigma, states, *rows = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:5])
        grads = ctx.ops.linear_rollout_bwd(jacobian, sigma, states, dstates, ctx.seed, *rows, needs)
        return (None, *(g if n else None for g, n in zip(grads, needs, strict=True)), *[None] * 3)


def linear_rollout(
    jacobian: Tensor,  # [B, T, n, n], or [B, T, n] diagonal; fp32|bf16|fp16|fp64
    drift: Tensor,  # broadcasts to [B, T, n], dtype of jacobian
    sigma: float | Tensor,  # >= 0; broadcasts to [B, T, n], dtype of jacobian
    initial: Tensor,  # [B, n] dtype of jacobian
    noise: Noise,
    *,
    backend: str | None = None,
) -> Tensor:
    """States [B, T + 1, n] in the dtype of the inputs; differentiable in every tensor. Formula:
    module docstring. `noise` has one address per (b, t).

    Raises ValueError / TypeError naming the argument for a wrong shape, dtype or device, and on CPU
    for a sigma that is negative or not finite.
    """
    jacobian, shape = _continuous.state_shape(jacobian)
    b, _, n = shape
    if not isinstance(sigma, Tensor):
        if isinstance(sigma, bool) or not isinstance(sigma, Real) or not 0 <= sigma < float("inf"):
            raise _check.fail("sigma", sigma, "finite numbers >= 0")
        sigma = jacobian.new_full((), sigma)
    drift, sigma = _check.floating("drift", drift), _check.floating("sigma", sigma)
    initial = _check.floating("initial", initial)
    _check.rows_like("initial", initial, torch.Size((b, n)), f"[B, n] = {[b, n]}, as jacobian")
    _continuous.same_dtype(jacobian=jacobian, drift=drift, sigma=sigma, initial=initial)
    device = _check.same_device(jacobian=jacobian, drift=drift, sigma=sigma, initial=initial)
    fine = "finite numbers >= 0"
    _continuous.values("sigma", sigma, lambda x: (x >= 0) & x.isfinite(), fine)
    drift = _continuous.expanded("drift", drift, shape, "[B, T, n]")
    sigma = _continuous.expanded("sigma", sigma, shape, "[B, T, n]")
    seed, *rows = _continuous.seed_and_rows(noise, shape[:2], device)
    chosen = choose(backend, device, jacobian.dtype)
    tensors = (jacobian, drift, sigma, initial)
    if chosen == "torch":
        at = Noise(noise.seed, *(x.view(shape[:2]) for x in rows))
        return linear_rollout_ref(*tensors, at)
    return LinearRolloutFunction.apply(chosen, *tensors, seed, *rows)


def _fake_fwd(jacobian, drift, sigma, initial, *rest):  # type: ignore[no-untyped-def]
    b, t, n = drift.shape
    return initial.new_empty((b, t + 1, n))


def _fake_bwd(jacobian, sigma, states, *rest):  # type: ignore[no-untyped-def]
    shapes = (jacobian.shape, sigma.shape, sigma.shape, (sigma.shape[0], sigma.shape[2]))
    needs = zip(shapes, rest[-1], strict=True)
    return tuple(jacobian.new_empty(s if need else (0,)) for s, need in needs)


_NOISE = "int seed, Tensor sequence, Tensor position"
define(
    "linear_rollout_fwd(Tensor jacobian, Tensor drift, Tensor sigma, Tensor initial, "
    f"{_NOISE}) -> Tensor",
    _fake_fwd,
    kernels="linear_rollout",
)
define(
    "linear_rollout_bwd(Tensor jacobian, Tensor sigma, Tensor states, Tensor dstates, "
    f"{_NOISE}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    kernels="linear_rollout",
)
