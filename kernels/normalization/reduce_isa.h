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

// v with the lanes from n on set to zero: they hold functions of zeros, not of inputs.
template <class T>
NNARCH_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  using B = typename Bits<T>::V;
  B lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  const B count = static_cast<uint32_t>(n) - B{};
  return (Vec<T>)((B)v & (B)(lane < count));
}

template <class T, Reduction kind, int64_t code>
void reduce_rows_as(const NormOperands<T>& o, int64_t first, int64_t count, int64_t channels,
                    double* sums) {
  constexpr int terms = terms_of(kind), w = kLanes<T>;
  for (int64_t row = 0; row < count; row += kBurst) {
    const int64_t rows = count - row < kBurst ? count - row : kBurst;
    for (int64_t c = 0; c < channels; c += w) {
      const int64_t n = channels - c < w ? channels - c : w, i = first + row * channels + c;
      const Vec<T> mean = o.mean ? load_n(o.mean + c, n) : Vec<T>{};
      Vec<T> s[terms] = {};
      if (rows == kBurst && n == w)
        for (int r = 0; r < kBurst; ++r) add_terms<T, kind, code>(o, i + r * channels, w, mean, s);
      else
        for (int64_t r = 0; r < rows; ++r)
          add_terms<T, kind, code>(o, i + r * channels, n, mean, s);
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
    reduce_rows_as<T, k.kind, c.code>(o, first, count, channels, sums);
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
