"""Hidden states and head to policy loss: log-prob, objective and gradient of one row in one pass.

    logits -> logp, entropy (token_logprobs) -> l, c = dl/dlogp, e = dl/dentropy (policy_loss)
    dz = c (onehot - p) - e p (log p + entropy),   dh = dz W,   dW = dz^T h

When c is known from its own row (every objective but the sequence-level ones) the cpu backend turns
a block of logits into dz in place while it is hot: three GEMMs, one [chunk, V] fp32 block, no
[N, V]. Sequence-level objectives compose linear_token_logprobs and policy_loss: four GEMMs.
Rows with an exactly zero coefficient (masked, zero advantage, clipped) are compacted away before
the GEMMs they do not need, unless a `Costate` arrives at them: the third term of the row gradient
is added to dz in the same pass. No dW when the head is frozen; dW accumulates in fp32.
"""

from typing import Any

import torch
from torch import Tensor

from vgkern import objectives
from vgkern.objectives import Objective
from vgkern.ops import _cause, _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators
from vgkern.ops._linear import grads_like, linear_inputs
from vgkern.ops._policy_rows import Rows, no_nan_rows, prepare
from vgkern.ops._segments import Segments
from vgkern.ops.costate import (
    COSTATE,
    Carried,
    Costate,
    carried_rows,
    costate_of,
    costate_term_ref,
    widened,
)
from vgkern.ops.group_advantages import group_advantages
from vgkern.ops.linear_token_logprobs import (
    linear_token_logprobs,
    linear_token_logprobs_ref,
    scored,
)
from vgkern.ops.policy_loss import (
    COUNTS,
    PolicyLoss,
    computed,
    metrics_dict,
    policy_loss_ref,
    traceable,
)


def linear_policy_loss_ref(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...] int64
    rows: Rows,  # [...] each
    o: Objective,
    temperature: float = 1.0,
    softcap: float = 0.0,
    costate: Carried | None = None,
    segments: Segments | None = None,  # of [N] rows
) -> tuple[Tensor, Tensor]:
    targets = targets.where(rows.weight != 0, -100)
    lp = linear_token_logprobs_ref(hidden, weight, bias, targets, temperature, softcap)
    a, w, old, ref, sampler = rows
    loss, counts = policy_loss_ref(lp.logp, a, w, o, old, ref, sampler, lp.entropy, segments)
    if costate is None:
        return loss, counts
    h2 = hidden.reshape(-1, hidden.shape[-1])
    third = costate_term_ref(h2, weight, bias, widened(costate), temperature, softcap)
    return loss + third, counts


SPARSE = ("sparse_columns_dh", "sparse_columns_dw", "sparse_error_dh", "sparse_error_dw")


class LinearPolicyLossFunction(torch.autograd.Function):
    """`vgkern::linear_policy_loss_fwd` makes the gradients with the loss; backward scales them.

    Nothing but the loss is computed when no gradient can be asked for (`needs`). The gradients are
    fp32, so that a loss scale comes before the rounding to half precision. The first backward
    scales them in place and gives them away; a second one over a retained graph makes them anew.
    """

    @staticmethod
    def forward(
        backend: str,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N] int64
        rows: tuple[Tensor, ...],  # advantages, row weight, old, ref, sampler: [N] or None
        o: Objective,
        scalars: tuple[float, float],
        needs: list[bool],
        costate: tuple | None = None,  # Carried
        sparse_tol: float = 0.0,
    ) -> tuple:
        given = (hidden, weight, bias, targets, *rows, *scalars, o.pack(), needs)
        return _forward(operators(backend), sparse_tol)(*given, *(costate or ()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        backend, hidden, weight, bias, targets, rows, o, scalars, needs, costate, tol = inputs
        ctx.third, carried = ((), ()) if costate is None else (costate[:2], costate[2:])
        ctx.save_for_backward(hidden, weight, bias, targets, *rows, *carried)
        ctx.options, ctx.made = (*scalars, o.pack(), needs), output[3:6]
        ctx.forward_op = _forward(operators(backend), tol)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else autograd fills zeros [V, H] for the gradients here

    @staticmethod
    @once
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple:
        tensors, carried = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
        grads, ctx.made = ctx.made, None
        if grads is None:
            third = (*ctx.third, *carried)
            grads = ctx.forward_op(*tensors, *ctx.options, *third)[3:6]
        return (
            None,
            *(
                _scaled(g, dloss, x.dtype) if n else None
                for g, x, n in zip(grads, tensors, ctx.needs_input_grad[1:4], strict=False)
            ),
            *[None] * 7,
        )


def _scaled(grad: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * by in `dtype`, rounded once; `grad` is given away."""
    if torch.compiler.is_compiling():  # the compiler fuses them, and owns what the graph returned
        return (grad * by).to(dtype)
    if grad.is_cuda and dtype != grad.dtype:  # one pass over [V, H] instead of two
        return torch.mul(grad, by, out=torch.empty_like(grad, dtype=dtype))
    return grad.mul_(by).to(dtype)


def _forward(ops: Any, sparse_tol: float) -> Any:
    if not sparse_tol:
        return ops.linear_policy_loss_fwd
    return lambda *a: ops.linear_policy_loss_sparse_fwd(*a[:13], sparse_tol, *a[13:])


def linear_policy_loss(
    hidden: Tensor,  # [B, T, H], or packed [N, H] or [1, N, H]; fp32|bf16|fp16|fp64
    weight: Tensor,  # [V, H] dtype of hidden
    targets: Tensor,  # like hidden's rows, int64
    advantages: Tensor | None = None,  # [B], [B, 1] or [B, T]; packed: [S], or like targets
    *,
    rewards: Tensor | None = None,  # [B] ([S]), with groups [B] int64, instead of advantages
    groups: Tensor | None = None,
    objective: str | Objective = "grpo",
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,  # one, or one per row, like targets
    softcap: float | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,  # like targets, >= 0
    segments: Tensor | None = None,  # int32|int64 [S + 1]: the sequences of packed rows
    normalizer: float | Tensor | None = None,
    costate: Costate | None = None,  # value [B, T, He] or [N, He]
    sparse_tol: float | None = None,  # relative error of the gradients of hidden and weight
    backend: str | None = None,
) -> PolicyLoss:
    """The fused loss: `policy_loss(linear_token_logprobs(...))` in one op, never [N, V].

    `hidden` row i predicts `targets` row i (never shifted here). Targets of masked rows may hold
    anything. Gradients flow to hidden, weight and bias, in their dtypes. segments, token_weight and
    mask: as in `policy_loss`.

    temperature: one per row is scored by `linear_token_logprobs`, a product more than the fused
    pass has; a row at 0 is greedy and has no gradient.

    costate: adds to those gradients what `vgkern.Costate` says, times whatever arrives at the loss,
    whose value it leaves alone; masked rows have none. Same recompute, no further one.

    sparse_tol: opt-in, backend "cpu" (on "torch" nothing is left out). The two products behind the
    logits run on the columns of the vocabulary that carry them, so that |error| / |gradient| of
    hidden and of weight (Frobenius norms) stays at about sparse_tol; loss, metrics and the bias's
    gradient are exact. Columns are chosen and the error is measured by random projections, and a
    chunk of rows where it would be larger is multiplied in full. metrics gain sparse_error_dh and
    sparse_error_dw, estimates of those errors from projections that chose nothing (unbiased in the
    square), and sparse_columns_dh and sparse_columns_dw, the shares of columns multiplied. The
    errors are relative: a factor that arrives at the loss leaves them alone. Ours: csrc/sparse.h.

    Raises ValueError / TypeError naming the argument, NonFiniteError for NaN logits in an active
    row (on CPU). Everything masked or an empty batch: a zero that is connected to its inputs.
    """
    o = objectives.resolve(objective)
    device, h2, hw = linear_inputs(hidden, weight, bias)
    targets = _check.targets("targets", targets, hidden.shape[:-1])
    _check.same_device(hidden=hidden, targets=targets)
    advantages = _given_advantages(advantages, rewards, groups, o, backend)
    temperature = _check.number(temperature)
    by_row = isinstance(temperature, Tensor) and temperature.ndim > 0
    scalars = (1.0 if by_row else _check.positive("temperature", temperature),
               _check.softcap(softcap))  # fmt: skip
    stats = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    o, rows, packed = prepare(
        targets.shape, device, o, advantages, old_logp, ref_logp, sampler_logp, mask, normalizer,
        stats, token_weight=token_weight, segments=segments, owner="targets"
    )  # fmt: skip
    dtypes = [] if costate_of(costate) is None else [costate.embedding.dtype]  # type: ignore[union-attr]
    chosen = choose(backend, device, hidden.dtype, *dtypes)
    live = torch.empty(0)
    kernels = chosen in ("triton", "cuda") and o.row_local and not by_row
    if not kernels or costate is not None or _check.can_look(device):
        live = (rows.weight != 0).view(targets.shape)
    if not kernels or _check.can_look(device):
        # else the kernels see to it: seven launches fewer, where nobody can be told
        hint = "; leave padding out with mask=targets != -100"
        targets = _check.target_range("targets", targets, weight.shape[0], live, hint)
    carried = None if costate is None else carried_rows(costate, live, weight)
    tol = _sparse(sparse_tol, chosen, o, by_row)
    if by_row:
        if costate is not None:
            raise NotImplementedError("costate: not with a temperature per row; pass one number")
        lp = linear_token_logprobs(
            hidden, weight, targets.where(live, -100), bias=bias, temperature=temperature,
            softcap=softcap, backend=chosen,
        )  # fmt: skip
        return computed(chosen, lp.logp, lp.entropy, o, rows, packed)
    if chosen == "torch":
        if packed is not None:
            hidden, targets = h2, targets.reshape(-1)
        also = [carried, packed] if packed is not None else [] if carried is None else [carried]
        loss, counts = linear_policy_loss_ref(
            hidden, weight, bias, targets, rows, traceable(o), *scalars, *also
        )
    elif o.row_local:
        flat = tuple(None if t is None else t.reshape(-1).contiguous() for t in rows)
        needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        needs = [n and torch.is_grad_enabled() for n in needs]
        loss, _, counts, *made = LinearPolicyLossFunction.apply(
            chosen, h2, hw, bias, targets.reshape(-1), flat, o, scalars, needs, carried, tol
        )
    else:
        y = targets.where(live, -100)
        logp, entropy, term = scored(chosen, hidden, h2, hw, bias, y, (*scalars, -100), carried)
        _cause.no_nan(logp, hidden, weight, bias, scalars[0], live)
        logp, entropy = logp.view(targets.shape), entropy.view(targets.shape)
        out = computed(chosen, logp, entropy, o, rows, packed)
        return out if carried is None else out._replace(loss=out.loss + term)
    if _check.can_look(device) and bool(loss.detach().isnan()):
        no_nan_rows(rows, targets.shape)
        _cause.no_nan(loss, hidden, weight, bias, scalars[0], live.reshape(hidden.shape[:-1]))
    metrics = metrics_dict(counts)
    if tol:
        report = loss.new_tensor([1.0, 1, 0, 0]) if chosen == "torch" else made[3]
        metrics |= zip(SPARSE, report.detach().unbind(), strict=True)
    return PolicyLoss(loss, metrics)


def _sparse(sparse_tol: float | None, backend: str, o: Objective, by_row: bool) -> float:
    """0.0 stands for dense products below the public function."""
    if sparse_tol is None:
        return 0.0
    if _check.positive("sparse_tol", sparse_tol) >= 1:
        raise _check.fail("sparse_tol", sparse_tol, "0 < sparse_tol < 1, a relative error")
    if by_row:
        raise NotImplementedError("sparse_tol: not with a temperature per row; pass one number")
    if backend not in ("cpu", "torch"):
        why = f"backend {backend!r} has dense products only"
        raise NotImplementedError(f"sparse_tol: {why}; pass sparse_tol=None")
    if not o.row_local and backend != "torch":
        why = "an objective of whole sequences has dense products only"
        raise NotImplementedError(f"sparse_tol: {why}; pass sparse_tol=None")
    return float(sparse_tol)


def _given_advantages(
    advantages: Tensor | None,
    rewards: Tensor | None,
    groups: Tensor | None,
    o: Objective,
    backend: str | None,
) -> Tensor:
    if (advantages is None) == (rewards is None):
        got = "both" if rewards is not None else "neither"
        raise ValueError(f"advantages, rewards: got {got}; allowed: exactly one of them")
    if advantages is not None:
        return advantages
    if groups is None:
        raise ValueError("groups: got None; allowed: int64 ids [B] beside rewards")
    return group_advantages(rewards, groups, estimator=o.advantage, backend=backend)  # type: ignore[arg-type]


def _fake(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    def f32(*shape):  # type: ignore[no-untyped-def]
        return hidden.new_empty(shape, dtype=torch.float32)

    needs = next(x for x in reversed(rest) if isinstance(x, (list, tuple)))
    n, grads = targets.shape[0], grads_like(hidden, weight, bias, needs)
    return f32(), f32(n), f32(len(COUNTS)), *(g.float() for g in grads)


def _fake_sparse(*args):  # type: ignore[no-untyped-def]
    return *_fake(*args), args[0].new_empty(len(SPARSE), dtype=torch.float32)


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor advantages, "
    "Tensor row_weight, Tensor? old_logp, Tensor? ref_logp, Tensor? sampler_logp, "
    "float temperature, float softcap, float[] objective, bool[] needs"
)
define(
    f"linear_policy_loss_fwd({_ARGUMENTS}, {COSTATE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    kernels="linear_policy_loss",
)
define(
    f"linear_policy_loss_sparse_fwd({_ARGUMENTS}, float sparse_tol, {COSTATE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_sparse,
    kernels=None,
)
