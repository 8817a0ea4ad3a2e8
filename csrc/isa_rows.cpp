// The row kernels, compiled once per instruction set (VG_ISA names it).
#include <algorithm>
#include <limits>

#include "rows.h"
#include "vec.h"

namespace vgkern {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

inline float bf16_up(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint16_t bf16_down(float f) {  // round to nearest even
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? uint16_t((u >> 16) | 0x40u) : uint16_t(r);
}

void widen(Dtype t, const void* src, float* dst, int64_t n) {
  if (t == kF32) {
    std::memcpy(dst, src, sizeof(float) * n);
  } else if (t == kBF16) {
    auto* p = static_cast<const uint16_t*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = bf16_up(p[i]);
  } else {
    auto* p = static_cast<const _Float16*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = float(p[i]);
  }
}

void narrow(Dtype t, const float* src, void* dst, int64_t n) {
  if (t == kF32) {
    std::memcpy(dst, src, sizeof(float) * n);
  } else if (t == kBF16) {
    auto* p = static_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; ++i) p[i] = bf16_down(src[i]);
  } else {
    auto* p = static_cast<_Float16*>(dst);
    for (int64_t i = 0; i < n; ++i) p[i] = _Float16(src[i]);
  }
}

void add(float* acc, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) acc[i] += x[i];
}

void transform(float* x, int64_t n, int64_t v0, const Transform& t) {
  const float it = t.inv_temperature;
  if (t.bias)
    for (int64_t j = 0; j < n; ++j) x[j] += t.bias[v0 + j];
  if (t.softcap != 0.f) {
    const float up = 2.f / t.softcap, scale = t.softcap * it;
    for (int64_t j = 0; j < n; j += W) {
      vf v = j + W <= n ? load(x + j) : load_part(x + j, n - j, 0.f);
      vf a = v < 0.f ? -v : v;
      vf e = vexp(-a * up);  // tanh|v| = (1 - e) / (1 + e); for small v through its series
      vf s = a * (0.5f * up);
      vf q = s * s;
      vf series = s * (1.f + q * (-0.333333333f + q * (0.133333333f + q * -0.0539682540f)));
      vf th = s < 0.15f ? series : (1.f - e) / (1.f + e);
      vf z = (v < 0.f ? -th : th) * scale;
      z = v < -3e38f ? vset(-kInf) : z;  // a blocked id stays blocked
      if (j + W <= n)
        store(x + j, z);
      else
        store_part(x + j, n - j, z);
    }
  } else if (it != 1.f) {
    for (int64_t j = 0; j < n; ++j) x[j] *= it;
  }
}

inline float row_max(const float* z, int64_t n) {
  vf a = vset(-kInf), b = a;
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    a = vmax(a, load(z + j));
    b = vmax(b, load(z + j + W));
  }
  for (; j < n; j += W) a = vmax(a, j + W <= n ? load(z + j) : load_part(z + j, n - j, -kInf));
  return hmax(vmax(a, b));
}

// rescale (max, sum, dot) to a larger max
template <class S>
inline void raise(S& s, float m) {
  if (m > s.max) {
    if (s.max > -kInf) {
      float d = s.max - m, k = std::exp(d);
      s.dot = (s.dot + s.sum * d) * k;
      s.sum *= k;
    }
    s.max = m;
  }
}

void stats(float* z, int64_t n, int64_t y, RowState& s) {
  float keep = 0.f;
  if (y >= 0) {
    keep = s.target = z[y];
    z[y] = -kInf;
  }
  float m = row_max(z, n);
  if (m != -kInf || std::isnan(m)) {
    raise(s, m);
    if (std::isnan(m)) s.max = m;
    const vf mm = vset(s.max);
    vf a = vset(0.f), a2 = a, b = a, b2 = a;
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) {
      vf d0 = load(z + j) - mm, d1 = load(z + j + W) - mm;
      vf e0 = vexp(d0), e1 = vexp(d1);
      a += e0;
      a2 += e1;
      b += e0 * (d0 < -1e30f ? vset(0.f) : d0);
      b2 += e1 * (d1 < -1e30f ? vset(0.f) : d1);
    }
    for (; j < n; j += W) {
      vf d = (j + W <= n ? load(z + j) : load_part(z + j, n - j, -kInf)) - mm;
      vf e = vexp(d);
      a += e;
      b += e * (d < -1e30f ? vset(0.f) : d);
    }
    s.sum += hsum(a + a2);
    s.dot += hsum(b + b2);
  }
  if (y >= 0) z[y] = keep;
}

void grad(const float* z, float* dst, int64_t n, float lse, float a, float b, const Transform& t) {
  const vf l = vset(lse), va = vset(a), vb = vset(b);
  // slope of the soft-cap from its value: 1 - (z * temperature / softcap)^2
  const float k = t.softcap != 0.f ? 1.f / (t.inv_temperature * t.softcap) : 0.f;
  for (int64_t j = 0; j < n; j += W) {
    const bool whole = j + W <= n;
    vf x = whole ? load(z + j) : load_part(z + j, n - j, 0.f);
    vf d = x - l;
    vf g = vexp(d) * (va + vb * (d < -1e30f ? vset(-1e30f) : d));
    if (t.softcap != 0.f) {
      vf s = x < -3e38f ? vset(0.f) : x * k;
      g = g * (1.f - s * s);
    }
    if (whole)
      store(dst + j, g);
    else
      store_part(dst + j, n - j, g);
  }
}

inline float gumbel(uint32_t word) {
  float u = (float(word) + 0.5f) * 0x1p-32f;
  u = std::min(u, 1.f - 0x1p-24f);
  return -std::log(-std::log1p(-u));
}

// One tile of one row: statistics, and the Gumbel race. id v can beat the best only if
// -log1p(-u) < exp(z - best), and u <= -log1p(-u), so the logs are taken for the few that pass
// u < exp(z - best).
void race(const float* z, int64_t n, int64_t v0, const RaceKey& key, RaceState& s) {
  const float m = row_max(z, n);
  if (key.greedy) {
    if (m == -kInf) return;
    if (m == kInf) s.sum = std::numeric_limits<float>::quiet_NaN();
    if (m > s.best || s.best_id < 0) {
      int64_t j = 0;
      while (j + 1 < n && !(z[j] >= m)) ++j;
      if (m > s.best || (s.best_id < 0 && z[j] >= m)) s.best = s.best_z = m, s.best_id = v0 + j;
    }
    if (std::isnan(m)) s.sum = m;
    return;
  }
  if (m == -kInf) return;
  raise(s, m);
  if (std::isnan(m)) s.max = m;
  const vf mm = vset(s.max);
  vu lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  vf sum = vset(0.f), dot = sum;
  for (int64_t j = 0; j < n; j += 4 * W) {
    vu c[4] = {lane + uint32_t((v0 + j) / 4), key.position - vu{}, key.sequence_lo - vu{},
               key.sequence_hi - vu{}};
    philox(c, key.seed_lo, key.seed_hi);
    vu al = zip(c[0], c[2], 0), ah = zip(c[0], c[2], 1);
    vu bl = zip(c[1], c[3], 0), bh = zip(c[1], c[3], 1);
    vu words[4] = {zip(al, bl, 0), zip(al, bl, 1), zip(ah, bh, 0), zip(ah, bh, 1)};
    float k = std::exp(std::min(s.max - s.best, 80.f)) * (1.f + 1e-4f);
    for (int q = 0; q < 4; ++q) {
      const int64_t at = j + q * W;
      if (at >= n) break;
      vf d = (at + W <= n ? load(z + at) : load_part(z + at, n - at, -kInf)) - mm;
      vf e = vexp(d);
      sum += e;
      dot += e * (d < -1e30f ? vset(0.f) : d);
      vf u = __builtin_convertvector(words[q], vf) * 0x1p-32f;
      vi hit = u < e * k;
      if (!any(hit)) continue;
      for (int i = 0; i < W && at + i < n; ++i) {
        if (!hit[i]) continue;
        float y = z[at + i] + gumbel(words[q][i]);
        if (y > s.best) {
          s.best = y;
          s.best_z = z[at + i];
          s.best_id = v0 + at + i;
          k = std::exp(std::min(s.max - s.best, 80.f)) * (1.f + 1e-4f);
        }
      }
    }
  }
  s.sum += hsum(sum);
  s.dot += hsum(dot);
}

// What a column of two rows gives, with d = log p - log q:
//   a = p (exp(-d) - 1 + d)      sums to KL(p || q), every term >= 0: rounding of lse cancels
//   b = q (exp(d) - 1 - d)       sums to KL(q || p)
struct Column {
  vf p, q, d, lp;
  vi gone;  // blocked in both
  Column(vf z, vf t, const TwoRows& r) {
    d = (z - t) - (r.lse - r.teacher_lse);
    lp = z - r.lse;
    const vi no_p = z < -3e38f, no_q = t < -3e38f;
    gone = no_p & no_q;
    d = gone ? vset(0.f) : d;
    p = vexp(lp);
    q = vexp(t - r.teacher_lse);
  }
};

inline vf excess(vf x) {  // (exp(x) - 1 - x) / x^2 for |x| <= 1
  vf p = vset(2.0876757e-9f);
  p = p * x + 2.5052108e-8f;
  p = p * x + 2.7557319e-7f;
  p = p * x + 2.7557319e-6f;
  p = p * x + 2.4801587e-5f;
  p = p * x + 1.9841270e-4f;
  p = p * x + 1.3888889e-3f;
  p = p * x + 8.3333333e-3f;
  p = p * x + 4.1666667e-2f;
  p = p * x + 1.6666667e-1f;
  return p * x + 0.5f;
}

inline vf log_cosh(vf x) {
  const vf w = x * x, a = x < 0.f ? -x : x;
  vf s = vset(-9.0989649e-5f);
  s = s * w + 2.5658057e-4f;
  s = s * w - 7.3860296e-4f;
  s = s * w + 2.1869489e-3f;
  s = s * w - 6.7460317e-3f;
  s = s * w + 2.2222222e-2f;
  s = s * w - 8.3333333e-2f;
  s = (s * w + 0.5f) * w;
  return a < 0.5f ? s : a - 0.69314718f + vlog(1.f + vexp(-2.f * a));
}

// the term of KL(p || q): a of Column; x = +inf where only q is blocked
inline vf term(vf p, vf q, vf d) {
  const vf near = p * d * d * excess(-d), far = (q - p) + (p > 0.f ? p * d : vset(0.f));
  const vf a = d < 0.f ? -d : d;
  return a <= 1.f ? near : (d == vset(kInf) ? d : far);
}

inline vf bounded(vf d) { return d > 30.f ? vset(30.f) : (d < -30.f ? vset(-30.f) : d); }

void divergence(const float* z, const float* t, int64_t n, const TwoRows& r, float* value,
                float* inner) {
  vf sum = vset(0.f), in = sum;
  for (int64_t j = 0; j < n; j += W) {
    const bool whole = j + W <= n;
    const Column c(whole ? load(z + j) : load_part(z + j, n - j, -kInf),
                   whole ? load(t + j) : load_part(t + j, n - j, -kInf), r);
    if (r.kind == kJSD) {
      const vf d = bounded(c.d), l = log_cosh(0.5f * d);
      const vf a = 0.5f * term(c.p, c.q, d) - c.p * l, b = 0.5f * term(c.q, c.p, -d) - c.q * l;
      in += a;
      sum += 0.5f * (a + b);
    } else {
      sum += r.kind == kReverseKL ? term(c.p, c.q, c.d) : term(c.q, c.p, -c.d);
    }
  }
  *value = hsum(sum);
  *inner = r.kind == kJSD ? hsum(in) : *value;
}

// A column's gradient but for p times the mean over the row: terms p s, and p - q for the forward
// KL.
inline vf raw_grad(const Column& c, const TwoRows& r, float k, float e) {
  vf s = vset(0.f);
  if (e != 0.f) s = s - e * (c.lp < -1e30f ? vset(0.f) : c.lp);
  if (k == 0.f) return c.p * s;
  if (r.kind == kReverseKL) return c.p * (s + k * (c.p > 0.f ? c.d : vset(0.f)));
  if (r.kind == kJSD) {
    const vf h = 0.5f * bounded(c.d);
    return c.p * (s + 0.5f * k * (h - log_cosh(h)));
  }
  const vf a = c.d < 0.f ? -c.d : c.d;  // p - q, also where they are almost equal
  return c.p * s + k * (a <= 1.f ? c.p * (c.d - c.d * c.d * excess(-c.d)) : c.p - c.q);
}

int64_t row_argmax(const float* z, int64_t n) {
  constexpr int64_t kSpan = 1024;
  int64_t at = 0;
  float m = -kInf;
  for (int64_t j = 0; j < n; j += kSpan) {
    const float x = row_max(z + j, std::min(kSpan, n - j));
    if (x > m) m = x, at = j;
  }
  while (at < n - 1 && z[at] != m) ++at;
  return at;
}

void divergence_grad(float* z, const float* t, int64_t n, const TwoRows& r, float k, float e,
                     float scale) {
  vf sum = vset(0.f), dot = sum;
  auto column = [&](int64_t j) {
    const bool whole = j + W <= n;
    return Column(whole ? load(z + j) : load_part(z + j, n - j, -kInf),
                  whole ? load(t + j) : load_part(t + j, n - j, -kInf), r);
  };
  // Relative to the likeliest id: where p -> 1 nearly all of its slope cancels, here exactly.
  const int64_t top = row_argmax(z, n);
  const Column likely = column(top / W * W);
  const float p = likely.p[top % W];
  const vf centre = vset(p > 0.f ? raw_grad(likely, r, k, e)[top % W] / p : 0.f);
  for (int64_t j = 0; j < n; j += W) {
    const Column c = column(j);
    sum += c.p;
    dot += raw_grad(c, r, k, e) - c.p * centre;
  }
  const vf mean = vset(hsum(dot) / hsum(sum));  // the gradient sums to 0: an error of lse drops out
  for (int64_t j = 0; j < n; j += W) {
    const Column c = column(j);
    const vf g = (raw_grad(c, r, k, e) - c.p * centre - c.p * mean) * scale;
    if (j + W <= n)
      store(z + j, g);
    else
      store_part(z + j, n - j, g);
  }
}

}  // namespace

#define VG_CAT2(a, b) a##b
#define VG_CAT(a, b) VG_CAT2(a, b)
#define VG_STR2(a) #a
#define VG_STR(a) VG_STR2(a)
extern const RowKernels VG_CAT(rows_, VG_ISA);
const RowKernels VG_CAT(rows_, VG_ISA) = {
    VG_STR(VG_ISA), widen, narrow, transform, stats, grad, race, add, divergence, divergence_grad};

}  // namespace vgkern
