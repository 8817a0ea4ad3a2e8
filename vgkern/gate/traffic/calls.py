"""The calls that are counted: an op at a shape that people train with, forward or with backward.

Names are `op pass shape`. The tensors have no data: they come from `count.tensor`, in the call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vgkern
from vgkern.gate.traffic.count import Count, count, tensor

BF16, F32, I64, F64 = torch.bfloat16, torch.float32, torch.int64, torch.float64
LARGE, SMOL, TINY = (8192, 4096, 131072), (8192, 576, 49152), (1024, 256, 512)  # N, H, V
TEACHER = 960  # width of the teacher's hidden states
SEQUENCES = 8  # that the rows of a loss are of
CUT = {"top_k": 50, "top_p": 0.95}


class Call(NamedTuple):
    op: str
    what: str  # pass and options
    shape: tuple[int, ...]
    run: Callable[[str], Any]  # on a backend, within `count`
    backends: tuple[str, ...] = ("triton", "cuda")
    live: int | None = None  # rows that have a gradient; None: all

    @property
    def name(self) -> str:
        return f"{self.op} {self.what} {'x'.join(map(str, self.shape))}"

    def counted(self, backend: str) -> Count:
        return count(lambda: self.run(backend), backend, self.live)


def calls() -> list[Call]:
    return [*_losses(), *_scores(), *_samples(), *_tokens(), *_credit(), *_continuous()]


def named(name: str) -> Call:
    return next(x for x in calls() if x.name == name)


def _head(n: int, h: int, v: int, frozen: bool = False, grad: bool = True) -> tuple[Tensor, Tensor]:
    hidden = tensor(n, h, dtype=BF16, grad=grad)
    return hidden, tensor(v, h, dtype=BF16, grad=grad and not frozen)


def _noise(*shape: int) -> vgkern.Noise:
    return vgkern.Noise(7, tensor(*shape, dtype=I64), tensor(*shape, dtype=I64))


def _grads(loss: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [x for x in wanted if x.requires_grad])


def _losses() -> list[Call]:
    def loss(shape: tuple[int, int, int], frozen: bool) -> Callable[[str], Any]:
        n, h, v = shape
        b, t = SEQUENCES, n // SEQUENCES

        def run(backend: str) -> Any:
            hidden, weight = _head(n, h, v, frozen)
            out = vgkern.linear_policy_loss(
                hidden.view(b, t, h), weight, tensor(b, t, dtype=I64), tensor(b),
                old_logp=tensor(b, t), mask=tensor(b, t, dtype=torch.bool), objective="grpo",
                backend=backend
            )  # fmt: skip
            return out, _grads(out.loss, hidden, weight)

        return run

    made = []
    for shape in (LARGE, SMOL, TINY):
        made.append(Call("linear_policy_loss", "full", shape, loss(shape, False)))
        made.append(Call("linear_policy_loss", "frozen", shape, loss(shape, True)))
    half = loss(LARGE, False)
    return [*made, Call("linear_policy_loss", "half-live", LARGE, half, live=LARGE[0] // 2)]


def _scores() -> list[Call]:
    def score(shape: tuple[int, int, int], grad: bool, cut: dict[str, Any]) -> Callable[[str], Any]:
        n, h, v = shape

        def run(backend: str) -> Any:
            hidden, weight = _head(n, h, v, grad=grad)
            out = vgkern.linear_token_logprobs(
                hidden, weight, tensor(n, dtype=I64), backend=backend, **cut
            )
            if not grad:
                return out
            down = tensor(n)
            return out, torch.autograd.grad(out.logp, (hidden, weight), down)

        return run

    op = "linear_token_logprobs"
    made = []
    for shape in (LARGE, SMOL):
        made.append(Call(op, "fwd", shape, score(shape, False, {})))
        made.append(Call(op, "both", shape, score(shape, True, {})))
    return [*made, Call(op, "truncated", SMOL, score(SMOL, True, CUT))]


def _samples() -> list[Call]:
    def sample(b: int, h: int, v: int, cut: dict[str, Any]) -> Callable[[str], Any]:
        def run(backend: str) -> Any:
            hidden, weight = _head(b, h, v, grad=False)
            return vgkern.linear_sample(hidden, weight, _noise(b), backend=backend, **cut)

        return run

    return [
        Call("linear_sample", "truncated" if cut else "plain", (b, *hv), sample(b, *hv, cut))
        for hv in (LARGE[1:], SMOL[1:])
        for b in (1, 64, 256)
        for cut in ({}, CUT)
    ]


def _tokens() -> list[Call]:
    def logprobs(n: int, v: int, grad: bool) -> Callable[[str], Any]:
        def run(backend: str) -> Any:
            logits = tensor(n, v, dtype=BF16, grad=grad)
            out = vgkern.token_logprobs(logits, tensor(n, dtype=I64), backend=backend)
            return out, torch.autograd.grad(out.logp, logits, tensor(n)) if grad else None

        return run

    def loss(objective: str, *shape: int) -> Callable[[str], Any]:
        def run(backend: str) -> Any:
            logp = tensor(*shape, grad=True)
            out = vgkern.policy_loss(
                logp, tensor(shape[0]), objective=objective, old_logp=tensor(*shape),
                mask=tensor(*shape, dtype=torch.bool), backend=backend
            )  # fmt: skip
            return out, _grads(out.loss, logp)

        return run

    def advantages(b: int) -> Callable[[str], Any]:
        return lambda backend: vgkern.group_advantages(
            tensor(b), tensor(b, dtype=I64), backend=backend
        )

    rows, grid = (LARGE[0], LARGE[2]), (256, 4096)
    return [
        Call("token_logprobs", "fwd", rows, logprobs(*rows, False)),
        Call("token_logprobs", "both", rows, logprobs(*rows, True)),
        Call("policy_loss", "grpo", grid, loss("grpo", *grid)),
        Call("policy_loss", "gspo", grid, loss("gspo", *grid)),
        Call("group_advantages", "grpo", (512,), advantages(512)),
    ]


def _credit() -> list[Call]:
    def embedding(n: int, h: int, v: int) -> Callable[[str], Any]:
        def run(backend: str) -> Any:
            hidden, weight = _head(n, h, v)
            table = tensor(v, h, dtype=BF16, grad=True)
            given = (hidden, weight, table)
            x = vgkern.noisy_embedding(*given, tensor(n, dtype=I64), _noise(n), backend=backend)
            return x, torch.autograd.grad(x, given, tensor(n, h, dtype=BF16))

        return run

    def divergence(n: int, h: int, v: int, teacher: int, grad: bool) -> Callable[[str], Any]:
        def run(backend: str) -> Any:
            given = _head(n, h, v, grad=grad)
            other = _head(n, teacher, v, grad=False)
            out = vgkern.linear_divergence(*given, *other, backend=backend)
            return out, torch.autograd.grad(out[0], given, tensor(n)) if grad else None

        return run

    op, only = "linear_divergence", ("triton",)
    return [
        Call("noisy_embedding", "both", SMOL, embedding(*SMOL)),
        Call(op, "fwd", (*SMOL, TEACHER), divergence(*SMOL, TEACHER, False), only),
        Call(op, "both", (*SMOL, TEACHER), divergence(*SMOL, TEACHER, True), only),
    ]


def _continuous() -> list[Call]:
    def gaussian(n: int, width: int) -> Callable[[str], Any]:
        def run(backend: str) -> Any:
            mean, log_std = tensor(n, width, grad=True), tensor(n, width, grad=True)
            out = vgkern.gaussian_action(mean, log_std, _noise(n), backend=backend)
            down = (tensor(n, width), tensor(n))
            return out, torch.autograd.grad((out.action, out.logp), (mean, log_std), down)

        return run

    def scan(b: int, t: int, n: int) -> Callable[[str], Any]:
        def run(backend: str) -> Any:
            given = [tensor(b, t, n, n, grad=True), tensor(b, t, n, grad=True)]
            given.append(tensor(b, n, grad=True))
            out = vgkern.costate_scan(*given, gamma=0.99, backend=backend)
            return out, torch.autograd.grad(out, given, tensor(b, t + 1, n))

        return run

    def rollout(b: int, t: int, n: int) -> Callable[[str], Any]:
        def run(backend: str) -> Any:
            matrix, first = tensor(b, t, n, n, grad=True), tensor(b, n, grad=True)
            drift, sigma = tensor(b, t, n, grad=True), tensor(b, t, n, grad=True)
            given = (matrix, drift, sigma, first)
            out = vgkern.linear_rollout(*given, _noise(b, t), backend=backend)
            return out, torch.autograd.grad(out, given, tensor(b, t + 1, n))

        return run

    wide, small, large = (65536, 64), (256, 256, 64), (256, 256, 200)
    return [
        Call("gaussian_action", "both", wide, gaussian(*wide)),
        Call("costate_scan", "both", small, scan(*small)),
        Call("costate_scan", "both", large, scan(*large)),
        Call("linear_rollout", "both", small, rollout(*small)),
    ]
