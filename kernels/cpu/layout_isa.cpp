// Transposition of a matrix by register tiles.
#include "cpu/layout.h"
#include "cpu/simd.h"
#include "cpu/transpose_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

#if defined(NNARCH_ISA_avx2) || defined(NNARCH_ISA_avx512)
// 8 x 8 floats.
NNARCH_INLINE void transpose_eight(const float* src, int64_t ss, float* dst, int64_t ds) {
  __m256 r0 = _mm256_loadu_ps(src), r1 = _mm256_loadu_ps(src + ss);
  __m256 r2 = _mm256_loadu_ps(src + 2 * ss), r3 = _mm256_loadu_ps(src + 3 * ss);
  __m256 r4 = _mm256_loadu_ps(src + 4 * ss), r5 = _mm256_loadu_ps(src + 5 * ss);
  __m256 r6 = _mm256_loadu_ps(src + 6 * ss), r7 = _mm256_loadu_ps(src + 7 * ss);
  const __m256 a0 = _mm256_unpacklo_ps(r0, r1), a1 = _mm256_unpackhi_ps(r0, r1);
  const __m256 a2 = _mm256_unpacklo_ps(r2, r3), a3 = _mm256_unpackhi_ps(r2, r3);
  const __m256 a4 = _mm256_unpacklo_ps(r4, r5), a5 = _mm256_unpackhi_ps(r4, r5);
  const __m256 a6 = _mm256_unpacklo_ps(r6, r7), a7 = _mm256_unpackhi_ps(r6, r7);
  r0 = _mm256_shuffle_ps(a0, a2, 0x44), r1 = _mm256_shuffle_ps(a0, a2, 0xEE);
  r2 = _mm256_shuffle_ps(a1, a3, 0x44), r3 = _mm256_shuffle_ps(a1, a3, 0xEE);
  r4 = _mm256_shuffle_ps(a4, a6, 0x44), r5 = _mm256_shuffle_ps(a4, a6, 0xEE);
  r6 = _mm256_shuffle_ps(a5, a7, 0x44), r7 = _mm256_shuffle_ps(a5, a7, 0xEE);
  _mm256_storeu_ps(dst, _mm256_permute2f128_ps(r0, r4, 0x20));
  _mm256_storeu_ps(dst + ds, _mm256_permute2f128_ps(r1, r5, 0x20));
  _mm256_storeu_ps(dst + 2 * ds, _mm256_permute2f128_ps(r2, r6, 0x20));
  _mm256_storeu_ps(dst + 3 * ds, _mm256_permute2f128_ps(r3, r7, 0x20));
  _mm256_storeu_ps(dst + 4 * ds, _mm256_permute2f128_ps(r0, r4, 0x31));
  _mm256_storeu_ps(dst + 5 * ds, _mm256_permute2f128_ps(r1, r5, 0x31));
  _mm256_storeu_ps(dst + 6 * ds, _mm256_permute2f128_ps(r2, r6, 0x31));
  _mm256_storeu_ps(dst + 7 * ds, _mm256_permute2f128_ps(r3, r7, 0x31));
}
#endif

// Square tiles: as wide as a cache line under AVX-512, whose every line is written once then, and
// smaller ones for what is left.
template <int Side, class T>
NNARCH_INLINE void transpose_tile(const T* src, int64_t ss, T* dst, int64_t ds) {
#if defined(NNARCH_ISA_avx512)
  if constexpr (Side == kLanes<T>) return transpose_square<T>(src, ss, dst, ds);
#endif
#if defined(NNARCH_ISA_avx2) || defined(NNARCH_ISA_avx512)
  if constexpr (Side == 8 && sizeof(T) == 4) return transpose_eight(src, ss, dst, ds);
#endif
  for (int i = 0; i < Side; ++i)
    for (int j = 0; j < Side; ++j) dst[j * ds + i] = src[i * ss + j];
}

// Rows [first, first + Side) while there are so many; the first that is left.
template <int Side, class T>
NNARCH_INLINE int64_t transpose_strips(const T* src, int64_t ss, T* dst, int64_t ds, int64_t first,
                                       int64_t rows, int64_t columns) {
  const int64_t whole = columns / Side * Side;
  for (; first + Side <= rows; first += Side) {
    const T* from = src + first * ss;
    for (int64_t j = 0; j < whole; j += Side)
      transpose_tile<Side>(from + j, ss, dst + j * ds + first, ds);
    if (whole == columns) continue;
    if constexpr (Side * sizeof(T) == 64) {
      transpose_columns<T>(from + whole, ss, dst + whole * ds + first, ds, columns - whole);
    } else {
      for (int64_t j = whole; j < columns; ++j)
        for (int i = 0; i < Side; ++i) dst[j * ds + first + i] = from[i * ss + j];
    }
  }
  return first;
}

// Vector PART of the interleaved vectors a, b and c: a0 b0 c0 a1 b1 c1 …
template <int PART, class V, int... I>
NNARCH_INLINE V interleaved(V a, V b, V c, Indices<I...>) {
  constexpr int lanes = sizeof...(I), at = PART * lanes;
  const V ab =
      __builtin_shufflevector(a, b, ((at + I) % 3 == 1 ? lanes + (at + I) / 3 : (at + I) / 3)...);
  return __builtin_shufflevector(ab, c, ((at + I) % 3 == 2 ? lanes + (at + I) / 3 : I)...);
}

// Three planes to pixels, as a photograph comes: stored one by one, its values took half as long
// as the first convolution of a MobileNet.
template <class T>
void interleave_three(const T* src, int64_t ss, T* dst, int64_t pixels) {
  constexpr int lanes = kLanes<T>;
  constexpr MakeIndices<lanes> all;
  int64_t i = 0;
  for (; i + lanes <= pixels; i += lanes, dst += 3 * lanes) {
    const Vec<T> a = load(src + i), b = load(src + ss + i), c = load(src + 2 * ss + i);
    store(dst, interleaved<0>(a, b, c, all));
    store(dst + lanes, interleaved<1>(a, b, c, all));
    store(dst + 2 * lanes, interleaved<2>(a, b, c, all));
  }
  for (; i < pixels; ++i, dst += 3)
    for (int j = 0; j < 3; ++j) dst[j] = src[j * ss + i];
}

template <class T>
void transpose(const T* src, int64_t ss, T* dst, int64_t ds, int64_t rows, int64_t columns) {
  if (rows == 3 && ds == 3) return interleave_three(src, ss, dst, columns);
  constexpr int small = sizeof(T) == 4 && kLanes<T> >= 8 ? 8 : 4;
  int64_t i = 0;
  if constexpr (kVectorBytes == 64)
    i = transpose_strips<kLanes<T>>(src, ss, dst, ds, i, rows, columns);
  i = transpose_strips<small>(src, ss, dst, ds, i, rows, columns);
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) dst[j * ds + i] = src[i * ss + j];
}

}  // namespace

void stream_rows(const void* src, int64_t src_stride, void* dst, int64_t dst_stride, int64_t rows,
                 int64_t bytes) {
  constexpr int64_t line = 64;
  const auto* from = static_cast<const char*>(src);
  auto* to = static_cast<char*>(dst);
  const bool lines = (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(dst_stride) |
                      static_cast<uintptr_t>(bytes)) %
                         line ==
                     0;
  for (; rows > 0; --rows, from += src_stride, to += dst_stride) {
    if (!lines)
      __builtin_memcpy(to, from, static_cast<size_t>(bytes));
    else
      for (int64_t i = 0; i < bytes; i += kVectorBytes)
        stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  }
  if (lines) finish_streaming();
}

template <>
TransposeFn<float> transpose_kernel<float>() {
  return transpose<float>;
}
template <>
TransposeFn<double> transpose_kernel<double>() {
  return transpose<double>;
}

}  // namespace nnarch::NNARCH_ISA
