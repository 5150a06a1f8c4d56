// A warp's columns (query, head of the group): their queries as operand B, where their pages end, their results.
#pragma once

#include "../../common/log2.h"
#include "../../common/values.cuh"
#include "params.h"

namespace hierasparse::prefill_sm80 {

template <int kD, int kTiles>
struct Queries {
  uint32_t at[kTiles][kD / 32][4];  // operand B of m16n8k32, channels in stored order; its halves are two of m16n8k16
};

// What a CTA works on: read anew where it is used, so that it takes no registers in between.
struct Work {
  PrefillTile tile;
  int kv_head, split;
  __device__ __forceinline__ explicit Work(const PrefillParams& p) {
    const int block = block_index(), kv_heads = p.cache.kv_heads, splits = p.splits;
    kv_head = block % kv_heads, split = block / kv_heads % splits;
    const int32_t* from = reinterpret_cast<const int32_t*>(p.tiles + block / kv_heads / splits);
    tile = {__ldg(from), __ldg(from + 1), __ldg(from + 2), __ldg(from + 3), __ldg(from + 4)};
  }
};

// Lane 4 g + t holds column g of a tile of B, and columns 2 t and 2 t + 1 of results.
template <int kTiles>
class Columns {
 public:
  __device__ __forceinline__ explicit Columns(const Arguments& a)
      : p_(a.params), work_(a.params), group_(a.group), first_(thread_index() / 32 * 8 * kTiles) {}

  __device__ __forceinline__ const Work& work() const { return work_; }
  __device__ __forceinline__ bool any() const { return first_ < work_.tile.queries * group_; }
  __device__ __forceinline__ int border(int column) const {
    return border_of(p_, work_.tile, (first_ + column) / group_);
  }

  // Columns beyond the tile's are zeros.
  template <int kD>
  __device__ __forceinline__ void load(Queries<kD, kTiles>& q) const {
    const int g = thread_index() % 32 / 4, t = thread_index() % 4;
    const int32_t* order = p_.k_order + work_.kv_head * kD + 2 * t;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = first_ + 8 * n + g, query = column / group_;
      const int head = work_.kv_head * group_ + column % group_;
      const uint16_t* from = reinterpret_cast<const uint16_t*>(static_cast<const uint8_t*>(p_.query) +
                                                               (work_.tile.row + query) * p_.query_row_stride +
                                                               head * p_.query_head_stride);
#pragma unroll
      for (int step = 0; step < kD / 32; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int2 channel = __ldg(reinterpret_cast<const int2*>(order + 32 * step + 8 * i));
          q.at[n][step][i] =
              query < work_.tile.queries ? __ldg(from + channel.x) | uint32_t{__ldg(from + channel.y)} << 16 : 0;
        }
      }
    }
  }

  template <typename T, int kD>
  __device__ __forceinline__ void store(const State<kD, kTiles>& state) const {
    const int g = thread_index() % 32 / 4, t = thread_index() % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = first_ + 8 * n + 2 * t + e, query = column / group_;
        const int head = work_.kv_head * group_ + column % group_;
        float sum = state.sum[n][e];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (query >= work_.tile.queries) continue;
        const float scale = sum == 0.f ? 0.f : 1.f / sum;
        uint8_t* out = static_cast<uint8_t*>(p_.out) + work_.split * p_.out_split_stride +
                       (work_.tile.row + query) * p_.out_row_stride + head * p_.out_head_stride + g * 8;
#pragma unroll
        for (int c = 0; c < kD / 64; ++c) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float x[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) x[j] = state.o[4 * c + j][n][2 * half + e] * scale;
            *reinterpret_cast<uint2*>(out + c * 128 + half * 64) = make_uint2(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
          }
        }
        if (g == 0) {
          p_.lse[work_.split * p_.lse_split_stride + head * p_.lse_head_stride + work_.tile.row + query] =
              sum == 0.f ? -INFINITY : (state.top[n][e] + log2f(sum)) * kLn2;
        }
      }
    }
  }

 private:
  const PrefillParams& p_;
  Work work_;
  int group_, first_;
};

}  // namespace hierasparse::prefill_sm80
