"""Hidden states and head to a sampled token, its log-probability and the entropy, in one pass.

    z = s(hidden weight^T + bias) / temperature        token = argmax_v z_v + g_v    (Gumbel-max)
    truncation, in this order: top_k, then top_p of what is left, then min_p relative to max p
    logp, entropy: of the truncated, renormalised distribution that was sampled from

g is `Noise.gumbel`: keyed by (seed, sequence, position, vocabulary id), so a token does not depend
on batch, order, tile, threads or backend, but where two candidates are equal to rounding. Ties go
to the lowest id, in the argmax and in every truncation. temperature 0 is greedy: argmax, logp 0.
The cpu backend never builds [B, V] probabilities.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vgkern.ops import _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, operators
from vgkern.ops.linear_token_logprobs import linear_inputs, linear_logits_ref
from vgkern.ops.noise import Noise


class Sample(NamedTuple):
    """token int64 [...], its log-probability and the entropy in nats, fp32 [...]."""

    token: Tensor
    logp: Tensor
    entropy: Tensor


def linear_sample_ref(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    noise: Noise,  # rows [N]
    temperature: Tensor,  # [N]
    softcap: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Sample:
    z = linear_logits_ref(hidden, weight, bias)
    if softcap:
        z = (softcap * torch.tanh(z / softcap)).where(z != -torch.inf, -torch.inf)  # still blocked
    greedy = (temperature == 0)[:, None]
    z = z / temperature[:, None].to(z.dtype).where(~greedy, 1)
    if top_k or top_p < 1 or min_p:
        z = _truncate_ref(z, top_k, top_p, min_p)
    best = torch.zeros_like(z, dtype=torch.bool).scatter(-1, z.argmax(-1, keepdim=True), True)
    z = z.masked_fill(greedy & ~best, -torch.inf)
    lp = z.log_softmax(-1)
    entropy = -(lp.exp() * lp.clamp(min=torch.finfo(lp.dtype).min)).sum(-1)
    token = (z + noise.gumbel(weight.shape[0], z.dtype)).argmax(-1)
    return Sample(token, lp.gather(-1, token[:, None]).squeeze(-1), entropy)


def _truncate_ref(z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    order = torch.argsort(z, dim=-1, descending=True, stable=True)  # stable: ties to the lowest id
    first = torch.arange(z.shape[-1], device=z.device) < (top_k or z.shape[-1])
    p = z.gather(-1, order).masked_fill(~first, -torch.inf).softmax(-1)
    kept = (p.cumsum(-1) - p < top_p) & (p >= min_p * p[:, :1]) & first
    kept[:, 0] = True  # the most likely token always stays
    return z.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), -torch.inf)


@torch.no_grad()
def linear_sample(
    hidden: Tensor,  # [..., H] fp32|bf16|fp16|fp64
    weight: Tensor,  # [V, H] dtype of hidden
    noise: Noise,
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # one, or one per row [...]; 0: greedy
    softcap: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    backend: str | None = None,
) -> Sample:
    """Samples one token per row, replayable from `noise`; no gradient. Formula: module docstring.

    Raises ValueError / TypeError naming the argument for wrong shapes, dtypes, devices or bounds
    (top_k >= 1, 0 < top_p <= 1, 0 <= min_p <= 1, temperature >= 0), NonFiniteError for NaN logits.
    """
    device, h2, hw = linear_inputs(hidden.detach(), weight.detach(), bias)
    shape = hidden.shape[:-1]
    vocab = weight.shape[0]
    if not isinstance(noise, Noise):
        raise TypeError(f"noise: got {_check.describe(noise)}; allowed: vgkern.Noise")
    rows = noise.rows(shape, device)
    t = _temperatures(temperature, shape, device)
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise _check.fail("top_k", top_k, "an int >= 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise _check.fail("top_p", top_p, "0 < top_p <= 1, or None")
    if min_p is not None and not 0 <= min_p <= 1:
        raise _check.fail("min_p", min_p, "0 <= min_p <= 1, or None")
    cut = (min(top_k or 0, vocab), 1.0 if top_p is None else top_p, min_p or 0.0)
    chosen = choose(backend, device, hidden.dtype)
    if chosen == "torch":
        flat = Noise(noise.seed, *rows)
        out = linear_sample_ref(h2, hw, bias, flat, t, _check.softcap(softcap), *cut)
    else:
        seed = noise.seed - 2**64 if noise.seed >= 2**63 else noise.seed  # int64 on the way down
        out = Sample(
            *operators(chosen).linear_sample_fwd(
                h2, hw, bias, seed, *rows, t, _check.softcap(softcap), *cut
            )
        )
    _check.no_nan("hidden", out.logp, "the log-probability (hidden, weight or bias)")
    return Sample(*(x.reshape(shape) for x in out))


def _temperatures(temperature: float | Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """One fp32 temperature per flattened row."""
    if not isinstance(temperature, Tensor):
        if temperature != 0:
            _check.positive("temperature", temperature)
        return torch.full((shape.numel(),), float(temperature), device=device)
    t = _check.rows_like("temperature", temperature, shape, f"a number or {list(shape)}")
    if _check.can_look(t.device) and not bool((t >= 0).all() & t.isfinite().all()):
        raise _check.fail("temperature", f"values from {float(t.min())}", "finite numbers >= 0")
    return t.detach().to(device, torch.float32).reshape(-1).contiguous()


def _fake(hidden, weight, bias, seed, sequence, *rest):  # type: ignore[no-untyped-def]
    row = hidden.new_empty(sequence.shape, dtype=torch.float32)
    return torch.empty_like(sequence), row, torch.empty_like(row)


define(
    "linear_sample_fwd(Tensor hidden, Tensor weight, Tensor? bias, int seed, Tensor sequence, "
    "Tensor position, Tensor temperature, float softcap, int top_k, float top_p, float min_p) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
    kernels="linear_sample",
)
