"""Replay agreement: 1 where sampler and trainer agree, and what makes it fall within one step."""

import dataclasses

import pytest
import torch
from test_train import TINY, trainer

import vgkern
from vgkern.costate import replay, replay_agreement
from vgkern.ops.noise import Noise
from vgkern.train import generate
from vgkern.train.device import LIMITS

N, H, V = 300, 16, 40


def case(seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) * 0.7
    noise = Noise(5, torch.arange(N), torch.arange(N) % 7)
    bias = torch.randn(V, generator=g)
    token = vgkern.linear_sample(hidden, weight, noise, bias=bias, **options).token
    return hidden, weight, token, noise, bias


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}, {"min_p": 0.05, "softcap": 4.0}],
)
def test_the_same_logits_and_noise_choose_the_same_token(options, backend):
    hidden, weight, token, noise, bias = case(**options)
    got = replay_agreement(hidden, weight, token, noise, bias=bias, backend=backend, **options)
    assert got >= 299 / N and got.shape == () and not got.requires_grad  # a backend may round a tie
    got = replay_agreement(hidden, weight, token, noise, bias=bias, check=True, **options)
    assert got == 1


def test_rows_have_their_own_temperature_and_shape():
    hidden, weight, _, noise, _ = case()
    t = torch.linspace(0.5, 2, N)
    token = vgkern.linear_sample(hidden, weight, noise, temperature=t).token
    shaped = Noise(noise.seed, noise.sequence.view(30, 10), noise.position.view(30, 10))
    where = (hidden.view(30, 10, H), weight, token.view(30, 10), shaped)
    assert replay_agreement(*where, temperature=t.view(30, 10), limit=50) == 1
    assert replay_agreement(*where) < 0.95


def test_masked_rows_are_not_looked_at_and_none_is_nan():
    hidden, weight, token, noise, bias = case()
    mask = torch.arange(N) % 3 > 0
    hidden[~mask], token[~mask] = torch.nan, -5
    assert replay_agreement(hidden, weight, token, noise, bias=bias, mask=mask) == 1
    none = replay_agreement(hidden, weight, token, noise, mask=torch.zeros(N))
    assert none.isnan() and none.shape == ()


def test_a_subset_is_spread_and_always_the_same():
    hidden, weight, token, noise, bias = case()
    token[: N // 2] = (token[: N // 2] + 1) % V
    some = [
        float(replay_agreement(hidden, weight, token, noise, bias=bias, limit=100))
        for _ in range(2)
    ]
    assert some[0] == some[1] and 0.35 < some[0] < 0.65
    assert replay_agreement(hidden, weight, token, noise, bias=bias) == 0.5


@pytest.mark.parametrize("sharp", [1.0, 6.0])  # chance agreement of about 0.2, and of about 0.9
def test_noise_of_other_tokens_is_refused(sharp):
    hidden, weight, _, noise, _ = case()
    hidden = hidden * sharp
    token = vgkern.linear_sample(hidden, weight, noise).token
    for other in (
        Noise(6, noise.sequence, noise.position),
        Noise(5, noise.sequence + 1, noise.position),
        Noise(5, noise.sequence, noise.position + 1),
    ):
        with pytest.raises(ValueError, match=r"noise: 0\.\d+ of 300 tokens .* noise of other"):
            replay_agreement(hidden, weight, token, other, check=True)
    assert replay_agreement(hidden, weight, token, noise, check=True) == 1


def test_a_small_fault_is_reported_and_not_refused():
    hidden, weight, token, noise, bias = case()
    got = replay_agreement(hidden, weight, token, noise, bias=bias, temperature=0.8, check=True)
    assert 0.5 < got < 0.99


@pytest.mark.parametrize("per_row", [False, True])
def test_greedy_tokens_say_nothing_about_noise(per_row):
    """Any noise chooses them again: they agree, and there is no chance to hold that against."""
    hidden, weight, token, noise, bias = case(temperature=0)
    cold = torch.zeros(N).index_fill(0, torch.arange(9), 1.0) if per_row else 0
    mask = torch.arange(N) > 8
    where = (hidden, weight, token, noise)
    assert replay_agreement(*where, bias=bias, temperature=cold, mask=mask) == 1
    with pytest.raises(ValueError, match=r"temperature: got .*; allowed: > 0 with check"):
        replay_agreement(*where, bias=bias, temperature=cold, mask=mask, check=True)
    if per_row:  # a row that is not looked at may be greedy
        warm = vgkern.linear_sample(hidden, weight, noise, bias=bias, temperature=cold).token
        where = (hidden, weight, warm, noise)
        got = replay_agreement(*where, bias=bias, temperature=cold, mask=~mask, check=True)
        assert got == 1


def test_bad_arguments_are_named():
    hidden, weight, token, noise, _ = case()
    with pytest.raises(TypeError, match=r"noise: got int 5; allowed: vgkern.Noise"):
        replay_agreement(hidden, weight, token, 5)
    with pytest.raises(ValueError, match=r"limit: got int 0; allowed: an int >= 1"):
        replay_agreement(hidden, weight, token, noise, limit=0)
    with pytest.raises(ValueError, match=r"tokens: got int64 tensor \[299\]"):
        replay_agreement(hidden, weight, token[1:], noise)
    with pytest.raises(ValueError, match=r"noise: got sequence \[299\]"):
        replay_agreement(hidden, weight, token, Noise(5, noise.sequence[1:], noise.position[1:]))


# One step of the trainer: about 2,000 tokens of the default batch, with an entropy of 2 nats


def made():
    one = trainer(prompts=32, group=8, task_options='{"min_length": 6, "max_length": 8}')
    with torch.no_grad():
        for name, weight in one.policy.named_parameters():
            residual = name.endswith(("out.weight", "down.weight"))
            weight *= 16 if name.startswith("embedding") else 8 if residual else 1
    return one


def step(one, monkeypatch, **options):
    """One step whose sampler was given `options` that the trainer does not know of."""
    real = vgkern.linear_sample

    def sampled(hidden, weight, noise, **given):
        if "dtype" in options:  # logits as a head in that precision gives them
            logits = (hidden.to(options["dtype"]) @ weight.to(options["dtype"]).T).float()
            return real(logits, torch.eye(logits.shape[-1]), noise, **given)
        return real(hidden, weight, noise, **{**given, **options})

    monkeypatch.setattr(generate.vgkern, "linear_sample", sampled)
    _, prompts, rollout = one.sample(1)
    monkeypatch.undo()
    rewards = torch.arange(256.0) % 3
    one.parts.replay = True
    metrics = one.gradient(one.batch(prompts, rollout, rewards), True)
    one.check_replay(metrics["replay"])
    return metrics["replay"]


def warned(one):
    return [line for line in one.log.lines if "chosen again by their own noise" in line]


def test_a_sampler_that_agrees(monkeypatch):
    one = made()
    assert step(one, monkeypatch) == 1 and not warned(one) and one.replay == 1


@pytest.mark.parametrize(
    "fault",
    [{"temperature": 0.95}, {"top_k": 10}, {"dtype": torch.bfloat16}],
    ids=["temperature", "top_k", "bf16_head"],
)
def test_a_wrong_sampler_shows_within_one_step(monkeypatch, fault):
    one = made()
    assert 0.5 < step(one, monkeypatch, **fault) < LIMITS["fp32"].replay_warn
    assert len(warned(one)) == 1
    step(one, monkeypatch, **fault)
    assert len(warned(one)) == 1  # said once


def test_a_stale_sampler_shows_within_one_step(monkeypatch):
    """The sampler missed one optimizer step."""
    one = made()
    _, prompts, rollout = one.sample(1)
    rewards = torch.arange(256.0) % 3
    batch = one.batch(prompts, rollout, rewards)
    for group in one.optimizer.param_groups:
        group["lr"] = 1e-3
    one.update(batch)
    assert not warned(one)
    one.parts.replay = True
    one.check_replay(one.gradient(batch, True)["replay"])
    assert 0.5 < one.replay < LIMITS["fp32"].replay_warn and len(warned(one)) == 1


def test_every_step_reports_it_unless_told_otherwise(monkeypatch):
    for every, want in ((1, [True] * 4), (3, [True, False, False, True]), (0, [False] * 4)):
        one = trainer(replay_every=every)
        monkeypatch.setattr(one, "score", lambda *_: torch.arange(16.0) % 3)
        steps = [one.step(index) for index in range(1, 5)]
        assert ["replay" in metrics for metrics in steps] == want
        assert all(metrics.get("replay", 1) == 1 for metrics in steps)


def test_a_large_vocabulary_is_sampled(monkeypatch):
    seen = {}

    def spy(hidden, weight, *rest, limit, **options):
        seen["limit"] = limit
        return torch.ones(())

    monkeypatch.setattr("vgkern.train.update.replay_agreement", spy)
    monkeypatch.setattr("vgkern.train.update.REPLAY_LOGITS", 48 * 100)
    one = trainer(micro_prompts=1)
    one.parts.replay = True
    _, prompts, rollout = one.sample(1)
    one.gradient(one.batch(prompts, rollout, torch.arange(16.0) % 3), True)
    assert seen["limit"] == 25 and replay.SIGMAS > 0


def test_micro_batches_report_the_mean(monkeypatch):
    one = made()
    one.config = dataclasses.replace(one.config, micro_prompts=5)
    assert step(one, monkeypatch, temperature=0.8) < 0.95
    assert TINY.replay_every == 1
