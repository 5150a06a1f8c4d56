// Values as operand A of O^T += V^T P^T where they are not stored as one: 2:4 along channels, and plain rows.
#pragma once

#include "softmax.cuh"

namespace hierasparse {

// 2:4 along channels, expanded: plane j of register i holds a value where that is its channel of the four, else 0.
// Nibble 2 i + h of `word` tells the places i0 | i1 << 2 of half h of register i of `first` and `second`.
__device__ __forceinline__ void expand_channels(const uint4& first, const uint4& second, uint32_t word,
                                                uint32_t (&plane)[4][4]) {
  // Conditions as the sign bits of bytes: byte i of `low` for half 0 of register i, of `high` for half 1.
  const uint32_t l0 = word << 7, l1 = word << 6, l2 = word << 5, l3 = word << 4;
  const uint32_t h0 = word << 3, h1 = word << 2, h2 = word << 1, h3 = word;
  const uint32_t v0[4] = {first.x, first.y, first.z, first.w}, v1[4] = {second.x, second.y, second.z, second.w};
  auto fill = [&](auto index) {
    constexpr int i = decltype(index)::value;
    constexpr int kHalves = (12 + i) << 12 | (12 + i) << 8 | (8 + i) << 4 | (8 + i);
    plane[0][i] = v0[i] & permute<kHalves>(~(l0 | l1), ~(h0 | h1));
    plane[1][i] = (v0[i] & permute<kHalves>(l0, h0)) | (v1[i] & permute<kHalves>(l2 & ~l3, h2 & ~h3));
    plane[2][i] = (v0[i] & permute<kHalves>(l1, h1)) | (v1[i] & permute<kHalves>(l3 & ~l2, h3 & ~h2));
    plane[3][i] = v1[i] & permute<kHalves>(l2 & l3, h2 & h3);
  };
  fill(std::integral_constant<int, 0>{});
  fill(std::integral_constant<int, 1>{});
  fill(std::integral_constant<int, 2>{});
  fill(std::integral_constant<int, 3>{});
}

// O^T += V^T P^T of 16 rows and 64 channels c: `piece(half, row)` gives 8 bytes, channels 64 c + 32 half + 4 g .. + 3.
template <typename T, int kD, int kTiles, typename Piece>
__device__ __forceinline__ void multiply_row_values(State<kD, kTiles>& state, int c, const uint32_t (&p)[kTiles][1][2],
                                                    Piece piece) {
  const int t = kFindAnew ? thread_index() % 4 : threadIdx.x % 4;
  uint2 v[2][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[half][i] = piece(half, 2 * t + 8 * (i / 2) + i % 2);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    constexpr int kLow = 0x5410, kHigh = 0x7632;  // halves of two neighbouring tokens side by side
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 even = v[i % 2][2 * (i / 2)], odd = v[i % 2][2 * (i / 2) + 1];
      const uint32_t x0 = j < 2 ? even.x : even.y, x1 = j < 2 ? odd.x : odd.y;
      a[i] = j % 2 ? permute<kHigh>(x0, x1) : permute<kLow>(x0, x1);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma<T>(state.o[4 * c + j][n], a[0], a[1], a[2], a[3], p[n][0][0], p[n][0][1]);
  }
}

}  // namespace hierasparse
