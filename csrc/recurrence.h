// The recurrence of costate_scan and linear_rollout, in either direction of time:
//
//     x_{t'} = added_t + gamma keep_t M_t x_t [+ sigma_t eps_t]
//
// t' = t + 1 and M = A forward in time, t' = t - 1 and M = A^T in reverse.
#pragma once
#include "common.h"
#include "matrix.h"
#include "philox.h"

namespace vgkern {

// A tensor [B, T, n] (or [B, n], with t = 0) of any strides, read or written a row at a time.
struct States {
  char* data = nullptr;
  Dtype dtype = kF32;
  int64_t size = 4, sb = 0, st = 0, sn = 1;
  States() = default;
  explicit States(const Tensor& t);
  explicit operator bool() const { return data != nullptr; }
  void read(int64_t b, int64_t t, int64_t n, float* out) const;
  void write(int64_t b, int64_t t, int64_t n, const float* x) const;  // last stride 1
};

struct Recurrence {
  int64_t batch, steps, n;
  bool reverse;
  Tensor jacobian;     // [B, T, n, n] or [B, T, n]
  States added;        // [B, T, n]
  States first;        // [B, n]
  const Tensor* done;  // [B, T] bool, or null
  float gamma = 1.f;
  States out, last;  // the state at the start of each step [B, T, n], and after the last [B, n]
  States other;  // [B, T, n]: djacobian_t = gamma keep_t times the outer product of x_t and this
  Tensor djacobian;  // contiguous, like jacobian, or undefined
  States sigma;      // forward: sigma_t eps_t is added
  States dsigma;     // reverse: x_t eps_t is written
  int64_t seed = 0;
  const int64_t *sequence = nullptr, *position = nullptr;  // [B * T]
  void run() const;

 private:
  struct Space;
  void step(int64_t b, int64_t t, Space&) const;
  void matrix(int64_t b, int64_t t, Space&) const;
};

}  // namespace vgkern
