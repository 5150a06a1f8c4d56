// The ring in shared memory through which all warps of a CTA read the sub-blocks of their pages.
//
// A stage has one side (K or V) of a sub-block.  Copies of 16 bytes arrive on its barrier `full` as they land; every
// warp arrives on `empty` when it has read it.  Warp w copies sub-blocks w, w + 8 and so on, so that finding out where
// they lie costs each warp little.
#pragma once

#include "../../common/sub_block.cuh"
#include "columns.cuh"

namespace hierasparse::prefill_sm80 {

constexpr int kFragment = 512;  // bytes of an operand-A fragment of a warp
constexpr int kFullCount = 33;  // the lanes, as their copies land, and the one that tells the kind
constexpr int kMeanPages = 8;   // whose means are one operand A
constexpr int kMeanEvery = kMeanPages * kSubs;

// What `kinds` says of a stage.
enum : uint32_t {
  kSparse = 1,
  kSinks = 2,  // the first tokens are read from the sink rows
  kEdge = 4,   // some column does not read it
};

// Shared memory, before the ring.
template <int kD, int kTiles>
struct Shared {
  uint64_t full[2][kMaxPairs], empty[2][kMaxPairs];  // of K, of V
  uint64_t means_full;
  uint32_t kinds[2][kMaxPairs];
  // What a warp rarely reads lies here, since registers run short.
  const int32_t* table;  // of the request's pages
  int64_t head;          // bytes from a page to the head's region
  int begin, end;        // pages
  int edge;              // pages from it on are hidden from some column
  alignas(16) uint8_t means[kMeanPages][2 * kD];
  struct alignas(16) {
    float mean[kMeanPages + 1][8 * kTiles];  // scale_log2 * q . mean of each page; the last row is zeros
    float top[8 * kTiles];                   // State::top
    int border[8 * kTiles];
    // Of the warp's next sub-block: the page's id and index word, and the id of the page behind.
    int id, next_id;
    uint32_t word;
  } own[kWarps];
  static constexpr int bytes() { return (sizeof(Shared) + 511) / 512 * 512; }
};

// Where the warp is in the ring.
struct Stage {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ Stage ahead(int n, int pairs) const {
    const bool wraps = at + n >= pairs;
    return {wraps ? at + n - pairs : at + n, parity ^ wraps};
  }
};

// One warp's copies.  What they need lies in shared memory and gets there by copies too, started long before.
template <int kD, int kTiles>
class Copier {
 public:
  __device__ __forceinline__ Copier(const Arguments& a, Shared<kD, kTiles>& shared)
      : a_(a), shared_(shared), warp_(thread_index() / 32) {}

  // What is there before the first sub-block is read.
  __device__ __forceinline__ void begin() {
    auto& own = shared_.own[warp_];
    if (thread_index() % 32 == 0) {
      const int page = shared_.begin + warp_ / kSubs;
      own.id = __ldg(entry(page)), own.next_id = __ldg(entry(page + kStep));
      own.word = __ldg(reinterpret_cast<const uint32_t*>(region(own.id)));
    }
    __syncwarp();
    for (int side = 0; side < 2; ++side) {
      if (warp_ < ahead(side)) copy(side, warp_, {warp_, 0});
    }
    if (warp_ < a_.values_ahead) advance(warp_);
    if (warp_ == kWarps - 1 && a_.params.cache.layout.key_mean) copy_means(shared_.begin);
  }
  // Whether the warp copies K while sub-block i is in use; and V, with two stages and more.
  __device__ __forceinline__ bool turn(int i) const {
    return (static_cast<unsigned>(i) + a_.keys_ahead) % kWarps == static_cast<unsigned>(warp_);
  }
  // What the warp copies of K (side 0) and V (1) while sub-block i, in `stage`, is in use.
  __device__ __forceinline__ void serve(int i, const Stage& stage, int side, int end) {
#pragma unroll 1
    for (; side < end; ++side) {
      const int n = ahead(side);
      if (static_cast<unsigned>(i + n) % kWarps != static_cast<unsigned>(warp_)) continue;
      wait_copies<0>();  // of what advance() began
      __syncwarp();
      copy(side, i + n, stage.ahead(n, a_.pairs));
      if (side == 1) advance(i + n);
    }
  }
  // In each turn: the means of the next pages, if the warp is the one to copy them.  That is half a batch after those
  // of this one were last read, and no warp is so far behind.
  __device__ __forceinline__ void serve_means(int i) {
    const bool half = i % kMeanEvery / kWarps == kMeanEvery / 2 / kWarps;  // it has one turn in it
    if (half && i / kMeanEvery % kWarps == warp_ && a_.params.cache.layout.key_mean) {
      copy_means(shared_.begin + (i / kMeanEvery + 1) * kMeanPages);
    }
  }

 private:
  static constexpr int kStep = kWarps / kSubs;  // pages from a warp's sub-block to its next

  __device__ __forceinline__ const uint8_t* region(int id) const {
    return a_.params.cache.pages + id * a_.params.cache.page_stride + shared_.head;
  }
  __device__ __forceinline__ const int32_t* entry(int page) const { return shared_.table + min(page, shared_.end - 1); }
  __device__ __forceinline__ int ahead(int side) const { return side == 0 ? a_.keys_ahead : a_.values_ahead; }
  // Behind the warp's sub-block i.
  __device__ __forceinline__ void advance(int i) {
    auto& own = shared_.own[warp_];
    __syncwarp();
    if (thread_index() % 32 == 0) {
      own.id = own.next_id;
      copy4_async(shared_address(&own.word), region(own.next_id));
      copy4_async(shared_address(&own.next_id), entry(shared_.begin + i / kSubs + 2 * kStep));
      commit_copies();  // or nothing waits for them
    }
  }

  // K (0) or V (1) of the warp's sub-block i.
  __device__ __forceinline__ void copy(int side, int i, const Stage& stage) {
    const int page = shared_.begin + i / kSubs;
    if (page >= shared_.end) return;
    const uint32_t word = shared_.own[warp_].word;
    constexpr PageLayout kSizes{kD, 2, 0, 0, 0, false};
    const PageLayout& layout = a_.params.cache.layout;
    const int lane = thread_index() % 32, sub = warp_ % kSubs;
    const uint32_t mask = side == 0 ? layout.k_mask(word) : layout.v_mask(word);
    const bool sparse = mask >> sub & 1;
    const int offset = (side == 0 ? a_.k_offset : a_.v_offset) +
                       sub_block_offset<kD>(mask, side == 0 ? layout.sparse_k : layout.sparse_v, sub);
    const uint8_t* from = region(shared_.own[warp_].id) + offset + lane * 16;
    const uint32_t to = shared_address(&shared_) + Shared<kD, kTiles>::bytes() + stage.at * a_.pair_bytes +
                        (side == 0 ? 0 : a_.key_bytes) + lane * 16;
    mbarrier_wait(shared_address(&shared_.empty[side][stage.at]), stage.parity ^ 1);
    constexpr int kLeast = kSizes.sparse_bytes() / kFragment, kMost = kSizes.dense_bytes() / kFragment;
#pragma unroll
    for (int f = 0; f < kLeast; ++f) copy16_async(to + f * kFragment, from + f * kFragment);
    if (!sparse) {
#pragma unroll
      for (int f = kLeast; f < kMost; ++f) copy16_async(to + f * kFragment, from + f * kFragment);
    }
    const uint32_t full = shared_address(&shared_.full[side][stage.at]);
    mbarrier_arrive_copies(full);
    if (lane == 0) {
      const bool sinks = sub == 0 && PageLayout::has_sinks(word), edge = page >= shared_.edge;
      shared_.kinds[side][stage.at] = (sparse ? kSparse : 0) | (sinks ? kSinks : 0) | (edge ? kEdge : 0);
      mbarrier_arrive(full);
    }
  }

  __device__ __forceinline__ void copy_means(int first) {
    if (first >= shared_.end) return;
    constexpr int kPieces = kD / 8;  // of a mean
    for (int i = thread_index() % 32; i < kMeanPages * kPieces; i += 32) {
      const uint8_t* from = region(__ldg(entry(first + i / kPieces))) + a_.params.cache.layout.mean_offset();
      copy16_async(shared_address(&shared_.means[i / kPieces][i % kPieces * 16]), from + i % kPieces * 16);
    }
    mbarrier_arrive_copies(shared_address(&shared_.means_full));
  }

  const Arguments& a_;
  Shared<kD, kTiles>& shared_;
  int warp_;
};

// A warp's reading of the ring.
template <int kD, int kTiles>
class Reader {
 public:
  __device__ __forceinline__ Reader(const Arguments& a, Shared<kD, kTiles>& shared) : a_(a) {
    barriers_ = shared_address(&shared);
    ring_ = barriers_ + Shared<kD, kTiles>::bytes() + thread_index() % 32 * 16;
  }
  __device__ __forceinline__ const Stage& stage() const { return stage_; }
  // The lane's 16 bytes of the first fragment.
  __device__ __forceinline__ uint32_t keys(const Stage& s) const { return ring_ + s.at * a_.pair_bytes; }
  __device__ __forceinline__ uint32_t values(const Stage& s) const { return keys(s) + a_.key_bytes; }
  // Waits for a side, and tells its kind.
  __device__ __forceinline__ uint32_t wait(int side, const Stage& s) const {
    mbarrier_wait(barriers_ + (side * kMaxPairs + s.at) * 8, s.parity);
    return load_shared4(barriers_ + offsetof(Layout, kinds) + (side * kMaxPairs + s.at) * 4);
  }
  // The warp has read a side of the stage `behind` the one in use.
  __device__ __forceinline__ void release(int side, int behind) const {
    const int at = stage_.at >= behind ? stage_.at - behind : a_.pairs - 1;
    if (kWarpArrivals > 1 || ring_ % kFragment == 0) mbarrier_arrive(barriers_ + ((2 + side) * kMaxPairs + at) * 8);
  }
  __device__ __forceinline__ Stage next() const { return stage_.ahead(1, a_.pairs); }
  __device__ __forceinline__ void advance(const Stage& s) { stage_ = s; }

 private:
  using Layout = Shared<kD, kTiles>;
  const Arguments& a_;
  uint32_t barriers_, ring_;
  Stage stage_;
};

}  // namespace hierasparse::prefill_sm80
