// What every kernel is told of a step and of a layer's caches.  Plain structs of device pointers: no libtorch.
#pragma once

#include <cstdint>

#include "page.h"

namespace hierasparse {

enum class Dtype : int { kBfloat16 = 0, kFloat16 = 1 };

// A step, as hierasparse_vllm/ops/batch.py describes it.
struct Batch {
  const int32_t* query_start;   // [requests + 1], first row of each request's queries
  const int32_t* seq_lens;      // [requests], tokens after this step; 0 for padding
  const int32_t* page_table;    // [requests, page_table_stride]
  const int32_t* window_table;  // [requests, window_table_stride]
  int64_t page_table_stride;    // in entries
  int64_t window_table_stride;
  int requests;
  int window_block;     // tokens per window block
  int local_window;     // W of the read rule
  int own_chunk_dense;  // option `prefill: chunk`: all queries of a request use the border of its first
};

// The caches of a layer.
struct Cache {
  uint8_t* pages;       // a block is [kv_heads] regions of layout.head_bytes()
  uint8_t* window;      // a block is [kv_heads, window_block, 2 * head_size] values, K then V
  int64_t page_stride;  // bytes from a block to the next; both tables count blocks of one pool
  int64_t window_stride;
  int kv_heads;
  int value_axis_token;  // V's groups of four lie along tokens
  PageLayout layout;
  Dtype dtype;
};

// The query at `position` reads pages below the returned position, and dense tokens from it on (ReadRule in batch.py).
HS_HD inline int compressed_below(int position, int local_window) {
  const int pages = position / kPageTokens - local_window / kPageTokens;
  return pages > 0 ? pages * kPageTokens : 0;
}

}  // namespace hierasparse
