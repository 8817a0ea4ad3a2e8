"""The trainer: exact savings, honest gradients, and what happens when something goes wrong."""

import dataclasses
import json
import math
import random
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vgkern
from vgkern.__main__ import main
from vgkern.errors import CheckpointError, ConfigError, TaskError, TrainingError
from vgkern.objectives import PRESETS
from vgkern.tasks import Entry, make_task
from vgkern.train import run
from vgkern.train.checkpoint import load_policy, new_policy, save_checkpoint
from vgkern.train.config import Config
from vgkern.train.generate import Rollout, decode, score
from vgkern.train.trainer import SKIPS, Trainer
from vgkern.train.warmstart import demonstrate, supervised_loss

TINY = Config(
    width=32, layers=1, heads=2, mlp=48, prompts=4, group=4, steps=3, eval_every=2, eval_prompts=8,
    warm_target=0.0, task_options='{"min_length": 2, "max_length": 4}', lr=1e-3,
)  # fmt: skip


class Lines:
    """A log that only remembers."""

    def __init__(self):
        self.lines, self.folder = [], Path(tempfile.mkdtemp())

    def line(self, text):
        self.lines.append(text)


def trainer(**settings) -> Trainer:
    made, _, _ = run.build(dataclasses.replace(TINY, **settings))
    made.log = Lines()
    return made


def batch(made):
    """Prompts, a real rollout, and rewards where group 1 agrees and all others do not."""
    _, prompts, rollout = made.sample(1)
    rewards = torch.arange(16.0) % 3
    rewards[4:8] = 1.0
    return prompts, rollout, rewards


def weights(made):
    return torch.cat([p.detach().flatten().clone() for p in made.policy.parameters()])


def gradient(made):
    return torch.cat([p.grad.flatten() for p in made.policy.parameters()])


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo"])
def test_dropping_agreeing_groups_changes_nothing(objective):
    made = trainer(objective=objective)
    prompts, rollout, rewards = batch(made)
    kept = made.batch(prompts, rollout, rewards)
    assert len(kept.prompts) == 3 and len(kept.advantages) == 12
    made.gradient(kept, True)
    got = gradient(made)
    advantages = vgkern.group_advantages(
        rewards, torch.arange(4).repeat_interleave(4), estimator=made.objective.advantage
    )
    everything = dataclasses.replace(kept, prompts=prompts, rollout=rollout, advantages=advantages)
    made.gradient(everything, True)
    assert (got - gradient(made)).norm() < 1e-5 * got.norm() != 0


@pytest.mark.parametrize("objective", PRESETS)
def test_micro_batches_give_the_same_gradient(objective):
    """1, 2, 4 and 8 of them, off policy: on policy a ratio is 1 whatever a batch does to it."""
    made = trainer(objective=objective, prompts=8)
    _, prompts, rollout = made.sample(1)
    whole = made.batch(prompts, rollout, torch.arange(32.0) % 5)
    moved = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=moved))
    metrics = made.gradient(whole, False)
    want = gradient(made)
    assert want.norm() > 0
    for size in (1, 2, 4):
        made.config = dataclasses.replace(made.config, micro_prompts=size)
        parts = made.gradient(whole, False)
        assert (gradient(made) - want).norm() < 1e-6 * want.norm()
        assert parts["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
        assert parts["entropy"] == pytest.approx(metrics["entropy"], rel=1e-5)
        assert parts["tokens"] == metrics["tokens"]


def test_the_gradient_is_the_formula():
    """Against autograd through a plain log-softmax: -sum A logp / (R * length) per row."""
    made = trainer()
    prompts, rollout, rewards = batch(made)
    whole = made.batch(prompts, rollout, rewards)
    made.gradient(whole, True)
    got = gradient(made)
    hidden = made.policy.hidden(prompts, rollout.tokens, 4, rollout.lengths, shared=False)
    head = made.policy.head()
    logp = (hidden @ head.weight.T + head.bias).log_softmax(-1)
    logp = logp.gather(2, rollout.tokens[..., None])[..., 0]
    grouped = rewards.view(4, 4)
    centred = grouped - grouped.mean(1, keepdim=True)
    advantages = (centred / (grouped.std(1, keepdim=True) + 1e-4)).view(16, 1)
    rows = (logp * advantages * rollout.mask).sum(1) / rollout.lengths
    made.optimizer.zero_grad()
    (-rows.sum() / 16).backward()
    assert (got - gradient(made)).norm() < 1e-5 * got.norm()


def test_the_stop_token_is_trained():
    """A reward for short answers must make the stop more likely: it carries a gradient."""
    made = trainer(objective="dr_grpo")
    prompts = [[5, 6]]
    tokens = torch.tensor([[1, 0], [7, 8], [7, 8], [7, 8]])
    rollout = Rollout(
        tokens, torch.zeros(4, 2), torch.tensor([1, 2, 2, 2]), torch.tensor([True] + 3 * [False])
    )
    assert rollout.mask[0].tolist() == [True, False]
    made.gradient(made.batch(prompts, rollout, torch.tensor([1.0, 0, 0, 0])), True)
    head, hidden = made.policy.head(), made.policy.prefill(prompts, 1, 1)[1]
    before = (hidden @ head.weight.T + head.bias).log_softmax(-1)[0, 1]
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter -= 0.1 * parameter.grad
    hidden = made.policy.prefill(prompts, 1, 1)[1]
    after = (hidden @ head.weight.T + head.bias).log_softmax(-1)[0, 1]
    assert after > before


def test_an_answer_without_a_stop_is_never_right():
    task = make_task("sort", {}, 0)
    entry, policy_tokenizer = Entry("21=", "12"), new_policy(TINY)[1]
    ids = policy_tokenizer.encode("12")
    rollout = Rollout(
        torch.tensor([[*ids, 1], [*ids, 0]]), torch.zeros(2, 3), torch.tensor([3, 2]),
        torch.tensor([True, False]),
    )  # fmt: skip
    texts = decode(rollout, policy_tokenizer)
    given = score(task, texts, [entry], rollout)
    assert texts == ["12", "12"] and [reward.value for reward in given] == [1.0, 0.0]


def test_a_step_that_is_not_finite_never_reaches_the_weights(monkeypatch):
    made = trainer(warm_target=0.0)
    monkeypatch.setattr(made, "score", lambda entries, rollout: torch.arange(16.0) % 3)
    made.step(1)
    start, hidden = weights(made), made.policy.hidden
    made.policy.hidden = lambda *where: hidden(*where) * math.nan
    for _ in range(SKIPS - 1):
        assert math.isnan(made.step(2)["loss"])
    made.policy.hidden = hidden
    assert torch.equal(weights(made), start) and made.skipped == SKIPS - 1
    made.step(3)
    assert made.skipped_in_a_row == 0 and not torch.equal(weights(made), start)
    good = weights(made)
    made.policy.hidden = lambda *where: hidden(*where) + 1e30  # finite loss or not, grad is not
    with pytest.raises(TrainingError, match=f"{SKIPS} steps in a row"):
        for step in range(10):
            made.step(step)
    assert torch.equal(weights(made), good)


def test_a_sampler_that_disagrees_stops_the_run(monkeypatch):
    made = trainer()
    monkeypatch.setattr(made, "score", lambda entries, rollout: torch.arange(16.0) % 3)
    assert made.step(1)["sampler_gap"] < 1e-5
    head = made.policy.head()
    off = head.bias.clone()
    off[2:22] += 1e-3
    prompts, rollout, rewards = batch(made)
    made.policy.head = lambda: head._replace(bias=off)
    made.update(made.batch(prompts, rollout, rewards))
    assert [line for line in made.log.lines if line.startswith("warning: sampler and trainer")]
    off[2:22] += 1
    before = weights(made)
    with pytest.raises(TrainingError, match="sampler and trainer disagree"):
        made.update(made.batch(prompts, rollout, rewards))
    assert torch.equal(weights(made), before)


def test_several_updates_clip_against_the_sampler():
    made = trainer(updates_per_batch=3, lr=3e-2, lr_warmup=0)
    whole = made.batch(*batch(made))
    ratios = []
    original = made.gradient
    made.gradient = lambda b, first_pass: ratios.append(original(b, first_pass)) or ratios[-1]
    made.update(whole)
    assert ratios[0]["ratio_max"] == 1 and ratios[2]["ratio_max"] > 1.2
    assert ratios[2]["clip_low"] + ratios[2]["clip_high"] > 0


def test_kl_is_zero_at_the_start_and_pulls_back():
    made = trainer(beta=1.0)
    prompts, rollout, rewards = batch(made)
    whole = made.batch(prompts, rollout, rewards)
    assert len(whole.prompts) == 4  # an agreeing group still has a KL gradient
    assert made.gradient(whole, True)["kl"] == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter *= 1.2
    whole.advantages.zero_()
    far = made.gradient(whole, True)["kl"]
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter -= 0.02 * parameter.grad
    assert 0 < made.gradient(whole, True)["kl"] < far


def test_learning_rate_warms_up_and_falls():
    made = trainer(lr=1.0, lr_warmup=10, steps=110, lr_final=0.1)
    rates = [made.learning_rate(step) for step in (1, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 0.55, 0.1])


def test_evaluation_splits_never_meet():
    made, validation, warm = run.build(dataclasses.replace(TINY, eval_prompts=64))
    held = {entry.question for entry in made.held_out}
    checks = {entry.question for entry in validation}
    taken = {entry.question for entry in made.stream.take(2000) + warm.take(2000)}
    assert len(held) == 64 and len(checks) == run.VALIDATION
    assert not held & checks and not taken & (held | checks)


def test_supervised_loss_is_the_mean_over_answer_tokens():
    policy, tokenizer = new_policy(TINY)
    pairs = [("21=", "12"), ("4321=", "1234")]
    total, count = 0.0, 0
    for question, answer in pairs:
        ids = [*tokenizer.encode(question + answer), 1]
        hidden = policy.hidden([ids[:1]], torch.tensor([ids[1:]]), 1, torch.tensor([len(ids) - 1]))
        head = policy.head()
        logp = (hidden[0] @ head.weight.T + head.bias).log_softmax(-1)
        answers = torch.arange(len(question) - 1, len(ids) - 1)
        total -= float(logp[answers, torch.tensor(ids)[answers + 1]].sum().detach())
        count += len(answers)
    loss = float(supervised_loss(policy, tokenizer, pairs).detach())
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_demonstrations_are_wrong_as_often_as_asked():
    task, rng = make_task("sort", {}, 0), random.Random(0)
    entry = task[0]
    wrong = sum(demonstrate(task, entry, 0.65, rng) != entry.answer for _ in range(2000))
    assert 1200 < wrong < 1400


# Whole runs


def artefacts(out):
    return sorted(path.name for path in out.iterdir())


def test_a_run_leaves_everything_and_repeats_exactly(tmp_path, capsys):
    one = run.train(dataclasses.replace(TINY, out=str(tmp_path / "one")))
    two = run.train(dataclasses.replace(TINY, out=str(tmp_path / "two")))
    written = {"config.json", "final", "metrics.jsonl", "samples.txt", "summary.txt"}
    assert set(artefacts(one)) >= written
    assert artefacts(one / "final") == ["config.json", "model.safetensors", "tokenizer.json"]
    a, b = (load_file(out / "final" / "model.safetensors") for out in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)
    records = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 2, 3]
    assert json.loads((one / "config.json").read_text())["width"] == 32
    shown = capsys.readouterr().out
    assert "before and after RL" in shown and str(one / "final") in shown
    assert "default 128" in shown  # the configuration, with what was changed


def test_the_warm_start_stops_at_what_it_measures(tmp_path):
    settings = dict(
        out=str(tmp_path / "run"), task_options='{"min_length": 1, "max_length": 4}', steps=1,
        warm_target=0.05, warm_wrong=0.0, warm_batch=64,
    )  # fmt: skip
    out = run.train(dataclasses.replace(TINY, **settings))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    checks = [r["pass_1"] for r in records if r["kind"] == "warm"]
    assert checks[-1] >= 0.05 and all(check < 0.05 for check in checks[:-1])
    assert (out / "start" / "model.safetensors").exists()


def test_training_goes_on_from_a_checkpoint(tmp_path):
    first = run.train(dataclasses.replace(TINY, out=str(tmp_path / "one")))
    again = run.train(
        dataclasses.replace(TINY, out=str(tmp_path / "two"), model=str(first / "final"), steps=0)
    )
    a, b = (load_file(out / "final" / "model.safetensors") for out in (first, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_with_another_run_is_refused(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("mine")
    assert main(["train", "--out", str(tmp_path), "--steps", "1"]) == 2
    assert f"out: {tmp_path} holds another run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "mine" and artefacts(tmp_path) == [
        "metrics.jsonl"
    ]


@pytest.mark.parametrize(
    "settings", [{"task": "srot"}, {"objective": "gropo"}, {"model": "."}, {"width": 33}]
)
def test_what_fails_at_the_start_leaves_nothing(tmp_path, settings):
    out = tmp_path / "run"
    with pytest.raises((ConfigError, CheckpointError)):
        run.train(dataclasses.replace(TINY, out=str(out), **settings))
    assert not out.exists()


def test_a_task_that_breaks_stops_the_run_with_whole_lines(tmp_path, monkeypatch):
    made = run.make_task

    def breaking(*arguments):
        task = made(*arguments)
        task.score = lambda text, entry: math.nan
        return task

    monkeypatch.setattr(run, "make_task", breaking)
    monkeypatch.setattr("vgkern.train.generate.score", score)
    out = tmp_path / "run"
    with pytest.raises(TaskError, match=r"score returned nan; allowed: a float within"):
        run.train(dataclasses.replace(TINY, out=str(out), context=16))
    assert not (out / "final").exists()
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_checkpoints_are_whole_or_absent(tmp_path, monkeypatch):
    policy, tokenizer = new_policy(TINY)
    save_checkpoint(policy, tokenizer, tmp_path / "a")
    loaded, characters = load_policy(str(tmp_path / "a"))
    assert characters.encode("12=") == tokenizer.encode("12=")
    for one, two in zip(policy.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(policy.head().bias, loaded.head().bias)
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(policy, tokenizer, tmp_path / "a")
    monkeypatch.setattr(tokenizer, "save", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(policy, tokenizer, tmp_path / "b")
    assert artefacts(tmp_path) == ["a"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    save_checkpoint(*new_policy(TINY), tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a: not a readable checkpoint"):
        load_policy(str(tmp_path / "a"))


def test_bad_teacher_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr("vgkern.tasks._Exact.wrong")
    monkeypatch.delattr("vgkern.tasks.Sort.wrong")
    with pytest.raises(ConfigError, match=r"warm_wrong: got 0.65; allowed: 0, task 'sort'"):
        run.build(dataclasses.replace(TINY, warm_target=0.1))
