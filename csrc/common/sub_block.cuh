// Where a kernel finds a sub-block of a page.
#pragma once

#include "../page.h"

namespace hierasparse {

// Bytes from a side's first sub-block to sub-block `sub`: as PageLayout::k_sub and v_sub have it, without a loop.
// `mask` says which ones are sparse, `sparse` how many.
template <int kD>
__device__ __forceinline__ int sub_block_offset(uint32_t mask, int sparse, int sub) {
  constexpr PageLayout kSizes{kD, 2, 0, 0, 0, false};
  const int rank = __popc(mask & ((1u << sub) - 1));
  return mask >> sub & 1 ? rank * kSizes.sparse_bytes()
                         : sparse * kSizes.sparse_bytes() + (sub - rank) * kSizes.dense_bytes();
}

}  // namespace hierasparse
