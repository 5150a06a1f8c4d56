// What a warp knows of its columns: O^T, running maximum, sum; and the step from scores to probabilities.
//
// Columns are the N side of every product: column 8 n + 2 t + e of a tile lies in lanes 4 g + t, e = 0, 1.
#pragma once

#include "ptx.cuh"

namespace hierasparse {

// In place of -inf, so that no difference of two maxima is NaN; below any score that a model makes.
constexpr float kNoMaximum = -1e30f;
// The maximum may be stale by this much (in powers of two): then P is at most 2^8, which float16 holds, too, as float32
// holds O and the sums; only their common factor changes, and most items need neither shuffles nor a rescaling.
constexpr float kStale = 8.f;

template <int kD, int kTiles>
struct State {
  float o[kD / 16][kTiles][4];  // O^T: m-tile 4 c + j, row r is channel 64 c + 4 r + j
  float top[kTiles][2];         // running maximum of the scores, times log2(e)
  float sum[kTiles][2];         // of this lane's probabilities

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) top[n][e] = kNoMaximum, sum[n][e] = 0.f;
#pragma unroll
      for (int m = 0; m < kD / 16; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[m][n][e] = 0.f;
      }
    }
  }
};

// The maximum of column 2 t + e of tile n, to that of all its lanes' x, if that is higher.
template <int kD, int kTiles>
__device__ __forceinline__ void raise_column(State<kD, kTiles>& state, int n, int e, float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  x = fmaxf(x, state.top[n][e]);
  const float keep = exp2_fast(state.top[n][e] - x);
  state.top[n][e] = x;
  state.sum[n][e] *= keep;
#pragma unroll
  for (int m = 0; m < kD / 16; ++m) state.o[m][n][e] *= keep, state.o[m][n][2 + e] *= keep;
}

// Before the probabilities of kRows row tiles of 16 tokens: scores far above the maximum raise it.
template <int kRows, int kD, int kTiles>
__device__ __forceinline__ void raise_maximum(float scale_log2, State<kD, kTiles>& state,
                                              const float (&s)[kRows][kTiles][4]) {
  float top[kTiles][2];
  bool grows = false;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = fmaxf(s[0][n][e], s[0][n][2 + e]);
#pragma unroll
      for (int m = 1; m < kRows; ++m) x = fmaxf(x, fmaxf(s[m][n][e], s[m][n][2 + e]));
      top[n][e] = x * scale_log2;
      grows |= top[n][e] > state.top[n][e] + kStale;
    }
  }
  if (__any_sync(~0u, grows)) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) raise_column(state, n, e, top[n][e]);
    }
  }
}

// Probabilities of 16 tokens and column tile n, as operand B of O^T += V^T P^T.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void probabilities(float scale_log2, State<kD, kTiles>& state, int n, const float (&s)[4],
                                              uint32_t (&p)[2]) {
  float x[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = exp2_fast(fmaf(s[e], scale_log2, -state.top[n][e & 1]));
  state.sum[n][0] += x[0] + x[2];
  state.sum[n][1] += x[1] + x[3];
  p[0] = transpose8x8(pack<T>(x[0], x[1]));
  p[1] = transpose8x8(pack<T>(x[2], x[3]));
}

}  // namespace hierasparse
