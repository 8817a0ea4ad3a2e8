// A Gaussian action and its log-density, and their gradients: one warp per row, a lane per quad of
// elements, as the noise comes. The backward pass makes the same noise again.
#include "device.cuh"

namespace vgkern {
namespace {

constexpr int kRows = 4;  // rows, that is warps, of a block

struct Sum {
  float value = 0.f;
  VG_DEVICE void merge(const Sum& o) { value += o.value; }
};

VG_DEVICE void normal_quad(int64_t first, const NoiseRow& noise, float (&eps)[4]) {
  const Words words = philox(uint32_t(first / 4) | 0x80000000u, noise);
  normal_pair(words.w[0], words.w[1], eps[0], eps[1]);
  normal_pair(words.w[2], words.w[3], eps[2], eps[3]);
}

template <class T>
VG_DEVICE float at(const Strided& s, int64_t i, int64_t j) {
  return widen(static_cast<const T*>(s.data)[i * s.row + j * s.element]);
}

template <class T>
__global__ void __launch_bounds__(32 * kRows) action_kernel(GaussianActionArgs a) {
  const int lane = threadIdx.x & 31;
  const int64_t step = int64_t(gridDim.x) * kRows;
  for (int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x / 32; i < a.rows; i += step) {
    const NoiseRow noise = noise_row(a.noise.seed, a.noise.sequence[i], a.noise.position[i]);
    T* action = static_cast<T*>(a.action) + i * a.n;
    Sum logp;
    for (int64_t first = 4 * lane; first < a.n; first += 128) {
      float eps[4];
      normal_quad(first, noise, eps);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t j = first + k;
        if (j >= a.n) break;
        const float log_std = at<T>(a.log_std, i, j);
        narrow(at<T>(a.mean, i, j) + expf(log_std) * eps[k], action[j]);
        logp.value -= 0.5f * eps[k] * eps[k] + log_std + 0.9189385332046727f;
      }
    }
    logp = warp_reduce(logp);
    if (lane == 0) a.logp[i] = logp.value;
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kRows) action_grad_kernel(GaussianActionArgs a) {
  const int lane = threadIdx.x & 31;
  const int64_t step = int64_t(gridDim.x) * kRows;
  for (int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x / 32; i < a.rows; i += step) {
    const NoiseRow noise = noise_row(a.noise.seed, a.noise.sequence[i], a.noise.position[i]);
    T *dmean = static_cast<T*>(a.dmean) + i * a.n,
      *dlog_std = static_cast<T*>(a.dlog_std) + i * a.n;
    const float dlogp = a.dlogp[i];
    for (int64_t first = 4 * lane; first < a.n; first += 128) {
      float eps[4];
      normal_quad(first, noise, eps);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t j = first + k;
        if (j >= a.n) break;
        const float log_std = at<T>(a.log_std, i, j), d = at<T>(a.daction, i, j);
        narrow(d + dlogp * eps[k] * expf(-log_std), dmean[j]);
        narrow(d * expf(log_std) * eps[k] + dlogp * (eps[k] * eps[k] - 1.f), dlog_std[j]);
      }
    }
  }
}

template <class T>
int launch_action(const GaussianActionArgs& a, void* stream) {
  const auto kernel = a.action ? action_kernel<T> : action_grad_kernel<T>;
  VG_LAUNCH(kernel, grid_for((a.rows + kRows - 1) / kRows), 32 * kRows, 0, stream, a);
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int vg_gaussian_action(const GaussianActionArgs* a, void* stream) {
  if (a->rows == 0) return 0;
  switch (a->dtype) {
    case kF32: return launch_action<float>(*a, stream);
    case kBF16: return launch_action<__nv_bfloat16>(*a, stream);
    default: return launch_action<__half>(*a, stream);
  }
}

}  // namespace vgkern
