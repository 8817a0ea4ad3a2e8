"""What is special to linear_rollout: costate_scan is its backward; the linear-quadratic truth."""

import pytest
import torch

import vgkern


def noise(b, t, seed=5):
    return vgkern.Noise(seed, torch.arange(b)[:, None] + 2**33, torch.arange(t))


def system(b=3, t=6, n=4, diagonal=False, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    shapes = [(b, t, n) if diagonal else (b, t, n, n), (b, t, n), (n,), (b, n)]
    x = [0.5 * torch.randn(s, generator=g) for s in shapes]
    x[2] = x[2].abs()
    return [v.to(dtype).requires_grad_() for v in x]


@pytest.mark.parametrize("diagonal", [False, True])
def test_gradcheck(diagonal):
    at = noise(3, 6)
    assert torch.autograd.gradcheck(
        lambda *x: vgkern.linear_rollout(*x, at), system(diagonal=diagonal)
    )


@pytest.mark.parametrize("diagonal", [False, True])
def test_backward_is_costate_scan(backend, diagonal):
    x = system(n=7, diagonal=diagonal, dtype=torch.float32)
    a = x[0]
    at = noise(3, 6)
    states = vgkern.linear_rollout(*x, at, backend=backend)
    up = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    da, db, dsigma, ds0 = torch.autograd.grad((states * up).sum(), x)
    lam = vgkern.costate_scan(a.detach(), up[:, :-1], up[:, -1], backend=backend)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ds0, lam[:, 0], **close)
    torch.testing.assert_close(db, lam[:, 1:], **close)
    torch.testing.assert_close(dsigma, (lam[:, 1:] * at.normal(7)).sum((0, 1)), **close)
    s = states.detach()[:, :-1]
    want = lam[:, 1:] * s if diagonal else lam[:, 1:, :, None] * s[:, :, None, :]
    torch.testing.assert_close(da, want, **close)


def linear_quadratic(dtype, t=16, n=3, m=2):
    """A stable closed loop s' = (A + B K) s + B sigma eps, cost s'Qs + a'Ra; Riccati's P."""
    g = torch.Generator().manual_seed(0)
    f64 = {"generator": g, "dtype": torch.float64}
    A = torch.randn(n, n, **f64)
    A = 0.95 * A / torch.linalg.eigvals(A).abs().max()
    B, K = 0.5 * torch.randn(n, m, **f64), -0.1 * torch.randn(m, n, **f64)
    Q, R, M = torch.eye(n, dtype=torch.float64), 0.1 * torch.eye(m, dtype=torch.float64), A + B @ K
    P = [Q]
    for _ in range(t):
        P.insert(0, Q + K.T @ R @ K + M.T @ P[0] @ M)
    return [x.to(dtype) for x in (M, B, K, Q, R, torch.stack(P))]


@pytest.mark.parametrize("start", [0, 5, 15])
def test_linear_quadratic_costate(backend, start):
    """The mean of the costate over an antithetic pair (eps, -eps) is the value gradient 2 P_t s:
    exactly, since costates are affine in the noise."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    M, B, K, Q, R, P = linear_quadratic(dtype)
    steps, pairs, sigma = 16 - start, 4, 0.3
    s = torch.tensor([1.0, -0.5, 0.8], dtype=dtype) + torch.arange(pairs)[:, None] / 4
    eps = noise(pairs, steps).normal(2, dtype)
    eps, s = torch.cat([eps, -eps]), torch.cat([s, s])
    jacobian = M.expand(2 * pairs, steps, 3, 3)
    at = noise(2 * pairs, steps)
    states = vgkern.linear_rollout(jacobian, sigma * eps @ B.T, 0.0, s, at, backend=backend)
    actions = states[:, :-1] @ K.T + sigma * eps
    local = 2 * states[:, :-1] @ Q + 2 * actions @ R @ K
    costates = vgkern.costate_scan(jacobian, local, 2 * states[:, -1] @ Q, backend=backend)
    got = costates[:, 0].unflatten(0, (2, pairs)).mean(0)
    want = 2 * s[:pairs] @ P[start]
    assert float((got - want).norm() / want.norm()) < tolerance
    assert float((costates[0, 0] - want[0]).norm() / want.norm()) > 1e-3  # a single path is not it


def test_noise_is_that_of_the_address(backend):
    at = noise(3, 6)
    zero = torch.zeros(3, 6, 5)
    states = vgkern.linear_rollout(zero, zero, 2.0, zero[:, 0], at, backend=backend)
    torch.testing.assert_close(states[:, 1:], 2 * at.normal(5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [5, 70])
def test_same_bits_alone_and_for_any_threads(backend, n, threads):
    x = system(b=5, n=n, dtype=torch.float32)
    at = noise(5, 6)

    def both(a, b, sigma, s, at):
        out = vgkern.linear_rollout(a, b, sigma, s, at, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), (a, b, s))

    threads(2)
    whole = both(*x, at)
    threads(1)
    assert all(torch.equal(p, q) for p, q in zip(whole, both(*x, at), strict=True))
    a, b, sigma, s = (v.detach().requires_grad_() for v in x)
    one = [v[3:4].detach().requires_grad_() for v in (a, b, s)]
    part = both(one[0], one[1], sigma, one[2], vgkern.Noise(5, at.sequence[3:4], at.position))
    assert all(torch.equal(p[3:4], q) for p, q in zip(whole, part, strict=True))


def test_only_what_is_needed(backend):
    for needed in range(4):
        x = [v.detach() for v in system(dtype=torch.float32)]
        x[needed].requires_grad_()
        vgkern.linear_rollout(*x, noise(3, 6), backend=backend).sum().backward()
        assert [v.grad is not None for v in x] == [i == needed for i in range(4)]


f = torch.ones
GOOD = {"jacobian": f(3, 6, 4), "drift": f(4), "sigma": 0.1, "initial": f(3, 4),
        "noise": noise(3, 6)}  # fmt: skip
BAD = {
    "jacobian": ({"jacobian": f(3, 6, 4, 3)}, ValueError, "jacobian", "[B, T, n, n]"),
    "drift": ({"drift": f(5)}, ValueError, "drift", "[5]", "[3, 6, 4]"),
    "initial": ({"initial": f(2, 4)}, ValueError, "initial", "[2, 4]", "[3, 4]"),
    "sigma negative": ({"sigma": -0.1}, ValueError, "sigma", "-0.1", ">= 0"),
    "sigma inf": ({"sigma": float("inf")}, ValueError, "sigma", "inf"),
    "sigma tensor": ({"sigma": torch.tensor([1, 1, -2.0, 1])}, ValueError, "sigma", "-2.0 at [2]"),
    "sigma nan": ({"sigma": f(4) * torch.nan}, ValueError, "sigma", "nan at [0]"),
    "sigma text": ({"sigma": "1"}, ValueError, "sigma: got 1"),
    "sigma shape": ({"sigma": f(3)}, ValueError, "sigma", "[3]", "[3, 6, 4]"),
    "dtypes": ({"drift": f(4).bfloat16()}, TypeError, "drift", "bfloat16", "jacobian"),
    "device": ({"initial": f(3, 4, device="meta")}, ValueError, "initial", "meta"),
    "noise rows": ({"noise": noise(3, 5)}, ValueError, "noise", "[3, 6]"),
    "noise int": ({"noise": 3}, TypeError, "noise", "vgkern.Noise"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, *words = BAD[name]
    with pytest.raises(error) as e:
        vgkern.linear_rollout(**{**GOOD, **change})
    assert all(w in str(e.value) for w in words), e.value
