"""What is special to costate_scan: it is the adjoint of a rollout; ends of episodes; replays."""

import pytest
import torch

import vgkern


def system(b=3, t=6, n=4, diagonal=False, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    a = 0.5 * torch.randn((b, t, n) if diagonal else (b, t, n, n), generator=g)
    x = [a, torch.randn(b, t, n, generator=g), torch.randn(b, n, generator=g)]
    return [v.to(dtype).requires_grad_() for v in x]


def test_is_the_gradient_of_a_return():
    """Against autograd through an explicit nonlinear rollout with a discounted return."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4, 4, generator=g, dtype=torch.float64) / 2
    s = torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    states, total = [s], 0.0
    for t in range(6):
        total = total + 0.9**t * states[-1].square().sum()
        states.append(torch.tanh(states[-1] @ w.T))
    total = total + 0.9**6 * states[-1].sum()
    truth = torch.autograd.grad(total, states)
    with torch.no_grad():
        slope = torch.stack([1 - x**2 for x in states[1:]], 1)
        jacobian = slope[..., None] * w
        local = torch.stack([2 * x for x in states[:-1]], 1)
        got = vgkern.costate_scan(jacobian, local, torch.ones_like(s), gamma=0.9)
    want = torch.stack([d / 0.9**t for t, d in enumerate(truth)], 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
def test_gradcheck(diagonal):
    done = torch.zeros(3, 6, dtype=torch.bool)
    done[1, 2] = True
    assert torch.autograd.gradcheck(
        lambda *x: vgkern.costate_scan(*x, gamma=0.9, done=done), system(diagonal=diagonal)
    )


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("n", [4, 70])
def test_nothing_crosses_the_end_of_an_episode(backend, diagonal, n):
    """Jacobians there may be NaN, and so may the costate beyond; their gradient is exactly 0."""
    a, g, x = system(n=n, diagonal=diagonal, dtype=torch.float32)
    done = torch.zeros(3, 6, dtype=torch.bool)
    done[:, 2] = True
    with torch.no_grad():
        a[:, 2] = torch.nan
        g[0, 4] = torch.nan
    out = vgkern.costate_scan(a, g, x, gamma=0.9, done=done, backend=backend)
    assert torch.equal(out[:, 2], g[:, 2]) and out[:, :3].isfinite().all()
    assert out[0, 4].isnan().all() and out[1:].isfinite().all()
    da, dg, dx = torch.autograd.grad(out[:, :3].sum(), (a, g, x))
    assert (
        (da[:, 2] == 0).all()
        and (da[1:, 2:] == 0).all()
        and (dg[:, 3:] == 0).all()
        and (dx == 0).all()
    )
    assert da[:, :2].isfinite().all() and da[:, :2].any()


@pytest.mark.parametrize("diagonal", [False, True])
def test_same_bits_alone_and_for_any_threads(backend, diagonal, threads):
    x = system(b=5, n=33, diagonal=diagonal, dtype=torch.float32)

    def both(x):
        out = vgkern.costate_scan(*x, gamma=0.9, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), x)

    threads(2)
    whole = both(x)
    threads(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, both(x), strict=True))
    part = both([v[3:4].detach().requires_grad_() for v in x])
    assert all(torch.equal(a[3:4], b) for a, b in zip(whole, part, strict=True))


def test_only_what_is_needed(backend):
    for needed in range(3):
        x = [v.detach() for v in system(dtype=torch.float32)]
        x[needed].requires_grad_()
        vgkern.costate_scan(*x, backend=backend).sum().backward()
        assert [v.grad is not None for v in x] == [i == needed for i in range(3)]
    assert not vgkern.costate_scan(*(v.detach() for v in x), backend=backend).requires_grad


def test_one_matrix_for_all_steps(backend):
    """An expanded Jacobian is read in place; its gradient is the sum."""
    _, g, x = system(dtype=torch.float32)
    w = (torch.randn(4, 4, generator=torch.Generator().manual_seed(4)) / 2).requires_grad_()
    out = vgkern.costate_scan(w.expand(3, 6, 4, 4), g, x, backend=backend)
    (d,) = torch.autograd.grad(out.sum(), w)
    ref = vgkern.costate_scan(w.expand(3, 6, 4, 4).clone(), g, x, backend="torch")
    (want,) = torch.autograd.grad(ref.sum(), w)
    torch.testing.assert_close(out, ref)
    torch.testing.assert_close(d, want, rtol=1e-5, atol=1e-5)


def test_second_order_is_refused_with_advice(backend):
    if backend == "torch":
        pytest.skip("the reference differentiates twice")
    x = system(dtype=torch.float32)
    out = vgkern.costate_scan(*x, backend=backend)
    (d,) = torch.autograd.grad(out.square().sum(), x[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='torch'"):
        d.sum().backward()


f = torch.ones
A, G, X = f(3, 6, 4, 4), f(3, 6, 4), f(3, 4)
BAD = {
    "not square": (f(3, 6, 4, 5), G, X, {}, ValueError, "jacobian", "[B, T, n, n]"),
    "flat": (f(6, 4), G, X, {}, ValueError, "jacobian", "[6, 4]"),
    "no state": (f(3, 6, 0), f(3, 6, 0), f(3, 0), {}, ValueError, "jacobian", "n >= 1"),
    "do not chain": (A, f(3, 5, 4), X, {}, ValueError, "local_grad", "[3, 5, 4]", "[3, 6, 4]"),
    "terminal": (A, G, f(3, 5), {}, ValueError, "terminal", "[3, 5]", "[3, 4]"),
    "dtypes": (A, G, X.half(), {}, TypeError, "terminal", "float16", "jacobian"),
    "device": (A, G, X.to("meta"), {}, ValueError, "terminal", "meta"),
    "done float": (A, G, X, {"done": f(3, 6)}, TypeError, "done", "float32", "bool"),
    "done shape": (A, G, X, {"done": f(3, 5).bool()}, ValueError, "done", "[3, 5]", "[3, 6]"),
    "gamma 99": (A, G, X, {"gamma": 99}, ValueError, "gamma", "99", "<= 1"),
    "gamma nan": (A, G, X, {"gamma": float("nan")}, ValueError, "gamma", "nan"),
    "gamma bool": (A, G, X, {"gamma": True}, ValueError, "gamma", "True"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    a, g, x, options, error, *words = BAD[name]
    with pytest.raises(error) as e:
        vgkern.costate_scan(a, g, x, **options)
    assert all(w in str(e.value) for w in words), e.value
