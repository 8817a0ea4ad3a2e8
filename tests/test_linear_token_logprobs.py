"""What is special to linear_token_logprobs: the head's gradients, ties, threads, frozen parts."""

import pytest
import torch
from torch import nn

import vgkern
from vgkern import case_inputs


def head(shape=(6,), h=16, v=200, dtype=torch.float32, seed=0, **kw):
    x, _, _ = case_inputs.head(shape, h, v, dtype, seed, **kw)
    return x["hidden"], x["weight"], x["targets"]


def test_equals_token_logprobs_on_the_logits(backend):
    h, w, y = head((3, 5), 64, 1035)
    a = vgkern.linear_token_logprobs(h, w, y, temperature=0.9, softcap=7.0, backend=backend)
    b = vgkern.token_logprobs(h @ w.T, y, temperature=0.9, softcap=7.0, backend=backend)
    torch.testing.assert_close(a.logp, b.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.entropy, b.entropy, rtol=1e-5, atol=1e-5)


def test_tied_embedding_gradients_add(backend):
    """R13: a tiny model whose head is its embedding has eager's gradient."""
    torch.manual_seed(0)
    table, mix = nn.Embedding(50, 8), nn.Linear(8, 8)
    ids, y = torch.arange(12) * 4 % 50, torch.arange(12) * 7 % 50

    def grads(fused):
        table.zero_grad(), mix.zero_grad()
        h = torch.tanh(mix(table(ids)))
        if fused:
            logp = vgkern.linear_token_logprobs(h, table.weight, y, backend=backend).logp
        else:
            logp = (h @ table.weight.T).log_softmax(-1).gather(-1, y[:, None])[:, 0]
        (-logp.mean()).backward()
        return table.weight.grad.clone(), mix.weight.grad.clone()

    for a, b in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_same_bits_at_any_thread_count_and_on_repeat(backend, threads):
    """R18: the forward and every gradient."""
    h, w, y = head((300,), 32, 1035)

    def run(count):
        threads(count)
        a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = vgkern.linear_token_logprobs(a, b, y, backend=backend)
        g = torch.autograd.grad(out.logp.sum() + out.entropy.square().sum(), (a, b))
        return (*(t.detach() for t in out), *g)

    for count in (1, 2):
        want = run(count)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(run(count), want, strict=True))
    for a, b in zip(run(1), run(2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rows_with_no_upstream_gradient_get_none(backend):
    h, w, y = head((20,))
    h.requires_grad_(), w.requires_grad_()
    out = vgkern.linear_token_logprobs(h, w, y, backend=backend)
    up = torch.zeros(20)
    up[[3, 11]] = torch.tensor([1.5, -2.0])
    gh, gw = torch.autograd.grad((out.logp * up).sum(), (h, w))
    assert sorted(gh.abs().sum(-1).nonzero().flatten().tolist()) == [3, 11]
    x, m = h.detach()[[3, 11]].requires_grad_(), w.detach().requires_grad_()
    few = vgkern.linear_token_logprobs(x, m, y[[3, 11]], backend=backend)
    want = torch.autograd.grad((few.logp * up[[3, 11]]).sum(), (x, m))
    torch.testing.assert_close(gh[[3, 11]], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gw, want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_of_values_and_gradients(dtype, backend):
    """R14: fp32 statistics, gradients in the dtype of their input, an fp32 bias beside bf16."""
    h, w, y = head(dtype=dtype)
    b = torch.zeros(200, requires_grad=True)
    h.requires_grad_(), w.requires_grad_()
    out = vgkern.linear_token_logprobs(h, w, y, bias=b, backend=backend)
    assert out.logp.dtype == out.entropy.dtype == torch.float32
    out.logp.sum().backward()
    assert (h.grad.dtype, w.grad.dtype, b.grad.dtype) == (dtype, dtype, torch.float32)


def test_autocast_changes_nothing(backend):
    h, w, y = head()
    want = vgkern.linear_token_logprobs(h, w, y, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = vgkern.linear_token_logprobs(h, w, y, backend=backend)
    torch.testing.assert_close(got.logp, want.logp, rtol=0, atol=1e-5)


def test_ignored_rows_may_hold_nan(backend):
    h, w, y = head()
    h[2] = torch.nan
    y[2] = -100
    h.requires_grad_(), w.requires_grad_()
    out = vgkern.linear_token_logprobs(h, w, y, backend=backend)
    gh, gw = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (h, w))
    assert gh.isfinite().all() and gw.isfinite().all() and (gh[2] == 0).all()


def test_views_of_the_weight(backend):
    """A head that is a slice of a fused projection, or transposed, gives the same and its gradient
    arrives in the parent."""
    h, w, y = head()
    want = vgkern.linear_token_logprobs(h, w, y, backend=backend).logp
    parent = torch.full((200, 40), torch.nan)
    parent[:, 5:21] = w
    parent.requires_grad_()
    got = vgkern.linear_token_logprobs(h, parent[:, 5:21], y, backend=backend).logp
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got.sum().backward()
    assert (parent.grad[:, :5] == 0).all() and (parent.grad[:, 21:] == 0).all()
    assert parent.grad[:, 5:21].abs().sum() > 0
    t = w.T.contiguous().requires_grad_()
    vgkern.linear_token_logprobs(h, t.T, y, backend=backend).logp.sum().backward()
    torch.testing.assert_close(t.grad.T, parent.grad[:, 5:21], rtol=1e-5, atol=1e-6)


def test_batches_concatenate(backend):
    h, w, y = head((50,), 64, 1000)
    whole = vgkern.linear_token_logprobs(h, w, y, backend=backend)
    parts = [vgkern.linear_token_logprobs(a, w, b, backend=backend)
             for a, b in zip(h.split(7), y.split(7), strict=True)]  # fmt: skip
    torch.testing.assert_close(torch.cat([p.logp for p in parts]), whole.logp, rtol=0, atol=5e-6)


def test_gradcheck_fp64():
    h, w, y = head((3,), 4, 6, torch.float64)
    b = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    h.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, c, d: tuple(vgkern.linear_token_logprobs(a, c, y, bias=d, softcap=4.0)), (h, w, b)
    )


def test_second_derivative_raises_on_native(backend):
    if backend == "torch":
        pytest.skip("the reference is differentiable twice")
    h, w, y = head()
    h.requires_grad_()
    out = vgkern.linear_token_logprobs(h, w, y, backend=backend)
    (g,) = torch.autograd.grad(out.logp.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()
