"""`linear_token_logprobs` over a vocabulary that is split among the ranks of a process group.

Rank r holds weight [V_r, H] and bias [V_r], contiguous ids in rank order; hidden and targets
(global ids) are the same on every rank, and so has to be the gradient that arrives; H and equality
are not checked. An error that one rank raises alone leaves the others to the group's timeout.
Each rank runs the local operator, with target V_r ("elsewhere") for ids of others; what crosses is
[3, N] per rank:

    lse = log sum_r exp lse_r                 w_r = exp(lse_r - lse)
    logp = logp_own - softplus(lse_others - lse_own)            exact when p -> 1
    entropy = sum_r w_r (entropy_r - log w_r)

Backward: the local operator with these global statistics, p = exp(z - lse), gives dW and db of the
shard, and a share of dhidden that is summed over ranks in fp32, then rounded once. A hidden that
needs no gradient means no collective in backward; that has to be so on all ranks or on none.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vgkern.ops import _check
from vgkern.ops._library import once, operators
from vgkern.ops.linear_token_logprobs import linear_logits_ref
from vgkern.ops.token_logprobs import token_logprobs_ref

IGNORED = -100  # in local ids, which start at 0 on every rank


def check_group(group: Any) -> None:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: got {_check.describe(group)}; allowed: a torch.distributed.ProcessGroup"
        )
    if not dist.is_initialized():
        raise _check.fail("group", "a process group after destroy_process_group()", "a live one")
    if dist.get_rank(group) < 0:
        raise _check.fail("group", "a process group without this rank", "one that holds it")


def shard_ends(group: Any, weight: Tensor) -> Tensor:
    """int64 [ranks]: one past the last id of every rank, on the device (no sync with the host)."""
    size = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = size.new_zeros(dist.get_world_size(group))
    dist.all_gather(list(sizes.split(1)), size, group=group)
    return sizes.cumsum(0)


def combine(
    logp: Tensor,  # [ranks, N], like the next two of each rank's shard
    entropy: Tensor,
    lse: Tensor,
    owner: Tensor,  # [N], the rank of the target
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and lse over all shards."""
    dtype, at = lse.dtype, owner[None]
    logp, entropy, lse = logp.double(), entropy.double(), lse.double()
    own = logp.gather(0, at)[0]
    others = lse.scatter(0, at, -torch.inf).logsumexp(0)
    total = lse.logsumexp(0)
    out = own - F.softplus(others - lse.gather(0, at)[0], threshold=40)
    out = out.masked_fill((own == -torch.inf) & ~total.isnan(), -torch.inf)
    log_w = (lse - total).masked_fill(lse == -torch.inf, -torch.inf)
    terms = (log_w.exp() * (entropy - log_w)).masked_fill(log_w == -torch.inf, 0)
    terms = terms.masked_fill(total.isnan(), torch.nan)
    return out.to(dtype), terms.sum(0).to(dtype), total.to(dtype)


class VocabParallelFunction(torch.autograd.Function):
    """The local operators and two collectives under autograd. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        group: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V_r, H]
        bias: Tensor | None,  # [V_r]
        targets: Tensor,  # [N] global ids
        ends: Tensor,  # [ranks]
        scalars: tuple,  # temperature, softcap, ignore_index
    ) -> tuple:
        ctx.ops = Reference if backend == "torch" else operators(backend)
        ctx.group, rank, own = group, dist.get_rank(group), weight.shape[0]
        ignored = targets == scalars[2]
        ctx.scalars = (*scalars[:2], IGNORED)
        owner = (targets[:, None] >= ends).sum(-1)
        local = (targets - (ends[rank] - own)).where(owner == rank, own)
        local = local.masked_fill((targets < 0) | (owner == len(ends)), own + 1)  # no id: NaN
        local = local.masked_fill(ignored, IGNORED)
        stats = torch.stack(ctx.ops.linear_logprobs_fwd(hidden, weight, bias, local, *ctx.scalars))
        every = stats.new_zeros((len(ends), *stats.shape))
        if stats.numel():
            dist.all_gather(list(every), stats, group=group)
        logp, entropy, lse = (
            x.masked_fill(ignored, 0)
            for x in combine(every[:, 0], every[:, 1], every[:, 2], owner.clamp(max=len(ends) - 1))
        )
        ctx.save_for_backward(hidden, weight, bias, local, logp, entropy, lse)
        return logp, entropy

    @staticmethod
    @once
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple:
        needs, hidden = list(ctx.needs_input_grad[2:5]), ctx.saved_tensors[0]
        up = (dlogp.contiguous(), dentropy.contiguous())
        grads = list(
            ctx.ops.linear_logprobs_bwd(*ctx.saved_tensors, *up, *ctx.scalars, needs, True)
        )
        if needs[0]:
            if hidden.numel():
                dist.all_reduce(grads[0], group=ctx.group)
            grads[0] = grads[0].to(hidden.dtype)
        grads = [g if n else None for g, n in zip(grads, needs, strict=True)]
        return (None, None, *grads, None, None, None)


class Reference:
    """The operators `linear_logprobs_fwd` / `_bwd` in PyTorch, "elsewhere" included."""

    @staticmethod
    def linear_logprobs_fwd(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        temperature: float, softcap: float, ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        v, ignored = weight.shape[0], targets == ignore_index
        live = hidden.masked_fill(ignored[:, None], 0)
        logits = linear_logits_ref(live, weight, bias)
        here = (targets >= 0) & (targets < v)
        logp, entropy = token_logprobs_ref(logits, targets.where(here, 0), temperature, softcap)
        lse = _scaled(logits, temperature, softcap).logsumexp(-1)
        out = (logp.where(here, -lse), entropy, lse)
        missing = ~here & (targets != v)
        return tuple(x.masked_fill(missing, torch.nan).masked_fill(ignored, 0) for x in out)  # type: ignore[return-value]

    @staticmethod
    def linear_logprobs_bwd(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        logp: Tensor, entropy: Tensor, lse: Tensor, dlogp: Tensor, dentropy: Tensor,
        temperature: float, softcap: float, ignore_index: int,
        needs: list[bool], fp32_dhidden: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        v, up = weight.shape[0], logp.dtype
        live = (targets != ignore_index) & (targets >= 0) & (targets <= v) & (logp != -torch.inf)
        live = (live & ((dlogp != 0) | (dentropy != 0)))[:, None]
        h = hidden.to(up).where(live, 0)
        logits = linear_logits_ref(h, weight, bias)
        z = _scaled(logits, temperature, softcap)
        c, e, ent = dlogp[:, None].to(up), dentropy[:, None].to(up), entropy[:, None]
        onehot = torch.arange(v, device=z.device) == targets[:, None]
        log_p = logp[:, None].where(onehot, z - lse[:, None]).clamp(min=torch.finfo(up).min)
        p = log_p.exp()
        score = (-torch.expm1(logp))[:, None].where(onehot, -p)
        dz = (c * score - e * p * (log_p + ent)).where(live, 0)
        if softcap:
            dz = dz * (1 - torch.tanh(logits / softcap).square())
        dz = dz / temperature
        dtypes = (
            up if fp32_dhidden else hidden.dtype,
            weight.dtype,
            (weight if bias is None else bias).dtype,
        )
        grads = (
            dz @ weight.to(up) if needs[0] else dz.new_empty(0),
            dz.T @ h if needs[1] else dz.new_empty(0),
            dz.sum(0) if needs[2] else dz.new_empty(0),
        )
        return tuple(g.to(d) for g, d in zip(grads, dtypes, strict=True))  # type: ignore[return-value]


def _scaled(logits: Tensor, temperature: float, softcap: float) -> Tensor:
    z = logits
    if softcap:
        z = (softcap * torch.tanh(z / softcap)).where(z != -torch.inf, -torch.inf)
    return z / temperature
