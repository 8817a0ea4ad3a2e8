// Products of fp32 matrices with vectors: one table of function pointers per instruction set.
#pragma once
#include <cstdint>

namespace vgkern {

struct MatrixKernels {
  // y[j] += sum_i x[i] a[i][j], over `rows` rows of stride ld
  void (*transposed)(const float* a, int64_t ld, int64_t rows, int64_t n, const float* x, float* y);
  // y[i] = sum_j a[i][j] x[j]
  void (*plain)(const float* a, int64_t ld, int64_t rows, int64_t n, const float* x, float* y);
};

const MatrixKernels& matrix_kernels();  // for the CPU of this process

}  // namespace vgkern
