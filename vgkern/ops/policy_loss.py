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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgkern import objectives
from vgkern.objectives import Objective
from vgkern.ops import _check
from vgkern.ops._backend import choose
from vgkern.ops._library import define, once, operators

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
    logp: Tensor,  # [..., T]
    advantages: Tensor,  # broadcastable to logp
    weight: Tensor,  # like logp: 0 where masked
    o: Objective,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    sampler: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    m = weight != 0
    zeros = torch.zeros_like(logp)
    lp, a = logp.where(m, 0), advantages.where(m, 0)  # select before any exp: 0 * inf is NaN
    old = (logp.detach() if old is None else old).where(m, 0)
    own = _minus(lp, old)
    d = _log_ratio(own, a, m, o)
    r = d.clamp(-CLAMP, CLAMP).exp()
    fix = torch.ones_like(lp)
    if sampler is not None and o.sampler_correction != "none":
        fix = _correction(_minus(old, sampler.where(m, 0)), o)
    loss = _surrogate(lp, d, r, a, fix.where(m, 1), o)
    kl = _kl(zeros if ref is None else _minus(ref.where(m, 0), lp), o)
    if o.beta:
        by = own.clamp(-CLAMP, CLAMP).exp() if o.ratio in ("sequence_sum", "geometric") else r
        loss = loss + o.beta * (kl * by if o.kl_ratio_corrected else kl)
    ent = zeros if entropy is None else entropy.where(m, 0)
    gap = zeros if sampler is None else _minus(lp, sampler.where(m, 0))
    total = (weight * (loss - o.entropy_coef * ent)).sum()
    return total, _count(m, a, own, d, r, kl, ent, gap, o)


def _minus(x: Tensor, y: Tensor) -> Tensor:
    """x - y of log-probs; 0 where both are -inf, and no gradient through a blocked token."""
    return x.clamp(min=LOW) - y.clamp(min=LOW)


def _log_ratio(own: Tensor, a: Tensor, m: Tensor, o: Objective) -> Tensor:
    """What r is formed of, from each token's own log-ratio (0 where masked)."""
    if o.ratio in ("none", "token"):
        return own
    own, n = own.clamp(-CLAMP, CLAMP), m.sum(-1, keepdim=True).clamp(min=1)
    if o.ratio == "sequence_sum":
        return own.sum(-1, keepdim=True).expand_as(own)
    if o.ratio == "geometric":
        own = torch.where(a > 0, own.clamp(max=o.clip_high), own.clamp(min=-o.clip_low))
    mean = (own.sum(-1, keepdim=True) / n).expand_as(own)
    return mean.detach() + (own - own.detach()) if o.ratio == "sequence_token" else mean


def _surrogate(lp: Tensor, d: Tensor, r: Tensor, a: Tensor, fix: Tensor, o: Objective) -> Tensor:
    score = lp.where(lp != -torch.inf, 0)  # a blocked token has no score
    bounded = r.clamp(1 - o.clip_low, 1 + o.clip_high)
    if o.surrogate == "vespo":  # the sampler correction is part of phi
        return -_phi(d, a, fix, o) * a * score
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


def _phi(d: Tensor, a: Tensor, fix: Tensor, o: Objective) -> Tensor:
    """VESPO's gamma weight of the sequence's ratio, detached; its exponent is clamped too."""
    w = d + fix.log().clamp(LOG_TINY, CLAMP).sum(-1, keepdim=True)
    w = w.detach().clamp(LOG_TINY, CLAMP)
    k, by = (
        torch.where(a >= 0, up, down).to(a.dtype)
        for up, down in (
            (o.vespo_k_pos, o.vespo_k_neg),
            (o.vespo_lambda_pos, o.vespo_lambda_neg),
        )
    )
    return (by + k * w - by * w.exp()).clamp(max=CLAMP).exp()


def _correction(gap: Tensor, o: Objective) -> Tensor:
    """Weight exp(old - sampler) against sampler/trainer mismatch, truncated or masked; detached."""
    if o.sampler_correction.startswith("sequence"):
        gap = gap.clamp(-CLAMP, CLAMP).sum(-1, keepdim=True)
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
        dual = down & (r > (o.dual_clip or torch.inf))
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
    ) -> tuple:
        return operators(backend).policy_loss_fwd(
            logp, advantages, weight, *logs, entropy, o.pack()
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, dlogp, dentropy, counts = output
        ctx.save_for_backward(dlogp, dentropy, *inputs[1:3])  # these two for `once` to see
        ctx.mark_non_differentiable(dlogp, dentropy, counts)

    @staticmethod
    @once
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple:
        dlogp, dentropy, *_ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            None,
            dlogp * dloss if needs[1] else None,
            dentropy * dloss if needs[2] else None,
            *[None] * 4,
        )


def policy_loss(
    logp: Tensor,  # [B, T] or [N], fp32 or fp64, nats
    advantages: Tensor,  # [B], [B, 1] or [B, T]; [N] for packed logp
    *,
    objective: str | Objective = "grpo",
    old_logp: Tensor | None = None,  # like logp; None: on-policy, ratio 1 with a gradient
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,  # like logp, bool or 0/1; None: every token counts
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """Loss of an objective over per-token log-probs, differentiable in logp and entropy.

    Raises ValueError / TypeError naming the argument: wrong shapes or dtypes, an unknown objective,
    beta > 0 without ref_logp, an entropy term without entropy, a correction without sampler_logp, a
    sequence-level objective on packed [N] rows. Nothing active: a zero that is connected to logp.
    """
    logp = _check.floating("logp", logp)
    logp = logp if logp.dtype == torch.float64 else logp.float()
    o, rows = prepare(
        logp.shape, logp.device, objective, advantages, old_logp, ref_logp, sampler_logp, mask,
        normalizer, logp.dtype
    )  # fmt: skip
    if o.entropy_coef and entropy is None:
        raise ValueError("entropy: got None; allowed: a tensor like logp when entropy_coef > 0")
    if entropy is not None:
        _check.rows_like("entropy", _check.floating("entropy", entropy), logp.shape)
        _check.same_device(logp=logp, entropy=entropy)
    _check.live_rows(rows[1], logp=logp, entropy=entropy)
    chosen = choose(backend, logp.device, logp.dtype)
    if chosen == "torch":
        a, w, old, ref, sampler = rows
        loss, counts = policy_loss_ref(logp, a, w, o, old, ref, sampler, entropy)
    else:
        two = tuple(None if t is None else _pair(t) for t in rows)
        loss, _, _, counts = PolicyLossFunction.apply(
            chosen,
            _pair(logp),
            None if entropy is None else _pair(entropy.float()),
            *two[:2],
            two[2:],
            o,
        )
    return PolicyLoss(loss, metrics_dict(counts))


def _pair(t: Tensor) -> Tensor:
    """[B, T] contiguous; packed rows become one-token sequences."""
    return (t if t.ndim == 2 else t.reshape(-1, 1)).contiguous()


def prepare(
    shape: torch.Size,
    device: torch.device,
    objective: str | Objective,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    sampler: Tensor | None,
    mask: Tensor | None,
    normalizer: float | Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Objective, tuple[Any, ...]]:
    """Checks and broadcasts what every policy loss takes: (objective, (advantages, weight, old,
    ref, sampler)), each detached and of `shape` (or None)."""
    o = objectives.resolve(objective)
    if len(shape) not in (1, 2):
        raise _check.fail("logp", f"shape {list(shape)}", "[B, T] or packed [N]")
    if len(shape) == 1 and (o.reduction in ("seq", "seq_sum") or not o.row_local):
        raise _check.fail("logp", "packed [N] rows", "[B, T] for a sequence-level objective")
    _check.on_device(
        device, "logp", advantages=advantages, old_logp=old, ref_logp=ref, sampler_logp=sampler,
        mask=mask
    )  # fmt: skip
    logs: list[Tensor | None] = []
    for name, t in (("old_logp", old), ("ref_logp", ref), ("sampler_logp", sampler)):
        if t is not None:
            t = _check.rows_like(name, _check.floating(name, t), shape).detach().to(dtype)
        logs.append(t)
    if o.beta and ref is None:
        raise ValueError("ref_logp: got None; allowed: a tensor like logp when beta > 0")
    if o.sampler_correction != "none" and sampler is None:
        allowed = f"a tensor like logp for sampler_correction {o.sampler_correction!r}"
        raise ValueError(f"sampler_logp: got None; allowed: {allowed}")
    if mask is None:
        m = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        m = _check.row_mask("mask", mask, shape)
    _check.live_rows(m, **dict(zip(("old_logp", "ref_logp", "sampler_logp"), logs, strict=True)))
    a = _advantages(advantages, shape, dtype)
    if _check.can_look(device) and bool((~a.isfinite() & m).any()):
        raise _check.NonFiniteError("advantages: got NaN or inf; allowed: finite numbers")
    return o, (a, _weights(m, o, normalizer).to(dtype), *logs)


def _advantages(advantages: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    a = _check.floating("advantages", advantages).detach().to(dtype)
    if len(shape) == 2 and a.shape in ((shape[0],), (shape[0], 1)):
        return a.reshape(-1, 1).expand(shape)
    if a.shape == shape:
        return a
    allowed = f"{list(shape)}" if len(shape) == 1 else f"[{shape[0]}], [{shape[0]}, 1], {[*shape]}"
    raise _check.fail("advantages", a, allowed)


def _weights(m: Tensor, o: Objective, normalizer: float | Tensor | None) -> Tensor:
    """Row weights w_i of the reduction, fp64 until the end."""
    w = m
    sequences = m.shape[0] if m.ndim == 2 else m.numel()
    width = o.max_length or (m.shape[1] if m.ndim == 2 else 1)
    if o.reduction == "seq":
        w = m.double() / m.sum(-1, keepdim=True).clamp(min=1)
    by: Any = normalizer
    if normalizer is None and o.reduction == "token":
        by = m.sum()
    elif normalizer is None:
        by = {"fixed": sequences * width, "sum": 1}.get(o.reduction, sequences)
    if isinstance(by, Tensor):
        if by.numel() != 1:
            raise _check.fail("normalizer", by, "a number, or a tensor of one")
        by = by.detach().reshape(()).to(m.device, torch.float64)
    if _check.can_look(m.device):  # elsewhere looking would be a host sync
        by = float(by)
        if normalizer is not None and (by != 0 or bool(m.any())):  # 0: nothing anywhere counts
            _check.positive("normalizer", by)
    if isinstance(by, Tensor):
        return w / by.clamp(min=1e-12)  # fp64, as `by` is: a bool has no part in the dtype
    return w.double() / max(by, 1e-12)


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
    "Tensor? ref_logp, Tensor? sampler_logp, Tensor? entropy, float[] objective) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda logp, *rest: (
        logp.new_empty(()),
        torch.empty_like(logp),
        torch.empty_like(logp),
        logp.new_empty(len(COUNTS)),
    ),
    kernels="policy_loss",
)
