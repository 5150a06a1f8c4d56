// What a block has in shared memory, and how its lanes read and combine it.
#pragma once

#if defined(__CUDACC__)  // the tests also run this code on the host, with these few functions of their own
#include "../common/ptx.cuh"
#endif
#include "choice.h"
#include "params.h"

namespace hierasparse::compress {

// The shape of a block: head size, and how many of a page's tokens it keeps in shared memory at a time. With 256 they
// are read once; with 64, for devices on which a page of 256 channels does not fit, once per phase (from L2).
template <typename T_, int kD_, int kTile_>
struct Shape {
  using T = T_;
  static constexpr int kD = kD_, kTile = kTile_;
  static constexpr int kThreads = kD < 256 ? 256 : kTile == kPageTokens ? 512 : 128;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kBlocksPerSm = kD < 256 ? 3 : kTile == kPageTokens ? 1 : 2;
  static constexpr int kTiles = kPageTokens / kTile;
  static constexpr int kQuads = kD / 4;  // of channels: what a thread has of a row where rows are summed
  static constexpr int kRuns = kThreads / kQuads, kRunRows = kTile / kRuns;  // threads share a tile's rows in runs
  static constexpr int kMetaWords = kD / 16 * kWarp;                         // of a sub-block
  static constexpr float kLimit = std::is_same_v<T, __half> ? 65504.f : 0x1.fep127f;
  static constexpr float kStep = std::is_same_v<T, __half> ? 0x1p-10f : 0x1p-7f;  // the dtype's epsilon
  static_assert(kRunRows % 16 == 0, "swizzle() of a run's rows must not depend on where the run begins");

  // Kept values grow by the root of 2 at most: below these no bound of Room is near.
  static constexpr float kCalm = kLimit / 8;
  static constexpr float kCalmNorm = std::is_same_v<T, __half> ? kCalm * kCalm : 0x1p126f;  // a token's sum of squares

  HS_HD static Room room(bool mean) { return {kLimit, mean ? kLimit * (1.f - kStep) : kLimit}; }
};

// The (page, head, side) that a block works on.
struct Unit {
  int request, page, head;  // page: number in the request
  bool there;               // false: the block has none any more
  bool is_value;
  int sparse;  // sub-blocks of this side
  bool rescale;
  uint8_t* region;  // of the head, in the page; null: nothing to do
};

template <class S>
struct Shared {
  alignas(1024) uint8_t tile[S::kTile * 2 * S::kD];  // rows of 2 kD bytes, their 16-byte pieces permuted by swizzle()
  union {
    float4 partial[S::kRuns][S::kQuads];  // sums of runs of rows
    uint32_t meta[kSubs][S::kMetaWords];  // then metadata, where the page has it
  };
  uint2 channels[S::kQuads];              // of K, four a group: byte offset of the channel at each place
  float4 mean[S::kQuads];                 // of K, by place; zero without mean
  float4 weight[S::kQuads];               // of K, by place; one without weights
  float by_channel[S::kTiles][S::kD];     // sums of the tiles; then, in the first row, the mean
  const uint8_t* source[kPageTokens];     // row of each token in global memory
  uint8_t* target[kPageTokens];           // its place in the window, if the unit is to store it; or null
  int pages_before[S::kThreads + 1];      // pages that requests before this one fill
  alignas(16) int warp_total[S::kWarps];  // so that wide loads of it touch nothing of its neighbour
  // Units of requests before; of those at hand, the first request, units per page, the block's next unit, the number of
  // all, and whether the block's turn is an odd one. Here, as the units, and not in registers, which are scarce.
  int before, first, sides, next, end, odd;
  Unit unit, ahead;  // the one at hand and the next
  // Volatile: read where they are used, and not kept in registers.
  volatile int place[kSubs];  // of a sub-block in the region
  volatile uint32_t mask;     // sparse sub-blocks
  volatile int step;          // from the block's unit to its next one
  uint32_t losses[kSubs];
  uint32_t top;   // bits of the largest finite score
  uint32_t wild;  // a mean is so large that bounds of Room may be near
};

// ---- rows of the tile ------------------------------------------------------------------------------------------
// Pieces of a row change places with pieces of its neighbours' banks, so that no access below has a conflict: eight
// neighbouring rows at one channel (K), rows 2t + const (V along channels) and 4t + const (V along tokens).
HS_HD constexpr int swizzle(int row) { return (row & 7) ^ (row >> 2 & 2); }

// Byte offset of a row; XOR it with a channel's offset in the row.
template <class S>
__device__ __forceinline__ uint32_t row_offset(int row) {
  return row * 2 * S::kD | swizzle(row) << 4;
}
template <class S>
__device__ __forceinline__ uint32_t value_bits(const Shared<S>& shared, uint32_t offset) {
  return *reinterpret_cast<const uint16_t*>(shared.tile + offset);
}
template <class S>
__device__ __forceinline__ uint2 four_values(const Shared<S>& shared, uint32_t offset) {
  return *reinterpret_cast<const uint2*>(shared.tile + offset);
}
template <class S>
__device__ __forceinline__ uint4 eight_values(const Shared<S>& shared, uint32_t offset) {
  return *reinterpret_cast<const uint4*>(shared.tile + offset);
}

// ---- values ----------------------------------------------------------------------------------------------------
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t two) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 x;
    memcpy(&x, &two, sizeof x);
    return __half22float2(x);
  } else {
    return make_float2(as_float(two << 16), as_float(two & 0xffff0000u));
  }
}
template <typename T>
__device__ __forceinline__ void unpack(uint2 four, float (&x)[4]) {
  const float2 low = unpack<T>(four.x), high = unpack<T>(four.y);
  x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}

constexpr uint32_t kLows = 0x5410, kHighs = 0x7632;  // __byte_perm: both low halves, both high halves

// ---- lanes -----------------------------------------------------------------------------------------------------
// kLanes lanes, which differ in the lane bits from kShift on, have a number for each of them: lane j gets all those for
// j, combined neighbours first.
template <int kLanes, int kShift, typename V, class Op>
__device__ __forceinline__ V reduce_scatter(V (&x)[kLanes], Op op) {
  const int lane = thread_index() % kWarp;
#pragma unroll
  for (int n = kLanes / 2, bit = kShift; n > 0; n /= 2, ++bit) {
    const bool odd = lane >> bit & 1;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const V mine = odd ? x[2 * j + 1] : x[2 * j], other = odd ? x[2 * j] : x[2 * j + 1];
      x[j] = op(mine, __shfl_xor_sync(~0u, other, 1 << bit));
    }
  }
  return x[0];
}
struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return add(a, b); }
};
struct Or {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

// A number of each lane is added to a counter in shared memory.
__device__ __forceinline__ void add_losses(uint32_t* to, uint32_t mine) {
  const uint32_t all = __reduce_add_sync(~0u, mine);
  if (thread_index() % kWarp == 0) atomicAdd(to, all);
}

// To global memory: a pointer that was kept in shared memory does not tell.
__device__ __forceinline__ void store16(uint8_t* to, uint4 x) { __stcg(reinterpret_cast<uint4*>(to), x); }
__device__ __forceinline__ void store16(uint8_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store16(to, make_uint4(a, b, c, d));
}

}  // namespace hierasparse::compress
