// The rows of a slice times one state, gathered number by number. For *_isa.cpp files.
#pragma once

#include "cpu/simd.h"
#include "reservoir/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

// Four columns. One load and shifts for four 16-bit ones: on Zen 4 a load a column is 15 % slower,
// since the loads of the states are the limit.
struct Columns {
  uint64_t c[4];
};
NNARCH_INLINE Columns columns(const uint16_t* p) {
  uint64_t w;
  std::memcpy(&w, p, sizeof w);
  const auto low = static_cast<uint32_t>(w), high = static_cast<uint32_t>(w >> 32);
  return {{low & 0xffff, low >> 16, high & 0xffff, high >> 16}};
}
NNARCH_INLINE Columns columns(const int32_t* p) {
  uint32_t w[4];
  std::memcpy(w, p, sizeof w);
  return {{w[0], w[1], w[2], w[3]}};
}

// A part of a slice: as many of its rows as one gather makes.
#if defined(NNARCH_ISA_avx2) || defined(NNARCH_ISA_avx512)

NNARCH_INLINE __m256i eight_columns(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
NNARCH_INLINE __m256i eight_columns(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// GCC loads into a register first and inserts that: two instructions, 10 % slower.
template <int lane>
NNARCH_INLINE void insert(__m128& v, const float* p) {
  asm("vinsertps %2, %1, %0, %0" : "+x"(v) : "m"(*p), "i"(lane << 4));
}
template <class I>
NNARCH_INLINE __m128 gather4(const float* x, const I* at) {
  const Columns k = columns(at);
  __m128 v = _mm_load_ss(x + k.c[0]);
  insert<1>(v, x + k.c[1]);
  insert<2>(v, x + k.c[2]);
  insert<3>(v, x + k.c[3]);
  return v;
}
template <class I>
NNARCH_INLINE __m256d gather4(const double* x, const I* at) {
  const Columns k = columns(at);
  const __m128d low = _mm_loadh_pd(_mm_load_sd(x + k.c[0]), x + k.c[1]);
  const __m128d high = _mm_loadh_pd(_mm_load_sd(x + k.c[2]), x + k.c[3]);
  return _mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1);
}

// `gather` one by one: AVX-512's and AVX2's own gathers are 1.7 times slower on Zen 3 and Zen 4.
// `gather_at_once` where they are not.
template <class T>
struct Part;
template <>
struct Part<float> {
  static constexpr int P = 8;
  template <class I>
  static NNARCH_INLINE __m256 gather(const float* x, const I* at) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(gather4(x, at)), gather4(x, at + 4), 1);
  }
  template <class I>
  static NNARCH_INLINE __m256 gather_at_once(const float* x, const I* at) {
    return _mm256_i32gather_ps(x, eight_columns(at), 4);
  }
};
template <>
struct Part<double> {
#if defined(NNARCH_ISA_avx512)
  static constexpr int P = 8;
  template <class I>
  static NNARCH_INLINE __m512d gather(const double* x, const I* at) {
    return _mm512_insertf64x4(_mm512_castpd256_pd512(gather4(x, at)), gather4(x, at + 4), 1);
  }
  template <class I>
  static NNARCH_INLINE __m512d gather_at_once(const double* x, const I* at) {
    return _mm512_i32gather_pd(eight_columns(at), x, 8);
  }
#else
  static constexpr int P = 4;
  template <class I>
  static NNARCH_INLINE __m256d gather(const double* x, const I* at) {
    return gather4(x, at);
  }
#endif
};

#else

template <class T>
struct Part {
  static constexpr int P = kLanes<T>;
  template <class I>
  static NNARCH_INLINE Vec<T> gather(const T* x, const I* at) {
    Vec<T> v{};
    for (int j = 0; j < P; ++j) v[j] = x[at[j]];
    return v;
  }
};

#endif

template <class T>
struct PartVector {
  typedef T V __attribute__((vector_size(Part<T>::P * sizeof(T))));
  typedef T Unaligned
      __attribute__((vector_size(Part<T>::P * sizeof(T)), aligned(alignof(T)), may_alias));
};

#if defined(NNARCH_ISA_avx512)
constexpr bool kGathersAtOnce = true;
#else
constexpr bool kGathersAtOnce = false;
#endif

// z[row] = W·x for all rows; rows that no slice has go to z[n].
template <class T, bool AtOnce, class I>
NNARCH_INLINE void multiply_row(const Sliced<T>& m, const I* at, const T* x, T* z) {
  constexpr int P = Part<T>::P, parts = kSlice / P;
  typedef typename PartVector<T>::V V;
  typedef typename PartVector<T>::Unaligned U;
  const T* values = m.values;
  const int32_t* rows = m.rows;
  for (int64_t s = 0; s < m.slices; ++s, rows += kSlice) {
    V even[parts] = {}, odd[parts] = {};  // two chains of additions
    const auto add = [&](V(&sum)[parts], int64_t k) NNARCH_INLINE_LAMBDA {
      for (int p = 0; p < parts; ++p) {
        const int64_t i = k * kSlice + p * P;
        const U& weights = *reinterpret_cast<const U*>(values + i);
        if constexpr (AtOnce)
          sum[p] += weights * (V)Part<T>::gather_at_once(x, at + i);
        else
          sum[p] += weights * (V)Part<T>::gather(x, at + i);
      }
    };
    const int64_t length = m.lengths[s];
    int64_t k = 0;
    for (; k + 2 <= length; k += 2) {
      add(even, k);
      add(odd, k + 1);
    }
    if (k < length) add(even, k);
    values += length * kSlice;
    at += length * kSlice;
    for (int p = 0; p < parts; ++p) {
      const V sum = even[p] + odd[p];
      for (int j = 0; j < P; ++j) z[rows[p * P + j]] = sum[j];
    }
  }
}

}  // namespace nnarch::NNARCH_ISA
