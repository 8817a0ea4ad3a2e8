#include "recurrence.h"

namespace vgkern {

static void check(const Tensor& x, const Tensor& log_std, const char* name) {
  TORCH_CHECK(x.dim() == 2 && x.sizes() == log_std.sizes(), "vgkern: ", name,
              " must be [N, n], as log_std");
}

static std::tuple<Tensor, Tensor> gaussian_action_fwd(const Tensor& mean,     // [N, n]
                                                      const Tensor& log_std,  // [N, n]
                                                      int64_t seed,
                                                      const Tensor& sequence,    // [N]
                                                      const Tensor& position) {  // [N]
  check(mean, log_std, "mean");
  const int64_t rows_n = mean.size(0), n = mean.size(1);
  const int64_t* seq = i64_rows(sequence, rows_n, "sequence");
  const int64_t* pos = i64_rows(position, rows_n, "position");
  Tensor action = at::empty({rows_n, n}, mean.options());
  Tensor logp = at::empty({rows_n}, mean.options().dtype(at::kFloat));
  const States mu(mean), ls(log_std), out(action);
  float* lp = logp.data_ptr<float>();
  at::parallel_for(0, rows_n, 16, [&](int64_t from, int64_t to) {
    std::vector<float> m(n), l(n), e(n);
    for (int64_t i = from; i < to; ++i) {
      mu.read(i, 0, n, m.data());
      ls.read(i, 0, n, l.data());
      normal_row(NoiseRow(seed, seq[i], pos[i]), n, e.data());
      double sum = 0;  // one rounding, whatever n
      for (int64_t j = 0; j < n; ++j) {
        sum -= 0.5 * e[j] * e[j] + l[j];
        m[j] += std::exp(l[j]) * e[j];
      }
      out.write(i, 0, n, m.data());
      lp[i] = float(sum - 0.9189385332046727 * double(n));
    }
  });
  return {action, logp};
}

static std::tuple<Tensor, Tensor> gaussian_action_bwd(const Tensor& daction,  // [N, n]
                                                      const Tensor& dlogp,    // [N]
                                                      const Tensor& log_std,  // [N, n]
                                                      int64_t seed, const Tensor& sequence,
                                                      const Tensor& position) {
  check(daction, log_std, "daction");
  const int64_t rows_n = log_std.size(0), n = log_std.size(1);
  const int64_t* seq = i64_rows(sequence, rows_n, "sequence");
  const int64_t* pos = i64_rows(position, rows_n, "position");
  const Tensor dlogp1 = dlogp.contiguous();
  const float* dlp = f32_rows(dlogp1, rows_n, "dlogp");
  Tensor dmean = at::empty({rows_n, n}, log_std.options());
  Tensor dlog_std = at::empty({rows_n, n}, log_std.options());
  const States da(daction), ls(log_std), dm(dmean), dl(dlog_std);
  at::parallel_for(0, rows_n, 16, [&](int64_t from, int64_t to) {
    std::vector<float> a(n), l(n), e(n);
    for (int64_t i = from; i < to; ++i) {
      da.read(i, 0, n, a.data());
      ls.read(i, 0, n, l.data());
      normal_row(NoiseRow(seed, seq[i], pos[i]), n, e.data());
      for (int64_t j = 0; j < n; ++j) {
        const float sigma = std::exp(l[j]), up = a[j];
        a[j] = up + dlp[i] * e[j] / sigma;
        l[j] = up * sigma * e[j] + dlp[i] * (e[j] * e[j] - 1.f);
      }
      dm.write(i, 0, n, a.data());
      dl.write(i, 0, n, l.data());
    }
  });
  return {dmean, dlog_std};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) {
  m.impl("gaussian_action_fwd", &gaussian_action_fwd);
  m.impl("gaussian_action_bwd", &gaussian_action_bwd);
}

}  // namespace vgkern
