"""Plain PyTorch for the sampler, as users write it; in fp64 the truth."""

import torch
import torch.nn.functional as F
from eager.logprobs import at
from mutation import reference

import vgkern


def eager_linear_sample(
    hidden, weight, noise, bias=None, temperature=1.0, softcap=None, top_k=None, top_p=None,
    min_p=None
):  # fmt: skip
    x = F.linear(hidden, weight, bias)
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    z = z.masked_fill(x == -torch.inf, -torch.inf).reshape(-1, weight.shape[0])
    t = torch.as_tensor(temperature, dtype=z.dtype).expand(hidden.shape[:-1]).reshape(-1)
    s, q = noise.rows(hidden.shape[:-1], z.device)
    words = vgkern.Noise(noise.seed, s, q).words(z.shape[-1]).to(torch.float64)
    u = ((words + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    gumbel = -torch.log(-torch.log1p(-u))
    token, logp, entropy, gap = [], [], [], []
    cut = (top_k, top_p, min_p)
    for i, (row, temp, g) in enumerate(zip(z, t, gumbel, strict=True)):
        top_k, top_p, min_p = at(cut, i)
        if temp == 0:
            order = row.argsort(descending=True, stable=True)
            keep = order[:1]
        else:
            row = row / temp
            order = row.argsort(descending=True, stable=True)
            keep = order[: top_k or len(order)]
            p = row[keep].softmax(-1)
            if top_p is not None:
                below = torch.cat([p.new_zeros(1), p.cumsum(-1)[:-1]])
                keep = keep[(below < top_p) | (below == 0)]
            if min_p is not None:
                keep = keep[p[: len(keep)] >= min_p * p[0]]
        lp = row[keep].log_softmax(-1)
        score = row[keep].double() + g[keep]
        two = score.sort(descending=True).values[:2]
        gap.append(two[0] - two[1] if len(two) > 1 else two[0].new_tensor(torch.inf))
        token.append(keep[score.argmax()])
        logp.append(lp[score.argmax()])
        entropy.append(-(lp.exp() * lp.masked_fill(lp == -torch.inf, 0)).sum())
    shape = hidden.shape[:-1]
    out = {"logp": logp, "entropy": entropy, "gap": gap, "token": token}
    return {k: torch.stack(v).reshape(shape) if v else z.new_zeros(shape) for k, v in out.items()}


# What the oracle must see: (case, how the reference is broken)
MUTATIONS = {
    "linear_sample: log-prob before truncation": (
        "linear_sample-top-k", reference(
            lambda ref, *a: ref(*a)._replace(logp=ref(*a[:6], 0, *a[7:]).logp))),
    "linear_sample: noise of the next position": (
        "linear_sample-h7-v31", reference(
            lambda ref, h, w, b, n, *a: ref(
                h, w, b, vgkern.Noise(n.seed, n.sequence, n.position + 1), *a))),
}  # fmt: skip
