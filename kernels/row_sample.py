"""One token per row of materialised logits: the Gumbel race, over what a truncation keeps.

Each span of a row has a race of its own, one program each; who won the row is made out where it is
scored.
"""

import torch
import triton
import triton.language as tl

from . import noise
from .logits import INF, flat, launch, load_z
from .row_cut import cuts, flat_or_number, keep, of_row, row_cut, scale_of
from .row_truncated import SPAN, row_kept_stats


def row_sample(
    logits,  # [R, V]
    bias,
    seed,
    sequence,  # [R] int64
    position,
    softcap,
    cut,  # vgkern.ops._truncate.Cut
):
    """(token int64, logp, entropy fp32), each [R]: argmax z + g over what the truncation keeps.

    The score is another pass, by the kernel that scores any token: the same bits, and exact where p
    goes to 1, which sums that were made before the winner is known are not. A row that can draw
    nothing has token 0 and NaN.
    """
    rows, vocab = logits.shape
    spans = -(-vocab // SPAN)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    best = torch.empty(spans, rows, dtype=torch.float32, device=logits.device)
    best_id = torch.empty(spans, rows, dtype=torch.int32, device=logits.device)
    kept = (None, None)
    if any(cuts(cut, vocab)):
        kept = row_cut(logits, bias, None, softcap, -1, cut)
    if rows:
        with torch.cuda.device_of(logits):
            _row_race_kernel[(rows, spans)](
                logits, logits.stride(0), flat(bias), seed, flat(sequence), flat(position), cut[0],
                flat_or_number(cut[4]), *kept, best, best_id, rows, vocab, softcap, SPAN=SPAN,
                SOFTCAP=softcap != 0,
                **launch(min(vocab, SPAN), per_thread=8, most=min(SPAN, 2048))
            )  # fmt: skip
    race = (best, best_id)
    logp, entropy, _ = row_kept_stats(logits, bias, token, softcap, -1, cut, kept, race)
    return token, logp, entropy


@triton.jit(do_not_specialize=["seed", "R"])
def _row_race_kernel(
    logits,  # [R, V]
    stride,
    bias,
    seed,
    sequence,
    position,
    temperature,
    temperatures,  # [R]; None: the number above
    cut,
    last,
    best_out,  # [spans, R]
    best_id_out,  # negative: a logit of the span is NaN or +inf
    R,
    V,
    softcap,
    SPAN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    row = logits + i * stride
    seq, pos = tl.load(sequence + i), tl.load(position + i)
    t = of_row(i, temperature, temperatures)
    scale = scale_of(t)
    if cut is not None:
        least, end = tl.load(cut + i), tl.load(last + i)
    best = tl.full([BLOCK], -INF, tl.float32)  # a race per lane; ids grow, so > keeps the first
    best_id = tl.zeros([BLOCK], tl.int32) + V
    sick = tl.zeros([BLOCK], tl.int32)
    first = (s * SPAN).to(tl.int32)  # a column
    for start in range(first, tl.minimum(first + SPAN, V), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
        sick |= ((z != z) & (cols < V) | (z == INF)).to(tl.int32)
        if cut is not None:
            z = keep(z, cols, least, end)
        score = tl.where(cols < V, z, -INF)
        if t != 0:
            score += noise.gumbel(seed, seq, pos, start, BLOCK)
        better = score > best
        best = tl.where(better, score, best)
        best_id = tl.where(better, cols, best_id)
    most = tl.max(best, 0)
    winner = tl.min(tl.where(best == most, best_id, V), 0)
    here = s * R + i
    tl.store(best_out + here, most)
    tl.store(best_id_out + here, tl.where(tl.max(sick, 0) != 0, -2, winner))
