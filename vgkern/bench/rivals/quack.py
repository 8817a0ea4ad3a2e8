"""quack 0.6: its cross-entropy on logits. Its linear cross-entropy gives one number for all rows,
which neither a log-prob per token nor a policy loss can be made of."""

from typing import Any

import torch

from ..work import Inputs
from ._rival import Forward, Outputs, Rival, Skip


class Quack(Rival):
    name, package = "quack", "quack-kernels"
    cross_entropy: Any

    def load(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise Skip("GPU only")
        try:
            from quack.cross_entropy import cross_entropy
        except ImportError as error:
            raise self.absent(error) from error
        self.cross_entropy = cross_entropy

    def forward(self, op: str) -> Forward:
        if op.startswith("linear_token") or op == "linear_policy_loss":
            raise Skip("its linear op returns one loss for all tokens, no log-prob of each")
        if op != "token_logprobs":
            raise Skip("it has no such op")
        return self._token_logprobs

    def note(self, op: str) -> str:
        return "no entropy"

    def _token_logprobs(self, x: Inputs) -> Outputs:
        return -self.cross_entropy(x["logits"], x["targets"], reduction="none"), None
