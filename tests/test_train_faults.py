"""Faults of the trainer found by review; each once gave a wrong number or a traceback."""

import dataclasses
import json

import pytest
import torch
from test_train import TINY, batch, trainer

from vgkern.__main__ import main
from vgkern.errors import CheckpointError, ConfigError, TaskError, TrainingError
from vgkern.tasks import Entry, Stream, checked_score, make_task
from vgkern.train import run
from vgkern.train.checkpoint import load_policy
from vgkern.train.model import Decoder
from vgkern.train.trainer import SKIPS


def test_tokens_count_every_sample_also_of_dropped_groups(monkeypatch):
    made = trainer()
    rewards = torch.arange(16.0) % 3
    rewards[4:8] = 1.0
    monkeypatch.setattr(made, "score", lambda *_: rewards)
    record = made.step(1)
    assert record["tokens"] == round(16 * record["length"]) > record["active"]


def test_a_gap_that_was_not_measured_is_not_called_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(run.Trainer, "score", lambda *_: torch.zeros(16))
    out = run.train(dataclasses.replace(TINY, steps=1, out=str(tmp_path / "run")))
    assert "gap not measured" in (out / "summary.txt").read_text()


def test_clip_metrics_are_those_of_the_last_pass():
    made = trainer(updates_per_batch=4, lr=3e-2, lr_warmup=0)
    for group in made.optimizer.param_groups:
        group["lr"] = 3e-2
    metrics = made.update(made.batch(*batch(made)))
    assert metrics["ratio_max"] > 1.01 and metrics["sampler_gap"] < 1e-4


def test_a_bad_second_pass_counts_towards_giving_up(monkeypatch):
    made = trainer(updates_per_batch=2)
    real = made.gradient

    def gradient(kept, first_pass):
        metrics = real(kept, first_pass)
        return metrics if first_pass else {**metrics, "loss": float("nan")}

    monkeypatch.setattr(made, "gradient", gradient)
    monkeypatch.setattr(made, "score", lambda *_: torch.arange(16.0) % 3)
    with pytest.raises(TrainingError, match=f"{SKIPS} steps in a row"):
        for step in range(1, SKIPS + 1):
            made.step(step)
    assert made.skipped == SKIPS


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--task-options", '{"min_length": 100, "max_length": 120}'], "exceed context"),
        (["--threads", "100000"], "threads: got 100000"),
        (["--seed", str(2**64)], "seed: got"),
    ],
)
def test_what_cannot_run_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, words):
    out = tmp_path / "run"
    assert main(["train", "--warm-target", "0", "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and not out.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: .*choose another folder"):
        run.train(dataclasses.replace(TINY, out=str(tmp_path / "file" / "run")))


def test_folders_that_are_no_checkpoint_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_policy(str(tmp_path))


def test_rewards_beyond_reason_and_entries_that_break_are_named():
    task = make_task("sort", {}, 0, 0)
    for reward in (10**400, 1e39, float("inf")):
        task.score = lambda *_, r=reward: r  # type: ignore[method-assign]
        with pytest.raises(TaskError, match="score returned"):
            checked_score(task, "1", Entry("1=", "1"))

    class Broken:
        name = "broken"

        def __getitem__(self, index):
            raise IndexError("no more")

    with pytest.raises(TaskError, match="task 'broken', entry 0: IndexError: no more"):
        Stream(Broken()).take(1)  # type: ignore[arg-type]


def test_a_soft_capped_head_has_no_analytic_kl(monkeypatch):
    """Said before a rollout is paid for; entropy, and the sampled KL, know soft-caps."""
    plain = Decoder.head
    monkeypatch.setattr(Decoder, "head", lambda self: plain(self)._replace(softcap=5.0))
    with pytest.raises(ConfigError, match=r"beta: got 0\.1, .*kl_estimator = 'sampled'"):
        trainer(beta=0.1)
    for settings in ({"entropy_coef": 0.1}, {"beta": 0.1, "kl_estimator": "sampled"}):
        made = trainer(**settings)
        assert made.gradient(made.batch(*batch(made)), True)["entropy"] > 3
