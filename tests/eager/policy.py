"""Plain PyTorch for advantages and policy losses, as users write it; in fp64 the truth."""

import itertools

import torch
from eager.embedding import carried
from eager.logprobs import eager_linear_token_logprobs
from mutation import reference, scaled_gradient

from vgkern import objectives


def eager_group_advantages(rewards, groups, estimator):
    def whitened(x):
        return (x - x.mean()) / (x.var() + 1e-8).sqrt()

    out = rewards.clone()
    if estimator == "reinforce_pp":
        return {"advantages": whitened(rewards)}
    for g in groups.unique():
        r = rewards[groups == g]
        if estimator == "none" or (estimator == "grpo_verl" and len(r) == 1):
            continue
        if (r == r[0]).all():
            out[groups == g] = 0
        elif estimator in ("grpo", "grpo_verl"):
            out[groups == g] = (r - r.mean()) / (r.std() + (1e-4 if estimator == "grpo" else 1e-6))
        elif estimator in ("dr_grpo", "reinforce_pp_baseline"):
            out[groups == g] = r - r.mean()
        elif estimator == "rloo":
            out[groups == g] = r - (r.sum() - r) / (len(r) - 1)
    return {"advantages": whitened(out) if estimator == "reinforce_pp_baseline" else out}


def ratio_of(own, A, f, o):
    """exp of what the ratio is formed of: [B, T], or [B, 1] for a sequence."""
    n = f.sum(-1, keepdim=True).clamp(min=1)
    if o.ratio in ("none", "token"):
        return torch.exp(own)
    if o.ratio == "sequence_sum":
        return torch.exp((own * f).sum(-1, keepdim=True))
    if o.ratio == "geometric":
        bounded = own.clamp(-o.clip_low, o.clip_high)
        own = torch.where(A > 0, torch.min(own, bounded), torch.max(own, bounded))
    mean = (own * f).sum(-1, keepdim=True) / n
    if o.ratio == "sequence_token":
        return torch.exp(own - own.detach() + mean.detach())
    return torch.exp(mean)


def surrogate_of(lp, own, r, w, A, f, o):
    """What is maximised, before the correction w of the sampler (which VESPO takes itself)."""
    clipped = r.clamp(1 - o.clip_low, 1 + o.clip_high)
    if o.surrogate == "linear":
        return A * (lp if o.ratio == "none" else r)
    if o.surrogate == "cispo":
        return clipped.detach() * A * lp
    if o.surrogate == "sapo":
        t = torch.where(A > 0, o.tau_pos, o.tau_neg).to(A.dtype)
        return torch.sigmoid(t * (r - 1)) * 4 / t * A
    if o.surrogate == "vespo":
        tiny = torch.log(torch.tensor(1e-8, dtype=torch.float64)).item()
        log_w = (own.detach().clamp(-20, 20) * f).sum(-1, keepdim=True)
        log_w = log_w + (torch.log(w).clamp(tiny, 20) * f).sum(-1, keepdim=True)
        log_w = log_w.clamp(tiny, 20)
        k = torch.where(A >= 0, o.vespo_k_pos, o.vespo_k_neg)
        by = torch.where(A >= 0, o.vespo_lambda_pos, o.vespo_lambda_neg)
        return torch.exp(by + k * log_w - by * torch.exp(log_w)).to(A.dtype) * A * lp
    first = r if o.delta is None else r.clamp(max=o.delta)
    s = torch.min(first * A, clipped * A)
    return s if o.dual_clip is None else torch.where(A < 0, torch.max(s, o.dual_clip * A), s)


def kl_of(e, o):
    k2, k3 = 0.5 * e * e, e.exp() - e - 1
    kl = {"k1": -e, "k2": k2, "k3": k3, "k3_clamped": k3.clamp(-10, 10), "abs": e.abs()}[o.kl]
    return k2 + (kl - k2).detach() if o.kl_straight_through else kl


def padded(x, segments):
    """[S, T] of packed rows [N] or [1, N]; 0 past a sequence's end."""
    if x is None:
        return None
    x, ends = x.reshape(-1), segments.tolist()
    rows = [x[a:b] for a, b in itertools.pairwise(ends)]
    width = max((len(r) for r in rows), default=0)
    return torch.stack([torch.nn.functional.pad(r, (0, width - len(r))) for r in rows])


def eager_policy_loss(
    logp, advantages, objective, old_logp=None, ref_logp=None, sampler_logp=None, entropy=None,
    mask=None, segments=None
):  # fmt: skip
    o = objectives.resolve(objective)
    if segments is not None:  # the padded form
        cut = [padded(x, segments) for x in (logp, old_logp, ref_logp, sampler_logp, entropy)]
        here = padded(torch.ones_like(logp) if mask is None else mask.to(logp.dtype), segments)
        a = advantages if advantages.numel() != logp.numel() else padded(advantages, segments)
        return eager_policy_loss(cut[0], a, o, *cut[1:], mask=here != 0)
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    f = mask.to(logp.dtype)
    A = advantages if advantages.ndim == logp.ndim else advantages[:, None]
    lp = logp.where(mask, 0)
    old = lp.detach() if old_logp is None else old_logp.where(mask, 0)
    own = lp - old
    r = ratio_of(own, A, f, o)
    w = torch.ones_like(lp)
    if o.sampler_correction != "none":
        gap = (old - sampler_logp).where(mask, 0)
        gap = gap.sum(-1, keepdim=True) if o.sampler_correction.startswith("sequence") else gap
        w = torch.exp(gap)
        truncate = o.sampler_correction.endswith("truncate")
        outside = (w < o.sampler_min) | (w > o.sampler_max)
        w = w.clamp(o.sampler_min, o.sampler_max) if truncate else w.masked_fill(outside, 0)
    s = surrogate_of(lp, own, r, w, A, f, o)
    loss = -s if o.surrogate == "vespo" else -s * w
    if o.beta:
        kl = kl_of((ref_logp - lp).where(mask, 0), o)
        by = own.exp() if o.ratio in ("sequence_sum", "geometric") else r
        loss = loss + o.beta * (kl * by if o.kl_ratio_corrected else kl)
    if o.entropy_coef:
        loss = loss - o.entropy_coef * entropy.where(mask, 0)
    loss = loss * f
    n, (b, t) = f.sum(), (logp.shape if logp.ndim == 2 else (len(logp), 1))
    total = {
        "token": lambda x: x.sum() / n.clamp(min=1),
        "seq": lambda x: (x.sum(-1) / f.sum(-1).clamp(min=1)).sum() / max(b, 1),
        "seq_sum": lambda x: x.sum() / max(b, 1),
        "fixed": lambda x: x.sum() / max(b * (o.max_length or t), 1),
        "sum": lambda x: x.sum(),
    }[o.reduction]
    return {"loss": total(loss), "scale": total(loss.detach().abs())}


def eager_linear_policy_loss(
    hidden, weight, targets, bias=None, temperature=1.0, softcap=None, costate=None, **k
):
    mask = k.get("mask")
    if costate is not None:
        options = {"bias": bias, "temperature": temperature, "softcap": softcap}
        out = eager_linear_policy_loss(hidden, weight, targets, **options, **k)
        keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
        term = carried(costate, keep, hidden, weight, **options)
        return {**out, "loss": out["loss"] + (term - term.detach())}
    y = targets if mask is None else targets.where(mask, 0)
    lp = eager_linear_token_logprobs(
        hidden, weight, y, bias, temperature=temperature, softcap=softcap
    )
    return eager_policy_loss(lp["logp"], **k, entropy=lp["entropy"])


# What the oracle must see: (case, how the reference is broken)
MUTATIONS = {
    "linear_policy_loss: costate 1% too large": (
        "linear_policy_loss-costate-expected", reference(
            lambda ref, *a: ref(*a[:-1], a[-1]._replace(scale=1.01 * a[-1].scale)))),
    "linear_policy_loss: costate by the noise of another seed": (
        "linear_policy_loss-costate-full", reference(
            lambda ref, *a: ref(*a[:-1], a[-1]._replace(seed=a[-1].seed + 1)))),
    "linear_policy_loss: tau of the costate not in its gradient": (
        "linear_policy_loss-costate-full", reference(
            lambda ref, *a: ref(*a[:-1], a[-1]._replace(tau=1.0)))),
    "linear_policy_loss: a costate of a masked row": (
        "linear_policy_loss-costate-expected", reference(
            lambda ref, *a: ref(*a[:-1], a[-1]._replace(
                value=a[-1].value + (a[4][1].reshape(-1, 1) == 0))))),
    "group_advantages: biased deviation": (
        "group_advantages-grpo", reference(
            lambda ref, r, *a: ref(r, *a) * 1.01)),
    "policy_loss: entropy term dropped": (
        "policy_loss-full", reference(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(entropy_coef=0.0), *r))),
    "policy_loss: clip bounds swapped": (
        "policy_loss-dapo", reference(
            lambda ref, lp, a, w, o, *r: ref(
                lp, a, w, o.replace(clip_low=0.28, clip_high=0.2), *r))),
    "policy_loss: sequence ratio without gradient of the others": (
        "policy_loss-gspo", reference(
            lambda ref, lp, a, w, o, *r: ref(scaled_gradient(lp, 0.98), a, w, o, *r))),
    "policy_loss: gradient of the token ratio for the sequence's": (
        "policy_loss-gspo-token-advantages", reference(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(ratio="sequence_token"), *r))),
    "policy_loss: gradient of the sequence ratio for the token's": (
        "policy_loss-gspo_token-token-advantages", reference(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(ratio="sequence"), *r))),
    "policy_loss: mean for sum of the log-ratios": (
        "policy_loss-rloo_clip", reference(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(ratio="sequence"), *r))),
    "policy_loss: geometric mean without its clip": (
        "policy_loss-gmpo", reference(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(ratio="sequence"), *r))),
    "policy_loss: cispo of one reading for the other": (
        "policy_loss-cispo_relative", reference(
            lambda ref, lp, a, w, o, *r: ref(
                lp, a, w, o.replace(clip_low=1.0, clip_high=4.0), *r))),
    "policy_loss: one temperature for both signs": (
        "policy_loss-sapo", reference(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(tau_neg=1.0), *r))),
    "policy_loss: vespo without the sampler": (
        "policy_loss-vespo-sampler", reference(
            lambda ref, lp, a, w, o, *r: ref(
                lp, a, w, o.replace(sampler_correction="none"), *r))),
    "policy_loss: delta ignored": (
        "policy_loss-delta-low", reference(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(delta=None), *r))),
    "policy_loss: k3 not clamped": (
        "policy_loss-kl-k3_clamped", reference(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(kl="k3"), *r))),
    "policy_loss: lower bound of the sampler ignored": (
        "policy_loss-icepop", reference(
            lambda ref, lp, a, w, o, *r: ref(lp, a, w, o.replace(sampler_min=0.0), *r))),
    "group_advantages: whitened per group": (
        "group_advantages-reinforce_pp_baseline", reference(
            lambda ref, r, g, e: ref(r, g, "grpo"))),
    "linear_policy_loss: mask ignored": (
        "linear_policy_loss-grpo-h7-v31", reference(
            lambda ref, h, w, b, y, rows, *a: ref(
                h, w, b, y.clamp(max=0), rows._replace(weight=rows.weight + 1e-3), *a))),
    "linear_policy_loss: dW in bfloat16": (
        "linear_policy_loss-dapo-temperature", reference(
            lambda ref, h, w, *a: ref(h, w.detach() + (w - w.detach()) * (1 + 2.0**-8), *a))),
}  # fmt: skip
