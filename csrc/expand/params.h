// Arguments of the two kernels around a prefill with FlashAttention: pages to dense rows, and the merge of partial
// results.
#pragma once

#include <cstdint>

#include "../params.h"

namespace hierasparse {

// Pages to dense rows: value c of head h of token t of the i-th page of `pages` goes to
// k (v) + i * page_stride + t * token_stride + h * head_stride + 2 * c, all strides in bytes.  Behind them, from page
// `count` on, go the tokens of window blocks.
struct ExpandParams {
  Cache cache;
  const int32_t* pages;  // [count] page ids
  int count;
  const int32_t* blocks;  // [block_count] window blocks
  const int32_t* tokens;  // [block_count], how many tokens each has; its other rows become zero
  int block_count;
  int window_block;  // tokens per window block, a multiple of 64
  void* k;
  void* v;
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;
  const int32_t* k_order;  // [kv_heads, head_size], the channel at each place of the channel order
};

// Attention over disjoint sets of keys: out and out_lse, which hold one of them, get the `parts` others merged into
// them.
struct MergeParams {
  void* out;              // rows of [heads, head_size]
  float* out_lse;         // [heads, out_lse_stride], natural logarithms; -inf: nothing there yet, `out` does not count
  const void* part;       // [parts] times rows of the same shape
  const float* part_lse;  // [parts, heads, part_lse_stride]; -inf: nothing to merge, the row does not count
  int parts;              // at least 1
  int64_t out_stride;     // bytes from a row to the next
  int64_t part_stride;
  int64_t parts_stride;    // bytes from a part to the next
  int64_t out_lse_stride;  // entries from a head to the next
  int64_t part_lse_stride;
  int64_t parts_lse_stride;  // entries from a part to the next
  const int32_t* rows;       // [count], the row of `out` for each row of `part`, negative: skip it; null: the same row
  int count;
  int heads;
  int head_size;
  int out_float;   // `out` is float32, not `dtype`
  int part_float;  // the same for `part`
  Dtype dtype;
};

}  // namespace hierasparse
