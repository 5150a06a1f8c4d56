// What the portable kernel works out on the host, so that it takes no registers on the device.
#pragma once

#include "../params.h"

namespace hierasparse::prefill_sm80 {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// Tiles of eight columns that a warp has: as many as registers hold, since every warp loads all of K and V.
HS_HD constexpr int tiles_of(int head_size) { return head_size <= 128 ? 3 : 1; }
HS_HD constexpr int columns_of(int head_size) { return kWarps * 8 * tiles_of(head_size); }

struct Arguments {
  PrefillParams params;
  int head_bytes, k_offset, v_offset;  // of the layout
  int group;                           // query heads per KV head
  float scale_log2;                    // scale * log2(e)
};

}  // namespace hierasparse::prefill_sm80
