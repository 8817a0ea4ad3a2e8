// Portable vectors: GCC/Clang vector extensions, width set by the instruction set compiled for.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define VG_W 16
#elif defined(__AVX2__)
#define VG_W 8
#else
#define VG_W 4
#endif

// name_<instruction set>: what a file that is compiled once for each of them defines
#define VG_CAT2(a, b) a##b
#define VG_CAT(a, b) VG_CAT2(a, b)
#define VG_OF_ISA(name) VG_CAT(name, VG_ISA)

namespace vgkern {
namespace {

constexpr int W = VG_W;
constexpr float kInf = std::numeric_limits<float>::infinity();
typedef float vf __attribute__((vector_size(4 * VG_W)));
typedef int32_t vi __attribute__((vector_size(4 * VG_W)));
typedef uint32_t vu __attribute__((vector_size(4 * VG_W)));
typedef uint64_t vq __attribute__((vector_size(4 * VG_W)));

template <class V, class T>
inline V splat(T x) {
  V v;
  for (int i = 0; i < W; ++i) v[i] = x;
  return v;
}
inline vf vset(float x) { return x - vf{}; }
inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf load_part(const float* p, int64_t n, float fill) {
  float t[W];
  for (int i = 0; i < W; ++i) t[i] = i < n ? p[i] : fill;
  return load(t);
}
inline void store_part(float* p, int64_t n, vf v) {
  float t[W];
  store(t, v);
  std::memcpy(p, t, sizeof(float) * n);
}
// a NaN on either side survives
inline vf vmax(vf a, vf b) { return (a > b) | (a != a) ? a : b; }
inline float hmax(vf v) {
  float m = v[0];
  for (int i = 1; i < W; ++i) m = (m >= v[i] || m != m) ? m : v[i];
  return m;
}
inline float hsum(vf v) {
  float t[W];
  store(t, v);
  for (int k = W / 2; k; k /= 2)
    for (int i = 0; i < k; ++i) t[i] += t[i + k];
  return t[0];
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
inline bool any(vi m) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)m) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)m) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)m) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)m) != 0;
#else
  int32_t r = 0;
  for (int i = 0; i < W; ++i) r |= m[i];
  return r != 0;
#endif
}

// exp for x <= 88: 2^n P(f), degree-6 (Cephes). Below -87 exactly 0, so -inf is; NaN stays NaN.
inline vf vexp(vf x) {
  const vf magic = vset(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  vf c = x < -87.f ? vset(-87.f) : x;
  vf t = c * 1.44269504088896341f + magic;
  vf n = t - magic;
  vf f = c - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  vf p = vset(1.9875691500E-4f);
  p = p * f + 1.3981999507E-3f;
  p = p * f + 8.3334519073E-3f;
  p = p * f + 4.1665795894E-2f;
  p = p * f + 1.6666665459E-1f;
  p = p * f + 5.0000001201E-1f;
  p = p * (f * f) + (f + 1.f);
  vi e = ((vi)t - (vi)magic + 127) << 23;
  vf r = p * (vf)e;
  return x < -87.f ? vset(0.f) : r;
}

// log for normal x > 0 (Cephes); to 1e-7 of its value, near 1 too
inline vf vlog(vf x) {
  const vi bits = (vi)x;
  vf e = __builtin_convertvector(((bits >> 23) & 0xff) - 126, vf);
  vf m = (vf)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  const vi small = m < 0.707106781f;
  e = small ? e - 1.f : e;
  m = small ? m + m - 1.f : m - 1.f;
  vf p = vset(7.0376836292E-2f);
  p = p * m - 1.1514610310E-1f;
  p = p * m + 1.1676998740E-1f;
  p = p * m - 1.2420140846E-1f;
  p = p * m + 1.4249322787E-1f;
  p = p * m - 1.6668057665E-1f;
  p = p * m + 2.0000714765E-1f;
  p = p * m - 2.4999993993E-1f;
  p = p * m + 3.3333331174E-1f;
  const vf z = m * m;
  return (m + (m * z * p - e * 2.12194440e-4f - 0.5f * z)) + e * 0.693359375f;
}

// a * m as 32-bit halves
inline void mulhilo(vu a, uint32_t m, vu& hi, vu& lo) {
  vq even, odd;
  const vq mm = (uint64_t)m - vq{};
  vq a64 = (vq)a, o64 = a64 >> 32;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  even = (vq)_mm512_mul_epu32((__m512i)a64, (__m512i)mm);
  odd = (vq)_mm512_mul_epu32((__m512i)o64, (__m512i)mm);
#elif defined(__AVX2__)
  even = (vq)_mm256_mul_epu32((__m256i)a64, (__m256i)mm);
  odd = (vq)_mm256_mul_epu32((__m256i)o64, (__m256i)mm);
#elif defined(__SSE2__)
  even = (vq)_mm_mul_epu32((__m128i)a64, (__m128i)mm);
  odd = (vq)_mm_mul_epu32((__m128i)o64, (__m128i)mm);
#else
  even = (a64 & 0xffffffffull) * mm;
  odd = o64 * mm;
#endif
  hi = (vu)((even >> 32) | (odd & 0xffffffff00000000ull));
  lo = (vu)((even & 0xffffffffull) | (odd << 32));
}

// Philox4x32-10 (Salmon et al. 2011), one counter per lane
inline void philox(vu c[4], uint32_t k0, uint32_t k1) {
  for (int r = 0; r < 10; ++r) {
    vu h0, l0, h1, l1;
    mulhilo(c[0], 0xD2511F53u, h0, l0);
    mulhilo(c[2], 0xCD9E8D57u, h1, l1);
    vu n0 = h1 ^ c[1] ^ k0, n2 = h0 ^ c[3] ^ k1;
    c[0] = n0;
    c[1] = l1;
    c[2] = n2;
    c[3] = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

inline vu shuffle2(vu a, vu b, vu m) {
#if defined(__clang__)
  vu r;
  for (int i = 0; i < W; ++i) r[i] = m[i] < unsigned(W) ? a[m[i]] : b[m[i] - W];
  return r;
#else
  return __builtin_shuffle(a, b, m);
#endif
}
inline vu zip(vu a, vu b, int high) {  // a0 b0 a1 b1 ... of one half
  vu m;
  for (int i = 0; i < W; ++i) m[i] = (high * W + i) / 2 + (i % 2) * W;
  return shuffle2(a, b, m);
}

}  // namespace
}  // namespace vgkern
