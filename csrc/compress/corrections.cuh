// What concerns a whole page: tables of K in channel order, the mean, the largest score.
#pragma once

#include "pairs.cuh"
#include "work.cuh"

namespace hierasparse::compress {

// Channel offsets and weights of the head by place; the mean as if there were none.
template <class S>
__device__ __forceinline__ void load_tables(const StoreCompressParams& p, Shared<S>& shared, int head) {
  uint16_t* channels = reinterpret_cast<uint16_t*>(shared.channels);
  for (int place = thread_index(); place < S::kD; place += S::kThreads) {
    const int channel = p.k_order[head * S::kD + place];
    channels[place] = static_cast<uint16_t>(2 * channel);
    reinterpret_cast<float*>(shared.weight)[place] = p.k_weight == nullptr ? 1.f : p.k_weight[head * S::kD + channel];
    reinterpret_cast<float*>(shared.mean)[place] = 0.f;
    shared.by_channel[0][place] = 0.f;
  }
}

// Sum of kRows rows of a quad of channels, neighbours first.
template <class S, int kRows>
__device__ __forceinline__ float4 sum_rows(const Shared<S>& shared, uint32_t run, uint32_t quad, int row) {
  if constexpr (kRows == 1) {
    float x[4];
    unpack<typename S::T>(four_values(shared, run + (quad ^ swizzle(row) << 4) + row * 2 * S::kD), x);
    return make_float4(x[0], x[1], x[2], x[3]);
  } else {
    const float4 a = sum_rows<S, kRows / 2>(shared, run, quad, row);
    const float4 b = sum_rows<S, kRows / 2>(shared, run, quad, row + kRows / 2);
    return make_float4(add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w));
  }
}

// Sums of a tile's rows, by channel. One barrier; the caller's next one protects shared.partial.
template <class S>
__device__ __forceinline__ void sum_tile(Shared<S>& shared, int first) {
  const int quad = thread_index() % S::kQuads, run = thread_index() / S::kQuads;
  shared.partial[run][quad] = sum_rows<S, S::kRunRows>(shared, run * S::kRunRows * 2 * S::kD, quad * 8, 0);
  __syncthreads();
  for (int channel = thread_index(); channel < S::kD; channel += S::kThreads) {
    float runs[S::kRuns];
#pragma unroll
    for (int i = 0; i < S::kRuns; ++i) runs[i] = reinterpret_cast<const float*>(shared.partial[i])[channel];
    shared.by_channel[first / S::kTile][channel] = tree_sum<S::kRuns>(runs);
  }
}

// The mean from the sums of tiles: into the page in operand order, and into shared memory by channel and by place.
template <class S>
__device__ __forceinline__ void finish_mean(Shared<S>& shared, uint8_t* to) {
  for (int channel = thread_index(); channel < S::kD; channel += S::kThreads) {  // the thread that wrote these sums
    float sums[S::kTiles];
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) sums[i] = shared.by_channel[i][channel];
    const float mean = mean_of_sum(tree_sum<S::kTiles>(sums));
    if (fabsf(mean) > S::kLimit / 2) shared.wild = 1;
    shared.by_channel[0][channel] = unpack<typename S::T>(pack<typename S::T>(mean, 0.f)).x;
  }
  __syncthreads();
  const uint16_t* channels = reinterpret_cast<const uint16_t*>(shared.channels);
  for (int place = thread_index(); place < S::kD; place += S::kThreads) {
    reinterpret_cast<float*>(shared.mean)[place] = shared.by_channel[0][channels[place] / 2];
    const float mean = shared.by_channel[0][channels[row_position(place)] / 2];
    reinterpret_cast<uint16_t*>(to)[place] = static_cast<uint16_t>(pack<typename S::T>(mean, 0.f));
  }
}

// Raises shared.top to the largest of the numbers that lanes found; of scores, bits compare as numbers do.
template <class S>
__device__ __forceinline__ void raise_top(Shared<S>& shared, float top) {
  const uint32_t bits = __reduce_max_sync(~0u, as_bits(top));
  if (thread_index() % kWarp == 0) atomicMax(&shared.top, bits);
}

// The largest finite score of the tile, of K ...
template <class S>
__device__ __forceinline__ void find_key_top(const StoreCompressParams& p, Shared<S>& shared, int head) {
  const int quad = thread_index() % S::kQuads, run = thread_index() / S::kQuads;
  float mean[4], weight[4] = {1.f, 1.f, 1.f, 1.f};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mean[i] = shared.by_channel[0][4 * quad + i];
    if (p.k_weight != nullptr) weight[i] = p.k_weight[head * S::kD + 4 * quad + i];
  }
  float top = 0.f;
#pragma unroll 4
  for (int row = run * S::kRunRows; row < (run + 1) * S::kRunRows; ++row) {
    float x[4];
    unpack<typename S::T>(four_values(shared, row_offset<S>(row) ^ quad * 8), x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float s = score(add(x[i], -mean[i]), weight[i]);
      if (s < INFINITY) top = fmaxf(top, s);
    }
  }
  raise_top(shared, top);
}

// ... and of V: a bias makes what is not finite negative.
template <class S>
__device__ __forceinline__ void find_value_top(Shared<S>& shared) {
  const typename Tile<S>::Pieces mine;
  constexpr uint32_t kBias = kSigns - kInfinities<typename S::T>;
  uint32_t most = kBias;
#pragma unroll 4
  for (int i = 0; i < S::kTile; i += Tile<S>::kRows) {
    const uint4 x = eight_values(shared, mine.offset(i));
    most = __vmaxs2(most, (x.x & kMagnitudes) + kBias);
    most = __vmaxs2(most, (x.y & kMagnitudes) + kBias);
    most = __vmaxs2(most, (x.z & kMagnitudes) + kBias);
    most = __vmaxs2(most, (x.w & kMagnitudes) + kBias);
  }
  const float2 two = unpack<typename S::T>(most - kBias);
  raise_top(shared, fmaxf(two.x, two.y));
}

}  // namespace hierasparse::compress
