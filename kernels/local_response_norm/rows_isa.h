// Local response normalization of channels_last images: vectors lie along channels, and neighbours
// come by moving lanes. For *_isa.cpp files.
#pragma once

#include "cpu/simd.h"
#include "local_response_norm/power_isa.h"

namespace nnarch::NNARCH_ISA {

template <int first, class V, int... I>
NNARCH_INLINE V lanes_from(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (first + I)...);
}

// The sum of each lane of `at` and its neighbours, of which Before lie to the left.
template <class T, int Before, int After>
NNARCH_INLINE Vec<T> window_sum(Vec<T> left, Vec<T> at, Vec<T> right) {
  constexpr int w = kLanes<T>;
  const MakeIndices<w> all{};
  Vec<T> sum = at;
  if constexpr (Before >= 2) sum += lanes_from<w - 2>(left, at, all);
  if constexpr (Before >= 1) sum += lanes_from<w - 1>(left, at, all);
  if constexpr (After >= 1) sum += lanes_from<1>(at, right, all);
  if constexpr (After >= 2) sum += lanes_from<2>(at, right, all);
  return sum;
}

template <class T>
NNARCH_INLINE void put(T* p, Vec<T> v, int64_t lanes, bool past_caches) {
  if (past_caches)
    stream(p, v);  // rows then consist of whole vectors
  else
    store_n(p, v, lanes);
}

// Calls f(c, lanes, r, sum) for the vectors of one pixel, where r = max(x, floor) and sum is that
// of its squares. Lanes past the last channel are zero.
template <class T, int Before, int After, class F>
NNARCH_INLINE void over_channels(const T* x, int64_t channels, Vec<T> floor, const F& f) {
  constexpr int64_t w = kLanes<T>;
  Vec<T> left{}, r = at_least<T>(load_n(x, channels), floor), at = r * r;
  for (int64_t c = 0; c < channels; c += w) {
    const int64_t rest = channels - c;
    const Vec<T> r_right = rest > w ? at_least<T>(load_n(x + c + w, rest - w), floor) : Vec<T>{};
    const Vec<T> right = r_right * r_right;
    f(c, rest < w ? rest : w, r, window_sum<T, Before, After>(left, at, right));
    left = at, at = right, r = r_right;
  }
}

template <class T, int Before, int After, Power power>
void forward_rows_of(const T* x, int64_t pixels, const Response<T>& a, T* y, bool past_caches) {
  const Vec<T> floor = broadcast(a.floor), k = broadcast(a.k), scale = broadcast(a.scale);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += a.channels, y += a.channels)
    over_channels<T, Before, After>(
        x, a.channels, floor,
        [&](int64_t c, int64_t lanes, Vec<T> r, Vec<T> sum) NNARCH_INLINE_LAMBDA {
          const Vec<T> p = inverse_power<T, power>(sum * scale + k, a.beta);
          put(y + c, r * p, lanes, past_caches);
        });
  if (past_caches) finish_streaming();
}

template <class T>
NNARCH_INLINE void clear(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = T{0};
}

// As grad_planes_of (planes_isa.h).
template <class T, int Before, int After, Power power>
void grad_rows_of(const T* grad, const T* x, int64_t pixels, const Response<T>& a, T* scratch,
                  T* dx, bool past_caches) {
  constexpr int64_t w = kLanes<T>;
  const int64_t channels = a.channels, padded = (channels + w - 1) / w * w;
  const Vec<T> floor = broadcast(a.floor), k = broadcast(a.k), scale = broadcast(a.scale);
  const Vec<T> dead = broadcast(a.dead), slope = broadcast(static_cast<T>(-2 * a.beta) * a.scale);
  T *through = scratch + w, *direct = through + padded + w;
  clear(scratch, padded + 2 * w);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    over_channels<T, Before, After>(
        x, channels, floor,
        [&](int64_t c, int64_t lanes, Vec<T> r, Vec<T> sum) NNARCH_INLINE_LAMBDA {
          const Vec<T> s = sum * scale + k;
          const Vec<T> gp = load_n(grad + c, lanes) * inverse_power<T, power>(s, a.beta);
          store(direct + c, gp);
          store_n(through + c, gp * r / s, lanes);
        });
    for (int64_t c = 0; c < channels; c += w) {
      const int64_t lanes = channels - c < w ? channels - c : w;
      const T* t = through + c;
      const Vec<T> sum = window_sum<T, After, Before>(load(t - w), load(t), load(t + w));
      const Vec<T> v = load_n(x + c, lanes), r = at_least<T>(v, floor);
      const Vec<T> d = load(direct + c) + slope * r * sum;
      put(dx + c, v <= dead ? Vec<T>{} : d, lanes, past_caches);
    }
    grad += channels, x += channels, dx += channels;
  }
  if (past_caches) finish_streaming();
}

// Any window: rows of squares, and of t, stand in memory with zeros on both sides.

template <class T>
NNARCH_INLINE Vec<T> sum_of(const T* p, int64_t n) {
  Vec<T> sum = load(p);
  for (int64_t i = 1; i < n; ++i) sum += load(p + i);
  return sum;
}

template <class T, Power power>
void forward_rows_any(const T* x, int64_t pixels, const Response<T>& a, T* scratch, T* y) {
  const int64_t n = a.before + a.after + 1;
  const Vec<T> floor = broadcast(a.floor);
  clear(scratch, a.channels + n + kLanes<T>);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += a.channels, y += a.channels) {
    over_partial_columns<T>(a.channels, [&](int64_t c, int64_t lanes) NNARCH_INLINE_LAMBDA {
      const Vec<T> r = at_least<T>(load_n(x + c, lanes), floor);
      store_n(scratch + a.before + c, r * r, lanes);
    });
    over_partial_columns<T>(a.channels, [&](int64_t c, int64_t lanes) NNARCH_INLINE_LAMBDA {
      const Vec<T> s = sum_of(scratch + c, n) * a.scale + a.k;
      const Vec<T> r = at_least<T>(load_n(x + c, lanes), floor);
      store_n(y + c, r * inverse_power<T, power>(s, a.beta), lanes);
    });
  }
}

template <class T, Power power>
void grad_rows_any(const T* grad, const T* x, int64_t pixels, const Response<T>& a, T* scratch,
                   T* dx) {
  const int64_t n = a.before + a.after + 1, row = a.channels + n + kLanes<T>;
  const Vec<T> floor = broadcast(a.floor), dead = broadcast(a.dead);
  const T slope = static_cast<T>(-2 * a.beta) * a.scale;
  T *squares = scratch, *through = scratch + row;
  clear(scratch, 2 * row);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    over_partial_columns<T>(a.channels, [&](int64_t c, int64_t lanes) NNARCH_INLINE_LAMBDA {
      const Vec<T> r = at_least<T>(load_n(x + c, lanes), floor);
      store_n(squares + a.before + c, r * r, lanes);
    });
    over_partial_columns<T>(a.channels, [&](int64_t c, int64_t lanes) NNARCH_INLINE_LAMBDA {
      const Vec<T> s = sum_of(squares + c, n) * a.scale + a.k;
      const Vec<T> r = at_least<T>(load_n(x + c, lanes), floor);
      const Vec<T> gp = load_n(grad + c, lanes) * inverse_power<T, power>(s, a.beta);
      store_n(dx + c, gp, lanes);
      store_n(through + a.after + c, gp * r / s, lanes);
    });
    over_partial_columns<T>(a.channels, [&](int64_t c, int64_t lanes) NNARCH_INLINE_LAMBDA {
      const Vec<T> v = load_n(x + c, lanes), r = at_least<T>(v, floor);
      const Vec<T> d = load_n(dx + c, lanes) + r * sum_of(through + c, n) * slope;
      store_n(dx + c, v <= dead ? Vec<T>{} : d, lanes);
    });
    grad += a.channels, x += a.channels, dx += a.channels;
  }
}

}  // namespace nnarch::NNARCH_ISA
