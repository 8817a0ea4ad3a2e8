// The chunk driver behind linear_token_logprobs and linear_policy_loss. GEMMs are the vendor's.
#include <cstring>
#include <numeric>

#include "linear_space.h"
#include "sparse.h"

namespace vgkern {

namespace {

// A vendor GEMM sums a row in another order where there are only a few: there are never a few.
constexpr int64_t kMinRows = 16;

// Rows per block: about 512 keep the GEMMs at their rate; fewer where they make the block stay in
// the last cache (12 MiB), or where it would be huge (148 MiB bound the footprint).
int64_t chunk_rows(int64_t rows, int64_t v) {
  const int64_t hot = (int64_t(12) << 20) / (4 * v), most = (int64_t(148) << 20) / (4 * v);
  int64_t c = hot >= 384 ? std::min<int64_t>(hot, 512) : std::min<int64_t>(most, 448);
  c = std::max<int64_t>(c / 64 * 64, 64);
  const int64_t chunks = std::max<int64_t>((8 * rows + 9 * c - 1) / (9 * c), 1);  // equal chunks
  return std::max<int64_t>((rows + chunks - 1) / chunks, 1);
}

}  // namespace

int64_t tile_columns(int64_t rows, int64_t v) {
  if (v <= 8192) return v;
  return rows > 128 ? 4096 : 8192;
}

Head::Head(const Tensor& hid, const Tensor& w, const OptTensor& bias, double temperature,
           double softcap)
    : hidden(hid), weight(w), n(hid.size(0)), h(hid.size(1)), v(w.size(0)), dtype(dtype_of(hid)) {
  TORCH_CHECK(w.dim() == 2 && hid.dim() == 2 && w.size(1) == h && dtype_of(w) == dtype,
              "vgkern: hidden [N, H] and weight [V, H] of one dtype");
  TORCH_CHECK((h == 1 || hid.stride(1) == 1) && (h == 1 || w.stride(1) == 1),
              "vgkern: unit column stride");
  if (bias) {
    TORCH_CHECK(bias->numel() == v, "vgkern: bias [V]");
    bias32 = bias->to(at::kFloat).contiguous();
    transform.bias = bias32.const_data_ptr<float>();
  }
  transform.inv_temperature = float(1.0 / temperature);
  transform.softcap = float(softcap);
}

Grads::Grads(const Head& head, c10::ArrayRef<bool> needs) {
  TORCH_CHECK(needs.size() == 3, "vgkern: needs has three flags");
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  for (int i = 0; i < 3; ++i) need[i] = needs[i];
  if (need[0]) dhidden = at::empty({head.n, head.h}, f32);
  if (need[1]) dweight = at::empty({head.v, head.h}, f32);
  if (need[2]) dbias = at::zeros({head.v}, f32);
}

std::tuple<Tensor, Tensor, Tensor> Grads::finish(const Head& head, const OptTensor& bias,
                                                 bool as_input, bool fp32_dhidden) {
  if (need[1] && first) dweight.zero_();
  auto out = [&](bool needed, const Tensor& t, at::ScalarType dtype) {
    if (!needed) return at::empty({0}, head.hidden.options().dtype(as_input ? dtype : at::kFloat));
    return as_input ? t.to(dtype) : t;
  };
  const auto dtype = head.hidden.scalar_type();
  return {out(need[0], dhidden, fp32_dhidden ? at::kFloat : dtype), out(need[1], dweight, dtype),
          out(need[2], dbias, bias ? bias->scalar_type() : dtype)};
}

LinearRows::LinearRows(const Head& head, const int64_t* targets, std::vector<int64_t> active,
                       const PerRow* per_row, const Costates* costates, Sparse* sparse)
    : head_(head), targets_(targets), active_(std::move(active)), per_row_(per_row),
      costates_(costates), sparse_(sparse) {
  const int64_t r = int64_t(active_.size());
  dense_ = r == head.n;
  pairs_ = head.dtype == kBF16 && gemm().bf16;
  // u is a second block; most of its cost is another pass of GEMMs, which want their 512 rows
  chunk_ = std::max(chunk_rows(r, costates ? 3 * head.v / 2 : head.v), kMinRows);
  tile_ = tile_columns(chunk_, head.v);
  tiles_ = (head.v + tile_ - 1) / tile_;
  space_ = take_space();
}

LinearRows::~LinearRows() = default;

Tensor LinearRows::weight_tile(int64_t t) {
  return head_tile(head_, t * tile_, std::min(tile_, head_.v - t * tile_), space_->weight);
}

void LinearRows::gather(const Chunk& k) {
  const GemmKernels& g = gemm();
  if (pairs_) {
    uint16_t* h = room(space_->hidden16, chunk_ * head_.h);
    for_rows(k.count, [&](int64_t i) {
      std::memcpy(h + i * head_.h, row_ptr(head_.hidden, k.rows[i]), 2 * head_.h);
    });
    pack_rows(kBF16, true, h, head_.h, k.count, head_.h,
              room(space_->panels, g.panel_floats(chunk_, head_.h)));
    hidden_ = view16(h, k.count, head_.h);
    return;
  }
  widen_rows(k);
  if (g.lanes)
    pack_rows(kF32, false, hidden_.const_data_ptr(), hidden_.stride(0), k.count, head_.h,
              room(space_->panels, g.panel_floats(chunk_, head_.h)));
}

void LinearRows::widen_rows(const Chunk& k) {
  if (dense_ && head_.dtype == kF32) {
    hidden_ = head_.hidden.narrow(0, k.rows[0], k.count);
    return;
  }
  float* h = room(space_->hidden, chunk_ * head_.h);
  for_rows(k.count, [&](int64_t i) {
    rows().widen(head_.dtype, row_ptr(head_.hidden, k.rows[i]), h + i * head_.h, head_.h);
  });
  hidden_ = block_view(h, k.count, head_.h);
}

Transform LinearRows::transform_of(int64_t row) const {
  Transform t = head_.transform;
  if (per_row_) t.inv_temperature = per_row_->inverse(row);
  return t;
}

void LinearRows::logits(const Chunk& k, int64_t t, bool statistics) {
  const int64_t v0 = t * tile_, n = std::min(tile_, head_.v - v0);
  float* block = space_->block.data() + t * chunk_ * tile_;
  if (gemm().lanes) {
    block_logits(head_, pairs_, v0, n, space_->panels.data(), k.count, block);
  } else {
    Tensor out = block_view(block, k.count, n);
    at::mm_out(out, hidden_, weight_tile(t).t());
  }
  for_rows(k.count, [&](int64_t i) {
    float* z = block + i * n;
    const Transform tr = transform_of(k.rows[i]);
    if (!tr.plain()) rows().transform(z, n, v0, tr);
    if (!statistics) return;
    const int64_t y = targets_[k.rows[i]] - v0;
    rows().stats(z, n, y >= 0 && y < n ? y : -1, space_->states[i]);
  });
}

// Statistics of whole rows, and the cut ids to -inf. (`logits` left the rows in tiles.)
void LinearRows::score(const Chunk& k) {
  const int64_t v = head_.v;
  for_rows(k.count, [&](int64_t i) {
    thread_local std::vector<float> whole;
    thread_local Kept kept;
    float* z = space_->block.data() + i * v;
    auto tiles = [&](const auto& copy) {
      for (int64_t t = 0; tiles_ > 1 && t < tiles_; ++t) {
        const int64_t n = std::min(tile_, v - t * tile_);
        copy(space_->block.data() + t * chunk_ * tile_ + i * n, z + t * tile_, n * sizeof(float));
      }
    };
    if (tiles_ > 1) {
      z = room(whole, v);
      tiles([](const float* tile, float* row, size_t n) { std::memcpy(row, tile, n); });
    }
    const int64_t row = k.rows[i], y = targets_[row];
    if (per_row_->greedy(row)) {
      k.stats[i] = greedy_score(z, v, y);
      return;
    }
    const Cut limits = per_row_->cut(row);
    const bool cut = limits.any();
    if (cut && !truncate(z, v, limits, kept)) {
      k.stats[i] = finish(sums(z, v, y));  // NaN
      return;
    }
    k.stats[i] = row_score(z, v, y, cut ? &kept : nullptr);
    if (cut) tiles([](float* tile, const float* row, size_t n) { std::memcpy(tile, row, n); });
  });
}

void LinearRows::run(Grads* grads, const std::function<void(Chunk&, float*, float*)>& use,
                     bool known) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (grads && grads->need[0] && !dense_) grads->dhidden.zero_();
  room(space_->block, tiles_ * chunk_ * tile_);
  room(space_->stats, chunk_);
  room(space_->states, chunk_);
  float* c = room(space_->c, chunk_);
  float* e = room(space_->e, chunk_);
  const int64_t total = int64_t(active_.size());
  for (int64_t at = 0; at < total; at += chunk_) {
    Chunk k{active_.data() + at, std::min(chunk_, total - at), space_->stats.data()};
    gather(k);
    std::fill_n(space_->states.begin(), k.count, fresh());
    const bool online = !known && !per_row_;
    if (costates_) gather_costates(k);
    for (int64_t t = 0; t < tiles_; ++t) {
      logits(k, t, online);
      if (costates_) pull(t);
    }
    for (int64_t i = 0; online && i < k.count; ++i)
      k.stats[i] = finish(space_->states[i], targets_[k.rows[i]] == head_.v);
    if (per_row_) score(k);
    use(k, c, e);
    if (costates_) third_term(k);
    if (grads && grads->any()) backward(k, c, e, *grads);
  }
}

void LinearRows::add_bias(const float* block, int64_t live, int64_t v0, int64_t n, Grads& g) {
  if (!g.need[2]) return;
  float* db = g.dbias.data_ptr<float>() + v0;
  at::parallel_for(0, n, 1024, [&](int64_t a, int64_t b) {
    for (int64_t d = 0; d < live; ++d) rows().add(db + a, block + d * n + a, b - a);
  });
}

void LinearRows::backward(const Chunk& k, const float* c, const float* e, Grads& g) {
  const int64_t h = head_.h;
  // Live rows first: a dead row's slot takes the last live row. Slots at or past `live` are only
  // ever read, so rows can move while the gradient is written in place.
  int64_t* source = room(space_->source, chunk_);
  int64_t live = k.count;
  auto scored = [&](int64_t i) { return (c[i] != 0.f || e[i] != 0.f) && !blocked(k.stats[i]); };
  auto bad = [&](const Chunk& all) {  // 0 times NaN: a row that was left out would come back
    return std::any_of(all.stats, all.stats + all.count,
                       [](const RowStats& r) { return !std::isfinite(r.lse); });
  };
  auto dead = [&](int64_t i) { return !scored(i) && !(costates_ && space_->slot[i] >= 0); };
  for (int64_t d = 0; d < live; ++d) {
    source[d] = d;
    if (!dead(d)) continue;
    while (live > d + 1 && dead(live - 1)) --live;
    source[d] = --live;
  }
  if (live && live < k.count && (k.count - live) * head_.v <= 32 * k.count && !bad(k)) {
    // So few that moving the others (bandwidth) costs more than the products of rows of zeros.
    live = k.count;
    std::iota(source, source + live, int64_t(0));
  }
  if (g.need[0] && dense_ && live < k.count)
    for (int64_t i = 0; i < k.count; ++i)
      if (dead(i)) std::memset(g.dhidden.data_ptr<float>() + k.rows[i] * h, 0, sizeof(float) * h);
  if (!live) return;
  if (live < k.count && pairs_) {  // the hidden rows move along
    uint16_t* own = space_->hidden16.data();
    for (int64_t d = 0; d < live; ++d)
      if (source[d] != d) std::memcpy(own + d * h, own + source[d] * h, 2 * h);
    hidden_ = view16(own, live, h);
  } else if (live < k.count) {
    if (dense_ && head_.dtype == kF32) {
      float* own = room(space_->hidden, chunk_ * h);
      for_rows(live, [&](int64_t d) {
        std::memcpy(own + d * h, row_ptr(hidden_, source[d]), sizeof(float) * h);
      });
      hidden_ = block_view(own, live, h);
    } else {
      float* own = space_->hidden.data();
      for (int64_t d = 0; d < live; ++d)
        if (source[d] != d) std::memcpy(own + d * h, own + source[d] * h, sizeof(float) * h);
      hidden_ = block_view(own, live, h);
    }
  }
  RowGrad* coef = room(space_->coef, chunk_);
  for (int64_t d = 0; d < live; ++d)
    coef[d] =
        row_grad(c[source[d]], e[source[d]], k.stats[source[d]], transform_of(k.rows[source[d]]));
  const int64_t height = std::max(live, kMinRows);
  const bool direct = dense_ && live == k.count && height == live;
  uint16_t* dz16 = pairs_ ? room(space_->dz16, chunk_ * tile_) : nullptr;
  Tensor dh;
  if (g.need[0])
    dh = direct ? g.dhidden.narrow(0, k.rows[0], live)
                : block_view(room(space_->dhidden, chunk_ * h), height, h);
  auto tile = [&](int64_t t) { return space_->block.data() + t * chunk_ * tile_; };
  auto differentiate = [&](int64_t t, uint16_t* half) {  // z becomes dz
    const int64_t v0 = t * tile_, n = std::min(tile_, head_.v - v0);
    float* block = tile(t);
    for_rows(live, [&](int64_t d) {
      const Transform tr = transform_of(k.rows[source[d]]);
      const float* z = block + source[d] * n;
      const RowStats& r = k.stats[source[d]];
      const int64_t y = targets_[k.rows[source[d]]] - v0;
      const bool own = scored(source[d]), here = own && y >= 0 && y < n;
      const float zy = here ? z[y] : 0.f;
      float* dz = block + d * n;
      if (own)
        rows().grad(z, dz, n, r.lse, coef[d].a, coef[d].b, tr);
      else
        std::fill_n(dz, n, 0.f);
      if (here) dz[y] = target_grad(coef[d], zy, tr);
      if (const float* third = pulled_row(source[d], t, n)) rows().add(dz, third, n);
      if (half) rows().narrow(kBF16, dz, half + d * n, n);
    });
  };
  auto multiply = [&](int64_t t) {
    const int64_t v0 = t * tile_, n = std::min(tile_, head_.v - v0);
    float* block = tile(t);
    std::fill(block + live * n, block + height * n, 0.f);
    if (pairs_) {
      std::fill(dz16 + live * n, dz16 + height * n, uint16_t(0));
      backward16(head_, view16(dz16, height, n), v0, hidden_,
                 g.need[0] ? dh.data_ptr<float>() : nullptr, t == 0, g);
      return;
    }
    Tensor dz = block_view(block, live, n);
    if (g.need[0]) {
      Tensor w = weight_tile(t), padded = block_view(block, height, n);
      if (t == 0)
        at::mm_out(dh, padded, w);
      else
        at::addmm_out(dh, dh, padded, w);
    }
    if (g.need[1]) {
      Tensor dw = g.dweight.narrow(0, v0, n);
      if (g.first)
        at::mm_out(dw, dz.t(), hidden_);
      else
        at::addmm_out(dw, dw, dz.t(), hidden_);
    }
  };
  auto bias = [&](int64_t t) {
    const int64_t v0 = t * tile_;
    add_bias(tile(t), live, v0, std::min(tile_, head_.v - v0), g);
  };
  bool done = false;
  if (sparse_ && (g.need[0] || g.need[1])) {
    float* lean = room(space_->lean, chunk_);
    for (int64_t d = 0; d < live; ++d) lean[d] = coef[d].a - 12 * coef[d].b < 0.f ? -1.f : 1.f;
    for (int64_t t = 0; t < tiles_; ++t) differentiate(t, nullptr), bias(t);
    if (g.need[1] && g.first) g.dweight.zero_();
    g.first = false;
    done = sparse_->chunk(space_->block.data(), chunk_ * tile_, tile_, live, lean, hidden_,
                          g.need[0] ? &dh : nullptr, g.need[1] ? &g.dweight : nullptr);
    for (int64_t t = 0; !done && t < tiles_; ++t) {
      const int64_t n = std::min(tile_, head_.v - t * tile_);
      if (pairs_)
        for_rows(live, [&](int64_t d) { rows().narrow(kBF16, tile(t) + d * n, dz16 + d * n, n); });
      multiply(t);
    }
    if (!done && g.need[0]) sparse_->dense(dh.narrow(0, 0, live));
  } else {
    for (int64_t t = 0; t < tiles_; ++t) differentiate(t, dz16), multiply(t), bias(t);
  }
  g.first = false;
  if (g.need[0] && !direct)
    for_rows(live, [&](int64_t d) {
      std::memcpy(g.dhidden.data_ptr<float>() + k.rows[source[d]] * h, row_ptr(dh, d),
                  sizeof(float) * h);
    });
}

}  // namespace vgkern
