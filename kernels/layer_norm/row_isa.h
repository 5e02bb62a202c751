// Sums along a row, in an order that depends on its length alone. For *_isa.cpp.
#pragma once

#include "cpu/stored_isa.h"

namespace nnarch::NNARCH_ISA {

// Vectors that are added side by side: an addition waits three cycles for the one before it.
#if defined(NNARCH_ISA_avx512)
inline constexpr int kChains = 4;
#else
inline constexpr int kChains = 8;
#endif

// So many additions go to a lane in T before its sum goes on in double.
inline constexpr int64_t kChainLength = 32;

// v with the lanes from n on set to zero: they hold functions of zeros, not of inputs.
template <class T>
NNARCH_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  using B = typename Bits<T>::V;
  B lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  const B count = static_cast<uint32_t>(n) - B{};
  return (Vec<T>)((B)v & (B)(lane < count));
}

// What a place in the row contributes to each of some sums.
template <class T, int terms>
struct Terms {
  Vec<T> v[terms];
};

template <class T, int terms>
struct Totals {
  double of[terms] = {};

  template <int chains>
  NNARCH_INLINE void add(Vec<T> (&sums)[chains][terms]) {
    for (int width = chains / 2; width > 0; width /= 2)
      for (int c = 0; c < width; ++c)
        for (int t = 0; t < terms; ++t) sums[c][t] += sums[c + width][t];
    for (int t = 0; t < terms; ++t) of[t] += static_cast<double>(horizontal_sum<T>(sums[0][t]));
  }
};

// The sums over the columns of f(i, n), the Terms of n columns from i on; n is a constant, the
// lanes of a vector, but for the last columns.
template <class T, int terms, class F>
NNARCH_INLINE Totals<T, terms> sum_row(int64_t columns, const F& f) {
  constexpr int64_t w = kLanes<T>;
  constexpr int chains = terms == 1 ? kChains : terms == 2 ? kChains / 2 : 1;
  constexpr int64_t step = chains * w;
  Totals<T, terms> totals;
  int64_t i = 0;
  while (i + step <= columns) {
    const int64_t last = i + kChainLength * step;
    const int64_t end = last < columns ? last : columns;
    Vec<T> sums[chains][terms] = {};
    for (; i + step <= end; i += step)
      for (int c = 0; c < chains; ++c) {
        const Terms<T, terms> value = f(i + c * w, w);
        for (int t = 0; t < terms; ++t) sums[c][t] += value.v[t];
      }
    totals.add(sums);
  }
  if (i == columns) return totals;
  Vec<T> rest[1][terms] = {};
  for (; i + w <= columns; i += w) {
    const Terms<T, terms> value = f(i, w);
    for (int t = 0; t < terms; ++t) rest[0][t] += value.v[t];
  }
  if (i < columns) {
    const Terms<T, terms> value = f(i, columns - i);
    for (int t = 0; t < terms; ++t) rest[0][t] += first_lanes<T>(value.v[t], columns - i);
  }
  totals.add(rest);
  return totals;
}

// Calls f(i, n) for the columns, n as above.
template <class T, class F>
NNARCH_INLINE void over_row(int64_t columns, const F& f) {
  constexpr int64_t w = kLanes<T>;
  int64_t i = 0;
  for (; i + w <= columns; i += w) f(i, w);
  if (i < columns) f(i, columns - i);
}

// Stores past the caches where the type has such a store: rows are whole lines then.
template <class S>
NNARCH_INLINE void put(S* p, Vec<Compute<S>> v, int64_t n, bool past_caches) {
  if constexpr (sizeof(S) >= 4)
    if (past_caches) return stream(p, v);
  store_as(p, v, n);
}

}  // namespace nnarch::NNARCH_ISA
