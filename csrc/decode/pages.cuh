// Products of a warp's columns with one sub-block of a page.
#pragma once

#include "../common/values.cuh"
#include "stream.cuh"

namespace hierasparse::decode {

// Queries as operand B, 16 bytes per lane and 32 channels: two k16 steps, or one k32 step of a 2:4 product.
template <int kD>
__device__ __forceinline__ uint4 query_fragment(uint32_t queries, int n, int step) {
  return load_shared16(queries + ((n * (kD / 32) + step) * 32 + threadIdx.x % 32) * 16);
}

// The same with channels in stored order, whichever order `paged` has.
template <int kD, bool kExpand>
__device__ __forceinline__ uint4 stored_fragment(uint32_t queries, int n, int step) {
  if constexpr (kExpand) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    // Places 8 i + 2 t and + 1 are with lane 2 (i % 2) + t / 2 of the four, register 2 (i / 2) + t % 2.
    const uint32_t at = queries + ((n * (kD / 32) + step) * 32 + lane / 4 * 4 + t / 2) * 16 + t % 2 * 4;
    return make_uint4(load_shared4(at), load_shared4(at + 32), load_shared4(at + 8), load_shared4(at + 40));
  } else {
    return query_fragment<kD>(queries, n, step);
  }
}

// q . mean in every row: the mean as a matrix of equal rows.
template <typename T, int kD, bool kExpand, int kTiles>
__device__ __forceinline__ void add_mean(float (&s)[4][kTiles][4], uint32_t mean, uint32_t queries) {
  float dot[kTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kD / 32; ++step) {
    const uint4 a = load_shared16(mean + (4 * step + threadIdx.x % 4) * 16);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint4 q = stored_fragment<kD, kExpand>(queries, n, step);
      mma<T>(dot[n], a.x, a.x, a.y, a.y, q.x, q.y);
      mma<T>(dot[n], a.z, a.z, a.w, a.w, q.z, q.w);
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] += dot[n][e];
    }
  }
}

// S^T += K q^T of a chunk of 2:4 keys at `at`, number `part` of the sub-block's; with the page's mean, if it has one.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void multiply_sparse_keys(float (&s)[4][kTiles][4], int part, uint32_t at, bool mean,
                                                     uint32_t queries) {
  constexpr int kRowTiles = 256 / kD, kSteps = kD / 32, kPairs = kD / 64;
  const int lane = threadIdx.x % 32;
  const uint4 words = load_shared16(at + kChunkValues + lane * 16);
  const uint32_t meta[4] = {words.x, words.y, words.z, words.w};
  if (mean) add_mean<T, kD, false, kTiles>(s, at + kChunkValues + kChunkMeta, queries);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t b[kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint4 q = query_fragment<kD>(queries, n, step);
      b[n][0] = q.x, b[n][1] = q.y, b[n][2] = q.z, b[n][3] = q.w;
    }
#pragma unroll
    for (int row = 0; row < kRowTiles; ++row) {
      const uint4 a = load_shared16(at + (row * kSteps + step) * kFragment + lane * 16);
      const uint32_t m = meta[row * kPairs + step / 2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (step % 2 == 0) {
          mma_sp<T, 0>(s[part * kRowTiles + row][n], a, b[n], m);
        } else {
          mma_sp<T, 1>(s[part * kRowTiles + row][n], a, b[n], m);
        }
      }
    }
  }
}

// The same by dense products.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void multiply_expanded_keys(float (&s)[4][kTiles][4], int part, uint32_t at, bool mean,
                                                       uint32_t queries) {
  constexpr int kRowTiles = 256 / kD, kSteps = kD / 32, kPairs = kD / 64;
  const int lane = threadIdx.x % 32;
  if (mean) add_mean<T, kD, true, kTiles>(s, at + kChunkValues + kChunkMeta, queries);
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {  // what is kept in odd and in even steps is told by two lanes of four each
    const uint32_t told = at + kChunkValues + (lane / 4 * 4 + 2 * odd) * 16;
    const uint4 x = load_shared16(told), y = load_shared16(told + 16);
    const uint32_t first[4] = {x.x, x.y, x.z, x.w}, second[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int step = 2 * pair + odd;
      uint4 q[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) q[n] = query_fragment<kD>(queries, n, step);
#pragma unroll
      for (int row = 0; row < kRowTiles; ++row) {
        const int word = row * kPairs + pair, m = part * kRowTiles + row;
        const uint4 kept = load_shared16(at + (row * kSteps + step) * kFragment + lane * 16);
        const int t = kFindAnew ? thread_index() % 4 : lane % 4;
        uint32_t a[2][4];
        expand_keys(kept, first[word], second[word], t, a);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          mma<T>(s[m][n], a[0][0], a[0][1], a[0][2], a[0][3], q[n].x, q[n].y);
          mma<T>(s[m][n], a[1][0], a[1][1], a[1][2], a[1][3], q[n].z, q[n].w);
        }
      }
    }
  }
}

// S^T of a sub-block: 4 row tiles of 16 tokens.
template <typename T, int kD, bool kExpand, int kTiles>
__device__ __forceinline__ void multiply_keys(float (&s)[4][kTiles][4], Chunks& chunks, bool mean, bool sparse,
                                              uint32_t queries) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] = 0.f;
    }
  }
  if (sparse) {
#pragma unroll
    for (int part = 0; part < kD / 64; ++part) {
      const uint32_t at = chunks.front();
      if constexpr (kExpand) {
        multiply_expanded_keys<T, kD, kTiles>(s, part, at, part == 0 && mean, queries);
      } else {
        multiply_sparse_keys<T, kD, kTiles>(s, part, at, part == 0 && mean, queries);
      }
      chunks.pop();
    }
  } else {
    constexpr int kSteps = kD / 16;  // of k16; a chunk has 8 fragments, row tile by row tile
#pragma unroll
    for (int part = 0; part < kD / 32; ++part) {
      const uint32_t at = chunks.front();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int m = (8 * part + i) / kSteps, step = (8 * part + i) % kSteps;
        const uint4 a = load_shared16(at + i * kFragment + threadIdx.x % 32 * 16);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint4 q = stored_fragment<kD, kExpand>(queries, n, step / 2);
          mma<T>(s[m][n], a.x, a.y, a.z, a.w, step % 2 ? q.z : q.x, step % 2 ? q.w : q.y);
        }
      }
      chunks.pop();
    }
  }
}

// O^T += V^T P^T of a sub-block.
template <typename T, int kD, bool kTokens, int kTiles>
__device__ __forceinline__ void multiply_values(State<kD, kTiles>& state, Chunks& chunks, bool sparse,
                                                const uint32_t (&p)[kTiles][4][2]) {
  const int lane = threadIdx.x % 32;
  if (sparse) {
#pragma unroll
    for (int c = 0; c < kD / 64; ++c) {
      const uint32_t at = chunks.front();
      const uint4 words = load_shared16(at + kChunkValues + lane * 16);
      const uint32_t meta[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // along tokens: plane i; along channels: 16 tokens i
        const uint4 a0 = load_shared16(at + (2 * i) * kFragment + lane * 16);
        const uint4 a1 = load_shared16(at + (2 * i + 1) * kFragment + lane * 16);
        if constexpr (kTokens) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const uint32_t b0[4] = {p[n][0][0], p[n][0][1], p[n][1][0], p[n][1][1]};
            const uint32_t b1[4] = {p[n][2][0], p[n][2][1], p[n][3][0], p[n][3][1]};
            mma_sp<T, 0>(state.o[4 * c + i][n], a0, b0, meta[i]);
            mma_sp<T, 1>(state.o[4 * c + i][n], a1, b1, meta[i]);
          }
        } else {
          uint32_t plane[4][4];
          expand_channels(a0, a1, meta[i], plane);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
              mma<T>(state.o[4 * c + j][n], plane[j][0], plane[j][1], plane[j][2], plane[j][3], p[n][i][0], p[n][i][1]);
            }
          }
        }
      }
      chunks.pop();
    }
  } else {
#pragma unroll
    for (int part = 0; part < kD / 32; ++part) {
      const uint32_t at = chunks.front();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int c = part / 2, step = 2 * (part % 2) + i / 4, j = i % 4;
        const uint4 a = load_shared16(at + i * kFragment + lane * 16);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          mma<T>(state.o[4 * c + j][n], a.x, a.y, a.z, a.w, p[n][step][0], p[n][step][1]);
      }
      chunks.pop();
    }
  }
}

}  // namespace hierasparse::decode
