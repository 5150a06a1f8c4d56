// Choices and losses of 16-bit values, two at a time: without sign, the bits of numbers compare as the numbers do.
#pragma once

#include "tile.cuh"

namespace hierasparse::compress {

constexpr uint32_t kMagnitudes = 0x7fff7fff, kSigns = 0x80008000;

template <typename T>
constexpr uint32_t kInfinities = std::is_same_v<T, __half> ? 0x7c007c00u : 0x7f807f80u;

HS_HD constexpr uint32_t select(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }
HS_HD constexpr uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (c & (a | b)); }

// ---- two of four, in two groups
struct ChosenPairs {
  uint32_t first, second;  // what the group in the low halves keeps, and the one in the high halves
  uint32_t code;           // nibble of the former; of the latter, from bit 20 on
};

// x[i] has value i of both groups; their magnitudes are the scores.
template <typename T>
__device__ __forceinline__ ChosenPairs choose_pairs(const uint32_t (&x)[4]) {
  uint32_t size[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) size[i] = __vminu2(x[i] & kMagnitudes, kInfinities<T>);  // a NaN is as large as that
  // In the top bit of each half: whether value i wins against value j. That bit also keeps the halves apart.
  auto wins = [&](int i, int j) { return (size[i] | kSigns) - size[j]; };
  const uint32_t ab = wins(0, 1), ac = wins(0, 2), ad = wins(0, 3), bc = wins(1, 2), bd = wins(1, 3), cd = wins(2, 3);
  const uint32_t kept[4] = {majority(ab, ac, ad), majority(~ab, bc, bd), majority(~ac, ~bc, cd),
                            majority(~ad, ~bd, ~cd)};
  uint32_t keep[4];  // all bits of the half
#pragma unroll
  for (int i = 0; i < 4; ++i) keep[i] = permute<0xbb99>(kept[i], kept[i]);
  const uint32_t i0 = select(keep[1], 0x00100001, 0x00200002) & ~keep[0];
  const uint32_t i1 = select(keep[3], 0x00c0000c, select(keep[2], 0x00800008, 0x00400004));
  return {select(keep[0], x[0], select(keep[1], x[1], x[2])), select(keep[3], x[3], select(keep[2], x[2], x[1])),
          i0 | i1};
}

// ---- losses
// The smaller two of the magnitudes of four neighbouring values ...
__device__ __forceinline__ uint32_t dropped_of_four(uint2 four) {
  const uint32_t x = four.x & kMagnitudes, y = four.y & kMagnitudes, low = __vminu2(x, y);
  return __vminu2(__vmaxu2(x, y), __byte_perm(low, low, 0x1032));
}

// ... and of two groups' four magnitudes each.
__device__ __forceinline__ uint2 dropped_of_two(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t low = __vminu2(a, b), low2 = __vminu2(c, d);
  return make_uint2(__vminu2(__vmaxu2(a, b), low2), __vminu2(low, __vmaxu2(c, d)));
}

// LossUnit for two magnitudes.
template <typename T>
struct PairLossUnit {
  LossUnit exact;
  float unit;    // their product, if `simple`
  uint32_t cap;  // the largest score's next power of two: what an infinite one counts
  bool simple;   // the product and the power are numbers of their types

  __device__ __forceinline__ explicit PairLossUnit(float top) : exact(loss_unit(top)) {
    unit = mul(exact.a, exact.b);
    const float power = mul(div(1.f, unit), float(1 << kLossBits));
    cap = pack<T>(power, power);
    simple = finite(unit) && (cap & 0xffff) < (kInfinities<T> & 0xffff);
  }
  template <bool kSimple>
  __device__ __forceinline__ uint32_t losses(uint32_t two) const {
    if constexpr (kSimple) {
      const float2 x = unpack<T>(__vminu2(two, cap));
      return floor_of_product(x.x, unit) + floor_of_product(x.y, unit);
    } else {
      const float2 x = unpack<T>(two);
      return loss(x.x, exact) + loss(x.y, exact);
    }
  }
};

}  // namespace hierasparse::compress
