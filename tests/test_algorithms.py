"""What each name stands for elsewhere: TRL's and verl's formulas written out, and how the same word
differs. docs/objectives.md is the table of names; test_objectives.py has the knobs one by one."""

import math

import pytest
import torch

import vgkern
from vgkern import Objective, case_inputs, nn, objectives
from vgkern.objectives import PRESETS

B, T = 5, 6
MASK = case_inputs.padding(B, T, 4)
F = MASK.double()
N = F.sum(-1).clamp(min=1)
A = torch.tensor([1.0, -1.0, 0.7, -0.6, 1.3]).double()
G = torch.Generator().manual_seed(3)
LP = (-2 * torch.rand(B, T, generator=G) - 0.1).double()
OLD = case_inputs.near(LP, 5, (0, 0.1, -0.1, 0.3, -0.3, 0.6, -0.6))
REF = case_inputs.near(LP, 6, (0, 0.2, -0.2, 2.0, 3.5))
SAMPLER = case_inputs.near(OLD, 7, (0.05, -0.05, 1.5, -1.5))


def ours(o, backend, a=A, logp=LP, **logs):
    """Loss and dlogp, fp64 on torch and fp32 elsewhere."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    x = logp.to(dtype).requires_grad_()
    logs = {k: v.to(dtype) for k, v in logs.items()}
    out = vgkern.policy_loss(
        x, a.to(dtype), objective=o, **{"old_logp": OLD.to(dtype), "mask": MASK, **logs},
        backend=backend
    )  # fmt: skip
    return out.loss.detach().double(), torch.autograd.grad(out.loss, x)[0].double()


def theirs(loss, logp=LP):
    x = logp.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def same(one, two, backend):
    rtol, atol = (1e-10, 1e-12) if backend == "torch" else (3e-5, 1e-6)
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


# TRL 1.16 -----------------------------------------------------------------------------------------


def trl(kind, level="token", low=0.2, high=0.2, delta=None, beta=0.0, corrected=True, w=None,
        max_length=T):  # fmt: skip
    """TRL's GRPO loss of one `loss_type`, as a function of logp."""

    def loss(lp):
        d, adv = lp - OLD, A[:, None]
        if level == "sequence":
            d = ((d * F).sum(-1) / N)[:, None]
        c = torch.exp(d)
        if kind == "cispo":
            per = -c.clamp(max=high).detach() * adv * lp
        elif kind == "sapo":
            tau = torch.where(adv > 0, 1.0, 1.05).double()
            per = -adv * torch.sigmoid(tau * (c - 1)) * 4 / tau
        elif kind == "vespo":
            log_w = ((lp - OLD).detach().clamp(-20, 20) * F).sum(-1, keepdim=True)
            if w is not None:
                log_w = log_w + (w.log().clamp(math.log(1e-8), 20) * F).sum(-1, keepdim=True)
            log_w = log_w.clamp(math.log(1e-8), 20)
            k, lam = torch.where(adv >= 0, 2.0, 3.0), torch.where(adv >= 0, 3.0, 2.0)
            per = -torch.exp(lam + k * log_w - lam * log_w.exp()) * adv * lp
        else:
            first = c if delta is None else c.clamp(max=delta)
            per = -torch.min(first * adv, c.clamp(1 - low, 1 + high) * adv)
        if w is not None and kind != "vespo":
            per = per * w
        if beta:
            kl = torch.exp(REF - lp) - (REF - lp) - 1
            per = per + beta * (kl * c if corrected else kl)
        total = per * F
        if kind in ("grpo", "sapo"):
            return (total.sum(-1) / N).mean()
        if kind in ("bnpo", "dapo", "cispo", "vespo"):
            return total.sum() / F.sum()
        return total.sum(-1).mean() / (max_length if kind == "dr_grpo" else 1)

    return loss


O = objectives
KL = {"beta": 0.1, "kl_ratio_corrected": True}
TRL = {
    "grpo": (trl("grpo"), O.GRPO),
    "bnpo": (trl("bnpo"), O.BNPO),
    "dr_grpo": (trl("dr_grpo", max_length=9), O.DR_GRPO.replace(max_length=9)),
    "dapo": (trl("dapo", high=0.28), O.DAPO),
    "luspo": (trl("luspo", "sequence", 3e-4, 4e-4), O.LUSPO),
    "luspo, token level": (trl("luspo"), O.LUSPO.replace(ratio="token", clip_low=0.2,
                                                         clip_high=0.2)),
    "cispo": (trl("cispo", high=5.0), O.CISPO_ABSOLUTE),
    "cispo, sequence level": (trl("cispo", "sequence", high=1.1),
                              O.CISPO_ABSOLUTE.replace(ratio="sequence", clip_high=0.1)),
    "sapo": (trl("sapo"), O.SAPO),
    "sapo, sequence level": (trl("sapo", "sequence"), O.SAPO.replace(ratio="sequence")),
    "vespo": (trl("vespo"), O.VESPO),
    "gspo": (trl("grpo", "sequence", 3e-4, 4e-4), O.GSPO),
    "delta": (trl("grpo", delta=1.5), O.GRPO.replace(delta=1.5)),
    "delta below the clip": (trl("grpo", high=0.5, delta=1.1),
                             O.GRPO.replace(clip_high=0.5, delta=1.1)),
    **{f"{k} + kl": (trl(k, beta=0.1), PRESETS[k].replace(**KL))
       for k in ("grpo", "sapo", "vespo")},
    "cispo + kl": (trl("cispo", high=5.0, beta=0.1), O.CISPO_ABSOLUTE.replace(**KL)),
    "gspo + kl": (trl("grpo", "sequence", 3e-4, 4e-4, beta=0.1), O.GSPO.replace(**KL)),
    "grpo + plain kl": (trl("grpo", beta=0.1, corrected=False), O.GRPO.replace(beta=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRL)
def test_trl(name, backend):
    loss, o = TRL[name]
    same(ours(o, backend, **({"ref_logp": REF} if o.beta else {})), theirs(loss), backend)


@pytest.mark.parametrize("low", [0.0, 0.5])
@pytest.mark.parametrize("mode", objectives.CORRECTIONS[1:])
@pytest.mark.parametrize("kind", ["grpo", "vespo"])
def test_trl_sampler_correction(kind, mode, low, backend):
    o = PRESETS[kind]
    if kind == "vespo" and mode.startswith("sequence"):
        with pytest.raises(ValueError, match="sampler_correction: got 'sequence"):
            o.replace(sampler_correction=mode)
        return
    gap = (OLD - SAMPLER) * F
    w = torch.exp(gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap)
    keep = (w >= low) & (w <= 3.0)
    w = w.clamp(low, 3.0) if mode.endswith("truncate") else w.masked_fill(~keep, 0.0)
    o = o.replace(sampler_correction=mode, sampler_min=low, beta=0.1)
    want = theirs(trl(kind, beta=0.1, corrected=False, w=w))
    same(ours(o, backend, ref_logp=REF, sampler_logp=SAMPLER), want, backend)


def test_trl_gmpo(backend):
    def loss(lp):
        d, up = lp - OLD, (A > 0)[:, None]
        cut = torch.where(up, torch.min(d, d.clamp(-0.4, 0.4)), torch.max(d, d.clamp(-0.4, 0.4)))
        live = MASK.any(-1)  # an empty completion: -A there, 0 here; no gradient in either
        return (-torch.exp((cut * F).sum(-1) / N) * A * live).mean()

    same(ours("gmpo", backend), theirs(loss), backend)


def test_trl_rloo(backend):
    def loss(lp):
        c = torch.exp(((lp - OLD) * F).sum(-1))
        return (-torch.min(c * A, c.clamp(0.8, 1.2) * A) * MASK.any(-1)).mean()

    same(ours("rloo_clip", backend), theirs(loss), backend)


# verl 0.9 -----------------------------------------------------------------------------------------


def verl(kind, adv, by):
    def loss(lp):
        d = lp - OLD
        r = torch.exp(d.clamp(-20, 20))
        if kind == "gspo":
            mean = ((d * F).sum(-1) / N)[:, None].detach()
            r = torch.exp((lp - lp.detach() + mean).clamp(max=10))
        low, high = (3e-4, 4e-4) if kind == "gspo" else (0.2, 0.2)
        c = r.clamp(1 - low, 1 + high)
        per = torch.max(-adv * r, -adv * c)
        if kind == "vanilla":
            per = torch.where(adv < 0, torch.min(per, -adv * 3.0), per)
        elif kind == "cispo":
            per = -c.detach() * adv * lp
        return ((per * F).sum(-1) / N).mean() if by == "seq" else (per * F).sum() / F.sum()

    return loss


@pytest.mark.parametrize("by", ["token", "seq"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"), [("vanilla", "ppo"), ("gspo", "gspo_token"), ("cispo", "cispo_relative")]
)
def test_verl(kind, name, tokens, by, backend):
    adv = A[:, None] + (torch.randn(B, T, generator=torch.Generator().manual_seed(0)) * tokens)
    adv = adv.expand(B, T).double()
    o = PRESETS[name].replace(reduction=by)
    same(ours(o, backend, adv), theirs(verl(kind, adv, by)), backend)


@pytest.mark.parametrize("straight", [False, True])
def test_verl_low_var_kl(straight, backend):
    far = LP + torch.linspace(-25, 25, B * T).reshape(B, T).double()

    def loss(lp):
        e = (far - lp).clamp(-20, 20)
        kl = (e.exp() - e - 1).clamp(-10, 10)
        k2 = 0.5 * (lp - far) ** 2
        kl = k2 + (kl - k2).detach() if straight else kl
        return (kl * F).sum()

    o = Objective(
        kl="k3_clamped", beta=1.0, kl_straight_through=straight, reduction="sum", surrogate="linear"
    )
    same(ours(o, backend, 0 * A, ref_logp=far), theirs(loss), backend)


# Same word, different maths -----------------------------------------------------------------------


def test_cispo_alone_is_refused():
    with pytest.raises(ValueError, match=r"'cispo', which is two formulas.*cispo_absolute.*relat"):
        objectives.resolve("cispo")
    with pytest.raises(ValueError, match="cispo_relative"):
        nn.PolicyLoss("cispo")


def test_the_two_readings_of_cispo(backend):
    """One token at ratio 1.5 and one at 0.5: the relative bound cuts both, the absolute neither."""
    old = torch.zeros(1, 2).double() - 2
    logp = old + torch.tensor([[1.5, 0.5]]).double().log()
    for name, weight in (("cispo_absolute", (1.5, 0.5)), ("cispo_relative", (1.2, 0.8))):
        mask = torch.ones(1, 2)
        _, g = ours(name, backend, torch.ones(1), logp=logp, old_logp=old, mask=mask)
        assert (-2 * g[0]).tolist() == pytest.approx(weight, rel=1e-5)


def test_gspo_and_gspo_token(backend):
    """One gradient if A is constant in the sequence and every token counts the same, else two."""
    same(ours("gspo", backend), ours("gspo_token", backend), backend)
    uneven = A[:, None] * torch.linspace(0.5, 2, T).double()
    (one, g1), (two, g2) = (ours(o, backend, uneven) for o in ("gspo", "gspo_token"))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert (g1 - g2).abs().max() > 1e-3


def test_luspo_is_gspo_times_the_length_and_masked(backend):
    n = F.sum(-1)
    same(ours("luspo", backend), ours("gspo", backend, A * n), backend)
    poisoned = LP.masked_fill(~MASK, torch.nan)
    same(ours("luspo", backend, logp=poisoned), ours("luspo", backend), backend)


@pytest.mark.parametrize("cap", [1.3, 1.5, 3.0])
def test_delta_is_dual_clip_above_the_clip(cap, backend):
    """Both cap negative advantages alone; below 1 + clip_high delta caps the positive ones too."""
    one, two = (Objective(**{k: cap}) for k in ("delta", "dual_clip"))
    same(ours(one, backend), ours(two, backend), backend)
    wide = {"clip_high": 0.9}
    (a, _), (b, _) = (ours(o.replace(**wide), backend) for o in (one, two))
    assert (abs(float(a - b)) > 1e-3) == (cap < 1.6)  # the largest ratio is exp(0.6)


def test_rloo_and_rloo_clip_agree_on_policy_only(backend):
    _, one = ours("rloo", backend, old_logp=LP)
    _, two = ours("rloo_clip", backend, old_logp=LP)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    assert (ours("rloo", backend)[1] - ours("rloo_clip", backend)[1]).abs().max() > 1e-2


def test_geometric_clips_tokens_and_gspo_the_sequence(backend):
    """A token beyond the bound: GMPO leaves it, and only it, out of the gradient."""
    old = LP.clone()
    old[:, 0] -= torch.sign(A)  # the first token has moved by e the way A pushes it
    mask = torch.ones(B, T).bool()
    _, g = ours("gmpo", backend, old_logp=old, mask=mask)
    assert (g[:, 0] == 0).all() and (g[:, 1:] != 0).all()


def test_group_of_one_and_deviation_of_verl(backend):
    r, ids = torch.tensor([2.0, 0.0, 1e-5, 7.0]), torch.tensor([0, 1, 1, 5])
    a = vgkern.group_advantages(r, ids, estimator="grpo_verl", backend=backend)
    z = 5e-6 / (5e-6 * 2**0.5 + 1e-6)
    assert a.tolist() == pytest.approx([2.0, -z, z, 7.0], rel=1e-4)
    for e in ("grpo", "rloo", "dr_grpo", "reinforce_pp_baseline"):
        with pytest.raises(ValueError, match="groups: got a group of one"):
            vgkern.group_advantages(r, ids, estimator=e, backend=backend)
