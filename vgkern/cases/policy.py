"""Cases of the advantage and policy-loss ops."""

from typing import Any

import torch
from torch import Tensor

from vgkern import objectives
from vgkern.case_inputs import (
    GARBAGE,
    Inputs,
    costates,
    group_rewards,
    head,
    laid_end_to_end,
    padding,
    policy_rows,
)
from vgkern.cases._case import Case, costate_flops, head_bytes, nhv, size
from vgkern.objectives import Objective


def _active(x: Inputs) -> int:
    o = objectives.resolve(x["objective"])
    shape = x["targets"].shape
    live = torch.ones(shape, dtype=torch.bool) if x.get("mask") is None else x["mask"] != 0
    a = x["advantages"]
    if x.get("segments") is not None:
        a = a.repeat_interleave(x["segments"].diff()).view(shape)
    a = a.reshape(-1, 1) if a.ndim < len(shape) else a
    return int((live if o.beta or o.entropy_coef else live & (a != 0)).sum())


def _linear_policy_flops(x: Inputs) -> int:
    _, h, v = nhv(x)
    gemms = 6 if objectives.resolve(x["objective"]).row_local else 8
    return gemms * _active(x) * h * v + costate_flops(x)


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
        lambda x: 2 * size(x["rewards"]) + size(x["groups"]),
        (),
        (torch.float32, torch.bfloat16, torch.float64),
    )


def policy_loss(name: str, shape: tuple[int, ...], objective: Objective, **kw: Any) -> Case:
    side, far = kw.pop("pad", None), kw.pop("far", False)
    packed = kw.pop("packed", False)  # the padded rows, laid end to end

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        logp = -2 * torch.randn(*shape, generator=g).to(dtype).abs()
        mask = padding(shape[0], shape[1], seed, side) if side else None
        x = policy_rows(logp.double(), objective, seed, mask=mask, **kw)
        if far:  # every third token beyond the clamps of the KL
            x["ref_logp"][:, ::3] += 3.5
        if objective.entropy_coef:
            x["entropy"] = 3 * torch.rand(*shape, generator=g).to(dtype)
        x["logp"] = logp
        return laid_end_to_end(x, mask) if packed else x

    return Case(
        name,
        "policy_loss",
        make,
        lambda x: 30 * x["logp"].numel(),
        lambda x: size(*(t for t in x.values() if isinstance(t, Tensor))) + size(x["logp"]),
        ("logp", "entropy"),
        (torch.float32, torch.float64),
    )


def linear_policy_loss(
    name: str, shape: tuple[int, ...], h: int, v: int, objective: Objective, **kw: Any
) -> Case:
    side = kw.pop("pad", None)
    carried = kw.pop("costate", None)  # options of case_inputs.costates
    rows = {k: kw.pop(k) for k in ("token_advantages", "on_policy") if k in kw}
    packed = kw.pop("packed", False)

    def make(dtype: torch.dtype, seed: int) -> Inputs:
        x, logp, _ = head(shape, h, v, dtype, seed, **kw)
        mask = padding(shape[0], shape[1], seed, side) if side else None
        if mask is not None:
            x["targets"] = x["targets"].where(mask, GARBAGE)
        x |= policy_rows(logp, objective, seed, mask=mask, **rows)
        if packed:
            x = laid_end_to_end(x, mask)
        if carried is not None:
            x["costate"] = costates(x, seed, **carried)
        return x

    return Case(
        name,
        "linear_policy_loss",
        make,
        _linear_policy_flops,
        lambda x: head_bytes(x, 1),
        ("hidden", "weight", "bias"),
    )


_O = objectives
_FULL = Objective(beta=0.1, entropy_coef=0.01, dual_clip=1.5, clip_high=0.28, reduction="token")

_SHOWN = ("grpo", "dr_grpo", "bnpo", "dapo", "gspo", "reinforce")  # have cases of their own

CASES: tuple[Case, ...] = (
    group_advantages("grpo", 32, "grpo"),
    group_advantages("grpo-ragged", 23, "grpo"),
    group_advantages("grpo-tenths", 33, "grpo", 0.1),
    group_advantages("dr_grpo", 33, "dr_grpo", 0.1),
    group_advantages("rloo", 23, "rloo"),
    group_advantages("none", 23, "none"),
    group_advantages("grpo_verl", 23, "grpo_verl"),
    group_advantages("reinforce_pp", 23, "reinforce_pp"),
    group_advantages("reinforce_pp_baseline", 33, "reinforce_pp_baseline"),
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
    *(policy_loss(n, (10, 33), o, pad="left") for n, o in _O.PRESETS.items() if n not in _SHOWN),
    *(policy_loss(f"{n}-token-advantages", (8, 7), _O.PRESETS[n], pad="right",
                  token_advantages=True)
      for n in ("gspo", "gspo_token", "cispo_relative", "sapo", "vespo", "gmpo", "rloo_clip")),
    *(policy_loss(f"{n}-kl-corrected", (8, 7),
                  _O.PRESETS[n].replace(beta=0.3, kl_ratio_corrected=True), pad="right")
      for n in ("gspo", "gspo_token", "cispo_absolute", "vespo", "gmpo", "rloo_clip")),
    policy_loss("vespo-sampler", (8, 7), _O.VESPO.replace(
        sampler_correction="token_truncate", sampler_min=0.5), pad="right"),
    policy_loss("vespo-sampler-mask", (8, 7), _O.VESPO.replace(
        sampler_correction="token_mask", sampler_min=0.5), pad="left"),
    policy_loss("cispo-sequence", (8, 7), _O.CISPO_RELATIVE.replace(ratio="sequence_sum"),
                pad="left"),
    policy_loss("sapo-sequence", (8, 7), _O.SAPO.replace(ratio="sequence", tau_neg=2.0),
                pad="left"),
    *(policy_loss(f"{n}-segments", (10, 33), o, pad="right", packed=True)
      for n, o in _O.PRESETS.items()),
    policy_loss("full-segments", (9, 70), _FULL, pad="left", packed=True),
    policy_loss("sequence-mask-segments", (8, 7), Objective(
        sampler_correction="sequence_mask", sampler_min=0.9), pad="right", packed=True),
    policy_loss("vespo-sampler-segments", (8, 7), _O.VESPO.replace(
        sampler_correction="token_truncate", sampler_min=0.5), pad="right", packed=True),
    policy_loss("gspo-kl-corrected-segments", (8, 1100), _O.GSPO.replace(
        beta=0.3, kl_ratio_corrected=True), pad="right", packed=True),
    policy_loss("delta", (8, 33), Objective(delta=1.5, clip_high=0.28), pad="left"),
    policy_loss("delta-low", (8, 33), Objective(delta=1.15, clip_high=0.5), pad="left"),
    policy_loss("delta-dual", (8, 33), Objective(delta=1.6, dual_clip=1.4), pad="left"),
    policy_loss("icepop", (8, 33), Objective(
        sampler_correction="token_mask", sampler_min=0.5, sampler_max=5.0), pad="right"),
    policy_loss("icepop-sequence", (8, 7), Objective(
        sampler_correction="sequence_mask", sampler_min=0.9), pad="right"),
    policy_loss("sampler-floor", (8, 7), Objective(
        sampler_correction="sequence_truncate", sampler_min=0.98), pad="right"),
    *(policy_loss(f"kl-{k}", (8, 7), Objective(kl=k, beta=0.3), pad="left", far=k == "k3_clamped")
      for k in _O.KLS),
    policy_loss("kl-k3_clamped-straight", (8, 7), Objective(
        kl="k3_clamped", beta=0.3, kl_straight_through=True), pad="left", far=True),
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
    *(linear_policy_loss(n, (10, 5), 7, 33, _O.PRESETS[n], pad="left")
      for n in ("gspo_token", "cispo_relative", "sapo", "vespo", "gmpo", "rloo_clip", "ppo")),
    *(linear_policy_loss(f"{n}-segments", (10, 5), 7, 33, _O.PRESETS[n], pad="left", packed=True)
      for n in ("grpo", "dr_grpo", "luspo", "gspo", "gmpo", "vespo")),
    linear_policy_loss("costate-gspo-segments", (8, 5), 64, 257, _O.GSPO, pad="right", packed=True,
                       costate={"he": 9, "relaxation": "gumbel", "tau": 0.6}),
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
    linear_policy_loss("costate-expected", (8, 5), 64, 1000, _O.GRPO, pad="right", costate={}),
    linear_policy_loss("costate-tied-gumbel", (8, 5), 64, 1000, _O.DAPO, pad="left",
                       costate={"tied": True, "relaxation": "gumbel"}),
    linear_policy_loss("costate-full", (8, 5), 123, 1035, _FULL, pad="right", bias="plain",
                       temperature=1.3, softcap=6.0,
                       costate={"he": 50, "relaxation": "gumbel", "tau": 1.7, "weight": 0.3}),
    linear_policy_loss("costate-gspo", (8, 5), 64, 257, _O.GSPO, pad="right", temperature=0.7,
                       costate={"he": 9, "relaxation": "gumbel", "tau": 0.6}),
    linear_policy_loss("costate-zero-rows", (0, 5), 7, 33, _O.GRPO, costate={}),
)  # fmt: skip

BENCH: tuple[Case, ...] = (
    group_advantages("4096", 4096, "grpo"),
    policy_loss("256x128", (256, 128), _O.GRPO, pad="right"),
    linear_policy_loss("2048x256x8192", (64, 32), 256, 8192, _O.DAPO, token_advantages=True),
    linear_policy_loss("1024x576x49152", (32, 32), 576, 49152, _O.DAPO, token_advantages=True),
    linear_policy_loss("4096x576x49152", (64, 64), 576, 49152, _O.DAPO, token_advantages=True),
)  # fmt: skip
