#include "recurrence.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>

namespace vgkern {

extern const MatrixKernels matrix_base;
#ifdef VG_HAVE_V3
extern const MatrixKernels matrix_v3;
#endif
#ifdef VG_HAVE_V4
extern const MatrixKernels matrix_v4;
#endif

const MatrixKernels& matrix_kernels() {
#ifdef VG_HAVE_V4
  if (!std::strcmp(rows().isa, "v4")) return matrix_v4;
#endif
#ifdef VG_HAVE_V3
  if (!std::strcmp(rows().isa, "v3")) return matrix_v3;
#endif
  return matrix_base;
}

States::States(const Tensor& t)
    : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), dtype(dtype_of(t)),
      size(t.element_size()), sb(t.stride(0)), st(t.dim() == 3 ? t.stride(1) : 0),
      sn(t.stride(-1)) {}

template <class T>
static void gather(const char* p, int64_t stride, int64_t n, float* out) {
  const T* x = reinterpret_cast<const T*>(p);
  for (int64_t j = 0; j < n; ++j) out[j] = float(x[j * stride]);
}

static void read_row(Dtype dtype, const char* p, int64_t stride, int64_t n, float* out) {
  if (stride == 1) return rows().widen(dtype, p, out, n);
  if (dtype == kF32) return gather<float>(p, stride, n, out);
  if (dtype == kBF16) return gather<c10::BFloat16>(p, stride, n, out);
  gather<c10::Half>(p, stride, n, out);
}

void States::read(int64_t b, int64_t t, int64_t n, float* out) const {
  read_row(dtype, data + (b * sb + t * st) * size, sn, n, out);
}

void States::write(int64_t b, int64_t t, int64_t n, const float* x) const {
  rows().narrow(dtype, x, data + (b * sb + t * st) * size, n);
}

struct Recurrence::Space {
  explicit Space(int64_t n)
      : block_rows(std::max<int64_t>(1, 4096 / n)), x(n), y(n), other(n), row(n), block() {}
  int64_t block_rows;  // rows of a Jacobian that are widened at a time
  std::vector<float> x, y, other, row, block;
};

// y = M x, and djacobian; each Jacobian is read once.
void Recurrence::matrix(int64_t b, int64_t t, Space& s) const {
  const int64_t ld = jacobian.stride(2), size = jacobian.element_size();
  const Dtype dtype = dtype_of(jacobian);
  const char* a = static_cast<const char*>(jacobian.const_data_ptr()) +
                  (b * jacobian.stride(0) + t * jacobian.stride(1)) * size;
  const bool direct = dtype == kF32 && jacobian.stride(3) == 1;
  const int64_t at_once = direct ? n : std::min(n, s.block_rows);
  const MatrixKernels& k = matrix_kernels();
  if (!direct) s.block.resize(at_once * n);
  std::fill(s.y.begin(), s.y.end(), 0.f);
  for (int64_t i0 = 0; i0 < n; i0 += at_once) {
    const int64_t m = std::min(at_once, n - i0);
    const float* block = reinterpret_cast<const float*>(a);
    if (!direct) {
      for (int64_t i = 0; i < m; ++i)
        read_row(dtype, a + (i0 + i) * ld * size, jacobian.stride(3), n, s.block.data() + i * n);
      block = s.block.data();
    }
    if (reverse)
      k.transposed(block, direct ? ld : n, m, n, s.x.data() + i0, s.y.data());
    else
      k.plain(block, direct ? ld : n, m, n, s.x.data(), s.y.data() + i0);
  }
  if (!djacobian.defined()) return;
  const std::vector<float>&left = reverse ? s.x : s.other, &right = reverse ? s.other : s.x;
  char* d = static_cast<char*>(djacobian.data_ptr()) + (b * steps + t) * n * n * size;
  for (int64_t i = 0; i < n; ++i) {
    const float scale = gamma * left[i];
    for (int64_t j = 0; j < n; ++j) s.row[j] = scale * right[j];
    rows().narrow(dtype, s.row.data(), d + i * n * size, n);
  }
}

void Recurrence::step(int64_t b, int64_t t, Space& s) const {
  const bool dense = jacobian.dim() == 4;
  const bool ended =
      done && done->const_data_ptr<bool>()[b * done->stride(0) + t * done->stride(1)];
  if (out) out.write(b, t, n, s.x.data());
  if (dsigma) {
    normal_row(NoiseRow(seed, sequence[b * steps + t], position[b * steps + t]), n, s.y.data());
    for (int64_t j = 0; j < n; ++j) s.y[j] *= s.x[j];
    dsigma.write(b, t, n, s.y.data());
  }
  if (djacobian.defined()) other.read(b, t, n, s.other.data());
  if (ended) {
    std::fill(s.y.begin(), s.y.end(), 0.f);
    if (djacobian.defined()) {
      const int64_t bytes = (dense ? n * n : n) * djacobian.element_size();
      std::memset(static_cast<char*>(djacobian.data_ptr()) + (b * steps + t) * bytes, 0, bytes);
    }
  } else if (dense) {
    matrix(b, t, s);
  } else {
    States(jacobian).read(b, t, n, s.y.data());
    if (djacobian.defined()) {
      for (int64_t j = 0; j < n; ++j) s.row[j] = gamma * s.x[j] * s.other[j];
      States(djacobian).write(b, t, n, s.row.data());
    }
    for (int64_t j = 0; j < n; ++j) s.y[j] *= s.x[j];
  }
  added.read(b, t, n, s.row.data());
  if (ended)
    s.x = s.row;
  else
    for (int64_t j = 0; j < n; ++j) s.x[j] = s.row[j] + gamma * s.y[j];
  if (sigma) {
    normal_row(NoiseRow(seed, sequence[b * steps + t], position[b * steps + t]), n, s.y.data());
    sigma.read(b, t, n, s.row.data());
    for (int64_t j = 0; j < n; ++j) s.x[j] += s.row[j] * s.y[j];
  }
}

void Recurrence::run() const {
  at::parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
    Space s(n);
    for (int64_t b = from; b < to; ++b) {
      first.read(b, 0, n, s.x.data());
      for (int64_t k = 0; k < steps; ++k) step(b, reverse ? steps - 1 - k : k, s);
      if (last) last.write(b, 0, n, s.x.data());
    }
  });
}

}  // namespace vgkern
