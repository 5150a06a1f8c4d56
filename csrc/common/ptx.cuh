// The instructions that C++ has no name for, one small function each.  All of them exist since sm_80.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace hierasparse {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// threadIdx.x, read anew where it is used: what follows from it is then not computed long before, and spilled.
__device__ __forceinline__ int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(x));
  return x;
}

// blockIdx.x, the same.
__device__ __forceinline__ int block_index() {
  int x;
  asm volatile("mov.u32 %0, %ctaid.x;" : "=r"(x));
  return x;
}

// From sm_100 on the compiler needs a few registers more: there, what is cheap to find anew is not kept where they run
// short.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kFindAnew = true;
#else
constexpr bool kFindAnew = false;
#endif

// ---- loads
// 4 bytes of a small table that every launch reads: L2 keeps its line while pages stream past it.
__device__ __forceinline__ int32_t load_kept(const int32_t* from) {
  int32_t x;
  asm volatile(
      "{\n.reg .b64 keep;\ncreatepolicy.fractional.L2::evict_last.b64 keep, 1.0;\n"
      "ld.global.nc.L2::cache_hint.b32 %0, [%1], keep;\n}"
      : "=r"(x)
      : "l"(from));
  return x;
}

// ---- copies
// 16 bytes from global to shared memory, past L1.
__device__ __forceinline__ void copy16_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// 4 bytes.
__device__ __forceinline__ void copy4_async(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
// 16 bytes, or zeros.
__device__ __forceinline__ void copy16_async_or_zero(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_copies() {  // all but the last N groups have landed
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ uint2 load_shared8(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}
__device__ __forceinline__ uint4 load_shared16(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}

// ---- barriers
// Named barriers, of `threads` threads: those that wait and those that only arrive.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- barriers in shared memory (mbarrier): a phase ends when `count` arrivals are there
__device__ __forceinline__ void mbarrier_init(uint32_t at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// A warp's arrivals, of which its barriers' counts are multiples: one lane's stands for what all of them did.
// compute-sanitizer's racecheck follows only what the arriving thread did itself; compiled for it, every lane arrives.
#ifdef HS_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
// The whole warp calls it, with the lane's number.
__device__ __forceinline__ void mbarrier_arrive_warp(uint32_t at, int lane) {
  __syncwarp();
  if (kWarpArrivals > 1 || lane == 0) mbarrier_arrive(at);
}
// The thread arrives when all that it copied so far has landed.
__device__ __forceinline__ void mbarrier_arrive_copies(uint32_t at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
// Until the phase of this parity has ended; parity 1 of a new barrier has.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define HS_TRY_WAIT "mbarrier.test_wait.parity.shared::cta.b64"
#else
#define HS_TRY_WAIT "mbarrier.try_wait.parity.shared::cta.b64"
#endif
__device__ __forceinline__ void mbarrier_wait(uint32_t at, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n" HS_TRY_WAIT " done, [%0], %1;\n@done bra over;\nbra again;\nover:\n}" ::"r"(at),
      "r"(parity)
      : "memory");
}
#undef HS_TRY_WAIT

// ---- arithmetic
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two floats, rounded; `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
// An 8 x 8 matrix of 16-bit values, one register of two neighbours per lane, transposed.
__device__ __forceinline__ uint32_t transpose8x8(uint32_t v) {
  uint32_t w;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(w) : "r"(v));
  return w;
}

// Bytes of `a` (selectors 0-3) and `b` (4-7) picked by four nibbles; 8 added to a selector gives the byte's sign, eight
// times.
template <int kSelect>
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "n"(kSelect));
  return v;
}
// The same by the low 16 bits of a register.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(select));
  return v;
}
__device__ __forceinline__ uint32_t rotate_right(uint32_t v, int bits) { return __funnelshift_r(v, v, bits); }

// ---- tensor cores: d += a b, float32 accumulators, T is __nv_bfloat16 or __half
#define HS_MMA(NAME, TYPE)                                                                                            \
  __device__ __forceinline__ void NAME(float(&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                                       uint32_t b1) {                                                                 \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                             \
  }
#define HS_MMA_SP(NAME, TYPE)                                                                                 \
  template <int kSelector>                                                                                    \
  __device__ __forceinline__ void NAME(float(&d)[4], const uint4& a, uint32_t b0, uint32_t b1, uint32_t b2,   \
                                       uint32_t b3, uint32_t metadata) {                                      \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                  \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(b2), "r"(b3), "r"(metadata), \
                   "n"(kSelector));                                                                           \
  }
HS_MMA(mma_bf16, "bf16")
HS_MMA(mma_fp16, "f16")
HS_MMA_SP(mma_sp_bf16, "bf16")
HS_MMA_SP(mma_sp_fp16, "f16")
#undef HS_MMA
#undef HS_MMA_SP

// [16 x 16] times [16 x 8].
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    mma_fp16(d, a0, a1, a2, a3, b0, b1);
  } else {
    mma_bf16(d, a0, a1, a2, a3, b0, b1);
  }
}
// [16 x 32, 2:4] times [32 x 8]; kSelector says which lanes' metadata is meant.
template <typename T, int kSelector>
__device__ __forceinline__ void mma_sp(float (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
  if constexpr (std::is_same_v<T, __half>) {
    mma_sp_fp16<kSelector>(d, a, b[0], b[1], b[2], b[3], metadata);
  } else {
    mma_sp_bf16<kSelector>(d, a, b[0], b[1], b[2], b[3], metadata);
  }
}

}  // namespace hierasparse
