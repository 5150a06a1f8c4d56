// What the parts of the kernel share: its shape, its shared memory, a CTA's work.
#pragma once

#include "../../common/hopper.cuh"
#include "../../common/log2.h"
#include "../params.h"
#include "columns.h"

namespace hierasparse::prefill90 {

constexpr int kConsumers = 2;  // warpgroups with columns of their own
constexpr int kGroupThreads = 128;
constexpr int kThreads =
    kGroupThreads * (kConsumers + 1);  // the last warpgroup: a warp that copies, three for the means
constexpr int kMeanWarps = 3;
constexpr int kStartPlaces = 8;  // of a batch of pages; two batches are in flight
constexpr int kMaxStages = 12;
constexpr int kShared = 227 << 10;
constexpr int kFragment = 512;  // bytes of a warp's operand-A fragment
constexpr int kRowBytes = 128;  // of operand B in shared memory

// Named barriers.
enum : int {
  kAll = 0,        // every thread
  kGroup = 1,      // and kGroup + 1: one consumer
  kWithMeans = 3,  // all but the warp that copies
  kTurn = 4,       // and kTurn + 1: a consumer's turn at the tensor cores
};
constexpr int kWithMeansThreads = kThreads - kWarp;

// A thread's place; read anew where it is used, like thread_index().
__device__ __forceinline__ int lane_of_warp() { return static_cast<unsigned>(thread_index()) % kWarp; }
__device__ __forceinline__ int warp_of_group() { return static_cast<unsigned>(thread_index()) / kWarp % 4; }

// kD channels; kN columns per consumer; kMixed: some sub-blocks may be dense.
template <int kD_, int kN_, bool kMixed_>
struct Shape {
  static constexpr int kD = kD_, kN = kN_;
  static constexpr bool kMixed = kMixed_;
  // By measurement: whether consumers take turns with their products, and how many of eight exponentials are
  // polynomials.
  static constexpr bool kTurns = !kMixed && kD == 128;
  static constexpr int kPolynomials = kMixed ? 0 : kD == 64 ? 2 : 1;
  static constexpr int kColumns = kConsumers * kN;
  static constexpr int kHalf = kN * kRowBytes;         // 64 channels of a consumer's queries, or 64 keys of its P
  static constexpr int kQueryBytes = kD / 64 * kHalf;  // of a consumer
  static constexpr int kStartPages = kMixed ? kStartPlaces - 1 : kStartPlaces;  // the last place is dense sub-blocks'
  static constexpr int kSparseValues = kSubTokens * kD;  // bytes; K's and V's sub-blocks have the same sizes
  static constexpr int kSparseBytes = kSparseValues + kD / 16 * kWarp * kMetaBytes;
  static constexpr int kDenseBytes = 2 * kSparseValues;
  static constexpr int kStageBytes = kMixed ? kDenseBytes : kSparseBytes;
  static constexpr int kResultPitch = kD + 4;  // floats of a column of O

  // ---- offsets in shared memory
  static constexpr int kQueries = 0;
  static constexpr int kProbabilities = kConsumers * kQueryBytes;  // two buffers per consumer
  static constexpr int kStarts = kProbabilities + 2 * kConsumers * kHalf;
  static constexpr int kTops = kStarts + kConsumers * kHalf;
  static constexpr int kBorders = kTops + kColumns * 4;
  static constexpr int kFactors = kBorders + kColumns * 4;
  static constexpr int kBarriers = kFactors + kColumns * 4;
  static constexpr int kKinds = kBarriers + (2 * kMaxStages + 4) * 8;  // of stages: 1 where sparse
  static constexpr int kAgain = kKinds + kMaxStages * 4;
  static constexpr int kRing = align_up(kAgain + 4);
  static constexpr int kFit = (kShared - kRing) / kStageBytes;
  static constexpr int kStages = kMixed ? 4 : kFit < kMaxStages ? kFit : kMaxStages;
  static_assert(kStages <= kFit && kConsumers * kN * kResultPitch * 4 <= kShared - kRing, "O takes the ring's place");

  // ---- barriers
  HS_HD static constexpr int full(int stage) { return kBarriers + stage * 8; }
  HS_HD static constexpr int empty(int stage) { return kBarriers + (kMaxStages + stage) * 8; }
  HS_HD static constexpr int start_full(int buffer) { return kBarriers + (2 * kMaxStages + buffer) * 8; }
  HS_HD static constexpr int start_empty(int buffer) { return kBarriers + (2 * kMaxStages + 2 + buffer) * 8; }
};

// What the kernel is told; its own figures are worked out on the host, since registers run short.
struct Arguments : PrefillParams {
  int head_bytes, mean_offset, k_offset, v_offset;
  float scale_log2;

  explicit Arguments(const PrefillParams& p)
      : PrefillParams(p),
        head_bytes(p.cache.layout.head_bytes()),
        mean_offset(p.cache.layout.mean_offset()),
        k_offset(p.cache.layout.k_offset()),
        v_offset(p.cache.layout.v_offset()),
        scale_log2(p.scale * kLog2E) {}
};

// A CTA's work.  Neighbours are tiles of one KV head: they run at the same time and find each other's pages in L2.
struct Work {
  PrefillTile tile;
  int kv_head, split, group;
  int first, end;  // pages
  int low;         // border of the tile's first query: columns need no test below it

  __device__ __forceinline__ Work(const Arguments& p, int cta) {
    tile = p.tiles[cta % p.tile_count];
    kv_head = cta / p.tile_count % p.cache.kv_heads;
    split = cta / p.tile_count / p.cache.kv_heads;
    group = p.heads / p.cache.kv_heads;
    const int pages = border_of(p, tile, tile.queries - 1) / kPageTokens;
    first = static_cast<int>(int64_t{pages} * split / p.splits);
    end = static_cast<int>(int64_t{pages} * (split + 1) / p.splits);
    low = border_of(p, tile, 0);
  }

  __device__ __forceinline__ int columns() const { return tile.queries * group; }
  __device__ __forceinline__ int row(int column) const { return tile.row + column / group; }
  __device__ __forceinline__ int head(int column) const { return kv_head * group + column % group; }

  __device__ __forceinline__ int page_id(const Arguments& p, int page) const {
    return __ldg(p.batch.page_table + tile.request * p.batch.page_table_stride + page);
  }
  // The head's region of a page.
  __device__ __forceinline__ const uint8_t* region(const Arguments& p, int id) const {
    return p.cache.pages + id * p.cache.page_stride + int64_t{kv_head} * p.head_bytes;
  }
};

// A way through a ring of stages, or of two buffers.
struct Cursor {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int count) {
    if (++at == count) at = 0, parity ^= 1;
  }
};

}  // namespace hierasparse::prefill90
