// Sums and means over whole images. For *_isa.cpp.
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
NNARCH_INLINE void add_pixels(const T* x, int64_t step, int64_t rows, Wide<T>* sums) {
  Vec<T> sum[B];
  for (int b = 0; b < B; ++b) sum[b] = load(x + b * kLanes<T>);
  for (int64_t r = 1; r < rows; ++r)
    for (int b = 0; b < B; ++b) sum[b] += load(x + r * step + b * kLanes<T>);
  for (int b = 0; b < B; ++b) sums[b].add(sum[b]);
}

// B vectors of channels of all pixels, added to sums; in registers until then.
template <class T, int B>
NNARCH_INLINE void add_channels(const T* x, int64_t pixels, int64_t step, double* sums) {
  Wide<T> wide[B];
  int64_t p = 0;
  for (; p + kBurst <= pixels; p += kBurst) add_pixels<T, B>(x + p * step, step, kBurst, wide);
  if (p < pixels) add_pixels<T, B>(x + p * step, step, pixels - p, wide);
  for (int b = 0; b < B; ++b)
    for (int i = 0; i < kLanes<T>; ++i)
      sums[b * kLanes<T> + i] += wide[b].part[i / kLanes<double>][i % kLanes<double>];
}

// Few channels: all pixels of four vectors at a time lie close enough together.
inline constexpr int64_t kFewChannels = 512;

template <class T>
void sum_pixels(const T* image, int64_t pixels, int64_t step, int64_t n, double* sums) {
  constexpr int64_t w = kLanes<T>;
  int64_t from = 0;
  if (step <= kFewChannels)
    for (; from + 4 * w <= n; from += 4 * w)
      add_channels<T, 4>(image + from, pixels, step, sums + from);
  for (int64_t p = 0; p < pixels && from < n; p += kBurst) {
    const int64_t rows = pixels - p < kBurst ? pixels - p : kBurst;
    for (int64_t c = from; c < n; c += w) {
      const T* x = image + p * step + c;
      const int64_t lanes = n - c < w ? n - c : w;
      Vec<T> sum{};
      if (rows == kBurst && lanes == w)
        for (int r = 0; r < kBurst; ++r) sum += load(x + r * step);
      else if (lanes == w)
        for (int64_t r = 0; r < rows; ++r) sum += load(x + r * step);
      else
        for (int64_t r = 0; r < rows; ++r) sum += load_n(x + r * step, lanes);
      add_wide<T>(sums + c, sum, lanes);
    }
  }
}

}  // namespace nnarch::NNARCH_ISA
