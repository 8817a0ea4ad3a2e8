// Matrix times vector, compiled once per instruction set (VG_ISA names it).
#include "matrix.h"
#include "vec.h"

namespace vgkern {
namespace {

void transposed(const float* a, int64_t ld, int64_t rows, int64_t n, const float* x, float* y) {
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {  // two rows at a time: four chains of additions
    vf s0 = load(y + j), s1 = load(y + j + W), t0 = vset(0.f), t1 = t0;
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) {
      const float *p = a + i * ld + j, *q = p + ld;
      s0 += x[i] * load(p);
      s1 += x[i] * load(p + W);
      t0 += x[i + 1] * load(q);
      t1 += x[i + 1] * load(q + W);
    }
    if (i < rows) {
      s0 += x[i] * load(a + i * ld + j);
      s1 += x[i] * load(a + i * ld + j + W);
    }
    store(y + j, s0 + t0);
    store(y + j + W, s1 + t1);
  }
  for (; j + W <= n; j += W) {
    vf s = load(y + j), t = vset(0.f);
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) {
      s += x[i] * load(a + i * ld + j);
      t += x[i + 1] * load(a + (i + 1) * ld + j);
    }
    if (i < rows) s += x[i] * load(a + i * ld + j);
    store(y + j, s + t);
  }
  if (j < n)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = j; k < n; ++k) y[k] += x[i] * a[i * ld + k];
}

void plain(const float* a, int64_t ld, int64_t rows, int64_t n, const float* x, float* y) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* p = a + i * ld;
    vf s = vset(0.f), t = s;
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) {
      s += load(p + j) * load(x + j);
      t += load(p + j + W) * load(x + j + W);
    }
    if (j + W <= n) {
      s += load(p + j) * load(x + j);
      j += W;
    }
    float sum = hsum(s + t);
    for (; j < n; ++j) sum += p[j] * x[j];
    y[i] = sum;
  }
}

}  // namespace

extern const MatrixKernels VG_OF_ISA(matrix_);
const MatrixKernels VG_OF_ISA(matrix_) = {transposed, plain};

}  // namespace vgkern
