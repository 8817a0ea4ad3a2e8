"""The gradient of logits that are never stored, interpreted: against fp64 and against row_grad."""

import conftest
import pytest
import torch

if not conftest.INTERPRETED:
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)

import interpreter
import triton
import triton.language as tl

from vgkern.kernels import linear, linear_grad, linear_token_logprobs, rows, tile

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INF, NAN, IGNORE = torch.inf, torch.nan, -100
# rounding of the result, and of fp32 sums of H products and V exponentials
ALLOWED = {BF16: 2**-8, F16: 2**-11, F32: 3e-6}

PLAIN = {"bias": None, "temperature": 1.0, "softcap": 0.0}
EVERY = {"bias": "blocked", "temperature": 0.7, "softcap": 5.0}
# One row and one more than two blocks of 64; H below, off and at multiples of 16 and of the depth
# of a tile; V of one column, below a tile, off it and a multiple of it; each option alone.
CASES = {
    "one-row": (1, 64, 1000, PLAIN),
    "one-column": (3, 16, 1, PLAIN),
    "h7-v31": (5, 7, 31, {**PLAIN, "bias": "plain"}),
    "whole": (129, 128, 256, PLAIN),
    "temperature": (9, 48, 300, {**PLAIN, "temperature": 1.7}),
    "softcap": (9, 48, 300, {**PLAIN, "softcap": 4.0}),
    "blocked": (40, 48, 300, {**PLAIN, "bias": "blocked"}),
    "all-h83-v1035": (129, 83, 1035, EVERY),
}


def problem(name, dtype, seed=1):
    """The arguments of linear_grad but `out`: rows of every kind, those that are dead of NaN."""
    count, width, vocab, o = CASES[name]
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(count, width, generator=g).to(dtype)
    w = (torch.randn(vocab, width, generator=g) * 2.5 / width**0.5).to(dtype)
    b = None if o["bias"] is None else torch.randn(vocab, generator=g)
    y = torch.randint(vocab, (count,), generator=g)
    if o["bias"] == "blocked":
        b[1::5] = -INF
        y[4::8] = 1  # a target that is blocked
    if count > 4:
        y[::7] = torch.tensor([IGNORE, -7, vocab + 1, 2**40, vocab] * 30)[: len(y[::7])]
    options = (o["temperature"], o["softcap"], IGNORE)
    stats = linear_token_logprobs.linear_logprobs_fwd(h, w, b, y, *options)
    c, e = torch.randn(2, count, generator=g)
    c[2::5], e[1::3] = 0, 0
    h[y == IGNORE] = NAN
    return [h, w, b, y, *stats, c, e, *options]


def truth(h, w, b, y, logp, entropy, lse, c, e, temperature, softcap, ignore_index):
    """In fp64, from its own statistics."""
    vocab = w.shape[0]
    x = h.double().nan_to_num() @ w.double().T
    x = x if b is None else x + b.double()
    slope = torch.ones_like(x)
    if softcap:
        t = torch.tanh(x / softcap)
        x, slope = (softcap * t).where(x > -INF, x), 1 - t * t
    lp = (x / temperature).log_softmax(-1)
    known = (y >= 0) & (y < vocab)
    at = y.where(known, 0)[:, None]
    dead = (y == ignore_index) | (y < 0) | (y > vocab)
    dead |= known & (lp.gather(1, at)[:, 0] == -INF)
    c, e = (g.double().masked_fill(dead, 0)[:, None] for g in (c, e))
    p, lp = lp.exp(), lp.masked_fill(lp == -INF, 0)
    onehot = torch.zeros_like(p).scatter_(1, at, known.double()[:, None])
    dz = c * (onehot - p) - e * p * (lp - (p * lp).sum(-1, keepdim=True))
    return dz * slope / temperature


def run(args, make=linear_grad.linear_grad):
    out = torch.empty(len(args[0]), len(args[1]), dtype=args[0].dtype)
    assert make(*args, out) is out
    return out


def error(got, want):
    """The worst row, over what its dtype allows."""
    assert bool(got.isfinite().all()), "not finite, or not written"
    zero = want.norm(dim=-1) == 0
    assert bool((got[zero] == 0).all()), "a dead row has a gradient"
    off = (got.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
    return float(off.masked_fill(zero, 0).max()) / ALLOWED[got.dtype]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", CASES)
def test_against_fp64(name, dtype):
    args = problem(name, dtype)
    assert error(run(args), truth(*args)) <= 1


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", ["whole", "all-h83-v1035"])
def test_against_row_grad_on_the_logits(name, dtype):
    """The same gradient but for one rounding, the same zeros in the same rows."""
    h, w, b, *vectors, temperature, softcap, ignored = problem(name, dtype)
    got = run([h, w, b, *vectors, temperature, softcap, ignored])
    third = (None, 0, None, None, 1.0, False)
    x = linear.mm32(h, w.t())
    want = rows.row_grad(
        x, b, *vectors, *third, temperature, softcap, ignored, torch.empty_like(x, dtype=dtype)
    )
    assert torch.equal(got == 0, want == 0)
    assert error(got, want.double()) <= 2


def test_rows_of_one_kind_each():
    """What each special row is: zero exactly, or every column of the softmax."""
    y = torch.tensor([3, IGNORE, -1, 32, 2**40, 31, 0, 3])
    h = torch.randn(8, 16)
    b = torch.zeros(31)
    b[0] = -INF
    h[1] = NAN
    options = (1.0, 0.0, IGNORE)
    stats = linear_token_logprobs.linear_logprobs_fwd(h, w := torch.randn(31, 16), b, y, *options)
    c, e = torch.tensor([1.0] * 7 + [0.0]), torch.zeros(8)
    dz = run([h, w, b, y, *stats, c, e, *options])
    p = (h @ w.T + b).softmax(-1)
    assert (dz.abs().sum(-1) == 0).tolist() == [False, *[True] * 4, False, True, True]
    torch.testing.assert_close(dz[5], -p[5])  # the target is on another shard
    torch.testing.assert_close(dz[0], torch.eye(31)[3] - p[0])
    assert float(dz[0, 0]) == 0
    assert abs(float(dz[0].double().sum())) < 1e-6, "p does not sum to 1"


def test_no_rows_and_a_row_stride():
    assert run([torch.empty(0, 16), torch.randn(40, 16), None, torch.empty(0, dtype=torch.int64),
                *torch.empty(5, 0), 1.0, 0.0, IGNORE]).shape == (0, 40)  # fmt: skip
    args = problem("all-h83-v1035", BF16)
    wide = torch.full((129, 1048), NAN, dtype=BF16)
    linear_grad.linear_grad(*args, wide[:, 5:1040])
    assert torch.equal(wide[:, 5:1040], run(args))
    assert wide[:, :5].isnan().all() and wide[:, 1040:].isnan().all()
    args[0] = torch.full((129, 90), NAN, dtype=BF16)[:, :83].copy_(args[0])  # views of both
    args[1] = torch.full((1035, 99), NAN, dtype=BF16)[:, 9:92].copy_(args[1])
    assert torch.equal(wide[:, 5:1040], run(args))


@pytest.mark.parametrize("how", ["ignored", "no upstream"])
def test_a_block_of_dead_rows_costs_no_product(how):
    args = problem("whole", BF16)
    m = tile.config(129, 256, 128, 2).rows
    assert m < 129
    h, y, c, e = args[0], args[3], args[7], args[8]
    h[:m] = NAN
    if how == "ignored":
        y[:m] = IGNORE
    else:
        c[:m], e[:m] = 0, 0
    interpreter.TRAFFIC.reset()
    dz = run(args)
    assert interpreter.TRAFFIC.flops == 2 * m * -(-(129 - m) // m) * 128 * 256
    assert (dz[:m] == 0).all()
    assert error(dz, truth(*args)) <= 1


def test_no_race_and_no_wasted_byte():
    """Every byte of the gradient once; a tile reads its rows of hidden and of the weight once."""
    args = problem("h7-v31", BF16)
    h, w = args[0], args[1]
    args = [h.repeat(14, 1), w.repeat(9, 1), args[2].repeat(9), *(x.repeat(14) for x in args[3:9]),
            *args[9:]]  # fmt: skip
    interpreter.TRAFFIC.reset()
    with interpreter.racing():
        run(args)
    count, vocab = 70, 279
    assert interpreter.TRAFFIC.stored == 2 * count * vocab
    m, n = tile.config(count, vocab, 7, 2)[:2]
    tiles = -(-count // m), -(-vocab // n)
    read = 2 * 7 * tiles[0] * tiles[1] * (m + n) + 4 * vocab * tiles[0]
    assert interpreter.TRAFFIC.loaded <= read + (8 + 6 * 4) * count * tiles[1]


@pytest.mark.parametrize("size, kind", tile.CONFIGS)
def test_every_tile(size, kind, monkeypatch):
    monkeypatch.setattr(tile, "config", lambda *_: tile.CONFIGS[size, kind])
    for dtype in (BF16, F16) if size == 2 else (F32,):
        args = problem("all-h83-v1035", dtype)
        assert error(run(args), truth(*args)) <= 1


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_the_tile_of_a_device(shared, monkeypatch):
    """It fits, and its parts, the order of a row's sum, do not depend on the number of rows."""
    monkeypatch.setattr(tile, "shared_memory", lambda: shared)
    seen = set()
    for size in (2, 4):
        for width in (16, 83, 576, 1536, 4096):
            for count in (1, 64, 65, 8192):
                t = tile.config(count, 50257, width, size)
                assert t.stages * (t.rows + t.columns) * t.depth * size <= shared
                seen.add((t.rows, t.columns))
                assert t.part == tile.config(8192, 50257, width, size).part
    assert seen == {(32, 64), (64, 64), (64, 128), (128, 256 if shared > tile.LARGE else 128)}


def test_when_recompute_pays():
    widths = (64, 576, 896, 1500, 1700, 4096)
    assert [w for w in widths if linear_grad.recompute_pays(w)] == [64, 576]
    assert [w for w in widths if linear_grad.recompute_pays(w, again=True)] == [64, 576, 896, 1500]
    assert not linear_grad.recompute_pays(64, element_size=4)


# The oracle bites ---------------------------------------------------------------------------------


def _changed(at, change):
    """The kernel with one of its arguments changed."""

    def make(*args):
        return linear_grad.linear_grad(*(change(x) if i == at else x for i, x in enumerate(args)))

    return make  # fmt: skip


def _unwritten(*args):
    linear_grad.linear_grad(*args)[LIVE, 1000:] = NAN
    return args[-1]


LIVE = 3  # a row with a gradient
MUTATIONS = {
    "bias": _changed(2, lambda b: b + 0.02 * (torch.arange(len(b)) % 2)),
    "target": _changed(3, lambda y: y.where(torch.arange(len(y)) != LIVE, (y + 2) % 1035)),
    "entropy": _changed(5, lambda x: 1.01 * x),
    "lse": _changed(6, lambda x: x + 0.01),
    "c": _changed(7, lambda x: 1.01 * x),
    "e": _changed(8, lambda x: 0 * x),
    "temperature": _changed(9, lambda x: 1.01 * x),
    "softcap": _changed(10, lambda x: 0.0),
    "ignored": lambda *args: linear_grad.linear_grad(*args[:11], int(args[3][LIVE]), args[12]),
    "unwritten": _unwritten,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_oracle_bites(name):
    args = problem("all-h83-v1035", BF16)
    want = truth(*args)
    assert want[LIVE].any() and error(run(args), want) <= 1
    try:
        found = error(run(args, MUTATIONS[name]), want)
    except AssertionError:
        found = INF
    assert found > 1.5


def test_a_kernel_without_the_slope_of_the_softcap_fails(monkeypatch):
    whole = tile.finished

    def flat(*args):
        z, slope = whole(*args)
        return z, slope * 0 + 1

    monkeypatch.setattr(tile, "finished", flat)
    args = problem("softcap", BF16)
    assert error(run(args), truth(*args)) > 10


# The order of the tiles ---------------------------------------------------------------------------


@triton.jit
def _place_kernel(out, blocks, group):
    block, part = tile.place(blocks, group)
    tl.store(out + 2 * tl.program_id(0), block)
    tl.store(out + 2 * tl.program_id(0) + 1, part)


def order(blocks, parts, group):
    out = torch.empty(blocks * parts, 2, dtype=torch.int64)
    _place_kernel[(blocks * parts,)](out, blocks, group)
    return out.tolist()


@pytest.mark.parametrize("blocks, parts, group", [(1, 7, 16), (5, 1, 2), (7, 3, 3), (6, 5, 100)])
def test_every_tile_once_and_groups_one_after_the_other(blocks, parts, group):
    got = order(blocks, parts, group)
    assert sorted(map(tuple, got)) == [(b, p) for b in range(blocks) for p in range(parts)]
    assert [b // group for b, _ in got] == sorted(b // group for b, _ in got)


def read_from_memory(places, h_block, w_part, cache=50 << 20, at_once=132):
    """Bytes of (hidden, weight) that miss a cache that drops what was used longest ago, with the
    programs side by side in the order of the grid, each reading its two operands at once."""
    held, misses = {}, [0, 0]
    size = (h_block, w_part)
    for wave in (places[i : i + at_once] for i in range(0, len(places), at_once)):
        for key in ((which, x) for place in wave for which, x in enumerate(place)):
            if key not in held:
                misses[key[0]] += size[key[0]]
            held[key] = held.pop(key, size[key[0]])  # to the end
            while sum(size[which] for which, _ in held) > cache:
                held.pop(next(iter(held)))
    return misses


def test_hidden_is_read_once_and_the_weight_once_a_group():
    """8192 rows of 4096, 67 MB, more than the L2. Were all row blocks side by side, each part of
    the weight would bring hidden from memory again."""
    h_block, w_part, blocks, parts = 128 * 4096 * 2, 256 * 4096 * 2, 64, 24
    size = tile.group(blocks, 128, 4096, 2)
    h, w = read_from_memory(order(blocks, parts, size), h_block, w_part)
    assert h == blocks * h_block
    assert w == blocks / size * parts * w_part
    h, _ = read_from_memory(order(blocks, parts, blocks), h_block, w_part)
    assert h > 10 * blocks * h_block
