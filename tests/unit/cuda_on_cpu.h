// Runs a CUDA kernel on the host, for tests on machines without a GPU: the threads of a block are coroutines that take
// turns at barriers and at the exchanges between lanes; blocks run one after the other.  Just what csrc/compress needs.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct int2 {
  int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// ---- the block that runs
struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr unsigned kLanes = 32;

struct Barrier {
  unsigned arrived = 0, rounds = 0;
};

struct Block {
  struct Thread {
    std::vector<char> stack;
    jmp_buf at;  // where it goes on, once it has begun; swapcontext would cost two system calls
    bool begun = false, ended = false;
  };
  std::vector<Thread> threads;
  std::vector<uint32_t> given;  // what a thread gives to its warp, or to the block
  std::vector<Barrier> warps;
  Barrier all;
  jmp_buf scheduler;
  unsigned current = 0;
};
inline Block block;
inline std::function<void()> body;

inline void pause() {
  if (_setjmp(block.threads[block.current].at) == 0) _longjmp(block.scheduler, 1);
}

inline void meet(Barrier& barrier, unsigned threads) {
  const unsigned round = barrier.rounds;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0, ++barrier.rounds;
  } else {
    while (barrier.rounds == round) pause();
  }
}
inline Barrier& warp() { return block.warps[threadIdx.x / kLanes]; }

inline void thread_main() {
  body();
  block.threads[block.current].ended = true;
  pause();
}

// Runs a thread until it waits for others or ends.
inline void go_on(Block::Thread& thread) {
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.at, 1);
  thread.begun = true;
  static ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = thread.stack.data();
  start.uc_stack.ss_size = thread.stack.size();
  start.uc_link = nullptr;
  makecontext(&start, thread_main, 0);
  setcontext(&start);
}

// Calls kernel() in every thread of every block. Every other block lets its last thread go first, so that a result
// which hangs on the order, for want of a barrier, is a wrong one somewhere.
inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  body = kernel;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    block = Block{};
    block.threads.resize(threads), block.given.resize(threads), block.warps.resize(threads / kLanes);
    for (Block::Thread& thread : block.threads) thread.stack.resize(64 << 10);
    for (bool running = true; running;) {
      running = false;
      for (unsigned i = 0; i < threads; ++i) {
        block.current = blockIdx.x % 2 == 0 ? i : threads - 1 - i;
        Block::Thread& thread = block.threads[block.current];
        if (thread.ended) continue;
        running = true;
        threadIdx.x = block.current;
        go_on(thread);
      }
    }
  }
}

template <typename V>
V exchange(V mine, unsigned from) {
  V other;
  for (size_t i = 0; i < sizeof(V) / 4; ++i) {
    memcpy(&block.given[threadIdx.x], reinterpret_cast<const char*>(&mine) + 4 * i, 4);
    meet(warp(), kLanes);
    memcpy(reinterpret_cast<char*>(&other) + 4 * i, &block.given[threadIdx.x / kLanes * kLanes + from % kLanes], 4);
    meet(warp(), kLanes);
  }
  return other;
}
template <class Op>
uint32_t reduce(uint32_t mine, Op op) {
  block.given[threadIdx.x] = mine;
  meet(warp(), kLanes);
  const uint32_t* all = &block.given[threadIdx.x / kLanes * kLanes];
  uint32_t result = all[0];
  for (unsigned i = 1; i < kLanes; ++i) result = op(result, all[i]);
  meet(warp(), kLanes);
  return result;
}

}  // namespace emulation

template <typename V>
V __ldg(const V* from) {
  return *from;
}
inline void __syncwarp() { emulation::meet(emulation::warp(), emulation::kLanes); }
template <typename V>
V __shfl_sync(unsigned, V mine, int from) {
  return emulation::exchange(mine, from);
}
inline bool __any_sync(unsigned, bool mine) {
  return emulation::reduce(mine, [](uint32_t a, uint32_t b) { return a | b; }) != 0;
}
inline void __syncthreads() { emulation::meet(emulation::block.all, emulation::block.threads.size()); }
inline bool __syncthreads_or(bool mine) {
  emulation::block.given[threadIdx.x] = mine;
  __syncthreads();
  bool any = false;
  for (const uint32_t x : emulation::block.given) any = any || x != 0;
  __syncthreads();
  return any;
}
template <typename V>
V __shfl_xor_sync(unsigned, V mine, int mask) {
  return emulation::exchange(mine, threadIdx.x % 32 ^ mask);
}
template <typename V>
V __shfl_up_sync(unsigned, V mine, int by) {
  const int lane = threadIdx.x % 32;
  return emulation::exchange(mine, lane < by ? lane : lane - by);
}
// Of int or unsigned, as on the device.
template <typename V>
V __reduce_add_sync(unsigned, V x) {
  return emulation::reduce(x, [](V a, V b) { return a + b; });
}
template <typename V>
V __reduce_min_sync(unsigned, V x) {
  return emulation::reduce(x, [](V a, V b) { return a < b ? a : b; });
}
template <typename V>
V __reduce_max_sync(unsigned, V x) {
  return emulation::reduce(x, [](V a, V b) { return a > b ? a : b; });
}

template <typename V>
V atomicAdd(V* to, V x) {
  const V before = *to;
  *to += x;
  return before;
}
inline void atomicMax(uint32_t* to, uint32_t x) { *to = *to > x ? *to : x; }
inline void atomicAnd(uint32_t* to, uint32_t x) { *to &= x; }
inline void atomicOr(uint32_t* to, uint32_t x) { *to |= x; }

inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = low | uint64_t{high} << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

// ---- 16-bit floats
struct __nv_bfloat16 {};
struct __half {};
struct __half2 {
  uint16_t x, y;
};

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? ldexpf(1024 + mantissa, exponent - 25)
                                    : ldexpf(mantissa, -24);
  return bits >> 15 ? -size : size;
}
inline float2 __half22float2(__half2 x) { return {half_to_float(x.x), half_to_float(x.y)}; }

// To nearest, ties to even; NaN as the device gives it.
inline uint32_t to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = fabsf(x);
  if (size >= 65520.f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint32_t>(nearbyintf(size * 0x1p24f));
  uint32_t bits;
  memcpy(&bits, &size, 4);
  bits += 0xfff + (bits >> 13 & 1);
  return sign | ((bits >> 13) - (112 << 10));
}
inline uint32_t to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fff;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

namespace hierasparse {

template <typename T>
uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    return to_half(low) | to_half(high) << 16;
  } else {
    return to_bfloat16(low) | to_bfloat16(high) << 16;
  }
}

}  // namespace hierasparse

// ---- the little of csrc/common/ptx.cuh that csrc/compress uses; ptx_on_cpu.h has what csrc/decode needs
#ifndef HS_PTX_ON_CPU
namespace hierasparse {

inline uint8_t* shared_address(uint8_t* p) { return p; }
inline void copy16_async(uint8_t* to, const void* from) { memcpy(to, from, 16); }
inline void commit_copies() {}
template <int>
void wait_copies() {}

}  // namespace hierasparse
#endif
