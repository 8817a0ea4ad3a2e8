"""Temperature per row and truncation: what `linear_sample` draws from and what
`linear_token_logprobs` scores.

    z = s(logits) / temperature                      temperature 0: only the argmax is left
    kept, in this order: top_k, then top_p of what is left, then min_p relative to max p
    what is not kept is set to -inf: probability 0 and no gradient

Ties go to the lowest id, everywhere. The kept set is a constant to the gradient.
"""

import torch
from torch import Tensor

from vgkern.ops import _check

CUTS = ("top_k", "top_p", "min_p")


def truncated_ref(
    logits: Tensor,  # [..., V] fp32|fp64
    temperature: Tensor,  # [...] >= 0
    softcap: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    z = logits
    if softcap:
        z = (softcap * torch.tanh(z / softcap)).where(z != -torch.inf, -torch.inf)  # still blocked
    greedy = (temperature == 0)[..., None]
    z = z / temperature[..., None].to(z.dtype).where(~greedy, 1)
    with torch.no_grad():
        order = torch.argsort(z, dim=-1, descending=True, stable=True)  # ties: the lowest id first
        rank = torch.arange(z.shape[-1], device=z.device)
        first = rank < (top_k or z.shape[-1])
        p = z.gather(-1, order).masked_fill(~first, -torch.inf).softmax(-1)
        mass = top_p if top_p < 1 else torch.inf  # a rounded sum reaches 1 before the last id
        kept = (p.cumsum(-1) - p < mass) & (p >= min_p * p[..., :1]) & first & ~greedy
        kept = kept | (rank == 0)  # the most likely token always stays
        kept = torch.zeros_like(kept).scatter(-1, order, kept) | z.isnan().any(-1, keepdim=True)
    return z.masked_fill(~kept, -torch.inf)


def cuts(
    top_k: int | None, top_p: float | None, min_p: float | None, vocab: int
) -> tuple[int, float, float]:
    """The three cuts, checked, as operators take them: 0, 1.0, 0.0 cut nothing."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise _check.fail("top_k", top_k, "an int >= 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise _check.fail("top_p", top_p, "0 < top_p <= 1, or None")
    if min_p is not None and not 0 <= min_p <= 1:
        raise _check.fail("min_p", min_p, "0 <= min_p <= 1, or None")
    top_k = 0 if top_k is None or top_k >= vocab else top_k
    return top_k, 1.0 if top_p is None else float(top_p), float(min_p or 0.0)


def temperatures(temperature: float | Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """One fp32 temperature per flattened row; 0 is greedy."""
    if not isinstance(temperature, Tensor):
        if temperature != 0 or isinstance(temperature, bool):
            _check.positive("temperature", temperature)
        return torch.full((shape.numel(),), float(temperature), device=device)
    t = _check.rows_like("temperature", temperature, shape, f"a number or {list(shape)}")
    if _check.can_look(t.device) and not bool((t >= 0).all() & t.isfinite().all()):
        raise _check.fail("temperature", f"values from {float(t.min())}", "finite numbers >= 0")
    return t.detach().to(device, torch.float32).reshape(-1).contiguous()
