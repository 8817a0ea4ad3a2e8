"""Variance of the score estimator over that of the pathwise one, linear-quadratic control, fp64.

    python benchmarks/linear_quadratic.py --rollouts 40000

Gradient of the gain, each cell with its own noise. Three baselines of the score: the exact value
(unknown outside of this problem), the mean of the others at the same step, the mean of the others
over the whole return. Beside them the largest |z| of both estimators against the exact gradient.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("lq", ROOT / "examples" / "linear_quadratic.py")
assert spec and spec.loader
lq = importlib.util.module_from_spec(spec)
sys.modules["lq"] = lq
spec.loader.exec_module(lq)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--rollouts", type=int, default=40_000)
    p.add_argument("--horizons", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    p.add_argument("--sigmas", type=float, nargs="+", default=[0.03, 0.1, 0.3, 1.0])
    p.add_argument("--seed", type=int, default=0, help="of the system: 3 states, 2 actions")
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    system, K = lq.random_system(3, 2, a.seed)
    start = torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64)
    began, least, cells = time.perf_counter(), float("inf"), len(a.horizons) * len(a.sigmas)
    worst = {"pathwise": 0.0, "score": 0.0}
    print(f"score / pathwise variance: {' | '.join(lq.BASELINES)}; N = {a.rollouts}")
    print("| T |" + "".join(f" sigma = {s:g} |" for s in a.sigmas))
    print("|---" * (len(a.sigmas) + 1) + "|")
    for i, steps in enumerate(a.horizons):
        row = []
        for j, sigma in enumerate(a.sigmas):
            seed = 1000 * steps + j
            truth = exact(system, K, sigma, start, steps)
            path, *scores = estimates(system, K, sigma, start, steps, seed, a.rollouts)
            ratios = [float(x.var(0).sum() / path.var(0).sum()) for x in scores]
            for name, each in (("pathwise", path), *(("score", x) for x in scores)):
                z = (each.mean(0) - truth) / (each.std(0) / len(each) ** 0.5)
                worst[name] = max(worst[name], float(z.abs().max()))
            least = min(least, *ratios)
            row.append(" / ".join(f"{r:.3g}" for r in ratios))
            lq.show(began, i * len(a.sigmas) + j + 1, cells, "cells")
        print(f"| {steps} | " + " | ".join(row) + " |", flush=True)
    print(f"least ratio {least:.2f}; largest |z| of any component of any cell:", end=" ")
    print(", ".join(f"{name} {z:.1f}" for name, z in worst.items()), end="; ")
    print(f"{time.perf_counter() - began:.0f} s")


def exact(system, gain, sigma, start, steps):  # type: ignore[no-untyped-def]
    """Exact gradient in the gain, by autograd through Riccati's recursion."""
    k = gain.clone().requires_grad_()
    P, c = lq.riccati(system, k, sigma, steps)
    return torch.autograd.grad(start @ P[0] @ start + c[0], k)[0]


def estimates(system, gain, sigma, start, steps, seed, rollouts):  # type: ignore[no-untyped-def]
    """[pathwise, score with each baseline], each [N, m, n]."""
    found = []
    value = lq.riccati(system, gain, sigma, steps)
    for at in torch.arange(rollouts).split(5000):
        k = gain.repeat(len(at), 1, 1).requires_grad_()
        together = []
        for baseline in lq.BASELINES:
            path, score = lq.losses(
                system, k, sigma, start.expand(len(at), -1), seed, at, steps,
                torch.zeros_like(at), baseline, value,
            )  # fmt: skip
            if not together:
                together += torch.autograd.grad(path.sum(), k, retain_graph=True)
            together += torch.autograd.grad(score.sum(), k)
        found.append(together)
    return [torch.cat(x) for x in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
