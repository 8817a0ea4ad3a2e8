"""token_logprobs on materialised logits: the row kernels, forward and backward."""

import torch

from . import rows as row_kernels


def token_logprobs_fwd(
    logits,  # [N, V] fp32|bf16|fp16
    targets,  # [N] int64
    temperature,
    softcap,
    ignore_index,
    rows=row_kernels,
):
    return rows.row_stats(logits, None, targets, temperature, softcap, ignore_index)


def token_logprobs_bwd(
    logits,
    targets,
    logp,  # [N] fp32, as are entropy, lse, dlogp, dentropy
    entropy,
    lse,
    dlogp,
    dentropy,
    temperature,
    softcap,
    ignore_index,
    rows=row_kernels,
):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return rows.row_grad(
        logits, None, targets.contiguous(), logp, entropy, lse, dlogp, dentropy, None, 0, None,
        None, 1.0, False, temperature, softcap, ignore_index, out
    )  # fmt: skip
