"""The analytic estimator: error of the gradient at equal rollouts, and rollouts to a KL.

    python benchmarks/costate_analytic.py --out /tmp/costate_analytic
    python benchmarks/costate_analytic.py --part gradient --model-seed 11

A small decoder (d = 64, 2 layers, V = 16, prompts of 4 tokens, answers of 16) is fitted for 60
steps to one order-2 Markov mixture and distilled, on its own samples, from one fitted for 500
steps to another. One prompt, groups of 8.

gradient: relative mean-squared error at 8 rollouts, E|g_hat - g|^2 / |g|^2, for the KL to the
teacher and for the entropy. The true gradient g is a mean over --truth rollouts of the analytic
estimator, whose own noise is subtracted.

    sequence   sampled log-ratio (entropy: log-prob) of the whole answer, leave-one-out: GRPO's
    to_go      the same from the token on: reward-to-go, leave-one-out at every position
    analytic   vgkern.costate: per-state terms and the score of those to come
    direct     the per-state terms alone (future = 0, GKD): biased

distill: every method sees the same prompts and as many rollouts; Adam, gradient norm clipped at 1.
A level of x % lies x % of the way from the first KL to where `analytic` ends; crossings are
interpolated between evaluations on fixed noise.

    analytic   future = 1
    half       future = 1/2: what the mixtures leave to the score, without a hop
    mix        future = 1/2, and 1/2 of one straight-through hop through student and teacher
    annealed   that hop from 0.9 to 0 over the first half, the score takes the rest
"""

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vgkern
from vgkern.costate import Teacher, analytic_loss, future_advantages

V, P, T, D, GROUP, PROMPTS = 16, 4, 16, 64, 8, 8
METHODS = ("analytic", "half", "mix", "annealed")
LEVELS = (0.5, 0.7, 0.9)  # of the way to where `analytic` ends


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 3 * D, bias=False), nn.Linear(3 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.rms_norm(x, (D,))).unflatten(-1, (3, 4, D // 4)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(F.rms_norm(x, (D,)))).square())


class Model(nn.Module):
    """Untied, learned positions, no gains and no biases. Reads embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(V, D), nn.Embedding(P + T, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)
        for name, weight in self.named_parameters():
            small = 0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
            nn.init.normal_(weight, std=small / math.sqrt(D))

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D] -> hidden [B, L, D]
        x = x + self.place.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.rms_norm(x, (D,))

    def hidden(self, ids: Tensor) -> Tensor:  # [B, P+T] -> rows that predict the answer [B, T, D]
        return self(self.embedding(ids[:, :-1]))[:, P - 1 :]


def mixture(g: torch.Generator) -> Callable[[int], Tensor]:
    """Sequences of a mixture of two order-2 Markov chains, whose rows are sharp."""
    table = (2.5 * torch.randn(2, V, V, V, generator=g)).softmax(-1)

    def sample(n: int) -> Tensor:
        ids, which = [torch.randint(V, (n,), generator=g) for _ in range(2)], torch.arange(n) % 2
        for _ in range(P + T - 2):
            p = table[which, ids[-2], ids[-1]]
            ids.append(torch.multinomial(p, 1, generator=g)[:, 0])
        return torch.stack(ids, 1)

    return sample


def fit(steps: int, sample: Callable[[int], Tensor]) -> Model:
    model = Model()
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        ids = sample(64)
        h = model(model.embedding(ids[:, :-1]))
        loss = -vgkern.linear_token_logprobs(h, model.head.weight, ids[:, 1:]).logp.mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


def start(seed: int) -> tuple[Model, Model, Tensor]:
    """Student, teacher and prompts [PROMPTS, P]."""
    torch.manual_seed(1000 + seed)
    g = torch.Generator().manual_seed(2000 + seed)
    one, other = mixture(g), mixture(g)
    student, teacher = fit(60, one), fit(500, other)
    teacher.requires_grad_(False)
    return student, teacher, one(PROMPTS)[:, :P]


@torch.no_grad()
def rollout(model: Model, prompts: Tensor, seed: int) -> Tensor:  # [B, P] -> [B, P+T]
    ids, sequence = prompts, torch.arange(len(prompts))
    for t in range(T):
        h = model(model.embedding(ids))[:, -1]
        noise = vgkern.Noise(seed, sequence, torch.tensor(t))
        token = vgkern.linear_sample(h, model.head.weight, noise).token
        ids = torch.cat([ids, token[:, None]], 1)
    return ids


def groups_of(ids: Tensor) -> Tensor:
    return torch.arange(len(ids)) // GROUP


def estimate(name: str, term: str, student: Model, teacher: Model, ids: Tensor) -> Tensor:
    """The loss whose gradient is the estimate; a mean over the sequences."""
    h, w, y, groups = student.hidden(ids), student.head.weight, ids[:, P:], groups_of(ids)
    if name in ("analytic", "direct"):
        future = 1.0 if name == "analytic" else 0.0
        if term == "entropy":
            return analytic_loss(h, w, y, entropy_coef=1.0, groups=groups, future=future).loss
        held = Teacher(teacher.hidden(ids), teacher.head.weight)
        return analytic_loss(h, w, y, held, groups=groups, future=future).loss
    cost = vgkern.linear_token_logprobs(h, w, y).logp.detach()
    if term == "kl":
        th = teacher.hidden(ids)
        cost = cost - vgkern.linear_token_logprobs(th, teacher.head.weight, y).logp
    if name == "to_go":
        advantages = future_advantages(cost, groups, own=True)
    else:
        advantages = -vgkern.group_advantages(cost.sum(1), groups, estimator="rloo")
    return vgkern.linear_policy_loss(h, w, y, advantages, objective="rloo").loss


def flat_gradient(loss: Tensor, model: Model) -> Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(model.parameters(), grads, strict=True)
        ]
    ).double()


def gradient_part(a: argparse.Namespace) -> dict:
    student, teacher, prompts = start(a.model_seed)
    prompt = prompts[:1]
    found: dict = {}
    for term in ("kl", "entropy"):
        size, means = 64 * GROUP, []
        for k in range(max(2, a.truth // size)):
            ids = rollout(student, prompt.expand(size, P), 10**6 + k)
            means.append(flat_gradient(estimate("analytic", term, student, teacher, ids), student))
        each = torch.stack(means)
        truth, noise = each.mean(0), float(each.var(0).sum()) / len(each)
        norm2 = float(truth.square().sum()) - noise
        ids = rollout(student, prompt.expand(a.groups * GROUP, P), 5)
        for name in ("sequence", "to_go", "analytic", "direct"):
            g = torch.stack(
                [
                    flat_gradient(estimate(name, term, student, teacher, part), student)
                    for part in ids.split(GROUP)
                ]
            )
            variance = float(g.var(0).sum())
            error = float((g - truth).square().sum(1).mean()) - noise
            off = float((g.mean(0) - truth).square().sum()) - noise - variance / len(g)
            found[f"{term} {name}"] = {
                "mse": error / norm2,
                "variance": variance / norm2,
                "bias2": off / norm2,
            }
    return found


def weight_of(method: str, progress: float) -> tuple[float, float]:
    """Weight of the future's score, and of the hop."""
    if method == "annealed":
        a = 0.9 * max(0.0, 1 - 2 * progress)
        return 1 - a, a
    return {"analytic": (1.0, 0.0), "half": (0.5, 0.0), "mix": (0.5, 0.5)}[method]


def distill_loss(
    student: Model, teacher: Model, ids: Tensor, future: float, hop: float, groups: Tensor
) -> Tensor:
    """Without a hop `analytic_loss`; with one, the KL runs through its tokens as well."""
    y, w = ids[:, P:], student.head.weight
    if not hop:
        held = Teacher(teacher.hidden(ids), teacher.head.weight)
        return analytic_loss(student.hidden(ids), w, y, held, groups=groups, future=future).loss
    first = student.hidden(ids)[:, :-1]  # rows whose token is an input

    def inputs(model: Model) -> Tensor:
        table = model.embedding.weight
        soft = vgkern.noisy_embedding(first, w, table.detach(), y[:, :-1], relaxation="expected")
        hard = table[y[:, :-1]]
        mixed = hop * (soft - soft.detach()) + hard  # the value of hard, hop times its costate
        return torch.cat([table[ids[:, :P]], mixed], 1)

    h, th = student(inputs(student))[:, P - 1 :], teacher(inputs(teacher))[:, P - 1 :]
    lp, lq = (h @ w.T).log_softmax(-1), (th @ teacher.head.weight.T).log_softmax(-1)
    kl = (lp.exp() * (lp - lq)).sum(-1)  # differentiable in the teacher's inputs too
    advantages = future_advantages(kl.detach(), groups, future=future)
    score = vgkern.linear_policy_loss(h, w, y, advantages, objective="rloo").loss
    return kl.sum() / len(ids) + score


@torch.no_grad()
def sequence_kl(student: Model, teacher: Model, prompts: Tensor) -> float:
    ids = rollout(student, prompts.repeat_interleave(16, 0), 77)
    held = (teacher.hidden(ids), teacher.head.weight)
    found = vgkern.linear_divergence(student.hidden(ids), student.head.weight, *held)
    return float(found.divergence.sum() / len(ids))


def distill(seed: int, method: str, a: argparse.Namespace, made: tuple) -> list[float]:
    student, teacher, prompts = copy.deepcopy(made[0]), made[1], made[2]
    adam = torch.optim.Adam(student.parameters(), a.lr)
    curve = [sequence_kl(student, teacher, prompts)]
    groups = torch.zeros(a.rollouts, dtype=torch.int64)
    for step in range(a.steps):
        prompt = prompts[step % PROMPTS].expand(a.rollouts, P)
        ids = rollout(student, prompt, 10_000 * seed + step)
        loss = distill_loss(
            student, teacher, ids, *weight_of(method, step / a.steps), groups=groups
        )
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()
        if (step + 1) % a.every == 0:
            curve.append(sequence_kl(student, teacher, prompts))
    return curve


def crossing(curve: list[float], level: float, unit: float) -> float:
    """Rollouts until the curve is below the level, interpolated; inf: never."""
    for k in range(1, len(curve)):
        if curve[k] <= level:
            up, down = curve[k - 1], curve[k]
            return unit * (k - 1 + (up - level) / max(up - down, 1e-9))
    return math.inf


def final(curve: list[float]) -> float:
    return statistics.mean(curve[-2:])


def distill_part(a: argparse.Namespace) -> dict:
    runs: dict = {}
    for seed in range(a.seeds):
        of = a.model_seed + 1 + seed  # of models and of rollouts
        made = start(of)
        for method in METHODS:
            runs.setdefault(method, []).append(distill(of, method, a, made))
            shown = " ".join(f"{value:.2f}" for value in runs[method][-1])
            print(f"  seed {of} {method:<9} {shown}", flush=True)
    return runs


def gradient_table(found: dict) -> list[str]:
    lines = [
        "",
        "| term | estimator | mse@8 | variance | bias^2 | to_go / this |",
        "|---" * 6 + "|",
    ]
    for name, row in found.items():
        term, estimator = name.split()
        ratio = found[f"{term} to_go"]["mse"] / row["mse"]
        lines.append(
            f"| {term} | {estimator} | {row['mse']:.3g} | {row['variance']:.3g} "
            f"| {row['bias2']:.2g} | {ratio:.1f} |"
        )
    return lines


def distill_table(runs: dict, a: argparse.Namespace) -> list[str]:
    unit = a.every * a.rollouts
    lines = ["", "| method | final KL, mean (each seed) |", "|---|---|"]
    for method, curves in runs.items():
        ends = [final(c) for c in curves]
        each = ", ".join(f"{end:.2f}" for end in ends)
        lines.append(f"| {method} | {statistics.mean(ends):.2f} ({each}) |")
    lines += ["", "| level | method | rollouts, median | analytic / this, median (each seed) |"]
    lines.append("|---" * 4 + "|")
    for share in LEVELS:
        levels = [c[0] + share * (final(c) - c[0]) for c in runs["analytic"]]
        at = {
            method: [crossing(c, x, unit) for c, x in zip(curves, levels, strict=True)]
            for method, curves in runs.items()
        }
        for method, own in at.items():
            ratio = [base / x for base, x in zip(at["analytic"], own, strict=True)]
            lines.append(
                f"| {share:.0%} | {method} | {statistics.median(own):.0f} "
                f"| {statistics.median(ratio):.2f} ({', '.join(f'{r:.2f}' for r in ratio)}) |"
            )
    return lines


def plot(found: dict, runs: dict, a: argparse.Namespace, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if found:
        names = list(found)
        left.barh(names[::-1], [found[name]["mse"] for name in names][::-1], color="tab:blue")
        left.set(xscale="log", xlabel="relative squared error of the gradient, 8 rollouts")
    for method, curves in runs.items():
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        at = [k * a.every * a.rollouts for k in range(len(mean))]
        right.plot(at, mean, label=method)
    if runs:
        right.set(xlabel="rollouts", ylabel=f"KL of an answer, nats ({a.seeds} seeds)")
        right.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--part", choices=("gradient", "distill", "both"), default="both")
    p.add_argument("--model-seed", type=int, default=11)
    p.add_argument("--truth", type=int, default=16384, help="rollouts of the true gradient")
    p.add_argument("--groups", type=int, default=128, help="gradients per estimator")
    p.add_argument("--seeds", type=int, default=5, help="distillation: models and rollouts")
    p.add_argument("--steps", type=int, default=80)
    p.add_argument("--rollouts", type=int, default=16, help="per step")
    p.add_argument("--every", type=int, default=8, help="steps between evaluations")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--out", type=Path, help="folder for the JSON and the PNG")
    a = p.parse_args()
    torch.set_num_threads(1)
    found = gradient_part(a) if a.part != "distill" else {}
    if found:
        print("\n".join(gradient_table(found)), flush=True)
    runs = distill_part(a) if a.part != "gradient" else {}
    if runs:
        print("\n".join(distill_table(runs, a)))
    if a.out is not None:
        a.out.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
        data = {"settings": settings, "torch": torch.__version__, "gradient": found, "runs": runs}
        (a.out / "costate_analytic.json").write_text(json.dumps(data, indent=1) + "\n")
        plot(found, runs, a, a.out / "costate_analytic.png")


if __name__ == "__main__":
    main()
