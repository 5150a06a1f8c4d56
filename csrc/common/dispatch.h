// From what a launch is asked for to the instantiation that serves it, and how a failed launch is told.
//
// Each function here calls `f` with a value whose type is the choice: types as Type<T>, numbers and flags as
// std::integral_constant.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../params.h"
#include "require.h"

namespace hierasparse {

template <typename T>
struct Type {
  using type = T;
};

template <class F>
cudaError_t with_dtype(Dtype dtype, F f) {
  return dtype == Dtype::kFloat16 ? f(Type<__half>{}) : f(Type<__nv_bfloat16>{});
}

// `kernel` names it in a sentence.
template <class F>
cudaError_t with_head_size(int head_size, const char* kernel, F f) {
  switch (head_size) {
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    case 256:
      return f(std::integral_constant<int, 256>{});
  }
  refuse(std::string(kernel) + " has head sizes 64, 128 and 256, not " + std::to_string(head_size));
}

template <class F>
cudaError_t with_flag(bool flag, F f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

inline void check_launched(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be taken for a failed one
    throw std::runtime_error(std::string("HieraSparse: ") + kernel + " was not launched: " + cudaGetErrorString(error) +
                             ".");
  }
}

}  // namespace hierasparse
