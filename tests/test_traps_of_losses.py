"""The field's known traps that concern a loss over tokens, by number; the others are in
test_traps.py."""

import math

import pytest
import torch

import vgkern
from vgkern import Objective, case_inputs, objectives


def grads(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def head(shape):
    x, logp, _ = case_inputs.head(shape, 16, 200, torch.float32, 0)
    return x["hidden"], x["weight"], x["targets"], logp


@pytest.mark.parametrize("gap", [100.0, -100.0, 1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("objective", [Objective(), Objective(beta=0.1, clip_high=0.3)])
def test_trap_01_masked_log_ratio_overflow(gap, objective, backend):
    """logp - old of any size at a masked token: no NaN, gradient exactly 0 there."""
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -2.0 - gap]])
    out = vgkern.policy_loss(
        logp, torch.tensor([1.0]), objective=objective, old_logp=old, ref_logp=old,
        mask=torch.tensor([[1, 0]]), backend=backend
    )  # fmt: skip
    (d,) = grads(out.loss, logp)
    assert out.loss.isfinite() and d[0, 1] == 0 and float(d[0, 0]) == pytest.approx(-1.0, rel=1e-6)
    # the same where the policy's own log-prob is what overflows
    logp = torch.tensor([[-1.0, gap]], requires_grad=True)
    out = vgkern.policy_loss(
        logp, torch.tensor([1.0]), objective=objective, old_logp=torch.tensor([[-1.0, -2.0]]),
        ref_logp=torch.tensor([[-1.0, -2.0]]), mask=torch.tensor([[1, 0]]), backend=backend
    )  # fmt: skip
    (d,) = grads(out.loss, logp)
    assert out.loss.isfinite() and d[0, 1] == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_trap_01_unmasked_overflow_is_clamped(advantage, backend):
    """Far-off tokens (R23): finite loss; gradient 0 beyond clip and clamp; counted."""
    for d in (100.0, 1e4, -100.0, -1e4):
        logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        old = logp.detach() - torch.tensor([[0.0, d]])
        out = vgkern.policy_loss(logp, torch.tensor([advantage]), old_logp=old, backend=backend)
        (g,) = grads(out.loss, logp)
        assert out.loss.isfinite() and g.isfinite().all() and g[0, 1] == 0
        assert int(out.metrics["clamped"]) == (advantage != 0)


def test_trap_05_token_advantages_are_not_scaled(backend):
    """[B], [B, 1] and [B, T] advantages of equal values give one loss; other shapes raise."""
    h, w, y, logp = head((4, 6))
    a = torch.tensor([1.0, -1.0, 0.5, 0.0])
    old = (logp + 0.1).float()
    losses = [
        vgkern.linear_policy_loss(h, w, y, x, old_logp=old, backend=backend).loss
        for x in (a, a[:, None], a[:, None].expand(4, 6))
    ]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    with pytest.raises(ValueError, match="advantages"):
        vgkern.linear_policy_loss(h, w, y, torch.ones(6), backend=backend)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(objectives.PRESETS))
def test_trap_06_padding_has_no_gradient(name, side, backend):
    """Padding changes neither value nor gradient; compared with each sequence alone."""
    b, t = 5, 6
    h, w, y, logp = head((b, t))
    mask = case_inputs.padding(b, t, 0, side)
    a = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3])
    old = (logp + 0.1 * torch.randn(b, t, generator=torch.Generator().manual_seed(0))).float()
    h.requires_grad_()
    o = objectives.PRESETS[name].replace(max_length=t)
    out = vgkern.linear_policy_loss(
        h, w, y, a, objective=o, old_logp=old, mask=mask, backend=backend
    )
    (g,) = grads(out.loss, h)
    assert (g[~mask] == 0).all()
    n = float({"token": mask.sum(), "fixed": b * t}.get(o.reduction, b))
    total = 0
    for i in range(b):
        m = mask[i]
        if not m.any():
            continue
        x = h.detach()[i : i + 1, m].requires_grad_()
        one = vgkern.linear_policy_loss(
            x, w, y[i : i + 1, m], a[i : i + 1], objective=o, old_logp=old[i : i + 1, m],
            normalizer=n, backend=backend
        )  # fmt: skip
        total = total + one.loss.detach()
        torch.testing.assert_close(grads(one.loss, x)[0][0], g[i, m], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(total, out.loss.detach(), rtol=1e-5, atol=1e-6)


def test_trap_07_beta_without_reference_raises(backend):
    with pytest.raises(ValueError, match="ref_logp: got None"):
        vgkern.policy_loss(
            -torch.ones(2, 3), torch.ones(2), objective=Objective(beta=0.5), backend=backend
        )


@pytest.mark.parametrize("name", list(objectives.PRESETS))
def test_trap_24_uneven_micro_batches(name, backend):
    """Micro-batches of 1 and 5 sequences with the global normalizer: the gradient of the whole."""
    h, w, y, logp = head((6, 5))
    mask = case_inputs.padding(6, 5, 1)
    old = (logp + 0.05).float()
    a = torch.randn(6, generator=torch.Generator().manual_seed(0))
    o = objectives.PRESETS[name].replace(max_length=5)
    n = float({"token": mask.sum(), "fixed": 30}.get(o.reduction, 6))

    def grad(splits):
        m = w.clone().requires_grad_()
        for s in torch.arange(6).split(splits):
            vgkern.linear_policy_loss(
                h[s], m, y[s], a[s], objective=o, old_logp=old[s], mask=mask[s], normalizer=n,
                backend=backend
            ).loss.backward()  # fmt: skip
        return m.grad

    whole = grad([6])
    for splits in ([1, 5], [5, 1], [2, 2, 2], [1] * 6):
        torch.testing.assert_close(grad(splits), whole, rtol=1e-5, atol=1e-6)
    m = w.clone().requires_grad_()
    out = vgkern.linear_policy_loss(
        h, m, y, a, objective=o, old_logp=old, mask=mask, backend=backend
    )
    torch.testing.assert_close(grads(out.loss, m)[0], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", objectives.REDUCTIONS)
def test_trap_25_empty_mask_is_zero(reduction, backend):
    """Nothing to average: 0, not 0/0; and inf where masked is not inf * 0."""
    logp = torch.tensor([[-torch.inf, -1.0]], requires_grad=True)
    out = vgkern.policy_loss(
        logp, torch.tensor([1.0]), objective=Objective(reduction=reduction),
        mask=torch.zeros(1, 2), backend=backend
    )  # fmt: skip
    assert out.loss == 0 and (grads(out.loss, logp)[0] == 0).all()


@pytest.mark.parametrize("reduction", objectives.REDUCTIONS)
def test_trap_26_empty_completion_in_a_batch(reduction, backend):
    logp = -torch.ones(3, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    out = vgkern.policy_loss(
        logp, torch.ones(3), objective=Objective(reduction=reduction), mask=mask, backend=backend
    )
    (g,) = grads(out.loss, logp)
    assert out.loss.isfinite() and g.isfinite().all() and (g[1] == 0).all()
    assert (g[mask == 1] != 0).all()


def test_trap_29_kl_has_a_gradient_far_from_the_reference(backend):
    """k3 of a large gap pulls back; an output clamp would have gradient 0 there."""
    for gap in (3.0, 8.0, 15.0):
        logp = torch.tensor([[-20.0]], requires_grad=True)
        out = vgkern.policy_loss(
            logp, torch.zeros(1), objective=Objective(beta=1.0), ref_logp=logp.detach() + gap,
            backend=backend
        )  # fmt: skip
        assert float(grads(out.loss, logp)[0]) == pytest.approx(-math.expm1(gap), rel=1e-5)


def test_trap_36_metrics_of_nothing_are_finite(backend):
    out = vgkern.policy_loss(
        -torch.ones(2, 3), torch.ones(2), mask=torch.zeros(2, 3), old_logp=-torch.ones(2, 3),
        sampler_logp=-torch.ones(2, 3), backend=backend
    )  # fmt: skip
    for name, x in out.metrics.items():
        assert x.isfinite() and x.ndim == 0 and not x.requires_grad, name
    assert int(out.metrics["tokens"]) == 0 and int(out.metrics["active"]) == 0


def test_trap_37_no_gradient_work_without_grad(backend, monkeypatch):
    """Under no_grad, or with nothing trained, the fused loss is asked for no gradient."""
    import conftest

    conftest.skip_unless_runs("cpu")
    from vgkern.ops import linear_policy_loss as module

    h, w, y, _ = head((2, 3))
    a = torch.tensor([1.0, -0.5])
    asked = []
    true = module.LinearPolicyLossFunction

    class Spy(true):
        @staticmethod
        def forward(*args):
            asked.append(args[8])  # needs
            return true.forward(*args)

    monkeypatch.setattr(module, "LinearPolicyLossFunction", Spy)
    m = w.clone().requires_grad_()
    with torch.no_grad():
        out = vgkern.linear_policy_loss(h, m, y, a, backend=backend)
        assert not out.loss.requires_grad
    frozen = vgkern.linear_policy_loss(h, w, y, a, backend=backend)
    assert not frozen.loss.requires_grad
    trained = vgkern.linear_policy_loss(h, m, y, a, backend=backend)
    assert torch.equal(out.loss, frozen.loss)
    torch.testing.assert_close(trained.loss.detach(), frozen.loss)
    if backend == "cpu":
        assert asked == [[False] * 3, [False] * 3, [False, True, False]]
