"""linear_sample: fp32 logits a chunk of rows at a time, then one race per row."""

import torch

from . import linear
from . import rows as row_kernels


def linear_sample_fwd(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] or None
    seed,
    sequence,  # [N] int64
    position,
    temperature,  # [N] fp32, 0: greedy
    softcap,
    top_k,
    top_p,
    min_p,
    rows=row_kernels,
):
    parts = [
        rows.row_sample(
            linear.mm32(hidden[part], weight.t()),
            bias,
            seed,
            sequence[part],
            position[part],
            temperature[part],
            softcap,
            top_k,
            top_p,
            min_p,
        )
        for part in linear.chunks(hidden.shape[0], weight.shape[0], hidden.device)
    ]
    if not parts:
        empty = hidden.new_empty(0, dtype=torch.float32)
        return torch.empty_like(sequence), empty, torch.empty_like(empty)
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))
