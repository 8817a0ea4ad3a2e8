// Advantages against the other samples of a group, in fp64. The samples come sorted by group: one
// warp for each group, started by its first sample; then, where asked for, one block whitens all.
#include "device.cuh"

namespace vgkern {
namespace {

// The order of vgkern.objectives.ESTIMATORS.
enum Estimator { kGrpo, kDrGrpo, kRloo, kNone, kGrpoVerl, kReinforce, kReinforceBaseline };

struct Moments {
  double sum = 0, low = __builtin_huge_val(), high = -__builtin_huge_val();
  VG_DEVICE void add(double x) {
    sum += x;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  VG_DEVICE void merge(const Moments& o) {
    sum += o.sum;
    low = o.low < low ? o.low : low;
    high = o.high > high ? o.high : high;
  }
};

struct Total {
  double value = 0;
  VG_DEVICE void merge(const Total& o) { value += o.value; }
};

// The first index after `at` whose id is another.
VG_DEVICE int64_t end_of(const int64_t* ids, int64_t at, int64_t n) {
  int64_t low = at + 1, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (ids[middle] == ids[at])
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void __launch_bounds__(32) groups_kernel(GroupAdvantagesArgs a) {
  for (int64_t first = blockIdx.x; first < a.n; first += gridDim.x) {
    if (first > 0 && a.ids[first - 1] == a.ids[first]) continue;
    const int64_t last = end_of(a.ids, first, a.n), begin = first + threadIdx.x;
    const double count = double(last - first);
    Moments m;
    for (int64_t k = begin; k < last; k += 32) m.add(a.rewards[a.order[k]]);
    m = warp_reduce(m);
    const double mean = m.sum / count;
    Total square;
    for (int64_t k = begin; k < last; k += 32) {
      const double d = a.rewards[a.order[k]] - mean;
      square.value += d * d;
    }
    square = warp_reduce(square);
    const double std = sqrt(square.value / (count - 1));
    for (int64_t k = begin; k < last; k += 32) {
      const double r = a.rewards[a.order[k]], d = m.low == m.high && mean == mean ? 0.0 : r - mean;
      double x = d;
      if (a.estimator == kGrpo) x = d / (std + 1e-4);
      if (a.estimator == kGrpoVerl) x = d / (std + 1e-6);
      if (a.estimator == kRloo) x = d * (count / (count - 1));
      if (d == 0.0) x = 0.0;
      a.out[a.order[k]] = a.estimator == kGrpoVerl && count == 1 ? r : x;
    }
  }
}

// (x - mean) / sqrt(var + 1e-8) over the batch; exactly 0 where all are equal
__global__ void __launch_bounds__(kMaxThreads, 1)
    whiten_kernel(const double* x, double* out, int64_t n) {
  VG_SHARED(Slots<Moments>, shared);
  Moments m;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) m.add(x[i]);
  m = block_reduce(m, Moments(), shared.get());
  const double mean = m.sum / double(n);
  Total square;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
    square.value += (x[i] - mean) * (x[i] - mean);
  square = block_reduce(square, Total(), reinterpret_cast<Total*>(shared.bytes));
  const double by = sqrt(square.value / double(n > 1 ? n - 1 : 1) + 1e-8);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
    out[i] = m.low == m.high && mean == mean ? 0.0 : (x[i] - mean) / by;
}

}  // namespace

extern "C" int vg_group_advantages(const GroupAdvantagesArgs* a, void* stream) {
  if (a->n == 0) return 0;
  const bool in_groups = a->estimator != kReinforce;
  if (in_groups) VG_LAUNCH(groups_kernel, grid_for(a->n), 32, 0, stream, *a);
  if (!in_groups || a->estimator == kReinforceBaseline)
    VG_LAUNCH(whiten_kernel, 1, threads_for(a->n), 0, stream, in_groups ? a->out : a->rewards,
              a->out, a->n);
  return int(cudaGetLastError());
}

}  // namespace vgkern
