"""Tasks: entries by index, scores that are numbers, a split that never overlaps."""

import math

import pytest

from vgkern.errors import TaskError
from vgkern.tasks import (
    BUILT_IN,
    Entry,
    Stream,
    checked_score,
    make_task,
)
from vgkern.train.tokenizer import CharTokenizer


@pytest.mark.parametrize("name", BUILT_IN)
def test_entries_are_a_function_of_seed_and_index(name):
    task, again = make_task(name, {}, 7), make_task(name, {}, 7)
    assert [task[i] for i in (5, 0, 3)] == [again[i] for i in (5, 0, 3)]
    assert len({task[i].question for i in range(200)}) > 190
    assert [task[i] for i in range(20)] != [make_task(name, {}, 8)[i] for i in range(20)]


@pytest.mark.parametrize("name", BUILT_IN)
def test_answers_score_and_wrong_ones_do_not(name):
    task, tokenizer = make_task(name, {}, 0), CharTokenizer()
    for i in range(100):
        entry = task[i]
        assert task.score(entry.answer, entry) == 1.0
        assert task.score(entry.answer + "0", entry) == 0.0
        assert len(tokenizer.encode(entry.answer)) < task.max_new
        assert tokenizer.decode(tokenizer.encode(entry.question)) == entry.question
    wrong = [task.score(task.wrong(task[i]), task[i]) for i in range(100)]
    assert sum(wrong) < 20  # a sum without carries is right now and then


def test_known_answers():
    assert make_task("sort", {}, 0).wrong(Entry("312=", "123")) == "321"
    addition = make_task("addition", {}, 0)
    entry = addition[0]
    a, b = entry.question[:-1].split("+")
    assert entry.answer[::-1] == str(int(a) + int(b))
    assert addition.wrong(Entry("199+101=", "003")) == "092"


def test_unknown_task_and_option_are_named():
    with pytest.raises(ValueError, match="task: got 'srot'; allowed: sort"):
        make_task("srot", {}, 0)
    with pytest.raises(ValueError, match=r"task_options: got {'size': 3}"):
        make_task("sort", {"size": 3}, 0)
    with pytest.raises(ValueError, match="min_length, max_length: got 9, 8"):
        make_task("sort", {"min_length": 9}, 0)


class Broken:
    name, max_new = "broken", 3

    def __init__(self, result):
        self.result = result

    def __getitem__(self, index):
        return Entry("q", "a")

    def score(self, text, entry):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


BAD = (KeyError("x"), math.nan, math.inf, "1", [1.0], 1 + 2j, {}, {"a": "1"}, {2: 1.0})


@pytest.mark.parametrize("result", BAD)
def test_a_score_that_is_no_number_names_the_sample(result):
    with pytest.raises(TaskError, match=r"task 'broken', question 'q', completion 'text': score"):
        checked_score(Broken(result), "text", Entry("q", "a"))


@pytest.mark.parametrize("result", [1, True, 0.5])
def test_a_score_that_is_a_number_passes(result):
    assert checked_score(Broken(result), "text", Entry("q", "a")) == (float(result), {}, False)


def test_stream_excludes_questions_and_resumes_at_its_cursor():
    task = make_task("sort", {"min_length": 1, "max_length": 1}, 0)
    stream = Stream(task, frozenset({"3=", "4="}))
    seen = {entry.question for entry in stream.take(200)}
    assert len(seen) == 8 and not seen & {"3=", "4="}
    first, cursor = stream.take(3), stream.cursor
    assert Stream(task, stream.exclude, cursor).take(3) == stream.take(3) != first


def test_stream_says_when_a_task_is_too_small():
    with pytest.raises(TaskError, match="too few different questions: found 10 of 11"):
        Stream(make_task("sort", {"min_length": 1, "max_length": 1}, 0)).take(11, distinct=True)


def test_tokenizer_names_an_unknown_character():
    with pytest.raises(ValueError, match="character '!' is unknown"):
        CharTokenizer().encode("12!")
