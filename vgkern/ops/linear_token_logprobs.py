"""Hidden states and head to per-token log-probability and entropy, never the [N, V] logits.

    logits = hidden weight^T + bias, then exactly `token_logprobs`
    dh = dlogits W,   dW = dlogits^T h,   db = sum_i dlogits_i

The cpu backend holds one [chunk, V] block of fp32 logits; its backward recomputes the block and
turns it into dlogits in place. Rows whose dlogp and dentropy are both exactly 0 cost nothing there.
dW accumulates in fp32 and is not computed when the head is frozen.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from vgkern.ops import _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators
from vgkern.ops.token_logprobs import TokenLogprobs, token_logprobs_ref


def linear_token_logprobs_ref(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [...] int64
    temperature: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> TokenLogprobs:
    live = hidden.where((targets != ignore_index)[..., None], 0)  # an ignored row may hold NaN
    logits = linear_logits_ref(live, weight, bias)
    return token_logprobs_ref(logits, targets, temperature, softcap, ignore_index)


def linear_logits_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """fp32 logits [..., V] (fp64 for fp64 input), whatever the dtype of the inputs."""
    up = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    device = hidden.device.type
    known = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if known else contextlib.nullcontext():
        logits = hidden.to(up) @ weight.to(up).T
    return logits if bias is None else logits + bias.to(up)


class LinearTokenLogprobsFunction(torch.autograd.Function):
    """`vgkern::linear_logprobs_fwd` / `_bwd` under autograd. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N] int64
        scalars: tuple,
    ) -> tuple:
        ctx.ops = operators(backend)
        out = ctx.ops.linear_logprobs_fwd(hidden, weight, bias, targets, *scalars)
        ctx.save_for_backward(hidden, weight, bias, targets, *out)
        ctx.scalars = scalars
        return out[0], out[1]

    @staticmethod
    @once
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple:
        needs = list(ctx.needs_input_grad[1:4])
        grads = ctx.ops.linear_logprobs_bwd(
            *ctx.saved_tensors, dlogp.contiguous(), dentropy.contiguous(), *ctx.scalars, needs
        )
        return (None, *(g if n else None for g, n in zip(grads, needs, strict=True)), None, None)


def linear_token_logprobs(
    hidden: Tensor,  # [..., H] fp32|bf16|fp16|fp64
    weight: Tensor,  # [V, H] dtype of hidden
    targets: Tensor,  # [...] int64
    *,
    bias: Tensor | None = None,  # [V] dtype of hidden, or fp32
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    group: Any = None,
    backend: str | None = None,
) -> TokenLogprobs:
    """The core drop-in: log-probability of each target and entropy, both differentiable.

    Gradients flow to hidden, weight and bias, in their dtypes. Formula: module docstring.

    Raises ValueError / TypeError naming the argument for a wrong shape, dtype, device or target,
    NonFiniteError for NaN logits (on CPU), NotImplementedError for a process `group`.
    """
    if group is not None:
        raise NotImplementedError("group: the vocab-parallel form is not there yet; pass None")
    device, h2, hw = linear_inputs(hidden, weight, bias)
    targets = _check.targets("targets", targets, hidden.shape[:-1])
    _check.same_device(hidden=hidden, targets=targets)
    scalars = (_check.positive("temperature", temperature), _check.softcap(softcap), ignore_index)
    _check.target_range("targets", targets, weight.shape[0], targets != ignore_index)
    chosen = choose(backend, device, hidden.dtype)
    if chosen == "torch":
        out = linear_token_logprobs_ref(hidden, weight, bias, targets, *scalars)
    else:
        logp, ent = LinearTokenLogprobsFunction.apply(
            chosen, h2, hw, bias, targets.reshape(-1), scalars
        )
        out = TokenLogprobs(logp.view(targets.shape), ent.view(targets.shape))
    _check.no_nan("hidden", out.logp.detach(), "the log-probability (hidden, weight or bias)")
    return out


def linear_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[torch.device, Tensor, Tensor]:
    """Checks of every linear_* op: device, hidden as [N, H] and weight with unit-stride columns."""
    hidden, weight = _check.floating("hidden", hidden), _check.floating("weight", weight, 2)
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1] or weight.numel() == 0:
        got = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}"
        raise _check.fail("hidden, weight", got, "[..., H] and [V, H] with H, V >= 1")
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"weight: got {_check.describe(weight)}; allowed: {hidden.dtype}, as hidden"
        )
    if bias is not None:
        bias = _check.floating("bias", bias)
        _check.rows_like("bias", bias, weight.shape[:1], f"[V] = [{weight.shape[0]}]")
        if bias.dtype not in (hidden.dtype, torch.float32):
            allowed = f"{hidden.dtype} or float32"
            raise TypeError(f"bias: got {_check.describe(bias)}; allowed: {allowed}")
    device = _check.same_device(hidden=hidden, weight=weight, bias=bias)
    h2 = hidden.reshape(-1, hidden.shape[-1])
    h2 = h2 if h2.stride(-1) == 1 and h2.stride(0) >= h2.shape[1] else h2.contiguous()
    hw = weight if weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1] else None
    return device, h2, weight.contiguous() if hw is None else hw


def grads_like(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> tuple:
    """Fake gradients: full shapes where needed, [0] where not (operators cannot return None)."""
    return tuple(
        t.new_empty(t.shape) if n and t is not None else hidden.new_empty(0)
        for t, n in zip((hidden, weight, bias), needs, strict=True)
    )


def _fake_fwd(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    return tuple(hidden.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))


def _fake_bwd(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    return grads_like(hidden, weight, bias, rest[-1])


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_SCALARS = "float temperature, float softcap, int ignore_index"
define(
    f"linear_logprobs_fwd({_HEAD}, {_SCALARS}) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
    kernels="linear_token_logprobs",
)
define(
    f"linear_logprobs_bwd({_HEAD}, Tensor logp, Tensor entropy, Tensor lse, Tensor dlogp, "
    f"Tensor dentropy, {_SCALARS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
    kernels="linear_token_logprobs",
)
