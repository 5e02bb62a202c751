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

template <class T>
void mean_planes(const T* x, int64_t planes, int64_t pixels, T* y) {
  const double scale = 1.0 / static_cast<double>(pixels);
  for (int64_t p = 0; p < planes; ++p)
    y[p] = static_cast<T>(sum_plane<T>(x + p * pixels, pixels) * scale);
}

template <class T>
void mean_pixels(const T* image, int64_t pixels, int64_t channels, int64_t from, int64_t to,
                 double* sums, T* y) {
  constexpr int64_t w = kLanes<T>;
  for (int64_t c = 0; c < to - from; ++c) sums[c] = 0;
  for (int64_t p = 0; p < pixels; p += kBurst) {
    const int64_t rows = pixels - p < kBurst ? pixels - p : kBurst;
    for (int64_t c = from; c < to; c += w) {
      const T* x = image + p * channels + c;
      const int64_t n = to - c < w ? to - c : w;
      Vec<T> sum{};
      if (rows == kBurst && n == w)
        for (int r = 0; r < kBurst; ++r) sum += load(x + r * channels);
      else
        for (int64_t r = 0; r < rows; ++r) sum += load_n(x + r * channels, n);
      add_wide<T>(sums + (c - from), sum, n);
    }
  }
  for (int64_t c = from; c < to; ++c)
    y[c] = static_cast<T>(sums[c - from] / static_cast<double>(pixels));
}

}  // namespace nnarch::NNARCH_ISA
