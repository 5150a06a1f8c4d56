// Chooses the instantiation; the kernels themselves are compiled in instantiations/.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../checks.h"
#include "launch.h"
#include "params.h"

namespace hierasparse {
namespace prefill_sm80 {

template <typename T, int kD, bool kTokens>
cudaError_t run(const Arguments& a, cudaStream_t stream);

namespace {

template <typename T, int kD>
cudaError_t with_axis(const Arguments& a, cudaStream_t stream) {
  return a.params.cache.value_axis_token ? run<T, kD, true>(a, stream) : run<T, kD, false>(a, stream);
}

template <typename T>
cudaError_t with_dtype(const Arguments& a, cudaStream_t stream) {
  switch (a.params.cache.layout.head_size) {
    case 64:
      return with_axis<T, 64>(a, stream);
    case 128:
      return with_axis<T, 128>(a, stream);
    case 256:
      return with_axis<T, 256>(a, stream);
    default:
      throw std::runtime_error("HieraSparse: prefill has kernels for head sizes 64, 128 and 256, not for " +
                               std::to_string(a.params.cache.layout.head_size) + ".");
  }
}

}  // namespace
}  // namespace prefill_sm80

int prefill_sm80_columns(int head_size) { return prefill_sm80::columns_of(head_size); }

void launch_prefill_sm80(const PrefillParams& p, cudaStream_t stream) {
  const prefill_sm80::Arguments a{p,
                                  p.cache.layout.head_bytes(),
                                  p.cache.layout.k_offset(),
                                  p.cache.layout.v_offset(),
                                  p.heads / p.cache.kv_heads,
                                  p.scale * 1.44269504088896341f};
  if (p.tile_count == 0) return;
  check_prefill(p);
  check_launched(p.cache.dtype == Dtype::kFloat16 ? prefill_sm80::with_dtype<__half>(a, stream)
                                                  : prefill_sm80::with_dtype<__nv_bfloat16>(a, stream));
}

}  // namespace hierasparse
