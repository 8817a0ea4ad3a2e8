"""How far the sampled token's embedding lies from the expected one: what a hop linearises over.

    gap = E |e_y - ebar|^2 = sum_v p_v |e_v|^2 - |ebar|^2,      ebar = sum_v p_v e_v,  y ~ p

0 where the next token is certain. Both sums are taken about the likeliest token's embedding, with
that token left out: then every term is as small as the chance of another token, and nothing
cancels when p is peaked. Formula ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgkern.ops import _cause, _check
from vgkern.ops.linear_token_logprobs import linear_inputs, linear_logits_ref

ROWS = 16 << 20  # bytes of a block of logits
VOCAB = 8192  # ids of a block of weights in fp32, where they are narrower


def sampling_gap_ref(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    embedding: Tensor,  # [V, He]
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    z = linear_logits_ref(hidden, weight, bias)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    p, e = (z / temperature).softmax(-1), embedding.to(z.dtype)
    return p @ e.square().sum(-1) - (p @ e).square().sum(-1)


@torch.no_grad()
def sampling_gap(
    hidden: Tensor,  # [..., H] fp32|bf16|fp16|fp64
    weight: Tensor,  # [V, H] dtype of hidden
    embedding: Tensor,  # [V, He]: what the model is fed for each token
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """E |e_y - ebar|^2 of each row, fp32 [...] (fp64 for fp64), in units of the embedding squared.

    Never [N, V]: rows go in blocks of 16 MiB of logits. No gradient. Any device.
    Raises ValueError / TypeError naming the argument for a wrong shape, dtype, device or bound,
    NonFiniteError for NaN logits (on CPU).
    """
    device, rows, weight = linear_inputs(hidden.detach(), weight.detach(), bias)
    embedding = _check.floating("embedding", embedding, 2).detach()
    vocab = weight.shape[0]
    if embedding.shape[0] != vocab:
        allowed = f"[V, He] with the vocabulary of the head, V = {vocab}"
        raise _check.fail("embedding", embedding, allowed)
    _check.on_device(device, "hidden", embedding=embedding)
    cap, heat = _check.softcap(softcap), _check.positive("temperature", temperature)
    up = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    square = torch.linalg.vector_norm(embedding, dim=-1, dtype=up).square_()
    size = max(1, ROWS // (vocab * up.itemsize))
    parts = [
        _block(h, weight, embedding, bias, heat, cap, square)
        for h in rows.split(size)  # fp32 throughout, so that blocks do not show
    ]
    gap = torch.cat(parts) if parts else rows.new_empty(0, dtype=up)
    if _check.can_look(device) and bool(gap.isnan().any()):  # the table is not read for nothing
        _check.refuse("embedding", embedding, ~embedding.isfinite(), "finite numbers")
    _cause.no_nan(gap, hidden, weight, bias, heat)
    return gap.view(hidden.shape[:-1])


def _block(
    hidden: Tensor,  # [n, H]
    weight: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    square: Tensor,  # [V] |e_v|^2, its dtype is the one to compute in
) -> Tensor:  # [n]
    p = square.new_empty(len(hidden), len(weight))
    h = hidden.to(square.dtype)
    spans = [slice(at, at + VOCAB) for at in range(0, len(weight), VOCAB)]
    for ids in spans:
        torch.mm(h, weight[ids].to(square.dtype).T, out=p[:, ids])
    if bias is not None:
        p += bias.to(p.dtype)
    if softcap:  # an id blocked by -inf stays blocked
        p = torch.where(p == -torch.inf, p, softcap * torch.tanh(p / softcap))
    p = torch.softmax(p.div_(temperature), -1)
    top = p.argmax(-1)
    p.scatter_(1, top[:, None], 0)
    rest, e_top = p.sum(-1), embedding[top].to(p.dtype)
    mean = torch.zeros_like(e_top)  # sum of p_v e_v over the other tokens
    for ids in spans:
        mean.addmm_(p[:, ids], embedding[ids].to(p.dtype))
    about = p @ square - 2 * torch.linalg.vecdot(e_top, mean) + rest * square[top]
    shift = torch.addcmul(mean, rest[:, None], e_top, value=-1)
    return (about - shift.square().sum(-1)).clamp_(min=0)
