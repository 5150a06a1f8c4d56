// What every launcher of a prefill kernel checks and asks.
#pragma once

#include "../common/require.h"
#include "params.h"

namespace hierasparse {

inline void check_prefill(const PrefillParams& p) {
  require(int64_t{p.tile_count} * p.cache.kv_heads * p.splits <= INT32_MAX,
          "prefill got more tiles than fit into one launch");
  require(p.scale > 0.f, "the scale of the logits must be positive");
}

// Whether sub-blocks may be dense: those layouts have kernels of their own.
inline bool is_mixed(const PageLayout& layout) { return layout.sparse_k < kSubs || layout.sparse_v < kSubs; }

}  // namespace hierasparse
