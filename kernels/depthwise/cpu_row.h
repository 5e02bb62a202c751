// Vectors along the rows of a plane: loads that stop at the edges, and every second element.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

// Elements at, at + 1, … of a row of `n`; those outside it are zero and their memory is not
// touched. INSIDE: the caller knows that there are none.
template <bool INSIDE, class T>
NNARCH_INLINE Vec<T> load_in_row(const T* row, int64_t at, int64_t n) {
  constexpr int64_t w = kLanes<T>;
  if constexpr (INSIDE) return load(row + at);
  const int64_t low = at >= 0 ? 0 : -at < w ? -at : w;
  const int64_t high = n - at >= w ? w : n - at > 0 ? n - at : 0;
#if defined(NNARCH_ISA_avx512)
  const unsigned mask = ((1u << high) - 1u) & ~((1u << low) - 1u);
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), row + at);
  else
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), row + at);
#elif defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(high)), lane);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(low)), lane);
    return (Vec<T>)_mm256_maskload_ps(row + at, _mm256_andnot_si256(before, below));
  } else {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    const __m256i below = _mm256_cmpgt_epi64(_mm256_set1_epi64x(high), lane);
    const __m256i before = _mm256_cmpgt_epi64(_mm256_set1_epi64x(low), lane);
    return (Vec<T>)_mm256_maskload_pd(row + at, _mm256_andnot_si256(before, below));
  }
#else
  Vec<T> v{};
  for (int64_t i = low; i < high; ++i) v[i] = row[at + i];
  return v;
#endif
}

// The elements of a and b at even (ODD: odd) places.
template <int ODD, class V>
NNARCH_INLINE V every_second(V a, V b) {
  constexpr int o = ODD;
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 16)
    return __builtin_shufflevector(a, b, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14,
                                   o + 16, o + 18, o + 20, o + 22, o + 24, o + 26, o + 28, o + 30);
  else if constexpr (lanes == 8)
    return __builtin_shufflevector(a, b, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14);
  else if constexpr (lanes == 4)
    return __builtin_shufflevector(a, b, o, o + 2, o + 4, o + 6);
  else
    return __builtin_shufflevector(a, b, o, o + 2);
}

// Taps C and C + 1 of a kernel row at stride 2, for even C, out of the same two loads.
template <bool INSIDE, int S, int C, class T>
NNARCH_INLINE void load_pair(const T* row, int64_t at, int64_t n, Vec<T>* value) {
  if constexpr (C % 2 == 0) {
    // The second vector may lie outside the row where only lanes that are not stored need it, so
    // the row's end bounds it always.
    const Vec<T> a = load_in_row<INSIDE>(row, at + C, n);
    const Vec<T> b = load_in_row<INSIDE>(row, at + C + kLanes<T>, n);
    value[C] = every_second<0>(a, b);
    if constexpr (C + 1 < S) value[C + 1] = every_second<1>(a, b);
  }
}

// What the taps of a kernel row meet, for the output vector whose first tap is at `at`.
template <int STRIDE, bool INSIDE, int S, class T, int... C>
NNARCH_INLINE void load_taps(const T* row, int64_t at, int64_t n, Vec<T>* value, Indices<C...>) {
  if constexpr (STRIDE == 1)
    ((value[C] = load_in_row<INSIDE>(row, at + C, n)), ...);
  else
    (load_pair<INSIDE, S, C>(row, at, n, value), ...);
}

}  // namespace nnarch::NNARCH_ISA
