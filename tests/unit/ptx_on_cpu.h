// csrc/common/ptx.cuh for cuda_on_cpu.h: the tests put it in that file's place.  Tensor-core products are those of the
// PTX manual, lane by lane, in float32; copies land at once.
#pragma once

#include <type_traits>

namespace hierasparse {

// Shared memory of the block that runs; addresses count from its beginning.
inline uint8_t* shared_memory = nullptr;

inline int thread_index() { return threadIdx.x; }
constexpr bool kFindAnew = false;
inline int block_index() { return blockIdx.x; }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - shared_memory);
}

inline void copy16_async(uint32_t to, const void* from) { memcpy(shared_memory + to, from, 16); }
inline void copy16_async_or_zero(uint32_t to, const void* from, bool real) {
  real ? memcpy(shared_memory + to, from, 16) : memset(shared_memory + to, 0, 16);
}
inline void commit_copies() {}
template <int>
void wait_copies() {}
template <typename V>
V load_shared(uint32_t at) {
  V v;
  memcpy(&v, shared_memory + at, sizeof v);
  return v;
}
inline uint2 load_shared8(uint32_t at) { return load_shared<uint2>(at); }
inline uint4 load_shared16(uint32_t at) { return load_shared<uint4>(at); }

inline float exp2_fast(float x) { return exp2f(x); }
template <int kSelect>
uint32_t permute(uint32_t a, uint32_t b) {
  const uint64_t both = a | uint64_t{b} << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const int select = kSelect >> 4 * i & 15;
    const uint32_t byte = both >> 8 * (select & 7) & 255;
    out |= (select & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}

// Registers of all 32 lanes of the warp.
template <int N>
struct Lanes {
  uint32_t of[32][N];
  explicit Lanes(const uint32_t (&mine)[N]) {
    static uint32_t given[32][32][N];  // by warp
    auto& all = given[threadIdx.x / 32];
    memcpy(all[threadIdx.x % 32], mine, sizeof mine);
    emulation::meet(emulation::warp(), 32);
    memcpy(of, all, sizeof of);
    emulation::meet(emulation::warp(), 32);
  }
};

inline uint32_t half_of(uint32_t pair, int h) { return pair >> 16 * h & 0xffff; }
template <typename T>
float value_of(uint32_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    return half_to_float(bits);
  } else {
    float x;
    bits <<= 16;
    memcpy(&x, &bits, 4);
    return x;
  }
}

inline uint32_t transpose8x8(uint32_t v) {
  const Lanes<1> all({v});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  // Row r, columns 2 s and 2 s + 1 lie in lane 4 r + s.
  auto at = [&](int row, int column) { return half_of(all.of[4 * row + column / 2][0], column % 2); };
  return at(2 * t, g) | at(2 * t + 1, g) << 16;
}

// Value of A [16, 16] in the registers 0 ... 3 of the lanes, and of B [kDepth, 8] in those from `first` on.
template <typename T, int N>
float a_value(const Lanes<N>& all, int row, int column) {
  const int lane = 4 * (row % 8) + column % 8 / 2, i = row / 8 + 2 * (column / 8);
  return value_of<T>(half_of(all.of[lane][i], column % 2));
}
template <typename T, int N>
float b_value(const Lanes<N>& all, int first, int k, int n) {
  return value_of<T>(half_of(all.of[4 * n + k % 8 / 2][first + k / 8], k % 2));
}

template <typename T>
void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const Lanes<6> all({a0, a1, a2, a3, b0, b1});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int e = 0; e < 4; ++e) {
    for (int k = 0; k < 16; ++k) d[e] += a_value<T>(all, g + 8 * (e / 2), k) * b_value<T>(all, 4, k, 2 * t + e % 2);
  }
}

template <typename T, int kSelector>
void mma_sp(float (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
  const Lanes<9> all({a.x, a.y, a.z, a.w, b[0], b[1], b[2], b[3], metadata});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = g + 8 * (e / 2);
    for (int group = 0; group < 8; ++group) {
      // Lanes 4 g + 2 selector and + 1 tell of 16 columns each: row g in the low half, row g + 8 in the high one.
      const uint32_t word = all.of[4 * g + 2 * kSelector + group / 4][8];
      const uint32_t nibble = word >> (16 * (e / 2) + 4 * (group % 4)) & 15;
      for (int i = 0; i < 2; ++i) {
        const int k = 4 * group + (nibble >> 2 * i & 3);
        d[e] += a_value<T>(all, row, 2 * group + i) * b_value<T>(all, 4, k, 2 * t + e % 2);
      }
    }
  }
}

}  // namespace hierasparse
