"""The pendulum of the example: costates are autograd's, all estimators learn, broken ones don't."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import vgkern

LEARNT = 0.15  # return per step; the best is 1, hanging 0
path = Path(__file__).resolve().parent.parent / "examples" / "pendulum.py"
spec = importlib.util.spec_from_file_location("pendulum", path)
pendulum = importlib.util.module_from_spec(spec)
sys.modules["pendulum"] = pendulum  # its dataclasses look there
spec.loader.exec_module(pendulum)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Small tensors: threads would only wait for each other."""
    threads(1)


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


def test_every_estimator_learns_and_broken_costates_do_not(monkeypatch):
    """One batch of ten runs, two seeds of each kind: score, mixed, pathwise, pathwise with costates
    dealt to other rows and times with random signs (their mean alone is enough to learn from: it
    says which way to push), pathwise with none."""
    true = vgkern.costate_scan

    def broken_for_the_last(jacobian, local, terminal):
        found = true(jacobian, local, terminal).unflatten(0, (10, -1)).clone()
        rows = found[6:8].reshape(-1, 2)
        g = torch.Generator().manual_seed(0)
        sign = torch.randint(0, 2, (len(rows), 1), generator=g) * 2 - 1
        found[6:8] = (sign * rows[torch.randperm(len(rows), generator=g)]).view_as(found[6:8])
        found[8:] = 0
        return found.flatten(0, 1)

    monkeypatch.setattr(pendulum.vgkern, "costate_scan", broken_for_the_last)
    weights = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    curve, _ = pendulum.train("smooth", weights, [0, 2] * 5, 16, 32, 8, 40, 0.5, 0.03)
    rise = curve[-3:].mean(0) - curve[0]
    assert rise[:6].min() > LEARNT, rise
    assert rise[6:].max() < LEARNT / 2, rise
