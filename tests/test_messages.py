"""What is wrong is named by its cause, not by where it came out."""

import math
import warnings

import pytest
import torch

import vgkern
from vgkern import NonFiniteError, objectives
from vgkern.case_inputs import head

X, _, _ = head((2, 3), 8, 20, torch.float32, 0)
H, W, Y = X["hidden"], X["weight"], X["targets"]
A = torch.ones(2)
NOISE = vgkern.Noise(0, torch.arange(6).view(2, 3), torch.zeros((), dtype=torch.int64))


def scored(backend, hidden=H, weight=W, **k):
    return vgkern.linear_token_logprobs(hidden, weight, Y, backend=backend, **k)


def fused(backend, hidden=H, weight=W, **k):
    return vgkern.linear_policy_loss(hidden, weight, Y, A, objective="dapo", backend=backend, **k)


def sequences(backend, hidden=H, weight=W, **k):
    return vgkern.linear_policy_loss(hidden, weight, Y, A, objective="gspo", backend=backend, **k)


def sampled(backend, hidden=H, weight=W, **k):
    return vgkern.linear_sample(hidden, weight, NOISE, backend=backend, **k)


OPS = [scored, fused, sequences, sampled]


def changed(t, at, value):
    t = t.clone()
    t[at] = value
    return t


@pytest.mark.parametrize("op", OPS)
def test_a_temperature_that_leaves_fp32(op, backend):
    with pytest.raises(NonFiniteError, match=r"^temperature: got 1e-38; logits of size .* row \["):
        op(backend, temperature=1e-38)


def test_a_temperature_of_logits(backend):
    with pytest.raises(NonFiniteError, match=r"^temperature: got 1e-38; logits of size"):
        vgkern.token_logprobs(H @ W.T, Y, temperature=1e-38, backend=backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite(op, bad, backend):
    word = str(bad).replace("nan", "NaN")
    with pytest.raises(NonFiniteError, match=rf"^hidden: got {word} at row \[1, 2\]"):
        op(backend, hidden=changed(H, (1, 2, 3), bad))
    with pytest.raises(NonFiniteError, match=rf"^weight: got {word} at \[4, 5\]"):
        op(backend, weight=changed(W, (4, 5), bad))
    with pytest.raises(NonFiniteError, match=rf"^bias: got {word} at \[7\]; allowed: .* -inf for"):
        op(backend, bias=changed(torch.zeros(20), 7, bad))


def test_a_head_that_blocks_every_id(backend):
    with pytest.raises(NonFiniteError, match=r"^bias: got -inf for every id"):
        sampled(backend, bias=torch.full((20,), -math.inf))


def test_logits_that_are_not_finite(backend):
    z = changed(H @ W.T, (1, 0, 3), math.inf)
    with pytest.raises(NonFiniteError, match=r"^logits: got inf at row \[1, 0\]; .* blocked"):
        vgkern.token_logprobs(z, Y, backend=backend)


def test_a_masked_row_is_not_blamed(backend):
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = False
    h = changed(changed(H, (0, 1, 0), math.nan), (1, 1, 0), math.nan)
    for op in (fused, sequences):
        with pytest.raises(NonFiniteError, match=r"^hidden: got NaN at row \[1, 1\]"):
            op(backend, hidden=h, mask=mask)


def test_padding_without_a_mask(backend):
    y = changed(Y, (1, 2), -100)
    with pytest.raises(ValueError, match=r"id -100 at \[1, 2\]; .*mask=targets != -100"):
        vgkern.linear_policy_loss(H, W, y, A, objective="dapo", backend=backend)
    vgkern.linear_policy_loss(H, W, y, A, objective="dapo", mask=y != -100, backend=backend)
    with pytest.raises(ValueError, match=r"id 20 at \[1, 2\]; allowed: 0 <= id < 20 \(vocab"):
        vgkern.linear_policy_loss(
            H, W, changed(Y, (1, 2), 20), A, objective="dapo", backend=backend
        )


def test_a_sample_without_a_group(backend):
    with pytest.raises(ValueError, match=r"^groups: got a group of one \(id 7\); .*estimator="):
        vgkern.group_advantages(torch.ones(3), torch.tensor([5, 5, 7]), backend=backend)
    vgkern.group_advantages(
        torch.ones(3), torch.tensor([5, 5, 7]), estimator="grpo_verl", backend=backend
    )


@pytest.mark.parametrize("correction", objectives.CORRECTIONS)
def test_a_token_that_its_sampler_could_not_draw(correction, backend):
    """The gap is infinite, not 1e15, and the weight what the correction makes of infinity."""
    lp = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    sampler = changed(lp, (0, 1), -math.inf)
    o = objectives.BNPO.replace(sampler_correction=correction)
    with pytest.warns(UserWarning, match=r"^sampler_logp: got -inf at \[0, 1\]"):
        out = vgkern.policy_loss(
            lp, torch.ones(2), objective=o, sampler_logp=sampler, backend=backend
        )
    assert out.metrics["sampler_gap"] == math.inf
    own = {"none": 1.0, "token_truncate": 3.0, "token_mask": 0.0}
    if correction in own:
        assert abs(float(out.loss) + (5 + own[correction]) / 6) < 1e-6
    else:  # the whole first sequence
        first = 3.0 if correction == "sequence_truncate" else 0.0
        assert abs(float(out.loss) + (3 + 3 * first) / 6) < 1e-6


def test_two_that_cannot_be_drawn_agree(backend):
    lp = torch.tensor([[-1.0, -math.inf]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = vgkern.policy_loss(
            lp, torch.ones(1), objective="dapo", sampler_logp=lp.clone(), backend=backend
        )
    assert out.metrics["sampler_gap"] == 0


def test_a_token_that_the_old_policy_could_not_draw(backend):
    """exp(20) where A < 0, in the loss curve alone: no gradient, counted, bounded by dual_clip."""
    lp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -math.inf]])
    given = {"old_logp": old, "backend": backend}
    out = vgkern.policy_loss(lp, -torch.ones(1), objective="dapo", **given)
    assert abs(float(out.loss.detach()) / (math.exp(20) / 2) - 1) < 1e-3
    assert float(torch.autograd.grad(out.loss, lp)[0][0, 1]) == 0
    assert out.metrics["clamped"] == 1
    out = vgkern.policy_loss(lp, -torch.ones(1), objective="ppo", **given)
    assert abs(float(out.loss.detach()) - 2.0) < 1e-6
    up = vgkern.policy_loss(lp, torch.ones(1), objective="dapo", **given)
    assert abs(float(up.loss.detach()) + (1 + 1.28) / 2) < 1e-6
