"""Pendulum swing-up: what score, pathwise and mixed estimators learn from the same rollouts.

    python examples/pendulum.py --out runs/pendulum

    w' = w + dt (g sin x + u - d w)    x' = x + dt w'    u = limit tanh(a)    a = pi(s) + sigma eps

x = 0 is upright, the start hangs; the torque cannot lift the pendulum, it must be pumped. Three
objectives: `smooth`, the mean height and a price of speed and torque; `stop`, the same with a wall
that the pendulum bounces off, through which a derivative is that of one path, not of the mean; and
`sparse`, the share of time spent upright, whose derivative is 0 wherever it exists.

One update: sample without a graph; take the Jacobians of all steps in one batch; `costate_scan`;
then one backward pass through `gaussian_action`, whose `action` gets the slope of the cost-to-go
in that action (pathwise) and whose `logp` gets the advantage (score), with weights w and 1 - w:

    lambda_t = c_s + pi_s' c_a + (f_s + f_a pi_s)' lambda_{t+1}        mu_t = c_a + f_a' lambda_{t+1}

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

DT, GRAVITY, LIMIT, DRAG = 0.05, 10.0, 6.0, 0.1
TASKS = ("smooth", "stop", "sparse")
WALL = 0.8 * math.pi  # of the task `stop`: the way up on one side is shut
ESTIMATORS = ("score", "mixed", "pathwise")


def step(task: str, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(next state [..., 2], cost [...] in 0..about 1) of state (angle, speed) and action [..., 1]."""
    x, w = s.unbind(-1)
    u = LIMIT * torch.tanh(a[..., 0])
    w = w + DT * (GRAVITY * torch.sin(x) + u - DRAG * w)
    after = x + DT * w
    if task == "stop":  # elastic up to half of the speed
        hit = after > math.pi + WALL
        after = torch.where(hit, 2 * (math.pi + WALL) - after, after)
        w = torch.where(hit, -0.5 * w, w)
    if task == "sparse":
        cost = 1 - (torch.cos(after) > 0.9).to(s.dtype) + 0 * u
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
    task: str, policies: Policies, sigma: float, start: Tensor, steps: int, seed: int, update: int = 0
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
    keeps the scale of the gradient, which the mixture needs; grpo's division by the std does not."""
    to_go = r.costs.flip(-1).cumsum(-1).flip(-1)
    runs, n, steps = to_go.shape
    ids = (torch.arange(runs * n) // group)[:, None] * steps + torch.arange(steps)
    flat = vgkern.group_advantages(to_go.flatten(), ids.flatten(), estimator="rloo")
    return flat.view_as(to_go)


def surrogate(
    task: str, policies: Policies, sigma: float, r: Rollouts, weight: Tensor, group: int
) -> Tensor:
    """[R]: its gradient estimates that of the mean cost per step; weight [R] of the pathwise part."""
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
