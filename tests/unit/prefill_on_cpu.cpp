// Runs the portable prefill kernel of csrc/prefill on a CPU, from a copy of csrc in which ptx_on_cpu.h stands for
// common/ptx.cuh.  prefill_on_cpu FOLDER reads FOLDER/numbers and the arrays beside it, and writes FOLDER/out and lse.
#define HS_PTX_ON_CPU
#include "cuda_on_cpu.h"

#include "arrays.h"

namespace hierasparse::prefill_sm80 {
alignas(1024) uint8_t memory[227 << 10];
}

#include "prefill/checks.h"
#include "prefill/sm80/kernel.cuh"

using namespace hierasparse;
using prefill_sm80::Arguments;

template <typename T, int kD>
static void run(const PrefillParams& p, int pairs) {
  const int room = sizeof prefill_sm80::memory - prefill_sm80::Shared<kD, prefill_sm80::tiles_of(kD)>::bytes();
  const Arguments a(p, min(room, pairs * Arguments(p, room).pair_bytes));
  memset(prefill_sm80::memory, 0xff, sizeof prefill_sm80::memory);  // NaN
  emulation::launch(p.tile_count * p.cache.kv_heads * p.splits, prefill_sm80::kThreads, [&] {
    const bool mixed = is_mixed(p.cache.layout);
    if (p.cache.value_axis_token) {
      mixed ? prefill_sm80::prefill_kernel<T, kD, true, true>(a) : prefill_sm80::prefill_kernel<T, kD, true, false>(a);
    } else {
      mixed ? prefill_sm80::prefill_kernel<T, kD, false, true>(a)
            : prefill_sm80::prefill_kernel<T, kD, false, false>(a);
    }
  });
}

int main(int, char** arguments) {
  const std::string folder = std::string(arguments[1]) + "/";
  std::ifstream numbers(folder + "numbers");
  int d, sparse_k, sparse_v, sinks, mean, bfloat16, rows, pairs;
  PrefillParams p{};
  numbers >> d >> sparse_k >> sparse_v >> sinks >> mean >> p.cache.value_axis_token >> bfloat16 >> p.cache.kv_heads >>
      p.heads >> p.scale >> p.batch.page_table_stride >> p.batch.local_window >> p.batch.own_chunk_dense >>
      p.cache.page_stride >> rows >> p.splits >> pairs;
  auto pool = read<uint8_t>(folder + "pool");
  const auto pages = read<int32_t>(folder + "pages"), order = read<int32_t>(folder + "order");
  const auto tiles = read<int32_t>(folder + "tiles");
  const auto query = read<uint16_t>(folder + "query");
  std::vector<uint16_t> out(query.size() * p.splits, 0xffff);  // NaN
  std::vector<float> lse(int64_t{p.splits} * rows * p.heads, NAN);
  p.tiles = reinterpret_cast<const PrefillTile*>(tiles.data()), p.tile_count = tiles.size() / 5;
  p.batch.page_table = pages.data();
  p.cache.layout = PageLayout{d, 2, sparse_k, sparse_v, sinks, mean != 0};
  p.cache.pages = pool.data();
  p.query = query.data(), p.out = out.data(), p.lse = lse.data(), p.k_order = order.data();
  p.query_row_stride = p.out_row_stride = int64_t{p.heads} * d * 2, p.query_head_stride = p.out_head_stride = d * 2;
  p.out_split_stride = rows * p.out_row_stride;
  p.lse_head_stride = rows, p.lse_split_stride = int64_t{rows} * p.heads;
  shared_memory = prefill_sm80::memory, copies_have_barriers = true;
  switch (d) {
    case 64:
      bfloat16 ? run<__nv_bfloat16, 64>(p, pairs) : run<__half, 64>(p, pairs);
      break;
    case 128:
      bfloat16 ? run<__nv_bfloat16, 128>(p, pairs) : run<__half, 128>(p, pairs);
      break;
    default:
      bfloat16 ? run<__nv_bfloat16, 256>(p, pairs) : run<__half, 256>(p, pairs);
  }
  write(folder + "out", out), write(folder + "lse", lse);
}
