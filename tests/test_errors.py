"""Bad input: one exception that names the argument, what it was, and what is allowed."""

import pytest
import torch

import vgkern
from vgkern import Objective, objectives

H, V = 4, 7
f = torch.ones


def h(*shape, **kw):
    return torch.ones(*(shape or (3,)), H, **kw)


W = torch.arange(V * H, dtype=torch.float32).reshape(V, H) / 10
Y = torch.tensor([0, 1, 6])
NOISE = vgkern.Noise(0, torch.arange(3), torch.tensor(0))
LP = -f(2, 3)
A = torch.tensor([1.0, -1.0])
H23, Y23 = h(2, 3), torch.zeros(2, 3, dtype=torch.int64)
bad_row = torch.zeros(3, V)
bad_row[1, 2] = torch.nan


def tlp(*a, **k):
    return lambda: vgkern.token_logprobs(*a, **k)


def ltl(*a, **k):
    return lambda: vgkern.linear_token_logprobs(*a, **k)


def adv(*a, **k):
    return lambda: vgkern.group_advantages(*a, **k)


def pol(*a, **k):
    return lambda: vgkern.policy_loss(*a, **k)


def lpl(*a, **k):
    return lambda: vgkern.linear_policy_loss(*a, **k)


def smp(*a, **k):
    return lambda: vgkern.linear_sample(*a, **k)


E, T = ValueError, TypeError
BAD = {
    # token_logprobs
    "logits not a tensor": (tlp([1.0], Y), T, "logits: got list", "tensor"),
    "logits int": (tlp(torch.zeros(3, V, dtype=torch.int64), Y), T, "logits: got int64", "float32"),
    "logits 0-d": (tlp(torch.tensor(1.0), Y), E, "logits: got float32 tensor []", "[..., V]"),
    "no vocabulary": (tlp(f(3, 0), Y), E, "logits", "[3, 0]", "V >= 1"),
    "targets of another shape": (tlp(f(3, V), Y[:2]), E, "targets", "[2]", "[3]"),
    "targets int32": (tlp(f(3, V), Y.int()), T, "targets: got int32", "int64"),
    "targets on another device": (tlp(f(3, V), Y.to("meta")), E, "targets", "meta", "cpu"),
    "target too large": (tlp(f(3, V), Y + 1), E, "targets: got id 7 at [2]", "< 7"),
    "target negative": (tlp(f(3, V), Y - 1), E, "targets: got id -1 at [0]", "0 <="),
    "target int64 min": (
        tlp(f(3, V), Y.clamp(max=0) - 2**63), E, "targets", "-9223372036854775808"),
    "temperature 0": (tlp(f(3, V), Y, temperature=0), E, "temperature: got int 0", "> 0"),
    "temperature negative": (tlp(f(3, V), Y, temperature=-0.5), E, "temperature", "-0.5", "> 0"),
    "temperature nan": (
        tlp(f(3, V), Y, temperature=float("nan")), E, "temperature", "nan", "finite"),
    "softcap 0": (tlp(f(3, V), Y, softcap=0.0), E, "softcap", "0.0", "> 0"),
    "NaN logits": (tlp(bad_row, Y), vgkern.NonFiniteError, "logits", "NaN at row [1]"),
    "backend unknown": (tlp(f(3, V), Y, backend="gpu"), E, "backend: got 'gpu'", "torch, cpu"),
    "backend cpu, fp64": (
        tlp(f(3, V).double(), Y, backend="cpu"), vgkern.BackendError, "cpu", "float64", "float32"),
    # linear_token_logprobs
    "hidden wide": (ltl(f(3, 5), W, Y), E, "hidden, weight", "[3, 5]", "[7, 4]", "[..., H]"),
    "weight 3-d": (ltl(h(), W[None], Y), E, "weight", "2 dimensions"),
    "weight empty": (ltl(h(), W[:0], Y), E, "weight", "[0, 4]", "V >= 1"),
    "mixed dtypes": (ltl(h(), W.bfloat16(), Y), T, "weight", "bfloat16", "float32"),
    "bias shape": (ltl(h(), W, Y, bias=f(3)), E, "bias", "[3]", "[7]"),
    "bias dtype": (ltl(h(), W, Y, bias=f(V).half()), T, "bias", "float16", "float32"),
    "weight elsewhere": (ltl(h(), W.to("meta"), Y), E, "weight", "meta", "cpu"),
    "bias elsewhere": (ltl(h(), W, Y, bias=f(V).to("meta")), E, "bias", "meta", "cpu"),
    "targets elsewhere": (ltl(h(), W, Y.to("meta")), E, "targets", "meta", "cpu"),
    "linear target": (ltl(h(), W, Y + 5), E, "targets: got id 11", "vocabulary"),
    "NaN hidden": (ltl(h() * torch.nan, W, Y), vgkern.NonFiniteError, "hidden", "NaN at row [0]"),
    "linear cpu fp64": (
        ltl(h().double(), W.double(), Y, backend="cpu"), vgkern.BackendError, "float64"),
    "process group": (ltl(h(), W, Y, group=object()), NotImplementedError, "group"),
    # group_advantages
    "rewards 2-d": (adv(f(2, 2), Y), E, "rewards", "[2, 2]", "1 dimensions"),
    "rewards int": (adv(Y, Y), T, "rewards: got int64", "float32"),
    "groups shape": (adv(f(3), Y[:2]), E, "groups", "[2]", "[3]"),
    "groups float": (adv(f(3), f(3)), T, "groups: got float32", "int64"),
    "estimator": (adv(f(3), 0 * Y, estimator="gae"), E, "estimator", "gae", "rloo"),
    "group of one": (
        adv(f(3), torch.tensor([4, 9, 9])), E, "groups: got a group of one (id 4)", "2"),
    "reward NaN": (
        adv(torch.tensor([0, torch.nan, 1]), 0 * Y), vgkern.NonFiniteError, "rewards", "nan at 1"),
    "reward inf": (
        adv(torch.tensor([0, 1, torch.inf]), 0 * Y), vgkern.NonFiniteError, "rewards", "inf at 2"),
    # policy_loss
    "objective": (pol(LP, A, objective="nope"), E, "objective: got 'nope'", "grpo", "Objective"),
    "objective a number": (pol(LP, A, objective=3), E, "objective: got 3"),
    "advantages shape": (pol(LP, f(3)), E, "advantages", "[3]", "[2], [2, 1], [2, 3]"),
    "advantages chunked": (pol(LP, f(1, 3)), E, "advantages", "[1, 3]", "[2, 3]"),
    "advantages int": (pol(LP, A.long()), T, "advantages", "int64"),
    "advantages NaN": (pol(LP, A * torch.nan), vgkern.NonFiniteError, "advantages", "NaN"),
    "old_logp shape": (pol(LP, A, old_logp=f(3)), E, "old_logp", "[3]", "[2, 3]"),
    "mask shape": (pol(LP, A, mask=f(2)), E, "mask", "[2]", "[2, 3]"),
    "no reference": (
        pol(LP, A, objective=Objective(beta=0.1)), E, "ref_logp: got None", "beta > 0"),
    "no sampler": (
        pol(LP, A, objective=Objective(sampler_correction="token_mask")), E,
        "sampler_logp: got None", "token_mask"),
    "no entropy": (
        pol(LP, A, objective=Objective(entropy_coef=0.1)), E, "entropy: got None", "entropy_coef"),
    "entropy shape": (pol(LP, A, entropy=f(2)), E, "entropy", "[2]", "[2, 3]"),
    "entropy elsewhere": (
        pol(LP, A, objective=Objective(entropy_coef=0.1), entropy=f(2, 3).to("meta")), E,
        "entropy", "meta", "cpu"),
    "sampler elsewhere": (pol(LP, A, sampler_logp=LP.to("meta")), E, "sampler_logp", "meta", "cpu"),
    "old elsewhere": (pol(LP, A, old_logp=LP.to("meta")), E, "old_logp", "meta", "cpu"),
    "advantages elsewhere": (pol(LP, A.to("meta")), E, "advantages", "meta", "cpu"),
    "mask elsewhere": (pol(LP, A, mask=f(2, 3).to("meta")), E, "mask", "meta", "cpu"),
    "packed sequences": (pol(LP[0], f(3), objective="gspo"), E, "logp", "packed", "[B, T]"),
    "logp 3-d": (pol(f(2, 3, 4), A), E, "logp", "[2, 3, 4]", "[B, T]"),
    "normalizer": (pol(LP, A, normalizer=0), E, "normalizer", "0", "> 0"),
    "policy cpu fp64": (
        pol(LP.double(), A, backend="cpu"), vgkern.BackendError, "cpu", "float64", "float32"),
    # linear_policy_loss
    "advantages and rewards": (lpl(H23, W, Y23, A, rewards=A), E, "advantages, rewards: got both"),
    "neither": (lpl(H23, W, Y23), E, "advantages, rewards: got neither", "exactly one"),
    "rewards, no groups": (lpl(H23, W, Y23, rewards=A), E, "groups: got None", "int64"),
    "fused target": (lpl(H23, W, Y23 + 9, A), E, "targets: got id 9 at [0, 0]", "vocabulary"),
    "fused NaN": (lpl(H23 * torch.nan, W, Y23, A), vgkern.NonFiniteError, "hidden", "NaN"),
    "fused shape": (lpl(H23, W, Y, A), E, "targets", "[3]", "[2, 3]"),
    "fused cpu fp64": (
        lpl(H23.double(), W.double(), Y23, A, backend="cpu"), vgkern.BackendError, "float64"),
    "fused targets elsewhere": (lpl(H23, W, Y23.to("meta"), A), E, "targets", "meta", "cpu"),
    "fused temperature": (lpl(H23, W, Y23, A, temperature=-1), E, "temperature", "-1", "> 0"),
    "fused objective": (lpl(H23, W, Y23, A, objective="GRPO"), E, "objective: got 'GRPO'", "grpo"),
    # linear_sample
    "noise": (smp(h(), W, 3), T, "noise: got int 3", "vgkern.Noise"),
    "noise shape": (
        smp(h(), W, vgkern.Noise(0, torch.arange(2), torch.tensor(0))), E, "noise", "[2]", "[3]"),
    "top_k 0": (smp(h(), W, NOISE, top_k=0), E, "top_k: got int 0", ">= 1"),
    "top_k float": (smp(h(), W, NOISE, top_k=2.0), E, "top_k", "2.0", "int"),
    "top_p 0": (smp(h(), W, NOISE, top_p=0.0), E, "top_p", "0.0", "0 < top_p <= 1"),
    "top_p 1.1": (smp(h(), W, NOISE, top_p=1.1), E, "top_p", "1.1", "<= 1"),
    "top_p NaN": (smp(h(), W, NOISE, top_p=float("nan")), E, "top_p", "nan"),
    "min_p": (smp(h(), W, NOISE, min_p=-0.1), E, "min_p", "-0.1", "0 <= min_p"),
    "sample temperature": (smp(h(), W, NOISE, temperature=-1.0), E, "temperature", "-1.0"),
    "row temperature": (smp(h(), W, NOISE, temperature=-f(3)), E, "temperature", "-1", ">= 0"),
    "temperature shape": (smp(h(), W, NOISE, temperature=f(2)), E, "temperature", "[2]", "[3]"),
    "sample NaN": (
        smp(h() * torch.nan, W, NOISE), vgkern.NonFiniteError, "hidden", "NaN at row [0]"),
    "sample cpu fp64": (
        smp(h().double(), W.double(), NOISE, backend="cpu"), vgkern.BackendError, "float64"),
    # Objective
    "knob": (lambda: objectives.GRPO.replace(clip=0.1), E, "objective: no knob 'clip'", "clip_low"),
    "clip_low": (lambda: Objective(clip_low=1.5), E, "objective.clip_low: got 1.5", "<= 1"),
    "clip_high": (lambda: Objective(clip_high=-0.1), E, "objective.clip_high: got -0.1", ">= 0"),
    "beta": (lambda: Objective(beta=-1), E, "objective.beta: got -1", ">= 0"),
    "kl": (lambda: Objective(kl="k4"), E, "objective.kl: got 'k4'", "k1, k2, k3, k3_clamped, abs"),
    "reduction": (lambda: Objective(reduction="mean"), E, "objective.reduction", "token, seq"),
    "dual_clip": (lambda: Objective(dual_clip=0.5), E, "objective.dual_clip: got 0.5", "> 1"),
    "max_length": (lambda: Objective(max_length=0), E, "objective.max_length: got 0", "> 0"),
    "clip without ratio": (lambda: Objective(ratio="none"), E, "objective.ratio", "surrogate"),
    "clip NaN": (lambda: Objective(clip_high=float("nan")), E, "objective.clip_high: got nan"),
    "use_backend": (lambda: vgkern.use_backend("gpu").__enter__(), E, "backend: got 'gpu'", "cpu"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, error, *words = BAD[what]
    with pytest.raises(error) as e:
        call()
    for w in words:
        assert w in str(e.value), f"{w!r} is not in: {e.value}"


@pytest.mark.parametrize(
    "what", [w for w in BAD if w.startswith(("NaN", "fused NaN", "sample NaN", "target"))]
)
def test_bad_input_on_each_backend(what, backend):
    with vgkern.use_backend(backend):
        test_bad_input(what)


def test_nothing_is_checked_where_it_is_masked(backend):
    y = torch.tensor([[0, 2**62, -5], [1, -(2**63), V]])
    mask = torch.tensor([[1, 0, 0], [1, 0, 0]])
    a = torch.tensor([[1.0, torch.nan, 0], [1.0, 0, torch.inf]])
    out = vgkern.linear_policy_loss(H23, W, y, a, mask=mask, backend=backend)
    assert out.loss.isfinite()
    lp = vgkern.linear_token_logprobs(h(), W, torch.tensor([0, -100, 3]), backend=backend)
    assert lp.logp[1] == 0 and lp.entropy[1] == 0


SHAPES = [(0, V), (2, 0, V), (0, 0, V)]


@pytest.mark.parametrize("shape", SHAPES)
def test_empty_logits(shape, backend):
    z = torch.zeros(shape, requires_grad=True)
    y = torch.zeros(shape[:-1], dtype=torch.int64)
    out = vgkern.token_logprobs(z, y, backend=backend)
    assert out.logp.shape == y.shape
    (out.logp.sum() + out.entropy.sum()).backward()
    assert z.grad is not None and z.grad.shape == shape


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("name", list(objectives.PRESETS))
def test_empty_batch_is_a_connected_zero(shape, name, backend):
    x = torch.ones(*shape, H, requires_grad=True)
    w = W.clone().requires_grad_()
    y = torch.zeros(shape, dtype=torch.int64)
    out = vgkern.linear_policy_loss(x, w, y, f(shape[0]), objective=name, backend=backend)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert torch.equal(w.grad, torch.zeros_like(W)) and x.grad.shape == x.shape
    assert all(m.isfinite() for m in out.metrics.values()), out.metrics


@pytest.mark.parametrize("name", list(objectives.PRESETS))
def test_everything_masked_is_a_connected_zero(name, backend):
    x, w = H23.clone().requires_grad_(), W.clone().requires_grad_()
    b = f(V).requires_grad_()
    mask = torch.zeros(2, 3)
    out = vgkern.linear_policy_loss(
        x, w, Y23 - 7, A, bias=b, mask=mask, objective=name, backend=backend
    )
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    for t in (x, w, b):
        assert torch.equal(t.grad, torch.zeros_like(t))
    assert all(m.isfinite() for m in out.metrics.values()), out.metrics
    lp = LP.clone().requires_grad_()
    out = vgkern.policy_loss(lp, A, mask=mask, objective=name, backend=backend)
    out.loss.backward()
    assert float(out.loss.detach()) == 0 and torch.equal(lp.grad, torch.zeros_like(lp))


def test_empty_sample_and_groups(backend):
    none = torch.zeros(0, dtype=torch.int64)
    out = vgkern.linear_sample(h(0), W, vgkern.Noise(0, none, none), backend=backend)
    assert {t.shape for t in out} == {(0,)}
    for e in objectives.ESTIMATORS:
        assert vgkern.group_advantages(f(0), none, estimator=e, backend=backend).shape == (0,)


def test_objective_by_record_and_by_name_are_one(backend):
    a = vgkern.policy_loss(LP, A, objective="dapo", old_logp=LP - 0.3, backend=backend)
    b = vgkern.policy_loss(LP, A, objective=objectives.DAPO, old_logp=LP - 0.3, backend=backend)
    assert torch.equal(a.loss, b.loss)
