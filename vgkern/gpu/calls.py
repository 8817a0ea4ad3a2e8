"""Calls of the ops on the inputs of `vgkern.cases`, and how far from fp64 they are.

Truth is plain PyTorch in fp64 *on the device*, by tests/eager; eager is the same in the dtype of
the inputs; the rule is that of `vgkern.cases`.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern import cases
from vgkern.gpu.device import Phase

Inputs = dict[str, Any]
# Two cases an op that reach most of its code, then the one of a dry run, which is small.
CASES = {
    "token_logprobs": ("v1035-ignore", "v1000-softcap", "v31-3d"),
    "linear_token_logprobs": ("h123-v1035-all", "all-cuts", "h7-v31-3d"),
    "group_advantages": ("grpo-ragged", "reinforce_pp_baseline", "grpo-ragged"),
    "policy_loss": ("full", "gspo", "kl-k3"),
    "linear_policy_loss": ("full-bias", "costate-full", "grpo-h7-v31"),
    "linear_sample": ("all-cuts", "per-row-temperature", "h7-v31"),
    "noisy_embedding": ("h123-v1035-all", "expected-all", "h7-v31-3d"),
    "linear_divergence": ("h123-v1035-jsd", "softcap-forward", "h7-v31-3d"),
    "gaussian_action": ("n7-3d", "n6-shared", "n1"),
    "costate_scan": ("n33-done", "diagonal-n33-done", "n1"),
    "linear_rollout": ("n33", "diagonal-n33", "n1"),
}


def chosen(phase: Phase, op: str) -> list[cases.Case]:
    names = CASES[op][2:] if phase.dry else CASES[op][:2]
    found = [cases.by_name(f"{op}-{name}") for name in names]
    return [few_rows(c) for c in found] if phase.dry and op != "group_advantages" else found


def few_rows(case: cases.Case) -> cases.Case:
    """Two of its rows: interpreted, each takes a tenth of a second."""
    by_rows = importlib.import_module("oracle").by_rows

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        made: Inputs = by_rows(case.make(dtype, seed), lambda t: t[:2])
        return made

    return dataclasses.replace(case, make=make)


def dtypes(case: cases.Case) -> list[torch.dtype]:
    return [d for d in case.dtypes if d != torch.float64]


def moved(x: Any, device: torch.device) -> Any:
    """A tensor, or a record of tensors (noise, a costate), on `device`."""
    if isinstance(x, Tensor):
        return x.to(device)
    if dataclasses.is_dataclass(x) and isinstance(x, vgkern.Noise | vgkern.Costate):
        fields = {f.name: moved(getattr(x, f.name), device) for f in dataclasses.fields(x)}
        return type(x)(**fields)
    return x


def on_device(phase: Phase, case: cases.Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    return {k: moved(v, phase.device) for k, v in case.make(dtype, seed).items()}


def call(op: str, backend: str, single: str = "value") -> Callable[..., dict[str, Tensor]]:
    """The op, with its tensors by name; an op of one output has it under `single`."""

    def run(**x: Any) -> dict[str, Tensor]:
        out = getattr(vgkern, op)(**x, backend=backend)
        if isinstance(out, Tensor):
            return {single: out}
        return {k: v for k, v in out._asdict().items() if isinstance(v, Tensor)}

    return run


def upstream(case: cases.Case, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """What arrives at each differentiable output: random, or a number for a loss."""
    if not case.grads:
        return {}
    g = torch.Generator().manual_seed(5)
    found = {}
    for name, t in out.items():
        if name not in ("token", "gap", "scale") and t.is_floating_point():
            loss = case.op.endswith("policy_loss")
            up = torch.tensor(-1.75) if loss else torch.randn(t.shape, generator=g)
            found[name] = up.to(t.device)
    return found


def both(
    function: Callable[..., dict[str, Tensor]], x: Inputs, grads: tuple[str, ...],
    up: dict[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """Values, and gradients under d<name>."""
    leaves = {k: x[k].detach().requires_grad_() for k in grads if isinstance(x.get(k), Tensor)}
    out = function(**{**x, **leaves})
    if not leaves or not up:
        return {k: v.detach() for k, v in out.items()}
    terms = [(out[k] * u.to(out[k].dtype)).sum() for k, u in up.items() if k in out]
    total = torch.stack([t.to(terms[0].dtype) for t in terms]).sum()
    made = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    values = {k: v.detach() for k, v in out.items()}
    return values | {f"d{k}": g for k, g in zip(leaves, made, strict=True)}


def runner(phase: Phase, case: cases.Case, backend: str, x: Inputs) -> Callable[[], Any]:
    """A call of forward and backward of a case, with what arrives from above made once."""
    function = call(case.op, backend)
    up = upstream(case, function(**x))
    return lambda: both(function, x, case.grads, up)


def error_ratio(
    phase: Phase, oracle: Any, case: cases.Case, backend: str, dtype: torch.dtype
) -> tuple[float, bool, str]:
    """(the worst tensor's error / eager's error, whether the rule holds, where)."""
    x = on_device(phase, case, dtype)
    eager = oracle.EAGER[case.op]

    def on_it(**given: Any) -> dict[str, Tensor]:
        with torch.device(phase.device):
            found: dict[str, Tensor] = eager(**given)
        return found

    wide = oracle.fp64(x)
    with torch.no_grad():
        up = upstream(case, on_it(**wide))
    truth, plain = both(on_it, wide, case.grads, up), both(on_it, x, case.grads, up)
    got = both(call(case.op, backend, next(iter(truth))), x, case.grads, up)
    worst = (-1.0, "", 0.0, 0.0)
    decided = truth["gap"] > 1e-3 if "gap" in truth else None
    if decided is not None and not torch.equal(got["token"][decided], truth["token"][decided]):
        wrong = int((got["token"] != truth["token"])[decided].sum())
        return float("nan"), False, f"{wrong} tokens differ with a gap beyond 1e-3"
    for name in [k for k in got if k != "token"]:
        a, b, c = got[name], plain[name], truth[name]
        if decided is not None:
            a, b, c = a[decided], b[decided], c[decided]
            same = (plain["token"] == truth["token"])[decided] | (name == "entropy")
            b = b.where(same, torch.nan)
        scale = truth["scale"] if name == "loss" else None
        error, other, used = oracle.measure(a, b, c, a.dtype, scale)
        worst = max(worst, (used, name, error, other))
    used, name, error, other = worst
    ratio = error / other if other else 0.0
    return ratio, used <= 1, f"{name}: {error:.1e}, eager {other:.1e}, {used:.2f} of allowed"


@contextlib.contextmanager
def several_chunks(rows: int, vocab: int) -> Iterator[str]:
    """Within it a head's rows are made in three chunks or more. Yields "" where that could be
    asked for, else why not: the one place that knows how the kernels choose their chunks."""
    for name, setting in (("memory", "CHUNK_BYTES"), ("linear", "LOGITS_BYTES")):
        try:
            module = importlib.import_module(f"vgkern.kernels.{name}")
            before = getattr(module, setting)
        except (ModuleNotFoundError, AttributeError):
            continue
        setattr(module, setting, max(rows // 3, 1) * vocab * 4)
        try:
            yield ""
        finally:
            setattr(module, setting, before)
        return
    yield "kernels/ has neither memory.CHUNK_BYTES nor linear.LOGITS_BYTES: chunks as they are"
