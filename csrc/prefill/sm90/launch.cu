// Chooses the instantiation; the kernels themselves are compiled in instantiations/.
#include "../../common/dispatch.h"
#include "../checks.h"
#include "launch.h"

namespace hierasparse {
namespace prefill90 {

template <int kD, bool kMixed>
cudaError_t run_shape(const PrefillParams& p, cudaStream_t stream);

}  // namespace prefill90

void launch_prefill_sm90(const PrefillParams& p, cudaStream_t stream) {
  const int head_size = p.cache.layout.head_size;
  require(head_size == 64 || head_size == 128, "head_size of wgmma_sp must be 64 or 128");
  require(p.cache.dtype == Dtype::kBfloat16, "dtype of wgmma_sp must be bfloat16");
  require(p.cache.value_axis_token != 0, "value_axis of wgmma_sp must be 'token'");
  check_prefill(p);
  if (p.tile_count == 0) return;
  const cudaError_t error = with_flag(is_mixed(p.cache.layout), [&](auto mixed) {
    return head_size == 64 ? prefill90::run_shape<64, decltype(mixed)::value>(p, stream)
                           : prefill90::run_shape<128, decltype(mixed)::value>(p, stream);
  });
  check_launched(error, "prefill");
}

}  // namespace hierasparse
