"""sparse_tol: the gradients stay within the tolerance, and the error that is told is the error."""

import pytest
import torch

import vgkern
from vgkern import case_inputs

N, H, V = 320, 48, 3000


def batch(sharp=2.5, dtype=torch.float32, seed=0):
    """Rows whose likely ids differ, over a tail that they share, as a language model's do."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(H, generator=g)
    w = torch.randn(V, H, generator=g) / H**0.5
    w = w - 1.2 * torch.rand(V, 1, generator=g).sqrt() * common / H**0.5  # a frequency of its own
    h = sharp * torch.randn(N, H, generator=g) + 3 * common
    y = vgkern.linear_sample(h, w, vgkern.Noise(seed, torch.arange(N), torch.tensor(0))).token
    a = torch.randn(N, generator=g)
    return h.to(dtype), w.to(dtype), y, a


def gradients(h, w, y, a, **k):
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    out = vgkern.linear_policy_loss(h, w, y, a, objective="reinforce", backend="cpu", **k)
    return out, *torch.autograd.grad(out.loss, (h, w))


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(autouse=True)
def cpu():
    from conftest import skip_unless_runs

    skip_unless_runs("cpu")


@pytest.mark.parametrize("tol", [2e-2, 5e-3, 2e-3])
def test_the_error_is_within_the_tolerance_and_told(tol):
    ratios = []
    for seed in range(4):
        x = batch(seed=seed)
        dense, dh, dw = gradients(*x)
        sparse, sh, sw = gradients(*x, sparse_tol=tol)
        m = {k: float(v) for k, v in sparse.metrics.items()}
        assert torch.equal(sparse.loss, dense.loss)
        for got, want, name in ((sh, dh, "dh"), (sw, dw, "dw")):
            true = error(got, want)
            assert 0 < true < 1.3 * tol and 0 < m[f"sparse_columns_{name}"] <= 0.5
            ratios.append(m[f"sparse_error_{name}"] / true)
            assert 0.6 < ratios[-1] < 1.6
    assert 0.85 < sum(ratios) / len(ratios) < 1.15


def test_fewer_columns_where_few_carry_the_gradient():
    """Answers of a small part of the vocabulary, as after RL on a task."""
    h, w, y, a = batch()
    bias = torch.full((V,), -15.0)
    bias[:40] = 0
    y = y % 40
    few = gradients(h, w, y, a, sparse_tol=5e-3, bias=bias)[0].metrics
    many = gradients(h, w, y, a, sparse_tol=5e-3)[0].metrics
    assert float(few["sparse_columns_dh"]) < 0.5 * float(many["sparse_columns_dh"])


def test_flat_rows_are_multiplied_in_full():
    """Where no half of the columns will do: the dense gradients, and an error of 0."""
    h, w, y, a = batch()
    out, dh, dw = gradients(0.01 * h, w, y, a, sparse_tol=1e-3)
    want = gradients(0.01 * h, w, y, a)
    assert error(dh, want[1]) < 1e-6 and error(dw, want[2]) < 1e-6
    m = out.metrics
    assert float(m["sparse_columns_dh"]) == 1 and float(m["sparse_error_dh"]) == 0


def test_what_a_tail_adds_up_to_is_not_forgotten():
    """Of rows with equal tails the dropped columns add up: the rank-one term carries them."""
    h, w, y, a = batch(sharp=0.6)
    a = a.abs() + 0.1
    _, dh, _ = gradients(h, w, y, a)
    out, sh, _ = gradients(h, w, y, a, sparse_tol=1e-2)
    assert error(sh, dh) < 1.3e-2 and float(out.metrics["sparse_columns_dh"]) < 0.5
    p = (h @ w.T).softmax(-1)
    kept = (
        p.square()
        .sum(0)
        .sort(descending=True)
        .indices[: int(float(out.metrics["sparse_columns_dh"]) * V)]
    )
    dz = -a[:, None] * p
    dz[torch.arange(N), y] += a
    plain = dz[:, kept] @ w[kept]
    assert error(plain, dz @ w) > 2 * error(sh, dh)  # the same columns without it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = batch(dtype=dtype)
    _, dh, dw = gradients(*x)
    out, sh, sw = gradients(*x, sparse_tol=5e-3)
    rounding = torch.finfo(dtype).eps
    assert sh.dtype == sw.dtype == dtype
    assert error(sh, dh) < 5e-3 + rounding and error(sw, dw) < 5e-3 + rounding
    assert float(out.metrics["sparse_columns_dw"]) <= 0.5


def test_everything_else_stays_exact_and_goes_together():
    """Bias, mask, entropy, a factor on the loss, a costate, several chunks, a second backward."""
    h, w, y, a = batch()
    h, y, a = (torch.cat([t] * 5) for t in (h, y, a))
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))
    value = case_inputs.head((len(h), 1), H, V, torch.float32, 2)[0]["hidden"][:, 0] * 1e-3
    given = dict(
        bias=bias, mask=torch.arange(len(h)) % 3 != 1, temperature=0.9, softcap=20.0,
        objective=vgkern.objectives.BNPO.replace(entropy_coef=0.01),
        costate=vgkern.Costate(value, w), backend="cpu",
    )  # fmt: skip

    def run(**k):
        xs = [t.clone().requires_grad_() for t in (h, w, bias)]
        out = vgkern.linear_policy_loss(xs[0], xs[1], y, a, **{**given, "bias": xs[2]}, **k)
        first = torch.autograd.grad(out.loss, xs, torch.tensor(-3.0), retain_graph=True)
        return out, first, torch.autograd.grad(out.loss, xs, torch.tensor(-3.0))

    dense, want, _ = run()
    sparse, got, again = run(sparse_tol=5e-3)
    for k, v in dense.metrics.items():
        assert torch.equal(v, sparse.metrics[k])
    assert error(got[0], want[0]) < 6.5e-3 and error(got[1], want[1]) < 6.5e-3
    assert error(got[2], want[2]) < 1e-6
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    dead = ~given["mask"]
    assert not got[0][dead].any()


def test_one_gradient_alone():
    h, w, y, a = batch()
    _, dh, dw = gradients(h, w, y, a, sparse_tol=5e-3)
    x = h.clone().requires_grad_()
    out = vgkern.linear_policy_loss(x, w, y, a, objective="reinforce", sparse_tol=5e-3)
    assert error(torch.autograd.grad(out.loss, x)[0], dh) < 1e-6  # LoRA: a frozen head
    assert float(out.metrics["sparse_columns_dw"]) == float(out.metrics["sparse_error_dw"]) == 0
    x = w.clone().requires_grad_()
    out = vgkern.linear_policy_loss(h, x, y, a, objective="reinforce", sparse_tol=5e-3)
    assert error(torch.autograd.grad(out.loss, x)[0], dw) < 1e-2
    with torch.no_grad():
        out = vgkern.linear_policy_loss(h, w, y, a, objective="reinforce", sparse_tol=5e-3)
    assert float(out.metrics["sparse_columns_dh"]) == 0


def test_same_bits_on_repeat(threads):
    x = batch()
    one = gradients(*x, sparse_tol=5e-3)
    threads(1)
    two = gradients(*x, sparse_tol=5e-3)
    assert torch.equal(one[1], two[1]) and torch.equal(one[2], two[2])


def test_the_torch_backend_leaves_nothing_out():
    h, w, y, a = batch()
    out = vgkern.linear_policy_loss(h, w, y, a, objective="bnpo", sparse_tol=1e-2, backend="torch")
    assert float(out.metrics["sparse_columns_dh"]) == 1
    assert float(out.metrics["sparse_error_dw"]) == 0


@pytest.mark.parametrize("tol", [0, -1e-3, 1.0, float("nan"), True, "small"])
def test_bad_tolerances(tol):
    h, w, y, a = batch()
    with pytest.raises(ValueError, match="sparse_tol: got"):
        vgkern.linear_policy_loss(h, w, y, a, objective="bnpo", sparse_tol=tol)


def test_refused_where_products_are_dense():
    h, w, y, a = batch()
    rows = (h.view(8, 40, H), w, y.view(8, 40), a[:8])
    with pytest.raises(NotImplementedError, match="sparse_tol: an objective of whole sequences"):
        vgkern.linear_policy_loss(*rows, objective="gspo", sparse_tol=1e-2, backend="cpu")


def test_nan_is_refused_as_ever():
    h, w, y, a = batch()
    h[3, 4] = torch.nan
    with pytest.raises(vgkern.NonFiniteError, match="hidden"):
        vgkern.linear_policy_loss(h, w.requires_grad_(), y, a, objective="bnpo", sparse_tol=1e-2)
