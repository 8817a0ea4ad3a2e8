"""The pendulum of the example: costates are autograd's, all estimators learn, broken ones don't."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import vgkern

path = Path(__file__).resolve().parent.parent / "examples" / "pendulum.py"
spec = importlib.util.spec_from_file_location("pendulum", path)
pendulum = importlib.util.module_from_spec(spec)
sys.modules["pendulum"] = pendulum  # its dataclasses look there
spec.loader.exec_module(pendulum)


@pytest.mark.parametrize("task", ["smooth", "stop"])
def test_scanned_costates_are_those_of_autograd(backend, task):
    """Against one graph through the whole rollout, the policy in it, the noise held fixed."""
    policies, steps = pendulum.Policies.random([0, 1]), 30
    with vgkern.use_backend(backend):
        r = pendulum.sample(task, policies, 0.5, pendulum.starts(2, 8, 4, 0, 0), steps, 1)
        mu = pendulum.action_costates(task, policies, r)
    s, total, actions = r.states[:, :, 0], 0.0, []
    for t in range(steps):
        a = policies(s)
        a = a + (r.actions[:, :, t] - a).detach()
        a.retain_grad()
        actions.append(a)
        s, cost = pendulum.step(task, s, a)
        total = total + cost.sum()
    total.backward()
    want = torch.stack([a.grad for a in actions], 2)
    assert float((mu - want).norm() / want.norm()) < 1e-5


def test_both_estimators_agree_in_expectation(backend):
    """The mean over replicates of score - pathwise is 0 within its error, score's alone isn't."""
    runs = 64
    policies = pendulum.Policies.random([0] * runs)
    with vgkern.use_backend(backend):
        start = pendulum.starts(runs, 64, 8, 0, 0)
        r = pendulum.sample("smooth", policies, 0.5, start, 6, 1)
        grads = []
        for weight in (0.0, 1.0):
            weights = torch.full((runs,), weight)
            loss = pendulum.surrogate("smooth", policies, 0.5, r, weights, 8).sum()
            found = torch.autograd.grad(loss, policies.weights)
            grads.append(torch.cat([g.flatten(1) for g in found], 1).double())
    score, path = grads
    along = path.mean(0) / path.mean(0).norm()  # one number for each replicate
    gap = (score - path) @ along
    error = float(gap.std()) / runs**0.5
    assert abs(float(gap.mean())) < 4 * error
    assert float((score @ along).mean()) > 8 * error


class Broken:
    """costate_scan with costates dealt to other rows and times, or none at all."""

    def __init__(self, how):
        self.how, self.true = how, vgkern.costate_scan

    def __call__(self, jacobian, local, terminal):
        found = self.true(jacobian, local, terminal)
        if self.how == "zeroed":
            return torch.zeros_like(found)
        order = torch.randperm(found[..., 0].numel(), generator=torch.Generator().manual_seed(0))
        return found.flatten(0, 1)[order].view_as(found)


def rise(weights, updates=40):
    """Return of the last 5 updates less that of the first, each run."""
    seeds = list(range(len(weights)))
    curve, _ = pendulum.train(
        "smooth", weights, [s % 2 for s in seeds], updates, 32, 8, 25, 0.5, 0.02
    )
    return curve[-5:].mean(0) - curve[0]


def test_every_estimator_learns_and_broken_costates_do_not(monkeypatch):
    good = rise([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])
    print("rise", good)
    broken = []
    for how in ("shuffled", "zeroed"):
        monkeypatch.setattr(pendulum.vgkern, "costate_scan", Broken(how))
        broken.append(rise([1.0, 1.0]))
        monkeypatch.undo()
        print(how, broken[-1])
    assert good.min() > 0.05
    assert max(float(b.max()) for b in broken) < 0.03
