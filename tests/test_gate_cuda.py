"""Every kernel of csrc/*.cu, compiled by nvcc for four architectures, keeps the gate's limits."""

import pytest

from vgkern.gate import coverage, cuda, table
from vgkern.gate.arch import DEFAULT

pytestmark = pytest.mark.timeout(1800)  # `make test` runs it at low priority
NVCC = cuda.find_nvcc()
if NVCC is None:
    pytest.skip("there is no nvcc", allow_module_level=True)
try:
    cuda.version(NVCC)
    from vgkern.gate.cubin import tool

    tool("cuobjdump"), tool("nvdisasm")
except FileNotFoundError as e:
    pytest.skip(str(e), allow_module_level=True)


@pytest.fixture(scope="module")
def rows():
    return table.cuda_rows(NVCC, DEFAULT)


def test_no_limit_is_broken(rows):
    broken = [r for r in rows if r.problems]
    assert not broken, "\n" + table.text(broken)


def test_every_kernel_is_there_on_every_architecture(rows):
    want = {(name, arch) for name in coverage.cuda_kernels() for arch in DEFAULT}
    assert want <= {(r.kernel, r.arch) for r in rows}, sorted(
        want - {(r.kernel, r.arch) for r in rows}
    )


TOY = """
#include <cuda_bf16.h>
template <int N>
__global__ void __launch_bounds__(1024, 2) spills_kernel(const float* x, float* y) {
  float a[N];
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = x[i * 1024 + threadIdx.x];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] = a[i] * a[(i * 7 + k) % N] + y[k];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) y[i * 1024 + threadIdx.x] = a[i];
}
template __global__ void spills_kernel<48>(const float*, float*);
__global__ void __launch_bounds__(128) array_kernel(const int* x, float* y) {
  float a[32];
  for (int i = 0; i < 32; ++i) a[i] = y[i];
  for (int i = 0; i < 99; ++i) a[x[i] & 31] += a[x[i + 1] & 31];
  for (int i = 0; i < 32; ++i) y[i] = a[i];
}
__global__ void __launch_bounds__(256) cosine_kernel(float* y) {
  __shared__ float s[64];
  s[threadIdx.x & 63] = cosf(y[threadIdx.x]);
  __syncthreads();
  y[threadIdx.x] = s[63 - (threadIdx.x & 63)];
}
__global__ void unbounded_kernel(float* y) { y[threadIdx.x] = 1; }
extern __shared__ float given[];
__global__ void __launch_bounds__(256) dynamic_kernel(float* y) {
  extern __shared__ float given[];
  given[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = given[255 - threadIdx.x];
}
"""


@pytest.mark.parametrize("arch", [80, 90])  # 1 KiB of SHARED is the system's on one of them
def test_the_gate_reports(arch, tmp_path):
    source = tmp_path / "toy.cu"
    source.write_text(TOY)
    kept = table.cache() / "toys"
    rows = {r.kernel: r for r in cuda.compile_source(source, arch, NVCC, kept)}
    assert set(rows) == set(cuda.kernels(source))
    spills = rows["spills_kernel"]
    assert spills.spills > 0 and spills.problems == [
        f"spills {spills.spills} bytes a thread; allowed: 0"
    ]
    assert spills.launch == "toy.cu <48>" and spills.registers == 32 and spills.occupancy == 1
    array = rows["array_kernel"]
    assert array.spills == 0 and array.local == 128
    assert array.problems == ["128 bytes a thread of arrays in local memory; allowed: 32"]
    cosine = rows["cosine_kernel"]  # its local memory is not a spill
    assert cosine.spills == 0 and cosine.local <= 32 and cosine.problems == []
    assert cosine.shared == 256
    assert rows["unbounded_kernel"].problems == ["no __launch_bounds__"]
    assert rows["dynamic_kernel"].shared == cuda.DYNAMIC


def test_what_nvcc_refuses_is_reported(tmp_path):
    source = tmp_path / "toy.cu"
    source.write_text("__global__ void __launch_bounds__(32) k(float* y) { y[0] = nothing; }")
    (row,) = cuda.compile_source(source, 90, NVCC, tmp_path)
    assert row.kernel == "toy.cu" and "nvcc: " in row.problems[0] and '"nothing"' in row.problems[0]
