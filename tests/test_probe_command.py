"""`python -m vgkern probe`: from a run to its files, and what it refuses."""

import json
import sys

from test_probe import SMALL

from vgkern.__main__ import main
from vgkern.train import probe
from vgkern.train.checkpoint import new_policy, save_checkpoint


def test_the_command_from_a_run_to_its_files(tmp_path, capsys):
    made, tokenizer = new_policy(SMALL)
    run = tmp_path / "run"
    save_checkpoint(made, tokenizer, run / "final")
    settings = {"task": "sort", "task_options": '{"min_length": 2, "max_length": 3}', "few_shot": 0}
    (run / "config.json").write_text(json.dumps({**settings, "temperature": 0.9}))
    out = tmp_path / "probe"
    flags = ["--model", str(run), "--prompts", "5", "--group", "4", "--out", str(out)]
    assert main(["probe", *flags]) == 0
    text = capsys.readouterr().out
    found = json.loads((out / "probe.json").read_text())
    for words in ("signal S2", "headroom", "replay agreement", "sampling gap", "hop cosine"):
        assert words in text
    assert found["temperature"] == 0.9 and found["task"] == "sort" and found["layer"] == 2
    assert found["replay_agreement"]["value"] == 1 and 0 <= found["reward"]["value"] <= 1
    assert 3 < found["entropy"]["value"] < 3.8 and found["sampler_gap"] < 1e-4  # untrained: ~log 43
    assert len(found["layers"]) == 4 and all(x["norm"]["value"] > 0 for x in found["layers"])
    if "not drawn" not in text:
        assert (out / "costates.png").stat().st_size > 10_000


def test_the_command_names_flag_and_remedy(tmp_path, capsys, monkeypatch):
    made, tokenizer = new_policy(SMALL)
    save_checkpoint(made, tokenizer, tmp_path / "model")
    model = ["probe", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    cases = {
        ("--task", "sort", "--group", "3"): "--group: got 3; allowed: >= 4",
        (): "--task",
        ("--task", "sort", "--layer", "9", "--prompts", "1", "--group", "4"): "--layer: got 9",
        ("--task", "sort", "--temperature", "0"): "--temperature: got 0",
        ("--task", "sorting"): "allowed: sort",
        ("--task", "sort", "--task-options", "[]"): "a JSON object",
        ("--task", "sort", "--best-of", "9"): "--best-of: got 9",
    }
    for flags, words in cases.items():
        assert main([*model, *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert main(["probe", "--model", str(tmp_path), "--task", "sort"]) == 2
    assert "no config.json" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*model, "--task", "sort", "--prompts", "2", "--group", "4"]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out


def test_a_layer_that_is_not_there_is_said_before_measuring(tmp_path, capsys, monkeypatch):
    made, tokenizer = new_policy(SMALL)
    save_checkpoint(made, tokenizer, tmp_path / "model")
    monkeypatch.setattr(probe, "measure", None)
    flags = ["--model", str(tmp_path / "model"), "--task", "sort", "--out", str(tmp_path / "out")]
    assert main(["probe", *flags, "--layer", "4"]) == 2
    assert capsys.readouterr().err == ("vgkern probe: --layer: got 4; allowed: 0 (input) to 3\n")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_probe_has_written_nothing(tmp_path, capsys, monkeypatch):
    made, tokenizer = new_policy(SMALL)
    save_checkpoint(made, tokenizer, tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--task", "sort", "--prompts", "2", "--group", "4"]

    def interrupted(*given, **more):
        raise KeyboardInterrupt

    for name, folder in (("measure", "new/out"), ("draw", "new/out"), ("draw", "old")):
        out = tmp_path / folder
        if folder == "old":
            out.mkdir()
            (out / "notes").write_text("mine")
        with monkeypatch.context() as patch:
            patch.setattr(probe, name, interrupted)
            assert main(["probe", *flags, "--out", str(out)]) == 130
        assert "nothing was written" in capsys.readouterr().err
        assert [p.name for p in out.rglob("*")] == (["notes"] if folder == "old" else [])
        assert out.exists() == (folder == "old")
    assert main(["probe", *flags, "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} - {"costates.png"} == {"notes", "probe.json"}
