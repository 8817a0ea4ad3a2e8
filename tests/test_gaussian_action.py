"""What is special to gaussian_action: its density, its two estimators, its noise."""

import math

import pytest
import torch

import vgkern
from vgkern.ops.noise import NORMAL


def noise(*shape, seed=7):
    n = math.prod(shape)
    return vgkern.Noise(seed, torch.arange(n).reshape(shape) + 2**34, torch.tensor(3))


def inputs(*shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    mean = torch.randn(*shape, generator=g).to(dtype).requires_grad_()
    return mean, (-torch.rand(shape[-1], generator=g)).to(dtype).requires_grad_()


def test_action_and_density(backend):
    mean, log_std = inputs(3, 5, 6)
    at = noise(3, 5)
    out = vgkern.gaussian_action(mean, log_std, at, backend=backend)
    eps = at.normal(6)
    torch.testing.assert_close(out.action, mean + log_std.exp() * eps, rtol=1e-6, atol=1e-6)
    policy = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(
        out.logp, policy.log_prob(out.action.detach()).sum(-1), rtol=1e-5, atol=1e-5
    )


def test_each_output_carries_its_own_estimator(backend):
    """action: pathwise only; logp: score only, with the action held fixed."""
    mean, log_std = inputs(40, 3)
    at = noise(40)
    eps, sigma = at.normal(3), log_std.detach().exp()
    up = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    out = vgkern.gaussian_action(mean, log_std, at, backend=backend)
    path = torch.autograd.grad((out.action * up).sum(), (mean, log_std), retain_graph=True)
    score = torch.autograd.grad((out.logp * up[:, 0]).sum(), (mean, log_std))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(path[0], up, **close)
    torch.testing.assert_close(path[1], (up * sigma * eps).sum(0), **close)
    torch.testing.assert_close(score[0], up[:, :1] * eps / sigma, **close)
    torch.testing.assert_close(score[1], (up[:, :1] * (eps**2 - 1)).sum(0), **close)


def test_estimators_agree_in_expectation(backend):
    """d E[f(a)] / d mean of f(a) = a^2: pathwise and score, both within 5 standard errors."""
    n = 20000
    mean = torch.full((n, 1), 0.6, requires_grad=True)
    log_std = torch.tensor(-0.5)
    out = vgkern.gaussian_action(mean, log_std, noise(n), backend=backend)
    f = out.action.detach().square()
    for loss in (out.action.square().sum(), (out.logp * f[:, 0]).sum()):
        (d,) = torch.autograd.grad(loss, mean, retain_graph=True)
        assert abs(float(d.mean()) - 1.2) < 5 * float(d.std()) / n**0.5


def test_statistics_of_the_noise(backend):
    """Mean, variance, kurtosis; dimensions, positions and sequences are uncorrelated."""
    s, p = torch.arange(40)[:, None], torch.arange(50)
    at = vgkern.Noise(11, s, p)
    zero = torch.zeros(40, 50, 18)
    e = vgkern.gaussian_action(zero, torch.tensor(0.0), at, backend=backend).action.double()
    n = e.numel()
    assert abs(float(e.mean())) < 5 / n**0.5
    assert abs(float(e.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((e**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    for dim in (0, 1, 2):
        for step in (1, 2):
            other = e.roll(step, dim)
            assert abs(float((e * other).mean())) < 5 / n**0.5
            assert abs(float((e**2 * other**2).mean()) - 1) < 5 * (8 / n) ** 0.5


def test_normal_and_gumbel_never_share_a_counter():
    at = noise(4)
    assert NORMAL == 1 << 31  # vocabulary ids stay far below 4 * 2^31
    both = torch.stack([at.words(4096), at.words(4096, NORMAL)])
    assert not (both[0] == both[1]).any()


def test_replay(backend, threads):
    """One row alone, in any order, for any thread count: the same bits."""
    mean, log_std = inputs(33, 7)
    at = noise(33)
    threads(2)
    whole = vgkern.gaussian_action(mean, log_std, at, backend=backend)
    threads(1)
    again = vgkern.gaussian_action(mean, log_std, at, backend=backend)
    assert torch.equal(whole.action, again.action) and torch.equal(whole.logp, again.logp)
    order = torch.tensor([32, 5, 0])
    some = vgkern.Noise(at.seed, at.sequence[order], at.position)
    part = vgkern.gaussian_action(mean[order], log_std, some, backend=backend)
    assert torch.equal(part.action, whole.action[order])


def test_gradcheck():
    """In fp64; the density has no pathwise part, so logp is checked by formula above."""
    mean, log_std = inputs(4, 3, dtype=torch.float64)
    at = noise(4)
    assert torch.autograd.gradcheck(
        lambda m, s: vgkern.gaussian_action(m, s, at, backend="torch").action, (mean, log_std)
    )


f = torch.ones
BAD = {
    "log_std wide": (f(3, 2), f(3), {}, ValueError, "log_std", "[3]", "[3, 2]"),
    "mixed dtypes": (f(3, 2), f(2).double(), {}, TypeError, "log_std", "float64", "mean"),
    "log_std nan": (f(3, 2), f(2) * torch.nan, {}, vgkern.NonFiniteError, "log_std", "nan at [0]"),
    "log_std -inf": (f(3, 2), f(2) - torch.inf, {}, vgkern.NonFiniteError, "log_std", "-inf"),
    "mean nan": (f(3, 2) * torch.nan, f(2), {}, vgkern.NonFiniteError, "mean", "[0, 0]"),
    "mean 0-d": (torch.tensor(1.0), f(2), {}, ValueError, "mean", "[..., n]"),
    "mean ints": (f(3, 2).long(), f(2), {}, TypeError, "mean", "int64"),
    "device": (f(3, 2), f(2, device="meta"), {}, ValueError, "log_std", "meta"),
    "noise rows": (f(4, 2), f(2), {}, ValueError, "noise", "[3]", "[4]"),
    "noise tensor": (f(3, 2), f(2), {"noise": f(3)}, TypeError, "noise", "vgkern.Noise"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    mean, log_std, other, error, *words = BAD[name]
    with pytest.raises(error) as e:
        vgkern.gaussian_action(mean, log_std, other.get("noise", noise(3)))
    assert all(w in str(e.value) for w in words), e.value
