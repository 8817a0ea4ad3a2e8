// A row of logits to its policy gradient: statistics, the loss of its token, the gradient, for
// objectives whose terms need no other row. One block a row; the row is read once for its
// statistics and once more where it has a gradient. The loss is policy_loss.cu's.
#include "objective.h"
#include "softmax.cuh"

namespace vgkern {
namespace {

// The power of two that takes the larger of two coefficients to 256 or just below: linear.py
VG_DEVICE float power_of(float c, float e, float inv_temperature) {
  const float most = fmaxf(fabsf(c), fabsf(e)) * inv_temperature;
  return exp2f(floorf(log2f(256.f / fmaxf(most, 1e-30f))));
}

// c = dl/dlogp and e = dl/dentropy of a row: doubles, so by one thread.
VG_DEVICE void coefficients(const RowPolicyArgs& a, int64_t i, float logp, float* ce) {
  const Objective& o = a.objective;
  const float w = a.weight[i];
  ce[0] = ce[1] = 0.f;
  if (w == 0.f || logp == -kInf || !(o.always_active() || a.advantages[i] != 0.f)) return;
  Token t{logp, a.old_logp ? a.old_logp[i] : logp, a.advantages[i]};
  if (a.ref_logp) t.ref = a.ref_logp[i], t.has_ref = true;
  if (a.sampler_logp) t.sampler = a.sampler_logp[i], t.has_sampler = true;
  const TokenLoss l = token_loss(t, Sequence{}, o);
  ce[0] = w * seen(l.value, l.slope);
  ce[1] = -w * o.entropy_coef;
}

template <class Out>  // two blocks: of itself ptxas takes 40 registers, and spills
__global__ void __launch_bounds__(kMaxThreads, 2) row_policy_kernel(RowPolicyArgs a) {
  constexpr int C = 4;  // columns at a time
  VG_SHARED(Slots<Softmax>, shared);
  VG_SHARED(Slots<float>, shared_ce);
  float* const ce = shared_ce.get();
  const int64_t vocab = a.logits.columns, step = int64_t(blockDim.x) * C;
  const float it = a.scale.inv_temperature;
  const bool in_place = over(a.logits, a.out);
  for (int64_t i = blockIdx.x; i < a.logits.rows; i += gridDim.x) {
    const float* row = static_cast<const float*>(a.logits.data) + i * a.logits.stride;
    const int64_t y = a.targets[i];
    const bool known = y != a.ignore_index && y >= 0 && y < vocab;
    const float unread = y == a.ignore_index ? 0.f : nan_value();
    RowStats r{unread, unread, unread};
    float c = 0.f, e = 0.f;
    if (known) {
      Softmax s;
      for (int64_t v = int64_t(threadIdx.x) * C; v < vocab; v += step) {
        float z[C], top = -kInf;
        load_columns(row, v, vocab, -kInf, z);
#pragma unroll
        for (int j = 0; j < C; ++j) {
          const bool counts = v + j < vocab && v + j != y;
          z[j] = counts ? scaled(z[j], v + j, a.scale, it) : -kInf;
          top = fmaxf(top, z[j]);
        }
        s.raise(top);
#pragma unroll
        for (int j = 0; j < C; ++j) s.add(z[j]);
      }
      const float target = scaled(row[y], y, a.scale, it);
      __syncthreads();  // a block of one warp: the target is read before a row is made in place
      s = block_reduce(s, Softmax(), shared.get());
      r = finish(s, target);
      if (threadIdx.x == 0) coefficients(a, i, r.logp, ce);
      __syncthreads();
      c = ce[0];
      e = ce[1];
      __syncthreads();  // `ce` may be written again
    }
    if (threadIdx.x == 0) {
      a.logp[i] = r.logp;
      a.entropy[i] = r.entropy;
    }
    if (a.power) {
      const float power = power_of(c, e, it);
      if (threadIdx.x == 0) a.power[i] = power;
      c *= power;
      e *= power;
    }
    if (!a.out.data) continue;
    Out* out = static_cast<Out*>(a.out.data) + i * a.out.stride;
    const RowGradient gradient(c, e, r.logp, r.entropy, r.lse);
    for (int64_t first = 0; first < vocab; first += step) {  // as often for every thread
      const int64_t v = first + int64_t(threadIdx.x) * C;
      float dz[C] = {};
      if (c != 0.f || e != 0.f) {
        float z[C], slope[C];
        load_columns(row, v, vocab, -kInf, z);
#pragma unroll
        for (int j = 0; j < C; ++j) {
          slope[j] = 1.f;
          if (v + j < vocab) z[j] = scaled(z[j], v + j, a.scale, it, slope[j]);
          dz[j] = gradient.at(z[j], v + j == y) * (it * slope[j]);
        }
        if (in_place) __syncthreads();
      }
      store_columns(out, v, vocab, dz);
    }
  }
}

template <class Out>
int launch_policy(const RowPolicyArgs& a, void* stream) {
  const auto kernel = row_policy_kernel<Out>;
  VG_LAUNCH(kernel, grid_for(a.logits.rows), threads_for((a.logits.columns + 3) / 4), 0, stream, a);
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int vg_row_policy(const RowPolicyArgs* a, void* stream) {
  if (a->logits.rows == 0) return 0;
  if (a->logits.dtype != kF32) return int(cudaErrorInvalidValue);
  switch (a->out.data ? a->out.dtype : int(kF32)) {
    case kF32: return launch_policy<float>(*a, stream);
    case kBF16: return launch_policy<__nv_bfloat16>(*a, stream);
    default: return launch_policy<__half>(*a, stream);
  }
}

}  // namespace vgkern
