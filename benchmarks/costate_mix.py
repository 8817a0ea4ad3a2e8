"""Rollouts to a reward: the score alone against score and one-hop costates, mixed.

    python benchmarks/costate_mix.py --out /tmp/costate_mix
    python benchmarks/costate_mix.py --seeds 2 --steps 30 --methods grpo,annealed

A small decoder (d = 64, 2 layers, V = 16, prompts of 4 tokens, answers of 16) is fitted for 60
steps to order-2 Markov chains, then trained on a frozen random smooth transformer that reads the
answer and gives a reward in (-1, 1). Every method sees the same prompts, noise and number of
rollouts: Adam, gradient norm clipped at 1, the better of two learning rates. The level "x %" lies
x % of the way from the starting reward to where GRPO ends; a crossing is interpolated between
evaluations on fixed noise.

    grpo       z-scored advantages, token ratio
    score      leave-one-out advantages (RLOO): the unbiased score gradient
    hops       one hop alone: no score
    half       score and hops at 1/2 each
    annealed   hops from 0.9 to 0 over the first 20 steps
    bias_aware the weight of least mean-squared error, estimated as it goes from 2 halves
"""

import argparse
import copy
import functools
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import vgkern
from vgkern import costate
from vgkern.train.model import Decoder, Shape

V, P, T, PROMPTS = 16, 4, 16, 8
EVERY = 2  # steps between evaluations
SHAPE = Shape(vocab=V, width=64, layers=2, heads=4, mlp=192, context=P + T)
METHODS = ("grpo", "score", "hops", "half", "annealed", "bias_aware")


def mix_of(method: str) -> costate.Mix:
    return {
        "hops": costate.Mix.constant(1.0),
        "half": costate.Mix.constant(0.5),
        "annealed": costate.Mix.annealed(0.9, 0.0, 20),
        "bias_aware": costate.Mix.bias_aware(0.9),
    }.get(method, costate.Mix.constant(0.0))


class Reward:
    """A frozen random transformer with a table of its own, and a smooth bounded readout."""

    def __init__(self, seed: int) -> None:
        self.body = Decoder(SHAPE, [], seed).requires_grad_(False)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.body.parameters():
                weight.mul_(1.5)
        self.body.embedding.weight.copy_(torch.randn(V, SHAPE.width, generator=g))
        self.readout = 3 * torch.randn(SHAPE.width, generator=g) / SHAPE.width**0.5

    @property
    def table(self) -> Tensor:
        return self.body.embedding.weight

    def __call__(self, x: Tensor) -> Tensor:  # [B, P+T, D] -> [B]
        return (self.body.from_embeddings(x)[:, P:] @ self.readout).tanh().mean(-1)


@functools.cache
def start(seed: int) -> tuple[Decoder, Tensor]:
    """A model after 60 steps on Markov chains, and the prompts [8, 4], drawn from them."""
    g = torch.Generator().manual_seed(seed)
    chain = (2 * torch.randn(V, V, V, generator=g)).softmax(-1)

    def draw(n: int, length: int) -> Tensor:
        ids = torch.randint(V, (n, 2), generator=g)
        while ids.shape[1] < length:
            p = chain[ids[:, -2], ids[:, -1]]
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=g)], 1)
        return ids

    model = Decoder(SHAPE, [], seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        ids = draw(32, P + T)
        hidden = model.from_embeddings(model.embedding(ids))[:, :-1]
        head = model.head()
        loss = -vgkern.linear_token_logprobs(hidden, head.weight, ids[:, 1:]).logp.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, draw(PROMPTS, P)


@torch.no_grad()
def rollout(model: Decoder, prompts: Tensor, group: int, seed: int) -> Tensor:
    """`group` sequences [., P+T] after each of `prompts` [., P]."""
    n = len(prompts) * group
    state, hidden = model.prefill(prompts.tolist(), group, T)
    out, sequence = [prompts.repeat_interleave(group, 0)], torch.arange(n)
    for t in range(T):
        noise = vgkern.Noise(seed, sequence, torch.tensor(t))
        out.append(vgkern.linear_sample(hidden, model.head().weight, noise).token[:, None])
        if t + 1 < T:
            hidden = model.decode(state, out[-1][:, 0])
    return torch.cat(out, 1)


@torch.no_grad()
def evaluate(model: Decoder, reward: Reward, prompts: Tensor, group: int = 16) -> float:
    ids = rollout(model, prompts, group, 2**40)
    return float(reward(reward.table[ids]).mean())


def gradients(
    model: Decoder, reward: Reward, ids: Tensor, method: str, mix: costate.Mix, step: int
) -> None:
    """Adds the gradient of one batch to .grad; for a bias-aware mix that of each half first."""
    if method == "bias_aware" and step % 4 == 0:
        weights = list(model.parameters())
        parts: list[list[Tensor]] = [[], []]
        for half in ids.chunk(2):
            for k, only in enumerate((costate.Mix.constant(0.0), costate.Mix.constant(1.0))):
                gradients(model, reward, half, "part", only, step)
                parts[k].append(torch.cat([w.grad.flatten() for w in weights]))  # type: ignore
                model.zero_grad()
        mix.update(*map(torch.stack, parts))
    x = torch.cat([model.embedding(ids), reward.table[ids]], -1)
    hidden = model.from_embeddings(x[..., : SHAPE.width])
    head = model.head().weight
    mask = (torch.arange(P + T - 1) >= P - 1).expand(len(ids), -1)
    rewards = reward(x[..., SHAPE.width :])
    preset = "grpo" if method == "grpo" else "rloo"
    groups = torch.zeros(len(ids), dtype=torch.int64)
    score = vgkern.linear_policy_loss(
        hidden[:, :-1], head, ids[:, 1:], rewards=rewards.detach(), groups=groups,
        objective=preset, mask=mask,
    ).loss  # fmt: skip
    w = mix(step)
    if not w.pathwise:
        score.backward()
        return
    table = torch.cat([model.embedding.weight, reward.table], 1)
    hop = costate.hops(-rewards.mean(), x, hidden, head, table, ids[:, 1:], 1, mask=mask)
    hop.backward(w.score * score, weight=w.pathwise)


def train(seed: int, method: str, lr: float, steps: int, n: int) -> dict:
    model, prompts = copy.deepcopy(start(seed))
    reward = Reward(seed + 1000)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    mix, curve, weight = mix_of(method), [evaluate(model, reward, prompts)], []
    for step in range(steps):
        ids = rollout(model, prompts[step % PROMPTS, None], n, 1 + step)
        optimizer.zero_grad()
        gradients(model, reward, ids, method, mix, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            curve.append(evaluate(model, reward, prompts))
        weight.append(mix(step).pathwise)
    return {"curve": curve, "weight": weight}


def crossing(curve: list[float], level: float) -> float:
    """Steps until the curve is at `level`, interpolated; inf: never."""
    for i, y in enumerate(curve):
        if y >= level:
            return EVERY * (i - 1 + (level - curve[i - 1]) / (y - curve[i - 1])) if i else 0.0
    return float("inf")


def final(curve: list[float]) -> float:
    return statistics.fmean(curve[-5:])


def report(runs: dict, a: argparse.Namespace) -> list[str]:
    methods, lrs, seeds = a.methods.split(","), a.lr, range(a.first_seed, a.first_seed + a.seeds)
    mean_final = {
        (m, lr): statistics.fmean(final(runs[m, lr, s]["curve"]) for s in seeds)
        for m in methods
        for lr in lrs
    }
    best = {m: max(lrs, key=lambda lr: mean_final[m, lr]) for m in methods}
    base = {s: runs["grpo", best["grpo"], s]["curve"] for s in seeds}
    lines = [
        "| method | lr | final reward | "
        + " | ".join(f"rollouts to {x} %" for x in a.levels)
        + " |",
        "|---|---|---|" + "---|" * len(a.levels),
    ]
    for m in methods:
        for lr in lrs:
            cells = []
            for x in a.levels:
                mine, ratio = [], []
                for s in seeds:
                    level = base[s][0] + x / 100 * (final(base[s]) - base[s][0])
                    mine.append(a.n * crossing(runs[m, lr, s]["curve"], level))
                    ratio.append(a.n * crossing(base[s], level) / max(mine[-1], 1e-9))
                never = sum(v == float("inf") for v in mine)
                cells.append(
                    f"{statistics.median(mine):.0f} ({statistics.median(ratio):.2f}x fewer)"
                    + (f", never in {never}" if never else "")
                )
            values = [final(runs[m, lr, s]["curve"]) for s in seeds]
            star = " *" if lr == best[m] else ""
            lines.append(
                f"| {m} | {lr:g}{star} | {statistics.fmean(values):.3f} "
                f"({min(values):.3f}..{max(values):.3f}) | " + " | ".join(cells) + " |"
            )
    return lines


def plot(runs: dict, a: argparse.Namespace, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no picture")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seeds = range(a.first_seed, a.first_seed + a.seeds)
    figure, axes = plt.subplots(1, len(a.lr), figsize=(5.5 * len(a.lr), 4), squeeze=False)
    for axis, lr in zip(axes[0], a.lr, strict=True):
        for m in a.methods.split(","):
            curves = [runs[m, lr, s]["curve"] for s in seeds]
            mean = [statistics.fmean(c) for c in zip(*curves, strict=True)]
            axis.plot([a.n * EVERY * i for i in range(len(mean))], mean, label=m)
        axis.set(title=f"learning rate {lr:g}", xlabel="rollouts", ylabel="reward")
        axis.legend()
    figure.suptitle(f"mean of {a.seeds} seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", default="", help="folder for table.md, runs.json and curves.png")
    p.add_argument("--methods", default=",".join(METHODS))
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--first-seed", type=int, default=100)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--n", type=int, default=8, help="rollouts per step, all of one prompt")
    p.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    p.add_argument("--levels", type=int, nargs="+", default=[50, 70, 90])
    a = p.parse_args()
    if "grpo" not in a.methods.split(","):
        p.error("--methods: the levels are set by grpo, which must be among them")
    torch.set_num_threads(1)
    runs, begin = {}, time.perf_counter()
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for method in a.methods.split(","):
            for lr in a.lr:
                runs[method, lr, seed] = train(seed, method, lr, a.steps, a.n)
        print(f"seed {seed} done, {time.perf_counter() - begin:.0f} s", flush=True)
    lines = report(runs, a)
    print("\n".join(lines))
    if a.out:
        out = Path(a.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text("\n".join(lines) + "\n")
        flat = [{"method": m, "lr": lr, "seed": s, **run} for (m, lr, s), run in runs.items()]
        (out / "runs.json").write_text(json.dumps({"options": vars(a), "runs": flat}))
        plot(runs, a, out / "curves.png")


if __name__ == "__main__":
    main()
