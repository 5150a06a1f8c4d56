// Merge of partial attention results by their log-sum-exps, in float32; bound by bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace hierasparse::merge {

constexpr int kThreads = 256;
constexpr int kValues = 8;  // of one thread

// Eight values as they are stored: 16 bytes, or 32 of floats.
template <bool kFloats>
struct Raw {
  uint4 words[1 + kFloats];
};

template <bool kFloats>
__device__ __forceinline__ Raw<kFloats> load(const uint8_t* from, bool is_float) {
  const uint4* const words = reinterpret_cast<const uint4*>(from);
  Raw<kFloats> raw;
  raw.words[0] = words[0];
  if constexpr (kFloats) raw.words[1] = is_float ? words[1] : uint4{};
  return raw;
}

template <typename T, bool kFloats>
__device__ __forceinline__ float value(const Raw<kFloats>& raw, int i, bool is_float) {
  if constexpr (kFloats) {
    if (is_float) return reinterpret_cast<const float*>(&raw)[i];
  }
  return static_cast<float>(reinterpret_cast<const T*>(&raw)[i]);
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

HS_HD inline int ctas_of_row(const MergeParams& p) {
  return (p.heads * (p.head_size / kValues) + kThreads - 1) / kThreads;
}

// A CTA takes a row's next kThreads items of eight values; head_size / 8 neighbouring threads, all of one warp, have
// one head.  What is there already, the first source, and the parts are loaded kBatch at a time, beside the
// log-sum-exps that tell whether they count.  Nothing branches on those, since loads would then be moved behind them,
// and wait twice; what is not there is replaced by the last of what is.  kFloats: `out` or `part` are float32.  kOnce:
// one batch has all.  Instructions count: at the clock of a prefill, 300 per thread take longer than the memory does.
template <typename T, bool kFloats, bool kOnce, int kBatch>
__global__ void __launch_bounds__(kThreads, kBatch == 2   ? 5
                                            : kBatch == 3 ? 4
                                                          : 3) merge_rows(const MergeParams p) {
  // A row's CTAs come one after the other: half a launch apart, or one CTA in turns, they cost 15 per cent more.
  const int share = ctas_of_row(p), row = blockIdx.x / share, to = p.rows ? p.rows[row] : row;
  if (to < 0) return;
  const int per_head = p.head_size / kValues, items = p.heads * per_head, log2 = 31 - __clz(per_head);
  const int own = blockIdx.x % share * kThreads + threadIdx.x, item = min(own, items - 1), head = item >> log2;
  if (own / kWarp * kWarp >= items) return;  // so whoever reads the last head's log-sum-exp is in its warp
  const bool out_float = kFloats && p.out_float, part_float = kFloats && p.part_float;
  float* const out_lse = p.out_lse + head * p.out_lse_stride + to;
  const float* const part_lse = p.part_lse + head * p.part_lse_stride + row;
  uint8_t* const out = static_cast<uint8_t*>(p.out) + to * p.out_stride + item * kValues * (out_float ? 4 : 2);
  const uint8_t* const part =
      static_cast<const uint8_t*>(p.part) + row * p.part_stride + item * kValues * (part_float ? 4 : 2);
  float most = -INFINITY, sum = 0.f, total[kValues] = {};
  bool any = false;  // part counts
  for (int source = 0; source < (kOnce ? kBatch : p.parts + 1); source += kBatch) {
    Raw<kFloats> raw[kBatch];
    float lse[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool there = source + b == 0;
      const int i = kOnce ? b - 1 : min(source + b, p.parts) - 1;
      lse[b] = there ? *out_lse : part_lse[i * p.parts_lse_stride];
      raw[b] = load<kFloats>(there ? out : part + i * p.parts_stride, there ? out_float : part_float);
    }
    float next = most;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (!kOnce && source + b > p.parts) lse[b] = -INFINITY;
      next = fmaxf(next, lse[b]);
      any |= source + b > 0 && lse[b] != -INFINITY;
    }
    const float base = next == -INFINITY ? 0.f : next;  // if nothing counts yet, all weights are zero
    if (!kOnce) {
      const float shrink = expf(most - base);
      sum *= shrink;
#pragma unroll
      for (int i = 0; i < kValues; ++i) total[i] *= shrink;
    }
    most = next;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool is_float = source + b == 0 ? out_float : part_float;
      const float weight = expf(lse[b] - base);
      sum += weight;
      if (lse[b] == -INFINITY) raw[b] = {};  // perhaps NaN
#pragma unroll
      for (int i = 0; i < kValues; ++i) total[i] += weight * value<T, kFloats>(raw[b], i, is_float);
    }
  }
  __syncwarp();  // the row's log-sum-exp is written by its head's first thread, and was read by all
  if (!any || own != item) return;
  const float scale = 1.f / sum;
#pragma unroll
  for (int i = 0; i < kValues; ++i) total[i] *= scale;
  store<T>(out, total, out_float);
  if (item % per_head == 0) *out_lse = most + logf(sum);
}

// The one that serves a merge with the fewest registers.
template <typename T>
auto kernel_for(const MergeParams& p) {
  if (p.out_float || p.part_float) return merge_rows<T, true, false, 4>;
  return p.parts == 1   ? merge_rows<T, false, true, 2>
         : p.parts == 2 ? merge_rows<T, false, true, 3>
         : p.parts == 3 ? merge_rows<T, false, true, 4>
                        : merge_rows<T, false, false, 4>;
}

}  // namespace hierasparse::merge
