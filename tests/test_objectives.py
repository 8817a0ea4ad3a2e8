"""Every objective against a formula written token by token in Python floats, value and gradient."""

import math

import pytest
import torch

import vgkern
from vgkern import Objective, case_inputs, objectives

B, T = 6, 5


def batch(o, seed=0, side="right"):
    """logp and what a policy loss takes: padded, off-policy, some ratios beyond the clip."""
    g = torch.Generator().manual_seed(seed)
    logp = (-2 * torch.rand(B, T, generator=g) - 0.1).double()
    x = case_inputs.policy_rows(logp, o, seed, mask=case_inputs.padding(B, T, seed, side))
    x["advantages"] = torch.tensor([1.0, -1.0, 0.7, -0.6, 0.0, 1.3])
    if o.entropy_coef:
        x["entropy"] = 3 * torch.rand(B, T, generator=g)
    return logp, x


SHARED = ("sequence", "sequence_sum", "geometric")  # ratios with a gradient in every token


def ratio_by_hand(own, A, o):
    """Log-ratio that r is formed of, and its slope in each token's log-ratio (shared ratios)."""
    n = max(len(own), 1)
    if o.ratio == "sequence_sum":
        return sum(own.values()), dict.fromkeys(own, 1.0)
    if o.ratio != "geometric":
        return sum(own.values()) / n, dict.fromkeys(own, 1 / n)
    bound, share = 0.0, {}
    for t, x in own.items():
        cut = x > o.clip_high if A > 0 else x < -o.clip_low
        bound += (o.clip_high if A > 0 else -o.clip_low) if cut else x
        share[t] = 0.0 if cut else 1 / n
    return bound / n, share


def surrogate_by_hand(lp, r, A, log_fix, d, o):
    """Value, slope in the log-ratio, slope in logp itself."""
    low, high = 1 - o.clip_low, 1 + o.clip_high
    if o.surrogate == "linear":
        return (-A * lp, 0.0, -A) if o.ratio == "none" else (-A * r, -A * r, 0.0)
    if o.surrogate == "cispo":
        c = min(max(r, low), high)
        return -c * A * lp, 0.0, -c * A
    if o.surrogate == "sapo":
        tau = o.tau_pos if A > 0 else o.tau_neg
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        return -A * 4 / tau * gate, -A * 4 * gate * (1 - gate) * r, 0.0
    if o.surrogate == "vespo":
        w = min(max(d + log_fix, math.log(1e-8)), 20)
        k, by = (
            (o.vespo_k_pos, o.vespo_lambda_pos) if A >= 0 else (o.vespo_k_neg, o.vespo_lambda_neg)
        )
        phi = math.exp(by) * math.exp(w) ** k * math.exp(-by * math.exp(w))
        return -phi * A * lp, 0.0, -phi * A
    u = r if o.delta is None else min(r, o.delta)
    c = min(max(r, low), high)
    first = u * A <= c * A
    moves = r <= (o.delta or math.inf) if first else low <= r <= high
    v = -min(u * A, c * A)
    if A < 0 and o.dual_clip and r > o.dual_clip:
        v, moves = -A * o.dual_clip, False
    return v, -A * r * moves, 0.0


def sampler_by_hand(gap, o):
    if o.sampler_correction == "none":
        return 1.0
    w = math.exp(gap)
    if "truncate" in o.sampler_correction:
        return min(max(w, o.sampler_min), o.sampler_max)
    return w if o.sampler_min <= w <= o.sampler_max else 0.0


def by_hand(logp, x, o):
    """Loss, dL/dlogp and dL/dentropy from token loops: nothing of torch but indexing."""
    mask = x["mask"].tolist()
    value = [[0.0] * T for _ in range(B)]
    slope = [[0.0] * T for _ in range(B)]  # of the token's own loss
    along = [[0.0] * T for _ in range(B)]  # d(loss of token) / d(log-ratio of its sequence)
    shares = [{} for _ in range(B)]  # d(that log-ratio) / dlogp
    lengths = [sum(m) for m in mask]

    def at(k, b, t, default):
        return float(x[k][b, t]) if k in x else default

    for b in range(B):
        live = [t for t in range(T) if mask[b][t]]
        A = float(x["advantages"][b])
        own = {t: float(logp[b, t]) - at("old_logp", b, t, float(logp[b, t])) for t in live}
        over, shares[b] = ratio_by_hand(own, A, o)
        gap = {t: at("old_logp", b, t, 0) - at("sampler_logp", b, t, 0) for t in live}
        fixes = {t: sampler_by_hand(gap[t], o) for t in live}
        log_fix = sum(math.log(max(w, 1e-8)) for w in fixes.values())
        for t in live:
            lp = float(logp[b, t])
            d = own[t] if o.ratio in ("none", "token") else over
            r = math.exp(d)
            v, s, score = surrogate_by_hand(lp, r, A, log_fix, d, o)
            if o.surrogate != "vespo":
                whole = o.sampler_correction.startswith("sequence")
                w = sampler_by_hand(sum(gap.values()), o) if whole else fixes[t]
                v, s, score = v * w, s * w, score * w
            slope[b][t] += score
            if o.beta:
                e = at("ref_logp", b, t, 0) - lp
                k3, dk3 = math.exp(e) - e - 1, 1 - math.exp(e)
                kl, dkl = {
                    "k1": (-e, 1.0),
                    "k2": (e * e / 2, -e),
                    "k3": (k3, dk3),
                    "k3_clamped": (min(k3, 10.0), dk3 if k3 <= 10 else 0.0),
                    "abs": (abs(e), -math.copysign(1.0, e)),
                }[o.kl]
                dkl = -e if o.kl_straight_through else dkl
                if o.kl_ratio_corrected:
                    token = o.ratio in ("sequence_sum", "geometric")
                    by = math.exp(own[t]) if token else r
                    kl, dkl = kl * by, dkl * by
                    if token:
                        slope[b][t] += o.beta * kl
                    else:
                        s += o.beta * kl
                v += o.beta * kl
                slope[b][t] += o.beta * dkl
            if o.entropy_coef:
                v -= o.entropy_coef * float(x["entropy"][b, t])
            value[b][t] = v
            (along if o.ratio in SHARED else slope)[b][t] += s
    n = sum(lengths)
    by = {
        "token": lambda b: 1 / max(n, 1),
        "seq": lambda b: 1 / (B * max(lengths[b], 1)),
        "seq_sum": lambda b: 1 / B,
        "fixed": lambda b: 1 / (B * (o.max_length or T)),
        "sum": lambda b: 1.0,
    }[o.reduction]
    loss = sum(by(b) * value[b][t] for b in range(B) for t in range(T) if mask[b][t])
    d, dent = torch.zeros(B, T).double(), torch.zeros(B, T).double()
    for b in range(B):
        through = sum(by(b) * s for s in along[b])
        for t in range(T):
            if mask[b][t]:
                d[b, t] = by(b) * slope[b][t] + through * shares[b][t]
                dent[b, t] = -by(b) * o.entropy_coef
    return loss, d, dent


O = Objective
VARIANTS = {
    **objectives.PRESETS,
    **{f"kl-{k}": O(kl=k, beta=0.3) for k in objectives.KLS},
    **{f"kl-{k}-straight": O(kl=k, beta=0.3, kl_straight_through=True) for k in objectives.KLS},
    **{f"kl-{k}-corrected": O(kl=k, beta=0.3, kl_ratio_corrected=True) for k in ("k1", "k3")},
    **{c: O(sampler_correction=c, beta=0.1) for c in objectives.CORRECTIONS[1:]},
    **{r: O(reduction=r, clip_high=0.28) for r in objectives.REDUCTIONS},
    "dual": O(dual_clip=1.5),
    "cispo-cap-below-1": O(surrogate="cispo", clip_low=1.0, clip_high=-0.8),
    "cispo-between": O(surrogate="cispo", clip_low=0.5, clip_high=-0.1),
    "dual-wide": O(dual_clip=3.0, clip_high=0.28),
    "fixed-wider": O(reduction="fixed", max_length=17),
    **{f"linear-{r}": O(surrogate="linear", ratio=r) for r in objectives.RATIOS},
    **{f"{s}-{r}": O(surrogate=s, ratio=r, tau_neg=2.0)
       for s in ("clip", "cispo", "sapo") for r in objectives.RATIOS[2:5]},
    "delta": O(delta=1.5, clip_high=0.28),
    "delta-low": O(delta=1.15, clip_high=0.5),
    "delta-dual": O(delta=1.6, dual_clip=1.4),
    "icepop": O(sampler_correction="token_mask", sampler_min=0.5, sampler_max=5.0),
    "icepop-sequence": O(sampler_correction="sequence_mask", sampler_min=0.9),
    "sampler-floor": O(sampler_correction="token_truncate", sampler_min=0.8),
    "vespo-knobs": objectives.VESPO.replace(vespo_k_pos=1.0, vespo_lambda_neg=0.7),
    "vespo-sampler": objectives.VESPO.replace(sampler_correction="token_truncate",
                                              sampler_min=0.8),
    "gmpo-kl": objectives.GMPO.replace(beta=0.2, kl_ratio_corrected=True),
    "rloo_clip-kl": objectives.RLOO_CLIP.replace(beta=0.2, kl_ratio_corrected=True),
    "gspo_token-kl": objectives.GSPO_TOKEN.replace(beta=0.2, kl_ratio_corrected=True),
    "entropy": O(entropy_coef=0.05),
    "gspo-kl-corrected": objectives.GSPO.replace(beta=0.2, kl_ratio_corrected=True),
    "gspo-token-mean": objectives.GSPO.replace(reduction="token", entropy_coef=0.01),
    "everything": O(beta=0.1, entropy_coef=0.01, dual_clip=1.5, clip_high=0.28,
                    sampler_correction="token_truncate", reduction="token"),
}  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", VARIANTS)
def test_against_token_loops(name, side, backend):
    o = VARIANTS[name]
    logp, x = batch(o, side=side)
    loss, d, dent = by_hand(logp.float().double(), x, o)
    leaf = logp.float().requires_grad_()
    leaves = [leaf]
    if o.entropy_coef:
        x["entropy"] = x["entropy"].requires_grad_()
        leaves.append(x["entropy"])
    out = vgkern.policy_loss(leaf, **x, backend=backend)
    got = torch.autograd.grad(out.loss, leaves)
    assert float(out.loss.detach()) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got[0].double(), d, rtol=2e-5, atol=1e-7)
    assert (got[0][~x["mask"]] == 0).all()
    if o.entropy_coef:
        torch.testing.assert_close(got[1].double(), dent, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_is_the_composition(name, backend):
    """linear_policy_loss = policy_loss(linear_token_logprobs), value, gradients and metrics."""
    o = VARIANTS[name]
    head, logp, _ = case_inputs.head((B, T), 16, 200, torch.float32, 1)
    x = case_inputs.policy_rows(logp, o, 1, mask=case_inputs.padding(B, T, 1))
    x["advantages"] = torch.tensor([1.0, -1.0, 0.7, -0.6, 0.0, 1.3])
    h, w, y = (head[k] for k in ("hidden", "weight", "targets"))

    def run(fused):
        a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
        if fused:
            out = vgkern.linear_policy_loss(a, b, y, **x, backend=backend)
        else:
            lp = vgkern.linear_token_logprobs(a, b, y, backend="torch")
            out = vgkern.policy_loss(lp.logp, entropy=lp.entropy, **x, backend="torch")
        return out, *torch.autograd.grad(out.loss, (a, b))

    (one, *g1), (two, *g2) = run(True), run(False)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(g1, g2, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for k in two.metrics:
        torch.testing.assert_close(one.metrics[k], two.metrics[k], rtol=1e-4, atol=1e-4, msg=k)


@pytest.mark.parametrize("name", [n for n, o in VARIANTS.items() if o.reduction != "sum"])
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_micro_batches_with_a_normalizer(name, parts, backend):
    o = (
        VARIANTS[name].replace(max_length=T)
        if VARIANTS[name].max_length is None
        else VARIANTS[name]
    )
    logp, x = batch(o)
    leaf = logp.float().requires_grad_()
    whole = vgkern.policy_loss(leaf, **x, backend=backend).loss
    (want,) = torch.autograd.grad(whole, leaf)
    n = {"token": int(x["mask"].sum()), "fixed": B * o.max_length}.get(o.reduction, B)
    total, got = 0, torch.zeros(B, T)
    for rows in torch.arange(B).chunk(parts):
        part = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in x.items()}
        for normalizer in (n, torch.tensor(float(n))):
            loss = vgkern.policy_loss(
                leaf[rows], **part, normalizer=normalizer, backend=backend
            ).loss
        total = total + loss.detach()
        got += torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(total, whole.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("explicit", [True, False])
def test_ratio_one_is_reinforce(explicit, backend):
    """On policy, the clipped surrogate has REINFORCE's gradient, whatever the clip."""
    h, w, y = (case_inputs.head((B, T), 8, 64, torch.float32, 0)[0][k]
               for k in ("hidden", "weight", "targets"))  # fmt: skip
    a = torch.tensor([1.0, -1.0, 0.7, -0.6, 0.0, 1.3])
    logp = vgkern.linear_token_logprobs(h, w, y, backend=backend).logp
    grads = []
    for o in (
        objectives.REINFORCE,
        objectives.BNPO,
        objectives.BNPO.replace(clip_low=0, clip_high=0),
    ):
        m = w.clone().requires_grad_()
        out = vgkern.linear_policy_loss(
            h, m, y, a, objective=o, old_logp=logp if explicit else None, backend=backend
        )
        grads.append(torch.autograd.grad(out.loss, m)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-7)
    if not explicit:  # exactly 1: even a clip of width 0 lets it pass
        torch.testing.assert_close(grads[2], grads[0], rtol=1e-4, atol=1e-7)


def test_clip_has_zero_gradient_outside_and_counts(backend):
    d = torch.tensor([[0.5, 0.1, -0.5, -0.1]])
    for a, dead in ((1.0, 0), (-1.0, 2)):
        logp = (-1 + d).requires_grad_()
        out = vgkern.policy_loss(
            logp, torch.tensor([a]), old_logp=torch.full((1, 4), -1.0), backend=backend
        )
        (g,) = torch.autograd.grad(out.loss, logp)
        assert [i for i in range(4) if g[0, i] == 0] == [dead]
        assert float(out.metrics["clip_high"]) == (0.25 if a > 0 else 0)
        assert float(out.metrics["clip_low"]) == (0.25 if a < 0 else 0)
        assert float(out.metrics["ratio_max"]) == pytest.approx(math.exp(0.5), rel=1e-5)
        assert float(out.metrics["ratio_min"]) == pytest.approx(math.exp(-0.5), rel=1e-5)


def test_dual_clip_caps_only_negative_advantages(backend):
    o = Objective(dual_clip=2.0, reduction="sum")
    for a in (1.0, -1.0):
        logp = torch.tensor([[0.0, 0.0]]).sub(0.5).requires_grad_()
        old = torch.tensor([[-1.0, -2.5]])  # ratios 1.65 and 7.4
        out = vgkern.policy_loss(
            logp, torch.tensor([a]), objective=o, old_logp=old, backend=backend
        )
        (g,) = torch.autograd.grad(out.loss, logp)
        if a < 0:
            assert float(out.loss.detach()) == pytest.approx(math.exp(0.5) + 2.0, rel=1e-6)
            assert g[0, 0] != 0 and g[0, 1] == 0 and float(out.metrics["dual_clip"]) == 0.5
        else:
            assert float(out.loss.detach()) == pytest.approx(-2.4, rel=1e-6)
            assert float(out.metrics["dual_clip"]) == 0


def test_metrics_are_what_they_say(backend):
    o = Objective(beta=0.1, clip_high=0.28)
    logp, x = batch(o)
    logp = logp.float()
    sampler = x["old_logp"] + 0.25
    m = x["mask"]
    out = vgkern.policy_loss(logp, **x, sampler_logp=sampler, backend=backend).metrics
    e = (x["ref_logp"] - logp)[m]
    r = (logp - x["old_logp"])[m].exp()
    assert int(out["tokens"]) == int(m.sum()) == int(out["active"])
    torch.testing.assert_close(out["kl"], (e.exp() - e - 1).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["ratio_mean"], r.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["sampler_gap"], (logp - sampler)[m].abs().max())
    plain = vgkern.policy_loss(logp, **{**x, "objective": "grpo"}, backend=backend).metrics
    assert int(plain["active"]) == int((m & (x["advantages"] != 0)[:, None]).sum())


def test_presets_and_replace():
    assert objectives.resolve("dapo") is objectives.DAPO
    o = objectives.GRPO.replace(clip_high=0.28)
    assert o.clip_high == 0.28 and objectives.GRPO.clip_high == 0.2
    assert not objectives.GSPO.row_local and objectives.DAPO.row_local
    assert hash(o) == hash(objectives.GRPO.replace(clip_high=0.28))
    with pytest.raises(AttributeError):
        o.beta = 1.0
