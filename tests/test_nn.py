"""Module twins: the function with their hyper-parameters, and nothing else."""

import pytest
import torch

import vgkern
from vgkern import nn


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 3, 8), torch.randn(11, 8), torch.randint(11, (2, 3))


def test_modules_call_their_function(inputs):
    h, w, y = inputs
    a = torch.randn(2)
    scaled = {"temperature": 0.7, "softcap": 3.0}
    o = vgkern.objectives.DAPO.replace(entropy_coef=0.1)
    lp = vgkern.linear_token_logprobs(h, w, y, **scaled)
    assert torch.equal(nn.LinearTokenLogprobs(**scaled)(h, w, y).logp, lp.logp)
    assert torch.equal(
        nn.TokenLogprobs(**scaled)(h @ w.T, y).entropy,
        vgkern.token_logprobs(h @ w.T, y, **scaled).entropy,
    )
    assert torch.equal(
        nn.PolicyLoss("gspo")(lp.logp, a).loss,
        vgkern.policy_loss(lp.logp, a, objective="gspo").loss,
    )
    module = nn.LinearPolicyLoss(o, **scaled)
    assert torch.equal(
        module(h, w, y, a).loss, vgkern.linear_policy_loss(h, w, y, a, objective=o, **scaled).loss
    )
    assert "temperature=0.7" in repr(module) and "entropy_coef=0.1" in repr(module)


def test_bad_settings_fail_when_the_module_is_made():
    with pytest.raises(ValueError, match="temperature: got float -1"):
        nn.TokenLogprobs(temperature=-1.0)
    with pytest.raises(ValueError, match="objective: got 'nope'"):
        nn.LinearPolicyLoss("nope")
