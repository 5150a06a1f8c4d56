// A consumer: a warpgroup with kN columns.  S^T = K q^T, probabilities, O^T += V^T P^T, one sub-block after the other.
//
// Column 8 j + 2 t + e of row tile r and row g + 8 h of it are in element 4 j + 2 h + e of lane 4 g + t of warp r.
#pragma once

#include "shared.cuh"

namespace hierasparse::prefill90 {

// Fragments of a sub-block of K or V that a warp multiplies at a time: all of a sparse one, half of a dense one.
template <int kD>
struct Operand {
  uint4 a[kD / 32];
  uint32_t metadata[kD / 64];
};

// 2^x within 1e-4 of it, without the unit for such functions, which is the limit otherwise; 0 for -infinity and NaN.
// At 128 and above: infinite, NaN, or above 2^126.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 0x1.8p23f;
  x = fminf(fmaxf(x, -127.f), 128.f);
  const float rounded = x + kRound, f = x - (rounded - kRound);
  const float p = fmaf(fmaf(fmaf(0.05500856f, f, 0.24221055f), f, 0.69328292f), f, 1.f);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(rounded) << 23));
}

template <class S>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Arguments& p, const Work& work, uint32_t shared, int number)
      : p_(p),
        shared_(shared),
        number_(number),
        low_page_(work.low / kPageTokens),
        first_(work.first),
        scale_(p.scale_log2) {
    queries_ = wgmma_descriptor(shared + S::kQueries + number * S::kQueryBytes);
    starts_ = wgmma_descriptor(shared + S::kStarts + number * S::kHalf);
    probabilities_ = shared + S::kProbabilities + number * 2 * S::kHalf;
  }

  // Tops of all columns over one sub-block without sinks, or over all pages.
  __device__ __forceinline__ void find_tops(int pages, bool all, uint32_t sinks) {
#pragma unroll
    for (int i = 0; i < S::kN / 4; ++i) sum_[i] = -INFINITY;
    const int count = all ? pages * kSubs : 1;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int page = i / kSubs, sub = all ? i % kSubs : 1;
      take_key(false);
      multiply_keys(all ? sub : 0);
      wgmma_wait<0>();
      wgmma_hold(s_);
      hide(page, sub, sinks);
#pragma unroll
      for (int j = 0; j < S::kN / 8; ++j) {
        sum_[2 * j] = fmaxf(sum_[2 * j], fmaxf(s_[4 * j], s_[4 * j + 2]));
        sum_[2 * j + 1] = fmaxf(sum_[2 * j + 1], fmaxf(s_[4 * j + 1], s_[4 * j + 3]));
      }
      leave(page, all ? sub : kSubs - 1, all ? pages : 1);
    }
    reduce([](float a, float b) { return fmaxf(a, b); });
    const int column = threadIdx.x % kGroupThreads;
    if (column < S::kN) {
      float top = part(0, column);
#pragma unroll
      for (int r = 1; r < 4; ++r) top = fmaxf(top, part(r, column));
      if (top == -INFINITY) top = 0.f;  // all hidden: 0 is as good, and no infinity is subtracted from another
      store_shared_float(shared_ + S::kTops + (number_ * S::kN + column) * 4, top);
    }
  }

  // O^T and, in the thread of each column, the sum of its probabilities.
  __device__ __forceinline__ float attend(int pages, uint32_t sinks) {
#pragma unroll
    for (int i = 0; i < S::kN / 4; ++i) sum_[i] = 0.f;
#pragma unroll
    for (int c = 0; c < S::kD / 64; ++c) {
#pragma unroll
      for (int i = 0; i < S::kN / 2; ++i) o_[c][i] = 0.f;
    }
    if constexpr (S::kMixed) {
      attend_one_by_one(pages, sinks);
    } else {
      attend_overlapped(pages, sinks);
    }
    reduce([](float a, float b) { return a + b; });
    const int column = threadIdx.x % kGroupThreads;
    float sum = 0.f;
    if (column < S::kN) {
#pragma unroll
      for (int r = 0; r < 4; ++r) sum += part(r, column);
    }
    return sum;
  }

  // O^T into shared memory, a column's channels side by side: place 64 c + 16 j + x of it is channel 64 c + 4 x + j.
  __device__ __forceinline__ void store_result(float* results) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float* mine = results + 2 * t * S::kResultPitch + 16 * warp_of_group() + g;
#pragma unroll
    for (int c = 0; c < S::kD / 64; ++c) {
#pragma unroll
      for (int i = 0; i < S::kN / 2; ++i) {
        mine[(8 * (i / 4) + i % 2) * S::kResultPitch + 64 * c + 8 * (i / 2 % 2)] = o_[c][i];
      }
    }
  }

 private:
  __device__ __forceinline__ void my_turn() const { barrier_sync(kTurn + number_, 2 * kGroupThreads); }
  __device__ __forceinline__ void next_turn() const {
    barrier_arrive(kTurn + (last() ? 0 : number_ + 1), 2 * kGroupThreads);
  }
  __device__ __forceinline__ bool last() const { return number_ + 1 == S::kConsumers; }

  // ---- the main loop
  // S^T of a sub-block and O^T of the one before are under way together, and the exponentials begin when S^T is there.
  // Fragments are loaded behind the exponentials: earlier, the loads would wait behind the operands of the products.
  __device__ __forceinline__ void attend_overlapped(int pages, uint32_t sinks) {
    const int count = pages * kSubs;
    uint32_t buffer = probabilities_;
    if (S::kTurns && last()) next_turn();
    take_key(false);
    multiply_keys(0);
    wgmma_wait<0>();
    wgmma_hold(s_);
    softmax(0, buffer, pages, sinks);
    key_there_ = value_there_ = false;
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      // This order was found by measuring: small changes of it cost up to a sixth.
      fence_async();
      take_key(key_there_);
      wait_for_values();
      take_value(value_there_);
      if (S::kTurns) my_turn();
      multiply_keys(i % kSubs);
      barrier_sync(kGroup + number_, kGroupThreads);  // all four warps' probabilities are there
      multiply_values(buffer);
      if (S::kTurns && (!last() || i + 1 < count)) next_turn();
      wgmma_wait<1>();
      wgmma_hold(s_);
      look_ahead();
      buffer = 2 * probabilities_ + S::kHalf - buffer;
      softmax(i, buffer, pages, sinks);
    }
    wait_for_values();
    take_value(false);
    fence_async();
    barrier_sync(kGroup + number_, kGroupThreads);
    multiply_values(buffer);
    wait_for_values();
  }
  // With dense sub-blocks: no product may be under way where the code branches, or the compiler lets each wait for the
  // one before.  The other consumer's products go on meanwhile.
  __device__ __forceinline__ void attend_one_by_one(int pages, uint32_t sinks) {
    const int count = pages * kSubs;
    uint32_t buffer = probabilities_;
    take_key(false);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      multiply_keys(i % kSubs);
      wgmma_wait<0>();
      wgmma_hold(s_);
      look_ahead();
      if constexpr (S::kD == 64) take_value(key_there_);
      softmax(i, buffer, pages, sinks);
      fence_async();
      if constexpr (S::kD != 64) take_value(key_there_);  // behind the exponentials, for want of registers
      if (i + 1 < count) take_key(false);
      barrier_sync(kGroup + number_, kGroupThreads);
      multiply_values(buffer);
      wait_for_values();
      buffer = 2 * probabilities_ + S::kHalf - buffer;
    }
  }

  // ---- the ring
  struct Stage {
    uint32_t at;
    int number;
    bool sparse;
  };
  // Whether the next stages have been filled: asked long before they are needed.
  __device__ __forceinline__ void look_ahead() {
    Cursor next = stage_;
    key_there_ = mbarrier_done(shared_ + S::full(next.at), next.parity);
    if constexpr (!S::kMixed) {
      next.next(S::kStages);
      value_there_ = mbarrier_done(shared_ + S::full(next.at), next.parity);
    }
  }
  __device__ __forceinline__ Stage front(bool there) {
    const int number = stage_.at;
    if (!there) mbarrier_wait(shared_ + S::full(number), stage_.parity);
    stage_.next(S::kStages);
    bool sparse = true;
    if constexpr (S::kMixed) sparse = load_shared4(shared_ + S::kKinds + number * 4) != 0;
    return {shared_ + S::kRing + number * S::kStageBytes + lane_of_warp() * 16, number, sparse};
  }
  // The warp has all that it needs of a stage: products that take its fragments have been issued.  Issued is what
  // counts: loads of shared memory can wait for long behind the operands of products, and an arrival overtakes them.
  __device__ __forceinline__ void release(const Stage& stage) const {
    mbarrier_arrive_warp(shared_ + S::empty(stage.number), threadIdx.x % 32);
  }

  __device__ __forceinline__ void take_key(bool there) {
    key_ = front(there);
    if (key_.sparse) {
      const int r = warp_of_group();
#pragma unroll
      for (int step = 0; step < S::kD / 32; ++step) {
        k_.a[step] = load_shared16(key_.at + (r * (S::kD / 32) + step) * kFragment);
      }
      if constexpr (S::kD == 64) {
        k_.metadata[0] = load_shared4(key_.at + S::kSparseValues + r * 4);
      } else {
        static_assert(S::kD == 128);
        const uint2 words = load_shared8(key_.at + S::kSparseValues + r / 2 * kFragment + r % 2 * 8);
        k_.metadata[0] = words.x, k_.metadata[1] = words.y;
      }
    } else {
      take_dense_key(0);
    }
  }
  __device__ __forceinline__ void take_dense_key(int half) {
#pragma unroll
    for (int i = 0; i < S::kD / 32; ++i) {
      k_.a[i] = load_shared16(key_.at + (warp_of_group() * (S::kD / 16) + half * (S::kD / 32) + i) * kFragment);
    }
  }
  __device__ __forceinline__ void take_value(bool there) {
    value_ = front(there);
    if (value_.sparse) {
      const int r = warp_of_group();
#pragma unroll
      for (int i = 0; i < S::kD / 32; ++i) {
        v_.a[i] = load_shared16(value_.at + ((4 * (i / 2) + r) * 2 + i % 2) * kFragment);
      }
#pragma unroll
      for (int c = 0; c < S::kD / 64; ++c) {
        v_.metadata[c] = load_shared4(value_.at + S::kSparseValues + c * kFragment + r * 4);
      }
    } else {
      take_dense_value(0);
    }
  }
  __device__ __forceinline__ void take_dense_value(int half) {
#pragma unroll
    for (int i = 0; i < S::kD / 32; ++i) {
      v_.a[i] = load_shared16(value_.at + ((half * (S::kD / 32) + i) * 4 + warp_of_group()) * kFragment);
    }
  }

  // ---- products
  // S^T of the sub-block whose first fragments have been taken; one group.
  __device__ __forceinline__ void multiply_keys(int sub) {
    const uint64_t start = enter(sub);
    wgmma_hold(s_);
    if (key_.sparse) {
      wgmma_fence();
      wgmma(s_, ones_, start, false);
#pragma unroll
      for (int step = 0; step < S::kD / 32; ++step) {
        const uint64_t b = wgmma_behind(queries_, step / 2 * S::kHalf + step % 2 * 64);
        if (step % 2 == 0) {
          wgmma_sp<0>(s_, k_.a[step], k_.metadata[step / 2], b, true);
        } else {
          wgmma_sp<1>(s_, k_.a[step], k_.metadata[step / 2], b, true);
        }
      }
      wgmma_commit();
      if constexpr (S::kMixed) wgmma_wait<0>();
    } else {
      wgmma_fence();
      wgmma(s_, ones_, start, false);
      multiply_dense_keys(0);
      wgmma_commit();
      wgmma_wait<0>();
      take_dense_key(1);
      wgmma_fence();
      multiply_dense_keys(1);
      wgmma_commit();
      wgmma_wait<0>();
    }
    release(key_);
  }
  __device__ __forceinline__ void multiply_dense_keys(int half) {
#pragma unroll
    for (int i = 0; i < S::kD / 32; ++i) {
      const int step = half * (S::kD / 32) + i;
      wgmma(s_, k_.a[i], wgmma_behind(queries_, step / 4 * S::kHalf + step % 4 * 32), true);
    }
  }

  __device__ __forceinline__ void multiply_values(uint32_t probabilities) {
    const uint64_t p = wgmma_descriptor(probabilities);
    hold_results();
    if (value_.sparse) {
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < S::kD / 32; ++i) {
        if (i % 2 == 0) {
          wgmma_sp<0>(o_[i / 2], v_.a[i], v_.metadata[i / 2], p, true);
        } else {
          wgmma_sp<1>(o_[i / 2], v_.a[i], v_.metadata[i / 2], wgmma_behind(p, 64), true);
        }
      }
      wgmma_commit();
      if constexpr (S::kMixed) wgmma_wait<0>();
    } else {
      wgmma_fence();
      multiply_dense_values(0, p);
      wgmma_commit();
      wgmma_wait<0>();
      take_dense_value(1);
      wgmma_fence();
      multiply_dense_values(1, p);
      wgmma_commit();
      wgmma_wait<0>();
    }
    release(value_);
  }
  __device__ __forceinline__ void hold_results() {
#pragma unroll
    for (int c = 0; c < S::kD / 64; ++c) wgmma_hold(o_[c]);
  }
  // O^T, and whatever was issued before it, is there.
  __device__ __forceinline__ void wait_for_values() {
    wgmma_wait<0>();
    hold_results();
  }
  __device__ __forceinline__ void multiply_dense_values(int half, uint64_t p) {
#pragma unroll
    for (int i = 0; i < S::kD / 32; ++i) {
      const int at = half * (S::kD / 32) + i;
      wgmma(o_[at / 4], v_.a[i], wgmma_behind(p, at % 4 * 32), true);
    }
  }

  // ---- softmax
  // S^T begins with q . mean - top: ones in four columns of operand A take a page's place of operand B (see Starts).
  __device__ __forceinline__ uint64_t enter(int sub) {
    if (sub == 0 && page_ == 0) mbarrier_wait(shared_ + S::start_full(start_.at), start_.parity);
    // Dense keys have their mean.
    const int place = start_.at * kStartPlaces + (S::kMixed && !key_.sparse ? kStartPlaces - 1 : page_);
    const uint32_t mine = (lane_of_warp() / 2 + place) % 2 == 0 ? 0x3f803f80u : 0u;  // 1, 1
    ones_.x = ones_.y = place % 4 < 2 ? mine : 0u;
    ones_.z = ones_.w = place % 4 < 2 ? 0u : mine;
    return wgmma_behind(starts_, place / 4 * 32);
  }
  __device__ __forceinline__ void leave(int page, int sub, int pages) {
    if (sub + 1 != kSubs) return;
    if (++page_ != S::kStartPages && page + 1 != pages) return;
    mbarrier_arrive_warp(shared_ + S::start_empty(start_.at), threadIdx.x % 32);
    start_.next(2);
    page_ = 0;
  }

  // Scores that a column must not see.
  __device__ __forceinline__ void hide(int page, int sub, uint32_t sinks) {
    const bool edge = first_ + page >= low_page_, has_sinks = sinks > 0 && page == 0 && sub == 0;
    if (!edge && !has_sinks) return;
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4, row = 16 * warp_of_group() + g;
    const uint32_t borders = shared_ + S::kBorders + (number_ * S::kN + 2 * t) * 4;
    const int start = (first_ + page) * kPageTokens;
#pragma unroll
    for (int j = 0; j < S::kN / 8; ++j) {
      const uint2 border = load_shared8(borders + j * 32);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool hidden = start >= static_cast<int>(e % 2 ? border.y : border.x);
        if (hidden || (has_sinks && row + 8 * (e / 2) < static_cast<int>(sinks))) s_[4 * j + e] = -INFINITY;
      }
    }
  }

  // Probabilities of sub-block i of the pages, as rows of operand B.
  __device__ __forceinline__ void softmax(int i, uint32_t buffer, int pages, uint32_t sinks) {
    const int page = i / kSubs, sub = i % kSubs;
    hide(page, sub, sinks);
    // The lane's row of a transposed store: column 8 (lane / 16) + lane % 8, keys 16 r + 8 (lane / 8 % 2).
    const int lane = lane_of_warp();
    buffer += (lane / 16 * 8 + lane % 8) * kRowBytes + (((2 * warp_of_group() + lane / 8 % 2) ^ lane % 8) << 4);
    // Pairs of column tiles: exponentials of the next pair are under way while this one is packed and stored.
    constexpr int kPairs = S::kN / 16;
    exponentials(0);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (pair + 1 < kPairs) exponentials(pair + 1);
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int j = 2 * pair + k;
        const float* s = s_ + 4 * j;
        sum_[2 * j] += s[0] + s[2], sum_[2 * j + 1] += s[1] + s[3];
        x[2 * k] = pack<__nv_bfloat16>(s[0], s[1]), x[2 * k + 1] = pack<__nv_bfloat16>(s[2], s[3]);
      }
      store_matrices_transposed(buffer + pair * 16 * kRowBytes, x[0], x[1], x[2], x[3]);
    }
    leave(page, sub, pages);
  }

  __device__ __forceinline__ void exponentials(int pair) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& s = s_[8 * pair + i];
      s = i * S::kPolynomials % 8 < S::kPolynomials ? exp2_polynomial(s * scale_) : exp2_fast(s * scale_);
    }
  }

  // sum_ over the lanes of a column: a row of kN for each warp, where the probabilities were.
  template <class Op>
  __device__ __forceinline__ void reduce(Op op) const {
    barrier_sync(kGroup + number_, kGroupThreads);
    const int lane = threadIdx.x % 32;
    const uint32_t to = probabilities_ + (warp_of_group() * S::kN + lane % 4 * 2) * 4;
#pragma unroll
    for (int j = 0; j < S::kN / 8; ++j) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[e] = sum_[2 * j + e];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) x[e] = op(x[e], __shfl_xor_sync(~0u, x[e], step));
      }
      if (lane < 4) store_shared_floats(to + j * 32, x[0], x[1]);
    }
    barrier_sync(kGroup + number_, kGroupThreads);
  }
  __device__ __forceinline__ float part(int r, int column) const {
    return load_shared_float(probabilities_ + (r * S::kN + column) * 4);
  }

  const Arguments& p_;
  const uint32_t shared_;
  const int number_, low_page_, first_;
  const float scale_;
  uint64_t queries_, starts_;
  uint32_t probabilities_;
  Cursor stage_, start_;
  int page_ = 0;  // of the batch of starts
  Stage key_, value_;
  bool key_there_ = false, value_there_ = false;
  Operand<S::kD> k_, v_;
  uint4 ones_;
  float s_[S::kN / 2], o_[S::kD / 64][S::kN / 2];
  float sum_[S::kN / 4];  // of this lane's probabilities, or their top; of columns 8 j + 2 t + e
};

}  // namespace hierasparse::prefill90
