// The products of a warp with a whole sub-block (64 tokens) that lies in the ring.
//
// Fragments are read kAhead before they are used, the first ones of a side during the product before.
#pragma once

#include "ring.cuh"

namespace hierasparse::prefill_sm80 {

constexpr int kAhead = 3;
constexpr int kRows = kSubTokens / 16;  // row tiles of a sub-block

// ---- K

// Metadata of two row tiles.
template <int kD>
struct KeyWords {
  static constexpr int kPairs = kD / 64;  // words of a row tile
  uint32_t at[2 * kPairs];
  __device__ __forceinline__ void load(uint32_t k, int half) {
    const uint32_t from = k + 64 * kD;
    if constexpr (kD == 64) {
      const uint2 two = load_shared8(from + half * 8);  // the lane's 16 bytes are four words
      at[0] = two.x, at[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < kPairs / 2; ++i) {
        const uint4 four = load_shared16(from + (half * (kPairs / 2) + i) * kFragment);
        at[4 * i] = four.x, at[4 * i + 1] = four.y, at[4 * i + 2] = four.z, at[4 * i + 3] = four.w;
      }
    }
  }
};

// The order of K's fragments: two row tiles at a time, so that six products in turn do not wait for each other.
template <int kD, bool kIsSparse>
struct KeyOrder {
  static constexpr int kSteps = kIsSparse ? kD / 32 : kD / 16, kCount = kRows * kSteps;
  static constexpr int row(int i) { return i / (2 * kSteps) * 2 + i % 2; }
  static constexpr int step(int i) { return i / 2 % kSteps; }
  static constexpr int offset(int i) { return (row(i) * kSteps + step(i)) * kFragment; }
};

// The first fragments of a sub-block's K.
template <int kD>
struct Keys {
  uint4 fragments[kAhead];
  KeyWords<kD> words;
  __device__ __forceinline__ void load(uint32_t k, bool sparse, int i) {
    fragments[i] = load_shared16(k + (sparse ? KeyOrder<kD, true>::offset(i) : KeyOrder<kD, false>::offset(i)));
    if (i == 0) words.load(k, 0);
  }
  __device__ __forceinline__ void load(uint32_t k, bool sparse) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(k, sparse, i);
  }
};

// S^T.
template <typename T, bool kIsSparse, int kD, int kTiles>
__device__ __forceinline__ void multiply_keys(float (&s)[kRows][kTiles][4], const Queries<kD, kTiles>& q, uint32_t k,
                                              Keys<kD>& first) {
  using Order = KeyOrder<kD, kIsSparse>;
  KeyWords<kD> words = first.words, next_words;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < Order::kCount; ++i) {
    const int row = Order::row(i), step = Order::step(i);
    const uint4 a = first.fragments[i % kAhead];
    if (i + kAhead < Order::kCount) first.fragments[i % kAhead] = load_shared16(k + Order::offset(i + kAhead));
    if (kIsSparse && i == Order::kCount / 2 - 4) next_words.load(k, 1);
    if (kIsSparse && i == Order::kCount / 2) words = next_words;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if constexpr (kIsSparse) {
        const uint32_t word = words.at[row % 2 * KeyWords<kD>::kPairs + step / 2];
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

// scale_log2 * q . mean for a batch of pages: row g of operand A is page g.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void multiply_means(float scale_log2, Shared<kD, kTiles>& shared,
                                               const Queries<kD, kTiles>& q) {
  const int warp = thread_index() / 32, g = thread_index() % 32 / 4, t = thread_index() % 4;
  float d[kTiles][4] = {};
  const uint32_t means = shared_address(shared.means[g]) + t * 16;
#pragma unroll
  for (int step = 0; step < kD / 32; ++step) {
    const uint4 a = load_shared16(means + step * 64);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      mma<T>(d[n], a.x, 0, a.y, 0, q.at[n][step][0], q.at[n][step][1]);
      mma<T>(d[n], a.z, 0, a.w, 0, q.at[n][step][2], q.at[n][step][3]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    shared.own[warp].mean[g][8 * n + 2 * t] = d[n][0] * scale_log2;
    shared.own[warp].mean[g][8 * n + 2 * t + 1] = d[n][1] * scale_log2;
  }
  __syncwarp();
}

// ---- V
enum class Form { kDense, kTokens, kChannels };  // 2:4 along tokens, along channels

template <int kD, Form kForm>
struct ValueOrder {
  static constexpr int kCount = kForm == Form::kDense ? kD / 4 : kD / 8;
  // Along tokens a fragment is a row tile and half the tokens; all row tiles of 64 channels in turn, then the other
  // half.
  static constexpr int offset(int i) {
    return (kForm == Form::kTokens ? i / 8 * 8 + i % 4 * 2 + i / 4 % 2 : i) * kFragment;
  }
};

// The first fragments of a sub-block's V.
template <int kD>
struct Values {
  uint4 fragments[kAhead];
  uint4 words;  // of 64 channels, where V is sparse; else nobody reads them
  template <bool kTokens>
  __device__ __forceinline__ void load(uint32_t v, bool sparse) {
    constexpr Form kForm = kTokens ? Form::kTokens : Form::kChannels;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      fragments[i] =
          load_shared16(v + (sparse ? ValueOrder<kD, kForm>::offset(i) : ValueOrder<kD, Form::kDense>::offset(i)));
    }
    words = load_shared16(v + 64 * kD);
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// One dense fragment: 64 channels c, 16 tokens m, plane j.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void multiply_dense(State<kD, kTiles>& state, const uint32_t (&p)[kTiles][kRows][2], int c,
                                               int m, int j, const uint4& a) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) mma<T>(state.o[4 * c + j][n], a.x, a.y, a.z, a.w, p[n][m][0], p[n][m][1]);
}

// O^T += V^T P^T.  `next(i)` reads fragment i of the next sub-block's K, when V's last ones leave registers for it.
template <typename T, Form kForm, int kD, int kTiles, typename Next>
__device__ __forceinline__ void multiply_values(State<kD, kTiles>& state, const uint32_t (&p)[kTiles][kRows][2],
                                                uint32_t v, Values<kD>& first, Next next) {
  using Order = ValueOrder<kD, kForm>;
  uint4 words = first.words;
  auto take = [&](int i) {
    const uint4 a = first.fragments[i % kAhead];
    if (i + kAhead < Order::kCount) {
      first.fragments[i % kAhead] = load_shared16(v + Order::offset(i + kAhead));
    } else {
      next(i + kAhead - Order::kCount);
    }
    return a;
  };
  if constexpr (kForm == Form::kChannels) {
#pragma unroll
    for (int i = 0; i < Order::kCount / 2; ++i) {
      const int c = i / 4, m = i % 4;
      const uint4 low = take(2 * i), high = take(2 * i + 1);
      uint32_t plane[4][4];
      expand_channels(low, high, word_of(words, m), plane);
      if (m == 3 && c + 1 < kD / 64) words = load_shared16(v + 64 * kD + (c + 1) * kFragment);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply_dense<T>(state, p, c, m, j, make_uint4(plane[j][0], plane[j][1], plane[j][2], plane[j][3]));
      }
    }
  } else {
    uint4 next_words;
#pragma unroll
    for (int i = 0; i < Order::kCount; ++i) {
      const uint4 a = take(i);
      if constexpr (kForm == Form::kTokens) {
        const int c = i / 8, half = i / 4 % 2, j = i % 4;
        if (i % 8 == 4 && c + 1 < kD / 64) next_words = load_shared16(v + 64 * kD + (c + 1) * kFragment);
        if (i % 8 == 0 && i > 0) words = next_words;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint32_t b[4] = {p[n][2 * half][0], p[n][2 * half][1], p[n][2 * half + 1][0], p[n][2 * half + 1][1]};
          if (half == 0) {
            mma_sp<T, 0>(state.o[4 * c + j][n], a, b, word_of(words, j));
          } else {
            mma_sp<T, 1>(state.o[4 * c + j][n], a, b, word_of(words, j));
          }
        }
      } else {
        multiply_dense<T>(state, p, i / 16, i / 4 % 4, i % 4, a);
      }
    }
  }
}

}  // namespace hierasparse::prefill_sm80
