#pragma once

#include <cuda_runtime.h>

#include "../params.h"
#include "columns.h"

namespace hierasparse {

// Attention of all tiles over their pages, for bfloat16, head sizes 64 and 128, V along tokens, on sm_90a.
// Throws std::invalid_argument for what it cannot do, and std::runtime_error for CUDA errors.
void launch_prefill_sm90(const PrefillParams& params, cudaStream_t stream);

}  // namespace hierasparse
