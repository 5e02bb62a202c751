// One sample whose classes lie side by side: vectors along the classes. For softmax_isa.cpp.
#pragma once

#include "cross_entropy/tiles_isa.h"

namespace nnarch::NNARCH_ISA {
namespace {

constexpr int64_t kRowBurst = 32;  // vectors between two looks at the maximum

template <class T, int... I>
NNARCH_INLINE Vec<T> lane_numbers(Indices<I...>) {
  return Vec<T>{static_cast<T>(I)...};
}

// The first n lanes; the others are -infinity.
template <class T>
NNARCH_INLINE Vec<T> load_low(const T* p, int64_t n) {
  const Vec<T> lane = lane_numbers<T>(MakeIndices<kLanes<T>>{});
  return lane < broadcast<T>(static_cast<T>(n)) ? load_n(p, n) : broadcast<T>(kLowest<T>);
}

template <class T>
NNARCH_INLINE T largest(Vec<T> v) {
  T top = v[0];
  for (int i = 1; i < kLanes<T>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// Each lane keeps a maximum and a sum of its own until the end: nothing horizontal on the way.
template <class T>
struct RowState {
  Vec<T> top = broadcast<T>(kLowest<T>), total = {}, other = {};

  NNARCH_INLINE Vec<T> raise_to(Vec<T> now) {
    const Vec<T> reference = reference_of<T>(now), shrink = exp<T>(top - reference);
    top = now, total *= shrink, other *= shrink;
    return reference;
  }
  NNARCH_INLINE void burst(const T* z, int64_t vectors) {
    constexpr int64_t w = kLanes<T>;
    Vec<T> a = top, b = top;
    int64_t i = 0;
    for (; i + 2 <= vectors; i += 2) {
      a = at_least<T>(load(z + i * w), a);
      b = at_least<T>(load(z + i * w + w), b);
    }
    if (i < vectors) a = at_least<T>(load(z + i * w), a);
    const Vec<T> reference = raise_to(at_least<T>(a, b));
    for (i = 0; i + 2 <= vectors; i += 2) {
      total += exp<T>(load(z + i * w) - reference);
      other += exp<T>(load(z + i * w + w) - reference);
    }
    if (i < vectors) total += exp<T>(load(z + i * w) - reference);
  }
  NNARCH_INLINE void last(Vec<T> v) {
    const Vec<T> reference = raise_to(at_least<T>(v, top));
    total += exp<T>(v - reference);
  }
};

template <class T>
void row_observe(const T* z, int64_t classes, T* max, T* sum) {
  constexpr int64_t w = kLanes<T>;
  RowState<T> state;
  int64_t c = 0;
  for (int64_t vectors = classes / w; vectors > 0;) {
    const int64_t some = vectors < kRowBurst ? vectors : kRowBurst;
    state.burst(z + c, some);
    c += some * w, vectors -= some;
  }
  if (c < classes) state.last(load_low(z + c, classes - c));
  const T top = largest<T>(state.top);
  const Vec<T> reference = reference_of<T>(broadcast<T>(top));
  *max = top;
  *sum = horizontal_sum<T>((state.total + state.other) * exp<T>(state.top - reference));
}

template <class T>
NNARCH_INLINE Vec<T> row_factor(const ClassFactors<T>& a, int64_t c, int64_t n) {
  Vec<T> f = broadcast<T>(a.rest);
  if (a.q) f += load_n(a.q + c, n) * a.of_target;
  return a.weight ? f * load_n(a.weight + c, n) : f;
}

template <class T>
void row_weigh(const T* z, int64_t classes, T near, const ClassFactors<T>& a, double* weighted,
               double* total) {
  const T reference = near == kLowest<T> ? T{0} : near;
  constexpr int64_t w = kLanes<T>;
  Wide<T> products, factors;
  int64_t c = 0;
  for (; c + w <= classes; c += w) {
    const Vec<T> f = row_factor(a, c, w);
    factors.add(f);
    products.add(f * (load(z + c) - reference));
  }
  for (; c < classes; ++c) {
    const T weight = a.weight ? a.weight[c] : T{1};
    const T own = weight * (a.q ? a.rest + a.q[c] * a.of_target : a.rest);
    *weighted += static_cast<double>(own) * z[c];
    *total += own;
  }
  const double sum = factors.total();
  *weighted += products.total() + sum * reference;
  *total += sum;
}

template <class T>
void row_gradient(const T* z, int64_t classes, T max, T alpha, T scale, const ClassFactors<T>& a,
                  T* g, bool past_caches) {
  constexpr int64_t w = kLanes<T>;
  const bool factors = a.any();
  const auto value = [&](int64_t c, int64_t n) {
    Vec<T> v = alpha * exp<T>(load_n(z + c, n) - max);
    if (factors) v -= scale * row_factor(a, c, n);
    return v;
  };
  int64_t c = 0;
  if (past_caches) {
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(g) % kVectorBytes);
    if (misaligned > 0) {
      const int64_t head = (kVectorBytes - misaligned) / static_cast<int64_t>(sizeof(T));
      c = head < classes ? head : classes;
      store_n(g, value(0, c), c);
    }
    for (; c + w <= classes; c += w) stream(g + c, value(c, w));
  }
  for (; c + w <= classes; c += w) store(g + c, value(c, w));
  if (c < classes) store_n(g + c, value(c, classes - c), classes - c);
}

template <class T>
double row_sum(const T* x, int64_t n) {
  Wide<T> sum;
  for (int64_t i = 0; i < n; i += kLanes<T>) sum.add(load_n(x + i, lanes_left<T>(n, i)));
  return sum.total();
}

template <class T>
void add_parts(const T* parts, int64_t stride, int64_t count, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t some = lanes_left<T>(n, i);
    Vec<T> sum = load_n(parts + i, some);
    for (int64_t p = 1; p < count; ++p) sum += load_n(parts + p * stride + i, some);
    store_n(to + i, sum, some);
  }
}

template <class T>
void scale_by(const T* x, T factor, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t some = lanes_left<T>(n, i);
    store_n(to + i, load_n(x + i, some) * factor, some);
  }
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
