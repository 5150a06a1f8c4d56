// Finding work and rows: which rows go into the window, which pages a step fills, where their tokens lie.
#pragma once

#include "tile.cuh"

namespace hierasparse::compress {

__device__ __forceinline__ int log2_of(int power) { return 31 - __clz(power); }

// ---- store -----------------------------------------------------------------------------------------------------
// New rows to their places in the window: a (row, head) is K | V there, kPieces pieces of 16 bytes, one a thread.
template <class S>
__device__ __forceinline__ void store_rows(const StoreCompressParams& p) {
  constexpr int kPieces = S::kD / 4, kAhead = 4;  // copies in flight per thread
  constexpr int kPerBlock = S::kThreads / kPieces;
  const int piece = threadIdx.x % kPieces, half = kPieces / 2;
  const bool is_value = piece >= half;
  const uint8_t* from = static_cast<const uint8_t*>(is_value ? p.value : p.key) + piece % half * 16;
  const int64_t row_stride = is_value ? p.value_row_stride : p.key_row_stride;
  const int64_t head_stride = is_value ? p.value_head_stride : p.key_head_stride;
  const uint32_t heads = p.cache.kv_heads, items = p.rows * heads, step = gridDim.x * kPerBlock;
  const int shift = log2_of(p.batch.window_block);
  // Rows from here on are padding; they can be read, so nothing waits for this number before the writes.
  const int rows = p.batch.query_start[p.batch.requests];

  for (uint32_t item = blockIdx.x * kPerBlock + threadIdx.x / kPieces; item < items; item += kAhead * step) {
    uint4 x[kAhead];
    int64_t slot[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t at = item + i * step, row = at / heads, head = at % heads;
      slot[i] = -1;
      if (at < items) {
        slot[i] = p.slots[row];
        x[i] = *reinterpret_cast<const uint4*>(from + row * row_stride + head * head_stride);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t at = item + i * step;
      // A slot of padding, or of the null block, is below window_block.
      if (slot[i] < p.batch.window_block || static_cast<int>(at / heads) >= rows) continue;
      const int64_t token = (int64_t{at % heads} << shift) + (slot[i] & (p.batch.window_block - 1));
      *reinterpret_cast<uint4*>(p.cache.window + (slot[i] >> shift) * p.cache.window_stride + token * 4 * S::kD +
                                piece * 16) = x[i];
    }
  }
}

// ---- filled pages ----------------------------------------------------------------------------------------------
// Tokens of a request before this step; -1 if it has no queries.
__device__ __forceinline__ int computed_tokens(const Batch& batch, int request) {
  const int length = batch.seq_lens[request];
  const int queries = batch.query_start[request + 1] - batch.query_start[request];
  return queries > 0 && length >= queries ? length - queries : -1;
}

// How many pages the step fills of a request.
__device__ __forceinline__ int filled_pages(const Batch& batch, int request) {
  if (request >= batch.requests) return 0;
  const int computed = computed_tokens(batch, request);
  return computed < 0 ? 0 : batch.seq_lens[request] / kPageTokens - computed / kPageTokens;
}

// Sums `pages` of the block's threads into shared.pages_before; returns the total. Two barriers.
template <class S>
__device__ __forceinline__ int scan_pages(Shared<S>& shared, int pages) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = pages;  // of the lanes up to this one
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int left = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == kWarp - 1) shared.warp_total[warp] = sum;
  __syncthreads();
  for (int i = 0; i < warp; ++i) sum += shared.warp_total[i];
  shared.pages_before[threadIdx.x + 1] = sum;
  if (threadIdx.x == 0) shared.pages_before[0] = 0;
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

// The block's unit, number `at` of those of the requests from `first` on that were scanned. One thread does this.
template <class S>
__device__ __forceinline__ void find_unit(const StoreCompressParams& p, Shared<S>& shared, int first, int at) {
  const int heads = p.cache.kv_heads, page = at / (2 * heads), side = at % (2 * heads);
  Unit unit;
  unit.is_value = side % 2 != 0;
  unit.head = side / 2;
  const int found = find_request(shared, page);
  unit.request = first + found;
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
  shared.unit = unit;
}

// ---- rows of a page --------------------------------------------------------------------------------------------
// Address of a token's row: new tokens come from the step's own rows, since other blocks are still writing them into
// the window; older ones from the window.
template <class S>
__device__ __forceinline__ const uint8_t* source_row(const StoreCompressParams& p, const Unit& unit, int token) {
  const int position = unit.page * kPageTokens + token, fresh = position - computed_tokens(p.batch, unit.request);
  if (fresh >= 0) {
    const int64_t row = p.batch.query_start[unit.request] + fresh;
    return unit.is_value
               ? static_cast<const uint8_t*>(p.value) + row * p.value_row_stride + unit.head * p.value_head_stride
               : static_cast<const uint8_t*>(p.key) + row * p.key_row_stride + unit.head * p.key_head_stride;
  }
  const int shift = log2_of(p.batch.window_block);
  const int64_t block = p.batch.window_table[unit.request * p.batch.window_table_stride + (position >> shift)];
  const int64_t at = (int64_t{unit.head} << shift) + (position & (p.batch.window_block - 1));
  return p.cache.window + block * p.cache.window_stride + (at * 2 + unit.is_value) * 2 * S::kD;
}

// Rows first ... first + kTile - 1 of the page into the tile; returns when this thread's copies have landed.
template <class S>
__device__ __forceinline__ void load_tile(Shared<S>& shared, int first) {
  constexpr int kPieces = S::kD / 8, kRows = S::kThreads / kPieces;  // a thread's piece of every kRows-th row
  const int piece = threadIdx.x % kPieces;
#pragma unroll 2
  for (int row = threadIdx.x / kPieces; row < S::kTile; row += kRows) {
    copy16_async(shared_address(shared.tile + (row_offset<S>(row) ^ piece * 16)),
                 shared.source[first + row] + piece * 16);
  }
  commit_copies();
  wait_copies<0>();
}

// Runs body(first) for each tile of the page, loaded; `loaded` is the first row of the one in shared memory, or -1.
template <class S, class Body>
__device__ __forceinline__ void for_each_tile(Shared<S>& shared, int& loaded, Body body) {
#pragma unroll 1
  for (int first = 0; first < kPageTokens; first += S::kTile) {
    if (loaded != first) {
      __syncthreads();  // nobody reads the old tile any more, and the addresses of rows are there
      load_tile<S>(shared, first);
      __syncthreads();  // everybody's copies have landed
      loaded = first;
    }
    body(first);
  }
}

}  // namespace hierasparse::compress
