// The third term of a row's gradient: (1/tau) q (u - <q, u>), q = softmax((z + gumbel) / tau),
// u = E costate. Row kernels on fp32 tiles, one table of function pointers per instruction set.
#pragma once
#include <limits>

#include "rows.h"

namespace vgkern {

// Sums over the tiles of one row, of w = q but for its norm.
struct Weighed {
  float sum = 0.f, dot = 0.f;  // of w, and of w (u - base)
  float top = -std::numeric_limits<float>::infinity();
  float base = 0.f;  // u where w is largest: what remains of a collapsed row stays exact
};

struct CostateKernels {
  // w = exp(z - anchor) / E with E the exponential variates of the noise, exp(-gumbel): the
  // softmax at tau 1 takes one logarithm and no maximum. No noise where `key` is null. w may be z.
  void (*weigh)(const float* z, const float* u, float* w, int64_t n, int64_t v0, const RaceKey* key,
                float anchor, Weighed&);
  // s = (z + gumbel) inv_tau; returns its maximum
  float (*perturb)(const float* z, float* s, int64_t n, int64_t v0, const RaceKey&, float inv_tau);
  // u = scale w (u - base - mean), times the slope of the soft-cap at z
  void (*pulled)(const float* z, float* u, const float* w, int64_t n, float scale, float base,
                 float mean, const Transform&);
};

const CostateKernels& costate_kernels();  // of the table that rows() chose

}  // namespace vgkern
