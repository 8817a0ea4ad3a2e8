"""Configuration: a file, then flags; what is wrong is named."""

import dataclasses
import re

import pytest

from vgkern.__main__ import main
from vgkern.errors import ConfigError
from vgkern.train import config
from vgkern.train.config import Config, load_config


def test_flags_go_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('task = "reverse"\nlr = 1\nsteps = 7\n[task_options]\nmax_length = 9\n')
    made = load_config(["--config", str(path), "--steps", "9", "--shuffle-rewards", "true"])
    assert (made.task, made.lr, made.steps) == ("reverse", 1.0, 9)
    assert made.shuffle_rewards and made.options == {"max_length": 9}
    assert load_config([]) == Config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], r"no flag '--step'; did you mean steps"),
        (["--group", "1"], r"group: got 1; allowed: >= 2"),
        (["--lr", "nan"], r"lr: got nan; allowed: >= 0, finite"),
        (["--warm-target", "1.5"], r"warm_target: got 1.5; allowed: >= 0 and <= 1"),
        (["--task-options", "[1]"], r"task_options: got '\[1\]'; allowed: a JSON object"),
        (["--task-options", "{"], r"task_options: got '{'; allowed: a JSON object"),
        (["--config", "/nowhere.toml"], r"--config /nowhere.toml"),
    ],
)
def test_bad_flags_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_config(arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lrate = 1.0", r"run.toml: no setting 'lrate'; did you mean"),
        ('steps = "many"', r"steps: got 'many'; allowed: int"),
        ("steps = true", r"steps: got True; allowed: int"),
        ("steps = ", r"run.toml"),
    ],
)
def test_bad_files_are_named(tmp_path, line, message):
    path = tmp_path / "run.toml"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", str(path)])


def test_a_flag_of_the_wrong_type_exits(capsys):
    with pytest.raises(SystemExit):
        load_config(["--steps", "many"])
    assert "argument --steps: got 'many'; allowed: int" in capsys.readouterr().err


def test_command_line_reports_one_line(capsys):
    assert main(["train", "--group", "1"]) == 2
    assert capsys.readouterr().err == "vgkern train: group: got 1; allowed: >= 2, finite\n"


@pytest.mark.parametrize(
    "flag, words",
    [("--learning-rate", "did you mean lr?"), ("--num-generations", "did you mean group?"),
     ("--clip-ratio-high", "did you mean clip-high?"), ("--promts", "did you mean prompts"),
     ("--resume-from-checkpoint", "did you mean resume?"),
     ("--zzzz", "train --help lists every setting")],
)  # fmt: skip
def test_an_unknown_flag_is_told_its_name_here(flag, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config([flag, "1"])


def test_what_others_call_a_setting_is_one_of_ours():
    names = {field.name for field in dataclasses.fields(Config)} | {"resume"}
    assert set(config.OTHERS.values()) <= names and not set(config.OTHERS) & names
