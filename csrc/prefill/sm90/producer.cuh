// The warpgroup that feeds the others: one thread copies sub-blocks into the ring, three warps work out q . mean.
#pragma once

#include "../../common/sub_block.cuh"
#include "shared.cuh"

namespace hierasparse::prefill90 {

template <class S>
class Copier {
 public:
  __device__ __forceinline__ Copier(const Arguments& p, const Work& work, uint32_t shared)
      : p_(p), work_(work), shared_(shared) {}

  // Sub-blocks `first` to `end` of the work's pages, in the order in which consumers take them: K of one and V of the
  // one before (where no product overlaps another: of the same one); or K alone.
  __device__ __forceinline__ void copy(int first, int end, bool values) {
    constexpr int kBehind = S::kMixed ? 0 : 1;
#pragma unroll 1
    for (int item = 2 * first; item < 2 * (end + kBehind); ++item) {
      const bool value = item % 2 != 0;
      const int i = item / 2 - (value ? kBehind : 0);
      if (value ? values && i >= first : i < end) send(i / kSubs, i % kSubs, value);
    }
  }

 private:
  // Ids and index words come from L1, but for the first time.
  __device__ __forceinline__ void send(int page, int sub, bool value) {
    const uint8_t* from = work_.region(p_, work_.page_id(p_, work_.first + page));
    bool sparse = true;
    if constexpr (S::kMixed) {
      const PageLayout& layout = p_.cache.layout;
      const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(from));
      const uint32_t mask = value ? layout.v_mask(word) : layout.k_mask(word);
      sparse = mask >> sub & 1;
      from += sub_block_offset<S::kD>(mask, value ? layout.sparse_v : layout.sparse_k, sub);
    } else {
      from += sub * S::kSparseBytes;
    }
    from += value ? p_.v_offset : p_.k_offset;
    mbarrier_wait(shared_ + S::empty(stage_.at), stage_.parity ^ 1);
    if constexpr (S::kMixed) store_shared4(shared_ + S::kKinds + stage_.at * 4, sparse);
    const uint32_t bytes = sparse ? S::kSparseBytes : S::kDenseBytes;
    mbarrier_arrive_expect(shared_ + S::full(stage_.at), bytes);
    copy_bulk(shared_ + S::kRing + stage_.at * S::kStageBytes, from, bytes, shared_ + S::full(stage_.at));
    stage_.next(S::kStages);
  }

  const Arguments& p_;
  const Work& work_;
  uint32_t shared_;
  Cursor stage_;
};

// A number in three parts of 16 bits, and nothing.
__device__ __forceinline__ uint2 parts(float x) {
  const float high = __uint_as_float(pack<__nv_bfloat16>(0.f, x));
  const float middle = __uint_as_float(pack<__nv_bfloat16>(0.f, x - high));
  return make_uint2(pack<__nv_bfloat16>(high, middle), pack<__nv_bfloat16>(x - high - middle, 0.f));
}

// What the scores of a column begin with: q . mean of the page, which its sparse sub-blocks lack, less the column's
// top.  So nothing is subtracted from exponents: loads of it would take more of shared memory's time than this product.
// Operand B: a row per column, in it 8 bytes (parts) for each of eight pages of two batches.
template <class S>
class Starts {
 public:
  __device__ __forceinline__ Starts(const Arguments& p, uint32_t shared) : p_(p), shared_(shared) {}

  // Of the work's first page, or of all.  Registers run short: what can be found anew is not kept.
  __device__ __forceinline__ void pages(bool all) {
#pragma unroll 1
    for (int at = 0;; at += S::kStartPages, ++batch_) {
      const Work work(p_, block_index());
      const int count = all ? work.end - work.first : 1;
      if (at >= count) return;
      const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
      // Row g of operand A is page g of the batch. What other rows hold does not matter.
      const bool real = at + g < count && g < S::kStartPages;
      const uint8_t* from = work.region(p_, work.page_id(p_, work.first + at + (real ? g : 0))) + p_.mean_offset;
      const int buffer = batch_ % 2;
      mbarrier_wait(shared_ + S::start_empty(buffer), batch_ / 2 % 2 ^ 1);
#pragma unroll 1
      for (int column = 8 * (warp_of_group() - 1); column < S::kColumns; column += 8 * kMeanWarps) {
        const uint32_t row =
            shared_ + S::kQueries + column / S::kN * S::kQueryBytes + (column % S::kN + lane % 8) * kRowBytes;
        float dot[4] = {};
        if (p_.cache.layout.key_mean) {
#pragma unroll 1  // for want of registers
          for (int s = 0; s < S::kD / 32; ++s) {
            const int piece = s % 2 * 4 + lane / 8;
            const uint4 q = load_matrices(row + s / 2 * S::kHalf + ((piece ^ lane % 8) << 4));
            const uint2* mean = reinterpret_cast<const uint2*>(from) + 8 * s + 2 * t;
            const uint2 a = __ldg(mean);
            mma<__nv_bfloat16>(dot, a.x, 0, a.y, 0, q.x, q.y);
            const uint2 b = __ldg(mean + 1);
            mma<__nv_bfloat16>(dot, b.x, 0, b.y, 0, q.z, q.w);
          }
        }
        store(column, buffer, dot);
      }
      fence_async();
      mbarrier_arrive_warp(shared_ + S::start_full(buffer), lane);
    }
  }

 private:
  // q . mean of eight columns and eight pages, as operand A's product leaves it.
  __device__ __forceinline__ void store(int column, int buffer, const float (&dot)[4]) const {
    const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
    const float2 top = load_shared_floats(shared_ + S::kTops + (column + 2 * t) * 4);
    const bool plain = g >= S::kStartPages;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int piece = (buffer * kStartPlaces + g) / 2;
      store_shared8(shared_ + S::kStarts + (column + 2 * t + e) * kRowBytes + ((piece ^ (2 * t + e)) << 4) + g % 2 * 8,
                    parts((plain ? 0.f : dot[e]) - (e ? top.y : top.x)));
    }
  }

  const Arguments& p_;
  uint32_t shared_;
  uint32_t batch_ = 0;
};

template <class S>
__device__ __forceinline__ void produce(const Arguments& p, const Work& work, uint32_t shared) {
  const int again = S::kAgain;
  if (warp_of_group() == 0) {
    Copier<S> copier(p, work, shared);
    for (int attempt = 0; attempt < 2; ++attempt) {
      if (threadIdx.x % 32 == 0) {
        const int subs = (work.end - work.first) * kSubs;
        copier.copy(attempt > 0 ? 0 : 1, attempt > 0 ? subs : 2, false);
        copier.copy(0, subs, true);
      }
      __syncwarp();
      mbarrier_wait(shared + S::kDecided, attempt);
      if (load_shared4(shared + again) == 0) return;
    }
  } else {
    Starts<S> starts(p, shared);
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
      mbarrier_wait(shared + S::kTopsThere, 0);
      starts.pages(attempt > 0);
      mbarrier_wait(shared + S::kTopsThere, 1);
      starts.pages(true);
      mbarrier_wait(shared + S::kDecided, attempt);
      if (load_shared4(shared + again) == 0) return;
    }
  }
}

}  // namespace hierasparse::prefill90
