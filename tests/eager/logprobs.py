"""Plain PyTorch for the log-probability ops, as users write it; in fp64 the truth."""

import torch
import torch.nn.functional as F
from eager.embedding import Beside, carried
from mutation import reference, scaled_gradient


def eager_token_logprobs(logits, targets, temperature=1.0, softcap=None, ignore_index=-100):
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = z.masked_fill(logits == -torch.inf, -torch.inf)
    lp = F.log_softmax(z / temperature, -1)
    keep = targets != ignore_index
    logp = lp.gather(-1, targets.clamp(0, lp.shape[-1] - 1)[..., None]).squeeze(-1)
    entropy = -(lp.exp() * lp.masked_fill(lp == -torch.inf, 0)).sum(-1)
    return {"logp": logp.where(keep, 0), "entropy": entropy.where(keep, 0)}


def eager_linear_token_logprobs(
    hidden, weight, targets, bias=None, top_k=None, top_p=None, min_p=None, costate=None, **options
):
    if costate is not None:
        out = eager_linear_token_logprobs(hidden, weight, targets, bias, **options)
        keep = targets != options.pop("ignore_index", -100)
        term = carried(costate, keep, hidden, weight, bias, **options)
        return {**out, "logp": Beside.apply(out["logp"], term)}
    logits, t = F.linear(hidden, weight, bias), options.get("temperature")
    cut = (top_k, top_p, min_p)
    if all(x is None for x in cut) and not isinstance(t, torch.Tensor):
        return eager_token_logprobs(logits, targets, **options)
    return eager_truncated(logits, targets, (top_k, top_p, min_p), **options)


def eager_truncated(logits, targets, cut, temperature=1.0, softcap=None, ignore_index=-100):
    """Row by row: mask the logits, then log_softmax, as samplers process them."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = z.masked_fill(logits == -torch.inf, -torch.inf).reshape(-1, logits.shape[-1])
    t = torch.as_tensor(temperature, dtype=z.dtype).expand(targets.shape).reshape(-1)
    logp, entropy = [], []
    for i, (row, temp, y) in enumerate(zip(z, t, targets.reshape(-1), strict=True)):
        if y == ignore_index:
            logp.append(0 * row.sum().nan_to_num(0, 0, 0)), entropy.append(logp[-1])
            continue
        row = row / (temp if temp else 1)
        keep = torch.isin(
            torch.arange(len(row)), kept(row, *(at(cut, i) if temp else (1, None, None)))
        )
        lp = row.masked_fill(~keep, -torch.inf).log_softmax(-1)
        h = -(lp.exp() * lp.masked_fill(lp == -torch.inf, 0)).sum()
        dead = lp[y] == -torch.inf
        logp.append(lp[y].detach() if dead else lp[y])
        entropy.append(h.detach() if dead else h)
    out = {"logp": logp, "entropy": entropy}
    return {k: torch.stack(v).view(targets.shape) if v else 0 * z.sum() + z.new_zeros(targets.shape)
            for k, v in out.items()}  # fmt: skip


def at(cut, i):
    """The cuts of row i."""
    k, p, m = (x.reshape(-1)[i].item() if isinstance(x, torch.Tensor) else x for x in cut)
    return k or None, p, m


def kept(row, top_k=None, top_p=None, min_p=None):
    """Ids that survive, most likely first, ties to the lowest id."""
    order = row.detach().argsort(descending=True, stable=True)[:top_k]
    p = row.detach()[order].softmax(-1)
    before = p.cumsum(-1) - p
    keep = (torch.arange(len(p)) == 0) | (before < (2 if top_p is None else top_p))
    return order[keep & (p >= (min_p or 0) * p[0])]


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
    "linear_token_logprobs: log-prob before truncation": (
        "linear_token_logprobs-top-k", reference(
            lambda ref, *a: ref(*a)._replace(logp=ref(*a[:7], (0, 1.0, 0.0)).logp))),
    "linear_token_logprobs: entropy before truncation": (
        "linear_token_logprobs-top-p", reference(
            lambda ref, *a: ref(*a)._replace(entropy=ref(*a[:7], (0, 1.0, 0.0)).entropy))),
    "linear_token_logprobs: rows share a temperature": (
        "linear_token_logprobs-per-row-temperature", reference(
            lambda ref, h, w, b, y, t, *a: ref(h, w, b, y, t.where(t == 0, t.mean()), *a))),
    "linear_token_logprobs: truncated gradient 1% too large": (
        "linear_token_logprobs-all-cuts", reference(
            lambda ref, h, w, *a: ref(h, scaled_gradient(w), *a))),
}  # fmt: skip
