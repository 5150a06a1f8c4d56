// Compressed pages to dense rows, bound by bytes: what is read and written is moved 16 bytes at a time.
//
// A CTA takes one sub-block of one side of one page and head.  Its warps read the values in the order in which they are
// stored, scatter them into rows in shared memory, and then write the rows, with K's mean added on the way out. Further
// CTAs each copy 64 tokens of a window block, as they are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace hierasparse::expand {

constexpr int kWarps = 4;
constexpr int kThreads = kWarp * kWarps;
constexpr int kParts = 2 * kSubs;  // sub-blocks of K, then of V

__device__ __forceinline__ uint4 load16(const uint8_t* p) { return __ldcs(reinterpret_cast<const uint4*>(p)); }
__device__ __forceinline__ uint32_t load4(const uint8_t* p) { return __ldcs(reinterpret_cast<const uint32_t*>(p)); }

// Register i of a fragment, and its half h.
__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ uint32_t half(const uint4& v, int i, int h) { return word(v, i) >> 16 * h & 0xffff; }

// Four values, of which the nibble `i0 | i1 << 2` says where the two kept ones lie; the others are zero.
__device__ __forceinline__ uint2 group_of(uint32_t first, uint32_t second, uint32_t nibble) {
  const uint64_t four = uint64_t{first} << 16 * (nibble & 3) | uint64_t{second} << 16 * (nibble >> 2 & 3);
  return {static_cast<uint32_t>(four), static_cast<uint32_t>(four >> 32)};
}

// Two values of the page's dtype plus two floats, each rounded once.
template <typename T>
__device__ __forceinline__ uint32_t add2(uint32_t pair, float low, float high);
template <>
__device__ __forceinline__ uint32_t add2<__nv_bfloat16>(uint32_t pair, float low, float high) {
  const __nv_bfloat162 sum =
      __floats2bfloat162_rn(__uint_as_float(pair << 16) + low, __uint_as_float(pair & 0xffff0000u) + high);
  return reinterpret_cast<const uint32_t&>(sum);
}
template <>
__device__ __forceinline__ uint32_t add2<__half>(uint32_t pair, float low, float high) {
  const float2 x = __half22float2(reinterpret_cast<const __half2&>(pair));
  const __half2 sum = __floats2half2_rn(x.x + low, x.y + high);
  return reinterpret_cast<const uint32_t&>(sum);
}

template <typename T>
__device__ __forceinline__ float to_float(uint16_t bits);
template <>
__device__ __forceinline__ float to_float<__nv_bfloat16>(uint16_t bits) {
  return __uint_as_float(uint32_t{bits} << 16);
}
template <>
__device__ __forceinline__ float to_float<__half>(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

// Rows of a sub-block in shared memory.  The pad of 16 bytes puts the rows that a warp writes at once into other banks.
template <int D>
struct Rows {
  static constexpr int kStride = 2 * D + 16;
  uint8_t* base;
  __device__ uint8_t* at(int token, int channel) const { return base + token * kStride + 2 * channel; }
  __device__ void put(int token, int channel, uint32_t value) const {
    *reinterpret_cast<uint16_t*>(at(token, channel)) = static_cast<uint16_t>(value);
  }
  __device__ void put4(int token, int channel, uint2 four) const {
    *reinterpret_cast<uint2*>(at(token, channel)) = four;
  }
};

// Warp m has the tokens of row tile m; `order` has the channel at each place of the channel order.
template <int D>
__device__ __forceinline__ void scatter_sparse_k(const uint8_t* sub, Rows<D> rows, const uint16_t* order, int m,
                                                 int lane) {
  constexpr int kSteps = D / 32, kPairs = D / 64;
  const int g = lane / 4, t = lane % 4;
  uint4 kept[kSteps];
  uint32_t meta[kPairs];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) kept[s] = load16(sub + ((m * kSteps + s) * kWarp + lane) * 16);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) meta[p] = load4(sub + 64 * D + meta_word(m * kPairs + p, lane) * 4);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    // The nibbles of groups 0-3 of the step are in lane 4g + 2 (s & 1), those of groups 4-7 in the next one.
    const int source = 4 * g + 2 * (s & 1);
    const uint32_t words[2] = {__shfl_sync(~0u, meta[s / 2], source), __shfl_sync(~0u, meta[s / 2], source + 1)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 16 * m + g + 8 * (i & 1), place = 4 * (8 * s + t + 4 * (i >> 1));
      const uint32_t nibble = words[i >> 1] >> 4 * (t + 4 * (i & 1));
      const uint2 four = group_of(half(kept[s], i, 0), half(kept[s], i, 1), nibble);
      const uint2 to = *reinterpret_cast<const uint2*>(order + place);
      rows.put(token, to.x & 0xffff, four.x);
      rows.put(token, to.x >> 16, four.x >> 16);
      rows.put(token, to.y & 0xffff, four.y);
      rows.put(token, to.y >> 16, four.y >> 16);
    }
  }
}

template <int D>
__device__ __forceinline__ void scatter_dense_k(const uint8_t* sub, Rows<D> rows, const uint16_t* order, int m,
                                                int lane) {
  constexpr int kSteps = D / 16, kBatch = 4;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int first = 0; first < kSteps; first += kBatch) {
    uint4 values[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) values[b] = load16(sub + ((m * kSteps + first + b) * kWarp + lane) * 16);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 16 * m + g + 8 * (i & 1), place = 16 * (first + b) + 2 * t + 8 * (i >> 1);
        const uint32_t to = *reinterpret_cast<const uint32_t*>(order + place);
        rows.put(token, to & 0xffff, half(values[b], i, 0));
        rows.put(token, to >> 16, half(values[b], i, 1));
      }
    }
  }
}

// Groups along channels.  Warp s has 16 tokens.
template <int D>
__device__ __forceinline__ void scatter_channel_v(const uint8_t* sub, Rows<D> rows, int s, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < D / 64; ++c) {
    const uint4 first = load16(sub + (((c * 4 + s) * 2 + 0) * kWarp + lane) * 16);
    const uint4 second = load16(sub + (((c * 4 + s) * 2 + 1) * kWarp + lane) * 16);
    const uint32_t meta = load4(sub + 64 * D + meta_word(4 * c + s, lane) * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = 16 * s + 2 * t + 8 * (i >> 1) + h, channel = 64 * c + 4 * (g + 8 * (i & 1));
        rows.put4(token, channel, group_of(half(first, i, h), half(second, i, h), meta >> 4 * (2 * i + h)));
      }
    }
  }
}

// Groups along tokens.  A unit is 64 channels of 32 tokens: one fragment of each of the four row tiles that share
// lanes.
template <int D>
__device__ __forceinline__ void scatter_token_v(const uint8_t* sub, Rows<D> rows, int warp, int lane) {
  constexpr int kUnits = D / 64 * 2;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int unit = warp; unit < kUnits; unit += kWarps) {
    const int c = unit / 2, f = unit % 2;
    uint4 kept[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) kept[j] = load16(sub + (((4 * c + j) * 2 + f) * kWarp + lane) * 16);
    const uint4 meta = load16(sub + 64 * D + meta_word(4 * c, lane) * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int group = 8 * f + t + 4 * (i >> 1), channel = 64 * c + 4 * (g + 8 * (i & 1));
      uint2 four[4];  // of channel j, its tokens
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t nibbles = __shfl_sync(~0u, word(meta, j), 4 * g + 2 * f + (i >> 1));
        four[j] = group_of(half(kept[j], i, 0), half(kept[j], i, 1), nibbles >> 4 * (t + 4 * (i & 1)));
      }
#pragma unroll
      for (int token = 0; token < 4; ++token) {
        const uint32_t select = token % 2 ? 0x7632 : 0x5410;  // the high, or the low, halves of two words
        auto pair = [&](int j) {
          return token < 2 ? __byte_perm(four[j].x, four[j + 1].x, select)
                           : __byte_perm(four[j].y, four[j + 1].y, select);
        };
        rows.put4(4 * group + token, channel, {pair(0), pair(2)});
      }
    }
  }
}

// Warp s has 16 tokens.
template <int D>
__device__ __forceinline__ void scatter_dense_v(const uint8_t* sub, Rows<D> rows, int s, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < D / 64; ++c) {
    uint4 plane[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) plane[j] = load16(sub + (((c * 4 + s) * 4 + j) * kWarp + lane) * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t select = h ? 0x7632 : 0x5410;
        rows.put4(16 * s + 2 * t + 8 * (i >> 1) + h, 64 * c + 4 * (g + 8 * (i & 1)),
                  {__byte_perm(word(plane[0], i), word(plane[1], i), select),
                   __byte_perm(word(plane[2], i), word(plane[3], i), select)});
      }
    }
  }
}

// K and V of a head's 64 tokens of a window block; `unit` counts them, blocks outermost.
template <int D>
__device__ __forceinline__ void copy_window(const ExpandParams& p, int unit) {
  constexpr int kChunks = 2 * D / 8,
                kSteps = kSubTokens * kChunks / kThreads;  // 16-byte chunks: K's of a row, then V's
  const int parts = p.window_block / kSubTokens, first = unit % parts * kSubTokens;
  const int head = unit / parts % p.cache.kv_heads, i = unit / parts / p.cache.kv_heads;
  const uint8_t* const from =
      p.cache.window + p.blocks[i] * p.cache.window_stride + (int64_t{head} * p.window_block + first) * kChunks * 16;
  const int tokens = p.tokens[i] - first, row = i * p.window_block + first, at = row % kPageTokens;
  const int64_t to = (p.count + row / kPageTokens) * p.page_stride + at * p.token_stride + head * p.head_stride;
#pragma unroll 8
  for (int step = 0; step < kSteps; ++step) {
    const int n = step * kThreads + threadIdx.x, token = n / kChunks, chunk = n % (kChunks / 2);
    uint8_t* const side = static_cast<uint8_t*>(n % kChunks < kChunks / 2 ? p.k : p.v);
    const uint4 value = token < tokens ? load16(from + 16 * n) : uint4{};
    *reinterpret_cast<uint4*>(side + to + token * p.token_stride + 16 * chunk) = value;
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) expand_pages(const ExpandParams p) {
  const int of_pages = p.count * p.cache.kv_heads * kParts;
  if (static_cast<int>(blockIdx.x) >= of_pages) return copy_window<D>(p, blockIdx.x - of_pages);
  constexpr int kChunks = D / 8, kRowsAtOnce = kThreads / kChunks;  // 16-byte chunks of a row
  constexpr int kOwn = (D + kThreads - 1) / kThreads;               // places of the order that a thread loads
  __shared__ __align__(16) uint8_t shared[kSubTokens * Rows<D>::kStride];
  __shared__ __align__(8) uint16_t order[D];
  __shared__ float mean[D];  // by channel
  const int head = blockIdx.x / kParts % p.cache.kv_heads, part = blockIdx.x % kParts, sub = part % kSubs;
  const int i = blockIdx.x / kParts / p.cache.kv_heads;
  const bool is_k = part < kSubs;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // Loads that wait for nothing go first: a CTA lives for about three of them in a row.
  int32_t own[kOwn];
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int c = threadIdx.x + o * kThreads;
    if (is_k && c < D) own[o] = p.k_order[head * D + c];
  }
  PageLayout layout = p.cache.layout;
  layout.head_size = D;  // it is: so sizes fold at compile time
  layout.value_bytes = 2;
  const uint8_t* page = p.cache.pages + p.pages[i] * p.cache.page_stride + int64_t{head} * layout.head_bytes();
  const uint32_t index = *reinterpret_cast<const uint32_t*>(page);
  const uint32_t mask = is_k ? layout.k_mask(index) : layout.v_mask(index);
  const uint8_t* stored = page + (is_k ? layout.k_sub(mask, sub) : layout.v_sub(mask, sub));
  const bool sparse = mask >> sub & 1;
  const bool centred = is_k && sparse && layout.key_mean;
  const Rows<D> rows{shared};

  if (is_k) {
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int c = threadIdx.x + o * kThreads;
      if (c < D) order[c] = static_cast<uint16_t>(own[o]);
    }
    __syncthreads();
    uint16_t own_mean[kOwn];  // in flight while the values are
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int c = threadIdx.x + o * kThreads;
      if (centred && c < D) own_mean[o] = reinterpret_cast<const uint16_t*>(page + layout.mean_offset())[c];
    }
    if (sparse) {
      scatter_sparse_k<D>(stored, rows, order, warp, lane);
    } else {
      scatter_dense_k<D>(stored, rows, order, warp, lane);
    }
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int c = threadIdx.x + o * kThreads;
      if (centred && c < D) mean[order[row_position(c)]] = to_float<T>(own_mean[o]);
    }
  } else if (!sparse) {
    scatter_dense_v<D>(stored, rows, warp, lane);
  } else if (p.cache.value_axis_token) {
    scatter_token_v<D>(stored, rows, warp, lane);
  } else {
    scatter_channel_v<D>(stored, rows, warp, lane);
  }
  __syncthreads();

  const int sinks = sub == 0 && PageLayout::has_sinks(index) ? layout.sink_tokens : 0;
  if (sinks > 0) {
    const int at = is_k ? layout.sink_k_offset() : layout.sink_v_offset();
    const uint16_t* exact = reinterpret_cast<const uint16_t*>(page + at);
    for (int n = threadIdx.x; n < sinks * D; n += kThreads) {
      const int token = n / D, place = n % D;
      rows.put(token, is_k ? order[row_position(place)] : place, exact[n]);
    }
    __syncthreads();
  }

  const int chunk = threadIdx.x % kChunks;
  float add[8];
  if (centred) {
#pragma unroll
    for (int c = 0; c < 8; ++c) add[c] = mean[8 * chunk + c];
  }
  uint8_t* out = static_cast<uint8_t*>(is_k ? p.k : p.v) + i * p.page_stride + head * p.head_stride + 16 * chunk;
#pragma unroll 4
  for (int token = threadIdx.x / kChunks; token < kSubTokens; token += kRowsAtOnce) {
    uint4 v = *reinterpret_cast<const uint4*>(rows.at(token, 8 * chunk));
    if (centred && token >= sinks) {
      v = {add2<T>(v.x, add[0], add[1]), add2<T>(v.y, add[2], add[3]), add2<T>(v.z, add[4], add[5]),
           add2<T>(v.w, add[6], add[7])};
    }
    *reinterpret_cast<uint4*>(out + (kSubTokens * sub + token) * p.token_stride) = v;
  }
}

}  // namespace hierasparse::expand
