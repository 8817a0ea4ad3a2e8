"""Tasks of one's own: a file, a JSONL of questions, an object; scores of every kind; cut-offs."""

import dataclasses
import json
import re

import pytest

from vgkern.__main__ import main
from vgkern.errors import ConfigError, RunError
from vgkern.tasks import make_task
from vgkern.tasks.own import JsonlTask
from vgkern.train import Config, Entry, train
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

    class Listed(Pairs):
        entries = [{"question": "1=", "answer": 1}]  # noqa: RUF012  (theirs, not ours to read)

    assert build(config, Listed())[0].task.count == 60
    seeds = []
    build(config, lambda seed: seeds.append(seed) or Pairs())
    assert seeds == ["held out 0", "validation", "train 0", "warm 0"]
    with pytest.raises(ConfigError, match="task: got 'int', a int without __getitem__"):
        train(config.__class__(out=str(tmp_path / "no"), **SMALL), task=3)


def test_every_error_here_is_one_that_the_command_shows_as_a_line(tmp_path, capsys):
    assert issubclass(ConfigError, RunError)
    assert main(["train", "--task", "no.py:Task", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vgkern train: task: got 'no.py'") and err.count("\n") == 1
