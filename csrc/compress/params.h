// Arguments of the kernel that stores a step's keys and values and compresses the pages that the step fills.
#pragma once

#include "../params.h"

namespace hierasparse {

struct StoreCompressParams {
  Batch batch;
  Cache cache;
  const void* key;    // [rows, kv_heads, head_size], after rotary embedding
  const void* value;  // the same shape
  int64_t key_row_stride, key_head_stride, value_row_stride, value_head_stride;  // bytes
  const int64_t* slots;       // [rows], place in the window: block * window_block + offset; below window_block: none
  int rows;                   // of key, value and slots; those from query_start[requests] on are padding
  const int32_t* k_order;     // [kv_heads, head_size]: channel at each place of K's stored order
  const float* k_weight;      // [kv_heads, head_size]: factor, not negative, of a channel's score; or null: 1
  int rescale_k, rescale_v;   // kept values are enlarged to make up for the dropped ones
  int64_t* pages_compressed;  // counter on the device, or null
  int sms;                    // of the device
};

}  // namespace hierasparse
