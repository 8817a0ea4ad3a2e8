"""An objective is one frozen record of orthogonal knobs; algorithms are presets of it.

Per token, with own = logp - old_logp, its advantage A, and r = exp(clamp(d, +-20)); all formulas as
the field writes them (what others call each: docs/objectives.md). `ratio` says what d is, where a
sequence takes clamp(own, +-20) of its tokens:

    "none", "token"   own
    "sequence"        their mean (GSPO)
    "sequence_sum"    their sum (TRL's RLOO, VESPO)
    "sequence_token"  that mean as a value, the token's own gradient (GSPO-token)
    "geometric"       mean, each cut at clip_high where A > 0, at -clip_low elsewhere (GMPO)

`surrogate`, with c = clip(r, 1 - clip_low, 1 + clip_high) and sg = no gradient:

    "clip"    -min(min(r, delta) A, c A); where A < 0 and r > dual_clip, -dual_clip A
    "linear"  -r A, or -A logp with ratio "none" (REINFORCE)
    "cispo"   -sg(c) A logp
    "sapo"    -A 4/t sigmoid(t (r - 1)), t = tau_pos where A > 0, else tau_neg
    "vespo"   -sg(phi) A logp, phi = exp(lambda + k w - lambda exp(w)), w = clamp(d + the sum of the
              log of the sampler correction, log 1e-8, 20), k and lambda by the sign of A

    + beta * KL(ref)     k1: -e, k2: e^2/2, k3: exp(e) - e - 1, abs: |e|, with e = ref_logp - logp;
                         k3_clamped: k3 of clamp(e, +-20), at most 10, no gradient beyond
    - entropy_coef * entropy

`reduction` says what the sum of token losses is divided by (N tokens, B sequences, T positions):

    "token"    sum / N            "seq"   mean over sequences of token means
    "seq_sum"  sum / B            "fixed" sum / (B * max_length)          "sum"  sum
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

RATIOS = ("none", "token", "sequence", "sequence_sum", "sequence_token", "geometric")
SURROGATES = ("clip", "linear", "cispo", "sapo", "vespo")
KLS = ("k1", "k2", "k3", "k3_clamped", "abs")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
REDUCTIONS = ("token", "seq", "seq_sum", "fixed", "sum")
ESTIMATORS = ("grpo", "dr_grpo", "rloo", "none", "grpo_verl", "reinforce_pp",
              "reinforce_pp_baseline")  # fmt: skip
# Which ratios a surrogate can be formed of; "geometric" holds its clip already.
_FORMED_OF = {
    "clip": ("token", "sequence", "sequence_sum", "sequence_token"),
    "linear": RATIOS,
    "cispo": ("token", "sequence", "sequence_sum", "sequence_token"),
    "sapo": ("token", "sequence", "sequence_sum", "sequence_token"),
    "vespo": ("sequence_sum",),
}


@dataclass(frozen=True)
class Objective:
    """What is optimised, as orthogonal knobs. Neutral defaults: beta 0, no entropy term.

    Raises ValueError that names the field for a value that is not allowed.
    """

    advantage: str = "grpo"  # estimator of group_advantages when rewards are given
    ratio: str = "token"  # what r is formed of: RATIOS
    surrogate: str = "clip"  # SURROGATES
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # verl: cap on the loss where A < 0; > 1
    delta: float | None = None  # TRL: cap on r inside the min, for both signs of A
    kl: str = "k3"  # estimator of KL(policy || reference)
    beta: float = 0.0  # its weight
    kl_ratio_corrected: bool = False  # times r (own with sequence_sum, geometric; DeepSeek-V3.2)
    kl_straight_through: bool = False  # value of `kl`, gradient of k2
    sampler_correction: str = "none"  # exp(old - sampler_logp), truncated or masked
    sampler_max: float = 3.0  # its upper bound
    sampler_min: float = 0.0  # its lower bound (IcePop masks below it)
    entropy_coef: float = 0.0
    tau_pos: float = 1.0  # SAPO's temperatures
    tau_neg: float = 1.05
    vespo_k_pos: float = 2.0  # VESPO's gamma weights
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    reduction: str = "seq"
    max_length: int | None = None  # T of reduction "fixed"; None: the width of the batch

    def __post_init__(self) -> None:
        for f in fields(self):
            x = getattr(self, f.name)
            if (
                not isinstance(x, (str, bool, int, float, type(None)))
                and getattr(x, "ndim", 1) == 0
            ):
                object.__setattr__(self, f.name, x.item())  # a 0-d tensor: the number it holds
        for field, allowed in (
            ("advantage", ESTIMATORS),
            ("ratio", RATIOS),
            ("surrogate", SURROGATES),
            ("kl", KLS),
            ("sampler_correction", CORRECTIONS),
            ("reduction", REDUCTIONS),
        ):
            _require(field, getattr(self, field), getattr(self, field) in allowed, allowed)
        for field in ("tau_pos", "tau_neg", "vespo_lambda_pos", "vespo_lambda_neg"):
            x = getattr(self, field)
            _require(field, x, 0 < x < math.inf, "a finite number > 0")
        for field in ("beta", "vespo_k_pos", "vespo_k_neg"):
            x = getattr(self, field)
            _require(field, x, 0 <= x < math.inf, f"{field} >= 0, finite")
        _require("clip_low", self.clip_low, 0 <= self.clip_low <= 1, "0 <= clip_low <= 1")
        if self.surrogate == "cispo":  # the bounds of a weight, which may be below 1: min(r, 0.2)
            ok = self.clip_high > -1 and self.clip_high >= -self.clip_low
            _require("clip_high", self.clip_high, ok, "clip_high > -1 and >= -clip_low")
        else:
            _require("clip_high", self.clip_high, self.clip_high >= 0, "clip_high >= 0")
        for field in ("dual_clip", "delta"):
            x = getattr(self, field)
            _require(field, x, x is None or x > 1, "None or a ratio > 1")
            ok = x is None or self.surrogate == "clip"
            _require(field, x, ok, f"None with surrogate {self.surrogate!r}")
        ok = -math.inf < self.entropy_coef < math.inf  # not isfinite: a compiler would burn it in
        _require("entropy_coef", self.entropy_coef, ok, "a finite number")
        _require("sampler_max", self.sampler_max, self.sampler_max > 0, "sampler_max > 0")
        ok = 0 <= self.sampler_min <= self.sampler_max
        _require("sampler_min", self.sampler_min, ok, "0 <= sampler_min <= sampler_max")
        ok = self.max_length is None or self.max_length > 0
        _require("max_length", self.max_length, ok, "None or a length > 0")
        ratios = _FORMED_OF[self.surrogate]
        words = f"{' or '.join(ratios)} with surrogate {self.surrogate!r}"
        _require("ratio", self.ratio, self.ratio in ratios, words)
        ok = self.surrogate != "vespo" or not self.sampler_correction.startswith("sequence")
        words = "none, token_truncate, token_mask with surrogate 'vespo'"
        _require("sampler_correction", self.sampler_correction, ok, words)

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
        alone = self.ratio in ("none", "token")
        return alone and not self.sampler_correction.startswith("sequence")

    def pack(self) -> list[float]:
        """The knobs as numbers, in the order that csrc/objective.h reads them."""
        return [
            RATIOS.index(self.ratio),
            SURROGATES.index(self.surrogate),
            self.clip_low,
            self.clip_high,
            0.0 if self.dual_clip is None else self.dual_clip,
            0.0 if self.delta is None else self.delta,
            self.beta,
            KLS.index(self.kl),
            self.kl_ratio_corrected,
            self.kl_straight_through,
            CORRECTIONS.index(self.sampler_correction),
            self.sampler_min,
            self.sampler_max,
            self.entropy_coef,
            self.tau_pos,
            self.tau_neg,
            self.vespo_k_pos,
            self.vespo_lambda_pos,
            self.vespo_k_neg,
            self.vespo_lambda_neg,
        ]


def _require(field: str, got: object, ok: bool, allowed: object) -> None:
    if not ok:
        words = ", ".join(map(str, allowed)) if isinstance(allowed, tuple) else allowed
        raise ValueError(f"objective.{field}: got {got!r}; allowed: {words}")


GRPO = Objective()  # DeepSeekMath (arXiv 2402.03300): group z-score, mean of sequence means
DR_GRPO = Objective(advantage="dr_grpo", reduction="fixed")  # arXiv 2503.20783: no std, no length
BNPO = Objective(reduction="token")  # token mean of the local batch (TRL's bnpo)
DAPO = Objective(clip_high=0.28, reduction="token")  # arXiv 2503.14476: pass the global normalizer
GSPO = Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4)  # arXiv 2507.18071, TRL
GSPO_TOKEN = GSPO.replace(ratio="sequence_token")  # the same paper, section 4.3; verl's "gspo"
LUSPO = GSPO.replace(reduction="seq_sum")  # TRL's luspo: GSPO times the length, masked
# MiniMax-M1 (arXiv 2506.13585) and TRL: weight min(r, 5), nothing below; a cap c is clip_high c - 1
CISPO_ABSOLUTE = Objective(surrogate="cispo", clip_low=1.0, clip_high=4.0, reduction="token")
CISPO_RELATIVE = Objective(surrogate="cispo", reduction="token")  # verl: clip(r, 0.8, 1.2)
SAPO = Objective(surrogate="sapo")  # arXiv 2511.20347; TRL's and verl's
VESPO = Objective(ratio="sequence_sum", surrogate="vespo", reduction="token")  # TRL's vespo
# arXiv 2507.20673: bounds in log space; TRL's GMPOTrainer
GMPO = Objective(ratio="geometric", surrogate="linear", clip_low=0.4, clip_high=0.4)
REINFORCE = Objective(advantage="dr_grpo", ratio="none", surrogate="linear", reduction="token")
REINFORCE_PP = Objective(advantage="reinforce_pp", reduction="token")  # arXiv 2501.03262, verl
REINFORCE_PP_BASELINE = REINFORCE_PP.replace(advantage="reinforce_pp_baseline")
# arXiv 2402.14740: REINFORCE on the log-prob of the sequence, the others' mean as the baseline
RLOO = Objective(advantage="rloo", ratio="none", surrogate="linear", reduction="seq_sum")
RLOO_CLIP = Objective(advantage="rloo", ratio="sequence_sum")  # TRL's RLOOTrainer
PPO = Objective(dual_clip=3.0, reduction="token")  # verl's "vanilla"; dual clip: arXiv 1912.09729
PPO_DELTA = Objective(delta=4.0, reduction="token")  # TRL's two-sided clip; INTELLECT-2's delta

PRESETS = {
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "bnpo": BNPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "gspo_token": GSPO_TOKEN,
    "luspo": LUSPO,
    "cispo_absolute": CISPO_ABSOLUTE,
    "cispo_relative": CISPO_RELATIVE,
    "sapo": SAPO,
    "vespo": VESPO,
    "gmpo": GMPO,
    "reinforce": REINFORCE,
    "reinforce_pp": REINFORCE_PP,
    "reinforce_pp_baseline": REINFORCE_PP_BASELINE,
    "rloo": RLOO,
    "rloo_clip": RLOO_CLIP,
    "ppo": PPO,
    "ppo_delta": PPO_DELTA,
}

# One word, two formulas: the caller has to say which.
AMBIGUOUS = {
    "cispo": "'cispo_absolute' (MiniMax, TRL: weight min(r, 5)) or "
    "'cispo_relative' (verl: weight clip(r, 0.8, 1.2))",
}


def resolve(objective: "str | Objective") -> Objective:
    """A preset by name, or the objective itself. Raises ValueError for an unknown name, and for a
    word that others use for two formulas."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str) and objective in AMBIGUOUS:
        raise ValueError(
            f"objective: got {objective!r}, which is two formulas; allowed: {AMBIGUOUS[objective]}"
        )
    if not isinstance(objective, str) or objective not in PRESETS:
        raise ValueError(
            f"objective: got {objective!r}; allowed: {', '.join(PRESETS)} or an Objective"
        )
    return PRESETS[objective]
