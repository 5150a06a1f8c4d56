// Finding work and rows: which rows go into the window, which pages a step fills, where their tokens lie.
#pragma once

#include "tile.cuh"

namespace hierasparse::compress {

__device__ __forceinline__ int log2_of(int power) { return 31 - __clz(power); }

// ---- store -----------------------------------------------------------------------------------------------------
// Place in the window of a new row's K; null for padding and for the null block, whose slots are below window_block.
template <class S>
__device__ __forceinline__ uint8_t* window_row(const StoreCompressParams& p, int64_t slot, int head) {
  if (slot < p.batch.window_block) return nullptr;
  const int shift = log2_of(p.batch.window_block);
  const int64_t token = (int64_t{head} << shift) + (slot & (p.batch.window_block - 1));
  return p.cache.window + (slot >> shift) * p.cache.window_stride + token * 4 * S::kD;
}

// New rows to their places in the window: a (row, head) is K | V there, kPieces pieces of 16 bytes, one a thread. The
// block copies items `item` and those `step` apart, and what follows each of them; row_head() tells what an item is.
template <class S, class RowHead>
__device__ __forceinline__ void copy_rows(const StoreCompressParams& p, uint32_t item, uint32_t items, uint32_t step,
                                          int limit, RowHead row_head) {
  constexpr int kPieces = S::kD / 4, kAhead = 4;  // copies in flight per thread
  const int piece = thread_index() % kPieces, half = kPieces / 2;
  const bool is_value = piece >= half;
  const uint8_t* from = static_cast<const uint8_t*>(is_value ? p.value : p.key) + piece % half * 16;
  const int64_t row_stride = is_value ? p.value_row_stride : p.key_row_stride;
  const int64_t head_stride = is_value ? p.value_head_stride : p.key_head_stride;
  for (item += thread_index() / kPieces; item < items; item += kAhead * step) {
    uint4 x[kAhead];
    int64_t slot[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t at = item + i * step;
      slot[i] = -1;
      if (at < items) {
        const int2 place = row_head(at);
        slot[i] = p.slots[place.x];
        x[i] = *reinterpret_cast<const uint4*>(from + place.x * row_stride + place.y * head_stride);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int2 place = row_head(item + i * step);
      uint8_t* to = window_row<S>(p, slot[i], place.y);
      if (to != nullptr && place.x < limit) store16(to + piece * 16, x[i]);
    }
  }
}

// All new rows.
template <class S>
__device__ __forceinline__ void store_rows(const StoreCompressParams& p) {
  constexpr int kPerBlock = S::kThreads / (S::kD / 4);
  const uint32_t heads = p.cache.kv_heads;
  // Rows from here on are padding; they can be read, so nothing waits for this number before the writes.
  const int rows = p.batch.query_start[p.batch.requests];
  copy_rows<S>(p, blockIdx.x * kPerBlock, p.rows * heads, gridDim.x * kPerBlock, rows,
               [&](uint32_t at) { return make_int2(static_cast<int>(at / heads), static_cast<int>(at % heads)); });
}

// ---- filled pages ----------------------------------------------------------------------------------------------
// A request's tokens after this step, and its queries.
struct RequestRows {
  int length, queries;
};
__device__ __forceinline__ RequestRows request_rows(const Batch& batch, int request) {
  const int i = min(request, batch.requests - 1);
  return {batch.seq_lens[i], batch.query_start[i + 1] - batch.query_start[i]};
}

// Tokens before this step; -1 if there are no queries.
__device__ __forceinline__ int computed_tokens(const RequestRows& rows) {
  return rows.queries > 0 && rows.length >= rows.queries ? rows.length - rows.queries : -1;
}
__device__ __forceinline__ int computed_tokens(const Batch& batch, int request) {
  return computed_tokens(request_rows(batch, request));
}

// How many pages the step fills.
__device__ __forceinline__ int filled_pages(const RequestRows& rows) {
  const int computed = computed_tokens(rows);
  return computed < 0 ? 0 : rows.length / kPageTokens - computed / kPageTokens;
}

// New rows that lie in no page which the step fills; the units store the others, which they read anyway.
template <class S>
__device__ __forceinline__ void store_last_rows(const StoreCompressParams& p) {
  constexpr int kPerBlock = S::kThreads / (S::kD / 4);
  const int heads = p.cache.kv_heads;
  for (int i = blockIdx.x; i < p.batch.requests * heads; i += gridDim.x) {
    const int request = i / heads, head = i % heads, end = p.batch.query_start[request + 1];
    const RequestRows all = request_rows(p.batch, request);
    const int rows = filled_pages(all) > 0 ? all.length % kPageTokens : max(all.queries, 0);
    copy_rows<S>(p, 0, rows, kPerBlock, end, [&](uint32_t at) { return make_int2(end - rows + at, head); });
  }
}

// Sums `pages` of the block's threads into shared.pages_before; returns the total. Two barriers.
template <class S>
__device__ __forceinline__ int scan_pages(Shared<S>& shared, int pages) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  int sum = pages;  // of the lanes up to this one
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int left = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == kWarp - 1) shared.warp_total[warp] = sum;
  __syncthreads();
  for (int i = 0; i < warp; ++i) sum += shared.warp_total[i];
  shared.pages_before[thread_index() + 1] = sum;
  if (thread_index() == 0) shared.pages_before[0] = 0;
  __syncthreads();
  return shared.pages_before[S::kThreads];
}

// The request, counted from the first that was scanned, whose pages contain number `page`.
template <class S>
__device__ __forceinline__ int find_request(const Shared<S>& shared, int page) {
  int low = 0;
#pragma unroll
  for (int step = S::kThreads / 2; step > 0; step /= 2) {
    if (shared.pages_before[low + step] <= page) low += step;
  }
  return low;
}

// The block's next unit, of the requests that were scanned. One thread does this. Neighbouring numbers are K and V of a
// head; they change places in every second turn, so that no block gets only the slower ones.
template <class S>
__device__ __forceinline__ void take_unit(const StoreCompressParams& p, Shared<S>& shared, Unit& out) {
  Unit unit{};
  unit.there = shared.next < shared.end;
  if (unit.there) {
    const int at = shared.next ^ (shared.odd & ~shared.step & 1), sides = shared.sides;
    const int page = at / sides, side = at % sides, found = find_request(shared, page);
    unit.is_value = side % 2 != 0;
    unit.head = side / 2;
    unit.request = shared.first + found;
    unit.page = computed_tokens(p.batch, unit.request) / kPageTokens + page - shared.pages_before[found];
    unit.sparse = unit.is_value ? p.cache.layout.sparse_v : p.cache.layout.sparse_k;
    unit.rescale = (unit.is_value ? p.rescale_v : p.rescale_k) != 0;
    const int64_t id = p.batch.page_table[unit.request * p.batch.page_table_stride + unit.page];
    // Warm-up steps run on the null block, which is never written.
    unit.region =
        id <= 0 ? nullptr : p.cache.pages + id * p.cache.page_stride + int64_t{unit.head} * p.cache.layout.head_bytes();
    if (side == 0 && id > 0 && p.pages_compressed != nullptr) {
      atomicAdd(reinterpret_cast<unsigned long long*>(p.pages_compressed), 1ull);
    }
  }
  out = unit;
  shared.next += shared.step, shared.odd ^= 1;
}

// ---- rows of a page --------------------------------------------------------------------------------------------
// Addresses of a token's row: new tokens come from the step's own rows, since other blocks are still writing them into
// the window, and go there if `store`; older ones come from the window. A unit without a page needs no older ones.
template <class S>
__device__ __forceinline__ void find_row(const StoreCompressParams& p, Shared<S>& shared, const Unit& unit, int token,
                                         bool store) {
  const int position = unit.page * kPageTokens + token, fresh = position - computed_tokens(p.batch, unit.request);
  shared.target[token] = nullptr;
  if (fresh >= 0 || unit.region == nullptr) {
    const int64_t row = p.batch.query_start[unit.request] + max(fresh, 0);
    shared.source[token] =
        unit.is_value
            ? static_cast<const uint8_t*>(p.value) + row * p.value_row_stride + unit.head * p.value_head_stride
            : static_cast<const uint8_t*>(p.key) + row * p.key_row_stride + unit.head * p.key_head_stride;
    uint8_t* to = store && fresh >= 0 ? window_row<S>(p, p.slots[row], unit.head) : nullptr;
    if (to != nullptr) shared.target[token] = to + (unit.is_value ? 2 * S::kD : 0);
  } else {
    const int shift = log2_of(p.batch.window_block);
    const int64_t block = p.batch.window_table[unit.request * p.batch.window_table_stride + (position >> shift)];
    const int64_t at = (int64_t{unit.head} << shift) + (position & (p.batch.window_block - 1));
    shared.source[token] = p.cache.window + block * p.cache.window_stride + (at * 2 + unit.is_value) * 2 * S::kD;
  }
}

// A page's tile in shared memory.
template <class S>
struct Tile {
  static constexpr int kPieces = S::kD / 8, kRows = S::kThreads / kPieces;  // a thread's piece of every kRows-th row
  Shared<S>& shared;
  bool store;        // new rows go to the window, too
  int loaded = -1;   // first row of the tile that is there
  int started = -1;  // of the one whose copies are under way

  // The thread's pieces: of row `row` and those kRows, 2 kRows ... below it.
  struct Pieces {
    int row = thread_index() / kPieces, piece = thread_index() % kPieces;
    uint32_t first = row_offset<S>(row) ^ piece * 16;
    __device__ __forceinline__ uint32_t offset(int i) const {  // swizzle() repeats after 16 rows
      return kRows % 16 == 0 ? first + i * 2 * S::kD : row_offset<S>(row + i) ^ piece * 16;
    }
  };

  // Starts copying rows first ... first + kTile - 1.
  __device__ __forceinline__ void start(int first) {
    const Pieces mine;
    const uint8_t* const* from = shared.source + first + mine.row;
#pragma unroll 4
    for (int i = 0; i < S::kTile; i += kRows) {
      copy16_async(shared_address(shared.tile + mine.offset(i)), from[i] + mine.piece * 16);
    }
    commit_copies();
    started = first;
  }

  // The same pieces to the window.
  __device__ __forceinline__ void store_rows(int first) const {
    const Pieces mine;
    uint8_t* const* to = shared.target + first + mine.row;
#pragma unroll 4
    for (int i = 0; i < S::kTile; i += kRows) {
      if (to[i] != nullptr) store16(to[i] + mine.piece * 16, eight_values(shared, mine.offset(i)));
    }
  }

  // Runs body(first) for each tile of the page.
  template <class Body>
  __device__ __forceinline__ void for_each(Body body) {
#pragma unroll 1
    for (int first = 0; first < kPageTokens; first += S::kTile) {
      if (loaded != first) {
        if (started != first) {
          __syncthreads();  // nobody reads the old tile any more
          start(first);
        }
        wait_copies<0>();
        if (store) store_rows(first);
        if (first + S::kTile == kPageTokens) store = false;  // all tiles were there once
        __syncthreads();                                     // everybody's copies have landed
        loaded = first;
      }
      body(first);
    }
  }
};

}  // namespace hierasparse::compress
