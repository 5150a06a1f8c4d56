// One launch per layer and step: the step's rows go into the window, and every page that the step fills is chosen and
// packed. Pages have the bytes that policy.choose and codec.pack give.
//
// The grid is fixed. Every block first copies its share of the rows, then looks which pages fill (usually none: it
// ends) and takes its share of the units (page, head, side). A unit is read once, into shared memory, and written once.
#pragma once

#include "keys.cuh"
#include "values.cuh"

namespace hierasparse::compress {

// The index word: both sides' units own bits of it, so neither waits for the other, whatever was there before. The rest
// of its 128 bytes and the sink rows that other pages than a request's first have are zero bytes.
template <class S>
__device__ __forceinline__ void emit_index(const Cache& cache, const Unit& unit, uint32_t mask) {
  const PageLayout& layout = cache.layout;
  const uint32_t value_bits = ((1u << kSubs) - 1) << kSubs;
  if (threadIdx.x == 0) {
    const uint32_t own = unit.is_value ? value_bits : ~value_bits;
    const uint32_t all = (1u << kSubs) - 1;  // the other side's bits: of no interest here
    const uint32_t word = unit.is_value ? layout.encode_index(all, mask, false) & value_bits
                                        : layout.encode_index(mask, all, unit.page == 0) & ~value_bits;
    uint32_t* index = reinterpret_cast<uint32_t*>(unit.region);
    atomicAnd(index, ~own);
    atomicOr(index, word);
  }
  if (!unit.is_value) {
    for (int i = threadIdx.x; i < kIndexBytes / 4; i += S::kThreads) {
      if (i > 0) reinterpret_cast<uint32_t*>(unit.region)[i] = 0;
    }
  }
  if (unit.page != 0) {
    uint8_t* sinks = unit.region + (unit.is_value ? layout.sink_v_offset() : layout.sink_k_offset());
    for (int i = threadIdx.x; i < layout.sink_bytes() / 16; i += S::kThreads) store16(sinks + i * 16, 0, 0, 0, 0);
  }
}

// Metadata of a sparse sub-block, to its place behind the values.
template <class S>
__device__ __forceinline__ void emit_meta(const Shared<S>& shared, int sub, uint8_t* to) {
  const uint4* from = reinterpret_cast<const uint4*>(shared.meta[sub]);
  for (int i = threadIdx.x; i < S::kMetaWords / 4; i += S::kThreads) reinterpret_cast<uint4*>(to)[i] = from[i];
}

template <class S>
__device__ __forceinline__ void compress_unit(const StoreCompressParams& p, Shared<S>& shared) {
  const Unit& unit = shared.unit;
  const PageLayout& layout = p.cache.layout;
  const int warp = threadIdx.x / kWarp;
  const bool tokens = unit.is_value && p.cache.value_axis_token;
  const bool mean = !unit.is_value && layout.key_mean;
  const bool ranked = unit.sparse > 0 && unit.sparse < kSubs;
  constexpr int kSubsPerTile = S::kTile / kSubTokens, kTasks = S::kTile / 16;  // a task: a quarter of a sub-block
  int loaded = -1;

  // 1. Where the rows lie, and K's tables; the barrier before the tile is loaded publishes them.
  for (int token = threadIdx.x; token < kPageTokens; token += S::kThreads) {
    shared.source[token] = source_row<S>(p, unit, token);
  }
  if (threadIdx.x < kSubs) shared.losses[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.top = 0;
  if (!unit.is_value) load_tables(p, shared, unit.head);

  // 2. The mean of K's channels over the page.
  if (mean) {
    for_each_tile(shared, loaded, [&](int first) { sum_tile(shared, first); });
    finish_mean(shared, unit.region + layout.mean_offset());
    __syncthreads();  // the mean is there, and the partial sums make room for metadata
  }

  // 3. The page's largest score: the unit of losses, where sub-blocks compete.
  LossUnit loss_of{};
  if (ranked) {
    for_each_tile(shared, loaded, [&](int) { find_top(p, shared, unit); });
    __syncthreads();  // every warp's maximum is in
    loss_of = loss_unit(as_float(shared.top));
  }

  // 4. Which values stay (metadata), how much kept values grow, what each sub-block loses.
  if (unit.sparse > 0) {
    for_each_tile(shared, loaded, [&](int first) {
      for (int task = warp; task < kTasks; task += S::kWarps) {
        const int sub = task % kSubsPerTile, quarter = task / kSubsPerTile;
        const int row = sub * kSubTokens + 16 * quarter;
        if (!unit.is_value) {
          choose_keys(shared, unit, row, first + row, ranked, loss_of);
        } else if (!tokens) {
          choose_values(shared, unit, row, first + row, ranked, loss_of);
        } else if (quarter < S::kD / 64) {
          choose_tokens(shared, sub * kSubTokens, first / kSubTokens + sub, quarter, ranked, loss_of);
        }
      }
    });
    __syncthreads();  // metadata, factors and losses are there
  }
  const uint32_t mask = ranked ? sparse_mask(shared.losses, unit.sparse) : unit.sparse == 0 ? 0 : (1u << kSubs) - 1;

  // 5. The page's bytes.
  emit_index<S>(p.cache, unit, mask);
  const bool as_they_are = !mean && !unit.rescale;
  const Room room = S::room(mean);
  for_each_tile(shared, loaded, [&](int first) {
    if (first == 0 && unit.page == 0) {
      if (unit.is_value) {
        emit_value_sinks(shared, layout.sink_tokens, unit.region + layout.sink_v_offset());
      } else {
        emit_key_sinks(shared, layout.sink_tokens, unit.region + layout.sink_k_offset());
      }
    }
    for (int task = warp; task < kTasks; task += S::kWarps) {
      const int in_tile = task % kSubsPerTile, quarter = task / kSubsPerTile, sub = first / kSubTokens + in_tile;
      const int row = in_tile * kSubTokens + 16 * quarter;
      uint8_t* to = unit.region + (unit.is_value ? layout.v_sub(mask, sub) : layout.k_sub(mask, sub));
      if (!(mask >> sub & 1)) {
        if (unit.is_value) {
          emit_dense_values(shared, row, first + row, to);
        } else {
          emit_dense_keys(shared, row, first + row, to);
        }
      } else if (!unit.is_value) {
        emit_kept_keys(shared, unit, row, first + row, as_they_are, room, to);
      } else if (!tokens) {
        emit_kept_values(shared, unit, row, first + row, room, to);
      } else {
        for (int item = quarter; item < S::kD / 16; item += 4) {
          emit_kept_tokens(shared, unit, in_tile * kSubTokens, sub, item / 4, item % 2, item / 2 % 2, room, to);
        }
      }
    }
  });
  for (int sub = 0; sub < kSubs; ++sub) {
    if (mask >> sub & 1) {
      emit_meta(shared, sub,
                unit.region + (unit.is_value ? layout.v_sub(mask, sub) : layout.k_sub(mask, sub)) +
                    layout.sparse_value_bytes());
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    store_compress_kernel(const __grid_constant__ StoreCompressParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(memory);
  int pages = filled_pages(p.batch, threadIdx.x);  // of this thread's request: loads that the copies below hide
  store_rows<S>(p);

  int before = 0;  // units of the requests before the ones at hand
  for (int first = 0; first < p.batch.requests; first += S::kThreads) {
    if (first > 0) pages = filled_pages(p.batch, first + threadIdx.x);
    if (!__syncthreads_or(pages > 0)) continue;
    const int units = scan_pages(shared, pages) * p.cache.kv_heads * 2;
    // The first unit of these requests that is this block's, if all units of the launch are dealt round the grid.
    for (int at = (blockIdx.x + gridDim.x - before % gridDim.x) % gridDim.x; at < units; at += gridDim.x) {
      if (threadIdx.x == 0) find_unit(p, shared, first, at);
      __syncthreads();  // the unit is known
      if (shared.unit.region != nullptr) compress_unit(p, shared);
      __syncthreads();  // nobody reads its shared memory any more
    }
    before += units;
  }
}

}  // namespace hierasparse::compress
