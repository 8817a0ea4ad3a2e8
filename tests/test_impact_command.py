"""`python -m vgkern impact`: from checkpoints to a ranking, and what it refuses."""

import dataclasses
import gc
import json
import sys
import weakref

import pytest
import torch
from test_hf import save_tokenizer, tiny
from test_train import TINY

from vgkern.__main__ import main
from vgkern.costate import impact
from vgkern.train import run
from vgkern.train.checkpoint import load_policy, new_policy, save_checkpoint
from vgkern.use import impact as command

OPTIONS = json.dumps({"min_length": 2, "max_length": 3})
FEW = ["--prompts", "16", "--group", "8"]
TWO = dataclasses.replace(TINY, layers=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that sorts two or three digits, some of the time."""
    out = tmp_path_factory.mktemp("impact") / "run"
    settings = {"task_options": OPTIONS, "warm_target": 0.3, "warm_wrong": 0.0, "warm_batch": 64,
                "steps": 1, "eval_prompts": 32}  # fmt: skip
    return run.train(dataclasses.replace(TWO, out=str(out), **settings))


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """A checkpoint that has learned nothing, and never will be right."""
    folder = tmp_path_factory.mktemp("impact") / "blank"
    save_checkpoint(*new_policy(TWO), folder)
    return folder


def ask(capsys, *flags):
    """The exit status, what is printed and what is said."""
    status = main(["impact", *map(str, flags)])
    return status, *capsys.readouterr()


def test_from_two_checkpoints_to_files(trained, blank, tmp_path, capsys):
    out = tmp_path / "out"
    status, text, _ = ask(capsys, trained, blank, *FEW, "--out", out)
    assert status == 0
    for words in ("impact", "signal/noise", "headroom(8)", "pass@1", "pass@8", "p(1-p)", "entropy",
                  "gradient norm", "of 200 RL steps of 16 x 8"):  # fmt: skip
        assert words in text
    assert f"STOP {blank}: every reward is 0" in text and "no signal" in text
    found = json.loads((out / "impact.json").read_text())
    first, last = found["checkpoints"]
    assert (first["name"], last["name"]) == (str(trained), str(blank)) and found["clear"]
    assert found["task"] == "sort" and first["layer"] == 1 and first["place"] == [1, 1]
    assert last["stop"] and not first["stop"] and last["used"] == 0
    assert (
        last["scores"]["impact"]["value"] == 0 and last["scores"]["signal/noise"]["value"] is None
    )
    assert 0.05 < first["scores"]["pass@1"]["value"] < 0.95
    assert (out / "impact.png").stat().st_size > 10_000
    rows = first["by_prompt"]
    assert len(rows) == 16 and len(rows[0]["rewards"]) == 8 and rows[0]["question"].endswith("=")
    assert [r["question"] for r in rows] == [r["question"] for r in last["by_prompt"]]
    # the file is enough to make the score again
    snr = sum(r["s2"] for r in rows) / sum(r["power"] for r in rows)
    room = sum(r["headroom"] for r in rows) / len(rows)
    assert first["scores"]["impact"]["value"] == pytest.approx(max(0, snr) ** 0.5 * room)
    # one checkpoint alone, and the same samples again
    status, text, _ = ask(capsys, trained, *FEW, "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "impact.json").read_text())["checkpoints"][0]
    assert status == 0 and "ranking" not in text and again["by_prompt"] == rows
    status, _, error = ask(capsys, trained, *FEW, "--out", out)
    assert status == 2 and "holds another impact.json" in error


def test_it_stops_when_the_ranking_is_clear(trained, blank, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "FEWEST", 16)
    flags = ["--prompts", "64", "--group", "8"]
    _, text, _ = ask(capsys, trained, blank, *flags, "--out", tmp_path / "early")
    assert "ranking of the score clear after 16 of 64 prompts" in text
    _, text, _ = ask(capsys, trained, blank, *flags, "--out", tmp_path / "all", "--all-prompts")
    assert "64 prompts x 8" in text and "after" not in text
    # of three the two that are alike go on, and what is placed does not
    again = tmp_path / "again"
    save_checkpoint(*load_policy(str(trained / "final")), again)
    _, text, _ = ask(capsys, trained, blank, again, *flags, "--out", tmp_path / "three")
    found = json.loads((tmp_path / "three" / "impact.json").read_text())
    counts = {row["name"]: row["prompts"] for row in found["checkpoints"]}
    assert counts == {str(trained): 64, str(again): 64, str(blank): 16}
    assert not found["clear"] and "take them as equal" in text
    a, b = found["checkpoints"][:2]
    assert a["by_prompt"] == b["by_prompt"]  # the same prompts and noise
    one = json.loads((tmp_path / "all" / "impact.json").read_text())["checkpoints"][0]
    for x, y in zip(one["by_prompt"], a["by_prompt"], strict=True):  # in whatever looks
        assert x["rewards"] == y["rewards"] and x["s2"] == pytest.approx(y["s2"], rel=1e-4)


def test_one_checkpoint_is_in_memory_at_a_time(trained, blank, tmp_path, capsys, monkeypatch):
    live, most = [], []

    def loading(path):
        gc.collect()
        most.append(sum(ref() is not None for ref in live))
        policy, tokenizer = load_policy(path)
        live.append(weakref.ref(policy))
        return policy, tokenizer

    monkeypatch.setattr(command, "load_policy", loading)
    assert ask(capsys, trained, blank, *FEW, "--out", tmp_path / "out")[0] == 0
    assert most == [0, 0]


def test_equal_rewards_everywhere_are_one_exception(blank, tmp_path, capsys):
    out = tmp_path / "out"
    status, text, error = ask(capsys, blank, "--task", "sort", *FEW, "--out", out)
    assert status == 2 and "STOP" in text and not out.exists()
    assert "rewards: got 128 samples, equal within every prompt" in error and error.count("\n") == 1


def test_bad_input_is_named(trained, blank, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other"
    config = json.loads((blank / "config.json").read_text())
    save_checkpoint(*new_policy(TWO), other)
    (other / "config.json").write_text(json.dumps({**config, "vocab": 50}))
    (tmp_path / "empty").mkdir()
    cases = {
        ("--k", "9", *FEW): "--k: got 9; allowed: 1 to --group, 8",
        ("--group", "3"): "--group: got 3; allowed: >= 4",
        ("--layer", "9", *FEW): "--layer: got 9; allowed: 0 (input) to 2",
        ("--task", "sorting"): "allowed: sort",
        ("--task-options", "[]"): "a JSON object",
        ("--temperature", "0"): "--temperature: got 0",
        (other,): f"CKPT {other}: its vocabulary is not that of {trained} (50 tokens, not 48)",
        (tmp_path / "not" / "there" / "x",): "there/x: no such folder",
        (tmp_path / "empty",): "no config.json",
        (trained,): f"CKPT: got {trained} twice",
    }
    for flags, words in cases.items():
        status, text, error = ask(capsys, trained, *flags, "--out", tmp_path / "out")
        assert status == 2 and not text, (flags, text, error)
        assert words in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()
    status, _, error = ask(capsys, blank, "--out", tmp_path / "out")
    assert status == 2 and "does not say its task" in error
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, text, _ = ask(capsys, trained, *FEW, "--out", tmp_path / "plain")
    assert status == 0 and "not drawn: the picture needs matplotlib" in text


def test_the_same_size_but_other_words_is_refused(trained, blank, tmp_path, capsys, monkeypatch):
    def loading(path):
        policy, tokenizer = load_policy(path)
        if path == str(blank):
            monkeypatch.setattr(tokenizer, "encode", lambda text: [7] * len(text))
        return policy, tokenizer

    monkeypatch.setattr(command, "load_policy", loading)
    status, _, error = ask(capsys, trained, blank, *FEW, "--out", tmp_path / "out")
    assert status == 2 and "(other ids of the prompts)" in error


def test_a_model_without_hooks_is_named(trained, tmp_path, capsys, monkeypatch):
    def loading(path):
        policy, tokenizer = load_policy(path)
        monkeypatch.setattr(type(policy), "probe_points", property(), raising=True)
        policy.layers = torch.nn.ModuleDict({str(i): x for i, x in enumerate(policy.layers)})
        return policy, tokenizer

    monkeypatch.setattr(command, "load_policy", loading)
    status, _, error = ask(capsys, trained, *FEW, "--out", tmp_path / "out")
    assert status == 2 and f"CKPT {trained}: model: got Decoder" in error and "hook" in error


OWN = '''
class Vowel:
    """A letter; right are the vowels."""
    max_new = 2

    def __init__(self, seed=0):
        self.seed = seed

    def __getitem__(self, i):
        return {"question": f"{i % 40}:", "answer": "a"}

    def score(self, text, entry):
        return 0.5 * (text[:1] < "m") + 0.5 * (text[:1] == "a")
'''


def test_a_hugging_face_model_and_own_tasks(tmp_path, capsys):
    pytest.importorskip("transformers")
    from vgkern.train.hf import HFPolicy

    folder = tmp_path / "hf"
    HFPolicy(tiny()).save(str(folder))
    save_tokenizer(folder)
    (tmp_path / "own.py").write_text(OWN)
    task = ["--task", f"{tmp_path}/own.py:Vowel"]
    status, text, error = ask(capsys, folder, *task, *FEW, "--temperature", 3,
                              "--out", tmp_path / "a")  # fmt: skip
    assert status == 0, error
    found = json.loads((tmp_path / "a" / "impact.json").read_text())["checkpoints"][0]
    assert found["used"] > 3 and found["scores"]["signal/noise"]["value"] is not None
    assert 0 < found["share_of_200_steps"] < 0.02 and "gradient norm" in text


def test_questions_of_a_file(trained, tmp_path, capsys):
    lines = [{"question": f"{i}=", "answer": "".join(sorted(str(i)))} for i in range(10, 99)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = '{"max_new": 4, "prompt": "{question}"}'
    status, _, error = ask(
        capsys, trained, "--task", data, "--task-options", options, *FEW, "--out", tmp_path / "a"
    )
    assert status == 0, error
    found = json.loads((tmp_path / "a" / "impact.json").read_text())
    assert found["checkpoints"][0]["used"] > 0 and found["task"].endswith("data.jsonl")


def test_progress_says_the_time_left(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 30.0, 40.0])
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    progress = command.Progress(40)
    progress.at = "a (1 of 2)"
    progress.show(5)  # too early to say anything
    progress.show(10)
    progress.past = 10
    progress.show(10)  # and this is too soon after it
    assert capsys.readouterr().err == "a (1 of 2): 10/40 prompts, at most 1:30 left\n"


def test_help_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["impact", "--help"])
    assert "which of these checkpoints" in capsys.readouterr().out
    assert impact.SCORE == "impact"
