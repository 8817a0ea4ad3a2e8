"""FlashInfer's sampler on logits; the product with the head is torch's, the log-prob a gather."""

from typing import Any

import torch
import torch.nn.functional as F

from ..work import Inputs
from ._rival import Forward, Outputs, Rival, Skip


class FlashInfer(Rival):
    name, package = "FlashInfer", "flashinfer-python"
    sample: Any

    def load(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise Skip("GPU only")
        try:
            from flashinfer.sampling import sampling_from_logits
        except ImportError as error:
            raise self.absent(error) from error
        self.sample = sampling_from_logits

    def forward(self, op: str) -> Forward:
        if op != "linear_sample":
            raise Skip("it has no such op")
        return self._linear_sample

    def note(self, op: str) -> str:
        return "no entropy"

    def _linear_sample(self, x: Inputs) -> Outputs:
        z = F.linear(x["hidden"], x["weight"]).float()
        token = self.sample(z).long()
        return token, z.gather(-1, token[:, None])[:, 0] - z.logsumexp(-1), None
