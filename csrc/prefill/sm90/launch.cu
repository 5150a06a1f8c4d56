// Chooses the instantiation; the kernels themselves are compiled in instantiations/.
#include "../../common/dispatch.h"
#include "../checks.h"
#include "launch.h"

namespace hierasparse {
namespace prefill90 {

template <int kD, bool kMixed>
cudaError_t run_shape(const PrefillParams& p, cudaStream_t stream);

namespace {

void require(bool good, const char* sentence) {
  if (!good) throw std::runtime_error(std::string("HieraSparse: prefill on sm_90a: ") + sentence);
}

}  // namespace
}  // namespace prefill90

void launch_prefill_sm90(const PrefillParams& p, cudaStream_t stream) {
  const int head_size = p.cache.layout.head_size;
  prefill90::require(head_size == 64 || head_size == 128, "the head size must be 64 or 128.");
  prefill90::require(p.cache.dtype == Dtype::kBfloat16, "values must be bfloat16.");
  prefill90::require(p.cache.value_axis_token != 0, "the groups of V must lie along tokens.");
  prefill90::require(p.cache.layout.sink_tokens <= kSubTokens, "there may be at most 64 sink tokens.");
  prefill90::require(p.heads % p.cache.kv_heads == 0, "query heads must be a multiple of KV heads.");
  prefill90::require(p.splits > 0, "the number of splits must be positive.");
  check_prefill(p);
  if (p.tile_count == 0) return;
  const cudaError_t error = with_flag(is_mixed(p.cache.layout), [&](auto mixed) {
    return head_size == 64 ? prefill90::run_shape<64, decltype(mixed)::value>(p, stream)
                           : prefill90::run_shape<128, decltype(mixed)::value>(p, stream);
  });
  check_launched(error, "prefill");
}

}  // namespace hierasparse
