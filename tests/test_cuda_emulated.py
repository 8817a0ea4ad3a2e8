"""The cuda backend on the host: what test_parity.py does not see of it. See tests/emulation."""

import conftest
import pytest
import torch

from vgkern.ops import _cuda
from vgkern.ops.linear_sample import linear_sample_ref
from vgkern.ops.noise import Noise

pytestmark = pytest.mark.skipif(conftest.INTERPRETED, reason="runs beside Triton's interpreter")


@pytest.fixture(autouse=True)
def emulated():
    conftest.skip_unless_runs("cuda")


def rows(n, v, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, v, generator=g)).to(dtype)
    return logits, torch.randint(0, v, (n,), generator=g), g


def z_of(logits, temperature, softcap):
    x = logits.double()
    return (softcap * torch.tanh(x / softcap) if softcap else x) / temperature


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize(
    ("v", "softcap", "dtype", "out"),
    [(1, 0.0, "float32", None), (31, 4.0, "float32", None), (1000, 0.0, "float32", "bfloat16"),
     (130, 0.0, "bfloat16", None), (36, 0.0, "float32", "in place")],
)  # fmt: skip
def test_row_grad_with_costates(v, softcap, dtype, out, expected):
    """All three terms of the row gradient against autograd in fp64."""
    logits, y, g = rows(5, v, dtype=getattr(torch, dtype))
    c, e = (torch.randn(5, generator=g) for _ in range(2))
    u = torch.randn(5, v, generator=g)
    c[1] = e[1] = 0
    y[2] = -100
    noise = Noise(2**63 + 7, torch.arange(5) + 2**40, torch.full((5,), 2**31 + 3))
    tau, temperature = 1.0 if expected else 0.7, 1.3
    x = logits.double().requires_grad_()
    z = z_of(x, temperature, softcap)
    lp = z.log_softmax(-1)
    live = (y != -100).double()
    at = lp.gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
    total = (live * (c * at - e * (lp.exp() * lp).sum(-1))).sum()
    shift = 0 if expected else noise.gumbel(v, torch.float64)
    q = ((z + shift) / tau).softmax(-1)
    (want,) = torch.autograd.grad(total + (q * u).sum(), x)
    stats = _cuda.row_stats(logits, None, y, temperature, softcap, -100)
    given = logits.clone()
    to = given if out == "in place" else torch.empty(
        5, v, dtype=getattr(torch, out) if out else logits.dtype
    )  # fmt: skip
    got = _cuda.row_grad(
        given, None, y, *stats, c, e, u, noise.seed - 2**64, noise.sequence, noise.position, tau,
        expected, temperature, softcap, -100, to
    )  # fmt: skip
    assert got is to
    loose = 1e-2 if got.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(got.double(), want, rtol=loose, atol=loose)


@pytest.mark.parametrize("v", [1, 5, 64, 1000])
def test_row_sample_cuts_are_exact_with_ties(v):
    """Few distinct logits, so that every cut falls among equals: the lowest ids stay."""
    g = torch.Generator().manual_seed(v)
    logits = torch.randint(-2, 3, (6, v), generator=g).float()
    logits[:, 0] = -torch.inf if v > 1 else 0.0
    logits[3] = -0.0
    noise = Noise(11, torch.arange(6), torch.tensor(4).expand(6))
    temperature = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.0])
    eye = torch.eye(v)
    for cut in [(3, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.999, 0.0), (7, 0.6, 0.0), (2, 0.9, 0.3),
                (0, 1.0, 0.2), (v, 1e-9, 0.0), (1, 1.0, 1.0)]:  # fmt: skip
        k = min(cut[0], v)
        got = _cuda.row_sample(logits, None, 11, noise.sequence, noise.position.contiguous(),
                               temperature, 0.0, k, *cut[1:])  # fmt: skip
        want = linear_sample_ref(
            logits.double(), eye.double(), None, noise, temperature, 0.0, k, *cut[1:]
        )
        if v > 1:  # 0 * -inf of the product above
            z = logits.double().clone()
            want = sample_of(z, noise, temperature, k, *cut[1:])
        assert torch.equal(got[0], want.token), cut
        torch.testing.assert_close(got[1].double(), want.logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[2].double(), want.entropy, rtol=1e-5, atol=1e-5)


def sample_of(z, noise, temperature, *cut):
    """The reference sampler on given logits."""
    from vgkern.ops import linear_sample as op

    keep, op.linear_logits_ref = op.linear_logits_ref, lambda hidden, weight, bias: hidden
    try:
        weight = torch.empty(z.shape[1], 1)
        return linear_sample_ref(z, weight, None, noise, temperature, 0.0, *cut)
    finally:
        op.linear_logits_ref = keep
