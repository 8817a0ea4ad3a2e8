#include "common.h"
#include "objective.h"

namespace vgkern {

static std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    const Tensor& logp,        // [B, T]
    const Tensor& advantages,  // [B, T]
    const Tensor& row_weight,  // [B, T], 0 where masked
    const OptTensor& old_logp, const OptTensor& ref_logp, const OptTensor& sampler_logp,  // [B, T]
    const OptTensor& entropy,                                                             // [B, T]
    c10::List<double> knobs) {
  const Objective o(knobs);
  const int64_t total = logp.numel(), width = logp.size(1);
  const float* lp = f32_rows(logp, total, "logp");
  const float* adv = f32_rows(advantages, total, "advantages");
  const float* w = f32_rows(row_weight, total, "row_weight");
  const float* old = f32_rows(old_logp, total, "old_logp");
  const float* ref = f32_rows(ref_logp, total, "ref_logp");
  const float* sam = f32_rows(sampler_logp, total, "sampler_logp");
  const float* ent = f32_rows(entropy, total, "entropy");
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  Tensor dlogp = at::zeros(logp.sizes(), f32), dent = at::zeros(logp.sizes(), f32);
  Tensor counts = at::empty({Counts::kSize}, f32);
  float *dl = dlogp.data_ptr<float>(), *de = dent.data_ptr<float>();
  auto token = [&](int64_t i) {
    Token t{lp[i], old ? old[i] : lp[i], adv[i]};
    if (ref) t.ref = ref[i], t.has_ref = true;
    if (sam) t.sampler = sam[i], t.has_sampler = true;
    return t;
  };
  Counts n;
  double loss = 0;
  for (int64_t s = 0; s < total; s += width) {  // one sequence
    double length = 0, ratio = 0, mismatch = 0;
    for (int64_t i = s; i < s + width; ++i)
      if (w[i] != 0.f) {
        length += 1;
        ratio += ratio_part(token(i), o);
        mismatch += mismatch_part(token(i), o);
      }
    const Sequence seq = sequence_of(length, ratio, mismatch, o);
    double pending = 0;  // slope in the log-ratio of the sequence
    for (int64_t i = s; i < s + width; ++i) {
      if (w[i] == 0.f) continue;
      n.tokens += 1;
      if (!o.always_active() && adv[i] == 0.f) continue;
      n.active += 1;
      const TokenLoss t = token_loss(token(i), seq, o);
      n.add(token(i), t);
      loss += w[i] * (t.value - (ent ? double(o.entropy_coef) * ent[i] : 0.0));
      dl[i] = w[i] * t.slope;
      pending += double(w[i]) * t.sequence_slope;
      if (ent) {
        de[i] = -w[i] * o.entropy_coef;
        n.entropy += ent[i];
      }
    }
    if (pending != 0.0)
      for (int64_t i = s; i < s + width; ++i)
        if (w[i] != 0.f) dl[i] += float(pending * ratio_share(token(i), seq, o));
  }
  n.write(counts.data_ptr<float>());
  return {at::full({}, loss, f32), dlogp, dent, counts};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) { m.impl("policy_loss_fwd", &policy_loss_fwd); }

}  // namespace vgkern
