"""Full-vocabulary divergence of a student from a teacher, per token, and the student's entropy.

    p = softmax(s(hidden weight^T) / temperature)                          the student
    q = softmax(s'(teacher_hidden teacher_weight^T) / temperature)         the teacher, held fixed
    s(x) = softcap tanh(x / softcap), or x; s' with the teacher's own
    forward_kl = KL(q || p)         dz = p - q
    reverse_kl = KL(p || q)         dz = p (log p - log q - KL(p || q))
    jsd = (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2
                                    dz = p (log p - log m - KL(p || m)) / 2
    entropy = -sum_v p log p        dz = -p (log p + entropy)

Neither [N, V] exists: the fused backends hold one [chunk, V] block of each, and recompute them in
the backward pass. Each KL is summed as p (log p - log q) + q - p >= 0, where an error of the
normalisers drops out to second order, so a student next to its teacher has no negative divergence
and no noise of first order; equal logits give exactly 0.

The gradient goes to the student alone. Rows that `mask` leaves out give 0, get no gradient and are
not looked at. A token that one side cannot produce (-inf) makes the KL that divides by it +inf;
such a row has no gradient. Head and teacher may differ in width, not in vocabulary. A soft-cap
leaves a token at -inf there; dz takes its slope, 1 - tanh^2(x / softcap).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgkern.ops import _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators
from vgkern.ops.linear_token_logprobs import linear_inputs, linear_logits_ref

KINDS = ("forward_kl", "reverse_kl", "jsd")


class Divergence(NamedTuple):
    """Per row: divergence and entropy of the student, in nats, fp32 (fp64 for fp64 input)."""

    divergence: Tensor
    entropy: Tensor


def linear_divergence_ref(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [N, Ht]
    teacher_weight: Tensor,  # [V, Ht]
    mask: Tensor,  # [N] bool
    temperature: float = 1.0,
    kind: int = 1,
    softcap: float = 0.0,  # 0: none
    teacher_softcap: float = 0.0,
) -> Divergence:
    def log_softmax(h: Tensor, w: Tensor, cap: float) -> Tensor:  # a masked row may hold NaN
        z = linear_logits_ref(h.where(mask[:, None], 0), w, None)
        if cap:
            z = (cap * torch.tanh(z / cap)).where(z != -torch.inf, -torch.inf)
        lp = (z / temperature).log_softmax(-1)
        return lp.clamp(min=torch.finfo(lp.dtype).min / 4)  # stands for -inf without its 0 * inf

    lp = log_softmax(hidden, weight, softcap)
    lq = log_softmax(teacher_hidden, teacher_weight, teacher_softcap).detach()
    if kind == 2:
        lm = torch.logaddexp(lp, lq) - torch.tensor(2.0, dtype=lp.dtype).log()
        value = 0.5 * (_kl(lp, lm) + _kl(lq, lm))
    else:
        value = _kl(lp, lq) if kind == 1 else _kl(lq, lp)
    entropy = -(lp.exp() * lp).sum(-1)
    entropy = entropy.where(value < torch.inf, entropy.detach())
    return Divergence(value.where(mask, 0), entropy.where(mask, 0))


def _kl(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(p || q), no term of which is negative; inf, without gradient, where only q is 0."""
    blocked = torch.finfo(lp.dtype).min / 8
    p, q = lp.exp(), lq.exp()
    impossible = ((lp > blocked) & (lq < blocked)).any(-1)
    return (p * (lp - lq) + (q - p)).sum(-1).masked_fill(impossible, torch.inf)


class LinearDivergenceFunction(torch.autograd.Function):
    """`vgkern::linear_divergence_fwd` / `_bwd` under autograd. Once differentiable."""

    @staticmethod
    def forward(
        backend: str,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        teacher_hidden: Tensor,  # [N, Ht]
        teacher_weight: Tensor,  # [V, Ht]
        mask: Tensor,  # [N] bool
        scalars: tuple,
    ) -> tuple:
        given = (hidden, weight, teacher_hidden, teacher_weight, mask)
        return operators(backend).linear_divergence_fwd(*given, *scalars)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        backend, *given, ctx.scalars = inputs
        ctx.save_for_backward(*given, *output)
        ctx.mark_non_differentiable(*output[2:])
        ctx.ops = operators(backend)

    @staticmethod
    @once
    def backward(ctx: Any, ddivergence: Tensor, dentropy: Tensor, *_: Tensor) -> tuple:
        needs = list(ctx.needs_input_grad[1:3])
        grads = ctx.ops.linear_divergence_bwd(
            *ctx.saved_tensors, ddivergence.contiguous(), dentropy.contiguous(), *ctx.scalars, needs
        )
        grads = (g if n else None for g, n in zip(grads, needs, strict=True))
        return (None, *grads, None, None, None, None)


def linear_divergence(
    hidden: Tensor,  # [..., H] fp32|bf16|fp16|fp64
    weight: Tensor,  # [V, H] dtype of hidden
    teacher_hidden: Tensor,  # [..., Ht]
    teacher_weight: Tensor,  # [V, Ht] dtype of teacher_hidden
    *,
    kind: str = "reverse_kl",
    temperature: float = 1.0,
    softcap: float | None = None,  # of the student's logits
    teacher_softcap: float | None = None,  # of the teacher's, which is not taken from `softcap`
    mask: Tensor | None = None,  # [...] bool or 0/1, False: not looked at
    backend: str | None = None,
) -> Divergence:
    """Divergence and entropy per token; differentiable in hidden and weight, never in the teacher.

    Raises ValueError / TypeError naming the argument for a wrong shape, dtype, device, an unknown
    kind or another vocabulary, NonFiniteError for NaN logits (on CPU). Formula: module docstring.
    """
    if kind not in KINDS:
        raise _check.fail("kind", kind, ", ".join(map(repr, KINDS)))
    device, h2, hw = linear_inputs(hidden, weight, None)
    shape = hidden.shape[:-1]
    th, tw = _teacher(teacher_hidden, teacher_weight, shape, weight.shape[0])
    _check.on_device(device, "hidden", teacher_hidden=th, teacher_weight=tw, mask=mask)
    if mask is None:
        live = torch.ones(shape.numel(), dtype=torch.bool, device=device)
    else:
        live = _check.row_mask("mask", mask, shape).reshape(-1).contiguous()
    caps = (_check.softcap(softcap), _check.softcap(teacher_softcap, "teacher_softcap"))
    scalars = (_check.positive("temperature", temperature), KINDS.index(kind), *caps)
    chosen = choose(backend, device, hidden.dtype, teacher_hidden.dtype)
    if chosen == "torch":
        out = linear_divergence_ref(h2, hw, th, tw, live, *scalars)
    else:
        out = Divergence(*LinearDivergenceFunction.apply(chosen, h2, hw, th, tw, live, scalars)[:2])
    out = Divergence(*(x.view(shape) for x in out))
    total = out.divergence.detach() + out.entropy.detach()
    _check.no_nan("hidden, teacher_hidden", total, "the divergence")
    return out


def _teacher(
    hidden: Tensor, weight: Tensor, shape: torch.Size, vocab: int
) -> tuple[Tensor, Tensor]:
    """Teacher as [N, Ht] and [V, Ht] with unit-stride columns, detached."""
    hidden = _check.floating("teacher_hidden", hidden).detach()
    weight = _check.floating("teacher_weight", weight, 2).detach()
    if weight.shape[0] != vocab:
        allowed = f"[V, Ht] with the vocabulary of the student, V = {vocab}"
        raise _check.fail("teacher_weight", weight, allowed)
    if hidden.ndim == 0 or hidden.shape[:-1] != shape or hidden.shape[-1] != weight.shape[1]:
        allowed = f"{[*shape, weight.shape[1]]}: rows of hidden, width of teacher_weight"
        raise _check.fail("teacher_hidden", hidden, allowed)
    _, th, tw = linear_inputs(hidden, weight, None)
    return th, tw


def _fake_fwd(hidden, *rest):  # type: ignore[no-untyped-def]
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=torch.float32) for _ in range(5))


def _fake_bwd(hidden, weight, *rest):  # type: ignore[no-untyped-def]
    return tuple(
        t.new_empty(t.shape) if n else hidden.new_empty(0)
        for t, n in zip((hidden, weight), rest[-1], strict=True)
    )


_SCALARS = "float temperature, int kind, float softcap, float teacher_softcap"
_HEADS = "Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight"
define(
    f"linear_divergence_fwd({_HEADS}, Tensor row_mask, {_SCALARS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    kernels="linear_divergence",
)
define(
    f"linear_divergence_bwd({_HEADS}, Tensor row_mask, Tensor divergence, Tensor entropy, "
    "Tensor lse, Tensor teacher_lse, Tensor inner, Tensor ddivergence, Tensor dentropy, "
    f"{_SCALARS}, bool[] needs) -> (Tensor, Tensor)",
    _fake_bwd,
    kernels="linear_divergence",
)
