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

template <class T>
void nearest_rows(const T* x, int64_t channels, const Sources<T>& h, const Sources<T>& w,
                  int64_t from, int64_t to, T* y, bool past_caches) {
  for (int64_t i = from; i < to; ++i) {
    const T* row = x + h.first[i] * w.inputs * channels;
    T* out = y + i * w.outputs * channels;
    for (int64_t j = 0; j < w.outputs; ++j, out += channels) {
      const T* p = row + w.first[j] * channels;
      over_channels<T>(channels, out, past_caches,
                       [&](int64_t c, int64_t n) NNARCH_INLINE_LAMBDA { return load_n(p + c, n); });
    }
  }
  if (past_caches) finish_streaming();
}

template <class T>
void bilinear_rows(const T* x, int64_t channels, const Sources<T>& h, const Sources<T>& w,
                   int64_t from, int64_t to, T* y, bool past_caches) {
  for (int64_t i = from; i < to; ++i) {
    const T* top = x + h.first[i] * w.inputs * channels;
    const T* bottom = x + h.second[i] * w.inputs * channels;
    T* out = y + i * w.outputs * channels;
    for (int64_t j = 0; j < w.outputs; ++j, out += channels) {
      const int64_t left = w.first[j] * channels, right = w.second[j] * channels;
      const Vec<T> a = broadcast(h.w0[i] * w.w0[j]), b = broadcast(h.w0[i] * w.w1[j]);
      const Vec<T> c = broadcast(h.w1[i] * w.w0[j]), d = broadcast(h.w1[i] * w.w1[j]);
      over_channels<T>(channels, out, past_caches, [&](int64_t k, int64_t n) NNARCH_INLINE_LAMBDA {
        const Vec<T> above = load_n(top + left + k, n) * a + load_n(top + right + k, n) * b;
        return above + load_n(bottom + left + k, n) * c + load_n(bottom + right + k, n) * d;
      });
    }
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

template <class T>
void spread_rows(const T* grad, int64_t channels, const Spread<T>& h, const Spread<T>& w,
                 int64_t from, int64_t to, T* dx) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = from; i < to; ++i)
    for (int64_t j = 0; j < w.results; ++j) {
      T* to_pixel = dx + (i * w.results + j) * channels;
      int64_t c = 0;
      for (; c + 4 * lanes <= channels; c += 4 * lanes)
        spread_block<T, 4>(grad + c, channels, h, w, i, j, lanes, to_pixel + c);
      for (; c < channels; c += lanes)
        spread_block<T, 1>(grad + c, channels, h, w, i, j, channels - c, to_pixel + c);
    }
}

}  // namespace nnarch::NNARCH_ISA
