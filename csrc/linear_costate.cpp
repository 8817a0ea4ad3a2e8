// The costates that arrive through the sampled tokens, in the chunk driver: u = E costate tile by
// tile beside the logits, then the softmax of the perturbed row and the third term in place of u.
#include <cstring>

#include "linear_space.h"

namespace vgkern {

extern const CostateKernels costate_base;
#ifdef VG_HAVE_V3
extern const CostateKernels costate_v3;
#endif
#ifdef VG_HAVE_V4
extern const CostateKernels costate_v4;
#endif

const CostateKernels& costate_kernels() {
#ifdef VG_HAVE_V4
  if (!std::strcmp(rows().isa, "v4")) return costate_v4;
#endif
#ifdef VG_HAVE_V3
  if (!std::strcmp(rows().isa, "v3")) return costate_v3;
#endif
  return costate_base;
}

Costates::Costates(const Head& head, const Tensor& value, const Tensor& embedding, int64_t seed,
                   const OptTensor& sequence, const OptTensor& position, double tau,
                   const OptTensor& scale)
    : table(value, embedding, std::nullopt, 1.0, 0.0), inv_tau(sequence ? float(1.0 / tau) : 1.f),
      seed_(uint64_t(seed)), live_(head.n) {
  TORCH_CHECK(table.n == head.n && table.v == head.v, "vgkern: rows or vocabularies differ");
  TORCH_CHECK(sequence.has_value() == position.has_value(), "vgkern: sequence and position");
  if (sequence) {
    sequence_ = i64_rows(*sequence, head.n, "sequence");
    position_ = i64_rows(*position, head.n, "position");
  }
  if (scale) {
    many_scales_ = scale->dim() == 1;
    scale_ = f32_rows(*scale, many_scales_ ? head.n : 1, "costate_scale");
  }
  for_rows(head.n, [&](int64_t i) {
    thread_local std::vector<float> row;
    row.resize(table.h);
    rows().widen(table.dtype, row_ptr(value, i), row.data(), table.h);
    live_[i] = std::any_of(row.begin(), row.end(), [](float x) { return x != 0.f; });
  });
}

std::optional<Costates> Costates::given(const Head& head, const OptTensor& value,
                                        const OptTensor& embedding, int64_t seed,
                                        const OptTensor& sequence, const OptTensor& position,
                                        double tau, const OptTensor& scale) {
  if (!value) return std::nullopt;
  TORCH_CHECK(embedding, "vgkern: a costate needs its embedding");
  return std::make_optional<Costates>(head, *value, *embedding, seed, sequence, position, tau,
                                      scale);
}

RaceKey Costates::key(int64_t row) const {
  const uint64_t s = uint64_t(sequence_[row]);
  return {uint32_t(seed_), uint32_t(seed_ >> 32), uint32_t(position_[row]),
          uint32_t(s),     uint32_t(s >> 32),     false};
}

// The chunk's rows with a costate, packed for the GEMM of u.
void LinearRows::gather_costates(const Chunk& k) {
  const Head& table = costates_->table;
  const GemmKernels& g = gemm();
  const bool pairs = table.dtype == kBF16 && g.bf16;
  space_->slot.assign(k.count, -1);
  space_->pulled.clear();
  for (int64_t i = 0; i < k.count; ++i)
    if (costates_->live(k.rows[i])) {
      space_->slot[i] = int64_t(space_->pulled.size());
      space_->pulled.push_back(i);
    }
  const int64_t n = int64_t(space_->pulled.size()), h = table.h;
  if (!n) return;
  room(space_->u, tiles_ * chunk_ * tile_);
  float* wide = room(space_->value, chunk_ * h);
  // bf16 pairs keep their 16 bits in the front half of the room
  const Dtype as = pairs ? kBF16 : kF32;
  for_rows(n, [&](int64_t i) {
    const char* from = row_ptr(table.hidden, k.rows[space_->pulled[i]]);
    if (pairs)
      std::memcpy(reinterpret_cast<uint16_t*>(wide) + i * h, from, 2 * h);
    else
      rows().widen(table.dtype, from, wide + i * h, h);
  });
  if (g.lanes)
    pack_rows(as, pairs, wide, h, n, h, room(space_->value_panels, g.panel_floats(chunk_, h)));
}

void LinearRows::pull(int64_t t) {
  const Head& table = costates_->table;
  const int64_t rows_here = int64_t(space_->pulled.size());
  if (!rows_here) return;
  const int64_t v0 = t * tile_, n = std::min(tile_, head_.v - v0);
  float* u = space_->u.data() + t * chunk_ * tile_;
  if (gemm().lanes) {
    block_logits(table, table.dtype == kBF16 && gemm().bf16, v0, n, space_->value_panels.data(),
                 rows_here, u);
    return;
  }
  Tensor out = block_view(u, rows_here, n);
  at::mm_out(out, block_view(space_->value.data(), rows_here, table.h),
             head_tile(table, v0, n, space_->weight).t());
}

// The third term of block row i in tile t of n columns, or null.
const float* LinearRows::pulled_row(int64_t i, int64_t t, int64_t n) const {
  if (!costates_ || space_->slot[i] < 0) return nullptr;
  return space_->u.data() + t * chunk_ * tile_ + space_->slot[i] * n;
}

// u becomes the third term of the logits' gradient, the slope of the transform included.
void LinearRows::third_term(const Chunk& k) {
  const CostateKernels& g = costate_kernels();
  const float inv_tau = costates_->inv_tau, inf = std::numeric_limits<float>::infinity();
  for_rows(int64_t(space_->pulled.size()), [&](int64_t at) {
    thread_local std::vector<float> whole;
    float* w = room(whole, head_.v);
    const int64_t i = space_->pulled[at];
    const bool noisy = !costates_->expected();
    const RaceKey key = noisy ? costates_->key(k.rows[i]) : RaceKey{};
    const Transform tr = transform_of(k.rows[i]);
    auto tiles = [&](const auto& f) {  // f(z, u, w, columns, first column)
      for (int64_t t = 0; t < tiles_; ++t) {
        const int64_t v0 = t * tile_, n = std::min(tile_, head_.v - v0), to = t * chunk_ * tile_;
        f(space_->block.data() + to + i * n, space_->u.data() + to + at * n, w + v0, n, v0);
      }
    };
    Weighed s;
    float top = k.stats[i].lse;
    if (noisy && inv_tau != 1.f) {
      top = -inf;
      tiles([&](const float* z, float*, float* x, int64_t n, int64_t v0) {
        const float most = g.perturb(z, x, n, v0, key, inv_tau);
        top = std::isnan(most) || most > top ? most : top;
      });
      tiles([&](const float*, float* u, float* x, int64_t n, int64_t v0) {
        g.weigh(x, u, x, n, v0, nullptr, top, s);
      });
    } else {
      tiles([&](const float* z, float* u, float* x, int64_t n, int64_t v0) {
        g.weigh(z, u, x, n, v0, noisy ? &key : nullptr, top, s);
      });
    }
    const bool none = top == -inf;  // every id is blocked
    const float scale = costates_->scale(k.rows[i]) * inv_tau * tr.inv_temperature / s.sum;
    tiles([&](const float* z, float* u, float* x, int64_t n, int64_t) {
      if (none)
        std::fill_n(u, n, 0.f);
      else
        g.pulled(z, u, x, n, scale, s.base, s.dot / s.sum, tr);
    });
  });
}

}  // namespace vgkern
