// Checks that all bindings share, and one function per kernel family that adds its own to the module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/require.h"
#include "params.h"

namespace hierasparse {

namespace py = pybind11;

constexpr int kVectorBytes = 16;  // of the kernels' loads and stores

// The address as a pointer; `align` is what the kernels' accesses need.
template <typename T>
T* pointer_or_null(uintptr_t address, const char* name, int align = kVectorBytes) {
  require(address % align == 0, std::string(name) + " is not aligned to " + std::to_string(align) + " bytes");
  return reinterpret_cast<T*>(address);
}

template <typename T>
T* pointer(uintptr_t address, const char* name, int align = kVectorBytes) {
  require(address != 0, std::string(name) + " is a null pointer");
  return pointer_or_null<T>(address, name, align);
}

inline const int32_t* ints(uintptr_t address, const char* name) {
  return pointer<const int32_t>(address, name, alignof(int32_t));
}

inline void strides(std::initializer_list<int64_t> bytes, const char* names) {
  for (const int64_t n : bytes)
    require(n >= 0 && n % kVectorBytes == 0, std::string(names) + " must be multiples of 16 bytes");
}

inline void require_head_size(int head_size) {
  require(head_size == 64 || head_size == 128 || head_size == 256, "head_size must be 64, 128 or 256");
}

inline Dtype parse_dtype(const std::string& name) {
  require(name == "bfloat16" || name == "float16", "dtype must be 'bfloat16' or 'float16'");
  return name == "bfloat16" ? Dtype::kBfloat16 : Dtype::kFloat16;
}

void bind_compress(py::module_& m);
void bind_decode(py::module_& m);
void bind_expand(py::module_& m);
void bind_prefill(py::module_& m);

}  // namespace hierasparse
