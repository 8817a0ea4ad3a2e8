// Logits of a block of rows, straight into fp32: the GEMM whose other operand is packed on the fly.
//
// The vendor's GEMM writes bf16 logits for bf16 inputs (3e-2 off in logp) and runs at half rate for
// a few rows times a large head; this one widens (or multiplies bf16 pairs) into fp32 accumulators.
#pragma once
#include <cstdint>

#include "rows.h"

namespace vgkern {

struct GemmKernels {
  int64_t lanes;  // vocabulary columns per call of `block`; 0: no kernels for this CPU
  int64_t rows;   // hidden rows per panel
  bool bf16;      // this CPU multiplies bf16 pairs
  // Rows of hidden [c, H] (element stride ld) into panels for `block`; sizes in floats.
  int64_t (*panel_floats)(int64_t c, int64_t h);
  void (*pack)(Dtype, bool pairs, const void* rows, int64_t ld, int64_t c, int64_t h, float* out);
  // out[c, n] (row stride ldo) = hidden . weight rows [n, H]^T for n <= lanes; `space` holds
  // lanes * (H + 16) floats. The next `lanes` rows of the weight are fetched meanwhile.
  void (*block)(Dtype, bool pairs, const void* weight, int64_t ld, int64_t n, const float* panels,
                int64_t c, int64_t h, float* out, int64_t ldo, float* space);
};

const GemmKernels& gemm();  // for the CPU of this process

}  // namespace vgkern
