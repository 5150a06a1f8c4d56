// Fused attention of long chunks over 2:4 pages on Hopper's sparse tensor cores (wgmma.sp).
//
// Keys are the rows of S^T = K q^T and channels those of O^T = V^T P^T, so that the stored 2:4 form is operand A, which
// goes from the ring of stages into registers; operand B, queries and probabilities, is in shared memory.  Two or three
// warpgroups with 96 columns each take the same sub-blocks: while one works out exponentials, the tensor cores have the
// others' products.
//
// No maximum is kept up to date.  Probabilities (bfloat16), O and the sums (float32) share float32's range, so
// exp2(score - top) is right for any `top` within about 2^60 of the true maximum: it is taken from one sub-block, and
// where the sums show at the end that it was a bad guess, the tile is done again with the maximum over all its keys.
#pragma once

#include "consumer.cuh"
#include "epilogue.cuh"
#include "producer.cuh"

namespace hierasparse::prefill90 {

// Whether a column's sum says that its top was a good guess; NaN says no.
__device__ __forceinline__ bool good(float sum) { return sum >= 0x1p-60f && sum <= 0x1p100f; }

template <class S>
__device__ __forceinline__ void consume(const Arguments& p, const Work& work, uint8_t* memory, uint32_t shared,
                                        int number, uint32_t page_word) {
  const PageLayout& layout = p.cache.layout;
  const int pages = work.end - work.first, local = thread_index() % kGroupThreads, column = number * S::kN + local;
  const int sinks = layout.has_sinks(page_word) ? layout.sink_tokens : 0;
  load_queries<S>(p, work, shared, number);
  Consumer<S> consumer(p, work, shared, number);
  float sum = 0.f;
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    if (local < S::kN) store_shared_float(shared + S::kTops + column * 4, 0.f);
    barrier_sync(kGroup + number, kGroupThreads);
    mbarrier_arrive_warp(shared + S::kTopsThere, lane_of_warp());
    consumer.find_tops(pages, attempt > 0, sinks);
    barrier_sync(kGroup + number, kGroupThreads);
    mbarrier_arrive_warp(shared + S::kTopsThere, lane_of_warp());
    sum = consumer.attend(pages, sinks);
    const bool sees = local < S::kN && column < work.columns() &&
                      static_cast<int>(load_shared4(shared + S::kBorders + column * 4)) > work.first * kPageTokens;
    if (attempt == 0 && sees && !good(sum)) store_shared4(shared + S::kAgain, 1);
    mbarrier_arrive_warp(shared + S::kDecided, lane_of_warp());
    mbarrier_wait(shared + S::kDecided, attempt);
    if (load_shared4(shared + S::kAgain) == 0) break;
  }
  // The ring has been read: O takes its place.  Weights of sinks take that of the probabilities.
  const int results = S::kRing + number * S::kN * S::kResultPitch * 4;
  const uint32_t weights = shared + S::kProbabilities + number * 2 * S::kHalf;
  const uint8_t* sink_page = sinks > 0 ? work.region(p, work.page_id(p, 0)) : nullptr;
  consumer.store_result(reinterpret_cast<float*>(memory + results));
  finish_column<S>(p, work, shared, number, sum, sinks, sink_page, weights);
  barrier_sync(kGroup + number, kGroupThreads);
  store_outputs<S>(p, work, shared, number, shared + results, sinks, sink_page, weights);
}

template <class S>
__device__ __forceinline__ void attend_tile(const Arguments& p, uint8_t* memory) {
  const uint32_t shared = shared_address(memory);
  const Work work(p, blockIdx.x);
  if (work.first >= work.end) return store_nothing<S>(p, work);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      mbarrier_init(shared + S::full(i), 1);
      mbarrier_init(shared + S::empty(i), S::kConsumerArrivals);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared + S::start_full(i), kMeanWarps * kWarpArrivals);
      mbarrier_init(shared + S::start_empty(i), S::kConsumerArrivals);
    }
    mbarrier_init(shared + S::kTopsThere, S::kConsumerArrivals);
    mbarrier_init(shared + S::kDecided, S::kConsumerArrivals);
    store_shared4(shared + S::kAgain, 0);
    mbarrier_init_done();
  }
  __syncthreads();
  const int number = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  if (number == S::kConsumers) {
    fewer_registers<S::kFeederRegisters>();
    produce<S>(p, work, shared);
  } else {
    more_registers<S::kConsumerRegisters>();
    // Only a request's page 0 has sinks.
    const bool ask = work.first == 0 && p.cache.layout.sink_tokens > 0;
    const uint32_t word = ask ? __ldg(reinterpret_cast<const uint32_t*>(work.region(p, work.page_id(p, 0)))) : 0;
    consume<S>(p, work, memory, shared, number, word);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1) prefill_kernel(const __grid_constant__ Arguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  attend_tile<S>(p, memory);
#else
  __trap();
#endif
}

// ---- launch --------------------------------------------------------------------------------------------------------
template <class S>
cudaError_t run(const PrefillParams& p, cudaStream_t stream) {
  const auto kernel = prefill_kernel<S>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  kernel<<<p.tile_count * p.cache.kv_heads * p.splits, S::kThreads, kShared, stream>>>(Arguments(p));
  return cudaGetLastError();
}

template <int kD, bool kMixed>
cudaError_t run_shape(const PrefillParams& p, cudaStream_t stream) {
  return run<Shape<kD, kMixed>>(p, stream);
}

}  // namespace hierasparse::prefill90
