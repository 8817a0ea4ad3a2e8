"""The next input embedding, with the sampled token's gradient carried back to its distribution.

    forward      x = E[token], exactly: the hard token
    z = s(hidden weight^T + bias) / temperature
    q = softmax((z + g) / tau)       relaxation "gumbel": g is the noise that chose the token
    q = softmax(z)                   relaxation "expected": no noise, tau 1
    backward     u = E dx,   dz = (1 / tau) q (u - <q, u>),   dh = dz W,   dW = dz^T h
                 dE[token] += dx, from the hard lookup and nothing else

This is straight-through, x = (onehot + q - sg(q)) sg(E) for hidden and head: the third term of the
row gradient, the costate dx arriving through the token. E also getting q^T dx would count it twice.
g is `Noise.gumbel`, replayed from (seed, sequence, position) and never stored: with the head,
temperature and soft-cap of `linear_sample` it is the noise that `linear_sample` drew.
Rows whose dx is exactly 0 are not looked at. Head and table may be one tensor: autograd adds.
"""

from typing import Any

import torch
from torch import Tensor

from vgkern.ops import _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators
from vgkern.ops._linear import linear_inputs, linear_logits_ref, no_autocast
from vgkern.ops.noise import Noise

RELAXATIONS = ("gumbel", "expected")


def noisy_embedding_ref(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    embedding: Tensor,  # [V, He]
    tokens: Tensor,  # [N] int64
    noise: Noise | None,  # rows [N]; None: relaxation "expected"
    tau: float = 1.0,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    options = (noise, tau, temperature, softcap)
    return StraightThrough.apply(hidden, weight, bias, embedding, tokens, options)


def straight_through_ref(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    tokens: Tensor,
    dx: Tensor,  # [N, He]
    noise: Noise | None,
    tau: float,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias and embedding, fp32 (fp64 for fp64)."""
    up = torch.float64 if torch.float64 in (dx.dtype, hidden.dtype) else torch.float32
    live = (dx != 0).any(-1, keepdim=True)
    h, x = hidden.where(live, 0), dx.to(up)
    s = linear_logits_ref(h, weight, bias).to(up)
    z, slope = s, torch.ones_like(s)
    if softcap:
        z = (softcap * torch.tanh(s / softcap)).where(s != -torch.inf, -torch.inf)  # still blocked
        slope = 1 - torch.tanh(s / softcap) ** 2
    z = z / temperature
    if noise is not None:
        z = (z + noise.gumbel(weight.shape[0], up)) / tau
    none = z.amax(-1, keepdim=True) == -torch.inf  # every id is blocked
    q = z.masked_fill(none, 0).softmax(-1)
    live = live & ~none
    u = linear_logits_ref(x, embedding.to(up), None)
    dz = (q * (u - (q * u).sum(-1, keepdim=True)) * slope / (tau * temperature)).where(live, 0)
    table = torch.zeros(embedding.shape, dtype=up, device=x.device).index_add(0, tokens, x)
    with no_autocast(x.device):
        return dz @ weight.to(up), dz.T @ h.to(up), dz.sum(0), table


class StraightThrough(torch.autograd.Function):
    """E[tokens], with the gradient of `straight_through_ref`. Differentiable twice."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        embedding: Tensor,
        tokens: Tensor,
        options: tuple,
    ) -> Tensor:
        return lookup(embedding, tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5]

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple:
        hidden, weight, bias, embedding, tokens = ctx.saved_tensors
        saved = (hidden, weight, bias, embedding)
        grads = straight_through_ref(*saved, tokens, dx, *ctx.options)
        needed = zip(grads, saved, ctx.needs_input_grad, strict=False)
        return (*(g.to(t.dtype) if n else None for g, t, n in needed), None, None)


def lookup(embedding: Tensor, tokens: Tensor) -> Tensor:
    """E[tokens]. A token outside [0, V), which only the CPU has looked for, gives a row of NaN."""
    if _check.can_look(tokens.device):
        return embedding[tokens]
    safe = tokens.clamp(0, embedding.shape[0] - 1)
    return embedding[safe].where((safe == tokens)[..., None], torch.nan)


class NoisyEmbeddingFunction(torch.autograd.Function):
    """The lookup, with `vgkern::noisy_embedding_bwd` behind it. Once differentiable."""

    @staticmethod
    def forward(
        backend: str,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        embedding: Tensor,  # [V, He]
        tokens: Tensor,  # [N]
        rows: tuple,  # seed, sequence [N], position [N]
        scalars: tuple,
    ) -> Tensor:
        return lookup(embedding, tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        backend, *given, (ctx.seed, *rows), ctx.scalars = inputs
        ctx.save_for_backward(*given, *rows)
        ctx.ops = operators(backend)

    @staticmethod
    @once
    def backward(ctx: Any, dx: Tensor) -> tuple:
        needs = list(ctx.needs_input_grad[1:5])
        *given, sequence, position = ctx.saved_tensors
        grads = ctx.ops.noisy_embedding_bwd(
            *given, dx.contiguous(), ctx.seed, sequence, position, *ctx.scalars, needs
        )
        grads = (g if n else None for g, n in zip(grads, needs, strict=True))
        return (None, *grads, None, None, None)


def noisy_embedding(
    hidden: Tensor,  # [..., H] fp32|bf16|fp16|fp64
    weight: Tensor,  # [V, H] dtype of hidden
    embedding: Tensor,  # [V, He]
    tokens: Tensor,  # [...] int64
    noise: Noise | None = None,
    *,
    bias: Tensor | None = None,  # [V] dtype of hidden, or fp32
    relaxation: str = "gumbel",
    tau: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """E[tokens] [..., He], bit for bit; gradients to hidden, weight, bias and embedding.

    For "gumbel" pass what `linear_sample` got: the same noise, bias, temperature and soft-cap. A
    truncation (top_k, top_p, min_p) has no part in q. Formula: module docstring.

    Raises ValueError / TypeError naming the argument for a wrong shape, dtype, device, token or
    bound (temperature > 0, tau > 0), an unknown relaxation, and noise that is missing.
    """
    device, h2, hw = linear_inputs(hidden, weight, bias)
    shape = hidden.shape[:-1]
    embedding = _check.floating("embedding", embedding, 2)
    if embedding.shape[0] != weight.shape[0] or embedding.shape[1] == 0:
        allowed = f"[V, He] with the vocabulary of the head, V = {weight.shape[0]}, and He >= 1"
        raise _check.fail("embedding", embedding, allowed)
    tokens = _check.targets("tokens", tokens, shape)
    _check.on_device(device, "hidden", embedding=embedding, tokens=tokens)
    _check.target_range("tokens", tokens, weight.shape[0], None)
    tau, noise = relaxed("", relaxation, tau, noise)
    scalars = (tau, _check.positive("temperature", temperature))
    expected = noise is None
    y = tokens.reshape(-1).contiguous()
    rows = (y, y) if noise is None else noise.rows(shape, device)  # (y, y): not read
    chosen = choose(backend, device, hidden.dtype, embedding.dtype)
    cap = _check.softcap(softcap)
    if chosen == "torch":
        drawn = None if noise is None else Noise(noise.seed, *rows)
        out = noisy_embedding_ref(h2, hw, bias, embedding, y, drawn, *scalars, cap)
    else:
        seed = 0 if noise is None else noise.signed_seed
        e = embedding
        e = e if e.stride(1) == 1 and e.stride(0) >= e.shape[1] else e.contiguous()
        out = NoisyEmbeddingFunction.apply(
            chosen, h2, hw, bias, e, y, (seed, *rows), (*scalars, cap, expected)
        )
    return out.view(*shape, embedding.shape[1])


def relaxed(
    of: str, relaxation: str, tau: float, noise: Noise | None
) -> tuple[float, Noise | None]:
    """Checked (tau, noise); no noise means "expected". `of` comes before the arguments' names."""
    if relaxation not in RELAXATIONS:
        raise _check.fail(f"{of}relaxation", relaxation, " or ".join(map(repr, RELAXATIONS)))
    expected = relaxation == "expected"
    tau = _check.positive(f"{of}tau", tau)
    if not 1e-30 <= tau <= 1e30:
        raise _check.fail(f"{of}tau", tau, "1e-30 to 1e30: logits / tau are fp32")
    if expected and tau != 1:
        why = "1.0 with relaxation 'expected', which has no noise to relax"
        raise _check.fail(f"{of}tau", tau, why)
    if not isinstance(noise, Noise) and not (expected and noise is None):
        why = "a vgkern.Noise" + (", or None" if expected else "; None only with 'expected'")
        raise TypeError(f"{of}noise: got {_check.describe(noise)}; allowed: {why}")
    return tau, None if expected else noise


def _fake(hidden, weight, bias, embedding, *rest):  # type: ignore[no-untyped-def]
    return tuple(
        t.new_empty(t.shape) if n and t is not None else hidden.new_empty(0)
        for t, n in zip((hidden, weight, bias, embedding), rest[-1], strict=True)
    )


define(
    "noisy_embedding_bwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor embedding, "
    "Tensor tokens, Tensor dx, int seed, Tensor sequence, Tensor position, float tau, "
    "float temperature, float softcap, bool expected, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    kernels="noisy_embedding",
)
