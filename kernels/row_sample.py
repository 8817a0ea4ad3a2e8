"""One token per row of materialised logits: the Gumbel race, over what a truncation keeps."""

import torch
import triton
import triton.language as tl

from . import noise
from .logits import INF, flat, launch, load_z
from .row_truncated import keep, row_cut, row_kept_stats


def row_sample(
    logits,  # [R, V]
    bias,
    seed,
    sequence,  # [R] int64
    position,
    temperature,  # [R] fp32; 0: greedy
    softcap,
    top_k,  # 0: no limit
    top_p,  # 1: no limit
    min_p,  # 0: no limit
):
    """(token int64, logp, entropy fp32), each [R]: argmax z + g over what the truncation keeps.

    The score is another pass, by the kernel that scores any token: the same bits, and exact where p
    goes to 1, which sums that were made before the winner is known are not.
    """
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    sequence, position, temperature = (flat(x) for x in (sequence, position, temperature))
    cut = row_cut(logits, bias, None, temperature, softcap, -1, top_k, top_p, min_p)
    if rows:
        with torch.cuda.device_of(logits):
            _row_sample_kernel[(rows,)](
                logits, logits.stride(0), flat(bias), seed, sequence, position, temperature, *cut,
                token, vocab, softcap, SOFTCAP=softcap != 0, **launch(vocab, per_thread=8)
            )  # fmt: skip
    logp, entropy, _ = row_kept_stats(logits, bias, token, temperature, softcap, -1, cut)
    return token.clamp_(min=0), logp, entropy


@triton.jit(do_not_specialize=["seed"])
def _row_sample_kernel(
    logits,  # [R, V]
    stride,
    bias,
    seed,
    sequence,
    position,
    temperature,
    cut,
    ties,
    token_out,  # -2 where every id is blocked
    V,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    seq, pos, t = tl.load(sequence + i), tl.load(position + i), tl.load(temperature + i)
    least, tied = tl.load(cut + i), tl.load(ties + i)
    scale = 1 / tl.where(t == 0, 1.0, t)
    best = tl.full([BLOCK], -INF, tl.float32)  # a race per lane; ids grow, so > keeps the first
    best_id = tl.zeros([BLOCK], tl.int32) + V
    seen = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
        score, seen = keep(z, cols, V, least, tied, seen)
        if t != 0:
            score += noise.gumbel(seed, seq, pos, start, BLOCK)
        better = score > best
        best = tl.where(better, score, best)
        best_id = tl.where(better, cols, best_id)
    token = tl.min(tl.where(best == tl.max(best, 0), best_id, V), 0)
    tl.store(token_out + i, tl.where(token >= V, -2, token).to(tl.int64))
