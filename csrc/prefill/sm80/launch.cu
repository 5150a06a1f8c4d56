// Chooses the instantiation; the kernels themselves are compiled in instantiations/.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../common/device.h"
#include "../checks.h"
#include "launch.h"
#include "params.h"

namespace hierasparse {
namespace prefill_sm80 {

template <typename T, int kD, bool kTokens>
cudaError_t run(const PrefillParams& p, int shared_bytes, cudaStream_t stream);

namespace {

template <typename T, int kD>
cudaError_t with_axis(const PrefillParams& p, cudaStream_t stream) {
  const int shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return p.cache.value_axis_token ? run<T, kD, true>(p, shared_bytes, stream)
                                  : run<T, kD, false>(p, shared_bytes, stream);
}

template <typename T>
cudaError_t with_dtype(const PrefillParams& p, cudaStream_t stream) {
  switch (p.cache.layout.head_size) {
    case 64:
      return with_axis<T, 64>(p, stream);
    case 128:
      return with_axis<T, 128>(p, stream);
    case 256:
      return with_axis<T, 256>(p, stream);
    default:
      throw std::runtime_error("HieraSparse: prefill has kernels for head sizes 64, 128 and 256, not for " +
                               std::to_string(p.cache.layout.head_size) + ".");
  }
}

}  // namespace
}  // namespace prefill_sm80

int prefill_sm80_columns(int head_size) { return prefill_sm80::columns_of(head_size); }

void launch_prefill_sm80(const PrefillParams& p, cudaStream_t stream) {
  if (p.tile_count == 0) return;
  check_prefill(p);
  check_launched(p.cache.dtype == Dtype::kFloat16 ? prefill_sm80::with_dtype<__half>(p, stream)
                                                  : prefill_sm80::with_dtype<__nv_bfloat16>(p, stream));
}

}  // namespace hierasparse
