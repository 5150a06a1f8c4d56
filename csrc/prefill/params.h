// Arguments of the fused prefill kernels: attention of long chunks over their compressed pages.
//
// Tokens of the dense window are not part of it: they are a short FlashAttention call per tile, merged by log-sum-exp.
#pragma once

#include "../params.h"

namespace hierasparse {

// Consecutive queries of one request.  With a KV head it is the work of one CTA: its columns are (query, head of the
// group), column = query * group + head, at most prefill_columns(...) of them.
struct PrefillTile {
  int32_t request;   // row of the page table
  int32_t row;       // of the batch, of the first query
  int32_t queries;   // at least 1
  int32_t position;  // of the first query in its request
  int32_t computed;  // position of the request's first query of this step: with own_chunk_dense its border is all's
};

struct PrefillParams {
  Batch batch;  // only page_table, its stride, local_window and own_chunk_dense are read
  Cache cache;  // the window is not read
  const PrefillTile* tiles;
  int tile_count;
  const void* query;                            // [rows, heads, head_size]
  int64_t query_row_stride, query_head_stride;  // bytes
  // Each split is attention over its share of a tile's pages: of n pages, n * s / splits and up, below
  // n * (s + 1) / splits.  out is normalised; without keys it is 0 and lse -inf.  Rows of no tile are not written.
  int splits;
  void* out;                                                  // [splits, rows, heads, head_size], the model's dtype
  float* lse;                                                 // [splits, heads, rows], natural logarithms
  int64_t out_split_stride, out_row_stride, out_head_stride;  // bytes
  int64_t lse_split_stride, lse_head_stride;                  // entries
  int heads;                                                  // query heads, a multiple of cache.kv_heads
  float scale;                                                // of q . k
  const int32_t* k_order;  // [kv_heads, head_size]: channel at each place of the stored order
};

// The page border of a tile's query number `query`.
HS_HD inline int border_of(const PrefillParams& p, const PrefillTile& tile, int query) {
  return compressed_below(p.batch.own_chunk_dense ? tile.computed : tile.position + query, p.batch.local_window);
}

}  // namespace hierasparse
