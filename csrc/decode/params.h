// Arguments of the paged decode kernel.
#pragma once

#include "../params.h"

namespace hierasparse {

struct DecodeParams {
  Batch batch;
  Cache cache;
  const void* query;                                                             // [rows, heads, head_size]
  void* out;                                                                     // the same shape
  int64_t query_row_stride, query_head_stride, out_row_stride, out_head_stride;  // bytes
  int heads;               // query heads, a multiple of cache.kv_heads
  float scale;             // of q . k
  const int32_t* k_order;  // [kv_heads, head_size]: channel at each place of the stored order
  float* workspace;        // decode_workspace_floats(...)
  int32_t* counters;       // [ctas], zero before the first launch; every launch leaves them zero
  int max_query_len;       // most queries of one request, at most kMaxQueryLen; requests with more are skipped
  int ctas;                // of decode_ctas()
  // Set by launch_decode: worked out in the kernel, they would take registers and time.
  int group;         // query heads of a KV head
  int head_bytes;    // of cache.layout
  float scale_log2;  // scale * kLog2E
  // The caller's again, and last: ahead of what launch_decode sets, other kernels' machine code changes with it.
  // Whether 2:4 keys are expanded for dense products; only with V along channels.  Decode waits for memory, not for
  // tensor cores, and a process that has launched a kernel with sparse products runs at lower clocks from then on,
  // where power is the limit (H200, docs/kernels.md).
  bool expand_keys;
};

constexpr int kMaxQueryLen = 16;

// Columns (query, head of the group) that a CTA works on: one or two tensor-core tiles of eight.  With 256 channels the
// registers hold one; more columns are then further lanes, which read the same pages from L2.
HS_HD constexpr int decode_columns(int head_size, int group, int max_query_len) {
  return head_size <= 128 && group * max_query_len > 8 ? 16 : 8;
}

// A CTA leaves at most two unfinished results: of the work it begins with and of the work it ends with.
HS_HD constexpr int64_t decode_workspace_floats(int head_size, int ctas) {
  return int64_t{2} * ctas * 16 * (head_size + 2);
}

}  // namespace hierasparse
