#include "linear.h"

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
  Head head(hidden, weight, bias, temperature, softcap);
  const OptTensor none;
  const Costates costates(head, dx, embedding, seed, expected ? none : sequence,
                          expected ? none : position, tau, none);
  const int64_t* token = i64_rows(tokens, head.n, "tokens");
  std::vector<int64_t> live;
  for (int64_t i = 0; i < head.n; ++i)
    if (costates.live(i)) live.push_back(i);
  bool flags[3] = {needs[0], needs[1], needs[2]};
  Grads grads(head, flags);
  if (grads.any()) {
    LinearRows run(head, token, live, nullptr, &costates);
    run.run(&grads, [](Chunk& k, float* c, float* e) {
      std::fill_n(c, k.count, 0.f);
      std::fill_n(e, k.count, 0.f);
    });
  }
  auto [dh, dw, db] = grads.finish(head, bias, true);
  return {
      dh, dw, db,
      needs[3] ? embedding_grad(embedding, token, dx, live) : at::empty({0}, embedding.options())};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) { m.impl("noisy_embedding_bwd", &noisy_embedding_bwd); }

}  // namespace vgkern
