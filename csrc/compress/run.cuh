// Launch of one instantiation.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernel.cuh"

namespace hierasparse::compress {

// Blocks that do something: for the copies, and for all units that could fill.
template <class S>
int64_t useful_blocks(const StoreCompressParams& p) {
  const int64_t copies = int64_t{p.rows} * p.cache.kv_heads * (S::kD / 4) / S::kThreads + 1;
  const int64_t pages = std::min<int64_t>(p.rows, p.rows / kPageTokens + p.batch.requests);
  return std::max(copies, pages * p.cache.kv_heads * 2);
}

template <class S>
cudaError_t run_shape(const StoreCompressParams& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<S>);
  const auto kernel = store_compress_kernel<S>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      error != cudaSuccess) {
    return error;
  }
  // A few tokens per request rarely fill a page: one block per SM then starts and ends soonest.
  const bool many = p.rows >= 4 * kPageTokens;
  const int64_t most = int64_t{p.sms} * (many ? S::kBlocksPerSm : 1);
  const int blocks = static_cast<int>(std::min(most, useful_blocks<S>(p)));
  kernel<<<blocks, S::kThreads, kBytes, stream>>>(p, many);
  return cudaGetLastError();
}

// T: __nv_bfloat16 or __half.
template <typename T, int kD>
cudaError_t run(const StoreCompressParams& p, int shared_limit, cudaStream_t stream) {
  if constexpr (kD == 256) {
    using Whole = Shape<T, kD, kPageTokens>;
    using Part = Shape<T, kD, kSubTokens>;
    return sizeof(Shared<Whole>) <= shared_limit ? run_shape<Whole>(p, stream) : run_shape<Part>(p, stream);
  } else {
    return run_shape<Shape<T, kD, kPageTokens>>(p, stream);
  }
}

}  // namespace hierasparse::compress
