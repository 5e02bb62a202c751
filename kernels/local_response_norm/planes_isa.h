// Local response normalization of planes: vectors lie along pixels, and the channels of a group
// follow one another in registers. For *_isa.cpp files.
#pragma once

#include "cpu/simd.h"
#include "local_response_norm/power_isa.h"

namespace nnarch::NNARCH_ISA {

inline constexpr int kGroup = 8;  // channels whose windows are summed from one set of loads

alignas(64) inline constexpr char kZeroRow[kPlaneBlock * sizeof(double)] = {};

// Where the rows of channels first, first + 1, … of some pixels begin: zeros outside.
template <class T, int count>
struct Rows {
  const T* at[count];

  NNARCH_INLINE Rows(const T* x, int64_t plane, int64_t channels, int64_t first) {
    for (int j = 0; j < count; ++j) {
      const int64_t c = first + j;
      const bool inside = c >= 0 && c < channels;
      at[j] = inside ? x + c * plane : reinterpret_cast<const T*>(kZeroRow);
    }
  }
};

// Calls f(first) for groups that cover all channels; the last may overlap the one before it.
template <class F>
NNARCH_INLINE void over_groups(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kGroup <= channels; c += kGroup) f(c);
  if (c < channels) f(channels - kGroup);
}

// Calls f(i) for vectors that cover all pixels; the last may overlap the one before it.
template <class T, class F>
NNARCH_INLINE void over_columns(int64_t pixels, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= pixels; i += kLanes<T>) f(i);
  if (i < pixels) f(pixels - kLanes<T>);
}

// The sums of Before + After + 1 neighbours out of a sequence of kGroup + Before + After vectors:
// calls f(j, sum) for the kGroup in the middle, where next(j) makes the j-th of the sequence.
template <class T, int Before, int After, class Next, class F>
NNARCH_INLINE void window_sums(const Next& next, const F& f) {
  constexpr int n = Before + After + 1;
  Vec<T> q[kGroup + n - 1];
#pragma GCC unroll 16
  for (int j = 0; j < kGroup + n - 1; ++j) {
    q[j] = next(j);
    if (j < n - 1) continue;
    Vec<T> sum = q[j - n + 1];
#pragma GCC unroll 16
    for (int i = j - n + 2; i <= j; ++i) sum += q[i];
    f(j - n + 1, sum);
  }
}

template <class T, int Before, int After, Power power>
void forward_planes_of(const T* x, int64_t plane, int64_t pixels, const Response<T>& a, T* y) {
  constexpr int count = kGroup + Before + After;
  const Vec<T> floor = broadcast(a.floor), k = broadcast(a.k), scale = broadcast(a.scale);
  over_groups(a.channels, [&](int64_t first) NNARCH_INLINE_LAMBDA {
    const Rows<T, count> rows(x, plane, a.channels, first - Before);
    T* to = y + first * plane;
    over_columns<T>(pixels, [&](int64_t i) NNARCH_INLINE_LAMBDA {
      Vec<T> r[count];
      window_sums<T, Before, After>(
          [&](int j) NNARCH_INLINE_LAMBDA {
            r[j] = at_least<T>(load(rows.at[j] + i), floor);
            return r[j] * r[j];
          },
          [&](int j, Vec<T> sum) NNARCH_INLINE_LAMBDA {
            const Vec<T> p = inverse_power<T, power>(sum * scale + k, a.beta);
            store(to + j * plane + i, r[j + Before] * p);
          });
    });
  });
}

// With p = s^-beta: dx[j] = grad[j]·p[j] - 2·scale·beta·r[j]·Σ t[c] over the channels c whose
// windows hold j, where t[c] = grad[c]·r[c]·p[c]/s[c].
template <class T, int Before, int After, Power power>
void grad_planes_of(const T* grad, const T* x, int64_t plane, int64_t pixels, const Response<T>& a,
                    T* scratch, T* dx) {
  constexpr int count = kGroup + Before + After;
  const Vec<T> floor = broadcast(a.floor), k = broadcast(a.k), scale = broadcast(a.scale);
  const Vec<T> dead = broadcast(a.dead), slope = broadcast(static_cast<T>(-2 * a.beta) * a.scale);
  T *direct = scratch, *through = scratch + a.channels * pixels;  // grad·p and t
  over_groups(a.channels, [&](int64_t first) NNARCH_INLINE_LAMBDA {
    const Rows<T, count> rows(x, plane, a.channels, first - Before);
    const T* from = grad + first * plane;
    const int64_t to = first * pixels;
    over_columns<T>(pixels, [&](int64_t i) NNARCH_INLINE_LAMBDA {
      Vec<T> r[count];
      window_sums<T, Before, After>(
          [&](int j) NNARCH_INLINE_LAMBDA {
            r[j] = at_least<T>(load(rows.at[j] + i), floor);
            return r[j] * r[j];
          },
          [&](int j, Vec<T> sum) NNARCH_INLINE_LAMBDA {
            const Vec<T> s = sum * scale + k;
            const Vec<T> gp = load(from + j * plane + i) * inverse_power<T, power>(s, a.beta);
            store(direct + to + j * pixels + i, gp);
            store(through + to + j * pixels + i, gp * r[j + Before] / s);
          });
    });
  });
  over_groups(a.channels, [&](int64_t first) NNARCH_INLINE_LAMBDA {
    const Rows<T, count> rows(through, pixels, a.channels, first - After);
    const T *from = x + first * plane, *gp = direct + first * pixels;
    T* to = dx + first * plane;
    over_columns<T>(pixels, [&](int64_t i) NNARCH_INLINE_LAMBDA {
      window_sums<T, After, Before>(
          [&](int j) NNARCH_INLINE_LAMBDA { return load(rows.at[j] + i); },
          [&](int j, Vec<T> sum) NNARCH_INLINE_LAMBDA {
            const Vec<T> v = load(from + j * plane + i), r = at_least<T>(v, floor);
            const Vec<T> d = load(gp + j * pixels + i) + slope * r * sum;
            store(to + j * plane + i, v <= dead ? Vec<T>{} : d);
          });
    });
  });
}

// Any window, any number of channels and pixels.

// f(i, lanes) for vectors of which the last may be partial.
template <class T, class F>
NNARCH_INLINE void over_partial_columns(int64_t pixels, const F& f) {
  for (int64_t i = 0; i < pixels; i += kLanes<T>)
    f(i, pixels - i < kLanes<T> ? pixels - i : kLanes<T>);
}

// k + scale·Σ r² of channel c.
template <class T>
NNARCH_INLINE Vec<T> energy(const T* x, int64_t plane, const Response<T>& a, int64_t c,
                            int64_t lanes) {
  const int64_t first = c > a.before ? c - a.before : 0;
  const int64_t last = c + a.after < a.channels ? c + a.after : a.channels - 1;
  Vec<T> sum{};
  for (int64_t j = first; j <= last; ++j) {
    const Vec<T> r = at_least<T>(load_n(x + j * plane, lanes), broadcast(a.floor));
    sum += r * r;
  }
  return sum * a.scale + a.k;
}

template <class T, Power power>
void forward_planes_any(const T* x, int64_t plane, int64_t pixels, const Response<T>& a, T* y) {
  for (int64_t c = 0; c < a.channels; ++c)
    over_partial_columns<T>(pixels, [&](int64_t i, int64_t lanes) NNARCH_INLINE_LAMBDA {
      const int64_t at = c * plane + i;
      const Vec<T> r = at_least<T>(load_n(x + at, lanes), broadcast(a.floor));
      const Vec<T> s = energy(x + i, plane, a, c, lanes);
      store_n(y + at, r * inverse_power<T, power>(s, a.beta), lanes);
    });
}

template <class T, Power power>
void grad_planes_any(const T* grad, const T* x, int64_t plane, int64_t pixels, const Response<T>& a,
                     T* scratch, T* dx) {
  T *direct = scratch, *through = scratch + a.channels * pixels;
  const Vec<T> floor = broadcast(a.floor);
  for (int64_t c = 0; c < a.channels; ++c)
    over_partial_columns<T>(pixels, [&](int64_t i, int64_t lanes) NNARCH_INLINE_LAMBDA {
      const int64_t at = c * plane + i, to = c * pixels + i;
      const Vec<T> r = at_least<T>(load_n(x + at, lanes), floor);
      const Vec<T> s = energy(x + i, plane, a, c, lanes);
      const Vec<T> gp = load_n(grad + at, lanes) * inverse_power<T, power>(s, a.beta);
      store_n(direct + to, gp, lanes);
      store_n(through + to, gp * r / s, lanes);
    });
  const T slope = static_cast<T>(-2 * a.beta) * a.scale;
  for (int64_t c = 0; c < a.channels; ++c) {
    const int64_t first = c > a.after ? c - a.after : 0;
    const int64_t last = c + a.before < a.channels ? c + a.before : a.channels - 1;
    over_partial_columns<T>(pixels, [&](int64_t i, int64_t lanes) NNARCH_INLINE_LAMBDA {
      Vec<T> sum{};
      for (int64_t j = first; j <= last; ++j) sum += load_n(through + j * pixels + i, lanes);
      const Vec<T> v = load_n(x + c * plane + i, lanes), r = at_least<T>(v, floor);
      const Vec<T> d = load_n(direct + c * pixels + i, lanes) + r * sum * slope;
      store_n(dx + c * plane + i, v <= broadcast(a.dead) ? Vec<T>{} : d, lanes);
    });
  }
}

}  // namespace nnarch::NNARCH_ISA
