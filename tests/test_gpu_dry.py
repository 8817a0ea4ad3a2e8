"""`make gpu-dry`: the run for a GPU goes through every phase on a machine without one."""

import csv
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib import import_module
from pathlib import Path

import conftest
import pytest
from emulation import build as emulation

import vgkern
from vgkern import cases
from vgkern.gpu import __main__ as command
from vgkern.gpu import calls

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu, gpu_report = import_module("gpu"), import_module("gpu_report")
FILES = {"gpu.jsonl", "table.txt", "log.txt", "pytest.xml", "profile.json", "train.csv",
         "kernels.json"}  # fmt: skip
KEYS = {"phase", "op", "backend", "dtype", "shape", "metric", "value", "floor", "ok", "why"}
pytestmark = pytest.mark.skipif(conftest.INTERPRETED, reason="it starts its own interpreters")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A whole dry run: (its folder, exit status, what it printed)."""
    why = emulation.missing()
    if why and not (os.environ.get("CI") or shutil.which("nvcc")):
        pytest.skip(f"the CUDA kernels cannot be emulated: {why}")
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry", "--out", str(out)],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return out, done.returncode, done.stdout + done.stderr


pytestmark = [pytestmark, pytest.mark.timeout(900)]


def facts(dry):
    return [json.loads(line) for line in (dry[0] / "gpu.jsonl").read_text().splitlines()]


def test_every_check_holds(dry):
    bad = [f for f in facts(dry) if f["ok"] is False]
    assert not bad, bad[:5]
    assert dry[1] == 0, dry[2]
    ended = {f["phase"] for f in facts(dry) if f["metric"] == "phase"}
    assert ended == set(command.PHASES)
    assert all(set(f) == KEYS for f in facts(dry))


def test_its_files(dry):
    assert {p.name for p in dry[0].iterdir()} == FILES
    assert all(p.stat().st_size < 16 << 20 for p in dry[0].iterdir())
    assert json.loads((dry[0] / "kernels.json").read_text())["kernels"]
    assert len(json.loads((dry[0] / "profile.json").read_text())) == 4
    assert len(list(csv.DictReader((dry[0] / "train.csv").open()))) == 2
    assert len(list(ET.parse(dry[0] / "pytest.xml").iter("testcase"))) == 2


def test_it_measures_what_every_run_must(dry):
    """vgkern/gpu/expected.py names it: no more and no less than this run wrote. After a change that
    is meant: `python benchmarks/gpu.py names DIR`, DIR of a dry run."""
    listed = {n for phase in command.PHASES for n in gpu_report.expected(phase)}
    found = {
        gpu_report.name_of(f)
        for f in facts(dry)
        if f["metric"] != "phase"
        and (not f"{f['op']} ".startswith(gpu_report.OPTIONAL) or f["metric"] == "steps")
    }
    assert found == listed and len(listed) > 300


def test_it_covers_every_op_on_every_backend(dry):
    ops = {c.op for c in cases.CASES}
    assert set(calls.CASES) == ops <= set(vgkern.__all__)
    for metric in ("error_ratio", "waits", "graph", "side_stream", "fullgraph"):
        got = {(f["op"], f["backend"]) for f in facts(dry) if f["metric"] == metric}
        want = {(op, b) for op in ops for b in ("triton", "cuda")} - conftest.LACKS
        assert got == want, metric
    drawn = {(f["backend"], f["metric"]) for f in facts(dry) if f["phase"] == "tokens"}
    for mode in ("plain", "greedy", "cut"):
        assert {(b, f"differ_{mode}") for b in ("cpu", "triton", "cuda", "torch")} <= drawn


def test_the_table_says_that_it_is_dry_and_shows_predictions(dry):
    text = (dry[0] / "table.txt").read_text()
    assert text.startswith("DRY RUN")
    for prediction in gpu_report.predictions():
        assert prediction["shape"] in text
    assert "predicted" in text and "not measured" in text
    with pytest.raises(SystemExit, match="dry run"):
        gpu_report.gpu_name(facts(dry))


def test_phases_are_modules():
    assert tuple(p.name for p in gpu.PHASES) == command.PHASES
    assert all((ROOT / "vgkern" / "gpu" / f"{p}.py").is_file() for p in command.PHASES)
    assert sum(p.limit for p in gpu.PHASES if not p.beside) < 540 + gpu.SPARE
