#include <algorithm>

#include "common.h"
#include "objective.h"

namespace vgkern {

namespace {

constexpr int64_t kRun = 1024;  // rows that one thread takes at a time

struct Sums {
  Counts counts;
  double loss = 0;
};

}  // namespace

static std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    const Tensor& logp,        // [B, T]
    const Tensor& advantages,  // [B, T]
    const Tensor& row_weight,  // [B, T], 0 where masked
    const OptTensor& old_logp, const OptTensor& ref_logp, const OptTensor& sampler_logp,  // [B, T]
    const OptTensor& entropy,                                                             // [B, T]
    c10::List<double> knobs,
    const OptTensor& segments) {  // [S + 1] int64: the sequences, instead of the rows of [B, T]
  const Objective o(knobs);
  const int64_t total = logp.numel(), width = logp.size(1);
  const int64_t* ends = nullptr;
  if (segments && !o.row_local()) {
    const int64_t* e = ends = i64_rows(*segments, segments->numel(), "segments");
    TORCH_CHECK(segments->numel() > 0 && e[0] == 0 && e[segments->numel() - 1] == total &&
                    std::is_sorted(e, e + segments->numel()),
                "vgkern: segments must rise from 0 to ", total);
  }
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
  // Rows of one sequence, or any run of rows where sequences have nothing in common. The runs do
  // not depend on the threads, and their sums are added in order: the same bits on every machine.
  const int64_t run = o.row_local() ? kRun : ends ? total / segments->numel() + 1 : width;
  const int64_t runs = ends ? segments->numel() - 1 : run ? (total + run - 1) / run : 0;
  std::vector<Sums> sums(runs);
  at::parallel_for(0, runs, std::max<int64_t>(kRun / std::max<int64_t>(run, 1), 1),
                   [&](int64_t from, int64_t to) {
                     for (int64_t k = from; k < to; ++k) {
                       Sums n;
                       const int64_t s = ends ? ends[k] : k * run;
                       const int64_t end = ends ? ends[k + 1] : std::min(s + run, total);
                       Sequence seq;
                       if (!o.row_local()) {
                         double length = 0, ratio = 0, mismatch = 0;
                         for (int64_t i = s; i < end; ++i)
                           if (w[i] != 0.f) {
                             length += 1;
                             ratio += ratio_part(token(i), o);
                             mismatch += mismatch_part(token(i), o);
                           }
                         seq = sequence_of(length, ratio, mismatch, o);
                       }
                       double pending = 0;  // slope in the log-ratio of the sequence
                       for (int64_t i = s; i < end; ++i) {
                         if (w[i] == 0.f) continue;
                         n.counts.tokens += 1;
                         if (!o.always_active() && adv[i] == 0.f) continue;
                         n.counts.active += 1;
                         const TokenLoss t = token_loss(token(i), seq, o);
                         n.counts.add(token(i), t);
                         const double value =
                             t.value - (ent ? double(o.entropy_coef) * ent[i] : 0.0);
                         n.loss += w[i] * value;
                         dl[i] = w[i] * seen(value, t.slope);
                         pending += double(w[i]) * t.sequence_slope;
                         if (ent) {
                           de[i] = -w[i] * o.entropy_coef;
                           n.counts.entropy += ent[i];
                         }
                       }
                       if (pending != 0.0)
                         for (int64_t i = s; i < end; ++i)
                           if (w[i] != 0.f) dl[i] += float(pending * ratio_share(token(i), seq, o));
                       sums[k] = n;
                     }
                   });
  Sums all;
  for (const Sums& n : sums) {
    all.loss += n.loss;
    all.counts.merge(n.counts);
  }
  all.counts.write(counts.data_ptr<float>());
  return {at::full({}, all.loss, f32), dlogp, dent, counts};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) { m.impl("policy_loss_fwd", &policy_loss_fwd); }

}  // namespace vgkern
