// One launch per layer and step: the step's rows go into the window, and every page that the step fills is chosen and
// packed. Pages have the bytes that policy.choose and codec.pack give.
//
// The grid is fixed. Every block first copies its share of the rows, then looks which pages fill (usually none: it
// ends) and takes its share of the units (page, head, side). A unit is read once, into shared memory, and written once;
// in large steps it also stores its new rows, which then need not be read a second time.
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
  if (thread_index() == 0) {
    const uint32_t own = unit.is_value ? value_bits : ~value_bits;
    const uint32_t all = (1u << kSubs) - 1;  // the other side's bits: of no interest here
    const uint32_t word = unit.is_value ? layout.encode_index(all, mask, false) & value_bits
                                        : layout.encode_index(mask, all, unit.page == 0) & ~value_bits;
    uint32_t* index = reinterpret_cast<uint32_t*>(unit.region);
    atomicAnd(index, ~own);
    atomicOr(index, word);
  }
  if (!unit.is_value) {
    for (int i = thread_index(); i < kIndexBytes / 4; i += S::kThreads) {
      if (i > 0) reinterpret_cast<uint32_t*>(unit.region)[i] = 0;
    }
  }
  if (unit.page != 0) {
    uint8_t* sinks = unit.region + (unit.is_value ? layout.sink_v_offset() : layout.sink_k_offset());
    for (int i = thread_index(); i < layout.sink_bytes() / 16; i += S::kThreads) store16(sinks + i * 16, 0, 0, 0, 0);
  }
}

// Which sub-blocks are sparse, and where all lie in the region.
template <class S>
__device__ __forceinline__ void place_subs(const PageLayout& layout, Shared<S>& shared, const Unit& unit,
                                           uint32_t mask) {
  const int sub = thread_index();
  if (sub == 0) shared.mask = mask;
  if (sub < kSubs) shared.place[sub] = unit.is_value ? layout.v_sub(mask, sub) : layout.k_sub(mask, sub);
}

// Metadata of sparse sub-blocks, to their places behind the values.
template <class S>
__device__ __forceinline__ void emit_meta(const Shared<S>& shared, uint8_t* region) {
  constexpr int kPieces = S::kMetaWords / 4;
  for (int i = thread_index(); i < kSubs * kPieces; i += S::kThreads) {
    const int sub = i / kPieces;
    if (shared.mask >> sub & 1) {
      store16(region + shared.place[sub] + 2 * S::kD * kSubTokens / 2 + i % kPieces * 16,
              reinterpret_cast<const uint4*>(shared.meta)[i]);
    }
  }
}

// What every sub-block would lose, into shared.losses.
template <class S>
__device__ __forceinline__ void count_losses(const StoreCompressParams& p, Shared<S>& shared, Tile<S>& tile,
                                             const Unit& unit) {
  constexpr int kTasks = S::kTile / 16;
  const int warp = thread_index() / kWarp;
  if (!unit.is_value) {
    tile.for_each([&](int) { find_key_top(p, shared, unit.head); });
    __syncthreads();  // every warp's maximum is in
    const LossUnit loss_of = loss_unit(as_float(shared.top));
    tile.for_each([&](int first) {
      for (int task = warp; task < kTasks; task += S::kWarps) {
        count_key_losses(shared, 16 * task, first + 16 * task, loss_of);
      }
    });
  } else {
    tile.for_each([&](int) { find_value_top(shared); });
    __syncthreads();  // as above
    const PairLossUnit<typename S::T> loss_of(as_float(shared.top));
    auto count = [&](auto simple) {
      tile.for_each([&](int first) {
        if (!p.cache.value_axis_token) return count_value_losses<simple.value>(shared, first, loss_of);
        for (int task = warp; task < kTasks; task += S::kWarps) {
          count_token_losses<simple.value>(shared, 16 * task, (first + 16 * task) / kSubTokens, loss_of);
        }
      });
    };
    if (loss_of.simple) {
      count(std::true_type{});
    } else {
      count(std::false_type{});
    }
  }
  __syncthreads();  // every warp's losses are in
}

// shared.unit; `store`: its new rows also go to the window.
template <class S>
__device__ __forceinline__ void compress_unit(const StoreCompressParams& p, Shared<S>& shared, bool store) {
  const Unit& unit = shared.unit;
  const PageLayout& layout = p.cache.layout;
  const int warp = thread_index() / kWarp;
  const bool mean = !unit.is_value && layout.key_mean;
  const bool ranked = unit.sparse > 0 && unit.sparse < kSubs;
  constexpr int kSubsPerTile = S::kTile / kSubTokens, kTasks = S::kTile / 16;  // a task: a quarter of a sub-block

  // 1. Where the rows lie, and K's tables.
  for (int token = thread_index(); token < kPageTokens; token += S::kThreads) find_row(p, shared, unit, token, store);
  if (thread_index() < kSubs) shared.losses[thread_index()] = 0;
  if (thread_index() == 0) shared.top = 0, shared.wild = 0;
  if (!unit.is_value) load_tables(p, shared, unit.head);
  __syncthreads();
  Tile<S> tile{shared, store};
  tile.start(0);
  if (thread_index() == 0) take_unit(p, shared, shared.ahead);  // while the rows are on their way
  if (unit.region == nullptr) return tile.for_each([](int) {});

  // 2. The mean of K's channels over the page.
  if (mean) {
    tile.for_each([&](int first) { sum_tile(shared, first); });
    finish_mean(shared, unit.region + layout.mean_offset());
    __syncthreads();  // the mean is there, and the partial sums make room for metadata
  }

  // 3. Which sub-blocks are sparse.
  if (ranked) count_losses(p, shared, tile, unit);
  const uint32_t mask = ranked ? sparse_mask(shared.losses, unit.sparse) : unit.sparse == 0 ? 0 : (1u << kSubs) - 1;

  // 4. The page's bytes.
  place_subs(layout, shared, unit, mask);
  emit_index<S>(p.cache, unit, mask);
  __syncthreads();                       // the places are there
  const Room kept_room = S::room(mean);  // where registers do not run short; else new_room, made where it is used
  tile.for_each([&](int first) {
    if (first == 0 && unit.page == 0) {
      if (unit.is_value) {
        emit_value_sinks(shared, layout.sink_tokens, unit.region + layout.sink_v_offset());
      } else {
        emit_key_sinks(shared, layout.sink_tokens, unit.region + layout.sink_k_offset());
      }
    }
#pragma unroll 1
    for (int task = warp; task < kTasks; task += S::kWarps) {
      const int in_tile = task % kSubsPerTile, quarter = task / kSubsPerTile, sub = first / kSubTokens + in_tile;
      const int row = in_tile * kSubTokens + 16 * quarter;
      uint8_t* to = unit.region + shared.place[sub];
      const Room new_room = S::room(!unit.is_value && layout.key_mean);
      const Room& room = kFindAnew ? new_room : kept_room;
      if (!(shared.mask >> sub & 1)) {
        if (unit.is_value) {
          emit_dense_values(shared, row, first + row, to);
        } else {
          emit_dense_keys(shared, row, first + row, to);
        }
      } else if (!unit.is_value) {
        const bool plain = p.k_weight == nullptr && layout.key_mean && !unit.rescale;
        if (!plain || !emit_plain_keys(shared, row, first + row, to)) {
          emit_kept_keys(shared, unit, row, first + row, layout.key_mean, room, to);
        }
      } else if (!p.cache.value_axis_token) {
        emit_kept_values(shared, unit, row, first + row, room);
      } else {
        for (int item = quarter; item < S::kD / 32; item += 4) {
          emit_kept_tokens(shared, unit, in_tile * kSubTokens, sub, item / 2, item % 2, room, to);
        }
      }
    }
  });
  __syncthreads();  // the metadata of all warps are there
  emit_meta(shared, unit.region);
}

// `units_store`: every unit stores its own new rows.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    store_compress_kernel(const __grid_constant__ StoreCompressParams p, const bool units_store) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(memory);
  const RequestRows rows = request_rows(p.batch, thread_index());  // loads that the copies below hide
  if (units_store) {
    store_last_rows<S>(p);
  } else {
    store_rows<S>(p);
  }

  if (thread_index() == 0) shared.before = 0, shared.step = gridDim.x;
  shared.pages_before[thread_index() + 1] = filled_pages(rows);  // not in a register, which would be spilled
  for (int first = 0; first < p.batch.requests; first += S::kThreads) {
    if (first > 0) {
      shared.pages_before[thread_index() + 1] = filled_pages(request_rows(p.batch, first + thread_index()));
    }
    const int pages = first + thread_index() < p.batch.requests ? shared.pages_before[thread_index() + 1] : 0;
    if (!__syncthreads_or(pages > 0)) continue;
    const int sides = p.cache.kv_heads * 2, units = scan_pages(shared, pages) * sides;
    if (thread_index() == 0) {
      // The first unit of these requests that is this block's, if all units of the launch are dealt round the grid.
      const int step = shared.step;
      shared.next = (blockIdx.x + step - shared.before % step) % step;
      shared.before += units, shared.end = units;
      shared.first = first, shared.sides = sides, shared.odd = 0;
      take_unit(p, shared, shared.unit);
    }
    __syncthreads();  // the unit is known
    while (shared.unit.there) {
      compress_unit(p, shared, units_store);
      __syncthreads();  // nobody reads its shared memory any more
      if (thread_index() == 0) shared.unit = shared.ahead;
      __syncthreads();
    }
    first = shared.first;  // no register kept it
  }
}

}  // namespace hierasparse::compress
