#include <numeric>

#include "block.h"

namespace vgkern {

namespace {

// dE[y] += dx of the rows whose token is y, each sum in fp32 and in the order of the rows.
Tensor embedding_grad(const Tensor& embedding, const int64_t* token, const Tensor& dx,
                      std::vector<int64_t> live) {
  const int64_t v = embedding.size(0), h = embedding.size(1);
  Tensor out = at::zeros({v, h}, embedding.options());
  const Dtype dtype = dtype_of(embedding);
  std::erase_if(live, [&](int64_t i) { return token[i] < 0 || token[i] >= v; });
  std::stable_sort(live.begin(), live.end(),
                   [&](int64_t a, int64_t b) { return token[a] < token[b]; });
  std::vector<int64_t> first;
  for (int64_t i = 0; i < int64_t(live.size()); ++i)
    if (i == 0 || token[live[i]] != token[live[i - 1]]) first.push_back(i);
  first.push_back(int64_t(live.size()));
  char* to = static_cast<char*>(out.data_ptr());
  for_rows(int64_t(first.size()) - 1, [&](int64_t s) {
    thread_local std::vector<float> sum, row;
    sum.assign(h, 0.f);
    row.resize(h);
    for (int64_t i = first[s]; i < first[s + 1]; ++i) {
      rows().widen(dtype, row_ptr(dx, live[i]), row.data(), h);
      rows().add(sum.data(), row.data(), h);
    }
    rows().narrow(dtype, sum.data(), to + token[live[first[s]]] * h * out.element_size(), h);
  });
  return out;
}

std::vector<int64_t> live_rows(const Tensor& dx) {
  const int64_t n = dx.size(0), h = dx.size(1);
  std::vector<char> live(n);
  for_rows(n, [&](int64_t i) {
    thread_local std::vector<float> row;
    row.resize(h);
    rows().widen(dtype_of(dx), row_ptr(dx, i), row.data(), h);
    live[i] = std::any_of(row.begin(), row.end(), [](float x) { return x != 0.f; });
  });
  std::vector<int64_t> out;
  for (int64_t i = 0; i < n; ++i)
    if (live[i]) out.push_back(i);
  return out;
}

}  // namespace

static std::tuple<Tensor, Tensor, Tensor, Tensor> noisy_embedding_bwd(
    const Tensor& hidden,     // [N, H]
    const Tensor& weight,     // [V, H]
    const OptTensor& bias,    // [V]
    const Tensor& embedding,  // [V, He]
    const Tensor& tokens,     // [N]
    const Tensor& dx,         // [N, He]
    int64_t seed,             // two's complement of the 64-bit seed
    const Tensor& sequence,   // [N]
    const Tensor& position,   // [N]
    double tau, double temperature, double softcap, bool expected, c10::List<bool> needs) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Head head(hidden, weight, bias, temperature, softcap);
  Head table(dx, embedding, std::nullopt, 1.0, 0.0);  // u = E dx as a head's logits
  TORCH_CHECK(table.n == head.n && table.v == head.v, "vgkern: rows or vocabularies differ");
  const int64_t *seq = i64_rows(sequence, head.n, "sequence"),
                *pos = i64_rows(position, head.n, "position"),
                *token = i64_rows(tokens, head.n, "tokens");
  bool flags[3] = {needs[0], needs[1], needs[2]};
  Grads grads(head, flags);
  if (grads.need[0]) grads.dhidden.zero_();
  const std::vector<int64_t> live = live_rows(dx);
  const int64_t total = int64_t(live.size()), v = head.v, chunk = block_rows(total, v, 2);
  if (grads.any() && total) {
    auto f32 = at::TensorOptions().dtype(at::kFloat);
    Tensor z = at::empty({chunk, v}, f32), u = at::empty({chunk, v}, f32);
    HeadBlock logits(head, chunk), pulled(table, chunk);
    const float inv_tau = float(1.0 / tau), scale = inv_tau * head.transform.inv_temperature;
    for (int64_t at = 0; at < total; at += chunk) {
      const int64_t n = std::min(chunk, total - at), *r = live.data() + at;
      logits.logits(r, n, z.data_ptr<float>());
      pulled.logits(r, n, u.data_ptr<float>());
      for_rows(n, [&](int64_t i) {
        thread_local std::vector<float> space;
        space.resize(v);
        float* row = z.data_ptr<float>() + i * v;
        if (!head.transform.plain()) rows().transform(row, v, 0, head.transform);
        const uint64_t s = uint64_t(seq[r[i]]);
        const RaceKey key{uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32),
                          uint32_t(pos[r[i]]),      uint32_t(s),
                          uint32_t(s >> 32),        false};
        rows().costate(row, u.data_ptr<float>() + i * v, v, expected ? nullptr : &key, inv_tau,
                       scale, head.transform, space.data());
      });
      logits.backward(z.data_ptr<float>(), grads);
    }
  }
  auto [dh, dw, db] = grads.finish(head, bias, true);
  return {
      dh, dw, db,
      needs[3] ? embedding_grad(embedding, token, dx, live) : at::empty({0}, embedding.options())};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) { m.impl("noisy_embedding_bwd", &noisy_embedding_bwd); }

}  // namespace vgkern
