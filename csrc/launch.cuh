// The C launchers of csrc/*.cu: what they take. Plain C++, read by nvcc, by the binding and by the
// host emulation. All tensors are on one device; a launcher only launches: no allocation, no
// synchronisation, so that every one of them can be captured in a CUDA graph. Each returns a
// cudaError_t as int.
#pragma once
#include <stdint.h>

#include "objective.h"

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
  Matrix logits, out;  // [N, V]; out may be logits, or 16-bit rows at the starts of fp32 ones
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

// Statistics, the loss of a row's token, and the gradient of its logits: row-local objectives.
struct RowPolicyArgs {
  Objective objective;
  Matrix logits, out;  // [N, V]; out as for RowGradArgs; without data: no gradient
  Scale scale;
  const int64_t* targets;  // [N]
  int64_t ignore_index;
  const float *advantages, *weight, *old_logp, *ref_logp, *sampler_logp;  // [N]; null: none
  float *logp, *entropy;                                                  // [N]
  float* power;  // [N]: what fp16 gradients are multiplied by; null: nothing
};

// Temperature and truncation: a number for all rows, or [N] where there is a pointer.
struct RowOptions {
  float temperature;  // 0: greedy
  int64_t top_k;      // 0: no limit
  double top_p, min_p;
  const float* temperatures;
  const int64_t* top_ks;
  const float *top_ps, *min_ps;
};

struct RowSampleArgs {
  Matrix logits;  // [N, V]
  Scale scale;    // inv_temperature is not used
  NoiseRows noise;
  RowOptions options;
  const int64_t* cut;  // [N, 2], from vg_row_cut; null: nothing is cut
  int64_t* token;      // [N]; -2 where every id is blocked
};

// What each of the three launchers takes of these is in bindings_cuda.cpp.
struct RowTruncatedArgs {
  Matrix logits, out;      // [N, V]; out may be logits
  Scale scale;             // inv_temperature is not used
  const int64_t* targets;  // [N]; null for the cut: of every row
  RowOptions options;
  int64_t ignore_index;
  int64_t* cut;                 // [N, 2]: key and highest id of the smallest z that stays; may be
                                // null for the other two: nothing is cut
  float *logp, *entropy, *lse;  // [N]
  const float *c, *e;           // [N]: dl/dlogp, dl/dentropy
};

struct GroupAdvantagesArgs {
  const double* rewards;       // [B]
  const int64_t *ids, *order;  // [B]: sorted group ids, and the sample that each is of
  double* out;                 // [B]
  int64_t n;
  int estimator;  // vgkern.objectives.ESTIMATORS
};

// [N, n], any strides
struct Strided {
  const void* data;
  int64_t row, element;
};

// Forward where `action` is given, else backward.
struct GaussianActionArgs {
  int64_t rows, n;
  int dtype;
  NoiseRows noise;
  Strided mean, log_std, daction;
  void* action;            // [N, n]
  float* logp;             // [N]
  const float* dlogp;      // [N]
  void *dmean, *dlog_std;  // [N, n]
};

// A vector per step, [B, T, n], or per sequence, [B, n]; data may be null.
struct Steps {
  void* data;
  int64_t batch, step, element;
};

struct RecurrenceArgs {
  int64_t batch, steps, n;
  int dtype, dense, reverse;
  const void* jacobian;  // [B, T, n, n], or [B, T, n]
  int64_t jacobian_stride[4];
  Steps push, start;    // [B, T, n]; [B, n]
  const uint8_t* done;  // [B, T] or null
  int64_t done_batch, done_step;
  float gamma;
  Steps sigma;      // [B, T, n] or null: noise that is added, with `noise`
  NoiseRows noise;  // [B T]
  Steps out, last;  // x before every step, after the last one
  Steps other;      // [B, T, n]: the other factor of djacobian
  void* djacobian;  // [B, T, n, n] or [B, T, n], contiguous, or null
  Steps dsigma;     // x times the replayed noise
};

struct PolicyTermsArgs {
  Objective objective;
  int64_t sequences, width;                                                                // B, T
  const float *logp, *advantages, *weight, *old_logp, *ref_logp, *sampler_logp, *entropy;  // [B, T]
  float *dlogp, *dentropy;                                                                 // [B, T]
  double* partial;                    // [vg_policy_blocks, kTally]
  const int64_t* segments = nullptr;  // [segment_count + 1]: the sequences, not the rows of [B, T]
  int64_t segment_count = 0;
};
constexpr int kTally = 13;

struct PolicyTotalsArgs {
  const double* partial;  // [blocks, kTally]
  int64_t blocks;
  float *loss, *counts;  // [], [Counts::kSize]
};

extern "C" {
int64_t vg_policy_blocks(const PolicyTermsArgs*);
int vg_policy_terms(const PolicyTermsArgs*, void* stream);
int vg_policy_totals(const PolicyTotalsArgs*, void* stream);
int vg_group_advantages(const GroupAdvantagesArgs*, void* stream);
int vg_gaussian_action(const GaussianActionArgs*, void* stream);
int vg_recurrence(const RecurrenceArgs*, void* stream);
int vg_row_stats(const RowStatsArgs*, void* stream);
int vg_row_grad(const RowGradArgs*, void* stream);
int vg_row_policy(const RowPolicyArgs*, void* stream);
int vg_row_sample(const RowSampleArgs*, void* stream);
int vg_row_cut(const RowTruncatedArgs*, void* stream);
int vg_row_kept_stats(const RowTruncatedArgs*, void* stream);
int vg_row_kept_grad(const RowTruncatedArgs*, void* stream);
}

}  // namespace vgkern
