// Means over whole images. For *_isa.cpp.
#pragma once

#include "cpu/simd.h"
#include "cpu/wide.h"

namespace nnarch::NNARCH_ISA {

template <class T>
NNARCH_INLINE double sum_plane(const T* plane, int64_t pixels) {
  constexpr int64_t w = kLanes<T>;
  Wide<T> total;
  int64_t i = 0;
  for (; i + kBurst * w <= pixels; i += kBurst * w) {
    Vec<T> sum{};
    for (int r = 0; r < kBurst; ++r) sum += load(plane + i + r * w);
    total.add(sum);
  }
  Vec<T> rest{};
  for (; i + w <= pixels; i += w) rest += load(plane + i);
  if (i < pixels) rest += load_n(plane + i, pixels - i);
  total.add(rest);
  return total.total();
}

// From vectors whose lanes are to be summed to vectors with twice as many sums in half as many:
// lane l becomes one of a where bit `step` of l is 0, else one of b.
template <int step, class V, int... I>
NNARCH_INLINE V add_across(V a, V b, Indices<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I & step ? n + I - step : I)...) +
         __builtin_shufflevector(a, b, (I & step ? n + I : I + step)...);
}

// The sums of kLanes planes of at most kSmallPlane vectors, one in each lane. Adding the lanes of
// sixteen vectors together takes three instructions a plane; of one vector alone, ten.
inline constexpr int64_t kSmallPlane = 16;

template <class T, int step>
NNARCH_INLINE Vec<T> sum_planes(const T* x, int64_t pixels) {
  if constexpr (step == 0) {
    constexpr int64_t w = kLanes<T>;
    Vec<T> sum = load_n(x, pixels);
    int64_t i = w;
    for (; i + w <= pixels; i += w) sum += load(x + i);
    if (i < pixels) sum += load_n(x + i, pixels - i);
    return sum;
  } else {
    const Vec<T> a = sum_planes<T, step / 2>(x, pixels);
    const Vec<T> b = sum_planes<T, step / 2>(x + step * pixels, pixels);
    return add_across<step>(a, b, MakeIndices<kLanes<T>>{});
  }
}

template <class T>
void mean_planes(const T* x, int64_t planes, int64_t pixels, T* y) {
  const double scale = 1.0 / static_cast<double>(pixels);
  int64_t p = 0;
  if (pixels <= kSmallPlane * kLanes<T>)
    for (; p + kLanes<T> <= planes; p += kLanes<T>)
      store(y + p, sum_planes<T, kLanes<T> / 2>(x + p * pixels, pixels) * static_cast<T>(scale));
  for (; p < planes; ++p) y[p] = static_cast<T>(sum_plane<T>(x + p * pixels, pixels) * scale);
}

// `rows` pixels of B vectors of channels, added to sums.
template <class T, int B>
NNARCH_INLINE void add_pixels(const T* x, int64_t channels, int64_t rows, Wide<T>* sums) {
  Vec<T> sum[B];
  for (int b = 0; b < B; ++b) sum[b] = load(x + b * kLanes<T>);
  for (int64_t r = 1; r < rows; ++r)
    for (int b = 0; b < B; ++b) sum[b] += load(x + r * channels + b * kLanes<T>);
  for (int b = 0; b < B; ++b) sums[b].add(sum[b]);
}

// The means of B vectors of channels, which stay in registers.
template <class T, int B>
NNARCH_INLINE void mean_of_channels(const T* x, int64_t pixels, int64_t channels, T* y) {
  Wide<T> sums[B];
  int64_t p = 0;
  for (; p + kBurst <= pixels; p += kBurst)
    add_pixels<T, B>(x + p * channels, channels, kBurst, sums);
  if (p < pixels) add_pixels<T, B>(x + p * channels, channels, pixels - p, sums);
  const double count = static_cast<double>(pixels);
  for (int b = 0; b < B; ++b)
    for (int i = 0; i < kLanes<T>; ++i)
      y[b * kLanes<T> + i] =
          static_cast<T>(sums[b].part[i / kLanes<double>][i % kLanes<double>] / count);
}

// Few channels: all pixels of four vectors at a time lie close enough together.
inline constexpr int64_t kFewChannels = 512;

template <class T>
void mean_pixels(const T* image, int64_t pixels, int64_t channels, int64_t from, int64_t to,
                 double* sums, T* y) {
  constexpr int64_t w = kLanes<T>;
  if (channels <= kFewChannels)
    for (; from + 4 * w <= to; from += 4 * w)
      mean_of_channels<T, 4>(image + from, pixels, channels, y + from);
  for (int64_t c = 0; c < to - from; ++c) sums[c] = 0;
  for (int64_t p = 0; p < pixels && from < to; p += kBurst) {
    const int64_t rows = pixels - p < kBurst ? pixels - p : kBurst;
    for (int64_t c = from; c < to; c += w) {
      const T* x = image + p * channels + c;
      const int64_t n = to - c < w ? to - c : w;
      Vec<T> sum{};
      if (rows == kBurst && n == w)
        for (int r = 0; r < kBurst; ++r) sum += load(x + r * channels);
      else if (n == w)
        for (int64_t r = 0; r < rows; ++r) sum += load(x + r * channels);
      else
        for (int64_t r = 0; r < rows; ++r) sum += load_n(x + r * channels, n);
      add_wide<T>(sums + (c - from), sum, n);
    }
  }
  for (int64_t c = from; c < to; ++c)
    y[c] = static_cast<T>(sums[c - from] / static_cast<double>(pixels));
}

}  // namespace nnarch::NNARCH_ISA
