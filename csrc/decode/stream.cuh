// The way of a segment's bytes to the consumers: one warp copies for all four, through a ring for each.
//
// A ring is a register file that loads can run ahead into, from pages on into the window and on into the next segment.
// Values of pages lie in fragment order, so a consumer's lanes read them as operand A without a conflict.
#pragma once

#include "../common/sub_block.cuh"
#include "plan.cuh"
#include "softmax.cuh"

namespace hierasparse::decode {

constexpr int kFragment = 512;               // bytes of an operand-A fragment of a warp
constexpr int kChunkValues = 8 * kFragment;  // of K or V, with 512 bytes of metadata where sparse
constexpr int kChunkMeta = kFragment;
constexpr int kChunkMean = kFragment;  // room for the page's mean (2 * head_size bytes)
constexpr int kStageBytes = kChunkValues + kChunkMeta + kChunkMean;
constexpr int kMaxStages = 6;

// Rows of the window come in chunks of 16 rows and at most 128 channels, 16 bytes at a time.  Their places are swizzled
// so that the reads below hit different banks: of K by lanes 4 g + t rows g, pieces t; of V rows 2 t, 8 bytes at g.
template <int kD>
struct Rows {
  static constexpr int kChannels = kD < 128 ? kD : 128;  // of a chunk
  static constexpr int kPieces = kChannels / 8;          // 16 bytes each, of a row
  static constexpr int kParts = kD / kChannels;          // chunks of K, and of V, of 16 tokens
  __device__ static int key_piece(int row, int piece) { return row * kPieces + (piece ^ (row & 1) << 2); }
  __device__ static int value_piece(int row, int piece) { return row * kPieces + (piece ^ (row >> 1 & 3) << 1); }
};

// What the index word says of one sub-block; told to the consumer with its first chunk.
struct Kind {
  bool sparse_k, sparse_v, sinks;
  __device__ static Kind read(const PageLayout& layout, uint32_t word, int sub) {
    return {(layout.k_mask(word) >> sub & 1) != 0, (layout.v_mask(word) >> sub & 1) != 0, layout.has_sinks(word)};
  }
  __device__ uint32_t pack() const { return sparse_k | sparse_v << 1 | sinks << 2; }
  __device__ static Kind unpack(uint32_t x) { return {(x & 1) != 0, (x & 2) != 0, (x & 4) != 0}; }
};

// A consumer's part of a segment: sub-block `warp` of its pages, every fourth piece of its window.
struct Share {
  int first_page, end_page, first_piece, end_piece;
  __device__ __forceinline__ Share(const Segment& s, int warp) {
    const int subs = kSubs * s.request.pages();
    first_page = (min(s.first, subs) + kSubs - 1 - warp) / kSubs;
    end_page = (min(s.end, subs) + kSubs - 1 - warp) / kSubs;
    first_piece = max(0, s.first - subs) + warp;
    end_piece = s.end - subs;
  }
};

constexpr int kCopiers = 32 / kWarps;  // lanes that copy for a consumer
constexpr int kStep = 16 * kCopiers;   // bytes that they copy at a time

// The consumers' rings: a barrier each for "has landed" and "was read", and a word of the stage's chunk.
struct Rings {
  uint64_t full[kWarps][kMaxStages], empty[kWarps][kMaxStages];
  uint32_t kinds[kWarps][kMaxStages];

  // A warp calls it.
  __device__ __forceinline__ void init() {
    for (int i = thread_index() % 32; i < kWarps * kMaxStages; i += 32) {
      mbarrier_init(shared_address(&full[0][i]), kCopiers + 1);  // their copies; and one that has stored the word
      mbarrier_init(shared_address(&empty[0][i]), kWarpArrivals);
    }
  }
};

// A place in a ring of `stages`, and the parity of the round; one register.
class Place {
 public:
  __device__ __forceinline__ int stage(int stages) const { return at_ < stages ? at_ : at_ - stages; }
  __device__ __forceinline__ uint32_t parity(int stages) const { return at_ >= stages; }
  __device__ __forceinline__ void next(int stages) { at_ = at_ + 1 == 2 * stages ? 0 : at_ + 1; }

 private:
  int at_ = 0;
};

// A consumer's end of its ring.
class Chunks {
 public:
  __device__ __forceinline__ Chunks(Rings& rings, uint32_t ring, int stages)
      : rings_(rings), ring_(ring), stages_(stages) {}

  // Shared address of the next chunk, once it is there; found anew, since registers run short.
  __device__ __forceinline__ uint32_t front() const {
    mbarrier_wait(shared_address(&rings_.full[thread_index() / 32][at_.stage(stages_)]), at_.parity(stages_));
    return ring_ + (thread_index() / 32 * stages_ + at_.stage(stages_)) * kStageBytes;
  }
  // Of the sub-block that begins with the next chunk.
  __device__ __forceinline__ Kind kind() const {
    front();
    return Kind::unpack(rings_.kinds[thread_index() / 32][at_.stage(stages_)]);
  }
  // The chunk has been read: its place takes another one.
  __device__ __forceinline__ void pop() {
    mbarrier_arrive_warp(shared_address(&rings_.empty[thread_index() / 32][at_.stage(stages_)]), thread_index() % 32);
    at_.next(stages_);
  }

 private:
  Rings& rings_;
  uint32_t ring_;
  int stages_;
  Place at_;
};

// The warp that copies, a quarter of its lanes for each consumer; all go page by page together.
template <int kD>
class Producer {
 public:
  __device__ __forceinline__ Producer(const DecodeParams& p, Rings& rings, uint32_t ring, int stages)
      : p_(p),
        rings_(rings),
        consumer_(lane() / kCopiers),
        mine_(lane() % kCopiers * 16),
        stages_(stages),
        ring_(ring + consumer_ * stages * kStageBytes) {}

  __device__ __forceinline__ void copy(const Plan& plan) {
    const Segment& s = plan.segment;
    const Share mine(s, consumer_);
    int block = window_block(s, mine, 0);
    copy_pages(plan, mine);
    const int pieces = s.end - max(s.first, kSubs * s.request.pages());  // of all consumers
#pragma unroll 1
    for (int k = 0; kWarps * k < pieces; ++k) {
      if (k % kCopiers == 0 && k > 0) block = window_block(s, mine, k);
      const int id = __shfl_sync(~0u, block, lane() / kCopiers * kCopiers + k % kCopiers);
      const int piece = mine.first_piece + kWarps * k;
      if (piece < mine.end_piece) copy_piece(s, piece, id);
      __syncwarp();
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return thread_index() % 32; }

  // ---- a chunk's place in the ring
  __device__ __forceinline__ uint32_t begin() {
    // Parity 1 of a new barrier is that of a phase that has ended: at first every stage is free.
    mbarrier_wait(shared_address(&rings_.empty[consumer_][at_.stage(stages_)]), at_.parity(stages_) ^ 1);
    return ring_ + at_.stage(stages_) * kStageBytes;
  }
  // Once all that was copied is there; what one lane has stored, too.
  __device__ __forceinline__ void end() {
    const uint32_t full = shared_address(&rings_.full[consumer_][at_.stage(stages_)]);
    mbarrier_arrive_copies(full);
    if (mine_ == 0) mbarrier_arrive(full);
    at_.next(stages_);
  }

  // ---- pages
  // Ids and index words come 32 pages at a time, one a lane, the next ones loaded long before they are needed.
  __device__ __forceinline__ void copy_pages(const Plan& plan, const Share& mine) {
    const Segment& s = plan.segment;
    const int first = s.first_page(), end = s.end_page();
    int ids = plan.ids[lane()], next_ids = load_ids(p_, s, first + 32);
    uint32_t words = plan.words[lane()], next_words = 0;
#pragma unroll 1
    for (int page = first; page < end; ++page) {
      const int at = (page - first) % 32;
      if (at == 0 && page != first) words = next_words, ids = next_ids, next_ids = load_ids(p_, s, page + 32);
      if (at == 16) next_words = load_words(p_, s, next_ids, page + 16);
      const int id = __shfl_sync(~0u, ids, at);
      const uint32_t word = __shfl_sync(~0u, words, at);
      if (mine.first_page <= page && page < mine.end_page) copy_sub_block(region(p_, s, id), word);
      __syncwarp();
    }
  }

  __device__ __forceinline__ void copy_sub_block(const uint8_t* base, uint32_t word) {
    const PageLayout& layout = p_.cache.layout;
    const Kind kind = Kind::read(layout, word, consumer_);
    copy_side(base, layout.k_offset() + sub_block_offset<kD>(layout.k_mask(word), layout.sparse_k, consumer_),
              kind.sparse_k, kind.sparse_k && layout.key_mean ? layout.mean_offset() : 0, kind);
    copy_side(base, layout.v_offset() + sub_block_offset<kD>(layout.v_mask(word), layout.sparse_v, consumer_),
              kind.sparse_v, 0, kind);
  }
  // K's or V's chunks; `mean` is the mean's offset, or 0.
  __device__ __forceinline__ void copy_side(const uint8_t* base, int offset, bool sparse, int mean, const Kind& kind) {
    const uint8_t* values = base + offset + mine_;
    const uint8_t* meta = values + kD / 64 * kChunkValues;
    const int parts = sparse ? kD / 64 : kD / 32;
#pragma unroll 1
    for (int part = 0; part < parts; ++part, values += kChunkValues, meta += kChunkMeta) {
      const uint32_t to = begin();
      if (mine_ == 0) rings_.kinds[consumer_][at_.stage(stages_)] = kind.pack();
      copy_steps<kChunkValues / kStep>(to, values);
      if (sparse) copy_steps<kChunkMeta / kStep>(to + kChunkValues, meta);
      if (mean > 0 && part == 0) {
        copy_steps<2 * kD / kStep>(to + kChunkValues + kChunkMeta, base + mean + mine_);
      }
      end();
    }
  }
  template <int kSteps>
  __device__ __forceinline__ void copy_steps(uint32_t to, const uint8_t* from) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) copy16_async(to + mine_ + i * kStep, from + i * kStep);
  }

  // ---- window
  // Block ids of a consumer's pieces from its k-th on, one a lane.
  __device__ __forceinline__ int window_block(const Segment& s, const Share& mine, int k) const {
    const int piece = mine.first_piece + kWarps * (k + lane() % kCopiers);
    const int block = (s.request.low + piece * kPiece) / p_.batch.window_block;
    const int32_t* at = p_.batch.window_table + (s.number * p_.batch.window_table_stride + block);
    return piece < mine.end_piece ? load_kept(at) : 0;
  }
  __device__ __forceinline__ void copy_piece(const Segment& s, int piece, int block) {
    using R = Rows<kD>;
    const Request& q = s.request;
    const int start = piece * kPiece, rows = q.first + q.queries - q.low - start;  // what lies behind them may be NaN
    const uint8_t* from = p_.cache.window + block * p_.cache.window_stride +
                          (s.kv_head * p_.batch.window_block + start % p_.batch.window_block) * (4 * kD);
#pragma unroll 1
    for (int part = 0; part < 2 * R::kParts; ++part, from += R::kChannels * 2) {
      const uint32_t to = begin();
#pragma unroll 4
      for (int i = 0; i < 16 * R::kPieces / kCopiers; ++i) {
        const int at = kCopiers * i + lane() % kCopiers, row = at / R::kPieces, piece = at % R::kPieces;
        const int there = part < R::kParts ? R::key_piece(row, piece) : R::value_piece(row, piece);
        copy16_async_or_zero(to + there * 16, from + row * (4 * kD) + piece * 16, row < rows);
      }
      end();
    }
  }

  const DecodeParams& p_;
  Rings& rings_;
  const int consumer_, mine_, stages_;
  const uint32_t ring_;
  Place at_;
};

}  // namespace hierasparse::decode
