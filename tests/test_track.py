"""Trackers: the numbers of the log, by stand-ins with the packages' own functions."""

import dataclasses
import json
import sys
import types

import pytest
from test_train import TINY

from vgkern.errors import ConfigError
from vgkern.train import run
from vgkern.train.track import TRACKERS


class Fake:
    """wandb and trackio, or tensorboard's writer; `fails` says at which call."""

    def __init__(self, fails=None):
        self.seen, self.ended, self.fails, self.config = [], 0, fails, None

    def init(self, **given):
        if self.fails == "init":
            raise ConnectionError("no server\nat all")
        self.config = given["config"]
        assert given["project"] == "vgkern"
        return types.SimpleNamespace(finish=self.close)

    def log(self, values, step):
        if self.fails == "log" and len(self.seen) > 1:
            raise ConnectionError("gone")
        self.seen.append((step, values))

    def SummaryWriter(self, folder):
        self.config = folder
        return self

    def add_scalar(self, name, value, step):
        self.seen.append((step, {name: value}))

    def flush(self):
        pass

    def close(self):
        self.ended += 1
        if self.fails == "end":
            raise ConnectionError("gone")


def go(tmp_path, monkeypatch, name, fails=None):
    fake = Fake(fails)
    monkeypatch.setitem(sys.modules, TRACKERS[name], fake)
    out = run.train(dataclasses.replace(TINY, out=str(tmp_path / "run"), track=name))
    records = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return fake, records, out


@pytest.mark.parametrize("name", TRACKERS)
def test_every_number_of_the_log_arrives(tmp_path, monkeypatch, name):
    fake, records, _ = go(tmp_path, monkeypatch, name)
    sent = {(step, key): value for step, values in fake.seen for key, value in values.items()}
    for r in records:
        for key in ("reward", "grad_norm", "greedy", "sampled"):
            if key in r:
                assert sent[r["step"], f"{r['kind']}/{key}"] == pytest.approx(r[key], abs=1e-7)
    assert fake.ended == 1 and fake.config
    assert all(isinstance(x, float) for x in sent.values())


@pytest.mark.parametrize("fails", ["init", "log", "end"])
def test_one_that_fails_is_left_alone(tmp_path, monkeypatch, capsys, fails):
    fake, records, out = go(tmp_path, monkeypatch, "wandb", fails)
    assert (out / "final").is_dir() and len([r for r in records if r["kind"] == "step"]) == 3
    err = capsys.readouterr().err
    assert err.count("warning: track: wandb failed (ConnectionError: ") == 1
    assert len(fake.seen) == {"init": 0, "log": 2, "end": 6}[fails]


def test_one_that_is_not_there_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="track: got 'wandb', which needs the package: pip"):
        run.train(dataclasses.replace(TINY, out=str(out), track="wandb"))
    assert not out.exists()
    with pytest.raises(ConfigError, match="track: got 'mlflow'; allowed: '', 'tensorboard'"):
        dataclasses.replace(TINY, track="mlflow")
