"""linear_rollout: the recurrence forward with replayed noise; its backward pass is a costate scan
that replays the noise for dsigma."""

import torch

from .recurrence import recurrence


def linear_rollout_fwd(
    jacobian,  # [B, T, n, n] or [B, T, n]
    drift,  # [B, T, n]
    sigma,  # [B, T, n]
    initial,  # [B, n]
    seed,
    sequence,  # [B * T] int64
    position,  # [B * T] int64
):
    b, steps, n = drift.shape
    states = torch.empty((b, steps + 1, n), dtype=initial.dtype, device=initial.device)
    recurrence(
        jacobian, drift, initial, reverse=False, out=states[:, :-1], last=states[:, -1],
        sigma=sigma, noise=(seed, sequence, position),
    )  # fmt: skip
    return states


def linear_rollout_bwd(jacobian, sigma, states, dstates, seed, sequence, position, needs):
    b, _, n = sigma.shape
    shapes = (jacobian.shape, sigma.shape, sigma.shape, (b, n))
    grads = [jacobian.new_empty(s if k else (0,)) for s, k in zip(shapes, needs, strict=True)]
    djacobian, ddrift, dsigma, dinitial = (
        g if k else None for g, k in zip(grads, needs, strict=True)
    )
    recurrence(
        jacobian, dstates[:, :-1], dstates[:, -1], reverse=True, out=ddrift, last=dinitial,
        other=states[:, :-1] if needs[0] else None, djacobian=djacobian, dsigma=dsigma,
        noise=(seed, sequence, position),
    )  # fmt: skip
    return tuple(grads)
