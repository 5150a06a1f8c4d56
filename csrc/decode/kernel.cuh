// Paged split-KV decode over 2:4 pages and the dense window, one launch, merge included.
//
// Keys are the M side of S^T = K q^T and channels that of O^T = V^T P^T, so that a group of up to eight query heads
// costs one tensor-core tile and the stored 2:4 form is the sparse operand.
//
// A CTA goes from segment to segment of its share (schedule.cuh), with six warps:
//   four consumers, each with its own sub-blocks, pieces of the window and softmax; they meet at a segment's end;
//   a producer, which copies for all of them and runs ahead, into the next segment too;
//   a planner, which finds the next segment, its first page ids and its queries, and merges what others have a part in.
// kTokens: V's groups of four lie along tokens.  kExpand: 2:4 keys are expanded in registers, so that with V along
// channels no product is sparse (params.h says why).  docs/kernels.md has the budgets.
#pragma once

#include "results.cuh"

namespace hierasparse::decode {

constexpr int kProducer = kWarps, kPlanner = kWarps + 1;  // their warps
constexpr int kThreads = 32 * (kWarps + 2);

// The rings lie behind it and must begin at a multiple of 128: copies into parts of two lines of shared memory become
// four requests to L2 each, whose tag look-ups are then the limit (3.7 instead of 4.5 TB/s).
template <int kD, int kTiles>
struct alignas(128) Shared {
  Queries<kD, kTiles> queries[2];
  Results<kD, kTiles> results;
  Plans plans;
  Rings rings;
  Walk walk;
  int number[kWarps];  // of the segment that a consumer is at
  uint64_t verdict;    // its only phase ends when `last` is known
  bool last;           // this CTA merges its last lane
};

template <int kD, int kTiles>
constexpr int shared_bytes(int stages) {
  return static_cast<int>(sizeof(Shared<kD, kTiles>)) + kWarps * stages * kStageBytes;
}

// ---- planner
// Whether this CTA was the last to store its part of the plan's lane.
__device__ __forceinline__ bool all_parts_there(const DecodeParams& p, const Plan& plan) {
  __threadfence();  // the consumers' stores, seen when they were done, come first
  bool last = false;
  if (thread_index() % 32 == 0) {
    int32_t* counter = p.counters + plan.sharers.owner;
    last = atomicAdd(counter, 1) == plan.sharers.count - 1;
    if (last) *counter = 0;  // as the next launch expects it
  }
  __threadfence();
  __syncwarp();  // the vote orders no memory: what other CTAs wrote is seen by all lanes behind the first one's fence
  return __any_sync(~0u, last);
}

template <typename T, int kD, bool kExpand, int kTiles>
__device__ __forceinline__ void plan(const DecodeParams& p, Shared<kD, kTiles>& shared) {
  const bool first_lane = thread_index() % 32 == 0;
  Plans& plans = shared.plans;
#pragma unroll 1
  for (int n = 0;; ++n) {
    Plan& next = plans[n];
    if (first_lane) {
      Walk walk = shared.walk;  // in registers meanwhile: each number is asked for several times
      walk.next(p, 8 * kTiles, next.segment);
      shared.walk = walk;
    }
    __syncwarp();
    const bool end = next.segment.end == 0;
    if (!end) {
      shared.queries[n % 2].begin(p, next);
      const int ids = load_ids(p, next.segment, next.segment.first_page());
      next.ids[thread_index() % 32] = ids;
      next.words[thread_index() % 32] = load_words(p, next.segment, ids, next.segment.first_page());
    }
    Plans::tell(plans.segment, n);
    if (!end) shared.queries[n % 2].template end<kExpand>();
    Plans::tell(plans.queries, n);
    if (!end && first_lane && !next.segment.whole) next.sharers = shared.walk.sharers(p, next.segment);
    if (n > 0) {
      const Plan& before = plans[n - 1];
      Plans::wait(plans.done, n - 1);
      if (!before.segment.whole) {
        const bool last = all_parts_there(p, before);
        if (end) {  // consumers have nothing else to do: they are faster
          if (first_lane) shared.last = last, mbarrier_arrive(shared_address(&shared.verdict));
        } else if (last) {
          merge<T, kD, kTiles>(p, before, thread_index() % 32, 32);
          __syncwarp();
        }
      }
    }
    if (end) return;
  }
}

// ---- consumers
// The warp's sub-blocks of a segment's pages.
template <typename T, int kD, bool kTokens, bool kExpand, int kTiles>
__device__ __forceinline__ void attend_pages(const DecodeParams& p, State<kD, kTiles>& state, Chunks& chunks,
                                             const Plan& plan, uint32_t queries) {
  const PageLayout& layout = p.cache.layout;
  const Columns& columns = plan.columns;
  const int t = thread_index() % 4, g = thread_index() % 32 / 4;
  auto share = [&] { return Share(plan.segment, thread_index() / 32); };  // found anew: it would take registers
#pragma unroll 1
  for (int page = share().first_page; page < share().end_page; ++page) {
    const Kind kind = chunks.kind();
    float s[4][kTiles][4];
    multiply_keys<T, kD, kExpand, kTiles>(s, chunks, layout.key_mean, kind.sparse_k, queries);
    const bool edge = (page + 1) * kPageTokens > plan.segment.request.low;  // some query reads it from its window
    const bool sinks = kind.sinks && thread_index() < 32;                   // in sub-block 0
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
    multiply_values<T, kD, kTokens, kTiles>(state, chunks, kind.sparse_v, probability);
    if (sinks) {
      const uint8_t* first = region(p, plan.segment, plan.ids[0]);
      attend_sinks<T, kD, kExpand, kTiles>(p, state, first, columns, queries);
    }
  }
}

template <typename T, int kD, bool kTokens, bool kExpand, int kTiles>
__device__ __forceinline__ void consume(const DecodeParams& p, Shared<kD, kTiles>& shared, uint32_t ring, int stages) {
  const Plans& plans = shared.plans;
  Chunks chunks(shared.rings, ring, stages);
  State<kD, kTiles> state;
  // The segment's number: in shared memory, since registers run short.
  auto number = [&]() -> volatile int& { return shared.number[thread_index() / 32]; };
#pragma unroll 1
  while (true) {
    Plans::wait(plans.queries, number());
    if (plans[number()].segment.end == 0) break;
    state.reset();
    attend_pages<T, kD, kTokens, kExpand, kTiles>(p, state, chunks, plans[number()],
                                                  shared_address(shared.queries[number() % 2].paged));
    attend_window<T, kD, kTiles>(p, state, chunks, plans[number()], shared_address(shared.queries[number() % 2].plain));
    finish<T>(p, state, plans[number()], shared.results, Part<kD>(p, block_index(), plans[number()].segment.part));
    Plans::tell(shared.plans.done, number());
    if (thread_index() % 32 == 0) number() = number() + 1;
    __syncwarp();
  }
  const Plan& last = plans[number() + 1];  // as number() - 1
  if (number() == 0 || last.segment.whole) return;
  mbarrier_wait(shared_address(&shared.verdict), 0);
  if (shared.last) merge<T, kD, kTiles>(p, last, thread_index(), kConsumerThreads);
}

// ---- the kernel
template <typename T, int kD, bool kTokens, bool kExpand, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ DecodeParams p, int stages) {
  extern __shared__ __align__(128) uint8_t memory[];
  Shared<kD, kTiles>& shared = *reinterpret_cast<Shared<kD, kTiles>*>(memory);
  const int warp = threadIdx.x / 32;
  const uint32_t ring = shared_address(memory) + sizeof(Shared<kD, kTiles>);
  if (threadIdx.x < kWarps) shared.number[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.plans.init(), mbarrier_init(shared_address(&shared.verdict), 1);
  if (warp == 1) shared.rings.init();
  if (warp == kPlanner) shared.walk.begin(p, block_index(), 8 * kTiles);  // ahead of the first barrier: all wait for it
  __syncthreads();
  if (warp == kPlanner) {
    plan<T, kD, kExpand>(p, shared);
  } else if (warp == kProducer) {
    Producer<kD> producer(p, shared.rings, ring, stages);
#pragma unroll 1
    for (int n = 0;; ++n) {
      Plans::wait(shared.plans.segment, n);
      const Plan& plan = shared.plans[n];
      if (plan.segment.end == 0) return;
      producer.copy(plan);
    }
  } else {
    consume<T, kD, kTokens, kExpand, kTiles>(p, shared, ring, stages);
  }
}

// ---- launch --------------------------------------------------------------------------------------------------------
int ring_stages(int fixed_bytes);  // launch.cu: how many the current device has room for

template <typename T, int kD, bool kTokens, bool kExpand, int kTiles>
cudaError_t run(const DecodeParams& p, cudaStream_t stream) {
  const auto kernel = decode_kernel<T, kD, kTokens, kExpand, kTiles>;
  const int stages = ring_stages(shared_bytes<kD, kTiles>(0));
  const int bytes = shared_bytes<kD, kTiles>(stages);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<p.ctas, kThreads, bytes, stream>>>(p, stages);
  return cudaGetLastError();
}

}  // namespace hierasparse::decode
