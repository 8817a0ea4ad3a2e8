// Which ids of a row a truncation keeps, exactly and without a sort.
//
// A cut keeps a prefix of the ids in the order (z descending, id ascending), so it is a pair: the
// smallest z that stays, and the highest id that stays at exactly that z. Both are found by
// descending three bits at a time over integer keys with integer weights: exact, and the same
// whatever the order of the additions. min_p only raises the smallest z.
#pragma once
#include "softmax.cuh"

namespace vgkern {

constexpr float kMassUnit = 0x1p40f;  // of exp(z - max): sums stay below 2^64 for 2^23 ids

// Unsigned, in the order of the floats; -0 and 0 are one key.
VG_DEVICE uint32_t key_of(float z) {
  uint32_t bits;
  z += 0.f;
  memcpy(&bits, &z, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

VG_DEVICE float z_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float z;
  memcpy(&z, &bits, 4);
  return z;
}

struct Cut {
  uint32_t key;  // of the smallest z that stays
  int64_t id;    // the highest id that stays at that z
  VG_DEVICE bool keeps(uint32_t k, int64_t v) const { return k > key || (k == key && v <= id); }
  VG_DEVICE bool keeps_z(float z, int64_t v) const { return z != z || keeps(key_of(z), v); }
};

VG_DEVICE float temperature_of(const RowOptions& o, int64_t i) {
  return o.temperatures ? o.temperatures[i] : o.temperature;
}
VG_DEVICE int64_t top_k_of(const RowOptions& o, int64_t i) {
  return o.top_ks ? o.top_ks[i] : o.top_k;
}
VG_DEVICE double top_p_of(const RowOptions& o, int64_t i) {
  return o.top_ps ? double(o.top_ps[i]) : o.top_p;
}
VG_DEVICE double min_p_of(const RowOptions& o, int64_t i) {
  return o.min_ps ? double(o.min_ps[i]) : o.min_p;
}

// 1 / temperature; 1 where that is 0. A value out of bounds, which nobody looked at, makes NaN.
VG_DEVICE float inverse_of(const RowOptions& o, int64_t i) {
  const float t = temperature_of(o, i);
  const double p = top_p_of(o, i), m = min_p_of(o, i);
  if (!(t >= 0.f && p > 0.0 && p <= 1.0 && m >= 0.0 && m <= 1.0)) return nan_value();
  return t == 0.f ? 1.f : 1.f / t;
}

// What vg_row_cut left of row i.
VG_DEVICE Cut cut_of(const int64_t* cut, int64_t i, int64_t vocab) {
  return cut ? Cut{uint32_t(cut[2 * i]), cut[2 * i + 1]} : Cut{0, vocab};
}

struct Sums {
  uint64_t above[7];
  VG_DEVICE void merge(const Sums& o) {
#pragma unroll
    for (int d = 0; d < 7; ++d) above[d] += o.above[d];
  }
};

// The largest score and its lowest id, and whether some z is NaN.
struct Best {
  float score = -kInf, z = -kInf;
  int64_t id = -1;
  int64_t nan = 0;
  VG_DEVICE void offer(float y, float from, int64_t v) {
    if (y > score || (y == score && y > -kInf && v < id)) score = y, z = from, id = v;
  }
  VG_DEVICE void merge(const Best& o) {
    offer(o.score, o.z, o.id);
    nan |= o.nan;
  }
};

template <class T>
struct Row {
  const T* logits;
  int64_t vocab;
  Scale scale;
  float inv_temperature;
  char* shared;

  // f(v, z) for this thread's columns, ascending
  template <class F>
  VG_DEVICE void each(const F& f) const {
    constexpr int C = 4;
    for (int64_t v = int64_t(threadIdx.x) * C; v < vocab; v += int64_t(blockDim.x) * C) {
      float x[C];
      load_columns(logits, v, vocab, -kInf, x);
#pragma unroll
      for (int j = 0; j < C; ++j)
        if (v + j < vocab) f(v + j, scaled(x[j], v + j, scale, inv_temperature));
    }
  }

  template <class S>
  VG_DEVICE S reduce(const S& s, const S& none) const {
    return block_reduce(s, none, reinterpret_cast<S*>(shared));
  }

  // The largest key t < 2^bits such that the ids with key(v, z) >= t weigh `budget` or more, where
  // all of them do; `above` becomes the weight of those with a key > t.
  template <class K, class W>
  VG_DEVICE uint32_t descend(int bits, uint64_t budget, const K& key, const W& weight,
                             uint64_t& above) const {
    uint64_t t = 0;
    above = 0;
    for (int shift = (bits - 1) / 3 * 3; shift >= 0; shift -= 3) {
      Sums sums{};
      each([&](int64_t v, float z) {
        const uint64_t k = key(v, z), w = weight(v, z);
#pragma unroll
        for (int d = 0; d < 7; ++d) sums.above[d] += k >= t + (uint64_t(d + 1) << shift) ? w : 0;
      });
      sums = reduce(sums, Sums{});
      int digit = 0;
#pragma unroll
      for (int d = 0; d < 7; ++d) {  // the sums fall with d
        if (sums.above[d] >= budget) digit = d + 1;
        if (sums.above[6 - d] < budget) above = sums.above[6 - d];
      }
      t += uint64_t(digit) << shift;
    }
    return uint32_t(t);
  }

  // top_k, then top_p of what that keeps. `top` is the largest z.
  VG_DEVICE Cut truncate(int64_t top_k, double top_p, float top) const {
    Cut cut{0, vocab};  // keeps all
    int bits = 1;       // of an id
    while (bits < 32 && (uint64_t(vocab - 1) >> bits) != 0) ++bits;
    for (int stage = 0; stage < 2; ++stage) {
      if (stage == 0 ? top_k <= 0 || top_k >= vocab : top_p >= 1.0) continue;
      const auto weight = [&](float z) {
        return stage == 0 ? uint64_t(1) : uint64_t(expf(z - top) * kMassUnit);
      };
      uint64_t budget = uint64_t(top_k);
      if (stage == 1) {
        SumU64 all{0};
        each([&](int64_t v, float z) { all.value += cut.keeps(key_of(z), v) ? weight(z) : 0; });
        all = reduce(all, SumU64{0});
        const double wanted = ceil(double(all.value) * top_p);
        budget = wanted < double(all.value) ? uint64_t(wanted) : all.value;
        if (budget == 0) budget = 1;  // the most likely id always stays
      }
      // First the key of the last id that stays; then, where its equals do not all stay, its id:
      // the lowest ids are the largest keys.
      const Cut before = cut;
      cut = Cut{0, vocab};
      for (int by_id = 0; by_id < 2; ++by_id) {
        const auto key = [&](int64_t v, float z) {
          return by_id ? uint32_t(vocab - 1 - v) : key_of(z);
        };
        const auto kept = [&](int64_t v, float z) {
          const uint32_t k = key_of(z);
          if (!before.keeps(k, v)) return uint64_t(0);
          return by_id ? uint64_t(k == cut.key) : weight(z);
        };
        uint64_t above;
        const uint32_t found = descend(by_id ? bits : 32, budget, key, kept, above);
        if (by_id) {
          cut.id = vocab - 1 - int64_t(found);
          break;
        }
        cut.key = found;
        const uint64_t one = weight(z_of(found)), stay = (budget - above + one - 1) / one;
        SumU64 ties{0};
        each([&](int64_t v, float z) {
          ties.value += key_of(z) == cut.key && before.keeps(cut.key, v) ? 1 : 0;
        });
        ties = reduce(ties, SumU64{0});
        if (stay >= ties.value) {
          if (cut.key == before.key) cut.id = before.id;
          break;
        }
        budget = stay;
      }
    }
    return cut;
  }

  // Of the row: all of it where it has NaN, +inf or nothing; at temperature 0 the argmax alone.
  VG_DEVICE Cut cut(bool greedy, int64_t top_k, double top_p, double min_p) const {
    const Cut all{0, vocab};
    if (!greedy && top_k <= 0 && top_p >= 1.0 && min_p <= 0.0) return all;
    Best top;
    each([&](int64_t v, float z) {
      top.nan |= z != z;
      top.offer(z, z, v);
    });
    top = reduce(top, Best());
    if (top.nan || top.id < 0 || top.z >= kInf) return all;
    if (greedy) return Cut{key_of(top.z), top.id};
    Cut cut = truncate(top_k, top_p, top.z);
    if (min_p <= 0.0) return cut;
    uint32_t low = cut.key, high = key_of(top.z);  // the least key that min_p keeps is in here
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      const bool fits = expf(z_of(middle) - top.z) >= float(min_p);
      low = fits ? low : middle + 1;
      high = fits ? middle : high;
    }
    return low > cut.key ? Cut{low, vocab} : cut;
  }
};

}  // namespace vgkern
