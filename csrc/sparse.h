// The two products of a row gradient, dh = dz W and dW = dz^T h, on the columns that carry them.
//
// Ours. About a quarter of the columns of a chunk of rows holds all but 2e-3 of both products, even
// of a model that is not peaked; of a peaked one, a few percent. The columns are ordered by the
// norm of dz over the chunk's rows, and the first U are multiplied densely. What is left adds up
// coherently, so its rank-one part a b^T (a: each row's sum over the tail, b: how the tail is
// spread over the columns) is kept in dh.
//
// The error is measured, not assumed: with R of random signs, |E R|^2 / q is an unbiased estimate
// of |E|^2. E R costs q columns where E itself costs H: for dh, the tail of dz times W R; for dW,
// the rows of dz^T (h R) that were left out. One set of probes chooses U, another one certifies.
#pragma once
#include "linear.h"

namespace vgkern {

class Sparse {
 public:
  Sparse(const Head& head, double tolerance, bool pairs);
  // One chunk of dz: tile t at block + t * stride holds `live` rows of its columns. `lean[i]`: the
  // sign of row i's tail. Writes dh [height, H] and adds to dweight; false (and nothing done) where
  // no choice of columns is good enough: the caller multiplies densely.
  bool chunk(const float* block, int64_t stride, int64_t tile, int64_t live, const float* lean,
             const Tensor& hidden, Tensor* dh, Tensor* dweight);
  // A chunk that was multiplied densely: its dh [live, H] belongs to the norm that errors are set
  // to.
  void dense(const Tensor& dh);
  // {share of dh's columns, of dW's, error of dh, error of dW}; the errors are relative, estimated
  Tensor report() const;

 private:
  void measure(const float* block, int64_t stride, int64_t tile, int64_t live, const float* lean);
  Tensor head_rows(const int64_t* ids, int64_t n);
  const Head& head_;
  double tolerance_;
  bool pairs_;
  Tensor probes_, head_probes_;        // R [H, q], W R [V, q]
  std::vector<float> norm_, lean_;     // of each column: |dz|^2, sum of dz times the row's lean
  std::vector<int32_t> order_, rank_;  // columns by norm
  std::vector<float> gathered_, rows_, product_;
  std::vector<uint16_t> gathered16_, rows16_;
  Tensor dw_error_, dw_total_;          // [V, q]: accumulated over chunks
  double dh_error_ = 0, dh_total_ = 0;  // sums of squares
  double columns_h_ = 0, columns_w_ = 0, live_ = 0;
};

}  // namespace vgkern
