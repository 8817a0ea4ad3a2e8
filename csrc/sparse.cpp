#include "sparse.h"

#include <cstring>
#include <numeric>

#include "linear_space.h"

namespace vgkern {

namespace {

constexpr int64_t kChoose = 4, kCertify = 8, kProbes = kChoose + kCertify;
constexpr double kMargin = 0.85;  // of the tolerance: what the choosing probes may be off by
// Shares of the columns that are tried; past the last the dense products are no slower.
constexpr double kShares[] = {1. / 64, 1. / 32, 1. / 16, 3. / 32, 1. / 8,  5. / 32,
                              3. / 16, 1. / 4,  5. / 16, 3. / 8,  7. / 16, 1. / 2};
constexpr int64_t kSteps = sizeof(kShares) / sizeof(*kShares), kBuckets = kSteps + 1;

// Random signs [h, kProbes], the same in every call: a fixed hash of the index.
Tensor signs(int64_t h) {
  Tensor r = at::empty({h, kProbes}, at::TensorOptions().dtype(at::kFloat));
  float* p = r.data_ptr<float>();
  for (int64_t i = 0; i < r.numel(); ++i) {
    uint64_t x = uint64_t(i + 1) * 0x9E3779B97F4A7C15ull;  // splitmix64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    p[i] = (x ^ (x >> 31)) & 1 ? 1.f : -1.f;
  }
  return r;
}

double squares(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(x[i]) * x[i];
  return sum;
}

int64_t columns(int64_t step, int64_t v) { return int64_t(std::ceil(kShares[step] * double(v))); }

}  // namespace

Sparse::Sparse(const Head& head, double tolerance, bool pairs)
    : head_(head), tolerance_(tolerance), pairs_(pairs), probes_(signs(head.h)) {
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  head_probes_ = at::empty({head.v, kProbes}, f32);
  std::vector<float> wide;
  const int64_t tile = tile_columns(512, head.v);
  for (int64_t v0 = 0; v0 < head.v; v0 += tile) {
    const int64_t n = std::min(tile, head.v - v0);
    Tensor out = head_probes_.narrow(0, v0, n);
    at::mm_out(out, head_tile(head, v0, n, wide), probes_);
  }
  dw_error_ = at::zeros({head.v, kCertify}, f32);
  dw_total_ = at::zeros({head.v, kCertify}, f32);
}

// |dz|^2 and the leaning sum of every column over the rows; the columns' order by the first.
void Sparse::measure(const float* block, int64_t stride, int64_t tile, int64_t live,
                     const float* lean) {
  const int64_t v = head_.v;
  float *norm = room(norm_, v), *sum = room(lean_, v);
  std::fill_n(norm, v, 0.f);
  std::fill_n(sum, v, 0.f);
  constexpr int64_t kBlock = 512;
  for_rows((v + kBlock - 1) / kBlock, [&](int64_t b) {
    for (int64_t j = b * kBlock, end = std::min(j + kBlock, v); j < end;) {
      const int64_t t = j / tile, n = std::min(tile, v - t * tile), at = j - t * tile;
      const int64_t m = std::min(end - j, n - at);
      for (int64_t d = 0; d < live; ++d) {
        const float* x = block + t * stride + d * n + at;
        const float s = lean[d];
        for (int64_t i = 0; i < m; ++i) {
          norm[j + i] += x[i] * x[i];
          sum[j + i] += s * x[i];
        }
      }
      j += m;
    }
  });
  // floats >= 0 sort as their bits do; ties by id
  std::vector<uint64_t> keys(v);
  for (int64_t j = 0; j < v; ++j) {
    uint32_t bits;
    std::memcpy(&bits, norm + j, sizeof bits);
    keys[j] = (uint64_t(~bits) << 32) | uint64_t(j);
  }
  std::sort(keys.begin(), keys.end());
  int32_t *order = room(order_, v), *rank = room(rank_, v);
  for (int64_t j = 0; j < v; ++j) {
    order[j] = int32_t(uint32_t(keys[j]));
    rank[order[j]] = int32_t(j);
  }
}

Tensor Sparse::head_rows(const int64_t* ids, int64_t n) {
  const int64_t h = head_.h;
  if (pairs_) {
    uint16_t* w = room(rows16_, n * h);
    for_rows(n, [&](int64_t i) { std::memcpy(w + i * h, row_ptr(head_.weight, ids[i]), 2 * h); });
    return at::from_blob(w, {n, h}, at::TensorOptions().dtype(at::kBFloat16));
  }
  float* w = room(rows_, n * h);
  for_rows(n, [&](int64_t i) {
    rows().widen(head_.dtype, row_ptr(head_.weight, ids[i]), w + i * h, h);
  });
  return block_view(w, n, h);
}

bool Sparse::chunk(const float* block, int64_t stride, int64_t tile, int64_t live,
                   const float* lean, const Tensor& hidden, Tensor* dh, Tensor* dweight) {
  const int64_t v = head_.v, h = head_.h, tiles = (v + tile - 1) / tile;
  measure(block, stride, tile, live, lean);
  int64_t bound[kSteps];
  for (int64_t s = 0; s < kSteps; ++s) bound[s] = columns(s, v);
  auto bucket = [&](int64_t id) {
    return std::upper_bound(bound, bound + kSteps, int64_t(rank_[id])) - bound;
  };
  auto f32 = at::TensorOptions().dtype(at::kFloat);
  auto dz_tile = [&](int64_t t) {
    const int64_t n = std::min(tile, v - t * tile);
    return at::from_blob(const_cast<float*>(block + t * stride), {live, n}, f32);
  };
  const float* wr = head_probes_.const_data_ptr<float>();

  // What each bucket of columns gives: to dh R (and to the sum of a row), to dW R.
  constexpr int64_t kWide = kChoose + 1;
  Tensor mine = at::zeros({live, kBuckets * kWide}, f32), spread = at::empty({0}, f32);
  double leaning[kBuckets][kWide] = {};  // b^T W R, and the sum of b
  double dw_part[kBuckets] = {};
  Tensor dw_probe = at::empty({v, kProbes}, f32), hr;
  if (dweight) hr = at::mm(hidden.to(at::kFloat), probes_);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t v0 = t * tile, n = std::min(tile, v - v0);
    Tensor dz = dz_tile(t);
    if (dh) {
      spread = at::zeros({n, kBuckets * kWide}, f32);
      float* m = spread.data_ptr<float>();
      for (int64_t j = 0; j < n; ++j) {
        const int64_t k = bucket(v0 + j);
        float* to = m + (j * kBuckets + k) * kWide;
        std::memcpy(to, wr + (v0 + j) * kProbes, kChoose * sizeof(float));
        to[kChoose] = 1.f;
        for (int64_t q = 0; q < kWide; ++q) leaning[k][q] += double(lean_[v0 + j]) * to[q];
      }
      at::addmm_out(mine, mine, dz, spread);
    }
    if (dweight) {
      Tensor out = dw_probe.narrow(0, v0, n);
      at::mm_out(out, dz.t(), hr);
      const float* g = out.const_data_ptr<float>();
      for (int64_t j = 0; j < n; ++j) dw_part[bucket(v0 + j)] += squares(g + j * kProbes, kChoose);
    }
  }

  // The fewest columns that will do, of each product.
  int64_t pick_h = dh ? kSteps : 0, pick_w = dweight ? kSteps : 0;
  const double good = kMargin * tolerance_ * kMargin * tolerance_;
  if (dh) {
    const float* p = mine.const_data_ptr<float>();
    double total = 0;
    std::vector<double> tail(live * kWide, 0.);
    for (int64_t i = 0; i < live; ++i) {
      for (int64_t q = 0; q < kChoose; ++q) {
        double all = 0;
        for (int64_t k = 0; k < kBuckets; ++k) all += p[(i * kBuckets + k) * kWide + q];
        total += all * all;
      }
    }
    double share[kWide] = {};
    for (int64_t s = kSteps - 1; s >= 0; --s) {  // the tail past step s, from the far end
      double error = 0;
      for (int64_t q = 0; q < kWide; ++q) share[q] += leaning[s + 1][q];
      for (int64_t i = 0; i < live; ++i) {
        double* x = tail.data() + i * kWide;
        for (int64_t q = 0; q < kWide; ++q) x[q] += p[(i * kBuckets + s + 1) * kWide + q];
        for (int64_t q = 0; q < kChoose; ++q) {
          const double along = share[kChoose] == 0 ? 0 : x[kChoose] * share[q] / share[kChoose];
          error += (x[q] - along) * (x[q] - along);
        }
      }
      if (!(error <= good * total)) break;
      pick_h = s;
    }
  }
  if (dweight) {
    double total = 0, tail = 0;
    for (double part : dw_part) total += part;
    for (int64_t s = kSteps - 1; s >= 0; --s) {
      tail += dw_part[s + 1];
      if (!(tail <= good * total)) break;
      pick_w = s;
    }
  }
  const bool dense = pick_h == kSteps || pick_w == kSteps;
  const int64_t u_h = dense ? v
                      : dh  ? bound[pick_h]
                            : 0,
                u_w = dense     ? v
                      : dweight ? bound[pick_w]
                                : 0;
  live_ += double(live);
  columns_h_ += double(live) * double(u_h);
  columns_w_ += double(live) * double(u_w);
  if (dweight) {
    const float* g = dw_probe.const_data_ptr<float>();
    float *total = dw_total_.data_ptr<float>(), *error = dw_error_.data_ptr<float>();
    for_rows(v, [&](int64_t j) {
      for (int64_t q = 0; q < kCertify; ++q) {
        const float x = g[j * kProbes + kChoose + q];
        total[j * kCertify + q] += x;
        if (rank_[j] >= u_w) error[j * kCertify + q] += x;
      }
    });
  }
  if (dense) return false;

  // The columns of the narrower product first, each part by id: reads and writes move forward.
  const int64_t few = std::min(u_h, u_w), most = std::max(u_h, u_w);
  std::vector<int64_t> ids(order_.begin(), order_.begin() + most);
  std::sort(ids.begin(), ids.begin() + few);
  std::sort(ids.begin() + few, ids.end());
  float* kept = pairs_ ? nullptr : room(gathered_, live * most);
  uint16_t* kept16 = pairs_ ? room(gathered16_, live * most) : nullptr;
  for_rows(live, [&](int64_t i) {
    thread_local std::vector<float> row;
    float* to = pairs_ ? room(row, most) : kept + i * most;
    for (int64_t j = 0; j < most; ++j) {
      const int64_t t = ids[j] / tile, n = std::min(tile, v - t * tile);
      to[j] = block[t * stride + i * n + ids[j] - t * tile];
    }
    if (pairs_) rows().narrow(kBF16, to, kept16 + i * most, most);
  });
  Tensor dz = pairs_ ? at::from_blob(kept16, {live, most}, at::TensorOptions().dtype(at::kBFloat16))
                     : block_view(kept, live, most);

  if (dweight) {
    Tensor part = at::mm(dz.narrow(1, 0, u_w).t(), hidden);
    float* dw = dweight->data_ptr<float>();
    for_rows(u_w, [&](int64_t j) {
      float wide[256];
      for (int64_t k = 0; k < h; k += 256) {
        const int64_t m = std::min<int64_t>(256, h - k);
        rows().widen(pairs_ ? kBF16 : kF32, row_ptr(part, j) + k * part.element_size(), wide, m);
        rows().add(dw + ids[j] * h + k, wide, m);
      }
    });
  }
  if (dh) {
    Tensor out = at::mm(dz.narrow(1, 0, u_h), head_rows(ids.data(), u_h)).to(at::kFloat);
    // a b^T W, and what the certifying probes see of the tail without it
    Tensor tail = at::zeros({live, kWide + kCertify}, f32), b = at::empty({1, v}, f32);
    double sum = 0;
    float* bp = b.data_ptr<float>();
    for (int64_t j = 0; j < v; ++j) {
      bp[j] = rank_[j] >= u_h ? lean_[j] : 0.f;
      sum += bp[j];
    }
    Tensor past = at::empty({v, kCertify + 1}, f32);
    float* pp = past.data_ptr<float>();
    for_rows(v, [&](int64_t j) {
      const bool in = rank_[j] >= u_h;
      for (int64_t q = 0; q < kCertify; ++q)
        pp[j * (kCertify + 1) + q] = in ? wr[j * kProbes + kChoose + q] : 0.f;
      pp[j * (kCertify + 1) + kCertify] = in ? 1.f : 0.f;
    });
    Tensor seen = at::zeros({live, kCertify + 1}, f32), bw = at::zeros({1, h}, f32);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t v0 = t * tile, n = std::min(tile, v - v0);
      at::addmm_out(seen, seen, dz_tile(t), past.narrow(0, v0, n));
      std::vector<float>& wide = rows_;
      at::addmm_out(bw, bw, b.narrow(1, v0, n), head_tile(head_, v0, n, wide));
    }
    Tensor br = at::mm(b, past);
    const float *s = seen.const_data_ptr<float>(), *r = br.const_data_ptr<float>();
    const float *w = bw.const_data_ptr<float>(), *from = out.const_data_ptr<float>();
    float* to = dh->data_ptr<float>();
    std::vector<double> error(live), total(live);
    for_rows(live, [&](int64_t i) {
      const float* x = s + i * (kCertify + 1);
      const float a = sum == 0 ? 0.f : float(x[kCertify] / sum);
      for (int64_t k = 0; k < h; ++k) to[i * h + k] = from[i * h + k] + a * w[k];
      for (int64_t q = 0; q < kCertify; ++q) {
        const double d = double(x[q]) - double(a) * r[q];
        error[i] += d * d / kCertify;
      }
      total[i] = squares(to + i * h, h);
    });
    dh_error_ += std::accumulate(error.begin(), error.end(), 0.);
    dh_total_ += std::accumulate(total.begin(), total.end(), 0.);
  }
  return true;
}

void Sparse::dense(const Tensor& dh) {
  dh_total_ += squares(dh.const_data_ptr<float>(), dh.numel());
}

Tensor Sparse::report() const {
  auto ratio = [](double a, double b) { return b == 0 ? 0. : std::sqrt(a / b); };
  auto sum = [](const Tensor& t) { return squares(t.const_data_ptr<float>(), t.numel()); };
  const double n = std::max(live_ * double(head_.v), 1.);
  Tensor out = at::empty({4}, at::TensorOptions().dtype(at::kFloat));
  float* p = out.data_ptr<float>();
  p[0] = float(columns_h_ / n);
  p[1] = float(columns_w_ / n);
  p[2] = float(ratio(dh_error_, dh_total_));
  p[3] = float(ratio(sum(dw_error_), sum(dw_total_)));
  return out;
}

}  // namespace vgkern
