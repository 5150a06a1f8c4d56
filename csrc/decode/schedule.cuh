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
  int blocks, lanes;        // 0: not for this kernel
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
  q.blocks = (q.queries * p.group + columns - 1) / columns;
  q.lanes = p.cache.kv_heads * q.blocks;
  return q;
}

__device__ __forceinline__ int lane_cost(const Request& q, int page) {
  return q.pages() * page + q.pieces * kPieceCost + kLaneCost;
}
// Where item i of a lane begins, and the first item that begins at a place of the lane or behind it.
__device__ __forceinline__ int64_t item_start(const Request& q, int page, int i) {
  const int subs = kSubs * q.pages();
  return i < subs ? int64_t{i} * page / kSubs : int64_t{q.pages()} * page + (i - subs) * kPieceCost;
}
__device__ __forceinline__ int item_from(const Request& q, uint32_t page, uint32_t place) {
  const uint32_t pages = q.pages() * page;
  if (place <= pages) return (kSubs * place + page - 1) / page;
  const int item = kSubs * q.pages() + (place - pages + kPieceCost - 1) / kPieceCost;
  return item < q.items() ? item : q.items();
}

// The line's `ctas` shares: `share` each, and one more for the first `rest`.
struct Line {
  int64_t share;
  int rest, ctas;
  int parts;  // > 0: every lane is stretched on the line to so many shares
  // What a lane takes of it that costs so much by itself.
  __device__ int stretched(int cost) const { return parts > 0 ? static_cast<int>(parts * share) : cost; }
  __device__ int64_t cut(int c) const { return c * share + (c < rest ? c : rest); }
  // The last CTA that begins at `place` or before it.
  __device__ int owner(int64_t place) const {
    const int64_t wide = rest * (share + 1);
    return static_cast<int>(place < wide ? place / (share + 1) : rest + (place - wide) / share);
  }
};

// Shares of each of `lanes` lanes, which cost `least` to `most`; 0: they are not even enough.
__device__ __forceinline__ int even_parts(int lanes, int least, int most, int ctas) {
  if (lanes > ctas || most - least > most / kEven) return 0;
  const int fit = ctas / lanes, useful = max(least / kLeastShare, 1);
  if (useful < fit) return useful;
  return ctas - fit * lanes <= ctas / kEven && most <= fit * kShortShare ? fit : 0;
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

// A CTA's way along its share of the line.  Kept in shared memory, since it would take registers.  Nobody has anything
// to do before the first segment is known, and a launch finds its instructions as little in a cache as its data: so
// nothing here is there twice or unrolled, and what can wait is apart from what cannot.
class Walk {
 public:
  // A warp calls it, for a walk that all its lanes see: the line, and where on it this CTA begins.
  __device__ void begin(const DecodeParams& p, int cta, int columns) {
    const int lane = thread_index() % 32, page = page_cost(p.cache.layout);
    int lanes = 0, least = INT_MAX, most = 0;  // how many there are, and what one of them costs
    Request q{};                               // one for each thread,
    int one = 0;                               // what its lanes cost on the line, each,
    int64_t upto = 0;                          // and where they end
    Line line{};
    // All requests are added up; then the one is found in which this CTA begins.
#pragma unroll 1
    for (bool known = false;; known = true) {
      int64_t before = 0;
#pragma unroll 1
      for (int base = 0; base < p.batch.requests; base += 32) {
        if (!known || line.parts > 0 || p.batch.requests > 32) {  // else all that is still here
          q = base + lane < p.batch.requests ? read_request(p, base + lane, columns) : Request{};
          one = lane_cost(q, page);
          if (q.lanes > 0 && !known) lanes += q.lanes, least = min(least, one), most = max(most, one);
          one = line.stretched(one);
          upto = int64_t{q.lanes} * one;
#pragma unroll 1
          for (int step = 1; step < 32; step *= 2) {
            const int64_t y = __shfl_up_sync(~0u, upto, step);
            if (lane >= step) upto += y;
          }
          upto += before;
        }
        before = __shfl_sync(~0u, upto, 31);
        if (!known) continue;
        const int64_t mine = line.cut(cta), start = upto - int64_t{q.lanes} * one;
        const bool here = start <= mine && mine < upto;
        if (here) {
          line_ = line, from_ = mine, to_ = line.cut(cta + 1);
          request_ = q, number_ = base + lane, cost_ = one;
          lane_ = static_cast<int>((mine - start) / one), start_ = start + int64_t{lane_} * one;
        }
        if (__any_sync(~0u, here)) return;
      }
      if (known || before == 0) break;
      lanes = __reduce_add_sync(~0u, lanes), least = __reduce_min_sync(~0u, least);
      most = __reduce_max_sync(~0u, most);
      line.parts = even_parts(lanes, least, most, p.ctas);
      if (line.parts > 0) {
        line.ctas = lanes * line.parts, line.share = most / line.parts;
      } else {
        const int64_t useful = before / kLeastShare;
        line.ctas = useful < 1 ? 1 : useful < p.ctas ? static_cast<int>(useful) : p.ctas;
        line.share = before / line.ctas, line.rest = static_cast<int>(before - line.share * line.ctas);
      }
      if (cta >= line.ctas) break;
    }
    if (lane == 0) start_ = to_ = 0;
  }

  // One thread goes on.
  __device__ void next(const DecodeParams& p, int columns, Segment& s) {
    const int page = page_cost(p.cache.layout);
#pragma unroll 1
    for (s.end = 0; start_ < to_ && s.end == 0; start_ += cost_, ++lane_) {
      if (lane_ == request_.lanes) {
        do request_ = read_request(p, ++number_, columns);
        while (request_.lanes == 0);
        lane_ = 0, cost_ = line_.stretched(lane_cost(request_, page));
      }
      int first = 0, end = 0;
#pragma unroll 1
      for (int64_t place = from_;; place = to_) {
        first = end, end = item_at(page, place);
        if (place == to_) break;
      }
      if (first == end) continue;  // the share begins behind the start of a lane's last item
      s.request = request_, s.number = number_;
      s.kv_head = lane_ / request_.blocks, s.block = lane_ - s.kv_head * request_.blocks;
      s.first = first, s.end = end;
      s.part = from_ < start_, s.whole = first == 0 && end == request_.items();
      s.start = start_;
    }
  }

  // Asked for when the stream runs: its divisions are long.
  __device__ Sharers sharers(const DecodeParams& p, const Segment& s) const {
    const int owner = line_.owner(s.start);
    if (line_.parts > 0) return {owner, line_.parts, 0};
    const int64_t last_item = item_start(s.request, page_cost(p.cache.layout), s.request.items() - 1);
    return {owner, line_.owner(s.start + last_item) - owner + 1, line_.cut(owner) < s.start};
  }

 private:
  // The first item of the lane that begins at a place of the line or behind it.
  __device__ int item_at(int page, int64_t place) const {
    if (place <= start_) return 0;
    if (place >= start_ + cost_) return request_.items();
    int in_lane = static_cast<int>(place - start_);
    if (line_.parts > 0) {  // whole shares: as many of the lane before it is stretched
      in_lane = in_lane / static_cast<int>(line_.share) * lane_cost(request_, page) / line_.parts;
    }
    return item_from(request_, page, in_lane);
  }

  Line line_;
  Request request_;
  int64_t from_, to_, start_;  // the share; the lane
  int cost_, number_, lane_;   // what the lane costs; request; lane of it
};

}  // namespace hierasparse::decode
