"""The shapes that are timed, their toy stand-ins, and inputs drawn on the device."""

import math
from typing import Any

import torch

from vgkern import objectives
from vgkern.gpu.device import Phase

Shape = tuple[int, int, int]
# rows, width, vocabulary: the head of an 8B model, of SmolLM2, and one where launches are all
REAL: dict[str, Shape] = {
    "large": (8192, 4096, 131072), "small H": (8192, 576, 49152), "launches": (1024, 256, 512),
}  # fmt: skip
TOY: dict[str, Shape] = {"large": (4, 16, 48), "small H": (4, 8, 32), "launches": (4, 8, 16)}
SAMPLER: dict[str, tuple[int, int]] = {"llama": (4096, 128256), "smollm2": (576, 49152)}
SAMPLER_TOY: dict[str, tuple[int, int]] = {"llama": (16, 48), "smollm2": (8, 32)}
BATCHES, BATCHES_TOY = (1, 64, 256), (1, 2, 3)
SEQUENCE = 256  # tokens
ROTATE = 4 * 50 * 2**20  # bytes that copies of the inputs take together: more than any L2


def loss_shapes(phase: Phase) -> dict[str, Shape]:
    """By name: those of this run."""
    return TOY if phase.dry else REAL


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def loss_inputs(phase: Phase, shape: Shape, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """As training has them: targets of the model's own softmax, ratios near 1 and inside the clip,
    no advantage 0."""
    n, h, v = shape
    g = torch.Generator(phase.device).manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, device=phase.device).to(dtype)
    weight = torch.empty(v, h, dtype=dtype, device=phase.device)
    for part in weight.split(16384):
        x = torch.randn(part.shape, generator=g, device=phase.device)
        part.copy_(x * (2.5 / math.sqrt(h)))
    targets, logp = [], []
    for rows in hidden.split(512):
        lp = (rows @ weight.T).float().log_softmax(-1)
        race = torch.empty_like(lp).exponential_(generator=g)
        y = (lp - race.log()).argmax(-1, keepdim=True)
        targets.append(y[:, 0])
        logp.append(lp.gather(1, y)[:, 0])
    t = math.gcd(n, SEQUENCE) if not phase.dry else 4
    step = 0.1 * (torch.rand(n, generator=g, device=phase.device) - 0.5)
    a = torch.randn(n // t, generator=g, device=phase.device)
    return {
        "hidden": hidden.view(n // t, t, h), "weight": weight,
        "targets": torch.cat(targets).view(n // t, t),
        "advantages": torch.where(a < 0, a - 0.1, a + 0.1),
        "old_logp": (torch.cat(logp) + step).view(n // t, t), "objective": objectives.DAPO,
    }  # fmt: skip


def copies(nbytes: int, dry: bool) -> int:
    """Sets of inputs to rotate over, so that a call does not find its own in the cache."""
    return 1 if dry else max(min(math.ceil(ROTATE / max(nbytes, 1)), 128), 1)
