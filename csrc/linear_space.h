// What the files of the chunk driver share: its buffers.
#pragma once
#include <mutex>

#include "linear.h"

namespace vgkern {

// Kept between calls: page faults of a fresh block would land inside the first GEMM. One process-
// wide set; a second thread that comes in meanwhile works on its own.
struct LinearRows::Space {
  std::vector<float> block, hidden, dhidden, weight, panels;
  std::vector<float> u, value, value_panels;  // costates
  std::vector<uint16_t> dz16, hidden16;
  std::vector<RowStats> stats;
  std::vector<RowState> states;
  std::vector<RowGrad> coef;
  std::vector<float> c, e, lean;
  std::vector<int64_t> source;
  std::vector<int64_t> slot, pulled;  // row of u of a block row or -1, and the other way round
  static Space& shared() {
    static Space* s = new Space;  // never destroyed: threads may outlive statics
    return *s;
  }
  static std::mutex& busy() {
    static std::mutex* m = new std::mutex;
    return *m;
  }
};

template <class T>
T* room(std::vector<T>& v, int64_t n) {
  if (int64_t(v.size()) < n) {
    std::vector<T>().swap(v);  // free before growing: never two blocks at once
    v.resize(n);
  }
  return v.data();
}

inline Tensor block_view(float* p, int64_t n, int64_t m) {
  return at::from_blob(p, {n, m}, at::TensorOptions().dtype(at::kFloat));
}

}  // namespace vgkern
