"""The kernels that other CPUs would choose hold the same parity: each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vgkern.ops import _native

ORDER = ["base", "v3", "v4"]
PATHS = {
    "v3": {"VGKERN_ISA": "v3"},
    "base": {"VGKERN_ISA": "base"},
    "bf16 widened": {"VGKERN_BF16": "widen"},  # of the head alone
}


@pytest.mark.parametrize("path", PATHS)
def test_parity_on_the_path_of_another_cpu(path):
    try:
        _native.load()
    except _native.NativeError as error:
        pytest.skip(f"no native kernels: {error}")
    isa = PATHS[path].get("VGKERN_ISA", "base")
    if ORDER.index(isa) > ORDER.index(_native.status()["isa"]):
        pytest.skip(f"this CPU does not run {isa}")
    tests = Path(__file__).with_name("test_parity.py")
    which = "test_parity and cpu" + (" and bfloat16" if path == "bf16 widened" else "")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tests), "-k", which, "-p", "no:cacheprovider",
         "--tb=line"],
        env={**os.environ, **PATHS[path]}, cwd=tests.parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
