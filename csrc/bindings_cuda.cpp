// torch.ops.vgkern_launch: the launchers of launch.cuh on tensors, through torch's stable ABI.
// Every operator writes into tensors that Python allocated (vgkern/ops/_cuda.py, which also checks
// shapes); here is only what keeps memory safe. With VG_EMULATED the same operators take CPU
// tensors and the kernels run on the host (tests/emulation).
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "launch.cuh"

extern "C" __attribute__((visibility("default"))) int vg_emulated() {
#ifdef VG_EMULATED
  return 1;
#else
  return 0;
#endif
}

namespace {

using namespace vgkern;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

#ifndef VG_EMULATED
// The stream that torch has current on a device. The function lives in libtorch_cuda, which Python
// loads with local scope: neither a link, which a torch without CUDA could not satisfy, nor a weak
// symbol, which stays null, reaches it.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = dlsym(cuda ? cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Get>(found);
  }();
  STD_TORCH_CHECK(get != nullptr, "vgkern: no libtorch_cuda in this process: torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}
#endif

template <class Launcher, class Args>
void launch(Launcher launcher, const Args& args, const Tensor& on) {
  void* stream = nullptr;
#ifndef VG_EMULATED
  torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  stream = current_stream(on.get_device_index());
#endif
  const int error = launcher(&args, stream);
  STD_TORCH_CHECK(error == 0, "vgkern: CUDA error ", error, " at launch");
}

int dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kF32;
    case ScalarType::BFloat16: return kBF16;
    case ScalarType::Half: return kF16;
    default: STD_TORCH_CHECK(false, "vgkern: no CUDA kernel for this dtype"); return -1;
  }
}

Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), "vgkern: ", name,
                  " must be two-dimensional with unit-stride columns");
  return {t.data_ptr(), t.size(0), t.size(1), t.stride(0), dtype_of(t)};
}

template <class T>
T* rows(const Tensor& t, int64_t n, const char* name) {
  const ScalarType wanted = std::is_same_v<T, int64_t>  ? ScalarType::Long
                            : std::is_same_v<T, double> ? ScalarType::Double
                                                        : ScalarType::Float;
  STD_TORCH_CHECK(t.scalar_type() == wanted && t.is_contiguous() && t.numel() == n,
                  "vgkern: ", name, " has the wrong dtype, size or strides");
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* rows(const OptTensor& t, int64_t n, const char* name) {
  return t ? rows<T>(*t, n, name) : nullptr;
}

Scale scale_of(const OptTensor& bias, int64_t vocab, double temperature, double softcap) {
  return {rows<float>(bias, vocab, "bias"), float(1.0 / temperature), float(softcap)};
}

void row_stats(const Tensor& logits, const OptTensor& bias, const Tensor& targets, Tensor logp,
               Tensor entropy, Tensor lse, double temperature, double softcap,
               int64_t ignore_index) {
  RowStatsArgs a{};
  a.logits = matrix(logits, "logits");
  const int64_t n = a.logits.rows;
  a.scale = scale_of(bias, a.logits.columns, temperature, softcap);
  a.targets = rows<int64_t>(targets, n, "targets");
  a.ignore_index = ignore_index;
  a.logp = rows<float>(logp, n, "logp");
  a.entropy = rows<float>(entropy, n, "entropy");
  a.lse = rows<float>(lse, n, "lse");
  launch(vg_row_stats, a, logits);
}

void row_grad(const Tensor& logits, const OptTensor& bias, const OptTensor& targets,
              const OptTensor& logp, const OptTensor& entropy, const OptTensor& lse,
              const OptTensor& c, const OptTensor& e, const OptTensor& u, int64_t seed,
              const OptTensor& sequence, const OptTensor& position, double tau, bool expected,
              double temperature, double softcap, int64_t ignore_index, Tensor out) {
  RowGradArgs a{};
  a.logits = matrix(logits, "logits");
  a.out = matrix(out, "out");
  const int64_t n = a.logits.rows, v = a.logits.columns;
  STD_TORCH_CHECK(a.out.rows == n && a.out.columns == v, "vgkern: out must have logits' shape");
  STD_TORCH_CHECK((!c && !e) || (targets && logp && entropy && lse),
                  "vgkern: c and e need targets and statistics");
  a.scale = scale_of(bias, v, temperature, softcap);
  a.targets = rows<int64_t>(targets, n, "targets");
  a.ignore_index = ignore_index;
  a.logp = rows<float>(logp, n, "logp");
  a.entropy = rows<float>(entropy, n, "entropy");
  a.lse = rows<float>(lse, n, "lse");
  a.c = rows<float>(c, n, "c");
  a.e = rows<float>(e, n, "e");
  if (u) {
    const Matrix m = matrix(*u, "u");
    STD_TORCH_CHECK(m.rows == n && m.columns == v && m.dtype == kF32,
                    "vgkern: u must be float32 with logits' shape");
    STD_TORCH_CHECK(expected || (sequence && position), "vgkern: u needs its noise");
    a.u = static_cast<const float*>(m.data);
    a.u_stride = m.stride;
  }
  a.noise = {seed, rows<int64_t>(sequence, n, "sequence"), rows<int64_t>(position, n, "position")};
  a.tau = float(tau);
  a.expected = expected;
  launch(vg_row_grad, a, logits);
}

void row_policy(const Tensor& logits, const OptTensor& bias, const Tensor& targets,
                const Tensor& advantages, const Tensor& weight, const OptTensor& old_logp,
                const OptTensor& ref_logp, const OptTensor& sampler_logp, Tensor logp,
                Tensor entropy, OptTensor power, double temperature, double softcap,
                int64_t ignore_index, std::vector<double> objective, OptTensor out) {
  STD_TORCH_CHECK(objective.size() == 20, "vgkern: an objective is 20 numbers");
  RowPolicyArgs a{Objective(objective)};
  STD_TORCH_CHECK(a.objective.row_local(), "vgkern: this objective needs whole sequences");
  a.logits = matrix(logits, "logits");
  const int64_t n = a.logits.rows, v = a.logits.columns;
  if (out) {
    a.out = matrix(*out, "out");
    STD_TORCH_CHECK(a.out.rows == n && a.out.columns == v, "vgkern: out must have logits' shape");
  }
  a.scale = scale_of(bias, v, temperature, softcap);
  a.targets = rows<int64_t>(targets, n, "targets");
  a.ignore_index = ignore_index;
  a.advantages = rows<float>(advantages, n, "advantages");
  a.weight = rows<float>(weight, n, "row_weight");
  a.old_logp = rows<float>(old_logp, n, "old_logp");
  a.ref_logp = rows<float>(ref_logp, n, "ref_logp");
  a.sampler_logp = rows<float>(sampler_logp, n, "sampler_logp");
  a.logp = rows<float>(logp, n, "logp");
  a.entropy = rows<float>(entropy, n, "entropy");
  a.power = rows<float>(power, n, "power");
  launch(vg_row_policy, a, logits);
}

struct Options {  // a vgkern.ops._truncate.Cut, flattened
  double temperature;
  int64_t top_k;
  double top_p, min_p;
  const OptTensor &temperatures, &top_ks, &top_ps, &min_ps;
  RowOptions rows_of(int64_t n) const {
    return {float(temperature),
            top_k,
            top_p,
            min_p,
            rows<float>(temperatures, n, "temperature"),
            rows<int64_t>(top_ks, n, "top_k"),
            rows<float>(top_ps, n, "top_p"),
            rows<float>(min_ps, n, "min_p")};
  }
};

void row_sample(const Tensor& logits, const OptTensor& bias, int64_t seed, const Tensor& sequence,
                const Tensor& position, double softcap, double temperature, int64_t top_k,
                double top_p, double min_p, const OptTensor& temperatures, const OptTensor& top_ks,
                const OptTensor& top_ps, const OptTensor& min_ps, const OptTensor& cut,
                Tensor token) {
  RowSampleArgs a{};
  a.logits = matrix(logits, "logits");
  const int64_t n = a.logits.rows;
  a.scale = scale_of(bias, a.logits.columns, 1.0, softcap);
  a.noise = {seed, rows<int64_t>(sequence, n, "sequence"), rows<int64_t>(position, n, "position")};
  a.options =
      Options{temperature, top_k, top_p, min_p, temperatures, top_ks, top_ps, min_ps}.rows_of(n);
  a.cut = rows<int64_t>(cut, 2 * n, "cut");
  a.token = rows<int64_t>(token, n, "token");
  launch(vg_row_sample, a, logits);
}

RowTruncatedArgs truncated(const Tensor& logits, const OptTensor& bias, const OptTensor& targets,
                           double softcap, int64_t ignore_index, const Options& options,
                           const OptTensor& cut) {
  RowTruncatedArgs a{};
  a.logits = matrix(logits, "logits");
  const int64_t n = a.logits.rows;
  a.scale = scale_of(bias, a.logits.columns, 1.0, softcap);
  a.targets = rows<int64_t>(targets, n, "targets");
  a.options = options.rows_of(n);
  a.ignore_index = ignore_index;
  a.cut = rows<int64_t>(cut, 2 * n, "cut");
  return a;
}

void row_cut(const Tensor& logits, const OptTensor& bias, const OptTensor& targets, double softcap,
             int64_t ignore_index, double temperature, int64_t top_k, double top_p, double min_p,
             const OptTensor& temperatures, const OptTensor& top_ks, const OptTensor& top_ps,
             const OptTensor& min_ps, Tensor cut) {
  const Options options{temperature, top_k, top_p, min_p, temperatures, top_ks, top_ps, min_ps};
  launch(vg_row_cut, truncated(logits, bias, targets, softcap, ignore_index, options, cut), logits);
}

void row_kept_stats(const Tensor& logits, const OptTensor& bias, const Tensor& targets,
                    double softcap, int64_t ignore_index, double temperature, int64_t top_k,
                    double top_p, double min_p, const OptTensor& temperatures,
                    const OptTensor& top_ks, const OptTensor& top_ps, const OptTensor& min_ps,
                    const OptTensor& cut, Tensor logp, Tensor entropy, Tensor lse) {
  const Options options{temperature, top_k, top_p, min_p, temperatures, top_ks, top_ps, min_ps};
  RowTruncatedArgs a = truncated(logits, bias, targets, softcap, ignore_index, options, cut);
  a.logp = rows<float>(logp, a.logits.rows, "logp");
  a.entropy = rows<float>(entropy, a.logits.rows, "entropy");
  a.lse = rows<float>(lse, a.logits.rows, "lse");
  launch(vg_row_kept_stats, a, logits);
}

void row_kept_grad(const Tensor& logits, const OptTensor& bias, const Tensor& targets,
                   double softcap, int64_t ignore_index, double temperature, int64_t top_k,
                   double top_p, double min_p, const OptTensor& temperatures,
                   const OptTensor& top_ks, const OptTensor& top_ps, const OptTensor& min_ps,
                   const OptTensor& cut, const Tensor& logp, const Tensor& entropy,
                   const Tensor& lse, const Tensor& c, const Tensor& e, Tensor out) {
  const Options options{temperature, top_k, top_p, min_p, temperatures, top_ks, top_ps, min_ps};
  RowTruncatedArgs a = truncated(logits, bias, targets, softcap, ignore_index, options, cut);
  const int64_t n = a.logits.rows;
  a.out = matrix(out, "out");
  STD_TORCH_CHECK(a.out.rows == n && a.out.columns == a.logits.columns,
                  "vgkern: out must have logits' shape");
  a.logp = rows<float>(logp, n, "logp");
  a.entropy = rows<float>(entropy, n, "entropy");
  a.lse = rows<float>(lse, n, "lse");
  a.c = rows<float>(c, n, "c");
  a.e = rows<float>(e, n, "e");
  launch(vg_row_kept_grad, a, logits);
}

void policy_terms(const Tensor& logp, const Tensor& advantages, const Tensor& weight,
                  const OptTensor& old_logp, const OptTensor& ref_logp,
                  const OptTensor& sampler_logp, const OptTensor& entropy,
                  std::vector<double> objective, const OptTensor& segments, Tensor dlogp,
                  Tensor dentropy, Tensor partial) {
  STD_TORCH_CHECK(objective.size() == 20 && logp.dim() == 2, "vgkern: [B, T] and 20 numbers");
  const int64_t n = logp.numel();
  PolicyTermsArgs a{Objective(objective), logp.size(0), logp.size(1)};
  a.logp = rows<float>(logp, n, "logp");
  a.advantages = rows<float>(advantages, n, "advantages");
  a.weight = rows<float>(weight, n, "row_weight");
  a.old_logp = rows<float>(old_logp, n, "old_logp");
  a.ref_logp = rows<float>(ref_logp, n, "ref_logp");
  a.sampler_logp = rows<float>(sampler_logp, n, "sampler_logp");
  a.entropy = rows<float>(entropy, n, "entropy");
  a.dlogp = rows<float>(dlogp, n, "dlogp");
  a.dentropy = rows<float>(dentropy, n, "dentropy");
  if (segments && !a.objective.row_local()) {
    a.segment_count = segments->numel() - 1;
    a.segments = rows<int64_t>(*segments, a.segment_count + 1, "segments");
  }
  a.partial = rows<double>(partial, vg_policy_blocks(&a) * kTally, "partial");
  launch(vg_policy_terms, a, logp);
}

void policy_totals(const Tensor& partial, Tensor loss, Tensor counts) {
  const PolicyTotalsArgs a{rows<double>(partial, partial.numel(), "partial"),
                           partial.numel() / kTally, rows<float>(loss, 1, "loss"),
                           rows<float>(counts, Counts::kSize, "counts")};
  launch(vg_policy_totals, a, partial);
}

void group_advantages(const Tensor& rewards, const Tensor& ids, const Tensor& order,
                      int64_t estimator, Tensor out) {
  const int64_t n = rewards.numel();
  const GroupAdvantagesArgs a{rows<double>(rewards, n, "rewards"),
                              rows<int64_t>(ids, n, "ids"),
                              rows<int64_t>(order, n, "order"),
                              rows<double>(out, n, "out"),
                              n,
                              int(estimator)};
  launch(vg_group_advantages, a, rewards);
}

Strided strided(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1) &&
                      t.scalar_type() == like.scalar_type(),
                  "vgkern: ", name, " has the wrong shape or dtype");
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

void* plain(const Tensor& t, const Tensor& like, const char* name) {
  strided(t, like, name);
  STD_TORCH_CHECK(t.is_contiguous(), "vgkern: ", name, " must be contiguous");
  return t.data_ptr();
}

GaussianActionArgs gaussian(const Tensor& log_std, int64_t seed, const Tensor& sequence,
                            const Tensor& position) {
  GaussianActionArgs a{};
  a.log_std = strided(log_std, log_std, "log_std");
  a.rows = log_std.size(0);
  a.n = log_std.size(1);
  a.dtype = dtype_of(log_std);
  a.noise = {seed, rows<int64_t>(sequence, a.rows, "sequence"),
             rows<int64_t>(position, a.rows, "position")};
  return a;
}

void gaussian_action(const Tensor& mean, const Tensor& log_std, int64_t seed,
                     const Tensor& sequence, const Tensor& position, Tensor action, Tensor logp) {
  GaussianActionArgs a = gaussian(log_std, seed, sequence, position);
  a.mean = strided(mean, log_std, "mean");
  a.action = plain(action, log_std, "action");
  a.logp = rows<float>(logp, a.rows, "logp");
  launch(vg_gaussian_action, a, log_std);
}

void gaussian_action_grad(const Tensor& daction, const Tensor& dlogp, const Tensor& log_std,
                          int64_t seed, const Tensor& sequence, const Tensor& position,
                          Tensor dmean, Tensor dlog_std) {
  GaussianActionArgs a = gaussian(log_std, seed, sequence, position);
  a.daction = strided(daction, log_std, "daction");
  a.dlogp = rows<float>(dlogp, a.rows, "dlogp");
  a.dmean = plain(dmean, log_std, "dmean");
  a.dlog_std = plain(dlog_std, log_std, "dlog_std");
  launch(vg_gaussian_action, a, log_std);
}

Steps steps(const OptTensor& t, const RecurrenceArgs& a, const char* name) {
  if (!t) return {};
  const bool timed = t->dim() == 3;
  STD_TORCH_CHECK(t->dim() == (timed ? 3 : 2) && t->size(0) == a.batch &&
                      (!timed || t->size(1) == a.steps) && t->size(-1) == a.n &&
                      dtype_of(*t) == a.dtype,
                  "vgkern: ", name, " has the wrong shape or dtype");
  return {t->data_ptr(), t->stride(0), timed ? t->stride(1) : 0, t->stride(-1)};
}

// `out`, `last` and `dsigma` are written through their strides.
void recurrence(const Tensor& jacobian, const Tensor& push, const Tensor& start,
                const OptTensor& done, double gamma, bool reverse, const OptTensor& sigma,
                int64_t seed, const OptTensor& sequence, const OptTensor& position,
                const OptTensor& other, OptTensor out, OptTensor last, OptTensor djacobian,
                OptTensor dsigma) {
  RecurrenceArgs a{};
  STD_TORCH_CHECK(push.dim() == 3, "vgkern: push must be [B, T, n]");
  a.batch = push.size(0);
  a.steps = push.size(1);
  a.n = push.size(2);
  a.dtype = dtype_of(push);
  a.dense = jacobian.dim() == 4;
  a.reverse = reverse;
  STD_TORCH_CHECK((a.dense || jacobian.dim() == 3) && jacobian.size(0) == a.batch &&
                      jacobian.size(1) == a.steps && jacobian.size(2) == a.n &&
                      jacobian.size(-1) == a.n && dtype_of(jacobian) == a.dtype,
                  "vgkern: jacobian has the wrong shape or dtype");
  a.jacobian = jacobian.data_ptr();
  for (int64_t d = 0; d < jacobian.dim(); ++d) a.jacobian_stride[d] = jacobian.stride(d);
  a.push = steps(push, a, "push");
  a.start = steps(start, a, "start");
  if (done) {
    STD_TORCH_CHECK(done->dim() == 2 && done->size(0) == a.batch && done->size(1) == a.steps &&
                        done->scalar_type() == ScalarType::Bool,
                    "vgkern: done must be bool [B, T]");
    a.done = static_cast<const uint8_t*>(done->data_ptr());
    a.done_batch = done->stride(0);
    a.done_step = done->stride(1);
  }
  a.gamma = float(gamma);
  a.sigma = steps(sigma, a, "sigma");
  a.noise = {seed, rows<int64_t>(sequence, a.batch * a.steps, "sequence"),
             rows<int64_t>(position, a.batch * a.steps, "position")};
  a.other = steps(other, a, "other");
  a.out = steps(out, a, "out");
  a.last = steps(last, a, "last");
  a.dsigma = steps(dsigma, a, "dsigma");
  STD_TORCH_CHECK((!sigma && !dsigma) || (sequence && position), "vgkern: noise is missing");
  if (djacobian) {
    STD_TORCH_CHECK(other && djacobian->is_contiguous() && dtype_of(*djacobian) == a.dtype &&
                        djacobian->numel() == a.batch * a.steps * a.n * (a.dense ? a.n : 1),
                    "vgkern: djacobian has the wrong shape, dtype or strides");
    a.djacobian = djacobian->data_ptr();
  }
  launch(vg_recurrence, a, push);
}

}  // namespace

STABLE_TORCH_LIBRARY(vgkern_launch, m) {
  m.def(
      "row_stats(Tensor logits, Tensor? bias, Tensor targets, Tensor(a!) logp, "
      "Tensor(b!) entropy, Tensor(c!) lse, float temperature, float softcap, int ignore_index) "
      "-> ()");
  m.def(
      "row_grad(Tensor logits, Tensor? bias, Tensor? targets, Tensor? logp, Tensor? entropy, "
      "Tensor? lse, Tensor? c, Tensor? e, Tensor? u, int seed, Tensor? sequence, "
      "Tensor? position, float tau, bool expected, float temperature, float softcap, "
      "int ignore_index, Tensor(a!) out) -> ()");
  m.def(
      "row_policy(Tensor logits, Tensor? bias, Tensor targets, Tensor advantages, "
      "Tensor row_weight, Tensor? old_logp, Tensor? ref_logp, Tensor? sampler_logp, "
      "Tensor(a!) logp, Tensor(b!) entropy, Tensor(c!)? power, float temperature, "
      "float softcap, int ignore_index, float[] objective, Tensor(d!)? out) -> ()");
  m.def(
      "row_sample(Tensor logits, Tensor? bias, int seed, Tensor sequence, Tensor position, "
      "float softcap, "
      "float temperature, int top_k, float top_p, float min_p, Tensor? temperatures, "
      "Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor? cut, Tensor(a!) token) -> ()");
  m.def(
      "row_cut(Tensor logits, Tensor? bias, Tensor? targets, float softcap, int ignore_index, "
      "float temperature, int top_k, float top_p, float min_p, Tensor? temperatures, "
      "Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor(a!) cut) -> ()");
  m.def(
      "row_kept_stats(Tensor logits, Tensor? bias, Tensor targets, float softcap, "
      "int ignore_index, "
      "float temperature, int top_k, float top_p, float min_p, Tensor? temperatures, "
      "Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor? cut, Tensor(a!) logp, Tensor(b!) "
      "entropy, "
      "Tensor(c!) lse) -> ()");
  m.def(
      "row_kept_grad(Tensor logits, Tensor? bias, Tensor targets, float softcap, "
      "int ignore_index, "
      "float temperature, int top_k, float top_p, float min_p, Tensor? temperatures, "
      "Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor? cut, Tensor logp, Tensor entropy, "
      "Tensor lse, "
      "Tensor c, Tensor e, Tensor(a!) out) -> ()");
  m.def(
      "policy_terms(Tensor logp, Tensor advantages, Tensor row_weight, Tensor? old_logp, "
      "Tensor? ref_logp, Tensor? sampler_logp, Tensor? entropy, float[] objective, "
      "Tensor? segments, Tensor(a!) dlogp, Tensor(b!) dentropy, Tensor(c!) partial) -> ()");
  m.def("policy_totals(Tensor partial, Tensor(a!) loss, Tensor(b!) counts) -> ()");
  m.def(
      "group_advantages(Tensor rewards, Tensor ids, Tensor order, int estimator, "
      "Tensor(a!) out) -> ()");
  m.def(
      "gaussian_action(Tensor mean, Tensor log_std, int seed, Tensor sequence, Tensor position, "
      "Tensor(a!) action, Tensor(b!) logp) -> ()");
  m.def(
      "gaussian_action_grad(Tensor daction, Tensor dlogp, Tensor log_std, int seed, "
      "Tensor sequence, Tensor position, Tensor(a!) dmean, Tensor(b!) dlog_std) -> ()");
  m.def(
      "recurrence(Tensor jacobian, Tensor push, Tensor start, Tensor? done, float gamma, "
      "bool reverse, Tensor? sigma, int seed, Tensor? sequence, Tensor? position, "
      "Tensor? other, Tensor(a!)? out, Tensor(b!)? last, Tensor(c!)? djacobian, "
      "Tensor(d!)? dsigma) -> ()");
}

#ifdef VG_EMULATED
STABLE_TORCH_LIBRARY_IMPL(vgkern_launch, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(vgkern_launch, CUDA, m) {
#endif
  m.impl("row_stats", TORCH_BOX(&row_stats));
  m.impl("row_grad", TORCH_BOX(&row_grad));
  m.impl("row_policy", TORCH_BOX(&row_policy));
  m.impl("row_sample", TORCH_BOX(&row_sample));
  m.impl("row_cut", TORCH_BOX(&row_cut));
  m.impl("row_kept_stats", TORCH_BOX(&row_kept_stats));
  m.impl("row_kept_grad", TORCH_BOX(&row_kept_grad));
  m.impl("policy_terms", TORCH_BOX(&policy_terms));
  m.impl("policy_totals", TORCH_BOX(&policy_totals));
  m.impl("group_advantages", TORCH_BOX(&group_advantages));
  m.impl("gaussian_action", TORCH_BOX(&gaussian_action));
  m.impl("gaussian_action_grad", TORCH_BOX(&gaussian_action_grad));
  m.impl("recurrence", TORCH_BOX(&recurrence));
}
