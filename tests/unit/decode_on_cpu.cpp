// Runs the decode kernel of csrc/decode on a CPU, from a copy of csrc in which ptx_on_cpu.h stands for common/ptx.cuh.
// decode_on_cpu FOLDER reads FOLDER/numbers and the arrays beside it, and writes FOLDER/out.
#define HS_PTX_ON_CPU
#include "cuda_on_cpu.h"

#include "arrays.h"

template <typename V>
V __ldcg(const V* from) {
  return *from;
}
inline void __threadfence() {}
namespace hierasparse::decode {
alignas(128) uint8_t memory[256 << 10];
}

#include "common/log2.h"
#include "decode/kernel.cuh"

using namespace hierasparse;

template <typename T, int kD, int kTiles>
static void decode_with(const DecodeParams& p, int stages) {
  if (p.cache.value_axis_token) return decode::decode_kernel<T, kD, true, false, kTiles>(p, stages);
  p.expand_keys ? decode::decode_kernel<T, kD, false, true, kTiles>(p, stages)
                : decode::decode_kernel<T, kD, false, false, kTiles>(p, stages);
}

template <typename T, int kD>
static void run(const DecodeParams& p, int tiles) {
  constexpr int kStages = 3;
  memset(decode::memory, 0xff, sizeof decode::memory);  // NaN
  emulation::launch(p.ctas, decode::kThreads, [&] {
    if constexpr (kD <= 128) {
      if (tiles == 2) return decode_with<T, kD, 2>(p, kStages);
    }
    decode_with<T, kD, 1>(p, kStages);
  });
}

int main(int, char** arguments) {
  const std::string folder = std::string(arguments[1]) + "/";
  std::ifstream numbers(folder + "numbers");
  int d, sparse_k, sparse_v, sinks, mean, bfloat16, rows;
  DecodeParams p{};
  numbers >> d >> sparse_k >> sparse_v >> sinks >> mean >> p.cache.value_axis_token >> bfloat16 >> p.cache.kv_heads >>
      p.heads >> p.scale >> p.batch.requests >> p.batch.page_table_stride >> p.batch.window_block >>
      p.batch.local_window >> p.batch.own_chunk_dense >> p.cache.page_stride >> p.max_query_len >> p.ctas >>
      p.expand_keys >> rows;
  auto pool = read<uint8_t>(folder + "pool");
  const auto starts = read<int32_t>(folder + "starts"), lengths = read<int32_t>(folder + "lengths");
  const auto pages = read<int32_t>(folder + "pages"), window = read<int32_t>(folder + "window");
  const auto order = read<int32_t>(folder + "order");
  const auto query = read<uint16_t>(folder + "query");
  std::vector<uint16_t> out(query.size(), 0xffff);  // NaN
  p.batch.query_start = starts.data(), p.batch.seq_lens = lengths.data(), p.batch.page_table = pages.data();
  p.batch.window_table = window.data(), p.batch.window_table_stride = p.batch.page_table_stride;
  p.cache.layout = PageLayout{d, 2, sparse_k, sparse_v, sinks, mean != 0};
  p.cache.dtype = bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat16;
  p.cache.pages = p.cache.window = pool.data(), p.cache.window_stride = p.cache.page_stride;
  p.query = query.data(), p.out = out.data(), p.k_order = order.data();
  p.query_row_stride = p.out_row_stride = int64_t{p.heads} * d * 2, p.query_head_stride = p.out_head_stride = d * 2;
  std::vector<float> workspace(decode_workspace_floats(d, p.ctas), NAN);
  std::vector<int32_t> counters(p.ctas);
  p.workspace = workspace.data(), p.counters = counters.data();
  p.group = p.heads / p.cache.kv_heads, p.head_bytes = p.cache.layout.head_bytes(), p.scale_log2 = p.scale * kLog2E;
  shared_memory = decode::memory, copies_have_barriers = true;
  const int tiles = decode_columns(d, p.group, p.max_query_len) / 8;
  switch (d) {
    case 64:
      bfloat16 ? run<__nv_bfloat16, 64>(p, tiles) : run<__half, 64>(p, tiles);
      break;
    case 128:
      bfloat16 ? run<__nv_bfloat16, 128>(p, tiles) : run<__half, 128>(p, tiles);
      break;
    default:
      bfloat16 ? run<__nv_bfloat16, 256>(p, tiles) : run<__half, 256>(p, tiles);
  }
  for (const int32_t counter : counters) {
    if (counter != 0) return 3;  // the next launch would wait for parts that are there
  }
  std::ofstream(folder + "out", std::ios::binary).write(reinterpret_cast<const char*>(out.data()), out.size() * 2);
}
