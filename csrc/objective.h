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

// logp - old_logp; 0 where both are -inf (a blocked token)
inline float log_ratio(float logp, float old) {
  constexpr float low = std::numeric_limits<float>::lowest();
  return std::max(logp, low) - std::max(old, low);
}

// d: log-ratio that r is formed of (token or sequence mean); e = ref - logp
inline TokenLoss token_loss(float logp, float a, float d, float e, bool has_ref, float weight,
                            const Objective& o, Counts& n) {
  const float r = std::exp(clamped(d));
  const bool possible = logp > -std::numeric_limits<float>::infinity();
  const float dr = inside(d) && possible ? r : 0.f;  // dr/dd
  double value, along_d = 0, own = 0;                // own: dl/dlogp beside the log-ratio
  if (o.surrogate == 0) {
    const double one = double(r) * a;
    const double two = double(std::min(std::max(r, 1.f - o.clip_low), 1.f + o.clip_high)) * a;
    value = -std::min(one, two);
    if (one <= two) along_d = -double(a) * dr;
    n.low += a < 0.f && r < 1.f - o.clip_low;
    n.high += a > 0.f && r > 1.f + o.clip_high;
    if (o.dual_clip > 0.f && a < 0.f && r > o.dual_clip) {
      value = -double(o.dual_clip) * a;
      along_d = 0;
      n.dual += 1;
    }
  } else if (o.ratio == 0) {
    value = -double(a) * logp;
    own = -a;
  } else {
    value = -double(a) * r;
    along_d = -double(a) * dr;
  }
  value *= weight;
  along_d *= weight;
  own *= weight;
  if (has_ref) {
    const double c = clamped(e), x = e;
    double kl, slope;  // slope: dkl/dlogp
    switch (o.kl) {
      case 0: kl = -x, slope = 1; break;
      case 1: kl = 0.5 * x * x, slope = -x; break;
      case 2: kl = std::expm1(c) - c, slope = inside(e) ? -std::expm1(c) : 0; break;
      default: kl = std::fabs(x), slope = x > 0 ? -1 : (x < 0 ? 1 : 0);
    }
    if (o.kl_straight_through) slope = -x;
    n.kl += kl;
    if (o.beta != 0.f) {
      const double by = o.kl_ratio_corrected ? double(o.beta) * r : double(o.beta);
      value += by * kl;
      own += by * slope;
      if (o.kl_ratio_corrected) along_d += o.beta * kl * dr;
    }
  }
  n.ratio += r;
  n.ratio_min = std::min(n.ratio_min, r);
  n.ratio_max = std::max(n.ratio_max, r);
  n.clamped += !inside(d);
  if (o.ratio == 2) return {value, float(own), float(along_d)};
  return {value, float(own + along_d), 0.f};
}

}  // namespace vgkern
