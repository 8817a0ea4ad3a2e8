"""What is special to policy_loss; its formulas are in test_objectives.py."""

import pytest
import torch

import vgkern
from vgkern import Objective

LP = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -1.5]])
A = torch.tensor([1.0, -0.5])


def test_packed_rows_equal_the_padded_batch(backend):
    """Token-level objectives on [N]: what a [B, T] batch with a mask gives."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    old = LP + 0.05
    x = LP.clone().requires_grad_()
    whole = vgkern.policy_loss(x, A, objective="dapo", old_logp=old, mask=mask, backend=backend)
    (want,) = torch.autograd.grad(whole.loss, x)
    p = LP[mask].requires_grad_()
    packed = vgkern.policy_loss(
        p, A[:, None].expand(2, 3)[mask], objective="dapo", old_logp=old[mask], backend=backend
    )
    (got,) = torch.autograd.grad(packed.loss, p)
    torch.testing.assert_close(packed.loss, whole.loss)
    torch.testing.assert_close(got, want[mask])


@pytest.mark.parametrize("kind", ["bool", "float", "int64"])
def test_masks_of_any_dtype(kind, backend):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    want = vgkern.policy_loss(LP, A, mask=mask.bool(), backend=backend)
    got = vgkern.policy_loss(LP, A, mask=mask.to(getattr(torch, kind)), backend=backend)
    assert torch.equal(got.loss, want.loss)


def test_strided_inputs(backend):
    t = LP.T.contiguous().T
    want = vgkern.policy_loss(LP, A, old_logp=LP + 0.1, backend=backend)
    got = vgkern.policy_loss(t, A[:, None], old_logp=t + 0.1, backend=backend)
    assert torch.equal(got.loss, want.loss)
    wide = torch.full((2, 9), torch.nan)
    wide[:, 3:6] = LP
    wide.requires_grad_()
    out = vgkern.policy_loss(wide[:, 3:6], A, old_logp=LP + 0.1, backend=backend)
    (g,) = torch.autograd.grad(out.loss, wide)
    assert torch.equal(out.loss, want.loss) and (g[:, :3] == 0).all() and (g[:, 6:] == 0).all()


def test_old_reference_and_sampler_get_no_gradient(backend):
    logs = [LP.clone().requires_grad_() for _ in range(4)]
    a = A.clone().requires_grad_()
    out = vgkern.policy_loss(
        logs[0], a, objective=Objective(beta=0.1, sampler_correction="token_truncate"),
        old_logp=logs[1], ref_logp=logs[2], sampler_logp=logs[3], backend=backend
    )  # fmt: skip
    out.loss.backward()
    assert logs[0].grad is not None
    assert all(t.grad is None for t in (*logs[1:], a))


def test_entropy_alone_may_be_trained(backend):
    e = torch.ones(2, 3, requires_grad=True)
    out = vgkern.policy_loss(
        LP, A, objective=Objective(entropy_coef=0.5, reduction="sum"), entropy=e, backend=backend
    )
    (g,) = torch.autograd.grad(3 * out.loss, e)
    torch.testing.assert_close(g, torch.full((2, 3), -1.5))


def test_weight_of_sampler_correction_is_bounded_and_detached(backend):
    """Truncated at its bound; masked to exactly 0; the sampler's error of 1e4 stays finite."""
    sampler = LP - torch.tensor([[0.0, 1e4, 0.5], [2.0, -1e4, 0.0]])
    for c in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        x = LP.clone().requires_grad_()
        o = Objective(sampler_correction=c, sampler_max=2.0, reduction="sum")
        out = vgkern.policy_loss(
            x, torch.ones(2), objective=o, old_logp=LP, sampler_logp=sampler, backend=backend
        )
        (g,) = torch.autograd.grad(out.loss, x)
        assert g.isfinite().all() and (g.abs() <= 2.0).all(), c
        if c == "token_mask":
            assert g[0, 1] == 0 and g[1, 0] == 0 and g[0, 2] == pytest.approx(-(2.718281828**0.5))
        if c == "token_truncate":
            assert g[0, 1] == -2.0 and g[1, 0] == -2.0


def test_gradcheck_fp64():
    o = Objective(beta=0.2, entropy_coef=0.1, clip_high=0.28)
    lp, e = LP.double().requires_grad_(), torch.rand(2, 3).double().requires_grad_()
    for ratio in ("token", "sequence"):
        assert torch.autograd.gradcheck(
            lambda x, y, r=ratio: vgkern.policy_loss(
                x, A.double(), objective=o.replace(ratio=r), old_logp=LP.double() + 0.05,
                ref_logp=LP.double() - 0.3, entropy=y,
                mask=torch.tensor([[1, 1, 0], [1, 1, 1]])).loss,
            (lp, e),
        )  # fmt: skip
