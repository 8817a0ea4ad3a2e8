"""linear_token_logprobs(group=...) among 1, 2 and 4 ranks, against the head in one piece."""

import pytest
import ranks
import torch
import torch.distributed as dist
from oracle import EAGER, fp64, measure, outputs, run

import vgkern
from vgkern import case_inputs, cases
from vgkern.ops._library import operators
from vgkern.ops._vocab_parallel import combine

OP = "linear_token_logprobs"
NAMES = ("hidden", "weight", "bias")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# every option alone and together; ragged shards down to one id; what a dtype can break, it breaks
# in a plain case
CASES = [
    *[("plain", (9,), 33, 301, dtype, {}) for dtype in (F32, BF16, F16, F64)],
    ("3-d", (3, 5), 16, 1035, F32, {"bias": "plain", "temperature": 0.7}),
    ("tiles", (7,), 16, 9001, BF16, {"softcap": 6.0, "bias": "plain"}),
    ("ignore", (11,), 16, 301, F32, {"softcap": 6.0, "temperature": 1.3}),
    ("blocked", (9,), 16, 301, F32, {"bias": "blocked"}),
    ("blocked shard", (9,), 16, 301, F32, {"bias": "blocked"}),
    ("peaked", (12,), 64, 301, F32, {"peaked": True}),
    ("one id each", (5,), 7, 5, F32, {}),
    ("zero rows", (0,), 7, 33, F32, {}),
]


def sizes(v, world):
    """Ragged shares of v: the first small, the last but one a single id."""
    if world == 1:
        return [v]
    if world == 2:
        return [v // 3, v - v // 3]
    first = max(v // 7, 1)
    return [first, v - first - 1 - max(v // 5, 1), 1, max(v // 5, 1)]


def shard(x, world, rank):
    share = sizes(len(x["weight"]), world)
    at = slice(sum(share[:rank]), sum(share[: rank + 1]))
    return {k: t[at] if k in ("weight", "bias") else t for k, t in x.items()}, at


def make(name, shape, h, v, dtype, options, world):
    x, _, _ = case_inputs.head(shape, h, v, dtype, 0, **options)
    if name == "ignore":
        x["targets"][::3] = -100
        x["ignore_index"] = -100
    if name == "blocked shard" and world > 1:
        _, at = shard(x, world, world - 1)
        x["bias"][at] = -torch.inf
        x["targets"] = x["targets"].where(x["targets"] < at.start, 0)
    return x


def place(group):
    return dist.get_world_size(group), dist.get_rank(group)


def whole(t, group):
    """The shards of a gradient, put together."""
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, t, group=group)
    return torch.cat(parts)


def check_case(case, backend, group):
    name, dtype, (world, rank) = case[0], case[4], place(group)
    x = make(*case, world)
    names = [k for k in NAMES if k in x]
    g = torch.Generator().manual_seed(5)
    up = {k: torch.randn(x["targets"].shape, generator=g) for k in ("logp", "entropy")}
    truth, dtruth = run(EAGER[OP], fp64(x), names, up)
    plain, dplain = run(EAGER[OP], x, names, up)

    def once():
        mine, _ = shard(x, world, rank)
        return run(
            lambda **k: outputs(
                vgkern.linear_token_logprobs(**k, group=group, backend=backend), "logp"
            ),
            mine, names, up,
        )  # fmt: skip

    got, dgot = once()
    again, dagain = once()
    for k, t in {**got, **dgot}.items():
        assert torch.equal(t, {**again, **dagain}[k]), f"{name} {k}: not the same on repeat"
    seen = [None] * world
    dist.all_gather_object(
        seen, (got["logp"].detach(), got["entropy"].detach(), dgot["dhidden"]), group
    )
    assert all(torch.equal(a, b) for s in seen for a, b in zip(s, seen[0], strict=True)), name
    for k in ("dweight", "dbias"):
        if k in dgot:
            assert dgot[k].dtype == dtype
            dgot[k] = whole(dgot[k], group)
    for k, t in {**got, **dgot}.items():
        other, want = {**plain, **dplain}[k], {**truth, **dtruth}[k]
        assert not t.isnan().any(), f"{name} {dtype} {k} {backend}: NaN"
        used = measure(t, other, want, t.dtype)[2]
        assert used <= 1, f"{name} {dtype} {k} {backend}: {used:.2f} of what is allowed"


def check_rows(backend, group):
    """A blocked target, a small p beside 1, NaN hidden rows that are ignored, frozen parts."""
    world, rank = place(group)
    x, _, _ = case_inputs.head((6,), 16, 301, F32, 0, bias="blocked")
    x["targets"][0] = 1  # blocked
    x["targets"][1] = -100
    x["hidden"][1] = torch.nan
    single = {k: x[k].clone().requires_grad_() for k in NAMES}
    want = vgkern.linear_token_logprobs(**{**x, **single}, backend=backend)
    mine, at = shard(x, world, rank)
    leaves = {k: mine[k].clone().requires_grad_() for k in NAMES}
    got = vgkern.linear_token_logprobs(**{**mine, **leaves}, group=group, backend=backend)
    assert got.logp[0] == -torch.inf and got.logp[1] == got.entropy[1] == 0
    torch.testing.assert_close(got.logp, want.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=1e-5)
    for out in got, want:
        (out.logp[1:].sum() + out.entropy.sum()).backward()
    for k in NAMES:
        there = single[k].grad if k == "hidden" else single[k].grad[at]
        torch.testing.assert_close(leaves[k].grad, there, rtol=1e-4, atol=1e-5)
    assert (leaves["hidden"].grad[:2] == 0).all()
    # a frozen hidden: no collective in backward, so one rank may do it alone
    w = mine["weight"].clone().requires_grad_()
    out = vgkern.linear_token_logprobs(
        x["hidden"].nan_to_num(), w, x["targets"], bias=mine["bias"], group=group,
        backend=backend,
    )  # fmt: skip
    if rank == 0:
        out.logp[2:].sum().backward()
        assert w.grad.abs().sum() > 0
    # an ignore_index that is an id: ignored everywhere, and no other rank's id by accident
    y = x["targets"].clamp(min=0)
    y[2] = 3
    x["hidden"][1] = 0.0
    options = {"bias": x["bias"], "ignore_index": 3, "backend": backend}
    want = vgkern.linear_token_logprobs(x["hidden"], x["weight"], y, **options)
    options["bias"] = mine["bias"]
    got = vgkern.linear_token_logprobs(x["hidden"], mine["weight"], y, **options, group=group)
    assert got.logp[2] == 0
    torch.testing.assert_close(got.logp, want.logp, rtol=1e-5, atol=1e-5)


def check_collapse(backend, group):
    """A gap of 30 nats in another shard than the rest of the mass: logp is -1e-13 x (V - 1)."""
    v, (world, rank) = 64, place(group)
    h, w = torch.ones(2, 1), torch.zeros(v, 1)
    w[v - 1], w[0] = 30.0, 0.0
    y = torch.tensor([v - 1, 0])
    mine, _ = shard({"weight": w}, world, rank)
    out = vgkern.linear_token_logprobs(h, mine["weight"], y, group=group, backend=backend)
    want = -(v - 1) * torch.tensor(-30.0, dtype=F64).exp()
    torch.testing.assert_close(out.logp[0].double(), want.log1p(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.logp[1].double(), want - 30, rtol=1e-6, atol=0)


def check_errors(backend, group):
    world, rank = place(group)
    x, _, _ = case_inputs.head((3,), 4, 33, F32, 0)
    mine, _ = shard(x, world, rank)
    options = {"group": group, "backend": backend}
    for bad in (
        {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": torch.ones(3)},
        {"temperature": 0.0},
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=f"{next(iter(bad))}: .*group=None"):
            vgkern.linear_token_logprobs(**{**mine, **bad}, **options)
    with pytest.raises(ValueError, match=r"targets: got id 33 at \[1\].*id < 33"):
        vgkern.linear_token_logprobs(
            **{**mine, "targets": torch.tensor([0, 33, 1])}, **options
        )  # every rank alike
    with pytest.raises(ValueError, match="bias"):
        vgkern.linear_token_logprobs(**mine, bias=torch.zeros(34), **options)
    bad = mine["weight"].clone()
    if rank == 0:
        bad[0] = torch.nan
    with pytest.raises(vgkern.NonFiniteError, match=r"hidden|weight"):
        vgkern.linear_token_logprobs(**{**mine, "weight": bad}, **options)


def check_all(group):
    world = dist.get_world_size(group)
    for backend in ("torch", "cpu"):
        for case in CASES:
            if (case[4] != F64 or backend == "torch") and case[3] >= world:
                check_case(case, backend, group)
        for check in (check_rows, check_collapse, check_errors):
            check(backend, group)


def worker(rank, store):
    """One spawn for everything: a group of one, one of two whose ranks are not the global ones, and
    all four."""
    ranks.join(rank, store, 4)
    solo, pair = dist.new_group([0]), dist.new_group([2, 3])
    if rank == 0:
        check_all(solo)
    if rank >= 2:
        check_all(pair)
    if rank == 1:
        x, _, _ = case_inputs.head((3,), 4, 33, F32, 0)
        with pytest.raises((TypeError, ValueError), match="group: got"):
            vgkern.linear_token_logprobs(**x, group=pair)
    check_all(dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


def test_ranks(tmp_path):
    import conftest

    if conftest.INTERPRETED:
        pytest.skip("the interpreter is no place for process groups")
    conftest.skip_unless_runs("cpu")
    ranks.run(worker, 4, tmp_path / "store")


def pair(rank, store, backend):
    ranks.join(rank, store, 2)
    options = {"bias": "blocked", "temperature": 0.7}
    check_case(("pair", (6,), 16, 37, BF16, options), backend, dist.group.WORLD)
    dist.destroy_process_group()


def test_a_pair_of_ranks(backend, tmp_path):
    if backend in ("torch", "cpu"):
        pytest.skip("among the ranks above")
    ranks.run(pair, 2, tmp_path / "store", backend)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_shards_by_hand(backend, dtype):
    """The operators with global statistics and targets elsewhere, against the head in one piece."""
    if backend == "torch":
        pytest.skip("no operators")
    ops, scalars, vocab, cut = operators(backend), (0.7, 5.0, -100), 61, 20
    x, _, _ = case_inputs.head((8,), 16, vocab, dtype, 0, bias="blocked")
    h, w, b, y = (x[k] for k in ("hidden", "weight", "bias", "targets"))
    b = b.float()
    y[0], y[1], y[2], h[2] = 3, 60, -100, torch.nan
    b[3] = b[60] = 0
    up = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    whole = ops.linear_logprobs_fwd(h, w, b, y, *scalars)
    want = ops.linear_logprobs_bwd(h, w, b, y, *whole, *up, *scalars, [True] * 3, True)
    stats, grads = [], []
    for at in slice(0, cut), slice(cut, vocab):
        size = at.stop - at.start
        local = (y - at.start).where((y >= at.start) & (y < at.stop), size)
        head = (h, w[at], b[at], local.where(y != -100, -100))
        stats.append(torch.stack(ops.linear_logprobs_fwd(*head, *scalars)))
        grads.append(ops.linear_logprobs_bwd(*head, *whole, *up, *scalars, [True] * 3, True))
    merged = combine(*torch.stack(stats, 1), (y >= cut).long())
    for a, c in zip(merged, whole, strict=True):
        torch.testing.assert_close(a.where(y != -100, 0), c, rtol=1e-5, atol=1e-5)
    assert grads[0][0].dtype == F32 and grads[0][1].dtype == dtype
    loose = {F32: 1e-5, BF16: 2e-2, F16: 2e-3}[dtype]
    torch.testing.assert_close(grads[0][0] + grads[1][0], want[0], rtol=loose, atol=loose)
    for k in (1, 2):
        put = torch.cat([grads[0][k], grads[1][k]])
        torch.testing.assert_close(put, want[k], rtol=loose, atol=loose)


def test_without_a_process_group():
    x, _, _ = case_inputs.head((3,), 4, 33, F32, 0)
    with pytest.raises(TypeError, match="group: got object"):
        vgkern.linear_token_logprobs(**x, group=object())
    assert OP in {c.op for c in cases.CASES}
