"""What is special to sampling: replay, the distribution drawn from, truncation, temperature."""

import math

import pytest
import torch

import vgkern
from vgkern import case_inputs


def model(n=24, h=16, v=1000, seed=0, dtype=torch.float32, **kw):
    x, _, _ = case_inputs.head((n,), h, v, dtype, seed, **kw)
    x.pop("targets")
    return x


def noise(sequence, position=0, seed=3):
    return vgkern.Noise(seed, torch.as_tensor(sequence), torch.as_tensor(position))


CUTS = [
    {},
    {"top_k": 9},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_replay_for_any_batch_and_threads(backend, cut, threads):
    """Token, and to rounding its log-prob, from (seed, sequence, position) alone."""
    x = model(n=24)
    h, w = x["hidden"], x["weight"]
    s, p = torch.arange(24) * 3 + 2**35, torch.arange(24) % 5
    threads(1)
    whole = vgkern.linear_sample(h, w, noise(s, p), backend=backend, **cut)
    threads(2)
    again = vgkern.linear_sample(h, w, noise(s, p), backend=backend, **cut)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    mixed = vgkern.linear_sample(h[order], w, noise(s[order], p[order]), backend=backend, **cut)
    assert torch.equal(mixed.token, whole.token[order])
    torch.testing.assert_close(mixed.logp, whole.logp[order], rtol=0, atol=1e-5)
    for size in (1, 5, 7):
        for at in torch.arange(24).split(size):
            part = vgkern.linear_sample(h[at], w, noise(s[at], p[at]), backend=backend, **cut)
            assert torch.equal(part.token, whole.token[at])


def test_backends_draw_the_same_tokens():
    import conftest

    conftest.skip_unless_runs("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        x = model(n=200, v=5003, dtype=dtype)
        a, b = (
            vgkern.linear_sample(**x, noise=noise(torch.arange(200)), backend=k)
            for k in ("torch", "cpu")
        )
        assert (a.token == b.token).double().mean() >= 0.995  # but for ties within rounding
        torch.testing.assert_close(a.entropy, b.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"bias": "plain", "softcap": 5.0}])
def test_logp_is_that_of_linear_token_logprobs(backend, options):
    options = dict(options)
    x = model(n=40, h=64, v=1035, **options)
    out = vgkern.linear_sample(**x, noise=noise(torch.arange(40)), backend=backend)
    lp = vgkern.linear_token_logprobs(**x, targets=out.token, backend=backend)
    torch.testing.assert_close(out.logp, lp.logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.entropy, lp.entropy, rtol=1e-5, atol=1e-5)


def truncated(z, top_k=None, top_p=None, min_p=None):
    """Probabilities of the truncated distribution, one row, in fp64."""
    order = sorted(range(len(z)), key=lambda v: (-float(z[v]), v))[:top_k]
    p = torch.softmax(z[order], -1)
    keep, mass = [], 0.0
    for i, v in enumerate(order):
        if i and ((top_p is not None and mass >= top_p) or (min_p and p[i] < min_p * p[0])):
            break
        keep.append(v)
        mass += float(p[i])
    out = torch.zeros_like(z)
    out[keep] = torch.softmax(z[keep], -1)
    return out


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_chi_square(backend, cut):
    """Tokens follow the (truncated) softmax; its p = 1e-5 quantile, five fixed seeds' worth."""
    draws, v = 20_000 if backend in ("torch", "cpu") else 2_000, 61  # emulated: slow
    x = model(n=1, h=8, v=v, bias="blocked")
    h = x["hidden"].expand(draws, -1)
    out = vgkern.linear_sample(
        h, x["weight"], noise(torch.arange(draws)), bias=x["bias"], backend=backend, **cut
    )
    z = (x["hidden"].double() @ x["weight"].double().T + x["bias"].double())[0]
    p = truncated(z, **cut)
    seen = torch.bincount(out.token, minlength=v).double()
    assert seen[p == 0].sum() == 0, "a token of probability 0 was drawn"
    expected = draws * p
    big = expected >= 5
    rest = (seen[~big].sum() - expected[~big].sum()) ** 2 / expected[~big].sum().clamp(min=5)
    chi2 = float(((seen - expected)[big] ** 2 / expected[big]).sum() + rest)
    k = int(big.sum())
    bound = k * (1 - 2 / (9 * k) + 4.27 * math.sqrt(2 / (9 * k))) ** 3  # Wilson-Hilferty
    assert chi2 < bound
    torch.testing.assert_close(out.logp.double(), p[out.token].log(), rtol=0, atol=1e-5)


def test_truncation_keeps_the_lowest_ids_of_a_tie(backend):
    h, w = torch.ones(400, 1), torch.zeros(8, 1)
    out = vgkern.linear_sample(h, w, noise(torch.arange(400)), top_k=3, backend=backend)
    assert set(out.token.tolist()) == {0, 1, 2}
    torch.testing.assert_close(out.logp, torch.full((400,), -math.log(3)))
    out = vgkern.linear_sample(h, w, noise(torch.arange(400)), top_p=0.25, backend=backend)
    assert set(out.token.tolist()) == {0, 1}
    greedy = vgkern.linear_sample(h, w, noise(torch.arange(400)), temperature=0, backend=backend)
    assert set(greedy.token.tolist()) == {0}


def test_temperature_zero_is_greedy(backend):
    x = model(n=9)
    out = vgkern.linear_sample(**x, noise=noise(torch.arange(9)), temperature=0.0, backend=backend)
    assert torch.equal(out.token, (x["hidden"] @ x["weight"].T).argmax(-1))
    assert torch.equal(out.logp, torch.zeros(9)) and torch.equal(out.entropy, torch.zeros(9))


def test_a_temperature_per_row(backend):
    x = model(n=6)
    t = torch.tensor([1.0, 0.5, 0.0, 2.0, 1e-3, 30.0])
    n = noise(torch.arange(6))
    rows = vgkern.linear_sample(**x, noise=n, temperature=t, backend=backend)
    for i in range(6):
        one = vgkern.linear_sample(
            x["hidden"][i : i + 1], x["weight"], noise(torch.tensor([i])),
            temperature=float(t[i]), backend=backend
        )  # fmt: skip
        assert torch.equal(one.token, rows.token[i : i + 1])
        torch.testing.assert_close(one.logp, rows.logp[i : i + 1], rtol=1e-5, atol=1e-5)


def test_zero_probability_is_never_drawn(backend):
    """A million candidates at -inf beside one that is allowed, and mixed rows."""
    v = 1000
    h, w = torch.ones(1000, 1), torch.zeros(v, 1)
    bias = torch.full((v,), -torch.inf)
    bias[617] = 0.0
    out = vgkern.linear_sample(h, w, noise(torch.arange(1000)), bias=bias, backend=backend)
    assert (out.token == 617).all() and (out.logp == 0).all() and (out.entropy == 0).all()


def test_cut_wider_than_the_vocabulary_is_no_cut(backend):
    x = model(n=9, v=31)
    n = noise(torch.arange(9))
    plain = vgkern.linear_sample(**x, noise=n, backend=backend)
    wide = vgkern.linear_sample(**x, noise=n, top_k=99, top_p=1.0, min_p=0.0, backend=backend)
    assert torch.equal(plain.token, wide.token)
    torch.testing.assert_close(plain.logp, wide.logp)


def test_shapes_follow_hidden(backend):
    x = model(n=6, v=31)
    n = vgkern.Noise(0, torch.tensor([[4], [9]]), torch.arange(3))
    out = vgkern.linear_sample(x["hidden"].view(2, 3, -1), x["weight"], n, backend=backend)
    assert {t.shape for t in out} == {(2, 3)}
    flat = vgkern.Noise(0, torch.tensor([4, 4, 4, 9, 9, 9]), torch.arange(3).repeat(2))
    assert torch.equal(
        out.token.flatten(), vgkern.linear_sample(**x, noise=flat, backend=backend).token
    )


def test_no_gradient(backend):
    x = model(n=3, v=31)
    x["weight"].requires_grad_()
    out = vgkern.linear_sample(**x, noise=noise(torch.arange(3)), backend=backend)
    assert not out.logp.requires_grad


def test_huge_seed_and_sequence_agree_between_backends():
    import conftest

    conftest.skip_unless_runs("cpu")
    x = model(n=5, v=333)
    n = vgkern.Noise(2**64 - 1, torch.tensor([2**62, 2**33, 1, 0, 7]), torch.tensor(2**32 - 1))
    a, b = (vgkern.linear_sample(**x, noise=n, backend=k) for k in ("torch", "cpu"))
    assert torch.equal(a.token, b.token)
