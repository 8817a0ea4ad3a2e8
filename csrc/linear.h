// Hidden rows times head, one [chunk, V] block of fp32 logits at a time, tile by tile.
#pragma once
#include <functional>
#include <memory>

#include "common.h"
#include "costate.h"
#include "gemm.h"
#include "truncate.h"

namespace vgkern {

// The problem as the linear_* operators receive it.
struct Head {
  Tensor hidden, weight;  // [N, H], [V, H]
  int64_t n, h, v;
  Dtype dtype;
  Transform transform;
  Tensor bias32;  // keeps the fp32 bias alive
  Head(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, double temperature,
       double softcap);
};

// Which gradients, and where they go; empty tensors where not needed.
struct Grads {
  bool need[3];
  Tensor dhidden, dweight, dbias;  // fp32 while accumulating
  Grads(const Head&, c10::ArrayRef<bool> needs);
  bool any() const { return need[0] || need[1] || need[2]; }
  // in the dtypes of the inputs, or (`as_input` false) the fp32 sums as they are; dhidden in fp32
  // where it is one shard's share of a sum
  std::tuple<Tensor, Tensor, Tensor> finish(const Head&, const OptTensor& bias, bool as_input,
                                            bool fp32_dhidden = false);
  bool first = true;  // the first chunk writes dweight, later ones add
};

// A chunk of compacted rows: `rows[i]` is the row of the caller behind block row i.
struct Chunk {
  const int64_t* rows;
  int64_t count;
  RowStats* stats;  // filled by forward
};

// Costates at the next inputs of the caller's rows: the third term of their gradients.
class Costates {
 public:
  Costates(const Head& head, const Tensor& value, const Tensor& embedding, int64_t seed,
           const OptTensor& sequence, const OptTensor& position, double tau,
           const OptTensor& scale);
  // as the operators receive them; none without a value
  static std::optional<Costates> given(const Head& head, const OptTensor& value,
                                       const OptTensor& embedding, int64_t seed,
                                       const OptTensor& sequence, const OptTensor& position,
                                       double tau, const OptTensor& scale);
  bool live(int64_t row) const { return live_[row]; }  // not exactly 0
  bool expected() const { return !sequence_; }
  RaceKey key(int64_t row) const;
  const Head table;  // value [N, He] times embedding [V, He]: u as a head's logits
  const float inv_tau;
  float scale(int64_t row) const { return scale_ ? scale_[many_scales_ ? row : 0] : 1.f; }

 private:
  uint64_t seed_;
  const int64_t *sequence_ = nullptr, *position_ = nullptr;  // null: relaxation "expected"
  const float* scale_ = nullptr;                             // of u: one, or one per row; null: 1
  bool many_scales_ = false;
  std::vector<char> live_;
};

class Sparse;

struct LinearSpace;  // linear_space.h: the buffers, one set at a time
struct ReturnSpace {
  void operator()(LinearSpace*) const;
};
using HeldSpace = std::unique_ptr<LinearSpace, ReturnSpace>;

class LinearRows {
 public:
  LinearRows(const Head& head, const int64_t* targets, std::vector<int64_t> active,
             const PerRow* per_row = nullptr, const Costates* costates = nullptr,
             Sparse* sparse = nullptr);
  ~LinearRows();
  // For every chunk: logits, statistics, then `use(chunk)`, which fills c and e (dl/dlogp,
  // dl/dentropy of each block row) when gradients are wanted. `known`: `use` fills the statistics
  // too, so none are computed.
  void run(Grads* grads, const std::function<void(Chunk&, float* c, float* e)>& use,
           bool known = false);

 private:
  Transform transform_of(int64_t row) const;
  void logits(const Chunk&, int64_t t, bool statistics);
  void score(const Chunk&);
  void backward(const Chunk&, const float* c, const float* e, Grads&);
  void gather_costates(const Chunk&);
  void pull(int64_t t);
  void third_term(const Chunk&);
  const float* pulled_row(int64_t i, int64_t t, int64_t n) const;
  Tensor weight_tile(int64_t t);
  void gather(const Chunk&);
  void widen_rows(const Chunk&);
  void add_bias(const float* block, int64_t live, int64_t v0, int64_t n, Grads&);
  const Head& head_;
  const int64_t* targets_;
  std::vector<int64_t> active_;
  const PerRow* per_row_;
  const Costates* costates_;
  Sparse* sparse_;  // null: dense products
  bool dense_;      // the active rows are all rows, in order
  bool pairs_;      // bf16 stays bf16: this CPU multiplies its pairs faster than floats
  int64_t chunk_, tile_, tiles_;
  HeldSpace space_;
  Tensor hidden_;  // [count, H] of the current chunk, fp32 (bf16 if pairs_)
};

// Columns per tile: a multiple of 64, so that a tile starts on a whole Philox block.
int64_t tile_columns(int64_t rows, int64_t v);

// fp32 columns [v0, v0 + n) of the head, widened into `space` when needed.
Tensor head_tile(const Head&, int64_t v0, int64_t n, std::vector<float>& space);

// Gradients from dz [>= count, n] of columns [v0, v0 + n), all bf16, by the vendor's GEMMs: every
// product is rounded once, sums over tiles (dh [rows of dz, H]) and chunks are fp32.
void backward16(const Head&, const Tensor& dz, int64_t v0, const Tensor& hidden, float* dh,
                bool first_tile, Grads&);
Tensor view16(uint16_t* p, int64_t n, int64_t m);

// hidden rows [c, H] to panels, on every core
void pack_rows(Dtype, bool pairs, const void* rows, int64_t ld, int64_t c, int64_t h, float* out);

// logits [c, n] of columns [v0, v0 + n) by the kernels of gemm.h, from packed hidden rows.
void block_logits(const Head&, bool pairs, int64_t v0, int64_t n, const float* panels, int64_t c,
                  float* out);

}  // namespace vgkern
