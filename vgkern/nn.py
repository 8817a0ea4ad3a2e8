"""Module twins of the ops that have hyper-parameters: they hold them and call the function."""

from typing import Any

from torch import Tensor, nn

from vgkern import objectives
from vgkern.objectives import Objective
from vgkern.ops import _check
from vgkern.ops.linear_policy_loss import linear_policy_loss
from vgkern.ops.linear_token_logprobs import linear_token_logprobs
from vgkern.ops.policy_loss import PolicyLoss as PolicyLossOutput
from vgkern.ops.policy_loss import policy_loss
from vgkern.ops.token_logprobs import TokenLogprobs as TokenLogprobsOutput
from vgkern.ops.token_logprobs import token_logprobs

__all__ = ["LinearPolicyLoss", "LinearTokenLogprobs", "PolicyLoss", "TokenLogprobs"]


class _Scaled(nn.Module):
    """Temperature and soft-cap, checked when the module is made."""

    def __init__(self, temperature: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.temperature = _check.positive("temperature", temperature)
        self.softcap = _check.softcap(softcap) or None

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, softcap={self.softcap}"


class TokenLogprobs(_Scaled):
    """`vgkern.token_logprobs` at a fixed temperature and soft-cap."""

    def forward(self, logits: Tensor, targets: Tensor, **options: Any) -> TokenLogprobsOutput:
        return token_logprobs(
            logits, targets, temperature=self.temperature, softcap=self.softcap, **options
        )


class LinearTokenLogprobs(_Scaled):
    """`vgkern.linear_token_logprobs` at a fixed temperature and soft-cap."""

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
    ) -> TokenLogprobsOutput:
        return linear_token_logprobs(
            hidden, weight, targets, temperature=self.temperature, softcap=self.softcap, **options
        )


class PolicyLoss(nn.Module):
    """`vgkern.policy_loss` of one objective."""

    def __init__(self, objective: str | Objective = "grpo") -> None:
        super().__init__()
        self.objective = objectives.resolve(objective)

    def forward(self, logp: Tensor, advantages: Tensor, **options: Any) -> PolicyLossOutput:
        return policy_loss(logp, advantages, objective=self.objective, **options)

    def extra_repr(self) -> str:
        return f"{self.objective}"


class LinearPolicyLoss(_Scaled):
    """`vgkern.linear_policy_loss` of one objective at a fixed temperature and soft-cap."""

    def __init__(
        self,
        objective: str | Objective = "grpo",
        temperature: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(temperature, softcap)
        self.objective = objectives.resolve(objective)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        advantages: Tensor | None = None,
        **options: Any,
    ) -> PolicyLossOutput:
        return linear_policy_loss(
            hidden, weight, targets, advantages, objective=self.objective,
            temperature=self.temperature, softcap=self.softcap, **options
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.objective}, {super().extra_repr()}"
