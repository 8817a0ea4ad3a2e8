#include "linear.h"

namespace vgkern {

static std::tuple<Tensor, Tensor, Tensor> linear_logprobs_fwd(const Tensor& hidden,   // [N, H]
                                                              const Tensor& weight,   // [V, H]
                                                              const OptTensor& bias,  // [V]
                                                              const Tensor& targets,  // [N]
                                                              double temperature, double softcap,
                                                              int64_t ignore_index) {
  Head head(hidden, weight, bias, temperature, softcap);
  Tensor tgt = targets.contiguous();
  const int64_t* y = i64_rows(tgt, head.n, "targets");
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  Tensor logp = at::zeros({head.n}, f32), ent = at::zeros({head.n}, f32);
  Tensor lse = at::zeros({head.n}, f32);
  std::vector<int64_t> active;
  for (int64_t i = 0; i < head.n; ++i)
    if (y[i] != ignore_index) active.push_back(i);
  LinearRows run(head, y, std::move(active));
  run.run(nullptr, [&](Chunk& k, float*, float*) {
    for (int64_t i = 0; i < k.count; ++i) {
      logp.data_ptr<float>()[k.rows[i]] = k.stats[i].logp;
      ent.data_ptr<float>()[k.rows[i]] = k.stats[i].entropy;
      lse.data_ptr<float>()[k.rows[i]] = k.stats[i].lse;
    }
  });
  return {logp, ent, lse};
}

static std::tuple<Tensor, Tensor, Tensor> linear_logprobs_bwd(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets,
    const Tensor&, const Tensor&, const Tensor&,  // saved statistics: recomputed with the logits
    const Tensor& dlogp,                          // [N]
    const Tensor& dentropy,                       // [N]
    double temperature, double softcap, int64_t ignore_index, c10::List<bool> needs) {
  Head head(hidden, weight, bias, temperature, softcap);
  Tensor tgt = targets.contiguous();
  const int64_t* y = i64_rows(tgt, head.n, "targets");
  const float* dl = f32_rows(dlogp, head.n, "dlogp");
  const float* de = f32_rows(dentropy, head.n, "dentropy");
  bool flags[3] = {needs[0], needs[1], needs[2]};
  Grads grads(head, flags);
  std::vector<int64_t> active;
  for (int64_t i = 0; i < head.n; ++i)
    if (y[i] != ignore_index && (dl[i] != 0.f || de[i] != 0.f)) active.push_back(i);
  LinearRows run(head, y, std::move(active));
  run.run(&grads, [&](Chunk& k, float* c, float* e) {
    for (int64_t i = 0; i < k.count; ++i) {
      c[i] = dl[k.rows[i]];
      e[i] = de[k.rows[i]];
    }
  });
  return grads.finish(head, bias, true);
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) {
  m.impl("linear_logprobs_fwd", &linear_logprobs_fwd);
  m.impl("linear_logprobs_bwd", &linear_logprobs_bwd);
}

}  // namespace vgkern
