"""costate_scan: the recurrence in reverse with A^T; its backward pass runs forward with A."""

import torch

from .recurrence import recurrence


def costate_scan_fwd(
    jacobian,  # [B, T, n, n] or [B, T, n]
    local_grad,  # [B, T, n]
    terminal,  # [B, n]
    done,  # [B, T] bool, or None
    gamma,
):
    b, steps, n = local_grad.shape
    costates = torch.empty((b, steps + 1, n), dtype=terminal.dtype, device=terminal.device)
    recurrence(
        jacobian, local_grad, terminal, reverse=True, gamma=gamma, done=done,
        out=costates[:, 1:], last=costates[:, 0],
    )  # fmt: skip
    return costates


def costate_scan_bwd(jacobian, costates, dcostates, done, gamma, needs):
    mu = torch.empty(costates.shape, dtype=costates.dtype, device=costates.device)
    djacobian = jacobian.new_empty(jacobian.shape if needs[0] else (0,))
    recurrence(
        jacobian, dcostates[:, 1:], dcostates[:, 0], reverse=False, gamma=gamma, done=done,
        out=mu[:, :-1], last=mu[:, -1],
        other=costates[:, 1:] if needs[0] else None, djacobian=djacobian if needs[0] else None,
    )  # fmt: skip
    return djacobian, mu
