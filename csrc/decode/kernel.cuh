// Paged split-KV decode over 2:4 pages and the dense window, one launch, merge included.
//
// Keys are the M side of S^T = K q^T and channels that of O^T = V^T P^T, so that a group of up to eight query heads
// costs one tensor-core tile and the stored 2:4 form is the sparse operand.  Four warps of a CTA share a lane
// (schedule.cuh): each takes its own sub-blocks with its own softmax; they meet once, at the lane's end.
// docs/kernels.md has the budgets.
#pragma once

#include "rows.cuh"

namespace hierasparse::decode {

// The ring lies behind it and must begin at a multiple of 128: copies into parts of two lines of shared memory become
// four requests to L2 each, whose tag look-ups are then the limit (3.7 instead of 4.5 TB/s).
template <int kD, int kTiles>
struct alignas(128) Shared {
  uint4 paged[kTiles * kD / 32 * 32];  // queries as operand B, channels in stored order
  uint4 plain[kTiles * kD / 32 * 32];  // ... in the order in which rows.cuh reads plain rows: the model's
  Columns columns;
  Walk walk;
  Segment segment;
  Sharers sharers;
  float top[kWarps][8 * kTiles], sum[kWarps][8 * kTiles];
  int last;
};
// Rows of the warps' results, in the ring once it is empty; padded so that lanes of one store hit different banks.
template <int kD>
constexpr int kResultPitch = kD + 4;

template <int kD, int kTiles>
constexpr int shared_bytes(int stages) {
  const int ring = kWarps * stages * kStageBytes, results = kWarps * 8 * kTiles * kResultPitch<kD> * 4;
  return static_cast<int>(sizeof(Shared<kD, kTiles>)) + (ring > results ? ring : results);
}

// A lane's queries as operand B, in both channel orders.  They are asked for before the stream begins, whose loads
// would be in front of them, and written to shared memory after it.
template <typename T, int kD, int kTiles>
class Queries {
 public:
  __device__ __forceinline__ Queries(const DecodeParams& p, const Segment& s) {
    const Request& q = s.request;
    const int kv_head = s.kv_head, block = s.block;
    const int group = p.heads / p.cache.kv_heads;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      // 16 bytes of a column's query: 8 columns x kD / 8 pieces of each tile.
      const int at = i * kThreads + thread_index(), column = at / (kD / 8), piece = at % (kD / 8);
      const int query = (block * 8 * kTiles + column) / group,
                head = kv_head * group + (block * 8 * kTiles + column) % group;
      const uint8_t* from = static_cast<const uint8_t*>(p.query) + (q.row + query) * p.query_row_stride +
                            head * p.query_head_stride + piece * 16;
      plain_[i] =
          at < kPieces && query < q.queries ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void write(const DecodeParams& p, const Segment& s, Shared<kD, kTiles>& shared) const {
    const Request& q = s.request;
    const int kv_head = s.kv_head, block = s.block;
    const int group = p.heads / p.cache.kv_heads;
    if (thread_index() < 8 * kTiles) {
      const int at = block * 8 * kTiles + thread_index(), query = at / group, position = q.first + query;
      const bool real = query < q.queries;
      shared.columns.row[thread_index()] = real ? q.row + query : -1;
      shared.columns.head[thread_index()] = kv_head * group + at % group;
      shared.columns.position[thread_index()] = real ? position : -1;
      shared.columns.border[thread_index()] = !real ? 0
                                              : p.batch.own_chunk_dense
                                                  ? q.low
                                                  : compressed_below(position, p.batch.local_window);
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int at = i * kThreads + thread_index(), column = at / (kD / 8), piece = at % (kD / 8);
      if (at < kPieces)
        shared.plain[(column / 8 * (kD / 32) + piece / 4) * 32 + 4 * (column % 8) + piece % 4] = plain_[i];
    }
    __syncthreads();
    const uint16_t* plain = reinterpret_cast<const uint16_t*>(shared.plain);
    const int32_t* order = p.k_order + kv_head * kD;
    for (int i = 0; i < kTurns; ++i) {
      const int at = i * kThreads + thread_index();
      if (at >= kPieces) break;
      const int n = at / kD, g = at % 32 / 4, t = at % 4, step = at / 32 % (kD / 32);
      auto value = [&](int c) {
        return uint32_t{plain[((n * (kD / 32) + c / 32) * 32 + 4 * g + c % 32 / 8) * 8 + c % 8]};
      };
      uint32_t x[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int2 channel = __ldg(reinterpret_cast<const int2*>(order + 32 * step + 2 * t + 8 * r));
        x[r] = value(channel.x) | value(channel.y) << 16;
      }
      shared.paged[at] = make_uint4(x[0], x[1], x[2], x[3]);
    }
    __syncthreads();
  }

 private:
  static constexpr int kPieces = kTiles * kD, kTurns = (kPieces + kThreads - 1) / kThreads;
  uint4 plain_[kTurns];
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

// The warps' states become one result: the output, or a part for the merge.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void finish(const DecodeParams& p, State<kD, kTiles>& state, Shared<kD, kTiles>& shared,
                                       float* results, Part<kD> part) {
  const int tid = thread_index(), lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
  float* mine = results + warp * 8 * kTiles * kResultPitch<kD>;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = state.sum[n][e];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      const int column = 8 * n + 2 * t + e;
      if (g == 0) shared.top[warp][column] = state.top[n][e], shared.sum[warp][column] = sum;
      float* row = mine + column * kResultPitch<kD> + 4 * g;
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
  __syncthreads();
  for (int i = thread_index(); i < 8 * kTiles * (kD / 4); i += kThreads) {
    const int column = i / (kD / 4), channel = i % (kD / 4) * 4;
    if (shared.columns.row[column] < 0) continue;
    float top = kNoMaximum, sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.top[w][column]);
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float scale = exp2_fast(shared.top[w][column] - top);
      sum += scale * shared.sum[w][column];
      add_scaled(x, 1.f,
                 *reinterpret_cast<const float4*>(results + (w * 8 * kTiles + column) * kResultPitch<kD> + channel),
                 scale);
    }
    if (shared.segment.whole) {
      store_output<T>(p, shared.columns, column, channel, x, sum);
    } else {
      part.values(column)[channel / 4] = x;
      if (channel == 0) *part.top(column) = top, *part.sum(column) = sum;
    }
  }
}

// The last CTA of a lane to finish adds up all parts, in the order of the line, whoever that is.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void merge(const DecodeParams& p, Shared<kD, kTiles>& shared) {
  const int first = shared.sharers.owner, count = shared.sharers.count;
  __threadfence();
  __syncthreads();
  if (thread_index() == 0) {
    const int before = atomicAdd(p.counters + first, 1);
    shared.last = before == count - 1;
    if (shared.last) p.counters[first] = 0;  // as the next launch expects it
    __threadfence();
  }
  __syncthreads();
  if (!shared.last) return;
  constexpr int kAhead = 8;  // parts in flight
  for (int i = thread_index(); i < 8 * kTiles * (kD / 4); i += kThreads) {
    const int column = i / (kD / 4), channel = i % (kD / 4) * 4;
    if (shared.columns.row[column] < 0) continue;
    float top = kNoMaximum, sum = 0.f;
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int base = 0; base < count; base += kAhead) {
      float tops[kAhead], sums[kAhead];
      float4 xs[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const Part<kD> part(p, first + base + k, base + k == 0 ? shared.sharers.part_of_owner : 0);
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
    store_output<T>(p, shared.columns, column, channel, x, sum);
  }
}

// The warp's sub-blocks of a lane's pages.
template <typename T, int kD, bool kTokens, int kTiles>
__device__ __forceinline__ void attend_pages(const DecodeParams& p, State<kD, kTiles>& state, Stream<kD>& stream,
                                             const Request& q, const Columns& columns, uint32_t queries, int stages) {
  const PageLayout& layout = p.cache.layout;
  const int t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
  for (int page = stream.first_page(); page < stream.end_page(); ++page) {
    const Kind kind = stream.kind(layout, page);
    float s[4][kTiles][4];
    multiply_keys<T, kD, kTiles>(s, stream, p, stages, kind.sparse_k, queries);
    const bool edge = (page + 1) * kPageTokens > q.low;  // some query reads this page from its window
    const bool sinks = kind.sinks && threadIdx.x < 32;   // in sub-block 0
    if (edge || sinks) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool hidden = page * kPageTokens >= columns.border[8 * n + 2 * t + e % 2];
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int token = 16 * m + g + 8 * (e / 2);
            if (hidden || (sinks && token < layout.sink_tokens)) s[m][n][e] = -INFINITY;
          }
        }
      }
    }
    uint32_t probability[kTiles][4][2];
    softmax<T, 4>(p, state, s, probability);
    multiply_values<T, kD, kTokens, kTiles>(state, stream, p, stages, kind.sparse_v, probability);
    if (sinks) attend_sinks<T, kD, kTiles>(p, state, stream.page(p, page), columns, queries);
  }
}

template <typename T, int kD, bool kTokens, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ DecodeParams p, int stages) {
  extern __shared__ __align__(128) uint8_t memory[];
  Shared<kD, kTiles>& shared = *reinterpret_cast<Shared<kD, kTiles>*>(memory);
  uint8_t* ring = memory + sizeof(Shared<kD, kTiles>);
  constexpr int kColumns = 8 * kTiles;
  const int cta = blockIdx.x, warp = threadIdx.x / 32;
  Begin begin;
  const Line line = make_line(p, kColumns, cta, begin);
  if (cta >= line.ctas) return;
  if (threadIdx.x == 0) shared.walk.begin(p, line, begin, cta, kColumns);

  State<kD, kTiles> state;
  Stream<kD> stream;
  while (true) {
    if (threadIdx.x == 0) shared.walk.next(p, shared.segment);
    __syncthreads();
    const Segment& segment = shared.segment;
    if (segment.end == 0) return;
    Queries<T, kD, kTiles> queries(p, segment);
    stream.begin(p, segment, shared_address(ring) + warp * stages * kStageBytes, stages);
    queries.write(p, segment, shared);
    if (threadIdx.x == 0 && !segment.whole) shared.sharers = shared.walk.sharers(segment);
    state.reset();
    attend_pages<T, kD, kTokens, kTiles>(p, state, stream, segment.request, shared.columns,
                                         shared_address(shared.paged), stages);
    attend_window<T, kD, kTiles>(p, state, stream, segment.request, shared.columns, shared_address(shared.plain),
                                 stages);
    wait_copies<0>();  // nothing may land in the ring any more
    __syncthreads();
    finish<T, kD, kTiles>(p, state, shared, reinterpret_cast<float*>(ring), Part<kD>(p, cta, segment.part));
    if (!segment.whole) merge<T, kD, kTiles>(p, shared);
    __syncthreads();  // ring, columns and segment are free again
  }
}

// ---- launch --------------------------------------------------------------------------------------------------------
template <typename T, int kD, bool kTokens, int kTiles>
cudaError_t run(const DecodeParams& p, int stages, cudaStream_t stream) {
  const auto kernel = decode_kernel<T, kD, kTokens, kTiles>;
  const int bytes = shared_bytes<kD, kTiles>(stages);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<p.ctas, kThreads, bytes, stream>>>(p, stages);
  return cudaGetLastError();
}

}  // namespace hierasparse::decode
