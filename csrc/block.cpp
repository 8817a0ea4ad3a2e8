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

HeadBlock::HeadBlock(const Head& head, int64_t chunk) : head_(head), chunk_(chunk) {
  wide_.resize(chunk * head.h);
  if (gemm().lanes) panels_.resize(gemm().panel_floats(chunk, head.h));
}

void HeadBlock::logits(const int64_t* at, int64_t count, float* out) {
  rows_ = at;
  count_ = count;
  for_rows(count, [&](int64_t i) {
    rows().widen(head_.dtype, row_ptr(head_.hidden, at[i]), wide_.data() + i * head_.h, head_.h);
  });
  hidden_ = block_view(wide_.data(), count, head_.h);
  const GemmKernels& g = gemm();
  if (g.lanes) {
    pack_rows(kF32, false, wide_.data(), head_.h, count, head_.h, panels_.data());
    block_logits(head_, false, 0, head_.v, panels_.data(), count, out);
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
  if (g.need[0]) {
    Tensor dh = at::empty({count_, h}, hidden_.options());
    const int64_t tile = head_.dtype == kF32 ? v : tile_columns(count_, v);
    for (int64_t v0 = 0; v0 < v; v0 += tile) {
      const int64_t n = std::min(tile, v - v0);
      Tensor w = head_tile(head_, v0, n, weight_), part = dz.narrow(1, v0, n);
      if (v0 == 0)
        at::mm_out(dh, part, w);
      else
        at::addmm_out(dh, dh, part, w);
    }
    for_rows(count_, [&](int64_t i) {
      std::memcpy(g.dhidden.data_ptr<float>() + rows_[i] * h, row_ptr(dh, i), sizeof(float) * h);
    });
  }
  if (g.need[1]) {
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
