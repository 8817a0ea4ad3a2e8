"""Which ids of a row a truncation keeps: z > cut, and of the ids with z == cut those up to `last`.

Exact, and nothing is sorted. The answer is a float, so its bits are searched, by counts and sums of
exp(z - top) above eight cuts at a time, in an order that is fixed. A walk over the row for its
largest z and one or two to narrow the search leave few candidates; one more puts those into a list,
where the search ends. (One more finds the last id, where only some of the equals stay.)
"""

import torch
import triton
import triton.language as tl

from .logits import INF, flat, launch, load_z

WAYS = tl.constexpr(8)  # cuts that one pass tries
ROOM = 2048  # candidates that are put into a list
NATS = tl.constexpr(0.28)  # below the largest z: the first cuts are at this times 0, 1, 4, .. 36


def part_of(cut, part):
    """The options of some of the rows; `cut` is a vgkern.ops._truncate.Cut."""
    return (*cut[:4], *(x if x is None else x[part] for x in cut[4:]))


def cuts(cut, vocab):
    """Which of top_k, top_p, min_p may cut."""
    _, top_k, top_p, min_p, _, top_ks, top_ps, min_ps = cut
    some_k = top_ks is not None or 0 < top_k < vocab
    return some_k, top_ps is not None or top_p < 1, min_ps is not None or min_p > 0


def row_cut(logits, bias, targets, softcap, ignore_index, cut):
    """(cut fp32, last int32), each [R]. `targets` None: of every row."""
    rows, vocab = logits.shape
    least = torch.empty(rows, dtype=torch.float32, device=logits.device)
    last = torch.empty(rows, dtype=torch.int32, device=logits.device)
    some_k, some_p, some_min = cuts(cut, vocab)
    listed = None
    if some_k or some_p:
        room = min(ROOM, triton.next_power_of_2(vocab))
        listed = torch.empty(rows, room, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            _row_cut_kernel[(rows,)](
                logits, logits.stride(0), flat(bias), flat(targets), *map(flat_or_number, cut),
                listed, least, last, vocab, softcap, ignore_index,
                ROOM=0 if listed is None else listed.shape[1], TOP_K=some_k, TOP_P=some_p,
                MIN_P=some_min, SOFTCAP=softcap != 0,
                **launch(vocab, per_thread=2, most=1024)  # each counts for WAYS cuts at once
            )  # fmt: skip
    return least, last


def flat_or_number(x):
    return flat(x) if isinstance(x, torch.Tensor) else x


@triton.jit
def of_row(i, one, each):
    """An option of row i: its own, where `each` has one for every row."""
    return one if each is None else tl.load(each + i)


@triton.jit
def scale_of(t):
    """1 / temperature; 1 where it is 0 (greedy), NaN where there is no such temperature."""
    return tl.where(t > 0, 1 / tl.where(t > 0, t, 1.0), tl.where(t == 0, 1.0, float("nan")))


@triton.jit
def keep(z, cols, cut, last):
    """z, with -inf where the cut drops it; NaN where the cut is."""
    stays = (z > cut) | ((z == cut) & (cols <= last))
    drops = (z < cut) | ((z == cut) & (cols > last))
    return tl.where(stays, z, tl.where(drops, -INF, float("nan")))


@triton.jit(do_not_specialize=["ignore_index", "top_k"])
def _row_cut_kernel(
    logits,  # [R, V]
    stride,
    bias,
    targets,
    temperature,
    top_k,
    top_p,
    min_p,
    temperatures,  # [R], as the next three; None: the number above
    top_ks,
    top_ps,
    min_ps,
    listed,  # [R, ROOM]
    cut_out,
    last_out,
    V,
    softcap,
    ignore_index,
    ROOM: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    t = of_row(i, temperature, temperatures)
    k = of_row(i, top_k, top_ks)
    p, m = of_row(i, top_p, top_ps), of_row(i, min_p, min_ps)
    by_k = (k > 0) & (k < V)
    good = (t >= 0) & (p > 0) & (p <= 1) & (m >= 0) & (m <= 1)
    look = ((t == 0) | by_k | (p < 1) | (m > 0)) & good
    if targets is not None:
        y = tl.load(targets + i)
        look = look & (y != ignore_index) & (y >= 0) & (y < V)
    scale = scale_of(t)
    cut = tl.where(good, -INF, float("nan"))
    last = tl.full([], 0, tl.int32) + V
    if look:
        top, sick = row_peak(row, bias, V, scale, softcap, SOFTCAP, BLOCK)
        if (sick == 0) & (top > -INF):
            given = (row, bias, V, scale, softcap, top)
            ties, equal = last, last
            if t == 0:
                cut, ties = top, ties * 0 + 1
            elif TOP_K or TOP_P:
                cut, ties, equal = search(
                    given, listed + i * ROOM, by_k, k, p, TOP_K, TOP_P, SOFTCAP, BLOCK, ROOM
                )
            if MIN_P:  # noqa: SIM102 (known when compiled)
                if (t != 0) & (m > 0):
                    at = lowest(ordered(cut), ordered(top), top, m)
                    ties = tl.where(at > cut, equal, ties)  # all that are equal to it
                    cut = at
            if (ties < equal) & (cut > -INF):
                last = nth(given, cut, ties, SOFTCAP, BLOCK)
    tl.store(cut_out + i, cut)
    tl.store(last_out + i, last)


@triton.jit
def row_peak(row, bias, V, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest z of a row, and 0, or NaN where one of its logits is NaN or +inf."""
    top = tl.full([BLOCK], -INF, tl.float32)
    sick = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z, _ = load_z(row, bias, start + tl.arange(0, BLOCK), V, scale, softcap, SOFTCAP)
        top = tl.maximum(top, z)
        sick += tl.where((z != z) | (z == INF), float("nan"), 0.0)
    return tl.max(top, 0), tl.sum(sick, 0)


@triton.jit
def lowest(least, most, top, min_p):
    """The least z, as a float, from key `least` on with exp(z - top) >= min_p: no pass over z."""
    while least < most:
        middle = least + (most - least) // 2
        fits = tl.exp(float_of(middle) - top) >= min_p
        least = tl.where(fits, least, middle + 1)
        most = tl.where(fits, middle, most)
    return float_of(least)


@triton.jit
def nth(given, cut, n, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The n-th of the ids with z == cut."""
    row, bias, V, scale, softcap, _top = given
    seen, last, start = n * 0, n * 0 + V, n * 0
    while (seen < n) & (start < V):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
        tie = ((z == cut) & (cols < V)).to(tl.int32)
        found = (tie != 0) & (seen + tl.cumsum(tie, 0) == n)
        last = tl.minimum(last, tl.min(tl.where(found, cols, V), 0))
        seen += tl.sum(tie, 0)
        start += BLOCK
    return last


@triton.jit
def ordered(z):
    """int64 keys in the order of the floats; +0 and -0 are one."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def float_of(key):
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def above(given, cuts, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """For each of WAYS cuts: how many z > cut, and their sum of exp(z - top). The sum is monotone
    in the cut, bit for bit."""
    row, bias, V, scale, softcap, top = given
    count = tl.zeros([WAYS, BLOCK], tl.int32)
    mass = tl.zeros([WAYS, BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z, _ = load_z(row, bias, start + tl.arange(0, BLOCK), V, scale, softcap, SOFTCAP)
        over = z[None, :] > cuts[:, None]
        count += over.to(tl.int32)
        mass += tl.where(over, tl.exp(z - top)[None, :], 0.0)
    return tl.sum(count, 1), tl.sum(mass, 1)


@triton.jit
def fill(given, listed, low, high, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Puts every z in [low, high] into the list; how many those are."""
    row, bias, V, scale, softcap, _top = given
    n = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_z(row, bias, cols, V, scale, softcap, SOFTCAP)
        inside = ((z >= low) & (z <= high) & (cols < V)).to(tl.int32)
        tl.store(listed + n + tl.cumsum(inside, 0) - 1, z, mask=inside != 0)
        n += tl.sum(inside, 0)
    tl.debug_barrier()  # other threads read it
    return n


@triton.jit
def split(state, first, top):
    """WAYS keys to try, ascending, of which the last is `most`: evenly over (least, most], or, at
    `first`, none and so many nats below the largest z."""
    least, most = state[0], state[1]
    j = tl.arange(0, WAYS)
    evenly = least + (most - least) * (j + 1) // WAYS
    back = (-j + (WAYS - 1)).to(tl.float32)
    nats = ordered(tl.where(j == 0, -INF, top - back * back * NATS))
    nats = tl.where(j == WAYS - 1, most, tl.minimum(tl.maximum(nats, least), most))
    return tl.where(first, nats, evenly)


@triton.jit
def narrowed(state, keys, n, mass, fits):
    """The state after a pass: (least, most): the bounds of the first key that fits; how many
    z >= least there are, and how many z > most, with their mass."""
    least, most, low, high, over = state
    j = tl.arange(0, WAYS)
    fits = fits | (j == WAYS - 1)
    at = tl.sum((~fits).to(tl.int32), 0)
    low = tl.where(at > 0, tl.sum(tl.where(j == at - 1, n, 0), 0), low)
    least = tl.where(at > 0, tl.sum(tl.where(j == at - 1, keys, 0), 0) + 1, least)
    most = tl.sum(tl.where(j == at, keys, 0), 0)
    high = tl.sum(tl.where(j == at, n, 0), 0)
    over = tl.sum(tl.where(j == at, mass, 0.0), 0)
    return least, most, low, high, over


@triton.jit
def found(
    given,
    listed,
    state,
    size,
    whole,
    limit,
    bound,
    share,
    BY_MASS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The least key in [least, most] with fewer than `limit` z above it, or a mass of less than
    `bound`; `share` > 0: that share of the mass of the row. Returns the state, whose least and most
    are that key, the list's size, whether it is `whole`: has all z from its least on, and `bound`.
    """
    top = given[5]
    first = tl.full([], 1, tl.int1)
    while (state[0] < state[1]) & (state[2] - state[3] > ROOM) & (whole == 0):
        keys = split(state, first, top)
        n, mass = above(given, float_of(keys), SOFTCAP, BLOCK)
        if BY_MASS:
            bound = tl.where(first & (share > 0), share * tl.max(mass, 0), bound)
            fits = mass < bound
        else:
            fits = n < limit
        state = narrowed(state, keys, n, mass, fits)
        first = first & (size < 0)
    if (state[0] < state[1]) & (whole == 0):
        whole = (state[2] <= ROOM).to(tl.int32)
        end = tl.where(whole != 0, INF, float_of(state[1]))
        size = fill(given, listed, float_of(state[0]), end, SOFTCAP, BLOCK)
    n_over = tl.where(whole != 0, 0, state[3])
    mass_over = tl.where(whole != 0, 0.0, state[4])
    candidates = (listed, None, size, 1.0, 0.0, top)
    while state[0] < state[1]:
        keys = split(state, first, top)
        n, mass = above(candidates, float_of(keys), False, BLOCK)
        n += n_over
        mass += mass_over
        if BY_MASS:
            bound = tl.where(first & (share > 0), share * tl.max(mass, 0), bound)
            fits = mass < bound
        else:
            fits = n < limit
        state = narrowed(state, keys, n, mass, fits)
        first = first & (size < 0)
    return state, size, whole, bound


@triton.jit
def search(
    given,
    listed,
    by_k,
    top_k,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """(cut, how many of the ids with z == cut stay, how many there are) of top_k, then top_p.

    top_k is the least cut with fewer than k above it; top_p, within those, the least with a mass
    above it of less than top_p of the whole.
    """
    V, top = given[2], given[5]
    high = ordered(top)
    none, zero = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
    least = ordered(tl.full([], -INF, tl.float32))
    state = (least, high, none + V, none, zero)
    cut, ties, equal = tl.full([], -INF, tl.float32), none + V, none + V
    size, whole = none, none
    if TOP_K:  # noqa: SIM102 (known when compiled)
        if by_k:
            limit = top_k.to(tl.int32)
            state, size, whole, _ = found(
                given, listed, state, size, whole, limit, zero, zero, False, SOFTCAP, BLOCK, ROOM
            )
            cut = float_of(state[0])
            ties, equal = limit - state[3], state[2] - state[3]
    if TOP_P:  # noqa: SIM102 (known when compiled)
        if top_p < 1:
            share = zero + top_p
            bound = share * (state[4] + ties * tl.exp(cut - top))  # unless nothing is cut yet
            share = tl.where(cut == -INF, share, 0.0)
            from_key = ordered(cut)
            state = (from_key, high, state[2], none, zero)
            state, size, whole, bound = found(
                given, listed, state, size, whole, none, bound, share, True, SOFTCAP, BLOCK, ROOM
            )
            at = float_of(state[0])
            # the first tie is kept if the mass before it is below the bound, the next if ..
            fit = tl.ceil((bound - state[4]) / tl.maximum(tl.exp(at - top), 1e-37))
            fit = tl.where(fit < V, fit, V * 1.0).to(tl.int32)
            equal = state[2] - state[3]
            ties = tl.where(at > cut, fit, tl.minimum(fit, ties))
            cut = at
    return cut, ties, equal
