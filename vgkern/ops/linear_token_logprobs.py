"""Hidden states and head to per-token log-probability and entropy, never the [N, V] logits.

    logits = hidden weight^T + bias, then exactly `token_logprobs`
    dh = dlogits W,   dW = dlogits^T h,   db = sum_i dlogits_i

With a temperature per row, top_k, top_p or min_p: of the distribution that `linear_sample` draws
from with the same options, kept set S = S(z) a constant (`_truncate`),

    logp = z_y - lse_S(z), -inf where y is not in S         entropy = -sum_S p log p
    dz_v = dlogp (1[v = y] - p_v) - dentropy p_v (log p_v + entropy) in S, 0 outside, and no
    gradient at all from a row whose target is not in S, or whose temperature is 0

The cpu backend holds one [chunk, V] block of fp32 logits; its backward recomputes the block and
turns it into dlogits in place. Rows whose dlogp and dentropy are both exactly 0 cost nothing there.
dW accumulates in fp32 and is not computed when the head is frozen.

With a `Costate` the same recompute carries the third term of the row gradient, `vgkern.Costate`.
"""

from typing import Any

import torch
from torch import Tensor

from vgkern.ops import _cause, _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators
from vgkern.ops._linear import grads_like, linear_inputs, linear_logits_ref
from vgkern.ops._truncate import CUTS, SCHEMA, cut_of, truncated_ref
from vgkern.ops.costate import (
    COSTATE,
    Carried,
    Costate,
    attached,
    carried_rows,
    costate_of,
    costate_term_ref,
    widened,
)
from vgkern.ops.token_logprobs import TokenLogprobs, token_logprobs_ref


def linear_token_logprobs_ref(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...] int64
    temperature: float | Tensor = 1.0,  # a tensor [...] brings the cuts with it
    softcap: float = 0.0,
    ignore_index: int = -100,
    cut: tuple = (0, 1.0, 0.0),  # top_k, top_p, min_p: numbers, or [...]
) -> TokenLogprobs:
    live = hidden.where((targets != ignore_index)[..., None], 0)  # an ignored row may hold NaN
    logits = linear_logits_ref(live, weight, bias)
    if isinstance(temperature, Tensor):
        logits = truncated_ref(logits, temperature, softcap, *cut)
        temperature, softcap = 1.0, 0.0
    return token_logprobs_ref(logits, targets, temperature, softcap, ignore_index)


class LinearTokenLogprobsFunction(torch.autograd.Function):
    """`vgkern::linear_logprobs_fwd` / `_bwd` under autograd. Once differentiable.

    The last output is a zero whose gradient multiplies the costate's term.
    """

    @staticmethod
    def forward(
        backend: str,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N] int64
        scalars: tuple,
        costate: tuple | None = None,  # Carried
    ) -> tuple:
        out = operators(backend).linear_logprobs_fwd(hidden, weight, bias, targets, *scalars)
        return *out, hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        backend, *head, ctx.scalars, costate = inputs
        ctx.third, rows = ((), ()) if costate is None else (costate[:2], costate[2:])
        ctx.save_for_backward(*head, *output[:3], *rows)
        ctx.mark_non_differentiable(output[2])
        ctx.ops = operators(backend)

    @staticmethod
    @once
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor, _: Tensor, dterm: Tensor) -> tuple:
        needs = list(ctx.needs_input_grad[1:4])
        tensors, third = ctx.saved_tensors[:7], ()
        if len(ctx.saved_tensors) > 7:
            *rows, scale = ctx.saved_tensors[7:]
            third = (False, *ctx.third, *rows, scale * dterm)
        grads = ctx.ops.linear_logprobs_bwd(
            *tensors, dlogp.contiguous(), dentropy.contiguous(), *ctx.scalars, needs, *third
        )
        grads = (g if n else None for g, n in zip(grads, needs, strict=True))
        return (None, *grads, None, None, None)


class LinearTruncatedLogprobsFunction(torch.autograd.Function):
    """`vgkern::linear_truncated_logprobs_fwd` / `_bwd` under autograd. Once differentiable."""

    @staticmethod
    def forward(
        backend: str,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N] int64
        scalars: tuple,  # softcap, ignore_index, and the numbers of a Cut
        temperatures: Tensor | None,  # [N], as the next three: its tensors
        top_ks: Tensor | None,
        top_ps: Tensor | None,
        min_ps: Tensor | None,
    ) -> tuple:
        per_row = (temperatures, top_ks, top_ps, min_ps)
        return operators(backend).linear_truncated_logprobs_fwd(
            hidden, weight, bias, targets, *scalars, *per_row
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        backend, *head = inputs[:5]
        ctx.scalars, *per_row = inputs[5:]
        ctx.save_for_backward(*head, *per_row)
        ctx.ops = operators(backend)

    @staticmethod
    @once
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple:
        needs = list(ctx.needs_input_grad[1:4])
        head, per_row = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        grads = ctx.ops.linear_truncated_logprobs_bwd(
            *head, dlogp.contiguous(), dentropy.contiguous(), *ctx.scalars, *per_row, needs
        )
        grads = (g if n else None for g, n in zip(grads, needs, strict=True))
        return (None, *grads, *(None,) * (2 + len(per_row)))


def linear_token_logprobs(
    hidden: Tensor,  # [..., H] fp32|bf16|fp16|fp64
    weight: Tensor,  # [V, H] dtype of hidden
    targets: Tensor,  # [...] int64
    *,
    bias: Tensor | None = None,  # [V] dtype of hidden, or fp32
    temperature: float | Tensor = 1.0,  # one, or one per row [...]; 0: greedy
    softcap: float | None = None,
    ignore_index: int = -100,
    top_k: int | Tensor | None = None,  # one, or one per row [...] int64; 0 there: no limit
    top_p: float | Tensor | None = None,  # one, or one per row [...], as min_p
    min_p: float | Tensor | None = None,
    costate: Costate | None = None,  # value [..., He]
    group: Any = None,  # vocab-parallel
    backend: str | None = None,
) -> TokenLogprobs:
    """The core drop-in: log-probability of each target and entropy, both differentiable.

    Gradients flow to hidden, weight and bias, in their dtypes. Formula: module docstring.
    It scores what `linear_sample` draws from with the same temperature, top_k, top_p and min_p: at
    temperature 0, one or a row's own, logp is 0 for the argmax and -inf for any other id, entropy
    0, and there is no gradient.

    Raises ValueError / TypeError naming the argument for a wrong shape, dtype, device, bound or
    target, NonFiniteError for NaN logits (on CPU), NotImplementedError for a truncation, a
    temperature per row or temperature 0 together with `group`, or for a costate together with any
    of them.

    costate: adds to the gradients of hidden, weight and bias what `vgkern.Costate` says, once per
    backward pass and whatever arrives from above: a loss that is scaled needs costate.weight
    scaled likewise. Rows at `ignore_index` have none.

    group: a torch.distributed process group whose ranks hold the head in contiguous shards, in rank
    order: weight is [V_r, H], targets are global ids, hidden and targets the same on all ranks
    (not checked). Details: `_vocab_parallel`.
    """
    device, h2, hw = linear_inputs(hidden, weight, bias)
    shape = hidden.shape[:-1]
    targets = _check.targets("targets", targets, shape)
    _check.same_device(hidden=hidden, targets=targets)
    cap, vocab = _check.softcap(softcap), weight.shape[0]
    cut = cut_of(temperature, top_k, top_p, min_p, vocab, shape, device)
    also = [] if costate_of(costate) is None else [costate.embedding.dtype]  # type: ignore[union-attr]
    chosen = choose(backend, device, hidden.dtype, *also)
    names = [n for n, x in zip(CUTS, (top_k, top_p, min_p), strict=True) if x is not None]
    temperature = _check.number(temperature)
    by_row = isinstance(temperature, Tensor) and temperature.ndim > 0
    if by_row or (not isinstance(temperature, Tensor) and temperature == 0):
        names.append("temperature")
    if costate is not None and (names or group is not None):
        what = (*(_option(n, temperature) for n in names), "group")[0]
        raise NotImplementedError(
            f"costate: not with {what}; pass costate=None, or noisy_embedding"
        )
    if group is not None:
        from vgkern.ops import _vocab_parallel as parallel

        if names:
            raise NotImplementedError(
                f"{names[0]}: {_option(names[0], temperature)} does not work with a process group; "
                "pass group=None"
            )
        parallel.check_group(group)
        scalars = (_check.positive("temperature", temperature), cap, ignore_index)
        ends = parallel.shard_ends(group, weight)
        if _check.can_look(device):
            _check.target_range("targets", targets, int(ends[-1]), targets != ignore_index)
        out = parallel.VocabParallelFunction.apply(
            chosen, group, h2, hw, bias, targets.reshape(-1), ends, scalars
        )
    elif names:
        targets = _check.kernel_targets("targets", targets, vocab, ignore_index, chosen)
        if chosen == "torch":
            t, limits = cut.of_rows(shape, device)
            rows = (t, cap, ignore_index, limits)
            out = linear_token_logprobs_ref(hidden, weight, bias, targets, *rows)
        else:
            numbers, per_row = (cap, ignore_index, *cut[:4]), cut[4:]
            out = LinearTruncatedLogprobsFunction.apply(
                chosen, h2, hw, bias, targets.reshape(-1), numbers, *per_row
            )
    else:
        scalars = (_check.positive("temperature", temperature), cap, ignore_index)
        targets = _check.kernel_targets("targets", targets, vocab, ignore_index, chosen)
        carried = (
            None if costate is None else carried_rows(costate, targets != ignore_index, weight)
        )
        out = scored(chosen, hidden, h2, hw, bias, targets, scalars, carried)
        if carried is not None:
            out = attached(*out)
    out = TokenLogprobs(out[0].view(shape), out[1].view(shape))
    _cause.no_nan(out.logp, hidden, weight, bias, temperature)
    return out


def _option(name: str, temperature: float | Tensor) -> str:
    """What an error message calls an option that needs the truncated distribution."""
    if name != "temperature":
        return name
    return "a temperature per row" if isinstance(temperature, Tensor) else "temperature 0 (greedy)"


def scored(
    backend: str,
    hidden: Tensor,  # [..., H]
    h2: Tensor,  # [N, H]
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,  # [...]
    scalars: tuple[float, float, int],
    costate: Carried | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy, and a zero whose gradient multiplies the costate's term."""
    if backend == "torch":
        out = linear_token_logprobs_ref(hidden, weight, bias, targets, *scalars)
        if costate is None:
            return *out, out.logp.new_zeros(())
        return *out, costate_term_ref(h2, weight, bias, widened(costate), *scalars[:2])
    flat = targets.reshape(-1)
    logp, entropy, _, term = LinearTokenLogprobsFunction.apply(
        backend, h2, weight, bias, flat, scalars, costate
    )
    return logp, entropy, term


def _fake_fwd(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    return tuple(hidden.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))


def _fake_bwd(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    at = next(i for i, x in enumerate(rest) if isinstance(x, (list, tuple)))
    needs, fp32_dhidden = rest[at], any(rest[at + 1 : at + 2])
    dhidden, *others = grads_like(hidden, weight, bias, needs)
    return (dhidden.float() if fp32_dhidden else dhidden, *others)


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_SCALARS = "float temperature, float softcap, int ignore_index"
define(
    f"linear_logprobs_fwd({_HEAD}, {_SCALARS}) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
    kernels="linear_token_logprobs",
)
define(
    f"linear_logprobs_bwd({_HEAD}, Tensor logp, Tensor entropy, Tensor lse, Tensor dlogp, "
    f"Tensor dentropy, {_SCALARS}, bool[] needs, bool fp32_dhidden=False, {COSTATE}) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_bwd,
    kernels="linear_token_logprobs",
)


def _fake_truncated(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    return tuple(hidden.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))


_CUT = f"float softcap, int ignore_index, {SCHEMA}"
define(
    f"linear_truncated_logprobs_fwd({_HEAD}, {_CUT}) -> (Tensor, Tensor)",
    _fake_truncated,
    kernels="linear_token_logprobs",
)
define(
    f"linear_truncated_logprobs_bwd({_HEAD}, Tensor dlogp, Tensor dentropy, {_CUT}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_bwd,
    kernels="linear_token_logprobs",
)
