// K: rows are tokens, groups are four places of the channel order.
//
// A warp works on a row tile of 16 tokens. As in the stored fragments, lane 4g + t has in register i of k-step s (32
// channels) row g + 8 (i & 1) and group 8 s + t + 4 (i >> 1); so what it stores of them is 16 bytes of its own.
#pragma once

#include "corrections.cuh"

namespace hierasparse::compress {

// A group of a row: differences from the mean.
template <class S>
__device__ __forceinline__ void load_group(const Shared<S>& shared, uint32_t row, int group, float (&x)[4]) {
  const uint2 at = shared.channels[group];
  const float4 mean = shared.mean[group];
  auto value = [&](uint32_t channel) { return unpack<typename S::T>(value_bits(shared, row ^ channel)).x; };
  x[0] = add(value(at.x & 0xffff), -mean.x), x[1] = add(value(at.x >> 16), -mean.y);
  x[2] = add(value(at.y & 0xffff), -mean.z), x[3] = add(value(at.y >> 16), -mean.w);
}
template <class S>
__device__ __forceinline__ void score_group(const Shared<S>& shared, int group, const float (&x)[4], float (&s)[4]) {
  const float4 weight = shared.weight[group];
  s[0] = score(x[0], weight.x), s[1] = score(x[1], weight.y);
  s[2] = score(x[2], weight.z), s[3] = score(x[3], weight.w);
}

// What the row tile that begins at row `row` of the tile, token `token` of the page, would lose.
template <class S>
__device__ __forceinline__ void count_key_losses(Shared<S>& shared, int row, int token, const LossUnit& loss_of) {
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4;
  uint32_t losses = 0;
#pragma unroll 1
  for (int group = t; group < S::kQuads; group += 4) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x[4], s[4];
      load_group(shared, row_offset<S>(row + g + 8 * r), group, x);
      score_group(shared, group, x, s);
      losses += loss(choose(s, x), loss_of);
    }
  }
  add_losses(&shared.losses[token / kSubTokens], losses);
}

// Kept values again, from metadata and the tile: as they are, or within the room.
template <class S>
__device__ __forceinline__ void emit_careful_keys(const Shared<S>& shared, int row, int token,
                                                  const float (&factors)[2], bool as_they_are, const Room& room,
                                                  uint8_t* to) {
  using T = typename S::T;
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4, tile = token % kSubTokens / 16;
  const uint32_t* meta = shared.meta[token / kSubTokens];
  const uint16_t* channels = reinterpret_cast<const uint16_t*>(shared.channels);
  const float* mean = reinterpret_cast<const float*>(shared.mean);
#pragma unroll 1
  for (int step = 0; step < S::kD / 32; ++step) {
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i & 1, q = i >> 1, group = 8 * step + t + 4 * q;
      const uint32_t from = row_offset<S>(row + g + 8 * r);
      const uint32_t word = meta[meta_word(tile * (S::kD / 64) + step / 2, 4 * g + 2 * (step & 1) + q)];
      const uint32_t code = word >> (4 * t + 16 * r);
      const int first = 4 * group + (code & 3), second = 4 * group + (code >> 2 & 3);
      const uint32_t low = value_bits(shared, from ^ channels[first]);
      out[i] = __byte_perm(low, value_bits(shared, from ^ channels[second]), kLows);
      if (!as_they_are) {
        const float2 x = unpack<T>(out[i]);
        out[i] = pack<T>(corrected(add(x.x, -mean[first]), factors[r], mean[first], room),
                         corrected(add(x.y, -mean[second]), factors[r], mean[second], room));
      }
    }
    store16(to + step * kWarp * 16, out[0], out[1], out[2], out[3]);
  }
}

// Kept values of a row tile, to the sparse sub-block at `to`; metadata to shared memory.
template <class S>
__device__ __forceinline__ void emit_kept_keys(Shared<S>& shared, const Unit& unit, int row, int token, bool mean,
                                               const Room& room, uint8_t* to) {
  using T = typename S::T;
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4, tile = token % kSubTokens / 16;
  const uint32_t rows[2] = {row_offset<S>(row + g), row_offset<S>(row + g + 8)};
  const uint32_t place[2] = {1u << 4 * t, 1u << (4 * t + 16)};  // of a row's nibble: a product adds it at once
  constexpr int kPairs = S::kD / 64;                            // of k-steps
  float kept[kPairs][2][4][2];                                  // [pair][k-step of it][register]
  float norms[kPairs];  // this lane's are of row g + 8 (t & 1): of all values (t < 2), or the kept
  float sizes = 0.f;    // of all kept values
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    uint32_t nibbles[4] = {};  // for the metadata words of the four lanes of a row, which have 16 columns each
    float norm[2] = {};
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      float squares[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i & 1, q = i >> 1, group = 8 * (2 * pair + odd) + t + 4 * q;
        float x[4], s[4];
        load_group(shared, rows[r], group, x);
        score_group(shared, group, x, s);
        const Chosen chosen = choose(s, x);
        nibbles[2 * odd + q] += chosen.code * place[r];
        sizes = add(sizes, add(fabsf(chosen.value[0]), fabsf(chosen.value[1])));
        kept[pair][odd][i][0] = chosen.value[0], kept[pair][odd][i][1] = chosen.value[1];
        squares[q][r] = sum_of_squares(s), squares[q][r + 2] = kept_squares(chosen);
      }
      if (unit.rescale) {
        const float first = reduce_scatter<4, 0>(squares[0], Add{});
        norm[odd] = add(first, reduce_scatter<4, 0>(squares[1], Add{}));
      }
    }
    shared.meta[token / kSubTokens][meta_word(tile * kPairs + pair, lane)] = reduce_scatter<4, 0>(nibbles, Or{});
    norms[pair] = add(norm[0], norm[1]);
  }
  float factors[2] = {1.f, 1.f};
  if (unit.rescale) {
    const float norm = tree_sum<kPairs>(norms);
    const float factor = norm_factor(norm, __shfl_xor_sync(~0u, norm, 2));  // of the lanes with t < 2
    factors[0] = __shfl_sync(~0u, factor, 4 * g), factors[1] = __shfl_sync(~0u, factor, 4 * g + 1);
  }
  to += (tile * (S::kD / 32) * kWarp + lane) * 16;
  const bool as_they_are = !mean && !unit.rescale;
  if (as_they_are || !__all_sync(~0u, sizes <= S::kCalm && shared.wild == 0)) {  // a NaN is not calm either
    __syncwarp();                                                                // the metadata of all lanes are there
    return emit_careful_keys(shared, row, token, factors, as_they_are, room, to);
  }
#pragma unroll
  for (int step = 0; step < S::kD / 32; ++step) {
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&x)[2] = kept[step / 2][step % 2][i];
      out[i] = pack<T>(mul(x[0], factors[i & 1]), mul(x[1], factors[i & 1]));
    }
    store16(to + step * kWarp * 16, out[0], out[1], out[2], out[3]);
  }
}

// The same where there are no weights, and nothing is enlarged. Returns whether values were finite and far from the
// limits of their type; if not, what was written is not valid.
template <class S>
__device__ __forceinline__ bool emit_plain_keys(Shared<S>& shared, int row, int token, uint8_t* to) {
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4, tile = token % kSubTokens / 16;
  const uint32_t rows[2] = {row_offset<S>(row + g), row_offset<S>(row + g + 8)};
  const uint32_t place[2] = {1u << 4 * t, 1u << (4 * t + 16)};
  float sizes[4] = {};  // of all values
  to += (tile * (S::kD / 32) * kWarp + lane) * 16;
#pragma unroll 1
  for (int pair = 0; pair < S::kD / 64; ++pair) {
    uint32_t nibbles[4] = {};
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      uint32_t out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i & 1, q = i >> 1;
        float x[4], s[4];
        load_group(shared, rows[r], 8 * (2 * pair + odd) + t + 4 * q, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) s[j] = fabsf(x[j]), sizes[j] = add(sizes[j], s[j]);
        const Chosen chosen = choose(s, x);
        nibbles[2 * odd + q] += chosen.code * place[r];
        out[i] = pack<typename S::T>(chosen.value[0], chosen.value[1]);
      }
      store16(to + (2 * pair + odd) * kWarp * 16, out[0], out[1], out[2], out[3]);
    }
    shared.meta[token / kSubTokens][meta_word(tile * (S::kD / 64) + pair, lane)] = reduce_scatter<4, 0>(nibbles, Or{});
  }
  return __all_sync(~0u, tree_sum<4>(sizes) <= S::kCalm && shared.wild == 0);  // a NaN is not
}

// All values of a row tile, to the dense sub-block at `to`: m16n8k16 fragments, whose k-step is 16 channels.
template <class S>
__device__ __forceinline__ void emit_dense_keys(const Shared<S>& shared, int row, int token, uint8_t* to) {
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4, tile = token % kSubTokens / 16;
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
  for (int i = thread_index(); i < count * kPieces; i += S::kThreads) {
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
