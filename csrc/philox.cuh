// The replayable noise of vgkern.ops.noise: the same words on every backend.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define VG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VG_HOST_DEVICE inline
#endif

namespace vgkern {

struct Words {
  uint32_t w[4];
};

// Where the noise of one row is: seed and sequence are int64, two's complement.
struct NoiseRow {
  uint32_t key0, key1, position, sequence_lo, sequence_hi;
};

VG_HOST_DEVICE NoiseRow noise_row(int64_t seed, int64_t sequence, int64_t position) {
  return {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32), uint32_t(uint64_t(position)),
          uint32_t(uint64_t(sequence)), uint32_t(uint64_t(sequence) >> 32)};
}

// Philox4x32-10. `quad` is element / 4, with the top bit set on the plane of the Gaussian stream.
VG_HOST_DEVICE Words philox(uint32_t quad, const NoiseRow& r) {
  uint32_t c0 = quad, c1 = r.position, c2 = r.sequence_lo, c3 = r.sequence_hi;
  uint32_t k0 = r.key0, k1 = r.key1;
  for (int i = 0; i < 10; ++i) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// (word + 0.5) / 2^32 in (0, 1 - 2^-24], rounded once
VG_HOST_DEVICE float uniform(uint32_t word) {
  const float u = float(int64_t(word) * 2 + 1) * 0x1p-33f;
  return u < 1.f - 0x1p-24f ? u : 1.f - 0x1p-24f;
}

VG_HOST_DEVICE float gumbel(uint32_t word) { return -logf(-log1pf(-uniform(word))); }

// The two standard normals of a pair of words: (0, 1) and (2, 3) of a quad.
VG_HOST_DEVICE void normal_pair(uint32_t first, uint32_t second, float& even, float& odd) {
  const float radius = sqrtf(-2.f * logf(uniform(first))), u2 = uniform(second);
  even = radius * cospif(2.f * u2);  // of half turns: no reduction of the argument
  odd = radius * sinpif(2.f * u2);
}

// Standard normal number `element` of a row.
VG_HOST_DEVICE float normal(int64_t element, const NoiseRow& r) {
  const Words words = philox(uint32_t(element / 4) | 0x80000000u, r);
  const bool later = element & 2;
  float even, odd;
  normal_pair(later ? words.w[2] : words.w[0], later ? words.w[3] : words.w[1], even, odd);
  return element & 1 ? odd : even;
}

}  // namespace vgkern
