"""The Triton backend interpreted: the repair of the interpreter, and what parity cannot see."""

import conftest
import numpy as np
import pytest
import torch

import vgkern
from vgkern import cases
from vgkern.ops._truncate import Cut
from vgkern.ops.noise import Noise

if not conftest.INTERPRETED:
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)

import interpreter
import triton
import triton.language as tl
from eager.logprobs import kept
from oracle import check

from vgkern.kernels import (
    group_advantages,
    linear,
    linear_token_logprobs,
    logits,
    memory,
    objective,
    policy_loss,
    row_cut,
    rows,
    tile,
)

BF16, F32 = torch.bfloat16, torch.float32


# The repair -------------------------------------------------------------------------------------


@triton.jit
def _dot_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _double_kernel(x, out, N: tl.constexpr, EXTRA: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i + EXTRA)
    tl.store(out + i, (y + y).to(out.dtype.element_ty))


@triton.jit
def _racing_kernel(x):
    tl.store(x, tl.load(x) + 1)


def test_bf16_dot():
    a, b = torch.randn(2, 32, 32).to(BF16)
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_tf32_is_rounded():
    a, b = torch.randn(2, 32, 32)
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, N=32)  # the default precision
    error = float((out - a @ b).norm() / (a @ b).norm())
    assert 1e-5 < error < 1e-3


def test_rounding_to_bf16():
    x = torch.cat([torch.randn(1021), torch.tensor([3.4e38, -3.4e38, torch.inf])])
    out = torch.empty(1024, dtype=BF16)
    _double_kernel[(1,)](x, out, N=1024, EXTRA=0)
    assert torch.equal(out, (2 * x).to(BF16))
    y = x.to(BF16)
    _double_kernel[(1,)](y, out, N=1024, EXTRA=0)
    assert torch.equal(out, y + y)


def test_out_of_bounds_is_caught():
    x = torch.zeros(8)
    with pytest.raises(Exception, match="load out of bounds: 2 of 8 lanes"):
        _double_kernel[(1,)](x, torch.zeros(8), N=8, EXTRA=2)
    with pytest.raises(Exception, match="store out of bounds"):
        _double_kernel[(1,)](x, torch.zeros(4), N=8, EXTRA=0)


def test_race_between_programs_is_caught():
    x = torch.zeros(1)
    _racing_kernel[(2,)](x)  # unseen without racing()
    with interpreter.racing(), pytest.raises(Exception, match="race"):
        _racing_kernel[(2,)](x)


def test_small_seed_is_64_bits_wide():
    """A seed that fits 32 bits comes as int32, where a shift by 32 is undefined."""
    assert np.iinfo(np.int32).max > 11
    for seed in (0, 11, -1, 2**40 + 5, -(2**63)):
        token = sample(torch.zeros(4, 64), seed=seed)[0]
        expected = Noise(seed % 2**64, torch.arange(4), torch.arange(4)).gumbel(64).argmax(-1)
        assert torch.equal(token, expected)


# Memory -----------------------------------------------------------------------------------------

# Case, and the most it may ask of memory relative to the byte model of the case (the tiles of the
# dot kernel are read once per block of rows and columns; the GEMMs of torch are not counted).
ACCESS = {
    "token_logprobs-v1000-softcap": 1.05,
    "token_logprobs-v1035-ignore": 1.05,
    "linear_token_logprobs-h7-v31-3d": 8,
    "policy_loss-full": 1.1,
    "policy_loss-gspo": 3.2,
    "group_advantages-grpo-ragged": 8,
    "linear_policy_loss-full-bias": 6,
    "linear_sample-h123-v1035-3d": 1,
}


@pytest.mark.parametrize("name", ACCESS)
def test_no_race_and_no_wasted_byte(name):
    case = cases.by_name(name)
    inputs = case.make(F32, 0)
    traffic = interpreter.TRAFFIC
    traffic.reset()
    with interpreter.racing():
        check(case, "triton", F32)
    assert traffic.stored > 0
    asked = (traffic.loaded + traffic.stored) / case.bytes(inputs)
    assert asked <= ACCESS[name], f"{asked:.2f} of the byte model"


def test_dot_kernel_does_the_flops_of_one_gemm():
    x, w, y = torch.randn(64, 32), torch.randn(128, 32), torch.zeros(64, dtype=torch.int64)
    interpreter.TRAFFIC.reset()
    linear_token_logprobs.linear_logprobs_fwd(x, w, None, y, 1.0, 0.0, -100)
    assert interpreter.TRAFFIC.flops == 2 * 64 * 32 * 128


def test_targets_out_of_range():
    """Nothing is read out of bounds; NaN for those rows, gradient 0; V is on another shard."""
    x = torch.randn(6, 31)
    y = torch.tensor([-100, 31, 32, -7, 2**40, 3])
    fused = linear_token_logprobs.linear_logprobs_fwd(x, torch.eye(31), None, y, 1.0, 0.0, -100)
    for stats in (rows.row_stats(x, None, y, 1.0, 0.0, -100), fused):
        logp, entropy, lse = stats
        assert logp.isnan().tolist() == [False, False, True, True, True, False]
        assert float(logp[0]) == float(entropy[0]) == 0
        torch.testing.assert_close(logp[1], -x[1].logsumexp(0))
        torch.testing.assert_close(logp[5], x[5].log_softmax(0)[3])
        torch.testing.assert_close(lse[1], x[1].logsumexp(0))
    one = torch.ones(6)
    out = grad(x, y, *stats, one, one)
    assert not out[[0, 2, 3, 4]].any() and out.isfinite().all()
    p = x[1].softmax(0)
    expected = -p - p * (p.log() + entropy[1])
    torch.testing.assert_close(out[1], expected, rtol=1e-5, atol=1e-6)


def test_nan_and_blocked_stay_in_their_row():
    x = torch.randn(5, 1035)
    x[1, 700] = torch.nan
    x[2, 5] = -torch.inf
    x[3] = -torch.inf
    y = torch.tensor([5, 5, 5, 5, 1034])
    logp, entropy, lse = rows.row_stats(x, None, y, 1.0, 0.0, -100)
    assert logp[1].isnan() and logp[2] == logp[3] == -torch.inf
    assert logp[[0, 4]].isfinite().all() and entropy[[0, 2, 3, 4]].isfinite().all()
    out = grad(x, y, logp, entropy, lse, torch.ones(5), torch.ones(5))
    assert not out[2:4].any() and out[[0, 4]].isfinite().all()
    token, logp, entropy = sample(x)
    assert logp.isnan().tolist() == [False, True, False, True, False]
    assert (token < 1035).all() and (token >= 0).all()


def test_inactive_rows_are_not_read():
    x = torch.full((3, 64), torch.nan)
    y, zero = torch.tensor([1, 2, 3]), torch.zeros(3)
    interpreter.TRAFFIC.reset()
    out = grad(x, y, zero, zero, zero, zero, zero)
    assert not out.any() and interpreter.TRAFFIC.loaded < 3 * 64


# Numbers ----------------------------------------------------------------------------------------


def grad(x, y, logp, entropy, lse, c, e, u=None, expected=False, temperature=1.0, softcap=0.0):
    at = torch.arange(len(x))
    return rows.row_grad(
        x, None, y, logp, entropy, lse, c, e, u, 11, at, at, 0.8, expected, temperature, softcap,
        -100, torch.empty_like(x)
    )  # fmt: skip


def sample(x, seed=11, **cut):
    at = torch.arange(len(x))
    return rows.row_sample(x, None, seed, at, at, 0.0, Cut(**cut))


# all three terms at once, and the costate alone; V over several blocks
@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("terms", ["all", "costate"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_row_gradient(expected, terms, softcap):
    g = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(5, 1035, generator=g)
    x[:, 7] = -torch.inf
    u = torch.randn(5, 1035, generator=g)
    y = torch.tensor([0, 1034, 600, -100, 11])
    c, e = torch.randn(2, 5, generator=g)
    temperature, tau = 0.7, 1.0 if expected else 0.8
    if terms == "all":
        stats = rows.row_stats(x, None, y, temperature, softcap, -100)
        got = grad(x, y, *stats, c, e, u, expected, temperature, softcap)
    else:
        none = [None] * 6
        got = grad(x, *none, u, expected, temperature, softcap)
        c, e = torch.zeros(2, 5)
    z, slope = x.double(), torch.ones(())
    if softcap:
        t = torch.tanh(z / softcap)
        z, slope = (softcap * t).where(z > -torch.inf, z), 1 - t**2
    lp = (z / temperature).log_softmax(-1)
    p, lp = lp.exp(), lp.masked_fill(lp == -torch.inf, 0)
    at = torch.arange(5)
    noise = 0 if expected else Noise(11, at, at).gumbel(1035, torch.float64)
    q = ((z / temperature + noise) / tau).softmax(-1)
    live = (y != -100).double()[:, None]
    onehot = torch.nn.functional.one_hot(y.clamp(min=0), 1035)
    dz = live * c[:, None] * (onehot - p)
    dz -= live * e[:, None] * p * (lp - (p * lp).sum(-1, keepdim=True))
    dz += q * (u - (q * u).sum(-1, keepdim=True)) / tau
    dz *= slope / temperature
    error = (got - dz).norm(dim=-1) / dz.norm(dim=-1)
    assert float(error.max()) < 5e-6


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradient_in_place(dtype):
    x = torch.randn(4, 1035).to(dtype)
    y = torch.tensor([1, 2, 3, -100])
    stats = rows.row_stats(x, None, y, 1.0, 0.0, -100)
    c, e = torch.randn(2, 4)
    apart = grad(x, y, *stats, c, e)
    options = (None, 0, None, None, 1.0, False, 1.0, 0.0, -100)
    assert rows.row_grad(x, None, y, *stats, c, e, *options, x) is x
    assert torch.equal(x, apart)


WARP_GROUPS = ["few group", "many group"]


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("kind", ["few", "many", "odd", *WARP_GROUPS])
def test_every_tile_of_the_dot_kernel(kind, dtype, monkeypatch):
    size = dtype.itemsize
    if (size, kind) not in tile.CONFIGS:
        pytest.skip("for 16 bits")
    t = tile.CONFIGS[size, kind]
    shared = t.stages * (t.rows + t.columns) * t.depth * size
    assert shared <= (tile.LARGE if kind in WARP_GROUPS else tile.SMALL)
    assert linear_token_logprobs.SPAN % t.columns == 0
    monkeypatch.setattr(tile, "config", lambda *_: tile.CONFIGS[size, kind])
    g = torch.Generator().manual_seed(2)
    h, w = torch.randn(70, 83, generator=g).to(dtype), torch.randn(1100, 83, generator=g).to(dtype)
    b, y = torch.randn(1100, generator=g), torch.randint(1100, (70,), generator=g)
    got = linear_token_logprobs.linear_logprobs_fwd(h, w, b, y, 1.3, 20.0, -100)
    z = 20 * torch.tanh((h.double() @ w.double().T + b) / 20) / 1.3
    lp = z.log_softmax(-1)
    truth = (lp.gather(1, y[:, None])[:, 0], -(lp.exp() * lp).sum(-1), z.logsumexp(-1))
    for a, t in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=5e-6, atol=2e-5)


def test_rows_do_not_depend_on_the_batch():
    """Bit for bit, alone or together, and again."""
    g = torch.Generator().manual_seed(3)
    x, u = torch.randn(2, 5, 1035, generator=g)
    h, w = torch.randn(5, 40, generator=g), torch.randn(1035, 40, generator=g)
    y = torch.randint(1035, (5,), generator=g)
    c, e = torch.randn(2, 5, generator=g)
    at = torch.arange(5)

    def run(i):
        stats = rows.row_stats(x[i], None, y[i], 0.7, 0.0, -100)
        noise = (11, at[i], at[i])
        dz = rows.row_grad(
            x[i], None, y[i], *stats, c[i], e[i], u[i], *noise, 0.8, False, 0.7, 0.0, -100,
            torch.empty_like(x[i])
        )  # fmt: skip
        cut = rows.row_sample(x[i], None, *noise, 0.0, Cut(1.0, 50, 0.9, 0.01))
        fused = linear_token_logprobs.linear_logprobs_fwd(h[i], w, None, y[i], 1.0, 0.0, -100)
        return (*stats, dz, *rows.row_sample(x[i], None, *noise, 0.0, Cut()), *cut, *fused)

    together, again = run(slice(0, 5)), run(slice(0, 5))
    alone = [run(slice(i, i + 1)) for i in range(5)]
    for k, out in enumerate(together):
        assert torch.equal(out, again[k])
        assert torch.equal(out, torch.cat([a[k] for a in alone]))


def test_truncation_is_exact_on_ties():
    """Equal logits on both sides of the cut: the lowest ids stay, as in a stable sort."""
    x = torch.zeros(2, 700)
    x[:, 100:160] = 2.0
    x[1, 5] = 3.0
    for cut in ({"top_k": 7}, {"top_p": 0.1}, {"top_k": 80, "top_p": 0.6}, {"top_k": 100}):
        _, _, entropy = sample(x, **cut)
        order = torch.argsort(x, dim=-1, descending=True, stable=True)
        p = x.double().gather(1, order)
        p[:, cut.get("top_k", 700) :] = -torch.inf
        p = p.softmax(-1)
        p = p * (p.cumsum(-1) - p < cut.get("top_p", 1))
        kept = torch.zeros_like(p).scatter(1, order, p / p.sum(-1, keepdim=True))
        expected = -(kept * kept.clamp(min=1e-300).log()).sum(-1)
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
        tokens = torch.stack([sample(x, seed=s, **cut)[0] for s in range(2)])
        assert bool((kept.gather(1, tokens.T) > 0).all())


@pytest.mark.parametrize("room", [16, 64])
@pytest.mark.parametrize("cut", [
    {"top_k": 9}, {"top_k": 300}, {"top_p": 0.6}, {"top_p": 0.999}, {"top_k": 300, "top_p": 0.97},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
], ids=str)  # fmt: skip
def test_a_cut_narrowed_by_walks_is_that_of_a_sort(cut, room, monkeypatch):
    """Rows too long to be listed at once, a cut within the list, above it and below it: flat,
    peaked, and so many equals that no list holds them."""
    monkeypatch.setattr(row_cut, "ROOM", room)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(3, 701, generator=g) * torch.tensor([[0.5], [6.0], [1.0]])
    x[2] = x[2].mul(2).round() / 2
    least, last = row_cut.row_cut(x, None, None, 0.0, -1, Cut(**cut))
    for i, row in enumerate(x):
        got = (row > least[i]) | ((row == least[i]) & (torch.arange(701) <= last[i]))
        want = torch.zeros(701, dtype=torch.bool)
        want[kept(row.double(), **cut)] = True
        assert torch.equal(got, want), (i, got.sum(), want.sum())


@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_chunks_of_rows_add_up(dtype, monkeypatch):
    """The same gradients from one chunk of rows and from many; rows that are dead may hold NaN."""
    case = cases.by_name("linear_policy_loss-full-bias")
    monkeypatch.setattr(memory, "CHUNK_BYTES", 4 * 1035 * 7)
    check(case, "triton", dtype)
    g = torch.Generator().manual_seed(4)
    h, w = torch.randn(9, 16, generator=g), torch.randn(50, 16, generator=g).requires_grad_()
    h[3] = torch.nan
    y = torch.randint(50, (9,), generator=g)
    y[3] = -100
    lp = vgkern.linear_token_logprobs(h, w, y, backend="triton")
    assert torch.autograd.grad(lp.logp.sum(), w)[0].isfinite().all()


def test_small_coefficients_survive_fp16():
    """dz of 1e-9 is 0 in fp16: coefficients are scaled by a power of two on the way."""
    g = torch.Generator().manual_seed(5)
    h = torch.randn(4, 16, generator=g).half().requires_grad_()
    w = torch.randn(1000, 16, generator=g).half()
    y = torch.arange(4)
    out = [
        linear_token_logprobs.linear_logprobs_bwd(
            h.detach(), w, None, y, *linear_token_logprobs.linear_logprobs_fwd(
                h.detach(), w, None, y, 1.0, 0.0, -100
            ), scale * torch.ones(4), torch.zeros(4), 1.0, 0.0, -100, [False, True, False]
        )[1].float()
        for scale in (1.0, 2.0**-12)
    ]  # fmt: skip
    assert float((out[1] * 2.0**12 - out[0]).norm() / out[0].norm()) < 2e-2


# The oracle has to bite: each of these breaks the backend and must fail parity. -------------------


def _wrapped(change):
    """`change(original, *args)` in place of a function."""
    return lambda original: lambda *a, **k: change(original, *a, **k)


MUTATIONS = {
    "token_logprobs: entropy coefficient 1% off": (
        "token_logprobs-v33-temperature", rows, "row_grad",
        _wrapped(lambda f, *a: f(*a[:7], a[7] * 1.01, *a[8:]))),
    "token_logprobs: target counted twice": (
        "token_logprobs-v31-3d", logits, "finish",
        _wrapped(lambda f, target, top, total, dot, here: f(target, top, total + 1, dot, here))),
    "linear_token_logprobs: sums not moved to a new maximum": (
        "linear_token_logprobs-h123-v1035-all", linear_token_logprobs, "raised",
        _wrapped(lambda f, top, peak, total, dot: (total, dot))),
    "linear_token_logprobs: logits of the backward in bf16": (
        "linear_token_logprobs-h64-v33", linear, "mm32",
        _wrapped(lambda f, *a: (lambda z: z.copy_(z.bfloat16()))(f(*a)))),
    "group_advantages: another epsilon": (
        "group_advantages-grpo", group_advantages, "STD_EPS", lambda _: {0: 1e-2}),
    "policy_loss: KL weight 1% off": (
        "policy_loss-full", objective, "unpack",
        _wrapped(lambda f, p: f([*p[:6], p[6] * 1.01, *p[7:]]))),
    "policy_loss: share of a token in its sequence": (
        "policy_loss-gspo", policy_loss, "ratio_share",
        _wrapped(lambda f, *a: f(*a) * 0.98)),
    "linear_policy_loss: no entropy gradient": (
        "linear_policy_loss-full-bias", rows, "row_policy",
        _wrapped(lambda f, *a: f(*a[:-2], [*a[-2][:13], 0.0, *a[-2][14:]], a[-1]))),
    "linear_sample: noise of another seed": (
        "linear_sample-h7-v31", rows, "row_sample",
        _wrapped(lambda f, x, b, seed, *a: f(x, b, seed + 1, *a))),
    "linear_sample: one more than top_k": (
        "linear_sample-top-k", rows, "row_sample",
        _wrapped(lambda f, *a: f(*a[:-1], (a[-1][0], a[-1][1] + 1, *a[-1][2:])))),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_fails(mutation, monkeypatch):
    name, module, attribute, change = MUTATIONS[mutation]
    monkeypatch.setattr(module, attribute, change(getattr(module, attribute)))
    kept = len(conftest.RATIOS)
    with pytest.raises(AssertionError):
        check(cases.by_name(name), "triton", F32)
    del conftest.RATIOS[kept:]
