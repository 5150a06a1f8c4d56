// V: rows of the stored operand are channels; groups are four channels of a token, or four tokens of a channel.
//
// Row r of row tile 4c + j is channel 64c + 4r + j. So lane 4g + t, which has rows g and g + 8 of each tile, has of all
// four tiles of 64 channels whole quads of neighbouring channels: 8 bytes of a token's row.
#pragma once

#include "corrections.cuh"

namespace hierasparse::compress {

// The four values of a token that a lane has of 64 channels c, in half `half` (registers 0 and 2, or 1 and 3).
template <class S>
__device__ __forceinline__ uint2 quad(const Shared<S>& shared, int row, int c, int g, int half) {
  return four_values(shared, (row_offset<S>(row) ^ 8 * (g + 8 * half)) + 128 * c);
}

// Two tokens' four channels, channel by channel.
__device__ __forceinline__ void channels_of_two(uint2 a, uint2 b, uint32_t (&x)[4]) {
  x[0] = __byte_perm(a.x, b.x, kLows), x[1] = __byte_perm(a.x, b.x, kHighs);
  x[2] = __byte_perm(a.y, b.y, kLows), x[3] = __byte_perm(a.y, b.y, kHighs);
}

// ---- what sub-blocks would lose
// Groups along channels, of the tile whose first row is `first`.
template <bool kSimple, class S>
__device__ __forceinline__ void count_value_losses(Shared<S>& shared, int first,
                                                   const PairLossUnit<typename S::T>& unit) {
  const typename Tile<S>::Pieces mine;
#pragma unroll 1
  for (int row = 0; row < S::kTile; row += kSubTokens) {
    uint32_t losses = 0;
#pragma unroll(kSimple ? 4 : 1)
    for (int i = 0; i < kSubTokens; i += Tile<S>::kRows) {
      const uint4 x = eight_values(shared, mine.offset(row + i));
      losses += unit.template losses<kSimple>(dropped_of_four(make_uint2(x.x, x.y)));
      losses += unit.template losses<kSimple>(dropped_of_four(make_uint2(x.z, x.w)));
    }
    add_losses(&shared.losses[(first + row) / kSubTokens], losses);
  }
}

// Groups along tokens: the 16 tokens from row `row` on.
template <bool kSimple, class S>
__device__ __forceinline__ void count_token_losses(Shared<S>& shared, int row, int sub,
                                                   const PairLossUnit<typename S::T>& unit) {
  uint32_t losses = 0;
#pragma unroll 1
  for (int at = thread_index() % kWarp; at < 4 * S::kQuads; at += kWarp) {
    uint2 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = four_values(shared, row_offset<S>(row + at / S::kQuads * 4 + i) ^ at % S::kQuads * 8);
      x[i].x &= kMagnitudes, x[i].y &= kMagnitudes;
    }
    const uint2 low = dropped_of_two(x[0].x, x[1].x, x[2].x, x[3].x);
    const uint2 high = dropped_of_two(x[0].y, x[1].y, x[2].y, x[3].y);
    losses += unit.template losses<kSimple>(low.x) + unit.template losses<kSimple>(low.y);
    losses += unit.template losses<kSimple>(high.x) + unit.template losses<kSimple>(high.y);
  }
  add_losses(&shared.losses[sub], losses);
}

// ---- groups along channels -------------------------------------------------------------------------------------
// A warp works on 16 tokens. In register i and half h of 64 channels c a lane has token 2t + 8 (i >> 1) + h and group
// 16 c + g + 8 (i & 1).
//
// Kept values to their sparse sub-block; metadata to shared memory.
template <class S>
__device__ __forceinline__ void emit_kept_values(Shared<S>& shared, const Unit& unit, int row, int token,
                                                 const Room& room) {
  using T = typename S::T;
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4, s = token % kSubTokens / 16;
  constexpr int kBlocks = S::kD / 64;
  uint32_t planes[kBlocks][2][4];
  float norms[kBlocks];  // this lane's are of token 2t + (g & 1) + 8 (g >> 1 & 1): of all values (g < 4), or the kept
#pragma unroll
  for (int c = 0; c < kBlocks; ++c) {
    uint32_t codes[4];
    float norm[2] = {};  // of groups 16 c + g, and of 16 c + g + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float squares[8];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int first = row + 2 * t + 8 * q, i = half + 2 * q;
        uint32_t x[4];
        channels_of_two(quad(shared, first, c, g, half), quad(shared, first + 1, c, g, half), x);
        const ChosenPairs chosen = choose_pairs<T>(x);
        planes[c][0][i] = chosen.first, planes[c][1][i] = chosen.second, codes[i] = chosen.code;
        const float2 all[4] = {unpack<T>(x[0]), unpack<T>(x[1]), unpack<T>(x[2]), unpack<T>(x[3])};
        const float2 kept[2] = {unpack<T>(chosen.first), unpack<T>(chosen.second)};
        squares[2 * q] = sum_of_squares({all[0].x, all[1].x, all[2].x, all[3].x});
        squares[2 * q + 1] = sum_of_squares({all[0].y, all[1].y, all[2].y, all[3].y});
        squares[2 * q + 4] = sum_of_squares(kept[0].x, kept[1].x);
        squares[2 * q + 5] = sum_of_squares(kept[0].y, kept[1].y);
      }
      if (unit.rescale) norm[half] = reduce_scatter<8, 2>(squares, Add{});
    }
    // Byte i: the nibbles of register i.
    const uint32_t low = codes[0] | codes[1] << 8, high = codes[2] | codes[3] << 8;
    shared.meta[token / kSubTokens][meta_word(4 * c + s, lane)] =
        __byte_perm(low, high, kLows) | __byte_perm(low, high, kHighs);
    norms[c] = add(norm[0], norm[1]);
  }
  if (unit.rescale) {
    const float norm = tree_sum<kBlocks>(norms);
    const float factor = norm_factor(norm, __shfl_xor_sync(~0u, norm, 16));  // of the lanes with g < 4
    const bool calm = __all_sync(~0u, norm <= S::kCalmNorm);                 // a NaN is not
    float factors[4];                                                        // of the lane's tokens
#pragma unroll
    for (int i = 0; i < 4; ++i) factors[i] = __shfl_sync(~0u, factor, 4 * i + t);
    auto change = [&](auto enlarged) {
#pragma unroll
      for (int i = 0; i < kBlocks * 8; ++i) {
        uint32_t& two = planes[i / 8][i / 4 % 2][i % 4];
        const float2 x = unpack<T>(two);
        two = pack<T>(enlarged(x.x, factors[i % 4 / 2 * 2]), enlarged(x.y, factors[i % 4 / 2 * 2 + 1]));
      }
    };
    if (calm) {
      change([](float x, float factor) { return mul(x, factor); });
    } else {
      change([&](float x, float factor) { return corrected(x, factor, 0.f, room); });
    }
  }
  uint8_t* to = unit.region + shared.place[token / kSubTokens];
#pragma unroll
  for (int c = 0; c < kBlocks; ++c) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t(&x)[4] = planes[c][j];
      store16(to + ((c * 4 + s) * 2 + j) * kWarp * 16 + thread_index() % kWarp * 16, x[0], x[1], x[2], x[3]);
    }
  }
}

// ---- groups along tokens ---------------------------------------------------------------------------------------
// A warp works on 64 channels c and 32 tokens, k-step `step`, of a sub-block. In register i a lane has of tile 4c + j
// channel 64 c + 4 (g + 8 (i & 1)) + j and group 8 step + t + 4 (i >> 1).
//
// Kept values to the sparse sub-block at `to`; metadata to shared memory. `row` is the sub-block's first row in the
// tile.
template <class S>
__device__ __forceinline__ void emit_kept_tokens(Shared<S>& shared, const Unit& unit, int row, int sub, int c, int step,
                                                 const Room& room, uint8_t* to) {
  using T = typename S::T;
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4;
  uint32_t out[4][4];  // [tile j][register]
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    uint32_t nibbles[4] = {};  // of tiles j
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint2 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = quad(shared, row + 4 * (8 * step + t + 4 * q) + i, c, g, half);
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {  // channels j and j + 1 lie in one register
        uint32_t four[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = j == 0 ? x[i].x : x[i].y;
        const ChosenPairs chosen = choose_pairs<T>(four);
        nibbles[j] |= (chosen.code & 15) << (4 * t + 16 * half);
        nibbles[j + 1] |= (chosen.code >> 20) << (4 * t + 16 * half);
        uint32_t two[2] = {__byte_perm(chosen.first, chosen.second, kLows),
                           __byte_perm(chosen.first, chosen.second, kHighs)};
        if (unit.rescale) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float values[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) values[i] = k == 0 ? unpack<T>(four[i]).x : unpack<T>(four[i]).y;
            const float2 kept = unpack<T>(two[k]);
            const float factor = sum_factor(values, kept.x, kept.y);
            two[k] = pack<T>(corrected(kept.x, factor, 0.f, room), corrected(kept.y, factor, 0.f, room));
          }
        }
        out[j][half + 2 * q] = two[0], out[j + 1][half + 2 * q] = two[1];
      }
    }
    // Of lane 4g + 2 step + q, which has 16 tokens; tile j = t.
    shared.meta[sub][meta_word(4 * c + t, 4 * g + 2 * step + q)] = reduce_scatter<4, 0>(nibbles, Or{});
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    store16(to + (((4 * c + j) * 2 + step) * kWarp + lane) * 16, out[j][0], out[j][1], out[j][2], out[j][3]);
  }
}

// ---- either axis -----------------------------------------------------------------------------------------------
// All values of 16 tokens, to the dense sub-block at `to`.
template <class S>
__device__ __forceinline__ void emit_dense_values(const Shared<S>& shared, int row, int token, uint8_t* to) {
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4, s = token % kSubTokens / 16;
#pragma unroll 1
  for (int c = 0; c < S::kD / 64; ++c) {
    uint32_t planes[4][4];  // [register][plane]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = row + 2 * t + 8 * (i >> 1);
      channels_of_two(quad(shared, first, c, g, i & 1), quad(shared, first + 1, c, g, i & 1), planes[i]);
    }
    uint8_t* out = to + ((c * 4 + s) * 4 * kWarp + lane) * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      store16(out + j * kWarp * 16, planes[0][j], planes[1][j], planes[2][j], planes[3][j]);
    }
  }
}

// The first `count` rows as they are: 16 bytes a thread.
template <class S>
__device__ __forceinline__ void emit_value_sinks(const Shared<S>& shared, int count, uint8_t* to) {
  constexpr int kPieces = S::kD / 8;
  for (int i = thread_index(); i < count * kPieces; i += S::kThreads) {
    const uint32_t from = row_offset<S>(i / kPieces) ^ i % kPieces * 16;
    store16(to + i * 16, eight_values(shared, from));
  }
}

}  // namespace hierasparse::compress
