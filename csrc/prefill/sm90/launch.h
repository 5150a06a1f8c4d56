#pragma once

#include <cuda_runtime.h>

#include "../params.h"
#include "columns.h"

namespace hierasparse {

// Attention of all tiles over their pages, for bfloat16, head sizes 64 and 128, V along tokens, on sm_90a.
// Throws std::runtime_error with a sentence for what it cannot do.
void launch_prefill_sm90(const PrefillParams& params, cudaStream_t stream);

}  // namespace hierasparse
