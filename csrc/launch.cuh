// The C launchers of csrc/*.cu: what they take. Plain C++, read by nvcc, by the binding and by the
// host emulation. All tensors are on one device; a launcher only launches: no allocation, no
// synchronisation, so that every one of them can be captured in a CUDA graph. Each returns a
// cudaError_t as int.
#pragma once
#include <stdint.h>

namespace vgkern {

enum Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

// Rows with unit-stride columns.
struct Matrix {
  void* data;
  int64_t rows, columns, stride;
  int dtype;
};

// z = softcap * tanh((x + bias) / softcap) * inv_temperature; softcap 0: none
struct Scale {
  const float* bias;  // [V] or null
  float inv_temperature, softcap;
};

struct NoiseRows {
  int64_t seed;
  const int64_t *sequence, *position;  // [N]
};

struct RowStatsArgs {
  Matrix logits;  // [N, V]
  Scale scale;
  const int64_t* targets;  // [N]
  int64_t ignore_index;
  float *logp, *entropy, *lse;  // [N]
};

struct RowGradArgs {
  Matrix logits, out;  // [N, V]; out may be logits
  Scale scale;
  const int64_t* targets;  // [N]
  int64_t ignore_index;
  const float *logp, *entropy, *lse;  // [N]
  const float *c, *e;                 // [N]: dl/dlogp, dl/dentropy; null: 0
  const float* u;                     // [N, V]: costates at the next input, through E; null: none
  int64_t u_stride;
  NoiseRows noise;  // of the sampled token, for u
  float tau;
  int expected;  // q = softmax(z) instead of softmax((z + g) / tau)
};

struct RowSampleArgs {
  Matrix logits;  // [N, V]
  Scale scale;    // inv_temperature is not used
  NoiseRows noise;
  const float* temperature;  // [N], 0: greedy
  int64_t top_k;             // 0: no limit
  double top_p, min_p;
  int64_t* token;         // [N]
  float *logp, *entropy;  // [N]
};

extern "C" {
int vg_row_stats(const RowStatsArgs*, void* stream);
int vg_row_grad(const RowGradArgs*, void* stream);
int vg_row_sample(const RowSampleArgs*, void* stream);
}

}  // namespace vgkern
