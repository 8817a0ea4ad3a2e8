// Rows of logits: statistics of the softmax, and its gradient (policy, entropy and costate terms).
// One block per row, one pass over it for the statistics, one (with costates two) for the gradient.
#include "softmax.cuh"

namespace vgkern {
namespace {

template <class T>
__global__ void __launch_bounds__(kMaxThreads) row_stats_kernel(RowStatsArgs a) {
  constexpr int C = kChunk<T>;
  VG_SHARED(Slots<Softmax>, shared);
  const int64_t vocab = a.logits.columns;
  for (int64_t i = blockIdx.x; i < a.logits.rows; i += gridDim.x) {
    const int64_t y = a.targets[i];
    if (y == a.ignore_index || y < 0 || y > vocab) {  // never looked at
      const float value = y == a.ignore_index ? 0.f : nan_value();
      if (threadIdx.x == 0) a.logp[i] = a.entropy[i] = a.lse[i] = value;
      continue;
    }
    const T* row = static_cast<const T*>(a.logits.data) + i * a.logits.stride;
    Softmax s;
    for (int64_t v = int64_t(threadIdx.x) * C; v < vocab; v += int64_t(blockDim.x) * C) {
      float z[C], top = -kInf;
      load_columns(row, v, vocab, -kInf, z);
#pragma unroll
      for (int j = 0; j < C; ++j) {
        const bool counts = v + j < vocab && v + j != y;
        z[j] = counts ? scaled(z[j], v + j, a.scale, a.scale.inv_temperature) : -kInf;
        top = fmaxf(top, z[j]);
      }
      s.raise(top);
#pragma unroll
      for (int j = 0; j < C; ++j) s.add(z[j]);
    }
    s = block_reduce(s, Softmax(), shared.get());
    if (threadIdx.x == 0) {
      const float target =
          y < vocab ? scaled(widen(row[y]), y, a.scale, a.scale.inv_temperature) : 0.f;
      const RowStats r = y < vocab ? finish(s, target) : finish_elsewhere(s);
      a.logp[i] = r.logp;
      a.entropy[i] = r.entropy;
      a.lse[i] = r.lse;
    }
  }
}

// sum of exp(z - max), and of exp(z - max) (u - base), base the u of the largest z: of a row that
// is nearly one-hot, u - <q, u> would cancel
struct Weighted {
  float max = -kInf, sum = 0.f, dot = 0.f, base = 0.f;
  VG_DEVICE void raise(float m, float u) {
    if (m > max) {
      const float k = max > -kInf ? expf(max - m) : 1.f;
      dot = (dot + sum * (base - u)) * k;
      sum *= k;
      max = m;
      base = u;
    }
  }
  VG_DEVICE void add(float z, float u) {
    const float e = z == -kInf ? 0.f : expf(z - max);
    sum += e;
    dot += e == 0.f ? 0.f : e * (u - base);
  }
  VG_DEVICE void merge(const Weighted& o) {
    Weighted other = o;
    raise(o.max, o.base);
    other.raise(max, base);
    sum += other.sum;
    dot += other.dot + other.sum * (other.base - base);  // equal maxima keep their own bases
  }
};

// (z + g) / tau of N columns from v, a multiple of 4; z + 0 when `expected`
template <int N>
VG_DEVICE void perturb(float (&z)[N], int64_t v, const NoiseRow& noise, const RowGradArgs& a,
                       float inv_tau) {
  if (a.expected) return;
#pragma unroll
  for (int k = 0; k < N; k += 4) {
    const Words words = philox(uint32_t((v + k) / 4), noise);
#pragma unroll
    for (int j = 0; j < 4; ++j) z[k + j] = (z[k + j] + gumbel(words.w[j])) * inv_tau;
  }
}

template <class T, class Out>  // one block: of itself ptxas takes 64 registers, and spills
__global__ void __launch_bounds__(kMaxThreads, 1) row_grad_kernel(RowGradArgs a) {
  constexpr int C = 4;  // columns at a time: one word of noise each
  VG_SHARED(Slots<Weighted>, shared);
  const int64_t vocab = a.logits.columns, step = int64_t(blockDim.x) * C;
  const float it = a.scale.inv_temperature, inv_tau = a.expected ? 1.f : 1.f / a.tau;
  const bool in_place = over(a.logits, a.out);
  for (int64_t i = blockIdx.x; i < a.logits.rows; i += gridDim.x) {
    // No __restrict__: `out` may be `logits`.
    const T* row = static_cast<const T*>(a.logits.data) + i * a.logits.stride;
    Out* out = static_cast<Out*>(a.out.data) + i * a.out.stride;
    const int64_t y = a.targets ? a.targets[i] : vocab;
    float c = a.c ? a.c[i] : 0.f, e = a.e ? a.e[i] : 0.f;
    const float logp = a.logp ? a.logp[i] : 0.f, entropy = a.entropy ? a.entropy[i] : 0.f;
    if (y == a.ignore_index || y < 0 || y > vocab || logp == -kInf) c = e = 0.f;
    const bool policy = c != 0.f || e != 0.f;
    const bool carried = a.u && !(a.noise.sequence && a.noise.sequence[i] < 0);
    if (!policy && !carried) {
      for (int64_t v = int64_t(threadIdx.x) * C; v < vocab; v += step) {
        const float zero[C] = {};
        store_columns(out, v, vocab, zero);
      }
      continue;
    }
    const float* u = carried ? a.u + i * a.u_stride : nullptr;
    Weighted q;
    NoiseRow noise{};
    if (u) {
      if (!a.expected) noise = noise_row(a.noise.seed, a.noise.sequence[i], a.noise.position[i]);
      for (int64_t v = int64_t(threadIdx.x) * C; v < vocab; v += step) {
        float z[C], w[C];
        load_columns(row, v, vocab, -kInf, z);
        load_columns(u, v, vocab, 0.f, w);
#pragma unroll
        for (int j = 0; j < C; ++j)
          if (v + j < vocab) z[j] = scaled(z[j], v + j, a.scale, it);
        perturb(z, v, noise, a, inv_tau);
#pragma unroll
        for (int j = 0; j < C; ++j) q.raise(z[j], w[j]);
#pragma unroll
        for (int j = 0; j < C; ++j) q.add(z[j], w[j]);
      }
      q = block_reduce(q, Weighted(), shared.get());
    }
    const float mean = q.dot / q.sum, per = inv_tau / q.sum;
    const RowGradient gradient(c, e, logp, entropy, a.lse ? a.lse[i] : 0.f);
    for (int64_t first = 0; first < vocab; first += step) {  // as often for every thread
      const int64_t v = first + int64_t(threadIdx.x) * C;
      float z[C], slope[C], w[C], dz[C];
      load_columns(row, v, vocab, -kInf, z);
      if (u) load_columns(u, v, vocab, 0.f, w);
#pragma unroll
      for (int j = 0; j < C; ++j) {
        slope[j] = 1.f;
        if (v + j < vocab) z[j] = scaled(z[j], v + j, a.scale, it, slope[j]);
        dz[j] = policy ? gradient.at(z[j], v + j == y) : 0.f;
      }
      if (u) {
        perturb(z, v, noise, a, inv_tau);
#pragma unroll
        for (int j = 0; j < C; ++j)
          if (z[j] != -kInf) dz[j] += per * expf(z[j] - q.max) * ((w[j] - q.base) - mean);
      }
#pragma unroll
      for (int j = 0; j < C; ++j) dz[j] *= it * slope[j];
      if (in_place) __syncthreads();
      store_columns(out, v, vocab, dz);
    }
  }
}

template <class T>
int launch_stats(const RowStatsArgs& a, void* stream) {
  const auto kernel = row_stats_kernel<T>;
  const int threads = threads_for((a.logits.columns + kChunk<T> - 1) / kChunk<T>);
  VG_LAUNCH(kernel, grid_for(a.logits.rows), threads, 0, stream, a);
  return int(cudaGetLastError());
}

template <class T, class Out>
int launch_grad(const RowGradArgs& a, void* stream) {
  const auto kernel = row_grad_kernel<T, Out>;
  VG_LAUNCH(kernel, grid_for(a.logits.rows), threads_for((a.logits.columns + 3) / 4), 0, stream, a);
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int vg_row_stats(const RowStatsArgs* a, void* stream) {
  if (a->logits.rows == 0) return 0;
  switch (a->logits.dtype) {
    case kF32: return launch_stats<float>(*a, stream);
    case kBF16: return launch_stats<__nv_bfloat16>(*a, stream);
    default: return launch_stats<__half>(*a, stream);
  }
}

extern "C" int vg_row_grad(const RowGradArgs* a, void* stream) {
  if (a->logits.rows == 0) return 0;
  switch (a->logits.dtype * 4 + a->out.dtype) {
    case kF32 * 4 + kF32: return launch_grad<float, float>(*a, stream);
    case kF32 * 4 + kBF16: return launch_grad<float, __nv_bfloat16>(*a, stream);
    case kF32 * 4 + kF16: return launch_grad<float, __half>(*a, stream);
    case kBF16 * 4 + kBF16: return launch_grad<__nv_bfloat16, __nv_bfloat16>(*a, stream);
    case kF16 * 4 + kF16: return launch_grad<__half, __half>(*a, stream);
    default: return int(cudaErrorInvalidValue);
  }
}

}  // namespace vgkern
