"""Rows of logits under a temperature per row and a truncation, on the cuda backend: the contracts
of kernels/row_sample.py and kernels/row_truncated.py, over csrc/row_sample.cu and row_truncated.cu.
"""

import torch
from torch import Tensor


def row_sample(
    logits: Tensor,  # [R, V]
    bias: Tensor | None,
    seed: int,
    sequence: Tensor,  # [R] int64
    position: Tensor,
    softcap: float,
    cut: tuple,  # vgkern.ops._truncate.Cut
) -> tuple[Tensor, Tensor, Tensor]:
    """(token int64, logp, entropy fp32), each [R]; the score is that of `row_truncated`."""
    bias, cut = _f32(bias), _plain(cut)
    kept = _cut(logits, bias, None, softcap, -1, cut)
    token = logits.new_empty(logits.shape[0], dtype=torch.int64)
    rows = (sequence.contiguous(), position.contiguous(), softcap)
    torch.ops.vgkern_launch.row_sample(logits, bias, seed, *rows, *cut, kept, token)
    logp, entropy, _ = _stats(logits, bias, token, softcap, -1, cut, kept)
    return token.clamp_(min=0), logp, entropy


def row_truncated(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,  # [R] int64
    softcap: float,
    ignore_index: int,
    cut: tuple,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy), each fp32 [R], over what is kept."""
    head, cut = (logits, _f32(bias), targets.contiguous(), softcap, ignore_index), _plain(cut)
    return _stats(*head, cut, _cut(*head, cut))[:2]


def row_truncated_grad(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    c: Tensor,  # [R] fp32: dL/dlogp
    e: Tensor,  # [R] fp32: dL/dentropy
    softcap: float,
    ignore_index: int,
    cut: tuple,
    out: Tensor,  # [R, V]; may be `logits`
) -> Tensor:
    """The gradient of each row's logits, written to `out`."""
    head, cut = (logits, _f32(bias), targets.contiguous(), softcap, ignore_index), _plain(cut)
    kept = _cut(*head, cut)
    given = (*_stats(*head, cut, kept), c.contiguous(), e.contiguous())
    torch.ops.vgkern_launch.row_kept_grad(*head, *cut, kept, *given, out)
    return out


def _cut(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    softcap: float,
    ignore_index: int,
    cut: tuple,
) -> Tensor | None:
    """[R, 2]; None where nothing is cut, and nothing is launched."""
    temperature, top_k, top_p, min_p, *rows = cut
    some = 0 < top_k < logits.shape[1] or top_p < 1 or min_p > 0 or temperature == 0
    if not some and all(x is None for x in rows):
        return None
    kept = logits.new_empty(logits.shape[0], 2, dtype=torch.int64)
    torch.ops.vgkern_launch.row_cut(logits, bias, targets, softcap, ignore_index, *cut, kept)
    return kept


def _stats(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float,
    ignore_index: int,
    cut: tuple,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    out = tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    head = (logits, bias, targets, softcap, ignore_index)
    torch.ops.vgkern_launch.row_kept_stats(*head, *cut, kept, *out)
    return out  # type: ignore[return-value]


def _f32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _plain(cut: tuple) -> tuple:
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in cut)
