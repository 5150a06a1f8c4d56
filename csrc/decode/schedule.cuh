// How a fixed grid of CTAs shares a batch of any lengths: decided on the device, so that a captured graph can be
// replayed.
//
// A *lane* is one KV head of one request, and one block of its columns (query, head of the group).  Its *items* are the
// 64-token sub-blocks of its pages, then 16-token pieces of its window.  Every item costs about its bytes; all lanes
// lie on one line, request by request, and CTA c takes the c-th of equal parts of the line, cut between items.  A lane
// that falls to several CTAs is merged by the one that finishes last, always in the same order.
//
// Shares of *short* lanes are whole: where all lanes cost about the same and a multiple of their number is near that of
// the CTAs, each lane gets as many shares, no CTA begins a second lane, and merges are fewer or none.  Long lanes gain
// nothing by it, and lose the CTAs that are left over.
#pragma once

#include <climits>

#include "../common/ptx.cuh"
#include "params.h"

namespace hierasparse::decode {

constexpr int kWarps = kSubs;  // consumers; warp w works on sub-block w of every page
constexpr int kPiece = 16;     // window tokens of an item

// In units of 8 * head_size bytes.
constexpr int kPieceCost = 12;  // 8 by its bytes; short rows and a softmax for every 16 tokens make it slower
constexpr int kSparseCost = 9;  // one side of a sub-block
constexpr int kDenseCost = 16;
constexpr int kMostCost = 2 * kDenseCost;  // of any item
constexpr int kLaneCost = 24;              // of a lane's end, behind its items: warps meet, results are stored
// A CTA's least share: two items per warp; and more than one item, so that no CTA between a lane's first and last one
// is left without an item of it: a merge would wait for it.
constexpr int kLeastShare = 64;
static_assert(kLeastShare > kMostCost);
// Lanes are even if they differ by a part in so many, and shares are whole if as few CTAs are left without one.
constexpr int kEven = 16;
constexpr int kShortShare = 1024;  // 14 pages at S = 1; H200: 32 x 512 tokens 33.4 -> 27.5 us, 32 x 32 768 549 -> 557

struct Request {
  int row, queries, first;  // first row of the batch, how many, and the position of the first
  int low, high;            // the borders of the first and of the last query
  int pieces;               // of the window, from `low` on
  int lanes;                // 0: not for this kernel
  __device__ int pages() const { return high / kPageTokens; }
  __device__ int items() const { return kSubs * pages() + pieces; }
};

__device__ __forceinline__ int page_cost(const PageLayout& layout) {
  const int sparse = layout.sparse_k + layout.sparse_v;
  return sparse * kSparseCost + (2 * kSubs - sparse) * kDenseCost;
}

__device__ __forceinline__ Request read_request(const DecodeParams& p, int r, int columns) {
  Request q{};
  const int length = load_kept(p.batch.seq_lens + r);
  q.row = load_kept(p.batch.query_start + r);
  q.queries = load_kept(p.batch.query_start + r + 1) - q.row;
  if (q.queries <= 0 || q.queries > p.max_query_len || length < q.queries) return q;
  q.first = length - q.queries;
  q.low = compressed_below(q.first, p.batch.local_window);
  q.high = p.batch.own_chunk_dense ? q.low : compressed_below(length - 1, p.batch.local_window);
  q.pieces = (length - q.low + kPiece - 1) / kPiece;
  const int rows = q.queries * (p.heads / p.cache.kv_heads);
  q.lanes = p.cache.kv_heads * ((rows + columns - 1) / columns);
  return q;
}

__device__ __forceinline__ int64_t lane_cost(const Request& q, int page) {
  return int64_t{q.pages()} * page + q.pieces * kPieceCost + kLaneCost;
}
// Where item i of a lane begins, and the first item that begins at a place of the lane or behind it.
__device__ __forceinline__ int64_t item_start(const Request& q, int page, int i) {
  const int subs = kSubs * q.pages();
  return i < subs ? int64_t{i} * page / kSubs : int64_t{q.pages()} * page + (i - subs) * kPieceCost;
}
__device__ __forceinline__ int item_from(const Request& q, int page, int64_t place) {
  const int64_t pages = int64_t{q.pages()} * page;
  if (place <= pages) return static_cast<int>((kSubs * place + page - 1) / page);
  const int item = kSubs * q.pages() + static_cast<int>(place - pages + kPieceCost - 1) / kPieceCost;
  return item < q.items() ? item : q.items();
}

// The line's `ctas` shares: `share` each, and one more for the first `rest`.
struct Line {
  int64_t share;
  int rest, ctas;
  int parts;  // > 0: every lane is stretched on the line to so many shares
  __device__ int64_t cut(int c) const { return c * share + (c < rest ? c : rest); }
  // The last CTA that begins at `place` or before it.
  __device__ int owner(int64_t place) const {
    const int64_t wide = rest * (share + 1);
    return static_cast<int>(place < wide ? place / (share + 1) : rest + (place - wide) / share);
  }
};

struct Begin {
  int request;
  int64_t place;  // of the request's first lane
};

// Shares of each of `lanes` lanes, which cost `least` to `most`; 0: they are not even enough.
__device__ __forceinline__ int even_parts(int lanes, int least, int most, int ctas) {
  if (lanes > ctas || most - least > most / kEven) return 0;
  const int fit = ctas / lanes, useful = max(least / kLeastShare, 1);
  if (useful < fit) return useful;
  return ctas - fit * lanes <= ctas / kEven && most <= fit * kShortShare ? fit : 0;
}

// The whole line, and the request in which this CTA begins.  A warp calls it; an empty line has ctas = 0.
__device__ inline Line make_line(const DecodeParams& p, int columns, int cta, Begin& begin) {
  constexpr int kAtOnce = 2;  // requests of a lane, whose loads are under way together
  const int lane = threadIdx.x % 32, page = page_cost(p.cache.layout);
  int64_t cost[kAtOnce], upto[kAtOnce];      // upto: of this request and of all before it
  int lanes = 0, least = INT_MAX, most = 0;  // how many, and what one costs
  auto look = [&](int base, int64_t before, int64_t stretched) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int r = base + 32 * k + lane;
      const Request q = r < p.batch.requests ? read_request(p, r, columns) : Request{};
      const int64_t one = stretched > 0 ? stretched : lane_cost(q, page);
      cost[k] = q.lanes * one;
      if (q.lanes == 0) continue;
      lanes += q.lanes, least = min(least, static_cast<int>(one)), most = max(most, static_cast<int>(one));
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      int64_t x = cost[k];
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int64_t y = __shfl_up_sync(~0u, x, step);
        if (lane >= step) x += y;
      }
      upto[k] = before + x;
      before = __shfl_sync(~0u, upto[k], 31);
    }
    return before;
  };
  int64_t total = 0;
  for (int base = 0; base < p.batch.requests; base += 32 * kAtOnce) total = look(base, total, 0);
  Line line{0, 0, 0, 0};
  if (total == 0) return line;
  lanes = __reduce_add_sync(~0u, lanes), least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
  line.parts = even_parts(lanes, least, most, p.ctas);
  if (line.parts > 0) {
    line.ctas = lanes * line.parts, line.share = most / line.parts;
  } else {
    const int64_t useful = total / kLeastShare;
    line.ctas = useful < 1 ? 1 : useful < p.ctas ? static_cast<int>(useful) : p.ctas;
    line.share = total / line.ctas, line.rest = static_cast<int>(total - line.share * line.ctas);
  }
  if (cta >= line.ctas) return line;
  const int64_t mine = line.cut(cta);
  int64_t before = 0;
  for (int base = 0; base < p.batch.requests; base += 32 * kAtOnce) {
    // Else its values are still here.
    if (line.parts > 0 || p.batch.requests > 32 * kAtOnce) before = look(base, before, line.parts * line.share);
    int found = 0;  // in this lane: 1 + request
    int64_t place = 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (upto[k] - cost[k] <= mine && mine < upto[k]) found = 1 + base + 32 * k + lane, place = upto[k] - cost[k];
    }
    const int request = static_cast<int>(__reduce_max_sync(~0u, static_cast<uint32_t>(found))) - 1;
    if (request < 0) continue;
    begin = {request, __shfl_sync(~0u, place, request % 32)};
    break;
  }
  return line;
}

// What a CTA does next: items first .. end - 1 of a lane.
struct Segment {
  Request request;
  int number;          // of the request
  int kv_head, block;  // the lane; columns 8 * tiles * block and up
  int first, end;      // 0, 0: nothing is left
  int part;            // which of the CTA's two parts the result is, if others have the rest of the lane
  bool whole;          // they have not
  int64_t start;       // of the lane

  // Pages in it, whole or in part.
  __device__ int first_page() const { return min(first, kSubs * request.pages()) / kSubs; }
  __device__ int end_page() const { return (min(end, kSubs * request.pages()) + kSubs - 1) / kSubs; }
};

// CTAs owner .. owner + count - 1 have parts of a lane.
struct Sharers {
  int owner, count;
  int part_of_owner;  // which of its two the owner's part is
};

// A CTA's way along its share of the line.  One thread goes it, in shared memory: its numbers would take registers.
class Walk {
 public:
  __device__ void begin(const DecodeParams& p, const Line& line, const Begin& begin, int cta, int columns) {
    start_ = to_ = 0;
    if (cta >= line.ctas) return;
    line_ = line, from_ = line.cut(cta), to_ = line.cut(cta + 1), columns_ = columns;
    page_ = page_cost(p.cache.layout), number_ = begin.request, request_ = read_request(p, number_, columns);
    cost_ = cost();
    lane_ = static_cast<int>((from_ - begin.place) / cost_);
    start_ = begin.place + lane_ * cost_;
  }

  __device__ void next(const DecodeParams& p, Segment& s) {
    for (s.first = s.end = 0; s.first == s.end && start_ < to_; step(p)) {
      const int items = request_.items();
      s.first = from_ > start_ ? item_at(from_) : 0;
      s.end = to_ >= start_ + cost_ ? items : item_at(to_);
      if (s.first == s.end) continue;  // the share begins behind the start of a lane's last item
      const int blocks = request_.lanes / p.cache.kv_heads;
      s.request = request_, s.number = number_, s.kv_head = lane_ / blocks, s.block = lane_ % blocks;
      s.part = from_ < start_, s.whole = s.first == 0 && s.end == items;
      s.start = start_;
    }
    if (s.first == s.end) s.end = 0;
  }

  // Apart from `next`, since its divisions can wait until the stream runs.
  __device__ Sharers sharers(const Segment& s) const {
    const int owner = line_.owner(s.start);
    if (line_.parts > 0) return {owner, line_.parts, 0};
    const int last = line_.owner(s.start + item_start(s.request, page_, s.request.items() - 1));
    return {owner, last - owner + 1, line_.cut(owner) < s.start};
  }

 private:
  __device__ int64_t cost() const { return line_.parts > 0 ? line_.parts * line_.share : lane_cost(request_, page_); }
  // The first item that begins at a place of the line, which is in the lane, or behind it.
  __device__ int item_at(int64_t place) const {
    const int64_t in_lane = place - start_;
    return item_from(request_, page_, line_.parts > 0 ? in_lane * lane_cost(request_, page_) / cost_ : in_lane);
  }
  __device__ void step(const DecodeParams& p) {
    start_ += cost_;
    if (start_ >= to_ || ++lane_ < request_.lanes) return;
    lane_ = 0;
    do request_ = read_request(p, ++number_, columns_);
    while (request_.lanes == 0);
    cost_ = cost();
  }

  Line line_;
  Request request_;
  int64_t from_, to_, start_, cost_;  // the share; the lane
  int number_, lane_, page_, columns_;
};

}  // namespace hierasparse::decode
