#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace hierasparse {

// Both throw std::runtime_error for arguments that they cannot serve and for CUDA errors.
void launch_expand(const ExpandParams& params, cudaStream_t stream);
void launch_merge(const MergeParams& params, cudaStream_t stream);

}  // namespace hierasparse
