// Chooses the instantiation; the kernels themselves are compiled in instantiations/.
#include "../../common/device.h"
#include "../../common/dispatch.h"
#include "../checks.h"
#include "launch.h"
#include "params.h"

namespace hierasparse {
namespace prefill_sm80 {

template <typename T, int kD, bool kTokens, bool kMixed>
cudaError_t run(const PrefillParams& p, int shared_bytes, cudaStream_t stream);

}  // namespace prefill_sm80

int prefill_sm80_columns(int head_size) { return prefill_sm80::columns_of(head_size); }

void launch_prefill_sm80(const PrefillParams& p, cudaStream_t stream) {
  if (p.tile_count == 0) return;
  check_prefill(p);
  const int shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const cudaError_t error = with_dtype(p.cache.dtype, [&](auto dtype) {
    return with_head_size(p.cache.layout.head_size, "prefill", [&](auto d) {
      return with_flag(p.cache.value_axis_token, [&](auto tokens) {
        return with_flag(is_mixed(p.cache.layout), [&](auto mixed) {
          using T = typename decltype(dtype)::type;
          constexpr int kD = decltype(d)::value;
          return prefill_sm80::run<T, kD, decltype(tokens)::value, decltype(mixed)::value>(p, shared_bytes, stream);
        });
      });
    });
  });
  check_launched(error, "prefill");
}

}  // namespace hierasparse
