"""Phase 6: `pytest -m gpu`, on all cores. A test that skips here is a failure: nothing else on any
machine would run it."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

from vgkern.gpu.device import Phase, free_of

ROOT = Path(__file__).resolve().parents[2]
TESTS = "VGKERN_GPU_TESTS"  # arguments of pytest instead, split at spaces
CHOSEN = "triton or cuda or r01"  # the torch backend's cases say nothing of a kernel
DRY = "token_logprobs-v2-cpu-float32 or token_logprobs-v2-cuda-float32"
SHOWN = 20  # failures with their own line


def run(phase: Phase) -> None:
    report = phase.out / "pytest.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += [*arguments(phase), "--timeout", "60", "-q"]
    env = {k: v for k, v in free_of(phase.dry).items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT)
    counts(phase, report, done.returncode)


def arguments(phase: Phase) -> list[str]:
    if asked := os.environ.get(TESTS):
        return asked.split()
    if phase.dry:
        return ["tests/test_parity.py", "-k", DRY]
    # named, not collected from tests/: workers once disagreed on what there is
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    found = [str(p.relative_to(ROOT)) for p in files]
    workers = str(max(len(os.sched_getaffinity(0)) - 2, 1))
    many = ["-n", workers] if find_spec("xdist") else []
    return [*found, "-m", "gpu", "-k", CHOSEN, *many]


def counts(phase: Phase, report: Path, status: int) -> None:
    if not report.exists():
        phase.fact("pytest", "ran", 0, ok=False, why=f"pytest ended with {status}, no report")
        return
    cases = list(ET.parse(report).iter("testcase"))
    kinds: dict[str, list[ET.Element]] = {"failed": [], "skipped": [], "passed": []}
    for case in cases:
        tags = {child.tag for child in case}
        kind = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else ""
        kinds[kind or "passed"].append(case)
    for kind in ("failed", "skipped"):
        phase.fact("pytest", kind, len(kinds[kind]), floor=0, ok=not kinds[kind])
        for case in kinds[kind][:SHOWN]:
            message = next((c.get("message", "") for c in case if c.get("message")), "")
            phase.fact("pytest", f"{kind} test", shape=case.get("name", ""), why=message, ok=False)
    good = len(kinds["passed"]) > 0 and status == 0
    phase.fact(
        "pytest", "passed", len(kinds["passed"]), ok=good, why="" if good else f"exit {status}"
    )
