"""quack 0.6: its cross-entropy on logits. Its linear cross-entropy gives one number for all rows,
which neither a log-prob per token nor a policy loss can be made of."""

from ..work import Inputs
from ._rival import Forward, GpuOp, Outputs, Skip


class Quack(GpuOp):
    name, package, op = "quack", "quack-kernels", "token_logprobs"
    module, function = "quack.cross_entropy", "cross_entropy"

    def forward(self, op: str) -> Forward:
        if op.startswith("linear_token") or op == "linear_policy_loss":
            raise Skip("its linear op returns one loss for all tokens, no log-prob of each")
        return super().forward(op)

    def outputs(self, x: Inputs) -> Outputs:
        return -self.call(x["logits"], x["targets"], reduction="none"), None
