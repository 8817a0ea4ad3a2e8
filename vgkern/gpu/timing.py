"""Phase 4: times, in order of what matters most, each beside its floor and the others' times."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern import cases
from vgkern.gpu import calls, timing_loss
from vgkern.gpu.clock import Call, interleaved
from vgkern.gpu.device import Phase
from vgkern.gpu.record import SHORT, said
from vgkern.gpu.shapes import (
    BATCHES,
    BATCHES_TOY,
    SAMPLER,
    SAMPLER_TOY,
    loss_inputs,
    loss_shapes,
    name_of,
)

BF16, F32 = torch.bfloat16, torch.float32


def run(phase: Phase) -> None:
    phase.oracle()
    timing_loss.run(phase)
    for name in ("large", "small H"):
        guarded(phase, "linear_token_logprobs", logprobs, loss_shapes(phase)[name])
    for head in SAMPLER:
        for batch in BATCHES_TOY if phase.dry else BATCHES:
            guarded(phase, "linear_sample", samples, head, batch)
    for name, dtype in (("large", F32), ("large", BF16), ("small H", F32)):
        guarded(phase, "row_stats", rows, loss_shapes(phase)[name], dtype)
    for op in ("policy_loss", "group_advantages", "costate_scan", "gaussian_action"):
        guarded(phase, op, alone, op)
    for name, shape in loss_shapes(phase).items():
        share = {"large": 0.4, "small H": 0.5, "launches": 0.9}[name]
        guarded(phase, "linear_policy_loss others", timing_loss.beside_others, shape, share)


def guarded(phase: Phase, op: str, block: Callable[..., None], *arguments: Any) -> None:
    """What a block raises, out of memory say, costs that block. A time never fails, but a block
    without any is told."""
    phase.forget()
    try:
        block(phase, *arguments)
    except Exception as error:
        phase.fact(op, "not_timed", shape=str(arguments[0]), why=said(error), ok=False)


def times(
    phase: Phase, op: str, variants: dict[str, list[Call] | str], floor: float, shape: str,
    dtype: torch.dtype, rate: float = 0.0, share: float = 0.5,
) -> None:  # fmt: skip
    """Facts in ms each, with the floor in seconds; and of `rate` bytes the GB/s on the device."""
    at: dict[str, Any] = {"shape": shape, "dtype": SHORT[dtype]}
    for name, time in interleaved(phase, variants, share).items():
        ms = None if time.seconds is None else 1e3 * time.seconds
        ours = name.split()[0] in ("triton", "cuda") and ms is None and "no time" not in time.why
        phase.fact(
            op, "ms", ms, backend=name, floor=1e3 * floor, why=time.why, **at,
            ok=False if ours else None,
        )  # fmt: skip
        device = None if time.device is None else 1e3 * time.device
        phase.fact(op, "device_ms", device, backend=name, floor=1e3 * floor, **at)
        if rate:
            speed = rate / time.device / 1e9 if time.device else None
            phase.fact(op, "GB/s", speed, backend=name, floor=phase.ceilings()["copy"] / 1e9, **at)


def logprobs(phase: Phase, shape: tuple[int, int, int]) -> None:
    """Scoring, and forward and backward."""
    n, h, v = shape
    x = loss_inputs(phase, shape, BF16)
    hidden, y, w = x["hidden"].reshape(n, h), x["targets"].reshape(n), x["weight"]
    leaves = (hidden.detach().requires_grad_(), w.detach().requires_grad_())
    product = 2 * n * h * v / phase.ceilings()["bf16"]
    z = torch.empty(n, v, dtype=BF16, device=phase.device)

    def ours(backend: str) -> Call:
        return lambda: vgkern.linear_token_logprobs(hidden, w, y, backend=backend)

    def eager() -> Tensor:
        lp = (hidden @ w.T).log_softmax(-1)
        return lp.gather(1, y[:, None])

    fwd: dict[str, list[Call] | str] = {
        "gemm": [lambda: torch.mm(hidden, w.T, out=z)], "triton": [ours("triton")],
        "cuda": [ours("cuda")], "eager": [eager],
    }  # fmt: skip
    with torch.no_grad():
        times(phase, "linear_token_logprobs fwd", fwd, product, name_of(shape), BF16, share=0.3)

    def both(backend: str) -> Call:
        def call() -> Any:
            out = vgkern.linear_token_logprobs(*leaves, y, backend=backend)
            return torch.autograd.grad(out.logp.sum(), leaves)

        return call

    def plain() -> Any:
        lp = (leaves[0] @ leaves[1].T).log_softmax(-1)
        return torch.autograd.grad(lp.gather(1, y[:, None]).float().sum(), leaves)

    two: dict[str, list[Call] | str] = {
        "triton": [both("triton")], "cuda": [both("cuda")], "eager": [plain],
    }  # fmt: skip
    op = "linear_token_logprobs fwd+bwd"
    times(phase, op, two, 3 * product, name_of(shape), BF16, share=0.3)


def samples(phase: Phase, head: str, batch: int) -> None:
    """A decoding step's sampler: launched, and in a CUDA graph."""
    h, v = (SAMPLER_TOY if phase.dry else SAMPLER)[head]
    device = phase.device
    x = torch.randn(batch, h, device=device).to(BF16)
    w = (torch.randn(v, h, device=device) * 2.5 / h**0.5).to(BF16)
    noise = vgkern.Noise(
        5, torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    )
    z = torch.empty(batch, v, dtype=BF16, device=device)

    def ours(backend: str, **cut: Any) -> Call:
        return lambda: vgkern.linear_sample(x, w, noise, backend=backend, **cut)

    def multinomial() -> Tensor:
        p = (x @ w.T).float().softmax(-1)
        return torch.multinomial(p, 1)

    calls_: dict[str, Call] = {
        "gemm": lambda: torch.mm(x, w.T, out=z), "eager": multinomial,
        "triton": ours("triton"), "cuda": ours("cuda"),
        "triton top_p": ours("triton", top_p=0.95), "cuda top_p": ours("cuda", top_p=0.95),
    }  # fmt: skip
    variants: dict[str, list[Call] | str] = {k: [c] for k, c in calls_.items()}
    for name in ("gemm", "triton", "cuda"):
        try:
            variants[f"{name} graph"] = [phase.captured(calls_[name])[0]]
        except Exception as error:
            variants[f"{name} graph"] = said(error)
    limits = phase.ceilings()
    floor = max(2 * batch * h * v / limits["bf16"], 2 * v * h / limits["copy"])
    times(phase, "linear_sample", variants, floor, f"{batch}x{h}x{v}", BF16, share=0.2)


def rows(phase: Phase, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The row kernels, which are bytes: statistics (one read) and gradient (a read and a write)."""
    n, v = shape[0] // (1 if phase.dry else 2), shape[2]
    z = torch.randn(n, v, device=phase.device, dtype=dtype)
    y = torch.randint(v, (n,), device=phase.device)
    limits = phase.ceilings()
    made: dict[str, list[Call] | str] = {"logsumexp": [lambda: torch.logsumexp(z, -1)]}
    back: dict[str, list[Call] | str] = {"copy": [lambda: other.copy_(z)]}
    other = torch.empty_like(z)
    for backend in phase.backends("token_logprobs"):
        made[backend] = [partial(vgkern.token_logprobs, z, y, backend=backend)]
        leaf = z.detach().requires_grad_()
        logp = vgkern.token_logprobs(leaf, y, backend=backend).logp.sum()
        back[backend] = [partial(torch.autograd.grad, logp, leaf, retain_graph=True)]
    at = (f"{n}x{v}", dtype)
    times(phase, "row_stats", made, z.nbytes / limits["copy"], *at, rate=z.nbytes, share=0.2)
    times(
        phase, "row_grad", back, 2 * z.nbytes / limits["copy"], *at, rate=2 * z.nbytes, share=0.2
    )  # fmt: skip


def alone(phase: Phase, op: str) -> None:
    """An op without a head, at the size of its benchmark."""
    case = next(c for c in cases.BENCH if c.op == op)
    if phase.dry:
        case = calls.chosen(phase, op)[0]
    x = calls.on_device(phase, case, F32)
    names = (*phase.backends(op), *(() if op == "costate_scan" else ("torch",)))
    variants: dict[str, list[Call] | str] = {}
    for backend in names:
        try:
            variants[backend] = [calls.runner(phase, case, backend, x)]
        except Exception as error:
            variants[backend] = said(error)
    floor = case.bytes(x) / phase.ceilings()["copy"]
    times(phase, op, variants, floor, case.name, F32, share=0.2)
