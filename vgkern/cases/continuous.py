"""Cases of continuous actions and states: Gaussian policies, costates, linear rollouts.

Jacobians have a spectral radius just below 1, as a stable closed loop has; episodes end at random;
standard deviations lie between 0.1 and 1.
"""

import math

import torch
from torch import Tensor

from vgkern.case_inputs import Inputs
from vgkern.cases._case import Case, size
from vgkern.ops.noise import Noise


def _noise(shape: tuple[int, ...], seed: int) -> Noise:
    sequence = torch.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1) + 2**33
    return Noise(seed + 2**63, sequence, torch.arange(shape[-1]))


def _system(b: int, t: int, n: int, diagonal: bool, g: torch.Generator) -> Tensor:
    if diagonal:
        return 0.9 + 0.15 * torch.randn(b, t, n, generator=g)
    return 0.9 * torch.randn(b, t, n, n, generator=g) / math.sqrt(n)


def gaussian_action(name: str, shape: tuple[int, ...], std: str = "full") -> Case:
    """std: log_std like mean ("full"), one per dimension ("shared"), or a single one ("one")."""

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        mean = 2 * torch.randn(*shape, generator=g)
        own = {"full": shape, "shared": shape[-1:], "one": ()}[std]
        log_std = -2.3 * torch.rand(own, generator=g)
        noise = _noise(shape[:-1], seed)
        return {"mean": mean.to(dtype), "log_std": log_std.to(dtype), "noise": noise}

    return Case(
        name,
        "gaussian_action",
        make,
        lambda x: 2 * 60 * x["mean"].numel(),  # Philox and Box-Muller, twice
        lambda x: 4 * size(x["mean"]) + 3 * size(x["log_std"]),
        ("mean", "log_std"),
    )


def _flops(x: Inputs) -> int:
    """Two multiply-adds per element of a Jacobian in all, and its gradient's product."""
    return 5 * x["jacobian"].numel()


def _bytes(x: Inputs) -> int:
    """Each Jacobian is read twice and its gradient written once; vectors likewise."""
    vectors = [v for k, v in x.items() if isinstance(v, Tensor) and k != "jacobian"]
    return 3 * size(x["jacobian"]) + 3 * size(*vectors)


def costate_scan(
    name: str, b: int, t: int, n: int, *, diagonal: bool = False, done: bool = False,
    gamma: float = 1.0,
) -> Case:  # fmt: skip
    def make(dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        x: Inputs = {"jacobian": _system(b, t, n, diagonal, g).to(dtype)}
        x["local_grad"] = torch.randn(b, t, n, generator=g).to(dtype)
        x["terminal"] = torch.randn(b, n, generator=g).to(dtype)
        if done:
            x["done"] = torch.rand(b, t, generator=g) < 0.2
        return {**x, "gamma": gamma}

    grads = ("jacobian", "local_grad", "terminal")
    return Case(name, "costate_scan", make, _flops, _bytes, grads)


def linear_rollout(
    name: str, b: int, t: int, n: int, *, diagonal: bool = False, sigma: str = "full"
) -> Case:
    """sigma: [B, T, n] ("full"), [n] ("shared") or a number ("number")."""

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        x: Inputs = {"jacobian": _system(b, t, n, diagonal, g).to(dtype)}
        x["drift"] = (0.3 * torch.randn(b, t, n, generator=g)).to(dtype)
        x["initial"] = torch.randn(b, n, generator=g).to(dtype)
        x["noise"] = _noise((b, t), seed)
        if sigma == "number":
            return {**x, "sigma": 0.25}
        own = (n,) if sigma == "shared" else (b, t, n)
        return {**x, "sigma": (0.1 + 0.4 * torch.rand(own, generator=g)).to(dtype)}

    grads = ("jacobian", "drift", "initial") + (("sigma",) if sigma != "number" else ())
    return Case(name, "linear_rollout", make, _flops, _bytes, grads)


CASES: tuple[Case, ...] = (
    gaussian_action("n1", (5, 1)),
    gaussian_action("n7-3d", (3, 5, 7)),
    gaussian_action("n6-shared", (33, 6), "shared"),
    gaussian_action("n33-one", (9, 33), "one"),
    gaussian_action("n130", (4, 130)),
    gaussian_action("zero-rows", (0, 3)),
    costate_scan("n1", 3, 5, 1),
    costate_scan("n4", 5, 9, 4, gamma=0.9),
    costate_scan("n33-done", 4, 7, 33, done=True, gamma=0.97),
    costate_scan("n70-done", 2, 5, 70, done=True),
    costate_scan("n130", 1, 3, 130, gamma=0.9),
    costate_scan("long", 2, 300, 3, gamma=0.99),
    costate_scan("gamma-0", 3, 5, 4, gamma=0.0),
    costate_scan("no-steps", 3, 0, 4),
    costate_scan("zero-sequences", 0, 5, 4),
    costate_scan("diagonal-n1", 3, 5, 1, diagonal=True),
    costate_scan("diagonal-n33-done", 4, 7, 33, diagonal=True, done=True, gamma=0.97),
    costate_scan("diagonal-n200", 2, 9, 200, diagonal=True, done=True),
    costate_scan("diagonal-long", 2, 300, 5, diagonal=True, gamma=0.99),
    linear_rollout("n1", 3, 5, 1),
    linear_rollout("n4-shared", 5, 9, 4, sigma="shared"),
    linear_rollout("n33", 4, 7, 33),
    linear_rollout("n70-number", 2, 5, 70, sigma="number"),
    linear_rollout("n130", 1, 3, 130),
    linear_rollout("long", 2, 300, 3),
    linear_rollout("no-steps", 3, 0, 4),
    linear_rollout("zero-sequences", 0, 5, 4),
    linear_rollout("diagonal-n33", 4, 7, 33, diagonal=True),
    linear_rollout("diagonal-n200-shared", 2, 9, 200, diagonal=True, sigma="shared"),
    linear_rollout("diagonal-long-number", 2, 300, 5, diagonal=True, sigma="number"),
)

# A small robot's policy in a vectorised simulator, and a latent state-space model.
BENCH: tuple[Case, ...] = (
    gaussian_action("65536x16", (65536, 16), "shared"),
    costate_scan("256x64x16", 256, 64, 16, done=True, gamma=0.99),
    costate_scan("32x128x64", 32, 128, 64, gamma=0.99),
    costate_scan("diagonal-256x512x64", 256, 512, 64, diagonal=True, gamma=0.99),
    linear_rollout("256x64x16", 256, 64, 16, sigma="shared"),
    linear_rollout("diagonal-256x512x64", 256, 512, 64, diagonal=True, sigma="shared"),
)
