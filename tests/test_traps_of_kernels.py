"""The field's known traps that concern how kernels are made, by number; the others are in
test_traps.py."""

import ast
from pathlib import Path

import pytest
import torch

import vgkern
from vgkern import case_inputs, objectives

ROOT = Path(__file__).resolve().parent.parent


def head(shape=(6,), h=16, v=200, dtype=torch.float32, seed=0):
    x, logp, _ = case_inputs.head(shape, h, v, dtype, seed)
    return x["hidden"], x["weight"], x["targets"], logp


def kernels():
    """(file, function, its constexpr arguments, names that it is told not to specialise)."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(
                lambda d: ast.unparse(d).partition("(")[0], node.decorator_list
            ):
                fixed = {
                    a.arg
                    for a in node.args.args
                    if a.annotation is not None and "constexpr" in ast.unparse(a.annotation)
                }
                yield path.name, node.name, fixed


def test_trap_14_no_compile_per_length_or_temperature():
    """No size that changes from call to call, and no real number, is a constant of a kernel."""
    moving = {"T", "R", "V", "H", "n", "rows", "length", "vocab", "temperature", "beta", "tau",
              "gamma", "clip_low", "clip_high", "seed", "ignore_index"}  # fmt: skip
    found = list(kernels())
    assert len(found) > 20
    wrong = [(file, k, a) for file, k, fixed in found for a in fixed if a in moving]
    assert not wrong


def test_trap_15_no_limit_of_65535_rows(backend):
    """Rows are the first dimension of a grid, which takes 2^31 - 1; here more than 65,535."""
    n = 70_000 if backend in ("torch", "cpu") else 0
    if not n:
        pytest.skip("emulated row by row; test_gate.py refuses such a grid from its launch")
    z = torch.zeros(n, 2)
    out = vgkern.token_logprobs(z, torch.zeros(n, dtype=torch.int64), backend=backend)
    assert torch.allclose(out.logp, torch.tensor(-0.6931472))


def test_trap_19_expanded_gradients(backend):
    """`.sum()` sends a gradient whose strides are 0."""
    h, w, y, _ = head()
    got, want = h.clone().requires_grad_(), h.clone().requires_grad_()
    vgkern.linear_token_logprobs(got, w, y, backend=backend).logp.sum().backward()
    out = vgkern.linear_token_logprobs(want, w, y, backend=backend).logp
    out.backward(torch.ones(6))
    assert torch.equal(got.grad, want.grad)


def test_trap_20_hidden_gradient_sums_in_fp32(backend):
    """Over a vocabulary of many tiles the only rounding to bf16 is the last one."""
    v = 3000 if backend in ("torch", "cpu") else 1100
    h, w, y, _ = head((8,), 32, v, torch.bfloat16)
    h.requires_grad_()
    vgkern.linear_token_logprobs(h, w, y, backend=backend).logp.sum().backward()
    wide = h.detach().double().requires_grad_()
    lp = (wide @ w.double().T).log_softmax(-1).gather(1, y[:, None])
    (want,) = torch.autograd.grad(lp.sum(), wide)
    assert float((h.grad.double() - want).norm() / want.norm()) < 3e-3


def test_trap_21_no_gradient_is_filtered_by_its_size(backend):
    """The gradient is linear in what arrives from above: nothing small is dropped."""
    h, w, y, _ = head((6,), 16, 1000)
    h.requires_grad_()
    logp = vgkern.linear_token_logprobs(h, w, y, backend=backend).logp
    (one,) = torch.autograd.grad(logp, h, torch.ones(6), retain_graph=True)
    for scale in (2.0**20, 2.0**-20):
        (other,) = torch.autograd.grad(logp, h, torch.full((6,), scale), retain_graph=True)
        assert torch.equal(other / scale, one)


def test_trap_22_no_atomics_and_no_locks():
    """Floating-point atomics would make the order of a sum a matter of chance."""
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "csrc").glob("*.cu*")]:
        assert "atomic" not in path.read_text().lower().replace("no atomics", ""), path.name


@pytest.mark.parametrize("name", ["gmpo", "gspo", "luspo", "dapo"])
def test_trap_28_a_micro_batch_has_the_gradient_of_its_share(name, backend):
    o = objectives.PRESETS[name]
    g = torch.Generator().manual_seed(0)
    logp = -2 * torch.rand(6, 5, generator=g)
    old, a = logp + 0.1 * torch.randn(6, 5, generator=g), torch.randn(6, generator=g)
    norm = 30.0 if o.reduction == "token" else 6.0

    def grad(rows):
        lp = logp[rows].clone().requires_grad_()
        loss = vgkern.policy_loss(lp, a[rows], objective=o, old_logp=old[rows], normalizer=norm,
                                  backend=backend).loss  # fmt: skip
        return torch.autograd.grad(loss, lp)[0]

    parts = torch.cat([grad(slice(0, 1)), grad(slice(1, 6))])
    torch.testing.assert_close(parts, grad(slice(0, 6)), rtol=1e-5, atol=1e-7)


def test_trap_30_nothing_draws_from_the_global_generator(backend):
    h, w, y, logp = head((2, 3))
    before = torch.get_rng_state()
    h.requires_grad_()
    noise = vgkern.Noise(0, torch.arange(2)[:, None], torch.arange(3))
    vgkern.linear_sample(h, w, noise, backend=backend)
    vgkern.linear_policy_loss(
        h, w, y, torch.tensor([1.0, -1.0]), old_logp=logp.float(), backend=backend
    ).loss.backward()
    assert torch.equal(before, torch.get_rng_state())


def test_trap_31_every_tensor_has_its_own_strides(backend):
    """A mask, targets and log-probs that are views of wider tensors."""
    h, w, y, logp = head((4, 6))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:] = False
    a = torch.tensor([1.0, -1.0, 0.5, 2.0])

    def wide(x):
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    def loss(view):
        return vgkern.linear_policy_loss(
            h, w, view(y), view(a), old_logp=view(logp.float()), mask=view(mask), backend=backend
        ).loss

    assert torch.equal(loss(wide), loss(torch.Tensor.contiguous))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap_34_half_precision_is_sampled_in_fp32(dtype, backend):
    n = 20_000 if backend in ("torch", "cpu") else 2_000
    w = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).log()[:, None].to(dtype)
    p = w.double().flatten().softmax(0)
    noise = vgkern.Noise(5, torch.arange(n), torch.tensor(1))
    out = vgkern.linear_sample(torch.ones(n, 1, dtype=dtype), w, noise, backend=backend)
    chi2 = ((out.token.bincount(minlength=6) - n * p).square() / (n * p)).sum()
    assert chi2 < 20.5  # the 99.9 % point of 5 degrees of freedom


def test_trap_35_no_autotuning_of_kernels_that_write_in_place():
    for path in (ROOT / "kernels").glob("*.py"):
        assert "autotune" not in path.read_text(), path.name
