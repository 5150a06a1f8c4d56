// What the planner, a warp of its own, tells the consumers of a segment before they come to it.
#pragma once

#include "../common/ptx.cuh"
#include "schedule.cuh"

namespace hierasparse::decode {

// What a CTA's columns are.
struct Columns {
  int row[16];       // of the batch; -1: no such column
  int head[16];      // query head
  int position[16];  // of the query; -1
  int border[16];    // pages are read below it, the window from it on
};

struct Plan {
  Segment segment;  // end = 0: there is none
  Sharers sharers;
  Columns columns;
  int32_t ids[32];     // of the segment's first pages
  uint32_t words[32];  // their index words
};

// Two of them: one is worked on, the next one is made.  In shared memory.
struct Plans {
  Plan of[2];
  // Phases of "the segment is there", "the queries too", "the consumers are done with it".
  uint64_t segment[2], queries[2], done[2];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared_address(&segment[i]), kWarpArrivals);
      mbarrier_init(shared_address(&queries[i]), kWarpArrivals);
      mbarrier_init(shared_address(&done[i]), kWarps * kWarpArrivals);
    }
  }
  __device__ __forceinline__ Plan& operator[](int n) { return of[n % 2]; }
  __device__ __forceinline__ const Plan& operator[](int n) const { return of[n % 2]; }

  // The whole warp calls these.
  __device__ __forceinline__ static void tell(uint64_t (&barriers)[2], int n) {
    mbarrier_arrive_warp(shared_address(&barriers[n % 2]), thread_index() % 32);
  }
  __device__ __forceinline__ static void wait(const uint64_t (&barriers)[2], int n) {
    mbarrier_wait(shared_address(&barriers[n % 2]), n / 2 % 2);
  }
};

// The head's region of a page.
__device__ __forceinline__ const uint8_t* region(const DecodeParams& p, const Segment& s, int id) {
  return p.cache.pages + id * p.cache.page_stride + s.kv_head * p.head_bytes;
}
// Ids of the segment's pages from `page` on, one a lane.
__device__ __forceinline__ int load_ids(const DecodeParams& p, const Segment& s, int page) {
  const int mine = page + thread_index() % 32;
  return mine < s.end_page() ? load_kept(p.batch.page_table + s.number * p.batch.page_table_stride + mine) : 0;
}
// Their index words, where they can say something new: page 0 may have sinks.
__device__ __forceinline__ uint32_t load_words(const DecodeParams& p, const Segment& s, int ids, int page) {
  const PageLayout& layout = p.cache.layout;
  const bool mixed = layout.sparse_k % kSubs != 0 || layout.sparse_v % kSubs != 0;
  const int mine = page + thread_index() % 32;
  const bool needed = mine < s.end_page() && (mixed || (mine == 0 && layout.sink_tokens > 0));
  return needed ? __ldg(reinterpret_cast<const uint32_t*>(region(p, s, ids))) : 0;
}

// A lane's queries as operand B.
template <int kD, int kTiles>
struct Queries {
  uint4 paged[kTiles * kD / 32 * 32];  // channels in stored order
  uint4 plain[kTiles * kD / 32 * 32];  // ... in the order in which rows.cuh reads plain rows: the model's

  // What `fetch` reads.
  __device__ __forceinline__ static void ahead(const DecodeParams& p, const Segment& s) {
    constexpr int kOrderLines = kD / 32, kLines = kD / 64;  // of 128 bytes: the head's order, a query
    const int lane = thread_index() % 32, group = p.heads / p.cache.kv_heads;
    if (lane < kOrderLines) prefetch(p.k_order + s.kv_head * kD + 32 * lane);
#pragma unroll 1
    for (int i = lane; i < 8 * kTiles * kLines; i += 32) {
      const int column = s.block * 8 * kTiles + i / kLines, query = column / group;
      const uint8_t* from = static_cast<const uint8_t*>(p.query) + (s.request.row + query) * p.query_row_stride +
                            (s.kv_head * group + column % group) * p.query_head_stride + i % kLines * 128;
      if (query < s.request.queries) prefetch(from);
    }
  }
  __device__ __forceinline__ void fetch(const DecodeParams& p, Plan& plan) {
    constexpr int kTurns = kTiles * kD / 32;
    const Segment& s = plan.segment;
    const Request& q = s.request;
    const int lane = thread_index() % 32, group = p.heads / p.cache.kv_heads, first = s.block * 8 * kTiles;
    if (lane < 8 * kTiles) {
      const int query = (first + lane) / group, position = q.first + query;
      const bool real = query < q.queries;
      Columns& columns = plan.columns;
      columns.row[lane] = real ? q.row + query : -1;
      columns.head[lane] = s.kv_head * group + (first + lane) % group;
      columns.position[lane] = real ? position : -1;
      columns.border[lane] = !real                     ? 0
                             : p.batch.own_chunk_dense ? q.low
                                                       : compressed_below(position, p.batch.local_window);
    }
    constexpr int kBatch = kTurns < 4 ? kTurns : 4;  // of loads under way together
#pragma unroll 1
    for (int base = 0; base < kTurns; base += kBatch) {
      uint4 x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        // 16 bytes of a column's query: 8 columns x kD / 8 pieces of each tile.
        const int at = (base + i) * 32 + lane, column = first + at / (kD / 8), piece = at % (kD / 8);
        const int query = column / group;
        const uint8_t* from = static_cast<const uint8_t*>(p.query) + (q.row + query) * p.query_row_stride +
                              (s.kv_head * group + column % group) * p.query_head_stride + piece * 16;
        x[i] = query < q.queries ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = (base + i) * 32 + lane, column = at / (kD / 8), piece = at % (kD / 8);
        plain[(column / 8 * (kD / 32) + piece / 4) * 32 + 4 * (column % 8) + piece % 4] = x[i];
      }
    }
    __syncwarp();
    const uint16_t* values = reinterpret_cast<const uint16_t*>(plain);
    const int g = lane / 4, t = lane % 4;
    const int32_t* order = p.k_order + s.kv_head * kD + 2 * t;
#pragma unroll 2
    for (int i = 0; i < kTurns; ++i) {
      const int n = i / (kD / 32), step = i % (kD / 32);
      auto value = [&](int c) {
        return uint32_t{values[((n * (kD / 32) + c / 32) * 32 + 4 * g + c % 32 / 8) * 8 + c % 8]};
      };
      uint32_t y[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int2 channel = __ldg(reinterpret_cast<const int2*>(order + 32 * step + 8 * r));
        y[r] = value(channel.x) | value(channel.y) << 16;
      }
      paged[i * 32 + lane] = make_uint4(y[0], y[1], y[2], y[3]);
    }
  }
};

}  // namespace hierasparse::decode
