#include "linear.h"
#include "objective.h"
#include "sparse.h"

namespace vgkern {

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
linear_policy_loss_sparse_fwd(const Tensor& hidden,      // [N, H]
                              const Tensor& weight,      // [V, H]
                              const OptTensor& bias,     // [V]
                              const Tensor& targets,     // [N]
                              const Tensor& advantages,  // [N]
                              const Tensor& row_weight,  // [N], 0 where masked
                              const OptTensor& old_logp, const OptTensor& ref_logp,
                              const OptTensor& sampler_logp,  // [N]
                              double temperature, double softcap, c10::List<double> knobs,
                              c10::List<bool> needs,
                              double sparse_tol,  // 0: dense products
                              int64_t seed, double tau,
                              const OptTensor& costate,    // [N, He]
                              const OptTensor& embedding,  // [V, He]
                              const OptTensor& sequence,
                              const OptTensor& position,  // [N]; none: relaxation "expected"
                              const OptTensor& costate_scale) {
  Head head(hidden, weight, bias, temperature, softcap);
  const Objective o(knobs);
  TORCH_CHECK(o.row_local(), "vgkern: a sequence-level objective needs all rows");
  Tensor tgt = targets.contiguous();
  const int64_t* y = i64_rows(tgt, head.n, "targets");
  const float* adv = f32_rows(advantages, head.n, "advantages");
  const float* w = f32_rows(row_weight, head.n, "row_weight");
  const float* old = f32_rows(old_logp, head.n, "old_logp");
  const float* ref = f32_rows(ref_logp, head.n, "ref_logp");
  const float* sam = f32_rows(sampler_logp, head.n, "sampler_logp");
  bool flags[3] = {needs[0], needs[1], needs[2]};
  Grads grads(head, flags);
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  Tensor logp = at::zeros({head.n}, f32), counts = at::empty({Counts::kSize}, f32);
  Counts n;
  double loss = 0;
  const auto costates = Costates::given(head, grads.any() ? costate : std::nullopt, embedding, seed,
                                        sequence, position, tau, costate_scale);
  // A row whose coefficient is zero whatever its logits say, and without a costate, costs nothing.
  std::vector<int64_t> active;
  auto scored = [&](int64_t i) { return o.always_active() || adv[i] != 0.f; };
  for (int64_t i = 0; i < head.n; ++i) {
    if (w[i] == 0.f) continue;
    n.tokens += 1;
    n.active += scored(i);
    if (scored(i) || (costates && costates->live(i))) active.push_back(i);
  }
  std::optional<Sparse> sparse;
  if (sparse_tol > 0 && (grads.need[0] || grads.need[1]))
    sparse.emplace(head, sparse_tol, head.dtype == kBF16 && gemm().bf16);
  LinearRows run(head, y, std::move(active), nullptr, costates ? &*costates : nullptr,
                 sparse ? &*sparse : nullptr);
  run.run(grads.any() ? &grads : nullptr, [&](Chunk& k, float* c, float* e) {
    for (int64_t i = 0; i < k.count; ++i) {
      const int64_t r = k.rows[i];
      c[i] = e[i] = 0.f;
      if (!scored(r)) {  // here for its costate alone, whose gradient a NaN row would spoil unseen
        if (std::isnan(k.stats[i].logp)) loss = k.stats[i].logp;
        continue;
      }
      const float lp = k.stats[i].logp;
      logp.data_ptr<float>()[r] = lp;
      Token token{lp, old ? old[r] : lp, adv[r]};
      if (ref) token.ref = ref[r], token.has_ref = true;
      if (sam) token.sampler = sam[r], token.has_sampler = true;
      const TokenLoss t = token_loss(token, Sequence{}, o);
      n.add(token, t);
      const double value = t.value - double(o.entropy_coef) * k.stats[i].entropy;
      loss += w[r] * value;
      c[i] = w[r] * seen(value, t.slope);
      e[i] = -w[r] * o.entropy_coef;
      n.entropy += k.stats[i].entropy;
    }
  });
  n.write(counts.data_ptr<float>());
  auto [dh, dw, db] = grads.finish(head, bias, false);
  Tensor report = sparse ? sparse->report() : at::zeros({4}, f32);
  return {at::full({}, loss, f32), logp, counts, dh, dw, db, report};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_policy_loss_fwd(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets,
    const Tensor& advantages, const Tensor& row_weight, const OptTensor& old_logp,
    const OptTensor& ref_logp, const OptTensor& sampler_logp, double temperature, double softcap,
    c10::List<double> knobs, c10::List<bool> needs, int64_t seed, double tau,
    const OptTensor& costate, const OptTensor& embedding, const OptTensor& sequence,
    const OptTensor& position, const OptTensor& costate_scale) {
  auto [loss, logp, counts, dh, dw, db, report] = linear_policy_loss_sparse_fwd(
      hidden, weight, bias, targets, advantages, row_weight, old_logp, ref_logp, sampler_logp,
      temperature, softcap, std::move(knobs), std::move(needs), 0., seed, tau, costate, embedding,
      sequence, position, costate_scale);
  return {loss, logp, counts, dh, dw, db};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) {
  m.impl("linear_policy_loss_fwd", &linear_policy_loss_fwd);
  m.impl("linear_policy_loss_sparse_fwd", &linear_policy_loss_sparse_fwd);
}

}  // namespace vgkern
