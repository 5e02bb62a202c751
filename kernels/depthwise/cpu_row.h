// Vectors along the rows of a plane: loads that stop at the edges, and every second element.
#pragma once

#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {

// The lanes of a vector at place `at` of a row that lie in its first `n` elements. Made once for a
// block and used in all its rows: made at every load it cost more than the arithmetic.
template <class T>
struct RowMask {
#if defined(NNARCH_ISA_avx512)
  unsigned lanes;
#elif defined(NNARCH_ISA_avx2)
  __m256i lanes;
#else
  int64_t low, high;
#endif
};

template <class T>
NNARCH_INLINE RowMask<T> lanes_in_row(int64_t at, int64_t n) {
  constexpr int64_t w = kLanes<T>;
  const int64_t low = at >= 0 ? 0 : -at < w ? -at : w;
  const int64_t high = n - at >= w ? w : n - at > 0 ? n - at : 0;
#if defined(NNARCH_ISA_avx512)
  return {((1u << high) - 1u) & ~((1u << low) - 1u)};
#elif defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(high)), lane);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(low)), lane);
    return {_mm256_andnot_si256(before, below)};
  } else {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    const __m256i below = _mm256_cmpgt_epi64(_mm256_set1_epi64x(high), lane);
    const __m256i before = _mm256_cmpgt_epi64(_mm256_set1_epi64x(low), lane);
    return {_mm256_andnot_si256(before, below)};
  }
#else
  return {low, high};
#endif
}

// The other lanes are zero and their memory is not touched. INSIDE: there are none.
template <bool INSIDE, class T>
NNARCH_INLINE Vec<T> load_in_row(const T* p, const RowMask<T>& mask) {
  if constexpr (INSIDE) return load(p);
#if defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask.lanes), p);
  else
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask.lanes), p);
#elif defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_maskload_ps(p, mask.lanes);
  else
    return (Vec<T>)_mm256_maskload_pd(p, mask.lanes);
#else
  Vec<T> v{};
  for (int64_t i = mask.low; i < mask.high; ++i) v[i] = p[i];
  return v;
#endif
}

// Stores those lanes and touches no other memory.
template <bool INSIDE, class T>
NNARCH_INLINE void store_in_row(T* p, Vec<T> v, const RowMask<T>& mask) {
  if constexpr (INSIDE) return store(p, v);
#if defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask.lanes), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask.lanes), (__m512d)v);
#elif defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4)
    _mm256_maskstore_ps(p, mask.lanes, (__m256)v);
  else
    _mm256_maskstore_pd(p, mask.lanes, (__m256d)v);
#else
  for (int64_t i = mask.low; i < mask.high; ++i) p[i] = v[i];
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

// The masks of what a kernel row of S taps loads for the first `outputs` lanes of a vector whose
// first tap is at `at`. At stride 2 taps C and C + 1, for even C, come out of the same two loads.
template <int STRIDE, int S, class T>
NNARCH_INLINE void make_masks(int64_t at, int64_t n, int64_t outputs, RowMask<T>* mask) {
#pragma GCC unroll 8
  for (int c = 0; c < S; c += STRIDE) {
    const int64_t end = at + c + STRIDE * outputs, stop = end < n ? end : n;
    mask[c] = lanes_in_row<T>(at + c, stop);
    if (STRIDE == 2) mask[c + 1] = lanes_in_row<T>(at + c + kLanes<T>, stop);
  }
}

template <bool INSIDE, int S, int C, class T>
NNARCH_INLINE void load_pair(const T* p, const RowMask<T>* mask, Vec<T>* value) {
  if constexpr (C % 2 == 0) {
    const Vec<T> a = load_in_row<INSIDE>(p + C, mask[C]);
    const Vec<T> b = load_in_row<INSIDE>(p + C + kLanes<T>, mask[C + 1]);
    value[C] = every_second<0>(a, b);
    if constexpr (C + 1 < S) value[C + 1] = every_second<1>(a, b);
  }
}

// What the taps of a kernel row meet, the first of them at p.
template <int STRIDE, bool INSIDE, int S, class T, int... C>
NNARCH_INLINE void load_taps(const T* p, const RowMask<T>* mask, Vec<T>* value, Indices<C...>) {
  if constexpr (STRIDE == 1)
    ((value[C] = load_in_row<INSIDE>(p + C, mask[C])), ...);
  else
    (load_pair<INSIDE, S, C>(p, mask, value), ...);
}

}  // namespace nnarch::NNARCH_ISA
