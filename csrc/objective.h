// The loss of a token and of its sequence: values and slopes. The C++ twin of policy_loss_ref, with
// every knob of vgkern.objectives.Objective. Plain maths: it compiles for a GPU too (VG_HD).
//
//   1. sums    what a sequence sums over its tokens: own_log_ratio, ratio_part, mismatch_part
//   2. levels  sequence_of(those sums); a row-local objective needs none of it: Sequence{}
//   3. tokens  token_loss: value, slope in its own log-prob, slope in the sequence's log-ratio
//   4. spread  dlogp of each token += ratio_share * (3.'s weighted slopes, summed over the
//   sequence)
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define VG_HD __host__ __device__
#else
#define VG_HD
#endif

namespace vgkern {

constexpr float kClamp = 20.f;             // of every exponent
constexpr float kLow = -1e15f;             // stands for a log-prob of -inf
constexpr float kLogTiny = -18.42068074f;  // log 1e-8, VESPO's lower bound
constexpr float kK3Max = 10.f;

// The orders of RATIOS, SURROGATES, KLS and CORRECTIONS in vgkern.objectives.
enum Ratio { kNoRatio, kToken, kSequence, kSequenceSum, kSequenceToken, kGeometric };
enum Surrogate { kClip, kLinear, kCispo, kSapo, kVespo };
enum Kl { kK1, kK2, kK3, kK3Clamped, kAbs };
enum Correction { kNoFix, kTokenTruncate, kTokenMask, kSequenceTruncate, kSequenceMask };

struct Objective {
  int ratio, surrogate;
  float clip_low, clip_high, dual_clip, delta, beta;  // dual_clip, delta: 0 is none
  int kl;
  bool kl_ratio_corrected, kl_straight_through;
  int correction;
  float sampler_min, sampler_max, entropy_coef, tau_pos, tau_neg;
  float k_pos, lambda_pos, k_neg, lambda_neg;

  template <class List>  // Objective.pack(); on the host: kernels take the struct by value
  explicit Objective(const List& k)
      : ratio(int(k[0])), surrogate(int(k[1])), clip_low(float(k[2])), clip_high(float(k[3])),
        dual_clip(float(k[4])), delta(float(k[5])), beta(float(k[6])), kl(int(k[7])),
        kl_ratio_corrected(k[8] != 0), kl_straight_through(k[9] != 0), correction(int(k[10])),
        sampler_min(float(k[11])), sampler_max(float(k[12])), entropy_coef(float(k[13])),
        tau_pos(float(k[14])), tau_neg(float(k[15])), k_pos(float(k[16])), lambda_pos(float(k[17])),
        k_neg(float(k[18])), lambda_neg(float(k[19])) {}

  VG_HD bool row_local() const { return ratio <= kToken && correction < kSequenceTruncate; }
  // a row with advantage 0 has a gradient all the same
  VG_HD bool always_active() const { return beta != 0.f || entropy_coef != 0.f; }
};

// Unlike fmin and fmax these hand a NaN in x on.
VG_HD inline float at_most(float x, float top) { return top < x ? top : x; }
VG_HD inline float at_least(float x, float bottom) { return x < bottom ? bottom : x; }
VG_HD inline float between(float x, float lo, float hi) { return at_most(at_least(x, lo), hi); }
// Of running extremes: a NaN in x stays, whatever follows it.
template <class T>
VG_HD inline T lesser(T x, T least) {
  return x < least || x != x ? x : least;
}
template <class T>
VG_HD inline T greater(T x, T most) {
  return x > most || x != x ? x : most;
}
VG_HD inline float clamped(float x) { return between(x, -kClamp, kClamp); }
VG_HD inline bool inside(float x) { return x >= -kClamp && x <= kClamp; }

struct Token {
  float logp, old, advantage;
  float ref = 0.f, sampler = 0.f;
  bool has_ref = false, has_sampler = false;
};

// x - y of log-probs; 0 where both are -inf (a blocked token)
VG_HD inline float log_ratio(float x, float y) { return at_least(x, kLow) - at_least(y, kLow); }
VG_HD inline float own_log_ratio(const Token& t) { return log_ratio(t.logp, t.old); }

// 1. What a token adds to the sums of its sequence -----------------------------------------------

VG_HD inline float ratio_part(const Token& t, const Objective& o) {
  const float own = clamped(own_log_ratio(t));
  if (o.ratio != kGeometric) return own;
  return t.advantage > 0.f ? at_most(own, o.clip_high) : at_least(own, -o.clip_low);
}

// exp(old - sampler), truncated or masked, from the log of a token or the sum of a sequence
VG_HD inline float correction_weight(float gap, const Objective& o) {
  const float w = std::exp(clamped(gap));
  if (o.correction == kTokenTruncate || o.correction == kSequenceTruncate)
    return between(w, o.sampler_min, o.sampler_max);
  return w < o.sampler_min || w > o.sampler_max ? 0.f : w;  // NaN stays visible
}

VG_HD inline float mismatch_part(const Token& t, const Objective& o) {
  if (!t.has_sampler || o.correction == kNoFix) return 0.f;
  const float gap = log_ratio(t.old, t.sampler);
  if (o.surrogate != kVespo) return clamped(gap);
  return between(std::log(correction_weight(gap, o)), kLogTiny, kClamp);
}

// 2. What every token of a sequence shares -------------------------------------------------------

struct Sequence {
  float log_ratio = 0.f;       // what r is formed of, if of the sequence
  float mismatch = 0.f;        // sum of mismatch_part
  float inverse_length = 1.f;  // 1 / number of unmasked tokens
};

VG_HD inline Sequence sequence_of(double length, double ratio_sum, double mismatch_sum,
                                  const Objective& o) {
  const double n = length < 1 ? 1 : length;
  const double d = o.ratio == kSequenceSum ? ratio_sum : ratio_sum / n;
  return {float(d), float(mismatch_sum), float(1 / n)};
}

// 3. One token -----------------------------------------------------------------------------------

struct TokenLoss {
  double value;          // l_i, without the entropy term
  float slope;           // dl_i / dlogp_i, but for its share in the sequence's log-ratio
  float sequence_slope;  // dl_i / d(log-ratio of the sequence); 0 where d is the token's own
  // for the metrics: log-ratio and r of the surrogate, KL, what took the gradient away
  float log_ratio, ratio;
  double kl;
  bool low, high, dual;
};

// Value and slope of a surrogate in d, where r = exp(d), dr its slope; `score` is its own slope.
struct Surrogated {
  double value = 0, along_d = 0, score = 0;
  bool low = false, high = false, dual = false;
};

VG_HD inline Surrogated clip_surrogate(double a, float r, float dr, const Objective& o) {
  Surrogated s;
  const float lo = 1.f - o.clip_low, hi = 1.f + o.clip_high;
  const bool cap = o.delta > 0.f;
  const double one = double(cap ? at_most(r, o.delta) : r) * a,
               two = double(between(r, lo, hi)) * a;
  const bool first = one <= two;
  const bool moves = (first & (!cap | (r <= o.delta))) | (!first & (r >= lo) & (r <= hi));
  s.value = -(two < one ? two : one);
  s.along_d = moves ? -a * dr : 0;
  // not &&: the sign of an advantage is a coin, which no branch predictor knows
  s.low = (a < 0) & (r < lo);
  s.high = (a > 0) & (r > hi);
  s.dual = cap & (r > o.delta) & (((a < 0) & (o.delta >= hi)) | ((a > 0) & (r <= hi)));
  if (o.dual_clip > 0.f && a < 0 && r > o.dual_clip) {
    s.value = -double(o.dual_clip) * a;
    s.along_d = 0;
    s.dual = true;
  }
  return s;
}

// VESPO's gamma weight of the sequence's log-ratio, the sampler's mismatch included
VG_HD inline double phi(double a, const Sequence& seq, const Objective& o) {
  const double w = between(seq.log_ratio + seq.mismatch, kLogTiny, kClamp);
  const double k = a >= 0 ? o.k_pos : o.k_neg, by = a >= 0 ? o.lambda_pos : o.lambda_neg;
  const double x = by + k * w - by * std::exp(w);
  return std::exp(x > kClamp ? double(kClamp) : x);
}

VG_HD inline Surrogated surrogate_loss(const Token& t, float d, float r, float dr,
                                       const Sequence& seq, const Objective& o) {
  const double a = t.advantage, lp = t.logp == -INFINITY ? 0.0 : double(t.logp);
  const double live = t.logp == -INFINITY ? 0 : 1;  // a blocked token has no score
  Surrogated s;
  switch (o.surrogate) {
    case kClip: return clip_surrogate(a, r, dr, o);
    case kLinear:
      if (o.ratio == kNoRatio) {
        s.value = -a * lp;
        s.score = -a * live;
      } else {
        s.value = -a * r;
        s.along_d = -a * dr;
      }
      if (o.ratio == kGeometric) {
        const float own = own_log_ratio(t);
        s.low = a < 0 && own < -o.clip_low;
        s.high = a > 0 && own > o.clip_high;
      }
      return s;
    case kCispo: {
      const float lo = 1.f - o.clip_low, hi = 1.f + o.clip_high;
      s.score = -double(between(r, lo, hi)) * a * live;
      s.value = -double(between(r, lo, hi)) * a * lp;
      s.low = a != 0 && r < lo;
      s.high = a != 0 && r > hi;
      return s;
    }
    case kSapo: {
      const double tau = a > 0 ? o.tau_pos : o.tau_neg;
      const double gate = 1 / (1 + std::exp(-tau * (double(r) - 1)));
      s.value = -a * 4 / tau * gate;
      s.along_d = -a * 4 * gate * (1 - gate) * dr;
      return s;
    }
    default: {
      const double weight = phi(a, seq, o);
      s.value = -weight * a * lp;
      s.score = -weight * a * live;
      return s;
    }
  }
}

VG_HD inline double kl_value(float e, const Objective& o, double* slope) {  // slope: dkl/dlogp
  const double c = clamped(e), x = e, k3 = std::expm1(c) - c;
  const bool moves = inside(e);
  double value;
  switch (o.kl) {
    case kK1: value = -x, *slope = 1; break;
    case kK2: value = 0.5 * x * x, *slope = -x; break;
    case kK3: value = k3, *slope = moves ? -std::expm1(c) : 0; break;
    case kK3Clamped:
      value = k3 > kK3Max ? double(kK3Max) : k3;
      *slope = moves && k3 <= kK3Max ? -std::expm1(c) : 0;
      break;
    default: value = std::fabs(x), *slope = x > 0 ? -1 : (x < 0 ? 1 : 0);
  }
  if (o.kl_straight_through) *slope = -x;
  return value;
}

VG_HD inline TokenLoss token_loss(const Token& t, const Sequence& seq, const Objective& o) {
  const bool possible = !(t.logp == -INFINITY), shared = o.ratio > kToken;
  const float own = own_log_ratio(t), d = shared ? seq.log_ratio : own;
  const float r = std::exp(clamped(d));
  // Sequence slopes leave the blocked tokens out when they are spread.
  const bool through = shared && o.ratio != kSequenceToken;
  const bool moves = through || (possible && inside(own));
  const float dr = inside(d) && moves ? r : 0.f;
  Surrogated s = surrogate_loss(t, d, r, dr, seq, o);
  double fix = 1, value, along_d, slope;
  if (t.has_sampler && o.correction != kNoFix && o.surrogate != kVespo)
    fix = correction_weight(
        o.correction >= kSequenceTruncate ? seq.mismatch : log_ratio(t.old, t.sampler), o);
  value = s.value * fix;
  along_d = s.along_d * fix;
  slope = s.score * fix;
  double kl = 0;
  if (t.has_ref) {
    double dkl;
    kl = kl_value(log_ratio(t.ref, t.logp), o, &dkl);
    if (o.beta != 0.f) {
      // With the sum and the geometric mean the KL term takes the token's own ratio.
      const bool token_ratio = o.ratio == kSequenceSum || o.ratio == kGeometric;
      const double rk = !o.kl_ratio_corrected ? 1 : token_ratio ? std::exp(clamped(own)) : r;
      value += o.beta * kl * rk;
      slope += possible ? o.beta * dkl * rk : 0;
      if (o.kl_ratio_corrected && token_ratio)
        slope += possible && inside(own) ? o.beta * kl * rk : 0;
      else if (o.kl_ratio_corrected)
        along_d += o.beta * kl * dr;
    }
  }
  if (through) return {value, float(slope), float(along_d), d, r, kl, s.low, s.high, s.dual};
  return {value, float(slope + along_d), 0.f, d, r, kl, s.low, s.high, s.dual};
}

// 4. d(log-ratio of the sequence) / dlogp of this token ------------------------------------------

VG_HD inline float ratio_share(const Token& t, const Sequence& seq, const Objective& o) {
  if (t.logp == -INFINITY || o.ratio <= kToken || o.ratio == kSequenceToken) return 0.f;
  const float own = own_log_ratio(t);
  if (!inside(own)) return 0.f;
  if (o.ratio == kSequenceSum) return 1.f;
  if (o.ratio == kSequence) return seq.inverse_length;
  const bool free = t.advantage > 0.f ? own <= o.clip_high : own >= -o.clip_low;
  return free ? seq.inverse_length : 0.f;
}

// What rows are counted for, in the order of vgkern.ops.policy_loss.COUNTS. -----------------------

// A NaN in a token's term, its entropy's part with it: then its gradient is NaN as well, whatever
// the term was NaN from, so that whoever guards on gradients sees it.
VG_HD inline float seen(double value, float slope) { return value != value ? float(value) : slope; }

// From sums to shares and means of the active rows; extremes are 1 where there are
// none. In fp32, as every backend does it.
VG_HD inline void finish_counts(float* o) {
  const float n = at_least(o[1], 1.f);
  for (int i = 2; i < 8; ++i) o[i] /= n;
  if (!(o[1] > 0.f)) o[8] = o[9] = 1.f;
  if (o[11] > -kLow / 2) o[11] = INFINITY;  // a gap to a log-prob of -inf
}

struct Counts {
  double tokens = 0, active = 0, low = 0, high = 0, dual = 0, kl = 0, entropy = 0, ratio = 0;
  float ratio_min = INFINITY, ratio_max = -INFINITY;
  double clamped = 0;
  float gap = 0;
  static constexpr int kSize = 12;
  void add(const Token& t, const TokenLoss& l) {
    low += l.low;
    high += l.high;
    dual += l.dual;
    kl += l.kl;
    ratio += l.ratio;
    ratio_min = lesser(l.ratio, ratio_min);
    ratio_max = greater(l.ratio, ratio_max);
    clamped += !inside(l.log_ratio);
    if (t.has_sampler) gap = greater(std::fabs(log_ratio(t.logp, t.sampler)), gap);
  }
  void merge(const Counts& c) {
    tokens += c.tokens;
    active += c.active;
    low += c.low;
    high += c.high;
    dual += c.dual;
    kl += c.kl;
    entropy += c.entropy;
    ratio += c.ratio;
    ratio_min = lesser(c.ratio_min, ratio_min);
    ratio_max = greater(c.ratio_max, ratio_max);
    clamped += c.clamped;
    gap = greater(c.gap, gap);
  }
  void write(float* o) const {
    const double v[kSize] = {tokens,  active, low,       high,      dual,    kl,
                             entropy, ratio,  ratio_min, ratio_max, clamped, gap};
    for (int i = 0; i < kSize; ++i) o[i] = float(v[i]);
    finish_counts(o);
  }
};

}  // namespace vgkern
