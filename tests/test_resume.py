"""A run that is killed, stopped or starved goes on, bit for bit as if nothing had happened."""

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_state import records
from test_train import TINY

from vgkern.__main__ import main
from vgkern.errors import CheckpointError, ConfigError, TaskError
from vgkern.train import run, state
from vgkern.train.config import load_run
from vgkern.train.interrupt import Stopped

LONG = dataclasses.replace(TINY, steps=6, state_every=1, save_every=4)
OBJECTIVES = [(o, n, False) for o in ("grpo", "gspo", "cispo_relative") for n in (1, 2)]
CASES = [*OBJECTIVES, ("grpo", 1, True)]


def config(out, objective="grpo", updates=1, warm=False, **more):
    knobs = {"out": str(out), "objective": objective, "updates_per_batch": updates, **more}
    if warm:  # until 40 steps, with a KL to where it ended
        knobs |= {"warm_target": 1e-9, "warm_wrong": 0.0, "warm_batch": 16, "beta": 0.02,
                  "shuffle_rewards": True}  # fmt: skip
    return dataclasses.replace(LONG, **knobs)


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    """That differ within a group: a model this small is right about nothing."""

    def score(made, entries, rollout):
        values = (rollout.tokens.where(rollout.mask, 0).sum(1) % 5).tolist()
        if made.config.shuffle_rewards:
            made.shuffle.shuffle(values)
        return torch.tensor(values) / 4.0

    monkeypatch.setattr(run.Trainer, "score", score)


def child(work):
    """The exit status of `work()` in a process of its own; negative: the signal that killed it."""
    pid = os.fork()
    if not pid:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            work()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def ended(monkeypatch):
    """What the optimizer held at the end of each run."""
    found = []
    real = run.write_report

    def report(out, config, trainer, samples):
        held = state._tensors(trainer, trainer.optimizer)
        del held["random"]  # torch's own, which a run neither seeds nor draws from
        found.append({k: v.clone() for k, v in held.items()})
        return real(out, config, trainer, samples)

    monkeypatch.setattr(run, "write_report", report)
    return found


def same(one, two, ended):
    for folder in ("final", "step-000004"):
        a, b = (load_file(Path(out, folder, "model.safetensors")) for out in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), folder
    assert records(one) == records(two)
    assert (Path(one) / "samples.txt").read_text() == (Path(two) / "samples.txt").read_text()
    assert sum(r["grad_norm"] > 0 for r in records(one) if r["kind"] == "step") >= 3
    assert len(ended) == 2 and ended[0].keys() == ended[1].keys()
    assert all(torch.equal(ended[0][k], ended[1][k]) for k in ended[0])
    assert not (Path(two) / "state").exists()  # nothing is left to go on with


def go_on(out):
    return run.train(*load_run(["--resume", str(out)]))


@pytest.mark.parametrize("objective, updates, warm", CASES)
def test_killed_and_resumed_is_the_run_that_was_not(
    tmp_path, objective, updates, warm, ended, monkeypatch
):
    """Killed in the middle of step 4, then of step 6; with a warm start in its step 8 first."""
    whole = run.train(config(tmp_path / "whole", objective, updates, warm))
    broken = config(tmp_path / "broken", objective, updates, warm)
    backward, kills = run.Trainer.gradient, [(False, 4), (False, 6)]

    def dying(made, batch, first_pass):
        if made.dying == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(made, batch, first_pass)

    def life(resume, at):
        def step(made, index, real=run.Trainer.step):
            made.dying = index - at
            return real(made, index)

        monkeypatch.setattr(run.Trainer, "step", step)
        monkeypatch.setattr(run.Trainer, "gradient", dying)
        go_on(broken.out) if resume else run.train(broken)

    def warming():
        real = run.WarmStart.advance

        def advance(made):
            if made.step == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(made)

        monkeypatch.setattr(run.WarmStart, "advance", advance)
        run.train(broken)

    if warm:
        assert child(warming) == -signal.SIGKILL
        assert state.find(Path(broken.out))[0].name == "warm-000007"
    for resume, (_, at) in zip((warm, True), kills, strict=True):
        assert child(lambda resume=resume, at=at: life(resume, at)) == -signal.SIGKILL
        assert state.find(Path(broken.out))[0].name == f"step-{at - 1:06d}"
    go_on(broken.out)
    same(whole, broken.out, ended)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_next_edge(tmp_path, number, ended, capsys, monkeypatch):
    whole = run.train(config(tmp_path / "whole"))
    real, out = run.Trainer.step, tmp_path / "stopped"

    def step(made, index):
        if index == 3:
            os.kill(os.getpid(), number)
        return real(made, index)

    before = signal.getsignal(number)
    monkeypatch.setattr(run.Trainer, "step", step)
    with pytest.raises(Stopped) as stopped:
        run.train(config(out, state_every=-1))
    assert signal.getsignal(number) is before and stopped.value.status == 128 + number
    assert f"{number.name} after step 3; go on with: python -m vgkern train --resume" in str(
        stopped.value
    )
    assert [r["step"] for r in records(out) if r["kind"] == "step"] == [1, 2, 3]
    monkeypatch.setattr(run.Trainer, "step", real)
    assert main(["train", "--resume", str(out)]) == 0
    assert "going on from step 3" in capsys.readouterr().err
    same(whole, out, ended)


def test_the_command_ends_with_the_signals_own_status(tmp_path, monkeypatch, capsys):
    def step(made, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"reward": 0.0, "ms_rollout": 0.0, "ms_score": 0.0, "ms_update": 0.0}

    monkeypatch.setattr(run.Trainer, "step", step)
    flags = ["--width", "32", "--layers", "1", "--heads", "2", "--warm-target", "0"]
    out = str(tmp_path / "run")
    assert main(["train", "--out", out, "--eval-prompts", "8", *flags]) == 143
    assert "SIGTERM after step 1" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_reward_that_raises_costs_nothing(tmp_path, where, ended, monkeypatch):
    whole = run.train(config(tmp_path / "whole"))
    broken, real = config(tmp_path / "broken", state_every=-1), run.Trainer.score
    evaluate = run.Trainer.evaluate

    def score(made, entries, rollout):
        if len(made.log.of("step")) == 4:
            raise TaskError("the reward's server is gone")
        return real(made, entries, rollout)

    def evaluation(made, entries, temperature):
        if len(made.log.of("step")) == 4:
            raise TaskError("the reward's server is gone")
        return evaluate(made, entries, temperature)

    with monkeypatch.context() as patched:
        name, bad = ("score", score) if where == "step" else ("evaluate", evaluation)
        patched.setattr(run.Trainer, name, bad)
        with pytest.raises(TaskError, match="server is gone"):
            run.train(broken)
    go_on(broken.out)
    same(whole, broken.out, ended)


def test_a_full_disk_keeps_the_older_state_and_goes_on(tmp_path, ended, monkeypatch, capsys):
    whole, out = run.train(config(tmp_path / "whole")), tmp_path / "full"
    real = state.save_file

    def full(tensors, path):
        if "step-000003" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(state, "save_file", full)
    seen = []
    save = state.Keeper.save

    def saving(keeper, *given, **more):
        done = save(keeper, *given, **more)
        seen.append((given[2], done, [p.name for p in state._newest_first(keeper.folder)]))
        return done

    monkeypatch.setattr(state.Keeper, "save", saving)
    run.train(config(out))
    assert seen[3] == (3, False, ["step-000002", "step-000001"])
    assert seen[4] == (4, True, ["step-000004", "step-000002"])
    assert "step-000003 was not saved ([Errno 28]" in capsys.readouterr().err
    same(whole, out, ended)


def test_a_full_disk_at_the_end_is_one_line_and_the_state_stays(tmp_path, ended, monkeypatch):
    whole, out = run.train(config(tmp_path / "whole")), tmp_path / "full"
    save = run.save_checkpoint

    def full(policy, tokenizer, folder):
        if folder.name == "final":
            monkeypatch.setattr(policy, "save", lambda _: (_ for _ in ()).throw(
                OSError(errno.ENOSPC, "No space left on device")))  # fmt: skip
        save(policy, tokenizer, folder)

    with monkeypatch.context() as patched:
        patched.setattr(run, "save_checkpoint", full)
        with pytest.raises(CheckpointError, match="final: not saved: No space left on device"):
            run.train(config(out))
    assert not (out / "final").exists()
    go_on(out)
    same(whole, out, ended)


def test_weights_of_a_run_start_another_and_it_is_said(tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"no final weights; .*: --resume"):
        (out / "state").mkdir(parents=True)
        values = {**dataclasses.asdict(LONG), "out": str(out)}
        (out / "config.json").write_text(json.dumps(values))
        run.train(dataclasses.replace(TINY, model=str(out), out=str(tmp_path / "other")))
    run.save_checkpoint(*run.new_policy(TINY), out / "step-000002")
    run.train(dataclasses.replace(TINY, model=str(out / "step-000002"), steps=1,
                                  out=str(tmp_path / "third")))  # fmt: skip
    assert f"a new run from these weights; --resume {out} would go on" in capsys.readouterr().err
    run.train(dataclasses.replace(TINY, model=str(out), steps=1, out=str(tmp_path / "fourth")))


def test_what_cannot_go_on_is_said(tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"--resume .*not the folder of a run"):
        load_run(["--resume", str(out)])
    run.train(config(out, steps=1))
    with pytest.raises(ConfigError, match=r"has ended; train on from it with --model .*final"):
        load_run(["--resume", str(out)])
    shutil.rmtree(out / "final")
    words = r"other settings \(lr 0.001 -> 0.01; seed 0 -> 3\); allowed: the run's own"
    with pytest.raises(ConfigError, match=words):
        load_run(["--resume", str(out), "--lr", "1e-2", "--seed", "3", "--prompts", "4"])
    with pytest.raises(ConfigError, match=r"out .* -> 'elsewhere'"):
        load_run(["--resume", str(out), "--out", "elsewhere"])
    assert load_run(["--resume", str(out), "--state-every", "5"])[0].state_every == 5
    assert main(["train", "--resume", str(out)]) == 2
    assert "no state was saved in it" in capsys.readouterr().err
