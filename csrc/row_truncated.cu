// Rows of logits under a temperature per row and a truncation: the cut, the statistics of what it
// keeps and their gradient. One block per row. The same kernel scores what row_sample.cu drew, so
// the two agree to the bit.
#include "truncate.cuh"

namespace vgkern {
namespace {

VG_DEVICE bool has_id(const RowTruncatedArgs& a, int64_t i) {
  const int64_t y = a.targets ? a.targets[i] : 0;
  return !a.targets || (y != a.ignore_index && y >= 0 && y < a.logits.columns);
}

template <class T>
VG_DEVICE Row<T> row_of(const RowTruncatedArgs& a, int64_t i, char* shared) {
  return {static_cast<const T*>(a.logits.data) + i * a.logits.stride, a.logits.columns, a.scale,
          inverse_of(a.options, i), shared};
}

// The 1: for two blocks a multiprocessor ptxas gives 64 registers on sm_80, and spills.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) row_cut_kernel(RowTruncatedArgs a) {
  static_assert(sizeof(Best) <= sizeof(Sums), "shared memory for the largest of them");
  VG_SHARED(Slots<Sums>, shared);
  for (int64_t i = blockIdx.x; i < a.logits.rows; i += gridDim.x) {
    Cut cut{0, a.logits.columns};
    if (has_id(a, i))
      cut = row_of<T>(a, i, shared.bytes)
                .cut(temperature_of(a.options, i) == 0.f, top_k_of(a.options, i),
                     top_p_of(a.options, i), min_p_of(a.options, i));
    if (threadIdx.x == 0) {
      a.cut[2 * i] = cut.key;
      a.cut[2 * i + 1] = cut.id;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) row_kept_stats_kernel(RowTruncatedArgs a) {
  VG_SHARED(Slots<Softmax>, shared);
  for (int64_t i = blockIdx.x; i < a.logits.rows; i += gridDim.x) {
    const int64_t y = a.targets[i];
    if (!has_id(a, i)) {  // never looked at
      const float value = y == a.ignore_index ? 0.f : nan_value();
      if (threadIdx.x == 0) a.logp[i] = a.entropy[i] = a.lse[i] = value;
      continue;
    }
    const Row<T> row = row_of<T>(a, i, shared.bytes);
    const Cut cut = cut_of(a.cut, i, a.logits.columns);
    Softmax s;
    row.each([&](int64_t v, float z) {
      if (v == y || !cut.keeps_z(z, v)) return;
      s.raise(z);
      s.add(z);
    });
    s = row.reduce(s, Softmax());
    if (threadIdx.x == 0) {
      const float z = scaled(widen(row.logits[y]), y, a.scale, row.inv_temperature);
      const RowStats r = finish(s, cut.keeps_z(z, y) ? z : -kInf);
      a.logp[i] = r.logp;
      a.entropy[i] = r.entropy;
      a.lse[i] = r.lse;
    }
  }
}

template <class T, class Out>
__global__ void __launch_bounds__(kMaxThreads, 1) row_kept_grad_kernel(RowTruncatedArgs a) {
  constexpr int C = 4;
  const int64_t vocab = a.logits.columns, step = int64_t(blockDim.x) * C;
  for (int64_t i = blockIdx.x; i < a.logits.rows; i += gridDim.x) {
    // No __restrict__: `out` may be `logits`; a thread writes only the columns that it alone reads.
    const T* row = static_cast<const T*>(a.logits.data) + i * a.logits.stride;
    Out* out = static_cast<Out*>(a.out.data) + i * a.out.stride;
    const float c = a.c[i], e = a.e[i], logp = a.logp[i], entropy = a.entropy[i];
    const bool live = has_id(a, i) && temperature_of(a.options, i) != 0.f && logp != -kInf;
    if (!live || (c == 0.f && e == 0.f)) {
      for (int64_t v = int64_t(threadIdx.x) * C; v < vocab; v += step) {
        const float zero[C] = {};
        store_columns(out, v, vocab, zero);
      }
      continue;
    }
    const int64_t y = a.targets[i];
    const Cut cut = cut_of(a.cut, i, vocab);
    const float it = inverse_of(a.options, i), lse = a.lse[i], base = -c - e * entropy;
    const float own = c * -expm1f(logp) - (e == 0.f ? 0.f : e * expf(logp) * (logp + entropy));
    for (int64_t v = int64_t(threadIdx.x) * C; v < vocab; v += step) {
      float z[C], slope[C], dz[C] = {};
      load_columns(row, v, vocab, -kInf, z);
#pragma unroll
      for (int j = 0; j < C; ++j) {
        if (v + j >= vocab) continue;
        z[j] = scaled(z[j], v + j, a.scale, it, slope[j]);
        if (z[j] == -kInf || !cut.keeps_z(z[j], v + j)) continue;
        const float d = z[j] - lse;
        dz[j] = v + j == y ? own : expf(d) * (base - (e == 0.f ? 0.f : e * d));
        dz[j] *= it * slope[j];
      }
      store_columns(out, v, vocab, dz);
    }
  }
}

template <class T>
int launch_cut(const RowTruncatedArgs& a, void* stream) {
  const auto kernel = row_cut_kernel<T>;
  VG_LAUNCH(kernel, grid_for(a.logits.rows), threads_for((a.logits.columns + 3) / 4), 0, stream, a);
  return int(cudaGetLastError());
}

template <class T>
int launch_stats(const RowTruncatedArgs& a, void* stream) {
  const auto kernel = row_kept_stats_kernel<T>;
  VG_LAUNCH(kernel, grid_for(a.logits.rows), threads_for((a.logits.columns + 3) / 4), 0, stream, a);
  return int(cudaGetLastError());
}

template <class T, class Out>
int launch_grad(const RowTruncatedArgs& a, void* stream) {
  const auto kernel = row_kept_grad_kernel<T, Out>;
  VG_LAUNCH(kernel, grid_for(a.logits.rows), threads_for((a.logits.columns + 3) / 4), 0, stream, a);
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int vg_row_cut(const RowTruncatedArgs* a, void* stream) {
  if (a->logits.rows == 0) return 0;
  switch (a->logits.dtype) {
    case kF32: return launch_cut<float>(*a, stream);
    case kBF16: return launch_cut<__nv_bfloat16>(*a, stream);
    default: return launch_cut<__half>(*a, stream);
  }
}

extern "C" int vg_row_kept_stats(const RowTruncatedArgs* a, void* stream) {
  if (a->logits.rows == 0) return 0;
  switch (a->logits.dtype) {
    case kF32: return launch_stats<float>(*a, stream);
    case kBF16: return launch_stats<__nv_bfloat16>(*a, stream);
    default: return launch_stats<__half>(*a, stream);
  }
}

extern "C" int vg_row_kept_grad(const RowTruncatedArgs* a, void* stream) {
  if (a->logits.rows == 0) return 0;
  switch (a->logits.dtype * 4 + a->out.dtype) {
    case kF32 * 4 + kF32: return launch_grad<float, float>(*a, stream);
    case kF32 * 4 + kBF16: return launch_grad<float, __nv_bfloat16>(*a, stream);
    case kF32 * 4 + kF16: return launch_grad<float, __half>(*a, stream);
    default: return int(cudaErrorInvalidValue);  // the logits are fp32 from their GEMM
  }
}

}  // namespace vgkern
