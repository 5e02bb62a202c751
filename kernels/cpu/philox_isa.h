// Philox4x32-10, a counter-based random generator, on vectors. For *_isa.cpp files.
//
// kernels/dropout/reference.py is the definition: element (outer, row, column) of a tensor takes
// word column % 4 at counter (column / 4, row, outer, 0). Ten rounds of two 32×32 → 64 products
// make four words a lane.
#pragma once

#include "cpu/dropout.h"
#include "cpu/math.h"

namespace nnarch::NNARCH_ISA {

using Words = Bits<float>::V;      // 32-bit lanes
using WidePair = Bits<double>::V;  // 64-bit lanes

struct PhiloxWords {
  Words w0, w1, w2, w3;
};

// 64-bit products of the even lanes of `a` and `b` (their high halves are ignored).
NNARCH_INLINE WidePair multiply_even(WidePair a, WidePair b) {
#if defined(NNARCH_ISA_avx512)
  return (WidePair)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(NNARCH_ISA_avx2)
  return (WidePair)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

NNARCH_INLINE void multiply_wide(Words a, uint32_t by, Words& high, Words& low) {
  const WidePair multiplier = by - WidePair{};
  const WidePair even = multiply_even((WidePair)a, multiplier);
  const WidePair odd = multiply_even((WidePair)a >> 32, multiplier);
  constexpr uint64_t upper = 0xFFFFFFFF00000000u;
  high = (Words)((even >> 32) | (odd & upper));
  low = (Words)((even & ~upper) | (odd << 32));
}

NNARCH_INLINE PhiloxWords philox(uint64_t seed, Words c0, Words c1, Words c2) {
  Words c3{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    Words high_a, low_a, high_b, low_b;
    multiply_wide(c0, 0xD2511F53u, high_a, low_a);
    multiply_wide(c2, 0xCD9E8D57u, high_b, low_b);
    c0 = high_b ^ c1 ^ k0;
    c1 = low_b;
    c2 = high_a ^ c3 ^ k1;
    c3 = low_a;
  }
  return {c0, c1, c2, c3};
}

// Lane i of a step works on quad `quad_order()[i]`, counted from the step's first: then two
// interleavings within 128 bits bring the words into the order of elements, and no lane crosses.
NNARCH_INLINE Words quad_order() {
  constexpr int lanes = kLanes<float>;
  Words order;
  for (int i = 0; i < lanes; ++i) order[i] = static_cast<uint32_t>(i % 4 * (lanes / 4) + i / 4);
  return order;
}

template <int first, int... I>
NNARCH_INLINE Words interleave(Indices<I...>, Words a, Words b) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + first + I % 4 / 2 + I % 2 * lanes)...);
}
template <int first, int... I>
NNARCH_INLINE Words interleave_pairs(Indices<I...>, Words a, Words b) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + first + I % 2 + I % 4 / 2 * lanes)...);
}

// The words of 4 * lanes elements one after the other, from quads in that order.
struct ElementWords {
  Words v[4];
  NNARCH_INLINE explicit ElementWords(const PhiloxWords& w) {
    constexpr MakeIndices<kLanes<float>> each{};
    const Words low01 = interleave<0>(each, w.w0, w.w1), high01 = interleave<2>(each, w.w0, w.w1);
    const Words low23 = interleave<0>(each, w.w2, w.w3), high23 = interleave<2>(each, w.w2, w.w3);
    v[0] = interleave_pairs<0>(each, low01, low23), v[1] = interleave_pairs<2>(each, low01, low23);
    v[2] = interleave_pairs<0>(each, high01, high23);
    v[3] = interleave_pairs<2>(each, high01, high23);
  }
};

NNARCH_INLINE void store_factors(const DropoutRule& rule, const PhiloxWords& words, float* out) {
  const ElementWords in_order(words);
  // At a threshold of 2^32 the scale is 0 as well.
  const uint32_t threshold =
      rule.threshold > 0xFFFFFFFFu ? 0 : static_cast<uint32_t>(rule.threshold);
  const Words kept = (Words)broadcast<float>(static_cast<float>(rule.scale));
  for (int k = 0; k < 4; ++k)
    store(out + k * kLanes<float>, (Vec<float>)((Words)(in_order.v[k] >= threshold) & kept));
}
NNARCH_INLINE void store_factors(const DropoutRule& rule, const PhiloxWords& words, double* out) {
  const ElementWords in_order(words);
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < kLanes<float>; ++i)
      *out++ = in_order.v[k][i] >= rule.threshold ? rule.scale : 0.0;
}

// 0 or the scale for quads [first, first + count) of rows that are all `quads` of them long: `out`
// has room for `count` rounded up to kLanes<float>, four factors each.
template <class T>
NNARCH_INLINE void quad_factors(const DropoutRule& rule, uint32_t outer, int64_t quads,
                                int64_t first, int64_t count, T* out) {
  constexpr int lanes = kLanes<float>;
  const auto row_quads = static_cast<uint32_t>(quads);
  const int wraps = quads >= lanes ? 1 : static_cast<int>((lanes + quads - 1) / quads);
  Words quad = quad_order() + static_cast<uint32_t>(first % quads);
  Words row = static_cast<uint32_t>(first / quads) - Words{};
  for (int64_t i = 0; i < count; i += lanes, out += 4 * lanes, quad += lanes) {
    for (int w = 0; w < wraps; ++w) {
      const Words over = (Words)(quad >= row_quads);
      quad -= over & row_quads;
      row += over & 1u;
    }
    store_factors(rule, philox(rule.seed, quad, row, outer - Words{}), out);
  }
}

// The same for columns [0, n) of a row: out holds n rounded up to 4 * kLanes<float>.
template <class T>
NNARCH_INLINE void dropout_factors(const DropoutRule& rule, uint32_t outer, uint32_t row, int64_t n,
                                   T* out) {
  Words quad = quad_order();
  for (int64_t first = 0; first < n; first += 4 * kLanes<float>, quad += kLanes<float>)
    store_factors(rule, philox(rule.seed, quad, row - Words{}, outer - Words{}), out + first);
}

}  // namespace nnarch::NNARCH_ISA
