// Chooses the instantiation; the kernels themselves are compiled in instantiations/.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "../common/device.h"
#include "launch.h"

namespace hierasparse {
namespace compress {

template <typename T, int kD>
cudaError_t run(const StoreCompressParams& p, int shared_limit, cudaStream_t stream);

namespace {

void require(bool good, const char* sentence) {
  if (!good) throw std::runtime_error(std::string("HieraSparse: store and compress: ") + sentence);
}

// Most bytes of shared memory that a block may have.
int shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

template <typename T>
cudaError_t with_dtype(const StoreCompressParams& p, cudaStream_t stream) {
  switch (p.cache.layout.head_size) {
    case 64:
      return run<T, 64>(p, shared_limit(), stream);
    case 128:
      return run<T, 128>(p, shared_limit(), stream);
    case 256:
      return run<T, 256>(p, shared_limit(), stream);
    default:
      throw std::runtime_error("HieraSparse: store and compress has kernels for head sizes 64, 128 and 256, not for " +
                               std::to_string(p.cache.layout.head_size) + ".");
  }
}

}  // namespace
}  // namespace compress

void launch_store_compress(const StoreCompressParams& p, cudaStream_t stream) {
  const int block = p.batch.window_block;
  compress::require(block > 0 && (block & (block - 1)) == 0 && block <= kPageTokens,
                    "the tokens of a window block must be a power of two and at most 256.");
  compress::require(p.cache.layout.value_bytes == 2, "a stored value must have two bytes.");
  compress::require(p.sms > 0, "the number of SMs must be positive.");
  if (p.rows <= 0 || p.batch.requests <= 0) return;
  const cudaError_t error = p.cache.dtype == Dtype::kFloat16 ? compress::with_dtype<__half>(p, stream)
                                                             : compress::with_dtype<__nv_bfloat16>(p, stream);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("HieraSparse: the store and compress kernel was not launched: ") +
                             cudaGetErrorString(error));
  }
}

}  // namespace hierasparse
