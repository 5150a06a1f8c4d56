// From the scores of a sub-block to its probabilities, without a running maximum.
//
// P, O and the sums keep their meaning with any m in exp2(s - m) that their range allows: m is the maximum of a
// sub-block that was looked at once, and only if the sums of a later one leave the range is that one done again with
// its own.
#pragma once

#include "pages.cuh"

namespace hierasparse::prefill_sm80 {

// A lane's probabilities of a sub-block may sum to so much: bfloat16 and float32 have room for 2^127, float16 for 2^15.
template <typename T>
constexpr float kMostSum = std::is_same_v<T, __half> ? 0x1p15f : 0x1p60f;

// Tokens that a column does not read here: beyond its border, or in the sink rows.
template <int kTiles>
__device__ __forceinline__ void hide(float (&s)[kRows][kTiles][4], const int* border, int token, int sinks) {
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool hidden = token >= border[8 * n + 2 * t + e];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (hidden || 16 * m + 8 * i + g < sinks) s[m][n][2 * i + e] = -INFINITY;
        }
      }
    }
  }
}

// One float of each of the lane's columns, from shared memory.
template <int kTiles>
__device__ __forceinline__ void load_columns(float (&x)[kTiles][2], uint32_t at) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const uint2 two = load_shared8(at + n * 32);
    x[n][0] = __uint_as_float(two.x), x[n][1] = __uint_as_float(two.y);
  }
}

// State::top goes to shared memory, since registers run short.  All lanes of a column store the same.
template <int kD, int kTiles>
__device__ __forceinline__ void store_tops(const State<kD, kTiles>& state, float* at) {
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) at[8 * n] = state.top[n][0], at[8 * n + 1] = state.top[n][1];
  __syncwarp();
}

// To the maximum of this sub-block, if that is higher.
template <int kD, int kTiles>
__device__ __forceinline__ void raise_exactly(float scale_log2, State<kD, kTiles>& state,
                                              const float (&s)[kRows][kTiles][4], uint32_t means, uint32_t tops,
                                              float* lane_tops) {
  float mean[kTiles][2];
  load_columns(mean, means);
  load_columns(state.top, tops);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = s[0][n][e];
#pragma unroll
      for (int m = 0; m < kRows; ++m) x = fmaxf(x, fmaxf(s[m][n][e], s[m][n][2 + e]));
      raise_column(state, n, e, fmaf(x, scale_log2, mean[n][e]));
    }
  }
  store_tops(state, lane_tops);
}

// Probabilities as operand B of O^T += V^T P^T, and the lane's sums.  False, in all lanes, if they leave the range.
// `between` is called when registers of scores have become free.
template <typename T, int kTiles, typename Between>
__device__ __forceinline__ bool weigh(float scale_log2, const float (&s)[kRows][kTiles][4], uint32_t means,
                                      uint32_t tops, uint32_t (&p)[kTiles][kRows][2], float (&sum)[kTiles][2],
                                      Between between) {
  float above[kTiles][2], top[kTiles][2];
  load_columns(above, means);
  load_columns(top, tops);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) above[n][e] -= top[n][e];
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = exp2_fast(fmaf(s[m][n][e], scale_log2, above[n][e & 1]));
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[n][e] = m == 0 ? x[e] + x[2 + e] : sum[n][e] + x[e] + x[2 + e];
      p[n][m][0] = transpose8x8(pack<T>(x[0], x[1]));
      p[n][m][1] = transpose8x8(pack<T>(x[2], x[3]));
    }
    if (m == kRows - 2) between();
  }
  float all = 0.f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) all += sum[n][0] + sum[n][1];
  return !__any_sync(~0u, !(all <= kMostSum<T>));
}

}  // namespace hierasparse::prefill_sm80
