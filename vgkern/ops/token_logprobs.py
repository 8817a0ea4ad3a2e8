"""Log-probability of the chosen token and entropy of its distribution, per row of logits.

    z = s(logits) / temperature,   s(x) = softcap * tanh(x / softcap), or x
    logp = -softplus(lse_{v != y} z_v - z_y)      = z_y - lse(z), but exact when p_y -> 1
    entropy = -sum_v p_v log p_v
    dz_v = dlogp (1[v = y] - p_v) - dentropy p_v (log p_v + entropy)

The collapse-safe form of logp is from arXiv 2610.31642: a 30-nat gap keeps its 1e-13 gradient.
Logits of -inf have probability 0 and gradient exactly 0; a row whose target is at -inf has
logp = -inf and gradient 0. Rows with target == ignore_index return 0 and get no gradient.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vgkern.ops import _cause, _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators


class TokenLogprobs(NamedTuple):
    """Per row: log-probability of the target and entropy, in nats, fp32 (fp64 for fp64 input)."""

    logp: Tensor
    entropy: Tensor


def token_logprobs_ref(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...] int64
    temperature: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> TokenLogprobs:
    z = logits.double() if logits.dtype == torch.float64 else logits.float()
    if softcap:
        z = (softcap * torch.tanh(z / softcap)).where(z != -torch.inf, -torch.inf)  # still blocked
    keep, known = targets != ignore_index, (targets >= 0) & (targets < z.shape[-1])
    z = (z / temperature).where(keep[..., None], 0)  # an ignored row may hold NaN
    blocked = torch.finfo(z.dtype).min  # stands for -inf without its 0 * inf
    y = targets.where(keep & known, 0)[..., None]
    dead = z.gather(-1, y).squeeze(-1) == -torch.inf
    z = (z - z.detach().amax(-1, keepdim=True).clamp(min=blocked)).clamp(min=blocked)
    zy = z.gather(-1, y).squeeze(-1)
    others = z.scatter(-1, y, blocked).logsumexp(-1)
    gap = (others - zy.masked_fill(dead, 0)).masked_fill(dead, torch.inf)
    lp = z.log_softmax(-1)
    entropy = -(lp.exp() * lp.where(z > blocked, 0)).sum(-1)
    entropy = entropy.where(~dead, entropy.detach())  # no gradient from a row that cannot be
    both = (-F.softplus(gap, threshold=40), entropy)
    return TokenLogprobs(*(x.where(known, torch.nan).where(keep, 0) for x in both))


class TokenLogprobsFunction(torch.autograd.Function):
    """`vgkern::token_logprobs_fwd` / `_bwd` under autograd. Once differentiable."""

    @staticmethod
    def forward(backend: str, logits: Tensor, targets: Tensor, scalars: tuple) -> tuple:
        return operators(backend).token_logprobs_fwd(logits, targets, *scalars)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        backend, logits, targets, ctx.scalars = inputs
        ctx.save_for_backward(logits, targets, *output)
        ctx.mark_non_differentiable(output[2])
        ctx.ops = operators(backend)

    @staticmethod
    @once
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor, _: Tensor) -> tuple:
        grads = (dlogp.contiguous(), dentropy.contiguous())
        dlogits = ctx.ops.token_logprobs_bwd(*ctx.saved_tensors, *grads, *ctx.scalars)
        return None, dlogits, None, None


def token_logprobs(
    logits: Tensor,  # [..., V] fp32|bf16|fp16|fp64
    targets: Tensor,  # [...] int64
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-probability of each target and entropy of its distribution; both differentiable.

    Statistics in fp32 for any input dtype; the gradient has the dtype of `logits`. Never shifts:
    pass aligned logits and targets. Formula: module docstring.

    Raises ValueError / TypeError naming the argument for a wrong shape, dtype, device or target,
    and NonFiniteError for NaN logits (on CPU).
    """
    logits = _check.floating("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise _check.fail("logits", logits, "[..., V] with V >= 1")
    targets = _check.targets("targets", targets, logits.shape[:-1])
    device = _check.same_device(logits=logits, targets=targets)
    scalars = (_check.positive("temperature", temperature), _check.softcap(softcap), ignore_index)
    chosen = choose(backend, device, logits.dtype)
    targets = _check.kernel_targets("targets", targets, logits.shape[-1], ignore_index, chosen)
    if chosen == "torch":
        out = token_logprobs_ref(logits, targets, *scalars)
    else:
        flat = logits.reshape(-1, logits.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        logp, entropy, _ = TokenLogprobsFunction.apply(chosen, flat, targets.reshape(-1), scalars)
        out = TokenLogprobs(logp.view(targets.shape), entropy.view(targets.shape))
    _cause.no_nan_logits(out.logp, logits, temperature)
    return out


def _fake_fwd(logits, targets, temperature, softcap, ignore_index):  # type: ignore[no-untyped-def]
    return tuple(logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))


def _fake_bwd(logits, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_SCALARS = "float temperature, float softcap, int ignore_index"
define(
    f"token_logprobs_fwd(Tensor logits, Tensor targets, {_SCALARS}) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
    kernels="token_logprobs",
)
define(
    "token_logprobs_bwd(Tensor logits, Tensor targets, Tensor logp, Tensor entropy, Tensor lse, "
    f"Tensor dlogp, Tensor dentropy, {_SCALARS}) -> Tensor",
    _fake_bwd,
    kernels="token_logprobs",
)
