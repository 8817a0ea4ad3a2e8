#include "recurrence.h"

namespace vgkern {

static Recurrence recurrence(const Tensor& jacobian, const Tensor& sigma, int64_t seed,
                             const Tensor& sequence, const Tensor& position, bool reverse) {
  const int64_t b = sigma.size(0), steps = sigma.size(1), n = sigma.size(2);
  TORCH_CHECK(jacobian.size(0) == b && jacobian.size(1) == steps && jacobian.size(2) == n &&
                  (jacobian.dim() == 3 || (jacobian.dim() == 4 && jacobian.size(3) == n)),
              "vgkern: jacobian must be [B, T, n, n] or [B, T, n]");
  Recurrence r{b, steps, n, reverse, jacobian};
  r.seed = seed;
  r.sequence = i64_rows(sequence, b * steps, "sequence");
  r.position = i64_rows(position, b * steps, "position");
  return r;
}

static Tensor linear_rollout_fwd(const Tensor& jacobian,  // [B, T, n, n] or [B, T, n]
                                 const Tensor& drift,     // [B, T, n]
                                 const Tensor& sigma,     // [B, T, n]
                                 const Tensor& initial,   // [B, n]
                                 int64_t seed, const Tensor& sequence, const Tensor& position) {
  Recurrence r = recurrence(jacobian, sigma, seed, sequence, position, false);
  TORCH_CHECK(
      drift.sizes() == sigma.sizes() && initial.size(0) == r.batch && initial.size(1) == r.n,
      "vgkern: drift must be [B, T, n], initial [B, n]");
  Tensor states = at::empty({r.batch, r.steps + 1, r.n}, initial.options());
  r.added = States(drift);
  r.first = States(initial);
  r.sigma = States(sigma);
  r.out = States(states.narrow(1, 0, r.steps));
  r.last = States(states.select(1, r.steps));
  r.run();
  return states;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> linear_rollout_bwd(
    const Tensor& jacobian,  // [B, T, n, n] or [B, T, n]
    const Tensor& sigma,     // [B, T, n]
    const Tensor& states,    // [B, T + 1, n]
    const Tensor& dstates,   // [B, T + 1, n]
    int64_t seed, const Tensor& sequence, const Tensor& position, c10::List<bool> needs) {
  Recurrence r = recurrence(jacobian, sigma, seed, sequence, position, true);
  TORCH_CHECK(states.sizes() == c10::IntArrayRef({r.batch, r.steps + 1, r.n}) &&
                  dstates.sizes() == states.sizes(),
              "vgkern: states and dstates must be [B, T + 1, n]");
  const auto options = jacobian.options();
  const std::vector<int64_t> none = {0}, one = {r.batch, r.n};
  Tensor djacobian = at::empty(needs[0] ? jacobian.sizes() : c10::IntArrayRef(none), options);
  Tensor ddrift = at::empty(needs[1] ? sigma.sizes() : c10::IntArrayRef(none), options);
  Tensor dsigma = at::empty(needs[2] ? sigma.sizes() : c10::IntArrayRef(none), options);
  Tensor dinitial = at::empty(needs[3] ? one : none, options);
  r.added = States(dstates.narrow(1, 0, r.steps));
  r.first = States(dstates.select(1, r.steps));
  if (needs[0]) {
    r.other = States(states.narrow(1, 0, r.steps));
    r.djacobian = djacobian;
  }
  if (needs[1]) r.out = States(ddrift);
  if (needs[2]) r.dsigma = States(dsigma);
  if (needs[3]) r.last = States(dinitial);
  r.run();
  return {djacobian, ddrift, dsigma, dinitial};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) {
  m.impl("linear_rollout_fwd", &linear_rollout_fwd);
  m.impl("linear_rollout_bwd", &linear_rollout_bwd);
}

}  // namespace vgkern
