// Chooses the instantiation; the kernels themselves are compiled in instantiations/.
#include "../common/device.h"
#include "../common/dispatch.h"
#include "launch.h"

namespace hierasparse {
namespace compress {

template <typename T, int kD>
cudaError_t run(const StoreCompressParams& p, int shared_limit, cudaStream_t stream);

}  // namespace compress

void launch_store_compress(const StoreCompressParams& p, cudaStream_t stream) {
  const int block = p.batch.window_block;
  require((block & (block - 1)) == 0, "window_block of store and compress must be a power of two");
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
