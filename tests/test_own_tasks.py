"""Tasks of one's own: a file, a JSONL of questions, an object; scores of every kind; cut-offs."""

import dataclasses
import json
import math
import re
import signal

import numpy as np
import pytest
import torch
from test_train import TINY, trainer

from vgkern.__main__ import main
from vgkern.errors import ConfigError, RunError, TaskError
from vgkern.tasks import checked_score, make_task
from vgkern.tasks.own import JsonlTask
from vgkern.train import Config, Entry, train
from vgkern.train.generate import Rollout, score
from vgkern.train.run import build

FILE = """
class Double:
    '''A number -> its double; each wrong answer costs a point.'''

    max_new = 4

    def __init__(self, seed=0, most=50):
        self.seed, self.most = seed, most

    def __getitem__(self, i):
        n = hash((str(self.seed), i, 7)) % self.most
        return f"{n}=", str(2 * n)

    def score(self, text, entry):
        return 1.0 if text == entry.answer else -1.0

    def wrong(self, entry):
        return "0"

def made(most=9):
    return Double(most=most)

class NoScore:
    max_new = 3
    def __getitem__(self, i):
        return "1=", "1"

class NoLength(Double):
    max_new = None

class Fails(Double):
    def __init__(self):
        raise RuntimeError("no network")

Three = 3
"""
SMALL = {"width": 32, "layers": 1, "heads": 2, "mlp": 48, "prompts": 4, "group": 4, "steps": 2,
         "eval_prompts": 4, "warm_target": 0.0}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tasks.py"
    path.write_text(FILE)
    return path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(n):
    return [{"question": f"{i}+1=", "answer": i + 1, "more": [i]} for i in range(n)]


def test_a_class_of_a_file_trains_from_the_command_line(file, tmp_path, capsys):
    flags = [word for k, v in SMALL.items() for word in ("--" + k.replace("_", "-"), str(v))]
    out = str(tmp_path / "run")
    options = ["--task", f"{file}:Double", "--task-options", '{"most": 40, "max_new": 3}']
    assert main(["train", *options, "--out", out, *flags]) == 0
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["reward"] == -1.0 for r in records if r["kind"] == "step")
    assert "Double" not in capsys.readouterr().err


def test_what_a_file_may_hold(file):
    task = make_task(f"{file}:Double", {"most": 20}, "train 3")
    assert task.name == "Double" and task.max_new == 4 and task.seed == "train 3"
    entry = task[5]
    assert isinstance(entry, Entry) and int(entry.answer) == 2 * int(entry.question[:-1])
    assert task.wrong(entry) == "0" and make_task(f"{file}:made", {"most": 5}, 0).max_new == 4
    assert make_task(f"{file}:Double", {"max_new": 9}, 0).max_new == 9
    assert not hasattr(task, "nothing")


WRONG = {
    "nothing.py:Double": r"task: got .*nothing.py'; allowed: a Python file",
    "{}:Triple": r"task: got .*Triple', nothing of that name; allowed: .*Double, made, NoScore",
    "{}:Three": r"task: got .*Three', a int; allowed: a class or function of the file",
    "{}:NoScore": r"task: got 'NoScore', a NoScore without score; allowed: an object with task",
    "{}:NoLength": r"max_new: got None from task 'NoLength'; allowed: an int >= 1",
    "{}:Fails": r"task .*:Fails: RuntimeError: no network",
}


@pytest.mark.parametrize("spec", WRONG)
def test_a_file_that_gives_no_task_is_one_line(file, spec, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=WRONG[spec]):
        train(Config(task=spec.format(file), out=str(out), **SMALL))
    assert not out.exists()


def test_a_file_that_does_not_import_and_options_it_does_not_take(file, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match=r"bad.py: ModuleNotFoundError: No module named"):
        make_task(f"{bad}:X", {}, 0)
    bad.write_text("def f(:\n")
    with pytest.raises(ValueError, match=r"bad.py: SyntaxError"):
        make_task(f"{bad}:X", {}, 0)
    with pytest.raises(ValueError, match=r"task_options: .*unexpected keyword argument 'least'"):
        make_task(f"{file}:Double", {"least": 3}, 0)


def test_a_jsonl_trains_and_its_splits_never_meet(tmp_path):
    path = jsonl(tmp_path / "sums.jsonl", pairs(300))
    splits = {s: make_task(path, {}, f"{s} 0") for s in ("held out", "validation", "train")}
    questions = {s: {t[i].question for i in range(t.count)} for s, t in splits.items()}
    assert sum(map(len, questions.values())) == len(set().union(*questions.values())) == 300
    assert 15 < len(questions["held out"]) < 50 and len(questions["train"]) > 220
    grown = make_task(jsonl(tmp_path / "more.jsonl", pairs(600)), {}, "held out 1")
    assert questions["held out"] <= {grown[i].question for i in range(grown.count)}
    task = splits["train"]
    first, second = ([task[e * task.count + i] for i in range(task.count)] for e in (0, 1))
    assert first != second and {e.question for e in first} == {e.question for e in second}
    assert task[0] == first[0]  # any order
    options = {"prompt": "{question}", "max_new": 4, "scorer": {"number": 0.5, "exact": 0.5}}
    config = Config(task=path, task_options=json.dumps(options), out=str(tmp_path / "run"), **SMALL)
    out = train(dataclasses.replace(config, eval_prompts=256))  # more than are held out
    held = splits["held out"].count
    assert f"score on {held} held-out prompts" in (out / "summary.txt").read_text()
    records = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    assert all(r["reward_number"] + r["reward_exact"] == pytest.approx(r["reward"]) for r in steps)


def test_examples_and_fields_of_a_jsonl(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"q": f"what is {i}", "a": str(i)} for i in range(200)])
    task = JsonlTask(path, {"question": "q", "answer": "a"}, "train 0", few_shot=2)
    shots = re.findall(r"Question: (what is \d+)\nAnswer: (\d+)\n\n", task[0].question)
    assert len(shots) == 2 and all(q == f"what is {a}" for q, a in shots)
    assert task[0].question.endswith("\nAnswer:") and task.score(task[0].answer, task[0]) == 1.0
    asked = {task[i].metadata["question"] for i in range(task.count)}
    assert not asked & {q for q, _ in shots}
    held = JsonlTask(path, {"question": "q", "answer": "a"}, "held out 0", few_shot=2)
    assert held[0].question.startswith(task[0].question[:40])


LINES = {
    '{"question": "a", "answer": "b"}\n{"question": ': r"line 2: got '.*'; allowed: a JSON object",
    '{"question": "a", "answer": "b"}\n\n{}': "line 2: got nothing",
    "[1]\n": "line 1: got list; allowed: a JSON object",
    '{"question": "a"}\n': "line 1: no field 'answer'; it has question",
    '{"question": "", "answer": "b"}': "line 1: question: got ''; allowed: text or a number",
    '{"question": "a", "answer": null}': "line 1: answer: got None",
    '{"question": "a", "answer": [1]}': r"line 1: answer: got \[1\]",
    '{"question": "a", "answer": 1}\n{"question": "a", "answer": 2}': "line 2: the question of",
    "": "line 1: got nothing",
    '{"question": "a", "answer": "b"}': "none of which falls to",
}


@pytest.mark.parametrize("text", LINES, ids=lambda t: repr(t)[:30])
def test_a_broken_jsonl_names_the_line(tmp_path, text):
    path, out = tmp_path / "data.jsonl", tmp_path / "run"
    path.write_text(text)
    with pytest.raises(ConfigError, match=LINES[text]):
        train(Config(task=str(path), out=str(out), **SMALL))
    assert not out.exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scorer": "judge"}, "scorer: got 'judge'; allowed: exact, number"),
        ({"prompt": "hello"}, "prompt: got 'hello'; allowed: text with {question}"),
        ({"max_new": 0}, "max_new: got 0; allowed: an int >= 1"),
        ({"answers": "x"}, "task_options: got 'answers'; allowed: scorer, question"),
    ],
)
def test_bad_options_of_a_jsonl(tmp_path, options, words):
    path = jsonl(tmp_path / "x.jsonl", pairs(100))
    with pytest.raises(ValueError, match=re.escape(words)):
        make_task(path, options, "train 0")
    with pytest.raises(ValueError, match="No such file"):
        make_task(str(tmp_path / "none.jsonl"), {}, "train 0")


def test_a_question_that_cannot_be_encoded_is_said_before_the_run_starts(tmp_path):
    rows = [*pairs(200), {"question": "A=", "answer": 1}]  # it falls to the training part
    path, out = jsonl(tmp_path / "x.jsonl", rows), tmp_path / "run"
    options = json.dumps({"prompt": "{question}"})
    with pytest.raises(ConfigError, match="character 'A' is unknown"):
        train(Config(task=path, task_options=options, out=str(out), **SMALL))
    assert not out.exists()


def test_the_curve_holds_scores_outside_0_and_1(file, tmp_path, monkeypatch):
    limits = []
    from matplotlib.axes import Axes

    real = Axes.set_ylim
    monkeypatch.setattr(Axes, "set_ylim", lambda *a, **k: limits.append(a[1:]) or real(*a, **k))
    train(Config(task=f"{file}:Double", out=str(tmp_path / "run"), **SMALL))
    low, high = limits[0]
    assert low < -1.0 and high > 1.0


class Pairs:
    """The least that a task is."""

    max_new = 3

    def __len__(self):
        return 60

    def __getitem__(self, i):
        return {"question": f"{i}=", "answer": i}

    def score(self, text, entry):
        return len(text) / 3


def test_an_object_trains(tmp_path):
    config = Config(out=str(tmp_path / "run"), **SMALL)
    out = train(config, task=Pairs())
    assert (out / "final" / "model.safetensors").exists()
    made, _, _ = build(config, Pairs())
    held = {e.question for e in made.held_out}
    assert len(held) == 4 and not held & {e.question for e in made.stream.take(300)}
    seeds = []
    build(config, lambda seed: seeds.append(seed) or Pairs())
    assert seeds == ["held out 0", "validation", "train 0", "warm 0"]
    with pytest.raises(ConfigError, match="task: got 'int', a int without __getitem__"):
        train(config.__class__(out=str(tmp_path / "no"), **SMALL), task=3)


NUMBERS = [1, True, -2.5, np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor(2.0)]


@pytest.mark.parametrize("x", NUMBERS, ids=repr)
def test_any_real_number_is_a_score(x):
    class One(Pairs):
        name = "one"

        def score(self, text, entry):
            return x

    assert checked_score(One(), "t", Entry("q", "a")) == (float(x), {}, False)


def test_parts_are_added_and_logged_and_none_teaches_nothing():
    made = trainer()
    entries, _, rollout = made.sample(1)

    def parts(text, entry, count=[0]):  # noqa: B006
        count[0] += 1
        return None if count[0] % 4 == 1 else {"right": count[0] % 3, "short": np.float64(0.25)}

    made.task.score = parts
    rollout = rollout._replace(finished=torch.ones(16, dtype=torch.bool))
    rewards = made.score(entries, rollout)
    assert rewards.isnan().tolist() == [i % 4 == 0 for i in range(16)]
    right = [i % 3 for i in range(1, 17) if i % 4 != 1]
    assert made.reward_parts == {"reward_right": sum(right) / 12, "reward_short": 0.25}
    with pytest.raises(TaskError, match="score returned"):
        made.task.score = lambda *_: {"a": math.nan}
        made.score(entries, rollout)


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_sample_that_teaches_nothing_is_as_if_it_had_not_been_drawn(objective, beta):
    """The gradient is that of the others alone, computed without any of the trainer's batching."""
    made = trainer(objective=objective, beta=beta)
    _, prompts, rollout = made.sample(1)
    rewards = torch.arange(16.0) % 3
    none = torch.tensor([2, 5, 6, 8, 9, 10, 15])  # of the third group one is left: it goes too
    rewards[none] = torch.nan
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the reference, where the KL has a gradient
        for p in made.policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    batch = made.batch(prompts, rollout, rewards)
    made.gradient(batch, True)
    got = [p.grad.clone() for p in made.policy.parameters()]
    alive = ~rewards.isnan()
    alive[11] = False
    total = [torch.zeros_like(g) for g in got]
    denominator = made.normalizer(rollout._replace(teaches=alive))
    ids = torch.arange(4).repeat_interleave(4)
    advantages = torch.zeros(16)
    advantages[alive] = made.advantages(rewards[alive], ids[alive])
    for row in alive.nonzero()[:, 0].tolist():
        one = torch.tensor([row])
        part = made.parts.config
        made.parts.config = dataclasses.replace(part, group=2)  # the trainer has no group of one
        made.optimizer.zero_grad()
        twice = rollout.select(one.repeat(2))
        loss = made.parts.loss([prompts[row // 4]], twice, advantages[one.repeat(2)],
                               2 * denominator, True).loss  # fmt: skip
        loss.backward()
        made.parts.config = part
        total = [t + p.grad for t, p in zip(total, made.policy.parameters(), strict=True)]
    if beta == 0.0:  # an analytic KL has a baseline over the group, which one row has not
        for g, t in zip(got, total, strict=True):
            torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-6)
    changed = rollout._replace(tokens=rollout.tokens.clone())
    changed.tokens[none] = (changed.tokens[none] + 1) % 40
    made.gradient(made.batch(prompts, changed, rewards), True)
    for g, p in zip(got, made.policy.parameters(), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)


def ran_on(task, texts, **how):
    rollout = Rollout(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2),
                      torch.tensor([True, False]))  # fmt: skip
    return [r.value for r in score(task, texts, [Entry("q", "a")], rollout, **how)]


def test_running_on_is_never_better_than_answering_wrongly():
    class Strict(Pairs):
        name = "strict"

        def score(self, text, entry):
            return 1.0 if text == entry.answer else -1.0

    class Kind(Strict):
        def score(self, text, entry):
            return float(len(text))

    assert ran_on(Strict(), ["b", "bbbb"]) == [-1.0, -1.0]
    assert ran_on(Strict(), ["a", "a"]) == [1.0, -1.0]  # right by chance, and still running
    assert ran_on(Kind(), ["aa", "aaaa"]) == [2.0, 0.0]
    assert ran_on(Strict(), ["a", "b"], cut_off="value", value=-3.0) == [1.0, -3.0]

    class Silent(Kind):
        def score(self, text, entry):
            return float(len(text)) if text else None

    assert ran_on(Silent(), ["aa", "aaaa"]) == [2.0, 0.0]
    masked = ran_on(Strict(), ["a", "b"], cut_off="mask")
    assert masked[0] == 1.0 and math.isnan(masked[1])


def test_a_reward_that_hangs_is_ended_counted_and_named():
    class Hangs(Pairs):
        name = "hangs"

        def score(self, text, entry):
            if text == "bomb":
                while True:
                    pass
            return 1.0 if text else -1.0

    before, alarm = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    assert checked_score(Hangs(), "bomb", Entry("q", "a"), 0.05) == (-1.0, {}, True)
    assert checked_score(Hangs(), "x", Entry("q", "a"), 0.05) == (1.0, {}, False)
    assert signal.getsignal(signal.SIGALRM) is before
    assert alarm - 1 < signal.getitimer(signal.ITIMER_REAL)[0] <= alarm + 1  # pytest's own
    made = trainer(score_seconds=0.05)
    made.task = Hangs()
    entries, _, rollout = made.sample(1)
    rollout = rollout._replace(finished=torch.ones(16, dtype=torch.bool))
    texts = iter(["x"] * 6 + ["bomb"] + ["x"] * 9)
    made.tokenizer.decode = lambda ids: next(texts)
    rewards = made.score(entries, rollout)
    assert rewards.tolist() == [1.0] * 6 + [-1.0] + [1.0] * 9 and made.reward_parts == {"late": 1}
    assert f"over 'bomb', question {entries[1].question!r}" in made.log.lines[0]


def test_cut_off_in_a_run(tmp_path):
    """Masked: what ran on is in no gradient; the share that taught is in the metrics."""
    knobs = {"cut_off": "mask", "out": str(tmp_path / "run")}
    out = train(dataclasses.replace(TINY, **knobs))
    records = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    assert all(r.get("taught", 1.0) == pytest.approx(1 - r["cut_off"]) for r in steps)
    assert any(r["cut_off"] > 0 for r in steps)
    with pytest.raises(ConfigError, match=r"cut_off_value: got -1.0, which does nothing under"):
        dataclasses.replace(TINY, cut_off_value=-1.0)
    with pytest.raises(ConfigError, match="cut_off: got 'zero'; allowed: 'score', 'value', 'mask'"):
        dataclasses.replace(TINY, cut_off="zero")


def test_every_error_here_is_one_that_the_command_shows_as_a_line(tmp_path, capsys):
    assert issubclass(ConfigError, RunError)
    assert main(["train", "--task", "no.py:Task", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vgkern train: task: got 'no.py'") and err.count("\n") == 1
