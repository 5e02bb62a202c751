// Per-channel sums, in double beyond short bursts.
#pragma once

#include "cpu/activation.h"
#include "cpu/simd.h"
#include "cpu/wide.h"
#include "normalization/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {

// The terms of a reduction for n elements from offset i on, added to s. `mean` is that of the
// channel of each lane.
template <class T, Reduction kind, int64_t code>
NNARCH_INLINE void add_terms(const NormOperands<T>& o, int64_t i, int64_t n, Vec<T> mean,
                             Vec<T>* s) {
  if constexpr (kind == Reduction::sum) s[0] += load_n(o.x + i, n);
  if constexpr (kind == Reduction::dot) s[0] += load_n(o.x + i, n) * load_n(o.grad + i, n);
  if constexpr (kind == Reduction::centered) {
    const Vec<T> d = load_n(o.x + i, n) - mean;
    s[0] += d;
    s[1] += d * d;
  }
  if constexpr (kind == Reduction::backward) {
    Vec<T> g = load_n(o.grad + i, n);
    if constexpr (code != kNone) g *= activate_grad_as<T, code>(load_n(o.y + i, n), o.alpha);
    s[0] += g;
    s[1] += g * (load_n(o.x + i, n) - mean);
  }
  if constexpr (kind == Reduction::double_backward) {
    const Vec<T> gg = load_n(o.gradgrad + i, n), g = load_n(o.grad + i, n);
    const Vec<T> d = load_n(o.x + i, n) - mean;
    s[0] += gg;
    s[1] += g;
    s[2] += gg * d;
    s[3] += g * d;
    s[4] += gg * g;
  }
}

// Asks for the line of offset i of whatever the terms read.
template <class T, Reduction kind, int64_t code>
NNARCH_INLINE void fetch_terms(const NormOperands<T>& o, int64_t i) {
  __builtin_prefetch(o.x + i);
  if constexpr (kind != Reduction::sum) __builtin_prefetch(o.grad + i);
  if constexpr (kind == Reduction::double_backward) __builtin_prefetch(o.gradgrad + i);
  if constexpr (kind == Reduction::backward && code != kNone) __builtin_prefetch(o.y + i);
}

// v with the lanes from n on set to zero: they hold functions of zeros, not of inputs.
template <class T>
NNARCH_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  using B = typename Bits<T>::V;
  B lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  const B count = static_cast<uint32_t>(n) - B{};
  return (Vec<T>)((B)v & (B)(lane < count));
}

// Far tensors: while a burst of rows is added, vector by vector of channels, the next one is asked
// for in the order of its addresses. Eight rows read side by side are more than the hardware
// follows: 144 channels of 56×56 came at 12 GB/s, 32 channels at 30.
template <class T, Reduction kind, int64_t code, bool far>
void reduce_rows_as(const NormOperands<T>& o, int64_t first, int64_t count, int64_t channels,
                    double* sums) {
  constexpr int terms = terms_of(kind), w = kLanes<T>;
  for (int64_t row = 0; row < count; row += kBurst) {
    const int64_t rows = count - row < kBurst ? count - row : kBurst;
    int64_t ahead = first + (row + kBurst) * channels;
    for (int64_t c = 0; c < channels; c += w) {
      const int64_t n = channels - c < w ? channels - c : w, i = first + row * channels + c;
      const Vec<T> mean = o.mean ? load_n(o.mean + c, n) : Vec<T>{};
      Vec<T> s[terms] = {};
      const auto add = [&](int64_t r, int64_t lanes) NNARCH_INLINE_LAMBDA {
        if constexpr (far) fetch_terms<T, kind, code>(o, ahead), ahead += n;
        add_terms<T, kind, code>(o, i + r * channels, lanes, mean, s);
      };
      if (rows == kBurst && n == w)
        for (int r = 0; r < kBurst; ++r) add(r, w);
      else
        for (int64_t r = 0; r < rows; ++r) add(r, n);
      for (int t = 0; t < terms; ++t) add_wide<T>(sums + t * channels + c, s[t], n);
    }
  }
}

template <class T, Reduction kind, int64_t code>
void reduce_plane_as(const NormOperands<T>& o, int64_t first, int64_t count, int64_t channel,
                     int64_t channels, double* sums) {
  constexpr int terms = terms_of(kind), w = kLanes<T>;
  const Vec<T> mean = o.mean ? broadcast<T>(o.mean[channel]) : Vec<T>{};
  Wide<T> total[terms];
  int64_t i = 0;
  for (; i + kBurst * w <= count; i += kBurst * w) {
    Vec<T> s[terms] = {};
    for (int r = 0; r < kBurst; ++r) add_terms<T, kind, code>(o, first + i + r * w, w, mean, s);
    for (int t = 0; t < terms; ++t) total[t].add(s[t]);
  }
  Vec<T> s[terms] = {};
  for (; i + w <= count; i += w) add_terms<T, kind, code>(o, first + i, w, mean, s);
  if (const int64_t rest = count - i; rest > 0) {
    Vec<T> tail[terms] = {};
    add_terms<T, kind, code>(o, first + i, rest, mean, tail);
    for (int t = 0; t < terms; ++t) s[t] += first_lanes<T>(tail[t], rest);
  }
  for (int t = 0; t < terms; ++t) {
    total[t].add(s[t]);
    sums[t * channels + channel] += total[t].total();
  }
}

// Calls f(Constant<kind>{}, Code<code>{}); only `backward` has an activation.
template <Reduction value>
struct Constant {
  static constexpr Reduction kind = value;
};
template <class F>
NNARCH_INLINE void with_reduction(Reduction kind, int64_t activation, const F& f) {
  switch (kind) {
    case Reduction::sum:
      return f(Constant<Reduction::sum>{}, Code<kNone>{});
    case Reduction::dot:
      return f(Constant<Reduction::dot>{}, Code<kNone>{});
    case Reduction::centered:
      return f(Constant<Reduction::centered>{}, Code<kNone>{});
    case Reduction::double_backward:
      return f(Constant<Reduction::double_backward>{}, Code<kNone>{});
    case Reduction::backward:
      return with_activation(activation,
                             [&](auto code) { f(Constant<Reduction::backward>{}, code); });
  }
}

template <class T>
void reduce_rows(Reduction kind, const NormOperands<T>& o, int64_t first, int64_t count,
                 int64_t channels, double* sums) {
  with_reduction(kind, o.activation, [&](auto k, auto c) {
    if constexpr (k.kind != Reduction::centered)  // the second pass over a part finds it in cache
      if (o.reach != Reach::near)
        return reduce_rows_as<T, k.kind, c.code, true>(o, first, count, channels, sums);
    reduce_rows_as<T, k.kind, c.code, false>(o, first, count, channels, sums);
  });
}

template <class T>
void reduce_plane(Reduction kind, const NormOperands<T>& o, int64_t first, int64_t count,
                  int64_t channel, int64_t channels, double* sums) {
  with_reduction(kind, o.activation, [&](auto k, auto c) {
    reduce_plane_as<T, k.kind, c.code>(o, first, count, channel, channels, sums);
  });
}

}  // namespace nnarch::NNARCH_ISA
