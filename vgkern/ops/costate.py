"""A costate that arrives through each sampled token: the third term of the row gradient (ours).

    z = s(hidden weight^T + bias) / temperature,   u_i = E lambda_i
    q_i = softmax((z_i + g_i) / tau), g the replayed noise;   relaxation "expected": softmax(z_i)
    dz_i += scale (1 / tau) q_i (u_i - <q_i, u_i>)

It is what `noisy_embedding` carries back, added to the gradient that the loss makes of the same
row: one recompute of the logits for the policy, entropy and costate terms together.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgkern.ops import _check
from vgkern.ops.noise import Noise
from vgkern.ops.noisy_embedding import noisy_embedding_ref, relaxed


@dataclass(frozen=True)
class Costate:
    """lambda, the costate at the *next* input of each row, for `linear_policy_loss` and
    `linear_token_logprobs`.

    The loss keeps its value; the gradients of hidden, weight and bias become those of

        loss + weight * (noisy_embedding(hidden, weight, embedding.detach(), targets, noise, ...)
                         * value).sum()

    with the bias, temperature and soft-cap of the op. Neither value nor embedding gets a gradient.

    Args:
        value: lambda [..., He], the op's rows and the width of the embedding; floating point. A
            row that is exactly 0, masked or ignored costs nothing; a masked one may hold NaN.
            Of the *differentiable* part of an objective only: the score term `A log pi` has the
            effect of the sampled token already.
        embedding: the input table [V, He], of the head's vocabulary; may be the head itself.
        noise: what `linear_sample` drew the targets with; None for "expected".
        relaxation: "gumbel" or "expected", as in `noisy_embedding`.
        tau: > 0, the temperature of the relaxation, from 1e-30 to 1e30; 1 for "expected".
        weight: a factor of the term; 0, or of a magnitude within fp32.

    Raises ValueError or TypeError that names the field; the op checks the shapes.
    """

    value: Tensor
    embedding: Tensor
    noise: Noise | None = None
    relaxation: str = "expected"
    tau: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check.floating("costate.value", self.value)
        _check.floating("costate.embedding", self.embedding, 2)
        relaxed("costate.", self.relaxation, self.tau, self.noise)
        factor = abs(_check.finite("costate.weight", self.weight))
        fp32 = torch.finfo(torch.float32)
        if factor and not fp32.tiny <= factor <= fp32.max:
            allowed = f"0, or a magnitude within fp32, {fp32.tiny:.3g} to {fp32.max:.3g}"
            raise _check.fail("costate.weight", self.weight, allowed)

    def carried(self, live: Tensor, weight: Tensor) -> "Carried | None":
        """What the operators take, for rows like `live` [...] of a head [V, H]; None if 0."""
        table, (vocab, _) = self.embedding.detach(), weight.shape
        if table.shape[0] != vocab or table.shape[1] == 0:
            allowed = f"[V, He] with the vocabulary of the head, V = {vocab}, and He >= 1"
            raise _check.fail("costate.embedding", table, allowed)
        width = table.shape[1]
        _check.rows_like("costate.value", self.value, torch.Size((*live.shape, width)))
        names = {"costate.value": self.value, "costate.embedding": table}
        _check.on_device(weight.device, "weight", **names)
        tau, noise = relaxed("costate.", self.relaxation, self.tau, self.noise)
        sequence = position = None
        if noise is not None:
            sequence, position = noise.rows(live.shape, live.device, "costate.noise")
        if self.weight == 0:
            return None
        given = self.value.detach().masked_fill(~live[..., None], 0)
        value = given.to(table.dtype)  # `carried_rows` has seen to the range of fp16
        if _check.can_look(value.device) and not bool(value.isfinite().all()):
            at = (~value.isfinite()).nonzero()[0].tolist()
            holds = torch.float32 if table.dtype == torch.float16 else table.dtype
            raise _check.NonFiniteError(
                f"costate.value: got {float(given[tuple(at)])} at row {at[:-1]}; allowed: numbers "
                f"finite in {holds}, for the dtype of costate.embedding, where a row is neither "
                "masked nor ignored"
            )
        if table.stride(1) != 1 or table.stride(0) < width:
            table = table.contiguous()
        stats = torch.float64 if weight.dtype == torch.float64 else torch.float32
        scale = torch.zeros((), dtype=stats, device=value.device) + self.weight  # see _library
        seed = 0 if noise is None else noise.signed_seed
        value = value.reshape(-1, width).contiguous()
        return Carried(seed, tau, value, table, sequence, position, scale)


class Carried(NamedTuple):
    """A costate as the operators take it, in the order of COSTATE."""

    seed: int
    tau: float
    value: Tensor  # [N, He] dtype of embedding; 0 where there is none
    embedding: Tensor  # [V, He]
    sequence: Tensor | None  # [N] int64; None: "expected"
    position: Tensor | None
    scale: Tensor  # [] or [N], fp32, fp64 for an fp64 head


COSTATE = (
    "int seed=0, float tau=1.0, Tensor? costate=None, Tensor? embedding=None, "
    "Tensor? sequence=None, Tensor? position=None, Tensor? costate_scale=None"
)


def carried_rows(costate: Costate | None, live: Tensor, weight: Tensor) -> Carried | None:
    """`Costate.carried`. Beside a table in fp16, which lacks the range of costates, a row is a
    power of two, in `scale` [N], times what fp16 holds: rounded to 11 bits whatever its size."""
    if costate is None or costate.embedding.dtype != torch.float16 or not costate.value.numel():
        return None if costate is None else costate.carried(live, weight)
    value = costate.value.detach()
    most = value.abs().amax(-1, keepdim=True).to(torch.float32)
    by = torch.exp2(torch.floor(torch.log2(most)))
    known = (by >= torch.finfo(by.dtype).tiny) & by.isfinite()  # neither 0 nor NaN nor inf
    by = by.where(known, 1)
    out = dataclasses.replace(costate, value=value / by).carried(live, weight)
    return out if out is None else out._replace(scale=out.scale * by.reshape(-1))


def widened(costate: Carried) -> Carried:
    """For the reference: fp32 instead of fp16, where what arrives from above may overflow."""
    if costate.embedding.dtype != torch.float16:
        return costate
    up = costate.scale.dtype
    value = costate.value.to(up) * costate.scale.expand(len(costate.value))[:, None]
    one = costate.scale.new_ones(())
    return costate._replace(value=value, embedding=costate.embedding.to(up), scale=one)


def costate_of(costate: object) -> Costate | None:
    if costate is not None and not isinstance(costate, Costate):
        raise TypeError(f"costate: got {_check.describe(costate)}; allowed: vgkern.Costate or None")
    return costate


def costate_term_ref(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    costate: Carried,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """0, with the gradient of scale * <noisy_embedding, value>."""
    seed, tau, value, embedding, sequence, position, scale = costate
    noise = None if sequence is None else Noise(seed % 2**64, sequence, position)  # type: ignore[arg-type]
    any_token = torch.zeros(len(value), dtype=torch.int64, device=value.device)
    options = (noise, tau, temperature, softcap)
    x = noisy_embedding_ref(hidden, weight, bias, embedding, any_token, *options)
    return _Term.apply(x, value, scale)


class _Term(torch.autograd.Function):
    """0 for scale * <x, value>: the gradient without the value, which would be added to a loss."""

    @staticmethod
    def forward(x: Tensor, value: Tensor, scale: Tensor) -> Tensor:
        return torch.zeros_like(scale)  # in the dtype of the loss, whatever the table's is

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple:
        x, value, scale = ctx.saved_tensors
        return (d * scale * value).to(x.dtype), None, None


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(logp: Tensor, entropy: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
        return logp.view_as(logp), entropy.view_as(entropy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple:
        return dlogp, dentropy, torch.ones_like(ctx.saved_tensors[0])


def attached(logp: Tensor, entropy: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
    """logp and entropy; a backward pass through either adds the gradient of `term`, once."""
    return _Attached.apply(logp, entropy, term)
