// Pooling of channels_last images: vectors lie along channels, windows are walked tap by tap.
#pragma once

#include "cpu/simd.h"
#include "pooling/best_isa.h"
#include "pooling/cpu_kernels.h"
#include "pooling/reduce_isa.h"
#include "pooling/slide_isa.h"

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
                                T scale, typename Acc::Watch& watch, T* y) {
  constexpr int64_t w = kLanes<T>;
  Acc acc[B];
  window.for_each([&](int64_t position) {
    const T* p = x + position * channels;
    for (int b = 0; b < B; ++b) {
      const Vec<T> v = load_n(p + b * w, b + 1 < B ? w : n);
      acc[b].take(v);
      watch.see(v, v);
    }
  });
  for (int b = 0; b < B; ++b)
    store_n(y + b * w, Acc::scaled(acc[b].value, broadcast(scale)), b + 1 < B ? w : n);
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

// Calls f(Count<B>{}, first channel, lanes of the last vector): four vectors at a time, then one.
template <class T, class F>
NNARCH_INLINE void over_channels(int64_t channels, const F& f) {
  constexpr int64_t w = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * w <= channels; c += 4 * w) f(Count<4>{}, c, w);
  for (; c < channels; c += w) f(Count<1>{}, c, channels - c < w ? channels - c : w);
}

// Reads the input rows of output rows from end to end before their windows do: windows meet the
// cache lines of several rows and pixels in turn, an order that the hardware does not prefetch.
template <class T>
class ReadAhead {
 public:
  NNARCH_INLINE ReadAhead(const T* image, int64_t channels, const Axis& h, const Axis& w,
                          int64_t from, bool far)
      : image_(image), row_(w.inputs * channels), h_(h), next_(from == 0 ? 0 : h.end[from]) {
    if (!far) next_ = h.inputs;
  }

  // Before the windows of output row `row`: the rows of the one that follows.
  NNARCH_INLINE void before(int64_t row) {
    const int64_t end = h_.end[row + 1 < h_.outputs ? row + 1 : row];
    for (; next_ < end; next_ += kFarRows) read(next_);
  }

 private:
  // kFarRows rows side by side: one stream alone reads 22 GB/s from memory, four read 24 to 28.
  NNARCH_INLINE void read(int64_t first) const {
    constexpr auto line = 64 / static_cast<int64_t>(sizeof(T));
    const volatile T* rows[kFarRows];
    for (int64_t r = 0; r < kFarRows; ++r)
      rows[r] = image_ + (first + r < h_.inputs ? first + r : h_.inputs - 1) * row_;
    for (int64_t i = 0; i < row_; i += line)
      for (int64_t r = 0; r < kFarRows; ++r) (void)rows[r][i];
  }

  const T* image_;
  int64_t row_;
  const Axis& h_;
  int64_t next_;
};

// All channels of one output pixel whose window has KH x KW taps, `row` and `column` elements
// apart. There is at least one vector of channels: the last one overlaps its neighbour.
template <class T, class Acc, int KH, int KW, int S>
NNARCH_INLINE void reduce_pixel(const T* x, int64_t row, int64_t column, int64_t channels, T scale,
                                typename Acc::Watch& watch, T* y, bool past_caches) {
  constexpr int64_t w = kLanes<T>;
  const Vec<T> factor = broadcast(scale);
  typename Acc::Watch seen;  // in a register
  const auto vector_at = [&](int64_t c) NNARCH_INLINE_LAMBDA {
    const T* p = x + c;
    const Vec<T> v = reduce<Acc, KH, KW, S>(
        seen, [&](int i, int j) NNARCH_INLINE_LAMBDA { return load(p + i * row + j * column); });
    if (past_caches)
      stream(y + c, Acc::scaled(v, factor));
    else
      store(y + c, Acc::scaled(v, factor));
  };
  int64_t c = 0;
  for (; c + w <= channels; c += w) vector_at(c);
  if (c < channels) vector_at(channels - w);
  watch.merge(seen);
}

NNARCH_INLINE int64_t taps(int64_t start, int64_t end, int64_t step) {
  return step == 1 ? end - start : (end - start + step - 1) / step;  // a division takes 15 cycles
}

// `news`: rows and columns of taps that no later window has, 0 where that is not known.
template <class T, class Acc>
NNARCH_INLINE void reduce_window(const T* image, int64_t channels, const Window& window,
                                 int64_t news, T scale, typename Acc::Watch& watch, T* y,
                                 bool past_caches) {
  if (channels >= kLanes<T>) {
    const int64_t rows = taps(window.top, window.bottom, window.row_step);
    const int64_t columns = taps(window.left, window.right, window.column_step);
    const T* x = image + (window.top * window.width + window.left) * channels;
    const int64_t row = window.row_step * window.width * channels;
    const int64_t column = window.column_step * channels;
    if (rows == 3 && columns == 3 && news == 2)
      return reduce_pixel<T, Acc, 3, 3, 2>(x, row, column, channels, scale, watch, y, past_caches);
    if (rows == 3 && columns == 3 && news == 1)
      return reduce_pixel<T, Acc, 3, 3, 1>(x, row, column, channels, scale, watch, y, past_caches);
    const bool done = with_taps(rows, [&](auto kh) NNARCH_INLINE_LAMBDA {
      return with_taps(columns, [&](auto kw) NNARCH_INLINE_LAMBDA {
        constexpr int KH = decltype(kh)::count, KW = decltype(kw)::count;
        if constexpr (KH * KW > 0)
          reduce_pixel<T, Acc, KH, KW, 3>(x, row, column, channels, scale, watch, y, past_caches);
        return KH * KW > 0;
      });
    });
    if (done) return;
  }
  over_channels<T>(channels, [&](auto block, int64_t c, int64_t n) {
    reduce_block<T, Acc, decltype(block)::count>(image + c, channels, window, n, scale, watch,
                                                 y + c);
  });
}

template <class T, class Acc>
NNARCH_INLINE bool max_rows_as(const T* image, int64_t channels, const Axis& h, const Axis& w,
                               int64_t from, int64_t to, T* y, const Traffic& traffic) {
  typename Acc::Watch watch;
  if constexpr (!__is_same(Acc, ExactMaximum<T>))
    if (slide<T, Acc>(image, channels, h, w, from, to, y, watch, traffic)) return watch.any();
  ReadAhead<T> ahead(image, channels, h, w, from, traffic.far);
  // Windows side by side that overlap: the last ones look at all of their taps.
  const int64_t news =
      h.kernel > 0 && w.kernel > 0 && h.step == 1 && w.step == 1 && h.stride == w.stride ? h.stride
                                                                                         : 0;
  for (int64_t row = from; row < to; ++row) {
    ahead.before(row);
    for (int64_t column = 0; column < w.outputs; ++column) {
      const Window window(h, w, row, column);
      const bool last = row + 1 == to || column + 1 == w.outputs;
      reduce_window<T, Acc>(image, channels, window, last ? 0 : news, T{1}, watch,
                            y + (row * w.outputs + column) * channels, traffic.stream);
    }
  }
  if (traffic.stream) finish_streaming();
  return watch.any();
}

template <class T>
void max_rows(const T* image, int64_t channels, const Axis& h, const Axis& w, int64_t from,
              int64_t to, T* y, int64_t* indices, const Traffic& traffic) {
  if (!indices) {
    if (max_rows_as<T, Maximum<T>>(image, channels, h, w, from, to, y, traffic))
      max_rows_as<T, ExactMaximum<T>>(image, channels, h, w, from, to, y, traffic);
    return;
  }
  for (int64_t row = from; row < to; ++row)
    for (int64_t column = 0; column < w.outputs; ++column) {
      const Window window(h, w, row, column);
      const int64_t at = (row * w.outputs + column) * channels;
      over_channels<T>(channels, [&](auto block, int64_t c, int64_t n) {
        max_block_indices<T, decltype(block)::count>(image + c, channels, window, n, y + at + c,
                                                     indices + at + c);
      });
    }
}

template <class T>
void average_rows(const T* image, int64_t channels, const Axis& h, const Axis& w, int64_t from,
                  int64_t to, T* y, const Traffic& traffic) {
  NoWatch none;
  if (slide<T, Sum<T>>(image, channels, h, w, from, to, y, none, traffic)) return;
  ReadAhead<T> ahead(image, channels, h, w, from, traffic.far);
  for (int64_t row = from; row < to; ++row) {
    ahead.before(row);
    for (int64_t column = 0; column < w.outputs; ++column) {
      const Window window(h, w, row, column);
      const int64_t at = (row * w.outputs + column) * channels;
      const T scale = T{1} / static_cast<T>(h.count[row] * w.count[column]);
      NoWatch watch;
      reduce_window<T, Sum<T>>(image, channels, window, 0, scale, watch, y + at, traffic.stream);
    }
  }
  if (traffic.stream) finish_streaming();
}

}  // namespace nnarch::NNARCH_ISA
