"""Pendulum swing-up: what score, pathwise and mixed estimators learn from the same rollouts.

    python examples/pendulum.py --out runs/pendulum

    w' = w + dt (g sin x + u - d w)    x' = x + dt w'    u = limit tanh(a)    a = pi(s) + sigma eps

x = 0 is upright, the start hangs; the torque cannot lift the pendulum, it must be pumped. Three
objectives: `smooth`, the mean height and a price of speed and torque; `stop`, the same with a wall
that the pendulum bounces off, through which a derivative is that of one path, not of the mean; and
`sparse`, the share of time above the pivot, whose derivative is 0 wherever it exists.

One update: sample without a graph; take the Jacobians of all steps in one batch; `costate_scan`;
then one backward pass through `gaussian_action`, whose `action` gets the slope of the cost-to-go
in that action (pathwise) and whose `logp` gets the advantage (score), with weights w and 1 - w:

    lambda_t = c_s + pi_s' c_a + (f_s + f_a pi_s)' lambda_{t+1}      mu_t = c_a + f_a' lambda_{t+1}

All runs (estimators x seeds) are one batch with weights of their own. Formulas ours.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import vgkern

DT, GRAVITY, LIMIT, DRAG = 0.05, 10.0, 8.0, 0.1
TASKS = ("smooth", "stop", "sparse")
WALL = 0.8 * math.pi  # of the task `stop`: the way up on one side is shut
ESTIMATORS = ("score", "mixed", "pathwise")


def step(task: str, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(next state [..., 2], cost [...]) of state (angle, speed) and action [..., 1]."""
    x, w = s.unbind(-1)
    u = LIMIT * torch.tanh(a[..., 0])
    w = w + DT * (GRAVITY * torch.sin(x) + u - DRAG * w)
    after = x + DT * w
    if task == "stop":  # elastic up to half of the speed
        hit = after > math.pi + WALL
        after = torch.where(hit, 2 * (math.pi + WALL) - after, after)
        w = torch.where(hit, -0.5 * w, w)
    if task == "sparse":
        cost = 1 - (torch.cos(after) > 0.0).to(s.dtype) + 0 * (after + u)
    else:
        cost = (1 - torch.cos(after)) / 2 + 0.002 * w**2 + 0.001 * u**2
    return torch.stack([after, w], -1), cost


@dataclass
class Policies:
    """One small network for each of R runs: observation (cos, sin, speed) -> mean of the action."""

    weights: list[Tensor]  # [R, 3, h], [R, 1, h], [R, h, 1], [R, 1, 1]

    @classmethod
    def random(cls, seeds: list[int], hidden: int = 32) -> "Policies":
        found = []
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            found.append(
                [
                    torch.randn(3, hidden, generator=g),
                    torch.zeros(1, hidden),
                    torch.randn(hidden, 1, generator=g) / hidden**0.5,
                    torch.zeros(1, 1),
                ]
            )
        return cls([torch.stack(w).requires_grad_() for w in zip(*found, strict=True)])

    def __call__(self, s: Tensor) -> Tensor:  # [R, ..., 2] -> [R, ..., 1]
        x, w = s.unbind(-1)
        seen = torch.stack([torch.cos(x), torch.sin(x), w / 5], -1)
        w1, b1, w2, b2 = self.weights
        h = torch.tanh(torch.baddbmm(b1, seen.flatten(1, -2), w1))
        return torch.baddbmm(b2, h, w2).view(*s.shape[:-1], 1)


@dataclass
class Rollouts:
    states: Tensor  # [R, N, T + 1, 2]
    actions: Tensor  # [R, N, T, 1]
    costs: Tensor  # [R, N, T]
    noise: vgkern.Noise  # rows [R, N, T]


def starts(runs: int, rollouts: int, group: int, seed: int, update: int) -> Tensor:
    """[R, N, 2]: hanging, a little displaced, the same for the `group` members of a group."""
    ids = torch.arange(rollouts) // group
    at = vgkern.Noise(seed, ids + update * rollouts, torch.tensor(2**20))
    return (torch.tensor([math.pi, 0.0]) + 0.3 * at.normal(2)).expand(runs, -1, -1)


def sample(
    task: str,
    policies: Policies,
    sigma: float,
    start: Tensor,
    steps: int,
    seed: int,
    update: int = 0,
) -> Rollouts:
    """Noise is keyed by (update, run, rollout) and step, so that learning replays it."""
    runs, n = start.shape[:2]
    sequence = (torch.arange(runs * n) + update * runs * n).view(runs, n)
    log_std, s = torch.tensor(math.log(sigma)), start
    states, actions, costs = [s], [], []
    with torch.no_grad():
        for t in range(steps):
            at = vgkern.Noise(seed, sequence, torch.tensor(t))
            a = vgkern.gaussian_action(policies(s), log_std, at).action
            s, c = step(task, s, a)
            states.append(s)
            actions.append(a)
            costs.append(c)
    at = vgkern.Noise(seed, sequence[..., None], torch.arange(steps))
    return Rollouts(torch.stack(states, 2), torch.stack(actions, 2), torch.stack(costs, 2), at)


def action_costates(task: str, policies: Policies, r: Rollouts) -> Tensor:
    """mu [R, N, T, 1]: the derivative of the cost-to-go in each action, the policy included."""
    s = r.states[:, :, :-1].detach().requires_grad_()
    a = r.actions.detach().requires_grad_()
    after, cost = step(task, s, a)
    rows = [torch.autograd.grad(x.sum(), (s, a), retain_graph=True) for x in after.unbind(-1)]
    f_s, f_a = (torch.stack(x, -2) for x in zip(*rows, strict=True))  # [R, N, T, 2, 2], [..., 2, 1]
    c_s, c_a = torch.autograd.grad(cost.sum(), (s, a))
    (pi_s,) = torch.autograd.grad(policies(s).sum(), s)  # one action: the row pi_s [R, N, T, 2]
    closed, local = f_s + f_a * pi_s[..., None, :], c_s + c_a * pi_s
    scanned = vgkern.costate_scan(
        closed.flatten(0, 1), local.flatten(0, 1), torch.zeros_like(s[:, :, 0]).flatten(0, 1)
    ).view(*r.states.shape)
    return c_a + (f_a * scanned[:, :, 1:, :, None]).sum(-2)


def advantages(r: Rollouts, group: int) -> Tensor:
    """[R, N, T]: cost-to-go less that of the others of the group at the same step. Leave-one-out
    keeps the scale of the gradient, which a mixture needs; grpo's division by the std does not."""
    to_go = r.costs.flip(-1).cumsum(-1).flip(-1)
    runs, n, steps = to_go.shape
    ids = (torch.arange(runs * n) // group)[:, None] * steps + torch.arange(steps)
    flat = vgkern.group_advantages(to_go.flatten(), ids.flatten(), estimator="rloo")
    return flat.view_as(to_go)


def surrogate(
    task: str, policies: Policies, sigma: float, r: Rollouts, weight: Tensor, group: int
) -> Tensor:
    """[R]: its gradient estimates that of the mean cost per step; weight [R]: of pathwise."""
    mean = policies(r.states[:, :, :-1])
    out = vgkern.gaussian_action(mean, torch.tensor(math.log(sigma)), r.noise)
    path = (out.action * action_costates(task, policies, r)).sum((1, 2, 3))
    score = (out.logp * advantages(r, group)).sum((1, 2))
    return (weight * path + (1 - weight) * score) / r.costs[0].numel()


def train(
    task: str,
    weights: list[float],  # of the pathwise part, one for each run
    seeds: list[int],  # one for each run
    updates: int = 150,
    rollouts: int = 32,
    group: int = 8,
    steps: int = 60,
    sigma: float = 0.5,
    lr: float = 0.01,
    progress: str = "",
) -> tuple[Tensor, Policies]:
    """(return per step [updates, R], sampled, = 1 - cost; the policies)."""
    policies = Policies.random(seeds)
    adam = torch.optim.Adam(policies.weights, lr, betas=(0.9, 0.98))
    curve, began, weight = [], time.perf_counter(), torch.tensor(weights)
    for u in range(updates):
        start = starts(len(seeds), rollouts, group, 99, u)
        r = sample(task, policies, sigma, start, steps, 1, u)
        curve.append(1 - r.costs.mean((1, 2)))
        adam.zero_grad()
        surrogate(task, policies, sigma, r, weight, group).sum().backward()
        clip(policies, 1.0)
        adam.step()
        if progress:
            show(began, u + 1, updates, progress)
    return torch.stack(curve), policies


def clip(policies: Policies, most: float) -> None:
    """The gradient of every run to a norm of at most `most`; one that overflowed counts as 0."""
    grads = [w.grad for w in policies.weights if w.grad is not None]
    norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
    scale = torch.where(norm.isfinite(), (most / norm).clamp(max=1), 0)[:, None, None]
    for g in grads:
        g.copy_(torch.where(scale > 0, g * scale, 0))


def show(began: float, done: float, total: float, what: str) -> None:
    """One line that the next one replaces; nothing where there is no terminal."""
    if sys.stderr.isatty():
        left = (time.perf_counter() - began) * (total / done - 1)
        end = "\n" if done >= total else ""
        sys.stderr.write(f"\r\x1b[2K{what}: {done / total:.0%}, {left:.0f} s left{end}")
        sys.stderr.flush()


def variances(horizons: list[int], rollouts: int = 32, replicates: int = 32) -> list[list[float]]:
    """[T, score / pathwise variance of the gradient] of one untrained policy, by replicates."""
    rows = []
    for steps in horizons:
        policies = Policies.random([0] * replicates)
        r = sample("smooth", policies, 0.5, starts(replicates, rollouts, 8, 5, 0), steps, 2)
        found = []
        for weight in (0.0, 1.0):
            loss = surrogate("smooth", policies, 0.5, r, torch.full((replicates,), weight), 8)
            grads = torch.autograd.grad(loss.sum(), policies.weights)
            found.append(sum(float(g.var(0).sum()) for g in grads))
        rows.append([steps, found[0] / found[1]])
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", default="runs/pendulum", help="folder of the picture")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--updates", type=int, default=80)
    p.add_argument("--rollouts", type=int, default=32, help="per update; groups of 8 share a start")
    p.add_argument("--steps", type=int, default=50, help=f"horizon, {DT} s each")
    p.add_argument("--sigma", type=float, default=0.5, help="standard deviation of the noise")
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--mix", type=float, default=0.5, help="weight of the pathwise part of `mixed`")
    a = p.parse_args()
    if min(a.seeds, a.updates, a.steps) < 1 or a.rollouts < 8 or a.rollouts % 8 or a.sigma <= 0:
        p.error("seeds, updates and steps are >= 1, rollouts a multiple of 8, sigma > 0")
    torch.set_num_threads(1)
    began, curves, paths = time.perf_counter(), {}, {}
    weights = [w for w in (0.0, a.mix, 1.0) for _ in range(a.seeds)]
    seeds = list(range(a.seeds)) * len(ESTIMATORS)
    used = a.updates * a.rollouts
    print(f"pendulum, horizon {a.steps}, {used} rollouts in {a.updates} updates, {a.seeds} seeds")
    print("return per step, 1 is perfect: mean of the first 5 updates -> of the last 5 (each seed)")
    for task in a.tasks:
        settings = (a.updates, a.rollouts, 8, a.steps, a.sigma, a.lr)
        curve, policies = train(task, weights, seeds, *settings, progress=task)
        curves[task] = curve.view(a.updates, len(ESTIMATORS), a.seeds)
        start = starts(len(seeds), a.rollouts, 8, 123, 0)
        paths[task] = sample(task, policies, a.sigma, start, a.steps, 3).states
        print(f"\n{task}")
        for i, name in enumerate(ESTIMATORS):
            x = curves[task][:, i]
            last = x[-5:].mean(0)
            each = ", ".join(f"{float(v):.2f}" for v in last)
            print(f"  {name:9} {float(x[:5].mean()):.2f} -> {float(last.mean()):.2f}  ({each})")
    print("\nvariance of score over that of pathwise, untrained policy, by horizon")
    print("  " + "   ".join(f"T={t}: {v:.2g}" for t, v in variances([8, 32, 128, 512])))
    print(f"\n{time.perf_counter() - began:.0f} s")
    draw(curves, paths, a.rollouts, a.seeds, Path(a.out))


def draw(
    curves: dict[str, Tensor], paths: dict[str, Tensor], rollouts: int, seeds: int, out: Path
) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(curves), figsize=(3.6 * len(curves), 6), layout="constrained", squeeze=False
    )
    for (task, x), (above, below) in zip(curves.items(), axes.T, strict=True):
        used = torch.arange(len(x)) * rollouts
        for i, name in enumerate(ESTIMATORS):
            (line,) = above.plot(used, x[:, i].mean(-1), label=name, linewidth=2)
            above.plot(used, x[:, i], color=line.get_color(), alpha=0.3, linewidth=0.8)
            best = int(x[-5:, i].mean(0).argmax())
            for path in paths[task][i * seeds + best, ::8]:
                below.plot(*path.T, color=line.get_color(), alpha=0.7, linewidth=0.9)
        above.set(title=task, xlabel="rollouts", ylabel="return per step")
        below.set(xlabel="angle (0 and 2 pi: upright)", ylabel="speed")
        below.plot([0, 2 * math.pi], [0, 0], "k+")
    axes[0, 0].legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "pendulum.png", dpi=110)
    print(f"picture: {out / 'pendulum.png'}; below: paths of each estimator's best seed")


if __name__ == "__main__":
    main()
