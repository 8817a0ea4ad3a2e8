"""The gate itself: what it must report, and what it must not take for something else."""

import ast
import inspect
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import INTERPRETED
from vgkern.gate import coverage, doctor, table
from vgkern.gate.arch import ARCHS, occupancy
from vgkern.gate.row import Row, _memory

triton = pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETED:
    pytest.skip(
        "TRITON_INTERPRET: one process cannot interpret and compile", allow_module_level=True
    )

import triton.language as tl  # noqa: E402

from vgkern.gate.record import Launch, compile_launches, record  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def own_cache():
    """Compiled toys are kept, so that a second run takes a second."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(table.cache() / "toys")
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


@triton.jit
def _copy_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def _sort_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.sort(tl.load(x + i)))


@triton.jit
def _matmul_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, UP: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 64)
    acc = tl.zeros([M, N], tl.float32)
    for k0 in range(0, K, 64):
        x = tl.load(a + m[:, None] * K + (k0 + k)[None, :])
        y = tl.load(b + n[None, :] * K + (k0 + k)[:, None])
        if UP:
            acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc)


@triton.jit
def _refused_kernel(x, y, K: tl.constexpr):
    i = tl.arange(0, K)
    tl.store(y + i, tl.load(x + i))


def copy(n=4096, grid=(8,), x=None, **options):
    x = torch.empty(n) if x is None else x
    _copy_kernel[grid](x, torch.empty(n), n, BLOCK=1024, **{"enable_fp_fusion": True, **options})


def matmul(m, n, up=False, warps=4, stages=3):
    a, b = torch.empty(m, 512, dtype=torch.bfloat16), torch.empty(n, 512, dtype=torch.bfloat16)
    _matmul_kernel[(1,)](
        a, b, torch.empty(m, n), 512, m, n, up, num_warps=warps, num_stages=stages,
        enable_fp_fusion=True
    )  # fmt: skip


def gate(call, arch=90) -> Row:
    (row,) = compile_launches([Launch("toy", "", call)], arch)
    return row


def said(row: Row, what: str) -> bool:
    return any(what in problem for problem in row.problems)


def test_a_good_kernel_breaks_no_limit():
    for arch in (80, 120):  # kernels are cached by device: these are two
        row = gate(copy, arch)
        assert (row.kernel, row.arch, row.problems) == ("_copy_kernel", arch, [])
        assert row.loads == {"128": 2} and row.spills == row.shared == 0 and row.occupancy == 1


def test_a_spill_is_reported():
    def call():
        x = torch.empty(4096)
        _sort_kernel[(1,)](x, x, BLOCK=4096, num_warps=4, maxnreg=32, enable_fp_fusion=True)

    row = gate(call)
    assert row.spills > 24 and said(row, f"spills {row.spills} bytes a thread; allowed: ")


@pytest.mark.parametrize(("compiler", "allowed"), [
    ("triton 3.6.0", 24), ("triton 3.7.1", 24), ("triton 3.9.0", 0), ("triton 3.10.0", 0),
    ("nvcc 13.0", 0),
])  # fmt: skip
def test_what_an_older_ptxas_may_spill(compiler, allowed):
    for spills in (allowed, allowed + 1):
        row = Row("_kernel", "launch", 90, compiler, registers=32, spills=spills)
        assert bool(_memory(row)) == (spills > allowed)


def test_too_much_shared_memory_is_reported():
    row = gate(lambda: matmul(128, 128, stages=5), 120)
    assert row.shared > ARCHS[120].shared_block
    assert said(row, "no block fits") and said(row, "too much of: shared")
    assert gate(lambda: matmul(128, 128, stages=5), 90).problems == []


def test_tensor_cores():
    row = gate(lambda: matmul(32, 32, up=True, stages=1))
    assert said(row, "no tensor-core instruction from tl.dot 32x32x64 f32") and not row.tensor
    names = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
    for arch, name in names.items():
        row = gate(lambda: matmul(128, 64), arch)
        assert name in row.tensor and row.dots == ["128x64x64 bf16"] and row.problems == []
    # A tile of 64 rows belongs to wgmma; three warps cannot have it.
    hopper = Row(**{**gate(lambda: matmul(128, 64)).to_json(), "tensor": {"HMMA": 8}})
    from vgkern.gate.row import _tensor_cores

    assert _tensor_cores(hopper) == ["tl.dot 128x64x64 bf16 is HMMA, not wgmma"]


def test_what_the_compiler_refuses_is_reported():
    def call():
        _refused_kernel[(1,)](torch.empty(96), torch.empty(96), K=96, enable_fp_fusion=True)

    assert said(gate(call), "compiler: ") and said(gate(call), "power of 2")


def test_a_launcher_that_reads_from_the_gpu_is_reported():
    for reads in (torch.Tensor.item, torch.nonzero, bool):
        made, (row,) = record([Launch("toy", "", lambda: (copy(), reads(torch.empty(1))))], 90)  # noqa: B023
        assert len(made) == 1 and row.kernel == "toy" and said(row, "launcher: D")


def test_what_is_wrong_with_a_launch_is_reported():
    assert said(gate(lambda: copy(grid=(8, 70000))), "grid y = 70000 > 65535")
    row = gate(lambda: _copy_kernel[(8,)](torch.empty(8), torch.empty(8), 8, BLOCK=1024))
    assert said(row, "enable_fp_fusion")


def test_specialised_as_at_run_time():
    """Pointers and integers divisible by 16, and 1, are kernels of their own; labels are merged."""

    def launch(label, **what):
        return Launch("toy", label, lambda: copy(**what))

    made, failed = record(
        [
            launch("even", n=4096),
            launch("even too", n=1024),
            launch("odd", n=4095),
            launch("one", n=1),
            launch("shifted", n=4096, x=None),
            Launch("toy", "view", lambda: copy(x=torch.empty(4097)[1:])),
        ],
        90,
    )
    assert not failed
    assert [m.labels for m in made] == [
        ["toy even", "toy even too", "toy shifted"], ["toy odd"], ["toy one"], ["toy view"],
    ]  # fmt: skip
    aligned, view = made[0].source.attrs, made[3].source.attrs
    assert aligned[(0,)] == [["tt.divisibility", 16]] and view[(0,)] == []


def test_nothing_stays_patched():
    from torch._subclasses.fake_tensor import FakeTensor
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    before = driver._active, JITFunction.run, JITFunction._do_compile, FakeTensor.data_ptr
    record([Launch("toy", "", copy), Launch("toy", "", lambda: 1 / 0)], 90)
    assert before == (driver._active, JITFunction.run, JITFunction._do_compile, FakeTensor.data_ptr)


SOURCE = """
import triton, triton.language as tl
@triton.jit
def helper(x): return x + 1
@triton.jit
def writes(y, x): tl.store(y, helper(x))
@triton.jit
def combine(a, b): return a + b
@triton.autotune(configs=[], key=[])
@triton.jit(do_not_specialize=["n"])
def tuned_kernel(y, n): tl.store(y, tl.reduce(n, 0, combine_fn=combine)); writes(y, n)
@triton.jit
def forgotten_kernel(y): writes(y, 1)
def launcher(y):
    kernel = tuned_kernel
    tuned_kernel[(1,)](y, 2)
"""


def test_every_kernel_is_found(tmp_path):
    (tmp_path / "toy.py").write_text(SOURCE)
    assert set(coverage.triton_kernels(tmp_path)) == {"tuned_kernel", "forgotten_kernel"}
    (tmp_path / "toy.cu").write_text(
        "// __global__ void not_this(int)\n"
        "template <class T, int N>\n__global__ void __launch_bounds__(32 * N)\n"
        "first_kernel(const T* x) { extern __shared__ float s[]; }\n"
        "__global__ static void second_kernel(float* y) {}\n"
    )
    assert coverage.cuda_kernels(tmp_path) == {"first_kernel": "toy.cu", "second_kernel": "toy.cu"}
    from vgkern.gate.cuda import kernels

    assert kernels(tmp_path / "toy.cu") == {"first_kernel": True, "second_kernel": False}


OCCUPANCY = """
#include <cstdio>
#include <climits>
#include <cstdlib>
#include "cuda_occupancy.h"
int main() {
  int cc, regs, smem, warps, sms, warps_sm, block;
  while (scanf("%d %d %d %d %d %d %d", &cc, &regs, &smem, &warps, &sms, &warps_sm, &block) == 7) {
    cudaOccDeviceProp p;
    p.computeMajor = cc / 10, p.computeMinor = cc % 10, p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = warps_sm * 32, p.regsPerBlock = 65536;
    p.regsPerMultiprocessor = 65536, p.warpSize = 32, p.sharedMemPerBlock = 49152;
    p.sharedMemPerMultiprocessor = sms, p.numSms = 1;
    p.sharedMemPerBlockOptin = block, p.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024, a.numRegs = regs, a.sharedSizeBytes = 0;
    a.partitionedGCConfig = PARTITIONED_GC_OFF;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, a.maxDynamicSharedSizeBytes = block;
    a.numBlockBarriers = 1;
    cudaOccDeviceState s;
    cudaOccResult r;
    cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, warps * 32, smem);
    printf("%d\\n", r.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_that_of_cuda(tmp_path):
    """Against NVIDIA's own header, over registers at every step of 8 and some of each other."""
    header = table.triton_folder() / "triton/backends/nvidia/include/cuda_occupancy.h"
    if not header.exists() or shutil.which("g++") is None:
        pytest.skip("needs g++ and the cuda_occupancy.h that comes with triton")
    (tmp_path / "o.cpp").write_text(OCCUPANCY)
    program = str(tmp_path / "o")
    subprocess.run(
        ["g++", "-w", "-I", str(header.parent), "-o", program, str(tmp_path / "o.cpp")], check=True
    )
    shared = (0, 1, 1024, 5000, 8192, 33000, 49152, 65536, 98304, 101376, 166912, 200000, 232448)
    grid = list(itertools.product(ARCHS, range(8, 256, 8), shared, (1, 2, 3, 4, 6, 8, 16, 32)))
    lines = [
        f"{cc} {regs} {smem} {warps} {ARCHS[cc].shared} {ARCHS[cc].warps} {ARCHS[cc].shared_block}"
        for cc, regs, smem, warps in grid
    ]
    told = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
    wrong = [
        (case, int(theirs), occupancy(*case))
        for case, theirs in zip(grid, told.stdout.split(), strict=True)
        if occupancy(*case).blocks != int(theirs)
    ]
    assert not wrong, (len(wrong), wrong[:5])


def test_the_table(monkeypatch, capsys, tmp_path):
    good = Row("_a_kernel", "a", 90, "triton 3", 32, 0, 0, 0, 4, 16, 1.0, "warps", {}, {"128": 2})
    bad = Row("_b_kernel", "b", 90, "triton 3", problems=["spills 8 bytes a thread; allowed: 0"])
    rows, wanted = [good], {"_a_kernel": "a.py"}
    monkeypatch.setattr(table, "triton_rows", lambda folder, archs: rows)
    monkeypatch.setattr(coverage, "triton_kernels", lambda: wanted)
    monkeypatch.setattr(doctor.cuda, "find_nvcc", lambda: None)
    out = tmp_path / "table.json"
    assert doctor.report([90], str(out)) == 0
    shown = capsys.readouterr().out
    assert "cuda: not compiled: no nvcc" in shown and re.search(
        r"^_a_kernel\n  a .* 128$", shown, re.M
    )
    assert f"triton {triton.__version__}" in shown and '"kernel": "_a_kernel"' in out.read_text()
    rows.append(bad)
    assert doctor.report([90]) == 1 and "BROKEN: spills 8 bytes" in capsys.readouterr().out
    rows.remove(bad)
    wanted["_c_kernel"] = "c.py"
    assert (
        doctor.report([90]) == 1 and "_c_kernel (c.py) is in no launch" in capsys.readouterr().out
    )
    monkeypatch.setattr(table, "triton_folder", lambda: None)
    assert doctor.report([90]) == 2 and "no triton" in capsys.readouterr().out


def test_the_oldest_triton_is_that_of_pyproject():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f"triton>={table.OLDEST.removesuffix('.0')};" in text


def test_launches_name_what_the_operators_take():
    """The list of launches gives every operator as many arguments as its schema has."""
    import vgkern.ops.linear_policy_loss
    import vgkern.ops.linear_sample  # noqa: F401
    from vgkern.gate import launches
    from vgkern.ops import _library

    given = {}

    def count(operator):
        return lambda *arguments: given.setdefault(operator, len(arguments))

    before, launches.launcher = launches.launcher, count
    try:
        for launch in launches.launches():
            with torch._subclasses.fake_tensor.FakeTensorMode():
                launch.call()
    finally:
        launches.launcher = before
    for operator, arguments in given.items():
        if operator not in _library.names():  # a part of one: its launcher's own arguments
            assert arguments == len(inspect.signature(before(operator)).parameters), operator
            continue
        schema = getattr(torch.ops.vgkern_triton, operator).default._schema
        least = sum(not a.has_default_value() for a in schema.arguments)
        assert least <= arguments <= len(schema.arguments), (operator, arguments, str(schema))


def test_no_kernel_has_the_name_of_another():
    names = [
        n.name
        for path in coverage.KERNELS.glob("*.py")
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel")
    ]
    assert len(names) == len(set(names)), names
