"""Linear-quadratic control with additive noise: the costate against its exact value.

    python examples/linear_quadratic.py --out runs/linear_quadratic

    s_{t+1} = A s_t + B a_t      a_t = K s_t + sigma eps_t      J = E[sum_t s'Qs + a'Ra + s_T'Qs_T]

State and action move together, z = (a, s), so that the noise is `linear_rollout`'s own:

    z_{t+1} = F z_t + sigma (eps_{t+1}, 0)        F = [[KB, KA], [B, A]]

`costate_scan` of F gives mu = (mu_a, mu_s), the slopes of the cost-to-go in a_t and in s_t alone.
lambda_t = mu_s + K' mu_a is the costate of the closed loop, its mean is the gradient of the value,
2 P_t s_t (Riccati), and the gradient of K is sum_t mu_a s_t': pathwise. The score estimator takes
the same actions' log-density from `gaussian_action` and never looks at A or B. Formulas ours.
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


@dataclass(frozen=True)
class System:
    A: Tensor  # [n, n]
    B: Tensor  # [n, m]
    Q: Tensor  # [n, n] cost of the state
    R: Tensor  # [m, m] cost of the action

    def to(self, dtype: torch.dtype) -> "System":
        return System(*(x.to(dtype) for x in (self.A, self.B, self.Q, self.R)))


def random_system(n: int, m: int, seed: int, radius: float = 0.95) -> tuple[System, Tensor]:
    """A system and a gain K [m, n] with which its closed loop has that spectral radius; fp64."""
    g = torch.Generator().manual_seed(seed)
    A, B, K = (torch.randn(shape, generator=g).double() for shape in ((n, n), (n, m), (m, n)))
    K = 0.3 * K
    scale = radius / torch.linalg.eigvals(A + B @ K).abs().max()
    Q = torch.eye(n, dtype=torch.float64)
    return System(scale * A, scale * B, Q, 0.1 * torch.eye(m, dtype=torch.float64)), K


def joint(system: System, gain: Tensor) -> Tensor:
    """F [..., m + n, m + n] of gains [..., m, n]."""
    top = torch.cat([gain @ system.B, gain @ system.A], -1)
    below = torch.cat([system.B, system.A], -1)
    return torch.cat([top, below.expand(*top.shape[:-2], *below.shape)], -2)


def rollout(
    system: System,
    gain: Tensor,  # [N, m, n]
    sigma: float,
    start: Tensor,  # [N, n]
    seed: int,
    sequence: Tensor,  # [N] int64: with seed, the address of the noise
    steps: int,
) -> Tensor:  # z [N, steps + 1, m + n]; differentiable in gain
    m, n = gain.shape[-2:]
    at = vgkern.Noise(seed, sequence[:, None], torch.arange(steps + 1))
    first = (gain @ start[..., None])[..., 0]
    first = first + sigma * vgkern.Noise(seed, sequence, torch.tensor(0)).normal(m, start.dtype)
    F = joint(system, gain)[:, None].expand(-1, steps, -1, -1)
    noisy = torch.cat([start.new_full((m,), sigma), start.new_zeros(n)])
    following = vgkern.Noise(seed, at.sequence, at.position[1:])
    return vgkern.linear_rollout(
        F, start.new_zeros(()), noisy, torch.cat([first, start], -1), following
    )


def cost(system: System, z: Tensor) -> Tensor:
    """Cost [N, T + 1] of each step; the action at T costs nothing, since nobody takes it."""
    a, s = z.split(list(system.B.T.shape), -1)
    each = ((s @ system.Q) * s).sum(-1)
    return each + torch.nn.functional.pad(((a @ system.R) * a).sum(-1)[:, :-1], (0, 1))


def costates(system: System, gain: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(lambda [N, T + 1, n] of the closed loop, mu_a [N, T, m]) along z."""
    m = gain.shape[-2]
    a, s = z.split(list(gain.shape[-2:]), -1)
    local = 2 * torch.cat([a @ system.R, s @ system.Q], -1)
    terminal = torch.cat([torch.zeros_like(a[:, -1]), local[:, -1, m:]], -1)
    F = joint(system, gain)[:, None].expand(-1, z.shape[1] - 1, -1, -1)
    mu = vgkern.costate_scan(F, local[:, :-1], terminal)
    return mu[..., m:] + mu[..., :m] @ gain, mu[:, :-1, :m]


def riccati(system: System, gain: Tensor, sigma: float, steps: int) -> tuple[Tensor, Tensor]:
    """(P [T + 1, ..., n, n], c [T + 1, ...]) of gains [..., m, n]: V_t(s) = s'P_t s + c_t."""
    M, G = system.A + system.B @ gain, system.Q + gain.mT @ system.R @ gain
    P, c = [system.Q.expand(G.shape)], [G.new_zeros(G.shape[:-2])]
    for _ in range(steps):
        push = system.R + system.B.mT @ P[0] @ system.B
        c.insert(0, c[0] + sigma**2 * push.diagonal(dim1=-2, dim2=-1).sum(-1))
        P.insert(0, G + M.mT @ P[0] @ M)
    return torch.stack(P), torch.stack(c)


def expected_cost(system: System, gain: Tensor, sigma: float, steps: int) -> Tensor:
    """J [...] of gains [..., m, n] and starts s_0 ~ N(0, 1)."""
    P, c = riccati(system, gain, sigma, steps)
    return P[0].diagonal(dim1=-2, dim2=-1).sum(-1) + c[0]


BASELINES = ("exact value", "reward-to-go", "whole return")


def losses(
    system: System,
    gain: Tensor,  # [N, m, n], one for each rollout, so that gradients come one for each
    sigma: float,
    start: Tensor,
    seed: int,
    sequence: Tensor,
    steps: int,
    groups: Tensor,  # [N] int64: rollouts that are each other's baseline
    baseline: str = "reward-to-go",
    value: tuple[Tensor, Tensor] | None = None,  # riccati(...), for "exact value"
) -> tuple[Tensor, Tensor]:
    """(pathwise, score), each [N]: both gradients estimate that of the expected cost of a rollout.
    One forward, one scan; then both through `gaussian_action`, which replays from its address the
    noise that `linear_rollout` drew."""
    with torch.no_grad():
        z = rollout(system, gain, sigma, start, seed, sequence, steps)
        each, (_, mu) = cost(system, z), costates(system, gain, z)
    s = z[:, :-1, gain.shape[-2] :]
    at = vgkern.Noise(seed, sequence[:, None], torch.arange(steps))
    log_std = s.new_full((), math.log(sigma))
    action, logp = vgkern.gaussian_action(s @ gain.mT, log_std, at)
    to_go = each.flip(-1).cumsum(-1).flip(-1)[:, :-1]
    if baseline == "exact value":
        assert value is not None
        P, c = value
        advantage = to_go - ((s[:, :, None] @ P[:-1]).squeeze(-2) * s).sum(-1) - c[:-1]
    elif baseline == "reward-to-go":
        ids = groups[:, None] * steps + torch.arange(steps)
        flat = vgkern.group_advantages(to_go.flatten(), ids.flatten(), estimator="rloo")
        advantage = flat.view_as(to_go)
    else:
        advantage = vgkern.group_advantages(to_go[:, 0], groups, estimator="rloo")[:, None]
    return (mu * action).sum((1, 2)), (advantage * logp).sum(-1)


def best_gain(system: System, sigma: float, steps: int) -> Tensor:
    """The constant gain of least expected cost, by its exact gradient."""
    gain = torch.zeros(system.B.T.shape, dtype=system.B.dtype, requires_grad=True)
    lbfgs = torch.optim.LBFGS([gain], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        j = expected_cost(system, gain, sigma, steps)
        j.backward()
        return j

    lbfgs.step(closure)
    return gain.detach()


WEIGHTS = {"score": 0.0, "mixed": 0.5, "pathwise": 1.0}  # weight of the pathwise part


def train(
    seeds: int = 5,
    updates: int = 150,
    rollouts: int = 16,
    steps: int = 16,
    sigma: float = 0.3,
    lr: float = 0.03,
    mix: float = 0.5,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Excess expected cost over the best constant gain, [updates + 1, seeds] by estimator. All runs
    go through the ops as one batch; every seed has a system of its own."""
    weights = {**WEIGHTS, "mixed": mix}
    began, curves = time.perf_counter(), {name: [] for name in weights}
    problems = [random_system(3, 2, 100 + s, radius=1.0) for s in range(seeds)]
    floor = [expected_cost(x, best_gain(x, sigma, steps), sigma, steps) for x, _ in problems]
    for seed, (exact, _) in enumerate(problems):
        system = exact.to(torch.float32)
        gain = torch.zeros(len(weights), 2, 3, requires_grad=True)
        adam = torch.optim.Adam([gain], lr)
        excess = []
        rows, groups = len(weights) * rollouts, torch.arange(len(weights) * rollouts) // rollouts
        pathwise = torch.tensor(list(weights.values()))[groups]
        for u in range(updates + 1):
            with torch.no_grad():
                excess.append(expected_cost(exact, gain.double(), sigma, steps) / floor[seed] - 1)
            sequence = torch.arange(rows) + u * rows
            start = vgkern.Noise(seed, sequence, torch.tensor(2**20)).normal(3)
            each = gain[groups]
            path, score = losses(system, each, sigma, start, seed, sequence, steps, groups)
            loss = (pathwise * path + (1 - pathwise) * score).sum() / rollouts
            adam.zero_grad()
            loss.backward()
            adam.step()
            if progress:
                show(began, seed + (u + 1) / (updates + 1), seeds, f"training, seed {seed}")
        for i, name in enumerate(weights):
            curves[name].append(torch.stack(excess)[:, i])
    return {name: torch.stack(c, 1) for name, c in curves.items()}


def show(began: float, done: float, total: float, what: str) -> None:
    """One line that the next one replaces; nothing where there is no terminal."""
    if sys.stderr.isatty():
        left = (time.perf_counter() - began) * (total / max(done, 1e-9) - 1)
        end = "\n" if done >= total else ""
        sys.stderr.write(f"\r\x1b[2K{what}: {done / total:.0%}, {left:.0f} s left{end}")
        sys.stderr.flush()


def antithetic_error(sigma: float = 1.0, steps: int = 16) -> tuple[float, float]:
    """Relative error of the costate at the start: mean of one antithetic pair, and one path."""
    system, gain = random_system(3, 2, 0)
    start = torch.tensor([[1.0, -0.5, 0.8]], dtype=torch.float64)
    pair = torch.cat([start, -start])  # the path of -eps from s is minus the path of eps from -s
    gains, same = gain.expand(2, -1, -1), torch.zeros(2, dtype=torch.int64)
    z = rollout(system, gains, sigma, pair, 7, same, steps)
    first = costates(system, gains, z)[0][:, 0]
    truth = 2 * riccati(system, gain, sigma, steps)[0][0] @ start[0]
    wrong = torch.stack([(first[0] - first[1]) / 2, first[0]]) - truth
    mean, one = (float(x.norm() / truth.norm()) for x in wrong)
    return mean, one


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", default="runs/linear_quadratic", help="folder of the picture")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--updates", type=int, default=150)
    p.add_argument("--rollouts", type=int, default=16, help="per update and estimator")
    p.add_argument("--steps", type=int, default=16, help="horizon T")
    p.add_argument("--sigma", type=float, default=0.3, help="standard deviation of the noise")
    p.add_argument("--lr", type=float, default=0.03)
    p.add_argument("--mix", type=float, default=0.5, help="weight of the pathwise part of `mixed`")
    a = p.parse_args()
    if a.seeds < 1 or a.updates < 1 or a.rollouts < 2 or a.steps < 1 or a.sigma <= 0:
        p.error("seeds, updates and steps are >= 1, rollouts >= 2 (a baseline), sigma > 0")
    torch.set_num_threads(1)
    began = time.perf_counter()
    mean, one = antithetic_error()
    print("costate at the start against 2 P s, relative error (fp64, sigma = 1, T = 16)")
    print(f"  one path {one:.2f}      mean of an antithetic pair {mean:.1e}")
    settings = {k: v for k, v in vars(a).items() if k != "out"}
    curves = train(**settings, progress=True)
    print(
        f"\ntraining K from 0: {a.seeds} systems of 3 states and 2 actions, T = {a.steps}, sigma ="
    )
    print(f"{a.sigma}, {a.rollouts} rollouts per update; cost above the best constant gain")
    print(
        f"\n{'':10}{'start':>9}{'final: median':>15}{'worst':>9}   rollouts to 5 %: median, worst"
    )
    for name, x in curves.items():
        reached = [int((c < 0.05).nonzero()[0]) if (c < 0.05).any() else None for c in x.T]
        taken = sorted(math.inf if r is None else r * a.rollouts for r in reached)
        start, final, worst = x[0].median(), x[-1].median(), x[-1].max()
        needed = [
            f"{int(t)}" if t < math.inf else "never" for t in (taken[len(taken) // 2], taken[-1])
        ]
        print(f"{name:10}{start:9.1%}{final:15.2%}{worst:9.2%}   {needed[0]:>18}, {needed[1]}")
    print(f"\n{time.perf_counter() - began:.0f} s; variances: benchmarks/linear_quadratic.py")
    draw(curves, a.rollouts, Path(a.out))


def draw(curves: dict[str, Tensor], rollouts: int, out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for name, x in curves.items():
        used = torch.arange(len(x)) * rollouts
        (line,) = axis.semilogy(used, x.median(1).values, label=name, linewidth=2)
        axis.semilogy(used, x, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axis.set_xlabel("rollouts")
    axis.set_ylabel("cost above the best constant gain")
    axis.set_title("linear-quadratic control: median and every system")
    axis.legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "linear_quadratic.png", dpi=120)
    print(f"picture: {out / 'linear_quadratic.png'}")


if __name__ == "__main__":
    main()
