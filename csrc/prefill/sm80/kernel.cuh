// Prefill over compressed pages on mma.sp, for every GPU since sm_80: attention of a tile's queries over its pages.
//
// Keys are the M side of S^T = K q^T and channels that of O^T = V^T P^T, so the stored 2:4 form is the sparse operand.
// Each of eight warps owns its columns alone, with queries, results and softmax in registers: no shared memory and no
// barrier.  The warps walk the same sub-blocks, so L1 serves all but the first.  docs/kernels.md has the budgets.
#pragma once

#include "pages.cuh"

namespace hierasparse::prefill_sm80 {

// Tokens that a column does not read here: beyond its border, or in the sink rows.
template <int kTiles>
__device__ __forceinline__ void hide(float (&s)[2][kTiles][4], Mine<kTiles> shared, int page, int sinks, int half) {
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool hidden = page * kPageTokens >= shared->border[8 * n + 2 * t + e];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (hidden || 32 * half + 16 * m + 8 * i + g < sinks) s[m][n][2 * i + e] = -INFINITY;
        }
      }
    }
  }
}

// Sink rows of a request's first page.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void attend_sinks(const Arguments& a, State<kD, kTiles>& state, const Queries<kD, kTiles>& q,
                                             Mine<kTiles> shared, const uint8_t* page) {
  const PageLayout& layout = a.params.cache.layout;
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
#pragma unroll 1
  for (int first = 0; first < layout.sink_tokens; first += 16) {
    const int rows = layout.sink_tokens - first;
    const uint8_t* k = page + layout.sink_k_offset() + first * (2 * kD) + t * 16;
    const uint8_t* v = page + layout.sink_v_offset() + first * (2 * kD);
    float s[1][kTiles][4] = {};
    auto piece = [&](int row, int step) {
      return row < rows ? load16(k + row * (2 * kD) + step * 64) : make_uint4(0, 0, 0, 0);
    };
#pragma unroll
    for (int step = 0; step < kD / 32; ++step) {
      const uint4 top = piece(g, step), bottom = piece(g + 8, step);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        mma<T>(s[0][n], top.x, bottom.x, top.y, bottom.y, q.at[n][step][0], q.at[n][step][1]);
        mma<T>(s[0][n], top.z, bottom.z, top.w, bottom.w, q.at[n][step][2], q.at[n][step][3]);
      }
    }
    uint32_t probability[kTiles][1][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool read = shared->border[8 * n + 2 * t + e % 2] > 0;
        if (!read || g + 8 * (e / 2) >= rows) s[0][n][e] = -INFINITY;
      }
    }
    raise_maximum(a.scale_log2, state, s);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) probabilities<T>(a.scale_log2, state, n, s[0][n], probability[n][0]);
#pragma unroll
    for (int c = 0; c < kD / 64; ++c) {
      multiply_row_values<T, kD, kTiles>(state, c, probability, [&](int half, int row) {
        const uint8_t* from = v + row * (2 * kD) + (64 * c + 32 * half + 4 * g) * 2;
        return row < rows ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
      });
    }
  }
}

// All sub-blocks of the warp's pages, half by half.  While one warp of a scheduler is at its exponentials, the other
// has the tensor cores.
template <typename T, int kD, bool kTokens, int kTiles>
__device__ __forceinline__ void attend_pages(const Arguments& a, State<kD, kTiles>& state, const Queries<kD, kTiles>& q,
                                             Walk<kD, kTiles>& walk, Mine<kTiles> shared) {
  const PageLayout& layout = a.params.cache.layout;
  auto attend = [&](auto half) {
    constexpr int kHalf = decltype(half)::value;
    float s[2][kTiles][4];
    if (const Side k = walk.keys(); k.sparse) {
      multiply_keys<T, true, kHalf>(s, q, shared, k.at);
    } else {
      multiply_keys<T, false, kHalf>(s, q, shared, k.at);
    }
    Ahead<kD> ahead;
    if constexpr (kTokens) ahead.load(walk.values(), kHalf);
    if (walk.at_edge() || walk.sinks()) {
      hide(s, shared, walk.page(), walk.sinks() ? layout.sink_tokens : 0, kHalf);
    }
    raise_maximum(a.scale_log2, state, s);
    uint32_t p[kTiles][2][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int m = 0; m < 2; ++m) probabilities<T>(a.scale_log2, state, n, s[m][n], p[n][m]);
    }
    const Side v = walk.values();
    if constexpr (kTokens) {
      if (v.sparse) {
        multiply_values<T, true, kHalf>(state, p, v, ahead);
      } else {
        multiply_values<T, false, kHalf>(state, p, v, ahead);
      }
    } else {
      if (v.sparse) {
        multiply_channels<T, true, kHalf>(state, p, v);
      } else {
        multiply_channels<T, false, kHalf>(state, p, v);
      }
    }
  };
  do {
    if (walk.page_begins() && layout.key_mean) {
      multiply_mean<T>(shared, q, walk.base() + layout.mean_offset());
    }
    attend(std::integral_constant<int, 0>{});
    attend(std::integral_constant<int, 1>{});
  } while (walk.advance());
}

template <typename T, int kD, bool kTokens>
__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(const __grid_constant__ Arguments a) {
  constexpr int kTiles = tiles_of(kD);
  __shared__ Shared<kTiles> shared[kWarps];
  const PrefillParams& p = a.params;
  const Columns<kTiles> columns(a);
  if (!columns.any()) return;
  State<kD, kTiles> state;
  state.reset();
  const Work& work = columns.work();
  const int pages = border_of(p, work.tile, work.tile.queries - 1) / kPageTokens;
  const int begin = pages * work.split / p.splits;
  const int end = min(pages * (work.split + 1) / p.splits, columns.high() / kPageTokens);
  if (begin < end) {
    const Mine<kTiles> mine{shared};
    const int lane = thread_index() % 32;
    if (lane == 0) {
      mine->table = p.batch.page_table + work.tile.request * p.batch.page_table_stride;
      mine->head = int64_t{work.kv_head} * a.head_bytes;
      mine->end = end, mine->edge = columns.low() / kPageTokens;
    }
    if (lane < 8 * kTiles) mine->border[lane] = columns.border(lane), mine->mean[lane] = 0.f;
    __syncwarp();
    Queries<kD, kTiles> q;
    columns.load(q);
    Walk<kD, kTiles> walk(a, mine, begin);
    if (walk.sinks()) attend_sinks<T>(a, state, q, mine, walk.base());
    attend_pages<T, kD, kTokens>(a, state, q, walk, mine);
  }
  Columns<kTiles>(a).template store<T>(state);
}

// ---- launch --------------------------------------------------------------------------------------------------------
template <typename T, int kD, bool kTokens>
cudaError_t run(const Arguments& a, cudaStream_t stream) {
  const auto kernel = prefill_kernel<T, kD, kTokens>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxL1);
  if (error != cudaSuccess) return error;
  kernel<<<a.params.tile_count * a.params.cache.kv_heads * a.params.splits, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace hierasparse::prefill_sm80
