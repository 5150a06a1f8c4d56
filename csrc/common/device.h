// What launchers ask of the current device.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

namespace hierasparse {

// Throws std::runtime_error with a sentence if there is no device to ask.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be taken for a failed one
    throw std::runtime_error("HieraSparse: the CUDA device cannot be asked for its properties.");
  }
  return value;
}

}  // namespace hierasparse
