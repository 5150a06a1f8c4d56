// V: rows of the stored operand are channels; groups are four channels of a token, or four tokens of a channel.
//
// Row r of row tile 4c + j is channel 64c + 4r + j. So lane 4g + t, which has rows g and g + 8 of each tile, has of all
// four tiles of 64 channels whole quads of neighbouring channels: 8 bytes of a token's row.
#pragma once

#include "corrections.cuh"

namespace hierasparse::compress {

// Byte offset in a token's row of the quad that a lane has in half `half` (registers 0 and 2, or 1 and 3).
__device__ __forceinline__ uint32_t quad_offset(int c, int g, int half) { return 8 * (16 * c + g + 8 * half); }

// Of four tokens' two neighbouring channels the four values of one.
__device__ __forceinline__ uint2 four_of_tokens(const uint32_t (&x)[4], int channel) {
  const uint32_t which = channel == 0 ? kLows : kHighs;
  return make_uint2(__byte_perm(x[0], x[1], which), __byte_perm(x[2], x[3], which));
}

template <typename T>
__device__ __forceinline__ Chosen choose_four(uint2 four, float (&s)[4]) {
  unpack<T>(four, s);
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = score(s[i], 1.f);
  return choose(s);
}

// ---- groups along channels -------------------------------------------------------------------------------------
// A warp works on 16 tokens. In register i and half h of 64 channels c a lane has token 2t + 8 (i >> 1) + h and group
// 16 c + g + 8 (i & 1).
template <class S>
__device__ __forceinline__ void choose_values(Shared<S>& shared, const Unit& unit, int row, int token,
                                              bool count_losses, const LossUnit& loss_of) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, sub = token / kSubTokens;
  constexpr int kBlocks = S::kD / 64;
  // This lane's norm is that of token 2t + (g & 1) + 8 (g >> 1 & 1): of all values (g < 4), or the kept.
  RunningTree<kBlocks> norms;
  uint32_t losses = 0;
#pragma unroll 1
  for (int c = 0; c < kBlocks; ++c) {
    uint32_t word = 0;
    float norm = 0.f;  // of groups 16 c + g, then of 16 c + g + 8 as well
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const uint32_t quad = quad_offset(c, g, half);
      float squares[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // the lane's tokens: half i % 2 of register half + 2 * (i / 2)
        float s[4];
        const uint32_t from = row_offset<S>(row + 2 * t + i % 2 + 8 * (i / 2));
        const Chosen chosen = choose_four<typename S::T>(four_values(shared, from ^ quad), s);
        word |= chosen.code << (8 * half + 16 * (i / 2) + 4 * (i % 2));
        squares[i] = sum_of_squares(s);
        squares[i + 4] = kept_squares(chosen);
        if (count_losses) losses += loss(chosen, loss_of);
      }
      if (unit.rescale) {
        const float sum = reduce_scatter<8, 2>(squares, Add{});
        norm = half == 0 ? sum : add(norm, sum);
      }
    }
    shared.meta[sub][meta_word(4 * c + token % kSubTokens / 16, lane)] = word;
    norms.take(c, norm);
  }
  if (unit.rescale) {
    const float kept = __shfl_xor_sync(~0u, norms.sum, 16);
    if (g < 4) shared.factor[token + 2 * t + (g & 1) + 8 * (g >> 1)] = norm_factor(norms.sum, kept);
  }
  if (count_losses) add_losses(&shared.losses[sub], losses);
}

template <class S>
__device__ __forceinline__ void emit_kept_values(const Shared<S>& shared, const Unit& unit, int row, int token,
                                                 const Room& room, uint8_t* to) {
  using T = typename S::T;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, s = token % kSubTokens / 16;
  float factors[4];  // of the lane's tokens
#pragma unroll
  for (int i = 0; i < 4; ++i) factors[i] = unit.rescale ? shared.factor[token + 2 * t + i % 2 + 8 * (i / 2)] : 1.f;
#pragma unroll 1
  for (int c = 0; c < S::kD / 64; ++c) {
    const uint32_t word = shared.meta[token / kSubTokens][meta_word(4 * c + s, lane)];
    uint32_t planes[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pairs[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t from = row_offset<S>(row + 2 * t + h + 8 * (i >> 1));
        const uint2 four = four_values(shared, from ^ quad_offset(c, g, i & 1));
        pairs[h] = __byte_perm(four.x, four.y, pair_selector(word >> 4 * (2 * i + h) & 15));
        if (unit.rescale) {
          const float2 x = unpack<T>(pairs[h]);
          const float factor = factors[h + 2 * (i >> 1)];
          pairs[h] = pack<T>(corrected(x.x, factor, 0.f, room), corrected(x.y, factor, 0.f, room));
        }
      }
      planes[0][i] = __byte_perm(pairs[0], pairs[1], kLows);
      planes[1][i] = __byte_perm(pairs[0], pairs[1], kHighs);
    }
    uint8_t* out = to + ((c * 4 + s) * 2 * kWarp + lane) * 16;
    store16(out, planes[0][0], planes[0][1], planes[0][2], planes[0][3]);
    store16(out + kWarp * 16, planes[1][0], planes[1][1], planes[1][2], planes[1][3]);
  }
}

// ---- groups along tokens ---------------------------------------------------------------------------------------
// A warp works on 64 channels c of a sub-block. In register i of k-step s (32 tokens) a lane has of tile 4c + j channel
// 64 c + 4 (g + 8 (i & 1)) + j and group 8 s + t + 4 (i >> 1).
//
// Metadata and losses. `row` is the sub-block's first row in the tile.
template <class S>
__device__ __forceinline__ void choose_tokens(Shared<S>& shared, int row, int sub, int c, bool count_losses,
                                              const LossUnit& loss_of) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  uint32_t losses = 0;
#pragma unroll 1
  for (int part = 0; part < 4; ++part) {  // 2 * k-step + (register >> 1): its nibbles are metadata of lane 4g + part
    uint32_t nibbles[4] = {};             // of tiles j
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint2 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = four_values(shared, row_offset<S>(row + 4 * (t + 4 * part) + i) ^ quad_offset(c, g, half));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t two[4] = {j < 2 ? x[0].x : x[0].y, j < 2 ? x[1].x : x[1].y, j < 2 ? x[2].x : x[2].y,
                                 j < 2 ? x[3].x : x[3].y};
        float s[4];
        const Chosen chosen = choose_four<typename S::T>(four_of_tokens(two, j % 2), s);
        nibbles[j] |= chosen.code << (4 * t + 16 * half);
        if (count_losses) losses += loss(chosen, loss_of);
      }
    }
    shared.meta[sub][meta_word(4 * c + t, 4 * g + part)] = reduce_scatter<4, 0>(nibbles, Or{});  // of tile j = t
  }
  if (count_losses) add_losses(&shared.losses[sub], losses);
}

// Kept values of k-step `step` of channels 4r + 2 `pair` and + 1 of 64 channels c: tiles j = 2 pair and 2 pair + 1.
template <class S>
__device__ __forceinline__ void emit_kept_tokens(const Shared<S>& shared, const Unit& unit, int row, int sub, int c,
                                                 int step, int pair, const Room& room, uint8_t* to) {
  using T = typename S::T;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  uint32_t out[2][4];  // [tile][register]
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int q = i >> 1, half = i & 1;
    const uint32_t* words = shared.meta[sub] + meta_word(4 * c + 2 * pair, 4 * g + 2 * step + q);
    uint32_t x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t from = row_offset<S>(row + 4 * (8 * step + t + 4 * q) + k);
      x[k] = two_values(shared, from ^ (quad_offset(c, g, half) + 4 * pair));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint2 four = four_of_tokens(x, j);
      uint32_t two = __byte_perm(four.x, four.y, pair_selector(words[j] >> (4 * t + 16 * half) & 15));
      if (unit.rescale) {
        float values[4];
        unpack<T>(four, values);
        const float2 kept = unpack<T>(two);
        const float factor = sum_factor(values, kept.x, kept.y);
        two = pack<T>(corrected(kept.x, factor, 0.f, room), corrected(kept.y, factor, 0.f, room));
      }
      out[j][i] = two;
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    store16(to + (((4 * c + 2 * pair + j) * 2 + step) * kWarp + lane) * 16, out[j][0], out[j][1], out[j][2], out[j][3]);
  }
}

// ---- either axis -----------------------------------------------------------------------------------------------
// All values of 16 tokens, to the dense sub-block at `to`.
template <class S>
__device__ __forceinline__ void emit_dense_values(const Shared<S>& shared, int row, int token, uint8_t* to) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, s = token % kSubTokens / 16;
#pragma unroll 1
  for (int c = 0; c < S::kD / 64; ++c) {
    uint32_t planes[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t quad = quad_offset(c, g, i & 1);
      const int first = row + 2 * t + 8 * (i >> 1);
      const uint2 a = four_values(shared, row_offset<S>(first) ^ quad);
      const uint2 b = four_values(shared, row_offset<S>(first + 1) ^ quad);
      planes[0][i] = __byte_perm(a.x, b.x, kLows), planes[1][i] = __byte_perm(a.x, b.x, kHighs);
      planes[2][i] = __byte_perm(a.y, b.y, kLows), planes[3][i] = __byte_perm(a.y, b.y, kHighs);
    }
    uint8_t* out = to + ((c * 4 + s) * 4 * kWarp + lane) * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      store16(out + j * kWarp * 16, planes[j][0], planes[j][1], planes[j][2], planes[j][3]);
    }
  }
}

// The first `count` rows as they are: 16 bytes a thread.
template <class S>
__device__ __forceinline__ void emit_value_sinks(const Shared<S>& shared, int count, uint8_t* to) {
  constexpr int kPieces = S::kD / 8;
  for (int i = threadIdx.x; i < count * kPieces; i += S::kThreads) {
    const uint32_t from = row_offset<S>(i / kPieces) ^ i % kPieces * 16;
    *reinterpret_cast<uint4*>(to + i * 16) = *reinterpret_cast<const uint4*>(shared.tile + from);
  }
}

}  // namespace hierasparse::compress
