#include "block.h"
#include "linear_space.h"

namespace vgkern {

namespace {

// Statistics of a whole row, the most likely id kept apart as if it were the target.
RowStats whole_row(float* z, int64_t v) {
  constexpr float low = -std::numeric_limits<float>::infinity();
  RaceState first{low, 0.f, 0.f, low, low, -1};
  rows().race(z, v, 0, RaceKey{.greedy = true}, first);
  RowState s = fresh();
  rows().stats(z, v, std::max<int64_t>(first.best_id, 0), s);
  return finish(s);
}

// of the soft-cap, from its value z; 0 where an id is blocked
void slope(const float* z, float* out, int64_t v, const Transform& tr) {
  const float k = 1.f / (tr.inv_temperature * tr.softcap);
  for (int64_t j = 0; j < v; ++j) out[j] = z[j] < -3e38f ? 0.f : 1.f - (z[j] * k) * (z[j] * k);
}

std::vector<int64_t> where(const Tensor& mask, int64_t n) {
  TORCH_CHECK(mask.scalar_type() == at::kBool && mask.is_contiguous() && mask.numel() == n,
              "vgkern: row_mask must be contiguous bool [", n, "]");
  std::vector<int64_t> out;
  for (int64_t i = 0; i < n; ++i)
    if (mask.const_data_ptr<bool>()[i]) out.push_back(i);
  return out;
}

// Logits of student and teacher side by side, for the rows that are asked for.
struct Pair {
  Head student, teacher;
  int64_t chunk;
  HeldSpace space;
  float *z, *t;
  HeadBlock left, right;
  Pair(const Tensor& hidden, const Tensor& weight, const Tensor& teacher_hidden,
       const Tensor& teacher_weight, double temperature, double softcap, double teacher_softcap,
       int64_t count)
      : student(hidden, weight, std::nullopt, temperature, softcap),
        teacher(teacher_hidden, teacher_weight, std::nullopt, temperature, teacher_softcap),
        chunk(block_rows(count, student.v, 2)), space(take_space()),
        z(room(space->block, chunk * student.v)), t(room(space->u, chunk * student.v)),
        left(student, chunk), right(teacher, chunk) {
    TORCH_CHECK(student.n == teacher.n && student.v == teacher.v,
                "vgkern: rows or vocabularies differ");
  }
  // For every chunk: `row(i, z, t)` for its rows i of the caller, then `done()`.
  template <class Row, class Done>
  void run(const std::vector<int64_t>& live, const Row& row, const Done& done) {
    const int64_t total = int64_t(live.size()), v = student.v;
    for (int64_t at = 0; at < total; at += chunk) {
      const int64_t n = std::min(chunk, total - at), *r = live.data() + at;
      left.logits(r, n, z);
      right.logits(r, n, t);
      for_rows(n, [&](int64_t i) {
        float *a = z + i * v, *b = t + i * v;
        if (!student.transform.plain()) rows().transform(a, v, 0, student.transform);
        if (!teacher.transform.plain()) rows().transform(b, v, 0, teacher.transform);
        row(r[i], a, b);
      });
      done();
    }
  }
};

}  // namespace

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_divergence_fwd(
    const Tensor& hidden,          // [N, H]
    const Tensor& weight,          // [V, H]
    const Tensor& teacher_hidden,  // [N, Ht]
    const Tensor& teacher_weight,  // [V, Ht]
    const Tensor& row_mask,        // [N] bool
    double temperature, int64_t kind, double softcap, double teacher_softcap) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const std::vector<int64_t> live = where(row_mask, hidden.size(0));
  Pair pair(hidden, weight, teacher_hidden, teacher_weight, temperature, softcap, teacher_softcap,
            int64_t(live.size()));
  Tensor out[5];
  for (Tensor& t : out) t = at::zeros({pair.student.n}, at::TensorOptions().dtype(at::kFloat));
  float* to[5];
  for (int k = 0; k < 5; ++k) to[k] = out[k].data_ptr<float>();
  pair.run(
      live,
      [&](int64_t i, float* z, float* t) {
        const RowStats s = whole_row(z, pair.student.v), q = whole_row(t, pair.student.v);
        to[1][i] = s.entropy;
        to[2][i] = s.lse;
        to[3][i] = q.lse;
        rows().divergence(z, t, pair.student.v, {s.lse, q.lse, Divergence(kind)}, to[0] + i,
                          to[4] + i);
      },
      [] {});
  return {out[0], out[1], out[2], out[3], out[4]};
}

static std::tuple<Tensor, Tensor> linear_divergence_bwd(
    const Tensor& hidden, const Tensor& weight, const Tensor& teacher_hidden,
    const Tensor& teacher_weight, const Tensor& row_mask, const Tensor& divergence, const Tensor&,
    const Tensor& lse, const Tensor& teacher_lse, const Tensor&,  // means: of the rows themselves
    const Tensor& ddivergence,                                    // [N]
    const Tensor& dentropy,                                       // [N]
    double temperature, int64_t kind, double softcap, double teacher_softcap,
    c10::List<bool> needs) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = hidden.size(0);
  const float *c = f32_rows(ddivergence, n, "ddivergence"), *e = f32_rows(dentropy, n, "dentropy");
  const float *value = f32_rows(divergence, n, "divergence"), *a = f32_rows(lse, n, "lse"),
              *b = f32_rows(teacher_lse, n, "teacher_lse");
  std::vector<int64_t> live = where(row_mask, n);
  std::erase_if(live, [&](int64_t i) {
    return (c[i] == 0.f && e[i] == 0.f) || value[i] == std::numeric_limits<float>::infinity();
  });
  Pair pair(hidden, weight, teacher_hidden, teacher_weight, temperature, softcap, teacher_softcap,
            int64_t(live.size()));
  bool flags[3] = {needs[0], needs[1], false};
  Grads grads(pair.student, flags);
  if (grads.need[0]) grads.dhidden.zero_();
  if (grads.any())
    pair.run(
        live,
        [&](int64_t i, float* z, float* t) {
          const Transform& tr = pair.student.transform;
          const int64_t v = pair.student.v;
          thread_local std::vector<float> slopes;  // the gradient takes the place of z
          if (tr.softcap != 0.f) {
            slopes.resize(v);
            slope(z, slopes.data(), v, tr);
          }
          rows().divergence_grad(z, t, v, {a[i], b[i], Divergence(kind)}, c[i], e[i],
                                 tr.inv_temperature);
          for (int64_t j = 0; tr.softcap != 0.f && j < v; ++j) z[j] *= slopes[j];
        },
        [&] { pair.left.backward(pair.z, grads); });
  auto [dh, dw, db] = grads.finish(pair.student, std::nullopt, true);
  return {dh, dw};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) {
  m.impl("linear_divergence_fwd", &linear_divergence_fwd);
  m.impl("linear_divergence_bwd", &linear_divergence_bwd);
}

}  // namespace vgkern
