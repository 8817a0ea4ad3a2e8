"""Where will RL pay? Checkpoints scored and ranked from a few groups of samples of each.

Of P prompts with G samples each, per prompt: rewards, S2 and its noise (`signal`), surprise. Then

    SNR    = mean S2 / mean power            how much of a sample's costate is value gradient
    room   = mean headroom(k)                E[max of k rewards] - E[reward], what sampling reaches
    impact = sqrt(max(SNR, 0)) * room        the score

and beside it what else could be ranked by: pass@1, pass@k, p(1-p), entropy, the costate's norm.
Intervals are of 90 %, by bootstrap over the prompts. Two checkpoints are compared on the same
resampled prompts: what a prompt's difficulty does to both of them cancels. Formulas ours.

    each = costate.CostateGram(where, group)       # rows of one prompt together
    with costate.probe(model, each=each): ...      # forward; backward of sum_t log pi
    a = impact.measured(each.layers[middle], rewards, logp, tokens)
    print(impact.rank({"a": a, "b": b}, k=8).order)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vgkern.costate.signal import headroom, value_gradient_signal
from vgkern.ops import _check

DRAWS = 2000
ODDS = 0.05  # that a clear order is the other way round, by the bootstrap
HOPELESS = 30.0  # times the prompts: nobody pays that to tell two checkpoints apart
SCORE = "impact"


class Interval(NamedTuple):
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """Per prompt, fp64 on the CPU. A prompt whose rewards agree has no signal and no noise; its
    costates need not be computed (`measured` takes zeros)."""

    rewards: Tensor  # [P, G]
    s2: Tensor  # [P]
    power: Tensor  # [P] mean_i |lambda_i|^2
    naive: Tensor  # [P] |mean_i lambda_i|^2, too large by about power / G
    square: Tensor  # [P] mean |x|^2 of the residual stream there; NaN where it was not looked at
    surprise: Tensor  # [P] sum of -log pi over the sampled tokens
    tokens: Tensor  # [P] how many

    def __len__(self) -> int:
        return len(self.rewards)

    def first(self, count: int) -> Measured:
        return Measured(*(getattr(self, f.name)[:count] for f in fields(self)))

    def and_then(self, more: Measured) -> Measured:
        """These prompts and those, as rows of one table."""
        pairs = ((getattr(self, f.name), getattr(more, f.name)) for f in fields(self))
        return Measured(*(torch.cat(pair) for pair in pairs))


def measured(
    gram: Tensor,  # [P, G, G] <u_i, u_j>, u_i = d(sum_t log pi of sample i)/dx at the prompt
    rewards: Tensor,  # [P, G]
    logp: Tensor,  # [P, G] sum_t log pi of each sample
    tokens: Tensor,  # [P, G] sampled tokens of each
    square: Tensor | None = None,  # [P] mean |x|^2, for the relative signal
) -> Measured:
    """Raises ValueError / TypeError naming the argument for shapes that do not match or G < 4."""
    s2, power = value_gradient_signal(gram, rewards)
    _check.rows_like("logp", logp, rewards.shape)
    _check.rows_like("tokens", tokens, rewards.shape)
    if bool(rewards.isnan().any()):
        raise _check.fail("rewards", "NaN", "a number for every sample")
    r, count = rewards.double().cpu(), rewards.shape[-1]
    ahead = (r - (r.sum(-1, keepdim=True) - r) / (count - 1)).to(gram.device)
    naive = torch.einsum("pi,pij,pj->p", ahead, gram.double(), ahead) / count**2
    if square is None:
        square = torch.full((len(rewards),), math.nan)
    each = (s2, power, naive, square, -logp.double().sum(-1), tokens.double().sum(-1))
    return Measured(r, *(x.detach().double().cpu() for x in each))


def mixed(rewards: Tensor) -> Tensor:
    """[P]: is there anything to tell the samples of this prompt apart by?"""
    return (rewards != rewards[:, :1]).any(-1)


def scores(found: Measured, k: int, right: float = 1.0) -> dict[str, Interval]:
    """The score and every baseline, each with its interval. k: as of `headroom`; right: the reward
    that pass@1 and pass@k call right."""
    weights = _resampled(len(found))
    value = _statistics(found, np.full((1, len(found)), 1 / len(found)), k, right)
    drawn = _statistics(found, weights, k, right)
    told = {}
    for name in value:
        known = drawn[name][np.isfinite(drawn[name])]
        some = len(found) > 1 and len(known)  # one prompt says nothing of others
        low, high = np.quantile(known, [ODDS, 1 - ODDS]) if some else (math.nan,) * 2
        told[name] = Interval(float(value[name][0]), float(low), float(high))
    return told


def stop_sign(found: Measured, told: Mapping[str, Interval]) -> str | None:
    """Why there is no signal to follow here; None where there is."""
    if not bool(mixed(found.rewards).any()):
        reward = float(found.rewards[0, 0])
        same = bool((found.rewards == reward).all())
        what = f"every reward is {reward:g}" if same else "within each prompt all rewards are equal"
        return f"{what}: nothing to tell samples apart by"
    if not told["signal/noise"].low > 0:
        return "the signal is not told from zero on these prompts"
    return None


class Pair(NamedTuple):
    """A checkpoint and the next lower one."""

    upper: str
    lower: str
    odds: float  # of the other order, by the bootstrap
    clear: bool
    more: float  # times the prompts that would make it clear; 1 where it is, inf where none would


@dataclass(frozen=True)
class Ranking:
    order: tuple[str, ...]  # best first
    places: Mapping[str, tuple[int, int]]  # best and worst place that each may have
    pairs: tuple[Pair, ...]  # neighbours

    @property
    def clear(self) -> bool:
        return all(pair.clear for pair in self.pairs)

    @property
    def open(self) -> frozenset[str]:
        """Those that more prompts could help to place."""
        unclear = [pair for pair in self.pairs if not pair.clear]
        return frozenset(name for pair in unclear for name in (pair.upper, pair.lower))


def rank(found: Mapping[str, Measured], k: int, odds: float = ODDS) -> Ranking:
    """By the score. Prompt p of one must be prompt p of all; where one has fewer of them, it is
    compared on those. odds: what a clear pair's may be; divide it by the number of looks where you
    look more than once.

    Raises ValueError where no checkpoint has a prompt whose rewards differ.
    """
    if not found:
        raise _check.fail("found", "no checkpoint", "one or more")
    if not any(bool(mixed(m.rewards).any()) for m in found.values()):
        count = sum(m.rewards.numel() for m in found.values())
        remedy = "easier prompts, more samples of each, or more supervised training first"
        raise _check.fail("rewards", f"{count} samples, equal within every prompt", remedy)
    value = {name: _score(m, np.full((1, len(m)), 1 / len(m)), k)[0] for name, m in found.items()}
    order = sorted(value, key=lambda name: -value[name])
    wanted = float(torch.special.ndtri(torch.tensor(1 - odds, dtype=torch.float64)))
    other = {(a, b): _odds(found[a], found[b], k) for a in order for b in order if a != b}

    def clear(upper: str, lower: str) -> bool:
        """By its draws and by its sd: of few prompts either alone is too sure."""
        chance, ratio = other[upper, lower]
        return chance < odds and ratio > wanted

    places = {}
    for name in order:
        above = sum(clear(rival, name) for rival in order if rival != name)
        below = sum(clear(name, rival) for rival in order if rival != name)
        places[name] = (1 + above, len(order) - below)
    pairs = []
    for upper, lower in itertools.pairwise(order):
        chance, ratio = other[upper, lower]
        more = 1.0
        if not clear(upper, lower):
            more = max(1.1, (wanted / ratio) ** 2) if ratio > 0 else math.inf
        pairs.append(Pair(upper, lower, chance, clear(upper, lower), more))
    return Ranking(tuple(order), places, tuple(pairs))


class Price(NamedTuple):
    """In tokens forwarded through the whole model; a backward pass by activations costs one more,
    one that makes the weights' gradients too costs two."""

    impact: float
    step: float  # of RL on as many samples: sample, forward, backward

    def share(self, steps: int = 200) -> float:
        return self.impact / (steps * self.step)


def price(
    prompt: float, answer: float, prompts: int, group: int, above: float, used: float = 1.0
) -> Price:
    """Arithmetic, of texts whose prompt is forwarded once per group. prompt, answer: mean tokens;
    above: share of the model's layers above the one looked at; used: share of the prompts whose
    rewards differ."""
    texts = prompts * (prompt + group * answer)
    backward = above * prompts * group * (prompt + answer)  # a costate per sample
    return Price(texts + used * (texts + backward), 4.0 * texts)


def _odds(a: Measured, b: Measured, k: int) -> tuple[float, float]:
    """Share of the draws in which b is at least as good as a, and the difference in its sd."""
    count = min(len(a), len(b))
    a, b, weights = a.first(count), b.first(count), _resampled(count)
    apart = _score(a, weights, k) - _score(b, weights, k)
    whole = np.full((1, count), 1 / count)
    middle = float(_score(a, whole, k)[0] - _score(b, whole, k)[0])
    spread = float(apart.std())
    return float((apart <= 0).mean()), middle / spread if spread > 0 else 0.0


def _score(found: Measured, weights: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    return _statistics(found, weights, k, math.inf)[SCORE]


def _statistics(
    found: Measured, weights: NDArray[np.float64], k: int, right: float
) -> dict[str, NDArray[np.float64]]:
    """Every predictor for each row of weights [B, P] of the prompts."""
    rewards = found.rewards
    correct = (rewards >= right).double()
    looked = found.square.isfinite()

    def mean(x: Tensor) -> NDArray[np.float64]:
        made: NDArray[np.float64] = weights @ x.double().numpy()
        return made

    def ratio(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(x, y, out=np.full_like(x, math.nan), where=y > 0)

    one, room = mean(correct.mean(-1)), mean(headroom(rewards, k))
    s2, power = mean(found.s2), mean(found.power)
    snr = ratio(s2, power)
    stream = ratio(mean(found.square.nan_to_num(0)), mean(looked))
    positive = np.maximum(s2, 0)
    return {
        # without a reward that differs there is nothing to follow, and the score says so
        SCORE: np.sqrt(np.maximum(np.nan_to_num(snr), 0)) * room,
        "signal/noise": snr,
        f"headroom({k})": room,
        "reward": mean(rewards.mean(-1)),
        "pass@1": one,
        f"pass@{k}": one + mean(headroom(correct, k)),
        "p(1-p)": one * (1 - one),
        "entropy": ratio(mean(found.surprise), mean(found.tokens)),
        "gradient norm": np.sqrt(np.maximum(mean(found.naive), 0)),
        "relative signal": np.sqrt(positive * stream),
    }


def _resampled(count: int) -> NDArray[np.float64]:
    """[DRAWS, count] weights of the prompts; the same whenever there are as many prompts."""
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DRAWS)
    return drawn / count
