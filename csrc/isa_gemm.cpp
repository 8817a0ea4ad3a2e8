// The logits GEMM, compiled once per instruction set; worth its while with 32 vector registers.
#include "gemm.h"
#include "vec.h"

namespace vgkern {
namespace {

#if VG_W == 16

constexpr int MR = 12;     // rows of hidden per panel: 12 x 2 accumulators + 2 operands
constexpr int NL = 2 * W;  // vocabulary columns per block

int64_t panel_floats(int64_t c, int64_t h) { return (c + MR - 1) / MR * MR * (h + 2); }

inline float up(Dtype t, const void* p, int64_t i) {
  if (t == kF32) return static_cast<const float*>(p)[i];
  if (t == kF16) return float(static_cast<const _Float16*>(p)[i]);
  uint32_t u = uint32_t(static_cast<const uint16_t*>(p)[i]) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline const void* at(Dtype t, const void* p, int64_t i) {
  return static_cast<const char*>(p) + i * (t == kF32 ? 4 : 2);
}

// one 32-bit unit: a float, or a pair of bf16
inline float unit(Dtype t, bool pairs, const void* row, int64_t k, int64_t h) {
  if (!pairs) return up(t, row, k);
  auto* p = static_cast<const uint16_t*>(row);
  uint32_t u = p[2 * k] | (2 * k + 1 < h ? uint32_t(p[2 * k + 1]) << 16 : 0u);
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// 16 units of one weight row
inline vf load_units(Dtype t, bool pairs, const void* row, int64_t k) {
  if (t == kF32) return load(static_cast<const float*>(row) + k);
  if (pairs) {
    vf v;
    std::memcpy(&v, static_cast<const uint16_t*>(row) + 2 * k, sizeof v);
    return v;
  }
  if (t == kBF16) {
    __m256i h = _mm256_loadu_si256((const __m256i*)(static_cast<const uint16_t*>(row) + k));
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
  }
  return (vf)_mm512_cvtph_ps(
      _mm256_loadu_si256((const __m256i*)(static_cast<const uint16_t*>(row) + k)));
}

// 16 x 16, rows to columns: four perfect shuffles
inline void turn(vf a[W]) {
  vu lo, hi;
  for (int i = 0; i < W; ++i) {
    lo[i] = i / 2 + (i % 2) * W;
    hi[i] = (W + i) / 2 + (i % 2) * W;
  }
  vf b[W];
  for (int round = 0; round < 4; ++round) {
    for (int r = 0; r < W / 2; ++r) {
      b[2 * r] = (vf)_mm512_permutex2var_ps((__m512)a[r], (__m512i)lo, (__m512)a[r + W / 2]);
      b[2 * r + 1] = (vf)_mm512_permutex2var_ps((__m512)a[r], (__m512i)hi, (__m512)a[r + W / 2]);
    }
    for (int r = 0; r < W; ++r) a[r] = b[r];
  }
}

// rows [n, units] to out [units][STEP], n <= COUNT <= W of whose columns are written
template <int COUNT, int STEP>
void columns(Dtype t, bool pairs, const void* rows, int64_t ld, int64_t n, int64_t h, float* out) {
  const int64_t units = pairs ? (h + 1) / 2 : h, whole = (pairs ? h / 2 : h) / W * W;
  constexpr __mmask16 kept = COUNT == W ? 0xffff : (1 << COUNT) - 1;
  for (int64_t k = 0; k < whole; k += W) {
    vf a[W];
    for (int r = 0; r < W; ++r)
      a[r] = r < n ? load_units(t, pairs, at(t, rows, r * ld), k) : vset(0.f);
    turn(a);
    for (int r = 0; r < W; ++r) _mm512_mask_storeu_ps(out + (k + r) * STEP, kept, (__m512)a[r]);
  }
  for (int64_t k = whole; k < units; ++k)
    for (int r = 0; r < COUNT; ++r)
      out[k * STEP + r] = r < n ? unit(t, pairs, at(t, rows, r * ld), k, h) : 0.f;
}

void pack(Dtype t, bool pairs, const void* rows, int64_t ld, int64_t c, int64_t h, float* out) {
  const int64_t units = pairs ? (h + 1) / 2 : h;
  for (int64_t i = 0; i < c; i += MR)
    columns<MR, MR>(t, pairs, at(t, rows, i * ld), ld, std::min<int64_t>(c - i, MR), h,
                    out + i * units);
}

// weight rows [n, units] to space [units][NL]
void transpose(Dtype t, bool pairs, const void* w, int64_t ld, int64_t n, int64_t h, float* space) {
  for (int64_t half = 0; half < 2; ++half)
    columns<W, NL>(t, pairs, at(t, w, half * W * ld), ld, n - half * W, h, space + half * W);
}

inline void keep(const vf acc[][2], int64_t m, int64_t n, float* out, int64_t ldo) {
  for (int64_t r = 0; r < m; ++r)
    for (int v = 0; v < 2; ++v) {
      float* o = out + r * ldo + v * W;
      if (n >= (v + 1) * W)
        store(o, acc[r][v]);
      else if (n > v * W)
        store_part(o, n - v * W, acc[r][v]);
    }
}

// `ahead`: of the weight rows that the next block will transpose, 64 bytes are fetched per unit.
template <int M>
void panel_f32(const float* a, const float* b, int64_t units, int64_t n, float* out, int64_t ldo,
               const char* ahead) {
  vf acc[M][2];
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) acc[r][0] = acc[r][1] = vset(0.f);
  for (int64_t k = 0; k < units; ++k) {
    const vf b0 = load(b + k * NL), b1 = load(b + k * NL + W);
    _mm_prefetch(ahead + k * 64, _MM_HINT_T1);
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      const vf x = (vf)_mm512_set1_ps(a[k * MR + r]);
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
  keep(acc, M, n, out, ldo);
}

template <int M>
__attribute__((target("avx512bf16"))) void panel_bf16(const float* a, const float* b, int64_t units,
                                                      int64_t n, float* out, int64_t ldo,
                                                      const char* ahead) {
  __m512 acc[M][2];
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < units; ++k) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_ps(b + k * NL);
    const __m512bh b1 = (__m512bh)_mm512_loadu_ps(b + k * NL + W);
    _mm_prefetch(ahead + k * 64, _MM_HINT_T1);
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_ps(a[k * MR + r]);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, b0);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, b1);
    }
  }
  for (int r = 0; r < M; ++r)
    for (int v = 0; v < 2; ++v) {
      const int64_t left = n - v * W;
      const __mmask16 k = left >= W ? 0xffff : (left > 0 ? __mmask16((1u << left) - 1) : 0);
      _mm512_mask_storeu_ps(out + r * ldo + v * W, k, acc[r][v]);
    }
}

typedef void (*Panel)(const float*, const float*, int64_t, int64_t, float*, int64_t, const char*);
#define VG_PANELS(f) {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>, f<9>, f<10>, f<11>, f<12>}
const Panel kF32Panels[MR] = VG_PANELS(panel_f32), kBF16Panels[MR] = VG_PANELS(panel_bf16);

void block(Dtype t, bool pairs, const void* weight, int64_t ld, int64_t n, const float* panels,
           int64_t c, int64_t h, float* out, int64_t ldo, float* space) {
  const int64_t units = pairs ? (h + 1) / 2 : h;
  transpose(t, pairs, weight, ld, n, h, space);
  const char* next = static_cast<const char*>(at(t, weight, NL * ld));
  for (int64_t i = 0; i < c; i += MR) {
    const int64_t m = c - i < MR ? c - i : MR;
    // two panels fetch all of it; the others touch what is there already
    const char* ahead = next + (i / MR % 2) * 64 * units;
    (pairs ? kBF16Panels : kF32Panels)[m - 1](panels + i * units, space, units, n, out + i * ldo,
                                              ldo, ahead);
  }
}

#endif

}  // namespace

extern const GemmKernels VG_OF_ISA(gemm_);
#if VG_W == 16
const GemmKernels VG_OF_ISA(gemm_) = {NL, MR, false, panel_floats, pack, block};
#else
const GemmKernels VG_OF_ISA(gemm_) = {0, 0, false, nullptr, nullptr, nullptr};
#endif

}  // namespace vgkern
