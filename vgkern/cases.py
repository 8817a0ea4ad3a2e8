"""Per op: realistic inputs by name, and a byte/flop model. One source for tests and benchmarks.

Inputs are what training makes: targets sampled from the model's own softmax; old, reference and
sampler log-probs near the policy with some rows beyond the clip; 0/1 rewards with zero-variance
groups; left or right padding with one fully masked sequence and garbage where it is masked.

Tolerance, for every value and every gradient, with truth = the same maths in fp64 from the same
(already rounded) inputs and eager = plain PyTorch in the dtype of the inputs:

    error(backend) <= 2 error(eager) + FLOOR[dtype of the tensor] * scale

once for the norm of the tensor, and once, with four floors, for the worst row, relative to the
norm of that row (rows below a hundredth of the largest count as that; a logit of 16 is rounded by
1e-6, and its probability moves by as much). `tests/test_parity.py` holds it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vgkern import objectives
from vgkern.case_inputs import (
    GARBAGE,
    Inputs,
    group_rewards,
    head,
    padding,
    policy_rows,
)
from vgkern.objectives import Objective
from vgkern.ops.noise import Noise

FLOOR = {
    torch.float64: 1e-11,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-8,  # one unit in the last place
    torch.float16: 2.0**-11,
}


@dataclass(frozen=True)
class Case:
    """`getattr(vgkern, op)(**make(dtype, seed))` is the call; flops and bytes are of forward and
    backward together (what an ideal kernel does and moves), from the inputs that `make` returned.
    """

    name: str
    op: str
    make: Callable[[torch.dtype, int], Inputs]
    flops: Callable[[Inputs], int]
    bytes: Callable[[Inputs], int]
    grads: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = field(
        default=(torch.float32, torch.bfloat16, torch.float16, torch.float64)
    )

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


# Byte and flop models ------------------------------------------------------------------------


def _size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _nhv(x: Inputs) -> tuple[int, int, int]:
    h = x["hidden"].shape[-1]
    return x["hidden"].numel() // h, h, x["weight"].shape[0]


def _active(x: Inputs) -> int:
    o = objectives.resolve(x["objective"])
    shape = x["targets"].shape
    live = torch.ones(shape, dtype=torch.bool) if x.get("mask") is None else x["mask"] != 0
    a = x["advantages"]
    a = a.reshape(-1, 1) if a.ndim < len(shape) else a
    return int((live if o.beta or o.entropy_coef else live & (a != 0)).sum())


def _head_bytes(x: Inputs, reads: int) -> int:
    """`reads` passes over hidden and weight, their gradients written once."""
    return (reads + 1) * _size(x["hidden"], x["weight"])


def _linear_policy_flops(x: Inputs) -> int:
    _, h, v = _nhv(x)
    return (6 if objectives.resolve(x["objective"]).row_local else 8) * _active(x) * h * v


# Cases: one builder per op -------------------------------------------------------------------


def token_logprobs(name: str, shape: tuple[int, ...], v: int, **kw: Any) -> Case:
    ignore = kw.pop("ignore", False)

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, _, _ = head(shape, 16, v, torch.float32, seed, **kw)
        logits = x.pop("hidden") @ x.pop("weight").T
        bias = x.pop("bias", None)
        x["logits"] = (logits if bias is None else logits + bias).to(dtype)
        if ignore:
            x["targets"].reshape(-1)[1::3] = -100
        return x

    return Case(
        name,
        "token_logprobs",
        make,
        lambda x: 8 * x["logits"].numel(),
        lambda x: 3 * _size(x["logits"]),
        ("logits",),
    )


def linear_token_logprobs(name: str, shape: tuple[int, ...], h: int, v: int, **kw: Any) -> Case:
    ignore = kw.pop("ignore", False)

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, _, _ = head(shape, h, v, dtype, seed, **kw)
        if ignore:
            x["targets"].reshape(-1)[:: 1 if ignore == "all" else 3] = -100
        return x

    return Case(
        name,
        "linear_token_logprobs",
        make,
        lambda x: 8 * math.prod(_nhv(x)),
        lambda x: _head_bytes(x, 2),
        ("hidden", "weight", "bias"),
    )


def group_advantages(name: str, b: int, estimator: str, constant: float | None = None) -> Case:
    def make(dtype: torch.dtype, seed: int) -> Inputs:
        rewards, groups = group_rewards(b, seed)
        if constant is not None:
            rewards = torch.where(rewards > 0, constant, rewards)
        return {"rewards": rewards.to(dtype), "groups": groups, "estimator": estimator}

    return Case(
        name,
        "group_advantages",
        make,
        lambda x: 6 * x["rewards"].numel(),
        lambda x: 2 * _size(x["rewards"]) + _size(x["groups"]),
        (),
        (torch.float32, torch.bfloat16, torch.float64),
    )


def policy_loss(name: str, shape: tuple[int, ...], objective: Objective, **kw: Any) -> Case:
    side = kw.pop("pad", None)

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        logp = -2 * torch.randn(*shape, generator=g).to(dtype).abs()
        mask = padding(shape[0], shape[1], seed, side) if side else None
        x = policy_rows(logp.double(), objective, seed, mask=mask, **kw)
        if objective.entropy_coef:
            x["entropy"] = 3 * torch.rand(*shape, generator=g).to(dtype)
        return {"logp": logp, **x}

    return Case(
        name,
        "policy_loss",
        make,
        lambda x: 30 * x["logp"].numel(),
        lambda x: _size(*(t for t in x.values() if isinstance(t, Tensor))) + _size(x["logp"]),
        ("logp", "entropy"),
        (torch.float32, torch.float64),
    )


def linear_policy_loss(
    name: str, shape: tuple[int, ...], h: int, v: int, objective: Objective, **kw: Any
) -> Case:
    side = kw.pop("pad", None)
    rows = {k: kw.pop(k) for k in ("token_advantages", "on_policy") if k in kw}

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, logp, _ = head(shape, h, v, dtype, seed, **kw)
        mask = padding(shape[0], shape[1], seed, side) if side else None
        if mask is not None:
            x["targets"] = x["targets"].where(mask, GARBAGE)
        return {**x, **policy_rows(logp, objective, seed, mask=mask, **rows)}

    return Case(
        name,
        "linear_policy_loss",
        make,
        _linear_policy_flops,
        lambda x: _head_bytes(x, 1),
        ("hidden", "weight", "bias"),
    )


def linear_sample(name: str, shape: tuple[int, ...], h: int, v: int, **kw: Any) -> Case:
    cut: Inputs = {k: kw.pop(k) for k in ("top_k", "top_p", "min_p", "temperature") if k in kw}

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, _, _ = head(shape, h, v, dtype, seed, **kw)
        del x["targets"]
        x["noise"] = Noise(seed, torch.arange(math.prod(shape)).reshape(shape), torch.tensor(seed))
        if cut.get("temperature") == "per row":
            n = math.prod(shape)
            x["temperature"] = torch.tensor([1.0, 0.0, 0.5, 1.75]).repeat(n)[:n].reshape(shape)
            return {**x, **{k: c for k, c in cut.items() if k != "temperature"}}
        return {**x, **cut}

    return Case(
        name,
        "linear_sample",
        make,
        lambda x: 2 * math.prod(_nhv(x)) + 40 * _nhv(x)[0] * _nhv(x)[2],
        lambda x: _size(x["hidden"], x["weight"]),
    )


_O = objectives
_FULL = Objective(beta=0.1, entropy_coef=0.01, dual_clip=1.5, clip_high=0.28, reduction="token")

# V off any block size, H odd, one row, zero rows, 3-D rows, each option alone, then together.
CASES: tuple[Case, ...] = (
    token_logprobs("v1", (5,), 1),
    token_logprobs("v2", (7,), 2),
    token_logprobs("v3", (4,), 3),
    token_logprobs("v31-3d", (3, 5), 31),
    token_logprobs("v33-temperature", (6,), 33, temperature=0.7),
    token_logprobs("v1000-softcap", (13,), 1000, softcap=4.0),
    token_logprobs("v1035-ignore", (11,), 1035, ignore=True),
    token_logprobs("one-row", (1,), 1035),
    token_logprobs("zero-rows", (0,), 33),
    token_logprobs("peaked", (12,), 1000, peaked=True),
    token_logprobs("blocked", (9,), 1000, bias="blocked", temperature=1.3),
    linear_token_logprobs("h1-v1", (5,), 1, 1),
    linear_token_logprobs("h7-v2", (7,), 7, 2),
    linear_token_logprobs("h64-v3", (3,), 64, 3),
    linear_token_logprobs("h7-v31-3d", (3, 5), 7, 31, bias="plain"),
    linear_token_logprobs("h64-v33", (12,), 64, 33, temperature=0.7),
    linear_token_logprobs("h64-v1000-ignore", (40,), 64, 1000, ignore=True),
    linear_token_logprobs("h123-v1035-all", (33,), 123, 1035, bias="plain", temperature=1.3,
                          softcap=6.0, ignore=True),
    linear_token_logprobs("one-row", (1,), 123, 1035, bias="plain"),
    linear_token_logprobs("zero-rows", (0,), 7, 33),
    linear_token_logprobs("all-ignored", (6,), 7, 33, ignore="all"),
    linear_token_logprobs("peaked", (12,), 64, 1000, peaked=True),
    linear_token_logprobs("blocked", (9,), 64, 1000, bias="blocked"),
    linear_token_logprobs("blocked-softcap", (9,), 64, 1000, bias="blocked", softcap=5.0),
    group_advantages("grpo", 32, "grpo"),
    group_advantages("grpo-ragged", 23, "grpo"),
    group_advantages("grpo-tenths", 33, "grpo", 0.1),
    group_advantages("dr_grpo", 33, "dr_grpo", 0.1),
    group_advantages("rloo", 23, "rloo"),
    group_advantages("none", 23, "none"),
    policy_loss("grpo", (8, 33), _O.GRPO, pad="right"),
    policy_loss("grpo-on-policy", (8, 7), _O.GRPO, pad="left", on_policy=True),
    policy_loss("dr_grpo", (8, 33), _O.DR_GRPO, pad="left"),
    policy_loss("bnpo-token-advantages", (8, 7), _O.BNPO, pad="right", token_advantages=True),
    policy_loss("dapo", (9, 33), _O.DAPO, pad="right"),
    policy_loss("dapo-packed", (31,), _O.DAPO),
    policy_loss("gspo", (10, 33), _O.GSPO, pad="right"),
    policy_loss("reinforce", (8, 33), _O.REINFORCE, pad="left"),
    policy_loss("full", (8, 33), _FULL, pad="right"),
    policy_loss("one-token", (1, 1), _O.GRPO.replace(beta=0.1)),
    policy_loss("zero-rows", (0, 5), _O.GRPO),
    *(policy_loss(f"kl-{k}", (8, 7), Objective(kl=k, beta=0.3), pad="left") for k in _O.KLS),
    policy_loss("kl-corrected", (8, 7), Objective(beta=0.3, kl_ratio_corrected=True), pad="left"),
    policy_loss("kl-straight", (8, 7), Objective(beta=0.3, kl_straight_through=True), pad="left"),
    *(policy_loss(f"sampler-{c}", (8, 7), Objective(sampler_correction=c), pad="right")
      for c in _O.CORRECTIONS[1:]),
    *(policy_loss(f"reduce-{r}", (8, 7), Objective(reduction=r), pad="right")
      for r in _O.REDUCTIONS),
    linear_policy_loss("grpo-h7-v31", (8, 5), 7, 31, _O.GRPO, pad="right"),
    linear_policy_loss("grpo-on-policy", (8, 5), 64, 33, _O.GRPO, pad="left", on_policy=True),
    linear_policy_loss("dr_grpo-h123-v1035", (6, 9), 123, 1035, _O.DR_GRPO, pad="right",
                       bias="plain"),
    linear_policy_loss("dapo-temperature", (8, 9), 64, 1000, _O.DAPO, pad="left", temperature=0.7),
    linear_policy_loss("dapo-packed", (37,), 64, 1000, _O.DAPO),
    linear_policy_loss("gspo", (10, 5), 64, 1000, _O.GSPO, pad="right"),
    linear_policy_loss("reinforce-softcap", (8, 5), 64, 1000, _O.REINFORCE, pad="left",
                       softcap=6.0),
    linear_policy_loss("full-bias", (8, 9), 123, 1035, _FULL, pad="right", bias="plain",
                       temperature=1.3),
    linear_policy_loss("blocked", (8, 5), 64, 1000, _FULL, pad="right", bias="blocked"),
    linear_policy_loss("sampler-token", (8, 5), 7, 33,
                       Objective(sampler_correction="token_truncate"), pad="right"),
    linear_policy_loss("sampler-sequence", (8, 5), 7, 33,
                       Objective(sampler_correction="sequence_mask"), pad="right"),
    linear_policy_loss("token-advantages", (4, 5), 7, 33, _O.BNPO, token_advantages=True),
    linear_policy_loss("peaked", (8, 5), 64, 1000, _O.BNPO, pad="right", peaked=True),
    linear_policy_loss("one-token", (1, 1), 1, 3, _FULL),
    linear_policy_loss("zero-rows", (0, 5), 7, 33, _O.GRPO),
    linear_sample("h1-v1", (5,), 1, 1),
    linear_sample("h7-v31", (9,), 7, 31),
    linear_sample("h123-v1035-3d", (3, 5), 123, 1035, bias="plain"),
    linear_sample("temperature", (16,), 64, 1000, temperature=0.625),
    linear_sample("per-row-temperature", (16,), 64, 1000, temperature="per row"),
    linear_sample("greedy", (9,), 64, 1000, temperature=0.0),
    linear_sample("blocked", (16,), 64, 33, bias="blocked"),
    linear_sample("blocked-softcap", (16,), 64, 33, bias="blocked", softcap=5.0),
    linear_sample("top-k", (16,), 64, 1000, top_k=7),
    linear_sample("top-p", (16,), 64, 1000, top_p=0.8),
    linear_sample("min-p", (16,), 64, 1000, min_p=0.05),
    linear_sample("all-cuts", (16,), 64, 1035, top_k=50, top_p=0.9, min_p=0.02, temperature=0.875),
    linear_sample("per-row-cuts", (16,), 64, 1000, top_k=20, top_p=0.9, temperature="per row"),
    linear_sample("zero-rows", (0,), 7, 33),
)  # fmt: skip

# The sizes that are timed: a small trained model, SmolLM2-135M, and one long batch for memory.
BENCH: tuple[Case, ...] = (
    token_logprobs("1024x8192", (1024,), 8192),
    linear_token_logprobs("2048x256x8192", (2048,), 256, 8192),
    linear_token_logprobs("1024x576x49152", (1024,), 576, 49152),
    group_advantages("4096", 4096, "grpo"),
    policy_loss("256x128", (256, 128), _O.GRPO, pad="right"),
    linear_policy_loss("2048x256x8192", (64, 32), 256, 8192, _O.DAPO, token_advantages=True),
    linear_policy_loss("1024x576x49152", (32, 32), 576, 49152, _O.DAPO, token_advantages=True),
    linear_policy_loss("4096x576x49152", (64, 64), 576, 49152, _O.DAPO, token_advantages=True),
    linear_sample("64x576x49152", (64,), 576, 49152),
)


def by_name(name: str) -> Case:
    """The case whose `op-name` is `name`. Raises KeyError that lists the close ones."""
    for case in (*CASES, *BENCH):
        if str(case) == name:
            return case
    close = [str(c) for c in CASES if c.op in name]
    raise KeyError(f"no case {name!r}; known: {', '.join(close) or [str(c) for c in CASES]}")
