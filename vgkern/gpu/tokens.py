"""Phase 3: one noise gives one token, whatever the backend; and the same bits in two runs.

Truth is the torch backend in fp64. Where a backend draws another token, what counts is the gap of
the race: z / temperature + noise of truth's token over that of the other, in fp64. It may be within
rounding of fp32 logits (1e-4), never beyond.
"""

import math
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern.gpu.device import Phase
from vgkern.gpu.record import SHORT

VOCABS, VOCABS_TOY = (512, 49152, 128256), (32, 48, 64)
ROWS, ROWS_TOY = 4096, 3
WIDTH = 64
GAP = 1e-4
PART = 256  # rows of fp64 logits and of 64-bit noise at a time
MODES: dict[str, dict[str, Any]] = {
    "plain": {}, "greedy": {"temperature": 0.0},
    "cut": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
}  # fmt: skip


def run(phase: Phase) -> None:
    phase.oracle()
    for backend in phase.backends("linear_sample"):
        same_bits(phase, backend)
    for vocab in VOCABS_TOY if phase.dry else VOCABS:
        for dtype in (torch.float32, torch.bfloat16):
            x = inputs(phase, vocab, dtype)
            for mode, options in MODES.items():
                at = {"dtype": SHORT[dtype], "shape": f"{len(x['hidden'])}x{WIDTH}x{vocab}"}
                one_noise(phase, x, mode, options, at)
            phase.forget()


def inputs(phase: Phase, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    rows = ROWS_TOY if phase.dry else ROWS
    g = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(rows, WIDTH, generator=g)
    weight = torch.randn(vocab, WIDTH, generator=g) * (2.5 / math.sqrt(WIDTH))
    noise = vgkern.Noise(
        2**63 + vocab, torch.arange(rows, device=phase.device) + 2**33,
        torch.arange(rows, device=phase.device) % 977,
    )  # fmt: skip
    x = {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}
    return {**{k: v.to(phase.device) for k, v in x.items()}, "noise": noise}


def part_of(noise: vgkern.Noise, rows: Any) -> vgkern.Noise:
    return vgkern.Noise(noise.seed, noise.sequence[rows], noise.position[rows])


def one_noise(
    phase: Phase, x: dict[str, Any], mode: str, options: dict[str, Any], at: dict[str, str]
) -> None:
    true = truth(x, options)
    for backend in ("cpu", "triton", "cuda", "torch"):

        def measure(backend: str = backend) -> tuple:
            given, noise = x, x["noise"]
            if backend == "cpu":
                noise = vgkern.Noise(noise.seed, noise.sequence.cpu(), noise.position.cpu())
                given = {k: v.cpu() for k, v in x.items() if k != "noise"} | {"noise": noise}
            got = drawn(given, options, backend).to(phase.device)
            other = (got != true).nonzero()[:, 0]
            gaps = [gap(x, options, int(i), int(true[i]), int(got[i])) for i in other[:200]]
            beyond = sum(g > GAP for g in gaps)
            why = f"{len(other)} of {len(got)} differ" if len(other) else ""
            return beyond, beyond == 0, why + (f", by at most {max(gaps):.1e}" if gaps else "")

        metric = f"differ_{mode}"
        phase.check("linear_sample", metric, measure, backend=backend, floor=0, **at)


def drawn(x: dict[str, Any], options: dict[str, Any], backend: str) -> Tensor:
    """Tokens; the torch reference, whose noise is 64 bits a logit, by a few rows at a time."""
    if backend != "torch":
        found: Tensor = vgkern.linear_sample(**x, **options, backend=backend).token
        return found
    parts = []
    for i in range(0, len(x["hidden"]), PART):
        rows = slice(i, i + PART)
        given = (x["hidden"][rows], x["weight"], part_of(x["noise"], rows))
        parts.append(vgkern.linear_sample(*given, **options, backend="torch").token)
    return torch.cat(parts)


def truth(x: dict[str, Any], options: dict[str, Any]) -> Tensor:
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in x.items()}
    return drawn(wide, options, "torch")


def gap(x: dict[str, Any], options: dict[str, Any], row: int, want: int, got: int) -> float:
    """By how much `want` wins over `got` in this row, in fp64."""
    temperature = options.get("temperature", 1.0)
    two = torch.tensor([want, got], device=x["hidden"].device)
    z = x["weight"][two].double() @ x["hidden"][row].double()
    if temperature:
        g = part_of(x["noise"], slice(row, row + 1)).gumbel(len(x["weight"]), torch.float64)[0]
        z = z / temperature + g[two]
    return float(z[0] - z[1])


def same_bits(phase: Phase, backend: str) -> None:
    """Two runs, and a run with its rows in another order: tokens, log-probs and gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(phase, (VOCABS_TOY if phase.dry else VOCABS)[1], dtype)
        order = torch.randperm(len(x["hidden"]), generator=torch.Generator().manual_seed(1))
        order = order.to(phase.device)
        at: dict[str, Any] = {"backend": backend, "dtype": SHORT[dtype], "floor": 0}
        for op, function in {
            "linear_sample": sampled, "linear_token_logprobs": scored, "linear_policy_loss": loss,
        }.items():  # fmt: skip

            def repeated(function: Any = function, x: dict[str, Any] = x) -> tuple:
                return unequal(function(x, backend), function(x, backend))

            def permuted(
                function: Any = function, x: dict[str, Any] = x, order: Tensor = order
            ) -> tuple:
                other = {**x, "hidden": x["hidden"][order], "noise": part_of(x["noise"], order)}
                one, two = function(x, backend), function(other, backend)
                rows = [k for k in one if one[k].ndim and len(one[k]) == len(order)]
                moved, _, why = unequal({k: one[k][order] for k in rows}, two)
                values = [k for k in rows if k[0] != "d" and not torch.equal(one[k][order], two[k])]
                if any(k[0] != "d" for k in rows):
                    return moved, not values, why
                return moved, None, why  # a gradient is a product of the vendor's: told, not held

            phase.check(op, "repeat_bits", repeated, **at)
            phase.check(op, "permuted_bits", permuted, **at)
        phase.forget()


def unequal(one: dict[str, Tensor], two: dict[str, Tensor]) -> tuple:
    counts = {k: int((v != two[k]).sum()) for k, v in one.items()}
    told = ", ".join(f"{n} of {one[k].numel()} in {k}" for k, n in counts.items() if n)
    return sum(counts.values()), not told, told


def sampled(x: dict[str, Any], backend: str) -> dict[str, Tensor]:
    return dict(vgkern.linear_sample(**x, backend=backend)._asdict())


def leaves_of(x: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and weight with gradients, and targets that go with the rows."""
    h, w = (x[k].detach().requires_grad_() for k in ("hidden", "weight"))
    return h, w, (x["noise"].sequence * 31 + x["noise"].position) % len(w)


def scored(x: dict[str, Any], backend: str) -> dict[str, Tensor]:
    h, w, y = leaves_of(x)
    out = vgkern.linear_token_logprobs(h, w, y, backend=backend)
    dh, dw = torch.autograd.grad(out.logp.sum(), (h, w))
    return {"logp": out.logp.detach(), "dhidden": dh, "dweight": dw}


def loss(x: dict[str, Any], backend: str) -> dict[str, Tensor]:
    h, w, y = leaves_of(x)
    a = (x["noise"].position % 5 - 2.5).float()
    given: dict[str, Any] = {"objective": "dapo", "backend": backend}
    out = vgkern.linear_policy_loss(h, w, y, a, **given).loss
    dh, dw = torch.autograd.grad(out, (h, w))
    return {"loss": out.detach(), "dhidden": dh, "dweight": dw}
