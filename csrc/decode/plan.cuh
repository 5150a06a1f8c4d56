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
  static constexpr int kSteps = kD / 32;  // of a column's operand

  uint4 paged[kTiles * kSteps * 32];  // channels in stored order, or as expand_keys puts them
  uint4 plain[kTiles * kSteps * 32];  // ... in the order in which rows.cuh reads plain rows: the model's
  int32_t order[kD];                  // the model's channel at each place of the stored order

  // A warp says which columns a segment has, and begins to copy their queries.
  __device__ __forceinline__ void begin(const DecodeParams& p, Plan& plan) {
    const Segment& s = plan.segment;
    const Request& q = s.request;
    const int lane = thread_index() % 32;
#pragma unroll 1
    for (int at = 4 * lane; at < kD; at += 4 * 32) {
      copy16_async(shared_address(order + at), p.k_order + s.kv_head * kD + at);
    }
#pragma unroll 1
    for (int n = 0; n < kTiles; ++n) {
      // Lane 8 i + c copies every fourth piece of 16 bytes, from the i-th on, of column c.
      const int column = 8 * n + lane % 8, number = s.block * 8 * kTiles + column;
      const int query = number / p.group, position = q.first + query;
      const int row = q.row + query, head = s.kv_head * p.group + number - query * p.group;
      const bool real = query < q.queries;
      if (lane < 8) {
        Columns& columns = plan.columns;
        columns.row[column] = real ? row : -1;
        columns.head[column] = head;
        columns.position[column] = real ? position : -1;
        columns.border[column] = !real                     ? 0
                                 : p.batch.own_chunk_dense ? q.low
                                                           : compressed_below(position, p.batch.local_window);
      }
      const uint8_t* from =
          static_cast<const uint8_t*>(p.query) + row * p.query_row_stride + head * p.query_head_stride + lane / 8 * 16;
      const uint32_t to = shared_address(plain + n * kSteps * 32 + 4 * (lane % 8) + lane / 8);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) copy16_async_or_zero(to + i * 512, from + i * 64, real);
    }
    commit_copies();
  }

  // It waits for them and makes the other order.
  template <bool kExpand>
  __device__ __forceinline__ void end() {
    wait_copies<0>();
    __syncwarp();
    const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int i = 0; i < kTiles * kSteps; ++i) {
      const uint16_t* row = reinterpret_cast<const uint16_t*>(plain) + i / kSteps * (8 * kD) + 32 * g;
      auto value = [&](int channel) { return uint32_t{row[channel / 32 * 256 + channel % 32]}; };
      uint32_t y[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int place = kExpand ? 16 * (r / 2) + 4 * t + 2 * (r % 2) : 8 * r + 2 * t;
        const int2 channels = *reinterpret_cast<const int2*>(order + i % kSteps * 32 + place);
        y[r] = value(channels.x) | value(channels.y) << 16;
      }
      paged[i * 32 + lane] = make_uint4(y[0], y[1], y[2], y[3]);
    }
  }
};

}  // namespace hierasparse::decode
