"""Phase 2: every op on every backend and dtype, against fp64 on the device; what a bad row does.

Memory that is not written to is NaN throughout (`torch.utils.deterministic`).
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern import cases
from vgkern.gpu import calls, large
from vgkern.gpu.device import Phase
from vgkern.gpu.record import DTYPES, SHORT

HEADS = ("linear_token_logprobs", "linear_policy_loss", "linear_sample", "noisy_embedding",
         "linear_divergence")  # fmt: skip
ROWS, BAD = 6, 2  # rows of the checks of one bad row, and which it is


def work(phase: Phase) -> list[tuple[cases.Case, str, torch.dtype]]:
    """(case, backend, dtype) of every check against fp64."""
    return [
        (case, backend, dtype)
        for op in calls.CASES
        for case in calls.chosen(phase, op)
        for backend in phase.backends(op)
        for dtype in calls.dtypes(case)
    ]


def run(phase: Phase) -> None:
    oracle = phase.oracle()
    torch.use_deterministic_algorithms(True, warn_only=True)  # the second half of filling with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    phase.check("torch.empty", "is_nan", lambda: filled(phase))
    for case, backend, dtype in work(phase):
        measured(phase, oracle, case, backend, dtype, "error_ratio", case.name)
    for op in HEADS:
        for backend in phase.backends(op):
            chunked(phase, oracle, op, backend)
    for op in calls.CASES:
        for backend in phase.backends(op):
            phase.check(op, "waits", partial(waits, phase, op, backend), backend=backend)
    for op in ("token_logprobs", *HEADS):
        for backend in phase.backends(op):
            spoiled(phase, op, backend)
    for backend in phase.backends("linear_policy_loss"):
        large.loss(phase, backend)


def measured(
    phase: Phase, oracle: Any, case: cases.Case, backend: str, dtype: torch.dtype, metric: str,
    shape: str,
) -> None:  # fmt: skip
    phase.check(
        case.op, metric, lambda: calls.error_ratio(phase, oracle, case, backend, dtype), floor=2.0,
        backend=backend, dtype=SHORT[dtype], shape=shape
    )  # fmt: skip


def filled(phase: Phase) -> tuple:
    x = torch.empty(1000, device=phase.device)
    share = float(x.isnan().float().mean())
    return share, share == 1, "an output that no kernel writes would go unseen" * (share < 1)


def chunked(phase: Phase, oracle: Any, op: str, backend: str) -> None:
    """The same check where the rows are made in several chunks."""
    case = calls.chosen(phase, op)[0]
    x = case.make(torch.float32, 0)
    rows = x["hidden"].numel() // x["hidden"].shape[-1]
    metric, shape = "error_ratio_chunks", f"{case.name} several chunks"
    with calls.several_chunks(rows, x["weight"].shape[0]) as why:
        if why:
            phase.fact(op, metric, why=why, backend=backend, dtype="bf16", shape=shape)
            return
        measured(phase, oracle, case, backend, torch.bfloat16, metric, shape)


def waits(phase: Phase, op: str, backend: str) -> tuple:
    """(1 if a call makes the host wait for the device, ...): it could not be captured then."""
    case = calls.chosen(phase, op)[0]
    x = calls.on_device(phase, case, torch.float32)
    run_ = calls.runner(phase, case, backend, x)
    run_()  # compiles
    phase.synchronize()
    with phase.waiting_forbidden():
        try:
            run_()
        except RuntimeError as error:
            return 1, False, str(error)
    return 0, True


# One bad row -------------------------------------------------------------------------------------


def head(phase: Phase, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    h, v = (16, 48) if phase.dry else (256, 4096)
    x = {
        "hidden": torch.randn(ROWS, h, generator=g), "weight": torch.randn(v, h, generator=g),
        "other": torch.randn(v, h, generator=g),
    }  # fmt: skip
    x = {k: (t / h**0.25).to(dtype) for k, t in x.items()}
    x["targets"] = torch.randint(v, (ROWS,), generator=g)
    return {k: t.to(phase.device) for k, t in x.items()}


def rows_of(op: str, backend: str, x: dict[str, Tensor]) -> list[Tensor]:
    """What belongs to each row: values, and the gradient of its hidden state or logits."""
    h, w = x["hidden"].detach().requires_grad_(), x["weight"]
    noise = vgkern.Noise(7, torch.arange(ROWS, device=h.device), torch.zeros_like(x["targets"]))
    if op == "linear_sample":
        return list(vgkern.linear_sample(h, w, noise, backend=backend))
    if op == "noisy_embedding":
        e = vgkern.noisy_embedding(h, w, x["other"], x["targets"], noise, backend=backend)
        return [e.detach(), torch.autograd.grad(e.sum(), h)[0]]
    if op == "linear_divergence":
        d = vgkern.linear_divergence(h, w, h.detach() / 2, x["other"], backend=backend).divergence
        return [d.detach(), torch.autograd.grad(d.sum(), h)[0]]
    if op == "linear_policy_loss":
        a = torch.ones(ROWS, device=h.device)
        given: dict[str, Any] = {"objective": "dapo", "backend": backend}
        loss = vgkern.linear_policy_loss(h, w, x["targets"], a, **given).loss
        return [torch.autograd.grad(loss, h)[0], loss.detach()]
    if op == "token_logprobs":
        h = (x["hidden"] @ w.T).detach().requires_grad_()
        out = vgkern.token_logprobs(h, x["targets"], backend=backend)
    else:
        out = vgkern.linear_token_logprobs(h, w, x["targets"], backend=backend)
    grad = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), h)[0]
    return [out.logp.detach(), out.entropy.detach(), grad]


def spoiled(phase: Phase, op: str, backend: str) -> None:
    """A NaN, and an id outside the vocabulary, in one row: the others keep their bits, and that one
    says NaN. The loss is over all rows: it must be NaN itself."""
    faults = {"nan_stays": "hidden"}
    if op not in ("linear_sample", "linear_divergence", "noisy_embedding"):
        faults["stray_id_stays"] = "targets"
    for metric, what in faults.items():

        def measure(what: str = what) -> tuple:
            x = head(phase, DTYPES["bf16"])
            good = rows_of(op, backend, x)
            x[what] = x[what].clone()
            x[what][BAD] = math.nan if what == "hidden" else x["weight"].shape[0] + 3
            bad = rows_of(op, backend, x)
            keep = torch.arange(ROWS, device=phase.device) != BAD
            if op == "linear_policy_loss":
                nan = bool(bad.pop().isnan())
                good.pop()
            else:
                nan = any(bool(t[BAD].isnan().any()) for t in bad)
            moved = sum(int((a[keep] != b[keep]).sum()) for a, b in zip(good, bad, strict=True))
            why = "" if nan else "nothing says so: no value is NaN. "
            return moved, nan and not moved, why + "values of other rows moved" * (moved > 0)

        phase.check(op, metric, measure, backend=backend, dtype="bf16", floor=0)
