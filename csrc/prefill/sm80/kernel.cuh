// Prefill over compressed pages on mma.sp, for every GPU since sm_80: attention of a tile's queries over its pages.
//
// Keys are the M side of S^T = K q^T and channels that of O^T = V^T P^T, so the stored 2:4 form is the sparse operand.
// Each of eight warps owns its columns alone, with queries, results and softmax in registers; all of them read the same
// sub-blocks, from a ring in shared memory that they fill together.  docs/kernels.md has the budgets.
#pragma once

#include "softmax.cuh"

namespace hierasparse::prefill_sm80 {

extern __shared__ __align__(512) uint8_t memory[];

__device__ __forceinline__ uint4 load16(const uint8_t* from) { return __ldg(reinterpret_cast<const uint4*>(from)); }

// Sink rows of a request's first page.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void attend_sinks(const Arguments& a, State<kD, kTiles>& state, const Queries<kD, kTiles>& q,
                                             const int* border, const uint8_t* page) {
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
        const bool read = border[8 * n + 2 * t + e % 2] > 0;
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

// All sub-blocks of the CTA's pages.  While one warp of a scheduler is at its exponentials, the other has the tensor
// cores.  A warp's products take half of its time, and nothing of the rest overlaps them: what is rare shares a branch.
template <typename T, int kD, bool kTokens, bool kMixed, int kTiles>
__device__ __forceinline__ void attend_pages(const Arguments& a, State<kD, kTiles>& state, const Queries<kD, kTiles>& q,
                                             Shared<kD, kTiles>& shared, Copier<kD, kTiles>& copier) {
  constexpr Form kSparseForm = kTokens ? Form::kTokens : Form::kChannels;
  const auto sparse = [](uint32_t kind) { return !kMixed || (kind & kSparse) != 0; };
  const bool means = a.params.cache.layout.key_mean;
  const int count = (shared.end - shared.begin) * kSubs;
  Reader<kD, kTiles> ring(a, shared);
  Keys<kD> keys;
  uint32_t kind = ring.wait(0, ring.stage());
  keys.load(ring.keys(ring.stage()), sparse(kind));
  // The lane's columns of means and tops, in shared memory; what is rarely needed is found anew.
  const auto own = [&]() -> auto& { return shared.own[thread_index() / 32]; };
  const uint32_t lane_means = shared_address(&own().mean[0][thread_index() % 4 * 2]);
  constexpr int kRowBytes = sizeof shared.own->mean[0], kTopBytes = sizeof shared.own->mean;
  store_tops(state, &own().top[thread_index() % 4 * 2]);
  const bool alone = can_be_alone(kD) && a.pairs == 1;  // stages: V is copied over the one before, as late as that
  bool exact = true;                                    // the maximum is not known yet
#pragma unroll 1
  for (int i = 0;; ++i) {
    if (i % kMeanEvery == 0 && means) {
      mbarrier_wait(shared_address(&shared.means_full), i / kMeanEvery % 2);
      multiply_means<T>(a.scale_log2, shared, q);
    }
    const Stage stage = ring.stage();
    const uint32_t k = ring.keys(stage), v = ring.values(stage);
    const int row = sparse(kind) ? static_cast<unsigned>(i) / kSubs % kMeanPages : kMeanPages;
    uint32_t p[kTiles][kRows][2];
    Values<kD> values;
    uint32_t value_kind;
#pragma unroll 1
    for (bool late = alone;; late = false) {
      float s[kRows][kTiles][4];
      if (sparse(kind)) {
        multiply_keys<T, true>(s, q, k, keys);
      } else {
        multiply_keys<T, false>(s, q, k, keys);
      }
      if (exact || (kind & (kSinks | kEdge)) != 0) {
        if (kind & (kSinks | kEdge)) {
          hide(s, own().border, (shared.begin + i / kSubs) * kPageTokens,
               kind & kSinks ? a.params.cache.layout.sink_tokens : 0);
        }
        if (exact) {
          raise_exactly(a.scale_log2, state, s, lane_means + row * kRowBytes, lane_means + kTopBytes,
                        &own().top[thread_index() % 4 * 2]);
        }
      }
      if (late) {
        if (i > 0) ring.release(1, 1);
        copier.serve(i, stage, 1, 2);
      }
      value_kind = ring.wait(1, stage);
      float sum[kTiles][2];
      const bool good = weigh<T>(a.scale_log2, s, lane_means + row * kRowBytes, lane_means + kTopBytes, p, sum,
                                 [&] { values.template load<kTokens>(v, sparse(value_kind)); });
      if (__builtin_expect(good || exact, 1)) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) state.sum[n][0] += sum[n][0], state.sum[n][1] += sum[n][1];
        break;
      }
      exact = true;
      keys.load(k, sparse(kind));
    }
    exact = false;
    __syncwarp();
    ring.release(0, 0);
    if (i > 0 && !alone) ring.release(1, 1);
    if (copier.turn(i)) {
      copier.serve(i, stage, 0, alone ? 1 : 2);
      copier.serve_means(i);
    }
    const Stage next = ring.next();
    if (i + 1 < count) kind = ring.wait(0, next);
    const uint32_t next_k = ring.keys(next);
    const auto load_next = [&](int f) { keys.load(next_k, sparse(kind), f); };
    if (sparse(value_kind)) {
      multiply_values<T, kSparseForm>(state, p, v, values, load_next);
    } else {
      multiply_values<T, Form::kDense>(state, p, v, values, load_next);
    }
    if (i + 1 == count) break;
    ring.advance(next);
  }
  load_columns(state.top, lane_means + kTopBytes);
}

// A warp without columns copies for the others.
template <int kD, int kTiles>
__device__ __forceinline__ void only_copy(const Arguments& a, Shared<kD, kTiles>& shared, Copier<kD, kTiles>& copier) {
  Reader<kD, kTiles> ring(a, shared);
  const int count = (shared.end - shared.begin) * kSubs;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Stage stage = ring.stage();
    ring.wait(0, stage), ring.release(0, 0);
    copier.serve(i, stage, 0, 2);
    if (copier.turn(i)) copier.serve_means(i);
    ring.wait(1, stage), ring.release(1, 0);
    ring.advance(ring.next());
  }
}

template <typename T, int kD, bool kTokens, bool kMixed>
__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(const __grid_constant__ Arguments a) {
  constexpr int kTiles = tiles_of(kD);
  auto& shared = *reinterpret_cast<Shared<kD, kTiles>*>(memory);
  const PrefillParams& p = a.params;
  const Columns<kTiles> columns(a);
  const Work& work = columns.work();
  const int pages = border_of(p, work.tile, work.tile.queries - 1) / kPageTokens;
  const int begin = static_cast<int>(int64_t{pages} * work.split / p.splits);
  const int end = static_cast<int>(int64_t{pages} * (work.split + 1) / p.splits);
  State<kD, kTiles> state;
  state.reset();
  if (begin < end) {
    const int lane = thread_index() % 32;
    if (thread_index() == 0) {
      shared.table = p.batch.page_table + work.tile.request * p.batch.page_table_stride;
      shared.head = int64_t{work.kv_head} * a.head_bytes;
      shared.begin = begin, shared.end = end;
      shared.edge = border_of(p, work.tile, 0) / kPageTokens;
      for (int side = 0; side < 2; ++side) {
        for (int i = 0; i < a.pairs; ++i) {
          mbarrier_init(shared_address(&shared.full[side][i]), kFullCount);
          mbarrier_init(shared_address(&shared.empty[side][i]), kWarps * kWarpArrivals);
        }
      }
      mbarrier_init(shared_address(&shared.means_full), 32);
    }
    auto& own = shared.own[thread_index() / 32];
    for (int i = lane; i < 8 * kTiles; i += 32) {
      own.border[i] = columns.border(i);
      for (int row = 0; row <= kMeanPages; ++row) own.mean[row][i] = 0.f;
    }
    __syncthreads();
    Copier<kD, kTiles> copier(a, shared);
    copier.begin();
    if (columns.any()) {
      Queries<kD, kTiles> q;
      columns.load(q);
      if (begin == 0 && p.cache.layout.sink_tokens > 0) {
        const uint8_t* page = p.cache.pages + __ldg(shared.table) * p.cache.page_stride + shared.head;
        if (PageLayout::has_sinks(__ldg(reinterpret_cast<const uint32_t*>(page)))) {
          attend_sinks<T>(a, state, q, own.border, page);
        }
      }
      attend_pages<T, kD, kTokens, kMixed>(a, state, q, shared, copier);
    } else {
      only_copy(a, shared, copier);
    }
    wait_copies<0>();  // ids and words of sub-blocks behind the last
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  const bool any = columns.any();
#else
  const bool any = Columns<kTiles>(a).any();  // what it follows from would be spilled
#endif
  if (any) Columns<kTiles>(a).template store<T>(state);
}

// ---- launch --------------------------------------------------------------------------------------------------------
template <typename T, int kD, bool kTokens, bool kMixed>
cudaError_t run(const PrefillParams& p, int shared_bytes, cudaStream_t stream) {
  constexpr int kBefore = Shared<kD, tiles_of(kD)>::bytes();
  const Arguments a(p, shared_bytes - kBefore);
  if (a.pairs < (can_be_alone(kD) ? 1 : 2)) return cudaErrorInvalidConfiguration;
  const int bytes = kBefore + a.pairs * a.pair_bytes;
  const auto kernel = prefill_kernel<T, kD, kTokens, kMixed>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<p.tile_count * p.cache.kv_heads * p.splits, kThreads, bytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace hierasparse::prefill_sm80
