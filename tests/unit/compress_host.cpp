// csrc/compress for the host, as a library for compress_host.py: its arithmetic, and the kernel itself on the CPU.
#include "cuda_on_cpu.h"

#include <cstdlib>

inline bool __all_sync(unsigned, bool mine) {
  return emulation::reduce(mine, [](uint32_t a, uint32_t b) { return a & b; }) != 0;
}
inline void __stcg(uint4* to, uint4 x) { *to = x; }

// Two 16-bit numbers at a time.
template <typename N, class Op>
uint32_t by_halves(uint32_t a, uint32_t b, Op op) {
  auto one = [&](int shift) {
    const N x = static_cast<N>(a >> shift), y = static_cast<N>(b >> shift);
    return uint32_t{static_cast<uint16_t>(op(x, y) ? x : y)} << shift;
  };
  return one(0) | one(16);
}
inline uint32_t __vminu2(uint32_t a, uint32_t b) { return by_halves<uint16_t>(a, b, std::less<>{}); }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) { return by_halves<uint16_t>(a, b, std::greater<>{}); }
inline uint32_t __vmaxs2(uint32_t a, uint32_t b) { return by_halves<int16_t>(a, b, std::greater<>{}); }

namespace hierasparse {
inline int thread_index() { return threadIdx.x; }
constexpr bool kFindAnew = false;
template <int kSelect>  // 8 in a nibble: the byte's sign, eight times
uint32_t permute(uint32_t a, uint32_t b) {
  const uint64_t both = a | uint64_t{b} << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = kSelect >> 4 * i & 15, byte = both >> 8 * (select & 7) & 255;
    out |= (select & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}
}  // namespace hierasparse

#include "../../csrc/compress/kernel.cuh"

namespace hierasparse::compress {
alignas(1024) uint8_t memory[256 << 10];  // the shared memory of the block that runs
}

using namespace hierasparse;
using namespace hierasparse::compress;

namespace {

template <class S>
void run(const StoreCompressParams& p, int blocks, bool units_store) {
  static_assert(sizeof(Shared<S>) <= sizeof memory);
  for (size_t i = 0; i < sizeof memory; ++i) memory[i] = 0xff;
  emulation::launch(blocks, S::kThreads, [&] { store_compress_kernel<S>(p, units_store); });
}

template <typename T>
void with_dtype(const StoreCompressParams& p, int blocks, int tile, bool store) {
  switch (p.cache.layout.head_size) {
    case 64: return run<Shape<T, 64, 256>>(p, blocks, store);
    case 128: return run<Shape<T, 128, 256>>(p, blocks, store);
    default: return tile == 256 ? run<Shape<T, 256, 256>>(p, blocks, store) : run<Shape<T, 256, 64>>(p, blocks, store);
  }
}

}  // namespace

extern "C" {

void store_compress(const StoreCompressParams* p, int blocks, int tile, int units_store) {
  const auto run = p->cache.dtype == Dtype::kFloat16 ? with_dtype<__half> : with_dtype<__nv_bfloat16>;
  run(*p, blocks, tile, units_store != 0);
}

int params_bytes() { return sizeof(StoreCompressParams); }
int shared_bytes(int head_size, int tile) {
  using T = __half;
  return head_size == 64    ? sizeof(Shared<Shape<T, 64, 256>>)
         : head_size == 128 ? sizeof(Shared<Shape<T, 128, 256>>)
         : tile == 256      ? sizeof(Shared<Shape<T, 256, 256>>)
                            : sizeof(Shared<Shape<T, 256, 64>>);
}

// ---- arithmetic, number by number
void choose_codes(const float* scores, int n, uint8_t* codes, float* kept, float* dropped) {
  for (int i = 0; i < n; ++i) {
    const float s[4] = {scores[4 * i], scores[4 * i + 1], scores[4 * i + 2], scores[4 * i + 3]};
    const Chosen c = choose(s, s);
    codes[i] = static_cast<uint8_t>(c.code);
    for (int e = 0; e < 2; ++e) kept[2 * i + e] = c.kept[e], dropped[2 * i + e] = c.dropped[e];
  }
}
void score_all(const float* values, const float* weights, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = score(values[i], weights[i]);
}
void loss_all(const float* dropped, float top, int n, uint32_t* out) {
  const LossUnit unit = loss_unit(top);
  for (int i = 0; i < n; ++i) out[i] = loss(dropped[i], unit);
}
uint32_t choose_sparse(const uint32_t* losses, int sparse) {
  const uint32_t all[kSubs] = {losses[0], losses[1], losses[2], losses[3]};
  return sparse_mask(all, sparse);
}
// Tokens of `groups` groups of four scores: 16, 32 or 64.
void norm_factors(const float* scores, int n, int groups, float* out) {
  for (int i = 0; i < n; ++i) {
    float whole[64], kept[64];
    for (int j = 0; j < groups; ++j) {
      const float* x = scores + (i * groups + j) * 4;
      const float s[4] = {x[0], x[1], x[2], x[3]};
      whole[j] = sum_of_squares(s), kept[j] = kept_squares(choose(s, s));
    }
    auto sum = [&](const float* x) {
      return groups == 16 ? tree_sum<16>(x) : groups == 32 ? tree_sum<32>(x) : tree_sum<64>(x);
    };
    out[i] = norm_factor(sum(whole), sum(kept));
  }
}
void sum_factors(const float* values, const float* kept, int n, float* out) {
  for (int i = 0; i < n; ++i) {
    const float v[4] = {values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]};
    out[i] = sum_factor(v, kept[2 * i], kept[2 * i + 1]);
  }
}
void correct_all(const float* values, const float* factors, const float* means, int n, int has_mean, int half,
                 float* out) {
  const Room room = half ? Shape<__half, 64, 256>::room(has_mean) : Shape<__nv_bfloat16, 64, 256>::room(has_mean);
  for (int i = 0; i < n; ++i) out[i] = corrected(values[i], factors[i], means[i], room);
}
void means_of(const float* tokens, int channels, float* out) {  // [channels, 256]
  for (int c = 0; c < channels; ++c) out[c] = mean_of_sum(tree_sum<256>(tokens + 256 * c));
}

}  // extern "C"
