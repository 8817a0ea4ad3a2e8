#include <numeric>

#include "linear.h"

namespace vgkern {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 64;  // rows per block when a truncation needs whole rows

struct Cut {
  int64_t top_k;
  double top_p, min_p;
  bool any() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
};

// Sets what the truncation drops to -inf; ties go to the lowest id.
void truncate(float* z, int64_t v, const Cut& cut) {
  for (int64_t j = 0; j < v; ++j)
    if (std::isnan(z[j])) return;  // left for the race to report; NaN has no order
  std::vector<int64_t> id(v);
  std::iota(id.begin(), id.end(), 0);
  auto before = [z](int64_t a, int64_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); };
  int64_t kept = v;
  if (cut.top_k > 0 && cut.top_k < v) {
    kept = cut.top_k;
    std::nth_element(id.begin(), id.begin() + kept - 1, id.end(), before);
  }
  const int64_t best = *std::min_element(id.begin(), id.begin() + kept, before);
  const float top = z[best];
  if (cut.top_p < 1.0) {
    double total = 0;
    for (int64_t i = 0; i < kept; ++i) total += std::exp(z[id[i]] - top);
    double mass = 0;  // of the sorted prefix; the prefix grows until it holds top_p
    int64_t sorted = 0, n = 0;
    bool done = false;
    for (int64_t grow = 64; !done && sorted < kept; grow *= 4) {
      const int64_t to = std::min(kept, sorted + grow);
      std::nth_element(id.begin() + sorted, id.begin() + to - 1, id.begin() + kept, before);
      std::sort(id.begin() + sorted, id.begin() + to, before);
      for (; n < to; ++n) {
        if (mass / total >= cut.top_p && n > 0) {
          done = true;
          break;
        }
        mass += std::exp(z[id[n]] - top);
      }
      sorted = to;
    }
    kept = n;
  }
  std::vector<char> keep(v, 0);
  for (int64_t i = 0; i < kept; ++i)
    keep[id[i]] = id[i] == best || cut.min_p <= 0.0 || std::exp(z[id[i]] - top) >= cut.min_p;
  for (int64_t j = 0; j < v; ++j)
    if (!keep[j]) z[j] = -kInf;
}

}  // namespace

static std::tuple<Tensor, Tensor, Tensor> linear_sample_fwd(
    const Tensor& hidden,       // [B, H]
    const Tensor& weight,       // [V, H]
    const OptTensor& bias,      // [V]
    int64_t seed,               // two's complement of the 64-bit seed
    const Tensor& sequence,     // [B]
    const Tensor& position,     // [B]
    const Tensor& temperature,  // [B], 0: greedy
    double softcap, int64_t top_k, double top_p, double min_p) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Head head(hidden, weight, bias, 1.0, softcap);
  const Cut cut{top_k, top_p, min_p};
  const int64_t b = head.n, v = head.v;
  const int64_t *seq = i64_rows(sequence, b, "sequence"), *pos = i64_rows(position, b, "position");
  const float* temp = f32_rows(temperature, b, "temperature");
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  Tensor token = at::zeros({b}, at::TensorOptions().dtype(at::kLong));
  Tensor logp = at::zeros({b}, f32), entropy = at::zeros({b}, f32);
  const int64_t rows_at_once = std::min<int64_t>(std::max<int64_t>(b, 1), cut.any() ? kRows : 512);
  const int64_t tile = cut.any() ? v : tile_columns(rows_at_once, v);
  std::vector<float> block(rows_at_once * tile), wide, hid, panels;
  const GemmKernels& g = gemm();
  const bool pairs = head.dtype == kBF16 && g.bf16;
  std::vector<RaceState> state(rows_at_once);
  for (int64_t r0 = 0; r0 < b; r0 += rows_at_once) {
    const int64_t n = std::min(rows_at_once, b - r0);
    Tensor h = head.hidden.narrow(0, r0, n);
    if (g.lanes) {
      panels.resize(g.panel_floats(n, head.h));
      g.pack(head.dtype, pairs, h.const_data_ptr(), h.stride(0), n, head.h, panels.data());
    } else if (head.dtype != kF32) {
      hid.resize(n * head.h);
      for_rows(n, [&](int64_t i) {
        rows().widen(head.dtype, row_ptr(h, i), hid.data() + i * head.h, head.h);
      });
      h = at::from_blob(hid.data(), {n, head.h}, f32);
    }
    std::fill_n(state.begin(), n, RaceState{-kInf, 0.f, 0.f, -kInf, -kInf, -1});
    for (int64_t v0 = 0; v0 < v; v0 += tile) {
      const int64_t m = std::min(tile, v - v0);
      if (g.lanes) {
        block_logits(head, pairs, v0, m, panels.data(), n, block.data());
      } else {
        for (int64_t s = 0; s < m; s += 8192) {  // whole rows, but never a whole widened head
          const int64_t w = std::min<int64_t>(8192, m - s);
          Tensor z = at::from_blob(block.data() + s, {n, w}, {m, 1}, f32);
          at::mm_out(z, h, head_tile(head, v0 + s, w, wide).t());
        }
      }
      for_rows(n, [&](int64_t i) {
        float* x = block.data() + i * m;
        const int64_t row = r0 + i;
        Transform t = head.transform;
        t.inv_temperature = temp[row] == 0.f ? 1.f : 1.f / temp[row];
        if (!t.plain()) rows().transform(x, m, v0, t);
        if (cut.any() && temp[row] != 0.f) truncate(x, m, cut);
        const uint64_t s = uint64_t(seq[row]);
        const RaceKey key{uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32),
                          uint32_t(pos[row]),       uint32_t(s),
                          uint32_t(s >> 32),        temp[row] == 0.f};
        rows().race(x, m, v0, key, state[i]);
      });
    }
    for (int64_t i = 0; i < n; ++i) {
      const RaceState& s = state[i];
      const bool greedy = temp[r0 + i] == 0.f;
      const bool bad = std::isnan(s.sum) || std::isnan(s.max) || s.best_id < 0;
      token.data_ptr<int64_t>()[r0 + i] = std::max<int64_t>(s.best_id, 0);
      const float nan = std::numeric_limits<float>::quiet_NaN();
      logp.data_ptr<float>()[r0 + i] =
          bad ? nan : (greedy ? 0.f : (s.best_z - s.max) - std::log(s.sum));
      entropy.data_ptr<float>()[r0 + i] =
          bad ? nan : (greedy ? 0.f : std::log(s.sum) - s.dot / s.sum);
    }
  }
  return {token, logp, entropy};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) { m.impl("linear_sample_fwd", &linear_sample_fwd); }

}  // namespace vgkern
