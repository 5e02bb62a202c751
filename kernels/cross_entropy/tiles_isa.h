// Tiles [class][column]: vectors along the columns. For softmax_isa.cpp.
#pragma once

#include "cpu/math.h"
#include "cpu/wide.h"
#include "cross_entropy/cpu_kernels.h"

namespace nnarch::NNARCH_ISA {
namespace {

template <class T>
constexpr T kLowest = -static_cast<T>(__builtin_huge_val());

template <class T>
NNARCH_INLINE int64_t lanes_left(int64_t all, int64_t at) {
  return all - at < kLanes<T> ? all - at : kLanes<T>;
}

// What is subtracted before exp: the maximum, but 0 where everything so far is -infinity.
template <class T>
NNARCH_INLINE Vec<T> reference_of(Vec<T> top) {
  return top == broadcast<T>(kLowest<T>) ? Vec<T>{} : top;
}

template <class T>
void add_bias(T* z, int64_t step, int64_t classes, int64_t columns, const T* bias) {
  for (int64_t c = 0; c < classes; ++c, z += step) {
    const Vec<T> b = broadcast<T>(bias[c]);
    for (int64_t n = 0; n < columns; n += kLanes<T>) {
      const int64_t some = lanes_left<T>(columns, n);
      store_n(z + n, load_n(z + n, some) + b, some);
    }
  }
}

// A vector of columns through up to kSideBySide classes: their maximum, then what they add to the
// sum. Between the two passes the logits lie side by side: planes of a power of two, as images
// have, are all in one set of the first-level cache, and few of 21 would still be there.
constexpr int64_t kSideBySide = 64;

template <class T>
struct ColumnState {
  Vec<T> top, total;

  NNARCH_INLINE void observe(const T* z, int64_t step, int64_t classes, int64_t some) {
    Vec<T> logits[kSideBySide];
    Vec<T> even = top, odd = top;
    int64_t c = 0;
    if (some == kLanes<T>) {
      for (; c + 2 <= classes; c += 2, z += 2 * step) {
        __builtin_prefetch(z + kAhead);
        __builtin_prefetch(z + step + kAhead);
        logits[c] = load(z), logits[c + 1] = load(z + step);
        even = at_least<T>(logits[c], even), odd = at_least<T>(logits[c + 1], odd);
      }
    }
    for (; c < classes; ++c, z += step) {
      logits[c] = load_n(z, some);
      even = at_least<T>(logits[c], even);
    }
    const Vec<T> now = at_least<T>(even, odd), reference = reference_of<T>(now);
    total *= exp<T>(top - reference), top = now;
    Vec<T> other = {};
    for (c = 0; c + 2 <= classes; c += 2) {
      total += exp<T>(logits[c] - reference);
      other += exp<T>(logits[c + 1] - reference);
    }
    if (c < classes) total += exp<T>(logits[c] - reference);
    total += other;
  }

 private:
  static constexpr int64_t kAhead = 256 / static_cast<int64_t>(sizeof(T));  // four lines
};

// A NaN among the logits need not reach the maximum: it reaches the sum.
template <class T>
void observe(const T* z, int64_t step, int64_t classes, int64_t columns, T* max, T* sum) {
  for (int64_t n = 0; n < columns; n += kLanes<T>) {
    const int64_t some = lanes_left<T>(columns, n);
    ColumnState<T> state{load_n(max + n, some), load_n(sum + n, some)};
    for (int64_t c = 0; c < classes; c += kSideBySide)
      state.observe(z + n + c * step, step, classes - c < kSideBySide ? classes - c : kSideBySide,
                    some);
    store_n(max + n, state.top, some);
    store_n(sum + n, state.total, some);
  }
}

template <class T>
NNARCH_INLINE Vec<T> factor(const ClassFactors<T>& a, int64_t c, int64_t n, int64_t some) {
  Vec<T> f = broadcast<T>(a.rest);
  if (a.q) f += load_n(a.q + c * a.q_step + n, some) * a.of_target;
  return a.weight ? f * a.weight[c] : f;
}

template <class T>
void weigh(const T* z, int64_t step, int64_t classes, int64_t columns, const T* near,
           const ClassFactors<T>& a, double* weighted, double* total) {
  for (int64_t n = 0; n < columns; n += kLanes<T>) {
    const int64_t some = lanes_left<T>(columns, n);
    const Vec<T> reference = reference_of<T>(load_n(near + n, some));
    Vec<T> products = {}, factors = {};
    const T* at = z + n;
    for (int64_t c = 0; c < classes; ++c, at += step) {
      const Vec<T> f = factor(a, c, n, some);
      factors += f;
      products += f * (load_n(at, some) - reference);
    }
    for (int64_t i = 0; i < some; ++i) {
      const double sum = factors[i];
      weighted[n + i] += sum * reference[i] + products[i];
      total[n + i] += sum;
    }
  }
}

template <class T>
void gradient(const T* z, int64_t step, int64_t classes, int64_t columns, const T* max,
              const T* alpha, const T* scale, const ClassFactors<T>& a, T* g, int64_t g_step) {
  const bool factors = a.any();
  for (int64_t n = 0; n < columns; n += kLanes<T>) {
    const int64_t some = lanes_left<T>(columns, n);
    const Vec<T> high = load_n(max + n, some), of_p = load_n(alpha + n, some);
    const Vec<T> of_a = factors ? load_n(scale + n, some) : Vec<T>{};
    const T* at = z + n;
    T* to = g + n;
    for (int64_t c = 0; c < classes; ++c, at += step, to += g_step) {
      Vec<T> v = of_p * exp<T>(load_n(at, some) - high);
      if (factors) v -= of_a * factor(a, c, n, some);
      store_n(to, v, some);
    }
  }
}

template <class T>
void target_gradient(const T* z, int64_t step, int64_t classes, int64_t columns, const T* max,
                     const T* rest, const T* scale, const ClassFactors<T>& a, T* g,
                     int64_t g_step) {
  for (int64_t c = 0; c < classes; ++c, z += step, g += g_step) {
    const T weight = a.weight ? a.weight[c] * a.of_target : a.of_target;
    for (int64_t n = 0; n < columns; n += kLanes<T>) {
      const int64_t some = lanes_left<T>(columns, n);
      const Vec<T> below = load_n(max + n, some) - load_n(z + n, some) + load_n(rest + n, some);
      store_n(g + n, load_n(scale + n, some) * weight * below, some);
    }
  }
}

}  // namespace
}  // namespace nnarch::NNARCH_ISA
