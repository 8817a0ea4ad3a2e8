"""verl 0.9: policy losses and advantage estimators by name, and its fused log-prob op rebound.

Importing this module registers the names as soon as verl's registry is there; it imports nothing of
verl itself. verl imports it by the entry point `verl.plugins` of an installed vgkern, or because
of VERL_USE_EXTERNAL_MODULES=vgkern.integrations.verl.

    actor_rollout_ref.actor.policy_loss.loss_mode=vgkern          verl's "vanilla", fused
                                               or vgkern_gspo, vgkern_sapo, vgkern_cispo
    algorithm.adv_estimator=vgkern_grpo_verl   or any other estimator of `group_advantages`

The losses read the knobs of the same-named losses of verl from the actor's config (clip_ratio_low,
clip_ratio_high, clip_ratio_c, tau_pos, tau_neg, loss_agg_mode, global_batch_info) and give their
values. An objective of your own gets a name by `register_objective`.
"""

import importlib
import importlib.abc
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgkern import objectives
from vgkern.integrations._patch import IntegrationError, Patch, parameters, refuse, version
from vgkern.integrations._weight import matrix
from vgkern.objectives import ESTIMATORS, Objective
from vgkern.ops._policy_rows import token_level
from vgkern.ops.group_advantages import group_advantages
from vgkern.ops.linear_token_logprobs import linear_token_logprobs
from vgkern.ops.policy_loss import policy_loss

CORE = "verl.trainer.ppo.core_algos"
LOSS = (
    "old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights"
)
FUSED = "verl.utils.kernel.linear_cross_entropy"
FUSED_FORWARD = "ctx, hidden, weight, labels, temperature, reduction, dist_process_group"
TORCH = "verl.utils.experimental.torch_functional"
TORCH_FORWARD = "self, hidden_states, vocab_weights, input_ids, temperature"
REMEDY = "Install verl>=0.9,<0.10, or choose one of verl's own losses and estimators."
REDUCTIONS = {
    "token-mean": "token",
    "token-sum": "sum",
    "seq-mean-token-sum": "seq_sum",
    "seq-mean-token-sum-norm": "seq_sum",
    "seq-mean-token-mean": "seq",
}

log = logging.getLogger("vgkern")


def _clip(config: Any) -> dict[str, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    either = config.clip_ratio
    return {
        "clip_low": either if low is None else low,
        "clip_high": either if high is None else high,
    }


# What each name says, given the actor's config.
LOSSES: dict[str, Callable[[Any], Objective]] = {
    "vgkern": lambda c: objectives.PPO.replace(dual_clip=c.get("clip_ratio_c", 3.0), **_clip(c)),
    "vgkern_gspo": lambda c: objectives.GSPO_TOKEN.replace(**_clip(c)),
    "vgkern_sapo": lambda c: objectives.SAPO.replace(tau_pos=c.tau_pos, tau_neg=c.tau_neg),
    "vgkern_cispo": lambda c: objectives.CISPO_RELATIVE.replace(**_clip(c)),
}


def register() -> None:
    """Enters every name in verl's registries. Raises IntegrationError when they have changed."""
    core = _module(CORE)
    refuse("verl", f"the signature of {CORE}.register_policy_loss",
           parameters(getattr(core, "register_policy_loss", None)), "name", REMEDY)  # fmt: skip
    refuse("verl", f"the signature of {CORE}.register_adv_est",
           parameters(getattr(core, "register_adv_est", None)), "name_or_enum", REMEDY)  # fmt: skip
    found = parameters(getattr(core, "compute_policy_loss_vanilla", None))
    refuse("verl", "the signature of a policy loss", found, LOSS, REMEDY)
    for name, objective_of in LOSSES.items():
        core.register_policy_loss(name)(_policy_loss(objective_of))
    for estimator in ESTIMATORS:
        name = f"vgkern_{estimator}"
        if name not in core.ADV_ESTIMATOR_REGISTRY:  # verl refuses a second function of a name
            core.register_adv_est(name)(_advantages(estimator))


def register_objective(name: str, objective: str | Objective) -> None:
    """Makes `policy_loss.loss_mode=<name>` this objective. Of the config only the aggregation and
    the global batch are read; the clip bounds are the objective's own."""
    register()
    chosen = objectives.resolve(objective)
    _module(CORE).register_policy_loss(name)(_policy_loss(lambda _: chosen))


def _policy_loss(objective_of: Callable[[Any], Objective]) -> Callable[..., Any]:
    def loss(
        old_log_prob: Tensor,  # [B, T]
        log_prob: Tensor,  # [B, T]
        advantages: Tensor,  # [B, T]
        response_mask: Tensor,  # [B, T]
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # [B, T]
    ) -> tuple[Tensor, dict[str, float]]:
        o = objective_of(config)
        if o.surrogate == "sapo":  # as in verl, whatever the config says
            loss_agg_mode = "seq-mean-token-mean"
        if loss_agg_mode not in REDUCTIONS:
            raise ValueError(
                f"loss_agg_mode: got {loss_agg_mode!r}; allowed: {', '.join(REDUCTIONS)}"
            )
        batch = dict(getattr(config, "global_batch_info", None) or {})
        if rollout_is_weights is not None:  # every surrogate is proportional to the advantage
            if o.beta or o.surrogate == "vespo":
                raise ValueError(
                    "rollout_is_weights: got a tensor; allowed: None with a KL term or vespo"
                )
            advantages = advantages * rollout_is_weights
        with token_level():  # as verl gives them; its rows are padded, one sequence each
            out = policy_loss(
                log_prob, advantages, objective=o.replace(reduction=REDUCTIONS[loss_agg_mode]),
                old_logp=old_log_prob, mask=response_mask,
                normalizer=_normalizer(loss_agg_mode, response_mask, **batch),
            )  # fmt: skip
        return out.loss, _metrics(out.metrics, old_log_prob, log_prob, response_mask)

    return loss


def _normalizer(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: int | Tensor | None = None,
    global_batch_size: int | Tensor | None = None,
    loss_scale_factor: int | None = None,
) -> float | Tensor:
    """What verl's `agg_loss` divides by, times 1/dp_size (FSDP averages over the ranks)."""
    if mode == "token-sum":
        return 1 / dp_size
    given = batch_num_tokens if mode == "token-mean" else global_batch_size
    if given is None:
        if dp_size > 1:
            name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
            raise ValueError(f"{name}: got None; allowed: a number when dp_size > 1")
        given = mask.sum() if mode == "token-mean" else (mask.sum(-1) > 0).sum()
    if mode == "seq-mean-token-sum-norm":
        given = given * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return given / dp_size


def _metrics(m: dict[str, Tensor], old: Tensor, new: Tensor, mask: Tensor) -> dict[str, float]:
    """verl's three, over all tokens of the mask; one host sync instead of three."""
    live = mask != 0
    tokens = m["tokens"].clamp(min=1)
    gap = (old - new.detach()).where(live, 0).clamp(-20, 20).sum()
    clipped = (m["clip_low"] + m["clip_high"]) * m["active"]
    three = torch.stack([clipped, m["dual_clip"] * m["active"], gap.float()]) / tokens
    names = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl")
    return dict(zip(names, three.tolist(), strict=True))


def _advantages(estimator: str) -> Callable[..., Any]:
    def advantages(
        token_level_rewards: Tensor,  # [B, T]
        response_mask: Tensor,  # [B, T]
        index: Any = None,  # [B] group of each sample, of any type
        **rest: Any,
    ) -> tuple[Tensor, Tensor]:
        if index is None:
            raise ValueError("index: got None; allowed: the group (uid) of every sample")
        _, ids = np.unique(np.asarray(index).astype(str), return_inverse=True)
        rewards = token_level_rewards.sum(-1)
        groups = torch.as_tensor(ids.reshape(-1), dtype=torch.int64, device=rewards.device)
        a = group_advantages(rewards, groups, estimator=estimator)[:, None] * response_mask
        return a, a

    return advantages


def patch(*, backend: str | None = None) -> Patch:
    """Puts `vgkern.linear_token_logprobs` under verl's fused heads (`model.use_fused_kernels=True`,
    impl_backend "triton" or "torch") until `undo()` or the end of a `with` block.

    "liger" stays Liger's, and so do files of Megatron that were imported before.
    Raises IntegrationError when the two functions have other parameters.
    """
    fused, plain = _module(FUSED), _module(TORCH)
    op = getattr(fused, "LinearCrossEntropy", None)
    found = parameters(getattr(op, "forward", None))
    refuse("verl", f"the signature of {FUSED}.LinearCrossEntropy.forward",
           found, FUSED_FORWARD, REMEDY)  # fmt: skip
    owner: Any = getattr(plain, "FusedLinearForPPO", None)
    found = parameters(getattr(owner, "forward", None))
    refuse("verl", f"the signature of {TORCH}.FusedLinearForPPO.forward",
           found, TORCH_FORWARD, REMEDY)  # fmt: skip
    stock = owner.forward

    def build(patch: Patch) -> list[tuple[Any, str, Any]]:
        def linear_cross_entropy(
            hidden: Tensor,  # [..., H]
            weight: Tensor,  # [V, H], or this rank's shard
            labels: Tensor,  # [...]
            temperature: float = 1.0,
            reduction: str = "none",
            dist_process_group: Any = None,
        ) -> tuple[Tensor, Tensor]:
            if reduction.lower() != "none":
                raise ValueError(f"reduction: got {reduction!r}; allowed: 'none'")
            patch.calls += 1
            shards = dist_process_group is not None and dist_process_group.size() > 1
            return linear_token_logprobs(
                hidden.reshape(-1, hidden.shape[-1]), matrix(weight), labels.reshape(-1).long(),
                temperature=temperature, group=dist_process_group if shards else None,
                backend=backend,
            )  # fmt: skip

        def forward(
            self: Any,
            hidden_states: Tensor,
            vocab_weights: Tensor,
            input_ids: Tensor,
            temperature: float = 1.0,
        ) -> tuple[Tensor, Tensor]:
            if self.impl_backend != "torch":
                return stock(self, hidden_states, vocab_weights, input_ids, temperature)
            patch.calls += 1
            return linear_token_logprobs(
                hidden_states, matrix(vocab_weights), input_ids.long(), temperature=temperature,
                backend=backend,
            )  # fmt: skip

        return [
            (fused, "linear_cross_entropy", linear_cross_entropy),
            (owner, "forward", forward),
        ]

    return Patch(build)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise IntegrationError(
            f"verl {version('verl')}: {name} cannot be imported ({error}). {REMEDY}"
        ) from error


class _Registry(importlib.abc.MetaPathFinder):
    """Registers right after verl's own code has imported `CORE`: importing it here, while verl
    starts, would add it to processes that never need it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != CORE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                if self in sys.meta_path:  # not before: a spec may be looked up without an import
                    sys.meta_path.remove(self)
                sys.modules.setdefault(CORE, module)
                _register_or_say()

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_or_say() -> None:
    """A verl that has changed must still start for those who do not use us."""
    try:
        register()
    except IntegrationError as error:
        log.warning("vgkern's losses and estimators are not registered: %s", error)


if CORE in sys.modules:
    _register_or_say()
elif not any(isinstance(finder, _Registry) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Registry())
