"""Replay agreement: would the trainer, with the noise of the rollout, choose the same tokens?

    agreement = mean over rows of [ argmax_v (z_v + g_v) = token ]
    chance    = mean over rows of p(token)

z are the trainer's logits under the sampler's own options, g is the Gumbel noise of
`linear_sample`, regenerated from its counter. Where sampler and trainer agree it is 1; a token
flips with about the probability by which the two distributions differ, so one number of one step
shows a wrong temperature, stale weights, a head in another precision or a wrong truncation, with no
log-prob from the sampler. Noise that is not the tokens' own agrees by `chance`, the share that any
fresh draw repeats. Formula: ours.
"""

from typing import Any

import torch
from torch import Tensor

from vgkern.ops import _check
from vgkern.ops.linear_sample import linear_sample
from vgkern.ops.linear_token_logprobs import linear_token_logprobs
from vgkern.ops.noise import Noise

SIGMAS = 4.0  # an agreement within so many of chance is taken for chance


@torch.no_grad()
def replay_agreement(
    hidden: Tensor,  # [..., H] fp32|bf16|fp16|fp64: of the trainer, predicting `tokens`
    weight: Tensor,  # [V, H] dtype of hidden
    tokens: Tensor,  # [...] int64: what the sampler drew
    noise: Noise,  # the noise it drew them with
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # one, or one per row [...]; 0: greedy, without noise
    softcap: float | None = None,
    top_k: int | Tensor | None = None,  # one, or one per row [...], as the next two
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    mask: Tensor | None = None,  # [...] bool or 0/1, False: not looked at
    limit: int | None = None,
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Share of unmasked rows whose token is chosen again, fp32 scalar on the device of hidden; NaN
    without a row. Formula: module docstring. Costs one forward of the head over the rows.

    limit: look at so many rows at most, drawn by the noise's seed and the number of rows: the same
    rows whenever the same call is made.
    mask: of a GPU's states it may lie on the host, which then waits for nothing.
    check: raise ValueError where the agreement is no better than chance, which is what noise of
    other tokens gives, and for greedy tokens, which any noise gives. Costs a second
    forward of the head; needs a host sync on a GPU.

    Raises ValueError / TypeError naming the argument, as `linear_sample`; NonFiniteError for NaN.
    """
    shape = hidden.shape[:-1]
    tokens = _check.targets("tokens", tokens, shape)
    host = isinstance(mask, Tensor) and mask.device.type == "cpu"
    _check.on_device(hidden.device, "hidden", tokens=tokens, mask=None if host else mask)
    if not isinstance(noise, Noise):
        raise TypeError(f"noise: got {_check.describe(noise)}; allowed: vgkern.Noise")
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise _check.fail("limit", limit, "an int >= 1, or None for all rows")
    rows = torch.arange(shape.numel(), device="cpu" if host else hidden.device)
    if mask is not None:
        rows = rows[_check.mask("mask", mask, shape).reshape(-1)]
    if limit is not None and limit < len(rows):
        generator = torch.Generator().manual_seed((noise.seed + len(rows)) % 2**63)
        drawn = torch.randperm(len(rows), generator=generator)[:limit]
        rows = rows[drawn.sort().values.to(rows.device)]
    rows = rows.to(hidden.device, non_blocking=True)
    if not len(rows):
        return torch.full((), torch.nan, device=hidden.device)
    own = Noise(noise.seed, *(x[rows] for x in noise.rows(shape, hidden.device)))

    def looked_at(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return _check.rows_like(name, x, shape, f"a number or {list(shape)}").reshape(-1)[rows]

    temperature = looked_at("temperature", temperature)
    top_k, top_p = looked_at("top_k", top_k), looked_at("top_p", top_p)
    min_p = looked_at("min_p", min_p)
    if check and bool((torch.as_tensor(temperature) == 0).any()):
        got = "0" if isinstance(temperature, Tensor) else temperature
        raise _check.fail("temperature", got, "> 0 with check: any noise chooses greedy tokens")
    h, y = hidden.reshape(-1, hidden.shape[-1])[rows], tokens.reshape(-1)[rows]
    same = dict(
        bias=bias, temperature=temperature, softcap=softcap, top_k=top_k, top_p=top_p, min_p=min_p,
        backend=backend,
    )  # fmt: skip
    agreement = (linear_sample(h, weight, own, **same).token == y).float().mean()  # type: ignore[arg-type]
    if check:
        p = linear_token_logprobs(h, weight, y, **same).logp.exp()  # type: ignore[arg-type]
        _refuse_chance(float(agreement), p.double())
    return agreement


def _refuse_chance(agreement: float, p: Tensor) -> None:
    chance = float(p.mean())
    spread = float((p * (1 - p)).sum().sqrt()) / len(p)
    if agreement < 1 and agreement <= chance + SIGMAS * spread:
        raise ValueError(
            f"noise: {agreement:.3f} of {len(p)} tokens are chosen again, and noise of other "
            f"tokens would give {chance:.3f}; allowed: the Noise(seed, sequence, position), head "
            f"and options that linear_sample drew `tokens` with"
        )
