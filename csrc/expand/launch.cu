#include "../common/dispatch.h"
#include "kernel.cuh"
#include "launch.h"
#include "merge.cuh"

namespace hierasparse {

void launch_expand(const ExpandParams& params, cudaStream_t stream) {
  const int64_t of_head =
      int64_t{params.count} * expand::kParts + int64_t{params.block_count} * params.window_block / kSubTokens;
  const int64_t ctas = of_head * params.cache.kv_heads;
  if (ctas == 0) return;
  require(ctas <= INT32_MAX, "expand got more pages than fit into one launch");
  const cudaError_t error = with_dtype(params.cache.dtype, [&](auto dtype) {
    return with_head_size(params.cache.layout.head_size, "expand", [&](auto d) {
      const auto kernel = expand::expand_pages<typename decltype(dtype)::type, decltype(d)::value>;
      kernel<<<static_cast<unsigned>(ctas), expand::kThreads, 0, stream>>>(params);
      return cudaGetLastError();
    });
  });
  check_launched(error, "expand");
}

void launch_merge(const MergeParams& params, cudaStream_t stream) {
  if (params.count == 0) return;
  const int64_t ctas = int64_t{params.count} * merge::ctas_of_row(params);
  require(ctas <= INT32_MAX, "merge got more rows than fit into one launch");
  const cudaError_t error = with_dtype(params.dtype, [&](auto dtype) {
    const auto kernel = merge::kernel_for<typename decltype(dtype)::type>(params);
    kernel<<<static_cast<unsigned>(ctas), merge::kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
  check_launched(error, "merge");
}

}  // namespace hierasparse
