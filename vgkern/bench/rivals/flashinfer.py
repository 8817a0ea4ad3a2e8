"""FlashInfer's sampler on logits; the product with the head is torch's, the log-prob a gather."""

import torch.nn.functional as F

from ..work import Inputs
from ._rival import GpuOp, Outputs


class FlashInfer(GpuOp):
    name, package, op = "FlashInfer", "flashinfer-python", "linear_sample"
    module, function = "flashinfer.sampling", "sampling_from_logits"

    def outputs(self, x: Inputs) -> Outputs:
        z = F.linear(x["hidden"], x["weight"]).float()
        token = self.call(z).long()
        return token, z.gather(-1, token[:, None])[:, 0] - z.logsumexp(-1), None
