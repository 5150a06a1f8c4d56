// How a fixed grid of CTAs shares a batch of any lengths: decided on the device, so that a captured graph can be
// replayed.
//
// A *lane* is one KV head of one request, and one block of its columns (query, head of the group).  Its *items* are the
// 64-token sub-blocks of its pages, then 16-token pieces of its window.  Every item costs about its bytes; all lanes
// lie on one line, request by request, and CTA c takes the c-th of equal parts of the line, cut between items.  A lane
// that falls to several CTAs is merged by the one that finishes last, always in the same order.
#pragma once

#include "params.h"

namespace hierasparse::decode {

constexpr int kWarps = kSubs;  // warp w works on sub-block w of every page
constexpr int kThreads = 32 * kWarps;
constexpr int kPiece = 16;  // window tokens of an item

// In units of 8 * head_size bytes.
constexpr int kPieceCost = 12;  // 8 by its bytes; short rows and a softmax for every 16 tokens make it slower
constexpr int kSparseCost = 9;  // one side of a sub-block
constexpr int kDenseCost = 16;
constexpr int kMostCost = 2 * kDenseCost;  // of any item
// A CTA's least share: two items per warp; and more than one item, so that every CTA gets at least one.
constexpr int kLeastShare = 64;
static_assert(kLeastShare > kMostCost, "or a CTA could be left without an item, and a merge would wait for it");

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
  const int length = p.batch.seq_lens[r];
  q.row = p.batch.query_start[r];
  q.queries = p.batch.query_start[r + 1] - q.row;
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
  return int64_t{q.pages()} * page + int64_t{q.pieces} * kPieceCost;
}
// Where item i of a lane begins, and the item in which a place of the lane lies.
__device__ __forceinline__ int64_t item_start(const Request& q, int page, int i) {
  const int subs = kSubs * q.pages();
  return i < subs ? int64_t{i} * page / kSubs : int64_t{q.pages()} * page + int64_t{i - subs} * kPieceCost;
}
__device__ __forceinline__ int item_at(const Request& q, int page, int64_t place) {
  const int64_t pages = int64_t{q.pages()} * page;
  if (place < pages) return static_cast<int>((kSubs * place + kSubs - 1) / page);
  return kSubs * q.pages() + static_cast<int>((place - pages) / kPieceCost);
}

struct Line {
  int64_t total;  // cost of everything
  int ctas;       // that share it
  __device__ int64_t cut(int c) const { return total * c / ctas; }
  // The last CTA that begins before `place`.
  __device__ int owner(int64_t place) const { return static_cast<int>((place * ctas + total - 1) / total) - 1; }
};

struct Begin {
  int request;
  int64_t place;  // of the request's first lane
};

// The whole line, and the request in which this CTA begins.  All threads call it; 0 requests or an empty line gives
// ctas = 0.
__device__ inline Line make_line(const DecodeParams& p, int columns, int cta, Begin& begin) {
  __shared__ int64_t sums[kWarps];
  __shared__ Begin found;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int page = page_cost(p.cache.layout);
  auto cost_of = [&](int r) -> int64_t {
    if (r >= p.batch.requests) return 0;
    const Request q = read_request(p, r, columns);
    return q.lanes ? q.lanes * lane_cost(q, page) : 0;
  };
  // Inclusive sums over the next kThreads requests.
  auto scan = [&](int64_t x, int64_t& all) {
    for (int step = 1; step < 32; step *= 2) {
      const int64_t y = __shfl_up_sync(~0u, x, step);
      if (lane >= step) x += y;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = x;
    __syncthreads();
    all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) x += sums[w];
      all += sums[w];
    }
    return x;
  };
  Line line{0, 0};
  int64_t cost = 0, upto = 0, all = 0;
  for (int base = 0; base < p.batch.requests; base += kThreads) {
    cost = cost_of(base + threadIdx.x);
    upto = scan(cost, all);
    line.total += all;
  }
  if (line.total == 0) return line;
  const int64_t most = line.total / kLeastShare;
  line.ctas = most < 1 ? 1 : most < p.ctas ? static_cast<int>(most) : p.ctas;
  if (cta >= line.ctas) return line;
  const int64_t mine = line.cut(cta);
  int64_t before = 0;
  for (int base = 0; base < p.batch.requests; base += kThreads) {
    if (p.batch.requests > kThreads) {  // else the first loop's values are still here
      cost = cost_of(base + threadIdx.x);
      upto = scan(cost, all);
    }
    if (cost > 0 && before + upto - cost <= mine && mine < before + upto) {
      found = Begin{base + static_cast<int>(threadIdx.x), before + upto - cost};
    }
    before += all;
  }
  __syncthreads();
  begin = found;
  return line;
}

// What a CTA does next: items first .. end - 1 of a lane.
struct Segment {
  Request request;
  int number;           // of the request
  int kv_head, block;   // the lane; columns 8 * tiles * block and up
  int first, end;       // 0, 0: nothing is left
  int part;             // which of the CTA's two parts the result is, if others have the rest of the lane
  bool whole;           // they have not
  int64_t start, cost;  // of the lane
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
    line_ = line, from_ = line.cut(cta), to_ = line.cut(cta + 1), columns_ = columns, part_ = 0;
    page_ = page_cost(p.cache.layout), number_ = begin.request, request_ = read_request(p, number_, columns);
    cost_ = lane_cost(request_, page_);
    lane_ = static_cast<int>((from_ - begin.place) / cost_);
    start_ = begin.place + lane_ * cost_;
  }

  __device__ void next(const DecodeParams& p, Segment& s) {
    for (s.first = s.end = 0; s.first == s.end && start_ < to_; step(p)) {
      const int items = request_.items();
      s.first = from_ > start_ ? item_at(request_, page_, from_ - start_) : 0;
      s.end = to_ >= start_ + cost_ ? items : item_at(request_, page_, to_ - start_);
      if (s.first == s.end) continue;  // the share begins within a lane's last item, or ends within its first
      const int blocks = request_.lanes / p.cache.kv_heads;
      s.request = request_, s.number = number_, s.kv_head = lane_ / blocks, s.block = lane_ % blocks;
      s.part = part_, part_ = 1, s.whole = s.first == 0 && s.end == items;
      s.start = start_, s.cost = cost_;
    }
    if (s.first == s.end) s.end = 0;
  }

  // Apart from `next`, since its divisions can wait until the stream runs.
  __device__ Sharers sharers(const Segment& s) const {
    const int owner = line_.owner(s.start + item_start(s.request, page_, 1));
    return {owner, line_.owner(s.start + s.cost) - owner + 1, line_.cut(owner) < s.start};
  }

 private:
  __device__ void step(const DecodeParams& p) {
    start_ += cost_;
    if (start_ >= to_ || ++lane_ < request_.lanes) return;
    lane_ = 0;
    do request_ = read_request(p, ++number_, columns_);
    while (request_.lanes == 0);
    cost_ = lane_cost(request_, page_);
  }

  Line line_;
  Request request_;
  int64_t from_, to_, start_, cost_;  // the share; the lane
  int number_, lane_, page_, columns_, part_;
};

}  // namespace hierasparse::decode
