// What the operators share: checks that keep memory safe, dtypes, pointers, parallel loops.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "rows.h"

namespace vgkern {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return kF32;
    case at::kBFloat16: return kBF16;
    case at::kHalf: return kF16;
    default: TORCH_CHECK(false, "vgkern: no kernel for ", t.scalar_type());
  }
}

inline const char* row_ptr(const Tensor& t, int64_t i) {  // 64-bit offset before the multiply
  return static_cast<const char*>(t.const_data_ptr()) + i * t.stride(0) * t.element_size();
}

inline const float* f32_rows(const OptTensor& t, int64_t n, const char* name) {
  if (!t) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == n,
              "vgkern: ", name, " must be contiguous float32 [", n, "]");
  return t->const_data_ptr<float>();
}

inline const int64_t* i64_rows(const Tensor& t, int64_t n, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kLong && t.is_contiguous() && t.numel() == n, "vgkern: ", name,
              " must be contiguous int64 [", n, "]");
  return t.const_data_ptr<int64_t>();
}

template <class F>
inline void for_rows(int64_t n, const F& f) {
  at::parallel_for(0, n, 1, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) f(i);
  });
}

// Below the public functions a target is an id of [0, v), or v: "elsewhere", in another shard of
// the vocabulary. A row with anything else is never looked up: its log-probability is NaN.
inline bool no_id(int64_t y, int64_t v) { return y < 0 || y > v; }

// A target elsewhere has no column here; its logp is -lse.
inline RowStats finish(const RowState& s, bool elsewhere = false) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  RowStats r;
  if (std::isnan(s.max) || std::isnan(s.sum) || std::isnan(s.target) || s.target == inf) {
    r.logp = r.entropy = r.lse = std::numeric_limits<float>::quiet_NaN();
    return r;
  }
  if (s.target == -inf) {  // a blocked target: logp -inf, the others keep their statistics
    r.lse = s.max == -inf ? -inf : s.max + std::log(s.sum);
    r.logp = elsewhere ? -r.lse : -inf;
    r.entropy = s.max == -inf ? 0.f : std::log(s.sum) - s.dot / s.sum;
    return r;
  }
  if (s.target >= s.max) {  // log1p keeps what a 30-nat gap leaves of the others
    const float k = s.max == -inf ? 0.f : std::exp(s.max - s.target), o = s.sum * k;
    const float log_sum = std::log1p(o);
    r.logp = -log_sum;
    r.lse = s.target + log_sum;
    const float dot = s.max == -inf ? 0.f : k * (s.dot + s.sum * (s.max - s.target));
    r.entropy = log_sum - dot / (1.f + o);
  } else {
    const float e = std::exp(s.target - s.max), sum = s.sum + e, log_sum = std::log(sum);
    r.logp = s.target - s.max - log_sum;
    r.lse = s.max + log_sum;
    r.entropy = log_sum - (s.dot + e * (s.target - s.max)) / sum;
  }
  return r;
}

// A row whose target or whose every id is blocked has no gradient.
inline bool blocked(const RowStats& r) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  return r.logp == -inf || r.lse == -inf;
}

inline RowState fresh() {  // no target yet: blocked
  constexpr float inf = std::numeric_limits<float>::infinity();
  return {-inf, 0.f, 0.f, -inf};
}

// Coefficients of dz = p (a + b (z - lse)) + [v = y] target, from dl/dlogp and dl/dentropy.
struct RowGrad {
  float a, b, target;
};
inline RowGrad row_grad(float c, float e, const RowStats& r, const Transform& t) {
  const float p = std::exp(r.logp), it = t.inv_temperature;
  const float entropy_part = e == 0.f ? 0.f : e * p * (r.logp + r.entropy);
  return {it * (-c - e * r.entropy), it * -e, it * (c * -std::expm1(r.logp) - entropy_part)};
}

// dz of the target column, whose logit as z is zy: what the row's formula gives, times the slope of
// the soft-cap there.
inline float target_grad(const RowGrad& g, float zy, const Transform& t) {
  const float s = t.softcap == 0.f ? 0.f : zy * (1.f / (t.inv_temperature * t.softcap));
  return g.target * (1.f - s * s);
}

}  // namespace vgkern
