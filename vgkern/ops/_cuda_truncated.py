"""Rows of logits under a temperature per row and a truncation, on the cuda backend: the contracts
of kernels/row_sample.py and kernels/row_truncated.py, over csrc/row_sample.cu and row_truncated.cu.
"""

from typing import Any

import torch
from torch import Tensor


def row_sample(
    logits: Tensor,  # [R, V]
    bias: Tensor | None,
    seed: int,
    sequence: Tensor,  # [R] int64
    position: Tensor,
    temperature: Tensor,  # [R] fp32; 0: greedy
    softcap: float,
    top_k: int,  # 0: no limit
    top_p: float,  # 1: no limit
    min_p: float,  # 0: no limit
) -> tuple[Tensor, Tensor, Tensor]:
    """(token int64, logp, entropy fp32), each [R]; the score is that of `row_truncated`."""
    bias, temperature = _f32(bias), temperature.float().contiguous()
    cut = _cut(logits, bias, None, temperature, softcap, -1, top_k, top_p, min_p)
    token = logits.new_empty(logits.shape[0], dtype=torch.int64)
    rows = (sequence.contiguous(), position.contiguous(), temperature)
    torch.ops.vgkern_launch.row_sample(logits, bias, seed, *rows, softcap, cut, token)
    logp, entropy, _ = _stats(logits, bias, token, temperature, softcap, -1, cut)
    return token.clamp_(min=0), logp, entropy


def row_truncated(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,  # [R] int64
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    *cuts: Any,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy), each fp32 [R], over what is kept."""
    rows = (targets.contiguous(), temperature.contiguous(), softcap, ignore_index)
    cut = _cut(logits, _f32(bias), *rows, *cuts)
    return _stats(logits, _f32(bias), *rows, cut)[:2]


def row_truncated_grad(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    c: Tensor,  # [R] fp32: dL/dlogp
    e: Tensor,  # [R] fp32: dL/dentropy
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    top_k: int,
    top_p: float,
    min_p: float,
    out: Tensor,  # [R, V]; may be `logits`
) -> Tensor:
    """The gradient of each row's logits, written to `out`."""
    rows = (targets.contiguous(), temperature.contiguous(), softcap, ignore_index)
    head = (logits, _f32(bias), *rows)
    cut = _cut(*head, top_k, top_p, min_p)
    stats = _stats(*head, cut)
    torch.ops.vgkern_launch.row_kept_grad(*head, cut, *stats, c.contiguous(), e.contiguous(), out)
    return out


def _cut(logits: Tensor, *args: Any) -> Tensor:
    cut = logits.new_empty(logits.shape[0], 2, dtype=torch.int64)
    torch.ops.vgkern_launch.row_cut(logits, *args, cut)
    return cut


def _stats(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    torch.ops.vgkern_launch.row_kept_stats(logits, *args, *out)
    return out  # type: ignore[return-value]


def _f32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()
