// Pooling of channels_last images: vectors lie along channels, windows are walked tap by tap.
#pragma once

#include "cpu/simd.h"
#include "pooling/best_isa.h"
#include "pooling/cpu_kernels.h"
#include "pooling/reduce_isa.h"

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

// B vectors of channels of one output pixel, over any window; the last one has n lanes.
template <class T, class Acc, int B>
NNARCH_INLINE void reduce_block(const T* x, int64_t channels, const Window& window, int64_t n,
                                T scale, T* y) {
  constexpr int64_t w = kLanes<T>;
  Acc acc[B];
  for (int b = 0; b < B; ++b) acc[b] = Acc();
  window.for_each([&](int64_t position) {
    const T* p = x + position * channels;
    for (int b = 0; b < B; ++b) acc[b].take(load_n(p + b * w, b + 1 < B ? w : n));
  });
  for (int b = 0; b < B; ++b)
    store_n(y + b * w, Acc::scaled(acc[b].result(), broadcast(scale)), b + 1 < B ? w : n);
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

// Calls f(Code<B>{}, first channel, lanes of the last vector): four vectors at a time, then one.
template <class T, class F>
NNARCH_INLINE void over_channels(int64_t channels, const F& f) {
  constexpr int64_t w = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * w <= channels; c += 4 * w) f(Code<4>{}, c, w);
  for (; c < channels; c += w) f(Code<1>{}, c, channels - c < w ? channels - c : w);
}

// All channels of one output pixel whose window has KH x KW taps, `row` and `column` elements
// apart. There is at least one vector of channels: the last one overlaps its neighbour.
template <class T, class Acc, int KH, int KW>
NNARCH_INLINE void reduce_pixel(const T* x, int64_t row, int64_t column, int64_t channels, T scale,
                                T* y) {
  constexpr int64_t w = kLanes<T>;
  const Vec<T> factor = broadcast(scale);
  const auto vector_at = [&](int64_t c) {
    const T* p = x + c;
    const Acc acc = reduce<Acc, KH * KW>(
        [&](int t) { return load(p + (t / KW) * row + (t % KW) * column); });
    store(y + c, Acc::scaled(acc.result(), factor));
  };
  int64_t c = 0;
  for (; c + w <= channels; c += w) vector_at(c);
  if (c < channels) vector_at(channels - w);
}

template <class T, class Acc>
NNARCH_INLINE void reduce_window(const T* image, int64_t channels, const Window& window, T scale,
                                 T* y) {
  if (channels >= kLanes<T>) {
    const int64_t rows = (window.bottom - window.top + window.row_step - 1) / window.row_step;
    const int64_t columns =
        (window.right - window.left + window.column_step - 1) / window.column_step;
    const T* x = image + (window.top * window.width + window.left) * channels;
    const int64_t row = window.row_step * window.width * channels;
    const int64_t column = window.column_step * channels;
    const bool done = with_taps(rows, [&](auto kh) {
      return with_taps(columns, [&](auto kw) {
        constexpr int KH = decltype(kh)::is, KW = decltype(kw)::is;
        if constexpr (KH * KW > 0) reduce_pixel<T, Acc, KH, KW>(x, row, column, channels, scale, y);
        return KH * KW > 0;
      });
    });
    if (done) return;
  }
  over_channels<T>(channels, [&](auto block, int64_t c, int64_t n) {
    reduce_block<T, Acc, decltype(block)::is>(image + c, channels, window, n, scale, y + c);
  });
}

template <class T>
void max_rows(const T* image, int64_t channels, const Axis& h, const Axis& w, int64_t from,
              int64_t to, T* y, int64_t* indices) {
  for (int64_t row = from; row < to; ++row)
    for (int64_t column = 0; column < w.outputs; ++column) {
      const Window window(h, w, row, column);
      const int64_t at = (row * w.outputs + column) * channels;
      if (!indices) {
        reduce_window<T, Maximum<T>>(image, channels, window, T{1}, y + at);
        continue;
      }
      over_channels<T>(channels, [&](auto block, int64_t c, int64_t n) {
        max_block_indices<T, decltype(block)::is>(image + c, channels, window, n, y + at + c,
                                                  indices + at + c);
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
      const T scale = T{1} / static_cast<T>(h.count[row] * w.count[column]);
      reduce_window<T, Sum<T>>(image, channels, window, scale, y + at);
    }
}

}  // namespace nnarch::NNARCH_ISA
