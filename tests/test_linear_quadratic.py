"""The linear-quadratic ground truth, through the ops of the example: costates against Riccati's P,
gradients of the gain against their exact value, the variance of the two estimators."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

import vgkern

ROOT = Path(__file__).resolve().parent.parent


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lq = load("examples/linear_quadratic.py")

# one number and several; more states than actions; T = 1; the longest of the table; no noise to 1
CELLS = [(1, 1, 2, 1.0), (2, 1, 1, 0.1), (3, 2, 16, 1.0), (6, 3, 32, 0.3), (4, 2, 128, 0.03)]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Small tensors: threads would only wait for each other."""
    threads(1)


def values(system, gain, steps):
    """P_t by the definition of a quadratic form: the cost of the noiseless closed loop, rolled out
    from every basis vector, e_i'P e_j = sum_u s_u(e_i)'G s_u(e_j). No recursion in P."""
    M, G = system.A + system.B @ gain, system.Q + gain.mT @ system.R @ gain
    s = [torch.eye(len(M), dtype=M.dtype)]
    for _ in range(steps):
        s.append(M @ s[-1])
    total = [sum(s[u].mT @ G @ s[u] for u in range(k)) for k in range(steps + 1)]
    return torch.stack([total[k] + s[k].mT @ system.Q @ s[k] for k in reversed(range(steps + 1))])


def problem(n, m, steps, dtype, pairs=4):
    exact, K = lq.random_system(n, m, seed=n)
    start = torch.randn(pairs, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    gain = K.to(dtype).expand(2 * pairs, m, n)
    return exact.to(dtype), gain, start, values(exact, K, steps).to(dtype)


def relative(got, want):
    return float((got - want).norm() / want.norm())


def precisions(backend):
    """fp64 has a torch backend only."""
    yield torch.float32, 1e-5
    if backend == "torch":
        yield torch.float64, 1e-12


@pytest.mark.parametrize("n, m, steps, sigma", CELLS)
def test_costate_of_an_antithetic_pair_is_the_value_gradient(backend, n, m, steps, sigma):
    """Costates are affine in the noise, so two paths give their conditional mean without error."""
    for dtype, tolerance in precisions(backend):
        system, gain, start, P = problem(n, m, steps, dtype)
        # the path of -eps from s is minus the path of eps from -s
        both, sequence = torch.cat([start, -start]), torch.arange(len(start)).repeat(2) + 2**33
        with vgkern.use_backend(backend):
            z = lq.rollout(system, gain, sigma, both, 7, sequence, steps)
            first = lq.costates(system, gain, z)[0][:, 0]
        plus, minus = first.chunk(2)
        want = 2 * start @ P[0]
        assert relative((plus - minus) / 2, want) < tolerance
        assert relative(plus, want) > 1e-3  # one path is not it


@pytest.mark.parametrize("n, m, steps, _", CELLS)
def test_without_noise_every_costate_is_the_value_gradient(backend, n, m, steps, _):
    for dtype, tolerance in precisions(backend):
        system, gain, start, P = problem(n, m, steps, dtype)
        sequence = torch.arange(len(start))
        with vgkern.use_backend(backend):
            z = lq.rollout(system, gain[: len(start)], 0.0, start, 7, sequence, steps)
            costates, _ = lq.costates(system, gain[: len(start)], z)
        want = 2 * (z[:, :, None, m:] @ P).squeeze(2)
        for t in range(steps + 1):
            assert relative(costates[:, t], want[:, t]) < tolerance, t


def test_riccati_of_the_example():
    """The recursion against the definition; the value of a noisy path against a mean of many."""
    system, K = lq.random_system(3, 2, seed=3)
    P, c = lq.riccati(system, K, 0.5, 9)
    assert relative(P, values(system, K, 9)) < 1e-12
    n = 4000
    start = torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64)
    z = lq.rollout(system, K.expand(n, 2, 3), 0.5, start.expand(n, 3), 1, torch.arange(n), 9)
    each = lq.cost(system, z).sum(1)
    want = float(start @ P[0] @ start + c[0])
    assert abs(float(each.mean()) - want) < 4 * float(each.std()) / n**0.5


def test_both_ops_take_the_same_action(backend):
    """`gaussian_action` replays, from the address alone, what `linear_rollout` put into the path;
    the gradient of its `action` times the costate is the whole pathwise gradient."""
    system, gain, start, _ = problem(3, 2, 16, torch.float32)
    gain, sequence = gain[: len(start)].clone().requires_grad_(), torch.arange(len(start)) + 2**33
    with vgkern.use_backend(backend):
        z = lq.rollout(system, gain, 0.3, start, 7, sequence, 16)
        (whole,) = torch.autograd.grad(lq.cost(system, z).sum(), gain)
        at = vgkern.Noise(7, sequence[:, None], torch.arange(16))
        s = z.detach()[:, :-1, 2:]
        log_std = torch.tensor(0.3).log()
        action = vgkern.gaussian_action(s @ gain.mT, log_std, at).action
        _, mu = lq.costates(system, gain.detach(), z.detach())
        (scanned,) = torch.autograd.grad((action * mu).sum(), gain)
    torch.testing.assert_close(action, z[:, :-1, :2], rtol=1e-5, atol=1e-5)
    assert relative(scanned, whole) < 1e-5
    assert relative(scanned, 0.9 * whole) > 1e-2


def exact_gradient(system, gain, sigma, start, steps):
    """Of the expected cost from `start` in K: sum_t 2 (R K + B'P_{t+1} (A + B K)) E[s_t s_t']."""
    A, B, R = system.A, system.B, system.R
    P, S, total = values(system, gain, steps), torch.outer(start, start), 0.0
    for t in range(steps):
        total = total + 2 * (R @ gain + B.mT @ P[t + 1] @ (A + B @ gain)) @ S
        S = (A + B @ gain) @ S @ (A + B @ gain).mT + sigma**2 * B @ B.mT
    return total


@functools.cache
def gradients(steps, sigma, baseline, rollouts):
    """(exact [m, n], pathwise and score [N, m, n], one for each rollout) from one start; fp64."""
    system, K = lq.random_system(3, 2, seed=0)
    start = torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64)
    found = []
    for at in torch.arange(rollouts).split(5000):
        gain = K.repeat(len(at), 1, 1).requires_grad_()
        path, score = lq.losses(
            system, gain, sigma, start.expand(len(at), 3), 11, at, steps, torch.zeros_like(at),
            baseline, lq.riccati(system, K, sigma, steps),
        )  # fmt: skip
        found.append(
            [torch.autograd.grad(x.sum(), gain, retain_graph=True)[0] for x in (path, score)]
        )
    both = [torch.cat(x) for x in zip(*found, strict=True)]
    return exact_gradient(system, K, sigma, start, steps), *both


def once(backend):
    if backend != "torch":
        pytest.skip("fp64 has a torch backend only")


@pytest.mark.parametrize(
    "steps, sigma, baseline", [(8, 0.3, "reward-to-go"), (4, 1.0, "exact value")]
)
def test_policy_gradients_are_unbiased(backend, steps, sigma, baseline):
    once(backend)
    want, *both = gradients(steps, sigma, baseline, 40_000)
    for each in both:
        z = (each.mean(0) - want) / (each.std(0) / len(each) ** 0.5)
        assert float(z.abs().max()) < 5, z


@pytest.mark.parametrize("steps", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.3, 1.0])
def test_score_has_three_times_the_variance_of_pathwise(backend, steps, sigma):
    """With the best of the three baselines, the exact value. All: benchmarks/linear_quadratic.py"""
    once(backend)
    _, path, score = gradients(steps, sigma, "exact value", 2_000)
    assert float(score.var(0).sum() / path.var(0).sum()) >= 3


def test_training_lowers_the_cost(backend):
    once(backend)
    curves = lq.train(seeds=1, updates=25, rollouts=16, steps=8)
    for name, x in curves.items():
        assert (x[-1] < 0.7 * x[0]).all(), (name, x[0], x[-1])
    assert curves["pathwise"][-1].mean() < curves["score"][-1].mean()


@pytest.mark.parametrize("argument, change", [("local_grad", -1), ("initial", 1)])
def test_jacobians_that_do_not_chain(argument, change):
    """One exception that names the argument, what it was and the shape that would chain."""
    A, n = torch.zeros(2, 4, 3, 3), 3 + change
    with pytest.raises(ValueError, match=rf"^{argument}: got .*{n}\].*allowed: .*3\], as jacobian"):
        if argument == "local_grad":
            vgkern.costate_scan(A, torch.zeros(2, 4, n), torch.zeros(2, 3))
        else:
            at = vgkern.Noise(0, torch.arange(2)[:, None], torch.arange(4))
            vgkern.linear_rollout(A, torch.zeros(3), 0.1, torch.zeros(2, n), at)
