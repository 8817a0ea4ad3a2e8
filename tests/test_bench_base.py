"""`bench --base`: a process that dies costs its own row, and what was measured is on disk."""

import contextlib
import json

import pytest
from bench_fakes import CPU, RATES, TINY, report, row

from vgkern.bench import base, cli
from vgkern.bench import run as run_
from vgkern.bench.plan import Options

COMMIT = "0123456789abcdef"
# Speaks what worker.py speaks. Rows 13 kill the side that has a file `dies`, rows 14 are refused.
WORKER = """
import json, os, sys
rows = 0
for line in sys.stdin:
    order = json.loads(line)
    answer = {"where": os.path.join(os.getcwd(), "vgkern"), "seconds": 0.01}
    rows = order["work"]["rows"] if order["do"] == "start" else rows
    if order["do"] == "sample" and rows == 13 and os.path.exists("dies"):
        os._exit(9)
    if order["do"] == "start" and rows == 14:
        answer = {"error": "ValueError: not 14"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def trees(tmp_path, monkeypatch):
    """Two folders that stand for the two versions; nothing is timed."""
    found = {name: tmp_path / name for name in ("base", "this")}
    for tree in found.values():
        tree.mkdir()
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(base, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(base, "ROOT", found["this"])
    monkeypatch.setattr(base.roof, "measure", lambda *_: dict(RATES))
    monkeypatch.setattr(base.machine, "git", lambda *_: COMMIT)

    @contextlib.contextmanager
    def checkout(ref):
        yield found["base"], COMMIT

    monkeypatch.setattr(base, "checkout", checkout)
    return found


def run(monkeypatch, tmp_path, *rows):
    monkeypatch.setattr(base, "plan", lambda *_: [TINY.replace(rows=n) for n in rows])
    code = base.run("main", Options(device=CPU), 1.1, tmp_path / "out")
    return code, json.loads((tmp_path / "out" / "base.json").read_text())["rows"]


@pytest.mark.parametrize(("side", "code"), [("base", 0), ("this", 1)])
def test_a_process_that_dies_costs_one_row(side, code, trees, tmp_path, monkeypatch, capsys):
    """The others are measured, before and after; only a failure of this tree is a regression."""
    (trees[side] / "dies").touch()
    ended, rows = run(monkeypatch, tmp_path, 16, 13, 14, 32)
    assert [r["rows"] for r in rows] == [16, 13, 14, 32]
    why = {13: f"{side}: its process ended with 9", 14: "base: ValueError: not 14"}
    assert [r.get("failed") for r in rows] == [None, why[13], why[14], None]
    assert [r.get("ratio") for r in rows] == [1.0, None, None, 1.0] and ended == code
    said = capsys.readouterr()
    assert why[13] in said.out and why[14] in said.out
    assert "2 groups, 0 slower" in said.out and "\n2 failed\n" in said.out
    assert str(tmp_path / "out" / "base.json") in said.out


def test_the_file_is_whole_after_every_row(trees, tmp_path, monkeypatch):
    seen, one = [], base._one
    path = tmp_path / "out" / "base.json"

    def look(*arguments):
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else None)
        return one(*arguments)

    monkeypatch.setattr(base, "_one", look)
    run(monkeypatch, tmp_path, 16, 14, 32)
    assert seen == [None, 1, 2] and not list(path.parent.glob("*.part"))


def test_nothing_measured_is_2(trees, tmp_path, monkeypatch):
    assert run(monkeypatch, tmp_path, 14)[0] == 2


def test_a_version_that_does_not_start_is_said(trees, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match="--base: base: its process ended with 3"):
        run(monkeypatch, tmp_path, 16)


def test_an_order_to_a_dead_process_fails_and_it_still_closes(trees):
    side = base.Process("this", trees["this"], "torch")
    side.process.kill()
    side.process.wait()
    with pytest.raises(base.Failed, match="this: its process ended with -9"):
        side.ask("sample", calls=1)
    side.close()


@pytest.mark.parametrize("name", ["bench", "base"])
def test_ctrl_c_says_what_was_kept(name, tmp_path, monkeypatch, capsys):
    """Rows of this run that are in the file, by number; not those of a run before it."""
    path, kept = tmp_path / f"{name}.json", []

    def interrupted(*_):
        if kept:
            report(kept).write(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(base if name == "base" else run_, "run", interrupted)
    arguments = ["--out", str(tmp_path), *(["--base", "main"] if name == "base" else [])]

    def said():
        assert cli.main(arguments) == 130
        return capsys.readouterr().err

    assert "interrupted; nothing was written" in said()
    report([row()]).write(path)
    assert "interrupted; nothing was written" in said()
    kept += [row(), row(variant="TRL")]
    assert f"interrupted; 2 rows are in {path}" in said()
