"""KL, entropy and distillation in the trainer: the default is analytic, and a teacher is one."""

import dataclasses
import json
import shutil

import pytest
import torch
from test_train import TINY, batch, gradient, trainer, weights

import vgkern
from vgkern.costate.analytic import analytic_loss_ref
from vgkern.errors import ConfigError, RunError, TrainingError
from vgkern.train import run, teacher
from vgkern.train.checkpoint import new_policy, save_checkpoint
from vgkern.train.config import Config
from vgkern.train.tokenizer import CHARACTERS, CharTokenizer


@pytest.fixture
def folder(tmp_path):
    """A teacher of another width, with opinions."""
    policy, tokenizer = new_policy(dataclasses.replace(TINY, width=16, seed=5))
    with torch.no_grad():
        policy.embedding.weight *= 20
    save_checkpoint(policy, tokenizer, tmp_path / "teacher")
    return str(tmp_path / "teacher")


TERMS = [
    {"beta": 0.3},
    {"entropy_coef": 0.2},
    {"beta": 0.3, "entropy_coef": 0.2, "distill_coef": 0.7, "teacher": "it", "future": 0.5},
    {"teacher": "it", "reward_coef": 0.0, "discount": 0.9},
    {"teacher": "it", "reward_coef": 0.0, "future": 0.0},
]


def with_teacher(settings, folder):
    return {**settings, "teacher": folder} if "teacher" in settings else settings


def moved(made):
    """The policy, some way from its reference."""
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter *= 1.3
    return made


@pytest.mark.parametrize("settings", TERMS)
def test_the_gradient_is_the_reference(folder, settings):
    """Against plain logits: task advantages and analytic terms, weights 1 / B."""
    made = moved(trainer(objective="rloo", **with_teacher(settings, folder)))
    config = made.config
    prompts, rollout, rewards = batch(made)
    whole = made.batch(prompts, rollout, rewards)
    assert len(whole.prompts) == 4  # the group that agrees has a gradient too
    metrics = made.gradient(whole, True)
    got = gradient(made)

    def logits(policy):
        head = policy.head()
        return policy.hidden(prompts, rollout.tokens, 4, rollout.lengths) @ head.weight.T

    allowed = made.policy.head().bias == 0  # blocked ids are in no sum
    index = torch.cumsum(allowed, 0) - 1
    z, others = logits(made.policy)[..., allowed], []
    for policy, coef in (
        (made.parts.reference, config.beta),
        (made.parts.teacher, config.distill_coef),
    ):
        if policy is not None:
            others.append((logits(policy)[..., allowed].detach(), coef))
    groups, targets = torch.arange(4).repeat_interleave(4), index[rollout.tokens]
    mask = rollout.mask
    loss = analytic_loss_ref(
        z, others, targets, groups, mask, config.entropy_coef, config.future, config.discount
    )
    advantages = config.reward_coef * vgkern.group_advantages(rewards, groups, estimator="rloo")
    logp = z.log_softmax(-1).gather(-1, targets.where(mask, 0)[..., None])[..., 0].where(mask, 0)
    loss = loss - (advantages[:, None] * logp).sum() / 16
    made.optimizer.zero_grad()
    loss.backward()
    assert (got - gradient(made)).norm() < 1e-4 * got.norm() != 0
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "settings, estimator",
    [(TERMS[2], "analytic"), (TERMS[4], "analytic"), (TERMS[2], "sampled")],
    ids=["all", "direct", "sampled"],
)
def test_micro_batches_give_the_same_gradient_and_metrics(folder, settings, estimator):
    made = moved(trainer(kl_estimator=estimator, **with_teacher(settings, folder)))
    whole = made.batch(*batch(made))
    metrics = made.gradient(whole, True)
    want = gradient(made)
    made.config = dataclasses.replace(made.config, micro_prompts=1)
    parts = made.gradient(whole, True)
    assert (gradient(made) - want).norm() < 1e-5 * want.norm() != 0
    for name in set(metrics) & {"kl", "distill", "entropy", "future"}:
        assert parts[name] == pytest.approx(metrics[name], rel=1e-4), name
    assert ("distill" in metrics) == ("teacher" in settings)


def test_the_sampled_form_is_the_objective_of_old():
    made = moved(trainer(beta=0.4, entropy_coef=0.1, kl_estimator="sampled"))
    assert made.objective.beta == 0.4 and made.objective.entropy_coef == 0.1
    prompts, rollout, rewards = batch(made)
    metrics = made.gradient(made.batch(prompts, rollout, rewards), True)
    where = (prompts, rollout.tokens, 4, rollout.lengths)
    logp = []
    for policy in (made.policy, made.parts.reference):
        head = policy.head()
        z = (policy.hidden(*where) @ head.weight.T + head.bias).log_softmax(-1)
        logp.append(z.gather(-1, rollout.tokens[..., None])[..., 0])
    ratio = (logp[1] - logp[0])[rollout.mask]
    assert metrics["kl"] == pytest.approx(
        float((ratio.exp() - 1 - ratio).mean().detach()), rel=1e-3
    )


def test_sampled_distillation_is_reward_to_go_of_the_log_ratio(folder):
    made = trainer(
        objective="rloo", teacher=folder, reward_coef=0.0, kl_estimator="sampled", future=0.0
    )
    prompts, rollout, rewards = batch(made)
    made.gradient(made.batch(prompts, rollout, rewards), True)
    got = gradient(made)
    where = (prompts, rollout.tokens, 4, rollout.lengths)
    head, other = made.policy.head(), made.parts.teacher.head()
    y, m = rollout.tokens[..., None], rollout.mask.float()
    logp = (made.policy.hidden(*where) @ head.weight.T + head.bias).log_softmax(-1).gather(-1, y)
    lq = made.parts.teacher.hidden(*where) @ other.weight.T + other.bias
    cost = (rollout.logp - lq.log_softmax(-1).gather(-1, y)[..., 0]).detach() * m
    n = m.view(4, 4, -1).sum(1, keepdim=True)
    c, alive = cost.view(4, 4, -1), m.view(4, 4, -1)
    baseline = (c.sum(1, keepdim=True) - c) / (n - 1).clamp(min=1) * (n > 1)
    advantages = ((baseline - c) * alive).view(16, -1)
    made.optimizer.zero_grad()
    (-(advantages * logp[..., 0]).sum() / 16).backward()
    assert (got - gradient(made)).norm() < 1e-4 * got.norm() != 0


@pytest.mark.parametrize("estimator, steps", [("analytic", 30), ("sampled", 45)])
def test_distillation_reaches_its_teacher(tmp_path, folder, estimator, steps):
    """Without task reward; the teacher stays as it was."""
    settings = dict(
        teacher=folder, reward_coef=0.0, kl_estimator=estimator, steps=steps, lr=1e-2, lr_warmup=1,
        future=0.5, eval_every=100, out=str(tmp_path / "run"), objective="rloo",
    )  # fmt: skip
    out = run.train(dataclasses.replace(TINY, **settings))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [record["distill"] for record in records if record["kind"] == "step"]
    assert sum(found[-5:]) / 5 < 0.6 * found[0]
    text = (out / "summary.txt").read_text()
    assert f"distilled from {folder}" in text and "no task reward" in text


@pytest.mark.parametrize("skipped", [{1}, {3}, {1, 2, 3}])
def test_a_skipped_step_has_no_divergence_to_report(tmp_path, folder, monkeypatch, skipped):
    real, calls = run.Trainer.gradient, []

    def gradient(self, batch, first_pass):
        calls.append(first_pass)
        if len(calls) in skipped:
            return {"loss": float("nan"), "sampler_gap": float("nan")}
        return real(self, batch, first_pass)

    monkeypatch.setattr(run.Trainer, "gradient", gradient)
    out = run.train(dataclasses.replace(TINY, teacher=folder, out=str(tmp_path / "run")))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [record["distill"] for record in records if "distill" in record]
    text = (out / "summary.txt").read_text()
    want = f": {found[0]:.3f} -> {found[-1]:.3f} nats per token" if found else ""
    assert len(found) == 3 - len(skipped) and f"distilled from {folder}{want}\n" in text


@pytest.mark.parametrize("micro", [0, 1])
@pytest.mark.parametrize("settings", [TERMS[4], {"beta": 0.3, "reward_coef": 0.0, "future": 0.0}])
def test_sampler_and_trainer_are_compared_where_no_row_is_active(folder, settings, micro):
    """Neither a reward nor a future: all of the gradient is the direct terms'."""
    made = trainer(micro_prompts=micro, **with_teacher(settings, folder))
    _, prompts, rollout = made.sample(1)
    good = made.update(made.batch(prompts, rollout, torch.arange(16.0) % 3))
    assert good["active"] == 0 < good["sampler_gap"] < 1e-5
    wrong = rollout._replace(logp=rollout.logp.clone())
    wrong.logp[5, 0] += 0.25
    with pytest.raises(TrainingError, match=r"sampler and trainer disagree .* by"):
        made.update(made.batch(prompts, wrong, torch.arange(16.0) % 3))


def test_the_teacher_is_frozen(folder, monkeypatch):
    made = trainer(teacher=folder, lr=1e-2)
    before = [p.clone() for p in made.parts.teacher.parameters()]
    start = weights(made)
    monkeypatch.setattr(made, "score", lambda *_: torch.zeros(16))
    assert made.step(1)["groups_used"] == 4  # no reward tells them apart, the teacher does
    after = made.parts.teacher.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(weights(made), start)
    assert not any(p.requires_grad for p in made.parts.teacher.parameters())


def test_hugging_face_student_and_teacher():
    pytest.importorskip("transformers")
    from test_hf import GROUP, PROMPTS, ROWS, VOCAB, WIDTH, tiny

    from vgkern.train.generate import Rollout
    from vgkern.train.hf import HFPolicy
    from vgkern.train.update import Batch, Update, make_objective

    student, other = HFPolicy(tiny(), blocked=[0]), HFPolicy(tiny(tied=False), blocked=[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.2
    config = dataclasses.replace(
        TINY, group=GROUP, reward_coef=0.0, teacher="other", beta=0.1, future=0.0
    )
    parts = Update(config, student, other, make_objective(config))
    g = torch.Generator().manual_seed(0)
    rollout = Rollout(
        torch.randint(1, VOCAB, (ROWS, WIDTH), generator=g), torch.zeros(ROWS, WIDTH),
        torch.randint(1, WIDTH + 1, (ROWS,), generator=g), torch.ones(ROWS, dtype=torch.bool),
    )  # fmt: skip
    whole = Batch(PROMPTS, rollout, torch.zeros(ROWS), 1.0)
    optimizer, seen = torch.optim.Adam(student.parameters(), 1e-2), []
    for _ in range(8):
        out = parts.loss(whole.prompts, rollout, whole.advantages, float(ROWS), True)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        seen.append(float(out.metrics["distill"]))
    assert seen[-1] < 0.7 * seen[0] and float(out.metrics["kl"]) > 0


def test_the_kl_is_to_the_policy_after_the_warm_start(tmp_path):
    settings = dict(
        out=str(tmp_path / "run"), task_options='{"min_length": 1, "max_length": 4}', steps=1,
        warm_target=0.05, warm_wrong=0.0, warm_batch=64, beta=0.1,
    )  # fmt: skip
    out = run.train(dataclasses.replace(TINY, **settings))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (step,) = [record for record in records if record["kind"] == "step"]
    assert step["kl"] == pytest.approx(0, abs=1e-7)


def test_a_teacher_that_does_not_fit_is_one_error(tmp_path, folder):
    def fails(match, **settings):
        with pytest.raises(RunError, match=match):
            trainer(**{"teacher": folder, **settings})

    fails(r"teacher: model '/nowhere'", teacher="/nowhere")
    shutil.copytree(folder, tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    fails(r"teacher: .*weightless: not a readable checkpoint", teacher=str(tmp_path / "weightless"))
    policy, _ = new_policy(TINY)
    save_checkpoint(policy, CharTokenizer(CHARACTERS[::-1]), tmp_path / "reversed")
    fails(
        r"teacher: .*reversed has another tokenizer: \d+ ids mean other texts \(2: ' ', '0'; .*"
        r"allowed: a teacher with the student's tokenizer",
        teacher=str(tmp_path / "reversed"),
    )
    wide = tmp_path / "wide"
    made, tokenizer = new_policy(TINY)
    made.embedding = torch.nn.Embedding(64, 32)
    made.shape = dataclasses.replace(made.shape, vocab=64)
    save_checkpoint(made, tokenizer, wide)
    fails(r"teacher: .*wide has a vocabulary of 64, the student of 48", teacher=str(wide))
    save_checkpoint(new_policy(dataclasses.replace(TINY, context=6))[0], tokenizer, tmp_path / "6")
    fails(
        r"teacher: .*6: prompt of 5 tokens \+ 5 new ones exceed context=6; allowed: a teacher with",
        teacher=str(tmp_path / "6"),
    )
    fails(r"objective: got 'gspo', .* allowed with a teacher", objective="gspo",
          kl_estimator="sampled")  # fmt: skip
    head = made.head()._replace(weight=torch.zeros(48, 32), softcap=30.0)
    one = trainer(beta=0.1)
    one.policy.head = lambda: head
    with pytest.raises(ConfigError, match=r"soft-cap has no analytic .* kl_estimator = 'sampled'"):
        teacher.check_teacher(one.config, one.policy, one.tokenizer, one.policy, one.tokenizer)


def test_a_teacher_may_be_the_folder_of_a_run(tmp_path, folder):
    made = tmp_path / "run"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    with pytest.raises(ConfigError, match=r"teacher: .*run: a run that has saved no final weights"):
        trainer(teacher=str(made))
    shutil.copytree(folder, made / "final")
    assert trainer(teacher=str(made)).parts.teacher.shape.width == 16


def test_an_id_that_one_side_alone_can_produce_is_refused(folder):
    """Its divergence would be 1e8 nats; jsd is bounded."""
    made = trainer(teacher=folder)
    head, other = made.policy.head(), made.parts.teacher
    open_head = head._replace(bias=head.bias.clone().index_fill(0, torch.tensor([7]), 0.0))
    less = head._replace(bias=head.bias.clone().index_fill(0, torch.tensor([7]), -1e9))

    def check(student, of_teacher, kind):
        made.policy.head, other.head = lambda: student, lambda: of_teacher
        config = dataclasses.replace(made.config, distill_kind=kind)
        teacher.check_teacher(config, other, made.tokenizer, made.policy, made.tokenizer)

    with pytest.raises(
        ConfigError,
        match=r"teacher: .*: it blocks 1 ids that the student can produce \(id 7\): .*'jsd'",
    ):
        check(open_head, less, "reverse_kl")
    with pytest.raises(ConfigError, match=r"the student blocks 1 ids that it can produce \(id 7\)"):
        check(less, open_head, "forward_kl")
    with pytest.raises(ConfigError, match=r"it blocks \d+ ids"):
        check(head._replace(bias=None), head, "reverse_kl")
    check(open_head, less, "forward_kl")
    check(less, open_head, "reverse_kl")
    check(open_head, less, "jsd")


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"kl_estimator": "exact"}, r"kl_estimator: got 'exact'; allowed: 'analytic', 'sampled'"),
        ({"distill_kind": "kl"}, r"distill_kind: got 'kl'; allowed: 'forward_kl', 'reverse_kl'"),
        ({"teacher": "a", "distill_coef": 0.0}, r"distill_coef: got 0.0; allowed: > 0"),
        ({"reward_coef": 0.0}, r"reward_coef: got 0.0; allowed: > 0, or a teacher"),
        ({"discount": 1.5}, r"discount: got 1.5; allowed: >= 0 and <= 1"),
        ({"future": -1.0}, r"future: got -1.0; allowed: >= 0"),
        (
            {"kl_estimator": "sampled", "distill_kind": "jsd"},
            r"distill_kind: got 'jsd'; allowed: 'reverse_kl' with kl_estimator 'sampled'",
        ),
        ({"distill_kind": "jsd"}, r"distill_kind: got 'jsd', .*; allowed: 'reverse_kl', or a teac"),
        ({"distill_coef": 0.5, "beta": 0.1}, r"distill_coef: got 0.5, .* allowed: 1.0, or a teach"),
        ({"reward_coef": 0.5}, r"reward_coef: got 0.5, .*; allowed: 1.0, or beta"),
        ({"future": 0.5}, r"future: got 0.5, .*; allowed: 1.0, or .* beta, entropy_coef or a"),
        (
            {"discount": 0.5, "beta": 0.1, "kl_estimator": "sampled"},
            r"discount: got 0.5, .*; allowed: 1.0, or .* kl_estimator = 'analytic'",
        ),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, match):
    with pytest.raises(ConfigError, match=match):
        Config(**settings)


def test_settings_that_do_something_are_taken():
    Config(future=0.5, discount=0.5, entropy_coef=0.1, reward_coef=0.5)
    Config(future=0.5, teacher="a", kl_estimator="sampled", distill_coef=0.5, reward_coef=0.0)
    Config(reward_coef=0.5, beta=0.1, kl_estimator="sampled")
