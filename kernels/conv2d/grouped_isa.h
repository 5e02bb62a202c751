// What the kernels for narrow groups share: lanes, and input rows in a ring.
#pragma once

#include "conv2d/grouped.h"
#include "depthwise/cpu_tile.h"

namespace nnarch::NNARCH_ISA {

// Which lane of a pixel each lane of the result takes.
#if defined(NNARCH_ISA_avx512)
template <class T>
using LaneIndex = __m512i;
NNARCH_INLINE Vec<float> spread(Vec<float> v, __m512i lane) {
  return (Vec<float>)_mm512_permutexvar_ps(lane, (__m512)v);
}
NNARCH_INLINE Vec<double> spread(Vec<double> v, __m512i lane) {
  return (Vec<double>)_mm512_permutexvar_pd(lane, (__m512d)v);
}
template <class T>
NNARCH_INLINE __m512i load_lanes(const int32_t* p) {
  if constexpr (sizeof(T) == 4) return _mm512_loadu_si512(p);
  return _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif defined(NNARCH_ISA_avx2)
template <class T>
using LaneIndex = __m256i;
NNARCH_INLINE Vec<float> spread(Vec<float> v, __m256i lane) {
  return (Vec<float>)_mm256_permutevar8x32_ps((__m256)v, lane);
}
NNARCH_INLINE Vec<double> spread(Vec<double> v, __m256i lane) {
  return (Vec<double>)_mm256_permutevar8x32_epi32((__m256i)v, lane);
}
template <class T>
NNARCH_INLINE __m256i load_lanes(const int32_t* p) {
  if constexpr (sizeof(T) == 4) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  // Both halves of every double.
  const __m256i wide = _mm256_cvtepi32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i low = _mm256_slli_epi64(wide, 1);
  const __m256i high = _mm256_slli_epi64(_mm256_add_epi64(low, _mm256_set1_epi64x(1)), 32);
  return _mm256_or_si256(low, high);
}
#else
template <class T>
using LaneIndex = const int32_t*;
template <class V>
NNARCH_INLINE V spread(V v, const int32_t* lane) {
  V result;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) result[i] = v[lane[i]];
  return result;
}
template <class T>
NNARCH_INLINE const int32_t* load_lanes(const int32_t* p) {
  return p;
}
#endif

// In every lane, input channel c of its group, from one pixel's vector.
template <bool BROADCAST, class T>
NNARCH_INLINE Vec<T> of_group(const T* pixel, int64_t c, LaneIndex<T> lane) {
  if constexpr (BROADCAST) return broadcast(pixel[c]);  // one group is all lanes
  return spread(load(pixel), lane);
}

// Input row `iy` under the output columns; zeros beside the image.
template <class T>
void copy_row(const GroupedConv<T>& a, int64_t iy, int64_t width, T* dst) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t begin = limit(-a.column, 0, width), end = limit(a.w - a.column, begin, width);
  clear(dst, begin * lanes);
  clear(dst + end * lanes, (width - end) * lanes);
  const T* src = a.x + iy * a.x_row + (a.column + begin) * a.x_pixel;
  load_pixels(src, a.x_pixel, a.x_channel, dst + begin * lanes, lanes, end - begin, a.inputs);
}

// The input rows [next, end) that exist, into their places: row iy lies at (iy − a.row) % span.
// Returns `end`.
template <class T>
int64_t fill_ring(const GroupedConv<T>& a, int64_t next, int64_t end, int64_t width, int64_t span,
                  T* ring) {
  for (; next < end; ++next)
    if (next >= 0 && next < a.h)
      copy_row(a, next, width, ring + (next - a.row) % span * width * kLanes<T>);
  return end;
}

// A row of all pixels, `n` channels of it. They are short runs far apart, which no prefetcher of
// the machine follows: 512 channels of 28×28 in 64 groups, N 8, take 5.6 ms with this and 6.4
// without.
template <class T>
NNARCH_INLINE void fetch_row(const T* row, int64_t pixels, int64_t pixel, int64_t channel,
                             int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  if (channel == 1) {
    for (int64_t i = 0; i < pixels; ++i) __builtin_prefetch(row + i * pixel);
    return;
  }
  for (int64_t c = 0; c < n; ++c, row += channel)
    for (int64_t i = 0; i < pixels; i += line) __builtin_prefetch(row + i);
}

}  // namespace nnarch::NNARCH_ISA
