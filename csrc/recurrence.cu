// The recurrence of costate_scan and linear_rollout, and of both their backward passes:
//
//     forward in time:  x_{t+1} = push_t + gamma A_t x_t + sigma_t eps_t
//     backward:         x_t     = push_t + gamma A_t^T x_{t+1}
//
// Sequential in time, so a launch per step would cost more than the step: one block per sequence
// keeps x in shared memory and reads every Jacobian once; the outer products that are the
// gradients of the Jacobians are written on the way. Diagonal: a thread per element.
#include "device.cuh"

namespace vgkern {
namespace {

struct PerThread {
  float of[kMaxThreads];
};

template <class T>
VG_DEVICE float value(const T* p) {
  return widen(*p);
}

// Element (b, t, j) of a vector per step, as T.
template <class T>
VG_DEVICE T* element(const Steps& s, int64_t b, int64_t t, int64_t j) {
  return static_cast<T*>(s.data) + b * s.batch + t * s.step + j * s.element;
}

template <class T>
VG_DEVICE void store(const Steps& s, int64_t b, int64_t t, int64_t j, float x) {
  if (s.data) narrow(x, *element<T>(s, b, t, j));
}

// What element j receives at step t from outside: push, and the noise where there is some.
template <class T>
VG_DEVICE float pushed(const RecurrenceArgs& a, int64_t b, int64_t t, int64_t j) {
  float x = value(element<T>(a.push, b, t, j));
  if (a.sigma.data) {
    const int64_t at = b * a.steps + t;
    const NoiseRow noise = noise_row(a.noise.seed, a.noise.sequence[at], a.noise.position[at]);
    x += value(element<T>(a.sigma, b, t, j)) * normal(j, noise);
  }
  return x;
}

// Before a step: x goes out, and to dsigma.
template <class T>
VG_DEVICE void emit(const RecurrenceArgs& a, int64_t b, int64_t t, int64_t j, float x) {
  store<T>(a.out, b, t, j, x);
  if (a.dsigma.data) {
    const int64_t at = b * a.steps + t;
    const NoiseRow noise = noise_row(a.noise.seed, a.noise.sequence[at], a.noise.position[at]);
    store<T>(a.dsigma, b, t, j, x * normal(j, noise));
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) dense_kernel(RecurrenceArgs a) {
  VG_SHARED(PerThread, x_shared);
  VG_SHARED(PerThread, part_shared);
  float *x = x_shared.of, *part = part_shared.of;
  const int n = int(a.n), lanes = (n + 31) / 32 * 32, me = threadIdx.x;
  for (int64_t b = blockIdx.x; b < a.batch; b += gridDim.x) {
    float own = me < n ? value(element<T>(a.start, b, 0, me)) : 0.f;
    x[me] = own;
    __syncthreads();
    for (int64_t k = 0; k < a.steps; ++k) {
      const int64_t t = a.reverse ? a.steps - 1 - k : k;
      if (me < n) emit<T>(a, b, t, me, own);
      const bool cut = a.done && a.done[b * a.done_batch + t * a.done_step];
      const float gamma = cut ? 0.f : a.gamma;
      const T* A =
          static_cast<const T*>(a.jacobian) + b * a.jacobian_stride[0] + t * a.jacobian_stride[1];
      T* dA = a.djacobian ? static_cast<T*>(a.djacobian) + (b * a.steps + t) * n * n : nullptr;
      if (cut) {  // nothing passes; what is beyond the end may be NaN
        if (dA)
          for (int e = me; e < n * n; e += blockDim.x) narrow(0.f, dA[e]);
        part[me] = 0.f;
      } else if (a.reverse) {  // thread (group, j): every group-th row of column j
        const int j = me % lanes, groups = blockDim.x / lanes;
        float sum = 0.f;
        if (j < n)
          for (int i = me / lanes; i < n; i += groups) {
            sum += value(A + i * a.jacobian_stride[2] + j * a.jacobian_stride[3]) * x[i];
            if (dA)
              narrow(gamma * x[i] * value(element<T>(a.other, b, t, j)), dA[int64_t(i) * n + j]);
          }
        part[me] = sum;
      } else {  // a warp per row
        for (int i = me / 32; i < n; i += blockDim.x / 32) {
          float sum = 0.f;
          for (int j = me & 31; j < n; j += 32) {
            sum += value(A + i * a.jacobian_stride[2] + j * a.jacobian_stride[3]) * x[j];
            if (dA)
              narrow(gamma * value(element<T>(a.other, b, t, i)) * x[j], dA[int64_t(i) * n + j]);
          }
          for (int offset = 16; offset; offset /= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
          if ((me & 31) == 0) part[i] = sum;
        }
      }
      __syncthreads();
      if (me < n) {
        float moved = part[me];
        if (a.reverse && !cut)
          for (int g = me + lanes; g < int(blockDim.x); g += lanes) moved += part[g];
        own = pushed<T>(a, b, t, me) + (cut ? 0.f : gamma * moved);
        x[me] = own;
      }
      __syncthreads();
    }
    if (me < n) store<T>(a.last, b, 0, me, own);
    __syncthreads();  // x belongs to the next sequence from here
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) diagonal_kernel(RecurrenceArgs a) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < a.batch * a.n; k += step) {
    const int64_t b = k / a.n, j = k % a.n;
    float x = value(element<T>(a.start, b, 0, j));
    for (int64_t s = 0; s < a.steps; ++s) {
      const int64_t t = a.reverse ? a.steps - 1 - s : s;
      emit<T>(a, b, t, j, x);
      const bool cut = a.done && a.done[b * a.done_batch + t * a.done_step];
      if (a.djacobian) {
        const float other = cut ? 0.f : a.gamma * x * value(element<T>(a.other, b, t, j));
        narrow(other, static_cast<T*>(a.djacobian)[(b * a.steps + t) * a.n + j]);
      }
      const T* A = static_cast<const T*>(a.jacobian) + b * a.jacobian_stride[0] +
                   t * a.jacobian_stride[1] + j * a.jacobian_stride[2];
      x = pushed<T>(a, b, t, j) + (cut ? 0.f : a.gamma * (value(A) * x));
    }
    store<T>(a.last, b, 0, j, x);
  }
}

template <class T>
int launch_recurrence(const RecurrenceArgs& a, void* stream) {
  if (a.dense) {
    const int lanes = int(a.n + 31) / 32 * 32;
    const int groups = kMaxThreads / lanes < int(a.n) ? kMaxThreads / lanes : int(a.n);
    VG_LAUNCH(dense_kernel<T>, grid_for(a.batch), lanes * groups, 0, stream, a);
  } else {
    const int threads = 128;
    const int64_t blocks = (a.batch * a.n + threads - 1) / threads;
    VG_LAUNCH(diagonal_kernel<T>, grid_for(blocks), threads, 0, stream, a);
  }
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int vg_recurrence(const RecurrenceArgs* a, void* stream) {
  if (a->batch == 0 || a->n == 0) return 0;
  if (a->dense && a->n > kMaxThreads) return int(cudaErrorInvalidValue);
  switch (a->dtype) {
    case kF32: return launch_recurrence<float>(*a, stream);
    case kBF16: return launch_recurrence<__nv_bfloat16>(*a, stream);
    default: return launch_recurrence<__half>(*a, stream);
  }
}

}  // namespace vgkern
