"""The traffic models of vgkern/gate/traffic/triton.py, held to the bytes that each kernel's loads
and stores touch when Triton's interpreter runs it."""

from collections import defaultdict
from typing import NamedTuple

import conftest
import numpy as np
import pytest
import torch

import vgkern
from vgkern import objectives

if not conftest.INTERPRETED:
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)

import interpreter
from triton.runtime import interpreter as triton_interpreter

from vgkern.gate import coverage
from vgkern.gate.traffic import triton as models
from vgkern.gate.traffic.moved import Moved
from vgkern.kernels import tile

BF16, F16, F32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int64
N, H, V = 37, 48, 1035  # V is in several blocks of 512, and the last is not full
WITHIN = 0.02
SEARCHES = ("_row_cut_kernel",)  # how often it reads its list depends on the data
TILES = ("_linear_stats_kernel", "_linear_grad_kernel")


class Seen(NamedTuple):
    model: Moved
    loaded: int
    stored: int
    flops: int
    distinct: int  # bytes that are loaded, each once
    groups: int  # the same, but each once for each group of row blocks


def all_live(shape=(N,), dtype=F32):
    """Coefficients, advantages and the like: none is 0."""
    return torch.rand(shape) + 0.5


def rows(dtype, h=H, n=N):
    hidden = torch.randn(n, h).to(dtype).requires_grad_()
    return hidden, (torch.randn(V, h) / 4).to(dtype).requires_grad_()


def noise(*shape):
    return vgkern.Noise(3, torch.arange(np.prod(shape)).view(shape), torch.ones(shape, dtype=I64))


def scores():
    for dtype, softcap in ((F32, None), (BF16, 30.0)):
        logits = torch.randn(N, V).to(dtype).requires_grad_()
        out = vgkern.token_logprobs(logits, torch.arange(N), softcap=softcap, backend="triton")
        (out.logp * all_live() + out.entropy).sum().backward()
    for dtype, bias in ((F32, None), (BF16, torch.randn(V)), (F16, None)):
        hidden, weight = rows(dtype)
        out = vgkern.linear_token_logprobs(
            hidden, weight, torch.arange(N), bias=bias, backend="triton"
        )
        (out.logp * all_live()).sum().backward()
    hidden, weight = rows(BF16, 50, 300)  # H off the tile's depth, several row blocks
    vgkern.linear_token_logprobs(hidden, weight, torch.arange(300), backend="triton")


EVERY = objectives.GRPO.replace(beta=0.04, entropy_coef=0.01)


def losses():
    """Materialised where hidden is fp32, else recomputed; forward alone, and with a bias."""
    loss(F32, objectives.GRPO, grad=True)
    loss(F32, EVERY, grad=False)
    loss(BF16, EVERY, grad=True)
    loss(F16, objectives.GRPO, grad=True)


def loss(dtype, objective, grad):
    n = 80 if dtype == F32 else 200  # two blocks of rows of a tile
    hidden, weight = rows(dtype, n=n)
    shape, also = (10, n // 10), {}
    if objective is EVERY:
        also = {"ref_logp": -all_live(shape), "bias": torch.randn(V)}
    out = vgkern.linear_policy_loss(
        hidden.view(*shape, H), weight, torch.arange(n).view(shape), all_live((10,)),
        objective=objective, backend="triton", **also
    )  # fmt: skip
    if grad:
        out.loss.backward()


def tokens():
    fixed = objectives.GSPO.replace(sampler_correction="sequence_mask")
    for o in (objectives.GRPO, objectives.GSPO, fixed, objectives.GMPO, objectives.VESPO):
        shape, also = (6, 700), {}
        if o.sampler_correction != "none":
            also = {"sampler_logp": -all_live(shape)}
        logp = (-all_live(shape)).requires_grad_()
        o = o.replace(beta=0.04, entropy_coef=0.01)
        vgkern.policy_loss(
            logp, all_live((6,)), objective=o, old_logp=logp.detach() * 1.01,
            ref_logp=-all_live(shape), entropy=all_live(shape), backend="triton", **also
        )  # fmt: skip
    for estimator in ("grpo", "rloo"):
        groups = torch.arange(160) // models.GROUP
        vgkern.group_advantages(torch.randn(160), groups, estimator=estimator, backend="triton")


def samples():
    for cut in ({}, {"top_k": 500}, {"top_p": 0.9}, {"top_k": 900, "top_p": 0.95, "min_p": 1e-4}):
        hidden, weight = rows(F32, n=5)
        bias = torch.randn(V)
        drawn = vgkern.linear_sample(hidden, weight, noise(5), bias=bias, backend="triton", **cut)
        if cut:
            out = vgkern.linear_token_logprobs(
                hidden, weight, drawn.token, bias=bias, backend="triton", **cut
            )
            (out.logp * all_live((5,))).sum().backward()


def credit():
    for relaxation in ("gumbel", "expected"):
        hidden, weight = rows(BF16)
        table = torch.randn(V, 70).to(BF16).requires_grad_()
        x = vgkern.noisy_embedding(
            hidden, weight, table, torch.randperm(V)[:N],
            noise(N) if relaxation == "gumbel" else None, relaxation=relaxation, backend="triton"
        )  # fmt: skip
        x.float().square().sum().backward()
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        hidden, weight = rows(BF16)
        teacher = [x.detach() for x in rows(BF16)]
        out = vgkern.linear_divergence(hidden, weight, *teacher, kind=kind, backend="triton")
        out[0].sum().backward()


def continuous():
    for dtype, n in ((F32, 17), (BF16, 200)):
        mean = torch.randn(N, n).to(dtype).requires_grad_()
        log_std = torch.randn(N, n).to(dtype).requires_grad_()
        out = vgkern.gaussian_action(mean, log_std, noise(N), backend="triton")
        down = (torch.randn(N, n).to(dtype), all_live())
        torch.autograd.grad((out.action, out.logp), (mean, log_std), down)
    for dense, n in ((True, 5), (True, 70), (False, 200)):
        b, t = 3, 4
        jacobian = torch.randn((b, t, n, n) if dense else (b, t, n)).requires_grad_()
        push, first = torch.randn(b, t, n).requires_grad_(), torch.randn(b, n).requires_grad_()
        done = torch.zeros(b, t, dtype=torch.bool)
        states = vgkern.costate_scan(jacobian, push, first, done=done, backend="triton")
        states.backward(torch.randn(b, t + 1, n))
        sigma = torch.rand(b, t, n).requires_grad_()
        states = vgkern.linear_rollout(jacobian, push, sigma, first, noise(b, t), backend="triton")
        states.backward(torch.randn(b, t + 1, n))


@pytest.fixture(scope="module")
def seen():
    """{kernel: what its launches loaded and stored, and what its model says}."""
    found = defaultdict(list)
    touched = []
    check, call = interpreter._check, triton_interpreter.GridExecutor.__call__

    def checked(pointers, mask, kind):
        check(pointers, mask, kind)
        if kind == "load":
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            at = pointers.data.reshape(-1).astype(np.uint64)
            if mask is not None:
                lanes = np.broadcast_to(mask.data, pointers.data.shape).reshape(-1)
                at = at[lanes.astype(bool)]
            program = triton_interpreter.interpreter_builder.grid_idx[0]
            touched.append((program, size, np.unique(at)))

    def counted(self, *args, **options):
        traffic = interpreter.TRAFFIC
        traffic.reset()
        touched.clear()
        given = {**dict(zip(self.arg_names, args, strict=False)), **options}
        grid = tuple(self.grid(given) if callable(self.grid) else self.grid)
        name = self.fn.__name__
        model = models.moved(name, given, grid)
        call(self, *args, **options)
        groups = 0
        if name in TILES:
            size = given["group"] * (grid[0] // given["blocks"])
            parts = -(-grid[0] // size)
            groups = sum(distinct(x for x in touched if x[0] // size == g) for g in range(parts))
        amounts = (traffic.loaded, traffic.stored, traffic.flops, distinct(touched), groups)
        found[name].append(Seen(model, *amounts))

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_check", checked)
        patch.setattr(triton_interpreter.GridExecutor, "__call__", counted)
        for f in (scores, losses, tokens, samples, credit, continuous):
            f()
        patch.setattr(tile, "HIDDEN_IN_L2", 1)  # a group is one block of rows
        loss(BF16, EVERY, grad=True)
    return found


def distinct(touched):
    """Bytes, each once, of (program, bytes of an element, addresses)."""
    parts = defaultdict(list)
    for _, size, at in touched:
        parts[size].append(at)
    return sum(size * np.unique(np.concatenate(x)).size for size, x in parts.items())


@pytest.mark.parametrize("kernel", sorted(coverage.triton_kernels()))
def test_the_model_is_what_the_kernel_touches(kernel, seen):
    assert seen[kernel], "no call here launches it: give it one"
    for x in seen[kernel]:
        m = x.model
        if kernel in SEARCHES:  # the walks over the row are what is modelled
            assert m.read * (1 - WITHIN) <= x.loaded <= (m.read + m.again) * (1 + WITHIN), x
            assert m.written <= x.stored <= (m.written + m.rewritten) * (1 + WITHIN), x
            continue
        assert m.read + m.again == pytest.approx(x.loaded, rel=WITHIN), x
        assert m.written + m.rewritten == pytest.approx(x.stored, rel=WITHIN), x
        assert m.flops == pytest.approx(x.flops, rel=WITHIN), x
        assert x.distinct <= m.read * (1 + WITHIN), f"memory is read at least once: {x}"
        assert m.again >= 0 and m.rewritten >= 0, x


@pytest.mark.parametrize("kernel", TILES)
def test_operands_come_once_for_each_group_of_rows(kernel, seen):
    assert {x.groups > x.distinct for x in seen[kernel]} == {True, False}
    for x in seen[kernel]:
        assert x.groups == pytest.approx(x.model.read, rel=WITHIN), x
