#include "block.h"

#include <cstring>
#include <mutex>

#include "linear_space.h"

namespace vgkern {

int64_t block_rows(int64_t rows, int64_t v, int64_t blocks) {
  const int64_t most = (int64_t(150) << 20) / (4 * v * blocks);
  const int64_t c = std::max<int64_t>(std::min<int64_t>(most, 512) / 32 * 32, 32);
  const int64_t chunks = std::max<int64_t>((rows + c - 1) / c, 1);  // equal chunks
  return std::max<int64_t>((rows + chunks - 1) / chunks, 1);
}

// The buffers of the linear ops, kept between calls: page faults of a fresh block would land inside
// the first GEMM. One process-wide set; a second thread that comes in meanwhile works on its own.
static LinearSpace& shared_space() {
  static LinearSpace* s = new LinearSpace;  // never destroyed: threads may outlive statics
  return *s;
}

static std::mutex& shared_busy() {
  static std::mutex* m = new std::mutex;
  return *m;
}

HeldSpace take_space() {
  return HeldSpace(shared_busy().try_lock() ? &shared_space() : new LinearSpace);
}

void ReturnSpace::operator()(LinearSpace* s) const {
  if (s == &shared_space())
    shared_busy().unlock();
  else
    delete s;
}

void pack_rows(Dtype t, bool pairs, const void* rows, int64_t ld, int64_t c, int64_t h,
               float* out) {
  const GemmKernels& g = gemm();
  const int64_t size = t == kF32 ? 4 : 2;
  at::parallel_for(0, (c + g.rows - 1) / g.rows, 4, [&](int64_t from, int64_t to) {
    const int64_t i = from * g.rows, n = std::min(to * g.rows, c) - i;
    g.pack(t, pairs, static_cast<const char*>(rows) + i * ld * size, ld, n, h,
           out + i * (pairs ? (h + 1) / 2 : h));
  });
}

void block_logits(const Head& head, bool pairs, int64_t v0, int64_t n, const float* panels,
                  int64_t c, float* out) {
  const GemmKernels& g = gemm();
  at::parallel_for(0, (n + g.lanes - 1) / g.lanes, 1, [&](int64_t from, int64_t to) {
    thread_local std::vector<float> space;
    float* s = room(space, g.lanes * (head.h + 16));
    for (int64_t b = from; b < to; ++b) {
      const int64_t j = b * g.lanes;
      g.block(head.dtype, pairs, row_ptr(head.weight, v0 + j), head.weight.stride(0),
              std::min(g.lanes, n - j), panels, c, head.h, out + j, n, s);
    }
  });
}

Tensor head_tile(const Head& head, int64_t v0, int64_t n, std::vector<float>& space) {
  if (head.dtype == kF32) return head.weight.narrow(0, v0, n);
  float* w = room(space, n * head.h);
  for_rows(n, [&](int64_t i) {
    rows().widen(head.dtype, row_ptr(head.weight, v0 + i), w + i * head.h, head.h);
  });
  return block_view(w, n, head.h);
}

Tensor view16(uint16_t* p, int64_t n, int64_t m) {
  return at::from_blob(p, {n, m}, at::TensorOptions().dtype(at::kBFloat16));
}

void backward16(const Head& head, const Tensor& dz, int64_t v0, const Tensor& hidden, float* dh,
                bool first_tile, Grads& g) {
  auto accumulate = [](const Tensor& part, float* to, bool first) {
    const int64_t m = part.size(1);
    for_rows(part.size(0), [&](int64_t i) {
      float wide[512];
      for (int64_t j = 0; j < m; j += 512) {
        const int64_t n = std::min<int64_t>(512, m - j);
        const char* from = row_ptr(part, i) + 2 * j;
        if (first) {
          rows().widen(kBF16, from, to + i * m + j, n);
        } else {
          rows().widen(kBF16, from, wide, n);
          rows().add(to + i * m + j, wide, n);
        }
      }
    });
  };
  const int64_t n = dz.size(1);
  if (g.need[0]) accumulate(at::mm(dz, head.weight.narrow(0, v0, n)), dh, first_tile);
  if (g.need[1])
    accumulate(at::mm(dz.narrow(0, 0, hidden.size(0)).t(), hidden),
               g.dweight.data_ptr<float>() + v0 * head.h, g.first);
}

HeadBlock::HeadBlock(const Head& head, int64_t chunk)
    : head_(head), chunk_(chunk), pairs_(head.dtype == kBF16 && gemm().bf16) {
  if (pairs_)
    hidden16_.resize(chunk * head.h);
  else
    wide_.resize(chunk * head.h);
  if (gemm().lanes) panels_.resize(gemm().panel_floats(chunk, head.h));
}

void HeadBlock::logits(const int64_t* at, int64_t count, float* out) {
  rows_ = at;
  count_ = count;
  const int64_t h = head_.h;
  for_rows(count, [&](int64_t i) {
    const char* row = row_ptr(head_.hidden, at[i]);
    if (pairs_)
      std::memcpy(hidden16_.data() + i * h, row, 2 * h);
    else
      rows().widen(head_.dtype, row, wide_.data() + i * h, h);
  });
  hidden_ = pairs_ ? view16(hidden16_.data(), count, h) : block_view(wide_.data(), count, h);
  if (gemm().lanes) {
    pack_rows(pairs_ ? kBF16 : kF32, pairs_, hidden_.const_data_ptr(), h, count, h, panels_.data());
    block_logits(head_, pairs_, 0, head_.v, panels_.data(), count, out);
    return;
  }
  const int64_t tile = tile_columns(count, head_.v);
  for (int64_t v0 = 0; v0 < head_.v; v0 += tile) {
    const int64_t n = std::min(tile, head_.v - v0);
    Tensor z = at::from_blob(out + v0, {count, n}, {head_.v, 1}, hidden_.options());
    at::mm_out(z, hidden_, head_tile(head_, v0, n, weight_).t());
  }
}

void HeadBlock::backward(float* dlogits, Grads& g) {
  const int64_t h = head_.h, v = head_.v;
  Tensor dz = block_view(dlogits, count_, v);
  Tensor dh = g.need[0] ? at::empty({count_, h}, dz.options()) : Tensor();
  if (pairs_) {
    const int64_t tile = tile_columns(count_, v);
    uint16_t* half = room(dz16_, count_ * tile);
    for (int64_t v0 = 0; v0 < v; v0 += tile) {
      const int64_t n = std::min(tile, v - v0);
      for_rows(count_,
               [&](int64_t i) { rows().narrow(kBF16, dlogits + i * v + v0, half + i * n, n); });
      backward16(head_, view16(half, count_, n), v0, hidden_,
                 g.need[0] ? dh.data_ptr<float>() : nullptr, v0 == 0, g);
    }
  } else if (g.need[0]) {
    const int64_t tile = head_.dtype == kF32 ? v : tile_columns(count_, v);
    for (int64_t v0 = 0; v0 < v; v0 += tile) {
      const int64_t n = std::min(tile, v - v0);
      Tensor w = head_tile(head_, v0, n, weight_), part = dz.narrow(1, v0, n);
      if (v0 == 0)
        at::mm_out(dh, part, w);
      else
        at::addmm_out(dh, dh, part, w);
    }
  }
  if (g.need[0])
    for_rows(count_, [&](int64_t i) {
      std::memcpy(g.dhidden.data_ptr<float>() + rows_[i] * h, row_ptr(dh, i), sizeof(float) * h);
    });
  if (g.need[1] && !pairs_) {
    if (g.first)
      at::mm_out(g.dweight, dz.t(), hidden_);
    else
      at::addmm_out(g.dweight, g.dweight, dz.t(), hidden_);
  }
  if (g.need[2]) {
    float* db = g.dbias.data_ptr<float>();
    at::parallel_for(0, v, 1024, [&](int64_t a, int64_t b) {
      for (int64_t i = 0; i < count_; ++i) rows().add(db + a, dlogits + i * v + a, b - a);
    });
  }
  g.first = false;
}

}  // namespace vgkern
