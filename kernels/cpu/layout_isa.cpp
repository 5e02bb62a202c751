// Transposition of a matrix by register tiles.
#include "cpu/layout.h"
#include "cpu/simd.h"

namespace nnarch::NNARCH_ISA {
namespace {

#if defined(NNARCH_ISA_avx2) || defined(NNARCH_ISA_avx512)
// 8 x 8 floats.
NNARCH_INLINE void transpose_tile(const float* src, int64_t ss, float* dst, int64_t ds) {
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
template <class T>
inline constexpr int kTile = sizeof(T) == 4 ? 8 : 4;
#else
template <class T>
inline constexpr int kTile = 4;
#endif

template <class T>
NNARCH_INLINE void transpose_tile(const T* src, int64_t ss, T* dst, int64_t ds) {
  for (int i = 0; i < kTile<T>; ++i)
    for (int j = 0; j < kTile<T>; ++j) dst[j * ds + i] = src[i * ss + j];
}

// Three planes, those of a colour image, into dense pixels, four at a time. 3×224×224 took 118 µs
// one by one, as much as a layer of a MobileNetV2.
template <class T>
NNARCH_INLINE void interleave_planes(const T* src, int64_t ss, T* dst, int64_t columns) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  const T *a = src, *b = src + ss, *c = src + 2 * ss;
  int64_t j = 0;
  for (; j + 4 <= columns; j += 4, dst += 12) {
    const Four x = *reinterpret_cast<const Four*>(a + j), y = *reinterpret_cast<const Four*>(b + j),
               z = *reinterpret_cast<const Four*>(c + j);
    Four* to = reinterpret_cast<Four*>(dst);
    to[0] = __builtin_shufflevector(__builtin_shufflevector(x, y, 0, 4, 1, 5), z, 0, 1, 4, 2);
    to[1] = __builtin_shufflevector(__builtin_shufflevector(y, z, 1, 5, 2, 6), x, 0, 1, 6, 2);
    to[2] = __builtin_shufflevector(z, __builtin_shufflevector(x, y, 3, 7, 3, 7), 2, 4, 5, 3);
  }
  for (; j < columns; ++j, dst += 3) dst[0] = a[j], dst[1] = b[j], dst[2] = c[j];
}

template <class T>
void transpose(const T* src, int64_t ss, T* dst, int64_t ds, int64_t rows, int64_t columns) {
  if (rows == 3 && ds == 3) return interleave_planes(src, ss, dst, columns);
  constexpr int64_t t = kTile<T>;
  const int64_t full_rows = rows / t * t, full_columns = columns / t * t;
  // Destination rows stay open for a strip of source rows, so that its lines are written whole.
  for (int64_t i = 0; i < full_rows; i += t) {
    for (int64_t j = 0; j < full_columns; j += t)
      transpose_tile(src + i * ss + j, ss, dst + j * ds + i, ds);
    for (int64_t j = full_columns; j < columns; ++j)
      for (int64_t ii = i; ii < i + t; ++ii) dst[j * ds + ii] = src[ii * ss + j];
  }
  for (int64_t i = full_rows; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) dst[j * ds + i] = src[i * ss + j];
}

}  // namespace

template <>
TransposeFn<float> transpose_kernel<float>() {
  return transpose<float>;
}
template <>
TransposeFn<double> transpose_kernel<double>() {
  return transpose<double>;
}

}  // namespace nnarch::NNARCH_ISA
