#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace hierasparse {

// Columns of a tile.
int prefill_sm80_columns(int head_size);

// Attention of every tile over its pages, by mma.sp: for all layouts, on every GPU since sm_80.
// Throws std::invalid_argument for what it cannot do, and std::runtime_error for CUDA errors.
void launch_prefill_sm80(const PrefillParams& params, cudaStream_t stream);

}  // namespace hierasparse
