"""Inputs as training makes them: the raw material of `vgkern.cases`, for tests and benchmarks.

Targets are sampled from the model's own softmax; old, reference and sampler log-probs lie near the
policy, with some rows beyond the clip; rewards are 0/1 with zero-variance groups; masks pad left or
right, with one fully masked sequence, and garbage where they are 0.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vgkern.objectives import Objective
from vgkern.ops.costate import Costate
from vgkern.ops.noise import Noise

Inputs = dict[str, Any]
GARBAGE = 2**40  # target of a masked row: nothing may look it up


def head(
    shape: tuple[int, ...],
    h: int,
    v: int,
    dtype: torch.dtype,
    seed: int,
    *,
    bias: str | None = None,  # None, "plain", or "blocked": every fifth id at -inf
    peaked: bool = False,  # every other row has a gap of about 30 nats
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Inputs, Tensor, Tensor]:
    """Hidden, weight, targets and options; log-prob and entropy of the targets in fp64."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, h, generator=g) * (2.5 / math.sqrt(h))
    hidden = torch.randn(*shape, h, generator=g).reshape(-1, h)
    if peaked:
        top = weight[torch.randint(v, (len(hidden),), generator=g)]
        sharp = 50 * top / top.square().sum(-1, keepdim=True)
        hidden[::2] = (sharp + 0.02 * hidden)[::2]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    b = None
    if bias is not None:
        b = 0.5 * torch.randn(v, generator=g).to(dtype)
        if bias == "blocked":
            b[1::5] = -torch.inf
    targets, logp, entropy = [], [], []
    for rows in hidden.split(64):
        z = rows.double() @ weight.double().T
        z = z if b is None else z + b.double()
        if softcap:
            z = (softcap * torch.tanh(z / softcap)).where(z > -torch.inf, z)
        lp = (z / temperature).log_softmax(-1)
        y = (
            torch.multinomial(lp.exp(), 1, generator=g)
            if len(rows)
            else rows.new_zeros(0, 1).long()
        )
        targets.append(y[:, 0])
        logp.append(lp.gather(-1, y)[:, 0])
        entropy.append(-(lp.exp() * lp.clamp(min=-1e300)).sum(-1))
    inputs: Inputs = {"hidden": hidden.reshape(*shape, h), "weight": weight}
    inputs["targets"] = torch.cat(targets).reshape(shape)
    if b is not None:
        inputs["bias"] = b
    if temperature != 1:
        inputs["temperature"] = temperature
    if softcap:
        inputs["softcap"] = softcap
    return inputs, torch.cat(logp).reshape(shape), torch.cat(entropy).reshape(shape)


def padding(b: int, t: int, seed: int, side: str = "right") -> Tensor:
    """Mask [B, T]: one sequence of full length and, from three on, one that is fully masked."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (b,), generator=g) if t else torch.zeros(b)
    if b:
        lengths[0] = t
    if b >= 3:
        lengths[2] = 0
    at = torch.arange(t).expand(b, t)
    at = at if side == "right" else t - 1 - at
    return at < lengths[:, None]


def near(logp: Tensor, seed: int, steps: tuple[float, ...]) -> Tensor:
    """logp + noise drawn from `steps` (jittered by 0.01), so no ratio lies on a clip bound."""
    g = torch.Generator().manual_seed(seed)
    pick = torch.tensor(steps, dtype=torch.float64)[
        torch.randint(len(steps), logp.shape, generator=g)
    ]
    jitter = 0.01 * (torch.rand(logp.shape, generator=g, dtype=torch.float64) - 0.5)
    return logp + pick + jitter


def near_sequence(logp: Tensor, mask: Tensor, seed: int) -> Tensor:
    """logp + noise with mean 0, +-1e-4 or +-2e-3 per sequence: inside and outside GSPO's clip."""
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    noise = (near(0 * logp, seed, (-0.3, -0.1, 0.0, 0.1, 0.3))).where(mask, 0)
    noise = noise - noise.sum(-1, keepdim=True) / n
    steps = torch.tensor([0.0, 1e-4, -1e-4, 2e-3, -2e-3], dtype=logp.dtype)
    return logp + noise + steps[torch.arange(len(logp)) % 5][:, None]


def group_rewards(b: int, seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """0/1 rewards and ids of ragged groups in random order; group 0 has zero variance."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.arange(b) // size
    if b > size and b % size == 1:
        groups[-1] = groups[-2]  # no group of one
    rewards = (torch.rand(b, generator=g) < 0.5).float()
    rewards[groups == 0] = 1.0
    order = torch.randperm(b, generator=g)
    return rewards[order], 7 * groups[order] + 3


def policy_rows(
    logp: Tensor,  # [B, T] fp64
    o: Objective,
    seed: int,
    *,
    mask: Tensor | None = None,
    token_advantages: bool = False,
    on_policy: bool = False,
) -> Inputs:
    """Everything a policy loss takes beside logp, fp32, near the policy that has `logp`."""
    b = logp.shape[0]
    g = torch.Generator().manual_seed(seed)
    rewards, groups = group_rewards(b, seed)
    a = torch.zeros(b)
    for i in groups.unique():
        r = rewards[groups == i]
        a[groups == i] = (r - r.mean()) / (r.std(unbiased=False) + 1e-4)
    if token_advantages or logp.ndim == 1:
        a = a.reshape(-1, *[1] * (logp.ndim - 1)) + torch.randn(logp.shape, generator=g)
    live = torch.ones(logp.shape, dtype=torch.bool) if mask is None else mask
    out: Inputs = {"advantages": a, "objective": o}
    if not on_policy:
        if o.ratio in ("sequence", "sequence_token"):
            old = near_sequence(logp, live, seed + 1)
        else:
            old = near(logp, seed + 1, (0, 0, 0.02, -0.02, 0.1, -0.1, 0.3, -0.3, 0.6, -0.6))
        out["old_logp"] = old.float()
        if o.sampler_correction != "none":
            steps = (0.02, -0.02) if o.sampler_correction[0] == "s" else (0.05, -0.05, 1.5, -1.5)
            sampler = near(old, seed + 2, steps)
            if o.sampler_correction[0] == "s" and b > 1:
                sampler[1] -= 0.5  # one sequence beyond the bound
            out["sampler_logp"] = sampler.float()
    if o.beta:
        out["ref_logp"] = near(logp, seed + 3, (0, 0.2, -0.2, 0.5, -0.5, 2.0)).float()
    if mask is not None:
        out["mask"] = mask
        for k in ("old_logp", "ref_logp", "sampler_logp"):
            if k in out:  # a mask has to win over anything: here an overflow of exp
                out[k] = out[k].masked_fill(~mask, -1e4)
    return out


def laid_end_to_end(x: Inputs, mask: Tensor | None) -> Inputs:
    """Padded rows [B, T] as packed ones [1, N]: what `mask` keeps, but for the first row of every
    other sequence of two or more, which stays and stays masked."""
    if mask is None:
        raise ValueError("mask: got None; allowed: padding, of which packed rows are made")
    lengths = mask.sum(-1)
    kept, live = mask, mask.clone()
    if mask.shape[1] > 1:
        first = mask & (mask.cumsum(-1) == 1) & (lengths > 1)[:, None]
        live[::2] &= ~first[::2]
    out = dict(x)
    for name, t in x.items():
        if isinstance(t, Tensor) and t.shape[:2] == mask.shape:
            out[name] = t[kept][None]
    out["mask"] = live[kept][None]
    out["segments"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return out


def costates(
    x: Inputs,  # of `head`, and its mask
    seed: int,
    *,
    he: int = 0,  # 0: the width of the head
    tied: bool = False,  # the table is the head
    relaxation: str = "expected",
    tau: float = 1.0,
    weight: float = 1.0,
) -> Costate:
    """A costate per row, every fourth exactly 0, NaN where a mask says that there is none."""
    g = torch.Generator().manual_seed(seed + 7)
    head, shape = x["weight"], x["targets"].shape
    table = head
    if not tied:
        table = torch.randn(head.shape[0], he or head.shape[1], generator=g).to(head.dtype)
    value = torch.randn(*shape, table.shape[1], generator=g)
    value.reshape(-1, table.shape[1])[1::4] = 0
    if x.get("mask") is not None:
        value = value.masked_fill(~x["mask"][..., None], torch.nan)
    noise = None
    if relaxation == "gumbel":
        ids = torch.arange(math.prod(shape)).reshape(shape) + 2**33
        noise = Noise(2**64 - 1 - seed, ids, torch.tensor(seed))
    return Costate(value.to(head.dtype), table, noise, relaxation, tau, weight)


# In bits that fp32 has; of each option one that cuts nothing
ROWS: dict[str, list[float]] = {
    "temperature": [1.0, 0.0, 0.5, 1.75],
    "top_k": [20, 3, 0, 400, 5000],
    "top_p": [0.875, 1.0, 0.5],
    "min_p": [0.0, 0.0625, 0.25, 0.0009765625, 0.0, 0.0, 0.125],
}


def of_rows(option: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A value of an option for each row."""
    n = math.prod(shape)
    value = torch.tensor(ROWS[option], dtype=torch.int64 if option == "top_k" else torch.float32)
    return value.repeat(n)[:n].reshape(shape)
