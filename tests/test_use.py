"""A checkpoint in use: sample, eval, export, and three lines of Python."""

import dataclasses
import io
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from test_train import TINY

from vgkern.__main__ import main
from vgkern.errors import ConfigError
from vgkern.tasks import Entry
from vgkern.train import run
from vgkern.train.checkpoint import new_policy, save_checkpoint
from vgkern.use import Sampled, evaluate, load


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that has learned something: it sorts two or three digits."""
    out = tmp_path_factory.mktemp("use") / "run"
    options = json.dumps({"min_length": 2, "max_length": 3})
    settings = {"task_options": options, "warm_target": 0.3, "warm_wrong": 0.0, "warm_batch": 64,
                "steps": 1, "eval_prompts": 32}  # fmt: skip
    return run.train(dataclasses.replace(TINY, out=str(out), **settings))


def test_three_lines(trained):
    model = load(str(trained))
    texts = model.generate(["31=", "52="], count=3, max_new=5)
    assert len(texts) == 6 and model.run["task"] == "sort"
    again = load(str(trained / "final")).sample(["52="], count=3, max_new=5, first=1)
    assert [s.text for s in again[0]] == texts[3:]  # a sample depends on its number alone
    assert model.generate([]) == []
    greedy = model.generate(["31="], temperature=0.0, max_new=5)
    assert model.generate(["31="], top_k=1, max_new=5) == greedy
    assert model.generate(["31="], top_p=1e-6, max_new=5, seed=9) == greedy
    assert model.generate(["31="], min_p=1.0, max_new=5, seed=9) == greedy


@pytest.mark.parametrize(
    "options, words",
    [
        ({"count": 0}, "count: got 0; allowed: an int >= 1"),
        ({"max_new": 2.0}, "max_new: got 2.0; allowed"),
        ({"temperature": -1.0}, "temperature: got "),
        ({"top_p": 1.5}, "top_p: got "),
        ({"top_k": 0}, "top_k: got "),
        ({"min_p": -0.1}, "min_p: got "),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_options_are_named(trained, options, words):
    with pytest.raises(ConfigError, match=words):
        load(str(trained)).sample(["31="], **options)


def test_prompts_that_cannot_be_encoded_are_named(trained):
    model = load(str(trained))
    with pytest.raises(ConfigError, match="character 'A' is unknown"):
        model.generate(["A="])
    with pytest.raises(ConfigError, match="empty"):
        model.generate([""])


def test_the_sample_command(trained, capsys, monkeypatch):
    assert main(["sample", str(trained), "--prompt", "31=", "--count", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = load(str(trained)).sample(["31="], count=2, max_new=4)[0]
    assert lines == [{"prompt": "31=", **dataclasses.asdict(s)} for s in texts]
    monkeypatch.setattr(sys, "stdin", io.StringIO("31=\n\n52=\n"))
    assert main(["sample", str(trained), "--temperature", "0"]) == 0
    shown = capsys.readouterr().out.splitlines()
    greedy = load(str(trained)).sample(["31=", "52="], temperature=0.0, max_new=4)
    assert shown == [s.text + ("" if s.finished else " [cut off]") for (s,) in greedy]
    monkeypatch.setattr(sys, "stdin", io.StringIO("A\n"))
    assert main(["sample", str(trained)]) == 2
    assert "vgkern sample: text 'A'" in capsys.readouterr().err


def test_the_eval_command_sees_what_the_trainer_saw(trained, tmp_path, capsys):
    file = tmp_path / "eval.json"
    flags = ["--prompts", "32", "--samples", "4", "--k", "1", "4", "--json", str(file)]
    assert main(["eval", str(trained), *flags]) == 0
    found = json.loads(file.read_text())
    records = [json.loads(x) for x in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if r["kind"] == "eval"][-1]
    assert found["greedy"][0] == pytest.approx(last["greedy"]) and 0 < found["greedy"][0] < 1
    scores = np.array([[s["score"] for s in p["samples"]] for p in found["prompts"]])
    assert scores.shape == (32, 4) and found["avg@4"][0] == pytest.approx(scores.mean())
    assert found["pass@1"][0] == pytest.approx((scores >= 1).mean())
    assert found["pass@4"][0] == pytest.approx((scores >= 1).any(1).mean())
    low, high = found["avg@4"][1:]
    assert low < found["avg@4"][0] < high
    shown = capsys.readouterr().out
    assert "pass@4" in shown and "best sample" in shown and found["prompts"][0]["answer"] in shown
    assert main(["eval", str(trained), "--json", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("n, c, k", [(n, c, k) for n in (1, 4, 6) for c in range(n + 1)
                                     for k in range(1, n + 1)])  # fmt: skip
def test_pass_at_k_is_the_share_of_all_draws(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        mean, low, high = evaluate.interval((rng.random(100) < 0.3).astype(float))
        assert low <= mean <= high
        hits += low <= 0.3 <= high
    assert 176 <= hits <= 200  # 95 % of 200, and four deviations below
    assert evaluate.interval(np.ones(5)) == [1.0, 1.0, 1.0]
    assert all(math.isnan(x) for x in evaluate.interval(np.array([])))


class Halves:
    """A wrong answer costs a point; "none" has no score."""

    name, max_new = "halves", 3

    def __getitem__(self, i):
        return Entry(f"{i}=", "1")

    def score(self, text, entry):
        return None if text == "none" else 1.0 if text == entry.answer else -1.0


def test_scores_and_what_has_none():
    e, task = Entry("1=", "1"), Halves()
    assert evaluate.score(task, Sampled("1", True), e) == 1.0
    assert evaluate.score(task, Sampled("1", False), e) == -1.0  # ran on
    groups = [[Sampled("1", True), Sampled("none", True)], [Sampled("2", True)] * 2]
    found = [
        evaluate.Answers(e, g[0], evaluate.score(task, g[0], e), g,
                         [evaluate.score(task, s, e) for s in g])
        for g in groups
    ]  # fmt: skip
    told = evaluate.summarize(found, [1, 2], 1.0)
    assert told["greedy"][0] == 0.0 and told["pass@1"][0] == 0.25 and told["pass@2"][0] == 0.5
    assert told["avg@2"][0] == -1.0 and told["cut_off"] == 0.0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--k", "9"], "--k: got 9; allowed: 1 to --samples, 8"),
        (["--k", "0"], "--k: got 0; allowed"),
        (["--samples", "0"], "--samples: got 0; allowed: >= 1"),
        (["--task", "srot"], "task: got 'srot'; allowed"),
        (["--task-options", "[1]"], r"task_options: got [1]; allowed: a JSON object"),
        (["--temperature", "-1"], "temperature: got "),
        (["--top-p", "2"], "top_p: got "),
    ],
)
def test_bad_flags_of_eval_are_one_line(trained, capsys, flags, words):
    assert main(["eval", str(trained), "--prompts", "2", *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("vgkern eval: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", ["sample", "eval", "export"])
def test_no_checkpoint_is_one_line(tmp_path, capsys, command):
    more = {"export": [str(tmp_path / "out")], "sample": ["--prompt", "1="], "eval": []}[command]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([command, str(empty), *more]) == 2
    assert "no config.json in it; not a checkpoint folder" in capsys.readouterr().err
    values = {"task": "sort", "task_options": "{}", "few_shot": 0, "temperature": 1.0}
    (empty / "config.json").write_text(json.dumps(values))
    assert main([command, str(empty), *more]) == 2
    assert "a run that has saved no final weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_without_a_run_need_a_task(tmp_path, capsys):
    save_checkpoint(*new_policy(TINY), tmp_path / "bare")
    assert main(["eval", str(tmp_path / "bare")]) == 2
    assert "does not say its task; give it with --task" in capsys.readouterr().err


def test_an_exported_decoder_is_a_llama(trained, tmp_path, capsys):
    """Hidden states, log-probs and ids of the plain Hugging Face model equal ours."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "llama"
    assert main(["export", str(trained), str(out)]) == 0
    assert "AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    inner = transformers.AutoTokenizer.from_pretrained(out)
    model = load(str(trained))
    text = "312=123>ab +9"
    ids = model.tokenizer.encode(text)
    assert inner.encode(text) == ids and inner.decode(ids) == text
    prompt, rest = ids[:4], torch.tensor([ids[4:]])
    ours = model.policy.hidden([prompt], rest, 1, torch.tensor([rest.shape[1]]))[0]
    logits = theirs(torch.tensor([ids])).logits[0, 3:-1]
    z = ours @ model.policy.head().weight.T
    torch.testing.assert_close(logits, z, atol=1e-5, rtol=1e-5)
    assert theirs.generation_config.suppress_tokens == list(model.policy.blocked)
    assert theirs.generation_config.eos_token_id == 1
    said = theirs.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, 4:]
    greedy = model.generate(["312="], temperature=0.0, max_new=4)[0]
    assert inner.decode(said, skip_special_tokens=True) == greedy
    card = (out / "README.md").read_text()
    assert "# sort" in card and "- warm_target = 0.3" in card and "step 1: held-out score" in card
    again = load(str(out))  # and it comes back as any Hugging Face model does
    assert again.generate(["312="], temperature=0.0, max_new=4) == [greedy]
    assert main(["export", str(trained), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    both = tmp_path / "again"
    assert main(["export", str(out), str(both)]) == 0
    assert (both / "model.safetensors").exists() and (both / "tokenizer.json").exists()


def test_nothing_half_written_is_left(trained, tmp_path, monkeypatch, capsys):
    from vgkern.use import export

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "card", full)
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert "not written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
