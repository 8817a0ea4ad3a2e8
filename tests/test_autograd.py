"""What autograd may ask of any op: subsets of gradients, twice, again through torch.func, once more
for a second derivative. By the cases of the ops that have gradients."""

import itertools

import pytest
import torch
from oracle import NOT_DIFFERENTIABLE, inputs, outputs, run, upstream

import vgkern
from vgkern import cases

# Per op one case with every tensor that may want a gradient, and per path of its backward one.
CASES = ("token_logprobs-v1000-softcap", "linear_token_logprobs-h123-v1035-all",
         "policy_loss-full", "policy_loss-gspo", "linear_policy_loss-full-bias",
         "linear_policy_loss-gspo", "linear_token_logprobs-all-cuts", "gaussian_action-n7-3d",
         "costate_scan-n33-done", "linear_rollout-n4-shared", "noisy_embedding-h123-v1035-all",
         "linear_divergence-h123-v1035-jsd", "linear_policy_loss-costate-full",
         "linear_policy_loss-costate-gspo", "linear_token_logprobs-costate-all")  # fmt: skip


def prepared(name, backend):
    case = cases.by_name(name)
    x = inputs(case, torch.float32, backend)
    op = getattr(vgkern, case.op)

    def plain(**k):
        return outputs(op(**k, backend=backend), "out")

    return case, x, plain, upstream(case, plain(**x))


def total(out, up):
    return sum((out[k] * u).sum() for k, u in up.items() if k not in NOT_DIFFERENTIABLE)


def test_every_op_with_gradients_is_here():
    assert {cases.by_name(n).op for n in CASES} == {c.op for c in cases.CASES if c.grads}


@pytest.mark.parametrize("name", CASES)
def test_any_subset_of_gradients(name, backend):
    case, x, plain, up = prepared(name, backend)
    _, want = run(plain, x, case.grads, up)
    leaves = [k for k in case.grads if k in x]
    for n in range(len(leaves) + 1):
        for some in itertools.combinations(leaves, n):
            given = {**x, **{k: x[k].detach().clone().requires_grad_(k in some) for k in leaves}}
            loss = total(plain(**given), up)
            assert loss.requires_grad == bool(some)
            if some:
                loss.backward()
            for k in leaves:
                assert (given[k].grad is not None) == (k in some)
                if k in some:
                    torch.testing.assert_close(given[k].grad, want[f"d{k}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_backward_twice_is_the_same_twice(name, backend):
    case, x, plain, up = prepared(name, backend)
    leaves = [k for k in case.grads if k in x]
    given = {**x, **{k: x[k].detach().clone().requires_grad_() for k in leaves}}
    loss = total(plain(**given), up)
    wanted = [given[k] for k in leaves]
    one = torch.autograd.grad(loss, wanted, retain_graph=True)
    kept = [g.clone() for g in one]
    two = torch.autograd.grad(loss, wanted)
    for a, b, c in zip(one, kept, two, strict=True):
        assert torch.equal(a, b), "the second backward changed what the first returned"
        assert torch.equal(b, c)


@pytest.mark.parametrize("name", CASES)
def test_torch_func_grad(name, backend):
    case, x, plain, up = prepared(name, backend)
    leaves = [k for k in case.grads if k in x]
    _, want = run(plain, x, case.grads, up)

    def loss(*args):
        return total(plain(**{**x, **dict(zip(leaves, args, strict=True))}), up)

    got = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*(x[k] for k in leaves))
    for k, g in zip(leaves, got, strict=True):
        torch.testing.assert_close(g, want[f"d{k}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_right_or_refused_with_advice(name, backend):
    case, x, plain, up = prepared(name, backend)
    k = case.grads[0]
    leaf = x[k].detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(total(plain(**{**x, k: leaf}), up), leaf, create_graph=True)
    if backend == "torch":
        assert torch.autograd.grad(g.square().sum(), leaf)[0].isfinite().all()
        return
    with pytest.raises(RuntimeError, match="backend='torch'"):
        torch.autograd.grad(g.square().sum(), leaf)
