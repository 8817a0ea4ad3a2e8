"""Weights of the pathwise part: schedules, and the estimate against the optimum it stands for."""

import pytest
import torch

from vgkern import costate
from vgkern.costate import Mix


def test_schedules():
    assert Mix.constant(0.25)(7) == costate.Weights(0.75, 0.25)
    mix = Mix.annealed(0.9, 0.0, 20)
    assert [round(mix(s).pathwise, 12) for s in (0, 5, 10, 19, 20, 99)] == [
        0.9, 0.675, 0.45, 0.045, 0.0, 0.0,
    ]  # fmt: skip
    assert Mix.annealed(0.2, 0.6, 4)(2) == costate.Weights(0.6, 0.4)
    for step in range(30):
        w = mix(step)
        assert w.score + w.pathwise == 1


def draws(n, bias, sd_score, sd_path, shared, seed, size=40):
    """n parts of two gradients with a known mean, bias, variances and covariance."""
    g = torch.Generator().manual_seed(seed)
    e, f = (torch.randn(n, size, generator=g).double() for _ in range(2))
    truth = torch.ones(size).double()
    b = bias * truth / truth.norm()
    return truth + sd_score * e, truth + b + sd_path * (shared * e + (1 - shared**2) ** 0.5 * f)


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize(
    "bias, sd_path, shared", [(3.0, 0.3, 0.0), (1.0, 1.0, 0.6), (20.0, 0.1, 0)]
)
def test_bias_aware_finds_the_weight_of_least_error(parts, bias, sd_path, shared):
    mix = Mix.bias_aware(start=0.5, decay=0.998)
    assert mix(0).pathwise == 0.5  # nothing seen yet
    sd, size = 2.0, 40
    for seed in range(1500):
        mix.update(*draws(parts, bias, sd, sd_path, shared, seed))
    v, w, c = (size * x / parts for x in (sd**2, sd_path**2, sd * sd_path * shared))
    best = min((v - c) / (bias**2 + v + w - 2 * c), 1.0)  # a negative score weight: not offered
    assert abs(mix(0).pathwise - best) < 0.03

    def error(a):  # of the mean over the parts
        return (a * bias) ** 2 + a * a * w + (1 - a) ** 2 * v + 2 * a * (1 - a) * c

    assert error(mix(0).pathwise) < 1.01 * error(best) <= 1.01 * min(error(0.0), error(1.0))


def test_bias_aware_stays_within_bounds():
    mix = Mix.bias_aware(decay=0.0)
    score, path = draws(2, 0.0, 1.0, 0.0, 0.0, 3)
    mix.update(score, path)  # by chance num > den is possible, never a > 1
    assert 0 <= mix(0).pathwise <= 1
    mix.update(path, score)  # the "score" is exact: nothing to gain
    assert mix(0) == costate.Weights(1.0, 0.0)
    mix.update(score, score)  # no difference at all: no information, no division by 0
    assert 0 <= mix(0).pathwise <= 1


def test_bad_input():
    two = torch.ones(2, 3)
    for call, message in (
        (lambda: Mix.constant(1.5), "start: got float 1.5; allowed: 0 <= start <= 1"),
        (lambda: Mix.annealed(0.9, -0.1), "end: got float -0.1"),
        (lambda: Mix.annealed(steps=-1), "steps: got int -1"),
        (lambda: Mix.annealed(steps=2.5), "steps: got float 2.5"),
        (lambda: Mix.bias_aware(decay=1.0), "decay: got float 1.0"),
        (lambda: Mix.annealed()(-1), "step: got int -1"),
        (lambda: Mix.annealed().update(two, two), "mix: update"),
        (lambda: Mix.bias_aware().update(two[:1], two[:1]), r"score: .*n >= 2 parts"),
        (lambda: Mix.bias_aware().update(two, two[:, :2]), r"pathwise: .*\[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_reaches_the_weights(bad):
    mix = Mix.bias_aware()
    fine = draws(4, 1.0, 1.0, 0.3, 0.0, 0)
    mix.update(*fine)
    before = (mix.covariance, mix.distance, mix(0))
    for i, name in enumerate(("score", "pathwise")):
        given = [x.clone() for x in fine]
        given[i][2, 5] = bad
        with pytest.raises(ValueError, match=rf"{name}: got {bad} at \[2, 5\]; allowed: finite"):
            mix.update(*given)
        assert (mix.covariance, mix.distance, mix(0)) == before
    for name in ("covariance", "distance"):  # as a checkpoint of a run that went wrong has them
        with pytest.raises(ValueError, match=f"{name}: got float {bad}; allowed: a finite number"):
            Mix(0.5, 0.5, decay=0.9, **{name: bad})
        restored = Mix.bias_aware()
        setattr(restored, name, bad)
        with pytest.raises(ValueError, match=f"{name}: got float {bad}"):
            restored(0)
