"""TRL's GRPOTrainer with the fused loss: `vgkern.integrations.trl.GRPOTrainer`."""

from typing import Any

import torch
import trl
from torch import Tensor

from vgkern.integrations import _head
from vgkern.integrations._patch import parameters, refuse, version
from vgkern.objectives import Objective
from vgkern.ops._policy_rows import token_level
from vgkern.ops.linear_policy_loss import linear_policy_loss
from vgkern.ops.noisy_embedding import noisy_embedding
from vgkern.ops.policy_loss import PolicyLoss

KEYWORD = "vgkern_head"
REMEDY = "Use trl.GRPOTrainer under vgkern.integrations.trl.patch(), which has no such limit."
GLOBAL = ("dapo", "cispo", "vespo")  # normalised by the tokens of the whole generation batch
REDUCTION = {"grpo": "seq", "sapo": "seq", "bnpo": "token", "dr_grpo": "fixed", "luspo": "seq_sum"}
IMAGES = ("pixel_values", "image_grid_thw", "num_images", "image_sizes", "token_type_ids",
          "mm_token_type_ids")  # fmt: skip


def objective_of(trainer: Any) -> Objective:
    """The objective that TRL's options say, with TRL's own formulas.

    Raises ValueError for a value that has no meaning in them (cispo's epsilon_high of 0).
    """
    args, kind = trainer.args, trainer.loss_type
    knobs: dict[str, Any] = {
        "ratio": trainer.importance_sampling_level,
        "clip_low": trainer.epsilon_low,
        "clip_high": trainer.epsilon_high,
        "delta": args.delta,
        "beta": trainer.beta,
        "kl_ratio_corrected": args.use_bias_correction_kl,
        "reduction": REDUCTION.get(kind, "token"),
    }
    if kind == "dr_grpo":
        knobs["max_length"] = trainer.max_completion_length
    elif kind == "cispo":  # TRL bounds the weight itself: min(r, epsilon_high)
        if not trainer.epsilon_high > 0:
            raise ValueError(
                f"epsilon_high: got {trainer.epsilon_high} with loss_type 'cispo', whose weight is "
                "min(ratio, epsilon_high); allowed: above 0 (5.0 is usual)"
            )
        high = trainer.epsilon_high - 1
        knobs |= {"surrogate": "cispo", "clip_low": 1.0, "clip_high": high, "delta": None}
    elif kind == "sapo":
        tau = {"tau_pos": args.sapo_temperature_pos, "tau_neg": args.sapo_temperature_neg}
        knobs |= {"surrogate": "sapo", "delta": None, **tau}
    elif kind == "vespo":
        names = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
        knobs |= {"surrogate": "vespo", "ratio": "sequence_sum", "delta": None}
        knobs |= {name: getattr(args, name) for name in names}
    return Objective(**knobs)


def _unsupported(trainer: Any) -> dict[str, bool]:
    args = trainer.args
    sequence = trainer.importance_sampling_level == "sequence"
    return {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in (*REDUCTION, *GLOBAL),
        "top_entropy_quantile below 1": trainer.top_entropy_quantile < 1.0,
        "entropy_coef, use_adaptive_entropy": bool(trainer._entropy_bonus_enabled),
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "a mixture-of-experts loss": bool(trainer.aux_loss_enabled),
        "cast_lm_head_to_fp32": bool(args.cast_lm_head_to_fp32),  # fp32 logits come anyway
        "vespo with sequence-level importance sampling": trainer.loss_type == "vespo" and sequence,
        "vespo with use_vllm": trainer.loss_type == "vespo" and bool(trainer.use_vllm),
    }


class GRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose loss is one `vgkern.linear_policy_loss`.

    Same arguments, same loss and gradients. Tokens whose gradient is exactly zero (masked, zero
    advantage, clipped) cost no matrix products on a CPU. Raises ValueError at construction for
    options that the fused loss has no form of, naming them.

    Inputs that a subclass adds in `_generate_and_score_completions`, both optional:
      advantages [B, T]     per token, as in TRL
      costates [B, T, He]   derivative of a differentiable part of the objective with respect to the
                            embedding of completion token t. Goes through that token into the head
                            and the hidden state that predicted it (`noisy_embedding`, relaxation
                            "expected"); the value of the loss does not change

    Of TRL's metrics there are `entropy` (mean over the tokens that can have a gradient), `kl`
    (without the ratio correction) and the mean `clip_ratio`s (of tokens, with sequence-level ratios
    too); no extremes per sequence, nothing of cispo's and vespo's.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        series = ".".join(version("trl").split(".")[:2])  # later ones rename inputs of the loss
        refuse("trl", "its version", f"{series}.x", "1.16.x", REMEDY)
        found = parameters(trl.GRPOTrainer._compute_loss)
        refuse("trl", "the signature of GRPOTrainer._compute_loss", found, _COMPUTE_LOSS, REMEDY)
        super().__init__(*args, **kwargs)
        missing = [name for name in _READ if not hasattr(self, name)]
        refuse("trl", "what GRPOTrainer has after its construction", missing, [], REMEDY)
        wrong = [name for name, given in _unsupported(self).items() if given]
        if wrong:
            raise ValueError(
                f"GRPOTrainer: got {'; '.join(wrong)}; not in the fused loss. {REMEDY}"
            )
        self.vgkern_backend, self.objective = backend, objective_of(self)
        adapted = hasattr(self.model, "get_base_model")  # PEFT
        self._base = self.model.get_base_model() if adapted else self.model
        self._scaling = _head.scaling(self._base.config)
        _head.add_head(self._base, KEYWORD)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        images = [name for name in IMAGES if inputs.get(name) is not None]
        if images:
            raise NotImplementedError(f"inputs: got {', '.join(images)}; text only. {REMEDY}")
        ids, keep = inputs["completion_ids"], inputs["completion_ids"].shape[1]
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        training = self.model.training
        steps = self.current_gradient_accumulation_steps if training else 1

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> PolicyLoss:
            rows = hidden[:, -keep - 1 : -1]  # state i predicts token i + 1
            given = _head.head(rows, weight, bias, self.temperature, *self._scaling)
            out = self._policy_loss(given, inputs, mask, steps)
            total = out.loss if self.loss_type in GLOBAL else out.loss / steps
            if inputs.get("costates") is not None:
                total = total + self._through_tokens(given, inputs, mask) / steps
            return PolicyLoss(total, out.metrics)

        with self.accelerator.autocast():
            out = model(
                input_ids=torch.cat([inputs["prompt_ids"], ids], 1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                **{KEYWORD: loss},
            )
        self._log_metrics("train" if training else "eval", out.metrics)
        return out.loss

    def _policy_loss(
        self, given: _head.Head, inputs: dict[str, Any], mask: Tensor, steps: int
    ) -> PolicyLoss:
        advantages = inputs["advantages"]
        if self.use_vllm and self.vllm_importance_sampling_correction:
            # every surrogate here is proportional to the advantage, the KL term is not
            correction = inputs["importance_sampling_ratio"]
            advantages = advantages.reshape(len(mask), -1) * correction
        normalizer = None
        if self.loss_type in GLOBAL:
            normalizer = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if self.model.training:
                normalizer = normalizer * steps / self.args.steps_per_generation
        # the correction makes them token-level; TRL's rows are padded, one sequence each
        with _head.no_autocast(given.hidden.device), token_level():
            return linear_policy_loss(
                given.hidden, given.weight, inputs["completion_ids"], advantages,
                objective=self.objective, old_logp=inputs.get("old_per_token_logps"),
                ref_logp=inputs["ref_per_token_logps"] if self.beta else None, mask=mask,
                normalizer=normalizer, backend=self.vgkern_backend, **_head.options(given)
            )  # fmt: skip

    def _through_tokens(self, given: _head.Head, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """Zero, with the gradient of the costates through the tokens they arrive at."""
        embedding = self._base.get_input_embeddings().weight.detach()
        costates = (inputs["costates"] * mask[..., None]).detach()
        tokens = inputs["completion_ids"].where(mask != 0, 0)
        with _head.no_autocast(given.hidden.device):
            x = noisy_embedding(
                given.hidden, given.weight, embedding.to(given.weight.dtype), tokens,
                relaxation="expected", backend=self.vgkern_backend, **_head.options(given)
            )  # fmt: skip
            term = (x.float() * costates).sum()
        return term - term.detach()

    def _log_metrics(self, mode: str, metrics: dict[str, Tensor]) -> None:
        """Means over the tokens of all processes."""
        m, to = metrics, self._metrics[mode]
        of_active = ("clip_low", "clip_high", "kl", "entropy")
        sums = torch.stack([m["tokens"], m["active"], *(m[k] * m["active"] for k in of_active)])
        totals: list[float] = self.accelerator.reduce(sums, reduction="sum").tolist()
        tokens, active, low, high, kl, entropy = totals
        tokens, active = max(tokens, 1.0), max(active, 1.0)
        to["entropy"].append(entropy / active)
        if self.beta:
            to["kl"].append(kl / tokens)
        if self.objective.surrogate == "clip":
            to["clip_ratio/low_mean"].append(low / tokens)
            to["clip_ratio/high_mean"].append(high / tokens)
            to["clip_ratio/region_mean"].append((low + high) / tokens)


_COMPUTE_LOSS = "self, model, inputs"
_READ = (
    "loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high", "beta", "temperature",
    "max_completion_length", "top_entropy_quantile", "off_policy_mask_threshold", "use_vllm",
    "aux_loss_enabled", "_entropy_bonus_enabled", "vllm_importance_sampling_correction",
    "_metrics", "accelerator",
)  # fmt: skip
