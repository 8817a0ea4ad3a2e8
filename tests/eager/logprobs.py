"""Plain PyTorch for the log-probability ops, as users write it; in fp64 the truth."""

import torch
import torch.nn.functional as F
from mutation import reference, scaled_gradient


def eager_token_logprobs(logits, targets, temperature=1.0, softcap=None, ignore_index=-100):
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = z.masked_fill(logits == -torch.inf, -torch.inf)
    lp = F.log_softmax(z / temperature, -1)
    keep = targets != ignore_index
    logp = lp.gather(-1, targets.clamp(0, lp.shape[-1] - 1)[..., None]).squeeze(-1)
    entropy = -(lp.exp() * lp.masked_fill(lp == -torch.inf, 0)).sum(-1)
    return {"logp": logp.where(keep, 0), "entropy": entropy.where(keep, 0)}


def eager_linear_token_logprobs(hidden, weight, targets, bias=None, **options):
    return eager_token_logprobs(F.linear(hidden, weight, bias), targets, **options)


# What the oracle must see: (case, how the reference is broken)
MUTATIONS = {
    "token_logprobs: off-by-one target": (
        "token_logprobs-v31-3d", reference(
            lambda ref, z, y, *a: ref(z, (y + 1) % z.shape[-1], *a))),
    "token_logprobs: entropy without gradient": (
        "token_logprobs-v33-temperature", reference(
            lambda ref, *a: (o := ref(*a))._replace(entropy=o.entropy.detach()))),
    "token_logprobs: temperature not in the gradient": (
        "token_logprobs-v33-temperature", reference(
            lambda ref, z, *a: ref(scaled_gradient(z, 0.7), *a))),
    "linear_token_logprobs: dW 1% too large": (
        "linear_token_logprobs-h64-v1000-ignore", reference(
            lambda ref, h, w, *a: ref(h, scaled_gradient(w), *a))),
    "linear_token_logprobs: one row of dh is zero": (
        "linear_token_logprobs-h64-v1000-ignore", reference(
            lambda ref, h, *a: ref(torch.cat([h[:1], h[1:2].detach(), h[2:]]), *a))),
    "linear_token_logprobs: no bias gradient": (
        "linear_token_logprobs-h7-v31-3d", reference(
            lambda ref, h, w, b, *a: ref(h, w, 0 * b + b.detach(), *a))),
}  # fmt: skip
