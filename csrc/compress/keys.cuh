// K: rows are tokens, groups are four places of the channel order.
//
// A warp works on a row tile of 16 tokens. As in the stored fragments, lane 4g + t has in register i of k-step s (32
// channels) row g + 8 (i & 1) and group 8 s + t + 4 (i >> 1); so what it stores of them is 16 bytes of its own.
#pragma once

#include "corrections.cuh"

namespace hierasparse::compress {

// Metadata, norms and losses of the row tile that begins at row `row` of the tile, token `token` of the page.
template <class S>
__device__ __forceinline__ void choose_keys(Shared<S>& shared, const Unit& unit, int row, int token, bool count_losses,
                                            const LossUnit& loss_of) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, sub = token / kSubTokens;
  const uint32_t rows[2] = {row_offset<S>(row + g), row_offset<S>(row + g + 8)};
  constexpr int kPairs = S::kD / 64;  // of k-steps
  RunningTree<kPairs> norms;          // this lane's is that of row g + 8 (t & 1): of all values (t < 2), or the kept
  uint32_t losses = 0;
#pragma unroll 1
  for (int pair = 0; pair < kPairs; ++pair) {
    uint32_t word = 0;
    float norm = 0.f;  // of the pair's first k-step, then of both
#pragma unroll 1
    for (int odd = 0; odd < 2; ++odd) {
      uint32_t nibbles[2];  // for the metadata words of two lanes of the four, which have 16 logical columns each
      float squares[2][4];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int group = 8 * (2 * pair + odd) + t + 4 * q;
        const uint2 at = shared.channels[group];
        const float4 mean = shared.mean[group], weight = shared.weight[group];
        nibbles[q] = 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          auto value = [&](uint32_t channel) { return unpack<typename S::T>(value_bits(shared, rows[r] ^ channel)).x; };
          const float s[4] = {
              score(add(value(at.x & 0xffff), -mean.x), weight.x), score(add(value(at.x >> 16), -mean.y), weight.y),
              score(add(value(at.y & 0xffff), -mean.z), weight.z), score(add(value(at.y >> 16), -mean.w), weight.w)};
          const Chosen chosen = choose(s);
          nibbles[q] |= chosen.code << (4 * t + 16 * r);
          squares[q][r] = sum_of_squares(s);
          squares[q][r + 2] = kept_squares(chosen);
          if (count_losses) losses += loss(chosen, loss_of);
        }
      }
      // Lanes 2 odd and 2 odd + 1 of the four get the words.
      uint32_t both = reduce_scatter<2, 0>(nibbles, Or{});
      both |= __shfl_xor_sync(~0u, both, 2);
      if (t / 2 == odd) word = both;
      if (unit.rescale) {
        const float first = reduce_scatter<4, 0>(squares[0], Add{});
        const float sum = add(first, reduce_scatter<4, 0>(squares[1], Add{}));
        norm = odd == 0 ? sum : add(norm, sum);
      }
    }
    shared.meta[sub][meta_word(token % kSubTokens / 16 * kPairs + pair, lane)] = word;
    norms.take(pair, norm);
  }
  if (unit.rescale) {
    const float kept = __shfl_xor_sync(~0u, norms.sum, 2);
    if (t < 2) shared.factor[token + g + 8 * t] = norm_factor(norms.sum, kept);
  }
  if (count_losses) add_losses(&shared.losses[sub], losses);
}

// Kept values of a row tile, to the sparse sub-block at `to`.
template <class S>
__device__ __forceinline__ void emit_kept_keys(const Shared<S>& shared, const Unit& unit, int row, int token,
                                               bool as_they_are, const Room& room, uint8_t* to) {
  using T = typename S::T;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, tile = token % kSubTokens / 16;
  const uint32_t rows[2] = {row_offset<S>(row + g), row_offset<S>(row + g + 8)};
  const float factors[2] = {unit.rescale ? shared.factor[token + g] : 1.f,
                            unit.rescale ? shared.factor[token + g + 8] : 1.f};
  const uint32_t* meta = shared.meta[token / kSubTokens];
  const uint16_t* channels = reinterpret_cast<const uint16_t*>(shared.channels);
  const float* mean = reinterpret_cast<const float*>(shared.mean);
  to += (tile * (S::kD / 32) * kWarp + lane) * 16;
#pragma unroll 2
  for (int step = 0; step < S::kD / 32; ++step) {
    uint32_t out[4];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int group = 8 * step + t + 4 * q;
      const uint32_t word = meta[meta_word(tile * (S::kD / 64) + step / 2, 4 * g + 2 * (step & 1) + q)] >> 4 * t;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int first = 4 * group + (word >> 16 * r & 3), second = 4 * group + (word >> (16 * r + 2) & 3);
        const uint32_t low = value_bits(shared, rows[r] ^ channels[first]);
        const uint32_t two = __byte_perm(low, value_bits(shared, rows[r] ^ channels[second]), kLows);
        out[r + 2 * q] = two;
        if (!as_they_are) {
          const float2 x = unpack<T>(two);
          out[r + 2 * q] = pack<T>(corrected(add(x.x, -mean[first]), factors[r], mean[first], room),
                                   corrected(add(x.y, -mean[second]), factors[r], mean[second], room));
        }
      }
    }
    store16(to + step * kWarp * 16, out[0], out[1], out[2], out[3]);
  }
}

// All values of a row tile, to the dense sub-block at `to`: m16n8k16 fragments, whose k-step is 16 channels.
template <class S>
__device__ __forceinline__ void emit_dense_keys(const Shared<S>& shared, int row, int token, uint8_t* to) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, tile = token % kSubTokens / 16;
  const uint32_t rows[2] = {row_offset<S>(row + g), row_offset<S>(row + g + 8)};
  const uint32_t* channels = reinterpret_cast<const uint32_t*>(shared.channels);  // two places each
  to += (tile * (S::kD / 16) * kWarp + lane) * 16;
#pragma unroll 2
  for (int step = 0; step < S::kD / 16; ++step) {
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = channels[8 * step + t + 4 * (i >> 1)], from = rows[i & 1];
      const uint32_t low = value_bits(shared, from ^ (at & 0xffff));
      out[i] = __byte_perm(low, value_bits(shared, from ^ at >> 16), kLows);
    }
    store16(to + step * kWarp * 16, out[0], out[1], out[2], out[3]);
  }
}

// The first `count` rows in operand order: 16 bytes a thread.
template <class S>
__device__ __forceinline__ void emit_key_sinks(const Shared<S>& shared, int count, uint8_t* to) {
  const uint16_t* channels = reinterpret_cast<const uint16_t*>(shared.channels);
  constexpr int kPieces = S::kD / 8;
  for (int i = threadIdx.x; i < count * kPieces; i += S::kThreads) {
    const uint32_t from = row_offset<S>(i / kPieces);
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int position = row_position(i % kPieces * 8 + 2 * j);  // and the next
      const uint32_t low = value_bits(shared, from ^ channels[position]);
      out[j] = __byte_perm(low, value_bits(shared, from ^ channels[position + 1]), kLows);
    }
    store16(to + i * 16, out[0], out[1], out[2], out[3]);
  }
}

}  // namespace hierasparse::compress
