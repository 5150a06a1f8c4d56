#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace hierasparse {

// Both throw std::invalid_argument for what they cannot do, and std::runtime_error for CUDA errors.
void launch_expand(const ExpandParams& params, cudaStream_t stream);
void launch_merge(const MergeParams& params, cudaStream_t stream);

}  // namespace hierasparse
