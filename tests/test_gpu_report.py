"""The table of a run on a GPU, the results that are kept, and the sections of the pages."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu_report = import_module("gpu_report")
LARGE = "8192x4096x131072"


def fact(phase, op, metric, value, backend="", dtype="", shape="", floor=None, ok=None, why=""):
    return {"phase": phase, "op": op, "backend": backend, "dtype": dtype, "shape": shape,
            "metric": metric, "value": value, "floor": floor, "ok": ok, "why": why}  # fmt: skip


def loss(metric, op="linear_policy_loss", **values):
    at = ("bf16", LARGE, 30.0)
    return [fact("timing", op, metric, v, k.replace("_", " "), *at) for k, v in values.items()]


FACTS = [
    fact("facts", "machine", "gpu", "NVIDIA H100 80GB HBM3"),
    fact("facts", "version", "torch", "2.11.0"),
    fact("facts", "version", "triton", "3.6.0"),
    *loss("ms", **{"3_gemms": 36.0, "triton": 45.0, "eager": 54.0}),
    *loss("ms", "linear_policy_loss others", triton=46.0, compile=69.0, Liger=None),
    *loss("device_ms", triton=41.5),
    *loss("peak_MiB", triton=4000.0, eager=9000.0),
    fact("smoke", "linear_sample", "nan_stays", 2, "cuda", "bf16", ok=False, why="rows moved"),
    fact("smoke", "token_logprobs", "error_ratio", 1.25, "cuda", "bf16", "odd", 2.0, ok=True),
    fact("smoke", "", "phase", 12.0, ok=True),
]


def test_the_table_holds_measurements_beside_predictions():
    text = gpu_report.table(FACTS)
    (line,) = [x for x in text.splitlines() if LARGE in x and " ms " in x and "MISSED" in x]
    assert line.split()[:7] == ["linear_policy_loss", "triton", LARGE, "ms", "42", "45", "1.07"]
    (line,) = [x for x in text.splitlines() if LARGE in x and "peak_MiB" in x and " met " in x]
    assert "4608" in line and "4000" in line
    start = ["linear_policy_loss", LARGE, "bf16", "triton"]
    found = [x.split() for x in text.splitlines() if x.split()[:4] == start]
    assert [*start, "45", "41.5", "1.38", "1.25", "0.83", "42"] in found
    assert text.index("FAILED") < text.index("rows moved") < text.index("TIMES")
    assert "1 of 2 checks hold" in text


def test_a_run_becomes_results_and_the_section(tmp_path, monkeypatch):
    run, results, page = tmp_path / "run", tmp_path / "results", tmp_path / "page.md"
    run.mkdir()
    (run / "gpu.jsonl").write_text("".join(json.dumps(f) + "\n" for f in FACTS))
    begin, end = gpu_report.BEGIN, gpu_report.END
    front = tmp_path / "front.md"
    for target in (page, front):
        target.write_text(f"before\n{begin}\nstale words\n{end}\nafter\n")
    monkeypatch.setattr(gpu_report, "RESULTS", results)
    monkeypatch.setattr(gpu_report, "README", front)
    monkeypatch.setattr(gpu_report, "PAGE", page)
    assert gpu_report.report(str(run)) == 0
    kept = results / "nvidia-h100-80gb-hbm3"
    assert (kept / "gpu.jsonl").read_text() == (run / "gpu.jsonl").read_text()
    assert (kept / "table.txt").read_text() == gpu_report.table(FACTS)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "**Measured on one NVIDIA H100 80GB HBM3**" in text and "No GPU has run" not in text
    assert (
        "| (8192, 4096, 131072) | 45 | 41.5 | 42 | 1.25 | 1.20 | 1.50 | - | 4000 (9000) |" in text
    )
    assert "Failed there: linear_sample nan_stays" in text
    few = front.read_text()
    assert few.startswith("before\n") and few.endswith("after\n") and "stale" not in few
    for words in ("1 of 2 checks hold", "45 ms", "0.83 of plain", "0.44 of its memory"):
        assert words in few
    assert len(few.splitlines()) < 16


def test_without_a_run_there_is_no_report(tmp_path):
    with pytest.raises(SystemExit, match="no facts"):
        gpu_report.report(str(tmp_path))


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(SystemExit, match="not both there"):
        gpu_report.with_section("no marks", "text")


def test_without_results_the_section_says_that_nothing_was_measured(tmp_path):
    text = gpu_report.section(tmp_path)
    assert "No GPU has run this code yet" in text and "make gpu OUT=dir" in text
    few = gpu_report.brief(tmp_path)
    assert "No GPU has run this code yet" in few and "Not verified" in few


def test_a_run_without_timings_is_still_a_sentence():
    said = gpu_report.sentence([f for f in FACTS if f["phase"] != "timing"])
    assert said.endswith("1 of 2 checks hold.")


@pytest.mark.parametrize("name", ["brief", "section"])
def test_the_pages_are_what_the_results_say(name):
    """After `benchmarks/gpu.py report DIR` or a change of words: `benchmarks/gpu.py readme`."""
    page = {"brief": gpu_report.README, "section": gpu_report.PAGE}[name].read_text()
    assert page == gpu_report.with_section(page, getattr(gpu_report, name)())


def test_kept_results_have_their_table():
    for path in gpu_report.RESULTS.glob("*/gpu.jsonl"):
        facts = gpu_report.read(path)
        assert path.parent.name == gpu_report.gpu_name(facts)
        assert path.with_name("table.txt").read_text() == gpu_report.table(facts)


def test_predictions_can_be_looked_up():
    for p in gpu_report.predictions():
        assert set(p) == {"name", "backend", "shape", "dtype", "metric", "predicted", "source"}
        found = fact("timing", p["name"], p["metric"], 1.0, p["backend"], p["dtype"], p["shape"])
        assert gpu_report.predicted(found) == p["predicted"]
        assert gpu_report.name_of(found) in gpu_report.expected("timing")
