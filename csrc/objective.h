// One token of a policy loss: value and slope. The C++ twin of policy_loss_ref; every knob of
// vgkern.objectives.Objective, in the order of Objective.pack().
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

namespace vgkern {

constexpr float kClamp = 20.f;

struct Objective {
  int ratio, surrogate;  // 0 none, 1 token, 2 sequence; 0 clip, 1 linear
  float clip_low, clip_high, dual_clip, beta;
  int kl;  // k1, k2, k3, abs
  bool kl_ratio_corrected, kl_straight_through;
  int correction;  // none, token_truncate, token_mask, sequence_truncate, sequence_mask
  float sampler_max, entropy_coef;

  template <class List>
  explicit Objective(const List& k)
      : ratio(int(k[0])), surrogate(int(k[1])), clip_low(float(k[2])), clip_high(float(k[3])),
        dual_clip(float(k[4])), beta(float(k[5])), kl(int(k[6])), kl_ratio_corrected(k[7] != 0),
        kl_straight_through(k[8] != 0), correction(int(k[9])), sampler_max(float(k[10])),
        entropy_coef(float(k[11])) {}
};

// Sums and extremes over rows, in the order of vgkern.ops.policy_loss.COUNTS.
struct Counts {
  double tokens = 0, active = 0, low = 0, high = 0, dual = 0, kl = 0, entropy = 0, ratio = 0;
  float ratio_min = std::numeric_limits<float>::infinity(), ratio_max = -ratio_min;
  double clamped = 0;
  float gap = 0;
  static constexpr int kSize = 12;
  void write(float* o) const {
    const double v[kSize] = {tokens,  active, low,       high,      dual,    kl,
                             entropy, ratio,  ratio_min, ratio_max, clamped, gap};
    for (int i = 0; i < kSize; ++i) o[i] = float(v[i]);
  }
};

struct TokenLoss {
  double value;  // l_i, without the entropy term
  float slope;   // dl_i / dlogp_i through this token's own log-ratio and KL
  // sequence-level ratio: the surrogate's slope in the mean log-ratio; `slope` has the rest
  float sequence_slope;
};

inline float clamped(float x) { return std::min(std::max(x, -kClamp), kClamp); }
inline bool inside(float x) { return x >= -kClamp && x <= kClamp; }

// exp(old - sampler), truncated or masked. `gap` is the token's, or the sequence's sum.
inline float correction_weight(float gap, const Objective& o) {
  if (o.correction == 0) return 1.f;
  float w = std::exp(clamped(gap));
  if (o.correction == 1 || o.correction == 3) return std::min(w, o.sampler_max);
  return w <= o.sampler_max ? w : 0.f;
}

// d: log-ratio that r is formed of (token or sequence mean); e = ref - logp
inline TokenLoss token_loss(float logp, float a, float d, float e, bool has_ref, float weight,
                            const Objective& o, Counts& n) {
  const float r = std::exp(clamped(d));
  const float dr = inside(d) ? r : 0.f;  // dr/dd
  double value;
  float along_d = 0.f, own = 0.f;
  if (o.surrogate == 0) {
    const bool cap = o.dual_clip > 0.f && a < 0.f && r > o.dual_clip;
    const double one = double(cap ? o.dual_clip : r) * a;
    const double two = double(std::min(std::max(r, 1.f - o.clip_low), 1.f + o.clip_high)) * a;
    value = -std::min(one, two);
    if (one <= two && !cap) along_d = -a * dr;
    n.low += a < 0.f && r < 1.f - o.clip_low;
    n.high += a > 0.f && r > 1.f + o.clip_high;
    n.dual += cap;
  } else if (o.ratio == 0) {
    value = -double(a) * logp;
    own = -a;
  } else {
    value = -double(a) * r;
    along_d = -a * dr;
  }
  value *= weight;
  along_d *= weight;
  own *= weight;
  if (has_ref) {
    const float c = clamped(e);
    double kl;
    float slope;  // dkl/dlogp
    switch (o.kl) {
      case 0: kl = -e, slope = 1.f; break;
      case 1: kl = 0.5 * double(e) * e, slope = -e; break;
      case 2: kl = std::expm1(c) - c, slope = inside(e) ? -std::expm1(c) : 0.f; break;
      default: kl = std::fabs(e), slope = e > 0.f ? -1.f : (e < 0.f ? 1.f : 0.f);
    }
    if (o.kl_straight_through) slope = -e;
    n.kl += kl;
    if (o.kl_ratio_corrected) {
      value += o.beta * kl * r;
      own += o.beta * slope * r;
      along_d += float(o.beta * kl) * dr;
    } else {
      value += o.beta * kl;
      own += o.beta * slope;
    }
  }
  n.ratio += r;
  n.ratio_min = std::min(n.ratio_min, r);
  n.ratio_max = std::max(n.ratio_max, r);
  n.clamped += !inside(d);
  if (o.ratio == 2) return {value, own, along_d};
  return {value, own + along_d, 0.f};
}

}  // namespace vgkern
