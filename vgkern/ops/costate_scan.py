"""Costates of a trajectory: the gradient of the return with respect to every state, by adjoint.

    lambda_T = terminal
    lambda_t = local_grad_t + gamma (1 - done_t) A_t^T lambda_{t+1}       A_t = d s_{t+1} / d s_t

A_t[i, j] = d s_{t+1,i} / d s_{t,j}; only the diagonals where the Jacobians are diagonal. The
backward pass is the recurrence run forward in time:

    mu_0 = dlambda_0        mu_{t+1} = dlambda_{t+1} + gamma (1 - done_t) A_t mu_t
    dlocal_grad = mu_{0..T-1}     dterminal = mu_T     dA_t = gamma (1 - done_t) lambda_{t+1} mu_t^T

Where done_t, nothing passes between t + 1 and t: the Jacobian there is not looked at, and its
gradient is exactly 0. The state is fp32 for every input dtype; NaN in is NaN out, down the chain.
"""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from vgkern.ops import _check, _continuous
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators


def costate_scan_ref(
    jacobian: Tensor,  # [B, T, n, n], or [B, T, n] diagonal
    local_grad: Tensor,  # [B, T, n]
    terminal: Tensor,  # [B, n]
    done: Tensor | None,  # [B, T] bool
    gamma: float,
) -> Tensor:  # [B, T + 1, n]
    up = torch.float64 if terminal.dtype == torch.float64 else torch.float32
    dense = jacobian.ndim == 4
    x = terminal.to(up)
    costates = [x]
    for t in reversed(range(jacobian.shape[1])):
        A = jacobian[:, t].to(up)
        if done is not None:  # what is beyond the end may be NaN
            x = x.masked_fill(done[:, t, None], 0)
            A = A.masked_fill(done[:, t].view(-1, *[1] * (A.ndim - 1)), 0)
        moved = (A * x[:, :, None]).sum(1) if dense else A * x
        x = local_grad[:, t].to(up) + gamma * moved
        costates.append(x)
    return torch.stack(costates[::-1], 1).to(terminal.dtype)


class CostateScanFunction(torch.autograd.Function):
    """`vgkern::costate_scan_fwd` / `_bwd` under autograd. Once differentiable."""

    @staticmethod
    def forward(
        backend: str,
        jacobian: Tensor,  # [B, T, n, n] or [B, T, n]
        local_grad: Tensor,  # [B, T, n]
        terminal: Tensor,  # [B, n]
        done: Tensor | None,  # [B, T] bool
        gamma: float,
    ) -> Tensor:
        return operators(backend).costate_scan_fwd(jacobian, local_grad, terminal, done, gamma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        backend, jacobian, _, _, done, ctx.gamma = inputs
        ctx.save_for_backward(jacobian, output, done)
        ctx.ops = operators(backend)

    @staticmethod
    @once
    def backward(ctx: Any, dcostates: Tensor) -> tuple:
        jacobian, costates, done = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:4])
        djacobian, mu = ctx.ops.costate_scan_bwd(
            jacobian, costates, dcostates, done, ctx.gamma, needs
        )
        grads = (djacobian, mu[:, :-1], mu[:, -1])
        return (None, *(g if n else None for g, n in zip(grads, needs, strict=True)), None, None)


def costate_scan(
    jacobian: Tensor,  # [B, T, n, n], or [B, T, n] diagonal; fp32|bf16|fp16|fp64
    local_grad: Tensor,  # [B, T, n] dtype of jacobian
    terminal: Tensor,  # [B, n] dtype of jacobian
    *,
    gamma: float = 1.0,  # discount per step, 0 <= gamma <= 1
    done: Tensor | None = None,  # [B, T] bool
    backend: str | None = None,
) -> Tensor:
    """Costates [B, T + 1, n] in the dtype of the inputs; differentiable in all three tensors.
    Formula: module docstring. `jacobian.expand(B, T, n, n)` of one matrix is not copied.

    Raises ValueError / TypeError naming the argument for a wrong shape, dtype, device or gamma.
    """
    jacobian, shape = _continuous.state_shape(jacobian)
    b, t, n = shape
    local_grad = _check.floating("local_grad", local_grad)
    terminal = _check.floating("terminal", terminal)
    _check.rows_like("local_grad", local_grad, shape, f"[B, T, n] = {list(shape)}, as jacobian")
    _check.rows_like("terminal", terminal, torch.Size((b, n)), f"[B, n] = {[b, n]}, as jacobian")
    _continuous.same_dtype(jacobian=jacobian, local_grad=local_grad, terminal=terminal)
    if done is not None:
        done = _check.rows_like("done", done, torch.Size((b, t)), f"[B, T] = {[b, t]}")
        if done.dtype != torch.bool:
            raise TypeError(f"done: got {_check.describe(done)}; allowed: bool")
    device = _check.same_device(
        jacobian=jacobian, local_grad=local_grad, terminal=terminal, done=done
    )
    gamma = _check.number(gamma)
    traced = isinstance(gamma, Tensor) and gamma.ndim == 0  # nobody can look
    real = isinstance(gamma, Real) and not isinstance(gamma, bool)
    if not traced and not (real and 0 <= gamma <= 1):
        raise _check.fail("gamma", gamma, "a number, 0 <= gamma <= 1")
    chosen = choose(backend, device, jacobian.dtype)
    gamma = gamma if torch.compiler.is_compiling() else float(gamma)
    args = (jacobian, local_grad, terminal, done, gamma)
    return (
        costate_scan_ref(*args) if chosen == "torch" else CostateScanFunction.apply(chosen, *args)
    )


def _fake_fwd(jacobian, local_grad, terminal, *rest):  # type: ignore[no-untyped-def]
    b, t, n = local_grad.shape
    return terminal.new_empty((b, t + 1, n))


def _fake_bwd(jacobian, costates, dcostates, done, gamma, needs):  # type: ignore[no-untyped-def]
    djacobian = jacobian.new_empty(jacobian.shape if needs[0] else (0,))
    return djacobian, costates.new_empty(costates.shape)


define(
    "costate_scan_fwd(Tensor jacobian, Tensor local_grad, Tensor terminal, Tensor? done, "
    "float gamma) -> Tensor",
    _fake_fwd,
    kernels="costate_scan",
)
define(
    "costate_scan_bwd(Tensor jacobian, Tensor costates, Tensor dcostates, Tensor? done, "
    "float gamma, bool[] needs) -> (Tensor, Tensor)",
    _fake_bwd,
    kernels="costate_scan",
)
