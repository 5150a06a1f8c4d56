// csrc/common/ptx.cuh for cuda_on_cpu.h: the tests put it in that file's place.  Tensor-core products are those of the
// PTX manual, lane by lane, in float32.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
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

inline void require(bool good, const char* what) {
  if (good) return;
  fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  exit(4);
}
inline bool late() { return blockIdx.x / 2 % 2 == 1; }

// ---- named barriers
struct NamedBarriers {
  emulation::Barrier of[16];
  unsigned block = ~0u;
};
inline emulation::Barrier& named(int id) {
  static NamedBarriers all;
  if (all.block != blockIdx.x) {
    for (const auto& barrier : all.of) require(barrier.arrived == 0, "the last block left arrivals at a barrier");
    all = NamedBarriers{};
    all.block = blockIdx.x;
  }
  return all.of[id];
}
inline void barrier_sync(int id, int threads) { emulation::meet(named(id), threads); }
inline void barrier_arrive(int id, int threads) {
  emulation::Barrier& barrier = named(id);
  if (++barrier.arrived == static_cast<unsigned>(threads)) barrier.arrived = 0, ++barrier.rounds;
}

// ---- copies, and barriers in shared memory
// A copy lands at once, but for those that a barrier waits for: in some blocks they land when somebody waits for them.
struct Landing {
  uint32_t barrier;
  std::function<void()> run;
};
struct Copy {
  uint32_t to, bytes;
  const void* from;
  bool grouped = false, landed = false;
};
using Copies = std::vector<std::shared_ptr<Copy>>;
inline std::vector<Landing> landings;       // not yet done
inline std::map<unsigned, Copies> copying;  // by the thread that began them, until they have landed
inline bool copies_have_barriers = false;   // of the program, which sets it

inline void land(const Landing& landing) { late() ? landings.push_back(landing) : landing.run(); }

inline void finish(Copy& copy) {
  if (!copy.landed) memcpy(shared_memory + copy.to, copy.from, copy.bytes);
  copy.landed = true;
}
inline Copies& mine_copying() {
  Copies& copies = copying[threadIdx.x];
  copies.erase(std::remove_if(copies.begin(), copies.end(), [](auto& copy) { return copy->landed; }), copies.end());
  return copies;
}
inline int32_t load_kept(const int32_t* from) { return *from; }
inline void copy_async(uint32_t to, const void* from, uint32_t bytes) {
  if (!copies_have_barriers) {
    memcpy(shared_memory + to, from, bytes);
    return;
  }
  require(to % bytes == 0 && reinterpret_cast<uintptr_t>(from) % bytes == 0, "a copy is not aligned");
  memset(shared_memory + to, 0xff, bytes);  // NaN
  mine_copying().push_back(std::make_shared<Copy>(Copy{to, bytes, from}));
}
inline void copy16_async(uint32_t to, const void* from) { copy_async(to, from, 16); }
inline void copy4_async(uint32_t to, const void* from) { copy_async(to, from, 4); }
inline void copy16_async_or_zero(uint32_t to, const void* from, bool real) {
  real ? copy_async(to, from, 16) : void(memset(shared_memory + to, 0, 16));
}
inline void commit_copies() {
  for (auto& copy : mine_copying()) copy->grouped = true;
}
// Lands what is chosen by `which`.
template <class Which>
void land_all(Which which) {
  for (size_t i = 0; i < landings.size();) {
    if (!which(landings[i])) {
      ++i;
    } else {
      const Landing landing = landings[i];
      landings.erase(landings.begin() + i);
      landing.run();
    }
  }
}
template <int N>
void wait_copies() {
  if (N > 0) return;
  for (auto& copy : mine_copying()) {
    if (copy->grouped) finish(*copy);  // nothing waits for others
  }
}
template <typename V>
V load_shared(uint32_t at) {
  V v;
  require(at % sizeof v == 0, "a load is not aligned");
  memcpy(&v, shared_memory + at, sizeof v);
  return v;
}
inline uint32_t load_shared4(uint32_t at) { return load_shared<uint32_t>(at); }
inline uint2 load_shared8(uint32_t at) { return load_shared<uint2>(at); }
inline uint4 load_shared16(uint32_t at) { return load_shared<uint4>(at); }

struct Mbarrier {
  int count, pending, bytes;
  uint32_t phase;
  void check() {
    if (pending == 0 && bytes == 0) pending = count, phase ^= 1;
  }
};
inline std::map<uint32_t, Mbarrier> mbarriers;

inline void mbarrier_init(uint32_t at, int count) {
  require(at % 8 == 0, "a barrier's address is no multiple of 8");
  mbarriers[at] = {count, count, 0, 0};
}
inline void mbarrier_arrive(uint32_t at) {
  Mbarrier& barrier = mbarriers.at(at);
  require(barrier.pending > 0, "too many arrivals");
  --barrier.pending;
  barrier.check();
}
constexpr int kWarpArrivals = 1;
inline void mbarrier_arrive_warp(uint32_t at, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(at);
}
inline void mbarrier_arrive_copies(uint32_t at) {
  land({at, [at, copies = mine_copying()] {
          for (auto& copy : copies) finish(*copy);
          mbarrier_arrive(at);
        }});
}
inline void mbarrier_wait(uint32_t at, uint32_t parity) {
  Mbarrier& barrier = mbarriers.at(at);
  while (barrier.phase == parity) {
    for (int turn = 0; turn < 3 && barrier.phase == parity; ++turn) emulation::pause();
    land_all([at](const Landing& landing) { return landing.barrier == at; });
  }
}

inline float exp2_fast(float x) { return exp2f(x); }
uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t both = a | uint64_t{b} << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const int select = selectors >> 4 * i & 15;
    const uint32_t byte = both >> 8 * (select & 7) & 255;
    out |= (select & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}
template <int kSelect>
uint32_t permute(uint32_t a, uint32_t b) {
  return permute(a, b, kSelect);
}
uint32_t rotate_right(uint32_t v, int bits) { return uint32_t((v | uint64_t{v} << 32) >> (bits & 31)); }

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
