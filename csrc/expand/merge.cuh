// Merge of partial attention results by their log-sum-exps, in float32; bound by bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace hierasparse::merge {

constexpr int kThreads = 256;
constexpr int kValues = 8;  // of one thread

template <typename T>
__device__ __forceinline__ void load(float (&to)[kValues], const uint8_t* from, bool is_float) {
  if (is_float) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < kValues; ++i) to[i] = static_cast<float>(values[i]);
  }
}

template <typename T>
__device__ __forceinline__ void store(uint8_t* to, const float (&from)[kValues], bool is_float) {
  if (is_float) {
    reinterpret_cast<float4*>(to)[0] = {from[0], from[1], from[2], from[3]};
    reinterpret_cast<float4*>(to)[1] = {from[4], from[5], from[6], from[7]};
  } else {
    uint4 raw;
    T* values = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = static_cast<T>(from[i]);
    *reinterpret_cast<uint4*>(to) = raw;
  }
}

// head_size / 8 neighbouring threads, all of one warp, take one row of one head.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_rows(const MergeParams p) {
  const int per_head = p.head_size / kValues;
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int chunk = static_cast<int>(n % per_head), head = static_cast<int>(n / per_head % p.heads);
  const int64_t row = n / per_head / p.heads;
  const bool inside = row < p.count;
  const int64_t to = !inside ? -1 : p.rows ? p.rows[row] : row;
  float* const out_lse = p.out_lse + head * p.out_lse_stride + to;
  const float* const part_lse = p.part_lse + head * p.part_lse_stride + row;
  const float mine = to < 0 ? -INFINITY : *out_lse;
  __syncwarp();  // the row's log-sum-exp is written by its first thread, and read by all
  if (to < 0) return;
  float most = mine;
  bool any = false;
  for (int i = 0; i < p.parts; ++i) {
    const float theirs = part_lse[i * p.parts_lse_stride];
    most = fmaxf(most, theirs), any |= theirs != -INFINITY;
  }
  if (!any) return;

  const int value_bytes = p.out_float ? 4 : 2, part_bytes = p.part_float ? 4 : 2;
  const int at = head * p.head_size + chunk * kValues;
  uint8_t* const out = static_cast<uint8_t*>(p.out) + to * p.out_stride + at * value_bytes;
  const uint8_t* const part = static_cast<const uint8_t*>(p.part) + row * p.part_stride + at * part_bytes;
  float sum = 0.f, total[kValues] = {};
  auto add = [&](float lse, const uint8_t* from, bool is_float) {
    if (lse == -INFINITY) return;
    const float weight = expf(lse - most);
    float x[kValues];
    load<T>(x, from, is_float);
    sum += weight;
#pragma unroll
    for (int i = 0; i < kValues; ++i) total[i] += weight * x[i];
  };
  add(mine, out, p.out_float);
  for (int i = 0; i < p.parts; ++i) add(part_lse[i * p.parts_lse_stride], part + i * p.parts_stride, p.part_float);
#pragma unroll
  for (int i = 0; i < kValues; ++i) total[i] /= sum;
  store<T>(out, total, p.out_float);
  if (chunk == 0) *out_lse = most + logf(sum);
}

}  // namespace hierasparse::merge
