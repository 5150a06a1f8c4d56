// A warp's way through the sub-blocks of its pages, and their products, half a sub-block (32 tokens) at a time.
//
// Fragments come straight from global memory, the same for all warps of a CTA, so that L1 serves all but the first.
#pragma once

#include "columns.cuh"

namespace hierasparse::prefill_sm80 {

constexpr int kFragment = 512;  // bytes of an operand-A fragment of a warp
constexpr int kAhead = 2;       // fragments of V

__device__ __forceinline__ uint4 load16(const uint8_t* from) { return __ldg(reinterpret_cast<const uint4*>(from)); }

// One side of a sub-block.
struct Side {
  const uint8_t* at;  // the lane's 16 bytes of its first fragment
  bool sparse;
};

// What a warp rarely reads lies in shared memory, since registers run short.
template <int kTiles>
struct Shared {
  const int32_t* table;  // of the request's pages
  int64_t head;          // bytes from a page to the head's region
  int end;               // behind the warp's last page
  int edge;              // pages from it on are hidden from some column
  int border[8 * kTiles];
  float mean[8 * kTiles];  // q . mean of the page
};

// ... and is found there anew.
template <int kTiles>
struct Mine {
  Shared<kTiles>* warps;
  __device__ __forceinline__ volatile Shared<kTiles>* operator->() const { return warps + thread_index() / 32; }
};

// The sub-blocks of a warp.  Ids and index words come for 32 pages at a time, one a lane.
template <int kD, int kTiles>
class Walk {
 public:
  // From page `begin` on, of which there is at least one.
  __device__ __forceinline__ Walk(const Arguments& a, Mine<kTiles> shared, int begin)
      : a_(a), shared_(shared), at_(begin * kSubs) {
    load();
  }

  // The region of the page.
  __device__ __forceinline__ const uint8_t* base() const { return region(__shfl_sync(~0u, ids_, page() % 32)); }
  __device__ __forceinline__ int page() const { return at_ / kSubs; }
  __device__ __forceinline__ bool page_begins() const { return at_ % kSubs == 0; }
  __device__ __forceinline__ bool at_edge() const { return page() >= shared_->edge; }
  // The sub-block's first tokens are read from the sink rows.
  __device__ __forceinline__ bool sinks() const { return page_begins() && PageLayout::has_sinks(word()); }

  // To the next sub-block, if there is one.
  __device__ __forceinline__ bool advance() {
    if (at_ + 1 == shared_->end * kSubs) return false;
    if (++at_ % (32 * kSubs) == 0) load();
    return true;
  }

  __device__ __forceinline__ Side keys() const {
    const PageLayout& layout = a_.params.cache.layout;
    return side(layout.k_mask(word()), layout.sparse_k, a_.k_offset);
  }
  __device__ __forceinline__ Side values() const {
    const PageLayout& layout = a_.params.cache.layout;
    return side(layout.v_mask(word()), layout.sparse_v, a_.v_offset);
  }

 private:
  // As PageLayout::k_sub and v_sub have it, without a branch.
  __device__ __forceinline__ Side side(uint32_t mask, int count, int offset) const {
    constexpr PageLayout kSizes{kD, 2, 0, 0, 0, false};
    const int sub = at_ % kSubs, rank = __popc(mask & ((1u << sub) - 1));
    const bool sparse = mask >> sub & 1;
    offset += (sparse ? rank : count) * kSizes.sparse_bytes() + (sparse ? 0 : sub - rank) * kSizes.dense_bytes();
    return {base() + offset + thread_index() % 32 * 16, sparse};
  }
  // Addresses are made where they are needed: kept, they would take the registers that run short.
  __device__ __forceinline__ const uint8_t* region(int id) const {
    return a_.params.cache.pages + id * a_.params.cache.page_stride + shared_->head;
  }
  __device__ __forceinline__ uint32_t word() const { return __shfl_sync(~0u, words_, page() % 32); }
  __device__ __forceinline__ void load() {
    const int mine = page() / 32 * 32 + thread_index() % 32;
    const bool real = mine >= page() && mine < shared_->end;
    ids_ = real ? __ldg(shared_->table + mine) : 0;
    words_ = real ? __ldg(reinterpret_cast<const uint32_t*>(region(ids_))) : 0;
  }

  const Arguments& a_;
  const Mine<kTiles> shared_;
  int at_;  // sub-block, counted from page 0
  int ids_;
  uint32_t words_;
};

// ---- K

// Metadata of a half.
template <int kD>
struct KeyWords {
  static constexpr int kPairs = kD / 64;  // words of a row tile
  uint32_t at[2 * kPairs];
  __device__ __forceinline__ void load(const uint8_t* k, int half) {
    const uint8_t* from = k + 64 * kD;
    if constexpr (kD == 64) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(from) + half);
      at[0] = two.x, at[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < kPairs / 2; ++i) {
        const uint4 four = load16(from + (half * (kPairs / 2) + i) * 512);
        at[4 * i] = four.x, at[4 * i + 1] = four.y, at[4 * i + 2] = four.z, at[4 * i + 3] = four.w;
      }
    }
  }
};

// S^T of a half, two row tiles of 16 tokens.
template <typename T, bool kSparse, int kHalf, int kD, int kTiles>
__device__ __forceinline__ void multiply_keys(float (&s)[2][kTiles][4], const Queries<kD, kTiles>& q,
                                              Mine<kTiles> shared, const uint8_t* k) {
  constexpr int kSteps = kSparse ? kD / 32 : kD / 16;
  KeyWords<kD> words;
  if constexpr (kSparse) words.load(k, kHalf);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        s[row][n][e] = s[row][n][2 + e] = kSparse ? shared->mean[8 * n + thread_index() % 4 * 2 + e] : 0.f;
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 a = load16(k + ((2 * kHalf + row) * kSteps + step) * kFragment);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if constexpr (kSparse) {
          const uint32_t word = words.at[row * KeyWords<kD>::kPairs + step / 2];
          if (step % 2 == 0) {
            mma_sp<T, 0>(s[row][n], a, q.at[n][step], word);
          } else {
            mma_sp<T, 1>(s[row][n], a, q.at[n][step], word);
          }
        } else {
          mma<T>(s[row][n], a.x, a.y, a.z, a.w, q.at[n][step / 2][step % 2 * 2], q.at[n][step / 2][step % 2 * 2 + 1]);
        }
      }
    }
  }
}

// q . mean: the mean as a matrix of equal rows.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void multiply_mean(Mine<kTiles> shared, const Queries<kD, kTiles>& q, const uint8_t* mean) {
  float d[kTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kD / 32; ++step) {
    const uint4 a = load16(mean + (4 * step + thread_index() % 4) * 16);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      mma<T>(d[n], a.x, a.x, a.y, a.y, q.at[n][step][0], q.at[n][step][1]);
      mma<T>(d[n], a.z, a.z, a.w, a.w, q.at[n][step][2], q.at[n][step][3]);
    }
  }
  __syncwarp();
  if (thread_index() % 32 < 4) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      shared->mean[8 * n + thread_index() % 4 * 2] = d[n][0];
      shared->mean[8 * n + thread_index() % 4 * 2 + 1] = d[n][1];
    }
  }
  __syncwarp();
}

// ---- V
enum class Form { kDense, kTokens, kChannels };  // 2:4 along tokens, along channels

// Bytes from a sub-block's values to fragment i of a half.
template <Form kForm>
__device__ __forceinline__ constexpr int value_fragment(int half, int i) {
  return kForm == Form::kTokens     ? (2 * i + half) * kFragment
         : kForm == Form::kChannels ? (i / 4 * 8 + half * 4 + i % 4) * kFragment
                                    : (i / 8 * 16 + half * 8 + i % 8) * kFragment;
}
// Metadata, where V is sparse; else words that nobody reads.  Along channels a half has two words of 64 channels.
template <int kD, bool kTokens>
struct ValueWords {
  uint32_t at[kTokens ? 4 : 2];  // of 64 channels
  __device__ __forceinline__ void load(const Side& v, int half, int c) {
    const uint8_t* from = v.at + 64 * kD + c * 512;
    if constexpr (kTokens) {
      const uint4 four = load16(from);
      at[0] = four.x, at[1] = four.y, at[2] = four.z, at[3] = four.w;
    } else {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(from) + half);
      at[0] = two.x, at[1] = two.y;
    }
  }
};

// One dense fragment: 64 channels c, 16 tokens m, plane j.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void multiply_dense(State<kD, kTiles>& state, const uint32_t (&p)[kTiles][2][2], int f,
                                               const uint4& a) {
  const int c = f / 8, m = f / 4 % 2, j = f % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) mma<T>(state.o[4 * c + j][n], a.x, a.y, a.z, a.w, p[n][m][0], p[n][m][1]);
}

// What is loaded of V before the probabilities are made; along channels registers have no room for it.
template <int kD>
struct Ahead {
  uint4 fragments[kAhead];
  ValueWords<kD, true> words;
  __device__ __forceinline__ void load(const Side& v, int half) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      fragments[i] =
          load16(v.at + (v.sparse ? value_fragment<Form::kTokens>(half, i) : value_fragment<Form::kDense>(half, i)));
    }
    words.load(v, half, 0);
  }
};

// O^T += V^T P^T of a half, 2:4 along tokens (`kSparse`) or dense.
template <typename T, bool kSparse, int kHalf, int kD, int kTiles>
__device__ __forceinline__ void multiply_values(State<kD, kTiles>& state, const uint32_t (&p)[kTiles][2][2],
                                                const Side& v, const Ahead<kD>& ahead) {
  constexpr Form kForm = kSparse ? Form::kTokens : Form::kDense;
  ValueWords<kD, true> words = ahead.words, next_words;
#pragma unroll
  for (int f = 0; f < (kSparse ? kD / 16 : kD / 8); ++f) {
    const uint4 a = f < kAhead ? ahead.fragments[f] : load16(v.at + value_fragment<kForm>(kHalf, f));
    if constexpr (kSparse) {
      if (f % 4 == 0 && f > 0) words = next_words;  // 64 channels begin
      if (f % 4 == 0 && f + 4 < kD / 16) next_words.load(v, kHalf, f / 4 + 1);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t b[4] = {p[n][0][0], p[n][0][1], p[n][1][0], p[n][1][1]};
        mma_sp<T, kHalf>(state.o[f][n], a, b, words.at[f % 4]);
      }
    } else {
      multiply_dense<T>(state, p, f, a);
    }
  }
}

// The same, 2:4 along channels or dense.
template <typename T, bool kSparse, int kHalf, int kD, int kTiles>
__device__ __forceinline__ void multiply_channels(State<kD, kTiles>& state, const uint32_t (&p)[kTiles][2][2],
                                                  const Side& v) {
  if constexpr (kSparse) {
#pragma unroll
    for (int c = 0; c < kD / 64; ++c) {
      ValueWords<kD, false> words;
      words.load(v, kHalf, c);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t plane[4][4];
        expand_channels(load16(v.at + value_fragment<Form::kChannels>(kHalf, 4 * c + 2 * m)),
                        load16(v.at + value_fragment<Form::kChannels>(kHalf, 4 * c + 2 * m + 1)), words.at[m], plane);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_dense<T>(state, p, 8 * c + 4 * m + j,
                            make_uint4(plane[j][0], plane[j][1], plane[j][2], plane[j][3]));
        }
      }
    }
  } else {
#pragma unroll
    for (int f = 0; f < kD / 8; ++f) {
      multiply_dense<T>(state, p, f, load16(v.at + value_fragment<Form::kDense>(kHalf, f)));
    }
  }
}

}  // namespace hierasparse::prefill_sm80
