// What sm_90a adds to ptx.cuh: products of warpgroups, bulk copies and barriers that wait for them.
//
// Shared memory has two kinds of readers: threads, and the units behind wgmma and bulk copies ("async proxy").  What
// threads wrote is only there for the units after fence_async() in the thread that wrote it and a barrier.
#pragma once

#include "ptx.cuh"

namespace hierasparse {

// ---- who runs
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- barriers in shared memory: those of ptx.cuh, whose phases also wait for all announced bytes
__device__ __forceinline__ void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t at, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// Whether that phase has ended, without waiting.
__device__ __forceinline__ bool mbarrier_done(uint32_t at, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(at), "r"(parity)
      : "memory");
  return done != 0;
}
// `bytes` (a multiple of 16) to shared memory; they count on the barrier as they land.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// ---- shared memory
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void store_shared4(uint32_t at, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
__device__ __forceinline__ float load_shared_float(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ void store_shared_float(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
__device__ __forceinline__ float2 load_shared_floats(uint32_t at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
  return v;
}
__device__ __forceinline__ void store_shared_floats(uint32_t at, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void store_shared8(uint32_t at, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_shared16(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Four 8 x 8 matrices; lane 8 m + i has the address of row i of matrix m in memory.
__device__ __forceinline__ uint4 load_matrices(uint32_t at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}
// ... each transposed on its way: row i in memory is column i of the registers.
__device__ __forceinline__ void store_matrices_transposed(uint32_t at, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x), "r"(y),
               "r"(z), "r"(w)
               : "memory");
}

// ---- products of a warpgroup: d [64, N] += a b, A in registers, B [N, k] in shared memory
// B: rows of 128 bytes, one per column of d, whose 16-byte pieces are XORed with the row's number modulo 8 ("128-byte
// swizzle"); the matrix begins at a multiple of 1024, a k-step some bytes behind it.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t at) {
  return uint64_t{(at & 0x3ffff) >> 4 | 1u << 16} | uint64_t{1u << 30 | 1024 / 16} << 32;
}
__device__ __forceinline__ uint64_t wgmma_behind(uint64_t descriptor, int bytes) { return descriptor + bytes / 16; }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {  // all but the last N groups are done
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler does not know that these registers change later than the instruction that names them.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// N = 96; a thread has 48 numbers of d.
#define HS_LIST                                                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47"
#define HS_OUT_8(i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define HS_OUT HS_OUT_8(0), HS_OUT_8(8), HS_OUT_8(16), HS_OUT_8(24), HS_OUT_8(32), HS_OUT_8(40)

// A dense, k = 16.
__device__ __forceinline__ void wgmma(float (&d)[48], const uint4& a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\nwgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" HS_LIST
      "}, {%48, %49, %50, %51}, %52, p, 1, 1, 0;\n}"
      : HS_OUT
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(static_cast<int>(add)));
}
// A 2:4, k = 32; kSelector says which lanes' metadata is meant.
template <int kSelector>
__device__ __forceinline__ void wgmma_sp(float (&d)[48], const uint4& a, uint32_t metadata, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\nwgmma.mma_async.sp.sync.aligned.m64n96k32.f32.bf16.bf16 {" HS_LIST
      "}, {%48, %49, %50, %51}, %52, %54, %55, p, 1, 1, 0;\n}"
      : HS_OUT
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(static_cast<int>(add)), "r"(metadata), "n"(kSelector));
}
#undef HS_OUT
#undef HS_OUT_8
#undef HS_LIST

}  // namespace hierasparse
