#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace hierasparse {

// Writes the step's rows of key and value into the window, and every page that the step fills; one launch, whose grid
// depends on the numbers of requests, rows and SMs alone.
// Throws std::invalid_argument for what it cannot do, and std::runtime_error for CUDA errors.
void launch_store_compress(const StoreCompressParams& params, cudaStream_t stream);

}  // namespace hierasparse
