"""What every policy loss takes for each token, checked and broadcast: advantages, weights, logs.

w_i = mask_i token_weight_i / (denominator of the objective's reduction, or `normalizer`)
"""

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgkern import objectives
from vgkern.objectives import Objective
from vgkern.ops import _check
from vgkern.ops._segments import REMEDY, Segments, advantages_of, segments_of

_TOKEN_LEVEL: ContextVar[bool] = ContextVar("token_level", default=False)


@contextlib.contextmanager
def token_level() -> Iterator[None]:
    """Within it advantages that differ in a row are no sign of packed sequences: the caller knows
    that its rows hold one sequence each."""
    token = _TOKEN_LEVEL.set(True)
    try:
        yield
    finally:
        _TOKEN_LEVEL.reset(token)


class Rows(NamedTuple):
    """What a policy loss takes for each token, detached: like the log-probs; [N] where packed."""

    advantages: Tensor
    weight: Tensor  # 0 where masked
    old: Tensor | None
    ref: Tensor | None
    sampler: Tensor | None


def prepare(
    shape: torch.Size,
    device: torch.device,
    objective: str | Objective,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    sampler: Tensor | None,
    mask: Tensor | None,
    normalizer: float | Tensor | None,
    dtype: torch.dtype = torch.float32,
    *,
    token_weight: Tensor | None = None,
    segments: Tensor | None = None,
    owner: str = "logp",  # the argument whose rows have `shape`
) -> tuple[Objective, Rows, Segments | None]:
    """Checks and broadcasts what every policy loss takes."""
    o = objectives.resolve(objective)
    if len(shape) not in (1, 2):
        raise _check.fail(owner, f"rows of shape {list(shape)}", "[B, T] or packed [N]")
    _check.on_device(
        device, owner, advantages=advantages, old_logp=old, ref_logp=ref, sampler_logp=sampler,
        mask=mask, token_weight=token_weight
    )  # fmt: skip
    packed = segments_of(segments, shape, device)
    whole = o.reduction in ("seq", "seq_sum") or not o.row_local  # looks at sequences
    whole = whole or (o.reduction == "fixed" and normalizer is None)  # counts them
    if whole and len(shape) == 1 and packed is None:
        raise _check.fail(
            owner, "packed [N] rows", f"[B, T] for an objective of sequences, or {REMEDY}"
        )
    logs: list[Tensor | None] = []
    for name, t in (("old_logp", old), ("ref_logp", ref), ("sampler_logp", sampler)):
        if t is not None:
            t = _check.rows_like(name, _check.floating(name, t), shape).detach().to(dtype)
        logs.append(t)
    if o.beta and ref is None:
        raise ValueError("ref_logp: got None; allowed: a tensor like logp when beta > 0")
    if o.sampler_correction != "none" and sampler is None:
        allowed = f"a tensor like logp for sampler_correction {o.sampler_correction!r}"
        raise ValueError(f"sampler_logp: got None; allowed: {allowed}")
    if mask is None:
        m = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        m = _check.mask("mask", mask, shape)
    _check.live_rows(m, old_logp=logs[0], ref_logp=logs[1], sampler_logp=logs[2])
    if token_weight is not None:
        token_weight = _check.token_weight("token_weight", token_weight, m).to(dtype)
        m = m & (token_weight != 0)
    if packed is None:
        a = _advantages(advantages, shape, dtype)
    else:
        a = _check.floating("advantages", advantages).detach().to(dtype)
        a, m = advantages_of(a, shape, packed), m.reshape(-1)
        logs = [None if t is None else t.reshape(-1) for t in logs]
    if _check.can_look(device):
        if bool((~a.isfinite() & m).any()):
            raise _check.NonFiniteError("advantages: got NaN or inf; allowed: finite numbers")
        if whole and packed is None and advantages.shape == shape and not _TOKEN_LEVEL.get():
            _one_advantage(a, m)
        if sampler is not None:
            _drawn(sampler, m.view(shape))
    weight = _weights(m, o, normalizer, dtype, packed)
    if token_weight is not None:
        weight = weight * token_weight.reshape(weight.shape)
    if packed is not None and packed.bad is not None:
        weight = weight.masked_fill(packed.bad, torch.nan)
    return o, Rows(a, weight, *logs), packed


def _advantages(advantages: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    a = _check.floating("advantages", advantages).detach().to(dtype)
    if len(shape) == 2 and a.shape in ((shape[0],), (shape[0], 1)):
        return a.reshape(-1, 1).expand(shape)
    if a.shape == shape:
        return a
    allowed = f"{list(shape)}" if len(shape) == 1 else f"[{shape[0]}], [{shape[0]}, 1], {[*shape]}"
    raise _check.fail("advantages", a, allowed)


def _one_advantage(a: Tensor, m: Tensor) -> None:
    """Rows whose tokens have different advantages, under an objective of sequences: packed ones,
    whose sequences nobody can tell apart, or token-level advantages. One row is refused, since
    packing makes one; several are warned about."""
    if not a.numel():
        return
    low, high = a.where(m, torch.inf).amin(-1), a.where(m, -torch.inf).amax(-1)
    mixed = low < high
    if not bool(mixed.any()):
        return
    got = f"different ones in row {int(mixed.nonzero()[0, 0])}, which is taken for one sequence"
    if len(a) == 1:
        one = f"segments=torch.tensor([0, {a.shape[1]}]) if it is one with token-level advantages"
        raise _check.fail("advantages", got, f"one each, or {REMEDY}; {one}")
    warnings.warn(
        f"advantages: got {got}; right for token-level advantages; if sequences are packed in a "
        f"row, pass {REMEDY}",
        stacklevel=4,
    )


def _drawn(sampler: Tensor, m: Tensor) -> None:
    """Warns of a token that its own sampler says it cannot draw."""
    bad = (sampler == -torch.inf) & m
    if bool(bad.any()):
        warnings.warn(
            f"sampler_logp: got -inf at {bad.nonzero()[0].tolist()}, a token that its sampler "
            "cannot draw; score it with the temperature, top_k, top_p and min_p it was drawn with. "
            "Its weight is sampler_max under *_truncate and 0 under *_mask, and sampler_gap is inf",
            stacklevel=4,
        )


def _weights(
    m: Tensor,
    o: Objective,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
    packed: Segments | None,
) -> Tensor:
    """Row weights w_i of the reduction: fp64 until the last rounding, to `dtype`."""
    if packed is not None:
        sequences, width = packed.count, o.max_length or packed.longest
    else:
        sequences = m.shape[0] if m.ndim == 2 else m.numel()
        width = o.max_length or (m.shape[1] if m.ndim == 2 else 1)
    by: Any = normalizer
    if normalizer is None and o.reduction == "token":
        by = m.sum(dtype=torch.float64)  # 0 where no row has a weight
    elif normalizer is None:
        by = {"fixed": sequences * width, "sum": 1}.get(o.reduction, sequences)
    if isinstance(by, Tensor) and by is not normalizer:
        by = by.double()
    elif isinstance(by, Tensor):
        if by.numel() != 1:
            raise _check.fail("normalizer", by, "a number, or a tensor of one")
        by = by.detach().reshape(()).to(m.device, torch.float64).clamp(min=1e-12)
    if _check.can_look(m.device):  # elsewhere looking would be a host sync
        by = float(by)
        if normalizer is not None and (by > 1e-12 or bool(m.any())):  # 0: nothing anywhere counts
            _check.positive("normalizer", by if by > 1e-12 else float(normalizer))
    if o.reduction == "seq":
        if packed is None:
            share = m.sum(-1, keepdim=True, dtype=torch.float64).reciprocal()
        else:
            share = packed.spread(packed.sums(m.double()).reciprocal())
        share = share / (by if isinstance(by, Tensor) else max(by, 1e-12))
    else:
        share = by.reciprocal() if isinstance(by, Tensor) else 1.0 / max(by, 1e-12)
    if isinstance(share, Tensor):  # inf where there is nothing to weigh
        return torch.where(m, share.to(dtype), 0)
    return m.to(dtype) * share


def no_nan_rows(rows: Rows, shape: torch.Size) -> None:
    """One exception that names the log-probs that hold a NaN where a token counts."""
    live = rows.weight != 0
    for name, t in zip(("old_logp", "ref_logp", "sampler_logp"), rows[2:], strict=True):
        if t is not None and bool((t.isnan() & live).any()):
            at = (t.isnan() & live).reshape(shape).nonzero()[0].tolist()
            raise _check.NonFiniteError(f"{name}: got NaN at {at}; allowed: log-probabilities")
