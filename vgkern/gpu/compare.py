"""Two results of one op: how far apart, and whether that is rounding."""

import math

import torch
from torch import Tensor

F32 = torch.float32
NEAR = {F32: 2e-5, torch.bfloat16: 2e-2}  # in norm: a vendor's product may be another kernel


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> tuple[float, str]:
    """(the largest relative distance in norm, of which output); ids must be the same."""
    worst, where = 0.0, ""
    for name, a in one.items():
        a, b = a.detach(), two[name].detach()
        if not a.is_floating_point():
            far = float((a != b).any())
        else:
            same = (a == b) | (a.isnan() & b.isnan())  # infinities too
            a, b = (x.double().masked_fill(same & ~x.isfinite(), 0) for x in (a, b))
            far = float((a - b).norm() / b.norm().clamp(min=1e-30))
        far = math.inf if math.isnan(far) else far
        if far > worst:
            worst, where = far, name
    return worst, where


def verdict(worst: float, where: str, dtype: torch.dtype = F32) -> tuple:
    return worst, worst <= NEAR[dtype], where
