// The ends of a CTA's work: queries into shared memory; sink rows, normalisation and the way out.
#pragma once

#include "shared.cuh"

namespace hierasparse::prefill90 {

// A consumer's queries as operand B, channels in the stored order; zeros where there is no column.  And the borders.
template <class S>
__device__ __forceinline__ void load_queries(const Arguments& p, const Work& work, uint32_t shared, int number) {
  constexpr int kPieces = S::kD / 8;
  const int32_t* order = p.k_order + work.kv_head * S::kD;
  for (int i = thread_index() % kGroupThreads; i < S::kN * kPieces; i += kGroupThreads) {
    const int local = i / kPieces, piece = i % kPieces, column = number * S::kN + local;
    uint32_t x[4] = {};
    if (column < work.columns()) {
      const uint8_t* from = static_cast<const uint8_t*>(p.query) + work.row(column) * p.query_row_stride +
                            work.head(column) * p.query_head_stride;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int2 channel = __ldg(reinterpret_cast<const int2*>(order + 8 * piece + 2 * k));
        x[k] = __ldg(reinterpret_cast<const uint16_t*>(from) + channel.x) |
               uint32_t{__ldg(reinterpret_cast<const uint16_t*>(from) + channel.y)} << 16;
      }
    }
    store_shared16(shared + S::kQueries + number * S::kQueryBytes + piece / 8 * S::kHalf + local * kRowBytes +
                       ((piece % 8 ^ local % 8) << 4),
                   make_uint4(x[0], x[1], x[2], x[3]));
  }
  fence_async();
  const int local = thread_index() % kGroupThreads, column = number * S::kN + local;
  if (local < S::kN) {
    const bool real = column < work.columns();
    store_shared4(shared + S::kBorders + column * 4, real ? border_of(p, work.tile, column / work.group) : 0);
  }
}

// Two values of 16 bits.
__device__ __forceinline__ float2 unpack_bf16(uint32_t v) {
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

// The logarithm of a column's sum goes out, and what its channels of O are to be multiplied with goes to `factors`.
// With sinks: also the weights of their rows, in [column][sink].
template <class S>
__device__ __forceinline__ void finish_column(const Arguments& p, const Work& work, uint32_t shared, int number,
                                              float sum, int sinks, const uint8_t* sink_page, uint32_t weights) {
  const int local = thread_index() % kGroupThreads, column = number * S::kN + local;
  if (local >= S::kN || column >= work.columns()) return;
  float top = load_shared_float(shared + S::kTops + column * 4) * p.scale_log2, keep = 1.f;
  const bool has_sinks = sinks > 0 && static_cast<int>(load_shared4(shared + S::kBorders + column * 4)) > 0;
  if (has_sinks) {
    const uint32_t query = shared + S::kQueries + number * S::kQueryBytes + local * kRowBytes;
    const float before = top;
    for (int i = 0; i < sinks; ++i) {
      const uint4* from = reinterpret_cast<const uint4*>(sink_page + p.cache.layout.sink_k_offset() + i * (2 * S::kD));
      float dot = 0.f;
#pragma unroll 1
      for (int s = 0; s < S::kD / 32; ++s) {
        // Places 8 (4 s + t) + 2 k + h of the row are positions 32 s + 2 t + 8 k + h of the order.
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int piece = s % 2 * 4 + k;
          const uint4 q = load_shared16(query + s / 2 * S::kHalf + ((piece ^ local % 8) << 4));
          const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            const uint32_t row = __ldg(reinterpret_cast<const uint32_t*>(from + 4 * s + t) + k);
            const float2 a = unpack_bf16(words[t]), b = unpack_bf16(row);
            dot = fmaf(a.x, b.x, fmaf(a.y, b.y, dot));
          }
        }
      }
      const float score = dot * p.scale_log2;
      store_shared_float(weights + (local * sinks + i) * 4, score);
      top = fmaxf(top, score);
    }
    keep = exp2_fast(before - top);
    sum *= keep;
    for (int i = 0; i < sinks; ++i) {
      const uint32_t at = weights + (local * sinks + i) * 4;
      const float weight = exp2_fast(load_shared_float(at) - top);
      store_shared_float(at, weight);
      sum += weight;
    }
  }
  const float scale = sum == 0.f ? 0.f : 1.f / sum;
  store_shared_float(shared + S::kFactors + column * 4, keep * scale);
  for (int i = 0; i < sinks; ++i) {
    const uint32_t at = weights + (local * sinks + i) * 4;
    store_shared_float(at, has_sinks ? load_shared_float(at) * scale : 0.f);
  }
  p.lse[work.split * p.lse_split_stride + work.head(column) * p.lse_head_stride + work.row(column)] =
      sum == 0.f ? -INFINITY : (top + log2f(sum)) * kLn2;
}

__device__ __forceinline__ void store_row(const Arguments& p, const Work& work, int column, int channel,
                                          const float (&x)[8]) {
  uint8_t* to = static_cast<uint8_t*>(p.out) + work.split * p.out_split_stride + work.row(column) * p.out_row_stride +
                work.head(column) * p.out_head_stride + channel * 2;
  *reinterpret_cast<uint4*>(to) = make_uint4(pack<__nv_bfloat16>(x[0], x[1]), pack<__nv_bfloat16>(x[2], x[3]),
                                             pack<__nv_bfloat16>(x[4], x[5]), pack<__nv_bfloat16>(x[6], x[7]));
}

// O (as Consumer::store_result leaves it) and the sinks' share, eight channels per lane.
template <class S>
__device__ __forceinline__ void store_outputs(const Arguments& p, const Work& work, uint32_t shared, int number,
                                              uint32_t results, int sinks, const uint8_t* sink_page, uint32_t weights) {
  constexpr int kPieces = S::kD / 8;
  for (int i = thread_index() % kGroupThreads; i < S::kN * kPieces; i += kGroupThreads) {
    const int local = i / kPieces, piece = i % kPieces, column = number * S::kN + local;
    if (column >= work.columns()) break;
    const float factor = load_shared_float(shared + S::kFactors + column * 4);
    float x[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // channels 8 piece + j and + 4
      const float2 o =
          load_shared_floats(results + (local * S::kResultPitch + piece / 8 * 64 + 16 * j + piece % 8 * 2) * 4);
      x[j] = o.x * factor, x[4 + j] = o.y * factor;
    }
    for (int k = 0; k < sinks; ++k) {
      const float weight = load_shared_float(weights + (local * sinks + k) * 4);
      const uint4 row =
          __ldg(reinterpret_cast<const uint4*>(sink_page + p.cache.layout.sink_v_offset() + k * (2 * S::kD)) + piece);
      const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 v = unpack_bf16(words[j]);
        x[2 * j] = fmaf(weight, v.x, x[2 * j]), x[2 * j + 1] = fmaf(weight, v.y, x[2 * j + 1]);
      }
    }
    store_row(p, work, column, 8 * piece, x);
  }
}

// A split without pages.
template <class S>
__device__ __forceinline__ void store_nothing(const Arguments& p, const Work& work) {
  const float zeros[8] = {};
  for (int i = thread_index(); i < work.columns() * (S::kD / 8); i += S::kThreads) {
    const int column = i / (S::kD / 8), piece = i % (S::kD / 8);
    store_row(p, work, column, 8 * piece, zeros);
    if (piece == 0) {
      p.lse[work.split * p.lse_split_stride + work.head(column) * p.lse_head_stride + work.row(column)] = -INFINITY;
    }
  }
}

}  // namespace hierasparse::prefill90
