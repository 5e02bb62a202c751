// Pooling of channels_last images: vectors lie along channels, windows are walked tap by tap.
#pragma once

#include "cpu/simd.h"
#include "cpu/wide.h"
#include "pooling/best_isa.h"
#include "pooling/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

// The window of one output pixel in an image of the given width.
struct Window {
  int64_t top, bottom, row_step, left, right, column_step, width;

  NNARCH_INLINE Window(const Axis& h, const Axis& w, int64_t row, int64_t column)
      : top(h.start[row]),
        bottom(h.end[row]),
        row_step(h.step),
        left(w.start[column]),
        right(w.end[column]),
        column_step(w.step),
        width(w.inputs) {}

  // Calls f(position in the plane) for every tap, row by row.
  template <class F>
  NNARCH_INLINE void for_each(const F& f) const {
    for (int64_t i = top; i < bottom; i += row_step)
      for (int64_t j = left; j < right; j += column_step) f(i * width + j);
  }
};

// B vectors of channels of one output pixel; the last one has n lanes.
template <class T, int B>
NNARCH_INLINE void max_block(const T* x, int64_t channels, const Window& window, int64_t n, T* y) {
  constexpr int64_t w = kLanes<T>;
  Vec<T> m[B];
  for (int b = 0; b < B; ++b) m[b] = lowest<T>();
  window.for_each([&](int64_t position) {
    const T* p = x + position * channels;
    for (int b = 0; b < B; ++b) m[b] = max<T>(m[b], load_n(p + b * w, b + 1 < B ? w : n));
  });
  for (int b = 0; b < B; ++b) store_n(y + b * w, m[b], b + 1 < B ? w : n);
}

template <class T, int B>
NNARCH_INLINE void max_block_indices(const T* x, int64_t channels, const Window& window, int64_t n,
                                     T* y, int64_t* indices) {
  constexpr int64_t w = kLanes<T>;
  Best<T> best[B];
  window.for_each([&](int64_t position) {
    const T* p = x + position * channels;
    const Lanes<T> where = lanes<T>(position);
    for (int b = 0; b < B; ++b) best[b].take_later(load_n(p + b * w, b + 1 < B ? w : n), where);
  });
  for (int b = 0; b < B; ++b) {
    store_n(y + b * w, best[b].value, b + 1 < B ? w : n);
    store_indices<T>(indices + b * w, best[b].position, b + 1 < B ? w : n);
  }
}

template <class T, int B>
NNARCH_INLINE void sum_block(const T* x, int64_t channels, const Window& window, int64_t n,
                             T divisor, T* y) {
  constexpr int64_t w = kLanes<T>;
  Vec<T> sum[B] = {};
  window.for_each([&](int64_t position) {
    const T* p = x + position * channels;
    for (int b = 0; b < B; ++b) sum[b] += load_n(p + b * w, b + 1 < B ? w : n);
  });
  for (int b = 0; b < B; ++b) store_n(y + b * w, sum[b] / divisor, b + 1 < B ? w : n);
}

// Calls f(Block<B>{}, first channel, lanes of the last vector): four vectors at a time, then one.
template <int B>
struct Block {
  static constexpr int vectors = B;
};
template <class T, class F>
NNARCH_INLINE void over_channels(int64_t channels, const F& f) {
  constexpr int64_t w = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * w <= channels; c += 4 * w) f(Block<4>{}, c, w);
  for (; c < channels; c += w) f(Block<1>{}, c, channels - c < w ? channels - c : w);
}

template <class T>
void max_rows(const T* image, int64_t channels, const Axis& h, const Axis& w, int64_t from,
              int64_t to, T* y, int64_t* indices) {
  for (int64_t row = from; row < to; ++row)
    for (int64_t column = 0; column < w.outputs; ++column) {
      const Window window(h, w, row, column);
      const int64_t at = (row * w.outputs + column) * channels;
      over_channels<T>(channels, [&](auto block, int64_t c, int64_t n) {
        constexpr int B = decltype(block)::vectors;
        if (indices)
          max_block_indices<T, B>(image + c, channels, window, n, y + at + c, indices + at + c);
        else
          max_block<T, B>(image + c, channels, window, n, y + at + c);
      });
    }
}

template <class T>
void average_rows(const T* image, int64_t channels, const Axis& h, const Axis& w, int64_t from,
                  int64_t to, T* y) {
  for (int64_t row = from; row < to; ++row)
    for (int64_t column = 0; column < w.outputs; ++column) {
      const Window window(h, w, row, column);
      const int64_t at = (row * w.outputs + column) * channels;
      const T divisor = static_cast<T>(h.count[row] * w.count[column]);
      over_channels<T>(channels, [&](auto block, int64_t c, int64_t n) {
        sum_block<T, decltype(block)::vectors>(image + c, channels, window, n, divisor, y + at + c);
      });
    }
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
