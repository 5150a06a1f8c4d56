// What every launcher of a prefill kernel checks and asks.
#pragma once

#include <stdexcept>

#include "params.h"

namespace hierasparse {

inline void check_prefill(const PrefillParams& p) {
  if (int64_t{p.tile_count} * p.cache.kv_heads * p.splits > INT32_MAX) {
    throw std::runtime_error("HieraSparse: prefill got more tiles than fit into one launch.");
  }
  if (!(p.scale > 0.f)) throw std::runtime_error("HieraSparse: the scale of the logits must be positive.");
}

// Whether sub-blocks may be dense: those layouts have kernels of their own.
inline bool is_mixed(const PageLayout& layout) { return layout.sparse_k < kSubs || layout.sparse_v < kSubs; }

}  // namespace hierasparse
