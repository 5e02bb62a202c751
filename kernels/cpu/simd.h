// Vectors of the instruction set being compiled, for float and double, from one source.
//
// GCC and Clang vector types do the arithmetic: +, -, *, /, comparisons and `mask ? a : b` work on
// them, and a*b+c becomes one FMA where the set has it. Included by *_isa.cpp files only; all of
// it lives in the set's own namespace, so that no function compiled for one set is linked into
// another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(NNARCH_ISA_avx2) || defined(NNARCH_ISA_avx512)
#include <immintrin.h>
#endif

#ifndef NNARCH_ISA
#error "simd.h belongs in *_isa.cpp sources, which are compiled once per instruction set"
#endif

#define NNARCH_INLINE inline __attribute__((always_inline))
#define NNARCH_NOINLINE __attribute__((noinline))
// GCC keeps a generic lambda of some size as a function, with its captures in memory.
#define NNARCH_INLINE_LAMBDA __attribute__((always_inline))

namespace nnarch::NNARCH_ISA {

#if defined(NNARCH_ISA_avx512)
inline constexpr int kVectorBytes = 64;
#elif defined(NNARCH_ISA_avx2)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd {
  static constexpr int W = kVectorBytes / static_cast<int>(sizeof(T));  // lanes
  typedef T V __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
inline constexpr int kLanes = Simd<T>::W;

template <class T>
NNARCH_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
NNARCH_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

template <class T>
NNARCH_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 keeps the sign of zero
}

// Past the caches, straight to memory: a line that is written whole need not be read first. `p` is
// aligned to the vector, and `finish_streaming` comes before another thread may look.
template <class T>
NNARCH_INLINE void stream(T* p, Vec<T> v) {
#if defined(NNARCH_ISA_avx512)
  _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif defined(NNARCH_ISA_avx2)
  _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#else
  store(p, v);
#endif
}

NNARCH_INLINE void finish_streaming() {
#if defined(NNARCH_ISA_avx2) || defined(NNARCH_ISA_avx512)
  _mm_sfence();
#endif
}

// The first n lanes (0 <= n <= W); the other lanes are zero and their memory is not touched.
template <class T>
NNARCH_INLINE Vec<T> load_n(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
#if defined(NNARCH_ISA_avx512)
  const auto mask = static_cast<unsigned>((1u << n) - 1u);
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  else
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
#elif defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
    return (Vec<T>)_mm256_maskload_ps(p, mask);
  } else {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane);
    return (Vec<T>)_mm256_maskload_pd(p, mask);
  }
#else
  Vec<T> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

// Stores the first n lanes (0 <= n <= W) and touches no other memory.
template <class T>
NNARCH_INLINE void store_n(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return store(p, v);
#if defined(NNARCH_ISA_avx512)
  const auto mask = static_cast<unsigned>((1u << n) - 1u);
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
#elif defined(NNARCH_ISA_avx2)
  // In halves of what is left: 2 to 5 cycles. A masked store takes 15 on Zen 3.
  if constexpr (sizeof(T) == 4) {
    __m128 part = _mm256_castps256_ps128((__m256)v);
    if (n & 4) {
      _mm_storeu_ps(p, part);
      part = _mm256_extractf128_ps((__m256)v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
      part = _mm_movehl_ps(part, part);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, part);
  } else {
    __m128d part = _mm256_castpd256_pd128((__m256d)v);
    if (n & 2) {
      _mm_storeu_pd(p, part);
      part = _mm256_extractf128_pd((__m256d)v, 1);
      p += 2;
    }
    if (n & 1) _mm_store_sd(p, part);
  }
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Lane-wise maximum and minimum. A NaN in either operand gives NaN, as in torch.
template <class T>
NNARCH_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  const Vec<T> m = a > b ? a : b;  // b where a is NaN
  return a == a ? m : a;
}
template <class T>
NNARCH_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  const Vec<T> m = a < b ? a : b;
  return a == a ? m : a;
}

// min(max(x, low), high), where x is NaN: NaN. The bounds are never NaN.
template <class T>
NNARCH_INLINE Vec<T> clamp(Vec<T> x, Vec<T> low, Vec<T> high) {
#if defined(NNARCH_ISA_avx2)
  // vmaxps returns its second operand when either is NaN, so x goes second.
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)x));
  else
    return (Vec<T>)_mm256_min_pd((__m256d)high, _mm256_max_pd((__m256d)low, (__m256d)x));
#elif defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
  else
    return (Vec<T>)_mm512_min_pd((__m512d)high, _mm512_max_pd((__m512d)low, (__m512d)x));
#else
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}

// max(x, low), where x is NaN: NaN.
template <class T>
NNARCH_INLINE Vec<T> at_least(Vec<T> x, Vec<T> low) {
#if defined(NNARCH_ISA_avx2)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_max_ps((__m256)low, (__m256)x);
  else
    return (Vec<T>)_mm256_max_pd((__m256d)low, (__m256d)x);
#elif defined(NNARCH_ISA_avx512)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_max_ps((__m512)low, (__m512)x);
  else
    return (Vec<T>)_mm512_max_pd((__m512d)low, (__m512d)x);
#else
  return x < low ? low : x;
#endif
}

// Keeps a value in a register: the compiler may not fold its load into each use.
template <class V>
NNARCH_INLINE void keep_in_register(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// A number known to the compiler, as an argument.
template <int N>
struct Count {
  static constexpr int count = N;
};

// Compile-time index lists (std::index_sequence would bring std templates into ISA sources).
template <int... I>
struct Indices {};
#if defined(__clang__)
template <class, int... I>
using MakeIndicesImpl = Indices<I...>;
template <int N>
using MakeIndices = __make_integer_seq<MakeIndicesImpl, int, N>;
#else
template <int N>
using MakeIndices = Indices<__integer_pack(N)...>;
#endif

template <class V, int... I>
NNARCH_INLINE auto add_halves(V v, Indices<I...>) {
  constexpr int half = sizeof...(I);
  return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (half + I)...);
}

// The sum of all lanes, by halves: lane after lane would wait for each addition.
template <class T, class V>
NNARCH_INLINE T horizontal_sum(V v) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  if constexpr (lanes == 2)
    return v[0] + v[1];
  else
    return horizontal_sum<T>(add_halves(v, MakeIndices<lanes / 2>{}));
}

}  // namespace nnarch::NNARCH_ISA
