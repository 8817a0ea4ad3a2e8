"""Liger 0.8.5: its fused linear GRPO loss and its scaled cross-entropy with entropy.

The second one's fast kernels are for GPUs; on a CPU it is its own chunked fallback that runs.
"""

from typing import Any

import torch

from ..work import Inputs
from ._rival import Forward, Outputs, Rival, Skip


class Liger(Rival):
    name, package = "Liger", "liger-kernel"
    grpo: Any
    cross_entropy: Any
    on_cpu = False

    def load(self, device: torch.device) -> None:
        self.on_cpu = device.type == "cpu"
        try:
            from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss
            from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
                LigerFusedLinearScaledCrossEntropyFunction,
            )
        except ImportError as error:
            raise self.absent(error) from error
        self.grpo = LigerFusedLinearGRPOLoss
        self.cross_entropy = LigerFusedLinearScaledCrossEntropyFunction.apply

    def forward(self, op: str) -> Forward:
        if op == "linear_policy_loss":
            return self._linear_policy_loss
        if op == "linear_token_logprobs":
            return self._linear_token_logprobs
        if op == "token_logprobs":
            raise Skip("GPU only: its log-prob from logits is a Triton kernel without a gradient")
        raise Skip("it has no such op")

    def note(self, op: str) -> str:
        if op == "linear_policy_loss":
            return "chunks of one sequence, its default"
        return "its fallback: its kernels are for GPUs" if self.on_cpu else ""

    def _linear_policy_loss(self, x: Inputs) -> Outputs:
        o, y = x["objective"], x["targets"]
        loss = self.grpo(
            beta=0.0, use_ref_model=False, loss_type="dapo", temperature=1.0,
            epsilon_low=o.clip_low, epsilon_high=o.clip_high,
        )  # fmt: skip
        mask = x["mask"].float() if "mask" in x else torch.ones_like(x["old_logp"])
        args = (x["hidden"], x["weight"], y, mask, x["advantages"])
        return (loss(*args, old_per_token_logps=x["old_logp"])[0],)

    def _linear_token_logprobs(self, x: Inputs) -> Outputs:
        h, w, y = x["hidden"], x["weight"], x["targets"]
        nll, entropy = self.cross_entropy(h, w, y, 1.0, -100, 1, True)
        return -nll, entropy
