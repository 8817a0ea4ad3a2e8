"""What is special to token_logprobs: layouts, infinities, any vocabulary size, properties."""

import math

import conftest
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vgkern

BACKENDS = conftest.BACKENDS
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip


def logits(n, v, seed=0, scale=2.5):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, v, generator=g), torch.randint(v, (n,), generator=g)


def layouts(z):
    """R2, R9: the same values under other strides and storage offsets."""
    n, v = z.shape
    wide = torch.full((n, 3 * v), torch.nan)
    wide[:, v : 2 * v] = z
    steps = torch.full((n, 2 * v), torch.nan)
    steps[:, ::2] = z
    tall = torch.full((4 * n, v), torch.nan)
    tall[3::4] = z
    far = torch.full((n * 7, 11, v), torch.nan)
    far[::7, 5] = z
    return {
        "transposed": z.T.contiguous().T,
        "wide": wide[:, v : 2 * v],
        "column steps": steps[:, ::2],
        "row steps": tall[3::4],
        "slice of 3-d": far[::7, 5],
        "storage offset": torch.cat([torch.full((17,), torch.nan), z.flatten()])[17:].view(n, v),
        "flipped twice": z.flip(0).flip(0),
        "3-d": z.view(1, n, v),
    }


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(4, 3))))
def test_layout_changes_nothing(layout, backend):
    z, y = logits(6, 101)
    want = vgkern.token_logprobs(z, y, backend=backend)
    x = layouts(z)[layout].requires_grad_()
    got = vgkern.token_logprobs(x, y.view(x.shape[:-1]), backend=backend)
    assert torch.equal(got.logp.flatten(), want.logp)
    assert torch.equal(got.entropy.flatten(), want.entropy)
    (g,) = torch.autograd.grad(got.logp.sum() + got.entropy.sum(), x)
    plain = z.clone().requires_grad_()
    out = vgkern.token_logprobs(plain, y, backend=backend)
    (want,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), plain)
    torch.testing.assert_close(g.reshape(want.shape), want, rtol=1e-6, atol=1e-7)


def test_expanded_logits_and_gradients(backend):
    """Zero strides: one row under eight targets; .sum() sends an expanded gradient back."""
    z, _ = logits(1, 33)
    leaf = z.clone().requires_grad_()
    out = vgkern.token_logprobs(leaf.expand(8, 33), torch.arange(8), backend=backend)
    (g,) = torch.autograd.grad(out.logp.sum(), leaf)
    p = z[0].softmax(-1)
    want = -8 * p
    want[:8] += 1
    torch.testing.assert_close(g[0], want, rtol=1e-5, atol=1e-6)


def test_rows_do_not_see_each_other(backend):
    """R3, R18: inf in one row, another batch, another order: every other row is bit-equal (in the
    reference, whose torch reductions depend on alignment, to the last bits)."""

    def same(a, b):
        if backend == "torch":
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            return True
        return torch.equal(a, b)

    z, y = logits(40, 1000)
    whole = vgkern.token_logprobs(z, y, backend=backend)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    mixed = vgkern.token_logprobs(z[order], y[order], backend=backend)
    assert same(mixed.logp, whole.logp[order])
    spoiled = z.clone()
    spoiled[7, 3] = -torch.inf
    spoiled[7, 4] = 3e38
    out = vgkern.token_logprobs(spoiled, y, backend=backend)
    others = torch.arange(40) != 7
    assert same(out.logp[others], whole.logp[others])
    assert same(out.entropy[others], whole.entropy[others])
    for i in (0, 13, 39):
        one = vgkern.token_logprobs(z[i : i + 1], y[i : i + 1], backend=backend)
        assert same(one.logp[0], whole.logp[i])
        assert same(one.entropy[0], whole.entropy[i])


def test_nan_names_its_row_and_ignored_rows_may_hold_it(backend):
    z, y = logits(5, 33)
    z[3, 8] = torch.nan
    with pytest.raises(vgkern.NonFiniteError, match=r"NaN at row \[3\]"):
        vgkern.token_logprobs(z, y, backend=backend)
    y[3] = -100
    z.requires_grad_()
    out = vgkern.token_logprobs(z, y, backend=backend)
    assert out.logp.isfinite().all() and out.entropy.isfinite().all()
    (g,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), z)
    assert g.isfinite().all() and (g[3] == 0).all()


def test_blocked_rows(backend):
    """R4, R5: blocked ids get exactly 0; a blocked target has logp -inf and no gradient."""
    z, y = logits(4, 50)
    z[:, ::2] = -torch.inf
    y[:] = torch.tensor([1, 2, 3, 5])  # row 1: its target is blocked
    z[2] = -torch.inf  # row 2: everything is
    z.requires_grad_()
    out = vgkern.token_logprobs(z, y, backend=backend)
    assert (out.logp == -torch.inf).tolist() == [False, True, True, False]
    assert out.entropy[[0, 1, 3]].isfinite().all()
    (g,) = torch.autograd.grad(out.logp[[0, 3]].sum() + out.entropy[[0, 1, 3]].sum(), z)
    assert g.isfinite().all() and (g[:, ::2] == 0).all() and (g[2] == 0).all()
    (g,) = torch.autograd.grad(
        vgkern.token_logprobs(z, y, backend=backend).logp.clamp(min=-99).sum(), z
    )
    assert g.isfinite().all() and (g[1] == 0).all()


@pytest.mark.parametrize("v", [1, 2, 3, 31, 33, 1000, 32_000, 50_257])
def test_vocabulary_sizes(v, backend):
    """R16: uniform logits have logp = -log V and entropy = log V."""
    z = torch.full((2, v), 3.0, requires_grad=True)
    out = vgkern.token_logprobs(z, torch.tensor([0, v - 1]), backend=backend)
    torch.testing.assert_close(out.logp, torch.full((2,), -math.log(v)), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(out.entropy, torch.full((2,), math.log(v)), rtol=1e-5, atol=1e-5)
    (g,) = torch.autograd.grad(out.logp.sum(), z)
    assert float(g.detach().double().sum().abs()) < 1e-5


@pytest.mark.parametrize("shift", [3e4, -3e4, 1e30])
def test_large_logits_cancel(shift, backend):
    """R17: logits of 3e4 and beyond; exact relative to what fp32 keeps of their differences."""
    z = (shift + 8.0 * torch.arange(9.0).view(1, 9)).requires_grad_()
    y = torch.tensor([8])
    out = vgkern.token_logprobs(z, y, backend=backend)
    exact = torch.log_softmax(z.detach().double(), -1)
    torch.testing.assert_close(out.logp.double(), exact[:, 8], rtol=1e-5, atol=1e-9)
    (g,) = torch.autograd.grad(out.logp.sum(), z)
    assert g.isfinite().all()


def test_offsets_beyond_int32():
    """R1: a view whose row offsets pass 2^31 elements, over memory that is never touched."""
    conftest.skip_unless_runs("cpu")
    v, stride = 33, 2**30
    try:
        base = torch.UntypedStorage(4 * (3 * stride + v))  # virtual: pages come on first touch
    except RuntimeError:
        pytest.skip("no 12 GiB of address space")
    z = torch.empty(0).set_(base, 0, (4, v), (stride, 1))
    data, y = logits(4, v)
    z.copy_(data)
    got = vgkern.token_logprobs(z, y, backend="cpu")
    want = vgkern.token_logprobs(data, y, backend="cpu")
    assert torch.equal(got.logp, want.logp)


@pytest.mark.parametrize("count", [1, 2])
def test_repeats_are_bit_equal_at_any_thread_count(count, threads, backend):
    """R18."""
    z, y = logits(257, 1035)
    threads(1)
    want = run(z, y, backend)
    threads(count)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(z, y, backend), want, strict=True))


def run(z, y, backend):
    z = z.clone().requires_grad_()
    out = vgkern.token_logprobs(z, y, temperature=0.8, backend=backend)
    (g,) = torch.autograd.grad(out.logp.sum() + out.entropy.square().sum(), z)
    return out.logp.detach(), out.entropy.detach(), g


def test_second_derivative_is_right_or_raises(backend):
    """R15."""
    z, y = logits(3, 7)
    z = z.requires_grad_()
    out = vgkern.token_logprobs(z, y, backend=backend)
    (g,) = torch.autograd.grad(out.logp.sum(), z, create_graph=True)
    if backend == "torch":
        (h,) = torch.autograd.grad(g[:, 0].sum(), z)
        p = z.detach().softmax(-1)
        want = p[:, :1] * p
        want[:, 0] -= p[:, 0]
        torch.testing.assert_close(h, want, rtol=1e-4, atol=1e-6)
    else:
        with pytest.raises(RuntimeError):
            torch.autograd.grad(g[:, 0].sum(), z)


def test_gradcheck_fp64():
    z, y = logits(3, 6)
    z = z.double().requires_grad_()
    y[1] = -100
    for kw in ({}, {"temperature": 0.6}, {"softcap": 3.0, "temperature": 1.5}):
        assert torch.autograd.gradcheck(
            lambda t, kw=kw: tuple(vgkern.token_logprobs(t, y, **kw)), (z,)
        )


# Properties ------------------------------------------------------------------------------------

rows = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)


def evaluate(z, t, backend):
    z = torch.tensor([z], dtype=torch.float32, requires_grad=True)
    out = vgkern.token_logprobs(z, torch.tensor([t]), backend=backend)
    (g,) = torch.autograd.grad(out.logp.sum() + 0.5 * out.entropy.sum(), z)
    return float(out.logp.detach()), float(out.entropy.detach()), g[0]


@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(z=rows, pick=st.integers(0, 10**6), shift=st.integers(-64, 64))
def test_shift_invariance(backend, z, pick, shift):
    """And the gradient of a row sums to 0."""
    t = pick % len(z)
    a, b = evaluate(z, t, backend), evaluate([x + shift for x in z], t, backend)
    assert a[0] == pytest.approx(b[0], rel=1e-4, abs=5e-5)
    assert a[1] == pytest.approx(b[1], rel=1e-3, abs=5e-4)
    torch.testing.assert_close(a[2], b[2], rtol=1e-3, atol=1e-4)
    assert abs(float(a[2].double().sum())) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(z=rows, pick=st.integers(0, 10**6), seed=st.integers(0, 999))
def test_permuting_the_vocabulary(backend, z, pick, seed):
    t = pick % len(z)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    a = evaluate(z, t, backend)
    b = evaluate([z[i] for i in order], int((order == t).nonzero()), backend)
    assert a[0] == pytest.approx(b[0], rel=1e-5, abs=1e-5)
    assert a[1] == pytest.approx(b[1], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(a[2][order], b[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(z=rows, pick=st.integers(0, 10**6))
def test_bounds(backend, z, pick):
    """logp <= 0 and entropy in [0, log V]."""
    logp, entropy, _ = evaluate(z, pick % len(z), backend)
    assert logp <= 0
    assert -1e-6 <= entropy <= math.log(len(z)) + 1e-5
