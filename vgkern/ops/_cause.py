"""Why a log-probability is NaN: looked for once one is, on CPU, where looking costs nothing."""

import torch
from torch import Tensor

from vgkern.ops import _check
from vgkern.ops._check import NonFiniteError

BIAS = "finite numbers, or -inf for an id that is never produced"


def no_nan(
    found: Tensor,  # [...] that must hold no NaN, or [] of all rows
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,
    temperature: float | Tensor = 1.0,  # one, or [...]
    live: Tensor | None = None,  # [...]: the rows that count; None: all
    teacher: tuple[Tensor, Tensor] | None = None,  # another head's hidden and weight
) -> None:
    """One NonFiniteError that names the argument, what it was and what is allowed."""
    if not _check.can_look(found.device) or not bool(found.isnan().any()):
        return
    found, rows = found.detach(), hidden.shape[:-1]
    sick = found.isnan().expand(rows) if found.ndim == 0 else found.isnan().view(rows)
    if live is not None:
        sick = sick & live.view(rows)
    why = _why(sick, hidden.detach(), weight.detach(), bias, temperature, "")
    if why is None and teacher is not None:
        h, w = (t.detach() for t in teacher)
        why = _why(sick, h.view(*rows, -1), w, None, temperature, "teacher_")
    at = _first(sick) if bool(sick.any()) else []
    raise NonFiniteError(
        why or f"hidden: the log-probability is NaN at row {at}; allowed: logits without NaN"
    )


def _why(
    sick: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    prefix: str,
) -> str | None:
    bad = ~hidden.isfinite().all(-1) & sick
    if bool(bad.any()):
        at = _first(bad)
        got = f"{_one(hidden[tuple(at)])} at row {at}"
        return f"{prefix}hidden: got {got}; allowed: finite numbers"
    if (why := _head(weight, bias, prefix)) is not None:
        return why
    for at in sick.nonzero().tolist():
        if why := _row(tuple(at), hidden, weight, bias, temperature, prefix):
            return why
    return None


def no_nan_logits(found: Tensor, logits: Tensor, temperature: float) -> None:
    """The same for logits [..., V] themselves."""
    if not _check.can_look(found.device) or not bool(found.detach().isnan().any()):
        return
    at = _first(found.detach().isnan())
    z = logits.detach()[tuple(at)]
    bad = z.isnan() | (z == torch.inf)
    if bool(bad.any()):
        got = f"{_one(z[bad])} at row {at}"
        raise NonFiniteError(
            f"logits: got {got}; allowed: finite numbers, or -inf for a blocked id"
        )
    most = float(z.double()[z > -torch.inf].abs().max())
    raise NonFiniteError(_overflow(temperature, most, at, "logits"))


def _head(weight: Tensor, bias: Tensor | None, prefix: str) -> str | None:
    if not bool(weight.isfinite().all()):
        at = _first(~weight.isfinite())
        got = f"{_one(weight[tuple(at)])} at {at}"
        return f"{prefix}weight: got {got}; allowed: finite numbers"
    if bias is None:
        return None
    bias = bias.detach()
    bad = bias.isnan() | (bias == torch.inf)
    if bool(bad.any()):
        at = _first(bad)
        return f"bias: got {_one(bias[at[0]])} at {at}; allowed: {BIAS}"
    if bool((bias == -torch.inf).all()):
        return f"bias: got -inf for every id; allowed: {BIAS}, one id at least"
    return None


def _row(
    at: tuple[int, ...],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    prefix: str,
) -> str | None:
    z = weight.double() @ hidden[at].double()
    most = float((z if bias is None else (z + bias.double())[bias > -torch.inf]).abs().max())
    if most > torch.finfo(torch.float32).max:
        product = f"{prefix}hidden, {prefix}weight: got a logit of size {most:.3g}"
        return f"{product} in row {list(at)}; allowed: logits within fp32"
    t = float(temperature[at]) if isinstance(temperature, Tensor) else temperature
    return _overflow(t, most, list(at), "hidden") if t and _over(most, t) else None


def _over(most: float, temperature: float) -> bool:
    return most / temperature > torch.finfo(torch.float32).max


def _overflow(temperature: float, most: float, at: list[int], name: str) -> str:
    if temperature and _over(most, temperature):
        return (
            f"temperature: got {temperature:.3g}; logits of size {most:.3g} in row {at} divided by "
            f"it leave fp32; allowed: a larger one, or 0 in `linear_sample` for the argmax"
        )
    return f"{name}: the log-probability is NaN at row {at}; allowed: logits without NaN"


def _first(bad: Tensor) -> list[int]:
    return bad.nonzero()[0].tolist()


def _one(x: Tensor) -> str:
    """The first of these numbers that is not finite, in the words of a message."""
    return str(float(x[~x.isfinite()][0])).replace("nan", "NaN")
