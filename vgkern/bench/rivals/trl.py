"""TRL 1.16: its chunked log-prob and divergence, and its log-prob from logits (`trl/kernels`)."""

from typing import Any

import torch

from ..work import Inputs
from ._rival import Forward, Outputs, Rival, Skip
from .eager import row_loss

CHUNK = 32768  # columns; what TRL's trainers pass


class Trl(Rival):
    name, package = "TRL", "trl"
    logprob: Any
    divergence: Any
    from_logits: Any

    def load(self, device: torch.device) -> None:
        try:
            from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
            from trl.kernels.chunked_logprob import ChunkedLogProbFunction
            from trl.trainer.utils import selective_log_softmax_and_entropy
        except ImportError as error:
            raise self.absent(error) from error
        self.logprob = ChunkedLogProbFunction.apply
        self.divergence = ChunkedDivergenceFunction.apply
        self.from_logits = selective_log_softmax_and_entropy

    def forward(self, op: str) -> Forward:
        found = getattr(self, f"_{op}", None)
        if found is None:
            raise Skip("it has no such op that is callable alone")
        forward: Forward = found
        return forward

    def note(self, op: str) -> str:
        return "its log-prob, then a plain loss" if op == "linear_policy_loss" else ""

    def _linear_token_logprobs(self, x: Inputs) -> Outputs:
        h, w, y = x["hidden"], x["weight"], x["targets"]
        out = self.logprob(h, w, None, y, 1.0, CHUNK, None, 1.0, ("entropy",))
        return out[0], out[1]

    def _linear_policy_loss(self, x: Inputs) -> Outputs:
        h, y = x["hidden"].flatten(0, -2), x["targets"].flatten()
        logp = self.logprob(h, x["weight"], None, y, 1.0, CHUNK, None, 1.0, ())[0]
        return (row_loss(logp.view_as(x["targets"]), x),)

    def _token_logprobs(self, x: Inputs) -> Outputs:
        logp, entropy = self.from_logits(x["logits"], x["targets"], entropy_requires_grad=False)
        return logp, entropy

    def _linear_divergence(self, x: Inputs) -> Outputs:
        student, teacher = (x["hidden"], x["weight"]), (x["teacher_hidden"], x["teacher_weight"])
        divergence, entropy = self.divergence(*student, None, *teacher, None, 1.0)  # reverse KL
        return divergence, entropy
