"""16-bit hidden states and an fp32 head under autocast, the usual mixed precision."""

import pytest
import torch
import torch.nn.functional as F

import vgkern

N, H, V = 12, 16, 50


def inputs(dtype):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(N, H, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(V, H, generator=g) / 4).requires_grad_()
    return h, w, torch.randint(V, (N,), generator=g), torch.randn(N, generator=g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_log_probs_as_eager(dtype, compiled, backend):
    h, w, y, a = inputs(dtype)

    def ours(h, w):
        return vgkern.linear_token_logprobs(h, w, y, backend=backend).logp @ a

    if compiled:
        torch._dynamo.reset()
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        got = ours(h, w)
        wanted = F.linear(h, w).float().log_softmax(-1).gather(1, y[:, None])[:, 0] @ a
    grads = torch.autograd.grad(got, (h, w))
    for x, t in zip(grads, torch.autograd.grad(wanted, (h, w)), strict=True):
        assert x.dtype == t.dtype
        assert float((x - t).float().norm()) <= 2e-2 * float(t.float().norm())
    assert abs(float((got - wanted).detach())) <= 2e-2 * float(a.abs().sum())


def test_loss_and_sample(backend):
    h, w, y, a = inputs(torch.bfloat16)
    noise = vgkern.Noise(0, torch.arange(N), torch.zeros(N, dtype=torch.int64))
    with torch.autocast("cpu", torch.bfloat16):
        out = vgkern.linear_policy_loss(h, w, y, a, objective="dapo", backend=backend)
        token = vgkern.linear_sample(h, w, noise, backend=backend).token
    out.loss.backward()
    assert h.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32 and w.grad.any()
    plain = vgkern.linear_sample(h, w.bfloat16(), noise, backend=backend).token
    assert torch.equal(token, plain) or backend == "torch"  # which multiplies in fp32


def test_without_autocast_the_remedy_is_named(backend):
    h, w, y, _ = inputs(torch.bfloat16)
    with pytest.raises(TypeError, match=r"weight: got float32.*as hidden.*torch\.autocast"):
        vgkern.linear_token_logprobs(h, w, y, backend=backend)
    with torch.autocast("cpu", torch.float16), pytest.raises(TypeError, match="as hidden"):
        vgkern.linear_token_logprobs(h, w, y, backend=backend)
