"""An objective is one frozen record of orthogonal knobs; algorithms are presets of it.

Per token, with d = logp - old_logp, r = exp(clamp(d, +-20)), advantage A, all formulas as the
field writes them (sources: the papers named at each preset):

    surrogate "clip":    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
                         or, for A < 0 and r > dual_clip, -dual_clip A (a two-sided delta does
                         the same where it is above 1 + clip_high)
    surrogate "linear":  -r A, or -A logp with ratio "none" (REINFORCE)
    + beta * KL(ref)     k1: -e, k2: e^2/2, k3: exp(e) - e - 1, abs: |e|, with e = ref_logp - logp
    - entropy_coef * entropy

`ratio` says over what r is formed: each token, the sequence mean (GSPO), or nothing.
`reduction` says what the sum of token losses is divided by (N tokens, B sequences, T positions):

    "token"    sum / N            "seq"   mean over sequences of token means
    "seq_sum"  sum / B            "fixed" sum / (B * max_length)          "sum"  sum
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

RATIOS = ("none", "token", "sequence")
SURROGATES = ("clip", "linear")
KLS = ("k1", "k2", "k3", "abs")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
REDUCTIONS = ("token", "seq", "seq_sum", "fixed", "sum")
ESTIMATORS = ("grpo", "dr_grpo", "rloo", "none")


@dataclass(frozen=True)
class Objective:
    """What is optimised, as orthogonal knobs. Neutral defaults: beta 0, no entropy term.

    Raises ValueError that names the field for a value that is not allowed.
    """

    advantage: str = "grpo"  # estimator of group_advantages when rewards are given
    ratio: str = "token"  # importance ratio over: none | token | sequence
    surrogate: str = "clip"  # clip | linear
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # cap on the ratio where A < 0; > 1
    kl: str = "k3"  # estimator of KL(policy || reference)
    beta: float = 0.0  # its weight
    kl_ratio_corrected: bool = False  # multiply the KL term by r (DeepSeek-V3.2)
    kl_straight_through: bool = False  # value of `kl`, gradient of k2
    sampler_correction: str = "none"  # exp(old - sampler_logp), truncated or masked
    sampler_max: float = 3.0  # its bound
    entropy_coef: float = 0.0
    reduction: str = "seq"
    max_length: int | None = None  # T of reduction "fixed"; None: the width of the batch

    def __post_init__(self) -> None:
        for field, allowed in (
            ("advantage", ESTIMATORS),
            ("ratio", RATIOS),
            ("surrogate", SURROGATES),
            ("kl", KLS),
            ("sampler_correction", CORRECTIONS),
            ("reduction", REDUCTIONS),
        ):
            _require(field, getattr(self, field), getattr(self, field) in allowed, allowed)
        _require("clip_low", self.clip_low, 0 <= self.clip_low <= 1, "0 <= clip_low <= 1")
        _require("clip_high", self.clip_high, self.clip_high >= 0, "clip_high >= 0")
        ok = self.dual_clip is None or self.dual_clip > 1
        _require("dual_clip", self.dual_clip, ok, "None or a ratio > 1")
        _require("beta", self.beta, 0 <= self.beta < math.inf, "beta >= 0, finite")
        ok = math.isfinite(self.entropy_coef)
        _require("entropy_coef", self.entropy_coef, ok, "a finite number")
        _require("sampler_max", self.sampler_max, self.sampler_max > 0, "sampler_max > 0")
        ok = self.max_length is None or self.max_length > 0
        _require("max_length", self.max_length, ok, "None or a length > 0")
        ok = self.surrogate != "clip" or self.ratio != "none"
        _require("ratio", self.ratio, ok, "token or sequence with surrogate 'clip'")

    def replace(self, **knobs: Any) -> "Objective":
        """A copy with some knobs changed: `GRPO.replace(clip_high=0.28)`."""
        names = [f.name for f in fields(self)]
        for k in knobs:
            if k not in names:
                raise ValueError(f"objective: no knob {k!r}; allowed: {', '.join(names)}")
        return replace(self, **knobs)

    @property
    def row_local(self) -> bool:
        """dL/dlogp of a token needs no other token: one pass over its logits is enough."""
        return self.ratio != "sequence" and not self.sampler_correction.startswith("sequence")

    def pack(self) -> list[float]:
        """The knobs as numbers, in the order that csrc/objective.h reads them."""
        return [
            RATIOS.index(self.ratio),
            SURROGATES.index(self.surrogate),
            self.clip_low,
            self.clip_high,
            0.0 if self.dual_clip is None else self.dual_clip,
            self.beta,
            KLS.index(self.kl),
            self.kl_ratio_corrected,
            self.kl_straight_through,
            CORRECTIONS.index(self.sampler_correction),
            self.sampler_max,
            self.entropy_coef,
        ]


def _require(field: str, got: object, ok: bool, allowed: object) -> None:
    if not ok:
        words = ", ".join(map(str, allowed)) if isinstance(allowed, tuple) else allowed
        raise ValueError(f"objective.{field}: got {got!r}; allowed: {words}")


GRPO = Objective()  # DeepSeekMath (arXiv 2402.03300): group z-score, mean of sequence means
DR_GRPO = Objective(advantage="dr_grpo", reduction="fixed")  # arXiv 2503.20783: no std, no length
BNPO = Objective(reduction="token")  # token mean of the local batch
DAPO = Objective(clip_high=0.28, reduction="token")  # arXiv 2503.14476: pass the global normalizer
GSPO = Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4)  # arXiv 2507.18071
REINFORCE = Objective(advantage="dr_grpo", ratio="none", surrogate="linear", reduction="token")

PRESETS = {
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "bnpo": BNPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "reinforce": REINFORCE,
}


def resolve(objective: "str | Objective") -> Objective:
    """A preset by name, or the objective itself. Raises ValueError for an unknown name."""
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str) or objective not in PRESETS:
        raise ValueError(
            f"objective: got {objective!r}; allowed: {', '.join(PRESETS)} or an Objective"
        )
    return PRESETS[objective]
