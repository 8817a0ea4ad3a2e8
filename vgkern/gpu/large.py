"""The loss at a size that people train with, against fp64 on some rows and some ids of the head.

Its own maths, in plain PyTorch: DAPO without clipping is -A p'/N, so

    dz = c (onehot - p),  c = -A r / n,   r = exp(logp - old)

of which dhidden needs a few rows of dz, and dweight a few columns of it for all rows.
"""

import math
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern.gpu.device import Phase
from vgkern.gpu.shapes import loss_inputs, loss_shapes, name_of

FEW = 48  # rows of dhidden, and ids of dweight, that are held to fp64
BLOCK = 512  # rows of fp64 logits at a time
ALLOWED = 2.0**-7  # twice a unit in the last place of bf16, in norm: docs/numerics.md has 2.7e-3


def loss(phase: Phase, backend: str) -> None:
    for name in ("large", "small H"):
        shape = loss_shapes(phase)[name]
        at = {"backend": backend, "dtype": "bf16", "shape": name_of(shape), "floor": ALLOWED}
        found: dict[str, float] = {}

        def measured(shape: tuple[int, int, int] = shape, found: dict = found) -> tuple:
            found.update(errors(phase, backend, shape))
            worst = max(found, key=lambda k: found[k])
            told = ", ".join(f"{k} {v:.1e}" for k, v in found.items())
            return found[worst], max(found.values()) <= ALLOWED, told

        phase.check("linear_policy_loss", "error_large", measured, **at)
        phase.forget()


def errors(phase: Phase, backend: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """Relative errors, in norm: of loss, dhidden, dweight."""
    x = loss_inputs(phase, shape, torch.bfloat16)
    n = shape[0]
    mask = torch.ones(x["targets"].shape, dtype=torch.bool, device=phase.device)
    mask.view(-1)[::3] = False  # rows that a large problem leaves out
    leaves = {k: x[k].detach().requires_grad_() for k in ("hidden", "weight")}
    given = {**x, **leaves, "mask": mask, "backend": backend}
    out = vgkern.linear_policy_loss(**given)
    dh, dw = torch.autograd.grad(out.loss, list(leaves.values()))
    dh = dh.reshape(n, -1)
    ids = torch.linspace(0, shape[2] - 1, FEW, device=phase.device).long().unique()
    ids = torch.cat([ids, x["targets"].reshape(-1)[1:FEW]]).unique()
    rows = torch.linspace(0, n - 1, min(FEW, n), device=phase.device).long().unique()
    want = truth(x, mask.reshape(-1), ids, rows)
    got = {"loss": out.loss.detach(), "dhidden": dh[rows], "dweight": dw[ids]}
    return {k: float((got[k].double() - v).norm() / v.norm().clamp(min=1e-300))
            for k, v in want.items()}  # fmt: skip


def truth(x: dict[str, Any], mask: Tensor, ids: Tensor, rows: Tensor) -> dict[str, Tensor]:
    h = x["hidden"].reshape(-1, x["hidden"].shape[-1])
    y, old = x["targets"].reshape(-1), x["old_logp"].reshape(-1).double()
    per_row = math.prod(x["targets"].shape) // x["advantages"].numel()
    a = x["advantages"].double().repeat_interleave(per_row)
    w = x["weight"].double()
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    dw = torch.zeros(len(ids), w.shape[1], dtype=torch.float64, device=h.device)
    dh = torch.zeros(len(h), w.shape[1], dtype=torch.float64, device=h.device)
    count = mask.sum()
    for at in range(0, len(h), BLOCK):
        part = slice(at, at + BLOCK)
        rows_, lp = h[part].double(), (h[part].double() @ w.T).log_softmax(-1)
        mine = lp.gather(1, y[part, None])[:, 0]
        r = (mine - old[part]).exp()
        total = total - (r * a[part]).where(mask[part], 0).sum() / count
        c = (-r * a[part] / count).where(mask[part], 0)
        hit = y[part, None] == ids
        dz = c[:, None] * (hit.double() - lp[:, ids].exp())
        dw += dz.T @ rows_
        few = rows[(rows >= at) & (rows < at + BLOCK)]
        if len(few):
            z = -c[few - at, None] * lp[few - at].exp()
            z.scatter_add_(1, y[few, None], c[few - at, None])
            dh[few] = z @ w
    return {"loss": total, "dhidden": dh[rows], "dweight": dw}
