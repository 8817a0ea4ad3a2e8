"""What a score may be, what teaches nothing, and what a text that runs on or hangs is worth."""

import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import torch
from test_own_tasks import Pairs
from test_train import TINY, trainer

from vgkern.errors import ConfigError, TaskError
from vgkern.tasks import checked_score
from vgkern.train import Entry, train
from vgkern.train.generate import Rollout, score

NUMBERS = [1, True, -2.5, np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor(2.0)]


@pytest.mark.parametrize("x", NUMBERS, ids=repr)
def test_any_real_number_is_a_score(x):
    class One(Pairs):
        name = "one"

        def score(self, text, entry):
            return x

    assert checked_score(One(), "t", Entry("q", "a")) == (float(x), {}, False)


def test_parts_are_added_and_logged_and_none_teaches_nothing():
    made = trainer()
    entries, _, rollout = made.sample(1)

    def parts(text, entry, count=[0]):  # noqa: B006
        count[0] += 1
        return None if count[0] % 4 == 1 else {"right": count[0] % 3, "short": np.float64(0.25)}

    made.task.score = parts
    rollout = rollout._replace(finished=torch.ones(16, dtype=torch.bool))
    rewards = made.score(entries, rollout)
    assert rewards.isnan().tolist() == [i % 4 == 0 for i in range(16)]
    right = [i % 3 for i in range(1, 17) if i % 4 != 1]
    assert made.reward_parts == {"reward_right": sum(right) / 12, "reward_short": 0.25}
    with pytest.raises(TaskError, match="score returned"):
        made.task.score = lambda *_: {"a": math.nan}
        made.score(entries, rollout)


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_sample_that_teaches_nothing_is_as_if_it_had_not_been_drawn(objective, beta):
    """The gradient is that of the others alone, computed without any of the trainer's batching."""
    made = trainer(objective=objective, beta=beta)
    _, prompts, rollout = made.sample(1)
    rewards = torch.arange(16.0) % 3
    none = torch.tensor([2, 5, 6, 8, 9, 10, 15])  # of the third group one is left: it goes too
    rewards[none] = torch.nan
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the reference, where the KL has a gradient
        for p in made.policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    batch = made.batch(prompts, rollout, rewards)
    made.gradient(batch, True)
    got = [p.grad.clone() for p in made.policy.parameters()]
    alive = ~rewards.isnan()
    alive[11] = False
    total = [torch.zeros_like(g) for g in got]
    denominator = made.normalizer(rollout._replace(teaches=alive))
    ids = torch.arange(4).repeat_interleave(4)
    advantages = torch.zeros(16)
    advantages[alive] = made.advantages(rewards[alive], ids[alive])
    for row in alive.nonzero()[:, 0].tolist():
        one = torch.tensor([row])
        part = made.parts.config
        made.parts.config = dataclasses.replace(part, group=2)  # the trainer has no group of one
        made.optimizer.zero_grad()
        twice = rollout.select(one.repeat(2))
        loss = made.parts.loss([prompts[row // 4]], twice, advantages[one.repeat(2)],
                               2 * denominator, True).loss  # fmt: skip
        loss.backward()
        made.parts.config = part
        total = [t + p.grad for t, p in zip(total, made.policy.parameters(), strict=True)]
    if beta == 0.0:  # an analytic KL has a baseline over the group, which one row has not
        for g, t in zip(got, total, strict=True):
            torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-6)
    changed = rollout._replace(tokens=rollout.tokens.clone())
    changed.tokens[none] = (changed.tokens[none] + 1) % 40
    made.gradient(made.batch(prompts, changed, rewards), True)
    for g, p in zip(got, made.policy.parameters(), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)


def ran_on(task, texts, **how):
    rollout = Rollout(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2),
                      torch.tensor([True, False]))  # fmt: skip
    return [r.value for r in score(task, texts, [Entry("q", "a")], rollout, **how)]


def test_running_on_is_never_better_than_answering_wrongly():
    class Strict(Pairs):
        name = "strict"

        def score(self, text, entry):
            return 1.0 if text == entry.answer else -1.0

    class Kind(Strict):
        def score(self, text, entry):
            return float(len(text))

    assert ran_on(Strict(), ["b", "bbbb"]) == [-1.0, -1.0]
    assert ran_on(Strict(), ["a", "a"]) == [1.0, -1.0]  # right by chance, and still running
    assert ran_on(Kind(), ["aa", "aaaa"]) == [2.0, 0.0]
    assert ran_on(Strict(), ["a", "b"], cut_off="value", value=-3.0) == [1.0, -3.0]

    class Silent(Kind):
        def score(self, text, entry):
            return float(len(text)) if text else None

    assert ran_on(Silent(), ["aa", "aaaa"]) == [2.0, 0.0]
    masked = ran_on(Strict(), ["a", "b"], cut_off="mask")
    assert masked[0] == 1.0 and math.isnan(masked[1])


def test_a_reward_that_hangs_is_ended_counted_and_named():
    class Hangs(Pairs):
        name = "hangs"

        def score(self, text, entry):
            if text == "bomb":
                while True:
                    pass
            return 1.0 if text else -1.0

    before, alarm = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    assert checked_score(Hangs(), "bomb", Entry("q", "a"), 0.05) == (-1.0, {}, True)
    assert checked_score(Hangs(), "x", Entry("q", "a"), 0.05) == (1.0, {}, False)
    assert signal.getsignal(signal.SIGALRM) is before
    assert alarm - 1 < signal.getitimer(signal.ITIMER_REAL)[0] <= alarm + 1  # pytest's own
    made = trainer(score_seconds=0.05)
    made.task = Hangs()
    entries, _, rollout = made.sample(1)
    rollout = rollout._replace(finished=torch.ones(16, dtype=torch.bool))
    texts = iter(["x"] * 6 + ["bomb"] + ["x"] * 9)
    made.tokenizer.decode = lambda ids: next(texts)
    rewards = made.score(entries, rollout)
    assert rewards.tolist() == [1.0] * 6 + [-1.0] + [1.0] * 9 and made.reward_parts == {"late": 1}
    assert f"over 'bomb', question {entries[1].question!r}" in made.log.lines[0]


def test_cut_off_in_a_run(tmp_path):
    """Masked: what ran on is in no gradient; the share that taught is in the metrics."""
    knobs = {"cut_off": "mask", "out": str(tmp_path / "run")}
    out = train(dataclasses.replace(TINY, **knobs))
    records = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    assert all(r.get("taught", 1.0) == pytest.approx(1 - r["cut_off"]) for r in steps)
    assert any(r["cut_off"] > 0 for r in steps)
    with pytest.raises(ConfigError, match=r"cut_off_value: got -1.0, which does nothing under"):
        dataclasses.replace(TINY, cut_off_value=-1.0)
    with pytest.raises(ConfigError, match="cut_off: got 'zero'; allowed: 'score', 'value', 'mask'"):
        dataclasses.replace(TINY, cut_off="zero")
