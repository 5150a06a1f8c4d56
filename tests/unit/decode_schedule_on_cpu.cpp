// Prints how csrc/decode/schedule.cuh shares a batch: a line for each segment of each CTA.
// Reads: columns, ctas, heads, kv_heads, local_window, own_chunk_dense, sparse_k, sparse_v, max_query_len, requests,
// and for each request its tokens and queries.
#define HS_PTX_ON_CPU
#include <cstdio>
#include <iostream>

#include "cuda_on_cpu.h"
#include "decode/schedule.cuh"

using namespace hierasparse;
using namespace hierasparse::decode;

int main() {
  int columns, sparse_k, sparse_v, requests;
  DecodeParams p{};
  std::cin >> columns >> p.ctas >> p.heads >> p.cache.kv_heads >> p.batch.local_window >> p.batch.own_chunk_dense >>
      sparse_k >> sparse_v >> p.max_query_len >> requests;
  std::vector<int32_t> lengths(requests), starts(requests + 1);
  for (int r = 0; r < requests; ++r) {
    int queries;
    std::cin >> lengths[r] >> queries;
    starts[r + 1] = starts[r] + queries;
  }
  p.group = p.heads / p.cache.kv_heads;
  p.batch.seq_lens = lengths.data(), p.batch.query_start = starts.data(), p.batch.requests = requests;
  p.cache.layout = PageLayout{128, 2, sparse_k, sparse_v, 1, true};
  static Walk walk;
  emulation::launch(p.ctas, 32, [&] {
    const int cta = blockIdx.x;
    walk.begin(p, cta, columns);
    __syncwarp();
    if (threadIdx.x != 0) return;
    for (Segment s;;) {
      walk.next(p, columns, s);
      if (s.end == 0) return;
      const Sharers sharers = s.whole ? Sharers{cta, 1, s.part} : walk.sharers(p, s);
      std::printf("%d %d %d %d %d %d %d %d %d %d %d\n", cta, s.number, s.kv_head, s.block, s.first, s.end, s.part,
                  s.whole, sharers.owner, sharers.count, sharers.part_of_owner);
    }
  });
}
