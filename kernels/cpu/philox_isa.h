// Philox4x32-10, a counter-based random generator, on vectors. For *_isa.cpp files.
//
// kernels/dropout/reference.py is the definition: element (outer, row, column) of a tensor takes
// word column % 4 at counter (column / 4, row, outer, 0). Ten rounds of two 32×32 → 64 products
// make four words a lane.
#pragma once

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

// What a call drops. A word of at least `threshold` (up to 2³²) is kept, times `scale`.
struct DropoutRule {
  uint64_t seed, threshold;
  double scale;
};

// 0 or the scale for columns [0, n) of a row: out holds n rounded up to 4 * kLanes<float>.
template <class T>
NNARCH_INLINE void dropout_factors(const DropoutRule& rule, uint32_t outer, uint32_t row, int64_t n,
                                   T* out) {
  constexpr int lanes = kLanes<float>;
  const T kept[2] = {T(0), static_cast<T>(rule.scale)};
  for (int64_t first = 0; first < n; first += 4 * lanes) {
    Words quad;
    for (int i = 0; i < lanes; ++i) quad[i] = static_cast<uint32_t>(first / 4 + i);
    const PhiloxWords words = philox(rule.seed, quad, row - Words{}, outer - Words{});
    for (int i = 0; i < lanes; ++i) {
      T* at = out + first + 4 * i;
      at[0] = kept[words.w0[i] >= rule.threshold];
      at[1] = kept[words.w1[i] >= rule.threshold];
      at[2] = kept[words.w2[i] >= rule.threshold];
      at[3] = kept[words.w3[i] >= rule.threshold];
    }
  }
}

}  // namespace nnarch::NNARCH_ISA
