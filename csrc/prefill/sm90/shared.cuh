// What the parts of the kernel share: its shape, its shared memory, a CTA's work.
#pragma once

#include "../../common/hopper.cuh"
#include "../../common/log2.h"
#include "../params.h"
#include "columns.h"

namespace hierasparse::prefill90 {

constexpr int kGroupThreads = 128;
constexpr int kMeanWarps = 3;
constexpr int kStartPlaces = 8;  // of a batch of pages; two batches are in flight
constexpr int kMaxStages = 12;
constexpr int kShared = 227 << 10;
constexpr int kFragment = 512;  // bytes of a warp's operand-A fragment
constexpr int kRowBytes = 128;  // of operand B in shared memory

// Named barriers.  Threads meet at one in one place of the code, or synccheck complains; elsewhere they use mbarriers.
// Consumers in turns wait at one place and arrive at another: tests/gpu/small_shapes.py does not run them.
enum : int {
  kTurn = 1,   // and two behind it: a consumer's turn at the tensor cores
  kGroup = 4,  // and two behind it: one consumer
};

// A thread's place; read anew where it is used, like thread_index().
__device__ __forceinline__ int lane_of_warp() { return static_cast<unsigned>(thread_index()) % kWarp; }
__device__ __forceinline__ int warp_of_group() { return static_cast<unsigned>(thread_index()) / kWarp % 4; }

// kD channels; kMixed: some sub-blocks may be dense.
template <int kD_, bool kMixed_>
struct Shape {
  static constexpr int kD = kD_, kN = kPrefillSm90GroupColumns, kConsumers = prefill_sm90_consumers(kD);
  static constexpr bool kMixed = kMixed_;
  // The last warpgroup: a warp that copies, three for the means.
  static constexpr int kThreads = kGroupThreads * (kConsumers + 1);
  static constexpr int kConsumerArrivals = kConsumers * kGroupThreads / kWarp * kWarpArrivals;  // on an mbarrier
  // Of a thread: what the CTA is launched with, in steps of eight, is shared out anew.  More than that, and the
  // consumers would wait for registers for ever.
  static constexpr int kFeederRegisters = kConsumers == 3 ? 32 : 56;
  static constexpr int kAllRegisters = 65536 / kThreads / 8 * 8 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = (kAllRegisters - kFeederRegisters) / kConsumers / 8 * 8;
  // By measurement: whether consumers take turns with their products, and how many of eight exponentials are
  // polynomials.
  static constexpr bool kTurns = !kMixed && kD == 128;
  static constexpr int kPolynomials = !kMixed && kD == 128 ? 1 : 0;
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
  static constexpr int kKinds = kBarriers + (2 * kMaxStages + 6) * 8;  // of stages: 1 where sparse
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
  // Queries and borders are there, and zeros as tops, or tops: two phases of each attempt at a tile.
  static constexpr int kTopsThere = kBarriers + (2 * kMaxStages + 4) * 8;
  static constexpr int kDecided = kTopsThere + 8;  // kAgain says whether there is another attempt
};

// What the kernel is told; its own figures are worked out on the host, since registers run short.
struct Arguments : PrefillParams {
  uint32_t head_bytes, mean_offset, k_offset, v_offset;  // unsigned: no registers for the upper half of a sign
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
    return p.cache.pages + id * p.cache.page_stride + uint64_t{static_cast<uint32_t>(kv_head)} * p.head_bytes;
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
