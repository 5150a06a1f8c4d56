// Runs the prefill kernel of csrc/prefill/sm90 on a CPU, from a copy of csrc in which ptx_on_cpu.h and hopper_on_cpu.h
// stand for the files of csrc/common that they are named after.
// prefill_sm90_on_cpu FOLDER reads FOLDER/numbers and the arrays beside it, and writes FOLDER/out and FOLDER/lse.
#define HS_PTX_ON_CPU
#define __CUDA_ARCH_FEAT_SM90_ALL
#include "cuda_on_cpu.h"

#include "arrays.h"

namespace hierasparse::prefill90 {
alignas(1024) uint8_t memory[227 << 10];
}

#include "prefill/checks.h"
#include "prefill/sm90/kernel.cuh"

using namespace hierasparse;

template <class S>
static void run(const PrefillParams& p) {
  memset(prefill90::memory, 0xff, sizeof prefill90::memory);  // NaN
  emulation::launch(p.tile_count * p.cache.kv_heads * p.splits, S::kThreads,
                    [&] { prefill90::prefill_kernel<S>(prefill90::Arguments(p)); });
  for (const auto& [thread, left] : products) {
    require(left.open.empty() && left.groups.empty(), "a product was never waited for");
  }
}

int main(int, char** arguments) {
  const std::string folder = std::string(arguments[1]) + "/";
  std::ifstream numbers(folder + "numbers");
  int d, sparse_k, sparse_v, sinks, mean;
  int64_t rows;
  PrefillParams p{};
  numbers >> d >> sparse_k >> sparse_v >> sinks >> mean >> p.cache.kv_heads >> p.heads >> p.scale >>
      p.batch.page_table_stride >> p.batch.local_window >> p.batch.own_chunk_dense >> p.cache.page_stride >> p.splits >>
      rows;
  auto pool = read<uint8_t>(folder + "pool");
  const auto tiles = read<PrefillTile>(folder + "tiles");
  const auto pages = read<int32_t>(folder + "pages"), order = read<int32_t>(folder + "order");
  const auto query = read<uint16_t>(folder + "query");
  std::vector<uint16_t> out(p.splits * query.size(), 0xffff);  // NaN
  std::vector<float> lse(p.splits * rows * p.heads, NAN);
  p.batch.page_table = pages.data();
  p.cache.layout = PageLayout{d, 2, sparse_k, sparse_v, sinks, mean != 0};
  p.cache.pages = pool.data(), p.cache.value_axis_token = 1, p.cache.dtype = Dtype::kBfloat16;
  p.tiles = tiles.data(), p.tile_count = tiles.size();
  p.query = query.data(), p.out = out.data(), p.lse = lse.data(), p.k_order = order.data();
  p.query_row_stride = p.out_row_stride = int64_t{p.heads} * d * 2, p.query_head_stride = p.out_head_stride = d * 2;
  p.out_split_stride = rows * p.out_row_stride, p.lse_split_stride = rows * p.heads, p.lse_head_stride = rows;
  shared_memory = prefill90::memory;
  const bool mixed = is_mixed(p.cache.layout);
  using namespace prefill90;
  if (d == 64) {
    mixed ? run<Shape<64, true>>(p) : run<Shape<64, false>>(p);
  } else {
    mixed ? run<Shape<128, true>>(p) : run<Shape<128, false>>(p);
  }
  write(folder + "out", out), write(folder + "lse", lse);
}
