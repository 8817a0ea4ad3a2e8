"""Costates in fp16, which lacks their range: small ones beside large ones, and what overflows.

Everything row by row, against fp64: a norm over all rows would see the largest alone.
"""

import dataclasses

import conftest
import pytest
import torch

import vgkern
from vgkern import case_inputs

NAMES = ("hidden", "weight", "bias")
FP16 = 4e-3  # a few roundings to 11 bits


def batch(norms, head=torch.float16, he=9, relaxation="expected"):
    """A costate of each norm, and nothing else: advantages of 0. The largest is alone in half of
    the hidden state, so that the others' dW is not hidden behind its own."""
    n, h, v = len(norms), 16, 200
    x, _, _ = case_inputs.head((n,), h, v, torch.float32, 0, bias="plain", temperature=0.8)
    c = case_inputs.costates(x, 0, he=he, relaxation=relaxation)
    g = torch.Generator().manual_seed(1)
    value = torch.nn.functional.normalize(torch.randn(n, he, generator=g), dim=-1)
    value *= torch.tensor(norms)[:, None]
    far = int(torch.tensor(norms).argmax())
    x["hidden"][:, : h // 2] = x["hidden"][:, : h // 2].where(torch.arange(n)[:, None] == far, 0)
    x["hidden"][far, h // 2 :] = 0
    x |= {k: x[k].to(head) for k in NAMES}
    x["costate"] = dataclasses.replace(c, value=value, embedding=c.embedding.half())
    return {**x, "advantages": torch.zeros(n)}


def loss_grads(x, backend, by):
    y = {k: v.clone().requires_grad_() if k in NAMES else v for k, v in x.items()}
    out = vgkern.linear_policy_loss(**y, backend=backend, objective="dapo")
    return torch.autograd.grad(by * out.loss, [y[k] for k in NAMES])


def logp_grads(x, backend, by):
    keep = {k: v for k, v in x.items() if k in (*NAMES, "targets", "temperature", "costate")}
    keep["costate"] = dataclasses.replace(x["costate"], weight=by * x["costate"].weight)
    y = {k: v.clone().requires_grad_() if k in NAMES else v for k, v in keep.items()}
    out = vgkern.linear_token_logprobs(**y, backend=backend)
    return torch.autograd.grad(0 * out.logp.sum(), [y[k] for k in NAMES])


def truth(x, by):
    c = x["costate"]
    up = dataclasses.replace(c, value=c.value.double(), embedding=c.embedding.double())
    wide = {k: v.double() if k in NAMES else v for k, v in x.items()}
    return loss_grads({**wide, "costate": up}, "torch", by)


def held(got, want, most=FP16):
    """Every row of dh by its own norm; dW apart for the largest row and for all others; db."""
    dh, dw, db = (t.double() for t in got)
    assert all(t.isfinite().all() for t in (dh, dw, db))
    assert ((dh - want[0]).norm(dim=-1) <= most * want[0].norm(dim=-1)).all()
    half = dh.shape[1] // 2
    for part in (slice(0, half), slice(half, None)):
        assert (dw - want[1])[:, part].norm() <= most * want[1][:, part].norm()
    assert (db - want[2]).norm() <= most * want[2].norm()


@pytest.mark.parametrize("head", [torch.float16, torch.float32])
@pytest.mark.parametrize("relaxation", ["expected", "gumbel"])
@pytest.mark.parametrize("grads", [loss_grads, logp_grads], ids=["loss", "logp"])
@pytest.mark.parametrize("norms", [
    [1e-3, 1e-5, 1e-7, 1e-9, 3e-9], [1e-9] * 3, [1e6, 1.0, 30.0, 1e5, 1e3]
], ids=["small", "all-small", "large"])  # fmt: skip
def test_each_row_has_its_own_digits(backend, norms, grads, relaxation, head):
    """Norms a million apart, and on both sides of what fp16 holds (6e-8 to 65504). The factor
    brings the gradients, which are fp16 with the head, into that range."""
    x = batch(norms, head, relaxation=relaxation)
    by = 2.0 ** round(8.0 - torch.tensor(max(norms)).log2().item())
    held(grads(x, backend, by), truth(x, by))


def test_a_row_with_a_loss_beside_one_with_a_large_costate(backend):
    """The coefficients of the loss are scaled by row as well."""
    x = batch([1e6, 0.0, 0.0, 0.0])
    x["advantages"] = torch.tensor([0.0, 3.0, -1.0, 0.5])
    held(loss_grads(x, backend, 2.0**-5), truth(x, 2.0**-5))


@pytest.mark.parametrize("head", [torch.float16, torch.float32])
def test_a_loss_scale_of_65536(backend, head):
    """Times a costate of order 1 it is beyond fp16, whose gradients are not."""
    x = batch([1.0, 2.0, 1.5, 3e-3], head)
    x["costate"] = dataclasses.replace(x["costate"], embedding=x["costate"].embedding / 64)
    held(loss_grads(x, backend, 65536.0), truth(x, 65536.0))


def test_a_weight_that_fp16_lacks(backend):
    x = batch([1e-6, 2e-6, 3e-7])
    x["costate"] = dataclasses.replace(x["costate"], weight=1e8)
    held(loss_grads(x, backend, 1.0), truth(x, 1.0))


def test_a_masked_row_may_hold_nan_and_a_nan_is_said(backend):
    x = batch([1.0, 1e-8, 3.0])
    value = x["costate"].value.clone()
    value[1] = torch.nan
    x["costate"] = dataclasses.replace(x["costate"], value=value)
    with pytest.raises(vgkern.NonFiniteError, match=r"^costate.value: got nan at row \[1\]"):
        loss_grads(x, backend, 1.0)
    x["mask"] = torch.tensor([True, False, True])
    got = loss_grads(x, backend, 1.0)
    assert all(t.isfinite().all() for t in got) and (got[0][1] == 0).all()


@pytest.mark.parametrize("broken", ["largest", "scaled"])
def test_without_the_scale_of_a_row_it_fails(broken, monkeypatch):
    """What keeps fp16 in range is needed: these tests are red without it."""
    backend = "triton" if conftest.INTERPRETED else "cuda"
    conftest.skip_unless_runs(backend)
    from vgkern.kernels import linear

    x, by = batch([1e6, 0.1, 0.2]), 2.0**-5
    want = truth(x, by)
    held(loss_grads(x, backend, by), want)
    if broken == "largest":  # overflows
        monkeypatch.setattr(
            linear.Costates, "largest", lambda self, part, u, factor: torch.zeros(len(u))
        )
    else:  # one scale for all: the largest row erases the others
        power = linear.power
        monkeypatch.setattr(linear, "power", lambda most, x: power(most, x.amax().expand(x.shape)))
    with pytest.raises(AssertionError):
        held(loss_grads(x, backend, by), want)
