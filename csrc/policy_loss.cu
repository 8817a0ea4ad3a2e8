// The policy loss with its gradients: objective.h on a GPU. A block for each sequence, or for each
// run of tokens where the objective looks at no more than tokens; a last block adds what they sum.
#include "device.cuh"
#include "objective.h"

namespace vgkern {
namespace {

constexpr int kRun = 1024;  // tokens of a block, where sequences do not matter

// What a sequence sums over its tokens.
struct SequenceSums {
  double length = 0, ratio = 0, mismatch = 0;
  VG_DEVICE void merge(const SequenceSums& o) {
    length += o.length;
    ratio += o.ratio;
    mismatch += o.mismatch;
  }
};

// COUNTS of vgkern.ops.policy_loss, then the loss.
enum Tallied {
  kTokens,
  kActive,
  kLow,
  kHigh,
  kDual,
  kKl,
  kEntropy,
  kRatio,
  kRatioMin,
  kRatioMax,
  kClamps,
  kGap,
  kLoss
};

struct Tally {
  double of[kTally];
  double pending;  // slope in the log-ratio of the sequence
  VG_DEVICE void clear() {
#pragma unroll
    for (int k = 0; k < kTally; ++k) of[k] = 0;
    of[kRatioMin] = kInf;
    of[kRatioMax] = -kInf;
    pending = 0;
  }
  VG_DEVICE void merge(const Tally& o) {
#pragma unroll
    for (int k = 0; k < kTally; ++k) {
      if (k == kRatioMin)
        of[k] = lesser(o.of[k], of[k]);
      else if (k == kRatioMax || k == kGap)
        of[k] = greater(o.of[k], of[k]);
      else
        of[k] += o.of[k];
    }
    pending += o.pending;
  }
  VG_DEVICE void add(const Token& t, const TokenLoss& l) {
    of[kActive] += 1;
    of[kLow] += l.low;
    of[kHigh] += l.high;
    of[kDual] += l.dual;
    of[kKl] += l.kl;
    of[kRatio] += l.ratio;
    of[kRatioMin] = lesser(double(l.ratio), of[kRatioMin]);
    of[kRatioMax] = greater(double(l.ratio), of[kRatioMax]);
    of[kClamps] += !inside(l.log_ratio);
    if (t.has_sampler) {
      of[kGap] = greater(double(fabsf(log_ratio(t.logp, t.sampler))), of[kGap]);
    }
  }
};

VG_DEVICE Token token_of(const PolicyTermsArgs& a, int64_t i) {
  Token t{a.logp[i], a.old_logp ? a.old_logp[i] : a.logp[i], a.advantages[i]};
  if (a.ref_logp) t.ref = a.ref_logp[i], t.has_ref = true;
  if (a.sampler_logp) t.sampler = a.sampler_logp[i], t.has_sampler = true;
  return t;
}

// Nobody has looked at the ends of segments: no row outside is touched.
VG_DEVICE int64_t row_at(int64_t i, int64_t total) { return i < 0 ? 0 : i < total ? i : total; }

__global__ void __launch_bounds__(kMaxThreads)
    policy_terms_kernel(PolicyTermsArgs a, int64_t blocks) {
  VG_SHARED(Slots<Tally>, shared);
  const Objective& o = a.objective;
  const int64_t total = a.sequences * a.width, width = o.row_local() ? kRun : a.width;
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    int64_t begin = b * width, end = (b + 1) * width < total ? (b + 1) * width : total;
    if (a.segments) begin = row_at(a.segments[b], total), end = row_at(a.segments[b + 1], total);
    const int64_t first = begin + threadIdx.x;
    Sequence sequence;
    if (!o.row_local()) {
      SequenceSums s;
      for (int64_t i = first; i < end; i += blockDim.x) {
        if (a.weight[i] == 0.f) continue;
        const Token t = token_of(a, i);
        s.length += 1;
        s.ratio += ratio_part(t, o);
        s.mismatch += mismatch_part(t, o);
      }
      s = block_reduce(s, SequenceSums(), reinterpret_cast<SequenceSums*>(shared.bytes));
      sequence = sequence_of(s.length, s.ratio, s.mismatch, o);
    }
    Tally n, none;
    n.clear();
    none.clear();
    for (int64_t i = first; i < end; i += blockDim.x) {
      const float w = a.weight[i];
      float dlogp = 0.f, dentropy = 0.f;
      if (w != 0.f) n.of[kTokens] += 1;
      if (w != 0.f && (o.always_active() || a.advantages[i] != 0.f)) {
        const Token t = token_of(a, i);
        const TokenLoss l = token_loss(t, sequence, o);
        n.add(t, l);
        double value = l.value;
        if (a.entropy) {
          value -= double(o.entropy_coef) * a.entropy[i];
          n.of[kEntropy] += a.entropy[i];
          dentropy = -w * o.entropy_coef;
        }
        n.of[kLoss] += w * value;
        n.pending += double(w) * l.sequence_slope;
        dlogp = w * seen(value, l.slope);
      }
      a.dlogp[i] = dlogp;
      a.dentropy[i] = dentropy;
    }
    n = block_reduce(n, none, shared.get());
    if (n.pending != 0.0)
      for (int64_t i = first; i < end; i += blockDim.x)
        if (a.weight[i] != 0.f)
          a.dlogp[i] += float(n.pending * ratio_share(token_of(a, i), sequence, o));
    if (threadIdx.x == 0)
#pragma unroll
      for (int k = 0; k < kTally; ++k) a.partial[b * kTally + k] = n.of[k];
  }
}

__global__ void __launch_bounds__(32) policy_totals_kernel(PolicyTotalsArgs a) {
  Tally n;
  n.clear();
  for (int64_t b = threadIdx.x; b < a.blocks; b += 32) {
    Tally one;
#pragma unroll
    for (int k = 0; k < kTally; ++k) one.of[k] = a.partial[b * kTally + k];
    one.pending = 0;
    n.merge(one);
  }
  n = warp_reduce(n);
  if (threadIdx.x == 0) {
    *a.loss = float(n.of[kLoss]);
#pragma unroll
    for (int k = 0; k < Counts::kSize; ++k) a.counts[k] = float(n.of[k]);
    finish_counts(a.counts);
  }
}

}  // namespace

extern "C" int64_t vg_policy_blocks(const PolicyTermsArgs* a) {
  if (a->objective.row_local()) return (a->sequences * a->width + kRun - 1) / kRun;
  if (a->segments) return a->segment_count;
  return a->width ? a->sequences : 0;
}

extern "C" int vg_policy_terms(const PolicyTermsArgs* a, void* stream) {
  const int64_t blocks = vg_policy_blocks(a), total = a->sequences * a->width;
  if (blocks == 0) return 0;
  const int64_t width = a->objective.row_local() || a->segments ? kRun : a->width;
  const int64_t most = total < width ? total : width;
  VG_LAUNCH(policy_terms_kernel, grid_for(blocks), most < 256 ? threads_for(most) : 256, 0, stream,
            *a, blocks);
  return int(cudaGetLastError());
}

extern "C" int vg_policy_totals(const PolicyTotalsArgs* a, void* stream) {
  VG_LAUNCH(policy_totals_kernel, 1, 32, 0, stream, *a);
  return int(cudaGetLastError());
}

}  // namespace vgkern
