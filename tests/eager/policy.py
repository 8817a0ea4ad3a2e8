"""Plain PyTorch for advantages and policy losses, as users write it; in fp64 the truth."""

import torch
from eager.logprobs import eager_linear_token_logprobs
from mutation import reference, scaled_gradient

from vgkern import objectives


def eager_group_advantages(rewards, groups, estimator):
    out = rewards.clone()
    for g in groups.unique():
        r = rewards[groups == g]
        if (r == r[0]).all() and estimator != "none":
            out[groups == g] = 0
        elif estimator == "grpo":
            out[groups == g] = (r - r.mean()) / (r.std() + 1e-4)
        elif estimator == "dr_grpo":
            out[groups == g] = r - r.mean()
        elif estimator == "rloo":
            out[groups == g] = r - (r.sum() - r) / (len(r) - 1)
    return {"advantages": out}


def eager_policy_loss(
    logp, advantages, objective, old_logp=None, ref_logp=None, sampler_logp=None, entropy=None,
    mask=None
):  # fmt: skip
    o = objectives.resolve(objective)
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    f = mask.to(logp.dtype)
    A = advantages if advantages.ndim == logp.ndim else advantages[:, None]
    lp = logp.where(mask, 0)
    old = lp.detach() if old_logp is None else old_logp.where(mask, 0)
    d = lp - old
    if o.ratio == "sequence":
        d = (d * f).sum(-1, keepdim=True) / f.sum(-1, keepdim=True).clamp(min=1)
    r = torch.exp(d)
    if o.surrogate == "clip":
        s = torch.min(r * A, r.clamp(1 - o.clip_low, 1 + o.clip_high) * A)
        if o.dual_clip is not None:
            s = torch.where(A < 0, torch.max(s, o.dual_clip * A), s)
    else:
        s = A * (lp if o.ratio == "none" else r)
    if o.sampler_correction != "none":
        gap = (old - sampler_logp).where(mask, 0)
        gap = gap.sum(-1, keepdim=True) if o.sampler_correction.startswith("sequence") else gap
        w = torch.exp(gap)
        truncate = o.sampler_correction.endswith("truncate")
        s = s * (w.clamp(max=o.sampler_max) if truncate else w * (w <= o.sampler_max))
    loss = -s
    if o.beta:
        e = (ref_logp - lp).where(mask, 0)
        k2 = 0.5 * e * e
        kl = {"k1": -e, "k2": k2, "k3": e.exp() - e - 1, "abs": e.abs()}[o.kl]
        kl = k2 + (kl - k2).detach() if o.kl_straight_through else kl
        loss = loss + o.beta * (kl * r if o.kl_ratio_corrected else kl)
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
    hidden, weight, targets, bias=None, temperature=1.0, softcap=None, **k
):
    mask = k.get("mask")
    y = targets if mask is None else targets.where(mask, 0)
    lp = eager_linear_token_logprobs(
        hidden, weight, y, bias, temperature=temperature, softcap=softcap
    )
    return eager_policy_loss(lp["logp"], **k, entropy=lp["entropy"])


# What the oracle must see: (case, how the reference is broken)
MUTATIONS = {
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
    "linear_policy_loss: mask ignored": (
        "linear_policy_loss-grpo-h7-v31", reference(
            lambda ref, h, w, b, y, rows, *a: ref(
                h, w, b, y.clamp(max=0), (rows[0], rows[1] + 1e-3, *rows[2:]), *a))),
    "linear_policy_loss: dW in bfloat16": (
        "linear_policy_loss-dapo-temperature", reference(
            lambda ref, h, w, *a: ref(h, w.detach() + (w - w.detach()) * (1 + 2.0**-8), *a))),
}  # fmt: skip
