#include "recurrence.h"

namespace vgkern {

static Recurrence recurrence(const Tensor& jacobian, const Tensor& states, const OptTensor& done,
                             double gamma, bool reverse) {
  const int64_t b = states.size(0), steps = states.size(1) - 1, n = states.size(2);
  TORCH_CHECK(jacobian.size(0) == b && jacobian.size(1) == steps && jacobian.size(2) == n &&
                  (jacobian.dim() == 3 || (jacobian.dim() == 4 && jacobian.size(3) == n)),
              "vgkern: jacobian must be [B, T, n, n] or [B, T, n]");
  TORCH_CHECK(!done || (done->scalar_type() == at::kBool && done->dim() == 2 &&
                        done->size(0) == b && done->size(1) == steps),
              "vgkern: done must be bool [B, T]");
  Recurrence r{b, steps, n, reverse, jacobian};
  r.done = done ? &*done : nullptr;
  r.gamma = float(gamma);
  return r;
}

static Tensor costate_scan_fwd(const Tensor& jacobian,    // [B, T, n, n] or [B, T, n]
                               const Tensor& local_grad,  // [B, T, n]
                               const Tensor& terminal,    // [B, n]
                               const OptTensor& done,     // [B, T] bool
                               double gamma) {
  const int64_t b = local_grad.size(0), steps = local_grad.size(1), n = local_grad.size(2);
  TORCH_CHECK(terminal.size(0) == b && terminal.size(1) == n, "vgkern: terminal must be [B, n]");
  Tensor costates = at::empty({b, steps + 1, n}, terminal.options());
  Recurrence r = recurrence(jacobian, costates, done, gamma, true);
  r.added = States(local_grad);
  r.first = States(terminal);
  r.out = States(costates.narrow(1, 1, steps));
  r.last = States(costates.select(1, 0));
  r.run();
  return costates;
}

static std::tuple<Tensor, Tensor> costate_scan_bwd(const Tensor& jacobian,
                                                   const Tensor& costates,   // [B, T + 1, n]
                                                   const Tensor& dcostates,  // [B, T + 1, n]
                                                   const OptTensor& done,    // [B, T] bool
                                                   double gamma, c10::List<bool> needs) {
  TORCH_CHECK(costates.sizes() == dcostates.sizes(), "vgkern: dcostates must be as costates");
  const int64_t steps = costates.size(1) - 1;
  Tensor mu = at::empty(costates.sizes(), costates.options());
  Recurrence r = recurrence(jacobian, costates, done, gamma, false);
  r.added = States(dcostates.narrow(1, 1, steps));
  r.first = States(dcostates.select(1, 0));
  r.out = States(mu.narrow(1, 0, steps));
  r.last = States(mu.select(1, steps));
  Tensor djacobian =
      at::empty(needs[0] ? jacobian.sizes() : c10::IntArrayRef{0}, jacobian.options());
  if (needs[0]) {
    r.other = States(costates.narrow(1, 1, steps));
    r.djacobian = djacobian;
  }
  r.run();
  return {djacobian, mu};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) {
  m.impl("costate_scan_fwd", &costate_scan_fwd);
  m.impl("costate_scan_bwd", &costate_scan_bwd);
}

}  // namespace vgkern
