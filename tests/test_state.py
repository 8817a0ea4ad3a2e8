"""The files of a state, and of the log beside it: whole, found, checked, at their share of time."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from test_train import trainer

from vgkern.errors import CheckpointError
from vgkern.train import state
from vgkern.train.log import Log

CLOCKS = ("time", "seconds", "ms_rollout", "ms_score", "ms_update")


def records(out):
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in CLOCKS} for x in lines]


def test_a_log_that_the_disk_does_not_take_has_whole_lines_and_catches_up(tmp_path, capsys):
    log = Log(tmp_path)
    log.record("one", x=1)
    file, room = log.file, [3]

    class Full:
        def write(self, data):
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            n = file.write(data[: room[0]])
            room[0] -= n
            return n

        def __getattr__(self, name):
            return getattr(file, name)

    log.file = Full()
    log.record("two", x=2)
    log.record("three", x=float("nan"))
    assert [r["kind"] for r in records(tmp_path)] == ["one"]
    room[0] = 10_000
    log.record("four", x=4)
    assert [r["kind"] for r in records(tmp_path)] == ["one", "two", "three", "four"]
    assert capsys.readouterr().err.count("No space left") == 1
    place = log.place()
    log.record("five")
    log.close()
    again = Log(tmp_path, place=place)
    assert [r["kind"] for r in again.records] == ["one", "two", "three", "four"]
    assert again.records[2]["x"] != again.records[2]["x"]  # NaN


def kept(tmp_path, count=2):
    """A run's folder with `count` states."""
    made = trainer(lr_warmup=0)
    made.log = Log(tmp_path)
    made.update(made.batch(*made_batch(made)))
    keeper = state.Keeper(tmp_path, 1)
    for number in range(count):
        assert keeper.save(made, "step", number, samples=[], measured=True)
    return made, keeper


def made_batch(made):
    _, prompts, rollout = made.sample(1)
    return prompts, rollout, torch.arange(16.0) % 3


def test_every_file_cut_short_or_with_a_byte_flipped_is_found(tmp_path):
    kept(tmp_path)
    rng = random.Random(0)
    newest, older = tmp_path / "state" / "step-000001", tmp_path / "state" / "step-000000"
    assert state.find(tmp_path) == (newest, [])
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {"state.json", "optimizer.safetensors", "manifest.json",
                                       "manifest.sha256", "model.safetensors"}  # fmt: skip
    for path in files:
        data = path.read_bytes()
        places = {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(6))}
        bad = [data[:n] for n in (0, 1, len(data) // 2, len(data) - 1)]
        bad += [data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]
                for i in places]  # fmt: skip
        for changed in bad:
            path.write_bytes(changed)
            assert state.damage(newest), path.name
        found, skipped = state.find(tmp_path)
        assert found == older and len(skipped) == 1 and str(newest) in skipped[0]
        path.unlink()
        assert state.damage(newest), path.name
        path.write_bytes(data)
    assert state.damage(newest) is None
    (newest / "more").write_text("x")
    assert "other files" in state.damage(newest)
    shutil.rmtree(older)
    with pytest.raises(CheckpointError, match=r"--resume .*other files"):
        state.find(tmp_path)


def test_fifty_kills_while_saving_leave_a_whole_state(tmp_path):
    made, keeper = kept(tmp_path, 4)
    rng, number, took = random.Random(1), 3, keeper.cost  # of one save on this machine
    for _ in range(50):
        done, say = os.pipe()
        if not (pid := os.fork()):
            while True:
                number += 1
                keeper.save(made, "step", number, samples=[], measured=True)
                os.write(say, b"x")
        os.read(done, 1)  # a whole one at least, and then anywhere in the next
        time.sleep(rng.uniform(0, 2) * took)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found, skipped = state.find(tmp_path)
        assert not skipped
        os.close(done), os.close(say)
        at = int(found.name.split("-")[1])
        assert at > number
        number = at
        state.restore(made, found)
    for path in (tmp_path / "state").glob(".*partial*"):
        shutil.rmtree(path)


def test_saving_takes_its_share_of_the_time_and_no_more(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(state.time, "perf_counter", lambda: now[0])
    made, _ = kept(tmp_path, 1)
    keeper, spent = state.Keeper(tmp_path, 0), 0.0
    real = made.policy.save

    def slow(folder):
        now[0] += 0.5
        real(folder)

    made.policy.save = slow
    for number in range(1000):
        now[0] += 1.0
        if keeper.due(number):
            keeper.save(made, "step", number)
            spent += 0.5
    assert 0.005 < spent / now[0] < 0.02
    assert not state.Keeper(tmp_path, -1).due(7) and state.Keeper(tmp_path, 3).due(6)
    assert not state.Keeper(tmp_path, 3).due(7)


def test_the_batch_of_a_skipped_step_is_kept(tmp_path):
    made = trainer()
    made.log = Log(tmp_path)
    hidden, given = made.policy.hidden, made_batch(made)
    made.policy.hidden = lambda *where: hidden(*where) * float("nan")
    made.update(made.batch(*given))
    found = json.loads((tmp_path / "skipped-1.json").read_text())
    assert found["metrics"]["loss"] == "nan" and len(found["rows"]) == 16
    row = found["rows"][1]
    assert row["prompt"].endswith("=") and row["advantage"] != 0 and len(row["logp"]) >= 1


def test_torchs_own_random_state_comes_back(tmp_path):
    made, _ = kept(tmp_path, 1)
    torch.manual_seed(5)
    state.Keeper(tmp_path, 1).save(made, "step", 7)
    want = torch.rand(3)
    state.restore(made, state.find(tmp_path)[0])
    assert torch.equal(torch.rand(3), want)
