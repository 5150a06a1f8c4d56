// csrc/common/hopper.cuh for cuda_on_cpu.h: the tests put it in that file's place.
//
// Products and copies are done at once in some blocks, and as late as the kernel allows in others, where a product
// reads its operand B and writes its registers only when somebody waits for it: so what is overwritten too early, or
// read too early, gives wrong results somewhere.
#pragma once

#include "ptx.cuh"

namespace hierasparse {

template <int>
void more_registers() {}
template <int>
void fewer_registers() {}

// ---- barriers in shared memory, and copies
inline void mbarrier_init_done() {}
inline void mbarrier_arrive_expect(uint32_t at, uint32_t bytes) {
  mbarriers.at(at).bytes += bytes;
  mbarrier_arrive(at);
}
inline bool mbarrier_done(uint32_t at, uint32_t parity) { return mbarriers.at(at).phase != parity; }
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  require(to % 16 == 0 && bytes % 16 == 0, "a bulk copy is not in pieces of 16 bytes");
  memset(shared_memory + to, 0xff, bytes);  // NaN
  land({barrier, [=] {
          memcpy(shared_memory + to, from, bytes);
          mbarriers.at(barrier).bytes -= bytes;
          mbarriers.at(barrier).check();
        }});
}

// ---- shared memory: pieces of 16 bytes that a thread wrote and did not yet make visible to products
inline std::map<uint32_t, unsigned> unfenced;
inline void fence_async() {
  for (auto piece = unfenced.begin(); piece != unfenced.end();) {
    piece = piece->second == threadIdx.x ? unfenced.erase(piece) : std::next(piece);
  }
}
template <typename V>
void store_shared(uint32_t at, V v) {
  require(at % sizeof v == 0, "a store is not aligned");
  memcpy(shared_memory + at, &v, sizeof v);
}
inline float load_shared_float(uint32_t at) { return load_shared<float>(at); }
inline float2 load_shared_floats(uint32_t at) { return load_shared<float2>(at); }
inline void store_shared4(uint32_t at, uint32_t v) { store_shared(at, v); }
inline void store_shared_float(uint32_t at, float v) { store_shared(at, v); }
inline void store_shared_floats(uint32_t at, float x, float y) { store_shared(at, float2{x, y}); }
inline void store_shared8(uint32_t at, uint2 v) {
  store_shared(at, v);
  unfenced[at / 16] = threadIdx.x;
}
inline void store_shared16(uint32_t at, uint4 v) {
  store_shared(at, v);
  unfenced[at / 16] = threadIdx.x;
}
inline uint4 load_matrices(uint32_t at) {
  const Lanes<1> all({at});
  const int lane = threadIdx.x % 32;
  uint32_t v[4];
  for (int m = 0; m < 4; ++m) v[m] = load_shared<uint32_t>(all.of[8 * m + lane / 4][0] + lane % 4 * 4);
  return {v[0], v[1], v[2], v[3]};
}
inline void store_matrices_transposed(uint32_t at, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  // Now and then a warp falls behind the others of its group.
  static uint32_t calls = 0;
  if (threadIdx.x % 32 == 0 && (++calls * 2654435761u >> 16) % 16 == 0) {
    for (int i = 0; i < 30; ++i) emulation::pause();
  }
  const Lanes<4> all({x, y, z, w});
  const int m = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
  uint16_t row[8];
  for (int k = 0; k < 8; ++k) row[k] = half_of(all.of[4 * k + i / 2][m], i % 2);
  uint4 v;
  memcpy(&v, row, 16);
  store_shared16(at, v);
}

// ---- products of a warpgroup
inline uint64_t wgmma_descriptor(uint32_t at) {
  require(at % 1024 == 0, "operand B is not aligned");
  return uint64_t{(at & 0x3ffff) >> 4 | 1u << 16} | uint64_t{1u << 30 | 1024 / 16} << 32;
}
inline uint64_t wgmma_behind(uint64_t descriptor, int bytes) { return descriptor + bytes / 16; }

// A thread's share of a product: two rows of A with 16 values each, and their places in k.
struct Product {
  const uint4* registers;  // of operand A
  uint4 content;
  float* d;
  int columns, depth;
  uint64_t b;
  bool add;
  float a[2][16];
  int k[2][16];

  void run() const {
    require(memcmp(registers, &content, sizeof content) == 0, "operand A has been overwritten");
    const uint32_t start = (b & 0x3fff) << 4, groups = (b >> 32 & 0x3fff) << 4;
    require(b >> 62 == 1 && start + columns / 8 * groups <= 227u << 10, "a descriptor is wrong");
    const int t = threadIdx.x % 4;
    for (int j = 0; j < columns / 8; ++j) {
      for (int e = 0; e < 2; ++e) {
        const uint32_t n = 8 * j + 2 * t + e;
        float row[32];
        for (int k = 0; k < depth; ++k) {
          const uint32_t at = start + n / 8 * groups + n % 8 * 128 + 2 * k, swizzled = at ^ (at >> 7 & 7) << 4;
          row[k] = value_of<__nv_bfloat16>(load_shared<uint16_t>(swizzled));
          if (k % 8 == 0) require(unfenced.empty() || unfenced.count(swizzled / 16) == 0, "operand B needs a fence");
        }
        for (int h = 0; h < 2; ++h) {
          float& out = d[4 * j + 2 * h + e];
          float sum = add ? out : 0.f;
          for (int i = 0; i < 16; ++i) sum += a[h][i] * row[k[h][i]];
          out = sum;
        }
      }
    }
  }
};
struct Products {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
};
inline std::map<unsigned, Products> products;  // of threads

inline void start(const Product& product) {
  late() ? products[threadIdx.x].open.push_back(product) : product.run();
}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  Products& mine = products[threadIdx.x];
  mine.groups.push_back(mine.open);
  mine.open.clear();
}
template <int N>
void wgmma_wait() {
  Products& mine = products[threadIdx.x];
  require(mine.open.empty(), "a product was not committed");
  while (mine.groups.size() > N) {
    for (const Product& product : mine.groups[0]) product.run();
    mine.groups.erase(mine.groups.begin());
  }
}
template <int N>
void wgmma_hold(float (&)[N]) {}

template <int R>
void wgmma(float (&d)[R], const uint4& a, uint64_t b, bool add) {
  const Lanes<4> all({a.x, a.y, a.z, a.w});
  Product product{&a, a, d, 2 * R, 16, b, add};
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < 16; ++i) {
      product.a[h][i] = a_value<__nv_bfloat16>(all, threadIdx.x % 32 / 4 + 8 * h, i), product.k[h][i] = i;
    }
  }
  start(product);
}
template <int kSelector, int R>
void wgmma_sp(float (&d)[R], const uint4& a, uint32_t metadata, uint64_t b, bool add) {
  const Lanes<5> all({a.x, a.y, a.z, a.w, metadata});
  const int g = threadIdx.x % 32 / 4;
  Product product{&a, a, d, 2 * R, 32, b, add};
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < 16; ++i) {
      const int group = i / 2;
      const uint32_t nibble = all.of[4 * g + 2 * kSelector + group / 4][4] >> (16 * h + 4 * (group % 4)) & 15;
      require((nibble & 3) < nibble >> 2, "metadata is not in order");
      product.a[h][i] = a_value<__nv_bfloat16>(all, g + 8 * h, i);
      product.k[h][i] = 4 * group + (nibble >> 2 * (i % 2) & 3);
    }
  }
  start(product);
}

}  // namespace hierasparse
