"""The score of a truncated distribution: the sampler's numbers, the kept set, gradients."""

import itertools

import pytest
import torch
from conftest import INTERPRETED
from eager.logprobs import kept
from oracle import measure

import vgkern
from vgkern import case_inputs
from vgkern.ops import _truncate, linear_token_logprobs
from vgkern.ops._library import operators

# none, one of each kind, and all; every subset of the cuts times every kind of temperature
CUTS = [
    {k: v for k, v in zip(("top_k", "top_p", "min_p"), values, strict=True) if v is not None}
    for values in itertools.product((None, 40), (None, 0.9), (None, 0.02))
]
if INTERPRETED:
    CUTS = [CUTS[0], CUTS[2], CUTS[7]]
N = 4 if INTERPRETED else 70  # more than one block of 64 rows


def model(n=N, h=32, v=1035, dtype=torch.float32, seed=0, **kw):
    x, _, _ = case_inputs.head((n,), h, v, dtype, seed, **kw)
    return x


def per_row(n=N):
    return torch.tensor([1.0, 0.0, 0.5, 1.75, 0.7]).repeat(n)[:n]


def noise(n=N):
    return vgkern.Noise(3, torch.arange(n), torch.tensor(5))


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("temperature", ["rows"] if INTERPRETED else ["rows", 0.7, 0.0])
def test_the_score_of_a_sample_is_its_logp_to_the_bit(backend, cut, temperature):
    x = model(bias="blocked", softcap=8.0)
    x.pop("targets")
    if temperature == "rows":
        temperature = per_row()
    elif temperature and not cut:  # the op without truncation, which has sums of its own
        temperature = torch.full((N,), temperature)
    options = {**x, **cut, "temperature": temperature, "backend": backend}
    out = vgkern.linear_sample(noise=noise(), **options)
    again = vgkern.linear_token_logprobs(targets=out.token, **options)
    assert out.logp.isfinite().all()
    assert torch.equal(again.logp, out.logp) and torch.equal(again.entropy, out.entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1035] if INTERPRETED else [1035, 9001])  # one tile, and several
def test_the_score_of_a_sample_other_dtypes_and_tiles(backend, dtype, v):
    x = model(v=v, dtype=dtype, peaked=True)
    x.pop("targets")
    for cut in CUTS[-1], {}:
        options = {**x, **cut, "temperature": per_row(), "backend": backend}
        out = vgkern.linear_sample(noise=noise(), **options)
        again = vgkern.linear_token_logprobs(targets=out.token, **options)
        assert torch.equal(again.logp, out.logp) and torch.equal(again.entropy, out.entropy)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_equals_the_usual_recipe(backend, cut):
    """Processed logits: mask what the warpers drop, then log_softmax."""
    x, t = model(), per_row().clamp(min=0.25)
    got = vgkern.linear_token_logprobs(**x, **cut, temperature=t, backend=backend)
    z = (x["hidden"].double() @ x["weight"].double().T) / t.double()[:, None]
    for row in z:
        row[~torch.isin(torch.arange(1035), kept(row, **cut))] = -torch.inf
    lp = z.log_softmax(-1)
    want = lp.gather(-1, x["targets"][:, None])[:, 0]
    torch.testing.assert_close(got.logp.double(), want, rtol=1e-5, atol=1e-5)
    entropy = -(lp.exp() * lp.clamp(min=-1e300)).sum(-1)
    torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


def test_ties_keep_the_lowest_ids(backend):
    h, w = torch.ones(8, 1), torch.zeros(8, 1)
    out = vgkern.linear_token_logprobs(h, w, torch.arange(8), top_k=3, backend=backend)
    assert out.logp[:3].isfinite().all() and (out.logp[3:] == -torch.inf).all()
    torch.testing.assert_close(out.entropy, torch.full((8,), 3.0).log())
    out = vgkern.linear_token_logprobs(h, w, torch.arange(8), top_p=0.25, backend=backend)
    assert (out.logp > -torch.inf).tolist() == [True] * 2 + [False] * 6
    out = vgkern.linear_token_logprobs(h, w, torch.arange(8), temperature=0.0, min_p=0.5,
                                       backend=backend)  # fmt: skip
    assert out.logp.tolist() == [0.0] + [-torch.inf] * 7 and (out.entropy == 0).all()


def test_the_cut_keeps_what_a_full_sort_keeps(backend):
    """Sizes around the group maxima and the partial sorts; ties across the edge of the cut."""
    g = torch.Generator().manual_seed(0)
    sizes, most = ((1, 5, 64, 2003), (None, 1, 7, 300, 1900))
    if INTERPRETED:
        sizes, most = (603,), (None, 590)
    for v, top_k, top_p, min_p in itertools.product(
        sizes, most, (None, 0.3, 0.999999), (None, 1e-3)
    ):
        z = (torch.randn(3, v, generator=g) * 4).mul(8).round() / 8
        cut = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        if top_k is top_p is min_p is None:
            continue
        y = torch.randint(v, (3,), generator=g)
        y[0] = kept(z[0].double(), **cut)[-1]
        h = torch.eye(3)
        got = vgkern.linear_token_logprobs(h, z.T.contiguous(), y, **cut, backend=backend).entropy
        want = vgkern.linear_token_logprobs(
            h.double(), z.T.double(), y, **cut, backend="torch"
        ).entropy
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


# of each kind one that cuts nothing, beside cuts of every size
PER_ROW = {
    "top_k": torch.tensor([5, 0, 40, 2000, 1, 300]),
    "top_p": torch.tensor([0.9, 0.3, 1.0, 0.9999, 0.5, 1.0]),
    "min_p": torch.tensor([0.02, 0.0, 0.3, 0.0, 0.5, 1e-4]),
    "temperature": torch.tensor([1.0, 0.5, 0.7, 1.5, 0.0, 2.0]),
}


@pytest.mark.parametrize("names", [
    ("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p"), tuple(PER_ROW)
], ids="-".join)  # fmt: skip
def test_options_of_each_row(names, backend):
    """A row with options of its own is the row of a call with its numbers, bit for bit, in sampler
    and scorer; and within rounding what the usual recipe gives in fp64."""
    n = len(PER_ROW["top_k"])
    x = model(n=n, bias="blocked")
    given = {k: PER_ROW[k] for k in names}
    y, h, w = x.pop("targets"), x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    z = (h.double() @ w.double().T + x["bias"].double()).detach()
    y[::2] = z.argmax(-1)[::2]  # kept, whatever is cut
    drawn = vgkern.linear_sample(**x, **given, noise=noise(n), backend=backend)
    out = vgkern.linear_token_logprobs(**x, targets=y, **given, backend=backend)
    again = vgkern.linear_token_logprobs(**x, targets=drawn.token, **given, backend=backend)
    assert torch.equal(again.logp, drawn.logp) and torch.equal(again.entropy, drawn.entropy)
    up = torch.arange(1.0, n + 1)
    (dh,) = torch.autograd.grad((out.logp.clamp(min=-1e4) * up + out.entropy).sum(), h)
    for i in range(n):
        one = {k: float(v[i]) for k, v in given.items()}
        k = int(one.pop("top_k", 0))
        numbers = {"top_k": k or None, **one, "backend": backend}
        row = {**x, "hidden": x["hidden"][i : i + 1]}
        at = vgkern.Noise(3, torch.tensor([i]), torch.tensor(5))
        alone = vgkern.linear_sample(**row, noise=at, **numbers)
        assert torch.equal(alone.token, drawn.token[i : i + 1]), i
        assert_row(
            backend, (alone.logp, alone.entropy), (drawn.logp[i : i + 1], drawn.entropy[i : i + 1])
        )
        scored = vgkern.linear_token_logprobs(**row, targets=y[i : i + 1], **numbers)
        if one.get("temperature") or k or "min_p" in one or "top_p" in one:
            assert_row(backend, scored, (out.logp[i : i + 1], out.entropy[i : i + 1]))
        total = scored.logp.clamp(min=-1e4).sum() * up[i] + scored.entropy.sum()
        (da,) = torch.autograd.grad(total, row["hidden"])
        torch.testing.assert_close(da[0], dh[i], rtol=1e-4, atol=1e-5)
        t = one.get("temperature", 1.0)
        keep = kept(z[i] / (t or 1), k or None, one.get("top_p"), one.get("min_p"))
        keep = keep if t else keep[:1]
        lp = (z[i] / (t or 1)).masked_fill(~torch.isin(torch.arange(1035), keep), -torch.inf)
        lp = lp.log_softmax(-1)
        torch.testing.assert_close(out.logp[i].double(), lp[y[i]], rtol=1e-5, atol=1e-5)
        entropy = -(lp.exp() * lp.clamp(min=-1e300)).sum()
        torch.testing.assert_close(out.entropy[i].double(), entropy, rtol=1e-5, atol=1e-5)
        assert int(drawn.token[i]) in keep.tolist()


def assert_row(backend, got, want):
    """The bits, but where a product of one row is not that of many: a vendor's on a CPU."""
    exact = {} if backend == "torch" else {"rtol": 0, "atol": 2e-6}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **exact)


def test_values_of_rows_are_looked_at():
    x = model(n=3)
    for name, rows, said in (
        ("top_k", [1, -2, 3], "-2 at \\[1\\]; allowed: integers >= 0"),
        ("top_p", [0.5, 0.9, 0.0], "0.0 at \\[2\\]"),
        ("top_p", [0.5, 0.9, float("nan")], "nan at \\[2\\]"),
        ("min_p", [1.5, 0.9, 0.0], "1.5 at \\[0\\]"),
        ("temperature", [1.0, -1.0, 0.0], "-1.0 at \\[1\\]"),
        ("top_k", [1, 2], "a number or \\[3\\]"),
    ):
        with pytest.raises(ValueError, match=f"{name}: got .*{said}"):
            vgkern.linear_token_logprobs(**x, **{name: torch.tensor(rows)}, backend="torch")
    with pytest.raises(TypeError, match=r"top_k: got float32 .*int64"):
        vgkern.linear_token_logprobs(**x, top_k=torch.ones(3), backend="torch")


@pytest.mark.parametrize("name", ["top_ps", "min_ps", "temperatures"])
def test_values_that_nobody_looked_at_make_their_row_nan(backend, name):
    """As on a GPU: never a number of another distribution."""
    if backend == "torch":
        pytest.skip("no operators")
    x = model(n=3)
    head = (x["hidden"], x["weight"], None)
    rows = torch.tensor([0.5, -0.5, 1.0])
    cut = _truncate.Cut(top_k=20)._replace(**{name: rows})
    ops = operators(backend)
    logp, entropy = ops.linear_truncated_logprobs_fwd(*head, x["targets"], 0.0, -100, *cut)
    assert logp[1].isnan() and entropy[1].isnan() and not logp[::2].isnan().any()
    at = torch.arange(3)
    out = ops.linear_sample_fwd(*head, 3, at, at, 0.0, *cut)
    assert out[1][1].isnan() and out[1][::2].isfinite().all()


def test_rows_without_gradient(backend):
    """Outside the kept set, greedy, ignored: nothing, even beside an upstream gradient."""
    x = model(n=8)
    z = x["hidden"] @ x["weight"].T
    y = z.argmax(-1)
    y[0], y[1], t = int(z[0].argmin()), -100, torch.ones(8)
    t[2], t[3] = 0.0, 0.0
    x["hidden"][1] = torch.nan
    h, w = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    out = vgkern.linear_token_logprobs(h, w, y, temperature=t, top_k=20, backend=backend)
    assert out.logp[0] == -torch.inf and out.logp[1] == out.entropy[1] == 0
    assert out.logp[2] == 0 and out.entropy[2] == 0
    dh, dw = torch.autograd.grad((out.logp[1:].sum() + out.entropy.sum()), (h, w))
    assert (dh[:4] == 0).all() and (dh[4:] != 0).any(-1).all() and dw.isfinite().all()
    live = w.detach()[kept(z[4].detach(), top_k=20)]
    outside = torch.ones(1035, dtype=torch.bool)
    for i in range(4, 8):
        outside[kept(z[i].detach(), top_k=20)] = False
    assert len(live) == 20 and (dw[outside] == 0).all() and (dw[~outside] != 0).any(-1).all()


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("zero", [0, 0.0])
def test_greedy_means_the_same_as_a_number_and_as_a_tensor(backend, zero, cut):
    """logp 0 at the argmax and -inf elsewhere, entropy 0, gradients 0; a number, and per row."""
    x = model(n=6)
    z = x["hidden"] @ x["weight"].T
    x["targets"] = torch.cat([z[:3].argmax(-1), z[3:].argmin(-1)])
    seen = []
    for t in (zero, torch.zeros(6)):
        h, w = (x[k].clone().requires_grad_() for k in ("hidden", "weight"))
        out = vgkern.linear_token_logprobs(
            h, w, x["targets"], temperature=t, **cut, backend=backend
        )
        grads = torch.autograd.grad(out.logp[:3].sum() + out.entropy.sum(), (h, w))
        seen.append((*out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    logp, entropy, *grads = seen[0]
    assert logp.tolist() == [0.0] * 3 + [-torch.inf] * 3 and (entropy == 0).all()
    assert not any(g.any() for g in grads)


def test_greedy_is_refused_where_it_cannot_be():
    x = model(n=3)
    costate = vgkern.Costate(torch.ones(3, 32), x["weight"], relaxation="expected")
    with pytest.raises(NotImplementedError, match=r"costate: not with temperature 0 \(greedy\)"):
        vgkern.linear_token_logprobs(**x, temperature=0.0, costate=costate)


def test_gradcheck_with_the_kept_set_fixed():
    x = model(n=4, h=4, v=9, dtype=torch.float64)
    b = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    h, w = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    t = torch.tensor([1.0, 0.5, 2.0, 1.0])
    z = (h @ w.T).detach() / t[:, None]
    y = z.argmax(-1)  # kept by every cut
    assert torch.autograd.gradcheck(
        lambda *a: tuple(
            vgkern.linear_token_logprobs(
                a[0], a[1], y, bias=a[2], temperature=t, softcap=9.0, top_k=6, top_p=0.9, min_p=0.01
            )
        ),
        (h, w, b),
    )


def test_neutral_options_are_the_op_without_them(backend):
    """Bit for bit, gradients too: nothing changes for who passes none of the options."""
    x = model(bias="plain", temperature=1.25)
    names = ("hidden", "weight", "bias")

    def run(**options):
        leaves = {k: x[k].clone().requires_grad_() for k in names}
        out = vgkern.linear_token_logprobs(**{**x, **leaves}, backend=backend, **options)
        total = (out.logp * torch.arange(N)).sum() + out.entropy.square().sum()
        return (*out, *torch.autograd.grad(total, list(leaves.values())))

    plain = run()
    same = run(top_k=None, top_p=None, min_p=None, group=None)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    for wide in ({"top_k": 5000}, {"top_p": 1.0}, {"min_p": 0.0}):
        for a, b, eager in zip(run(**wide), plain, plain, strict=True):
            assert measure(a, eager, b.double(), torch.float32)[2] <= 1


def test_a_wrong_truncation_is_seen(monkeypatch):
    """The parity of sampler and scorer is not blind: cut one of them differently."""
    x = model()
    x.pop("targets")
    options = {**x, "top_k": 40, "top_p": 0.9, "backend": "torch"}
    out = vgkern.linear_sample(noise=noise(), **options)
    other = lambda *a: _truncate.truncated_ref(*a[:3], a[3] + 1, *a[4:])  # noqa: E731
    monkeypatch.setattr(linear_token_logprobs, "truncated_ref", other)
    again = vgkern.linear_token_logprobs(targets=out.token, **{**options, "top_p": None})
    assert not torch.equal(again.logp, out.logp)


def test_nan_and_blocked_rows(backend):
    x = model(n=3)
    h, w = x["hidden"], x["weight"]
    h[1] = torch.nan
    with pytest.raises(vgkern.NonFiniteError, match=r"hidden.*row \[1\]"):
        vgkern.linear_token_logprobs(h, w, x["targets"], top_p=0.9, backend=backend)
    bias = torch.full((1035,), -torch.inf)
    out = vgkern.linear_token_logprobs(
        x["hidden"].nan_to_num(), w, x["targets"], bias=bias, top_p=0.9, backend=backend
    )
    assert (out.logp == -torch.inf).all() and (out.entropy == 0).all()


BAD = {
    "top_k": (0, 1.5, True),
    "top_p": (0.0, 1.5, -0.1),
    "min_p": (-0.1, 1.5),
    "temperature": (-1.0, torch.tensor([1.0, -1, 1]), torch.ones(4), torch.full((3,), torch.nan)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name, backend):
    x = model(n=3)
    for value in BAD[name]:
        with pytest.raises(ValueError, match=name):
            vgkern.linear_token_logprobs(**x, **{name: value}, backend=backend)


def test_second_derivative_raises_on_native(backend):
    if backend == "torch":
        pytest.skip("the reference is differentiable twice")
    x = model(n=3)
    h = x["hidden"].requires_grad_()
    out = vgkern.linear_token_logprobs(h, x["weight"], x["targets"], top_k=9, backend=backend)
    (g,) = torch.autograd.grad(out.entropy.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='torch'"):
        g.sum().backward()


@pytest.mark.parametrize(
    "target", [1035, 2**40] if INTERPRETED else [1035, -1, 1036, 2**40, -(2**63)]
)
def test_ids_below_the_public_functions(target, backend):
    """V is elsewhere, anything else NaN; no gradient, no read out of bounds."""
    if backend == "torch":
        pytest.skip("no operators")
    ops = operators(backend)
    x = model(n=5)
    h, w, y = x["hidden"], x["weight"], x["targets"].clone()
    z, y[2] = h @ w.T, target
    others = [0, 1, 3, 4]
    up = torch.tensor([1.0, -2.0, 3.0, 0.5, 1.5])
    scalars = (1.0, 0.0, -100)
    cut = (0.0, -100, *_truncate.Cut(top_k=20))
    for fwd, bwd, first in (
        (ops.linear_logprobs_fwd, ops.linear_logprobs_bwd, (h, w, None, y)),
        (ops.token_logprobs_fwd, ops.token_logprobs_bwd, (z, y)),
    ):
        out = fwd(*first, *scalars)
        needs = ([True, True, False],) if len(first) == 4 else ()
        grad = bwd(*first, *out, up, up, *scalars, *needs)
        grad = grad[0] if needs else grad
        assert all(t[others].isfinite().all() for t in (*out, grad))
        if target == 1035:
            lp = z[2].log_softmax(-1)
            torch.testing.assert_close(out[0][2], -z[2].logsumexp(-1))
            torch.testing.assert_close(out[1][2], -(lp.exp() * lp).sum())
            p, entropy = lp.exp(), out[1][2]
            dz = up[2] * -p - up[2] * p * (lp + entropy)
            torch.testing.assert_close(grad[2], dz @ w if needs else dz, rtol=1e-4, atol=1e-5)
        else:
            assert out[0][2].isnan() and (grad[2] == 0).all()
    logp, _ = ops.linear_truncated_logprobs_fwd(h, w, None, y, *cut)
    needs = [True, False, False]
    grad = ops.linear_truncated_logprobs_bwd(h, w, None, y, up, up, *cut, needs)[0]
    assert logp[2].isnan() and (grad[2] == 0).all() and not logp[others].isnan().any()


def test_operators_are_well_formed():
    import conftest

    conftest.skip_unless_runs("cpu")
    x = model(n=5, v=33)
    h, w = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    head = (h.detach(), w.detach(), None, x["targets"])
    ops, up = torch.ops.vgkern, torch.ones(5)
    tests = ("test_schema", "test_faketensor")
    every = _truncate.Cut(1.0, 0, 1.0, 0.0, up, torch.arange(5), up, 0 * up)
    for options in _truncate.Cut(0.7, 7, 0.9), every:
        cut = (0.0, -100, *options)
        torch.library.opcheck(ops.linear_truncated_logprobs_fwd, (*head, *cut), test_utils=tests)
        torch.library.opcheck(
            ops.linear_truncated_logprobs_bwd, (*head, up, up, *cut, [True] * 2 + [False]),
            test_utils=tests
        )  # fmt: skip
    out = ops.linear_logprobs_fwd(*head, 1.0, 0.0, -100)
    for flag in (), (True,):
        args = (*head, *out, up, up, 1.0, 0.0, -100, [True, True, False], *flag)
        torch.library.opcheck(ops.linear_logprobs_bwd, args, test_utils=tests)


def test_same_bits_at_any_thread_count(backend, threads):
    if backend not in ("torch", "cpu"):
        pytest.skip("an emulated backend does not use torch's threads")
    x = model(n=150)
    outs = []
    for count in (1, 2, 2):
        threads(count)
        h, w = x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
        out = vgkern.linear_token_logprobs(h, w, x["targets"], top_p=0.9, backend=backend)
        total = out.logp.clamp(min=-1e3).sum() + out.entropy.sum()
        outs.append((*out, *torch.autograd.grad(total, (h, w))))
    assert all(torch.equal(a, b) for a, b in zip(outs[1], outs[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(outs[0][:2], outs[1][:2], strict=True))
