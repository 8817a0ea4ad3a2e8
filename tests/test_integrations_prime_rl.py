"""prime-rl: the loss by import path, against its documented PPO loss.

prime-rl is not on the package index, so a stand-in has its public records and its loop over
sequences (docs/algorithms.md and trainer/rl/loss.py of the project): nothing here runs prime-rl.
"""

import dataclasses
import importlib
import sys
import types
from typing import Any

import pytest
import torch

from vgkern.integrations import IntegrationError, prime_rl


@dataclasses.dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclasses.dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def documented_ppo(inputs: Any, clip_eps: float = 0.2) -> LossOutputs:
    ratio = torch.exp(inputs.trainer_logprobs - inputs.inference_logprobs)
    clipped = torch.clamp(ratio, 1 - clip_eps, 1 + clip_eps)
    per_token = -torch.min(ratio * inputs.advantages, clipped * inputs.advantages)
    if inputs.loss_weights is not None:
        per_token = per_token * inputs.loss_weights
    share = (ratio != clipped)[inputs.loss_mask].float().sum()
    return LossOutputs(per_token[inputs.loss_mask].sum(), {"clip_frac": share})


def compute_loss(config: dict[str, Any], sequences: list[Any], loss_scale: int) -> torch.Tensor:
    """As the trainer does: import by path, call once per sequence, add up, divide."""
    module, _, name = config["import_path"].rpartition(".")
    function = getattr(importlib.import_module(module), name)
    total, metrics = 0.0, {}
    for inputs in sequences:
        out = function(inputs, **config["kwargs"])
        total = total + out.loss
        for k, v in out.metrics.items():
            metrics.setdefault(k, []).append(v)
    assert all(torch.stack(v).isfinite().all() for v in metrics.values())
    return total / loss_scale


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    module = types.ModuleType(prime_rl.MODULE)
    module.LossInputs, module.LossOutputs = LossInputs, LossOutputs
    module.documented_ppo = documented_ppo
    parts = prime_rl.MODULE.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType("stand_in"))
    monkeypatch.setitem(sys.modules, prime_rl.MODULE, module)
    prime_rl._checked.clear()
    yield module
    prime_rl._checked.clear()


def sequences(weighted: bool = False, ref: bool = False) -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for n in (7, 1, 4):
        logp = torch.randn(n, generator=draw).sub(3).requires_grad_()
        mask = torch.arange(n) != 2
        mask[:] = mask if n != 4 else False  # a sequence with nothing to train on
        made.append(
            LossInputs(
                logp,
                logp.detach() + 0.4 * torch.randn(n, generator=draw),
                torch.randn(n, generator=draw) - 3 if ref else None,
                torch.randn(n, generator=draw),
                mask,
                torch.rand(n, generator=draw) if weighted else None,
            )
        )
    return made


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_those_of_the_documented_loss(weighted):
    results = []
    for config in (
        {"import_path": f"{prime_rl.MODULE}.documented_ppo", "kwargs": {"clip_eps": 0.15}},
        {
            "import_path": "vgkern.integrations.prime_rl.loss",
            "kwargs": {"objective": "grpo", "clip_low": 0.15, "clip_high": 0.15},
        },
    ):
        batch = sequences(weighted)
        loss = compute_loss(config, batch, 9)
        loss.backward()
        results.append([loss.detach(), *(s.trainer_logprobs.grad for s in batch)])
    assert results[0][1].abs().max() > 0.01
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def test_reference_is_the_kl_of_beta():
    one = sequences(ref=True)[0]
    out = prime_rl.loss(one, "reinforce", beta=0.5)
    lp, m = one.trainer_logprobs, one.loss_mask
    gap = one.ref_logprobs - lp
    expected = (-one.advantages * lp + 0.5 * (gap.exp() - gap - 1))[m].sum()
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)


def test_a_sequence_level_objective():
    one = sequences()[0]
    out = prime_rl.loss(one, "gspo", clip_low=9e-1, clip_high=9.0)
    m = one.loss_mask
    ratio = (one.trainer_logprobs - one.inference_logprobs)[m].mean().exp()
    expected = -(ratio * one.advantages[m]).sum()
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)


def test_loss_weights_multiply_the_kl_term_too():
    one = sequences(weighted=True, ref=True)[0]
    m, lp = one.loss_mask, one.trainer_logprobs
    e = one.ref_logprobs - lp
    ratio = (lp - one.inference_logprobs).exp()
    expected = (one.loss_weights * (-ratio * one.advantages + 0.1 * (e.exp() - e - 1)))[m].sum()
    out = prime_rl.loss(one, "grpo", beta=0.1, clip_low=0.9, clip_high=9.0)
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)
    one.loss_weights = -one.loss_weights
    with pytest.raises(ValueError, match="loss_weights: got a negative weight"):
        prime_rl.loss(one, "grpo", beta=0.1)


@pytest.mark.parametrize(
    "given, knobs, words",
    [
        ({}, {"reduction": "seq"}, "reduction: got 'seq'"),
        ({}, {"entropy_coef": 0.1}, "entropy_coef 0.1"),
        ({}, {"objective": "nothing"}, "objective: got 'nothing'"),
    ],
)
def test_what_it_cannot_do_is_refused(given, knobs, words):
    with pytest.raises(ValueError, match=words):
        prime_rl.loss(sequences(**given)[0], **knobs)


def test_a_changed_prime_rl_is_refused(stand_in):
    @dataclasses.dataclass
    class Renamed:
        policy_logprobs: Any = None
        advantages: Any = None
        loss_mask: Any = None

    @dataclasses.dataclass
    class More(LossInputs):
        token_weights: Any = None

    @dataclasses.dataclass
    class Bare:
        loss: Any

    for changed, words in ((Renamed(), "trainer_logprobs"), (More(*[None] * 5), "token_weights")):
        with pytest.raises(IntegrationError, match=words):
            prime_rl.loss(changed)
    stand_in.LossOutputs = Bare
    with pytest.raises(IntegrationError, match="fields of LossOutputs"):
        prime_rl.loss(sequences()[0])


def test_without_prime_rl_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, prime_rl.MODULE, None)
    with pytest.raises(IntegrationError, match="cannot be imported"):
        prime_rl.loss(sequences()[0])
