"""The loss of one micro-batch: task reward, KL, entropy and distillation, and the replay of noise.

    analytic    per-state KL, divergence from a teacher and entropy, summed over the vocabulary,
                and the score of those to come: `vgkern.costate.analytic_loss` (the default)
    sampled     KL by the objective's estimator on the sampled token, entropy of each state without
                what it does later, and a teacher's sampled log-ratios as rewards to go

Without KL, entropy and teacher it is `vgkern.linear_policy_loss` and nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vgkern
from vgkern import objectives
from vgkern.costate import Teacher, analytic_loss, future_advantages, replay_agreement
from vgkern.errors import ConfigError
from vgkern.ops._policy_rows import token_level

from .config import Config
from .device import of, precision
from .generate import Rollout
from .policy import Policy

REPLAY_LOGITS = 1 << 22  # logits a step may spend on replaying noise; at least REPLAY_ROWS rows
REPLAY_ROWS = 64
OF_TOKENS = ("kl", "entropy", "distill", "future", "replay")  # means over every sampled token


@dataclass
class Batch:
    """What one step learns from: the groups that carry a gradient."""

    prompts: list[list[int]]  # K groups
    rollout: Rollout  # K*G rows
    advantages: Tensor  # [K*G]
    normalizer: float  # over the whole batch, dropped groups included


def make_objective(config: Config, compute: str = "fp32") -> vgkern.Objective:
    """The config's. Under bf16 sampler and trainer differ by rounding, and an objective that says
    nothing of it gets the truncated importance weight of its kind."""
    knobs: dict[str, Any] = {}
    if config.kl_estimator == "sampled":
        knobs = {"beta": config.beta, "entropy_coef": config.entropy_coef}
    if config.clip_low:
        knobs["clip_low"] = config.clip_low
    if config.clip_high:
        knobs["clip_high"] = config.clip_high
    objective = objectives.resolve(config.objective).replace(**knobs)
    if compute == "bf16" and objective.sampler_correction == "none":
        kind = "token_truncate" if objective.row_local else "sequence_truncate"
        if objective.surrogate != "vespo":
            objective = objective.replace(sampler_correction=kind)
    if config.teacher and config.kl_estimator == "sampled" and not objective.row_local:
        raise ConfigError(
            f"objective: got {config.objective!r}, which has one ratio for a sequence; allowed "
            f"with a teacher: kl_estimator 'analytic', or an objective with a ratio per token"
        )
    return objective


class Update:
    """The frozen models beside the policy, and the loss. `replay` says whether noise is replayed
    in the next first pass."""

    def __init__(
        self, config: Config, policy: Policy, teacher: Policy | None, objective: vgkern.Objective
    ) -> None:
        self.config, self.policy, self.teacher, self.objective = config, policy, teacher, objective
        self.reference: Policy | None = None
        self.replay = False
        if config.beta and config.kl_estimator == "analytic" and policy.head().softcap is not None:
            raise ConfigError(
                f"beta: got {config.beta}, and a head with a soft-cap has no analytic divergence; "
                f"allowed: kl_estimator = 'sampled', or beta = 0"
            )
        self.hold()

    def hold(self) -> None:
        """The policy as it is now is what the KL holds it to."""
        self.reference = copy.deepcopy(self.policy) if self.config.beta else None

    @property
    def analytic(self) -> bool:
        """Are there analytic terms?"""
        return self.config.kl_estimator == "analytic" and self.everywhere

    @property
    def everywhere(self) -> bool:
        """Has a sample a gradient also where its group's rewards agree?"""
        return bool(self.config.beta or self.config.entropy_coef or self.teacher is not None)

    def loss(
        self,
        prompts: list[list[int]],
        rollout: Rollout,
        advantages: Tensor,
        normalizer: float,
        first_pass: bool,
        share: float = 1.0,  # of the step's samples that are here
    ) -> vgkern.PolicyLoss:
        """The first pass is on-policy: its ratio is exactly 1, and it checks the sampler.

        rollout and advantages: the host's; what is found is on the policy's device.
        """
        with precision(self.policy):
            return self._loss(prompts, rollout, advantages, normalizer, first_pass, share)

    def _loss(
        self, prompts: list[list[int]], host: Rollout, advantages: Tensor, normalizer: float,
        first_pass: bool, share: float,
    ) -> vgkern.PolicyLoss:  # fmt: skip
        config, head, device = self.config, self.policy.head(), of(self.policy)
        # a later pass's ratio is to the sampler itself: nothing is left to correct
        objective = (
            self.objective if first_pass else self.objective.replace(sampler_correction="none")
        )
        where = (prompts, host.tokens, config.group, host.lengths)
        groups = torch.arange(len(prompts), device=device).repeat_interleave(config.group)
        quiet = not bool(advantages.any())
        rollout, advantages = host.to(device), advantages.to(device, non_blocking=True)
        hidden = self.policy.hidden(*where)
        common: dict[str, Any] = {
            "objective": objective, "bias": head.bias, "temperature": config.temperature,
            "softcap": head.softcap, "old_logp": None if first_pass else rollout.logp,
            "sampler_logp": rollout.logp if first_pass else None, "mask": rollout.mask,
            "normalizer": normalizer,
        }  # fmt: skip
        given, more = (hidden, head.weight, rollout.tokens), {}
        if self.analytic:
            out = analytic_loss(
                *given, self.teachers(where), entropy_coef=config.entropy_coef, groups=groups,
                advantages=advantages, future=config.future, discount=config.discount, **common,
            )  # fmt: skip
        else:
            if self.teacher is not None:
                ratio = rollout.logp - self.logp(self.teacher, where, rollout.tokens)
                more["distill"] = ratio[rollout.mask].mean()
                advantages = advantages[:, None] + future_advantages(
                    config.distill_coef * ratio, groups, mask=rollout.mask, future=config.future,
                    discount=config.discount, own=True,
                )  # fmt: skip
            ref = None
            if self.reference is not None:
                ref = self.logp(self.reference, where, rollout.tokens)
            with token_level():  # of a distillation
                out = vgkern.linear_policy_loss(
                    *given, advantages, ref_logp=ref, sparse_tol=config.sparse_tol or None, **common
                )
        if first_pass and self.replay and rollout.sequence is not None:
            more["replay"] = self.replayed(hidden.detach(), rollout, host.mask, share)
        if first_pass and (quiet or (device.type == "cpu" and not int(out.metrics["active"]))):
            gap = self.gap(hidden.detach(), rollout)  # the op compares active rows alone
            more["sampler_gap"] = gap.where(out.metrics["active"] == 0, out.metrics["sampler_gap"])
        return vgkern.PolicyLoss(out.loss, {**out.metrics, **more})

    def teachers(self, where: tuple[Any, ...]) -> list[Teacher]:
        config, found = self.config, []
        for policy, kind, coef, name in (
            (self.reference, "reverse_kl", config.beta, "kl"),
            (self.teacher, config.distill_kind, config.distill_coef, "distill"),
        ):
            if policy is not None:
                with torch.no_grad():
                    hidden, head = policy.hidden(*where), policy.head()
                found.append(Teacher(hidden, head.weight, head.bias, kind, coef, name))
        return found

    def logp(self, policy: Policy, where: tuple[Any, ...], tokens: Tensor) -> Tensor:
        head = policy.head()
        with torch.no_grad():
            return vgkern.linear_token_logprobs(
                policy.hidden(*where), head.weight, tokens, bias=head.bias,
                temperature=self.config.temperature, softcap=head.softcap,
            ).logp  # fmt: skip

    def gap(self, hidden: Tensor, rollout: Rollout) -> Tensor:
        """Largest |logp of trainer - sampler| over all sampled tokens, nats."""
        head = self.policy.head()
        with torch.no_grad():
            logp = vgkern.linear_token_logprobs(
                hidden, head.weight, rollout.tokens.where(rollout.mask, -100), bias=head.bias,
                temperature=self.config.temperature, softcap=head.softcap,
            ).logp  # fmt: skip
        return (logp - rollout.logp).abs().where(rollout.mask, 0).max()

    def replayed(self, hidden: Tensor, rollout: Rollout, mask: Tensor, share: float) -> Tensor:
        """Share of the sampled tokens that this policy and their own noise choose again."""
        head = self.policy.head()
        rows = max(REPLAY_ROWS, REPLAY_LOGITS // len(head.weight))
        assert rollout.sequence is not None
        noise = vgkern.Noise(
            self.config.seed, rollout.sequence[:, None],
            torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device),
        )  # fmt: skip
        return replay_agreement(
            hidden, head.weight, rollout.tokens, noise, bias=head.bias,
            temperature=self.config.temperature, softcap=head.softcap, mask=mask,
            limit=max(1, round(rows * share)),
        )  # fmt: skip


def read(*parts: dict[str, Any]) -> list[dict[str, float]]:
    """The numbers of tensors on any device, in one transfer: each is a wait of the host."""
    values = [torch.as_tensor(v).detach().double() for part in parts for v in part.values()]
    numbers = iter(torch.stack(values).tolist())
    return [{name: next(numbers) for name in part} for part in parts]


def merge(parts: list[dict[str, float]], analytic: bool) -> dict[str, float]:
    """Metrics of micro-batches as one: sums, extremes, and means over active tokens (analytic
    terms and replay: over all tokens)."""
    merged = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("loss", "tokens", "active", "clamped"):
            merged[name] = sum(values)
        elif name in ("sampler_gap", "ratio_max"):
            merged[name] = extreme(max, values)
        elif name == "ratio_min":
            merged[name] = extreme(min, values)
        else:
            all_of = name in OF_TOKENS and (analytic or name != "entropy")
            weights = [part["tokens" if all_of else "active"] for part in parts]
            power = 2 if name == "future" or name.startswith("sparse_error") else 1  # mean square
            weighted = sum(v**power * w for v, w in zip(values, weights, strict=True))
            merged[name] = (weighted / max(1.0, sum(weights))) ** (1 / power)
    return merged


def extreme(of: Callable[[Iterable[float]], float], values: list[float]) -> float:
    """The largest or smallest; NaN where there is one, which max and min of Python may drop."""
    return math.nan if any(math.isnan(v) for v in values) else of(values)
