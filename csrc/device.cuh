// What the kernels share: launch macros, 16-byte loads, reductions over a block.
//
// The three macros are all that the host emulation (tests/emulation) needs: shared memory it can
// poison, and a launch it can run.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

#include "launch.cuh"
#include "philox.cuh"

#ifndef VG_EMULATED
#define VG_SHARED(T, name) __shared__ T name
#define VG_DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#define VG_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif
#define VG_DEVICE __device__ __forceinline__

namespace vgkern {

constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / 32;
constexpr float kInf = __builtin_huge_valf();

VG_DEVICE float widen(float x) { return x; }
VG_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
VG_DEVICE float widen(__half x) { return __half2float(x); }
VG_DEVICE void narrow(float x, float& to) { to = x; }
VG_DEVICE void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }
VG_DEVICE void narrow(float x, __half& to) { to = __float2half(x); }

template <class T>
constexpr int kChunk = 16 / sizeof(T);  // columns of one 16-byte load

// The widest vector that N values of T fill: 16 or 8 bytes.
template <int Bytes>
struct Raw {
  using type = uint4;
};
template <>
struct Raw<8> {
  using type = uint2;
};

// Columns v .. v + N of a row (v a multiple of N) as floats, `fill` past its end; vector loads
// where the row's start allows them.
template <int N, class T>
VG_DEVICE void load_columns(const T* row, int64_t v, int64_t columns, float fill, float (&x)[N]) {
  using R = typename Raw<N * sizeof(T)>::type;
  constexpr int part = sizeof(R) / sizeof(T);
  if (v + N <= columns && (reinterpret_cast<uintptr_t>(row) & (sizeof(R) - 1)) == 0) {
#pragma unroll
    for (int k = 0; k < N; k += part) {
      const R raw = *reinterpret_cast<const R*>(row + v + k);
      T values[part];
      memcpy(values, &raw, sizeof(R));
#pragma unroll
      for (int j = 0; j < part; ++j) x[k + j] = widen(values[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = v + j < columns ? widen(row[v + j]) : fill;
  }
}

template <int N, class T>
VG_DEVICE void store_columns(T* row, int64_t v, int64_t columns, const float (&x)[N]) {
  using R = typename Raw<N * sizeof(T)>::type;
  constexpr int part = sizeof(R) / sizeof(T);
  if (v + N <= columns && (reinterpret_cast<uintptr_t>(row) & (sizeof(R) - 1)) == 0) {
#pragma unroll
    for (int k = 0; k < N; k += part) {
      T values[part];
#pragma unroll
      for (int j = 0; j < part; ++j) narrow(x[k + j], values[j]);
      R raw;
      memcpy(&raw, values, sizeof(R));
      *reinterpret_cast<R*>(row + v + k) = raw;
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (v + j < columns) narrow(x[j], row[v + j]);
  }
}

// The value of lane (this ^ offset), for any struct of 32-bit words.
template <class S>
VG_DEVICE S shuffle_xor(const S& s, int offset) {
  static_assert(sizeof(S) % 4 == 0, "");
  uint32_t words[sizeof(S) / 4];
  memcpy(words, &s, sizeof(S));
#pragma unroll
  for (unsigned i = 0; i < sizeof(S) / 4; ++i)
    words[i] = __shfl_xor_sync(0xffffffffu, words[i], offset);
  S out;
  memcpy(&out, words, sizeof(S));
  return out;
}

// S has `void merge(const S& later)`. The order of merging is fixed by lane and warp, so every
// thread holds the same bits.
template <class S>
VG_DEVICE S warp_reduce(S s, int lanes = 32) {
  for (int offset = 1; offset < lanes; offset *= 2) {
    S other = shuffle_xor(s, offset);
    if (threadIdx.x & offset) {
      other.merge(s);
      s = other;
    } else {
      s.merge(other);
    }
  }
  return s;
}

// Shared memory for one S of every warp; raw, since shared variables have no constructors.
template <class S>
struct Slots {
  alignas(S) char bytes[kMaxWarps * sizeof(S)];
  VG_DEVICE S* get() { return reinterpret_cast<S*>(bytes); }
};

// Over all threads of a block of 32 w <= kMaxThreads; `none` changes nothing when merged.
template <class S>
VG_DEVICE S block_reduce(S s, const S& none, S* shared) {
  s = warp_reduce(s);
  const int warps = blockDim.x / 32, lane = threadIdx.x & 31;
  if (warps == 1) return s;
  if (lane == 0) shared[threadIdx.x / 32] = s;
  __syncthreads();
  const int from = lane & (kMaxWarps - 1);
  s = warp_reduce(from < warps ? shared[from] : none, kMaxWarps);
  __syncthreads();  // `shared` may be written again
  return s;
}

struct SumU64 {
  uint64_t value;
  VG_DEVICE void merge(const SumU64& o) { value += o.value; }
};

// Threads for one row of so many chunks of work.
inline int threads_for(int64_t chunks) {
  const int64_t rounded = (chunks + 31) / 32 * 32;
  return int(rounded < 32 ? 32 : rounded > kMaxThreads ? kMaxThreads : rounded);
}

// One block per row; a kernel strides over what the grid's limit leaves.
inline unsigned grid_for(int64_t rows) { return unsigned(rows < 0x7fffffff ? rows : 0x7fffffff); }

}  // namespace vgkern
