"""The policy loss of critic-free RL, from per-token log-probs: every knob of `Objective`.

    loss = sum_i w_i l_i,   l = surrogate + beta KL - entropy_coef * entropy
    w_i  = mask_i / (denominator of the objective's reduction, or `normalizer`)

Log-ratios are selected by the mask and clamped to +-20 before exp or a sum, so a masked or far-off
token makes neither NaN nor a gradient; a token of probability 0 has no score. The sampler
correction scales the surrogate only. Formulas: `vgkern.objectives`. No collectives: pass the global
`normalizer` (tokens for "token", sequences for "seq" and "seq_sum", sequences times max_length for
"fixed") and micro-batches, accumulation and ranks give the same gradient.
"""

import math
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from vgkern.objectives import Objective
from vgkern.ops import _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators
from vgkern.ops._policy_rows import Rows, prepare
from vgkern.ops._segments import Segments

CLAMP = 20.0
LOW = -1e15  # stands for a log-prob of -inf: its square, and sums over a batch, stay finite
LOG_TINY = math.log(1e-8)  # VESPO's lower bound of a log-ratio
K3_MAX = 10.0
# what the backends count, in the order of their metrics tensor: `metrics_dict` says what each is
COUNTS = ("tokens", "active", "clip_low", "clip_high", "dual_clip", "kl", "entropy", "ratio_mean",
          "ratio_min", "ratio_max", "clamped", "sampler_gap")  # fmt: skip


class PolicyLoss(NamedTuple):
    """Scalar fp32 loss, and detached 0-d metrics (see `metrics_dict`)."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss_ref(
    logp: Tensor,  # [..., T], or [N] with segments
    advantages: Tensor,  # broadcastable to logp
    weight: Tensor,  # like logp: 0 where masked
    o: Objective,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    sampler: Tensor | None = None,
    entropy: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    m = weight != 0
    zeros = torch.zeros_like(logp)
    lp, a = logp.where(m, 0), advantages.where(m, 0)  # select before any exp: 0 * inf is NaN
    old = (logp.detach() if old is None else old).where(m, 0)
    own = _minus(lp, old)
    d = _log_ratio(own, a, m, o, segments)
    r = d.clamp(-CLAMP, CLAMP).exp()
    fix = torch.ones_like(lp)
    if sampler is not None and o.sampler_correction != "none":
        fix = _correction(_minus(old, sampler.where(m, 0)), o, segments)
    loss = _surrogate(lp, d, r, a, fix.where(m, 1), o, segments)
    kl = _kl(zeros if ref is None else _minus(ref.where(m, 0), lp), o)
    if o.beta:
        by = own.clamp(-CLAMP, CLAMP).exp() if o.ratio in ("sequence_sum", "geometric") else r
        loss = loss + o.beta * (kl * by if o.kl_ratio_corrected else kl)
    ent = zeros if entropy is None else entropy.where(m, 0)
    gap = zeros if sampler is None else _minus(lp, sampler.where(m, 0))
    loss = loss - o.entropy_coef * ent
    sick = zeros.masked_fill(loss.detach().isnan(), torch.nan)  # a NaN term has a NaN gradient
    total = (weight * (loss + sick * lp.where(lp != -torch.inf, 0))).sum()
    return total, _count(m, a, own, d, r, kl, ent, gap, o)


def _minus(x: Tensor, y: Tensor) -> Tensor:
    """x - y of log-probs; 0 where both are -inf, and no gradient through a blocked token."""
    return x.clamp(min=LOW) - y.clamp(min=LOW)


def _over(x: Tensor, segments: Segments | None) -> Tensor:
    """To every token the sum of x over its sequence."""
    if segments is None:
        return x.sum(-1, keepdim=True).expand_as(x)
    return segments.spread(segments.sums(x))


def _log_ratio(
    own: Tensor, a: Tensor, m: Tensor, o: Objective, segments: Segments | None
) -> Tensor:
    """What r is formed of, from each token's own log-ratio (0 where masked)."""
    if o.ratio in ("none", "token"):
        return own
    own, n = own.clamp(-CLAMP, CLAMP), _over(m.to(own.dtype), segments).clamp(min=1)
    if o.ratio == "sequence_sum":
        return _over(own, segments)
    if o.ratio == "geometric":
        own = torch.where(a > 0, own.clamp(max=o.clip_high), own.clamp(min=-o.clip_low))
    mean = _over(own, segments) / n
    return mean.detach() + (own - own.detach()) if o.ratio == "sequence_token" else mean


def _surrogate(
    lp: Tensor, d: Tensor, r: Tensor, a: Tensor, fix: Tensor, o: Objective,
    segments: Segments | None,
) -> Tensor:  # fmt: skip
    score = lp.where(lp != -torch.inf, 0)  # a blocked token has no score
    bounded = r.clamp(1 - o.clip_low, 1 + o.clip_high)
    if o.surrogate == "vespo":  # the sampler correction is part of phi
        return -_phi(d, a, fix, o, segments) * a * score
    if o.surrogate == "linear":
        loss = -a * (score if o.ratio == "none" else r)
    elif o.surrogate == "cispo":
        loss = -bounded.detach() * a * score
    elif o.surrogate == "sapo":
        t = torch.where(a > 0, o.tau_pos, o.tau_neg).to(a.dtype)
        loss = -a * 4 / t * torch.sigmoid(t * (r - 1))
    else:
        capped = r if o.delta is None else r.clamp(max=o.delta)
        loss = -torch.minimum(capped * a, bounded * a)
        if o.dual_clip is not None:
            loss = loss.where((a >= 0) | (r <= o.dual_clip), -o.dual_clip * a)
    return loss * fix


def _phi(d: Tensor, a: Tensor, fix: Tensor, o: Objective, segments: Segments | None) -> Tensor:
    """VESPO's gamma weight of the sequence's ratio, detached; its exponent is clamped too."""
    w = d + _over(fix.log().clamp(LOG_TINY, CLAMP), segments)
    w = w.detach().clamp(LOG_TINY, CLAMP)
    k, by = (
        torch.where(a >= 0, up, down).to(a.dtype)
        for up, down in (
            (o.vespo_k_pos, o.vespo_k_neg),
            (o.vespo_lambda_pos, o.vespo_lambda_neg),
        )
    )
    return (by + k * w - by * w.exp()).clamp(max=CLAMP).exp()


def _correction(gap: Tensor, o: Objective, segments: Segments | None) -> Tensor:
    """Weight exp(old - sampler) against sampler/trainer mismatch, truncated or masked; detached."""
    if o.sampler_correction.startswith("sequence"):
        gap = _over(gap.clamp(-CLAMP, CLAMP), segments)
    w = gap.detach().clamp(-CLAMP, CLAMP).exp()
    if o.sampler_correction.endswith("truncate"):
        return w.clamp(o.sampler_min, o.sampler_max)
    return w.masked_fill((w < o.sampler_min) | (w > o.sampler_max), 0)  # NaN stays visible


def _kl(e: Tensor, o: Objective) -> Tensor:
    """Estimator of KL(policy || ref) from e = ref - logp."""
    c, k2 = e.clamp(-CLAMP, CLAMP), e**2 / 2
    k3 = torch.expm1(c) - c
    value = {"k1": -e, "k2": k2, "k3": k3, "k3_clamped": k3.clamp(max=K3_MAX), "abs": e.abs()}[o.kl]
    return value.detach() + (k2 - k2.detach()) if o.kl_straight_through else value


def _count(
    m: Tensor, a: Tensor, own: Tensor, d: Tensor, r: Tensor, kl: Tensor, ent: Tensor, gap: Tensor,
    o: Objective,
) -> Tensor:  # fmt: skip
    """`COUNTS`, detached. Rows with an exactly zero coefficient are not active: the fused op never
    looks at their logits."""
    live = m if o.beta or o.entropy_coef else m & (a != 0)
    own, d, r, kl, ent, gap = (t.detach() for t in (own, d, r, kl, ent, gap))
    up, down, lo, hi = a > 0, a < 0, 1 - o.clip_low, 1 + o.clip_high
    low, high, dual = (torch.zeros_like(m) for _ in range(3))
    if o.surrogate == "clip":
        low, high = down & (r < lo), up & (r > hi)
        if o.dual_clip is not None:
            dual = down & (r > o.dual_clip)
        if o.delta is not None:
            dual = dual | (r > o.delta) & (down & (o.delta >= hi) | up & (r <= hi))
    elif o.surrogate == "cispo":
        low, high = (a != 0) & (r < lo), (a != 0) & (r > hi)
    elif o.ratio == "geometric":
        low, high = down & (own < -o.clip_low), up & (own > o.clip_high)
    n = live.sum()
    none = (n == 0).to(r.dtype)
    found = torch.stack([
        m.sum(), n, (live & low).sum(), (live & high).sum(), (live & dual).sum(),
        kl.where(live, 0).sum(), ent.where(live, 0).sum(), r.where(live, 0).sum(),
        r.where(live, torch.inf).amin() if r.numel() else none,
        r.where(live, -torch.inf).amax() if r.numel() else none,
        (live & (d.abs() > CLAMP)).sum(), gap.where(live, 0).abs().amax() if gap.numel() else none,
    ]).float()  # fmt: skip
    means = slice(COUNTS.index("clip_low"), COUNTS.index("ratio_min"))
    extremes = slice(means.stop, means.stop + 2)
    found[means] /= found[1].clamp(min=1)
    found[extremes] = found[extremes].where(found[1] > 0, 1.0)
    found[-1] = found[-1].where(~(found[-1] > -LOW / 2), torch.inf)  # one of the two is -inf
    return found


class PolicyLossFunction(torch.autograd.Function):
    """`vgkern::policy_loss_fwd` makes the gradients with the loss; backward scales them."""

    @staticmethod
    def forward(
        backend: str,
        logp: Tensor,  # [B, T]
        entropy: Tensor | None,  # [B, T]
        advantages: Tensor,  # [B, T]
        weight: Tensor,  # [B, T]
        logs: tuple[Tensor | None, Tensor | None, Tensor | None],  # old, ref, sampler
        o: Objective,
        ends: Tensor | None,  # [S + 1] int64: the sequences of [N, 1] rows
    ) -> tuple:
        return operators(backend).policy_loss_fwd(
            logp, advantages, weight, *logs, entropy, o.pack(), ends
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, dlogp, dentropy, counts = output
        ctx.save_for_backward(dlogp, dentropy, *inputs[1:3])  # these two for `once` to see
        ctx.mark_non_differentiable(dlogp, dentropy, counts)
        ctx.set_materialize_grads(False)  # else autograd fills zeros [B, T] for the gradients here

    @staticmethod
    @once
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor) -> tuple:
        dlogp, dentropy, *_ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if dloss is None:
            return (None,) * 8
        return (
            None,
            dlogp * dloss if needs[1] else None,
            dentropy * dloss if needs[2] else None,
            *[None] * 5,
        )


def policy_loss(
    logp: Tensor,  # [B, T], or packed [N] or [1, N]; fp32 or fp64, nats
    advantages: Tensor,  # [B], [B, 1] or [B, T]; packed: [S], or like logp
    *,
    objective: str | Objective = "grpo",
    old_logp: Tensor | None = None,  # like logp; None: on-policy, ratio 1 with a gradient
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,  # like logp, bool or 0/1; None: every token counts
    token_weight: Tensor | None = None,  # like logp, >= 0: factors of the tokens' terms
    segments: Tensor | None = None,  # int32|int64 [S + 1]: the sequences of packed rows
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """Loss of an objective over per-token log-probs, differentiable in logp and entropy.

    segments: cumulative lengths, as flash attention takes them. The rows are then [N] or [1, N],
    and the result is that of the padded form: sequence s is rows segments[s] up to
    segments[s + 1], an empty one counts among the sequences, and advantages may be one for each,
    [S].

    token_weight: multiplies a token's term. What the reduction divides by, and the metrics, count
    the token as one; a weight of 0 leaves it out as the mask does.

    Raises ValueError / TypeError naming the argument: wrong shapes or dtypes, an unknown objective,
    beta > 0 without ref_logp, an entropy term without entropy, a correction without sampler_logp,
    packed rows without segments where the objective looks at sequences; on CPU also a mask that is
    not 0/1 and segments that are no cumulative lengths (on a GPU the loss is then NaN). Nothing
    active: a zero that is connected to logp. A NaN in what a token's term is made of makes the loss
    and that token's gradient NaN.
    """
    logp = _check.floating("logp", logp)
    logp = logp if logp.dtype == torch.float64 else logp.float()
    o, rows, packed = prepare(
        logp.shape, logp.device, objective, advantages, old_logp, ref_logp, sampler_logp, mask,
        normalizer, logp.dtype, token_weight=token_weight, segments=segments
    )  # fmt: skip
    if o.entropy_coef and entropy is None:
        raise ValueError("entropy: got None; allowed: a tensor like logp when entropy_coef > 0")
    if entropy is not None:
        _check.rows_like("entropy", _check.floating("entropy", entropy), logp.shape)
        _check.same_device(logp=logp, entropy=entropy)
    _check.live_rows(rows.weight.view(logp.shape), logp=logp, entropy=entropy)
    return computed(choose(backend, logp.device, logp.dtype), logp, entropy, o, rows, packed)


def computed(
    backend: str,
    logp: Tensor,  # checked, as is all that follows
    entropy: Tensor | None,
    o: Objective,
    rows: Rows,
    packed: Segments | None,
) -> PolicyLoss:
    if packed is not None:
        logp = logp.reshape(-1)
        entropy = None if entropy is None else entropy.reshape(-1)
    if backend == "torch":
        o = traceable(o)
        a, w, old, ref, sampler = rows
        loss, counts = policy_loss_ref(logp, a, w, o, old, ref, sampler, entropy, packed)
    else:
        two = [None if t is None else _pair(t) for t in rows]
        loss, _, _, counts = PolicyLossFunction.apply(
            backend,
            _pair(logp),
            None if entropy is None else _pair(entropy.float()),
            *two[:2],
            tuple(two[2:]),
            o,
            None if packed is None or o.row_local else packed.ends,
        )
    return PolicyLoss(loss, metrics_dict(counts))


# Knobs that the reference hands to what a compiler cannot make of a changing number: bounds.
_BOUNDS = ("clip_low", "clip_high", "dual_clip", "delta", "sampler_min", "sampler_max",
           "tau_pos", "tau_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
           "vespo_lambda_neg")  # fmt: skip


class _Knobs:
    """Those of an Objective, by name: a record that a graph can make."""

    def __init__(self, knobs: dict[str, Any]) -> None:
        for name, x in knobs.items():
            setattr(self, name, x)


def traceable(o: Objective) -> Objective:
    """In a graph whose knobs change those bounds are 0-d tensors; else the objective as it is."""
    if not torch.compiler.is_compiling():
        return o
    knobs = {name: getattr(o, name) for name in _BOUNDS}
    if all(x is None or has_static_value(x) for x in knobs.values()):
        return o
    made = {k: x if x is None else torch.zeros(()) + x for k, x in knobs.items()}
    rest = {f.name: getattr(o, f.name) for f in fields(o) if f.name not in _BOUNDS}
    return _Knobs({**rest, **made, "row_local": o.row_local})  # type: ignore[return-value]


def _pair(t: Tensor) -> Tensor:
    """[B, T] contiguous; packed rows become one-token sequences."""
    return (t if t.ndim == 2 else t.reshape(-1, 1)).contiguous()


def metrics_dict(counts: Tensor) -> dict[str, Tensor]:
    """Detached 0-d metrics, without a host sync.

    tokens: unmasked; active: those with a possible gradient; clip_low, clip_high, dual_clip:
    shares of active tokens whose gradient the clip removed (cispo: whose weight it bounded;
    geometric: tokens left out of the mean's gradient; dual_clip: by either cap); kl, entropy,
    ratio_mean: means over active tokens (nats); ratio_min, ratio_max: 1 where none is active;
    clamped: count of |log-ratio| > 20; sampler_gap: max |logp - sampler_logp|.
    """
    return dict(zip(COUNTS, counts.detach().unbind(), strict=True))


define(
    "policy_loss_fwd(Tensor logp, Tensor advantages, Tensor row_weight, Tensor? old_logp, "
    "Tensor? ref_logp, Tensor? sampler_logp, Tensor? entropy, float[] objective, "
    "Tensor? segments=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda logp, *rest: (
        logp.new_empty(()),
        torch.empty_like(logp),
        torch.empty_like(logp),
        logp.new_empty(len(COUNTS)),
    ),
    kernels="policy_loss",
)
