// Truncation of a row, and the statistics of what is left: the one place for linear_sample, which
// draws from it, and linear_token_logprobs, which scores it. So their numbers are the same bits.
#pragma once
#include "common.h"

namespace vgkern {

struct Cut {
  int64_t top_k;  // 0: none
  double top_p, min_p;
  bool any() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
};

// The temperature (0: greedy) and the truncation of each row: one for all, or one per row where the
// caller has them. A value out of bounds, which nobody looked at in a traced graph, makes a row
// NaN.
class PerRow {
 public:
  PerRow(int64_t n, int64_t vocab, double temperature, int64_t top_k, double top_p, double min_p,
         const OptTensor& temperatures, const OptTensor& top_ks, const OptTensor& top_ps,
         const OptTensor& min_ps)
      : vocab_(vocab), temperature_(float(temperature)), all_{top_k, top_p, min_p},
        temperatures_(f32_rows(temperatures, n, "temperature")),
        top_ks_(top_ks ? i64_rows(*top_ks, n, "top_k") : nullptr),
        top_ps_(f32_rows(top_ps, n, "top_p")), min_ps_(f32_rows(min_ps, n, "min_p")) {}
  bool greedy(int64_t row) const { return temperature(row) == 0.f; }
  float inverse(int64_t row) const {
    const float t = temperature(row);
    const Cut c = cut(row);
    const bool good =
        t >= 0.f && c.top_p > 0.0 && c.top_p <= 1.0 && c.min_p >= 0.0 && c.min_p <= 1.0;
    if (!good) return std::numeric_limits<float>::quiet_NaN();
    return t == 0.f ? 1.f : 1.f / t;
  }
  Cut cut(int64_t row) const {
    Cut c = all_;
    if (top_ks_) c.top_k = top_ks_[row] > 0 && top_ks_[row] < vocab_ ? top_ks_[row] : 0;
    if (top_ps_) c.top_p = top_ps_[row];
    if (min_ps_) c.min_p = min_ps_[row];
    return c;
  }

 private:
  float temperature(int64_t row) const { return temperatures_ ? temperatures_[row] : temperature_; }
  int64_t vocab_;
  float temperature_;
  Cut all_;
  const float* temperatures_;
  const int64_t* top_ks_;
  const float *top_ps_, *min_ps_;
};

struct Candidate {
  float z;
  int64_t id;
};

inline bool before(const Candidate& a, const Candidate& b) {  // ties go to the lowest id
  return a.z > b.z || (a.z == b.z && a.id < b.id);
}

// What a truncation kept, in the order of the ids, and its scratch.
struct Kept {
  std::vector<float> z, peaks;
  std::vector<int64_t> id;
  std::vector<Candidate> candidates;
  int64_t at(int64_t y) const {  // where id y is, or -1
    auto p = std::lower_bound(id.begin(), id.end(), y);
    return p != id.end() && *p == y ? p - id.begin() : -1;
  }
};

// A value that at least k of z reach and few more: the k-th largest of the maxima of strided
// groups.
inline float reached_by(const float* z, int64_t v, int64_t k, std::vector<float>& peaks) {
  const int64_t size = std::clamp<int64_t>(v / (4 * k), 1, 64), groups = v / size;
  peaks.assign(z, z + groups);
  for (int64_t s = 1; s < size; ++s) {
    const float* x = z + s * groups;
    for (int64_t g = 0; g < groups; ++g) peaks[g] = x[g] > peaks[g] ? x[g] : peaks[g];
  }
  std::nth_element(peaks.begin(), peaks.begin() + k - 1, peaks.end(), std::greater<float>());
  return peaks[k - 1];
}

// The least likely id that stays. `all`: maximum and sum of the whole row. Only ids that can stay
// become candidates, and those are sorted only as far as top_p asks.
inline Candidate last_kept(const float* z, int64_t v, const Cut& cut, const RowState& all,
                           Kept& kept) {
  const bool few = cut.top_k > 0 && cut.top_k < v;
  const double top = all.max;
  float floor =
      few ? reached_by(z, v, cut.top_k, kept.peaks) : -std::numeric_limits<float>::infinity();
  // What top_p drops holds (1 - top_p) of the mass: half of it, evenly spread, is never needed.
  if (!few && cut.top_p < 1.0)
    floor = float(top + std::log(0.5 * (1.0 - cut.top_p) * all.sum / double(v)));
  if (!few && cut.min_p > 0.0) floor = std::max(floor, float(top + std::log(cut.min_p) - 1e-3));
  auto& c = kept.candidates;
  c.clear();
  for (int64_t j = 0; j < v; ++j)
    if (z[j] >= floor) c.push_back({z[j], j});
  if (c.empty()) return {-std::numeric_limits<float>::infinity(), v};  // +inf: left to the sums
  int64_t n = int64_t(c.size());
  if (few && cut.top_k < n) {
    n = cut.top_k;
    std::nth_element(c.begin(), c.begin() + n - 1, c.end(), before);
  }
  if (cut.top_p < 1.0) {
    double total = few ? 0.0 : all.sum, mass = 0;
    for (int64_t i = 0; few && i < n; ++i) total += std::exp(c[i].z - all.max);
    int64_t sorted = 0, taken = 0;
    for (int64_t grow = 64; taken == sorted && sorted < n; grow *= 4) {
      const int64_t to = std::min(n, sorted + grow);
      if (to < n) std::nth_element(c.begin() + sorted, c.begin() + to - 1, c.begin() + n, before);
      std::sort(c.begin() + sorted, c.begin() + to, before);
      while (taken < to && (taken == 0 || mass / total < cut.top_p))
        mass += std::exp(c[taken++].z - all.max);
      sorted = to;
    }
    n = taken;
  }
  if (cut.min_p > 0.0)
    n = std::partition(c.begin(), c.begin() + n,
                       [&](const Candidate& x) { return std::exp(x.z - all.max) >= cut.min_p; }) -
        c.begin();
  return *std::max_element(c.begin(), c.begin() + std::max<int64_t>(n, 1), before);
}

// Sums over n values without the one at y (-1: over all), 4096 at a time.
inline RowState sums(float* z, int64_t n, int64_t y) {
  RowState s = fresh();
  for (int64_t j = 0; j < n; j += 4096) {
    const int64_t m = std::min<int64_t>(4096, n - j), at = y - j;
    rows().stats(z + j, m, at >= 0 && at < m ? at : -1, s);
  }
  return s;
}

// Sets what the cut drops to -inf and lists the rest; false for a row with NaN, which has no order.
inline bool truncate(float* z, int64_t v, const Cut& cut, Kept& kept) {
  const RowState all = sums(z, v, -1);
  if (std::isnan(all.max) || std::isnan(all.sum)) return false;
  const Candidate last = last_kept(z, v, cut, all, kept);
  kept.z.clear();
  kept.id.clear();
  for (int64_t j = 0; j < v; ++j) {
    if (z[j] > last.z || (z[j] == last.z && j <= last.id)) {
      kept.z.push_back(z[j]);
      kept.id.push_back(j);
    } else {
      z[j] = -std::numeric_limits<float>::infinity();
    }
  }
  return true;
}

// logp of id y and entropy of a row whose truncation is `kept` (null: nothing was cut).
inline RowStats row_score(float* z, int64_t v, int64_t y, Kept* kept) {
  if (!kept) return finish(sums(z, v, y));
  return finish(sums(kept->z.data(), int64_t(kept->z.size()), kept->at(y)));
}

// Of the row at temperature 0: all mass on the argmax.
inline RowStats greedy_score(float* z, int64_t v, int64_t y) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  const RowState all = sums(z, v, -1);
  if (std::isnan(all.max) || std::isnan(all.sum)) return finish(all);
  const bool best = all.max > -inf && std::find(z, z + v, all.max) - z == y;
  return {best ? 0.f : -inf, 0.f, all.max};
}

}  // namespace vgkern
