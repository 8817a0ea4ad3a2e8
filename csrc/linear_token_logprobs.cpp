#include "linear.h"

namespace vgkern {

namespace {

// Rows to look at: not ignored, with an id (to `last`), and `wanted`; NaN goes to `missing`.
template <class F>
std::vector<int64_t> rows_with_id(const int64_t* y, int64_t n, int64_t last, int64_t ignore_index,
                                  std::initializer_list<Tensor> missing, const F& wanted) {
  std::vector<int64_t> active;
  for (int64_t i = 0; i < n; ++i) {
    if (y[i] == ignore_index) continue;
    if (no_id(y[i], last)) {
      for (const Tensor& t : missing)
        t.data_ptr<float>()[i] = std::numeric_limits<float>::quiet_NaN();
    } else if (wanted(i)) {
      active.push_back(i);
    }
  }
  return active;
}

bool any_row(int64_t) { return true; }

}  // namespace

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
  LinearRows run(head, y, rows_with_id(y, head.n, head.v, ignore_index, {logp, ent, lse}, any_row));
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
    const Tensor& logp,  // [N], like the next two of the whole vocabulary where weight is a shard
    const Tensor& entropy,   // [N]
    const Tensor& lse,       // [N]
    const Tensor& dlogp,     // [N]
    const Tensor& dentropy,  // [N]
    double temperature, double softcap, int64_t ignore_index, c10::List<bool> needs,
    bool fp32_dhidden, int64_t seed, double tau,
    const OptTensor& costate,                              // [N, He]
    const OptTensor& embedding,                            // [V, He]
    const OptTensor& sequence, const OptTensor& position,  // [N]; none: relaxation "expected"
    const OptTensor& costate_scale) {
  Head head(hidden, weight, bias, temperature, softcap);
  Tensor tgt = targets.contiguous();
  const int64_t* y = i64_rows(tgt, head.n, "targets");
  const float *lp = f32_rows(logp, head.n, "logp"), *en = f32_rows(entropy, head.n, "entropy");
  const float* ls = f32_rows(lse, head.n, "lse");
  const float *dl = f32_rows(dlogp, head.n, "dlogp"), *de = f32_rows(dentropy, head.n, "dentropy");
  bool flags[3] = {needs[0], needs[1], needs[2]};
  Grads grads(head, flags);
  const auto costates =
      Costates::given(head, costate, embedding, seed, sequence, position, tau, costate_scale);
  auto wanted = [&](int64_t i) {
    const bool scored = (dl[i] != 0.f || de[i] != 0.f) && !blocked({lp[i], en[i], ls[i]});
    return scored || (costates && costates->live(i));
  };
  LinearRows run(head, y, rows_with_id(y, head.n, head.v, ignore_index, {}, wanted), nullptr,
                 costates ? &*costates : nullptr);
  auto use = [&](Chunk& k, float* c, float* e) {
    for (int64_t i = 0; i < k.count; ++i) {
      const int64_t r = k.rows[i];
      k.stats[i] = {lp[r], en[r], ls[r]};
      c[i] = dl[r];
      e[i] = de[r];
    }
  };
  run.run(&grads, use, true);
  return grads.finish(head, bias, true, fp32_dhidden);
}

static std::tuple<Tensor, Tensor> linear_truncated_logprobs_fwd(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets,
    double softcap, int64_t ignore_index, double temperature, int64_t top_k, double top_p,
    double min_p, const OptTensor& temperatures,  // [N], 0: greedy
    const OptTensor& top_ks, const OptTensor& top_ps, const OptTensor& min_ps) {
  Head head(hidden, weight, bias, 1.0, softcap);
  Tensor tgt = targets.contiguous();
  const int64_t* y = i64_rows(tgt, head.n, "targets");
  const PerRow per_row(head.n, head.v, temperature, top_k, top_p, min_p, temperatures, top_ks,
                       top_ps, min_ps);
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  Tensor logp = at::zeros({head.n}, f32), ent = at::zeros({head.n}, f32);
  LinearRows run(head, y, rows_with_id(y, head.n, head.v - 1, ignore_index, {logp, ent}, any_row),
                 &per_row);
  run.run(nullptr, [&](Chunk& k, float*, float*) {
    for (int64_t i = 0; i < k.count; ++i) {
      logp.data_ptr<float>()[k.rows[i]] = k.stats[i].logp;
      ent.data_ptr<float>()[k.rows[i]] = k.stats[i].entropy;
    }
  });
  return {logp, ent};
}

static std::tuple<Tensor, Tensor, Tensor> linear_truncated_logprobs_bwd(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets,
    const Tensor& dlogp,     // [N]
    const Tensor& dentropy,  // [N]
    double softcap, int64_t ignore_index, double temperature, int64_t top_k, double top_p,
    double min_p, const OptTensor& temperatures,  // [N], 0: greedy
    const OptTensor& top_ks, const OptTensor& top_ps, const OptTensor& min_ps,
    c10::List<bool> needs) {
  Head head(hidden, weight, bias, 1.0, softcap);
  Tensor tgt = targets.contiguous();
  const int64_t* y = i64_rows(tgt, head.n, "targets");
  const float *dl = f32_rows(dlogp, head.n, "dlogp"), *de = f32_rows(dentropy, head.n, "dentropy");
  const PerRow per_row(head.n, head.v, temperature, top_k, top_p, min_p, temperatures, top_ks,
                       top_ps, min_ps);
  bool flags[3] = {needs[0], needs[1], needs[2]};
  Grads grads(head, flags);
  auto wanted = [&](int64_t i) { return (dl[i] != 0.f || de[i] != 0.f) && !per_row.greedy(i); };
  LinearRows run(head, y, rows_with_id(y, head.n, head.v - 1, ignore_index, {}, wanted), &per_row);
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
  m.impl("linear_truncated_logprobs_fwd", &linear_truncated_logprobs_fwd);
  m.impl("linear_truncated_logprobs_bwd", &linear_truncated_logprobs_bwd);
}

}  // namespace vgkern
