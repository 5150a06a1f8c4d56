// From scores to probabilities, at once for all row tiles of an item.
#pragma once

#include "../common/softmax.cuh"
#include "params.h"

namespace hierasparse::decode {

// Probabilities of kRows row tiles of 16 tokens, as operand B of O^T += V^T P^T: p[n][m] are the tokens of row tile m.
template <typename T, int kRows, int kD, int kTiles>
__device__ __forceinline__ void softmax(const DecodeParams& params, State<kD, kTiles>& state,
                                        const float (&s)[kRows][kTiles][4], uint32_t (&p)[kTiles][kRows][2]) {
  raise_maximum(params.scale_log2, state, s);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) probabilities<T>(params.scale_log2, state, n, s[m][n], p[n][m]);
  }
}

}  // namespace hierasparse::decode
