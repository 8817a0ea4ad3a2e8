// The costate's row kernels, compiled once per instruction set (VG_ISA names it).
#include "costate.h"
#include "vec.h"

namespace vgkern {
namespace {

constexpr float kLeast = -std::numeric_limits<float>::infinity();

// exp(-gumbel) = -log1p(-u), a standard exponential variate
inline vf variate(vu word) {
  vf u = (__builtin_convertvector(word, vf) + 0.5f) * 0x1p-32f;
  const vf most = vset(1.f - 0x1p-24f);
  u = u > most ? most : u;
  // log1p(-u) = log(c) - what the rounding of c lost, over c; from u = 1/2 on nothing is lost, and
  // below 2 - c is 1/c to more than what is lost has digits
  const vf c = 1.f - u;
  return ((c - 1.f) + u) * (2.f - c) - vlog(c);
}

// f(column, variates) of 4 W columns at a time; v0 is a multiple of 4
template <class F>
inline void replay(int64_t n, int64_t v0, const RaceKey& key, const F& f) {
  vu lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int64_t j = 0; j < n; j += 4 * W) {
    vu c[4] = {lane + uint32_t((v0 + j) / 4), key.position - vu{}, key.sequence_lo - vu{},
               key.sequence_hi - vu{}};
    philox(c, key.seed_lo, key.seed_hi);
    const vu al = zip(c[0], c[2], 0), ah = zip(c[0], c[2], 1);
    const vu bl = zip(c[1], c[3], 0), bh = zip(c[1], c[3], 1);
    const vu words[4] = {zip(al, bl, 0), zip(al, bl, 1), zip(ah, bh, 0), zip(ah, bh, 1)};
    for (int q = 0; q < 4 && j + q * W < n; ++q) f(j + q * W, variate(words[q]));
  }
}

void weigh(const float* z, const float* u, float* w, int64_t n, int64_t v0, const RaceKey* key,
           float anchor, Weighed& s) {
  const vf a = vset(anchor);
  vf sum = vset(0.f), top = vset(kLeast);
  auto at = [&](int64_t j, vf e) {
    sum += e;
    top = vmax(top, e);
    if (j + W <= n)
      store(w + j, e);
    else
      store_part(w + j, n - j, e);
  };
  auto weight = [&](int64_t j) {
    return vexp((j + W <= n ? load(z + j) : load_part(z + j, n - j, kLeast)) - a);
  };
  if (key)
    replay(n, v0, *key, [&](int64_t j, vf e) { at(j, weight(j) / e); });
  else
    for (int64_t j = 0; j < n; j += W) at(j, weight(j));
  const float most = hmax(top);
  if (most > s.top) {
    int64_t best = 0;
    while (best + 1 < n && !(w[best] >= most)) ++best;
    if (s.sum != 0.f) s.dot += s.sum * (s.base - u[best]);
    s.base = u[best];
    s.top = most;
  }
  s.sum += hsum(sum);
  const vf base = vset(s.base);
  vf dot = vset(0.f), other = dot;
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    dot += load(w + j) * (load(u + j) - base);
    other += load(w + j + W) * (load(u + j + W) - base);
  }
  for (; j < n; j += W) {
    const bool whole = j + W <= n;
    dot += (whole ? load(w + j) : load_part(w + j, n - j, 0.f)) *
           ((whole ? load(u + j) : load_part(u + j, n - j, 0.f)) - base);
  }
  s.dot += hsum(dot + other);
}

float perturb(const float* z, float* s, int64_t n, int64_t v0, const RaceKey& key, float inv_tau) {
  vf top = vset(kLeast);
  replay(n, v0, key, [&](int64_t j, vf e) {
    const bool whole = j + W <= n;
    const vf x = ((whole ? load(z + j) : load_part(z + j, n - j, kLeast)) - vlog(e)) * inv_tau;
    top = vmax(top, x);
    if (whole)
      store(s + j, x);
    else
      store_part(s + j, n - j, x);
  });
  return hmax(top);
}

void pulled(const float* z, float* u, const float* w, int64_t n, float scale, float base,
            float mean, const Transform& t) {
  const float slope = t.softcap != 0.f ? 1.f / (t.inv_temperature * t.softcap) : 0.f;
  for (int64_t j = 0; j < n; j += W) {
    const bool whole = j + W <= n;
    const vf e = (whole ? load(w + j) : load_part(w + j, n - j, 0.f)) * scale;
    vf g = e * (((whole ? load(u + j) : load_part(u + j, n - j, 0.f)) - base) - mean);
    if (slope != 0.f) {
      vf x = whole ? load(z + j) : load_part(z + j, n - j, 0.f);
      x = x < -3e38f ? vset(0.f) : x * slope;
      g = g * (1.f - x * x);
    }
    if (whole)
      store(u + j, g);
    else
      store_part(u + j, n - j, g);
  }
}

}  // namespace

extern const CostateKernels VG_OF_ISA(costate_);
const CostateKernels VG_OF_ISA(costate_) = {weigh, perturb, pulled};

}  // namespace vgkern
