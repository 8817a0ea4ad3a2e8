"""linear_policy_loss against its floor, the bare products and everything else that is installed;
its parts; its launches; its memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern.bench import rivals
from vgkern.bench.rivals import eager as plain
from vgkern.gpu import timing
from vgkern.gpu.clock import Call
from vgkern.gpu.device import Phase
from vgkern.gpu.record import said
from vgkern.gpu.shapes import Shape, copies, loss_inputs, loss_shapes, name_of

BF16 = torch.bfloat16
OTHERS = ("TRL", "Liger", "cut-cross-entropy")
Forward = Callable[[dict[str, Any]], Tensor]


def run(phase: Phase) -> None:
    for name, shape in loss_shapes(phase).items():
        share = {"large": 0.45, "small H": 0.35, "launches": 0.3}[name]
        timing.guarded(phase, "linear_policy_loss", loss, shape, share)
    for name in ("large", "small H"):
        timing.guarded(phase, "loss part", parts, loss_shapes(phase)[name])


def loss(phase: Phase, shape: Shape, share: float) -> None:
    n, h, v = shape
    nbytes = 2 * (n * h + v * h)
    inputs = [loss_inputs(phase, shape, BF16, seed) for seed in range(copies(nbytes, phase.dry))]
    product = 2 * n * h * v / phase.ceilings()["bf16"]
    at = (name_of(shape), BF16)
    both: dict[str, list[Call] | str] = {"3 gemms": products(phase, inputs, 3)}
    head: dict[str, list[Call] | str] = {"2 gemms": products(phase, inputs, 2)}
    forwards: dict[str, Forward] = {b: ours(b) for b in phase.backends("linear_policy_loss")}
    forwards["eager"] = first_of(plain.linear_policy_loss)
    for name, forward in forwards.items():
        both[name] = [gradients(forward, x, ("hidden", "weight")) for x in inputs]
        head[name] = [gradients(forward, x, ("hidden",)) for x in inputs]
    timing.times(phase, "linear_policy_loss", both, 3 * product, *at, share=share)
    timing.times(phase, "linear_policy_loss frozen", head, 2 * product, *at, share=share / 2)
    memory(phase, forwards, inputs[0], name_of(shape))
    launches(phase, inputs[0], name_of(shape))


def first_of(function: Callable[[dict[str, Any]], Any]) -> Forward:
    """The loss of what gives a tuple."""

    def forward(x: dict[str, Any]) -> Tensor:
        found: Tensor = function(x)[0]
        return found

    return forward


def ours(backend: str) -> Forward:
    return lambda x: vgkern.linear_policy_loss(**x, backend=backend).loss


def gradients(forward: Forward, x: dict[str, Any], names: tuple[str, ...]) -> Call:
    """A call of forward and backward with the gradients of these inputs."""
    leaves = {k: x[k].detach().requires_grad_() for k in names}
    given = {**x, **leaves}
    return lambda: torch.autograd.grad(forward(given), list(leaves.values()))


def products(phase: Phase, inputs: list[dict[str, Any]], count: int) -> list[Call]:
    """The whole products that no exact kernel can avoid, into memory that is there: 16 bits in and
    out."""
    h, w = inputs[0]["hidden"].flatten(0, -2), inputs[0]["weight"]
    z = torch.empty(len(h), len(w), dtype=BF16, device=phase.device)
    dh, dw = torch.empty_like(h), torch.empty_like(w)

    def of(x: dict[str, Any]) -> Call:
        h, w = x["hidden"].flatten(0, -2), x["weight"]

        def call() -> None:
            torch.mm(h, w.T, out=z)
            torch.mm(z, w, out=dh)
            if count == 3:
                torch.mm(z.T, h, out=dw)

        return call

    return [of(x) for x in inputs]


def others(phase: Phase, inputs: list[dict[str, Any]]) -> dict[str, list[Call] | str]:
    """torch.compile, torch's own fused head where it has one, and the libraries installed."""
    found: dict[str, list[Call] | str] = {}
    names = ("hidden", "weight")
    torch._dynamo.reset()
    compiled = torch.compile(
        plain.linear_policy_loss, dynamic=False, backend="eager" if phase.dry else "inductor"
    )
    found["compile"] = [gradients(first_of(compiled), x, names) for x in inputs]
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is None:
        found["linear_cross_entropy"] = f"torch {torch.__version__} has no linear_cross_entropy"
    else:

        def forward(x: dict[str, Any]) -> Tensor:
            h, y = x["hidden"].flatten(0, -2), x["targets"].flatten()
            nll = fused(h, x["weight"], y, reduction="none")
            return plain.row_loss(-nll.view_as(x["targets"]), x)

        found["linear_cross_entropy"] = [gradients(forward, x, names) for x in inputs]
    for name in OTHERS:
        try:
            rival = next(r for r in rivals.RIVALS if r.name == name)()
            rival.load(phase.device)
            found[name] = [gradients(first_of(rival.forward("linear_policy_loss")), x, names)
                           for x in inputs]  # fmt: skip
        except Exception as error:
            found[name] = said(error)
    return found


def beside_others(phase: Phase, shape: Shape, share: float) -> None:
    """What others have, in turn with ours: last, since a compiler may take long or never end."""
    n, h, v = shape
    nbytes = 2 * (n * h + v * h)
    inputs = [loss_inputs(phase, shape, BF16, seed) for seed in range(copies(nbytes, phase.dry))]
    names = ("hidden", "weight")
    variants: dict[str, list[Call] | str] = {
        "triton": [gradients(ours("triton"), x, names) for x in inputs]
    }
    variants |= others(phase, inputs)
    floor = 6 * n * h * v / phase.ceilings()["bf16"]
    op = "linear_policy_loss others"
    timing.times(phase, op, variants, floor, name_of(shape), BF16, share=share)


def memory(phase: Phase, forwards: dict[str, Forward], x: dict[str, Any], shape: str) -> None:
    """MiB beside the inputs, both gradients included."""
    h, w = x["hidden"], x["weight"]
    floor = (h.nbytes + w.nbytes) / 2**20
    for name, forward in forwards.items():
        at = {"backend": name, "shape": shape, "dtype": "bf16", "floor": floor}
        try:
            peak = phase.peak(gradients(forward, x, ("hidden", "weight")))
            phase.fact("linear_policy_loss", "peak_MiB", peak, **at)
        except Exception as error:
            phase.fact("linear_policy_loss", "peak_MiB", why=said(error), **at)
        phase.forget()


def launches(phase: Phase, x: dict[str, Any], shape: str) -> None:
    """Everything that one call puts on the device, copies and fills included."""
    for name in phase.backends("linear_policy_loss"):
        at: dict[str, Any] = {"backend": name, "shape": shape, "dtype": "bf16"}
        try:
            found = phase.kernels(gradients(ours(name), x, ("hidden", "weight")))
            count = len(found)
            why = "" if count else "torch.profiler saw nothing on the device"
            phase.fact("linear_policy_loss", "launches", count or None, why=why, **at)
        except Exception as error:
            phase.fact("linear_policy_loss", "launches", why=said(error), **at)


def parts(phase: Phase, shape: Shape) -> None:
    """What a loss is made of, one after another, over as many rows as a chunk may have."""
    n, h, v = shape
    rows = min(n, 4096 if v > 100_000 else n)
    x = loss_inputs(phase, (rows, h, v), BF16)
    hidden, w, y = x["hidden"].reshape(rows, h), x["weight"], x["targets"].reshape(rows)
    limits = phase.ceilings()
    product = 2 * rows * h * v / limits["bf16"]
    z = torch.empty(rows, v, device=phase.device)  # fp32
    dz, dw = z.to(BF16), torch.zeros(v, h, device=phase.device)
    dh = torch.empty(rows, h, device=phase.device)
    at = (name_of((rows, h, v)), BF16)

    def mm(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> Any:
        if phase.dry:  # a CPU has no product of 16 bits into fp32
            return out.addmm_(a.float(), b.float(), beta=float(add))
        if add:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)

    of: dict[str, tuple[Call, float]] = {
        "logits GEMM, fp32 out": (lambda: mm(z, hidden, w.T), product),
        "logits GEMM, bf16 out": (lambda: torch.mm(hidden, w.T, out=dz), product),
        "dh GEMM, fp32 out": (lambda: mm(dh, dz, w), product),
        "dW GEMM, fp32 out": (lambda: mm(dw, dz.T, hidden), product),
        "dW GEMM, added (beta 1)": (lambda: mm(dw, dz.T, hidden, add=True), product),
        "dW add_ alone": (lambda: dw.add_(dw), 3 * dw.nbytes / limits["copy"]),
        "dW rounding": (lambda: dw.to(BF16), 1.5 * dw.nbytes / limits["copy"]),
    }  # fmt: skip
    for name, (call, floor) in of.items():
        timing.times(phase, "loss part", {name: [call]}, floor, *at, share=0.05)
    for backend in phase.backends("token_logprobs"):  # no product writes over z from here on
        leaf = z.detach().requires_grad_()
        logp = vgkern.token_logprobs(leaf, y, backend=backend).logp.sum()
        row: dict[str, tuple[Call, float]] = {
            "stats": (partial(vgkern.token_logprobs, z, y, backend=backend), 1),
            "grad": (partial(torch.autograd.grad, logp, leaf, retain_graph=True), 2),
        }
        for name, (call, passes) in row.items():
            floor = passes * z.nbytes / limits["copy"]
            timing.times(phase, "loss part", {f"{backend} {name}": [call]}, floor, *at, share=0.05)
