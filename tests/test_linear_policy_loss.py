"""What is special to the fused loss; equality with its parts is in test_objectives.py."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import vgkern
from vgkern import Objective, case_inputs, objectives


def batch(b=6, t=5, h=16, v=200, dtype=torch.float32, seed=0):
    x, logp, _ = case_inputs.head((b, t), h, v, dtype, seed)
    return x["hidden"], x["weight"], x["targets"], logp


def test_rewards_and_groups_are_advantages(backend):
    h, w, y, _ = batch()
    r, g = torch.tensor([1.0, 0, 0, 1, 1, 1]), torch.tensor([5, 5, 5, 2, 2, 2])
    for name in objectives.PRESETS:
        a = vgkern.group_advantages(r, g, estimator=objectives.PRESETS[name].advantage)
        one = vgkern.linear_policy_loss(
            h, w, y, rewards=r, groups=g, objective=name, backend=backend
        )
        two = vgkern.linear_policy_loss(h, w, y, a, objective=name, backend=backend)
        assert torch.equal(one.loss, two.loss), name


def test_dead_rows_change_nothing(backend):
    """Masked, zero-advantage and clipped rows: zero dh, and the others as if they were alone."""
    h, w, y, logp = batch()
    a = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, 0.5])
    mask = case_inputs.padding(6, 5, 3)
    old = logp.float().clone()
    old[3] -= 1.0  # A > 0 and ratio e: clipped
    h.requires_grad_(), w.requires_grad_()
    out = vgkern.linear_policy_loss(
        h, w, y, a, objective="bnpo", old_logp=old, mask=mask, backend=backend
    )
    gh, gw = torch.autograd.grad(out.loss, (h, w))
    dead = ~mask | (a == 0)[:, None]
    dead[3] = True
    assert (gh[dead] == 0).all() and (gh[~dead].abs().sum(-1) > 0).all()
    x, m = h.detach()[~dead].requires_grad_(), w.detach().requires_grad_()
    few = vgkern.linear_policy_loss(
        x, m, y[~dead], a[:, None].expand(6, 5)[~dead], objective="bnpo", old_logp=old[~dead],
        normalizer=int(mask.sum()), backend=backend
    )  # fmt: skip
    want = torch.autograd.grad(few.loss, (x, m))
    torch.testing.assert_close(gh[~dead], want[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gw, want[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_masked_rows_may_hold_anything(name, backend):
    """NaN in hidden states and log-probs, garbage in targets: the loss of what is not masked."""
    h, w, y, logp = batch()
    mask = case_inputs.padding(6, 5, 3)
    a, old = torch.tensor([1.0, -1, 0.5, 2, -0.3, 1]), (logp + 0.1).float()

    def run(h, y, old):
        x, m = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = vgkern.linear_policy_loss(
            x, m, y, a, objective=name, old_logp=old, mask=mask, backend=backend
        )
        return out.loss.detach(), *torch.autograd.grad(out.loss, (x, m))

    want = run(h, y, old)
    off = ~mask
    got = run(
        h.masked_fill(off[..., None], torch.nan), y.masked_fill(off, -(2**50)),
        old.masked_fill(off, torch.nan)
    )  # fmt: skip
    for a_, b_ in zip(got, want, strict=True):
        torch.testing.assert_close(a_, b_, rtol=1e-6, atol=1e-7)


def test_padding_side_and_width_do_not_matter(backend):
    """Extra columns of padding, left or right: one loss, one gradient of the head."""
    h, w, y, _ = batch()
    a = torch.tensor([1.0, -1, 0.5, 2, -0.3, 1])
    out = []
    for left, right in ((0, 0), (3, 0), (0, 4), (2, 2)):
        m = w.clone().requires_grad_()
        x = torch.cat([torch.zeros(6, left, 16), h, torch.zeros(6, right, 16)], 1)
        z = torch.cat([y.new_zeros(6, left), y, y.new_zeros(6, right)], 1)
        mask = torch.zeros(6, left + 5 + right)
        mask[:, left : left + 5] = 1
        loss = vgkern.linear_policy_loss(x, m, z, a, mask=mask, backend=backend).loss
        out.append((loss.detach(), torch.autograd.grad(loss, m)[0]))
    for loss, g in out[1:]:
        torch.testing.assert_close(loss, out[0][0])
        torch.testing.assert_close(g, out[0][1], rtol=1e-5, atol=1e-7)


def test_same_bits_on_repeat(backend, threads):
    h, w, y, logp = batch(40, 7, 32, 1035)
    a = torch.randn(40, generator=torch.Generator().manual_seed(0))

    def run(count):
        threads(count)
        x, m = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = vgkern.linear_policy_loss(
            x, m, y, a, objective=Objective(entropy_coef=0.01), old_logp=(logp + 0.1).float(),
            backend=backend
        )  # fmt: skip
        return out.loss.detach(), *torch.autograd.grad(out.loss, (x, m))

    for count in (1, 2):
        want = run(count)
        for _ in range(3):
            assert all(torch.equal(p, q) for p, q in zip(run(count), want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loss_is_fp32_and_scaled_gradients_keep_their_dtype(dtype, backend):
    h, w, y, logp = batch(dtype=dtype)
    h.requires_grad_(), w.requires_grad_()
    out = vgkern.linear_policy_loss(h, w, y, torch.ones(6), old_logp=logp.float(), backend=backend)
    assert out.loss.dtype == torch.float32
    assert float(out.loss.detach()) == pytest.approx(-1.0, abs=1e-5)  # ratio 1 to fp32
    gh, gw = torch.autograd.grad(0.125 * out.loss, (h, w))
    assert gh.dtype == gw.dtype == dtype


def test_blocked_ids_get_no_gradient(backend):
    h, w, y, _ = batch()
    b = torch.zeros(200)
    b[y.unique()] = 0.5
    blocked = torch.ones(200, dtype=torch.bool)
    blocked[y.unique()] = False
    b[blocked] = -torch.inf
    w.requires_grad_()
    out = vgkern.linear_policy_loss(
        h, w, y, torch.ones(6), bias=b, objective=Objective(entropy_coef=0.1), backend=backend
    )
    (g,) = torch.autograd.grad(out.loss, w)
    assert g.isfinite().all() and (g[blocked] == 0).all() and (g[~blocked] != 0).any()


def test_second_derivative_raises_on_native(backend):
    if backend == "torch":
        pytest.skip("the reference is differentiable twice")
    h, w, y, _ = batch()
    h.requires_grad_()
    loss = vgkern.linear_policy_loss(h, w, y, torch.ones(6), backend=backend).loss
    (g,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_backward_makes_no_second_head_gradient(backend):
    """The forward's dW is scaled in place and given away: no copy, no zeros of that size."""
    if backend == "torch":
        pytest.skip("plain autograd makes its gradients in backward")
    h, w, y, _ = batch(v=2000)
    w.requires_grad_()
    loss = vgkern.linear_policy_loss(h, w, y, torch.randn(6), backend=backend).loss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss.backward()
    assert w.grad.any()
    assert max(e.self_cpu_memory_usage for e in seen.events()) < w.nbytes


@pytest.mark.parametrize("name", ["dapo", "gspo", "cispo_relative"])
def test_a_temperature_for_each_row(name, backend):
    """Loss and gradients of the formula in fp64, and those of one number where all are equal."""
    h, w, y, _ = batch()
    o = objectives.PRESETS[name]
    a = torch.tensor([1.0, -1, 0.5, 2, -0.3, 1])
    mask = case_inputs.padding(6, 5, 3)
    t = torch.linspace(0.5, 1.6, 30).view(6, 5)
    exact = [x.double().requires_grad_() for x in (h, w)]
    z = (exact[0] @ exact[1].T / t[..., None].double()).log_softmax(-1)
    lp = z.gather(-1, y[..., None])[..., 0]
    old = (
        lp.detach() + 0.1 * torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    ).float()
    want = vgkern.policy_loss(lp, a, objective=o, old_logp=old.double(), mask=mask, backend="torch")
    leaves = [x.clone().requires_grad_() for x in (h, w)]
    given = {"objective": o, "old_logp": old, "mask": mask, "backend": backend}
    out = vgkern.linear_policy_loss(*leaves, y, a, temperature=t, **given)
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(3 * out.loss, leaves)
    for g, e in zip(got, torch.autograd.grad(3 * want.loss, exact), strict=True):
        assert (g - e).abs().max() <= 2e-5 * e.abs().max()
    same = vgkern.linear_policy_loss(*leaves, y, a, temperature=torch.full_like(t, 0.7), **given)
    one = vgkern.linear_policy_loss(*leaves, y, a, temperature=0.7, **given)
    torch.testing.assert_close(same.loss, one.loss, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"temperature: got .*; allowed: "):
        vgkern.linear_policy_loss(*leaves, y, a, temperature=t[:3], **given)
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"temperature: got "):
            vgkern.linear_policy_loss(*leaves, y, a, temperature=-t, **given)
