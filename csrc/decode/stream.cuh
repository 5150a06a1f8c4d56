// A warp's way through a lane: sub-block `warp` of every page, then every fourth piece of the window, through one ring.
//
// The ring is a register file that loads can run ahead into, from the pages on into the window; it belongs to the warp
// and needs no barrier beyond it.  Values of pages lie in fragment order, so a lane copies just the 16 bytes that it
// will itself read as operand A.
#pragma once

#include "schedule.cuh"
#include "softmax.cuh"

namespace hierasparse::decode {

constexpr int kFragment = 512;               // bytes of an operand-A fragment of a warp
constexpr int kChunkValues = 8 * kFragment;  // of K or V, with 512 bytes of metadata where sparse
constexpr int kChunkMeta = kFragment;
constexpr int kChunkMean = kFragment;  // room for the page's mean (2 * head_size bytes)
constexpr int kStageBytes = kChunkValues + kChunkMeta + kChunkMean;

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

// What the index word says of one sub-block.
struct Kind {
  bool sparse_k, sparse_v, sinks;
};

template <int kD>
class Stream {
 public:
  // The warp's share of a segment.
  __device__ __forceinline__ void begin(const DecodeParams& p, const Segment& s, uint32_t ring, int stages) {
    const Request& q = s.request;
    const int warp = thread_index() / 32, subs = kSubs * q.pages(), first = s.first, end = s.end;
    request_ = s.number, kv_head_ = s.kv_head;
    first_page_ = page_ = (min(first, subs) + kSubs - 1 - warp) / kSubs;  // items with number `warp` modulo kSubs
    end_page_ = (min(end, subs) + kSubs - 1 - warp) / kSubs;
    first_block_ = q.low / p.batch.window_block;
    first_piece_ = piece_ = max(0, first - subs) + warp;
    end_piece_ = end - subs;
    rows_ = q.first + q.queries - q.low;  // of the window, from the lane's border on
    ring_ = ring, in_ = 0, out_ = 0, part_ = 0;
    ids_ = load_ids(p, first_page_), next_ids_ = load_ids(p, first_page_ + 32);
    blocks_ = load_blocks(p, piece_);
    words_ = load_words(p, ids_, first_page_);
    for (int i = 0; i < stages; ++i) issue(p, stages);
  }

  __device__ __forceinline__ int first_page() const { return first_page_; }
  __device__ __forceinline__ int end_page() const { return end_page_; }
  __device__ __forceinline__ int first_piece() const { return first_piece_; }
  __device__ __forceinline__ int end_piece() const { return end_piece_; }

  __device__ __forceinline__ Kind kind(const PageLayout& layout, int page) const {
    const int loaded = min(page_, end_page_ - 1) - first_page_, at = page - first_page_;
    return read(layout, __shfl_sync(~0u, at / 32 != loaded / 32 ? old_words_ : words_, at % 32));
  }
  __device__ __forceinline__ const uint8_t* page(const DecodeParams& p, int number) const {
    return region(p, __ldg(table(p) + number));
  }

  // Shared address of the next chunk, once it is there.
  __device__ __forceinline__ uint32_t front(int stages) const {
    if (stages == 3) {
      wait_copies<2>();
    } else {  // 4: what launch.cu chooses elsewhere
      wait_copies<3>();
    }
    __syncwarp();  // the mean and the window are read by other lanes than those that copied them
    return ring_ + out_ * kStageBytes;
  }
  // The chunk has been read: its place takes the next one.
  __device__ __forceinline__ void pop(const DecodeParams& p, int stages) {
    __syncwarp();
    out_ = out_ + 1 == stages ? 0 : out_ + 1;
    issue(p, stages);
  }

 private:
  // Addresses are made where they are needed: kept, they would take the registers that run short.
  __device__ __forceinline__ const int32_t* table(const DecodeParams& p) const {
    return p.batch.page_table + request_ * p.batch.page_table_stride;
  }
  // The head's region of a page.
  __device__ __forceinline__ const uint8_t* region(const DecodeParams& p, int id) const {
    return p.cache.pages + id * p.cache.page_stride + kv_head_ * p.head_bytes;
  }

  __device__ __forceinline__ int load_ids(const DecodeParams& p, int page) const {
    const int mine = page + thread_index() % 32;
    return mine < end_page_ ? __ldg(table(p) + mine) : 0;
  }
  // Index words are read where they can say something new: page 0 may have sinks.
  __device__ __forceinline__ uint32_t load_words(const DecodeParams& p, int ids, int page) const {
    const PageLayout& layout = p.cache.layout;
    const bool mixed = layout.sparse_k % kSubs != 0 || layout.sparse_v % kSubs != 0;
    const int mine = page + thread_index() % 32;
    const bool needed = mine < end_page_ && (mixed || (mine == 0 && layout.sink_tokens > 0));
    return needed ? __ldg(reinterpret_cast<const uint32_t*>(region(p, ids))) : 0;
  }
  // Ids of the window's blocks of the next 32 of this warp's pieces.
  __device__ __forceinline__ int load_blocks(const DecodeParams& p, int piece) const {
    const int mine = piece + kWarps * (thread_index() % 32);
    const int block = first_block_ + mine * kPiece / p.batch.window_block;
    return mine < end_piece_ ? __ldg(p.batch.window_table + (request_ * p.batch.window_table_stride + block)) : 0;
  }
  __device__ __forceinline__ static Kind read(const PageLayout& layout, uint32_t word) {
    const int sub = threadIdx.x / 32;
    return {(layout.k_mask(word) >> sub & 1) != 0, (layout.v_mask(word) >> sub & 1) != 0, layout.has_sinks(word)};
  }

  // Start the copy of the next chunk, if there is one; closes a group in any case, so that counts stay in step.
  __device__ __forceinline__ void issue(const DecodeParams& p, int stages) {
    const uint32_t to = ring_ + in_ * kStageBytes;
    if (page_ < end_page_) {
      copy_page_part(p, to);
    } else if (piece_ < end_piece_) {
      copy_rows(p, to);
    }
    in_ = in_ + 1 == stages ? 0 : in_ + 1;
    commit_copies();
  }

  __device__ __forceinline__ void copy_page_part(const DecodeParams& p, uint32_t to) {
    const PageLayout& layout = p.cache.layout;
    const int lane = threadIdx.x % 32;
    to += lane * 16;
    if (part_ == 0) {
      const int at = (page_ - first_page_) % 32, sub = threadIdx.x / 32;
      const int id = __shfl_sync(~0u, ids_, at);
      const uint32_t word = __shfl_sync(~0u, words_, at);
      kind_ = read(layout, word);
      const uint8_t* base = region(p, id) + lane * 16;
      k_ = base + layout.k_sub(layout.k_mask(word), sub);
      v_ = base + layout.v_sub(layout.v_mask(word), sub);
      if (kind_.sparse_k && layout.key_mean && lane < kD / 8) {
        copy16_async(to + kChunkValues + kChunkMeta, base + layout.mean_offset());
      }
    }
    const int k_parts = kind_.sparse_k ? kD / 64 : kD / 32, v_parts = kind_.sparse_v ? kD / 64 : kD / 32;
    const bool is_k = part_ < k_parts;
    const int part = is_k ? part_ : part_ - k_parts;
    const uint8_t* from = is_k ? k_ : v_;
#pragma unroll
    for (int i = 0; i < 8; ++i) copy16_async(to + i * kFragment, from + part * kChunkValues + i * kFragment);
    if (is_k ? kind_.sparse_k : kind_.sparse_v) {
      copy16_async(to + kChunkValues, from + kD / 64 * kChunkValues + part * kChunkMeta);
    }
    if (++part_ < k_parts + v_parts) return;
    part_ = 0;
    // Ids and words come 32 pages at a time, the next ones loaded long before they are needed.
    ++page_;
    const int at = (page_ - first_page_) % 32;
    if (page_ < end_page_ && at == 0) {
      old_words_ = words_, words_ = next_words_, ids_ = next_ids_;
      next_ids_ = load_ids(p, page_ + 32);
    } else if (at == 16) {
      next_words_ = load_words(p, next_ids_, page_ + 16);
    }
  }

  __device__ __forceinline__ void copy_rows(const DecodeParams& p, uint32_t to) {
    using R = Rows<kD>;
    const int lane = threadIdx.x % 32, count = (piece_ - first_piece_) / kWarps % 32;
    if (part_ == 0 && count == 0 && piece_ != first_piece_) blocks_ = load_blocks(p, piece_);
    const int block = __shfl_sync(~0u, blocks_, count), start = piece_ * kPiece;
    const uint8_t* from = p.cache.window + block * p.cache.window_stride +
                          (kv_head_ * p.batch.window_block + start % p.batch.window_block) * (4 * kD) +
                          part_ * (R::kChannels * 2);
#pragma unroll
    for (int i = 0; i < R::kPieces / 2; ++i) {
      const int row = (32 * i + lane) / R::kPieces, piece = (32 * i + lane) % R::kPieces;
      const int at = part_ < R::kParts ? R::key_piece(row, piece) : R::value_piece(row, piece);
      // What lies behind the last token may be anything, NaN too.
      copy16_async_or_zero(to + at * 16, from + row * (4 * kD) + piece * 16, start + row < rows_);
    }
    if (++part_ < 2 * R::kParts) return;
    part_ = 0, piece_ += kWarps;
  }

  const uint8_t *k_, *v_;
  int request_, kv_head_, first_block_;
  int first_page_, page_, end_page_, first_piece_, piece_, end_piece_, rows_;
  int part_;
  uint32_t ring_;
  int in_, out_;
  int ids_, next_ids_, blocks_;
  uint32_t words_ = 0, old_words_ = 0, next_words_ = 0;
  Kind kind_;
};

}  // namespace hierasparse::decode
