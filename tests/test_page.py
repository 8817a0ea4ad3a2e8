"""report.html: everything of a run on one page, well formed, and what the model wrote is text."""

import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import pytest
from test_train import TINY

from vgkern.train import run
from vgkern.train.config import Config
from vgkern.train.log import Log
from vgkern.train.page import curve, page

VOID = {"meta", "br"}
OPEN_ENDED = {"td", "th", "tr", "html"}  # HTML closes them itself


class Reader(HTMLParser):
    """Tags, attributes and text; raises where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert not [t for t in self.stack if t not in OPEN_ENDED], self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID | OPEN_ENDED and not (self.get_starttag_text() or "").endswith("/>"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in OPEN_ENDED:
            assert self.stack.pop() == tag, (tag, self.stack)

    def handle_data(self, data):
        self.text.append(data)


def test_a_run_leaves_its_page(tmp_path):
    out = run.train(dataclasses.replace(TINY, out=str(tmp_path / "run")))
    text = (out / "report.html").read_text()
    found = Reader(text)
    shown = " ".join(found.text)
    summary = (out / "summary.txt").read_text()
    assert "sort: score on 8 held-out prompts" in shown and "before and after RL" in summary
    for caption in ("Score", "Gradient norm", "Time of a step, ms"):
        assert caption in shown
    for setting, value in (("width", "32"), ("lr", "0.001"), ("objective", "'grpo'")):
        assert re.search(rf"<td>{setting}<td>{html.escape(value)}<td>", text), setting
    assert text.index("<td>width<td>32") < text.index("<td>objective<td>")  # changed ones first
    records = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert found.tags.count("polyline") >= 8 and sum(r["kind"] == "eval" for r in records) == 3
    points = re.search(r"points='([^']*)'><title>held out, sampled", text).group(1).split()
    assert len(points) == 3


def test_nothing_is_loaded_run_or_taken_for_markup(tmp_path):
    bad = "</table><script>alert(1)</script><img src=x onerror=y>&amp;'\"\x00\ud7ff"
    rows = [("question", "answer", "before", "after"), (bad, bad, bad, bad)]
    log = Log(tmp_path)
    log.record("eval", step=0, sampled=0.1, greedy=0.2)
    log.record("step", step=1, reward=float("nan"), length=3.0)
    text = page(dataclasses.replace(Config(), task="sort"), log, [bad], rows)
    found = Reader(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(found.tags)
    assert not [n for n, _ in found.attributes if n.startswith("on") or n in ("src", "href")]
    assert "url(" not in text and "http" not in text and "@import" not in text
    assert sum(bad.split("\x00")[0] in t for t in found.text) >= 4


@pytest.mark.parametrize("points", [[(1, 2.0)], [(0, 1.0), (5, 1.0)], [(0, -3.0), (2, 9.0)]])
def test_curves_stay_inside_their_frame(points):
    drawn = re.search(r"points='([^']*)'", curve("x", [("a", points)])).group(1)
    for pair in drawn.split():
        x, y = map(float, pair.split(","))
        assert 44 <= x <= 628 and 12 <= y <= 192
    whole = curve("Score", [("a", points)])
    assert re.search(r">1<|>2<|>9<", whole)  # the top of the axis is labelled
