// Operand A of dense products, where it is not stored as one: 2:4 values expanded in registers, and plain rows of V.
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

// 2:4 keys of 16 rows and 32 channels, expanded for two products of 16 channels each.  Columns 2 t, 2 t + 1, 2 t + 8
// and 2 t + 9 of product h are channels 16 h + 4 t .. 16 h + 4 t + 3, for operand B, too.
//
// Register i of the operand `kept` has two of the channels of group t + 4 (i >> 1), row g + 8 (i & 1).  Which ones,
// i0 | i1 << 2, tells nibble t of the half i & 1 of `first` (groups 0 to 3) or `second` (4 to 7).
__device__ __forceinline__ void expand_keys(const uint4& kept, uint32_t first, uint32_t second, int t,
                                            uint32_t (&a)[2][4]) {
  // Nibbles of registers 0 and 2 side by side, and those of 1 and 3; x ^ x >> 1 tells the six places apart by 3 bits.
  const uint32_t both = (rotate_right(first, 4 * t) & 0x000f000f) | (rotate_right(second, 4 * t - 4) & ~0x000f000f);
  const uint32_t places = permute<0x20>((both ^ both >> 1) & 0x77777777, 0);
  // What each of the four channels is: a selector of the first kept value (0x10), of the second (0x32), or zeros
  // (0x44). Byte p of a table is for place p: 1 (2, 3), 2 (0, 3), 3 (1, 3), 4 (0, 2), 5 (1, 2), 6 (0, 1).
  const uint32_t channel0 = permute(0x44104410, 0x44104410, places), channel1 = permute(0x10444444, 0x44321044, places);
  const uint32_t channel2 = permute(0x44441044, 0x44443232, places), channel3 = permute(0x32323244, 0x44444444, places);
  auto expand = [&](auto index, uint32_t values) {
    constexpr int i = decltype(index)::value, kPlace = i / 2 + 2 * (i % 2), kTwo = (kPlace + 4) << 4 | kPlace;
    a[i / 2][i % 2] = permute(values, 0, permute<kTwo>(channel0, channel1));
    a[i / 2][i % 2 + 2] = permute(values, 0, permute<kTwo>(channel2, channel3));
  };
  expand(std::integral_constant<int, 0>{}, kept.x);
  expand(std::integral_constant<int, 1>{}, kept.y);
  expand(std::integral_constant<int, 2>{}, kept.z);
  expand(std::integral_constant<int, 3>{}, kept.w);
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
