// torch.ops.vgkern_launch: the launchers of launch.cuh on tensors, through torch's stable ABI.
// Every operator writes into tensors that Python allocated (vgkern/ops/_cuda.py, which also checks
// shapes); here is only what keeps memory safe. With VG_EMULATED the same operators take CPU
// tensors and the kernels run on the host (tests/emulation).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "launch.cuh"

// Lives in libtorch_cuda: null beside a torch without CUDA, where this library still loads.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
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

template <class Launcher, class Args>
void launch(Launcher launcher, const Args& args, const Tensor& on) {
  void* stream = nullptr;
#ifndef VG_EMULATED
  torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "vgkern: this torch has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
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

void row_sample(const Tensor& logits, const OptTensor& bias, int64_t seed, const Tensor& sequence,
                const Tensor& position, const Tensor& temperature, double softcap, int64_t top_k,
                double top_p, double min_p, Tensor token, Tensor logp, Tensor entropy) {
  RowSampleArgs a{};
  a.logits = matrix(logits, "logits");
  const int64_t n = a.logits.rows;
  a.scale = scale_of(bias, a.logits.columns, 1.0, softcap);
  a.noise = {seed, rows<int64_t>(sequence, n, "sequence"), rows<int64_t>(position, n, "position")};
  a.temperature = rows<float>(temperature, n, "temperature");
  a.top_k = top_k;
  a.top_p = top_p;
  a.min_p = min_p;
  a.token = rows<int64_t>(token, n, "token");
  a.logp = rows<float>(logp, n, "logp");
  a.entropy = rows<float>(entropy, n, "entropy");
  launch(vg_row_sample, a, logits);
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
      "row_sample(Tensor logits, Tensor? bias, int seed, Tensor sequence, Tensor position, "
      "Tensor temperature, float softcap, int top_k, float top_p, float min_p, "
      "Tensor(a!) token, Tensor(b!) logp, Tensor(c!) entropy) -> ()");
}

#ifdef VG_EMULATED
STABLE_TORCH_LIBRARY_IMPL(vgkern_launch, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(vgkern_launch, CUDA, m) {
#endif
  m.impl("row_stats", TORCH_BOX(&row_stats));
  m.impl("row_grad", TORCH_BOX(&row_grad));
  m.impl("row_sample", TORCH_BOX(&row_sample));
}
