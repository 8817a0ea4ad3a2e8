"""The rows of a loss that have a gradient: the others zeroed, or left out.

A row that is masked, or has no advantage where nothing else has a gradient, contributes nothing.
Its hidden state may hold NaN and its target anything, so both are replaced; where the products are
long against one look of the host at the device (`looks`) the live rows are put together and only
they are multiplied.
"""

import torch
import triton
import triton.language as tl

from .memory import capturing

IGNORED = -100  # the target of a row that is not read
STRAY = -1  # a target outside the vocabulary: NaN
# One wait costs more than its 20 us: the host prepares the next call while the device still works,
# and after a wait the device idles for what that takes, 1 to 2 ms of Python. Three products of 1e12
# multiply-adds each take 8 ms of an H100, so that one row in five or more left out pays for it.
LOOK_PAYS = 1e12


def looks(hidden, vocab):
    """May the host wait for the number of live rows? Not where that is forbidden or captured."""
    if hidden.is_cuda and (capturing(hidden.device) or torch.cuda.get_sync_debug_mode()):
        return False
    return hidden.shape[0] * hidden.shape[1] * vocab > LOOK_PAYS


def which(live):
    """int64 indices of the live rows, in order; None if all of them are. Waits for the device."""
    rows = live.nonzero()[:, 0]
    return None if rows.shape[0] == live.shape[0] else rows


def kept(hidden, vocab, live):
    """`which` of live(), if it may be asked; else None: all rows are multiplied."""
    return which(live()) if looks(hidden, vocab) else None


def taken(x, rows):
    """x [N, ...] at the rows that are kept; x itself where `rows` is None, or where x is."""
    return x if x is None or rows is None else x.index_select(0, rows)


def spread(x, rows, count):
    """The reverse, to `count` rows: 0 in those that are left out."""
    if rows is None:
        return x
    return x.new_zeros(count, *x.shape[1:]).index_copy_(0, rows, x)


def replaced(hidden, targets, advantages, row_weight, vocab, always, copy):
    """(hidden with zeros in dead rows if `copy`, targets: IGNORED in dead rows, STRAY where they
    are no id), by one launch. `always`: a row without an advantage is live too."""
    count, width = hidden.shape
    out, y = torch.empty_like(hidden) if copy else None, torch.empty_like(targets)
    block = min(max(triton.next_power_of_2(width), 128), 2048)
    if count:
        with torch.cuda.device_of(hidden):
            _replaced_kernel[(count,)](
                hidden, hidden.stride(0), targets, advantages, row_weight, out,
                0 if out is None else out.stride(0), y, width, vocab, IGNORED, STRAY,
                ALWAYS=always, BLOCK=block, num_warps=max(block // 512, 1), enable_fp_fusion=True
            )  # fmt: skip
    return (hidden if out is None else out), y


def replaced_by_torch(hidden, targets, advantages, row_weight, vocab, always, copy):
    """`replaced`, where no Triton runs."""
    live = alive(advantages, row_weight, always)
    y = in_vocab(targets, vocab).masked_fill_(~live, IGNORED)
    return (hidden.masked_fill(~live[:, None], 0) if copy else hidden), y


def in_vocab(targets, vocab):
    """Targets, STRAY where they are no id."""
    return targets.masked_fill((targets < 0) | (targets >= vocab), STRAY)


def alive(advantages, row_weight, always):
    """Which rows have a gradient, as far as is known without their logits."""
    live = row_weight != 0
    return live if always else live & (advantages != 0)


@triton.jit(do_not_specialize=["V", "ignored", "stray"])
def _replaced_kernel(
    hidden,  # [N, H]
    stride,
    targets,  # [N] int64
    advantages,  # [N] fp32
    row_weight,  # [N] fp32
    out,  # [N, H]
    out_stride,
    targets_out,  # [N]
    H,
    V,
    ignored,
    stray,
    ALWAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    live = tl.load(row_weight + i) != 0
    if not ALWAYS:
        live = live & (tl.load(advantages + i) != 0)
    y = tl.load(targets + i)
    y = tl.where((y >= 0) & (y < V), y, stray)
    tl.store(targets_out + i, tl.where(live, y, ignored))
    if out is not None:
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(hidden + i * stride + cols, mask=live & (cols < H), other=0.0)
            tl.store(out + i * out_stride + cols, x, mask=cols < H)
