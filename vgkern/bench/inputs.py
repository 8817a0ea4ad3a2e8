"""The tensors of a piece of work, as training makes them.

Ops with a head: weights and states as in `vgkern.case_inputs`, targets drawn from the model's own
softmax, old log-probs near it (no row is clipped), one advantage per sequence and none of them 0,
so every row costs its matrix products; `share` masks whole rows out. The other ops: the inputs of
their case.
"""

import math

import torch
from torch import Tensor

from vgkern import Noise, objectives
from vgkern.case_inputs import near

from .shapes import SEQUENCE
from .work import HEADS, Inputs, Work

STEPS = (0.0, 0.02, -0.02, 0.1, -0.1)  # of the old log-probs: inside every clip
_weights: dict[tuple, Tensor] = {}  # of the last head: it is slow to draw


def make(work: Work, device: torch.device, seed: int = 0) -> Inputs:
    x = _head(work, seed) if work.op in HEADS else work.case.make(work.torch_dtype, seed)
    return {k: _to(v, device) for k, v in x.items()}


def _to(value: object, device: torch.device) -> object:
    if isinstance(value, Noise):
        return Noise(value.seed, value.sequence.to(device), value.position.to(device))
    return value.to(device) if isinstance(value, Tensor) else value


def _head(work: Work, seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    n, dtype = work.rows, work.torch_dtype
    hidden = torch.randn(n, work.hidden, generator=g).to(dtype)
    weight = _weight(work, seed)
    x: Inputs = {"hidden": hidden, "weight": weight}
    noise = Noise(seed, torch.arange(n), torch.tensor(0))
    if work.op == "linear_sample":
        return {**x, "noise": noise}
    if work.op == "linear_divergence":
        other = torch.randn(n, work.hidden, generator=g)
        x["teacher_hidden"] = torch.lerp(hidden.float(), other, 0.3).to(dtype)
        return {**x, "teacher_weight": weight}
    if work.op == "token_logprobs":
        logits = torch.cat([rows @ weight.T for rows in hidden.split(64)])
        return {"logits": logits, "targets": draw(hidden, weight, g)[0]}
    targets, logp = draw(hidden, weight, g)
    if work.op == "noisy_embedding":
        embedding = torch.randn(work.vocab, work.hidden, generator=g).to(dtype)
        return {**x, "embedding": embedding, "tokens": targets, "noise": noise}
    x["targets"] = targets
    if work.op == "linear_policy_loss":
        t = math.gcd(n, SEQUENCE)
        x |= {k: x[k].reshape(n // t, t, *x[k].shape[1:]) for k in ("hidden", "targets")}
        a = torch.randn(n // t, generator=g)
        x["advantages"] = torch.where(a < 0, a - 0.1, a + 0.1)
        x["old_logp"] = near(logp, seed + 1, STEPS).float().reshape(-1, t)
        x["objective"] = objectives.DAPO
        if work.share < 1:
            order = torch.rand(n, generator=g).argsort().argsort()
            x["mask"] = (order < round(work.share * n)).reshape(-1, t)
    return x


def _weight(work: Work, seed: int) -> Tensor:
    key = (work.hidden, work.vocab, work.dtype, seed)
    if key not in _weights:
        _weights.clear()
        g = torch.Generator().manual_seed(seed + 1)
        scale = 2.5 / math.sqrt(work.hidden)
        weight = torch.empty(work.vocab, work.hidden, dtype=work.torch_dtype)
        for part in weight.split(16384):
            part.copy_(torch.randn(part.shape, generator=g) * scale)
        _weights[key] = weight
    return _weights[key]


def draw(hidden: Tensor, weight: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Targets [N] from softmax(hidden weight^T), by its inverse distribution, and their logp."""
    targets, logp = [], []
    for rows in hidden.split(64):
        lp = (rows @ weight.T).float().log_softmax(-1)
        cdf = lp.exp().cumsum_(-1)
        u = torch.rand(len(rows), 1, generator=g) * cdf[:, -1:]
        y = torch.searchsorted(cdf, u).clamp(max=len(weight) - 1)
        targets.append(y[:, 0])
        logp.append(lp.gather(1, y)[:, 0])
    return torch.cat(targets), torch.cat(logp)
