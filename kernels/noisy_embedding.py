"""noisy_embedding: the backward pass behind a hard lookup.

Two [chunk, V] blocks: the logits, which become their own gradient in place, and u = E dx. The
noise is made again inside the row kernel. The table's gradient is a sum over the rows of each
token in the order of the rows: sorted, no atomics.
"""

import torch
import triton
import triton.language as tl

from . import linear, memory
from . import live as live_rows
from . import rows as row_kernels


@memory.says
def noisy_embedding_bwd(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] or None
    embedding,  # [V, He]
    tokens,  # [N] int64
    dx,  # [N, He]
    seed,
    sequence,  # [N] int64, as is position; not read where `expected`
    position,
    tau,
    temperature,
    softcap,
    expected,
    needs,  # of hidden, weight, bias, embedding
    rows=row_kernels,
):
    live = (dx != 0).any(-1)
    kept = live_rows.kept(hidden, weight.shape[0], lambda: live) if any(needs[:3]) else None
    mine = (live_rows.taken(x, kept) for x in (hidden, dx, sequence, position, live))
    h, lam, sequence, position, there = mine
    h = linear.clean(h, there) if needs[1] else h
    grads = linear.Grads(h, weight, bias, needs[:3], temperature, softcap, -100, rows)
    if any(needs[:3]):
        one = torch.ones((), device=hidden.device)
        noise = (None, None) if expected else (sequence, position)
        costates = linear.Costates(seed, tau, lam, embedding, *noise, one)
        for part in linear.chunks(h.shape[0], 2 * weight.shape[0], hidden.device):
            logits = linear.mm32(h[part], weight.t())
            grads.add(part, logits, None, None, None, None, None, None, costates)
            del logits  # before the next chunk's are made
    table = embedding.new_empty(0)
    if needs[3]:
        table = getattr(rows, "table_grad", _table_grad)(embedding, tokens, dx, live)
    dhidden, *others = grads.finish(as_input=True)
    if needs[0]:
        dhidden = live_rows.spread(dhidden, kept, hidden.shape[0])
    return dhidden, *others, table


def _table_grad(embedding, tokens, dx, live):
    """dE [V, He]: for each token the sum of its rows of dx, in fp32, rounded once."""
    vocab, width = embedding.shape
    out = embedding.new_zeros(embedding.shape)
    if dx.shape[0]:
        known = live & (tokens >= 0) & (tokens < vocab)
        token, row = torch.sort(tokens.masked_fill(~known, vocab), stable=True)
        block = min(max(triton.next_power_of_2(width), 32), 1024)
        with torch.cuda.device_of(dx):
            _table_grad_kernel[(dx.shape[0], triton.cdiv(width, block))](
                dx, dx.stride(0), token, row, out, dx.shape[0], vocab, width, BLOCK=block,
                num_warps=max(block // 256, 1), enable_fp_fusion=True
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["R"])
def _table_grad_kernel(
    dx,  # [R, H]
    stride,
    token,  # [R], sorted; V: none
    row,  # [R]: where in dx
    out,  # [V, H]
    R,
    V,
    H,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(token + at)
    before = tl.load(token + at - 1, mask=at > 0, other=-1)
    if (y < V) & (y != before):  # the first of its token takes them all
        total = tl.zeros([BLOCK], tl.float32)
        here = y
        while here == y:
            i = tl.load(row + at)
            total += tl.load(dx + i * stride + cols, mask=cols < H, other=0.0).to(tl.float32)
            at += 1
            here = tl.load(token + at, mask=at < R, other=-1)
        tl.store(out + y * H + cols, total.to(out.dtype.element_ty), mask=cols < H)
