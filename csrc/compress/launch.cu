// Chooses the instantiation; the kernels themselves are compiled in instantiations/.
#include "../common/device.h"
#include "../common/dispatch.h"
#include "launch.h"

namespace hierasparse {
namespace compress {

template <typename T, int kD>
cudaError_t run(const StoreCompressParams& p, int shared_limit, cudaStream_t stream);

namespace {

void require(bool good, const char* sentence) {
  if (!good) throw std::runtime_error(std::string("HieraSparse: store and compress: ") + sentence);
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
  const int shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const cudaError_t error = with_dtype(p.cache.dtype, [&](auto dtype) {
    return with_head_size(p.cache.layout.head_size, "store and compress", [&](auto d) {
      return compress::run<typename decltype(dtype)::type, decltype(d)::value>(p, shared_limit, stream);
    });
  });
  check_launched(error, "store and compress");
}

}  // namespace hierasparse
