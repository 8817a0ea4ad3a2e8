"""Which groups run, in which order, and how many rows of each: within a budget of seconds.

The length of one call gives first: from CALLS the longest is taken with which everything fits the
budget by estimate; rows are cut to it, and to the memory that is free. Where even the shortest does
not fit, the largest models are left out, and the report says so. While it runs, each group gets its
share of the time that is left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .rivals import DEFAULT, NAMES
from .shapes import MODELS, SAMPLES, cut, memory_rows
from .work import BOTH, CASES, DTYPES, HEADS, OPS, Work, gemm_flops

CALLS = (0.6, 0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.015)  # seconds of the bare products of one call
SHORTEST = {"quick": 0.015, "default": 0.06, "full": 0.06}  # of CALLS
ROUNDS = {"quick": 5, "default": 7, "full": 15}
BUDGET = {"quick": 70.0, "default": 720.0, "full": 7200.0}  # seconds, of which start-up is no part
FREE_SHARE = 0.4  # of the memory that is free now
COMPILE_SECONDS = 8.0
LARGE = ("llama-3-8b", "qwen3-32b")
TIERS = ("smollm2-135m", "qwen2.5-0.5b", *LARGE)  # the rest comes before them, in this order
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
SWEPT = "linear_policy_loss"
LOOPS = ("costate_scan", "linear_rollout")  # in plain PyTorch a loop over time
MEMORY_OPS = (SWEPT, "linear_token_logprobs")


@dataclass(frozen=True)
class Options:
    level: str = "default"
    ops: tuple[str, ...] = OPS
    shapes: tuple[str, ...] = ()  # all of the level
    dtypes: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    rivals: tuple[str, ...] = NAMES
    rows: int = 0
    budget: float = 0.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def seconds(self) -> float:
        return self.budget or BUDGET[self.level]

    @property
    def rounds(self) -> int:
        return ROUNDS[self.level]

    def models(self, op: str) -> tuple[str, ...]:
        if self.shapes:
            return tuple(m for m in MODELS if m in self.shapes)
        if self.level == "quick":
            return ("tiny", "small")
        if self.level == "full":
            return tuple(MODELS)
        if op in ("noisy_embedding", "linear_divergence"):
            return ("small", "smollm2-135m")
        small = tuple(m for m in MODELS if m not in LARGE)
        return small if op == "token_logprobs" else tuple(MODELS)

    def types(self, shape: str) -> tuple[str, ...]:
        if self.dtypes:
            return self.dtypes
        if self.level == "quick":
            return ("fp32",)
        if self.level == "full":
            return tuple(DTYPES)
        if shape in TIERS[1:]:
            return ("bf16",)
        return ("fp32", "bf16") if shape in MODELS else ("fp32",)


def variants(work: Work, options: Options) -> list[str]:
    """Who runs: our backends first, the base before all."""
    default = DEFAULT[options.device.type]
    if work.op in LOOPS and options.level != "full":  # seconds, for what nobody would run
        default = default[:-1]
    ours = [f"vgkern {b}" for b in options.backends or default]
    rivals = [r for r in options.rivals if _worth_compiling(work, options) or r != "torch.compile"]
    if work.sweep:
        ours = ours[:1]
        rivals = [r for r in rivals if r in ("torch eager", "TRL", "Liger")]
    return ours + rivals


def _worth_compiling(work: Work, options: Options) -> bool:
    """A compilation takes seconds for every shape; forward alone is left to --full."""
    if options.level == "full":
        return True
    if options.level == "quick":
        return work.op == SWEPT and work.shape == options.models(SWEPT)[-1]
    return work.pass_ == work.passes[-1]


def plan(options: Options, rates: dict[str, float], free: float) -> list[Work]:
    """Raises ValueError when the filters leave nothing."""
    for seconds in (s for s in CALLS if s >= SHORTEST[options.level]):
        works = sorted(_works(options, rates, free, seconds), key=_tier)
        if sum(estimate(w, options, rates) for w in works) <= options.seconds:
            break
    if not works:
        raise ValueError("nothing to measure: no op has such a shape, dtype and pass")
    works = _fitting(works, options, rates)
    if options.level == "quick":  # a compilation last: on a busy machine it takes all the time
        works.sort(key=lambda w: "torch.compile" in variants(w, options))
    return works


def _tier(work: Work) -> int:
    if work.shape not in TIERS or work.sweep:
        return -1
    return TIERS.index(work.shape) + 2 * (work.op in ("linear_divergence", "noisy_embedding"))


def _fitting(works: list[Work], options: Options, rates: dict[str, float]) -> list[Work]:
    """Those that do not fit the time, by estimate, without rows; the first always fits."""
    spent = 0.0
    found: list[Work] = []
    for work in works:
        seconds = estimate(work, options, rates)
        if found and spent + seconds > options.seconds:
            work = work.replace(rows=0, cut="time")
        else:
            spent += seconds
        found.append(work)
    return found


def _works(options: Options, rates: dict[str, float], free: float, seconds: float) -> list[Work]:
    found = [
        _sized(Work(op, shape, dtype), options, rates, free, seconds)
        for shape in MODELS
        for op in options.ops
        if op in HEADS and shape in options.models(op)
        for dtype in options.types(shape)
    ]
    for op, name in CASES:
        wanted = op in options.ops and (not options.shapes or name in options.shapes)
        types = [t for t in options.types(name) if DTYPES[t] in CASES[op, name].dtypes]
        found += [Work(op, name, t) for t in types if wanted]
    every = [w.replace(pass_=p) for w in found for p in _passes(w, options)]
    return every + _sweeps(options, rates, free, seconds)


def _passes(work: Work, options: Options) -> Sequence[str]:
    """Forward alone is scoring: of the log-prob ops that is worth its time at every size."""
    scored = options.level == "full" or work.shape not in TIERS or "logprobs" in work.op
    return work.passes if scored and options.level != "quick" else work.passes[-1:]


def _sized(
    work: Work, options: Options, rates: dict[str, float], free: float, seconds: float
) -> Work:
    model = MODELS[work.shape]
    of = SAMPLES if work.op == "linear_sample" else model.rows
    size = {"hidden": model.hidden, "vocab": model.vocab, "rows_of": of}
    if options.rows:
        given = "" if options.rows == of else "given"
        return work.replace(**size, rows=options.rows, cut=given)
    fit = memory_rows(FREE_SHARE * free, model.hidden, model.vocab, work.torch_dtype.itemsize)
    in_time = math.inf
    if work.op == "token_logprobs":
        row = 3 * model.vocab * work.torch_dtype.itemsize  # plain PyTorch copies it several times
        in_time = seconds / 4 * rates["copy"] / row
    elif work.op != "linear_sample":
        one = gemm_flops(work.op, 1, model.hidden, model.vocab)
        in_time = seconds * rates[work.dtype] / one
    rows, why = cut(of, fit, in_time)
    return work.replace(**size, rows=rows, cut=why)


def _sweeps(options: Options, rates: dict[str, float], free: float, seconds: float) -> list[Work]:
    if SWEPT not in options.ops:
        return []
    quick = options.level == "quick"
    dtype = options.types("small")[0]
    model = next((m for m in ("small", "smollm2-135m") if m in options.models(SWEPT)), "")
    found = []
    for vocab in (512, 2048, 8192, 32768, 131072)[: 4 if quick else 5]:
        if not options.shapes:
            found.append(Work(SWEPT, f"H256 V{vocab}", dtype, BOTH, 256, 256, "", 256, vocab,
                              sweep="vocab"))  # fmt: skip
    if model:
        base = _sized(Work(SWEPT, model, dtype), options, rates, free, seconds)
        found += [base.replace(share=s, sweep="active") for s in SHARES]
        big = base if quick or "smollm2-135m" not in options.models(SWEPT) else _sized(
            Work(SWEPT, "smollm2-135m", dtype), options, rates, free, 1e9
        )  # fmt: skip
        for rows in (128, 256, 512, 1024, 2048):
            if rows <= max(big.rows, 128) and not options.rows:
                found.append(big.replace(rows=rows, cut="given", sweep="rows"))
    return [w for w in found if w.rows]


def estimate(work: Work, options: Options, rates: dict[str, float]) -> float:
    """Seconds that the group takes, roughly."""
    names = variants(work, options)
    draw = 2e-8 * work.hidden * work.vocab  # of the head
    if work.sweep == "rows":
        return 8.0 + draw
    ideal = 0.01
    if work.vocab:
        flops = gemm_flops(work.op, work.rows, work.hidden, work.vocab)
        ideal = flops / rates[work.dtype] * (1.0 if work.pass_ == BOTH else 0.4)
        ideal = max(ideal, 3 * work.hidden * work.vocab * 4 / rates["copy"] * (work.pass_ == BOTH))
        if work.op == "token_logprobs":
            ideal = 3 * work.rows * work.vocab * 4 / rates["copy"]
    calls = 2.0 * ideal * (options.rounds + 3) * min(len(names) + 1, 5)
    compiled = COMPILE_SECONDS * ("torch.compile" in names and work.op in HEADS)
    child = 8.0 + 4 * ideal if wants_peak(work, options) else 0.0
    return 0.3 + draw + calls + compiled + child


def wants_peak(work: Work, options: Options) -> bool:
    """Whether its memory is measured too: in a process of its own, which takes seconds."""
    if options.device.type != "cpu" or work.sweep:
        return False
    if work.op not in MEMORY_OPS or work.pass_ != BOTH:
        return False
    if options.level == "quick":
        return work.op == SWEPT and work.shape == options.models(SWEPT)[-1]
    return options.level == "full" or work.dtype == "fp32" or work.shape in LARGE


def roof_types(options: Options) -> list[str]:
    return list(dict.fromkeys(t for s in (*MODELS, "") for t in options.types(s)))
