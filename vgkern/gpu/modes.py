"""What a program switches on around an op: autocast, TF32, cudagraph trees; and 2^31 logits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern.gpu.compare import NEAR, apart, verdict
from vgkern.gpu.device import Phase

F32, BF16 = torch.float32, torch.bfloat16
SUM = 1e-4  # by how much the probabilities of a row may miss 1: fp32 over a few thousand ids
SAMPLER = 1e-4  # nats between sampler and scorer: what the trainer warns at


def run(phase: Phase) -> None:
    for backend in phase.backends("linear_policy_loss"):
        at: dict[str, Any] = {"backend": backend, "dtype": "fp32"}
        check = {
            "autocast": partial(autocast, phase, backend),
            "autocast_mixed": partial(mixed, phase, backend),
            "reduce_overhead": partial(reduce_overhead, phase, backend),
        }
        for metric, measure in check.items():
            phase.check("linear_policy_loss", metric, measure, **at)
        phase.check("linear_token_logprobs", "high_precision_sum",
                    partial(tf32_sum, phase, backend), floor=SUM, **at)  # fmt: skip
        phase.check("linear_sample", "high_precision_gap",
                    partial(tf32_gap, phase, backend), floor=SAMPLER, **at)  # fmt: skip
        phase.check("token_logprobs", "beyond_2^31",
                    partial(beyond, phase, backend), backend=backend, dtype="bf16")  # fmt: skip


def batch(phase: Phase, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    b, t, h, v = (2, 2, 16, 48) if phase.dry else (8, 32, 256, 4096)
    g = torch.Generator().manual_seed(seed)
    x = {
        "hidden": torch.randn(b, t, h, generator=g).to(dtype),
        "weight": (torch.randn(v, h, generator=g) / h**0.5).to(dtype),
        "targets": torch.randint(v, (b, t), generator=g),
        "advantages": torch.randn(b, generator=g),
    }
    return {k: v.to(phase.device) for k, v in x.items()}


def loss(x: dict[str, Any], backend: str) -> dict[str, Tensor]:
    leaves = {k: x[k].detach().requires_grad_() for k in ("hidden", "weight")}
    given = {**x, **leaves, "objective": "dapo", "backend": backend}
    out = vgkern.linear_policy_loss(**given).loss
    dh, dw = torch.autograd.grad(out, list(leaves.values()))
    return {"loss": out.detach(), "dhidden": dh, "dweight": dw}


def autocast(phase: Phase, backend: str) -> tuple:
    """Under bf16 autocast fp32 inputs give what they give without it."""
    x = batch(phase, F32)
    with torch.autocast(phase.device.type, dtype=BF16):
        got = loss(x, backend)
    return verdict(*apart(got, loss(x, backend)))


def mixed(phase: Phase, backend: str) -> tuple:
    """The usual setting: bf16 hidden states out of an autocast model, an fp32 master head."""
    x = batch(phase, F32)
    low = {**x, "hidden": x["hidden"].to(BF16)}
    try:
        with torch.autocast(phase.device.type, dtype=BF16):
            got = loss(low, backend)
    except TypeError as error:
        return None, None, f"refused, and the reason said: {error}"
    want = loss({**low, "hidden": low["hidden"].float()}, backend)
    return verdict(*apart(got, want), BF16)


def reduce_overhead(phase: Phase, backend: str) -> tuple:
    """Loss and backward pass in torch's own CUDA graphs, three times with new data: the gradients
    that forward made are scaled in place in memory that belongs to the graph."""
    torch._dynamo.reset()
    how: dict[str, Any] = {"backend": "eager"} if phase.dry else {"mode": "reduce-overhead"}

    def step(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
        given: dict[str, Any] = {"objective": "dapo", "backend": backend}
        return 1.5 * vgkern.linear_policy_loss(hidden, weight, targets, advantages, **given).loss

    compiled = torch.compile(step, fullgraph=True, **how)
    worst, where = 0.0, ""
    for seed in range(4):
        if not phase.dry:
            torch.compiler.cudagraph_mark_step_begin()
        x = batch(phase, F32, seed)
        leaves = [x[k].requires_grad_() for k in ("hidden", "weight")]
        results = []
        for function in (compiled, step):
            out = function(**x)
            grads = torch.autograd.grad(out, leaves)
            names = ("loss", "dhidden", "dweight")
            results.append(
                {k: t.detach().clone() for k, t in zip(names, (out, *grads), strict=True)}
            )
        worst, where = max((worst, where), apart(*results))
    return worst, worst <= NEAR[F32], where


class High:
    """torch.set_float32_matmul_precision("high") within: products of fp32 in TF32."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def tf32_sum(phase: Phase, backend: str) -> tuple:
    """The gradient of the bias is sum_i (onehot - p): over the ids it adds up to 0 only where the
    logits of backward are those of the forward pass."""
    x = batch(phase, F32)
    bias = torch.zeros(len(x["weight"]), device=phase.device, requires_grad=True)
    with High():
        out = vgkern.linear_token_logprobs(
            x["hidden"] * 8, x["weight"], x["targets"], bias=bias, backend=backend
        )
        (db,) = torch.autograd.grad(out.logp.sum(), bias)
    missed = float(db.double().sum().abs()) / x["targets"].numel()
    return missed, missed <= SUM


def tf32_gap(phase: Phase, backend: str) -> tuple:
    """Nats between the log-prob that the sampler gives and that of the scorer."""
    x = batch(phase, F32)
    h = x["hidden"].flatten(0, 1) * 4
    rows = torch.arange(len(h), device=phase.device)
    noise = vgkern.Noise(3, rows, torch.zeros_like(rows))
    with High():
        drawn = vgkern.linear_sample(h, x["weight"], noise, backend=backend)
        scored = vgkern.linear_token_logprobs(h, x["weight"], drawn.token, backend=backend)
    far = float((drawn.logp - scored.logp).abs().max())
    return far, far <= SAMPLER


def beyond(phase: Phase, backend: str) -> tuple:
    """The last row of more logits than 32 bits count has the bits that it has alone."""
    n, v = (40, 33) if phase.dry else (16_896, 128_256)
    g = torch.Generator(phase.device).manual_seed(2)
    z = torch.randn(n, v, generator=g, device=phase.device, dtype=BF16)
    y = torch.randint(v, (n,), generator=g, device=phase.device)
    alone = vgkern.token_logprobs(z[-1:], y[-1:], backend=backend).logp
    same = torch.equal(vgkern.token_logprobs(z, y, backend=backend).logp[-1:], alone)
    del z
    phase.forget()
    return n * v, same, "" if same else "the last row has other bits"
