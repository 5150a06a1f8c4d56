#include <stdexcept>
#include <string>

#include "kernel.cuh"
#include "launch.h"
#include "merge.cuh"

namespace hierasparse {

namespace {

void check(cudaError_t error, const char* name) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("HieraSparse: ") + name + " failed: " + cudaGetErrorString(error) + ".");
  }
}

template <typename T>
void expand_typed(const ExpandParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(int64_t{p.count} * p.cache.kv_heads * expand::kParts);
  switch (p.cache.layout.head_size) {
    case 64:
      expand::expand_pages<T, 64><<<blocks, expand::kThreads, 0, stream>>>(p);
      break;
    case 128:
      expand::expand_pages<T, 128><<<blocks, expand::kThreads, 0, stream>>>(p);
      break;
    case 256:
      expand::expand_pages<T, 256><<<blocks, expand::kThreads, 0, stream>>>(p);
      break;
    default:
      throw std::runtime_error("HieraSparse: expand takes head sizes 64, 128 and 256.");
  }
}

}  // namespace

void launch_expand(const ExpandParams& params, cudaStream_t stream) {
  if (params.count == 0) return;
  if (int64_t{params.count} * params.cache.kv_heads * expand::kParts > INT32_MAX) {
    throw std::runtime_error("HieraSparse: expand got more pages than fit into one launch.");
  }
  if (params.cache.dtype == Dtype::kBfloat16) {
    expand_typed<__nv_bfloat16>(params, stream);
  } else {
    expand_typed<__half>(params, stream);
  }
  check(cudaGetLastError(), "expand");
}

void launch_merge(const MergeParams& params, cudaStream_t stream) {
  if (params.count == 0) return;
  const int64_t threads = int64_t{params.count} * params.heads * (params.head_size / merge::kValues);
  const int64_t blocks = (threads + merge::kThreads - 1) / merge::kThreads;
  if (params.head_size != 64 && params.head_size != 128 && params.head_size != 256) {
    throw std::runtime_error("HieraSparse: merge takes head sizes 64, 128 and 256.");
  }
  if (blocks > INT32_MAX) throw std::runtime_error("HieraSparse: merge got more rows than fit into one launch.");
  if (params.dtype == Dtype::kBfloat16) {
    merge::merge_rows<__nv_bfloat16><<<static_cast<unsigned>(blocks), merge::kThreads, 0, stream>>>(params);
  } else {
    merge::merge_rows<__half><<<static_cast<unsigned>(blocks), merge::kThreads, 0, stream>>>(params);
  }
  check(cudaGetLastError(), "merge");
}

}  // namespace hierasparse
