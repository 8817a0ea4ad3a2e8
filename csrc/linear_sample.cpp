#include "linear_space.h"

namespace vgkern {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
// The race over the columns that a truncation kept, in blocks that hold one.
void race_kept(const float* z, int64_t v, const std::vector<int64_t>& kept, const RaceKey& key,
               RaceState& s) {
  constexpr int64_t kBlock = 64;  // whole Philox blocks
  int64_t done = 0;
  for (int64_t id : kept) {
    if (id < done) continue;
    const int64_t v0 = id / kBlock * kBlock;
    done = std::min(v0 + kBlock, v);
    rows().race(z + v0, done - v0, v0, key, s);
  }
}

}  // namespace

static std::tuple<Tensor, Tensor, Tensor> linear_sample_fwd(
    const Tensor& hidden,    // [B, H]
    const Tensor& weight,    // [V, H]
    const OptTensor& bias,   // [V]
    int64_t seed,            // two's complement of the 64-bit seed
    const Tensor& sequence,  // [B]
    const Tensor& position,  // [B]
    double softcap, double temperature, int64_t top_k, double top_p, double min_p,
    const OptTensor& temperatures,  // [B], 0: greedy
    const OptTensor& top_ks, const OptTensor& top_ps, const OptTensor& min_ps) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Head head(hidden, weight, bias, 1.0, softcap);
  const int64_t b = head.n, v = head.v;
  const int64_t *seq = i64_rows(sequence, b, "sequence"), *pos = i64_rows(position, b, "position");
  const PerRow per_row(b, v, temperature, top_k, top_p, min_p, temperatures, top_ks, top_ps,
                       min_ps);
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  Tensor token = at::zeros({b}, at::TensorOptions().dtype(at::kLong));
  Tensor logp = at::zeros({b}, f32), entropy = at::zeros({b}, f32);
  // Whole rows: the winner's log-probability needs the others once more. 16 MiB, 64 rows at least.
  const int64_t most = std::clamp<int64_t>((int64_t(16) << 20) / (4 * v), 64, 512);
  const int64_t rows_at_once = std::min(std::max<int64_t>(b, 1), most);
  const HeldSpace space = take_space();
  float* block = room(space->block, rows_at_once * v);
  const GemmKernels& g = gemm();
  const bool pairs = head.dtype == kBF16 && g.bf16;
  for (int64_t r0 = 0; r0 < b; r0 += rows_at_once) {
    const int64_t n = std::min(rows_at_once, b - r0);
    Tensor h = head.hidden.narrow(0, r0, n);
    if (g.lanes) {
      pack_rows(head.dtype, pairs, h.const_data_ptr(), h.stride(0), n, head.h,
                room(space->panels, g.panel_floats(n, head.h)));
    } else if (head.dtype != kF32) {
      float* hid = room(space->hidden, n * head.h);
      for_rows(
          n, [&](int64_t i) { rows().widen(head.dtype, row_ptr(h, i), hid + i * head.h, head.h); });
      h = block_view(hid, n, head.h);
    }
    if (g.lanes) {
      block_logits(head, pairs, 0, v, space->panels.data(), n, block);
    } else {
      const int64_t tile = tile_columns(n, v);
      for (int64_t v0 = 0; v0 < v; v0 += tile) {  // never a whole widened head
        const int64_t m = std::min(tile, v - v0);
        Tensor z = at::from_blob(block + v0, {n, m}, {v, 1}, f32);
        at::mm_out(z, h, head_tile(head, v0, m, space->weight).t());
      }
    }
    for_rows(n, [&](int64_t i) {
      thread_local Kept kept;
      float* z = block + i * v;
      const int64_t row = r0 + i;
      const bool greedy = per_row.greedy(row);
      const Cut cut = per_row.cut(row);
      Transform t = head.transform;
      t.inv_temperature = per_row.inverse(row);
      if (!t.plain()) rows().transform(z, v, 0, t);
      const uint64_t s = uint64_t(seq[row]);
      const RaceKey key{uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32),
                        uint32_t(pos[row]),       uint32_t(s),
                        uint32_t(s >> 32),        greedy};
      RaceState state{-kInf, 0.f, 0.f, -kInf, -kInf, -1};
      const bool listed = cut.any() && !greedy && truncate(z, v, cut, kept);
      if (listed)
        race_kept(z, v, kept.id, key, state);
      else
        rows().race(z, v, 0, key, state);
      const bool bad = std::isnan(state.sum) || std::isnan(state.max) || state.best_id < 0;
      constexpr float nan = std::numeric_limits<float>::quiet_NaN();
      RowStats r{bad ? nan : 0.f, bad ? nan : 0.f, 0.f};
      if (!bad && !greedy) r = row_score(z, v, state.best_id, listed ? &kept : nullptr);
      token.data_ptr<int64_t>()[row] = std::max<int64_t>(state.best_id, 0);
      logp.data_ptr<float>()[row] = r.logp;
      entropy.data_ptr<float>()[row] = r.entropy;
    });
  }
  return {token, logp, entropy};
}

TORCH_LIBRARY_IMPL(vgkern, CPU, m) { m.impl("linear_sample_fwd", &linear_sample_fwd); }

}  // namespace vgkern
