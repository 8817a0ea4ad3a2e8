"""How much of a step is pathwise credit, and how much the unbiased score (formulas ours).

    gradient = (1 - a) g_score + a g_pathwise

g_score is unbiased and noisy, g_pathwise (hops) is quiet and biased by b. With v the variances and
c the covariance of the two, traces over the parameters, the mean-squared error of the mixture is
least at

    a = (v_score - c) / (|b|^2 + v_score + v_pathwise - 2 c) = num / den,    kept within [0, 1]
    num = tr Cov(g_score, g_score - g_pathwise)         den = E |g_score - g_pathwise|^2

Both are plain moments of gradients that parts of a batch give, so neither the bias nor the
variances need estimates of their own. n independent parts (micro-batches, groups), of which the
step takes the mean, with d_j = g_score_j - g_pathwise_j:

    num_t = sum_j <g_score_j - mean g_score, d_j - mean d> / (n (n - 1))     den_t = |mean d|^2

and a = EMA(num) / EMA(den). A weight by inverse variance alone, blind to b, is clearly worse where
the pathwise part is biased.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from vgkern.ops import _check


class Weights(NamedTuple):
    """Factors of the two parts; they add up to 1."""

    score: float
    pathwise: float


@dataclass
class Mix:
    """Weight of the pathwise part against the score, by step. Made by one of its constructors.

        mix = Mix.annealed(0.9, 0.0, steps=20)
        w = mix(step)
        hops.backward(w.score * score_loss, weight=w.pathwise)

    covariance and distance are the running num and den of a bias-aware Mix: save and restore them
    with a run.
    """

    start: float
    end: float
    steps: int = 0
    decay: float | None = None  # not None: bias-aware
    covariance: float = 0.0
    distance: float = 0.0

    def __post_init__(self) -> None:
        for name, a in (("start", self.start), ("end", self.end)):
            if not 0 <= a <= 1:
                raise _check.fail(name, a, f"0 <= {name} <= 1, a weight")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise _check.fail("steps", self.steps, "an int >= 0")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise _check.fail("decay", self.decay, "0 <= decay < 1")
        self._moments()

    def _moments(self) -> None:
        _check.finite("covariance", self.covariance)
        if not 0 <= self.distance < math.inf:
            raise _check.fail("distance", self.distance, "a finite number >= 0")

    @classmethod
    def constant(cls, weight: float) -> "Mix":
        return cls(weight, weight)

    @classmethod
    def annealed(cls, start: float = 0.9, end: float = 0.0, steps: int = 20) -> "Mix":
        """start at step 0, linearly to end at step `steps`, and end from there on."""
        return cls(start, end, steps)

    @classmethod
    def bias_aware(cls, start: float = 0.5, decay: float = 0.9) -> "Mix":
        """`start` until the first `update`, then the running estimate of the best weight."""
        return cls(start, start, decay=decay)

    def __call__(self, step: int = 0) -> Weights:
        if step < 0:
            raise _check.fail("step", step, "step >= 0")
        self._moments()
        if self.decay is not None and self.distance > 0:
            a = min(max(self.covariance / self.distance, 0.0), 1.0)
        elif step < self.steps:
            a = self.start + (self.end - self.start) * step / self.steps
        else:
            a = self.end
        return Weights(1 - a, a)

    def update(self, score: Tensor, pathwise: Tensor) -> None:
        """Gradients of n >= 2 independent parts of a batch, each [n, P], on the same P parameters
        (some tensors of the model are enough). Raises ValueError naming the argument, in particular
        for one that is not finite; the running estimate then stays as it was."""
        if self.decay is None:
            raise ValueError("mix: update() is for Mix.bias_aware; this one follows a schedule")
        score = _check.floating("score", score, 2).detach()
        if len(score) < 2:
            raise _check.fail("score", score, "[n, P] with n >= 2 parts")
        pathwise = _check.rows_like("pathwise", pathwise, score.shape).detach()
        for name, gradient in (("score", score), ("pathwise", pathwise)):
            if not bool(gradient.isfinite().all()):
                at = (~gradient.isfinite()).nonzero()[0].tolist()
                got = float(gradient[tuple(at)])
                raise _check.NonFiniteError(f"{name}: got {got} at {at}; allowed: finite numbers")
        n, score = len(score), score.double()
        gap = score - pathwise.double()
        mean = gap.mean(0)
        num = ((score - score.mean(0)) * (gap - mean)).sum() / (n * (n - 1))
        self.covariance = self.decay * self.covariance + (1 - self.decay) * float(num)
        self.distance = self.decay * self.distance + (1 - self.decay) * float(mean @ mean)
