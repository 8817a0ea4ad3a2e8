"""What is special to linear_divergence: kl_div, models that are near or equal, -inf, masks."""

import math

import conftest
import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, check

import vgkern
from vgkern import case_inputs, cases

KINDS = ("forward_kl", "reverse_kl", "jsd")


def models(n=9, h=16, v=200, ht=11, dtype=torch.float32, seed=0):
    a, _, _ = case_inputs.head((n,), h, v, dtype, seed)
    b, _, _ = case_inputs.head((n,), ht, v, dtype, seed + 1)
    return a["hidden"], a["weight"], b["hidden"], b["weight"]


def by_kl_div(z, t, kind):
    """In fp64, from logits, through torch's own kl_div."""
    lp, lq = z.log_softmax(-1), t.log_softmax(-1)

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if kind == "jsd":
        m = torch.logaddexp(lp, lq) - math.log(2)
        return (kl(lp, m) + kl(lq, m)) / 2
    return kl(lq, lp) if kind == "forward_kl" else kl(lp, lq)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_agrees_with_kl_div(backend, kind, temperature):
    x = models()
    x[0].requires_grad_(), x[1].requires_grad_()
    out = vgkern.linear_divergence(*x, kind=kind, temperature=temperature, backend=backend)
    up = torch.randn(9, generator=torch.Generator().manual_seed(4))
    got = torch.autograd.grad((out.divergence * up).sum(), x[:2])
    d = [t.detach().double() for t in x]
    d[0].requires_grad_(), d[1].requires_grad_()
    want = by_kl_div(d[0] @ d[1].T / temperature, d[2] @ d[3].T / temperature, kind)
    torch.testing.assert_close(out.divergence.double(), want, rtol=1e-5, atol=1e-7)
    for a, b in zip(got, torch.autograd.grad((want * up).sum(), d[:2]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_entropy_is_that_of_linear_token_logprobs(backend):
    x = models(v=1035)
    y = torch.zeros(9, dtype=torch.int64)
    for cap in (None, 3.0):
        options = {"temperature": 0.7, "softcap": cap, "backend": backend}
        want = vgkern.linear_token_logprobs(*x[:2], y, **options).entropy
        got = vgkern.linear_divergence(*x, **options).entropy
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_does_not_diverge_from_itself(backend, kind, dtype):
    h, w, _, _ = models(n=33, h=64, v=1035, dtype=dtype)
    h.requires_grad_(), w.requires_grad_()
    out = vgkern.linear_divergence(h, w, h, w, kind=kind, backend=backend)
    exact = kind != "jsd" or backend != "torch"
    assert (out.divergence.abs() <= (0 if exact else 1e-7)).all()
    for g in torch.autograd.grad(out.divergence.sum(), (h, w)):
        assert g.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_small_divergences_do_not_drown(backend, kind, step):
    """A teacher a step away: 1e-9 nats at the last. The first-order noise of fp32 normalisers
    (1e-7 and more) must not be in it; never negative. The logits are exact in fp32 (a head of
    unit vectors), so all of the error is the op's own."""
    v = 64
    g = torch.Generator().manual_seed(0)
    z = (2 * torch.randn(40, v, generator=g)).requires_grad_()
    t = z.detach() + step * torch.randn(40, v, generator=g)
    eye = torch.eye(v)
    out = vgkern.linear_divergence(z, eye, t, eye, kind=kind, backend=backend).divergence
    (got,) = torch.autograd.grad(out.sum(), z)
    d = z.detach().double().requires_grad_()
    want = by_kl_div(d, t.double(), kind)
    (dwant,) = torch.autograd.grad(want.sum(), d)
    if backend == "torch":  # plain sums: rounding of the terms themselves stays
        assert (out > -3e-7).all()
        return
    assert (out >= 0).all()
    torch.testing.assert_close(out.double(), want, rtol=2e-4 * max(1, 1e-3 / step), atol=0)
    assert (got - dwant).norm() < 3e-7 / step * dwant.norm() + 3e-6 * dwant.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2e-3])
def test_fp16_keeps_every_row_in_range(backend, kind, temperature):
    """What arrives from above differs by 1e6 between rows; at the low temperature the reverse KL
    is in the thousands, and its gradient beyond fp16 before the loss brings it back."""
    h, w, th, tw = models(n=6, dtype=torch.float16)
    up = torch.tensor([1.0, 1e-6, 3e-2, 1e-4, 1e-5, 1e-3]) * 2.0**10 * temperature
    if kind == "reverse_kl":
        up *= temperature
    h.requires_grad_()
    out = vgkern.linear_divergence(
        h, w, th, tw, kind=kind, temperature=temperature, backend=backend
    )
    (got,) = torch.autograd.grad((out.divergence * up).sum(), h)
    x = [t.detach().double() for t in (h, w, th, tw)]
    x[0].requires_grad_()
    want = by_kl_div(x[0] @ x[1].T / temperature, x[2] @ x[3].T / temperature, kind)
    (want,) = torch.autograd.grad((want * up.double()).sum(), x[0])
    error, size = (got - want).norm(dim=-1), want.norm(dim=-1)
    assert (error <= 4e-3 * size + 16**0.5 * 2.0**-25).all()  # of fp16 itself, subnormal


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_are_not_looked_at(backend, kind):
    h, w, th, tw = models()
    mask = torch.arange(9) % 3 != 1
    h[~mask], th[~mask] = torch.nan, torch.inf
    h.requires_grad_(), w.requires_grad_()
    out = vgkern.linear_divergence(h, w, th, tw, kind=kind, mask=mask, backend=backend)
    assert all((t[~mask] == 0).all() and (t[mask] > 0).all() for t in out)
    gh, gw = torch.autograd.grad(out.divergence.sum() + out.entropy.sum(), (h, w))
    assert (gh[~mask] == 0).all() and gh.isfinite().all() and gw.isfinite().all()
    some = vgkern.linear_divergence(h[mask], w, th[mask], tw, kind=kind, backend=backend)
    for a, b in zip(out, some, strict=True):
        torch.testing.assert_close(a[mask], b, rtol=1e-5, atol=1e-6)
    want = torch.autograd.grad(some.divergence.sum() + some.entropy.sum(), (h, w))
    torch.testing.assert_close((gh, gw), want, rtol=1e-5, atol=1e-6)
    as_number = vgkern.linear_divergence(
        h, w, th, tw, kind=kind, mask=mask.float(), backend=backend
    )
    assert torch.equal(as_number.divergence, out.divergence)
    none = vgkern.linear_divergence(h, w, th, tw, mask=torch.zeros(9), backend=backend)
    assert all((t == 0).all() for t in none)
    assert all((g == 0).all() for g in torch.autograd.grad(none.divergence.sum(), (h, w)))


def blocked(v, ids):
    """A head over unit vectors that puts these ids at -inf, where hidden ends in 1."""
    w = torch.cat([torch.eye(v), torch.zeros(v, 1)], 1)
    w[ids, -1] = -torch.inf
    w[ids, :-1] = 0
    return w


@pytest.mark.parametrize("kind", KINDS)
def test_blocked_tokens(backend, kind):
    """-inf on both sides counts for nothing; on one side it is 0, log 2 or inf, never NaN."""
    v = 12
    g = torch.Generator().manual_seed(0)
    ends = torch.ones(4, 1)
    h = torch.cat([torch.rand(4, v, generator=g) + 0.5, ends], 1).requires_grad_()
    th = torch.cat([torch.rand(4, v, generator=g) + 0.5, ends], 1)
    both = blocked(v, [3, 7])
    out = vgkern.linear_divergence(h, both, th, both, kind=kind, backend=backend)
    keep = [i for i in range(v) if i not in (3, 7)]
    d = h.detach()[:, :-1].double()[:, keep].requires_grad_()
    want = by_kl_div(d, th[:, :-1].double()[:, keep], kind)
    torch.testing.assert_close(out.divergence.double(), want, rtol=1e-5, atol=1e-7)
    for student, teacher, infinite in (
        (both, blocked(v, [3]), kind == "forward_kl"),
        (blocked(v, [3]), both, kind == "reverse_kl"),
    ):
        out = vgkern.linear_divergence(h, student, th, teacher, kind=kind, backend=backend)
        if infinite:
            assert (out.divergence == torch.inf).all() and out.entropy.isfinite().all()
        else:
            z = h.detach().double() @ student.double().T.nan_to_num(0, neginf=-1e6)
            t = th.double() @ teacher.double().T.nan_to_num(0, neginf=-1e6)
            torch.testing.assert_close(
                out.divergence.double(), by_kl_div(z, t, kind), rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize("kind", KINDS)
def test_blocked_tokens_stay_blocked_under_a_softcap(backend, kind):
    """-inf must not become -softcap, of either model, and has no gradient."""
    v, g = 12, torch.Generator().manual_seed(0)
    h, th = (torch.cat([3 * torch.rand(4, v, generator=g) + 0.5, torch.ones(4, 1)], 1)
             for _ in range(2))  # fmt: skip
    both = blocked(v, [3, 7]).requires_grad_()
    caps = {"softcap": 2.0, "teacher_softcap": 5.0}
    out = vgkern.linear_divergence(h, both, th, both, kind=kind, backend=backend, **caps)
    keep = [i for i in range(v) if i not in (3, 7)]
    d = h.double()[:, keep].requires_grad_()
    t = 5 * torch.tanh(th.double()[:, keep] / 5)
    want = by_kl_div(2 * torch.tanh(d / 2), t, kind)
    torch.testing.assert_close(out.divergence.double(), want, rtol=1e-5, atol=1e-7)
    (dwant,) = torch.autograd.grad(want.sum(), d)
    (gw,) = torch.autograd.grad(out.divergence.sum(), both)
    torch.testing.assert_close(gw[keep].double(), dwant.T @ h.double(), rtol=1e-4, atol=1e-6)
    assert (gw[[3, 7]] == 0).all()
    for student, teacher, infinite in (
        (both, blocked(v, [3]), kind == "forward_kl"), (blocked(v, [3]), both, kind == "reverse_kl")
    ):  # fmt: skip
        out = vgkern.linear_divergence(h, student, th, teacher, kind=kind, backend=backend, **caps)
        assert (out.divergence.isinf() if infinite else out.divergence.isfinite()).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_an_infinite_divergence_has_no_gradient(backend, kind):
    v = 12
    h = torch.rand(4, v + 1, generator=torch.Generator().manual_seed(0)) + 0.5
    h[:2, -1], h[2:, -1] = 1.0, 0.0
    th = h.detach().roll(1, 1)
    th[:, -1] = h[:, -1]
    a, b = torch.eye(v, v + 1), blocked(v, [3])
    b[3, -1] = -3e38  # -inf * 0 would be NaN: with 1 behind it, beyond any softmax
    a, b = (b, a) if kind == "forward_kl" else (a, b)
    h2, w = h.clone().requires_grad_(), a.clone().requires_grad_()
    h2.data[:2, -1] = th[:2, -1] = 10.0  # -3e39: -inf
    out = vgkern.linear_divergence(h2, w, th, b, kind=kind, backend=backend)
    assert (out.divergence[:2] == torch.inf).all() and out.divergence[2:].isfinite().all()
    gw = torch.autograd.grad(out.divergence.sum() + out.entropy.sum(), w)[0]
    assert gw.isfinite().all()
    some = vgkern.linear_divergence(h2[2:], w, th[2:], b, kind=kind, backend=backend)
    want = torch.autograd.grad(some.divergence.sum() + some.entropy.sum(), w)[0]
    torch.testing.assert_close(gw, want, rtol=1e-5, atol=1e-6)


def test_teacher_gets_no_gradient(backend):
    h, w, th, tw = (t.requires_grad_() for t in models())
    out = vgkern.linear_divergence(h, w, th, tw, backend=backend)
    grads = torch.autograd.grad(out.divergence.sum(), (h, w, th, tw), allow_unused=True)
    assert grads[2] is None and grads[3] is None and grads[0].abs().sum() > 0


@pytest.mark.parametrize("leaf", [0, 1])
def test_frozen_parts(backend, leaf):
    x = models()
    both = [t.clone().requires_grad_() for t in x[:2]]
    want = torch.autograd.grad(
        vgkern.linear_divergence(*both, *x[2:], backend=backend).divergence.sum(), both
    )
    one = list(x)
    one[leaf] = one[leaf].clone().requires_grad_()
    (g,) = torch.autograd.grad(
        vgkern.linear_divergence(*one, backend=backend).divergence.sum(), one[leaf]
    )
    assert torch.equal(g, want[leaf])


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_at_any_thread_count_and_on_repeat(backend, kind, threads):
    h, w, th, tw = models(n=70, v=1035)
    h.requires_grad_(), w.requires_grad_()

    def run(count):
        threads(count)
        out = vgkern.linear_divergence(h, w, th, tw, kind=kind, backend=backend)
        g = torch.autograd.grad(out.divergence.sum() + out.entropy.square().sum(), (h, w))
        return (*(t.detach() for t in out), *g)

    want = run(2)
    assert all(torch.equal(a, b) for a, b in zip(run(2), want, strict=True))
    for a, b in zip(run(1), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_fp64(kind):
    h, w, th, tw = models(n=3, h=4, v=6, ht=2, dtype=torch.float64)
    h.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: tuple(
            vgkern.linear_divergence(
                a, b, th, tw, kind=kind, temperature=0.7, softcap=1.5, teacher_softcap=0.8
            )
        ),
        (h, w),
    )


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name", ["h7-v31-3d", "masked-jsd"])
def test_strides(name, layout, backend):
    check(cases.by_name(f"linear_divergence-{name}"), backend, torch.float32, layout)


def test_second_derivative_raises_on_fused_backends(backend):
    if backend == "torch":
        pytest.skip("the reference is differentiable twice")
    h, w, th, tw = models()
    h.requires_grad_()
    out = vgkern.linear_divergence(h, w, th, tw, backend=backend)
    (g,) = torch.autograd.grad(out.divergence.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="torch"):
        g.sum().backward()


BAD = [
    ({"teacher_weight": torch.zeros(199, 11)}, ValueError, "teacher_weight"),
    ({"teacher_weight": torch.zeros(200, 12)}, ValueError, "teacher_hidden"),
    ({"teacher_hidden": torch.zeros(8, 11)}, ValueError, "teacher_hidden"),
    ({"teacher_hidden": torch.zeros(9, 11, dtype=torch.int64)}, TypeError, "teacher_hidden"),
    ({"weight": torch.zeros(200, 15)}, ValueError, "hidden, weight"),
    ({"kind": "kl"}, ValueError, "kind"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"softcap": 0.0}, ValueError, "softcap"),
    ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap"),
    ({"mask": torch.ones(8)}, ValueError, "mask"),
    ({"hidden": torch.full((9, 16), torch.nan)}, vgkern.NonFiniteError, "hidden"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_names_the_argument(change, error, name):
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    x = dict(zip(names, models(), strict=True))
    with pytest.raises(error, match=f"^{name}: .*allowed: "):
        vgkern.linear_divergence(**{**x, **change})


@pytest.mark.skipif("cpu" not in conftest.BACKENDS, reason="the cpu backend's own memory")
def test_peak_memory():
    """Two blocks of 150 MiB together, the fp32 gradients and slack: not 2 x 393 MiB of [N, V]."""
    import subprocess
    import sys

    program = """
import resource, torch, vgkern
n, h, v = 2048, 64, 50304
x = torch.randn(n, h, requires_grad=True); w = torch.randn(v, h, requires_grad=True)
t = torch.randn(n, h); tw = torch.randn(v, h)
vgkern.linear_divergence(x[:4], w, t[:4], tw, backend="cpu").divergence.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vgkern.linear_divergence(x, w, t, tw, backend="cpu").divergence.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    gradients = 2 * 4 * (2048 + 50304) * 64 / 2**20
    assert float(done.stdout) < 150 + gradients + 60
