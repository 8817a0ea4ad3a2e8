// One token per row of logits by the Gumbel race, over what row_truncated.cu kept. One block per
// row.
#include "truncate.cuh"

namespace vgkern {
namespace {

// The 1: for two blocks a multiprocessor ptxas gives 64 registers on sm_80, and spills.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) row_sample_kernel(RowSampleArgs a) {
  VG_SHARED(Slots<Best>, shared);
  const int64_t vocab = a.logits.columns;
  for (int64_t i = blockIdx.x; i < a.logits.rows; i += gridDim.x) {
    const bool greedy = temperature_of(a.options, i) == 0.f;
    const Row<T> row{static_cast<const T*>(a.logits.data) + i * a.logits.stride, vocab, a.scale,
                     inverse_of(a.options, i), shared.bytes};
    const Cut cut = cut_of(a.cut, i, vocab);
    const NoiseRow noise = noise_row(a.noise.seed, a.noise.sequence[i], a.noise.position[i]);
    Best best;
    Words words{};
    row.each([&](int64_t v, float z) {  // v ascends within chunks that start at a multiple of 4
      if ((v & 3) == 0 && !greedy) words = philox(uint32_t(v / 4), noise);
      if (!cut.keeps_z(z, v)) return;
      const uint32_t word =
          (v & 2) ? ((v & 1) ? words.w[3] : words.w[2]) : ((v & 1) ? words.w[1] : words.w[0]);
      best.offer(greedy ? z : z + gumbel(word), z, v);
    });
    best = row.reduce(best, Best());
    if (threadIdx.x == 0) a.token[i] = best.id < 0 ? -2 : best.id;
  }
}

template <class T>
int launch_sample(const RowSampleArgs& a, void* stream) {
  const auto kernel = row_sample_kernel<T>;
  const int threads = threads_for((a.logits.columns + 3) / 4);
  VG_LAUNCH(kernel, grid_for(a.logits.rows), threads, 0, stream, a);
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int vg_row_sample(const RowSampleArgs* a, void* stream) {
  if (a->logits.rows == 0) return 0;
  switch (a->logits.dtype) {
    case kF32: return launch_sample<float>(*a, stream);
    case kBF16: return launch_sample<__nv_bfloat16>(*a, stream);
    default: return launch_sample<__half>(*a, stream);
  }
}

}  // namespace vgkern
