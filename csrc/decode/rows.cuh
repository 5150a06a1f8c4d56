// Attention over 16 plain rows of K and V: a piece of the dense window, or sink rows of a page.
#pragma once

#include "pages.cuh"

namespace hierasparse::decode {

// S^T += K q^T of 16 rows: `piece(step, row)` gives the 16 bytes of row g or g + 8 that lane 4 g + t has of 32
// channels, `query(n, step)` operand B of tile n.
template <typename T, int kTiles, typename Query, typename Piece>
__device__ __forceinline__ void multiply_rows(float (&s)[1][kTiles][4], int first, int steps, Query query,
                                              Piece piece) {
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    const uint4 top = piece(step, 0), bottom = piece(step, 8);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint4 q = query(n, first + step);
      mma<T>(s[0][n], top.x, bottom.x, top.y, bottom.y, q.x, q.y);
      mma<T>(s[0][n], top.z, bottom.z, top.w, bottom.w, q.z, q.w);
    }
  }
}

// Rows outside low .. high are hidden from a column.
template <int kTiles, typename Limits>
__device__ __forceinline__ void hide(float (&s)[1][kTiles][4], Limits limits) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int2 seen = limits(8 * n + 2 * t + e % 2);
      const int row = g + 8 * (e / 2);
      if (row < seen.x || row > seen.y) s[0][n][e] = -INFINITY;
    }
  }
}

// The warp's pieces of a segment's window.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void attend_window(const DecodeParams& p, State<kD, kTiles>& state, Chunks& chunks,
                                              const Plan& plan, uint32_t queries) {
  using R = Rows<kD>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  auto share = [&] { return Share(plan.segment, thread_index() / 32); };
  auto query = [&](int n, int step) { return query_fragment<kD>(queries, n, step); };
#pragma unroll 1
  for (int piece = share().first_piece; piece < share().end_piece; piece += kWarps) {
    float s[1][kTiles][4] = {};
#pragma unroll
    for (int part = 0; part < R::kParts; ++part) {
      const uint32_t at = chunks.front();
      multiply_rows<T, kTiles>(s, part * (R::kChannels / 32), R::kChannels / 32, query, [&](int step, int row) {
        return load_shared16(at + R::key_piece(g + row, 4 * step + t) * 16);
      });
      chunks.pop();
    }
    const int start = plan.segment.request.low + piece * kPiece;
    hide<kTiles>(s, [&](int column) {
      return make_int2(plan.columns.border[column] - start, plan.columns.position[column] - start);
    });
    uint32_t probability[kTiles][1][2];
    softmax<T, 1>(p, state, s, probability);
#pragma unroll
    for (int part = 0; part < R::kParts; ++part) {
      const uint32_t at = chunks.front();
#pragma unroll
      for (int c = 0; c < R::kChannels / 64; ++c) {
        multiply_row_values<T, kD, kTiles>(state, part * (R::kChannels / 64) + c, probability, [&](int half, int row) {
          return load_shared8(at + R::value_piece(row, 8 * c + 4 * half + g / 2) * 16 + g % 2 * 8);
        });
      }
      chunks.pop();
    }
  }
}

// Sink rows of a request's first page, straight from global memory: there are few, and few pages have them.
template <typename T, int kD, bool kExpand, int kTiles>
__device__ __forceinline__ void attend_sinks(const DecodeParams& p, State<kD, kTiles>& state, const uint8_t* page,
                                             const Columns& columns, uint32_t queries) {
  const PageLayout& layout = p.cache.layout;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  auto query = [&](int n, int step) { return stored_fragment<kD, kExpand>(queries, n, step); };
  for (int first = 0; first < layout.sink_tokens; first += 16) {
    const int rows = layout.sink_tokens - first;
    const uint8_t* k = page + layout.sink_k_offset() + first * (2 * kD);
    const uint8_t* v = page + layout.sink_v_offset() + first * (2 * kD);
    float s[1][kTiles][4] = {};
    multiply_rows<T, kTiles>(s, 0, kD / 32, query, [&](int step, int row) {
      const uint8_t* from = k + (g + row) * (2 * kD) + (32 * step + 8 * t) * 2;
      return g + row < rows ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
    });
    hide<kTiles>(s, [&](int column) { return make_int2(0, columns.border[column] > 0 ? rows - 1 : -1); });
    uint32_t probability[kTiles][1][2];
    softmax<T, 1>(p, state, s, probability);
#pragma unroll
    for (int c = 0; c < kD / 64; ++c) {
      multiply_row_values<T, kD, kTiles>(state, c, probability, [&](int half, int row) {
        const uint8_t* from = v + row * (2 * kD) + (64 * c + 32 * half + 4 * g) * 2;
        return row < rows ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
      });
    }
  }
}

}  // namespace hierasparse::decode
