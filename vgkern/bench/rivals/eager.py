"""Plain PyTorch in the dtype of the inputs, as one writes it without a kernel; and torch.compile.

The same functions serve both. The policy loss of one row is also what completes a rival that gives
log-probs only.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..work import Inputs
from ._rival import Forward, Outputs, Rival, Skip


def row_loss(logp: Tensor, x: Inputs) -> Tensor:
    """DAPO: clipped ratios, mean over the active tokens."""
    o, a = x["objective"], x["advantages"]
    a = a[:, None] if a.ndim < logp.ndim else a
    r = (logp.float() - x["old_logp"]).exp()
    loss = -torch.min(r * a, r.clamp(1 - o.clip_low, 1 + o.clip_high) * a)
    mask = x.get("mask")
    return loss.mean() if mask is None else loss.where(mask, 0).sum() / mask.sum()


def linear_policy_loss(x: Inputs) -> Outputs:
    lp = F.linear(x["hidden"], x["weight"]).log_softmax(-1)
    return (row_loss(lp.gather(-1, x["targets"][..., None])[..., 0], x),)


def token_logprobs(x: Inputs) -> Outputs:
    lp = x["logits"].log_softmax(-1)
    d = lp.detach()
    return lp.gather(-1, x["targets"][..., None])[..., 0], -(d.exp() * d).sum(-1)


def linear_token_logprobs(x: Inputs) -> Outputs:
    return token_logprobs({"logits": F.linear(x["hidden"], x["weight"]), "targets": x["targets"]})


def linear_sample(x: Inputs) -> Outputs:
    """The exponential race: argmax of p / e."""
    lp = F.linear(x["hidden"], x["weight"]).float().log_softmax(-1)
    token = (lp.exp() / torch.empty_like(lp).exponential_(1)).argmax(-1)
    return token, lp.gather(-1, token[..., None])[..., 0], -(lp.exp() * lp).sum(-1)


def multinomial(x: Inputs) -> Outputs:
    lp = F.linear(x["hidden"], x["weight"]).float().log_softmax(-1)
    token = torch.multinomial(lp.exp(), 1)
    return token[:, 0], lp.gather(-1, token)[:, 0], -(lp.exp() * lp).sum(-1)


def linear_divergence(x: Inputs) -> Outputs:
    lp = F.linear(x["hidden"], x["weight"]).log_softmax(-1)
    lq = F.linear(x["teacher_hidden"], x["teacher_weight"]).detach().log_softmax(-1)
    d = lp.detach()
    return (lp.exp() * (lp - lq)).sum(-1), -(d.exp() * d).sum(-1)


def group_advantages(x: Inputs) -> Outputs:
    _, i = x["groups"].unique(return_inverse=True)
    r = x["rewards"].float()
    zeros = r.new_zeros(int(i.max()) + 1)
    n = zeros.index_add(0, i, torch.ones_like(r))
    centred = r - (zeros.index_add(0, i, r) / n)[i]
    std = (zeros.index_add(0, i, centred.square()) / (n - 1)).sqrt()
    return ((centred / (std[i] + 1e-4)).to(x["rewards"].dtype),)


def policy_loss(x: Inputs) -> Outputs:
    """GRPO: mean over sequences of the mean over their tokens."""
    o, mask = x["objective"], x["mask"]
    r = (x["logp"] - x["old_logp"]).where(mask, 0).exp()
    a = x["advantages"][:, None]
    loss = -torch.min(r * a, r.clamp(1 - o.clip_low, 1 + o.clip_high) * a).where(mask, 0)
    return ((loss.sum(-1) / mask.sum(-1).clamp(min=1)).mean(),)


PLAIN: dict[str, Callable[[Inputs], Outputs]] = {
    f.__name__: f
    for f in (
        linear_policy_loss, linear_token_logprobs, token_logprobs, linear_sample,
        linear_divergence, group_advantages, policy_loss,
    )
}  # fmt: skip
SAME = "its plain PyTorch is the backend torch"


class Eager(Rival):
    name, package = "torch eager", "torch"

    def forward(self, op: str) -> Forward:
        if op not in PLAIN:
            raise Skip(SAME)
        return PLAIN[op]


class Compiled(Rival):
    """Compiled for these very shapes; the compilation is not timed."""

    name, package = "torch.compile", "torch"

    def forward(self, op: str) -> Forward:
        if op not in PLAIN:
            raise Skip(SAME)
        torch._dynamo.reset()  # else the ninth shape runs uncompiled
        compiled: Forward = torch.compile(PLAIN[op], dynamic=False)
        return compiled


class Multinomial(Rival):
    name, package = "torch.multinomial", "torch"

    def forward(self, op: str) -> Forward:
        if op != "linear_sample":
            raise Skip("it has no such op")
        return multinomial
