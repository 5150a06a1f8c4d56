// Runs the expand kernel of csrc/expand on a CPU: a thread of the machine for each thread of a CTA.
// expand_kernel FOLDER D H SPARSE_K SPARSE_V SINKS MEAN TOKEN_AXIS BFLOAT16 BLOCKS COUNT WINDOW_BLOCKS WINDOW_COUNT
// reads FOLDER/pool, ids, order, window, blocks and tokens, and writes FOLDER/k and v.
#include "threads_on_cpu.h"

constexpr int kCta = 128;
static std::barrier<> cta(kCta);
static uint32_t exchanged[kCta];

static void __syncthreads() { cta.arrive_and_wait(); }
static uint32_t __shfl_sync(unsigned, uint32_t value, int source) {
  exchanged[threadIdx.x] = value;
  __syncwarp();
  const uint32_t got = exchanged[threadIdx.x / 32 * 32 + source];
  __syncwarp();
  return got;
}
template <typename T>
static T __ldcs(const T* from) {
  return *from;
}
static uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t both = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> 8 * (selectors >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
static float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

#include "../../csrc/expand/kernel.cuh"

using namespace hierasparse;

template <typename T>
static void run(const ExpandParams& p) {
  switch (p.cache.layout.head_size) {
    case 64: return expand::expand_pages<T, 64>(p);
    case 128: return expand::expand_pages<T, 128>(p);
    default: return expand::expand_pages<T, 256>(p);
  }
}

int main(int, char** args) {
  const std::string folder = std::string(args[1]) + "/";
  int n[12];
  for (int i = 2; i < 14; ++i) n[i - 2] = std::atoi(args[i]);
  constexpr int kWindowBlock = 128;
  const int d = n[0], heads = n[1], count = n[9], block_count = n[11];
  const PageLayout layout{d, 2, n[2], n[3], n[4], n[5] != 0};
  std::vector<char> pool = read(folder + "pool"), ids = read(folder + "ids"), order = read(folder + "order");
  std::vector<char> window = read(folder + "window"), blocks = read(folder + "blocks"), tokens = read(folder + "tokens");
  std::vector<char> k(size_t{2} * (count * kPageTokens + block_count * kWindowBlock) * heads * d), v(k.size());
  ExpandParams p{};
  p.cache.pages = reinterpret_cast<uint8_t*>(pool.data());
  p.cache.page_stride = static_cast<int64_t>(pool.size() / n[8]);
  p.cache.kv_heads = heads;
  p.cache.value_axis_token = n[6];
  p.cache.layout = layout;
  p.pages = reinterpret_cast<const int32_t*>(ids.data());
  p.count = count;
  p.cache.window = reinterpret_cast<uint8_t*>(window.data());
  p.cache.window_stride = static_cast<int64_t>(window.size() / n[10]);
  p.blocks = reinterpret_cast<const int32_t*>(blocks.data());
  p.tokens = reinterpret_cast<const int32_t*>(tokens.data());
  p.block_count = block_count;
  p.window_block = kWindowBlock;
  p.k = k.data();
  p.v = v.data();
  p.head_stride = 2 * d;
  p.token_stride = p.head_stride * heads;
  p.page_stride = p.token_stride * kPageTokens;
  p.k_order = reinterpret_cast<const int32_t*>(order.data());
  run_threads(kCta, [&] {
    for (int block = 0; block < heads * (count * expand::kParts + block_count * kWindowBlock / kSubTokens); ++block) {
      blockIdx.x = block;
      __syncthreads();  // the last block's shared memory is no longer read
      n[7] ? run<__nv_bfloat16>(p) : run<__half>(p);
    }
  });
  write(folder + "k", k);
  write(folder + "v", v);
}
