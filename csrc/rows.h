// Row kernels on fp32 tiles: one table of function pointers per instruction set, by CPU.
#pragma once
#include <cstdint>

namespace vgkern {

enum Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

// z = softcap * tanh(x / softcap) * inv_temperature after adding bias; identity when `plain`.
struct Transform {
  const float* bias = nullptr;  // [V] or null
  float inv_temperature = 1.f;
  float softcap = 0.f;  // 0: none
  bool plain() const { return !bias && inv_temperature == 1.f && softcap == 0.f; }
};

// Online softmax statistics of one row over its tiles. The target is kept apart (collapse-safe).
struct RowState {
  float max;  // over v != target
  float sum;  // sum exp(z - max)
  float dot;  // sum exp(z - max) * (z - max)
  float target;
};

struct RowStats {
  float logp, entropy, lse;
};

// The running winner of one row's Gumbel race, and the statistics that come with it.
struct RaceState {
  float max, sum, dot;
  float best, best_z;
  int64_t best_id;
};

struct RaceKey {
  uint32_t seed_lo, seed_hi, position, sequence_lo, sequence_hi;
  bool greedy;
};

enum Divergence : int { kForwardKL = 0, kReverseKL = 1, kJSD = 2 };

// One row of student and teacher, and their log-sum-exps.
struct TwoRows {
  float lse, teacher_lse;
  Divergence kind;
};

struct RowKernels {
  const char* isa;
  void (*widen)(Dtype, const void* src, float* dst, int64_t n);
  void (*narrow)(Dtype, const float* src, void* dst, int64_t n);
  // columns v0 .. v0 + n of a row, in place
  void (*transform)(float* x, int64_t n, int64_t v0, const Transform&);
  // y: target column within the tile, or -1
  void (*stats)(float* z, int64_t n, int64_t y, RowState&);
  // dst = exp(z - lse) * (a + b (z - lse)), times the soft-cap's slope; src may equal dst
  void (*grad)(const float* z, float* dst, int64_t n, float lse, float a, float b,
               const Transform&);
  void (*race)(const float* z, int64_t n, int64_t v0, const RaceKey&, RaceState&);
  void (*add)(float* acc, const float* x, int64_t n);
  // the divergence, and for the JSD also KL(p || m), of a whole row
  void (*divergence)(const float* z, const float* t, int64_t n, const TwoRows&, float* value,
                     float* inner);
  // z = scale (c dD/dz + e dH/dz): gradients of divergence and entropy
  void (*divergence_grad)(float* z, const float* t, int64_t n, const TwoRows&, float c, float e,
                          float scale);
};

const RowKernels& rows();  // the best table this CPU can run

}  // namespace vgkern
