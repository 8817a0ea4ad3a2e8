"""Continuous actions and states on the cuda backend: the operators of gaussian_action, costate_scan
and linear_rollout, over csrc/gaussian_action.cu and csrc/recurrence.cu.
"""

import torch
from torch import Tensor

from vgkern.ops._backend import BackendError

MOST_STATES = 512  # of a dense Jacobian: a thread each


def gaussian_action_fwd(
    mean: Tensor,  # [N, n]
    log_std: Tensor,  # [N, n]
    seed: int,
    sequence: Tensor,  # [N] int64
    position: Tensor,  # [N] int64
) -> tuple[Tensor, Tensor]:
    action = mean.new_empty(mean.shape)
    logp = mean.new_empty(mean.shape[0], dtype=torch.float32)
    rows = (sequence.contiguous(), position.contiguous())
    torch.ops.vgkern_launch.gaussian_action(mean, log_std, seed, *rows, action, logp)
    return action, logp


def gaussian_action_bwd(
    daction: Tensor,  # [N, n]
    dlogp: Tensor,  # [N] fp32
    log_std: Tensor,  # [N, n]
    seed: int,
    sequence: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    dmean, dlog_std = log_std.new_empty(log_std.shape), log_std.new_empty(log_std.shape)
    rows = (sequence.contiguous(), position.contiguous())
    torch.ops.vgkern_launch.gaussian_action_grad(
        daction, dlogp.contiguous(), log_std, seed, *rows, dmean, dlog_std
    )
    return dmean, dlog_std


def _recurrence(
    jacobian: Tensor,  # [B, T, n, n] or [B, T, n]
    push: Tensor,  # [B, T, n]
    start: Tensor,  # [B, n]
    *,
    reverse: bool,
    out: Tensor | None,  # [B, T, n]: x before every step
    last: Tensor | None,  # [B, n]: x after the last
    done: Tensor | None = None,
    gamma: float = 1.0,
    sigma: Tensor | None = None,
    noise: tuple[int, Tensor | None, Tensor | None] = (0, None, None),
    other: Tensor | None = None,
    djacobian: Tensor | None = None,
    dsigma: Tensor | None = None,
) -> None:
    n = push.shape[2]
    if jacobian.ndim == 4 and n > MOST_STATES:
        raise BackendError(
            f"backend 'cuda': jacobian: got n = {n}; allowed: n <= {MOST_STATES} dense, any n "
            "diagonal; use backend='triton'"
        )
    seed, *rows = noise
    rows = [None if t is None else t.contiguous() for t in rows]
    torch.ops.vgkern_launch.recurrence(
        jacobian, push, start, done, gamma, reverse, sigma, seed, *rows, other, out, last,
        djacobian, dsigma
    )  # fmt: skip


def costate_scan_fwd(
    jacobian: Tensor, local_grad: Tensor, terminal: Tensor, done: Tensor | None, gamma: float
) -> Tensor:
    b, t, n = local_grad.shape
    costates = terminal.new_empty(b, t + 1, n)
    _recurrence(
        jacobian, local_grad, terminal, reverse=True, out=costates[:, 1:], last=costates[:, 0],
        done=done, gamma=gamma
    )  # fmt: skip
    return costates


def costate_scan_bwd(
    jacobian: Tensor,
    costates: Tensor,  # [B, T + 1, n]
    dcostates: Tensor,
    done: Tensor | None,
    gamma: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    mu = costates.new_empty(costates.shape)
    djacobian = jacobian.new_empty(jacobian.shape if needs[0] else (0,))
    _recurrence(
        jacobian, dcostates[:, 1:], dcostates[:, 0], reverse=False, out=mu[:, :-1], last=mu[:, -1],
        done=done, gamma=gamma, other=costates[:, 1:] if needs[0] else None,
        djacobian=djacobian if needs[0] else None
    )  # fmt: skip
    return djacobian, mu


def linear_rollout_fwd(
    jacobian: Tensor,
    drift: Tensor,  # [B, T, n], as sigma
    sigma: Tensor,
    initial: Tensor,  # [B, n]
    seed: int,
    sequence: Tensor,  # [B T] int64
    position: Tensor,
) -> Tensor:
    b, t, n = drift.shape
    states = initial.new_empty(b, t + 1, n)
    _recurrence(
        jacobian, drift, initial, reverse=False, out=states[:, :-1], last=states[:, -1],
        sigma=sigma, noise=(seed, sequence, position)
    )  # fmt: skip
    return states


def linear_rollout_bwd(
    jacobian: Tensor,
    sigma: Tensor,
    states: Tensor,  # [B, T + 1, n]
    dstates: Tensor,
    seed: int,
    sequence: Tensor,
    position: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    b, _, n = sigma.shape
    shapes = (jacobian.shape, sigma.shape, sigma.shape, (b, n))
    grads = [jacobian.new_empty(s if k else (0,)) for s, k in zip(shapes, needs, strict=True)]
    djacobian, ddrift, dsigma, dinitial = (
        g if k else None for g, k in zip(grads, needs, strict=True)
    )
    _recurrence(
        jacobian, dstates[:, :-1], dstates[:, -1], reverse=True, out=ddrift, last=dinitial,
        other=states[:, :-1] if needs[0] else None, djacobian=djacobian, dsigma=dsigma,
        noise=(seed, sequence, position)
    )  # fmt: skip
    return tuple(grads)
