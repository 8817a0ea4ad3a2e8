"""The driver of the run on a GPU: what goes wrong in a phase shows in the exit status, in gpu.jsonl
and in table.txt, and costs that phase only."""

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu, gpu_report = import_module("gpu"), import_module("gpu_report")

WRITE = """
import json, sys
sys.path.insert(0, "benchmarks")
import gpu_report
with open(sys.argv[1] + "/gpu.jsonl", "a") as file:
    file.write(json.dumps(gpu_report.fact(*json.loads(sys.argv[2]))) + "\\n")
"""
HANG = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + "/pid", "w").write(str(child.pid))
print("it begins", flush=True)
with open(sys.argv[1] + "/gpu.jsonl", "a") as file:
    file.write('{"phase": "hang", "op": "half a li')
time.sleep(600)
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """plant(name, code, *arguments, limit): a phase that runs this code."""
    monkeypatch.setattr(gpu, "SPARE", 0)
    monkeypatch.setattr(gpu, "LEAST", 0)

    def plant(name, code, *arguments, limit=60):
        command = (sys.executable, "-c", code, str(tmp_path), *arguments)
        return gpu.Phase(name, limit, command=command)

    return plant


def good(plant, name="good"):
    return plant(name, WRITE, json.dumps([name, "checked", 1, True, ""]))


def ran(out, phases, budget=120, resume=False):
    """(exit status, facts, table)."""
    status = gpu.run(out, phases, budget, dry=True, resume=resume)
    return status, gpu_report.read(out / "gpu.jsonl"), (out / "table.txt").read_text()


def row(facts, phase, metric="phase"):
    (found,) = [f for f in facts if f["phase"] == phase and f["metric"] == metric]
    return found


def test_all_well(planted, tmp_path):
    status, facts, table = ran(tmp_path, [good(planted)])
    assert status == 0 and row(facts, "good")["ok"] and row(facts, "good", "checked")["ok"]
    assert "FAILED" not in table


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise RuntimeError('an illegal memory access')", "an illegal memory access"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import sys; sys.exit(7)", "ended with 7"),
    ],
)
def test_a_phase_that_crashes(code, why, planted, tmp_path):
    status, facts, table = ran(tmp_path, [planted("bad", code), good(planted)])
    assert status == 1 and why in row(facts, "bad")["why"] and row(facts, "bad")["ok"] is False
    assert row(facts, "good")["ok"]  # it cost itself only
    assert "FAILED" in table and why in table


def test_a_phase_that_hangs_is_killed_with_its_children(planted, tmp_path):
    began = time.monotonic()
    status, facts, table = ran(tmp_path, [planted("hang", HANG, limit=1.5), good(planted)])
    assert status == 1 and time.monotonic() - began < 30
    assert "killed at its limit" in row(facts, "hang")["why"]
    assert "killed at its limit" in table
    child = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"
    assert row(facts, "good")["ok"]  # a line that was half written hides no other
    assert "it begins" in (tmp_path / "log.txt").read_text()


def test_a_check_that_fails(planted, tmp_path):
    bad = planted(
        "smoke", WRITE, json.dumps(["smoke", "error_ratio", 3.5, False, "dweight is off"])
    )
    status, facts, table = ran(tmp_path, [bad])
    assert status == 1 and row(facts, "smoke")["ok"]  # the phase itself ended well
    assert row(facts, "smoke", "error_ratio")["value"] == 3.5
    assert "FAILED" in table and "dweight is off" in table and "0 of 1 checks hold" in table


def test_a_time_never_fails(planted, tmp_path):
    slow = planted("timing", WRITE, json.dumps(["timing", "ms", 1e9, None, ""]))
    assert ran(tmp_path, [slow])[0] == 0


@pytest.mark.parametrize("kind", ["skip", "fail", "pass", "none", "broken"])
def test_a_gpu_test_that_skips_is_a_failure(kind, tmp_path, monkeypatch):
    body = {"skip": "pytest.skip('no kernels here')", "fail": "assert not 'equal'", "pass": "pass",
            "none": "pass", "broken": "pass"}[kind]  # fmt: skip
    name = "unfound" if kind == "none" else "test_planted"
    start = "import nothing_of_that_name\n" if kind == "broken" else ""
    planted = tmp_path / "test_planted.py"
    planted.write_text(f"{start}import pytest\ndef {name}():\n    {body}\n")
    monkeypatch.setenv("VGKERN_GPU_TESTS", str(planted))
    (phase,) = [p for p in gpu.PHASES if p.name == "parity"]
    monkeypatch.setattr(gpu_report, "expected", lambda phase: [])
    out = tmp_path / "out"
    status, facts, table = ran(out, [phase])
    assert (status == 0) == (kind == "pass")
    bad = [f for f in facts if f["ok"] is False]
    if kind == "skip":
        assert row(facts, "parity", "skipped")["value"] == 1
        assert "no kernels here" in table and "FAILED" in table
    assert bool(bad) == (kind != "pass")


def test_a_phase_that_measures_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "expected", lambda phase: [f"{phase} | an op |  |  | a metric"])
    run = gpu.Run(tmp_path, 60, dry=True)
    run.start(False, [])
    run.missing("smoke")
    (found,) = gpu_report.read(tmp_path / "gpu.jsonl")
    assert found["metric"] == "missing" and found["ok"] is False and "an op" in found["why"]


def test_resumed_it_leaves_out_what_ended_well(planted, tmp_path):
    mark = "import sys; open(sys.argv[1] + '/again', 'a').write('x'); sys.exit(5)"
    first, second = good(planted), planted("bad", mark)
    assert ran(tmp_path, [first, second])[0] == 1
    repaired = good(planted, "bad")
    status, facts, _ = ran(tmp_path, [first, repaired], resume=True)
    assert status == 0 and len([f for f in facts if f["phase"] == "good"]) == 2
    assert (tmp_path / "again").read_text() == "x"


def test_without_time_a_phase_is_not_begun(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 3)
    status, facts, table = ran(tmp_path, [good(planted)], budget=1)
    assert status == 1 and "no time left" in row(facts, "good")["why"] and "no time left" in table


def test_a_flood_of_output_is_cut(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 1 << 16)
    flood = planted("flood", "while True: print('x' * 1000)")
    status, facts, _ = ran(tmp_path, [flood])
    assert status == 1 and "to the log" in row(facts, "flood")["why"]
    assert (tmp_path / "log.txt").stat().st_size <= 1 << 16


def test_two_phases_run_side_by_side(planted, tmp_path):
    wait = "import time; time.sleep(1.5)"
    both = [planted("a", wait), planted("b", wait)._replace(beside=True)]
    began = time.monotonic()
    assert ran(tmp_path, both)[0] == 0
    took = [row(gpu_report.read(tmp_path / "gpu.jsonl"), p)["value"] for p in "ab"]
    assert time.monotonic() - began < sum(took)


def test_where_torch_sees_no_gpu(planted, tmp_path, capsys):
    status, facts, _ = ran(tmp_path, [planted("facts", "import sys; sys.exit(3)"), good(planted)])
    assert status == 2 and not [f for f in facts if f["phase"] == "good"]
    assert "torch sees no GPU" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "unable", lambda: "this machine has no NVIDIA GPU")
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines() == ["make gpu: this machine has no NVIDIA GPU"]
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--phases", "smoke,nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_a_small_budget_does_the_first_half(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "unable", lambda: "")
    monkeypatch.setattr(gpu, "run", lambda out, phases, *_: asked.append(phases) or 0)
    gpu.main(["--out", str(tmp_path), "--budget", "200"])
    gpu.main(["--out", str(tmp_path)])
    assert tuple(p.name for p in asked[0]) == gpu.FIRST_HALF and asked[1] == list(gpu.PHASES)


def test_what_is_compiled_goes_to_a_private_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    folder = gpu.cache_of(tmp_path)
    try:
        assert folder == gpu.cache_of(tmp_path) and folder.stat().st_mode & 0o077 == 0
        env = gpu.environment(False, folder)
        assert "TRITON_INTERPRET" not in env and env["TRITON_CACHE_DIR"].startswith(str(folder))
        os.chmod(folder, 0o755)
        assert gpu.cache_of(tmp_path) != folder
    finally:
        gpu.shutil.rmtree(folder)
