// The Gaussian noise of vgkern/ops/noise.py for one row: Philox4x32-10, then Box-Muller on pairs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace vgkern {

struct NoiseRow {
  uint32_t seed_lo, seed_hi, position, sequence_lo, sequence_hi;
  NoiseRow(int64_t seed, int64_t sequence, int64_t position)
      : seed_lo(uint32_t(uint64_t(seed))), seed_hi(uint32_t(uint64_t(seed) >> 32)),
        position(uint32_t(position)), sequence_lo(uint32_t(uint64_t(sequence))),
        sequence_hi(uint32_t(uint64_t(sequence) >> 32)) {}
};

inline void philox4(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int r = 0; r < 10; ++r) {
    const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = uint32_t(b >> 32) ^ c1 ^ k0;
    c[1] = uint32_t(b);
    c[2] = uint32_t(a >> 32) ^ c3 ^ k1;
    c[3] = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// (word + 0.5) / 2^32, rounded once, and at most 1 - 2^-24
inline float uniform(uint32_t word) {
  return std::min(float((double(word) + 0.5) * 0x1p-32), 1.f - 0x1p-24f);
}

inline void normal_row(const NoiseRow& row, int64_t n, float* out) {
  constexpr uint32_t kPlane = 0x80000000u;  // counters that the Gumbel noise never uses
  for (int64_t j = 0; j < n; j += 4) {
    uint32_t c[4] = {uint32_t(j / 4) | kPlane, row.position, row.sequence_lo, row.sequence_hi};
    philox4(c, row.seed_lo, row.seed_hi);
    for (int64_t k = 0; k < 4 && j + k < n; k += 2) {
      const float radius = std::sqrt(-2.f * std::log(uniform(c[k])));
      const float angle = 6.283185307179586f * uniform(c[k + 1]);
      out[j + k] = radius * std::cos(angle);
      if (j + k + 1 < n) out[j + k + 1] = radius * std::sin(angle);
    }
  }
}

}  // namespace vgkern
