"""Apple's cut-cross-entropy: its kernel on a GPU, its compiled PyTorch on a CPU."""

from typing import Any

import torch

from ..work import Inputs
from ._rival import Forward, Outputs, Rival, Skip
from .eager import row_loss


class Cce(Rival):
    name, package = "cut-cross-entropy", "cut-cross-entropy"
    linear_cross_entropy: Any
    impl = "cce"

    def load(self, device: torch.device) -> None:
        try:
            from cut_cross_entropy import linear_cross_entropy
        except ImportError as error:
            raise self.absent(error) from error
        self.linear_cross_entropy = linear_cross_entropy
        self.impl = "cce" if device.type == "cuda" else "torch_compile"

    def forward(self, op: str) -> Forward:
        if op not in ("linear_token_logprobs", "linear_policy_loss"):
            raise Skip("it has no such op")
        torch._dynamo.reset()
        return self._logprobs if op == "linear_token_logprobs" else self._loss

    def note(self, op: str) -> str:
        path = "" if self.impl == "cce" else "its torch path, "
        plain = "then a plain loss" if op == "linear_policy_loss" else "no entropy"
        return path + plain

    def _logprobs(self, x: Inputs) -> Outputs:
        h, w, y = x["hidden"], x["weight"], x["targets"]
        return -self.linear_cross_entropy(h, w, y, reduction="none", impl=self.impl), None

    def _loss(self, x: Inputs) -> Outputs:
        flat = {"hidden": x["hidden"].flatten(0, -2), "targets": x["targets"].flatten()}
        logp = self._logprobs({**flat, "weight": x["weight"]})[0]
        assert logp is not None
        return (row_loss(logp.view_as(x["targets"]), x),)
