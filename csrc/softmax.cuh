// Softmax statistics of one row of logits, collapse-safe: the target is kept apart, as in common.h.
#pragma once
#include "device.cuh"

namespace vgkern {

VG_DEVICE float nan_value() { return __builtin_nanf(""); }

// z of a raw logit; `slope` is the soft-cap's, dz = slope * inv_temperature * dx.
VG_DEVICE float scaled(float x, int64_t v, const Scale& s, float inv_temperature, float& slope) {
  slope = 1.f;
  if (s.bias) x += s.bias[v];
  if (s.softcap != 0.f && x != -kInf) {  // a blocked id stays blocked
    const float t = tanhf(x / s.softcap);
    slope = 1.f - t * t;
    x = t * s.softcap;
  }
  return x * inv_temperature;
}

VG_DEVICE float scaled(float x, int64_t v, const Scale& s, float inv_temperature) {
  float slope;
  return scaled(x, v, s, inv_temperature, slope);
}

// sum of exp(z - max), and of exp(z - max) (z - max)
struct Softmax {
  float max = -kInf, sum = 0.f, dot = 0.f;
  VG_DEVICE void raise(float m) {
    if (m > max) {
      if (max > -kInf) {
        const float d = max - m, k = expf(d);
        dot = (dot + sum * d) * k;
        sum *= k;
      }
      max = m;
    }
  }
  VG_DEVICE void add(float z) {  // after raise(z); NaN reaches sum
    const float d = z - max, e = z == -kInf ? 0.f : expf(d);
    sum += e;
    dot += e == 0.f ? 0.f : e * d;
  }
  VG_DEVICE void merge(const Softmax& o) {
    Softmax other = o;
    raise(o.max);
    other.raise(max);
    sum += other.sum;
    dot += other.dot;
  }
};

struct RowStats {
  float logp, entropy, lse;
};

// `s` is over all ids but the target; `target` is its z.
VG_DEVICE RowStats finish(const Softmax& s, float target) {
  const bool empty = s.max == -kInf;
  RowStats r;
  if (s.sum != s.sum || target != target || target == kInf || s.max == kInf) {
    r.logp = r.entropy = r.lse = nan_value();
  } else if (target == -kInf) {  // a blocked target: the others keep their statistics
    r.logp = -kInf;
    r.lse = empty ? -kInf : s.max + logf(s.sum);
    r.entropy = empty ? 0.f : logf(s.sum) - s.dot / s.sum;
  } else if (target >= s.max) {  // log1p keeps what a 30-nat gap leaves of the others
    const float k = empty ? 0.f : expf(s.max - target), others = s.sum * k;
    const float log_sum = log1pf(others);
    const float dot = empty ? 0.f : k * (s.dot + s.sum * (s.max - target));
    r.logp = -log_sum;
    r.lse = target + log_sum;
    r.entropy = log_sum - dot / (1.f + others);
  } else {
    const float e = expf(target - s.max), sum = s.sum + e, log_sum = logf(sum);
    r.logp = target - s.max - log_sum;
    r.lse = s.max + log_sum;
    r.entropy = log_sum - (s.dot + e * (target - s.max)) / sum;
  }
  return r;
}

// The gradient of a row's logits from c = dl/dlogp and e = dl/dentropy, before the slopes:
// c (onehot - p) - e p (log p + entropy)
struct RowGradient {
  float e, base, own, lse;
  VG_DEVICE RowGradient(float c, float e, float logp, float entropy, float lse)
      : e(e), base(-c - e * entropy),
        own(c * -expm1f(logp) - (e == 0.f ? 0.f : e * expf(logp) * (logp + entropy))), lse(lse) {}
  VG_DEVICE float at(float z, bool target) const {  // p (base - e log p); a blocked id has none
    if (target) return own;
    const float d = z - lse;
    return z == -kInf ? 0.f : expf(d) * (base - (e == 0.f ? 0.f : e * d));
  }
};

// Is a row of `out` made in the place of its own, wider row of logits? Then a store of columns
// overwrites others that lie before them, so that all threads must have read up to here.
VG_DEVICE bool over(const Matrix& logits, const Matrix& out) {
  return logits.data == out.data && out.dtype != logits.dtype;
}

// The target is elsewhere (another shard of the vocabulary): `s` is over all ids here.
VG_DEVICE RowStats finish_elsewhere(const Softmax& s) {
  if (s.sum != s.sum || s.max == kInf) return {nan_value(), nan_value(), nan_value()};
  if (s.max == -kInf) return {kInf, 0.f, -kInf};
  const float log_sum = logf(s.sum), lse = s.max + log_sum;
  return {-lse, log_sum - s.dot / s.sum, lse};
}

}  // namespace vgkern
