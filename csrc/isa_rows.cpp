// The row kernels, compiled once per instruction set (VG_ISA names it).
#include <algorithm>
#include <limits>

#include "rows.h"
#include "vec.h"

namespace vgkern {
namespace {

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

}  // namespace

#define VG_STR2(a) #a
#define VG_STR(a) VG_STR2(a)

// isa_divergence.cpp
void VG_OF_ISA(divergence_)(const float*, const float*, int64_t, const TwoRows&, float*, float*);
void VG_OF_ISA(divergence_grad_)(float*, const float*, int64_t, const TwoRows&, float, float,
                                 float);

extern const RowKernels VG_OF_ISA(rows_);
const RowKernels VG_OF_ISA(rows_) = {VG_STR(VG_ISA),
                                     widen,
                                     narrow,
                                     transform,
                                     stats,
                                     grad,
                                     race,
                                     add,
                                     VG_OF_ISA(divergence_),
                                     VG_OF_ISA(divergence_grad_)};

}  // namespace vgkern
