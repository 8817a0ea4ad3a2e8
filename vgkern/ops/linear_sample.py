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

from vgkern.ops import _cause, _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, operators
from vgkern.ops._truncate import SCHEMA, cut_of, truncated_ref
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
    top_k: int | Tensor = 0,  # one, or one per row [N], as the next two
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
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
    top_k: int | Tensor | None = None,  # one, or one per row [...] int64; 0 there: no limit
    top_p: float | Tensor | None = None,  # one, or one per row [...], as min_p
    min_p: float | Tensor | None = None,
    backend: str | None = None,
) -> Sample:
    """Samples one token per row, replayable from `noise`; no gradient. Formula: module docstring.

    Raises ValueError / TypeError naming the argument for wrong shapes, dtypes, devices or bounds
    (top_k >= 1, 0 < top_p <= 1, 0 <= min_p <= 1, temperature >= 0), NonFiniteError for NaN logits.
    On a GPU no value is looked at, and nothing waits: a call can be captured in a CUDA graph. There
    a value out of bounds makes its row NaN.
    """
    device, h2, hw = linear_inputs(hidden.detach(), weight.detach(), bias)
    shape = hidden.shape[:-1]
    if not isinstance(noise, Noise):
        raise TypeError(f"noise: got {_check.describe(noise)}; allowed: vgkern.Noise")
    rows = noise.rows(shape, device)
    warn_of_twins(*rows)
    cut = cut_of(temperature, top_k, top_p, min_p, weight.shape[0], shape, device)
    cap, chosen = _check.softcap(softcap), choose(backend, device, hidden.dtype)
    if chosen == "torch":
        t, limits = cut.of_rows(torch.Size([h2.shape[0]]), device)
        out = linear_sample_ref(h2, hw, bias, Noise(noise.seed, *rows), t, cap, *limits)
    else:
        given = (h2, hw, bias, noise.signed_seed, *rows, cap, *cut)
        out = Sample(*operators(chosen).linear_sample_fwd(*given))
    _cause.no_nan(out.logp, hidden, weight, bias, _check.number(temperature))
    return Sample(*(x.reshape(shape) for x in out))


def _fake(hidden, weight, bias, seed, sequence, *rest):  # type: ignore[no-untyped-def]
    row = hidden.new_empty(sequence.shape, dtype=torch.float32)
    return torch.empty_like(sequence), row, torch.empty_like(row)


define(
    "linear_sample_fwd(Tensor hidden, Tensor weight, Tensor? bias, int seed, Tensor sequence, "
    f"Tensor position, float softcap, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _fake,
    kernels="linear_sample",
)
