#include "common.h"

namespace vgkern {

namespace {

constexpr int64_t kTile = 4096;  // fp32 columns that stay in L1

Transform transform_of(double temperature, double softcap) {
  Transform t;
  t.inv_temperature = float(1.0 / temperature);
  t.softcap = float(softcap);
  return t;
}

// columns v0 .. v0 + n of row i, as z
void load_tile(const Tensor& logits, int64_t i, int64_t v0, int64_t n, const Transform& t,
               float* z) {
  rows().widen(dtype_of(logits), row_ptr(logits, i) + v0 * logits.element_size(), z, n);
  if (!t.plain()) rows().transform(z, n, v0, t);
}

}  // namespace

static std::tuple<Tensor, Tensor, Tensor> token_logprobs_fwd(const Tensor& logits,   // [N, V]
                                                             const Tensor& targets,  // [N]
                                                             double temperature, double softcap,
                                                             int64_t ignore_index) {
  const int64_t n = logits.size(0), v = logits.size(1);
  TORCH_CHECK(v <= 1 || logits.stride(1) == 1, "vgkern: unit column stride");
  Tensor tgt = targets.contiguous();
  const int64_t* y = i64_rows(tgt, n, "targets");
  const Transform t = transform_of(temperature, softcap);
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  Tensor logp = at::zeros({n}, f32), ent = at::zeros({n}, f32), lse = at::zeros({n}, f32);
  at::parallel_for(0, n, 1, [&](int64_t from, int64_t to) {
    std::vector<float> z(std::min(kTile, v));
    for (int64_t i = from; i < to; ++i) {
      if (y[i] == ignore_index) continue;
      if (no_id(y[i], v)) {
        constexpr float nan = std::numeric_limits<float>::quiet_NaN();
        logp.data_ptr<float>()[i] = ent.data_ptr<float>()[i] = lse.data_ptr<float>()[i] = nan;
        continue;
      }
      RowState s = fresh();
      for (int64_t v0 = 0; v0 < v; v0 += kTile) {
        const int64_t m = std::min(kTile, v - v0), at = y[i] - v0;
        load_tile(logits, i, v0, m, t, z.data());
        rows().stats(z.data(), m, at >= 0 && at < m ? at : -1, s);
      }
      const RowStats r = finish(s, y[i] == v);
      logp.data_ptr<float>()[i] = r.logp;
      ent.data_ptr<float>()[i] = r.entropy;
      lse.data_ptr<float>()[i] = r.lse;
    }
  });
  return {logp, ent, lse};
}

static Tensor token_logprobs_bwd(const Tensor& logits,   // [N, V]
                                 const Tensor& targets,  // [N]
                                 const Tensor& logp, const Tensor& entropy, const Tensor& lse,
                                 const Tensor& dlogp, const Tensor& dentropy,  // [N]
                                 double temperature, double softcap, int64_t ignore_index) {
  const int64_t n = logits.size(0), v = logits.size(1);
  Tensor tgt = targets.contiguous();
  const int64_t* y = i64_rows(tgt, n, "targets");
  const float *lp = f32_rows(logp, n, "logp"), *en = f32_rows(entropy, n, "entropy");
  const float *ls = f32_rows(lse, n, "lse"), *dl = f32_rows(dlogp, n, "dlogp");
  const float* de = f32_rows(dentropy, n, "dentropy");
  const Transform t = transform_of(temperature, softcap);
  Tensor out = at::empty(logits.sizes(), logits.options());
  const Dtype dtype = dtype_of(logits);
  at::parallel_for(0, n, 1, [&](int64_t from, int64_t to) {
    std::vector<float> z(std::min(kTile, v));
    for (int64_t i = from; i < to; ++i) {
      char* d = static_cast<char*>(out.data_ptr()) + i * v * out.element_size();
      const bool dead = y[i] == ignore_index || no_id(y[i], v) || (dl[i] == 0.f && de[i] == 0.f) ||
                        blocked({lp[i], en[i], ls[i]});
      if (dead) {
        std::fill_n(d, v * out.element_size(), 0);
        continue;
      }
      const RowGrad g = row_grad(dl[i], de[i], {lp[i], en[i], ls[i]}, t);
      for (int64_t v0 = 0; v0 < v; v0 += kTile) {
        const int64_t m = std::min(kTile, v - v0), at = y[i] - v0;
        load_tile(logits, i, v0, m, t, z.data());
        const bool here = at >= 0 && at < m;
        const float zy = here ? z[at] : 0.f;
        rows().grad(z.data(), z.data(), m, ls[i], g.a, g.b, t);
        if (here) z[at] = target_grad(g, zy, t);
        rows().narrow(dtype, z.data(), d + v0 * out.element_size(), m);
      }
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) {
  m.impl("token_logprobs_fwd", &token_logprobs_fwd);
  m.impl("token_logprobs_bwd", &token_logprobs_bwd);
}

}  // namespace vgkern
