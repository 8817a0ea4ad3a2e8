// Whole rows of fp32 logits, [chunk, V] at a time, for operators that hold two such blocks at once.
#pragma once
#include "linear.h"

namespace vgkern {

// Rows per block when `blocks` of them exist together: at most 150 MiB in all.
int64_t block_rows(int64_t rows, int64_t v, int64_t blocks);

// Compacted rows of one head: `rows[i]` is the row of the caller behind block row i.
class HeadBlock {
 public:
  HeadBlock(const Head& head, int64_t chunk);
  // out [count, V]: the logits, untransformed. Keeps the rows for `backward`.
  void logits(const int64_t* rows, int64_t count, float* out);
  // Gradients of the rows last multiplied, from dlogits [count, V].
  void backward(float* dlogits, Grads&);

 private:
  const Head& head_;
  int64_t chunk_, count_ = 0;
  const int64_t* rows_ = nullptr;
  const bool pairs_;  // bf16 stays bf16: this CPU multiplies its pairs faster than floats
  Tensor hidden_;     // [count, H] fp32 (bf16 if pairs_)
  std::vector<float> wide_, panels_, weight_;
  std::vector<uint16_t> hidden16_, dz16_;
};

}  // namespace vgkern
