"""Hidden states and head to a sampled token, its log-probability and the entropy, in one pass.

    z = s(hidden weight^T + bias) / temperature        token = argmax_v z_v + g_v    (Gumbel-max)
    truncation, in this order: top_k, then top_p of what is left, then min_p relative to max p
    logp, entropy: of the truncated, renormalised distribution that was sampled from; what
    `linear_token_logprobs` with the same options gives for the token

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
from vgkern.ops._truncate import cuts, temperatures, truncated_ref
from vgkern.ops.linear_token_logprobs import linear_inputs, linear_logits_ref
from vgkern.ops.noise import Noise, warn_of_twins
from vgkern.ops.token_logprobs import token_logprobs_ref


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
    logits = linear_logits_ref(hidden, weight, bias)
    z = truncated_ref(logits, temperature, softcap, top_k, top_p, min_p)
    token = (z + noise.gumbel(weight.shape[0], z.dtype)).argmax(-1)
    none = ~z.amax(-1).isfinite()  # nothing can be drawn
    return Sample(token, *(x.masked_fill(none, torch.nan) for x in token_logprobs_ref(z, token)))


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
    if not isinstance(noise, Noise):
        raise TypeError(f"noise: got {_check.describe(noise)}; allowed: vgkern.Noise")
    rows = noise.rows(shape, device)
    warn_of_twins(*rows)
    t = temperatures(temperature, shape, device)
    cut = cuts(top_k, top_p, min_p, weight.shape[0])
    chosen = choose(backend, device, hidden.dtype)
    if chosen == "torch":
        flat = Noise(noise.seed, *rows)
        out = linear_sample_ref(h2, hw, bias, flat, t, _check.softcap(softcap), *cut)
    else:
        out = Sample(
            *operators(chosen).linear_sample_fwd(
                h2, hw, bias, noise.signed_seed, *rows, t, _check.softcap(softcap), *cut
            )
        )
    _check.no_nan("hidden", out.logp, "the log-probability (hidden, weight or bias)")
    return Sample(*(x.reshape(shape) for x in out))


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
