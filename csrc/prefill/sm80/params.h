// What the portable kernel works out on the host, so that it takes no registers on the device.
#pragma once

#include "../../common/log2.h"
#include "../params.h"

namespace hierasparse::prefill_sm80 {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxPairs = 8;

// Tiles of eight columns that a warp has: as many as registers hold, since every warp reads all of K and V.
HS_HD constexpr int tiles_of(int head_size) { return head_size <= 128 ? 3 : 1; }
HS_HD constexpr int columns_of(int head_size) { return kWarps * 8 * tiles_of(head_size); }

// Whether a GPU may have room for one stage of K and V only: they all have for two of up to 128 channels.
HS_HD constexpr bool can_be_alone(int head_size) { return head_size > 128; }

struct Arguments {
  PrefillParams params;
  int head_bytes, k_offset, v_offset;  // of the layout
  int group;                           // query heads per KV head
  float scale_log2;                    // scale * kLog2E
  // The ring: `pairs` stages of K and as many of V.
  int key_bytes, pair_bytes;     // of a stage of K, and of both
  int pairs;                     // 0: not one fits
  int keys_ahead, values_ahead;  // sub-blocks from the one in use to the one that is copied

  // For a ring of at most `ring_bytes`.
  Arguments(const PrefillParams& p, int ring_bytes)
      : params(p),
        head_bytes(p.cache.layout.head_bytes()),
        k_offset(p.cache.layout.k_offset()),
        v_offset(p.cache.layout.v_offset()),
        group(p.heads / p.cache.kv_heads),
        scale_log2(p.scale * kLog2E) {
    const PageLayout& layout = p.cache.layout;
    key_bytes = layout.sparse_k == kSubs ? layout.sparse_bytes() : layout.dense_bytes();
    pair_bytes = key_bytes + (layout.sparse_v == kSubs ? layout.sparse_bytes() : layout.dense_bytes());
    pairs = ring_bytes / pair_bytes < kMaxPairs ? ring_bytes / pair_bytes : kMaxPairs;
    // Of more than three stages each is filled again two sub-blocks after its last use, so that nobody waits for the
    // slowest warp.
    keys_ahead = values_ahead = pairs > 3 ? pairs - 2 : 1;
    if (pairs == 1) values_ahead = 0;
  }
};

}  // namespace hierasparse::prefill_sm80
