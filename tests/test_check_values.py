"""VGKERN_CHECK=1: values are looked at on every device. A GPU is stood in for by CPU tensors that
the checks take for tensors whose values cost a host sync."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vgkern
from vgkern.ops import _check

NAN, V, H = float("nan"), 7, 4
W = torch.arange(V * H, dtype=torch.float32).reshape(V, H) / 10
HIDDEN, Y = torch.ones(2, 3, H), torch.tensor([[0, 1, 6], [2, 3, 4]])
LP, A = -torch.ones(2, 3), torch.tensor([1.0, -1.0])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
NOISE = vgkern.Noise(0, torch.arange(2)[:, None], torch.arange(3))


def spoilt(x, at, value):
    out = x.clone()
    out[at] = value
    return out


def loss(hidden=HIDDEN, targets=Y, advantages=A, **k):
    return vgkern.linear_policy_loss(hidden, W, targets, advantages, backend="torch", **k)


def policy(logp=LP, advantages=A, **k):
    return vgkern.policy_loss(logp, advantages, backend="torch", **k)


def divergence(**k):
    return vgkern.linear_divergence(HIDDEN, W, HIDDEN, W, backend="torch", **k)


def costate(value):
    c = vgkern.Costate(value, W, relaxation="expected")
    return loss(costate=c, mask=MASK)


AT = (0, 1)  # counts; (0, 2) is masked
BAD = {
    "target too large": (lambda at: loss(targets=spoilt(Y, at, V), mask=MASK), "targets"),
    "target negative": (
        lambda at: vgkern.linear_token_logprobs(
            HIDDEN, W, spoilt(Y, at, -1).masked_fill(MASK == 0, -100), backend="torch"),
        "targets"),
    "targets of logits": (
        lambda at: vgkern.token_logprobs(
            HIDDEN @ W.T, spoilt(Y, at, V).masked_fill(MASK == 0, -100), backend="torch"),
        "targets"),
    "tokens": (
        lambda at: vgkern.noisy_embedding(
            HIDDEN[:, :2], W, W, spoilt(Y[:, :2], at, V) if at == AT else Y[:, :2],
            relaxation="expected", backend="torch"),
        "tokens"),
    "advantages": (
        lambda at: policy(advantages=spoilt(A[:, None].repeat(1, 3), at, NAN), mask=MASK),
        "advantages"),
    "old_logp": (lambda at: policy(old_logp=spoilt(LP, at, NAN), mask=MASK), "old_logp"),
    "ref_logp": (lambda at: loss(ref_logp=spoilt(LP, at, NAN), mask=MASK), "ref_logp"),
    "sampler_logp": (
        lambda at: loss(sampler_logp=spoilt(LP, at, NAN), mask=MASK), "sampler_logp"),
    "logp": (lambda at: policy(spoilt(LP, at, NAN), mask=MASK), "logp"),
    "entropy": (lambda at: policy(entropy=spoilt(-LP, at, NAN), mask=MASK), "entropy"),
    "hidden": (lambda at: loss(spoilt(HIDDEN, at, NAN), mask=MASK), "hidden"),
    "hidden of a divergence": (
        lambda at: vgkern.linear_divergence(
            spoilt(HIDDEN, at, NAN), W, HIDDEN, W, mask=MASK, backend="torch"),
        "hidden"),
    "costate": (
        lambda at: costate(spoilt(torch.ones(2, 3, H), at, NAN)), "costate.value"),
}  # fmt: skip
MASKS = {
    "linear_policy_loss": lambda m: loss(mask=m),
    "policy_loss": lambda m: policy(mask=m),
    "linear_divergence": lambda m: divergence(mask=m),
}
REWARDS = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0, 0, 1, 1])


@pytest.fixture
def gpu(monkeypatch):
    """Looking at a value costs a sync here, and VGKERN_CHECK is as the test says."""
    monkeypatch.setattr(_check, "_costs_nothing", lambda device: False)
    monkeypatch.delenv("VGKERN_CHECK", raising=False)
    return lambda value="1": monkeypatch.setenv("VGKERN_CHECK", value)


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_value_is_refused_where_it_counts(name, gpu):
    call, argument = BAD[name]
    call(AT)  # unasked: no exception
    gpu()
    with pytest.raises(ValueError, match=rf"^{argument}\b.*(got|is NaN)"):
        call(AT)
    call((0, 2))
    gpu("0")
    call(AT)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("wrong", [0.5, 2.0, -1.0, NAN])
def test_a_mask_is_0_or_1(name, wrong, gpu):
    call = MASKS[name]
    call(spoilt(MASK.float(), AT, wrong))
    gpu()
    with pytest.raises(ValueError, match=rf"mask: got {wrong} at \[0, 1\]; allowed: 0 or 1"):
        call(spoilt(MASK.float(), AT, wrong))
    for right in (MASK, MASK.bool(), MASK.float()):
        call(right)


def test_rewards_and_noise(gpu):
    rewards, groups = REWARDS

    def advantages(r, g):
        return vgkern.group_advantages(r, g, backend="torch")

    advantages(spoilt(rewards, 1, NAN), groups)
    gpu()
    with pytest.raises(vgkern.NonFiniteError, match="rewards: got nan at 1"):
        advantages(spoilt(rewards, 1, NAN), groups)
    with pytest.raises(ValueError, match="groups: got a group of one"):
        advantages(rewards, spoilt(groups, 3, 5))
    with pytest.raises(ValueError, match=r"noise\.sequence"):
        vgkern.Noise(0, torch.tensor([-1]), torch.tensor([0]))
    advantages(rewards, groups)


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


def test_unasked_nothing_waits_for_a_value(gpu):
    noise = vgkern.Noise(0, torch.arange(2)[:, None], torch.arange(3))
    calls = [
        *[lambda c=c: c((0, 2)) for c, _ in BAD.values()],
        *[lambda c=c: c(MASK.float()) for c in MASKS.values()],
        lambda: vgkern.linear_sample(HIDDEN, W, noise, backend="torch"),
    ]
    with NoSync():
        for call in calls:
            call()
    gpu()
    with pytest.raises(AssertionError, match=r"_local_scalar_dense|is_nonzero"), NoSync():
        calls[0]()


def test_where_nothing_can_be_looked_at(gpu, monkeypatch):
    gpu()
    assert _check.can_look(torch.device("cuda")) and _check.can_look(torch.device("cpu"))
    assert not _check.can_look(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _check.can_look(torch.device("cuda"))


def test_a_traced_graph_has_no_values(gpu):
    gpu()

    @torch.compile(fullgraph=True, backend="eager")
    def step(logp, old, mask):
        return vgkern.policy_loss(logp, A, old_logp=old, mask=mask, backend="torch").loss

    assert step(LP, spoilt(LP, AT, NAN), MASK.float() / 2).isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_on_a_gpu(backend, monkeypatch):
    monkeypatch.delenv("VGKERN_CHECK", raising=False)
    h, w, y = HIDDEN.cuda(), W.cuda(), spoilt(Y, AT, V).cuda()
    assert vgkern.linear_token_logprobs(h, w, y, backend=backend).logp[AT].isnan()
    monkeypatch.setenv("VGKERN_CHECK", "1")
    with pytest.raises(ValueError, match=r"targets: got id 7 at \[0, 1\]"):
        vgkern.linear_token_logprobs(h, w, y, backend=backend)
