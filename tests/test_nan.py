"""NaN stays visible: in every running extreme, wherever it stands, and in the gradient of a token
whose term is NaN from whatever it is made of."""

import math

import pytest
import torch

import vgkern
from vgkern import Objective, objectives
from vgkern.ops import _check
from vgkern.train.update import extreme, merge

N = 2500  # several blocks, runs and programs of every backend
PLACES = {"first": 0, "middle": N // 2, "last": N - 1}


def rows(n=N, width=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -2 * torch.randn(n, generator=g).abs()
    others = [logp + 0.1 * torch.randn(n, generator=g) for _ in range(3)]
    a = torch.randn(n, generator=g)
    return [t.view(-1, width) if width else t for t in (logp, *others, a)]


@pytest.mark.parametrize("place", PLACES)
def test_the_mismatch_alarm(place, backend):
    """One NaN in sampler_logp: the gap is NaN, not that of the others."""
    logp, old, _, sampler, a = rows()
    sampler[PLACES[place]] = torch.nan
    out = vgkern.policy_loss(
        logp, a, objective="dapo", old_logp=old, sampler_logp=sampler, backend=backend
    )
    assert math.isnan(out.metrics["sampler_gap"])
    assert math.isfinite(out.loss) and math.isfinite(out.metrics["ratio_max"])


@pytest.mark.parametrize("width", [None, 50, 1250])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("objective", ["dapo", "gspo", "cispo_absolute", "vespo"])
def test_ratios(objective, place, width, backend):
    o = objectives.PRESETS[objective]
    if width is None and not (o.row_local and o.reduction == "token"):
        pytest.skip("packed rows are for objectives of tokens")
    logp, old, _, _, a = rows(width=width)
    old.view(-1)[PLACES[place]] = torch.nan
    out = vgkern.policy_loss(
        logp, a if width is None else a[:, 0], objective=o, old_logp=old, backend=backend
    )
    assert math.isnan(out.metrics["ratio_min"]) and math.isnan(out.metrics["ratio_max"])
    assert math.isnan(out.metrics["ratio_mean"]) and math.isnan(out.loss)


@pytest.mark.parametrize("name", ["old_logp", "ref_logp", "sampler_logp", "logp", "entropy"])
@pytest.mark.parametrize("kl", objectives.KLS)
@pytest.mark.parametrize("objective", ["dapo", "cispo_relative", "sapo", "reinforce", "gspo_token"])
def test_a_nan_term_has_a_nan_gradient(objective, kl, name, backend):
    """That token's, and no other's, unless its sequence shares the NaN."""
    o = objectives.PRESETS[objective].replace(
        beta=0.1, kl=kl, sampler_correction="token_truncate", entropy_coef=0.1
    )
    logp, old, ref, sampler, a = rows(24, 8)
    given = {"logp": logp, "old_logp": old, "ref_logp": ref, "sampler_logp": sampler}
    given["entropy"] = torch.rand(3, 8, generator=torch.Generator().manual_seed(9))
    given[name][1, 3] = torch.nan
    x = given.pop("logp").requires_grad_()
    out = vgkern.policy_loss(x, a[:, 0], objective=o, backend=backend, **given)
    (g,) = torch.autograd.grad(out.loss, x)
    assert math.isnan(out.loss)
    assert math.isnan(g[1, 3])
    assert bool(g[[0, 2]].isfinite().all())
    if name != "sampler_logp" and o.row_local:
        assert int(g.isnan().sum()) == 1


@pytest.mark.parametrize("name", ["old_logp", "ref_logp", "sampler_logp"])
def test_the_fused_loss_has_it_too(name, backend, monkeypatch):
    """As on a GPU, where no exception names it."""
    o = Objective(beta=0.1, sampler_correction="token_mask", reduction="token")
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(6, 16, generator=g), torch.randn(40, 16, generator=g)
    y = torch.randint(40, (6,), generator=g)
    lp = vgkern.linear_token_logprobs(h, w, y, backend=backend).logp
    logs = {k: lp + 0.01 for k in ("old_logp", "ref_logp", "sampler_logp")}
    logs[name] = logs[name].clone()
    logs[name][2] = torch.nan
    a = torch.ones(6)
    with pytest.raises(vgkern.NonFiniteError, match=rf"^{name}: got NaN at \[2\]"):
        vgkern.linear_policy_loss(h, w, y, a, objective=o, backend=backend, **logs)
    monkeypatch.setattr(_check, "can_look", lambda device: False)
    h.requires_grad_()
    out = vgkern.linear_policy_loss(h, w, y, a, objective=o, backend=backend, **logs)
    (dh,) = torch.autograd.grad(out.loss, h)
    assert math.isnan(out.loss) and bool(dh[2].isnan().any())
    assert bool(dh[[0, 1, 3, 4, 5]].isfinite().all())


@pytest.mark.parametrize("correction", objectives.CORRECTIONS[1:])
def test_corrections(correction, backend):
    """No weight is made of NaN, neither 0 nor a bound."""
    logp, old, _, sampler, a = rows(24, 8)
    sampler[1, 3] = torch.nan
    x = logp.requires_grad_()
    o = objectives.DAPO.replace(sampler_correction=correction)
    out = vgkern.policy_loss(
        x, a[:, 0], objective=o, old_logp=old, sampler_logp=sampler, backend=backend
    )
    (g,) = torch.autograd.grad(out.loss, x)
    assert out.loss.isnan() and g[1, 3].isnan() and bool(g[[0, 2]].isfinite().all())
    assert int(g[1].isnan().sum()) == (8 if correction.startswith("sequence") else 1)


def test_a_masked_nan_is_nowhere(backend):
    logp, old, ref, sampler, a = rows(24, 8)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 3] = False
    for t in (logp, old, ref, sampler):
        t[1, 3] = torch.nan
    o = Objective(beta=0.1, sampler_correction="token_truncate")
    x = logp.requires_grad_()
    out = vgkern.policy_loss(
        x, a[:, 0], objective=o, old_logp=old, ref_logp=ref, sampler_logp=sampler, mask=mask,
        backend=backend,
    )  # fmt: skip
    (g,) = torch.autograd.grad(out.loss, x)
    assert bool(g.isfinite().all()) and all(math.isfinite(v) for v in out.metrics.values())


@pytest.mark.parametrize("estimator", [e for e in objectives.ESTIMATORS if e != "none"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_group_of_equal_rewards_and_a_nan(at, estimator, backend, monkeypatch):
    """Its smallest and largest reward are equal, but it is not one of equal rewards."""
    monkeypatch.setattr(_check, "can_look", lambda device: False)
    rewards, groups = torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1])
    rewards[at] = torch.nan
    rewards[4] = 0
    got = vgkern.group_advantages(rewards, groups, estimator=estimator, backend=backend)
    assert bool(got[:3].isnan().all())


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("name", ["sampler_gap", "ratio_max", "ratio_min"])
def test_micro_batches(name, at):
    """max(0.1, nan) of Python is 0.1."""
    parts = [
        {"loss": 0.0, "tokens": 1.0, "active": 1.0, "clamped": 0.0, name: 0.1} for _ in range(3)
    ]
    parts[at][name] = math.nan
    assert math.isnan(merge(parts, False)[name])
    values = [1.0, 2.0, 3.0]
    assert extreme(max, values) == 3 and extreme(min, values) == 1
    values[at] = math.nan
    assert math.isnan(extreme(max, values)) and math.isnan(extreme(min, values))


def test_a_gap_that_is_nan_stops_a_run():
    from types import SimpleNamespace

    from vgkern.errors import TrainingError
    from vgkern.train.device import LIMITS
    from vgkern.train.trainer import Trainer

    with pytest.raises(TrainingError, match="disagree on a token's log-prob by nan"):
        Trainer.check_gap(SimpleNamespace(gap=0.0, limits=LIMITS["fp32"]), math.nan)
