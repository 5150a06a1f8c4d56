#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace hierasparse {

// CTAs that fill the current device; the `ctas` of DecodeParams.
int decode_ctas();

// Attention of every request with 1 to max_query_len queries over its pages and window; writes their rows of `out`.
// Throws std::invalid_argument for what it cannot do, and std::runtime_error for CUDA errors.
void launch_decode(const DecodeParams& params, cudaStream_t stream);

}  // namespace hierasparse
