// What every launcher of a prefill kernel checks.
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

}  // namespace hierasparse
