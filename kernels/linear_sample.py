"""linear_sample: fp32 logits a chunk of rows at a time, then one race per row."""

import torch

from . import linear, row_cut
from . import rows as row_kernels


def linear_sample_fwd(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] or None
    seed,
    sequence,  # [N] int64
    position,
    softcap,
    *cut,  # vgkern.ops._truncate.Cut
    rows=row_kernels,
):
    parts = [
        rows.row_sample(
            linear.mm32(hidden[part], weight.t()),
            bias,
            seed,
            sequence[part],
            position[part],
            softcap,
            row_cut.part_of(cut, part),
        )
        for part in linear.chunks(hidden.shape[0], weight.shape[0], hidden.device)
    ]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = hidden.new_empty(0, dtype=torch.float32)
        return torch.empty_like(sequence), empty, torch.empty_like(empty)
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))
