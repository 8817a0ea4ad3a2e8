// What the files of the linear ops share: their buffers.
#pragma once
#include "linear.h"

namespace vgkern {

struct LinearSpace {
  std::vector<float> block, hidden, dhidden, weight, panels;
  std::vector<float> u, value, value_panels;  // costates
  std::vector<uint16_t> dz16, hidden16;
  std::vector<RowStats> stats;
  std::vector<RowState> states;
  std::vector<RowGrad> coef;
  std::vector<float> c, e, lean;
  std::vector<int64_t> source;
  std::vector<int64_t> slot, pulled;  // row of u of a block row or -1, and the other way round
};

HeldSpace take_space();

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
