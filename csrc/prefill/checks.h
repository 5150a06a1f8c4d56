// What every launcher of a prefill kernel checks, and how it tells that a launch failed.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "params.h"

namespace hierasparse {

inline void check_prefill(const PrefillParams& p) {
  if (int64_t{p.tile_count} * p.cache.kv_heads * p.splits > INT32_MAX) {
    throw std::runtime_error("HieraSparse: prefill got more tiles than fit into one launch.");
  }
  if (!(p.scale > 0.f)) throw std::runtime_error("HieraSparse: the scale of the logits must be positive.");
}

inline void check_launched(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("HieraSparse: the prefill kernel was not launched: ") +
                             cudaGetErrorString(error));
  }
}

}  // namespace hierasparse
