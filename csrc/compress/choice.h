// Which values stay and what becomes of them: the arithmetic of hierasparse_vllm/policy.py, for host and device.
//
// Pages must have the same bytes whoever packs them, so every operation here rounds once: add() and mul() are never
// contracted into an FMA. tests/unit/test_compress_math.py compares each function with policy.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../page.h"

namespace hierasparse::compress {

#if defined(__CUDA_ARCH__)
HS_HD inline float add(float a, float b) { return __fadd_rn(a, b); }
HS_HD inline float mul(float a, float b) { return __fmul_rn(a, b); }
HS_HD inline float div(float a, float b) { return __fdiv_rn(a, b); }
HS_HD inline float root(float a) { return __fsqrt_rn(a); }
#else
HS_HD inline float add(float a, float b) { return a + b; }
HS_HD inline float mul(float a, float b) { return a * b; }
HS_HD inline float div(float a, float b) { return a / b; }
HS_HD inline float root(float a) { return sqrtf(a); }
#endif

HS_HD inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
HS_HD inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
HS_HD inline bool finite(float x) { return fabsf(x) < INFINITY; }  // a NaN compares false

// Sum of N numbers, neighbours first: the one order of all sums here.
template <int N>
HS_HD inline float tree_sum(const float* x) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    return add(tree_sum<N / 2>(x), tree_sum<N / 2>(x + N / 2));
  }
}

// Mean of a page's channel, not yet rounded to the cache's dtype; 1 / 256 is a power of two, so this is the quotient.
HS_HD inline float mean_of_sum(float sum) {
  const float mean = mul(sum, 1.f / kPageTokens);
  return finite(mean) ? mean : 0.f;
}

// A NaN counts as the largest score.
HS_HD inline float score(float value, float weight) {
  const float s = mul(fabsf(value), weight);
#if defined(__CUDA_ARCH__)
  return fminf(s, INFINITY);  // one instruction, which takes the operand that is no NaN
#else
  return s < INFINITY ? s : INFINITY;  // glibc's fminf gives a NaN for a signaling one
#endif
}

// ---- two of four -----------------------------------------------------------------------------------------------
struct Chosen {
  uint32_t code;     // nibble of the kept pair, i0 | i1 << 2 with i0 < i1
  float value[2];    // the kept values, in this order
  float kept[2];     // their scores, in any order
  float dropped[2];  // the others'
};

// Of four values the two with the highest scores; of equal ones the first.
HS_HD inline Chosen choose(const float (&s)[4], const float (&x)[4]) {
  const float high = fmaxf(s[0], s[1]), low = fminf(s[0], s[1]);
  const float high2 = fmaxf(s[2], s[3]), low2 = fminf(s[2], s[3]);
  const bool first = s[0] >= s[1], third = s[2] >= s[3];  // the better one of each half
  uint32_t code = (first ? 0u : 1u) | (third ? 2u << 2 : 3u << 2);
  float a = first ? x[0] : x[1], b = third ? x[2] : x[3];
  if (low >= high2) code = 0u | 1u << 2, a = x[0], b = x[1];
  if (low2 > high) code = 2u | 3u << 2, a = x[2], b = x[3];
  return {code, {a, b}, {fmaxf(high, low2), fmaxf(low, high2)}, {fminf(high, low2), fminf(low, high2)}};
}

// ---- loss ------------------------------------------------------------------------------------------------------
// Losses are integers in units of 2^(e - 16), where e is the frexp exponent of the page's largest finite score. The
// reference multiplies in float64; two float32 steps give the same integers: upwards both are exact, since nothing
// exceeds 2^16; downwards they may round only what is below 2^-126, hence 0 either way.
constexpr int kLossBits = 16;
struct LossUnit {
  float a, b;  // both multiply
};

HS_HD inline int frexp_exponent(float x) {  // of a finite x >= 0
  const uint32_t bits = as_bits(x);
  if (bits == 0) return 0;
  if (bits >> 23 != 0) return static_cast<int>(bits >> 23) - 126;
  int exponent = -149;
  for (uint32_t rest = bits; rest != 0; rest >>= 1) ++exponent;
  return exponent;
}

HS_HD inline LossUnit loss_unit(float top) {
  const int n = kLossBits - frexp_exponent(top), half = n / 2;  // n is -112 to 164
  return {as_float(static_cast<uint32_t>(half + 127) << 23), as_float(static_cast<uint32_t>(n - half + 127) << 23)};
}

// An infinite score counts 2^16, more than any finite one. The sum over a sub-block is below 2^30.
HS_HD inline uint32_t loss(float dropped, const LossUnit& unit) {
  return static_cast<uint32_t>(fminf(mul(mul(dropped, unit.a), unit.b), float(1 << kLossBits)));
}
HS_HD inline uint32_t loss(const Chosen& c, const LossUnit& unit) {
  return loss(c.dropped[0], unit) + loss(c.dropped[1], unit);
}

// floor(x * unit) for a product up to 2^16: the last bits of a sum with 2^23, in one instruction.
HS_HD inline uint32_t floor_of_product(float x, float unit) {
#if defined(__CUDA_ARCH__)
  return as_bits(__fmaf_rz(x, unit, 0x1p23f)) - as_bits(0x1p23f);
#else
  return static_cast<uint32_t>(static_cast<double>(x) * unit);
#endif
}

// The `sparse` sub-blocks that lose least, as a mask; of equal ones the first.
HS_HD inline uint32_t sparse_mask(const uint32_t (&losses)[kSubs], int sparse) {
  uint32_t mask = 0;
  for (int i = 0; i < kSubs; ++i) {
    int before = 0;
    for (int j = 0; j < kSubs; ++j) before += losses[j] < losses[i] || (losses[j] == losses[i] && j < i);
    if (before < sparse) mask |= 1u << i;
  }
  return mask;
}

// ---- what is stored --------------------------------------------------------------------------------------------
// A group's part in its token's norm, and that of its kept pair; the zeros that the reference adds change no sum.
HS_HD inline float sum_of_squares(float a, float b) { return add(mul(a, a), mul(b, b)); }
HS_HD inline float sum_of_squares(const float (&s)[4]) {
  return add(sum_of_squares(s[0], s[1]), sum_of_squares(s[2], s[3]));
}
HS_HD inline float kept_squares(const Chosen& c) { return sum_of_squares(c.kept[0], c.kept[1]); }

// Factor that gives the kept values of a token the norm of the whole token: `whole` and `kept` are sums of squared
// scores. At most the root of 2, since two of four are kept. The float32 root is the correctly rounded one, as is the
// reference's, which takes it in float64.
HS_HD inline float norm_factor(float whole, float kept) {
  const float factor = root(div(whole, kept));
  return finite(factor) ? fmaxf(factor, 1.f) : 1.f;
}

// Factor that gives the kept pair of a group the sum of the four.
HS_HD inline float sum_factor(const float (&four)[4], float kept0, float kept1) {
  const float factor = div(tree_sum<4>(four), add(kept0, kept1));
  return finite(factor) ? fminf(fmaxf(factor, 0.5f), 2.f) : 1.f;
}

// How far kept values may go, so that what was finite is read finite.
struct Room {
  float limit;  // largest value of the dtype
  float most;   // of the sum with the mean: one unit less, since the stored difference is rounded; `limit` without mean
};

// `value` after the mean was taken off, times `factor`, within the room. The first line is a short cut: so far from the
// limits no bound is near.
HS_HD inline float corrected(float value, float factor, float mean, const Room& room) {
  const float scaled = mul(value, factor);
  if (fabsf(scaled) <= room.limit / 4 && fabsf(mean) <= room.limit / 2) return scaled;
  if (!finite(value)) return scaled;
  const float low = fmaxf(add(-room.most, -mean), -room.limit), high = fminf(add(room.most, -mean), room.limit);
  return fminf(fmaxf(scaled, low), high);
}

}  // namespace hierasparse::compress
