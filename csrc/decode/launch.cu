// Chooses the instantiation; the kernels themselves are compiled in instantiations/.
#include <algorithm>

#include "../common/device.h"
#include "../common/dispatch.h"
#include "../common/log2.h"
#include "launch.h"
#include "stream.cuh"

namespace hierasparse {
namespace decode {

template <typename T, int kD, bool kTokens, bool kExpand, int kTiles>
cudaError_t run(const DecodeParams& p, cudaStream_t stream);

namespace {

// Two where both have three stages in every instantiation.
int ctas_per_sm() { return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) >= 200 << 10 ? 2 : 1; }

}  // namespace

// Deeper rings only make the queues at the memory longer, and with them every other load of the kernel (H200: 3 stages
// 161 us, 5 stages 181 us for 8 x 32 768 tokens).  A CTA that has its SM alone takes up to six.
int ring_stages(int fixed_bytes) {
  if (ctas_per_sm() == 2) return 3;
  const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - fixed_bytes;
  return std::min(kMaxStages, room / (kWarps * kStageBytes));
}

namespace {

template <typename T, int kD, bool kTokens, bool kExpand>
cudaError_t with_tiles(const DecodeParams& p, cudaStream_t stream) {
  if constexpr (decode_columns(kD, 16, 1) > 8) {
    if (decode_columns(kD, p.group, p.max_query_len) > 8) return run<T, kD, kTokens, kExpand, 2>(p, stream);
  }
  return run<T, kD, kTokens, kExpand, 1>(p, stream);
}

template <typename T, int kD>
cudaError_t with_values(const DecodeParams& p, cudaStream_t stream) {
  if (p.cache.value_axis_token) return with_tiles<T, kD, true, false>(p, stream);
  return with_flag(p.expand_keys,
                   [&](auto expand) { return with_tiles<T, kD, false, decltype(expand)::value>(p, stream); });
}

}  // namespace
}  // namespace decode

int decode_ctas() { return device_attribute(cudaDevAttrMultiProcessorCount) * decode::ctas_per_sm(); }

void launch_decode(const DecodeParams& params, cudaStream_t stream) {
  DecodeParams p = params;
  p.group = p.heads / p.cache.kv_heads;
  p.head_bytes = p.cache.layout.head_bytes();
  p.scale_log2 = p.scale * kLog2E;
  require(!p.expand_keys || !p.cache.value_axis_token, "expand_keys of decode needs V's groups of four along channels");
  require(p.batch.window_block % decode::kPiece == 0, "window_block of decode must be a multiple of 16");
  require(p.scale > 0.f, "the scale of the logits must be positive");
  if (p.batch.requests == 0) return;
  const cudaError_t error = with_dtype(p.cache.dtype, [&](auto dtype) {
    return with_head_size(p.cache.layout.head_size, "decode", [&](auto d) {
      return decode::with_values<typename decltype(dtype)::type, decltype(d)::value>(p, stream);
    });
  });
  check_launched(error, "decode");
}

}  // namespace hierasparse
