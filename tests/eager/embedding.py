"""Plain PyTorch for the ops with two vocabularies, as users write it; in fp64 the truth."""

import torch
import torch.nn.functional as F
from mutation import reference, scaled_gradient

import vgkern


def eager_noisy_embedding(
    hidden, weight, embedding, tokens, noise=None, bias=None, relaxation="gumbel", tau=1.0,
    temperature=1.0, softcap=None
):  # fmt: skip
    x = F.linear(hidden, weight, bias)
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    z = z.masked_fill(x == -torch.inf, -torch.inf) / temperature
    if relaxation == "gumbel":
        s, p = noise.rows(hidden.shape[:-1], z.device)
        words = vgkern.Noise(noise.seed, s, p).words(z.shape[-1]).to(torch.float64)
        u = ((words + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
        z = (z + -torch.log(-torch.log1p(-u)).to(z.dtype).view(z.shape)) / tau
    soft = z.softmax(-1) @ embedding.detach()
    return {"x": embedding[tokens] + (soft - soft.detach())}


class Beside(torch.autograd.Function):
    """logp as it is; its backward pass adds the gradient of `term`, whatever arrives."""

    @staticmethod
    def forward(ctx, logp, term):
        return logp.clone()

    @staticmethod
    def backward(ctx, dlogp):
        return dlogp, torch.ones((), dtype=dlogp.dtype)


def carried(costate, keep, hidden, weight, bias=None, temperature=1.0, softcap=None):
    """weight * <noisy_embedding, value> over the rows `keep`: the term that a costate adds."""
    value = costate.value.to(hidden.dtype).masked_fill(~keep[..., None], 0)
    table, y = costate.embedding.to(hidden.dtype), torch.zeros(keep.shape, dtype=torch.int64)
    x = eager_noisy_embedding(
        hidden.masked_fill(~keep[..., None], 0), weight, table.detach(), y, costate.noise, bias,
        costate.relaxation, costate.tau, temperature, softcap
    )["x"]  # fmt: skip
    return costate.weight * (x * value).sum()


def eager_linear_divergence(
    hidden, weight, teacher_hidden, teacher_weight, kind="reverse_kl", temperature=1.0, mask=None,
    softcap=None, teacher_softcap=None
):  # fmt: skip
    keep = torch.ones(hidden.shape[:-1], dtype=torch.bool) if mask is None else mask
    hidden, teacher_hidden = (x.masked_fill(~keep[..., None], 0) for x in (hidden, teacher_hidden))

    def log_softmax(h, w, cap):
        x = F.linear(h, w)
        z = x if cap is None else cap * torch.tanh(x / cap)
        return F.log_softmax(z.masked_fill(x == -torch.inf, -torch.inf) / temperature, -1)

    lp = log_softmax(hidden, weight, softcap)
    lq = log_softmax(teacher_hidden, teacher_weight, teacher_softcap).detach()

    def kl(a, b):  # KL(a || b)
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if kind == "jsd":
        lm = torch.logaddexp(lp, lq) - torch.tensor(2.0).to(lp).log()
        value = (kl(lp, lm) + kl(lq, lm)) / 2
    else:
        value = kl(lq, lp) if kind == "forward_kl" else kl(lp, lq)
    return {
        "divergence": value.where(keep, 0),
        "entropy": (-(lp.exp() * lp).sum(-1)).where(keep, 0),
    }


# What the oracle must see: (case, how the reference is broken)
MUTATIONS = {
    "noisy_embedding: noise of the next position": (
        "noisy_embedding-h7-v31-3d", reference(
            lambda ref, h, w, b, e, y, n, *a: ref(
                h, w, b, e, y, vgkern.Noise(n.seed, n.sequence, n.position + 1), *a))),
    "noisy_embedding: table also through the relaxation": (
        "noisy_embedding-h64-v1000-expected", reference(
            lambda ref, h, w, b, e, *a: ref(h, w, b, scaled_gradient(e), *a))),
    "noisy_embedding: tau not in the gradient": (
        "noisy_embedding-h64-v33-tau", reference(
            lambda ref, h, w, b, e, y, n, tau, *a: ref(h, w, b, e, y, n, 1.0, *a))),
    "linear_divergence: the other direction": (
        "linear_divergence-near-reverse", reference(
            lambda ref, h, w, th, tw, m, t, k, *a: ref(h, w, th, tw, m, t, 0, *a))),
    "linear_divergence: the student's soft-cap for both": (
        "linear_divergence-softcaps-reverse", reference(
            lambda ref, *a: ref(*a[:8], a[7]))),
    "linear_divergence: entropy without gradient": (
        "linear_divergence-near-jsd", reference(
            lambda ref, *a: (o := ref(*a))._replace(entropy=o.entropy.detach()))),
    "linear_divergence: dW 1% too large": (
        "linear_divergence-h7-v31-3d", reference(
            lambda ref, h, w, *a: ref(h, scaled_gradient(w), *a))),
}  # fmt: skip
