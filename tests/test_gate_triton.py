"""Every Triton kernel as its launchers launch it, compiled for four architectures, on the Triton
that is installed, and for one on the oldest that is supported (CI_OLDEST=1: for all four). About
1.5 s a kernel the first time; the answers are kept in the cache. `python -m vgkern doctor
--kernels` shows the table."""

import os

import pytest

from tests.conftest import INTERPRETED
from vgkern.gate import coverage, table
from vgkern.gate.arch import DEFAULT

pytestmark = pytest.mark.timeout(3600)  # `make test` runs it beside two others
ARCHS = {"installed": DEFAULT, "oldest": DEFAULT if os.environ.get("CI_OLDEST") else (90,)}
if INTERPRETED:
    pytest.skip(
        "TRITON_INTERPRET: one process cannot interpret and compile", allow_module_level=True
    )


@pytest.fixture(scope="module", params=["installed", "oldest"])
def rows(request):
    if (folder := table.triton_folder()) is None:
        pytest.skip("triton is not installed")
    if request.param == "oldest":
        try:
            folder = table.oldest_triton()
        except FileNotFoundError as e:
            pytest.skip(str(e))
    return table.triton_rows(folder, ARCHS[request.param])


def test_no_limit_is_broken(rows):
    broken = [r for r in rows if r.problems]
    assert not broken, "\n" + table.text(broken)


def test_every_kernel_is_there_on_every_architecture(rows):
    have = {(r.kernel, r.arch) for r in rows if r.registers}
    want = {(name, r.arch) for name in coverage.triton_kernels() for r in rows}
    assert want <= have, sorted(want - have)


def test_aligned_rows_are_read_in_wide_loads(rows):
    """At a vocabulary that is a multiple of 16 every row kernel has loads of 64 bits or more."""
    wide = {"128", "256", "64", "cp.async", "tma", "bulk"}
    rowwise = [r for r in rows if r.kernel.startswith("_row_") and "V128256" in r.launch]
    assert all(wide & set(r.loads) for r in rowwise), [
        r for r in rowwise if not wide & set(r.loads)
    ]
