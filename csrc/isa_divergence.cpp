// Divergence of two rows of logits and its gradient, compiled once per instruction set (VG_ISA
// names it): entries of the table of isa_rows.cpp.
#include <algorithm>

#include "rows.h"
#include "vec.h"

namespace vgkern {

void VG_OF_ISA(divergence_)(const float*, const float*, int64_t, const TwoRows&, float*, float*);
void VG_OF_ISA(divergence_grad_)(float*, const float*, int64_t, const TwoRows&, float, float,
                                 float);

namespace {

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

}  // namespace

void VG_OF_ISA(divergence_)(const float* z, const float* t, int64_t n, const TwoRows& r,
                            float* value, float* inner) {
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

void VG_OF_ISA(divergence_grad_)(float* z, const float* t, int64_t n, const TwoRows& r, float k,
                                 float e, float scale) {
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

}  // namespace vgkern
