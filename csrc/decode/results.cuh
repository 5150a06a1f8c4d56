// From the consumers' states to the output, or to a part of it that a merge adds to others.
#pragma once

#include "rows.cuh"

namespace hierasparse::decode {

constexpr int kConsumers = 1;  // their named barrier
constexpr int kConsumerThreads = 32 * kWarps;

// Rows of the warps' results, padded so that lanes of one store hit different banks.
template <int kD>
constexpr int kResultPitch = kD + 4;

template <int kD, int kTiles>
struct Results {
  float o[kWarps][8 * kTiles][kResultPitch<kD>];
  float top[kWarps][8 * kTiles], sum[kWarps][8 * kTiles];
};

// A result that is not a lane's whole: exponentials' base is 2, as everywhere here.
template <int kD>
struct Part {
  float* at;
  __device__ Part(const DecodeParams& p, int cta, int which) : at(p.workspace + (2 * cta + which) * 16ll * (kD + 2)) {}
  __device__ float4* values(int column) const { return reinterpret_cast<float4*>(at) + column * (kD / 4); }
  __device__ float* top(int column) const { return at + 16 * kD + column; }
  __device__ float* sum(int column) const { return at + 16 * kD + 16 + column; }
};

template <typename T>
__device__ __forceinline__ void store_output(const DecodeParams& p, const Columns& columns, int column, int channel,
                                             float4 x, float sum) {
  const float scale = sum == 0.f ? 0.f : 1.f / sum;
  const uint2 packed = make_uint2(pack<T>(x.x * scale, x.y * scale), pack<T>(x.z * scale, x.w * scale));
  uint8_t* out = static_cast<uint8_t*>(p.out) + columns.row[column] * p.out_row_stride +
                 columns.head[column] * p.out_head_stride + channel * 2;
  *reinterpret_cast<uint2*>(out) = packed;
}

__device__ __forceinline__ void add_scaled(float4& to, float keep, const float4& x, float scale) {
  to.x = to.x * keep + x.x * scale, to.y = to.y * keep + x.y * scale;
  to.z = to.z * keep + x.z * scale, to.w = to.w * keep + x.w * scale;
}

// The consumers' states become one result: the output, or a part for the merge.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void finish(const DecodeParams& p, State<kD, kTiles>& state, const Plan& plan,
                                       Results<kD, kTiles>& results, Part<kD> part) {
  const int tid = thread_index(), lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
  barrier_sync(kConsumers, kConsumerThreads);  // the segment before has been read
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = state.sum[n][e];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      const int column = 8 * n + 2 * t + e;
      if (g == 0) results.top[warp][column] = state.top[n][e], results.sum[warp][column] = sum;
      float* row = &results.o[warp][column][4 * g];
#pragma unroll
      for (int c = 0; c < kD / 64; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = 2 * half + e;
          *reinterpret_cast<float4*>(row + 64 * c + 32 * half) = make_float4(
              state.o[4 * c][n][at], state.o[4 * c + 1][n][at], state.o[4 * c + 2][n][at], state.o[4 * c + 3][n][at]);
        }
      }
    }
  }
  barrier_sync(kConsumers, kConsumerThreads);
#pragma unroll 1
  for (int i = tid; i < 8 * kTiles * (kD / 4); i += kConsumerThreads) {
    const int column = i / (kD / 4), channel = i % (kD / 4) * 4;
    if (plan.columns.row[column] < 0) continue;
    float top = kNoMaximum, sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, results.top[w][column]);
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float scale = exp2_fast(results.top[w][column] - top);
      sum += scale * results.sum[w][column];
      add_scaled(x, 1.f, *reinterpret_cast<const float4*>(&results.o[w][column][channel]), scale);
    }
    if (plan.segment.whole) {
      store_output<T>(p, plan.columns, column, channel, x, sum);
    } else {
      part.values(column)[channel / 4] = x;
      if (channel == 0) *part.top(column) = top, *part.sum(column) = sum;
    }
  }
}

// All parts of a lane, added up in the order of the line, whoever does it; `threads` threads from number `thread` on.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void merge(const DecodeParams& p, const Plan& plan, int thread, int threads) {
  constexpr int kAhead = 17;  // parts in flight; a request that has 264 CTAs and eight heads to itself has 33
  const int first = plan.sharers.owner, count = plan.sharers.count;
#pragma unroll 1
  for (int i = thread; i < 8 * kTiles * (kD / 4); i += threads) {
    const int column = i / (kD / 4), channel = i % (kD / 4) * 4;
    if (plan.columns.row[column] < 0) continue;
    float top = kNoMaximum, sum = 0.f;
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int base = 0; base < count; base += kAhead) {
      float tops[kAhead], sums[kAhead];
      float4 xs[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const Part<kD> part(p, first + base + k, base + k == 0 ? plan.sharers.part_of_owner : 0);
        const bool real = base + k < count;
        tops[k] = real ? __ldcg(part.top(column)) : kNoMaximum;
        sums[k] = real ? __ldcg(part.sum(column)) : 0.f;
        xs[k] = real ? __ldcg(part.values(column) + channel / 4) : make_float4(0.f, 0.f, 0.f, 0.f);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const float higher = fmaxf(top, tops[k]), keep = exp2_fast(top - higher), scale = exp2_fast(tops[k] - higher);
        add_scaled(x, keep, xs[k], scale);
        sum = sum * keep + sums[k] * scale;
        top = higher;
      }
    }
    store_output<T>(p, plan.columns, column, channel, x, sum);
  }
}

}  // namespace hierasparse::decode
