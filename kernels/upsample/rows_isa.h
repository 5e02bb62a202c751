// Upsampling of channels_last images: vectors lie along channels. For *_isa.cpp files.
#pragma once

#include "cpu/simd.h"
#include "upsample/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

// Stores f(c, lanes) for all channels of a pixel: past the caches only where vectors fill them.
template <class T, class F>
NNARCH_INLINE void over_channels(int64_t channels, T* y, bool past_caches, const F& f) {
  constexpr int64_t w = kLanes<T>;
  int64_t c = 0;
  if (past_caches) {
    for (; c < channels; c += w) stream(y + c, f(c, w));
    return;
  }
  for (; c + w <= channels; c += w) store(y + c, f(c, w));
  if (c < channels) store_n(y + c, f(c, channels - c), channels - c);
}

// A pixel to two neighbours in each of two rows, for one load: whole vectors of channels.
template <class T>
NNARCH_INLINE void copy_to_four(const T* p, int64_t channels, T* y, int64_t row, bool past_caches) {
  T* below = y + row;
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    const Vec<T> v = load(p + c);
    if (past_caches) {
      stream(y + c, v), stream(y + channels + c, v);
      stream(below + c, v), stream(below + channels + c, v);
    } else {
      store(y + c, v), store(y + channels + c, v);
      store(below + c, v), store(below + channels + c, v);
    }
  }
}

// How many neighbours from i on, below `end`, copy the same source.
NNARCH_INLINE int64_t copies(const int64_t* source, int64_t i, int64_t end) {
  int64_t past = i + 1;
  while (past < end && source[past] == source[i]) ++past;
  return past - i;
}

template <class T>
void nearest_rows(const T* x, int64_t channels, const Sources<T>& h, const Sources<T>& w,
                  int64_t from, int64_t to, T* y, bool past_caches) {
  const int64_t pitch = w.outputs * channels;
  for (int64_t i = from, rows; i < to; i += rows) {
    const T* row = x + h.first[i] * w.inputs * channels;
    rows = copies(h.first, i, to);
    for (int64_t j = 0, columns; j < w.outputs; j += columns) {
      const T* p = row + w.first[j] * channels;
      T* out = y + i * pitch + j * channels;
      columns = copies(w.first, j, w.outputs);
      if (rows == 2 && columns == 2 && channels % kLanes<T> == 0) {
        copy_to_four(p, channels, out, pitch, past_caches);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; ++k)
          over_channels<T>(channels, out + r * pitch + k * channels, past_caches,
                           [&](int64_t c, int64_t n)
                               NNARCH_INLINE_LAMBDA { return load_n(p + c, n); });
    }
  }
  if (past_caches) finish_streaming();
}

// B vectors of channels, of which the last has n lanes, of all pixels of an output row. What two
// rows weigh at a column of the input stays in registers until no output needs it: four loads and
// four products for every output took 115 µs for a doubled 64@56 instead of 85.
template <class T, int B>
NNARCH_INLINE void bilinear_block(const T* top, const T* bottom, T weight0, T weight1,
                                  int64_t channels, const Sources<T>& w, int64_t n, T* y,
                                  bool past_caches) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> w0 = broadcast(weight0), w1 = broadcast(weight1);
  Vec<T> left[B] = {}, right[B] = {};
  int64_t left_at = -1, right_at = -1;
  const auto column = [&](int64_t at, Vec<T>* v) NNARCH_INLINE_LAMBDA {
    const T *a = top + at * channels, *b = bottom + at * channels;
    for (int i = 0; i < B; ++i) {
      const int64_t count = i + 1 < B ? lanes : n;
      v[i] = load_n(a + i * lanes, count) * w0 + load_n(b + i * lanes, count) * w1;
    }
  };
  for (int64_t j = 0; j < w.outputs; ++j, y += channels) {
    if (w.first[j] != left_at) {
      left_at = w.first[j];
      if (left_at == right_at)
        for (int i = 0; i < B; ++i) left[i] = right[i];
      else
        column(left_at, left);
    }
    if (w.second[j] != right_at) {
      right_at = w.second[j];
      column(right_at, right);
    }
    const Vec<T> across0 = broadcast(w.w0[j]), across1 = broadcast(w.w1[j]);
    for (int i = 0; i < B; ++i) {
      const Vec<T> v = left[i] * across0 + right[i] * across1;
      if (past_caches)
        stream(y + i * lanes, v);
      else
        store_n(y + i * lanes, v, i + 1 < B ? lanes : n);
    }
  }
}

template <class T>
void bilinear_rows(const T* x, int64_t channels, const Sources<T>& h, const Sources<T>& w,
                   int64_t from, int64_t to, T* y, bool past_caches) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = from; i < to; ++i) {
    const T* top = x + h.first[i] * w.inputs * channels;
    const T* bottom = x + h.second[i] * w.inputs * channels;
    T* out = y + i * w.outputs * channels;
    int64_t c = 0;
    for (; c + 4 * lanes <= channels; c += 4 * lanes)
      bilinear_block<T, 4>(top + c, bottom + c, h.w0[i], h.w1[i], channels, w, lanes, out + c,
                           past_caches);
    for (; c < channels; c += lanes)
      bilinear_block<T, 1>(top + c, bottom + c, h.w0[i], h.w1[i], channels, w,
                           channels - c < lanes ? channels - c : lanes, out + c, past_caches);
  }
  if (past_caches) finish_streaming();
}

// B vectors of channels of one result, of which the last has n lanes.
template <class T, int B>
NNARCH_INLINE void spread_block(const T* grad, int64_t channels, const Spread<T>& h,
                                const Spread<T>& w, int64_t row, int64_t column, int64_t n, T* dx) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> sum[B] = {};
  const T *rows = h.weight + h.at[row], *columns = w.weight + w.at[column];
  for (int64_t i = h.start[row]; i < h.end[row]; ++i)
    for (int64_t j = w.start[column]; j < w.end[column]; ++j) {
      const T* p = grad + (i * w.values + j) * channels;
      const Vec<T> weight = broadcast(rows[i - h.start[row]] * columns[j - w.start[column]]);
      for (int b = 0; b < B; ++b) sum[b] += load_n(p + b * lanes, b + 1 < B ? lanes : n) * weight;
    }
  for (int b = 0; b < B; ++b) store_n(dx + b * lanes, sum[b], b + 1 < B ? lanes : n);
}

// The same where four values are summed as they are: whole vectors of channels.
template <class T>
NNARCH_INLINE void sum_of_four(const T* p, int64_t channels, int64_t row, T* dx) {
  const T* below = p + row;
  for (int64_t c = 0; c < channels; c += kLanes<T>)
    store(dx + c,
          ((load(p + c) + load(p + channels + c)) + load(below + c)) + load(below + channels + c));
}

// Whether result i is the sum of two values.
template <class T>
NNARCH_INLINE bool sums_two(const Spread<T>& s, int64_t i) {
  const T* weight = s.weight + s.at[i];
  return s.end[i] - s.start[i] == 2 && weight[0] == 1 && weight[1] == 1;
}

template <class T>
void spread_rows(const T* grad, int64_t channels, const Spread<T>& h, const Spread<T>& w,
                 int64_t from, int64_t to, T* dx) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pitch = w.values * channels;
  for (int64_t i = from; i < to; ++i) {
    const bool two_rows = channels % lanes == 0 && sums_two(h, i);
    for (int64_t j = 0; j < w.results; ++j) {
      T* to_pixel = dx + (i * w.results + j) * channels;
      if (two_rows && sums_two(w, j)) {
        sum_of_four(grad + h.start[i] * pitch + w.start[j] * channels, channels, pitch, to_pixel);
        continue;
      }
      int64_t c = 0;
      for (; c + 4 * lanes <= channels; c += 4 * lanes)
        spread_block<T, 4>(grad + c, channels, h, w, i, j, lanes, to_pixel + c);
      for (; c < channels; c += lanes)
        spread_block<T, 1>(grad + c, channels, h, w, i, j, channels - c, to_pixel + c);
    }
  }
}

}  // namespace nnarch::NNARCH_ISA
