#include <unordered_map>

#include "common.h"

namespace vgkern {

// The order of vgkern.objectives.ESTIMATORS.
enum Estimator { kGrpo, kDrGrpo, kRloo, kNone, kGrpoVerl, kReinforce, kReinforceBaseline };

// (x - mean) / sqrt(var + 1e-8) over the batch; exactly 0 where all are equal
static void whiten(double* x, int64_t n) {
  double sum = 0, square = 0, low = n ? x[0] : 0, high = low;
  for (int64_t i = 0; i < n; ++i) {
    sum += x[i];
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    x[i] = low == high ? 0.0 : x[i] - sum / double(n);
    square += x[i] * x[i];
  }
  const double by = std::sqrt(square / double(std::max<int64_t>(n - 1, 1)) + 1e-8);
  for (int64_t i = 0; i < n; ++i) x[i] /= by;
}

static Tensor group_advantages_fwd(const Tensor& rewards,  // [B] float64
                                   const Tensor& groups,   // [B]
                                   int64_t estimator) {
  Tensor r = rewards.contiguous();
  TORCH_CHECK(r.scalar_type() == at::kDouble, "vgkern: rewards must be float64");
  const int64_t n = r.numel();
  const int64_t* id = i64_rows(groups, n, "groups");
  const double* x = r.const_data_ptr<double>();
  struct Group {
    double count = 0, sum = 0, square = 0, low = 0, high = 0;
  };
  std::unordered_map<int64_t, int64_t> index;
  std::vector<Group> by;
  std::vector<int64_t> of(n);
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    if (i && id[i] == id[i - 1]) {  // samples of a prompt mostly come one after the other
      of[i] = of[i - 1];
    } else {
      of[i] = index.try_emplace(id[i], int64_t(by.size())).first->second;
      if (of[i] == int64_t(by.size())) by.emplace_back();
    }
    finite &= std::isfinite(x[i]);
    Group& g = by[of[i]];
    g.low = g.count ? std::min(g.low, x[i]) : x[i];
    g.high = g.count ? std::max(g.high, x[i]) : x[i];
    g.count += 1;
    g.sum += x[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    Group& g = by[of[i]];
    const double d = x[i] - g.sum / g.count;
    g.square += d * d;
  }
  const bool needs_two = estimator <= kRloo || estimator == kReinforceBaseline;
  const bool alone = std::any_of(by.begin(), by.end(), [](const Group& g) { return g.count == 1; });
  if (!finite || (needs_two && alone))  // NaN throughout: the caller sees it, and says why
    return at::full({n}, std::numeric_limits<double>::quiet_NaN(), r.options());
  Tensor out = at::empty_like(r);
  double* a = out.data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    const Group& g = by[of[i]];
    const double d = g.low == g.high ? 0.0 : x[i] - g.sum / g.count;
    const double std = std::sqrt(g.square / (g.count - 1));
    switch (estimator) {
      case kGrpo: a[i] = d / (std + 1e-4); break;
      case kGrpoVerl: a[i] = d / (std + 1e-6); break;
      case kDrGrpo:
      case kReinforceBaseline: a[i] = d; break;
      case kRloo: a[i] = d * g.count / (g.count - 1); break;
      default: a[i] = x[i];
    }
    if (d == 0.0 && estimator != kNone && estimator != kReinforce) a[i] = 0.0;
    if (estimator == kGrpoVerl && g.count == 1) a[i] = x[i];
  }
  if (estimator == kReinforce || estimator == kReinforceBaseline) whiten(a, n);
  return out;
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) { m.impl("group_advantages_fwd", &group_advantages_fwd); }

}  // namespace vgkern
