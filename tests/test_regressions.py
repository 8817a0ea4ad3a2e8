"""Faults found by review and fuzzing; each of these once gave a wrong number or a wrong error."""

import threading

import pytest
import torch

import vgkern
from vgkern.objectives import Objective

INF = float("inf")
DAPO = {"objective": "dapo"}  # packed rows: no sequence-level reduction


def problem(dtype=torch.float32, n=8, h=16, v=37):
    torch.manual_seed(0)
    hidden = torch.randn(n, h).to(dtype).requires_grad_()
    weight = torch.randn(v, h).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,)), torch.randn(n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_scale_comes_before_the_rounding_to_half(dtype, backend):
    """fp16 gradients of a small loss vanish unless the scale is applied in fp32."""
    hidden, weight, y, a = problem(dtype)
    lp = {"objective": "dapo", "normalizer": 64e3, "backend": backend}
    loss = vgkern.linear_policy_loss(hidden, weight, y, a, **lp).loss
    got = torch.autograd.grad(loss * 65536, (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    lp["backend"] = "torch"
    truth = torch.autograd.grad(vgkern.linear_policy_loss(*wide, y, a, **lp).loss * 65536, wide)
    for g, t in zip(got, truth, strict=True):
        assert g.dtype == dtype and torch.isfinite(g).all()
        assert float((g.double() - t).norm() / t.norm()) < 4e-3


def test_gradient_given_away_is_not_the_saved_one(backend):
    hidden, weight, y, a = problem()
    loss = vgkern.linear_policy_loss(hidden, weight, y, a, **DAPO, backend=backend).loss
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    kept = first.clone()
    first.data.mul_(0.5)
    (second,) = torch.autograd.grad(3 * loss, weight, retain_graph=True)
    torch.testing.assert_close(second, 3 * kept)


def test_entropy_gradient_with_a_blocked_id_and_a_large_coefficient(backend):
    x = torch.tensor([[1.0, -INF, 2.0]], requires_grad=True)
    out = vgkern.token_logprobs(x, torch.tensor([0]), backend=backend)
    (g,) = torch.autograd.grad(65536 * out.entropy.sum(), x)
    assert torch.isfinite(g).all() and g[0, 1] == 0 and g[0, 0] > 0


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_k": 2}, {"min_p": 0.1}, {"top_p": 0.5}, {}])
def test_truncation_does_not_hide_nan(cut, backend):
    weight = torch.tensor([[1.0, 1], [float("nan"), 0], [2, 2], [0, 0]])
    noise = vgkern.Noise(0, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(vgkern.NonFiniteError, match="weight: got NaN"):
        vgkern.linear_sample(torch.ones(1, 2), weight, noise, **cut, backend=backend)


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_kernels(other, backend):
    hidden, weight, y, a = problem(torch.bfloat16)
    grads = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=other, enabled=on):
            loss = vgkern.linear_policy_loss(hidden, weight, y, a, **DAPO, backend=backend).loss
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    for plain, cast in zip(*grads, strict=True):
        torch.testing.assert_close(plain, cast)


def test_dual_clip_below_the_clip_bound_caps_value_and_gradient(backend):
    lp = torch.tensor([[1.15]]).log().requires_grad_()
    o = Objective(dual_clip=1.1, reduction="token")
    args = {"objective": o, "old_logp": torch.zeros(1, 1), "backend": backend}
    loss = vgkern.policy_loss(lp, torch.tensor([-1.0]), **args).loss
    (g,) = torch.autograd.grad(loss, lp)
    assert float(loss.detach()) == pytest.approx(1.1) and float(g) == 0


def test_size_one_dimensions_may_have_any_stride(backend):
    hidden, weight = torch.randn(1, 6).t(), torch.randn(7, 1)
    y = torch.zeros(6, dtype=torch.int64)
    odd = weight.as_strided((7, 1), (1, 7))
    a = vgkern.linear_token_logprobs(hidden, odd, y, backend=backend).logp
    b = vgkern.linear_token_logprobs(hidden.clone(), weight.clone(), y, backend=backend).logp
    torch.testing.assert_close(a, b)
    assert vgkern.token_logprobs(torch.randn(1, 6).t(), y, backend=backend).logp.abs().max() == 0


def test_blocked_target_has_no_gradient_at_all(backend):
    x = torch.tensor([[1.0, -INF, 2.0]], requires_grad=True)
    out = vgkern.token_logprobs(x, torch.tensor([1]), backend=backend)
    (g,) = torch.autograd.grad(out.entropy.sum(), x)
    assert (g == 0).all() and out.logp[0] == -INF


@pytest.mark.parametrize("old", [None, torch.tensor([[-1.0, -INF]])])
def test_blocked_token_in_a_policy_loss_is_finite(old, backend):
    lp = torch.tensor([[-1.0, -INF]], requires_grad=True)
    out = vgkern.policy_loss(lp, torch.tensor([1.0]), old_logp=old, backend=backend)
    (g,) = torch.autograd.grad(out.loss, lp)
    assert out.loss.item() == pytest.approx(-1.0) and g[0, 1] == 0


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "abs"])
def test_a_reference_without_weight_cannot_spoil_the_loss(kl, backend):
    lp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ref = torch.tensor([[-1.0, -INF]])
    o = Objective(kl=kl)
    args = {"objective": o, "ref_logp": ref, "backend": backend}
    loss = vgkern.policy_loss(lp, torch.tensor([1.0]), **args).loss
    (g,) = torch.autograd.grad(loss, lp)
    assert torch.isfinite(loss) and torch.isfinite(g).all()


def test_normalizer_of_any_kind_is_checked(backend):
    lp, a = torch.full((2, 3), -1.0, requires_grad=True), torch.ones(2)
    for bad in (torch.tensor(-1.0), torch.ones(3), 0, torch.tensor(0.0), float("nan")):
        with pytest.raises(ValueError, match="normalizer"):
            vgkern.policy_loss(lp, a, normalizer=bad, backend=backend)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for zero in (0, torch.tensor(0.0)):
        args = {"normalizer": zero, "mask": nothing, "backend": backend}
        loss = vgkern.policy_loss(lp, a, **args).loss
        assert float(loss) == 0 and (torch.autograd.grad(loss, lp)[0] == 0).all()


def test_objective_numbers_are_finite():
    for knob in ({"entropy_coef": float("nan")}, {"beta": INF}):
        with pytest.raises(ValueError, match=f"objective.{next(iter(knob))}"):
            Objective(**knob)


def test_use_backend_belongs_to_its_thread(monkeypatch):
    monkeypatch.setenv("VGKERN_BACKEND", "")  # set but empty: not a choice
    seen = []
    x = torch.randn(2, 5, dtype=torch.float64)

    def other() -> None:
        seen.append(vgkern.token_logprobs(x, torch.tensor([0, 1])))

    with vgkern.use_backend("cpu"):
        thread = threading.Thread(target=other)  # fp64 would raise under "cpu"
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_infinite_logits_are_told(backend):
    with pytest.raises(vgkern.NonFiniteError):
        vgkern.token_logprobs(torch.tensor([[1.0, INF, 2]]), torch.tensor([1]), backend=backend)
    noise = vgkern.Noise(0, torch.tensor([0]), torch.tensor([0]))
    for bias in (torch.full((3,), -INF), torch.tensor([0.0, INF, 0])):
        args = {"bias": bias, "temperature": 0.0, "backend": backend}
        with pytest.raises(vgkern.NonFiniteError):
            vgkern.linear_sample(torch.ones(1, 2), torch.ones(3, 2), noise, **args)
